"""A tiny autoencoder for students. Its decoder learns to decode as the full one does, in a small part of the time.

The model is diffusers' `AutoencoderTiny` (TAESD, https://github.com/madebyollin/taesd), so stock pipelines load it. It reads
the denoiser's own latents, which are scaled already: its `scaling_factor` is 1.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.optimization import get_cosine_schedule_with_warmup
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from t2i.config import DistillConfig
from t2i.data.caches import to_images, to_pixels
from t2i.data.preparing import batch_indices
from t2i.diffusion import mix
from t2i.errors import UserError
from t2i.evaluation.metrics import psnr
from t2i.files import hash_json, read_object, share_weights, write_json
from t2i.models import hash_model, load_part
from t2i.training.muon import Muon

BLOCKS = 3  # Residual blocks of each level but the finest, which has one, as in TAESD.
LEAST_CHANNELS = 32
STEPS = 1500  # Updates for an autoencoder that is at least twice as wide. The decoders of others are small already.
BATCH = 8  # Pictures of an update.
PICTURES = 4096  # At most so many pictures are kept in memory.
DETAIL = 3.0  # Weight of `detail_error`.
WARMUP = 20  # Updates in which the learning rate rises.
_WEIGHTS = -2  # In place of a sample's number, it seeds the first weights.


def default_steps(vae: AutoencoderKL) -> int:
    """Return the number of updates of a tiny decoder for a VAE, or 0 if it would save no time."""
    return STEPS if vae.config.block_out_channels[0] >= 2 * LEAST_CHANNELS else 0


def build_tiny(vae: AutoencoderKL, seed: int) -> AutoencoderTiny:
    """Return a new tiny autoencoder for the latents of a VAE.

    It has half the channels of the VAE's finest level, 64 for Stable Diffusion's as in TAESD, but at least
    `LEAST_CHANNELS`.
    """
    levels, channels = len(vae.config.block_out_channels), max(LEAST_CHANNELS, vae.config.block_out_channels[0] // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 0, _WEIGHTS))
        return AutoencoderTiny(
            latent_channels=vae.config.latent_channels,
            encoder_block_out_channels=(channels,) * levels,
            decoder_block_out_channels=(channels,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(BLOCKS,) * (levels - 1) + (1,),
            scaling_factor=1.0,
        )


def cache_tiny(
    vae: AutoencoderKL,
    latents: np.ndarray,
    unseen: np.ndarray,
    config: DistillConfig,
    cache_dir: str,
    *,
    in_bf16: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[AutoencoderTiny, float]:
    """Return a tiny autoencoder for a VAE, from the cache or newly trained, and its PSNR to the VAE's pictures in dB.

    A training that was killed starts anew. It takes a minute at 64 px, and longer on larger pictures. Processes that call
    this function together train once: the others wait for the folder's lock, outside of any collective operation.

    Args:
        vae: the VAE, on the device that trains.
        latents: scaled latents of pictures on which the tiny autoencoder learns, float16 [N, C, h, w].
        unseen: scaled latents of other pictures, on which it is measured, float16 [M, C, h, w].
        config: number of updates, learning rate and seed.
        cache_dir: folder that holds all caches.
        in_bf16: whether to compute the training in bf16.
        say: function that prints a progress message.

    Raises:
        UserError: the loss is non-finite.
    """
    settings = [config.decoder_steps, config.decoder_learning_rate, config.seed, BATCH, PICTURES, in_bf16]
    content = [hashlib.sha256(array.tobytes()).hexdigest() for array in (latents, unseen)]
    folder = Path(cache_dir) / "tiny_decoders" / hash_json([*settings, *content, hash_model(vae)])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            say(f"reusing the tiny decoder in {folder}")
            try:
                tiny = load_part(AutoencoderTiny, str(folder), "vae")
                return tiny, float(read_object(folder / "psnr.json")["psnr_db"])
            except (UserError, KeyError):
                raise UserError(f"the cache folder {folder} is damaged; delete the folder and run again") from None
        tiny = build_tiny(vae, config.seed).to(vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=in_bf16):
            decoded = decode(vae, latents[:PICTURES])
        train(tiny, latents[:PICTURES], decoded, config, in_bf16)
        wanted, made = decode(vae, unseen), decode(tiny, unseen)
        decibels = float(psnr(to_pixels(made), to_pixels(wanted)).mean())
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        tiny.cpu().save_pretrained(part, safe_serialization=True)
        share_weights(part)
        write_json(part / "psnr.json", {"psnr_db": decibels})
        os.replace(part, folder)
    return tiny, decibels


@torch.no_grad()
def decode(vae: Any, latents: np.ndarray) -> np.ndarray:
    """Return pictures, uint8 [N, R, R, 3], of scaled latents [N, C, h, w]."""
    batches = (torch.from_numpy(np.array(latents[start : start + BATCH])) for start in range(0, len(latents), BATCH))
    raw = (batch.float().to(vae.device) / vae.config.scaling_factor for batch in batches)
    return np.concatenate([to_images(vae.decode(batch).sample) for batch in raw])


def train(
    tiny: AutoencoderTiny, latents: np.ndarray, pictures: np.ndarray, config: DistillConfig, in_bf16: bool
) -> None:
    """Train a tiny autoencoder to decode latents into pictures, and to encode these pictures into the same latents.

    A picture of the full decoder is a function of the latents, so errors of pixels do not blur it. A perceptual distance
    helps less in equal time, since its updates take five times as long (benchmarks/results/turbo.md).

    Args:
        latents: scaled latents, float16 [N, C, h, w].
        pictures: what the full VAE decodes from them, uint8 [N, R, R, 3].
        config: number of updates, learning rate and seed.
        in_bf16: whether to compute in bf16.

    Raises:
        UserError: the loss is non-finite.
    """
    steps, device = config.decoder_steps or 0, tiny.device
    last = {f"{name}.layers.{len(getattr(tiny, name).layers) - 1}." for name in ("encoder", "decoder")}
    edges = ("encoder.layers.0.", "decoder.layers.0.", *sorted(last))
    optimizer = Muon(tiny.named_parameters(), edges, lr=config.decoder_learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP, steps // 2), steps)
    tiny.train()
    with tqdm(total=steps, desc="tiny decoder", mininterval=0.5) as bar:
        for step in range(steps):
            rows = batch_indices(len(latents), BATCH, config.seed, step)
            given, wanted = torch.from_numpy(latents[rows]).float().to(device), to_pixels(pictures[rows]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                decoded, encoded = tiny.decode(given).sample, tiny.encode(wanted).latents
            error = F.l1_loss(decoded.float(), wanted)
            loss = error + DETAIL * detail_error(decoded.float(), wanted) + F.mse_loss(encoded.float(), given)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the tiny decoder's loss is {loss.item()} at step {step}; lower --decoder_learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{error.item():.4f}", refresh=False)
    tiny.eval()


def detail_error(images: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error of details, which are the difference to the mean of 3 x 3 pixels, at two scales."""
    error, terms = images - target, []
    for _ in range(2):
        mean = F.avg_pool2d(error, 3, stride=1, padding=1, count_include_pad=False)
        terms.append((error - mean).abs().mean())
        error = F.avg_pool2d(error, 2)
    return torch.stack(terms).sum()
