"""The session on a GPU machine, rehearsed without one: steps, time limits, files, exit codes, and the package."""

import argparse
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from conftest import ROOT, WARM

SESSION = ROOT / "benchmarks" / "gpu_session.sh"
# Stands for the machine's Python: notes what is run, and hangs, fails or prints figures where a step would.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"gpu_session.py check"*) echo '{{"machine": {{{gpu}"cpu": "x"}}, "versions": {{}}}}' ; exit ;;
  *"gpu_session.py collect"*) exec {python} "$@" ;;
esac
echo "$ACCELERATE_MIXED_PRECISION $*" >>{folder}/commands.txt
case "$*" in
  *test_gpu.py*) echo "11 passed in 80 s" ;;
  *train.py*) echo '{{"arm": "peer", "seconds_per_step": 0.2}}'; echo '{{"arm": "ou'; exit 3 ;;
  *train_vae.py*) sleep 300 & echo $! >{folder}/sleeping; echo "training"; wait ;;
  *train_unet.py*) exit 75 ;;
  *pictures*) touch "${{@: -1}}" ;;
esac
"""


@pytest.fixture(scope="module")
def session():
    """benchmarks/gpu_session.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_session

    yield gpu_session
    sys.path.remove(str(ROOT / "benchmarks"))
    sys.modules.pop("common")


def prepare(folder: Path, gpu: str = "") -> dict[str, str]:
    """A packed folder and a stand-in for Python; returns the environment of a session."""
    (folder / "packed" / "photos").mkdir(parents=True)
    (folder / "packed" / "train_text_to_image.py").write_text("")
    python = folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, folder=folder, gpu=gpu))
    python.chmod(0o755)
    return os.environ | {
        "PYTHON": str(python),
        "OUT": str(folder / "out"),
        "GPU_SESSION_FOLDER": str(folder / "packed"),
        "TMPDIR": str(folder),
    }


