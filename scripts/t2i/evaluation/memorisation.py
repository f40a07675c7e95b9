"""Test for memorisation: do generated pictures lie nearer to training images than unseen images do?

Pictures are uint8 arrays [N, H, W, 3] (RGB, 0 to 255) unless a function says otherwise.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i.data.prepared import Selection
from t2i.errors import UserError
from t2i.evaluation.attributes import to_tensor

TWIN = 0.1  # Training images with a smaller distance, relative to the 50 nearest, are one photo.
COPY = 1 / 3  # A copy's distance to its training image, as a share of the distance to the second nearest.


def pixel_embedding(pixels: np.ndarray | Selection, size: int = 16) -> Tensor:
    """Return pictures as thumbnails in [-1, 1], float32 [N, 3 * size^2].

    Thumbnails have no fine detail, so they do not show whether a picture is soft.
    """
    parts = [to_tensor(pixels[start : start + 512], size).flatten(1) for start in range(0, len(pixels), 512)]
    return torch.cat(parts)


def _nearest(queries: Tensor, train: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Return the smallest L2 distances from each query to rows of `train`, and the row numbers of these nearest rows.

    Distances are computed in blocks of 256 x 4,096, so memory does not grow with the training set.

    Returns:
        Distances [M, k] and row numbers [M, k], with k = `neighbours`, or fewer if `train` is smaller.
    """
    distances, rows = [], []
    for some in queries.split(256):
        best = torch.full((len(some), 0), torch.inf)
        where = torch.zeros((len(some), 0), dtype=torch.int64)
        for start in range(0, len(train), 4096):
            block = torch.cdist(some, train[start : start + 4096])
            index = torch.arange(start, start + block.shape[1]).expand_as(block)
            best, keep = torch.cat([best, block], 1).topk(
                min(neighbours, best.shape[1] + block.shape[1]), largest=False
            )
            where = torch.cat([where, index], 1).gather(1, keep)
        distances.append(best)
        rows.append(where)
    return torch.cat(distances), torch.cat(rows)


