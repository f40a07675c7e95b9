"""Random crops: squares of the original, cached beside the whole images, each drawn as often as the others."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from t2i import config, models
from t2i.data import caches, preparing, repairs
from t2i.data.dataset_folder import save_dataset_folder
from t2i.data.images import LEAST_CROP, random_crop
from t2i.data.prepared import Selection, open_prepared
from t2i.diffusion import choose_versions
from t2i.errors import UserError


def gradient(width: int, height: int) -> Image.Image:
    """An image whose red rises with x and whose green rises with y, each from 0 to 255."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


def folder_of(folder: Path, count: int) -> Path:
    """A data set of gradients that differ, with one image for validation."""
    rows = []
    for number in range(count):
        out = io.BytesIO()
        gradient(60 + number, 50).save(out, "PNG")
        rows.append({"image": {"bytes": out.getvalue(), "path": None}, "caption": f"flower {number}"})
    save_dataset_folder(folder, {"train": iter(rows), "validation": iter(rows[:1])})
    return folder


def load(folder: Path, cache: Path, crops: int) -> preparing.Splits:
    data = config.DataConfig(dataset=str(folder), resolution=16, cache_dir=str(cache), random_crops=crops)
    return preparing.load_splits(data, say=lambda _: None)


@given(st.integers(40, 300), st.integers(40, 300), st.integers(0, 2**32))
def test_a_crop_is_a_square_within_the_image_of_at_least_four_fifths_of_its_side(width, height, seed):
    crop = random_crop(gradient(width, height), 32, [seed, 0]).astype(float)
    spans = [np.ptp(crop[16, :, 0]) / 255 * width, np.ptp(crop[:, 16, 1]) / 255 * height]  # in pixels of the original
    side = min(width, height)
    for span in spans:  # The centers of the outer pixels lie half a pixel within the square, and colors are rounded.
        assert LEAST_CROP * side * 0.9 - 3 <= span <= side + 3
    assert abs(spans[0] - spans[1]) <= 0.04 * side + 4
    assert np.array_equal(crop, random_crop(gradient(width, height), 32, [seed, 0]))


def test_crops_of_training_images_are_prepared_once_by_content(tmp_path):
    folder = folder_of(tmp_path / "set", 6)
    plain, cropped = load(folder, tmp_path / "cache", 0), load(folder, tmp_path / "cache", 3)
    assert plain.train.crops is None
    assert cropped.train.crops.shape == (6, 3, 16, 16, 3)
    assert cropped.validation.crops is None
    np.testing.assert_array_equal(plain.train.pixels, cropped.train.pixels)
    assert len({crop.tobytes() for crop in cropped.train.crops.reshape(18, -1)}) == 18
    versions = cropped.train.versions(np.array([4, 4, 1]), np.array([0, 3, 1]))
    wanted = [cropped.train.pixels[4], cropped.train.crops[4, 2], cropped.train.crops[1, 0]]
    np.testing.assert_array_equal(versions, wanted)
    moved = load(folder_of(tmp_path / "moved", 6), tmp_path / "other", 3)
    np.testing.assert_array_equal(moved.train.crops, cropped.train.crops)
    again, _, _ = open_prepared(tmp_path / "cache" / "pixels" / cropped.fingerprint)
    assert again.crop_count == 3


def test_an_image_that_is_left_out_takes_its_crops_along(tmp_path):
    folder = folder_of(tmp_path / "set", 6)
    whole = load(folder, tmp_path / "cache", 2).train
    repairs.set_left_out(folder, whole.rows["id"][2], "train", "train[2]", True)
    fewer = load(folder, tmp_path / "cache", 2).train
    assert isinstance(fewer.crops, Selection)
    kept = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(np.asarray(fewer.crops), whole.crops[kept])
    np.testing.assert_array_equal(fewer.versions(np.array([2]), np.array([2]))[0], whole.crops[3, 1])


@pytest.mark.parametrize("flip", [False, True])
def test_latents_of_crops_stand_after_those_of_the_whole_image(tmp_path, flip):
    split = load(folder_of(tmp_path / "set", 5), tmp_path / "cache", 2).train
    torch.manual_seed(0)
    vae = models.build_vae(config.VaeConfig(vae_channels=[8, 8], vae_layers=1)).eval()

    def latents(pixels, crops=None):
        name = {"images": split.fingerprint, "vae": "v"}
        return caches.cache_latents(
            pixels, name, vae, str(tmp_path / "cache"), flip=flip, crops=crops, say=lambda _: None
        )

    whole, cropped = latents(split.pixels), latents(split.pixels, split.crops)
    mirrors = 1 + flip
    assert cropped.shape == (5, 3 * mirrors, *whole.shape[2:])
    np.testing.assert_allclose(cropped[:, :mirrors], whole, atol=1e-3)
    with torch.no_grad():
        second = vae.encode(caches.to_pixels(split.crops[:, 1])).latent_dist.mean
    np.testing.assert_allclose(cropped[:, 2 * mirrors, :4], second, atol=5e-3)


