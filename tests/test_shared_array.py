"""Arrays that several processes compute together: each range once, whole or not at all, whoever is killed."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.data import shared_array
from t2i.errors import UserError


def rows(array, start, stop):
    array[start:stop] = np.arange(start, stop)[:, None]


def compute(folder, count, fill, batch=1, say=lambda _: None):
    return shared_array.shared_array(folder, (count, 2), "float32", "numbers", fill, batch, say)


def test_processes_share_the_ranges_and_each_range_is_computed_once(tmp_path):
    """Two threads stand for two processes: the lock of a range excludes both. Neither can finish without the other."""
    meet, computed = threading.Barrier(2, timeout=60), {}

    def take_part():
        seen = computed.setdefault(threading.get_ident(), [])

        def fill(array, start, stop):
            if not seen:
                meet.wait()
            seen.append((start, stop))
            rows(array, start, stop)

        compute(tmp_path / "key", 1000, fill, batch=3)

    threads = [threading.Thread(target=take_part) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranges = sorted(pair for pairs in computed.values() for pair in pairs)
    assert len(computed) == 2
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert all(start % 3 == 0 for start, _ in ranges)
    assert len(ranges) <= shared_array.RANGES
    found = compute(tmp_path / "key", 1000, None)
    np.testing.assert_array_equal(found[:, 0], np.arange(1000))
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["array.npy", "cache.json"]
    assert {path.name for path in tmp_path.iterdir()} <= {"key", "key.lock"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed process is forked")
def test_a_killed_process_loses_only_the_range_it_was_in(tmp_path):
    context = multiprocessing.get_context("fork")
    reached = context.Event()

    def until_killed(array, start, stop):
        rows(array, start, stop)
        if start == 3:
            array.flush()
            reached.set()
            signal.pause()

    process = context.Process(target=compute, args=(tmp_path / "key", 10, until_killed))
    process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "key").exists()
    seen, said = [], []

    def fill(array, start, stop):
        seen.append(start)
        rows(array, start, stop)

    found = compute(tmp_path / "key", 10, fill, say=said.append)
    assert seen == [3, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(found[:, 1], np.arange(10))
    assert said == [f"computing numbers, which another process began, in {tmp_path}"]


def test_a_failing_computation_ends_with_its_error_and_the_next_one_resumes(tmp_path):
    def fails(array, start, stop):
        if start == 2:
            raise RuntimeError("no memory")
        rows(array, start, stop)

    with pytest.raises(RuntimeError, match="no memory"):
        compute(tmp_path / "key", 5, fails)
    assert not (tmp_path / "key").exists()
    np.testing.assert_array_equal(compute(tmp_path / "key", 5, rows)[:, 0], np.arange(5))


def test_an_array_begun_with_one_batch_and_continued_with_another_has_all_its_rows(tmp_path):
    """A training begins on a CPU with small batches, is stopped, and goes on on a GPU with large ones."""

    def until_stopped(array, start, stop):
        if stop > 400:
            raise KeyboardInterrupt
        rows(array, start, stop)

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "key", 679, until_stopped, batch=16)
    found = compute(tmp_path / "key", 679, rows, batch=32)
    np.testing.assert_array_equal(found[:, 0], np.arange(679))
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["array.npy", "cache.json"]


def test_marks_of_a_version_that_wrote_no_number_of_rows_are_not_trusted(tmp_path):
    (tmp_path / ".key.part/done").mkdir(parents=True)
    (tmp_path / ".key.part/done/3").touch()
    np.save(tmp_path / ".key.part/array.npy", np.zeros((5, 2), np.float32))
    np.testing.assert_array_equal(compute(tmp_path / "key", 5, rows)[:, 0], np.arange(5))


def test_a_process_killed_before_the_first_range_is_no_obstacle(tmp_path):
    (tmp_path / ".key.part/done").mkdir(parents=True)
    (tmp_path / ".key.part/new.npy").write_bytes(b"half a head")
    np.testing.assert_array_equal(compute(tmp_path / "key", 5, rows)[:, 0], np.arange(5))


def test_folders_removed_meanwhile_get_a_sentence(tmp_path):
    def remove(array, start, stop):
        shutil.rmtree(tmp_path / ".key.part")

    with pytest.raises(UserError, match=r"\.key\.part was removed while it was computed; start the same command again"):
        compute(tmp_path / "key", 5, remove)


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    usage = shared_array.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shared_array.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"numbers need 0 MB in .*, which has 0 MB free; give another --cache_dir"):
        compute(tmp_path / "key", 5, rows)
    assert not (tmp_path / ".key.part").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room")
def test_room_is_reserved_before_the_work(tmp_path, monkeypatch):
    """A write into a memory-mapped file kills the process if the disk is full by then."""

    def look(array, start, stop):
        status = (tmp_path / ".key.part/array.npy").stat()
        assert status.st_blocks * 512 >= status.st_size
        rows(array, start, stop)

    compute(tmp_path / "key", 50_000, look, batch=1000)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"numbers need 0 MB in .* \(No space left on device\); make room, or give another"
    ):
        compute(tmp_path / "other", 5, rows)
    assert not (tmp_path / ".other.part").exists()


@settings(max_examples=15)
@given(count=st.integers(1, 2000), batch=st.integers(1, 64))
def test_ranges_are_whole_batches_that_cover_every_row_once(count, batch, tmp_path_factory):
    seen = []

    def fill(array, start, stop):
        seen.append((start, stop))
        rows(array, start, stop)

    folder = Path(tmp_path_factory.mktemp("ranges")) / "key"
    np.testing.assert_array_equal(compute(folder, count, fill, batch)[:, 0], np.arange(count))
    assert all(start % batch == 0 for start, _ in seen)
    assert sum(stop - start for start, stop in seen) == count
    assert len(seen) <= shared_array.RANGES
