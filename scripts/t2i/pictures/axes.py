"""Read and write the values of a grid's axis as users type them, in AUTOMATIC1111's X/Y/Z notation. This module imports no torch.

`1-10` counts by one, `1-10(+2)` and `10-1(-3)` count by a step, and `1-10[5]` gives five values evenly spaced from end to end.
Commas join several numbers and ranges. Unlike AUTOMATIC1111, a range whose step meets the end includes the end:
`10-1(-3)` is 10, 7, 4, 1. A repeated value of an axis is kept once. The whole typed text is checked before any range is
expanded.
"""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from t2i.errors import UserError

NUMBERS: dict[str, tuple[type, Decimal, Decimal]] = {  # axis -> type, lowest and highest value
    "guidance_scale": (float, Decimal(0), Decimal(100)),
    "num_inference_steps": (int, Decimal(1), Decimal(1000)),
    "guidance_end": (float, Decimal(0), Decimal(1)),
    "guidance_rescale": (float, Decimal(0), Decimal(1)),
    "seed": (int, Decimal(0), Decimal(2**63 - 1)),
}
WORDS = ("checkpoint", "run", "scheduler")
TEXTS = ("prompt", "negative_prompt")
MAX_VALUES = 100  # values of an axis
MAX_CHARACTERS = 2000  # characters of a prompt; the text encoder reads far fewer

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?"
_PART = re.compile(
    rf"(?P<start>{_NUMBER})(?:\s*-\s*(?P<end>{_NUMBER})\s*(?:\(\s*(?P<step>{_NUMBER})\s*\)|\[\s*(?P<count>[0-9]+)\s*\])?)?"
)


def parse(axis: str, text: str, known_names: Sequence[str] = (), limit: int = MAX_VALUES) -> list[Any]:
    """Return the 1 to `limit` values that a user typed for an axis, in order and without repeats.

    Args:
        axis: name of the axis, which is in `NUMBERS` (int or float within bounds), `WORDS` (names separated by commas) or
            `TEXTS` (one prompt per line). Names that contain a comma are quoted as in CSV.
        known_names: the valid names for an axis in `WORDS`.

    Raises:
        UserError: a value is invalid. The error's message names the axis of the grid, the value and the fix.
    """
    if axis in NUMBERS:
        return _parse_numbers(axis, text, limit)
    if axis in WORDS:
        return _parse_words(axis, text, known_names, limit)
    if axis in TEXTS:
        return _parse_texts(axis, text, limit)
    raise UserError(f"axis {_short(axis)} is unknown; take one of {', '.join((*NUMBERS, *WORDS, *TEXTS))}")


def format_values(axis: str, values: Sequence[Any]) -> str:
    """Return the shortest text from which `parse` reads `values`, which must be distinct."""
    if axis in NUMBERS:
        return _format_numbers(axis, values)
    if axis in WORDS:
        line = io.StringIO()
        csv.writer(line).writerow(values)  # the line end also decides which letters need quotes
        return line.getvalue().removesuffix("\r\n")
    return "\n".join(values)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def _parse_numbers(axis: str, text: str, limit: int) -> list[Any]:
    parts = [part.strip() for part in _bounded(axis, text, limit, 100).split(",")]
    values: dict[Any, None] = {}
    for part in parts:
        if part or len(parts) == 1:
            values.update(dict.fromkeys(_expand(axis, part, limit)))
        _check_count(axis, len(values), limit)
    if not values:
        raise UserError(f"{axis} has no value; give some, such as {_example(axis)}")
    return list(values)


