"""SageMaker jobs: requests, refusals, costs, and the way home of a result."""

import contextlib
import dataclasses
import datetime
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import types
from typing import Any
from unittest import mock

import boto3
import botocore.client
import botocore.exceptions
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

import launch_sagemaker
import run_sagemaker_job
from conftest import ROOT, SCRIPTS
from local_sagemaker import aws
from loopback_hub import LoopbackHub
from rehearse_sagemaker import finish_in_moto, launch
from t2i import config
from t2i.clouds import aws_account, costs, sagemaker_job
from t2i.clouds.launch import FORWARDED, OF_A_SERVER, SECRET_NAMES, precision_note
from t2i.clouds.staging import SECTIONS
from t2i.errors import UserError

GOLDEN = ROOT / "tests" / "golden"
ZERO2 = {"distributed_type": "DEEPSPEED", "mixed_precision": "fp16"}
UNET = str(SCRIPTS / "train_unet.py")
BASE = yaml.safe_load((ROOT / "accelerate_configs" / "sagemaker.yaml").read_text()) | {
    "iam_role_name": "sagemaker",
    "sagemaker_metrics_file": str(ROOT / "accelerate_configs" / "sagemaker_metrics.tsv"),
}
ON_DEMAND = {"use_spot_instances": False, "max_run": 7200}
VARIANTS = {
    "spot_2_hub": ({}, ["--config", "flowers"]),
    "on_demand_1_hub": ({"num_machines": 1, "additional_args": ON_DEMAND}, ["--config", "flowers"]),
    "on_demand_2_s3": ({"additional_args": ON_DEMAND}, ["--config", "flowers", "--dataset", "s3://photos/flowers"]),
    "spot_1_s3_custom_image": (
        {"num_machines": 1, "image_uri": "123456789012.dkr.ecr.us-east-1.amazonaws.com/mine:1"},
        ["--config", "flowers", "--dataset=s3://photos/flowers", "--vae", "s3://photos/vae"],
    ),
    "network_tags_and_server": (
        {
            "additional_args": ON_DEMAND
            | {
                "subnets": ["subnet-1"], "security_group_ids": ["sg-1"], "encrypt_inter_container_traffic": True,
                "tags": {"project": "flowers"}, "environment": {"MLFLOW_TRACKING_URI": "https://mlflow.example.org"},
                "output_path": "s3://photos/models", "checkpoint_s3_uri": "s3://photos/checkpoints/7",
            }
        },
        ["--config", "flowers"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cloud():
    with aws() as found:
        found.session.client("s3").create_bucket(Bucket="photos")
        yield found


SIZES = {}


def size_counted_once(recipe, count=costs.unet_size):
    """Return what `costs.unet_size` does. Counting takes more than a second, and most launches have the same UNet."""
    key = repr((recipe.data.resolution, recipe.vae, recipe.unet))
    if key not in SIZES:
        SIZES[key] = count(recipe)
    return SIZES[key]


@pytest.fixture
def launcher(tmp_path, cloud, monkeypatch):
    """Run launch_sagemaker.py with the model card's YAML, changed by `changes`; returns what it printed."""
    for name in (
        *SECRET_NAMES,
        *FORWARDED,
        *OF_A_SERVER,
        "MLFLOW_TRACKING_URI",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(costs, "_hub_counts", lambda *_: {})  # no network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(costs, "unet_size", size_counted_once)

    def run(*words, **changes):
        (tmp_path / "sagemaker.yaml").write_text(yaml.safe_dump(BASE | changes))
        return launch(["--config_file", str(tmp_path / "sagemaker.yaml"), *map(str, words)])

    return run


def backend():
    """moto's SageMaker."""
    from moto.sagemaker.models import sagemaker_backends

    return sagemaker_backends["123456789012"]["us-east-1"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_request_is_as_it_was(name, launcher, cloud):
    """UPDATE_GOLDEN=1 writes the files anew; look at their difference before committing it."""
    changes, words = VARIANTS[name]
    planned = json.loads(launcher("--dry_run", UNET, *words, **changes))
    launcher("--yes", UNET, *words, **changes)
    sent = cloud.requests[-1]
    job = sent["TrainingJobName"]
    sent, planned = (json.loads(json.dumps(part).replace(part["TrainingJobName"], "JOB")) for part in (sent, planned))
    assert sent == planned  # a dry run shows what is sent
    assert job.startswith("t2i-")
    file = GOLDEN / f"sagemaker_{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(sent, indent=1) + "\n")
    assert sent == json.loads(file.read_text())


def test_what_is_staged(launcher, cloud):
    launcher("--yes", UNET, "--config", "flowers", "--run_name", "-1 'x'".strip("-"))
    request = cloud.requests[-1]
    code = next(channel for channel in request["InputDataConfig"] if channel["ChannelName"] == "code")
    bucket, _, prefix = code["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
    s3 = cloud.session.client("s3")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = {item["Key"].removeprefix(prefix + "/") for page in pages for item in page["Contents"]}
    staged = {"scripts/train_unet.py", "scripts/t2i/config.py", "scripts/requirements.txt", "scripts/recipes/flowers.yaml",
              "datasets_card/model_card.md", "accelerate.yaml", "job.json", "REVISION"}  # fmt: skip
    assert staged <= keys
    assert not [key for key in keys if "__pycache__" in key or key.startswith((".", "tests"))]
    job = json.loads(s3.get_object(Bucket=bucket, Key=f"{prefix}/job.json")["Body"].read())
    assert (job["machines"], job["inside"], job["mixed_precision"]) == (2, "deepspeed_zero2.yaml", "fp16")
    assert job["arguments"][-4:] == ["--output_dir", sagemaker_job.RUN, "--cache_dir", sagemaker_job.CACHE]


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "run_name": TEXT.map(lambda text: [f"--run_name={text}"]),
        "experiment": st.sampled_from(["0042", "a=b", "it's", '"q"', "a b", "$HOME `ls` \\", "*", ";|&"]).map(
            lambda text: ["--experiment", text]
        ),
        "split_seed": st.integers(-999, 999).map(lambda number: ["--split_seed", str(number)]),
        "learning_rate": st.floats(1e-9, 1).map(lambda number: ["--learning_rate", repr(number)]),
        "validation_prompts": st.lists(TEXT.filter(lambda text: not text.startswith("-")), min_size=1, max_size=3).map(
            lambda texts: ["--validation_prompts", *texts]
        ),
        "unet_channels": st.lists(st.integers(1, 512), min_size=3, max_size=3).map(
            lambda numbers: ["--unet_channels", *map(str, numbers)]
        ),
        "flags": st.sampled_from(
            [["--no_random_flip"], ["--random_flip"], ["--gradient_checkpointing", "--no_use_ema"]]
        ),
    },
)


@settings(max_examples=30)
@given(ARGUMENTS)
def test_every_argument_arrives_as_typed(parts):
    """From the shell, through job.json and accelerate's command line in the container, to the script's settings."""
    words = ["--dataset", "ORG/NAME", *(word for part in parts.values() for word in part)]
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    shell = shlex.join([sys.executable, "-c", code, *words])  # as a shell reads what was typed with quotes
    typed = json.loads(subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout)
    command = sagemaker_job.read_command([UNET, *typed])
    arguments = json.loads(json.dumps(sagemaker_job.container_arguments(command, {})))
    job = {"script": "train_unet.py", "arguments": arguments, "mixed_precision": None, "zero": True}
    line = run_sagemaker_job.launch_words(job, ["algo-1", "algo-2"], 1, 2)
    inside = config.parse(SECTIONS["train_unet.py"], "", line[line.index(UNET) + 1 :])
    here = config.parse(SECTIONS["train_unet.py"], "", words)
    here.train_unet.output_dir, here.data.cache_dir = sagemaker_job.RUN, sagemaker_job.CACHE
    assert inside == here


def test_folders_become_channels(tmp_path, launcher, cloud):
    """A local folder is uploaded once by its content, and the container reads it where SageMaker puts it."""
    for folder in ("photos/rose", "vae_run/vae", "vae_run/checkpoint-000001"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "photos/rose/1.jpg").write_bytes(b"not looked at")
    (tmp_path / "photos/.hidden").write_bytes(b"stays")
    (tmp_path / "vae_run/vae/config.json").write_text("{}")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"dataset": str(tmp_path / "photos")}, "unet": {"text_encoder": "a/b"}}))
    words = (UNET, "--config", recipe, "--vae", tmp_path / "vae_run")
    first = launcher("--yes", "--train_images", 10, *words)
    assert "dataset: 1 of 1 files uploaded" in first
    assert "vae: 1 of 1 files" in first  # of a run folder, the VAE alone
    assert "dataset: 0 of 1 files uploaded" in launcher("--yes", "--train_images", 10, *words)
    channels = {channel["ChannelName"] for channel in cloud.requests[-1]["InputDataConfig"]}
    assert channels == {"dataset", "vae", "code", "sm_drivers"}
    uris = [channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in cloud.requests[-1]["InputDataConfig"]]
    assert sum("/t2i-inputs/" in uri and uri.endswith("/") for uri in uris) == 2  # flowers is not flowers-old
    command = sagemaker_job.read_command([str(word) for word in words])
    arguments = sagemaker_job.container_arguments(
        command,
        sagemaker_job.local_inputs(command, sagemaker_job.SageMakerConfig("AMAZON_SAGEMAKER", "ml.g4dn.xlarge")),
    )
    monkey = config.parse(SECTIONS["train_unet.py"], "", [*arguments, "--config", str(recipe)])
    assert (monkey.data.dataset, monkey.vae.vae) == (
        f"{sagemaker_job.CHANNELS}/dataset",
        f"{sagemaker_job.CHANNELS}/vae",
    )


