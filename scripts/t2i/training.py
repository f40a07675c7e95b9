"""What both training scripts share beside mathematics, data and checkpoints: optimiser, schedule, length, identity."""

import dataclasses
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.optimization import get_scheduler

from t2i.config import DataConfig, TrainConfig
from t2i.runs import UserError, write_text

# settings that change neither what is learnt nor what comes out
_PASSING = {
    *("output_dir", "cache_dir", "dataset", "dataset_revision", "vae", "vae_revision", "text_encoder"),
    *("text_encoder_revision", "pretrained_model_name_or_path", "image_column", "caption_column", "caption_template"),
    *("label_names", "max_bad_share", "report_to", "experiment", "run_name", "logging_steps", "validation_steps"),
    *("validation_prompts", "guidance_scale", "num_inference_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("resume_from_checkpoint", "gradient_checkpointing", "compile", "channels_last"),
    *("push_to_hub", "hub_private_repo", "hub_deadline", "hub_model_id", "license", "gallery_pictures"),
}  # inputs are compared by the hashes of their contents


def identity(*sections: Any, **hashes: Any) -> dict[str, Any]:
    """What decides a run's result: the settings that matter, and the hashes of its inputs."""
    settings = {
        f"{type(section).__name__.removesuffix('Config')}.{key}": value
        for section in sections
        for key, value in dataclasses.asdict(section).items()
        if key not in _PASSING
    }
    return {**settings, **hashes}


def total_steps(config: TrainConfig, samples: int, world: int) -> int:
    """Weight updates of the run: `max_train_steps`, or what `num_train_epochs` over `samples` images mean."""
    batch = config.train_batch_size * config.gradient_accumulation_steps * world
    return config.max_train_steps or max(1, math.ceil(config.num_train_epochs * samples / batch))


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainConfig, steps: int
) -> tuple[torch.optim.AdamW, Any]:
    """AdamW and its learning-rate schedule, which counts weight updates."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,  # one pass over memory: on two CPU cores a seventh of the time of the default
    )
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
    )
    return optimizer, schedule


def dataset_name(config: DataConfig) -> str:
    """The data set's name for messages and cards, without the folders above it."""
    return str(config.dataset).rstrip("/").split("/")[-1]


def make_tracker(config: TrainConfig, folder: Path, settings: dict[str, Any], hashes: dict[str, str]) -> Any:
    """The run's MLflow tracker, with its parameters, input hashes and resolved settings; None for `report_to: none`."""
    if config.report_to == "none":
        return None
    from t2i.tracking import Tracker  # MLflow takes seconds to import

    public = without_paths(settings)
    name = config.run_name or folder.name
    tracker = Tracker(folder, experiment=config.experiment, run_name=name, config=public, tags=hashes)
    write_text(folder / "config.public.yaml", yaml.safe_dump(public, sort_keys=False))
    tracker.log_artifact(folder / "config.public.yaml")
    return tracker


def without_paths(settings: Any) -> Any:
    """Settings for other eyes: of an absolute path only its last part."""
    if isinstance(settings, dict):
        return {key: without_paths(value) for key, value in settings.items()}
    return Path(settings).name if isinstance(settings, str) and Path(settings).is_absolute() else settings


def require_finite(loss: float, step: int, learning_rate: float) -> None:
    """End the run with a sentence when the loss is not a number."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}; lower --learning_rate (it is {learning_rate}) or check the data"
        )


@contextmanager
def averaged(ema: Any, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within the block, the parameters are their moving average (if there is one)."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def code_revision() -> str:
    """The git commit of this code, with "+changes" where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(here.parent)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """The processor or GPU that training runs on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} CPU cores ({name})"
