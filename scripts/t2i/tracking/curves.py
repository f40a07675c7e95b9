"""Read curves of many runs from run folders and from MLflow, and thin them to what a chart can show.

This module imports no torch, imports MLflow only to query a server, and writes nothing.
"""

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
from t2i.files import json_lines
from t2i.redaction import redact
from t2i.tracking.addresses import database_file, resolve_uri, uses_proxy
from t2i.tracking.mlflow_client import explain, import_mlflow
from t2i.tracking.spool import SPOOL_FILE

POINTS = 500  # maximum per curve; a chart has fewer columns of pixels for each line that an eye can follow
CONNECT_S = 2.0  # seconds after which a server that takes no connection is reported as down
BUSY_S = 5.0  # Seconds for which reading a SQLite store waits until another process has written it.
REQUESTS_AT_ONCE = 4  # Others use the MLflow server as well.
CACHE_KIB = 256 * 1024  # memory for a SQLite store while it is read
READ_AHEAD_RUNS = 20  # For fewer runs, reading single pages is faster than reading the full store.
READ_AHEAD_BYTES = 1 << 30  # Of a larger store only the beginning is read ahead.
MLFLOW_INFINITY = 1.79e308  # MLflow's databases keep infinity as the largest float


@dataclass(frozen=True)
class Curve:
    """The curve of one metric of one run: steps [n] (rising), times [n] (Unix seconds, NaN if unknown) and values [n]."""

    steps: np.ndarray
    times: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class StoredRun:
    """A run in an MLflow store.

    The status of the run is one of MLflow's: "RUNNING", "FINISHED", "FAILED" or "KILLED".
    """

    run_id: str
    name: str
    status: str
    metrics: tuple[str, ...]


def make_curve(steps: ArrayLike, times: ArrayLike, values: ArrayLike) -> Curve:
    """Return a curve of raw points, sorted by step, without NaN and infinity.

    A training that resumes from a checkpoint repeats the steps after the checkpoint. The later record of a repeated
    step is kept.

    Args:
        steps: training step of each point [n].
        times: time of each point [n] in Unix seconds, or NaN if unknown.
        values: value of each point [n].
    """
    step, time, value = (np.asarray(column, dtype=np.float64) for column in (steps, times, values))
    kept = np.isfinite(step) & (np.abs(value) < MLFLOW_INFINITY)  # The comparison drops NaN too.
    step, time, value = step[kept], time[kept], value[kept]
    if np.any(np.diff(step) <= 0):
        order = np.argsort(step, kind="stable")
        order = order[np.append(np.diff(step[order]) > 0, True)]  # keeps the last of equal steps
        step, time, value = step[order], time[order], value[order]
    return Curve(step.astype(np.int64), time, value)


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """Thin a curve: keep its first and last point, and the lowest and highest point of each bucket of neighbours.

    LTTB, the usual choice, may drop a single spike beside a larger one, and spikes of a loss are what users look for.
    LTTB and this method both take one pass over the arrays.

    Args:
        curve: the curve to thin.
        points: maximum number of points to keep, at least 4.
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
    """Smooth the values by a debiased exponential moving average.

    The average is m_t = w m_{t-1} + (1 - w) x_t, and the shown value is m_t / (1 - w^t). The debiasing of the average
    is Adam's (Kingma & Ba 2015, section 3). Without debiasing, a smoothed curve would start near zero.

    Args:
        curve: the curve to smooth.
        weight: strength w of the smoothing, in [0, 1). A weight of 0 returns the curve unchanged.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"a smoothing weight is at least 0 and below 1, not {weight}")
    if weight == 0 or not len(curve):
        return curve
    # Both weights are below 1, so nothing overflows. A loop over Python's floats is faster than one over NumPy's.
    averages = list(accumulate(curve.values.tolist(), lambda m, x: weight * m + (1 - weight) * x, initial=0.0))[1:]
    debias = 1 - weight ** np.arange(1, len(curve) + 1, dtype=np.float64)
    return Curve(curve.steps, curve.times, np.asarray(averages) / debias)


