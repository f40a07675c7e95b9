"""Describe a job of Hugging Face Jobs: its YAML, its request, and the files that its container needs.

This module sends nothing (`hf_account.py` and scripts/launch_hf_job.py do), and imports no torch.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator

from t2i.clouds import launch, staging
from t2i.clouds.launch import CURVES_AT_HOME, SERVER
from t2i.clouds.staging import Command, read_mapping
from t2i.command_line import plain_option, typed_fields, typed_options
from t2i.config import Recipe
from t2i.config_types import Count, checked, known_key, matching
from t2i.errors import UserError
from t2i.files import hash_json, sha256_file, write_json
from t2i.redaction import redact
from t2i.runs import FREE_OF_CAPTIONING, FREE_OF_TRAINING, LENGTHS, PUSHING
from t2i.tracking.addresses import Address, is_managed

KIND = "HF_JOBS"
CLOUD = "Hugging Face Jobs"
PRICES = staging.ROOT / "accelerate_configs" / "hf_jobs_prices.yaml"
WORK = "/tmp/t2i-job"  # in the container: code/, run/, inputs/, cache/
SECONDS = "T2I_SECONDS"  # variable of the container: seconds that the job had run when run_hf_job.py started
LABEL = "t2i-run"  # label of a job that names the repository of its run, without the namespace
# Label of a job with the hash of its whole command, which tells an extension from a repetition.
COMMAND_LABEL = "t2i-command"
# Options that may differ between two commands that resume or extend the same run. Another run_name or experiment is the
# way to start another training. The repository of captions stands only in their card.
FREE = {*FREE_OF_TRAINING, *FREE_OF_CAPTIONING, *LENGTHS, "hub_dataset_id"} - {"run_name", "experiment"}
# A job is worth its price on a finished run, too, if one of these options differs.
WORTH_A_JOB = {*LENGTHS, *PUSHING, "hub_model_id", "hub_dataset_id", "license"}
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    """Return the seconds of a time such as 90s, 30m, 12h or 2d. A number is seconds already."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
    if isinstance(value, bool) or not found or not float(found[1]):
        raise ValueError("give a time such as 90s, 30m, 12h or 2d")
    return int(float(found[1]) * UNITS[found[2] or "s"])


Duration = Annotated[int, BeforeValidator(_seconds)]  # seconds


@dataclass(kw_only=True)
class Payer:
    """The key of the YAML that names the account. `--stop` and `--fetch` read only this key."""

    # User or organization that runs and pays for the job. With None, the user of the token.
    namespace: Annotated[str, matching(r"[\w.-]+", "my-organization")] | None = None


@dataclass
class HfJobsConfig(Payer):
    """The keys of the YAML for Hugging Face Jobs."""

    compute_environment: Literal["HF_JOBS"]
    # Kind of machine. `hf jobs hardware` lists all kinds with their prices.
    flavor: Annotated[str, matching(r"[a-z0-9]+(-[a-z0-9]+)*", "t4-small")]
    # Container image with Python 3.11 or later, PyTorch and pip. hf.co/spaces/OWNER/NAME is the image of a Space.
    image: Annotated[str, matching(r"[\w./:@-]+", "pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime")]
    timeout: Duration  # Time after which the Hub ends the job, such as 12h.
    # Time before the timeout at which the training saves a checkpoint and ends.
    save_before_timeout: Duration = 600
    attempts: Count = 1  # Number of times that the Hub starts a failing job. Each attempt resumes from the checkpoints.
    base_job_name: Annotated[
        str, matching(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,45}", "my-flowers-2 (letters, digits and single -, 46 at most)")
    ] = "t2i"
    # Precision of the training. With None, use the precision of the YAML that --inside names.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    # Environment variables of the container. The environment variables must not hold secrets.
    environment: dict[str, str] = field(default_factory=dict)
    # Names of variables of the launching shell that the job gets as secrets, beside the Hub's token and MLflow's.
    secrets: list[Annotated[str, matching(r"[A-Za-z_]\w*", "WANDB_API_KEY")]] = field(default_factory=list)
    # The protocol `costs.Rental`. These fields are not keys of the YAML.
    num_machines: int = field(default=1, init=False)
    region: str = field(default=CLOUD, init=False)

    @property
    def machine(self) -> str:
        return self.flavor

    @property
    def is_spot(self) -> bool:
        return False

    @property
    def max_hours(self) -> float:
        return self.timeout / 3600  # of each attempt

    @property
    def max_hours_option(self) -> str:
        return "timeout"


