"""Functions that both training scripts share, from data checks and weight updates to checkpoints and trackers."""

import dataclasses
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from t2i.config import DataConfig, DistillConfig, TrainConfig, TrainUnetConfig, check_report_to
from t2i.data import preparing
from t2i.errors import UserError
from t2i.files import append_jsonl, read_json, write_json, write_text
from t2i.redaction import public_yaml, without_paths
from t2i.runs import FREE_OF_TRAINING, RunFolder, checkpoint_step, own_checkpoint
from t2i.training import checkpoints, zero
from t2i.training.distributed import broadcast_from_main
from t2i.training.muon import Muon
from t2i.training.stopping import EXIT_STOPPED


@dataclasses.dataclass
class TrainState:
    """State updated by a training step."""

    name: str  # Name of the module in a checkpoint: unet or vae.
    module: Any  # The diffusers model.
    model: Any  # The model as `accelerator.prepare` returned it.
    parameters: list[torch.nn.Parameter]  # The trained parameters.
    optimizer: Any
    schedule: Any
    ema: Any  # The moving average of the weights, or None.
    discriminator: Any = None  # The `Discriminator` that the autoencoder is trained against, or None.
    # Number of skipped updates by reason.
    skipped: dict[str, int] = dataclasses.field(default_factory=lambda: {"overflow": 0, "nonfinite": 0})


class Average(EMAModel):
    """diffusers' moving average, updated in one pass over memory. All its weights must be trained.

    The update of diffusers copies all weights first. For 148 M weights on two CPU cores, the copy takes a quarter of a
    second, ten times as long as the update here.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1.0 - self.cur_decay_value)


# These settings are not compared themselves. Inputs are compared by the hashes of their contents.
_PASSING = {
    *FREE_OF_TRAINING,
    *(
        "dataset",
        "dataset_revision",
        "dataset_config_name",
        "vae",
        "vae_revision",
        "text_encoder",
        "text_encoder_revision",
    ),
    *("pretrained_model_name_or_path", "revision", "variant"),
    *("image_column", "caption_column", "caption_template", "caption_prefix", "label_names"),
    "scale_lr",  # The resulting learning rate is compared instead.
    "model",  # The hash of its weights is compared.
    "perceptual_network",  # Its hash is compared if the network is used.
    "alignment_network",  # Its hash is compared if the network is used.
    *("train_batch_size", "gradient_accumulation_steps"),  # The global batch is compared instead.
}
# Settings added later. Runs made before them behaved as these values say.
_LATER = {
    "random_crops": 0,
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "decoder_only_steps": 0,
    "crop_steps": None,
    "perceptual_weight": 0.0,
    "adversarial_weight": 0.0,
    "adversarial_start": 0,
    "discriminator_learning_rate": 2e-4,
    "equivariance_share": 0.0,
    "equivariance_start": 0,
    "alignment_weight": 0.0,
    "guide_step": None,
    "decoder_steps": 0,
    "decoder_learning_rate": 5e-3,
    "optimizer": "adamw",
    "addition_embed_type": None,
    "resnet_time_scale_shift": "default",
}

# Layers at the edges of a UNet or VAE, and the embeddings of time and pooled text, which Muon leaves to AdamW.
EDGES = ("conv_in", "conv_out", "quant_conv", "time_emb", "add_embedding")

NO_OVERFLOW = "--mixed_precision bf16 (Ampere GPUs and later) or no"  # Precisions with the range of float32.
LEAST_SHARE = 0.01  # Share of the peak learning rate below which further updates teach nothing.


def identity(*sections: Any, **hashes: Any) -> dict[str, Any]:
    """Return everything that decides a run's result: its effective settings and the hashes of its inputs."""
    settings = {
        f"{type(section).__name__.removesuffix('Config')}.{key}": value
        for section in sections
        for key, value in dataclasses.asdict(section).items()
        if key not in _PASSING and not (key in _LATER and value == _LATER[key])
    }
    return {**settings, **hashes}


def load_splits(config: DataConfig, accelerator: Any, *, captions: bool = True) -> Any:
    """Return the prepared splits of the data set.

    Raises:
        UserError: no image is left for validation.
    """
    splits = preparing.load_splits(config, say=accelerator.print, captions=captions)
    if splits.validation is None:
        raise UserError(f"{config.dataset} is too small: no image is left for validation; give more than one image")
    return splits


