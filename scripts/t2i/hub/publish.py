"""Publish a finished run on the Hub: draw pictures, write card and evaluation results, push, and load the model back.

The Hub gets the run's `pipeline/`. If a push fails, no file of the run is lost, and the same call repeats the push. A
picture is drawn again only if it would change, and a file is uploaded again only if it has changed.
"""

# Functions import torch and diffusers themselves: `--help` and the checks of a push must not wait for them.

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from t2i.config import ModelHubConfig, Recipe, TrainVaeConfig, load_recipe
from t2i.errors import UserError
from t2i.files import hash_files, hash_json, read_object, read_optional, write_text
from t2i.hub import model_card, upload
from t2i.hub.dataset_card import merge_cards, without_keys
from t2i.hub.markdown import one_line
from t2i.loading import explain_loading
from t2i.redaction import redact
from t2i.run_lock import run_status
from t2i.runs import GUIDE, guide_folder, guide_problem

GALLERY = "images/gallery-{}.png"  # {}: 00, 01, …; other pictures in images/ belong to a person
# Notes of evaluation results, after the name of the figure. By them, results of an earlier push are known.
AT_END = "at the end of training"
OF_PICTURES = "{prompts} pictures by {checkpoint} at guidance scale {guidance_scale:g}, {num_inference_steps} steps"
CHECK_STEPS = 2  # denoising steps of the picture that compares the Hub's model with the folder's


def check_push(config: ModelHubConfig, accelerator: Any) -> None:
    """Raise `UserError` before a training starts if the Hub would refuse its model, or an autoencoder replace a pipeline."""
    if config.push_to_hub:
        repo_id = upload.check_repo_id(config.hub_model_id, "--hub_model_id")
        upload.check_license(config.license or None)
        if accelerator.is_main_process:
            target = upload.Target(config.hub_revision, config.create_pr)
            upload.check_access(repo_id, "model", target=target)
            if isinstance(config, TrainVaeConfig) and upload.holds(repo_id, "model", "model_index.json", target):
                raise UserError(
                    f"--hub_model_id {repo_id} holds a pipeline (model_index.json), and an autoencoder needs a repository of its "
                    f"own; give another one, such as {repo_id}-vae"
                )


def find_run(model: str | None) -> Path:
    """Return the finished run folder that `model` names. Raise `UserError` if `model` is not a finished run folder."""
    if not model:
        raise UserError("no model: give --model with the run folder of train_unet.py")
    run = Path(model).expanduser()
    if not (run / "run.json").is_file():
        raise UserError(
            f"{model} is not a run folder (it has no run.json); give --model the output_dir of train_unet.py"
        )
    status = run_status(run)
    if status != "finished":
        raise UserError(f"the run in {model} is not finished (it is {status}); let train_unet.py resume and finish it")
    if not (run / "pipeline" / "model_index.json").is_file():
        raise UserError(f"{model} holds no pipeline (no pipeline/model_index.json); give a run folder of train_unet.py")
    return run


def choose_license(run: Path, license: str | None) -> str:
    """Return the licence for a run's card: `license`, or if `license` is None or "unknown", the licence in the run's
    settings.

    Raises:
        UserError: The Hub does not accept the licence.
    """
    if license not in (None, "", "unknown"):
        upload.check_license(license)
        return str(license)
    in_settings = load_recipe(str(run / "config.yaml")).train_unet.license or "unknown"
    upload.check_license(in_settings, f"{run / 'config.yaml'}, train_unet, license")
    return in_settings