def read_config(path: Path) -> HfJobsConfig:
    """Read the YAML for Hugging Face Jobs. An invalid YAML raises `UserError` with the names of the file and the wrong key."""
    values = read_mapping(path)
    kind = values.get("compute_environment", "a local machine")
    if kind != KIND:
        fix = f"write {KIND}" if str(kind).upper() == KIND else f"launch it with make train CONFIG={path}"
        raise UserError(f"{path}: compute_environment is {kind}, not {KIND}; {fix}")
    fields = {item.name for item in dataclasses.fields(HfJobsConfig) if item.init}
    for key in values:
        known_key(key, dict.fromkeys(fields), f"key in {path}")
    written = yaml.load(path.read_bytes(), yaml.BaseLoader)
    given = {key: value for key, value in launch.as_written(values, written).items() if value is not None}
    # YAML reads 12:00 as 720.
    given |= {key: written[key] for key in ("timeout", "save_before_timeout") if key in given}
    config: HfJobsConfig = checked(HfJobsConfig, given, str(path))
    if config.save_before_timeout >= config.timeout:
        raise UserError(
            f"{path}: save_before_timeout ({config.save_before_timeout} s) leaves no time to train before timeout "
            f"({config.timeout} s); raise timeout"
        )
    launch.check_environment(config.environment, path, "name it in secrets, and export it in the launching shell")
    if both := sorted(set(config.secrets) & set(config.environment)):
        raise UserError(f"{path}: {both[0]} stands in secrets and in environment; remove it from environment")
    return config


def check_secrets(config: HfJobsConfig, path: Path) -> None:
    """Raise `UserError` if this shell lacks a secret that a job needs. Other commands than a submission need none."""
    for name in config.secrets:
        if not os.environ.get(name):
            raise UserError(
                f"{path}: secrets names {redact(name)}, which this shell does not set; export it, or remove it there"
            )


def check_precision(config: HfJobsConfig, inside: Path, inner: dict[str, Any], gpus: int) -> None:
    """Raise `UserError` if the flavor cannot compute in fp16, which `config` or `inner` asks for."""
    if not gpus and (config.mixed_precision or inner.get("mixed_precision")) == "fp16":
        where = "mixed_precision" if config.mixed_precision else f"--inside {inside.name}"
        raise UserError(
            f"fp16 of {where} needs a GPU, and {config.flavor} has none; set flavor: t4-small, or mixed_precision: 'no'"
        )


def default_inside(flavor: str, gpus: int | None) -> Path:
    """Return the accelerate YAML for a container with this number of GPUs. An unknown number, None, raises `UserError`."""
    if gpus is None:
        raise UserError(f"flavor {flavor}: its number of GPUs is unknown; give --inside with a YAML for its container")
    name = "cpu.yaml" if gpus == 0 else "single_gpu.yaml" if gpus == 1 else "multi_gpu.yaml"
    return staging.ROOT / "accelerate_configs" / name


def tracking_server(config: HfJobsConfig) -> tuple[Address, str]:
    """Return the MLflow server that the job records to, and a note for the user, as `launch.tracking_server` does."""
    server, note = launch.tracking_server(config.environment.get(SERVER))
    if is_managed(server.uri):
        return Address(""), f"{SERVER} names MLflow of SageMaker, which this job cannot reach: {CURVES_AT_HOME}"
    return server, note


def secrets_here(config: HfJobsConfig, token: str) -> dict[str, str]:
    """Return the secrets of the job by name: the Hub's token, MLflow's credentials, and those that the YAML names."""
    secrets = launch.secrets_here(tracking_server(config)[0])
    return {**secrets, **{name: os.environ[name] for name in config.secrets}, "HF_TOKEN": token}


def local_inputs(command: Command) -> dict[str, str]:
    """Return the local folders that the job needs, by option. A missing data set or an s3:// folder raises `UserError`."""
    inputs = staging.find_inputs(command)
    for name, value in inputs.items():
        if value.startswith("s3://"):
            raise UserError(
                f"--{name} {value} needs an AWS account, which a Hugging Face job does not have; give a Hub id or a local folder"
            )
    if command.recipe and not command.recipe.data.dataset:
        raise UserError("no data set: give --dataset with a Hub id or a local folder, or --config flowers")
    return inputs


