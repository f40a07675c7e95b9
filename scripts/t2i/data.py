"""Captioned images from any source, prepared once as pixels on disk; stable splits; the stateless sampler.

`load_splits` accepts by one option (`DataConfig.dataset`):

| input | captions |
|---|---|
| Hub id, folder with Parquet shards (`save_dataset_folder`) | column `caption`, else `text`, else from the label |
| `[train/]<class>/x.jpg` | from the class name, by `caption_template` |
| images with `metadata.jsonl` or `metadata.csv` (`file_name`, …) | column `caption`, else `text`, else from `label` |
| images with `x.txt` beside `x.jpg` | the text file |

Where captions exist at all, an empty one stays empty: such an image is kept, and trained as unconditional.

Splits: the data set's own train, validation and test are used. Without a validation split, an image goes there when the
SHA-256 of (split_seed, its file's bytes) falls below `validation_fraction`. Images that are added, removed or renamed
move no other image, and identical images land on the same side. If that takes none (a tiny data set), the image with
the lowest hash goes, and the one with the highest always stays to train; a single image has no validation split.
`max_train_samples` takes the first by the same hash, before decoding, so undecodable ones among them are not replaced.
"""

from __future__ import annotations

import csv
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE
from tqdm import tqdm

from t2i.config import DataConfig
from t2i.images import TRANSFORM_VERSION, BadImage, decode_image, fit, read_image_file
from t2i.runs import UserError, hash_json, read_json, sha256_file, write_json

CACHE_VERSION = 1  # part of every cache key: change it with what a cache folder holds
WORKERS = min(8, len(os.sched_getaffinity(0)))  # Pillow and hashlib release the GIL, so threads serve
ROWS_PER_BATCH = 1000  # rows in memory at a time while captions are written
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# All else in a folder is tried as an image, whatever its extension: what cannot be decoded shows in the quarantine.
NOT_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".html", ".py", ".lock"}
NOT_IMAGE_NAMES = {"readme", "license", "licence", "copying", "notice", "thumbs.db", "desktop.ini", "sha256sums"}
NOT_CLASS_NAMES = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "data"}


@dataclass
class Split:
    """`pixels[i]` (uint8 [N, R, R, 3], memory mapped, read-only) belongs to `rows[i]`.

    `rows` (memory mapped) has the strings `id` (16 hex digits of the image file's SHA-256; copies share it), `file`,
    `caption`, where known `label`, and the data set's other plain columns. `fingerprint` names the pixels, not the
    captions.
    """

    pixels: np.ndarray
    rows: datasets.Dataset
    fingerprint: str

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass
class Splits:
    """What `load_splits` found. `validation` and `test` are None where there are no such images."""

    train: Split
    validation: Split | None
    test: Split | None
    quarantine: list[dict[str, str]]  # file, split, reason of each image that was left out
    fingerprint: str  # of everything: images, captions, settings
    report: dict[str, Any]


@dataclass
class _Source:
    name: str
    identity: str  # hash of the content: another one, another cache
    open: Callable[[Path], dict[str, datasets.Dataset]]  # scratch folder -> candidates by split, images not decoded
    roots: tuple[Path, ...]  # images given by path must lie below one of these
    disk_bytes: int = 0  # what `open` writes to its scratch folder
    quarantine: list[dict[str, str]] = field(default_factory=list)  # found while listing
    notes: dict[str, Any] = field(default_factory=dict)  # for the report


