"""Compute an array on disk once, by all processes that want it together, in ranges of rows.

Each process takes the next range that no process computes, and marks it at its end. The operating system releases the lock
of a killed process, so another process computes that range. If none is left, the same command computes it later. Processes
of several hosts share the work if the folder is on a shared disk.

While an array is computed, these files lie beside the folder KEY, which appears complete or not at all:

    .KEY.part/array.npy     the rows
    .KEY.part/rows          number of rows per range
    .KEY.part/done/N        mark of range N
    .KEY.locks/N            lock of range N, outside the folder that is renamed
    KEY.lock                lock for beginning and ending
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from t2i.errors import UserError
from t2i.files import write_json

RANGES = 256  # Most ranges of an array. A killed process loses at most one of them.
FULL = (errno.ENOSPC, errno.EDQUOT)  # Errors of a disk or a quota without room.
POLL_S = 0.1  # Wait between two looks at ranges that other processes compute.


def shared_array(
    folder: Path,
    shape: tuple[int, ...],
    dtype: str,
    what: str,
    fill: Callable[[np.ndarray, int, int], None],
    batch: int,
    say: Callable[[str], None],
) -> np.ndarray:
    """Return the array that is stored in `folder`, memory-mapped and read-only. If it is missing, compute it first.

    Args:
        folder: folder of the array. Its name must identify the content.
        shape: shape of the array, at least one row.
        dtype: numpy's name of the type of its values.
        what: what the array holds, for messages.
        fill: function of array, start and stop that writes the rows from start up to stop.
        batch: rows per batch of `fill`. Each start is a multiple of the `batch` of the process that began the array, so
            batches do not depend on the number of processes.
        say: function that prints a progress message.

    Raises:
        UserError: the disk has too little room.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        say(f"reusing {what} in {folder}")
    else:
        _compute(folder, shape, dtype, what, fill, batch, say)
    return np.load(folder / "array.npy", mmap_mode="r", allow_pickle=False)


def _compute(
    folder: Path,
    shape: tuple[int, ...],
    dtype: str,
    what: str,
    fill: Callable[[np.ndarray, int, int], None],
    batch: int,
    say: Callable[[str], None],
) -> None:
    """Compute ranges of rows until all are done, and let the folder appear."""
    part, locks = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.locks")
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        rows = _begin(part, locks, shape, dtype, what, batch, say)
    ranges = [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
    is_quiet = os.environ.get("RANK", "0") != "0"  # One process shows the progress of all.
    with tqdm(total=shape[0], desc=what, unit="row", disable=is_quiet, mininterval=0.5) as bar:
        while not folder.is_dir():
            try:
                pending = _pending(part, len(ranges), folder)
                done = shape[0] - sum(ranges[number][1] - ranges[number][0] for number in pending)
                if done > bar.n:
                    bar.update(done - bar.n)
                if not pending:
                    _finish(part, locks, folder, what, shape)
                elif not _compute_one(pending, ranges, part, locks, folder, fill):
                    time.sleep(POLL_S)  # Other processes compute all ranges that are left.
            except FileNotFoundError:
                if part.is_dir() or folder.is_dir():
                    raise
                raise UserError(f"{part} was removed while it was computed; start the same command again") from None
        bar.update(shape[0] - bar.n)


def _pending(part: Path, count: int, folder: Path) -> list[int]:
    """Return the numbers of the ranges that are not marked."""
    try:
        done = set(os.listdir(part / "done"))
    except FileNotFoundError:
        if not folder.is_dir():
            raise
        return []
    return [number for number in range(count) if str(number) not in done]


def _begin(
    part: Path, locks: Path, shape: tuple[int, ...], dtype: str, what: str, batch: int, say: Callable[[str], None]
) -> int:
    """Create the files of an array without rows, unless a process has done so. The caller holds the lock of the folder.

    Returns:
        Number of rows per range. Marks of ranges are valid for this number only, whatever `batch` a later process has.
    """
    locks.mkdir(exist_ok=True)
    # Older versions wrote no number of rows, so their marks tell nothing. Such an array is begun anew.
    if (part / "array.npy").is_file() and (part / "rows").is_file():
        say(f"computing {what}, which another process began, in {part.parent}")
        return int((part / "rows").read_text(encoding="utf-8"))
    shutil.rmtree(part, ignore_errors=True)  # A process was killed here.
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(part.parent).free
    if size > free:
        raise UserError(
            f"{what} need {size / 1e6:.0f} MB in {part.parent}, which has {free / 1e6:.0f} MB free; give another --cache_dir"
        )
    say(f"computing {what}: {size / 1e6:.1f} MB in {part.parent}")
    (part / "done").mkdir(parents=True)
    rows = batch * -(-shape[0] // (batch * RANGES))  # a multiple of `batch`
    (part / "rows").write_text(str(rows), encoding="utf-8")
    np.lib.format.open_memmap(part / "new.npy", mode="w+", dtype=dtype, shape=shape).flush()
    try:
        _reserve(part / "new.npy")
    except OSError as error:
        if error.errno in FULL:  # otherwise the file system cannot reserve room
            shutil.rmtree(part)
            raise UserError(
                f"{what} need {size / 1e6:.0f} MB in {part.parent} ({error.strerror}); make room, or give another --cache_dir"
            ) from None
    os.replace(part / "new.npy", part / "array.npy")
    return rows


def _reserve(path: Path) -> None:
    """Reserve a file's room on the disk, on systems that can. Otherwise a disk that fills up later kills the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _compute_one(
    pending: list[int],
    ranges: list[tuple[int, int]],
    part: Path,
    locks: Path,
    folder: Path,
    fill: Callable[[np.ndarray, int, int], None],
) -> bool:
    """Compute the first pending range that no other process computes. Return whether there was one."""
    for number in pending:
        mark = part / "done" / str(number)
        try:
            with FileLock(locks / str(number), timeout=0):
                if mark.exists() or folder.is_dir():  # in this order, since the folder takes the marks away
                    continue
                array = np.load(part / "array.npy", mmap_mode="r+", allow_pickle=False)
                fill(array, *ranges[number])
                array.flush()
                del array  # Windows cannot rename the folder of an open file.
                mark.touch()
                return True
        except Timeout:
            continue
    return False


def _finish(part: Path, locks: Path, folder: Path, what: str, shape: tuple[int, ...]) -> None:
    """Let the complete folder appear, unless another process has done so."""
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_json(part / "cache.json", {"what": what, "shape": shape})
            os.replace(part, folder)
            shutil.rmtree(folder / "done", ignore_errors=True)
            (folder / "rows").unlink(missing_ok=True)
            shutil.rmtree(locks, ignore_errors=True)
