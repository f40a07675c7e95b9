"""Optimise matrices by orthogonalised momentum (Muon), and all other weights by AdamW.

Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/. The updates are scaled to the size of AdamW's, so
one learning rate serves both. The scale is from Liu et al., arXiv:2502.16982, section 2.2.

`torch.optim.Muon` refuses the kernels of convolutions, and computes in bf16, which many CPUs lack.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

STEPS = 5  # Newton-Schulz iterations.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Of the quintic polynomial, as in the source.
RESTART = 2  # Iterations before the Gram matrix is computed anew, which keeps rounding errors small.


class Muon(torch.optim.Optimizer):
    """Muon for the matrices within a model, and AdamW for all other weights.

    A kernel of a convolution counts as the matrix [output channels, all else]. Both kinds have decoupled weight decay.

    Args:
        named_parameters: names and weights. The names decide nothing but which weights are edges of the model.
        edges: words in the names of the first and last layers, which AdamW trains.
        lr: learning rate of both kinds.
        momentum: decay of the momentum of matrices, which is Nesterov's.
        betas: decays of AdamW's moments.
        eps: small number added to AdamW's denominator.
        weight_decay: decoupled weight decay of both kinds.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        edges: tuple[str, ...],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        weights: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
        for name, parameter in named_parameters:
            weights[parameter.ndim >= 2 and not any(edge in name for edge in edges)].append(parameter)
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # A loaded state moves AdamW's step numbers to the weights' device only where a group says "fused".
        groups = [{"params": params, "matrices": kind, "fused": not kind} for kind, params in weights.items() if params]
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient. Gradients of matrices are overwritten."""
        assert closure is None
        for group in self.param_groups:
            params: list[torch.Tensor] = [param for param in group["params"] if param.grad is not None]
            gradients: list[torch.Tensor] = [param.grad for param in group["params"] if param.grad is not None]
            if group["matrices"]:
                self._step_matrices(group, params, gradients)
            else:
                self._step_others(group, params, gradients)

    def _step_matrices(self, group: dict[str, Any], params: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        buffers = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, buffers, group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for update, param in zip(orthogonalise(gradients), params, strict=True):
            longer = max(len(param), param[0].numel())
            param.add_(update, alpha=-0.2 * longer**0.5 * group["lr"])

    def _step_others(self, group: dict[str, Any], params: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param].update(
                    step=torch.zeros((), dtype=torch.float32, device=param.device),
                    exp_avg=torch.zeros_like(param),
                    exp_avg_sq=torch.zeros_like(param),
                )
        columns = [[self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq", "step")]
        beta1, beta2 = group["betas"]
        adamw(
            params, gradients, columns[0], columns[1], [], columns[2], fused=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip


def orthogonalise(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return for each tensor, as a matrix [rows, all else], nearly the nearest matrix with orthonormal rows or columns.

    The singular values of a result lie between about 0.7 and 1.2. Matrices of equal shape are computed together.
    """
    same = defaultdict(list)
    for number, tensor in enumerate(tensors):
        matrix = tensor.flatten(1)
        wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        same[tuple(wide.shape)].append((number, wide, wide is not matrix))
    results = list(tensors)
    for matrices in same.values():
        solved = _newton_schulz(torch.stack([wide for _, wide, _ in matrices]).float())
        for (number, _, transposed), one in zip(matrices, solved, strict=True):
            results[number] = (one.T if transposed else one).reshape(tensors[number].shape).to(tensors[number].dtype)
    return results


def _newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Iterate on the small Gram matrices instead of the wide matrices [N, m, n], m <= n.

    Each iteration multiplies a matrix X by b I + c G + d G², with G = X Xᵀ. So the product of all polynomials is
    multiplied with X only at the restart and at the end (https://dao-lab.ai/blog/2026/gram-newton-schulz/).
    """
    linear, cubic, quintic = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    product = gram = None
    for step in range(STEPS):
        if gram is None or step == RESTART:
            x = x if product is None else product @ x
            gram, product = x @ x.mT, None
        polynomial = linear * identity + cubic * gram + quintic * (gram @ gram)
        product = polynomial if product is None else polynomial @ product
        if step + 1 not in (RESTART, STEPS):  # There the next Gram matrix is computed anew, or none is needed.
            gram = polynomial @ gram @ polynomial
    return product @ x
