"""Prepare captioned images from any source once, as pixels on disk, with stable splits and a stateless sampler.

`load_splits` takes the records of a source (`t2i.data.records`), decodes their images and writes a cache folder.
`t2i.data.prepared` opens the cache folder.

The data set's own train, validation and test splits are used. If there is no validation split, images are taken from the
train split: those whose SHA-256 of (split_seed, bytes of the image file) falls below `validation_fraction`. Adding,
removing or renaming an image therefore moves no other image, and identical images land in the same split. In a tiny data
set, no hash may be low enough. Then the image with the lowest hash becomes the validation split. The image with the
highest hash always stays in the train split, so a data set of one image has no validation split.

`max_train_samples` takes the images with the lowest hashes before any image is decoded. Undecodable images among them are
not replaced by others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from t2i.captions.texts import check_templates, clean
from t2i.config import DataConfig, check_dataset
from t2i.config_types import unlisted
from t2i.data import overview
from t2i.data.images import (
    CROPS_VERSION,
    HEIF_FIX,
    TRANSFORM_VERSION,
    BadImage,
    decode_image,
    fit,
    image_bytes,
    random_crop,
)
from t2i.data.prepared import OWN_VALIDATION, Split, check_bad_share, open_splits, repair_all
from t2i.data.records import (
    CAPTION_FIX,
    ROWS_PER_BATCH,
    Candidates,
    Record,
    Source,
    caption_origins,
    find_captions,
    open_candidates,
    shown_file,
)
from t2i.data.repairs import LEFT_OUT, Repairs, read_repairs
from t2i.data.sources import find_source
from t2i.data.workers import WORKERS, in_order
from t2i.errors import UserError
from t2i.files import hash_json, json_lines, read_json, write_json
from t2i.runs import prepared_folder

CACHE_VERSION = 1  # Part of every cache key. Change it if the content of a cache folder changes.


@dataclass
class Splits:
    """The prepared splits of a data set, as `load_splits` returns them."""

    train: Split
    validation: Split | None  # The validation split, or None if there are no validation images.
    test: Split | None  # The test split, or None if there are no test images.
    quarantine: list[dict[str, str]]  # File, split and reason of each image that was left out.
    fingerprint: str  # Hash of everything: images, captions and settings.
    report: dict[str, Any]  # The report of the cache folder, as `report.json` holds it.
    repairs: Repairs = field(default_factory=Repairs)  # The repairs that were applied; see `t2i.data.repairs`.

    def repair_hashes(self, captions: bool = True) -> dict[str, str]:
        """Return the hashes of the repairs that shape a training, by name. Without repairs, there are none.

        Args:
            captions: whether the training reads captions.
        """
        hashes = {"left_out_hash": self.repairs.left_out_hash()}
        hashes |= {"edits_hash": self.repairs.edits_hash()} if captions else {}
        return {name: value for name, value in hashes.items() if value}


def load_splits(cfg: DataConfig, say: Callable[[str], None] = print, captions: bool = True) -> Splits:
    """Find, check, split and prepare the images of `cfg.dataset`. A second call reuses the prepared pixels.

    The cache folder is named by a hash of the images' contents, their captions and every setting that shapes the result.
    So a replaced file of the same size and time is noticed, and a copied data set finds the same cache.
    If several processes want the same folder, one builds it and the others wait.

    Args:
        cfg: the data set and its settings.
        say: function that prints the progress messages and the summary table (`t2i.data.overview`).
        captions: whether the training needs captions. The training of the autoencoder needs none.

    Raises:
        UserError: the data set is missing, empty or without captions, the disk is full, or more than
            `cfg.max_bad_share` of the images are bad.
    """
    check_templates(cfg.caption_template)
    cache = Path(cfg.cache_dir).expanduser() / "pixels"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache_dir {cfg.cache_dir} cannot be made ({error.strerror}); give another --cache_dir"
        ) from None
    repairs = read_repairs(check_dataset(cfg.dataset))  # Before minutes of decoding.
    source = find_source(cfg)
    settings = (
        *("resolution", "image_column", "caption_column", "caption_template", "label_names"),
        *("validation_fraction", "split_seed"),
    )
    shaping = [getattr(cfg, name) for name in settings]
    shaping[2:4] = map(unlisted, shaping[2:4])  # Older caches, made with one column and one template, stay valid.
    shaping += [cfg.caption_prefix] if cfg.caption_prefix else []  # Older caches without a prefix stay valid.
    shaping += [CROPS_VERSION, cfg.random_crops] if cfg.random_crops else []
    shaping += [] if HEIF_FIX else ["heif"]  # With pillow-heif, photos are read that were left out without it.
    key = hash_json([CACHE_VERSION, TRANSFORM_VERSION, source.identity, cfg.max_train_samples, shaping])
    with FileLock(cache / f"{key}.lock"):
        folder = _find(cfg.cache_dir, key)
        if folder:
            say(f"reusing the prepared images of {source.name} in {folder}")
        else:
            folder = _build(source, cfg, key, say, captions)
            pa.default_memory_pool().release_unused()  # Otherwise Arrow keeps its buffers during the whole training.
    report = overview.read_report(folder, source) | {"caption_prefix": cfg.caption_prefix}
    if captions and report.get("captions_missing"):  # The images were prepared for a training without captions.
        raise UserError(report["captions_missing"])
    say(overview.table(report))
    quarantine = list(json_lines(folder / "quarantine.jsonl"))
    check_bad_share(source.name, quarantine, report["found"], cfg.max_bad_share, folder / "quarantine.jsonl")
    train, validation, test = repair_all(open_splits(folder, report), repairs, report, cfg, say)
    if train is None:
        if repairs.left_out:
            raise UserError(f"{cfg.dataset} has no training image that is not left out; shorten its {LEFT_OUT}")
        raise UserError(
            f"{source.name} has no usable training image; {folder / 'quarantine.jsonl'} lists the reasons: fix the images"
        )
    return Splits(train, validation, test, quarantine, folder.name, report, repairs)


# Preparing: digests, splits, pixels, rows


def _hash_order(digests: np.ndarray, seed: int) -> np.ndarray:
    """Map each digest (uint8 [N, 32]) to a number in [0, 1), float64 [N].

    The number is a function of the digest and the seed only.
    """
    salt = f"{seed}:".encode()
    words = (hashlib.sha256(salt + digest.tobytes()).digest()[:8] for digest in digests)
    return np.fromiter((int.from_bytes(word) >> 11 for word in words), np.float64, len(digests)) / 2**53


def _choose(order: np.ndarray, cfg: DataConfig, own_validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (train indices, validation indices) within the data set's train split, by the rules in the module docstring."""
    to_validation = np.zeros(len(order), bool)
    if not own_validation and len(order) and cfg.validation_fraction > 0:
        to_validation = (order < cfg.validation_fraction) | (order == order.min())
        to_validation &= order < order.max()
    train = np.flatnonzero(~to_validation)
    if cfg.max_train_samples is not None:
        train = np.sort(train[np.argsort(order[train], kind="stable")[: cfg.max_train_samples]])
    return train, np.flatnonzero(to_validation)


