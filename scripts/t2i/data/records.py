"""Turn the rows of a source into records: images with captions, labels, file names and other columns.

`t2i.data.sources` returns a `Source`. `open_candidates` checks the columns of the source. `Candidates.records` yields one
`Record` per image, ready to be decoded and written.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from t2i.captions.texts import clean, label_captions, prefixed_all
from t2i.config import SourceConfig
from t2i.data.caption_files import TABLES, TEXTS, check_list
from t2i.data.images import image_digest
from t2i.data.workers import in_order
from t2i.errors import UserError

LeftOut = dict[str, dict[str, Any]]  # Reason -> number of files left out for it, and the first file names.
LABELS = ("label", "labels")  # Names of the class column, the preferred one first.
OTHER_SPLITS = "splits that are not read"
ROWS_PER_BATCH = 1000  # Rows in memory at a time while captions are read and written.
CAPTION_FIX = (
    "add a caption column, a metadata.jsonl, .txt files beside the images, or one folder per class; or name another "
    "column by --caption_column"
)
_BY_NAMES = "replace the numbers by names"
_NUMBER = re.compile(r"\s*[-+]?\d+([.,]\d*)?\s*")
_AS_METADATA = (
    "save it as metadata.csv with the columns file_name and caption, or as metadata.jsonl with one such object per line"
)


@dataclass
class Source:
    """A data set that was found, but not yet read."""

    name: str  # Path or Hub id of the data set.
    identity: str  # Hash of the content. Other content gets another cache.
    open: Callable[[Path], dict[str, datasets.Dataset]]  # Scratch folder -> rows by split, with undecoded images.
    # Images given by path must lie below one of these folders. Relative paths start at the first folder.
    roots: tuple[Path, ...]
    disk_bytes: int = 0  # Bytes that `open` writes to its scratch folder.
    # Estimate of the rows by split, which copies nothing. With None, only `open` tells the rows.
    count: Callable[[], dict[str, int]] | None = None
    quarantine: list[dict[str, str]] = field(default_factory=list)  # Bad images that were found while listing.
    notes: dict[str, Any] = field(default_factory=dict)  # Facts for the report.


@dataclass(frozen=True)
class Record:
    """One image of a source, ready to be decoded and written."""

    index: int  # Row in the source's split.
    file: str  # File name to show, or a name such as `train[3]` if the image has no path.
    image: dict[str, Any] | None  # The undecoded image: its `bytes` or its `path`.
    roots: tuple[Path, ...]  # The same folders as in `Source.roots`.
    # Distinct captions, each on one line with the prefix. A single, empty caption makes the image unconditional.
    captions: list[str]
    label: str | None
    extras: dict[str, Any]  # Values of the other plain columns.

    @property
    def path(self) -> str | None:
        return self.image["path"] if self.image else None

    def digest(self) -> bytes:
        """Return the SHA-256 of the image file, or of its path if the file cannot be read."""
        return image_digest(self.image, self.roots)


@dataclass
class Candidates:
    """The images of one split of a source: rows that become records."""

    rows: datasets.Dataset  # Rows with undecoded images.
    split: str
    roots: tuple[Path, ...]
    cfg: SourceConfig
    captions: list[str] = field(default_factory=list)  # Names of the caption columns.
    label: str | None = None  # Name of the class column.
    extras: list[str] = field(default_factory=list)  # Names of the other plain columns.
    # Schema of a prepared row: id, file, caption, captions if images may have several, label if there are classes, and
    # the extras.
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))

    def __len__(self) -> int:
        return len(self.rows)

    def set_columns(self, captions: list[str], label: str | None) -> None:
        """Set the caption columns and the class column of the records, and build the Arrow schema of a prepared row."""
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

    def check_lists(self, captions: list[str]) -> None:
        """Raise `UserError` for a list of captions that is empty or holds None. `captions` names the caption columns."""
        listed = [key for key in captions if hasattr(self.rows.features[key], "feature")]
        texts = self.rows.select_columns(listed)
        for start in range(0, len(texts) if listed else 0, ROWS_PER_BATCH):
            batch = texts[start : start + ROWS_PER_BATCH]
            for index, values in enumerate(zip(*batch.values(), strict=True), start):
                try:
                    clean_all(dict(zip(batch, values, strict=True)), "")
                except UserError:  # Only such a row needs its file name, which is read with the image.
                    image = self.rows[index][self.cfg.image_column]
                    file = shown_file(image and image["path"], self.split, index)
                    clean_all(dict(zip(batch, values, strict=True)), f"{self.split}, row {index} ({file})")

    def digests(self, pool: Executor) -> np.ndarray:
        """Return the SHA-256 of each image file: uint8 [N, 32]."""
        digests = np.empty((len(self), 32), np.uint8)
        hashed = in_order(pool, Record.digest, self.records())
        for index, digest in enumerate(tqdm(hashed, total=len(self), desc="hashes", unit="image", delay=3)):
            digests[index] = np.frombuffer(digest, np.uint8)
        return digests

    def records(self, indices: np.ndarray | None = None) -> Iterator[Record]:
        """Yield the records of `rows[indices]`, or of all rows, in that order.

        Texts are read in batches. Images are read one by one, because a batch of them would fill the memory.
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
    """Check the image columns of an opened source. `find_captions` chooses the other columns later."""
    checked = {split: check_image_column(part, cfg, source.name, split) for split, part in rows.items()}
    return {split: Candidates(part, split, source.roots, cfg) for split, part in checked.items()}


