"""Tracking: each record arrives once, whatever the server does, and secrets arrive nowhere."""

import http.server
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from t2i import redaction
from t2i.errors import UserError
from t2i.evaluation import preferences
from t2i.pictures import cells
from t2i.tracking import addresses, mlflow_client, mlflow_tracker, moved_database, sender, spool
from test_compare import make_run

SCRIPTS = Path(mlflow_tracker.__file__).parents[2]
CONFIG = {"data": {"resolution": 64}, "train_unet": {"learning_rate": 1e-4, "betas": [0.9, 0.999]}}
CANARY = "canary-5f1c9e77"  # a secret given in each of the ways below
PASSWORD = "pass-canary-0b2d"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [key for key in os.environ if key.startswith(("MLFLOW_EXPERIMENT", "MLFLOW_RUN"))]:
        monkeypatch.delenv(name)
    for name in ("URI", "USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("database")
    SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder / "mlruns"))
    return folder / "mlflow.db"


def client(uri: str | None = None):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri or f"sqlite:///{Path.cwd()}/mlflow.db")


def points(run_id: str, key: str, uri: str | None = None) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(uri).get_metric_history(run_id, key)]


def files(run_id: str, folder: str = "", uri: str | None = None) -> list[str]:
    return sorted(Path(file.path).name for file in client(uri).list_artifacts(run_id, folder) if not file.is_dir)


def start(run: Path = Path("run"), config: dict = CONFIG, **options) -> mlflow_tracker.Tracker:
    return mlflow_tracker.Tracker(run, experiment="flowers", run_name="first", config=config, **options)


def picture() -> np.ndarray:
    return np.full((40, 60, 3), 128, np.uint8)


# --- A local database ------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_in_the_database_beside_its_artifacts(empty_database: Path) -> None:
    shutil.copy(empty_database, "mlflow.db")
    many = {f"p{index}": index for index in range(250)}
    tracker = start(config=CONFIG | {"many": many, "prompts": {"long": "x" * 7000}}, tags={"dataset": "abc"})
    tracker.log_metrics({"train loss (mean)": 0.5, "broken": math.nan, "huge": math.inf}, 1)
    tracker.log_image(picture(), "samples/fixed", 3)
    Path("notes.txt").write_text("as it was")
    tracker.log_artifact(Path("notes.txt"), "texts")
    Path("notes.txt").write_text("changed later")
    tracker.finish()

    run = client().get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train_unet.betas"] == "[0.9, 0.999]"
    assert len(run.data.params) == 3 + 250 + 1
    assert len(run.data.params["prompts.long"]) == spool.PARAM_CHARACTERS
    assert run.data.params["prompts.long"].endswith("[cut at 6000 characters]")
    assert run.data.tags["dataset"] == "abc"
    assert points(run.info.run_id, "train loss _mean_") == [(1, 0.5)]
    assert math.isnan(run.data.metrics["broken"])
    assert run.data.metrics["huge"] > 1e308
    assert tracker.view == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    stored = list(Path("mlruns").rglob("notes.txt"))
    assert [path.read_text() for path in stored] == ["as it was"]


def test_pictures_carry_the_names_that_mlflow_gives_them(empty_database: Path) -> None:
    """MLflow's page finds a run's pictures by their names: what log_image writes must look the same."""
    shutil.copy(empty_database, "mlflow.db")
    tracker = start()
    tracker.log_image(picture(), "samples/fixed", 3)
    tracker.finish()
    other = client().create_run(client().get_run(tracker.run_id).info.experiment_id).info.run_id
    client().log_image(other, picture(), key="samples/fixed", step=3)

    def shape(name: str) -> list[str]:
        parts = name.removesuffix("+compressed.webp").removesuffix(".png").split("+")
        assert parts[4].isdigit()
        return [*parts[:4], str(len(parts[5])), name[-4:]]

    ours, theirs = files(tracker.run_id, "images"), files(other, "images")
    assert [shape(name) for name in ours] == [shape(name) for name in theirs]
    tag = "mlflow.loggedImages"
    assert client().get_run(tracker.run_id).data.tags[tag] == client().get_run(other).data.tags[tag]


