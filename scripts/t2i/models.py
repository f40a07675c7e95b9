"""Build, load and save the models: VAE, text encoder with tokenizer, UNet, noise schedule, pipeline.

Weights are safetensors alone; no code from outside is run.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import is_offline_mode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from t2i.config import UnetConfig, VaeConfig
from t2i.errors import UserError
from t2i.files import hash_json


def best_device() -> str:
    """Name the device that pictures are made on: a CUDA GPU, else an Apple GPU ("mps"), else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def locate(source: str, part: str) -> tuple[str, str]:
    """Where a pipeline's part (`vae`, `text_encoder`, …) lies in a run folder, a pipeline folder, its own folder or on the Hub.

    Returns (path or Hub id, subfolder or ""). Raises `UserError` for a local folder that holds no such part.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        for subfolder in ("", part, f"pipeline/{part}"):
            names = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
            config = folder / subfolder / names.get(part, "config.json")
            if config.is_file():
                return str(folder / subfolder), ""
        raise UserError(
            f"{source} holds no {part} (no config.json in it, in {part}/ or in pipeline/{part}/); name its folder"
        )
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"{source} is neither a folder here nor a Hub id of the form ORG/NAME; correct the path of the {part}"
        )
    return source, part


def load_part(
    cls: Any, source: str, part: str, revision: str | None = None, variant: str | None = None, **options: Any
) -> Any:
    """Load a model or tokenizer with `cls.from_pretrained` from wherever `locate` finds it; `options` go there.

    variant: of the weight files, such as fp16; None: those without a suffix.
    """
    path, subfolder = locate(source, part)
    if part not in ("tokenizer", "scheduler"):
        options |= {"use_safetensors": True, "variant": variant}
    if os.path.isdir(path):
        attempts: tuple[str, ...] = ("",)
    else:
        attempts = ("", subfolder)  # a Hub repository of that model alone, or of a pipeline
        options["revision"] = revision
    causes: list[Exception] = []
    why = None  # the Hub's reason, which the folder's own message would hide
    for attempt in attempts:
        try:
            model = cls.from_pretrained(path, subfolder=attempt, **options)
            if part == "tokenizer" and len(model) <= len(set(model.all_special_ids)):
                # transformers makes one of its special tokens alone where it gets no vocabulary
                if not os.path.isdir(path):
                    cached = bool(options.get("local_files_only")) or is_offline_mode()
                    hf_hub_download(  # which says why nothing came
                        path,
                        "tokenizer_config.json",
                        subfolder=attempt or None,
                        revision=revision,
                        local_files_only=cached,
                    )
                raise OSError("it holds no vocabulary: no tokenizer.json, nor vocab.json and merges.txt")
            if os.path.isdir(path) and hasattr(model, "register_to_config"):
                model.register_to_config(_name_or_path="")  # a folder of this machine is nothing to publish
            return model
        except (OSError, ValueError, RuntimeError) as error:
            causes.append(error)
        if not os.path.isdir(path):
            from t2i.loading import explain_loading

            why = why or explain_loading(causes[-1], source, revision)
            if why and not is_offline_mode():  # offline the cache may hold the pipeline alone
                break
    if why:
        raise UserError(f"the {part} cannot be loaded: {why}")
    reason = " ".join(str(causes[0]).split())[:300]
    raise UserError(
        f"the {part} {source} cannot be loaded ({reason}); give a folder or Hub id with safetensors weights"
    )


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """A new `AutoencoderKL` of the recipe's size; each level after the first halves the side."""
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.vae_channels),
        layers_per_block=config.vae_layers,
        latent_channels=config.latent_channels,
        norm_num_groups=_norm_groups(config.vae_channels, 16),  # smaller groups wash the colors out
        mid_block_add_attention=False,  # a convolutional VAE can learn on crops
        scaling_factor=1.0,
    )
    with torch.no_grad():  # start with a narrow posterior: at deviation 1 its noise drowns what the encoder says
        vae.quant_conv.weight[config.latent_channels :] = 0.0
        vae.quant_conv.bias[config.latent_channels :] = -7.0
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):  # start as the shortcut alone (Goyal et al., arXiv:1706.02677, 5.1)
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
    return vae


def _norm_groups(channels: list[int], least: int) -> int:
    """Groups of GroupNorm: the most, up to 32, that divide all levels' channels and hold at least `least` of them each."""
    return max(
        groups
        for groups in (1, 2, 4, 8, 16, 32)
        if groups == 1 or (min(channels) // groups >= least and not any(n % groups for n in channels))
    )


def load_vae(source: str, revision: str | None = None, variant: str | None = None) -> AutoencoderKL:
    """The VAE of a run folder, path or Hub id, in evaluation mode."""
    return load_part(AutoencoderKL, source, "vae", revision, variant).float().eval()


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
    vocab, merges = learn_bpe(captions)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=config.text_max_length)
    text_encoder = _random_text_encoder(config, len(vocab), tokenizer, seed)
    _standardise(text_encoder, tokenizer, captions)
    return text_encoder, tokenizer


