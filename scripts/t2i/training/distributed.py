"""What must stand before `Accelerator` is made, and what DeepSpeed must know before `prepare`."""

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
from t2i.config import TrainConfig, TrainUnetConfig
from t2i.errors import UserError
from t2i.machine import find_launcher

PRECISIONS = ("no", "bf16", "fp16")  # that the suite trains in
REDUCE_BUCKET = 50_000_000  # gradients reduced at once, 100 MB in fp16; DeepSpeed's default takes 1 GB of a 16 GB card
NO_FP16 = (
    "mixed_precision fp16 needs a GPU, and this run computes on the CPU; launch with --mixed_precision bf16 or "
    "--mixed_precision no (plain python: the environment variable ACCELERATE_MIXED_PRECISION)"
)


def quiet_libraries() -> None:
    """Keep libraries' notes that no user can act on off the terminal; their warnings about real trouble stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # image processors without torchvision
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()  # of loading a model: a second at most
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message=".*lr_scheduler.step.*"
    )  # accelerate's wrapper hides the optimiser's step


def make_accelerator(config: TrainConfig | None = None) -> Any:
    """The script's `Accelerator`: processes and precision come from the launcher, the rest from the recipe.

    config: of a training; None: processes work on their shares alone, and may wait a week for each other.
    """
    quiet_libraries()
    prepare_launch(config)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    kinds: dict[str, Any] = {"kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(days=7))]}
    if config is not None:
        kinds = {
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "step_scheduler_with_optimizer": False,
        }
    try:
        accelerator = Accelerator(**kinds)
    except ValueError as error:  # a precision that the device lacks, and its like
        reason = " ".join(str(error).split())
        raise UserError(f"the launch does not fit this machine ({reason}); take accelerate_configs/cpu.yaml") from None
    in_fp16 = accelerator.device.type != "cpu" or (accelerator.deepspeed_plugin and _processor_has_fp16())
    if accelerator.mixed_precision == "fp16" and not in_fp16:
        raise UserError(NO_FP16)  # accelerate 1.15 would compute in float32, and say fp16
    if config is None:
        return accelerator
    wanted = int(
        os.environ.get("T2I_WORLD_SIZE", accelerator.num_processes)
    )  # run_sagemaker_job.py counts the machines' GPUs
    if wanted != accelerator.num_processes:
        raise UserError(
            f"this training has {accelerator.num_processes} processes instead of {wanted}: the machines would train apart; look at "
            "the accelerate YAML named by --inside"
        )
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps  # the launcher's number came before
    scale_learning_rate(config, accelerator)
    if accelerator.deepspeed_plugin:
        write_deepspeed_config(accelerator.deepspeed_plugin.deepspeed_config, config, accelerator.num_processes)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(config.seed)
    return accelerator


def scale_learning_rate(config: TrainConfig, accelerator: Any) -> None:
    """Put the learning rate that `scale_lr` means into `config`, as diffusers' scripts scale it, and say it."""
    if config.scale_lr:
        images = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        config.learning_rate *= images
        config.scale_lr = False  # the resolved settings hold the product, which nothing scales again
        accelerator.print(
            f"--scale_lr: the peak learning rate is {config.learning_rate:g}, for {images} images per update"
        )


def choose_precision(config: TrainConfig | None) -> None:
    """Let the script's `--mixed_precision` act where the launch set none.

    accelerate's launcher says "no" where nobody asked for a precision, so that a "no" binds only where it was typed.
    Raises `UserError` where launch and option differ.
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
    """Let glibc keep from now on what a training step frees for the next one, which needs as much; on a CPU alone.

    By default it gives large blocks back to the system and takes them page by page, each zeroed: a twentieth of a step's time.
    """
    if sys.platform == "linux" and accelerator.device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def give_back_memory() -> None:
    """Give what is free to the system at once, after `keep_freed_memory`."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def broadcast_from_main(value: Any, accelerator: Any) -> Any:
    """`value` as the first process has it, on every process: another node may lack the file that it was read from."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def prepare_launch(config: TrainConfig | None) -> None:
    """Make the launch fit the script and the machine.

    Without a GPU, processes of a launcher are CPU processes: accelerate 1.15 takes each of them for a run of its own unless
    the environment says so, which its launcher for several processes does not. Only train_unet.py runs under DeepSpeed;
    other scripts, whose models are small, run data parallel on the same processes.
    Raises `UserError` where DeepSpeed is not installed, or the precision is unknown or not the machine's.
    """
    import torch

    choose_precision(config)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:  # accelerate would compute in float32 and say this word
        raise UserError(
            f"mixed_precision {precision!r} is not supported; choose one of {', '.join(PRECISIONS)} in the launch's YAML, "
            "by --mixed_precision, or in ACCELERATE_MIXED_PRECISION"
        )
    on_cpu = not torch.cuda.is_available()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    if not isinstance(config, TrainUnetConfig):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launch asks for DeepSpeed, which is not installed; run: pip install -r scripts/requirements.txt (Linux), or take "
            "accelerate_configs/multi_gpu.yaml or cpu.yaml"
        )
    # DeepSpeed's own calls, which no user can change
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*")
    if not on_cpu:
        return
    if precision == "fp16" and not _processor_has_fp16():
        raise UserError(NO_FP16)
    if "LOCAL_RANK" in os.environ:
        _run_deepspeed_on_cpu()


def _processor_has_fp16() -> bool:
    import torch

    try:  # what DeepSpeed asks as well
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def _run_deepspeed_on_cpu() -> None:
    """Let accelerate 1.15 start DeepSpeed on CPU processes.

    Without a GPU it knows CPU processes only where `use_cpu` says so, and then it leaves DeepSpeed out without a word.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    # an operator for inference, compiled by g++ for half a minute at its first use; training never calls it
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute, that name is torch itself
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def write_deepspeed_config(settings: dict[str, Any], config: TrainConfig, processes: int) -> None:
    """Put the recipe's clipping, batch and accumulation into DeepSpeed's settings, whatever the launch says of them.

    Raises `UserError` for what the suite does not run: other ZeRO stages, offloading, an optimiser or schedule of DeepSpeed.
    """
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
    """What is in force after `prepare`: clipping, batch, accumulation, highest learning rate, ZeRO stage (0: none).

    Raises `UserError` where it is not what the recipe says. model: as prepared; schedule: of the optimiser that was prepared.
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
        **wanted,  # in a plain training the script itself clips, and draws the batch
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "learning_rate": group["initial_lr"],
        **zero.effective(model),
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"{name} is {found[name]} after the launch's settings, the recipe says {value}; take it out of the launch's YAML"
            )
    return found
