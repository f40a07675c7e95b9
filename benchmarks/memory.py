"""Measure peak resident memory at the model card's sizes: training beside diffusers' script, and drawing by each engine.

python benchmarks/memory.py [path/to/diffusers/examples/text_to_image/train_text_to_image.py]

Each measured command runs in a process of its own. train_unet.py runs in fp32 and in bf16: caching, then two steps of
batch 8 without EMA. diffusers' script also makes two steps of batch 8, if its path is given. generate_images.py draws
by PyTorch and by compiled models. Mapped files count as resident, so caches and compiled models are included. On a GPU,
use `nvidia-smi` for device memory.
"""

import os
import shutil
import sys
from pathlib import Path

from card_model import save_card_model
from common import SCRIPTS, keep
from train import TRACKING, WORK, draw, make_environment, our_arguments, peer_arguments, run

STEPS = 2


def main() -> None:
    peer = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None
    if peer and not peer.is_file():
        sys.exit(f"there is no {peer}; name diffusers' script, or leave it out")
    WORK.mkdir(parents=True, exist_ok=True)
    model, dataset = save_card_model(WORK / "model"), draw(WORK / "dataset")
    peaks: dict[str, int] = {}

    def measure(name: str, words: list[str], environment: dict[str, str]) -> None:
        peaks[name] = run(words, environment | {"MLFLOW_TRACKING_URI": TRACKING}).peak_rss_bytes
        print(f"{name}: {peaks[name] / 1e9:.2f} GB", flush=True)

    for precision in ("no", "bf16"):
        shown = {"no": "fp32"}.get(precision, precision)
        inside = {"ACCELERATE_MIXED_PRECISION": precision}
        shutil.rmtree(WORK / "ours_cache", ignore_errors=True)
        words = [str(SCRIPTS / "train_unet.py"), *our_arguments(model, dataset), "--max_train_steps", str(STEPS)]
        measure(f"train_ours_{shown}", words, os.environ | inside)
        if peer:
            words = [str(peer), *peer_arguments(model, dataset), "--max_train_steps", str(STEPS)]
            measure(f"train_peer_{shown}", words, make_environment(WORK / "peer_environment") | inside)
    run([str(SCRIPTS / "export_pipeline.py"), "--model", str(model)], dict(os.environ))
    for engine in ("torch", "openvino"):
        words = ["--model", model, "--prompt", "a red flower", "--output_dir", WORK / "pictures", "--engine", engine]
        measure(f"picture_{engine}", [str(SCRIPTS / "generate_images.py"), *map(str, words)], dict(os.environ))
    ratio = round(peaks["train_peer_bf16"] / peaks["train_ours_bf16"], 2) if peer else None
    keep("memory", {"ratio": ratio, "goal": 1.0, "peak_rss_bytes": peaks, "steps": STEPS})


if __name__ == "__main__":
    main()
