"""Prefetch batches: a thread makes the next one while the device trains on this one."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch

Batch = TypeVar("Batch")


class Prefetcher(Generic[Batch]):
    """`take(n)` returns batch n and, if `in_thread`, starts on batch n + 1. An error in making a batch is raised by `take`.

    make: the batch of a number, a pure function of it: what is made ahead does not depend on when.
    in_thread: for a device of its own. Where the processor trains, its threads would only be in each other's way.
    """

    def __init__(self, make: Callable[[int], Batch], end: int, in_thread: bool):
        self.make, self.end = make, end  # numbers are below `end`
        self.waited = 0.0  # seconds that `take` has taken
        self._pool = ThreadPoolExecutor(1, "batches") if in_thread else None
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
    """A copy on the device that a GPU makes by itself, while this thread goes on; from memory that it can read."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
