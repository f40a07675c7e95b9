"""Measure the time until train_unet.py reaches the validation loss of half an hour of diffusers' train_text_to_image.py.

python benchmarks/convergence.py path/to/diffusers/examples/text_to_image/train_text_to_image.py [dataset] [minutes] [velocity]

Both scripts train the model card's UNet from scratch in bf16 at 128 px, with batch 8, or 32 on a GPU. Both scripts see
the same images: drawn flowers, or any data set that train_unet.py reads. Both UNets predict the noise, as the model
card's UNet does. The peer, diffusers' script, runs unmodified, with a cosine schedule and warm-up. The peer's learning
rate is the best of LEARNING_RATES in runs of a fifth of the time. Our script has the same objective and learning rate
as the peer. Our script gets the SHARES of the peer's time, caching included, until its loss is the peer's. One
evaluator scores both UNets in float32, with the same noise at the same timesteps. The start of Python and the loading
of models do not count for either script. Finished trainings of an earlier run are reused. With `velocity` as the last
word, only our script runs: its UNet predicts the velocity, at each of LEARNING_RATES, in a fifth of the time.

VAE and text encoder have random weights, which compute as long as trained weights. The VAE's weights give latents like
those of a trained VAE: mean 0 and deviation 1, without noise, similar in neighbouring places.
"""

import copy
import json
import os
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from card_model import save_card_model
from common import ROOT, SCRIPTS, keep
from train import PLACE, REPORT, make_environment, run

WORK = ROOT / ".cache" / "benchmark_convergence"
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
SHARES = (1 / 5, 3 / 8, 1 / 2, 1.0)  # of the peer's time, that ours is given
WARMUP = 0.05  # of the steps
LOGGED = 10 if PLACE.gpu else 2  # steps between two of our lines
PROBE = 6 * LOGGED  # steps that tell a step's seconds
IMAGES = 720  # drawn, if no data set is given


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"name diffusers' script: {__doc__.splitlines()[2]}" if __doc__ else "")
    peer = Path(sys.argv[1]).resolve()
    WORK.mkdir(parents=True, exist_ok=True)
    dataset = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else draw(WORK / "dataset")
    told = WORK / "dataset.txt"
    if told.is_file() and told.read_text() != str(dataset):
        sys.exit(f"{WORK} holds runs on {told.read_text()}; delete that folder, or name the same data set")
    told.write_text(str(dataset))
    seconds = 60 * (float(sys.argv[3]) if len(sys.argv) > 3 else 30.0)
    model = WORK / "model"
    recipe = make_recipe(model, dataset)  # predicts the noise, as the evaluator
    if not model.is_dir():
        make_model(model, recipe)
    images = prepare(recipe, WORK / "peer_dataset")
    environment = make_environment(WORK / "peer_environment") | {"ACCELERATE_MIXED_PRECISION": "bf16"}

    def train_peer(steps: int, rate: float) -> dict[str, Any]:
        words = {
            "pretrained_model_name_or_path": model, "dataset_name": WORK / "peer_dataset", "caption_column": "caption",
            "resolution": 128, "train_batch_size": PLACE.batch, "learning_rate": rate, "lr_scheduler": "cosine",
            "lr_warmup_steps": round(WARMUP * steps), "max_train_steps": steps, "output_dir": WORK / "peer", "seed": 0,
            "cache_dir": WORK / "peer_cache", "report_to": REPORT, "checkpointing_steps": 100_000,
        }  # fmt: skip
        options = [text for key, value in words.items() for text in (f"--{key}", str(value))]
        seen = run([str(peer), *options, "--random_flip", "--center_crop"], environment, WORK)
        return {
            "step_seconds": statistics.median(seen.step_seconds),
            "peak_rss_bytes": seen.peak_rss_bytes,
            "val_loss": score(WORK / "peer" / "unet", recipe),
        }

    def train_ours(steps: int, rate: float, kind: str = "epsilon") -> dict[str, Any]:
        shutil.rmtree(WORK / "ours", ignore_errors=True)
        mine = copy.deepcopy(recipe)
        if kind != "epsilon":
            mine["unet"] |= {
                "prediction_type": kind,
                "pretrained_model_name_or_path": str(with_prediction(model, kind)),
            }
        mine["train_unet"] |= {
            "max_train_steps": steps,
            "learning_rate": rate,
            "lr_warmup_steps": round(WARMUP * steps),
        }
        (WORK / "recipe.yaml").write_text(yaml.safe_dump(mine))
        words = [str(SCRIPTS / "train_unet.py"), "--config", str(WORK / "recipe.yaml")]
        seen = run(words, os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}, WORK)
        state = json.loads((WORK / "ours" / "run.json").read_text())
        return {
            "step_seconds": statistics.median(seen.step_seconds),
            "peak_rss_bytes": seen.peak_rss_bytes,
            "val_loss": score(WORK / "ours" / "pipeline" / "unet", recipe, kind),
            "cache": state["seconds"]["cache"],  # where nothing was cached yet
        }

    probe = kept("peer", PROBE, LEARNING_RATES[0], train_peer)["step_seconds"]
    pilots = {rate: kept("peer", round(seconds / 5 / probe), rate, train_peer) for rate in LEARNING_RATES}
    rate = min(pilots, key=lambda one: pilots[one]["val_loss"])
    step = statistics.median(pilot["step_seconds"] for pilot in pilots.values())
    whole = kept("peer", round(seconds / step), rate, train_peer)

    if not (WORK / "caching.json").is_file():
        shutil.rmtree(WORK / "ours_cache", ignore_errors=True)  # measured anew
        first = train_ours(PROBE, LEARNING_RATES[0])
        (WORK / "caching.json").write_text(json.dumps(first))
    first = json.loads((WORK / "caching.json").read_text())
    if "velocity" in sys.argv[4:]:
        train_velocity = partial(train_ours, kind="v_prediction")
        count = round((seconds / 5 - first["cache"]) / first["step_seconds"])
        found = losses({one: kept("ours_velocity", count, one, train_velocity) for one in LEARNING_RATES})
        keep(
            "convergence_velocity",
            {"ratio": None, "goal": None, "steps": count, "dataset": dataset.name, "val_loss": found},
        )
        return
    reached: list[dict[str, Any]] = []
    for share in SHARES:
        step_seconds = reached[-1]["step_seconds"] if reached else first["step_seconds"]
        count = max(1, round((share * seconds - first["cache"]) / step_seconds))
        mine = kept("ours", count, rate, train_ours)
        took = first["cache"] + count * mine["step_seconds"]
        reached.append({"share_of_time": round(took / seconds, 3), "steps": count, **mine})
        if mine["val_loss"] <= whole["val_loss"]:
            break
    done = mine["val_loss"] <= whole["val_loss"]
    keep(
        "convergence_gpu" if PLACE.gpu else "convergence",
        {
            "ratio": round(1 / reached[-1]["share_of_time"], 2) if done else None, "goal": 5.0, "minutes": seconds / 60,
            "dataset": dataset.name, "train_images": images, "batch": PLACE.batch, "precision": "bf16", "learning_rate": rate,
            "peer": {**whole, "steps": round(seconds / step), "pilots": losses(pilots)},
            "ours": {"caching_seconds": first["cache"], "runs": reached},
        },
        PLACE.gpu,
    )  # fmt: skip


