"""Where captioned images come from: folders, Parquet, the Hub; candidates by split, not yet decoded.

`find_source` accepts by one option (`SourceConfig.dataset`):

| input | captions |
|---|---|
| Hub id, folder with Parquet shards (`save_dataset_folder`) | column `caption`, else `text`, else from the label |
| `[train/]<class>/x.jpg` | from the class name, by `caption_template` |
| images with `metadata.jsonl` or `metadata.csv` (`file_name`, …) | column `caption`, else `text`, else from `label` |
| images with `x.txt` beside `x.jpg` | the text file |

Where captions exist at all, an empty one stays empty: such an image is kept, and trained as unconditional.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub.constants import HF_HUB_CACHE

from t2i.config import SourceConfig
from t2i.images import BadImage, read_image_file
from t2i.runs import UserError, hash_json, sha256_file

WORKERS = min(8, len(os.sched_getaffinity(0)))  # Pillow and hashlib release the GIL, so threads serve
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# All else in a folder is tried as an image, whatever its extension: what cannot be decoded shows in the quarantine.
NOT_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".html", ".py", ".lock"}
NOT_IMAGE_NAMES = {"readme", "license", "licence", "copying", "notice", "thumbs.db", "desktop.ini", "sha256sums"}
NOT_CLASS_NAMES = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "data"}
CAPTION_MEND = (
    "add a caption column, a metadata.jsonl, .txt files beside the images, or one folder a class; --caption_column "
    "names another column"
)


@dataclass
class Source:
    name: str
    identity: str  # hash of the content: another one, another cache
    open: Callable[[Path], dict[str, datasets.Dataset]]  # scratch folder -> candidates by split, images not decoded
    roots: tuple[Path, ...]  # images given by path must lie below one of these
    disk_bytes: int = 0  # what `open` writes to its scratch folder
    quarantine: list[dict[str, str]] = field(default_factory=list)  # found while listing
    notes: dict[str, Any] = field(default_factory=dict)  # for the report


def find_source(cfg: SourceConfig) -> Source:
    name = cfg.dataset
    if not name:
        raise UserError("no data set given; add --dataset with a Hub id, a dataset folder or a folder of images")
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = _list_files(folder)
        shards = [file for file in files if file.endswith(".parquet")]
        return _parquet_source(name, folder, shards) if shards else _folder_source(name, folder, files)
    if folder.exists():
        raise UserError(f"--dataset {name} is a file; give the folder that holds it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise UserError(
            f"--dataset {name!r}: there is no such folder, and a Hub id is written owner/name; mend the path"
        )
    return _hub_source(name, cfg.dataset_revision)


def _list_files(folder: Path) -> list[str]:
    """Relative paths (with /) of all files below `folder`, sorted by folder; no hidden ones; links are followed."""
    found, seen = [], set()
    for current, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:  # a link to a folder above, or one more link to the same folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inside = PurePosixPath(os.path.relpath(current, folder))
        found += [str(inside / name) for name in sorted(files) if not name.startswith(".")]
    return found


def _hub_source(name: str, revision: str | None) -> Source:
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # network, spelling, access, format: datasets raises a dozen types
        raise UserError(
            f"--dataset {name!r}: there is no such folder here, and the Hub data set could not be loaded "
            f"({_cause(error)}); check the spelling and the network, or give the path of a folder"
        ) from error
    rows = _name_splits(name, loaded)
    identity = hash_json(
        [[split, [sha256_file(Path(f["filename"])) for f in rows[split].cache_files]] for split in rows]
    )
    roots = (Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
    return Source(name, identity, lambda scratch: rows, roots)


def _parquet_source(name: str, folder: Path, shards: list[str]) -> Source:
    card = folder / "README.md"
    front = card.read_text(encoding="utf-8").split("---")[1:2] if card.is_file() else []  # which shard is which split
    identity = hash_json([front, [[shard, sha256_file(folder / shard)] for shard in shards]])

    def load(scratch: Path) -> dict[str, datasets.Dataset]:
        try:
            return _name_splits(name, datasets.load_dataset(str(folder.resolve()), cache_dir=str(scratch)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--dataset {name}: its Parquet files cannot be read ({_cause(error)}); mend or rewrite them"
            ) from error

    size = sum((folder / shard).stat().st_size for shard in shards)
    return Source(name, identity, load, (folder,), disk_bytes=2 * size)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _name_splits(name: str, loaded: datasets.DatasetDict) -> dict[str, datasets.Dataset]:
    rows: dict[str, datasets.Dataset] = {}
    for split, part in loaded.items():
        known = SPLIT_NAMES.get(str(split).lower())
        if known and known not in rows and len(part):
            rows[known] = part
    if "train" not in rows and len(loaded) == 1 and not rows:
        rows["train"] = next(iter(loaded.values()))
    if not len(rows.get("train", ())):
        raise UserError(
            f"{name} has no images to train on (splits: {', '.join(map(str, loaded))}); name one of them train"
        )
    return rows


def _folder_source(name: str, folder: Path, files: list[str]) -> Source:
    tops = {file.split("/")[0] for file in files if "/" in file}
    has_train = any(SPLIT_NAMES.get(top.lower()) == "train" for top in tops)
    if tops and not has_train and all(top.lower() in SPLIT_NAMES for top in tops):
        raise UserError(
            f"{name} has the splits {', '.join(sorted(tops))} but no train; name the folder to train on train"
        )
    columns, notes, quarantine = _folder_columns(name, folder, files, has_train)
    if not columns:
        raise UserError(f"{name} holds no images to train on; give a folder with photos, Parquet shards, or a Hub id")

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


def _folder_columns(
    name: str, folder: Path, files: list[str], has_train: bool
) -> tuple[dict[str, dict[str, list[Any]]], dict[str, Any], list[dict[str, str]]]:
    """Columns by split (image; where known caption, label, the metadata's), notes, and what cannot be listed."""
    columns: dict[str, dict[str, list[Any]]] = {}
    quarantine: list[dict[str, str]] = []

    def split_of(file: str) -> str | None:
        return SPLIT_NAMES.get(file.split("/")[0].lower()) if has_train else "train"

    metadata = [file for file in files if PurePosixPath(file).name in ("metadata.jsonl", "metadata.csv")]
    described = tuple(str(PurePosixPath(file).parent) for file in metadata)
    if len(set(described)) < len(described):
        raise UserError(f"{name} has metadata.jsonl and metadata.csv in one folder; keep one of them")
    listed, outside = set(), 0
    for file in metadata:
        for line, row in _metadata_rows(folder / file):
            target = _inside(
                str(PurePosixPath(file).parent), row.pop("file_name", None), f"{folder / file}, line {line}", row
            )
            listed.add(target)
            split = split_of(target)
            if split is None:
                outside += 1
            else:
                _add_row(columns, split, {**row, "image": target})

    sidecars = {file for file in files if file.endswith(".txt")}
    images = [file for file in files if _may_be_image(file) and not _is_below(file, described)]
    labels = {_class_of(file, has_train) for file in images}
    use_labels = not (len(labels) == 1 and str(next(iter(labels))).lower() in NOT_CLASS_NAMES)
    for file in images:
        split = split_of(file)
        if not _is_utf8(file):  # neither Arrow nor JSON can hold such a name
            shown = file.encode("utf-8", "backslashreplace").decode()
            quarantine.append(
                {"file": shown, "split": split or "none", "reason": "unreadable: the file's name is not UTF-8"}
            )
        elif split is None:
            outside += 1
        else:
            known: dict[str, Any] = {"image": file}
            beside = str(PurePosixPath(file).with_suffix(".txt"))
            if beside in sidecars:
                known["caption"] = _read_sidecar(folder / beside)
            if use_labels and (label := _class_of(file, has_train)) is not None:
                known["label"] = label
            _add_row(columns, split, known)
    unlisted = sum(_may_be_image(file) and _is_below(file, described) and file not in listed for file in files)
    notes = {"files_not_in_metadata": unlisted, "files_outside_splits": outside}
    if "train" not in columns:
        columns.clear()
    return columns, notes, quarantine


def _metadata_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a metadata.jsonl or metadata.csv."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, {key: value for key, value in row.items() if key is not None}
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    parsed = json.loads(line)
                    if not isinstance(parsed, dict):
                        raise UserError(
                            f'{path}, line {number} is not a JSON object; write {{"file_name": …, "caption": …}}'
                        )
                    yield number, parsed
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); write it as UTF-8, one record a line") from None


