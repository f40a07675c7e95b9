"""Track a training run in MLflow without ever stopping or slowing the run. This module imports no torch.

The tracker appends every record to `<run_dir>/mlflow_spool.jsonl`, and pictures and files to
`<run_dir>/mlflow_spool/`. A daemon thread sends the records to MLflow (`t2i.tracking.sender`). The training loop pays
for one short write per record.

An MLflow server that is down delays a training by seconds at its start. While the MLflow server is down, the records
stay in the spool. When the server is back, each record is sent once, in order, by this process or at the next start on
the same folder.

MLflow's own environment variables are respected. `MLFLOW_EXPERIMENT_NAME` and `MLFLOW_RUN_NAME` apply if the settings
name no experiment or run. `MLFLOW_RUN_ID` applies to a folder that has no run yet.
`MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING` records the machine's use.
"""

import atexit
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i.redaction import redact, redact_config
from t2i.tracking.addresses import MANAGED_ARN, database_file, resolve_uri
from t2i.tracking.mlflow_client import explain, first_line, import_mlflow, missing_driver, say
from t2i.tracking.sender import Sender
from t2i.tracking.spool import copy_redacted, ends_torn, flatten, read_spool, valid_key
from t2i.tracking.system_metrics import SystemMetrics, requested_system_metrics

DEFAULT_EXPERIMENT = "t2i"

SEND_EVERY_S = 2.0  # Sending holds the interpreter for about 20 ms: 1 % of this.
RETRY_AT_MOST_EVERY_S = 30.0  # longest pause between attempts at a server that stays down
START_WAIT_S = 5.0  # longest wait for a server's first answer
START_WAIT_DATABASE_S = 60.0  # A new database makes its tables in about 5 s, and takes longer on a busy machine.
FINISH_WAIT_S = 10.0  # longest wait for the last records to be sent


def find_names(experiment: str, run_name: str, folder: str) -> tuple[str, str, list[str]]:
    """Choose the names of experiment and run from the settings and MLflow's variables.

    Args:
        experiment: experiment in the settings, which is used unless it is the default, `DEFAULT_EXPERIMENT`.
        run_name: name of the run in the settings, which is used unless it is the default, the folder's name.
        folder: name of the run folder.

    Returns:
        The experiment, the run's name, and a sentence on each environment variable that changes one of these names or
            is not used.
    """
    names, sentences = [], []
    for variable, option, setting, default in (
        ("MLFLOW_EXPERIMENT_NAME", "experiment", experiment, DEFAULT_EXPERIMENT),
        ("MLFLOW_RUN_NAME", "run_name", run_name, folder),
    ):
        value = os.environ.get(variable, "").strip()
        if value and setting == default:
            sentences += [f"MLflow: {option} {value}, by {variable}"] if value != setting else []
            setting = value
        elif value and value != setting:
            sentences.append(f"MLflow: {option} {setting}, by --{option}; {variable}={value} is not used")
        names.append(setting)
    if os.environ.get("MLFLOW_EXPERIMENT_ID", "").strip():
        sentences.append("MLflow: MLFLOW_EXPERIMENT_ID is not used; name the experiment in MLFLOW_EXPERIMENT_NAME")
    return names[0], names[1], sentences


