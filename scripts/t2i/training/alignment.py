"""Align the features in the middle of the UNet with those of a frozen network, which know what a picture shows.

Source: REPA (Yu et al., arXiv:2410.06940); for UNets, Tian et al., arXiv:2503.18414. Here half of the middle block's
channels are aligned directly, so there is no trained projection to save, to shard or to throw away.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from t2i.config import PACKAGED_NETWORKS, TrainUnetConfig
from t2i.errors import UserError
from t2i.evaluation.networks import PackagedFeatures, load_vision_model, loading, packaged_input
from t2i.files import hash_json
from t2i.models import hash_model
from t2i.pictures import engines

STRIDE = 32  # Pixels of the input per feature of an EfficientNet.
OTHER_TOKENS = 8  # Tokens before those of the patches, at most: a class token and registers.
INPUT_SIDES = (128, 256)  # The smallest and the largest input of an EfficientNet, in pixels.


class Alignment:
    """The term of the loss: 1 - cosine similarity of the middle block's first channels to the targets.

    Attributes:
        channels: number of aligned channels.
    """

    def __init__(self, unet: Any, weight: float) -> None:
        """Watch the middle block of a UNet. `weight` is the weight of the term."""
        self.channels, self.weight = middle_channels(unet), weight
        self._features: torch.Tensor | None = None
        unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self._features = output if torch.is_grad_enabled() else None  # Validation keeps nothing.

    def penalty(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean term of the last forward pass.

        Args:
            targets: rows of `caches.cache_alignment`, [B, K, s, s].
        """
        assert self._features is not None
        features = self._features[:, : targets.shape[1]].float()
        self._features = None
        return 1 - F.cosine_similarity(features, targets.float(), dim=1).mean()


def align(unet: Any, config: TrainUnetConfig) -> Alignment | None:
    """Return the alignment of a UNet, or None if the settings ask for none."""
    return Alignment(unet, config.alignment_weight) if config.alignment_weight else None


def middle_channels(unet: Any) -> int:
    """Return the number of channels of a UNet's middle block that are aligned: half of them."""
    return max(1, int(unet.config.block_out_channels[-1]) // 2)


def middle_side(unet: Any) -> int:
    """Return the side of the features in a UNet's middle block."""
    return -(-int(unet.config.sample_size) // 2 ** (len(unet.config.block_out_channels) - 1))  # Halving rounds up.


class TargetNetwork:
    """A frozen network that maps pictures to a grid of features.

    Attributes:
        side: rows and columns of the grid.
        channels: number of the UNet's channels that are aligned.
    """

    def __init__(self, source: str, unet: Any) -> None:
        """Load a network.

        Args:
            source: "efficientnet-lite2", or a folder or Hub id of a vision model of transformers (safetensors).
            unet: the UNet whose middle block is aligned. It decides the grid, and the number of aligned channels.

        Raises:
            UserError: the network cannot be loaded, its features form no grid, or the UNet has no middle block.
        """
        if unet.mid_block is None:
            raise UserError("alignment_weight needs a UNet with a middle block, and this one has none; set it to 0")
        self.source, self.side, self.channels = source, middle_side(unet), middle_channels(unet)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = None
        self.compiled: Any = None
        if source in PACKAGED_NETWORKS:
            self.input_side = min(max(STRIDE * self.side, INPUT_SIDES[0]), INPUT_SIDES[1])
            self.model: Any = PackagedFeatures(source, is_pooled=False).to(self.device)
            if self.device == "cpu" and engines.is_installed():
                self.compiled = engines.compile_module(self.model, torch.zeros(1, 3, self.input_side, self.input_side))
            return
        self.processor, self.model = load_vision_model(source, "as alignment_network")
        self.model = getattr(self.model, "vision_model", self.model).to(self.device)
        with loading(source, "as alignment_network"):
            example = np.full((1, 64, 64, 3), 127, np.uint8)
            if not torch.equal(self.maps(example), self.maps(example)):
                raise ValueError("its features differ from call to call")

    def identity(self) -> str:
        """Return a hash of the network's weights and of the preparing of its input, for caches of features."""
        if self.processor is None:
            return hash_json([self.source, self.input_side, self.side])  # Its package is pinned.
        return hash_json([hash_model(self.model), self.processor.to_json_string(), self.side])

    @torch.inference_mode()
    def maps(self, pictures: np.ndarray) -> torch.Tensor:
        """Return the features of pictures, float32 [N, F, side, side] on the CPU.

        Args:
            pictures: pictures to read, uint8 [N, H, W, 3], RGB.
        """
        if self.processor is None:
            pixels = packaged_input(pictures, self.input_side, self.device)
            if self.compiled is not None:
                features = torch.from_numpy(np.array(self.compiled(pixels.numpy())[0]))
            else:
                features = self.model(pixels)
        else:
            sizes = dict(getattr(self.processor, "crop_size", None) or self.processor.size)
            height = sizes.get("height") or sizes.get("shortest_edge") or INPUT_SIDES[1]
            inputs = self.processor(
                images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt",
                size={"height": height, "width": height}, do_center_crop=False,
            )  # fmt: skip
            features = as_grid(self.model(**inputs.to(self.device)).last_hidden_state)
        if features.shape[-1] != self.side or features.shape[-2] != self.side:
            features = F.interpolate(features, (self.side, self.side), mode="area")
        return features.float().cpu()


def as_grid(states: torch.Tensor) -> torch.Tensor:
    """Return a vision model's last hidden state as a grid [B, F, s, s].

    The tokens of patches [B, N, F] stand behind tokens of other kinds, such as the class token.
    """
    if states.dim() == 4:
        return states
    side = int(states.shape[1] ** 0.5)
    if states.shape[1] - side * side > OTHER_TOKENS:
        raise ValueError(f"its {states.shape[1]} tokens form no square grid")
    return states[:, states.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
