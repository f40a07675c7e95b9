"""Send a run's spool to MLflow, so that each record arrives once and in order. This module imports no torch.

A record whose answer was lost is sent twice. MLflow stores a repeated record only once, because time and name of a
record are fixed when it is recorded. MLflow is imported in functions, because importing it takes seconds.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from t2i.errors import UserError
from t2i.files import write_json
from t2i.redaction import redact
from t2i.tracking.addresses import database_file, resolve_uri
from t2i.tracking.mlflow_client import Unusable, explain, first_line, import_mlflow, say
from t2i.tracking.moved_database import follow_move
from t2i.tracking.spool import SPOOL_FILE, SPOOL_FOLDER, cut, read_spool, valid_key

# Limits of an MLflow server.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
TAG_CHARACTERS = 5000


class Sender:
    """Sender of a run folder's spool to one server.

    The file `mlflow_spool/state.json` stores how many records were sent.
    """

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
        """Return the id of the MLflow run to which this run folder was recorded before, or None."""
        if not self.spool.is_file() or not self.spool.stat().st_size:
            return None
        with suppress(RuntimeError):  # a spool without a start record
            return self._load_state()["run_id"]
        return None

    def pending(self) -> int:
        """Return the number of records in the spool that are not sent yet."""
        state = self._load_state()
        return sum(1 for _ in read_spool(self.spool, state["offset"])) + len(state["set_aside"])

    def send(self) -> None:
        """Send all pending records of the spool. Raise MLflow's exception if the server does not take the records."""
        with _locked(self.folder / "lock", wait=False) as acquired:
            if not acquired:
                raise RuntimeError("another process is sending the records of this folder")
            self._state = self._load_state()
            everything_sent = self.spool.stat().st_size == self._state["offset"]
            if everything_sent and self.found_run.is_set() and not self._retry_set_aside:
                return
            self._find_run()
            metrics: list[dict[str, Any]] = []
            end = self._state["offset"]
            for record, after in read_spool(self.spool, end):
                if record["kind"] != "metrics" or sum(len(row["values"]) for row in metrics) >= METRICS_PER_BATCH:
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
            # A first start, or a damaged file: everything is sent again, which changes nothing on the server.
            same = False
        # Another server gets the full history, which the spool keeps.
        return state if same else {**fresh, "offset": 0, "set_aside": []}

    def _start(self, newest: bool = False) -> dict[str, Any]:
        """Return the first start record of the spool, or if `newest` is true, the newest start record."""
        starts = (record for record, _ in read_spool(self.spool, 0) if record["kind"] == "start")
        start = list(starts)[-1:] if newest else [next(starts, None)]
        if not start or start[0] is None:
            raise RuntimeError(f"{self.spool} has no start record")
        return start[0]

    def _advance(self, offset: int) -> None:
        self._state["offset"] = offset
        write_json(self.folder / "state.json", self._state)

    # --- Finding or making the run ---

    def _connect(self) -> None:
        mlflow = import_mlflow()
        database = database_file(self.uri)
        if database is None:
            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            return
        # Two runs that make the tables of one new database at the same time break each other.
        with _locked(database.with_name(f"{database.name}.lock"), wait=True):
            client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{database}")
            client.search_experiments(max_results=1)  # makes the tables
            for sentence in follow_move(database):
                say(sentence)
        self._client = client

    def _find_run(self) -> None:
        """Find the MLflow run on the server, by the id in state.json or by the spool's tag.

        If the run is missing, create it.
        """
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
        # No run exists yet. The newest start may name another experiment, after the first one was refused.
        newest = self._start(newest=True)
        start = self._start() | {key: newest[key] for key in ("experiment", "run_name")}
        if named := newest.get("run_id"):
            self._state.update(run_id=named, experiment_id=self._find_named_run(named))
            self._advance(self._state["offset"])
            self.found_run.set()
            return
        experiment_id = self._find_experiment(start["experiment"])
        # The answer to an earlier request may have been lost: never make a second run for the same spool.
        same_spool = f"tags.`t2i.spool_id` = '{start['spool_id']}'"
        earlier = self._client.search_runs([experiment_id], same_spool, max_results=1)
        tags = {"t2i.spool_id": start["spool_id"]}
        run = earlier[0] if earlier else self._client.create_run(experiment_id, start["time"], tags, start["run_name"])
        self._state.update(run_id=run.info.run_id, experiment_id=experiment_id)
        self._advance(self._state["offset"])
        self.found_run.set()

    def _find_named_run(self, run_id: str) -> str:
        """Return the experiment of the run that MLFLOW_RUN_ID names. Raise `Unusable` if that run cannot be used."""
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
                    if error.error_code == "RESOURCE_ALREADY_EXISTS":  # some servers do not show deleted experiments
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
        """Return the message about a deleted run or experiment of MLflow that the training needs."""
        database = database_file(self.uri)
        store = f"sqlite:///{database}" if database else redact(self.uri)
        other = ", or give another --experiment" if group == "experiments" else ""
        command = f"MLFLOW_TRACKING_URI={store} mlflow {group} restore --{option} {name}"
        return f"{what} is deleted there; restore it: {command}{other}"

    def _check_run(self, error: Exception) -> None:
        """Raise an error if MLflow's run does not exist or is deleted.

        Records of a missing or deleted run wait in the spool.
        """
        self.found_run.clear()  # the next attempt looks for the run again, if this method raises
        if self._client.get_run(self.run_id).info.lifecycle_stage == "deleted":
            experiment = self._client.get_experiment(self.experiment_id)
            if experiment.lifecycle_stage == "deleted":
                words = (f"the experiment {experiment.name}", "experiments", "experiment-id", experiment.experiment_id)
                raise Unusable(self._restore(*words)) from error
            raise Unusable(self._restore(f"the run {self.run_id}", "runs", "run-id", str(self.run_id))) from error
        self.found_run.set()

    # --- Sending records ---

    def _send_metrics(self, records: list[dict[str, Any]], end: int) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
        ]
        for first in range(0, len(metrics), METRICS_PER_BATCH):
            self._log_batch(metrics=metrics[first : first + METRICS_PER_BATCH])
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

        params = self._client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in record["params"].items() if key not in params]
        # MLflow's parameters never change. What differs in a resumed run is recorded as tags.
        tags = record["tags"] | {f"resumed.{k}": v for k, v in record["params"].items() if params.get(k, v) != v}
        for first in range(0, len(new), PARAMS_PER_BATCH):
            self._log_batch(params=new[first : first + PARAMS_PER_BATCH])
        rows = [RunTag(valid_key(key), cut(value, TAG_CHARACTERS)) for key, value in tags.items()]
        for first in range(0, len(rows), PARAMS_PER_BATCH):
            self._log_batch(tags=rows[first : first + PARAMS_PER_BATCH])
        self._client.update_run(self.run_id, status="RUNNING")

    def _log_batch(self, **entities: list[Any]) -> None:
        """Log a batch of records in MLflow.

        If the server refuses the batch because of one bad record, log the other records.
        """
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
                        say(f"MLflow refused {kind} {row.key}: {first_line(refusal)}")

    def _send_set_aside(self) -> None:
        records = self._state["set_aside"]
        self._state["set_aside"] = []
        for record in records:
            self._send_file(record)
        # The state is written only now. If the server dies in between, all of them are still set aside on disk.
        self._advance(self._state["offset"])

    def _send_file(self, record: dict[str, Any]) -> None:
        """Upload a picture or a file to the artifact store.

        A file that the artifact store does not take is set aside for the next start. Setting such files aside lets the
        curves arrive even if the artifact store is set up wrongly.
        """
        path = self.folder / record["file"]
        if not path.is_file():
            say(f"{path} is gone and is not sent to MLflow")
            return
        try:
            self._client.log_artifact(self.run_id, str(path), record["folder"] or None)
            if record["kind"] == "image":
                # The names are those of mlflow.log_image. MLflow's picture grid shows the small copy and reads the tag.
                small = path.with_name(f"{path.stem}+compressed.webp")
                with Image.open(path) as image:
                    image.thumbnail((256, 256))
                    image.save(small)
                self._client.log_artifact(self.run_id, str(small), record["folder"])
                self._client.set_tag(self.run_id, "mlflow.loggedImages", "True")
        except Exception as error:
            self._check_run(error)  # raises if the server itself does not answer
            self._state["set_aside"].append(record)
            say(f"MLflow's artifact store did not take {path.name} ({first_line(error)}); it is tried again later")


def replay(run_dir: Path, tracking_uri: str | None = None) -> int:
    """Send the pending records of a run folder.

    Args:
        run_dir: path of the run folder.
        tracking_uri: MLflow's tracking URI. With None, use `MLFLOW_TRACKING_URI`, otherwise the default.

    Returns:
        The number of records that are still pending. The number 0 means that all records were sent.

    Raises:
        UserError: the run folder has no spool.
    """
    if not (run_dir / SPOOL_FILE).is_file():
        raise UserError(f"{run_dir / SPOOL_FILE} is missing; give the folder of a run that was tracked")
    sender = Sender(run_dir, resolve_uri(tracking_uri))
    try:
        sender.send()
    except Exception as error:
        why = explain(error, sender.uri)[0]
        say(f"MLflow at {sender.uri}{' ' if why.startswith('does not take') else ': '}{why}")
    return sender.pending()


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Lock a file between processes. The context yields False if another process holds the lock and `wait` is False.

    Forked workers do not inherit the lock, as filelock releases the lock in forked processes. The system frees the lock
    when the process is killed.
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
