"""Settings of all scripts: defaults <- recipe <- command line. This module imports no torch, so that `--help` answers at once.

A recipe is a YAML file with the sections of `Recipe`. The comment behind or above a field is the help text of its
option. The names of options are those of diffusers' training scripts. If this suite uses another name,
`t2i.from_diffusers` translates diffusers' name or says what to use instead.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import Field

from t2i.command_line import check_options, option, parse_options, typed_fields
from t2i.config_types import (
    AS_LIST,
    NUMBER,
    BelowOne,
    Count,
    Flag,
    Guidance,
    LocalPath,
    Natural,
    NonNegative,
    PathText,
    Positive,
    Share,
    Steps,
    checked,
    known_key,
    unlisted,
)
from t2i.errors import UserError
from t2i.from_diffusers import translate_options

LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

PACKAGED_NETWORKS = ("efficientnet-lite0", "efficientnet-lite2")  # Their weights come from the package index.
# Lists that were single texts in older versions: section and key.
_ONCE_TEXT = (("data", "caption_column"), ("data", "caption_template"), ("caption", "captioner"), ("caption", "task"))

RECIPES = Path(__file__).parent.parent / "recipes"
JUDGE = "efficientnet-lite0"  # Network that judges pictures by default.
PATCH = 8  # Pixels between two patches of the discriminator. Smaller images have none.


def _alias(*names: str) -> Any:
    return tyro.conf.arg(aliases=[f"--{name}" for name in names])


@dataclass
class HubConfig:
    """Settings of a push to the Hub."""

    push_to_hub: Flag = False  # Upload the result to the Hub. Log in by `hf auth login`, or set HF_TOKEN.
    hub_private_repo: Flag = True  # Make a new repository private. An existing repository keeps its visibility.
    hub_deadline: Positive = 900.0  # Seconds during which a failed push is retried.
    hub_revision: str | None = None  # Branch to push to, made from main if it is missing. With None, push to main.
    create_pr: Flag = False  # Open a pull request instead of pushing to main. Each push opens a new pull request.


@dataclass
class ModelHubConfig(HubConfig):
    """Settings of a push of a model to the Hub."""

    hub_model_id: str | None = None  # Repository of the model on the Hub, as ORG/NAME.
    # Licence of the model, by the Hub's identifier, such as apache-2.0. The value "unknown" means that no licence was
    # chosen.
    license: str = "unknown"


@dataclass
class SourceConfig:
    """Settings of the source of images and captions."""

    # Data set: a Hub id, a dataset folder or an imagefolder.
    dataset: Annotated[PathText | None, _alias("dataset_name", "train_data_dir")] = None
    dataset_revision: str | None = None  # Branch, tag or commit of a Hub data set.
    dataset_config_name: str | None = None  # Name of the configuration, for a data set with several configurations.
    image_column: str = "image"  # Column that holds the images.
    # Columns that hold the captions, each as a text or a list of texts. Without names, try the columns caption and text,
    # then make captions from labels.
    caption_column: Annotated[list[str], AS_LIST] = field(default_factory=list)
    label_names: list[str] = field(default_factory=list)  # Names of numeric labels. The first name is that of label 1.
    # Captions of an image that has only a label. Evaluation prompts use the first template.
    caption_template: Annotated[list[str], AS_LIST, Field(min_length=1)] = field(
        default_factory=lambda: ["a photo of a {label}, a type of flower"]
    )
    caption_prefix: str = ""  # Words to put before every non-empty caption, such as a trigger word: "sks style,".
    max_bad_share: Share = 0.05  # Share of undecodable images above which the run stops.


@dataclass
class DataConfig(SourceConfig):
    """Settings of the data set and its preparation."""

    # Width and height of the training images in pixels. Each image is resized and cropped to its center square.
    resolution: Annotated[int, NUMBER, Field(ge=8, le=2048)] = 128
    random_flip: Flag = True  # Train on mirrored images as well. The latents of mirrored images are cached too.
    # Number of random crops of each training image, on which training runs as well. Each crop is a square of 80 to 100 %
    # of the shorter side. Its latents are cached too. Crops help if there are few images.
    random_crops: Annotated[int, NUMBER, Field(ge=0, le=16)] = 0
    # Share of images that become the validation split if the data set has none. A hash of each image's content decides
    # whether it becomes a validation image.
    validation_fraction: Annotated[float, NUMBER, Field(gt=0, lt=0.9, allow_inf_nan=False)] = 0.05
    split_seed: int = 0  # Seed of the validation split. Another seed chooses other validation images.
    max_train_samples: Count | None = None  # Maximum number of training images. With None, use all images.
    # Folder for prepared images, latents and text embeddings, whose subfolders are named by a hash of the content.
    cache_dir: LocalPath = ".cache/t2i"


@dataclass
class CaptionConfig(HubConfig):
    """Settings of captioning."""

    # Dataset folder to write. You may edit captions.jsonl in the dataset folder by hand.
    output_dir: LocalPath | None = None
    dry_run: Flag = False  # End after the table that shows how the data set was understood.
    # Sources of captions: florence2, label (by caption_template), existing (those of the data set), or a model's folder
    # or Hub id. With several sources, each image gets the captions of all of them.
    captioner: Annotated[list[PathText], AS_LIST, Field(min_length=1)] = field(default_factory=lambda: ["florence2"])
    captioner_revision: str | None = None  # Branch, tag or commit of a Hub captioner.
    # Tasks of Florence-2: <CAPTION>, <DETAILED_CAPTION>, <MORE_DETAILED_CAPTION>, <OD>, … Each task adds a caption.
    task: Annotated[list[str], AS_LIST, Field(min_length=1)] = field(default_factory=lambda: ["<DETAILED_CAPTION>"])
    prompt: str = ""  # Prompt for the captioner, if its task takes a prompt.
    # Number of images that the captioner reads at once. The batch is halved if memory runs out.
    caption_batch_size: Count = 8
    # Maximum number of tokens that the captioner writes per caption. CLIP as a text encoder reads at most 77 tokens, by
    # its own tokenizer.
    max_new_tokens: Annotated[int, NUMBER, Field(ge=1, le=4096)] = 128
    # Number of beams of the beam search. Florence-2's card uses 3 beams. One beam is about twice as fast as 3 beams.
    num_beams: Count = 3
    # Length of token sequences that may not repeat within a caption. With None, use the captioner's own setting.
    no_repeat_ngram_size: Count | None = None
    # Penalty on repeated tokens. Penalties above 1 make repetition less likely. With None, use the captioner's own
    # setting.
    repetition_penalty: Positive | None = None
    strip_boilerplate: Flag = True  # Remove openings about the image itself: "The image shows a rose" becomes "A rose".
    fail_on: list[str] = field(default_factory=list)  # Limits of the caption audit, such as empty=0 over_limit=0.05.
    audit_tokenizer: PathText = "openai/clip-vit-large-patch14"  # CLIP tokenizer (path or Hub id) that counts tokens.
    license: str = "unknown"  # Licence of the data set, by the Hub's identifier, such as cc-by-4.0.
    hub_dataset_id: str | None = None  # Repository of the data set on the Hub, as ORG/NAME.


@dataclass
class VaeConfig:
    """Settings of the autoencoder."""

    # Autoencoder: a run folder, path or Hub id. With None, build a new autoencoder by the other vae options.
    vae: Annotated[PathText | None, _alias("pretrained_vae_model_name_or_path")] = None
    vae_revision: str | None = None  # Branch, tag or commit of a Hub VAE.
    # Channels per level of a new VAE. Each level of the VAE after the first halves width and height.
    vae_channels: Annotated[list[Count], Field(min_length=1)] = field(default_factory=lambda: [32, 64, 96])
    vae_layers: Count = 1  # Residual layers per level of a new VAE.
    latent_channels: Count = 4  # Channels of the latents of a new VAE.


@dataclass
class UnetConfig:
    """Settings of the denoiser, its text encoder and its noise schedule."""

    # Pipeline (path or Hub id) whose UNet is trained further. The pipeline's VAE and text encoder are the defaults.
    pretrained_model_name_or_path: PathText | None = None
    # CLIP text encoder with tokenizer: a run folder, path or Hub id. With None, build a small frozen text encoder.
    text_encoder: PathText | None = None
    text_encoder_revision: str | None = None  # Branch, tag or commit of a Hub text encoder.
    revision: str | None = None  # Branch, tag or commit of the Hub pipeline that is trained further.
    # Variant of the weight files of pretrained_model_name_or_path, such as fp16. With None, load weight files without a
    # variant's suffix.
    variant: str | None = None
    text_hidden_size: Count = 128  # Hidden size of a new text encoder.
    text_layers: Count = 2  # Number of layers of a new text encoder.
    # Maximum number of tokens per caption of a new text encoder.
    text_max_length: Annotated[int, NUMBER, Field(ge=4, le=512)] = 32
    # Channels per level of a new UNet.
    unet_channels: Annotated[list[Count], Field(min_length=1)] = field(default_factory=lambda: [192, 384, 576])
    unet_layers: Count = 2  # Number of residual and attention layers per level of a new UNet.
    # Types of the down blocks of a new UNet, one per level. The up blocks mirror the down blocks.
    down_block_types: list[Literal["CrossAttnDownBlock2D", "DownBlock2D"]] = field(
        default_factory=lambda: ["CrossAttnDownBlock2D"] * 3
    )
    # Number of attention heads per level of a new UNet. The misleading name attention_head_dim comes from diffusers.
    attention_head_dim: Count = 8
    # Besides cross-attention, add the pooled hidden states of the text encoder to the time embedding of a new UNet
    # ("text").
    addition_embed_type: Literal["text"] | None = None
    # What the time embedding does in each residual block of a new UNet: it is added after the first convolution
    # (default), or scales and shifts the normalised features (scale_shift).
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    # Target of the UNet's prediction: epsilon (the noise) or v_prediction (the velocity).
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    # Schedule of the 1,000 noise levels.
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    # Make the last noise level pure noise (arXiv:2305.08891). A pure-noise last level needs prediction_type
    # v_prediction.
    rescale_betas_zero_snr: Flag = False


@dataclass
class TrainConfig:
    """Settings that both training scripts share."""

    output_dir: LocalPath | None = None  # Run folder to write or resume.
    dry_run: Flag = False  # End after the table that shows how the data set was understood.
    seed: Annotated[int, NUMBER, Field(ge=0, lt=2**32)] = 0  # Seed of weights, order, noise, timesteps and dropout.
    train_batch_size: Count = 16  # Number of images per process and training step.
    gradient_accumulation_steps: Count = 1  # Number of micro-batches per weight update.
    max_train_steps: Count | None = None  # Number of weight updates. With None, num_train_epochs decides.
    num_train_epochs: Positive = 100.0  # Number of passes over the training images, if max_train_steps is None.
    # Precision of the training, if the launch sets none. A precision that contradicts the launch is refused.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    # Optimiser: adamw, or muon, which trains the matrices within the model by orthogonalised momentum and all other
    # weights by AdamW. Muon learns more per update, from learning rates two to four times as high. It runs without ZeRO.
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-4  # Peak learning rate.
    scale_lr: Flag = False  # Multiply learning_rate by the number of images per update, counted over all processes.
    lr_scheduler: LrScheduler = "cosine"  # Learning rate schedule, by diffusers' names.
    lr_warmup_steps: Natural = 500  # Number of updates in which the learning rate rises linearly to its peak.
    # Learning rate after a raised max_train_steps or num_train_epochs has extended a run. stretch follows the schedule of the new
    # length. restart repeats warm-up and schedule over the added updates. constant holds the checkpoint's rate. stretch is the
    # default, because later updates then get the rates of a run that had the new length from the start.
    lr_on_extend: Literal["stretch", "restart", "constant"] = "stretch"
    adam_beta1: BelowOne = 0.9  # Decay rate of the gradient's moving average in AdamW. Muon has 0.95 for its matrices.
    adam_beta2: BelowOne = 0.999  # Decay rate of the squared gradient's moving average in AdamW.
    adam_weight_decay: NonNegative = 1e-2  # Weight decay of all weights.
    adam_epsilon: Positive = 1e-8  # Small number added to AdamW's denominator, for numerical stability.
    max_grad_norm: Positive = 0.5  # Norm to which larger gradients are clipped.
    use_ema: Flag = True  # Keep and save an exponential moving average (EMA) of the weights, in fp32.
    # Highest decay of the EMA. At update n the decay of the EMA is min(ema_decay, (1 + n) / (10 + n)).
    ema_decay: Share = 0.9999
    # Recompute activations in the backward pass (gradient checkpointing), which needs less memory and about a third
    # more time.
    gradient_checkpointing: Flag = False
    channels_last: Flag = False  # Use the memory layout channels_last (NHWC).
    compile: Flag = False  # Compile the trained model by torch.compile.
    # On a single GPU, run each training step as one CUDA graph. A CUDA graph keeps the memory of a training step in
    # use.
    cuda_graphs: Flag = True
    allow_tf32: Flag = False  # Allow TF32 matrix products on Ampere GPUs and later.
    validation_steps: Count = 500  # Number of updates between validations.
    checkpointing_steps: Count = 500  # Number of updates between checkpoints.
    # Number of newest checkpoints to keep. With None, keep all checkpoints.
    checkpoints_total_limit: Count | None = None
    # Checkpoint to resume from, or latest. With None, start a new run, which is refused if the run folder holds
    # checkpoints.
    resume_from_checkpoint: str | None = "latest"
    # Number of updates with a non-finite loss or gradient that are skipped before the run ends.
    max_nonfinite_steps: Natural = 0
    logging_steps: Count = 10  # Number of updates between logged losses.
    # Tracker of curves and pictures. tensorboard and wandb are used in addition to MLflow.
    report_to: Literal["mlflow", "tensorboard", "wandb", "none"] = "mlflow"
    logging_dir: str = "logs"  # Folder for TensorBoard's files, below output_dir.
    # MLflow experiment, and project of W&B. MLFLOW_EXPERIMENT_NAME overrides the default.
    experiment: Annotated[str, _alias("tracker_project_name")] = "t2i"
    run_name: str | None = None  # Name of the MLflow run. With None, use the name of output_dir.


@dataclass
class TrainVaeConfig(ModelHubConfig, TrainConfig):
    """Training of the autoencoder."""

    train_batch_size: Count = 8  # Number of images per process and training step.
    # Number of newest checkpoints to keep. With None, keep all checkpoints. With 1, keep the newest checkpoint until
    # the run has finished. A finished run that keeps checkpoints can be extended from its last update.
    checkpoints_total_limit: Count | None = 1
    # Part of the autoencoder to train. With decoder, the latents do not change, so their caches stay valid, and UNets that
    # were trained before draw with the new decoder.
    vae_train_part: Literal["all", "decoder"] = "all"
    # Last updates that train only the decoder. The encoder then keeps its averaged weights, so latents stay as they are.
    decoder_only_steps: Natural = 0
    # Side of random training crops in pixels. Validation uses whole images. With None, train on whole images.
    crop_size: Count | None = None
    # Number of updates on crops. Training then continues on whole images at the same batch size. With None, train on crops to the end.
    crop_steps: Count | None = None
    # Weight of KL(posterior || N(0, 1)). The divergence is in nats per color value, like the reconstruction term.
    kl_weight: Annotated[NonNegative, _alias("kl_scale")] = 1e-6
    l1_weight: NonNegative = 0.0  # Weight of the absolute error.
    mse_weight: NonNegative = 1.0  # Weight of the squared error.
    ssim_weight: NonNegative = 0.1  # Weight of the structural term, 1 - SSIM.
    # Weight of the distance in the features of perceptual_network. 0 disables it.
    perceptual_weight: NonNegative = 0.0
    # Network of the perceptual distance: efficientnet-lite2 (offline), or a folder or Hub id of a vision model.
    perceptual_network: PathText = "efficientnet-lite2"
    # Strength of the patch discriminator, relative to the other terms: 0.5 gives half of their gradient. 0 disables the discriminator.
    adversarial_weight: NonNegative = 0.0
    adversarial_start: Natural = 0  # Number of updates before the discriminator is trained and takes effect.
    discriminator_learning_rate: Positive = 2e-4  # Learning rate of the discriminator, which is constant.
    # Share of batches that decode rotated and shrunk latents (EQ-VAE, arXiv:2502.09509). The paper has 0.5. 0 disables it.
    equivariance_share: Share = 0.0
    equivariance_start: Natural = 0  # Number of updates before equivariance_share holds.


@dataclass
class TrainUnetConfig(ModelHubConfig, TrainConfig):
    """Training of the denoiser."""

    # Gamma of min-SNR loss weights (arXiv:2303.09556), usually 5. With None, use no min-SNR weights.
    snr_gamma: Positive | None = None
    # Share of samples whose caption is dropped at random, for classifier-free guidance.
    proportion_empty_prompts: BelowOne = 0.1
    # Standard deviation of a random shift of each channel's noise, usually about 0.1. A deviation of 0 disables the
    # shift.
    noise_offset: NonNegative = 0.0
    # Strength of additional noise on the UNet's input, which is not in the target, usually about 0.1. A strength of 0
    # disables the additional noise.
    input_perturbation: NonNegative = 0.0
    # Weight of the alignment of the UNet's middle block with the features of alignment_network (REPA,
    # arXiv:2410.06940). 0 disables it.
    alignment_weight: NonNegative = 0.0
    # Network of the alignment: efficientnet-lite2 (offline), or a folder or Hub id of a vision model.
    alignment_network: PathText = "efficientnet-lite2"
    # Prompts for which pictures are drawn at each validation.
    validation_prompts: Annotated[list[str], _alias("validation_prompt")] = field(default_factory=list)
    # Number of passes over the images between validations. With None, use validation_steps.
    validation_epochs: Positive | None = None
    validation_images: Count = 256  # Maximum number of validation images on which the loss is measured.
    guidance_scale: Guidance = 7.5  # Guidance scale of the validation pictures.
    # How far guidance keeps the contrast of an unguided picture, in validation pictures.
    guidance_rescale: Share = 0.0
    num_inference_steps: Steps = 30  # Number of denoising steps of the validation pictures.
    # Number of updates after which the moving average is kept in the pipeline as the guide of its pictures
    # (arXiv:2406.02507). About half of all updates is a good choice. With None, the pipeline has no guide.
    guide_step: Count | None = None
    save_raw_weights: Flag = False  # Save the raw weights in the pipeline instead of the moving average.
    # Number of pictures on the published card, drawn for the prompts of validation and evaluation.
    gallery_pictures: Natural = 8


@dataclass
class DistillConfig(TrainConfig):
    """Distillation of a denoiser into a student that draws in few steps, without guidance."""

    # Teacher: run folder of train_unet.py, checkpoint, pipeline folder or Hub id.
    model: PathText | None = None
    num_inference_steps: Literal[1, 2, 4] = 2  # Number of denoising steps in which the student draws.
    # Guidance scale of the teacher's pictures. With None, use the scale that the teacher's evaluation chose, otherwise
    # that of the validation pictures in its training.
    guidance_scale: Guidance | None = None
    # How far the teacher's guidance keeps the contrast of an unguided picture. With None, as in its evaluation or training.
    guidance_rescale: Share | None = None
    trajectories: Count = 1024  # Number of pictures that the teacher draws, from whose latents the student learns.
    # Number of further pictures of the teacher, for captions of validation images, on which the error is measured.
    validation_images: Count = 64
    # Updates of a tiny decoder, which learns to decode as the autoencoder does and replaces it in the student's pipeline.
    # With 0, keep the autoencoder. With None, 1500 for autoencoders with 64 or more channels at their finest level, and 0
    # for smaller ones, whose decoders are small already.
    decoder_steps: Natural | None = None
    decoder_learning_rate: Positive = 5e-3  # Peak learning rate of the tiny decoder.
    num_train_epochs: Positive = 4.0  # Number of passes over the steps of all trajectories, if max_train_steps is None.
    train_batch_size: Count = 16  # Number of steps of trajectories per process and weight update.
    # Peak learning rate. Higher rates take the student away from its teacher.
    learning_rate: Positive = 1e-4
    lr_warmup_steps: Natural = 20  # Number of updates in which the learning rate rises linearly to its peak.
    ema_decay: Share = 0.99  # Highest decay of the EMA. At update n the decay is min(ema_decay, (1 + n) / (10 + n)).


@dataclass
class EvaluateConfig:
    """Evaluation of checkpoints over guidance scales."""

    model: PathText | None = None  # Run folder of train_unet.py.
    # Names of the checkpoint folders to evaluate. Without any names, all checkpoints are evaluated.
    checkpoints: list[str] = field(default_factory=list)
    # Guidance scales to evaluate.
    guidance_scales: Annotated[list[Guidance], Field(min_length=1)] = field(
        default_factory=lambda: [1.5, 3.0, 5.0, 7.5]
    )
    # How far guidance keeps the contrast of an unguided picture. 0.35 to 0.7 prevents glaring colors at high scales.
    guidance_rescale: Share = 0.0
    # Preset of generate_images.py for the evaluation's pictures. With None, use the model's scheduler,
    # num_inference_steps and guidance at every step. A student of distill_unet.py has its own preset, turbo.
    preset: Literal["exact", "fast", "draft", "turbo"] | None = None
    num_inference_steps: Steps = 30  # Number of denoising steps per picture, if no preset sets it.
    # Number of prompts drawn per checkpoint and guidance scale, by which the best pair is chosen.
    sweep_prompts: Count = 24
    # Number of further prompts, on which the best checkpoint and guidance scale are reported.
    report_prompts: Count = 256
    eval_batch_size: Count = 32  # Number of pictures drawn at once.
    # Engine that draws on a CPU. The engine auto means torch in evaluations. The engine openvino compiles each
    # checkpoint, which pays off with large UNets.
    engine: Literal["auto", "torch", "openvino"] = "auto"
    eval_seed: Annotated[int, NUMBER, Field(ge=0, lt=2**32)] = 1000  # Seed of prompts, noise and classifier.
    # Training steps of the classifier that reads the attributes of drawn flowers. With 0 steps, no classifier is
    # trained.
    classifier_steps: Natural = 1200
    classifier_drawings: Count = 5000  # Number of drawings on which the classifier of drawn flowers is trained.
    # Network that judges the pictures. Besides efficientnet-lite0 it may be a path or Hub id of a vision model, such as
    # facebook/dinov2-small. With None, no network judges.
    judge_network: Annotated[PathText | None, _alias("kid_network")] = JUDGE
    clip: PathText | None = None  # CLIP model (path or Hub id) for the CLIP score. With None, leave the CLIP score out.
    # Also write evaluation/report.html: one file that holds the evaluation and opens without a network.
    report: Flag = False
    # Only draw the reported pictures of a finished evaluation that are no longer in the run folder.
    redraw: Flag = False


@dataclass
class Recipe:
    """All settings of an experiment, one field per section.

    Every script checks all sections of a recipe, and uses only its own sections.
    """

    data: DataConfig = field(default_factory=DataConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    train_vae: TrainVaeConfig = field(default_factory=TrainVaeConfig)
    train_unet: TrainUnetConfig = field(default_factory=TrainUnetConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


# Keys of earlier versions: section -> old key -> new key. An old key without a value is dropped.
RENAMED = {"evaluate": {"kid_network": "judge_network"}}


# --- Reading a recipe and the command line ----------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's loader, which refuses a repeated key of a mapping instead of using its last value."""

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
    """Return the content of a YAML file, or None if it is empty.

    Raises:
        UserError: the file is not valid YAML in UTF-8, or repeats a key; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark decodes, with zeros
        raise UserError(f"{path} is not in UTF-8; save it as UTF-8")
    try:
        loader = _Loader(text)
        loader.name = str(path)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def load_recipe(name: str) -> Recipe:
    """Read a recipe: a YAML file, or the name of one in scripts/recipes.

    Raises:
        UserError: the file is missing, a section or key is unknown, or a value is wrong.
    """
    path = Path(os.path.expanduser(name))
    if not path.suffix and not path.is_file():
        path = RECIPES / f"{name}.yaml"
    try:
        sections = read_yaml(path)
    except OSError:
        recipes = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise UserError(f"recipe {name} cannot be read; give a YAML file, or one of: {recipes}") from None
    if not isinstance(sections or {}, dict):
        raise UserError(f"{path} must hold sections ({', '.join(_fields(Recipe))}), not a {type(sections).__name__}")
    values = {}
    for section, keys in (sections or {}).items():
        cls = _fields(Recipe).get(known_key(section, _fields(Recipe), f"section in {path}"))
        if not isinstance(keys or {}, dict):
            raise UserError(f"{path}: section {section} must hold keys and values, not {keys!r}")
        keys = _rename(keys or {}, RENAMED.get(section, {}))
        for key in keys:
            known_key(key, _fields(cls), f"key in section {section} of {path}")
        values[section] = checked(cls, keys, f"{path}, section {section}")
    return Recipe(**values)


def _rename(keys: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """Return a section with the keys of earlier versions renamed.

    Raises:
        UserError: a key stands there under its old and under its new name.
    """
    for old, new in renamed.items():
        if keys.get(old) is not None and new in keys:
            raise UserError(f"{old} is the earlier name of {new}, and both are set; delete {old}")
    return {renamed.get(key, key): value for key, value in keys.items() if key not in renamed or value is not None}


def parse(sections: tuple[str, ...], doc: str, argv: list[str] | None = None) -> Recipe:
    """Return a script's settings: defaults <- recipe (`--config`) <- command line.

    An unknown option ends the script with exit code 2 and the name of the nearest option.

    Args:
        sections: sections of `Recipe` whose settings are options of the script. `source` means the options of section data
            about the origin of the images.
        doc: description of the script, which `--help` prints above the help texts.
        argv: words of the command line. With None, use the command line of this process.

    Raises:
        UserError: a value is wrong, or settings do not fit each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "train_vae" in sections or "train_unet" in sections:
        argv = translate_options(argv, "vae" if "train_vae" in sections else "unet")
    config = option(argv, "config")
    recipe = load_recipe(config) if config else Recipe()
    config_type = Annotated[
        str | None, tyro.conf.arg(help="Recipe: a YAML file, or the name of one in scripts/recipes.")
    ]
    members: list[Any] = [("config", config_type, field(default=None))]
    defaults = {name: _source(recipe) if name == "source" else getattr(recipe, name) for name in sections}
    members += [
        (name, type(value), field(default_factory=partial(defaults.get, name))) for name, value in defaults.items()
    ]
    chosen: Any = parse_options(dataclasses.make_dataclass("Options", members), doc, argv)
    for name, before in defaults.items():
        _put(recipe, name, getattr(chosen, name), before, argv)
    if "vae" in sections:
        check_vae(recipe, is_trained="train_vae" in sections)
    if "unet" in sections:
        check_unet(recipe)
    return recipe


