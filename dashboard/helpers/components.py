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
    """Show a table of pictures with linked zoom.

    Args:
        data: content of the table of pictures. In the table, `columns` and `rows` are labels, `corner` says what the
            labels mean, and `cells` are the pictures row by row. `left` and `right` are each a row and a column: the
            positions of the two compared pictures. A cell of the table has `source` (a data address or ""), `alt`,
            `row`, `column`, and `note` (text shown if there is no picture). A cell of the table may have `under` (text
            below the picture).
        on_chosen: called when a picture is clicked. After the click, `st.session_state[key].chosen` is {row, column, left}.
    """
    mount = st.components.v2.component("picture_grid", html='<div class="grid"></div>', css=_css(), js=_js("grid"))
    mount(key=key, data=data, on_chosen_change=on_chosen)


def picture_pair(data: dict[str, Any], key: str) -> None:
    """Show a comparison of two pictures.

    Args:
        data: content of the comparison of two pictures. `mode` of the comparison is "side by side", "slider" or
            "difference". The pictures `left`, `right` and `difference` have `source`, `alt` and `label`.
    """
    mount = st.components.v2.component("picture_pair", html='<div class="pair"></div>', css=_css(), js=_js("pair"))
    mount(key=key, data=data)


def gallery(data: dict[str, Any], key: str, on_chosen: Callable[[], None]) -> None:
    """Show pictures, each with words below it, in as many columns as the page has room for.

    Args:
        data: content of the gallery of pictures. Each of the gallery's `pictures` has `source` (a data address or ""),
            `alt`, `caption`, `label`, `finding`, `title` and `row`. A picture's `note` is the text shown if there is no
            picture. A picture with `is_miss` has an outline. If the gallery has `wall`, its pictures are smaller and
            scroll. The gallery's `action` says what a click does.
        on_chosen: called when a picture is clicked. After the click, `st.session_state[key].chosen` is {row}.
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
