"""Compare our training step with the bare step: the cost of data, EMA, clipping, schedule and logging.

python benchmarks/step_limit.py [blocks] [demo | card] [no | bf16]

The models have the demo's sizes, or the model card's with a batch of 8. Blocks of our steps and blocks of bare steps
alternate within one run. Our steps are those of `train_unet.py`'s own `train_step`, with logging to metrics.jsonl and
MLflow (SQLite). The bare steps are forward, backward and AdamW steps of an equal UNet in the same precision.
"""

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import keep

SIZES = {"demo": ("demo", 32, 10), "card": ("flowers", 8, 2)}  # recipe, batch, steps a block, of which one logs


def main() -> None:
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    size = sys.argv[2] if len(sys.argv) > 2 else "demo"
    os.environ["ACCELERATE_MIXED_PRECISION"] = sys.argv[3] if len(sys.argv) > 3 else "no"
    import torch

    import train_unet
    from t2i import config, models
    from t2i.tracking import mlflow_tracker
    from t2i.training import loop
    from t2i.training.distributed import keep_freed_memory, make_accelerator

    name, batch, steps = SIZES[size]
    recipe = config.load_recipe(name)
    settings = recipe.train_unet
    settings.train_batch_size, settings.max_train_steps, settings.logging_steps = batch, 10_000, steps
    accelerator = make_accelerator(settings)
    if accelerator.device.type != "cpu":
        sys.exit("this benchmark is of a CPU; run it with CUDA_VISIBLE_DEVICES= , or benchmarks/gpu.py for the GPU")
    keep_freed_memory(accelerator)
    side, channels = 16, recipe.vae.latent_channels
    width, length = (768, 77) if size == "card" else (recipe.unet.text_hidden_size, recipe.unet.text_max_length)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        count = 4000 if size == "demo" else 400
        trained, given, batches = make_training(recipe, accelerator, folder, count, channels, width, length)
        forward_backward = partial(train_unet.loss_and_gradients, trained, given, settings, accelerator)
        schedule = trained.schedule
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        tracker = mlflow_tracker.Tracker(
            folder / "run", experiment="bench", run_name="bench", config={}, tracking_uri=uri
        )

        bare = models.build_unet(recipe.unet, side, channels, width).train()
        if accelerator.mixed_precision == "bf16":  # as a training does
            for one in (trained.module, bare):
                models.use_plain_attention(one)
        bare_optimizer, _ = loop.build_optimizer(bare, settings, 10_000)
        noisy, target = torch.randn(batch, channels, side, side), torch.randn(batch, channels, side, side)
        timesteps, context = torch.randint(0, 1000, (batch,)), torch.randn(batch, length, width)

        def ours(start: int) -> None:
            for step in range(start, start + steps):
                loss, norm = update_weights(trained, batches, given, settings, step, accelerator, forward_backward)
                if (step + 1) % settings.logging_steps == 0:
                    row = {"train_loss": loss.item(), "grad_norm": float(norm), "lr": schedule.get_last_lr()[0]}
                    loop.record(row, step + 1, folder / "run", tracker, True)

        def limit() -> None:
            for _ in range(steps):
                with accelerator.autocast():
                    prediction = bare(noisy, timesteps, context).sample
                loss = (prediction.float() - target).square().mean()
                loss.backward()
                bare_optimizer.step()
                bare_optimizer.zero_grad()

        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        for block in range(blocks + 1):
            for arm in ("ours", "bare") if block % 2 else ("bare", "ours"):
                start = time.perf_counter()
                ours(block * steps) if arm == "ours" else limit()
                if block:  # the first warms up
                    seconds[arm].append((time.perf_counter() - start) / steps)
                else:
                    batches.waited = 0.0
        tracker.finish()
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    shown = {f"seconds_per_step_{arm}": round(value, 4) for arm, value in medians.items()}
    keep(
        "step_limit" if size == "demo" else f"step_limit_{size}_{accelerator.mixed_precision}",
        {
            "ratio": round(medians["ours"] / medians["bare"], 4), "goal": 1.05, "batch": batch, "blocks": blocks, **shown,
            "share_waiting_for_data": round(batches.waited / steps / sum(seconds["ours"]), 4),
        },
    )  # fmt: skip


def update_weights(
    trained: Any, batches: Any, given: Any, settings: Any, step: int, accelerator: Any, forward_backward: Any
) -> tuple[Any, float]:
    """Make one weight update of one micro-batch as the loop of train_unet.py does.

    Return the loss and the gradient norm of the update.
    """
    import train_unet
    from t2i.training import loop

    with accelerator.accumulate(trained.model):
        loss = forward_backward(*batches.take(step))["train_loss"]
    norm = loop.clip_gradients(trained, settings, accelerator)
    ids = partial(train_unet.sample_ids, given, settings, step, accelerator)
    loop.step_optimizer(trained, settings, step, norm, loss, ids, accelerator)
    return loss, norm


def make_training(
    recipe: Any, accelerator: Any, folder: Path, count: int, channels: int, width: int, length: int
) -> tuple[Any, Any, Any]:
    """Return the arguments of `update_weights` without a data set: caches of random numbers, and batches.

    Args:
        count: number of samples.
        channels: channels of the 16 x 16 latents.
        width: width of the text embeddings.
        length: length of the text embeddings.
    """
    import torch

    import train_unet
    from t2i import models
    from t2i.data.caches import TextCache
    from t2i.training import loop
    from t2i.training.prefetch import Prefetcher

    settings, side = recipe.train_unet, 16
    latents = stored(folder / "latents.npy", (count, 2, 2 * channels, side, side), np.float16)
    text = TextCache(
        stored(folder / "text.npy", (count, length, width), np.float16), np.arange(count), np.ones(count, np.int64)
    )
    unet = models.build_unet(recipe.unet, side, channels, width)
    if settings.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    unet.to(accelerator.device).train()
    parameters = list(unet.parameters())
    optimizer, schedule = loop.build_optimizer(unet, settings, 10_000)
    ema = loop.Average(parameters, decay=settings.ema_decay)
    model, optimizer = accelerator.prepare(torch.compile(unet) if settings.compile else unet, optimizer)
    trained = loop.TrainState("unet", unet, model, parameters, optimizer, schedule, ema)
    scheduler = models.build_noise_scheduler(recipe.unet)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(accelerator.device)
    given = train_unet.Inputs(scheduler, {"train": (latents, text)}, 1.0, [""] * count)
    batches = Prefetcher(partial(train_unet.make_batch, given, settings, accelerator), 10_000, accelerator.device)
    return trained, given, batches


def stored(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return a cache of random numbers, stored as the real ones are: on disk, memory-mapped, read-only."""
    np.save(path, np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype))
    return np.load(path, mmap_mode="r")


if __name__ == "__main__":
    main()