def test_linked_folders_of_a_data_set_are_uploaded(tmp_path, launcher, cloud):
    """Links lead out of the data set, to a folder that it has already, to itself and above it."""
    for folder in ("elsewhere/rose", "photos/daisy"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").write_bytes(folder.encode())
    for link, target in (("rose", tmp_path / "elsewhere/rose"), ("a", "daisy"), ("round", "."), ("up", tmp_path)):
        (tmp_path / "photos" / link).symlink_to(target, target_is_directory=True)
    told = launcher("--yes", "--train_images", 10, UNET, "--dataset", tmp_path / "photos")
    assert "dataset: 2 of 2 files uploaded" in told
    channel = next(part for part in cloud.requests[-1]["InputDataConfig"] if part["ChannelName"] == "dataset")
    bucket, _, prefix = channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
    listed = cloud.session.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert {item["Key"].removeprefix(prefix) for item in listed} == {"daisy/1.jpg", "rose/1.jpg"}


def test_a_teacher_becomes_a_channel(tmp_path, launcher, cloud):
    """Of a teacher's run its settings and pipeline are sent. What is not known of the job's hours is said."""
    run, photos = tmp_path / "runs/flowers", tmp_path / "photos"
    for name in ("config.yaml", "run.json", "pipeline/model_index.json", "pipeline/unet/config.json", "pipeline/vae/config.json",
                 "pipeline/scheduler/scheduler_config.json", "pipeline/unet/weights.bin", "samples/step-000500.json",
                 "checkpoint-000500/unet/config.json"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    (run / "pipeline/model_index.json").write_text('{"unet": ["", ""], "vae": ["", ""], "scheduler": ["", ""]}')
    photos.mkdir()
    (photos / "1.jpg").write_bytes(b"not looked at")
    settings = {"data": {"dataset": str(photos)}, "distill": {"optimizer": "muon", "decoder_steps": 0}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    words = ("--train_images", 10, SCRIPTS / "distill_unet.py", "--model", run)
    with pytest.raises(UserError, match="optimizer muon does not run under DeepSpeed"):
        launcher("--yes", *words)
    told = launcher("--yes", "--samples_per_second", 100, *words, "--optimizer", "adamw")
    assert "model: 6 of 6 files uploaded" in told
    assert "256 updates of 32 samples = 4.0 epochs of 2,048 steps of the teacher's pictures" in told
    assert "8,192 samples / 100 per s + 20 min" in told
    assert (
        "the teacher draws 1,088 pictures; the time for this was not measured, so the hours of this plan leave it out"
        in told
    )
    job = cloud.requests[-1]["TrainingJobName"]
    assert f"--fetch {job} --output_dir {tmp_path}/runs/turbo\n" in told
    channels = {channel["ChannelName"] for channel in cloud.requests[-1]["InputDataConfig"]}
    assert channels == {"dataset", "model", "code", "sm_drivers"}
    (tmp_path / "runs/turbo").mkdir()
    told = launcher("--yes", *words, "--optimizer", "adamw", "--max_train_steps", 7)
    assert f"--fetch {cloud.requests[-1]['TrainingJobName']} --output_dir {tmp_path}/runs/" in told
    assert "7 updates of 32 samples" in told
    assert "model: 0 of 6 files uploaded" in told
    command = sagemaker_job.read_command(list(map(str, words[2:])))
    arguments = sagemaker_job.container_arguments(command, {"dataset": str(photos), "model": str(run)})
    assert arguments[-8:-4] == [
        "--dataset",
        f"{sagemaker_job.CHANNELS}/dataset",
        "--model",
        f"{sagemaker_job.CHANNELS}/model",
    ]
    with pytest.raises(UserError, match="--model ORG/FLOWERS is on the Hub; give a local folder"):
        launcher("--yes", SCRIPTS / "distill_unet.py", "--config", "flowers", "--dataset", photos, "--model", "ORG/FLOWERS",
                 additional_args={"enable_network_isolation": True}, image_uri="me/mine")  # fmt: skip


def mistakes():
    yield (
        "unknown instance type",
        {"ec2_instance_type": "ml.g4dn.tiny"},
        [],
        "is not a machine that SageMaker trains on; that family has ml.g4dn.",
    )
    yield "no such role", {"iam_role_name": "nobody"}, [], "the role nobody is not in account 123456789012"
    yield "role not named", {"iam_role_name": ""}, [], "iam_role_name is empty"
    yield (
        "unknown key",
        {"ec2_instance": "ml.g4dn.xlarge"},
        [],
        "unknown key in .*'ec2_instance'; did you mean 'ec2_instance_type'",
    )
    yield "unknown additional key", {"additional_args": {"use_spot": True}}, [], "did you mean 'use_spot_instances'"
    yield (
        "not a Boolean",
        {"additional_args": {"use_spot_instances": "yes"}},
        [],
        "use_spot_instances = 'yes' is not usable",
    )
    yield (
        "waits too short",
        {"additional_args": {"use_spot_instances": True, "max_run": 100, "max_wait": 50}},
        [],
        "max_wait",
    )
    yield "old Python", {"py_version": "py38"}, [], r"py_version py38, older than Python 3\.11.* set py_version: py312"
    yield "no such image", {"pytorch_version": "9.9.9"}, [], "AWS has no container image with pytorch_version 9.9.9"
    yield (
        "region",
        {"region": "us-nowhere-1"},
        [],
        r"region us-nowhere-1 \(region in the YAML\) has no SageMaker",
    )
    yield (
        "secret in YAML",
        {"additional_args": {"environment": {"HF_TOKEN": "hf_x"}}},
        [],
        "environment holds a credential in HF_TOKEN",
    )
    yield (
        "password in YAML",
        {"additional_args": {"environment": {"MLFLOW_TRACKING_URI": "https://me:canary-77aa@mlflow.example.org"}}},
        [],
        "environment holds a credential in MLFLOW_TRACKING_URI",
    )
    yield "group without subnet", {"additional_args": {"security_group_ids": ["sg-1"]}}, [], "belong together"
    yield (
        "no S3 address",
        {"additional_args": {"checkpoint_s3_uri": "b/ck"}},
        [],
        "checkpoint_s3_uri = 'b/ck' is not usable",
    )
    yield (
        "own world size",
        {"additional_args": {"environment": {"SM_NUM_GPUS": "0"}}},
        [],
        "environment sets SM_NUM_GPUS",
    )
    yield (
        "credential as tag",
        {"additional_args": {"tags": {"a": "hf_abcdefghijklmnopqrstuv"}}},
        [],
        "the tag a looks like",
    )
    yield "deep missing folder", {}, ["--dataset", "my/deep/folder"], "--dataset my/deep/folder does not exist"
    yield "a file", {}, ["--vae", str(ROOT / "README.md")], "is a file; give the folder"
    yield "nobody's home", {}, ["--dataset", "~nobody-here/x"], "there is no user 'nobody-here' here"
    yield "credential typed", {}, ["--run_name", "hf_abcdefghijklmnopqrstuv"], "an argument looks like a credential"
    two = ["--validation_prompts", "password:", "of-no-known-shape"]  # neither word alone looks like one
    yield "credential in two words", {}, two, "an argument looks like a credential"
    yield "bucket elsewhere", {}, ["--dataset", "s3://far/photos"], "s3://far is in eu-west-1, the job in us-east-1"
    yield "no such bucket", {}, ["--dataset", "s3://none/photos"], "s3://none does not exist"
    yield "no such folder", {}, ["--dataset", "./nowhere"], "--dataset ./nowhere does not exist"
    yield (
        "local YAML",
        {"compute_environment": "LOCAL_MACHINE"},
        [],
        "not AMAZON_SAGEMAKER; launch it with accelerate launch",
    )
    yield "metrics file", {"sagemaker_metrics_file": "none.tsv"}, [], "sagemaker_metrics_file none.tsv cannot be read"


@pytest.mark.parametrize(
    ("changes", "words", "sentence"), [case[1:] for case in mistakes()], ids=[case[0] for case in mistakes()]
)
def test_a_mistake_gets_one_sentence_and_nothing_is_uploaded(changes, words, sentence, launcher, cloud, monkeypatch):
    s3 = cloud.session.client("s3")
    if not any(bucket["Name"] == "far" for bucket in s3.list_buckets()["Buckets"]):
        s3.create_bucket(Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    sent = len(cloud.requests)
    monkeypatch.setattr(
        "sagemaker.core.helper.session_helper.Session.upload_data", lambda *_, **__: pytest.fail("uploads")
    )
    with pytest.raises(UserError, match=sentence):
        launcher("--yes", UNET, "--config", "flowers", *words, **changes)
    assert len(cloud.requests) == sent


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("/tmp/mine.py", "is not a script in"),
        (str(SCRIPTS / "none.py"), "does not exist"),
        (None, "no training script"),
    ],
)
def test_only_scripts_of_the_suite_are_sent(script, sentence, launcher):
    with pytest.raises(UserError, match=sentence):
        launcher("--yes", *([script] if script else []))


@contextlib.contextmanager
def answering(code, *names):
    """AWS answers the calls `names` with this error."""
    real = botocore.client.BaseClient._make_api_call

    def call(client, name, arguments):
        if name in names:
            raise ClientError(
                {"Error": {"Code": code, "Message": "words"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, name
            )
        return real(client, name, arguments)

    with mock.patch.object(botocore.client.BaseClient, "_make_api_call", call):
        yield


ROLE = "arn:aws:iam::123456789012:role"


@pytest.mark.parametrize(
    ("written", "denied", "role", "sentence"),
    [
        ("runner", False, f"{ROLE}/service-role/runner", None),  # AWS knows its path
        ("service-role/runner", False, f"{ROLE}/service-role/runner", None),
        (f"{ROLE}/service-role/runner", False, f"{ROLE}/service-role/runner", None),
        (f"{ROLE}/service-role/runner", True, f"{ROLE}/service-role/runner", None),
        (
            "runner",
            True,
            None,
            r"the ARN of the role runner is unknown: you may not look it up \(iam:GetRole\); give it in",
        ),
        ("service-role/runner", True, None, "the ARN of the role service-role/runner is unknown"),
        (
            f"{ROLE}/runner",
            False,
            None,
            f"the role runner has the ARN {ROLE}/service-role/runner, and iam_role_name says {ROLE}/runner",
        ),
        (
            "arn:aws:iam::999999999999:role/sagemaker",
            False,
            None,
            "is of account 999999999999, and the job goes to 123456789012",
        ),
        ("arn:aws-cn:iam::123456789012:role/sagemaker", False, None, "is of partition aws-cn, and the job goes to aws"),
        ("arn:aws:sts::123456789012:assumed-role/x/y", False, None, "is neither a role's name nor its ARN"),
        ("my role", False, None, "'my role' is neither a role's name nor its ARN"),
    ],
)
def test_a_role_is_what_the_yaml_says_or_refused(written, denied, role, sentence, cloud):
    iam = cloud.session.client("iam")
    if not any(known["RoleName"] == "runner" for known in iam.list_roles()["Roles"]):
        iam.create_role(RoleName="runner", Path="/service-role/", AssumeRolePolicyDocument="{}")
    settings = sagemaker_job.checked(
        sagemaker_job.SageMakerConfig, BASE | {"additional_args": {}, "iam_role_name": written}, "test"
    )
    there = aws_account.Account(cloud.session, number="123456789012")
    with answering("AccessDenied", "GetRole") if denied else contextlib.nullcontext():
        if sentence is None or sentence.startswith(("the role", "the ARN", "is of")):
            assert aws_account.find_role(settings, there) == (
                role or f"{ROLE}/{written}" if "arn:" not in written else written
            )
            assert there.missing == [] if sentence is None else re.search(sentence, there.missing[0])
        else:
            with pytest.raises(UserError, match=sentence):
                aws_account.find_role(settings, there)


def aws_faults():
    made = botocore.exceptions
    yield made.ProfileNotFound(profile="work"), "the AWS profile work (the YAML's profile) is not in ~/.aws/config"
    yield made.ConfigParseError(path="/x/config", error=""), "/x/config cannot be read as AWS's settings"
    yield made.NoCredentialsError(), "no AWS credentials: run aws configure"
    yield (
        made.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
        "AWS_SECRET_ACCESS_KEY is missing (env)",
    )
    yield made.TokenRetrievalError(provider="sso", error_msg="Token has expired"), "run aws sso login"
    yield made.SSOTokenLoadError(error_msg="no token"), "run aws sso login"
    yield made.UnauthorizedSSOTokenError(), "run aws sso login"
    yield made.LoginRefreshRequired(), "run aws login"
    yield (
        made.CredentialRetrievalError(provider="custom-process", error_msg="x"),
        "correct their command or file in ~/.aws/config",
    )
    yield made.EndpointConnectionError(endpoint_url="https://sts"), "AWS cannot be reached"
    yield made.ReadTimeoutError(endpoint_url="https://sts"), "AWS cannot be reached"
    yield made.ConnectTimeoutError(endpoint_url="https://sts"), "AWS cannot be reached"
    yield made.ProxyConnectionError(proxy_url="http://p:1"), "the proxy to AWS does not answer"
    yield made.SSLError(endpoint_url="https://sts", error="self-signed"), "AWS_CA_BUNDLE"
    yield made.NoRegionError(), "set region in the YAML"
    yield made.InvalidRegionError(region_name="a b"), "set region in the YAML"
    yield made.InfiniteLoopConfigError(source_profile="a", visited_profiles=["a"]), "correct ~/.aws/config"
    yield EOFError(), "asks for a code (mfa_serial)"
    yield ValueError("Invalid endpoint: x"), "correct AWS_ENDPOINT_URL"
    for code, words in (
        ("ExpiredToken", "have expired"), ("InvalidClientTokenId", "does not accept the credentials"),
        ("SignatureDoesNotMatch", "does not accept the credentials"), ("AccessDenied", "administrator to allow GetRole"),
        ("RequestTimeTooSkewed", "clock is wrong"), ("ThrottlingException", "launch again in a minute"),
        ("ResourceLimitExceeded", "Service Quotas"), ("ValidationException", "AWS refuses the request"),
    ):  # fmt: skip
        yield ClientError({"Error": {"Code": code, "Message": "words"}}, "GetRole"), words


@pytest.mark.parametrize(("error", "words"), aws_faults(), ids=lambda value: type(value).__name__)
def test_whatever_aws_raises_becomes_one_sentence(error, words, monkeypatch):
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with pytest.raises(UserError) as told, aws_account.in_words("begin: ", "; end"):
        raise error
    text = str(told.value)
    assert text.startswith("begin: ")
    assert words in text
    assert text.endswith("; end")
    assert "\n" not in text
    assert len(text) < 450


def test_a_profile_that_is_none_ends_every_way_in(launcher, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_PROFILE", "work")
    for words in (("--dry_run", UNET, "--config", "flowers"), ("--fetch", "job", "--output_dir", tmp_path / "home")):
        for changes in ({}, {"region": None}):
            with pytest.raises(UserError, match=r"the AWS profile work \(AWS_PROFILE\) is not in"):
                launcher(*words, **changes)


def test_the_region_and_whose_prices(monkeypatch, tmp_path):
    (tmp_path / "config").write_text("[profile far]\nregion = ap-south-1\n[profile plain]\noutput = json\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    command = sagemaker_job.read_command([UNET, "--config", "flowers"])
    for yaml_region, variables, profile, region, source in (
        ("eu-west-1", {"AWS_REGION": "eu-central-1"}, "far", "eu-west-1", "region in the YAML"),
        ("", {"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-west-3"}, "far", "eu-central-1", "by AWS_REGION"),
        ("", {"AWS_DEFAULT_REGION": "eu-west-3"}, "far", "eu-west-3", "by AWS_DEFAULT_REGION"),
        ("", {}, "far", "ap-south-1", "from the profile far"),
        ("", {}, "plain", "us-east-1", "the default"),
    ):
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, variables.get(name, ""))
        changes = {"additional_args": {}, "region": yaml_region, "profile": profile}
        settings = sagemaker_job.checked(sagemaker_job.SageMakerConfig, BASE | changes, "test")
        aws_account.find_region(settings)
        assert (settings.region, settings.region_from) == (region, source)
        prices = costs.read_prices()
        found = costs.report(costs.estimate(command, settings, ZERO2, prices, 6400, 100.0), command, settings, prices)
        for line in (line for line in found if "USD" in line):
            assert region == "us-east-1" or ("us-east-1" in line and region in line), line
    monkeypatch.setenv("AWS_REGION", "Frankfurt")
    settings.region = ""
    with pytest.raises(UserError, match=r"'Frankfurt' \(by AWS_REGION\) is not an AWS region"):
        aws_account.find_region(settings)


ACCELERATE = {  # as `accelerate config` 1.15 writes it
    "compute_environment": "AMAZON_SAGEMAKER", "debug": False, "distributed_type": "NO", "ec2_instance_type": "ml.g4dn.xlarge",
    "iam_role_name": "sagemaker", "base_job_name": "accelerate-sagemaker-1", "image_uri": None, "mixed_precision": "fp16",
    "num_machines": 1, "profile": None, "py_version": "py38", "pytorch_version": "1.10.2", "region": "us-east-1",
    "sagemaker_inputs_file": None, "sagemaker_metrics_file": None, "transformers_version": "4.17.0", "use_cpu": False,
    "additional_args": None, "dynamo_config": None, "enable_cpu_affinity": False, "gpu_ids": "all",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"distributed_type": "DATA_PARALLEL"}, {"py_version": "py312"}, {"pytorch_version": "2.9.0", "py_version": "py312"},
        {"transformers_version": None, "py_version": "py312"},
        {"transformers_version": None, "py_version": "py312", "pytorch_version": "9.9"},
    ],
)  # fmt: skip
def test_one_round_of_advice_makes_accelerates_yaml_work(changes, tmp_path, cloud):
    from sagemaker.core import image_uris

    file, values = tmp_path / "default_config.yaml", ACCELERATE | changes

    def image():
        file.write_text(yaml.safe_dump(values))
        settings = sagemaker_job.read_config(file)
        aws_account.find_region(settings)
        return aws_account.find_image(image_uris, settings)

    with pytest.raises(UserError) as told:
        image()
    text = str(told.value)
    for key, value in re.findall(r"set (\w+): '?([\w.]+)", text):
        values[key] = value
    for key in re.findall(r"delete (\w+)", text):
        del values[key]
    assert "pytorch-training:2.9.0-gpu-py312" in image()


@pytest.mark.parametrize(
    ("machine", "own", "inner", "said"),
    [
        ("ml.g4dn.xlarge", "bf16", {}, "ml.g4dn.xlarge have no bf16 units, .* set mixed_precision: fp16$"),
        (
            "ml.p3.2xlarge",
            None,
            {"mixed_precision": "bf16"},
            "set mixed_precision: fp16 in the YAML that submits the job$",
        ),
        ("ml.g4dn.xlarge", "fp16", {"mixed_precision": "bf16"}, "^$"),
        ("ml.g5.xlarge", "bf16", {}, "^$"),
    ],
)
def test_bf16_is_noted_where_gpus_have_no_units_for_it(machine, own, inner, said):
    assert re.search(said, precision_note(machine, own, inner))


@pytest.mark.parametrize(
    ("machine", "own", "inner", "refused"),
    [
        ("ml.m5.xlarge", "fp16", {}, True), ("ml.m5.xlarge", None, ZERO2, True), ("ml.c7i.large", "fp16", {}, True),
        ("ml.m5.xlarge", "no", ZERO2, False), ("ml.m5.xlarge", "bf16", {}, False), ("ml.g6e.xlarge", "fp16", {}, False),
        ("ml.p5en.48xlarge", None, ZERO2, False), ("ml.gr6.4xlarge", "fp16", {}, False),
    ],
)  # fmt: skip
def test_fp16_needs_a_gpu(machine, own, inner, refused):
    settings = sagemaker_job.SageMakerConfig("AMAZON_SAGEMAKER", machine, mixed_precision=own)
    with (
        pytest.raises(UserError, match=f"needs a GPU, and {machine} has none") if refused else contextlib.nullcontext()
    ):
        sagemaker_job.check_precision(settings, sagemaker_job.ROOT / "x.yaml", inner)


def test_what_the_hub_would_refuse_at_the_end_is_refused_before_the_job(launcher):
    words = ("--dry_run", UNET, "--config", "flowers", "--push_to_hub")
    with pytest.raises(UserError, match="--hub_model_id is missing"):
        launcher(*words)
    with pytest.raises(UserError, match=r"'CC-BY-4.0' is not one of the Hub's licences; did you mean cc-by-4.0\?"):
        launcher(*words, "--hub_model_id", "me/flowers", "--license", "CC-BY-4.0")


def test_a_machine_without_a_gpu_can_have_a_price(tmp_path):
    text = (
        costs.PRICES.read_text()
        + "  ml.m5.xlarge: {usd_per_hour: 0.23, gpus: 0, fp16_tflops: 1, fp32_tflops: 1, network_gbps: 1}\n"
    )
    (tmp_path / "prices.yaml").write_text(text)
    prices, command = (
        costs.read_prices(tmp_path / "prices.yaml"),
        sagemaker_job.read_command([UNET, "--config", "flowers"]),
    )
    settings = sagemaker_job.SageMakerConfig("AMAZON_SAGEMAKER", "ml.m5.xlarge", num_machines=2, mixed_precision="no")
    found = costs.estimate(command, settings, {}, prices, 6400, 10.0)
    assert (found.global_batch, found.usd_per_hour) == (64, 0.46)


def test_wrong_arguments_end_before_anything_is_sent(launcher, cloud, capsys):
    sent = len(cloud.requests)
    with pytest.raises(SystemExit) as error:
        launcher("--yes", UNET, "--config", "flowers", "--learning_rat", "1")
    assert error.value.code == 2
    assert "learning_rate" in capsys.readouterr().err
    with pytest.raises(UserError, match="learning_rate = -1"):
        launcher("--yes", UNET, "--config", "flowers", "--learning_rate=-1")
    with pytest.raises(UserError, match="no terminal is attached to confirm; add --yes"):
        launcher(UNET, "--config", "flowers")
    assert len(cloud.requests) == sent


def test_no_credentials(tmp_path, environment):
    """As users type it: exit code 2 and a sentence; a dry run shows the request all the same."""
    kept = {key: value for key, value in environment.items() if not key.startswith("AWS")}
    kept |= {"AWS_EC2_METADATA_DISABLED": "true"}
    words = [sys.executable, str(SCRIPTS / "launch_sagemaker.py"), UNET, "--config", "flowers"]
    done = subprocess.run(words, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no AWS credentials: run aws configure")
    assert "Traceback" not in done.stderr
    words[2:2] = ["--dry_run", "--train_images", "6811"]
    done = subprocess.run(words, cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    request = json.loads(done.stdout)
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert "MISSING: no AWS credentials" in done.stderr
    assert "15,964 updates of 64 samples = 150.0 epochs of 6,811 images" in done.stderr
    assert "USD on demand" in done.stderr


def test_credentials_travel_through_secrets_manager_alone(launcher, cloud, monkeypatch, capsys):
    canary = "canary-5f1c"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{canary}@mlflow.example.org/x")
    monkeypatch.setenv("HF_TOKEN", f"hf_{canary}")
    told = launcher("--yes", UNET, "--config", "flowers", base_job_name="secret")
    request = cloud.requests[-1]
    name = request["Environment"].pop("T2I_SECRETS")
    assert name.startswith("t2i/secret-")
    assert request["Environment"] == {"MLFLOW_TRACKING_URI": "https://mlflow.example.org/x"}
    assert canary not in json.dumps(request) + told + "".join(capsys.readouterr())
    s3 = cloud.session.client("s3")
    bucket = request["OutputDataConfig"]["S3OutputPath"].split("/")[2]
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="secret/"):
        for item in page["Contents"]:
            assert canary.encode() not in s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
    monkeypatch.setenv("HF_TOKEN", "hf_another-one")  # a later launch leaves an earlier job's credentials as they are
    launcher("--yes", UNET, "--config", "flowers", base_job_name="secret")
    assert cloud.requests[-1]["Environment"]["T2I_SECRETS"] != name
    monkeypatch.setenv("T2I_SECRETS", name)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    inside = run_sagemaker_job.make_environment("eth0", 2)
    assert (inside["MLFLOW_TRACKING_PASSWORD"], inside["HF_TOKEN"]) == (canary, f"hf_{canary}")
    assert canary not in capsys.readouterr().out
    assert inside["NCCL_SOCKET_IFNAME"] == "eth0"


def test_a_role_that_may_not_read_the_secret_says_so(cloud, tmp_path, monkeypatch):
    """The first thing that such a job does in its container."""
    real = botocore.client.BaseClient._make_api_call

    def denied(client, name, arguments):
        if name == "GetSecretValue" and arguments["SecretId"] == "t2i/mine-1":
            raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": "not authorized"}}, name)
        return real(client, name, arguments)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", denied)
    cloud.session.client("secretsmanager").create_secret(Name="t2i/odd", SecretString="hf_no-json")
    for name in ("scripts", "output"):
        (tmp_path / name).mkdir()
    (tmp_path / "job.json").write_text('{"machines": 1}')
    resources = {"hosts": ["localhost"], "current_host": "localhost", "network_interface_name": "lo"}
    (tmp_path / "resources.json").write_text(json.dumps(resources))
    for name, path in (("ROOT", "."), ("CONFIG", "resources.json"), ("FAILURE", "output/failure")):
        monkeypatch.setattr(run_sagemaker_job, name, tmp_path / path)
    monkeypatch.setattr(sys, "argv", ["run_sagemaker_job.py"])
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for secret, sentence in (
        ("t2i/mine-1", "the secret t2i/mine-1 cannot be read .*; allow the role secretsmanager:GetSecretValue, .*HF_TOKEN"),
        ("t2i/odd", "the secret t2i/odd holds no JSON object; write it as"),
    ):  # fmt: skip
        monkeypatch.setenv("T2I_SECRETS", secret)
        assert run_sagemaker_job.main() == 1
        assert re.match(sentence, (tmp_path / "output/failure").read_text())


def test_a_private_data_set_needs_a_token_that_travels(launcher, cloud, monkeypatch, tmp_path):
    """The token of hf auth login stays here, so what it may read, the job may not."""
    words = ("--yes", "--train_images", 10, UNET, "--dataset", "me/photos")
    assert "the Hub does not answer now, so nobody checked whether the job can read --dataset me/photos" in launcher(
        *words
    )
    with LoopbackHub() as hub:
        hub.create("datasets/me/photos")
        (tmp_path / "token").write_text(hub.token)
        for name, value in (
            ("ENDPOINT", hub.url),
            ("HF_HUB_OFFLINE", False),
            ("HF_TOKEN_PATH", str(tmp_path / "token")),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        with pytest.raises(
            UserError,
            match="the Hub does not show me/photos to a job without a token; correct the name, or export HF_TOKEN",
        ):
            launcher(*words)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        assert "nobody checked" not in launcher(*words)


def test_a_job_without_a_network_gets_no_secrets(launcher, cloud, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary-6a2e")
    extra = {"enable_network_isolation": True}
    words = (UNET, "--dataset", "s3://photos/flowers")
    told = launcher("--yes", *words, image_uri="mine:1", additional_args=extra)
    assert "T2I_SECRETS" not in cloud.requests[-1].get("Environment", {})
    assert "the job gets no HF_TOKEN, since it has no network (enable_network_isolation)" in told
    with pytest.raises(UserError, match="cannot read a secret; remove T2I_SECRETS from environment"):
        launcher("--yes", *words, image_uri="mine:1", additional_args=extra | {"environment": {"T2I_SECRETS": "mine"}})


def test_following_a_job(launcher, cloud, monkeypatch, tmp_path):
    """--wait shows the log and ends with the job; Ctrl-C leaves it running."""
    launcher("--yes", UNET, "--config", "flowers", base_job_name="followed")
    request = cloud.requests[-1]
    job, logs = request["TrainingJobName"], cloud.session.client("logs")
    settings = sagemaker_job.checked(sagemaker_job.SageMakerConfig, BASE | {"additional_args": {}}, "test")
    monkeypatch.setattr("time.sleep", mock.Mock(side_effect=KeyboardInterrupt))
    known = backend()
    known.training_jobs[job].training_job_status = "InProgress"
    with pytest.raises(SystemExit) as error:
        launch_sagemaker.follow(job, settings, cloud.session)
    assert error.value.code == 130
    assert known.training_jobs[job].training_job_status == "InProgress"
    logs.create_log_group(logGroupName=launch_sagemaker.LOGS)
    stream = f"{job}/algo-1-1732000000"
    logs.create_log_stream(logGroupName=launch_sagemaker.LOGS, logStreamName=stream)
    now = int(__import__("time").time() * 1000)
    for message in ("step 10: train_loss=0.5", "step 20: train_loss=0.4"):
        logs.put_log_events(
            logGroupName=launch_sagemaker.LOGS, logStreamName=stream, logEvents=[{"timestamp": now, "message": message}]
        )
    seen, sent = {}, []
    logs.meta.events.register(
        "provide-client-params.cloudwatch-logs.GetLogEvents", lambda params, **_: sent.append(params)
    )
    assert launch_sagemaker.new_lines(logs, job, seen) == [
        "algo-1: step 10: train_loss=0.5",
        "algo-1: step 20: train_loss=0.4",
    ]
    assert launch_sagemaker.new_lines(logs, job, seen) == []
    assert [(params["startFromHead"], "nextToken" in params) for params in sent] == [
        (True, False),
        (True, True),
        (True, True),
    ]
    finish_in_moto(request)
    launch_sagemaker.follow(job, settings, cloud.session)
    known.training_jobs[job].training_job_status = "Failed"
    home = tmp_path / "home"
    with pytest.raises(UserError, match=f"{job} ended as Failed: .*; a new job resumes from its checkpoints with"):
        launcher("--fetch", job, "--wait", "--output_dir", home)
    assert json.loads((home / "sagemaker.json").read_text())["TrainingJobStatus"] == "Failed"


def test_an_mlflow_address_with_odd_letters(monkeypatch):
    settings = sagemaker_job.checked(sagemaker_job.SageMakerConfig, BASE | {"additional_args": {}}, "test")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://us%40er:p%40ss@mlflow.example.org")
    assert aws_account.secrets_here(settings) == {
        "MLFLOW_TRACKING_USERNAME": "us@er",
        "MLFLOW_TRACKING_PASSWORD": "p@ss",
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert launch_sagemaker.environment(settings, None) == {}  # the container's 127.0.0.1 is another


@pytest.mark.parametrize(
    ("shell", "named", "sent", "said"),
    [
        ("", None, None, "is not set, so no MLflow server follows the job"),
        ("http://127.0.0.1:5000", None, None, "names a server on this machine, which the job cannot reach"),
        ("http://me:pw@0.0.0.0:5000", None, None, "names a server on this machine"),
        ("http://[::1]:5000", None, None, "names a server on this machine"),
        ("sqlite:///mlflow.db", None, None, "names a SQLite file on this machine"),
        ("postgresql://me:pw@db/x", None, None, r"is not sent, since it names no http\(s\) server \(postgresql\)"),
        ("  HTTPS://me:p%2Fw@h.org/x", None, "https://h.org/x", ""),
        ("https://me:p/w@h.org/x", "https://other.org", "https://other.org", ""),
        ("https://me:pw@h.org/x", " HTTPS://h.org/y", "https://h.org/y", ""),
        ("https://h.org", "sqlite:////opt/ml/m.db", "sqlite:////opt/ml/m.db", "of the YAML names no server"),
    ],
)
def test_the_job_gets_an_mlflow_address_that_it_can_reach(monkeypatch, shell, named, sent, said):
    extra = {"environment": {} if named is None else {"MLFLOW_TRACKING_URI": named}}
    settings = sagemaker_job.checked(sagemaker_job.SageMakerConfig, BASE | {"additional_args": extra}, "test")
    for name in SECRET_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shell)
    assert launch_sagemaker.environment(settings, None).get("MLFLOW_TRACKING_URI") == sent
    assert re.search(said, sagemaker_job.tracking_server(settings)[1])
    assert bool(sagemaker_job.tracking_server(settings)[1]) == bool(said)
    travels = (
        {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} if "h.org" in (sent or "") and "@" in shell else set()
    )
    assert set(aws_account.secrets_here(settings)) == travels


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("compute_environment: amazon_sagemaker", "compute_environment is amazon_sagemaker; write AMAZON_SAGEMAKER"),
        ("py_version: '3.12'", "py_version 3.12 is not spelled as SageMaker's images spell it; write py312"),
        ("py_version: 3.12", "write py312"),
        ("py_version: python3.11", "write py311"),
        (
            "distributed_type: NO",
            "distributed_type = False is not usable: YAML reads NO as false; write 'NO' in quotes",
        ),
        (
            "distributed_type: MULTI_GPU",
            "has distributed_type MULTI_GPU, which these scripts cannot use; .* 'NO'",
        ),
        ("distributed_type: DATA_PARALLEL", "DATA_PARALLEL, a library of SageMaker's own, which these"),
        ("mixed_precision: no", "mixed_precision = False is not usable: YAML reads no as false; write 'no' in quotes"),
        ("mixed_precision: fp8", "mixed_precision = 'fp8' is not usable: give 'no', 'fp16' or 'bf16'"),
        ("pytorch_version: 2.9", "pytorch_version = 2.9 is not usable: it is not text; put it in quotes"),
        ("ec2_instance_type: g4dn.xlarge", "'g4dn.xlarge' is not usable: give one such as ml.g4dn.xlarge"),
        ("num_machines: true", "num_machines = True is not usable: give a number"),
        ("num_machines: two", "num_machines = 'two' is not usable: give a whole number"),
        ("additional_args: {max_run: 10h}", "max_run = '10h' is not usable: give a whole number, without a unit"),
        ("additional_args: {tags: a}", "tags = 'a' is not usable: give keys and values, such as {name: value}"),
        ("additional_args: {environment: {A: [1]}}", r"environment.A = \['1'\] is not usable: it is not text"),
        ("additional_args: {environment: {A: }}", "environment.A = None is not usable: it is empty; give a value"),
    ],
)
def test_a_wrong_value_in_the_yaml_gets_the_right_one(tmp_path, line, sentence):
    known = {key: value for key, value in BASE.items() if key != line.partition(":")[0]}
    (tmp_path / "a.yaml").write_text(f"{yaml.safe_dump(known)}{line}\n")
    with pytest.raises(UserError, match=f"a.yaml.*{sentence}"):
        sagemaker_job.read_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a.yaml is empty; give keys such as compute_environment"),
        ("[]", r"a.yaml must hold keys and values, not '\[\]'; write key: value"),
        (
            "region: us-east-1\nadditional_args:\n  max_run: 1\n  max_run: 2\n",
            "a.yaml, line 4: key max_run stands in line 3",
        ),
        ("region: us-east-1\nregion: us-west-2\n", "a.yaml, line 2: key region stands in line 1 already; delete one"),
    ],
)
def test_a_yaml_that_says_nothing_or_two_things(tmp_path, text, sentence):
    (tmp_path / "a.yaml").write_text(text)
    for read in (sagemaker_job.read_config, sagemaker_job.read_inside):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("mlflow.example.org:5000", "a.yaml: MLFLOW_TRACKING_URI in environment=.* lacks http://; give http://mlflow"),
        ("https://me:canary-77aa", "MLFLOW_TRACKING_URI in environment has no valid port"),
        ("http://localhost:5000", "is http://localhost:5000, which means the job's own machine inside the job"),
        ("http://127.0.1.1:5000", "give the server's address on the network"),
    ],
)
def test_an_mlflow_address_in_the_yaml_that_no_job_can_use(tmp_path, monkeypatch, uri, sentence):
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(BASE | {"additional_args": {"environment": {"MLFLOW_TRACKING_URI": uri}}}))
    with pytest.raises(UserError, match=sentence) as error:
        sagemaker_job.read_config(file)
    assert "canary" not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("http://", "ftp://"))  # and in the shell
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        sagemaker_job.tracking_server(
            sagemaker_job.checked(sagemaker_job.SageMakerConfig, BASE | {"additional_args": {}}, "test")
        )


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        ("caption_to_hub.py", ["--dataset", "a/b"], "two machines do not share; set num_machines: 1"),
        ("make_flowers.py", [], "runs on your own machine; scripts for SageMaker are train_unet.py"),
    ],
)
def test_what_cannot_run_there_is_refused(script, words, sentence, launcher):
    with pytest.raises(UserError, match=sentence):
        launcher("--yes", SCRIPTS / script, *words)


