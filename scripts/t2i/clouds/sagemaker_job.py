"""A SageMaker job: its accelerate YAML, and what it adds to the staging and launch that clouds share.

Knows nothing of AWS's interfaces (`aws_account.py` and scripts/launch_sagemaker.py do). Imports no torch.
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
from t2i.clouds.launch import CURVES_AT_HOME, SECRET_NAMES, SERVER
from t2i.clouds.staging import ROOT, Command, read_inside, read_mapping
from t2i.config import Count, Flag, checked, known_key, matching
from t2i.errors import UserError
from t2i.files import write_json
from t2i.redaction import redact
from t2i.tracking.mlflow_tracker import MANAGED_MLFLOW, Address, is_managed, split_uri

CHANNELS = "/opt/ml/input/data"  # in the container; a folder a channel
RUN = "/opt/ml/checkpoints/run"  # in the container, synced with S3: the run folder
CACHE = "/opt/ml/cache"  # on the job's volume, synced with nothing
SECRETS = "T2I_SECRETS"  # names the Secrets Manager secret whose JSON the container puts into its environment

S3Uri = Annotated[str, matching(r"s3://[a-z0-9][a-z0-9.-]+(/.*)?", "s3://bucket/folder")]
KmsKey = Annotated[
    str, matching(r"[A-Za-z0-9:/_-]{1,2048}", "arn:aws:kms:us-east-1:123456789012:key/ID, or alias/NAME")
]


def _tags(value: Any) -> Any:
    """Tags as SageMaker's own list `[{Key: a, Value: b}]` become a mapping; anything else stays for the check."""
    if isinstance(value, list) and all(isinstance(tag, dict) and set(tag) == {"Key", "Value"} for tag in value):
        return {tag["Key"]: tag["Value"] for tag in value}
    return value


@dataclass
class Additional:
    """`additional_args` of the YAML: arguments of SageMaker's estimator, by the names that accelerate passes on."""

    use_spot_instances: Flag = False  # spare capacity at a discount; SageMaker may interrupt it and goes on later
    max_run: Count = 86400  # s of training at most
    max_wait: Count | None = None  # s of training and waiting for spot capacity at most; None: max_run
    volume_size: Count = 30  # GB of disk a machine
    checkpoint_s3_uri: S3Uri | None = None  # s3://… of checkpoints to go on from; None: a folder of the job's own
    output_path: S3Uri | None = (
        None  # s3://… for models, and for what is uploaded; None: the account's SageMaker bucket
    )
    output_kms_key: KmsKey | None = None  # encrypts models and uploads in S3; None: the bucket's own way
    volume_kms_key: KmsKey | None = None  # encrypts the machines' disks; None: AWS's own key
    input_mode: Literal["File", "FastFile"] = (
        "File"  # FastFile reads data from S3 as it is needed, and copies none first
    )
    keep_alive_period_in_seconds: Annotated[int, Field(ge=0, le=3600)] | None = (
        None  # s that machines wait for a next job
    )
    enable_network_isolation: Flag = False  # containers without a network: data by channels, packages in image_uri
    environment: dict[str, str] = field(default_factory=dict)  # variables of the container; no secrets
    tags: Annotated[dict[str, str], BeforeValidator(_tags)] = field(default_factory=dict)  # of the job, for the bill
    subnets: list[str] = field(default_factory=list)  # of a VPC
    security_group_ids: list[str] = field(default_factory=list)  # of that VPC
    encrypt_inter_container_traffic: Flag = False  # between machines; slower


