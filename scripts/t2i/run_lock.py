"""Lock a run folder for one training or evaluation at a time, and tell a run's present status. This module imports no torch."""

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

UNFINISHED = "unfinished"  # status in run.json of a run at work, and of a killed one

# The run's first process holds this file, which names all processes. The others hold .lock-1, .lock-2, …
LOCK = ".lock"
WAIT_FOR_ENDING_S = 300.0  # longest wait for processes that save a last checkpoint
WAIT_FOR_UNKNOWN_S = 1.0  # longest wait for a nameless holder: the dashboard, which only looks, or a dying process
SAME_START_S = 2.0  # largest difference between two readings of a process's start, as clocks are set


# --- Locking a run folder --------------------------------------------------------------------------------------------


@contextmanager
def lock_run(folder: Path, rank: int, meet: Callable[[], Any], option: str = "--output_dir") -> Iterator[None]:
    """Lock a run folder for the processes of this run.

    Each process holds a lock of its own, which the system frees when the process ends or is killed. A process that
    outlives its launcher therefore still prevents a new run in the folder. The first process of a run waits for
    processes of an earlier run that are about to end. A process is about to end if its launcher has ended, or if it was
    told to stop. A run starts once all locks of its folder are free.

    Args:
        folder: path of the run folder. A missing run folder is made.
        rank: number of this process in the run, from 0.
        meet: function at which all processes of the run wait for each other (a barrier).
        option: option of the command that names the folder, for messages.

    Raises:
        UserError: another run is at work in `folder`, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
        rank_file = open(folder / f"{LOCK}-{rank}", "ab") if rank else file  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give another {option}") from None
    with file, rank_file:
        if rank == 0:
            _wait_for_ending(file, folder, option)
            with suppress(OSError):  # stale names do no harm, as the lock decides
                os.ftruncate(file.fileno(), 0)
            _write_holder(file.fileno(), _this_process())
        meet()
        if rank != 0:
            # The first process has seen that all locks are free, so only a look of the dashboard can delay this.
            _lock(rank_file, wait=True)
            _write_holder(file.fileno(), _this_process())
        meet()
        yield


def mark_ending(folder: Path) -> None:
    """Note in the lock file of a run folder that this process was told to stop. Signal handlers call this function."""
    with suppress(OSError):
        handle = os.open(folder / LOCK, os.O_WRONLY | os.O_APPEND)
        try:
            _write_holder(handle, {**_this_process(), "ends": True})
        finally:
            os.close(handle)


def run_status(folder: Path, state: dict[str, Any] | None = None) -> str:
    """Return a run's present status: "finished", "stopped", "running", "interrupted" or "unfinished".

    The file run.json cannot tell a run at work from a killed run. The lock shows whether a run is at work, because the
    system frees the lock when a process ends. The status "interrupted" means that the run was killed or failed.
    The status "unfinished" means that the lock tells nothing: the folder is a copy, or its file system has no locks.
    A status in run.json other than "running" is returned unchanged.

    Args:
        folder: path of the run folder.
        state: content of run.json in the folder, if it was read already.
    """
    state = read_object(folder / "run.json") if state is None else state
    status = str(state.get("status", "unknown"))
    if status not in ("running", UNFINISHED, "stopped"):  # earlier versions wrote "running"
        return status
    is_held = _is_held(folder)
    if is_held:
        return "running"
    return "interrupted" if is_held is False and status != "stopped" else status


def holders(folder: Path) -> list[dict[str, Any]]:
    """Return the running processes that a run's lock file names, one row each: "host", "pid", and whether it "ends" soon.

    Processes of other hosts cannot be seen, so they are listed as running. `run_status` tells whether anyone is at work.
    """
    try:
        with open(folder / LOCK, encoding="utf-8", errors="replace") as file:
            return _live_holders(file)
    except (OSError, ValueError, TypeError, RecursionError):  # no lock file, or one that something else wrote
        return []


def _is_held(folder: Path) -> bool | None:
    """Return whether a process holds a lock of a run folder, or None if the lock does not show this."""
    answers: list[bool | None] = []
    for path in (folder / LOCK, *_locks_of_others(folder)):
        try:
            with open(path, "r+b") as file:  # NFS locks only files that are open for writing
                answers.append(not lock_descriptor(file.fileno(), blocking=False))
        except OSError:
            answers.append(None)
    return True if True in answers else answers[0]


def _locks_of_others(folder: Path) -> list[Path]:
    """Return the lock files of all processes of a run except the first process."""
    return [path for path in folder.glob(f"{LOCK}-*") if path.name.removeprefix(f"{LOCK}-").isdecimal()]


def _wait_for_ending(file: Any, folder: Path, option: str) -> None:
    """Wait for processes that hold the lock and are about to end, then take the lock.

    If other processes hold the lock, raise `UserError`.
    """
    began, waited_for = time.monotonic(), ""
    while not _lock_if_nobody_works(file, folder):
        holders = _live_holders(file)
        ending = any(holder["ends"] for holder in holders)
        here = any(holder["host"] == platform.node() for holder in holders)
        patience, waited = WAIT_FOR_ENDING_S if ending else 0 if here else WAIT_FOR_UNKNOWN_S, time.monotonic() - began
        if waited >= patience:
            who = f" ({_names(holders)})" if holders else ""
            late = f" and has not ended within {waited:.0f} s" if ending else ""
            raise UserError(
                f"another run is at work in {folder}{who}{late}; wait for it, stop it, or give another {option}"
            )
        if ending and not waited_for:
            waited_for = _names(holders)
            print(
                f"waiting for an earlier run in {folder}, which is about to end: {waited_for} (at most {patience:.0f} s)",
                flush=True,
            )
        time.sleep(0.05)
    if waited_for:
        print(f"it has ended after {time.monotonic() - began:.1f} s", flush=True)


def _this_process() -> dict[str, Any]:
    """Return this process's row for the lock file, by which other processes can find the process and its launcher."""
    row: dict[str, Any] = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    launcher = find_launcher()
    return row | ({"launcher": launcher.pid, "launcher_started": launcher.create_time()} if launcher else {})


