"""Describe a SageMaker job: its accelerate YAML, and the steps that the shared staging and launch do not have.

This module calls no interface of AWS (`aws_account.py` and scripts/launch_sagemaker.py do), and imports no torch.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from t2i.clouds import launch, staging
from t2i.clouds.launch import CURVES_AT_HOME, SERVER
from t2i.clouds.staging import ROOT, Command, read_inside, read_mapping
from t2i.config_types import Count, Flag, checked, known_key, matching
from t2i.errors import UserError
from t2i.files import write_json
from t2i.redaction import redact
from t2i.tracking.addresses import MANAGED_MLFLOW, Address, is_managed

CHANNELS = "/opt/ml/input/data"  # in the container, with one folder per channel
RUN = "/opt/ml/checkpoints/run"  # the run folder in the container, which SageMaker syncs with S3
CACHE = "/opt/ml/cache"  # on the job's volume, never synced
SECRETS = "T2I_SECRETS"  # names the Secrets Manager secret whose JSON the container puts into its environment

S3Uri = Annotated[str, matching(r"s3://[a-z0-9][a-z0-9.-]+(/.*)?", "s3://bucket/folder")]
KmsKey = Annotated[
    str, matching(r"[A-Za-z0-9:/_-]{1,2048}", "arn:aws:kms:us-east-1:123456789012:key/ID, or alias/NAME")
]


def _tags(value: Any) -> Any:
    """Turn SageMaker's list of tags, `[{Key: a, Value: b}]`, into a mapping of keys to values.

    Any value that is not a list of tags is returned unchanged.
    """
    if isinstance(value, list) and all(isinstance(tag, dict) and set(tag) == {"Key", "Value"} for tag in value):
        return {tag["Key"]: tag["Value"] for tag in value}
    return value


@dataclass
class Additional:
    """`additional_args` of the YAML: arguments of SageMaker's estimator, by accelerate's names."""

    # Use spare capacity at a discount. SageMaker may interrupt the job and resume it later.
    use_spot_instances: Flag = False
    max_run: Count = 86400  # Maximum seconds of training.
    # Maximum seconds of training and waiting for spot capacity together. With None, max_wait equals max_run.
    max_wait: Count | None = None
    volume_size: Count = 30  # Disk space per machine in GB.
    # S3 address of checkpoints to resume from. Without an address, checkpoints go to a new S3 folder.
    checkpoint_s3_uri: S3Uri | None = None
    # S3 address for models and uploads. With None, use the account's SageMaker bucket.
    output_path: S3Uri | None = None
    # Key that encrypts models and uploads in S3. Without a key, the bucket's own encryption is used.
    output_kms_key: KmsKey | None = None
    # Key that encrypts the machines' disks. Without a key of yours, AWS encrypts the disks by its own key.
    volume_kms_key: KmsKey | None = None
    # Input mode of the job's data. FastFile streams data from S3. File copies the data before the training.
    input_mode: Literal["File", "FastFile"] = "File"
    # Seconds for which the job's machines stay ready for a next job.
    keep_alive_period_in_seconds: Annotated[int, Field(ge=0, le=3600)] | None = None
    # Whether the job's containers have no network. Without a network, data comes by input channels, and the image in
    # image_uri holds all packages.
    enable_network_isolation: Flag = False
    # Environment variables of the container. The environment variables must not hold secrets.
    environment: dict[str, str] = field(default_factory=dict)
    # Tags of the job, shown on the bill.
    tags: Annotated[dict[str, str], BeforeValidator(_tags)] = field(default_factory=dict)
    subnets: list[str] = field(default_factory=list)  # Subnets of your VPC.
    security_group_ids: list[str] = field(default_factory=list)  # Security groups of the VPC that holds the subnets.
    # Encrypt the traffic between the job's machines, which slows the training.
    encrypt_inter_container_traffic: Flag = False


@dataclass(kw_only=True)
class Place:
    """The keys of the YAML that name the account and the region. `--stop` and `--fetch` read only these keys."""

    # Region of the job. Without a region, use AWS_REGION, the profile's region, or us-east-1.
    region: Annotated[str, matching(r"([a-z]{2}(-[a-z]+)+-\d)?", "us-east-1")] = ""
    profile: str | None = None  # Name of a profile in ~/.aws/config.
    # Origin of the job's region in words. The field is not a key of the YAML.
    region_from: str = field(default="", init=False)


@dataclass
class SageMakerConfig(Place):
    """The keys of the YAML that `accelerate config` writes for Amazon SageMaker."""

    compute_environment: Literal["AMAZON_SAGEMAKER"]
    ec2_instance_type: Annotated[str, matching(r"ml\.[a-z0-9-]+\.[a-z0-9]+", "ml.g4dn.xlarge")]
    iam_role_name: str = ""  # Name or ARN of the role that the job runs as.
    num_machines: Count = 1
    # SageMaker's own distribution library is not used. The option --inside names the YAML of the training.
    distributed_type: Literal["NO"] = "NO"
    # Precision of the training. With None, use the precision of the YAML that --inside names.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    base_job_name: Annotated[
        str, matching(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,45}", "my-flowers-2 (letters, digits and single -, 46 at most)")
    ] = "t2i"
    # Container image of the job. With None, use AWS's image for the YAML's versions of PyTorch, transformers and
    # Python.
    image_uri: str | None = None
    pytorch_version: str = "2.9.0"
    py_version: str = "py312"
    # Version of transformers in the image. With None, use AWS's PyTorch image without transformers. A version of
    # transformers selects AWS's Hugging Face image of that version.
    transformers_version: str | None = None
    # TSV file of the job's inputs, with a header and the columns channel and source (s3://… or a folder).
    sagemaker_inputs_file: str | None = None
    # TSV file of the job's metrics, with a header and the columns metric and regular expression.
    sagemaker_metrics_file: str | None = None
    additional_args: Additional = field(default_factory=Additional)
    # `accelerate config` writes the following keys, which have no effect on a job.
    use_cpu: Flag = False
    debug: Flag = False
    gpu_ids: str | None = None
    num_processes: int | None = None
    dynamo_config: dict[str, Any] | None = None
    enable_cpu_affinity: Flag = False
    # The protocol `costs.Rental`. The field is not a key of the YAML.
    attempts: int = field(default=1, init=False)

    @property
    def machine(self) -> str:
        return self.ec2_instance_type

    @property
    def is_spot(self) -> bool:
        return self.additional_args.use_spot_instances

    @property
    def max_hours(self) -> float:
        return self.additional_args.max_run / 3600

    @property
    def max_hours_option(self) -> str:
        return "max_run"


# Versions of an image of AWS that runs this suite.
VERSIONS: dict[str, Any] = {"pytorch_version": "2.9.0", "py_version": "py312", "transformers_version": None}


def version_changes(config: Any) -> list[str]:
    """Return the changes of SageMaker's YAML, such as "set py_version: py312", that lead to the supported versions,
    `VERSIONS`.
    """
    changes = []
    for key, value in VERSIONS.items():
        if getattr(config, key) != value:
            changes.append(f"set {key}: {value}" if value else f"delete {key}")
    return changes


def has_gpu(instance_type: str) -> bool:
    """Return whether a SageMaker machine has NVIDIA GPUs: the families ml.p…, ml.g… and ml.gr… have them."""
    return bool(re.match(r"ml\.(p|g|gr)\d", instance_type))


def check_precision(config: SageMakerConfig, inside: Path, inner: dict[str, Any]) -> None:
    """Raise `UserError` if the job's machine cannot compute in the precision of the YAML, or of `inner` if the YAML
    names none.
    """
    own = config.mixed_precision
    if (own or inner.get("mixed_precision")) == "fp16" and not has_gpu(config.ec2_instance_type):
        where = "the SageMaker YAML" if own else f"--inside {inside.name}"
        raise UserError(
            f"mixed_precision fp16 of {where} needs a GPU, and {config.ec2_instance_type} has none; set ec2_instance_type: "
            f"ml.g4dn.xlarge, or mixed_precision: 'no' in {'it' if own else 'the SageMaker YAML'}"
        )


def read_config(path: Path) -> SageMakerConfig:
    """Read accelerate's YAML for SageMaker.

    An invalid YAML raises `UserError` with the names of the file and the wrong key.
    """
    values = read_mapping(path)
    kind = str(values.get("compute_environment"))
    meant = re.sub(r"[\W_]+", "_", kind).upper() in ("AMAZON_SAGEMAKER", "SAGEMAKER", "AWS_SAGEMAKER")
    if kind != "AMAZON_SAGEMAKER" and meant:
        raise UserError(f"{path}: compute_environment is {kind}; write AMAZON_SAGEMAKER")
    if kind != "AMAZON_SAGEMAKER":
        raise UserError(
            f"{path} is for {values.get('compute_environment', 'a local machine')}, not AMAZON_SAGEMAKER; launch it with "
            f"accelerate launch --config_file {path}"
        )
    fields = {item.name for item in dataclasses.fields(SageMakerConfig) if item.init}
    for key in values:
        known_key(key, dict.fromkeys(fields), f"key in {path}")
    extra = values.get("additional_args") or {}
    if not isinstance(extra, dict):
        raise UserError(f"{path}: additional_args must hold keys and values, not {extra!r}")
    for key in extra:
        known_key(
            key,
            {item.name: None for item in dataclasses.fields(Additional)},
            f"key in section additional_args of {path}",
        )
    written = (yaml.load(path.read_bytes(), yaml.BaseLoader).get("additional_args") or {}) if extra else {}
    additional = checked(Additional, launch.as_written(extra, written), f"{path}, section additional_args")
    values = {key: value for key, value in values.items() if value is not None}  # accelerate writes null for "not set"
    kind = values.get("distributed_type", "NO")
    if isinstance(kind, str) and kind != "NO":
        library = ", a library of SageMaker's own" if kind in ("DATA_PARALLEL", "MODEL_PARALLEL") else ""
        refused = f"distributed_type {kind}{library}"
        raise UserError(_to_change(path, refused, ["set distributed_type: 'NO'"], values))
    if number := re.fullmatch(
        r"(?:py|python)?\s?3\.?(\d+)(?:\.\d+)?", str(values.get("py_version", "")), re.IGNORECASE
    ):
        wanted = f"py3{number[1]}"
        if values["py_version"] != wanted and not _is_old(wanted):
            raise UserError(
                f"{path}: py_version {values['py_version']} is not spelled as SageMaker's images spell it; write {wanted}"
            )
    config = checked(SageMakerConfig, {**values, "additional_args": additional}, str(path))
    if additional.max_wait is not None and additional.max_wait < additional.max_run:
        raise UserError(
            f"{path}: max_wait ({additional.max_wait} s) is less than max_run ({additional.max_run} s); raise max_wait, "
            "which covers waiting and training"
        )
    if _is_old(config.py_version) and not config.image_uri:
        raise UserError(_to_change(path, f"py_version {config.py_version}, older than Python 3.11", [], values))
    fix = f"export it in the launching shell, or name a secret of Secrets Manager in {SECRETS}"
    launch.check_environment(additional.environment, path, fix, allowed=(SECRETS,))
    tags = [name for name, value in additional.tags.items() if redact(f"{name}={value}") != f"{name}={value}"]
    if tags:
        raise UserError(f"{path}: the tag {tags[0]} looks like a credential; remove it")
    own = [name for name in additional.environment if name.startswith("SM_") or name == "T2I_WORLD_SIZE"]
    if own:
        raise UserError(f"{path}: environment sets {own[0]}, which SageMaker or this suite sets; remove it")
    if bool(additional.subnets) != bool(additional.security_group_ids):
        raise UserError(f"{path}: subnets and security_group_ids belong together; give both or neither")
    return config


def check_isolation(command: Command, config: SageMakerConfig, inputs: dict[str, str]) -> None:
    """Raise `UserError` if the job has no network, but needs one for packages, models or data of the Hub, or a push."""
    if not config.additional_args.enable_network_isolation:
        return
    without = "enable_network_isolation: true leaves the job without a network"
    if SECRETS in config.additional_args.environment:
        raise UserError(f"{without}, so it cannot read a secret; remove {SECRETS} from environment in the YAML")
    if not config.image_uri:
        raise UserError(
            f"{without}, so scripts/requirements.txt cannot be installed; name an image with these packages in image_uri"
        )
    for name, value in command.folder_options().items():
        if name not in inputs and not (name == "captioner" and value in ("label", "existing")):
            raise UserError(f"{without}, and --{name} {value} is on the Hub; give a local folder or an s3:// folder")
    if getattr(command.settings, "push_to_hub", False):
        raise UserError(f"{without}, so it cannot push to the Hub; remove --push_to_hub, and publish after --fetch")


def estimator_notes(config: SageMakerConfig) -> list[str]:
    """Return notes on the YAML's `additional_args` that a user should read before paying for the job."""
    extra, kind, notes = config.additional_args, config.ec2_instance_type, []
    if extra.keep_alive_period_in_seconds:
        notes.append(
            f"machines wait up to {extra.keep_alive_period_in_seconds} s for a next job, and AWS bills this time"
        )
        if extra.use_spot_instances:
            notes.append(
                "spot machines cannot wait for a next job; set use_spot_instances: false, or delete keep_alive_period_in_seconds"
            )
    if extra.volume_kms_key and re.match(r"ml\.([a-z]+\d+[a-z]*d[a-z]*|g5|g6|g6e|p5\w*)\.", kind):
        notes.append(
            f"{kind} has its own disks, which its hardware encrypts; delete volume_kms_key, which AWS refuses there"
        )
    return notes


