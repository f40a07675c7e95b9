"""Save and load checkpoints, which are complete or absent and are verified before use. Files are safetensors and JSON.

The first node writes `checkpoint-000500/`, and another node writes `node-1/checkpoint-000500/`. Each folder holds the
files of its node's processes, and `manifest.json` with the size and SHA-256 of each file. A checkpoint is written to a
temporary folder, the manifest last, and then renamed. No shared disk is assumed. A copy made file by file, such as an
S3 sync, is valid only once every file is present.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from t2i.errors import UserError
from t2i.files import sha256_file, share_weights, write_text
from t2i.runs import checkpoint_copies, checkpoint_folders, checkpoint_step, own_checkpoint

MANIFEST = "manifest.json"


class Node:
    """Position of this process among the nodes (hosts) of a run, with ways to wait for and compare with other processes."""

    def __init__(self, accelerator: Any):
        from accelerate.utils import gather_object

        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        self.count = max(1, accelerator.num_processes // max(1, local))
        self.index = accelerator.process_index // max(1, local)
        # The node's first process makes folders and writes the manifest.
        self.first = accelerator.is_local_main_process
        self.meet: Callable[[], None] = accelerator.wait_for_everyone
        self.gather: Callable[[Any], list[Any]] = lambda value: gather_object([value])


def node_folder(run: Path, node: Node) -> Path:
    """Return the folder of this node's checkpoints."""
    return run if node.index == 0 else run / f"node-{node.index}"


# --- Saving ----------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], node: Node, limit: int | None) -> Path:
    """Save and verify `checkpoint-<step>`, then remove the oldest checkpoints beyond `limit`. Every process must call this function.

    Args:
        write: function that writes this process's files into a given folder.
        limit: maximum number of checkpoints to keep. With None or 0, keep all checkpoints.

    Raises:
        UserError: the files cannot be written. Earlier checkpoints of other steps are untouched.
    """
    home = node_folder(run, node)
    folder = home / f"checkpoint-{step:06d}"
    part = home / f".{folder.name}.part"
    try:
        _write_part(part, step, write, node)
        if node.first:
            aside = home / f".{folder.name}.old"
            if folder.exists():  # This happens after a resume from an earlier checkpoint.
                os.replace(folder, aside)
            os.replace(part, folder)
            sync(home)
            shutil.rmtree(aside, ignore_errors=True)
            problem = find_damage(folder)
            if problem:
                raise OSError(f"{problem} after it was written; the disk cannot be trusted")
    except (OSError, SafetensorError) as error:
        if node.first:
            shutil.rmtree(part, ignore_errors=True)
        whole = ", ".join(found.name for found in checkpoint_folders(home)) or "none"
        raise UserError(
            f"checkpoint {folder} cannot be written ({reason_of(error)}); complete checkpoints: {whole}; make room, then "
            "the same command resumes"
        ) from None
    node.meet()
    if node.first:
        for old in checkpoint_folders(home)[: -limit if limit else 0]:
            _remove(old)
    return folder


def rehearse(run: Path, write: Callable[[Path], None], node: Node, more_bytes: int) -> None:
    """Save a checkpoint before training and remove it. A full or read-only disk is found in the first minute.

    Args:
        more_bytes: number of bytes by which later checkpoints are larger. The first checkpoint has no moments of the
            optimiser yet.
    """
    home = node_folder(run, node)
    part = home / ".rehearsal.part"
    try:
        if node.first:
            home.mkdir(parents=True, exist_ok=True)
            # Killed saves leave these folders behind.
            for left in (*home.glob(".checkpoint-*.part"), *home.glob(".checkpoint-*.old")):
                shutil.rmtree(left)
        _write_part(part, 0, write, node)
        if node.first:
            size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
            shutil.rmtree(part)
            free = shutil.disk_usage(home).free
            if free < size + more_bytes:
                raise OSError(f"{free / 1e6:,.0f} MB are free, a checkpoint takes {(size + more_bytes) / 1e6:,.0f} MB")
    except (OSError, SafetensorError) as error:
        if node.first:
            shutil.rmtree(part, ignore_errors=True)
        raise UserError(
            f"checkpoints cannot be saved in {home} ({reason_of(error)}); make room, or give another --output_dir"
        ) from None
    node.meet()


