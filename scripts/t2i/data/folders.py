"""List a folder of images: which files are images with captions, and which files are left out for what reason.

Cameras, editors, annotation tools and storage systems leave other files beside images. A file is therefore tried as an
image only if it has the extension of an image, no extension, or the first bytes of an image.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from t2i.captions.ledger import is_ledger
from t2i.captions.texts import clean, label_captions
from t2i.config import SourceConfig
from t2i.config_types import unlisted
from t2i.data.caption_files import (
    METADATA,
    SIDECARS,
    TABLES,
    TEXTS,
    metadata_rows,
    read_sidecar,
    refuse_pointer,
    whole_number,
)
from t2i.data.images import HEIF_FIX, image_digest, starts_like_an_image
from t2i.data.records import LABELS, LeftOut, Source, caption_keys, check_label_names, label_name
from t2i.data.repairs import CAPTIONS
from t2i.data.split_names import SPLIT_NAMES, named_splits
from t2i.data.workers import WORKERS, in_order
from t2i.errors import UserError
from t2i.files import hash_json

READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
# Pictures in formats that are not decoded. Without a readable image of the same name they are listed as bad images, and
# beside one as its companion files.
RAW = {".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"}
UNREADABLE = RAW | {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".psd", ".psb", ".eps", ".tga"}
if not HEIF_FIX:  # pillow-heif is installed.
    READABLE |= {".heic", ".heif"}
    UNREADABLE -= READABLE
UNREADABLE |= {".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".dds", ".qoi", ".icns"}
NOT_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".html", ".py", ".lock"}
NOT_IMAGES |= {".caption", ".parquet"}
NOT_IMAGE_NAMES = {"readme", "license", "licence", "copying", "notice", "thumbs.db", "desktop.ini", "sha256sums"}
NOT_IMAGE_NAMES |= {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "left_out.jsonl"}
NOT_IMAGE_NAMES |= {"audit.json", "quarantine.jsonl", "run.json"}  # of scripts/caption_to_hub.py
NOT_IMAGE_NAMES |= {"icon\r", "icon\uf00d"}  # macOS's icon of a folder, and its name on a disk of Windows.
UNFINISHED = {".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2"}
# Folders in which storage systems, unpackers and photo programs keep copies, thumbnails and deleted files.
FOREIGN_FOLDERS = re.compile(
    r"\..*|__macosx.*|@eadir|@tmp|[@#$]recycle(\.bin)?|#snapshot|@recently.*|@transcode|system volume information"
    r"|lost\+found|found\.\d+|.*\.lrdata|.*\.lrcat-data|captureone|ipod photo cache|_?thumb(s|nails?)|__pycache__",
    re.IGNORECASE,
)
SILENT_FOLDERS = {".git", ".cache", ".locks"}  # These folders never hold images, so nothing is said about them.

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # "trainA" and "TestSet" have two words each.
_SET_ENDINGS = re.compile(r"(set|data|images?|imgs?|photos?|pics)$")


NOT_CLASS_NAMES = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "data"}


def split_name(folder: str) -> str | None:
    """Return the split that a folder of this name holds, or None if the name is not the name of a split."""
    return SPLIT_NAMES.get(folder.strip().lower())


def split_depth(files: Iterable[str], images: Iterable[str]) -> int:
    """Return the depth of the split folders: 1 for `train/x.jpg`, 2 for `data/train/x.jpg`, 0 without split folders."""
    if any(split_name(file.split("/")[0]) == "train" for file in files if "/" in file):
        return 1
    homes = _homes(images)
    for depth in range(1, max(map(len, homes), default=0)):
        if len({home[:depth] for home in homes}) > 1 or any(len(home) < depth for home in homes):
            return 0
        splits = {split_name(home[depth]) for home in homes if len(home) > depth} - {None}
        if "train" in splits and len(splits) > 1:
            return depth + 1
    return 0


def split_look_alikes(images: Iterable[str]) -> dict[str, str]:
    """Return `{folder: split}` of sibling folders whose names contain words such as train and test (`train_images`).

    At least half of the sibling folders must have such names. Otherwise the names are probably classes, such as
    `steam_train` and `test_tube` among many others.
    """
    beside: dict[tuple[str, ...], set[str]] = {}
    for home in _homes(images):
        for depth, name in enumerate(home):
            beside.setdefault(home[:depth], set()).add(name)
    for parent, names in sorted(beside.items()):
        alike = {name: split for name in sorted(names) if (split := _split_in(name))}
        if len(set(alike.values())) > 1 and 2 * len(alike) >= len(names):
            return {"/".join((*parent, name)): split for name, split in alike.items()}
    return {}


def split_among_classes(images: Iterable[str]) -> str | None:
    """Return a folder with the name of a split, such as `test`, that lies beside class folders. None without such a folder.

    Only the folders at the top are compared, or those at the top of the one folder that holds all images.
    """
    homes = _homes(images)
    above = tuple(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*homes, strict=False)))
    beside = {home[len(above)] for home in homes if len(home) > len(above)}
    named = sorted(name for name in beside if split_name(name) not in (None, "train"))
    return "/".join((*above, named[0])) if named and len(beside) > len(named) else None


def folders_beside_train(images: Iterable[str]) -> list[str]:
    """Return the folders beside `train` that are as much a class as `train` is. [] if `train` is surely a split.

    A class holds its images itself, without subfolders. Another split beside `train` shows that both are splits.
    """
    homes = _homes(images)
    splits = {home[0] for home in homes if home and split_name(home[0])}
    if {*map(split_name, splits)} != {"train"} or any(len(home) > 1 for home in homes if home and home[0] in splits):
        return []
    others = {home[0] for home in homes if len(home) == 1} - splits
    return sorted(other for other in others if other.lower() not in NOT_CLASS_NAMES)


def _homes(images: Iterable[str]) -> set[tuple[str, ...]]:
    return {tuple(image.split("/")[:-1]) for image in images}


def _split_in(name: str) -> str | None:
    words = (word.lower() for word in _WORDS.findall(name))
    found = (SPLIT_NAMES.get(word) or SPLIT_NAMES.get(_SET_ENDINGS.sub("", word)) for word in words)
    return next(filter(None, found), None)


def leave_out(left_out: LeftOut, reason: str, name: str) -> None:
    """Count a file or folder that is left out for `reason`, and keep the first three names per reason."""
    entry = left_out.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += 1
    if len(entry["first"]) < 3:
        entry["first"].append(name.encode("utf-8", "backslashreplace").decode())


def list_files(folder: Path) -> tuple[list[str], LeftOut]:
    """Return the relative paths (with /) of all files below `folder`, and the files and folders that are left out.

    The files of a folder come before the files of its subfolders. A folder with several paths (links) is read only once.
    A path in a split is preferred, then a path without links.
    """
    found: list[str] = []
    left_out: LeftOut = {}
    seen: dict[str, str] = {}
    root = os.path.realpath(folder)
    waiting: list[tuple[tuple[Any, ...], tuple[str, ...], bool]] = [((), (), False)]
    while waiting:
        _, parts, linked = heapq.heappop(waiting)
        current, shown = os.path.join(folder, *parts), "/".join(parts)
        real = os.path.realpath(current)
        above = parts and Path(root).is_relative_to(real)
        if real in seen or above:
            leave_out(left_out, "folders read already", f"{shown} → {seen.get(real) or real}")
            continue
        seen[real] = shown
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            leave_out(left_out, f"folders that cannot be read ({error.strerror})", shown or str(folder))
            continue
        for entry in entries:
            inside = (*parts, entry.name)
            path = "/".join(inside)
            if _is_folder(entry):
                if FOREIGN_FOLDERS.fullmatch(entry.name):
                    if entry.name not in SILENT_FOLDERS:
                        leave_out(left_out, "folders of other programs, and hidden ones", path)
                    continue
                by_link = linked or entry.is_symlink()
                split = split_name(inside[0])
                heapq.heappush(waiting, ((split is None, by_link, split != "train", inside), inside, by_link))
            elif not entry.name.startswith("."):
                found.append(path)
            elif PurePosixPath(entry.name).suffix.lower() in READABLE:
                leave_out(left_out, "hidden files", path)
    return sorted(found, key=_reading_order), left_out


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads in a circle.
        return False


def _reading_order(path: str) -> list[tuple[bool, str]]:
    *folders, name = path.split("/")
    return [*((True, part) for part in folders), (False, name)]


def plain_name(path: str) -> str:
    """Return a path in a form that can be compared. Macs write é as two characters (NFD), other systems as one (NFC)."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def without_suffix(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def pick_images(folder: Path, files: Iterable[str], left_out: LeftOut) -> list[str]:
    """Return the files that are tried as images, and count the others in `left_out`.

    Caption files, metadata and files such as README are not counted.
    """
    files = list(files)
    readable = {file for file in files if PurePosixPath(file).suffix.lower() in READABLE}
    beside = readable | {without_suffix(file) for file in readable}
    images = []
    for file in files:
        path = PurePosixPath(file)
        suffix, name = path.suffix.lower(), path.name.lower()
        companion = bool(suffix) and file not in readable and without_suffix(file) in beside
        if suffix in SIDECARS or name in METADATA or name in NOT_IMAGE_NAMES:
            continue
        if companion:
            leave_out(left_out, "companion files", file)
        elif file in readable or not suffix or suffix in UNREADABLE:
            images.append(file)
        elif suffix in (".csv", ".tsv", ".jsonl", ".json"):
            if name != CAPTIONS or not is_ledger(folder / file):
                leave_out(left_out, TABLES, file)
        elif suffix not in NOT_IMAGES:
            if starts_like_an_image(folder / file):
                images.append(file)
            else:
                leave_out(left_out, "unfinished downloads" if suffix in UNFINISHED else "other files", file)
    return images


