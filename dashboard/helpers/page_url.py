"""Name a page's choices in its URL, so that a shared URL shows the same later, when there are newer runs.

Streamlit leaves a widget's default out of the URL, even if the URL named it. So the widgets of a page's URL have no
default: before the widgets stand, `name_choices` gives them their first values and writes these values into the URL.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import streamlit as st
from streamlit.errors import StreamlitAPIException

from helpers.page_texts import escape

Choice = str | int | float | Sequence[str]


def name_choices(choices: dict[str, Choice], titles: Mapping[str, str] = MappingProxyType({})) -> None:
    """Give widgets their first values, and name these values in the URL.

    A widget that has a value, or whose value the URL names, keeps it, also if `gone_names` does not find the value. Call this
    function once per page, before the page's widgets: each call adds an entry to the browser's history.

    Args:
        choices: first values by the keys of the widgets.
        titles: how the URL calls the first values of widgets whose options have titles.
    """
    state = st.session_state
    gone = {key for key in choices if state.get(f"gone {key}")}  # nothing else may take the place of what is gone
    named = {key for key in st.query_params if any(st.query_params.get_all(key))}  # an empty text names nothing
    unnamed = {key: value for key, value in choices.items() if key not in named and key not in gone}
    fresh = {key: value for key, value in unnamed.items() if key not in state}
    state.update({key: value for key, value in unnamed.items() if state.get(key) is None})  # also an emptied number
    if not fresh:
        return
    texts = {key: titles.get(key) or url_text(value) for key, value in fresh.items()}
    try:
        st.query_params.update(texts)
    except StreamlitAPIException:  # a widget of the page before still holds one of the keys; the next choice names it
        return


def url_text(value: Choice) -> str | list[str]:
    """Return a value as Streamlit writes it into the URL."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else repr(value)
    return str(value) if isinstance(value, str | int) else list(value)


def asked(key: str) -> list[str]:
    """Return the chosen value of a widget as a list of texts, before the widget stands: from the session, otherwise the URL."""
    if key not in st.session_state:
        return st.query_params.get_all(key)
    value = st.session_state[key]
    return [str(value)] if isinstance(value, str | int | float) else [str(part) for part in value or ()]


def gone_names(key: str, known: Collection[str]) -> list[str]:
    """Return the names in the URL that do not exist.

    Streamlit removes unknown names from the URL, so the names are kept until the user chooses others, or until they exist.
    """
    named = [name for name in asked(key) or st.query_params.get_all(key) if name]
    named = named or st.session_state.get(f"gone {key}", [])
    gone = st.session_state[f"gone {key}"] = [name for name in named if name not in known]
    return gone


def warn_of_gone(names: Sequence[str], place: str, fix: str) -> None:
    """Show a warning that names of the URL do not exist.

    Args:
        place: where the names should be, such as "outputs/".
        fix: what the user can do.
    """
    if names:
        several = f"{', '.join(name[:80] for name in names[:3])}{', …' if len(names) > 3 else ''}"
        st.warning(escape(f"{place} holds no {several}, which the page's address names; {fix}"))
