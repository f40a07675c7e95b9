"""Train the model card's UNet from cached latents on one GPU: samples/s, share of the GPU's peak, and memory.

python benchmarks/gpu.py [short | tiny]

With `short`, the benchmark measures the most important figures in a minute or two, without compiling. With `tiny`, the
benchmark is rehearsed on a CPU.

The rows of the result are batches and precisions. The measured steps are those of `train_unet.py`'s own `train_step`
with the recipe `flowers`: batches made in the script's thread, clipping, AdamW, schedule and moving average. Each arm
runs in a process of its own: kernels started one by one, one CUDA graph (the default), and a graph of what
torch.compile made. The peak of the GPU is measured beforehand, by a bf16 product of 8192 x 8192 matrices. torch's
FlopCounterMode counts the operations of products, convolutions and attention.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import SCRIPTS, keep
from step_limit import make_training, update_weights

# arm: options of section train_unet
ARMS: dict[str, dict[str, Any]] = {
    "kernels": {"cuda_graphs": False},
    "graph": {},
    "graph_channels_last": {"channels_last": True},
    "graph_compiled": {"compile": True},
}
# what is measured: arm, precision, batches; each batch is compiled anew, for minutes
PLANS = {
    "full": [
        ("kernels", "bf16", [32, 256]), ("kernels", "fp16", [32]), ("graph", "bf16", [8, 32, 128, 512, 1024]),
        ("graph", "fp16", [32, 512]), ("graph_channels_last", "bf16", [32, 512]), ("graph_compiled", "bf16", [32, 256]),
    ],
    "short": [
        ("graph", "bf16", [32, 512]), ("kernels", "bf16", [32]), ("graph", "fp16", [32, 512]), ("kernels", "fp16", [32]),
    ],
    "tiny": [("graph", "no", [2])],
}  # fmt: skip
WARM, STEPS, BLOCKS = 6, 10, 3


def main(plan: str) -> None:
    if plan not in PLANS:
        sys.exit(f"unknown plan {plan}; take {', '.join(PLANS)}")
    import torch

    if not torch.cuda.is_available() and plan != "tiny":
        sys.exit("this benchmark wants an NVIDIA GPU, and PyTorch finds none")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = product_tflops() if name else product_tflops(64, "cpu")
    print(f"{name or 'CPU'}: {peak:.0f} TFLOP/s in a product of matrices in bf16", flush=True)
    rows = [row for arm, precision, batches in PLANS[plan] for row in launch(arm, precision, batches)]
    if not rows:
        sys.exit("no arm was measured; the lines above say why")
    for row in rows:
        row["share_of_peak"] = round(row["tflops"] / peak, 3)
    at = {(row["arm"], row["precision"], row["batch"]): row["samples_per_second"] for row in rows}
    ratio = at.get(("graph", "bf16", 32), 0) / at.get(("kernels", "bf16", 32), float("inf"))
    keep(
        "gpu" if plan == "full" else f"gpu_{plan}",
        {"ratio": round(ratio, 3), "goal": None, "peak_tflops_bf16": round(peak), "arms": rows},
        name,
    )


def product_tflops(side: int = 8192, device: str = "cuda") -> float:
    """Measure the TFLOP/s of a product of two random bf16 matrices."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * side**3 / statistics.median(seconds[2:]) / 1e12


def wait(device: str) -> None:
    """Wait until a GPU has finished its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def launch(arm: str, precision: str, batches: list[int]) -> list[dict[str, Any]]:
    """Return an arm's rows, one per batch, and print each at once.

    A failure of a row, such as full memory, is printed and ends the arm.
    """
    words = [sys.executable, __file__, "--one", arm, precision, *map(str, batches)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    rows = []
    for line in process.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            print(line, end="", flush=True)
    if process.wait():
        print(f"{arm} in {precision} ended with {process.returncode} after {len(rows)} batches", flush=True)
    return rows


def one(arm: str, precision: str, batches: list[int]) -> None:
    """Measure an arm at several batches, and print a line of JSON for each."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    sys.path.append(str(SCRIPTS))
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import train_unet
    from t2i import config
    from t2i.training.cuda_graph import capture
    from t2i.training.distributed import make_accelerator

    on_gpu = torch.cuda.is_available()
    recipe = config.load_recipe("flowers" if on_gpu else "demo")
    warm, steps, blocks, samples = (WARM, STEPS, BLOCKS, 2048) if on_gpu else (1, 1, 1, 16)
    settings = recipe.train_unet
    settings.max_train_steps = 10_000
    for name, value in ARMS[arm].items():
        setattr(settings, name, value)
    accelerator = make_accelerator(settings)
    for batch in batches:
        settings.train_batch_size = batch
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as place:
            trained, given, ahead = make_training(recipe, accelerator, Path(place), max(samples, batch), 4, 768, 77)
            example = train_unet.make_batch(given, settings, accelerator, 0)
            with FlopCounterMode(display=False) as counter:
                noisy, _, timesteps, context = (tensor[:1] for tensor in example)
                trained.module(noisy, timesteps, context).sample.sum().backward()
            trained.optimizer.zero_grad()
            start = time.perf_counter()
            compute = partial(train_unet.loss_and_gradients, trained, given, settings, accelerator)
            forward_backward = capture(compute, lambda made=example: made, trained, settings, accelerator)
            seconds, step = [], 0
            for block in range(blocks + 1):
                for _ in range(steps if block else warm):
                    update_weights(trained, ahead, given, settings, step, accelerator, forward_backward)
                    step += 1
                wait(accelerator.device.type)
                if block:
                    seconds.append((time.perf_counter() - start) / steps)
                else:
                    first, ahead.waited = time.perf_counter() - start, 0.0
                start = time.perf_counter()
            took, waited = statistics.median(seconds), ahead.waited / blocks / steps
        flops = counter.get_total_flops() * batch
        row = {
            "arm": arm, "precision": precision, "batch": batch, "milliseconds_per_step": round(1000 * took, 2),
            "samples_per_second": round(batch / took, 1), "tflops": round(flops / took / 1e12, 1),
            "share_waiting_for_data": round(waited / took, 4), "peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
            "seconds_before": round(first, 1),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        del trained, given, ahead, example, forward_backward, compute
        accelerator.free_memory()  # which knows of each model that it has prepared
        gc.collect()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:  # the same file is the process of one arm
        one(sys.argv[2], sys.argv[3], [int(batch) for batch in sys.argv[4:]])
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "full")
