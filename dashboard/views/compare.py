"""What the evaluation found, and pictures and curves of the chosen runs: a grid over any settings, two pictures compared."""

import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import streamlit as st
from helpers.charts import Chart, curves_chart, layered, nominal, quantity
from helpers.drawing_jobs import running_job
from helpers.evaluation_wall import show_best, show_verdict
from helpers.folder_curves import folder_curves
from helpers.grid_choice import AXIS_KEYS, Grid, Offer, checkpoint_names, choose_grid, name_grid, reset_values
from helpers.grid_table import show_grid
from helpers.live_trainings import show_trainings
from helpers.page_texts import show_no_runs, title_row, warn
from helpers.page_url import asked, gone_names, warn_of_gone
from helpers.run_colors import color_runs
from helpers.run_files import best_scale, read_or_warn, sweep_results
from helpers.run_list import checkpoints_of, find_runs, step_of, warn_of_unlisted
from helpers.run_samples import show_samples
from helpers.tables import show_rows, table_of_rows

from t2i.errors import UserError
from t2i.evaluation.figures import figure, figure_text, told, words
from t2i.pictures import cells
from t2i.tracking.curves import Curve

FIRST_METRICS = ("val_loss", "train_loss")  # the first that a run has is shown
ABREAST = 3  # evaluations in a row


class Point(NamedTuple):
    """A checkpoint on a curve."""

    run: str
    checkpoint: str
    x: float  # step
    value: float
    shown: bool  # whether the grid shows the checkpoint's pictures


def main() -> None:
    runs = find_runs()
    if not runs:
        st.title("Compare")
        others = find_runs("any")
        show_trainings(others)
        show_no_runs(others)
        return
    evaluated_runs = [name for name in runs if cells.evaluated_grid(runs[name])]
    gone = gone_names("run", runs)
    default = [] if gone else (evaluated_runs or list(runs))[:1]
    names = asked("run") if "run" in st.session_state or "run" in st.query_params else default
    chosen = {name: runs[name] for name in names if name in runs}
    take_clicked_checkpoint()
    has_checkpoints = any(map(checkpoints_of, chosen.values()))
    if chosen:
        first = next(iter(chosen.values()))
        evaluated = cells.evaluated_grid(first)
        offer = name_grid(chosen, evaluated, best_scale(first, evaluated), default)
    title_row("Compare").multiselect(
        "Runs",
        list(runs),
        key="run",
        bind="query-params",
        placeholder="choose one or more runs",
        on_change=reset_values,
    )
    warn_of_unlisted(gone)
    show_trainings(find_runs("any"))
    st.session_state["_runs"] = list(chosen) if list(chosen) != default else []  # they go along to other pages
    if not chosen:
        st.text("choose one or more runs")
        return
    show_verdicts(chosen)
    if not has_checkpoints:
        show_samples(chosen)
    if has_checkpoints:
        show_pictures(chosen, offer)
    else:
        st.text("no complete checkpoint yet; training writes the first one soon")
        show_curves(chosen, None)
    if has_checkpoints:
        show_samples(chosen)
    st.header("Evaluation")
    names = list(chosen)
    for start in range(0, len(names), ABREAST):
        row = names[start : start + ABREAST]
        for column, name in zip(st.columns(len(row)), row, strict=True):
            with column:
                show_evaluation(name, runs[name])


def show_verdicts(runs: dict[str, Path]) -> None:
    """Show the verdict on each evaluated run. A run that is chosen alone also gets the wall of its best pictures."""
    evaluated = {name: grid for name, run in runs.items() if (grid := cells.evaluated_grid(run))}
    names = list(evaluated)
    if names and len(runs) == 1:
        show_best(runs[names[0]], evaluated[names[0]])
        return
    for start in range(0, len(names), ABREAST):
        row = names[start : start + ABREAST]
        for column, name in zip(st.columns(len(row)), row, strict=True):
            with column:
                st.text(name)
                show_verdict(runs[name], read_or_warn(runs[name] / "evaluation" / "evaluation.json"))


def show_pictures(runs: dict[str, Path], offer: Offer) -> None:
    """Show the grid that the user chooses, with the curves beside it. Without a valid grid, show the curves alone."""
    try:
        warn_of_gone(gone_names("checkpoint", checkpoint_names(runs)), ", ".join(runs), "choose others")
        grid = choose_grid(offer)
        planned = grid.plan()
        missing, job = cells.missing(planned), running_job(grid)
    except UserError as error:
        warn(error)
        show_curves(runs, None)
        return
    measured = {run: cells.read_cells(run) for run in runs.values()}
    show_grid(grid, planned, missing, job, measured, partial(show_curves, runs, grid))


# --- Curves ----------------------------------------------------------------------------------------------------------


def show_curves(runs: dict[str, Path], grid: Grid | None) -> None:
    """Show the curves of the chosen runs, with a point per checkpoint.

    Points of checkpoints that the grid of pictures shows are filled.

    A click on a point chooses the point's checkpoint.
    """
    curves = {name: folder_curves(run) for name, run in runs.items()}
    names = sorted({metric for metrics in curves.values() for metric in metrics})
    if not names:
        st.text("no curve yet")
        return
    defaults = [metric for metric in FIRST_METRICS if metric in names] or names[:1]
    chosen = st.multiselect("Metrics", names, default=defaults[:1], key="metric", bind="query-params")
    for metric in [metric for metric in chosen if metric in names]:
        st.text(metric)
        rows = [(name, metric, metrics[metric]) for name, metrics in curves.items() if metric in metrics]
        colors = color_runs(runs)
        chart = curves_chart(rows, colors=colors)
        points = checkpoint_points(runs, rows, grid)
        if chart is None:
            continue
        if points:
            chart = layered([chart, point_chart(points, colors)], 320)
            key = f"_curve_{metric}"
            st.vega_lite_chart(
                chart, key=key, on_select=partial(remember_clicked_checkpoint, key), selection_mode="mark"
            )
        else:
            st.vega_lite_chart(chart)
    st.caption(
        "Each point is a checkpoint, and filled points are in the grid. Click a point to choose its checkpoint. "
        "The page Curves shows all curves."
    )