def global_batch(config: TrainConfig, world: int) -> int:
    """Return the number of samples per weight update over all `world` processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * world


def total_steps(config: TrainConfig, samples: int, world: int) -> int:
    """Return the number of weight updates of the run.

    If `max_train_steps` is None, these are the updates that `num_train_epochs` passes over `samples` images take. If
    `validation_epochs` is set, this function converts it to updates and stores them in `validation_steps`.
    """
    per_epoch = samples / global_batch(config, world)
    if isinstance(config, TrainUnetConfig) and config.validation_epochs:
        config.validation_steps = max(1, math.ceil(config.validation_epochs * per_epoch))
        config.validation_epochs = None  # The resolved settings hold only one of the two.
    return config.max_train_steps or max(1, math.ceil(config.num_train_epochs * per_epoch))


def warn_of_warmup(
    config: TrainConfig, steps: int, say: Callable[[str], None], extensions: Sequence[dict[str, Any]] = ()
) -> None:
    """Warn if a training of `steps` updates, or its last extension, ends before the warm-up of the learning rate."""
    last = extensions[-1] if extensions else {}
    if last.get("lr_on_extend") == "constant":
        return
    if last.get("lr_on_extend") == "restart":
        steps -= last["at_step"]
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= steps:
        say(
            f"WARNING: lr_warmup_steps {config.lr_warmup_steps} is not shorter than the training of {steps} updates: the learning "
            f"rate ends at {steps / config.lr_warmup_steps:.1%} of {config.learning_rate:g}; try --lr_warmup_steps {steps // 10}"
        )


def rate_share(config: TrainConfig, steps: int, extensions: Sequence[dict[str, Any]], updates: int) -> float:
    """Return the learning rate after `updates` weight updates as a share of its peak.

    Args:
        config: settings of the training, of which the schedule, its peak and the warm-up are used.
        steps: length of the training in weight updates.
        extensions: extensions of the run, as `extend` returns them. The last one decides from its own `at_update` on.
        updates: number of weight updates made, without skipped ones.
    """
    curve = partial(_schedule_curve, config.lr_scheduler, config.learning_rate, config.lr_warmup_steps)
    if not extensions:
        return curve(steps)(updates)
    *earlier, last = extensions
    at, way = last["at_update"], last["lr_on_extend"]
    if updates < at or way == "constant":
        return rate_share(config, last["from_steps"], earlier, min(updates, at))
    return curve(last["to_steps"] - last["at_step"])(updates - at) if way == "restart" else curve(steps)(updates)


@cache
def _schedule_curve(name: str, learning_rate: float, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Return one of diffusers' schedules: a function from updates made to a share of the peak."""
    if name == "polynomial" and warmup_steps == steps:
        steps += 1  # diffusers would divide by zero after the last update.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    return schedule.lr_lambdas[0]


def build_optimizer(
    model: torch.nn.Module, config: TrainConfig, steps: int, extensions: Sequence[dict[str, Any]] = ()
) -> tuple[torch.optim.Optimizer, Any]:
    """Return the optimiser of a model's trained weights, and its learning-rate schedule.

    The schedule counts weight updates and follows `rate_share`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adamw: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    optimizer: torch.optim.Optimizer
    if config.optimizer == "muon":
        optimizer = Muon(trained, EDGES, **adamw)
    else:
        # Fused AdamW is one pass over memory. On two CPU cores it takes a seventh of the default's time.
        optimizer = torch.optim.AdamW([parameter for _, parameter in trained], **adamw, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_share, config, steps, extensions))


def place_model(model: Any, config: TrainConfig, accelerator: Any) -> None:
    """Move the model to the device in the recipe's memory format, and prepare it for training."""
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(accelerator.device).train()


def gather(train_state: TrainState) -> tuple[Any, Any]:
    """Return all weights and their average in float32, in the parameters' order, if ZeRO has split them.

    Without ZeRO, return (None, None). Every process must call it before any of them writes a file.
    """
    if not zero.is_sharded(train_state.model):
        return None, None
    weights = zero.full_weights(train_state.model, train_state.parameters)
    return weights, zero.full_average(
        train_state.model, train_state.parameters, train_state.ema
    ) if train_state.ema else None


