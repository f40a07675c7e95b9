"""What a cloud job will take: updates, hours and dollars, counted from a price file that users edit."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from t2i.clouds.staging import ROOT, Command, read_mapping
from t2i.config import DataConfig, Natural, NonNegative, Positive, Recipe, TrainConfig, checked
from t2i.files import read_json

PRICES = ROOT / "accelerate_configs" / "sagemaker_prices.yaml"  # of the one cloud that has prices so far
SPOT_SHARE = 0.3  # of the price on demand, that spot often costs (AWS: "up to 90 %" off)


class Rental(Protocol):
    """The machines of a job, as each cloud's own settings describe them."""

    num_machines: int
    mixed_precision: Any  # None: as the YAML inside says
    region: str

    @property
    def machine(self) -> str:
        """Name of the machine in the price file."""

    @property
    def is_spot(self) -> bool:
        """Whether the machines are spare capacity at a discount."""

    @property
    def max_hours(self) -> float:
        """Hours after which the cloud ends the job."""

    @property
    def max_hours_option(self) -> str:
        """Key of the cloud's YAML that sets `max_hours`."""


@dataclass
class Instance:
    """A machine of the price file."""

    usd_per_hour: Positive
    gpus: Natural  # 0: it computes on its processor, and so do the peaks
    fp16_tflops: Positive  # peak of one GPU, for bf16 as well
    fp32_tflops: Positive
    network_gbps: Positive  # sustained, between machines


@dataclass
class Prices:
    """The price file."""

    as_of: Any  # a date
    source: str
    utilisation: Annotated[float, Field(gt=0, le=1)]
    overhead_minutes: NonNegative
    instances: dict[str, Instance]
    region: str = "us-east-1"  # whose prices these are
    file: str = field(default="", init=False)  # name of the price file


def read_prices(path: Path = PRICES) -> Prices:
    """Read the price file. Raises `UserError` naming the key that cannot be used."""
    prices: Prices = checked(Prices, read_mapping(path), str(path))
    prices.file = path.name
    return prices


@dataclass
class Estimate:
    """Lengths and costs; None where something is not known."""

    updates: int | None = None
    epochs: float | None = None
    images: int | None = None
    global_batch: int | None = None
    samples_per_second: float | None = None
    assumed: str = ""  # how samples_per_second came about; empty: as the user measured
    hours: float | None = None
    usd_per_hour: float | None = None
    usd: float | None = None  # on demand
    usd_at_most: float | None = None  # for max_run


def estimate(
    command: Command,
    config: Rental,
    inner: dict[str, Any],
    prices: Prices,
    images: int | None,
    samples_per_second: float | None,
) -> Estimate:
    """What the job takes. inner: the YAML that holds in the containers; images: that are trained on; samples_per_second:
    of the whole job, as measured; each of both or None.
    """
    result = Estimate(images=images)
    machine = prices.instances.get(config.machine)
    if machine:
        result.usd_per_hour = machine.usd_per_hour * config.num_machines
        result.usd_at_most = result.usd_per_hour * config.max_hours
    settings = command.settings
    if command.recipe is None or not isinstance(settings, TrainConfig):
        return result
    if machine is None:  # nobody knows how many GPUs it has
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
    named = command.recipe.unet.pretrained_model_name_or_path  # of a size that is not known here
    if samples_per_second is None and command.script == "train_unet.py" and not named:
        precision = config.mixed_precision or inner.get("mixed_precision")
        zero = inner.get("distributed_type") == "DEEPSPEED"
        result.samples_per_second, result.assumed = _assume(
            command.recipe, machine, prices.utilisation, config.num_machines, precision in ("fp16", "bf16"), zero
        )
    if result.samples_per_second and result.updates:
        result.hours = result.updates * batch / result.samples_per_second / 3600 + prices.overhead_minutes / 60
        if result.usd_per_hour:
            result.usd = result.hours * result.usd_per_hour
    return result