def average(curves: Sequence[Curve], points: int = POINTS) -> tuple[Curve, np.ndarray, np.ndarray]:
    """Return the mean of curves over their steps, and the lowest and highest curve at each step [n].

    Between its steps a curve is a straight line. At a step before its first or after its last one, it is left out.

    Args:
        curves: at least one curve with finite values. Each has at least one step.
        points: largest number of steps of the result.
    """
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    if len(steps) > points:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, points).round().astype(int))]
    values = np.full((len(curves), len(steps)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        inside = (steps >= curve.steps[0]) & (steps <= curve.steps[-1])
        row[inside] = np.interp(steps[inside], curve.steps, curve.values)
    steps, values = steps[(some := ~np.isnan(values).all(axis=0))], values[:, some]
    mean = Curve(steps, np.full(len(steps), np.nan), np.nanmean(values, axis=0))
    return mean, np.nanmin(values, axis=0), np.nanmax(values, axis=0)


# --- Run folders -----------------------------------------------------------------------------------------------------


def read_folder(run: Path) -> dict[str, Curve]:
    """Return the curves of a run folder by metric, from metrics.jsonl. Incomplete lines of metrics.jsonl are skipped.

    The file metrics.jsonl holds no times. If the run was tracked, the times of its points come from the same records in
    the spool for MLflow.
    """
    times = {
        (key, record.get("step")): record["time"] / 1000
        for record in json_lines(run / SPOOL_FILE, containing='"metrics"')
        if record.get("kind") == "metrics" and isinstance(record.get("values"), dict) and _is_number(record.get("time"))
        for key in record["values"]
    }
    columns: dict[str, list[tuple[float, float, float]]] = {}
    for row in json_lines(run / "metrics.jsonl"):
        step = row.pop("step", None)
        if not _is_number(step):
            continue
        for key, value in row.items():
            if _is_number(value):
                columns.setdefault(key, []).append((step, times.get((key, step), math.nan), value))
    curves = {key: make_curve(*zip(*points, strict=True)) for key, points in columns.items()}
    return {key: curve for key, curve in curves.items() if len(curve)}


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float and an int64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or abs(value) < 2**62)


# --- MLflow ----------------------------------------------------------------------------------------------------------


def shown_uri(uri: str | None = None) -> str:
    """Return the URI of an MLflow store without its password.

    With None, the store is that of MLFLOW_TRACKING_URI, otherwise the default.
    """
    return redact(resolve_uri(uri))


def is_file_store(uri: str | None = None) -> bool:
    """Return whether an MLflow store is a SQLite file, which is read at once.

    If the store is a server, pages should query it in a thread.
    """
    return database_file(resolve_uri(uri)) is not None


def store_stamp(uri: str | None = None) -> tuple[tuple[int, int], ...]:
    """Return a value that changes when a SQLite store is written, or () for a server."""
    file = database_file(resolve_uri(uri))
    stamps = []
    for part in (file, file.with_name(f"{file.name}-wal")) if file else ():
        try:
            stamps.append((part.stat().st_mtime_ns, part.stat().st_size))
        except OSError:  # the store or its write-ahead log does not exist
            stamps.append((0, 0))
    return tuple(stamps)


def list_stored_runs(uri: str | None = None) -> list[StoredRun]:
    """Return the runs of an MLflow store that have metrics and are not deleted, the newest first.

    Raises:
        UserError: the MLflow store is missing, down, or not MLflow's.
    """
    uri = resolve_uri(uri)
    file = database_file(uri)
    if file is not None:
        return _sqlite_runs(file)
    with _server(uri) as client:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs, page = [], None
        while experiments:
            reply = client.search_runs(experiments, max_results=1000, page_token=page, order_by=["start_time DESC"])
            runs += reply
            page = reply.token
            if not page:
                break
    stored = [
        StoredRun(run.info.run_id, run.info.run_name or "", run.info.status, tuple(sorted(run.data.metrics)))
        for run in runs
    ]
    return [run for run in stored if run.metrics]


def read_stored(run_ids: Sequence[str], metric: str, uri: str | None = None) -> Iterator[tuple[str, Curve]]:
    """Yield (run id, curve) for each run that has a metric, as the curves arrive from the store.

    Raises:
        UserError: the MLflow store is missing, down, or not MLflow's.
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
            pool.shutdown(wait=False, cancel_futures=True)  # drops the requests that are no longer needed


@contextmanager
def _server(uri: str) -> Iterator[Any]:
    """Yield a client of an MLflow server. Any error of MLflow's client becomes a `UserError`."""
    parts = urlsplit(uri)
    name = redact(uri)
    if parts.scheme in ("http", "https") and not uses_proxy(uri):
        try:  # MLflow itself would retry a dead host for a minute
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"MLflow at {name} does not answer ({error}); start it or fix MLFLOW_TRACKING_URI"
            ) from None
    try:
        yield import_mlflow().MlflowClient(tracking_uri=uri)
    except Exception as error:  # MLflow, requests and the drivers of databases raise many types
        why, line = explain(error, uri)[0], redact(str(error)).strip().split("\n")[0][:200]
        if not why.startswith("does not take"):
            raise UserError(f"MLflow at {name} cannot be read: {redact(why)}") from None
        raise UserError(f"MLflow at {name} cannot be read ({line}); start it or fix MLFLOW_TRACKING_URI") from None


