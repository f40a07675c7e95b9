"""Browse a data set without loading all of it: read its columns, and single pictures from its files.

This module reads two forms of data set. The first form is a dataset folder with Parquet shards, as
`t2i.data.dataset_folder` or the Hub writes them. The second form is the pixels and rows that `t2i.data.preparing`
prepares for a training. This module imports neither torch nor `datasets`, because importing them takes seconds.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from t2i.captions import auditing
from t2i.captions.texts import clean, label_captions, prefixed_all
from t2i.config import read_yaml
from t2i.data.images import BadImage, decode_image
from t2i.data.near_duplicates import SIDE, group, thumbnail
from t2i.data.repairs import CAPTIONS, ID_DIGITS, LEFT_OUT, read_repairs
from t2i.data.split_names import SPLIT_NAMES, named_splits
from t2i.errors import UserError
from t2i.files import json_lines, read_json

MOST_VALUES = 200  # Different values at most of a column that tells kinds of pictures apart.
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# Words of English that are in most captions and say nothing about a picture.
_COMMON = (
    "a an and are as at be been being both but by for from has have in into is it its near of off on one or other over some "
    "such that the their them there these they this those through to under up very was were which while with"
)
STOP_WORDS = frozenset(_COMMON.split())
BATCH = 100  # Rows of images in memory at a time. `t2i.data.dataset_folder` writes row groups of this size.
SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")  # Older shards of the Hub end in a hash.
# Names of files and folders that `datasets` assigns to a split, such as `test`, `test_0` and `flowers-test`.
OF_SPLIT = re.compile(rf"(.*[-._ 0-9])?(?P<split>{'|'.join(SPLIT_NAMES)})([-._ 0-9].*)?")
DAMAGE = (OSError, ValueError, KeyError, pa.ArrowException)  # Errors of reading a damaged or a deleted file.


@dataclass(frozen=True)
class Split:
    """The files of one split of a data set, as they are on disk at one moment.

    A rewritten file makes another `Split`, because a `Split` holds the sizes and times of its files.

    Attributes:
        folder: folder of the data set.
        name: name of the split, such as `train`.
        files: path, size (bytes) and modification time (ns) of each file of the split. The files are the Parquet shards
            in order, or `<split>.arrow` and `<split>.npy` of prepared images.
        captions: names of the caption columns of Parquet shards. Without names, use `caption`, else `text`.
        home: folder with the data set's repairs (`t2i.data.repairs`), or None for a data set of the Hub.
        repairs: path, size and modification time of each file of repairs. Without files, the rows are as they are stored.
        prefix: the `--caption_prefix` of prepared captions.
    """

    folder: Path
    name: str
    files: tuple[tuple[Path, int, int], ...]
    captions: tuple[str, ...] = ()
    home: Path | None = None
    repairs: tuple[tuple[Path, int, int], ...] = ()
    prefix: str = ""

    def as_stored(self) -> "Split":
        """Return this split without the repairs."""
        return replace(self, repairs=())


@dataclass(frozen=True)
class Rows:
    """The rows of a split without the pictures.

    Attributes:
        captions: all captions of each picture, or one "" if the picture has none.
        labels: the label of each picture as text, or None if the split has no label column.
        columns: columns of text, numbers or truth values besides caption and label, by name.
        image: name of the column of pictures.
        has_captions: whether the split has a caption column.
        left_out: numbers of the rows that no training reads.
        edited: numbers of the rows whose captions a person has edited.
    """

    captions: list[list[str]]
    labels: list[str | None] | None
    columns: dict[str, list[Any]]
    image: str
    has_captions: bool
    left_out: frozenset[int] = frozenset()
    edited: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.captions)


# --- Splits ----------------------------------------------------------------------------------------------------------


def find_splits(
    folder: Path, captions: tuple[str, ...] = (), home: Path | None = None, prefix: str = ""
) -> dict[str, Split]:
    """Return the splits of a dataset folder or of prepared images by name, train first; {} if there are no splits.

    Args:
        folder: the dataset folder, or the folder of prepared images.
        captions: names of the caption columns of a dataset folder. Prepared images have columns of their own.
        home: folder with the data set's repairs. With None, the rows are as they are stored.
        prefix: the `--caption_prefix` of prepared captions.
    """
    found: dict[str, list[Path]] = {}
    for pattern in ("*.parquet", "*/*.parquet"):
        for path in sorted(folder.glob(pattern)):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                found.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if not found:
        captions = ()
        pairs = {path.stem: [path, path.with_suffix(".npy")] for path in sorted(folder.glob("*.arrow"))}
        found = {name: pair for name, pair in pairs.items() if pair[1].is_file()}
    order = ["train", "validation", "test"]
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    try:
        lists = [home / file for file in (LEFT_OUT, CAPTIONS) if (home / file).is_file()] if home else []
        states = tuple(map(_state, lists))
        return {
            name: Split(folder, name, tuple(map(_state, found[name])), captions, home, states, prefix) for name in names
        }
    except OSError:  # A file was deleted while the folder was listed.
        return {}


def _split_of(file: Path) -> str:
    """Return the split to which `datasets` assigns a Parquet file, by the path in the data set's folder."""
    above = file.parts[:-1]
    shard = SHARD.fullmatch(file.stem)
    name = shard["split"] if shard else file.stem
    if not (shard and above == ("data",)):  # In `data/`, only the whole name of a shard counts.
        named = next(filter(None, map(OF_SPLIT.fullmatch, (*above, file.stem))), None)
        name = named["split"] if named else name
    return SPLIT_NAMES.get(name, name)


