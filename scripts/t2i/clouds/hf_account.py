"""Ask the Hub about a user's account, jobs and runs, and upload what a job needs. This module imports no torch."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, JobHardware, JobInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from t2i.clouds import costs, launch
from t2i.clouds.hf_job import COMMAND_LABEL, LABEL, PRICES, HfJobsConfig, Payer
from t2i.clouds.mirror import CAPTIONS, resumes_from
from t2i.config_types import known_key
from t2i.errors import UserError
from t2i.files import read_json
from t2i.hub import upload
from t2i.redaction import redact

ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
NO_TOKEN = "there is no token for the Hub; run `hf auth login`, or set HF_TOKEN"


@dataclass
class Account:
    """A user's account on the Hub, as far as the Hub tells."""

    api: HfApi
    namespace: str = ""  # User or organization that runs and pays for the job.
    token: str = ""
    usd_per_hour: dict[str, float] = field(default_factory=dict)  # Today's prices by flavor. Empty if unknown.
    gpus: dict[str, int] = field(default_factory=dict)  # Numbers of GPUs by flavor. Empty if unknown.
    missing: list[str] = field(default_factory=list)  # What a job lacks, in sentences.

    def require(self) -> None:
        """Raise `UserError` if the Hub cannot be asked for jobs of this account."""
        if self.missing:
            raise UserError("; ".join(self.missing))


@contextmanager
def in_words(begin: str = "", end: str = "") -> Iterator[None]:
    """Turn the errors of huggingface_hub inside the `with` block into `UserError`, between two texts."""
    try:
        yield
    except (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        httpx2.HTTPError,
        ConnectionError,
        TimeoutError,
        JSONDecodeError,
    ) as error:
        raise UserError(f"{begin}{explain(error)}{end}") from None


def explain(error: Exception) -> str:
    """Return one sentence on an error of huggingface_hub, with its fix."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, JSONDecodeError):
        return "the Hub's answer is no JSON, so it may come from a proxy; check the network and HF_ENDPOINT"
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({_brief(error)}); check the network and HF_ENDPOINT"
    status = error.response.status_code
    told = f"{status}: {redact(' '.join((error.server_message or error.response.reason_phrase).split()))[:300]}"
    fixes: dict[int, str] = {
        HTTPStatus.UNAUTHORIZED: "the Hub does not accept the token ({}); run `hf auth login`, or correct HF_TOKEN",
        HTTPStatus.PAYMENT_REQUIRED: "the account has no credit for Jobs ({}); add some at https://huggingface.co/settings/billing",
        HTTPStatus.FORBIDDEN: "the token may not do this ({}); give it the right to run jobs and to write repositories at "
        "https://huggingface.co/settings/tokens",
        HTTPStatus.NOT_FOUND: "the Hub knows no such job ({}); check its name and the namespace in the YAML",
        HTTPStatus.TOO_MANY_REQUESTS: "the account has reached its quota ({}); wait until one of its jobs has ended, and launch again",
    }
    if status >= 500:
        return f"the Hub is busy ({told}); launch again in a few minutes"
    return fixes.get(status, "the Hub refuses the request ({}); correct flavor, image or timeout in the YAML").format(
        told
    )


def _brief(error: Exception) -> str:
    return redact(" ".join(str(error).split()) or type(error).__name__)[:200]


def look(config: Payer) -> Account:
    """Ask the Hub for the account. What a job lacks is listed in `missing`."""
    token = get_token() or ""
    account = Account(HfApi(token=token or False), config.namespace or "", token)
    if not token:
        account.missing.append(NO_TOKEN)
    elif not token.isascii():
        account.missing.append("HF_TOKEN holds letters that no token has; copy it again, or run `hf auth login`")
    else:
        try:
            with in_words():
                user = account.api.whoami()
        except UserError as error:
            account.missing.append(str(error))
            return account
        account.namespace = config.namespace or str(user["name"])
        if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            account.missing.append(
                f"the token of {user['name']} may only read; run `hf auth login` with a token that may write"
            )
    return account


def ask_hardware(account: Account) -> None:
    """Ask the Hub for the kinds of machines, with today's prices. An unreachable Hub is listed in `missing`."""
    hours = {"minute": 60.0, "hour": 1.0, "second": 3600.0}
    try:
        with in_words():
            machines = account.api.list_jobs_hardware()
    except UserError as error:
        account.missing += [str(error)] if str(error) not in account.missing else []
        return
    known = [machine for machine in machines if machine.unit_label in hours]
    account.usd_per_hour = {machine.name: machine.unit_cost_usd * hours[machine.unit_label] for machine in known}
    account.gpus = {
        machine.name: int(machine.accelerator.quantity) if machine.accelerator else 0 for machine in machines
    }


def check_flavor(config: HfJobsConfig, account: Account) -> None:
    """Raise `UserError` if the flavor does not exist."""
    flavors = list(account.usd_per_hour) or [kind.value for kind in JobHardware]
    known_key(config.flavor, dict.fromkeys(flavors), "flavor in the YAML")


def count_gpus(flavor: str, prices: costs.Prices, account: Account) -> int | None:
    """Return the number of GPUs of a flavor by the price file, the Hub or its name, or None if none of them tells."""
    if flavor in prices.instances:
        return prices.instances[flavor].gpus
    if flavor in account.gpus:
        return account.gpus[flavor]
    several = re.search(r"x(\d+)$", flavor)
    return 0 if flavor.startswith("cpu-") else int(several[1]) if several else None


