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
from t2i.files import share_weights
from t2i.hub import publish
from t2i.loading import find_dataset
from t2i.run_lock import lock_run
from t2i.runs import RunFolder, checkpoint_folders
from t2i.training.prefetch import Prefetcher

# Modules that import torch are imported inside functions. `--help` and error messages about options then appear at once.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from t2i.data.prepared import Selection, Split
    from t2i.training.autoencoder_losses import Transform
    from t2i.training.checkpoints import Node
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
    from t2i.training import live, loop, stopping
    from t2i.training.discriminator import Discriminator

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
    perceptual = load_perceptual(config, accelerator)
    input_hashes = hash_inputs(vae, splits, perceptual)
    batch = loop.global_batch(config, accelerator.num_processes)
    identity = loop.identity(recipe.data, recipe.vae, config, steps=steps, global_batch=batch, **input_hashes)
    run = RunFolder(folder, identity)
    if loop.is_done(run, config, accelerator):
        if accelerator.is_main_process:  # Another node may have no run.json.
            print(f"reusing the finished VAE in {folder / 'vae'} ({run.state['psnr_db']:.2f} dB on validation)")
        push(folder, config, accelerator)
        return
    extensions = loop.extend(run, config, steps, accelerator)
    check_decoder_phase(config, folder, extensions)
    if accelerator.is_main_process:
        run.start(redaction.public_yaml(to_dict(recipe)), splits.quarantine, accelerator.mixed_precision)
    freeze(vae, config)
    loop.place_model(vae, config, accelerator)

    # optimiser
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    loop.warn_of_warmup(config, steps, accelerator.print, extensions)
    warn_of_steps(config, steps, accelerator.print)
    optimizer, schedule = loop.build_optimizer(vae, config, steps, extensions)

    # prepare
    module = models.Autoencoder(vae)
    model, optimizer = accelerator.prepare(torch.compile(module) if config.compile else module, optimizer)
    ema = loop.Average(parameters, decay=config.ema_decay) if config.use_ema else None
    discriminator = Discriminator(config, accelerator.device) if config.adversarial_weight else None
    train_state = loop.TrainState("vae", vae, model, parameters, optimizer, schedule, ema, discriminator)
    tracker = loop.make_tracker(config, folder, to_dict(recipe), input_hashes, accelerator)

    # resume
    saved, node = loop.resume(run, train_state, config, accelerator)
    start, before = saved["step"], saved["before"] if saved["step"] else measure(vae, splits.validation)
    accelerator.print(
        f"{steps} steps of {batch} images out of {count}; validation before: {before['psnr_db']:.2f} dB, SSIM {before['ssim']:.3f}"
    )

    # loop
    keep_freed_memory(accelerator)
    micro_batches, keeps_last = config.gradient_accumulation_steps, config.checkpoints_total_limit != 1
    make = partial(make_batch, splits.train, config, recipe.data.random_flip, vae, accelerator)
    batches = Prefetcher(make, steps * micro_batches, accelerator.device)
    compute = partial(loss_and_gradients, train_state, perceptual, config, accelerator)
    # On one GPU this is `compute` recorded as a CUDA graph, unless steps differ. Otherwise it is `compute` itself.
    forward_backward = record_pass(compute, partial(make, start * micro_batches), train_state, config, accelerator)
    with run.timed("train"), live.listen(folder, start, steps, batch, accelerator) as training:
        progress = loop.progress_bar("VAE", start, steps, accelerator)
        for step in progress:
            if step == steps - config.decoder_only_steps:
                hold_encoder(train_state)
            terms: dict[str, torch.Tensor] = {}  # These are means over the micro-batches, whose gradients add up.
            for number in range(step * micro_batches, (step + 1) * micro_batches):
                options = step_options(vae, config, recipe.data.resolution, number, steps)
                with accelerator.accumulate(model):
                    terms = loop.add_terms(terms, forward_backward(*batches.take(number), **options), micro_batches)
            norm = loop.clip_gradients(train_state, config, accelerator)
            ids = partial(sample_ids, splits.train, config, step, accelerator)
            loop.step_optimizer(train_state, config, step, norm, terms["train_loss"], ids, accelerator)
            if discriminator and step >= config.adversarial_start:
                discriminator.step(config, accelerator)
            done = step + 1
            if done % config.logging_steps == 0 or done == steps:
                row = {**loop.mean_terms(terms, accelerator), "lr": schedule.get_last_lr()[0]}
                progress.set_postfix(loss=f"{row['train_loss']:.4f}", refresh=False)
                loop.record(row, done, folder, tracker, accelerator.is_main_process)
            asked = training.after(done)
            if (asked.looks or done % config.validation_steps == 0) and done < steps and accelerator.is_main_process:
                with loop.averaged(train_state):
                    validate(vae, splits.validation, folder, tracker, done)
            if done % config.checkpointing_steps == 0 or asked.stop or (done == steps and keeps_last):
                saved = {"step": done, "before": before}
                loop.save(folder, train_state, config, saved, node, accelerator)
            if asked.stop:
                break
    if training.asked.stop:
        loop.exit_stopped(run, tracker, done, steps, accelerator)

    # finish
    del forward_backward  # This frees the memory of a step.
    finish(run, train_state, recipe, splits, before, steps, tracker, accelerator)
    remove_checkpoints(folder, config, node)
    push(folder, config, accelerator)


