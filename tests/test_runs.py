"""The end of a script: one sentence for a user's mistake or a limit of the machine, a traceback for a fault of the suite."""

import errno
import os
import subprocess
import sys

import pytest

from conftest import SCRIPTS
from t2i.errors import UserError, run_main


def end_of(error, capsys):
    """(exit code, what stands on stderr) of a script whose main raises `error`."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code, capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """As torch names what it raises on a GPU that is full."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("the key x is missing; add it"), "error: the key x is missing; add it"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.png"),
            "out/a.png: No space left on device; make room",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), "/srv/x: Permission denied; check that path"),
        (
            FileExistsError(errno.EEXIST, "File exists", b"caf\xe9"),
            "File exists; a file stands where a folder is needed",
        ),
        (MemoryError(), "the memory is full (MemoryError); use a smaller batch"),
        (
            OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            "(CUDA out of memory. Tried to allocate 2 GiB)",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), "the memory is full"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), "the memory is full"),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
            "the memory is full (CUDA error: out of memory CUDA kernel",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), "the memory is full (MPS backend"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory is full"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the memory is full (cuDNN error"),
    ],
)
def test_a_mistake_or_a_limit_gets_one_sentence(error, sentence, capsys):
    code, said = end_of(error, capsys)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1


def test_ctrl_c_says_that_nothing_is_lost(capsys):
    code, said = end_of(KeyboardInterrupt(), capsys)
    assert code == 130
    assert "the same command resumes" in said


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), OSError("of the network")])
def test_a_fault_of_the_suite_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_main(main)


def script_of(tmp_path, lines):
    path = tmp_path / "script.py"
    path.write_text("from t2i.errors import run_main\ndef main():\n" + lines + "run_main(main)\n", encoding="utf-8")
    return [sys.executable, str(path)]


def test_a_terminal_in_ascii_shows_other_letters_escaped(tmp_path):
    words = script_of(tmp_path, "    print('fleur d’été')\n")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"fleur d\\u2019\\xe9t\\xe9\n")


def test_a_reader_that_goes_away_ends_it_without_a_traceback(tmp_path):
    words = script_of(tmp_path, "    for number in range(100_000): print(number)\n")
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
