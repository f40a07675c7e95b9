"""Load a pipeline and draw pictures with it. This module draws all pictures of the suite.

A picture depends only on its prompt, seed and settings, not on its batch. Each drawn picture has its own random
generator.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from t2i import models
from t2i.errors import UserError, is_out_of_memory
from t2i.files import read_object
from t2i.models import best_device
from t2i.pictures import engines
from t2i.pictures.guide import attach, download_guide, guiding, load_guide, unguided
from t2i.pictures.png import (  # noqa: F401 - other modules import them from here
    PRESETS,
    SCHEDULERS,
    STUDENT,
    cut_prompt,
    guided_steps,
    picture_grid,
    read_parameters,
    save_picture,
    scheduler_problem,
)
from t2i.runs import checkpoint_copies, checkpoint_folders, guide_folder, own_checkpoint
from t2i.training.checkpoints import MANIFEST, find_damage

OPTIONS: dict[str, Any] = {  # Options of diffusers' `from_pretrained` for a whole pipeline.
    "dtype": torch.float32,  # By default, transformers keeps half precision, and diffusers does not. They cannot be mixed.
    "use_safetensors": True,
    "safety_checker": None,
    "feature_extractor": None,  # Only the safety checker needs it.
    "requires_safety_checker": False,
}


def load_pipeline(
    model: str | Path,
    *,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    device: str | torch.device = "cpu",
    weights: str = "ema",
    revision: str | None = None,
    engine: str = "torch",
) -> StableDiffusionPipeline:
    """Load the stock pipeline of a run folder, one of its checkpoints, a pipeline folder or a Hub id.

    Args:
        scheduler: a key of `SCHEDULERS` or a class name of diffusers. With None, keep the saved scheduler (DDIM).
        num_inference_steps: number of steps that the scheduler must be able to work with.
        weights: weights of a checkpoint to use, "ema" or "raw".
        revision: branch, tag or commit of a Hub model.
        engine: engine that draws, one of `engines.ENGINES`. The engine "auto" uses compiled models if the model's
            folder has them and the device is the CPU. The engine "openvino" uses compiled models, and compiles them if
            the model's folder has none.

    Raises:
        UserError: the model cannot be loaded, the device cannot be used, or the scheduler does not suit the model.
    """
    if engine == "openvino" and not str(device).startswith("cpu"):
        raise UserError(f"engine openvino draws on the CPU, not on {device}; take --device cpu or --engine torch")
    _check_device(device)
    try:
        folder = Path(model).expanduser()
        folder = own_checkpoint(folder.parent, str(folder))
        is_folder = folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # the path is too long, or names an unknown user
        raise UserError(f"model {str(model)[:200]} cannot be a folder ({error}); correct the path") from None
    if is_folder and revision:
        raise UserError(
            f"revision {revision} is a revision of the Hub, and model {model} is a folder here; leave out --revision"
        )
    if weights == "raw" and (not is_folder or (folder / "model_index.json").is_file()):
        raise UserError(
            f"model {model} is a pipeline, which has its weights once; leave out --weights raw, or give a checkpoint"
        )
    compiled = engine != "torch" and _exported(folder, weights, device, engine)
    if compiled:
        try:
            pipeline = engines.load_exported(compiled)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the compiled models in {compiled / engines.FOLDER} cannot be loaded ({reason}); run make export "
                f"MODEL={compiled}, or take --engine torch"
            ) from None
    elif is_folder:
        pipeline = _load_folder(folder, weights)
    elif folder.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise UserError(f"model {model} is neither a folder here nor a Hub id of the form ORG/NAME; correct the path")
    else:
        try:
            _check_class(model, _download_index(str(model), revision))
            pipeline = StableDiffusionPipeline.from_pretrained(str(model), revision=revision, **OPTIONS)
            pipeline = attach(pipeline, download_guide(str(model), revision))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"no folder {model} here, and as a Hub id it cannot be loaded ({reason}); correct --model"
            ) from None
    for part in (unguided(pipeline.unet), pipeline.vae):
        if hasattr(part, "register_to_config"):
            # A student is saved with it, and a local path must not be published.
            part.register_to_config(_name_or_path="")
    if engine == "openvino" and not compiled:
        pipeline = engines.compile_pipeline(pipeline)
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config, num_inference_steps)
    pipeline.set_progress_bar_config(disable=True)
    try:
        return pipeline.to(device)
    except RuntimeError as error:
        raise UserError(
            f"the model cannot be moved to device {device} ({str(error).splitlines()[0][:150]}); give --device cpu"
        ) from None


def _check_device(device: str | torch.device) -> None:
    """Raise `UserError` if a device is missing or unknown. The device is checked before any model is loaded."""
    try:
        torch.zeros(1, device=device).add(1).cpu()
    except Exception as error:  # each backend raises its own kinds of errors
        known = dict.fromkeys(["cpu", best_device()])
        raise UserError(
            f"device {device} cannot be used ({str(error).splitlines()[0][:150]}); give one of {', '.join(known)}, or leave it out"
        ) from None


def _download_index(repo_id: str, revision: str | None) -> dict[str, Any]:
    """Return the model_index.json of a pipeline on the Hub, or {} if it cannot be read, as diffusers then explains."""
    name = "model_index.json"
    try:
        cached = try_to_load_from_cache(repo_id, name, revision=revision)  # A pipeline keeps its class.
        return read_object(
            Path(cached if isinstance(cached, str) else hf_hub_download(repo_id, name, revision=revision))
        )
    except (OSError, ValueError):
        return {}


def _check_class(model: str | Path, index: Mapping[str, Any]) -> None:
    """Raise `UserError` if the content of a model_index.json names another class than `StableDiffusionPipeline`."""
    kind = index.get("_class_name", "StableDiffusionPipeline")
    if kind != "StableDiffusionPipeline":
        raise UserError(f"model {model} is a {kind}, which this suite cannot draw with; give a StableDiffusionPipeline")


def _exported(folder: Path, weights: str, device: str | torch.device, engine: str) -> Path | None:
    """Return the pipeline folder with valid compiled models for `folder` and `weights`.

    Returns:
        The pipeline folder, or None without compiled models or on a device other than the CPU.

    Raises:
        UserError: the name of the engine is unknown.
    """
    if engine not in engines.ENGINES:
        raise UserError(f"unknown engine {engine!r}; take one of {', '.join(engines.ENGINES)}")
    if torch.device(device).type != "cpu":
        return None
    own = folder / "pipeline" if (folder / "run.json").is_file() and weights == "ema" else folder
    return own if engines.is_installed() and engines.is_exported(own) else None


def _load_folder(folder: Path, weights: str) -> StableDiffusionPipeline:
    if (folder / "model_index.json").is_file():
        index = read_object(folder / "model_index.json")
        _check_class(folder, index)
        missing = [
            name
            for name, kind in index.items()
            if isinstance(kind, list) and kind[:1] != [None] and name not in OPTIONS and not (folder / name).is_dir()
        ]
        if missing:
            raise UserError(
                f"the pipeline in {folder} lacks {', '.join(missing)}, which its model_index.json names; copy the whole folder"
            )
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(folder, **OPTIONS)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # Damaged JSON raises the last three.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(
                f"the pipeline in {folder} cannot be loaded ({reason}); copy the whole folder, with safetensors weights"
            ) from None
        return attach(pipeline, load_guide(guide_folder(folder)))
    if (folder / "vae" / "config.json").is_file() and not (folder / "unet").is_dir():
        raise UserError(f"{folder} is the run of an autoencoder; give the run folder of train_unet.py")
    if (folder / "state.json").is_file():  # a checkpoint holds the UNet; the run's pipeline holds the rest
        beside = folder.absolute().parent / "pipeline"
        if not beside.is_dir():
            raise UserError(
                f"{folder} is a checkpoint without its run: VAE, text encoder and tokenizer lie in pipeline/ beside it, which is "
                f"missing; copy the run folder whole, or put its pipeline/ at {beside}"
            )
        part = "unet_ema" if weights == "ema" and (folder / "unet_ema").is_dir() else "unet"
        if (folder / MANIFEST).is_file() and (problem := find_damage(folder, f"{part}/")):
            raise UserError(f"{problem}, so its pictures would be wrong; copy that checkpoint again, or take another")
        home = folder.parent / "pipeline"
        pipeline = assemble(home, models.load_part(UNet2DConditionModel, str(folder / part), "unet"))
        return attach(pipeline, load_guide(guide_folder(home, folder)))
    if (folder / "run.json").is_file():
        if (folder / "pipeline" / "unet").is_dir() and weights == "ema":
            return _load_folder(folder / "pipeline", weights)
        checkpoints = checkpoint_folders(folder)
        if checkpoints:
            return _load_folder(checkpoints[-1], weights)
        copies = checkpoint_copies(folder)
        if copies:
            raise UserError(
                f"the run in {folder} has no checkpoint of its own, only copies; give --model {folder / copies[-1]} to draw with a copy"
            )
        if read_object(folder / "run.json").get("status") == "finished":
            raise UserError(
                f"the checkpoints of the finished run in {folder} were removed, and only they hold raw weights; "
                "leave out --weights raw, or restore a checkpoint from a copy"
            )
        raise UserError(
            f"the run in {folder} has no checkpoint yet; let scripts/train_unet.py reach its first --checkpointing_steps"
        )
    raise UserError(
        f"{folder} is neither a run folder, a checkpoint nor a pipeline (no run.json, state.json or model_index.json)"
    )


def assemble(parts: Path, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Return the stock pipeline of `unet` and of the VAE, text encoder, tokenizer and scheduler in `parts`.

    Args:
        parts: `pipeline/` of a run, which holds the frozen models from the start of the training.
    """
    text_encoder = models.load_part(CLIPTextModel, str(parts), "text_encoder").float()
    tokenizer = models.load_part(CLIPTokenizer, str(parts), "tokenizer")
    scheduler = models.load_part(DDIMScheduler, str(parts), "scheduler")
    return models.build_pipeline(models.load_decoder(str(parts)), text_encoder, tokenizer, unet, scheduler)


