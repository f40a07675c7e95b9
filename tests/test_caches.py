"""Caches by content: reuse, refusal of stale ones, the empty caption."""

import types

import datasets
import numpy as np
import pytest
import torch

import train_unet
import train_vae
from t2i import config, models
from t2i.config import UnetConfig, VaeConfig
from t2i.data import caches
from t2i.data.prepared import Selection, Split
from t2i.diffusion import sample_posterior
from t2i.pictures.reconstructions import reconstruct

CAPTIONS = ["a red flower", "a blue flower", "a red flower", ""]


def make_vae(seed):
    torch.manual_seed(seed)
    return models.build_vae(VaeConfig(vae_channels=[16, 16])).eval()


def latents(pixels, vae, folder, images="a", flip=True):
    said = []
    identity = {"images": images, "encoder": models.hash_encoder(vae)}
    return caches.cache_latents(pixels, identity, vae, str(folder), flip=flip, batch_size=2, say=said.append), said


def test_latents_are_the_posterior_of_image_and_mirror(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    vae = make_vae(0)
    made, _ = latents(pixels, vae, tmp_path)
    assert made.shape == (5, 2, 8, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(caches.to_pixels(pixels[:, :, ::-1])).latent_dist
    np.testing.assert_allclose(made[:, 1, :4], posterior.mean.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(made[:, 1, 4:], posterior.logvar.numpy(), rtol=1e-3, atol=1e-4)
    assert not made.flags.writeable


def test_pictures_of_stored_latents_are_those_of_float32_and_the_cache_is_half_as_large(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    vae = make_vae(0)
    made, _ = latents(pixels, vae, tmp_path, flip=False)
    assert made.dtype == np.float16
    with torch.no_grad():
        exact = vae.encode(caches.to_pixels(pixels)).latent_dist.mean
        noise = torch.zeros_like(exact)
        stored = sample_posterior(torch.from_numpy(np.array(made[:, 0])), noise)
        error = (vae.decode(stored).sample - vae.decode(exact).sample).square().mean() / 4  # Pixels span 2.
    assert stored.dtype == torch.float32
    assert -10 * error.log10() > 85  # dB


@pytest.mark.parametrize(("side", "images"), [(32, 32), (256, 32), (512, 8), (1024, 2), (4096, 1)])
def test_a_vae_gets_fewer_images_at_once_if_they_are_large(side, images):
    assert caches.vae_batch(side) == images


def test_measuring_a_vae_gives_it_no_more_large_images_at_once(monkeypatch):
    monkeypatch.setattr(caches, "VAE_BATCH_PIXELS", 8 * 32**2)
    vae, batches = models.build_vae(VaeConfig(vae_channels=[4, 4], vae_layers=1)).eval(), []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    pixels = np.zeros((9, 32, 32, 3), np.uint8)
    assert len(reconstruct(vae, pixels)[0]) == 9
    train_vae.latent_statistics(vae, pixels)
    assert batches == [8, 1] * 2


def test_measuring_a_vae_reads_no_more_images_than_a_batch_if_some_are_left_out(monkeypatch):
    monkeypatch.setattr(caches, "VAE_BATCH_PIXELS", 4 * 32**2)
    reads = []

    class Counted(np.ndarray):
        def __getitem__(self, key):
            found = np.asarray(self)[key]
            reads.append(len(found))
            return found

    images = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    kept = np.array([0, 1, 3, 4, 6, 7])
    repaired, same = (
        Split(pixels, datasets.Dataset.from_dict({"caption": CAPTIONS}), fingerprint="a")
        for pixels in (Selection(images.view(Counted), kept), images[kept])
    )
    vae = models.build_vae(VaeConfig(vae_channels=[4, 4], vae_layers=1)).eval()
    assert train_vae.measure(vae, repaired, limit=5) == train_vae.measure(vae, same, limit=5)
    train_vae.normalise_latents(vae, repaired, fold=False, rescale=True, limit=5)
    assert reads == [4, 1] * 2


def test_latents_beyond_the_range_of_float16_are_stored_as_its_largest_number(tmp_path):
    vae = make_vae(0)
    vae.quant_conv.weight.data.mul_(1e6)
    made, _ = latents(np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8), vae, tmp_path)
    assert np.isfinite(made).all()
    assert np.abs(made).max() == caches.FLOAT16_MAX


def test_latents_are_reused_and_never_stale(tmp_path):
    pixels = np.zeros((3, 16, 16, 3), np.uint8)
    first, said = latents(pixels, make_vae(0), tmp_path)
    assert said[0].startswith("computing latents of 3 images: 0.0 MB")
    _, said = latents(pixels, make_vae(0), tmp_path)
    assert said[0].startswith("reusing")
    other, said = latents(pixels, make_vae(1), tmp_path)
    assert said[0].startswith("computing")
    assert not np.array_equal(first, other)
    _, said = latents(pixels, make_vae(0), tmp_path, images="b")
    assert said[0].startswith("computing")
    assert not list(tmp_path.rglob("*.part"))


def test_a_failing_build_leaves_no_cache(tmp_path):
    class Broken:
        config = make_vae(0).config
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, images):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        caches.cache_latents(np.zeros((3, 16, 16, 3), np.uint8), {}, Broken(), str(tmp_path), flip=False)
    assert all(path.name.startswith(".") for path in (tmp_path / "latents").iterdir() if path.is_dir())


def test_text_is_computed_once_a_caption_with_the_empty_one_first(tmp_path):
    encoder, tokenizer = models.build_text_encoder(UnetConfig(text_hidden_size=32, text_max_length=8), CAPTIONS, 0)
    text = caches.cache_text(
        [[caption] for caption in CAPTIONS],
        {"encoder": "x"},
        encoder,
        tokenizer,
        str(tmp_path),
        batch_size=2,
        say=lambda _: None,
    )
    assert text.embeddings.shape == (3, 8, 32)
    assert text.rows.tolist() == [1, 2, 1, 0]
    expected = models.encode_captions(encoder, tokenizer, ["", "a red flower"]).numpy()
    np.testing.assert_allclose(text.embeddings[:2], expected, atol=5e-3)  # stored as float16


def test_several_captions_are_each_embedded_once_and_known_by_their_rows(tmp_path):
    encoder, tokenizer = models.build_text_encoder(UnetConfig(text_hidden_size=32, text_max_length=8), CAPTIONS, 0)
    several = [["a red flower", "a flower"], ["a flower"], ["a blue flower", "a flower", "a red flower"], [""]]
    text = caches.cache_text(several, {}, encoder, tokenizer, str(tmp_path), say=lambda _: None)
    assert text.embeddings.shape == (4, 8, 32)
    assert text.rows.tolist() == [1, 2, 2, 3, 2, 1, 0]
    assert text.counts.tolist() == [2, 1, 3, 1]
    assert text.rows_of(np.array([2, 0, 3])).tolist() == [3, 1, 0]  # the first of each
    assert text.rows_of(np.array([2, 0, 2]), np.array([2, 1, 0])).tolist() == [1, 2, 3]
    single = caches.cache_text(
        [[caption] for caption in ("a red flower", "a flower", "a blue flower", "")],
        {}, encoder, tokenizer, str(tmp_path), say=lambda _: None,
    )  # fmt: skip
    assert single.embeddings.filename == text.embeddings.filename  # the same captions, so the same cache


def cached_for(folder, precision, vae=None, **other):
    """What train_unet.py caches of four noisy images in a training of this precision, and what it says."""
    recipe = config.Recipe(data=config.DataConfig(cache_dir=str(folder), random_flip=False))
    recipe.train_unet.validation_images = 3
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)

    split = Split(pixels, datasets.Dataset.from_dict({"caption": CAPTIONS}), fingerprint="a")
    encoder, tokenizer = models.build_text_encoder(UnetConfig(text_hidden_size=32, text_max_length=8), CAPTIONS, 0)
    said = []
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision, print=said.append)
    cached = train_unet.cache_inputs(
        recipe, types.SimpleNamespace(train=split, validation=split),
        {"vae": vae or make_vae(0), "text_encoder": encoder, "tokenizer": tokenizer},
        {"text_encoder_hash": "t", "tokenizer_hash": "k"} | other, accelerator,
    )  # fmt: skip
    latents, text = cached["validation"]  # what the loss is measured on, and no more
    assert (len(latents), len(text.rows)) == (3, 3)
    return cached["train"], said


