"""Tables of rows that are dicts.

They are Arrow tables, as Streamlit sends them. pandas would cost a new server 0.4 s of its first page.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import streamlit as st


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Show rows as a table. Columns without any value are left out, and a column of mixed types is shown as text.

    NaN counts as no value: the browser would call it an error.
    """
    columns = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [None if value != value else value for value in (row.get(key) for row in rows)]
        if any(value is not None for value in values):
            try:
                columns[key] = pa.array(values)
            except (pa.ArrowException, OverflowError, UnicodeError):
                columns[key] = pa.array([None if value is None else plain(value) for value in values])
    st.dataframe(pa.table(columns), hide_index=True, placeholder="–")


def plain(value: Any) -> str:
    """Return a value as text without lone surrogates, which Arrow refuses."""
    return str(value).encode("utf-8", "replace").decode()
