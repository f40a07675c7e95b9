"""The Dockerfile: its steps one by one in a fresh root folder, and a container of it that is stopped."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conftest import ROOT
from local_image import Image, context, instructions, why_not

# Stands for a training: says what it sees, writes where trainings write, and saves on SIGTERM.
TRAINS = """
import json, os, pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path("outputs/saved").write_text("")
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(".cache/kept").write_text("")
told = {"user": os.getuid(), "arguments": sys.argv[1:], "environment": dict(os.environ), "revision": open("REVISION").read()}
for path in ("/suite/scripts/x", "/etc/x", "/usr/x"):
    try:
        open(path, "w")
        told["wrote"] = path
    except OSError:
        pass
pathlib.Path("outputs/part").write_text(json.dumps(told))
os.rename("outputs/part", "outputs/told.json")
time.sleep(60)
"""


@pytest.fixture(scope="module")
def image():
    """The Dockerfile's image. pip finds every requirement in this Python, and looks no further."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="t2i-image-", dir="/tmp"))
    folder.chmod(0o755)
    made = Image(folder, Path(sys.executable).parent, {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1"})
    made.build()
    yield made
    shutil.rmtree(folder)


def test_the_image_holds_the_code_and_no_secret(image, tmp_path):
    """Files of this checkout that hold a canary do not get in, wherever a user may have left them."""
    copied = {
        str(path.relative_to(image.root / "suite")) for path in (image.root / "suite").rglob("*") if path.is_file()
    }
    assert copied - {"REVISION"} == set(context(ROOT))
    assert {name.split("/")[0] for name in copied} == {
        "accelerate_configs",
        "datasets_card",
        "scripts",
        "LICENSE",
        "REVISION",
    }
    for name in (
        ".env",
        "scripts/.env",
        "outputs/run/run.json",
        "hf_token",
        ".git/config",
        "scripts/t2i/__pycache__/a.pyc",
        "scripts/hf_token.txt",
        "scripts/mlflow.db",
        "scripts/prod.env",
        "scripts/outputs/run/config.yaml",
        "scripts/photos/1.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("canary")
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    (tmp_path / "scripts/kept.py").write_text("")
    assert context(tmp_path) == ["scripts/kept.py"]
    names = [name for name, _ in instructions((ROOT / "Dockerfile").read_text())]
    assert len(names) == len(image.steps)
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert not any("TOKEN" in step or "PASSWORD" in step for step in image.steps)


def test_a_stopped_container_saves_and_ends_with_75(image, tmp_path):
    """accelerate's launcher starts a stand-in for a training, as first process of the container and another user than root."""
    for name in ("outputs", "cache"):
        (tmp_path / name).mkdir()
        shutil.chown(tmp_path / name, 10001)
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(0o755)
    (tmp_path / "train.py").write_text(TRAINS)
    words = [
        "accelerate",
        "launch",
        "--quiet",
        "--config_file",
        "accelerate_configs/cpu.yaml",
        "/data/train.py",
        "a  b",
    ]
    mounts = {tmp_path: "/data", tmp_path / "outputs": "/suite/outputs", tmp_path / "cache": "/suite/.cache"}
    assert sorted(image.volumes) == ["/suite/.cache", "/suite/outputs"]
    container = image.start(words, mounts, {"HF_TOKEN": "hf_canary"})
    try:
        container.wait_for(tmp_path / "outputs/told.json", 120)
        assert "run_container.py" in " ".join(container.first.cmdline())
        assert container.first.uids().real == 10001
        assert container.stop(60) == 75
    finally:
        container.kill()
    assert "saved\n" in container.log
    assert "the same command resumes" in container.log
    assert "hf_canary" not in container.log
    assert (tmp_path / "outputs/saved").exists()
    assert (tmp_path / "cache/kept").exists()
    told = json.loads((tmp_path / "outputs/told.json").read_text())
    assert (told["user"], told["arguments"], told["revision"]) == (10001, ["a  b"], "0123456789abcdef\n")
    assert "wrote" not in told
    assert told["environment"]["HF_HOME"] == "/suite/.cache/huggingface"


STARTS_LATE = """
import subprocess, sys, time
time.sleep(1)
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
SAVES = """
import signal, sys, time
def save(number, frame):
    print("error: no space left" if sys.argv[1:] else "saved", flush=True)
    sys.exit(2 if sys.argv[1:] else 75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def run_until(word, words, folder):
    """Start run_container.py with a stand-in for accelerate, send SIGTERM at a line of its log, and return code and log."""
    launcher = folder / "accelerate"
    launcher.write_text(f"#!{sys.executable}\nprint('launcher', flush=True)\n{STARTS_LATE}")
    launcher.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    entry = [sys.executable, "-u", str(ROOT / "scripts/run_container.py"), "accelerate", *words]
    process = subprocess.Popen(entry, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == f"{word}\n":
            process.terminate()
    return process.wait(), "".join(lines)


def test_a_stop_before_the_training_has_started_reaches_it(tmp_path):
    """`docker stop` in the first seconds must not be lost. The training may not handle the signal yet: nothing is lost then."""
    (tmp_path / "train.py").write_text(SAVES)
    code, log = run_until("launcher", [str(tmp_path / "train.py")], tmp_path)
    assert code == 75, log
    assert "the same command resumes" in log


def test_a_save_that_fails_is_no_saved_checkpoint(tmp_path):
    (tmp_path / "train.py").write_text(SAVES)
    code, log = run_until("ready", [str(tmp_path / "train.py"), "full"], tmp_path)
    assert code == 2, log
    assert "error: no space left" in log
    assert "resumes" not in log


def test_other_commands_run_as_typed(image):
    for words, code, sentence in (
        ([], 0, "the training, which saves a checkpoint"),
        (["python3", "-c", "import os, sys; print('first', os.getpid()); sys.exit(3)"], 3, "first 1\n"),
        (["acelerate", "launch"], 127, "error: acelerate cannot be run (No such file or directory)"),
    ):
        container = image.start(words, {})
        assert container.end(60) == code
        assert sentence in container.log