def _write_part(part: Path, step: int, write: Callable[[Path], None], node: Node) -> None:
    """Write every process's files, then the manifest. All files are on disk when the first process of the node returns."""
    if node.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    node.meet()
    write(part)
    node.meet()
    if not node.first:
        return
    share_weights(part)
    files = {}
    for file in sorted(path for path in part.rglob("*") if path.is_file()):
        sync(file)
        files[file.relative_to(part).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    for folder in sorted({file.parent for file in part.rglob("*")}):
        sync(folder)
    manifest = {"step": step, "node": node.index, "nodes": node.count, "files": files}
    write_text(part / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    sync(part / MANIFEST)
    sync(part)


def sync(path: Path) -> None:
    """Wait until the content of a file or folder is on disk.

    On Windows, folders cannot be opened, and only files that are open for writing can be flushed.
    """
    if sys.platform == "win32":
        if path.is_dir():
            return
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason_of(error: Exception) -> str:
    """Return in a few words why a file cannot be written."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


# --- Finding ---------------------------------------------------------------------------------------------------------


def find_damage(folder: Path, part: str = "") -> str | None:
    """Describe the damage to a checkpoint, or to its files whose names begin with `part`.

    Return None if every byte matches the manifest.
    """
    if not (folder / MANIFEST).is_file():
        return f"{folder / MANIFEST} is missing"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {name: {"bytes": int(known["bytes"]), "sha256": str(known["sha256"])} for name, known in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{folder / MANIFEST} is damaged"
    for name, known in files.items():
        file = folder / name
        if not name.startswith(part):
            continue
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {known['bytes']}"
        if sha256_file(file) != known["sha256"]:
            return f"{file} is damaged (its SHA-256 is not the manifest's)"
    return None


def find_checkpoint(run: Path, name: str | None, node: Node, say: Callable[[str], Any] = print) -> Path | None:
    """Return the checkpoint to resume from, of the same step on every node. Every process must call this function.

    Damaged checkpoints are reported through `say` and skipped.

    Args:
        name: name of a checkpoint, "latest" for the newest complete checkpoint, or None for a new start.

    Returns:
        The checkpoint's folder, or None if there is no checkpoint.

    Raises:
        UserError: the named checkpoint is damaged or missing, or no checkpoint is complete on every node. A new start
            in a folder with checkpoints, or only with copies of checkpoints, is also refused.
    """
    home = node_folder(run, node)
    there = _own_checkpoints(home)
    if name is None:
        if any(node.gather(bool(there))):
            raise UserError(
                f"{run} holds checkpoints ({', '.join(path.name for path in there)}), which a new start would replace; leave out "
                "--resume_from_checkpoint None to resume, delete them, or give another --output_dir"
            )
        return None
    if name != "latest":
        folder = own_checkpoint(home, name)
        if folder.absolute().parent.resolve() != home.resolve() or folder.name not in {path.name for path in there}:
            known = ", ".join(path.name for path in there) or "none"
            copy = " by its name; a copy is resumed from once it has its old name back" if folder.is_dir() else ""
            raise UserError(f"resume_from_checkpoint {name} is not a checkpoint of {run}{copy}; there are: {known}")
        problem = find_damage(folder) if node.first else None
        if problem:
            raise UserError(
                f"{problem}, so an exact resume from {folder.name} is not possible; name another, or take latest"
            )
        node.meet()
        return folder
    limit = float("inf")
    while True:
        found = _newest_whole(there, limit, say) if node.first else float("inf")
        steps = {step for step in node.gather(found) if step != float("inf")}
        if len(steps) == 1:
            break
        limit = min(steps)
    step = steps.pop()
    if step >= 0:
        return home / f"checkpoint-{int(step):06d}"
    if any(node.gather(bool(there))):
        raise UserError(
            f"{run} has checkpoints, but none that is whole on every node; restore one from a copy, or start anew with another "
            "--output_dir"
        )
    copies = checkpoint_copies(home) if node.first else []
    if any(node.gather(bool(copies))):
        raise UserError(
            f"{run} has no checkpoint of its own, only copies ({', '.join(copies)}); give one its old name back, or set another "
            "--output_dir"
        )
    return None


def _own_checkpoints(home: Path) -> list[Path]:
    """Return the checkpoints of a node, also incomplete ones, oldest first. Copies under other names are not included."""
    found = {path: checkpoint_step(path) for path in home.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in found.items() if step is not None), key=lambda path: found[path] or 0)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. If the checkpoint is a link, remove only the link."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def _newest_whole(folders: list[Path], limit: float, say: Callable[[str], Any]) -> float:
    """Return the newest step up to `limit` with a complete checkpoint, or -1 if there is none."""
    for folder in reversed(folders):
        step = checkpoint_step(folder)
        if step is None or step > limit:
            continue
        problem = find_damage(folder)
        if problem is None:
            return step
        say(f"WARNING: {problem}; skipping {folder.name}, and looking for an earlier checkpoint")
    return -1


def forget_after(run: Path, step: int, node: Node, say: Callable[[str], Any] = print) -> None:
    """Remove this node's checkpoints and logged rows beyond `step`, because training is about to repeat these steps."""
    home = node_folder(run, node)
    later = [folder for folder in _own_checkpoints(home) if (checkpoint_step(folder) or 0) > step]
    if later:
        say(f"made anew from step {step}, and removed now: {', '.join(folder.name for folder in later)}")
    for folder in later:
        _remove(folder)
    for file in (home / "metrics.jsonl", home / "samples.jsonl"):
        if file.is_file():
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(file, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step))


# --- What is in a checkpoint -----------------------------------------------------------------------------------------


@torch.no_grad()
def save_weights(folder: Path, module: Any, parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Save `module` in diffusers' format with `values` (float32) in place of `parameters`, which the CPU keeps meanwhile."""
    own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        copy_weights(values, parameters)
        module.save_pretrained(folder)
    finally:
        copy_weights(own, parameters)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a model's `save_pretrained` wrote, by name."""
    try:
        return load_file(folder / "diffusion_pytorch_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} cannot be read ({reason_of(error)[:200]})") from None


def load_weights(folder: Path, module: Any) -> None:
    """Load the weights that a model's `save_pretrained` wrote into `module`."""
    try:
        module.load_state_dict(read_weights(folder))
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit this model ({reason_of(error)[:200]})") from None


@torch.no_grad()
def copy_weights(values: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    """Copy each tensor of `values` into the tensor at the same position of `parameters`."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def save_optimizer(folder: Path, optimizer: Any) -> dict[str, Any]:
    """Write an optimiser's tensors to `optimizer.safetensors`, and return its other state as JSON data."""
    tensors, numbers = flatten_optimizer(optimizer.state_dict())
    save_file(tensors, folder / "optimizer.safetensors")
    return numbers


def load_optimizer(folder: Path, optimizer: Any, numbers: dict[str, Any]) -> None:
    """Load an optimiser's state from `optimizer.safetensors` and the JSON data that `save_optimizer` returned."""
    optimizer.load_state_dict(restore_optimizer(load_file(folder / "optimizer.safetensors"), numbers))
    # Saved tensors are contiguous, but fused kernels need moments in the weights' memory layout.
    for (
        parameter,
        values,
    ) in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an optimiser's state as (tensors by "parameter.name", JSON data)."""
    tensors, numbers = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def restore_optimizer(tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> dict[str, Any]:
    """Return the optimiser's state that `flatten_optimizer` split."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **data["numbers"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": data["param_groups"]}


def save_rng(path: Path) -> None:
    """Save this process's random states of torch (CPU and GPU), NumPy and Python.

    Layers such as dropout need these states. A sample's draws do not, because the draws are a function of (seed, step,
    sample).
    """
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "gauss": torch.tensor([cached, float("inf") if gauss is None else gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    save_file(states, path)


def load_rng(path: Path) -> None:
    """Restore the random states that `save_rng` saved."""
    states = load_file(path)
    numpy, python, (cached, gauss) = states["numpy"].tolist(), states["python"].tolist(), states["gauss"].tolist()
    torch.set_rng_state(states["torch"])
    np.random.set_state(("MT19937", np.array(numpy[:-2], np.uint32), numpy[-2], numpy[-1], cached))
    random.setstate((python[0], tuple(python[1:]), None if np.isinf(gauss) else gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
