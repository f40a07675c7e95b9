"""Say what each figure of an evaluation or training is called, and which of its values are better. This module imports no torch.

Page, report and model card take names, directions and intervals from this table.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Z = 1.96  # Quantile of the normal distribution for intervals of 95 %.


@dataclass(frozen=True)
class Figure:
    """What a figure means to its reader.

    Attributes:
        name: name for people.
        better: "higher", "lower", or None. A figure without a direction cannot choose a checkpoint: noise, or a copy of the
            training images, would have its best value.
        is_share: whether the figure is a share of the drawn pictures, which has a Wilson interval.
        is_guided: whether the figure depends on the guidance scale.
    """

    name: str
    better: str | None = None
    is_share: bool = False
    is_guided: bool = True


# Keys as `flatten` of the dashboard gives them, the figures that choose best first. Groups of a key fill the name.
FIGURES = {
    r"judge\.kernel_distance": Figure("kernel distance to real images", "lower"),
    r"prompt_following\.all": Figure("prompt following, combined attributes", "higher", is_share=True),
    r"judge\.named": Figure("label recognised in the pictures", "higher", is_share=True),
    r"clip_score\.mean": Figure("CLIP score", "higher"),
    r"val_loss": Figure("validation loss", "lower", is_guided=False),
    # A student's loss is measured on its teacher's pictures, so it is no other model's loss.
    r"student_val_loss": Figure("validation loss of students", "lower", is_guided=False),
    r"prompt_following_(held_out|seen)\.all": Figure("prompt following {}, combined attributes"),
    r"prompt_following\.(.+)": Figure("prompt following, {}", "higher", is_share=True),
    r"val_loss_(\d+)_(\d+)": Figure("validation loss, timesteps {} to {}", "lower", is_guided=False),
    r"val_psnr_db": Figure("PSNR of reconstructions in dB", "higher", is_guided=False),
    r"val_ssim": Figure("SSIM of reconstructions", "higher", is_guided=False),
    r"train_loss": Figure("training loss", is_guided=False),
    r"judge\.standard_error": Figure("standard error of the kernel distance"),
    r"memorisation\.copies": Figure("copies of a training image", is_share=True),
    r"memorisation\.copies_held_out": Figure("copies among unseen real images"),
    r"memorisation\.near_copies": Figure("near copies", is_share=True),
    r"memorisation\.near_copies_held_out": Figure("near copies among unseen real images"),
    r"memorisation\.share_closer": Figure("closer to a training image than 99% of unseen images", is_share=True),
    r"memorisation\.median_ratio": Figure("distance to training images, relative to unseen images"),
    r"memorisation\.probability_closer": Figure("chance to be nearer to a training image than an unseen image is"),
    r"clipped\.pictures": Figure("clipped colors"),
    r"clipped\.real": Figure("clipped colors of unseen real images"),
    r"diversity\.ratio": Figure("diversity relative to real images"),
    r"diversity\.generated": Figure("distance between pictures"),
    r"diversity\.real": Figure("distance between real images"),
}


@lru_cache(maxsize=4096)  # The page Runs asks for each figure of each result of each run.
def figure(key: str) -> Figure:
    """Return what the figure with a key such as "prompt_following.petal_color" means.

    An unknown figure is named by its key, and has no direction.
    """
    for pattern, known in FIGURES.items():
        if match := re.fullmatch(pattern, key):
            name = known.name.format(*(words(group) for group in match.groups()))
            return Figure(name, known.better, known.is_share, known.is_guided)
    return Figure(words(key))


def words(key: str) -> str:
    return key.replace("_", " ").replace(".", ", ")


def attribute_names(following: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the names for people of the shares of prompt following, by their keys.

    "all" combines some of the attributes. If it only repeats "label", it is left out.
    """
    shares = following or {}
    names = {key: "combined attributes" if key == "all" else words(key) for key in shares}
    return {key: name for key, name in names.items() if key != "all" or "label" not in shares}


@lru_cache(maxsize=4096)
def rank(key: str) -> int:
    """Return the place of a figure in `FIGURES`, the figures that choose best first."""
    return next((at for at, pattern in enumerate(FIGURES) if re.fullmatch(pattern, key)), len(FIGURES))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the interval of 95 % of a share that was measured on `count` pictures, at least 1: two shares from 0 to 1.

    Source: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".
    """
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(
    key: str, value: float, count: int | None = None, standard_error: float | None = None
) -> tuple[float, float] | None:
    """Return the interval of 95 % of a figure, or None if none is known.

    Args:
        count: number of pictures on which a share was measured.
        standard_error: standard error of the kernel distance.
    """
    if key == "judge.kernel_distance" and standard_error is not None:
        return value - Z * standard_error, value + Z * standard_error
    if figure(key).is_share and count and 0 <= value <= 1:
        return wilson(value, count)
    return None


def chance_closer(unseen: int) -> float:
    """Return which share of pictures lies closer to a training image than 99 % of unseen images only by chance, 0 to 1.

    The limit is interpolated at place 0.01 (K - 1) of the sorted distances of K unseen images. Each of the K + 1 gaps beside
    these distances holds a picture with equal chance, if pictures lie as far from training images as unseen images do.

    Args:
        unseen: number K of unseen images, at least 1.
    """
    return (1 + 0.01 * (unseen - 1)) / (unseen + 1)


def percent(share: float, count: int | None = None) -> str:
    """Return a share as text, with its interval if the number of pictures is known: "75.0% (58–87%)"."""
    text = f"{100 * share:.1f}%"
    if not count or not 0 <= share <= 1:
        return text
    low, high = wilson(share, count)
    return f"{text} ({100 * low:.0f}–{100 * high:.0f}%)"


def other_prompts(results: Mapping[str, Any]) -> str:
    """Return words for the pictures on which an evaluation chose its best setting, beside those that it reports.

    Args:
        results: content of evaluation.json. Its sweep and its report have different seeds. If a data set has few captions
            or labels, both have some of the same prompts.
    """
    reported, chosen = set(results.get("prompts") or ()), set((results.get("sweep") or {}).get("prompts") or ())
    shared = len(reported & chosen)
    return f"other pictures, which share {shared} of {len(reported)} different prompts" if shared else "other prompts"


def is_finite(value: Any) -> bool:
    """Return whether a value read from a file is a finite number, which tables and charts accept."""
    most = 2**63 if isinstance(value, int) else 1e300
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < most


def figure_text(key: str, value: Any, count: Any = None) -> str:
    """Return a figure as text. A share has its interval if the `count` of its pictures is known. None is a dash."""
    if value is None:
        return "–"
    if figure(key).is_share and is_finite(value):
        return percent(value, count if isinstance(count, int) else None)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def told(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of `values` as `flatten` does, without each "all" that only repeats the "label" beside it."""
    row = flatten(values)
    return {key: value for key, value in row.items() if not key.endswith(".all") or f"{key[:-3]}label" not in row}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary as one row, with keys such as `memorisation.share_closer`."""
    row: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            row |= flatten(value, f"{prefix}{key}.")
        else:
            accepted = isinstance(value, float | bool | None) or is_finite(value)  # a table accepts no larger integer
            row[f"{prefix}{key}"] = value if accepted else str(value)
    return row
