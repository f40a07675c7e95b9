"""Distil a denoiser into a student that draws in 1, 2 or 4 steps without guidance, and save the student's pipeline.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/distill_unet.py --model outputs/demo/unet \
    --output_dir outputs/demo/turbo

The teacher draws pictures with guidance and keeps the latents between its steps. The student starts from the teacher's
weights and learns to go from each kept point to the next in a single step. Settings and data set are those of the
teacher's run. The teacher's drawings are cached, so VAE, text encoder and teacher are not in memory during training.
"""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i import redaction
from t2i.config import DistillConfig, Recipe, parse, run_of, to_dict, with_settings_of_model
from t2i.errors import UserError, run_main
from t2i.files import read_optional, share_weights, write_json
from t2i.hub import model_card
from t2i.loading import find_dataset
from t2i.run_lock import lock_run
from t2i.runs import RunFolder, check_finished
from t2i.training.prefetch import Prefetcher

# Modules that import torch are imported inside functions. `--help` and error messages about options then appear at once.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from t2i.training.loop import TrainState

    Batch = tuple[torch.Tensor, ...]  # The result of `make_batch`.


@dataclass
class Inputs:
    """Data that all training steps read."""

    scheduler: Any  # The student's scheduler.
    timesteps: Any  # Noise levels of the points of a trajectory, int64 [points]. The last is -1: no noise.
    embeddings: Any  # Text embeddings of all captions, float16 [M, L, D], by split.
    # Trajectories, float16 [N, points, C, h, w], and the rows of their captions in the embeddings, int64 [N], by split.
    trajectories: "dict[str, tuple[np.ndarray, np.ndarray]]"


TRACKED = 50  # Number of last logged losses whose mean is the run's final train loss.
VALIDATION_SEED = 20231  # This is added to the seed for the noise of the validation trajectories.
VALIDATION_BATCH = 32  # Trajectories per batch of the validation loss, if training's own batch is not smaller.


def main() -> None:
    recipe = parse(("data", "distill"), __doc__ or "", with_settings_of_model(sys.argv[1:]))
    config = recipe.distill
    run_of_teacher = check_model(config)
    find_dataset(recipe.data)
    folder = Path(config.output_dir or "outputs/turbo")

    # accelerator
    from t2i.training.distributed import check_effective, keep_freed_memory, make_accelerator

    accelerator = make_accelerator(config)
    held = ExitStack()  # It holds the lock until the process ends, so that no second training writes into this folder.
    if not config.dry_run:
        held.enter_context(lock_run(folder, accelerator.process_index, accelerator.wait_for_everyone))

    # data
    import torch

    from t2i import models
    from t2i.training import denoiser, live, loop, stopping, zero
    from t2i.training.cuda_graph import capture

    stopping.end_in_words()
    loop.check_tracker(config, recipe.data.cache_dir, accelerator.print)
    splits = loop.load_splits(recipe.data, accelerator)
    if config.dry_run:
        return

    # models
    frozen, unet, scheduler, input_hashes = load_teacher(recipe, splits, run_of_teacher)
    count = config.trajectories * config.num_inference_steps
    steps = loop.total_steps(config, count, accelerator.num_processes)
    batch = loop.global_batch(config, accelerator.num_processes)
    run = RunFolder(folder, identity_of(recipe, {"steps": steps, "global_batch": batch, **input_hashes}))
    if loop.is_done(run, config, accelerator):
        if accelerator.is_main_process:  # Another node may have no run.json.
            print(f"reusing the finished run in {folder / 'pipeline'} (validation loss {run.state['val_loss']:.4f})")
        return
    extensions = loop.extend(run, config, steps, accelerator)
    start_run(run, recipe, splits, frozen, scheduler, input_hashes, accelerator)
    with run.timed("cache"):
        inputs = cache_inputs(recipe, splits, frozen, unet, scheduler, input_hashes, accelerator)
        save_decoder(run, recipe, inputs, frozen["vae"], accelerator)
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
    if not start:  # These are the teacher's own errors, if it draws like the student.
        validate(train_state, inputs, folder, recipe, tracker, 0, accelerator)
    accelerator.print(
        f"{steps} steps of {batch} of {count} steps of trajectories, precision {accelerator.mixed_precision}"
    )

    # loop
    keep_freed_memory(accelerator)
    make, micro_batches = partial(make_batch, inputs, config, accelerator), config.gradient_accumulation_steps
    batches = Prefetcher(make, steps * micro_batches, accelerator.device)
    compute = partial(loss_and_gradients, train_state, inputs, accelerator)
    # On one GPU this is `compute` recorded as a CUDA graph. Otherwise it is `compute` itself.
    forward_backward = capture(compute, partial(make, start * micro_batches), train_state, config, accelerator)
    with run.timed("train"), live.listen(folder, start, steps, batch, accelerator) as training:
        progress = loop.progress_bar("student", start, steps, accelerator)
        for step in progress:
            terms: dict[str, torch.Tensor] = {}  # These are means over the micro-batches, whose gradients add up.
            for number in range(step * micro_batches, (step + 1) * micro_batches):
                with accelerator.accumulate(model):
                    terms = loop.add_terms(terms, forward_backward(*batches.take(number)), micro_batches)
            norm = loop.clip_gradients(train_state, config, accelerator)
            ids = partial(sample_ids, inputs, config, step, accelerator)
            loop.step_optimizer(train_state, config, step, norm, terms["train_loss"], ids, accelerator)
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
                validation = validate(train_state, inputs, folder, recipe, tracker, done, accelerator)
            elif asked.sample:
                denoiser.sample(train_state, folder, sampling_settings(recipe), tracker, done, accelerator)
            if due or asked.stop:
                saved = {"step": done, "losses": losses, "validation": validation}
                loop.save(folder, train_state, config, saved, node, accelerator)
            if asked.stop:
                break
    if training.asked.stop:
        loop.exit_stopped(run, tracker, done, steps, accelerator)

    # finish
    del forward_backward  # This frees the memory of a step.
    results = {"train_loss": sum(losses) / len(losses), **validation, "steps": steps, "train_images": len(splits.train)}
    denoiser.finish(run, train_state, results, tracker, accelerator)
    if accelerator.is_main_process:
        model_card.write_model_card(folder, None)


