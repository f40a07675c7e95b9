"""Find images that are nearly the same, in one split or in several. This module imports no torch.

Images are compared by thumbnails of 16 x 16 px. Copies that were resized, compressed again or brightened are found. Cropped,
turned and mirrored copies are not.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

SIDE = 16  # px of a thumbnail
LEAST_LIKENESS = 0.97  # correlation of two thumbnails, at most 1
BLOCK = 512  # thumbnails compared at once
FLAT = 1e-3  # deviation of a thumbnail, 0..1, below which it shows nothing to compare


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return the thumbnail of an upright RGB image: colors 0..1 without their mean, of length 1, float32 [768].

    An image of one color gives zeros.
    """
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel() / 255
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-12) if values.std() > FLAT else np.zeros_like(values)


def group(thumbnails: np.ndarray, progress: Callable[[float], None] = lambda share: None) -> list[list[int]]:
    """Return the groups of images that are nearly the same, the largest first: numbers of images, from 0.

    Two images are in one group if a chain of near duplicates leads from one to the other.

    Args:
        thumbnails: `thumbnail` of each image, float32 [N, 768].
        progress: called with the share of comparisons that are done, 0..1.
    """
    leader = np.arange(len(thumbnails))

    def lead(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = int(leader[number])
        return number

    for start in range(0, len(thumbnails), BLOCK):
        alike = thumbnails[start : start + BLOCK] @ thumbnails[start:].T >= LEAST_LIKENESS
        for one, other in np.argwhere(np.triu(alike, 1)):
            first, second = sorted((lead(start + int(one)), lead(start + int(other))))
            leader[second] = first
        progress(min(1.0, (start + BLOCK) / len(thumbnails)))
    return _groups([lead(number) for number in range(len(thumbnails))])


def _groups(leaders: Sequence[int]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for number, leader in enumerate(leaders):
        members.setdefault(leader, []).append(number)
    return sorted((found for found in members.values() if len(found) > 1), key=len, reverse=True)
