"""Curves: laws of thinning and smoothing, damaged run folders, and SQLite read as MLflow's own client reads it."""

import http.server
import json
import math
import socket
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.errors import UserError
from t2i.tracking import curves
from t2i.tracking.curves import Loading, list_stored_runs, make_curve, read_folder, read_stored, smooth, thin

FLOATS = st.floats(-1e6, 1e6)


def curve_of(values):
    return make_curve(range(len(values)), [math.nan] * len(values), values)


@given(st.lists(FLOATS, min_size=1, max_size=300), st.integers(4, 50))
@settings(max_examples=100)
def test_thinning_keeps_ends_and_extremes_and_invents_nothing(values, points):
    curve, thinned = curve_of(values), thin(curve_of(values), points)
    assert len(thinned) <= max(points, 0) or len(thinned) == len(values) <= points
    assert (thinned.steps[0], thinned.steps[-1]) == (0, len(values) - 1)
    assert set(thinned.steps) <= set(curve.steps)
    assert np.all(np.diff(thinned.steps) > 0)
    np.testing.assert_array_equal(thinned.values, curve.values[thinned.steps])
    assert (thinned.values.min(), thinned.values.max()) == (curve.values.min(), curve.values.max())


@given(st.lists(FLOATS, min_size=1, max_size=100), st.floats(0, 0.999))
@settings(max_examples=100)
def test_smoothing_is_a_weighted_mean_of_what_came_before(values, weight):
    smoothed = smooth(curve_of(values), weight).values
    shares = weight ** np.arange(len(values) - 1, -1, -1.0)
    assert smoothed[-1] == pytest.approx(np.dot(shares, values) / shares.sum(), rel=1e-6, abs=1e-6)
    assert smoothed[0] == pytest.approx(values[0], rel=1e-6, abs=1e-9)  # debiased: it does not start at zero


def test_a_constant_stays_and_a_wrong_weight_is_refused():
    np.testing.assert_allclose(smooth(curve_of([3.0] * 50), 0.9).values, 3.0)
    for weight in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="smoothing weight"):
            smooth(curve_of([1.0]), weight)


@given(st.lists(st.tuples(st.integers(0, 20), st.floats()), max_size=40))
@settings(max_examples=100)
def test_of_a_step_made_twice_the_later_finite_value_counts(points):
    curve = make_curve([step for step, _ in points], [0.0] * len(points), [value for _, value in points])
    expected = {step: value for step, value in points if math.isfinite(value) and abs(value) < 1.79e308}
    assert dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) == expected
    assert curve.steps.tolist() == sorted(expected)


