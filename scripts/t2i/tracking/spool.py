"""Write and read the spool: a run's records for MLflow on disk. The tracker writes the spool, and the sender reads it.

Records of the spool are lines of `<run_dir>/mlflow_spool.jsonl`. Pictures and files of the spool are in
`<run_dir>/mlflow_spool/`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t2i.redaction import redact

SPOOL_FILE = "mlflow_spool.jsonl"
SPOOL_FOLDER = "mlflow_spool"

# Limits of an MLflow server.
KEY_CHARACTERS = 250
PARAM_CHARACTERS = 6000

TEXT_SUFFIXES = {".yaml", ".yml", ".json", ".jsonl", ".txt", ".md", ".csv", ".log", ".toml", ".ini", ".cfg"}


def read_spool(spool: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the records of a spool from a byte offset on, each record with the byte offset after it.

    An incomplete last line of a spool is read later, when it is complete. An incomplete line before the last one is
    skipped.
    """
    with open(spool, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
                record["kind"]
            except (ValueError, KeyError, TypeError):
                continue  # an earlier process died while it wrote this line
            yield record, offset


def ends_torn(path: Path) -> bool:
    """Return whether the last line of a file is incomplete."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return size > 0 and file.read(1) != b"\n"


def copy_redacted(source: Path, target: Path) -> None:
    """Copy a file for the spool. Secrets are removed from the copy of a text file."""
    if source.suffix.lower() in TEXT_SUFFIXES:
        try:
            target.write_text(redact(source.read_text(encoding="utf-8")), encoding="utf-8")
            return
        except UnicodeDecodeError:
            pass
    shutil.copyfile(source, target)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested config as MLflow's parameters: `section.key` -> text."""
    rows: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows |= flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            rows[valid_key(name)] = cut(text, PARAM_CHARACTERS)
    return rows


def valid_key(key: str) -> str:
    """Return a key that MLflow takes: letters, digits, spaces and `_-.:/`, no empty path parts, at most 250 characters."""
    parts = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", key).split("/")
    return "/".join(part for part in parts if part.strip(".") != "")[:KEY_CHARACTERS] or "_"


def cut(text: str, limit: int) -> str:
    """Cut a text to at most `limit` characters, with a mark at its end."""
    mark = f" … [cut at {limit} characters]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark
