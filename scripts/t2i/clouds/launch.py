"""Share the steps of all cloud launchers: checks before the job, credentials, tracking, and the user's consent.

This module imports no torch.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from t2i.captions.ledger import is_inspection
from t2i.clouds.staging import FOLDERS, Command
from t2i.config import REVISIONS, run_of
from t2i.errors import UserError
from t2i.files import read_optional
from t2i.redaction import redact
from t2i.runs import find_teacher_run
from t2i.tracking.addresses import Address, is_managed, split_uri

SERVER = "MLFLOW_TRACKING_URI"
# Variables of this shell that are sent along unless the cloud's YAML sets them.
FORWARDED = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
             "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING")  # fmt: skip
# Variables of this shell that are sent along only with a server's address.
OF_A_SERVER = ("MLFLOW_RUN_ID",)
SECRET_NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
SECRET_WORDS = ("KEY", "PASS", "PWD", "AUTH", "WEBHOOK")  # last words of names that `redact` does not take for secret
CURVES_AT_HOME = "--fetch brings the job's curves home"


def positive(kind: Any) -> Any:
    """Return an argparse type that accepts finite numbers above zero."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if 0 < (value := kind(text)) < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number above zero")

    return parse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all launchers share, and the training command, to a launcher's parser."""
    parser.add_argument(
        "--dry_run", action="store_true", help="print the plan and the job's request as JSON, and send nothing"
    )
    parser.add_argument("--yes", action="store_true", help="submit the job without asking")
    parser.add_argument("--wait", action="store_true", help="follow the job's log until it ends")
    parser.add_argument("--train_images", type=positive(int), help="number of training images, for the cost estimate")
    parser.add_argument(
        "--samples_per_second",
        type=positive(float),
        help="measured speed of the job in samples per second, for the cost estimate",
    )
    parser.add_argument(
        "--fetch", metavar="JOB", help="fetch the result of the job with this name instead of submitting a job"
    )
    parser.add_argument("--stop", metavar="JOB", help="stop the job with this name, which keeps its checkpoints")
    parser.add_argument("--output_dir", help="folder into which --fetch writes the result (default: outputs/JOB)")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="scripts/X.py …", help="training script and its arguments"
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise `UserError` if the options ask for several things at once, of which a launcher would do only one."""
    asked = [f"--{name}" for name in ("stop", "fetch") if getattr(options, name)]
    asked += ["--dry_run"] if options.dry_run else []
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other; give one of them")
    if options.command and asked not in ([], ["--dry_run"]):
        raise UserError(f"{asked[0]} submits nothing; leave out {options.command[0]}")


def check_environment(environment: dict[str, str], file: Path, fix: str, allowed: tuple[str, ...] = ()) -> None:
    """Raise `UserError` if the environment variables of a cloud's YAML hold a credential or a local MLflow server.

    Args:
        environment: environment variables by name.
        file: path of the cloud's YAML, for messages.
        fix: words on where a credential belongs, for messages.
        allowed: names of variables that are never credentials.
    """
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"{file}: environment holds {name!r}, which is no name of a variable; correct it")
    shown = {name: f"{name}={value}" for name, value in environment.items() if name not in allowed}
    secret = [name for name, line in shown.items() if _names_secret(name) or redact(line) != line]
    if secret:
        raise UserError(
            f"{file}: environment holds a credential in {secret[0]}, which the request shows in plain text; {fix}"
        )
    server = environment.get(SERVER, "").strip()
    if server and split_uri(server, f"{file}: {SERVER} in environment").is_local:
        raise UserError(
            f"{file}: {SERVER} in environment is {server}, which means the job's own machine inside the job; "
            "give the server's address on the network"
        )


def _names_secret(name: str) -> bool:
    """Return whether a variable's name ends like that of a credential, such as WANDB_KEY."""
    return name in SECRET_NAMES or name.upper().rpartition("_")[2] in SECRET_WORDS


def precision_note(machine: str, own: str | None, inner: dict[str, Any]) -> str:
    """Return a note if the job's precision is slow on the machine, otherwise "".

    Args:
        machine: the instance type or flavor. GPUs older than Ampere have no units for bf16.
        own: precision in the YAML that submits the job, or None.
        inner: the YAML for the containers, from `staging.read_inside`.
    """
    if (own or inner.get("mixed_precision")) != "bf16" or not re.match(r"ml\.(g4dn|p2|p3|p3dn)\.|t4-", machine):
        return ""
    return (
        f"the GPUs of {machine} have no bf16 units, so mixed_precision bf16 is slow there; set mixed_precision: fp16"
        f"{'' if own else ' in the YAML that submits the job'}"
    )


