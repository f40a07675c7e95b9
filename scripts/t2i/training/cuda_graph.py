"""Forward and backward pass of a training step as one CUDA graph.

A step of these models is thousands of small kernels. Started one by one from Python they take about 100 ms at any batch up to
256, in which an H200 works for a fifth of the time; a graph starts them all at once. What is computed is the same.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from t2i.config import TrainConfig
from t2i.errors import UserError

if TYPE_CHECKING:
    from t2i.training.loop import TrainState

Result = TypeVar("Result")
WARM = 3  # runs before the recording, in which libraries choose and load their kernels


def capture(
    compute: Callable[..., Result],
    example: Callable[[], tuple[torch.Tensor, ...]],
    train_state: "TrainState",
    config: TrainConfig,
    accelerator: Any,
) -> Callable[..., Result]:
    """`compute` as a CUDA graph, or itself where the launch is not of one GPU, or the settings need another pass each time.

    compute: tensors -> tensors on the device, forward and backward pass, without an optimiser's step; its shapes must not change.
    example: gives tensors like those it will get. What it returns is overwritten by the next call. Weights may change in place only.
    The memory of a pass stays taken as long as what is returned lives. No other thread may use the GPU meanwhile.
    Raises `UserError` if the pass cannot be recorded, or if memory is too small for it.
    """
    plain = accelerator.distributed_type.value == "NO"  # under DDP a process alone is not
    once = config.gradient_accumulation_steps == 1 and not config.gradient_checkpointing
    if not (config.cuda_graphs and accelerator.device.type == "cuda" and plain and once):
        return compute
    random = torch.cuda.get_rng_state()  # dropout layers draw from it; restored below
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
            parameter.grad = gradient  # the optimiser has let go of it
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
        torch.cuda.set_stream(current)  # which a failed recording leaves on another
        first = error.__context__ or error  # the other is that the recording has been broken off
        reason = " ".join(str(first).split())[:200]
        raise UserError(f"the training step cannot be recorded ({reason}); give --no-cuda_graphs") from error
    return graph, result


def _forget(train_state: "TrainState") -> None:
    for parameter in train_state.parameters:
        parameter.grad = None