def tracking_server(config: SageMakerConfig) -> tuple[Address, str]:
    """Return the MLflow server that the job records to, and a note for the user, as `launch.tracking_server` does."""
    named = config.additional_args.environment.get(SERVER)
    server, note = launch.tracking_server(named)
    if named is None and config.additional_args.enable_network_isolation:
        without = "the job has no network (enable_network_isolation), so no MLflow server follows it"
        return Address(""), f"{without}: {CURVES_AT_HOME}"
    if named is None and is_managed(server.uri):
        note = f"the job records to MLflow at {server.uri}, for which its role must be allowed sagemaker-mlflow:*"
    return server, note


def _is_old(py_version: str) -> bool:
    return not re.fullmatch(r"py3(1[1-9]|[2-9]\d)", py_version)


def _to_change(path: Path, refused: str, changes: list[str], values: dict[str, Any]) -> str:
    """Return one sentence with all changes that SageMaker's YAML needs, so that a user edits the file only once."""
    versions = SimpleNamespace(**{key: values.get(key, default) for key, default in VERSIONS.items()})
    if not values.get("image_uri") and _is_old(str(versions.py_version)):
        changes = [*changes, *version_changes(versions)]
    return f"{path} has {refused}, which these scripts cannot use; {', '.join(changes)}"