def with_settings_of_model(argv: list[str]) -> list[str]:
    """Return a command line with the recipe of the run that `--model` names, unless `--config` names another."""
    model = option(argv, "model")
    run = run_of(model) if model and not option(argv, "config") else None
    return ["--config", str(run / "config.yaml"), *argv] if run else argv


def run_of(model: str) -> Path | None:
    """Return the run folder of a model: of a run folder, one of its checkpoints or its pipeline. Others have none."""
    folder = Path(model).expanduser()
    return next((path for path in (folder, folder.parent) if (path / "config.yaml").is_file()), None)


def override(recipe: Recipe, name: str, argv: list[str]) -> None:
    """Change section `name` of a recipe by options of its script, such as `--max_train_steps 20`."""
    before = getattr(recipe, name)
    members = [(name, type(before), field(default_factory=lambda: before))]
    chosen: Any = parse_options(dataclasses.make_dataclass("Options", members), f"Section {name} of the recipe.", argv)
    _put(recipe, name, getattr(chosen, name), before, argv)


# Options of Hub ids, and the options of their revisions.
REVISIONS = {
    "dataset": "dataset_revision",
    "vae": "vae_revision",
    "text_encoder": "text_encoder_revision",
    "pretrained_model_name_or_path": "revision",
}


def check_report_to(report_to: str) -> None:
    """Raise `UserError` if the package of a tracker is not installed."""
    if report_to not in ("none", "mlflow") and importlib.util.find_spec(report_to) is None:
        raise UserError(
            f"report_to {report_to} needs a package that is not installed; run: pip install {report_to}, or leave "
            "--report_to out: curves go to MLflow"
        )