def test_the_yaml_inside_is_checked(tmp_path, launcher):
    for text, sentence in (
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}", "zero_stage: 2"),
        ("compute_environment: AMAZON_SAGEMAKER", "describes a cloud"),
    ):
        (tmp_path / "inside.yaml").write_text(text)
        with pytest.raises(UserError, match=sentence):
            launcher("--yes", "--inside", tmp_path / "inside.yaml", UNET, "--config", "flowers")


def test_a_script_gets_only_options_that_it_has(tmp_path):
    (tmp_path / "text").mkdir()
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"dataset": "a/b"}, "unet": {"text_encoder": str(tmp_path / "text")}}))
    settings = sagemaker_job.checked(sagemaker_job.SageMakerConfig, BASE | {"additional_args": {}}, "test")
    for script, sent in (("train_vae.py", {}), ("train_unet.py", {"text_encoder": str(tmp_path / "text")})):
        command = sagemaker_job.read_command([str(SCRIPTS / script), "--config", str(recipe)])
        assert sagemaker_job.local_inputs(command, settings) == sent
    (tmp_path / "inputs.tsv").write_text("channel\tdata\ncaptioner\ts3://b/c\nmy-data\ts3://b/d\n")
    settings.sagemaker_inputs_file = str(tmp_path / "inputs.tsv")
    with pytest.raises(UserError, match="'my-data' is not a valid channel name"):
        sagemaker_job.local_inputs(command, settings)
    assert "--captioner" not in sagemaker_job.container_arguments(command, {"captioner": "s3://b/c"})


