"""The lock of a run folder: one training at a time, and what a folder's state is. Imports no torch."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import lock_descriptor, unlock_descriptor

from t2i.errors import UserError
from t2i.files import read_object
from t2i.machine import find_launcher

UNFINISHED = "unfinished"  # in run.json: true of a run at work and of a killed one alike
LOCK = (
    ".lock"  # in a run folder: held by the run's first process, with the names of all; others hold .lock-1, .lock-2, …
)
WAIT_FOR_ENDING_S = 300.0  # at most, for processes that save a last checkpoint
WAIT_FOR_UNKNOWN_S = 1.0  # for a lock without a name: of the dashboard's look, or a process that is being killed
SAME_START_S = 2.0  # between two readings of a process's start, as clocks are set


# --- Who is at work in a run folder ----------------------------------------------------------------------------------


@contextmanager
def lock_run(folder: Path, rank: int, meet: Callable[[], Any]) -> Iterator[None]:
    """Hold `folder` for this run's processes.

    Each process holds a lock of its own, which the system frees when it ends or is killed: a process that outlives its
    launcher keeps a new run out. The first process begins only when nobody holds any of them. Processes that are about
    to end are waited for: those of a launcher that is gone, and those that were told to stop.

    Args:
        folder: the run folder; made if it is missing.
        rank: this process's number in the run.
        meet: waits for all processes of the run.

    Raises:
        UserError: another run is at work in `folder`, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
        own = open(folder / f"{LOCK}-{rank}", "ab") if rank else file  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give another --output_dir") from None
    with file, own:
        if rank == 0:
            _wait_for_ending(file, folder)
            with suppress(OSError):  # the names help, the lock decides
                os.ftruncate(file.fileno(), 0)  # holders of earlier runs
            _write_holder(file.fileno(), _this_process())
        meet()
        if rank != 0:
            _lock(own, wait=True)  # for a look of the dashboard: the first process has seen that nobody works here
            _write_holder(file.fileno(), _this_process())
        meet()
        yield


def mark_ending(folder: Path) -> None:
    """Note beside the lock of `folder` that this process was told to stop; called by a handler of signals."""
    with suppress(OSError):
        handle = os.open(folder / LOCK, os.O_WRONLY | os.O_APPEND)
        try:
            _write_holder(handle, {**_this_process(), "ends": True})
        finally:
            os.close(handle)


def run_status(folder: Path, state: dict[str, Any] | None = None) -> str:
    """A run's status as it is now: "finished", "stopped", "running", "interrupted" (killed or failed) or "unfinished".

    run.json cannot tell a run at work from one that was killed; the lock, which the system frees, can. "unfinished": neither
    can be told, as there is no lock file (a copy) or the file system has no locks. Statuses of other words are passed on.

    Args:
        folder: the run folder.
        state: what its run.json holds, if it was read already.
    """
    state = read_object(folder / "run.json") if state is None else state
    status = str(state.get("status", "unknown"))
    if status not in ("running", UNFINISHED, "stopped"):  # "running": of runs that were made before
        return status
    held = _is_held(folder)
    if held:
        return "running"
    return "interrupted" if held is False and status != "stopped" else status


def _is_held(folder: Path) -> bool | None:
    """Whether a process holds a lock of `folder`; None where that cannot be told."""
    held: list[bool | None] = []
    for path in (folder / LOCK, *_locks_of_others(folder)):
        try:
            with open(path, "r+b") as file:  # NFS gives a lock only where it may write
                held.append(not lock_descriptor(file.fileno(), blocking=False))
        except OSError:
            held.append(None)
    return True if True in held else held[0]


def _locks_of_others(folder: Path) -> list[Path]:
    """The lock files of all processes but the first."""
    return [path for path in folder.glob(f"{LOCK}-*") if path.name.removeprefix(f"{LOCK}-").isdecimal()]


