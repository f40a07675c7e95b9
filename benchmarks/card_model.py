"""Build a pipeline of the model card's sizes with random weights: CLIP ViT-L/14, Stable Diffusion's VAE, a UNet of 148 M."""

from pathlib import Path

import common  # noqa: F401 - puts scripts/ on the path


def save_card_model(folder: Path, seed: int = 0, tiny: bool = False) -> Path:
    """Save the model of the card's sizes for stock diffusers unless the folder exists: about 1.4 GB.

    With `tiny`, a model of the same layout takes 3 MB.
    """
    if (folder / "model_index.json").is_file():
        return folder
    import torch
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from t2i import config
    from t2i.models import build_ddim, build_noise_scheduler, build_pipeline, build_unet

    torch.manual_seed(seed)
    recipe = config.load_recipe("flowers").unet
    width, layers, heads, vae_channels = 768, 12, 12, (128, 256, 512, 512)
    if tiny:
        width, layers, heads, vae_channels = 32, 1, 2, (32, 32, 32, 32)
        recipe.unet_channels, recipe.unet_layers, recipe.attention_head_dim = [32, 32, 64], 1, 2
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    words = [
        "a photo of a flower, a type of flower, red pink white yellow petals with a golden center under a clear sky"
    ]
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe.train_from_iterator(
        words * 9, trainers.BpeTrainer(special_tokens=special, end_of_word_suffix="</w>", vocab_size=600)
    )
    saved = bpe.model.save(str(_made(folder / "bpe")))
    tokenizer = CLIPTokenizer(vocab=saved[0], merges=saved[1], model_max_length=77)
    text = CLIPTextModel(  # openai/clip-vit-large-patch14, but for its vocabulary, of which each caption reads 77 rows
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=77, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(  # stabilityai/sd-vae-ft-mse
        block_out_channels=vae_channels, layers_per_block=1 if tiny else 2, latent_channels=4, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = build_unet(recipe, 16, 4, width)
    pipeline = build_pipeline(vae, text, tokenizer, unet, build_ddim(build_noise_scheduler(recipe)))
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_card_student(folder: Path, teacher: Path) -> Path:
    """Save a student of the card's model with a tiny decoder, as distill_unet.py does, unless the folder exists.

    Args:
        teacher: folder that `save_card_model` has written.
    """
    if (folder / "model_index.json").is_file():
        return folder
    from t2i.pictures import sampling
    from t2i.training.tiny_decoder import build_tiny

    pipeline = sampling.load_pipeline(teacher)
    pipeline.register_modules(vae=build_tiny(pipeline.vae, 0))
    pipeline.scheduler = sampling.student_scheduler(pipeline.scheduler.config, 4)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
