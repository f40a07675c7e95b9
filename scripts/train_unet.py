"""Train the denoiser on cached latents and text embeddings, and save a pipeline that stock diffusers loads.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train_unet.py --config scripts/recipes/demo.yaml \
    --dataset outputs/demo/dataset --vae outputs/demo/vae --output_dir outputs/demo/unet

VAE and text encoder are not in memory during training, because their outputs for the data set are computed once and
cached.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i import redaction
from t2i.config import Recipe, TrainUnetConfig, check_unet, check_vae, parse, to_dict
from t2i.errors import UserError, run_main
from t2i.files import write_json
from t2i.hub import publish, upload
from t2i.loading import find_dataset
from t2i.run_lock import lock_run
from t2i.runs import RunFolder
from t2i.training.prefetch import Prefetcher

# Modules that import torch are imported inside functions. `--help` and error messages about options then appear at once.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from t2i.data.caches import TextCache
    from t2i.training.alignment import Alignment
    from t2i.training.loop import TrainState

    Batch = tuple[torch.Tensor, ...]  # The result of `make_batch`.


@dataclass
class Inputs:
    """Data that all training steps read."""

    scheduler: Any  # The noise schedule.
    # Latents and text embeddings by split, `{split: (latents, text)}`. With `alignment_weight`, "targets" holds the
    # targets of the training images, float16 [N, F, K, s, s].
    caches: dict[str, Any]
    scaling_factor: float
    ids: Any  # Ids of the training samples: 16 hex digits of each image file's SHA-256.
    alignment: "Alignment | None" = None


VALIDATION_SEED = 20231  # Seed of the noise for the validation loss of every run.
VALIDATION_BATCH = 32  # Images per batch of the validation loss, if training's own batch is not smaller.
TRACKED = 50  # Number of last logged losses whose mean is the run's final train loss.


def main() -> None:
    recipe = parse(("data", "vae", "unet", "train_unet"), __doc__ or "")
    config = recipe.train_unet
    find_dataset(recipe.data)
    folder = Path(config.output_dir or "outputs/unet")

    # accelerator
    from t2i.training.distributed import check_effective, keep_freed_memory, make_accelerator

    accelerator = make_accelerator(config)
    publish.check_push(config, accelerator)
    held = ExitStack()  # It holds the lock until the process ends, so that no second training writes into this folder.
    if not config.dry_run:
        held.enter_context(lock_run(folder, accelerator.process_index, accelerator.wait_for_everyone))

    # data
    import torch

    from t2i import models
    from t2i.training import denoiser, live, loop, stopping, zero
    from t2i.training.alignment import align
    from t2i.training.cuda_graph import capture

    stopping.end_in_words()
    loop.check_tracker(config, recipe.data.cache_dir, accelerator.print)
    scheduler = models.build_noise_scheduler(recipe.unet)
    splits = loop.load_splits(recipe.data, accelerator)
    if config.dry_run:
        say_long_captions(recipe, splits, known_tokenizer(recipe), accelerator)
        return
    count, sample_names = len(splits.train), splits.train.rows["id"]
    steps = loop.total_steps(config, count, accelerator.num_processes)

    # models
    frozen, input_hashes = load_frozen(recipe, splits)
    unet = make_unet(recipe, frozen)
    input_hashes |= further_hashes(recipe, unet, frozen)
    batch = loop.global_batch(config, accelerator.num_processes)
    identity = loop.identity(recipe.data, recipe.unet, config, steps=steps, global_batch=batch, **input_hashes)
    run = RunFolder(folder, identity)
    if loop.is_done(run, config, accelerator):
        if accelerator.is_main_process:  # Another node may have no run.json.
            print(f"reusing the finished run in {folder / 'pipeline'} (validation loss {run.state['val_loss']:.4f})")
        push(folder, config, accelerator)
        return
    extensions = loop.extend(run, config, steps, accelerator)
    start_run(run, recipe, splits, frozen, scheduler, input_hashes, accelerator)
    with run.timed("cache"):
        caches = cache_inputs(recipe, splits, frozen, input_hashes, accelerator)
    inputs = Inputs(scheduler, caches, frozen["vae"].config.scaling_factor, sample_names, align(unet, config))
    frozen.clear()  # This frees the memory of VAE and text encoder.
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        models.use_plain_attention(unet)
    loop.place_model(unet, config, accelerator)

    # optimiser
    parameters = list(unet.parameters())
    loop.warn_of_warmup(config, steps, accelerator.print, extensions)
    optimizer, schedule = loop.build_optimizer(unet, config, steps, extensions)

    # prepare
    model, optimizer = accelerator.prepare(torch.compile(unet) if config.compile else unet, optimizer)
    zero.cast_inputs(model)
    ema = loop.Average(zero.fp32_weights(model, parameters), decay=config.ema_decay) if config.use_ema else None
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(accelerator.device)
    train_state = loop.TrainState("unet", unet, model, parameters, optimizer, schedule, ema)
    effective = check_effective(model, schedule, config, accelerator)
    if accelerator.is_main_process:
        run.save(effective=effective)
    tracker = loop.make_tracker(config, folder, {**to_dict(recipe), "effective": effective}, input_hashes, accelerator)

    # resume
    saved, node = loop.resume(run, train_state, config, accelerator)
    start, losses, validation = saved["step"], saved.get("losses", []), saved.get("validation", {})
    accelerator.print(describe_run(config, steps, batch, count, parameters, effective, accelerator))

    # loop
    keep_freed_memory(accelerator)
    make, micro_batches = partial(make_batch, inputs, config, accelerator), config.gradient_accumulation_steps
    batches = Prefetcher(make, steps * micro_batches, accelerator.device)
    compute = partial(loss_and_gradients, train_state, inputs, config, accelerator)
    # On one GPU this is `compute` recorded as a CUDA graph. Otherwise it is `compute` itself.
    forward_backward = capture(compute, partial(make, start * micro_batches), train_state, config, accelerator)
    with run.timed("train"), live.listen(folder, start, steps, batch, accelerator) as training:
        progress = loop.progress_bar("UNet", start, steps, accelerator)
        for step in progress:
            denoiser.keep_guide(folder, train_state, config, step, accelerator)
            terms: dict[str, torch.Tensor] = {}  # These are means over the micro-batches, whose gradients add up.
            for number in range(step * micro_batches, (step + 1) * micro_batches):
                with accelerator.accumulate(model):
                    terms = loop.add_terms(terms, forward_backward(*batches.take(number)), micro_batches)
            norm = loop.clip_gradients(train_state, config, accelerator)
            ids = partial(sample_ids, inputs, config, step, accelerator)
            loop.step_optimizer(train_state, config, step, norm, torch.stack([*terms.values()]).sum(), ids, accelerator)
            done = step + 1
            if done % config.logging_steps == 0 or done == steps:
                row = {**loop.mean_terms(terms, accelerator), "grad_norm": norm, "lr": schedule.get_last_lr()[0]}
                losses = [*losses, row["train_loss"]][-TRACKED:]
                denoiser.show_progress(progress, losses, validation)
                loop.record(row, done, folder, tracker, accelerator.is_main_process)
                denoiser.record_samples(folder, done, ids, accelerator)
            asked = training.after(done)
            due = done % config.checkpointing_steps == 0 or done == steps
            if due or asked.evaluate or done % config.validation_steps == 0:
                validation = validate(train_state, inputs, folder, config, tracker, done, accelerator)
            elif asked.sample:
                denoiser.sample(train_state, folder, sampling_settings(config), tracker, done, accelerator)
            if due or asked.stop:
                saved = {"step": done, "losses": losses, "validation": validation}
                loop.save(folder, train_state, config, saved, node, accelerator)
            if asked.stop:
                break
    if training.asked.stop:
        loop.exit_stopped(run, tracker, done, steps, accelerator)

    # finish
    del forward_backward  # This frees the memory of a step.
    results = {"train_loss": sum(losses) / len(losses), **validation, "steps": steps, "train_images": count}
    denoiser.finish(run, train_state, results, tracker, accelerator, raw=config.save_raw_weights)
    push(folder, config, accelerator)


def start_run(
    run: RunFolder,
    recipe: Recipe,
    splits: Any,
    frozen: dict[str, Any],
    scheduler: Any,
    input_hashes: dict[str, str],
    accelerator: Any,
) -> None:
    """Write the run's settings, its provenance and the pipeline's frozen models, and say how many captions are cut.

    Only the main process writes and prints. The others wait for it.
    """
    from t2i import models
    from t2i.training import denoiser

    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return
    run.start(redaction.public_yaml(to_dict(recipe)), splits.quarantine, accelerator.mixed_precision)
    write_json(run.folder / "provenance.json", denoiser.provenance(recipe, input_hashes))
    denoiser.save_frozen(run, frozen, models.build_ddim(scheduler))
    say_long_captions(recipe, splits, frozen["tokenizer"], accelerator)
    accelerator.wait_for_everyone()


def describe_run(
    config: TrainUnetConfig, steps: int, batch: int, count: int, parameters: "list[torch.Tensor]",
    effective: dict[str, Any], accelerator: Any,
) -> str:  # fmt: skip
    """Return a line with the length of the training, the size of the UNet and the effective settings."""
    return (
        f"{steps} steps of {batch} samples out of {count} ({steps * batch / count:.1f} epochs), "
        f"UNet of {sum(parameter.numel() for parameter in parameters) / 1e6:.1f} M parameters, "
        f"precision {accelerator.mixed_precision}, gradients clipped to {effective['gradient_clipping']:g}"
        + (f", ZeRO stage {effective['zero_stage']}" if effective["zero_stage"] else "")
        + (
            f", no guide, which would be kept at update {config.guide_step}"
            if (config.guide_step or 0) >= steps
            else ""
        )
    )


def sampling_settings(config: TrainUnetConfig) -> dict[str, Any]:
    """Return the prompts and settings of the validation pictures."""
    names = ("guidance_scale", "guidance_rescale", "num_inference_steps")
    return {"prompts": config.validation_prompts, **{name: getattr(config, name) for name in names}}


def push(folder: Path, config: TrainUnetConfig, accelerator: Any) -> None:
    """Publish the finished run if `push_to_hub` is set."""
    if config.push_to_hub and accelerator.is_main_process:
        publish.publish_run(
            folder, str(config.hub_model_id), license=config.license, pictures=config.gallery_pictures,
            private=config.hub_private_repo, deadline=config.hub_deadline,
            target=upload.Target(config.hub_revision, config.create_pr),
        )  # fmt: skip


def load_frozen(recipe: Recipe, splits: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Load VAE, text encoder and tokenizer. Return them with the hashes of each and of the data set.

    If no option names a text encoder, a small one is built by the recipe.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    from t2i import models

    base, unet = recipe.unet.pretrained_model_name_or_path, recipe.unet
    vae_source, text_source = recipe.vae.vae or base, unet.text_encoder or base
    of_base = (unet.revision, unet.variant)
    vae_files = (recipe.vae.vae_revision, None) if recipe.vae.vae else of_base
    text_files = (unet.text_encoder_revision, None) if unet.text_encoder else of_base
    if not vae_source:
        raise UserError(
            "no VAE: give --vae with the run folder of train_vae.py, a path or a Hub id such as stabilityai/sd-vae-ft-mse"
        )
    vae = models.load_vae(vae_source, *vae_files)
    if text_source:
        text_encoder = models.load_part(CLIPTextModel, text_source, "text_encoder", *text_files).float().eval()
        tokenizer = models.load_part(CLIPTokenizer, text_source, "tokenizer", text_files[0])
    else:
        captions = list(chain.from_iterable(splits.train.captions()))
        text_encoder, tokenizer = models.build_text_encoder(unet, captions, recipe.train_unet.seed)
    input_hashes = {
        "dataset_hash": splits.fingerprint,
        "vae_hash": models.hash_model(vae),
        "text_encoder_hash": models.hash_model(text_encoder),
        "tokenizer_hash": models.hash_tokenizer(tokenizer),
        **splits.repair_hashes(),
    }
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}, input_hashes


def further_hashes(recipe: Recipe, unet: Any, frozen: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of a UNet that is trained further, and of the network with which the UNet is aligned.

    The network is loaded, and joins the frozen models under the name "alignment".
    """
    from t2i import models
    from t2i.training.alignment import TargetNetwork

    hashes = {}
    if recipe.unet.pretrained_model_name_or_path:
        hashes["base_unet_hash"] = models.hash_model(unet)
    if recipe.train_unet.alignment_weight:
        frozen["alignment"] = TargetNetwork(recipe.train_unet.alignment_network, unet)
        hashes["alignment_hash"] = frozen["alignment"].identity()
    return hashes


