"""Reconstruct a run's validation images by any VAE, and store each reconstruction.

A reconstruction's file is `<run>/reconstructions/<key>.png` in the VAE's run. The key of a reconstruction is the hash
of the VAE's weights and of the image. The PNG file of a reconstruction also holds its PSNR and SSIM.

This module imports no torch before a reconstruction is made, because the dashboard's pages must start quickly.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from t2i.config import Recipe, load_recipe
from t2i.data import browse
from t2i.errors import UserError
from t2i.files import hash_files, hash_json, read_json
from t2i.pictures.cells import MAX_SIDE
from t2i.pictures.png import DAMAGE, pixel_hash, read_parameters, save_picture
from t2i.runs import checkpoint_folders, find_prepared

if TYPE_CHECKING:  # The module imports the library datasets.
    from t2i.data.prepared import Selection

STORE = "reconstructions"  # folder of a run


@dataclass(frozen=True)
class Vae:
    """A VAE's folder of weights, its name within its run, and the run folder that stores its reconstructions."""

    run: Path
    name: str
    folder: Path


@dataclass(frozen=True)
class Reconstruction:
    """A VAE's version of an image, RGB of the same size, with PSNR in dB and SSIM as measured before rounding to 8 bits."""

    picture: Image.Image
    psnr: float
    ssim: float


def find_vaes(run: Path) -> list[Vae]:
    """Return the VAEs of a run in the order of training: "start", the checkpoints, the finished VAE.

    The VAE "start" is the one that was fine-tuned, if the recipe names a VAE on this disk.
    """
    vaes = []
    for checkpoint in checkpoint_folders(run):
        parts = [checkpoint / part for part in ("vae_ema", "vae") if (checkpoint / part / "config.json").is_file()]
        vaes += [Vae(run, checkpoint.name, part) for part in parts[:1]]  # the run ends with the average, if it has one
    if (run / "vae" / "config.json").is_file():
        vaes.append(Vae(run, "vae", run / "vae"))
    if vaes:
        start = _start(run)
        return [Vae(run, "start", start), *vaes] if start else vaes
    pipeline = run / "pipeline" / "vae"  # the run trained a denoiser, or holds a model of the Hub
    return [Vae(run, "pipeline", pipeline)] if (pipeline / "config.json").is_file() else []


def _start(run: Path) -> Path | None:
    try:
        source = _settings(run).vae.vae
    except UserError:
        return None
    try:
        parts = [Path(source).expanduser() / part for part in ("", "vae", "pipeline/vae")] if source else []
        return next((part for part in parts if (part / "config.json").is_file()), None)
    except (OSError, RuntimeError):  # no folder can have this path: it is too long, or names an unknown user
        return None


def _settings(run: Path) -> Recipe:
    file = run / "config.yaml"
    try:
        stat = file.stat()
        return _recipe(str(file), stat.st_size, stat.st_mtime_ns)
    except OSError:
        return load_recipe(str(file))  # raises with the reason
    except RecursionError:  # nested to do harm
        raise UserError(f"{run / 'config.yaml'} is not a recipe; restore it from config.public.yaml") from None


@lru_cache(maxsize=512)  # a recipe takes 23 ms, and each click reads those of all runs; no caller changes the result
def _recipe(path: str, *state: int) -> Recipe:
    return load_recipe(path)


@dataclass(frozen=True)
class Images:
    """A run's validation images as training saw them, with the caption and file of each.

    pixels: the validation images, uint8 [N, R, R, 3], memory mapped.
    """

    pixels: np.ndarray
    captions: list[str]
    files: list[str]

    def __len__(self) -> int:
        return len(self.pixels)


def validation_images(run: Path) -> Images:
    """Return a run's validation images, by the hash in its run.json.

    Raises `UserError` if the prepared images are missing or damaged.
    """
    state, settings = read_json(run / "run.json"), _settings(run).data
    identity = state.get("identity") if isinstance(state, dict) else None
    folder = find_prepared(settings.cache_dir, identity.get("dataset_hash") if isinstance(identity, dict) else None)
    if folder is None:
        raise UserError(
            f"the prepared images of {run} are no longer in {settings.cache_dir}; train_vae.py with the same settings prepares them"
        )
    try:
        pixels = np.load(folder / "validation.npy", mmap_mode="r", allow_pickle=False)
        with pa.memory_map(str(folder / "validation.arrow")) as file:
            rows = pa.ipc.open_stream(file).read_all().select(["caption", "file"]).to_pydict()
    except browse.DAMAGE as error:
        raise UserError(
            f"the cache folder {folder} is damaged ({type(error).__name__}); delete the folder and run again"
        ) from None
    return Images(pixels, [text or "" for text in rows["caption"]], [name or "" for name in rows["file"]])


