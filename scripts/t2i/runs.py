"""Run folders: their JSON files, hashes, state and reuse. Imports no torch, so that listing runs stays fast."""

import ctypes
import errno
import hashlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor, unlock_descriptor

UNFINISHED = "unfinished"  # in run.json: true of a run at work and of a killed one alike
LOCK = (
    ".lock"  # in a run folder: held by the run's first process, with the names of all; others hold .lock-1, .lock-2, …
)
WAIT_FOR_ENDING_S = 300.0  # at most, for processes that save a last checkpoint
WAIT_FOR_UNKNOWN_S = 1.0  # for a lock without a name: of the dashboard's look, or a process that is being killed
SAME_START_S = 2.0  # between two readings of a process's start, as clocks are set
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID", "LOCAL_RANK"}  # set by launchers, rarely by hand


class UserError(Exception):
    """A user's mistake: one sentence that names the file, key or value and the fix. Scripts print it and exit with 2."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; a user's mistake or a limit of the machine becomes one sentence on stderr and exit code 2.

    Ctrl-C gives exit code 130, and a reader of the output that went away 141, as shells count them. What is left is a fault of
    the suite and keeps its traceback.
    """
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a terminal in ASCII shows other letters escaped, rather than ending the work
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains once more while it ends
        raise SystemExit(141) from None
    except Exception as error:
        sentence = _sentence_of(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def _sentence_of(error: Exception) -> str | None:
    """What to tell the user of an error that is not the suite's; None for others."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
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


_OS_FIXES = {
    errno.EEXIST: "a file stands where a folder is needed; name another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; name another folder",
    errno.ENOSPC: "make room on that disk, or name a folder on another",
    errno.EDQUOT: "make room in your quota, or name a folder on another disk",
    errno.EROFS: "that disk is read-only; name a folder on another",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
}


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
    import psutil

    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if any(Path(word).name == Path(sys.argv[0]).name for word in parent.cmdline()):
            return parent
    return None


def _lost_launcher() -> bool:
    """Whether a process that a launcher started, and that has none, is now a child of the system's first process."""
    if os.getppid() != 1 or not _LAUNCHED & set(os.environ):
        return False
    import psutil

    with suppress(psutil.Error):
        first = psutil.Process(1).cmdline()
        return bool(first) and "python" not in first[0]  # in a container the first process may itself be a launcher
    return False


def hash_json(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raise `UserError` naming it when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a folder that holds it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); delete it or restore it from a backup") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `UserError` naming the file when it is missing, damaged or holds anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(
            f"{path} holds no JSON object, so it is of another program; move it away, or restore it from a backup"
        )
    return found


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def code_revision() -> str:
    """The git commit of this code, with "+changes" where files differ from it; "unknown" outside a checkout.

    In a SageMaker job's container there is no checkout, but a file REVISION that was staged with the code.
    """
    scripts = Path(__file__).parents[1]
    staged = scripts.parent / "REVISION"
    if staged.is_file():
        return staged.read_text(encoding="utf-8").strip()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(scripts), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(scripts)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def usable_cores() -> int:
    """Count the CPU cores that this process may use."""
    import psutil

    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # macOS binds none


