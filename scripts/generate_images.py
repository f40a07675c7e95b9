"""Prompts -> pictures, from a run folder, one of its checkpoints, a pipeline folder or a Hub id.

python scripts/generate_images.py --model outputs/demo/unet --prompt "a red flower with five petals" "a blue flower at night"

The same seed gives the same picture, whatever the batch size. Each PNG carries its parameters as text.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from t2i.config import Count, Flag, Natural, NonNegative, check_options, parse_options
from t2i.runs import UserError, run_main


@dataclass
class Options:
    """The pictures."""

    model: str = "outputs/demo/unet"  # run folder, checkpoint, pipeline folder or Hub id
    revision: str | None = None  # branch, tag or commit of a Hub id
    weights: Literal["ema", "raw"] = "ema"  # of a checkpoint
    prompt: list[str] = field(default_factory=list)  # one or more prompts
    prompt_file: str | None = None  # text file with a prompt a line
    negative_prompt: str = ""  # what to stay away from
    guidance_scale: NonNegative = 7.5  # how strongly to follow the prompt; 1: without guidance
    preset: Literal["exact", "fast", "draft"] = (
        "exact"  # ddim 30, unipc 8 (4 of them guided) or unipc 3 (1) steps, where the next three do not say
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None  # denoising steps; None: the preset's
    guidance_end: Annotated[float, Field(ge=0, le=1)] | None = (
        None  # share of the steps, from the first on, that are guided (one at least); None: the preset's
    )
    scheduler: str | None = (
        None  # ddim, ddpm, pndm, euler, euler_a, heun, lms, dpm++, unipc, deis, or a class name of diffusers
    )
    seed: Natural = 0  # of the first picture; each further picture of a prompt takes the next
    num_images_per_prompt: Count = 1  # pictures a prompt
    batch_size: Count = 8  # pictures at once
    output_dir: str = "outputs/pictures"  # where the PNG files go
    grid: Flag = False  # write grid.png as well: a row a prompt
    device: str | None = None  # cpu, cuda, …; None: a GPU if there is one
    engine: Literal["auto", "torch", "openvino"] = (
        "auto"  # on a CPU; auto: compiled models that `make export` wrote, else torch; openvino: compile if there are none
    )


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    prompts = read_prompts(options)
    from t2i.distributed import quiet_libraries

    quiet_libraries()
    import torch

    from t2i import sampling

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scheduler, steps, end = sampling.PRESETS[options.preset]
    steps = options.num_inference_steps or steps
    end = end if options.guidance_end is None else options.guidance_end
    pipeline = sampling.load_pipeline(
        options.model, scheduler=options.scheduler or scheduler, device=device, weights=options.weights,
        revision=options.revision, engine=options.engine,
    )  # fmt: skip
    each = options.num_images_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(each)]
    seeds = [options.seed + number for _ in prompts for number in range(each)]
    pictures = sampling.generate(
        pipeline, repeated, seeds, negative_prompt=options.negative_prompt, guidance_scale=options.guidance_scale,
        num_inference_steps=steps, guidance_end=end, batch_size=options.batch_size,
    )  # fmt: skip
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "weights": options.weights, "revision": options.revision, "unet_hash": sampling.unet_hash(pipeline),
        "model": Path(options.model).name if Path(options.model).exists() else options.model,
        "negative_prompt": options.negative_prompt, "guidance_scale": options.guidance_scale,
        "num_inference_steps": steps, "guidance_end": end, "scheduler": type(pipeline.scheduler).__name__,
    }  # fmt: skip
    for number, (picture, prompt, seed) in enumerate(zip(pictures, repeated, seeds, strict=True)):
        path = folder / f"{number:04d}-seed{seed}.png"
        sampling.save_picture(path, picture, {"prompt": prompt, "seed": seed, **settings})
        print(f"{path}: {prompt}")
    if options.grid:
        sampling.picture_grid(pictures, columns=each if each > 1 else min(8, len(pictures))).save(folder / "grid.png")
        print(folder / "grid.png")


def read_prompts(options: Options) -> list[str]:
    """The prompts of `--prompt` and `--prompt_file`, in that order."""
    prompts = list(options.prompt)
    if options.prompt_file:
        try:
            lines = Path(options.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"prompt_file {options.prompt_file} cannot be read ({error}); give a UTF-8 text file, a prompt a line"
            ) from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError('no prompt: give --prompt "a red flower", or --prompt_file with a prompt a line')
    return prompts


if __name__ == "__main__":
    run_main(main)