def renew_prices(prices: costs.Prices, account: Account) -> None:
    """Replace the prices of the price file by the Hub's prices of today, if the Hub told them."""
    for name, usd in account.usd_per_hour.items():
        prices.as_of = datetime.now(UTC).date()
        if name in prices.instances:
            prices.instances[name].usd_per_hour = usd
        else:
            prices.others[name] = usd


@dataclass
class Run:
    """The run of a command, as far as its repository and its jobs tell. A missing repository has no run."""

    newest: str = ""  # Name of the newest checkpoint, or of the file of captions.
    active: str = ""  # Job that is at work on the run.
    finished_by: str = ""  # Job that finished the run by the same command.
    completed: str = ""  # Job that finished the run last, by any of its commands.
    steps: int | None = None  # Length of the run in weight updates.
    global_batch: int | None = None  # Samples per weight update of the run.


def find_run(account: Account, repo_id: str, command: str) -> Run:
    """Look up the run that a repository keeps, and its jobs.

    Args:
        command: `hf_job.command_hash` of the command that shall run. A longer one extends a finished run.
    """
    run = Run()
    if account.missing or not account.api.repo_exists(repo_id):
        return run
    run.newest = resumes_from(account.api, repo_id)
    labels = {LABEL: repo_id.split("/")[1]}
    jobs = list(account.api.list_jobs(labels=labels, namespace=account.namespace))
    jobs.sort(key=lambda job: job.created_at or datetime.min.replace(tzinfo=UTC))
    run.active = next((job.id for job in jobs if _text(job.status.stage) not in ENDED), "")
    if account.api.file_exists(repo_id, "run/run.json"):
        state = read_json(Path(account.api.hf_hub_download(repo_id, "run/run.json")))
        identity = state.get("identity") or {}
        run.steps, run.global_batch = identity.get("steps"), identity.get("global_batch")
        # A finished captioning may be repeated: photos may have been added.
        if state.get("status") == "finished" and run.newest != CAPTIONS:
            done = [job for job in jobs if _text(job.status.stage) == "COMPLETED"]
            run.completed = done[-1].id if done else ""
            run.finished_by = next((job.id for job in done if (job.labels or {}).get(COMMAND_LABEL) == command), "")
    return run


def upload_inputs(
    account: Account, inputs: dict[str, str], hashes: dict[str, str], files: dict[str, list[str]]
) -> dict[str, str]:
    """Upload each input folder to a private repository that its content names, and return the repositories by option.

    An equal folder is uploaded only once.

    Args:
        files: names of the files to upload, by option. Of other options, all files are uploaded.
    """
    repositories = {name: input_repository(account.namespace, hashes[name]) for name in inputs}
    for name, folder in inputs.items():
        if not account.api.repo_exists(repositories[name], repo_type="dataset"):
            print(f"uploading {folder} to {repositories[name]}", flush=True)
        upload.push_folder(
            Path(folder),
            repositories[name],
            "dataset",
            files=files.get(name, ["*"]),
            message=f"input {hashes[name]} of jobs",
        )
    return repositories


def input_repository(namespace: str, digest: str) -> str:
    """Return the repository of an input folder with this hash."""
    return f"{namespace}/t2i-input-{digest}"


def upload_code(folder: Path, repo_id: str) -> str:
    """Upload the staged code to the repository of the run, and return the commit."""
    try:
        return upload.push_folder(folder, repo_id, "model", files=["code/*"], message="code of a job").commit
    except upload.HubError as error:
        raise UserError(f"no job was submitted: {str(error).replace(f'; {folder} is unchanged', '')}") from None


def describe_end(api: HfApi, job: JobInfo) -> str:
    """Return how a job ended that did not complete, and how its run resumes, in one sentence."""
    repo_id = repository_of(job)
    why = redact(" ".join((job.status.message or "no reason given").split()))[:300]
    stage = _text(job.status.stage)
    if stage == "ERROR" and not (job.durations and job.durations.running_secs) and not job.started_at:
        return f"{job.id} never started ({why}); check image {job.docker_image or job.space_id} and flavor in the YAML"
    newest = resumes_from(api, repo_id) if repo_id and api.repo_exists(repo_id) else ""
    resumes = f"{newest} is in {repo_id}, and the same command resumes from it" if newest else "it left no checkpoint"
    return f"{job.id} ended as {stage} ({why}); {resumes}"


def repository_of(job: JobInfo) -> str:
    """Return the repository that keeps a job's run, or "" for a job that this suite did not submit."""
    name = (job.labels or {}).get(LABEL)
    return f"{job.owner.name}/{name}" if name else ""


def jobs(account: Account, file: Path) -> list[launch.Job]:
    """Return this suite's jobs of the account. `file` is the YAML of the commands that fetch them."""
    account.require()
    ask_hardware(account)  # without it, the file's prices hold
    prices = costs.read_prices(PRICES).usd_per_hour | account.usd_per_hour
    found = []
    for job in account.api.list_jobs(namespace=account.namespace):
        if repository_of(job):
            flavor, ran = _text(job.flavor), job.durations.running_secs if job.durations else None
            fetch = f"python scripts/launch_hf_job.py --config_file {shlex.quote(str(file))} --fetch {job.id}"
            usd = launch.usd_so_far(prices.get(flavor), ran)
            found.append(launch.Job(job.id, _text(job.status.stage), flavor, usd, fetch))
    return found


def _text(value: Any) -> str:
    """Return the text of a value that huggingface_hub may give as a member of an enumeration."""
    return str(getattr(value, "value", value))