def holds_images(shard: Path, cfg: SourceConfig) -> bool:
    """Return whether a Parquet file may hold images: it has a suitable column, or it cannot be read."""
    try:
        schema = pq.read_schema(shard)
    except (OSError, pa.ArrowException):
        return True
    named = {cfg.image_column, "image", "file_name"} & set(schema.names)
    kinds = [kind.storage_type if isinstance(kind, pa.ExtensionType) else kind for kind in schema.types]
    return bool(named) or any(
        pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0) for kind in kinds
    )


def refuse_pointers(folder: Path, files: list[str]) -> None:
    """Raise `UserError` if one of these files is a Git LFS pointer."""
    for file in files:
        refuse_pointer(folder / file)


# A folder of images as a source


def folder_source(
    name: str, folder: Path, files: list[str], images: list[str], cfg: SourceConfig, left_out: LeftOut
) -> Source:
    tops = {file.split("/")[0] for file in files if "/" in file}
    depth = split_depth(files, images)
    if tops and not depth and all(map(split_name, tops)):
        raise UserError(
            f"{name} has the splits {', '.join(sorted(tops))} but no train; rename the folder with the training images to "
            "train"
        )
    columns, notes, quarantine = _folder_columns(name, folder, files, images, depth, cfg, left_out)
    if not columns and quarantine:
        shown = ", ".join(f"{row['file']} ({row['reason']})" for row in quarantine[:3])
        raise UserError(f"{name} has no usable image to train on: {shown}; fix or replace these files")
    if not columns:
        endings = Counter(PurePosixPath(file).suffix.lower() or "no ending" for file in files).most_common(4)
        found = f" (it holds {', '.join(f'{count:,} of {ending}' for ending, count in endings)})" if endings else ""
        skipped = [first for entry in left_out.values() for first in entry["first"]][:3]
        found += f"; left out: {', '.join(skipped)}" if skipped else ""
        raise UserError(
            f"{name} holds no images to train on{found}; give a folder with photos or Parquet shards, or a Hub id"
        )
    rows = {split: _folder_rows(part) for split, part in columns.items()}
    digest = hashlib.sha256()
    with ThreadPoolExecutor(WORKERS) as pool:
        for split, part in rows.items():
            contents = in_order(pool, lambda image: image_digest(image, (folder,)), (row["image"] for row in part))
            for row, content in zip(part, contents, strict=True):
                digest.update(json.dumps([split, row], default=str, sort_keys=True).encode())
                digest.update(content)
    identity = hash_json([digest.hexdigest(), quarantine])
    return Source(name, identity, lambda scratch: rows, (folder,), quarantine=quarantine, notes=notes)


