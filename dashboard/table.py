"""A grid on the page: what is missing and what it costs, the pictures as they come, two of them compared, downloads."""

import io
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from common import escape, is_finite, read, warn
from drawing import GridJob, expected_seconds
from grid import AXES, Grid, name_of
from PIL import Image
from widgets import address, picture_grid, picture_pair

from t2i.errors import UserError
from t2i.files import hash_json
from t2i.pictures import cells
from t2i.pictures.png import difference, grid_png, labelled_grid

SHOWN = 100  # cells of a grid at once; the rows of a larger one are shown in pages
MANY, LONG_S = 100, 120  # missing pictures and seconds from which on a grid asks before it is drawn
WORDS_IN_TABS = 40  # characters of all tabs together, from which on they become a list
MODES = ["slider", "side by side", "difference"]


def show_grid(grid: Grid) -> None:
    """What is missing and what it costs, then the pictures."""
    places = grid.places()
    todo = cells.missing(places)
    key = hash_json([str(grid), len(places)])
    known, job = st.session_state.get("_job", (None, None))
    if known != key and job is not None:  # another grid was chosen: what was made of the old one stays
        job.stopped.set()
        job = None
    if job is not None and job.finished.is_set():
        if job.error:
            warn(UserError(job.error))
        st.session_state.pop("_job")
        job = None
    if job is None and todo:
        announce(grid, places, todo, key)
    draw_pictures(grid, job)


def announce(grid: Grid, places: Sequence[cells.Place], todo: Sequence[cells.Place], key: str) -> None:
    """How many pictures there are to draw and how long that takes; a large grid asks first."""
    seconds = expected_seconds(places, known_pace(grid.run))
    takes = "the time is known after the first" if seconds is None else f"about {words_for(seconds)}"
    row = st.container(horizontal=True, vertical_alignment="center")
    row.text(f"{len(todo):,} of {len(places):,} pictures are not drawn yet: {takes}", width="content")
    sure = True
    if len(todo) > MANY or (seconds or 0) > LONG_S:
        sure = row.checkbox(f"yes, draw {len(todo):,} pictures", key=f"_sure_{key}")  # said of this grid alone
    if row.button(f"Draw {len(todo):,} pictures", disabled=not sure, type="primary"):
        st.session_state["_job"] = (key, GridJob.start(todo))
        st.rerun()


def known_pace(run: Path) -> float | None:
    """Seconds a sample of the UNet, as the evaluation measured it on this or another machine."""
    report = read(run / "evaluation" / "evaluation.json").get("report")
    if not isinstance(report, dict):
        return None
    seconds = report.get("seconds_per_picture_cpu")
    names = ("guidance_scale", "num_inference_steps", "guidance_end")
    try:
        drawn = cells.Cell("", **{name: report[name] for name in names if name in report})
    except UserError:
        return None
    return float(seconds) / drawn.samples if is_finite(seconds) else None  # type: ignore[arg-type]


def words_for(seconds: float) -> str:
    return f"{max(1, seconds):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def draw_pictures(grid: Grid, job: GridJob | None) -> None:
    """The pictures of a tab and a page of its rows, again each second while they are drawn."""

    @st.fragment(run_every=1 if job else None)
    def draw() -> None:
        if job:
            if job.finished.is_set():
                st.rerun()
            show_progress(job)
        tab = choose_tab(grid)
        rows = choose_rows(grid)
        try:
            places = grid.places(tab, rows)
        except UserError as error:  # of a run that was deleted meanwhile
            warn(error)
            return
        show_table(grid, places, rows)

    draw()


def show_progress(job: GridJob) -> None:
    job.look()
    left = job.seconds_left()
    text = f"{job.done:,} of {job.total:,} drawn" + ("" if left is None else f", {words_for(left)} left")
    row = st.container(horizontal=True, vertical_alignment="center")
    row.progress(
        job.done / max(1, job.total), text=text if job.done else "loading the model, or waiting for another's turn"
    )
    if row.button("Stop", help="what is drawn stays, and the grid goes on from there"):
        job.stopped.set()


def choose_tab(grid: Grid) -> int:
    if len(grid.axes) < 3 or len(grid.labels[2]) < 2:
        return 0
    labels = list(grid.labels[2])
    title = AXES[grid.axes[2].name].capitalize()
    plain = all(
        label == escape(label) for label in labels
    )  # tabs would read Markdown in a prompt, a list shows it as it is
    if plain and sum(map(len, labels)) <= WORDS_IN_TABS:
        chosen = st.segmented_control(title, labels, default=labels[0], key="tab", bind="query-params", required=True)
    else:
        chosen = st.selectbox(title, labels, key="tab", bind="query-params", label_visibility="collapsed")
    return labels.index(chosen) if chosen in labels else 0


