"""Hugging Face Jobs: the YAML, the request, the dry run, every fault's sentence, and a job played through on this machine."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from unittest import mock
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import caption_to_hub
import launch_hf_job
import list_jobs
import run_hf_job
from conftest import ROOT, SCRIPTS, TINY
from local_jobs import JobRun, JobsHub, why_not
from local_sagemaker import aws
from small_models import untrained_run
from t2i import config
from t2i.captions import ledger
from t2i.clouds import costs, hf_job, mirror, sagemaker_job, staging
from t2i.errors import UserError
from t2i.runs import find_student

UNET = str(SCRIPTS / "train_unet.py")
CARD = ["--train_images", "6811", UNET, "--config", "flowers"]
BASE = yaml.safe_load((ROOT / "accelerate_configs" / "hf_jobs.yaml").read_text())
CPU = {"flavor": "cpu-basic", "timeout": "30m", "save_before_timeout": "1m"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with Jobs, this process's clients brought to it. They read the constants' environment variables at import only."""
    with JobsHub(tmp_path / "jobs") as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE  # of every file's address, made from ENDPOINT at import
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + urlsplit(template).path)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in ("models/stabilityai/sd-vae-ft-mse", "models/openai/clip-vit-large-patch14", "datasets/nelorth/oxford-flowers",
                     "datasets/me/photos"):  # fmt: skip
            hub.create(name, private=False)
        hub.commits("datasets/nelorth/oxford-flowers")[-1].id = config.load_recipe("flowers").data.dataset_revision
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
    """Let jobs run a shell command in place of what was submitted; returns a function that sets the command."""
    if reason := why_not(tmp_path):
        pytest.skip(reason)
    real = JobRun._start

    def put(script):
        def start(job, hub):
            job.spec = job.spec | {"command": ["bash", "-c", script]}
            real(job, hub)

        monkeypatch.setattr(JobRun, "_start", start)

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
        ({"compute_environment": "hf_jobs"}, "compute_environment is hf_jobs, not HF_JOBS; write HF_JOBS"),
        ({"timeout": "12:00"}, "timeout = '12:00' is not usable"),
        ({"environment": {"WANDB_KEY": "0123456789abcdef"}}, "holds a credential in WANDB_KEY"),
        ({"environment": {"A B": "1"}}, "holds 'A B', which is no name of a variable"),
        ({"environment": {"A": None}}, "environment.A = None is not usable: it is empty"),
        ({"environment": {"A": "1"}, "secrets": ["A"]}, "A stands in secrets and in environment"),
    ],
)
def test_a_wrong_yaml_is_refused_in_one_sentence(changes, words, tmp_path):
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(BASE | changes))
    with pytest.raises(UserError) as told:
        hf_job.read_config(tmp_path / "jobs.yaml")
    assert words in str(told.value)
    assert "jobs.yaml" in str(told.value)


def test_values_of_the_environment_arrive_as_written_and_secrets_are_not_shown(tmp_path):
    file = tmp_path / "jobs.yaml"
    text = (ROOT / "accelerate_configs/hf_jobs.yaml").read_text()
    file.write_text(text + "environment: {A: 010, B: yes, C: 12:30:00, D: 1.50}\n")
    assert hf_job.read_config(file).environment == {"A": "010", "B": "yes", "C": "12:30:00", "D": "1.50"}
    file.write_text(text + "secrets: {WANDB_API_KEY: 0123456789abcdef}\n")
    with pytest.raises(UserError, match=r"secrets = .*\[redacted\]") as told:
        hf_job.read_config(file)
    assert "0123456789abcdef" not in str(told.value)


def test_stopping_and_fetching_need_only_the_account(hub, launcher, short, monkeypatch):
    """A running job costs money. What only a submission needs must not keep a user from stopping it."""
    short("exec sleep 60")
    launcher("--yes", *CARD)
    job = hub.jobs[-1]
    hub.fault("503", times=20, path="/api/jobs/hardware")
    changes = {"secrets": ["T2I_NO_SUCH_VARIABLE"], "flavor": "t4-smal", "flavour": "", "timeout": "5m"}
    changes["environment"] = {"HF_TOKEN": "x"}
    with pytest.raises(UserError, match="exclude each other"):
        launcher("--dry_run", "--stop", job.id)
    with pytest.raises(UserError, match="--stop submits nothing; leave out"):
        launcher("--stop", job.id, *CARD)
    with pytest.raises(UserError, match="--stop and --fetch exclude each other"):
        launcher("--stop", job.id, "--fetch", job.id)
    assert job.stage == "RUNNING"
    assert "is cancelled" in launcher("--stop", job.id, **changes)
    assert job.stage == "CANCELED"
    with pytest.raises(UserError, match=rf"{job.id} has ended already \(CANCELED\)"):
        launcher("--stop", job.id, **changes)
    with pytest.raises(UserError, match="namespace = 'a b' is not usable"):
        launcher("--stop", job.id, namespace="a b")
    job.spec["labels"].pop(hf_job.LABEL)
    job.stage = "RUNNING"
    with pytest.raises(UserError, match="was not submitted by this suite"):
        launcher("--stop", job.id)
    job.stage = "CANCELED"