def save_state(
    part: Path, train_state: TrainState, gathered: tuple[Any, Any], state: dict[str, Any], accelerator: Any
) -> None:
    """Write this process's files of a checkpoint.

    Every process writes its random states and, under ZeRO, its share of the training state. The first process of each
    node also writes the weights and their average (portable, float32), the optimiser and the state.
    """
    checkpoints.save_rng(part / f"rng-{accelerator.process_index}.safetensors")
    sharded, average = zero.is_sharded(train_state.model), part / f"{train_state.name}_ema"
    if sharded:
        save_file(zero.shard_state(train_state.model, train_state.ema), shard_file(part, accelerator))
    if not accelerator.is_local_main_process:  # Each node resumes from its own files.
        return
    counters: dict[str, Any] = {
        "processes": accelerator.num_processes,
        "sharded": sharded,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "schedule": train_state.schedule.last_epoch,
        "ema": train_state.ema.optimization_step if train_state.ema else None,
        "skipped": train_state.skipped,
    }
    if sharded:
        zero.with_weights(train_state.module, gathered[0]).save_pretrained(part / train_state.name)
        if train_state.ema:
            zero.with_weights(train_state.module, gathered[1]).save_pretrained(average)
    else:
        train_state.module.save_pretrained(part / train_state.name)
        if train_state.ema:
            checkpoints.save_weights(average, train_state.module, train_state.parameters, train_state.ema.shadow_params)
        counters["optimizer"] = checkpoints.save_optimizer(part, train_state.optimizer)
    if train_state.discriminator:
        counters["discriminator"] = train_state.discriminator.save(part / "discriminator")
    write_json(part / "state.json", {**state, **counters})


def shard_file(folder: Path, accelerator: Any) -> Path:
    """Return the path of the file that holds this process's share of a checkpoint under ZeRO."""
    return folder / f"zero-rank{accelerator.process_index}.safetensors"


def load_state(checkpoint: Path, train_state: TrainState, accelerator: Any) -> dict[str, Any]:
    """Restore the training state of `checkpoint` and return its `state.json`. Every process must call this function.

    If the number of processes or nodes changes, or ZeRO is switched on or off, weights and average are read from the
    portable files. A printed message then names the state that is reset.
    """
    state = read_json(checkpoint / "state.json")
    sharded = zero.is_sharded(train_state.model)
    # A checkpoint of another number of nodes lacks files of this node's processes.
    earlier = (state["processes"], read_json(checkpoint / checkpoints.MANIFEST)["nodes"], state["sharded"])
    launch = (accelerator.num_processes, checkpoints.Node(accelerator).count, sharded)
    alike = launch == earlier
    if sharded and alike:
        zero.load_shard_state(train_state.model, train_state.ema, load_file(shard_file(checkpoint, accelerator)))
    else:
        load_portable(checkpoint, train_state)
    if train_state.ema:
        train_state.ema.optimization_step = state["ema"]
    keeps_moments = (sharded and alike) or not (sharded or state["sharded"])
    if keeps_moments and not sharded:
        checkpoints.load_optimizer(checkpoint, train_state.optimizer, state["optimizer"])
    if train_state.discriminator:
        train_state.discriminator.load(checkpoint / "discriminator", state["discriminator"])
    train_state.schedule.last_epoch = state["schedule"] - 1
    train_state.schedule.step()
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    train_state.skipped.update(state["skipped"])
    if alike:
        checkpoints.load_rng(checkpoint / f"rng-{accelerator.process_index}.safetensors")
        accelerator.print(f"resuming from {checkpoint}")
        return state
    before, now = (
        f"{processes} process(es){f' of {nodes} nodes' if nodes > 1 else ''}{' under ZeRO' if split else ''}"
        for processes, nodes, split in (earlier, launch)
    )
    lost = "random states of layers" if keeps_moments else "the optimiser's moments and random states of layers"
    accelerator.print(
        f"resuming from {checkpoint} on {now} instead of {before}: weights, average, schedule and the order of samples are kept; "
        f"{lost} start anew"
    )
    return state


