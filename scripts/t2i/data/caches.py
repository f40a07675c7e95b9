"""Caches of latents and text embeddings, computed once and addressed by content.

The folder of a cache is named by a hash. The hash covers the model's weights, transform and precision, and the images or
captions. A stale cache therefore cannot be read by mistake. All processes that want a cache compute it together
(`t2i.data.shared_array`). Arrays are memory-mapped `.npy` files, so memory does not grow with the data set. Latents are
stored unscaled in float16, as the posterior's mean and log-variance. They decode to the
pictures of float32 with a PSNR above 85 dB (`test_caches.py`). Hidden states are stored once per distinct caption, and an image
may have several captions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2i.data.images import CROPS_VERSION
from t2i.data.prepared import Selection
from t2i.data.shared_array import shared_array
from t2i.errors import UserError
from t2i.files import hash_json
from t2i.models import encode_captions, vae_factor

NULL_CAPTION = ""  # The empty caption replaces a dropped one. Guidance in the stock pipeline moves away from it.
FLOAT16_MAX = 65504.0  # Largest number of float16.
AXES_IMAGES = 1024  # Images whose features give the principal axes of an alignment.
NETWORK_BATCH = 32  # Images per call of the judge's network and of the alignment's.
CPU_BATCH_PIXELS = 1 << 16  # Pixels per batch on a CPU: 4 images of 128 px, or 16 images of 64 px.
VAE_BATCH_PIXELS = 1 << 21  # Pixels per batch of a VAE: 32 images of 256 px, or 8 images of 512 px.


@dataclass
class TextCache:
    """Text embeddings of the distinct captions of a data set, and the captions of each sample."""

    embeddings: np.ndarray  # Hidden states, float16 [M, L, D], memory-mapped. Row 0 belongs to the empty caption.
    rows: np.ndarray  # Rows in `embeddings` of the captions of sample 0, then of sample 1, and so on, int64 [T].
    counts: np.ndarray  # Number of captions of each sample, at least 1, int64 [N]. The sum of the counts is T.

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])  # First entry of each sample in `rows`.

    def rows_of(self, samples: np.ndarray, chosen: np.ndarray | int = 0) -> np.ndarray:
        """Return the rows in `embeddings` of one caption per sample, int64 [B].

        Args:
            samples: indices of the samples, int64 [B].
            chosen: number of the caption of each sample, from 0, int64 [B]. The default is the first caption.
        """
        return self.rows[self.starts[samples] + chosen]


def cache_latents(
    pixels: np.ndarray | Selection,
    identity: dict[str, Any],
    vae: Any,
    cache_dir: str,
    *,
    flip: bool,
    crops: np.ndarray | Selection | None = None,
    batch_size: int | None = None,
    say: Callable[[str], None] = print,
) -> np.ndarray | Selection:
    """Return the means and log-variances of the latents of images, from the cache or newly computed.

    Args:
        pixels: the images, uint8 [N, R, R, 3]. If images are left out, theirs are computed as well, so that a longer list
            of them changes no cache.
        identity: hashes of the images and of the VAE's encoder, which name the cache.
        vae: the VAE in evaluation mode.
        cache_dir: folder that holds all caches.
        flip: whether the mirrored images are encoded and cached too.
        crops: random crops of the images, uint8 [N, K, R, R, 3], which are encoded and cached too.
        batch_size: images per call of the VAE. With None, use `vae_batch` on a GPU, and fewer images on a CPU.
        say: function that prints a progress message.

    Returns:
        Means and log-variances, float16 [N, F, 2C, h, w], memory-mapped. F is 1 + K, and twice that with `flip`. The
        versions of an image are itself, itself mirrored, its first crop, this crop mirrored, and so on.
    """
    versions, identity, select = _stored(pixels, identity, crops, flip)
    count, resolution = versions[0].shape[0], versions[0].shape[1]
    mirrors = 2 if flip else 1
    if batch_size is None:  # On a CPU, small batches are faster and need less memory.
        on_cpu = vae.device.type == "cpu"
        batch_size = max(1, CPU_BATCH_PIXELS // resolution**2) if on_cpu else vae_batch(resolution)
    side = resolution // vae_factor(vae)
    shape = (count, mirrors * len(versions), 2 * vae.config.latent_channels, side, side)

    @torch.no_grad()
    def fill(latents: np.ndarray, first: int, stop: int) -> None:
        for start in range(first, stop, batch_size):
            for version in range(shape[1]):
                crop, mirrored = divmod(version, mirrors)
                images = to_pixels(versions[crop][start : min(start + batch_size, stop)]).to(vae.device, vae.dtype)
                posterior = vae.encode(images.flip(3) if mirrored else images).latent_dist
                moments = torch.cat([posterior.mean, posterior.logvar], dim=1).float()
                latents[start : start + len(images), version] = moments.clamp(-FLOAT16_MAX, FLOAT16_MAX).cpu().numpy()

    key = hash_json({"kind": "latents", "stored": "float16", "shape": shape, **identity})
    what, folder = f"latents of {count} images", Path(cache_dir) / "latents" / key
    return select(shared_array(folder, shape, "float16", what, fill, batch_size, say))


def vae_batch(side: int) -> int:
    """Return the number of images of `side` px per call of a VAE in float32: at most 32, and fewer above 256 px."""
    return max(1, min(32, VAE_BATCH_PIXELS // side**2))


def cache_text(
    captions: Iterable[Sequence[str]],
    identity: dict[str, Any],
    text_encoder: Any,
    tokenizer: Any,
    cache_dir: str,
    *,
    batch_size: int = 32,
    say: Callable[[str], None] = print,
) -> TextCache:
    """Return the text embeddings of the distinct captions, from the cache or newly computed.

    Args:
        captions: the captions of each sample, at least one.
        identity: hashes of the text encoder and of the tokenizer, which name the cache.
        text_encoder: the text encoder in evaluation mode.
        tokenizer: the tokenizer of the text encoder.
        cache_dir: folder that holds all caches.
        batch_size: captions per call of the text encoder.
        say: function that prints a progress message.

    Returns:
        The embeddings, and for each sample the rows of its captions. Row 0 belongs to the empty caption.
    """
    numbers: dict[str, int] = {NULL_CAPTION: 0}
    rows: list[int] = []
    counts: list[int] = []
    for texts in captions:
        rows += [numbers.setdefault(caption, len(numbers)) for caption in texts]
        counts.append(len(texts))
    distinct = list(numbers)
    shape = (len(distinct), tokenizer.model_max_length, text_encoder.config.hidden_size)

    def fill(embeddings: np.ndarray, first: int, stop: int) -> None:
        for start in range(first, stop, batch_size):
            hidden = encode_captions(text_encoder, tokenizer, distinct[start : min(start + batch_size, stop)])
            embeddings[start : start + len(hidden)] = hidden.float().cpu().numpy()

    key = hash_json({"kind": "text", "captions": hash_json(distinct), **identity})
    what, folder = f"embeddings of {len(distinct)} distinct captions", Path(cache_dir) / "text" / key
    embeddings = shared_array(folder, shape, "float16", what, fill, batch_size, say)
    return TextCache(embeddings, np.array(rows, np.int64), np.array(counts, np.int64))


def cache_features(
    pixels: np.ndarray | Selection,
    rows: np.ndarray,
    fingerprint: str,
    network: Any,
    cache_dir: str,
    *,
    say: Callable[[str], None] = print,
) -> torch.Tensor:
    """Return the judge's features of some images, float32 [len(rows), F], from the cache if they are there.

    Args:
        pixels: images, uint8 [N, R, R, 3].
        rows: numbers of the wanted images, int64.
        fingerprint: hash of all images.
        network: an `evaluation.networks.FeatureNetwork`.
    """
    if isinstance(pixels, Selection):
        rows = pixels.kept[rows]
        pixels = pixels.array
    shape = (len(rows), network.features(pixels[rows[:1]]).shape[1])

    def fill(features: np.ndarray, first: int, stop: int) -> None:
        for start in range(first, stop, NETWORK_BATCH):
            end = min(start + NETWORK_BATCH, stop)
            features[start:end] = network.features(pixels[rows[start:end]]).numpy()

    identity = {"images": fingerprint, "rows": hash_json(rows.tolist()), "network": network.identity()}
    key = hash_json({"kind": "features", "shape": shape, **identity})
    what, folder = f"features of {len(rows)} images", Path(cache_dir) / "features" / key
    return torch.from_numpy(np.array(shared_array(folder, shape, "float32", what, fill, NETWORK_BATCH, say)))


def cache_alignment(
    pixels: np.ndarray | Selection,
    fingerprint: str,
    network: Any,
    cache_dir: str,
    *,
    flip: bool,
    crops: np.ndarray | Selection | None = None,
    say: Callable[[str], None] = print,
) -> np.ndarray | Selection:
    """Return the targets of the denoiser's alignment, from the cache or newly computed.

    The targets are a network's features, in as many of their principal axes as the denoiser aligns channels.

    Args:
        pixels: the images, uint8 [N, R, R, 3].
        fingerprint: hash of all images.
        network: a `training.alignment.TargetNetwork`.
        cache_dir: folder that holds all caches.
        flip: whether the targets of the mirrored images are computed and cached too.
        crops: random crops of the images, as for `cache_latents`, whose targets are computed and cached too.
        say: function that prints a progress message.

    Returns:
        Targets, float16 [N, F, K, s, s], memory-mapped. The F versions of an image are those of `cache_latents`. K is
        `network.channels`, or the number of the network's features if that is smaller.
    """
    versions, identity, select = _stored(pixels, {"images": fingerprint}, crops, flip)
    whole, mirrors = versions[0], 2 if flip else 1
    count, side = len(whole), network.side
    features = network.maps(np.array(whole[:1])).shape[1]
    shape = (count, mirrors * len(versions), min(network.channels, features), side, side)

    def fill_axes(axes: np.ndarray, *_: int) -> None:  # in one range
        sample = np.linspace(0, count - 1, min(count, AXES_IMAGES)).round().astype(int)
        batches = (np.array(whole[sample[i : i + NETWORK_BATCH]]) for i in range(0, len(sample), NETWORK_BATCH))
        mean, columns = _principal_axes((network.maps(batch) for batch in batches), shape[2])
        axes[0], axes[1:] = mean, columns.T

    def fill(targets: np.ndarray, first: int, stop: int) -> None:
        for start in range(first, stop, NETWORK_BATCH):
            for version in range(shape[1]):
                crop, mirrored = divmod(version, mirrors)
                images = np.array(versions[crop][start : min(start + NETWORK_BATCH, stop)])
                maps = network.maps(images[:, :, ::-1].copy() if mirrored else images).permute(0, 2, 3, 1)
                rotated = ((maps - mean) @ axes).permute(0, 3, 1, 2)
                if not rotated.isfinite().all():
                    raise UserError(f"alignment_network {network.source} gives non-finite features; take another one")
                targets[start : start + len(images), version] = rotated.clamp(-FLOAT16_MAX, FLOAT16_MAX).numpy()

    key = hash_json({"kind": "alignment", "shape": shape, **identity, "network": network.identity()})
    what, folder = f"alignment of {count} images", Path(cache_dir) / "alignment" / key
    mean, axes = torch.zeros(()), torch.zeros(())
    if not folder.is_dir():
        axes_folder, rows = folder.with_name(f"{key}-axes"), 1 + shape[2]  # the mean, then the axes
        stored = shared_array(axes_folder, (rows, features), "float32", f"axes of the {what}", fill_axes, rows, say)
        mean, axes = torch.from_numpy(np.array(stored[0])), torch.from_numpy(np.array(stored[1:]).T.copy())
    return select(shared_array(folder, shape, "float16", what, fill, NETWORK_BATCH, say))


def _stored(
    pixels: np.ndarray | Selection, identity: dict[str, Any], crops: np.ndarray | Selection | None, flip: bool
) -> tuple[list[np.ndarray], dict[str, Any], Callable[[np.ndarray], np.ndarray | Selection]]:
    """Return the images to compute a cache of, its identity, and a function that selects the wanted rows of the cache.

    The images are the whole ones, uint8 [N, R, R, 3], and then their first crops, second crops, and so on. If images are
    left out of a split, the cache is that of the whole split. A part of the rest gets a cache of its own.
    """
    arrays: list[Any] = [pixels] if crops is None else [pixels, crops]
    select: Callable[[np.ndarray], np.ndarray | Selection] = lambda cached: cached  # noqa: E731
    if isinstance(pixels, Selection):
        kept = pixels.kept
        if pixels.is_cut:
            arrays, identity = [np.asarray(array) for array in arrays], identity | {"rows": hash_json(kept.tolist())}
        else:
            arrays, select = [array.array for array in arrays], lambda cached: Selection(cached, kept)
    further = [arrays[1][:, number] for number in range(arrays[1].shape[1])] if crops is not None else []
    if further:  # The number of versions alone does not tell crops from mirrored images.
        identity = identity | {"crops": [CROPS_VERSION, len(further)], "flip": flip}
    return [arrays[0], *further], identity, select


def _principal_axes(parts: Iterable[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean [F] of features, and their first `count` principal axes [F, count].

    Args:
        parts: features, each [B, F, s, s]. They are read one by one, so memory does not grow with their number.
        count: number of axes.
    """
    rows, total, products = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        features = part.permute(0, 2, 3, 1).flatten(0, 2).double()
        rows, total, products = rows + len(features), total + features.sum(0), products + features.T @ features
    mean = total / rows
    _, axes = torch.linalg.eigh(products - rows * mean[:, None] * mean)  # The eigenvalues rise.
    axes = axes.flip(1)[:, :count]
    # The sign of an axis is arbitrary. Its largest component decides it, so that other machines find the same targets.
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return mean.float(), (axes * signs).float()


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Convert images, uint8 [B, R, R, 3], to pixels, float32 [B, 3, R, R] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """Convert pixels, float [B, 3, R, R] in [-1, 1], to images, uint8 [B, R, R, 3]."""
    return pixels.float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
