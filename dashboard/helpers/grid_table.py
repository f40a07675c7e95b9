"""Show a chosen grid of pictures on a page: the missing pictures and their cost, the finished pictures, and downloads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

from helpers.drawing_jobs import GridJob, expected_seconds
from helpers.grid_choice import AXES, BEST, LAST, Grid
from helpers.page_links import playground_link
from helpers.page_texts import escape, warn
from helpers.picture_table import show_pair, show_pictures, stored_address
from helpers.run_files import read_or_warn
from t2i.errors import UserError
from t2i.evaluation.figures import is_finite
from t2i.evaluation.verdict import outcome
from t2i.pictures import cells
from t2i.pictures.png import grid_png, labelled_grid

SHOWN = 100  # pictures of a grid at once; the rows of a larger grid are shown in pages
MANY, LONG_S = 100, 120  # missing pictures and seconds from which on a grid asks before it is drawn
SAMPLING = ("guidance_scale", "num_inference_steps", "scheduler", "guidance_end", "guidance_rescale")
TEXTS = ("prompt", "sample")  # axes whose values are prompts, which every picture's text ends with
Measured = Mapping[Path, Mapping[tuple[str, cells.Cell], tuple[Any, Any]]]
TITLE_CHARACTERS = 40  # characters of all tabs together, from which on they become a list


def show_grid(
    grid: Grid,
    planned: Sequence[cells.PlannedCell],
    missing: Sequence[cells.PlannedCell],
    running: GridJob | None,
    measured: Measured,
    show_curves: Callable[[], None],
) -> None:
    """Show how many pictures of a planned grid are missing, how long they take, and the finished pictures.

    Args:
        running: the job of this server that draws the grid, which this session perhaps does not watch yet.
        measured: per run folder, what its evaluation measured of single pictures (`cells.read_cells`).
        show_curves: function that shows the curves of the runs, beside the pictures. A click on a point of a curve leaves
            "_point" in the session's state.
    """
    job_grid, job = st.session_state.get("_job", (None, None))
    if job_grid != grid and job is not None:  # another grid was chosen: the old one's pictures stay
        if job is st.session_state.get("_started"):  # by this session: another one may still watch the job
            job.stopped.set()
        job = None
    if job is None and running is not None:  # The page was loaded again.
        job = running
        st.session_state["_job"] = (grid, job)
    if job is not None and job.finished.is_set():
        if job.error:
            warn(UserError(job.error))
        st.session_state.pop("_job")
        job = None
    draw_pictures(grid, planned, missing, job, measured, show_curves)


def announce(grid: Grid, planned: Sequence[cells.PlannedCell], missing: Sequence[cells.PlannedCell], tab: int) -> None:
    """Say how many pictures of a grid are missing and how long they take. A large grid is drawn only after a click.

    The missing pictures of the shown tab can be drawn alone.
    """
    pace = evaluated_pace(grid.run)
    seconds = expected_seconds(planned, pace)
    takes = "the time is known after the first" if seconds is None else f"about {duration_text(seconds)}"
    row = st.container(horizontal=True, vertical_alignment="center")
    row.text(f"{len(missing):,} of {len(planned):,} pictures are not drawn yet: {takes}", width="content")
    here = [one for one in missing if one.at[0] == tab]
    large = {len(part): is_large(part, pace) for part in (here, missing)}
    confirmed = not large[len(missing)] or row.checkbox(
        f"yes, draw {len(missing):,} pictures",
        key=f"_sure_{hash(grid)}",  # of this grid alone
    )
    wanted: Sequence[cells.PlannedCell] = ()
    if 0 < len(here) < len(missing):
        axis = grid.axes[2].name
        this = "prompt" if axis == "sample" else AXES[axis]
        blocked = large[len(here)] and not confirmed
        if row.button(f"Draw this {this} ({len(here):,})", disabled=blocked, type="primary"):
            wanted = here
        if row.button(f"Draw all {len(missing):,} pictures", disabled=not confirmed):
            wanted = missing
    elif row.button(f"Draw {len(missing):,} pictures", disabled=not confirmed, type="primary"):
        wanted = missing
    if wanted:
        st.session_state["_started"] = GridJob.start(grid, wanted)
        st.session_state["_job"] = (grid, st.session_state["_started"])
        st.rerun()


def is_large(missing: Sequence[cells.PlannedCell], pace: float | None) -> bool:
    return len(missing) > MANY or (expected_seconds(missing, pace) or 0) > LONG_S


def evaluated_pace(run: Path) -> float | None:
    """Return the seconds per sample of the UNet that a run's evaluation measured, on this or another machine."""
    report = read_or_warn(run / "evaluation" / "evaluation.json").get("report")
    if not isinstance(report, dict):
        return None
    seconds = report.get("seconds_per_picture_cpu")
    names = ("guidance_scale", "num_inference_steps", "guidance_end")
    try:
        cell = cells.Cell("", **{name: report[name] for name in names if name in report})
    except UserError:
        return None
    return float(seconds) / cell.samples if is_finite(seconds) else None  # type: ignore[arg-type]


