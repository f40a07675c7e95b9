"""Models in memory, and whose turn it is to draw: what a page needs to make a picture. Imports no torch before that."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i.cells import weights_hash

MODELS = 2  # pipelines in memory at once, over all sessions; the least recently used one makes room

_gate, _lock = threading.Lock(), threading.Lock()
_kept: OrderedDict[tuple[Path, str], Any] = OrderedDict()


@contextmanager
def turn(cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Be the only one in this server that loads a model or draws; gives False where `cancelled` came first.

    Two drawing at once would each take more than twice as long, and need a model each. Who waits stands at a gate that the
    last one has to pass again, so that a long grid, which takes a turn for each batch, does not starve a single picture.
    """
    had = _acquire(_gate, cancelled)
    if had:
        try:
            had = _acquire(_lock, cancelled)
        finally:
            _gate.release()
    try:
        yield had
    finally:
        if had:
            _lock.release()


def _acquire(lock: threading.Lock, cancelled: Callable[[], bool]) -> bool:
    while not cancelled():
        if lock.acquire(timeout=0.2):
            return True
    return False


def pipeline(model: Path) -> Any:
    """The pipeline of a checkpoint or pipeline folder, kept in memory; only for who has the turn.

    A folder whose weights changed is loaded anew. Raises `UserError` where there is no whole model.
    """
    key = (model, weights_hash(model))
    if key not in _kept:
        while len(_kept) >= MODELS:  # before loading: both at once may not fit into memory
            _kept.popitem(last=False)
        import torch

        from t2i import sampling

        _kept[key] = sampling.load_pipeline(model, device="cuda" if torch.cuda.is_available() else "cpu")
    _kept.move_to_end(key)
    return _kept[key]


def kept() -> list[Path]:
    """The models in memory, the most recently used last."""
    return [model for model, _ in list(_kept)]
