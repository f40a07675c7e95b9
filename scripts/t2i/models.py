"""Build, load and save the models: VAE, text encoder with tokenizer, UNet, noise schedule, pipeline.

Weights are safetensors alone; no code from outside is run.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2i.config import UnetConfig, VaeConfig
from t2i.runs import UserError, hash_json


def locate(source: str, part: str) -> tuple[str, str]:
    """Where a pipeline's part (`vae`, `text_encoder`, …) lies in a run folder, a pipeline folder, its own folder or on the Hub.

    Returns (path or Hub id, subfolder or ""). Raises `UserError` for a local folder that holds no such part.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        for subfolder in ("", part, f"pipeline/{part}"):
            config = folder / subfolder / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
            if config.is_file():
                return str(folder / subfolder), ""
        raise UserError(f"{source} holds no {part} (no config.json in it, in {part}/ or in pipeline/{part}/); name its folder")
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(f"{source} is neither a folder here nor a Hub id of the form ORG/NAME; correct the path of the {part}")
    return source, part


def load_part(cls: Any, source: str, part: str, revision: str | None = None) -> Any:
    """Load a model or tokenizer with `cls.from_pretrained` from wherever `locate` finds it."""
    path, subfolder = locate(source, part)
    options: dict[str, Any] = {} if cls is CLIPTokenizer else {"use_safetensors": True}
    if os.path.isdir(path):
        attempts: tuple[str, ...] = ("",)
    else:
        attempts = ("", subfolder)  # a Hub repository of that model alone, or of a pipeline
        options["revision"] = revision
    cause: Exception | None = None
    for attempt in attempts:
        try:
            return cls.from_pretrained(path, subfolder=attempt, **options)
        except (OSError, ValueError, RuntimeError) as error:
            cause = cause or error
    reason = " ".join(str(cause).split())[:300]
    raise UserError(f"the {part} {source} cannot be loaded ({reason}); give a folder or Hub id with safetensors weights")


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """A new `AutoencoderKL` of the recipe's size; each level after the first halves the side."""
    levels = len(config.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.vae_channels),
        layers_per_block=config.vae_layers,
        latent_channels=config.latent_channels,
        norm_num_groups=math.gcd(32, *config.vae_channels),
        mid_block_add_attention=False,  # a convolutional VAE can learn on crops
        scaling_factor=1.0,
    )


def load_vae(source: str, revision: str | None = None) -> AutoencoderKL:
    """The VAE of a run folder, path or Hub id, in evaluation mode."""
    return load_part(AutoencoderKL, source, "vae", revision).eval()


def fold_normalisation(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make raw latents of mean 0 and deviation 1 a channel, exactly, by the biases and weights of the 1x1 convolutions.

    mean, std: [C], measured on raw latents. What `vae` decodes from its own latents does not change:
    encode gives (z - mean) / std, decode undoes it. Stock pipelines read no shift, so it has to live here.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = mean.numel()
    with torch.no_grad():
        quant.weight[:channels] /= std.view(-1, 1, 1, 1)
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()  # log-variance of z / std
        post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
        post.weight *= std.view(1, -1, 1, 1)


def build_text_encoder(config: UnetConfig, captions: list[str], seed: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A small frozen random CLIP text encoder with a tokenizer learnt from the captions.

    Random features of the words suffice where captions come from one domain. Its output is standardised over the given
    captions by its last LayerNorm, so that what captions have in common does not drown what they differ in.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = dict(learnt["vocab"])
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(symbol + "</w>", len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=config.text_max_length
    )
    text_encoder = _random_text_encoder(config, len(vocab), tokenizer, seed)
    _standardise(text_encoder, tokenizer, captions)
    return text_encoder, tokenizer


def _random_text_encoder(config: UnetConfig, vocab_size: int, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=config.text_hidden_size,
                intermediate_size=4 * config.text_hidden_size,
                num_hidden_layers=config.text_layers,
                num_attention_heads=max(1, config.text_hidden_size // 32),
                max_position_embeddings=config.text_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return text_encoder.eval().requires_grad_(False)


@torch.no_grad()
def _standardise(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> None:
    hidden = encode_captions(text_encoder, tokenizer, sorted(set(captions))[:512])
    mean, std = hidden.mean(dim=(0, 1)), hidden.std(dim=(0, 1)).clamp(min=1e-4)
    norm = next(module for name, module in text_encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.weight.div_(std)
    norm.bias.sub_(mean).div_(std)


@torch.no_grad()
def encode_captions(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Hidden states [B, L, D] of captions, as the stock pipeline computes them (padded and cut to the tokenizer's length)."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


def build_unet(config: UnetConfig, sample_size: int, latent_channels: int, cross_attention_dim: int) -> UNet2DConditionModel:
    """A new UNet of the recipe's size for latents [latent_channels, sample_size, sample_size]."""
    levels = len(config.unet_channels)
    if len(config.down_block_types) != levels:
        raise UserError(
            f"down_block_types names {len(config.down_block_types)} levels and unet_channels {levels}; give one type a level"
        )
    if sample_size % 2 ** (levels - 1):
        raise UserError(
            f"latents of side {sample_size} cannot be halved {levels - 1} times; use fewer unet_channels or another resolution"
        )
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(config.unet_channels),
        layers_per_block=config.unet_layers,
        down_block_types=tuple(config.down_block_types),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(config.down_block_types)),
        attention_head_dim=config.attention_head_dim,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=math.gcd(32, *config.unet_channels),
    )


def build_noise_scheduler(config: UnetConfig) -> DDPMScheduler:
    """The DDPM noise schedule of training: 1,000 levels, Stable Diffusion's range of betas."""
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise UserError(
            "rescale_betas_zero_snr with prediction_type epsilon cannot work: at the last noise level the noise is the input; "
            "set prediction_type: v_prediction"
        )
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing",  # inference starts at the last noise level (arXiv:2305.08891)
        clip_sample=False,
        steps_offset=1,  # as Stable Diffusion; not used with trailing spacing
    )


def build_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel, scheduler: Any
) -> StableDiffusionPipeline:
    """The stock pipeline, with the DDIM schedule that belongs to the training's."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hash_model(model: Any) -> str:
    """Identity of a model: hash of its weights' names, types and bytes and of its architecture (16 hex digits).

    Notes of a library in the config (its version, where a model was loaded from) do not count.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    passing = {"transformers_version", "dtype", "torch_dtype", "architectures"}
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in passing}
    digest.update(hash_json(json.loads(json.dumps(kept, default=str))).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_tokenizer(tokenizer: CLIPTokenizer) -> str:
    """Identity of a tokenizer: hash of its vocabulary, merges and length."""
    return hash_json([tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length])


class Autoencoder(torch.nn.Module):
    """The VAE as one module for training: pixels [B, 3, R, R] and noise [B, C, h, w] -> (reconstruction, mean, log-variance)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels a side for each latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
