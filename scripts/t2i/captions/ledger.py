"""The captions that were made, one JSON line each in `captions.jsonl`: appended as they come, edited by hand at will.

A caption belongs to (image, model, revision, task, prompt). Lines are only ever added, a batch by one write and one fsync,
so that a killed run loses nothing that was on disk; several processes on one machine (or a shared disk) write the same
file. Imports no torch.
"""

import json
import os
from collections.abc import Iterable
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from t2i.errors import UserError


class Key(NamedTuple):
    """What a caption belongs to."""

    image: str  # first 32 hex digits of the SHA-256 of the image file
    model: str
    revision: str
    task: str
    prompt: str


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows (the fields of `Key`, `caption` and what else is known) and wait until they are on disk.

    A torn last line, as a cut of power leaves it, goes to `captions.jsonl.torn` first: it was never reported as done.
    Raises `UserError` for any other last line that is not a caption's.
    """
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
    # writers take turns; the system frees the lock of one that is killed
    with FileLock(path.with_name(f".{path.name}.lock")), open(path, "a+b", buffering=0) as file:
        tail = _tail(file)
        if tail and _row(tail) is None:
            if not _is_torn(tail):
                raise _damaged(path, "the last line", tail)
            with open(path.with_name(f"{path.name}.torn"), "ab") as torn:
                torn.write(tail + b"\n")
            file.truncate(os.fstat(file.fileno()).st_size - len(tail))
        elif tail:  # a whole line whose end an editor left off
            data = b"\n" + data
        _write_all(file, data)
        os.fsync(file.fileno())


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """All captions by key; of a key that stands there twice, the later line. A torn last line is passed over.

    Raises `UserError` naming the line for anything else that is not a caption's line: a slip of the hand in an editor
    must not cost a caption.
    """
    rows: dict[Key, dict[str, Any]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return rows
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows[Key(*(row[field] for field in Key._fields))] = row
        elif line.strip() and not (number == len(lines) and _is_torn(line)):
            raise _damaged(path, f"line {number}", line)
    return rows


def _is_torn(line: bytes) -> bool:
    """Whether a last line is one of ours that was cut while it was written: it begins as ours do, and has no end."""
    start = b'{"image": "'
    return (line.startswith(start) or start.startswith(line)) and not line.rstrip().endswith(b"}")


def _damaged(path: Path, where: str, line: bytes) -> UserError:
    """What is wrong with a line that is not a caption's, and the fix."""
    needed = (*Key._fields, "caption")
    try:
        row = json.loads(line.decode("utf-8"))
        lacking = [field for field in needed if not isinstance(row.get(field), str)] if isinstance(row, dict) else None
        what = "it is no JSON object" if lacking is None else f"{', '.join(lacking)} must be there, as text in quotes"
    except UnicodeDecodeError:
        what = "it is not UTF-8"
    except ValueError as error:
        what = f"JSON: {error}"
    return UserError(
        f"{path}, {where} is not a caption's line ({what[:160]}); fix it, one JSON object per line, or delete it to have the image "
        "captioned anew"
    )


def _write_all(file: RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


def _row(line: bytes) -> dict[str, Any] | None:
    """The caption's row on a line; None where there is none."""
    try:
        row = json.loads(line)
        return row if all(isinstance(row[field], str) for field in (*Key._fields, "caption")) else None
    except (ValueError, KeyError, TypeError):
        return None


def _tail(file: RawIOBase) -> bytes:
    """What stands behind the last line's end."""
    start, tail = os.fstat(file.fileno()).st_size, b""
    while start and b"\n" not in tail:
        end, start = start, max(0, start - 65536)
        file.seek(start)
        tail = (file.read(end - start) or b"") + tail
    return tail.rpartition(b"\n")[2]
