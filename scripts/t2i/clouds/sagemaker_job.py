"""A SageMaker job as this suite sends it: the accelerate YAML, the training command, what is staged and what is uploaded.

Knows nothing of AWS's interfaces (scripts/launch_sagemaker.py does) and imports no torch.
"""

import dataclasses
import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BeforeValidator, Field

from t2i.command_line import option
from t2i.config import Recipe, parse, read_yaml
from t2i.config_types import Count, Flag, checked, known_key, matching
from t2i.errors import UserError
from t2i.files import sha256_file, write_json, write_text
from t2i.redaction import redact
from t2i.runs import code_revision
from t2i.tracking.addresses import MANAGED_MLFLOW, Address, is_managed, split_uri

ROOT = Path(__file__).parents[3]
CHANNELS = "/opt/ml/input/data"  # in the container; a folder a channel
RUN = "/opt/ml/checkpoints/run"  # in the container, synced with S3: the run folder
CACHE = "/opt/ml/cache"  # on the job's volume, synced with nothing
SECRETS = "T2I_SECRETS"  # names the Secrets Manager secret whose JSON the container puts into its environment
SERVER = "MLFLOW_TRACKING_URI"
# of this shell, sent along unless the YAML sets them; what follows a server alone goes only with one
FORWARDED = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
             "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING")  # fmt: skip
OF_A_SERVER = ("MLFLOW_RUN_ID",)
SECRET_NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")

# Sections of the recipe that each training script parses: their arguments are checked before anything is sent.
SECTIONS: dict[str, tuple[str, ...]] = {
    "train_unet.py": ("data", "vae", "unet", "train_unet"),
    "train_vae.py": ("data", "vae", "train_vae"),
    "caption_to_hub.py": ("source", "caption"),
}
FOLDERS = {  # options that may name a folder here: where the recipe has them, and the part that a run folder gives
    "dataset": ("data", ""),
    "vae": ("vae", "vae"),
    "text_encoder": ("unet", "pipeline"),
    "pretrained_model_name_or_path": ("unet", "pipeline"),
    "captioner": ("caption", ""),
    "audit_tokenizer": ("caption", ""),
}
AT_HOME = ("make_flowers.py", "generate_images.py", "evaluate_checkpoints.py", "publish_model.py", "run_recipe.py",
           "launch_sagemaker.py", "run_sagemaker_job.py")  # fmt: skip


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


def check_isolation(command: "Command", config: SageMakerConfig, inputs: dict[str, str]) -> None:
    """Raise `UserError` for what a container without a network cannot have: packages, models and data of the Hub, a push."""
    if not config.additional_args.enable_network_isolation:
        return
    without = "enable_network_isolation: true leaves the job without a network"
    if not config.image_uri:
        raise UserError(
            f"{without}, so scripts/requirements.txt cannot be installed; name an image that has these packages in image_uri"
        )
    for name, (section, _) in FOLDERS.items():
        value = getattr(getattr(command.recipe, section), name) if takes(command.script, name) else None
        if value and name not in inputs and not (name == "captioner" and value in ("label", "existing")):
            raise UserError(f"{without}, and --{name} {value} is on the Hub; give a folder here, or one in s3://")
    settings = getattr(command.recipe, SECTIONS[command.script][-1]) if command.recipe else None
    if getattr(settings, "push_to_hub", False):
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
    """The MLflow server that the job records to, as the YAML or else this shell names it, and what a user should know of it.

    Its user and password are of this shell alone. The address has no `uri` if the job gets none from here.
    Raises `UserError` if the shell's is to be sent and cannot be used.
    """
    home = "the job's curves come home with --fetch"
    named = config.additional_args.environment.get(SERVER)
    given = os.environ.get(SERVER, "").strip()
    try:
        here = split_uri(given) if given else Address("")
    except UserError:
        if named is None:
            raise
        here = Address("")
    if named is not None:
        there = split_uri(named) if named.strip() else Address("")
        if here.user and urlsplit(here.uri).hostname == urlsplit(there.uri).hostname:
            there = Address(there.uri, here.user, here.password)
        lost = not named.strip() or there.uri.startswith("sqlite")
        return there, f"{SERVER} of the YAML names no server: {home}" if lost else ""
    if config.additional_args.enable_network_isolation:
        return Address(""), f"the job has no network (enable_network_isolation), so no MLflow server follows it: {home}"
    if is_managed(here.uri):
        return here, f"the job records to MLflow at {here.uri}, for which its role must be allowed sagemaker-mlflow:*"
    if here.is_server and not here.is_local:
        return here, ""
    if not here.uri:
        return here, f"{SERVER} is not set, so no MLflow server follows the job: {home}"
    if here.is_local:
        why = "is of a server on this machine, which the job cannot reach"
    elif here.uri.startswith("sqlite"):
        why = "is of a SQLite file on this machine, which the job cannot reach"
    else:
        why = f"is not sent, since it is of no http(s) server ({urlsplit(here.uri).scheme or here.uri})"
    return Address(""), f"{SERVER} {why}: {home}"


