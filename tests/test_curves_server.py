"""The page Curves on a real `mlflow server` that is down, up, killed or silent, over a real websocket."""

import json
import re
import socket
import sqlite3
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress

import pytest

from streamlit_client import Session, free_port, serve
from test_tracking import Server, empty_database  # noqa: F401 - a fixture

RUNS, POINTS = 6, 50


def fill(server: Server) -> str:
    """Finished runs by MLflow's own API, their points straight into its database. Return the id of the oldest, asked for last."""
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
    return ids[0]


class Gate:
    """The port that the dashboard knows, before the server's. Requests for the curves of the run `held` wait for `opened`."""

    def __init__(self, server: Server):
        self.server, self.held, self.opened = server, "", threading.Event()
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.sockets: list[socket.socket] = []

    def listen(self) -> None:
        self.sockets = [socket.create_server(("127.0.0.1", self.port))]
        threading.Thread(target=self.accept, args=self.sockets, daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.server.port))
                self.sockets += [client, server]
                for ways in ((client, server), (server, client)):
                    threading.Thread(target=self.forward, args=ways, daemon=True).start()

    def forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                if b"metrics/get-history" in data and self.held.encode() in data:
                    self.opened.wait()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Be as a server that is down."""
        self.opened.set()
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture(scope="module")
def gate(tmp_path_factory, empty_database):  # noqa: F811
    server = Server(tmp_path_factory.mktemp("mlflow"), empty_database)
    gate = Gate(server)
    yield gate
    gate.close()
    server.kill()


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory, gate):
    folder = tmp_path_factory.mktemp("dashboard")
    # A request waits for its answer longer than a session waits for a page: no page can wait for a request unseen.
    variables = {"MLFLOW_TRACKING_URI": gate.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
    with serve(folder, folder / "log.txt", env=variables) as running:
        yield running


def look_until(session: Session, met: Callable[[Session], bool]) -> None:
    """Let the page look at the server again and again by itself, as a browser does, until a condition is met."""
    until = time.monotonic() + 200
    while not met(session):
        assert time.monotonic() < until, session.texts()
        time.sleep(0.05)
        session.look()


def is_done(session: Session) -> bool:
    return not session.looks


def words(session: Session) -> str:
    return " ".join(session.texts()).replace("\\", "")


def test_a_server_that_is_down_then_up_then_killed_then_silent(dashboard, gate):
    with Session(dashboard.url).connected() as early, Session(dashboard.url).connected() as session:
        early.open("curves", "source=MLflow&metric=train_loss")
        look_until(early, is_done)
        assert f"MLflow at {gate.uri} does not answer" in words(early)
        gate.server.start()
        gate.held = fill(gate.server)
        gate.listen()
        session.open("curves", "source=MLflow&metric=train_loss")  # the page answers while curves are missing
        look_until(session, lambda session: re.search(r"\b[1-9] curves have arrived; more", words(session)))
        assert session.has("vega_lite_chart")  # some curves are drawn before others have come
        gate.opened.set()
        look_until(session, is_done)
        assert session.has("vega_lite_chart")
        assert "have arrived" not in words(session)
        early.set("source", "MLflow")  # a page that met no server finds it at its next click
        look_until(early, is_done)
        assert "does not answer" not in words(early)

        gate.close()
        gate.server.kill()
        session.set("scale", "log")  # what was there stays
        assert session.has("vega_lite_chart")
        session.set("metric", ["val_loss"])
        look_until(session, is_done)
        assert "start it or fix MLFLOW_TRACKING_URI" in words(session)
        with Session(dashboard.url).connected() as late:
            late.open("curves", "source=MLflow")
            look_until(late, is_done)
            assert "does not answer" in words(late)

        with socket.create_server(("127.0.0.1", gate.port)), Session(dashboard.url).connected() as patient:
            patient.open("curves", "source=MLflow")
            for _ in range(3):
                patient.look()
            assert "waiting for the server's list of runs" in words(patient)
            patient.set("source", "Run folders")
            assert "make demo" in words(patient)
        assert dashboard.health() == 200
        assert not [*early.problems, *session.problems, *late.problems, *patient.problems]
