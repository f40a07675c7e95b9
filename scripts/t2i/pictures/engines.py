"""Compiled engines for pictures on a CPU. OpenVINO compiles text encoder, UNet and VAE decoder for static shapes.

Compiled models replace modules of the stock pipeline. With compiled models, prompts, noise, schedule and guidance are
still computed by diffusers. `t2i/pictures/quantization.py` writes compiled models into a pipeline folder (`openvino/`).
Compiled models are valid as long as the weights in the same pipeline folder do not change.
"""

import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.upsampling import Upsample2D
from transformers import CLIPTextConfig, CLIPTokenizer

from t2i import models
from t2i.errors import UserError
from t2i.files import read_json
from t2i.pictures.guide import attach, guide_hash, guide_of, unguided
from t2i.runs import GUIDE, guide_folder

ENGINES = ("auto", "torch", "openvino")
FOLDER = "openvino"  # name of the subfolder in a pipeline folder
_WEIGHTS = {  # each compiled model of any pipeline, and the weights file that it is made from
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae_decoder": "vae/diffusion_pytorch_model.safetensors",
}
BLOBS = Path(".cache") / "openvino"  # compiled models; OpenVINO finds them by model, processor and version
FORMAT = 4  # version of the exported files; files of other versions are not valid
TEXTS_KEPT = 64  # number of encoded prompts; with CLIP ViT-L/14 each takes 0.24 MB
SAMPLE = 1 << 20  # bytes read at each end of a weights file, to tell it from other files


class Network:
    """A compiled model, called with arrays. Calling the compiled model returns its only output as a tensor."""

    def __init__(self, compiled: Any):
        self.request = compiled.create_infer_request()

    def __call__(self, *inputs: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.request.infer(list(inputs))[0])


class Sizes(dict[int, Network]):
    """The compiled networks of one model, by number of samples.

    The network for two samples (one guided picture) is compiled at once, or with a guide that for one. Networks for other
    numbers of samples are compiled at their first use.

    Args:
        model: an OpenVINO model, or its file. The model's file is read at once, because it may change before the first
            use.
        first: number of samples of the network that is compiled at once.
    """

    def __init__(self, model: Any, first: int = 2):
        super().__init__()
        self.kept = isinstance(model, Path)
        self.model = openvino_core().read_model(model) if self.kept else model
        self.__missing__(first)

    def __missing__(self, samples: int) -> Network:
        self[samples] = compile_model(with_samples(self.model, samples), kept=self.kept)
        return self[samples]


class CompiledText(torch.nn.Module):
    """The compiled text encoder, called as the stock one: token ids [B, L] -> (hidden states [B, L, D],).

    The compiled text encoder caches encoded prompts. Every picture needs the empty prompt, and many pictures repeat the
    last prompt.
    """

    def __init__(self, network: Network, config: Any):
        super().__init__()
        self.network, self.config, self.dtype, self.device = network, config, torch.float32, torch.device("cpu")
        self.known: dict[bytes, torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> tuple[torch.Tensor]:
        return (torch.cat([self._encode(row.numpy()) for row in input_ids.split(1)]),)

    def _encode(self, ids: np.ndarray) -> torch.Tensor:
        key = ids.tobytes()
        hidden = self.known.pop(key, None)
        self.known[key] = self.network(ids).clone() if hidden is None else hidden  # the newest comes last
        if len(self.known) > TEXTS_KEPT:
            del self.known[next(iter(self.known))]
        return self.known[key]


class CompiledUnet(torch.nn.Module):
    """The compiled UNet, called as the stock one.

    The UNet maps noisy latents [B, C, h, w], timestep and hidden states [B, L, D] to (prediction,). Each picture is computed
    separately, so that it does not depend on its batch. At each step, a guided picture needs two samples of the UNet, and
    an unguided picture one. With a guide, a guided picture needs one sample of each.

    Args:
        networks: compiled networks by number of samples, as in `Sizes`.
        weights_hash: `models.hash_model` of the UNet that was compiled.

    Attributes:
        pairs: whether two rows of equal noise are one guided picture.
    """

    def __init__(self, networks: dict[int, Any], config: Any, weights_hash: str):
        super().__init__()
        self.weights_hash = weights_hash
        self.networks, self.config, self.dtype, self.device = networks, config, torch.float32, torch.device("cpu")
        self.pairs = True
        self.given = torch.empty(0)  # the last hidden states; `pictures` has the rows and hidden states of each picture
        self.pictures: list[tuple[list[int], np.ndarray]] = []

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor]:
        if self.given is not encoder_hidden_states:  # the tensor stays the same in all steps until guidance ends
            self.given, self.pictures = encoder_hidden_states, self._split(sample, encoder_hidden_states)
        step, made = np.array(float(timestep), np.float32), torch.empty_like(sample)
        for rows, context in self.pictures:
            made[rows] = self.networks[len(rows)](sample[rows].numpy(), step, context)
        return (made,)

    def _split(self, sample: torch.Tensor, hidden: torch.Tensor) -> list[tuple[list[int], np.ndarray]]:
        """Split a batch into pictures: the rows and the hidden states of each picture.

        The batch is split once, not in each denoising step. After work on large tensors, PyTorch's threads spin and
        compete with OpenVINO's threads.
        """
        half = len(sample) // 2
        # Each half of a guided batch has one row per prompt.
        guided = self.pairs and len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])
        rows = [[row, row + half] for row in range(half)] if guided else [[row] for row in range(len(sample))]
        return [(some, hidden[some].numpy()) for some in rows]


