"""Load and run image-to-text models that caption photos: Florence-2 by its own classes, others by transformers' Auto classes.

Code that comes with a model is never run, and nothing is unpickled. A model that needs either is refused with a sentence.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Florence2ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from t2i.config import CaptionConfig
from t2i.errors import UserError
from t2i.files import sha256_file
from t2i.loading import explain_loading

FLORENCE = "florence-community/Florence-2-large"
FLORENCE_REVISION = "4271c66b88cdbc05735372ec13b2360108de5317"
LEGACY = re.compile(r"microsoft/(Florence-2-(?:base|large)(?:-ft)?)", re.IGNORECASE)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class ModelName:
    """The model that makes the captions, whose name and revision are part of each caption's key."""

    model: str  # Name of the model: its Hub id, or the last part of its folder.
    revision: str  # Revision of the model: its commit on the Hub, or the hash of the weights in its folder.
    path: str  # Hub id or folder from which the model is loaded.


@dataclass
class Captioner:
    """A loaded model in three steps. A thread can run `prepare` for the next batch during `generate`."""

    prepare: Callable[[list[Image.Image]], Any]  # Converts upright RGB images to the model's inputs, on the CPU.
    generate: Callable[[Any], torch.Tensor]  # Converts the model's inputs to token ids.
    read: Callable[[torch.Tensor, list[Image.Image]], list[str]]  # Converts token ids and images to captions.


def resolve(config: CaptionConfig) -> ModelName:
    """Return the captioner's model and its exact revision.

    Raises:
        UserError: The model does not exist, or it needs its own code or pickled weights.
    """
    source = FLORENCE if config.captioner == "florence2" else config.captioner
    if legacy := LEGACY.fullmatch(source):
        raise UserError(
            f"{source} needs code of its own, which is never run here; for its weights in transformers' native classes, give "
            f"--captioner florence-community/{legacy[1]}"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        _refuse_own_code(source, folder)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise UserError(f"--captioner {source} holds no *.safetensors; give a folder with safetensors weights")
        revision = "-".join(sha256_file(file)[:16] for file in weights[:1]) + ("+" if weights[1:] else "")
        return ModelName(folder.resolve().name, revision, str(folder))
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"--captioner {source} is neither florence2, label, existing, a folder here nor a Hub id ORG/NAME; correct it"
        )
    wanted = config.captioner_revision or (FLORENCE_REVISION if source == FLORENCE else None)
    if wanted and COMMIT.fullmatch(wanted):
        return ModelName(source, wanted, source)
    try:  # the commit of a branch or tag, from the cache if there is no network
        local = snapshot_download(source, revision=wanted, allow_patterns=["config.json"])
    except Exception as error:  # network, spelling, access: huggingface_hub raises a dozen types
        raise UserError(_cannot_load(source, error, wanted)) from None
    _refuse_own_code(source, Path(local))
    return ModelName(source, Path(local).name, source)


def load(name: ModelName, config: CaptionConfig, device: torch.device, dtype: torch.dtype) -> Captioner:
    """Load a captioning model to `device` in `dtype`.

    Raises:
        UserError: The model cannot be loaded, or it cannot write captions.
    """
    remote = {} if Path(name.path).is_dir() else {"revision": name.revision}
    try:
        kind = AutoConfig.from_pretrained(name.path, trust_remote_code=False, **remote).model_type
        processor = AutoProcessor.from_pretrained(name.path, trust_remote_code=False, **remote)
        cls = Florence2ForConditionalGeneration if kind == "florence2" else _auto_class(kind)
        model = cls.from_pretrained(name.path, dtype=dtype, use_safetensors=True, **remote)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, ImportError: each model and file has its own
        raise UserError(_cannot_load(name.path, error, name.revision if remote else None)) from None
    model = model.to(device).eval()
    if kind == "florence2":
        return _florence(model, processor, config)
    return _other(model, processor, name, config)


def _florence(model: Any, processor: Any, config: CaptionConfig) -> Captioner:
    task, answers_by_task = config.task, processor.tasks_answer_post_processing_type
    if task not in answers_by_task:
        raise UserError(f"--task {task} is not a task of Florence-2; choose one of {' '.join(answers_by_task)}")
    if config.prompt and task in processor.task_prompts_without_inputs:
        tasks = " ".join(processor.task_prompts_with_input)
        raise UserError(f"--task {task} takes no prompt; leave out --prompt, or choose one of {tasks}")
    if not config.prompt and task in processor.task_prompts_with_input:
        raise UserError(f"--task {task} needs --prompt, the text that it works on")
    plain = answers_by_task[task] == "pure_text"

    def read(ids: torch.Tensor, images: list[Image.Image]) -> list[str]:
        if plain:
            return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        texts = [text.replace("<pad>", "") for text in processor.batch_decode(ids, skip_special_tokens=False)]
        answers = (
            processor.post_process_generation(text, task=task, image_size=image.size)[task]
            for text, image in zip(texts, images, strict=True)
        )
        return [_labels(answer) for answer in answers]

    def prepare(images: list[Image.Image]) -> Any:
        return processor(text=[task + config.prompt] * len(images), images=images, return_tensors="pt")

    return Captioner(prepare, _generate(model, config), read)


