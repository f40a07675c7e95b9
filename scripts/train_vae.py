"""Train or fine-tune the autoencoder, measure its latents, and save it for stock diffusers.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train_vae.py --config scripts/recipes/demo.yaml \
    --dataset outputs/demo/dataset --output_dir outputs/demo/vae

Without --vae, the recipe's small autoencoder is trained from scratch. With it, the named autoencoder is fine-tuned.
"""

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i import redaction
from t2i.config import Recipe, TrainVaeConfig, check_unet, check_vae, parse, to_dict
from t2i.errors import UserError, run_main
from t2i.hub import publish
from t2i.loading import find_dataset
from t2i.run_lock import lock_run
from t2i.runs import RunFolder, checkpoint_folders
from t2i.training.prefetch import Prefetcher

# Modules that import torch are imported inside functions. `--help` and error messages about options then appear at once.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from t2i.data.prepared import Split
    from t2i.training.loop import TrainState


def main() -> None:
    recipe = parse(("data", "vae", "train_vae"), __doc__ or "")
    config = recipe.train_vae
    find_dataset(recipe.data)
    folder = Path(config.output_dir or "outputs/vae")

    # accelerator
    from t2i.training.distributed import keep_freed_memory, make_accelerator

    accelerator = make_accelerator(config)
    publish.check_push(config, accelerator)
    try:
        check_unet(recipe)
    except UserError as error:  # The autoencoder can be trained, but the user should know before it is.
        accelerator.print(f"WARNING: train_unet.py will refuse this recipe with this autoencoder: {error}")
    held = ExitStack()  # It holds the lock until the process ends, so that no second training writes into this folder.
    if not config.dry_run:
        held.enter_context(lock_run(folder, accelerator.process_index, accelerator.wait_for_everyone))

    # data
    import torch

    from t2i import models
    from t2i.training import loop, stopping
    from t2i.training.cuda_graph import capture

    stopping.end_in_words()
    loop.check_tracker(config, recipe.data.cache_dir, accelerator.print)
    splits = loop.load_splits(recipe.data, accelerator, captions=False)
    if config.dry_run:
        return
    count = len(splits.train)
    steps = loop.total_steps(config, count, accelerator.num_processes)

    # models
    vae = models.load_vae(recipe.vae.vae, recipe.vae.vae_revision) if recipe.vae.vae else models.build_vae(recipe.vae)
    check_vae(recipe, models.vae_factor(vae))
    input_hashes = {"dataset_hash": splits.fingerprint, "vae_hash": models.hash_model(vae)}
    batch = loop.global_batch(config, accelerator.num_processes)
    identity = loop.identity(recipe.data, recipe.vae, config, steps=steps, global_batch=batch, **input_hashes)
    run = RunFolder(folder, identity)
    if loop.is_done(run, config, accelerator):
        if accelerator.is_main_process:  # Another node may have no run.json.
            print(f"reusing the finished VAE in {folder / 'vae'} ({run.state['psnr_db']:.2f} dB on validation)")
        push(folder, config, accelerator)
        return
    if accelerator.is_main_process:
        run.start(config=redaction.public_yaml(to_dict(recipe)), quarantine=splits.quarantine)
    freeze(vae, config)
    loop.place_model(vae, config, accelerator)

    # optimiser
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    loop.warn_of_warmup(config, steps, accelerator.print)
    optimizer, schedule = loop.build_optimizer(parameters, config, steps)

    # prepare
    module = models.Autoencoder(vae)
    model, optimizer = accelerator.prepare(torch.compile(module) if config.compile else module, optimizer)
    ema = loop.Average(parameters, decay=config.ema_decay) if config.use_ema else None
    train_state = loop.TrainState("vae", vae, model, parameters, optimizer, schedule, ema)
    tracker = loop.make_tracker(config, folder, to_dict(recipe), input_hashes, accelerator)

    # resume
    saved, node = loop.resume(folder, train_state, config, accelerator)
    start, before = saved["step"], saved["before"] if saved["step"] else measure(vae, splits.validation)
    accelerator.print(
        f"{steps} steps of {batch} images out of {count}; validation before: {before['psnr_db']:.2f} dB, SSIM {before['ssim']:.3f}"
    )

    # loop
    keep_freed_memory(accelerator)
    stopped, micro_batches = False, config.gradient_accumulation_steps
    make = partial(make_batch, splits.train, config, recipe.data.random_flip, vae, accelerator)
    batches = Prefetcher(make, steps * micro_batches, in_thread=accelerator.device.type != "cpu")
    compute = partial(loss_and_gradients, train_state, config, accelerator)
    # On one GPU this is `compute` recorded as a CUDA graph. Otherwise it is `compute` itself.
    forward_backward = capture(compute, partial(make, start * micro_batches), train_state, config, accelerator)
    with run.timed("train"), stopping.on_signals(folder) as stop:
        progress = loop.progress_bar("VAE", start, steps, accelerator)
        for step in progress:
            terms: dict[str, torch.Tensor] = {}  # These are means over the micro-batches, whose gradients add up.
            for number in range(step * micro_batches, (step + 1) * micro_batches):
                with accelerator.accumulate(model):
                    terms = loop.add_terms(terms, forward_backward(*batches.take(number)), micro_batches)
            norm = loop.clip_gradients(train_state, config, accelerator)
            ids = partial(sample_ids, splits.train, config, step, accelerator)
            loop.step_optimizer(train_state, config, step, norm, terms["train_loss"], ids, accelerator)
            done = step + 1
            if done % config.logging_steps == 0 or done == steps:
                row = {**loop.mean_terms(terms, accelerator), "lr": schedule.get_last_lr()[0]}
                progress.set_postfix(loss=f"{row['train_loss']:.4f}", refresh=False)
                loop.record(row, done, folder, tracker, accelerator.is_main_process)
            stopped = stopping.agreed(stop, accelerator) and done < steps
            if done % config.validation_steps == 0 and done < steps and accelerator.is_main_process:
                with loop.averaged(train_state):
                    validate(vae, splits.validation, folder, tracker, done)
            if done % config.checkpointing_steps == 0 or stopped:
                saved = {"step": done, "before": before}
                loop.save(folder, train_state, config, saved, node, accelerator)
            if stopped:
                break
    if stopped:
        loop.exit_stopped(run, tracker, done, steps, accelerator)

    # finish
    del forward_backward  # This frees the memory of a step.
    finish(run, train_state, recipe, splits, before, steps, tracker, accelerator)
    push(folder, config, accelerator)