def publish_run(
    run: Path,
    repo_id: str,
    *,
    license: str | None,
    pictures: int,
    private: bool,
    deadline: float,
    target: upload.Target = upload.MAIN,
) -> None:
    """Publish the pipeline of a finished run as the model `repo_id`.

    After the push, stock diffusers must load the same model from the Hub.

    Args:
        run: Finished run folder, from `find_run`.
        repo_id: `owner/name` on the Hub.
        license: Licence of the model, by the Hub's identifier. With None or "unknown", the licence in the run's
            settings is used. If the licence in the settings is unknown too, the licence on the Hub stays.
        pictures: Maximum number of pictures on the card, one per prompt.
        private: Whether a new repository is private.
        deadline: Seconds during which a failing push is retried.
        target: Branch or pull request that receives the push.

    Raises:
        UserError: The push finally failed, or the Hub returned another model. The files in the run folder stay. Or the run
            was evaluated with another guide.
    """
    from t2i.pictures import sampling

    recipe, result = load_recipe(str(run / "config.yaml")), read_object(run / "run.json")
    evaluation = evaluation_of(run, result["output_unet_hash"])
    report = evaluation.get("report") or {}
    scale = report.get("guidance_scale", recipe.train_unet.guidance_scale)
    steps = report.get("num_inference_steps", recipe.train_unet.num_inference_steps)
    prompts = gallery_prompts(recipe, evaluation.get("prompts") or [], pictures)
    if pictures and not prompts:
        print("the card has no pictures: there are no validation prompts, and the evaluation stored none")
    folder, guide = run / "pipeline", hash_guide(run)
    pipeline = sampling.load_pipeline(folder, device=sampling.best_device())

    settings = {"unet": result["output_unet_hash"], "guidance_scale": scale, "num_inference_steps": steps}
    settings |= {"scheduler": model_card.scheduler_of(report), "guidance_end": report.get("guidance_end", 1.0)}
    rescale = report.get("guidance_rescale", recipe.train_unet.guidance_rescale)
    settings |= {"guidance_rescale": rescale} if rescale else {}
    settings |= {"guide": guide} if guide else {}
    gallery = draw_gallery(pipeline, folder, prompts, settings)
    chosen = choose_license(run, license)
    publication = model_card.Publication(repo_id, chosen, gallery)
    card = model_card.write_model_card(run, evaluation, publication)
    results = write_eval_results(run, recipe, result, report)
    pushed = upload.push_folder(
        folder,
        repo_id,
        "model",
        files=[*pipeline_files(folder), "README.md", GALLERY.format("*"), *results],
        message=f"UNet {result['output_unet_hash']}, {result['steps']:,} updates",
        private=private,
        deadline=deadline,
        merge_card=partial(merge_model_card, card, licensed=chosen != "unknown"),
        outdated=is_from_evaluation,
        target=target,
    )
    print(pushed, flush=True)
    check_loads_back(pipeline, repo_id, pushed.commit, prompts[0] if prompts else "", scale)


