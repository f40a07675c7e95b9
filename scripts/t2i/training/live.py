"""Tell how far a training is, and take requests from a file between two steps. This module imports no torch.

While a training runs, `live.json` in its run folder says how far it is. A file `requests.json` beside it asks for something:
{"requests": ["sample"]}. The training removes the file when it takes the requests.
"""

import json
import os
import platform
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from t2i.errors import UserError
from t2i.files import write_json
from t2i.run_lock import mark_ending
from t2i.training.stopping import Stop, agreed, on_signals

LIVE, REQUESTS = "live.json", "requests.json"  # files in a run folder
# What can be asked, and what the training says when it does it.
KINDS = {
    "sample": "drawing samples",
    "evaluate": "measuring the validation images",
    "stop": "saving a checkpoint and stopping",
}
MOST_BYTES = 4096  # size of either file; a larger one was written by something else
LOOK_S = 0.5  # least seconds between two looks for requests: a network disk may take milliseconds per look
WRITE_S = 2.0  # least seconds between two writes of live.json
WINDOW_S = 30.0  # seconds over which the samples per second are measured


@dataclass(frozen=True)
class Asked:
    """What all processes do after a step, besides what the recipe says."""

    sample: bool = False
    evaluate: bool = False
    stop: bool = False

    @property
    def looks(self) -> bool:
        """Whether pictures or figures are asked, which are one thing for an autoencoder."""
        return self.sample or self.evaluate


@contextmanager
def listen(folder: Path, start: int, steps: int, batch: int, accelerator: Any) -> Iterator["Training"]:
    """Take signals and requests, and keep `live.json`, inside the `with` block.

    Args:
        folder: path of the run folder.
        start: steps made before, from a checkpoint.
        steps: length of the training in weight updates.
        batch: samples per weight update over all processes.
        accelerator: the training's `Accelerator`.
    """
    with on_signals(folder) as stop:
        training = Training(folder, start, steps, batch, stop, accelerator)
        try:
            yield training
        finally:
            training.write()


