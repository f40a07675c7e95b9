"""Checkpoints of the UNet's training: saved whole or not at all, safetensors and JSON alone.

`checkpoint-000500/` holds unet/, unet_ema/ (each as diffusers loads it), optimizer.safetensors and state.json.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from t2i.runs import UserError, checkpoint_folders, read_json, write_json, write_text


def save_checkpoint(
    run: Path,
    step: int,
    unet: Any,
    average: list[torch.Tensor] | None,
    optimizer: Any,
    state: dict[str, Any],
    limit: int | None,
) -> Path:
    """Write `checkpoint-<step>` beside its final place and rename it; then remove the oldest beyond `limit`.

    average: the moving averages of `unet.parameters()`, float32, or None. state: JSON data that resume needs.
    """
    folder = run / f"checkpoint-{step:06d}"
    part = run / f".{folder.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        unet.save_pretrained(part / "unet")
        if average is not None:
            raw = [parameter.detach().clone() for parameter in unet.parameters()]
            _copy(average, unet)
            unet.save_pretrained(part / "unet_ema")
            _copy(raw, unet)
        tensors, numbers = flatten_optimizer(optimizer.state_dict())
        save_file(tensors, part / "optimizer.safetensors")
        write_json(part / "state.json", {**state, "step": step, "optimizer": numbers})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be written ({error}); earlier checkpoints are whole, make room and start again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in checkpoint_folders(run)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return folder


def find_checkpoint(run: Path, name: str | None) -> Path | None:
    """The checkpoint to go on from: `latest`, a folder's name, or None for a new start."""
    if name is None:
        return None
    if name == "latest":
        found = checkpoint_folders(run)
        return found[-1] if found else None
    folder = run / name if Path(name).name == name else Path(name)
    if folder.resolve().parent != run.resolve() or not (folder / "state.json").is_file():
        known = ", ".join(path.name for path in checkpoint_folders(run)) or "none"
        raise UserError(f"resume_from_checkpoint {name} is not a checkpoint of {run}; there are: {known}")
    return folder


def forget_after(run: Path, step: int) -> None:
    """Remove checkpoints and logged metrics beyond `step`, which training is about to make anew."""
    for folder in checkpoint_folders(run):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        rows = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(metrics, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step))


def load_checkpoint(folder: Path, unet: Any, ema: Any, optimizer: Any) -> dict[str, Any]:
    """Put weights, moving average and optimiser state back, and return what `save_checkpoint` was given as `state`."""
    state = read_json(folder / "state.json")
    _load_weights(folder / "unet", unet)
    if ema is not None:
        raw = [parameter.detach().clone() for parameter in unet.parameters()]
        _load_weights(folder / "unet_ema", unet)
        ema.shadow_params = [parameter.detach().float().clone() for parameter in unet.parameters()]
        ema.optimization_step = state["step"]
        _copy(raw, unet)
    optimizer.load_state_dict(restore_optimizer(load_file(folder / "optimizer.safetensors"), state["optimizer"]))
    return state


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimiser's state as (tensors by "parameter.name", JSON data)."""
    tensors, numbers = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def restore_optimizer(tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **data["numbers"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": data["param_groups"]}


def _load_weights(folder: Path, unet: Any) -> None:
    unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))


@torch.no_grad()
def _copy(tensors: list[torch.Tensor], unet: Any) -> None:
    for parameter, tensor in zip(unet.parameters(), tensors, strict=True):
        parameter.copy_(tensor)
