"""Compare kinds of guidance on one model of photos: the empty prompt, or earlier weights that get a share of the prompt.

python benchmarks/guidance.py outputs/photos/unet --guide checkpoint-003000 --scales 3 4 5 --shares 0 0.5 1

Each setting draws the prompts of the evaluation's report with the same seeds, and the judge compares them with photos.
The first rows are those of the stock pipeline.
"""

import argparse
from dataclasses import dataclass
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
    bench = prepare(options.run, options.pictures)
    checkpoint = options.checkpoint or checkpoint_folders(options.run)[-1].name
    pipeline = sampling.load_pipeline(options.run / checkpoint)
    weak = guide.unguided(sampling.load_pipeline(options.run / options.guide).unet) if options.guide else None
    print(f"Machine: {describe_machine()['cpu']}. {checkpoint}, {options.pictures} pictures of {options.steps} steps.")
    print(f"\n{HEAD}\n{'|---' * 11}|")
    for name, model, share in [("no", None, 0.0), *((options.guide, weak, share) for share in options.shares if weak)]:
        for scale in options.scales:
            row = bench.row(pipeline, model, Setting(share, scale, options.first, options.eta, options.steps))
            setting = f"{name} | {share:g} | {scale:g} | {options.first} | {options.eta:g}"
            print(f"| {setting} | {judged_cells(row)} | {row['copies']:.1%} |", flush=True)


@dataclass(frozen=True)
class Setting:
    """How pictures are drawn."""

    share: float = 0.5  # Share of the prompt in the text embeddings that the guide gets; the rest is the empty prompt.
    scale: float = 4.0  # Guidance scale.
    first: int = 0  # Number of unguided steps at the start.
    eta: float = 0.0  # Share of new noise in each step of DDIM.
    steps: int = 30  # Number of denoising steps.


@dataclass(frozen=True)
class Bench:
    """The prompts and seeds of an evaluation's report, with the judge of its pictures."""

    judge: judges.Judge
    thumbnails: np.ndarray  # Thumbnails of the training photos, which find copies.
    prompts: list[str]
    labels: list[str] | None  # Label that each picture should show.
    seeds: list[int]
    count: int  # Number of pictures and photos for the figures that depend on the size of a set.

    def row(self, pipeline: Any, weak: Any, setting: Setting) -> dict[str, Any]:
        """Draw a picture of each prompt and return the judge's figures.

        Args:
            pipeline: the model that draws.
            weak: the UNet whose prediction guidance leaves. None is the model's own.
        """
        strong = guide.unguided(pipeline.unet)
        pictures = draw(pipeline, strong, weak or strong, self.prompts, self.seeds, setting)
        row = self.judge.describe(pictures, self.judge.network.features(pictures), self.labels, self.count)
        return row | {"copies": float(memorisation.copied(pictures, self.thumbnails).mean())}


def prepare(run: Path, pictures: int) -> Bench:
    """Prepare the judge of a run's data set, and the prompts and seeds of `pictures` pictures."""
    words = ["--config", str(run / "config.yaml"), "--model", str(run)]
    recipe = parse(("data", "evaluate"), __doc__ or "", words)
    splits = preparing.load_splits(recipe.data, say=lambda _: None)
    kind, thumbnails = evaluate_checkpoints.kind_of(splits), memorisation.pixel_embedding(splits.train.pixels)
    held_out = splits.test or splits.validation
    fresh = judges.spread(evaluate_checkpoints.unseen_rows(held_out.pixels, thumbnails), judges.MAX_UNSEEN)
    judge, _ = evaluate_checkpoints.prepare_judge(kind, splits, fresh, recipe)
    config = recipe.evaluate
    seeds = evaluate_checkpoints.report_seeds(config, pictures)
    prompts = evaluate_checkpoints.make_prompts(
        kind, splits, recipe, pictures, config.eval_seed + 1, config.sweep_prompts
    )
    labels, count = evaluate_checkpoints.labels_wanted(prompts), min(pictures, len(fresh), len(judge.reference))
    return Bench(judge, thumbnails, prompts.texts, labels, seeds, count)


@torch.no_grad()
def draw(pipeline: Any, strong: Any, weak: Any, prompts: list[str], seeds: list[int], setting: Setting) -> np.ndarray:
    """Draw pictures by DDIM, uint8 [N, R, R, 3].

    Args:
        strong: the UNet that draws.
        weak: the UNet whose prediction guidance leaves.
    """
    scheduler, pictures = pipeline.scheduler, []
    size = (strong.config.in_channels, strong.config.sample_size, strong.config.sample_size)
    for start in range(0, len(prompts), BATCH):
        texts, numbers = prompts[start : start + BATCH], seeds[start : start + BATCH]
        given, empty = pipeline.encode_prompt(texts, "cpu", 1, True, negative_prompt=[""] * len(texts))
        latents = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in numbers])
        scheduler.set_timesteps(setting.steps)
        generator = torch.Generator().manual_seed(start)
        for number, timestep in enumerate(scheduler.timesteps):
            output = strong(latents, timestep, given).sample
            if number >= setting.first and setting.scale > 1:
                worse = weak(latents, timestep, setting.share * given + (1 - setting.share) * empty).sample
                output = worse + setting.scale * (output - worse)
            latents = scheduler.step(output, timestep, latents, eta=setting.eta, generator=generator).prev_sample
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        drawn = pipeline.image_processor.postprocess(decoded, output_type="np")
        pictures.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


if __name__ == "__main__":
    main()
