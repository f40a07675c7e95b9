"""Forward and backward pass of a training step as one CUDA graph.

A step of these models is thousands of small kernels. Started one by one from Python they take about 100 ms at any batch up to
256, in which an H200 works for a fifth of the time; a graph starts them all at once. What is computed is the same.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from t2i.config import TrainConfig
from t2i.runs import UserError

if TYPE_CHECKING:
    from t2i.training import Trained

Result = TypeVar("Result")
WARM = 3  # runs before the recording, in which libraries choose and load their kernels


def capture(
    compute: Callable[..., Result],
    example: Callable[[], tuple[torch.Tensor, ...]],
    trained: "Trained",
    config: TrainConfig,
    accelerator: Any,
) -> Callable[..., Result]:
    """`compute` as a CUDA graph, or itself where the launch is not of one GPU, or the settings need another pass each time.

    compute: tensors -> tensors on the device, forward and backward pass, without an optimiser's step; its shapes must not change.
    example: gives tensors like those it will get. What it returns is overwritten by the next call. Weights may change in place only.
    Raises `UserError` where the pass cannot be recorded. No other thread may use the GPU meanwhile.
    """
    alone = accelerator.num_processes == 1 and not accelerator.deepspeed_plugin
    once = config.gradient_accumulation_steps == 1 and not config.gradient_checkpointing
    if not (config.cuda_graphs and accelerator.device.type == "cuda" and alone and once):
        return compute
    given = [tensor.clone() for tensor in example()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM):
                compute(*given)
                _forget(trained)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = compute(*given)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the training step cannot be recorded ({reason}); give --no-cuda_graphs") from None
    gradients = [parameter.grad for parameter in trained.parameters]
    _forget(trained)

    def replay(*batch: torch.Tensor) -> Result:
        torch._foreach_copy_(given, list(batch))
        graph.replay()
        for parameter, gradient in zip(trained.parameters, gradients, strict=True):
            parameter.grad = gradient  # the optimiser has let go of it
        return result

    return replay


def _forget(trained: "Trained") -> None:
    for parameter in trained.parameters:
        parameter.grad = None
