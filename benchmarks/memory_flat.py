"""Check that memory does not grow with the data set: RssAnon of `train_unet.py` at 2,000 and 20,000 images.

python benchmarks/memory_flat.py [small count] [large count]

At the start, images of 32 px are drawn and an untrained VAE is made. The script train_unet.py then caches and trains
one epoch, with validation and a checkpoint. RssAnon in /proc/<pid>/status is sampled ten times per second, and its
highest values are compared.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import SCRIPTS, keep, run_script

RECIPE = """
data: {resolution: 32}
vae: {vae_channels: [8, 8], vae_layers: 1}
unet:
  text_hidden_size: 64
  unet_channels: [16, 32]
  unet_layers: 1
  down_block_types: [DownBlock2D, CrossAttnDownBlock2D]
  attention_head_dim: 2
train_vae: {max_train_steps: 5, lr_warmup_steps: 1, report_to: none}
train_unet:
  train_batch_size: 50
  num_train_epochs: 1
  lr_warmup_steps: 1
  checkpointing_steps: 100000
  validation_steps: 100000
  report_to: none
"""


def peak_anonymous_bytes(words: list[str], cwd: Path) -> int:
    """Run a command and return the highest RssAnon of its process, in bytes."""
    process = subprocess.Popen(
        words, cwd=cwd, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, stdout=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
        except (OSError, ValueError):
            pass  # it ends between two looks
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{words} ended with {process.returncode}")
    return peak


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [2000, 20000]
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        (cwd / "recipe.yaml").write_text(RECIPE)
        for count in counts:
            run_script("make_flowers.py", "--output_dir", f"data{count}", "--count", count, "--size", 32, cwd=cwd)
            if not (cwd / "vae").is_dir():
                run_script(
                    "train_vae.py",
                    "--config",
                    "recipe.yaml",
                    "--dataset",
                    f"data{count}",
                    "--output_dir",
                    "vae",
                    cwd=cwd,
                )
            options = ["--config", "recipe.yaml", "--dataset", f"data{count}", "--vae", "vae", "--output_dir", f"unet{count}",
                       "--cache_dir", f"cache{count}"]  # fmt: skip
            peaks.append(peak_anonymous_bytes([sys.executable, str(SCRIPTS / "train_unet.py"), *options], cwd))
            print(f"{count} images: {peaks[-1] / 2**20:.0f} MiB of anonymous memory at most", flush=True)
    keep(
        "memory_flat", {"ratio": round(peaks[1] / peaks[0], 3), "goal": 1.10, "images": counts, "rss_anon_bytes": peaks}
    )


if __name__ == "__main__":
    main()
