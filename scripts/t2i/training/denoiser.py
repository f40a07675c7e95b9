"""What the trainings of denoisers share: provenance, samples and the finished pipeline."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from t2i import config, models
from t2i.config import Recipe, TrainUnetConfig
from t2i.errors import UserError, is_out_of_memory
from t2i.files import append_jsonl, hash_json, share_weights, write_json
from t2i.hub import model_card
from t2i.pictures import sampling
from t2i.runs import GUIDE, GUIDE_STEP, RunFolder, code_revision
from t2i.training import checkpoints, loop, zero
from t2i.training.distributed import give_back_memory


def provenance(recipe: Recipe, input_hashes: dict[str, str]) -> dict[str, Any]:
    """Return the run's provenance for the model card: hashes and origins of its inputs, and the revision of the code."""
    return {
        **input_hashes,
        "dataset": config.dataset_name(recipe.data),
        "dataset_id": model_card.hub_id(recipe.data.dataset),
        "vae_run": model_card.find_vae_run(recipe, input_hashes),
        "code": code_revision(),
    }


def save_frozen(run: RunFolder, frozen: dict[str, Any], scheduler: Any) -> None:
    """Save the models that the training leaves as they are, and the scheduler, in the run's pipeline."""
    for name in {"vae", "text_encoder", "tokenizer"} & set(frozen):
        frozen[name].save_pretrained(run.folder / "pipeline" / name)
        share_weights(run.folder / "pipeline" / name)
    scheduler.save_pretrained(run.folder / "pipeline" / "scheduler")


def show_progress(progress: Any, losses: list[float], validation: dict[str, float]) -> None:
    """Show the mean of the last training losses, and the last validation loss, beside the progress bar."""
    figures = {"val": f"{validation['val_loss']:.4f}"} if validation else {}
    progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False, **figures)


def record_samples(folder: Path, done: int, ids: Callable[[], list[str]], accelerator: Any) -> None:
    """Append the hash of the main process's sample ids of update `done` to samples.jsonl."""
    if accelerator.is_main_process:
        append_jsonl(folder / "samples.jsonl", {"step": done, "samples": hash_json(ids())})


def sample(
    train_state: loop.TrainState,
    folder: Path,
    settings: dict[str, Any],
    tracker: Any,
    step: int,
    accelerator: Any,
) -> None:
    """Draw pictures with the averaged weights between two validations. Every process must call this function."""
    with loop.averaged(train_state) as unet:
        if accelerator.is_main_process and settings["prompts"]:
            draw_samples(unet, folder, settings, tracker, step)
        elif accelerator.is_main_process:
            print("WARNING: no samples were drawn, because this training has no --validation_prompts", file=sys.stderr)


def draw_samples(unet: Any, folder: Path, settings: dict[str, Any], tracker: Any, step: int) -> None:
    """Draw pictures of the validation prompts with fixed seeds, save them in samples/ and log them.

    VAE and text encoder are loaded only for this call.

    Args:
        settings: arguments of `sampling.generate`. The prompts are the validation prompts.
    """
    count, problem = len(settings["prompts"]), ""
    unet.eval()
    try:
        pipeline = sampling.assemble(folder / "pipeline", unet).to(unet.device)
        pictures = sampling.generate(pipeline, seeds=range(count), **settings, progress=False)
        grid = sampling.picture_grid(pictures, columns=min(8, count))
        (folder / "samples").mkdir(exist_ok=True)
        grid.save(folder / "samples" / f"step-{step:06d}.png")
    except (UserError, OSError) as error:  # A training must not end because of this.
        problem = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = (
            f"the memory is full ({str(error).splitlines()[0][:150]}); to see pictures, lower --train_batch_size and raise "
            "--gradient_accumulation_steps"
        )
    finally:
        unet.train()
    if problem:
        print(f"WARNING: no validation pictures at step {step}: {problem}", file=sys.stderr)
    elif tracker:
        tracker.log_image(grid, "samples", step)


def keep_guide(
    folder: Path, train_state: loop.TrainState, config: TrainUnetConfig, step: int, accelerator: Any
) -> None:
    """Save the averaged weights as the guide of later pictures, if `guide_step` updates are done and another one begins.

    Every process must call this function. A resumed training begins with it too. The last weights cannot guide themselves.
    """
    if step != config.guide_step:
        return
    with loop.averaged(train_state) as unet:
        if accelerator.is_main_process:
            part, place = folder / "pipeline" / f".{GUIDE}.part", folder / "pipeline" / GUIDE
            try:
                shutil.rmtree(part, ignore_errors=True)  # A killed save leaves it behind.
                unet.save_pretrained(part, safe_serialization=True)
                write_json(part / GUIDE_STEP, {"step": step})
                share_weights(part)
                for file in (*part.iterdir(), part):
                    checkpoints.sync(file)
                shutil.rmtree(place, ignore_errors=True)
                part.rename(place)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"the guide cannot be saved in {place} ({checkpoints.reason_of(error)}); make room, and run the same command again"
                ) from None


def finish(
    run: RunFolder,
    train_state: loop.TrainState,
    results: dict[str, Any],
    tracker: Any,
    accelerator: Any,
    *,
    raw: bool = False,
) -> None:
    """Save the pipeline and the results. Every process must call this function.

    Args:
        results: the run's results for run.json.
        raw: whether the pipeline gets the raw weights. Without it, the pipeline gets their average, if there is one.
    """
    weights, average = loop.gather(train_state)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    unet, folder = train_state.module, run.folder / "pipeline"
    if weights is not None:
        unet = zero.with_weights(unet, weights if average is None or raw else average)
    elif train_state.ema and not raw:
        train_state.ema.copy_to(train_state.parameters)
    if weights is None:  # This makes room for VAE and text encoder. Nothing needs the moments any more.
        train_state.optimizer.state.clear()
    give_back_memory()
    unet.cpu().save_pretrained(folder / "unet", safe_serialization=True)
    share_weights(folder / "unet")
    # The frozen models are there since the start. Windows refuses to replace their files while they are mapped into memory.
    sampling.assemble(folder, unet).save_config(folder)
    skips = {f"{kind}_skips": count for kind, count in train_state.skipped.items()}
    run.finish(
        **results, **skips, processes=accelerator.num_processes, precision=accelerator.mixed_precision,
        machine=loop.machine(accelerator), output_unet_hash=models.hash_model(unet),
        distribution=str(accelerator.distributed_type.value), tracking=tracker.view if tracker else None,
        zero_stage=run.state["effective"]["zero_stage"],
    )  # fmt: skip
    loop.finish_tracker(tracker, run)
    print(f"pipeline in {folder}: train loss {results['train_loss']:.4f}, validation loss {results['val_loss']:.4f}")