def unet_hash(pipeline: StableDiffusionPipeline) -> str:
    """Return `models.hash_model` of a pipeline's UNet, which is the same for every engine."""
    unet = unguided(pipeline.unet)
    return getattr(unet, "weights_hash", None) or models.hash_model(unet)


def make_scheduler(name: str, config: Any, num_inference_steps: int | None = None) -> Any:
    """Return a scheduler with the noise schedule of another scheduler's `config`.

    Args:
        name: a key of `SCHEDULERS` or a class name of diffusers.
        num_inference_steps: number of denoising steps, or None if it is not chosen yet.

    Raises:
        UserError: the scheduler is unknown, or does not suit the model or the number of steps.
    """
    cls: Any = getattr(diffusers, SCHEDULERS.get(name.lower(), name), None)
    if not (name.lower() in SCHEDULERS or name.endswith("Scheduler")) or not hasattr(cls, "from_config"):
        raise UserError(
            f"unknown scheduler {name!r}; take one of {', '.join(SCHEDULERS)}, or a scheduler class of diffusers"
        )
    problem = scheduler_problem(name, config, num_inference_steps)
    if problem:
        raise UserError(problem)
    # Latents have no bounds, so they must not be clipped. A config from a class without clipping does not say so, and other
    # classes clip by default.
    unclipped = "clip_sample" not in config and "clip_sample" in inspect.signature(cls.__init__).parameters
    return cls.from_config(config, **({"clip_sample": False} if unclipped else {}))


