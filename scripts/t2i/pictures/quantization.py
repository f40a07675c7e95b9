"""Export a pipeline's networks for OpenVINO, with 8-bit convolutions if measured pictures stay nearly the same.

NNCF, OpenVINO's own quantiser, rounds the inputs of the convolutions in the UNet and the VAE's decoder. NNCF measures
the ranges of the convolutions' inputs on a few pictures. Sums, normalisation and attention are not rounded to 8 bits.
With the timestep or the residual stream in 8 bits too, the demo's pictures fell to 12 dB PSNR against the stock
pictures. With only the convolutions in 8 bits, the demo's pictures stay above 35 dB.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from t2i.data.caches import to_pixels
from t2i.errors import UserError
from t2i.evaluation.metrics import psnr
from t2i.files import read_object, sha256_file, write_json
from t2i.models import hash_model
from t2i.pictures import engines, sampling
from t2i.pictures.engines import Sizes, compile_model, compile_models
from t2i.pictures.guide import guide_hash, unguided
from t2i.pictures.png import student_steps
from t2i.runs import GUIDE

LEAST_DB = 38.0  # lowest PSNR allowed in a few pictures; the lowest in many pictures is then above 35
PARTS = ("vae_decoder", "unet")  # the text encoder has no convolutions; in 8 bits it changed pictures to 31 dB
PROMPTS = (
    "a red flower", "a white flower with a golden center", "a sunflower in a meadow", "purple petals at night",
    "a photo of a pink rose", "five round petals", "a blue flower with a green center, under a clear sky", "a daisy",
    "an orange lily with spotted petals", "a field of yellow tulips", "a close-up of a burgundy dahlia", "a bud and leaves",
)  # fmt: skip
COMPARED = 4  # number of compared pictures; they have the first prompts
STEPS = 30  # steps of the compared pictures; a student draws them in its own number of steps
MORE_STEPS = 10  # steps of one picture per prompt, which also serves to measure the ranges
EVERY = 6  # one of so many calls of the UNet is recorded
KEPT_TYPES = (
    "Add", "Subtract", "Multiply", "Power", "Concat", "Unsqueeze", "MatMul", "Softmax", "ScaledDotProductAttention",
    "GroupNormalization", "MVN", "Interpolate", "Pad", "DepthToSpace", "Transpose", "Reshape", "Sin", "Cos", "VariadicSplit", "Gelu",
)  # fmt: skip
KEPT_PLACES = (".*conv_in.*", ".*conv_out.*", ".*time_emb.*")  # these are small, and everything passes through them


def is_current(folder: Path, guidance_scale: float) -> bool:
    """Return whether a folder has undamaged compiled models of its weights, by this version of OpenVINO.

    Args:
        folder: pipeline folder.
        guidance_scale: as for `export`.
    """
    if not engines.is_exported(folder):
        return False
    known = read_object(folder / engines.FOLDER / "engine.json")
    made_by = (known.get("openvino"), known.get("guidance_scale"))
    is_same = made_by == (engines.import_openvino().__version__, guidance_scale) and {"int8", "psnr_db"} <= known.keys()
    return is_same and known.get("files") == _file_hashes(folder / engines.FOLDER)


def _file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of compiled models, by name."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.suffix in (".xml", ".bin")}


def export(pipeline: StableDiffusionPipeline, folder: Path, guidance_scale: float) -> Path:
    """Write the compiled models of `pipeline` into its pipeline folder.

    Older compiled models in the folder are replaced at the end.

    Args:
        folder: pipeline folder from which `pipeline` was loaded.
        guidance_scale: guidance scale of the pictures that decide which parts compute in 8 bits.

    Returns:
        Folder of the compiled models.

    Raises:
        UserError: OpenVINO or NNCF is not installed.
    """
    openvino = engines.import_openvino()
    made, int8, decibels = quantise(
        engines.convert(pipeline), lambda networks: engines.wrap_networks(pipeline, networks), guidance_scale
    )
    part = folder / f".{engines.FOLDER}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        for name, model in made.items():  # float16 halves the size of the files
            openvino.save_model(model, part / f"{name}.xml", compress_to_fp16=True)
        identity = {
            "format": engines.FORMAT,
            "weights": engines.weight_fingerprints(folder),
            "unet_hash": hash_model(unguided(pipeline.unet)),
            "guide_hash": guide_hash(pipeline.unet),
        }
        made_by = {"openvino": openvino.__version__, "guidance_scale": guidance_scale, "files": _file_hashes(part)}
        write_json(part / "engine.json", {**identity, **made_by, "int8": int8, "psnr_db": decibels})
        shutil.rmtree(folder / engines.FOLDER, ignore_errors=True)
        os.replace(part, folder / engines.FOLDER)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder / engines.FOLDER


def quantise(
    models: dict[str, Any], build: Callable[[dict[str, Any]], Any], guidance_scale: float
) -> tuple[dict[str, Any], list[str], float | None]:
    """Quantise a pipeline's parts to 8 bits, if pictures stay nearly the same.

    A part of the pipeline stays quantised if pictures of `PROMPTS` reach a PSNR of `LEAST_DB` against pictures without
    8 bits.

    Args:
        models: OpenVINO models by name, as `engines.convert` returns them.
        build: function that makes a pipeline from compiled networks, given by name.
        guidance_scale: guidance scale of the pictures that are compared.

    Returns:
        The models by name, the names of the quantised models, and the PSNR of the worst picture in dB. The PSNR of the
            worst picture is None if no model was quantised.

    Raises:
        UserError: NNCF is not installed.
    """
    nncf = _nncf()
    networks = compile_models(models)
    guides = [GUIDE] if GUIDE in models else []
    samples = 2 if guidance_scale > 1 and not guides else 1  # A guide leaves one sample to the UNet.
    watched = {
        "vae_decoder": _Watched(networks["vae_decoder"], 1),
        **{name: _Watched(networks[name][samples], EVERY) for name in ("unet", *guides)},
    }
    pipeline = build({**networks, **watched, **{name: {samples: watched[name]} for name in ("unet", *guides)}})
    steps, more_steps = STEPS, MORE_STEPS
    if student := student_steps(pipeline.scheduler.config):
        steps, more_steps, watched["unet"].every = student, student, 1
    wanted = _draw(pipeline, COMPARED, guidance_scale, steps)
    _draw(pipeline, len(PROMPTS), guidance_scale, more_steps)
    made, int8, worst = dict(models), [], None
    scope = nncf.IgnoredScope(types=list(KEPT_TYPES), patterns=list(KEPT_PLACES), validate=False)
    for name in (*PARTS, *(guides if guidance_scale > 1 else [])):
        seen = watched[name].seen
        rounded = nncf.quantize(
            models[name],
            nncf.Dataset(seen),
            subset_size=len(seen),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=scope,
        )
        tried = {**networks, name: compile_model(rounded) if name == "vae_decoder" else Sizes(rounded, samples)}
        drawn = _draw(build(tried), COMPARED, guidance_scale, steps)
        # equal pictures have an infinite PSNR
        decibels = psnr(to_pixels(wanted), to_pixels(drawn)).min().clamp(max=100.0).item()
        if decibels >= LEAST_DB:
            networks, worst = tried, round(decibels, 1)
            made[name] = rounded
            int8.append(name)
    return made, int8, worst


class _Watched:
    """A network that records the inputs of every `every`-th call."""

    def __init__(self, network: Any, every: int):
        self.network, self.every, self.calls = network, every, 0
        self.seen: list[dict[int, np.ndarray]] = []

    def __call__(self, *inputs: np.ndarray) -> torch.Tensor:
        if self.calls % self.every == 0:
            self.seen.append({number: np.array(value) for number, value in enumerate(inputs)})
        self.calls += 1
        return self.network(*inputs)


def _draw(pipeline: Any, count: int, guidance_scale: float, steps: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return sampling.generate(
        pipeline, PROMPTS[:count], range(count), guidance_scale=guidance_scale, num_inference_steps=steps, batch_size=1, progress=False
    )  # fmt: skip


def _nncf() -> Any:
    try:
        import nncf
    except ImportError:
        raise UserError("NNCF, which compiles models, is not installed; run: pip install -r requirements.txt") from None
    nncf.set_log_level(logging.ERROR)
    return nncf