def checkpoint_points(runs: dict[str, Path], rows: Sequence[tuple[str, str, Curve]], grid: Grid | None) -> list[Point]:
    """Return the checkpoints on the curves."""
    shown = grid.first_tab_models() if grid else set()
    points: list[Point] = []
    for name, _, curve in rows:
        for checkpoint in checkpoints_of(runs[name]):
            step = step_of(checkpoint)
            if not math.isnan(step) and len(curve):
                value = float(np.interp(step, curve.steps, curve.values))
                points.append(Point(name, checkpoint, step, value, (runs[name], checkpoint) in shown))
    return points


def point_chart(points: Sequence[Point], colors: dict[str, str]) -> Chart:
    """Return the chart of `checkpoint_points`, whose points can be clicked, in the `colors` of their runs."""
    several = len({point.run for point in points}) > 1
    color: dict[str, Any] = {"value": "#d6336c"}
    if several:
        color = nominal("run", title=None, legend=None, scale={"domain": list(colors), "range": list(colors.values())})
    fill = {"domain": [True, False], "range": [1, 0]}
    return {
        "data": table_of_rows([point._asdict() for point in points]),
        "mark": {"type": "point", "size": 110, "strokeWidth": 2, "opacity": 1, "cursor": "pointer"},
        "encoding": {
            "x": quantity("x"),
            "y": quantity("value"),
            "fill": color,
            "stroke": color,
            "fillOpacity": nominal("shown", legend=None, scale=fill),
            "tooltip": [nominal("run"), nominal("checkpoint"), quantity("value", format=".5~g")],
        },
        "params": [{"name": "mark", "select": {"type": "point", "fields": ["run", "checkpoint"]}}],
    }


def remember_clicked_checkpoint(key: str) -> None:
    """Remember the checkpoint that was clicked on a chart for the page's next run."""
    if clicked := st.session_state[key].get("selection", {}).get("mark", []):
        st.session_state["_point"] = clicked[-1].get("checkpoint")


def take_clicked_checkpoint() -> None:
    """Add the clicked checkpoint to the grid's axis of checkpoints; without such an axis, replace the checkpoint that
    all pictures share.
    """
    state = st.session_state
    name = state.pop("_point", None)
    if not isinstance(name, str):
        return
    on_axis = "checkpoint" in [state.get(key) for key in AXIS_KEYS]
    before = list(state.get("checkpoint", []))
    state["checkpoint"] = sorted({*before, name}, key=lambda other: (other == "pipeline", other)) if on_axis else [name]


# --- The evaluation --------------------------------------------------------------------------------------------------


def show_evaluation(name: str, run: Path) -> None:
    """Show a run's state, the figures of its checkpoints by guidance scale, and its report."""
    st.text(name)
    is_trained_here = (run / "run.json").is_file()
    if is_trained_here:
        state = read_or_warn(run / "run.json")
        st.text(f"status: {state.get('status', 'unknown')}   steps: {state.get('steps', 'not finished')}")
    else:
        st.text("This model was not trained here: its folder has no run.json, which an evaluation needs.")
    results = sweep_results(run)
    if not results:
        if is_trained_here:
            st.text("Not evaluated yet. This does it:")
            command = f"python scripts/evaluate_checkpoints.py --model {shlex.quote(run.as_posix())}"
            st.code(command, language="sh", wrap_lines=True)
        return
    report = read_or_warn(run / "evaluation" / "evaluation.json").get("report")
    if isinstance(report, dict):
        show_judge(report)
    rows = [{figure(key).name: value for key, value in told(result).items()} for result in results]
    show_rows(rows)
    if isinstance(report, dict):
        st.text("Report, on prompts of its own")
        count = report.get("prompts")
        figures = told(report).items()
        show_rows([{"figure": figure(key).name, "value": figure_text(key, value, count)} for key, value in figures])
        show_file(run / "evaluation", "report.png")


def show_judge(report: dict[str, Any]) -> None:
    """Show which checkpoint and guidance scale the evaluation chose, and the judge's figures of their pictures."""
    st.text(f"Best: {report.get('checkpoint')} at guidance scale {report.get('guidance_scale')}")
    judged = report.get("judge")
    if not isinstance(judged, dict):
        return
    titles = {"real": "unseen real images", "reconstructions": "their reconstructions", "pictures": "pictures"}
    rows = [{"": title, **judged[name]} for name, title in titles.items() if isinstance(judged.get(name), dict)]
    st.text(
        f"Judged by {judged.get('network')}: the pictures, beside unseen real images and their reconstructions by the autoencoder"
    )
    show_rows([{words(key): value for key, value in row.items() if key != "network"} for row in rows])


def show_file(folder: Path, name: Any) -> None:
    """Show a PNG file that lies directly in `folder`.

    `name` comes from a file, so it is looked up in the folder's list and not joined to a path.
    """
    pictures = {path.name: path for path in folder.glob("*.png") if path.resolve().parent == folder.resolve()}
    if isinstance(name, str) and name in pictures:
        try:
            st.image(pictures[name].read_bytes(), output_format="PNG", alt=f"{folder.parent.name}: {Path(name).stem}")
        except Exception:  # whatever Pillow says of a damaged file
            st.text(f"{name} cannot be read")
    else:
        st.text("this picture is missing")


main()
