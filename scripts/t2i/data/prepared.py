"""Open prepared images for a training: memory-mapped pixels, and a row of text per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from t2i.config import DataConfig
from t2i.data.repairs import LEFT_OUT, Repairs
from t2i.errors import UserError
from t2i.files import read_json

OWN_VALIDATION = "its own split"  # `validation_from` of a data set that brings a validation split.


class Selection:
    """Some rows of a memory-mapped array, which are read as if there were no others.

    Attributes:
        array: the array with all rows, [M, ...].
        kept: numbers of the selected rows, int64 [N].
        is_cut: whether more rows could be selected. Their cache is then not that of the whole array.
    """

    def __init__(self, array: np.ndarray, kept: np.ndarray, *, is_cut: bool = False) -> None:
        self.array, self.kept, self.is_cut = array, kept, is_cut
        self.shape, self.dtype = (len(kept), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, *rest = key if isinstance(key, tuple) else (key,)
        return self.array[(self.kept[rows], *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array[self.kept].astype(dtype or self.dtype, copy=False)


@dataclass
class Split:
    """The prepared images of one split.

    Attributes:
        pixels: the images, uint8 [N, R, R, 3], memory-mapped and read-only. `pixels[i]` belongs to `rows[i]`. If images
            are left out, it is a `Selection`.
        rows: a row of text per image, memory-mapped. Each row has the strings `id`, `file` and `caption`, `label` if the
            data set has labels, and the data set's other plain columns. `id` is 16 hex digits of the image file's
            SHA-256, so copies of an image have the same `id`. `caption` is the first caption of the image. If images may
            have several captions, the list `captions` holds all of them.
        fingerprint: hash of the pixels, which does not depend on the captions. It covers images that are left out, so a
            longer list of them changes no cache.
        crops: random crops of the images, uint8 [N, K, R, R, 3], as `pixels` otherwise. None if there are none.
    """

    pixels: np.ndarray | Selection
    rows: datasets.Dataset
    fingerprint: str
    crops: np.ndarray | Selection | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, limit: int | None) -> np.ndarray | Selection:
        """Return the first `limit` images, or all images, to compute a cache of."""
        if limit is None or limit >= len(self) or not isinstance(self.pixels, Selection):
            return self.pixels[:limit] if isinstance(self.pixels, np.ndarray) else self.pixels
        return Selection(self.pixels.array, self.pixels.kept[:limit], is_cut=True)

    def versions(self, indices: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Return the images at `indices`, or for each entry of `crops` above 0 that random crop: uint8 [B, R, R, 3]."""
        images = self.pixels[indices]
        for row in np.flatnonzero(crops):
            images[row] = self.crops[indices[row : row + 1], crops[row] - 1][0]  # type: ignore[index]
        return images

    @property
    def crop_count(self) -> int:
        """Return the number of random crops of each image."""
        return 0 if self.crops is None else self.crops.shape[1]

    def captions(self, limit: int | None = None) -> list[list[str]]:
        """Return all captions of the first `limit` images, or of all images: at least one each, which may be empty."""
        if isinstance(self.rows.features.get("captions"), datasets.List):
            return list(self.rows["captions"][:limit])
        return [[caption] for caption in self.rows["caption"][:limit]]


