"""The loss per image: it finds swapped captions, depends on image and checkpoint alone, and is kept in the run folder."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from t2i import models
from t2i.config import DataConfig, UnetConfig, VaeConfig
from t2i.data import repairs
from t2i.data.caches import TextCache, cache_latents
from t2i.data.dataset_folder import save_dataset_folder
from t2i.data.preparing import load_splits
from t2i.diffusion import denoising_loss
from t2i.errors import UserError
from t2i.evaluation import image_losses

KINDS, IMAGES, SWAPPED = 4, 200, 20


class SmallDenoiser(torch.nn.Module):
    """A perceptron over latents, noise level and text, called as a UNet is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64 + 32 + 3, 192), torch.nn.SiLU(), torch.nn.Linear(192, 192), torch.nn.SiLU(),
            torch.nn.Linear(192, 64),
        )  # fmt: skip

    def forward(self, noisy, timesteps, encoder_hidden_states):
        level = timesteps[:, None] / 1000
        inputs = [noisy.flatten(1), encoder_hidden_states.flatten(1), level, torch.cos(3 * level), torch.sin(3 * level)]
        return SimpleNamespace(sample=self.layers(torch.cat(inputs, 1)).view_as(noisy))


def test_swapped_captions_have_the_highest_losses():
    """A small model learns latents of four kinds, of which a tenth have the caption of another kind."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, KINDS, IMAGES)
    means = rng.normal(size=(KINDS, 4, 4, 4)).astype(np.float32)[kinds]
    means += rng.normal(scale=0.5, size=means.shape).astype(np.float32)  # no two images of a kind are alike
    swapped = set(rng.choice(IMAGES, SWAPPED, replace=False).tolist())
    captions = np.array([(kind + 1) % KINDS if row in swapped else kind for row, kind in enumerate(kinds)])
    embeddings = rng.normal(size=(KINDS + 1, 2, 16)).astype(np.float16)
    text = TextCache(embeddings, 1 + captions, np.ones(IMAGES, np.int64))
    latents = np.concatenate([means, np.full_like(means, -20)], axis=1)[:, None]
    unet = SmallDenoiser()
    scheduler = models.build_noise_scheduler(UnetConfig(prediction_type="v_prediction"))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(600):
        rows = torch.randint(0, IMAGES, (32,), generator=generator).numpy()
        chosen = np.where(rng.random(32) < 0.1, 0, text.rows_of(rows))  # some captions are dropped
        loss = denoising_loss(
            unet, scheduler, torch.from_numpy(means[rows]), torch.randn(32, 4, 4, 4, generator=generator),
            torch.randint(0, 1000, (32,), generator=generator), torch.from_numpy(embeddings[chosen]).float(),
        ).mean()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unet.eval()
    found = image_losses.losses(unet, scheduler, latents, text, 1.0)
    order = sorted(range(IMAGES), key=lambda row: -image_losses.excess(tuple(found[row].tolist())))
    assert len(swapped & set(order[:SWAPPED])) >= 0.9 * SWAPPED

    # a function of the image, its caption and the checkpoint: neither of the other images nor of their order
    some = np.array([150, 3, 77])
    alone = image_losses.losses(
        unet, scheduler, latents[some], TextCache(embeddings, text.rows[some], text.counts[some]), 1.0
    )
    torch.testing.assert_close(alone, found[some], rtol=1e-4, atol=1e-5)
    assert image_losses.losses(unet, scheduler, latents, text, 1.0, cancelled=lambda: True) is None


@pytest.fixture
def run(tmp_path):
    """A run with random weights on a small data set, as a training leaves it, with the training's cached latents."""
    rng = np.random.default_rng(0)
    rows = [{"image": rng.integers(0, 255, (16, 16, 3), np.uint8), "caption": f"flower {n}"} for n in range(5)]
    save_dataset_folder(tmp_path / "set", {"train": iter(rows[:4]), "validation": iter(rows[4:])})
    settings = {"dataset": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    splits = load_splits(DataConfig(resolution=16, **settings), say=lambda _: None)
    torch.manual_seed(0)
    config = UnetConfig(
        text_hidden_size=32, text_layers=1, text_max_length=16, unet_channels=[16, 16], unet_layers=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], attention_head_dim=2,
    )  # fmt: skip
    vae = models.build_vae(VaeConfig(vae_channels=[8, 8], vae_layers=1)).eval()
    encoder, tokenizer = models.build_text_encoder(config, [row["caption"] for row in rows], 0)
    scheduler = models.build_ddim(models.build_noise_scheduler(config))
    unet = models.build_unet(config, 8, vae.config.latent_channels, 32)
    folder = tmp_path / "outputs" / "run"
    pipeline = models.build_pipeline(vae, encoder, tokenizer, unet, scheduler)
    pipeline.save_pretrained(folder / "pipeline")
    hashes = {"dataset_hash": splits.fingerprint, "vae_hash": models.hash_model(vae), "text_encoder_hash": "t"}
    (folder / "run.json").write_text(json.dumps({"identity": hashes, "precision": "no"}))
    images = {"images": splits.train.fingerprint, "encoder": models.hash_encoder(vae)}
    cache_latents(splits.train.pixels, images, vae, settings["cache_dir"], flip=False, say=lambda _: None)
    return folder, settings, pipeline, splits


def test_losses_are_measured_from_cached_latents_and_kept_for_the_weights(run, tmp_path):
    folder, settings, pipeline, splits = run
    cached = set((tmp_path / "cache" / "latents").glob("*/array.npy"))
    seen = []
    file = image_losses.measure(folder, "pipeline", settings, lambda _: pipeline, lambda *done: seen.append(done))
    assert file == folder / "image_losses" / "pipeline.json"
    assert seen == [(4, 5), (5, 5)]
    assert len(set((tmp_path / "cache" / "latents").glob("*/array.npy")) - cached) == 1  # of the validation image alone
    found = image_losses.read(folder, "pipeline")
    assert set(found) == {*splits.train.rows["id"], *splits.validation.rows["id"]}
    assert all(0 < own < 10 and 0 < without < 10 for own, without in found.values())

    image = splits.train.rows["id"][2]
    repairs.edit_captions(tmp_path / "set", image, "x", [splits.train.rows["caption"][2]], ["something else entirely"])
    repairs.set_left_out(tmp_path / "set", splits.train.rows["id"][0], "train", "x", True)
    image_losses.measure(folder, "pipeline", settings, lambda _: pipeline)
    again = image_losses.read(folder, "pipeline")
    assert {key for key in found if found[key] != pytest.approx(again[key], rel=1e-4)} == {image}
    assert again[image][1] == pytest.approx(found[image][1], rel=1e-4)  # without a caption, nothing has changed

    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"weights": "others"}))
    assert image_losses.read(folder, "pipeline") == {}
    file.write_text(json.dumps(content | {"losses": 1}))
    with pytest.raises(UserError, match="is damaged; delete it and measure the losses again"):
        image_losses.read(folder, "pipeline")
    assert image_losses.read(folder, "checkpoint-000001") == {}
    with pytest.raises(UserError, match="no longer in nowhere"):
        image_losses.measure(folder, "pipeline", settings | {"cache_dir": "nowhere"}, lambda _: pipeline)
