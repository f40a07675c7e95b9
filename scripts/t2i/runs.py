"""Manage run folders: run.json, reuse of finished runs, and folders of checkpoints. This module imports no torch."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.files import hash_files, read_object, read_optional, write_json, write_text
from t2i.machine import peak_rss_bytes
from t2i.run_lock import UNFINISHED

GUIDE = "guide"  # Folder in a pipeline: the model's earlier weights, which guide its pictures (`pictures/guide.py`).
GUIDE_STEP = "guide.json"  # File in it: the update of these weights, {"step": 3000}. Copied weights lack it.


def code_revision() -> str:
    """Return the git commit of this code, with "+changes" if files differ from the commit; "unknown" outside a
    checkout.

    The container of a SageMaker job has no checkout, but a file REVISION that was staged with the code.
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


NOT_COMPARED = {"Distill.model", "TrainUnet.guidance_rescale"}  # Settings that earlier versions compared.
LENGTHS = ("max_train_steps", "num_train_epochs")  # The settings that may be raised to extend a training.
PUSHING = {"push_to_hub", "hub_private_repo", "hub_deadline", "hub_revision", "create_pr"}
# Settings that are not compared when a training is resumed or extended.
FREE_OF_TRAINING = {
    *(
        "output_dir",
        "cache_dir",
        "dry_run",
        "mixed_precision",
        "logging_dir",
        "max_bad_share",
        "report_to",
        "experiment",
        "run_name",
    ),
    "lr_on_extend",  # Each extension is recorded with its own.
    *("logging_steps", "validation_steps", "validation_epochs", "validation_prompts"),
    *("guidance_scale", "guidance_rescale", "num_inference_steps"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "max_nonfinite_steps"),
    *("gradient_checkpointing", "compile", "channels_last", "cuda_graphs"),
    *(*PUSHING, "hub_model_id", "license", "gallery_pictures"),
}
# Settings of a captioning that may change without another data set: how the work is done, and where the result goes.
FREE_OF_CAPTIONING = {"output_dir", "dry_run", "caption_batch_size", "fail_on", *PUSHING}


class RunFolder:
    """The state of one run in `run.json`: its identity, status, seconds per stage, and results.

    The identity of a run is everything that decides its result: the resolved settings, and the hashes of data and
    models. A folder with a run of the same identity is reused if the run is finished, and resumed if not. A folder with
    a training of fewer `steps`, but otherwise the same identity, is extended. Any other folder is refused.

    Args:
        folder: path of the run folder.
        identity: everything that decides the result of this run.
        replace: whether results of a run of another identity are replaced instead of refused.

    Attributes:
        shorter: number of weight updates of the run in the folder, if this run is longer. Otherwise None.

    Raises:
        UserError: the folder holds a run of another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, replace: bool = False):
        self.folder = folder
        self.file = folder / "run.json"
        self.state: dict[str, Any] = {"status": UNFINISHED, "identity": identity, "seconds": {}}
        self.shorter: int | None = None
        if self.file.is_file():
            earlier = read_object(self.file)
            before = {key: value for key, value in earlier.get("identity", {}).items() if key not in NOT_COMPARED}
            if not replace:
                _refuse_other_identity(folder, before, identity)
            if before == identity or not replace:
                self.state = {**earlier, "identity": identity}
                self.shorter = before["steps"] if before.get("steps") != identity.get("steps") else None

    @property
    def finished(self) -> bool:
        return self.state["status"] == "finished" and self.shorter is None

    def start(self, config: str, quarantine: list[dict[str, str]], precision: str) -> None:
        """Write the files of a run that exist before its first step: `config.yaml`, `quarantine.jsonl`, `run.json`.

        Args:
            config: the resolved settings as YAML.
            quarantine: the images that were left out.
            precision: precision of the training from now on: no, bf16 or fp16.
        """
        write_text(self.folder / "config.yaml", config)
        write_text(
            self.folder / "quarantine.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantine)
        )
        self.save(status=UNFINISHED, quarantined=len(quarantine), precisions=self._precisions(precision))

    def _precisions(self, precision: str) -> list[dict[str, Any]]:
        """Return the precisions of the training so far, each with the step from which it was used. A change is printed."""
        folders = checkpoint_folders(self.folder)
        step = (checkpoint_step(folders[-1]) or 0) if folders else 0
        earlier = list(self.state.get("precisions", [])) if step else []
        if earlier and earlier[-1]["precision"] == precision:
            return earlier
        if earlier:
            print(
                f"NOTE: mixed_precision was {earlier[-1]['precision']} until step {step}, and is {precision} from there"
            )
        return [*earlier, {"from_step": step, "precision": precision}]

    def save(self, **results: Any) -> None:
        """Add `results` to `run.json`."""
        self.state.update(results)
        write_json(self.file, self.state)

    def finish(self, **results: Any) -> None:
        """Mark the run as finished. Add the results and peak memory of the run to `run.json`."""
        peak = max(peak_rss_bytes(), self.state.get("peak_rss_bytes", 0))
        self.save(status="finished", peak_rss_bytes=peak, **results)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure the duration of the `with` block, and add it to the seconds of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.state["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)


def _refuse_other_identity(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    is_longer = isinstance(old.get("steps"), int) and old["steps"] <= new.get("steps", 0)
    if is_longer:
        changed = [key for key in changed if key != "steps" and key.rpartition(".")[2] not in LENGTHS]
    if changed:
        shown = "; ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now" for key in changed[:4])
        extend = f"; to extend the run, raise {' or '.join(LENGTHS)}, and change nothing else"
        raise UserError(
            f"{folder} holds another run ({shown}); give another --output_dir, or delete that folder to start anew"
            + (extend if "steps" in new else "")
        )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def run_title(run: Path) -> str:
    """Return the name of a run for people: that of its folder, or of the folder that `run_recipe.py` made around it."""
    folder = run.resolve()
    return folder.parent.name or folder.name if folder.name == "unet" else folder.name


def _state_of(run: Path) -> dict[str, Any]:
    """Return the state in a run's run.json, or {} if the file is missing or damaged."""
    try:
        return read_optional(run / "run.json")
    except UserError:
        return {}


