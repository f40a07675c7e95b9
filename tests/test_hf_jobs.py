"""Hugging Face Jobs: the YAML, the request, the dry run, every fault's sentence, and a job played through on this machine."""

import contextlib
import io
import json
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import huggingface_hub
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import launch_hf_job
import run_hf_job
from conftest import ROOT, SCRIPTS, TINY
from local_jobs import JobsHub, why_not
from rehearse_sagemaker import is_pending
from t2i import config
from t2i.clouds import costs, hf_account, hf_job, mirror, staging
from t2i.errors import UserError

UNET = str(SCRIPTS / "train_unet.py")
CARD = ["--train_images", "6811", UNET, "--config", "flowers"]
BASE = yaml.safe_load((ROOT / "accelerate_configs" / "hf_jobs.yaml").read_text())
CPU = {"flavor": "cpu-basic", "timeout": "10m", "save_before_timeout": "1m"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with Jobs, this process's clients brought to it. They read the constants' environment variables at import only."""
    with JobsHub(tmp_path / "jobs") as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield hub


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Run launch_hf_job.py in this process with the suite's YAML, changed by `changes`; returns what it printed."""
    monkeypatch.setattr(costs, "unet_size", lambda recipe: (36.2e9 / 3, 148_000_000))  # counting imports torch

    def run(*words, **changes):
        file = tmp_path / "hf_jobs.yaml"
        file.write_text(yaml.safe_dump(BASE | changes))
        out = io.StringIO()
        argv = ["launch_hf_job.py", "--config_file", str(file), *map(str, words)]
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            launch_hf_job.main()
        return out.getvalue()

    return run


@pytest.fixture
def short(hub, tmp_path, monkeypatch):
    """Let jobs run a shell command in place of a training; returns a function that sets the command."""
    if reason := why_not(tmp_path):
        pytest.skip(reason)
    real = hf_job.request

    def put(script):
        monkeypatch.setattr(hf_job, "request", lambda *words: real(*words) | {"command": ["bash", "-c", script]})

    return put


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flavour": "t4-small"}, "did you mean 'flavor'"),
        ({"compute_environment": "LOCAL_MACHINE"}, "make train CONFIG="),
        ({"timeout": "soon"}, "timeout = 'soon' is not usable: give a time such as 90s, 30m, 12h or 2d"),
        ({"timeout": None}, "timeout is missing"),
        ({"timeout": "5m"}, "leaves no time to train"),
        ({"image": "a b"}, "image = 'a b'"),
        ({"attempts": 0}, "attempts = 0"),
        ({"environment": {"HF_TOKEN": "x"}}, "holds a credential in HF_TOKEN"),
        ({"environment": {"MLFLOW_TRACKING_URI": "http://localhost:5000"}}, "the job's own machine"),
        ({"secrets": ["T2I_NO_SUCH_VARIABLE"]}, "which this shell does not set"),
    ],
)
def test_a_wrong_yaml_is_refused_in_one_sentence(changes, words, tmp_path):
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(BASE | changes))
    with pytest.raises(UserError) as told:
        hf_job.read_config(tmp_path / "jobs.yaml")
    assert words in str(told.value)
    assert "jobs.yaml" in str(told.value)


def test_what_is_wrong_is_refused_before_anything_is_sent(hub, launcher):
    for words, changes, sentence in (
        (CARD, {"flavor": "t4-smal"}, "did you mean 't4-small'"),
        (CARD, {"flavor": "cpu-basic", "mixed_precision": "fp16"}, "fp16 of mixed_precision needs a GPU"),
        ([*CARD, "--dataset", "s3://photos/flowers"], {}, "needs an AWS account"),
        ([*CARD, "--push_to_hub", "--hub_model_id", "me"], {}, "hub_model_id"),
        ([UNET], {}, "no data set"),
    ):
        with pytest.raises(UserError, match=sentence):
            launcher("--yes", *words, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match="there is no token for the Hub; run `hf auth login`"):
            launcher("--yes", *CARD)
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_shows_the_request_and_sends_nothing(hub, launcher):
    told = launcher("--dry_run", *CARD)
    request, _ = json.JSONDecoder().raw_decode(told)
    assert {method for method, _ in hub.requests} == {"GET"}
    assert hub.token not in told
    assert request["secrets"] == {"HF_TOKEN": "[redacted]"}
    assert (request["flavor"], request["timeout"], request["attempts"]) == ("t4-small", 21600, 1)
    assert "31,927 updates of 32 samples = 150.0 epochs of 6,811 images" in told
    assert "at most 2.40 USD: timeout 6 h ends the job" in told
    measured = launcher("--dry_run", *CARD, flavor="h200")
    assert "1330 samples/s (measured, hf_jobs_prices.yaml)" in measured
    assert "5.00 USD per hour" in measured  # the Hub's price of today
    assert "ends it after 0.2 h; raise timeout" in launcher("--dry_run", *CARD, timeout="12m")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), max_size=6))
