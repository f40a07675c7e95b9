"""Compare train_unet.py with diffusers' train_text_to_image.py, each as its own process, at the model card's sizes.

python benchmarks/train.py path/to/diffusers/examples/text_to_image/train_text_to_image.py [steps] [rounds]
python benchmarks/train.py path/to/diffusers/examples/text_to_image/train_text_to_image.py tiny    rehearses it: small models

Both scripts train on the same drawn flowers at 128 px, from random weights, without gradient checkpointing and EMA. A
CPU takes batch 8 in fp32 and bf16, a GPU batch 32 in fp16 and bf16. Measurements of both scripts alternate. After the
measurements, our script trains alone for LOSS_STEPS from the same UNet, in each precision and in fp32, for the
validation losses. The peer, diffusers' script, runs unmodified. If torchvision is missing, it is installed for the peer
into a folder of its own. Seconds per step are the median between the lines that report steps, without the first ones;
the peer reports each step, our script every tenth. The measured time of caching is spread over ten epochs.
"""

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from card_model import save_card_model
from common import ROOT, SCRIPTS, keep

TINY = sys.argv[2:3] == ["tiny"]
WORK = ROOT / ".cache" / ("benchmark_train_tiny" if TINY else "benchmark_train")
TRACKING = f"sqlite:///{WORK / 'mlflow.db'}"
IMAGES = 128
EPOCHS = 10  # over which caching is counted
WARM = 2  # steps left out
OUR_STEPS = 3  # of ours for one of the peer's: it reports each tenth
LOGGED = 10  # steps between two of our lines, as by default
LOSS_STEPS = 40
TORCHVISION = "torchvision==0.28.0"
# The CPU build of torchvision is not on the index: this one's Python code runs once two schemas are declared.
SITE = """
import importlib.abc, sys


class Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            import torch

            sys.meta_path.remove(self)
            self.library = torch.library.Library("torchvision", "DEF")
            for schema in ("nms", "qnms"):
                self.library.define(f"{schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.kept = self


sys.meta_path.insert(0, Declare())
"""


@dataclass(frozen=True)
class Place:
    """The comparison's settings on a CPU or a GPU."""

    gpu: str | None  # Name of the GPU.
    batch: int
    precisions: tuple[str, str]
    steps: int  # Number of steps of the peer.
    goals: tuple[float | None, float | None]  # Goals of the ratio to the peer in each precision.


def find_place() -> Place:
    import torch

    if TINY:
        return Place(None, 2, ("no", "bf16"), 4, (None, None))
    if torch.cuda.is_available():
        return Place(torch.cuda.get_device_name(), 32, ("fp16", "bf16"), 80, (None, None))
    return Place(None, 8, ("no", "bf16"), 8, (5.0, 2.3))