def find_student(run: Path) -> Path | None:
    """Return the run folder beside a finished run that holds the newest finished student of its model, or None.

    Students are made by distill_unet.py. Their identity holds the hash of their teacher.
    """
    teacher = _state_of(run).get("output_unet_hash")
    found: list[tuple[float, Path]] = []
    for file in run.parent.glob("*/run.json") if teacher else ():
        state = _state_of(file.parent)
        identity = state.get("identity")
        if isinstance(identity, dict) and identity.get("teacher_hash") == teacher and state.get("status") == "finished":
            found.append((file.stat().st_mtime, file.parent))
    return max(found, default=(0.0, None))[1]


def find_teacher_run(student: Path) -> Path | None:
    """Return the run folder beside a student's that holds its teacher, or None."""
    identity = _state_of(student).get("identity")
    teacher = identity.get("teacher_hash") if isinstance(identity, dict) else None
    runs = (file.parent for file in student.parent.glob("*/run.json") if teacher)
    return next((run for run in sorted(runs) if _state_of(run).get("output_unet_hash") == teacher), None)


def check_finished(run: Path) -> None:
    """Raise `UserError` if a folder is the run of a training that has never finished, whose model is only in checkpoints."""
    state = read_optional(run / "run.json")
    if state and state.get("status") != "finished" and "output_unet_hash" not in state:
        raise UserError(f"the run in {run} has not finished; let it finish, or give one of its checkpoints")


def guide_folder(pipeline: Path, checkpoint: Path | None = None) -> Path | None:
    """Return the folder of the earlier weights that guide a model's pictures, or None if the model has no guide.

    A guide guides only the weights of later updates than its own.

    Args:
        pipeline: pipeline folder that may hold a guide.
        checkpoint: checkpoint of the run that is guided, if it is not the pipeline itself.
    """
    folder, run = pipeline / GUIDE, pipeline.parent
    if not (folder / "config.json").is_file():
        return None
    # While a finished run is extended, its pipeline still holds the weights of the former end.
    step = _manifest(checkpoint).get("step") if checkpoint else _state_of(run).get("steps")
    if not isinstance(step, int):
        return folder
    first = guide_step(folder)
    return folder if first is None or step > first else None


