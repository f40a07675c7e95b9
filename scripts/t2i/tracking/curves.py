"""Metrics over training of many runs, from run folders and from MLflow, thinned to what a chart can show.

Imports no torch, and MLflow only to speak with a server. Nothing is written.
"""

import json
import math
import socket
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import ArrayLike

from t2i.errors import UserError
from t2i.redaction import redact
from t2i.tracking.addresses import database_file, resolve_uri, uses_proxy
from t2i.tracking.mlflow_client import explain, import_mlflow
from t2i.tracking.spool import SPOOL_FILE

POINTS = 500  # of a curve, at most: more than a chart has columns of pixels for each line that an eye can follow
CONNECT_S = 2.0  # a server that does not take a connection in this time is called down
REQUESTS_AT_ONCE = 4  # at an MLflow server that others use as well
CACHE_KIB = 256 * 1024  # of a SQLite store, while it is read
READ_AHEAD_RUNS = 20  # with fewer, single pages are less to read than all
READ_AHEAD_BYTES = 1 << 30  # of a larger store, its beginning
MLFLOW_INFINITY = 1.79e308  # MLflow's databases keep infinity as the largest float


@dataclass(frozen=True)
class Curve:
    """One metric of one run: steps [n] (rising, each once), times [n] (Unix seconds, NaN if unknown), values [n]."""

    steps: np.ndarray
    times: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class StoredRun:
    """A run in an MLflow store; status in MLflow's words ("RUNNING", "FINISHED", "FAILED", "KILLED")."""

    run_id: str
    name: str
    status: str
    metrics: tuple[str, ...]


