"""Captioned images from any source, prepared once as pixels on disk; stable splits; the stateless sampler.

`load_splits` reads what `t2i.data.sources` finds: Hub ids, Parquet folders, imagefolders, images with captions beside them.

Splits: the data set's own train, validation and test are used. Without a validation split, an image goes there when the
SHA-256 of (split_seed, its file's bytes) falls below `validation_fraction`. Images that are added, removed or renamed
move no other image, and identical images land on the same side. If that takes none (a tiny data set), the image with
the lowest hash goes, and the one with the highest always stays to train; a single image has no validation split.
`max_train_samples` takes the first by the same hash, before decoding, so undecodable ones among them are not replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from t2i.config import DataConfig, SourceConfig
from t2i.data import overview
from t2i.data.images import HEIF_FIX, TRANSFORM_VERSION, BadImage, decode_image, fit
from t2i.data.sources import (
    CAPTION_FIX,
    OTHER_SPLITS,
    WORKERS,
    Source,
    caption_columns,
    check_image_column,
    clean,
    find_source,
    has_numbers,
    image_bytes,
    image_digest,
    in_order,
    is_plain,
    label_caption,
    label_name,
    plain,
    prefixed,
    shown_file,
)
from t2i.errors import UserError
from t2i.files import hash_json, read_json, write_json
from t2i.runs import prepared_folder

CACHE_VERSION = 1  # part of every cache key: change it with what a cache folder holds
ROWS_PER_BATCH = 1000  # rows in memory at a time while captions are written


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


def load_splits(cfg: DataConfig, say: Callable[[str], None] = print, captions: bool = True) -> Splits:
    """Find, check, split and prepare the images of `cfg.dataset`; a second call reuses the prepared pixels.

    The cache folder is named by the hash of the images' contents (not of times: a replaced file of the same size and
    time is still seen, and a copy of the data set elsewhere finds the same cache), their captions and every setting
    that shapes the result. Processes that want the same folder at once wait while the first builds it.

    captions: whether each image needs one; the autoencoder's training reads none.
    `say` gets the progress messages, and the table of what was understood (`t2i.data.overview`).

    Raises UserError for a data set that is missing, empty or without captions, for a
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
    source = find_source(cfg)
    settings = (
        *("resolution", "image_column", "caption_column", "caption_template", "label_names"),
        *("validation_fraction", "split_seed"),
    )
    shaping = [getattr(cfg, name) for name in settings]
    shaping += [cfg.caption_prefix] if cfg.caption_prefix else []  # without one, caches of before stay
    shaping += [] if HEIF_FIX else ["heif"]  # photos that were left out before are read now
    key = hash_json([CACHE_VERSION, TRANSFORM_VERSION, source.identity, cfg.max_train_samples, shaping])
    folder = prepared_folder(cfg.cache_dir, key)
    with FileLock(cache / f"{key}.lock"):
        if folder.is_dir():
            say(f"reusing the prepared images of {source.name} in {folder}")
        else:
            _build(source, cfg, folder, say, captions)
            pa.default_memory_pool().release_unused()  # else Arrow keeps its buffers through the whole training
    report = _report(folder, source) | {"caption_prefix": cfg.caption_prefix}
    if captions and report.get("captions_missing"):  # prepared for a training that needs none
        raise UserError(report["captions_missing"])
    say(overview.table(report))
    quarantine = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    check_bad_share(source.name, quarantine, report["found"], cfg.max_bad_share, folder / "quarantine.jsonl")
    train, validation, test = _open_splits(folder, report)
    if train is None:
        raise UserError(f"{source.name} has no usable training image; {folder / 'quarantine.jsonl'} says why")
    return Splits(train, validation, test, quarantine, fingerprint=key, report=report)


def _report(folder: Path, source: Source) -> dict[str, Any]:
    """A cache folder's report, with what the data set's listing says now: what is left out belongs to no cache key."""
    report = read_json(folder / "report.json")
    if "understood" not in report:  # prepared before captions were counted
        report["understood"] = _describe(folder, [name for name, part in report["splits"].items() if part["images"]])
    other = {key: value for key, value in report.get("left_out", {}).items() if key == OTHER_SPLITS}
    left_out = {**source.notes.get("left_out", {}), **other}
    return {**report, **source.notes, "dataset": source.name, "left_out": left_out}


def _describe(folder: Path, splits: Iterable[str]) -> dict[str, Any]:
    columns = {}
    for name in splits:
        with pa.OSFile(str(folder / f"{name}.arrow")) as file:
            rows = pa.ipc.open_stream(file).read_all()
            kept = [key for key in ("file", "caption", "label") if key in rows.column_names]
            columns[name] = rows.select(kept).to_pydict()
    return overview.describe(columns)


