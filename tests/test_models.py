"""Models built from a recipe: latents, tokenizer, refusals."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLMochi, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SCRIPTS
from t2i import models
from t2i.config import UnetConfig, VaeConfig
from t2i.errors import UserError

CAPTIONS = ["a red flower with five petals, at night", "two blue flowers in a meadow", "ein weißes Veilchen!"]


def test_folding_normalises_latents_and_leaves_reconstructions():
    torch.manual_seed(0)
    vae = models.build_vae(VaeConfig(vae_channels=[16, 16], latent_channels=3)).eval()
    for parameter in vae.parameters():  # a new VAE's zeros would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 2.0, 3.0])
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        picture = vae.decode(before.mean).sample
        models.fold_normalisation(vae, mean, std)
        after = vae.encode(pixels).latent_dist
        torch.testing.assert_close(
            after.mean, (before.mean - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(after.std, before.std / std.view(-1, 1, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_the_same_in_every_process(command, tmp_path):
    code = f"import sys; sys.path.append({str(SCRIPTS)!r}); from t2i import models, config\n"
    code += f"e, t = models.build_text_encoder(config.UnetConfig(text_hidden_size=32), {CAPTIONS!r}, 0)\n"
    code += "print(models.hash_tokenizer(t), models.hash_model(e))"
    (tmp_path / "build.py").write_text(code)
    there = command(tmp_path / "build.py", cwd=tmp_path, fork=True).stdout
    encoder, tokenizer = models.build_text_encoder(UnetConfig(text_hidden_size=32), CAPTIONS, 0)
    assert there.split() == [models.hash_tokenizer(tokenizer), models.hash_model(encoder)]


def test_the_tokenizer_survives_saving_and_knows_whole_words(tmp_path):
    _, tokenizer = models.build_text_encoder(UnetConfig(text_hidden_size=32, text_max_length=16), CAPTIONS, 0)
    assert tokenizer.tokenize("a red flower") == ["a</w>", "red</w>", "flower</w>"]
    tokenizer.save_pretrained(tmp_path)
    again = models.load_part(type(tokenizer), str(tmp_path), "tokenizer")
    assert again(CAPTIONS).input_ids == tokenizer(CAPTIONS).input_ids
    assert again.model_max_length == 16


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_the_tokenizer_takes_any_text(text):
    tokenizer = test_the_tokenizer_takes_any_text.tokenizer
    assert len(tokenizer([text], padding="max_length", max_length=32, truncation=True).input_ids[0]) == 32


_, test_the_tokenizer_takes_any_text.tokenizer = models.build_text_encoder(UnetConfig(text_hidden_size=32), CAPTIONS, 0)


def test_captions_differ_and_their_embeddings_are_standardised():
    encoder, tokenizer = models.build_text_encoder(UnetConfig(), CAPTIONS, 0)
    hidden = models.encode_captions(encoder, tokenizer, CAPTIONS)
    assert hidden.shape == (3, 32, 128)
    assert abs(hidden.mean()) < 0.05
    assert abs(hidden.std() - 1) < 0.1
    assert (hidden[0] - hidden[1]).abs().max() > 0.5


def test_identity_of_a_model_follows_its_weights():
    vae = models.build_vae(VaeConfig(vae_channels=[16, 16]))
    first = models.hash_model(vae)
    assert models.hash_model(vae) == first
    with torch.no_grad():
        vae.decoder.conv_in.bias[0] += 1e-6
    assert models.hash_model(vae) != first


def test_refusals_name_the_fix():
    with pytest.raises(UserError, match="neither a folder here nor a Hub id"):
        models.locate("./missing", "vae")


def test_an_autoencoder_of_another_kind_gets_a_sentence(tmp_path):
    wide = (32, 32, 32, 32)
    AutoencoderKLMochi(
        encoder_block_out_channels=wide, decoder_block_out_channels=wide, layers_per_block=(1, 1, 1, 1, 1)
    ).save_pretrained(tmp_path / "video")
    with pytest.raises(UserError, match=r"video cannot be loaded \(its settings are not those of AutoencoderKL: "):
        models.load_vae(str(tmp_path / "video"))
    AutoencoderKL(in_channels=4, block_out_channels=(32,)).save_pretrained(tmp_path / "masked")
    with pytest.raises(UserError, match=r"masked reads images of 4 channels and writes 3; give one of color images"):
        models.load_vae(str(tmp_path / "masked"))


def test_the_recipe_flowers_is_the_model_card():
    from t2i.config import load_recipe

    recipe = load_recipe("flowers")
    with torch.device("meta"):
        unet = models.build_unet(recipe.unet, 16, 4, 768)
    assert 147e6 < sum(parameter.numel() for parameter in unet.parameters()) < 149e6
    assert recipe.vae.vae == "stabilityai/sd-vae-ft-mse"
    assert recipe.unet.text_encoder == "openai/clip-vit-large-patch14"
    assert (recipe.train_unet.max_grad_norm, recipe.train_unet.proportion_empty_prompts) == (0.5, 0.1)


@pytest.mark.parametrize(("side", "is_plain"), [(16, True), (64, False)])
def test_plain_attention_is_the_same_attention(side, is_plain):
    torch.manual_seed(0)
    unet = models.build_unet(UnetConfig(unet_channels=[8, 16], unet_layers=1, attention_head_dim=2,
                                        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"]), side, 4, 12)  # fmt: skip
    given = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    wanted = unet(*given).sample
    models.use_plain_attention(unet)
    assert all((type(one).__name__ == "AttnProcessor") == is_plain for one in unet.attn_processors.values())
    torch.testing.assert_close(unet(*given).sample, wanted, rtol=1e-4, atol=1e-5)


def test_a_base_pipeline_is_trained_on_its_own_betas(tmp_path):
    base = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    DDPMScheduler(**base).save_pretrained(tmp_path / "scheduler")
    config = UnetConfig(pretrained_model_name_or_path=str(tmp_path), beta_schedule="linear")
    found = models.build_noise_scheduler(config)
    assert torch.equal(found.alphas_cumprod, DDPMScheduler(**base).alphas_cumprod)
    assert torch.equal(models.build_ddim(found).alphas_cumprod, found.alphas_cumprod)
    with pytest.raises(
        UserError, match="was trained with beta_schedule linear; set beta_schedule: linear in section unet"
    ):
        models.build_noise_scheduler(UnetConfig(pretrained_model_name_or_path=str(tmp_path)))
    DDPMScheduler(num_train_timesteps=500, **base).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="500 noise levels"):
        models.build_noise_scheduler(config)
