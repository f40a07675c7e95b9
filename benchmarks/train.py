"""train_unet.py against diffusers' train_text_to_image.py, each as its own process, at the model card's sizes.

python benchmarks/train.py path/to/diffusers/examples/text_to_image/train_text_to_image.py [steps] [rounds]

The same drawn flowers, models with random weights, 128 px, batch 8, no gradient checkpointing, no EMA, in fp32 and in bf16,
alternating; then ours alone in both precisions for LOSS_STEPS from the same UNet, for their validation losses. The peer runs
unmodified; it needs torchvision, which is put into a folder of its own. A step's seconds are the median between the lines in
which the processes report their steps (the peer each, ours every tenth), the first ones left out. Caching counts as
measured, over ten epochs.
"""

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

WORK = ROOT / ".cache" / "benchmark_train"
TRACKING = f"sqlite:///{WORK / 'mlflow.db'}"
IMAGES = 128
EPOCHS = 10  # over which caching is counted
BATCH = 8
WARM = 2  # steps left out
LOGGED = 10  # steps between two of our lines, as by default
LOSS_STEPS = 40
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


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"name diffusers' script: {__doc__.splitlines()[2]}" if __doc__ else "")
    peer = Path(sys.argv[1]).resolve()
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    WORK.mkdir(parents=True, exist_ok=True)
    model = save_card_model(WORK / "model")
    dataset = draw(WORK / "dataset")
    environment = make_environment(WORK / "peer_environment")
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[int]] = {}
    caching: dict[str, float] = {}  # seconds an image
    shutil.rmtree(WORK / "ours_cache", ignore_errors=True)  # measured anew
    for number in range(rounds):
        for precision in ("no", "bf16"):
            for arm in ("peer", "ours") if number % 2 else ("ours", "peer"):
                words = [str(peer)] if arm == "peer" else [str(SCRIPTS / "train_unet.py")]
                words += peer_arguments(model, dataset) if arm == "peer" else our_arguments(model, dataset)
                words += ["--max_train_steps", str(steps if arm == "peer" else LOGGED * (steps // 4 + 1))]
                base = environment if arm == "peer" else dict(os.environ)
                found = run(words, base | {"ACCELERATE_MIXED_PRECISION": precision, "MLFLOW_TRACKING_URI": TRACKING})
                seconds.setdefault(f"{arm}_{precision}", []).extend(found.step_seconds)
                peaks.setdefault(f"{arm}_{precision}", []).append(found.peak_rss_bytes)
                print(f"{arm} {precision}: {statistics.median(found.step_seconds):.2f} s a step", flush=True)
                if arm == "ours" and precision not in caching:
                    state = json.loads((WORK / "ours" / "run.json").read_text())
                    caching[precision] = state["seconds"]["cache"] / IMAGES
    losses = {}
    for precision in ("no", "bf16"):
        words = [str(SCRIPTS / "train_unet.py"), *our_arguments(model, dataset), "--max_train_steps", str(LOSS_STEPS)]
        words += ["--learning_rate", "1e-4"]
        run(words, dict(os.environ) | {"ACCELERATE_MIXED_PRECISION": precision, "MLFLOW_TRACKING_URI": TRACKING})
        losses[precision] = json.loads((WORK / "ours" / "run.json").read_text())["val_loss"]
        print(f"ours {precision}: validation loss {losses[precision]:.5f} after {LOSS_STEPS} steps", flush=True)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    precision = "no" if medians["ours_no"] < medians["ours_bf16"] else "bf16"
    best = medians[f"ours_{precision}"]
    each = best / BATCH
    epochs = EPOCHS * each / (caching[precision] + EPOCHS * each)  # the share of the time that is training
    keep(
        "train",
        {
            "ratio": round(medians["peer_no"] / best, 3), "goal": 5.0,
            "ratio_to_bf16": round(medians["peer_bf16"] / best, 3), "goal_to_bf16": 2.3,
            "ratio_with_caching_10_epochs": round(medians["peer_no"] / best * epochs, 3),
            "caching_seconds_per_image": {arm: round(value, 4) for arm, value in caching.items()},
            "peak_rss_bytes": {arm: max(values) for arm, values in peaks.items()},
            "samples_per_second": round(BATCH / best, 3),
            "seconds_per_step": {arm: round(value, 3) for arm, value in medians.items()},
            "validation_loss": {**losses, "steps": LOSS_STEPS}, "validation_loss_bf16_to_fp32": losses["bf16"] / losses["no"],
            "batch": BATCH, "steps": steps, "rounds": rounds,
        },
    )  # fmt: skip


def draw(folder: Path) -> Path:
    if not folder.is_dir():
        words = ["--output_dir", folder, "--count", IMAGES, "--validation_count", 16, "--test_count", 16, "--size", 128]
        subprocess.run([sys.executable, SCRIPTS / "make_flowers.py", *map(str, words)], check=True)
    return folder


def make_environment(folder: Path) -> dict[str, str]:
    """The peer's own environment: torchvision in a folder that no other process sees."""
    if not (folder / "torchvision").is_dir():
        words = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "torchvision==0.28.0"]
        subprocess.run([sys.executable, *words], check=True)
    (folder / "sitecustomize.py").write_text(SITE)
    return os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


def peer_arguments(model: Path, dataset: Path) -> list[str]:
    words = {
        "pretrained_model_name_or_path": model, "dataset_name": dataset, "caption_column": "caption", "resolution": 128,
        "train_batch_size": BATCH, "learning_rate": 1e-5, "max_grad_norm": 0.5, "lr_warmup_steps": 0,
        "output_dir": WORK / "peer", "cache_dir": WORK / "peer_cache", "seed": 0, "report_to": "mlflow",
    }  # fmt: skip
    return [
        *(text for key, value in words.items() for text in (f"--{key}", str(value))),
        "--random_flip",
        "--center_crop",
    ]


def our_arguments(model: Path, dataset: Path) -> list[str]:
    """The same, in a new run folder; what a run has cached serves the next one."""
    shutil.rmtree(WORK / "ours", ignore_errors=True)
    recipe = yaml.safe_load((SCRIPTS / "recipes" / "flowers.yaml").read_text())
    recipe["data"] = {"dataset": str(dataset), "resolution": 128, "cache_dir": str(WORK / "ours_cache")}
    recipe["vae"] = {"vae": str(model)}
    recipe["unet"] |= {"pretrained_model_name_or_path": str(model), "text_encoder": str(model)}
    recipe["train_unet"] |= {
        "train_batch_size": BATCH, "learning_rate": 1e-5, "max_grad_norm": 0.5, "lr_warmup_steps": 0, "seed": 0,
        "use_ema": False, "logging_steps": LOGGED, "validation_images": 16, "validation_prompts": [], "report_to": "mlflow",
        "output_dir": str(WORK / "ours"),
    }  # fmt: skip
    (WORK / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(WORK / "recipe.yaml")]


@dataclass
class Measured:
    """What a process took."""

    step_seconds: list[float]  # between the lines in which it says its steps, the first ones left out
    peak_rss_bytes: int  # of resident memory


def run(words: list[str], environment: dict[str, str], folder: Path = WORK) -> Measured:
    """Run a training script in `folder` and measure it. Raises `RuntimeError` with its last lines if it fails."""
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
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