class Colors:
    """A VAE and a network of alignment that both see nothing but the colors of an image's quarters."""

    source, channels, side = "colors", 3, 2
    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(latent_channels=3, block_out_channels=[1, 1, 1, 1])

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        mean = torch.nn.functional.adaptive_avg_pool2d(images, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.zeros_like(mean)))

    def maps(self, images: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(caches.to_pixels(images), 2)

    def identity(self) -> str:
        return "colors"


def test_latents_and_targets_are_of_the_same_version_in_one_cache(tmp_path):
    """Settings with equally many versions share no cache, and each version's latents belong to its targets."""
    folder = folder_of(tmp_path / "set", 8)
    shapes = set()
    for flip, crops in ((True, 1), (False, 3), (True, 0), (False, 1)):
        split = load(folder, tmp_path / "cache", crops).train
        options = {"flip": flip, "crops": split.crops, "say": lambda _: None}
        cache = str(tmp_path / "cache")
        latents = caches.cache_latents(split.pixels, {"images": split.fingerprint}, Colors(), cache, **options)
        targets = caches.cache_alignment(split.pixels, split.fingerprint, Colors(), cache, **options)
        assert latents.shape[1] == targets.shape[1] == (1 + flip) * (1 + crops)
        # Targets are turned and shifted: distances between versions and images stay.
        flat = [
            np.moveaxis(np.asarray(one)[:, :, :3], 2, -1).reshape(-1, 3).astype(float) for one in (latents, targets)
        ]
        first, second = (np.linalg.norm(one[:, None] - one[None], axis=-1) for one in flat)
        np.testing.assert_allclose(first, second, atol=0.02)
        shapes.add(latents.filename)
    assert len(shapes) == 4


def test_a_cache_folder_that_lost_its_crops_is_damaged(tmp_path):
    folder = folder_of(tmp_path / "set", 4)
    prepared = tmp_path / "cache" / "pixels" / load(folder, tmp_path / "cache", 2).fingerprint
    file = prepared / "train.crops.npy"
    crops = np.load(file)
    np.save(file, crops[:, :1])
    with pytest.raises(UserError, match="is damaged; delete the folder"):
        load(folder, tmp_path / "cache", 2)
    file.unlink()
    with pytest.raises(UserError, match="is damaged"):
        open_prepared(prepared)


@given(st.booleans(), st.integers(0, 4))
def test_each_version_is_drawn_equally_often_and_without_crops_as_ever(flip, crops):
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float32)[:-1]
    crop, mirrored = choose_versions(uniform, flip, crops)
    pairs = list(zip(crop.tolist(), mirrored.tolist(), strict=True))
    counts = {pair: pairs.count(pair) for pair in pairs}
    assert counts.keys() == {(number, side) for number in range(crops + 1) for side in range(1 + flip)}
    assert max(counts.values()) - min(counts.values()) <= 2
    if not crops:
        assert mirrored.tolist() == (uniform < 0.5).tolist() if flip else not mirrored.any()


def test_a_training_on_crops_runs_from_the_command_line(workspace, command, tmp_path):
    options = ("--config", workspace / "tiny.yaml", "--dataset", workspace / "dataset", "--random_crops", 2)
    vae = command("train_vae.py", *options, "--max_train_steps", 2, "--output_dir", "vae", cwd=tmp_path)
    assert "reusing" not in vae.stdout
    done = command("train_unet.py", *options, "--vae", "vae", "--output_dir", "unet", cwd=tmp_path)
    assert "reusing the prepared images" in done.stdout
    assert (tmp_path / "unet" / "pipeline" / "model_index.json").is_file()
    (latents,) = [np.load(file, mmap_mode="r").shape for file in tmp_path.glob(".cache/t2i/latents/*/array.npy")
                  if np.load(file, mmap_mode="r").shape[1] > 1]  # fmt: skip
    assert latents[1] == 6  # Whole and two crops, each also mirrored.