def student_scheduler(config: Any, steps: int) -> DDIMScheduler:
    """Return the scheduler of a student, with the noise schedule of its teacher.

    Args:
        config: config of the teacher's scheduler.
        steps: number of steps in which the student draws. They are spread evenly from pure noise to the picture.
    """
    spread = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    scheduler = DDIMScheduler.from_config(config, **spread)
    scheduler.register_to_config(**{STUDENT: steps})
    return scheduler


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: str = "",
    guidance_scale: float = 7.5,
    num_inference_steps: int = 30,
    guidance_end: float = 1.0,
    guidance_rescale: float = 0.0,
    batch_size: int = 8,
    progress: bool = True,
    watch: Callable[[int, int, Callable[[], np.ndarray]], None] | None = None,
) -> np.ndarray:
    """Draw pictures, one for each prompt and its seed.

    Noise is drawn on the CPU from each picture's own seed. A picture is the same in any batch, to within 1/255, because
    its noise comes from its own seed.

    Args:
        seeds: seeds of the noise, one per prompt, 0 to 2**63 - 1.
        guidance_end: share of the steps, from the first on, that are guided (at least one). Unguided denoising steps
            take half the time.
        guidance_rescale: how far the guided prediction is scaled to the standard deviation of the unguided one, 0 to 1.
            Source: Lin et al., 2024, arXiv:2305.08891, section 3.4, who recommend 0.7.
        watch: function that is called after each denoising step with the step's number (from 1), the number of steps
            and a second function. The second function returns the pictures that the model predicts at this step (x0),
            uint8 [B, R, R, 3]. Watching the drawing does not change the pictures. An exception that `watch` raises ends
            the drawing.

    Returns:
        The drawn pictures, uint8 [N, R, R, 3].

    Raises:
        UserError: memory runs out, or the pictures have non-finite values.
    """
    pictures = []
    bar = tqdm(total=len(prompts), desc="pictures", unit="picture", disable=not progress, mininterval=0.5)
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        made = _drawn(
            pipeline,
            part,
            negative_prompt=[negative_prompt] * len(part),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]],
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            num_inference_steps=num_inference_steps,
            output_type="np",
            **_after_steps(pipeline, num_inference_steps, guidance_end, watch),
        )
        pictures.append((made * 255).round().astype(np.uint8))
        bar.update(len(part))
    bar.close()
    return np.concatenate(pictures)