def test_every_argument_arrives_as_typed(words):
    command = staging.Command("mine.py", words, None)
    job = {"script": "mine.py", "mixed_precision": None,
           "arguments": staging.container_arguments(command, {}, "in", "run", "cache")}  # fmt: skip
    job = json.loads(json.dumps(job, ensure_ascii=False))
    line = run_hf_job.launch_words(job, 1)
    assert line[len(line) - len(words) :] == words


def test_each_refusal_of_the_hub_is_one_sentence(hub, launcher, short):
    short("echo hello")
    jobs = {"method": "POST", "path": "/api/jobs"}
    for status, words in (
        ("402", "no credit for Jobs"), ("429", "reached its quota"), ("403", "may not do this"),
        ("401", "does not accept the token"), ("400", "correct flavor, image or timeout"), ("503", "the Hub is busy"),
    ):  # fmt: skip
        hub.fault(status, **jobs)
        with pytest.raises(UserError) as told:
            launcher("--yes", *CARD)
        text = str(told.value)
        assert text.startswith("the Hub does not start the job: ")
        assert words in text
        assert text.endswith("; nothing runs and nothing is billed")
    assert hub.jobs == []


def test_a_job_that_ends_badly_says_why_and_what_to_do(hub, launcher, short, tmp_path):
    short("echo hello; exec sleep 60")
    hub.missing_images.add(BASE["image"])
    with pytest.raises(UserError, match=r"never started \(Failed to pull image .*; check image"):
        launcher("--yes", "--wait", *CARD)
    hub.missing_images.clear()
    launcher("--yes", *CARD)
    with pytest.raises(UserError, match="is at work on the same command; stop it with --stop"):
        launcher("--yes", *CARD)
    with pytest.raises(UserError, match="is still running"):
        launcher("--fetch", hub.jobs[-1].id, "--output_dir", tmp_path / "home")
    repo = "models/me/" + hub.jobs[-1].spec["labels"][hf_job.LABEL]
    hub.edit(repo, {"run/checkpoint-000040/manifest.json": "{}", "run/checkpoint-000020/manifest.json": "{}"})
    hub.jobs[-1].preempt()
    with pytest.raises(UserError, match=r"ended as ERROR \(The machine was reclaimed\); checkpoint-000040 is in me/"):
        launch_hf_job.wait(
            hub.jobs[-1].id, hf_account.look(hf_job.read_config(ROOT / "accelerate_configs/hf_jobs.yaml"))
        )
    assert "resumes there from checkpoint-000040" in launcher("--dry_run", *CARD)
    launcher("--yes", *CARD)
    assert "is cancelled" in launcher("--stop", hub.jobs[-1].id)
    listed = launcher("--jobs")
    assert listed.count("python scripts/launch_hf_job.py --fetch") == 3
    assert "CANCELED" in listed
    with pytest.raises(UserError, match="the Hub knows no such job"):
        launcher("--stop", "nobodys-job")


def test_a_log_that_breaks_is_followed_again(hub, launcher, short):
    short("echo one; echo two; sleep 1; echo three")
    hub.cut_logs = 1
    told = launcher("--yes", "--wait", *CARD)
    assert [told.count(word) for word in ("one\n", "two\n", "three\n")] == [1, 1, 1]