VAE_CARD = """---
library_name: diffusers
license: {license}
tags:
- autoencoder
---
# Autoencoder

<!-- Text outside the generated block is yours: publishing again does not change it. -->

{begin}
An image autoencoder for latent diffusion, with {factor} px per latent along each side. Its scaling factor is {scaling_factor:.4f}.

| Validation images | Before training | After training |
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
    """Publish the autoencoder of a finished run as the model `hub_model_id`.

    Call this function again to repeat a failed push.

    Raises:
        UserError: The push finally failed. The files in the run folder stay.
    """
    result, repo_id = read_object(run / "run.json"), str(config.hub_model_id)
    levels = read_object(run / "vae" / "config.json")["block_out_channels"]
    marks = {"begin": model_card.BEGIN.format("vae"), "end": model_card.END.format("vae")}
    card = VAE_CARD.format(**result, **marks, license=config.license, repo_id=repo_id, factor=2 ** (len(levels) - 1))
    pushed = upload.push_folder(
        run / "vae",
        repo_id,
        "model",
        files=["config.json", "diffusion_pytorch_model.safetensors", "README.md"],
        message=f"VAE {result['output_vae_hash']}, {result['steps']:,} updates",
        private=config.hub_private_repo,
        deadline=config.hub_deadline,
        merge_card=partial(merge_model_card, card, licensed=config.license != "unknown"),
        target=upload.Target(config.hub_revision, config.create_pr),
    )
    print(pushed, flush=True)


def evaluation_of(run: Path, unet_hash: str) -> dict[str, Any]:
    """Return the content of a run's evaluation.json, or {} if the run was trained further after its evaluation.

    Args:
        unet_hash: hash of the weights to publish.
    """
    identity = read_optional(run / "evaluation" / "run.json").get("identity") or {}
    if "unet_hash" in identity and identity["unet_hash"] != unet_hash:  # It is None if the training had not finished.
        print(
            f"WARNING: the run was trained further after {run / 'evaluation'} was made, so the card has none of its "
            "figures; run scripts/evaluate_checkpoints.py again, then publish again"
        )
        return {}
    return read_optional(run / "evaluation" / "evaluation.json")


def hash_guide(run: Path) -> str | None:
    """Return a hash of the guide of a run's pipeline, or None without a guide.

    Raises:
        UserError: the run was evaluated with another guide, so the card's figures would be of other pictures.
    """
    if problem := guide_problem(run):
        raise UserError(problem)
    guide = guide_folder(run / "pipeline")
    return hash_json(hash_files(guide)) if guide else None


def gallery_prompts(recipe: Recipe, evaluated: list[str], count: int) -> list[str]:
    """Return at most `count` different prompts: the validation prompts, then prompts spread over the evaluation's
    prompts.
    """
    validation, others = (
        [line for text in texts if (line := one_line(text, model_card.PROMPT_CHARACTERS))]
        for texts in (recipe.train_unet.validation_prompts, evaluated)
    )
    validation = list(dict.fromkeys(validation))[:count]
    others = [text for text in dict.fromkeys(others) if text not in validation]
    lacking = count - len(validation)
    return validation + (others[:: max(1, len(others) // lacking)][:lacking] if lacking else [])


def draw_gallery(pipeline: Any, folder: Path, prompts: list[str], settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Draw a picture per prompt into `folder`/images, with the seeds 0, 1, and so on.

    A picture that exists with the same settings is reused.

    Args:
        pipeline: The pipeline in `folder`.
        folder: Pipeline folder that gets the pictures.
        prompts: Prompts of the pictures.
        settings: Hashes of the UNet and its guide, guidance scale, steps, scheduler and guidance end.

    Returns:
        Prompts of the drawn pictures, and the paths of these pictures relative to `folder`.
    """
    from t2i.pictures import sampling

    wanted = {
        GALLERY.format(f"{seed:02d}"): {"prompt": prompt, "seed": seed, **settings}
        for seed, prompt in enumerate(prompts)
    }
    missing = [path for path, parameters in wanted.items() if sampling.read_parameters(folder / path) != parameters]
    if missing:
        print(
            f"drawing {len(missing)} pictures for the card at guidance scale {settings['guidance_scale']:g}", flush=True
        )
        saved = pipeline.scheduler
        pipeline.scheduler = sampling.make_scheduler(settings["scheduler"], saved.config)
        drawn = sampling.generate(
            pipeline,
            [wanted[path]["prompt"] for path in missing],
            [wanted[path]["seed"] for path in missing],
            guidance_scale=settings["guidance_scale"],
            num_inference_steps=settings["num_inference_steps"],
            guidance_end=settings["guidance_end"],
            guidance_rescale=settings.get("guidance_rescale", 0.0),
        )
        pipeline.scheduler = saved
        (folder / "images").mkdir(exist_ok=True)
        for path, picture in zip(missing, drawn, strict=True):
            sampling.save_picture(folder / path, picture, wanted[path])
    for old in folder.glob(GALLERY.format("*")):
        if old.relative_to(folder).as_posix() not in wanted:
            old.unlink()
    return [(parameters["prompt"], path) for path, parameters in wanted.items()]


def write_eval_results(run: Path, recipe: Recipe, result: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """Write the measured figures as the Hub's evaluation results, `.eval_results/*.yaml` in the pipeline.

    An entry names the Hub's data set on which a figure was measured. Without such a data set, no results are written.

    Returns:
        Paths of the written result files, relative to the pipeline folder.
    """
    dataset = model_card.dataset_id(recipe, read_optional(run / "provenance.json"))
    figures = model_card.measured(result, report)
    if not dataset or not figures:
        return []
    revision = recipe.data.dataset_revision or ""
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=re.sub(r"\W+", "_", name.lower()),
            value=value,
            dataset_revision=revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None,
            notes=f"{name}; {AT_END if kind == 'loss' else OF_PICTURES.format_map(report)}",
        )
        for (kind, name), value in figures.items()
    ]
    path = f"{upload.EVAL_RESULTS}/{dataset.split('/')[-1]}.yaml"
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    write_text(run / "pipeline" / path, text)
    return [path]


def is_from_evaluation(content: bytes) -> bool:
    """Return whether `write_eval_results` wrote a file of evaluation results with this content."""
    try:
        entries = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError):
        return False
    entries = entries if isinstance(entries, list) else []
    notes = [entry.get("notes") if isinstance(entry, dict) else None for entry in entries]
    ours = re.compile(rf"[^;]+; ({AT_END}|\d+ pictures by \S+ at guidance scale \S+, \d+ steps)")
    return bool(notes) and all(ours.fullmatch(str(note)) for note in notes)


