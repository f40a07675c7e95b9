"""Publishing a finished run on the Hub: pictures for its card, the card, evaluation results, the push, and loading it back.

The run's `pipeline/` is what the Hub gets. A push that fails leaves the run as it is, and the same call repeats it: pictures
are drawn anew, and files uploaded, only where something changed. Imports no torch before it is needed.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from t2i.config import ModelHubConfig, Recipe, TrainVaeConfig, load_recipe
from t2i.errors import UserError
from t2i.files import read_json, read_object, write_text
from t2i.hub import model_card, upload
from t2i.hub.loading import explain_loading
from t2i.redaction import redact
from t2i.run_lock import run_status

GALLERY = "images/gallery-{}.png"  # {}: 00, 01, …; other pictures in images/ are a person's
CHECK_STEPS = 2  # denoising steps of the picture that the Hub's model and the folder's must draw alike


def check_push(config: ModelHubConfig, accelerator: Any) -> None:
    """End a training now, before the work, if the Hub would refuse its model."""
    if config.push_to_hub:
        repo_id = upload.check_repo_id(config.hub_model_id, "--hub_model_id")
        upload.check_license(config.license or None)
        if accelerator.is_main_process:
            upload.check_access(repo_id, "model", target=upload.Target(config.hub_revision, config.create_pr))


def find_run(model: str | None) -> Path:
    """The finished run folder that `model` names; raise `UserError` where it is none."""
    if not model:
        raise UserError("no model: give --model with the run folder of train_unet.py")
    run = Path(model).expanduser()
    if not (run / "run.json").is_file():
        raise UserError(f"{model} is no run folder (no run.json in it); give --model the output_dir of train_unet.py")
    status = run_status(run)
    if status != "finished":
        raise UserError(f"the run in {model} is not finished (it is {status}); let train_unet.py go on to its end")
    if not (run / "pipeline" / "model_index.json").is_file():
        raise UserError(f"{model} holds no pipeline (no pipeline/model_index.json); give a run folder of train_unet.py")
    return run


def choose_license(run: Path, license: str | None) -> str:
    """The licence of a run's card: `license`, or the one of its settings if that is None or "unknown".

    Raises `UserError` if the Hub takes no such licence.
    """
    if license not in (None, "", "unknown"):
        upload.check_license(license)
        return str(license)
    own = load_recipe(str(run / "config.yaml")).train_unet.license or "unknown"
    upload.check_license(own, f"{run / 'config.yaml'}, train_unet, license")
    return own


def publish_run(run: Path, repo_id: str, *, license: str | None, pictures: int, private: bool, deadline: float,
    target: upload.Target = upload.MAIN,
) -> None:  # fmt: skip
    """Publish the pipeline of a finished run as the model `repo_id`, and check that stock diffusers loads the same one back.

    Args:
        run: finished, as `find_run` returns it.
        license: as the Hub names licences; None or "unknown": that of the run's settings, else the one on the Hub stays.
        pictures: on the card, at most; there are no more than prompts.
        private, deadline, target: as `upload.push_folder` takes them.

    Raises:
        UserError: the push failed for good, or what comes back is not what was pushed. Nothing in `run` is lost by it.
    """
    from t2i.pictures import sampling

    recipe, result = load_recipe(str(run / "config.yaml")), read_object(run / "run.json")
    evaluated = run / "evaluation" / "evaluation.json"
    evaluation = read_json(evaluated) if evaluated.is_file() else {}
    report = evaluation.get("report") or {}
    scale = report.get("guidance_scale", recipe.train_unet.guidance_scale)
    steps = report.get("num_inference_steps", recipe.train_unet.num_inference_steps)
    prompts = gallery_prompts(recipe, evaluation.get("prompts") or [], pictures)
    if pictures and not prompts:
        print("no pictures for the card: there are no validation prompts, and the evaluation kept none")
    folder = run / "pipeline"
    pipeline = sampling.load_pipeline(folder, device=sampling.best_device())

    settings = {"unet": result["output_unet_hash"], "guidance_scale": scale, "num_inference_steps": steps}
    settings |= {"scheduler": model_card.scheduler_of(report), "guidance_end": report.get("guidance_end", 1.0)}
    gallery = draw_gallery(pipeline, folder, prompts, settings)
    chosen = choose_license(run, license)
    publication = model_card.Publication(repo_id, chosen, gallery)
    card = model_card.write_model_card(run, evaluation, publication)
    results = write_eval_results(run, recipe, result, report)
    pushed = upload.push_folder(
        folder, repo_id, "model", files=[*pipeline_files(folder), "README.md", GALLERY.format("*"), *results],
        message=f"UNet {result['output_unet_hash']}, {result['steps']:,} updates", private=private, deadline=deadline,
        merge_card=partial(merge_model_card, card, licensed=chosen != "unknown"), target=target,
    )  # fmt: skip
    print(
        f"{pushed.url} {'has it now' if pushed.changed else 'is up to date'} (commit {pushed.commit[:7]})", flush=True
    )
    check_loads_back(pipeline, repo_id, pushed.commit, prompts[0] if prompts else "", scale)


VAE_CARD = """---
library_name: diffusers
license: {license}
tags:
- autoencoder
---
# Autoencoder