def check_model(config: DistillConfig) -> Path | None:
    """Return the run folder of the teacher, if it has one.

    Raises:
        UserError: no teacher is named, its training has not finished, or the student would be written into its folder.
    """
    if not config.model:
        raise UserError("no model: give --model with the run folder of train_unet.py, whose denoiser is distilled")
    run = run_of(config.model)
    check_finished(Path(config.model).expanduser())
    if run and config.output_dir and Path(config.output_dir).expanduser().resolve() == run.resolve():
        raise UserError(f"--output_dir {config.output_dir} is the teacher's own run; give another folder")
    return run


def load_teacher(
    recipe: Recipe, splits: Any, run: Path | None
) -> "tuple[dict[str, Any], torch.nn.Module, Any, dict[str, str]]":
    """Load the teacher, and fill in its settings where the recipe leaves them open.

    Args:
        run: run folder of the teacher, if it has one.

    Returns:
        VAE, text encoder, tokenizer and the teacher's guide (None without one) by name; the UNet; the student's scheduler;
            the hashes of all inputs.

    Raises:
        UserError: the teacher cannot be loaded, is a student itself, or draws pictures of another size.
    """
    from t2i import models
    from t2i.pictures import sampling
    from t2i.pictures.guide import guide_of, unguided
    from t2i.pictures.png import student_steps
    from t2i.training import tiny_decoder

    config = recipe.distill
    pipeline = sampling.load_pipeline(str(config.model))
    schedule = pipeline.scheduler.config
    if student_steps(schedule):
        raise UserError(f"{config.model} is a student already; give --model with the run that it was distilled from")
    side = pipeline.unet.config.sample_size * models.vae_factor(pipeline.vae)
    if side != recipe.data.resolution:
        raise UserError(
            f"resolution {recipe.data.resolution} does not fit {config.model}, which draws {side} px; give --resolution {side}"
        )
    sampling.make_scheduler("ddim", schedule, config.num_inference_steps)  # This refuses other kinds of models.
    config.guidance_scale, config.guidance_rescale = choose_guidance(recipe, run)
    if config.decoder_steps is None:
        config.decoder_steps = tiny_decoder.default_steps(pipeline.vae)
    scheduler = sampling.student_scheduler(schedule, config.num_inference_steps)
    guide = guide_of(pipeline.unet)
    frozen = {
        "vae": pipeline.vae,
        "text_encoder": pipeline.text_encoder,
        "tokenizer": pipeline.tokenizer,
        "guide": guide,
    }
    input_hashes = {
        "dataset_hash": splits.fingerprint,
        "teacher_hash": models.hash_model(unguided(pipeline.unet)),
        **({"guide_hash": models.hash_model(guide)} if guide else {}),
        "vae_hash": models.hash_model(pipeline.vae),
        "text_encoder_hash": models.hash_model(pipeline.text_encoder),
        "tokenizer_hash": models.hash_tokenizer(pipeline.tokenizer),
        **splits.repair_hashes(),
    }
    # Pages, cards and evaluations read from these settings how the student draws.
    recipe.train_unet.guidance_scale, recipe.train_unet.guidance_rescale = 1.0, 0.0
    recipe.train_unet.num_inference_steps = recipe.evaluate.num_inference_steps = config.num_inference_steps
    recipe.evaluate.preset, recipe.evaluate.guidance_scales, recipe.evaluate.guidance_rescale = None, [1.0], 0.0
    return frozen, unguided(pipeline.unet), scheduler, input_hashes


