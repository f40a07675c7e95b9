"""Pictures as files: schedulers' names, PNG parameters, grids. Imports no torch, so that looking at pictures stays quick."""

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

# the names people type, for the classes that diffusers has; any other of its class names works too
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


def save_picture(path: Path, picture: np.ndarray, parameters: dict[str, Any]) -> None:
    """Save uint8 [R, R, 3] as PNG with its parameters as JSON in the text field `parameters`."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    Image.fromarray(picture).save(path, pnginfo=info)


def read_parameters(path: Path) -> dict[str, Any] | None:
    """What `save_picture` wrote beside a picture; None where there is no whole picture with parameters."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # a picture that was cut off has its text all the same
            return json.loads(image.info["parameters"])
    except DAMAGE:
        return None


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
