"""Texts of users as Markdown shows them literally. Pages of the dashboard need these functions alone."""

import html
import re
from typing import Any

from t2i.redaction import redact


def one_line(value: Any, limit: int | None = 200) -> str:
    """Return a user's text on one line of at most `limit` characters, without secrets and control characters.

    The result is "" for None. A limit of None keeps the entire text.
    """
    text = "" if value is None else redact(str(value))
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def escape_markdown(value: Any, limit: int | None = 200) -> str:
    """Return `one_line` of a user's text, escaped so that Markdown shows it literally, in table cells too."""
    return re.sub(r"([\\`*_\[\]|~#!$:])", r"\\\1", html.escape(one_line(value, limit), quote=False))
