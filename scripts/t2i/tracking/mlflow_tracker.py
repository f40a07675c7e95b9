"""MLflow that never stops or slows a training run.

Everything is first appended to `<run_dir>/mlflow_spool.jsonl` (pictures and files go to `<run_dir>/mlflow_spool/`);
a daemon thread sends it on. The training loop pays for one short write. A server that is down costs seconds at the
start; its records stay in the spool and arrive once, in order, when it is back: in this process, or at the next start
on the same folder. What is sent twice because an answer was lost is the same row or file there: times and names are
fixed when it is recorded.

The default server is `sqlite:///mlflow.db` in the working directory, with artifacts in `mlruns/` beside the database.
`MLFLOW_TRACKING_URI` names another; a user and password in its URL are used for the connection and recorded nowhere.

MLflow's own variables hold here too: `MLFLOW_EXPERIMENT_NAME` and `MLFLOW_RUN_NAME` where the settings name none,
`MLFLOW_RUN_ID` for a folder that has no run yet, and `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING` with its sampling interval.
"""

import atexit
import json
import os
import re
import shutil
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from t2i.errors import UserError
from t2i.files import write_json
from t2i.redaction import redact, redact_config, remember_secret

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "t2i"
MANAGED_MLFLOW = "sagemaker-mlflow"  # the package that speaks to SageMaker's managed MLflow
_MANAGED = re.compile(r"arn:aws[\w-]*:sagemaker:[a-z0-9-]+:\d{12}:mlflow-(tracking-server|app)/[\w-]+")
SPOOL_FILE = "mlflow_spool.jsonl"
SPOOL_FOLDER = "mlflow_spool"

SEND_EVERY_S = 2.0  # sending holds the interpreter for about 20 ms: 1 % of this
RETRY_AT_MOST_EVERY_S = 30.0  # seconds between attempts at a server that stays down
START_WAIT_S = 5.0  # longest wait for a server's first answer
START_WAIT_DATABASE_S = 60.0  # a new database makes its tables in about 5 s, longer where the machine is busy
FINISH_WAIT_S = 10.0

# Limits of an MLflow server.
METRICS_A_BATCH = 1000
PARAMS_A_BATCH = 100
KEY_CHARACTERS = 250
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000

TEXT_SUFFIXES = {".yaml", ".yml", ".json", ".jsonl", ".txt", ".md", ".csv", ".log", ".toml", ".ini", ".cfg"}


def _say(text: str) -> None:
    from tqdm import tqdm  # its write leaves progress bars whole

    tqdm.write(redact(text), file=sys.stderr)


# --- Where to send ---------------------------------------------------------------------------------------------------


_ENCODED = "write / ? # @ of the password as %2F %3F %23 %40"
_OR_VARIABLES = ", or give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"  # for http(s) servers alone


@dataclass(frozen=True)
class Address:
    """A tracking URI taken apart."""

    uri: str  # without user and password, if it is of an http(s) server
    user: str = ""
    password: str = ""

    @property
    def is_server(self) -> bool:
        """Whether it is of a server that is reached over HTTP."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def is_local(self) -> bool:
        """Whether it is of a server on this machine, which other machines do not reach by this address."""
        host = (urlsplit(self.uri).hostname or "").rstrip(".")
        number = re.fullmatch(r"127(\.\d+){1,3}|0|0\.0\.0\.0|::1?|::ffff:127.*", host)
        return bool(number) or host == "localhost" or host.endswith(".localhost")


def split_uri(uri: str, name: str = "MLFLOW_TRACKING_URI") -> Address:
    """Take a tracking URI apart, and change nothing.

    name: what it is called in a message. Raises `UserError` with the fix if MLflow cannot use it; the sentence shows no
    part of a password.
    """
    uri = uri.strip()
    cut = re.match(r"(?i)https?:/*[^/?#]*(.*)", uri, re.DOTALL)
    if cut and "@" in cut[1]:  # the user and password reach up to this @, but a URL's server ends at the first / ? #
        raise UserError(f"{name} has an @ after its server's name; {_ENCODED}{_OR_VARIABLES}")
    try:
        parts = urlsplit(uri)
    except ValueError:  # its words are not shown: they may hold a part of a password
        raise UserError(f"{name} is no address: [ and ] are for IPv6; write those of a password as %5B %5D") from None
    try:
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        example = f"{parts.scheme}://host:port" + ("" if cut else "/database")
        fix = f"give {example}; if it has a password, {_ENCODED}{_OR_VARIABLES if cut else ''}"
        raise UserError(f"{name} has no valid port (1 to 65535); {fix}") from None
    _check_address(uri, name)
    if parts.scheme not in ("http", "https"):
        return Address(uri)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return Address(bare, unquote(parts.username or ""), unquote(parts.password or ""))


def resolve_uri(tracking_uri: str | None) -> str:
    """The tracking URI to connect to, without user and password, which go to MLflow's own environment variables."""
    given = (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "").strip() or DEFAULT_TRACKING_URI
    address = split_uri(given)
    parts = urlsplit(given)
    if parts.password:
        remember_secret(parts.password)
    if address.is_server and "@" in parts.netloc:
        os.environ["MLFLOW_TRACKING_USERNAME"] = address.user
        if address.password:
            os.environ["MLFLOW_TRACKING_PASSWORD"] = address.password
        if os.environ.get("MLFLOW_TRACKING_URI", "").strip() == given:
            os.environ["MLFLOW_TRACKING_URI"] = address.uri  # child processes find the password in the other two
    return address.uri


