"""The judge of pictures: distances to photos, and a probe of labels, in the features of a network that no training uses.

Features are float32 [N, F], from `networks.FeatureNetwork`. Figures measured by different networks cannot be compared.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.errors import UserError
from t2i.evaluation.networks import FeatureNetwork

MAX_REFERENCE = 10_000  # Real images that the judge compares with, at even distances of the training images.
BATCH_PIXELS = 1 << 20  # Pixels whose statistics are computed at once.
MAX_UNSEEN = 2048  # Unseen real images that are compared.
MAX_STATISTICS = 2048  # Images of a set whose pixel statistics are compared.
BLOCK = 2048  # Rows per block of a matrix of kernel values, which bounds memory.
NEIGHBOURS = 3  # Of the manifolds of precision and recall, as in the source.
PENALTIES = (1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4)  # Ridge penalties of the probe to choose from.


def kernel_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the kernel (a·b / F + 1)^3 over the rows of `b`, [len(a)], and over the rows of `a`, [len(b)]."""
    rows = torch.zeros(len(a), dtype=torch.float64)
    columns = torch.zeros(len(b), dtype=torch.float64)
    for i in range(0, len(a), BLOCK):
        for j in range(0, len(b), BLOCK):
            kernel = (a[i : i + BLOCK] @ b[j : j + BLOCK].T / a.shape[1] + 1.0).pow(3).double()
            rows[i : i + BLOCK] += kernel.sum(1)
            columns[j : j + BLOCK] += kernel.sum(0)
    return rows, columns


def kernel_distance(real: Tensor, generated: Tensor, real_rows: Tensor | None = None) -> dict[str, float]:
    """Measure the kernel distance: the unbiased squared MMD of features under a cubic kernel, times 1000.

    The standard error is that of the delete-one jackknife over both sets, which the sums of the kernel give in closed form.
    Sources: Binkowski et al., 2018 (the kernel and the estimator); Efron and Stein, 1981 (the jackknife).

    Args:
        real: features of photos, [N, F] with N > 2.
        generated: features of pictures, [M, F] with M > 2.
        real_rows: result of `within(real)`, if it was computed already.

    Returns:
        The kernel distance's "mean" (0: same distribution; it may be slightly negative) and "standard_error".

    Raises:
        UserError: a set has fewer than 3 pictures.
    """
    n, m = len(real), len(generated)
    if min(n, m) < 3:
        raise UserError(
            f"the kernel distance needs at least 3 pictures on both sides, not {min(n, m)}; raise --sweep_prompts and --report_prompts"
        )
    real_rows = within(real) if real_rows is None else real_rows
    generated_rows = within(generated)
    cross_real, cross_generated = kernel_sums(real, generated)
    real_sum, generated_sum, cross = real_rows.sum(), generated_rows.sum(), cross_real.sum()

    mean = _estimate(real_sum, n, generated_sum, m, cross)
    left_out = (
        _estimate(real_sum - 2 * real_rows, n - 1, generated_sum, m, cross - cross_real),
        _estimate(real_sum, n, generated_sum - 2 * generated_rows, m - 1, cross - cross_generated),
    )
    variance = sum((len(each) - 1) / len(each) * float((each - each.mean()).square().sum()) for each in left_out)
    return {"mean": 1000 * float(mean), "standard_error": 1000 * variance**0.5}


def within(features: Tensor) -> Tensor:
    """Return for each row of features [N, F] the sum of the kernel with all other rows, float64 [N]."""
    own_kernel = (features.square().sum(1) / features.shape[1] + 1.0).pow(3).double()
    return kernel_sums(features, features)[0] - own_kernel


