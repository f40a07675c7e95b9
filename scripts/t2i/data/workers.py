"""Hash and decode images in several threads, and return the results in the order of the images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from t2i.machine import usable_cores

WORKERS = min(8, usable_cores())  # Threads are enough, because Pillow and hashlib release the GIL.


def in_order(pool: Executor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yield `function(item)` for each item, in order, as `pool.map` does.

    Only a few items are in memory at a time, so memory does not grow with the number of items.
    """
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= 4 * WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
