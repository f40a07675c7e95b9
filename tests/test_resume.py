"""Training loses nothing: each fault is inflicted on the real thing, and its remains are checked."""

import fcntl
import io
import json
import os
import pickle
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import prove_resume
import train_unet
from conftest import SCRIPTS, warm_start
from t2i import models, run_lock, runs
from t2i.config import TrainUnetConfig, load_recipe
from t2i.errors import UserError
from t2i.files import write_json
from t2i.hub import model_card
from t2i.runs import checkpoint_copies, checkpoint_folders
from t2i.training import checkpoints, loop, stopping
from t2i.training.stopping import EXIT_STOPPED

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMMON = ("--config", "tiny.yaml", "--dataset", "dataset", "--vae", "vae", "--report_to", "none")


class Alone:
    """A run of one process, as `checkpoints.Node` describes it."""

    count, index, first = 1, 0, True

    @staticmethod
    def meet():
        pass

    @staticmethod
    def gather(value):
        return [value]


@pytest.fixture
def run_main(monkeypatch, workspace):
    """`train_unet.py`'s main in this process, in the workspace: saves the seconds of its imports."""

    def run(*arguments):
        monkeypatch.chdir(workspace)
        monkeypatch.setattr(sys, "argv", ["train_unet.py", *map(str, (*COMMON, *arguments))])
        train_unet.main()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workspace's commands: sums in another order differ in the last bit
    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def trained(workspace, tmp_path):
    """A copy of the finished tiny run, as if it had been stopped behind its last checkpoint."""
    run = tmp_path / "unet"
    shutil.copytree(workspace / "unet", run, ignore=shutil.ignore_patterns("evaluation"))
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**state, "status": "running"}))
    return run


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


# --- Saves -----------------------------------------------------------------------------------------------------------


