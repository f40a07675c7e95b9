"""Estimate a cloud job's updates, hours and dollars from a price file that users edit.

torch is imported in the function that counts a model's operations. Importing torch takes seconds, and --help needs no
torch.
"""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from t2i.clouds.staging import ROOT, Command, read_mapping
from t2i.config import DataConfig, DistillConfig, Recipe, TrainConfig
from t2i.config_types import Natural, NonNegative, Positive, checked
from t2i.files import read_json

PRICES = ROOT / "accelerate_configs" / "sagemaker_prices.yaml"
SPOT_SHARE = 0.3  # usual spot price as a share of the price on demand (AWS: "up to 90 %" off)


class Rental(Protocol):
    """The rented machines of a job, as the settings of each cloud describe them."""

    num_machines: int
    mixed_precision: Any  # None: as --inside says
    region: str
    attempts: int  # number of times that the cloud may start a failing job

    @property
    def machine(self) -> str:
        """Return the name that the job's kind of machine has in the price file."""

    @property
    def is_spot(self) -> bool:
        """Return whether the job's machines are spare capacity at a discount."""

    @property
    def max_hours(self) -> float:
        """Return the hours after which the cloud ends the job."""

    @property
    def max_hours_option(self) -> str:
        """Return the key of the cloud's YAML that sets `max_hours`."""


@dataclass
class Measured:
    """A measured training speed of one GPU."""

    million_parameters: Positive  # Size of the measured UNet, in millions of parameters.
    batch: Positive  # Samples per GPU and update.
    precision: str
    samples_per_second: Positive


@dataclass
class Instance:
    """A kind of machine in the price file."""

    usd_per_hour: Positive
    # Number of GPUs of a machine. Without GPUs, the processor computes, and the peaks are the processor's.
    gpus: Natural
    fp16_tflops: Positive  # Peak of one GPU in fp16 and bf16, in TFLOP/s.
    fp32_tflops: Positive
    network_gbps: Positive  # Sustained bandwidth between machines.
    # Measured speed of this machine, used for an equal UNet, batch and precision on one GPU. None if none was measured.
    measured: Measured | None = None


@dataclass
class Prices:
    """The content of the price file."""

    as_of: Any  # Date of the prices in the price file.
    source: str
    utilisation: Annotated[float, Field(gt=0, le=1)]
    overhead_minutes: NonNegative
    instances: dict[str, Instance]
    region: str = "us-east-1"  # Region in which the prices are valid.
    file: str = field(default="", init=False)  # Name of the price file.
    # Prices in USD per hour of machines that the price file lacks, as the cloud tells them.
    others: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def usd_per_hour(self) -> dict[str, float]:
        """Return the price of each kind of machine."""
        return {name: machine.usd_per_hour for name, machine in self.instances.items()}


def read_prices(path: Path = PRICES) -> Prices:
    """Read the price file. Raises `UserError` that names a wrong key."""
    prices: Prices = checked(Prices, read_mapping(path), str(path))
    prices.file = path.name
    return prices


@dataclass
class Estimate:
    """The estimated number of updates, hours and costs of a job. An unknown figure of the estimate is None."""

    updates: int | None = None
    epochs: float | None = None
    images: int | None = None
    global_batch: int | None = None
    samples_per_second: float | None = None
    # How samples_per_second was estimated. The text is empty if the user measured samples_per_second.
    assumed: str = ""
    is_kept: bool = False  # Whether samples_per_second is a kept measurement of the price file.
    hours: float | None = None
    usd_per_hour: float | None = None
    usd: float | None = None  # Cost of the job without the discount of spare capacity.
    usd_at_most: float | None = None  # Cost if the job takes all its `max_hours`.


def estimate(
    command: Command,
    config: Rental,
    inner: dict[str, Any],
    prices: Prices,
    images: int | None,
    samples_per_second: float | None,
) -> Estimate:
    """Estimate the job's number of updates, hours and costs.

    Args:
        command: training script with its arguments.
        config: settings of the job's machines.
        inner: content of the YAML for the containers, from `staging.read_inside`.
        prices: content of the price file.
        images: number of training images, or None if unknown.
        samples_per_second: measured speed of all machines together, or None if unknown.
    """
    result = Estimate(images=images)
    machine = prices.instances.get(config.machine)
    usd = machine.usd_per_hour if machine else prices.others.get(config.machine)
    if usd is not None:
        result.usd_per_hour = usd * config.num_machines
        result.usd_at_most = result.usd_per_hour * config.max_hours * config.attempts
    settings = command.settings
    if command.recipe is None or not isinstance(settings, TrainConfig):
        return result
    if isinstance(settings, DistillConfig):  # its samples are the steps of pictures that the teacher draws
        images = result.images = settings.trajectories * settings.num_inference_steps
    if machine is None:  # its number of GPUs is unknown
        result.updates = settings.max_train_steps
        result.epochs = None if settings.max_train_steps else settings.num_train_epochs
        return result
    processes = config.num_machines * max(1, machine.gpus)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    result.global_batch, result.updates = batch, settings.max_train_steps
    if images:
        result.updates = settings.max_train_steps or max(1, math.ceil(settings.num_train_epochs * images / batch))
        result.epochs = result.updates * batch / images
    else:
        result.epochs = None if settings.max_train_steps else settings.num_train_epochs
    result.samples_per_second = samples_per_second
    pretrained = command.recipe.unet.pretrained_model_name_or_path  # its size is unknown here
    if samples_per_second is None and command.script == "train_unet.py" and not pretrained:
        precision = config.mixed_precision or inner.get("mixed_precision")
        zero = inner.get("distributed_type") == "DEEPSPEED"
        if (speed := _measured(command.recipe, machine, precision)) and processes == 1:
            result.samples_per_second, result.is_kept = speed, True
        else:
            result.samples_per_second, result.assumed = _assume(
                command.recipe, machine, prices.utilisation, config.num_machines, precision in ("fp16", "bf16"), zero
            )
    if result.samples_per_second and result.updates:
        result.hours = result.updates * batch / result.samples_per_second / 3600 + prices.overhead_minutes / 60
        if result.usd_per_hour:
            result.usd = result.hours * result.usd_per_hour
    return result


