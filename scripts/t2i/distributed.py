"""What must stand before `Accelerator` is made."""

import os
import warnings
from datetime import timedelta
from typing import Any

from t2i.config import TrainConfig
from t2i.runs import UserError


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
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    try:
        if config is None:
            return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # fp16 without a GPU, and its like
        reason = " ".join(str(error).split())
        raise UserError(f"the launch does not fit this machine ({reason}); take accelerate_configs/cpu.yaml") from None
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(config.seed)
    return accelerator
