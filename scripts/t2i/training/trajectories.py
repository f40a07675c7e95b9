"""Trajectories of a teacher: its latents at some noise levels, from the noise to the finished picture.

A student learns each of its denoising steps from two neighbouring points of a trajectory. Trajectories are computed once
and cached, so the teacher is not in memory while its student learns.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from t2i.data.caches import TextCache
from t2i.data.preparing import batch_indices
from t2i.data.shared_array import shared_array
from t2i.diffusion import draw, draw_captions, occurrences
from t2i.files import hash_json
from t2i.pictures.png import Preset, guided_steps

# On photos, as near as preset exact, with about a quarter of its calls of the UNet. All steps are guided, unlike with preset fast:
# if the second half is unguided, a teacher with a guide draws farther from photos (benchmarks/results/turbo.md).
SOLVER = Preset("unipc", 8, 1.0)
BATCH = 32  # Trajectories that are computed at once.


def cache_trajectories(
    count: int,
    captions: list[list[str]],
    text: TextCache,
    identity: dict[str, Any],
    solve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    seed: int,
    cache_dir: str,
    *,
    say: Callable[[str], None] = print,
) -> tuple[np.ndarray, np.ndarray]:
    """Return trajectories of a teacher and the captions that they were drawn for, from the cache or newly computed.

    The trajectories take the samples in turn, in a random order: class folders are sorted. The noise of a trajectory
    depends only on `seed` and its number.

    Args:
        count: number of trajectories.
        captions: captions of each sample, at least one.
        text: embeddings of these captions.
        identity: what else decides a trajectory: hashes of the teacher and the text encoder, and settings of `solve`.
        solve: function of noise and text embeddings that returns trajectories, `solve_trajectories`.
        shape: shape of a trajectory, (points, C, h, w).
        seed: seed of noise and captions.
        cache_dir: folder that holds all caches.
        say: function that prints a progress message.

    Returns:
        Trajectories, float16 [count, points, C, h, w], memory-mapped, and their rows in `text.embeddings`, int64 [count].
    """
    numbers = np.arange(count)
    samples = batch_indices(len(text.counts), count, seed, 0)
    copies = occurrences(samples.tolist())
    chosen = draw_captions(seed, 0, samples.tolist(), text.counts[samples].tolist(), copies)
    rows = text.rows_of(samples, np.array(chosen))

    def fill(trajectories: np.ndarray, first: int, stop: int) -> None:
        for start in range(first, stop, BATCH):
            end = min(start + BATCH, stop)
            noise = draw(seed, 0, numbers[start:end].tolist(), (shape[1], shape[2], shape[3]), 1).noise
            hidden = torch.from_numpy(text.embeddings[rows[start:end]]).float()
            trajectories[start:end] = solve(noise, hidden).cpu().numpy()

    settings = {"solver": list(SOLVER), "seed": seed, "captions": hash_json(captions), "rows": hash_json(rows.tolist())}
    key = hash_json({"kind": "trajectories", "shape": [count, *shape], **settings, **identity})
    what, folder = f"trajectories of {count} pictures", Path(cache_dir) / "trajectories" / key
    return shared_array(folder, (count, *shape), "float16", what, fill, BATCH, say), rows


@torch.no_grad()
def solve_trajectories(
    unet: Any, guide: Any, scheduler: Any, guidance_scale: float, guidance_rescale: float, empty: torch.Tensor,
    points: int, noise: torch.Tensor, hidden: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return latents [B, points, C, h, w] of pictures that a teacher draws with guidance, by the steps of `SOLVER`.

    Args:
        unet: the teacher's UNet.
        guide: earlier UNet that guides it, as in `pictures/guide.py`. With None, the teacher guides with the empty caption.
        scheduler: scheduler of `SOLVER`, with steps spread evenly to the last noise level ("trailing").
        guidance_scale: scale of classifier-free guidance. A scale of at most 1 disables it.
        guidance_rescale: how far the guided prediction is scaled to the standard deviation of the unguided one, 0 to 1.
        empty: text embedding of the empty caption, [1, L, D].
        points: number of points of a trajectory. The first is the noise, and the last the finished picture.
        noise: standard normal noise, [B, C, h, w].
        hidden: text embeddings, [B, L, D].
    """
    steps, device = SOLVER.num_inference_steps, unet.device
    guided = guided_steps(steps, SOLVER.guidance_end) if guidance_scale > 1 else 0
    latents, hidden = noise.to(device), hidden.to(device)
    no_text = empty.to(device).expand_as(hidden)
    guide, weak_hidden = (guide, (no_text + hidden) / 2) if guide else (unet, no_text)
    scheduler.set_timesteps(steps, device=device)
    passed = [latents]
    for number, timestep in enumerate(scheduler.timesteps):
        if number < guided:
            weak = guide(latents, timestep, weak_hidden).sample.float()
            strong = unet(latents, timestep, hidden).sample.float()
            output = weak + guidance_scale * (strong - weak)
            if guidance_rescale:
                output = rescale_noise_cfg(output, strong, guidance_rescale)
        else:
            output = unet(latents, timestep, hidden).sample.float()
        latents = scheduler.step(output, timestep, latents).prev_sample
        if (number + 1) % (steps // (points - 1)) == 0:
            passed.append(latents)
    return torch.stack(passed, dim=1)