def _put(recipe: Recipe, name: str, chosen: Any, before: Any, argv: list[str]) -> None:
    """Put a section that was parsed from the command line into the recipe.

    Args:
        chosen: the section with the options of the command line.
        before: the section as the recipe file gave it.
        argv: words of the command line.
    """
    section = check_options(chosen)
    typed = typed_fields(type(section), argv)
    for key, dependent in (
        ("dataset", "dataset_revision"),
        ("dataset", "dataset_config_name"),
        ("vae", "vae_revision"),
        ("text_encoder", "text_encoder_revision"),
        ("pretrained_model_name_or_path", "revision"),
        ("pretrained_model_name_or_path", "variant"),
    ):
        if key in typed and getattr(section, key) != getattr(before, key):
            _clear_dependent(section, dependent, typed)
    # These options say the same thing in two ways, so the typed one holds, also with the value that it had before.
    for key, dependent in (
        ("validation_steps", "validation_epochs"),
        ("num_train_epochs", "max_train_steps"),
        ("num_inference_steps", "preset"),
    ):
        if key in typed:
            _clear_dependent(section, dependent, typed)
    for key, revision in REVISIONS.items():
        _check_revision(section, key, revision)
    if name == "source":
        recipe.data = dataclasses.replace(recipe.data, **dataclasses.asdict(section))
    else:
        setattr(recipe, name, section)


