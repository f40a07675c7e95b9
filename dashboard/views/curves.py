"""Metrics of any number of runs, from run folders or from MLflow, and the sweep over guidance scales."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from helpers.charts import LEGEND_LINES, curves_chart, line_chart
from helpers.page_texts import escape, show_empty_state, title_row
from helpers.run_files import read_or_warn, sweep_results
from helpers.run_list import choose_runs, find_runs

from t2i.errors import UserError
from t2i.evaluation.figures import figure, flatten, is_finite, rank
from t2i.run_lock import run_status
from t2i.tracking.curves import (
    Curve,
    Loading,
    StoredRun,
    is_file_store,
    list_stored_runs,
    read_folder,
    read_stored,
    shown_uri,
    store_stamp,
)
from t2i.tracking.spool import SPOOL_FOLDER

LIVE_S = 5  # seconds between two looks at a running run
LIVE_SERVER_S = 15  # the same over HTTP, as others ask that server too
POLL_S = 1  # seconds between two looks at what a server has sent so far
KEPT_S = 60  # seconds that curves of ended runs stay in memory: an evaluation may still add to them
BAND = re.compile(r"val_loss_\d+_\d+")
FIRST_METRICS = ("train_loss", "val_loss")  # shown by default

Key = tuple[str, str]  # run's name as shown, metric


def main() -> None:
    source = title_row("Curves").radio(
        "Source", ["Run folders", "MLflow"], horizontal=True, key="source", bind="query-params"
    )
    try:
        if source == "MLflow":
            show_stored()
        else:
            show_folders()
    except UserError as error:
        st.warning(escape(error))


# --- Where curves come from ------------------------------------------------------------------------------------------


def show_folders() -> None:
    runs = find_runs("any")
    if not runs:
        show_empty_state(
            "No run in outputs/ yet. This fills it, in about a quarter of an hour on two CPU cores:", "make demo"
        )
        return
    chosen = choose_runs(list(runs))
    names = sorted({metric for name in chosen for metric in folder_curves(runs[name])})
    options = choose_view(names)

    def read_now() -> tuple[dict[Key, Curve], str]:
        read_all = {name: folder_curves(runs[name]) for name in chosen}
        return {(n, m): read_all[n][m] for n in chosen for m in options["metrics"] if m in read_all[n]}, ""

    def running() -> bool:
        return any(run_status(runs[name], read_or_warn(runs[name] / "run.json")) == "running" for name in chosen)

    follow(read_now, running, options, LIVE_S)
    show_sweep({name: runs[name] for name in chosen})


def folder_curves(run: Path) -> dict[str, Curve]:
    try:
        state = (run / "metrics.jsonl").stat()
    except OSError:
        return {}
    return _folder_curves(run.as_posix(), (state.st_mtime_ns, state.st_size))


@st.cache_resource(max_entries=500, show_spinner=False)  # a resource is returned without a copy; no caller changes it
def _folder_curves(run: str, stamp: tuple[int, int]) -> dict[str, Curve]:
    return read_folder(Path(run))


def show_stored() -> None:
    uri = shown_uri()
    st.text(f"MLflow at {uri}")
    stored = stored_runs(uri)
    if stored is None:
        return
    if not stored:
        show_empty_state("No run with metrics in this store yet. This makes one:", "make demo")
        return
    # Runs may share a name ("unet"); part of the id tells them apart.
    runs = {f"{run.name} ({run.run_id[:8]})": run for run in stored}
    chosen = {name: runs[name] for name in choose_runs(list(runs), "stored_runs")}
    options = choose_view(sorted({metric for run in chosen.values() for metric in run.metrics}))

    def running() -> bool:
        open_ids = {run.run_id for run in chosen.values() if run.status == "RUNNING"}
        return bool(open_ids and open_ids - ended_here())

    if is_file_store():
        follow(lambda: (file_curves(chosen, options["metrics"]), ""), running, options, LIVE_S)
        return
    loading = server_curves(uri, chosen, options["metrics"], running())

    def so_far() -> tuple[dict[Key, Curve], str]:
        arrived = dict(loading.results)
        if loading.error:
            return arrived, loading.error
        return arrived, "" if loading.done.is_set() else f"{len(arrived)} curves have arrived; more are on their way"

    if not loading.done.wait(0.3):  # a quick server is drawn at once
        follow(so_far, lambda: not loading.done.is_set(), options, POLL_S)
    else:
        follow(so_far, running, options, LIVE_SERVER_S, again=True)


def ended_here() -> set[str]:
    """Return the MLflow ids of the ended runs in outputs/. MLflow calls a killed run RUNNING until it is resumed."""
    ended = [run for run in find_runs("any").values() if run_status(run, read_or_warn(run / "run.json")) != "running"]
    return {str(read_or_warn(run / SPOOL_FOLDER / "state.json").get("run_id")) for run in ended}


def stored_runs(uri: str) -> list[StoredRun] | None:
    """Return the runs in the MLflow store, or None while a server has not answered.

    Without an answer of the server, the page asks again by itself.
    """
    if is_file_store():
        return _file_runs(uri, store_stamp())
    kept = st.session_state.get("_listing")
    if kept is None or kept[0] != uri or (kept[1].done.is_set() and time.monotonic() - kept[2] > KEPT_S):
        kept = (uri, Loading.start(_listing()), time.monotonic())
        st.session_state["_listing"] = kept
    loading = kept[1]
    if not loading.done.wait(1.0):
        _look_again(loading)
        return None
    if loading.error:
        del st.session_state["_listing"]  # the next look asks again
        raise UserError(loading.error)
    return list(loading.results.values())


def _listing() -> Iterator[tuple[str, StoredRun]]:
    for run in list_stored_runs():
        yield run.run_id, run


@st.fragment(run_every=POLL_S)
def _look_again(loading: Loading) -> None:
    if loading.done.is_set():
        st.rerun()
    st.text("waiting for the server's list of runs")


@st.cache_resource(max_entries=4, show_spinner=False)
def _file_runs(uri: str, stamp: Any) -> list[StoredRun]:
    return list_stored_runs()


def file_curves(chosen: dict[str, StoredRun], metrics: list[str]) -> dict[Key, Curve]:
    """Return curves of a SQLite store.

    Curves of ended runs are cached for a minute, curves of other runs until the store changes.
    """
    curves: dict[Key, Curve] = {}
    for metric in metrics:
        for is_running, stamp in ((False, None), (True, store_stamp())):
            names = {
                run.run_id: name
                for name, run in chosen.items()
                if metric in run.metrics and (run.status == "RUNNING") == is_running
            }
            if names:
                by_id = _file_curves(shown_uri(), tuple(names), metric, stamp)
                curves |= {(names[run_id], metric): curve for run_id, curve in by_id.items()}
    return curves


@st.cache_resource(max_entries=16, ttl=KEPT_S, show_spinner=False)
def _file_curves(uri: str, run_ids: tuple[str, ...], metric: str, stamp: Any) -> dict[str, Curve]:
    return dict(read_stored(run_ids, metric))


def server_curves(uri: str, chosen: dict[str, StoredRun], metrics: list[str], is_live: bool) -> Loading:
    """Return the curves that a thread of this session has received from a server.

    The thread asks the server again while a run trains.
    """
    wanted = (uri, tuple(sorted(run.run_id for run in chosen.values())), tuple(sorted(metrics)))
    kept = st.session_state.get("_loading")
    age = LIVE_SERVER_S if is_live else KEPT_S
    stale = kept is None or kept[0] != wanted
    if kept is not None and not stale and kept[1].done.is_set():
        stale = time.monotonic() - kept[2] > age
    if stale:
        if kept is not None:
            kept[1].stop()
        kept = (wanted, Loading.start(_server_curves(chosen, metrics)), time.monotonic())
        st.session_state["_loading"] = kept
    return kept[1]


def _server_curves(chosen: dict[str, StoredRun], metrics: list[str]) -> Iterator[tuple[Key, Curve]]:
    for metric in metrics:
        names = {run.run_id: name for name, run in chosen.items() if metric in run.metrics}
        for run_id, curve in read_stored(list(names), metric):
            yield (names[run_id], metric), curve


# --- What is drawn ---------------------------------------------------------------------------------------------------


def choose_view(names: list[str]) -> dict[str, Any]:
    """Show widgets that choose which metrics of `names` are drawn and how, and return the choice."""
    defaults = [metric for metric in FIRST_METRICS if metric in names] or names[:1]
    metrics = st.multiselect("Metrics", names, default=defaults, key="metric", bind="query-params")
    row = st.container(horizontal=True, vertical_alignment="bottom", gap="medium")
    scale = row.radio("Scale", ["linear", "log"], horizontal=True, key="scale", bind="query-params")
    x = row.radio("Over", ["step", "wall time"], horizontal=True, key="x", bind="query-params")
    weight = row.slider("Smoothing", 0.0, 0.99, 0.0, 0.01, key="smoothing", bind="query-params", width=220)
    bands = row.toggle(
        "Per timestep band",
        key="bands",
        bind="query-params",
        help="Also draw the validation loss of each band of timesteps.",
    )
    chosen = [metric for metric in metrics if metric in names]
    chosen += [metric for metric in names if bands and BAND.fullmatch(metric) and metric not in chosen]
    weight = weight if is_finite(weight) and 0 <= weight < 1 else 0.0
    return {"metrics": chosen, "log": scale == "log", "wall_time": x == "wall time", "weight": weight}


def follow(
    read_now: Callable[[], tuple[dict[Key, Curve], str]],
    is_running: Callable[[], bool],
    options: dict[str, Any],
    every_s: float,
    again: bool = False,
) -> None:
    """Draw the curves that the function `read_now` returns.

    While `is_running` is true, the curves are drawn again and again without running the rest of the page.

    Args:
        read_now: function that returns the curves and a note.
        every_s: seconds between two calls of `read_now`.
        again: whether each repetition runs the entire page, which asks the MLflow server again.
    """
    live = is_running()
    first = True

    @st.fragment(run_every=every_s if live else None)
    def draw() -> None:
        nonlocal first
        if live and not first and (again or not is_running()):
            st.rerun()  # the page decides anew what there is, and whether it is running
        first = False
        try:
            curves, note = read_now()
        except UserError as error:
            curves, note = {}, str(error)
        if note:
            st.text(note)
        draw_curves(curves, options)
        if live:
            st.caption(f"drawn again every {every_s:g} s while it goes on")

    draw()


def draw_curves(curves: dict[Key, Curve], options: dict[str, Any]) -> None:
    """Draw one chart of all losses, of training and validation together, and one chart per other metric."""
    charts: dict[str, list[tuple[str, str, Curve]]] = {}
    for (run, metric), curve in curves.items():
        charts.setdefault("losses" if "loss" in metric else metric, []).append((run, metric, curve))
    if not charts:
        st.text("no curve to draw: choose runs and metrics")
    for title, rows in charts.items():
        st.text(title)
        chart = curves_chart(rows, options["weight"], options["log"], options["wall_time"])
        if chart is not None:
            st.altair_chart(chart)
            if len(rows) > LEGEND_LINES:
                st.caption(f"{len(rows)} curves; their names stand at the pointer")
        elif options["wall_time"]:
            st.text("no times were recorded: these runs were trained without MLflow")
        else:
            st.text("no value above 0, which alone a log scale can show")


def show_sweep(runs: dict[str, Path]) -> None:
    """Draw the evaluation's figures over the guidance scale, one line per checkpoint."""
    rows = []
    for name, run in runs.items():
        for result in sweep_results(run):
            line, scale = f"{name} · {result.get('checkpoint')}", float(result["guidance_scale"])
            figures = {key: value for key, value in result.items() if key not in ("guidance_scale", "grid")}
            for key, value in flatten(figures).items():
                if is_finite(value):
                    rows.append((line, key, scale, float(value)))
    st.subheader("Over the guidance scale")
    if not rows:
        st.text("None of these runs is evaluated yet. This does it:")
        st.code("python scripts/evaluate_checkpoints.py --model outputs/RUN", language="sh", wrap_lines=True)
        return
    frame = pd.DataFrame(rows, columns=["run", "metric", "x", "value"])
    names = sorted(frame["metric"].unique(), key=lambda key: (rank(key), key))
    defaults = [
        name for name in ("prompt_following.all", "judge.kernel_distance", "memorisation.copies") if name in names
    ]
    chosen = st.multiselect("Figures", names, default=defaults or names[:1], key="figure", bind="query-params")
    for key in chosen:
        known = figure(key)
        st.text(f"{known.name}, {known.better} is better" if known.better else known.name)
        st.altair_chart(line_chart(frame[frame["metric"] == key], "guidance scale", marks=True))


main()