@dataclass
class _Listing:
    """The results that are collected while a folder of images is listed."""

    folder: Path
    depth: int  # Depth of the split folders, as `split_depth` returns it.
    left_out: LeftOut
    columns: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # Columns by split and name.
    quarantine: list[dict[str, str]] = field(default_factory=list)  # Images that cannot be listed.
    origins: Counter[str] = field(default_factory=Counter)  # Number of captions by where they come from.
    outside: int = 0  # Number of files outside the splits.
    of_lines: int = 0  # Number of caption files with several lines, each of which is a caption.
    served: dict[str, list[str]] = field(default_factory=dict)  # Images by the caption file that is read for them.
    used: set[str] = field(default_factory=set)  # Caption files that belong to an image.
    # Split, row and class of each image without a caption file.
    by_class: list[tuple[str, int, str | None]] = field(default_factory=list)
    # Split, row and value of the column `text`, which is read if the caption is empty.
    by_text: list[tuple[str, int, Any]] = field(default_factory=list)
    # Split and name of the metadata file of each image in such a file, and whether its row may have a caption.
    by_row: list[tuple[str, str, bool]] = field(default_factory=list)

    def split_of(self, file: str) -> str | None:
        if not self.depth:
            return "train"
        above = file.split("/")[:-1]
        return split_name(above[self.depth - 1]) if len(above) >= self.depth else None

    def count(self, split: str) -> int:
        return len(self.columns.get(split, {"image": ()})["image"])

    def refuse(self, file: str, reason: str, split: str | None) -> None:
        self.quarantine.append({"file": file, "split": split or "none", "reason": reason})

    def pass_by(self, file: str) -> None:
        self.outside += 1
        leave_out(self.left_out, "outside the splits", file)