def test_one_captioner_s_folder_is_sent_in_place_of_the_one_that_was_typed(tmp_path):
    (tmp_path / "florence").mkdir()
    script, folder = str(SCRIPTS / "caption_to_hub.py"), str(tmp_path / "florence")
    settings = sagemaker_job.checked(sagemaker_job.SageMakerConfig, BASE | {"additional_args": {}}, "test")
    words = [script, "--dataset", "a/b", f"--captioner={folder}", "--task", "<CAPTION>", "<OD>"]
    command = sagemaker_job.read_command(words)
    inputs = sagemaker_job.local_inputs(command, dataclasses.replace(settings, num_machines=1))
    assert inputs == {"captioner": folder}
    sent = sagemaker_job.container_arguments(command, inputs)
    parsed = config.parse(SECTIONS["caption_to_hub.py"], "", sent).caption
    assert (parsed.captioner, parsed.task) == (["/opt/ml/input/data/captioner"], ["<CAPTION>", "<OD>"])
    command = sagemaker_job.read_command([script, "--dataset", "a/b", "--captioner", "label", "x/y"])
    assert command.folder_options()["captioner"] == "x/y"
    with pytest.raises(UserError, match="is a folder beside other captioners"):
        sagemaker_job.read_command([*words, "--captioner", "label"]).folder_options()