def losses(runs: dict[float, dict[str, Any]]) -> dict[str, float]:
    """Return the peer's validation losses by learning rate."""
    return {f"{rate:g}": round(run["val_loss"], 5) for rate, run in runs.items()}


def kept(arm: str, steps: int, rate: float, train: Any) -> dict[str, Any]:
    """Return a training's stored result, or run the training."""
    file = WORK / f"{arm}-{steps}-{rate:g}.json"
    if not file.is_file():
        start = time.perf_counter()
        result = train(steps, rate)
        file.write_text(json.dumps({**result, "seconds": time.perf_counter() - start}))
    result = json.loads(file.read_text())
    print(f"{arm}, {steps} steps at {rate:g}: {json.dumps(result)}", flush=True)
    return result


def draw(folder: Path) -> Path:
    if not folder.is_dir():
        import subprocess

        words = ["--output_dir", folder, "--count", IMAGES, "--validation_count", 72, "--test_count", 16, "--size", 128]
        subprocess.run([sys.executable, SCRIPTS / "make_flowers.py", *map(str, words)], check=True)
    return folder


def make_recipe(model: Path, dataset: Path) -> dict[str, Any]:
    """Return the model card's recipe for these data, this model's VAE and text encoder, and its UNet as the start."""
    recipe = yaml.safe_load((SCRIPTS / "recipes" / "flowers.yaml").read_text())
    recipe["data"] = {
        "dataset": str(dataset), "resolution": 128, "validation_fraction": 0.1, "cache_dir": str(WORK / "ours_cache"),
        "random_flip": False,
    }  # fmt: skip
    recipe["vae"] = {"vae": str(model)}
    recipe["unet"] |= {"pretrained_model_name_or_path": str(model), "text_encoder": str(model)}
    recipe["train_unet"] |= {
        "train_batch_size": PLACE.batch, "seed": 0, "logging_steps": LOGGED, "validation_images": 1, "validation_prompts": [],
        "report_to": "none", "output_dir": str(WORK / "ours"), "checkpointing_steps": 100_000, "validation_steps": 100_000,
    }  # fmt: skip
    return recipe