def run_name(command: Command, config: HfJobsConfig, hashes: dict[str, str]) -> str:
    """Return the name of the repository that keeps the command's run.

    The same script with the same arguments in any order, recipe and inputs has the same repository on every flavor. A
    later job therefore resumes the run of an earlier one. Options that may differ when a run is resumed keep the name too, and so
    does a raised --max_train_steps, which extends the run.

    Args:
        hashes: hash of each input folder by option, from `staging.hash_folder`.
    """
    return f"{config.base_job_name}-{_hash(command, set(), hashes)}"


def command_hash(command: Command, hashes: dict[str, str]) -> str:
    """Return the hash by which a repeated command is told from one that extends or pushes the same run.

    The argument `hashes` is that of `run_name`.
    """
    return _hash(command, WORTH_A_JOB, hashes)


def _sorted_words(command: Command, kept: set[str]) -> list[str]:
    """Return the words of the command's options by name: those that decide a run, and those in `kept`.

    The words of a user's own script stay as they are, since its options may mean something else.
    """
    if command.recipe is None:
        return command.arguments
    student = (
        {"num_inference_steps", "guidance_scale", "guidance_rescale"} if command.script == "distill_unet.py" else set()
    )
    typed = [(plain_option(name), values) for name, values, words in typed_options(command.arguments)
             if not typed_fields(Recipe, words) & (FREE - kept - student)]  # fmt: skip
    return [word for name, values in sorted(typed, key=lambda option: option[0]) for word in (f"--{name}", *values)]


def _hash(command: Command, kept: set[str], hashes: dict[str, str]) -> str:
    file = staging.recipe_file(command.arguments)
    recipe = sha256_file(Path(file)) if file else None
    return hash_json([command.script, _sorted_words(command, kept), recipe, hashes])[:12]


def stage(
    folder: Path, command: Command, config: HfJobsConfig, inside: Path, inputs: dict[str, str], repo_id: str
) -> None:
    """Write the files that the container needs to `folder`/code, with job.json for run_hf_job.py.

    Args:
        inputs: repository of each input by option.
        repo_id: repository that keeps the run.
    """
    code = folder / "code"
    code.mkdir(parents=True)
    staging.stage(code, command, inside)
    write_json(
        code / "job.json",
        {
            "script": command.script,
            "arguments": staging.container_arguments(command, inputs, f"{WORK}/inputs", f"{WORK}/run", f"{WORK}/cache"),
            "mixed_precision": config.mixed_precision,
            "inside": inside.name,
            "inputs": inputs,
            "repository": repo_id,
            "timeout": config.timeout,
            "save_after": config.timeout - config.save_before_timeout,
        },
    )


def request(
    config: HfJobsConfig, namespace: str, repo_id: str, commit: str, command: str, secrets: dict[str, str]
) -> dict[str, Any]:
    """Return the arguments of `HfApi.run_job` for this job.

    Args:
        commit: commit of the repository with the staged code.
        command: `command_hash` of the job's command.
    """
    name = repo_id.split("/")[1]
    pip = "python3 -m pip install --quiet --disable-pip-version-check"
    download = (
        "from huggingface_hub import snapshot_download; "
        f"snapshot_download('{repo_id}', revision='{commit}', allow_patterns='code/*', local_dir='{WORK}')"
    )
    # `exec` makes the script the container's first process, which signals reach. The script counts the timeout from the
    # shell's start.
    start = (
        f'{pip} huggingface_hub=={version("huggingface_hub")} && python3 -c "{download}" && '
        f"{pip} --requirement {WORK}/code/scripts/requirements.txt && "
        f"export {SECONDS}=$SECONDS && exec python3 {WORK}/code/scripts/run_hf_job.py"
    )
    own = {"PIP_BREAK_SYSTEM_PACKAGES": "1"}  # the image's Python is there for this job alone
    return {
        "image": config.image,
        "command": ["bash", "-c", start],
        "env": own | launch.forwarded_variables(tracking_server(config)[0], config.environment),
        "secrets": secrets,
        "flavor": config.flavor,
        "timeout": config.timeout,
        "attempts": config.attempts,
        "name": config.base_job_name,
        "labels": {LABEL: name, COMMAND_LABEL: command},
        "namespace": namespace,
    }
