"""Caches by content: reuse, refusal of what is stale, the empty caption."""

import numpy as np
import pytest
import torch

from t2i import caches, models
from t2i.config import UnetConfig, VaeConfig

CAPTIONS = ["a red flower", "a blue flower", "a red flower", ""]


def make_vae(seed):
    torch.manual_seed(seed)
    return models.build_vae(VaeConfig(vae_channels=[16, 16])).eval()


def latents(pixels, vae, folder, images="a", flip=True):
    said = []
    identity = {"images": images, "vae": models.hash_model(vae)}
    return caches.cache_latents(pixels, identity, vae, str(folder), flip=flip, batch_size=2, say=said.append), said


def test_latents_are_the_posterior_of_image_and_mirror(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    vae = make_vae(0)
    made, _ = latents(pixels, vae, tmp_path)
    assert made.shape == (5, 2, 8, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(caches.to_pixels(pixels[:, :, ::-1])).latent_dist
    np.testing.assert_allclose(made[:, 1, :4], posterior.mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(made[:, 1, 4:], posterior.logvar.numpy(), atol=1e-4)
    assert not made.flags.writeable


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


def test_a_failing_build_leaves_nothing(tmp_path):
    class Broken:
        config = make_vae(0).config
        device, dtype = "cpu", torch.float32

        def encode(self, images):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        caches.cache_latents(np.zeros((3, 16, 16, 3), np.uint8), {}, Broken(), str(tmp_path), flip=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.parent.name == "latents"]


def test_text_is_computed_once_a_caption_with_the_empty_one_first(tmp_path):
    encoder, tokenizer = models.build_text_encoder(UnetConfig(text_hidden_size=32, text_max_length=8), CAPTIONS, 0)
    text = caches.cache_text(
        CAPTIONS, {"encoder": "x"}, encoder, tokenizer, str(tmp_path), batch_size=2, say=lambda _: None
    )
    assert text.embeddings.shape == (3, 8, 32)
    assert text.rows.tolist() == [1, 2, 1, 0]
    expected = models.encode_captions(encoder, tokenizer, ["", "a red flower"]).numpy()
    np.testing.assert_allclose(text.embeddings[:2], expected, atol=5e-3)  # stored as float16