def guide_problem(run: Path) -> str | None:
    """Say that a run was evaluated with another guide than its pipeline has now, or return None."""
    guide, identity = guide_folder(run / "pipeline"), _state_of(run / "evaluation").get("identity")
    if not isinstance(identity, dict) or identity.get("guide") == (hash_files(guide) if guide else None):
        return None
    return (
        f"the pictures of {run / 'evaluation'} were drawn with another guide than {run / 'pipeline'} has now; run "
        "scripts/evaluate_checkpoints.py again"
    )


def guide_step(folder: Path) -> int | None:
    """Return the update of a guide's weights, or None if it is not known.

    A guide that was copied from a checkpoint of the same run has the files of that checkpoint.
    """
    step = read_optional(folder / GUIDE_STEP).get("step")
    if isinstance(step, int):
        return step
    weights = {name: digest for name, digest in hash_files(folder).items() if name.endswith(".safetensors")}
    for checkpoint in checkpoint_folders(folder.parents[1]):
        files = _manifest(checkpoint)["files"]
        for part in ("unet_ema", "unet"):
            known = {name: files.get(f"{part}/{name}", {}).get("sha256") for name in weights}
            if weights and known == weights:
                return checkpoint_step(checkpoint)
    return None


def checkpoint_step(folder: Path) -> int | None:
    """Return the step of a checkpoint that the run itself wrote (`checkpoint-000500`: 500), or None for any other folder.

    Users may keep copies beside a checkpoint, such as `checkpoint-000500-backup`. Copies of checkpoints, even under the
    name of another step, are neither listed nor removed.
    """
    name = re.fullmatch(r"checkpoint-([0-9]{6,15})", folder.name)
    if not name or folder.name != f"checkpoint-{int(name[1]):06d}":
        return None
    step = _manifest(folder).get("step", int(name[1]))  # an incomplete checkpoint has only its name
    return step if step == int(name[1]) else None


def own_checkpoint(run: Path, name: str) -> Path:
    """Return the folder of a run's checkpoint.

    The name `checkpoint-4`, as other programs write the name, also finds the checkpoint of step 4.

    Args:
        run: path of the run folder.
        name: name or path of the checkpoint.
    """
    folder = run / name if Path(name).name == name else Path(name)
    step = re.fullmatch(r"checkpoint-0*([0-9]{1,15})", folder.name)
    padded = folder.with_name(f"checkpoint-{int(step[1]):06d}") if step else folder
    return padded if padded.is_dir() and not folder.is_dir() else folder


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, the oldest first.

    A checkpoint is complete if every file of its manifest exists and has its size. A checkpoint that is being copied
    becomes complete with its last file.
    """
    steps = {path: checkpoint_step(path) for path in run.glob("checkpoint-*") if _is_complete(path)}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)


def checkpoint_copies(run: Path) -> list[str]:
    """Return the names of folders in a run folder that hold a checkpoint under another name, such as renamed copies."""
    try:
        folders = [path.parent for path in run.glob("*/manifest.json")]
    except OSError:
        return []
    others = (path for path in folders if checkpoint_step(path) is None and not path.name.startswith("."))
    return sorted(path.name for path in others if {"files", "step"} <= _manifest(path).keys())


def _manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, or {} if it is missing or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_complete(folder: Path) -> bool:
    try:
        files = _manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def prepared_folder(cache_dir: str, fingerprint: str) -> Path:
    """Return the folder for the prepared images of a data set.

    The argument `fingerprint` is the `dataset_hash` of a run.
    """
    return Path(cache_dir).expanduser() / "pixels" / fingerprint


def find_prepared(cache_dir: str, fingerprint: Any) -> Path | None:
    """Return the folder of a run's prepared images, or None if the folder is incomplete.

    The fingerprint in run.json is checked before it becomes part of a path.
    """
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{16}", fingerprint):  # it must not be a path
        return None
    try:
        folder = prepared_folder(cache_dir, fingerprint)
        return folder if (folder / "report.json").is_file() else None
    except (OSError, RuntimeError):  # the path is too long, or of an unknown user
        return None
