"""Parse command lines into dataclasses, or split them into options. This module imports no torch."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro

from t2i.config_types import checked
from t2i.errors import UserError

T = TypeVar("T")


def parse_options(cls: type[T], doc: str, argv: list[str] | None = None) -> T:
    """Parse the command line into the dataclass `cls`. Nested dataclasses become groups of options without a prefix.

    A repeated list option collects all values. For any other repeated option, the last value is used, and a note is
    printed. An unknown option ends the script with exit code 2 and the name of the nearest option. `check_options`
    checks the ranges of the parsed options.

    Args:
        cls: dataclass of the options. The comment of each field is the help text of its option.
        doc: description of the script, which `--help` prints above the help texts.
        argv: words of the command line. With None, use the command line of this process.

    Raises:
        UserError: the command line has bytes that are not UTF-8.
    """
    argv = collect_lists(cls, sys.argv[1:] if argv is None else argv)
    return tyro.cli(cls, args=argv, description=doc, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))


def check_options(options: T) -> T:
    """Check the ranges of parsed options. A value out of range raises `UserError` with the name of the option."""
    return checked(type(options), dataclasses.asdict(options), "the command line")  # type: ignore[call-overload]


def collect_lists(cls: type, argv: list[str]) -> list[str]:
    """Merge repeated list options of a command line into one, because tyro keeps only the last of them."""
    options = _options(cls)
    collected: list[str] = []
    ends: dict[str, int] = {}  # list option -> where in `collected` its values end
    first_typed: dict[str, str] = {}  # option -> its first value, as typed
    for word, values, words in typed_options(argv):
        if any("\ud800" <= letter <= "\udfff" for text in (word, *values) for letter in text):
            raise UserError(f"{word[:40]!r} holds bytes that are not UTF-8; type the text again, in a UTF-8 terminal")
        name, is_list = options.get(plain_option(word), ("", False))
        if name in ends:
            end = ends[name]
            collected[end:end] = values
            ends = {other: at + len(values) * (at >= end) for other, at in ends.items()}
            continue
        typed = " ".join((word, *values))
        if first_typed.get(name, typed) != typed:  # the later one wins, as after a shell's alias
            note(f"--{name} is given twice ({first_typed[name]}, then {typed}); the last one holds")
        if is_list:
            collected += [word, *values]
            ends[name] = len(collected)
            continue
        if name:
            first_typed[name] = typed
        collected += words
    return collected


def typed_options(argv: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the options of a command line, each option with its typed name (`--name`), its values, and its typed words.

    An option `--name=value` is split into name and value.
    """
    position = 0
    while position < len(argv):
        start = position
        word = argv[position]
        word, *values = word.split("=", 1) if word.startswith("--") else [word]
        position += 1
        while position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        yield word, values, argv[start:position]


def plain_option(word: str) -> str:
    """Return the name of a typed option: `--train-data-dir` is `train_data_dir`."""
    return word.removeprefix("--").replace("-", "_")


def option(argv: list[str], name: str) -> str | None:
    """Return the last value of an option in a command line that is not parsed yet, or None if the option is missing."""
    value = None
    for index, word in enumerate(argv):
        if word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
        elif word == f"--{name}" and index + 1 < len(argv):
            value = argv[index + 1]
    return value


def typed_fields(cls: Any, argv: list[str]) -> set[str]:
    """Return the fields of a dataclass whose options stand in a command line, by their own names or by other ones."""
    options = _options(cls)
    return {options[name][0] for word, _, _ in typed_options(argv) if (name := plain_option(word)) in options}


def note(text: str) -> None:
    """Print a note about the typed command line, once for all processes of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(f"NOTE: {text}", file=sys.stderr)


def _options(cls: Any) -> dict[str, tuple[str, bool]]:
    """Return the options of a dataclass and of its nested dataclasses: name -> (field, whether the field is a list)."""
    options: dict[str, tuple[str, bool]] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        kind, notes = (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
        if dataclasses.is_dataclass(kind):
            options |= _options(kind)
            continue
        aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
        names = [name, *(alias.removeprefix("--") for alias in aliases), *([f"no_{name}"] if kind is bool else [])]
        options |= dict.fromkeys(names, (name, get_origin(kind) is list))
    return options