def peak_rss_bytes() -> int:
    """Peak resident memory in bytes, of this process and of its ended children; on Windows, of this process alone."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        used = psutil.Process().memory_info()
        return int(getattr(used, "peak_wset", used.rss))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


class RunFolder:
    """The state of one run in `run.json`: its identity, status, seconds a stage and results.

    `identity` is everything that decides the result (resolved settings, hashes of the inputs). A folder whose
    identity is the same is reused when finished and gone on with when not; another identity is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, replace: bool = False):
        """replace: results of another identity are made anew instead of refused."""
        self.folder = folder
        self.file = folder / "run.json"
        self.state: dict[str, Any] = {"status": UNFINISHED, "identity": identity, "seconds": {}}
        if self.file.is_file():
            earlier = read_object(self.file)
            if not replace:
                _refuse_other_identity(folder, earlier.get("identity", {}), identity)
            if earlier.get("identity") == identity:
                self.state = earlier

    @property
    def finished(self) -> bool:
        return self.state["status"] == "finished"

    def start(self, config: str, quarantine: list[dict[str, str]]) -> None:
        """Write what is known before the first step: `config.yaml`, `quarantine.jsonl`, `run.json`."""
        write_text(self.folder / "config.yaml", config)
        write_text(
            self.folder / "quarantine.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantine)
        )
        self.save(status=UNFINISHED, quarantined=len(quarantine))

    def save(self, **results: Any) -> None:
        """Add `results` to `run.json`."""
        self.state.update(results)
        write_json(self.file, self.state)

    def finish(self, **results: Any) -> None:
        """Mark the run as finished, with its results and peak memory."""
        peak = max(peak_rss_bytes(), self.state.get("peak_rss_bytes", 0))
        self.save(status="finished", peak_rss_bytes=peak, **results)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to `seconds[stage]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.state["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)


def _refuse_other_identity(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        shown = "; ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now" for key in changed[:4])
        length = {"steps", "TrainUnet.max_train_steps", "TrainUnet.num_train_epochs"}
        further = f"; to train its weights further, add --pretrained_model_name_or_path {folder} to that"
        raise UserError(
            f"{folder} holds another run ({shown}); give another --output_dir, or delete that folder to start anew"
            + (further if length.issuperset(changed) and "TrainUnet.seed" in new else "")
        )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def checkpoint_step(folder: Path) -> int | None:
    """The step of a run's own checkpoint (`checkpoint-000500`: 500); None for any other folder.

    Copies that people keep beside it (`checkpoint-000500-backup`, or another step's under this name) are theirs: they are neither
    listed nor removed.
    """
    found = re.fullmatch(r"checkpoint-([0-9]{6,15})", folder.name)
    if not found or folder.name != f"checkpoint-{int(found[1]):06d}":
        return None
    step = _manifest(folder).get("step", int(found[1]))  # what is no whole checkpoint is known by its name
    return step if step == int(found[1]) else None


def own_checkpoint(run: Path, name: str) -> Path:
    """The folder of the checkpoint `name` of a run, or of its path; `checkpoint-4` of other programs is `checkpoint-000004` here."""
    folder = run / name if Path(name).name == name else Path(name)
    found = re.fullmatch(r"checkpoint-0*([0-9]{1,15})", folder.name)
    own = folder.with_name(f"checkpoint-{int(found[1]):06d}") if found else folder
    return own if own.is_dir() and not folder.is_dir() else folder


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run folder that are complete, oldest first (`checkpoint-000500`: the number is the step).

    Complete: every file of the manifest is there with its size, which a copy made file by file reaches at its end.
    """
    found = {path: checkpoint_step(path) for path in run.glob("checkpoint-*") if _is_complete(path)}
    return sorted((path for path, step in found.items() if step is not None), key=lambda path: found[path] or 0)


def checkpoint_copies(run: Path) -> list[str]:
    """Names of folders in a run folder that hold a checkpoint and are not its own: copies that were renamed."""
    try:
        folders = [path.parent for path in run.glob("*/manifest.json")]
    except OSError:
        return []
    others = (path for path in folders if checkpoint_step(path) is None and not path.name.startswith("."))
    return sorted(path.name for path in others if {"files", "step"} <= _manifest(path).keys())


def _manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest; {} where it is missing or damaged."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_complete(folder: Path) -> bool:
    try:
        files = _manifest(folder)["files"]
        return all((folder / name).stat().st_size == known["bytes"] for name, known in files.items())
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def prepared_folder(cache_dir: str, fingerprint: str) -> Path:
    """Where `t2i.data.preparing` keeps the prepared images of a data set; `fingerprint` is a run's `dataset_hash`."""
    return Path(cache_dir).expanduser() / "pixels" / fingerprint


def find_prepared(cache_dir: str, fingerprint: Any) -> Path | None:
    """`prepared_folder` of a run whose files may be anyone's; None where nothing whole is there, or no such name can be."""
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{16}", fingerprint):  # a name, never a path
        return None
    try:
        folder = prepared_folder(cache_dir, fingerprint)
        return folder if (folder / "report.json").is_file() else None
    except (OSError, RuntimeError):  # of a path that no folder can have: too long, of an unknown user
        return None


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
    import psutil

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
    import psutil

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