def identity_of(recipe: Recipe, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides a student: its settings, its `inputs`, and how the teacher draws its pictures."""
    from t2i.training import loop
    from t2i.training.trajectories import SOLVER

    config = recipe.distill
    decisive = {name: getattr(config, name) for name in ("num_inference_steps", "guidance_scale")}
    decisive |= {"guidance_rescale": config.guidance_rescale} if config.guidance_rescale else {}
    return loop.identity(recipe.data, config, teacher_solver=list(SOLVER), **decisive, **inputs)


def choose_guidance(recipe: Recipe, run: Path | None) -> tuple[float, float]:
    """Return guidance scale and guidance rescale to distil: the options', or the evaluation's, or those of the validation pictures."""
    scale, rescale = recipe.distill.guidance_scale, recipe.distill.guidance_rescale
    found = (recipe.train_unet.guidance_scale, recipe.train_unet.guidance_rescale)
    report = read_optional(run / "evaluation" / "evaluation.json").get("report") if run else None
    if isinstance(report, dict) and isinstance(report.get("guidance_scale"), int | float):
        found = (float(report["guidance_scale"]), float(report.get("guidance_rescale") or 0.0))
    return found[0] if scale is None else scale, found[1] if rescale is None else rescale


def start_run(
    run: RunFolder,
    recipe: Recipe,
    splits: Any,
    frozen: dict[str, Any],
    scheduler: Any,
    input_hashes: dict[str, str],
    accelerator: Any,
) -> None:
    """Write the run's settings, its provenance and the pipeline's frozen models. The other processes wait for the main one."""
    from t2i.training import denoiser

    config = recipe.distill
    if accelerator.is_main_process:
        run.start(redaction.public_yaml(to_dict(recipe)), splits.quarantine, accelerator.mixed_precision)
        drawn = {"num_inference_steps": config.num_inference_steps, "guidance_scale": 1.0}
        rescaled = {"distilled_guidance_rescale": config.guidance_rescale} if config.guidance_rescale else {}
        run.save(student={**drawn, "distilled_guidance_scale": config.guidance_scale, **rescaled})
        write_json(run.folder / "provenance.json", denoiser.provenance(recipe, input_hashes))
        kept = {name: model for name, model in frozen.items() if name != "vae" or not config.decoder_steps}
        denoiser.save_frozen(run, kept, scheduler)  # A tiny autoencoder is saved when it is trained.
    accelerator.wait_for_everyone()


def sampling_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the prompts and settings of the validation pictures: the prompts of the teacher's training."""
    prompts, steps = recipe.train_unet.validation_prompts, recipe.distill.num_inference_steps
    return {"prompts": prompts, "guidance_scale": 1.0, "num_inference_steps": steps}


def cache_inputs(
    recipe: Recipe, splits: Any, frozen: dict[str, Any], unet: Any, scheduler: Any, hashes: dict[str, str], accelerator: Any
) -> Inputs:  # fmt: skip
    """Return the text embeddings and the teacher's trajectories of the training and validation captions.

    A training in bf16 also computes them in bf16.
    """
    import numpy as np
    import torch

    from t2i.data import caches
    from t2i.pictures import sampling
    from t2i.training import trajectories

    config, directory, say = recipe.distill, recipe.data.cache_dir, accelerator.print
    scale, rescale = float(config.guidance_scale or 0), float(config.guidance_rescale or 0)
    guidance = {"guidance_scale": scale, **({"guidance_rescale": rescale} if rescale else {})}
    in_bf16 = accelerator.mixed_precision == "bf16"
    precision = {"precision": "bf16"} if in_bf16 else {}
    points, side = config.num_inference_steps + 1, unet.config.sample_size
    scheduler.set_timesteps(config.num_inference_steps)
    inputs = Inputs(scheduler, torch.tensor([*scheduler.timesteps.tolist(), -1]), {}, {})
    solver = sampling.make_scheduler(trajectories.SOLVER.scheduler, scheduler.config | {"_student_steps": None})
    text_encoder, unet = frozen["text_encoder"].to(accelerator.device), unet.to(accelerator.device).eval()
    guide = frozen["guide"].to(accelerator.device) if frozen["guide"] else None
    teacher = {name: hashes[f"{name}_hash"] for name in ("teacher", "guide") if f"{name}_hash" in hashes}
    identity = {"encoder": hashes["text_encoder_hash"], "tokenizer": hashes["tokenizer_hash"], **precision}
    for name, count, seed in (
        ("train", config.trajectories, config.seed),
        ("validation", config.validation_images, config.seed + VALIDATION_SEED),
    ):
        captions = getattr(splits, name).captions()
        captions = captions if name == "train" else [texts[:1] for texts in captions]
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=in_bf16):
            text = caches.cache_text(captions, identity, text_encoder, frozen["tokenizer"], directory, say=say)
            empty = torch.from_numpy(np.array(text.embeddings[:1])).float()
            inputs.trajectories[name] = trajectories.cache_trajectories(
                count, captions, text, {**identity, **teacher, **guidance},
                partial(trajectories.solve_trajectories, unet, guide, solver, scale, rescale, empty, points),
                (points, unet.config.in_channels, side, side), seed, directory, say=say,
            )  # fmt: skip
        inputs.embeddings[name] = text.embeddings
    return inputs


