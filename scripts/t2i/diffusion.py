"""Compute the mathematics of diffusion training on tensors.

Schedulers and models are arguments of this module's functions. This module reads no file.

Randomness is stateless: a sample's draws at a step are a function of (seed, step, sample). A sample's draws do not
depend on the order of the batch, on the number of processes, or on earlier computations. A data set smaller than the
batch repeats samples within a step. Each repetition of a sample within a step gets different draws.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TIMESTEP_BANDS = 4  # The validation loss is reported for each quarter of the noise levels.
_MASK = (1 << 64) - 1
_CAPTION = 0x63617074696F6E  # "caption" in ASCII: it keeps the draw of captions apart from the seeds of `draw`.


def mix(*numbers: int) -> int:
    """Return a 63-bit seed made of integers by the SplitMix64 finaliser (Steele, Lea, Flood 2014) over each integer in
    turn.
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass
class Draws:
    """Random draws for a batch of B samples."""

    noise: torch.Tensor  # Standard normal noise of the training, [B, C, H, W] float32.
    # Standard normal noise that samples latents from the VAE's posterior, [B, C, H, W] float32.
    posterior_noise: torch.Tensor
    timesteps: torch.Tensor  # Timesteps, [B] int64 in [0, num_train_timesteps).
    uniform: torch.Tensor  # Numbers in [0, 1) for the flip, the dropped caption, the crop's y and x, [B, 4] float32.
    # Noise of the UNet's input, [B, C, H, W] float32, if this noise differs from `noise`.
    input_noise: torch.Tensor | None = None


def occurrences(samples: Iterable[int]) -> list[int]:
    """Return for each entry of `samples` how many earlier entries are the same sample.

    The first occurrence of a sample gets 0.
    """
    seen: Counter[int] = Counter()
    counts = []
    for sample in samples:
        counts.append(seen[sample])
        seen[sample] += 1
    return counts


def draw(
    seed: int, step: int, samples: list[int], shape: tuple[int, int, int], num_train_timesteps: int,
    copies: Sequence[int] | None = None, *, noise_offset: float = 0.0, input_perturbation: float = 0.0,
) -> Draws:  # fmt: skip
    """Draw noise, timesteps and uniform numbers for a batch. Each sample's draws depend only on (seed, step, sample, copy).

    The draws of a sample's first occurrence depend only on (seed, step, sample). `noise_offset` and
    `input_perturbation` do not change the sample's other draws.

    Args:
        shape: shape of a sample's latents, (C, H, W).
        copies: `occurrences` of the samples within the whole step. A process that holds a part of the step's samples
            passes the entries of that part. With None, occurrences are counted within `samples`.
        noise_offset: deviation of a shift of each channel's noise
            (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
        input_perturbation: deviation of the noise that `input_noise` adds to `noise` (Ning et al., arXiv:2301.11706).
    """
    copies = occurrences(samples) if copies is None else copies
    noise = torch.empty(len(samples), 2, *shape)
    timesteps = torch.empty(len(samples), dtype=torch.int64)
    uniform = torch.empty(len(samples), 4)
    input_noise = torch.empty(len(samples), *shape) if input_perturbation else None
    generator = torch.Generator()
    for row, (sample, copy) in enumerate(zip(samples, copies, strict=True)):
        generator.manual_seed(mix(seed, step, sample, copy) if copy else mix(seed, step, sample))
        noise[row].normal_(generator=generator)
        timesteps[row].random_(0, num_train_timesteps, generator=generator)
        uniform[row].uniform_(generator=generator)
        if noise_offset:
            noise[row, 0] += noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        if input_noise is not None:
            input_noise[row] = noise[row, 0] + input_perturbation * torch.randn(shape, generator=generator)
    return Draws(noise[:, 0].contiguous(), noise[:, 1].contiguous(), timesteps, uniform, input_noise)


def draw_captions(
    seed: int, step: int, samples: Sequence[int], counts: Sequence[int], copies: Sequence[int] | None = None
) -> list[int]:
    """Draw one of its captions for each sample of a batch: a number in [0, count), each with the same probability.

    The number depends only on (seed, step, sample, copy), and changes no number that `draw` draws. If a sample has one
    caption, it is 0.

    Args:
        samples: the samples, as for `draw`.
        counts: the number of captions of each sample, at least 1.
        copies: as for `draw`.
    """
    copies = occurrences(samples) if copies is None else copies
    keys = zip(samples, copies, counts, strict=True)
    return [mix(seed, step, sample, copy, _CAPTION) % count for sample, copy, count in keys]