def _other(model: Any, processor: Any, name: ModelName, config: CaptionConfig) -> Captioner:
    """Wrap a model of `AutoModelForImageTextToText`. Chat models get their template, others the prompt if there is one."""
    if not hasattr(processor, "tokenizer"):
        raise UserError(
            f"--captioner {name.path} has no tokenizer beside its image processor; it cannot write captions"
        )
    chat = bool(getattr(processor, "chat_template", None))
    prompt = config.prompt or ("Describe the image in one detailed sentence." if chat else "")

    def prepare(images: list[Image.Image]) -> Any:
        if chat:
            turn = [{"type": "image"}, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
            nested = [[image] for image in images]
            return processor(text=[text] * len(images), images=nested, return_tensors="pt", padding=True)
        if prompt:
            return processor(text=[prompt] * len(images), images=images, return_tensors="pt")
        return processor(images=images, return_tensors="pt")

    if chat:
        processor.tokenizer.padding_side = "left"
    generate_ids = _generate(model, config)

    def generate(inputs: Any) -> torch.Tensor:
        ids = generate_ids(inputs)
        start = inputs["input_ids"].shape[1] if chat else 0  # a chat model repeats its input
        return ids[:, start:]

    def read(ids: torch.Tensor, images: list[Image.Image]) -> list[str]:
        texts = (text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True))
        return [without_prompt(text, prompt) for text in texts]

    return Captioner(prepare, generate, read)


def without_prompt(text: str, prompt: str) -> str:
    """Return what a model wrote after its prompt. Capitals and blanks of the repeated prompt may differ."""
    letters = prompt.replace(" ", "")
    if not letters:
        return text
    word_end = r"(?!\w)" if letters[-1].isalnum() else ""  # the prompt "a" must not match "an apple"
    match = re.match(r"\s*".join(map(re.escape, letters)) + word_end, text, re.IGNORECASE)
    return text[match.end() :].strip() if match else text


def _generate(model: Any, config: CaptionConfig) -> Callable[[Any], torch.Tensor]:
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "do_sample": False,
    }
    chosen = {"no_repeat_ngram_size": config.no_repeat_ngram_size, "repetition_penalty": config.repetition_penalty}
    options |= {key: value for key, value in chosen.items() if value is not None}  # otherwise the model's own apply

    @torch.inference_mode()
    def generate(inputs: Any) -> torch.Tensor:
        placed = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        return model.generate(**placed, **options)

    return generate


def _auto_class(kind: str) -> Any:
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(f"a {kind} model writes no text about images; choose an image-to-text model, or florence2")
    return AutoModelForImageTextToText


def _labels(answer: Any) -> str:
    """Return the words of a structured answer (boxes, regions, read text), each once, in order."""
    words = answer.get("labels") or answer.get("bboxes_labels") or [] if isinstance(answer, dict) else [str(answer)]
    cleaned = (re.sub(r"</?s>", "", str(word)).strip() for word in words)
    return ", ".join(dict.fromkeys(word for word in cleaned if word))


def _refuse_own_code(source: str, folder: Path) -> None:
    """Refuse a model that needs code from its folder (`auto_map`) because transformers has no native class for it."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--captioner {source} holds no readable config.json; give a model's folder or Hub id"
        ) from None
    kind = settings.get("model_type")
    davit = kind == "florence2" and (settings.get("vision_config") or {}).get("model_type") == "davit"
    if davit or ("auto_map" in settings and kind not in CONFIG_MAPPING_NAMES):
        twin = "; Florence-2's native weights are florence-community/Florence-2-large" if kind == "florence2" else ""
        raise UserError(
            f"--captioner {source} needs code of its own, which is never run here; choose a native model{twin}"
        )


def _cannot_load(source: str, error: Exception, revision: str | None) -> str:
    why = None if Path(source).expanduser().is_dir() else explain_loading(error, source, revision)
    if why:
        return f"the captioner cannot be loaded: {why}"
    reason = " ".join(str(error).split())[:200]
    return f"--captioner {source} cannot be loaded ({type(error).__name__}: {reason}); check the name and the network"