def test_flavors_that_the_price_file_lacks(hub, launcher):
    told = launcher("--dry_run", *CARD, flavor="l4x4", attempts=3)
    assert "in the container by multi_gpu.yaml" in told
    assert "at most 68.40 USD: timeout 6 h ends each of 3 attempts" in told
    assert "150 epochs of 6,811 images" in told
    assert "has no speed of l4x4" in told
    assert "in the container by cpu.yaml" in launcher("--dry_run", *CARD, flavor="cpu-performance")
    with pytest.raises(UserError, match=r"fp16 of --inside single_gpu\.yaml needs a GPU"):
        launcher("--dry_run", "--inside", ROOT / "accelerate_configs/single_gpu.yaml", *CARD, flavor="cpu-performance")


def test_a_command_that_the_run_cannot_take_is_refused_before_it_costs(hub, launcher, short):
    short("true")
    launcher("--yes", *CARD, "--max_train_steps", 70)
    run = hub.jobs[-1].spec["labels"][hf_job.LABEL]
    assert hub.jobs[-1].wait(20) == "COMPLETED"
    hub.edit(f"models/me/{run}", {"run/checkpoint-000070/manifest.json": "{}"})
    state = json.dumps({"status": "finished", "identity": {"steps": 70, "global_batch": 32}}).encode()
    huggingface_hub.HfApi().upload_file(path_or_fileobj=state, path_in_repo="run/run.json", repo_id=f"me/{run}")
    with pytest.raises(UserError, match=r"fewer updates than its run \(60 instead of 70\); raise --max_train_steps"):
        launcher("--yes", *CARD, "--max_train_steps", 60)
    with pytest.raises(UserError, match="has finished the run of this command"):
        launcher("--yes", *CARD, "--max_train_steps", 70)
    state = json.dumps({"identity": {"steps": 70, "global_batch": 64}}).encode()
    huggingface_hub.HfApi().upload_file(path_or_fileobj=state, path_in_repo="run/run.json", repo_id=f"me/{run}")
    with pytest.raises(
        UserError, match=r"samples per update than its run \(32 instead of 64\); choose a flavor with as many GPUs"
    ):
        launcher("--yes", *CARD, "--max_train_steps", 80, "--resume_from_checkpoint", "latest")
    assert len(hub.jobs) == 1


def test_a_captioning_resumes_also_after_its_end(hub, launcher, short, tmp_path):
    short("true")
    words = ["--yes", "--train_images", 10, SCRIPTS / "caption_to_hub.py", "--dataset", "me/photos", "--captioner",
             "label"]  # fmt: skip
    launcher(*words)
    job = hub.jobs[-1]
    assert job.wait(20) == "COMPLETED"
    repo_id = f"me/{job.spec['labels'][hf_job.LABEL]}"
    inspected = ".captioning/photos-0a1b2c.jsonl"
    for name in (inspected, ".captioning/source/train.arrow", ".captions.jsonl.lock", "captions.jsonl"):
        (tmp_path / "work/run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work/run" / name).write_text("{}")
    kept = mirror.Mirror(tmp_path / "work", repo_id, print)
    kept.start()
    kept.end(10.0)
    assert {name for name in hub.files(f"models/{repo_id}") if name.startswith("run/")} == {
        "run/captions.jsonl",
        f"run/{inspected}",
    }
    mirror.Mirror(tmp_path / "next", repo_id, print).restore()
    caption_to_hub.require_own(tmp_path / "next/run", tmp_path / "photos")
    assert "resumes there from captions.jsonl" in launcher("--dry_run", *words)
    launcher("--fetch", job.id, "--output_dir", tmp_path / "home")
    caption_to_hub.require_own(tmp_path / "home", tmp_path / "photos")
    (tmp_path / "work/run/run.json").write_text('{"status": "finished", "identity": {}}')
    kept._push(10.0)
    assert "resumes there from captions.jsonl" in launcher("--dry_run", *words)  # for photos that were added


@pytest.mark.parametrize(
    ("script", "words", "reordered", "harmless", "others"),
    [
        (
            "train_unet.py", ["--config", "flowers", "--dataset", "me/photos", "--run_name", "a"],
            ["--run_name=a", "--dataset", "me/photos", "--config", "flowers"],
            [["--checkpointing_steps", "50"], ["--push_to_hub", "--hub_model_id", "me/model"], ["--no_push_to_hub"],
             ["--report_to", "none"], ["--validation_prompt", "a rose"], ["--max_train_steps", "70"]],
            [["--run_name", "b"], ["--learning_rate", "0.01"], ["--train_batch_size", "4"], ["--dataset", "me/others"]],
        ),
        (
            "caption_to_hub.py", ["--dataset", "me/photos", "--task", "<CAPTION>", "<OD>"],
            ["--task", "<CAPTION>", "<OD>", "--dataset=me/photos"],
            [["--caption_batch_size", "2"], ["--push_to_hub", "--hub_dataset_id", "me/captioned"]],
            [["--num_beams", "1"], ["--task", "<MORE_DETAILED_CAPTION>"]],
        ),
        (
            "distill_unet.py", ["--model", "me/flowers", "--dataset", "me/photos", "--resolution", "64"],
            ["--resolution=64", "--dataset", "me/photos", "--model", "me/flowers"],
            [["--checkpointing_steps", "50"], ["--max_train_steps", "70"]],
            [["--num_inference_steps", "4"], ["--guidance_scale", "2"], ["--guidance_rescale", "0.5"]],
        ),
    ],
)  # fmt: skip
def test_what_changes_no_result_changes_no_run(script, words, reordered, harmless, others):
    jobs = hf_job.read_config(ROOT / "accelerate_configs/hf_jobs.yaml")

    def name(*typed):
        return hf_job.run_name(staging.read_command([str(SCRIPTS / script), *typed], hf_job.CLOUD), jobs, {})

    assert {name(*reordered), *(name(*words, *more) for more in harmless)} == {name(*words)}
    assert name(*words) not in {name(*words, *more) for more in others}