def _assume(
    recipe: Recipe, machine: Instance, utilisation: float, machines: int, half: bool, zero: bool
) -> tuple[float, str]:
    """Samples a second of the job, counted from the GPU's peak and the network, and how. half: fp16 or bf16.

    A sample costs three forward passes (the backward pass counts for two), four with gradient checkpointing. ZeRO-2 sends
    each gradient at each backward pass and each weight once an update, less the share that stays (Rajbhandari et al.,
    arXiv:1910.02054, section 7); data parallel training sends float32 gradients to and fro once an update. Computing and sending
    are taken one after the other.
    """
    settings, (flops, parameters) = recipe.train_unet, unet_size(recipe)
    passes = 4 if settings.gradient_checkpointing else 3
    own = settings.train_batch_size * settings.gradient_accumulation_steps  # samples of a GPU and update
    peak = machine.fp16_tflops if half else machine.fp32_tflops
    compute = own * passes * flops / (peak * 1e12 * utilisation)
    sent = (2 if half else 4) * (settings.gradient_accumulation_steps + 1) if zero else 2 * 4  # bytes a weight
    sending = sent * parameters * (machines - 1) / machines * 8 / (machine.network_gbps * 1e9)
    said = f"an update computes {compute:.2f} s ({passes * flops / 1e9:.1f} GFLOP a sample at {utilisation:.0%} of {peak:g} TFLOPS)"
    if sending:
        said += f" and sends {sending:.2f} s ({sending * machine.network_gbps / 8 * 1000:.0f} MB at {machine.network_gbps:g} Gbit/s)"
    return own * machines * max(1, machine.gpus) / (compute + sending), said


def unet_size(recipe: Recipe) -> tuple[float, int]:
    """FLOP of one forward pass of the recipe's UNet at batch 1, and its number of weights; nothing is allocated."""
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
    """Levels and latent channels of the recipe's VAE; one that is not here is taken for Stable Diffusion's, 4 and 4."""
    if not recipe.vae.vae:
        return len(recipe.vae.vae_channels), recipe.vae.latent_channels
    folder = Path(recipe.vae.vae).expanduser()
    for file in (folder / "config.json", folder / "vae" / "config.json", folder / "pipeline" / "vae" / "config.json"):
        if file.is_file():
            config = read_json(file)
            return len(config.get("block_out_channels") or "1234"), int(config.get("latent_channels") or 4)
    return 4, 4


def count_images(data: DataConfig) -> int | None:
    """Images that a training on `data` sees an epoch, from its folder here or the Hub's card; None where neither tells."""
    import tempfile

    from t2i.data.sources import find_source

    name = str(data.dataset)
    counts: dict[str, int]
    if Path(name).expanduser().is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            counts = {split: len(rows) for split, rows in find_source(data).open(Path(scratch)).items()}
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
    except Exception:  # no network, no such data set, no counts in its card: a dozen types, and only an estimate
        return {}


def report(found: Estimate, command: Command, config: Rental, prices: Prices) -> list[str]:
    """The estimate in lines for people."""
    lines = []
    if found.updates and found.epochs and found.images:
        lines.append(
            f"{found.updates:,} updates of {found.global_batch} samples = {found.epochs:.1f} epochs of {found.images:,} images"
        )
    elif found.updates:
        lines.append(f"{found.updates:,} updates of {found.global_batch} samples")
    elif found.epochs:
        lines.append(
            f"{found.epochs:g} epochs; how many images that is cannot be counted from here: give --train_images N"
        )
    if found.samples_per_second and found.hours and found.updates:
        samples = found.updates * (found.global_batch or 0)
        how = f"assumed: {found.assumed}" if found.assumed else "as you measured"
        lines.append(f"{found.samples_per_second:.0f} samples/s ({how})")
        lines.append(
            f"{samples:,} samples / {found.samples_per_second:.0f} per s + {prices.overhead_minutes:g} min = {found.hours:.1f} h"
        )
    if found.usd_per_hour is None:
        return [*lines, f"no price of {config.machine} in {prices.file}; add it there for an estimate"]
    spot = config.is_spot
    # each line with USD says whose prices these are, as lines are read and quoted alone
    other = config.region != prices.region
    whose = f" at {prices.region}'s prices; {config.region}'s differ" if other else ""
    lines.append(
        f"{config.num_machines} x {config.machine}: {found.usd_per_hour:.2f} USD an hour on demand"
        + (f", about {found.usd_per_hour * SPOT_SHARE:.2f} on spot" if spot else "")
        + f" (prices of {prices.region}, {prices.as_of}, {prices.file}"
        + (f"; for {config.region} edit it, its region as well)" if other else ")")
    )
    if found.usd:
        lines.append(
            f"{found.hours:.1f} h x {found.usd_per_hour:.2f} USD = {found.usd:.2f} USD on demand"
            + (f", about {found.usd * SPOT_SHARE:.2f} on spot" if spot else "")
            + whose
        )
    lines.append(
        f"at most {found.usd_at_most:.2f} USD{whose}: {config.max_hours_option} {config.max_hours:g} h ends the job"
    )
    return lines


def too_long(found: Estimate, config: Rental) -> str | None:
    """What to say where the job would not be done in max_run; None where it would, or nothing is known."""
    limit, option = config.max_hours, config.max_hours_option
    if found.hours and found.hours > limit:
        return f"the training takes about {found.hours:.1f} h, {option} ends it after {limit:g} h; raise {option} in the YAML"
    return None
