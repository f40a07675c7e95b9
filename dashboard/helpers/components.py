"""Widgets that Streamlit does not have: a grid of pictures with linked zoom, two pictures compared, and a gallery.

The widgets' JavaScript and CSS are in assets/. Content of files reaches a widget as data, and is shown only as text.
"""

import base64
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import streamlit as st

ASSETS = Path(__file__).parents[1] / "assets"


def picture_grid(data: dict[str, Any], key: str, on_chosen: Callable[[], None]) -> None:
    """Show a table of pictures.

    Args:
        data: the table. `columns` and `rows` are labels, `corner` says what the labels mean, and `cells` are the pictures
            row by row. `left` and `right` are row and column of the two pictures that are compared. A cell has `source` (a
            data address or ""), `alt`, `row`, `column`, and `note` (text shown if there is no picture). A cell may have
            `under` (text below the picture).
        on_chosen: called when a picture is clicked. `st.session_state[key].chosen` is then {row, column, left}.
    """
    mount = st.components.v2.component("picture_grid", html='<div class="grid"></div>', css=_css(), js=_js("grid"))
    mount(key=key, data=data, on_chosen_change=on_chosen)


def picture_pair(data: dict[str, Any], key: str) -> None:
    """Show a comparison of two pictures.

    Args:
        data: the comparison. `mode` is "side by side", "slider" or "difference". The pictures `left`, `right` and
            `difference` have `source`, `alt` and `label`.
    """
    mount = st.components.v2.component("picture_pair", html='<div class="pair"></div>', css=_css(), js=_js("pair"))
    mount(key=key, data=data)


def gallery(data: dict[str, Any], key: str, on_chosen: Callable[[], None]) -> None:
    """Show pictures with words under them, in as many columns as there is room for.

    Args:
        data: the gallery. Each of its `pictures` has `source` (a data address or ""), `alt`, `caption`, `label`, `finding`,
            `title`, `row`, and `note` (text shown if there is no picture).
        on_chosen: called when a picture is clicked. `st.session_state[key].chosen` is then {row}.
    """
    mount = st.components.v2.component("gallery", html='<div class="gallery"></div>', css=_css(), js=_js("gallery"))
    mount(key=key, data=data, on_chosen_change=on_chosen)


def data_address(data: bytes) -> str:
    """Return a PNG or JPEG file as a data address."""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


@lru_cache
def _css() -> str:
    return (ASSETS / "pictures.css").read_text(encoding="utf-8")


@lru_cache
def _js(name: str) -> str:
    return "\n".join((ASSETS / f"{part}.js").read_text(encoding="utf-8") for part in ("zoom", name))