def known_tokenizer(recipe: Recipe) -> Any:
    """Load the tokenizer that the options name, without its text encoder.

    Return None if the tokenizer will be learnt from the captions.
    """
    from transformers import CLIPTokenizer

    from t2i import models

    source = recipe.unet.text_encoder or recipe.unet.pretrained_model_name_or_path
    revision = recipe.unet.text_encoder_revision if recipe.unet.text_encoder else recipe.unet.revision
    return models.load_part(CLIPTokenizer, source, "tokenizer", revision) if source else None


def say_long_captions(recipe: Recipe, splits: Any, tokenizer: Any, accelerator: Any) -> None:
    """Print how many captions of the training images and of the measured validation images the tokenizer cuts off."""
    from t2i.data.preparing import count_long_captions

    if tokenizer is None or not accelerator.is_main_process:
        return
    first = [caption for caption, *_ in splits.validation.captions(recipe.train_unet.validation_images)]
    for name, captions in (("train", list(chain.from_iterable(splits.train.captions()))), ("validation", first)):
        long = count_long_captions(captions, tokenizer)
        if long["over"]:
            print(f"{long['over']:,} of {len(captions):,} {name} captions exceed {long['limit']} tokens and are cut")


def make_unet(recipe: Recipe, frozen: dict[str, Any]) -> Any:
    """Return the UNet to train: a new UNet of the recipe's size, or the UNet of `pretrained_model_name_or_path`."""
    from diffusers import UNet2DConditionModel

    from t2i import models

    vae, side, factor = frozen["vae"], recipe.data.resolution, models.vae_factor(frozen["vae"])
    check_vae(recipe, factor, is_trained=False)
    check_unet(recipe, factor)
    base, channels, context = (
        recipe.unet.pretrained_model_name_or_path,
        vae.config.latent_channels,
        frozen["text_encoder"].config.hidden_size,
    )
    if not base:
        return models.build_unet(recipe.unet, side // factor, channels, context)
    unet = models.load_part(UNet2DConditionModel, base, "unet", recipe.unet.revision, recipe.unet.variant).float()
    if (unet.config.in_channels, unet.config.cross_attention_dim) != (channels, context):
        raise UserError(
            f"the UNet of {base} takes {unet.config.in_channels} latent channels and text {unet.config.cross_attention_dim} wide, "
            f"the VAE and text encoder give {channels} and {context}; leave out --vae and --text_encoder, or name its own"
        )
    unet.register_to_config(sample_size=side // factor)
    return unet


def cache_inputs(
    recipe: Recipe, splits: Any, frozen: dict[str, Any], hashes: dict[str, str], accelerator: Any
) -> dict[str, Any]:
    """Return the latents and text embeddings of the training split and of the measured validation images.

    Training images get all of their captions. Validation images get the first one, on which their loss is measured.
    A training in bf16 also computes latents and embeddings in bf16, in half the time. Pictures decoded from such
    latents are the same to 60 dB. A training in fp16 computes both in float32, because fp16 has a smaller range.

    Returns:
        Latents and text embeddings by split, as `Inputs.caches` holds them, and the targets of an alignment.
    """
    import torch

    from t2i import models
    from t2i.data import caches
    from t2i.pictures.png import cut_prompt

    for prompt in recipe.train_unet.validation_prompts:
        cut = cut_prompt(frozen["tokenizer"], prompt)
        if cut:
            accelerator.print(f"WARNING: validation {cut}")
    cached: dict[str, Any] = {}
    in_bf16 = accelerator.mixed_precision == "bf16"
    precision = {"precision": "bf16"} if in_bf16 else {}
    # This memory format is a third faster, also on a CPU.
    vae = frozen["vae"].to(accelerator.device, memory_format=torch.channels_last)
    encoder = models.hash_encoder(vae)
    text_encoder = frozen["text_encoder"].to(accelerator.device)
    for name, limit in (("train", None), ("validation", recipe.train_unet.validation_images)):
        split = getattr(splits, name)
        captions, pixels = split.captions(limit), split.first(limit)
        captions = captions if name == "train" else [texts[:1] for texts in captions]
        text_identity = {"encoder": hashes["text_encoder_hash"], "tokenizer": hashes["tokenizer_hash"], **precision}
        latent_identity = {"images": split.fingerprint, "encoder": encoder, **precision}
        flip = recipe.data.random_flip and name == "train"
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=in_bf16):
            text = caches.cache_text(
                captions, text_identity, text_encoder, frozen["tokenizer"], recipe.data.cache_dir, say=accelerator.print
            )
            latents = caches.cache_latents(
                pixels, latent_identity, vae, recipe.data.cache_dir, flip=flip, crops=split.crops, say=accelerator.print
            )
        cached[name] = (latents, text)
        if "alignment" in frozen and name == "train":
            cached["targets"] = caches.cache_alignment(
                pixels, split.fingerprint, frozen["alignment"], recipe.data.cache_dir,
                flip=flip, crops=split.crops, say=accelerator.print,
            )  # fmt: skip
    return cached


def loss_and_gradients(
    train_state: "TrainState",
    inputs: Inputs,
    config: TrainUnetConfig,
    accelerator: Any,
    *batch: "torch.Tensor",
) -> "dict[str, torch.Tensor]":
    """Compute the forward and backward pass of a batch from `make_batch`.

    Return `train_loss`, and with an alignment its unweighted term. Leave the gradients in the parameters.
    """
    from t2i.diffusion import denoising_loss

    latents, noise, timesteps, context, *further = batch
    if inputs.alignment:
        *further, targets = further
    loss = denoising_loss(
        train_state.model, inputs.scheduler, latents, noise, timesteps, context, config.snr_gamma, *further
    ).mean()
    terms = {"train_loss": loss.detach()}
    if inputs.alignment:
        penalty = inputs.alignment.penalty(targets)
        terms["alignment"] = penalty.detach()
        loss = loss + inputs.alignment.weight * penalty
    accelerator.backward(loss)
    return terms


def sample_ids(inputs: Inputs, config: TrainUnetConfig, step: int, accelerator: Any) -> list[str]:
    """Return the ids of this process's samples of a weight update."""
    micro_batches = range(config.gradient_accumulation_steps)
    numbers = (index for micro in micro_batches for index in sample_indices(inputs, config, step, micro, accelerator))
    return [inputs.ids[number] for number in numbers]


def sample_indices(inputs: Inputs, config: TrainUnetConfig, step: int, micro: int, accelerator: Any) -> "np.ndarray":
    """Return this process's samples of a micro-batch of a weight update.

    The samples are given by their indices in the training split, int64 [B].
    """
    from t2i.data.preparing import batch_indices

    world, rank = accelerator.num_processes, accelerator.process_index
    number = step * config.gradient_accumulation_steps + micro
    return batch_indices(len(inputs.caches["train"][0]), config.train_batch_size * world, config.seed, number)[
        rank::world
    ]


def sample_copies(inputs: Inputs, config: TrainUnetConfig, step: int, micro: int, accelerator: Any) -> list[int]:
    """Return the `occurrences` [B] of `sample_indices` within the whole weight update.

    Occurrences are counted over all micro-batches and processes of the update.
    """
    from t2i.data.preparing import batch_indices
    from t2i.diffusion import occurrences

    world, rank = accelerator.num_processes, accelerator.process_index
    part = config.train_batch_size * world
    # The samples and their order do not depend on the number of processes and micro-batches.
    update = batch_indices(len(inputs.caches["train"][0]), part * config.gradient_accumulation_steps, config.seed, step)
    return occurrences(update.tolist())[micro * part : (micro + 1) * part][rank::world]


def make_batch(inputs: Inputs, config: TrainUnetConfig, accelerator: Any, number: int) -> "Batch":
    """Return this process's share of micro-batch `number`, on the device.

    The batch's tensors are scaled latents, noise, timesteps and encoder hidden states. With `input_perturbation`, the
    noise of the UNet's input follows. Targets of an
    alignment come last. If an image has several captions, one is drawn. Captions are dropped
    independently. The empty caption's embedding, which sampling also uses, replaces them.
    """
    import numpy as np
    import torch

    from t2i.diffusion import choose_versions, draw, draw_captions
    from t2i.training.prefetch import to_device_soon

    step, micro = divmod(number, config.gradient_accumulation_steps)
    latents, text = inputs.caches["train"]
    indices = sample_indices(inputs, config, step, micro, accelerator)
    shape = (latents.shape[2] // 2, *latents.shape[3:])
    copies = sample_copies(inputs, config, step, micro, accelerator)
    draws = draw(
        config.seed, step, indices.tolist(), shape, inputs.scheduler.config.num_train_timesteps, copies,
        noise_offset=config.noise_offset, input_perturbation=config.input_perturbation,
    )  # fmt: skip
    versions, _ = choose_versions(draws.uniform[:, 0], flip=False, crops=latents.shape[1] - 1)  # Mirrored or not.
    captions = draw_captions(config.seed, step, indices.tolist(), text.counts[indices].tolist(), copies)
    rows = text.rows_of(indices, np.array(captions))
    rows[draws.uniform[:, 1].numpy() < config.proportion_empty_prompts] = 0
    moments = latents[indices, versions.numpy()]
    batch = to_device(
        moments, draws.posterior_noise, draws.noise, draws.timesteps, text, rows, inputs.scaling_factor, accelerator
    )
    further = [] if draws.input_noise is None else [draws.input_noise]
    if "targets" in inputs.caches:  # They are sent to the device in float16.
        further.append(torch.from_numpy(inputs.caches["targets"][indices, versions.numpy()]))
    return (*batch, *(to_device_soon(tensor, accelerator.device) for tensor in further))


def to_device(
    moments: "np.ndarray", posterior_noise: "torch.Tensor", noise: "torch.Tensor", timesteps: "torch.Tensor",
    text: "TextCache", rows: "np.ndarray", scaling_factor: float, accelerator: Any,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":  # fmt: skip
    """Return a batch's tensors on the device.

    The tensors are scaled latents [B, C, h, w] from cached moments, noise, timesteps [B] and encoder hidden states [B,
    L, D].
    """
    import torch

    from t2i.diffusion import sample_posterior
    from t2i.training.prefetch import to_device_soon

    latents = scaling_factor * sample_posterior(torch.from_numpy(moments), posterior_noise)
    context = torch.from_numpy(text.embeddings[rows])  # It is sent to the device in float16.
    parts = (to_device_soon(tensor, accelerator.device) for tensor in (latents, noise, timesteps, context))
    latents, noise, timesteps, context = parts
    return latents, noise, timesteps, context.float()


def validate(
    train_state: "TrainState",
    inputs: Inputs,
    folder: Path,
    config: TrainUnetConfig,
    tracker: Any,
    step: int,
    accelerator: Any,
) -> dict[str, float]:
    """Measure the averaged weights on the validation split, and record losses and pictures. Every process must call this function.

    Raises:
        UserError: the loss is non-finite. No checkpoint is then saved with these weights.
    """
    from t2i.training import denoiser, loop

    with loop.averaged(train_state) as unet:
        at_once = config.train_batch_size * accelerator.num_processes
        losses = validation_loss(unet, inputs, config.validation_images, accelerator, at_once)
        if accelerator.is_main_process and config.validation_prompts:
            denoiser.draw_samples(unet, folder, sampling_settings(config), tracker, step)
    del unet  # Under ZeRO it is a separate model.
    loop.require_finite(losses["val_loss"], step, config.learning_rate)
    loop.record(losses, step, folder, tracker, accelerator.is_main_process)
    return losses


def validation_loss(
    unet: Any, inputs: Inputs, limit: int, accelerator: Any, at_once: int = VALIDATION_BATCH
) -> dict[str, float]:
    """Return the unweighted loss on validation images with fixed noise: the mean, and the loss per quarter of the noise levels.

    Every run on the same data gets the same noise at the same timesteps, so that runs can be compared.

    Args:
        limit: largest number of images to measure.
        at_once: largest number of images per batch of all processes. It does not decide an image's noise.
    """
    import numpy as np
    import torch

    from t2i.diffusion import TIMESTEP_BANDS, denoising_loss, draw, validation_timesteps

    latents, text = inputs.caches["validation"]
    side, world, rank = latents.shape[-1], accelerator.num_processes, accelerator.process_index
    sums, counted = torch.zeros(TIMESTEP_BANDS), 0
    unet.eval()
    count, at_once = min(limit, len(latents)), min(VALIDATION_BATCH, at_once)
    for start in range(0, count, at_once):
        indices = np.arange(start, min(start + at_once, count))[rank::world]
        counted += len(indices)
        if not len(indices):
            continue
        levels = torch.tensor([validation_timesteps(index, 1000) for index in indices])
        for band in range(TIMESTEP_BANDS):
            draws = draw(VALIDATION_SEED, band, indices.tolist(), (latents.shape[2] // 2, side, side), 1000)
            batch = to_device(
                latents[indices, 0], draws.posterior_noise, draws.noise, levels[:, band], text, text.rows_of(indices),
                inputs.scaling_factor, accelerator,
            )  # fmt: skip
            with torch.no_grad(), accelerator.autocast():
                sums[band] += denoising_loss(unet, inputs.scheduler, *batch).sum().cpu()
    unet.train()
    total = accelerator.reduce(torch.tensor([*sums.tolist(), counted]).to(accelerator.device)).cpu()
    bands = (total[:-1] / total[-1]).tolist()
    width = 1000 // TIMESTEP_BANDS
    named = {f"val_loss_{band * width}_{(band + 1) * width}": value for band, value in enumerate(bands)}
    return {"val_loss": sum(bands) / TIMESTEP_BANDS, **named}


if __name__ == "__main__":
    run_main(main)
