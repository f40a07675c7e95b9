"""Return the cores and memory of this machine, and the launcher of this process. This module imports no torch."""

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
    """Ask Linux to send SIGTERM to this process when the launcher that started it ends.

    On SIGTERM, a training saves a checkpoint and ends. A training that receives SIGTERM before its first step ends
    at once. Linux is asked because accelerate's launcher does not pass SIGTERM on, and no launcher can pass SIGKILL on.
    Only Linux can send a signal when a parent process ends.

    Raises:
        SystemExit: the launcher has already ended.
    """
    launcher = find_launcher()
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if (launcher is not None and os.getppid() != launcher.pid) or (launcher is None and _lost_launcher()):
        raise SystemExit(f"error: the launcher of process {os.getpid()} has ended; start the same command again")


def find_launcher() -> Any:
    """Return the launcher that started this process, as `psutil.Process`, or None without a running launcher.

    A launcher has the name of this script in its command line. A shell that only exported a launcher's variables is not
    a launcher.
    """
    if not _LAUNCHED & set(os.environ):
        return None
    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if any(Path(word).name == Path(sys.argv[0]).name for word in parent.cmdline()):
            return parent
    return None


def _lost_launcher() -> bool:
    """Return whether the launcher that started this process has ended.

    When a launcher has ended, the system's first process becomes the parent of this process.
    """
    if os.getppid() != 1 or not _LAUNCHED & set(os.environ):
        return False
    with suppress(psutil.Error):
        first = psutil.Process(1).cmdline()
        return bool(first) and "python" not in first[0]  # in a container the first process may itself be a launcher
    return False


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    process = psutil.Process()
    # macOS binds no process to cores.
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process and its ended children, in bytes.

    On Windows, the peak leaves out child processes.
    """
    try:
        import resource
    except ImportError:  # Windows
        used = psutil.Process().memory_info()
        return int(getattr(used, "peak_wset", used.rss))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB
