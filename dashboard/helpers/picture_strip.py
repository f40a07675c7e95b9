"""Show the pictures that the Playground drew, from the stores of all runs, with a search and stars."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import streamlit as st
from PIL import Image

from helpers.page_rights import has_control
from helpers.page_texts import escape, warn
from t2i.errors import UserError
from t2i.pictures import cells

PAGE = 12  # pictures that are shown at first, and that "Show older ones" adds
MOST = 120  # pictures on the page: each is a picture and two buttons
THUMB = 72  # pixels per side


def show_strip(
    runs: Sequence[Path],
    own: Sequence[cells.PlannedCell] | None,
    settings_text: Callable[[cells.PlannedCell], str],
    on_chosen: Callable[[cells.PlannedCell], None],
) -> None:
    """Show the newest pictures, each with a button that restores its settings.

    Args:
        own: pictures of this session, the newest first, which alone are shown. With None, show the stores of `runs`.
        settings_text: function that returns a picture's settings in words.
        on_chosen: called with the picture whose settings are restored.
    """
    words = str(st.session_state.get("find", st.query_params.get("find")) or "")  # before the widget stands
    starred = bool(st.session_state.get("starred", st.query_params.get("starred") == "true"))
    count = st.session_state.get("_strip", PAGE)
    shown = list(own[:PAGE]) if own is not None else cells.newest_watched(runs, count + 1, words, starred)
    if len(shown) < 2 and not words and not starred:
        return
    st.header("Pictures drawn here")
    if own is None:
        row = st.container(horizontal=True, vertical_alignment="bottom")
        row.text_input(
            "Find", key="find", bind="query-params", max_chars=200, width=240, help="Words of the prompt or model."
        )
        row.toggle("Starred", key="starred", bind="query-params")
    if not shown:
        st.text("no picture matches")
    with st.container(horizontal=True, gap="small"):
        for planned in shown[:count]:
            show_thumbnail(planned, settings_text(planned), on_chosen, has_star=own is None)
    if len(shown) > count and count < MOST:
        st.button("Show older ones", on_click=lambda: st.session_state.update(_strip=count + PAGE))


def show_thumbnail(
    planned: cells.PlannedCell, text: str, on_chosen: Callable[[cells.PlannedCell], None], has_star: bool
) -> None:
    """Show a picture with the buttons that restore its settings and that star it."""
    pixels = thumbnail(planned)
    if pixels is None:  # deleted meanwhile
        return
    key = planned.path.as_posix()  # A copied run has pictures of the same file names.
    starred = has_star and cells.is_starred(planned)
    with st.container(width=THUMB + 48, gap=None):
        st.image(pixels, width=THUMB, alt=planned.cell.prompt, output_format="PNG")
        with st.container(horizontal=True, gap="small"):
            st.button(
                f"Seed {planned.cell.seed}",
                key=f"_back_{key}",
                on_click=on_chosen,
                args=(planned,),
                type="tertiary",
                help=f"Restore the settings of this picture: {escape(text)}",
            )
            if has_star and (starred or has_control()):
                st.button(
                    "★" if starred else "☆",
                    key=f"_star_{key}",
                    on_click=star,
                    args=(planned, not starred),
                    type="tertiary",
                    disabled=not has_control(),
                    help="Remove the star" if starred else "Star this picture, so that newer ones do not replace it",
                )


def star(planned: cells.PlannedCell, starred: bool) -> None:
    try:
        cells.set_star(planned, starred)
    except UserError as error:
        warn(error)


def thumbnail(planned: cells.PlannedCell) -> np.ndarray | None:
    """Return a small picture, uint8 [72, 72, 3], or None if the store no longer has the picture."""
    try:
        state = planned.path.stat()
    except OSError:
        return None
    return _thumbnail(planned, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)  # of unchanged files
def _thumbnail(planned: cells.PlannedCell, *state: int) -> np.ndarray | None:
    image = cells.read_cell(planned.run, planned.model_hash, planned.cell)
    return None if image is None else np.asarray(image.resize((THUMB, THUMB), Image.Resampling.LANCZOS))