def _several_key(key: str) -> str:
    """Return the key of a cache whose images have several captions. Older versions stored only the first ones, under `key`."""
    return hash_json([key, "several captions"])


def _find(cache_dir: str, key: str) -> Path | None:
    """Return the cache folder of a data set, or None if no folder holds all of its captions."""
    several, single = prepared_folder(cache_dir, _several_key(key)), prepared_folder(cache_dir, key)
    if several.is_dir():
        return several
    return single if single.is_dir() and not read_json(single / "report.json").get("several_captions") else None


def _build(source: Source, cfg: DataConfig, key: str, say: Callable[[str], None], need_captions: bool) -> Path:
    """Write the cache folder under another name and rename it at the end, so it appears only when it is complete.

    Returns:
        The cache folder. Its name depends on whether images have several captions.
    """
    folder = prepared_folder(cfg.cache_dir, key)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # A killed process left it. This process holds the lock.
    part.mkdir()
    try:
        if _build_in(part, source, cfg, folder.parent, say, need_captions):
            folder = prepared_folder(cfg.cache_dir, _several_key(key))
        shutil.rmtree(part / "source", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier version, which took repeated captions for several
        os.replace(part, folder)
        return folder
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk of {folder.parent} is full; free some space, or give another --cache_dir"
            ) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _build_in(
    part: Path, source: Source, cfg: DataConfig, folder: Path, say: Callable[[str], None], need_captions: bool
) -> int:
    """Write what a cache folder holds into `part`. Return the number of images with several captions."""
    _check_room(part, source.disk_bytes)
    candidates = open_candidates(source.open(part / "source"), source, cfg)
    missing = find_captions(candidates, source)
    if missing and need_captions:
        raise UserError(missing)
    rows = {split: images.rows for split, images in candidates.items()}
    columns = {split: (images.captions, images.label) for split, images in candidates.items()}
    origins = caption_origins(rows, columns, "captions_from" in source.notes, cfg)
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = {split: images.digests(pool) for split, images in candidates.items()}
        order = _hash_order(digests["train"], cfg.split_seed)
        train, validation = _choose(order, cfg, "validation" in candidates)
        chosen = {"train": ("train", train), "validation": ("train", validation)}
        for split in [name for name in candidates if name != "train"]:
            chosen[split] = (split, np.arange(len(candidates[split])))
        count = sum(len(indices) for _, indices in chosen.values())
        size = (count + cfg.random_crops * len(train)) * cfg.resolution**2 * 3
        say(f"preparing {count:,} images of {source.name}, {cfg.resolution} px: {size / 1e6:,.0f} MB in {folder}")
        _check_room(part, size + 1000 * count)

        quarantine = list(source.quarantine)
        splits: dict[str, dict[str, Any]] = {}
        several = 0
        with tqdm(total=count, desc="images", unit="image", mininterval=0.5) as bar:
            for split, (origin, indices) in chosen.items():
                writer = _SplitWriter(
                    part, split, len(indices), cfg.resolution, candidates[origin], digests[origin],
                    crops=cfg.random_crops if split == "train" else 0,
                )  # fmt: skip
                with writer:
                    _write_split(writer, pool, candidates[origin].records(indices), quarantine, bar)
                kept_digests = digests[origin][writer.kept]
                fingerprint = hash_json([TRANSFORM_VERSION, cfg.resolution, kept_digests.tobytes().hex()])
                splits[split] = {
                    "images": len(writer.kept), "empty_captions": writer.empty, "fingerprint": fingerprint,
                    **({"crops": writer.crops} if writer.crops else {}),
                }  # fmt: skip
                several += writer.several
                digests[f"kept {split}"] = kept_digests
    if not missing and splits["train"]["images"] and splits["train"]["empty_captions"] == splits["train"]["images"]:
        missing = f"all captions of {source.name} are empty; {_full_column(candidates['train'].rows, cfg)}"
        if need_captions:
            raise UserError(missing)
    found = count + len(source.quarantine)
    left_out = len(candidates["train"]) - len(train) - len(validation)
    report = {
        "dataset": source.name,
        "found": found,
        "splits": splits,
        "validation_from": OWN_VALIDATION if "validation" in candidates else "train, by content hash",
        "not_used_because_of_max_train_samples": left_out,
        "quarantined": len(quarantine),
        "quarantined_by_reason": dict(Counter(row["reason"].split(":")[0] for row in quarantine).most_common()),
        "duplicates": _count_duplicates(digests),
        "several_captions": several,
        "caption_columns": origins,
        "understood": overview.describe_folder(part, splits),
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
    return several


def _write_split(
    writer: _SplitWriter, pool: Executor, records: Iterable[Record], quarantine: list[dict[str, str]], bar: tqdm
) -> None:
    """Decode and write the images of the records, and add undecodable images to `quarantine`."""
    for record, pixels in in_order(pool, lambda record: (record, _decode(record, writer)), records):
        if isinstance(pixels, BadImage):
            shown = shown_file(record.path, writer.split, record.index)
            quarantine.append({"file": shown, "split": writer.split, "reason": pixels.reason})
        else:
            writer.add(record, pixels)
        bar.update()


def _decode(record: Record, writer: _SplitWriter) -> np.ndarray | BadImage:
    """Return an image and its random crops, uint8 [1 + crops, R, R, 3]."""
    resolution = writer.resolution
    try:
        image = decode_image(image_bytes(record.image, record.roots), draft_side=resolution)
    except BadImage as error:
        return error
    seed = int.from_bytes(writer.digests[record.index].tobytes()[:8])
    crops = (random_crop(image, resolution, [seed, number]) for number in range(writer.crops))
    return np.stack([fit(image, resolution), *crops])


class _SplitWriter:
    """Write the pixels (.npy), random crops (.crops.npy) and rows (.arrow) of a split, in the order of the added images.

    Pixels are appended to the files. Written through a memory map, they would count as memory of this process.
    """

    def __init__(
        self, folder: Path, split: str, most: int, resolution: int, images: Candidates, digests: np.ndarray,
        crops: int = 0,
    ) -> None:  # fmt: skip
        self.split, self.most, self.resolution, self.crops = split, most, resolution, crops
        self.digests = digests  # Digests of all images in the source's split.
        self.kept: list[int] = []  # Rows of the added images in the source's split.
        self.empty = self.several = 0  # Numbers of added images without a caption, and with several captions.
        self._path, self._has_labels, self._schema = folder / split, images.label is not None, images.schema
        self._has_several = isinstance(
            datasets.Features.from_arrow_schema(images.schema).get("captions"), datasets.List
        )
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> _SplitWriter:
        shape = (self.resolution, self.resolution, 3)
        self._files = [_ArrayWriter(self._path.with_suffix(".npy"), self.most, shape)]
        if self.crops:
            self._files.append(_ArrayWriter(self._path.with_suffix(".crops.npy"), self.most, (self.crops, *shape)))
        self._arrow = pa.OSFile(str(self._path.with_suffix(".arrow")), "wb")
        self._stream = pa.ipc.new_stream(self._arrow, self._schema)
        return self

    def add(self, record: Record, pixels: np.ndarray) -> None:
        for file, rows in zip(self._files, (pixels[0], pixels[1:]), strict=False):
            file.append(rows)
        self.kept.append(record.index)
        self.empty += not record.captions[0]
        self.several += len(record.captions) > 1
        digest = self.digests[record.index].tobytes().hex()
        row = {"id": digest[:16], "file": record.file, "caption": record.captions[0], **record.extras}
        row |= {"captions": record.captions} if self._has_several else {}
        self._rows.append(row | {"label": record.label} if self._has_labels else row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush_rows()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush_rows()
                for file in self._files:
                    file.finish(len(self.kept))
        finally:
            self._stream.close()
            self._arrow.close()
            for file in self._files:
                file.close()

    def _flush_rows(self) -> None:
        if self._rows:
            columns = {key: [row[key] for row in self._rows] for key in self._schema.names}
            self._stream.write_table(pa.Table.from_pydict(columns, schema=self._schema))
            self._rows = []


class _ArrayWriter:
    """Append rows to an uint8 array in numpy's format, whose number of rows is known at the end.

    Args:
        most: largest number of rows.
        shape: shape of a row.
    """

    def __init__(self, path: Path, most: int, shape: tuple[int, ...]) -> None:
        self._file, self._shape = open(path, "wb"), shape  # noqa: SIM115
        self._write_header(most)
        self._start = self._file.tell()

    def append(self, row: np.ndarray) -> None:
        self._file.write(row.tobytes())

    def finish(self, count: int) -> None:
        self._file.seek(0)  # numpy pads the header, so the first axis can be rewritten.
        self._write_header(count)
        if self._file.tell() != self._start:
            raise RuntimeError("numpy's header changed its length")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write_header(self, count: int) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _full_column(rows: datasets.Dataset, cfg: DataConfig) -> str:
    """Return the fix for a data set whose captions are all empty: another column with text, or how to add captions."""
    for column in {"caption", "text"} & set(rows.column_names) - set(cfg.caption_column or ["caption"]):
        if any(map(clean, rows[column])):
            return f"column {column!r} holds text: give --caption_column {column}"
    return CAPTION_FIX


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > 0.98 * free:
        raise UserError(
            f"the disk of {folder.parent} has {free / 1e6:,.0f} MB free, but {size / 1e6:,.0f} MB are needed; free some "
            "space, give another --cache_dir, or give a smaller --resolution or --max_train_samples"
        )


def _count_duplicates(digests: dict[str, np.ndarray]) -> dict[str, int]:
    """Count the copies within each split, and the validation and test images that are also in the train split."""
    unique = {name: set(map(bytes, digests.get(f"kept {name}", ()))) for name in ("train", "validation", "test")}
    counts = {name: len(digests.get(f"kept {name}", ())) - len(unique[name]) for name in unique}
    counts |= {f"{name}_also_in_train": len(unique[name] & unique["train"]) for name in ("validation", "test")}
    return counts


def count_long_captions(captions: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """Count the captions that the tokenizer cuts off.

    Returns:
        `limit`: tokens that the tokenizer keeps, start and end tokens included. `longest`: tokens of the longest caption.
        `over`: number of captions longer than the limit.
    """
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


# The sampler: the order of the images is a function of (n, seed, step) only, so resuming needs no saved position


@lru_cache(2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `n` samples in an epoch: a permutation, int64 [n], read-only.

    The order is a pure function of the arguments.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False  # The array is cached, so no caller may change it.
    return order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the indices of the samples in the global batch of step `step` (from 0): int64 [batch_size].

    Every sample occurs once per epoch. A batch may contain the end of one epoch and the beginning of the next.
    Process `rank` of `world` processes takes the part `[rank::world]` of the global batch.
    """
    if n < 1:
        raise ValueError("no samples")
    parts, position, end = [], step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, n)
        parts.append(epoch_order(n, seed, epoch)[offset : offset + end - position])
        position += len(parts[-1])
    return np.concatenate(parts)
