"""Measure a denoiser's loss on each image of its data set, to find images whose captions are wrong.

The noise and the timesteps are fixed and the same for all images. A loss is therefore a function of the image, its caption and
the checkpoint. It is measured twice: with the first caption of the image, and with the empty caption. Where the caption
raises the loss, it says something else than the image shows. The loss alone also depends on how busy an image is.

The results of a checkpoint are kept in `<run>/image_losses/<checkpoint>.json`. Functions import torch themselves, because a
page that only reads these files must not wait for torch.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.config import DataConfig
from t2i.data.repairs import ID_DIGITS, read_repairs
from t2i.errors import UserError
from t2i.files import read_json, write_text
from t2i.pictures.cells import weights_hash
from t2i.runs import find_prepared

if TYPE_CHECKING:
    import numpy as np
    import torch

    from t2i.data.caches import TextCache
    from t2i.data.prepared import Selection

LEVELS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # Timesteps as shares of all. Nearly clean images need no caption.
SEED = 20261  # Seed of the noise, which is the same for all images and runs.
BATCH = 32
FOLDER = "image_losses"
Progress = Callable[[int, int], None]
Losses = dict[str, tuple[float, float]]  # First 16 digits of an image's hash -> loss with and without its caption.


def losses(
    unet: Any,
    scheduler: Any,
    latents: "np.ndarray | Selection",
    text: "TextCache",
    scaling_factor: float,
    progress: Progress = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> "torch.Tensor | None":
    """Return the loss of each image with and without its first caption, averaged over `LEVELS`, float32 [N, 2].

    The result is None if `cancelled` becomes true.

    Args:
        unet: the denoiser in evaluation mode.
        scheduler: the noise schedule of the training.
        latents: means and log-variances of the latents, [N, F, 2C, h, w]. The means of the images that are not mirrored are used.
        text: text embeddings of the images' captions.
        scaling_factor: the factor of the VAE.
        progress: called with the number of measured images and of all images.
        cancelled: asked before each batch.
    """
    import numpy as np
    import torch

    from t2i.diffusion import denoising_loss

    count, channels = len(latents), latents.shape[2] // 2
    levels = [int(share * scheduler.config.num_train_timesteps) for share in LEVELS]
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(len(levels), channels, *latents.shape[3:], generator=generator)
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    found = torch.zeros(count, 2)
    for start in range(0, count, BATCH):
        if cancelled():
            return None
        rows = np.arange(start, min(start + BATCH, count))
        clean = scaling_factor * torch.from_numpy(latents[rows, 0][:, :channels]).float().to(device)
        own = torch.from_numpy(np.array(text.embeddings[text.rows_of(rows)])).to(device, dtype)
        none = torch.from_numpy(np.array(text.embeddings[:1])).to(device, dtype).expand_as(own)
        for level, added in zip(levels, noise, strict=True):
            timesteps = torch.full((len(rows),), level, device=device)
            drawn = added.to(device).expand_as(clean)
            for column, context in enumerate((own, none)):
                with torch.no_grad():
                    loss = denoising_loss(unet, scheduler, clean.to(dtype), drawn.to(dtype), timesteps, context)
                found[rows, column] += loss.cpu() / len(levels)
        progress(int(rows[-1]) + 1, count)
    return found


def measure(
    run: Path,
    checkpoint: str,
    settings: dict[str, Any],
    load: Callable[[Path], Any],
    progress: Progress = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Measure the losses of a checkpoint on all splits of its data set, and keep them in the run folder.

    Latents are those that the training has cached. Edited captions are used.

    Args:
        run: path of the run folder.
        checkpoint: name of a checkpoint, or "pipeline".
        settings: the section `data` of the run's config.yaml.
        load: loads the pipeline of a checkpoint's folder.
        progress: called with the number of measured images and of all images.
        cancelled: asked before each batch.

    Returns:
        Path of the file, or None if `cancelled` became true.

    Raises:
        UserError: the prepared images, the model or the repairs cannot be read.
    """
    import torch
    from diffusers import DDPMScheduler

    from t2i.data import caches
    from t2i.data.prepared import open_prepared, repair
    from t2i.models import hash_encoder
    from t2i.pictures.guide import unguided

    state = read_json(run / "run.json")
    if state.get("student"):
        raise UserError(
            f"{run} is a student, which learnt from its teacher's pictures; measure the losses of its teacher"
        )
    identity = state.get("identity") or {}
    cache_dir = str(settings.get("cache_dir") or DataConfig().cache_dir)
    folder = find_prepared(cache_dir, identity.get("dataset_hash"))
    if folder is None:
        raise UserError(
            f"the prepared images of {run} are no longer in {cache_dir}; run its training again to prepare them"
        )
    dataset = Path(str(settings.get("dataset"))).expanduser()
    repairs = read_repairs(dataset if dataset.is_dir() else None)
    repairs.left_out = []  # Their losses are measured too, since they may come back.
    prefix = str(settings.get("caption_prefix") or "")
    splits = [repair(split, repairs, "", prefix)[0] for split in open_prepared(folder) if split is not None]
    pipeline = load(run / checkpoint)
    vae, unet = pipeline.vae, unguided(pipeline.unet)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    in_bf16 = state.get("precision") == "bf16"
    precision = {"precision": "bf16"} if in_bf16 else {}
    texts = {"encoder": identity.get("text_encoder_hash"), "tokenizer": identity.get("tokenizer_hash"), **precision}
    total, done = sum(len(split) for split in splits if split), 0
    ids: list[str] = []
    values: list[list[float]] = []
    encoder = hash_encoder(vae)
    for number, split in enumerate(split for split in splits if split):
        images = {"images": split.fingerprint, "encoder": encoder, **precision}
        flip = bool(settings.get("random_flip")) and number == 0
        with torch.autocast(unet.device.type, torch.bfloat16, enabled=in_bf16):
            latents = caches.cache_latents(
                split.pixels, images, vae, cache_dir, flip=flip, crops=split.crops, say=_silent
            )
            first = [captions[:1] for captions in split.captions()]
            text = caches.cache_text(first, texts, pipeline.text_encoder, pipeline.tokenizer, cache_dir, say=_silent)
        before = done
        found = losses(
            unet, scheduler, latents, text, vae.config.scaling_factor,
            partial(_report, progress, before, total), cancelled,
        )  # fmt: skip
        if found is None:
            return None
        done += len(split)
        ids += list(split.rows["id"])
        values += found.tolist()
    file = run / FOLDER / f"{checkpoint}.json"
    result = {"weights": weights_hash(run / checkpoint), "levels": LEVELS, "ids": ids, "losses": values}
    write_text(file, json.dumps(result))
    return file


def _report(progress: Progress, before: int, total: int, here: int, _: int) -> None:
    progress(before + here, total)


def _silent(text: str) -> None:
    """Say nothing: a page shows the progress of the losses instead."""


def read(run: Path, checkpoint: str) -> Losses:
    """Return the losses of a checkpoint's images by the first 16 digits of their hashes; {} if there are none of its weights.

    Of copies of an image with different captions, the losses of the worst caption are returned.

    Raises:
        UserError: the file is damaged.
    """
    file = run / FOLDER / f"{checkpoint}.json"
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
        if content["weights"] != weights_hash(run / checkpoint):
            return {}
        found: Losses = {}
        for image, (own, without) in zip(content["ids"], content["losses"], strict=True):
            pair = (float(own), float(without))
            if not all(map(math.isfinite, pair)):
                continue
            key = str(image)[:ID_DIGITS]
            if key not in found or excess(pair) > excess(found[key]):
                found[key] = pair
        return found
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file} is damaged; delete it and measure the losses again") from None


def excess(pair: tuple[float, float]) -> float:
    """Return by how much its caption raises the loss of an image, as a share of the loss without a caption."""
    own, without = pair
    return own / max(without, 1e-12) - 1
