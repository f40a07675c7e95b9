"""Show a table of pictures and a comparison of two of them, for the pages Compare and VAE."""

import io
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from PIL import Image

from helpers.components import data_address, picture_grid, picture_pair
from helpers.page_texts import shorten
from t2i.pictures.png import difference

MODES = ["slider", "side by side", "flicker", "difference"]
TEXT_CHARACTERS = 60  # characters of a setting's value in the list of what differs


def show_pictures(
    shown: dict[str, dict[str, Any]],
    columns: list[str],
    rows: list[str],
    corner: str,
    is_by_row: bool = False,
    first: str | None = None,
) -> tuple[str, str] | None:
    """Show a table of pictures, and return the names of the two that are compared; None if there are no two.

    Args:
        shown: the pictures row by row, by the names under which the URL and the page's widgets choose them. Each
            picture of the table has `row`, `column`, `source` (a data address or ""), `label`, `alt`, `note` and
            `open`. A picture's `open` is a function that returns the picture or None. A picture of the table may have
            `under` (text below the picture) and `settings` (what made it, by names for people).
        columns, rows: labels of the columns and rows of the table.
        corner: text in the table's corner, which says what the labels of columns and rows mean.
        is_by_row: whether the two that are compared at first stand in one row.
        first: name of the picture that stands on the right at first.
    """
    drawn = [name for name, picture in shown.items() if picture["source"]]
    # Before their widgets stand, the URL alone says what they are.
    left, right = (st.session_state.get(side, st.query_params.get(side)) for side in ("left", "right"))
    clicked = st.session_state.pop("_chosen", {})
    at = {(picture["row"], picture["column"]): name for name, picture in shown.items()}
    left, right = at.get(clicked.get("left"), left), at.get(clicked.get("right"), right)
    right = first if right not in shown and first in drawn and first != left else right
    left = left if left in shown else partner_of(shown, drawn, right, is_by_row)
    right = right if right in shown else partner_of(shown, drawn, left, is_by_row)
    private = ("label", "open", "settings")  # not for the browser
    picture_grid(
        {
            "columns": columns,
            "rows": rows,
            "corner": corner,
            "cells": [{key: picture[key] for key in picture if key not in private} for picture in shown.values()],
            "left": position_of(shown, left),
            "right": position_of(shown, right),
        },
        key="_grid",
        on_chosen=take_clicked_picture,
    )
    if not drawn:
        return None
    if left is None or right is None:
        st.caption(
            "As soon as there is a second picture" + " in a row" * is_by_row + ", it is compared with the first one."
        )
        return None
    st.caption(
        "Click a picture to compare it on the right side, or Shift-click for the left side. By keyboard: Alt and G, arrow keys, Enter."
    )
    return left, right


def partner_of(shown: dict[str, dict[str, Any]], drawn: list[str], other: str | None, is_by_row: bool) -> str | None:
    """Return a drawn picture beside `other`: the nearest one of its row, otherwise the first one of another row.

    Without `other`, return the first picture that has one beside it. Return None if there is no such picture. If
    `is_by_row`, only pictures of one row stand beside each other.
    """
    rows = [shown[name]["row"] for name in drawn]
    if other not in shown:
        return next((name for name, row in zip(drawn, rows, strict=True) if not is_by_row or rows.count(row) > 1), None)
    at = shown[other]
    beside = [name for name in drawn if name != other and shown[name]["row"] == at["row"]]
    if beside:
        return min(beside, key=lambda name: abs(shown[name]["column"] - at["column"]))
    return next((name for name in drawn if name != other and not is_by_row), None)


def position_of(shown: dict[str, Any], name: str | None) -> list[int] | None:
    return [shown[name]["row"], shown[name]["column"]] if name in shown else None


def take_clicked_picture() -> None:
    """Remember the position of the clicked picture.

    The page then looks up the picture at the position that was clicked.
    """
    position = getattr(st.session_state.get("_grid"), "chosen", None)
    if isinstance(position, dict) and isinstance(position.get("row"), int) and isinstance(position.get("column"), int):
        side = "left" if position.get("left") else "right"
        st.session_state["_chosen"] = {side: (position["row"], position["column"])}


def show_pair(shown: dict[str, Any], left: str, right: str) -> None:
    """Show the comparison of two pictures and what differs in their settings, with widgets that choose pictures and view."""
    for side, name in (("left", left), ("right", right)):
        if st.session_state.get(side) != name:
            st.session_state[side] = name
    columns = st.columns(2)
    options: dict[str, Any] = {"options": list(shown), "index": None, "required": True, "bind": "query-params"}
    one = shown[columns[0].selectbox("Left", key="left", **options) or left]
    two = shown[columns[1].selectbox("Right", key="right", **options) or right]
    mode = st.segmented_control("Show", MODES, default=MODES[0], key="view", bind="query-params", required=True)
    if "settings" in one:
        st.text(differing(one["settings"], two["settings"]))
    for picture in (one, two):
        if not picture["source"]:
            st.text(f"{picture['label']}: {picture['note']}")
            return
    pair = [picture["open"]() for picture in (one, two)]
    if None in pair:
        st.text("one of these pictures is gone; make it again")
        return
    gap, mean = difference(*(np.asarray(image) for image in pair))
    sides = [{key: picture[key] for key in ("source", "alt", "label")} for picture in (one, two)]
    picture_pair(
        {
            "mode": mode if mode in MODES else MODES[0],
            "left": sides[0],
            "right": sides[1],
            "difference": {
                "source": data_address(encode_png(gap)),
                "label": f"mean difference {mean:.1f} of 255; the picture shows the largest one as white",
                "alt": f"difference of {one['label']} and {two['label']}",
            },
        },
        key="_pair",
    )


def differing(left: dict[str, Any], right: dict[str, Any]) -> str:
    """Return a text of the settings that differ between two pictures. Of long texts, it leaves out the common beginning."""
    parts = []
    for name in [name for name in {**left, **right} if left.get(name) != right.get(name)]:
        values = [str(side.get(name, "–")) for side in (left, right)]
        if max(map(len, values)) > TEXT_CHARACTERS:
            words = [value.split(" ") for value in values]
            equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False)))
            values = [" ".join(["…", *own[equal:]] if equal else own) for own in words]
        parts.append(f"{name} " + " → ".join(shorten(value, TEXT_CHARACTERS) for value in values))
    return "Different: " + "; ".join(parts) if parts else "All settings are equal."


def encode_png(picture: np.ndarray) -> bytes:
    """Return the PNG file of a picture, uint8 [R, R, 3]."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def stored_address(path: Path) -> str:
    """Return the file of a picture as a data address, or "" if the file was deleted meanwhile."""
    try:
        state = path.stat()
    except OSError:
        return ""
    return _read_address(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)  # for as long as the file stays as it is
def _read_address(path: Path, *state: int) -> str:
    try:
        return data_address(path.read_bytes())
    except OSError:
        return ""