def load_portable(checkpoint: Path, train_state: TrainState) -> None:
    """Load weights and average from the portable files, which any launch can read. Every process must call this function."""
    weights = zero.fp32_weights(train_state.model, train_state.parameters)
    for name in ([f"{train_state.name}_ema"] if train_state.ema else []) + [train_state.name]:
        if zero.is_sharded(train_state.model):
            zero.set_weights(train_state.model, train_state.module, checkpoints.read_weights(checkpoint / name))
        else:
            checkpoints.load_weights(checkpoint / name, train_state.module)
        if name != train_state.name:
            train_state.ema.shadow_params = [weight.detach().float().clone() for weight in weights]


def is_done(run: RunFolder, config: TrainConfig, accelerator: Any) -> bool:
    """Return whether the run has finished. Every process gets the same answer.

    Raises:
        UserError: the run has finished, but `resume_from_checkpoint` names an earlier checkpoint.
    """
    if not broadcast_from_main(run.finished, accelerator):
        return False
    name, steps = config.resume_from_checkpoint, broadcast_from_main(run.state.get("steps"), accelerator)
    if name in (None, "latest") or went_back(run, config, accelerator):
        return True
    if checkpoint_step(own_checkpoint(run.folder, name)) != steps:
        raise UserError(
            f"the run in {run.folder} has finished, so it is not resumed from {name}; leave out --resume_from_checkpoint to "
            "reuse it, or give another --output_dir"
        )
    return True


def went_back(run: RunFolder, config: TrainConfig, accelerator: Any) -> bool:
    """Return whether the run has resumed from the named checkpoint already. Every process must call this function.

    The same command then resumes from the newest checkpoint. It may be a job that repeats itself. With another length it
    goes back again.
    """
    return bool(broadcast_from_main(run.state.get("went_back") == _way_back(run, config), accelerator))


def _way_back(run: RunFolder, config: TrainConfig) -> dict[str, Any]:
    name = Path(config.resume_from_checkpoint or "").name
    return {"checkpoint": name, "steps": run.state["identity"].get("steps")}