def test_a_blind_tests_result_stands_in_the_run_of_the_first_model(empty_database: Path) -> None:
    shutil.copy(empty_database, "mlflow.db")
    run = make_run(Path("outputs/one"))
    first, second = (
        cells.plan(run, f"checkpoint-0000{step}0", cells.Cell("", guidance_scale=1.5), [])[0] for step in (2, 1)
    )
    preferences.track(first, second, preferences.Count(6, 2, 4), "")
    (found,) = client().search_runs([client().get_experiment_by_name("t2i").experiment_id])
    name = "blind_test/one/checkpoint-000010 at 1.5"
    assert {
        key: points(found.info.run_id, f"{name}/{key}") for key in ("won", "lost", "no_difference", "share_won")
    } == {
        "won": [(20, 6.0)],
        "lost": [(20, 2.0)],
        "no_difference": [(20, 4.0)],
        "share_won": [(20, 0.75)],
    }


def test_a_later_blind_test_replaces_the_result_and_leaves_the_runs_status(
    empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(sender.Sender):
        def send(self) -> None:
            raise ConnectionError("no answer")

    shutil.copy(empty_database, "mlflow.db")
    run = make_run(Path("outputs/one"))
    first, second = (
        cells.plan(run, f"checkpoint-0000{step}0", cells.Cell("", guidance_scale=1.5), [])[0] for step in (2, 1)
    )
    training = start(run)
    training.finish("KILLED")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_tracker, "Sender", Silent)
        assert preferences.track(first, second, preferences.Count(6, 2, 2), "") == run / "mlflow_spool.jsonl"
    assert preferences.track(first, second, preferences.Count(30, 10, 10), "") is None
    found = client().get_run(training.run_id)
    assert (found.info.status, found.data.params["data.resolution"]) == ("KILLED", "64")
    name = "blind_test/one/checkpoint-000010 at 1.5/won"
    assert points(training.run_id, name) == [(20, 6.0), (20, 30.0)]
    assert found.data.metrics[name] == 30.0  # the value in MLflow's table


