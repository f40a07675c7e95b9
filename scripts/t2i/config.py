"""Settings: defaults <- recipe <- command line. Imports neither torch nor diffusers, so that `--help` answers at once.

A recipe is a YAML file with the sections of `Recipe`. The comment behind or above each field is its help text. Names are those
of diffusers' training scripts; where ours differ, theirs are accepted or answered (`from_diffusers`).
"""

import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

import tyro
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from t2i.errors import UserError

MAX_SEED = 2**63 - 1  # of a picture
MAX_GUIDANCE = 1000.0  # a hundred times what pictures need; far beyond it, numbers overflow


def _whole_path(text: str) -> str:
    """The path with `~` expanded: a shell leaves it alone in `--output_dir=~/run`, and a recipe is read by no shell."""
    if not text.strip():
        raise ValueError("it is empty; give a path, or leave the option out")
    whole = os.path.expanduser(text)
    if whole.startswith("~"):
        raise ValueError(f"there is no user {text.split('/')[0][1:]!r} here; write the whole path")
    return whole


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes as 0 or 1
        raise ValueError("give a number")
    return value


_Number = BeforeValidator(_no_flag)
Flag = Annotated[bool, Strict()]  # strict: "yes", 1 and "false" in a recipe are errors, not truths
Count = Annotated[int, _Number, Field(ge=1, lt=2**31)]
Natural = Annotated[int, _Number, Field(ge=0, lt=2**31)]


def _local_path(value: str) -> str:
    """The path, expanded. An address is refused: libraries would take it for a bucket or write into a folder `s3:`."""
    if re.match(r"\w+://", value):
        raise ValueError("it is an address; give a folder on this machine")
    return _whole_path(value)