def extend(run: RunFolder, config: TrainConfig, steps: int, accelerator: Any) -> list[dict[str, Any]]:
    """Add an extension to `run` if the run in its folder is shorter than `steps` updates. Every process must call this function.

    `RunFolder.start` saves the extension together with the new length, so that a kill cannot separate the two.

    Returns:
        All extensions of the run, the oldest first: lengths before and after, step and counted updates of the checkpoint that
        was resumed, `lr_on_extend`, and the time.

    Raises:
        UserError: no checkpoint of the run is left, or `lr_on_extend` constant would hold a learning rate of 0.
    """
    shorter, status, extensions = broadcast_from_main(
        (run.shorter, run.state["status"], run.state.get("extensions", [])), accelerator
    )
    if shorter is None:
        kept = extensions[-1]["lr_on_extend"] if extensions else config.lr_on_extend
        if kept != config.lr_on_extend:
            accelerator.print(f"the extension to {steps} updates keeps lr_on_extend {kept}, with which it began")
            config.lr_on_extend = kept
        return list(extensions)
    checkpoint = checkpoints.find_checkpoint(run.folder, config.resume_from_checkpoint, checkpoints.Node(accelerator))
    if checkpoint is None and status == "finished":
        option = "--pretrained_model_name_or_path" if isinstance(config, TrainUnetConfig) else "--vae"
        further = f"to train its weights further, give {option} {run.folder} and another --output_dir"
        raise UserError(
            f"{run.folder} keeps no checkpoint from which its {shorter} updates could be extended to {steps}; "
            + ("give another --output_dir" if isinstance(config, DistillConfig) else further)
        )
    if checkpoint is None:  # The run was stopped before its first checkpoint, so it begins with the new length.
        run.state.pop("extensions", None)
        return []
    saved = read_json(checkpoint / "state.json")
    extension = {
        "from_steps": shorter, "to_steps": steps, "at_step": saved["step"], "at_update": saved["schedule"],
        "lr_on_extend": config.lr_on_extend, "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    run.state["extensions"] = extensions = [*extensions, extension]
    share = rate_share(config, steps, extensions, saved["schedule"])
    if config.lr_on_extend == "constant" and share < LEAST_SHARE:
        raise UserError(
            f"the {config.lr_scheduler} schedule stands at {share:.2g} of its peak in {checkpoint}, which --lr_on_extend constant "
            "would hold; give --lr_on_extend stretch or restart"
        )
    accelerator.print(
        f"the run is extended from {shorter} to {steps} updates at {checkpoint.name}, with lr_on_extend {config.lr_on_extend}"
    )
    return extensions


def resume(
    run: RunFolder, train_state: TrainState, config: TrainConfig, accelerator: Any
) -> tuple[dict[str, Any], checkpoints.Node]:
    """Resume from the requested checkpoint, if there is one, and save once as a rehearsal.

    A checkpoint that is named again, with the same length, was left behind already. The newest one is then resumed. The
    rehearsal finds a full or read-only disk before training starts. Every process must call this function.

    Returns:
        The checkpoint's state and this process's node. A new training has `step` 0.
    """
    node, name = checkpoints.Node(accelerator), config.resume_from_checkpoint
    is_named, checkpoint = name not in (None, "latest"), None
    if is_named and went_back(run, config, accelerator):
        accelerator.print(
            f"the run went back to {name} before, so it resumes from its newest checkpoint; to go back once more, delete the "
            "later ones"
        )
        checkpoint = checkpoints.find_checkpoint(run.folder, "latest", node)
    checkpoint = checkpoint or checkpoints.find_checkpoint(run.folder, name, node)
    state = load_state(checkpoint, train_state, accelerator) if checkpoint else {"step": 0}
    accelerator.wait_for_everyone()
    if node.first:
        # -1: a measurement before step 1, too
        checkpoints.forget_after(run.folder, state["step"] if checkpoint else -1, node)
    others = train_state.discriminator.parameters if train_state.discriminator else []
    moments = 0 if checkpoint else 8 * sum(parameter.numel() for parameter in [*train_state.parameters, *others])
    gathered = gather(train_state)
    checkpoints.rehearse(
        run.folder, lambda part: save_state(part, train_state, gathered, {"step": 0}, accelerator), node, moments
    )
    if is_named and accelerator.is_main_process:  # All nodes have removed their later checkpoints.
        run.save(went_back=_way_back(run, config))
    return state, node


def save(
    run: Path,
    train_state: TrainState,
    config: TrainConfig,
    state: dict[str, Any],
    node: checkpoints.Node,
    accelerator: Any,
) -> None:
    """Save a checkpoint of `state["step"]`. Every process must call this function."""
    gathered = gather(train_state)

    def write(part: Path) -> None:
        save_state(part, train_state, gathered, state, accelerator)

    checkpoints.save_checkpoint(run, state["step"], write, node, config.checkpoints_total_limit)


def exit_stopped(run: RunFolder, tracker: Any, done: int, steps: int, accelerator: Any) -> None:
    """End the process with exit code `EXIT_STOPPED` after a signal. The checkpoint is saved already."""
    if accelerator.is_main_process:
        run.save(status="stopped")
        if tracker:
            tracker.finish("KILLED")
        print(f"stopped after step {done} of {steps}; the same command resumes from there")
    raise SystemExit(EXIT_STOPPED)


def add_terms(
    total: dict[str, torch.Tensor], terms: dict[str, torch.Tensor], micro_batches: int
) -> dict[str, torch.Tensor]:
    """Return `total` plus this micro-batch's share of the mean loss terms.

    The result is a new tensor, because a CUDA graph may overwrite `terms` afterwards.
    """
    return {name: total.get(name, 0) + value / micro_batches for name, value in terms.items()}


def mean_terms(terms: dict[str, torch.Tensor], accelerator: Any) -> dict[str, float]:
    """Return the mean of each loss term over the processes. Every process must call this function."""
    return {name: accelerator.reduce(value.detach(), reduction="mean").item() for name, value in terms.items()}


def clip_gradients(train_state: TrainState, config: TrainConfig, accelerator: Any) -> float:
    """Clip the gradients in place and return their norm before clipping, which is the same on every process."""
    return float(accelerator.clip_grad_norm_(train_state.parameters, config.max_grad_norm))


def step_optimizer(
    train_state: TrainState,
    config: TrainConfig,
    step: int,
    norm: float,
    loss: torch.Tensor,
    sample_ids: Callable[[], list[str]],
    accelerator: Any,
) -> None:
    """Update weights, schedule and moving average from the clipped gradients. Every process must call this function.

    The update is skipped if the loss or its gradient is non-finite. Schedule and average then stay unchanged.
    An overflow of fp16's scaled gradients under a finite loss is counted, and lowers the loss scale.

    Args:
        norm: norm of the gradients, from `clip_gradients`.
        loss: loss of this process, a scalar.
        sample_ids: function that returns the ids of this process's samples.

    Raises:
        UserError: more than `max_nonfinite_steps` updates had a non-finite loss or gradient, whose samples the message
            names; or the gradients overflow in fp16 although the loss is no longer scaled.
    """
    finite, scaled = math.isfinite(norm), accelerator.mixed_precision == "fp16"
    if finite or scaled:  # The loss scale of fp16 must see an overflow.
        train_state.optimizer.step()
    train_state.optimizer.zero_grad()
    # Fused AdamW skips an overflowed update by itself, and accelerate does not notice. DeepSpeed has skipped it already.
    if finite and not accelerator.optimizer_step_was_skipped:
        train_state.schedule.step()
        if train_state.ema:
            train_state.ema.step(zero.fp32_weights(train_state.model, train_state.parameters))
    elif scaled and not accelerator.reduce((~torch.isfinite(loss)).float(), reduction="sum") > 0:
        train_state.skipped["overflow"] += 1
        # The scale begins at 65536, and each overflow halves it. DeepSpeed has its own limit.
        if accelerator.scaler and accelerator.scaler.get_scale() < 1:
            raise UserError(
                f"the gradients overflow in fp16 at step {step + 1}, although the loss is scaled down already; lower --learning_rate "
                f"(now {config.learning_rate}), or launch with {NO_OVERFLOW}"
            )
    else:
        train_state.skipped["nonfinite"] += 1
        message = (
            f"the loss ({loss.item():.4g}) or its gradient is non-finite at step {step + 1}, with the training samples "
            f"{', '.join(sample_ids())} on process {accelerator.process_index}"
        )
        if train_state.skipped["nonfinite"] > config.max_nonfinite_steps:
            raise UserError(
                f"{message}; look at them, lower --learning_rate (now {config.learning_rate}), or raise --max_nonfinite_steps"
                + (f"; fp16 may have overflowed, so try {NO_OVERFLOW}" if scaled else "")
            )
        print(f"WARNING: {message}; the update is skipped", flush=True)


def record(row: dict[str, float], step: int, folder: Path, tracker: Any, is_main: bool) -> None:
    """Append a row of metrics to metrics.jsonl and send it to the tracker, without values that are not finite.

    If standard error is no terminal, the row is also printed. accelerate_configs/sagemaker_metrics.tsv reads these
    lines, so their form must not change.
    """
    row = {name: value for name, value in row.items() if math.isfinite(value)}
    if is_main:
        append_jsonl(folder / "metrics.jsonl", {"step": step, **row})
        if not sys.stderr.isatty():
            print(f"step {step}: " + " ".join(f"{name}={value:.6g}" for name, value in row.items()), flush=True)
    if tracker:
        tracker.log_metrics(row, step)


def progress_bar(name: str, start: int, steps: int, accelerator: Any) -> Any:
    """Return the training steps from `start` to `steps - 1`, shown as a progress bar by one process per node."""
    seconds = 1.0 if sys.stderr.isatty() else 60.0  # A terminal redraws its bar, but a log keeps each one as a line.
    return tqdm(
        range(start, steps),
        desc=name,
        unit="step",
        initial=start,
        total=steps,
        disable=not accelerator.is_local_main_process,
        mininterval=seconds,
    )


def check_tracker(config: TrainConfig, cache_dir: str = "", say: Callable[[str], None] = print) -> None:
    """Print where caches and curves are stored, and check the tracker before the data set is prepared.

    Caches and curves are stored below the working directory unless an option or variable says otherwise.

    Raises:
        UserError: MLflow cannot use the address, or the tracker is not installed.
    """
    if cache_dir:
        say(f"caches: {Path(cache_dir).expanduser().absolute()} (--cache_dir)")
    if config.report_to == "none":
        return
    from t2i.redaction import redact
    from t2i.tracking.addresses import database_file, resolve_uri

    uri = resolve_uri(None)
    if cache_dir:
        say(f"curves: {database_file(uri) or redact(uri)} (MLFLOW_TRACKING_URI)")
    check_report_to(config.report_to)


class BesideMlflow:
    """A run's MLflow tracker, combined with a tracker of accelerate that gets the same numbers and pictures."""

    def __init__(self, mlflow: Any, other: Any):
        self._mlflow, self._other = mlflow, other
        self.view, self.log_artifact = mlflow.view, mlflow.log_artifact

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(metrics, step)
        self._other.log(metrics, step=step)

    def log_image(self, image: Any, name: str, step: int) -> None:
        self._mlflow.log_image(image, name, step)
        kinds: dict[str, Any] = {"dataformats": "NHWC"} if self._other.name == "tensorboard" else {}
        pictures = np.asarray(image)[None]  # W&B gets a list of arrays instead.
        self._other.log_images({name: pictures if kinds else list(pictures)}, step=step, **kinds)

    def finish(self, status: str = "FINISHED") -> None:
        self._mlflow.finish(status)
        self._other.finish()


def make_tracker(
    config: TrainConfig, folder: Path, settings: dict[str, Any], hashes: dict[str, str], accelerator: Any
) -> Any:
    """Start the run's trackers with its parameters, input hashes and resolved settings.

    Return None for `report_to: none`, and on every process but the main one.
    """
    if config.report_to == "none" or not accelerator.is_main_process:
        return None
    from t2i.tracking.mlflow_tracker import Tracker  # MLflow takes seconds to import.

    shown = without_paths(settings)
    name = config.run_name or folder.name
    tracker = Tracker(folder, experiment=config.experiment, run_name=name, config=shown, tags=hashes)
    write_text(folder / "config.public.yaml", public_yaml(shown))
    tracker.log_artifact(folder / "config.public.yaml")
    return tracker if config.report_to == "mlflow" else BesideMlflow(tracker, start_tracker(config, folder))


def finish_tracker(tracker: Any, run: RunFolder) -> None:
    """Log the finished run's `run.json`, which holds the hashes of inputs and outputs, and end the tracker.

    Do nothing if `tracker` is None.
    """
    if tracker:
        tracker.log_artifact(run.file)
        tracker.finish()


def start_tracker(config: TrainConfig, folder: Path) -> Any:
    """Start and return the tracker of accelerate that `report_to` names."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    name = config.run_name or folder.name
    if config.report_to == "tensorboard":
        tracker = LOGGER_TYPE_TO_CLASS["tensorboard"](
            run_name=config.experiment, logging_dir=folder / config.logging_dir
        )
    else:
        tracker = LOGGER_TYPE_TO_CLASS["wandb"](run_name=config.experiment, name=name, dir=str(folder))
    tracker.start()
    return tracker


def require_finite(loss: float, step: int, learning_rate: float) -> None:
    """Raise `UserError` if the loss is non-finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}; lower --learning_rate (it is {learning_rate}) or check the data"
        )


@contextmanager
def averaged(train_state: TrainState) -> Iterator[Any]:
    """Yield the module with the moving average as its weights, if there is an average. Restore the weights afterwards.

    Under ZeRO every process must enter the block. Each then gets a separate float32 model, and the engine's weights do
    not change.
    """
    if zero.is_sharded(train_state.model):
        model, parameters, ema = train_state.model, train_state.parameters, train_state.ema
        tensors = zero.full_average(model, parameters, ema) if ema else zero.full_weights(model, parameters)
        yield zero.with_weights(train_state.module, tensors)
        return
    if train_state.ema is None:
        yield train_state.module
        return
    train_state.ema.store(train_state.parameters)
    train_state.ema.copy_to(train_state.parameters)
    try:
        yield train_state.module
    finally:
        train_state.ema.restore(train_state.parameters)


def machine(accelerator: Any) -> str:
    """Return the name of the processor or GPUs that training runs on."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    if accelerator.device.type == "mps":
        return "Apple GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} CPU cores ({name})"