def _write_holder(handle: int, holder: dict[str, Any]) -> None:
    with suppress(OSError):  # The lock also works on a full disk.
        # It starts with an empty line, as on Windows no other process can read the first byte of a locked file.
        os.write(handle, ("\n" + json.dumps(holder) + "\n").encode())


def _live_holders(file: Any) -> list[dict[str, Any]]:
    """Return the running processes that the lock file names, one row each.

    The key "ends" of a row tells whether the process is about to end.

    A process is about to end if it was told to stop, or if its launcher has ended. Processes on other hosts cannot be
    checked, so such processes count as running.
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
    """Return whether a process with this number and this start time (Unix seconds) is still running."""
    with suppress(psutil.Error, TypeError, ValueError, OverflowError):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(started)) < SAME_START_S
    return False


def _names(holders: list[dict[str, Any]]) -> str:
    """Return words that name a list of processes, grouped by host, for a message."""
    hosts: dict[str, list[str]] = {}
    for holder in holders:
        hosts.setdefault(holder["host"], []).append(str(holder["pid"]))
    return "; ".join(f"process {', '.join(pids)} on {host}" for host, pids in hosts.items())


def _text_of_locked(file: Any) -> str:
    """Return the text of a lock file that another process may hold, on Windows without its first byte."""
    for start in (0, 1):
        with suppress(PermissionError):
            file.seek(start)
            return str(file.read())
    return ""


def _lock_if_nobody_works(file: Any, folder: Path) -> bool:
    """Lock the lock file of the first process.

    Return False if any process of an earlier run still holds a lock of the run folder.
    """
    if not _lock(file):
        return False
    for path in _locks_of_others(folder):
        with suppress(OSError), open(path, "r+b") as other:
            if not lock_descriptor(other.fileno(), blocking=False):
                unlock_descriptor(file.fileno())
                return False
    return True


def _lock(file: Any, wait: bool = False) -> bool:
    """Lock a file, and return whether that worked. On file systems without locks, the result is True."""
    try:
        return lock_descriptor(file.fileno(), blocking=wait, poll_interval=0.01)
    except OSError:
        return True