def pipeline_files(folder: Path) -> list[str]:
    """Return patterns for the files of a pipeline: model_index.json, the folders that it names, its guide, and compiled models.

    `make export` makes the compiled models.
    """
    index = read_object(folder / "model_index.json")
    compiled = ["openvino/*"] if (folder / "openvino" / "engine.json").is_file() else []
    return [
        "model_index.json",
        *(f"{name}/*" for name, kind in index.items() if isinstance(kind, list) and kind[0]),
        f"{GUIDE}/*",  # also without a guide: an earlier one must not stay on the Hub
        *compiled,
    ]


def merge_model_card(card: str, existing: str | None, *, licensed: bool) -> str:
    """Return the README.md on the Hub, `existing`, with all generated parts renewed from `card`.

    The renewed parts are figures, the gallery's pictures, the blocks between markers, and the licence if `licensed` is
    set. Data set and base model are renewed if they are those of the run that was published before. All other parts of
    `existing` stay, with pictures that a person added to `widget`.
    """
    front, old_front = _front_matter(card), _front_matter(existing or "")
    earlier = {
        "datasets": [_evaluated_dataset(old_front)],
        "base_model": model_card.base_of(existing or ""),
    }
    outdated = [key for key, value in earlier.items() if key in old_front and old_front[key] == value != front.get(key)]
    existing = without_keys(existing, outdated) if existing and outdated else existing
    renewed = ["model-index", *(["license"] if licensed else [])]
    ours, theirs = (one if isinstance(one := part.get("widget"), list) else [] for part in (front, old_front))
    if [entry for entry in theirs if _is_ours(entry)] != ours:
        renewed.append("widget")
        new = ModelCard(card)
        new.data["widget"] = [*ours, *(entry for entry in theirs if not _is_ours(entry))]
        card = str(new)
    return merge_cards(card, existing, renewed)


def _front_matter(card: str) -> dict[str, Any]:
    """Return the front matter of a card. A broken front matter gives {}, and merge_cards reports it as an error."""
    match = REGEX_YAML_BLOCK.search(card)
    try:
        data = yaml.safe_load(match[2]) if match else None
    except (yaml.YAMLError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _evaluated_dataset(front: dict[str, Any]) -> Any:
    """Return the data set that the figures in a card's front matter name, or None without figures."""
    try:
        return front["model-index"][0]["results"][0]["dataset"]["type"]
    except (LookupError, TypeError):
        return None


def _is_ours(entry: Any) -> bool:
    output = entry.get("output") if isinstance(entry, dict) else None
    return isinstance(output, dict) and str(output.get("url")).startswith(GALLERY.partition("{")[0])


def check_loads_back(pipeline: Any, repo_id: str, commit: str, prompt: str, scale: float) -> None:
    """Load the model from the Hub by stock diffusers.

    Raise `UserError` if the loaded weights or pictures differ from `pipeline`.
    """
    from diffusers import DiffusionPipeline

    from t2i import models
    from t2i.pictures import sampling
    from t2i.pictures.guide import attach, download_guide, guide_hash, unguided

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
            f"the model is on the Hub (commit {commit[:7]}), but cannot be loaded back: {reason}; after the fix, run the same "
            "command again"
        ) from None
    loaded.set_progress_bar_config(disable=True)
    loaded = attach(loaded, download_guide(repo_id, commit))
    here, there = ((models.hash_model(unguided(drawer.unet)), guide_hash(drawer.unet)) for drawer in (pipeline, loaded))
    ours, theirs = (
        sampling.generate(
            drawer, [prompt], [0], guidance_scale=scale, num_inference_steps=CHECK_STEPS, progress=False
        ).astype(int)
        for drawer in (pipeline, loaded)
    )
    difference = np.abs(ours - theirs).mean()
    if here != there or difference > 1:
        raise UserError(
            f"the Hub's copy of {repo_id} (commit {commit[:7]}) is not what was published (UNet {there[0]}, here {here[0]}; pictures "
            f"differ by {difference:.1f} of 255); remove that copy from the Hub's local cache and try again"
        )
    print(
        f"loaded back from the Hub by stock diffusers: the UNet is the same ({here[0]}), and a picture of {CHECK_STEPS} steps "
        f"differs by {difference:.2f} of 255"
    )