def finish(
    run: RunFolder,
    train_state: "TrainState",
    recipe: Recipe,
    splits: Any,
    before: dict[str, float],
    steps: int,
    tracker: Any,
    accelerator: Any,
) -> None:
    """Save the autoencoder, with averaged weights if there is an average, and the results. Every process must call this function."""
    from t2i import models
    from t2i.training import loop

    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    vae, folder, config = train_state.module, run.folder, recipe.train_vae
    if train_state.ema:
        train_state.ema.copy_to(train_state.parameters)
    with run.timed("measure"):
        vae.eval()
        normalise_latents(vae, splits.train, fold=recipe.vae.vae is None, rescale=config.vae_train_part == "all")
        vae.save_pretrained(folder / "vae")
        after = validate(vae, splits.validation, folder, tracker, steps)
        test = measure(vae, splits.test) if splits.test else {}
    results = {
        **after,
        **{f"{name}_before": value for name, value in before.items()},
        **{f"test_{name}": value for name, value in test.items()},
    }
    run.finish(**results, steps=steps, scaling_factor=vae.config.scaling_factor, output_vae_hash=models.hash_model(vae))
    if config.checkpoints_total_limit == 1:  # A single one served only to resume. Several are kept for comparison.
        for checkpoint in checkpoint_folders(folder):
            shutil.rmtree(checkpoint)
    if tracker:
        tracker.log_metrics(results, steps)
    loop.finish_tracker(tracker, run)
    on_test = f", {test['psnr_db']:.2f} dB on test" if test else ""
    print(
        f"VAE in {folder / 'vae'}: {before['psnr_db']:.2f} -> {after['psnr_db']:.2f} dB, "
        f"SSIM {before['ssim']:.3f} -> {after['ssim']:.3f} on validation{on_test}; scaling_factor {vae.config.scaling_factor:.4f}"
    )


