"""Random models in the layout of the real ones, so that the code that loads real models can be run anywhere."""

from pathlib import Path
from typing import Any

# (vision: depths, widths, heads; language: width, layers, heads, positions) as the Hub's config.json of the real ones say;
# large has as many parameters as its published weights: 776.8 M
SIZES: dict[str, Any] = {
    "tiny": {"depths": (1, 1, 1, 1), "widths": (8, 16, 16, 32), "heads": (1, 2, 2, 2), "window": 4, "width": 32, "layers": 1,
             "text_heads": 2, "positions": 1024, "side": 64},
    "base": {"depths": (1, 1, 9, 1), "widths": (128, 256, 512, 1024), "heads": (4, 8, 16, 32), "window": 12, "width": 768,
             "layers": 6, "text_heads": 12, "positions": 1024, "side": 768},
    "large": {"depths": (1, 1, 9, 1), "widths": (256, 512, 1024, 2048), "heads": (8, 16, 32, 64), "window": 12, "width": 1024,
              "layers": 12, "text_heads": 16, "positions": 4096, "side": 768},
}  # fmt: skip
VOCABULARY = 51290  # of base and large


def florence(folder: Path, size: str = "tiny") -> Path:
    """A Florence-2 with random weights and its processor in `folder`, as `florence-community/Florence-2-*` holds them.

    It never ends a caption by itself: each has as many tokens as asked for.
    """
    import torch
    from transformers import (
        BartConfig,
        BartTokenizer,
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        Florence2VisionConfig,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(0)
    known = SIZES[size]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: number for number, token in enumerate([*special, *bytes_to_unicode().values()])}
    tokenizer = BartTokenizer(vocab=vocab, merges=[], extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_tokens([f"<loc_{number}>" for number in range(8)])
    side, width, heads = known["side"], known["width"], known["text_heads"]
    seen = (side // 32) ** 2 + 1  # tokens of an image: its patches and their mean
    images = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, resample=3)
    images.image_seq_length = seen
    text = BartConfig(
        vocab_size=len(tokenizer) if size == "tiny" else VOCABULARY, d_model=width, encoder_layers=known["layers"],
        decoder_layers=known["layers"], encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, max_position_embeddings=known["positions"], bos_token_id=0,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_bos_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    vision = Florence2VisionConfig(
        depths=known["depths"], embed_dim=known["widths"], num_heads=known["heads"], num_groups=known["heads"],
        window_size=known["window"], projection_dim=width, drop_path_rate=0.0,
    )  # fmt: skip
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=tokenizer.image_token_id
    )
    model = Florence2ForConditionalGeneration(config)
    silent = [*range(len(special)), *range(len(vocab), config.text_config.vocab_size)]
    model.generation_config.update(
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, suppress_tokens=silent
    )
    model.save_pretrained(folder)
    kinds = ("ocr", "phrase_grounding", "pure_text", "description_with_bboxes", "description_with_polygons", "polygons",
             "bboxes", "description_with_bboxes_or_polygons")  # fmt: skip
    rules: dict[str, Any] = {kind: {} for kind in kinds}
    Florence2Processor(image_processor=images, tokenizer=tokenizer, post_processor_config=rules).save_pretrained(folder)
    return folder


def untrained_run(folder: Path, recipe: Any) -> Path:
    """A finished run of train_unet.py in `folder`, whose models have the sizes of `recipe` and random weights."""
    from t2i import models
    from t2i.config import to_dict
    from t2i.files import write_json
    from t2i.redaction import public_yaml

    vae = models.build_vae(recipe.vae)
    encoder, tokenizer = models.build_text_encoder(recipe.unet, ["a red flower", "a blue flower with five petals"], 0)
    side, channels = recipe.data.resolution // models.vae_factor(vae), vae.config.latent_channels
    unet = models.build_unet(recipe.unet, side, channels, encoder.config.hidden_size)
    scheduler = models.build_ddim(models.build_noise_scheduler(recipe.unet))
    models.build_pipeline(vae, encoder, tokenizer, unet, scheduler).save_pretrained(folder / "pipeline")
    (folder / "config.yaml").write_text(public_yaml(to_dict(recipe)))
    write_json(folder / "run.json", {"status": "finished", "steps": 8, "output_unet_hash": models.hash_model(unet)})
    return folder


def blip(folder: Path) -> Path:
    """A small BLIP with random weights: an image-to-text model of another kind."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "flower", "in", "the", "grass"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, bos_token="[DEC]")
    text = {"vocab_size": len(words), "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 5,
            "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}  # fmt: skip
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=32))
    model.generation_config.update(bos_token_id=5, eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