def open_prepared(folder: Path) -> tuple[Split | None, Split | None, Split | None]:
    """Train, validation and test split of a finished cache folder (`runs.prepared_folder`), without its data set.

    Raises `UserError` for a folder that is missing or damaged.
    """
    try:
        return _open_splits(folder, read_json(folder / "report.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(
            f"the cache folder {folder} is damaged ({type(error).__name__}); delete it and run again"
        ) from None


def _open_splits(folder: Path, report: dict[str, Any]) -> tuple[Split | None, Split | None, Split | None]:
    train, validation, test = (
        _open_split(folder, name, report["splits"].get(name)) for name in ("train", "validation", "test")
    )
    return train, validation, test


def _open_split(folder: Path, name: str, counts: dict[str, Any] | None) -> Split | None:
    if not counts or not counts["images"]:
        return None
    pixels = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    rows = datasets.Dataset.from_file(str(folder / f"{name}.arrow"))
    if len(pixels) != len(rows):
        raise UserError(f"the cache folder {folder} is damaged; delete it and run again")
    return Split(pixels, rows, counts["fingerprint"])


def check_bad_share(name: str, quarantine: list[dict[str, str]], found: int, limit: float, listing: Path) -> None:
    share = len(quarantine) / max(1, found)
    if share > limit:
        shown = ", ".join(f"{row['file']} ({row['reason']})" for row in quarantine[:3])
        raise UserError(
            f"{len(quarantine):,} of {found:,} images of {name} ({share:.1%}) cannot be used, more than the "
            f"{limit:.1%} allowed: {shown}{', …' if len(quarantine) > 3 else ''}; all are listed in {listing}; "
            "fix or remove them, or raise --max_bad_share"
        )


# Preparing: digests, splits, pixels, rows


def _prepare(image: dict[str, Any] | None, roots: tuple[Path, ...], resolution: int) -> np.ndarray | BadImage:
    try:
        return fit(decode_image(image_bytes(image, roots), draft_side=resolution), resolution)
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


def _build(source: Source, cfg: DataConfig, folder: Path, say: Callable[[str], None], need_captions: bool) -> None:
    """Write a cache folder in a sibling and rename it: whoever sees the folder sees it complete."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a build that was killed: the lock is ours
    part.mkdir()
    try:
        _build_in(part, source, cfg, folder, say, need_captions)
        shutil.rmtree(part / "source", ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk of {folder.parent} is full; make room, or give another --cache_dir") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _build_in(
    part: Path, source: Source, cfg: DataConfig, folder: Path, say: Callable[[str], None], need_captions: bool
) -> None:
    _check_room(part, source.disk_bytes)
    candidates = source.open(part / "source")
    for split, rows in candidates.items():
        candidates[split] = check_image_column(rows, cfg, source.name, split)
    listed = source.notes.get("left_out")
    missing = ""  # why there are no captions, where none are needed
    captions: dict[str, tuple[str | None, str | None]]
    try:
        captions = {split: caption_columns(rows, cfg, source.name, split, listed) for split, rows in candidates.items()}
    except UserError as error:
        if need_captions:
            raise
        missing, captions = str(error), dict.fromkeys(candidates, (None, None))
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
        several = 0
        with tqdm(total=count, desc="images", unit="image", mininterval=0.5) as bar:
            for split, (origin, indices) in chosen.items():
                rows = candidates[origin]
                kept = _write_pixels(
                    part / f"{split}.npy", pool, rows, indices, cfg, source.roots, split, quarantine, bar
                )
                empty, lists = _write_rows(
                    part / f"{split}.arrow", rows, kept, digests[origin], origin, cfg, captions[origin]
                )
                several += lists
                fingerprint = hash_json([TRANSFORM_VERSION, cfg.resolution, digests[origin][kept].tobytes().hex()])
                splits[split] = {"images": len(kept), "empty_captions": empty, "fingerprint": fingerprint}
                digests[f"kept {split}"] = digests[origin][kept]
    if not missing and splits["train"]["images"] and splits["train"]["empty_captions"] == splits["train"]["images"]:
        missing = f"all captions of {source.name} are empty; {_full_column(candidates['train'], cfg)}"
        if need_captions:
            raise UserError(missing)
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
        "several_captions": several,
        "caption_columns": caption_origins(candidates, captions, "captions_from" in source.notes, cfg),
        "understood": _describe(part, splits),
        **({"captions_missing": missing} if missing else {}),
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


def _full_column(rows: datasets.Dataset, cfg: DataConfig) -> str:
    """What fixes captions that are all empty: the other column that holds text, else the sentence for none."""
    for column in {"caption", "text"} & set(rows.column_names) - {cfg.caption_column or "caption"}:
        if any(map(clean, rows[column])):
            return f"column {column!r} holds text: give --caption_column {column}"
    return CAPTION_FIX


def count_several(captions: Iterable[Any]) -> int:
    """How many of these are lists of several captions."""
    return sum(isinstance(value, list) and sum(map(bool, value)) > 1 for value in captions)


def caption_origins(
    rows: dict[str, datasets.Dataset], captions: Mapping[str, tuple[str | None, str | None]], counted: bool,
    cfg: SourceConfig,
) -> list[str]:  # fmt: skip
    """Where the captions of each split come from, in words; a folder's files are `counted` instead."""
    found: dict[str, list[str]] = {}
    for split, (caption, label) in captions.items():
        if not (counted and caption in (None, "caption") and label in (None, "label")):
            origin = f"column {caption!r}" if caption else f"class, column {label!r}" if label else "none"
            found.setdefault(origin, []).append(split)
    said = [origin if len(found) == 1 else f"{origin} ({', '.join(splits)})" for origin, splits in found.items()]
    if cfg.caption_column is None and any(
        captions[split][0] == "caption" and "text" in rows[split].column_names for split in captions
    ):
        where = "is read where 'caption' is empty" if counted else "is not used, as there is 'caption'"
        said.append(f"column 'text' {where}")
    named = [(rows[split], label) for split, (caption, label) in captions.items() if label and not caption]
    if cfg.label_names and named and not any(has_numbers(part, str(label), cfg) for part, label in named):
        said.append("--label_names is not used, as no class is a number")
    return said


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
    hashed = in_order(pool, lambda image: image_digest(image, roots), images)
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
    results = in_order(pool, lambda image: (image and image["path"], _prepare(image, roots, cfg.resolution)), images)
    good = np.zeros(len(indices), bool)
    with open(path, "wb") as file:
        _write_npy_header(file, len(indices), cfg.resolution)
        data_start = file.tell()
        for position, (name, result) in enumerate(results):
            if isinstance(result, BadImage):
                shown = shown_file(name, split, int(indices[position]))
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


def _write_rows(
    path: Path, rows: datasets.Dataset, kept: np.ndarray, digests: np.ndarray, split: str, cfg: DataConfig,
    columns: tuple[str | None, str | None],
) -> tuple[int, int]:  # fmt: skip
    """Write id, file, caption, label and other plain columns of `rows[kept]`.

    Returns the number of empty captions, and of images with several.
    """
    caption, label = columns
    taken = {"id", "file", "caption", "label", "labels", cfg.image_column, caption, label}
    text = datasets.Value("string")
    features: dict[str, Any] = {"id": text, "file": text, "caption": text} | ({"label": text} if label else {})
    others = [key for key, kind in rows.features.items() if key not in taken and is_plain(kind)]
    features |= {
        key: text if isinstance(rows.features[key], datasets.ClassLabel) else rows.features[key] for key in others
    }
    schema = datasets.Features(features).arrow_schema
    needed = [key for key in (cfg.image_column, caption, label, *others) if key]
    rows = rows.select_columns(list(dict.fromkeys(needed)))
    empty = several = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(kept), ROWS_PER_BATCH):
            chosen = kept[start : start + ROWS_PER_BATCH]
            part = rows.select(chosen)
            paths = _image_paths(part, cfg.image_column)
            batch = part.remove_columns([cfg.image_column])[:] if len(needed) > 1 else {}
            batch = {key: [plain(rows.features[key], value) for value in values] for key, values in batch.items()}
            out = {key: batch[key] for key in others}
            if label:
                out["label"] = [label_name(value, cfg.label_names) for value in batch[label]]
            if caption:
                captions = [clean(value) for value in batch[caption]]
                several += count_several(batch[caption])
            elif label:
                captions = [label_caption(value, cfg.caption_template) for value in out["label"]]
            else:
                captions = [""] * len(chosen)
            empty += captions.count("")
            captions = [prefixed(text, cfg.caption_prefix) for text in captions]
            out |= {"id": [digests[index].tobytes().hex()[:16] for index in chosen], "caption": captions}
            out["file"] = [shown_file(path, split, int(index)) for path, index in zip(paths, chosen, strict=True)]
            writer.write_table(pa.Table.from_pydict({key: out[key] for key in schema.names}, schema=schema))
    return empty, several


def _image_paths(rows: datasets.Dataset, column: str) -> list[str | None]:
    """The images' paths, read in Arrow, where their bytes need not become Python objects."""
    images = rows.select_columns([column]).with_format("arrow")
    parts = (batch[column].combine_chunks().field("path") for batch in images.iter(100))
    return [path for part in parts for path in part.to_pylist()]


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