def _check_revision(section: Any, key: str, revision: str) -> None:
    """Raise `UserError` if a revision of the Hub is given for a folder of this machine, which has none."""
    source, asked = getattr(section, key, None), getattr(section, revision, None)
    if asked and source and Path(source).expanduser().exists():
        raise UserError(
            f"--{revision} {asked} is a revision of the Hub, and --{key} {source} is a folder here; leave out --{revision}"
        )


def _clear_dependent(section: Any, dependent: str, typed: set[str]) -> None:
    """Reset a setting that depends on another one, such as a revision, unless the command line has it."""
    if hasattr(section, dependent) and dependent not in typed:
        setattr(section, dependent, None)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved settings as plain data: one dictionary per section.

    If an option took one text in older versions, a list of one text is returned as that text. Older versions can then
    read the settings of a run that uses nothing newer.
    """
    settings = dataclasses.asdict(recipe)
    for section, key in _ONCE_TEXT:
        settings[section][key] = unlisted(settings[section][key])
    return settings


def dataset_name(config: DataConfig) -> str:
    """Return the data set's name for messages and cards, without the folders above it."""
    return str(config.dataset).rstrip("/").split("/")[-1]


def _source(recipe: Recipe) -> SourceConfig:
    return SourceConfig(**{name: getattr(recipe.data, name) for name in _fields(SourceConfig)})