def make_curve(steps: ArrayLike, times: ArrayLike, values: ArrayLike) -> Curve:
    """A curve of raw points [n] each: NaN and infinity dropped, by step, of a step made twice the later record alone.

    A training that goes on from a checkpoint makes the steps after it again: those are the ones that count.
    """
    step, time, value = (np.asarray(column, dtype=np.float64) for column in (steps, times, values))
    kept = np.isfinite(step) & (np.abs(value) < MLFLOW_INFINITY)  # comparing drops NaN too
    step, time, value = step[kept], time[kept], value[kept]
    if np.any(np.diff(step) <= 0):
        order = np.argsort(step, kind="stable")
        order = order[np.append(np.diff(step[order]) > 0, True)]  # the last of equal steps
        step, time, value = step[order], time[order], value[order]
    return Curve(step.astype(np.int64), time, value)


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """At most `points` (4 or more) of a curve's own points: the first, the last, and of each bucket lowest and highest.

    Buckets are runs of equally many neighbours. Lowest and highest are kept, rather than what LTTB chooses, because a
    loss's single spike is what one looks for, and LTTB may drop it beside a larger one; both are one pass over arrays.
    """
    count = len(curve)
    if count <= points:
        return curve
    width = math.ceil((count - 2) / ((points - 2) // 2))
    inner = np.pad(np.arange(1, count - 1), (0, -(count - 2) % width), mode="edge").reshape(-1, width)
    values = curve.values[inner]
    rows = np.arange(len(inner))
    chosen = [inner[rows, values.argmin(axis=1)], inner[rows, values.argmax(axis=1)], [0, count - 1]]
    keep = np.unique(np.concatenate(chosen))
    return Curve(curve.steps[keep], curve.times[keep], curve.values[keep])


def smooth(curve: Curve, weight: float) -> Curve:
    """Exponential moving average of the values, debiased: m_t = w m_{t-1} + (1 - w) x_t, shown as m_t / (1 - w^t).

    weight: 0 (as it is) to below 1. The debiasing is Adam's (Kingma & Ba 2015, section 3): without it a curve starts
    at zero.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"a smoothing weight is at least 0 and below 1, not {weight}")
    if weight == 0 or not len(curve):
        return curve
    # In the order that never overflows: both shares are below 1. Python's floats, as one loop over NumPy's is slower.
    averages = list(accumulate(curve.values.tolist(), lambda m, x: weight * m + (1 - weight) * x, initial=0.0))[1:]
    seen = 1 - weight ** np.arange(1, len(curve) + 1, dtype=np.float64)
    return Curve(curve.steps, curve.times, np.asarray(averages) / seen)


# --- Run folders -----------------------------------------------------------------------------------------------------


def read_folder(run: Path) -> dict[str, Curve]:
    """The metrics of a run folder: name -> curve. {} where there are none; torn lines are skipped.

    metrics.jsonl has no times; they are those of the same records for MLflow, where the run was tracked.
    """
    times = {
        (key, record.get("step")): record["time"] / 1000
        for record in _json_lines(run / SPOOL_FILE, containing='"metrics"')
        if record.get("kind") == "metrics" and isinstance(record.get("values"), dict) and _is_number(record.get("time"))
        for key in record["values"]
    }
    columns: dict[str, list[tuple[float, float, float]]] = {}
    for row in _json_lines(run / "metrics.jsonl"):
        step = row.pop("step", None)
        if not _is_number(step):
            continue
        for key, value in row.items():
            if _is_number(value):
                columns.setdefault(key, []).append((step, times.get((key, step), math.nan), value))
    curves = {key: make_curve(*zip(*points, strict=True)) for key, points in columns.items()}
    return {key: curve for key, curve in curves.items() if len(curve)}


def _json_lines(file: Path, containing: str = "") -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # none yet, or deleted between listing and reading
        return
    for line in text.split("\n"):
        if containing not in line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn by the death of a run
        if isinstance(row, dict):
            yield row


def _is_number(value: Any) -> bool:
    """A number that a float and an int64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or abs(value) < 2**62)


# --- MLflow ----------------------------------------------------------------------------------------------------------


def shown_uri(uri: str | None = None) -> str:
    """The store that is read (MLFLOW_TRACKING_URI where none is given), without a password."""
    return redact(resolve_uri(uri))


def is_file_store(uri: str | None = None) -> bool:
    """Whether the store is a SQLite file, which is read at once; a server is better asked beside the page."""
    return database_file(resolve_uri(uri)) is not None


def store_stamp(uri: str | None = None) -> tuple[tuple[int, int], ...]:
    """What changes when a SQLite store is written to; () for a server."""
    file = database_file(resolve_uri(uri))
    stamps = []
    for part in (file, file.with_name(f"{file.name}-wal")) if file else ():
        try:
            stamps.append((part.stat().st_mtime_ns, part.stat().st_size))
        except OSError:  # no write-ahead log, or no store
            stamps.append((0, 0))
    return tuple(stamps)


def list_stored_runs(uri: str | None = None) -> list[StoredRun]:
    """The runs of an MLflow store that are not deleted and have metrics, the newest first.

    Raises:
        UserError: the store is missing, down or none of MLflow's.
    """
    uri = resolve_uri(uri)
    file = database_file(uri)
    if file is not None:
        return _sqlite_runs(file)
    with _server(uri) as client:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found, page = [], None
        while experiments:
            runs = client.search_runs(experiments, max_results=1000, page_token=page, order_by=["start_time DESC"])
            found += runs
            page = runs.token
            if not page:
                break
    stored = [
        StoredRun(run.info.run_id, run.info.run_name or "", run.info.status, tuple(sorted(run.data.metrics)))
        for run in found
    ]
    return [run for run in stored if run.metrics]


def read_stored(run_ids: Sequence[str], metric: str, uri: str | None = None) -> Iterator[tuple[str, Curve]]:
    """The curve of one metric of each run that has it, one after another as they arrive: (run id, curve).

    Raises:
        UserError: the store is missing, down or none of MLflow's.
    """
    uri = resolve_uri(uri)
    file = database_file(uri)
    if file is not None:
        yield from _sqlite_curves(file, run_ids, metric)
        return
    with _server(uri) as client, ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        histories = [(run_id, pool.submit(client.get_metric_history, run_id, metric)) for run_id in run_ids]
        try:
            for run_id, history in histories:
                points = sorted(history.result(), key=lambda point: point.timestamp)
                curve = make_curve(
                    [point.step for point in points],
                    [point.timestamp / 1000 for point in points],
                    [point.value for point in points],
                )
                if len(curve):
                    yield run_id, curve
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for what is no longer wanted


@contextmanager
def _server(uri: str) -> Iterator[Any]:
    """A client of an MLflow server; whatever goes wrong with it becomes one sentence."""
    parts = urlsplit(uri)
    name = redact(uri)
    if parts.scheme in ("http", "https") and not uses_proxy(uri):
        try:  # MLflow itself would try a dead host for a minute
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"MLflow at {name} does not answer ({error}); start it or fix MLFLOW_TRACKING_URI"
            ) from None
    try:
        yield import_mlflow().MlflowClient(tracking_uri=uri)
    except Exception as error:  # of MLflow, of requests, of a database's driver
        why, known = explain(error, uri)[0], redact(str(error)).strip().split("\n")[0][:200]
        if not why.startswith("does not take"):
            raise UserError(f"MLflow at {name} cannot be read: {redact(why)}") from None
        raise UserError(f"MLflow at {name} cannot be read ({known}); start it or fix MLFLOW_TRACKING_URI") from None