def load_splits(cfg: DataConfig, say: Callable[[str], None] = print) -> Splits:
    """Find, check, split and prepare the images of `cfg.dataset`; a second call reuses the prepared pixels.

    The cache folder is named by the hash of the images' contents (not of times: a replaced file of the same size and
    time is still seen, and a copy of the data set elsewhere finds the same cache), their captions and every setting
    that shapes the result. Processes that want the same folder at once wait while the first builds it.

    `say` gets the progress messages. Raises UserError for a data set that is missing, empty or without captions, for a
    full disk, and where more than `cfg.max_bad_share` of the images cannot be used.
    """
    if "{label}" not in cfg.caption_template:
        raise UserError(
            f"caption_template {cfg.caption_template!r} lacks {{label}}; write e.g. 'a photo of a {{label}}'"
        )
    cache = Path(cfg.cache_dir).expanduser() / "pixels"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache_dir {cfg.cache_dir} cannot be made ({error.strerror}); give another --cache_dir"
        ) from None
    source = _find_source(cfg)
    settings = (
        *("resolution", "image_column", "caption_column", "caption_template", "label_names"),
        *("validation_fraction", "split_seed"),
    )
    key = hash_json(
        [CACHE_VERSION, TRANSFORM_VERSION, source.identity, cfg.max_train_samples, [getattr(cfg, s) for s in settings]]
    )
    folder = cache / key
    with FileLock(cache / f"{key}.lock"):
        if folder.is_dir():
            say(f"reusing the prepared images of {source.name} in {folder}")
        else:
            _build(source, cfg, folder, say)
            pa.default_memory_pool().release_unused()  # else Arrow keeps its buffers through the whole training
    report = read_json(folder / "report.json")
    quarantine = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    _check_bad_share(source.name, quarantine, report["found"], cfg.max_bad_share, folder / "quarantine.jsonl")
    train, validation, test = (
        _open_split(folder, name, report["splits"].get(name)) for name in ("train", "validation", "test")
    )
    if train is None:
        raise UserError(f"{source.name} has no usable training image; {folder / 'quarantine.jsonl'} says why")
    return Splits(train, validation, test, quarantine, fingerprint=key, report=report)


def _open_split(folder: Path, name: str, counts: dict[str, Any] | None) -> Split | None:
    if not counts or not counts["images"]:
        return None
    pixels = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    rows = datasets.Dataset.from_file(str(folder / f"{name}.arrow"))
    if len(pixels) != len(rows):
        raise UserError(f"the cache folder {folder} is damaged; delete it and run again")
    return Split(pixels, rows, counts["fingerprint"])


def _check_bad_share(name: str, quarantine: list[dict[str, str]], found: int, limit: float, listing: Path) -> None:
    share = len(quarantine) / max(1, found)
    if share > limit:
        shown = ", ".join(f"{row['file']} ({row['reason']})" for row in quarantine[:3])
        raise UserError(
            f"{len(quarantine):,} of {found:,} images of {name} ({share:.1%}) cannot be used, more than the "
            f"{limit:.1%} allowed: {shown}{', …' if len(quarantine) > 3 else ''}; all are listed in {listing}; "
            "mend or remove them, or raise --max_bad_share"
        )


# Sources: where the images are, and a hash of their content


def _find_source(cfg: DataConfig) -> _Source:
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


def _hub_source(name: str, revision: str | None) -> _Source:
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
    return _Source(name, identity, lambda scratch: rows, roots)


def _parquet_source(name: str, folder: Path, shards: list[str]) -> _Source:
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
    return _Source(name, identity, load, (folder,), disk_bytes=2 * size)


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


def _folder_source(name: str, folder: Path, files: list[str]) -> _Source:
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
            contents = _in_order(pool, lambda image: _digest(image, (folder,)), (row["image"] for row in part))
            for row, content in zip(part, contents, strict=True):
                digest.update(json.dumps([split, row], default=str, sort_keys=True).encode())
                digest.update(content)
    identity = hash_json([digest.hexdigest(), quarantine])
    return _Source(name, identity, lambda scratch: rows, (folder,), quarantine=quarantine, notes=notes)


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
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # 5 and "five" in one column
            columns[key] = [None if value is None else str(value) for value in values]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


# Preparing: digests, splits, pixels, rows