def test_a_stop_reaches_the_training_whatever_else_is_there(tmp_path):
    """A process that has ended and waits to be taken leave of (a zombie) does not keep SIGTERM from the training."""
    trains = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    (tmp_path / "train_unet.py").write_text(trains)
    launcher = "import subprocess, sys; zombie = subprocess.Popen(['true']); import time; time.sleep(0.5);"
    launcher += f"sys.exit(subprocess.run([sys.executable, {str(tmp_path / 'train_unet.py')!r}]).returncode)"
    entry = "import sys; sys.path.append(sys.argv[1]); import run_sagemaker_job as job\n"
    entry += "sys.exit(job.run([sys.executable, '-c', sys.argv[2]], {}, 'train_unet.py', first=False))"
    words = [sys.executable, "-u", "-c", entry, str(SCRIPTS), launcher]
    with mock.patch.object(run_sagemaker_job, "ROOT", tmp_path):
        done = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout.readline() == "ready\n"
    done.terminate()
    told = done.communicate(timeout=20)[0]
    assert done.returncode == 75, told
    assert "interrupted: the checkpoint is saved" in told


def test_a_job_is_stopped_followed_and_fetched(tmp_path, launcher, cloud, monkeypatch):
    launcher("--yes", UNET, "--config", "flowers", base_job_name="stopped")
    request = cloud.requests[-1]
    job = request["TrainingJobName"]
    record = backend().training_jobs[job]
    record.training_job_status = "InProgress"
    wrong = {"num_machine": 2, "py_version": "py38", "additional_args": {"environment": {"HF_TOKEN": "x"}}}
    assert f"{job} is being stopped; it saves a checkpoint first" in launcher("--stop", job, **wrong)
    assert record.training_job_status == "Stopping"

    def end(_):
        finish_in_moto(request)
        record.training_job_status = "Completed"

    monkeypatch.setattr("time.sleep", end)
    told = launcher("--fetch", job, "--wait", "--output_dir", tmp_path / "home", **wrong)
    assert re.search(r"\] Stopping, .*\n\[0 min\] Completed", told)
    assert json.loads((tmp_path / "home/sagemaker.json").read_text())["TrainingJobStatus"] == "Completed"
    for words, verb in (
        (("--stop", "nobodys-job"), "stopped"),
        (("--fetch", "nobodys-job", "--wait", "--output_dir", tmp_path / "other"), "followed"),
    ):
        with pytest.raises(
            UserError, match=rf"nobodys-job cannot be {verb}: .*; check its name and the region us-east-1"
        ):
            launcher(*words)
    with pytest.raises(UserError, match="profile"):
        launcher("--stop", job, profile="nope")


