"""Figures about pictures: a small classifier that reads them, prompt following, memorisation, diversity, PSNR, SSIM,
KID and CLIP score. Pictures are uint8 arrays [N, H, W, 3] (RGB, 0..255) unless a function says otherwise; no
torchvision is needed.
"""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm.auto import tqdm

from t2i.errors import UserError
from t2i.files import read_json, write_json

Heads = Mapping[str, Sequence[Any]]  # name of a head -> the values that it tells apart, in the order of its logits


class Block(nn.Module):
    """Residual block of two 3x3 convolutions (He et al., 2016), halving the size where `stride` is 2."""

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

    Input [B, 3, R, R], floats in [-1, 1], R = `resolution` (32 to 128); output: name -> logits [B, len(heads[name])].
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
        """Pooled embedding [B, F] of pictures [B, 3, R, R] in [-1, 1]."""
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
        write_json(folder / "config.json", {"heads": self.heads, "resolution": self.resolution, "width": self.width})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Read what `save` wrote, ready to judge. Raises UserError if a file is missing or does not fit."""
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
    """uint8 [B, H, W, 3] -> floats [B, 3, size, size] in [-1, 1]; antialiased where the size changes."""
    x = torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def _augment(x: Tensor, strong: bool) -> Tensor:
    """Random shifts, brightness, blur and noise; with `strong` (few photos) also flips, crops, colours and erased
    rectangles.
    """
    count, _, size, _ = x.shape
    device = x.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, device=device) * (high - low) + low

    # one affine map per picture: zoom (area 0.4 to 1 of the picture when strong), shift, turn and flip
    area = uniform(0.4, 1) if strong else uniform(0.85, 1.1)
    stretch = uniform(-0.2, 0.2).exp() if strong else torch.ones(count, device=device)
    turn = uniform(-0.3, 0.3)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    wide, high = area.sqrt() * stretch, area.sqrt() / stretch
    reach = (1 - area.sqrt()).clamp(min=0) + 0.06
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack(
        [
            torch.stack([flip * wide * cos, -high * sin, uniform(-1, 1) * reach], 1),
            torch.stack([flip * wide * sin, high * cos, uniform(-1, 1) * reach], 1),
        ],
        1,
    )
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False
    )

    # pictures that a model makes are softer than its training images: half of each batch loses detail
    small = int(torch.randint(round(size * 0.45), size, ()))
    half = F.interpolate(x[: count // 2], (small, small), mode="bilinear", antialias=True, align_corners=False)
    x = torch.cat([F.interpolate(half, (size, size), mode="bicubic", align_corners=False), x[count // 2 :]])

    amount = 0.3 if strong else 0.1
    x = x * uniform(1 - amount, 1 + amount, 1, 1, 1) + uniform(-amount, amount, 1, 1, 1) / 2
    if strong:
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.08, 0.08, 3, 1, 1)
    x = x + torch.randn_like(x) * uniform(0, 0.06, 1, 1, 1)
    if strong:  # random erasing (Zhong et al., 2020), half of the pictures
        line = torch.linspace(-1, 1, size, device=device)
        rows = (line - uniform(-1, 1, 1)).abs() < uniform(0.1, 0.45, 1)
        columns = (line - uniform(-1, 1, 1)).abs() < uniform(0.1, 0.45, 1)
        hole = (rows[:, None, :, None] & columns[:, None, None, :]) & (uniform(0, 1, 1, 1, 1) < 0.5)
        x = torch.where(hole, x.mean((2, 3), keepdim=True), x)
    return x


def train_classifier(
    pixels: np.ndarray,
    labels: Mapping[str, np.ndarray],
    heads: Heads,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    augment: bool,
    learning_rate: float = 4e-3,
    width: int = 32,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Classifier:
    """Train a classifier on `pixels` (uint8 [N, R, R, 3]) and `labels` (name -> int64 [N], indices into `heads[name]`).

    AdamW on a one-cycle schedule, label smoothing 0.05; the same arguments give the same weights on the same machine.
    `augment=False` suits thousands of drawings (small shifts, brightness, blur and noise only), `augment=True` suits
    hundreds of photos (flips, crops, colours, erasing and mixup as well). Returns the model in eval mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(heads, pixels.shape[1], width).to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU
        targets = {name: torch.as_tensor(labels[name], dtype=torch.int64) for name in model.heads}
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=learning_rate
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
        model.train()
        for rows in tqdm(
            _batches(len(pixels), batch_size, steps), total=steps, desc="classifier", disable=not progress
        ):
            x = _augment(to_tensor(pixels[rows.numpy()], pixels.shape[1], device), augment)
            wanted = {name: target[rows].to(device) for name, target in targets.items()}
            share, other = 1.0, torch.arange(len(rows))
            if augment:  # mixup (Zhang et al., 2018)
                share, other = float(torch.distributions.Beta(0.3, 0.3).sample()), torch.randperm(len(rows))
                x = share * x + (1 - share) * x[other]
            logits = model(x)
            losses = [
                share * F.cross_entropy(logits[name], y, label_smoothing=0.05)
                + (1 - share) * F.cross_entropy(logits[name], y[other], label_smoothing=0.05)
                for name, y in wanted.items()
            ]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def _batches(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """`steps` batches of row numbers, a fresh order every epoch; the last, smaller batch of an epoch is dropped."""
    batch_size = min(batch_size, count)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(count)
        rows, order = order[:batch_size], order[batch_size:]
        yield rows


@torch.no_grad()
def _read(
    classifier: Classifier, pixels: np.ndarray, batch_size: int = 256
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    device = next(classifier.parameters()).device
    classifier.eval()
    for start in range(0, len(pixels), batch_size):
        embedding = classifier.features(to_tensor(pixels[start : start + batch_size], classifier.resolution, device))
        yield embedding.cpu(), {name: head(embedding).argmax(1).cpu() for name, head in classifier.logits.items()}


def predict(classifier: Classifier, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Most likely value of every head: name -> int64 [N], indices into `classifier.heads[name]`. Pictures may be of any
    size.
    """
    parts = [values for _, values in _read(classifier, pixels)]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in classifier.heads}


def classifier_features(classifier: Classifier, pixels: np.ndarray) -> Tensor:
    """Embedding [N, F] (float32, CPU) of pictures of any size."""
    return torch.cat([embedding for embedding, _ in _read(classifier, pixels)])


def accuracy(classifier: Classifier, pixels: np.ndarray, labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Share (0 to 1) of the pictures whose value is read correctly, per head of `labels`."""
    found = predict(classifier, pixels)
    return {name: float((found[name] == np.asarray(values)).mean()) for name, values in labels.items()}


def prompt_following(
    classifier: Classifier, pictures: np.ndarray, wanted: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Share (0 to 1) of `pictures` that show what was asked for, per head, and "all": every head right at once.

    `wanted[i]` are the values asked of picture i, such as {"petal_color": "red", "petal_count": 5}; other keys are
    ignored.
    """
    found = predict(classifier, pictures)
    right = {
        name: np.array([values[k] == w[name] for k, w in zip(found[name], wanted, strict=True)])
        for name, values in classifier.heads.items()
    }
    shares = {name: float(r.mean()) for name, r in right.items()}
    return {**shares, "all": float(np.logical_and.reduce(list(right.values())).mean())}


def pixel_embedding(pixels: np.ndarray, size: int = 16) -> Tensor:
    """Pictures as `size` x `size` thumbnails in [-1, 1]: [N, 3 * size^2], float32; blind to fine detail, hence to
    softness.
    """
    parts = [to_tensor(pixels[start : start + 512], size).flatten(1) for start in range(0, len(pixels), 512)]
    return torch.cat(parts)


def _nearest(queries: Tensor, train: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The `neighbours` smallest L2 distances [M, k] from each query to rows of `train`, and those rows' numbers [M, k].

    Works in blocks of 256 x 4,096, so memory does not grow with the training set.
    """
    distances, rows = [], []
    for some in queries.split(256):
        best = torch.full((len(some), 0), torch.inf)
        where = torch.zeros((len(some), 0), dtype=torch.int64)
        for start in range(0, len(train), 4096):
            block = torch.cdist(some, train[start : start + 4096])
            index = torch.arange(start, start + block.shape[1]).expand_as(block)
            best, keep = torch.cat([best, block], 1).topk(
                min(neighbours, best.shape[1] + block.shape[1]), largest=False
            )
            where = torch.cat([where, index], 1).gather(1, keep)
        distances.append(best)
        rows.append(where)
    return torch.cat(distances), torch.cat(rows)


def _both_ways(pictures: np.ndarray, train: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [M, 2k] of each picture, as it is and mirrored, to the k = 50 nearest training images of each, and their
    numbers [M, 2k]: training flips images, so a copy may be mirrored.
    """
    thumbnails = pixel_embedding(pictures)
    near, rows = _nearest(thumbnails, train, 50)
    mirrored = thumbnails.unflatten(1, (3, 16, 16)).flip(3).flatten(1)
    near_mirrored, rows_mirrored = _nearest(mirrored, train, 50)
    return torch.cat([near, near_mirrored], 1), torch.cat([rows, rows_mirrored], 1)


def _neighbourhood(distances: Tensor) -> Tensor:
    """Mean distance [M, 1] to the nearest k of `_both_ways`' [M, 2k]."""
    return distances.topk(distances.shape[1] // 2, largest=False).values.mean(1, keepdim=True).clamp(min=1e-12)


def _relative_distances(pictures: np.ndarray, train: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [M] of each picture to its nearest training image over the mean to its 50 nearest; that image's number
    [M].
    """
    distances, rows = _both_ways(pictures, train)
    first, column = (distances / _neighbourhood(distances)).min(1)
    return first, rows.gather(1, column[:, None])[:, 0]


def nearest_images(picture: np.ndarray, train: Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` training images nearest to a picture (uint8 [H, W, 3]), each once: number and relative distance.

    train: `pixel_embedding` of the training images. Distances are `memorisation`'s: over the mean to the 50 nearest, so that
    the first is the picture's "relative_distance", and one under 0.5 a near copy.
    """
    distances, rows = _both_ways(picture[None], train)
    relative = (distances / _neighbourhood(distances))[0]
    found: dict[int, float] = {}
    for column in relative.argsort().tolist():
        found.setdefault(int(rows[0, column]), float(relative[column]))
    return list(found.items())[:count]


def relative_distances(pictures: np.ndarray, train: Tensor) -> np.ndarray:
    """`memorisation`'s relative distance of each picture to its nearest of `train` (a `pixel_embedding`): float32 [M]."""
    return _relative_distances(pictures, train)[0].numpy()


def memorisation(generated: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """Do generated pictures lie nearer to training images than unseen real images do? All uint8 [N, H, W, 3].

    Distances are L2 between 16 x 16 thumbnails, mirrored or not: a classifier trained on the same images would set its
    training images apart from unseen ones, and softness does not reach thumbnails. The distance to the nearest training
    image is divided by the mean distance to the 50 nearest (Carlini et al., 2023, "Extracting Training Data from
    Diffusion Models", section 4.2), because plain or pale pictures lie nearer to all images, while a copy stands out
    from its own neighbourhood.

    Returns "median_ratio": median relative distance of the generated over that of the held-out (1 = as far);
    "share_closer": share of generated pictures below the 1st percentile of the held-out ones (about 0.01 by chance);
    "probability_closer": chance that a generated picture is relatively nearer than a held-out one (AUC; 0.5 = no
    difference); "near_copies" and "near_copies_held_out": shares of relative distance under 0.5. Where the latter is
    above 0 the data set itself holds near-duplicates across its splits (several photos of one plant), and
    "share_closer" is blind: compare these two instead. "nearest": int64 [M], each picture's nearest training image;
    "relative_distance": float32 [M]. Raises UserError if a set is too small.
    """
    if len(train) < 2 or len(held_out) == 0 or len(generated) == 0:
        raise UserError("memorisation needs at least 2 training images, 1 held-out image and 1 generated picture")
    thumbnails = pixel_embedding(train)
    ours, rows = _relative_distances(generated, thumbnails)
    theirs, _ = _relative_distances(held_out, thumbnails)
    ordered = theirs.sort().values
    below = torch.searchsorted(ordered, ours)  # held-out images nearer than this picture
    level = torch.searchsorted(ordered, ours, right=True)  # the same, and ties
    return {
        "median_ratio": float(ours.median() / theirs.median().clamp(min=1e-12)),
        "share_closer": float((ours < theirs.quantile(0.01)).float().mean()),
        "probability_closer": float(1 - (below + level).float().mean() / (2 * len(ordered))),
        "near_copies": float((ours < 0.5).float().mean()),
        "near_copies_held_out": float((theirs < 0.5).float().mean()),
        "nearest": rows.numpy(),
        "relative_distance": ours.numpy(),
    }


def _spread(embeddings: Tensor, groups: Sequence[Any], only: set) -> float:
    """Mean over groups of the mean L2 distance between two members of a group."""
    names = np.array([str(group) for group in groups])
    means = []
    for name in sorted(only):
        members = embeddings[
            torch.from_numpy(np.flatnonzero(names == name)[:512])
        ].float()  # 512 bounds the distance matrix
        means.append(float(torch.pdist(members).mean()))
    return float(np.mean(means))


def diversity(
    generated: Tensor, real: Tensor, groups: Sequence[Any] | None = None, real_groups: Sequence[Any] | None = None
) -> dict[str, float]:
    """How much pictures of one group (one prompt, species, color) differ from each other, beside real images of that
    group.

    `generated` and `real` are embeddings [M, F] and [N, F]; groups name each row's group (None: all rows are one
    group). Returns "generated" and "real", mean pairwise L2 distances over the groups with two members or more on both
    sides, and "ratio", their quotient (1 = as diverse as real images, 0 = all alike). Raises UserError if no group can
    be compared.
    """
    groups = [""] * len(generated) if groups is None else groups
    real_groups = [""] * len(real) if real_groups is None else real_groups
    counts = [Counter(str(group) for group in names) for names in (groups, real_groups)]
    shared = {name for name in counts[0] if counts[0][name] > 1 and counts[1][name] > 1}
    if not shared:
        raise UserError(
            "diversity needs a group with at least 2 generated and 2 real pictures; generate more per prompt"
        )
    ours, theirs = _spread(generated, groups, shared), _spread(real, real_groups, shared)
    return {"generated": ours, "real": theirs, "ratio": ours / max(theirs, 1e-12)}


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B], of floats [B, 3, H, W] in [-1, 1] (so the data range is 2): 10 log10(4 /
    MSE).
    """
    return peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, [B], of floats [B, 3, H, W] in [-1, 1] (data range 2); 11x11 Gaussian window (Wang et al.,
    2004).
    """
    similarity = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
    return torch.as_tensor(similarity).reshape(len(a))


def uniform_ssim(a: Tensor, b: Tensor, side: int = 7) -> Tensor:
    """Structural similarity, a scalar, of floats [B, C, H, W] in [-1, 1] (data range 2); uniform window, for a training's loss.

    What torchmetrics gives with `gaussian_kernel=False`; that one makes its window on the CPU, which no CUDA graph can record.
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


@contextlib.contextmanager
def _loading(name: str, use: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises many kinds; whichever it is, the user's answer is the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} cannot be loaded {use} ({reason}); "
            "give a folder or Hub id with safetensors weights, or leave it out"
        ) from error


class _VisionFeatures(nn.Module):
    """A transformers vision model as a function of uint8 pictures [B, 3, H, W] -> features [B, F]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        with _loading(name, "as the feature network of KID"):
            self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            self.model = AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True).eval()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        images = [Image.fromarray(p) for p in pictures.permute(0, 2, 3, 1).cpu().numpy()]
        inputs = self.processor(images=images, return_tensors="pt").to(next(self.model.parameters()).device)
        vision = getattr(self.model, "vision_model", self.model)  # of CLIP and its like only the half that sees
        output = vision(**inputs)
        pooled = getattr(output, "pooler_output", None)
        return (pooled if pooled is not None else output.last_hidden_state.mean(1)).flatten(1).float().cpu()


class _ClassifierFeatures(nn.Module):
    """Our classifier as a function of uint8 pictures [B, 3, H, W] -> features [B, F]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pictures: Tensor) -> Tensor:
        return classifier_features(self.classifier, pictures.permute(0, 2, 3, 1).numpy())


def kid(
    real: np.ndarray, generated: np.ndarray, network: str | os.PathLike | Classifier | None, *, seed: int = 0
) -> dict[str, Any] | None:
    """Kernel Inception Distance (Binkowski et al., 2018): squared MMD of features under a cubic kernel; 0 = same
    distribution.

    `network` is a Hub id or folder of a transformers vision or CLIP model (safetensors), or a `Classifier`; None: not
    measured, returns None. Otherwise returns "mean" and "std" over 50 random subsets, "subset_size", and "features",
    which says what network it was: values compare only where that is the same, and none compares with a KID on
    Inception-v3. Raises UserError if the network cannot be loaded.
    """
    if network is None:
        return None
    if min(len(real), len(generated)) < 2:
        raise UserError("KID needs at least 2 real and 2 generated pictures")
    features: nn.Module
    if isinstance(network, Classifier):
        features, name = _ClassifierFeatures(network), "features of the suite's own classifier"
    else:
        features, name = _VisionFeatures(str(network)), str(network)
    size = min(len(real), len(generated), 1000)
    if min(len(real), len(generated)) > 100:
        size = min(size, min(len(real), len(generated)) // 2)  # subsets that differ, so that std says something
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", UserWarning)  # "will save all extracted features": intended
        metric = KernelInceptionDistance(feature=features, subsets=50, subset_size=size)
        torch.manual_seed(seed)
        for pictures, is_real in ((real, True), (generated, False)):
            for start in range(0, len(pictures), 64):
                batch = torch.from_numpy(np.array(pictures[start : start + 64])).permute(0, 3, 1, 2)
                metric.update(batch, real=is_real)
        mean, std = metric.compute()
    return {"mean": float(mean), "std": float(std), "subset_size": size, "features": name}


@torch.no_grad()
def clip_score(pictures: np.ndarray, prompts: Sequence[str], clip: str | os.PathLike | None) -> dict[str, Any] | None:
    """CLIP score: mean over pairs of 100 * max(cosine(picture, prompt), 0) (Hessel et al., 2021, with torchmetrics'
    factor).

    `clip` is a Hub id or folder of a CLIP model with tokenizer and image processor (safetensors); None: not measured,
    returns None. Prompts beyond the tokenizer's limit are cut. Raises UserError if the model cannot be loaded.
    """
    if clip is None:
        return None
    from transformers import CLIPModel, CLIPProcessor

    name = str(clip)
    with _loading(name, "as the CLIP model"):
        processor = CLIPProcessor.from_pretrained(name)
        model = CLIPModel.from_pretrained(name, use_safetensors=True).eval()
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
        output = model(**inputs)
        scores.append(100 * F.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0))
    return {"mean": float(torch.cat(scores).mean()), "pictures": len(pictures), "model": name}