LocalPath = Annotated[str, AfterValidator(_local_path)]  # a folder to write into
PathText = Annotated[str, AfterValidator(_whole_path)]  # a path, or a Hub id where the option takes one
Positive = Annotated[float, _Number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, _Number, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, _Number, Field(ge=0, lt=1, allow_inf_nan=False)]
Guidance = Annotated[float, _Number, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Seed = Annotated[int, _Number, Field(ge=0, le=MAX_SEED)]

LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

T = TypeVar("T")
RECIPES = Path(__file__).parent.parent / "recipes"


def _alias(*names: str) -> Any:
    return tyro.conf.arg(aliases=[f"--{name}" for name in names])


@dataclass
class HubConfig:
    """Settings of a push to the Hub."""

    push_to_hub: Flag = False  # Upload the result to the Hub. Log in by `hf auth login`, or set HF_TOKEN.
    hub_private_repo: Flag = True  # Make a new repository private. An existing one keeps its visibility.
    hub_deadline: Positive = 900.0  # Seconds during which a failed push is retried.
    hub_revision: str | None = None  # Branch to push to, made from main if it is missing. None: main.
    create_pr: Flag = False  # Open a pull request instead of pushing to main. Each push opens a new one.


@dataclass
class ModelHubConfig(HubConfig):
    """Settings of a push of a model to the Hub."""

    hub_model_id: str | None = None  # Repository of the model on the Hub, as ORG/NAME.
    license: str = "unknown"  # Licence of the model, by the Hub's name for it, e.g. apache-2.0. unknown: not chosen.


@dataclass
class SourceConfig:
    """The images, and their captions or labels."""

    # Data set: a Hub id, a dataset folder or an imagefolder.
    dataset: Annotated[PathText | None, _alias("dataset_name", "train_data_dir")] = None
    dataset_revision: str | None = None  # Branch, tag or commit of a Hub data set.
    dataset_config_name: str | None = None  # Configuration of a data set that has several.
    image_column: str = "image"  # Column that holds the images.
    # Column that holds the captions. None: caption, else text, else a caption made from the label.
    caption_column: str | None = None
    label_names: list[str] = field(default_factory=list)  # Names of numeric labels. The first one names label 1.
    caption_template: str = "a photo of a {label}, a type of flower"  # Caption of an image that has only a label.
    caption_prefix: str = ""  # Words put before every non-empty caption, such as a trigger word: "sks style,".
    max_bad_share: Share = 0.05  # Share of undecodable images above which the run stops.


@dataclass
class DataConfig(SourceConfig):
    """The captioned images."""

    # Side of the images in pixels. The shorter side is resized to it, then the centre is cropped.
    resolution: Annotated[int, _Number, Field(ge=8, le=2048)] = 128
    random_flip: Flag = True  # Train on mirrored images as well. Latents are cached for both.
    # Share of images that become the validation split if the data set has none. A hash of their content chooses them.
    validation_fraction: Annotated[float, _Number, Field(gt=0, lt=0.9, allow_inf_nan=False)] = 0.05
    split_seed: int = 0  # Seed of the validation split. Another seed chooses other images.
    max_train_samples: Count | None = None  # Maximum number of training images. None: all.
    cache_dir: LocalPath = ".cache/t2i"  # Folder for prepared images, latents and text embeddings, named by content.


@dataclass
class CaptionConfig(HubConfig):
    """Captioning."""

    output_dir: LocalPath | None = None  # Dataset folder to write. Its captions.jsonl may be edited by hand.
    dry_run: Flag = False  # End after the table that shows how the input was understood.
    # Source of captions: florence2, label (by caption_template), existing (keep the data set's), or a folder or Hub id.
    captioner: PathText = "florence2"
    captioner_revision: str | None = None  # Branch, tag or commit of a Hub captioner.
    # Task of Florence-2: <CAPTION>, <DETAILED_CAPTION>, <MORE_DETAILED_CAPTION>, <OD>, …
    task: str = "<DETAILED_CAPTION>"
    prompt: str = ""  # Text for the captioner, if its task takes some.
    caption_batch_size: Count = 8  # Images per batch. The batch is halved if memory runs out.
    # Maximum number of tokens per caption. CLIP reads 77 of its own tokens.
    max_new_tokens: Annotated[int, _Number, Field(ge=1, le=4096)] = 128
    num_beams: Count = 3  # Beams of the search (Florence-2's card uses 3). One beam is about twice as fast.
    # Length of token sequences that may not repeat within a caption. None: the model's own setting.
    no_repeat_ngram_size: Count | None = None
    # Penalty on tokens that a caption already has. Above 1 they become less likely. None: the model's own setting.
    repetition_penalty: Positive | None = None
    strip_boilerplate: Flag = True  # Drop openings about the image itself: "The image shows a rose" -> "A rose".
    fail_on: list[str] = field(default_factory=list)  # Limits of the caption audit, e.g. empty=0 over_limit=0.05.
    audit_tokenizer: PathText = "openai/clip-vit-large-patch14"  # CLIP tokenizer (path or Hub id) that counts tokens.
    license: str = "unknown"  # Licence of the data set, by the Hub's name for it, e.g. cc-by-4.0.
    hub_dataset_id: str | None = None  # Repository of the data set on the Hub, as ORG/NAME.


@dataclass
class VaeConfig:
    """The autoencoder."""

    # Autoencoder: a run folder, path or Hub id. None: a new one is built by the options below.
    vae: Annotated[PathText | None, _alias("pretrained_vae_model_name_or_path")] = None
    vae_revision: str | None = None  # Branch, tag or commit of a Hub VAE.
    # Channels per level of a new VAE. Each further level halves the side.
    vae_channels: Annotated[list[Count], Field(min_length=1)] = field(default_factory=lambda: [32, 64, 96])
    vae_layers: Count = 1  # Residual layers per level of a new VAE.
    latent_channels: Count = 4  # Channels of the latents of a new VAE.


@dataclass
class UnetConfig:
    """The denoiser, what it is conditioned on, and the noise."""

    # Pipeline (path or Hub id) whose UNet is trained further. Its VAE and text encoder are used if no others are named.
    pretrained_model_name_or_path: PathText | None = None
    # CLIP text encoder with tokenizer: a run folder, path or Hub id. None: a small frozen one is built.
    text_encoder: PathText | None = None
    text_encoder_revision: str | None = None  # Branch, tag or commit of a Hub text encoder.
    revision: str | None = None  # Branch, tag or commit of the Hub pipeline that is trained further.
    # Variant of the weight files of pretrained_model_name_or_path, e.g. fp16. None: files without a suffix.
    variant: str | None = None
    text_hidden_size: Count = 128  # Width of a new text encoder.
    text_layers: Count = 2  # Layers of a new text encoder.
    # Maximum number of tokens per caption of a new text encoder.
    text_max_length: Annotated[int, _Number, Field(ge=4, le=512)] = 32
    # Channels per level of a new UNet.
    unet_channels: Annotated[list[Count], Field(min_length=1)] = field(default_factory=lambda: [192, 384, 576])
    unet_layers: Count = 2  # Residual and attention layers per level of a new UNet.
    # Block types of a new UNet, one per level on the way down. The way up mirrors them.
    down_block_types: list[Literal["CrossAttnDownBlock2D", "DownBlock2D"]] = field(
        default_factory=lambda: ["CrossAttnDownBlock2D"] * 3
    )
    attention_head_dim: Count = 8  # Number of attention heads per level. The misleading name is diffusers'.
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # Target of the UNet: the noise or the velocity.
    # Schedule of the 1,000 noise levels.
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    # Make the last noise level pure noise (arXiv:2305.08891). This needs v_prediction.
    rescale_betas_zero_snr: Flag = False


@dataclass
class TrainConfig:
    """Settings that both training scripts share."""

    output_dir: LocalPath | None = None  # Run folder to write or resume.
    dry_run: Flag = False  # End after the table that shows how the input was understood.
    seed: Annotated[int, _Number, Field(ge=0, lt=2**32)] = 0  # Seed of weights, order, noise, timesteps and dropout.
    train_batch_size: Count = 16  # Images per process and step.
    gradient_accumulation_steps: Count = 1  # Steps per weight update.
    max_train_steps: Count | None = None  # Number of weight updates. None: num_train_epochs decides.
    num_train_epochs: Positive = 100.0  # Passes over the training images, if max_train_steps is None.
    # Precision of the training, if the launch sets none. A value that differs from the launch's is refused.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    learning_rate: Positive = 1e-4  # Peak learning rate.
    scale_lr: Flag = False  # Multiply learning_rate by the images per update, counted over all processes.
    lr_scheduler: LrScheduler = "cosine"  # Learning rate schedule, by diffusers' names.
    lr_warmup_steps: Natural = 500  # Updates of linear learning rate warm-up.
    adam_beta1: BelowOne = 0.9  # Decay rate of the gradient's moving average in AdamW.
    adam_beta2: BelowOne = 0.999  # Decay rate of the squared gradient's moving average in AdamW.
    adam_weight_decay: NonNegative = 1e-2  # Weight decay of AdamW.
    adam_epsilon: Positive = 1e-8  # Small number added to AdamW's denominator, for numerical stability.
    max_grad_norm: Positive = 0.5  # Norm to which larger gradients are clipped.
    use_ema: Flag = True  # Keep and save an exponential moving average (EMA) of the weights, in fp32.
    ema_decay: Share = 0.9999  # Highest decay of the EMA. At update n it is min(ema_decay, (1 + n) / (10 + n)).
    gradient_checkpointing: Flag = False  # Recompute activations: less memory, about a third more time.
    channels_last: Flag = False  # Use the NHWC memory layout.
    compile: Flag = False  # Compile the trained model by torch.compile.
    cuda_graphs: Flag = True  # On a single GPU, launch a step's kernels as one CUDA graph, which holds their memory.
    allow_tf32: Flag = False  # Allow TF32 matrix products on Ampere GPUs and later.
    validation_steps: Count = 500  # Updates between validations.
    checkpointing_steps: Count = 500  # Updates between checkpoints.
    checkpoints_total_limit: Count | None = None  # Number of newest checkpoints to keep. None: all.
    # latest, or the checkpoint to resume from. None: start anew, which is refused if the run folder holds checkpoints.
    resume_from_checkpoint: str | None = "latest"
    max_nonfinite_steps: Natural = 0  # Updates with a non-finite loss or gradient to skip before the run ends.
    logging_steps: Count = 10  # Updates between logged losses.
    # Tracker of curves and pictures. tensorboard and wandb are used in addition to MLflow.
    report_to: Literal["mlflow", "tensorboard", "wandb", "none"] = "mlflow"
    logging_dir: str = "logs"  # Folder for TensorBoard's files, below output_dir.
    # MLflow experiment, and project of W&B. The default gives way to MLFLOW_EXPERIMENT_NAME.
    experiment: Annotated[str, _alias("tracker_project_name")] = "t2i"
    run_name: str | None = None  # Name of the MLflow run. None: the name of output_dir.


@dataclass
class TrainVaeConfig(ModelHubConfig, TrainConfig):
    """Training of the autoencoder."""

    train_batch_size: Count = 8  # Images per process and step.
    # Number of newest checkpoints to keep. None: all. 1: one, until the run has finished.
    checkpoints_total_limit: Count | None = 1
    # Part to train. With decoder, latents stay as they are, so caches and UNets stay valid.
    vae_train_part: Literal["all", "decoder"] = "all"
    # Side of random training crops in pixels. Validation uses whole images. None: train on whole images.
    crop_size: Count | None = None
    # Weight of KL(posterior || N(0, 1)). It is a mean over pixels, like the reconstruction term.
    kl_weight: Annotated[NonNegative, _alias("kl_scale")] = 1e-6
    l1_weight: NonNegative = 0.0  # Weight of the absolute error.
    mse_weight: NonNegative = 1.0  # Weight of the squared error.
    ssim_weight: NonNegative = 0.1  # Weight of the structural term, 1 - SSIM.


@dataclass
class TrainUnetConfig(ModelHubConfig, TrainConfig):
    """Training of the denoiser."""

    snr_gamma: Positive | None = None  # Gamma of min-SNR loss weights (arXiv:2303.09556), usually 5. None: no weights.
    # Share of samples whose caption is dropped at random, for classifier-free guidance.
    proportion_empty_prompts: Share = 0.1
    noise_offset: NonNegative = 0.0  # Standard deviation of a random shift of each channel's noise, about 0.1. 0: none.
    # Strength of further noise on the UNet's input that its target lacks, about 0.1. 0: none.
    input_perturbation: NonNegative = 0.0
    # Prompts to draw at each validation.
    validation_prompts: Annotated[list[str], _alias("validation_prompt")] = field(default_factory=list)
    validation_epochs: Positive | None = None  # Passes over the images between validations. None: validation_steps.
    validation_images: Count = 256  # Maximum number of validation images that the loss is measured on.
    guidance_scale: Guidance = 7.5  # Guidance scale of the validation pictures.
    num_inference_steps: Count = 30  # Denoising steps of the validation pictures.
    save_raw_weights: Flag = False  # Save the raw weights in the pipeline, instead of their moving average.
    gallery_pictures: Natural = 8  # Pictures on the published card, drawn for the prompts of validation and evaluation.


@dataclass
class EvaluateConfig:
    """Evaluation of checkpoints over guidance scales."""

    model: PathText | None = None  # Run folder of train_unet.py.
    checkpoints: list[str] = field(default_factory=list)  # Names of checkpoint folders to evaluate. No name: all.
    # Guidance scales to choose from.
    guidance_scales: Annotated[list[Guidance], Field(min_length=1)] = field(
        default_factory=lambda: [1.5, 3.0, 5.0, 7.5]
    )
    # Preset of generate_images.py. None: the model's scheduler, num_inference_steps, guidance at every step.
    preset: Literal["exact", "fast", "draft"] | None = None
    num_inference_steps: Count = 30  # Denoising steps, if no preset sets them.
    sweep_prompts: Count = 24  # Prompts per checkpoint and guidance scale. They decide on the best pair.
    report_prompts: Count = 256  # Number of other prompts, on which the best pair is reported.
    eval_batch_size: Count = 32  # Pictures per batch.
    # Engine on a CPU. auto: torch. openvino compiles each checkpoint, which pays off with large UNets.
    engine: Literal["auto", "torch", "openvino"] = "auto"
    eval_seed: Annotated[int, _Number, Field(ge=0, lt=2**32)] = 1000  # Seed of prompts, noise and classifier.
    classifier_steps: Natural = 1200  # Training steps of the classifier that reads the pictures. 0: no classifier.
    classifier_drawings: Count = 5000  # Drawings that the classifier of drawn flowers is trained on.
    kid_network: PathText | None = None  # Vision model (path or Hub id) for KID. None: the classifier's features.
    clip: PathText | None = None  # CLIP model (path or Hub id) for the CLIP score. None: the score is not measured.


@dataclass
class Recipe:
    """All settings of an experiment, one field per section. Every script checks all sections and uses its own."""

    data: DataConfig = field(default_factory=DataConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    train_vae: TrainVaeConfig = field(default_factory=TrainVaeConfig)
    train_unet: TrainUnetConfig = field(default_factory=TrainUnetConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


class _Loader(yaml.SafeLoader):
    """YAML's loader, which refuses a key that stands twice in one mapping, instead of taking its last value."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            line, same = key.start_mark.line + 1, (key.tag, str(key.value))
            if same in lines and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(
                    f"{self.name}, line {line}: key {key.value} stands in line {lines[same]} already; delete one of the two"
                )
            lines[same] = line
        return node


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, None if it is empty.

    Raises `UserError` naming the file if it is not valid YAML in UTF-8, or a key stands twice; `OSError` if it cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # of UTF-16 without its mark, too
        raise UserError(f"{path} is not in UTF-8; save it as UTF-8")
    try:
        loader = _Loader(text)
        loader.name = str(path)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def load_recipe(name: str) -> Recipe:
    """Read a recipe: a YAML file, or the name of one in scripts/recipes.

    Raises `UserError` naming the file and key for a missing file, unknown section or key, or a wrong value.
    """
    path = Path(name).expanduser()
    if not path.suffix and not path.is_file():
        path = RECIPES / f"{name}.yaml"
    try:
        sections = read_yaml(path)
    except OSError:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise UserError(f"recipe {name} cannot be read; give a YAML file, or one of: {known}") from None
    if not isinstance(sections or {}, dict):
        raise UserError(f"{path} must hold sections ({', '.join(_fields(Recipe))}), not a {type(sections).__name__}")
    values = {}
    for section, keys in (sections or {}).items():
        cls = _fields(Recipe).get(known_key(section, _fields(Recipe), f"section in {path}"))
        if not isinstance(keys or {}, dict):
            raise UserError(f"{path}: section {section} must hold keys and values, not {keys!r}")
        for key in keys or {}:
            known_key(key, _fields(cls), f"key in section {section} of {path}")
        values[section] = checked(cls, keys or {}, f"{path}, section {section}")
    return Recipe(**values)


# Options of diffusers' train_text_to_image.py and train_autoencoderkl.py that no script here has -> what to do here.
# True: the result is the same without it, so it is left out with a note. False: it would be another, so it is refused.
# docs/from_diffusers.md is checked against this table.
THEIR_OPTIONS: dict[str, tuple[bool, str]] = {
    "center_crop": (True, "images are always cropped at the centre"),
    "enable_xformers_memory_efficient_attention": (True, "PyTorch's own memory-efficient attention is in use"),
    "dataloader_num_workers": (True, "batches are read from a cache, without workers"),
    "foreach_ema": (True, "the moving average is always updated by foreach kernels"),
    "offload_ema": (True, "the moving average stays on the device; --no_use_ema saves its memory"),
    "set_grads_to_none": (True, "gradients are always set to None"),
    "local_rank": (True, "the launcher says it"),
    "validation_image": (True, "reconstructions of validation images are drawn, into samples/"),
    "image_interpolation_mode lanczos": (True, "images are always resized by Lanczos"),
    "image_interpolation_mode": (False, "images are always resized by Lanczos; leave it out"),
    "hub_token": (False, "a command line is seen by others; log in by `hf auth login`, or set HF_TOKEN"),
    "non_ema_revision": (False, "give the revision of all parts as --revision"),
    "use_8bit_adam": (
        False,
        "AdamW keeps 32 bits; leave it out, and for less memory use --gradient_checkpointing or "
        "accelerate_configs/deepspeed_zero2.yaml",
    ),
    "dream_training": (False, "DREAM is not implemented; leave it out"),
    "dream_detail_preservation": (False, "DREAM is not implemented; leave it out"),
    "report_to comet_ml": (False, "curves go to mlflow, tensorboard, wandb or none"),
    "report_to all": (False, "curves go to mlflow, tensorboard, wandb or none"),
    "rank": (False, "LoRA is not implemented, the whole UNet is trained; leave it out"),
    "lr_num_cycles": (False, "cosine_with_restarts runs one cycle; leave it out"),
    "lr_power": (False, "the polynomial schedule has power 1; leave it out"),
    "model_config_name_or_path": (
        False,
        "a new autoencoder is built from --vae_channels, --vae_layers, --latent_channels",
    ),
    "perceptual_scale 0": (True, "there is no LPIPS term"),
    "perceptual_scale": (False, "there is no LPIPS term; --ssim_weight weighs the structural term in its place"),
    "disc_start": (False, "there is no discriminator; leave it out"),
    "disc_factor": (False, "there is no discriminator; leave it out"),
    "disc_scale": (False, "there is no discriminator; leave it out"),
    "disc_loss": (False, "there is no discriminator; leave it out"),
    "disc_learning_rate": (False, "there is no discriminator; leave it out"),
    "disc_lr_scheduler": (False, "there is no discriminator; leave it out"),
}
_VAE_OPTIONS = {  # of train_autoencoderkl.py -> ours; {} stands for the value
    "pretrained_model_name_or_path": "--vae {}",
    "revision": "--vae_revision {}",
    "decoder_only": "--vae_train_part decoder",
    "rec_loss l1": "--l1_weight 1 --mse_weight 0",
    "rec_loss l2": "--l1_weight 0 --mse_weight 1",
}


def from_diffusers(argv: list[str], model: Literal["vae", "unet"]) -> list[str]:
    """A command line of diffusers' training scripts in our options.

    model: what the script trains. Options without a meaning here are left out with a note where the result is the same.
    Raises `UserError`, with what to do here, where it is not. Values are not shown, as one may be a token.
    """
    words: list[str] = []
    for word, values, typed in typed_options(argv):
        name = plain_option(word)
        with_value = " ".join([name, *values])
        harmless, answer = THEIR_OPTIONS.get(with_value, THEIR_OPTIONS.get(name, (True, "")))
        ours = _VAE_OPTIONS.get(with_value, _VAE_OPTIONS.get(name, "")) if model == "vae" else ""
        if answer and not harmless:
            raise UserError(f"--{name} of diffusers' scripts: {answer}")
        if answer:
            note(f"--{name} of diffusers' scripts is left out: {answer}")
        elif ours:
            words += [value for part in ours.split() for value in (values if part == "{}" else [part])]
        elif name == "rec_loss" and model == "vae":
            raise UserError("--rec_loss takes l1 or l2; or give --l1_weight and --mse_weight")
        else:
            words += typed
    return words


def parse(sections: tuple[str, ...], doc: str, argv: list[str] | None = None) -> Recipe:
    """Defaults <- recipe (`--config`) <- command line, for the given sections of `Recipe`.

    `source` stands for the part of section data that says where the images come from.
    Exits with code 2 on an unknown option, naming the nearest known one; raises `UserError` on a wrong value.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "train_vae" in sections or "train_unet" in sections:
        argv = from_diffusers(argv, "vae" if "train_vae" in sections else "unet")
    config = option(argv, "config")
    recipe = load_recipe(config) if config else Recipe()
    config_type = Annotated[
        str | None, tyro.conf.arg(help="recipe: a YAML file, or the name of one in scripts/recipes")
    ]
    members: list[Any] = [("config", config_type, field(default=None))]
    defaults = {name: _source(recipe) if name == "source" else getattr(recipe, name) for name in sections}
    members += [
        (name, type(value), field(default_factory=partial(defaults.get, name))) for name, value in defaults.items()
    ]
    chosen: Any = parse_options(dataclasses.make_dataclass("Options", members), doc, argv)
    for name, before in defaults.items():
        _put(recipe, name, getattr(chosen, name), before)
    if "vae" in sections:
        check_vae(recipe, crop="train_vae" in sections)
    if "unet" in sections:
        check_unet(recipe)
    return recipe


def override(recipe: Recipe, name: str, argv: list[str]) -> None:
    """Change section `name` of a recipe by options as its script takes them (`--max_train_steps 20`), by the same rules."""
    before = getattr(recipe, name)
    members = [(name, type(before), field(default_factory=lambda: before))]
    chosen: Any = parse_options(dataclasses.make_dataclass("Options", members), f"Section {name} of the recipe.", argv)
    _put(recipe, name, getattr(chosen, name), before)


def _put(recipe: Recipe, name: str, chosen: Any, before: Any) -> None:
    """Put a parsed section into the recipe; `before` is what the recipe said."""
    section = check_options(chosen)
    _clear_dependent(section, before, "dataset", "dataset_revision")
    _clear_dependent(section, before, "dataset", "dataset_config_name")
    _clear_dependent(section, before, "vae", "vae_revision")
    _clear_dependent(section, before, "text_encoder", "text_encoder_revision")
    _clear_dependent(section, before, "pretrained_model_name_or_path", "revision")
    _clear_dependent(section, before, "pretrained_model_name_or_path", "variant")
    _clear_dependent(section, before, "validation_steps", "validation_epochs")
    _clear_dependent(section, before, "num_train_epochs", "max_train_steps")
    _clear_dependent(section, before, "num_inference_steps", "preset")
    if name == "source":
        recipe.data = dataclasses.replace(recipe.data, **dataclasses.asdict(section))
    else:
        setattr(recipe, name, section)


def check_dataset(name: str | None) -> Path | None:
    """The folder that `--dataset` names; None for what may be a Hub id. Takes no time, so that a typing error costs none.

    Raises `UserError` if no data set is named, or neither a folder here nor a Hub id.
    """
    if not name:
        raise UserError("no data set: give --dataset with a Hub id, a dataset folder or an imagefolder")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"--dataset {name} is a file; give the folder that holds it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        near = near_folder(folder)
        raise UserError(
            f"--dataset {name!r}: there is no such folder, and a Hub id is written owner/name; "
            + (f"did you mean {near}?" if near else "fix the path")
        )
    return None


def near_folder(folder: Path) -> Path | None:
    """The folder that a mistyped one may stand for: the nearest name beside it, or beside the first of its parents that is missing."""
    while not folder.parent.is_dir():
        folder = folder.parent
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(folder.name, beside, n=1)
    return folder.with_name(near[0]) if near else None


def check_vae(recipe: Recipe, factor: int | None = None, crop: bool = True) -> None:
    """Refuse a resolution or crop that the autoencoder cannot take.

    factor: pixels per latent and side; None: of the recipe's VAE, as far as that is known here. crop: check `crop_size` too.
    """
    factor, resolution, losses = factor or _vae_factor(recipe.vae), recipe.data.resolution, recipe.train_vae
    if not losses.mse_weight + losses.l1_weight + losses.ssim_weight:
        raise UserError(
            "mse_weight, l1_weight and ssim_weight are all 0, so nothing asks the autoencoder to look like the image; set "
            "mse_weight: 1"
        )
    if factor is None:
        return
    sides = {"resolution": resolution, "crop_size": recipe.train_vae.crop_size if crop else None}
    for name, side in sides.items():
        if side and (side % factor or side > resolution):
            raise UserError(
                f"{name} {side} does not fit: it must be a multiple of {factor}, the VAE's factor, and at most the resolution; "
                f"set {name} to {max(factor, min(side, resolution) // factor * factor)}"
            )


def check_unet(recipe: Recipe, factor: int | None = None) -> None:
    """Refuse a denoiser that cannot be built, or cannot take the latents of the recipe's autoencoder. factor: as `check_vae`'s."""
    unet = recipe.unet
    if unet.rescale_betas_zero_snr and unet.prediction_type == "epsilon":
        raise UserError(
            "rescale_betas_zero_snr with prediction_type epsilon cannot work: at the last noise level the noise is the input; "
            "set prediction_type: v_prediction"
        )
    if unet.pretrained_model_name_or_path:
        return
    levels, factor = len(unet.unet_channels), factor or _vae_factor(recipe.vae)
    if len(unet.down_block_types) != levels:
        raise UserError(
            f"down_block_types names {len(unet.down_block_types)} levels and unet_channels {levels}; give one type per level"
        )
    if factor and recipe.data.resolution // factor % 2 ** (levels - 1):
        step = factor * 2 ** (levels - 1)
        near = max(step, recipe.data.resolution // step * step)
        raise UserError(
            f"resolution {recipe.data.resolution} gives latents of side {recipe.data.resolution // factor}, which the UNet cannot "
            f"halve {levels - 1} times; set resolution to a multiple of {step}, such as {near}, or give fewer unet_channels"
        )


def _vae_factor(config: VaeConfig) -> int | None:
    """Pixels per latent and side, of the VAE that is built or lies in a folder here; None for one of the Hub."""
    if config.vae is None:
        return 2 ** (len(config.vae_channels) - 1)
    for file in (Path(config.vae) / part / "config.json" for part in ("", "vae", "pipeline/vae")):
        try:
            return 2 ** (len(json.loads(file.read_text(encoding="utf-8"))["block_out_channels"]) - 1)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # what is wrong with it is said when it is loaded
    return None


def parse_options(cls: type[T], doc: str, argv: list[str] | None = None) -> T:
    """Parse the command line into the dataclass `cls`: flat options, underscores, groups by nested dataclass.

    A list option that is given several times collects all values; of another one the last holds, which is said. Raises
    `UserError` for bytes that are not UTF-8.
    """
    argv = collect_lists(cls, sys.argv[1:] if argv is None else argv)
    return tyro.cli(cls, args=argv, description=doc, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))


def collect_lists(cls: type, argv: list[str]) -> list[str]:
    """The command line with each list option once, with the values of all its places in order: tyro keeps the last alone."""
    known = _options(cls)
    collected: list[str] = []
    ends: dict[str, int] = {}  # list option -> where in `collected` its values end
    given: dict[str, str] = {}  # option -> its first value, as typed
    for word, values, words in typed_options(argv):
        if any("\ud800" <= letter <= "\udfff" for text in (word, *values) for letter in text):
            raise UserError(f"{word[:40]!r} holds bytes that are not UTF-8; type the text anew, in a UTF-8 terminal")
        name, is_list = known.get(plain_option(word), ("", False))
        if name in ends:
            end = ends[name]
            collected[end:end] = values
            ends = {other: at + len(values) * (at >= end) for other, at in ends.items()}
            continue
        typed = " ".join((word, *values))
        if given.get(name, typed) != typed:  # the later one wins, as in a shell's alias
            note(f"--{name} is given twice ({given[name]}, then {typed}); the last one holds")
        if is_list:
            collected += [word, *values]
            ends[name] = len(collected)
            continue
        if name:
            given[name] = typed
        collected += words
    return collected


def typed_options(argv: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each option of a command line: its word as typed (`--name`), its values, and all its words; `--name=value` is taken apart."""
    position = 0
    while position < len(argv):
        start = position
        word = argv[position]
        word, *values = word.split("=", 1) if word.startswith("--") else [word]
        position += 1
        while position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        yield word, values, argv[start:position]


def plain_option(word: str) -> str:
    """The name of a typed option: `--train-data-dir` is `train_data_dir`."""
    return word.removeprefix("--").replace("-", "_")


def note(text: str) -> None:
    """Tell the user something about the command line, once for all processes of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(f"NOTE: {text}", file=sys.stderr)


def _options(cls: Any) -> dict[str, tuple[str, bool]]:
    """The options of a dataclass and those nested in it, by all their names: their field, and whether it is a list."""
    found: dict[str, tuple[str, bool]] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        kind, notes = (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
        if dataclasses.is_dataclass(kind):
            found |= _options(kind)
            continue
        aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
        names = [name, *(alias.removeprefix("--") for alias in aliases), *([f"no_{name}"] if kind is bool else [])]
        found |= dict.fromkeys(names, (name, get_origin(kind) is list))
    return found


def check_options(options: T) -> T:
    """Check the ranges of a parsed dataclass; raise `UserError` naming the option."""
    return checked(type(options), dataclasses.asdict(options), "the command line")  # type: ignore[call-overload]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved settings as plain data, a dictionary a section."""
    return dataclasses.asdict(recipe)


def _source(recipe: Recipe) -> SourceConfig:
    return SourceConfig(**{name: getattr(recipe.data, name) for name in _fields(SourceConfig)})


def _fields(cls: Any) -> dict[str, Any]:
    return {item.name: item.type for item in dataclasses.fields(cls)}


def known_key(key: Any, known: dict[str, Any], what: str) -> Any:
    """`key`, if it is one of `known`; else raises `UserError` naming the nearest, or all. what: such as "key in x.yaml"."""
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(map(str, known))}"
        raise UserError(f"unknown {what}: {key!r}; {meant}")
    return key


def checked(cls: Any, values: dict[str, Any], where: str) -> Any:
    """A dataclass of checked values; raises `UserError` with the first that is not usable."""
    for key, value in values.items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and not _is_text(text):
                raise UserError(f"{where}: {key} = {text!r} is not usable: it is not valid UTF-8; write it in UTF-8")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        if first["type"] == "missing":
            raise UserError(f"{where}: {key} is missing; add it") from None
        reason = _reason(first["type"], first["input"], first.get("ctx", {})) or first["msg"]
        raise UserError(f"{where}: {key} = {first['input']!r} is not usable: {reason}") from None


_REASONS = {  # pydantic's types of errors, by how they begin -> what to do
    "value_error": "{error}",
    "string_type": "it is not text; put it in quotes",
    "int_": "give a whole number, without a unit",
    "float_": "give a number, without a unit",
    "bool_": "write true or false, without quotes",
    "list_": "give a list, such as [a, b]",
    "dict_": "give keys and values, such as {{name: value}}",
    "dataclass_": "give keys and values, such as {{name: value}}",
    "literal_error": "give {expected}",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be greater than {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be less than {lt}",
    "finite_number": "it must be a finite number",
}


def _reason(kind: str, value: Any, context: dict[str, Any]) -> str:
    """What to do about a value that pydantic refused, in words of a YAML's writer; empty for an error not in the table."""
    wants_text = kind in ("string_type", "literal_error")
    if value is None and wants_text:
        return "it is empty; give a value, or delete the key"
    if isinstance(value, bool) and wants_text:
        word = "no" if not value else "yes"
        expected = str(context.get("expected", ""))
        word = next((quoted for quoted in (word, word.upper()) if f"'{quoted}'" in expected), word)
        if not expected or f"'{word}'" in expected:
            return f"YAML reads {word} as {str(value).lower()}; write '{word}' in quotes"
    found = next((text for start, text in _REASONS.items() if kind.startswith(start)), "")
    return found.format(**context)


def matching(pattern: str, example: str) -> AfterValidator:
    """A check that a text is as `pattern`; its error gives an example."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"give one such as {example}")
        return text

    return AfterValidator(check)


def _is_text(text: str) -> bool:
    """Whether a string can be written to a file: bytes of another encoding come as lone surrogates."""
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:
        return False


def _clear_dependent(section: Any, before: Any, key: str, belongs: str) -> None:
    """Where the command line changes `key` and not `belongs`, the recipe's `belongs` (a revision, say) no longer counts."""
    if (
        hasattr(section, key)
        and hasattr(section, belongs)
        and getattr(section, key) != getattr(before, key)
        and getattr(section, belongs) == getattr(before, belongs)
    ):
        setattr(section, belongs, None)


def option(argv: list[str], name: str) -> str | None:
    """The last value of an option on a command line that is not parsed yet."""
    value = None
    for index, word in enumerate(argv):
        if word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
        elif word == f"--{name}" and index + 1 < len(argv):
            value = argv[index + 1]
    return value


def dataset_name(config: DataConfig) -> str:
    """The data set's name for messages and cards, without the folders above it."""
    return str(config.dataset).rstrip("/").split("/")[-1]
