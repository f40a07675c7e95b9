"""Record the forward and backward pass of a training step as one CUDA graph.

A step of these models consists of thousands of small kernels. If Python starts them one by one, a step takes about 100
ms at any batch up to 256. An H200 computes in only a fifth of that time. A graph starts all kernels at once and
computes the same result.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from t2i.config import TrainConfig
from t2i.errors import UserError

if TYPE_CHECKING:
    from t2i.training.loop import TrainState

Result = TypeVar("Result")
WARM = 3  # Number of passes before the recording, in which libraries choose and load their kernels.


def capture(
    compute: Callable[..., Result],
    example: Callable[[], tuple[torch.Tensor, ...]],
    train_state: "TrainState",
    config: TrainConfig,
    accelerator: Any,
) -> Callable[..., Result]:
    """Return `compute` recorded as a CUDA graph, or `compute` itself if it cannot be recorded.

    A graph is recorded only on one GPU, if `cuda_graphs` is set, without gradient accumulation and gradient
    checkpointing. Weights may change only in place. The memory of a pass stays in use as long as the returned function
    exists. No other thread may use the GPU during the recording.

    Args:
        compute: function of the forward and backward pass, without the optimiser's step. It maps tensors on the device
            to tensors on the device, whose shapes must not change.
        example: function that returns tensors like the inputs of `compute`.

    Returns:
        A function like `compute`. Each call overwrites the tensors that the previous call returned.

    Raises:
        UserError: the pass cannot be recorded, or the GPU's memory is too small for it.
    """
    plain = accelerator.distributed_type.value == "NO"  # This is False under DDP, even with a single process.
    once = config.gradient_accumulation_steps == 1 and not config.gradient_checkpointing
    if not (config.cuda_graphs and accelerator.device.type == "cuda" and plain and once):
        return compute
    random = torch.cuda.get_rng_state()  # Dropout layers draw from it, so it is restored below.
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    try:
        static_inputs = [tensor.clone() for tensor in example()]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM):
                compute(*static_inputs)
                _forget(train_state)
        current.wait_stream(side)
        graph, result = _record(lambda: compute(*static_inputs), current)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the GPU's memory is too small for a step of train_batch_size {config.train_batch_size}; take half of it and "
            "--gradient_accumulation_steps 2, or --gradient_checkpointing"
        ) from None
    torch.cuda.set_rng_state(random)
    gradients = [parameter.grad for parameter in train_state.parameters]
    _forget(train_state)

    def replay(*batch: torch.Tensor) -> Result:
        torch._foreach_copy_(static_inputs, list(batch))
        graph.replay()
        for parameter, gradient in zip(train_state.parameters, gradients, strict=True):
            parameter.grad = gradient  # `zero_grad` has set it to None.
        return result

    return replay


def _record(compute: Callable[[], Result], current: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Result]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = compute()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # A failed recording leaves another stream current.
        first = error.__context__ or error  # `error` itself may say only that the recording was broken off.
        reason = " ".join(str(first).split())[:200]
        raise UserError(f"the training step cannot be recorded ({reason}); give --no-cuda_graphs") from error
    return graph, result


def _forget(train_state: "TrainState") -> None:
    for parameter in train_state.parameters:
        parameter.grad = None