def test_a_training_in_bf16_caches_in_bf16_near_float32_and_apart_from_it(tmp_path):
    (latents, text), _ = cached_for(tmp_path, "no")
    (halved, halved_text), said = cached_for(tmp_path, "bf16")
    assert said[0].startswith("computing")
    assert latents.dtype == halved.dtype == np.float16
    difference = np.square(halved[:, 0, :4] - latents[:, 0, :4]).mean() / np.var(latents[:, 0, :4])
    assert 0 < difference < 1e-4  # the VAE's own posterior is wider: a thousandth and more
    np.testing.assert_allclose(halved_text.embeddings, text.embeddings, atol=0.1)
    _, said = cached_for(tmp_path, "fp16")  # whose range is too small: in float32, as before
    assert all(line.startswith("reusing") for line in said if "latents" in line or "embeddings" in line)


@pytest.mark.parametrize(
    ("name", "value", "made"),
    [
        ("vae", make_vae(1), "latents"),
        ("text_encoder_hash", "new", "embeddings"),
        ("tokenizer_hash", "new", "embeddings"),
    ],
)
def test_a_training_with_another_model_reads_no_cache_that_the_model_would_change(name, value, made, tmp_path):
    cached_for(tmp_path, "no")
    _, said = cached_for(tmp_path, "no", **{name: value})
    told = {word: [line.split()[0] for line in said if word in line] for word in ("latents", "embeddings")}
    other = ({"latents", "embeddings"} - {made}).pop()
    assert told[made][0] == "computing"  # the validation split may have the captions of the training split
    assert set(told[other]) == {"reusing"}


@pytest.mark.parametrize(
    ("part", "word"), [("decoder", "reusing"), ("post_quant_conv", "reusing"), ("quant_conv", "computing")]
)
def test_another_decoder_keeps_the_cache_of_latents(part, word, tmp_path):
    """As `--vae_train_part decoder` trains it."""
    cached_for(tmp_path, "no")
    vae = make_vae(0)
    with torch.no_grad():
        next(getattr(vae, part).parameters()).add_(0.1)
    _, said = cached_for(tmp_path, "no", vae=vae)
    assert [line.split()[0] for line in said if "latents" in line] == [word] * 2
