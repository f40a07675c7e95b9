"""Write model cards: fill in datasets_card/model_card.md from the files of a run. This module imports no torch.

A figure that the run did not record reads "not measured". Text from users (names of data sets, columns, prompts, links) is
redacted and escaped, so that no secret leaks and the card does not break.
"""

# Functions import huggingface_hub themselves: no command's --help may wait for it.

import html
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.config import Recipe, load_recipe
from t2i.errors import UserError
from t2i.evaluation.figures import attribute_names, chance_closer, other_prompts, percent
from t2i.evaluation.verdict import TOPICS, verdict_of
from t2i.files import read_object, read_optional, write_text
from t2i.hub.markdown import escape_markdown, one_line
from t2i.pictures.png import guided_steps
from t2i.redaction import redact
from t2i.runs import GUIDE, guide_folder, guide_step, run_title

TEMPLATE = Path(__file__).parents[3] / "datasets_card" / "model_card.md"
NOT_MEASURED = "not measured"
FINE_TUNED = ", fine-tuned from {}"  # of the row Architecture; `base_of` reads it
PROMPT_CHARACTERS = 500  # longest prompt on a card; CLIP reads fewer
# Markers of the generated blocks. dataset_card.merge_cards renews the blocks and keeps everything outside them.
BEGIN = "<!-- t2i:{} begin (generated; edits here are replaced) -->"
END = "<!-- t2i:{} end -->"

# Rows of the reference model's card, each with the words by which a run's row is recognised as the same.
REFERENCE = {
    "Text Encoder": ("CLIP ViT-L/14 (`openai/clip-vit-large-patch14`), frozen", "`openai/clip-vit-large-patch14`"),
    "VAE": ("`stabilityai/sd-vae-ft-mse`, fine-tuned", "`stabilityai/sd-vae-ft-mse`, fine-tuned"),
    "Noise Scheduler": ("DDPM (training) · DDIM (inference)", "DDIM"),
    "Image Resolution": ("128 × 128 px", "128 × 128 px"),
    "Latent Space": ("16 × 16 × 4", "16 × 16 × 4"),
    "Dataset": ("Oxford 102 Flowers, about 8 K images", "oxford-flowers"),
    "Captions": ("generated with Florence-2-large", "Florence-2"),
    "Training Platform": ("AWS SageMaker, 2 × `ml.g4dn.xlarge` (NVIDIA T4 16 GB each)", "T4"),
    "Distribution": ("DeepSpeed ZeRO Stage 2", "DeepSpeed ZeRO Stage 2"),
    "Precision": ("FP16 mixed precision", "FP16"),
    "Optimizer": ("AdamW with DeepSpeed's WarmupLR, which warms up and then stays constant", "WarmupLR"),
    "Gradient Clipping": ("0.5", "0.5"),
    "CFG Training": ("10% unconditional dropout", "10% unconditional dropout"),
    "Scheduler": ("DDIM, 30 steps", "DDIM, 30 steps"),
    "CFG Scale": ("7.5", "7.5"),
}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for matrices, AdamW for other weights"}
PRECISIONS = {
    "no": "FP32",
    "fp16": "FP16 mixed precision",
    "bf16": "BF16 mixed precision",
    "fp8": "FP8 mixed precision",
}


@dataclass
class Publication:
    """Facts on a published model that its run does not have."""

    repo_id: str
    license: str  # The Hub's identifier of the licence; "unknown" if none was chosen.
    gallery: list[tuple[str, str]]  # Prompts of the card's pictures, and the paths of these pictures in the repository.