def find_captions(candidates: Mapping[str, Candidates], source: Source) -> str:
    """Choose the caption and label columns of each split, and check lists of captions.

    Returns:
        The reason why the captions are missing or cannot be used, otherwise "". With a reason, no column is chosen.
    """
    left_out, missing = source.notes.get("left_out"), ""
    columns: dict[str, tuple[list[str], str | None]]
    try:
        columns = {
            split: caption_columns(part.rows, part.cfg, source.name, split, left_out)
            for split, part in candidates.items()
        }
        for split, part in candidates.items():
            part.check_lists(columns[split][0])
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
            f"give --image_column one of: {', '.join(rows.column_names)}"
        ) from error


def _require_column(rows: datasets.Dataset, column: str, option: str, name: str, split: str) -> None:
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, 1, 0.4)
        hint = f"; did you mean {option} {near[0]}?" if near else f"; name another column by {option}"
        raise UserError(f"{name} ({split}) has no column {column!r}; it has {', '.join(rows.column_names)}{hint}")


def caption_keys(cfg: SourceConfig) -> Sequence[str]:
    """Return the names of the columns that may hold captions."""
    return cfg.caption_column or ("caption", "text")


def label_column(rows: datasets.Dataset) -> str | None:
    """Return the name of the class column: `label`, `labels`, or the first `ClassLabel` column. None without such a column."""
    named = (column for column in LABELS if column in rows.column_names)
    classes = (key for key, value in rows.features.items() if isinstance(value, datasets.ClassLabel))
    return next(named, None) or next(classes, None)