def _drawn(pipeline: StableDiffusionPipeline, prompts: list[str], **options: Any) -> np.ndarray:
    """Return the pipeline's pictures, float [B, R, R, 3] in [0, 1].

    Raises:
        UserError: memory runs out, or the pictures have non-finite values.
    """
    try:
        with guiding(pipeline):
            made = pipeline(prompts, **options).images
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error)
        raise UserError(
            f"memory does not suffice for {len(prompts)} pictures at once ({text.splitlines()[0][:150] if text else 'none left'}); "
            "draw fewer at once, by a smaller --batch_size, --eval_batch_size or number of --validation_prompts"
        ) from None
    if not np.isfinite(made).all():
        raise UserError(
            f"the model's numbers overflowed at guidance_scale {options['guidance_scale']:g} with "
            f"{type(pipeline.scheduler).__name__}, so there is no picture; lower the guidance scale, or take scheduler ddim"
        )
    return made


def _after_steps(
    pipeline: StableDiffusionPipeline, steps: int, guidance_end: float,
    watch: Callable[[int, int, Callable[[], np.ndarray]], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return arguments that make the pipeline call `watch`, and end guidance after a share of the steps.

    Args:
        guidance_end: share of the steps, from the first on, that are guided.
    """
    guided = guided_steps(steps, guidance_end)
    last_guided = _calls(pipeline.scheduler, guided)
    if guided == steps and watch is None:
        return {}
    wanted = ["latent_model_input", "noise_pred"] if watch else []
    # diffusers can pass on any local variable of its loop, but allows only those in a list. Only this pipeline's list changes.
    pipeline._callback_tensor_inputs = [*type(pipeline)._callback_tensor_inputs, *wanted]

    def step_ended(pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        def picture() -> np.ndarray:
            output = tensors["noise_pred"]
            latents = predicted_x0(pipe.scheduler, tensors["latent_model_input"][: len(output)], output, timestep)
            with torch.no_grad():
                images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
            return (pipe.image_processor.postprocess(images, output_type="np") * 255).round().astype(np.uint8)

        if watch:
            watch(number + 1, pipe.num_timesteps, picture)
        if guided < steps and number + 1 == last_guided and pipe.do_classifier_free_guidance:
            pipe._guidance_scale = 1.0  # diffusers' documentation ends guidance in this way
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}
        return {}

    return {"callback_on_step_end": step_ended, "callback_on_step_end_tensor_inputs": [*wanted, "prompt_embeds"]}


def _calls(scheduler: Any, steps: int) -> int:
    """Return how many calls of the UNet a scheduler's first steps take. Heun's method makes two per step."""
    if not isinstance(scheduler, PNDMScheduler):
        return steps * scheduler.order
    # PNDM starts with three steps of Runge and Kutta, or with one of Heun.
    return steps + 1 if scheduler.config.skip_prk_steps else steps + 3 * min(steps, 3)


def predicted_x0(scheduler: Any, sample: torch.Tensor, output: torch.Tensor, timestep: Any) -> torch.Tensor:
    """Return the noiseless latents [B, C, h, w] that the model predicts by its `output`.

    Source: Ho et al., 2020, equation 15 (epsilon) and Salimans and Ho, 2022, appendix D (v_prediction). The formula
    uses the model's own input, so the formula holds for every scheduler.

    Args:
        sample: noisy latents, the input of the model, [B, C, h, w].
        output: output of the model, [B, C, h, w].
        timestep: timestep of the step, any number. Some schedulers step between two timesteps of the training. Between
            two timesteps of the training, the nearest timestep is used.
    """
    steps = scheduler.alphas_cumprod
    alpha = steps[min(len(steps) - 1, max(0, round(float(timestep))))].to(sample).clamp(min=1e-8)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return alpha.sqrt() * sample - (1 - alpha).sqrt() * output
    return (sample - (1 - alpha).sqrt() * output) / alpha.sqrt()