def test_fetching_what_there_is(tmp_path, launcher, cloud):
    launcher("--yes", UNET, "--config", "flowers", base_job_name="fetched")
    request = cloud.requests[-1]
    job, home = request["TrainingJobName"], tmp_path / "home"
    record = backend().training_jobs[job]
    for status in ("InProgress", "Stopping"):
        record.training_job_status = status
        with pytest.raises(UserError, match="still running"):
            launcher("--fetch", job, "--output_dir", home)
    finish_in_moto(request)
    record.training_job_status, record.failure_reason = "Stopped", "somebody stopped it"
    bucket, _, prefix = request["CheckpointConfig"]["S3Uri"].removeprefix("s3://").partition("/")
    s3 = cloud.session.client("s3")
    for name in ("run.json", "checkpoint-000001/manifest.json", "node-1/x", ".lock", "samples/a.png"):
        s3.put_object(Bucket=bucket, Key=f"{prefix}/run/{name}", Body=b"{}")
    told = launcher("--fetch", job, "--output_dir", home)  # its model.tar.gz was never written
    assert "no model" in told
    assert "checkpoint_s3_uri: s3://" in told
    assert {path.name for path in home.iterdir()} == {"run.json", "samples", "sagemaker.json"}
    with pytest.raises(UserError, match="exists already"):
        launcher("--fetch", job, "--output_dir", home)
    with pytest.raises(UserError, match="cannot be fetched"):
        launcher("--fetch", "nobodys-job", "--output_dir", tmp_path / "other")
    with pytest.raises(UserError, match="profile"):
        launcher("--fetch", job, "--output_dir", tmp_path / "other", profile="nope")


