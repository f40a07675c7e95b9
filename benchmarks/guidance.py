"""Compare kinds of guidance on one model of photos: the empty prompt, or earlier weights that get a share of the prompt.

python benchmarks/guidance.py outputs/photos/unet --guide checkpoint-003000 --scales 3 4 5 --shares 0 0.5 1

Each setting draws the prompts of the evaluation's report with the same seeds, and the judge compares them with photos.
The first rows are those of the stock pipeline.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe_machine, judged_cells

import evaluate_checkpoints
from t2i.config import parse
from t2i.data import preparing
from t2i.evaluation import judge as judges
from t2i.evaluation import memorisation
from t2i.pictures import guide, sampling
from t2i.runs import checkpoint_folders

BATCH = 40
HEAD = "| guide | share of the prompt | scale | from step | eta | named | distance | Fréchet | precision | recall | copies |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder of train_unet.py, trained on labelled photos")
    parser.add_argument("--checkpoint", help="checkpoint that draws (default: the last)")
    parser.add_argument("--guide", help="checkpoint that guides; without it, only the empty prompt does")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5], help="shares of the prompt that the guide gets"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[3.0, 4.0, 5.0], help="guidance scales")
    parser.add_argument("--first", type=int, default=0, help="number of unguided steps at the start (default: 0)")
    parser.add_argument("--eta", type=float, default=0.0, help="share of new noise in each step of DDIM (default: 0)")
    parser.add_argument("--pictures", type=int, default=240, help="number of pictures per row (default: 240)")
    parser.add_argument("--steps", type=int, default=30, help="number of denoising steps (default: 30)")
    options = parser.parse_args()
    words = ["--config", str(options.run / "config.yaml"), "--model", str(options.run)]
    recipe = parse(("data", "evaluate"), __doc__ or "", words)
    splits = preparing.load_splits(recipe.data, say=lambda _: None)
    kind, thumbnails = evaluate_checkpoints.kind_of(splits), memorisation.pixel_embedding(splits.train.pixels)
    held_out = splits.test or splits.validation
    fresh = judges.spread(evaluate_checkpoints.unseen_rows(held_out.pixels, thumbnails), judges.MAX_UNSEEN)
    judge, _ = evaluate_checkpoints.prepare_judge(kind, splits, fresh, recipe)
    config = recipe.evaluate
    prompts = evaluate_checkpoints.make_prompts(
        kind, splits, recipe, options.pictures, config.eval_seed + 1, config.sweep_prompts
    )
    seeds = evaluate_checkpoints.report_seeds(config, options.pictures)
    checkpoint = options.checkpoint or checkpoint_folders(options.run)[-1].name
    pipeline = sampling.load_pipeline(options.run / checkpoint)
    strong = guide.unguided(pipeline.unet)
    weak = guide.unguided(sampling.load_pipeline(options.run / options.guide).unet) if options.guide else None
    count = min(options.pictures, len(fresh), len(judge.reference))
    print(f"Machine: {describe_machine()['cpu']}. {checkpoint}, {options.pictures} pictures of {options.steps} steps.")
    print(f"\n{HEAD}\n{'|---' * 11}|")
    for name, model, share in [
        ("no", strong, 0.0),
        *((options.guide, weak, share) for share in options.shares if weak),
    ]:
        for scale in options.scales:
            pictures = draw(pipeline, strong, model, share, scale, prompts.texts, seeds, options)
            labels = evaluate_checkpoints.labels_wanted(prompts)
            row = judge.describe(pictures, judge.network.features(pictures), labels, count)
            copies = float(memorisation.copied(pictures, thumbnails).mean())
            setting = f"{name} | {share:g} | {scale:g} | {options.first} | {options.eta:g}"
            print(f"| {setting} | {judged_cells(row)} | {copies:.1%} |", flush=True)


@torch.no_grad()
def draw(
    pipeline: Any, strong: Any, weak: Any, share: float, scale: float, prompts: list[str], seeds: list[int], options: Any
) -> np.ndarray:  # fmt: skip
    """Draw pictures by DDIM, uint8 [N, R, R, 3].

    Args:
        strong: the UNet that draws.
        weak: the UNet whose prediction guidance leaves.
        share: share of the prompt in the text embeddings that `weak` gets; the rest is the empty prompt.
    """
    scheduler, pictures = pipeline.scheduler, []
    size = (strong.config.in_channels, strong.config.sample_size, strong.config.sample_size)
    for start in range(0, len(prompts), BATCH):
        texts, numbers = prompts[start : start + BATCH], seeds[start : start + BATCH]
        given, empty = pipeline.encode_prompt(texts, "cpu", 1, True, negative_prompt=[""] * len(texts))
        latents = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in numbers])
        scheduler.set_timesteps(options.steps)
        generator = torch.Generator().manual_seed(start)
        for number, timestep in enumerate(scheduler.timesteps):
            output = strong(latents, timestep, given).sample
            if number >= options.first and scale > 1:
                worse = weak(latents, timestep, share * given + (1 - share) * empty).sample
                output = worse + scale * (output - worse)
            latents = scheduler.step(output, timestep, latents, eta=options.eta, generator=generator).prev_sample
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        drawn = pipeline.image_processor.postprocess(decoded, output_type="np")
        pictures.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


if __name__ == "__main__":
    main()
