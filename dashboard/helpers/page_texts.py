"""Show texts on a page: its title, empty states, warnings, and users' texts that must not be read as Markdown."""

from collections.abc import Collection
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from t2i.hub.markdown import escape_markdown

MAKE_FLOWERS = "python scripts/make_flowers.py --output_dir outputs/demo/dataset --count 4000 --size 64"


def title_row(title: str) -> Any:
    """Show the page's title, and return the container beside the title, which holds the page's first widgets.

    Title and first widgets share a row, so the rest of the page starts higher.
    """
    left, right = st.columns([1, 5], vertical_alignment="bottom")
    left.title(title)
    return right


def show_empty_state(sentence: str, command: str) -> None:
    """Show on an empty page what is missing, and the command that makes it."""
    st.info(escape(sentence))
    st.code(command, language="sh", wrap_lines=True)


def show_no_runs(others: Collection[str] = ()) -> None:
    """Show on a page of runs that there is none, and the command that makes the first.

    Args:
        others: the runs that the page does not list. If there are some, a page says that it waits for a denoiser.
    """
    if others:
        st.info("outputs/ has no run that draws pictures yet. A denoiser appears here when its training starts.")
        return
    show_empty_state(
        "No run in outputs/ yet. This fills it, in about a quarter of an hour on two CPU cores:", "make demo"
    )


def warn_once(sentence: str) -> None:
    """Show a warning, unless this run of the page's script has shown it: several parts of a page may read the same file."""
    context = get_script_run_ctx()
    run = context and context.cursors  # a new dictionary in each run
    last, shown = st.session_state.get("_warned", (None, ()))
    shown = shown if last is run else ()
    if sentence not in shown:
        st.session_state["_warned"] = (run, (*shown, sentence))
        st.warning(escape(sentence))


def warn(error: Exception) -> None:
    """Show the sentence of an error as a warning. The error's sentence may contain users' texts, so it is escaped."""
    st.warning(escape(error))


def escape(text: Any) -> str:
    """Escape users' texts (captions, prompts, names) for a widget that reads Markdown. Warnings keep the fix at their end."""
    return escape_markdown(text, limit=None)


def shorten(text: str, most: int) -> str:
    """Return `text`, or "…" after as many of its first words as fit into `most` characters."""
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0].rstrip(" ,;") + "…"
