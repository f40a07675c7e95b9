"""Models in memory, and whose turn it is to draw: what a page needs to make a picture. Imports no torch before that."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import settle

from t2i.errors import UserError
from t2i.pictures import cells
from t2i.pictures.cells import weights_hash

if TYPE_CHECKING:
    import numpy as np

MODELS = 2  # pipelines in memory at once, over all sessions; the least recently used one makes room
BATCH = 4  # pictures of a grid at once; another session's picture waits for no more than these
UNSEEN_S = 150  # a grid that no page looked at for so long ends: its browser was closed (hidden tabs look each minute)

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

        from t2i.pictures import sampling

        settle("torch")  # before the first model, which must not stay
        _kept[key] = sampling.load_pipeline(model, device=sampling.best_device(), engine="auto")
    _kept.move_to_end(key)
    return _kept[key]


def kept() -> list[Path]:
    """The models in memory, the most recently used last."""
    return [model for model, _ in list(_kept)]


@dataclass
class GridJob:
    """A grid's missing pictures, drawn in a thread of its own, while pages look at what is there."""

    total: int
    done: int = 0
    error: str = ""
    started: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    finished: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, places: Sequence[cells.Place]) -> "GridJob":
        """Draw the missing pictures of `places`."""
        todo = cells.missing(places)
        job = cls(len(todo))
        threading.Thread(target=job._draw, args=(todo,), daemon=True, name="grid").start()
        return job

    def look(self) -> None:
        """Say that somebody still looks at it."""
        self.seen = time.monotonic()

    def seconds_left(self) -> float | None:
        """By the pictures so far, the loading of models included; None before the first."""
        elapsed = time.monotonic() - self.started
        return elapsed / self.done * (self.total - self.done) if self.done else None

    def _draw(self, todo: Sequence[cells.Place]) -> None:
        def cancelled() -> bool:
            return self.stopped.is_set() or time.monotonic() - self.seen > UNSEEN_S

        def count(place: cells.Place, done: int, of: int) -> None:
            self.done += 1

        try:
            for batch in cells.batches(todo, BATCH):
                with turn(cancelled) as had:
                    if not had:
                        return
                    start = time.monotonic()
                    cells.make(batch, load=pipeline, batch_size=BATCH, progress=count, cancelled=cancelled)
                    took = time.monotonic() - start
                    _pace[batch[0].run] = took / sum(place.cell.samples for place in batch)
        except Exception as error:
            self.error = sentence(error)
        finally:
            self.finished.set()


@dataclass
class PictureJob:
    """One picture, drawn in a thread of its own and watched: `step` of `steps` are done, `preview` is what it may become.

    stage: "waiting" for another's turn, "loading" the model, or "drawing". result: None until it is finished, and where it was
    stopped.
    """

    stage: str = "waiting"
    step: int = 0
    steps: int = 0
    preview: "np.ndarray | None" = None
    result: cells.Watched | None = None
    error: str = ""
    seen: float = field(default_factory=time.monotonic)
    finished: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, place: cells.Place) -> "PictureJob":
        """Draw the picture of `place`, as soon as it is its turn."""
        job = cls()
        threading.Thread(target=job._draw, args=(place,), daemon=True, name="picture").start()
        return job

    def look(self) -> None:
        """Say that somebody still looks at it."""
        self.seen = time.monotonic()

    def _draw(self, place: cells.Place) -> None:
        def cancelled() -> bool:
            return self.stopped.is_set() or time.monotonic() - self.seen > UNSEEN_S

        def watch(step: int, steps: int, picture: "np.ndarray | None") -> None:
            self.stage, self.step, self.steps = "drawing", step, steps
            if picture is not None:
                self.preview = picture

        try:
            with turn(cancelled) as had:
                if had:
                    self.stage = "loading"
                    self.result = cells.make_watched(place, load=pipeline, progress=watch, cancelled=cancelled)
        except Exception as error:
            self.error = sentence(error)
        finally:
            self.finished.set()


def sentence(error: Exception) -> str:
    """What a page says of an error in a thread: out of memory, a disk that breaks. The page must not wait for ever."""
    if isinstance(error, UserError):
        return str(error)
    return f"drawing ended with {type(error).__name__} ({' '.join(str(error).split())[:200]})"


_pace: dict[Path, float] = {}  # run -> seconds a sample of the UNet, as measured last by a grid in this server


def expected_seconds(places: Sequence[cells.Place], known: float | None = None) -> float | None:
    """What drawing the missing pictures of `places` takes; None where nothing tells.

    known: seconds a sample of the UNet (`cells.Cell.samples`) of these models, measured elsewhere; what this server measured
    is taken first.
    """
    paces = [(place.cell.samples, _pace.get(place.run, known)) for place in cells.missing(places)]
    if any(pace is None for _, pace in paces):
        return None
    return float(sum(samples * pace for samples, pace in paces if pace is not None))