def _check_address(uri: str, name: str) -> None:
    """Raise `UserError` with the address that is meant, where `uri` is none that MLflow 3 can write to."""
    parts = urlsplit(uri)
    scheme, bare = parts.scheme.partition("+")[0], uri.rpartition("@")[2]
    shown = f"{name}={redact(uri) if '://' in uri or '@' not in uri else '[redacted]@' + bare}"
    if scheme in ("http", "https"):
        if not parts.hostname:
            raise UserError(f"{shown} names no host; give {scheme}://host:port")
        return
    if scheme in ("sqlite", "postgresql", "postgres", "mysql", "mssql", "databricks") and not uri.startswith(scheme):
        fix = f"{scheme}{uri[len(scheme) :]}" if "@" not in uri else f"{scheme}://…"
        raise UserError(f"{shown} begins with capitals, which MLflow does not know; give {fix}")
    if scheme == "sqlite":
        file = re.sub(r"^sqlite(\+\w+)?:/*", "", uri)
        if not file or file == ":memory:":
            raise UserError(f"{shown} names no file, and so keeps nothing; give {DEFAULT_TRACKING_URI}")
        if not re.match(r"sqlite(\+\w+)?:///", uri):
            raise UserError(
                f"{shown} lacks slashes; give sqlite:///{file}, or sqlite:////{file} for a path from the root"
            )
        return
    if scheme == "postgres":
        raise UserError(f"{shown} begins with postgres://, which SQLAlchemy does not know; give postgresql://…")
    if scheme in ("postgresql", "mysql", "mssql") or uri.startswith("databricks"):
        return
    if scheme == "arn":
        if not is_managed(uri):
            raise UserError(
                f"{shown} is no ARN of SageMaker's managed MLflow; give "
                "arn:aws:sagemaker:REGION:ACCOUNT:mlflow-tracking-server/NAME, or …:mlflow-app/ID"
            )
        if scheme not in {entry.name for entry in entry_points(group="mlflow.tracking_store")}:
            raise UserError(
                f"{shown} is SageMaker's managed MLflow, which needs a package: pip install {MANAGED_MLFLOW}"
            )
        return
    if scheme and scheme in {entry.name for entry in entry_points(group="mlflow.tracking_store")}:  # of a plugin
        return
    host = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|localhost|[\w-]+(?:\.[\w-]+)*)(:\d{1,5})?(/.*)?", bare)
    if "://" not in uri and (re.search(r"\.(db|sqlite3?)$", uri) or _is_database(Path(uri))):
        raise UserError(f"{shown} lacks sqlite:///; give sqlite:///{uri}")
    if "://" not in uri and os.path.exists(uri):
        kind = "folder" if os.path.isdir(uri) else "file"
        raise UserError(
            f"{shown} is a {kind} here, to which MLflow 3 cannot write; give {DEFAULT_TRACKING_URI} or http(s)://…"
        )
    if host and "://" not in uri and (host[2] or host[1] == "localhost" or "." in host[1].strip(".")):
        local = host[2] or host[1] == "localhost" or re.fullmatch(r"[\d.]+", host[1])
        wanted = "http" if local else "https"
        user = ", and the user in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if bare != uri else ""
        raise UserError(f"{shown} lacks {wanted}://; give {wanted}://{bare}{user}")
    raise UserError(
        f"{shown} is no server that MLflow 3 can write to; give http(s)://host:port, sqlite:///file.db or postgresql://…"
    )


def _is_database(path: Path) -> bool:
    """Whether it is a file of SQLite's."""
    try:
        with path.open("rb") as file:
            return file.read(15) == b"SQLite format 3"
    except (OSError, ValueError):
        return False


def is_managed(uri: str) -> bool:
    """Whether it is the ARN of SageMaker's managed MLflow."""
    return bool(_MANAGED.fullmatch(uri))


def uses_proxy(uri: str) -> str | None:
    """The proxy, without its password, that the environment has requests to an http(s) server go through; None: none."""
    parts = urlsplit(uri)
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    return redact(proxy) if proxy and parts.hostname and not proxy_bypass(parts.hostname) else None


def database_file(uri: str) -> Path | None:
    """The file of a SQLite tracking URI, absolute; None for other servers."""
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute() if uri.startswith("sqlite:///") else None