def _in_order(pool: Executor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`pool.map` that never holds more than a few items, so that memory does not grow with their number."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= 4 * WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _image_bytes(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """The file's bytes of an undecoded image cell; raises BadImage."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImage("missing image")
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(os.path.abspath(roots[0] / image["path"]))  # folds "..", keeps links: the Hub's cache is made of them
    if not any(path.is_relative_to(os.path.abspath(root)) for root in roots):
        raise BadImage("outside the dataset folder")
    return read_image_file(path)


def _digest(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """SHA-256 of the image file; of its path where it cannot be read."""
    try:
        return hashlib.sha256(_image_bytes(image, roots)).digest()
    except BadImage as error:
        return hashlib.sha256(f"{error.reason} {image and image['path']}".encode()).digest()


def _prepare(image: dict[str, Any] | None, roots: tuple[Path, ...], resolution: int) -> np.ndarray | BadImage:
    try:
        return fit(decode_image(_image_bytes(image, roots), draft_side=resolution), resolution)
    except BadImage as error:
        return error


def _hash_order(digests: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each digest (uint8 [N, 32]), the same for the same content and seed: float64 [N]."""
    salt = f"{seed}:".encode()
    words = (hashlib.sha256(salt + digest.tobytes()).digest()[:8] for digest in digests)
    return np.fromiter((int.from_bytes(word) >> 11 for word in words), np.float64, len(digests)) / 2**53


def _choose(order: np.ndarray, cfg: DataConfig, own_validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """(train indices, validation indices) within the data set's train split; see the module's docstring."""
    to_validation = np.zeros(len(order), bool)
    if not own_validation and len(order) and cfg.validation_fraction > 0:
        to_validation = (order < cfg.validation_fraction) | (order == order.min())
        to_validation &= order < order.max()
    train = np.flatnonzero(~to_validation)
    if cfg.max_train_samples is not None:
        train = np.sort(train[np.argsort(order[train], kind="stable")[: cfg.max_train_samples]])
    return train, np.flatnonzero(to_validation)


def _build(source: _Source, cfg: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Write a cache folder in a sibling and rename it: whoever sees the folder sees it complete."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a build that was killed: the lock is ours
    part.mkdir()
    try:
        _build_in(part, source, cfg, folder, say)
        shutil.rmtree(part / "source", ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk of {folder.parent} is full; make room, or give another --cache_dir") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _build_in(part: Path, source: _Source, cfg: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    _check_room(part, source.disk_bytes)
    candidates = source.open(part / "source")
    for split, rows in candidates.items():
        candidates[split] = _check_image_column(rows, cfg, source.name, split)
    captions = {split: _caption_columns(rows, cfg, source.name, split) for split, rows in candidates.items()}
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = {split: _digests(pool, rows, cfg, source.roots) for split, rows in candidates.items()}
        order = _hash_order(digests["train"], cfg.split_seed)
        train, validation = _choose(order, cfg, "validation" in candidates)
        chosen = {"train": ("train", train), "validation": ("train", validation)}
        for split in [name for name in candidates if name != "train"]:
            chosen[split] = (split, np.arange(len(candidates[split])))
        count = sum(len(indices) for _, indices in chosen.values())
        size = count * cfg.resolution**2 * 3
        say(f"preparing {count:,} images of {source.name}, {cfg.resolution} px: {size / 1e6:,.0f} MB in {folder}")
        _check_room(part, size + 1000 * count)

        quarantine = list(source.quarantine)
        splits: dict[str, dict[str, Any]] = {}
        with tqdm(total=count, desc="images", unit="image", mininterval=0.5) as bar:
            for split, (origin, indices) in chosen.items():
                rows = candidates[origin]
                kept = _write_pixels(
                    part / f"{split}.npy", pool, rows, indices, cfg, source.roots, split, quarantine, bar
                )
                empty = _write_rows(part / f"{split}.arrow", rows, kept, digests[origin], origin, cfg, captions[origin])
                fingerprint = hash_json([TRANSFORM_VERSION, cfg.resolution, digests[origin][kept].tobytes().hex()])
                splits[split] = {"images": len(kept), "empty_captions": empty, "fingerprint": fingerprint}
                digests[f"kept {split}"] = digests[origin][kept]
    if splits["train"]["images"] and splits["train"]["empty_captions"] == splits["train"]["images"]:
        raise UserError(f"all captions of {source.name} are empty; {_CAPTION_MEND}")
    found = count + len(source.quarantine)
    left_out = len(candidates["train"]) - len(train) - len(validation)
    report = {
        "dataset": source.name,
        "found": found,
        "splits": splits,
        "validation_from": "its own split" if "validation" in candidates else "train, by content hash",
        "not_used_because_of_max_train_samples": left_out,
        "quarantined": len(quarantine),
        "quarantined_by_reason": dict(Counter(row["reason"].split(":")[0] for row in quarantine).most_common()),
        "duplicates": _count_duplicates(digests),
        **source.notes,
    }
    with open(part / "quarantine.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantine)
    write_json(part / "report.json", report)
    if quarantine:
        say(
            f"left out {len(quarantine):,} of {found:,} images: {report['quarantined_by_reason']}; "
            "quarantine.jsonl there lists them"
        )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > 0.98 * free:
        raise UserError(
            f"the disk of {folder.parent} has {free / 1e6:,.0f} MB free and {size / 1e6:,.0f} MB are needed; "
            "make room, give another --cache_dir, or a smaller --resolution or --max_train_samples"
        )


def _count_duplicates(digests: dict[str, np.ndarray]) -> dict[str, int]:
    """Copies within a split, and images of validation and test that are in train as well."""
    unique = {name: set(map(bytes, digests.get(f"kept {name}", ()))) for name in ("train", "validation", "test")}
    counts = {name: len(digests.get(f"kept {name}", ())) - len(unique[name]) for name in unique}
    counts |= {f"{name}_also_in_train": len(unique[name] & unique["train"]) for name in ("validation", "test")}
    return counts


def _digests(pool: Executor, rows: datasets.Dataset, cfg: DataConfig, roots: tuple[Path, ...]) -> np.ndarray:
    """SHA-256 of each image file: uint8 [N, 32]."""
    images = (row[cfg.image_column] for row in rows.select_columns([cfg.image_column]))
    digests = np.empty((len(rows), 32), np.uint8)
    hashed = _in_order(pool, lambda image: _digest(image, roots), images)
    for index, digest in enumerate(tqdm(hashed, total=len(rows), desc="hashes", unit="image", delay=3)):
        digests[index] = np.frombuffer(digest, np.uint8)
    return digests


def _write_pixels(
    path: Path, pool: Executor, rows: datasets.Dataset, indices: np.ndarray, cfg: DataConfig,
    roots: tuple[Path, ...], split: str, quarantine: list[dict[str, str]], bar: tqdm,
) -> np.ndarray:  # fmt: skip
    """Write the decodable ones of `rows[indices]` as an .npy array and return their indices; list the others.

    Plain appending, not a writable memory map: dirty pages of a map would count as this process's memory.
    """
    images = (row[cfg.image_column] for row in rows.select_columns([cfg.image_column]).select(indices))
    results = _in_order(pool, lambda image: (image and image["path"], _prepare(image, roots, cfg.resolution)), images)
    good = np.zeros(len(indices), bool)
    with open(path, "wb") as file:
        _write_npy_header(file, len(indices), cfg.resolution)
        data_start = file.tell()
        for position, (name, result) in enumerate(results):
            if isinstance(result, BadImage):
                shown = _shown_file(name, split, int(indices[position]))
                quarantine.append({"file": shown, "split": split, "reason": result.reason})
            else:
                good[position] = True
                file.write(result.tobytes())
            bar.update()
        file.seek(0)  # numpy pads the header so that the first axis may be rewritten
        _write_npy_header(file, int(good.sum()), cfg.resolution)
        if file.tell() != data_start:
            raise RuntimeError("numpy's header changed its length")
        file.flush()
        os.fsync(file.fileno())
    return indices[good]


def _write_npy_header(file: Any, count: int, resolution: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, resolution, resolution, 3)}
    np.lib.format.write_array_header_1_0(file, header)


def _shown_file(path: str | None, split: str, index: int) -> str:
    if not path:
        return f"{split}[{index}]"
    return Path(path).name if os.path.isabs(path) else path


# Captions

_CAPTION_MEND = (
    "add a caption column, a metadata.jsonl, .txt files beside the images, or one folder a class; --caption_column "
    "names another column"
)


def _check_image_column(rows: datasets.Dataset, cfg: DataConfig, name: str, split: str) -> datasets.Dataset:
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


def _caption_columns(rows: datasets.Dataset, cfg: DataConfig, name: str, split: str) -> tuple[str | None, str | None]:
    """(caption column, label column), each None where there is none. Only the training split must have one of them."""
    columns = rows.column_names
    label = next((column for column in ("label", "labels") if column in columns), None)
    if label is None:
        label = next((key for key, value in rows.features.items() if isinstance(value, datasets.ClassLabel)), None)
    if cfg.caption_column is not None:
        if split == "train":
            _require_column(rows, cfg.caption_column, "--caption_column", name, split)
        caption = cfg.caption_column if cfg.caption_column in columns else None
    else:
        caption = next((column for column in ("caption", "text") if column in columns), None)
    if caption is None and split == "train":
        if label is None:
            raise UserError(f"{name} has neither captions nor labels (columns: {', '.join(columns)}); {_CAPTION_MEND}")
        kind = rows.features[label]
        if isinstance(kind, datasets.Value) and kind.dtype not in ("string", "large_string") and not cfg.label_names:
            raise UserError(f"{name} has no captions, and its {label!r} is a number without a name; {_CAPTION_MEND}")
    return caption, label


def _write_rows(
    path: Path, rows: datasets.Dataset, kept: np.ndarray, digests: np.ndarray, split: str, cfg: DataConfig,
    columns: tuple[str | None, str | None],
) -> int:  # fmt: skip
    """Write id, file, caption, label and other plain columns of `rows[kept]`; returns the number of empty captions."""
    caption, label = columns
    taken = {"id", "file", "caption", "label", "labels", cfg.image_column, caption, label}
    text = datasets.Value("string")
    features: dict[str, Any] = {"id": text, "file": text, "caption": text} | ({"label": text} if label else {})
    others = [key for key, kind in rows.features.items() if key not in taken and _is_plain(kind)]
    features |= {
        key: text if isinstance(rows.features[key], datasets.ClassLabel) else rows.features[key] for key in others
    }
    schema = datasets.Features(features).arrow_schema
    needed = [key for key in (cfg.image_column, caption, label, *others) if key]
    rows = rows.select_columns(list(dict.fromkeys(needed)))
    empty = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(kept), ROWS_PER_BATCH):
            chosen = kept[start : start + ROWS_PER_BATCH]
            part = rows.select(chosen)
            paths = _image_paths(part, cfg.image_column)
            batch = part.remove_columns([cfg.image_column])[:] if len(needed) > 1 else {}
            batch = {key: [_plain(rows.features[key], value) for value in values] for key, values in batch.items()}
            out = {key: batch[key] for key in others}
            if label:
                out["label"] = [_label_name(value, cfg.label_names) for value in batch[label]]
            if caption:
                captions = [_clean(value) for value in batch[caption]]
            elif label:
                captions = [label_caption(value, cfg.caption_template) for value in out["label"]]
            else:
                captions = [""] * len(chosen)
            empty += captions.count("")
            out |= {"id": [digests[index].tobytes().hex()[:16] for index in chosen], "caption": captions}
            out["file"] = [_shown_file(path, split, int(index)) for path, index in zip(paths, chosen, strict=True)]
            writer.write_table(pa.Table.from_pydict({key: out[key] for key in schema.names}, schema=schema))
    return empty


def _image_paths(rows: datasets.Dataset, column: str) -> list[str | None]:
    """The images' paths, read in Arrow, where their bytes need not become Python objects."""
    images = rows.select_columns([column]).with_format("arrow")
    parts = (batch[column].combine_chunks().field("path") for batch in images.iter(100))
    return [path for part in parts for path in part.to_pylist()]


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and "binary" not in kind.dtype)


def _plain(kind: Any, value: Any) -> Any:
    if isinstance(kind, datasets.ClassLabel) and value is not None:
        return kind.int2str(value) if value >= 0 else None  # -1 stands for "no label"
    return value


def _clean(value: Any) -> str:
    """One line of text; of a list of captions the first that is not empty."""
    if isinstance(value, (list, tuple)):
        return next((text for text in map(_clean, value) if text), "")
    return "" if value is None else " ".join(str(value).split())


def _label_name(value: Any, names: list[str]) -> str | None:
    """A label as text; a number from 1 on by its name in `names`, where there are names."""
    text = None if value is None else str(value)
    if names and text is not None and text.isdecimal() and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    return text


def label_caption(label: str | None, template: str) -> str:
    """The caption that a label gets by `template`; empty for no label."""
    words = _clean(re.sub(r"[_-]", " ", label)) if label is not None else ""
    return template.replace("{label}", words) if words else ""


def count_long_captions(captions: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """How many captions the tokenizer cuts: `limit` and `longest` (tokens, with start and end), `over` (captions)."""
    limit, over, longest = int(tokenizer.model_max_length), 0, 0
    batch: list[str] = []
    for caption in chain(captions, [None]):
        if caption is not None:
            batch.append(caption)
        if batch and (caption is None or len(batch) == ROWS_PER_BATCH):
            lengths = [len(ids) for ids in tokenizer(batch, truncation=False, verbose=False)["input_ids"]]
            over, longest = over + sum(length > limit for length in lengths), max(longest, *lengths)
            batch = []
    return {"limit": limit, "over": over, "longest": longest}


# The sampler: which image comes when is a function of (n, seed, step) alone, so that resuming needs no saved position


@lru_cache(2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` samples in an epoch: a permutation, int64 [n], read-only, a pure function of its arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False  # it is cached
    return order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The samples of global step `step` (from 0), over all processes: int64 [batch_size].

    Steps run through the epochs without a seam: every sample comes once an epoch, and a batch may span an epoch's end.
    A process takes `[rank::world]` of it.
    """
    if n < 1:
        raise ValueError("no samples")
    parts, position, end = [], step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, n)
        parts.append(epoch_order(n, seed, epoch)[offset : offset + end - position])
        position += len(parts[-1])
    return np.concatenate(parts)