def _folder_columns(
    name: str, folder: Path, files: list[str], images: list[str], depth: int, cfg: SourceConfig, left_out: LeftOut
) -> tuple[dict[str, dict[str, list[Any]]], dict[str, Any], list[dict[str, str]]]:
    """Return the columns of each split, notes for the report, and the images that cannot be listed.

    The columns are `image`, the columns of the metadata files, and `caption` and `label` if an image has them.
    """
    listing = _Listing(folder, depth, left_out)
    metadata = [file for file in files if PurePosixPath(file).name.lower() in METADATA]
    described = tuple(str(PurePosixPath(file).parent) for file in metadata)
    if len(set(described)) < len(described):
        raise UserError(f"{name} has two of {', '.join(METADATA)} in one folder; keep only one of these files")
    listed = _add_described(listing, name, files, images, metadata, cfg)
    sidecars, hidden = _sidecars(files)
    for file in hidden:
        leave_out(left_out, "caption files beside another that is read", file)
    undescribed = [file for file in images if not _is_below(file, described)]
    labels = {_class_of(file, depth) for file in undescribed}
    use_labels = not (len(labels) == 1 and str(next(iter(labels))).lower() in NOT_CLASS_NAMES)
    for file in undescribed:
        _add_image(listing, file, sidecars, use_labels)
    columns = listing.columns
    for split, position, text in listing.by_text:
        if "caption" in columns[split] and not clean(columns[split]["caption"][position]):
            columns[split]["caption"][position] = text
    _count_rows(listing, cfg)
    _fill_from_classes(name, columns, listing.by_class, listing.origins, cfg)
    for file in sorted(set(sidecars.values()) - listing.used):
        if PurePosixPath(file).stem.lower() not in NOT_IMAGE_NAMES:
            described_too = _is_below(file, described)
            leave_out(left_out, "text files beside metadata" if described_too else TEXTS, file)
    unlisted = [file for file in images if _is_below(file, described) and file not in listed]
    for file in unlisted:
        leave_out(left_out, "not in the metadata", file)
    forms = [*sorted({PurePosixPath(file).name for file in metadata}), *(["caption files"] if listing.used else [])]
    forms += ["one folder per class"] if not forms and use_labels and labels != {None} else []
    notes = {
        "form": f"folder of images{', ' if forms else ''}{', '.join(forms)}",
        "captions_from": dict(listing.origins),
        "files_of_several_lines": listing.of_lines,
        "shared_caption_files": [files for files in listing.served.values() if len(files) > 1],
        "files_not_in_metadata": len(unlisted),
        "files_outside_splits": listing.outside,
        "left_out": left_out,
    }
    if "train" not in columns:
        columns.clear()
    if depth == 1 and not (listing.by_row or listing.used):  # Captions of its own would make `train` a split.
        _refuse_class_train(name, images)
    _refuse_look_alikes(name, columns.get("train", {"image": []})["image"], depth)
    return columns, notes, listing.quarantine