@dataclass
class SageMakerConfig:
    """The YAML that `accelerate config` writes for Amazon SageMaker, key by key."""

    compute_environment: Literal["AMAZON_SAGEMAKER"]
    ec2_instance_type: Annotated[str, matching(r"ml\.[a-z0-9-]+\.[a-z0-9]+", "ml.g4dn.xlarge")]
    iam_role_name: str = ""  # name or ARN of the role that the job runs as
    num_machines: Count = 1
    distributed_type: Literal["NO"] = "NO"  # of SageMaker's own libraries; what trains inside is another YAML's
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # None: the inner YAML's
    region: Annotated[str, matching(r"([a-z]{2}(-[a-z]+)+-\d)?", "us-east-1")] = (
        ""  # empty: AWS_REGION's, the profile's, or us-east-1
    )
    profile: str | None = None  # of ~/.aws
    base_job_name: Annotated[
        str, matching(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,45}", "my-flowers-2 (letters, digits and single -, 46 at most)")
    ] = "t2i"
    image_uri: str | None = None  # None: AWS's image by the versions below
    pytorch_version: str = "2.9.0"
    py_version: str = "py312"
    transformers_version: str | None = None  # None: AWS's PyTorch image; else its Hugging Face image
    sagemaker_inputs_file: str | None = None  # TSV with a header: channel, s3://… or folder
    sagemaker_metrics_file: str | None = None  # TSV with a header: metric, regular expression
    additional_args: Additional = field(default_factory=Additional)
    # written by `accelerate config`, without a meaning here
    use_cpu: Flag = False
    debug: Flag = False
    gpu_ids: str | None = None
    num_processes: int | None = None
    dynamo_config: dict[str, Any] | None = None
    enable_cpu_affinity: Flag = False
    region_from: str = field(default="", init=False)  # where `region` comes from, in words; no key of the YAML

    # what costs.py asks of any cloud's job
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


VERSIONS: dict[str, Any] = {
    "pytorch_version": "2.9.0",
    "py_version": "py312",
    "transformers_version": None,
}  # of AWS's image that serves


def version_changes(config: Any) -> list[str]:
    """What to write into a YAML, of which `config` has the versions, to get the image that serves; [] if nothing changes."""
    changes = []
    for key, value in VERSIONS.items():
        if getattr(config, key) != value:
            changes.append(f"set {key}: {value}" if value else f"delete {key}")
    return changes


def has_gpu(instance_type: str) -> bool:
    """Whether a SageMaker machine has NVIDIA GPUs, by its family's name: ml.p…, ml.g… and ml.gr…."""
    return bool(re.match(r"ml\.(p|g|gr)\d", instance_type))


def check_precision(config: SageMakerConfig, inside: Path, inner: dict[str, Any]) -> None:
    """Raise `UserError` if the machine cannot compute in the precision of the YAML, or else of the one inside."""
    own = config.mixed_precision
    if (own or inner.get("mixed_precision")) == "fp16" and not has_gpu(config.ec2_instance_type):
        where = "the SageMaker YAML" if own else f"--inside {inside.name}"
        raise UserError(
            f"mixed_precision fp16 of {where} needs a GPU, and {config.ec2_instance_type} has none; set ec2_instance_type: "
            f"ml.g4dn.xlarge, or mixed_precision: 'no' in {'it' if own else 'the SageMaker YAML'}"
        )


def precision_note(config: SageMakerConfig, inner: dict[str, Any]) -> str:
    """What a user should know of the precision on this machine; empty if nothing. inner: as of `read_inside`."""
    own = config.mixed_precision
    if (own or inner.get("mixed_precision")) != "bf16" or not re.match(
        r"ml\.(g4dn|p2|p3|p3dn)\.", config.ec2_instance_type
    ):
        return ""
    return (
        f"the GPUs of {config.ec2_instance_type} have no bf16 units, so mixed_precision bf16 is slow there; "
        f"set mixed_precision: fp16{'' if own else ' in the SageMaker YAML'}"
    )