def _wait_for_ending(file: Any, folder: Path) -> None:
    """Take the lock, after waiting for holders that are about to end. Raises `UserError` for holders at work."""
    began, told = time.monotonic(), ""
    while not _lock_if_nobody_works(file, folder):
        holders = _live_holders(file)
        ending = any(holder["ends"] for holder in holders)
        here = any(holder["host"] == platform.node() for holder in holders)
        patience, waited = WAIT_FOR_ENDING_S if ending else 0 if here else WAIT_FOR_UNKNOWN_S, time.monotonic() - began
        if waited >= patience:
            who = f" ({_names(holders)})" if holders else ""
            late = f" and has not ended within {waited:.0f} s" if ending else ""
            raise UserError(
                f"another run is at work in {folder}{who}{late}; wait for it, stop it, or give another --output_dir"
            )
        if ending and not told:
            told = _names(holders)
            print(
                f"waiting for an earlier run in {folder}, which is about to end: {told} (at most {patience:.0f} s)",
                flush=True,
            )
        time.sleep(0.05)
    if told:
        print(f"it has ended after {time.monotonic() - began:.1f} s", flush=True)


def _this_process() -> dict[str, Any]:
    """This process and its launcher, as others can find them."""

    here: dict[str, Any] = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    launcher = find_launcher()
    return here | ({"launcher": launcher.pid, "launcher_started": launcher.create_time()} if launcher else {})


def _write_holder(handle: int, holder: dict[str, Any]) -> None:
    with suppress(OSError):  # a full disk: the lock holds all the same
        # a line begins with its end: Windows lets nobody else read the first byte of a locked file
        os.write(handle, ("\n" + json.dumps(holder) + "\n").encode())


def _live_holders(file: Any) -> list[dict[str, Any]]:
    """The processes that the lock file names and that live, one row each; those of other hosts cannot be looked at, and count.

    "ends": it was told to stop, or its launcher is gone.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in _text_of_locked(file).splitlines():
        with suppress(ValueError, KeyError, TypeError):  # a damaged line
            row = json.loads(line)
            key = str(row["host"]), int(row["pid"])
            rows[key] = {"ends": False, **rows.get(key, {}), **row}
    live = []
    for (host, pid), row in rows.items():
        if host == platform.node():
            if not _lives(pid, row.get("started")):
                continue
            row["ends"] |= "launcher" in row and not _lives(row["launcher"], row.get("launcher_started"))
        live.append(row)
    return live


def _lives(pid: int, started: Any) -> bool:
    """Whether the process runs that had this number at that time (Unix seconds)."""

    with suppress(psutil.Error, TypeError, ValueError, OverflowError):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(started)) < SAME_START_S
    return False


def _names(holders: list[dict[str, Any]]) -> str:
    """The processes in words."""
    hosts: dict[str, list[str]] = {}
    for holder in holders:
        hosts.setdefault(holder["host"], []).append(str(holder["pid"]))
    return "; ".join(f"process {', '.join(pids)} on {host}" for host, pids in hosts.items())


def _text_of_locked(file: Any) -> str:
    """The text of a file that another process may hold; without its first byte if nobody else may read that."""
    for start in (0, 1):
        with suppress(PermissionError):
            file.seek(start)
            return str(file.read())
    return ""


def _lock_if_nobody_works(file: Any, folder: Path) -> bool:
    """Whether the first process's lock was had, and no other process of an earlier run holds its own."""
    if not _lock(file):
        return False
    for path in _locks_of_others(folder):
        with suppress(OSError), open(path, "r+b") as other:
            if not lock_descriptor(other.fileno(), blocking=False):
                unlock_descriptor(file.fileno())
                return False
    return True


def _lock(file: Any, wait: bool = False) -> bool:
    """Whether the lock was had; True as well on file systems that know no locks."""
    try:
        return lock_descriptor(file.fileno(), blocking=wait, poll_interval=0.01)
    except OSError:
        return True