# --- The store -------------------------------------------------------------------------------------------------------


def vae_hash(vae: Vae) -> str:
    """Return the hash of a VAE's files, which are read only once.

    Raises `UserError` if a file of the VAE is missing.
    """
    return hash_json(hash_files(vae.folder))


def read(vae: Vae, image: np.ndarray) -> Reconstruction | None:
    """Return the stored reconstruction of `image` (uint8 [R, R, 3]) by `vae`.

    The result is None if the stored file is missing, damaged or changed.
    """
    path, hashes = _file(vae, image)
    parameters = read_parameters(path)
    try:
        if not isinstance(parameters, dict) or any(parameters.get(key) != value for key, value in hashes.items()):
            return None
        with Image.open(path, formats=["PNG"]) as file:
            if file.mode != "RGB" or max(file.size) > MAX_SIDE:
                return None
            file.load()
            picture = file.copy()
        if parameters["pixel_hash"] != pixel_hash(picture):
            return None
        return Reconstruction(picture, float(parameters["psnr_db"]), float(parameters["ssim"]))
    except (*DAMAGE, TypeError):
        return None


def _file(vae: Vae, image: np.ndarray) -> tuple[Path, dict[str, str]]:
    """Return the path of a reconstruction's file, which may not exist yet, and the hashes that the file must hold."""
    hashes = {"vae_hash": vae_hash(vae), "image_hash": pixel_hash(Image.fromarray(np.asarray(image)))}
    return vae.run / STORE / f"{hash_json(hashes)}.png", hashes


def make(
    vae: Vae,
    images: Sequence[np.ndarray],
    *,
    batch_size: int = 4,
    progress: Callable[[int], Any] = lambda done: None,
) -> int:
    """Make and store the missing reconstructions of `images` (uint8 [R, R, 3], of one size).

    Return the number of reconstructions made.

    Finished reconstructions stay, and the same call makes the missing ones.

    Args:
        progress: function that is called with the number of stored reconstructions.

    Raises:
        UserError: the VAE cannot be loaded, does not fit the images or changed meanwhile, or a picture cannot be written.
    """
    missing = [image for image in images if read(vae, image) is None]
    if not missing:
        return 0

    from t2i import models  # imports torch

    before = vae_hash(vae)
    model = models.load_decoder(str(vae.folder)).to(models.best_device())
    if vae_hash(vae) != before:
        raise UserError(f"{vae.folder} changed while it was loaded; open the page again")
    factor, side = models.vae_factor(model), missing[0].shape[0]
    if side % factor:
        raise UserError(f"{vae.folder} needs sides that are multiples of {factor}, and these images have {side} px")
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        pictures, psnr, ssim = reconstruct(model, np.stack(batch))
        for image, picture, decibel, similarity in zip(batch, pictures, psnr, ssim, strict=True):
            _save(vae, image, picture, {"psnr_db": float(decibel), "ssim": float(similarity)})
        progress(len(images) - len(missing) + start + len(batch))
    return len(missing)


def reconstruct(vae: Any, images: "np.ndarray | Selection") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode images uint8 [N, R, R, 3] to posterior means and decode them, in batches of `caches.vae_batch`.

    Returns:
        The decoded images, uint8 [N, R, R, 3]; PSNR in dB, [N]; SSIM, [N].
    """
    import torch

    from t2i.data.caches import to_images, to_pixels, vae_batch
    from t2i.evaluation import metrics

    parts, batch_size = [], vae_batch(images.shape[1])
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            pixels = to_pixels(images[start : start + batch_size]).to(vae.device)
            encoded = vae.encode(pixels)
            # A tiny autoencoder has no posterior.
            latents = encoded.latents if "latents" in encoded else encoded.latent_dist.mean
            decoded = vae.decode(latents).sample.float().clamp(-1, 1)
            psnr, ssim = metrics.psnr(decoded, pixels), metrics.ssim(decoded, pixels)
            parts.append((to_images(decoded), psnr.cpu().numpy(), ssim.cpu().numpy()))
    pictures, psnrs, ssims = zip(*parts, strict=True)
    return np.concatenate(pictures), np.concatenate(psnrs), np.concatenate(ssims)


def _save(vae: Vae, image: np.ndarray, picture: np.ndarray, figures: dict[str, float]) -> None:
    path, hashes = _file(vae, image)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part.png")
    try:
        path.parent.mkdir(exist_ok=True)
        save_picture(part, picture, {**hashes, **figures, "pixel_hash": pixel_hash(Image.fromarray(picture))})
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room, or give a run folder that can be written"
        ) from None