def hash_inputs(vae: Any, splits: Any, perceptual: Any) -> dict[str, str]:
    """Return the hashes of everything that the training reads, by name. `perceptual` is None without that term."""
    from t2i import models

    further = {"perceptual_hash": perceptual.identity} if perceptual else {}
    hashes = {"dataset_hash": splits.fingerprint, "vae_hash": models.hash_model(vae), **further}
    return {**hashes, **splits.repair_hashes(captions=False)}


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
    factor = vae.config.scaling_factor
    if train_state.ema:
        train_state.ema.copy_to(train_state.parameters)
    with run.timed("measure"):
        vae.eval()
        normalise_latents(vae, splits.train, fold=recipe.vae.vae is None, rescale=config.vae_train_part == "all")
        vae.save_pretrained(folder / "vae")
        share_weights(folder / "vae")
        after = validate(vae, splits.validation, folder, tracker, steps)
        test = measure(vae, splits.test) if splits.test else {}
    results = {
        **after,
        **{f"{name}_before": value for name, value in before.items()},
        **{f"test_{name}": value for name, value in test.items()},
    }
    run.finish(**results, steps=steps, scaling_factor=vae.config.scaling_factor, output_vae_hash=models.hash_model(vae))
    if tracker:
        tracker.log_metrics(results, steps)
    loop.finish_tracker(tracker, run)
    on_test = f", {test['psnr_db']:.2f} dB on test" if test else ""
    earlier = f" ({factor:.4f} before)" if recipe.vae.vae and vae.config.scaling_factor != factor else ""
    print(
        f"VAE in {folder / 'vae'}: {before['psnr_db']:.2f} -> {after['psnr_db']:.2f} dB, "
        f"SSIM {before['ssim']:.3f} -> {after['ssim']:.3f} on validation{on_test}; scaling_factor {vae.config.scaling_factor:.4f}"
        f"{earlier}"
    )


def remove_checkpoints(folder: Path, config: TrainVaeConfig, node: "Node") -> None:
    """Remove this node's checkpoint once the results are saved, if `checkpoints_total_limit` is 1: it served only to resume.

    Several checkpoints are kept for comparison. Every process must call this function.
    """
    from t2i.training.checkpoints import node_folder

    node.meet()
    if config.checkpoints_total_limit == 1 and node.first:
        for checkpoint in checkpoint_folders(node_folder(folder, node)):
            shutil.rmtree(checkpoint)


def freeze(vae: Any, config: TrainVaeConfig) -> None:
    """Freeze all weights but the decoder's if `vae_train_part` is "decoder"."""
    if config.vae_train_part == "decoder":
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        if vae.post_quant_conv is not None:
            vae.post_quant_conv.requires_grad_(True)


def load_perceptual(config: TrainVaeConfig, accelerator: Any) -> Any:
    """Load the network of the perceptual term onto the device. Return None if the term is off."""
    from t2i.training.perceptual import PerceptualNetwork

    return PerceptualNetwork(config.perceptual_network).to(accelerator.device) if config.perceptual_weight else None


def warn_of_steps(config: TrainVaeConfig, steps: int, say: Any) -> None:
    """Warn if a part of the training begins after its last update, or takes all of it."""
    if config.adversarial_weight and config.adversarial_start >= steps:
        say(
            f"WARNING: adversarial_start {config.adversarial_start} is not below the training's {steps} updates, so the "
            "discriminator is never used"
        )
    if config.crop_size and config.crop_steps is not None and config.crop_steps >= steps:
        say(
            f"WARNING: crop_steps {config.crop_steps} is not below the training's {steps} updates, so no update sees whole images"
        )
    last = steps - config.decoder_only_steps
    if config.equivariance_share and 0 < last <= config.equivariance_start:
        say(
            f"WARNING: equivariance_start {config.equivariance_start} is not below {last}, the number of updates that train the "
            "encoder, so no latents are transformed"
        )
    if config.decoder_only_steps >= steps:
        say(
            f"WARNING: decoder_only_steps {config.decoder_only_steps} takes all {steps} updates, so the encoder is never trained"
        )


