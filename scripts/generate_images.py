"""Draw pictures for prompts, with the model of a run folder, a checkpoint, a pipeline folder or a Hub id.

python scripts/generate_images.py --model outputs/demo/unet --prompt "a red flower with five petals" "a blue flower at night"

The same seed gives the same picture, whatever the batch size. Each PNG file holds its parameters as text. Repeating the
same command writes the same PNG files again. Pictures with other settings get the next free file numbers, so that no
file is overwritten.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from t2i.command_line import check_options, parse_options
from t2i.config_types import MAX_SEED, Count, Flag, Guidance, LocalPath, Seed, Share, Steps
from t2i.errors import UserError, run_main
from t2i.runs import find_student

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Options:
    """Options of drawing pictures."""

    model: str = "outputs/demo/unet"  # Run folder, checkpoint, pipeline folder or Hub id of the model.
    revision: str | None = None  # Branch, tag or commit of a Hub model.
    # Weights of a checkpoint. ema: moving average of the weights. raw: the weights of the last update.
    weights: Literal["ema", "raw"] = "ema"
    prompt: list[str] = field(default_factory=list)  # One or more prompts. Repeated --prompt options add up.
    prompt_file: str | None = None  # UTF-8 text file with one prompt per line.
    negative_prompt: str = ""  # Negative prompt: what the pictures should not show.
    # Strength with which pictures follow the prompt. A guidance scale of 1 disables guidance. With None, use 7.5, or 1 for
    # a student of distill_unet.py, which has learnt the guidance.
    guidance_scale: Guidance | None = None
    # Scheduler, steps and guidance, unless the next three options set them. exact: scheduler ddim, 30 steps, all
    # guided. fast: scheduler unipc, 8 steps, the first 4 guided. draft: scheduler unipc, 3 steps, the first one guided.
    # turbo: the steps of a student of distill_unet.py, or of the student beside the model's run. With None, use turbo for
    # students, and exact for other models.
    preset: Literal["exact", "fast", "draft", "turbo"] | None = None
    # Number of denoising steps. With None, use the value of the preset.
    num_inference_steps: Steps | None = None
    # Share of the steps, from the first step on, that are guided. At least one denoising step is guided. With None, use
    # the value of the preset.
    guidance_end: Share | None = None
    # How far guidance keeps the contrast of an unguided picture. 0.35 to 0.7 prevents glaring colors at high scales.
    guidance_rescale: Share = 0.0
    # Scheduler that suits the model: ddim, ddpm, pndm, euler, euler_a, heun, lms, dpm++, unipc, deis, or a class name
    # of diffusers. With None, use the value of the preset.
    scheduler: str | None = None
    seed: Seed = 0  # Seed of each prompt's first picture. Further pictures of a prompt take the following seeds.
    num_images_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = 1  # Number of pictures per prompt.
    batch_size: Count = 8  # Number of pictures drawn at once.
    output_dir: LocalPath = "outputs/pictures"  # Folder for the PNG files.
    grid: Flag = False  # Write all pictures into grid.png as well, one row per prompt.
    device: str | None = None  # Device that draws, such as cpu or cuda. With None, use a GPU if there is one.
    # Engine that draws the pictures. torch: draw by PyTorch, on any device. openvino: draw by compiled models on a CPU,
    # and compile them first if they are missing. auto: draw by compiled models if the device is a CPU and `make export`
    # wrote them, else by torch.
    engine: Literal["auto", "torch", "openvino"] = "auto"


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    prompts = read_prompts(options)
    if options.seed + options.num_images_per_prompt - 1 > MAX_SEED:
        raise UserError(
            f"seed {options.seed} leaves no seeds for the further pictures; give {MAX_SEED:,} at most for the last"
        )
    folder = writable_folder(options.output_dir)
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    import numpy as np

    from t2i.pictures import engines, guide, sampling
    from t2i.pictures.png import TURBO, choose_preset

    device = options.device or sampling.best_device()
    student = find_student(Path(options.model).expanduser()) if options.preset == TURBO else None
    model = str(student or options.model)
    pipeline = sampling.load_pipeline(
        model, device=device, weights=options.weights, revision=options.revision, engine=options.engine
    )
    schedule = pipeline.scheduler.config
    scheduler, steps, end = choose_preset(options.preset, schedule)
    steps = options.num_inference_steps or steps
    end = end if options.guidance_end is None else options.guidance_end
    pipeline.scheduler = sampling.make_scheduler(options.scheduler or scheduler, schedule, steps)
    scale = choose_scale(options.guidance_scale, schedule)
    for prompt in dict.fromkeys([*prompts, options.negative_prompt]):
        cut = sampling.cut_prompt(pipeline.tokenizer, prompt)
        if cut:
            print(f"WARNING: {cut}", file=sys.stderr)
    if options.negative_prompt and scale <= 1:
        print(f"WARNING: negative_prompt has no effect at guidance scale {scale:g}, without guidance", file=sys.stderr)
    each = options.num_images_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(each)]
    seeds = [options.seed + number for _ in prompts for number in range(each)]
    pictures = sampling.generate(
        pipeline, repeated, seeds, negative_prompt=options.negative_prompt, guidance_scale=scale,
        num_inference_steps=steps, guidance_end=end, guidance_rescale=options.guidance_rescale,
        batch_size=options.batch_size,
    )  # fmt: skip
    rescale = {"guidance_rescale": options.guidance_rescale} if options.guidance_rescale else {}
    settings = {
        "weights": options.weights, "revision": options.revision, "unet_hash": sampling.unet_hash(pipeline),
        "model": Path(model).name if Path(model).expanduser().exists() else model,
        "negative_prompt": options.negative_prompt, "guidance_scale": scale,
        "num_inference_steps": steps, "guidance_end": end, **rescale, "scheduler": type(pipeline.scheduler).__name__,
        "engine": "openvino" if isinstance(guide.unguided(pipeline.unet), engines.CompiledUnet) else "torch",
        **({"guide_hash": guided_by} if (guided_by := guide.guide_hash(pipeline.unet)) else {}),
    }  # fmt: skip
    parameters = [{"prompt": prompt, "seed": seed, **settings} for prompt, seed in zip(repeated, seeds, strict=True)]
    paths = places(folder, parameters)
    for path, picture, known in zip(paths, pictures, parameters, strict=True):
        save(path, picture, known)
        print(f"{path}: {known['prompt']}")
    if options.grid:
        columns = each if each > 1 else min(8, len(pictures))
        grid = np.asarray(sampling.picture_grid(pictures, columns=columns))
        drawn: dict[str, Any] = {"pictures": parameters}
        path = grid_place(folder, drawn)
        save(path, grid, drawn)
        print(path)


def choose_scale(asked: float | None, schedule: dict[str, Any]) -> float:
    """Return the guidance scale: the asked one, or that of the model's kind.

    Args:
        schedule: the config of the scheduler with which the model was saved.

    Raises:
        UserError: guidance is asked of a student, which has learnt it.
    """
    from t2i.pictures.png import guidance_problem, student_steps

    if not student_steps(schedule):
        return 7.5 if asked is None else asked
    if asked is not None and (problem := guidance_problem(asked, schedule)):
        raise UserError(problem)
    return 1.0


def writable_folder(name: str) -> Path:
    """Return the folder of `--output_dir`, and make it if it is missing.

    Raises:
        UserError: the folder cannot be written. The check of the folder runs before anything is drawn.
    """
    try:
        folder = Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"output_dir {name[:200]} cannot be written ({reason}); give another --output_dir") from None
    return folder


def places(folder: Path, parameters: list[dict[str, Any]]) -> list[Path]:
    """Return a file path for each picture: an existing file with the same parameters, otherwise the next free number."""
    from t2i.pictures.png import read_parameters

    known: dict[str, list[Path]] = {}
    numbers = [-1]
    for path in sorted(folder.iterdir()):
        found = re.fullmatch(r"([0-9]{4,9})-seed[0-9]+\.png", path.name)
        if found:
            numbers.append(int(found[1]))
            known.setdefault(json.dumps(read_parameters(path), sort_keys=True), []).append(path)
    following, chosen = max(numbers) + 1, []
    for wanted in parameters:
        same = known.get(json.dumps(wanted, sort_keys=True))
        if same:
            chosen.append(same.pop(0))
        else:
            chosen.append(folder / f"{following:04d}-seed{wanted['seed']}.png")
            following += 1
    return chosen


def grid_place(folder: Path, parameters: dict[str, Any]) -> Path:
    """Return the first of `grid.png`, `grid-0001.png`, … that is free or holds a grid of the same pictures."""
    from t2i.pictures.png import read_parameters

    def names() -> Iterator[str]:
        yield "grid.png"
        yield from (f"grid-{number:04d}.png" for number in range(1, 10**9))

    free = (folder / name for name in names())
    return next(path for path in free if not os.path.lexists(path) or read_parameters(path) == parameters)


def save(path: Path, picture: "np.ndarray", parameters: dict[str, Any]) -> None:
    """Write a picture atomically. If the disk is full, an earlier file of the same name stays.

    Raises:
        UserError: the file cannot be written.
    """
    from t2i.pictures.png import png_bytes

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(png_bytes(picture, parameters))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room, or give another --output_dir"
        ) from None


def read_prompts(options: Options) -> list[str]:
    """Return the prompts of `--prompt`, then those of `--prompt_file`.

    Raises:
        UserError: the file cannot be read, or there is no prompt.
    """
    prompts = list(options.prompt)
    if options.prompt_file:
        try:
            text = Path(options.prompt_file).expanduser().read_bytes()
            is_utf16 = text.startswith((b"\xff\xfe", b"\xfe\xff"))  # Windows' editors call this "Unicode"
            decoded = text.decode("utf-16" if is_utf16 else "utf-8-sig")
            if "\0" in decoded:
                raise ValueError("it holds zero bytes, as UTF-16 does")
            lines = re.split(
                r"\r\n|\n|\r", decoded
            )  # splitlines() would also split at a line separator within a prompt
        except (OSError, ValueError, RuntimeError) as error:
            reason = (
                "it is not UTF-8"
                if isinstance(error, UnicodeDecodeError)
                else getattr(error, "strerror", None) or error
            )
            raise UserError(
                f"prompt_file {options.prompt_file} cannot be read ({reason}); give a UTF-8 text file, one prompt per line"
            ) from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError('no prompt: give --prompt "a red flower", or --prompt_file with one prompt per line')
    return prompts


if __name__ == "__main__":
    run_main(main)
