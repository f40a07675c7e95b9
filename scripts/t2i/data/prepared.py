"""The prepared images as a training reads them: memory-mapped pixels, and a row of text per image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from t2i.errors import UserError
from t2i.files import read_json


@dataclass
class Split:
    """`pixels[i]` (uint8 [N, R, R, 3], memory mapped, read-only) belongs to `rows[i]`.

    `rows` (memory mapped) has the strings `id` (16 hex digits of the image file's SHA-256; copies share it), `file`,
    `caption`, where known `label`, and the data set's other plain columns. `caption` is an image's first caption. If
    images may have several, the list `captions` holds all. `fingerprint` names the pixels, not the captions.
    """

    pixels: np.ndarray
    rows: datasets.Dataset
    fingerprint: str

    def __len__(self) -> int:
        return len(self.pixels)

    def captions(self, limit: int | None = None) -> list[list[str]]:
        """Return all captions of the first `limit` images, or of all images: at least one each, which may be empty."""
        if isinstance(self.rows.features.get("captions"), datasets.List):
            return list(self.rows["captions"][:limit])
        return [[caption] for caption in self.rows["caption"][:limit]]


def open_prepared(folder: Path) -> tuple[Split | None, Split | None, Split | None]:
    """Train, validation and test split of a finished cache folder (`runs.prepared_folder`), without its data set.

    Raises `UserError` for a folder that is missing or damaged.
    """
    try:
        return open_splits(folder, read_json(folder / "report.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(
            f"the cache folder {folder} is damaged ({type(error).__name__}); delete it and run again"
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