class Training:
    """A training at work, seen from its loop. Every process has one, and the main process reads and writes the files.

    Attributes:
        asked: what the last step was asked for, the same on every process.
    """

    def __init__(self, folder: Path, start: int, steps: int, batch: int, stop: Stop, accelerator: Any) -> None:
        self.asked = Asked()
        self._folder, self._steps, self._batch = folder, steps, batch
        self._stop, self._accelerator = stop, accelerator
        self._done, self._doing = start, ""
        self._answered: dict[str, int] = {}  # step of the last answer by kind of request
        self._first: tuple[float, int] | None = None  # time and number of the first step, which also compiles
        self._recent: deque[tuple[float, int]] = deque()
        self._looked = self._written = -float("inf")
        self._refused: Any = None  # state of a file that was refused already
        if accelerator.is_main_process:
            self._forget_older()
            self.write()

    def after(self, done: int) -> Asked:
        """Return what is asked after step `done`. Every process must call it at every step, and gets the same answer.

        Without requests, this costs no more messages between processes than the agreement on signals alone.
        """
        wanted = self._take() if self._accelerator.is_main_process else set()
        flags = agreed(
            [self._stop.asked or "stop" in wanted, "sample" in wanted, "evaluate" in wanted], self._accelerator
        )
        stop, sample, evaluate = flags
        self.asked = Asked(sample, evaluate, stop and done < self._steps)
        if self._accelerator.is_main_process:
            self._note(done)
        return self.asked

    def write(self) -> None:
        """Write live.json. Nothing that the disk answers may end a training."""
        if not self._accelerator.is_main_process:
            return
        now = time.monotonic()
        self._written = now
        (then, before), (last, done) = (self._recent[0], self._recent[-1]) if self._recent else ((0.0, 0), (0.0, 0))
        rate = self._batch * (done - before) / (last - then) if last > then else None
        left = None
        if self._first and self._done > self._first[1]:
            per_step = (now - self._first[0]) / (self._done - self._first[1])
            left = round(per_step * (self._steps - self._done), 1)
        row = {
            "step": self._done, "steps": self._steps, "samples_per_second": rate and round(rate, 2), "seconds_left": left,
            "memory_bytes": _memory(), "gpu_memory_bytes": _gpu_memory(), "doing": self._doing,
            "answered": self._answered, "host": platform.node(), "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        with suppress(OSError):
            write_json(self._folder / LIVE, row)

    def _note(self, done: int) -> None:
        """Note that step `done` is made, and write live.json if that is due."""
        now = time.monotonic()
        self._done, self._first = done, self._first or (now, done)
        self._recent.append((now, done))
        while now - self._recent[0][0] > WINDOW_S and len(self._recent) > 2:
            self._recent.popleft()
        doing = "; ".join(words for kind, words in KINDS.items() if getattr(self.asked, kind))
        if doing:
            self._answered |= {kind: done for kind in KINDS if getattr(self.asked, kind)}
        if doing != self._doing or now - self._written >= WRITE_S or done == self._steps:
            self._doing = doing
            self.write()

    def _take(self) -> set[str]:
        """Return the requests in the file, and remove it. A file that cannot be read is left there, and said once."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return set()
        self._looked = now
        file = self._folder / REQUESTS
        try:
            state = os.lstat(file)
        except OSError:  # usually: nobody asks for anything
            return set()
        version = (state.st_mtime_ns, state.st_size, state.st_ino)
        if version == self._refused:
            return set()
        try:
            wanted, foreign = read_requests(file)
        except UserError as error:
            self._refused = version
            _say(f"WARNING: {error}")
            return set()
        if foreign:
            _say(f"WARNING: {file} asks for {', '.join(foreign)}, which no training does; ask for {', '.join(KINDS)}")
        try:
            file.unlink()
        except OSError as error:
            self._refused = version  # It is taken once.
            _say(
                f"WARNING: {file} cannot be removed ({error.strerror}); remove it, or a resumed training finds it again"
            )
        for kind in sorted(wanted):
            _say(f"{file.name}: {KINDS[kind]}")
        if "stop" in wanted:
            mark_ending(self._folder)
        return wanted

    def _forget_older(self) -> None:
        """Remove requests that were made before this process began, so that an old "stop" stops nothing."""
        file = self._folder / REQUESTS
        with suppress(OSError, UserError, psutil.Error):
            if os.lstat(file).st_mtime < psutil.Process().create_time():
                wanted, _ = read_requests(file)
                file.unlink()
                _say(
                    f"{file} is older than this training, so it is removed: {', '.join(sorted(wanted)) or 'no request'}"
                )


def ask(folder: Path, kind: str) -> None:
    """Ask the training in a run folder for something of `KINDS`. Requests that wait already are kept.

    Raises:
        UserError: the run folder cannot be written.
    """
    file = folder / REQUESTS
    try:
        wanted, _ = read_requests(file) if os.path.lexists(file) else (set(), [])
        write_json(file, {"requests": sorted({*wanted, kind})})
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}), so the training was not asked") from None


def read_requests(file: Path) -> tuple[set[str], list[str]]:
    """Read a file of requests.

    Returns:
        The requests of `KINDS`, and the shortened texts of all others. An empty file, as while it is written, asks nothing.

    Raises:
        UserError: the file is no file of requests.
    """
    form = f'write {{"requests": ["{next(iter(KINDS))}"]}}, or remove it'
    try:
        state = os.lstat(file)
        if not stat.S_ISREG(state.st_mode):  # reading a pipe would wait for ever
            raise UserError(f"{file} is no regular file, so it asks nothing of the training; remove it")
        if state.st_size > MOST_BYTES:
            raise UserError(f"{file} has more than {MOST_BYTES} bytes, so it asks nothing of the training; {form}")
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if text.strip() else {"requests": []}
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {form}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({str(error)[:100]}); {form}") from None
    wanted = content.get("requests") if isinstance(content, dict) else None
    if not isinstance(wanted, list):
        raise UserError(f'{file} has no list "requests"; {form}')
    known = {one for one in wanted if isinstance(one, str) and one in KINDS}
    return known, [repr(one)[:40] for one in wanted if one not in tuple(KINDS)][:5]


def read_live(folder: Path) -> dict[str, Any]:
    """Return the content of a run's live.json, or {} if it is missing or damaged."""
    file = folder / LIVE
    try:
        state = os.lstat(file)
        is_own = stat.S_ISREG(state.st_mode) and state.st_size <= MOST_BYTES
        content = json.loads(file.read_text(encoding="utf-8")) if is_own else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _memory() -> int | None:
    """Return this process's resident memory in bytes, or None if the system does not tell."""
    try:
        return int(psutil.Process().memory_info().rss)
    except psutil.Error:
        return None


def _gpu_memory() -> int | None:
    """Return the memory in bytes that this process holds on its GPU, or None without one."""
    torch: Any = sys.modules.get("torch")  # A training has imported it.
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.memory_reserved())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