def _measured(recipe: Recipe, machine: Instance, precision: Any) -> float | None:
    """Return the measured samples per second of the machine, or None if the measurement was of another training."""
    known, settings = machine.measured, recipe.train_unet
    batch = settings.train_batch_size * settings.gradient_accumulation_steps
    if not known or settings.gradient_checkpointing or (known.batch, known.precision) != (batch, precision):
        return None
    same_size = round(unet_size(recipe)[1] / 1e6) == known.million_parameters
    return known.samples_per_second if same_size else None


def _assume(
    recipe: Recipe, machine: Instance, utilisation: float, machines: int, half: bool, zero: bool
) -> tuple[float, str]:
    """Estimate the job's samples per second from the GPU's peak and the network.

    A training sample costs as much as three forward passes, since a backward pass costs two. Gradient checkpointing
    adds a fourth forward pass per sample. ZeRO-2 sends each gradient once per backward pass and each weight once per
    update (Rajbhandari et al., arXiv:1910.02054, section 7). A share of the gradients and weights that ZeRO-2 sends
    stays on the machine. Data parallel training sends each float32 gradient twice per update. The estimate adds the
    times of computing and sending.

    Args:
        half: whether the training computes in fp16 or bf16.
        zero: whether the training runs under ZeRO-2.

    Returns:
        Samples per second of all machines together, and a sentence on how this speed was estimated.
    """
    settings, (flops, parameters) = recipe.train_unet, unet_size(recipe)
    passes = 4 if settings.gradient_checkpointing else 3
    samples = settings.train_batch_size * settings.gradient_accumulation_steps  # samples per GPU and update
    peak = machine.fp16_tflops if half else machine.fp32_tflops
    compute = samples * passes * flops / (peak * 1e12 * utilisation)
    sent = (2 if half else 4) * (settings.gradient_accumulation_steps + 1) if zero else 2 * 4  # bytes per weight
    sending = sent * parameters * (machines - 1) / machines * 8 / (machine.network_gbps * 1e9)
    how = f"an update computes {compute:.2f} s ({passes * flops / 1e9:.1f} GFLOP per sample at {utilisation:.0%} of {peak:g} TFLOPS)"
    if sending:
        how += f" and sends {sending:.2f} s ({sending * machine.network_gbps / 8 * 1000:.0f} MB at {machine.network_gbps:g} Gbit/s)"
    return samples * machines * max(1, machine.gpus) / (compute + sending), how


