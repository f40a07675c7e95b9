"""Pictures as files: schedulers' names, PNG parameters, grids. Imports no torch, so that looking at pictures stays quick."""

import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

# the names people type, for the classes that diffusers has; other class names of `RIGHT` work too
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}


# The classes of diffusers that are right for Stable Diffusion's kind of models. Measured with a denoiser whose right answer is known
# (tests/test_schedulers.py): all others draw noise or need another kind of model (LCM: a third of the spread is missing).
RIGHT = {
    *SCHEDULERS.values(), "DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler", "TCDScheduler",
}  # fmt: skip
NEED_SIGNAL = {
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
}  # else 20 times the spread at 8 steps of Heun's
MIN_SIGNAL = 1e-5  # alpha-bar of the last noise level; 4e-5 (DDPM's own schedule) suffices, 2e-9 (squaredcos) does not
SECOND_ORDER = {*NEED_SIGNAL, "KDPM2DiscreteScheduler"}
SECOND_ORDER_STEPS = 10  # with fewer they overshoot, unless the steps are spread evenly to the end ("trailing")
PNDM_STEPS = 4  # its start takes four; fewer crash in it
NO_SAMPLE = {
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
}


def last_signal(config: Mapping[str, Any]) -> float:
    """The share of the image in the last noise level (alpha-bar, 0 to 1) by a scheduler's config; 0: zero terminal SNR."""
    if config.get("rescale_betas_zero_snr"):
        return 0.0
    try:
        count = int(config.get("num_train_timesteps", 1000))
        ends = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        schedule = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"], float)
        elif schedule == "squaredcos_cap_v2":
            levels = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - levels[1:] / levels[:-1], 0.999)
        elif schedule == "scaled_linear":
            betas = np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, count) ** 2
        else:
            betas = np.linspace(*ends, count)
        return float(np.prod(1 - betas))
    except (TypeError, ValueError, ArithmeticError, MemoryError):  # of a file that is no scheduler's
        return 1.0


def scheduler_problem(name: str, config: Mapping[str, Any], steps: int | None = None) -> str | None:
    """Say why a scheduler is not right for a model; None where it is.

    Args:
        name: a key of `SCHEDULERS` or a class name of diffusers.
        config: of the scheduler that the model was saved with (scheduler_config.json).
        steps: denoising steps, if they are known.
    """
    reason = _misfit(SCHEDULERS.get(name.lower(), name), config, steps)
    if reason is None:
        return None
    right = fitting_schedulers(config, steps)
    instead = (
        f"take one of {', '.join(right)}" if right else f"take {config.get('_class_name')}, which it was saved with"
    )
    return f"scheduler {name} {reason}; {instead}"


def fitting_schedulers(config: Mapping[str, Any], steps: int | None = None) -> list[str]:
    """The keys of `SCHEDULERS` that are right for a model; arguments as `scheduler_problem` takes them."""
    return [name for name, cls in SCHEDULERS.items() if _misfit(cls, config, steps) is None]


def _misfit(cls: str, config: Mapping[str, Any], steps: int | None) -> str | None:
    own = config.get("_class_name")
    if cls not in RIGHT:
        return None if cls == own else "is not for this kind of model"
    if own is not None and own not in RIGHT and "beta_schedule" not in config:
        return "does not fit this model, which has no noise levels of DDPM's kind"
    weak, kind = last_signal(config) < MIN_SIGNAL, config.get("prediction_type", "epsilon")
    if weak and (cls in NEED_SIGNAL or (cls == "PNDMScheduler" and kind == "epsilon")):
        return "does not fit this model: it needs some of the image in the last noise level, which is pure noise here"
    if kind == "sample" and cls in NO_SAMPLE:
        return "does not fit this model, which predicts the sample"
    least = PNDM_STEPS if cls == "PNDMScheduler" and not config.get("skip_prk_steps") else 1
    if cls in SECOND_ORDER and config.get("timestep_spacing", "leading") != "trailing":
        least = SECOND_ORDER_STEPS
    return f"needs {least} steps or more here, not {steps}" if steps is not None and steps < least else None


class Preset(NamedTuple):
    """How a picture is drawn."""

    scheduler: str  # a key of `SCHEDULERS`
    num_inference_steps: int
    guidance_end: float  # share of the steps, from the first on, that are guided


# exact is what training draws with, the others are for a processor in a hurry: the late steps, which only sharpen what is there,
# need no guidance (Kynkäänniemi et al., arXiv:2404.07724) and then take half the time
PRESETS = {
    "exact": Preset("ddim", 30, 1.0),
    "fast": Preset("unipc", 8, 0.5),
    "draft": Preset("unipc", 3, 0.3),
}


