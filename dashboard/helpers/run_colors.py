"""Give each run a color that stays the same, and color runs by a setting."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import streamlit as st

from t2i.evaluation.figures import is_finite

# Each color is 3 : 1 or more against both backgrounds. The first ones differ most from each other.
COLORS = (
    "#1f78d1", "#f31c1c", "#09a909", "#d30ce9", "#81663e", "#c07cab", "#4c9f97", "#ce800b", "#843af5", "#cb0b7e", "#077c2a",
    "#8e82f8", "#934fa4", "#20757e", "#f64bc2", "#8d9926", "#a54f61", "#f65b7a", "#4456f5", "#7d91c0", "#cb64f7", "#c55e31",
    "#3494f4", "#f46427",
)  # fmt: skip
RAMP = ("#1f78d1", "#5d74e8", "#8a66dd", "#b44cc4", "#c9437f", "#d2493c", "#cf6a12", "#a1790a")  # of rising numbers
UNSET = "not set"


def color_runs(names: Collection[str]) -> dict[str, str]:
    """Return a color per run.

    A run's name decides its color. If another run of this session has that color, the run gets the next free one, and keeps
    it. So runs that are added change no color of others. Colors repeat from the 25th run on: see `repeats`.
    """
    slots: dict[str, int] = st.session_state.setdefault("_colors", {})
    for name in sorted(set(names) - slots.keys()):
        first = int(hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(), 16) % len(COLORS)
        order = [(first + step) % len(COLORS) for step in range(len(COLORS))]
        times = Counter(slots.values())
        slots[name] = min(order, key=lambda slot: times[slot])  # The first of the colors that the fewest runs have.
    return {name: COLORS[slots[name]] for name in names}


def repeats(names: Collection[str]) -> frozenset[str]:
    """Return the runs whose color a run before them has in this session. A chart of one metric dots their curves."""
    firsts: dict[int, str] = {}
    for name, slot in st.session_state.get("_colors", {}).items():
        firsts.setdefault(slot, name)
    return frozenset(names) - set(firsts.values())


def color_values(values: Sequence[str]) -> dict[str, str]:
    """Return a color per value of a setting: rising colors for numbers, otherwise distinct ones."""
    numbers = [value for value in values if value != UNSET]
    if len(numbers) > 2 and all(map(is_number, numbers)):
        last = max(1, len(numbers) - 1)
        ramp = {
            value: RAMP[round(rank * (len(RAMP) - 1) / last)] for rank, value in enumerate(sorted(numbers, key=float))
        }
        return {value: ramp.get(value, COLORS[4]) for value in values}
    return {value: COLORS[number % len(COLORS)] for number, value in enumerate(values)}


def differing_settings(settings: Mapping[str, Mapping[str, Any]], most: int) -> dict[str, dict[str, str]]:
    """Return the settings in which runs differ: {setting: {run: value as text}}, those with the fewest values first.

    Settings with more than `most` values are left out, as are those that name only one run per value.
    """
    keys = dict.fromkeys(key for of_run in settings.values() for key in of_run)
    found = {}
    for key in keys:
        values = {run: text_of(of_run[key]) if key in of_run else UNSET for run, of_run in settings.items()}
        count = len(set(values.values()))
        if 1 < count <= most and (count < len(settings) or len(settings) < 4):
            found[key] = values
    return dict(sorted(found.items(), key=lambda item: len(set(item[1].values()))))


def ordered(values: Collection[str]) -> list[str]:
    """Return the distinct values of a setting in order: numbers by size, then texts."""
    return sorted(set(values), key=lambda text: (0, float(text), "") if is_number(text) else (1, 0.0, text))


def text_of(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_number(text: str) -> bool:
    try:
        return is_finite(float(text))
    except ValueError:
        return False
