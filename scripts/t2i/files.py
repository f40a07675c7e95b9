"""Hash files, and write and read JSON files: atomically, and with a clear error if a file is damaged. This module imports no torch."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from t2i.errors import UserError


def hash_json(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace the text of `path` atomically: a reader sees the old text or the new one, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file and return its content.

    Raise `UserError` with the file's name if the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a folder that holds it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); delete it or restore it from a backup") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raise `UserError` with the file's name if the file is missing, damaged, or holds no JSON object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds no JSON object, so another program wrote it; move the file away, or restore it from a backup"
        )
    return content


def read_optional(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, or {} if the file is missing or holds no object. A damaged file is refused."""
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def json_lines(file: Path, containing: str = "") -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the lines of a file. Other lines are skipped, and a missing file has none.

    Args:
        containing: text that the wanted lines contain. Other lines are not parsed.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the file does not exist yet, or was deleted after listing
        return
    for line in text.split("\n"):
        if containing not in line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a process died while it wrote this line
        if isinstance(row, dict):
            yield row


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append `row` to a file as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted, also those behind links to folders.

    A folder with several paths is entered once, by a path without links if there is one. So circles of links end.
    """
    root = Path(os.path.realpath(folder))
    seen: set[str] = set()
    found: list[Path] = []
    folders, links = [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(current)
        if real in seen or (seen and root.is_relative_to(real)):  # a link may lead to a folder above
            continue
        seen.add(real)
        for path in sorted(current.iterdir()):
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                found.append(path)
    return sorted(found)


def share_weights(folder: Path) -> None:
    """Let everybody who may read a new folder, or folders below it, read the weights in them.

    safetensors writes for the owner alone.
    """
    for file in folder.rglob("*.safetensors"):
        with suppress(OSError):  # Some network disks have no permissions.
            file.chmod(file.parent.stat().st_mode & 0o666)


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model: name -> 64 hex digits.

    A model's file is read again only if its size or time has changed.

    Raises:
        UserError: the folder cannot be read, or holds no weights.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", ".json", ".txt"})
        hashes = {path.name: _sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); copy the complete model") from None
    if not hashes:
        raise UserError(f"{folder} holds no weights; copy the complete model")
    return hashes


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)