def save_decoder(run: RunFolder, recipe: Recipe, inputs: Inputs, vae: Any, accelerator: Any) -> None:
    """Save the pipeline's tiny autoencoder, unless the student keeps the VAE. Every process must call this function.

    It learns on the last points of the trajectories, which are the latents of finished pictures.
    """
    from t2i.training import tiny_decoder

    config, folder = recipe.distill, run.folder / "pipeline" / "vae"
    if not config.decoder_steps:
        return
    latents, unseen = (inputs.trajectories[split][0][:, -1] for split in ("train", "validation"))
    tiny, decibels = tiny_decoder.cache_tiny(
        vae.to(accelerator.device), latents, unseen, config, recipe.data.cache_dir,
        in_bf16=accelerator.mixed_precision == "bf16", say=accelerator.print,
    )  # fmt: skip
    if accelerator.is_main_process:
        if not folder.is_dir():  # A resumed run has it already.
            part = folder.with_name(".vae.part")
            tiny.save_pretrained(part, safe_serialization=True)
            share_weights(part)
            os.replace(part, folder)
        run.save(decoder_psnr_db=decibels)
        print(f"tiny decoder: {decibels:.1f} dB PSNR to the pictures of the autoencoder")
    accelerator.wait_for_everyone()


def sample_indices(
    inputs: Inputs, config: DistillConfig, number: int, accelerator: Any
) -> "tuple[np.ndarray, np.ndarray]":
    """Return this process's samples of micro-batch `number`: trajectories, int64 [B], and steps of these, int64 [B]."""
    import numpy as np

    from t2i.data.preparing import batch_indices

    world, rank, points = accelerator.num_processes, accelerator.process_index, len(inputs.timesteps)
    count = len(inputs.trajectories["train"][0]) * (points - 1)
    indices = batch_indices(count, config.train_batch_size * world, config.seed, number)[rank::world]
    return np.divmod(indices, points - 1)


def sample_ids(inputs: Inputs, config: DistillConfig, step: int, accelerator: Any) -> list[str]:
    """Return the ids of this process's samples of a weight update: a trajectory's number, and the step's number in it."""
    micro_batches = config.gradient_accumulation_steps
    parts = (
        sample_indices(inputs, config, number, accelerator)
        for number in range(step * micro_batches, (step + 1) * micro_batches)
    )
    return [f"{row}:{point}" for rows, points in parts for row, point in zip(rows, points, strict=True)]


def make_batch(inputs: Inputs, config: DistillConfig, accelerator: Any, number: int) -> "Batch":
    """Return this process's share of micro-batch `number`, on the device."""
    return batch_of(inputs, "train", *sample_indices(inputs, config, number, accelerator), accelerator)