def write_model_card(run: Path, evaluation: dict[str, Any] | None, publication: Publication | None = None) -> str:
    """Write the model card of a training run to `run/pipeline/README.md` atomically, and return its text.

    Args:
        run: Run folder of train_unet.py, which must hold `config.yaml` and `run.json`. Other files of the run may be
            missing.
        evaluation: Result of evaluate_checkpoints.py, `{"report": {...}, "cells": [...]}`. The argument is None if the
            run was not evaluated.
        publication: Facts for the card on the Hub. With None, write the card of a local folder.

    Raises:
        UserError: A required file of the run is missing or damaged.
    """
    from huggingface_hub import ModelCard, ModelCardData

    recipe, result = load_recipe(str(run / "config.yaml")), read_object(run / "run.json")
    provenance = read_optional(run / "provenance.json")
    report = (evaluation or {}).get("report") or {}
    vae_run = provenance.get("vae_run", find_vae_run(recipe, provenance))
    details = _details(run / "pipeline", recipe, vae_run, report)
    training = _training(recipe, result, provenance)
    inference = _inference(recipe, report, guide_folder(run / "pipeline"))
    rows = {**details, **training, **inference}
    name = one_line(recipe.train_unet.run_name or run_title(run)) or "text-to-image"
    dataset = one_line(provenance.get("dataset") or _last_part(recipe.data.dataset))
    hub = dataset_id(recipe, provenance)
    gallery = publication.gallery if publication else []
    results = _eval_results(hub or dataset or "unknown", dataset or "unknown", result, report)
    data = ModelCardData(
        language="en",
        license=one_line(publication.license) if publication else "unknown",  # only the user can choose one
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "stable-diffusion"],
        datasets=[hub] if hub else None,
        base_model=hub_id(recipe.unet.pretrained_model_name_or_path),
        model_name=name if results else None,
        eval_results=results or None,
        widget=[{"text": prompt, "output": {"url": path}} for prompt, path in gallery] if publication else None,
    )
    if not TEMPLATE.is_file():
        raise UserError(
            f"{TEMPLATE.name} is missing; restore {TEMPLATE.parent.name}/{TEMPLATE.name} from the repository"
        )
    drawn = "petal_color" in (report.get("prompt_following") or {})
    domain = f"drawn flowers (data set {_text(dataset)})" if drawn else f"the images of {_text(dataset)}"
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        begin=BEGIN.format,
        end=END.format,
        repo_id=publication.repo_id if publication else None,
        gallery=gallery,
        finished=result.get("status") == "finished",
        resolution=recipe.data.resolution,
        domain=domain,
        details=details,
        training=training,
        inference=inference,
        prompt=_prompt(gallery[0][0] if gallery else _example(recipe)),
        scheduler=scheduler_of(report),
        guidance_end=end if (end := _number(report.get("guidance_end"))) is not None and end < 1 else None,
        guide=guide_folder(run / "pipeline") is not None,
        guidance_rescale=_number(report.get("guidance_rescale", recipe.train_unet.guidance_rescale)) or None,
        num_inference_steps=report.get("num_inference_steps") or recipe.train_unet.num_inference_steps,
        guidance_scale=f"{_number(report.get('guidance_scale')) or recipe.train_unet.guidance_scale:g}",
        verdict=_verdict(evaluation),
        figures=_figures(result, report, vae_run),
        protocol=_protocol(recipe, result, evaluation or {}),
        following=_following(report),
        judge=_text(_last_part((report.get("judge") or {}).get("network"))),
        judged=_judge_rows(report),
        chance=f"{chance_closer(int(unseen)):.1%}" if (unseen := _number(report.get("unseen_images"))) else None,
        loss=_loss(result),
        sweep=[_sweep_row(cell) for cell in (evaluation or {}).get("cells") or []],
        tracking=_tracking(result.get("tracking")),
        limitations=_limitations(recipe, result, domain, drawn),
        deepspeed=result.get("distribution") == "DEEPSPEED",
        ethics=_ethics(drawn),
        narrow="only flowers" if drawn else "only one narrow domain",
        provenance=_provenance(provenance, vae_run),
        differences={
            label: text
            for label, (text, mark) in REFERENCE.items()
            if not re.search(rf"(?<![\w.-]){re.escape(mark)}(?![\w.-])", rows[label])
        },
    )
    text = str(card).rstrip("\n") + "\n"
    write_text(run / "pipeline" / "README.md", text)
    return text