def check_push(command: Command, token_travels: bool) -> None:
    """Raise `UserError` if the Hub would refuse, at the job's end, the push that the arguments ask for.

    The access of the token is checked only if `token_travels`, that is, if the job gets the token of this shell.
    """
    settings = command.settings
    if settings is None or not getattr(settings, "push_to_hub", False):
        return
    from t2i.hub import upload  # imports huggingface_hub, which only a push needs

    captions = command.script == "caption_to_hub.py"
    option = "hub_dataset_id" if captions else "hub_model_id"
    repo_id = upload.check_repo_id(getattr(settings, option), f"--{option}")
    upload.check_license(settings.license or None)
    if token_travels:
        target = upload.Target(settings.hub_revision, settings.create_pr)
        say = partial(print, file=sys.stderr)
        upload.check_access(repo_id, "dataset" if captions else "model", say, target)


def check_hub_ids(command: Command, inputs: dict[str, str], token: str) -> str:
    """Check that the job will find the data set and the models that its command names on the Hub.

    Args:
        inputs: folders that are sent, by option.
        token: the Hub's token that the job gets, or "".

    Returns:
        A note on what could not be checked, since the Hub did not answer, or "".

    Raises:
        UserError: the Hub does not show a data set or model to this token.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from t2i.hub import upload
    from t2i.loading import explain_loading

    ids = list(_hub_ids(command, inputs))
    for number, (option, name, revision) in enumerate(ids):
        kind: Literal["dataset", "model"] = "dataset" if option == "dataset" else "model"
        try:
            with upload.limited(upload.CHECK_S):
                api = HfApi(token=token or False)
                if api.repo_info(name, revision=revision, repo_type=kind).gated:
                    api.auth_check(name, repo_type=kind)
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:  # all that huggingface_hub raises
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            why = explain_loading(error, name, revision, kind) if status in (401, 403, 404) else None
            if status in (401, 403) and not token:
                why = (
                    f"the Hub does not show {name} to a job without a token; correct the name, or export HF_TOKEN (the token of "
                    "hf auth login is not sent)"
                )
            if why is None:
                rest = ", ".join(f"--{option} {name}" for option, name, _ in ids[number:])
                return f"the Hub does not answer now, so nobody checked whether the job can read {rest}"
            raise UserError(f"--{option} {name}: {why}") from None
    return ""


def _hub_ids(command: Command, inputs: dict[str, str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield option, Hub id and revision of each data set and model that the job itself will download."""
    for option, value in command.folder_options().items():
        section = getattr(command.recipe, FOLDERS[option][0])
        is_used = getattr(section, option.replace("_network", "_weight"), True)  # of the networks of losses
        if option in inputs or option == "audit_tokenizer" or not is_used:  # an audit does without the tokenizer
            continue
        names = section.captioner if option == "captioner" else [value]
        key = "captioner_revision" if option == "captioner" else REVISIONS.get(option, "")
        yield from (
            (option, name, getattr(section, key, None))
            for name in names
            if name not in ("label", "existing", "florence2")
        )


def confirm(yes: bool) -> None:
    """Ask on the terminal whether to submit the job, unless `yes` is set.

    Any answer but yes to the question raises `UserError`.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "no terminal is attached to confirm; add --yes (make: YES=1), or look first with --dry_run (DRY_RUN=1)"
        )
    try:
        answer = input("submit? [y/N] ")
    except (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
        print()
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("the job was not submitted, and nothing was sent")


def tracking_server(named: str | None) -> tuple[Address, str]:
    """Return the MLflow server that the job records to, and what a user should know of it.

    Args:
        named: `MLFLOW_TRACKING_URI` in the cloud's YAML. With None, use this shell's variable `MLFLOW_TRACKING_URI`.

    Returns:
        First, the server's address, with a user and password only from this shell. The address's `uri` is empty if the
            job gets no server. Second, a note for the user, or "".

    Raises:
        UserError: the job cannot use the address that this shell names.
    """
    exported = os.environ.get(SERVER, "").strip()
    try:
        here = split_uri(exported) if exported else Address("")
    except UserError:
        if named is None:
            raise
        here = Address("")
    if named is not None:
        there = split_uri(named) if named.strip() else Address("")
        if here.user and urlsplit(here.uri).hostname == urlsplit(there.uri).hostname:
            there = Address(there.uri, here.user, here.password)
        lost = not named.strip() or there.uri.startswith("sqlite")
        return there, f"{SERVER} of the YAML names no server: {CURVES_AT_HOME}" if lost else ""
    if is_managed(here.uri) or (here.is_server and not here.is_local):
        return here, ""
    if not here.uri:
        return here, f"{SERVER} is not set, so no MLflow server follows the job: {CURVES_AT_HOME}"
    if here.is_local:
        why = "names a server on this machine, which the job cannot reach"
    elif here.uri.startswith("sqlite"):
        why = "names a SQLite file on this machine, which the job cannot reach"
    else:
        why = f"is not sent, since it names no http(s) server ({urlsplit(here.uri).scheme or here.uri})"
    return Address(""), f"{SERVER} {why}: {CURVES_AT_HOME}"


def forwarded_variables(server: Address, environment: dict[str, str]) -> dict[str, str]:
    """Return the container's environment variables: from the cloud's YAML, the MLflow server, and this shell's
    variables for MLflow.
    """
    variables = dict(environment)
    names: tuple[str, ...] = FORWARDED
    if server.uri:
        variables[SERVER] = server.uri
        names += OF_A_SERVER
    for name in names:
        if value := os.environ.get(name, "").strip():
            variables.setdefault(name, value)
    return variables


def secrets_here(server: Address) -> dict[str, str]:
    """Return the credentials of this shell that the job needs, for the Hub and for the MLflow server."""
    secrets = {name: os.environ[name] for name in SECRET_NAMES if os.environ.get(name)}
    if server.user:
        secrets["MLFLOW_TRACKING_USERNAME"] = server.user
    if server.password:
        secrets["MLFLOW_TRACKING_PASSWORD"] = server.password
    return secrets


def as_written(values: dict[str, Any], source: Any) -> dict[str, Any]:
    """Return the values of a section with environment and tags as texts, exactly as the YAML spells them, such as 0042.

    Args:
        values: the section as YAML reads it.
        source: the same section as `yaml.BaseLoader` reads it, which keeps every text.
    """

    def text(value: Any, written: Any) -> Any:
        if isinstance(value, dict) and isinstance(written, dict):
            return {key: text(inner, written.get(str(key))) for key, inner in value.items()}
        if isinstance(value, list) and isinstance(written, list):
            return [text(*pair) for pair in zip(value, written, strict=True)]
        return written if isinstance(written, str) and value is not None and not isinstance(value, str) else value

    return values | {key: text(values[key], source.get(key)) for key in ("tags", "environment") if key in values}


# --- Jobs ------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A job of a cloud, for `make jobs`."""

    name: str
    state: str
    machine: str
    usd: float | None  # Cost so far. None if the price of the machine is unknown.
    fetch: str  # Command that fetches the job's result.