def _add_described(
    listing: _Listing, name: str, files: list[str], images: list[str], metadata: list[str], cfg: SourceConfig
) -> set[str]:
    """Add the images that the metadata files name, and return their names."""
    listed = set()
    exact, there = set(files), {plain_name(file): file for file in files}
    near_files: _NearFiles | None = None  # Made only when a file is missing.
    tables = {file: metadata_rows(listing.folder / file, cfg.caption_column) for file in metadata}
    rows = [row for table in tables.values() for _, row in table]
    keys = dict.fromkeys(key for row in rows for key in row)
    split_column = next((key for key in keys if names_splits(name, key, (row.get(key) for row in rows))), None)
    for file, table in tables.items():
        for line, row in table:
            where = f"{listing.folder / file}, line {line}"
            target = _inside(str(PurePosixPath(file).parent), row.pop("file_name", None), where, row)
            target = target if target in exact else there.get(plain_name(target), target)
            listed.add(target)
            if target not in exact:
                near_files = near_files or _NearFiles(images)
                if near := near_files.find(target):
                    listing.refuse(target, f"missing file: did you mean {near}?", listing.split_of(target))
                    continue
            if cfg.label_names and PurePosixPath(file).suffix.lower() == ".csv":
                row |= {key: whole_number(row[key]) for key in ("label", "labels") if key in row}
            split = listing.split_of(target)
            if split_column:
                split = told_split(where, split_column, row.get(split_column), split, target)
            if split is None:
                listing.pass_by(target)
            else:
                listing.by_row.append((split, PurePosixPath(file).name, any(key in row for key in caption_keys(cfg))))
                if not cfg.caption_column and isinstance(row.get("text"), (str, list)):
                    listing.by_text.append((split, listing.count(split), row["text"]))
                _add_row(listing.columns, split, {**row, "image": target})
    return listed


def _count_rows(listing: _Listing, cfg: SourceConfig) -> None:
    """Count where the captions of rows in metadata files come from."""
    if not listing.by_row:
        return
    captioned = {split: any(key in part for key in caption_keys(cfg)) for split, part in listing.columns.items()}
    label = {split: next((key for key in LABELS if key in part), None) for split, part in listing.columns.items()}
    for split, file, has_caption in listing.by_row:
        if has_caption:
            listing.origins[f"from {file}"] += 1
        elif captioned[split] or not label[split]:
            listing.origins["without any"] += 1
        else:
            listing.origins[f"from the class, column {label[split]!r} of {file}"] += 1


def _add_image(listing: _Listing, file: str, sidecars: dict[str, str], use_labels: bool) -> None:
    """Add an image that no metadata file describes, with a caption from the file beside the image or from the class."""
    split = listing.split_of(file)
    if not _is_utf8(file):  # Neither Arrow nor JSON can hold such a name.
        shown = file.encode("utf-8", "backslashreplace").decode()
        listing.refuse(shown, "unreadable: the file's name is not UTF-8", split)
    elif PurePosixPath(file).suffix.lower() in RAW:  # Pillow would take the thumbnail inside for the photo.
        listing.refuse(file, "format not allowed: camera raw", split)
    elif split is None:
        listing.pass_by(file)
    else:
        row: dict[str, Any] = {"image": file}
        if beside := _sidecars_of(file, sidecars):
            row["caption"] = read_sidecar(listing.folder / beside[0])
            listing.origins[f"from {PurePosixPath(beside[0]).suffix.lower()} files"] += 1
            listing.of_lines += isinstance(row["caption"], list)
            listing.used.update(beside)
            listing.served.setdefault(beside[0], []).append(file)
            for other in beside[1:]:
                leave_out(listing.left_out, "caption files beside another that is read", other)
        if use_labels and (label := _class_of(file, listing.depth)) is not None:
            row["label"] = label
        if not beside:
            listing.by_class.append((split, listing.count(split), row.get("label")))
        _add_row(listing.columns, split, row)


