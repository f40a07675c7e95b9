"""Compare the caching of a training with the bare encoders, at the model card's sizes.

python benchmarks/cache.py [images] [rounds]

The arm `ours` is `cache_latents` and `cache_text` as train_unet.py calls them, from uint8 images and captions to files.
The arm `bare` is the same VAE and text encoder on tensors in memory, with the same batches and memory layout. Both arms
compute in fp32 and alternate within one run. The figures of the arms are medians.
"""

import statistics
import sys
import tempfile
import time

import numpy as np
from card_model import save_card_model
from common import ROOT, keep

BATCH = 32  # captions
SIDE = 128


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    import torch

    from t2i.data import caches
    from t2i.models import encode_captions
    from t2i.pictures import sampling

    pipeline = sampling.load_pipeline(save_card_model(ROOT / ".cache" / "benchmark_generate" / "model"))
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
    keep(
        "cache",
        {
            "ratio": min(ratios.values()), "goal": 0.9, "ratios": ratios, "images": images, "rounds": rounds,
            "images_per_second": {name: round(1 / value, 2) for name, value in medians.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
