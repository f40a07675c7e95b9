"""The patch discriminator that the autoencoder is trained against, and its optimiser."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i.config import TrainVaeConfig
from t2i.diffusion import mix
from t2i.training import checkpoints

WIDTH = 64  # Channels of the first layer.
_SEED = -2  # In place of a step, it seeds the first weights.


class PatchDiscriminator(nn.Sequential):
    """Network that maps images [B, 3, S, S] to one output per patch, [B, 1, S / 8, S / 8]. A high output means a photo.

    It is PatchGAN's discriminator of three layers (Isola et al., arXiv:1611.07004) with two changes. Groups of channels are
    normalised instead of batches, so that an image's output depends on no other image. The last two layers have kernels of
    side 3 and keep the size, so that an image of 8 px has a patch.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for width in (WIDTH, 2 * WIDTH):
            layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False), *_activation(2 * width)]
        layers += [nn.Conv2d(4 * WIDTH, 8 * WIDTH, 3, padding=1, bias=False), *_activation(8 * WIDTH)]
        super().__init__(*layers, nn.Conv2d(8 * WIDTH, 1, 3, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)


def _activation(width: int) -> list[nn.Module]:
    return [nn.GroupNorm(16, width), nn.LeakyReLU(0.2)]


class Discriminator:
    """A `PatchDiscriminator` with its optimiser. Each process has a copy, and all copies stay the same.

    Attributes:
        network: the network, in float32.
        optimizer: its AdamW, apart from the autoencoder's and from the loss scale of fp16.
    """

    def __init__(self, config: TrainVaeConfig, device: Any) -> None:
        with torch.random.fork_rng(devices=[]):  # Other draws do not change.
            torch.manual_seed(mix(config.seed, _SEED))
            self.network = PatchDiscriminator().to(device)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.discriminator_learning_rate, betas=(0.5, 0.9), weight_decay=0.0, fused=True
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return the outputs for images, [B, 1, S / 8, S / 8]."""
        return self.network(images)

    def step(self, config: TrainVaeConfig, accelerator: Any) -> None:
        """Update the weights by the mean of all processes' gradients, unless it is non-finite. Every process must call it."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if accelerator.num_processes > 1:
            mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
            parts = mean.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])
        if math.isfinite(float(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write weights and the optimiser's tensors into a new folder, and return the optimiser's other state."""
        folder.mkdir()
        save_file(self.network.state_dict(), folder / "discriminator.safetensors")
        return checkpoints.save_optimizer(folder, self.optimizer)

    def load(self, folder: Path, numbers: dict[str, Any]) -> None:
        """Load what `save` wrote into the folder, and the state that it returned."""
        self.network.load_state_dict(load_file(folder / "discriminator.safetensors"))
        checkpoints.load_optimizer(folder, self.optimizer, numbers)