@contextmanager
def _sqlite(file: Path) -> Iterator[sqlite3.Connection]:
    """MLflow's database, opened to read alone; whatever is wrong with it becomes one sentence."""
    if not file.is_file():
        raise UserError(
            f"{file} is missing; train a run with MLflow, or set MLFLOW_TRACKING_URI to where your runs are"
        )
    try:
        store = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            # Points of runs that trained at the same time lie mixed: with SQLite's usual 2 MB each page of the file is
            # fetched many times (twice the seconds). Memory is taken as pages come, and given back at the close.
            store.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            yield store
        finally:
            store.close()
    except sqlite3.Error as error:
        raise UserError(f"{file} cannot be read as MLflow's database ({error}); fix MLFLOW_TRACKING_URI") from None


def _sqlite_runs(file: Path) -> list[StoredRun]:
    with _sqlite(file) as store:
        names: dict[str, list[str]] = {}
        for run_id, key in store.execute("SELECT run_uuid, key FROM latest_metrics ORDER BY key"):
            names.setdefault(run_id, []).append(key)
        rows = store.execute(
            "SELECT run_uuid, name, status FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC, run_uuid"
        ).fetchall()
    return [
        StoredRun(run_id, name or "", status, tuple(names[run_id])) for run_id, name, status in rows if run_id in names
    ]


def _read_ahead(file: Path) -> None:
    """Bring a store into the system's memory from end to end; SQLite asks for single pages here and there, slowly."""
    block = bytearray(1 << 22)
    with suppress(OSError), open(file, "rb", buffering=0) as store:
        for _ in range(READ_AHEAD_BYTES // len(block)):
            if not store.readinto(block):
                break


def _sqlite_curves(file: Path, run_ids: Sequence[str], metric: str) -> Iterator[tuple[str, Curve]]:
    """SQL, where MLflow's client would make an object of each of a million points (about 10 s instead of 1)."""
    point = [("step", "f8"), ("time", "f8"), ("value", "f8")]
    if len(run_ids) >= READ_AHEAD_RUNS:
        threading.Thread(target=_read_ahead, args=(file,), daemon=True).start()
    with _sqlite(file) as store:
        for run_id in run_ids:
            rows = store.execute(  # MLflow's index on (run_uuid, key, step) gives them by step
                "SELECT step, timestamp, value FROM metrics WHERE run_uuid = ? AND key = ? AND is_nan = 0 ORDER BY step",
                (run_id, metric),
            )
            points = np.fromiter(rows, dtype=point)
            if np.any(np.diff(points["step"]) == 0):  # of a step made twice the later one counts
                points = points[np.lexsort((points["time"], points["step"]))]
            curve = make_curve(points["step"], points["time"] / 1000, points["value"])
            if len(curve):
                yield run_id, curve


# --- Beside the page -------------------------------------------------------------------------------------------------


@dataclass
class Loading:
    """An iteration that goes on in a thread of its own, so that a page can show what is there so far."""

    found: dict[Any, Any] = field(default_factory=dict)
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    _stopped: bool = False

    @classmethod
    def start(cls, pairs: Iterator[tuple[Any, Any]]) -> "Loading":
        """Collect (key, value) pairs; a UserError ends it with its sentence in `error`."""
        loading = cls()

        def work() -> None:
            try:
                for key, value in pairs:
                    if loading._stopped:
                        break
                    loading.found[key] = value
            except UserError as error:
                loading.error = str(error)
            except Exception as error:  # of a reply that no one foresaw: it must not leave a page waiting
                loading.error = f"MLflow's answer cannot be read ({type(error).__name__})"
            finally:
                loading.done.set()

        threading.Thread(target=work, daemon=True, name="curves").start()
        return loading

    def stop(self) -> None:
        self._stopped = True
