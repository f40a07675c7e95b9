"""Compare the caching of a training with the bare encoders, and two processes with one, at the model card's sizes.

python benchmarks/cache.py [images] [rounds]

The arm `ours` is `cache_latents` and `cache_text` as train_unet.py calls them, from uint8 images and captions to files.
The arm `bare` is the same VAE and text encoder on tensors in memory, with the same batches and memory layout. Both arms
compute in fp32 and alternate within one run. The figures of the arms are medians.

`two_processes` computes the latents of four times as many images by two processes of one thread each, as a launch of two
processes does. It is compared with one process of one thread. The time from a common start to the last end counts.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
from card_model import save_card_model
from common import ROOT, keep

BATCH = 32  # captions
SIDE = 128
MODEL = ROOT / ".cache" / "benchmark_generate" / "model"


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    import torch

    from t2i.data import caches
    from t2i.models import encode_captions
    from t2i.pictures import sampling

    pipeline = sampling.load_pipeline(save_card_model(MODEL))
    vae, text_encoder, tokenizer = pipeline.vae.eval(), pipeline.text_encoder.eval(), pipeline.tokenizer
    del pipeline
    vae.to(memory_format=torch.channels_last)  # as train_unet.py does
    few = caches.CPU_BATCH_PIXELS // SIDE**2
    pixels = np.random.default_rng(0).integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)
    captions = [f"a photo of flower number {number}" for number in range(images - 1)]  # and the empty one
    tensors = caches.to_pixels(pixels)
    seconds: dict[str, list[float]] = {}

    @torch.no_grad()
    def bare(what: str) -> None:
        if what == "latents":
            for some in tensors.split(few):
                vae.encode(some)
        else:
            for start in range(0, images, BATCH):
                encode_captions(text_encoder, tokenizer, ["", *captions][start : start + BATCH])

    def ours(what: str, folder: str) -> None:
        if what == "latents":
            caches.cache_latents(pixels, {}, vae, folder, flip=False, say=lambda _: None)
        else:
            texts = [[caption] for caption in captions]
            caches.cache_text(texts, {}, text_encoder, tokenizer, folder, batch_size=BATCH, say=lambda _: None)

    for number in range(rounds + 1):
        for what in ("latents", "text"):
            for arm in ("ours", "bare") if number % 2 else ("bare", "ours"):
                with tempfile.TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    ours(what, folder) if arm == "ours" else bare(what)
                    if number:  # the first warms up
                        seconds.setdefault(f"{what}_{arm}", []).append((time.perf_counter() - start) / images)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {what: round(medians[f"{what}_bare"] / medians[f"{what}_ours"], 3) for what in ("latents", "text")}
    together: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for processes, taken in together.items():
            taken.append(cache_together(processes, 4 * images))
    two_processes = round(statistics.median(together[1]) / statistics.median(together[2]), 2)
    keep(
        "cache",
        {
            "ratio": min(ratios.values()), "goal": 0.9, "ratios": ratios, "images": images, "rounds": rounds,
            "two_processes": {"ratio": two_processes, "goal": 1.8, "images": 4 * images, "seconds": together},
            "images_per_second": {name: round(1 / value, 2) for name, value in medians.items()},
        },
    )  # fmt: skip


def cache_together(processes: int, images: int) -> float:
    """Return the seconds in which some processes of one thread each compute the latents of images together."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes + 1)
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=take_part, args=(folder, images, start)) for _ in range(processes)]
        for worker in workers:
            worker.start()
        start.wait()
        begin = time.perf_counter()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            sys.exit("a process of the benchmark failed; its traceback is above")
        return time.perf_counter() - begin


def take_part(folder: str, images: int, start: Any) -> None:
    """Compute latents together with the other processes of `cache_together`, after the common start."""
    import torch

    from t2i.data import caches
    from t2i.pictures import sampling

    torch.set_num_threads(1)
    vae = sampling.load_pipeline(save_card_model(MODEL)).vae.eval().to(memory_format=torch.channels_last)
    pixels = np.random.default_rng(0).integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)
    with torch.no_grad():
        vae.encode(caches.to_pixels(pixels[:1]))  # warms up
    start.wait()
    caches.cache_latents(pixels, {}, vae, folder, flip=False, say=lambda _: None)


if __name__ == "__main__":
    main()