def _inside(base: str, target: Any, where: str, row: dict[str, Any]) -> str:
    """A metadata row's file name as a path in the dataset folder; refused when it leads outside."""
    if not isinstance(target, str) or not target:
        raise UserError(f"{where} has no file_name (it has {', '.join(map(str, row)) or 'nothing'}); add it")
    path = PurePosixPath(target.replace("\\", "/"))
    if "\0" in target or not _is_utf8(target):
        raise UserError(f"{where} has the file_name {target!r}, which no file can have; mend it")
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", target):
        raise UserError(f"{where} names {target!r}, which is outside its folder; name files below it only")
    return str(PurePosixPath(base) / path)


def _read_sidecar(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"the caption file {path} cannot be read ({error.strerror}); mend or remove it") from None


def _add_row(columns: dict[str, dict[str, list[Any]]], split: str, row: dict[str, Any]) -> None:
    part = columns.setdefault(split, {"image": []})
    count = len(part["image"])
    for key in row.keys() - part.keys():
        part[key] = [None] * count
    for key, values in part.items():
        values.append(row.get(key))


def _may_be_image(file: str) -> bool:
    path = PurePosixPath(file)
    return path.suffix.lower() not in NOT_IMAGES and path.name.lower() not in NOT_IMAGE_NAMES