def hub_id(name: str | None) -> str | None:
    """Return `name` if it is a Hub id `owner/name`, otherwise None.

    A `name` whose part before / is a local path is no Hub id.
    """
    if not name or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        return None
    return None if Path(name.split("/")[0]).exists() or redact(name) != name else name


def base_of(card: str) -> str | None:
    """Return the Hub id of the model from which a card's model was fine-tuned, or None if the card names none."""
    found = re.search(rf"^\| \*\*Architecture\*\* \|.*{FINE_TUNED.format('`(.+)`')} \|$", card, re.MULTILINE)
    return found[1] if found else None


def dataset_id(recipe: Recipe, provenance: dict[str, Any]) -> str | None:
    """Return the Hub id of a run's training data set, or None if the data set was a folder."""
    # Only the training could check whether a folder of that name existed.
    return provenance.get("dataset_id", hub_id(recipe.data.dataset))


def find_vae_run(recipe: Recipe, hashes: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the VAE's training. The key "from" holds the VAE from which that training started.

    The figures are {} if the run folder of the recipe's VAE holds another VAE than the one whose hash is in `hashes`.
    """
    folder = Path(recipe.vae.vae) if recipe.vae.vae else None
    if folder is None or not (folder / "config.yaml").is_file():
        return {}
    result = read_optional(folder / "run.json")
    if not result.get("output_vae_hash") or result["output_vae_hash"] != hashes.get("vae_hash"):
        return {}
    figures = {key: result.get(key) for key in ("psnr_db", "ssim", "scaling_factor")}
    return {**figures, "from": load_recipe(str(folder / "config.yaml")).vae.vae}


def measured(result: dict[str, Any], report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Return the measured figures by kind and name, from the results of a run and the report of its evaluation."""
    figures: dict[tuple[str, str], Any] = {("loss", f"Validation {_loss(result)}"): result.get("val_loss")}
    following = report.get("prompt_following") or {}
    for head, name in attribute_names(following).items():
        figures["prompt_following", f"Prompt following: {one_line(name)}"] = following[head]
    for key, label in {
        "memorisation": "share_closer",
        "diversity": "ratio",
        "judge": "kernel_distance",
        "clip_score": "mean",
    }.items():
        name = label if key == "judge" else key
        figures[name, name.replace("_", " ")] = (report.get(key) or {}).get(label)
    return {names: round(number, 5) for names, value in figures.items() if (number := _number(value)) is not None}


# --- Sections --------------------------------------------------------------------------------------------------------


def _details(pipeline: Path, recipe: Recipe, vae_run: dict[str, Any], report: dict[str, Any]) -> dict[str, str]:
    unet = read_optional(pipeline / "unet/config.json")
    vae = read_optional(pipeline / "vae/config.json")
    text = read_optional(pipeline / "text_encoder/config.json")
    scheduler = read_optional(pipeline / "scheduler/scheduler_config.json")
    base = recipe.unet.pretrained_model_name_or_path
    channels = "/".join(str(width) for width in unet.get("block_out_channels") or [])
    origin = FINE_TUNED.format(_source(base)) if base else ", trained from scratch"
    architecture = "Cross-Attentional UNet2DConditionModel (Hugging Face Diffusers)"
    if channels:
        architecture += f", channels {channels}, layers per level: {_text(unet.get('layers_per_block'))}"
    source = recipe.unet.text_encoder or base
    encoder = _source(source) if source else "small CLIP text encoder with random weights, made for this run"
    if text:
        encoder += f", {_text(text.get('num_hidden_layers'))} layers, "
        encoder += f"{_text(text.get('max_position_embeddings'))} × {_text(text.get('hidden_size'))}"
    side = recipe.data.resolution
    factor = 2 ** (len(vae.get("block_out_channels") or []) - 1) if vae.get("block_out_channels") else None
    is_tiny = vae.get("_class_name") == "AutoencoderTiny"
    latents = f"{side // factor} × {side // factor} × {_text(vae.get('latent_channels'))}" if factor else NOT_MEASURED
    noise = f"{recipe.unet.beta_schedule}, {recipe.unet.prediction_type}"
    noise += ", zero-terminal SNR" if recipe.unet.rescale_betas_zero_snr else ""
    sampler = scheduler_of({"scheduler": scheduler.get("_class_name")} | report).removesuffix("Scheduler")
    return {
        "Architecture": architecture + origin,
        "Text Encoder": f"{encoder} — frozen",
        "VAE": _vae_origin(recipe, vae_run)
        + ("; this pipeline holds a tiny one, distilled from it" if is_tiny else ""),
        "Noise Scheduler": f"DDPM (training) · {_text(sampler)} (inference); {_text(noise)}",
        "Image Resolution": f"{side} × {side} px",
        "Latent Space": latents,
    }


def _training(recipe: Recipe, result: dict[str, Any], provenance: dict[str, Any]) -> dict[str, str]:
    student, data = result.get("student"), recipe.data
    config = recipe.distill if student else recipe.train_unet
    steps, images = _number(result.get("steps")), _number(result.get("train_images"))
    processes = _number(result.get("processes"))
    batch = config.train_batch_size * config.gradient_accumulation_steps * int(processes or 1)
    length = NOT_MEASURED
    if steps and images:
        length = f"{steps:,.0f} weight updates of {batch} samples"
        length += "" if student else f", {steps * batch / images:.1f} epochs"
        length += _extensions(result, steps)
    dataset = provenance.get("dataset") or _last_part(data.dataset)
    revision = f", revision {_text(data.dataset_revision)}" if data.dataset_revision else ""
    warmup = f"with {config.lr_warmup_steps} updates of linear warm-up"
    return {
        "Dataset": f"{_text(dataset)}{revision}",
        "Images": f"{images:,.0f} in the training split" if images else NOT_MEASURED,
        "Unreadable images left out": _text(result.get("quarantined")),
        "Captions": _captions(recipe),
        "Training Platform": _text(result.get("machine")),
        "Distribution": _distribution(result),
        "Precision": _precision(result),
        "Length": length,
        "Optimizer": f"{OPTIMIZERS[config.optimizer]}, learning rate {config.learning_rate:g}, {config.lr_scheduler} schedule {warmup}",
        "Gradient Clipping": f"{config.max_grad_norm:g}",
        **(_distillation(recipe, result, provenance) if student else _guidance(recipe)),
        "Weights": _weights(recipe, result),
        "Training time": _minutes(result),
        "Peak memory": f"{result['peak_rss_bytes'] / 1e9:.2f} GB"
        if _number(result.get("peak_rss_bytes"))
        else NOT_MEASURED,
    }


def _guidance(recipe: Recipe) -> dict[str, str]:
    config = recipe.train_unet
    dropped = 100 * config.proportion_empty_prompts
    return {
        "Alignment": f"with {_text(config.alignment_network)}, weight {config.alignment_weight:g}"
        if config.alignment_weight
        else "none",
        "CFG Training": f"{dropped:g}% unconditional dropout for classifier-free guidance",
    }


def _distillation(recipe: Recipe, result: dict[str, Any], provenance: dict[str, Any]) -> dict[str, str]:
    """Return the rows of a student: its teacher, and what it learnt from it."""
    config = recipe.distill
    steps = f"{config.num_inference_steps} step{'s' if config.num_inference_steps > 1 else ''}"
    rescaled = f", rescaled by {config.guidance_rescale:g}" if config.guidance_rescale else ""
    decibels = _number(result.get("decoder_psnr_db"))
    return {
        "Teacher": f"UNet `{one_line(provenance.get('teacher_hash'))}`, of which this model is a student",
        "CFG Training": f"guidance at scale {config.guidance_scale or 0:g}{rescaled}, distilled from {config.trajectories:,} pictures "
        f"of the teacher; the student draws in {steps}, without guidance",
        "Decoder": f"tiny, distilled from the autoencoder's: {decibels:.1f} dB PSNR to its pictures"
        if decibels
        else "the autoencoder's",
    }


def _extensions(result: dict[str, Any], steps: float) -> str:
    """Return the lengths from which a run of `steps` updates was extended, or an empty text."""
    known = result.get("extensions")
    entries = [entry for entry in known if isinstance(entry, dict)] if isinstance(known, list) else []
    lengths = [
        f"{before:,.0f} (learning rate: {_text(entry.get('lr_on_extend'))})"
        for entry in entries
        if (before := _number(entry.get("from_steps"))) and before < steps
    ]
    return f", extended from {' and '.join(lengths)}" if lengths else ""


def scheduler_of(report: dict[str, Any]) -> str:
    """Return the class name in diffusers of the evaluation's scheduler, which the example on the card uses too."""
    name = str(report.get("scheduler") or "DDIMScheduler")
    return name if re.fullmatch(r"\w+Scheduler", name, re.ASCII) else "DDIMScheduler"


def _inference(recipe: Recipe, report: dict[str, Any], guide: Path | None) -> dict[str, str]:
    steps, sampler = report.get("num_inference_steps"), scheduler_of(report).removesuffix("Scheduler")
    scale, end = _number(report.get("guidance_scale")), _number(report.get("guidance_end"))
    guided = f", the first {guided_steps(int(steps or 1), end)} of them guided" if end is not None and end < 1 else ""
    settings = recipe.train_unet
    cpu, gpu = (_number(report.get(f"seconds_per_picture_{device}")) for device in ("cpu", "gpu"))
    times = [f"{seconds:.2f} s" if seconds else NOT_MEASURED for seconds in (cpu, gpu)]
    weak = guide_step(guide) if guide else None
    update = f" of update {weak:,.0f}" if weak else ""
    by_guide = {
        "Guidance": f"by the model's weights{update} in `{GUIDE}/`, which get half of the prompt (arXiv:2406.02507)"
    }
    return {
        "Scheduler": f"{sampler}, {steps or settings.num_inference_steps} steps{guided}"
        + ("" if steps else " (not evaluated)"),
        "CFG Scale": f"{settings.guidance_scale:g} (not evaluated)"
        if scale is None
        else f"{scale:g} (chosen by the evaluation)",
        "Inference time": f"{times[0]} per picture on CPU, {times[1]} on GPU",
        **(by_guide if guide else {}),
    }


def _figures(result: dict[str, Any], report: dict[str, Any], vae_run: dict[str, Any]) -> dict[str, str]:
    """Return the model card's table of metrics: losses from the end of training, other figures from the evaluated
    checkpoint.
    """
    bands = {key: value for key, value in result.items() if re.fullmatch(r"val_loss_\d+_\d+", key)}
    copies, clip = (report.get(name) or {} for name in ("memorisation", "clip_score"))
    loss = _loss(result)
    rows = {f"Train {loss}": _figure(result.get("train_loss")), f"Val {loss}": _figure(result.get("val_loss"))}
    for key, value in bands.items():
        low, high = key.removeprefix("val_loss_").split("_")
        rows[f"Val {loss}, timesteps {low} to {high}"] = _figure(value)
    # The PSNR of a tiny decoder stands in the row Decoder. It is not that of the teacher's autoencoder.
    if not _has_tiny_decoder(result):
        rows["VAE reconstruction of validation images"] = (
            f"{_figure(vae_run.get('psnr_db'), 2)} dB PSNR, {_figure(vae_run.get('ssim'), 3)} SSIM"
            if vae_run
            else NOT_MEASURED
        )
    following, count = report.get("prompt_following") or {}, report.get("prompts")
    overall = "label" if "label" in following else "combined attributes"
    rows[f"Prompt following, {overall}"] = _percent(following.get("all"), count)
    rows["Memorisation: closer to a training image than 99% of unseen images"] = _percent(
        copies.get("share_closer"), count
    )
    rows["Memorisation: distance relative to that of unseen images (1 = equal)"] = _figure(
        copies.get("median_ratio"), 3
    )
    rows["Memorisation: near copies"] = _percent(copies.get("near_copies"), count)
    rows["Memorisation: copies of a training image"] = _percent(copies.get("copies"), count)
    rows["Diversity relative to real images"] = _figure((report.get("diversity") or {}).get("ratio"), 3)
    rows["CLIP score"] = _figure(clip.get("mean"), 2) + (f", {_text(_last_part(clip.get('model')))}" if clip else "")
    return rows


def _loss(result: dict[str, Any]) -> str:
    """Return the name of a run's loss. That of a student is measured on its teacher's pictures."""
    return "distillation loss" if result.get("student") else "diffuser loss"


def _has_tiny_decoder(result: dict[str, Any]) -> bool:
    return _number(result.get("decoder_psnr_db")) is not None


def _verdict(evaluation: dict[str, Any] | None) -> dict[str, str]:
    """Return the sentences of the evaluation's verdict by their titles, or {} without a verdict."""
    verdict = verdict_of(evaluation)
    sentences = verdict["sentences"] if verdict else {}
    return {
        TOPICS[topic]: " ".join(map(escape_markdown, texts)) for topic, texts in sentences.items() if topic in TOPICS
    }


def _protocol(recipe: Recipe, result: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """Return sentences on how the figures on the card were measured."""
    report = evaluation.get("report") or {}
    if not report:
        return "The pictures have not been evaluated."
    checkpoint, scale = report.get("checkpoint"), _figure(report.get("guidance_scale"), 2)
    sentences = [
        f"The losses{'' if _has_tiny_decoder(result) else ' and the reconstruction'} were measured at the end of training.",
        f"All other figures were measured on {_text(report.get('prompts'))} pictures, one per prompt.",
    ]
    if report.get("prompt_following_held_out"):
        sentences.append("Half of the prompts name attribute combinations that never occur in training.")
    sentences += [
        f"The pictures were drawn with {_text(checkpoint)} at guidance scale {scale}.",
        f"Both were chosen on {other_prompts(evaluation)}.",
    ]
    if recipe.train_unet.save_raw_weights and not result.get("student"):
        sentences.append("The evaluation draws with the averaged weights, and this folder holds the raw ones.")
    if re.findall(r"\d+$", str(checkpoint)) != [f"{result.get('steps'):06d}" if _number(result.get("steps")) else ""]:
        sentences.append("The weights in this folder come from the end of training.")
    sentences.append("Parentheses hold the 95% interval of a share (Wilson).")
    return " ".join(sentences)


def _following(report: dict[str, Any]) -> list[list[str]]:
    """Return a table row per attribute: its name, shares of pictures that follow all and held-out prompts, and the
    classifier's accuracy.
    """
    following, held_out, probe = (
        report.get(name) or {} for name in ("prompt_following", "prompt_following_held_out", "probe_accuracy")
    )
    return [
        [
            _text(name),
            _percent(following[head], report.get("prompts")),
            _percent(held_out.get(head)),
            _percent(probe.get(head)),
        ]
        for head, name in attribute_names(following).items()
    ]


def _judge_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the judge's table, with one row each for real images, reconstructions and the model's pictures."""
    judged = report.get("judge") or {}
    titles = {"real": "Unseen real images", "reconstructions": "Their reconstructions", "pictures": "Pictures"}
    return [
        [
            title,
            _percent(row.get("named")),
            f"{_figure(row.get('kernel_distance'), 1)} ± {_figure(row.get('standard_error'), 1)}",
            _figure(row.get("frechet_distance"), 1),
            _percent(row.get("precision")),
            _percent(row.get("recall")),
            _percent(row.get("copies")),
        ]
        for name, title in titles.items()
        if (row := judged.get(name))
    ]


def _sweep_row(result: dict[str, Any]) -> list[str]:
    shares = [share for head, share in (result.get("prompt_following") or {}).items() if head != "all"]
    return [
        _text(result.get("checkpoint")),
        _figure(result.get("guidance_scale"), 2),
        _figure(result.get("val_loss")),
        _percent(sum(shares) / len(shares)) if shares else NOT_MEASURED,
        _percent((result.get("memorisation") or {}).get("copies")),
        _figure((result.get("judge") or {}).get("kernel_distance"), 1),
    ]


def _limitations(recipe: Recipe, result: dict[str, Any], domain: str, drawn: bool) -> dict[str, str]:
    side, images = recipe.data.resolution, _number(result.get("train_images"))
    count = f"{images:,.0f} images" if images else f"number of images {NOT_MEASURED}"
    rows = {
        "Domain-specific": f"The model was trained only on {domain}. Prompts outside this domain give poor results.",
        "Low resolution": f"{side} × {side} px. Not suitable for high-fidelity generation.",
        "Limited dataset": f"{count}. Generation quality improves with more data.",
    }
    if drawn:
        rows["Drawings"] = (
            "A program drew the training images; they are not photographs. Their captions follow a few phrasings, "
            "so the model never learned other words."
        )
    if not (recipe.unet.text_encoder or recipe.unet.pretrained_model_name_or_path):
        rows["Words"] = "The text encoder was not pretrained. It tells words apart but does not know their meaning."
    return rows


def _ethics(drawn: bool) -> str:
    if drawn:
        return "It contains only flowers that a program drew, so no photographs and no personal data."
    return "The training images were not checked for personal data. Check them, or what their source says, before use."


def _provenance(provenance: dict[str, Any], vae_run: dict[str, Any]) -> dict[str, str]:
    labels = {
        "dataset_hash": "Data set",
        "vae_hash": "VAE",
        "text_encoder_hash": "Text encoder",
        "tokenizer_hash": "Tokenizer",
        "code": "Code revision",
    }
    rows = {label: _text(provenance.get(key)) for key, label in labels.items()}
    return {**rows, "VAE scaling factor": _figure(vae_run.get("scaling_factor"), 5)} if vae_run else rows


def _eval_results(dataset_type: str, dataset: str, result: dict[str, Any], report: dict[str, Any]) -> list[Any]:
    """Return the measured figures in the form of the card's key `model-index`."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=dataset_type,
            dataset_name=dataset,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for (kind, name), value in measured(result, report).items()
    ]


# --- Single rows -----------------------------------------------------------------------------------------------------


def _vae_origin(recipe: Recipe, vae_run: dict[str, Any]) -> str:
    if vae_run:
        return (
            f"{_source(vae_run['from'])}, fine-tuned"
            if vae_run["from"]
            else "AutoencoderKL, trained from scratch for this run"
        )
    source = recipe.vae.vae or recipe.unet.pretrained_model_name_or_path
    if hub_id(source):
        return f"{_source(source)}, unchanged"
    return f"{_source(source)}; its training is not recorded" if source else NOT_MEASURED


def _captions(recipe: Recipe) -> str:
    begin = f"; each begins with “{_text(recipe.data.caption_prefix)}”" if recipe.data.caption_prefix else ""
    if columns := recipe.data.caption_column:
        return f"column{'s' if len(columns) > 1 else ''} {', '.join(map(_text, columns))} of the data set{begin}"
    several = "s" if len(recipe.data.caption_template) > 1 else ""
    templates = ", ".join(f"“{_text(template)}”" for template in recipe.data.caption_template)
    return f"column caption or text of the data set; if it has only labels, the template{several} {templates}{begin}"


def _distribution(result: dict[str, Any]) -> str:
    kind, processes = result.get("distribution"), _text(result.get("processes"))
    if kind is None:
        return NOT_MEASURED
    if kind == "NO":
        return "none, one process"
    if kind == "DEEPSPEED":
        return f"DeepSpeed ZeRO Stage {_text(result.get('zero_stage'))}, {processes} processes"
    device = {"MULTI_CPU": "CPU processes", "MULTI_GPU": "GPUs"}.get(kind, f"processes ({_text(kind)})")
    return f"data parallel, {processes} {device}"


def _weights(recipe: Recipe, result: dict[str, Any]) -> str:
    config = recipe.distill if result.get("student") else recipe.train_unet
    raw = not config.use_ema or (not result.get("student") and recipe.train_unet.save_raw_weights)
    unet_hash = result.get("output_unet_hash")
    kind = "raw" if raw else f"moving average (EMA {config.ema_decay:g})"
    return f"{kind}, from the end of training" + (f" (UNet `{one_line(unet_hash)}`)" if unet_hash else "")


def _minutes(result: dict[str, Any]) -> str:
    seconds = result.get("seconds") or {}
    phases = {"cache": "caching", "train": "training"}
    times = [
        f"{seconds[key] / 60:.1f} min {word}" for key, word in phases.items() if _number(seconds.get(key)) is not None
    ]
    return ", ".join(times) or NOT_MEASURED


def _tracking(view: Any) -> str:
    """Return a link to an MLflow server, or the file name of a local database without its folders, which are private.

    The address of SageMaker's managed MLflow is private too, because it holds the number of an account.
    """
    shown = one_line(view)
    if not shown:
        return "none"
    if "aws sagemaker create-presigned-mlflow-" in shown:  # of `Tracker.view`
        return "SageMaker's managed MLflow"
    if re.fullmatch(r"https?://[^\s<>()\[\]|`\\\"]+", shown):
        return f"[MLflow]({html.escape(shown)})"
    database = re.search(r"sqlite:///(\S+)", shown)
    if database:
        return f"local MLflow database {_text(_last_part(database[1]))}"
    return _text(shown)


def _example(recipe: Recipe) -> str:
    prompts = recipe.train_unet.validation_prompts
    words = (recipe.data.caption_prefix, recipe.data.caption_template[0].replace("{label}", "rose"))
    return prompts[0] if prompts else " ".join(filter(None, words))


def _prompt(prompt: str) -> str:
    """Return a prompt as a Python literal for a code block.

    The returned literal cannot contain a marker of the card.
    """
    return json.dumps(one_line(prompt, PROMPT_CHARACTERS), ensure_ascii=False).replace("<!--", "\\u003c!--")


def _source(name: str | None) -> str:
    """Return a Hub id as code, or the last part of a path. The folders above the last part of a path are private."""
    hub = hub_id(name)
    return f"`{hub}`" if hub else _text(_last_part(name))


def _last_part(path: Any) -> str | None:
    return None if path is None else str(path).rstrip("/").split("/")[-1]


def _precision(result: dict[str, Any]) -> str:
    """Return the precision of a training, or its precisions with their first steps if it was resumed in another one."""
    used = result.get("precisions") or [{"from_step": 0, "precision": result.get("precision")}]
    names = [PRECISIONS.get(str(one["precision"]), _text(one["precision"])) for one in used]
    if len(used) == 1:
        return names[0]
    return ", ".join(f"{name} from step {one['from_step']}" for name, one in zip(names, used, strict=True))


def _text(value: Any) -> str:
    return escape_markdown(value) or NOT_MEASURED


def _number(value: Any) -> float | None:
    """Return `value` as a float if it is a finite number, else None."""
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def _figure(value: Any, digits: int = 4) -> str:
    number = _number(value)
    return NOT_MEASURED if number is None else f"{number:.{digits}f}"


def _percent(share: Any, pictures: Any = None) -> str:
    """Return a share in percent, with its interval if `pictures`, the number that it was measured on, is known."""
    number, count = _number(share), _number(pictures)
    return NOT_MEASURED if number is None else percent(number, int(count) if count else None)