def check_decoder_phase(config: TrainVaeConfig, folder: Path, extensions: list[dict[str, Any]]) -> None:
    """Refuse an extension from a checkpoint whose encoder is held already: its other phases begin at fixed updates.

    Raises:
        UserError: the checkpoint lies within the last `decoder_only_steps` updates of the shorter run.
    """
    for extension in extensions:
        begun, step = extension["from_steps"] - config.decoder_only_steps, extension["at_step"]
        if step > begun:
            raise UserError(
                f"at step {step} the run in {folder} trained its decoder alone (decoder_only_steps {config.decoder_only_steps}), which "
                f"cannot be undone; extend it from a checkpoint up to step {begun} by --resume_from_checkpoint"
            )


def push(folder: Path, config: TrainVaeConfig, accelerator: Any) -> None:
    """Publish the autoencoder of the finished run if `push_to_hub` is set."""
    if config.push_to_hub and accelerator.is_main_process:
        publish.publish_vae(folder, config)


def loss_and_gradients(
    train_state: "TrainState",
    perceptual: Any,
    config: TrainVaeConfig,
    accelerator: Any,
    pixels: "torch.Tensor",
    noise: "torch.Tensor",
    *,
    transform: "Transform | None" = None,
    adversarial: bool = False,
    decoder_only: bool = False,
) -> "dict[str, torch.Tensor]":
    """Compute the forward and backward pass of a batch from `make_batch`.

    Args:
        perceptual: the network of the perceptual term, or None.
        transform: turns and shrinks latents and target alike.
        adversarial: train against the discriminator, and leave its gradients in its parameters too.
        decoder_only: leave no gradients in the encoder's parameters.

    Returns:
        `train_loss` and its terms. The gradients are in the parameters.
    """
    from t2i.models import encoder_parameters
    from t2i.training.autoencoder_losses import loss_terms

    reconstruction, mean, log_variance = train_state.model(pixels, noise, transform, decoder_only)
    reconstruction, target = reconstruction.float(), transform(pixels) if transform else pixels
    terms = loss_terms(reconstruction, target, mean.float(), log_variance.float(), pixels.numel(), config, perceptual)
    if adversarial:
        terms |= adversarial_gradients(train_state, config, accelerator, reconstruction, target, terms)
    else:
        accelerator.backward(terms["train_loss"])
    if decoder_only:
        for parameter in encoder_parameters(train_state.module):
            parameter.grad = None  # Zeros would still let AdamW move the weights.
    return {name: value.detach() for name, value in terms.items()}


def adversarial_gradients(
    train_state: "TrainState",
    config: TrainVaeConfig,
    accelerator: Any,
    reconstruction: "torch.Tensor",
    target: "torch.Tensor",
    terms: "dict[str, torch.Tensor]",
) -> "dict[str, torch.Tensor]":
    """Compute the backward passes of autoencoder and discriminator.

    The terms are differentiated once, up to the reconstruction. The weight of the discriminator follows from both gradients
    there, and their sum goes on to the autoencoder.

    Returns:
        `train_loss` with the adversarial term, that term, its factor, and the discriminator's loss.
    """
    import torch

    from t2i.training import autoencoder_losses as losses

    discriminator, last_layer = train_state.discriminator, train_state.module.decoder.conv_out.weight
    adversarial = losses.adversarial_loss(discriminator(reconstruction))
    (of_terms,) = torch.autograd.grad(terms["train_loss"], reconstruction)
    (of_adversary,) = torch.autograd.grad(adversarial, reconstruction)
    average = partial(accelerator.reduce, reduction="mean")
    balance = losses.balance(reconstruction, of_terms, of_adversary, last_layer, average)
    weight = config.adversarial_weight * balance
    # The gradient of this sum at the reconstruction is that of all terms, and only KL has another way to the weights.
    accelerator.backward((reconstruction * (of_terms + weight * of_adversary)).sum() + config.kl_weight * terms["kl"])
    real, made = discriminator(torch.cat([target, reconstruction.detach()])).chunk(2)
    loss = losses.discriminator_loss(real, made)
    (loss / config.gradient_accumulation_steps).backward()
    total = terms["train_loss"].detach() + weight * adversarial.detach()
    return {"train_loss": total, "adversarial": adversarial, "balance": balance, "discriminator": loss}


def step_options(vae: Any, config: TrainVaeConfig, resolution: int, number: int, steps: int) -> dict[str, Any]:
    """Return the options of `loss_and_gradients` for batch `number`, without those that are off."""
    from t2i.models import vae_factor
    from t2i.training.autoencoder_losses import draw_transform

    step, options = number // config.gradient_accumulation_steps, dict[str, Any]()
    if step >= steps - config.decoder_only_steps:
        options["decoder_only"] = True
    elif config.equivariance_share and step >= config.equivariance_start:
        factor = vae_factor(vae)
        latents = image_side(config, resolution, number) // factor
        transform = draw_transform(config.seed, number, config.equivariance_share, latents, factor)
        options |= {"transform": transform} if transform else {}
    if config.adversarial_weight and step >= config.adversarial_start:
        options["adversarial"] = True
    return options