def _is_below(file: str, folders: tuple[str, ...]) -> bool:
    return any(folder == "." or file.startswith(folder + "/") for folder in folders)


def _class_of(file: str, has_train: bool) -> str | None:
    parents = file.split("/")[has_train:-1]
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
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):  # 5 and "five" in one column; half an emoji
            columns[key] = [
                None if value is None else str(value).encode("utf-8", "replace").decode() for value in values
            ]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


# Images and their hashes


def in_order(pool: Executor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`pool.map` that never holds more than a few items, so that memory does not grow with their number."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= 4 * WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def image_bytes(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """The file's bytes of an undecoded image cell; raises BadImage."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImage("missing image")
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(os.path.abspath(roots[0] / image["path"]))  # folds "..", keeps links: the Hub's cache is made of them
    if not any(path.is_relative_to(os.path.abspath(root)) for root in roots):
        raise BadImage("outside the dataset folder")
    return read_image_file(path)


def image_digest(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """SHA-256 of the image file; of its path where it cannot be read."""
    try:
        return hashlib.sha256(image_bytes(image, roots)).digest()
    except BadImage as error:
        return hashlib.sha256(f"{error.reason} {image and image['path']}".encode()).digest()


def shown_file(path: str | None, split: str, index: int) -> str:
    if not path:
        return f"{split}[{index}]"
    return Path(path).name if os.path.isabs(path) else path


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


def caption_columns(rows: datasets.Dataset, cfg: SourceConfig, name: str, split: str) -> tuple[str | None, str | None]:
    """(caption column, label column), each None where there is none. Only the training split must have one of them."""
    columns = rows.column_names
    label = label_column(rows)
    if cfg.caption_column is not None:
        if split == "train":
            _require_column(rows, cfg.caption_column, "--caption_column", name, split)
        caption = cfg.caption_column if cfg.caption_column in columns else None
    else:
        caption = next((column for column in ("caption", "text") if column in columns), None)
    if caption is None and split == "train":
        if label is None:
            raise UserError(f"{name} has neither captions nor labels (columns: {', '.join(columns)}); {CAPTION_MEND}")
        kind = rows.features[label]
        if isinstance(kind, datasets.Value) and kind.dtype not in ("string", "large_string") and not cfg.label_names:
            raise UserError(f"{name} has no captions, and its {label!r} is a number without a name; {CAPTION_MEND}")
    return caption, label


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
    text = None if value is None else str(value)
    if names and text is not None and text.isdecimal() and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    return text


def label_caption(label: str | None, template: str) -> str:
    """The caption that a label gets by `template`; empty for no label."""
    words = clean(re.sub(r"[_-]", " ", label)) if label is not None else ""
    return template.replace("{label}", words) if words else ""