def learn_bpe(captions: Iterable[str], limit: int = 2000) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE (Sennrich et al., arXiv:1508.07909) for `CLIPTokenizer`.

    The most frequent pair is merged first, ties by the alphabet, until words of the captions are whole or `limit` merges
    are made. The trainer of `tokenizers` breaks ties anew in each process, which would change the model's identity.
    """
    alphabet = bytes_to_unicode()
    words = Counter(word for caption in captions for word in re.findall(r"[^\W\d_]+|\d|[^\s\w]+", caption.lower()))
    pieces = {}
    for word in words:
        letters = [alphabet[byte] for byte in word.encode("utf-8")]
        pieces[word] = [*letters[:-1], letters[-1] + "</w>"]
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            if len(parts) > 1:
                pieces[word] = _merge(parts, best)
    symbols = sorted(alphabet.values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *dict.fromkeys(a + b for a, b in merges)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _random_text_encoder(config: UnetConfig, vocab_size: int, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    width = config.text_hidden_size
    heads = max(number for number in range(1, max(1, width // 32) + 1) if width % number == 0)  # CLIP wants a divisor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=config.text_hidden_size,
                intermediate_size=4 * config.text_hidden_size,
                num_hidden_layers=config.text_layers,
                num_attention_heads=heads,
                max_position_embeddings=config.text_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # CLIP's small start, meant for training, would let the layers' random mixtures drown the words: make these the
        # larger part of what comes out (nine tenths of the variance, instead of a third)
        text_encoder.get_input_embeddings().weight.data.normal_(0.0, 1.0)
        positions = next(part for name, part in text_encoder.named_modules() if name.endswith("position_embedding"))
        positions.weight.data.normal_(0.0, 0.3)
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


def build_unet(
    config: UnetConfig, sample_size: int, latent_channels: int, cross_attention_dim: int
) -> UNet2DConditionModel:
    """A new UNet of the recipe's size for latents [latent_channels, sample_size, sample_size], which `config.check_unet` passed."""
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
        norm_num_groups=_norm_groups(config.unet_channels, 6),
    )


def use_plain_attention(unet: UNet2DConditionModel) -> None:
    """Attention by matrix products, for a training in bf16 on a CPU: there the gradient of PyTorch's fused attention takes three
    times as long. It keeps all attention weights, so that latents above 32 x 32 stay with the fused one.
    """
    if unet.config.sample_size <= 32:
        unet.set_attn_processor(AttnProcessor())


def build_noise_scheduler(config: UnetConfig) -> DDPMScheduler:
    """The DDPM noise schedule of training: 1,000 levels, Stable Diffusion's range of betas, or the base pipeline's.

    Raises `UserError` where the base pipeline was trained with what the recipe denies.
    """
    betas = _base_betas(config) if config.pretrained_model_name_or_path else {}
    return DDPMScheduler(
        num_train_timesteps=1000,
        **{"beta_start": 0.00085, "beta_end": 0.012, **betas},
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing",  # inference starts at the last noise level (arXiv:2305.08891)
        clip_sample=False,
        steps_offset=1,  # as Stable Diffusion; not used with trailing spacing
    )


def _base_betas(config: UnetConfig) -> dict[str, Any]:
    """The range of betas that the base pipeline's UNet was trained with: `beta_start`, `beta_end`, `trained_betas`."""
    base = str(config.pretrained_model_name_or_path)
    trained = load_part(DDPMScheduler, base, "scheduler", config.revision).config
    for name in ("prediction_type", "beta_schedule", "rescale_betas_zero_snr"):
        if trained.get(name, False) != getattr(config, name):
            raise UserError(
                f"the UNet of {base} was trained with {name} {trained.get(name)}; set {name}: {trained.get(name)} in section unet"
            )
    if trained["num_train_timesteps"] != 1000:
        raise UserError(
            f"the UNet of {base} was trained on {trained['num_train_timesteps']} noise levels, and this suite trains on 1,000; "
            "take another pipeline"
        )
    return {name: trained[name] for name in ("beta_start", "beta_end", "trained_betas")}


def build_ddim(scheduler: DDPMScheduler) -> DDIMScheduler:
    """The DDIM schedule that belongs to the training's."""
    return DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False)


def build_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: Any,
) -> StableDiffusionPipeline:
    """The stock pipeline of these parts."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
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