def caption_columns(
    rows: datasets.Dataset, cfg: SourceConfig, name: str, split: str, left_out: LeftOut | None = None
) -> tuple[list[str], str | None]:
    """Return (caption columns, label column) of a split. A missing label column is None.

    Only the training split must have at least one caption column or the label column.

    Args:
        rows: rows of the split.
        cfg: settings that may name caption columns.
        name: name of the data set, for messages.
        split: name of the split.
        left_out: files that were left out of the listing. A message names the table among them that may hold captions.

    Raises:
        UserError: the captions are not text, the training split has neither captions nor labels, or labels that must
            serve as captions are numbers without names.
    """
    columns = rows.column_names
    label = label_column(rows)
    for column in cfg.caption_column if split == "train" else ():
        _require_column(rows, column, "--caption_column", name, split)
    captions = [column for column in dict.fromkeys(caption_keys(cfg)) if column in columns]
    captions = captions if cfg.caption_column else captions[:1]
    if not captions and label is None and split == "train":
        passed = {reason: (left_out or {}).get(reason, {"count": 0}) for reason in (TABLES, TEXTS)}
        several = passed[TEXTS]["count"] > 1  # Several text files are not a table, but notes or labels per image.
        meant = [
            entry["first"][0] for key, entry in passed.items() if entry["count"] and not (key == TEXTS and several)
        ]
        fix = f"if {meant[0]} holds the captions, {_AS_METADATA}" if meant else CAPTION_FIX
        raise UserError(f"{name} has neither captions nor labels (columns: {', '.join(columns)}); {fix}")
    for column in captions:
        if not _holds_text(rows.features[column]):
            raise UserError(
                f"{name}: column {column!r} holds {_kind(rows.features[column])} instead of captions; write texts or lists "
                "of texts, or name another --caption_column"
            )
    if not captions and label is not None:
        check_label_names(class_names(rows, label, cfg, name), cfg, name)
    return captions, label


def _holds_text(kind: Any) -> bool:
    """Return whether a column type is text, a list of texts, a class label, or null."""
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
    """Return the distinct classes of a label column, as captions name them.

    Raises:
        UserError: the column does not hold labels, or its labels are truth values or numbers without names.
    """
    kind = rows.features[label]
    if not isinstance(kind, (datasets.Value, datasets.ClassLabel)):
        raise UserError(f"{name} has no captions, and its column {label!r} holds {_kind(kind)}; {CAPTION_FIX}")
    dtype = kind.dtype if isinstance(kind, datasets.Value) else "string"
    if dtype == "bool":
        raise UserError(
            f"{name} has no captions, and its column {label!r} holds true and false, which name no classes; replace them by "
            "names"
        )
    if dtype not in ("string", "large_string", "null") and not cfg.label_names:
        numbers = sorted(str(value) for value in rows.unique(label) if value is not None)
        raise UserError(
            f"{name} has no captions, and its column {label!r} holds numbers without names; {_numbers_fix(numbers)}, or "
            f"{CAPTION_FIX}"
        )
    found = (label_name(plain(kind, value), cfg.label_names) for value in rows.unique(label))
    return [text for text in found if text]


def has_numbers(rows: datasets.Dataset, label: str, cfg: SourceConfig) -> bool:
    """Return whether a label column has numbers for which `label_names` gives names."""
    values = (plain(rows.features[label], value) for value in rows.unique(label))
    return any(label_name(value, cfg.label_names) != label_name(value, []) for value in values)


def check_label_names(labels: Iterable[str | None], cfg: SourceConfig, name: str) -> None:
    """Raise `UserError` if classes that must serve as captions are truth values, or numbers without names."""
    known = {label for label in labels if label}
    truths = sorted(label.strip() for label in known if label.strip().lower() in ("true", "false"))
    if truths and len(truths) == len(known):
        raise UserError(
            f"{name} has no captions, and its classes are {' and '.join(truths)}, which name nothing; replace them by names"
        )
    numbers = sorted((label for label in known if _NUMBER.fullmatch(label)), key=_by_number)
    shown = ", ".join(label.strip() for label in numbers[:3]) + (" …" if len(numbers) > 3 else "")
    if numbers and cfg.label_names:
        fix = "add the missing names" if _can_be_named(numbers, len(known)) else f"{_BY_NAMES} in the data set"
        raise UserError(
            f"{name}: --label_names has no name for the classes {shown}; its names are those of the classes 1 to "
            f"{len(cfg.label_names)}; {fix}"
        )
    if numbers and len(numbers) == len(known):
        raise UserError(f"{name} has no captions, and its classes are numbers ({shown}); {_numbers_fix(numbers)}")