def test_captions_are_pushed_while_they_are_made(hub, tmp_path, monkeypatch):
    """A machine that is lost, or a job that is stopped, costs the captions of some minutes alone."""
    monkeypatch.setattr(mirror, "POLL_S", 0.02)
    monkeypatch.setattr(mirror, "CAPTIONS_S", 0.3)
    hub.create("models/me/run")
    said, run = [], tmp_path / "work/run"
    (run / ".captioning").mkdir(parents=True)
    (run / ".captioning/photos-0a1b2c.jsonl").write_text("{}\n")
    kept = mirror.Mirror(tmp_path / "work", "me/run", said.append)
    kept.start()

    def add(image):
        caption = dict.fromkeys(ledger.Key._fields, image) | {"caption": "a rose"}
        ledger.append(run / "captions.jsonl", [caption])

    def wait_for(count):
        end = time.monotonic() + 20
        while len(said) < count:
            assert time.monotonic() < end, said
            time.sleep(0.01)
        return hub.files("models/me/run")

    add("first")
    start = time.monotonic()
    files = wait_for(1)
    assert b"first" in files["run/captions.jsonl"]
    assert mirror.resumes_from(huggingface_hub.HfApi(), "me/run") == "captions.jsonl"
    add("second")
    assert b"second" in wait_for(2)["run/captions.jsonl"]
    assert time.monotonic() - start > 0.3  # not with each batch
    pushes = len(hub.commits("models/me/run"))
    time.sleep(0.5)
    assert len(hub.commits("models/me/run")) == pushes  # nothing is new
    hub.fault("503", path="/commit/")
    add("third")
    assert b"third" in wait_for(4)["run/captions.jsonl"]
    assert said[0] == said[1] == said[3] == "captions.jsonl is in me/run"
    other = mirror.Mirror(tmp_path / "other", "me/run", said.append)
    assert other.restore() == "captions.jsonl"
    other.start()
    time.sleep(0.5)
    other.end(5.0)
    kept.end(5.0)
    assert len(hub.commits("models/me/run")) == pushes + 1


def test_a_second_launch_during_the_question_is_refused(hub, launcher, short, monkeypatch):
    short("exec sleep 60")

    def answer(yes):
        if not yes:
            launcher("--yes", *CARD)

    monkeypatch.setattr(launch_hf_job.launch, "confirm", answer)
    with pytest.raises(UserError, match="is at work on the same command"):
        launcher(*CARD)
    assert len(hub.jobs) == 1
    hub.jobs[0].cancel()


def test_every_script_trains_in_a_cloud_or_stays_at_home():
    scripts = {path.name for path in SCRIPTS.glob("*.py")}
    assert scripts == {*staging.SECTIONS, *staging.AT_HOME}


def test_only_code_is_staged_and_no_token(tmp_path, monkeypatch):
    for name, text in (
        ("scripts/mine.py", "print(1)"), ("scripts/requirements.txt", "torch"), ("scripts/mlflow.db", "x"),
        ("scripts/outputs/run/model.safetensors", "x"), ("scripts/prod.env", "x"), ("datasets_card/model_card.md", "x"),
        ("scripts/photos/1.jpg", "x"), ("inner.yaml", "{}"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "scripts/link.py").symlink_to(tmp_path / "inner.yaml")
    monkeypatch.setattr(staging, "ROOT", tmp_path)
    command = staging.Command("mine.py", [], None)
    staging.stage(tmp_path / "code", command, tmp_path / "inner.yaml")
    staged = {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*") if path.is_file()}
    assert staged == {
        "scripts/mine.py",
        "scripts/requirements.txt",
        "datasets_card/model_card.md",
        "accelerate.yaml",
        "REVISION",
    }
    (tmp_path / "scripts/mine.py").write_text(f"token = 'hf_{'a1B2' * 8}'")
    with pytest.raises(UserError, match=r"scripts/mine\.py holds what looks like a token"):
        staging.stage(tmp_path / "again", command, tmp_path / "inner.yaml")


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "mlflow", "none"])
def test_the_package_of_a_tracker_reaches_the_job(tracker, tmp_path):
    command = staging.read_command([UNET, "--dataset", "me/photos", "--report_to", tracker], hf_job.CLOUD)
    staging.stage(tmp_path / "code", command, ROOT / "accelerate_configs/cpu.yaml")
    added = (
        (tmp_path / "code/scripts/requirements.txt")
        .read_text()
        .removeprefix((SCRIPTS / "requirements.txt").read_text())
    )
    assert re.fullmatch(rf"({tracker}(==\S+)?  # --report_to {tracker}\n)?", added)
    assert bool(added) == (tracker in ("wandb", "tensorboard"))


def test_no_fetched_file_leaves_the_folder():
    for name in ("/etc/passwd", "../x", "samples/", "checkpoint-000001/x", ".lock", ""):
        assert not launch_hf_job.launch.is_result(name)
    assert launch_hf_job.launch.is_result("samples/a.png")


