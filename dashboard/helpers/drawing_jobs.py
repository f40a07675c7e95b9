"""Draw in a separate thread: the missing pictures of a grid, one picture that a page watches, or drafts of a text."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.model_pool import drawing_turn, load_pipeline
from t2i.errors import UserError
from t2i.pictures import cells

if TYPE_CHECKING:
    import numpy as np

BATCH = 4  # pictures of a grid drawn at once; another session's picture waits for no more than these
UNSEEN_S = 150  # a job that no page looked at for so long ends: its browser was closed (hidden tabs look each minute)


@dataclass(kw_only=True)
class Job:
    """A thread that draws while at least one page watches the thread.

    The drawing thread ends when it is stopped, or when no page watches it any more. While it draws, `running_job` finds
    it by its key, so that a reloaded page shows its progress.
    """

    key: Hashable
    error: str = ""
    seen: float = field(default_factory=time.monotonic)
    finished: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Note that a page still watches this drawing job."""
        self.seen = time.monotonic()

    def is_cancelled(self) -> bool:
        return self.stopped.is_set() or time.monotonic() - self.seen > UNSEEN_S

    def _start(self, name: str, draw: Callable[[], None]) -> None:
        _running[self.key] = self
        threading.Thread(target=self._run, args=(draw,), daemon=True, name=name).start()

    def _run(self, draw: Callable[[], None]) -> None:
        try:
            draw()
        except Exception as error:
            self.error = error_sentence(error)
        finally:
            if _running.get(self.key) is self:
                del _running[self.key]
            self.finished.set()


@dataclass(kw_only=True)
class GridJob(Job):
    """A thread that draws the missing pictures of a grid."""

    missing: Sequence[cells.PlannedCell]
    as_watched: bool = False  # whether the pictures count among those of which a page keeps only the newest
    done: int = 0
    drawing_s: float = 0.0  # until the newest picture, without loading of models and waiting for another's turn

    @classmethod
    def start(cls, key: Hashable, planned: Sequence[cells.PlannedCell], as_watched: bool = False) -> "GridJob":
        """Draw the missing pictures of a grid's plan."""
        job = cls(key=key, missing=cells.missing(planned), as_watched=as_watched)
        job._start("grid", job._draw)
        return job

    @property
    def total(self) -> int:
        return len(self.missing)

    def seconds_left(self) -> float | None:
        """Estimate the remaining seconds from the pictures drawn so far, without loading of models.

        The estimate is None before the first picture.
        """
        return self.drawing_s / self.done * (self.total - self.done) if self.done else None

    def _draw(self) -> None:
        for batch in cells.batches(self.missing, BATCH):
            with drawing_turn(self.is_cancelled) as has_turn:
                if not has_turn:
                    return
                before, self._start_s = self.drawing_s, time.monotonic()
                cells.make(
                    batch,
                    load=self._load,
                    batch_size=BATCH,
                    progress=self._count,
                    cancelled=self.is_cancelled,
                    as_watched=self.as_watched,
                )
                if self.drawing_s > before:
                    _pace[batch[0].run] = (self.drawing_s - before) / sum(planned.cell.samples for planned in batch)

    def _load(self, model: Path) -> Any:
        start = time.monotonic()
        pipeline = load_pipeline(model)
        self._start_s += time.monotonic() - start  # loading takes no time from the pictures
        return pipeline

    def _count(self, planned: cells.PlannedCell, done: int, total: int) -> None:
        now = time.monotonic()
        self.drawing_s += now - self._start_s
        self._start_s = now
        self.done += 1


@dataclass(kw_only=True)
class PictureJob(Job):
    """A thread that draws one picture: `step` of `steps` are done, and `preview` is the model's guess of the result.

    `stage` is "waiting" (for another drawing job), "loading" (the model) or "drawing". `result` is None until the
    picture is finished, and stays None if the drawing job was stopped.
    """

    planned: cells.PlannedCell
    stage: str = "waiting"
    step: int = 0
    steps: int = 0
    preview: "np.ndarray | None" = None
    result: cells.Watched | None = None

    @classmethod
    def start(cls, planned: cells.PlannedCell) -> "PictureJob":
        """Start the thread, which draws the picture as soon as no other thread of this server draws."""
        job = cls(key=planned.path, planned=planned)
        job._start("picture", job._draw)
        return job

    def _draw(self) -> None:
        with drawing_turn(self.is_cancelled) as has_turn:
            if has_turn:
                self.stage = "loading"
                self.result = cells.make_watched(
                    self.planned, load=load_pipeline, progress=self._watch, cancelled=self.is_cancelled
                )

    def _watch(self, step: int, steps: int, picture: "np.ndarray | None") -> None:
        self.stage, self.step, self.steps = "drawing", step, steps
        if picture is not None:
            self.preview = picture


@dataclass(kw_only=True)
class DraftJob(Job):
    """A thread that draws pictures of a text that a user is typing, at once and in few steps, and stores none.

    `pictures` is None until they are finished, and stays None if the drawing job was stopped.
    """

    planned: Sequence[cells.PlannedCell]
    pictures: "np.ndarray | None" = None

    @classmethod
    def start(cls, planned: Sequence[cells.PlannedCell]) -> "DraftJob":
        """Start the thread, which draws as soon as no other thread of this server draws."""
        job = cls(key=object(), planned=planned)
        job._start("draft", job._draw)
        return job

    def _draw(self) -> None:
        with drawing_turn(self.is_cancelled) as has_turn:
            if has_turn:
                self.pictures = cells.draw_unstored(self.planned, load=load_pipeline, cancelled=self.is_cancelled)


_running: dict[Hashable, Job] = {}


def running_job(key: Hashable) -> Any:
    """Return the job of this server that draws for a key (a grid, or the path of a picture), or None."""
    return _running.get(key)


def error_sentence(error: Exception) -> str:
    """Return the sentence that a page shows for an error in a drawing thread, such as out of memory or a broken disk."""
    if isinstance(error, UserError):
        return str(error)
    return f"drawing ended with {type(error).__name__} ({' '.join(str(error).split())[:200]})"


_pace: dict[Path, float] = {}  # run -> seconds per sample of the UNet, as the last grid in this server measured them


def expected_seconds(planned: Sequence[cells.PlannedCell], evaluated_pace: float | None = None) -> float | None:
    """Estimate the seconds to draw the missing pictures of a grid's plan; None if no speed was measured.

    Args:
        evaluated_pace: seconds per sample of the UNet (`cells.Cell.samples`), measured by the evaluation. A speed that
            this server measured is preferred to `evaluated_pace`.
    """
    paces = [(one.cell.samples, _pace.get(one.run, evaluated_pace)) for one in cells.missing(planned)]
    if any(pace is None for _, pace in paces):
        return None
    return float(sum(samples * pace for samples, pace in paces if pace is not None))
