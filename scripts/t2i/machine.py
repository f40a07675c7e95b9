"""This machine's cores and memory, and the launcher that started this process. Imports no torch."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID", "LOCAL_RANK"}  # set by launchers, rarely by hand


def end_with_launcher() -> None:
    """Let this process get SIGTERM when the launcher that started it ends: before the first step it then ends at once, later
    it saves a checkpoint.

    accelerate's launcher dies of SIGTERM without passing it on, and no launcher can pass SIGKILL on. Linux alone can do so.
    """
    launcher = find_launcher()
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if (launcher is not None and os.getppid() != launcher.pid) or (launcher is None and _lost_launcher()):
        raise SystemExit(f"error: the launcher of process {os.getpid()} has ended; start the same command again")


def find_launcher() -> Any:
    """The launcher that started this process, as `psutil.Process`; None where nobody did, or it is gone.

    A launcher has this script in its own command line. A shell that exported a launcher's variables has not.
    """
    if not _LAUNCHED & set(os.environ):
        return None

    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if any(Path(word).name == Path(sys.argv[0]).name for word in parent.cmdline()):
            return parent
    return None


def _lost_launcher() -> bool:
    """Whether a process that a launcher started, and that has none, is now a child of the system's first process."""
    if os.getppid() != 1 or not _LAUNCHED & set(os.environ):
        return False

    with suppress(psutil.Error):
        first = psutil.Process(1).cmdline()
        return bool(first) and "python" not in first[0]  # in a container the first process may itself be a launcher
    return False


def usable_cores() -> int:
    """Count the CPU cores that this process may use."""

    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # macOS binds none


def peak_rss_bytes() -> int:
    """Peak resident memory in bytes, of this process and of its ended children; on Windows, of this process alone."""
    try:
        import resource
    except ImportError:  # Windows
        used = psutil.Process().memory_info()
        return int(getattr(used, "peak_wset", used.rss))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB
