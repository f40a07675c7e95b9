"""Tables as Streamlit sends them: Arrow tables, of rows that are dicts.

Columns are made of buffers. `pa.array` imports pandas if that is installed, which costs a new server 0.3 s of its first page.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import pyarrow as pa
import streamlit as st

MAX = sys.float_info.max  # of a column of numbers that are not all integers


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show rows as a table. Columns without any value are left out."""
    table = table_of_rows(rows)
    shown = table.select([name for name in table.column_names if table[name].null_count < len(rows)])
    st.dataframe(
        shown, hide_index=True, placeholder="–", lazy=False
    )  # To decide it by itself, Streamlit imports pandas.


def table_of_rows(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as a table, whose columns are in the order in which the rows name them."""
    return pa.table(
        {key: column([row.get(key) for row in rows]) for key in dict.fromkeys(key for row in rows for key in row)}
    )


def column(values: Sequence[Any] | np.ndarray) -> pa.Array:
    """Return a column of truth values, of numbers, or else of texts. In a list, None and NaN are places without a value.

    Args:
        values: float, int or bool [N], or a list.
    """
    if isinstance(values, np.ndarray):
        return _array(values, None)
    is_given = np.array([value is not None and value == value for value in values], bool)
    given = [value for value, has_value in zip(values, is_given, strict=True) if has_value]

    def filled(empty: Any) -> list[Any]:
        return [value if has_value else empty for value, has_value in zip(values, is_given, strict=True)]

    if all(isinstance(value, bool) for value in given):
        return _array(np.array(filled(False), bool), is_given)
    if not any(isinstance(value, bool) for value in given):
        if all(isinstance(value, Integral) and abs(value) < 2**63 for value in given):
            return _array(np.array(filled(0), np.int64), is_given)
        if all(isinstance(value, Real) and not math.inf > abs(value) > MAX for value in given):
            return _array(np.array(filled(0.0), np.float64), is_given)
    texts = [str(value).encode("utf-8", "replace") for value in filled("")]
    ends = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    buffers = [_bits(is_given), pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.utf8(), len(texts), buffers)


def _array(values: np.ndarray, is_given: np.ndarray | None) -> pa.Array:
    data = _bits(values) if values.dtype == bool else pa.py_buffer(np.ascontiguousarray(values))
    validity = None if is_given is None else _bits(is_given)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [validity, data])


def _bits(values: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