class Tracker:
    """Tracker of one run in MLflow.

    The main rank makes a tracker, logs, and calls `finish` last. If a process ends without calling `finish`, MLflow's
    run is marked as FAILED. A tracker on a folder that was tracked before resumes the same run, and sends the records
    that are pending in the folder.

    Args:
        run_dir: run folder, which holds the spool.
        experiment: name of the experiment.
        run_name: name of the run.
        config: resolved settings by section, which are logged as parameters `section.key` without secrets.
        tags: further tags of the run.
        tracking_uri: MLflow's tracking URI. With None, use `MLFLOW_TRACKING_URI`, otherwise `sqlite:///mlflow.db`.
        guest: whether the tracker only adds records to the run of a training, which may be at work or interrupted. The
            run's status, parameters and tags stay, and metrics and pictures of a recorded step are recorded again. A folder that was
            never tracked gets a run of its own.

    Raises:
        UserError: MLflow cannot use the URI.
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
        guest: bool = False,
    ):
        uri = resolve_uri(tracking_uri)
        self._sender = Sender(run_dir.absolute(), uri)  # absolute: the process may end in another folder
        self._warned: set[str] = set()  # reasons printed since the server last took records
        self._lost_records = False
        self._finished = False
        # (key, step) of what earlier processes recorded: a resumed training repeats some steps.
        self._recorded: set[tuple[str, int]] = set()
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._turn = threading.Condition()
        # When the last attempt with each outcome began, in monotonic seconds.
        self._attempts = {"sent": -1.0, "failed": -1.0}
        run_dir.mkdir(parents=True, exist_ok=True)
        spool_id = self._open_spool()
        self._guest = guest and bool(spool_id)
        if not self._guest:
            self._append_start(spool_id or uuid.uuid4().hex, run_dir, experiment, run_name, config, tags or {})
        import_mlflow()  # not in the thread: two threads that import at once may see incomplete modules
        if missing := missing_driver(uri):  # now: a short run may end before the thread finds out
            self._warn(*explain(missing, uri))
        atexit.register(self.finish, "FAILED")
        threading.Thread(target=self._send_until_finished, name="mlflow", daemon=True).start()
        self._measuring: threading.Thread | None = None
        if system := requested_system_metrics():
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
        """Return the tracking URI, without user and password."""
        return redact(self._sender.uri)

    @property
    def run_id(self) -> str | None:
        """Return MLflow's id of the run, or None until the server has answered."""
        return self._sender.run_id

    @property
    def view(self) -> str:
        """Return the run's web address on a server, or the command that opens a local database."""
        if managed := MANAGED_ARN.fullmatch(self.uri):
            if managed[1] == "app":
                command = f"create-presigned-mlflow-app-url --arn {self.uri}"
            else:
                name = self.uri.rpartition("/")[2]
                command = f"create-presigned-mlflow-tracking-server-url --tracking-server-name {name}"
            return f"SageMaker Studio, or: aws sagemaker {command} --region {self.uri.split(':')[3]}"
        if not self.uri.startswith("http"):
            return f"mlflow ui --backend-store-uri {self.uri}"
        address = f"{self.uri.rstrip('/')}/#/experiments"
        return f"{address}/{self._sender.experiment_id}/runs/{self.run_id}" if self.run_id else address

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one step, NaN and infinity included. Recording metrics takes well under 1 ms."""
        values = {valid_key(key): float(value) for key, value in metrics.items()}
        if not self._guest:
            values = {key: value for key, value in values.items() if (key, int(step)) not in self._recorded}
        if values:
            self._append(kind="metrics", step=int(step), values=values)

    def log_image(self, image: np.ndarray | Image.Image, name: str, step: int) -> None:
        """Record a picture for MLflow's grid of pictures by step.

        Args:
            image: picture as a PIL image, or as uint8 [H, W, 3] or [H, W].
            name: name of the picture, the same at all steps.
            step: training step of the picture.
        """
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        if picture.mode not in ("RGB", "RGBA", "L"):
            picture = picture.convert("RGB")
        key = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", name).replace("/", "~")[:100]
        if (key, int(step)) in self._recorded and not self._guest:
            return
        now = time.time_ns() // 1_000_000
        # The name is fixed now. mlflow.log_image makes it on sending, so a picture sent twice would be shown twice.
        file = f"images/{key}+step+{int(step)}+timestamp+{now}+{uuid.uuid4()}.png"
        with self._disk():
            target = self._sender.folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            self._append(kind="image", time=now, step=int(step), file=file, folder="images")

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or every file of a folder, under `folder` of the run's artifacts.

        Recorded files are copied, so the originals may change or vanish afterwards. Secrets are removed from copies of
        text files.
        """
        for source in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
            inner = source.relative_to(path.parent).parent.as_posix() if path.is_dir() else ""
            with self._disk():
                file = f"artifacts/{uuid.uuid4().hex}/{source.name}"
                target = self._sender.folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_redacted(source, target)
                target_folder = "/".join(part for part in (folder.strip("/"), inner) if part)
                self._append(kind="artifact", file=file, folder=target_folder)

    def finish(self, status: str = "FINISHED") -> int:
        """End the run as "FINISHED", "FAILED" or "KILLED", and wait at most 10 s until everything is sent.

        No other method of the tracker may be called after `finish`.

        Returns:
            The number of records that are not sent yet. They are kept in the spool.
        """
        if self._finished:
            return 0
        self._ended.set()
        if self._measuring:
            self._measuring.join(FINISH_WAIT_S)  # The last sample is recorded before the end.
        if not self._guest:
            self._append(kind="finish", status=status)
        self._finished = True
        began = time.monotonic()
        self._wake.set()
        with self._turn:
            self._turn.wait_for(lambda: max(self._attempts.values()) >= began, FINISH_WAIT_S)
        pending = 0
        with self._disk():
            pending = self._sender.pending()
        if pending:
            say(
                f"MLflow at {self.uri}: records not sent yet: {pending}; they are kept in {self._sender.spool} "
                "and sent at the next start on this folder"
            )
        return pending

    def _append_start(
        self,
        spool_id: str,
        run_dir: Path,
        experiment: str,
        run_name: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        """Record the start of the run with its names, parameters and tags. Print what MLflow's variables change."""
        experiment, run_name, sentences = find_names(experiment, run_name, run_dir.name)
        run_id = os.environ.get("MLFLOW_RUN_ID", "").strip()
        recorded = self._sender.recorded_run()
        if run_id and recorded not in (None, run_id):
            sentences.append(
                f"MLflow: {run_dir} records to the run {recorded}, as before; "
                f"MLFLOW_RUN_ID={run_id} needs another --output_dir"
            )
        for sentence in sentences:
            say(sentence)
        source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
        self._append(
            kind="start",
            spool_id=spool_id,
            experiment=redact(experiment),
            run_name=redact(run_name),
            **({"run_id": run_id} if run_id else {}),
            params=flatten(redact_config(config)),
            tags={str(key): str(value) for key, value in redact_config(source | dict(tags)).items()},
        )

    def _measure(self, system: SystemMetrics) -> None:
        """Record the machine's use until the run ends. The step of a system metric counts its samples, as in MLflow."""
        step = 1 + max((step for key, step in self._recorded if key.startswith("system/")), default=-1)
        while not self._ended.is_set():
            try:
                values = system.measure(self._ended)
            except Exception as error:
                say(f"warning: MLflow's system metrics end: {first_line(error)}")
                return
            self.log_metrics(values, step)
            step += 1

    def _open_spool(self) -> str:
        """Open the spool for appending, and return the id of the spool, or "" for a new spool."""
        spool = self._sender.spool
        spool_id = ""
        for record, _ in read_spool(spool, 0) if spool.is_file() else ():
            if record["kind"] == "start":
                spool_id = spool_id or record["spool_id"]
            elif record["kind"] == "metrics":
                self._recorded |= {(key, record["step"]) for key in record["values"]}
            elif record["kind"] == "image":
                self._recorded.add((Path(record["file"]).name.split("+")[0], record["step"]))
        self._file = open(spool, "ab", buffering=0)  # noqa: SIM115 - open until the process ends
        if ends_torn(spool):
            self._file.write(b"\n")  # ends a line that an earlier process tore when it died
        return spool_id

    def _append(self, *, kind: str, **fields: Any) -> None:
        # The line is written by one system call. After that it outlives this process.
        record = {"kind": kind, "time": time.time_ns() // 1_000_000, **fields}
        with self._disk():
            self._file.write(json.dumps(record).encode() + b"\n")

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """On a full disk, drop records for MLflow instead of ending the run."""
        try:
            yield
        except OSError as error:
            if not self._lost_records:
                self._lost_records = True
                say(f"warning: records for MLflow are lost: {error}")

    def _warn(self, why: str, waiting_helps: bool) -> None:
        """Print each reason of a failure once, until the server takes records again."""
        reason = re.sub(r"0x[0-9a-f]+|\d+", "", why)  # ports, addresses and seconds differ between attempts
        if reason not in self._warned:
            self._warned.add(reason)
            sent = "when the server answers" if waiting_helps else "at the next start on this folder"
            mark = "" if why.startswith(("does not take", "has not answered")) else ": "
            say(
                f"warning: MLflow at {self.uri}{mark or ' '}{why}; the run continues; its records are kept in "
                f"{self._sender.spool} and sent {sent}"
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
                    say(f"MLflow at {self.uri} answers: the records kept meanwhile are sent")
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
