"""Prefetch batches: a thread makes the next batch while the device trains on the current batch."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch

Batch = TypeVar("Batch")


class Prefetcher(Generic[Batch]):
    """Source of batches. `take(n)` returns batch n and, on an NVIDIA GPU, starts making batch n + 1 in a thread.

    If making a batch fails, `take` raises the error.

    Args:
        make: pure function that returns the batch of a number, so that a batch does not depend on when it is made.
        end: number after the last batch.
        device: device of the training. On a CPU the thread would compete with the training's threads. An Apple GPU
            takes commands of one thread only.
    """

    def __init__(self, make: Callable[[int], Batch], end: int, device: "torch.device"):
        self.make, self.end = make, end
        self.waited = 0.0  # Seconds that `take` has waited for batches.
        self._pool = ThreadPoolExecutor(1, "batches") if device.type == "cuda" else None
        self._coming: dict[int, Future[Batch]] = {}

    def take(self, number: int) -> Batch:
        start = time.perf_counter()
        coming = self._coming.pop(number, None)
        batch = coming.result() if coming else self.make(number)
        self.waited += time.perf_counter() - start
        if self._pool and number + 1 < self.end:
            self._coming = {number + 1: self._pool.submit(self.make, number + 1)}
        return batch


def to_device_soon(tensor: "torch.Tensor", device: Any) -> "torch.Tensor":
    """Return a copy of a tensor on the device. A GPU copies from pinned memory while this thread continues."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