def import_mlflow() -> Any:
    """MLflow, quiet, and giving up on a dead server at once: the spool retries. What the user has set stays."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",  # else it prints a line for each of 60 database migrations
    }.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock file between processes; yields False when another holds it and `wait` is False.

    Workers forked while it is held do not keep it (filelock lets go of it in them), and it goes when the process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except OSError:  # a file system without locks
        pass
    try:
        yield True
    finally:
        lock.release()


# --- What MLflow's exceptions mean -----------------------------------------------------------------------------------

# Python's module of a database's driver -> the package that brings it
DRIVERS = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "mysql": "mysql-connector-python",
    "pyodbc": "pyodbc",
    "pymssql": "pymssql",
}
_SQLITE_FAULTS = {
    "unable to open database file": "the database cannot be opened; correct its path in MLFLOW_TRACKING_URI, or the folder's rights",
    "readonly database": "the database may not be written; correct its rights, or name another in MLFLOW_TRACKING_URI",
    "file is not a database": "this file is no SQLite database; name another in MLFLOW_TRACKING_URI",
    "malformed": "the database is damaged; restore a backup, or name another in MLFLOW_TRACKING_URI",
    "disk is full": "the database's disk is full; make room",
}


class Unusable(RuntimeError):
    """A store that refuses until somebody changes something there: one sentence with the fix."""


def explain(error: BaseException, uri: str) -> tuple[str, bool]:
    """(What an exception of MLflow's client means, with the fix where it is known; whether waiting may help)."""
    text = str(error)
    if isinstance(error, Unusable):
        return text, False
    if module := re.search(r"No module named '([\w.]+)'", text):
        package = DRIVERS.get(module[1].partition(".")[0], module[1])
        return f"its driver {module[1]} is not installed; run: pip install {package}", False
    if found := re.search(r"found version (\w+)|Can't locate revision identified by '(\w+)'", text):
        return _explain_schema(found[1] or found[2], uri), False
    for words, meaning in _SQLITE_FAULTS.items():
        if words in text:
            return meaning, "full" in words
    if "Invalid or unsupported" in text or "UnsupportedModelRegistryStoreURIException" in type(error).__name__:
        return f"{_first_line(error)}; correct MLFLOW_TRACKING_URI", False
    if urlsplit(uri).scheme in ("http", "https"):
        return _explain_answer(error, text, uri)
    return f"does not take records ({_first_line(error)})", True


def missing_driver(uri: str) -> ImportError | None:
    """The error that a database's URI would meet because its driver is not installed; None if it is, and for servers."""
    if urlsplit(uri).scheme.partition("+")[0] not in ("postgresql", "mysql", "mssql"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        return error
    except ArgumentError:  # MLflow will say what is wrong with it
        pass
    return None


def _explain_answer(error: BaseException, text: str, uri: str) -> tuple[str, bool]:
    """What a failed request to a server means."""
    proxy, told = uses_proxy(uri), _first_line(error)
    around = (
        f"; the request went through the proxy {proxy}: set NO_PROXY={urlsplit(uri).hostname} to go past it"
        if proxy
        else ""
    )
    if "ProxyError" in text or "Tunnel connection failed" in text:
        why = re.search(r"Tunnel connection failed: [\w ]+|\[Errno -?\d+\] [\w ,'-]+", text)
        return f"the proxy {proxy or ''} does not let the request through ({why[0] if why else told}){around}", True
    if re.search(r"Response body: '?\s*<(!doctype|html|\?xml)", text, re.IGNORECASE):
        return (
            f"it answers with a web page, not as MLflow does; correct the address in MLFLOW_TRACKING_URI{around}",
            True,
        )
    if "CERTIFICATE_VERIFY_FAILED" in text or "SSLError" in text:
        return (
            "its certificate is not accepted; name your company's in MLFLOW_TRACKING_SERVER_CERT_PATH, or correct http and https "
            "in MLFLOW_TRACKING_URI",
            True,
        )
    code = re.search(r"error code (\d{3})", text)
    kind = getattr(error, "error_code", "")
    status = (
        int(code[1])
        if code
        else {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}.get(kind, 0)
    )
    if status in (401, 403):
        given = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        if not os.environ.get("MLFLOW_TRACKING_USERNAME"):
            given = (
                "MLFLOW_TRACKING_TOKEN"
                if os.environ.get("MLFLOW_TRACKING_TOKEN")
                else f"{given}, or MLFLOW_TRACKING_TOKEN"
            )
        refused = "does not accept the credentials" if status == 401 else "does not let these credentials write"
        return f"it {refused} ({told}); correct {given}{around}", True
    if status == 407:
        return f"the proxy {proxy or ''} asks for a password; write it into HTTP_PROXY and HTTPS_PROXY{around}", True
    if status == 404 and kind in ("", "ENDPOINT_NOT_FOUND", "INTERNAL_ERROR"):
        return f"it has no MLflow at this address ({told}); correct MLFLOW_TRACKING_URI{around}", True
    return f"does not take records ({told})", True


def _explain_schema(found: str, uri: str) -> str:
    """What to do with a database whose tables are those of another MLflow; found: its version of them."""
    import mlflow

    file = database_file(uri)
    shown = f"sqlite:///{file}" if file else redact(uri)
    versions = Path(str(mlflow.__file__)).parent / "store" / "db_migrations" / "versions"
    if any(versions.glob(f"{found}_*.py")):
        copy = f"copy {file.name}, then run" if file else "back it up, then run"
        return f"the database is of an older MLflow than {mlflow.__version__}: {copy}: mlflow db upgrade {shown}"
    return (
        f"the database is of a newer MLflow than {mlflow.__version__}, which cannot read it: install that MLflow "
        "(pip install --upgrade mlflow), or name another database in MLFLOW_TRACKING_URI"
    )


# --- MLflow's own variables ------------------------------------------------------------------------------------------


def find_names(experiment: str, run_name: str, folder: str) -> tuple[str, str, list[str]]:
    """(Experiment, run's name, sentences on what MLflow's variables change, or why they do not).

    experiment, run_name: of the settings, which win unless they are the defaults (`DEFAULT_EXPERIMENT`, the folder's name).
    """
    names, said = [], []
    for variable, option, given, default in (
        ("MLFLOW_EXPERIMENT_NAME", "experiment", experiment, DEFAULT_EXPERIMENT),
        ("MLFLOW_RUN_NAME", "run_name", run_name, folder),
    ):
        value = os.environ.get(variable, "").strip()
        if value and given == default:
            said += [f"MLflow: {option} {value}, by {variable}"] if value != given else []
            given = value
        elif value and value != given:
            said.append(f"MLflow: {option} {given}, by --{option}; {variable}={value} is not used")
        names.append(given)
    if os.environ.get("MLFLOW_EXPERIMENT_ID", "").strip():
        said.append("MLflow: MLFLOW_EXPERIMENT_ID is not used; name the experiment in MLFLOW_EXPERIMENT_NAME")
    return names[0], names[1], said


class _SystemMetrics:
    """Use of processor, memory, disk, network and GPUs, measured by MLflow's own monitors, recorded as `system/…`.

    MLflow's thread would ask the server at every sample and end with it; this one writes to the spool as all else does.
    """

    def __init__(self) -> None:
        from mlflow.environment_variables import (
            MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING,
            MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
        )
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.interval_s = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10.0
        self.samples = MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
        self.monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no GPU, or not the package that asks it
            self.monitors.append(GPUMonitor())

    def measure(self, ended: threading.Event) -> dict[str, float]:
        """Means over the next samples; shorter if `ended` is set."""
        for _ in range(self.samples):
            for monitor in self.monitors:
                monitor.collect_metrics()
            if ended.wait(self.interval_s):
                break
        values = {f"system/{key}": value for part in self.monitors for key, value in part.aggregate_metrics().items()}
        for monitor in self.monitors:
            monitor.clear_metrics()
        return values


def _system_metrics() -> _SystemMetrics | None:
    """What MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING asks for; None if it does not, or with a sentence if it cannot be had."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").strip().lower() not in ("true", "1"):
        return None
    try:
        return _SystemMetrics()
    except Exception as error:  # a value that is no number, a monitor that this machine does not support
        _say(f"warning: MLflow's system metrics are not recorded: {_first_line(error)}")
        return None


# --- Sending the spool -----------------------------------------------------------------------------------------------


class _Sender:
    """Sends a run folder's spool to one server and keeps, in `mlflow_spool/state.json`, how far it has come."""

    def __init__(self, run_dir: Path, uri: str):
        self.spool = run_dir / SPOOL_FILE
        self.folder = run_dir / SPOOL_FOLDER
        self.uri = uri
        self.found_run = threading.Event()  # set once the run is known to exist on the server
        self._client: Any = None
        self._state: dict[str, Any] = {}
        self._retry_set_aside = True

    @property
    def run_id(self) -> str | None:
        return self._state.get("run_id")

    @property
    def experiment_id(self) -> str | None:
        return self._state.get("experiment_id")

    def recorded_run(self) -> str | None:
        """The id of the run that this folder recorded to before; None if there is none."""
        if not self.spool.is_file() or not self.spool.stat().st_size:
            return None
        with suppress(RuntimeError):  # a spool without a start
            return self._load_state()["run_id"]
        return None

    def pending(self) -> int:
        """Number of records not sent yet."""
        state = self._load_state()
        return sum(1 for _ in _read_spool(self.spool, state["offset"])) + len(state["set_aside"])

    def send(self) -> None:
        """Send all that is not sent yet; raises what MLflow raises when the server does not take it."""
        with _locked(self.folder / "lock", wait=False) as alone:
            if not alone:
                raise RuntimeError("another process is sending the records of this folder")
            self._state = self._load_state()
            everything_sent = self.spool.stat().st_size == self._state["offset"]
            if everything_sent and self.found_run.is_set() and not self._retry_set_aside:
                return
            self._find_run()
            metrics: list[dict[str, Any]] = []
            end = self._state["offset"]
            for record, after in _read_spool(self.spool, end):
                if record["kind"] != "metrics" or sum(len(row["values"]) for row in metrics) >= METRICS_A_BATCH:
                    self._send_metrics(metrics, end)
                    metrics = []
                if record["kind"] == "metrics":
                    metrics.append(record)
                else:
                    self._send_record(record)
                    self._advance(after)
                end = after
            self._send_metrics(metrics, end)
            if self._retry_set_aside:
                self._retry_set_aside = False
                self._send_set_aside()

    def _load_state(self) -> dict[str, Any]:
        fresh = {"spool_id": self._start()["spool_id"], "uri": redact(self.uri), "run_id": None, "experiment_id": None}
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            same = (state["spool_id"], state["uri"]) == (fresh["spool_id"], fresh["uri"])
            same = same and state["offset"] <= self.spool.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            same = False  # a first start, or a damaged file: all is sent again, which changes nothing on the server
        # Another server gets the whole history; the spool keeps it.
        return state if same else {**fresh, "offset": 0, "set_aside": []}

    def _start(self, newest: bool = False) -> dict[str, Any]:
        """The spool's first record of a start, or its newest."""
        starts = (record for record, _ in _read_spool(self.spool, 0) if record["kind"] == "start")
        start = list(starts)[-1:] if newest else [next(starts, None)]
        if not start or start[0] is None:
            raise RuntimeError(f"{self.spool} has no start record")
        return start[0]

    def _advance(self, offset: int) -> None:
        self._state["offset"] = offset
        write_json(self.folder / "state.json", self._state)

    def _connect(self) -> None:
        mlflow = import_mlflow()
        database = database_file(self.uri)
        if database is None:
            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            return
        # Two runs that make the tables of the same new database at the same time break each other.
        with _locked(database.with_name(f"{database.name}.lock"), wait=True):
            client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{database}")
            client.search_experiments(max_results=1)  # makes the tables
            for line in follow_move(database):
                _say(line)
        self._client = client

    def _find_run(self) -> None:
        """Have the run on the server: the one of the state, the one with this spool's tag, or a new one."""
        if self._client is None:
            self._connect()
        if self.found_run.is_set():
            return
        from mlflow.exceptions import MlflowException

        if self._state["run_id"]:
            try:
                self._client.get_run(self._state["run_id"])
                self.found_run.set()
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._state.update(run_id=None, offset=0, set_aside=[])  # a server set up anew gets everything again
        # no run yet: the newest start may name another experiment than one that was refused
        newest = self._start(newest=True)
        start = self._start() | {key: newest[key] for key in ("experiment", "run_name")}
        if named := newest.get("run_id"):
            self._state.update(run_id=named, experiment_id=self._named_run(named))
            self._advance(self._state["offset"])
            self.found_run.set()
            return
        experiment_id = self._find_experiment(start["experiment"])
        # The answer to an earlier request may have been lost: never make a second run for the same spool.
        found = self._client.search_runs([experiment_id], f"tags.`t2i.spool_id` = '{start['spool_id']}'", max_results=1)
        tags = {"t2i.spool_id": start["spool_id"]}
        run = found[0] if found else self._client.create_run(experiment_id, start["time"], tags, start["run_name"])
        self._state.update(run_id=run.info.run_id, experiment_id=experiment_id)
        self._advance(self._state["offset"])
        self.found_run.set()

    def _named_run(self, run_id: str) -> str:
        """The experiment of the run that MLFLOW_RUN_ID names; raises if there is none to record to."""
        from mlflow.exceptions import MlflowException

        try:
            info = self._client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise Unusable(f"MLFLOW_RUN_ID={run_id} is no run there; correct it, or unset it") from error
        if info.lifecycle_stage == "deleted":
            raise Unusable(self._restore(f"the run {run_id} (MLFLOW_RUN_ID)", "runs", "run-id", run_id))
        return str(info.experiment_id)

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            database = database_file(self.uri)
            folder = re.sub(r"[^\w.-]", "_", name)
            location = (database.parent / "mlruns" / folder).as_uri() if database else None
            try:
                return self._client.create_experiment(name, artifact_location=location)
            except MlflowException as error:  # another run may have made it meanwhile
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    if error.error_code == "RESOURCE_ALREADY_EXISTS":  # servers that do not show what was deleted
                        raise Unusable(
                            self._restore(f"the experiment {name}", "experiments", "experiment-id", "ID")
                        ) from error
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise Unusable(
                self._restore(f"the experiment {name}", "experiments", "experiment-id", experiment.experiment_id)
            )
        return experiment.experiment_id

    def _restore(self, what: str, group: str, option: str, name: str) -> str:
        """What to say where something was deleted that the run needs."""
        database = database_file(self.uri)
        where = f"sqlite:///{database}" if database else redact(self.uri)
        other = ", or give another --experiment" if group == "experiments" else ""
        return f"{what} is deleted there; restore it: MLFLOW_TRACKING_URI={where} mlflow {group} restore --{option} {name}{other}"

    def _send_metrics(self, records: list[dict[str, Any]], end: int) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
        ]
        for first in range(0, len(metrics), METRICS_A_BATCH):
            self._log_batch(metrics=metrics[first : first + METRICS_A_BATCH])
        if records:
            self._advance(end)

    def _send_record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            self._send_start(record)
        elif record["kind"] == "finish":
            self._retry_set_aside = True
            self._client.set_terminated(self.run_id, record["status"], record["time"])
        else:
            self._send_file(record)

    def _send_start(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in record["params"].items() if key not in known]
        # MLflow's parameters never change: what a resumed run was given anew stands in its tags.
        tags = record["tags"] | {f"resumed.{k}": v for k, v in record["params"].items() if known.get(k, v) != v}
        for first in range(0, len(new), PARAMS_A_BATCH):
            self._log_batch(params=new[first : first + PARAMS_A_BATCH])
        rows = [RunTag(_key(key), _cut(value, TAG_CHARACTERS)) for key, value in tags.items()]
        for first in range(0, len(rows), PARAMS_A_BATCH):
            self._log_batch(tags=rows[first : first + PARAMS_A_BATCH])
        self._client.update_run(self.run_id, status="RUNNING")

    def _log_batch(self, **entities: list[Any]) -> None:
        """`log_batch`; when the server refuses a batch for one bad row, the others are logged without it."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.run_id, **entities)
        except MlflowException as error:
            self._check_run(error)
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            for kind, rows in entities.items():
                for row in rows:
                    try:
                        self._client.log_batch(self.run_id, **{kind: [row]})
                    except MlflowException as refusal:
                        if refusal.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                            raise
                        _say(f"MLflow refused {kind} {row.key}: {_first_line(refusal)}")

    def _check_run(self, error: Exception) -> None:
        """Raise when the run is gone or deleted: its records wait in the spool."""
        self.found_run.clear()  # looked up again at the next attempt, unless the next line finds it
        if self._client.get_run(self.run_id).info.lifecycle_stage == "deleted":
            experiment = self._client.get_experiment(self.experiment_id)
            if experiment.lifecycle_stage == "deleted":
                words = (f"the experiment {experiment.name}", "experiments", "experiment-id", experiment.experiment_id)
                raise Unusable(self._restore(*words)) from error
            raise Unusable(self._restore(f"the run {self.run_id}", "runs", "run-id", str(self.run_id))) from error
        self.found_run.set()

    def _send_set_aside(self) -> None:
        records = self._state["set_aside"]
        self._state["set_aside"] = []
        for record in records:
            self._send_file(record)
        self._advance(self._state["offset"])  # only now: a server that dies in between finds all of them here again

    def _send_file(self, record: dict[str, Any]) -> None:
        """Upload a picture or a file. One that the artifact store does not take is set aside for the next start, so
        that a store which is wrongly set up does not hold back the curves."""
        path = self.folder / record["file"]
        if not path.is_file():
            _say(f"{path} is gone and is not sent to MLflow")
            return
        try:
            self._client.log_artifact(self.run_id, str(path), record["folder"] or None)
            if record["kind"] == "image":
                # The names that mlflow.log_image gives: its picture grid shows the small copy, and reads the tag.
                small = path.with_name(f"{path.stem}+compressed.webp")
                with Image.open(path) as image:
                    image.thumbnail((256, 256))
                    image.save(small)
                self._client.log_artifact(self.run_id, str(small), record["folder"])
                self._client.set_tag(self.run_id, "mlflow.loggedImages", "True")
        except Exception as error:
            self._check_run(error)  # raises when it is the whole server that does not answer
            self._state["set_aside"].append(record)
            _say(f"MLflow's artifact store did not take {path.name} ({_first_line(error)}); it is tried again later")


def follow_move(database: Path) -> list[str]:
    """Let the artifact locations in a SQLite database follow it, where its folder was moved, renamed or copied.

    MLflow keeps them as absolute paths. Changed are locations `…/mlruns/NAME` that were beside this database once: `…` is
    gone, or has a database of this name itself (it was copied), or `mlruns/NAME` is here as well. A run's artifacts that are
    at the old place alone stay there. Returns a sentence for each experiment with runs that was changed.
    """
    told = []
    with closing(sqlite3.connect(database, timeout=30)) as store, store:
        rows = store.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for experiment, name, location in rows:
            old = _local_path(location)
            if old is None or old.parent.name != "mlruns":
                continue
            new, home = database.parent / "mlruns" / old.name, old.parent.parent
            if old == new or (old.exists() and new.exists() and old.samefile(new)):
                continue
            if home.exists() and not new.exists() and not (home / database.name).exists():
                continue  # somebody chose that place
            uri = new.as_uri() if location.startswith("file:") else str(new)
            store.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (uri, experiment))
            runs = store.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,)
            ).fetchall()
            for run, artifacts in runs:
                rest = (artifacts or "").removeprefix(location)
                here = new / unquote(rest.lstrip("/"))
                if rest.startswith("/") and (here.exists() or not (old / unquote(rest.lstrip("/"))).exists()):
                    store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (uri + rest, run))
            if runs:
                told.append(
                    f"MLflow's database was moved: artifacts of the experiment {name} go to, and come from, {new}"
                )
    return told


def _local_path(location: str | None) -> Path | None:
    """The absolute path that an artifact location names; None for those of servers and relative ones."""
    text = location or ""
    path = Path(unquote(text.removeprefix("file://")) if text.startswith("file:///") else text)
    return path if path.is_absolute() else None


def _read_spool(spool: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Records of a spool from a byte offset on, each with the offset after it. A torn last line is left for later."""
    with open(spool, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
                record["kind"]
            except (ValueError, KeyError, TypeError):
                continue  # torn by the death of an earlier process
            yield record, offset


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return size > 0 and file.read(1) != b"\n"


def _copy_redacted(source: Path, target: Path) -> None:
    """Copy a file; a text file without its secrets."""
    if source.suffix.lower() in TEXT_SUFFIXES:
        try:
            target.write_text(redact(source.read_text(encoding="utf-8")), encoding="utf-8")
            return
        except UnicodeDecodeError:
            pass
    shutil.copyfile(source, target)


def _first_line(error: BaseException) -> str:
    """The telling part of an error in one line."""
    text = str(error)
    cause = re.search(r"\[Errno -?\d+\] ([\w ,'-]+)|(timed out)|Response body: '?(.{1,160})", text)
    told = next(filter(None, cause.groups())) if cause else text.strip().partition("\n")[0][:200]
    return told.strip().removesuffix("'") or type(error).__name__


def _cut(text: str, limit: int) -> str:
    mark = f" … [cut at {limit} characters]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def _key(key: str) -> str:
    """A key that MLflow takes: letters, digits, `_-. :/`, no empty path parts, at most 250 characters."""
    parts = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", key).split("/")
    return "/".join(part for part in parts if part.strip(".") != "")[:KEY_CHARACTERS] or "_"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows |= _flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            rows[_key(name)] = _cut(text, PARAM_CHARACTERS)
    return rows


# --- What a script uses ----------------------------------------------------------------------------------------------


class Tracker:
    """One run in MLflow. The main rank makes one, logs, and calls `finish` last; a process that ends without it marks
    its run as FAILED.

    A Tracker on a folder that was tracked before goes on with the same run, and sends what is left from then.

    Args:
        run_dir: the run folder; the spool lives in it.
        experiment, run_name: as MLflow shows them.
        config: the resolved config, nested; logged as parameters `section.key`, without secrets.
        tags: more of the run's tags.
        tracking_uri: the server; by default `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db` in the working directory.

    Raises:
        UserError: the URI is a plain folder, which MLflow 3 does not write to any more.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        experiment: str,
        run_name: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        tracking_uri: str | None = None,
    ):
        uri = resolve_uri(tracking_uri)
        self._sender = _Sender(run_dir.absolute(), uri)  # the process may be elsewhere when it ends
        self._warned: set[str] = set()  # reasons that were told since the server last took records
        self._lost_records = False
        self._finished = False
        self._recorded: set[tuple[str, int]] = (
            set()
        )  # by earlier processes: a resumed training comes by some steps again
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._turn = threading.Condition()
        self._attempts = {"sent": -1.0, "failed": -1.0}  # when the last attempt that ended so had begun, monotonic s
        run_dir.mkdir(parents=True, exist_ok=True)
        spool_id = self._open_spool()
        experiment, run_name, said = find_names(experiment, run_name, run_dir.name)
        run_id = os.environ.get("MLFLOW_RUN_ID", "").strip()
        recorded = self._sender.recorded_run()
        if run_id and recorded not in (None, run_id):
            said.append(
                f"MLflow: {run_dir} records to the run {recorded}, as before; MLFLOW_RUN_ID={run_id} needs another --output_dir"
            )
        for sentence in said:
            _say(sentence)
        source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
        self._append(
            kind="start",
            spool_id=spool_id,
            experiment=redact(experiment),
            run_name=redact(run_name),
            **({"run_id": run_id} if run_id else {}),
            params=_flatten(redact_config(config)),
            tags={str(key): str(value) for key, value in redact_config(source | dict(tags or {})).items()},
        )
        import_mlflow()  # here rather than in the thread: two threads importing at once may see half-made modules
        if missing := missing_driver(uri):  # at once: a short run may end before the thread has found out
            self._warn(*explain(missing, uri))
        atexit.register(self.finish, "FAILED")
        threading.Thread(target=self._send_until_finished, name="mlflow", daemon=True).start()
        self._measuring: threading.Thread | None = None
        if system := _system_metrics():
            self._measuring = threading.Thread(target=self._measure, args=(system,), name="mlflow system", daemon=True)
            self._measuring.start()
        wait_s = START_WAIT_S if database_file(uri) is None else START_WAIT_DATABASE_S
        with self._turn:
            answered = self._turn.wait_for(
                lambda: self._sender.found_run.is_set() or max(self._attempts.values()) >= 0, wait_s
            )
        if not answered and not self._warned:
            self._warn(f"has not answered within {wait_s:.0f} s", True)

    @property
    def uri(self) -> str:
        """The tracking URI without user and password."""
        return redact(self._sender.uri)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the server has not been reached, and where tracking is off."""
        return self._sender.run_id

    @property
    def view(self) -> str:
        """Where to look: the run's address on a server, or the command that opens a local database."""
        if managed := _MANAGED.fullmatch(self.uri):
            name = "create-presigned-mlflow-app-url --arn" if managed[1] == "app" else (
                "create-presigned-mlflow-tracking-server-url --tracking-server-name"
            )  # fmt: skip
            which = self.uri if managed[1] == "app" else self.uri.rpartition("/")[2]
            return f"SageMaker Studio, or: aws sagemaker {name} {which} --region {self.uri.split(':')[3]}"
        if not self.uri.startswith("http"):
            return f"mlflow ui --backend-store-uri {self.uri}"
        address = f"{self.uri.rstrip('/')}/#/experiments"
        return f"{address}/{self._sender.experiment_id}/runs/{self.run_id}" if self.run_id else address

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers of one step; NaN and infinity are kept as MLflow keeps them. Takes well under 1 ms."""
        values = {_key(key): float(value) for key, value in metrics.items()}
        values = {key: value for key, value in values.items() if (key, int(step)) not in self._recorded}
        if values:
            self._append(kind="metrics", step=int(step), values=values)

    def log_image(self, image: np.ndarray | Image.Image, name: str, step: int) -> None:
        """Record a picture (uint8 [H, W, 3] or [H, W], or a PIL image) for MLflow's grid of pictures by step."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        if picture.mode not in ("RGB", "RGBA", "L"):
            picture = picture.convert("RGB")
        key = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", name).replace("/", "~")[:100]
        if (key, int(step)) in self._recorded:
            return
        now = time.time_ns() // 1_000_000
        # mlflow.log_image makes this name when it sends, so that sending twice would show the picture twice.
        file = f"images/{key}+step+{int(step)}+timestamp+{now}+{uuid.uuid4()}.png"
        with self._disk():
            target = self._sender.folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            self._append(kind="image", time=now, step=int(step), file=file, folder="images")

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or every file of a folder, under `folder` of the run's artifacts.

        Files are copied, so that they may change or go afterwards; text files are copied without their secrets.
        """
        for source in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
            inner = source.relative_to(path.parent).parent.as_posix() if path.is_dir() else ""
            with self._disk():
                file = f"artifacts/{uuid.uuid4().hex}/{source.name}"
                target = self._sender.folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy_redacted(source, target)
                target_folder = "/".join(part for part in (folder.strip("/"), inner) if part)
                self._append(kind="artifact", file=file, folder=target_folder)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as "FINISHED", "FAILED" or "KILLED" and wait, at most 10 s, until all is sent. The last call."""
        if self._finished:
            return
        self._ended.set()
        if self._measuring:
            self._measuring.join(FINISH_WAIT_S)  # its last sample is recorded before the end
        self._append(kind="finish", status=status)
        self._finished = True
        began = time.monotonic()
        self._wake.set()
        with self._turn:
            self._turn.wait_for(lambda: max(self._attempts.values()) >= began, FINISH_WAIT_S)
        left = 0
        with self._disk():
            left = self._sender.pending()
        if left:
            _say(
                f"MLflow at {self.uri}: records not sent yet: {left}; they are kept in {self._sender.spool} "
                "and sent at the next start on this folder"
            )

    def _measure(self, system: _SystemMetrics) -> None:
        """Record the machine's use until the run ends, at MLflow's count of samples as steps."""
        step = 1 + max((step for key, step in self._recorded if key.startswith("system/")), default=-1)
        while not self._ended.is_set():
            try:
                values = system.measure(self._ended)
            except Exception as error:
                _say(f"warning: MLflow's system metrics end: {_first_line(error)}")
                return
            self.log_metrics(values, step)
            step += 1

    def _open_spool(self) -> str:
        """Open the spool for appending; returns its id, a new one when the spool is new."""
        spool = self._sender.spool
        spool_id = ""
        for record, _ in _read_spool(spool, 0) if spool.is_file() else ():
            if record["kind"] == "start":
                spool_id = spool_id or record["spool_id"]
            elif record["kind"] == "metrics":
                self._recorded |= {(key, record["step"]) for key in record["values"]}
            elif record["kind"] == "image":
                self._recorded.add((Path(record["file"]).name.split("+")[0], record["step"]))
        spool_id = spool_id or uuid.uuid4().hex
        self._file = open(spool, "ab", buffering=0)  # noqa: SIM115 - for as long as the process lives
        if _ends_torn(spool):
            self._file.write(b"\n")  # a line torn by the death of an earlier process stands alone
        return spool_id

    def _append(self, *, kind: str, **fields: Any) -> None:
        # One write call of a whole line: it is in the system's hands when it returns, and outlives this process.
        record = {"kind": kind, "time": time.time_ns() // 1_000_000, **fields}
        with self._disk():
            self._file.write(json.dumps(record).encode() + b"\n")

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A full disk costs records, never the run."""
        try:
            yield
        except OSError as error:
            if not self._lost_records:
                self._lost_records = True
                _say(f"warning: records for MLflow are lost: {error}")

    def _warn(self, why: str, passing: bool) -> None:
        """Tell each reason once, until the server takes records again. passing: waiting may help."""
        reason = re.sub(r"0x[0-9a-f]+|\d+", "", why)  # but for ports, addresses and seconds
        if reason not in self._warned:
            self._warned.add(reason)
            sent = "when the server answers" if passing else "at the next start on this folder"
            mark = "" if why.startswith(("does not take", "has not answered")) else ": "
            _say(
                f"warning: MLflow at {self.uri}{mark or ' '}{why}; the run goes on, its records are kept in {self._sender.spool} "
                f"and sent {sent}"
            )

    def _send_until_finished(self) -> None:
        delay = 1.0
        while True:
            began = time.monotonic()
            finished = self._finished
            try:
                self._sender.send()
                outcome, pause, delay = "sent", SEND_EVERY_S, 1.0
                if self._warned:
                    self._warned.clear()
                    _say(f"MLflow at {self.uri} answers: the records kept meanwhile are sent")
            except Exception as error:
                self._warn(*explain(error, self._sender.uri))
                outcome, pause, delay = "failed", delay, min(2 * delay, RETRY_AT_MOST_EVERY_S)
            with self._turn:
                self._attempts[outcome] = began
                self._turn.notify_all()
            if finished and outcome == "sent":
                return
            self._wake.wait(pause)
            self._wake.clear()


def replay(run_dir: Path, tracking_uri: str | None = None) -> int:
    """Send what a run folder's spool still holds; returns how many records are left (0: all is sent).

    Raises:
        UserError: the folder has no spool.
    """
    if not (run_dir / SPOOL_FILE).is_file():
        raise UserError(f"{run_dir / SPOOL_FILE} is missing; give the folder of a run that was tracked")
    sender = _Sender(run_dir, resolve_uri(tracking_uri))
    try:
        sender.send()
    except Exception as error:
        why = explain(error, sender.uri)[0]
        _say(f"MLflow at {sender.uri}{' ' if why.startswith('does not take') else ': '}{why}")
    return sender.pending()
