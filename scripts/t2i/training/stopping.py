"""Stop on a signal without losing a step, and end together with the launcher."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i.run_lock import mark_ending

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the work is saved, and the same command resumes it.


class Stop:
    """A signal handler that notes a request to stop: SIGTERM (from a spot instance or a scheduler) or Ctrl-C."""

    def __init__(self, folder: Path) -> None:
        self.asked = False
        self._folder = folder

    def __call__(self, number: int, frame: Any) -> None:
        if not self.asked:  # A second signal changes nothing, so that it cannot interrupt the save.
            print(
                f"{signal.Signals(number).name}: finishing this step and saving a checkpoint",
                file=sys.stderr,
                flush=True,
            )
            mark_ending(self._folder)
        self.asked = True


def end_in_words() -> None:
    """Make SIGTERM outside `on_signals` end this process with a message and exit code `EXIT_STOPPED`."""
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # This is a forked worker of a pool, which the signal must end.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        print(
            f"{signal.Signals(number).name}: ending now; finished caches and checkpoints are kept, and the same command resumes",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(EXIT_STOPPED)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def on_signals(folder: Path) -> Iterator[Stop]:
    """Let SIGTERM and SIGINT only set `asked` inside the `with` block.

    The end of the launcher that started this process also sets `asked`.

    Args:
        folder: path of the run folder, whose lock file tells a new command that this run is about to end.
    """
    stop = Stop(folder)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(flags: Sequence[bool], accelerator: Any) -> list[bool]:
    """Return for each flag whether any process has set it. Every process must call it at every step, and gets the same answer.

    All flags travel in one message between the processes.
    """
    if accelerator.num_processes == 1:
        return list(flags)
    import torch

    asked = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [bool(count > 0) for count in accelerator.reduce(asked, reduction="sum").tolist()]