def freeze(vae: Any, config: TrainVaeConfig) -> None:
    """Freeze all weights but the decoder's if `vae_train_part` is "decoder"."""
    if config.vae_train_part == "decoder":
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)


def push(folder: Path, config: TrainVaeConfig, accelerator: Any) -> None:
    """Publish the autoencoder of the finished run if `push_to_hub` is set."""
    if config.push_to_hub and accelerator.is_main_process:
        publish.publish_vae(folder, config)


def loss_and_gradients(
    train_state: "TrainState", config: TrainVaeConfig, accelerator: Any, pixels: "torch.Tensor", noise: "torch.Tensor"
) -> "dict[str, torch.Tensor]":
    """Compute the forward and backward pass of a batch from `make_batch`.

    Return `train_loss` and its terms, and leave the gradients in the parameters.
    """
    reconstruction, mean, log_variance = train_state.model(pixels, noise)
    terms = loss_terms(reconstruction.float(), pixels, mean.float(), log_variance.float(), config)
    accelerator.backward(terms["train_loss"])
    return {name: value.detach() for name, value in terms.items()}


def sample_ids(train: "Split", config: TrainVaeConfig, step: int, accelerator: Any) -> list[str]:
    """Return the ids of this process's samples of a weight update."""
    micro_batches = range(step * config.gradient_accumulation_steps, (step + 1) * config.gradient_accumulation_steps)
    numbers = (index for number in micro_batches for index in sample_indices(train, config, number, accelerator))
    return [train.rows["id"][number] for number in numbers]


def sample_indices(train: "Split", config: TrainVaeConfig, number: int, accelerator: Any) -> "np.ndarray":
    """Return the indices of this process's samples of batch `number`: int64 [B]."""
    return batch_of_all(train, config, number, accelerator)[accelerator.process_index :: accelerator.num_processes]


def batch_of_all(train: "Split", config: TrainVaeConfig, number: int, accelerator: Any) -> "np.ndarray":
    """Return the indices of the samples of batch `number` over all processes: int64 [B * processes]."""
    from t2i.data.preparing import batch_indices

    return batch_indices(len(train), config.train_batch_size * accelerator.num_processes, config.seed, number)


