"""Widgets that Streamlit does not have: pictures with linked zoom, a gallery, a list of lines, and a text as it is typed.

The widgets' JavaScript and CSS are in assets/. Content of files reaches a widget as data, and is shown only as text.
The data are sent as a tuple of one dict: in a bare dict, Streamlit looks for tables, for which it imports pandas in 0.3 s.
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
    mount = st.components.v2.component(
        "picture_grid", html='<div class="grid"></div>', css=_css(), js=_js("zoom.js", "grid.js")
    )
    mount(key=key, data=(data,), on_chosen_change=on_chosen)


def picture_pair(data: dict[str, Any], key: str) -> None:
    """Show a comparison of two pictures.

    Args:
        data: content of the comparison of two pictures. `mode` of the comparison is "side by side", "slider",
            "flicker" or "difference". The pictures `left`, `right` and `difference` have `source`, `alt` and `label`.
    """
    mount = st.components.v2.component(
        "picture_pair", html='<div class="pair"></div>', css=_css(), js=_js("zoom.js", "pair.js")
    )
    mount(key=key, data=(data,))


def gallery(data: dict[str, Any], key: str, on_chosen: Callable[[], None]) -> None:
    """Show pictures, each with words below it, in as many columns as the page has room for.

    Args:
        data: content of the gallery of pictures. Each of the gallery's `pictures` has `source` (a data address or ""),
            `alt`, `caption`, `label`, `finding`, `title` and `row`. A picture's `note` is the text shown if there is no
            picture. A picture with `is_miss` has an outline. A `heading` of a picture stands above it, in a row of its
            own. If the gallery has `wall`, its pictures are smaller and scroll. If it has `columns`, it has so many.
            The gallery's `action` says what a click does.
        on_chosen: called when a picture is clicked. After the click, `st.session_state[key].chosen` is {row, split}.
            The split is that of the picture's data, or "".
    """
    mount = st.components.v2.component(
        "gallery", html='<div class="gallery"></div>', css=_css(), js=_js("zoom.js", "gallery.js")
    )
    mount(key=key, data=(data,), on_chosen_change=on_chosen)


def legend(data: dict[str, Any], key: str) -> list[str]:
    """Show a list of a chart's lines, each with a switch, and return the names of the lines that are switched off.

    Args:
        data: content of the list. It has a `title`, and `lines` with a `name`, `color`, `figures` (words below the name),
            `dashed` and `dotted`. The names in its `hidden` are switched off.
    """
    mount = st.components.v2.component(
        "legend", html='<div class="legend"></div>', css=_css(), js=_js("zoom.js", "legend.js")
    )
    result = mount(key=key, data=(data,), default={"hidden": data["hidden"]}, on_hidden_change=_nothing)
    hidden = result.get("hidden")
    return [str(name) for name in hidden] if isinstance(hidden, list) else []


def scrubber(data: dict[str, Any], key: str) -> None:
    """Show a picture with a slider over the steps of its drawing.

    Args:
        data: content of the widget. It has a `title` of the slider, and `steps`, each with a `source` (a data address),
            `alt` and `label`. The last step, which is shown at first, is the finished picture.
    """
    mount = st.components.v2.component(
        "scrubber", html='<div class="scrubber"></div>', css=_css(), js=_js("zoom.js", "scrubber.js")
    )
    mount(key=key, data=(data,))


def typing(field: str, button: str, live: bool, pause_ms: int, key: str, on_typed: Callable[[], None]) -> None:
    """Report the text of a text area a moment after the last key, and let Enter press a button. Nothing is shown.

    Streamlit itself reports a text only after Ctrl and Enter, or when the user leaves the field.

    Args:
        field, button: keys of the text area and of the button.
        live: whether to report texts. Enter presses the button in any case.
        pause_ms: pause after the last key, in milliseconds.
        on_typed: called with each reported text. After it, `st.session_state[key].typed` is the text.
    """
    mount = st.components.v2.component("typing", html='<div class="typing"></div>', js=_js("typing.js"))
    data = {"field": field, "button": button, "live": live, "pause": pause_ms}
    mount(key=key, data=(data,), on_typed_change=on_typed)


def _nothing() -> None:
    """Make the component run its fragment again: that is what a change of its state is for."""


def data_address(data: bytes) -> str:
    """Return a PNG or JPEG file as a data address."""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


@lru_cache
def _css() -> str:
    return (ASSETS / "pictures.css").read_text(encoding="utf-8")


@lru_cache
def _js(*names: str) -> str:
    return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)
