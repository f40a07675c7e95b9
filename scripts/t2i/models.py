"""Build and load the models: VAE, text encoder with tokenizer, UNet, noise schedule and pipeline.

Weights are safetensors only, and no code from outside is run.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import is_offline_mode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from t2i.config import UnetConfig, VaeConfig
from t2i.errors import UserError
from t2i.files import hash_json, read_optional


def best_device() -> str:
    """Return the best available device: a CUDA GPU, otherwise an Apple GPU ("mps"), otherwise the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def locate(source: str, part: str) -> tuple[str, str]:
    """Find a pipeline's part (`vae`, `text_encoder`, …) in a run folder, a pipeline folder, its own folder or on the Hub.

    Returns:
        The place of the part: its path or Hub id, and its subfolder or "".

    Raises:
        UserError: the local folder does not hold the pipeline's part, or `source` is neither a folder nor a Hub id.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        for subfolder in ("", part, f"pipeline/{part}"):
            names = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
            config = folder / subfolder / names.get(part, "config.json")
            if config.is_file():
                return str(folder / subfolder), ""
        raise UserError(
            f"{source} holds no {part} (no config.json in it, in {part}/ or in pipeline/{part}/); give the folder that holds the part"
        )
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"{source} is neither a folder here nor a Hub id of the form ORG/NAME; correct the path of the {part}"
        )
    return source, part


def load_part(
    cls: Any, source: str, part: str, revision: str | None = None, variant: str | None = None, **options: Any
) -> Any:
    """Load a model or tokenizer from the place that `locate` finds.

    Args:
        variant: variant of the weight files, such as fp16. With None, load weight files without a variant's suffix.
        options: further arguments of `cls.from_pretrained`.

    Raises:
        UserError: the model is missing, damaged or cannot be downloaded.
    """
    path, subfolder = locate(source, part)
    if part not in ("tokenizer", "scheduler"):
        options |= {"use_safetensors": True, "variant": variant}
    if os.path.isdir(path):
        attempts: tuple[str, ...] = ("",)
    else:
        attempts = ("", subfolder)  # A Hub repository holds either only this model or a pipeline.
        options["revision"] = revision
    causes: list[Exception] = []
    why = None  # This is the Hub's reason, which the message about the folder would hide.
    for attempt in attempts:
        try:
            model = cls.from_pretrained(path, subfolder=attempt, **options)
            if part == "tokenizer" and len(model) <= len(set(model.all_special_ids)):
                # If transformers gets no vocabulary, it makes a tokenizer of special tokens only.
                if not os.path.isdir(path):
                    cached = bool(options.get("local_files_only")) or is_offline_mode()
                    hf_hub_download(  # This call says why nothing was downloaded.
                        path,
                        "tokenizer_config.json",
                        subfolder=attempt or None,
                        revision=revision,
                        local_files_only=cached,
                    )
                raise OSError("it holds no vocabulary: no tokenizer.json, nor vocab.json and merges.txt")
            if isinstance(model, torch.nn.Module) and any(weight.is_meta for weight in model.parameters()):
                raise OSError(f"its weights are not those of {cls.__name__}")
            if os.path.isdir(path) and hasattr(model, "register_to_config"):
                model.register_to_config(_name_or_path="")  # A local path must not be published.
            return model
        except TypeError as error:  # Another class may have a setting of the same name and another type.
            causes.append(OSError(f"its settings are not those of {cls.__name__}: {error}"))
        except (OSError, ValueError, RuntimeError) as error:
            causes.append(error)
        if not os.path.isdir(path):
            from t2i.loading import explain_loading

            why = why or explain_loading(causes[-1], source, revision)
            if why and not is_offline_mode():  # Offline, the cache may hold only the pipeline.
                break
    if why:
        raise UserError(f"the {part} cannot be loaded: {why}")
    reason = " ".join(str(causes[0]).split())[:300]
    raise UserError(
        f"the {part} {source} cannot be loaded ({reason}); give a folder or Hub id with safetensors weights"
    )


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """Return a new `AutoencoderKL` of the recipe's size.

    Each level of the VAE after the first halves the side of its input.
    """
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.vae_channels),
        layers_per_block=config.vae_layers,
        latent_channels=config.latent_channels,
        norm_num_groups=_norm_groups(config.vae_channels, 16),  # Smaller groups wash the colors out.
        mid_block_add_attention=False,  # A purely convolutional VAE can learn on crops.
        scaling_factor=1.0,
    )
    with torch.no_grad():  # The posterior starts narrow. At deviation 1 its noise would drown the encoder's output.
        vae.quant_conv.weight[config.latent_channels :] = 0.0
        vae.quant_conv.bias[config.latent_channels :] = -7.0
        for module in vae.modules():
            # Each block starts as its shortcut only (Goyal et al., arXiv:1706.02677, section 5.1).
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
    return vae


def _norm_groups(channels: list[int], least: int) -> int:
    """Return the largest number of GroupNorm groups, up to 32, that divides the channels of all levels.

    Each group of channels holds at least `least` channels, unless there is only one group.
    """
    return max(
        groups
        for groups in (1, 2, 4, 8, 16, 32)
        if groups == 1 or (min(channels) // groups >= least and not any(n % groups for n in channels))
    )


def load_vae(source: str, revision: str | None = None, variant: str | None = None) -> AutoencoderKL:
    """Load the VAE of a run folder, path or Hub id in float32 and evaluation mode.

    Raises:
        UserError: it cannot be loaded, is a tiny autoencoder, or is not one of color images.
    """
    if is_tiny(source):
        raise UserError(
            f"{source} holds a tiny autoencoder, which only decodes for a student; give the VAE of its teacher"
        )
    vae = load_part(AutoencoderKL, source, "vae", revision, variant).float().eval()
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels != (3, 3):
        raise UserError(
            f"the VAE {source} reads images of {channels[0]} channels and writes {channels[1]}; give one of color images, with 3 and 3"
        )
    return vae


def load_decoder(source: str) -> AutoencoderKL | AutoencoderTiny:
    """Load the autoencoder of a run's pipeline in float32 and evaluation mode. A student may have a tiny one."""
    return load_part(AutoencoderTiny if is_tiny(source) else AutoencoderKL, source, "vae").float().eval()


