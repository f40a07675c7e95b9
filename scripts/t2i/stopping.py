"""Stopping a training by a signal, without losing a step."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the work is saved, and the same command goes on
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Stop:
    """Whether somebody asked for an end: SIGTERM (a spot instance's notice, a scheduler) or Ctrl-C."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: Any) -> None:
        if not self.asked:  # a second signal changes nothing: the save that is under way is not cut
            print(
                f"{signal.Signals(number).name}: finishing this step and saving a checkpoint",
                file=sys.stderr,
                flush=True,
            )
        self.asked = True


@contextmanager
def on_signals() -> Iterator[Stop]:
    """Within the block, SIGTERM and SIGINT only set `asked`; so does the end of the launcher that started this process."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":  # accelerate's launcher dies of SIGTERM without passing it on
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(stop: Stop, accelerator: Any) -> bool:
    """Whether any process was asked to stop: all get the same answer. Called by every process at every step."""
    if accelerator.num_processes == 1:
        return stop.asked
    import torch

    asked = torch.tensor(float(stop.asked), device=accelerator.device)
    return bool(accelerator.reduce(asked, reduction="sum") > 0)