def duration_text(seconds: float) -> str:
    return f"{max(1, seconds):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def draw_pictures(
    grid: Grid,
    planned: Sequence[cells.PlannedCell],
    missing: Sequence[cells.PlannedCell],
    job: GridJob | None,
    measured: Measured,
    show_curves: Callable[[], None],
) -> None:
    """Show the pictures of one tab and one page of its rows, and again each second while a job draws them.

    The plan that the page made is shown first. Later, Streamlit runs only this function without the page, and each run
    plans the rows that it shows.
    """
    fresh = [planned]
    best = {run: best_setting(run) for run in {one.run for one in planned}}

    @st.fragment(run_every=1 if job else None)
    def draw() -> None:
        if "_point" in st.session_state:  # A clicked checkpoint changes the grid, and so the page.
            st.rerun()
        if job:
            if job.finished.is_set():
                st.rerun()
            show_progress(job)
        above = st.container()
        tab = choose_tab(grid)
        if not job and missing:
            with above:
                announce(grid, planned, missing, tab)
        rows = choose_rows(grid)
        try:
            shown = part_of_plan(fresh.pop(), tab, rows) if fresh else grid.plan(tab, rows)
        except UserError as error:  # the run was deleted meanwhile
            warn(error)
            show_curves()
            return
        show_table(grid, shown, rows, tab, measured, best, show_curves)

    draw()


def part_of_plan(planned: Sequence[cells.PlannedCell], tab: int, rows: slice) -> list[cells.PlannedCell]:
    """Return the part of an entire grid's plan that `Grid.plan(tab, rows)` would return."""
    shown = [one for one in planned if one.at[0] == tab and rows.start <= one.at[1] < rows.stop]
    return [replace(one, at=(0, one.at[1] - rows.start, one.at[2])) for one in shown]


def show_progress(job: GridJob) -> None:
    job.look()
    left = job.seconds_left()
    text = f"{job.done:,} of {job.total:,} drawn" + ("" if left is None else f", {duration_text(left)} left")
    if job.stopped.is_set():
        text = f"stopping, {job.done:,} of {job.total:,} drawn"
    elif not job.done:
        text = "loading the model, or waiting for another drawing to end"
    row = st.container(horizontal=True, vertical_alignment="center")
    row.progress(job.done / max(1, job.total), text=text)
    row.button(
        "Stop",
        on_click=job.stopped.set,  # before the page runs, so that it says at once that the job stops
        disabled=job.stopped.is_set(),
        help="Pictures of the grid that are already drawn stay, and drawing resumes with the missing ones.",
    )