def test_a_finished_run_of_a_failed_job_comes_home_with_its_model(tmp_path, launcher, cloud):
    """Its push to the Hub failed, so SageMaker made no archive of its model."""
    launcher("--yes", UNET, "--config", "flowers", base_job_name="unpushed")
    request = cloud.requests[-1]
    job = request["TrainingJobName"]
    finish_in_moto(request)
    backend().training_jobs[job].training_job_status = "Failed"
    bucket, _, prefix = request["CheckpointConfig"]["S3Uri"].removeprefix("s3://").partition("/")
    s3 = cloud.session.client("s3")
    for name in ("pipeline/model_index.json", "vae/config.json"):
        s3.put_object(Bucket=bucket, Key=f"{prefix}/run/{name}", Body=b"{}")
    for status, told in (("unfinished", "no model"), ("finished", "pipeline, vae")):
        s3.put_object(Bucket=bucket, Key=f"{prefix}/run/run.json", Body=json.dumps({"status": status}).encode())
        assert told in launcher("--fetch", job, "--output_dir", tmp_path / status)
    assert (tmp_path / "finished/pipeline/model_index.json").is_file()
    place = f"s3://{bucket}/{prefix}"
    (tmp_path / "archive/pipeline").mkdir(parents=True)  # a model that the archive brought is not mixed with another
    launch_sagemaker.fetch_run(s3, place, tmp_path / "archive")
    assert not list((tmp_path / "archive/pipeline").iterdir())
    assert (tmp_path / "archive/vae/config.json").is_file()


def test_captions_made_twice_come_home_once(tmp_path, cloud):
    s3 = cloud.session.client("s3")
    now, later = (f"data/{{}}-{{:05d}}-of-{count:05d}.parquet" for count in (2, 3))
    names = [now.format(split, number) for split in ("train", "test") for number in range(2)]
    names += [later.format("train", number) for number in range(3)] + [later.format("test", 0)]  # test is cut off
    from moto.s3.models import s3_backends

    stored = s3_backends["123456789012"]["aws"].buckets["photos"].keys
    for second, name in enumerate([*names, "data/mine.parquet"]):
        s3.put_object(Bucket="photos", Key=f"captioned/run/{name}", Body=b"x")
        stored[f"captioned/run/{name}"].last_modified = datetime.datetime(2026, 11, 30, 12, 0, second)
    launch_sagemaker.fetch_run(s3, "s3://photos/captioned", tmp_path)
    home = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.parquet")}
    assert home == {*(later.format("train", number) for number in range(3)),
                    *(now.format("test", number) for number in range(2)), "data/mine.parquet"}  # fmt: skip


@pytest.mark.parametrize("code", [0, 1])
def test_the_model_of_a_finished_run_is_left_also_if_its_push_failed(code, tmp_path, monkeypatch):
    """run_sagemaker_job.py around a command that stands for the launcher of a training."""
    run = tmp_path / "checkpoints/run"
    (run / "pipeline").mkdir(parents=True)
    (run / "pipeline/model_index.json").write_text("{}")
    (run / "run.json").write_text('{"status": "finished"}')
    for name, path in (("RUN", run), ("MODEL", tmp_path / "model"), ("FAILURE", tmp_path / "output/failure")):
        monkeypatch.setattr(run_sagemaker_job, name, path)
    words = [sys.executable, "-c", f"print('error: the push failed') if {code} else None; raise SystemExit({code})"]
    with kept_signals():
        assert run_sagemaker_job.run(words, dict(os.environ), "train_unet.py", first=True) == code
    assert (tmp_path / "model/pipeline/model_index.json").is_file()
    if code:
        assert (tmp_path / "output/failure").read_text() == "the push failed"
        (run / "run.json").write_text('{"status": "unfinished"}')
        shutil.rmtree(tmp_path / "model")
        with kept_signals():
            assert run_sagemaker_job.run(words, dict(os.environ), "train_unet.py", first=True) == code
        assert not (tmp_path / "model").exists()


@contextlib.contextmanager
def kept_signals():
    """Give SIGTERM and Ctrl-C back to pytest: a container's first process takes them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_machines_that_would_train_apart_are_stopped(monkeypatch):
    from t2i.training import distributed

    monkeypatch.setenv("T2I_WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="1 processes instead of 2: the machines would train apart"):
        distributed.make_accelerator(config.TrainUnetConfig())


def test_accelerate_itself_still_cannot(tmp_path, environment):
    """The day that this fails, upstream is mended (accelerate#3463): README and CONTRIBUTING have a sentence to change."""
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/sagemaker.yaml",
        UNET,
    ]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "num_processes" in done.stderr
    assert "unknown keys" in done.stderr


def test_the_estimate(launcher):
    command = sagemaker_job.read_command([UNET, "--config", "flowers"])
    settings = sagemaker_job.checked(
        sagemaker_job.SageMakerConfig, BASE | {"additional_args": {"max_run": 3600}}, "test"
    )
    prices = costs.read_prices()
    flops, weights = costs.unet_size(command.recipe)
    assert 147e6 < weights < 149e6
    found = costs.estimate(command, settings, ZERO2, prices, 6400, 100.0)
    assert (found.updates, found.epochs, found.global_batch) == (15000, 150.0, 64)  # 150 x 6,400 / 64
    assert found.hours == pytest.approx(960_000 / 100 / 3600 + prices.overhead_minutes / 60)
    assert found.usd == pytest.approx(found.hours * 2 * prices.instances["ml.g4dn.xlarge"].usd_per_hour)
    assert "max_run ends it after 1 h" in costs.too_long(found, settings)
    guessed = costs.estimate(command, settings, ZERO2, prices, 6400, None)
    compute = 32 * 3 * flops / (65e12 * prices.utilisation)
    assert guessed.samples_per_second == pytest.approx(64 / (compute + 2 * weights * 8 / 5e9))
    assert costs.estimate(
        command, settings, {"distributed_type": "MULTI_GPU"}, prices, 6400, None
    ).samples_per_second < (guessed.samples_per_second)  # float32 gradients are sent
    command.recipe.train_unet.gradient_accumulation_steps, command.recipe.train_unet.train_batch_size = 8, 4
    split = costs.estimate(command, settings, ZERO2, prices, 6400, None)
    assert split.samples_per_second == pytest.approx(64 / (compute + 9 * weights * 8 / 5e9))  # ZeRO-2 reduces each time
    single = dataclasses.replace(settings, mixed_precision="no", num_machines=1)
    assert costs.estimate(command, single, ZERO2, prices, 6400, None).samples_per_second == pytest.approx(
        8.1e12 * prices.utilisation / (3 * flops)
    )
    unknown = costs.estimate(
        command, dataclasses.replace(settings, ec2_instance_type="ml.p4d.24xlarge"), ZERO2, prices, 6400, None
    )
    assert (unknown.usd, unknown.updates, unknown.epochs) == (None, None, 150.0)


def test_rows_of_parquet_files_are_counted_without_a_copy(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "test/data").mkdir(parents=True)  # only the data set's own names tell splits

    def count(**shards):
        for name, rows in shards.items():
            table = pa.table({"image": [b"x"] * rows, "caption": ["a rose"] * rows})
            pq.write_table(table, tmp_path / f"test/data/{name}.parquet")
        data = config.DataConfig(dataset=str(tmp_path / "test"), validation_fraction=0.1)
        return costs.count_images(data)

    before = (tmp_path / "scratch").stat().st_mtime_ns
    assert count(all=20, more=10) == 27  # 10 % are for validation
    assert count(**{"train-00000-of-00002": 40, "train-00001-of-00002": 5}, val=9) == 45
    assert (tmp_path / "scratch").stat().st_mtime_ns == before
    (tmp_path / "test/data/val.parquet").write_bytes(b"PAR1 damaged")
    assert count() is None  # the estimate lacks a figure, and the launch goes on


