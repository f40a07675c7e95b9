"""The frozen network whose features a perceptual distance compares."""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from t2i import models
from t2i.config import JUDGE, PACKAGED_NETWORKS
from t2i.errors import UserError
from t2i.evaluation.networks import load_efficientnet_lite, load_vision_model

ZOOM, LARGEST = 2, 128  # Images below 128 px are enlarged by 2: the networks know objects of 200 px and more.
DEPTHS = 4  # Number of hidden states of a transformers model that are compared.
# Convolutions of an EfficientNet's parts, with the normalisation behind each.
_NORMALISED = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}


class PerceptualNetwork(nn.Module):
    """Frozen network that maps images to features of several depths.

    Attributes:
        identity: what stands for the network when two runs are compared: its name, or a hash of its weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: str) -> None:
        """Load a network.

        Args:
            source: "efficientnet-lite2", or a folder or Hub id of a vision model of transformers (safetensors).

        Raises:
            UserError: the network cannot be loaded, or is the judge's.
        """
        super().__init__()
        if source == JUDGE:
            raise UserError(f"{JUDGE} judges pictures, so nothing may be trained on it; take efficientnet-lite2")
        self.is_packaged = source in PACKAGED_NETWORKS
        mean = std = [0.5, 0.5, 0.5]
        self.patch, self.options = 1, {}
        if self.is_packaged:
            self.identity, self.network = source, fold_normalisations(load_efficientnet_lite(source))
        else:
            processor, model = load_vision_model(source, "as perceptual_network")
            self.identity, self.network = models.hash_model(model), getattr(model, "vision_model", model)
            mean, std = processor.image_mean or mean, processor.image_std or std
            self.patch = int(getattr(self.network.config, "patch_size", 1))
            if "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters:
                self.options = {"interpolate_pos_encoding": True}
        self.network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of images, [B, C, ...] for each depth, with unit norm over the channels.

        Args:
            images: floats [B, 3, S, S] in [-1, 1]. Gradients flow to them.
        """
        side = max(images.shape[-1], min(ZOOM * images.shape[-1], LARGEST))
        side = math.ceil(side / self.patch) * self.patch
        if side != images.shape[-1]:
            images = F.interpolate(images, (side, side), mode="bicubic", align_corners=False)
        images = ((images + 1) / 2 - self.mean) / self.std
        depths = self._packaged_depths(images) if self.is_packaged else self._hidden_states(images)
        return [F.normalize(features, dim=1, eps=1e-6) for features in depths]

    def _packaged_depths(self, images: Tensor) -> list[Tensor]:
        """Return the features before each halving of their sides, and the last block's."""
        network: Any = self.network
        features, depths = network._swish(network._conv_stem(images.contiguous(memory_format=torch.channels_last))), []
        for block in network._blocks:
            if block._depthwise_conv.stride[0] == 2:
                depths.append(features)
            features = block(features)
        return [*depths, features]

    def _hidden_states(self, images: Tensor) -> list[Tensor]:
        """Return hidden states at evenly spaced depths. Tokens [B, N, C] become [B, C, N]."""
        states = self.network(pixel_values=images, output_hidden_states=True, **self.options).hidden_states
        last = len(states) - 1
        chosen = sorted({max(1, round(last * number / DEPTHS)) for number in range(1, DEPTHS + 1)})
        return [states[depth].transpose(1, 2) if states[depth].dim() == 3 else states[depth] for depth in chosen]


def fold_normalisations(network: nn.Module) -> nn.Module:
    """Fold the batch normalisations of an EfficientNet in eval mode into its convolutions, and return it.

    The blocks' features stay the same, and take a third less time. The head behind the blocks is left alone.
    """
    blocks: Any = network._blocks
    for part in (network, *blocks):
        for convolution, normalisation in _NORMALISED.items():
            if hasattr(part, convolution):
                fused = fuse_conv_bn_eval(getattr(part, convolution), getattr(part, normalisation))
                setattr(part, convolution, fused)
                setattr(part, normalisation, nn.Identity())
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