def test_a_folder_with_torn_lines_gives_what_is_whole(tmp_path):
    assert read_folder(tmp_path / "none") == {}
    lines = [
        '{"step": 1, "train_loss": 1.0, "note": "x", "flag": true}', '{"step": 2, "train_loss": NaN}', "[1]", "5",
        '{"step": 3, "train_loss": Infinity, "val_loss": 0.5}', '{"step": "4", "train_loss": 1}', '{"train_loss": 1}',
        '{"step": 1e99, "train_loss": 1}', '{"step": 4, "train_loss": 0.25}', "[" * 5000, '{"step": 5, "train_l',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n\x00\xff")
    record = {"kind": "metrics", "time": 5000, "step": 4, "values": {"train_loss": 0.25}}
    (tmp_path / "mlflow_spool.jsonl").write_text(
        '{"kind": "start"}\n' + json.dumps(record) + '\n{"kind": "metrics", "ti'
    )
    curves = read_folder(tmp_path)
    assert set(curves) == {"train_loss", "val_loss"}
    assert curves["train_loss"].steps.tolist() == [1, 4]
    assert math.isnan(curves["train_loss"].times[0])
    assert curves["train_loss"].times[1] == 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """MLflow's own store with three runs: one with NaN, infinity and a step made twice, one deleted."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("t2i", artifact_location="file:///nowhere")
    ids = [
        client.create_run(experiment, run_name=name, start_time=1000 + n).info.run_id for n, name in enumerate("abc")
    ]
    rows = [(3, 0.3), (1, 0.1), (2, math.nan), (4, math.inf), (5, -math.inf), (6, 0.6), (3, 0.33), (7, -2.5)]
    client.log_batch(ids[0], [Metric("loss", value, 1000 + n, step) for n, (step, value) in enumerate(rows)])
    client.log_batch(ids[1], [Metric("loss", 1.0, 0, 0), Metric("odd: a/b c", 2.0, 0, 0)])
    client.log_batch(ids[2], [Metric("loss", 1.0, 0, 0)])
    client.set_terminated(ids[1])
    client.delete_run(ids[2])
    return uri, client, ids


def test_sqlite_is_read_as_mlflows_client_reads_it(store):
    uri, client, ids = store
    runs = list_stored_runs(uri)
    assert [(run.run_id, run.name, run.status) for run in runs] == [(ids[1], "b", "FINISHED"), (ids[0], "a", "RUNNING")]
    for run in runs:
        known = client.get_run(run.run_id).data.metrics
        assert run.metrics == tuple(sorted(known))
        for metric in run.metrics:
            history = sorted(client.get_metric_history(run.run_id, metric), key=lambda point: point.timestamp)
            expected = make_curve(*zip(*((p.step, p.timestamp / 1000, p.value) for p in history), strict=True))
            ((run_id, curve),) = read_stored([run.run_id], metric, uri)
            assert run_id == run.run_id
            for ours, theirs in zip(vars(curve).values(), vars(expected).values(), strict=True):
                np.testing.assert_array_equal(ours, theirs)
    ((_, curve),) = read_stored([ids[0], "unknown"], "loss", uri)
    assert curve.steps.tolist() == [1, 3, 6, 7]
    assert curve.values.tolist() == [0.1, 0.33, 0.6, -2.5]


def test_stores_that_cannot_be_read_get_one_sentence(tmp_path):
    (tmp_path / "text.db").write_text("no database at all" * 100)
    (tmp_path / "empty.db").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uris = [f"sqlite:///{tmp_path}/{name}.db" for name in ("none", "text", "empty")]
    uris += [f"http://user:geheim99@127.0.0.1:{port}", "http://127.0.0.1:99999", "file:///x"]
    for uri in uris:
        began = time.monotonic()
        with pytest.raises(UserError) as caught:
            list_stored_runs(uri)
        assert time.monotonic() - began < 30  # not the minutes for which MLflow tries again
        assert "\n" not in str(caught.value)
        assert "geheim99" not in str(caught.value)


def test_a_store_that_another_process_writes_gets_another_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "BUSY_S", 0.1)
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("CREATE TABLE runs (run_uuid)")
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"mlflow\.db is being written by another process.*; open the page again"):
            list_stored_runs(f"sqlite:///{file}")


class _Nonsense(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>not MLflow")

    do_GET = do_POST

    def log_message(self, *words):
        pass


def test_a_server_that_is_none_of_mlflows_gets_one_sentence():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Nonsense)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="cannot be read"):
            list_stored_runs(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_loading_goes_on_beside_and_shows_what_is_there():
    gate = threading.Event()

    def pairs():
        yield "a", 1
        gate.wait(10)
        yield "b", 2
        raise UserError("no more")

    loading = Loading.start(pairs())
    assert not loading.done.wait(0.1)
    assert loading.results == {"a": 1}
    gate.set()
    assert loading.done.wait(10)
    assert (loading.results, loading.error) == ({"a": 1, "b": 2}, "no more")


def test_nothing_is_written(store, tmp_path):
    uri, _, ids = store
    file = Path(uri.removeprefix("sqlite:///"))
    before = {path.name: path.stat().st_size for path in file.parent.iterdir()}
    list(read_stored(ids, "loss", uri))
    assert {path.name: path.stat().st_size for path in file.parent.iterdir()} == before