def _expand(axis: str, part: str, limit: int) -> list[Any]:
    """Return the values of one part of the typed text, between commas."""
    if not part:
        raise UserError(f"{axis} has no value; give some, such as {_example(axis)}")
    match = _PART.fullmatch(part)
    if not match:
        raise UserError(f"{axis} {_short(part)} is neither a number nor a range; write it as in {_example(axis)}")
    kind = NUMBERS[axis][0]
    start = _number(axis, match["start"])
    if match["end"] is None:
        return [kind(start)]
    end = _number(axis, match["end"])
    if match["count"] is not None:
        count = int(match["count"]) if len(match["count"]) < 10 else limit + 1
        _check_count(axis, count, limit)
        if not count:
            raise UserError(f"{axis} {_short(part)} asks for no value; write [1] or more")
        if kind is int:  # rounded down, as AUTOMATIC1111 does
            first, span = int(start), int(end) - int(start)
            return [first + span * number // max(1, count - 1) for number in range(count)]
        return [float(start + (end - start) * number / max(1, count - 1)) for number in range(count)]
    step = _number(axis, match["step"], bounded=False) if match["step"] is not None else Decimal(1)
    if not step:
        raise UserError(f"{axis} {_short(part)} has a step of 0; write a step such as (+1)")
    if (end - start) * step < 0:
        raise UserError(
            f"{axis} {_short(part)} never reaches its end by steps of {step:+f}; write "
            f"{start:f}-{end:f}({-step:+f}), or swap the ends"
        )
    if abs(end - start) >= abs(step) * limit:
        raise UserError(f"{axis} {_short(part)} has more than {limit} values; take a larger step or [{limit}] of them")
    return [kind(start + step * number) for number in range(int((end - start) / step) + 1)]


def _number(axis: str, text: str, bounded: bool = True) -> Decimal:
    """Read a number within an axis's bounds.

    If `bounded` is False, read a step, which may be as large as the distance of the bounds.
    """
    kind, low, high = NUMBERS[axis]
    value = Decimal(text)
    if not bounded:
        low, high = low - high, high - low
    if value < low or value > high:
        side, bound = ("less", low) if value < low else ("more", high)
        raise UserError(f"{axis} {_short(text)} is {side} than {bound}; give values from {low} to {high}")
    if kind is int and value != int(value):
        raise UserError(f"{axis} {_short(text)} is not a whole number; give one such as {int(value)}")
    if value and abs(value) < Decimal("1e-6"):  # smaller ones change no picture, and have many digits
        raise UserError(f"{axis} {_short(text)} is too near 0; give 0, or 0.000001 or more")
    return value or Decimal(0)  # -0 becomes 0: it is another text for the same picture


def _format_numbers(axis: str, values: Sequence[Any]) -> str:
    texts = [_number_text(value) for value in values]
    if len(texts) > 2 * MAX_VALUES:  # the search below takes time by the square of their number
        return ",".join(texts)
    best = [""]  # the shortest text of the first 0, 1, … values
    for end in range(1, len(texts) + 1):
        options = [_join(best[end - 1], texts[end - 1])]
        for start in range(end - 2):
            options += [_join(best[start], part) for part in _ranges(axis, values[start:end], texts[start:end])]
        best.append(min(options, key=len))
    return best[-1]


def _ranges(axis: str, values: Sequence[Any], texts: Sequence[str]) -> Iterable[str]:
    """Yield ranges such as 1-10 that replace three or more values of an axis."""
    first, second, last = (Decimal(texts[number]) for number in (0, 1, -1))
    step, ends = second - first, f"{texts[0]}-{texts[-1]}"
    candidates = []
    if first + step * (len(values) - 1) == last:
        candidates.append(ends if step == 1 else f"{ends}({'+' if step > 0 else ''}{_number_text(step)})")
    if abs((last - first) / (len(values) - 1) - step) <= 1:  # a cheap filter; `_expand` checks below
        candidates.append(f"{ends}[{len(values)}]")
    for part in candidates:
        try:
            if _expand(axis, part, len(values)) == list(values):
                yield part
        except UserError:
            pass


def _number_text(value: Any) -> str:
    text = f"{value.normalize():f}" if isinstance(value, Decimal) else repr(value)
    return text.removesuffix(".0")


def _join(before: str, part: str) -> str:
    return f"{before},{part}" if before else part


def _example(axis: str) -> str:
    return "1,2.5 or 1.5-7.5(+1.5) or 1-10[5]" if NUMBERS[axis][0] is float else "1,5 or 1-10(+3) or 1-10[5]"


# --- Words and prompts -----------------------------------------------------------------------------------------------


def _parse_words(axis: str, text: str, known_names: Sequence[str], limit: int) -> list[str]:
    if len(text) > 300 * limit:
        raise UserError(f"{axis} has {len(text):,} characters; give at most {limit} names")
    try:  # names may hold line breaks, which a bare CSV line may not
        rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except csv.Error:
        raise UserError(f"{axis} {_short(text)} has an odd quotation mark; close it, or write it twice") from None
    words = [word for row in rows for word in row if word.strip()]
    if not words:
        raise UserError(f"{axis} has no value; give one or more of: {_first_names(known_names)}")
    values = {_find_name(axis, word, known_names): None for word in words[: limit + 1]}
    _check_count(axis, max(len(values), len(words) if len(words) > limit else 0), limit)
    return list(values)


def _find_name(axis: str, word: str, known_names: Sequence[str]) -> str:
    """Return the known name that equals `word`, or the only known name that equals it without regard to spaces and case."""
    if word in known_names:
        return word
    alike = [name for name in known_names if name.strip().casefold() == word.strip().casefold()]
    if len(alike) == 1:
        return alike[0]
    near = difflib.get_close_matches(word.strip()[:100], [name[:100] for name in known_names], 1, 0.4)
    hint = f"did you mean {_short(near[0])}?" if near else f"there are: {_first_names(known_names)}"
    raise UserError(f"{axis} {_short(word.strip())} is unknown; {hint}")


def _parse_texts(axis: str, text: str, limit: int) -> list[str]:
    lines = re.split(r"\r\n|\r|\n", _bounded(axis, text, limit, MAX_CHARACTERS + 2))
    values = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    _check_count(axis, len(values), limit)
    for value in values:
        if len(value) > MAX_CHARACTERS:
            raise UserError(f"{axis} {_short(value)} has {len(value):,} characters; shorten it to {MAX_CHARACTERS:,}")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"{axis} {_short(value)} holds half a character (a lone surrogate); type it anew")
    if not values:
        raise UserError(f"{axis} has no value; give one or more, one per line")
    return values


def _bounded(axis: str, text: str, limit: int, each: int) -> str:
    if len(text) > limit * each:
        raise UserError(f"{axis} has {len(text):,} characters, more than {limit} values can have; give fewer")
    return text


def _check_count(axis: str, count: int, limit: int) -> None:
    if count > limit:
        raise UserError(f"{axis} has {count:,} values; give at most {limit}, by a larger step or fewer parts")


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "none"


def _short(text: str) -> str:
    """Return a value for use in a message: on one line, short, and without unprintable letters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= 40 else shown[:37] + "..."