def read_table(path: str, name: str) -> dict[str, str]:
    """Read a TSV file of two columns under a header: inputs by channel, or metrics by name.

    A relative `path` is looked up in the working directory, and then in the repository's root.
    """
    file = next((place for place in (Path(path), ROOT / path) if place.is_file()), Path(path))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[1:]
    except OSError as error:
        raise UserError(f"{name} {path} cannot be read ({error.strerror}); correct the path in the YAML") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} {path} is not UTF-8; save it as UTF-8") from None
    table = {}
    for number, line in enumerate(lines, 2):
        if line.strip():
            cells = line.split("\t")
            if len(cells) != 2:
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns instead of two; separate two columns by one tab"
                )
            table[cells[0].strip()] = cells[1].strip()
    return table


# --- The training command and what is staged --------------------------------------------------------------------------


def read_command(words: list[str]) -> Command:
    """Check the training script and its arguments, as `staging.read_command` does."""
    return staging.read_command(words, "SageMaker")


def local_inputs(command: Command, config: SageMakerConfig) -> dict[str, str]:
    """Return the job's inputs from options, recipe and inputs file, without inputs on the Hub: folder or s3://… by
    channel.
    """
    inputs = {}
    if config.sagemaker_inputs_file:
        inputs = read_table(config.sagemaker_inputs_file, "sagemaker_inputs_file")
    inputs |= staging.find_inputs(command)
    for channel, value in inputs.items():
        # SageMaker makes a shell variable of each channel's name.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", channel) or channel in ("code", "sm_drivers"):
            raise UserError(f"{channel!r} is not a valid channel name; use letters, digits and '_'")
        if not value.startswith("s3://"):
            folder = staging.expand_user(value)
            if not folder.is_dir():
                raise UserError(f"{value} (channel {channel}) is neither a local folder nor s3://…; correct the path")
            inputs[channel] = str(folder)
    if command.recipe and not (command.recipe.data.dataset or "dataset" in inputs):
        raise UserError(
            "no data set: give --dataset with a Hub id, an s3:// folder or a local folder, or --config flowers"
        )
    if command.script == "caption_to_hub.py" and config.num_machines > 1:
        raise UserError("captions are kept in one folder, which two machines do not share; set num_machines: 1")
    return inputs


def container_arguments(command: Command, inputs: dict[str, str]) -> list[str]:
    """Return the typed arguments, followed by options with the paths in SageMaker's container, which override typed paths."""
    return staging.container_arguments(command, inputs, CHANNELS, RUN, CACHE)


def stage(folder: Path, command: Command, config: SageMakerConfig, inside: Path, inputs: dict[str, str]) -> None:
    """Write the files that the job's containers need, with job.json for run_sagemaker_job.py."""
    staging.stage(folder, command, inside)
    if is_managed(tracking_server(config)[0].uri):  # only such a job needs the package
        with open(folder / "scripts" / "requirements.txt", "a", encoding="utf-8") as file:
            file.write(f"{MANAGED_MLFLOW}=={version(MANAGED_MLFLOW)}  # SageMaker's managed MLflow\n")
    write_json(
        folder / "job.json",
        {
            "script": command.script,
            "arguments": container_arguments(command, inputs),
            "machines": config.num_machines,
            "mixed_precision": config.mixed_precision,
            "inside": inside.name,
            "zero": read_inside(inside).get("distributed_type") == "DEEPSPEED",
        },
    )
