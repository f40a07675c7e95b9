"""Finished records: a source's images with their captions, labels, file names and other columns.

`Source` is what `t2i.data.sources` finds. `open_candidates` checks its columns. `Candidates.records` yields one
`Record` per image, ready to be decoded and written.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from t2i.config import SourceConfig
from t2i.data.caption_files import TABLES, TEXTS, check_list
from t2i.data.images import image_digest
from t2i.data.workers import in_order
from t2i.errors import UserError

LeftOut = dict[str, dict[str, Any]]  # reason -> count, and the first names
OTHER_SPLITS = "splits that are not read"
ROWS_PER_BATCH = 1000  # rows in memory at a time while captions are read and written
CAPTION_FIX = (
    "add a caption column, a metadata.jsonl, .txt files beside the images, or one folder a class; --caption_column "
    "names another column"
)
_AS_METADATA = (
    "save it as metadata.csv with the columns file_name and caption, or as metadata.jsonl with one such object per line"
)


@dataclass
class Source:
    name: str
    identity: str  # hash of the content: another one, another cache
    open: Callable[[Path], dict[str, datasets.Dataset]]  # scratch folder -> candidates by split, images not decoded
    roots: tuple[Path, ...]  # images given by path must lie below one of these; relative ones start at the first
    disk_bytes: int = 0  # what `open` writes to its scratch folder
    quarantine: list[dict[str, str]] = field(default_factory=list)  # found while listing
    notes: dict[str, Any] = field(default_factory=dict)  # for the report


@dataclass(frozen=True)
class Record:
    """One image of a source, ready to be decoded and written."""

    index: int  # row in the source's split
    file: str  # file name to show; `train[3]` if the image has no path
    image: dict[str, Any] | None  # undecoded: `bytes` or `path`
    roots: tuple[Path, ...]  # see Source.roots
    captions: list[str]  # distinct, each one line with the prefix; an only, empty one: the image is unconditional
    label: str | None
    extras: dict[str, Any]  # the other plain columns

    @property
    def path(self) -> str | None:
        return self.image["path"] if self.image else None

    def digest(self) -> bytes:
        """Return the SHA-256 of the image file, or of its path if the file cannot be read."""
        return image_digest(self.image, self.roots)


@dataclass
class Candidates:
    """The images of one split of a source: rows that become records."""

    rows: datasets.Dataset  # images not decoded
    split: str
    roots: tuple[Path, ...]
    cfg: SourceConfig
    captions: list[str] = field(default_factory=list)  # caption columns
    label: str | None = None  # class column
    extras: list[str] = field(default_factory=list)  # the other plain columns
    # of a prepared row: id, file, caption, captions if an image may have several, label if there are classes, extras
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))

    def __len__(self) -> int:
        return len(self.rows)

    def set_columns(self, captions: list[str], label: str | None) -> None:
        """Choose the columns of the records, and with them the Arrow schema of a prepared row."""
        self.captions, self.label = captions, label
        texts = len(captions) if captions else len(self.cfg.caption_template) if label else 1
        several = texts > 1 or any(hasattr(self.rows.features[key], "feature") for key in captions)
        taken = {"id", "file", "caption", "label", "labels", self.cfg.image_column, label, *captions}
        taken |= {"captions"} if several else set()
        self.extras = [key for key, kind in self.rows.features.items() if key not in taken and is_plain(kind)]
        text = datasets.Value("string")
        features: dict[str, Any] = {"id": text, "file": text, "caption": text}
        features |= ({"captions": datasets.List(text)} if several else {}) | ({"label": text} if label else {})
        for key in self.extras:
            kind = self.rows.features[key]
            features[key] = text if isinstance(kind, datasets.ClassLabel) else kind
        self.schema = datasets.Features(features).arrow_schema

    def digests(self, pool: Executor) -> np.ndarray:
        """Return the SHA-256 of each image file: uint8 [N, 32]."""
        digests = np.empty((len(self), 32), np.uint8)
        hashed = in_order(pool, Record.digest, self.records())
        for index, digest in enumerate(tqdm(hashed, total=len(self), desc="hashes", unit="image", delay=3)):
            digests[index] = np.frombuffer(digest, np.uint8)
        return digests

    def records(self, indices: np.ndarray | None = None) -> Iterator[Record]:
        """Yield the records of `rows[indices]`, or of all rows, in that order.

        Texts are read in batches, images one by one: the bytes of a batch would fill the memory.
        """
        column, extras = self.cfg.image_column, self.extras
        chosen = np.arange(len(self.rows)) if indices is None else indices
        needed = list(dict.fromkeys(key for key in (*self.captions, self.label, *extras) if key))
        images, texts = self.rows.select_columns([column]), self.rows.select_columns(needed)
        for start in range(0, len(chosen), ROWS_PER_BATCH):
            batch_indices = chosen[start : start + ROWS_PER_BATCH]
            batch = texts.select(batch_indices)[:] if needed else {}
            batch = {key: [plain(self.rows.features[key], value) for value in values] for key, values in batch.items()}
            for position, row in enumerate(images.select(batch_indices)):
                image, index = row[column], int(batch_indices[position])
                file = shown_file(image and image["path"], self.split, index)
                label = label_name(batch[self.label][position], self.cfg.label_names) if self.label else None
                texts_of_image = (
                    clean_all(
                        {key: batch[key][position] for key in self.captions}, f"{self.split}, row {index} ({file})"
                    )
                    if self.captions
                    else label_captions(label, self.cfg.caption_template)
                )
                yield Record(
                    index=index,
                    file=file,
                    image=image,
                    roots=self.roots,
                    captions=prefixed_all(texts_of_image, self.cfg.caption_prefix),
                    label=label,
                    extras={key: batch[key][position] for key in extras},
                )


def open_candidates(rows: Mapping[str, datasets.Dataset], source: Source, cfg: SourceConfig) -> dict[str, Candidates]:
    """Check the image columns of an opened source; `find_captions` chooses the others."""
    checked = {split: check_image_column(part, cfg, source.name, split) for split, part in rows.items()}
    return {split: Candidates(part, split, source.roots, cfg) for split, part in checked.items()}


def find_captions(candidates: Mapping[str, Candidates], source: Source) -> str:
    """Choose the columns of each split, and return why there are no captions, or an empty string."""
    left_out, missing = source.notes.get("left_out"), ""
    columns: dict[str, tuple[list[str], str | None]]
    try:
        columns = {
            split: caption_columns(part.rows, part.cfg, source.name, split, left_out)
            for split, part in candidates.items()
        }
    except UserError as error:
        missing, columns = str(error), dict.fromkeys(candidates, ([], None))
    for split, part in candidates.items():
        part.set_columns(*columns[split])
    return missing


# Captions and labels


def check_image_column(rows: datasets.Dataset, cfg: SourceConfig, name: str, split: str) -> datasets.Dataset:
    _require_column(rows, cfg.image_column, "--image_column", name, split)
    try:
        return rows.cast_column(cfg.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise UserError(
            f"column {cfg.image_column!r} of {name} holds no images ({rows.features[cfg.image_column]}); "
            f"--image_column names another of: {', '.join(rows.column_names)}"
        ) from error


def _require_column(rows: datasets.Dataset, column: str, option: str, name: str, split: str) -> None:
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, 1, 0.4)
        hint = f"; did you mean {option} {near[0]}?" if near else f"; {option} names another"
        raise UserError(f"{name} ({split}) has no column {column!r}; it has {', '.join(rows.column_names)}{hint}")


def label_column(rows: datasets.Dataset) -> str | None:
    """The column of the class: `label`, `labels`, or the first of class labels; None where there is none."""
    named = (column for column in ("label", "labels") if column in rows.column_names)
    classes = (key for key, value in rows.features.items() if isinstance(value, datasets.ClassLabel))
    return next(named, None) or next(classes, None)


def caption_columns(
    rows: datasets.Dataset, cfg: SourceConfig, name: str, split: str, left_out: LeftOut | None = None
) -> tuple[list[str], str | None]:
    """Return the caption columns, and the label column or None. Only the training split must have one of them.

    Args:
        rows: the rows of the split.
        cfg: the settings that name columns.
        name: the data set in messages.
        split: the split in messages.
        left_out: what the listing left out, to name the table that may hold the captions.

    Raises:
        UserError: captions are no text, or labels that are to become captions have no names.
    """
    columns = rows.column_names
    label = label_column(rows)
    for column in cfg.caption_column if split == "train" else ():
        _require_column(rows, column, "--caption_column", name, split)
    captions = [column for column in dict.fromkeys(cfg.caption_column or ("caption", "text")) if column in columns]
    captions = captions if cfg.caption_column else captions[:1]
    if not captions and label is None and split == "train":
        passed = {reason: (left_out or {}).get(reason, {"count": 0}) for reason in (TABLES, TEXTS)}
        several = passed[TEXTS]["count"] > 1  # not a table, but notes or labels of each image
        meant = [
            entry["first"][0] for key, entry in passed.items() if entry["count"] and not (key == TEXTS and several)
        ]
        fix = f"if {meant[0]} holds the captions, {_AS_METADATA}" if meant else CAPTION_FIX
        raise UserError(f"{name} has neither captions nor labels (columns: {', '.join(columns)}); {fix}")
    for column in captions:
        if not _holds_text(rows.features[column]):
            raise UserError(
                f"{name}: column {column!r} holds no text ({_kind(rows.features[column])}), so no captions; write text, or a "
                "list of texts, or name another --caption_column"
            )
    if not captions and label is not None:
        check_label_names(class_names(rows, label, cfg, name), cfg, name)
    return captions, label


def _holds_text(kind: Any) -> bool:
    """Whether a column is text, a list of texts, a class label, or empty."""
    inner = getattr(kind, "feature", kind)
    return isinstance(kind, datasets.ClassLabel) or (
        isinstance(inner, datasets.Value) and ("string" in inner.dtype or inner.dtype == "null")
    )


def _kind(kind: Any) -> str:
    if isinstance(kind, dict):
        return f"objects with {', '.join(kind)}"
    inner = getattr(kind, "feature", None)
    return f"lists of {_kind(inner)}" if inner is not None else str(getattr(kind, "dtype", kind))


def class_names(rows: datasets.Dataset, label: str, cfg: SourceConfig, name: str) -> list[str]:
    """The distinct classes of a label column, as captions name them. Raises `UserError` for numbers without names."""
    kind = rows.features[label]
    if not isinstance(kind, (datasets.Value, datasets.ClassLabel)):
        raise UserError(f"{name} has no captions, and its {label!r} holds {_kind(kind)}; {CAPTION_FIX}")
    numeric = isinstance(kind, datasets.Value) and kind.dtype not in ("string", "large_string", "null")
    if numeric and not cfg.label_names:
        raise UserError(
            f"{name} has no captions, and its {label!r} is a number without a name; give --label_names, or {CAPTION_FIX}"
        )
    found = (label_name(plain(kind, value), cfg.label_names) for value in rows.unique(label))
    return [text for text in found if text]


def has_numbers(rows: datasets.Dataset, label: str, cfg: SourceConfig) -> bool:
    """Whether a label column has numbers that `label_names` names."""
    values = (plain(rows.features[label], value) for value in rows.unique(label))
    return any(label_name(value, cfg.label_names) != label_name(value, []) for value in values)


def check_label_names(labels: Iterable[str | None], cfg: SourceConfig, name: str) -> None:
    """Raise `UserError` where classes that are to become captions are numbers, which say nothing of an image."""
    known = {label for label in labels if label}
    numbers = sorted((label for label in known if re.fullmatch(r"\s*[-+]?\d+([.,]\d*)?\s*", label)), key=_by_number)
    shown = ", ".join(label.strip() for label in numbers[:3]) + (" …" if len(numbers) > 3 else "")
    if numbers and cfg.label_names:
        fix = (
            "add the others"
            if _by_number(numbers[0]) > 0
            else "numbers start at 1: put the names in place of the numbers"
        )
        raise UserError(
            f"{name}: --label_names has no name for the classes {shown}; its names stand for 1 to {len(cfg.label_names)}; "
            f"{fix}"
        )
    if numbers and len(numbers) == len(known):
        raise UserError(
            f"{name} has no captions, and its classes are numbers ({shown}); give their names by --label_names, or in "
            "place of the numbers"
        )


def _by_number(label: str) -> float:
    return float(label.strip().replace(",", "."))


def is_plain(kind: Any) -> bool:
    return isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and "binary" not in kind.dtype)


def plain(kind: Any, value: Any) -> Any:
    if isinstance(kind, datasets.ClassLabel) and value is not None:
        return kind.int2str(value) if value >= 0 else None  # -1 stands for "no label"
    return value


def clean(value: Any) -> str:
    """One line of text; of a list of captions the first that is not empty."""
    if isinstance(value, (list, tuple)):
        return next((text for text in map(clean, value) if text), "")
    return "" if value is None else " ".join(str(value).split())


def label_name(value: Any, names: list[str]) -> str | None:
    """A label as text; a number from 1 on by its name in `names`, where there are names."""
    if (
        names and isinstance(value, float) and value.is_integer()
    ):  # pandas writes whole numbers so, where some are missing
        value = int(value)
    text = None if value is None or value != value else str(value)  # NaN differs from itself
    if names and text is not None and text.isdecimal() and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    return text


def prefixed(caption: str, prefix: str) -> str:
    """A caption with `--caption_prefix` before it, once: not where it is there already, nor before an empty caption."""
    words = clean(prefix)
    return caption if not words or not caption or caption.startswith(words) else f"{words} {caption}"


def label_captions(label: str | None, templates: list[str]) -> list[str]:
    """Return the distinct captions that a label gets by `templates`; an empty one if there is no label."""
    words = clean(re.sub(r"[_-]", " ", label)) if label is not None else ""
    return list(dict.fromkeys(template.replace("{label}", words) for template in templates)) if words else [""]


def clean_all(values: Mapping[str, Any], where: str) -> list[str]:
    """Return the distinct captions of an image, each on one line; an empty one if the image has no caption.

    Args:
        values: a text, a list of texts or None for each caption column.
        where: the image, for a message.

    Raises:
        UserError: a list is empty or holds None.
    """
    texts: list[str] = []
    for column, value in values.items():
        if isinstance(value, list):
            check_list(value, f"{where}: column {column!r}")
        texts += map(clean, value if isinstance(value, list) else [value])
    return list(dict.fromkeys(filter(None, texts))) or [""]


def prefixed_all(captions: Iterable[str], prefix: str) -> list[str]:
    """Return the distinct captions of an image with `--caption_prefix` before each; see `prefixed`."""
    return list(dict.fromkeys(prefixed(caption, prefix) for caption in captions))


def shown_file(path: str | None, split: str, index: int) -> str:
    if not path:
        return f"{split}[{index}]"
    return Path(path).name if os.path.isabs(path) else path


def caption_origins(
    rows: dict[str, datasets.Dataset], captions: Mapping[str, tuple[list[str], str | None]], counted: bool,
    cfg: SourceConfig,
) -> list[str]:  # fmt: skip
    """Where the captions of each split come from, in words; a folder's files are `counted` instead."""
    found: dict[str, list[str]] = {}
    for split, (columns, label) in captions.items():
        if not (counted and columns in ([], ["caption"]) and label in (None, "label")):
            named = f"column{'s' if len(columns) > 1 else ''} {', '.join(map(repr, columns))}"
            origin = named if columns else f"class, column {label!r}" if label else "none"
            found.setdefault(origin, []).append(split)
    said = [origin if len(found) == 1 else f"{origin} ({', '.join(splits)})" for origin, splits in found.items()]
    if not cfg.caption_column and any(
        captions[split][0] == ["caption"] and "text" in rows[split].column_names for split in captions
    ):
        where = "is read where 'caption' is empty" if counted else "is not used, as there is 'caption'"
        said.append(f"column 'text' {where}")
    by_class = [(rows[split], label) for split, (columns, label) in captions.items() if label and not columns]
    if cfg.label_names and by_class and not any(has_numbers(part, str(label), cfg) for part, label in by_class):
        said.append("--label_names is not used, as no class is a number")
    return said