def _estimate(real_sum: Tensor, n: int, generated_sum: Tensor, m: int, cross_sum: Tensor) -> Tensor:
    return real_sum / (n * (n - 1)) + generated_sum / (m * (m - 1)) - 2 * cross_sum / (n * m)


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return the Fréchet distance of two Gaussians that are fitted to features (Heusel et al., 2017).

    The distance is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The Fréchet distance is larger for small sets, so
    compare only sets of equal size.
    """
    means = [features.double().mean(0) for features in (real, generated)]
    # With X the centred features over sqrt(N - 1), tr (S1 S2)^(1/2) is the sum of the singular values of X1 X2^T.
    centred = [
        (features.double() - mean) / max(1, len(features) - 1) ** 0.5
        for features, mean in zip((real, generated), means, strict=True)
    ]
    traces = sum(float(x.square().sum()) for x in centred)
    if min(len(real), len(generated)) <= real.shape[1]:
        product = centred[0] @ centred[1].T
        root = torch.linalg.svdvals(product).sum()
    else:
        covariances = [x.T @ x for x in centred]
        values, vectors = torch.linalg.eigh(covariances[0])
        half = vectors * values.clamp(min=0).sqrt() @ vectors.T
        root = torch.linalg.eigvalsh(half @ covariances[1] @ half).clamp(min=0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + traces - 2 * root)


def precision_recall(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Measure precision and recall by manifolds of nearest neighbours (Kynkäänniemi et al., 2019).

    A manifold is the union of balls around a set's pictures. The ball around a picture reaches to the third nearest
    picture of the set.

    Args:
        real: features of photos, [N, F]. Give as many photos as pictures, since a manifold grows with its set.
        generated: features of pictures, [M, F].

    Returns:
        "precision": share of pictures within the photos' manifold (plausible pictures).
        "recall": share of photos within the pictures' manifold (variety).
    """
    radii = [
        torch.cdist(features, features).topk(min(NEIGHBOURS + 1, len(features)), largest=False).values[:, -1]
        for features in (real, generated)
    ]
    distances = torch.cdist(real, generated)
    return {
        "precision": float((distances <= radii[0][:, None]).any(0).float().mean()),
        "recall": float((distances <= radii[1][None, :]).any(1).float().mean()),
    }


class Probe:
    """A linear classifier that reads labels from features: ridge regression on standardised features and one-hot
    labels.

    Ridge regression has a closed form, so that the same photos always give the same probe. The penalty of the probe
    gives the best leave-one-out accuracy, which has a closed form too (Hastie et al., 2009, equation 7.64). The probe
    is fitted on photos only, not on generated pictures.
    """

    def __init__(self, features: Tensor, labels: Sequence[Any]) -> None:
        """Fit the probe of labels to features of photos.

        Args:
            features: features of training photos, [N, F].
            labels: label of each training photo. Photos whose label is None are left out.
        """
        rows = _labelled(labels)
        features, labels = features[rows], [labels[row] for row in rows]
        self.names = sorted(set(labels))
        index = {name: number for number, name in enumerate(self.names)}
        targets = torch.tensor([index[label] for label in labels])
        self.mean, self.std = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-6)
        x = self._standardised(features).double()
        one_hot = F.one_hot(targets, len(self.names)).double()
        self.intercept = one_hot.mean(0)
        one_hot = one_hot - self.intercept
        values, vectors = torch.linalg.eigh(x.T @ x)
        rotated = x @ vectors
        projected = rotated.T @ one_hot
        self.penalty, best = PENALTIES[0], -1.0
        for penalty in PENALTIES:
            weights = projected / (values + penalty)[:, None]
            leverage = (rotated.square() / (values + penalty)).sum(1) + 1 / len(x)
            left_out = one_hot - (one_hot - rotated @ weights) / (1 - leverage).clamp(min=1e-9)[:, None]
            accuracy = float(((left_out + self.intercept).argmax(1) == targets).double().mean())
            if accuracy > best:
                self.penalty, best, self.weights = penalty, accuracy, vectors @ weights

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def predict(self, features: Tensor) -> list[Any]:
        """Return the most likely label of each row of features, [N, F]."""
        scores = self._standardised(features).double() @ self.weights + self.intercept
        return [self.names[row] for row in scores.argmax(1).tolist()]

    def accuracy(self, features: Tensor, labels: Sequence[Any]) -> float | None:
        """Return the share (0 to 1) of rows with a label whose label is recognised, or None if no row has a label."""
        rows = _labelled(labels)
        predicted = self.predict(features[rows])
        right = [name == labels[row] for name, row in zip(predicted, rows, strict=True)]
        return float(np.mean(right)) if right else None


def _labelled(labels: Sequence[Any]) -> list[int]:
    return [row for row, label in enumerate(labels) if label is not None]