class CompiledVae(torch.nn.Module):
    """The compiled VAE decoder, called as the stock one: raw latents [B, C, h, w] -> (pixels [B, 3, R, R] in [-1, 1],)."""

    def __init__(self, network: Network, config: Any):
        super().__init__()
        self.network, self.config, self.dtype, self.device = network, config, torch.float32, torch.device("cpu")

    def decode(self, latents: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
        return (torch.cat([self.network(row.numpy()) for row in latents.split(1)]),)


class _Text(torch.nn.Module):
    def __init__(self, text_encoder: Any):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(input_ids)[0]


class _Unet(torch.nn.Module):
    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _Decoder(torch.nn.Module):
    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


def is_installed() -> bool:
    """Return whether OpenVINO can be imported. Training does not need OpenVINO."""
    from importlib.util import find_spec

    return find_spec("openvino") is not None


def is_exported(folder: Path) -> bool:
    """Return whether a pipeline folder has compiled models that were made from its present weights."""
    files = [folder / FOLDER / f"{name}{suffix}" for name in weight_files(folder) for suffix in (".xml", ".bin")]
    try:
        known = read_json(folder / FOLDER / "engine.json")
        fresh = known.get("format") == FORMAT and known.get("weights") == weight_fingerprints(folder)
        return fresh and all(file.is_file() for file in files)
    except (UserError, OSError, AttributeError):
        return False


def load_exported(folder: Path) -> StableDiffusionPipeline:
    """Load the stock pipeline with the compiled models in `folder`.

    The weights of the stock pipeline's modules are not read.
    """
    networks = compile_models({name: folder / FOLDER / f"{name}.xml" for name in weight_files(folder)})
    known = read_json(folder / FOLDER / "engine.json")
    return _pipeline(
        networks, (known["unet_hash"], known.get("guide_hash")), CLIPTextConfig.from_pretrained(folder / "text_encoder"),
        UNet2DConditionModel.load_config(folder / "unet"), AutoencoderKL.load_config(folder / "vae"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"), _scheduler(folder),
    )  # fmt: skip


def compile_pipeline(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Return a pipeline whose modules are compiled in memory. Compiling a pipeline takes some seconds."""
    return wrap_networks(pipeline, compile_models(convert(pipeline)))


def wrap_networks(pipeline: StableDiffusionPipeline, networks: dict[str, Any]) -> StableDiffusionPipeline:
    """Return a pipeline of compiled networks, with the tokenizer, scheduler and configs of `pipeline`.

    Args:
        networks: compiled networks by name, as `compile_models` returns them.
    """
    return _pipeline(
        networks, (models.hash_model(unguided(pipeline.unet)), guide_hash(pipeline.unet)),
        pipeline.text_encoder.config, pipeline.unet.config, pipeline.vae.config,
        pipeline.tokenizer, pipeline.scheduler,
    )  # fmt: skip


@torch.no_grad()
def convert(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """Return the parts of a pipeline as OpenVINO models by name.

    The UNet and its guide as OpenVINO models take any number of samples, the other parts take one.
    """
    openvino = import_openvino()
    unet, guide, text = unguided(pipeline.unet).eval(), guide_of(pipeline.unet), pipeline.text_encoder.eval()
    side, channels, length = unet.config.sample_size, unet.config.in_channels, pipeline.tokenizer.model_max_length
    latents = torch.zeros(2, channels, side, side)
    ids = torch.zeros(1, length, dtype=torch.int64)
    context = torch.zeros(2, length, unet.config.cross_attention_dim)
    given = {
        "text_encoder": (_Text(text), (ids,), 1),
        "unet": (_Unet(unet), (latents, torch.tensor(1.0), context), -1),
        **({GUIDE: (_Unet(guide), (latents, torch.tensor(1.0), context), -1)} if guide else {}),
        "vae_decoder": (_Decoder(pipeline.vae.eval()), (latents[:1],), 1),
    }
    with (
        warnings.catch_warnings(),
        patch.object(Upsample2D, "forward", _upsample),
        patch.object(torch, "chunk", _chunk),
    ):
        # tracing warns that it treats the shape as a constant, and the shape is constant here
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return {
            name: openvino.convert_model(
                module,
                example_input=example,
                input=[openvino.PartialShape([samples, *one.shape[1:]] if one.ndim else []) for one in example],
            )
            for name, (module, example, samples) in given.items()
        }


_stock_upsample = Upsample2D.forward


def _upsample(
    self: Upsample2D, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **options: Any
) -> torch.Tensor:
    """Upsample as diffusers does, with 4/9 of its multiplications: [B, C, h, w] -> [B, C, 2h, 2w].

    Nearest-neighbour upsampling repeats each pixel in a 2 x 2 block. After the upsampling, two rows or columns of a 3 x
    3 convolution's weights meet the same repeated pixel, and can be added beforehand. Upsampling and convolution
    together equal four 2 x 2 convolutions, one per place in the 2 x 2 block.
    """
    convolution = getattr(self, "conv", None)
    stock = self.norm is not None or not self.interpolate or output_size is not None
    if stock or not isinstance(convolution, torch.nn.Conv2d) or convolution.kernel_size != (3, 3):
        return _stock_upsample(self, hidden_states, output_size, *args, **options)
    blocks = []
    for y, rows in enumerate(_pairs(convolution.weight, 2)):
        for x, weight in enumerate(_pairs(rows, 3)):
            padded = torch.nn.functional.pad(hidden_states, (1 - x, x, 1 - y, y))
            blocks.append(torch.nn.functional.conv2d(padded, weight, convolution.bias))
    return torch.nn.functional.pixel_shuffle(torch.stack(blocks, 2).flatten(1, 2), 2)


_stock_chunk = torch.chunk


def _chunk(values: torch.Tensor, chunks: int, dim: int = 0) -> Sequence[torch.Tensor]:
    """Split a tensor as torch does. A tensor [B, C, 1, 1] is split as [B, C].

    UNets with `scale_shift` split their embedding of the timestep so. OpenVINO 2026.4.1 crashes in float32, while it
    compiles a group normalisation whose scale and shift come from one split of four dimensions.
    """
    if dim != 1 or values.ndim != 4 or values.shape[2:] != (1, 1):
        return _stock_chunk(values, chunks, dim)
    return [part[:, :, None, None] for part in _stock_chunk(values.flatten(1), chunks, 1)]


def _pairs(weight: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a convolution's three weights along `dim` to two pairs: (before, here) for even pixels, and (here, after) for
    odd pixels.
    """
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


def compile_models(models: dict[str, Any]) -> dict[str, Any]:
    """Compile the OpenVINO models of a pipeline, given by name.

    The UNet and its guide become networks by number of samples (`Sizes`).
    """
    first = 1 if GUIDE in models else 2
    return {
        name: Sizes(model, first) if name in ("unet", GUIDE) else compile_model(model) for name, model in models.items()
    }


def compile_model(model: Any, kept: bool = False) -> Network:
    """Compile a model, in bf16 if the processor computes in it, else in float32.

    Args:
        model: an OpenVINO model, or its file.
        kept: whether OpenVINO caches the compiled model on disk. A model from a file is always cached.
    """
    core = openvino_core()
    in_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32"}
    if kept or isinstance(model, Path):
        options["CACHE_DIR"] = str(BLOBS)
    return Network(core.compile_model(model, "CPU", options))


def compile_module(module: torch.nn.Module, example: torch.Tensor) -> Any:
    """Compile a torch module of one input in float32. The compiled module takes arrays with any number of samples.

    Args:
        module: the torch module in eval mode.
        example: an example of the module's input, [1, ...].
    """
    openvino = import_openvino()
    model = openvino.convert_model(module, example_input=example)
    model.reshape([-1, *example.shape[1:]])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return openvino_core().compile_model(model, "CPU", options)


def with_samples(model: Any, samples: int) -> Any:
    """Return a copy of a model that takes exactly this number of samples.

    A fixed number of samples makes the model faster.
    """
    openvino, model = import_openvino(), model.clone()
    shapes = {one: one.partial_shape for one in model.inputs if one.partial_shape.is_dynamic}
    model.reshape({one: openvino.PartialShape([samples, *list(shape)[1:]]) for one, shape in shapes.items()})
    return model


def _pipeline(
    networks: dict[str, Any],
    hashes: tuple[str, str | None],
    text: Any,
    unet: Any,
    vae: Any,
    tokenizer: Any,
    scheduler: Any,
) -> StableDiffusionPipeline:
    pipeline = models.build_pipeline(
        CompiledVae(networks["vae_decoder"], FrozenDict(vae)),
        CompiledText(networks["text_encoder"], text),
        tokenizer,
        CompiledUnet(networks["unet"], FrozenDict(unet), hashes[0]),
        scheduler,
    )
    guide = CompiledUnet(networks[GUIDE], FrozenDict(unet), str(hashes[1])) if GUIDE in networks else None
    return attach(pipeline, guide)


def _scheduler(folder: Path) -> Any:
    """Load the scheduler with which the pipeline in `folder` was saved."""
    name = StableDiffusionPipeline.load_config(folder)["scheduler"][1]
    return getattr(diffusers, name).from_pretrained(folder / "scheduler")


def weight_files(folder: Path) -> dict[str, str]:
    """Return each model of a pipeline folder that is compiled, and the weights file that it is made from."""
    return _WEIGHTS | ({GUIDE: f"{GUIDE}/diffusion_pytorch_model.safetensors"} if guide_folder(folder) else {})


def weight_fingerprints(folder: Path) -> dict[str, str]:
    """Return the size of each weights file of a pipeline, and a hash of the file's two ends, by model.

    Any training changes the ends of a weights file.
    """
    found = {}
    for name, path in weight_files(folder).items():
        with open(folder / path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
        found[name] = f"{size}-{digest.hexdigest()[:16]}"
    return found


@cache
def openvino_core() -> Any:
    """Return OpenVINO's one `Core` of this process.

    Each OpenVINO core gives the thread that makes the core a stack for signals. If another thread drops the core's last
    model, OpenVINO frees that stack for signals while it is in use. With a freed stack, the next signal, such as
    Ctrl-C, would kill the process. To avoid this crash, OpenVINO's core is never dropped.
    """
    return import_openvino().Core()


def import_openvino() -> Any:
    """Return the module `openvino`.

    Raises:
        UserError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise UserError(
            "engine openvino is not installed; run: pip install -r requirements.txt, or take --engine torch"
        ) from None
    return openvino
