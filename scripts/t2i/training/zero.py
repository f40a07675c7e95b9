"""Access weights, their average and the optimiser's state if DeepSpeed's ZeRO splits them over the processes.

Under ZeRO-2 each process keeps the float32 weights and Adam's moments of its share, as flat tensors. The module itself
holds all weights in the precision of the launch. Without DeepSpeed the same functions work on plain parameters, so that
the training loop has one form.

"Collective" means that every process must call the function. Otherwise all processes wait forever.
"""

import sys
from typing import Any

import torch

from t2i.errors import UserError

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # Counters of the engine.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # State of the dynamic loss scale in fp16.


def is_sharded(model: Any) -> bool:
    """Return whether `model`, as `accelerator.prepare` returned it, is a DeepSpeed engine."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def effective(model: Any) -> dict[str, Any]:
    """Return the engine's clipping, batches, accumulation, learning rate and stage, or {} without an engine."""
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
    """Let the engine's module accept float32 inputs. DeepSpeed casts the weights to bf16, but not the inputs."""
    if is_sharded(model):
        model.module.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)


def fp32_weights(model: Any, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return the float32 weights that this process's optimiser updates.

    These weights are `parameters` themselves, or this process's flat shares under ZeRO. A moving average of them needs
    no communication. The tensors stay the same objects throughout training.
    """
    return list(model.optimizer.single_partition_of_fp32_groups) if is_sharded(model) else list(parameters)


def full_weights(model: Any, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return all weights in float32, in the order and shapes of `parameters`. Collective under ZeRO."""
    if not is_sharded(model):
        return [parameter.detach() for parameter in parameters]
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(parameter).detach() for parameter in parameters]


@torch.no_grad()
def set_weights(model: Any, module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load full float32 weights, keyed by the names of `module`, into a ZeRO engine and its module. Collective."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in module.named_parameters():
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
    model.optimizer.update_lp_params()


@torch.no_grad()
def full_average(model: Any, parameters: list[torch.nn.Parameter], ema: Any) -> list[torch.Tensor]:
    """Return the moving average of all weights in float32, in the order and shapes of `parameters`. Collective under ZeRO.

    DeepSpeed can gather only its float32 weights, so the average replaces them for the duration of the call.

    Args:
        ema: moving average of `fp32_weights`, diffusers' `EMAModel`.
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
    """Return a float32 model of `unet`'s class and configuration whose weights are `tensors`, without copying them."""
    with torch.device("meta"):  # This takes no memory and draws no random numbers.
        copy = type(unet).from_config(unet.config)
    names = [name for name, _ in unet.named_parameters()]
    copy.load_state_dict(dict(zip(names, tensors, strict=True)), assign=True)
    return copy.requires_grad_(False)


def shard_state(model: Any, ema: Any) -> dict[str, torch.Tensor]:
    """Return this process's state of a training under ZeRO, as tensors for safetensors. Not collective.

    The state holds this process's shares of float32 weights, moments and average, the loss scale and the counters.
    There are no moments before the first update.
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
    """Restore the state that `shard_state` returned on the same process, and give all processes the new weights. Collective.

    Raises:
        UserError: the checkpoint is from another number of processes or another model.
    """
    world = int(tensors["world"]) if "world" in tensors else 0
    if world != model.world_size:
        raise UserError(
            f"the checkpoint was saved by {world} processes under ZeRO, this launch has {model.world_size}; launch {world} processes"
        )
    for index, (master, moments) in enumerate(_shares(model)):
        saved = tensors[f"master.{index}"]
        if saved.shape != master.shape:
            raise UserError(
                f"the checkpoint holds {saved.numel()} weights per process, but this model holds {master.numel()}; "
                "resume with the checkpoint's model, or give another --output_dir"
            )
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
    model.optimizer.update_lp_params()  # This copies the float32 weights to the half-precision ones on every process.


def _shares(model: Any) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Return this process's pairs of (float32 weights, their optimiser state), one pair per parameter group."""
    state = model.optimizer.optimizer.state
    return [(master, state[master]) for master in model.optimizer.single_partition_of_fp32_groups]