def pixel_statistics(pictures: np.ndarray) -> Tensor:
    """Return statistics of pixels and frequencies, float32 [N, 45].

    The statistics need no network, so they are a second judge.

    Five of the 15 statistics per channel of YCbCr are the mean, standard deviation and three quantiles of the pixels.
    Ten further statistics per channel are the logarithm of the energy in ten bands of the discrete cosine transform.

    Args:
        pictures: pictures to measure, uint8 [N, R, R, 3].
    """
    side = pictures.shape[1]
    k, n = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    cosines = torch.cos(torch.pi * (n + 0.5) * k / side) * (2 / side) ** 0.5
    cosines[0] /= 2**0.5
    radius = (torch.arange(side)[:, None] ** 2 + torch.arange(side)[None] ** 2).float().sqrt()
    edges = torch.logspace(0, float(np.log10(side * 2**0.5)), 11)
    edges[-1] += 1
    bands = [(radius >= low) & (radius < high) for low, high in itertools.pairwise(edges.tolist())]
    to_ycbcr = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    parts = []
    batch = max(1, BATCH_PIXELS // side**2)
    for start in range(0, len(pictures), batch):
        pixels = torch.from_numpy(np.array(pictures[start : start + batch])).float() / 255
        channels = torch.einsum("nhwc,dc->ndhw", pixels, to_ycbcr)
        flat = channels.flatten(2)
        quantiles = flat.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=2).permute(1, 2, 0)
        energy = (cosines @ channels @ cosines.T).square()
        spectrum = torch.stack([energy[..., band].mean(-1) for band in bands], -1)
        figures = [flat.mean(2, keepdim=True), flat.std(2, keepdim=True), quantiles, (spectrum + 1e-8).log()]
        parts.append(torch.cat(figures, 2).flatten(1))
    return torch.cat(parts)


class Judge:
    """Judge of pictures, which holds the features of photos by one network.

    The judge compares pictures with the photos whose features it holds.

    Attributes:
        network: network that gives the features.
        reference: features of the photos that distances are measured to, [N, F].
        probe: classifier of labels. The probe is None if the photos have no labels.
    """

    def __init__(
        self, network: FeatureNetwork, reference: Tensor, reference_pixels: np.ndarray, probe: Probe | None = None
    ) -> None:
        """Prepare the figures of the photos that all comparisons share.

        Args:
            network: network that made the features.
            reference: features of the photos, [N, F].
            reference_pixels: photos for the statistics of pixels, uint8 [K, R, R, 3].
            probe: classifier of the photos' labels. With None, nothing is named.
        """
        self.network, self.reference, self.probe = network, reference, probe
        self._within = within(reference)
        statistics = pixel_statistics(spread(reference_pixels, MAX_STATISTICS))
        self._mean, self._std = statistics.mean(0), statistics.std(0).clamp(min=1e-6)
        self._statistics = self._standardised(statistics)

    def _standardised(self, statistics: Tensor) -> Tensor:
        """Standardise statistics by the photos, and limit their values so that no picture outweighs the others."""
        return ((statistics - self._mean) / self._std).clamp(-5, 5)

    def measure(self, features: Tensor, labels: Sequence[Any] | None = None) -> dict[str, Any]:
        """Return the judge's figures that choose a checkpoint.

        Args:
            features: features of pictures, [M, F] with M > 2.
            labels: label that each picture should show. A picture whose label is None is left out of "named".

        Returns:
            The judge's "network", "kernel_distance" with its "standard_error", and "named": the share of pictures whose
                label the probe recognises (None without a probe or labels).
        """
        distance = kernel_distance(self.reference, features, self._within)
        named = self.probe.accuracy(features, labels) if self.probe and labels is not None else None
        return {
            "network": self.network.name,
            "kernel_distance": distance["mean"],
            "standard_error": distance["standard_error"],
            "named": named,
        }

    def describe(
        self, pictures: np.ndarray, features: Tensor, labels: Sequence[Any] | None, count: int
    ) -> dict[str, Any]:
        """Return all figures of the judge on a set of pictures.

        Args:
            pictures: pictures to judge, uint8 [M, R, R, 3].
            features: features of the judged pictures, [M, F].
            labels: label that each picture should show. The argument is None if the labels are not known.
            count: number of pictures and of photos for the figures that depend on the size of a set.

        Returns:
            The figures of `measure`, "pictures" (M), "frechet_distance", "precision" and "recall", each on `count` pictures
                and photos. "pixel_distance" is the kernel distance of `pixel_statistics`, standardised by the photos.
        """
        photos, some = spread(self.reference, count), spread(features, count)
        statistics = self._standardised(pixel_statistics(spread(pictures, MAX_STATISTICS)))
        return {
            **self.measure(features, labels),
            "pictures": len(pictures),
            "frechet_distance": frechet_distance(photos, some),
            **precision_recall(photos, some),
            "pixel_distance": kernel_distance(self._statistics, statistics)["mean"],
        }


def spread(rows: Any, count: int) -> Any:
    """Return `count` rows at even distances, or all rows if there are no more."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
