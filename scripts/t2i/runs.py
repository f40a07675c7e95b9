"""Run folders: their JSON files, hashes, state and reuse. Imports no torch, so that listing runs stays fast."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.files import read_object, write_json, write_text
from t2i.machine import peak_rss_bytes
from t2i.run_lock import UNFINISHED


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