def read_yaml_text(tmp_path, additional):
    (tmp_path / "s.yaml").write_text(
        f"compute_environment: AMAZON_SAGEMAKER\nec2_instance_type: ml.m5.xlarge\nadditional_args:\n{additional}"
    )
    return sagemaker_job.read_config(tmp_path / "s.yaml")


def test_the_arguments_of_sagemakers_estimator(launcher, cloud):
    extra = ON_DEMAND | {
        "volume_kms_key": "alias/disks", "output_kms_key": "arn:aws:kms:us-east-1:123456789012:key/1", "input_mode": "FastFile",
        "keep_alive_period_in_seconds": 600, "output_path": "s3://photos/models/",
        "tags": [{"Key": "cost-center", "Value": 42}],
    }  # fmt: skip
    words = (UNET, "--config", "flowers", "--dataset", "s3://photos/flowers")
    request = json.loads(launcher("--dry_run", *words, additional_args=extra))
    assert request["ResourceConfig"]["VolumeKmsKeyId"] == "alias/disks"
    assert request["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert request["OutputDataConfig"]["KmsKeyId"] == extra["output_kms_key"]
    assert request["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    assert request["Tags"] == [{"Key": "cost-center", "Value": "42"}]
    modes = {channel["ChannelName"]: channel.get("InputMode") for channel in request["InputDataConfig"]}
    assert modes == {"dataset": None, "code": "File", "sm_drivers": "File"}  # None: the job's
    uris = [channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in request["InputDataConfig"]]
    assert all(uri.startswith("s3://photos/") for uri in uris)  # no bucket but that of output_path


def test_a_bucket_of_ones_own_needs_no_right_to_make_one(tmp_path, launcher, cloud, monkeypatch):
    """What is uploaded goes below output_path; without one, the sentence says how to name it."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_bytes(b"not looked at")
    real = botocore.client.BaseClient._make_api_call

    def denied(client, name, arguments):
        if name in ("CreateBucket", "ListBuckets"):
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": f"may not {name}"}}, name)
        return real(client, name, arguments)

    config = sagemaker_job.SageMakerConfig("AMAZON_SAGEMAKER", "ml.g4dn.xlarge", region="eu-west-1")
    files = {"dataset": [tmp_path / "photos/1.jpg"]}
    found = aws_account.Account(cloud.session, bucket="photos", prefix="me", own_bucket=True, kms_key="alias/mine")
    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", denied)
    where = aws_account.upload({"dataset": str(tmp_path / "photos")}, files, {"dataset": "0123"}, found)
    assert where == {"dataset": "s3://photos/me/t2i-inputs/0123/"}
    head = cloud.session.client("s3").head_object(Bucket="photos", Key="me/t2i-inputs/0123/1.jpg")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/mine")
    with pytest.raises(UserError, match=r"may not CreateBucket.*output_path: s3://BUCKET/FOLDER in additional_args"):
        aws_account.upload(
            {}, {}, {}, aws_account.Account(boto3.Session(region_name="eu-west-2"), bucket=config.region)
        )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("  keep_alive_period_in_seconds: 7200", "less than or equal to|at most 3600"),
        ("  input_mode: Pipe", "give 'File' or 'FastFile'"),
        ("  volume_kms: k", "did you mean 'volume_kms_key'"),
        ("  output_kms_key: my key", "arn:aws:kms"),
        ("  tags: [{Key: a}]", "give keys and values"),
    ],
)
def test_a_wrong_argument_of_the_estimator_is_named(tmp_path, line, sentence):
    with pytest.raises(UserError, match=sentence):
        read_yaml_text(tmp_path, line + "\n")


def test_tags_and_variables_are_as_written(tmp_path):
    """YAML's own numbers are another text: 0042 would be 34, 1_000 would be 1000, yes would be True."""
    extra = read_yaml_text(
        tmp_path, "  tags: {cost: 0042, day: 2026-01-02}\n  environment: {A: 1_000, B: yes, C: 1.50}\n"
    ).additional_args
    assert extra.tags == {"cost": "0042", "day": "2026-01-02"}
    assert extra.environment == {"A": "1_000", "B": "yes", "C": "1.50"}


@pytest.mark.parametrize(
    ("words", "image", "sentence"),
    [
        (["--config", "flowers"], None, "name an image with these packages in image_uri"),
        (["--config", "flowers"], "mine:1", r"--dataset nelorth/oxford-flowers is on the Hub"),
        (["--dataset", "s3://b/d", "--vae", "a/b"], "mine:1", r"--vae a/b is on the Hub"),
        (["--dataset", "s3://b/d", "--push_to_hub"], "mine:1", "remove --push_to_hub"),
        (["--dataset", "s3://b/d"], "mine:1", None),
    ],
)
def test_a_job_without_a_network_gets_all_it_needs_by_channels(tmp_path, words, image, sentence):
    config = read_yaml_text(tmp_path, "  enable_network_isolation: true\n")
    config.image_uri = image
    command = sagemaker_job.read_command([UNET, *words])
    inputs = sagemaker_job.local_inputs(command, config)
    with pytest.raises(UserError, match=sentence) if sentence else contextlib.nullcontext():
        sagemaker_job.check_isolation(command, config, inputs)


def test_mlflows_variables_and_managed_mlflow_reach_the_job(tmp_path, monkeypatch):
    arn = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/flowers"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "roses")
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = read_yaml_text(tmp_path, "  environment: {MLFLOW_RUN_NAME: mine}\n")
    sent = launch_sagemaker.environment(config, None)
    assert sent == {
        "MLFLOW_RUN_NAME": "mine",
        "MLFLOW_EXPERIMENT_NAME": "roses",
    }  # a run's id goes with its server alone
    monkeypatch.setenv("MLFLOW_TRACKING_URI", arn)
    assert launch_sagemaker.environment(config, None) == sent | {"MLFLOW_TRACKING_URI": arn, "MLFLOW_RUN_ID": "a" * 32}
    assert "sagemaker-mlflow:*" in sagemaker_job.tracking_server(config)[1]
    command = sagemaker_job.read_command([UNET, "--dataset", "s3://b/d"])
    sagemaker_job.stage(tmp_path / "code", command, config, ROOT / "accelerate_configs/cpu.yaml", {})
    assert "\nsagemaker-mlflow==" in (tmp_path / "code/scripts/requirements.txt").read_text()


def test_what_warm_machines_and_encrypted_disks_mean(tmp_path):
    config = read_yaml_text(
        tmp_path, "  keep_alive_period_in_seconds: 60\n  use_spot_instances: true\n  volume_kms_key: k\n"
    )
    notes = " ".join(sagemaker_job.estimator_notes(config))
    assert "wait up to 60 s for a next job, and AWS bills this time" in notes
    assert "spot machines cannot wait for a next job" in notes
    assert "volume_kms_key" not in notes
    config.ec2_instance_type = "ml.g4dn.xlarge"
    assert "delete volume_kms_key, which AWS refuses" in sagemaker_job.estimator_notes(config)[-1]


def archive_of(*members: tarfile.TarInfo) -> Any:
    """A client of S3 whose every file is an archive of `members`, each with the bytes b"x" if it is a file."""

    def download(bucket: str, key: str, path: str) -> None:
        with tarfile.open(path, "w:gz") as tar:
            for member in members:
                tar.addfile(member, io.BytesIO(b"x") if member.size else None)

    return types.SimpleNamespace(download_file=download)


def entry(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, int(kind == tarfile.REGTYPE), "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "wrong",
    [entry("../out"), entry("/out"), entry("a/../../out"), entry("link", tarfile.SYMTYPE), entry("fifo", tarfile.FIFOTYPE)],
    ids=lambda member: member.name,
)  # fmt: skip
def test_a_fetched_archive_cannot_leave_its_folder(wrong, tmp_path):
    good = [entry("unet", tarfile.DIRTYPE), entry("unet/weights")]
    launch_sagemaker.fetch_model(archive_of(*good), "s3://bucket/model.tar.gz", tmp_path / "good")
    assert (tmp_path / "good/unet/weights").read_bytes() == b"x"
    with pytest.raises(UserError, match="is no plain file"):
        launch_sagemaker.fetch_model(archive_of(wrong), "s3://bucket/model.tar.gz", tmp_path / "bad")
    assert not list(tmp_path.rglob("out"))
