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
guide. For the last of these times, it also trains with the peer's optimiser, rate and loss. All draw without and with a
guide, which has the weights of half of the updates.

The start of Python and the loading of models do not count for either script, nor does the decoding and shrinking of photos:
the peer gets photos of 64 px. Both record their curves in MLflow. Results of an earlier run are reused.
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
from guidance import Bench, Setting, prepare
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
    result = {"train_images": images, "caching_seconds": start["cache"]} | measure_peer(peer, recipe, bench, seconds)
    target, rate = result["peer"][-1], result["peer"][-1]["learning_rate"]
    ours: list[dict[str, Any]] = []
    each = start["step_seconds"]
    for share in SHARES:
        updates = round((share * seconds - start["cache"]) / each)
        ours += measure_ours("the recipe", f"recipe_{round(1 / share)}", updates, {}, recipe, start, bench)
        each = ours[-1]["step_seconds"]
        if ours[-2]["kernel_distance"] <= target["kernel_distance"]:
            break
    keep_all(result, ours)  # A run that is cut short has told what it measured.
    adamw = {"optimizer": "adamw", "learning_rate": rate, "alignment_weight": 0.0}
    name = f"adamw_{round(1 / share)}"
    ours += measure_ours("the peer's optimiser, rate and loss", name, updates, adamw, recipe, start, bench)
    keep_all(result, ours)


def keep_all(result: dict[str, Any], ours: list[dict[str, Any]]) -> None:
    """Keep the result, with how many times as fast each of our ways reaches the peer's last distance."""
    target = result["peer"][-1]
    ratios: dict[str, float | None] = dict.fromkeys(row["way"] for row in ours)
    for row in sorted(ours, key=lambda row: row["minutes"], reverse=True):
        if row["kernel_distance"] <= target["kernel_distance"]:
            ratios[row["way"]] = round(target["minutes"] / row["minutes"], 1)
    ratio = ratios["the recipe, with a guide"]
    keep("time_to_quality", {"ratio": ratio, "goal": 5.0, "ratios": ratios, **result, "ours": ours})


def draw(bench: Bench, pipeline: Path, weak: Path | None = None) -> dict[str, Any]:
    """Return the judge's figures of a model's pictures, with guidance by the empty prompt or by the UNet of `weak`."""
    guide = sampling.load_pipeline(weak).unet if weak else None
    setting = Setting(share=0.5 if weak else 0.0, scale=SCALE)
    return bench.row(sampling.load_pipeline(pipeline), guide, setting) | {"scale": SCALE}


# --- The peer --------------------------------------------------------------------------------------------------------


