"""The page Curves on a real `mlflow server` that is down, up, killed or silent, over a real websocket."""

import json
import socket
import sqlite3
import time
import urllib.request

import pytest

from streamlit_client import Session, serve
from test_tracking import Server, empty_database  # noqa: F401 - a fixture

RUNS, POINTS = 12, 2000  # what takes a server seconds to send


def fill(server: Server) -> None:
    """Finished runs by MLflow's own API, their points straight into its database."""
    ids = []
    for number in range(RUNS):
        body = {"experiment_id": "0", "run_name": f"run {number}", "start_time": number}
        request = urllib.request.Request(
            f"{server.uri}/api/2.0/mlflow/runs/create", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            ids.append(json.load(answer)["run"]["info"]["run_id"])
    with sqlite3.connect(server.folder / "mlflow.db", timeout=20) as store:
        for metric in ("train_loss", "val_loss"):
            rows = [(metric, 1 / step, 1000 * step, run, step) for run in ids for step in range(1, POINTS + 1)]
            store.executemany(
                "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)", rows
            )
            store.executemany(
                "INSERT INTO latest_metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, 0, 0, ?, 0, 0)",
                [(metric, run) for run in ids],
            )
        store.execute("UPDATE runs SET status = 'FINISHED'")
    store.close()


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory, empty_database):  # noqa: F811
    server = Server(tmp_path_factory.mktemp("mlflow"), empty_database)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory, mlflow_server):
    folder = tmp_path_factory.mktemp("dashboard")
    with serve(folder, folder / "log.txt", env={"MLFLOW_TRACKING_URI": mlflow_server.uri}) as running:
        yield running


def look_until_done(session: Session) -> list[str]:
    """What the page says while it looks at the server again and again by itself."""
    notes, until = [], time.monotonic() + 60
    while session.looks and time.monotonic() < until:
        notes += session.texts()
        time.sleep(0.1)
        assert session.look() < 5  # never blocked, however slow the server is
    assert not session.looks
    return notes


def words(session: Session) -> str:
    return " ".join(session.texts()).replace("\\", "")


def test_a_server_that_is_down_then_up_then_killed_then_silent(dashboard, mlflow_server):
    with Session(dashboard.url).connected() as early, Session(dashboard.url).connected() as session:
        early.open("curves", "source=MLflow&metric=train_loss")
        look_until_done(early)
        assert f"MLflow at {mlflow_server.uri} does not answer" in words(early)
        mlflow_server.start()
        fill(mlflow_server)
        assert session.open("curves", "source=MLflow&metric=train_loss") < 10
        notes = {note for note in look_until_done(session) if "have arrived" in note}
        assert len(notes) > 1  # some curves were drawn before others had come
        assert session.has("vega_lite_chart")
        early.set("source", "MLflow")  # a page that met no server finds it at its next click
        look_until_done(early)
        assert "does not answer" not in words(early)

        mlflow_server.kill()
        session.set("scale", "log")  # what was there stays
        assert session.has("vega_lite_chart")
        session.set("metric", ["val_loss"])
        look_until_done(session)
        assert "start it or fix MLFLOW_TRACKING_URI" in words(session)  # its port may outlive its end by a moment
        with Session(dashboard.url).connected() as late:
            late.open("curves", "source=MLflow")
            look_until_done(late)
            assert "does not answer" in words(late)

        with socket.create_server(("127.0.0.1", mlflow_server.port)), Session(dashboard.url).connected() as patient:
            patient.open("curves", "source=MLflow")
            for _ in range(3):
                assert patient.look() < 5
            assert "waiting for the server's list of runs" in words(patient)
            assert patient.set("source", "Run folders") < 5
            assert "make demo" in words(patient)
        assert dashboard.health() == 200
        assert not [*early.problems, *session.problems, *late.problems, *patient.problems]
