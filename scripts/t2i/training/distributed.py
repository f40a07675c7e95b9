"""Set up a launch: the environment for `Accelerator`, and DeepSpeed's settings for `prepare`."""

import ctypes
import importlib
import importlib.util
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from t2i.command_line import option
from t2i.config import DistillConfig, TrainConfig, TrainUnetConfig, check_optimizer
from t2i.errors import UserError
from t2i.machine import find_launcher
from t2i.tracking import mlflow_client

PRECISIONS = ("no", "bf16", "fp16")  # The suite trains in these precisions.
# Number of gradients reduced at once: 100 MB in fp16. DeepSpeed's default takes 1 GB of a 16 GB card.
REDUCE_BUCKET = 50_000_000
NO_FP16 = (
    "mixed_precision fp16 needs a GPU, and this run computes on the CPU; launch with --mixed_precision bf16 or "
    "--mixed_precision no (plain python: the environment variable ACCELERATE_MIXED_PRECISION)"
)


def quiet_libraries() -> None:
    """Hide libraries' notes that no user can act on. Warnings about real trouble stay visible."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # This hides a note about image processors without torchvision.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    mlflow_client.set_variables()
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    if not torch.accelerator.is_available():
        # Otherwise DeepSpeed, which saving a model imports, warns on each terminal that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Loading a model takes a second at most and needs no progress bar.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # accelerate's wrapper hides the optimiser's step from the schedule.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")


def make_accelerator(config: TrainConfig | None = None) -> Any:
    """Return the script's `Accelerator`. Processes and precision come from the launcher, the rest from the recipe.

    Args:
        config: settings of a training. With None, the script's processes do not train but work on separate shares, and
            may wait a week for each other.

    Raises:
        UserError: the launch does not fit the machine, the precision or the number of processes.
    """
    quiet_libraries()
    prepare_launch(config)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    # In a training, the others wait while the first process measures, draws or writes. NCCL's own limit is 10 minutes.
    wait = timedelta(days=7) if config is None else timedelta(hours=1)
    kinds: dict[str, Any] = {"kwargs_handlers": [InitProcessGroupKwargs(timeout=wait)]}
    if config is not None:
        kinds |= {
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "step_scheduler_with_optimizer": False,
        }
    try:
        accelerator = Accelerator(**kinds)
    except ValueError as error:  # The device lacks the precision, for example.
        reason = " ".join(str(error).split())
        raise UserError(f"the launch does not fit this machine ({reason}); take accelerate_configs/cpu.yaml") from None
    in_fp16 = accelerator.device.type != "cpu" or (accelerator.deepspeed_plugin and _processor_has_fp16())
    if accelerator.mixed_precision == "fp16" and not in_fp16:
        raise UserError(NO_FP16)  # accelerate 1.15 would compute in float32 and report fp16.
    warn_of_slow_bf16(accelerator)
    if config is None:
        return accelerator
    # run_sagemaker_job.py sets this variable to the number of GPUs of all machines.
    wanted = int(os.environ.get("T2I_WORLD_SIZE", accelerator.num_processes))
    if wanted != accelerator.num_processes:
        raise UserError(
            f"this training has {accelerator.num_processes} processes instead of {wanted}: the machines would train apart; look at "
            "the accelerate YAML named by --inside"
        )
    # The launcher's number took precedence above.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    scale_learning_rate(config, accelerator)
    if accelerator.deepspeed_plugin:
        write_deepspeed_config(accelerator.deepspeed_plugin.deepspeed_config, config, accelerator.num_processes)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(config.seed)
    return accelerator


def warn_of_slow_bf16(accelerator: Any) -> None:
    """Warn if the launch asks for bf16 and the GPU is older than Ampere, so that it only emulates bf16."""
    import torch

    in_bf16 = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
    if in_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        accelerator.print(
            f"WARNING: {torch.cuda.get_device_name()} has no bf16 units, so mixed_precision bf16 is slow there; launch with "
            "--mixed_precision fp16"
        )


def scale_learning_rate(config: TrainConfig, accelerator: Any) -> None:
    """Multiply the learning rate in `config` by the images per update if `scale_lr` is set, as diffusers' scripts do."""
    if config.scale_lr:
        images = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        config.learning_rate *= images
        config.scale_lr = False  # The resolved settings hold the product, so it must not be scaled again.
        accelerator.print(
            f"--scale_lr: the peak learning rate is {config.learning_rate:g}, for {images} images per update"
        )


def choose_precision(config: TrainConfig | None) -> None:
    """Apply the script's `--mixed_precision` if the launch sets no precision.

    accelerate's launcher sets "no" if nobody asked for a precision. A "no" is therefore binding only if it was typed.

    Raises:
        UserError: the launch and the option differ.
    """
    wanted, launched = config.mixed_precision if config else None, os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wanted is None or wanted == launched:
        return
    launcher = find_launcher()
    words = launcher.cmdline() if launcher else []
    typed = option(words[: next((at for at, word in enumerate(words) if word.endswith(Path(sys.argv[0]).name)), 0)],
                   "mixed_precision")  # fmt: skip
    if launched not in (None, "", "no") or typed == "no":
        raise UserError(
            f"the launch sets mixed_precision {launched}, and the script's option --mixed_precision {wanted}; give both the same, "
            "or leave the script's out"
        )
    os.environ["ACCELERATE_MIXED_PRECISION"] = wanted
    if os.environ.get("RANK", "0") == "0":
        print(f"mixed_precision {wanted}, by the script's option: the launch set none")