def measure_peer(script: str, recipe: dict[str, Any], bench: Bench, seconds: float) -> dict[str, Any]:
    """Choose the peer's precision and learning rate, train it for a time, and draw with each of its checkpoints."""
    probes = {
        precision: kept(
            f"peer_probe_{precision}", lambda p=precision: train_peer(script, recipe, f"peer_{p}", PROBE, RATES[0], p)
        )
        for precision in ("no", "bf16")
    }
    precision = min(probes, key=lambda one: probes[one]["step_seconds"])

    def pilot(rate: float) -> dict[str, Any]:
        trained = train_peer(script, recipe, f"pilot_{rate:g}", PILOT, rate, precision)
        return trained | draw(bench, peer_pipeline(WORK / f"pilot_{rate:g}" / "unet"))

    pilots = {rate: kept(f"peer_pilot_{rate:g}", lambda r=rate: pilot(r)) for rate in RATES}
    steps = round(seconds / statistics.median(row["step_seconds"] for row in pilots.values()))
    diverged: dict[str, Any] = {}
    for rate in sorted(pilots, key=lambda one: pilots[one]["kernel_distance"]):
        name = f"peer_{rate:g}"
        whole = kept(name, lambda r=rate, n=name: train_peer(script, recipe, n, steps, r, precision))
        saved = [number * (whole["updates"] // CHECKPOINTS) for number in range(1, CHECKPOINTS)]
        unets = {updates: WORK / name / f"checkpoint-{updates}" / "unet_ema" for updates in saved}
        unets[whole["updates"]] = WORK / name / "unet"
        curve = []
        for number, (updates, unet) in enumerate(unets.items(), start=1):
            row = kept(f"{name}_drawn_{number}", lambda u=unet: draw(bench, peer_pipeline(u)))
            minutes = round(updates * whole["step_seconds"] / 60, 1)
            curve.append({"minutes": minutes, "updates": updates, "learning_rate": rate, **row})
        if curve[-1]["kernel_distance"] <= pilots[rate]["kernel_distance"]:
            break
        diverged[f"{rate:g}"] = curve
    weak = with_unet(WORK / "start" / "pipeline", unets[saved[CHECKPOINTS // 2 - 1]], WORK / "guiding")
    guided = kept(f"{name}_guided", lambda: draw(bench, peer_pipeline(WORK / name / "unet"), weak))
    figures = {"peer": curve, "peer_with_a_guide": guided}
    return {"precision": precision, "pilots": pilots, "diverged": diverged, **figures}


def train_peer(
    script: str, recipe: dict[str, Any], name: str, steps: int, rate: float, precision: str
) -> dict[str, Any]:
    """Train with diffusers' script into `WORK/name`."""
    words = {
        "pretrained_model_name_or_path": WORK / "start" / "pipeline", "dataset_name": WORK / "peer_dataset",
        "caption_column": "caption", "resolution": recipe["data"]["resolution"],
        "train_batch_size": recipe["train_unet"]["train_batch_size"], "learning_rate": rate, "lr_scheduler": "cosine",
        "lr_warmup_steps": round(WARMUP * steps), "max_train_steps": steps, "output_dir": WORK / name, "seed": 0,
        "cache_dir": WORK / "peer_cache", "report_to": REPORT, "checkpointing_steps": max(1, steps // CHECKPOINTS),
        "logging_dir": WORK / "peer_logs",
    }  # fmt: skip
    options = [text for key, value in words.items() for text in (f"--{key}", str(value))]
    environment = make_environment(WORK / "peer_environment") | {"ACCELERATE_MIXED_PRECISION": precision}
    seen = run([script, *options, "--random_flip", "--center_crop", "--use_ema"], environment, WORK)
    return {"step_seconds": statistics.median(seen.step_seconds), "updates": steps, "learning_rate": rate}


def peer_pipeline(unet: Path) -> Path:
    """Make a pipeline of the peer's UNet. The peer saves autoencoder and text encoder in the precision of its training."""
    return with_unet(WORK / "start" / "pipeline", unet, WORK / "drawing")


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


# --- Ours ------------------------------------------------------------------------------------------------------------


def measure_ours(
    way: str, name: str, updates: int, settings: dict[str, Any], recipe: dict[str, Any], start: dict[str, Any], bench: Bench
) -> list[dict[str, Any]]:  # fmt: skip
    """Train with our script, and draw without and with a guide: a row of the result each."""
    settings = settings | {"lr_warmup_steps": round(WARMUP * updates)}
    trained = kept(name, lambda: train_ours(recipe, WORK / name, updates, settings))
    pipeline = WORK / name / "pipeline"
    minutes = round((start["cache"] + trained["updates"] * trained["step_seconds"]) / 60, 1)
    known = {"minutes": minutes, "updates": trained["updates"], "step_seconds": trained["step_seconds"]}
    plain = kept(f"{name}_drawn", lambda: draw(bench, pipeline))
    weak = with_unet(pipeline, pipeline / "guide", WORK / "guiding")
    guided = kept(f"{name}_guided", lambda: draw(bench, pipeline, weak))
    return [{"way": way, **known, **plain}, {"way": f"{way}, with a guide", **known, **guided}]


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
