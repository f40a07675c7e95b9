"""macOS and Windows: the commands run after Unix's own modules are taken away, and none of these is imported early."""

import json
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from conftest import LONGEST_S, ROOT, SCRIPTS, TINY
from t2i import machine, models
from t2i.data import workers
from t2i.training import checkpoints
from test_architecture import UNIX_MODULES, UNIX_NAMES

# In every process, before anything else: the suite's files, unlike the libraries, which have code for each system, see neither
# modules nor names of `os` and `signal` that only Unix has; processes are started by spawn.
SITECUSTOMIZE = """
import builtins, multiprocessing, os, signal, sys, types

SUITE, MODULES, NAMES = eval(os.environ["T2I_TAKEN_AWAY"])

def asked_by_suite(level=2):
    return str(sys._getframe(level).f_globals.get("__file__", "")).startswith(SUITE)

def import_what_is_everywhere(name, *words, original=builtins.__import__, **named):
    if name.split(".")[0] in MODULES and asked_by_suite():
        raise ModuleNotFoundError(f"No module named {name!r} on this system")
    return original(name, *words, **named)

class Poorer(types.ModuleType):
    def __getattribute__(self, name):
        if name in NAMES.get(super().__getattribute__("__name__"), ()) and asked_by_suite():
            raise AttributeError(f"no {name} on this system")
        return super().__getattribute__(name)

builtins.__import__ = import_what_is_everywhere
os.__class__ = signal.__class__ = Poorer
multiprocessing.set_start_method("spawn", force=True)
"""
# All commands in one process, as each would import torch anew.
COMMANDS = """
import json, runpy, sys, time
from pathlib import Path

def main():
    sys.path.append(sys.argv[1])
    for script, *words in json.loads(Path("commands.json").read_text()):
        began = time.monotonic()
        if script.startswith("train"):
            from accelerate.state import AcceleratorState
            AcceleratorState._reset_state(True)
        sys.argv = [script, *words]
        runpy.run_path(str(Path(script)), run_name="__main__")
        print(f"DONE {Path(script).name} {time.monotonic() - began:.1f} s", flush=True)
    from streamlit.testing.v1 import AppTest
    app = AppTest.from_file(sys.argv_dashboard, default_timeout=60).run()
    assert not app.exception, app.exception
    print("DONE dashboard", [box.label for box in app.selectbox], flush=True)

if __name__ == "__main__":  # a process that is spawned runs this file again
    sys.argv_dashboard = sys.argv[2]
    main()
"""


def test_commands_run_without_what_is_unix_alone(tmp_path, environment):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "commands.py").write_text(COMMANDS)
    (tmp_path / "tiny.yaml").write_text(TINY)
    data = ("--config", "tiny.yaml", "--dataset", "dataset")
    quiet = ("--report_to", "none", "--max_train_steps", "1", "--validation_steps", "1", "--checkpointing_steps", "1")
    commands = [
        ("make_flowers.py", "--output_dir", "dataset", "--count", "8", "--validation_count", "4", "--test_count", "4",
         "--size", "32", "--workers", "2"),
        ("train_vae.py", *data, *quiet, "--output_dir", "vae"),
        ("train_unet.py", *data, *quiet, "--vae", "vae", "--output_dir", "outputs/unet"),
        ("generate_images.py", "--model", "outputs/unet", "--prompt", "a red flower", "--num_inference_steps", "1",
         "--output_dir", "pictures"),
        ("evaluate_checkpoints.py", *data, "--model", "outputs/unet", "--guidance_scales", "1.0", "--report_prompts", "2"),
    ]  # fmt: skip
    commands = [(str(SCRIPTS / script), *words) for script, *words in commands]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    taken = (str(SCRIPTS), str(ROOT / "dashboard")), UNIX_MODULES, UNIX_NAMES
    done = subprocess.run(
        [sys.executable, "commands.py", str(SCRIPTS), str(ROOT / "dashboard" / "streamlit_app.py")],
        cwd=tmp_path, env=environment | {"PYTHONPATH": str(tmp_path), "T2I_TAKEN_AWAY": repr(taken)},
        capture_output=True, text=True, timeout=LONGEST_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("DONE")] == [
        *(words[0].rpartition("/")[2] for words in commands),
        "dashboard",
    ], done.stdout
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert json.loads((tmp_path / "outputs" / "unet" / "run.json").read_text())["status"] == "finished"
    print(done.stdout)


def test_cores_and_memory_are_counted_on_every_system(monkeypatch):
    assert 1 <= machine.usable_cores() <= psutil.cpu_count()
    assert 1 <= workers.WORKERS <= 8
    peak = machine.peak_rss_bytes()
    assert peak >= 0.9 * psutil.Process().memory_info().rss
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.peak_rss_bytes() == pytest.approx(peak / 1024, rel=0.2)  # macOS counts bytes, not KiB
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    memory = SimpleNamespace(rss=1, peak_wset=7)
    monkeypatch.setattr(
        psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: memory)
    )  # macOS: no cpu_affinity
    assert machine.peak_rss_bytes() == 7
    assert machine.usable_cores() >= 1


def test_windows_syncs_files_and_no_folders(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    monkeypatch.setattr(checkpoints.sys, "platform", "win32")
    opened = []
    monkeypatch.setattr(
        checkpoints.os, "open", lambda path, flags, real=checkpoints.os.open: opened.append(path) or real(path, flags)
    )
    checkpoints.sync(tmp_path)
    checkpoints.sync(tmp_path / "file")
    assert opened == [tmp_path / "file"]


def test_an_apple_gpu_is_taken_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert models.best_device() == "mps"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert models.best_device() == "cuda"


def test_no_number_of_64_bits_reaches_an_apple_gpu(monkeypatch):
    """MPS has no float64: moving one there raises TypeError. A training step and a picture move none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from t2i.config import UnetConfig
    from t2i.diffusion import denoising_loss, draw, sample_posterior

    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                found.append(str(func))
            return made

    config = UnetConfig(
        unet_channels=[8, 16], unet_layers=1, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], attention_head_dim=2,
        text_hidden_size=8,
    )  # fmt: skip
    unet = models.build_unet(config, 8, 4, 8)
    scheduler = models.build_noise_scheduler(config)
    with Watch():
        drawn = draw(0, 0, [0, 1], (4, 8, 8), 1000)
        latents = sample_posterior(torch.zeros(2, 8, 8, 8), drawn.posterior_noise)
        loss = denoising_loss(unet, scheduler, latents, drawn.noise, drawn.timesteps, torch.zeros(2, 3, 8), 5.0).mean()
        loss.backward()
        torch.ones(1, dtype=torch.float64)
    assert found == ["aten.ones.default"]  # the last line's
