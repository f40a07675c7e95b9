"""Write and read pictures as PNG files with parameters, arrange them in grids, and name schedulers. This module imports no torch."""

import io
import json
import math
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from PIL.PngImagePlugin import PngInfo

from t2i.errors import UserError
from t2i.files import hash_json

# Short names of diffusers' classes. Other class names of `RIGHT` work too.
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


# The classes of diffusers that suit Stable Diffusion's kind of models, measured with a denoiser whose right answer is known
# (tests/test_schedulers.py). All others draw noise or need another kind of model: LCM loses a third of the spread.
RIGHT = {
    *SCHEDULERS.values(), "DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler", "TCDScheduler",
}  # fmt: skip
# Without signal in the last noise level, 8 steps of Heun's give 20 times the spread.
NEED_SIGNAL = {"HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
MIN_SIGNAL = 1e-5  # alpha-bar of the last noise level; 4e-5 (DDPM's own schedule) suffices, 2e-9 (squaredcos) does not
SECOND_ORDER = {*NEED_SIGNAL, "KDPM2DiscreteScheduler"}
SECOND_ORDER_STEPS = 10  # with fewer, they overshoot unless the steps are spread evenly to the end ("trailing")
PNDM_STEPS = 4  # PNDM starts with four steps, and crashes with fewer
NO_SAMPLE = {
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
}


# Key of a student's scheduler_config.json, which holds its number of steps. Every class of diffusers accepts and keeps keys
# that begin with an underscore.
STUDENT = "_student_steps"


def student_steps(config: Mapping[str, Any]) -> int | None:
    """Return the number of steps in which a student of distill_unet.py draws, or None for other models.

    Args:
        config: content of scheduler_config.json, which was saved with the model.
    """
    steps = config.get(STUDENT)
    return steps if type(steps) is int and steps > 0 else None


def last_signal(config: Mapping[str, Any]) -> float:
    """Return the image's share in the last noise level (alpha-bar, 0 to 1) of a scheduler's config; a share of 0 means
    zero terminal SNR.
    """
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
    except (TypeError, ValueError, ArithmeticError, MemoryError):  # the file is not a scheduler's
        return 1.0


def scheduler_problem(name: str, config: Mapping[str, Any], steps: int | None = None) -> str | None:
    """Return a sentence on why a scheduler does not suit a model, or None if it suits the model.

    Args:
        name: a key of `SCHEDULERS` or a class name of diffusers.
        config: content of scheduler_config.json, which was saved with the model.
        steps: number of denoising steps, or None if the number is not chosen yet.
    """
    reason = _misfit(SCHEDULERS.get(name.lower(), name), config, steps)
    if reason is None:
        return None
    if student := student_steps(config):
        return (
            f"the model is a student of distill_unet.py and draws only in {student} steps of {config.get('_class_name')}; "
            "take preset turbo"
        )
    fitting = fitting_schedulers(config, steps)
    instead = (
        f"take one of {', '.join(fitting)}" if fitting else f"take {config.get('_class_name')}, which it was saved with"
    )
    return f"scheduler {name} {reason}; {instead}"


def guidance_problem(scale: float, config: Mapping[str, Any]) -> str | None:
    """Return a sentence on why a guidance scale does not suit a model, or None if it suits the model.

    Args:
        config: content of scheduler_config.json, which was saved with the model.
    """
    if scale <= 1 or not student_steps(config):
        return None
    return f"guidance_scale {scale:g}: the model is a student, which has learnt guidance; give guidance_scale 1"


def fitting_schedulers(config: Mapping[str, Any], steps: int | None = None) -> list[str]:
    """Return the keys of `SCHEDULERS` that suit a model.

    The arguments of this function are those of `scheduler_problem`.
    """
    return [name for name, cls in SCHEDULERS.items() if _misfit(cls, config, steps) is None]


def _misfit(cls: str, config: Mapping[str, Any], steps: int | None) -> str | None:
    saved, student = config.get("_class_name"), student_steps(config)
    if student and (cls != saved or steps not in (None, student)):
        return "does not fit this student"
    if cls not in RIGHT:
        return None if cls == saved else "is not for this kind of model"
    if saved is not None and saved not in RIGHT and "beta_schedule" not in config:
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
    """A preset: settings that trade a picture's quality for time."""

    scheduler: str  # A key of `SCHEDULERS`.
    num_inference_steps: int
    guidance_end: float  # Share of the steps, from the first on, that are guided.


# Training draws with "exact"; the others save time on a CPU. Late steps only sharpen the picture, so they need no guidance
# (Kynkäänniemi et al., arXiv:2404.07724), and an unguided step takes half the time.
PRESETS = {
    "exact": Preset("ddim", 30, 1.0),
    "fast": Preset("unipc", 8, 0.5),
    "draft": Preset("unipc", 3, 0.3),
}
TURBO = "turbo"  # The one preset of a student. Its guidance scale is 1: a student has learnt the guidance.


def presets_of(config: Mapping[str, Any]) -> dict[str, Preset]:
    """Return the presets that suit a model, by name. A student has `TURBO`, and other models have those of `PRESETS`.

    Args:
        config: content of scheduler_config.json, which was saved with the model.
    """
    if student := student_steps(config):
        return {TURBO: Preset("ddim", student, 1.0)}
    return {
        name: one
        for name, one in PRESETS.items()
        if one.scheduler in fitting_schedulers(config, one.num_inference_steps)
    }


def choose_preset(name: str | None, config: Mapping[str, Any]) -> Preset:
    """Return the preset that a user named, or without a name the one of best quality: `exact`, or a student's `TURBO`.

    Args:
        name: a key of `PRESETS`, or `TURBO`.
        config: content of scheduler_config.json, which was saved with the model.

    Raises:
        UserError: the preset is `TURBO`, and the model is no student.
    """
    turbo = presets_of(config).get(TURBO)
    if turbo and name in (None, TURBO):
        return turbo
    if name == TURBO:
        raise UserError("preset turbo needs a student; make one by scripts/distill_unet.py, or take another preset")
    return PRESETS[name or "exact"]


def fastest_preset(config: Mapping[str, Any]) -> Preset | None:
    """Return the preset with the fewest steps that suits a model, or None if none does.

    Args:
        config: content of scheduler_config.json, which was saved with the model.
    """
    return min(presets_of(config).values(), key=lambda one: one.num_inference_steps, default=None)


def guided_steps(steps: int, guidance_end: float) -> int:
    """Return how many of `steps` denoising steps are guided, at least 1, if the share of guided steps is `guidance_end`
    (0 to 1).
    """
    return max(1, math.ceil(round(steps * guidance_end, 6)))


# What Pillow and json raise for a file that is not a complete PNG with parameters.
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
    """Save a picture, uint8 [R, R, 3], as PNG with its parameters as JSON in the text field `parameters`."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    Image.fromarray(picture).save(path, "PNG", pnginfo=info)


def png_bytes(picture: np.ndarray, parameters: dict[str, Any]) -> bytes:
    """Return the bytes of the PNG file that `save_picture` writes."""
    file = io.BytesIO()
    save_picture(file, picture, parameters)
    return file.getvalue()


def cut_prompt(tokenizer: Any, prompt: str) -> str | None:
    """Return a sentence that quotes the part of a prompt that a model does not read, or None if the model reads all of it.

    A prompt is cut at the length of the model's tokenizer.
    """
    limit = tokenizer.model_max_length
    if len(prompt.encode("utf-8", "replace")) + 2 <= limit:  # a token has at least one byte
        return None
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(tokens) <= limit:
        return None
    lost = " ".join(tokenizer.decode(tokens[limit - 1 : -1], skip_special_tokens=True).replace("\ufffd", "").split())
    shown = prompt if len(prompt) <= 60 else prompt[:59] + "…"
    lost = lost if len(lost) <= 120 else "…" + lost[-119:]
    return f'prompt "{shown}" has {len(tokens)} tokens, and the model reads {limit}: "{lost}" is cut off; shorten the prompt'


def read_parameters(path: Path) -> dict[str, Any] | None:
    """Return the parameters in a picture's file, or None if the file is no complete picture with parameters."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # checks all pixels: a truncated file still has its text
            return json.loads(image.info["parameters"])
    except DAMAGE:
        return None


def difference(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the difference of two pictures, uint8 [R, R, 3] each.

    The smaller picture is enlarged, without smoothing, to the size of the larger one.

    Returns:
        |left - right| per channel, stretched to 255, uint8 [R, R, 3]; and its mean before stretching, 0 to 255.
    """
    side = max(left.shape[0], right.shape[0])
    pair = [
        np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), dtype=np.int16)
        for picture in (left, right)
    ]
    gap = np.abs(pair[0] - pair[1])
    stretched = gap * (255 / max(1, int(gap.max())))
    return stretched.round().astype(np.uint8), float(gap.mean())


# --- Labels ----------------------------------------------------------------------------------------------------------

FONT_SIZE = 10  # pixels; the default size of Pillow's own font
_MARKS = str.maketrans(
    {"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "•": "·", "\u2212": "-"}
)
_STYLED = re.compile(r"bold|italic|oblique|mono|light|thin|black|condensed|serif|math", re.IGNORECASE)


def lettered(text: str, number: int = 1) -> tuple[str, Any]:
    """Return a text that can be drawn, and its font: Pillow's own font, or an installed font that has all letters.

    If no font has all letters, the text is that of `_latin`, with `number` for words that cannot be drawn.
    """
    pillow_font = ImageFont.load_default(FONT_SIZE)
    if _has(pillow_font, text):
        return text, pillow_font
    if font := _font_for(frozenset(text)):
        return text, font
    return _latin(text, number), pillow_font


def _latin(text: str, number: int = 1) -> str:
    """Return `text` in letters of Latin-1, with simpler accents and marks; `[number]` stands for words in other scripts."""
    letters = []
    for letter in text.translate(_MARKS):
        plain = letter if letter <= "\xff" else unicodedata.normalize("NFKD", letter)
        letters.append(
            "".join(mark for mark in plain if not unicodedata.combining(mark)) if plain != letter else letter
        )
    words = "".join(letters).split()
    latin = [word for word in words if all(letter <= "\xff" for letter in word)]
    return " ".join(latin if len(latin) == len(words) else [f"[{number}]", *latin])


@lru_cache(maxsize=256)
def _font_for(letters: frozenset[str]) -> Any:
    """Return an installed font with all of `letters`.

    The result is None without such a font, or if Pillow cannot join or order the letters.
    """
    joined = any(
        unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) == "Mc" for letter in letters
    )
    if joined and not (features.check("raqm") and features.check("fribidi")):
        return None
    text = "".join(letters)
    return next((font for file in _font_files() if (font := _open_font(file)) and _has(font, text)), None)


@lru_cache(maxsize=1)
def _font_files() -> tuple[str, ...]:
    """Return the font files of this machine, plain ones first."""
    home, windows = Path.home(), Path(os.environ.get("WINDIR", "C:/Windows"))
    folders = [
        *(home / ".local/share/fonts", home / ".fonts", Path("/usr/share/fonts"), Path("/usr/local/share/fonts")),
        *(home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")),
        *(windows / "Fonts", home / "AppData/Local/Microsoft/Windows/Fonts"),
    ]
    if spec := find_spec("matplotlib"):  # MLflow brings it, with DejaVu's Latin, Cyrillic, Greek, Arabic …
        folders.append(Path(str(spec.origin)).parent / "mpl-data/fonts/ttf")
    files = {str(file) for folder in folders if folder.is_dir() for file in folder.rglob("*.[toTO][tT][fcFC]")}
    lettered_files = [file for file in files if "LastResort" not in file]
    return tuple(sorted(lettered_files, key=lambda file: (bool(_STYLED.search(file)), file)))


@lru_cache(maxsize=512)
def _open_font(file: str) -> Any:
    try:
        return ImageFont.truetype(file, FONT_SIZE + 2)  # looks as large as Pillow's own at FONT_SIZE
    except (OSError, ValueError):  # the font is damaged, or holds bitmaps of one size
        return None


def _has(font: Any, text: str) -> bool:
    """Return whether a font has every letter of a text.

    A letter is missing if the font draws it like an unused code point.
    """
    missing = bytes(font.getmask("\U0010ffff"))
    shown = (letter for letter in set(text) if not letter.isspace() and unicodedata.category(letter) != "Cf")
    return all(bytes(font.getmask(letter)) != missing for letter in shown)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Return an image of pictures in a table, with labels of columns and rows. A picture that is None becomes a gray field.

    A label in a script that no font here has becomes a number in brackets, and a line below the table says so.
    The grid's `info["legend"]` spells the label, and `grid_png` writes this legend into the file.
    """
    side = max((max(image.size) for row in rows for image in row if image), default=64)
    side, gap, line = max(side, 96), 4, 16  # labels need some room
    legend: dict[str, int] = {}

    def cut(text: str, width: float) -> tuple[str, Any]:
        text = " ".join(text.split())[:200]
        shown, font = lettered(text, legend.get(text, len(legend) + 1))
        if re.match(r"\[\d+\]", shown) and shown != text:
            legend.setdefault(text, len(legend) + 1)
        while shown and font.getlength(shown) > width:
            shown = shown[:-1]
        return shown, font

    labels = [cut(label, 240) for label in row_labels]
    left = min(240, max([8, *(int(font.getlength(text)) for text, font in labels)])) + 8
    width, height = left + len(column_labels) * (side + gap), 2 * line + len(row_labels) * (side + gap)
    heads = [cut(label, side) for label in column_labels]
    top = cut(title, width - 8)
    grid = Image.new("RGB", (width, height + (line if legend else 0)), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((4, 2), top[0], fill="black", font=top[1])
    for number, (text, font) in enumerate(heads):
        pen.text((left + number * (side + gap), line + 2), text, fill="black", font=font)
    for number, ((text, font), row) in enumerate(zip(labels, rows, strict=True)):
        y = 2 * line + number * (side + gap)
        pen.text((4, y + side // 2 - 6), text, fill="black", font=font)
        for column, image in enumerate(row):
            x = left + column * (side + gap)
            if image is None:
                pen.rectangle((x, y, x + side - 1, y + side - 1), fill=(225, 225, 225))
            else:
                grid.paste(
                    image.resize((side, side), Image.Resampling.LANCZOS) if max(image.size) != side else image, (x, y)
                )
    if legend:
        text, font = cut("[n] no font for it here; see the PNG's field legend", width - 8)
        pen.text((4, height + 2), text, fill="black", font=font)
        grid.info["legend"] = "\n".join(f"[{number}] {text}" for text, number in legend.items())
    return grid


def grid_png(grid: Image.Image) -> bytes:
    """Return the PNG file of a `labelled_grid`, with its legend, if it has one, in the text field `legend`."""
    info, file = PngInfo(), io.BytesIO()
    if "legend" in grid.info:
        info.add_itxt("legend", grid.info["legend"])
    grid.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def picture_grid(
    pictures: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """Return an image of pictures, uint8 [N, R, R, 3], in rows of `columns`, with a line of `labels` under each picture."""
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
            text, font = lettered(labels[number], number + 1)
            while text and font.getlength(text) > side:
                text = text[:-1]
            pen.text((x + 1, y + side), text, fill="black", font=font)
    return grid


def pixel_hash(image: Image.Image) -> str:
    """Return a hash (16 hex digits) of a picture's size and pixels."""
    return hash_json([image.size, image.tobytes().hex()])