def save_in_a_child(run, step, kill_at, limit=None, write=None):
    """`save_checkpoint` in a forked process that SIGKILLs itself at its `kill_at`-th change on disk; True if it got there."""
    child = os.fork()
    if child == 0:
        left = [kill_at]

        def counted(function):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in ("fsync", "replace", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoints.save_checkpoint(run, step, write or write_files(step), Alone, limit)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def write_files(step):
    def write(part):
        (part / "unet").mkdir()
        for name in ("unet/a.safetensors", "optimizer.safetensors", "state.json"):
            (part / name).write_bytes(f"{step} {name}".encode() * 100)

    return write


def test_sigkill_at_every_boundary_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """With a limit of one: the old one goes only when the new one is whole; a save made anew replaces its like."""
    for kill_at in range(1, 100):
        run = tmp_path / f"run-{kill_at}"
        checkpoints.save_checkpoint(run, 3, write_files(3), Alone, 1)
        killed = save_in_a_child(run, 6, kill_at, limit=1)
        found = checkpoints.find_checkpoint(run, "latest", Alone, say=lambda text: None)
        assert found is not None, kill_at
        assert found.name in ("checkpoint-000003", "checkpoint-000006")
        assert checkpoints.find_damage(found) is None
        checkpoints.rehearse(run, write_files(0), Alone, 0)
        assert not list(run.glob(".*part")) + list(run.glob(".*old"))
        if not killed:
            break
    assert kill_at > 12  # it ran through all the boundaries of a save: fsync and rename of each file, manifest, folder
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-000006"]


def test_a_copy_made_file_by_file_counts_when_it_is_whole(tmp_path):
    source = checkpoints.save_checkpoint(tmp_path / "a", 5, write_files(5), Alone, None)
    files = [file.relative_to(source) for file in sorted(source.rglob("*")) if file.is_file()]
    for order in (files, files[::-1]):
        target = tmp_path / f"b-{order[0].name}" / source.name
        for number, file in enumerate(order):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            assert not checkpoint_folders(target.parent)
            shutil.copy(source / file, target / file)
            if number < len(order) - 1:
                with pytest.raises(UserError, match="none that is whole"):
                    checkpoints.find_checkpoint(target.parent, "latest", Alone, say=lambda text: None)
        assert checkpoints.find_checkpoint(target.parent, "latest", Alone) == target


def test_copies_beside_checkpoints_are_neither_used_nor_removed(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (3, 6):
        checkpoints.save_checkpoint(run, step, write_files(step), Alone, None)
    copies = ("checkpoint-000006-backup", "checkpoint-000006 (copy)", "checkpoint-000099", "checkpoint-6", "best")
    for name in copies:
        shutil.copytree(run / "checkpoint-000006", run / name)
    (run / "checkpoint-notes.txt").write_text("mine")
    (run / "checkpoint-000050").write_text("a file")
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-000003", "checkpoint-000006"]
    assert checkpoint_copies(run) == sorted(copies)
    assert checkpoints.find_checkpoint(run, "latest", Alone) == run / "checkpoint-000006"
    with pytest.raises(UserError, match="a copy is resumed from once it has its old name back"):
        checkpoints.find_checkpoint(run, "checkpoint-000006-backup", Alone)
    (run / "checkpoint-000006").rename(elsewhere)
    (run / "checkpoint-000006").symlink_to(elsewhere)  # moved to another disk
    checkpoints.forget_after(run, 3, Alone)
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-000003"]
    assert elsewhere.is_dir()
    checkpoints.save_checkpoint(run, 9, write_files(9), Alone, 1)
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-000009"]
    assert checkpoint_copies(run) == sorted(copies)
    shutil.rmtree(run / "checkpoint-000009")
    with pytest.raises(UserError, match="no checkpoint of its own, only copies"):
        checkpoints.find_checkpoint(run, "latest", Alone)


def test_a_new_start_beside_checkpoints_is_refused_and_other_names_of_a_checkpoint_are_known(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (3, 6):
        checkpoints.save_checkpoint(run, step, write_files(step), Alone, None)
    with pytest.raises(UserError, match=r"checkpoint-000003, checkpoint-000006\), which a new start would replace"):
        checkpoints.find_checkpoint(run, None, Alone)
    assert len(checkpoint_folders(run)) == 2
    assert checkpoints.find_checkpoint(tmp_path / "other", None, Alone) is None
    for name in ("checkpoint-3", "checkpoint-000003", str(run / "checkpoint-3"), "checkpoint-0003"):
        assert checkpoints.find_checkpoint(run, name, Alone) == run / "checkpoint-000003"
    with pytest.raises(UserError, match=r"checkpoint-4 is not a checkpoint of .*; there are: checkpoint-000003"):
        checkpoints.find_checkpoint(run, "checkpoint-4", Alone)
    checkpoints.forget_after(run, 3, Alone)
    assert "made anew from step 3, and removed now: checkpoint-000006" in capsys.readouterr().out


def test_nodes_agree_on_the_newest_step_that_is_whole_everywhere(tmp_path):
    """Two nodes without a shared disk; the second one lost its newest checkpoint."""
    import threading

    barrier, said = threading.Barrier(2), {}

    class Node:
        count, first = 2, True

        def __init__(self, index):
            self.index = index

        def meet(self):
            barrier.wait()

        def gather(self, value):
            said[self.index] = value
            barrier.wait()
            values = [said[0], said[1]]
            barrier.wait()
            return values

    found = {}

    def work(index):
        node, run = Node(index), tmp_path / f"disk-{index}"
        for step in (2, 4, 6):
            checkpoints.save_checkpoint(run, step, write_files(step), node, None)
        if index == 1:
            flip_a_byte(run / "node-1" / "checkpoint-000006" / "state.json")
        found[index] = checkpoints.find_checkpoint(run, "latest", node, say=lambda text: None)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == tmp_path / "disk-0" / "checkpoint-000004"
    assert found[1] == tmp_path / "disk-1" / "node-1" / "checkpoint-000004"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_during_a_save_leaves_the_good_one(small_disk):
    run = small_disk / "run"

    def write(size):
        return lambda part: (part / "weights.safetensors").write_bytes(os.urandom(size))

    checkpoints.rehearse(run, write(1_000_000), Alone, 0)
    checkpoints.save_checkpoint(run, 1, write(2_000_000), Alone, 1)
    with pytest.raises(UserError, match=r"No space left.*complete checkpoints: checkpoint-000001"):
        checkpoints.save_checkpoint(run, 2, write(3_000_000), Alone, 1)
    assert [path.name for path in run.iterdir()] == ["checkpoint-000001"]
    assert checkpoints.find_damage(run / "checkpoint-000001") is None
    checkpoints.save_checkpoint(run, 2, write(1_000_000), Alone, 1)
    assert [path.name for path in run.iterdir()] == ["checkpoint-000002"]


def test_a_folder_that_cannot_be_written_gets_a_sentence(run_main, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_main("--output_dir", tmp_path / "file" / "run")


def test_a_disk_that_will_be_too_small_is_met_before_training(small_disk, run_main):
    (small_disk / "ballast").write_bytes(b"x" * 3_900_000)
    with pytest.raises(UserError, match=r"cannot be saved|cannot be written|No space left") as error:
        run_main("--output_dir", small_disk / "run")
    assert "--output_dir" in str(error.value)


def test_moments_keep_the_layout_of_their_weights(tmp_path):
    """Channels-last weights: fused AdamW walks weights and moments alike, and files are contiguous."""

    def step(layer, optimizer):
        layer(torch.ones(1, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    ends = []
    for resumed in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        step(layer, optimizer)
        if resumed:
            numbers = checkpoints.save_optimizer(tmp_path, optimizer)
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
            checkpoints.load_optimizer(tmp_path, optimizer, numbers)
        step(layer, optimizer)
        ends.append(layer.weight.detach().clone())
    assert torch.equal(*ends)


# --- Resume ----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(trained, workspace, run_main, capsys):
    flip_a_byte(trained / "checkpoint-000008" / "unet" / "diffusion_pytorch_model.safetensors")
    run_main("--output_dir", trained)
    said = capsys.readouterr().out
    assert "checkpoint-000008/unet/diffusion_pytorch_model.safetensors is damaged" in said
    assert "resuming from" in said
    assert "checkpoint-000004" in said
    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
    ):
        again, first = (run / "checkpoint-000008" / file for run in (trained, workspace / "unet"))
        assert again.read_bytes() == first.read_bytes(), file  # made anew, bit for bit


def test_muon_pooled_text_and_alignment_resume_bit_for_bit_and_stock_diffusers_draws(run_main, tmp_path, capsys):
    run = tmp_path / "unet"
    options = ("--output_dir", run, "--optimizer", "muon", "--addition_embed_type", "text",
               "--resnet_time_scale_shift", "scale_shift", "--alignment_weight", 0.5)  # fmt: skip
    run_main(*options)
    shutil.copytree(run / "checkpoint-000008", tmp_path / "first")
    shutil.rmtree(run / "checkpoint-000008")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"running"'))
    run_main(*options)
    assert "checkpoint-000004" in capsys.readouterr().out
    assert '"alignment"' in (run / "metrics.jsonl").read_text()
    for file in ("unet/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
        assert (run / "checkpoint-000008" / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file
    pipeline = StableDiffusionPipeline.from_pretrained(run / "pipeline", safety_checker=None)
    assert pipeline.unet.config.addition_embed_type == "text"
    pipeline.set_progress_bar_config(disable=True)
    pictures = [
        pipeline([prompt], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for prompt in ("a red flower", "a blue flower")
    ]
    assert not np.array_equal(*pictures)


def test_without_its_random_states_an_exact_resume_is_refused(trained, run_main):
    (trained / "checkpoint-000008" / "rng-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"rng-0.safetensors is missing.*exact resume"):
        run_main("--output_dir", trained, "--resume_from_checkpoint", "checkpoint-000008")
    shutil.rmtree(trained / "checkpoint-000004")
    with pytest.raises(UserError, match="none that is whole"):  # and never starts anew by itself
        run_main("--output_dir", trained)


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--unet_channels", 16, 48], "UnetConfig.unet_channels|Unet.unet_channels"),
        (["--train_batch_size", 8], "global_batch: 4 there, 8 now"),
        (["--gradient_accumulation_steps", 2], "global_batch: 4 there, 8 now"),
        (["--validation_fraction", 0.3], "validation_fraction"),
        (["--vae", "other"], "vae_hash"),
        (["--max_train_steps", 4], "steps: 8 there, 4 now.*to extend the run, raise max_train_steps or num_train"),
        (["--max_train_steps", 16, "--learning_rate", 1], r"run \(TrainUnet.learning_rate: 0.0001 there, 1.0 now\);"),
    ],
)
def test_what_must_match_is_refused_with_the_difference(arguments, difference, trained, workspace, run_main):
    if "other" in arguments and not (workspace / "other").exists():
        vae = models.load_vae(str(workspace / "vae"))
        with torch.no_grad():
            next(vae.parameters()).add_(0.01)
        vae.save_pretrained(workspace / "other")
    with pytest.raises(UserError, match=difference):
        run_main("--output_dir", trained, *arguments)


def test_the_same_global_batch_by_accumulation_goes_on(trained, run_main, capsys):
    shutil.rmtree(trained / "checkpoint-000008")
    run_main("--output_dir", trained, "--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    assert "checkpoint-000004" in capsys.readouterr().out
    first, second = (json.loads((trained / "metrics.jsonl").read_text().splitlines()[row])["step"] for row in (0, -1))
    assert first <= 4 < second == 8


def test_a_second_training_in_the_same_folder_is_refused(workspace, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_FOR_UNKNOWN_S", 0.0)
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="another run is at work"):
            run_main("--output_dir", run)


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
WORKER = """
import signal, sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
from t2i.errors import run_main
from t2i.run_lock import lock_run
from t2i.training.stopping import on_signals

def main():
    folder = Path(sys.argv[2])
    with lock_run(folder, 0, lambda: None), on_signals(folder) as stop:
        print("at work", flush=True)
        while not stop.asked:
            time.sleep(0.01)
        time.sleep(float(sys.argv[3]))  # a step and a save

def caching():
    print("at work", flush=True)
    time.sleep(60)

run_main(caching if len(sys.argv) < 4 else main)
"""


@pytest.fixture
def launch(tmp_path):
    """Start a script that holds a folder (or, without a time, is not that far yet) by a launcher; gives both processes."""
    launchers = []
    (tmp_path / "worker.py").write_text(WORKER)

    def start(*words):
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "worker.py"), str(SCRIPTS), str(tmp_path / "run")]
        launcher = subprocess.Popen(
            [*command, *words], env=os.environ | {"ACCELERATE_DYNAMO_BACKEND": "NO"}, stdout=subprocess.PIPE, text=True
        )
        launchers.append(launcher)
        assert launcher.stdout.readline() == "at work\n"
        return launcher, psutil.Process(launcher.pid).children()[0]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.stdout.close()
        launcher.wait()


def test_a_run_that_is_about_to_end_is_waited_for_by_name(launch, tmp_path, capsys):
    launcher, worker = launch("0.7")
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"another run is at work in .*run \(process {worker.pid} on "):
        run_lock.lock_run(tmp_path / "run", 0, lambda: None).__enter__()
    assert time.monotonic() - began < 5  # not the minutes that one which ends is waited for
    launcher.kill()
    launcher.wait()
    with run_lock.lock_run(tmp_path / "run", 0, lambda: None):
        said = capsys.readouterr().out
        assert f"which is about to end: process {worker.pid} on " in said
        assert "it has ended after" in said
        assert psutil.wait_procs([worker], timeout=5)[0]
        assert len((tmp_path / "run" / ".lock").read_text().strip().splitlines()) == 1  # the holder now


def test_a_run_that_was_told_to_stop_is_waited_for(launch, tmp_path, capsys, monkeypatch):
    def stop(seconds):
        _, worker = launch(seconds)
        worker.terminate()
        until = time.monotonic() + 20
        while '"ends": true' not in (tmp_path / "run" / ".lock").read_text():  # it has heard the signal
            assert time.monotonic() < until
            time.sleep(0.01)
        return worker

    worker = stop("0.5")
    with run_lock.lock_run(tmp_path / "run", 0, lambda: None):
        assert f"process {worker.pid} on " in capsys.readouterr().out
    worker = stop("60")
    monkeypatch.setattr(run_lock, "WAIT_FOR_ENDING_S", 0.2)
    with pytest.raises(UserError, match=rf"process {worker.pid} on .* has not ended within 0 s; wait for it, stop it"):
        run_lock.lock_run(tmp_path / "run", 0, lambda: None).__enter__()
    worker.kill()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{\n[]\n\x00\xff\n", "run; wait"),
        (b'{"host": "gpu-7", "pid": 12, "started": 1.0}', r"run \(process 12 on gpu-7\); wait"),
        (b'{"host": "%s", "pid": %d, "started": 1.0}' % (platform.node().encode(), os.getpid()), "run; wait"),
    ],
    ids=["damaged", "another host", "a number that another process had"],
)
def test_a_lock_whose_holder_cannot_be_seen_refuses_soon(line, named, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_FOR_UNKNOWN_S", 0.1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_bytes(line)
    with open(tmp_path / "run" / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(UserError, match=f"another run is at work in .*{named}"):
            run_lock.lock_run(tmp_path / "run", 0, lambda: None).__enter__()


def test_any_process_of_a_run_keeps_others_out_and_its_lock_ends_with_it(tmp_path, monkeypatch):
    """The first process was killed and the second lives on; its lock is exclusive and its own."""
    monkeypatch.setattr(run_lock, "WAIT_FOR_UNKNOWN_S", 0.0)
    (tmp_path / "run.json").write_text(json.dumps({"status": "unfinished"}))
    with run_lock.lock_run(tmp_path, 1, lambda: None):
        assert run_lock.run_status(tmp_path) == "running"
        with pytest.raises(UserError, match=rf"another run is at work in .* \(process {os.getpid()} on "):
            run_lock.lock_run(tmp_path, 0, lambda: None).__enter__()
    assert run_lock.run_status(tmp_path) == "interrupted"
    with run_lock.lock_run(tmp_path, 0, lambda: None), run_lock.lock_run(tmp_path, 1, lambda: None):
        assert len((tmp_path / ".lock").read_text().split("\n\n")) == 2  # a line each


def test_a_lock_file_whose_first_byte_cannot_be_read_tells_its_holders(tmp_path):
    """As on Windows, where a lock is on that byte."""

    class Locked(io.StringIO):
        def read(self, *size):
            if self.tell() == 0:
                raise PermissionError
            return super().read(*size)

    with open(tmp_path / ".lock", "wb", buffering=0) as file:
        run_lock._write_holder(file.fileno(), run_lock._this_process())
    (holder,) = run_lock._live_holders(Locked((tmp_path / ".lock").read_text()))
    assert holder["pid"] == os.getpid()


def test_what_a_launcher_started_ends_with_it_before_the_first_step(launch):
    launcher, worker = launch()
    launcher.kill()
    assert psutil.wait_procs([worker], timeout=5)[0]


def test_a_status_is_what_holds_now(tmp_path):
    def status(word):
        (tmp_path / "run.json").write_text(json.dumps({"status": word}))
        return run_lock.run_status(tmp_path)

    words = ("unfinished", "running", "stopped", "finished")
    assert [status(word) for word in words] == ["unfinished", "running", "stopped", "finished"]  # a copy
    with run_lock.lock_run(tmp_path, 0, lambda: None):
        assert [status(word) for word in words] == ["running", "running", "running", "finished"]
    assert [status(word) for word in words] == ["interrupted", "interrupted", "stopped", "finished"]
    assert runs.RunFolder(tmp_path / "new", {}).state["status"] == "unfinished"  # also where it is killed at once


def test_killed_in_mid_epoch_and_mid_accumulation_goes_on_bit_for_bit(workspace, ranks):
    """A sample of `make prove-resume` on two processes: epochs end within the run, accumulation 2, SIGKILL to all at once."""
    (workspace / "recipe.yaml").write_text(prove_resume.SETTINGS)

    def run_whole(folder, arguments):  # a training that is not killed needs no launcher
        ranks("train_unet.py", *arguments, cwd=workspace, env={"ACCELERATE_USE_CPU": "true"})

    print(prove_resume.prove(workspace, "two", kills=1, seed=os.getpid(), run_whole=run_whole))


# --- Extension -------------------------------------------------------------------------------------------------------


def test_an_extended_run_is_one_that_had_its_length_from_the_start(run_main, tmp_path, capsys):
    """Under a constant schedule, bit for bit: weights, average, moments, losses and samples."""
    options = ("--lr_scheduler", "constant", "--checkpointing_steps", 2, "--validation_steps", 2, "--logging_steps", 1,
               "--validation_images", 2, "--num_inference_steps", 1)  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_main("--output_dir", whole, *options, "--max_train_steps", 4)
    for steps, said in (
        (2, "pipeline in"),
        (4, "extended from 2 to 4 updates at checkpoint-000002"),
        (4, "reusing the finished run"),
    ):
        run_main("--output_dir", run, *options, "--max_train_steps", steps)
        assert said in capsys.readouterr().out
    prove_resume.compare(whole, run, steps=4)
    state = json.loads((run / "run.json").read_text())
    (extension,) = state["extensions"]
    assert datetime.fromisoformat(extension.pop("time")).tzinfo is UTC
    assert extension == {"from_steps": 2, "to_steps": 4, "at_step": 2, "at_update": 2, "lr_on_extend": "stretch"}
    assert (state["status"], state["steps"]) == ("finished", 4)
    assert state["identity"] == json.loads((whole / "run.json").read_text())["identity"]
    with pytest.raises(UserError, match="steps: 4 there, 2 now"):
        run_main("--output_dir", run, *options, "--max_train_steps", 2)


def test_a_finished_run_is_extended_by_epochs_in_its_mlflow_run(workspace, run_main, tmp_path, monkeypatch):
    """The cosine schedule of 8 updates has ended at 0. `restart` warms up and runs it anew over two further updates."""
    run = Path(shutil.copytree(workspace / "unet", tmp_path / "unet", ignore=shutil.ignore_patterns("evaluation")))
    shutil.copy(workspace / "mlflow.db", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_main("--output_dir", run, "--num_train_epochs", 1, "--lr_on_extend", "restart", "--report_to", "mlflow",
             "--logging_steps", 1)  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["lr"] for row in rows if "lr" in row and row["step"] > 8} == {9: 5e-5, 10: 1e-4}
    before, after = (load_file(run / f"checkpoint-{step:06d}/{WEIGHTS}") for step in (8, 10))
    assert any(not torch.equal(before[name], after[name]) for name in after)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        (found,) = store.execute("SELECT run_uuid, status FROM runs WHERE name = 'unet'").fetchall()
        logged = store.execute("SELECT max(step) FROM metrics WHERE run_uuid = ? AND key = 'train_loss'", found[:1])
        assert (found[1], logged.fetchone()) == ("FINISHED", (10,))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--lr_on_extend", "constant"], "cosine schedule stands at 0 of its peak in .*checkpoint-000008"),
        (["--resume_from_checkpoint", "checkpoint-5"], "is not a checkpoint of"),
        ([], "keeps no checkpoint from which its 8 updates could be extended to 9; .*--pretrained_model_name_or_path"),
    ],
)
def test_a_finished_run_that_cannot_be_extended_stays_finished(options, sentence, workspace, run_main, tmp_path):
    run = tmp_path / "unet"
    pruned = shutil.ignore_patterns("evaluation", *([] if options else ["checkpoint-*"]))
    shutil.copytree(workspace / "unet", run, ignore=pruned)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(UserError, match=sentence):
        run_main("--output_dir", run, "--max_train_steps", 9, *options)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"} == before


def test_a_run_stopped_before_its_first_checkpoint_takes_the_new_length_from_step_0(tmp_path):
    def identity(steps):
        return {"steps": steps, "TrainUnet.max_train_steps": steps, "TrainUnet.seed": 0}

    (tmp_path / "run.json").write_text(json.dumps({"status": "stopped", "identity": identity(4), "seconds": {}}))
    run = runs.RunFolder(tmp_path, identity(9))
    accelerator = SimpleNamespace(
        num_processes=1, process_index=0, is_local_main_process=True, wait_for_everyone=lambda: None
    )
    assert run.shorter == 4
    assert loop.extend(run, TrainUnetConfig(), 9, accelerator) == []
    run.start(config="", quarantine=[], precision="no")
    again = runs.RunFolder(tmp_path, identity(9))
    assert (again.shorter, again.state.get("extensions")) == (None, None)
    (tmp_path / "run.json").write_text(json.dumps(again.state | {"status": "finished"}))
    # The same number of updates by the other setting is the same training.
    by_epochs = runs.RunFolder(
        tmp_path, identity(9) | {"TrainUnet.max_train_steps": None, "TrainUnet.num_train_epochs": 3.0}
    )
    assert (by_epochs.shorter, by_epochs.finished) == (None, True)
    # An earlier version compared settings of validation pictures too.
    earlier = identity(9) | {"TrainUnet.guidance_rescale": 0.35}
    (tmp_path / "run.json").write_text(json.dumps(again.state | {"identity": earlier}))
    assert runs.RunFolder(tmp_path, identity(9)).shorter is None


# --- Signals and numbers ---------------------------------------------------------------------------------------------


def test_sigterm_twice_saves_ends_with_its_code_and_leaks_no_secret(workspace, environment, tmp_path):
    canary = "hf_canaryCANARYcanaryCANARY1234"
    words = (*COMMON[:-2], "--output_dir", tmp_path / "run", "--max_train_steps", 100000, "--lr_warmup_steps", 5,
             "--logging_steps", 1, "--run_name", f"with {canary}")  # fmt: skip
    secrets = {"HF_TOKEN": canary, "MLFLOW_TRACKING_URI": f"http://me:{canary}@127.0.0.1:9", "SOME_PASSWORD": canary}
    process = warm_start("train_unet.py", words, workspace, environment | secrets)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size > 500):
        assert process.poll() is None, process.wait(1).stderr[-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    began = time.monotonic()
    process.terminate()
    time.sleep(0.01)
    process.terminate()
    done = process.wait(timeout=120)
    assert done.returncode == EXIT_STOPPED, done.stderr[-3000:]
    assert time.monotonic() - began < 60
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    saved = checkpoint_folders(tmp_path / "run")[-1]
    assert checkpoints.find_damage(saved) is None
    step = int(saved.name.removeprefix("checkpoint-"))
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step  # nothing after the last step is lost
    everything = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert canary.encode() not in everything + (done.stdout + done.stderr).encode()


def test_sigterm_outside_the_loop_ends_with_a_sentence(tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM)
    try:
        stopping.end_in_words()
        with stopping.on_signals(tmp_path) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == EXIT_STOPPED
        assert "SIGTERM: ending now; finished caches and checkpoints are kept" in capfd.readouterr().err
        if (child := os.fork()) == 0:  # as a pool's worker is ended
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert capfd.readouterr().err == ""
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("allowed", [0, 100])
def test_numbers_that_are_none_are_named_and_skipped_or_end_the_run(allowed, workspace, run_main, tmp_path, capsys):
    """A NaN in one image's cached latents, as a half-precision VAE leaves it."""
    cache = tmp_path / "cache"
    shutil.copytree(workspace / ".cache" / "t2i", cache)
    poisoned = 0
    for file in cache.glob("latents/*/*.npy"):
        latents = np.load(file, mmap_mode="r+")
        if len(latents) == 40:
            latents[7] = np.nan
            poisoned += 1
    assert poisoned
    words = (
        "--output_dir",
        tmp_path / "run",
        "--cache_dir",
        cache,
        "--max_train_steps",
        11,
        "--max_nonfinite_steps",
        allowed,
    )
    if allowed:
        run_main(*words, "--use_ema")
        said = capsys.readouterr().out
        assert said.count("the update is skipped") >= 1
        assert json.loads((tmp_path / "run" / "run.json").read_text())["nonfinite_skips"] >= 1
    else:
        with pytest.raises(UserError, match="non-finite at step") as error:
            run_main(*words)
        from t2i.data import preparing

        recipe = load_recipe(str(workspace / "tiny.yaml"))
        recipe.data.dataset, recipe.data.cache_dir = str(workspace / "dataset"), str(cache)
        assert preparing.load_splits(recipe.data, say=lambda text: None).train.rows["id"][7] in str(error.value)


# --- Weights from outside --------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_a_pickle_offered_as_weights_is_never_run(name, workspace, run_main, tmp_path):
    folder, ran = tmp_path / "vae", tmp_path / "ran"
    folder.mkdir()
    shutil.copy(workspace / "vae" / "vae" / "config.json", folder)
    (folder / name).write_bytes(pickle.dumps(Malicious(ran)))
    with pytest.raises(UserError, match="safetensors"):
        run_main("--output_dir", tmp_path / "run", "--vae", folder)
    assert not ran.exists()


def test_a_run_that_goes_on_in_another_precision_says_so_and_keeps_both(tmp_path, capsys):
    run = runs.RunFolder(tmp_path, {})
    run.start("", [], "no")
    folder = tmp_path / "checkpoint-000004"
    folder.mkdir()
    (folder / "state.json").write_text("4")
    write_json(folder / "manifest.json", {"step": 4, "files": {"state.json": {"bytes": 1, "sha256": ""}}})
    runs.RunFolder(tmp_path, {}).start("", [], "no")
    assert capsys.readouterr().out == ""
    runs.RunFolder(tmp_path, {}).start("", [], "bf16")
    assert capsys.readouterr().out == "NOTE: mixed_precision was no until step 4, and is bf16 from there\n"
    state = json.loads((tmp_path / "run.json").read_text())
    assert state["precisions"] == [{"from_step": 0, "precision": "no"}, {"from_step": 4, "precision": "bf16"}]
    assert model_card._precision(state) == "FP32 from step 0, BF16 mixed precision from step 4"
