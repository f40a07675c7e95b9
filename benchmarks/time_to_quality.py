"""Measure how soon train_unet.py draws as well as diffusers' train_text_to_image.py does after 20 minutes or more, on photos.

python benchmarks/time_to_quality.py path/to/diffusers/examples/text_to_image/train_text_to_image.py PHOTOS VAE [minutes]

Both scripts train the UNet of the recipe `photos` from random weights on the same photos, captions, autoencoder and frozen
text encoder. PHOTOS are labelled photos, as `--dataset` takes them. VAE is an autoencoder of that recipe, a run folder of
train_vae.py or a path. Quality is the judge's distance to photos, of PICTURES pictures at guidance scale SCALE. The prompts
and seeds are the same for all.

The peer, diffusers' script, runs unmodified, in the faster of fp32 and bf16. It gets a cosine schedule with warm-up, averaged
weights and a tenth of empty captions, which guidance needs. Its learning rate is the best of RATES in runs of PILOT
updates, or the next best one if the long training diverges. Each of its checkpoints draws.

Our script trains by the recipe for the SHARES of the peer's time, caching included, until its pictures are as good without a
guide. For the last of these times, it also trains with the peer's optimizer, rate and loss. All draw without and with a guide,
which has the weights of half of the updates. The start of Python and the loading of models do not
count for either script, nor does the decoding and shrinking of photos: the peer gets photos of 64 px. Both record their
curves in MLflow. Results of an earlier run are reused.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, SCRIPTS, keep
from guidance import Setting, prepare
from train import REPORT, make_environment, run

from t2i.config import DataConfig
from t2i.data import preparing
from t2i.files import write_json
from t2i.pictures import sampling

WORK = ROOT / ".cache" / "benchmark_time_to_quality"
RATES = (5e-4, 1e-3, 2e-3)
SCALE = 4.0  # of guidance, as the recipe's evaluation chose it
SHARES = (1 / 10, 1 / 7, 1 / 5, 1 / 4, 1 / 3)  # of the peer's time, that ours is given
WARMUP = 0.03  # of the updates
CHECKPOINTS = 4  # of the peer, the last one included
PROBE = 40  # updates that tell an update's seconds
PILOT = 460  # updates that compare the peer's rates
LOGGED = 20  # updates between two of our lines
PICTURES = 240


def main() -> None:
    if len(sys.argv) < 4 or not Path(sys.argv[1]).is_file():
        sys.exit(f"name diffusers' script, photos and autoencoder: {__doc__.splitlines()[2]}" if __doc__ else "")
    WORK.mkdir(parents=True, exist_ok=True)
    peer, photos, vae = (str(Path(word).resolve()) if Path(word).exists() else word for word in sys.argv[1:4])
    seconds = 60 * (float(sys.argv[4]) if len(sys.argv) > 4 else 20.0)
    told, wanted = WORK / "arguments.json", [photos, vae, seconds]
    if told.is_file() and json.loads(told.read_text()) != wanted:
        sys.exit(f"{WORK} holds results of {told.read_text()}; delete that folder, or give the same arguments")
    write_json(told, wanted)
    recipe = make_recipe(photos, vae)
    if not (WORK / "start.timed.json").is_file():
        shutil.rmtree(WORK / "cache", ignore_errors=True)  # Its making is measured.
    start = train_ours(recipe, WORK / "start", PROBE, {"learning_rate": 1e-9, "lr_warmup_steps": 0})
    images = write_photos(recipe, WORK / "peer_dataset")
    bench = prepare(WORK / "start", PICTURES)

    def draw(pipeline: Path, weak: Path | None = None, scale: float = SCALE) -> dict[str, Any]:
        """Return the judge's figures of a model's pictures, with guidance by the empty prompt or by `weak`."""
        guide = sampling.load_pipeline(weak).unet if weak else None
        setting = Setting(share=0.5 if weak else 0.0, scale=scale)
        return bench.row(sampling.load_pipeline(pipeline), guide, setting) | {"scale": scale}

    def peer_pipeline(unet: Path) -> Path:
        """Make a pipeline of the peer's UNet. The peer saves autoencoder and text encoder in the precision of its training."""
        return with_unet(WORK / "start" / "pipeline", unet, WORK / "drawing")

    def train_peer(name: str, steps: int, rate: float, precision: str) -> dict[str, Any]:
        folder = WORK / name
        words = {
            "pretrained_model_name_or_path": WORK / "start" / "pipeline", "dataset_name": WORK / "peer_dataset",
            "caption_column": "caption", "resolution": recipe["data"]["resolution"],
            "train_batch_size": recipe["train_unet"]["train_batch_size"], "learning_rate": rate, "lr_scheduler": "cosine",
            "lr_warmup_steps": round(WARMUP * steps), "max_train_steps": steps, "output_dir": folder, "seed": 0,
            "cache_dir": WORK / "peer_cache", "report_to": REPORT, "checkpointing_steps": max(1, steps // CHECKPOINTS),
            "logging_dir": WORK / "peer_logs",
        }  # fmt: skip
        options = [text for key, value in words.items() for text in (f"--{key}", str(value))]
        environment = make_environment(WORK / "peer_environment") | {"ACCELERATE_MIXED_PRECISION": precision}
        seen = run([peer, *options, "--random_flip", "--center_crop", "--use_ema"], environment, WORK)
        return {"step_seconds": statistics.median(seen.step_seconds), "updates": steps, "learning_rate": rate}

    probes = {
        precision: kept(f"peer_probe_{precision}", lambda p=precision: train_peer(f"peer_{p}", PROBE, RATES[0], p))
        for precision in ("no", "bf16")
    }
    precision = min(probes, key=lambda one: probes[one]["step_seconds"])
    step = probes[precision]["step_seconds"]

    def pilot(rate: float) -> dict[str, Any]:
        trained = train_peer(f"pilot_{rate:g}", PILOT, rate, precision)
        return trained | draw(peer_pipeline(WORK / f"pilot_{rate:g}" / "unet"), scale=3.0)

    pilots = {rate: kept(f"peer_pilot_{rate:g}", lambda r=rate: pilot(r)) for rate in RATES}
    step = statistics.median(row["step_seconds"] for row in pilots.values())
    tried: dict[str, list[dict[str, Any]]] = {}
    for rate in sorted(pilots, key=lambda one: pilots[one]["kernel_distance"]):
        folder = WORK / f"peer_{rate:g}"
        whole = kept(folder.name, lambda r=rate: train_peer(f"peer_{r:g}", round(seconds / step), r, precision))
        saved = [number * (whole["updates"] // CHECKPOINTS) for number in range(1, CHECKPOINTS)]
        unets = {updates: folder / f"checkpoint-{updates}" / "unet_ema" for updates in saved}
        unets[whole["updates"]] = folder / "unet"
        curve = tried[f"{rate:g}"] = []
        for number, (updates, unet) in enumerate(unets.items(), start=1):
            row = kept(f"{folder.name}_drawn_{number}", lambda u=unet: draw(peer_pipeline(u)))
            curve.append({"minutes": round(updates * whole["step_seconds"] / 60, 1), "updates": updates, **row})
        target = curve[-1]["kernel_distance"]
        if target <= pilots[rate]["kernel_distance"]:
            break  # Otherwise the long training has diverged: the next rate.
    weak = with_unet(WORK / "start" / "pipeline", unets[saved[CHECKPOINTS // 2 - 1]], WORK / "guiding")
    guided_peer = kept(f"{folder.name}_guided", lambda: draw(peer_pipeline(folder / "unet"), weak))

    each = start["step_seconds"]
    ours: list[dict[str, Any]] = []

    def train_and_draw(way: str, name: str, share: float, settings: dict[str, Any]) -> bool:
        """Train for a share of the peer's time, and return whether the pictures are as good as the peer's."""
        nonlocal each
        updates = round((share * seconds - start["cache"]) / each)
        settings = settings | {"lr_warmup_steps": round(WARMUP * updates)}
        trained = kept(name, lambda: train_ours(recipe, WORK / name, updates, settings))
        each, pipeline = trained["step_seconds"], WORK / name / "pipeline"
        minutes = round((start["cache"] + trained["updates"] * each) / 60, 1)
        known = {"minutes": minutes, "updates": trained["updates"]}
        row = kept(f"{name}_drawn", lambda: draw(pipeline))
        ours.append({"way": way, **known, **row})
        weak = with_unet(pipeline, pipeline / "guide", WORK / "guiding")
        ours.append({"way": f"{way}, with a guide", **known, **kept(f"{name}_guided", lambda: draw(pipeline, weak))})
        return bool(row["kernel_distance"] <= target)

    def ratio(way: str) -> float | None:
        """Return how many times as fast one of our ways reaches the peer's last distance, or None if it does not."""
        reached = [row["minutes"] for row in ours if row["way"] == way and row["kernel_distance"] <= target]
        return round(curve[-1]["minutes"] / min(reached), 1) if reached else None

    def keep_all() -> None:
        ways = list(dict.fromkeys(row["way"] for row in ours))
        keep(
            "time_to_quality",
            {
                "ratio": ratio("the recipe, with a guide"), "goal": 5.0, "ratios": {way: ratio(way) for way in ways},
                "train_images": images, "precision": precision, "caching_seconds": start["cache"], "pilots": pilots,
                "diverged": {name: rows for name, rows in tried.items() if rows is not curve},
                "peer": curve, "peer_with_a_guide": guided_peer, "ours": ours,
            },
        )  # fmt: skip

    for share in SHARES:
        if train_and_draw("the recipe", f"recipe_{round(1 / share)}", share, {}):
            break
    keep_all()  # A run that is cut short has told what it measured.
    adamw = {"optimizer": "adamw", "learning_rate": rate, "alignment_weight": 0.0}
    train_and_draw("the peer's optimizer, rate and loss", f"adamw_{round(1 / share)}", share, adamw)
    keep_all()


def kept(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return an arm's stored result, or measure it."""
    file = WORK / f"{name}.json"
    if not file.is_file():
        began = time.perf_counter()
        result = measure()
        write_json(file, result | {"seconds": round(time.perf_counter() - began, 1)})
    result = json.loads(file.read_text())
    print(f"{name}: {json.dumps(result)}", flush=True)
    return result


def make_recipe(photos: str, vae: str) -> dict[str, Any]:
    """Return the recipe `photos` for these photos and this autoencoder."""
    recipe = yaml.safe_load((SCRIPTS / "recipes" / "photos.yaml").read_text())
    recipe["data"] |= {"dataset": photos, "cache_dir": str(WORK / "cache")}
    recipe["vae"]["vae"] = vae
    recipe["train_unet"] |= {"logging_steps": LOGGED, "report_to": REPORT, "validation_steps": 10**6}
    return recipe


def train_ours(recipe: dict[str, Any], folder: Path, updates: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train with our script for a number of updates, unless it did so before. A guide is kept halfway."""
    file = folder.with_suffix(".timed.json")
    if not file.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        trained = recipe["train_unet"] | {
            "max_train_steps": updates, "guide_step": updates // 2, "checkpointing_steps": 10**6, "output_dir": str(folder),
        }  # fmt: skip
        written = WORK / f"{folder.name}.yaml"
        written.write_text(yaml.safe_dump(recipe | {"train_unet": trained | settings}))
        words = [str(SCRIPTS / "train_unet.py"), "--config", str(written)]
        seen = run(words, os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}, WORK)
        state = json.loads((folder / "run.json").read_text())
        each = statistics.median(seen.step_seconds)
        write_json(file, {"step_seconds": each, "updates": updates, "cache": state["seconds"]["cache"]})
    return json.loads(file.read_text())


def write_photos(recipe: dict[str, Any], folder: Path) -> int:
    """Write the training photos and their captions for the peer. Return the number of photos.

    A tenth of a photo's captions is empty: the peer draws one of them per update.
    """
    import datasets
    from PIL import Image

    split = preparing.load_splits(DataConfig(**recipe["data"]), say=lambda _: None).train
    if not (folder / "train.parquet").is_file():
        captions = [[*(9 * list(texts)), *(len(texts) * [""])] for texts in split.captions()]
        rows = {"image": [Image.fromarray(pixels) for pixels in split.pixels], "caption": captions}
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "part")
        (folder / "part").rename(folder / "train.parquet")
    return len(split)


def with_unet(pipeline: Path, unet: Path, folder: Path) -> Path:
    """Make a pipeline in `folder` of links to `pipeline`, with another UNet."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for entry in pipeline.iterdir():
        if entry.name != "guide" and not entry.name.startswith("checkpoint-"):
            (folder / entry.name).symlink_to(unet if entry.name == "unet" else entry)
    return folder


if __name__ == "__main__":
    main()