def test_what_is_wrong_is_refused_before_anything_is_sent(hub, launcher):
    for words, changes, sentence in (
        (CARD, {"secrets": ["T2I_NO_SUCH_VARIABLE"]}, "which this shell does not set"),
        (CARD, {"flavor": "t4-smal"}, "did you mean 't4-small'"),
        (CARD, {"flavor": "cpu-basic", "mixed_precision": "fp16"}, "fp16 of mixed_precision needs a GPU"),
        ([*CARD, "--dataset", "s3://photos/flowers"], {}, "needs an AWS account"),
        ([*CARD, "--push_to_hub", "--hub_model_id", "me"], {}, "hub_model_id"),
        ([UNET], {}, "no data set"),
        ([*CARD, "--caption_template", "a flower"], {}, "'a flower' does not contain {label}"),
    ):
        with pytest.raises(UserError, match=sentence):
            launcher("--yes", *words, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match="there is no token for the Hub; run `hf auth login`"):
            launcher("--yes", *CARD)
    assert {method for method, _ in hub.requests} == {"GET"}


def test_what_the_job_could_not_read_on_the_hub_is_refused_before_it_costs(hub, launcher):
    own = SCRIPTS / "caption_to_hub.py"
    hub.create("models/other/gated", private=False)
    hub.repos["models/other/gated"].gated = True
    for words, sentence in (
        (
            [*CARD, "--dataset", "me/fotos"],
            "--dataset me/fotos: the Hub shows no me/fotos: correct the name, or your token",
        ),
        (
            [*CARD, "--dataset_revision", "v9"],
            "--dataset nelorth/oxford-flowers: nelorth/oxford-flowers has no revision v9",
        ),
        ([*CARD, "--vae", "me/vae"], "--vae me/vae: the Hub shows no me/vae"),
        (
            [*CARD, "--text_encoder", "other/gated"],
            "--text_encoder other/gated: other/gated is gated: accept its conditions at",
        ),
        (
            [own, "--dataset", "me/photos", "--captioner", "label", "me/blip"],
            "--captioner me/blip: the Hub shows no me/blip",
        ),
    ):
        for asked in ("--yes", "--dry_run"):
            with pytest.raises(UserError) as told:
                launcher(asked, *words)
            assert str(told.value).startswith(sentence)
    assert {method for method, _ in hub.requests} == {"GET"}
    hub.fault("503", path="/api/models/stabilityai")
    told = launcher("--dry_run", *CARD)
    assert "nobody checked whether the job can read --vae stabilityai/sd-vae-ft-mse, --text_encoder openai/clip" in told
    assert "nobody checked" not in launcher("--dry_run", *CARD)


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


def test_bf16_is_noted_where_gpus_have_no_units_for_it(hub, launcher):
    note = "NOTE: the GPUs of t4-small have no bf16 units, so mixed_precision bf16 is slow there; set mixed_precision: fp16"
    assert note in launcher("--dry_run", *CARD, mixed_precision="bf16")
    assert "bf16 units" not in launcher("--dry_run", *CARD)
    assert "bf16 units" not in launcher("--dry_run", *CARD, mixed_precision="bf16", flavor="l4x1")


def test_the_costs_in_the_documents_are_those_of_dry_runs(hub, launcher):
    text = (ROOT / "docs" / "clouds.md").read_text().split("## Compare the costs")[1].split("##")[0]
    table = {
        row[0]: row
        for row in ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines())
        if row
    }
    flavors = ("t4-small", "l4x1", "a10g-small", "a100-large", "h200")
    for flavor in flavors:
        told = launcher("--dry_run", *CARD, flavor=flavor)
        _, speed, _, hours, price, usd = table[flavor]
        assert f"{speed.replace(',', '')} samples/s (" in told
        assert f"1,021,664 samples / {speed.replace(',', '')} per s + 10 min = " in told
        assert f"1 x {flavor}: {price} USD per hour" in told
        assert f"h x {price} USD = {usd} USD" in told
        assert float(hours) == pytest.approx(float(usd) / float(price), abs=0.02)
    # SageMaker's job beside them
    command = staging.read_command(CARD[2:], "SageMaker")
    config = sagemaker_job.read_config(ROOT / "accelerate_configs/sagemaker.yaml")
    inner = staging.read_inside(ROOT / "accelerate_configs/deepspeed_zero2.yaml")
    found = costs.estimate(command, config, inner, costs.read_prices(), 6811, None)
    _, speed, _, hours, price, usd = table["SageMaker, 2 x `ml.g4dn.xlarge"]
    assert (f"{found.samples_per_second:.0f}", f"{found.hours:.1f}") == (speed, hours)
    assert (f"{found.usd_per_hour:.2f}", f"{found.usd:.2f}") == (price, usd)


@settings(max_examples=60)
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
    hub.edit(repo, {f"run/checkpoint-0000{step}0/manifest.json": "{}" for step in (2, 4)} | {"run/run.json": "{}"})
    hub.jobs[-1].preempt()
    with pytest.raises(UserError, match=r"ended as ERROR \(The machine was reclaimed\); checkpoint-000040 is in me/"):
        launcher("--fetch", hub.jobs[-1].id, "--wait", "--output_dir", tmp_path / "home")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"run.json", "hf_job.json"}
    assert "resumes there from checkpoint-000040" in launcher("--dry_run", *CARD)
    launcher("--yes", *CARD)
    assert "is cancelled" in launcher("--stop", hub.jobs[-1].id)
    with pytest.raises(UserError, match="the Hub knows no such job"):
        launcher("--stop", "nobodys-job")