def make_batch(
    train: "Split", config: TrainVaeConfig, flip: bool, vae: Any, accelerator: Any, number: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return this process's share of batch `number`, on the device.

    Its tensors are pixels [B, 3, S, S] in [-1, 1] and posterior noise.
    """
    import numpy as np
    import torch

    from t2i.data.caches import to_pixels
    from t2i.diffusion import draw, occurrences
    from t2i.models import vae_factor
    from t2i.training.prefetch import to_device_soon

    indices = sample_indices(train, config, number, accelerator)
    images = train.pixels[indices]
    side, size = images.shape[1], config.crop_size or images.shape[1]
    latent = size // vae_factor(vae)
    copies = occurrences(batch_of_all(train, config, number, accelerator).tolist())
    copies = copies[accelerator.process_index :: accelerator.num_processes]
    shape = (vae.config.latent_channels, latent, latent)
    draws = draw(config.seed, number, indices.tolist(), shape, 1, copies)
    if size < side:
        corners = (draws.uniform[:, 2:] * (side - size + 1)).int().tolist()
        images = np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images, corners, strict=True)])
    pixels = to_pixels(images)
    if flip:
        pixels = torch.where(draws.uniform[:, 0].view(-1, 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    if config.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return to_device_soon(pixels, accelerator.device), to_device_soon(draws.posterior_noise, accelerator.device)


def loss_terms(
    reconstruction: "torch.Tensor",
    pixels: "torch.Tensor",
    mean: "torch.Tensor",
    log_variance: "torch.Tensor",
    config: TrainVaeConfig,
) -> dict[str, "torch.Tensor"]:
    """Return the reconstruction, structure and KL terms, and `train_loss`, which is their weighted sum.

    Each term is a scalar, averaged over pixel values. The KL term is the closed form of KL(N(mean, variance) || N(0, 1))
    (Kingma and Welling, arXiv:1312.6114, appendix B).
    """
    from t2i.evaluation.metrics import uniform_ssim

    error = reconstruction - pixels
    terms = {"mse": error.square().mean(), "l1": error.abs().mean()}
    log_variance = log_variance.clamp(-30.0, 20.0)
    terms["kl"] = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum() / pixels.numel()
    loss = config.mse_weight * terms["mse"] + config.l1_weight * terms["l1"] + config.kl_weight * terms["kl"]
    if config.ssim_weight:
        terms["dssim"] = 1.0 - uniform_ssim(reconstruction, pixels)
        loss = loss + config.ssim_weight * terms["dssim"]
    return {"train_loss": loss, **terms}


def measure(vae: Any, split: "Split", limit: int = 512) -> dict[str, float]:
    """Return PSNR in dB and SSIM of reconstructions from posterior means, averaged over at most `limit` images."""
    import numpy as np

    from t2i.pictures.reconstructions import reconstruct

    stop = min(limit, len(split))
    parts = [reconstruct(vae, split.pixels[start : min(start + 32, stop)])[1:] for start in range(0, stop, 32)]
    psnr, ssim = (np.concatenate(figure) for figure in zip(*parts, strict=True))
    return {"psnr_db": float(psnr.mean()), "ssim": float(ssim.mean())}


def validate(vae: Any, split: "Split", folder: Path, tracker: Any, step: int) -> dict[str, float]:
    """Measure on the validation split, and save and log a picture of originals above reconstructions."""
    import numpy as np

    from t2i.pictures.reconstructions import reconstruct
    from t2i.pictures.sampling import picture_grid
    from t2i.training.loop import record

    figures = measure(vae, split)
    reconstruction = reconstruct(vae, split.pixels[:8])[0]
    grid = picture_grid(np.concatenate([split.pixels[:8], reconstruction]), columns=len(reconstruction))
    (folder / "samples").mkdir(exist_ok=True)
    grid.save(folder / "samples" / f"reconstructions-{step:06d}.png")
    record({f"val_{name}": value for name, value in figures.items()}, step, folder, tracker, is_main=True)
    if tracker:
        tracker.log_image(grid, "reconstructions", step)
    return figures


def normalise_latents(vae: Any, train: "Split", *, fold: bool, rescale: bool, limit: int = 2048) -> None:
    """Measure the raw latents of training images and write their scale into the VAE's config.

    Args:
        fold: first change the 1x1 convolutions so that each channel has mean 0 and deviation 1. This is only for new VAEs,
            because it changes the meaning of latents.
        rescale: write `scaling_factor` = 1 / deviation. False keeps earlier latents and UNets valid.
        limit: largest number of images to measure.
    """
    from t2i.models import fold_normalisation

    pixels = train.pixels[:limit]
    mean, std = latent_statistics(vae, pixels)
    if fold:
        fold_normalisation(vae, mean, std)
        mean, std = latent_statistics(vae, pixels)
    if rescale:
        total = (std.square().mean() + mean.var(unbiased=False)).sqrt()
        vae.register_to_config(scaling_factor=1.0 / total.item())


def latent_statistics(vae: Any, pixels: "np.ndarray") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return mean and deviation [C] of the raw latents per channel, for images uint8 [N, S, S, 3]."""
    import torch

    from t2i.data.caches import to_pixels

    means, variances = [], []
    with torch.no_grad():
        for start in range(0, len(pixels), 32):
            posterior = vae.encode(to_pixels(pixels[start : start + 32]).to(vae.device)).latent_dist
            means.append(posterior.mean.float().movedim(1, 0).flatten(1))
            variances.append(posterior.var.float().movedim(1, 0).flatten(1))
        mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
        return mean.mean(1), (mean.var(1) + variance.mean(1)).sqrt()  # This is the law of total variance.


if __name__ == "__main__":
    run_main(main)
