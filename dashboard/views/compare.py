"""Pictures and curves of the chosen runs side by side: a grid over any settings, two of its pictures compared, the evaluation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
from common import cells_of, find_runs, flat, headed, lines, nothing_yet, read, step_of, warn
from grid import Grid, checkpoints_of, choose_grid, reset_values
from table import show_grid

from t2i.errors import UserError
from t2i.pictures import cells
from t2i.tracking.curves import Curve, read_folder

USUAL = ("val_loss", "train_loss")
ABREAST = 3  # evaluations in a row


def main() -> None:
    runs = find_runs()
    if not runs:
        st.title("Compare")
        nothing_yet(
            "No run in outputs/ yet. This fills it, in about a quarter of an hour on two CPU cores:", "make demo"
        )
        return
    evaluated = [name for name in runs if cells.evaluated(runs[name])]
    usual = (evaluated or list(runs))[:1]
    names = headed("Compare").multiselect(
        "Runs", list(runs), default=usual, key="run", bind="query-params",
        placeholder="choose one or more runs", on_change=reset_values,
    )  # fmt: skip
    chosen = {name: runs[name] for name in names if name in runs}
    st.session_state["_runs"] = list(chosen) if list(chosen) != usual else []  # those that go along to other pages
    if not chosen:
        st.text("choose one or more runs")
        return
    use_marked_point()
    left, right = st.columns([3, 2], gap="large")
    grid = None
    with left:
        if not any(map(checkpoints_of, chosen.values())):
            st.text("no whole checkpoint yet; training writes the first one soon")
        else:
            try:
                grid = choose_grid(chosen)
                show_grid(grid)
            except UserError as error:
                warn(error)
    with right:
        show_curves(chosen, grid)
    st.subheader("Evaluation")
    names = list(chosen)
    for start in range(0, len(names), ABREAST):
        row = names[start : start + ABREAST]
        for column, name in zip(st.columns(len(row)), row, strict=True):
            with column:
                show_evaluation(name, runs[name])


# --- Curves ----------------------------------------------------------------------------------------------------------


def show_curves(runs: dict[str, Path], grid: Grid | None) -> None:
    """The runs' curves; their checkpoints are points on them, full where the grid shows them. A click on one chooses it."""
    curves = {name: read_folder(run) for name, run in runs.items()}
    known = sorted({metric for found in curves.values() for metric in found})
    if not known:
        st.text("no curve yet")
        return
    usual = [metric for metric in USUAL if metric in known] or known[:1]
    metrics = st.multiselect("Metrics", known, default=usual[:1], key="metric", bind="query-params")
    for metric in [metric for metric in metrics if metric in known]:
        st.text(metric)
        rows = [(name, metric, found[metric]) for name, found in curves.items() if metric in found]
        chart = lines(rows)
        points = marked(runs, rows, grid)
        if chart is None:
            continue
        if len(points):
            chart = alt.layer(chart, point_chart(points)).properties(height=320)
            st.altair_chart(chart, key=f"_curve_{metric}", on_select=take_point, selection_mode="mark")
        else:
            st.altair_chart(chart)
    st.caption(
        "Points are checkpoints, full ones those in the grid; a click on one chooses it. All curves: page Curves."
    )


def marked(runs: dict[str, Path], rows: Sequence[tuple[str, str, Curve]], grid: Grid | None) -> pd.DataFrame:
    """Checkpoints on the curves: run, checkpoint, x, value, shown."""
    shown = {(place.run, place.checkpoint) for place in grid.places(0)} if grid else set()
    points = []
    for name, _, curve in rows:
        for checkpoint in checkpoints_of(runs[name]):
            step = step_of(checkpoint)
            if not math.isnan(step) and len(curve):
                value = float(np.interp(step, curve.steps, curve.values))
                points.append((name, checkpoint, step, value, (runs[name], checkpoint) in shown))
    return pd.DataFrame(points, columns=["run", "checkpoint", "x", "value", "shown"])