def batch_of(inputs: Inputs, split: str, rows: "np.ndarray", points: "np.ndarray", accelerator: Any) -> "Batch":
    """Return steps of trajectories, on the device: the arguments of `jump_loss` from `latents` on.

    Args:
        rows: numbers of trajectories, int64 [B].
        points: numbers of the points at which the steps begin, int64 [B].
    """
    import torch

    from t2i.training.prefetch import to_device_soon

    trajectories, captions = inputs.trajectories[split]
    parts = (
        torch.from_numpy(trajectories[rows, points]),
        torch.from_numpy(trajectories[rows, points + 1]),
        inputs.timesteps[points],
        inputs.timesteps[points + 1],
        torch.from_numpy(inputs.embeddings[split][captions[rows]]),
    )
    # Latents and text are sent to the device in float16.
    latents, later, timesteps, ends, context = (to_device_soon(part, accelerator.device) for part in parts)
    return latents.float(), later.float(), timesteps, ends, context.float()


def loss_and_gradients(
    train_state: "TrainState", inputs: Inputs, accelerator: Any, *batch: "torch.Tensor"
) -> "dict[str, torch.Tensor]":
    """Compute the forward and backward pass of a batch. Return `train_loss`, and leave the gradients in the parameters."""
    from t2i.diffusion import jump_loss

    loss = jump_loss(train_state.model, inputs.scheduler, *batch).mean()
    accelerator.backward(loss)
    return {"train_loss": loss.detach()}


def validate(
    train_state: "TrainState",
    inputs: Inputs,
    folder: Path,
    recipe: Recipe,
    tracker: Any,
    step: int,
    accelerator: Any,
) -> dict[str, float]:
    """Measure the averaged weights on the validation trajectories, and record errors and pictures. Every process must call it.

    Raises:
        UserError: the loss is non-finite. No checkpoint is then saved with these weights.
    """
    from t2i.training import denoiser, loop

    samples = sampling_settings(recipe)
    with loop.averaged(train_state) as unet:
        losses = validation_loss(unet, inputs, recipe.distill, accelerator)
        if accelerator.is_main_process and samples["prompts"]:
            denoiser.draw_samples(unet, folder, samples, tracker, step)
    del unet  # Under ZeRO it is a separate model.
    loop.require_finite(losses["val_loss"], step, recipe.distill.learning_rate)
    loop.record(losses, step, folder, tracker, accelerator.is_main_process)
    return losses


def validation_loss(unet: Any, inputs: Inputs, config: DistillConfig, accelerator: Any) -> dict[str, float]:
    """Return the student's mean loss over the steps of the validation trajectories, and the error of its pictures.

    The error `val_picture` is the squared error of latents that the student draws from the noise of a trajectory, as a
    share of the mean square of the teacher's latents.
    """
    import numpy as np
    import torch

    from t2i.diffusion import jump, jump_loss

    trajectories, _ = inputs.trajectories["validation"]
    world, rank, steps = accelerator.num_processes, accelerator.process_index, len(inputs.timesteps) - 1
    sums = torch.zeros(3)  # They are losses, squared errors of pictures, and squares of the teacher's latents.
    unet.eval()
    at_once = min(VALIDATION_BATCH, config.train_batch_size * world)  # What fits into memory in training, fits here.
    for start in range(0, len(trajectories), at_once):
        rows = np.arange(start, min(start + at_once, len(trajectories)))[rank::world]
        drawn = None
        for point in range(steps if len(rows) else 0):
            batch = batch_of(inputs, "validation", rows, np.full(len(rows), point), accelerator)
            latents, later, timesteps, ends, context = batch
            drawn = latents if drawn is None else drawn
            with torch.no_grad(), accelerator.autocast():
                sums[0] += jump_loss(unet, inputs.scheduler, *batch).sum().cpu() / steps
                output = unet(drawn, timesteps, context).sample.float()
            drawn = jump(inputs.scheduler, drawn, output, timesteps, ends)
        if drawn is not None:
            sums[1] += (drawn - later).square().mean(dim=(1, 2, 3)).sum().cpu()
            sums[2] += later.square().mean(dim=(1, 2, 3)).sum().cpu()
    unet.train()
    loss, error, square = accelerator.reduce(sums.to(accelerator.device)).cpu().tolist()
    return {"val_loss": loss / len(trajectories), "val_picture": error / square}


if __name__ == "__main__":
    run_main(main)
