"""Terms of the autoencoder's loss, and what a training step needs for them, as functions of tensors.

Images are floats [B, 3, S, S] in [-1, 1], and terms are scalars.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.config import PATCH, TrainVaeConfig
from t2i.diffusion import mix
from t2i.evaluation.metrics import uniform_ssim

Features = Callable[[Tensor], list[Tensor]]
Transform = Callable[[Tensor], Tensor]
_EQUIVARIANCE = -1  # In place of a sample's number, it seeds draws that no sample has.
LARGEST_BALANCE = 1e4  # Limit of the factor in `balance`, as in taming-transformers.


def loss_terms(
    reconstruction: Tensor,
    target: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    values: int,
    config: TrainVaeConfig,
    perceptual: Features | None = None,
) -> dict[str, Tensor]:
    """Return the reconstruction, structure, KL and perceptual terms, and `train_loss`, which is their weighted sum.

    Args:
        reconstruction: the decoder's images.
        target: images that the reconstruction should equal.
        mean: means of the posterior, [B, C, h, w].
        log_variance: log-variances of the posterior, [B, C, h, w].
        values: number of color values that were encoded. The KL term is in nats per value.
        config: weights of the terms.
        perceptual: features of `perceptual_distance`, or None without that term.
    """
    error = reconstruction - target
    terms = {"mse": error.square().mean(), "l1": error.abs().mean(), "kl": kl_divergence(mean, log_variance) / values}
    loss = config.mse_weight * terms["mse"] + config.l1_weight * terms["l1"] + config.kl_weight * terms["kl"]
    if config.ssim_weight:
        terms["dssim"] = 1.0 - uniform_ssim(reconstruction, target)
        loss = loss + config.ssim_weight * terms["dssim"]
    if perceptual is not None:
        terms["perceptual"] = perceptual_distance(perceptual, reconstruction, target)
        loss = loss + config.perceptual_weight * terms["perceptual"]
    return {"train_loss": loss, **terms}


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) in nats, summed over all latents.

    This is the closed form of Kingma and Welling, arXiv:1312.6114, appendix B.
    """
    log_variance = log_variance.clamp(-30.0, 20.0)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()


def perceptual_distance(features: Features, images: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of features with unit norm, averaged over positions and then over depths.

    It is 0 for equal images and 2 for unrelated features. This is LPIPS without learnt weights (Zhang et al.,
    arXiv:1801.03924). Gradients flow to `images` only.

    Args:
        features: maps images to unit-norm features [B, C, ...] of several depths.
        images: images that are trained.
        target: images that they are compared with.
    """
    with torch.no_grad():
        wanted = features(target)
    pairs = zip(features(images), wanted, strict=True)
    return torch.stack([(found - known).square().sum(dim=1).mean() for found, known in pairs]).mean()


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Return the discriminator's hinge loss for its outputs on photos and on reconstructions (arXiv:1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + made).mean())


def adversarial_loss(made: Tensor) -> Tensor:
    """Return the autoencoder's hinge loss for the discriminator's outputs on reconstructions."""
    return -made.mean()


def balance(
    reconstruction: Tensor,
    of_terms: Tensor,
    of_adversary: Tensor,
    last_layer: Tensor,
    average: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the factor that gives the discriminator's gradient the size of the other terms' gradient.

    Both are measured at the decoder's last layer (Esser et al., arXiv:2012.09841, equation 7).

    Args:
        reconstruction: the decoder's images, with the graph that made them.
        of_terms: gradient of the other terms at `reconstruction`.
        of_adversary: gradient of the adversarial term at `reconstruction`.
        last_layer: weights of the decoder's last layer.
        average: returns the mean of a tensor over all processes, so that all get the same factor.
    """
    gradients = []
    for gradient in (of_terms, of_adversary):
        size = gradient.norm().clamp(min=1e-30)  # Gradients pass the graph at norm 1, which fp16 holds.
        at_layer = torch.autograd.grad(reconstruction, last_layer, gradient / size, retain_graph=True)[0]
        gradients.append(at_layer.float() * size)
    terms, adversary = average(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (terms / adversary.clamp(min=1e-30)).clamp(max=LARGEST_BALANCE)


def draw_transform(seed: int, number: int, share: float, latent_side: int, factor: int) -> Transform | None:
    """Draw how batch `number` is transformed, or None if it is not. The draw is a function of (seed, number).

    Latents are turned by 90, 180 or 270 degrees, and shrunk to a side between a quarter and less than the whole
    (Kouzelis et al., arXiv:2502.09509). The images keep a side of at least `PATCH` pixels.

    Args:
        share: share of the batches that are transformed.
        latent_side: side of the latents. The shrunk side is also a whole number of latents.
        factor: pixels per latent along a side.
    """
    generator = torch.Generator().manual_seed(mix(seed, number, _EQUIVARIANCE))
    chosen, turned, shrunk = torch.rand(3, generator=generator).tolist()
    if chosen >= share:
        return None
    smallest = min(latent_side, max(math.ceil(latent_side / 4), math.ceil(PATCH / factor)))
    side = smallest + int(shrunk * (latent_side - smallest))
    return partial(turn_and_shrink, turns=1 + int(3 * turned), scale=side / latent_side)


def turn_and_shrink(images: Tensor, turns: int, scale: float) -> Tensor:
    """Return images or latents [B, C, S, S] turned by `turns` times 90 degrees, with sides `scale` times as long."""
    side = round(images.shape[-1] * scale)
    if side != images.shape[-1]:
        whole = images.cpu() if images.device.type == "mps" else images  # MPS has no gradient of this interpolation.
        shrunk = F.interpolate(whole, (side, side), mode="bilinear", align_corners=False, antialias=True)
        images = shrunk.to(images.device)
    return images.rot90(turns, dims=(-2, -1))