@contextmanager
def _sqlite(file: Path) -> Iterator[sqlite3.Connection]:
    """Yield MLflow's database, opened read-only. Any error of MLflow's database becomes a `UserError`."""
    if not file.is_file():
        raise UserError(
            f"{file} is missing; train a run with MLflow, or set MLFLOW_TRACKING_URI to where your runs are"
        )
    try:
        store = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=BUSY_S)
        try:
            # The points of runs that trained at the same time are interleaved. With SQLite's usual cache of 2 MB each
            # page of the file is fetched many times, which takes twice as long. Closing the store frees the memory.
            store.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            yield store
        finally:
            store.close()
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UserError(f"{file} is being written by another process ({error}); open the page again") from None
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
    """Read a SQLite file once into the system's cache, because SQLite's reads of scattered pages are slow."""
    block = bytearray(1 << 22)
    with suppress(OSError), open(file, "rb", buffering=0) as store:
        for _ in range(READ_AHEAD_BYTES // len(block)):
            if not store.readinto(block):
                break


def _sqlite_curves(file: Path, run_ids: Sequence[str], metric: str) -> Iterator[tuple[str, Curve]]:
    """Yield curves from MLflow's database, read by SQL.

    SQL is used because MLflow's client makes an object per point: 10 s instead of 1 s for a million points.
    """
    point = [("step", "f8"), ("time", "f8"), ("value", "f8")]
    if len(run_ids) >= READ_AHEAD_RUNS:
        threading.Thread(target=_read_ahead, args=(file,), daemon=True).start()
    with _sqlite(file) as store:
        for run_id in run_ids:
            rows = store.execute(  # MLflow's index on (run_uuid, key, step) sorts them
                "SELECT step, timestamp, value FROM metrics WHERE run_uuid = ? AND key = ? AND is_nan = 0 ORDER BY step",
                (run_id, metric),
            )
            points = np.fromiter(rows, dtype=point)
            if np.any(np.diff(points["step"]) == 0):  # the later record of a repeated step comes last
                points = points[np.lexsort((points["time"], points["step"]))]
            curve = make_curve(points["step"], points["time"] / 1000, points["value"])
            if len(curve):
                yield run_id, curve


# --- Reading in a thread ---------------------------------------------------------------------------------------------


@dataclass
class Loading:
    """An iteration that runs in a thread, so that a page can show the items that have arrived so far."""

    results: dict[Any, Any] = field(default_factory=dict)
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    _stopped: bool = False

    @classmethod
    def start(cls, pairs: Iterator[tuple[Any, Any]]) -> "Loading":
        """Start collecting (key, value) pairs. A `UserError` ends the collecting and leaves its message in `error`."""
        loading = cls()

        def work() -> None:
            try:
                for key, value in pairs:
                    if loading._stopped:
                        break
                    loading.results[key] = value
            except UserError as error:
                loading.error = str(error)
            except Exception as error:  # an unforeseen reply must not leave a page waiting
                loading.error = f"MLflow's answer cannot be read ({type(error).__name__})"
            finally:
                loading.done.set()

        threading.Thread(target=work, daemon=True, name="curves").start()
        return loading

    def stop(self) -> None:
        self._stopped = True
