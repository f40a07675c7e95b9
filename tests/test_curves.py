"""Curves: thinning and smoothing on any numbers, run folders torn in the middle, MLflow's stores as its client has them."""

import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conftest import SCRIPTS
from t2i.curves import Curve, list_stored_runs, make_curve, read_folder, read_stored, smooth, thin
from t2i.runs import UserError

FINITE = st.floats(-1e100, 1e100)
CURVES = arrays.arrays(np.float64, st.integers(0, 400), elements=FINITE).map(
    lambda values: Curve(np.arange(len(values)) * 3, np.full(len(values), math.nan), values)
)


def points(curve: Curve) -> list[tuple[int, float]]:
    return list(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(CURVES, st.integers(4, 120))
def test_thinning_keeps_ends_and_extremes_of_its_own_points(curve: Curve, limit: int) -> None:
    thinned = thin(curve, limit)
    assert len(thinned) <= max(limit, 0)
    assert np.all(np.diff(thinned.steps) > 0)
    assert set(points(thinned)) <= set(points(curve))
    if len(curve):
        assert points(thinned)[0] == points(curve)[0]
        assert points(thinned)[-1] == points(curve)[-1]
        assert thinned.values.min() == curve.values.min()
        assert thinned.values.max() == curve.values.max()
    if len(curve) <= limit:
        assert points(thinned) == points(curve)


@settings(max_examples=100, deadline=None)
@given(CURVES, st.floats(0, 0.99))
def test_smoothing_is_a_mean_with_falling_weights(curve: Curve, weight: float) -> None:
    smoothed = smooth(curve, weight).values
    assert len(smoothed) == len(curve)
    for n in range(min(len(curve), 30)):
        weights = weight ** np.arange(n, -1, -1, dtype=np.float64)
        seen = curve.values[: n + 1]
        expected = float((weights * seen).sum() / weights.sum())
        assert smoothed[n] == pytest.approx(expected, rel=1e-7, abs=1e-9 * (1 + np.abs(seen).max()))


@given(FINITE, st.floats(0, 0.99))
def test_a_flat_curve_stays_flat(value: float, weight: float) -> None:
    curve = Curve(np.arange(50), np.zeros(50), np.full(50, value))
    assert smooth(curve, weight).values == pytest.approx(curve.values, rel=1e-9)


def test_smoothing_refuses_other_weights() -> None:
    for weight in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="weight"):
            smooth(make_curve([1], [0], [1]), weight)


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(allow_nan=True, allow_infinity=True)), max_size=60))
def test_a_curve_has_each_step_once_the_last_logged(rows: list[tuple[int, float]]) -> None:
    curve = make_curve([step for step, _ in rows], [0.0] * len(rows), [value for _, value in rows])
    expected = {step: value for step, value in rows if abs(value) < 1.79e308}
    assert points(curve) == sorted(expected.items())


def test_a_folder_is_read_past_torn_and_strange_lines(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "train_loss": 2.0}', "[1, 2]", '{"step": 2, "train_loss": NaN}', '{"step": 3, "train_loss": "x"}',
        '{"step": "4", "train_loss": 1.0}', '{"step": null}', '{"train_loss": 1.0}', '{"step": 5, "train_loss": Infinity}',
        '{"step": 6, "train_loss": 0.5, "val_loss": 0.7}', '{"step": 1' + "0" * 400 + ', "train_loss": 1}', "", "\x00",
        '{"step": 7, "train_loss": 0.',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\xfe")
    record = {"kind": "metrics", "time": 5000, "step": 6, "values": {"train_loss": 0.5}}
    (tmp_path / "mlflow_spool.jsonl").write_text(json.dumps(record) + '\n{"kind": "met')
    curves = read_folder(tmp_path)
    assert {name: points(curve) for name, curve in curves.items()} == {
        "train_loss": [(1, 2.0), (6, 0.5)],
        "val_loss": [(6, 0.7)],
    }
    assert math.isnan(curves["train_loss"].times[0])
    assert curves["train_loss"].times[1] == 5.0
    assert read_folder(tmp_path / "none") == {}


def test_sqlite_says_what_mlflows_client_says(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("t2i", artifact_location=(tmp_path / "mlruns").as_uri())
    rng = np.random.default_rng(0)
    ids = []
    for number in range(3):
        run = client.create_run(experiment, start_time=1000 + number, run_name=f"<b>run</b> {number}")
        ids.append(run.info.run_id)
        values = [*rng.normal(size=40).tolist(), math.nan, math.inf, -math.inf]
        rows = [Metric("train_loss", value, 1000 * step, step) for step, value in enumerate(values)]
        rows += [Metric("train_loss", 9.0, 99_000, 5), Metric("val_loss", 1.0, 10, 4)]  # step 5 again, later
        client.log_batch(ids[-1], metrics=rows)
    client.set_terminated(ids[0], "FINISHED")
    gone = client.create_run(experiment, run_name="deleted").info.run_id
    client.log_metric(gone, "train_loss", 1.0, step=1)
    client.delete_run(gone)

    stored = list_stored_runs(uri)
    told = client.search_runs([experiment], order_by=["start_time DESC"])
    assert [(run.run_id, run.name, run.status) for run in stored] == [
        (run.info.run_id, run.info.run_name, run.info.status) for run in told
    ]
    assert {run.metrics for run in stored} == {("train_loss", "val_loss")}
    read = dict(read_stored([*ids, "none", "' OR 1 --"], "train_loss", uri))
    assert list(read) == ids
    for run_id, curve in read.items():
        history = sorted(client.get_metric_history(run_id, "train_loss"), key=lambda point: point.timestamp)
        expected = {point.step: point.value for point in history if abs(point.value) < 1.79e308}
        assert points(curve) == sorted(expected.items())
        assert dict(points(curve))[5] == 9.0
        assert curve.times[0] == 0.0
    assert dict(read_stored(ids, "no such metric", uri)) == {}


def test_a_store_that_is_none_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        list_stored_runs(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()  # looked at, not made
    (tmp_path / "other.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        list_stored_runs(f"sqlite:///{tmp_path}/other.db")
    (tmp_path / "empty.db").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_stored(["a"], "train_loss", f"sqlite:///{tmp_path}/empty.db"))


def test_a_server_that_is_down_gets_a_sentence_at_once() -> None:
    with socket.socket() as taken:  # bound, never listening: nobody else has this port, and it refuses
        taken.bind(("127.0.0.1", 0))
        uri = f"http://user:hunter2hunter2@127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UserError, match="does not answer") as told:
            list_stored_runs(uri)
    assert time.monotonic() - began < 3
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("uri", ["http://[bad", "http://127.0.0.1:99999", "http://host:port", "/a/plain/folder"])
def test_an_address_that_is_none_gets_a_sentence(uri: str) -> None:
    with pytest.raises(UserError, match=r"sqlite:///file\.db"):
        list_stored_runs(uri)


def test_neither_torch_nor_mlflow_is_needed_for_files(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.append({str(SCRIPTS)!r})\nfrom pathlib import Path\nimport t2i.curves as c\n"
        "c.read_folder(Path('.'))\ntry: c.list_stored_runs('sqlite:///none.db')\nexcept c.UserError: pass\n"
        "print({'torch', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