def told_split(where: str, column: str, value: Any, split: str | None, target: str) -> str:
    """Return the split that a metadata row names.

    Args:
        where: file and line of the row, for the message.
        column: name of the split column.
        value: value of the split column in this row.
        split: split of the folder that holds the image, or None.
        target: file name of the image.

    Raises:
        UserError: the value is empty, or it contradicts the validation or test folder that holds the image.
    """
    told = split_name(str(value or ""))
    if told is None:
        raise UserError(f"{where}: column {column!r} is empty; write train, validation or test")
    if split not in (None, "train", told):
        raise UserError(
            f"{where}: column {column!r} says {told}, but {target} lies in the folder of {split}; "
            "correct the value, move the file, or rename the column"
        )
    return told


def names_splits(name: str, column: str, values: Iterable[Any]) -> bool:
    """Return whether a column names the split of each row (`named_splits`).

    Raises:
        UserError: the column names several splits, but not train.
    """
    splits = named_splits(column, values)
    if splits and "train" not in splits:
        raise UserError(
            f"{name}: column {column!r} names {' and '.join(sorted(splits))} but no train; write train into the rows to train on"
        )
    return bool(splits)


def _refuse_class_train(name: str, images: list[str]) -> None:
    """Raise `UserError` if the folder `train` may be a class, since only its images would be trained on."""
    if beside := folders_beside_train(images):
        train = next(file.split("/")[0] for file in images if "/" in file and split_name(file.split("/")[0]))
        shown = f"{', '.join(beside[:3])}{', …' if len(beside) > 3 else ''}"
        raise UserError(
            f"{name}: the folder {train} may be a class, like the folders beside it ({shown}); rename it (for example to "
            f"trains) to use all folders, or give --dataset {Path(name) / train} to use only this folder"
        )


def _refuse_look_alikes(name: str, images: list[str], depth: int) -> None:
    """Raise `UserError` if folders that would all be trained on look like splits, since one may be a test set.

    Below the folder of a split, at a `depth` above 0, a folder with the exact name of a split is a class.
    """
    if not depth and (folder := split_among_classes(images)):
        above = folder.rpartition("/")[0]
        raise UserError(
            f"{name}: the folder {folder} is named like a split but lies beside class folders, so it would be trained on; "
            f"move the classes into {above + '/' if above else ''}train/, or rename the folder"
        )
    alike = split_look_alikes(images)
    if not alike:
        return
    parent = str(PurePosixPath(next(iter(alike))).parent)
    splits = ", ".join(dict.fromkeys(alike.values()))
    if "train" not in alike.values():
        fix = "rename the folder with the training images to train"
    elif all(parent == "." or _is_below(image, (parent,)) for image in images):
        fix = f"rename these folders to {splits}"
    else:
        fix = f"make folders {splits} at the top of the data set, with the other folders inside"
    train = [folder for folder, split in alike.items() if split == "train"]
    only = f", or give --dataset {Path(name) / train[0]} to use only that folder" if len(train) == 1 else ""
    raise UserError(f"{name}: {', '.join(alike)} look like splits; {fix}{only}")