def test_checkpoints_are_pushed_whole_and_restored(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "POLL_S", 0.05)
    hub.create("models/me/run")
    said, run = [], tmp_path / "work" / "run"

    def checkpoint(step):
        folder = run / f"checkpoint-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(str(step))
        manifest = {"step": step, "files": {"state.json": {"bytes": len(str(step)), "sha256": ""}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    checkpoint(20)
    (run / ".checkpoint-000040.part").mkdir()
    (run / ".checkpoint-000040.part/state.json").write_text("half")
    (run / "checkpoint-000060").mkdir()  # without its manifest
    (run / "checkpoint-000060/state.json").write_text("half")
    (run / "run.json").write_text("{}")
    kept = mirror.Mirror(tmp_path / "work", "me/run", said.append)
    assert kept.restore() == "checkpoint-000020"  # nothing is there, and nothing here is lost
    kept._pushed = ""
    kept.start()
    while not said:
        time.sleep(0.01)
    assert said == ["checkpoint-000020 is in me/run"]
    checkpoint(80)
    kept.end(10.0)
    names = {name for name in hub.files("models/me/run") if name.startswith("run/")}
    assert names == {"run/run.json", *(f"run/checkpoint-{step:06d}/{file}" for step in (20, 80)
                                       for file in ("state.json", "manifest.json"))}  # fmt: skip
    other = mirror.Mirror(tmp_path / "other", "me/run", said.append)
    assert other.restore() == "checkpoint-000080"
    assert (tmp_path / "other/run/checkpoint-000080/state.json").read_text() == "80"
    assert hub.repos["models/me/run"].private


@contextlib.contextmanager
def halted_at_checkpoint(job, step):
    """Halt a job's training once it has written a checkpoint, until it is told to stop, so that it cannot end before."""
    wanted = job.work / "run" / f"checkpoint-{step:06d}" / "manifest.json"
    while not wanted.is_file():
        assert job.stage == "RUNNING", job.log()[-6000:]
        time.sleep(0.002)
    (launch,) = psutil.Process(job.pid).children()
    trainings = [
        child for child in launch.children(recursive=True) if any("train_unet.py" in word for word in child.cmdline())
    ]
    for training in trainings:
        training.suspend()
    yield
    for training in trainings:
        while not is_pending(training, signal.SIGTERM):
            time.sleep(0.01)
        training.resume()


def test_a_job_is_cut_off_and_the_same_command_goes_on(hub, launcher, tmp_path, command):
    """The thinnest path through everything real: submit, train, stop before the timeout, resume, fetch, draw."""
    if reason := why_not(tmp_path):
        pytest.skip(reason)
    from t2i import models

    (tmp_path / "tiny.yaml").write_text(TINY)
    command("make_flowers.py", "--output_dir", "dataset", "--count", 40, "--validation_count", 8, "--test_count", 4,
            "--size", 32, "--workers", 1, cwd=tmp_path)  # fmt: skip
    models.build_vae(config.load_recipe(str(tmp_path / "tiny.yaml")).vae).save_pretrained(tmp_path / "vae")
    run_name = '00\'42 a=b "c"'
    words = ["--yes", "--train_images", 40, UNET, "--config", tmp_path / "tiny.yaml", "--dataset", tmp_path / "dataset",
             "--vae", tmp_path / "vae", "--checkpointing_steps", 20, "--validation_steps", 20, "--max_train_steps", 60,
             "--report_to", "none", "--run_name", run_name]  # fmt: skip
    launcher(*words, **CPU)
    job = hub.jobs[-1]
    repo = "models/me/" + job.spec["labels"][hf_job.LABEL]
    with halted_at_checkpoint(job, 20):
        while not any(name.startswith("run/checkpoint-000020/") for name in hub.files(repo)):
            assert job.stage == "RUNNING", job.log()[-6000:]
            time.sleep(0.05)
        launcher("--stop", job.id, **CPU)
    job.wait(120)
    assert "the same command resumes" in job.log(), job.log()[-3000:]
    launcher(*words, **CPU)
    job = hub.jobs[-1]
    assert job.wait(240) == "COMPLETED", job.log()[-6000:]
    assert "going on from" in job.log()
    spec = json.dumps(job.spec | {"secrets": {}})
    assert job.spec["secrets"] == {"HF_TOKEN": hub.token}
    everything = b"".join(hub.files(repo).values())
    assert hub.token not in spec + job.log()
    assert hub.token.encode() not in everything
    launcher("--fetch", job.id, "--output_dir", tmp_path / "home", **CPU)
    state = json.loads((tmp_path / "home/run.json").read_text())
    assert (state["status"], state["steps"]) == ("finished", 60)
    assert config.load_recipe(str(tmp_path / "home/config.yaml")).train_unet.run_name == run_name
    command("generate_images.py", "--model", tmp_path / "home", "--prompt", "a red flower", "--num_inference_steps", 2,
            "--output_dir", tmp_path / "pictures", cwd=tmp_path)  # fmt: skip
    assert list((tmp_path / "pictures").glob("*.png"))


def test_the_code_is_staged_without_secrets(hub, launcher, short):
    short("true")
    launcher("--yes", *CARD)
    repo = "models/me/" + hub.jobs[-1].spec["labels"][hf_job.LABEL]
    files = hub.files(repo)
    assert {"code/job.json", "code/accelerate.yaml", "code/REVISION", "code/scripts/run_hf_job.py"} <= set(files)
    assert not any(hub.token.encode() in content for content in files.values())
    job = json.loads(files["code/job.json"])
    assert job["arguments"][:2] == ["--config", "flowers"]
    assert Path(job["arguments"][job["arguments"].index("--output_dir") + 1]) == Path(hf_job.WORK) / "run"