def test_a_log_that_breaks_is_followed_again(hub, launcher, short):
    short("echo one; echo two; sleep 1; echo three")
    hub.cut_logs = 1
    told = launcher("--yes", "--wait", *CARD)
    assert [told.count(word) for word in ("one\n", "two\n", "three\n")] == [1, 1, 1]


def test_a_log_that_stays_broken_is_told_and_the_job_runs_on(hub, launcher, short, monkeypatch, tmp_path):
    monkeypatch.setattr(
        time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.1))
    )  # of the client's retries
    short("echo one; exec sleep 60")
    launcher("--yes", *CARD)
    hub.fault("reset", times=float("inf"), path="/logs")
    with pytest.raises(UserError) as told:
        launcher("--fetch", hub.jobs[-1].id, "--wait", "--output_dir", tmp_path / "home")
    job = hub.jobs[-1].id
    assert str(told.value).startswith("the log cannot be followed any more: the Hub cannot be reached (")
    assert str(told.value).endswith(f"; {job} keeps running, and --fetch {job} --wait follows it again")
    assert hub.jobs[-1].stage == "RUNNING"


def test_a_longer_command_extends_the_finished_run(hub, launcher, short):
    """The repository stays, so the training finds its checkpoints there. test_resume.py shows that it then extends the run."""
    short("true")
    launcher("--yes", *CARD, "--max_train_steps", 60)
    first = hub.jobs[-1]
    assert first.wait(20) == "COMPLETED"
    run = first.spec["labels"][hf_job.LABEL]
    hub.edit(f"models/me/{run}", {"run/checkpoint-000060/manifest.json": "{}"})
    state = b'{"status": "finished"}'
    huggingface_hub.HfApi().upload_file(path_or_fileobj=state, path_in_repo="run/run.json", repo_id=f"me/{run}")
    with pytest.raises(UserError, match=f"{first.id} has finished the run of this command.*raise --max_train_steps"):
        launcher("--yes", *CARD, "--max_train_steps", 60)
    launcher("--yes", *CARD, "--max_train_steps=70", "--lr_on_extend", "constant")
    assert hub.jobs[-1].spec["labels"][hf_job.LABEL] == run
    assert hub.jobs[-1].wait(20) == "COMPLETED"
    with pytest.raises(UserError, match=f"{hub.jobs[-1].id} has finished the run of this command"):
        launcher("--yes", *CARD, "--max_train_steps=70", "--lr_on_extend", "constant")
    launcher("--yes", *CARD, "--max_train_steps", 60, "--learning_rate", "0.01")
    assert hub.jobs[-1].spec["labels"][hf_job.LABEL] != run


def test_a_finished_vae_without_checkpoints_is_trained_further_as_a_new_run(hub, launcher, short):
    """An autoencoder's only checkpoint goes at its end, so a longer command would be refused in the paid job."""
    short("true")
    words = ["--yes", "--train_images", 6811, SCRIPTS / "train_vae.py", "--config", "flowers"]
    launcher(*words, "--max_train_steps", 60)
    job = hub.jobs[-1]
    assert job.wait(20) == "COMPLETED"
    state = json.dumps({"status": "finished", "identity": {"steps": 60}})
    hub.edit(f"models/me/{job.spec['labels'][hf_job.LABEL]}", {"run/run.json": state})
    for steps in (60, 70):
        with pytest.raises(UserError) as told:
            launcher(*words, "--max_train_steps", steps)
        assert (
            f"bring it home with --fetch {job.id}, and train it further as a new run with --vae outputs/{job.id}"
            in str(told.value)
        )
        assert "raise --max_train_steps" not in str(told.value)
    launcher(*words, "--max_train_steps", 60, "--push_to_hub", "--hub_model_id", "me/vae", "--license", "mit")
    assert len(hub.jobs) == 2  # to push, it needs no checkpoint


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
    checkpoint(100)
    kept._push(10.0)
    with pytest.raises(UserError, match="checkpoint-000100 is in me/run, and not of this job; stop the other job"):
        other._push(10.0)  # two jobs of one command: the slower one must not remove what the faster one keeps
    assert "run/checkpoint-000100/manifest.json" in hub.files("models/me/run")
    checkpoint(120)
    cut_off = mock.Mock(side_effect=httpx2.ConnectError("no answer"))
    monkeypatch.setattr(mirror, "newest_checkpoint", cut_off)  # a Hub that is cut off for a moment costs no checkpoint
    kept._push(10.0)
    cut_off.assert_called_once()
    assert "run/checkpoint-000120/manifest.json" in hub.files("models/me/run")
    assert hub.repos["models/me/run"].private


def halt_at_checkpoint(job, step):
    """Halt a job's training once it has written a checkpoint, so that it cannot end before it is cut off."""
    wanted = job.work / "run" / f"checkpoint-{step:06d}" / "manifest.json"
    while not wanted.is_file():
        assert job.stage == "RUNNING", job.log()[-6000:]
        time.sleep(0.002)
    for child in psutil.Process(job.pid).children(recursive=True):
        if any("train_unet.py" in word for word in child.cmdline()):
            child.suspend()


