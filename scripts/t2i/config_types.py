"""Define the types of settings, such as `Count` and `LocalPath`, and check values against the types. This module imports no torch."""

import difflib
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from t2i.errors import UserError
from t2i.redaction import redact

MAX_SEED = 2**63 - 1  # largest seed of a picture
MAX_GUIDANCE = 1000.0  # Pictures need a hundredth of it. Numbers overflow far beyond it.


def _expand_home(text: str) -> str:
    """Expand `~` in a path. Shells do not expand `~` in `--output_dir=~/run`, and no shell reads a recipe."""
    if not text.strip():
        raise ValueError("it is empty; give a path, or leave the option out")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no user {text.split('/')[0][1:]!r} here; write the full path")
    return path


def _expand_local(text: str) -> str:
    """Expand `~` in a local path, and refuse an address.

    Libraries would read an address such as `s3://…` as a bucket, or make a folder `s3:`.
    """
    if re.match(r"\w+://", text):
        raise ValueError("it is an address; give a folder on this machine")
    return _expand_home(text)


def _as_list(value: Any) -> Any:
    """Return one text as a list of one, and None as an empty list: recipes may write both. Refuse blank texts."""
    values = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(values, (list, tuple)) and any(isinstance(text, str) and not text.strip() for text in values):
        raise ValueError("it holds an empty text; write the text, or leave the option out")
    return values


def unlisted(values: list[str]) -> str | list[str] | None:
    """Return the only text of a list of one, None for an empty list, and a longer list unchanged.

    Options that once took one text enter hashes so, and hashes of one text stay what they were.
    """
    return values if len(values) > 1 else values[0] if values else None


def _refuse_flag(value: Any) -> Any:
    if isinstance(value, bool):  # Python takes True and False as 1 and 0
        raise ValueError("give a number")
    return value


def matching(pattern: str, example: str) -> AfterValidator:
    """Return a check that a text fully matches a regular expression.

    The error message of the check shows the example.
    """

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"give one such as {example}")
        return text

    return AfterValidator(check)


LocalPath = Annotated[str, AfterValidator(_expand_local)]  # a folder to write into
PathText = Annotated[str, AfterValidator(_expand_home)]  # a path, or a Hub id if the option takes one

AS_LIST = BeforeValidator(_as_list)  # of a list that a recipe may write as one text

Flag = Annotated[bool, Strict()]  # Strict: "yes", 1 and "false" in a recipe are errors.

NUMBER = BeforeValidator(_refuse_flag)
Count = Annotated[int, NUMBER, Field(ge=1, lt=2**31)]
Steps = Annotated[int, NUMBER, Field(ge=1, le=1000)]  # denoising steps; schedules have 1,000 timesteps
Natural = Annotated[int, NUMBER, Field(ge=0, lt=2**31)]
Positive = Annotated[float, NUMBER, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, NUMBER, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, NUMBER, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, NUMBER, Field(ge=0, lt=1, allow_inf_nan=False)]
Guidance = Annotated[float, NUMBER, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Seed = Annotated[int, NUMBER, Field(ge=0, le=MAX_SEED)]


def known_key(key: Any, known_keys: dict[str, Any], what: str) -> Any:
    """Return `key` if it is a valid key of a mapping.

    Args:
        key: the key to check, as the user wrote it.
        known_keys: mapping whose keys are the valid keys. The values of the mapping are not used.
        what: words for the key in a message, such as "key in x.yaml".

    Raises:
        UserError: the key is unknown; the message names the nearest valid key, or all valid keys.
    """
    if key not in known_keys:
        near = difflib.get_close_matches(str(key), known_keys, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(map(str, known_keys))}"
        raise UserError(f"unknown {what}: {key!r}; {meant}")
    return key


def checked(cls: Any, values: dict[str, Any], where: str) -> Any:
    """Return a dataclass made of `values`, which are checked against the types of the fields.

    Args:
        cls: class of the result, a dataclass.
        values: values of the fields by name.
        where: words for the place of the values in a message, such as a file name.

    Raises:
        UserError: a value cannot be used; the message names the first such value.
    """
    for key, value in values.items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and not _is_utf8(text):
                raise UserError(f"{where}: {key} = {text!r} is not usable: it is not valid UTF-8; write it in UTF-8")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        if first["type"] == "missing":
            raise UserError(f"{where}: {key} is missing; add it") from None
        reason = _reason(first["type"], first["input"], first.get("ctx", {})) or first["msg"]
        raise UserError(redact(f"{where}: {key} = {first['input']!r} is not usable: {reason}")) from None


# Beginnings of pydantic's types of errors, and what to do about each.
_REASONS = {
    "value_error": "{error}",
    "string_type": "it is not text; put it in quotes",
    "int_": "give a whole number, without a unit",
    "float_": "give a number, without a unit",
    "bool_": "write true or false, without quotes",
    "list_": "give a list, such as [a, b]",
    "dict_": "give keys and values, such as {{name: value}}",
    "dataclass_": "give keys and values, such as {{name: value}}",
    "literal_error": "give {expected}",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be greater than {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be less than {lt}",
    "too_short": "give at least one",
    "finite_number": "it must be a finite number",
}


def _reason(kind: str, value: Any, context: dict[str, Any]) -> str:
    """Return the fix for a value that pydantic refused, in terms of YAML, or "" if the kind of error is not in the table."""
    wants_text = kind in ("string_type", "literal_error")
    if value is None and wants_text:
        return "it is empty; give a value, or delete the key"
    if isinstance(value, bool) and wants_text:
        word = "no" if not value else "yes"
        expected = str(context.get("expected", ""))
        word = next((quoted for quoted in (word, word.upper()) if f"'{quoted}'" in expected), word)
        if not expected or f"'{word}'" in expected:
            return f"YAML reads {word} as {str(value).lower()}; write '{word}' in quotes"
    reason = next((text for start, text in _REASONS.items() if kind.startswith(start)), "")
    return reason.format(**context)


def _is_utf8(text: str) -> bool:
    """Return whether a string can be written as UTF-8.

    Bytes of another encoding appear as lone surrogates in a Python string.
    """
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:
        return False