def keep_freed_memory(accelerator: Any) -> None:
    """Let glibc reuse the memory that a training step frees for the next step, if training runs on a CPU.

    By default glibc returns large blocks to the system and receives them again page by page, each zeroed. Returning and
    receiving takes a twentieth of a step's time.
    """
    if sys.platform == "linux" and accelerator.device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # Other C libraries lack this function.
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: no block gets a separate mapping.
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: this is in bytes.


def give_back_memory() -> None:
    """Return free memory to the system at once, which `keep_freed_memory` otherwise prevents."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def broadcast_from_main(value: Any, accelerator: Any) -> Any:
    """Return the first process's `value` on every process. Other nodes may lack the file from which it was read."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def prepare_launch(config: TrainConfig | None) -> None:
    """Adapt the launch to the script and the machine.

    Without a GPU, the processes of a launcher are CPU processes. accelerate 1.15 takes each of them for a separate run
    unless the environment sets `ACCELERATE_USE_CPU`. accelerate's launcher for several processes does not set that variable.

    Only train_unet.py and distill_unet.py run under DeepSpeed. Other scripts have small models and run data parallel on
    the same processes.

    Raises:
        UserError: DeepSpeed is needed and not installed, the precision is unknown, the machine lacks it, or there are more
            processes than GPUs.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    choose_precision(config)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:  # accelerate would compute in float32 and report this word.
        raise UserError(
            f"mixed_precision {precision!r} is not supported; choose one of {', '.join(PRECISIONS)} in the launch's YAML, "
            "by --mixed_precision, or in ACCELERATE_MIXED_PRECISION"
        )
    on_cpu = not torch.cuda.is_available()
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    # NCCL would end with a traceback.
    if not on_cpu and local > gpus and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise UserError(
            f"the launch starts {local} processes on this machine, which has {gpus} GPU(s); launch with --num_processes {gpus}, or "
            f"set num_processes: {gpus} in the launch's YAML"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    if not isinstance(config, TrainUnetConfig | DistillConfig):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launch asks for DeepSpeed, which is not installed; run: pip install -r scripts/requirements.txt (Linux), or take "
            "accelerate_configs/multi_gpu.yaml or cpu.yaml"
        )
    # DeepSpeed makes these calls itself, and no user can change them.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*")
    if not on_cpu:
        return
    if precision == "fp16" and not _processor_has_fp16():
        raise UserError(NO_FP16)
    if "LOCAL_RANK" in os.environ:
        _run_deepspeed_on_cpu()


def _processor_has_fp16() -> bool:
    import torch

    try:  # DeepSpeed makes the same check.
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def _run_deepspeed_on_cpu() -> None:
    """Let accelerate 1.15 start DeepSpeed on CPU processes.

    Without a GPU, accelerate recognises CPU processes only if `use_cpu` is set. It then silently leaves DeepSpeed out.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Otherwise DeepSpeed warns that it found no GPU.
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    # g++ would compile this inference operator for half a minute at its first use, and training never calls it.
    backend = importlib.import_module("deepspeed.comm.torch")  # As an attribute, that name is torch itself.
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def write_deepspeed_config(settings: dict[str, Any], config: TrainConfig, processes: int) -> None:
    """Write the recipe's clipping, batch and accumulation into DeepSpeed's settings, over the values of the launch.

    Raises:
        UserError: the settings ask for a ZeRO stage other than 2, offloading, or an optimiser or schedule of DeepSpeed,
            or the recipe asks for Muon.
    """
    check_optimizer(config.optimizer, {"distributed_type": "DEEPSPEED"})
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") != 2:
        raise UserError(f"ZeRO stage {zero.get('stage')} is not supported; set zero_stage: 2 in the launch's YAML")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") not in (None, "none"):
            raise UserError(f"{name} is not supported; set {name}_device: none in the launch's YAML")
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise UserError(f"the DeepSpeed file has a section {name!r}, which the recipe owns; remove that section")
    settings["gradient_clipping"] = config.max_grad_norm
    settings["train_micro_batch_size_per_gpu"] = config.train_batch_size
    settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    settings["train_batch_size"] = config.train_batch_size * config.gradient_accumulation_steps * processes
    zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)


def check_effective(model: Any, schedule: Any, config: TrainConfig, accelerator: Any) -> dict[str, Any]:
    """Return the settings in force after `prepare`, and check them against the recipe.

    Args:
        model: the model as `accelerator.prepare` returned it.
        schedule: learning-rate schedule of the prepared optimiser.

    Returns:
        Clipping, batch, accumulation, peak learning rate and ZeRO stage (0 without ZeRO).

    Raises:
        UserError: a setting differs from the recipe.
    """
    from t2i.training import zero

    group = schedule.optimizer.param_groups[0]
    wanted = {
        "gradient_clipping": config.max_grad_norm,
        "train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "global_batch": config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        "learning_rate": config.learning_rate,
        "zero_stage": 2 if accelerator.deepspeed_plugin else 0,
    }
    found = {
        **wanted,  # Without DeepSpeed the script itself clips the gradients and draws the batch.
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "learning_rate": group["initial_lr"],
        **zero.effective(model),
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"the launch changes {name} to {found[name]}, but the recipe says {value}; remove {name} from the launch's YAML"
            )
    return found