def choose_rows(grid: Grid) -> slice:
    """The rows that are shown: all, or a page of them."""
    count, each = len(grid.labels[1]), max(1, SHOWN // len(grid.labels[0]))
    if count <= each:
        return slice(0, count)
    pages = [f"{start + 1}–{min(count, start + each)}" for start in range(0, count, each)]
    page = st.selectbox(f"Rows, of {count}", pages, key="page", bind="query-params")
    start = each * (pages.index(page) if page in pages else 0)
    return slice(start, min(count, start + each))


def show_table(grid: Grid, places: Sequence[cells.Place], rows: slice) -> None:
    """The grid, and two of its pictures compared."""
    shown = {}
    for place in places:
        _, row, column = place.at
        made = encoded(place.path, *state_of(place.path)) if place.made else ""
        labels = f"{grid.labels[0][column]}, {grid.labels[1][rows.start + row]}"
        shown[name_of(rows.start + row, column)] = {
            "row": rows.start + row,
            "column": column,
            "source": made,
            "label": labels,
            "alt": f"{labels}: {place.cell.prompt}",
            "note": "" if made else place.problem or "not drawn yet",
            "open": partial(open_cell, place),
        }
    corner = f"{AXES[grid.axes[1].name]} \\ {AXES[grid.axes[0].name]}"
    if show_pictures(shown, list(grid.labels[0]), list(grid.labels[1][rows]), corner):
        show_downloads(grid, places, rows)


def show_pictures(shown: dict[str, dict[str, Any]], columns: list[str], rows: list[str], corner: str) -> bool:
    """A table of pictures under the labels of its columns and rows, and two of them compared; False where there are none.

    shown: by `name_of`, row by row: row, column, source (an address, or ""), label, alt, note, perhaps `under` (words below the
    picture), and open, which gives the picture or None.
    """
    there = [name for name, cell in shown.items() if cell["source"]]
    # Before their widgets stand, what the URL says of them is in the URL alone.
    left, right = (st.session_state.get(side, st.query_params.get(side)) for side in ("left", "right"))
    asked = st.session_state.pop("_chosen", {})
    left, right = asked.get("left", left), asked.get("right", right)
    left = left if left in there else next(iter(there), None)
    right = right if right in there else next((name for name in there if name != left), left)
    picture_grid(
        {
            "columns": columns, "rows": rows, "corner": corner,
            "cells": [{key: value for key, value in cell.items() if key not in ("label", "open")} for cell in shown.values()],
            "left": place_of(shown, left), "right": place_of(shown, right),
        },
        key="_grid", on_chosen=take_chosen,
    )  # fmt: skip
    if not there:
        return False
    st.caption("A click chooses the right picture to compare, Shift and a click the left one.")
    show_pair(shown, there, str(left), str(right))
    return True


def place_of(shown: dict[str, Any], name: str | None) -> list[int] | None:
    return [shown[name]["row"], shown[name]["column"]] if name in shown else None


def take_chosen() -> None:
    """Remember the clicked picture; it is looked up among those shown."""
    found = getattr(st.session_state.get("_grid"), "chosen", None)
    if isinstance(found, dict) and isinstance(found.get("row"), int) and isinstance(found.get("column"), int):
        side = "left" if found.get("left") else "right"
        st.session_state["_chosen"] = {side: name_of(found["row"], found["column"])}


def show_pair(shown: dict[str, Any], there: list[str], left: str, right: str) -> None:
    """Widgets for two pictures and the way they are compared."""
    for side, name in (("left", left), ("right", right)):
        if st.session_state.get(side) != name:
            st.session_state[side] = name
    columns = st.columns(2)
    one = shown[columns[0].selectbox("Left", there, key="left", bind="query-params")]
    two = shown[columns[1].selectbox("Right", there, key="right", bind="query-params")]
    mode = st.segmented_control(
        "Show", MODES, default=MODES[0], key="view", bind="query-params", required=True
    )  # fmt: skip
    pair = [cell["open"]() for cell in (one, two)]
    if None in pair:
        st.text("one of these pictures is gone; make it again")
        return
    gap, mean = difference(*(np.asarray(image) for image in pair))
    text = f"mean difference {mean:.1f} of 255; the picture shows the largest one as white"
    sides = [{key: cell[key] for key in ("source", "alt", "label")} for cell in (one, two)]
    picture_pair(
        {
            "mode": mode if mode in MODES else MODES[0], "left": sides[0], "right": sides[1],
            "difference": {
                "source": address(png(gap)), "label": text, "alt": f"difference of {one['label']} and {two['label']}",
            },
        },
        key="_pair",
    )  # fmt: skip


def show_downloads(grid: Grid, places: Sequence[cells.Place], rows: slice) -> None:
    left, right = st.columns(2)
    left.download_button(
        "Grid as PNG",
        lambda: whole_grid(grid, places, rows),
        "grid.png",
        "image/png",
        width="stretch",
        on_click="ignore",
    )
    right.download_button(
        "Pictures with their parameters", lambda: cells.zipped(places), "pictures.zip", "application/zip",
        width="stretch", on_click="ignore",
    )  # fmt: skip


def whole_grid(grid: Grid, places: Sequence[cells.Place], rows: slice) -> bytes:
    table: list[list[Any]] = [[None] * len(grid.labels[0]) for _ in grid.labels[1][rows]]
    for place in places:
        table[place.at[1]][place.at[2]] = open_cell(place)
    title = f"{AXES[grid.axes[1].name]} by {AXES[grid.axes[0].name]}"
    return grid_png(labelled_grid(table, grid.labels[1][rows], grid.labels[0], title))


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def open_cell(place: cells.Place) -> Image.Image | None:
    return cells.read_cell(place.run, place.model_hash, place.cell)


def state_of(path: Path) -> tuple[int, int]:
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return 0, 0


@lru_cache(maxsize=1024)
def encoded(path: Path, *state: int) -> str:
    """A picture's file as an address; "" where it was deleted meanwhile. Kept while the file stays as it is."""
    try:
        return address(path.read_bytes())
    except OSError:
        return ""
