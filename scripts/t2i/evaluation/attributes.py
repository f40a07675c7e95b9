"""Train and use the classifier that recognises attributes of drawn flowers, or labels, in pictures.

Pictures are uint8 arrays [N, H, W, 3] (RGB, 0 to 255) unless a function says otherwise.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from t2i.errors import UserError
from t2i.files import read_json, share_weights, write_json

Heads = Mapping[str, Sequence[Any]]  # name of a head -> the values that it distinguishes, in the order of its logits


class Block(nn.Module):
    """Residual block of two 3x3 convolutions (He et al., 2016), which halves the picture's size if `stride` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride) if stride != 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.convs(x))


class Classifier(nn.Module):
    """Residual network with one linear head per attribute.

    The network's input is [B, 3, R, R], floats in [-1, 1], with R = `resolution` (32 to 128). The network's output maps
    each head's name to logits [B, len(heads[name])].
    """

    def __init__(self, heads: Heads, resolution: int, width: int = 32) -> None:
        super().__init__()
        self.heads = {name: list(values) for name, values in heads.items()}
        self.resolution, self.width = resolution, width
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2 if resolution >= 48 else 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        pairs = zip([width, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Block(i, o, 1 if n == 0 else 2) for n, (i, o) in enumerate(pairs)))
        self.logits = nn.ModuleDict({name: nn.Linear(widths[-1], len(values)) for name, values in self.heads.items()})

    def features(self, x: Tensor) -> Tensor:
        """Return pooled embeddings [B, F] of pictures [B, 3, R, R] in [-1, 1]."""
        return self.blocks(self.stem(x)).mean((2, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        embedding = self.features(x)
        return {name: head(embedding) for name, head in self.logits.items()}

    def save(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(
            {k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors"
        )
        share_weights(folder)
        write_json(folder / "config.json", {"heads": self.heads, "resolution": self.resolution, "width": self.width})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Load a classifier that `save` wrote, in eval mode.

        Raises:
            UserError: a file of the classifier is missing, or does not fit.
        """
        folder = Path(folder)
        try:
            model = cls(**read_json(folder / "config.json"))
            model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        except (OSError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{folder} holds no classifier that can be read ({error}); remove it to train another."
            ) from error
        return model.eval()


def to_tensor(pixels: np.ndarray, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Convert uint8 [B, H, W, 3] to floats [B, 3, size, size] in [-1, 1].

    The pictures are resized with antialiasing.
    """
    x = torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def _augment(x: Tensor) -> Tensor:
    """Augment pictures, floats [B, 3, R, R] in [-1, 1], by random zooms, shifts, turns, flips, brightness, blur and noise."""
    count, _, size, _ = x.shape
    device = x.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, device=device) * (high - low) + low

    # Each picture gets one affine map.
    area = uniform(0.85, 1.1)
    turn = uniform(-0.3, 0.3)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    side = area.sqrt()
    reach = (1 - side).clamp(min=0) + 0.06
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack(
        [
            torch.stack([flip * side * cos, -side * sin, uniform(-1, 1) * reach], 1),
            torch.stack([flip * side * sin, side * cos, uniform(-1, 1) * reach], 1),
        ],
        1,
    )
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False
    )

    # A model's pictures are softer than its training images, so half of each batch loses detail.
    small = int(torch.randint(round(size * 0.45), size, ()))
    half = F.interpolate(x[: count // 2], (small, small), mode="bilinear", antialias=True, align_corners=False)
    x = torch.cat([F.interpolate(half, (size, size), mode="bicubic", align_corners=False), x[count // 2 :]])
    x = x * uniform(0.9, 1.1, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1) / 2
    return x + torch.randn_like(x) * uniform(0, 0.06, 1, 1, 1)


def train_classifier(
    pixels: np.ndarray,
    labels: Mapping[str, np.ndarray],
    heads: Heads,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 4e-3,
    width: int = 32,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Classifier:
    """Train a classifier and return it in eval mode.

    Training uses AdamW, a one-cycle schedule and label smoothing of 0.05. Training with the same arguments gives the
    same weights on the same machine.

    Args:
        pixels: training pictures, uint8 [N, R, R, 3].
        labels: value of each picture by attribute name: int64 [N], indices into `heads[name]`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(heads, pixels.shape[1], width).to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # this is a quarter faster on a CPU
        targets = {name: torch.as_tensor(labels[name], dtype=torch.int64) for name in model.heads}
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=learning_rate
        )
        warm_up = (
            0.3 if steps == 5 else 0.2
        )  # Share of the steps. A warm-up of exactly one step makes torch divide by 0.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=warm_up)
        model.train()
        for rows in tqdm(
            _batches(len(pixels), batch_size, steps), total=steps, desc="classifier", disable=not progress
        ):
            x = _augment(to_tensor(pixels[rows.numpy()], pixels.shape[1], device))
            wanted = {name: target[rows].to(device) for name, target in targets.items()}
            logits = model(x)
            losses = [F.cross_entropy(logits[name], y, label_smoothing=0.05) for name, y in wanted.items()]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def _batches(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Yield `steps` batches of row numbers, in a new order each epoch.

    The last batch of an epoch is dropped if it is smaller.
    """
    batch_size = min(batch_size, count)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(count)
        rows, order = order[:batch_size], order[batch_size:]
        yield rows


@torch.no_grad()
def predict(classifier: Classifier, pixels: np.ndarray, batch_size: int = 256) -> dict[str, np.ndarray]:
    """Return the most likely value of every attribute that the classifier reads.

    Args:
        pixels: pictures of any size.
        batch_size: number of pictures that the network reads at once.

    Returns:
        The recognised values by attribute name: int64 [N], indices into `classifier.heads[name]`.
    """
    device = next(classifier.parameters()).device
    classifier.eval()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in classifier.heads}
    for start in range(0, len(pixels), batch_size):
        logits = classifier(to_tensor(pixels[start : start + batch_size], classifier.resolution, device))
        for name, values in logits.items():
            parts[name].append(values.argmax(1).cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def accuracy(classifier: Classifier, pixels: np.ndarray, labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the share (0 to 1) of pictures whose value is recognised correctly, per head of `labels`.

    Args:
        labels: true values by attribute name: int [N], indices into `classifier.heads[name]`.
    """
    found = predict(classifier, pixels)
    return {name: float((found[name] == np.asarray(values)).mean()) for name, values in labels.items()}


def prompt_following(
    classifier: Classifier,
    pictures: np.ndarray,
    wanted: Sequence[Mapping[str, Any]],
    joint: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the share (0 to 1) of pictures that show the wanted values.

    Args:
        wanted: values that each picture should show, such as {"petal_color": "red", "petal_count": 5}. Keys that are not
            heads are ignored.
        joint: heads that must be right at once for "all". With None, all heads must be right.

    Returns:
        One share per head, and "all", the share of pictures that are right in all heads of `joint`.
    """
    found = predict(classifier, pictures)
    right = {
        name: np.array([values[k] == w[name] for k, w in zip(found[name], wanted, strict=True)])
        for name, values in classifier.heads.items()
    }
    shares = {name: float(r.mean()) for name, r in right.items()}
    return {**shares, "all": float(np.logical_and.reduce([right[name] for name in joint or right]).mean())}
