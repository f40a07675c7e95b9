"""Measure what each term of the autoencoder's training adds to a step.

python benchmarks/vae_terms.py     (one thread: OMP_NUM_THREADS=1)

Each row trains the same autoencoder on the same random images. Rounds of all rows take turns, and the fastest round of a row is
its figure. Processor time is the figure to compare on a machine that other work shares.
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, describe_machine

from t2i import models
from t2i.config import load_recipe
from t2i.training import loop
from t2i.training.discriminator import Discriminator
from t2i.training.distributed import make_accelerator
from t2i.training.perceptual import PerceptualNetwork
from train_vae import loss_and_gradients, step_options

ROWS: dict[str, dict[str, Any]] = {
    "no further term": {},
    "perceptual term": {"perceptual_weight": 0.1},
    "patch discriminator": {"adversarial_weight": 0.5},
    "equivariance on all batches": {"equivariance_share": 1.0},
    "decoder alone": {"decoder_only_steps": 10**6},
    "decoder alone, perceptual term and discriminator": {
        "decoder_only_steps": 10**6,
        "perceptual_weight": 0.1,
        "adversarial_weight": 0.5,
    },
}


class Training:
    """An autoencoder that is trained by one row's settings."""

    def __init__(self, recipe: Any, side: int, settings: dict[str, Any]):
        self.config = dataclasses.replace(recipe.train_vae, crop_size=None, cuda_graphs=False, **settings)
        self.side, self.number = side, 0
        self.accelerator = make_accelerator(self.config)
        vae = models.build_vae(recipe.vae)
        loop.place_model(vae, self.config, self.accelerator)
        parameters = list(vae.parameters())
        optimizer, schedule = loop.build_optimizer(vae, self.config, 10**6)
        model, optimizer = self.accelerator.prepare(models.Autoencoder(vae), optimizer)
        device = self.accelerator.device
        adversary = Discriminator(self.config, device) if self.config.adversarial_weight else None
        self.state = loop.TrainState("vae", vae, model, parameters, optimizer, schedule, None, adversary)
        network = (
            PerceptualNetwork(self.config.perceptual_network).to(device) if self.config.perceptual_weight else None
        )
        self.compute = partial(loss_and_gradients, self.state, network, self.config, self.accelerator)
        latents = side // models.vae_factor(vae)
        batch = self.config.train_batch_size
        self.pixels = torch.rand(batch, 3, side, side, device=device) * 2 - 1
        self.noise = torch.randn(batch, vae.config.latent_channels, latents, latents, device=device)

    def step(self) -> None:
        """Make one update."""
        options = step_options(self.state.module, self.config, self.side, self.number, 10**6)
        loss = self.compute(self.pixels, self.noise, **options)["train_loss"]
        norm = loop.clip_gradients(self.state, self.config, self.accelerator)
        loop.step_optimizer(self.state, self.config, self.number, norm, loss, list, self.accelerator)
        if self.state.discriminator:
            self.state.discriminator.step(self.config, self.accelerator)
        self.number += 1


def measure(training: Training, steps: int) -> tuple[float, float]:
    """Return milliseconds per step on the clock and on the processor, over `steps` steps."""
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        training.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - clock) / steps * 1e3, (time.process_time() - processor) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="photos")
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=8, help="steps per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/vae-terms.md")
    chosen = parser.parse_args()
    recipe = load_recipe(chosen.config)
    trainings = {name: Training(recipe, chosen.side, settings) for name, settings in ROWS.items()}
    for training in trainings.values():
        measure(training, 2)
    best = dict.fromkeys(trainings, (float("inf"), float("inf")))
    for _ in range(chosen.rounds):
        for name, training in trainings.items():
            found = measure(training, chosen.steps)
            best[name] = (min(best[name][0], found[0]), min(best[name][1], found[1]))
    plain = best["no further term"][1]
    machine = describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    batch = recipe.train_vae.train_batch_size
    lines = [
        "# What a term adds to a step of the autoencoder",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/vae_terms.py --config {chosen.config} --side {chosen.side} "
        f"--steps {chosen.steps} --rounds {chosen.rounds}`",
        "",
        f"Recipe `{chosen.config}`, batch {batch}, {chosen.side} px, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{machine.get('gpu') or machine['cpu']}.",
        "",
        "| step | ms on the clock | ms of processor time | times as long (processor) |",
        "|---|---|---|---|",
        *(f"| {name} | {clock:.0f} | {cpu:.0f} | {cpu / plain:.2f} |" for name, (clock, cpu) in best.items()),
    ]
    chosen.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
