"""Threads that hash and decode images, in the images' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from t2i.machine import usable_cores

WORKERS = min(8, usable_cores())  # Pillow and hashlib release the GIL, so threads serve


def in_order(pool: Executor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`pool.map` that never holds more than a few items, so that memory does not grow with their number."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= 4 * WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