def make_model(folder: Path, recipe: dict[str, Any]) -> None:
    """Make a model of the card's sizes with random weights, and a VAE whose latents a denoiser can learn."""
    import torch

    from t2i import models
    from t2i.data import caches

    part = save_card_model(folder.with_suffix(".part"))
    vae = models.load_vae(str(part))
    pixels = caches.to_pixels(load(recipe).train.pixels[:64])
    with torch.no_grad():
        for module in vae.encoder.modules():
            if hasattr(module, "conv2"):  # of a residual branch: what remains is local
                module.conv2.weight *= 0.1
        latents = torch.cat([vae.encode(some).latent_dist.mean for some in pixels.split(16)])
        models.fold_normalisation(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
        channels = latents.shape[1]
        vae.quant_conv.weight[channels:], vae.quant_conv.bias[channels:] = 0.0, -20.0  # log-variance
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained(part / "vae")
    part.rename(folder)


def prepare(recipe: dict[str, Any], folder: Path) -> int:
    """Write the training images and captions as a data set for the peer. Return the number of images."""
    import datasets
    from PIL import Image

    split = load(recipe).train
    if not folder.is_dir():
        rows = {"image": [Image.fromarray(pixels) for pixels in split.pixels], "caption": list(split.rows["caption"])}
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        folder.mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return len(split)


def load(recipe: dict[str, Any]) -> Any:
    from t2i import config
    from t2i.data import preparing

    return preparing.load_splits(config.DataConfig(**recipe["data"]))


def with_prediction(model: Path, kind: str) -> Path:
    """Relabel the model's UNet from predicting noise to predicting `kind`: random weights allow any prediction type."""
    folder = model.with_name(f"{model.name}_{kind}")
    if not folder.is_dir():
        shutil.copytree(model, folder, copy_function=os.link)
        file = folder / "scheduler" / "scheduler_config.json"
        told = json.loads(file.read_text()) | {"prediction_type": kind}
        file.unlink()  # the other model's as well
        file.write_text(json.dumps(told))
    return folder


def score(unet: Path, recipe: dict[str, Any], kind: str = "epsilon") -> float:
    """Return a UNet's validation loss in the noise, in float32, as train_unet.py measures it.

    Args:
        kind: prediction type of the UNet.
    """
    import torch
    from diffusers import UNet2DConditionModel

    import train_unet
    from t2i import config, models
    from t2i.data import preparing
    from t2i.training.distributed import make_accelerator

    (WORK / "score.yaml").write_text(yaml.safe_dump(recipe))
    settings = config.load_recipe(str(WORK / "score.yaml"))
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    accelerator = make_accelerator(settings.train_unet)
    splits = preparing.load_splits(settings.data, say=lambda _: None)
    frozen, hashes = train_unet.load_frozen(settings, splits)
    splits.train = splits.validation  # its caches alone are needed, whole
    settings.train_unet.validation_images = len(splits.validation)
    caches = train_unet.cache_inputs(settings, splits, frozen, hashes, accelerator)
    factor = frozen.pop("vae").config.scaling_factor
    given = train_unet.Inputs(models.build_noise_scheduler(settings.unet), caches, factor, [])
    given.scheduler.alphas_cumprod = given.scheduler.alphas_cumprod.to(accelerator.device)
    model = UNet2DConditionModel.from_pretrained(unet).to(accelerator.device)
    if kind == "v_prediction":

        def to_noise(_: Any, args: Any, output: Any) -> Any:
            """Convert a velocity to noise (Salimans and Ho, arXiv:2202.00512, appendix D)."""
            noisy, timesteps = args[:2]
            alphas = given.scheduler.alphas_cumprod[timesteps][:, None, None, None]
            output.sample = torch.sqrt(alphas) * output.sample + torch.sqrt(1 - alphas) * noisy
            return output

        model.register_forward_hook(to_noise)
    return train_unet.validation_loss(model, given, 10_000, accelerator)["val_loss"]


if __name__ == "__main__":
    main()