PLACE = find_place()
REPORT = "mlflow" if importlib.util.find_spec("mlflow") else "tensorboard"  # of the peer, which wants one


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"name diffusers' script: {__doc__.splitlines()[2]}" if __doc__ else "")
    peer = Path(sys.argv[1]).resolve()
    steps = int(sys.argv[2]) if len(sys.argv) > 2 and not TINY else PLACE.steps
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 1 if TINY else 2
    WORK.mkdir(parents=True, exist_ok=True)
    model = save_card_model(WORK / "model", tiny=TINY)
    dataset = draw(WORK / "dataset")
    environment = make_environment(WORK / "peer_environment")
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[int]] = {}
    caching: dict[str, float] = {}  # seconds an image
    shutil.rmtree(WORK / "ours_cache", ignore_errors=True)  # measured anew
    for number in range(rounds):
        for precision in PLACE.precisions:
            for arm in ("peer", "ours") if number % 2 else ("ours", "peer"):
                words = [str(peer)] if arm == "peer" else [str(SCRIPTS / "train_unet.py")]
                words += peer_arguments(model, dataset) if arm == "peer" else our_arguments(model, dataset)
                words += [
                    "--max_train_steps",
                    str(steps if arm == "peer" else LOGGED * max(3, OUR_STEPS * steps // LOGGED)),
                ]
                base = environment if arm == "peer" else dict(os.environ)
                found = run(words, base | {"ACCELERATE_MIXED_PRECISION": precision, "MLFLOW_TRACKING_URI": TRACKING})
                seconds.setdefault(f"{arm}_{precision}", []).extend(found.step_seconds)
                peaks.setdefault(f"{arm}_{precision}", []).append(found.peak_rss_bytes)
                took = round(statistics.median(found.step_seconds), 4)
                row = {"arm": arm, "precision": precision, "batch": PLACE.batch, "seconds_per_step": took}
                print(json.dumps(row), flush=True)  # a run that is cut short has told what it measured
                if arm == "ours" and precision not in caching:
                    state = json.loads((WORK / "ours" / "run.json").read_text())
                    caching[precision] = state["seconds"]["cache"] / IMAGES
    losses = {}
    for precision in dict.fromkeys(("no", *PLACE.precisions)):
        words = [str(SCRIPTS / "train_unet.py"), *our_arguments(model, dataset), "--max_train_steps", str(LOSS_STEPS)]
        words += ["--learning_rate", "1e-4"]
        run(words, dict(os.environ) | {"ACCELERATE_MIXED_PRECISION": precision, "MLFLOW_TRACKING_URI": TRACKING})
        losses[precision] = json.loads((WORK / "ours" / "run.json").read_text())["val_loss"]
        row = {"arm": "ours", "precision": precision, "steps": LOSS_STEPS, "validation_loss": losses[precision]}
        print(json.dumps(row), flush=True)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    best = min(PLACE.precisions, key=lambda one: medians[f"ours_{one}"])
    ours = medians[f"ours_{best}"]
    each = ours / PLACE.batch
    epochs = EPOCHS * each / (caching[best] + EPOCHS * each)  # the share of the time that is training
    first, second = (medians[f"peer_{one}"] / ours for one in PLACE.precisions)
    keep(
        "train_tiny" if TINY else "train_gpu" if PLACE.gpu else "train",
        {
            "ratio": round(first, 3), "goal": PLACE.goals[0], f"ratio_to_{PLACE.precisions[1]}": round(second, 3),
            f"goal_to_{PLACE.precisions[1]}": PLACE.goals[1], "ratio_with_caching_10_epochs": round(first * epochs, 3),
            "caching_seconds_per_image": {arm: round(value, 4) for arm, value in caching.items()},
            "peak_rss_bytes": {arm: max(values) for arm, values in peaks.items()},
            "samples_per_second": round(PLACE.batch / ours, 3),
            "seconds_per_step": {arm: round(value, 4) for arm, value in medians.items()},
            "validation_loss": {**losses, "steps": LOSS_STEPS},
            **{f"validation_loss_{one}_to_fp32": losses[one] / losses["no"] for one in losses if one != "no"},
            "batch": PLACE.batch, "steps": steps, "rounds": rounds,
        },
        PLACE.gpu,
    )  # fmt: skip


def draw(folder: Path) -> Path:
    if not folder.is_dir():
        words = ["--output_dir", folder, "--count", IMAGES, "--validation_count", 16, "--test_count", 16, "--size", 128]
        subprocess.run([sys.executable, SCRIPTS / "make_flowers.py", *map(str, words)], check=True)
    return folder


def make_environment(folder: Path) -> dict[str, str]:
    """Make the peer's environment: torchvision in a folder that only the peer sees, unless it is installed."""
    if importlib.util.find_spec("torchvision"):
        return os.environ | {"HF_HUB_OFFLINE": "1"}
    if not (folder / "torchvision").is_dir():
        words = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TORCHVISION]
        subprocess.run([sys.executable, *words], check=True)
    (folder / "sitecustomize.py").write_text(SITE)
    return os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


def peer_arguments(model: Path, dataset: Path) -> list[str]:
    words = {
        "pretrained_model_name_or_path": model, "dataset_name": dataset, "caption_column": "caption", "resolution": 128,
        "train_batch_size": PLACE.batch, "learning_rate": 1e-5, "max_grad_norm": 0.5, "lr_warmup_steps": 0,
        "output_dir": WORK / "peer", "cache_dir": WORK / "peer_cache", "seed": 0, "report_to": REPORT,
    }  # fmt: skip
    return [
        *(text for key, value in words.items() for text in (f"--{key}", str(value))),
        "--random_flip",
        "--center_crop",
    ]


def our_arguments(model: Path, dataset: Path) -> list[str]:
    """Return our script's arguments for the peer's training, in a new run folder.

    Later runs reuse the caches of the first run.
    """
    shutil.rmtree(WORK / "ours", ignore_errors=True)
    recipe = yaml.safe_load((SCRIPTS / "recipes" / "flowers.yaml").read_text())
    recipe["data"] = {"dataset": str(dataset), "resolution": 128, "cache_dir": str(WORK / "ours_cache")}
    recipe["vae"] = {"vae": str(model)}
    recipe["unet"] |= {"pretrained_model_name_or_path": str(model), "text_encoder": str(model)}
    recipe["train_unet"] |= {
        "train_batch_size": PLACE.batch, "learning_rate": 1e-5, "max_grad_norm": 0.5, "lr_warmup_steps": 0, "seed": 0,
        "use_ema": False, "logging_steps": LOGGED, "validation_images": 16, "validation_prompts": [],
        "report_to": "mlflow" if REPORT == "mlflow" else "none",
        "output_dir": str(WORK / "ours"),
    }  # fmt: skip
    (WORK / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(WORK / "recipe.yaml")]


@dataclass
class Measured:
    """Measurements of a training's process."""

    step_seconds: list[float]  # Seconds between the lines that report steps, without the first lines.
    peak_rss_bytes: int  # Peak of resident memory.


def run(words: list[str], environment: dict[str, str], folder: Path = WORK) -> Measured:
    """Run a training script in `folder` and measure it.

    Raises `RuntimeError` with the script's last lines if the script fails.
    """
    environment |= {"PYTHONUNBUFFERED": "1"} | ({} if PLACE.gpu else {"ACCELERATE_USE_CPU": "true"})
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout
    said, times, last = b"", {}, b""
    while chunk := os.read(process.stdout.fileno(), 4096):
        said += chunk
        # the peer's bar says "Steps:  25%|… 2/8 [", ours prints "step 2: "
        for found in re.finditer(rb"Steps:[^\r\n]*?(\d+)/\d+ \[|step (\d+): train_loss", said):
            number = int(found[1] or found[2])
            times.setdefault(number, time.perf_counter())
        last = said[-3000:]
        said = said[-400:]
    _, status, usage = os.wait4(process.pid, 0)  # which tells this process's memory, as no other call does
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}: {last.decode(errors='replace')}")
    known = sorted((number, at) for number, at in times.items() if number >= WARM)
    return Measured([(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(known)], 1024 * usage.ru_maxrss)


if __name__ == "__main__":
    main()