def _is_old(py_version: str) -> bool:
    return not re.fullmatch(r"py3(1[1-9]|[2-9]\d)", py_version)


def _to_change(path: Path, refused: str, changes: list[str], values: dict[str, Any]) -> str:
    """A sentence with all that must change in a YAML as accelerate writes it, so that one round of changes is enough."""
    versions = SimpleNamespace(**{key: values.get(key, default) for key, default in VERSIONS.items()})
    if not values.get("image_uri") and _is_old(str(versions.py_version)):
        changes = [*changes, *version_changes(versions)]
    return f"{path} has {refused}, which these scripts cannot use; in it {', '.join(changes)}"


def read_inside(path: Path) -> dict[str, Any]:
    """The YAML that holds in the containers. Raises `UserError` where it is not one, or names what is not sent or not run."""
    values = read_mapping(path)
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise UserError(f"--inside {path} is for SageMaker itself; name one for machines, such as deepspeed_zero2.yaml")
    zero = values.get("deepspeed_config") or {}
    if values.get("distributed_type") == "DEEPSPEED" and (not isinstance(zero, dict) or zero.get("zero_stage") != 2):
        raise UserError(
            f"--inside {path}: deepspeed_config needs zero_stage: 2, and no file of its own; take deepspeed_zero2.yaml"
        )
    return values


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; raises `UserError` where there is none."""
    try:
        values = read_yaml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give an accelerate YAML") from None
    if values is None:
        raise UserError(
            f"{path} is empty; give keys such as compute_environment, mixed_precision and num_machines, or have "
            f"accelerate config --config_file {path} write them"
        )
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, not {str(values)[:40]!r}; write key: value, one per line")
    return values


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


# --- The training command --------------------------------------------------------------------------------------------


@dataclass
class Command:
    """A training script with its arguments as typed, and what they mean."""

    script: str  # file name in scripts/
    arguments: list[str]
    recipe: Recipe | None  # as the script will parse it; None: a script of the user's own


def read_command(words: list[str]) -> Command:
    """Check the words after the launcher's options as the script itself will. Raises `UserError`; exits with 2 as it would."""
    if not words:
        raise UserError(
            "no training script: give one after the options, such as scripts/train_unet.py --config flowers"
        )
    script = Path(words[0])
    if script.resolve().parent != ROOT / "scripts" or script.suffix != ".py":
        raise UserError(f"{words[0]} is not a script in {ROOT / 'scripts'}; only that folder is sent, so put it there")
    if not script.is_file():
        raise UserError(f"{words[0]} does not exist; check its name")
    sections, arguments = SECTIONS.get(script.name), words[1:]
    if any(redact(word) != word for word in [*arguments, " ".join(arguments)]):
        raise UserError(
            "an argument looks like a credential, which the job's log would show; leave it out, and export HF_TOKEN or "
            "MLFLOW_TRACKING_PASSWORD where you launch"
        )
    if script.name in AT_HOME:
        raise UserError(f"{script.name} is for this machine; what trains on SageMaker is one of {', '.join(SECTIONS)}")
    recipe = parse(sections, f"{script.name}, before it is sent to SageMaker", arguments) if sections else None
    config = option(arguments, "config")
    if config and Path(config).suffix and redact(text := Path(config).read_text(encoding="utf-8")) != text:
        raise UserError(f"{config} holds what looks like a credential, and would be sent along; take it out")
    return Command(script.name, arguments, recipe)


