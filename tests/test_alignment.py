"""The alignment of the denoiser's middle block with the features of a frozen network."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Dinov2Config, Dinov2Model

from t2i import models
from t2i.config import Recipe, TrainUnetConfig, UnetConfig, check_unet
from t2i.data import caches
from t2i.errors import UserError
from t2i.training.alignment import Alignment, TargetNetwork, as_grid


def tiny_unet(side=8):
    torch.manual_seed(0)
    config = UnetConfig(
        unet_channels=[8, 16],
        unet_layers=1,
        attention_head_dim=2,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    )
    return models.build_unet(config, side, 4, 12)


class Colors:
    """A network whose features are the colors of a 2 x 2 grid."""

    side, channels, source = 2, 2, "colors"

    def maps(self, pictures):
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.interpolate(pixels, (2, 2), mode="area")

    def identity(self):
        return "colors"


@settings(max_examples=20)
@given(st.integers(3, 6), st.booleans(), st.integers(0, 1000))
def test_targets_are_the_features_in_their_principal_axes(tmp_path_factory, count, flip, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    cache = str(tmp_path_factory.mktemp("cache"))
    targets = caches.cache_alignment(images, str(seed), Colors(), cache, flip=flip, say=lambda _: None)
    assert targets.shape == (count, 2 if flip else 1, 2, 2, 2)
    features = Colors().maps(images).permute(0, 2, 3, 1).flatten(0, 2)
    centred = features - features.mean(0)
    kept = torch.from_numpy(np.array(targets[:, 0], np.float32)).square().sum()
    # No two directions hold more of the features' variance.
    assert kept == pytest.approx(float(torch.linalg.svdvals(centred)[:2].square().sum()), rel=1e-2, abs=1e-3)
    if flip:
        mirrored = caches.cache_alignment(
            images[:, :, ::-1].copy(), "other", Colors(), cache, flip=True, say=lambda _: None
        )
        # Mirroring changes neither mean nor axes.
        assert np.allclose(targets[:, 1].astype(np.float32), mirrored[:, 0].astype(np.float32), atol=5e-3)


def test_the_term_falls_where_the_middle_block_follows_its_targets():
    unet = tiny_unet()
    aligned = Alignment(unet, 0.5)
    latents, text, targets = torch.randn(6, 4, 8, 8), torch.randn(6, 5, 12), torch.randn(6, 8, 4, 4)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    terms = []
    for _ in range(30):
        unet(latents, 10, text)
        term = aligned.penalty(targets.half())
        term.backward()
        optimizer.step()
        optimizer.zero_grad()
        terms.append(term.item())
    assert terms[0] == pytest.approx(1, abs=0.2)
    assert terms[-1] < terms[0] - 0.3
    with torch.no_grad():
        unet(latents, 10, text)
    with pytest.raises(AssertionError):  # Validation keeps no features, and a term is read once.
        aligned.penalty(targets)


def test_a_vision_model_of_transformers_gives_a_grid_without_its_class_token(tmp_path):
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor", "size": {"height": 16, "width": 16}, "do_center_crop": false}'
    )
    network = TargetNetwork(str(tmp_path), tiny_unet(8))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    assert network.maps(pictures).shape == (3, 8, 4, 4)
    tokens = torch.cat([torch.full((1, 1, 2), 9.0), torch.arange(8.0).view(1, 4, 2)], dim=1)
    assert as_grid(tokens)[0, 0].tolist() == [[0, 2], [4, 6]]
    other = TargetNetwork(str(tmp_path), tiny_unet(16))
    assert other.identity() != network.identity()  # Its grid is another one.


def test_the_packaged_network_tells_pictures_apart_at_each_place():
    network = TargetNetwork("efficientnet-lite2", tiny_unet(8))
    picture = np.zeros((1, 64, 64, 3), np.uint8)
    picture[:, :, 32:] = np.random.default_rng(0).integers(0, 256, (1, 64, 32, 3))
    plain, half = (network.maps(one) for one in (np.zeros_like(picture), picture))
    change = (half - plain).square().sum(1)[0]
    assert change[:, 2:].sum() > 1.5 * change[:, :2].sum()  # Only the right half differs.


def test_the_judge_is_no_target():
    for network in ("efficientnet-lite0", "facebook/dinov2-small"):
        recipe = Recipe(train_unet=TrainUnetConfig(alignment_weight=0.5, alignment_network=network))
        recipe.evaluate.judge_network = network
        with pytest.raises(UserError, match=f"alignment_network {network} is the network that judges"):
            check_unet(recipe)
