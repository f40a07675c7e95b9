"""Find every process of a run by a variable in its environment, and send SIGKILL to all of them at one moment.

A launcher starts each worker in a session of its own, so neither a process group nor a session holds them all. Processes that
lost their parent are in no tree. This works on Linux only.
"""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

MARK = "T2I_PROOF_RUN"


def new_mark() -> dict[str, str]:
    """Return a variable for a run's environment, which all its processes inherit."""
    return {MARK: uuid.uuid4().hex}


def marked(mark: dict[str, str]) -> set[int]:
    """Return the living processes that carry the mark. A zombie has no environment and is not among them."""
    wanted, found = f"{MARK}={mark[MARK]}".encode(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def kill_all(mark: dict[str, str], known: Collection[int] = (), look: Callable[[], None] = lambda: None) -> set[int]:
    """Send SIGKILL to every marked process at one moment. All are halted first, so that none sees another one die.

    Args:
        mark: the run's mark.
        known: processes of the run, halted before the others are searched.
        look: called while all stand still.

    Returns:
        The killed processes. None is left.
    """
    halted: set[int] = set()
    while found := (marked(mark) | set(known)) - halted if halted else set(known) or marked(mark):
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGSTOP)
        halted |= found
    look()
    for number in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    until = time.monotonic() + 60
    while left := marked(mark):
        assert time.monotonic() < until, f"processes {left} live after SIGKILL"
        time.sleep(0.01)
    return halted