def unet_size(recipe: Recipe) -> tuple[float, int]:
    """Count the FLOP of one forward pass of the recipe's UNet at batch 1, and its weights.

    Counting allocates no memory for the UNet.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from t2i.models import build_unet

    levels, channels = _vae_size(recipe)
    side = recipe.data.resolution // 2 ** (levels - 1)
    text = (77, 768) if recipe.unet.text_encoder else (recipe.unet.text_max_length, recipe.unet.text_hidden_size)
    with torch.device("meta"):
        unet = build_unet(recipe.unet, side, channels, text[1])
        inputs = torch.empty(1, channels, side, side), torch.empty(1), torch.empty(1, *text)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(*inputs)
    return float(counter.get_total_flops()), sum(parameter.numel() for parameter in unet.parameters())


def _vae_size(recipe: Recipe) -> tuple[int, int]:
    """Return the number of levels and latent channels of the recipe's VAE.

    For a VAE on the Hub, assume 4 levels and 4 latent channels, as in Stable Diffusion.
    """
    if not recipe.vae.vae:
        return len(recipe.vae.vae_channels), recipe.vae.latent_channels
    folder = Path(recipe.vae.vae).expanduser()
    for file in (folder / "config.json", folder / "vae" / "config.json", folder / "pipeline" / "vae" / "config.json"):
        if file.is_file():
            config = read_json(file)
            return len(config.get("block_out_channels") or "1234"), int(config.get("latent_channels") or 4)
    return 4, 4


def count_images(data: DataConfig) -> int | None:
    """Return the number of training images, from the local folder or the Hub's dataset card.

    The result is None if neither the folder nor the card tells the number of images.
    """
    from t2i.data.sources import find_source  # imports datasets, which takes seconds

    name = str(data.dataset)
    counts: dict[str, int]
    if Path(name).expanduser().is_dir():
        source = find_source(data)
        if source.count:
            counts = source.count()
        else:
            with tempfile.TemporaryDirectory() as scratch:
                counts = {split: len(rows) for split, rows in source.open(Path(scratch)).items()}
    elif not name.startswith("s3://"):
        counts = _hub_counts(name, data.dataset_revision)
    else:
        return None
    if not counts.get("train"):
        return None
    count = counts["train"] if "validation" in counts else round(counts["train"] * (1 - data.validation_fraction))
    return min(count, data.max_train_samples or count)


def _hub_counts(name: str, revision: str | None) -> dict[str, int]:
    from huggingface_hub import HfApi

    try:
        card = HfApi().dataset_info(name, revision=revision, timeout=10).card_data
        info = card.to_dict().get("dataset_info") or {} if card else {}
        info = info[0] if isinstance(info, list) else info
        return {split["name"]: int(split["num_examples"]) for split in info["splits"]}
    except Exception:  # a dozen types: no network, no data set, no counts in its card; this is only an estimate
        return {}


def report(estimate: Estimate, command: Command, config: Rental, prices: Prices) -> list[str]:
    """Return the estimate as lines for the terminal."""
    lines, settings = [], command.settings
    what = "steps of the teacher's pictures" if isinstance(settings, DistillConfig) else "images"
    if estimate.updates and estimate.epochs and estimate.images:
        lines.append(
            f"{estimate.updates:,} updates of {estimate.global_batch} samples = "
            f"{estimate.epochs:.1f} epochs of {estimate.images:,} {what}"
        )
    elif estimate.updates:
        lines.append(f"{estimate.updates:,} updates of {estimate.global_batch} samples")
    elif estimate.epochs and estimate.images:
        lines.append(f"{estimate.epochs:g} epochs of {estimate.images:,} {what}")
    elif estimate.epochs:
        lines.append(
            f"{estimate.epochs:g} epochs of an unknown number of images; give --train_images N for an estimate"
        )
    if estimate.samples_per_second and estimate.hours and estimate.updates:
        samples = estimate.updates * (estimate.global_batch or 0)
        given = f"measured, {prices.file}" if estimate.is_kept else "as you measured"
        how = f"assumed: {estimate.assumed}" if estimate.assumed else given
        lines.append(f"{estimate.samples_per_second:.0f} samples/s ({how})")
        lines.append(
            f"{samples:,} samples / {estimate.samples_per_second:.0f} per s + {prices.overhead_minutes:g} min = {estimate.hours:.1f} h"
        )
    if isinstance(settings, DistillConfig):
        drawn, decoder = settings.trajectories + settings.validation_images, settings.decoder_steps != 0
        lines.append(
            f"before the updates, the teacher draws {drawn:,} pictures{' and a tiny decoder may be trained' if decoder else ''}; "
            "the time for this was not measured, so the hours of this plan leave it out"
        )
    if estimate.usd_per_hour is None:
        return [*lines, f"{prices.file} has no price of {config.machine}; add it there for an estimate"]
    spot = config.is_spot
    # Lines are read and quoted alone, so each line with USD names the region of its prices.
    other = config.region != prices.region
    whose = f" at {prices.region}'s prices; {config.region}'s differ" if other else ""
    lines.append(
        f"{config.num_machines} x {config.machine}: {estimate.usd_per_hour:.2f} USD per hour on demand"
        + (f", about {estimate.usd_per_hour * SPOT_SHARE:.2f} on spot" if spot else "")
        + f" (prices of {prices.region}, {prices.as_of}, {prices.file}"
        + (f"; for {config.region}, edit its prices and its region)" if other else ")")
    )
    if estimate.usd:
        lines.append(
            f"{estimate.hours:.1f} h x {estimate.usd_per_hour:.2f} USD = {estimate.usd:.2f} USD on demand"
            + (f", about {estimate.usd * SPOT_SHARE:.2f} on spot" if spot else "")
            + whose
        )
    if config.machine not in prices.instances:
        lines.append(f"{prices.file} has no speed of {config.machine}; add it there for an estimate of the hours")
    ends = f"{config.max_hours_option} {config.max_hours:g} h ends " + (
        "the job" if config.attempts == 1 else f"each of {config.attempts} attempts"
    )
    lines.append(f"at most {estimate.usd_at_most:.2f} USD{whose}: {ends}")
    return lines


def too_long(estimate: Estimate, config: Rental) -> str | None:
    """Return a warning if the cloud would end the job before the training is done, otherwise None."""
    limit, option = config.max_hours, config.max_hours_option
    if estimate.hours and estimate.hours > limit:
        return f"the training takes about {estimate.hours:.1f} h, {option} ends it after {limit:g} h; raise {option} in the YAML"
    return None