def takes(script: str, name: str) -> bool:
    """Whether a script has the option `name` of `FOLDERS`."""
    section, sections = FOLDERS[name][0], SECTIONS.get(script, ())
    return section in sections or (section == "data" and "source" in sections)


def local_inputs(command: Command, config: SageMakerConfig) -> dict[str, str]:
    """What the job reads beside the Hub, `{channel: folder here or s3://…}`: named by options, recipe or the inputs file."""
    found = {}
    if config.sagemaker_inputs_file:
        found = read_table(config.sagemaker_inputs_file, "sagemaker_inputs_file")
    for name, (section, part) in FOLDERS.items():
        value = getattr(getattr(command.recipe, section), name) if takes(command.script, name) else None
        if not value:
            continue
        folder = _expanded(value)
        if value.startswith("s3://"):
            found[name] = value
        elif folder.is_dir():
            parts = [folder / part, folder / "pipeline" / part] if part else []
            found[name] = str(next((inner for inner in parts if inner.is_dir()), folder.resolve()))
        elif folder.exists():
            raise UserError(f"--{name} {value} is a file; give the folder that holds it")
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) or value.startswith("."):
            raise UserError(f"--{name} {value} is not here; give a folder, an s3:// folder or a Hub id")
    for channel, value in found.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", channel) or channel in ("code", "sm_drivers"):
            raise UserError(
                f"{channel!r} cannot be a channel's name; use letters, digits and '_'"
            )  # a shell variable's
        if not value.startswith("s3://"):
            if not _expanded(value).is_dir():
                raise UserError(f"{value} (channel {channel}) is neither a folder here nor s3://…; correct the path")
            found[channel] = str(_expanded(value))
    if command.recipe and not (command.recipe.data.dataset or "dataset" in found):
        raise UserError(
            "no data set: give --dataset with a Hub id, an s3:// folder or a folder here, or --config flowers"
        )
    if command.script == "caption_to_hub.py" and config.num_machines > 1:
        raise UserError("captions are kept in one folder, which two machines do not share; set num_machines: 1")
    return found


def _expanded(value: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError:  # ~ of a user who is not here
        return Path(value)


def container_arguments(command: Command, inputs: dict[str, str]) -> list[str]:
    """The arguments as typed, then those that hold in the container: channels for folders, and where results go."""
    words = list(command.arguments)
    config = option(words, "config")
    if config and Path(config).suffix:  # a recipe of the user's own travels along
        words += ["--config", "recipe.yaml"]
    sent = [name for name in FOLDERS if name in inputs and takes(command.script, name)]
    words += [word for name in sent for word in (f"--{name}", f"{CHANNELS}/{name}")]
    if command.recipe:
        words += ["--output_dir", RUN]
        if "data" in SECTIONS[command.script]:
            words += ["--cache_dir", CACHE]
    return words


def hash_folder(folder: Path) -> tuple[str, list[Path]]:
    """First 16 hex digits of a hash of a folder's files (paths and contents), and the files; hidden ones are left out."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise UserError(f"{folder} holds no files; give the folder that does")
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
    return total.hexdigest()[:16], files


# --- What is sent ----------------------------------------------------------------------------------------------------


def stage(folder: Path, command: Command, config: SageMakerConfig, inside: Path, inputs: dict[str, str]) -> None:
    """Lay out what the container gets: scripts/, the inner YAML, the cards' templates, the revision and job.json."""
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=ignore)
    shutil.copytree(ROOT / "datasets_card", folder / "datasets_card", ignore=ignore)
    if is_managed(tracking_server(config)[0].uri):  # no other job needs the package
        with open(folder / "scripts" / "requirements.txt", "a", encoding="utf-8") as file:
            file.write(f"{MANAGED_MLFLOW}=={version(MANAGED_MLFLOW)}  # SageMaker's managed MLflow\n")
    shutil.copyfile(inside, folder / "accelerate.yaml")
    recipe = option(command.arguments, "config")
    if recipe and Path(recipe).suffix:
        shutil.copyfile(recipe, folder / "recipe.yaml")
    write_text(folder / "REVISION", code_revision() + "\n")
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
