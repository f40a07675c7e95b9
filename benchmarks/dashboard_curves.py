"""Measure the seconds until Curves shows one metric of 200 runs, 5,000 points each, in MLflow's SQLite store.

python benchmarks/dashboard_curves.py [runs] [points]

Each measurement starts a new process, with the database out of the system's page cache. The figure `read` is the time
of t2i.tracking.curves without the page. The figure `page` adds Streamlit's work (AppTest), in a session of a server
that has already shown a page. The figure `first` is the time of a server's first page, mostly its imports.
The benchmark's limit applies to the figure `page`. The time of drawing in the browser is not counted.
"""

import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, SCRIPTS, keep

READ = """
import sys, time
sys.path.append({scripts!r})
began = time.perf_counter()
from t2i.tracking.curves import list_stored_runs, read_stored, thin
curves = [thin(curve) for _, curve in read_stored([run.run_id for run in list_stored_runs()], "train_loss")]
print(time.perf_counter() - began, len(curves), max(len(curve.steps) for curve in curves))
"""
PAGE = """
import time
import streamlit
from streamlit.testing.v1 import AppTest
began = time.perf_counter()
AppTest.from_file({app!r}, default_timeout=60).run()
first = time.perf_counter() - began
app = AppTest.from_file({app!r}, default_timeout=60)
app.query_params["source"] = "MLflow"
app.query_params["metric"] = ["train_loss"]
app.switch_page({page!r})
began = time.perf_counter()
app.run()
seconds = time.perf_counter() - began
assert not app.exception and len(app.get("vega_lite_chart")) == 1, (app.exception, app.main)
print(seconds, first)
"""


def make_store(database: Path, runs: int, points: int) -> None:
    """Make a store with MLflow's own tables, filled in the order of trainings that run at the same time."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.create_experiment("t2i", artifact_location=(database.parent / "mlruns").as_uri())
    ids = [
        client.create_run(experiment, start_time=number, run_name=f"run {number}").info.run_id for number in range(runs)
    ]
    values = np.exp(np.random.default_rng(0).normal(-1, 0.2, (points, runs))).tolist()
    with sqlite3.connect(database) as connection:
        for first in range(0, points, 100):
            connection.executemany(
                "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES ('train_loss', ?, ?, ?, ?, 0)",
                [
                    (values[step][number], 1_700_000_000_000 + 1000 * step, run_id, step)
                    for number, run_id in enumerate(ids)
                    for step in range(first, min(first + 100, points))
                ],
            )
        connection.executemany(
            "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES ('train_loss', 0, 0, ?, 0, ?)",
            [(points - 1, run_id) for run_id in ids],
        )
    connection.close()


def cold(code: str, cwd: Path) -> list[float]:
    with open(cwd / "mlflow.db", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [float(word) for word in done.stdout.split()]


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}


def main() -> None:
    runs, points = [int(word) for word in sys.argv[1:]] or [200, 5000]
    app = ROOT / "dashboard" / "streamlit_app.py"
    page = PAGE.format(app=str(app), page="views/curves.py")
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        make_store(cwd / "mlflow.db", runs, points)
        reads = [cold(READ.format(scripts=str(SCRIPTS)), cwd) for _ in range(3)]
        pages = [cold(page, cwd) for _ in range(3)]
        megabytes = (cwd / "mlflow.db").stat().st_size / 1e6
    if reads[0][1] != runs or reads[0][2] > 500:
        raise SystemExit(f"{reads[0][1]:.0f} curves of {runs}, at most {reads[0][2]:.0f} points")
    keep(
        "dashboard_curves",
        {
            "seconds_page": round(statistics.median(row[0] for row in pages), 2),
            "goal": 2.0,
            "seconds_read": round(statistics.median(row[0] for row in reads), 2),
            "seconds_first": round(statistics.median(row[1] for row in pages), 2),
            "pages": [round(row[0], 2) for row in pages],
            "runs": runs,
            "points": points,
            "points_drawn_a_curve": int(reads[0][2]),
            "database_mb": round(megabytes, 1),
        },
    )


if __name__ == "__main__":
    main()