def _both_ways(pictures: np.ndarray, train: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of each picture and its mirror image to their nearest training images.

    Training flips images, so a copy may be mirrored.

    Returns:
        Distances [M, 2k] to training images, and the numbers of these images [M, 2k]. The k nearest training images of
            the picture and of its mirror image are returned, with k = 50.
    """
    thumbnails = pixel_embedding(pictures)
    near, rows = _nearest(thumbnails, train, 50)
    near_mirrored, rows_mirrored = _nearest(_mirrored(thumbnails), train, 50)
    return torch.cat([near, near_mirrored], 1), torch.cat([rows, rows_mirrored], 1)


def _mirrored(thumbnails: Tensor) -> Tensor:
    """Return the mirror images of thumbnails [..., 3 * 16^2]."""
    return thumbnails.unflatten(-1, (3, 16, 16)).flip(-1).flatten(-3)


def _neighbourhood(distances: Tensor) -> Tensor:
    """Return the mean [M, 1] of the k smallest of the distances [M, 2k] that `_both_ways` returns."""
    return distances.topk(distances.shape[1] // 2, largest=False).values.mean(1, keepdim=True).clamp(min=1e-12)


def _relative(distances: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relative distances of pictures to the nearest training image, [M], and the numbers of these images, [M].

    A relative distance is the distance to the nearest image, divided by the mean distance to the 50 nearest.

    Args:
        distances: distances [M, 2k] of `_both_ways`.
        rows: numbers of the training images, [M, 2k].
    """
    first, column = (distances / _neighbourhood(distances)).min(1)
    return first, rows.gather(1, column[:, None])[:, 0]


def copied(pictures: np.ndarray, train: Tensor) -> np.ndarray:
    """Return which pictures copy a training image, which is then less than a third as far as any other training image.

    Mirror images and near copies of that training image belong to it. Distances are those of thumbnails: by them, all
    reconstructed training photos of an autoencoder with 25 dB were copies, and 0.5 % of unseen photos. Features of a network
    did not separate the two. Source: Carlini et al., 2023, section 4.2.

    Args:
        pictures: pictures to test, uint8 [M, H, W, 3].
        train: `pixel_embedding` of at least two training images.

    Returns:
        Whether each picture is a copy, bool [M].
    """
    return _copied(pictures, *_both_ways(pictures, train), train)


def _copied(pictures: np.ndarray, distances: Tensor, rows: Tensor, train: Tensor) -> np.ndarray:
    """Return which pictures are copies, from the distances and rows of `_both_ways`."""
    limits = TWIN * _neighbourhood(distances)
    distances, order = distances.sort(1)
    rows = rows.gather(1, order)
    seconds = []
    for start in range(0, len(rows), 64):  # The thumbnails of all neighbours at once would fill the memory.
        some = slice(start, start + 64)
        nearest, neighbours = train[rows[some, :1]], train[rows[some]]
        apart = torch.minimum((neighbours - nearest).norm(dim=2), (neighbours - _mirrored(nearest)).norm(dim=2))
        seconds.append(torch.where(apart < limits[some], torch.inf, distances[some]).min(1).values)
    second = torch.cat(seconds)
    for row in second.isinf().nonzero()[:, 0].tolist():  # All neighbours are twins of the nearest one.
        picture = pixel_embedding(pictures[row : row + 1])
        second[row] = _distance_to_other_photos(picture, train[rows[row, :1]], limits[row], train)
    return (distances[:, 0] < COPY * second).numpy()


def _distance_to_other_photos(picture: Tensor, photo: Tensor, limit: Tensor, train: Tensor) -> Tensor:
    """Return the distance of a picture to the nearest training image that is no twin of a photo.

    Without such an image, only a picture that is nearer than the twins are to each other is a copy.

    Args:
        picture: thumbnail [1, D] of the picture.
        photo: thumbnail [1, D] of the training image nearest to the picture.
        limit: distance [1] under which a training image is a twin of the photo.
        train: `pixel_embedding` [N, D] of all training images.
    """
    far, apart = (
        torch.minimum(torch.cdist(one, train), torch.cdist(_mirrored(one), train))[0] for one in (picture, photo)
    )
    others = far[apart >= limit]
    return others.min() if len(others) else apart.max() / COPY


def nearest_images(picture: np.ndarray, train: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the training images nearest to a picture, each image once.

    Args:
        picture: the generated picture, uint8 [H, W, 3].
        train: `pixel_embedding` of the training images.
        count: maximum number of returned images.

    Returns:
        Pairs of a training image's number and its relative distance, the nearest image first. Each distance is divided
            by the mean distance to the 50 nearest training images, as in `memorisation`. The first pair's distance is
            the picture's "relative_distance". A relative distance under 0.5 means a near copy.
    """
    distances, rows = _both_ways(picture[None], train)
    relative = (distances / _neighbourhood(distances))[0]
    found: dict[int, float] = {}
    for column in relative.argsort().tolist():
        found.setdefault(int(rows[0, column]), float(relative[column]))
    return list(found.items())[:count]


def relative_distances(pictures: np.ndarray, train: Tensor) -> np.ndarray:
    """Return the relative distance of each picture to its nearest image in `train`, a `pixel_embedding`: float32 [M]."""
    return _relative(*_both_ways(pictures, train))[0].numpy()


def memorisation(generated: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """Measure whether generated pictures lie nearer to training images than unseen real images do.

    Distances between pictures are L2 distances between 16 x 16 thumbnails. Of the distances of a picture and of its
    mirror image, the smaller one is used. A classifier's features are not suitable, as they separate the classifier's
    training images from unseen images. Thumbnails do not show whether a picture is soft. The relative distance divides
    the distance to the nearest training image by the mean distance to the 50 nearest ones. Distances are divided
    because plain or pale pictures lie nearer to all images. Only a copy is much nearer to one training image than to
    the others. Source: Carlini et al., 2023, "Extracting Training Data from Diffusion Models", section 4.2.

    Args:
        generated: generated pictures, uint8 [M, H, W, 3].
        train: training images, uint8 [N, H, W, 3].
        held_out: unseen real images, uint8 [K, H, W, 3].

    Returns:
        "median_ratio": median relative distance of the generated pictures, divided by that of the held-out images (1:
            equally far).
        "share_closer": share of generated pictures whose relative distance is below the 1st percentile of the held-out
            images (by chance: `figures.chance_closer`, which is above 0.01 if there are few held-out images).
        "probability_closer": chance that a generated picture is relatively nearer than a held-out image (0.5: no
            difference).
        "near_copies" and "near_copies_held_out": shares of pictures and of held-out images with a relative distance
            under 0.5. If "near_copies_held_out" is above 0, the data set has near-duplicates across its splits. With
            such near-duplicates, compare "near_copies" with "near_copies_held_out" instead of reading "share_closer".
        "copies" and "copies_held_out": shares of pictures and of held-out images that `copied` finds.
        "nearest": number of the training image nearest to each picture, int64 [M].
        "relative_distance": relative distance of each picture to its nearest training image, float32 [M].

    Raises:
        UserError: a set of images is too small.
    """
    if len(train) < 2 or len(held_out) == 0 or len(generated) == 0:
        raise UserError("memorisation needs at least 2 training images, 1 held-out image and 1 generated picture")
    return Memory(pixel_embedding(train), held_out).measure(generated)


class Memory:
    """Training images and unseen images, for measuring many sets of pictures as `memorisation` does.

    Attributes:
        thumbnails: `pixel_embedding` of the training images.
        unseen: `pixel_embedding` of the unseen images.
    """

    def __init__(self, thumbnails: Tensor, held_out: np.ndarray) -> None:
        """Measure the unseen images once.

        Args:
            thumbnails: `pixel_embedding` of the training images.
            held_out: unseen real images, uint8 [K, H, W, 3].
        """
        self.thumbnails, self.unseen = thumbnails, pixel_embedding(held_out)
        near = _both_ways(held_out, self.thumbnails)
        self.held_out, _ = _relative(*near)
        self.copies_held_out = float(_copied(held_out, *near, self.thumbnails).mean())

    def measure(self, generated: np.ndarray) -> dict[str, Any]:
        """Return the figures of `memorisation` for pictures, uint8 [M, H, W, 3]."""
        near = _both_ways(generated, self.thumbnails)
        ours, rows = _relative(*near)
        theirs = self.held_out
        ordered = theirs.sort().values
        below = torch.searchsorted(ordered, ours)  # number of held-out images nearer than this picture
        level = torch.searchsorted(ordered, ours, right=True)  # the same number, plus ties
        return {
            "median_ratio": float(ours.median() / theirs.median().clamp(min=1e-12)),
            "share_closer": float((ours < theirs.quantile(0.01)).float().mean()),
            "probability_closer": float(1 - (below + level).float().mean() / (2 * len(ordered))),
            "near_copies": float((ours < 0.5).float().mean()),
            "near_copies_held_out": float((theirs < 0.5).float().mean()),
            "copies": float(_copied(generated, *near, self.thumbnails).mean()),
            "copies_held_out": self.copies_held_out,
            "nearest": rows.numpy(),
            "relative_distance": ours.numpy(),
        }