def is_tiny(source: str) -> bool:
    """Return whether the autoencoder in a local folder is a tiny one. Those of the Hub are not read."""
    path, _ = locate(source, "vae")
    return read_optional(Path(path) / "config.json").get("_class_name") == "AutoencoderTiny"


def fold_normalisation(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Change the 1x1 convolutions so that raw latents have exactly mean 0 and deviation 1 per channel.

    After the change, encoding gives (z - mean) / std, and decoding undoes this scaling. The change does not alter
    reconstructions. Stock pipelines read no shift of the latents from the config, so the VAE's weights must contain the
    shift.

    Args:
        mean: mean of the raw latents per channel, [C].
        std: standard deviation of the raw latents per channel, [C].
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = mean.numel()
    with torch.no_grad():
        quant.weight[:channels] /= std.view(-1, 1, 1, 1)
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()  # This is the log-variance of z / std.
        post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
        post.weight *= std.view(1, -1, 1, 1)


def build_text_encoder(config: UnetConfig, captions: list[str], seed: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Return a small, frozen CLIP text encoder with random weights, and a tokenizer learnt from the captions.

    Random features of words suffice for a text encoder if the captions come from one domain. The last LayerNorm
    standardises the text encoder's output over the captions. Without this LayerNorm, the common part of all captions
    would hide their differences.
    """
    vocab, merges = learn_bpe(captions)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=config.text_max_length)
    text_encoder = _random_text_encoder(config, len(vocab), tokenizer, seed)
    _standardise(text_encoder, tokenizer, captions)
    return text_encoder, tokenizer


def learn_bpe(captions: Iterable[str], limit: int = 2000) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a byte-level BPE (Sennrich et al., arXiv:1508.07909) for `CLIPTokenizer`.

    The most frequent pair of tokens is merged first, and the alphabet breaks ties. Merging of pairs ends when all words
    are whole or `limit` merges are made. The trainer of `tokenizers` breaks ties differently in each process, which
    would change the model's identity.
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


def _heads(width: int) -> int:
    """Return a number of attention heads that divides `width`, of at least 32 channels each if there are several."""
    return max(number for number in range(1, max(1, width // 32) + 1) if width % number == 0)


def _random_text_encoder(config: UnetConfig, vocab_size: int, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=config.text_hidden_size,
                intermediate_size=4 * config.text_hidden_size,
                num_hidden_layers=config.text_layers,
                num_attention_heads=_heads(config.text_hidden_size),
                max_position_embeddings=config.text_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # CLIP's small initial weights are meant for training. Without it, the layers' random mixtures would drown the words.
        # With these weights the words make up nine tenths of the output's variance instead of a third.
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
    """Return hidden states [B, L, D] of captions, as the stock pipeline computes them.

    Captions are padded or cut to the tokenizer's length.
    """
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


def build_unet(
    config: UnetConfig, sample_size: int, latent_channels: int, cross_attention_dim: int
) -> UNet2DConditionModel:
    """Return a new UNet of the recipe's size for latents [latent_channels, sample_size, sample_size].

    `config.check_unet` must have accepted the recipe.
    """
    pooling = {}
    if config.addition_embed_type:  # The pooling's heads must divide the width of the hidden states.
        pooling["addition_embed_type_num_heads"] = _heads(cross_attention_dim)
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
        addition_embed_type=config.addition_embed_type,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        **pooling,
    )


def use_plain_attention(unet: UNet2DConditionModel) -> None:
    """Compute attention by matrix products, for training in bf16 on a CPU.

    On a CPU, the bf16 gradient of PyTorch's fused attention takes three times as long as that of matrix products. Plain
    attention keeps all attention weights in memory, so latents above 32 x 32 continue to use fused attention.
    """
    if unet.config.sample_size <= 32:
        unet.set_attn_processor(AttnProcessor())


def build_noise_scheduler(config: UnetConfig) -> DDPMScheduler:
    """Return the DDPM noise schedule of training, with 1,000 levels.

    The range of betas is that of the base pipeline, or if there is no base pipeline, that of Stable Diffusion.

    Raises:
        UserError: the base pipeline was trained with another noise schedule or prediction type than the recipe's.
    """
    betas = _base_betas(config) if config.pretrained_model_name_or_path else {}
    return DDPMScheduler(
        num_train_timesteps=1000,
        **{"beta_start": 0.00085, "beta_end": 0.012, **betas},
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing",  # Inference starts at the last noise level (arXiv:2305.08891).
        clip_sample=False,
        steps_offset=1,  # Stable Diffusion uses this value. Trailing spacing ignores it.
    )


def _base_betas(config: UnetConfig) -> dict[str, Any]:
    """Return the betas of the base pipeline's training: `beta_start`, `beta_end` and `trained_betas`."""
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
    """Return the DDIM schedule that matches the training's schedule."""
    return DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False)


def build_pipeline(
    vae: AutoencoderKL | AutoencoderTiny,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: Any,
) -> StableDiffusionPipeline:
    """Return the stock pipeline made of the given models, tokenizer and scheduler."""
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


def hash_model(model: Any, without: tuple[str, ...] = ()) -> str:
    """Return a model's identity: a hash (16 hex digits) of its architecture and of its weights' names, types and bytes.

    Notes that libraries write into the config, such as a version or the model's origin, are ignored.

    Args:
        without: beginnings of the names of weights that are ignored too.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    passing = {"transformers_version", "dtype", "torch_dtype", "architectures"}
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in passing}
    digest.update(hash_json(json.loads(json.dumps(kept, default=str))).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(without):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_encoder(vae: AutoencoderKL) -> str:
    """Return the identity of the part of a VAE that latents depend on, as `hash_model` does: all but the decoder's weights."""
    return hash_model(vae, without=("decoder.", "post_quant_conv."))


def hash_tokenizer(tokenizer: CLIPTokenizer) -> str:
    """Return a tokenizer's identity: a hash of its vocabulary, merges and length."""
    return hash_json([tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length])


class Autoencoder(torch.nn.Module):
    """The VAE as one module for training."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(
        self,
        pixels: torch.Tensor,
        noise: torch.Tensor,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        decoder_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (reconstruction, mean, log-variance).

        Args:
            pixels: images, [B, 3, S, S].
            noise: posterior noise, [B, C, h, w].
            transform: changes the latents before they are decoded.
            decoder_only: keep no graph of the encoder, so that it gets no gradient.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decoder_only):
            posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        if transform is not None:
            latents = transform(latents)
        reconstruction = self.vae.decode(latents).sample
        if decoder_only:  # Data parallelism waits for a gradient of each trained weight, if only for zeros.
            trained = [weight for weight in encoder_parameters(self.vae) if weight.requires_grad]
            reconstruction = reconstruction + 0.0 * sum(weight.sum() for weight in trained)
        return reconstruction, posterior.mean, posterior.logvar


def encoder_parameters(vae: AutoencoderKL) -> list[torch.nn.Parameter]:
    """Return the weights that latents depend on."""
    parts = [vae.encoder, *([vae.quant_conv] if vae.quant_conv is not None else [])]
    return [weight for part in parts for weight in part.parameters()]


def vae_factor(vae: AutoencoderKL) -> int:
    """Return the VAE's number of pixels per latent along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