def _numbers_fix(numbers: list[str]) -> str:
    named = _can_be_named(numbers, len(numbers))
    return f"give the names of the classes by --label_names, or {_BY_NAMES}" if named else _BY_NAMES


def _can_be_named(numbers: list[str], classes: int) -> bool:
    """Return whether `--label_names` suits these numbers: whole ones from 1, such as 1, 2 and 5, but not 2021 and 2022.

    Args:
        numbers: classes that are numbers without names.
        classes: number of all classes. Up to ten names per class may be asked for.
    """
    values = [_by_number(number) for number in numbers if _NUMBER.fullmatch(number)]
    whole = len(values) == len(numbers) and all(value.is_integer() for value in values)
    return whole and min(values, default=0) >= 1 and max(values) <= 10 * classes


def _by_number(label: str) -> float:
    return float(label.strip().replace(",", "."))


def is_plain(kind: Any) -> bool:
    return isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and "binary" not in kind.dtype)


def plain(kind: Any, value: Any) -> Any:
    if isinstance(kind, datasets.ClassLabel) and value is not None:
        return kind.int2str(value) if value >= 0 else None  # -1 means "no label".
    return value


def label_name(value: Any, names: list[str]) -> str | None:
    """Return a label as text. If there are `names`, the number i (from 1) becomes the i-th name."""
    if names and isinstance(value, float) and value.is_integer():  # pandas writes integers so if some are missing.
        value = int(value)
    text = None if value is None or value != value else str(value)  # NaN differs from itself.
    if names and text is not None and text.isdecimal() and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    return text


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


def shown_file(path: str | None, split: str, index: int) -> str:
    if not path:
        return f"{split}[{index}]"
    return Path(path).name if os.path.isabs(path) else path


def _holds_sentences(rows: datasets.Dataset, column: str) -> bool:
    """Return whether a column may hold captions: half of its first texts have three words or more."""
    kind = rows.features[column]
    if isinstance(kind, datasets.ClassLabel) or not _holds_text(kind):
        return False
    texts = [text for value in rows.select_columns([column])[:ROWS_PER_BATCH][column] if (text := clean(value))]
    return bool(texts) and 2 * sum(len(text.split()) > 2 for text in texts) >= len(texts)


def caption_origins(
    rows: dict[str, datasets.Dataset], captions: Mapping[str, tuple[list[str], str | None]], counted: bool,
    cfg: SourceConfig,
) -> list[str]:  # fmt: skip
    """Return in words where the captions of each split come from.

    With `counted`, the listing of a folder has already counted captions by file, so these are not repeated.
    """
    found: dict[str, list[str]] = {}
    for split, (columns, label) in captions.items():
        if not (counted and columns in ([], ["caption"])):
            named = f"column{'s' if len(columns) > 1 else ''} {', '.join(map(repr, columns))}"
            origin = named if columns else f"class, column {label!r}" if label else "none"
            found.setdefault(origin, []).append(split)
    said = [origin if len(found) == 1 else f"{origin} ({', '.join(splits)})" for origin, splits in found.items()]
    used = {
        cfg.image_column,
        label_column(rows["train"]),
        *(key for columns, label in captions.values() for key in (*columns, label)),
    }
    if not cfg.caption_column and any(
        captions[split][0] == ["caption"] and "text" in rows[split].column_names for split in captions
    ):
        where = "is read where 'caption' is empty" if counted else "is not used, as there is 'caption'"
        said.append(f"column 'text' {where}")
        used.add("text")
    unused = [key for key in rows["train"].column_names if key not in used and _holds_sentences(rows["train"], key)]
    if unused:
        said.append(f"not used: column{'s' if len(unused) > 1 else ''} {', '.join(map(repr, unused))}")
    by_class = [(rows[split], label) for split, (columns, label) in captions.items() if label and not columns]
    if cfg.label_names and by_class and not any(has_numbers(part, str(label), cfg) for part, label in by_class):
        said.append("--label_names is not used, as no class is a number")
    return said