def point_chart(points: pd.DataFrame) -> alt.Chart:
    several = points["run"].nunique() > 1
    mark = alt.selection_point(name="mark", fields=["run", "checkpoint"])
    return (
        alt.Chart(points)
        .mark_point(size=110, strokeWidth=2, opacity=1, cursor="pointer")
        .encode(
            x="x:Q",
            y="value:Q",
            # Channels by their classes: of a condition or a bare value Altair finds the class by trying them all, in 60 ms.
            fill=alt.Fill("run:N", title=None) if several else alt.FillValue("#d6336c"),
            stroke=alt.Stroke("run:N", title=None) if several else alt.StrokeValue("#d6336c"),
            fillOpacity=alt.FillOpacity("shown:N", legend=None, scale=alt.Scale(domain=[True, False], range=[1, 0])),
            tooltip=[alt.Tooltip("run:N"), alt.Tooltip("checkpoint:N"), alt.Tooltip("value:Q", format=".5~g")],
        )
        .add_params(mark)
    )


def take_point() -> None:
    """Remember the clicked checkpoint until the page is drawn anew."""
    for key in list(st.session_state):
        if str(key).startswith("_curve_"):
            found = st.session_state[key].get("selection", {}).get("mark", [])
            if found and found != st.session_state.get("_last_point"):
                st.session_state["_last_point"] = found
                st.session_state["_point"] = found[-1].get("checkpoint")


def use_marked_point() -> None:
    """A clicked checkpoint joins those of the grid where they stand on an axis, and takes their place where they do not."""
    state = st.session_state
    name = state.pop("_point", None)
    if not isinstance(name, str):
        return
    on_axis = "checkpoint" in (state.get("columns"), state.get("rows"), state.get("tabs"))
    before = list(state.get("checkpoint", []))
    state["checkpoint"] = sorted({*before, name}, key=lambda one: (one == "pipeline", one)) if on_axis else [name]


# --- The evaluation --------------------------------------------------------------------------------------------------


def show_evaluation(name: str, run: Path) -> None:
    """A run's state, the figures of its checkpoints by guidance scale, and its report."""
    st.text(name)
    state = read(run / "run.json")
    st.text(f"status: {state.get('status', 'unknown')}   steps: {state.get('steps', 'not finished')}")
    found = cells_of(run)
    if not found:
        samples = sorted(path.name for path in (run / "samples").glob("step-*.png"))
        if samples:
            st.text(f"samples of training, {Path(samples[-1]).stem}")
            show_file(run / "samples", samples[-1])
        st.text("Not evaluated yet. This does it:")
        st.code(f"python scripts/evaluate_checkpoints.py --model {run.as_posix()}", language="sh", wrap_lines=True)
        return
    st.dataframe(pd.DataFrame([flat(cell) for cell in found]), hide_index=True, placeholder="–")
    report = read(run / "evaluation" / "evaluation.json").get("report")
    if isinstance(report, dict):
        st.text("Report, on prompts of its own")
        rows = [
            (key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in flat(report).items()
        ]
        st.dataframe(pd.DataFrame(rows, columns=["figure", "value"]), hide_index=True, placeholder="–")
        show_file(run / "evaluation", "report.png")


def show_file(folder: Path, name: Any) -> None:
    """A PNG that lies in `folder` itself; `name` comes from a file, so it is looked up rather than joined to a path."""
    known = {path.name: path for path in folder.glob("*.png") if path.resolve().parent == folder.resolve()}
    if isinstance(name, str) and name in known:
        try:
            st.image(known[name].read_bytes(), output_format="PNG", alt=f"{folder.parent.name}: {Path(name).stem}")
        except Exception:  # whatever Pillow says of a damaged file
            st.text(f"{name} cannot be read")
    else:
        st.text("this picture is missing")


main()