def image_side(config: TrainVaeConfig, resolution: int, number: int) -> int:
    """Return the side in pixels of the images of batch `number`, which are crops or whole."""
    if not config.crop_size:
        return resolution
    is_cropped = config.crop_steps is None or number // config.gradient_accumulation_steps < config.crop_steps
    return config.crop_size if is_cropped else resolution


def record_pass(compute: Any, example: Any, train_state: "TrainState", config: TrainVaeConfig, accelerator: Any) -> Any:
    """Return `compute` recorded as a CUDA graph. If the steps of this training differ, return it as it is, and say so."""
    from t2i.training.cuda_graph import capture

    options = {"adversarial_weight": config.adversarial_weight, "equivariance_share": config.equivariance_share,
               "crop_steps": config.crop_steps, "decoder_only_steps": config.decoder_only_steps}  # fmt: skip
    reasons = [name for name, value in options.items() if value]
    if not reasons:
        return capture(compute, example, train_state, config, accelerator)
    if config.cuda_graphs and accelerator.device.type == "cuda":
        accelerator.print(f"steps are not recorded as a CUDA graph, because {' and '.join(reasons)} make them differ")
    return compute


def hold_encoder(train_state: "TrainState") -> None:
    """Give the encoder its averaged weights, which it keeps from here on. The decoder learns to read exactly its latents."""
    import torch

    from t2i.models import encoder_parameters

    if train_state.ema is None:
        return
    held = {id(parameter) for parameter in encoder_parameters(train_state.module)}
    with torch.no_grad():
        for parameter, average in zip(train_state.parameters, train_state.ema.shadow_params, strict=True):
            if id(parameter) in held:
                parameter.copy_(average)


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
    from t2i.diffusion import choose_versions, draw, occurrences
    from t2i.models import vae_factor
    from t2i.training.prefetch import to_device_soon

    indices = sample_indices(train, config, number, accelerator)
    side = train.pixels.shape[1]
    size = image_side(config, side, number)
    latent = size // vae_factor(vae)
    copies = occurrences(batch_of_all(train, config, number, accelerator).tolist())
    copies = copies[accelerator.process_index :: accelerator.num_processes]
    shape = (vae.config.latent_channels, latent, latent)
    draws = draw(config.seed, number, indices.tolist(), shape, 1, copies)
    crops, mirrored = choose_versions(draws.uniform[:, 0], flip, train.crop_count)
    images = train.versions(indices, crops.numpy())
    if size < side:
        corners = (draws.uniform[:, 2:] * (side - size + 1)).int().tolist()
        images = np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images, corners, strict=True)])
    pixels = to_pixels(images)
    pixels = torch.where(mirrored.bool().view(-1, 1, 1, 1), pixels.flip(3), pixels)
    if config.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return to_device_soon(pixels, accelerator.device), to_device_soon(draws.posterior_noise, accelerator.device)


def measure(vae: Any, split: "Split", limit: int = 512) -> dict[str, float]:
    """Return PSNR in dB and SSIM of reconstructions from posterior means, averaged over at most `limit` images."""
    from t2i.pictures.reconstructions import reconstruct

    _, psnr, ssim = reconstruct(vae, split.first(limit))
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

    pixels = train.first(limit)
    mean, std = latent_statistics(vae, pixels)
    if fold:
        fold_normalisation(vae, mean, std)
        mean, std = latent_statistics(vae, pixels)
    if rescale:
        total = (std.square().mean() + mean.var(unbiased=False)).sqrt()
        vae.register_to_config(scaling_factor=1.0 / total.item())


def latent_statistics(vae: Any, pixels: "np.ndarray | Selection") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return mean and deviation [C] of the raw latents per channel, for images uint8 [N, S, S, 3]."""
    import torch

    from t2i.data.caches import to_pixels, vae_batch

    means, variances, batch_size = [], [], vae_batch(pixels.shape[1])
    with torch.no_grad():
        for start in range(0, len(pixels), batch_size):
            posterior = vae.encode(to_pixels(pixels[start : start + batch_size]).to(vae.device)).latent_dist
            means.append(posterior.mean.float().movedim(1, 0).flatten(1))
            variances.append(posterior.var.float().movedim(1, 0).flatten(1))
        mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
        return mean.mean(1), (mean.var(1) + variance.mean(1)).sqrt()  # This is the law of total variance.


if __name__ == "__main__":
    run_main(main)