def test_a_resumed_run_goes_on_in_the_same_run(empty_database: Path) -> None:
    shutil.copy(empty_database, "mlflow.db")
    first = start()
    first.log_metrics({"loss": 1.0}, 1)
    first.finish("KILLED")
    with open("run/mlflow_spool.jsonl", "a") as file:
        file.write('{"kind": "metrics", "ti')  # the last words of a process that died while writing
    second = start(config={"data": {"resolution": 128}, "new": 1})
    assert client().get_run(second.run_id).info.status == "RUNNING"
    second.log_metrics({"loss": 0.5}, 2)
    second.finish()
    assert second.run_id == first.run_id
    assert points(first.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    run = client().get_run(first.run_id)
    assert (run.data.params["data.resolution"], run.data.tags["resumed.data.resolution"]) == ("64", "128")
    assert run.data.params["new"] == "1"


def test_sending_everything_twice_changes_nothing(empty_database: Path) -> None:
    shutil.copy(empty_database, "mlflow.db")
    tracker = start()
    for step in range(1500):  # more than one batch
        tracker.log_metrics({"loss": 1 / (step + 1), "broken": math.nan}, step)
    tracker.log_image(picture(), "samples", 3)
    tracker.finish()
    before = points(tracker.run_id, "loss"), files(tracker.run_id, "images")
    Path("run/mlflow_spool/state.json").unlink()  # as if no answer had arrived

    assert sender.replay(Path("run")) == 0
    assert len(client().search_runs(["1"])) == 1
    assert (points(tracker.run_id, "loss"), files(tracker.run_id, "images")) == before
    assert before[0] == [(step, 1 / (step + 1)) for step in range(1500)]
    assert len(points(tracker.run_id, "broken")) == 1500


def test_an_artifact_store_out_of_order_holds_back_no_curve(
    empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_database, "mlflow.db")
    Path("mlruns").write_text("a file where the folder of all artifacts should be")
    tracker = start()
    tracker.log_image(picture(), "samples", 3)
    tracker.log_metrics({"loss": 0.5}, 3)
    tracker.finish()
    assert points(tracker.run_id, "loss") == [(3, 0.5)]
    assert "records not sent yet: 1" in capsys.readouterr().err
    Path("mlruns").unlink()
    assert sender.replay(Path("run")) == 0
    assert len(files(tracker.run_id, "images")) == 2


def test_a_plain_folder_is_refused_with_the_mend() -> None:
    with pytest.raises(UserError, match=r"sqlite:///file\.db"):
        start(tracking_uri="./mlruns")
    with pytest.raises(UserError, match="tracked"):
        sender.replay(Path("run"))


@pytest.mark.parametrize(
    ("uri", "fix"),
    [
        ("localhost:5000", "lacks http://; give http://localhost:5000"),
        ("127.0.0.1:5000/x", "give http://127.0.0.1:5000/x"),
        ("dagshub.com/me/flowers.mlflow", "give https://dagshub.com/me/flowers.mlflow"),
        ("me:s3cretpw@mlflow.corp:5000", "give http://mlflow.corp:5000, and the user in MLFLOW_TRACKING_USERNAME"),
        (
            "https://me:p@ss/s3cretpw@h.org:5000/x",
            "has an @ after its server's name; write / [?] # @ of the password as %2F",
        ),
        (
            "https://me:p/s3cretpw@h.org",
            "write / [?] # @ of the password as %2F %3F %23 %40, or give MLFLOW_TRACKING_USERNAME",
        ),
        ("HTTPS://me:p#s3cretpw@h.org", "write / [?] # @ of the password"),
        ("https://me:p?s3cretpw@h.org", "write / [?] # @ of the password"),
        ("https://me:s3cretpw", r"no valid port \(1 to 65535\); give https://host:port; if it has a password, write /"),
        ("https://h.org:99999", r"no valid port \(1 to 65535\)"),
        ("https://me:s3cret[pw@h.org", "write those of a password as %5B %5D"),
        ("postgresql://me:p/s3cretpw@db/x", r"give postgresql://host:port/database; if it has .* as %2F %3F %23 %40$"),
        ("MySQL://me:s3cretpw@db/x", "give mysql://…$"),
        ("SQLITE:///mlflow.db", "begins with capitals, which MLflow does not know; give sqlite:///mlflow.db"),
        ("notes.txt", "is a file here, to which MLflow 3 cannot write; give sqlite:///mlflow.db"),
        ("runs.data", "lacks sqlite:///; give sqlite:///runs.data"),
        ("http://", "names no host; give http://host:port"),
        ("sqlite:runs.db", "lacks slashes; give sqlite:///runs.db"),
        ("sqlite://runs.db", "give sqlite:///runs.db"),
        ("sqlite:///", "names no file"),
        ("runs.db", "lacks sqlite:///; give sqlite:///runs.db"),
        ("postgres://me@db/mlflow", "give postgresql://"),
        ("htps://mlflow.corp", r"give http\(s\)://host:port"),
    ],
)
def test_an_address_that_is_none_gets_the_one_that_is_meant(uri: str, fix: str) -> None:
    Path("notes.txt").touch()
    Path("runs.data").write_bytes(b"SQLite format 3\0")
    with pytest.raises(UserError, match=fix) as error:
        addresses.resolve_uri(uri)
    assert "s3cret" not in str(error.value)


def test_the_password_of_an_address_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", " HTTPS://me:p@ss%2Fw0rd@h.org:5000/x ")
    assert addresses.resolve_uri(None) == os.environ["MLFLOW_TRACKING_URI"] == "https://h.org:5000/x"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss/w0rd")
    assert "p@ss" not in redaction.redact("told: p@ss/w0rd, p%40ss%2Fw0rd")


# --- A folder that moves ---------------------------------------------------------------------------------------------


def test_artifacts_follow_the_database(empty_database: Path, tmp_path: Path) -> None:
    """Moved, copied, or at a place of somebody's own choice: by MLflow's client before and after."""

    def artifacts(home: Path) -> dict[str, str]:
        found = client(f"sqlite:///{home}/mlflow.db")
        return {run.info.run_name: run.info.artifact_uri for run in found.search_runs(["1", "2"])}

    (tmp_path / "a").mkdir()
    shutil.copy(empty_database, tmp_path / "a/mlflow.db")
    before = client(f"sqlite:///{tmp_path}/a/mlflow.db")
    chosen = (tmp_path / "disk/mlruns/own").as_uri()
    (tmp_path / "disk/mlruns/own").mkdir(parents=True)
    for name, location in (("t2i", (tmp_path / "a/mlruns/t2i").as_uri()), ("own", chosen)):
        before.create_experiment(name, artifact_location=location)
    first = before.create_run("1", run_name="first").info.run_id
    before.create_run("2", run_name="own")
    before.log_text(first, "as it was", "notes.txt")
    assert moved_database.follow_move(tmp_path / "a/mlflow.db") == []

    (tmp_path / "a").rename(tmp_path / "b")
    (told,) = moved_database.follow_move(tmp_path / "b/mlflow.db")
    assert told.endswith(f"experiment t2i go to, and come from, {tmp_path}/b/mlruns/t2i")
    assert moved_database.follow_move(tmp_path / "b/mlflow.db") == []
    assert artifacts(tmp_path / "b")["first"].startswith((tmp_path / "b/mlruns/t2i").as_uri())
    assert artifacts(tmp_path / "b")["own"].startswith(chosen)
    after = client(f"sqlite:///{tmp_path}/b/mlflow.db")
    assert [file.path for file in after.list_artifacts(first)] == ["notes.txt"]
    second = after.create_run("1").info.run_id
    after.log_text(second, "new", "notes.txt")
    assert not (tmp_path / "a").exists()

    shutil.copytree(tmp_path / "b", tmp_path / "c", ignore=shutil.ignore_patterns(second))
    assert len(moved_database.follow_move(tmp_path / "c/mlflow.db")) == 1
    copied = client(f"sqlite:///{tmp_path}/c/mlflow.db")
    assert copied.get_run(first).info.artifact_uri.startswith((tmp_path / "c").as_uri())
    assert copied.get_run(second).info.artifact_uri.startswith((tmp_path / "b").as_uri())  # that one was left behind


# --- What refuses, and why -------------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's `answer`: status and body; the first one `slow` seconds later."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        slow, self.server.slow = self.server.slow, 0
        time.sleep(slow)
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.slow, server.url = 0, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def why(uri: str) -> str:
    mlflow_client.import_mlflow()
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever MLflow raises
        client(uri).search_experiments(max_results=1)
    return mlflow_client.explain(error.value, uri)[0]


def test_a_server_that_refuses_says_why(answering, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "<!DOCTYPE html><html>Sign in</html>"
    for status, body, sentence in (
        (
            401,
            '{"error_code": "UNAUTHENTICATED", "message": "token expired"}',
            "token expired); correct MLFLOW_TRACKING_TOKEN",
        ),
        (403, "no", "it does not let these credentials write (no); correct MLFLOW_TRACKING_TOKEN"),
        (200, page, "it answers with a web page, not as MLflow does; correct the address in MLFLOW_TRACKING_URI"),
        (404, page, "it answers with a web page"),
        (404, "nothing", "it has no MLflow at this address (nothing); correct MLFLOW_TRACKING_URI"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "x" * 12)
        answering.answer = (status, body)
        assert sentence in why(answering.url)
    monkeypatch.setenv("http_proxy", answering.url.replace("//", "//me:s3cretpw@"))
    monkeypatch.setenv("no_proxy", "")
    answering.answer = (403, page)
    told = why("http://mlflow.corp:5000")
    assert f"through the proxy http://[redacted]@127.0.0.1:{answering.server_port}: set NO_PROXY=mlflow.corp" in told
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert why("http://mlflow.corp:5000").startswith(
        "the proxy http://127.0.0.1:9 does not let the request through ([Errno 111]"
    )


def test_a_database_that_cannot_be_used_says_why(empty_database: Path, tmp_path: Path) -> None:
    assert (
        why("postgresql+psycopg://me@127.0.0.1:9/x")
        == "its driver psycopg is not installed; run: pip install 'psycopg[binary]'"
    )
    assert why("mysql://me@127.0.0.1:9/x").endswith("pip install mysqlclient")
    for uri, package in (("postgresql+psycopg2://me@db/x", "psycopg2-binary"), ("mssql+pyodbc://me@db/x", "pyodbc")):
        assert mlflow_client.explain(mlflow_client.missing_driver(uri), uri)[0].endswith(f"pip install {package}")
    assert mlflow_client.missing_driver("sqlite:///x.db") is None
    for name, version in (("newer", "ffffffffffff"), ("older", "f5a4f2784254")):
        shutil.copy(empty_database, tmp_path / f"{name}.db")
        with closing(sqlite3.connect(tmp_path / f"{name}.db")) as store, store:
            store.execute("UPDATE alembic_version SET version_num = ?", (version,))
    told = why(f"sqlite:///{tmp_path}/older.db")
    assert told.endswith(f"copy older.db, then run: mlflow db upgrade sqlite:///{tmp_path}/older.db")
    told = why(f"sqlite:///{tmp_path}/newer.db")
    assert "install that MLflow (pip install --upgrade mlflow), or name another database" in told
    assert "db upgrade" not in told
    (tmp_path / "text.db").write_text("no database" * 100)
    assert (
        why(f"sqlite:///{tmp_path}/text.db") == "this file is no SQLite database; name another in MLFLOW_TRACKING_URI"
    )


def test_one_warning_does_not_silence_another(
    answering, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "START_WAIT_S", 0.1)
    answering.slow, answering.answer = 0.5, (401, '{"error_code": "UNAUTHENTICATED", "message": "token expired"}')
    tracker = start(tracking_uri=answering.url)
    tracker.finish()
    said = capsys.readouterr().err
    assert said.count("has not answered within") == 1
    assert said.count("it does not accept the credentials (UNAUTHENTICATED: token expired)") == 1
    assert "records not sent yet: 2" in said


def test_a_deleted_experiment_says_how_to_go_on(empty_database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(empty_database, "mlflow.db")
    client().delete_experiment(client().create_experiment("flowers"))
    start().finish()
    said = capsys.readouterr().err
    assert f"MLFLOW_TRACKING_URI=sqlite:///{Path.cwd()}/mlflow.db mlflow experiments restore --experiment-id 1" in said
    tracker = mlflow_tracker.Tracker(Path("run"), experiment="roses", run_name="second", config=CONFIG)
    tracker.finish()
    assert client().get_experiment(client().get_run(tracker.run_id).info.experiment_id).name == "roses"
    assert "records not sent yet" not in capsys.readouterr().err


# --- A server that comes and goes ------------------------------------------------------------------------------------


class Server:
    """A real `mlflow server` on a port of its own, with the database and the artifacts in `folder`."""

    def __init__(self, folder: Path, database: Path):
        self.folder = folder
        shutil.copy(database, folder / "mlflow.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"]
        command += ["--artifacts-destination", "store", "--port", str(self.port), "--workers", "1"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # which nothing here needs
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), empty_database)
    yield server
    server.kill()


DIES = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from t2i.tracking import mlflow_tracker
canary = os.environ["HF_TOKEN"]
endpoint = "https://hub.example/?access_token=" + canary
config = {"hub": {"hub_token": canary, "endpoint": endpoint}, "data": {"name": "a"}}
began = time.monotonic()
tracker = mlflow_tracker.Tracker(Path("run"), experiment="flowers", run_name="dies", config=config,
                           tags={"command": " ".join(sys.argv), "note": "x" + canary + "y"})
print(tracker.uri, tracker.view, tracker.run_id)
for step in range(5):
    tracker.log_metrics({"loss": step / 2}, step)
tracker.log_image(np.zeros((8, 8, 3), np.uint8), "samples", 4)
Path("config.yaml").write_text(f"hub_token: {canary}\\nurl: {sys.argv[1]}\\nlearning_rate: 0.1\\n")
tracker.log_artifact(Path("config.yaml"))
Path("config.yaml").unlink()
tracker.finish()
print("seconds", time.monotonic() - began, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_that_is_down_costs_seconds_and_gets_everything_later_once_and_no_secret(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.uri.replace("://", f"://flora:{PASSWORD}@")
    secrets = {"HF_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY, "MLFLOW_TRACKING_URI": address}
    command = [sys.executable, "-c", DIES, address]
    environment = os.environ | secrets | {"PYTHONPATH": str(SCRIPTS)}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert died.returncode == -signal.SIGKILL, died.stderr
    printed = died.stdout + died.stderr
    assert float(died.stdout.split()[-1]) < 15
    assert f"MLflow at {server.uri} does not take records (Connection refused)" in died.stderr
    assert died.stderr.count("warning") == 1
    assert "records not sent yet: 9" in died.stderr

    server.start()
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert sender.replay(Path("run")) == 0
    assert sender.replay(Path("run")) == 0
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == PASSWORD  # the connection has it
    run = client(server.uri).search_runs(["1"], "attributes.run_name = 'dies'")
    assert [one.info.status for one in run] == ["FINISHED"]
    assert points(run[0].info.run_id, "loss", server.uri) == [(step, step / 2) for step in range(5)]
    assert len(files(run[0].info.run_id, "images", server.uri)) == 2
    assert run[0].data.params["data.name"] == "a"
    stored = next((server.folder / "store").rglob("config.yaml")).read_text()
    assert "learning_rate: 0.1" in stored

    everything = {"printed": printed.encode()}
    for folder in (tmp_path, server.folder):
        everything |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(name.endswith("mlflow.db") for name in everything)
    leaks = [name for name, data in everything.items() if CANARY.encode() in data or PASSWORD.encode() in data]
    assert leaks == []


def test_a_server_killed_midway_gets_the_rest_when_it_is_back(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    if server.process is None:
        server.start()
    tracker = start(tracking_uri=server.uri)
    assert tracker.view == f"{server.uri}/#/experiments/1/runs/{tracker.run_id}"
    tracker.log_metrics({"loss": 0.0}, 0)
    for _ in range(100):
        if points(tracker.run_id, "loss", server.uri):
            break
        time.sleep(0.1)
    server.kill()
    for step in range(1, 4):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_image(picture(), "samples", 3)
    began = time.monotonic()
    tracker.finish("FAILED")
    assert time.monotonic() - began < 12
    said = capsys.readouterr().err
    assert said.count("warning: MLflow at") == 1
    assert "records not sent yet: 5" in said

    resumed = start(tracking_uri=server.uri)  # the server is still down
    assert resumed.run_id == tracker.run_id
    resumed.log_metrics({"loss": 4.0}, 4)
    server.start()
    resumed.finish()
    until = time.monotonic() + 60  # on a busy machine the server takes its time
    while sender.replay(Path("run"), server.uri):
        assert time.monotonic() < until
        time.sleep(0.5)
    assert points(tracker.run_id, "loss", server.uri) == [(step, float(step)) for step in range(5)]
    assert len(files(tracker.run_id, "images", server.uri)) == 2
    assert client(server.uri).get_run(tracker.run_id).info.status == "FINISHED"


# --- Secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "https://me:s3cretpw@host/path",
        "https://s3cretpw@host/path",
        "https://host/a?x=1&access_token=s3cretpw&y=2",
        "https://bucket/a?X-Amz-Signature=s3cretpw",
        "hub_token: s3cretpw",
        '{"api_key": "s3cretpw and more"}',
        "train.py --use_ema --hub_token s3cretpw --steps 5",
        "train.py --password=s3cretpw",
        "secretKey = 's3cretpw'",
        "Authorization: Bearer s3cretpw",
        "got hf_s3cretpwABCDEFGHIJKL from the hub",
    ],
)
def test_secrets_are_taken_out_of_texts(text: str) -> None:
    assert "s3cretpw" not in redaction.redact(text)
    assert redaction.REDACTED in redaction.redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "num_tokens: 77",
        "bos_token: <|startoftext|>",
        "tokenizer: openai/clip-vit-large-patch14",
        "hub_token: null",
        "https://dagshub.com/me/flowers.mlflow/#/experiments/0",
        "a sentence about a token that is no secret",
        "learning_rate: 0.0001\nvalue_key: image",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redaction.redact(text) == text


def test_values_of_secret_variables_are_taken_out_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123-plain/looking")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:swordfish-42@host/db")
    config = {"a": {"list": ["x0123-plain/lookingx"]}, "b": "0123-plain%2Flooking", "c": 5, "d": "swordfish-42"}
    assert redaction.redact_config(config) == {
        "a": {"list": ["x[redacted]x"]},
        "b": "[redacted]",
        "c": 5,
        "d": "[redacted]",
    }


# --- MLflow's own variables ------------------------------------------------------------------------------------------


def test_mlflows_variables_name_what_the_settings_leave_open(
    empty_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_database, "mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "roses")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "second try")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracker = mlflow_tracker.Tracker(Path("run"), experiment="t2i", run_name="run", config={})
    tracker.finish()
    run = client().get_run(tracker.run_id)
    assert client().get_experiment(run.info.experiment_id).name == "roses"
    assert run.info.run_name == "second try"
    assert "system/cpu_utilization_percentage" in run.data.metrics
    said = capsys.readouterr().err
    assert "experiment roses, by MLFLOW_EXPERIMENT_NAME" in said
    assert "MLFLOW_EXPERIMENT_ID is not used" in said
    steps = [step for step, _ in points(tracker.run_id, "system/cpu_utilization_percentage")]
    again = mlflow_tracker.Tracker(Path("run"), experiment="flowers", run_name="run", config={})
    again.finish()
    assert "experiment flowers, by --experiment; MLFLOW_EXPERIMENT_NAME=roses is not used" in capsys.readouterr().err
    assert len(points(tracker.run_id, "system/cpu_utilization_percentage")) > len(steps)  # counted on, not again


def test_a_run_that_mlflow_run_id_names_is_gone_on_with(
    empty_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_database, "mlflow.db")
    theirs = client().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs)
    tracker = start()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.run_id == theirs
    assert points(theirs, "loss") == [(1, 1.0)]
    assert client().get_experiment_by_name("flowers") is None
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    again = start()  # a folder stays with its run
    again.finish()
    assert again.run_id == theirs
    assert f"records to the run {theirs}, as before" in capsys.readouterr().err
    start(Path("other")).finish()
    assert f"MLFLOW_RUN_ID={'f' * 32} is no run there; correct it, or unset it" in capsys.readouterr().err


def test_sagemakers_managed_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    arn = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/flowers"
    assert addresses.resolve_uri(arn) == arn
    with pytest.raises(UserError, match="is no ARN of SageMaker's managed MLflow; give arn:aws:sagemaker:REGION"):
        addresses.resolve_uri("arn:aws:s3:::bucket")
    monkeypatch.setattr(addresses, "entry_points", lambda group: [])
    with pytest.raises(UserError, match="needs a package: pip install sagemaker-mlflow"):
        addresses.resolve_uri(arn)
    tracker = object.__new__(mlflow_tracker.Tracker)
    tracker._sender = sender.Sender(Path("run"), arn)
    assert tracker.view.endswith("-tracking-server-url --tracking-server-name flowers --region eu-west-1")
