"""Translate options of diffusers' training scripts into options of this suite, or name a replacement. This module imports no torch."""

from typing import Literal

from t2i.command_line import note, plain_option, typed_options
from t2i.errors import UserError

# Options of diffusers' train_text_to_image.py and train_autoencoderkl.py that no script here has -> what to do here.
# True: the result is the same without the option, so it is left out with a note.
# False: the result would differ, so the option is refused.
# A test compares docs/from_diffusers.md with this table.
THEIR_OPTIONS: dict[str, tuple[bool, str]] = {
    "center_crop": (True, "images are cropped at the centre, unless --random_crops adds crops"),
    "enable_xformers_memory_efficient_attention": (True, "PyTorch's own memory-efficient attention is in use"),
    "dataloader_num_workers": (True, "batches are read from a cache, without workers"),
    "foreach_ema": (True, "the moving average is always updated by foreach kernels"),
    "offload_ema": (True, "the moving average stays on the device; --no_use_ema saves its memory"),
    "set_grads_to_none": (True, "gradients are always set to None"),
    "local_rank": (True, "the launcher sets it"),
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
    "perceptual_scale": (
        False,
        "there is no LPIPS term; give --perceptual_weight, which compares features of another network",
    ),
    "disc_start": (False, "give --adversarial_weight and --adversarial_start, which counts updates"),
    "disc_factor": (False, "give --adversarial_weight, which is relative to the other terms"),
    "disc_scale": (False, "give --adversarial_weight, which is relative to the other terms"),
    "disc_loss": (False, "the discriminator of --adversarial_weight has the hinge loss; leave it out"),
    "disc_learning_rate": (False, "give --discriminator_learning_rate"),
    "disc_lr_scheduler": (
        False,
        "the discriminator of --adversarial_weight has a constant learning rate; leave it out",
    ),
}
# Options of train_autoencoderkl.py -> ours; {} stands for the value.
_VAE_OPTIONS = {
    "pretrained_model_name_or_path": "--vae {}",
    "revision": "--vae_revision {}",
    "decoder_only": "--vae_train_part decoder",
    "rec_loss l1": "--l1_weight 1 --mse_weight 0",
    "rec_loss l2": "--l1_weight 0 --mse_weight 1",
}


def translate_options(argv: list[str], model: Literal["vae", "unet"]) -> list[str]:
    """Translate a command line of diffusers' training scripts into the options of this suite.

    Messages about options never show the values of options, because a value may be a secret token.

    Args:
        argv: words of the command line.
        model: kind of model that the script trains.

    Raises:
        UserError: this suite lacks an option that would change the result. The message says what to use instead of that
            option.
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
