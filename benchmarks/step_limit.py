"""Our training step against the bare step: what data, EMA, clipping, schedule and logging cost.

python benchmarks/step_limit.py [blocks]

At the demo's size and batch, in one run: blocks of ten steps of `train_unet.py`'s own `train_step`, with its logging to
metrics.jsonl and MLflow (SQLite), alternate with blocks of ten bare forward, backward and AdamW steps of an equal UNet.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import keep

STEPS = 10  # a block: one of them logs


def main() -> None:
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    import torch
    from diffusers.training_utils import EMAModel

    import train_unet
    from t2i import config, models, tracking, training
    from t2i.caches import TextCache
    from t2i.distributed import make_accelerator

    recipe = config.load_recipe("demo")
    settings = recipe.train_unet
    settings.max_train_steps = 10_000
    accelerator = make_accelerator(settings)
    scheduler = models.build_noise_scheduler(recipe.unet)
    side, channels, width = 16, recipe.vae.latent_channels, recipe.unet.text_hidden_size

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = {"train": (stored(folder / "latents.npy", (4000, 2, 2 * channels, side, side), np.float32),
                            TextCache(stored(folder / "text.npy", (4000, recipe.unet.text_max_length, width), np.float16),
                                      np.arange(4000)))}  # fmt: skip
        unet = models.build_unet(recipe.unet, side, channels, width).train()
        parameters = list(unet.parameters())
        optimizer, schedule = training.build_optimizer(parameters, settings, 10_000)
        ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
        model, optimizer = accelerator.prepare(unet, optimizer)
        trained = training.Trained("unet", unet, model, parameters, optimizer, schedule, ema)
        given = train_unet.Inputs(scheduler, caches, 1.0, [""] * 4000)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        tracker = tracking.Tracker(folder / "run", experiment="bench", run_name="bench", config={}, tracking_uri=uri)

        bare = models.build_unet(recipe.unet, side, channels, width).train()
        bare_optimizer, _ = training.build_optimizer(bare.parameters(), settings, 10_000)
        batch = settings.train_batch_size
        noisy, target = torch.randn(batch, channels, side, side), torch.randn(batch, channels, side, side)
        timesteps, context = torch.randint(0, 1000, (batch,)), torch.randn(batch, recipe.unet.text_max_length, width)

        def ours(start: int) -> None:
            for step in range(start, start + STEPS):
                loss, norm = train_unet.train_step(trained, given, settings, step, accelerator)
                if (step + 1) % settings.logging_steps == 0:
                    row = {"train_loss": loss.item(), "grad_norm": float(norm), "lr": schedule.get_last_lr()[0]}
                    train_unet.record(row, step + 1, folder / "run", tracker, True)

        def limit() -> None:
            for _ in range(STEPS):
                loss = (bare(noisy, timesteps, context).sample - target).square().mean()
                loss.backward()
                bare_optimizer.step()
                bare_optimizer.zero_grad()

        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        for block in range(blocks + 1):
            for arm in ("ours", "bare") if block % 2 else ("bare", "ours"):
                start = time.perf_counter()
                ours(block * STEPS) if arm == "ours" else limit()
                if block:  # the first warms up
                    seconds[arm].append((time.perf_counter() - start) / STEPS)
        tracker.finish()
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    shown = {f"seconds_per_step_{arm}": round(value, 4) for arm, value in medians.items()}
    keep(
        "step_limit",
        {"ratio": round(medians["ours"] / medians["bare"], 4), "goal": 1.05, "batch": batch, "blocks": blocks, **shown},
    )


def stored(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A cache of random numbers as the real ones are: on disk, memory-mapped, read-only."""
    np.save(path, np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype))
    return np.load(path, mmap_mode="r")


if __name__ == "__main__":
    main()
