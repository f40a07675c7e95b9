"""The file `captions.jsonl`: one caption per JSON line. Users may edit it by hand. This module imports no torch.

A caption belongs to (image, model, revision, task, prompt), so an image has a caption per model and task. Lines are only
appended: each batch is one write and one fsync, so a killed run loses nothing that was on disk. Several processes on one
machine or a shared disk write the same file.
"""

import json
import os
import re
from collections.abc import Iterable
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

from filelock import BaseFileLock, FileLock

from t2i.errors import UserError

# Subfolder of the output folder for files of caption_to_hub.py. Its presence shows that this script made the folder.
WORK = ".captioning"


class Key(NamedTuple):
    """The key of a caption: image, model, revision, task and prompt."""

    image: str  # First 32 hex digits of the SHA-256 of the image file.
    model: str
    revision: str
    task: str
    prompt: str


def is_inspection(name: str) -> bool:
    """Return whether a file of an output folder, given by its relative path, holds the result of inspecting the photos.

    This file must be in every copy of the output folder. Captioning resumes only in a folder that has `WORK`.
    """
    return bool(re.fullmatch(rf"{re.escape(WORK)}/photos-\w+\.jsonl", name))


def lock(path: Path) -> BaseFileLock:
    """Return the lock of a captions.jsonl, by which writers take turns. Its holder can append, too.

    The system frees the lock of a killed writer.
    """
    return FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append captions to the file and wait until they are on disk.

    If a power cut left an incomplete last line, this line moves to `captions.jsonl.torn`. No caption is lost, because the
    caption of such a line was never reported as done.

    Args:
        path: Path of captions.jsonl. A missing file is created.
        rows: The lines to append, each with the fields of `Key`, `caption`, and any other fields.

    Raises:
        UserError: The last line of the file is complete, but not a caption.
    """
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
    with lock(path), open(path, "a+b", buffering=0) as file:
        tail = _tail(file)
        if tail and _row(tail) is None:
            if not _is_torn(tail):
                raise _damaged(path, "the last line", tail)
            with open(path.with_name(f"{path.name}.torn"), "ab") as torn:
                torn.write(tail + b"\n")
            file.truncate(os.fstat(file.fileno()).st_size - len(tail))
        elif tail:  # a complete line without a newline, as some editors save it
            data = b"\n" + data
        _write_all(file, data)
        os.fsync(file.fileno())


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Return all captions of the file by key. If a key occurs twice, the later line is used.

    An incomplete last line is skipped.

    Raises:
        UserError: Any other line is not a caption. The message names the line, so an editing mistake costs no caption.
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


def is_ledger(path: Path) -> bool:
    """Return whether the first line of a file is a caption as this module writes it."""
    try:
        with open(path, "rb") as file:
            return _row(file.readline()) is not None
    except OSError:
        return False


def _is_torn(line: bytes) -> bool:
    """Return whether the last line is incomplete: it begins like a line of this module and has no end."""
    start = b'{"image": "'
    return (line.startswith(start) or start.startswith(line)) and not line.rstrip().endswith(b"}")


def _damaged(path: Path, where: str, line: bytes) -> UserError:
    """Return the error for a line that is not a caption, with the fix."""
    needed = (*Key._fields, "caption")
    try:
        row = json.loads(line.decode("utf-8"))
        lacking = [field for field in needed if not isinstance(row.get(field), str)] if isinstance(row, dict) else None
        what = (
            "it is not a JSON object" if lacking is None else f"{', '.join(lacking)} must be there, as text in quotes"
        )
    except UnicodeDecodeError:
        what = "it is not UTF-8"
    except ValueError as error:
        what = f"JSON: {error}"
    return UserError(
        f"{path}: {where} is not a caption ({what[:160]}); fix it (one JSON object per line), or delete it and the image is "
        "captioned again"
    )


def _write_all(file: RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the caption on a line of the file, or None if the line holds no caption."""
    try:
        row = json.loads(line)
        return row if all(isinstance(row[field], str) for field in (*Key._fields, "caption")) else None
    except (ValueError, KeyError, TypeError):
        return None


def _tail(file: RawIOBase) -> bytes:
    """Return the bytes of the file after the last newline."""
    start, tail = os.fstat(file.fileno()).st_size, b""
    while start and b"\n" not in tail:
        end, start = start, max(0, start - 65536)
        file.seek(start)
        tail = (file.read(end - start) or b"") + tail
    return tail.rpartition(b"\n")[2]
