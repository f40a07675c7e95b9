"""Metrics of any number of runs, from run folders or from MLflow, and the sweep over guidance scales."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from helpers.charts import BASELINE, MANY_LINES, Look, curves_chart, line_chart
from helpers.components import legend
from helpers.folder_curves import folder_curves
from helpers.live_trainings import show_trainings
from helpers.page_texts import escape, show_empty_state, show_no_runs, title_row
from helpers.run_colors import color_runs, color_values, differing_settings, ordered, repeats
from helpers.run_files import read_or_warn, read_settings, sweep_results
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
BY_RUN = "run"  # color of a run of its own
CHARTS_ABREAST = 2  # figures over the guidance scale that stand beside each other
MOST_VALUES = 8  # values of a setting by which runs are colored
LOOK_KEYS = ("scale", "x", "smoothing", "bands", "color", "mean", "baseline")  # of the widgets that can be unfolded

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
        show_no_runs()
        return
    show_trainings(runs)
    chosen = choose_runs(list(runs))
    names = sorted({metric for name in chosen for metric in folder_curves(runs[name])})
    options = choose_options(names, {name: runs[name] for name in chosen})

    def read_now() -> tuple[dict[Key, Curve], str]:
        read_all = {name: folder_curves(runs[name]) for name in chosen}
        return {(n, m): read_all[n][m] for n in chosen for m in options["metrics"] if m in read_all[n]}, ""

    def running() -> bool:
        return any(run_status(runs[name], read_or_warn(runs[name] / "run.json")) == "running" for name in chosen)

    follow(read_now, running, options, LIVE_S)
    show_sweep({name: runs[name] for name in chosen})


def show_stored() -> None:
    uri = shown_uri()
    st.text(f"MLflow at {uri}")
    stored = stored_runs(uri)
    if stored is None:
        return
    if not stored:
        show_empty_state("No run with metrics in this store yet. This makes one:", "make demo")
        return
    folders = folder_names()  # Runs elsewhere may share a name ("unet"); part of the id tells them apart.
    runs = {folders.get(run.run_id, f"{run.name} ({run.run_id[:8]})"): run for run in stored}
    chosen = {name: runs[name] for name in choose_runs(list(runs), "stored_runs")}
    here = find_runs("any")
    names = sorted({metric for run in chosen.values() for metric in run.metrics})
    options = choose_options(names, {name: here.get(name) for name in chosen})

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
    return {stored_id(run) for run in ended}


def folder_names() -> dict[str, str]:
    """Return the names of the run folders in outputs/ by the MLflow ids of their runs."""
    return {stored_id(run): name for name, run in reversed(find_runs("any").items())}


def stored_id(run: Path) -> str:
    return str(read_or_warn(run / SPOOL_FOLDER / "state.json").get("run_id"))


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


def choose_options(names: list[str], runs: dict[str, Path | None]) -> dict[str, Any]:
    """Show widgets that choose which metrics are drawn and how, and return the choice.

    How they are drawn can be unfolded, so that a phone's first screen has a chart. It is unfolded if the URL names a choice.

    Args:
        names: metrics of the runs.
        runs: chosen runs by name, as for `choose_look`.
    """
    metrics = choose_metrics(names, len(runs))
    is_named = any(key in st.query_params for key in LOOK_KEYS)
    is_open = st.session_state.setdefault("_look_open", is_named)  # From then on, only the user folds it.
    with st.expander("Scale, smoothing, colors and baseline", expanded=is_open):
        return choose_view(names, metrics) | choose_look(runs)


def choose_metrics(names: list[str], count: int) -> list[str]:
    """Show the widget that chooses metrics, and return the choice.

    By default, many runs show one loss each: two lines per run would hide each other.

    Args:
        names: metrics of the runs.
        count: number of runs.
    """
    defaults = [metric for metric in FIRST_METRICS if metric in names] or names[:1]
    defaults = defaults[-1:] if count > MANY_LINES else defaults
    metrics = st.multiselect("Metrics", names, default=defaults, key="metric", bind="query-params")
    return [metric for metric in metrics if metric in names]


def choose_view(names: list[str], chosen: list[str]) -> dict[str, Any]:
    """Show widgets that choose how metrics are drawn, and return the choice with the metrics to draw.

    Args:
        names: metrics of the runs.
        chosen: the chosen metrics.
    """
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
    chosen = chosen + [metric for metric in names if bands and BAND.fullmatch(metric) and metric not in chosen]
    weight = weight if is_finite(weight) and 0 <= weight < 1 else 0.0
    return {"metrics": chosen, "log": scale == "log", "wall_time": x == "wall time", "weight": weight}


def choose_look(runs: dict[str, Path | None]) -> dict[str, Any]:
    """Show widgets that choose what colors stand for, and the baseline, and return the choice.

    Args:
        runs: chosen runs by name. Settings of a run without a folder are not known.
    """
    settings = {name: flatten(read_settings(run)) if run else {} for name, run in runs.items()}
    differing = differing_settings(settings, MOST_VALUES)
    row = st.container(horizontal=True, vertical_alignment="bottom", gap="medium")
    by = row.selectbox(
        "Color by",
        [BY_RUN, *differing],
        key="color",
        bind="query-params",
        help="Color runs by a setting in which they differ.",
        width=260,
    )
    is_averaged = row.toggle(
        "Mean per color",
        key="mean",
        bind="query-params",
        disabled=by not in differing,
        help="Draw the mean of the runs with the same value, within a band from the lowest to the highest.",
    )
    baseline = row.selectbox(
        "Baseline",
        list(runs),
        index=None,
        key="baseline",
        bind="query-params",
        placeholder="none",
        help="Pin a run: it is drawn dashed, and the list tells how far others are from it.",
        width=260,
    )
    if by in differing:
        groups, colors = differing[by], color_values(ordered(differing[by].values()))
        dotted: frozenset[str] = frozenset()
    else:
        groups, colors = {name: name for name in runs}, color_runs(runs)
        dotted = repeats(runs)
    look = Look(groups, colors, baseline if baseline in runs else "", dotted, bool(is_averaged and by in differing))
    return {"look": look, "setting": by if by in differing else ""}


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
            st.caption(f"drawn again every {every_s:g} s while a training runs")

    draw()


def draw_curves(curves: dict[Key, Curve], options: dict[str, Any]) -> None:
    """Draw one chart of all losses, of training and validation together, and one chart per other metric.

    A list beside the charts names the lines and switches them off.
    """
    if not curves:
        st.text("no curve to draw: choose runs and metrics")
        return
    look: Look = options["look"]
    left, right = st.columns([4, 1], gap="medium")
    with right:
        lines = legend_lines(curves, options)
        title = "1 line" if len(lines) == 1 else f"{len(lines)} lines"
        hidden = set(legend({"title": title, "lines": lines, "hidden": hidden_lines()}, key="_legend"))
    charts: dict[str, list[tuple[str, str, Curve]]] = {}
    for (run, metric), curve in curves.items():
        line = look.groups[run] if look.is_averaged and run != look.baseline else run
        if line not in hidden:
            charts.setdefault("losses" if "loss" in metric else metric, []).append((run, metric, curve))
    with left:
        draw_charts(charts, options)


def hidden_lines() -> list[str]:
    """Return the names that are switched off in the list of lines."""
    hidden = getattr(st.session_state.get("_legend"), "hidden", None)
    return [str(name) for name in hidden] if isinstance(hidden, list) else []


def legend_lines(curves: dict[Key, Curve], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the list beside the charts: the baseline first, then the lines with the lowest last loss first.

    Lines of other metrics than losses are in the order of their names.
    """
    look: Look = options["look"]
    metric = next((name for name in ("val_loss", *options["metrics"]) if any(name == one for _, one in curves)), "")
    last = {run: float(curve.values[-1]) for (run, one), curve in curves.items() if one == metric and len(curve)}
    runs = list(dict.fromkeys(run for run, _ in curves))
    members: dict[str, list[str]] = {}
    for run in runs:
        members.setdefault(look.groups[run] if look.is_averaged and run != look.baseline else run, []).append(run)
    zero = last.get(look.baseline)
    losses = {name for _, name in curves if "loss" in name}
    is_dotted = len(losses) == 1 or any(name not in losses for _, name in curves)  # Dashes tell several losses apart.
    lines = []
    for name, of_line in members.items():
        values = [last[run] for run in of_line if is_finite(last.get(run))]
        mean = sum(values) / len(values) if values else None
        parts = [f"{metric} {mean:.4g}"] if mean is not None else []
        if mean is not None and is_finite(zero) and name != look.baseline:
            parts.append(f"{mean - zero:+.3g}")  # type: ignore[operator]
        if look.is_averaged and name != look.baseline:
            parts.insert(0, f"{len(of_line)} runs")
        elif options["setting"]:
            parts.insert(0, look.groups[name])
        color = BASELINE if name == look.baseline else look.colors[name if look.is_averaged else look.groups[name]]
        order = (name != look.baseline, (mean is None, mean or 0.0) if "loss" in metric else (False, 0.0), name)
        lines.append(
            (
                order,
                {
                    "name": name,
                    "color": color,
                    "figures": " · ".join(parts),
                    "dashed": name == look.baseline,
                    "dotted": is_dotted and name != look.baseline and name in look.repeats,
                },
            )
        )
    return [line for _, line in sorted(lines, key=lambda one: one[0])]