<!-- Text outside of the generated block is yours: publishing again leaves it as it is. -->

{begin}
An autoencoder of images for latent diffusion: {factor} px per latent and side, scaling factor {scaling_factor:.4f}.

| on validation images | before | after |
|---|---|---|
| PSNR, dB | {psnr_db_before:.2f} | {psnr_db:.2f} |
| SSIM | {ssim_before:.3f} | {ssim:.3f} |

```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{repo_id}")
```
{end}
"""


def publish_vae(run: Path, config: TrainVaeConfig) -> None:
    """Publish the autoencoder of a finished run as the model `hub_model_id`; the same call repeats a push that failed.

    Raises:
        UserError: the push failed for good. Nothing in `run` is lost by it.
    """
    result, repo_id = read_object(run / "run.json"), str(config.hub_model_id)
    levels = read_object(run / "vae" / "config.json")["block_out_channels"]
    marks = {"begin": model_card.BEGIN.format("vae"), "end": model_card.END.format("vae")}
    card = VAE_CARD.format(**result, **marks, license=config.license, repo_id=repo_id, factor=2 ** (len(levels) - 1))
    pushed = upload.push_folder(
        run / "vae", repo_id, "model", files=["config.json", "*.safetensors", "README.md"],
        message=f"VAE {result['output_vae_hash']}, {result['steps']:,} updates", private=config.hub_private_repo,
        deadline=config.hub_deadline, merge_card=partial(merge_model_card, card, licensed=config.license != "unknown"),
        target=upload.Target(config.hub_revision, config.create_pr),
    )  # fmt: skip
    print(
        f"{pushed.url} {'has it now' if pushed.changed else 'is up to date'} (commit {pushed.commit[:7]})", flush=True
    )


def gallery_prompts(recipe: Recipe, evaluated: list[str], count: int) -> list[str]:
    """`count` different prompts at most: the validation prompts, then some from all over the evaluation's."""
    own, others = (
        [line for text in texts if (line := model_card.one_line(text, model_card.PROMPT_CHARACTERS))]
        for texts in (recipe.train_unet.validation_prompts, evaluated)
    )
    own = list(dict.fromkeys(own))[:count]
    others = [text for text in dict.fromkeys(others) if text not in own]
    wanted = count - len(own)
    return own + (others[:: max(1, len(others) // wanted)][:wanted] if wanted else [])


def draw_gallery(pipeline: Any, folder: Path, prompts: list[str], settings: dict[str, Any]) -> list[tuple[str, str]]:
    """A picture a prompt in `folder`/images, seeds 0, 1, …; drawn where there is not the same one already.

    settings: the UNet's hash, guidance scale, steps, scheduler and guidance end. Returns prompts and paths relative to `folder`.
    """
    from t2i.pictures import sampling

    wanted = {
        GALLERY.format(f"{seed:02d}"): {"prompt": prompt, "seed": seed, **settings}
        for seed, prompt in enumerate(prompts)
    }
    missing = [path for path, known in wanted.items() if sampling.read_parameters(folder / path) != known]
    if missing:
        print(
            f"drawing {len(missing)} pictures for the card at guidance scale {settings['guidance_scale']:g}", flush=True
        )
        saved = pipeline.scheduler
        pipeline.scheduler = sampling.make_scheduler(settings["scheduler"], saved.config)
        drawn = sampling.generate(
            pipeline, [wanted[path]["prompt"] for path in missing], [wanted[path]["seed"] for path in missing],
            guidance_scale=settings["guidance_scale"], num_inference_steps=settings["num_inference_steps"],
            guidance_end=settings["guidance_end"],
        )  # fmt: skip
        pipeline.scheduler = saved
        (folder / "images").mkdir(exist_ok=True)
        for path, picture in zip(missing, drawn, strict=True):
            sampling.save_picture(folder / path, picture, wanted[path])
    for old in folder.glob(GALLERY.format("*")):
        if old.relative_to(folder).as_posix() not in wanted:
            old.unlink()
    return [(known["prompt"], path) for path, known in wanted.items()]


def write_eval_results(run: Path, recipe: Recipe, result: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """The measured figures as the Hub's evaluation results, `.eval_results/*.yaml` in the pipeline; their paths.

    None where the data set is not on the Hub: an entry says on which of its data sets a figure was measured.
    """
    provenance = run / "provenance.json"
    dataset = model_card.dataset_id(recipe, read_json(provenance) if provenance.is_file() else {})
    figures = model_card.measured(result, report)
    if not dataset or not figures:
        return []
    revision = recipe.data.dataset_revision or ""
    drawn = "{prompts} pictures by {checkpoint} at guidance scale {guidance_scale:g}, {num_inference_steps} steps"
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=re.sub(r"\W+", "_", name.lower()),
            value=value,
            dataset_revision=revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None,
            notes=f"{name}; {'at the end of training' if kind == 'loss' else drawn.format_map(report)}",
        )
        for (kind, name), value in figures.items()
    ]
    path = f".eval_results/{dataset.split('/')[-1]}.yaml"
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    write_text(run / "pipeline" / path, text)
    return [path]


def pipeline_files(folder: Path) -> list[str]:
    """Patterns of a pipeline's files: model_index.json, the folders that it names, and models that `make export` compiled."""
    parts = read_object(folder / "model_index.json").items()
    compiled = ["openvino/*"] if (folder / "openvino" / "engine.json").is_file() else []
    return ["model_index.json", *(f"{name}/*" for name, kind in parts if isinstance(kind, list) and kind[0]), *compiled]


def merge_model_card(card: str, existing: str | None, *, licensed: bool) -> str:
    """`card` with what a person wrote into `existing`, the README.md on the Hub.

    Figures, pictures and the blocks between markers are renewed, and so is the licence where one was chosen. All else in
    `existing` stays, pictures that a person added to `widget` included.
    """
    from t2i.hub.dataset_card import merge_cards

    renewed = ["model-index", *(["license"] if licensed else [])]
    ours, theirs = _widget(card), _widget(existing or "")
    if [entry for entry in theirs if _is_ours(entry)] != ours:
        renewed.append("widget")
        new = ModelCard(card)
        new.data["widget"] = [*ours, *(entry for entry in theirs if not _is_ours(entry))]
        card = str(new)
    return merge_cards(card, existing, renewed)


def _widget(card: str) -> list[Any]:
    """The entries under `widget` in a card's front matter; none where that is broken, which merge_cards tells."""
    match = REGEX_YAML_BLOCK.search(card)
    try:
        data = yaml.safe_load(match[2]) if match else None
    except (yaml.YAMLError, ValueError):
        return []
    entries = data.get("widget") if isinstance(data, dict) else None
    return entries if isinstance(entries, list) else []


def _is_ours(entry: Any) -> bool:
    output = entry.get("output") if isinstance(entry, dict) else None
    return isinstance(output, dict) and str(output.get("url")).startswith(GALLERY.partition("{")[0])


def check_loads_back(pipeline: Any, repo_id: str, commit: str, prompt: str, scale: float) -> None:
    """Load the model from the Hub by stock diffusers; raise `UserError` unless it is `pipeline`, weights and pictures."""
    import numpy as np
    from diffusers import DiffusionPipeline

    from t2i import models
    from t2i.pictures import sampling

    try:
        loaded = DiffusionPipeline.from_pretrained(repo_id, revision=commit, use_safetensors=True).to(
            sampling.best_device()
        )
    except Exception as error:  # network, access, format: huggingface_hub and diffusers raise a dozen types
        reason = (
            explain_loading(error, repo_id, commit)
            or " ".join(redact(str(error) or type(error).__name__).split())[:300]
        )
        raise UserError(
            f"the model is on the Hub (commit {commit[:7]}), but cannot be loaded back: {reason}; then the same command tries "
            "it again"
        ) from None
    loaded.set_progress_bar_config(disable=True)
    here, there = models.hash_model(pipeline.unet), models.hash_model(loaded.unet)
    ours, theirs = (
        sampling.generate(
            drawer, [prompt], [0], guidance_scale=scale, num_inference_steps=CHECK_STEPS, progress=False
        ).astype(int)
        for drawer in (pipeline, loaded)
    )
    difference = np.abs(ours - theirs).mean()
    if here != there or difference > 1:
        raise UserError(
            f"what {repo_id} gives back (commit {commit[:7]}) is not what was published: its UNet is {there}, here {here}, "
            f"and a picture differs by {difference:.1f} of 255; take it out of the local cache of the Hub and try again"
        )
    print(
        f"loaded back from the Hub by stock diffusers: the UNet is the same ({here}), and a picture of {CHECK_STEPS} steps "
        f"differs by {difference:.2f} of 255"
    )