def test_a_job_is_cut_off_and_the_same_command_goes_on(hub, launcher, tmp_path, command):
    """Through everything real: submit, train, be cut off by the timeout, resume, finish, fetch, draw."""
    if reason := why_not(tmp_path):
        pytest.skip(reason)
    from t2i import models

    (tmp_path / "tiny.yaml").write_text(TINY)
    command("make_flowers.py", "--output_dir", "dataset", "--count", 40, "--validation_count", 8, "--test_count", 4,
            "--size", 32, "--workers", 1, cwd=tmp_path, fork=True)  # fmt: skip
    models.build_vae(config.load_recipe(str(tmp_path / "tiny.yaml")).vae).save_pretrained(tmp_path / "vae")
    run_name = '00\'42 a=b "c"'
    words = ["--yes", "--train_images", 40, UNET, "--config", tmp_path / "tiny.yaml", "--dataset", tmp_path / "dataset",
             "--vae", tmp_path / "vae", "--checkpointing_steps", 20, "--validation_steps", 20, "--max_train_steps", 60,
             "--report_to", "none", "--run_name", run_name]  # fmt: skip
    told = launcher(*words, **CPU)
    assert "the training starts anew" in told
    cut = hub.jobs[-1]
    repo = "models/me/" + cut.spec["labels"][hf_job.LABEL]
    halt_at_checkpoint(cut, 20)
    while not any(name.startswith("run/checkpoint-000020/") for name in hub.files(repo)):
        assert cut.stage == "RUNNING", cut.log()[-6000:]
        time.sleep(0.05)
    cut.time_out()
    assert cut.wait(20) == "ERROR"
    with pytest.raises(
        UserError, match=r"ended as ERROR \(Job timeout\); checkpoint-000020 is in me/.* resumes from it"
    ):
        launcher("--fetch", cut.id, "--wait", "--output_dir", tmp_path / "cut", **CPU)
    told += launcher(*words, **CPU)
    assert "the training resumes there from checkpoint-000020" in told
    job = hub.jobs[-1]
    assert job.wait(1200) == "COMPLETED", job.log()[-6000:]
    assert "the run of an earlier job is here, at checkpoint-000020" in job.log()
    assert re.search(r"^resuming from .*checkpoint-000020", job.log(), re.MULTILINE), job.log()[-3000:]
    assert f"finished; the run is in {repo.removeprefix('models/')}" in job.log()
    with pytest.raises(
        UserError, match=f"{job.id} has finished the run of this command; bring it home with --fetch {job.id}"
    ):
        launcher(*words, **CPU)
    told += launcher("--fetch", job.id, "--output_dir", tmp_path / "home", **CPU)
    state = json.loads((tmp_path / "home/run.json").read_text())
    assert (state["status"], state["steps"]) == ("finished", 60)
    assert config.load_recipe(str(tmp_path / "home/config.yaml")).train_unet.run_name == run_name
    command("generate_images.py", "--model", tmp_path / "home", "--prompt", "a red flower", "--num_inference_steps", 2,
            "--output_dir", tmp_path / "pictures", cwd=tmp_path, fork=True)  # fmt: skip
    assert list((tmp_path / "pictures").glob("*.png"))
    logs = told + cut.log() + job.log()
    check_token_is_nowhere_else(hub, logs, [hub.folder, tmp_path / "home", tmp_path / "hf_jobs.yaml"])


def test_a_distillation_is_a_job_that_goes_on_and_comes_home_beside_its_teacher(hub, launcher, tmp_path, command):
    """Of the teacher's run only what the job needs is sent, and an interruption does not change the student."""
    if reason := why_not(tmp_path):
        pytest.skip(reason)
    command("make_flowers.py", "--output_dir", "dataset", "--count", 40, "--validation_count", 8, "--test_count", 4,
            "--size", 32, "--workers", 1, cwd=tmp_path, fork=True)  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(TINY)
    recipe = config.load_recipe(str(tmp_path / "tiny.yaml"))
    recipe.data.dataset = str(tmp_path / "dataset")
    teacher = untrained_run(tmp_path / "runs" / "unet", recipe)
    for name in ("evaluation", "samples", "checkpoint-000008"):
        (teacher / name).mkdir()
    (teacher / "samples" / "grid.png").write_bytes(b"stays here")
    (teacher / "checkpoint-000008" / "state.json").write_text("{}")
    (teacher / "evaluation" / "evaluation.json").write_text(
        '{"report": {"guidance_scale": 3.0, "guidance_rescale": 0.7}}'
    )
    options = ["--trajectories", 16, "--validation_images", 4, "--train_batch_size", 4, "--max_train_steps", 24,
               "--lr_warmup_steps", 4, "--checkpointing_steps", 8, "--decoder_steps", 2, "--report_to", "none"]  # fmt: skip
    words = ["--yes", "--train_images", 40, SCRIPTS / "distill_unet.py", "--model", teacher, *options]
    here, cut = tmp_path / "undisturbed", tmp_path / "cut"
    command("distill_unet.py", "--model", teacher, "--output_dir", here, *options, cwd=tmp_path, fork=True)
    # what an earlier job has left, which was cut off after 8 of the 24 updates
    later = shutil.ignore_patterns("checkpoint-000016", "checkpoint-000024", "unet", "*.jsonl", "samples")
    shutil.copytree(
        here, cut / "run", ignore=lambda folder, names: later(folder, names) if "check" not in folder else []
    )
    state = json.loads((here / "run.json").read_text())
    kept = {key: state[key] for key in ("identity", "seconds", "quarantined", "precisions", "student", "effective")}
    (cut / "run" / "run.json").write_text(json.dumps(kept | {"status": "unfinished"}))
    request, _ = json.JSONDecoder().raw_decode(launcher("--dry_run", *words[1:], **CPU))
    mirror.Mirror(cut, f"me/{request['labels'][hf_job.LABEL]}", print)._push(10.0)
    told = launcher(*words, **CPU)
    assert "the training resumes there from checkpoint-000008" in told
    assert "24 updates of 4 samples = 3.0 epochs of 32 steps of the teacher's pictures" in told
    assert "the teacher draws 20 pictures and a tiny decoder may be trained; the time for this was not measured" in told
    job = hub.jobs[-1]
    assert job.wait(1200) == "COMPLETED", job.log()[-6000:]
    assert re.search(r"^resuming from .*checkpoint-000008", job.log(), re.MULTILINE), job.log()[-3000:]
    (place,) = re.findall(rf"--fetch {job.id} --output_dir (\S+)", told)
    assert place == str(tmp_path / "runs" / "turbo")
    assert f"{place} is the student of {teacher}, whose preset turbo" in launcher(
        "--fetch", job.id, "--output_dir", place, **CPU
    )
    assert find_student(teacher) == tmp_path / "runs" / "turbo"
    result, other = (json.loads((run / "run.json").read_text()) for run in (tmp_path / "runs" / "turbo", here))
    assert result["student"].items() >= {"distilled_guidance_scale": 3.0, "distilled_guidance_rescale": 0.7}.items()
    assert (result["output_unet_hash"], result["identity"]) == (other["output_unet_hash"], other["identity"])
    sent = {name for repo in hub.repos if "t2i-input" in repo for name in hub.files(repo)}
    assert {"config.yaml", "run.json", "evaluation/evaluation.json", "pipeline/model_index.json"} <= sent
    assert not [name for name in sent if name.startswith(("checkpoint-", "samples", "metrics"))]


