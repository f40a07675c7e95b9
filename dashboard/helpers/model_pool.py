"""Keep models in memory, and let one thread of this server load or draw at a time.

This module imports torch only with the first model.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.loaded_modules import freeze_loaded
from t2i.pictures.cells import weights_hash

MODELS = 2  # pipelines in memory at once, over all sessions; a new one replaces the least recently used

_gate, _lock = threading.Lock(), threading.Lock()
_pipelines: OrderedDict[tuple[Path, str], Any] = OrderedDict()
_kept_elsewhere: set[object] = set()  # one entry for each model that a job keeps for itself


@contextmanager
def drawing_turn(cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Wait until no other thread of this server loads a model or draws.

    Yield False if `cancelled` becomes true before this thread's turn.

    Two threads that draw at once are each more than twice as slow, and each needs a model in memory. The session that
    drew last must queue behind the sessions that wait to draw. A long grid takes a turn per batch, so that a single
    picture need not wait for the whole grid.
    """
    has_turn = _acquire(_gate, cancelled)
    if has_turn:
        try:
            has_turn = _acquire(_lock, cancelled)
        finally:
            _gate.release()
    try:
        yield has_turn
    finally:
        if has_turn:
            _lock.release()


def _acquire(lock: threading.Lock, cancelled: Callable[[], bool]) -> bool:
    while not cancelled():
        if lock.acquire(timeout=0.2):
            return True
    return False


@contextmanager
def room_for_own_model() -> Iterator[None]:
    """Until the end of the block, keep one model fewer here: the caller loads one itself, and keeps it between its turns.

    The caller must have the turn to load and draw.
    """
    entry = object()
    _kept_elsewhere.add(entry)
    try:
        _evict()
        yield
    finally:
        _kept_elsewhere.discard(entry)


def _evict(more: int = 0) -> None:
    """Drop the least recently used models, until `more` models fit beside the others. One may always be loaded."""
    while _pipelines and len(_pipelines) + len(_kept_elsewhere) + more > MODELS:
        _pipelines.popitem(last=False)


def load_pipeline(model: Path) -> Any:
    """Return the pipeline of a checkpoint or pipeline folder, and keep it in memory.

    The caller must have the turn to load and draw.

    If the weights in the model's folder have changed, the model is loaded again.

    Raises:
        UserError: the folder holds no complete model.
    """
    key = (model, weights_hash(model))
    if key not in _pipelines:
        _evict(more=1)  # before loading: both at once may not fit into memory
        # Threads that wait for each other by turning in a loop take the cores from a training or browser on this machine,
        # and from each other: a draft then takes ten times as long. This acts only before torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from t2i.pictures import sampling

        freeze_loaded("torch")  # before the first model, which must not stay
        _pipelines[key] = sampling.load_pipeline(model, device=sampling.best_device(), engine="auto")
    _pipelines.move_to_end(key)
    return _pipelines[key]