def open_prepared(folder: Path) -> tuple[Split | None, Split | None, Split | None]:
    """Return the train, validation and test split of a finished cache folder (`runs.prepared_folder`).

    Opening a cache folder does not read the original data set. A split without images is returned as None.

    Raises:
        UserError: the cache folder is missing or damaged.
    """
    try:
        return open_splits(folder, read_json(folder / "report.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(
            f"the cache folder {folder} is damaged ({type(error).__name__}); delete the folder and run again"
        ) from None


def open_splits(folder: Path, report: dict[str, Any]) -> tuple[Split | None, Split | None, Split | None]:
    train, validation, test = (
        _open_split(folder, name, report["splits"].get(name)) for name in ("train", "validation", "test")
    )
    return train, validation, test


def _open_split(folder: Path, name: str, counts: dict[str, Any] | None) -> Split | None:
    if not counts or not counts["images"]:
        return None
    pixels = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    rows = datasets.Dataset.from_file(str(folder / f"{name}.arrow"))
    crops = None
    if counts.get("crops"):
        crops = np.load(folder / f"{name}.crops.npy", mmap_mode="r", allow_pickle=False)
    is_whole = crops is None or crops.shape[:2] == (len(rows), counts["crops"])
    if len(pixels) != len(rows) or not is_whole:
        raise UserError(f"the cache folder {folder} is damaged; delete the folder and run again")
    return Split(pixels, rows, counts["fingerprint"], crops)


def repair(split: Split, repairs: Repairs, own_split: str, prefix: str) -> tuple[Split | None, int, int]:
    """Apply the repairs of a data set to a prepared split.

    Args:
        split: the split as `open_splits` returns it.
        repairs: the repairs of the data set.
        own_split: the data set's own split, from which the images come.
        prefix: the `--caption_prefix` of the captions.

    Returns:
        The repaired split, or None if no image is kept. The number of images left out, and of kept images with another
        caption.
    """
    rows = split.rows
    ids, files = list(rows["id"]), list(rows["file"])
    is_left_out = repairs.is_left_out(ids, files, own_split)
    captions = split.captions()
    changed: dict[int, list[str]] = {}
    for row in [row for row, image in enumerate(ids) if image in repairs.edits]:
        texts = repairs.edited_captions(ids[row], captions[row], prefix)
        if texts != captions[row]:
            captions[row] = changed[row] = texts
    if changed:
        columns: dict[str, list[Any]] = {"caption": [texts[0] for texts in captions]}
        columns |= {"captions": captions} if isinstance(rows.features.get("captions"), datasets.List) else {}
        for name, values in columns.items():
            rows = rows.remove_columns(name).add_column(name, values, feature=split.rows.features[name])
    pixels, crops = split.pixels, split.crops
    if is_left_out.any():
        kept = np.flatnonzero(~is_left_out)
        rows, pixels = rows.select(kept), Selection(np.asanyarray(split.pixels), kept)
        crops = crops if crops is None else Selection(np.asanyarray(crops), kept)
    edited = sum(not is_left_out[row] for row in changed)
    repaired = Split(pixels, rows, split.fingerprint, crops) if len(pixels) else None
    return repaired, int(is_left_out.sum()), edited


def repair_all(
    splits: tuple[Split | None, ...], repairs: Repairs, report: dict[str, Any], cfg: DataConfig,
    say: Callable[[str], None],
) -> list[Split | None]:  # fmt: skip
    """Apply the repairs to the train, validation and test split, and say what they changed."""
    names = ("train", "validation", "test")
    if not (repairs.left_out or repairs.edits):
        return list(splits)
    is_drawn = report["validation_from"] != OWN_VALIDATION
    found: list[Split | None] = []
    left_out: dict[str, int] = {}
    edited = 0
    for name, split in zip(names, splits, strict=True):
        own_split = "train" if name == "validation" and is_drawn else name
        repaired, without, changed = (split, 0, 0)
        if split is not None:
            repaired, without, changed = repair(split, repairs, own_split, cfg.caption_prefix or "")
        found.append(repaired)
        left_out |= {name: without} if without else {}
        edited += changed
    shown = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
    say(
        f"repairs of {cfg.dataset}: {sum(left_out.values()):,} images left out by {LEFT_OUT}"
        f"{f' ({shown})' if shown else ''}, {edited:,} images with edited captions"
    )
    return found


def check_bad_share(name: str, quarantine: list[dict[str, str]], found: int, limit: float, listing: Path) -> None:
    share = len(quarantine) / max(1, found)
    if share > limit:
        shown = ", ".join(f"{row['file']} ({row['reason']})" for row in quarantine[:3])
        raise UserError(
            f"{len(quarantine):,} of {found:,} images of {name} ({share:.1%}) cannot be used, more than the "
            f"{limit:.1%} allowed: {shown}{', …' if len(quarantine) > 3 else ''}; {listing} lists all of them; "
            "fix or remove these images, or raise --max_bad_share"
        )