def check_token_is_nowhere_else(hub, logs, places):
    """The token stands only in Authorization headers and in `secrets`: in no other part of a request, log, file or commit."""
    token, seen = hub.token, 0
    for method, path, headers, body in hub.exchanges:
        others = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        assert token not in path + json.dumps(others)
        if method == "POST" and path == "/api/jobs/me":
            sent = json.loads(body)
            assert sent["secrets"]["HF_TOKEN"] == token
            body, seen = json.dumps(sent | {"secrets": sorted(sent["secrets"])}).encode(), seen + 1
        assert token.encode() not in body
    assert seen == len(hub.jobs) > 0
    assert token not in logs
    for job in hub.jobs:
        assert token not in job.log() + json.dumps(job.info())
    for repo in hub.repos:
        assert not any(token.encode() in file.content for commit in hub.commits(repo) for file in commit.files.values())
    for place in places:
        for path in [place, *place.rglob("*")]:
            assert not (path.is_file() and token.encode() in path.read_bytes()), path


# Stands for a training and its launcher: writes a checkpoint, and another one on SIGTERM.
TRAINS = """
import json, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
def checkpoint(step):
    folder = run / f"checkpoint-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": {"state.json": {"bytes": 2, "sha256": ""}}}))
def save(number, frame):
    checkpoint(30)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
checkpoint(20)
time.sleep(60)
"""


def test_a_training_saves_by_itself_before_the_timeout(hub, tmp_path):
    """run_hf_job.py by the clock, with a stand-in for the training and its launcher."""
    hub.create("models/me/run")
    code = tmp_path / "code"
    shutil.copytree(SCRIPTS, code / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "scripts/train_unet.py").write_text(TRAINS)
    stub = tmp_path / "stub/accelerate/commands"
    stub.mkdir(parents=True)
    for folder in (stub, stub.parent):
        (folder / "__init__.py").write_text("")
    starts = "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, *sys.argv[5:]]).returncode and 1)\n"
    (stub / "launch.py").write_text(starts)
    job = {"script": "train_unet.py", "arguments": [str(tmp_path / "run")], "mixed_precision": None, "inputs": {},
           "repository": "me/run", "timeout": 3600, "save_after": 3002}  # fmt: skip
    (code / "job.json").write_text(json.dumps(job))
    variables = os.environ | hub.environment() | {"PYTHONPATH": str(tmp_path / "stub"), hf_job.SECONDS: "3000"}
    done = subprocess.run([sys.executable, code / "scripts/run_hf_job.py"], env=variables, capture_output=True, text=True,
                          timeout=100, check=False)  # fmt: skip
    assert done.returncode == 75, done.stdout + done.stderr
    assert "the job's timeout of 3600 s is near: the training saves a checkpoint and ends" in done.stdout
    assert "stopped at checkpoint-000030, which is in me/run; the same command resumes" in done.stdout
    assert "run/checkpoint-000030/manifest.json" in hub.files("models/me/run")