def _state(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


# --- Rows ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)  # Near duplicates read three splits, each with and without its repairs.
def read_rows(split: Split) -> Rows:
    """Return the rows of a split without its pictures.

    The rows are cached per `Split`, so they are reused until a file of the split changes.

    Repairs of the data set are applied: edited captions are those of the rows, and rows to leave out are marked.

    Raises:
        UserError: a file of the split or of its repairs is damaged or was deleted.
    """
    if split.repairs:
        return _repaired(split, read_rows(split.as_stored()))
    try:
        tables: list[pa.Table] = []
        images: list[str] = []
        names: dict[str, list[str]] = {}
        for path, *_ in split.files:
            if path.suffix == ".parquet":
                table, image, names = _parquet_rows(path, split.captions)
                images.append(image)
            elif path.suffix == ".arrow":
                with pa.memory_map(str(path)) as file:
                    table = pa.ipc.open_stream(file).read_all()
            else:
                continue
            tables.append(table)
        # If one shard lacks a column, its rows get empty values. If the column's types differ, all values become text.
        table = _together(tables)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except DAMAGE as error:
        raise UserError(_unreadable(split, error)) from None
    for name, classes in names.items():
        columns[name] = [_class_name(value, classes) for value in columns.get(name, ())]
    count = table.num_rows
    chosen = [columns.pop(name) for name in dict.fromkeys(split.captions) if name in columns]
    text: list[Any] | None = [_together_texts(values) for values in zip(*chosen, strict=True)]
    text = text or columns.pop("caption", None) or columns.pop("text", None)
    if "captions" in columns and _holds_texts(table.schema.field("captions").type):  # of prepared images
        text = columns.pop("captions")
    columns = {name: column for name, column in columns.items() if not _holds_texts(table.schema.field(name).type)}
    label = next((name for name in ("label", "labels", *names) if name in columns), None)
    labels = columns.pop(label) if label else None
    return Rows(
        [_texts(value) for value in text] if text else [[""]] * count,
        labels and [None if value is None else str(value) for value in labels],
        columns,
        images[0] if images else "",
        bool(text),
    )


def _repaired(split: Split, rows: Rows) -> Rows:
    repairs = read_repairs(split.home)
    if not (repairs.left_out or repairs.edits):
        return rows
    ids, files = identities(split.as_stored())
    own = own_splits(split, rows)
    left_out = set()
    for name in set(own):
        here = [row for row, split_name in enumerate(own) if split_name == name]
        marked = repairs.is_left_out([ids[row] for row in here], [files[row] for row in here], name)
        left_out |= {row for row, is_left_out in zip(here, marked, strict=True) if is_left_out}
    captions, edited = list(rows.captions), set()
    for row in [row for row, image in enumerate(ids) if image[:ID_DIGITS] in repairs.edits]:
        before = [clean(text) for text in captions[row]]
        after = repairs.edited_captions(ids[row], before, split.prefix)
        if after != before and rows.has_captions:
            captions[row] = after
            edited.add(row)
    return replace(rows, captions=captions, left_out=frozenset(left_out), edited=frozenset(edited))


@lru_cache(maxsize=8)
def identities(split: Split) -> tuple[list[str], list[str]]:
    """Return the hash and the file name of each picture of a split, as a training knows them.

    Returns:
        The first 32 hex digits of the SHA-256 of each image file, or 16 digits for prepared images. "" stands for a
        missing image. Names of files, or names such as `train[3]` for images without a name.

    Raises:
        UserError: a file of the split is damaged or was deleted.
    """
    rows = read_rows(split)
    if split.files[0][0].suffix != ".parquet":
        return ["" if one is None else str(one) for one in rows.columns["id"]], list(map(str, rows.columns["file"]))
    ids: list[str] = []
    files: list[str] = []
    try:
        for path, *_ in split.files if rows.image else ():
            with pq.ParquetFile(path, memory_map=True) as file:
                for batch in file.iter_batches(BATCH, columns=[rows.image]):
                    for cell in batch.column(0).to_pylist():
                        data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
                        ids.append(hashlib.sha256(data).hexdigest()[:32] if data else "")
                        name = Path(name).name if name and os.path.isabs(name) else name
                        files.append(name or f"{split.name}[{len(files)}]")
    except DAMAGE as error:
        raise UserError(_unreadable(split, error)) from None
    return (ids, files) if ids else ([""] * len(rows), [""] * len(rows))


def own_splits(split: Split, rows: Rows) -> list[str]:
    """Return for each row the split to which a training assigns the row in the data set itself.

    A validation split that a training took from the train split is a part of the train split. A column sorts the rows of
    Parquet files into splits only if the files' names do not (`t2i.data.tables`).
    """
    name = SPLIT_NAMES.get(split.name.lower(), "train")
    if split.files[0][0].suffix != ".parquet":  # Prepared images are sorted already.
        report = read_json(split.folder / "report.json") if name == "validation" else {}
        is_drawn = str(report.get("validation_from")).startswith("train")
        return ["train" if is_drawn else name] * len(rows)
    named = next((values for key, values in rows.columns.items() if named_splits(key, values)), None)
    if name != "train" or named is None or len(find_splits(split.folder).keys() & set(SPLIT_NAMES.values())) > 1:
        return [name] * len(rows)
    return [SPLIT_NAMES.get(str(value).strip().lower(), name) for value in named]


def _parquet_rows(path: Path, named: tuple[str, ...]) -> tuple[pa.Table, str, dict[str, list[str]]]:
    """Return a shard's plain columns, the name of its picture column, and the class names of its numeric labels."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        image = next((name for name in ("image", *schema.names) if _holds_images(schema, name)), "")
        captions = [
            name
            for name in dict.fromkeys(("caption", "text", *named))
            if name in schema.names and _holds_texts(schema.field(name).type)
        ]
        plain = [field.name for field in schema if _is_plain(field.type) and field.name != image] + captions
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = {
            name: list(map(str, known["names"]))
            for name, known in info.items()
            if name in plain and isinstance(known, dict) and known.get("_type") == "ClassLabel" and known.get("names")
        }
        table = file.read(columns=plain)
        return (
            table if plain else pa.table({"row": pa.array(range(file.metadata.num_rows), pa.int64())}),
            image, names,
        )  # fmt: skip


def _holds_images(schema: pa.Schema, name: str) -> bool:
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    return pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _holds_texts(kind: pa.DataType) -> bool:
    """Return whether a column holds lists of texts."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type))


def _texts(value: Any) -> list[str]:
    """Return the captions of a row that are not empty, or one empty caption."""
    texts = [str(text) for text in (value if isinstance(value, list) else [value]) if text is not None]
    return [text for text in texts if text] or [""]


def _together_texts(values: Sequence[Any]) -> list[str]:
    """Return the distinct captions of a row from all its caption columns."""
    return list(dict.fromkeys(text for value in values for text in _texts(value)))


def _together(tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException:
        text = [
            pa.table({name: pc.cast(table.column(name), pa.string()) for name in table.column_names})
            for table in tables
        ]
        return pa.concat_tables(text, promote_options="default")


def _class_name(value: Any, names: list[str]) -> str | None:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _unreadable(split: Split, error: Exception) -> str:
    gone = [path for path, *_ in split.files if not path.exists()]
    if gone:
        return f"{gone[0]} no longer exists; choose the data set again"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"the split {split.name} of {split.folder} cannot be read ({reason}); make the data set again"


# --- Pictures --------------------------------------------------------------------------------------------------------


def read_pictures(split: Split, rows: Sequence[int], side: int | None = None) -> list[Image.Image | BadImage]:
    """Return the pictures of some rows as upright RGB images, in the order of `rows`.

    Of a Parquet file, only row groups with wanted rows are read, with `BATCH` rows in memory at a time.

    Args:
        split: the split that holds the rows.
        rows: the numbers of the wanted rows, from 0.
        side: size (px) to which the caller will shrink the pictures. Large JPEG files are then decoded at a smaller
            size, which is several times faster.

    Returns:
        One entry per wanted row. The entry of a picture that cannot be decoded is a `BadImage`.

    Raises:
        UserError: a file of the split is damaged or was deleted.
    """
    try:
        if split.files[0][0].suffix == ".parquet":
            return [_decoded(found, side) for found in _encoded(split, rows)]
        pixels = np.load(split.files[1][0], mmap_mode="r", allow_pickle=False)
        return [Image.fromarray(np.asarray(pixels[row])) for row in rows]
    except (*DAMAGE, IndexError) as error:
        raise UserError(_unreadable(split, error)) from None


def _decoded(found: bytes | None, side: int | None) -> Image.Image | BadImage:
    try:
        if found is None:
            raise BadImage("missing image")
        return decode_image(found, draft_side=side)
    except BadImage as error:
        return error


def _encoded(split: Split, rows: Sequence[int]) -> list[bytes | None]:
    """Return the encoded bytes of each row's picture, or None for a row without bytes."""
    found: dict[int, bytes | None] = {}
    wanted = sorted(set(rows))
    first = 0  # Number of the row that comes first in the current row group.
    image = read_rows(split).image
    for path, *_ in split.files:
        with pq.ParquetFile(path, memory_map=True) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                inside = [row - first for row in wanted if first <= row < first + count]
                if inside:
                    found |= {first + row: data for row, data in _of_group(file, group, image, inside).items()}
                first += count
    return [found.get(row) for row in rows]


def _of_group(file: pq.ParquetFile, group: int, image: str, rows: list[int]) -> dict[int, bytes | None]:
    found: dict[int, bytes | None] = {}
    first = 0
    if not image:
        return {}
    for batch in file.iter_batches(BATCH, row_groups=[group], columns=[image]):
        column = batch.column(0)
        if pa.types.is_struct(column.type):
            column = column.field("bytes")
        found |= {row: column[row - first].as_py() for row in rows if first <= row < first + len(column)}
        first += len(column)
        if first > rows[-1]:
            break
    return found


def as_file(picture: Image.Image, side: int) -> bytes:
    """Encode a picture for a web page, shrunk to at most `side` px per side.

    Pictures up to 128 px become lossless PNG files, and larger pictures JPEG files.
    """
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if max(small.size) <= 128:
        small.save(file, "PNG")
    else:
        small.save(file, "JPEG", quality=88)
    return file.getvalue()


# --- Words -----------------------------------------------------------------------------------------------------------


def search(texts: Sequence[str], query: str) -> list[int]:
    """Return the indices of the texts that contain every word and every "quoted phrase" of `query`.

    Upper and lower case count as equal.
    """
    parts = [phrase or word for phrase, word in re.findall(r'"([^"]*)"|(\S+)', query.casefold())]
    parts = [part.strip('"') for part in parts if part.strip('"')]
    return [number for number, text in enumerate(texts) if all(part in text.casefold() for part in parts)]


def visible(text: str) -> str:
    """Replace each control character in `text` by a visible symbol (NUL becomes ␀), for a web page."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda match: chr(0x2400 + min(ord(match[0]), 0x21)), text)


@lru_cache(maxsize=8)
def audit(split: Split) -> dict[str, dict[int, str] | None]:
    """Return what `auditing.audit` finds in the captions of a split.

    The checks for copied images and for colors need the notes on the photos that caption_to_hub.py writes. A data set
    without notes on its photos is checked only for other faults.

    Returns:
        For each check, the numbers of the rows found and a remark on each row, or None if the check was not possible.
    """
    rows = read_rows(split)
    looked = _looked_at(split, len(rows))
    texts = [auditing.clean_caption(text) for captions in rows.captions for text in captions]
    row_of = [row for row, captions in enumerate(rows.captions) for _ in captions]  # of each caption
    numbers = [str(row) for row in row_of]
    owners = [looked[row]["id"] for row in row_of] if looked else numbers
    labels = [rows.labels[row] for row in row_of] if rows.labels else None
    found = auditing.audit(
        texts,
        _owners(split.folder, texts, labels, owners) if labels else owners,
        files=numbers,
        labels=labels,
        colors=[looked[row]["colors"] for row in row_of] if looked else None,
        examples=len(texts),
    )
    return {
        # of several captions of a picture, the first one that has the finding
        name: None if check["count"] is None else {int(row["file"]): row["note"] for row in reversed(check["examples"])}
        for name, check in found["checks"].items()
    }


def _owners(folder: Path, texts: list[str], labels: list[str | None], images: list[str]) -> list[str]:
    """Return who may share each caption: the images of a label if caption_to_hub.py made it of the label, else the image.

    Edits of a caption are recognised only if all captions were made of labels.
    """
    with suppress(OSError, UserError, KeyError, TypeError, AttributeError):
        settings = read_yaml(folder / "config.yaml")
        captioners, templates = settings["caption"]["captioner"], settings["data"].get("caption_template", [])
        if captioners in ("label", ["label"]):
            return [str(label) for label in labels]
        if "label" in captioners:
            templates = [templates] if isinstance(templates, str) else templates
            prefix = settings["data"].get("caption_prefix") or ""
            made = {
                label: {auditing.clean_caption(text) for text in prefixed_all(label_captions(label, templates), prefix)}
                for label in set(labels)
            }
            return [
                str(label) if text in made[label] else image
                for text, label, image in zip(texts, labels, images, strict=True)
            ]
    return images


def _looked_at(split: Split, count: int) -> list[dict[str, Any]] | None:
    """Return the notes that caption_to_hub.py wrote on the pictures of a split, in the order of the rows.

    Returns:
        The result is None if there are no notes, or if the notes describe another number of pictures than `count`.
    """
    notes = sorted(split.folder.glob(".captioning/photos-*.jsonl"), key=os.path.getmtime)
    try:
        lines = notes[-1].read_text(encoding="utf-8").splitlines() if notes else []
        photos = [json.loads(line) for line in lines]
        kept = [photo for photo in photos if photo["split"] == split.name and photo["reason"] is None]
        whole = all(isinstance(photo["id"], str) and isinstance(photo["colors"], dict) for photo in kept)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if kept and whole and len(kept) == count else None


def kinds_of(rows: Rows) -> dict[str, list[str]]:
    """Return the columns that tell kinds of pictures apart, as visible text, the label first.

    Such a column has at least 2 and at most `MOST_VALUES` different values, and each value has two pictures on average.
    """
    columns: dict[str, Sequence[Any]] = {"label": rows.labels} if rows.labels else {}
    columns |= rows.columns
    texts = {}
    for name, values in columns.items():
        distinct = set(values)
        if 1 < len(distinct) <= MOST_VALUES and len(distinct) <= max(2, len(values) // 2):
            shown = {value: "(none)" if value is None else visible(str(value))[:100] for value in distinct}
            texts[name] = [shown[value] for value in values]
    return texts


@lru_cache(maxsize=8)
def duplicate_groups(split: Split) -> list[list[int]]:
    """Return the pictures that the audit reports as duplicates, in groups that share a caption, the largest first.

    A picture with several shared captions is in the group of its first shared caption.
    """
    found = audit(split)["duplicates"] or {}
    by_caption: dict[str, list[int]] = {}
    for row, captions in enumerate(read_rows(split).captions):
        for text in dict.fromkeys(auditing.clean_caption(caption).casefold() for caption in captions):
            by_caption.setdefault(text, []).append(row)
    shared = [group for group in by_caption.values() if len(group) > 1 and found.keys() >= set(group)]
    first = {row: number for number, group in reversed(list(enumerate(shared))) for row in group}
    groups = [[row for row in group if first[row] == number] for number, group in enumerate(shared)]
    return sorted(filter(None, groups), key=len, reverse=True)


def near_duplicates(
    splits: Sequence[Split], progress: Callable[[float], None] = lambda share: None
) -> list[list[tuple[str, int]]]:
    """Return the groups of pictures that are nearly the same, over all splits of a data set, the largest first.

    Args:
        splits: the splits of the data set.
        progress: called with the share of the work that is done, 0..1.

    Returns:
        The split's name and the row of each picture of a group.

    Raises:
        UserError: a file of a split is damaged or was deleted.
    """
    stored = tuple(split.as_stored() for split in splits)
    if stored not in _near_duplicates:
        pictures = [(split, row) for split in stored for row in range(len(read_rows(split)))]
        thumbnails = np.zeros((len(pictures), 3 * SIDE * SIDE), np.float32)
        number = 0
        for split in stored:
            for start in range(0, len(read_rows(split)), BATCH):
                rows = range(start, min(start + BATCH, len(read_rows(split))))
                for picture in read_pictures(split, rows, 2 * SIDE):
                    if not isinstance(picture, BadImage):
                        thumbnails[number] = thumbnail(picture)
                    number += 1
                progress(0.8 * number / len(pictures))
        groups = group(thumbnails, lambda share: progress(0.8 + 0.2 * share))
        while len(_near_duplicates) >= 4:
            _near_duplicates.pop(next(iter(_near_duplicates)))
        _near_duplicates[stored] = [[(pictures[n][0].name, pictures[n][1]) for n in members] for members in groups]
    return _near_duplicates[stored]


_near_duplicates: dict[tuple[Split, ...], list[list[tuple[str, int]]]] = {}  # of the data sets last compared


def template_groups(split: Split) -> tuple[int, list[str]]:
    """Find the duplicates that a template made: their captions are shared only by pictures of one kind.

    The kind of a picture is its label. Without labels, it is the values of all columns of `kinds_of`.

    Returns:
        Number of pictures in such groups, and the names of the columns. The names are [] if there are no such columns.
    """
    kinds = kinds_of(read_rows(split))
    names = ["label"] if "label" in kinds else list(kinds)
    groups = duplicate_groups(split) if names else []
    alike = [group for group in groups if all(len({kinds[name][row] for row in group}) == 1 for name in names)]
    return sum(map(len, alike)), names


@lru_cache(maxsize=8)
def words(split: Split) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Count the words in each caption of a split, and the captions in which each word occurs.

    Returns:
        First, the number of words in each caption, int64 [N]. Second, the 50 words that occur in most captions, each
            with the number of captions that contain it. These words are in lower case and without punctuation, and
            `STOP_WORDS` are not among them.
    """
    texts = [text for captions in read_rows(split).captions for text in captions]
    counts = Counter(word for text in texts for word in set(WORD.findall(text.casefold())) - STOP_WORDS)
    return np.array([len(text.split()) for text in texts], dtype=np.int64), counts.most_common(50)


def read_quarantine(file: Path) -> list[dict[str, str]]:
    """Return file, split and reason of each image that was left out of a data set, as `quarantine.jsonl` lists them.

    Incomplete lines of `quarantine.jsonl` are skipped. Without a `quarantine.jsonl`, the result is [].
    """
    keys = ("file", "split", "reason")
    return [{key: auditing.clean_caption(row.get(key)) for key in keys} for row in json_lines(file)]
