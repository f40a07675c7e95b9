"""Define how a script ends: a mistake or a limit of the machine gives one sentence and exit code 2. This module imports no torch."""

import errno
import io
import os
import sys
from collections.abc import Callable

from t2i.machine import end_with_launcher


class UserError(Exception):
    """A user's mistake: a sentence that names the file, key or value, and the fix.

    Scripts print a `UserError` and exit with code 2.
    """


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`. Print a user's mistake or a limit of the machine as one sentence, and exit with code 2.

    A script's exit code is 130 after Ctrl-C, and 141 if the program that reads the output has ended, as in shells. An
    exception other than a user's mistake or a machine's limit is a fault of the suite, and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal in ASCII shows other letters escaped, instead of failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    end_with_launcher()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(
            "interrupted: finished stages, checkpoints and caches are kept; the same command resumes", file=sys.stderr
        )
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python prints a second error while it exits
        raise SystemExit(141) from None
    except Exception as error:
        sentence = _sentence_of(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of the machine or of a GPU is full."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error) for words in _FULL)


def _sentence_of(error: Exception) -> str | None:
    """Return the message for a user's mistake or a limit of the machine, or None for any other exception."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"the memory is full ({text[:160] or 'MemoryError'}); use a smaller batch, and for a training a higher "
            "--gradient_accumulation_steps or --gradient_checkpointing"
        )
    if isinstance(error, OSError) and error.filename is not None:
        fix = _OS_FIXES.get(error.errno or 0, "check that path and its permissions, or name another")
        return f"{os.fsdecode(error.filename)}: {error.strerror}; {fix}"
    if isinstance(error, OSError) and error.errno in _OS_FIXES:
        return f"{error.strerror}; {_OS_FIXES[error.errno]}"
    return None


# What torch says on a CPU, on Windows' CPU, an NVIDIA GPU and an Apple GPU. Most of these errors have no type of their own.
_FULL = (
    *("allocate memory", "not enough memory", "out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
_OS_FIXES = {
    errno.EEXIST: "a file stands where a folder is needed; name another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; name another folder",
    errno.ENOSPC: "make room on that disk, or name a folder on another",
    errno.EDQUOT: "make room in your quota, or name a folder on another disk",
    errno.EROFS: "that disk is read-only; name a folder on another",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
}