def read_config(path: Path) -> SageMakerConfig:
    """Read an accelerate SageMaker YAML. Raises `UserError` naming file and key where it cannot be used."""
    values = read_mapping(path)
    kind = str(values.get("compute_environment"))
    if kind != "AMAZON_SAGEMAKER" and re.sub(r"[\W_]+", "_", kind).upper() in (
        "AMAZON_SAGEMAKER",
        "SAGEMAKER",
        "AWS_SAGEMAKER",
    ):
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
    additional = checked(Additional, _as_written(extra, path), f"{path}, section additional_args")
    values = {key: value for key, value in values.items() if value is not None}  # accelerate writes null for "not set"
    kind = values.get("distributed_type", "NO")
    if isinstance(kind, str) and kind != "NO":
        library = ", a library of SageMaker's own" if kind in ("DATA_PARALLEL", "MODEL_PARALLEL") else ""
        refused = f"distributed_type {kind}{library}"
        raise UserError(_to_change(path, refused, ["set distributed_type: 'NO'"], values))
    if meant := re.fullmatch(r"(?:py|python)?\s?3\.?(\d+)(?:\.\d+)?", str(values.get("py_version", "")), re.IGNORECASE):
        wanted = f"py3{meant[1]}"
        if values["py_version"] != wanted and not _is_old(wanted):
            raise UserError(
                f"{path}: py_version {values['py_version']} is not written as SageMaker's images are; write {wanted}"
            )
    config = checked(SageMakerConfig, {**values, "additional_args": additional}, str(path))
    if additional.max_wait is not None and additional.max_wait < additional.max_run:
        raise UserError(
            f"{path}: max_wait ({additional.max_wait} s) is less than max_run ({additional.max_run} s); it counts both waiting "
            "and training"
        )
    if _is_old(config.py_version) and not config.image_uri:
        raise UserError(_to_change(path, f"py_version {config.py_version}, older than Python 3.11", [], values))
    shown = {name: f"{name}={value}" for name, value in additional.environment.items() if name != SECRETS}
    secret = [name for name, line in shown.items() if name in SECRET_NAMES or redact(line) != line]
    if secret:
        raise UserError(
            f"{path}: environment holds a credential in {secret[0]}, which the request would show in plain text; export it where "
            f"you launch, or name a Secrets Manager secret in {SECRETS}"
        )
    tags = [name for name, value in additional.tags.items() if redact(f"{name}={value}") != f"{name}={value}"]
    if tags:
        raise UserError(f"{path}: the tag {tags[0]} looks like a credential; take it out")
    own = [name for name in additional.environment if name.startswith("SM_") or name == "T2I_WORLD_SIZE"]
    if own:
        raise UserError(f"{path}: environment sets {own[0]}, which SageMaker or this suite sets; take it out")
    server = additional.environment.get(SERVER, "").strip()
    if server and split_uri(server, f"{path}: {SERVER} in environment").is_local:
        raise UserError(
            f"{path}: {SERVER} in environment is {server}, which in the job is the job's own machine; "
            "give the server's address on the network"
        )
    if bool(additional.subnets) != bool(additional.security_group_ids):
        raise UserError(f"{path}: subnets and security_group_ids belong together; give both, or neither")
    return config


def _as_written(extra: dict[str, Any], path: Path) -> dict[str, Any]:
    """`additional_args` with the numbers and dates in its tags and environment as the file has them: 0042 is a text there."""
    written = (yaml.load(path.read_bytes(), yaml.BaseLoader).get("additional_args") or {}) if extra else {}

    def text(value: Any, source: Any) -> Any:
        if isinstance(value, dict) and isinstance(source, dict):
            return {key: text(inner, source.get(str(key))) for key, inner in value.items()}
        if isinstance(value, list) and isinstance(source, list):
            return [text(*pair) for pair in zip(value, source, strict=True)]
        return source if isinstance(source, str) and value is not None and not isinstance(value, str) else value

    return extra | {key: text(extra[key], written.get(key)) for key in ("tags", "environment") if key in extra}


def check_isolation(command: Command, config: SageMakerConfig, inputs: dict[str, str]) -> None:
    """Raise `UserError` for what a container without a network cannot have: packages, models and data of the Hub, a push."""
    if not config.additional_args.enable_network_isolation:
        return
    without = "enable_network_isolation: true leaves the job without a network"
    if not config.image_uri:
        raise UserError(
            f"{without}, so scripts/requirements.txt cannot be installed; name an image that has these packages in image_uri"
        )
    for name, value in command.folder_options().items():
        if name not in inputs and not (name == "captioner" and value in ("label", "existing")):
            raise UserError(f"{without}, and --{name} {value} is on the Hub; give a folder here, or one in s3://")
    if getattr(command.settings, "push_to_hub", False):
        raise UserError(f"{without}, so it cannot push to the Hub; leave out --push_to_hub, and publish after --fetch")


