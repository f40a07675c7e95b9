"""Weights, their average and the optimiser's state where DeepSpeed's ZeRO splits them over the processes.

Under ZeRO-2 each process keeps the float32 masters and Adam's moments of its share of the weights, as flat tensors; the
module itself holds all weights, in the precision of the launch. Without DeepSpeed the same functions answer for plain
parameters, so that the training loop has one form. "Collective" below: every process must call it, or all wait forever.
"""

import sys
from typing import Any

import torch

from t2i.errors import UserError

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of the engine
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of the dynamic loss scale; fp16 alone


def is_sharded(model: Any) -> bool:
    """Whether `model`, as prepared, is a DeepSpeed engine."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def effective(model: Any) -> dict[str, Any]:
    """What the engine goes by: clipping, batches, accumulation, learning rate, stage; nothing where there is no engine."""
    if not is_sharded(model):
        return {}
    return {
        "gradient_clipping": model.optimizer.clip_grad,
        "train_batch_size": model.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": model.gradient_accumulation_steps(),
        "global_batch": model.train_batch_size(),
        "learning_rate": model.optimizer.param_groups[0]["initial_lr"],
        "zero_stage": int(model.zero_optimization_stage()),
    }


def cast_inputs(model: Any) -> None:
    """Let the engine's module take float32 inputs: DeepSpeed casts the weights to bf16 and leaves the inputs as they are."""
    if is_sharded(model):
        model.module.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)


def fp32_weights(model: Any, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The float32 weights that this process's optimiser updates: `parameters`, or its flat shares of them under ZeRO.

    A moving average of these costs no communication. The tensors stay the same objects throughout training.
    """
    return list(model.optimizer.single_partition_of_fp32_groups) if is_sharded(model) else list(parameters)


def full_weights(model: Any, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """All weights in float32, in the order and shapes of `parameters`. Collective under ZeRO."""
    if not is_sharded(model):
        return [parameter.detach() for parameter in parameters]
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(parameter).detach() for parameter in parameters]


@torch.no_grad()
def set_weights(model: Any, module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put full float32 weights, by the names of `module`, into a ZeRO engine: masters and the module itself. Collective."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in module.named_parameters():
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
    model.optimizer.update_lp_params()


@torch.no_grad()
def full_average(model: Any, parameters: list[torch.nn.Parameter], ema: Any) -> list[torch.Tensor]:
    """The moving average of all weights in float32, in the order and shapes of `parameters`. Collective under ZeRO.

    ema: diffusers' `EMAModel` over `masters`. DeepSpeed gathers nothing but its masters: the average takes their place meanwhile.
    """
    if not is_sharded(model):
        return [tensor.detach() for tensor in ema.shadow_params]
    own = fp32_weights(model, parameters)
    ema.store(own)
    ema.copy_to(own)
    try:
        return full_weights(model, parameters)
    finally:
        ema.restore(own)


def with_weights(unet: Any, tensors: list[torch.Tensor]) -> Any:
    """A model of the same class and configuration as `unet`, in float32, whose weights are `tensors` (not copied)."""
    with torch.device("meta"):  # no memory, and no random numbers drawn
        copy = type(unet).from_config(unet.config)
    names = [name for name, _ in unet.named_parameters()]
    copy.load_state_dict(dict(zip(names, tensors, strict=True)), assign=True)
    return copy.requires_grad_(False)


def shard_state(model: Any, ema: Any) -> dict[str, torch.Tensor]:
    """What this process alone knows of a training under ZeRO, for safetensors: its shares of masters, moments and average,
    the loss scale, the counters.

    Before the first update there are no moments. Not collective.
    """
    tensors = {}
    for index, (master, moments) in enumerate(_shares(model)):
        tensors[f"master.{index}"] = master.detach()
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    for index, average in enumerate(ema.shadow_params if ema else ()):
        tensors[f"average.{index}"] = average
    numbers = {f"engine.{name}": getattr(model, name) for name in _COUNTERS}
    scaler = model.optimizer.loss_scaler
    numbers |= {f"scaler.{name}": getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}
    numbers |= {"world": model.world_size, "updates": ema.optimization_step if ema else 0}
    tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load_shard_state(model: Any, ema: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `shard_state` gave on the same process, and give all processes the new weights. Collective.

    Raises `UserError` where the number of processes, or the model, is another.
    """
    world = int(tensors["world"]) if "world" in tensors else 0
    if world != model.world_size:
        raise UserError(
            f"the checkpoint was saved by {world} processes under ZeRO, this launch has {model.world_size}; launch {world} processes"
        )
    for index, (master, moments) in enumerate(_shares(model)):
        saved = tensors[f"master.{index}"]
        if saved.shape != master.shape:
            raise UserError(f"the checkpoint holds {saved.numel()} weights a process, this model {master.numel()}")
        master.copy_(saved)
        prefix = f"optimizer.{index}."
        moments.update(
            {name.removeprefix(prefix): value.to(master.device).clone() for name, value in tensors.items() if name.startswith(prefix)}
        )  # fmt: skip
    for index, average in enumerate(ema.shadow_params if ema else ()):
        average.copy_(tensors[f"average.{index}"])
    if ema:
        ema.optimization_step = int(tensors["updates"])
    for name in _COUNTERS:
        setattr(model, name, int(tensors[f"engine.{name}"]))
    scaler = model.optimizer.loss_scaler
    for name in _SCALER:
        if hasattr(scaler, name) and f"scaler.{name}" in tensors:
            value = tensors[f"scaler.{name}"].item()
            setattr(scaler, name, value if name == "cur_scale" else int(value))
    model.optimizer.update_lp_params()  # half-precision weights from the masters, on every process


def _shares(model: Any) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(masters, the optimiser's state of them) of this process, a pair a group of parameters."""
    state = model.optimizer.optimizer.state
    return [(master, state[master]) for master in model.optimizer.single_partition_of_fp32_groups]