def usd_so_far(usd_per_hour: float | None, seconds: float | None, machines: int = 1) -> float | None:
    """Return the cost in USD of machines that ran for some seconds, or None if their price is unknown."""
    return None if usd_per_hour is None else usd_per_hour * machines * (seconds or 0) / 3600


def job_table(jobs: list[Job]) -> list[str]:
    """Return a table of jobs as lines for the terminal."""
    rows = [("job", "state", "machine", "USD so far", "fetch with")]
    rows += [
        (job.name, job.state, job.machine, "unknown" if job.usd is None else f"{job.usd:.2f}", job.fetch)
        for job in jobs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# --- Fetching --------------------------------------------------------------------------------------------------------


@contextmanager
def fetched_into(folder: Path) -> Iterator[Path]:
    """Give a folder to download a job's result to. At the end of the `with` block it becomes `folder`.

    An interrupted fetch leaves no `folder`, and can be repeated. An existing `folder` raises `UserError`.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; give another --output_dir, or delete it")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    os.replace(part, folder)


def is_result(name: str) -> bool:
    """Return whether a file of a run folder, given by its relative path, is fetched.

    Checkpoints and hidden files are not fetched, except the hidden file that lets a captioning resume.
    """
    parts = PurePosixPath(name).parts
    inside = bool(parts) and ".." not in parts and not name.startswith("/") and not name.endswith("/")
    return inside and (is_inspection(name) or not parts[0].startswith((".", "checkpoint-", "node-")))


def place_of_student(command: Command, job: str) -> str:
    """Return the option by which `--fetch` puts a student beside its teacher's run, or "" for other results."""
    run = run_of(command.settings.model) if command.teacher else None
    if run is None:
        return ""
    folder = (run if run.name else run.resolve()).parent / "turbo"
    return f" --output_dir {shlex.quote(str(folder.with_name(job) if folder.exists() else folder))}"


def say_fetched(folder: Path, bad_end: str, followed: bool) -> None:
    """Print what a fetched run folder holds, the command that draws with its model, and how the job ended.

    Args:
        folder: the fetched run folder.
        bad_end: how the job ended that did not complete, or "".
        followed: whether the user waited for the job's end. A bad end of such a job raises `UserError`.
    """
    models = [name for name in ("pipeline", "vae") if (folder / name).is_dir()]
    print(f"{folder}: {', '.join(models) or 'no model'}; show it with streamlit run dashboard")
    if "pipeline" in models:
        print(f"python scripts/generate_images.py --model {shlex.quote(str(folder))} --prompt …")
    state = read_optional(folder / "run.json")
    if state.get("student") and state.get("status") == "finished":
        teacher = find_teacher_run(folder)
        print(
            f"{folder} is the student of {teacher}, whose preset turbo draws with it"
            if teacher
            else f"{folder} is a student; move it beside the run whose finished model taught it, and preset turbo of that run "
            "draws with it"
        )
    if bad_end and followed:
        raise UserError(bad_end)
    if bad_end:
        print(bad_end)