def choose_tab(grid: Grid) -> int:
    """Show the widget for the tab, if there are several, and return the tab's number."""
    if len(grid.axes) < 3 or len(grid.labels[2]) < 2:
        return 0
    labels = list(grid.labels[2])
    title = AXES[grid.axes[2].name].capitalize()
    # Tabs would read Markdown in a prompt; a list shows it as it is.
    plain = all(label == escape(label) for label in labels)
    if st.session_state.get("tab", st.query_params.get("tab")) not in labels:
        st.session_state["tab"] = labels[0]
    options: dict[str, Any] = {"key": "tab", "bind": "query-params", "required": True}
    if plain and sum(map(len, labels)) <= TITLE_CHARACTERS:
        chosen = st.segmented_control(title, labels, **options)
    else:
        chosen = st.selectbox(title, labels, index=None, label_visibility="collapsed", **options)
    return labels.index(chosen) if chosen in labels else 0


def choose_rows(grid: Grid) -> slice:
    """Return the rows of the grid to show: all rows, or the page of rows that a widget chooses."""
    count, each = len(grid.labels[1]), max(1, SHOWN // len(grid.labels[0]))
    if count <= each:
        return slice(0, count)
    pages = [f"{start + 1}–{min(count, start + each)}" for start in range(0, count, each)]
    page = st.selectbox(f"Rows, of {count}", pages, key="page", bind="query-params")
    start = each * (pages.index(page) if page in pages else 0)
    return slice(start, min(count, start + each))


def show_table(
    grid: Grid,
    planned: Sequence[cells.PlannedCell],
    rows: slice,
    tab: int,
    measured: Measured,
    best: Mapping[Path, dict[str, Any]],
    show_curves: Callable[[], None],
) -> None:
    """Show the planned pictures of a tab as a table with its downloads, and beside it two of them compared and the curves.

    The picture at the best setting stands on the right at first, because it is the one to compare others with. The curves
    come first if the table shows several runs.

    Args:
        best: the setting that the evaluation of each run chose, as `best_setting` returns it.
    """
    shown: dict[str, dict[str, Any]] = {}
    plans: dict[str, cells.PlannedCell] = {}
    on_tab = "".join(
        f", {axis_label(axis.name, grid.labels[2][tab])}" for axis in grid.axes[2:] if axis.name not in TEXTS
    )
    for one in planned:
        _, row, column = one.at
        source = stored_address(one.path) if one.made else ""
        label = cell_name(grid, rows.start + row, column)
        plans[label] = one
        shown[label] = {
            "row": rows.start + row,
            "column": column,
            "source": source,
            "label": label,
            "alt": f"{label}{on_tab}: {one.cell.prompt}",
            "note": "" if source else one.problem or "not drawn yet",
            "under": "\n".join([*shown_instead(grid, one, rows), *(figures_of(one, measured) if source else ())]),
            "settings": settings_of(one),
            "open": partial(open_picture, one),
        }
    corner = f"{AXES[grid.axes[1].name]} \\ {AXES[grid.axes[0].name]}"
    first = next((name for name, one in plans.items() if has_setting(one, best.get(one.run, {}))), None)
    left, right = st.columns([3, 2], gap="large")
    with left:
        pair = show_pictures(shown, list(grid.labels[0]), list(grid.labels[1][rows]), corner, first=first)
        if any(picture["source"] for picture in shown.values()):
            show_downloads(grid, planned, rows)
    with right:  # The grid scrolls by itself, so the pictures beside it stay in sight.
        several = len({one.run for one in planned}) > 1
        if several:
            show_curves()
        if pair:
            show_pair(shown, *pair)
        for side in ("left", "right"):
            name = st.session_state.get(side)
            if name in shown and shown[name]["source"]:
                playground_link(plans[name], f"Open the {side} picture in the Playground")
        if not several:
            show_curves()


def best_setting(run: Path) -> dict[str, Any]:
    """Return the setting that the evaluation of a run chose: its checkpoint, and values of a cell by their names."""
    report = read_or_warn(run / "evaluation" / "evaluation.json").get("report")
    report = report if isinstance(report, dict) else {}
    return {name: report[name] for name in ("checkpoint", *SAMPLING) if name in report}


def has_setting(planned: cells.PlannedCell, setting: dict[str, Any]) -> bool:
    """Return whether a picture is drawn at a setting of `best_setting`. No picture is, if the setting is not known."""
    values = {"checkpoint": planned.checkpoint, **asdict(planned.cell)}
    return bool(setting) and all(values[name] == setting[name] for name in setting)


def settings_of(planned: cells.PlannedCell) -> dict[str, Any]:
    """Return what made a picture, by the names of the axes."""
    settings = {"run": planned.run.as_posix(), "checkpoint": planned.checkpoint, **asdict(planned.cell)}
    return {AXES.get(name, name): value for name, value in settings.items()}


def figures_of(planned: cells.PlannedCell, measured: Measured) -> list[str]:
    """Return lines that say what the evaluation read in a picture, and how near it is to a training image."""
    reading, distance = measured.get(planned.run, {}).get((planned.model_hash, planned.cell), (None, None))
    right, wrong = outcome(reading)
    lines = [f"✗ {miss}" for miss in wrong] or ([f"✓ {len(right)} of {len(right)}"] if right else [])
    return [*lines, f"distance {distance:.2f}"] if is_finite(distance) else lines


def shown_instead(grid: Grid, planned: cells.PlannedCell, rows: slice) -> list[str]:
    """Return which checkpoint a picture shows, if it is not the one that its labels name."""
    _, row, column = planned.at
    labels = {grid.axes[0].name: grid.labels[0][column], grid.axes[1].name: grid.labels[1][rows.start + row]}
    wanted = labels.get("checkpoint", grid.checkpoint)
    if planned.problem or planned.checkpoint == wanted or "checkpoint" in {axis.name for axis in grid.axes[2:]}:
        return []
    return [planned.checkpoint if wanted in (BEST, LAST) else f"nearest step: {planned.checkpoint}"]


def cell_name(grid: Grid, row: int, column: int) -> str:
    """Return the name of a picture in the URL and for the reader: the values on its axes.

    The name stays the same if columns and rows are exchanged, and if values are added to an axis.
    """
    at = zip(grid.axes[:2], (grid.labels[0][column], grid.labels[1][row]), strict=True)
    values = {axis.name: axis_label(axis.name, label) for axis, label in at}
    return ", ".join(values[name] for name in AXES if name in values)


def axis_label(axis: str, label: str) -> str:
    """Return the label of an axis's value together with the name of the axis, such as "seed 3"."""
    return label if label.startswith(AXES[axis]) else f"{AXES[axis]} {label}"


def open_picture(planned: cells.PlannedCell) -> Image.Image | None:
    return cells.read_cell(planned.run, planned.model_hash, planned.cell)


# --- Downloads -------------------------------------------------------------------------------------------------------


def show_downloads(grid: Grid, planned: Sequence[cells.PlannedCell], rows: slice) -> None:
    left, right = st.columns(2)
    options: dict[str, Any] = {"width": "stretch", "on_click": "ignore"}
    left.download_button("Grid as PNG", partial(grid_file, grid, planned, rows), "grid.png", "image/png", **options)
    right.download_button(
        "Pictures with their parameters",
        partial(cells.zip_pictures, planned),
        "pictures.zip",
        "application/zip",
        **options,
    )


def grid_file(grid: Grid, planned: Sequence[cells.PlannedCell], rows: slice) -> bytes:
    """Return a PNG of the grid's shown rows with their labels."""
    table: list[list[Any]] = [[None] * len(grid.labels[0]) for _ in grid.labels[1][rows]]
    for one in planned:
        table[one.at[1]][one.at[2]] = open_picture(one)
    title = f"{AXES[grid.axes[1].name]} by {AXES[grid.axes[0].name]}"
    return grid_png(labelled_grid(table, grid.labels[1][rows], grid.labels[0], title))