def guided_steps(steps: int, guidance_end: float) -> int:
    """How many of `steps` are guided, 1 to all, where the share `guidance_end` (0 to 1) of them is."""
    return max(1, math.ceil(round(steps * guidance_end, 6)))


# what Pillow and json raise for files that are no whole PNG with parameters
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    KeyError,
    RecursionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def save_picture(path: Path | BinaryIO, picture: np.ndarray, parameters: dict[str, Any]) -> None:
    """Save uint8 [R, R, 3] as PNG with its parameters as JSON in the text field `parameters`."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    Image.fromarray(picture).save(path, "PNG", pnginfo=info)


def png_bytes(picture: np.ndarray, parameters: dict[str, Any]) -> bytes:
    """The file that `save_picture` writes."""
    file = io.BytesIO()
    save_picture(file, picture, parameters)
    return file.getvalue()


def cut_prompt(tokenizer: Any, prompt: str) -> str | None:
    """Say what a model does not read of a prompt, which is cut at its tokenizer's length; None where all is read."""
    limit = tokenizer.model_max_length
    if len(prompt.encode("utf-8", "replace")) + 2 <= limit:  # a token takes a byte at least
        return None
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(tokens) <= limit:
        return None
    lost = " ".join(tokenizer.decode(tokens[limit - 1 : -1], skip_special_tokens=True).replace("\ufffd", "").split())
    shown = prompt if len(prompt) <= 60 else prompt[:59] + "…"
    lost = lost if len(lost) <= 120 else "…" + lost[-119:]
    return f'prompt "{shown}" has {len(tokens)} tokens, and the model reads {limit}: "{lost}" is cut off; shorten the prompt'


def read_parameters(path: Path) -> dict[str, Any] | None:
    """What `save_picture` wrote beside a picture; None where there is no whole picture with parameters."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # a picture that was cut off has its text all the same
            return json.loads(image.info["parameters"])
    except DAMAGE:
        return None


def difference(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """How two pictures differ: uint8 [R, R, 3] of |left - right| per channel, stretched to 255, and the mean of it (0 to 255).

    left, right: uint8 [R, R, 3]; of two sizes the smaller one is enlarged, each pixel as it is.
    """
    side = max(left.shape[0], right.shape[0])
    pair = [
        np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), dtype=np.int16)
        for picture in (left, right)
    ]
    gap = np.abs(pair[0] - pair[1])
    stretched = gap * (255 / max(1, int(gap.max())))
    return stretched.round().astype(np.uint8), float(gap.mean())


def labelled_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Pictures in a table under the labels of its columns and beside those of its rows; None leaves a gray place."""
    side = max((max(image.size) for row in rows for image in row if image), default=64)
    side, gap, line = max(side, 96), 4, 16  # labels need some room
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def cut(text: str, width: float) -> str:
        text = " ".join(text.split())[:200]
        while text and pen.textlength(_latin(text)) > width:
            text = text[:-1]
        return _latin(text)

    left = min(240, max([8, *(int(pen.textlength(cut(label, 240))) for label in row_labels)])) + 8
    width, height = left + len(column_labels) * (side + gap), 2 * line + len(row_labels) * (side + gap)
    grid = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((4, 2), cut(title, width - 8), fill="black")
    for number, label in enumerate(column_labels):
        pen.text((left + number * (side + gap), line + 2), cut(label, side), fill="black")
    for number, (label, row) in enumerate(zip(row_labels, rows, strict=True)):
        y = 2 * line + number * (side + gap)
        pen.text((4, y + side // 2 - 6), cut(label, left - 8), fill="black")
        for column, image in enumerate(row):
            x = left + column * (side + gap)
            if image is None:
                pen.rectangle((x, y, x + side - 1, y + side - 1), fill=(225, 225, 225))
            else:
                grid.paste(
                    image.resize((side, side), Image.Resampling.LANCZOS) if max(image.size) != side else image, (x, y)
                )
    return grid


def _latin(text: str) -> str:
    """Letters that Pillow's built-in font has; others become "?"."""
    return text.encode("latin-1", "replace").decode("latin-1")


def picture_grid(
    pictures: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """Pictures uint8 [N, R, R, 3] in rows of `columns`, left to right, with a line of text under each if `labels` is given."""
    side, gap = pictures.shape[1] * scale, 2
    line = 12 if labels else 0
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + line + gap) - gap), "white")
    pen = ImageDraw.Draw(grid)
    for number, picture in enumerate(pictures):
        x, y = (number % columns) * (side + gap), (number // columns) * (side + line + gap)
        image = Image.fromarray(picture)
        grid.paste(image.resize((side, side), Image.Resampling.LANCZOS) if scale > 1 else image, (x, y))
        if labels:
            text = labels[number]
            while text and pen.textlength(text) > side:
                text = text[:-1]
            pen.text((x + 1, y + side), text, fill="black")
    return grid
