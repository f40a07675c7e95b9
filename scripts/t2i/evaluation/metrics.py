"""Metrics of pictures: diversity, PSNR, SSIM, clipped colors and CLIP score.

Pictures are uint8 arrays [N, H, W, 3] (RGB, 0 to 255) unless a function says otherwise. This module needs no
torchvision.
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from t2i.errors import UserError
from t2i.evaluation.judge import spread
from t2i.evaluation.networks import loading
from t2i.models import best_device

MAX_MEMBERS = 512  # Members of a group whose distances are measured, which bounds the matrix of distances.


def _mean_distance(embeddings: Tensor, groups: Sequence[Any], only: set) -> float:
    """Return the mean L2 distance between two members of a group, averaged over the groups in `only`."""
    names = np.array([str(group) for group in groups])
    means = []
    for name in sorted(only):
        rows = spread(np.flatnonzero(names == name), MAX_MEMBERS)  # The first rows may all be of one class.
        members = embeddings[torch.from_numpy(rows)].float()
        means.append(float(torch.pdist(members).mean()))
    return float(np.mean(means))


def diversity(
    generated: Tensor, real: Tensor, groups: Sequence[Any] | None = None, real_groups: Sequence[Any] | None = None
) -> dict[str, float]:
    """Measure how much pictures of one group differ from each other, compared with real images of that group.

    A group is, for example, one prompt, species or color. Only groups with at least two generated and two real pictures
    are used.

    Args:
        generated: embeddings of generated pictures, [M, F].
        real: embeddings of real images, [N, F].
        groups: group of each generated picture. With None, all pictures form one group.
        real_groups: group of each real image. With None, all images form one group.

    Returns:
        "generated" and "real": pairwise L2 distances within a group, averaged over the groups.
        "ratio": "generated" divided by "real" (1: as diverse as real images, 0: all pictures alike).

    Raises:
        UserError: no group has two members on both sides.
    """
    groups = [""] * len(generated) if groups is None else groups
    real_groups = [""] * len(real) if real_groups is None else real_groups
    counts = [Counter(str(group) for group in names) for names in (groups, real_groups)]
    shared = {name for name in counts[0] if counts[0][name] > 1 and counts[1][name] > 1}
    if not shared:
        raise UserError(
            "diversity needs a group with at least 2 generated and 2 real pictures; generate more per prompt"
        )
    ours, theirs = _mean_distance(generated, groups, shared), _mean_distance(real, real_groups, shared)
    return {"generated": ours, "real": theirs, "ratio": ours / max(theirs, 1e-12)}


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of pairs of pictures, 10 log10(4 / MSE) in dB, [B].

    Args:
        a: first pictures, floats [B, 3, H, W] in [-1, 1], so the data range is 2.
        b: second pictures, floats [B, 3, H, W] in [-1, 1], paired with `a`.
    """
    return peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of pairs of pictures, [B], with an 11x11 Gaussian window (Wang et al., 2004).

    Args:
        a: first pictures, floats [B, 3, H, W] in [-1, 1], so the data range is 2.
        b: second pictures, floats [B, 3, H, W] in [-1, 1], paired with `a`.
    """
    similarity = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
    return torch.as_tensor(similarity).reshape(len(a))


def uniform_ssim(a: Tensor, b: Tensor, side: int = 7) -> Tensor:
    """Return the mean structural similarity of two batches with a uniform window, as a scalar for a loss.

    The similarity equals that of torchmetrics with `gaussian_kernel=False`. torchmetrics makes its window on the CPU,
    which a CUDA graph cannot record.

    Args:
        a: first pictures, floats [B, C, H, W] in [-1, 1], so the data range is 2.
        b: second pictures, floats [B, C, H, W] in [-1, 1], paired with `a`.
        side: side of the window in pixels.
    """
    a, b = (F.pad(images, [side // 2] * 4, mode="reflect") for images in (a, b))
    window = torch.full((a.shape[1], 1, side, side), 1 / side**2, dtype=a.dtype, device=a.device)
    means = F.conv2d(torch.cat([a, b, a * a, b * b, a * b]), window, groups=a.shape[1])
    of_a, of_b, of_aa, of_bb, of_ab = means.chunk(5)
    aa, bb, ab = of_a.square(), of_b.square(), of_a * of_b
    luminance, contrast = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # c1 and c2 of Wang et al., 2004
    variances = (of_aa - aa).clamp(min=0.0) + (of_bb - bb).clamp(min=0.0)
    similarity = (2 * ab + luminance) * (2 * (of_ab - ab) + contrast) / ((aa + bb + luminance) * (variances + contrast))
    return similarity.mean()


def clipped_share(pictures: np.ndarray) -> float:
    """Return the share of color values near black or white, at most 5 or at least 250.

    Strong guidance drives colors to these ends: pictures become glaring, which the features of a network hardly notice.
    """
    return float(((pictures <= 5) | (pictures >= 250)).mean())


@torch.no_grad()
def clip_score(pictures: np.ndarray, prompts: Sequence[str], clip: str | os.PathLike | None) -> dict[str, Any] | None:
    """Measure the CLIP score: mean of 100 * max(cosine(picture, prompt), 0) over pairs.

    Source of the CLIP score: Hessel et al., 2021, with torchmetrics' factor of 100. Prompts beyond the tokenizer's
    limit are cut.

    Args:
        clip: Hub id or folder of a CLIP model with tokenizer and image processor (safetensors). With None, the
            score is not measured.

    Returns:
        None without a CLIP model, otherwise the "mean" score, the number of "pictures", and the name of the "model".

    Raises:
        UserError: the CLIP model cannot be loaded.
    """
    if clip is None:
        return None
    from transformers import CLIPModel, CLIPProcessor

    name = str(clip)
    with loading(name, "as the CLIP model"):
        processor = CLIPProcessor.from_pretrained(name)
        model: Any = CLIPModel.from_pretrained(name, use_safetensors=True).eval()
    model.to(best_device())
    scores = []
    for start in range(0, len(pictures), 32):
        inputs = processor(
            text=list(prompts[start : start + 32]),
            images=[Image.fromarray(np.asarray(p)) for p in pictures[start : start + 32]],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
        )
        output = model(**inputs.to(model.device))
        scores.append(100 * F.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0).cpu())
    return {"mean": float(torch.cat(scores).mean()), "pictures": len(pictures), "model": name}