def choose_versions(uniform: torch.Tensor, flip: bool, crops: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a version of each image of a batch, each with the same probability.

    Args:
        uniform: numbers in [0, 1), float32 [B]. Without crops, numbers below 0.5 choose the mirrored image.
        flip: whether each crop has a mirrored version.
        crops: number of random crops of each image.

    Returns:
        The crop, int64 [B] in [0, crops], of which 0 is the whole image, and whether it is mirrored, int64 [B] in {0, 1}.
    """
    mirrors = 2 if flip else 1
    count = mirrors * (1 + crops)
    version = count - 1 - (uniform.double() * count).long()
    return version // mirrors, version % mirrors


def validation_timesteps(sample: int, num_train_timesteps: int) -> list[int]:
    """Return a validation image's fixed timesteps, one in each of the `TIMESTEP_BANDS` bands.

    The timesteps of all validation images are spread evenly over each band.
    """
    width = num_train_timesteps // TIMESTEP_BANDS
    offset = int(((sample * 0.6180339887498949) % 1.0) * width)  # The golden ratio spreads any number of images evenly.
    return [band * width + offset for band in range(TIMESTEP_BANDS)]


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return raw latents, float32 [B, C, H, W], from cached moments [B, 2C, H, W] and standard normal noise.

    The moments are means, then log-variances, in float16 or float32.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def min_snr_weights(scheduler: Any, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return loss weights [B] of min-SNR-gamma (Hang et al., arXiv:2303.09556, section 3.4).

    Applied to errors of the predicted clean image (x0), the loss weights equal min(SNR, gamma).
    """
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if scheduler.config.prediction_type == "v_prediction" else clipped / snr


def denoising_loss(
    unet: Any,
    scheduler: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    snr_gamma: float | None = None,
    input_noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error [B] of the UNet's prediction, weighted by min-SNR if `snr_gamma` is given.

    The target of the prediction is the noise (Ho et al., arXiv:2006.11239) or the velocity (Salimans and Ho,
    arXiv:2202.00512).

    Args:
        latents: scaled latents, [B, C, H, W].
        noise: noise that defines the target, [B, C, H, W].
        timesteps: noise levels, [B] int64.
        encoder_hidden_states: text embeddings, [B, L, D].
        input_noise: noise added to the latents, [B, C, H, W]. With None, `noise` is added to the latents.
    """
    noisy = scheduler.add_noise(latents, noise if input_noise is None else input_noise, timesteps)
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    prediction = unet(noisy, timesteps, encoder_hidden_states).sample
    loss = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        loss = loss * min_snr_weights(scheduler, timesteps, snr_gamma)
    return loss


def jump(
    scheduler: Any, sample: torch.Tensor, output: torch.Tensor, timesteps: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Return latents [B, C, H, W] after a step of DDIM (Song et al., arXiv:2010.02502, equation 12, without noise).

    Args:
        scheduler: schedule of the noise, whose prediction type says what `output` is.
        sample: latents before the step, [B, C, H, W].
        output: the UNet's output for them, [B, C, H, W].
        timesteps: noise levels before the step, [B] int64.
        ends: noise levels after the step, [B] int64. The level -1 has no noise.
    """
    signal, noise = _shares(scheduler, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        clean, predicted = signal * sample - noise * output, noise * sample + signal * output
    else:
        clean, predicted = (sample - noise * output) / signal, output
    signal, noise = _shares(scheduler, ends)
    return signal * clean + noise * predicted


def jump_loss(
    unet: Any,
    scheduler: Any,
    latents: torch.Tensor,
    later: torch.Tensor,
    timesteps: torch.Tensor,
    ends: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
) -> torch.Tensor:
    """Return the squared error [B] of a student's step from one point of its teacher's trajectory to a later point.

    The error is divided by the squared sine of the angle between both noise levels. It is then the error of the velocity
    (Salimans and Ho, arXiv:2202.00512), whatever the length of the step.

    Args:
        latents: the teacher's latents at `timesteps`, [B, C, H, W].
        later: the teacher's latents at `ends`, [B, C, H, W].
        timesteps: noise levels before the step, [B] int64.
        ends: noise levels after the step, [B] int64. The level -1 has no noise.
        encoder_hidden_states: text embeddings, [B, L, D].
    """
    output = unet(latents, timesteps, encoder_hidden_states).sample.float()
    (signal, noise), (end_signal, end_noise) = _shares(scheduler, timesteps), _shares(scheduler, ends)
    error = (jump(scheduler, latents, output, timesteps, ends) - later) / (noise * end_signal - signal * end_noise)
    return error.square().mean(dim=(1, 2, 3))


def _shares(scheduler: Any, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shares of image and noise in latents at noise levels, [B, 1, 1, 1] each. The level -1 has no noise."""
    levels = torch.nn.functional.pad(scheduler.alphas_cumprod.to(timesteps.device), (0, 1), value=1.0)
    alphas = levels[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()