def test_the_requests_are_these_to_the_byte(hub, launcher, short, monkeypatch):
    """The golden requests: everything that is sent to submit the model card's job, and to stop it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-of-mlflow")
    short("exec sleep 60")
    launcher("--yes", *CARD, environment={"NCCL_DEBUG": "WARN"})
    name = "t2i-7293bb57d658"
    code, head = hub.commits(f"models/me/{name}")[-1], hub.commits(f"models/me/{name}")[0]
    sent = [(method, path, body) for method, path, _, body in hub.exchanges if method != "GET"]
    assert [(method, path) for method, path, _ in sent] == [
        ("POST", "/api/repos/create"),
        ("POST", f"/api/models/me/{name}/preupload/main"),
        ("POST", f"/api/models/me/{name}/commit/main"),
        ("POST", "/api/jobs/me"),
    ]
    assert json.loads(sent[0][2]) == {"name": name, "organization": "me", "type": "model", "visibility": "private"}
    commit = [json.loads(line) for line in sent[2][2].splitlines()]
    assert commit[0] == {
        "key": "header",
        "value": {"summary": "code of a job", "description": "", "parentCommit": head.id},
    }
    assert {line["key"] for line in commit[1:]} == {"file"}
    assert {line["value"]["path"].split("/")[0] for line in commit[1:]} == {"code"}
    files = hub.files(f"models/me/{name}")
    assert {"code/job.json", "code/accelerate.yaml", "code/REVISION", "code/scripts/run_hf_job.py"} <= set(files)
    assert json.loads(files["code/job.json"]) == {
        "script": "train_unet.py",
        "arguments": ["--config", "flowers", "--output_dir", "/tmp/t2i-job/run", "--cache_dir", "/tmp/t2i-job/cache"],
        "mixed_precision": None, "inside": "single_gpu.yaml", "inputs": {}, "repository": f"me/{name}", "timeout": 21600,
        "save_after": 21000,
    }  # fmt: skip
    pip = "python3 -m pip install --quiet --disable-pip-version-check"
    assert json.loads(sent[3][2]) == {
        "dockerImage": "pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime",
        "command": [
            "bash", "-c",
            f"{pip} huggingface_hub==2.4.0 && python3 -c \"from huggingface_hub import snapshot_download; "
            f"snapshot_download('me/{name}', revision='{code.id}', allow_patterns='code/*', local_dir='/tmp/t2i-job')\" && "
            f"{pip} --requirement /tmp/t2i-job/code/scripts/requirements.txt && export T2I_SECONDS=$SECONDS && "
            "exec python3 /tmp/t2i-job/code/scripts/run_hf_job.py",
        ],
        "arguments": [],
        "environment": {
            "PIP_BREAK_SYSTEM_PACKAGES": "1", "NCCL_DEBUG": "WARN", "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
        },
        "secrets": {"HF_TOKEN": hub.token, "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow"},
        "flavor": "t4-small",
        "timeoutSeconds": 21600,
        "attempts": 1,
        "labels": {"t2i-run": name, "t2i-command": "7293bb57d658", "name": "t2i"},
    }  # fmt: skip
    job = hub.jobs[-1].id
    hub.exchanges.clear()
    launcher("--stop", job)
    assert [(method, path, body) for method, path, _, body in hub.exchanges] == [
        ("GET", "/api/whoami-v2", b""),
        ("GET", f"/api/jobs/me/{job}", b""),
        ("POST", f"/api/jobs/me/{job}/cancel", b""),
    ]


def test_jobs_of_both_clouds_are_listed_and_stopped(hub, launcher, short, tmp_path, monkeypatch, capsys):
    for name in ("AWS_PROFILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    short("exec sleep 60")
    launcher("--yes", *CARD)
    hub.jobs[-1]._begin -= 1800  # half an hour ago
    sagemaker = tmp_path / "sagemaker.yaml"
    sagemaker.write_text((ROOT / "accelerate_configs/sagemaker.yaml").read_text())
    files = ["--config_files", str(tmp_path / "hf_jobs.yaml"), str(sagemaker)]
    with aws() as cloud:
        client = cloud.session.client("sagemaker")
        for name, kind in (("t2i-20261129", "ml.g4dn.xlarge"), ("other", "ml.g5.xlarge")):
            client.create_training_job(
                TrainingJobName=name, RoleArn=cloud.role, OutputDataConfig={"S3OutputPath": "s3://b/c"},
                AlgorithmSpecification={"TrainingImage": "image", "TrainingInputMode": "File"},
                ResourceConfig={"InstanceType": kind, "InstanceCount": 2, "VolumeSizeInGB": 1},
                StoppingCondition={"MaxRuntimeInSeconds": 60},
            )  # fmt: skip
        from moto.sagemaker.models import sagemaker_backends

        record = sagemaker_backends["123456789012"]["us-east-1"].training_jobs["t2i-20261129"]
        record.training_job_status, record.billable_time_in_seconds = "Stopped", 3600
        monkeypatch.setattr(sys, "argv", ["list_jobs.py", *files])
        list_jobs.main()
    told = capsys.readouterr().out
    table = [re.split(r"  +", line) for line in told.splitlines()]
    job = hub.jobs[-1].id
    assert table == [
        ["job", "state", "machine", "USD so far", "fetch with"],
        [job, "RUNNING", "t4-small", "0.20", f"python scripts/launch_hf_job.py --config_file {files[1]} --fetch {job}"],
        ["t2i-20261129", "Stopped", "2 x ml.g4dn.xlarge", "1.47",
         f"python scripts/launch_sagemaker.py --config_file {sagemaker} --fetch t2i-20261129"],
    ]  # fmt: skip
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    list_jobs.main()
    out = capsys.readouterr()
    assert job in out.out
    assert "no jobs by sagemaker.yaml: no AWS credentials: run aws configure" in out.err
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no cloud could be asked for jobs"):
        list_jobs.main()