def run(environment, *words):
    return subprocess.run(
        ["bash", str(SESSION), "run", *words], env=environment, capture_output=True, text=True, timeout=650
    )


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    environment = prepare(tmp_path, gpu='"gpu": "NVIDIA H100 80GB HBM3", ')
    start = time.monotonic()
    done = run(environment, "--limit", "vae=1")
    assert time.monotonic() - start < 60
    assert done.returncode == 1, done.stderr
    said = (tmp_path / "out" / "session.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == ["machine", "tests", "train", "vae", "unet", "pictures", "gpu"]
    assert said[1].startswith("tests: ok")
    assert said[1].endswith("11 passed in 80 s")
    assert said[2].startswith("train: failed with exit code 3")
    assert said[3].startswith("vae: cut at its limit of 1 s")
    assert said[3].endswith(": training")
    assert said[4].startswith("unet: stopped at its limit of 100 s with a checkpoint")
    assert said[5].startswith("pictures: ok")
    assert said[-1].startswith("some steps failed")
    with contextlib.suppress(
        psutil.NoSuchProcess
    ):  # ended, and perhaps not yet collected by the system's first process
        left = psutil.Process(int((tmp_path / "sleeping").read_text()))
        assert left.status() == psutil.STATUS_ZOMBIE, "what a step started outlived it"
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    assert [line.split()[0] for line in commands if "train_unet.py" in line] == ["bf16"]
    assert any(line.endswith("benchmarks/gpu.py short") for line in commands)
    rows = [json.loads(line) for line in (tmp_path / "out" / "h100.jsonl").read_text().splitlines()]
    assert rows[0]["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert {"run": "train", "arm": "peer", "seconds_per_step": 0.2} in rows
    assert [row["ending"] for row in rows[1:] if row["run"] == "vae" and "ending" in row] == ["cut at its limit of 1 s"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "h100.jsonl", "log.txt", "pictures.png", "session.txt",
    ]  # fmt: skip


def test_steps_by_name_and_what_is_not_there(tmp_path):
    environment = prepare(tmp_path)
    (tmp_path / "packed" / "train_text_to_image.py").unlink()
    done = run(environment, "--tiny", "tests", "train")
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "out" / "session.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in said] == ["machine", "tests", "train", said[-1].split(":")[0]]
    assert "packed/ has no train_text_to_image.py; pack it with --peer" in said[2]
    assert said[-1].startswith("all well")
    for words, sentence in [
        (["tests"], "PyTorch finds no NVIDIA GPU here; give --tiny for a rehearsal on the CPU"),
        (["--tiny", "test"], "unknown step or option test; steps are tests train vae unet pictures gpu"),
        (["--tiny", "--limit", "vae=long"], "--limit vae=long is not STEP=SECONDS"),
        (["--limit", "vea=9"], "--limit vea=9 is not STEP=SECONDS"),
    ]:
        done = run(environment, *words)
        assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr


def test_a_flagship_training_on_the_cpu(tmp_path, environment):
    """The real commands, by the recipe of a rehearsal. Both trainings are forked, after their imports."""
    python = tmp_path / "python"
    real = shlex.quote(sys.executable)
    warm = f"{real} {ROOT}/tests/warm_python.py {os.environ[WARM]}" if WARM in os.environ else real
    python.write_text(
        f'#!/usr/bin/env bash\ncase "$1" in scripts/train_*) exec {warm} "$@" ;; *) exec {real} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    given = {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "GPU_SESSION_FOLDER": str(tmp_path)}
    done = run(environment | given, "--tiny", "--limit", "vae=300", "--limit", "unet=300", "vae", "unet")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, log[-3000:]
    said = (tmp_path / "out" / "session.txt").read_text()
    assert "the flagship trains on drawn flowers" in said
    for words in ("vae: ok", "unet: ok", "validation loss"):
        assert words in said


def test_the_flagship_is_the_cards_unet(session):
    from t2i import config

    flagship, card = (config.load_recipe(str(name)) for name in (ROOT / "benchmarks" / "flagship.yaml", "flowers"))
    for name in ("unet_channels", "unet_layers", "down_block_types", "attention_head_dim"):
        assert getattr(flagship.unet, name) == getattr(card.unet, name)
    assert (flagship.unet.text_hidden_size, flagship.unet.text_max_length) == (768, 77)  # of CLIP ViT-L/14
    assert flagship.data.resolution == 128
    config.check_unet(flagship)


def test_pictures_say_what_drew_them(session, tmp_path, monkeypatch):
    for name in ("unet", "vae", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "unet" / "metrics.jsonl").write_text('{"step": 40, "train_loss": 0.5}\n{"step": 50, "val_loss": 0.4}\n')
    (tmp_path / "unet" / "run.json").write_text("{}")
    (tmp_path / "vae" / "run.json").write_text('{"psnr_db": 22.5}')
    (tmp_path / "prompts.txt").write_text("a rose\na tulip\n")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "grid.png")
    monkeypatch.setattr(session.subprocess, "run", lambda words, **_: None)
    names = {"run": tmp_path / "unet", "vae_run": tmp_path / "vae", "prompts": tmp_path / "prompts.txt"}
    session.draw(
        argparse.Namespace(**{key: str(value) for key, value in names.items()}, file=str(tmp_path / "out.png"))
    )
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    assert sheet.shape[0] == 64 + 16 * 4
    assert (sheet[64:, :64] == [255, 0, 0]).all()
    assert (sheet[:16] < 128).any(), "no words above the pictures"


def wheel(name, version, *requires):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        text = "".join(f"Requires-Dist: {one}\n" for one in requires)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n{text}")
    return file.getvalue()


def test_only_what_is_missing_is_brought_along(session, tmp_path, monkeypatch, capsys):
    index = {
        "diffusers==1.0": wheel("diffusers", "1.0", "torch", "core==2.5", "huggingface_hub>=2", 'rich; extra == "x"'),
        "core==2.5": wheel("core", "2.5", 'tomli; python_version < "3.11"', "diffusers"),
    }
    asked = []

    def fetch(words, **_):
        asked.append(words[-1])
        if words[-1] not in index:
            return subprocess.CompletedProcess(words, 1, "", "ERROR: No matching distribution found")
        (Path(words[words.index("--dest") + 1]) / f"{words[-1].replace('==', '-')}.whl").write_bytes(index[words[-1]])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(session.subprocess, "run", fetch)
    (tmp_path / "there.txt").write_text("torch==2.11.0\nhuggingface-hub==1.33.0\n")
    there = session.read_packages(tmp_path / "there.txt")
    wanted = [session.Requirement(text) for text in ("diffusers==1.0", "torch==2.13")]
    session.download(wanted, there, tmp_path / "wheels")
    assert asked == ["diffusers==1.0", "core==2.5"]
    assert "NOTE: huggingface_hub>=2 is wanted, and the machine has 1.33.0" in capsys.readouterr().out
    with pytest.raises(session.UserError, match=r"pip brings no wheel of nowhere for Python 3.12 on x86-64 Linux"):
        session.download([session.Requirement("nowhere")], there, tmp_path / "more")


@pytest.fixture
def options(session, tmp_path, monkeypatch):
    """Of packing twelve photos, without wheels."""
    photos = np.random.default_rng(0).integers(0, 255, (12, 40, 60, 3), np.uint8)
    for number, pixels in enumerate(photos):
        (tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "ab"[number % 2] / f"{number}.png")
    monkeypatch.setattr(session, "PACKED", tmp_path / "packed")
    monkeypatch.setattr(session, "download", lambda *_: None)
    (tmp_path / "peer.py").write_text("peer")
    return argparse.Namespace(
        dataset=str(tmp_path / "data"), peer=tmp_path / "peer.py", machine=ROOT / "benchmarks" / "gpu_machine.txt",
        limit_mb=64.0, resolution=32, max_train_samples=None,
    )  # fmt: skip


def test_photos_travel_as_small_jpegs_with_their_captions(session, options, tmp_path, capsys):
    from t2i.config import DataConfig
    from t2i.data import preparing

    (tmp_path / "packed" / "results").mkdir(parents=True)
    session.pack(options)
    assert (tmp_path / "packed" / "results").is_dir(), "packing again lost results"
    assert (tmp_path / "packed" / "train_text_to_image.py").read_text() == "peer"
    assert "of 64 MiB; carry the tree and packed/" in capsys.readouterr().out
    config = DataConfig(dataset=str(tmp_path / "packed" / "photos"), resolution=32, cache_dir=str(tmp_path / "cache"))
    splits = preparing.load_splits(config, say=lambda _: None)
    assert len(splits.train) + len(splits.validation) == 12
    assert set(splits.train.rows["caption"]) == {f"a photo of a {name}, a type of flower" for name in "ab"}
    assert len((tmp_path / "packed" / "prompts.txt").read_text().splitlines()) == 2
    assert splits.train.pixels.shape[1:] == (32, 32, 3)


def test_what_is_too_large_is_refused_and_nothing_is_lost(session, options, tmp_path, monkeypatch):
    session.pack(options)
    before = sorted(tmp_path.rglob("packed/**/*"))
    monkeypatch.setattr(session, "tree_bytes", lambda: 60 * 2**20)
    options.limit_mb = 60 + 4 / 1024  # MiB
    with pytest.raises(
        session.UserError, match=r"photos take 0.0 MiB and 0.0 MiB are left of .*--max_train_samples [0-9]+$"
    ):
        session.pack(options)
    assert sorted(tmp_path.rglob("packed/**/*")) == before
    assert not (tmp_path / "packed.part").exists()
    options.peer = tmp_path / "nowhere.py"
    with pytest.raises(session.UserError, match=r"no file .*nowhere\.py; give --peer"):
        session.pack(options)


def test_the_benchmarks_of_the_session_on_the_cpu(session, tmp_path, monkeypatch, capsys):
    """gpu.py's measuring of an arm runs, and train.py gives our script options that it knows."""
    import gpu
    import train

    from t2i import config

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    gpu.one("graph", "no", [2])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["arm"], row["batch"]) == ("graph", 2)
    assert row["samples_per_second"] > 0
    monkeypatch.setattr(train, "WORK", tmp_path)
    _, recipe = train.our_arguments(tmp_path / "model", tmp_path / "dataset")
    assert config.load_recipe(recipe).train_unet.train_batch_size == train.PLACE.batch