def _sidecars(files: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the caption files, and the caption files that are hidden by another one.

    Returns:
        Caption files by their own path with the extension in lower case, such as `rose/0.jpg.txt`. Then the hidden files:
        a hidden file's path differs from another caption file's path only in the case of the extension.
    """
    found: dict[str, str] = {}
    hidden: list[str] = []
    for file in files:
        suffix = PurePosixPath(file).suffix
        if suffix.lower() in SIDECARS:
            key = plain_name(without_suffix(file) + suffix.lower())
            if key in found:
                hidden.append(found[key] if suffix.islower() else file)
            if key not in found or suffix.islower():
                found[key] = file
    return found, hidden


def _sidecars_of(file: str, sidecars: dict[str, str]) -> list[str]:
    """Return the caption files of an image, of which only the first is read."""
    names = dict.fromkeys((without_suffix(file), file))  # Both are equal if the file has no extension.
    keys = (plain_name(name) + suffix for name in names for suffix in SIDECARS)
    return [sidecars[key] for key in keys if key in sidecars]


def _fill_from_classes(
    name: str, columns: dict[str, dict[str, list[Any]]], by_class: list[tuple[str, int, str | None]],
    origins: Counter[str], cfg: SourceConfig,
) -> None:  # fmt: skip
    """If only some images have captions, caption the others by their class."""
    keys = (*cfg.caption_column, "caption", "text")
    column = {split: next((key for key in keys if key in part), None) for split, part in columns.items()}
    lacking = [(split, row, label_name(label, cfg.label_names)) for split, row, label in by_class if column[split]]
    if any(label for _, _, label in lacking):
        check_label_names((label for _, _, label in lacking), cfg, name)
    for split, row, label in lacking:
        if label:
            columns[split][str(column[split])][row] = unlisted(label_captions(label, cfg.caption_template))
    for part in columns.values():  # If a column holds texts and lists of texts, each text becomes a list.
        for key in keys:
            if any(isinstance(value, list) for value in part.get(key, ())):
                part[key] = [[value] if isinstance(value, str) else value for value in part[key]]
    for _, _, label in by_class:
        origins["from class names" if label else "without any"] += 1


def _inside(base: str, target: Any, where: str, row: dict[str, Any]) -> str:
    """Return the file name in a metadata row as a path in the dataset folder.

    Raises:
        UserError: the row has no file name, or a file name that is invalid or leads outside the folder.
    """
    if not isinstance(target, str) or not target:
        raise UserError(f"{where} has no file_name (it has {', '.join(map(str, row)) or 'nothing'}); add a file_name")
    path = PurePosixPath(target.replace("\\", "/"))
    if "\0" in target or not _is_utf8(target):
        raise UserError(f"{where} has the file_name {target!r}, which no file can have; correct the name")
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", target):
        raise UserError(
            f"{where} names {target!r}, which is outside the folder of the metadata file; name only files inside that folder"
        )
    return str(PurePosixPath(base) / path)


class _NearFiles:
    """Find the image that a misspelled file name in metadata probably means.

    The names may differ in case, spaces, extension or folder.
    """

    def __init__(self, images: list[str]):
        self.by_name: list[dict[str, list[str]]] = []
        for image in images:
            for depth, name in enumerate(self.names(image)):
                if depth == len(self.by_name):
                    self.by_name.append({})
                self.by_name[depth].setdefault(name, []).append(image)

    @staticmethod
    def names(path: str) -> list[str]:
        plain_path = re.sub(r"[\s_-]|%20", "", plain_name(path)).lower()
        ends = PurePosixPath(plain_path).suffix in READABLE
        stem = without_suffix(plain_path) if ends else plain_path
        return [plain_path, stem, PurePosixPath(plain_path).name, PurePosixPath(stem).name]

    def find(self, target: str) -> str | None:
        found = (known.get(name) for known, name in zip(self.by_name, self.names(target), strict=False))
        near = next(filter(None, found), [])
        return near[0] if len(near) == 1 else None


def _add_row(columns: dict[str, dict[str, list[Any]]], split: str, row: dict[str, Any]) -> None:
    part = columns.setdefault(split, {"image": []})
    count = len(part["image"])
    for key in [key for key in row if key not in part]:
        part[key] = [None] * count
    for key, values in part.items():
        values.append(row.get(key))


def _is_below(file: str, folders: tuple[str, ...]) -> bool:
    return any(folder == "." or file.startswith(folder + "/") for folder in folders)


def _class_of(file: str, depth: int) -> str | None:
    parents = file.split("/")[depth:-1]
    return parents[-1] if parents else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _folder_rows(columns: dict[str, list[Any]]) -> datasets.Dataset:
    for key, values in columns.items():
        try:
            pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            # Examples: 5 and "five" in one column, integers beyond 64 bits, half an emoji.
            lists = all(value is None or isinstance(value, list) for value in values)
            columns[key] = [_as_text(value, lists) for value in values]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


def _as_text(value: Any, keep_list: bool) -> Any:
    if keep_list and isinstance(value, list):
        return [_as_text(item, keep_list=False) for item in value]
    return None if value is None else str(value).encode("utf-8", "replace").decode()