def draw_charts(charts: dict[str, list[tuple[str, str, Curve]]], options: dict[str, Any]) -> None:
    if not charts:
        st.text("all lines are switched off")
    for title, rows in charts.items():
        st.text(title)
        chart = curves_chart(rows, options["weight"], options["log"], options["wall_time"], options["look"])
        if chart is not None:
            st.vega_lite_chart(chart)
        elif options["wall_time"]:
            st.text("no times were recorded: these runs were trained without MLflow")
        else:
            st.text("no value above 0; a log scale shows only positive values")


def show_sweep(runs: dict[str, Path]) -> None:
    """Draw the evaluation's figures over the guidance scale, one line per checkpoint, two charts beside each other.

    Of several runs, each has its own color, and few checkpoints have dashes. All charts share the legend of the first one.
    """
    points: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}  # of each figure and line: scale, value
    for name, run in runs.items():
        for result in sweep_results(run):
            line, scale = (name, str(result.get("checkpoint"))), float(result["guidance_scale"])
            figures = {key: value for key, value in result.items() if key not in ("guidance_scale", "grid")}
            for key, value in flatten(figures).items():
                if is_finite(value):
                    points.setdefault(key, {}).setdefault(line, []).append((scale, float(value)))
    st.header("Over the guidance scale")
    if not points:
        st.text("None of these runs is evaluated yet. This does it:")
        st.code("python scripts/evaluate_checkpoints.py --model outputs/RUN", language="sh", wrap_lines=True)
        return
    names = sorted(points, key=lambda key: (rank(key), key))
    defaults = [
        name for name in ("prompt_following.all", "judge.kernel_distance", "memorisation.copies") if name in names
    ]
    chosen = st.multiselect("Figures", names, default=defaults or names[:1], key="figure", bind="query-params")
    lines = sorted({line for key in chosen for line in points[key]})
    several = len({run for run, _ in lines}) > 1
    for number, key in enumerate(chosen):
        if number % CHARTS_ABREAST == 0:
            columns = st.columns(min(CHARTS_ABREAST, len(chosen)), gap="medium")
        known = figure(key)
        drawn = []
        for (run_name, checkpoint), of_line in points[key].items():
            scales, values = np.array(of_line).T
            drawn.append((run_name, checkpoint, Curve(scales, np.zeros(len(scales)), values)))
        with columns[number % CHARTS_ABREAST]:
            st.text(f"{known.name}, {known.better} is better" if known.better else known.name)
            st.vega_lite_chart(
                line_chart(
                    drawn,
                    "guidance scale",
                    marks=True,
                    colors=color_runs(runs) if several else None,
                    metric="checkpoint",
                    shared=lines,
                    has_legend=number == 0,
                )
            )


main()