def estimator_notes(config: SageMakerConfig) -> list[str]:
    """What a user should know of the arguments in `additional_args` before paying."""
    extra, kind, notes = config.additional_args, config.ec2_instance_type, []
    if extra.keep_alive_period_in_seconds:
        notes.append(
            f"machines wait up to {extra.keep_alive_period_in_seconds} s for a next job, and are billed meanwhile"
        )
        if extra.use_spot_instances:
            notes.append(
                "AWS keeps no spot machines waiting; set use_spot_instances: false, or delete keep_alive_period_in_seconds"
            )
    if extra.volume_kms_key and re.match(r"ml\.([a-z]+\d+[a-z]*d[a-z]*|g5|g6|g6e|p5\w*)\.", kind):
        notes.append(
            f"{kind} has disks of its own, which its hardware encrypts; AWS refuses volume_kms_key there, so delete it"
        )
    return notes


def tracking_server(config: SageMakerConfig) -> tuple[Address, str]:
    """Return the MLflow server that the job records to, and what a user should know of it, as `launch.tracking_server` does."""
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
    """A sentence with all that must change in a YAML as accelerate writes it, so that one round of changes is enough."""
    versions = SimpleNamespace(**{key: values.get(key, default) for key, default in VERSIONS.items()})
    if not values.get("image_uri") and _is_old(str(versions.py_version)):
        changes = [*changes, *version_changes(versions)]
    return f"{path} has {refused}, which these scripts cannot use; in it {', '.join(changes)}"


def read_table(path: str, name: str) -> dict[str, str]:
    """A TSV file of two columns under a header, as accelerate reads it: inputs by channel, or metrics by name.

    path: from the working directory, else from the repository's root.
    """
    file = next((found for found in (Path(path), ROOT / path) if found.is_file()), Path(path))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[1:]
    except OSError as error:
        raise UserError(f"{name} {path} cannot be read ({error.strerror}); correct the path in the YAML") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} {path} is not UTF-8; save it as such") from None
    table = {}
    for number, line in enumerate(lines, 2):
        if line.strip():
            cells = line.split("\t")
            if len(cells) != 2:
                raise UserError(
                    f"{path}, line {number}: two columns with a tab between them are needed, here are {len(cells)}"
                )
            table[cells[0].strip()] = cells[1].strip()
    return table


# --- The training command and what is staged --------------------------------------------------------------------------


def read_command(words: list[str]) -> Command:
    """Check the script and its arguments, as `staging.read_command` does."""
    return staging.read_command(words, "SageMaker")


def local_inputs(command: Command, config: SageMakerConfig) -> dict[str, str]:
    """Return what the job reads beside the Hub: `{channel: local folder or s3://…}`, of options, recipe and inputs file."""
    inputs = {}
    if config.sagemaker_inputs_file:
        inputs = read_table(config.sagemaker_inputs_file, "sagemaker_inputs_file")
    inputs |= staging.find_inputs(command)
    for channel, value in inputs.items():
        # a channel's name becomes a shell variable's
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", channel) or channel in ("code", "sm_drivers"):
            raise UserError(f"{channel!r} cannot be a channel's name; use letters, digits and '_'")
        if not value.startswith("s3://"):
            folder = staging.expand_user(value)
            if not folder.is_dir():
                raise UserError(f"{value} (channel {channel}) is neither a folder here nor s3://…; correct the path")
            inputs[channel] = str(folder)
    if command.recipe and not (command.recipe.data.dataset or "dataset" in inputs):
        raise UserError(
            "no data set: give --dataset with a Hub id, an s3:// folder or a folder here, or --config flowers"
        )
    if command.script == "caption_to_hub.py" and config.num_machines > 1:
        raise UserError("captions are kept in one folder, which two machines do not share; set num_machines: 1")
    return inputs


def container_arguments(command: Command, inputs: dict[str, str]) -> list[str]:
    """Return the arguments as typed, followed by the paths in SageMaker's container, which override them."""
    return staging.container_arguments(command, inputs, CHANNELS, RUN, CACHE)


def stage(folder: Path, command: Command, config: SageMakerConfig, inside: Path, inputs: dict[str, str]) -> None:
    """Lay out what the container gets: what every cloud's does, and job.json for run_sagemaker_job.py."""
    staging.stage(folder, command, inside)
    if is_managed(tracking_server(config)[0].uri):  # no other job needs the package
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