def _fields(cls: Any) -> dict[str, Any]:
    return {item.name: item.type for item in dataclasses.fields(cls)}


# --- Settings that must fit each other -------------------------------------------------------------------------------


def check_dataset(name: str | None) -> Path | None:
    """Return the folder that `--dataset` names, or None for a possible Hub id.

    Checking the folder imports no slow packages.

    Raises:
        UserError: no data set is named, or its name is neither an existing folder nor a Hub id.
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
    """Return the folder that a mistyped path probably means, or None without a similar folder.

    The first missing part of the path is compared with the folders beside it.
    """
    while not folder.parent.is_dir():
        folder = folder.parent
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(folder.name, beside, n=1)
    return folder.with_name(near[0]) if near else None


def check_vae(recipe: Recipe, factor: int | None = None, is_trained: bool = True) -> None:
    """Refuse a resolution or crop that the autoencoder cannot take.

    Args:
        recipe: settings to check.
        factor: image pixels per latent pixel along a side. With None, use the factor of the recipe's VAE, if the VAE is
            on this machine.
        is_trained: whether the autoencoder is trained. Then `crop_size` and `vae_train_part` are checked too.

    Raises:
        UserError: a setting does not fit; the message names a value that does.
    """
    factor, resolution, losses = factor or _vae_factor(recipe.vae), recipe.data.resolution, recipe.train_vae
    if not losses.mse_weight + losses.l1_weight + losses.ssim_weight:
        raise UserError(
            "mse_weight, l1_weight and ssim_weight are all 0, so nothing asks the autoencoder to look like the image; "
            "set mse_weight: 1"
        )
    check_vae_terms(recipe)
    if is_trained and losses.vae_train_part == "decoder" and recipe.vae.vae is None:
        raise UserError(
            "vae_train_part decoder keeps the encoder, and that of a new autoencoder has learnt nothing; give --vae with the "
            "autoencoder to fine-tune, or leave out vae_train_part (--decoder_only)"
        )
    if factor is None:
        return
    sides = {"resolution": resolution, "crop_size": losses.crop_size if is_trained else None}
    for name, side in sides.items():
        if side and (side % factor or side > resolution):
            raise UserError(
                f"{name} {side} does not fit: it must be a multiple of {factor}, the VAE's factor, and at most the "
                f"resolution; set {name} to {max(factor, min(side, resolution) // factor * factor)}"
            )


def check_vae_terms(recipe: Recipe) -> None:
    """Refuse terms of the autoencoder's training that cannot work together.

    Raises:
        UserError: a setting does not fit; the message names the key and the fix.
    """
    config, resolution = recipe.train_vae, recipe.data.resolution
    decoder_alone = config.vae_train_part == "decoder"
    judge = recipe.evaluate.judge_network if config.perceptual_weight else None
    _refuse_judge("perceptual_network", config.perceptual_network, judge)
    if config.crop_steps and not config.crop_size:
        raise UserError(f"crop_steps {config.crop_steps} needs crop_size, the side of the crops; set both, or neither")
    if decoder_alone and config.decoder_only_steps:
        raise UserError(
            f"vae_train_part decoder trains the decoder alone from the start; leave out decoder_only_steps {config.decoder_only_steps}"
        )
    if decoder_alone and config.equivariance_share:
        raise UserError(
            f"equivariance_share {config.equivariance_share} changes latents, which vae_train_part decoder keeps; leave one of them out"
        )
    side = min(config.crop_size or resolution, resolution)
    if config.adversarial_weight and side < PATCH:
        raise UserError(
            f"adversarial_weight {config.adversarial_weight} needs images or crops of at least {PATCH} px, not {side}; "
            f"set {'crop_size' if config.crop_size else 'resolution'} to {PATCH}, or adversarial_weight: 0"
        )
    if config.adversarial_weight and config.compile:
        raise UserError(
            "adversarial_weight needs the gradient of the decoder's last layer alone, which torch.compile does not give; "
            "leave out --compile, or set adversarial_weight: 0"
        )


def check_optimizer(optimizer: str, launch: Any) -> None:
    """Refuse Muon under a launch by DeepSpeed, whose ZeRO flattens the matrices that Muon needs whole.

    Args:
        optimizer: the recipe's optimiser.
        launch: content of accelerate's YAML.

    Raises:
        UserError: the two do not fit.
    """
    if optimizer == "muon" and isinstance(launch, dict) and launch.get("distributed_type") == "DEEPSPEED":
        raise UserError(
            "optimizer muon does not run under DeepSpeed; set optimizer: adamw, or take a YAML without DeepSpeed"
        )


def check_alignment(recipe: Recipe) -> None:
    """Refuse to align the denoiser with the network that judges its pictures.

    Raises:
        UserError: both are the same network.
    """
    config = recipe.train_unet
    if config.alignment_weight:
        _refuse_judge("alignment_network", config.alignment_network, recipe.evaluate.judge_network)


def _refuse_judge(key: str, network: str, judge: str | None) -> None:
    if network in (JUDGE, judge):
        raise UserError(
            f"{key} {network} is the network that judges pictures, which nothing may be trained on; "
            f"give two different networks, such as {key}: efficientnet-lite2"
        )


def check_unet(recipe: Recipe, factor: int | None = None) -> None:
    """Refuse a denoiser that cannot be built, or that cannot take the latents of the recipe's autoencoder.

    Args:
        recipe: settings to check.
        factor: number of image pixels per latent pixel along a side, as in `check_vae`.

    Raises:
        UserError: a setting does not fit; the message names a value that does.
    """
    check_alignment(recipe)
    unet = recipe.unet
    if unet.rescale_betas_zero_snr and unet.prediction_type == "epsilon":
        raise UserError(
            "rescale_betas_zero_snr with prediction_type epsilon cannot work: at the last noise level the noise is the "
            "input; set prediction_type: v_prediction"
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
            f"resolution {recipe.data.resolution} gives latents of side {recipe.data.resolution // factor}, which the UNet "
            f"cannot halve {levels - 1} times; set resolution to a multiple of {step}, such as {near}, "
            "or give fewer unet_channels"
        )


def _vae_factor(config: VaeConfig) -> int | None:
    """Return the image pixels per latent pixel of a new VAE or of a VAE in a folder.

    For a VAE on the Hub, the result is None.
    """
    if config.vae is None:
        return 2 ** (len(config.vae_channels) - 1)
    for file in (Path(config.vae) / part / "config.json" for part in ("", "vae", "pipeline/vae")):
        try:
            return 2 ** (len(json.loads(file.read_text(encoding="utf-8"))["block_out_channels"]) - 1)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # loading the VAE reports what is wrong with it
    return None
