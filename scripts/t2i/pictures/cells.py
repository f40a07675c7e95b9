"""Pictures of grids, each made once: a content-addressed store in the run folder. Imports no torch before one has to be drawn.

`<run>/cells/<key>.png`: the key is the hash of all that decides the picture (the model's weights, prompt, seed and settings), so a
picture is the same cell whichever grid or command asked for it. Each is written whole the moment it is made. A picture that was
watched while it was drawn has some of its steps beside it, as one picture from left to right: `<key>.steps.png`.
"""

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from PIL import Image

from t2i.config_types import MAX_GUIDANCE
from t2i.errors import UserError
from t2i.files import hash_files, hash_json, read_json, read_object
from t2i.pictures.png import (
    DAMAGE,
    SCHEDULERS,
    guided_steps,
    pixel_hash,
    read_parameters,
    save_picture,
    scheduler_problem,
)
from t2i.runs import checkpoint_folders

if TYPE_CHECKING:
    import numpy as np

STORE = "cells"  # folder of a run
MAX_CELLS = 10_000  # of a plan
MAX_SIDE = 4096  # pixels; a larger picture in a store is foreign
STEPS = 6  # of a watched picture, the finished one among them: decoding one costs as much as several denoising steps
KEPT = 500  # watched pictures of a store; strangers may type any prompts, and the disk must not fill
AXES = ("checkpoint", "run", "guidance_scale", "num_inference_steps", "guidance_end", "scheduler", "seed", "prompt",
        "negative_prompt", "sample")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One picture's prompt and settings, without the model; raises `UserError` for a value that no picture has.

    seed: 0 to 2**63 - 1. guidance_scale: 0 to 1000. num_inference_steps: 1 to 1000. scheduler: a key of
    `pictures.SCHEDULERS` or a class name of diffusers; kept as the class name. guidance_end: 0 to 1, the share of the steps,
    from the first on, that are guided.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    guidance_scale: float = 7.5
    num_inference_steps: int = 30
    scheduler: str = "DDIMScheduler"
    guidance_end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"{name} is no text that can be stored (a lone surrogate, or no text); type it anew")
        for name in ("seed", "num_inference_steps"):  # 1.0 and True would be other keys for the same picture
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name} {str(getattr(self, name))[:40]} is not a whole number; give one such as 1")
        for name, usual in (("guidance_scale", 7.5), ("guidance_end", 1.0)):
            if type(getattr(self, name)) not in (int, float):
                raise UserError(f"{name} {str(getattr(self, name))[:40]} is not a number; give one such as {usual}")
        known = SCHEDULERS.get(self.scheduler.lower(), self.scheduler)
        if known not in SCHEDULERS.values() and not re.fullmatch(r"\w{1,80}Scheduler", known):
            raise UserError(f"unknown scheduler {self.scheduler[:40]!r}; take one of {', '.join(SCHEDULERS)}")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise UserError(
                f"guidance_scale {self.guidance_scale} is no scale; give 0 to {MAX_GUIDANCE:g}, such as 7.5"
            )
        if not 0 <= self.guidance_end <= 1:
            raise UserError(f"guidance_end {self.guidance_end} is no share of the steps; give 0 to 1, such as 0.5")
        if not 1 <= self.num_inference_steps <= 1000:
            raise UserError(f"num_inference_steps {self.num_inference_steps} is out of bounds; give 1 to 1000")
        if known == "PNDMScheduler" and self.num_inference_steps < 4:  # it starts with four steps; fewer crash in it
            raise UserError(f"num_inference_steps {self.num_inference_steps} is too few for pndm; give 4 or more")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is out of bounds; give 0 to {2**63 - 1}")
        object.__setattr__(self, "scheduler", known)
        for name in ("guidance_scale", "guidance_end"):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)  # 7 is 7.0, and -0.0 is 0.0

    @property
    def samples(self) -> int:
        """How many the UNet computes for it, which its time grows with: two in a guided step, one in any other."""
        guided = guided_steps(self.num_inference_steps, self.guidance_end) if self.guidance_scale > 1 else 0
        return self.num_inference_steps + guided

    def settings(self) -> dict[str, Any]:
        """What the picture is known by: its fields, without a guidance that never ends, as it was before one could."""
        known = asdict(self)
        return known if self.guidance_end < 1 else {key: value for key, value in known.items() if key != "guidance_end"}


@dataclass(frozen=True)
class Axis:
    """A dimension of a grid: one of `AXES` and its values.

    checkpoint: folder names within the run ("checkpoint-000500", "pipeline"); run: run folders (`Path`); sample: pairs of
    a prompt and its seed, as evaluate_checkpoints.py draws them; the others: values of the field of `Cell`.
    """

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Place:
    """A cell's place in a grid: `at` is (tab, row, column).

    problem: one sentence why there can be no picture (its model is not there); `model_hash` is "" then.
    """

    at: tuple[int, int, int]
    run: Path
    checkpoint: str
    model_hash: str
    cell: Cell
    made: bool
    problem: str | None = None

    @property
    def path(self) -> Path:
        """Where its picture is, or will be."""
        return cell_path(self.run, self.model_hash, self.cell)


# --- What a model is -------------------------------------------------------------------------------------------------


def weights_hash(folder: Path, weights: str = "ema") -> str:
    """16 hex digits for all that decides a model's pictures: UNet, VAE, text encoder, tokenizer and noise schedule.

    Args:
        folder: a checkpoint of a run, its `pipeline/`, or any pipeline folder. A checkpoint's UNet is known by its
            manifest, a finished run's pipeline by run.json; other files are read once, and known by size and time after.
        weights: "ema" or "raw", of a checkpoint.

    Raises:
        UserError: the folder is neither, or is not whole.
    """
    if (folder / "model_index.json").is_file():
        run = _run_json(folder.parent) if folder.name == "pipeline" else {}
        if run.get("status") == "finished" and run.get("output_unet_hash"):
            return hash_json({"unet": run["output_unet_hash"], **_shared(folder, run)})
        return hash_json({"unet": hash_files(folder / "unet"), **_shared(folder, run)})
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is neither a whole checkpoint nor a pipeline; take one that training has finished")
    try:
        files = read_json(folder / "manifest.json")["files"]
        part = "unet_ema" if weights == "ema" and any(name.startswith("unet_ema/") for name in files) else "unet"
        unet = {name.split("/", 1)[1]: known["sha256"] for name, known in files.items() if name.startswith(f"{part}/")}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'manifest.json'} is damaged; restore it from a copy") from None
    if not unet:
        raise UserError(f"{folder / 'manifest.json'} names no UNet; restore the checkpoint from a copy")
    return hash_json({"unet": unet, **_shared(folder.parent / "pipeline", _run_json(folder.parent))})


def _run_json(run: Path) -> dict[str, Any]:
    found = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    return found if isinstance(found, dict) else {}


def _shared(pipeline: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What all checkpoints of a run draw with; a run's identity never changes, and names it by hashes."""
    names = {"vae": "vae_hash", "text_encoder": "text_encoder_hash", "tokenizer": "tokenizer_hash"}
    identity = run.get("identity")
    identity = identity if isinstance(identity, dict) else {}
    parts = {part: identity.get(key) or hash_files(pipeline / part) for part, key in names.items()}
    return parts | {"scheduler": hash_files(pipeline / "scheduler")}


# --- The store -------------------------------------------------------------------------------------------------------


def cell_path(run: Path, model_hash: str, cell: Cell) -> Path:
    """`<run>/cells/<key>.png`."""
    return run / STORE / f"{hash_json({'model_hash': model_hash, **cell.settings()})}.png"


def read_cell(run: Path, model_hash: str, cell: Cell) -> Image.Image | None:
    """The picture of a cell, RGB; None where there is none, or a damaged, changed or foreign one."""
    found = _read(cell_path(run, model_hash, cell), model_hash, cell)
    return found[0] if found else None


def _read(
    path: Path, model_hash: str, cell: Cell, longest: int = MAX_SIDE
) -> tuple[Image.Image, dict[str, Any]] | None:
    """A picture of the store and its parameters, if they are whole and the cell's own."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "RGB" or max(image.size) > longest or image.height > MAX_SIDE:
                return None
            image.load()
            known = json.loads(image.info["parameters"])
            wanted = {"model_hash": model_hash, "pixel_hash": pixel_hash(image), **cell.settings()}
            same = isinstance(known, dict) and all(known.get(key) == value for key, value in wanted.items())
            return (image.copy(), known) if same else None
    except DAMAGE:
        return None


def is_made(run: Path, model_hash: str, cell: Cell) -> bool:
    """Whether `read_cell` gives a picture; a file that did not change since is not decoded again."""
    try:
        stat = cell_path(run, model_hash, cell).stat()
    except OSError:
        return False
    return _checked(run, model_hash, cell, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=65536)
def _checked(run: Path, model_hash: str, cell: Cell, *state: int) -> bool:
    return read_cell(run, model_hash, cell) is not None


def save_cells(run: Path, checkpoint: str, model_hash: str, cells: Sequence[Cell], pictures: "np.ndarray") -> None:
    """Store pictures uint8 [N, R, R, 3] that were drawn elsewhere; those that are there stay."""
    with _turn(run, lambda: False):
        for cell, picture in zip(cells, pictures, strict=True):
            if not is_made(run, model_hash, cell):
                _save(run, checkpoint, model_hash, cell, picture)


def _save(
    run: Path,
    checkpoint: str,
    model_hash: str,
    cell: Cell,
    picture: "np.ndarray",
    path: Path | None = None,
    **more: Any,
) -> None:
    """Write one whole; called by the one who has the turn. path: its steps' instead; more: further parameters."""
    path = path or cell_path(run, model_hash, cell)
    part = path.with_name(f".{path.stem}.part.png")
    shown = {"model": f"{run.resolve().name}/{checkpoint}", "pixel_hash": pixel_hash(Image.fromarray(picture)), **more}
    try:
        save_picture(part, picture, {**cell.settings(), "model_hash": model_hash, **shown})
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room, and the grid goes on from there"
        ) from None


@contextmanager
def _turn(run: Path, cancelled: Callable[[], bool]) -> Iterator[bool]:
    """Be the only one, of all threads and processes, that draws for a run; gives False where `cancelled` came first.

    Who waits stands at a gate that the last one has to pass again, so that a long grid does not starve a single picture.
    """
    store = run / STORE
    try:
        store.mkdir(exist_ok=True)
        gate, lock = (FileLock(store / name, thread_local=False) for name in (".gate", ".lock"))
        try:
            had = _acquire(gate, cancelled) and _acquire(lock, cancelled)
        finally:
            gate.release()
    except OSError as error:
        raise UserError(f"{store} cannot be written ({error.strerror}); give a run folder that can be") from None
    try:
        yield had
    finally:
        lock.release()


def _acquire(lock: FileLock, cancelled: Callable[[], bool]) -> bool:
    while not cancelled():
        try:
            lock.acquire(timeout=0.2, poll_interval=0.01)
            return True
        except Timeout:
            continue
    return False


# --- Grids -----------------------------------------------------------------------------------------------------------


def plan(run: Path, checkpoint: str, cell: Cell, axes: Sequence[Axis], limit: int = MAX_CELLS) -> list[Place]:
    """The places of a grid, tab by tab and row by row.

    Args:
        run, checkpoint, cell: what no axis says otherwise; `checkpoint` may be "pipeline", the finished model.
        axes: of columns, rows and tabs; up to three, of different names.

    Raises:
        UserError: more than `limit` places, an axis twice or unknown. A model that is not there is its place's `problem`.
    """
    names = [axis.name for axis in axes]
    sets = [field for name in names for field in (("prompt", "seed") if name == "sample" else (name,))]
    if len(axes) > 3 or len(set(sets)) < len(sets) or not set(names) <= set(AXES):
        raise UserError(f"axes {', '.join(names)} make no grid; take up to three different ones of {', '.join(AXES)}")
    counts = [len(axis.values) for axis in axes] + [1] * (3 - len(axes))
    if math.prod(counts) > limit:
        raise UserError(f"a grid of {math.prod(counts):,} pictures is more than {limit:,}; take fewer values")
    models: dict[tuple[Path, str], tuple[str, str | None]] = {}
    places = []
    for tab in range(counts[2]):
        for row in range(counts[1]):
            for column in range(counts[0]):
                settings: dict[str, Any] = {}
                for axis, number in zip(axes, (column, row, tab), strict=False):
                    value = axis.values[number]
                    settings |= (
                        dict(zip(("prompt", "seed"), value, strict=True))
                        if axis.name == "sample"
                        else {axis.name: value}
                    )
                model = settings.pop("run", run), settings.pop("checkpoint", checkpoint)
                if model not in models:
                    models[model] = _find_model(*model)
                found, problem = models[model]
                own = replace(cell, **settings)
                problem = problem or scheduler_problem(own.scheduler, schedule_of(model[0]), own.num_inference_steps)
                made = problem is None and is_made(model[0], found, own)
                places.append(Place((tab, row, column), *model, found, own, made, problem))
    return places


def schedule_of(run: Path) -> dict[str, Any]:
    """The config of the scheduler that a run's model was saved with, which decides what others fit; {} where it is not to be read."""
    file = run / "pipeline" / "scheduler" / "scheduler_config.json"
    try:
        stat = file.stat()
        return _schedule(file, stat.st_size, stat.st_mtime_ns)
    except (OSError, UserError, RecursionError):
        return {}


@lru_cache(maxsize=512)  # asked for each cell of a grid; nobody changes what it gives
def _schedule(file: Path, *state: int) -> dict[str, Any]:
    return read_object(file)


def _find_model(run: Path, checkpoint: str) -> tuple[str, str | None]:
    """The hash of a run's checkpoint, or "" and what is wrong."""
    known = [path.name for path in checkpoint_folders(run)]
    if (run / "pipeline" / "unet").is_dir():
        known.append("pipeline")
    if checkpoint not in known:  # never joined into a path
        return "", f"{run} holds no whole {checkpoint[:40]}; there are: {', '.join(known) or 'none'}"
    try:
        return weights_hash(run / checkpoint), None
    except UserError as error:
        return "", str(error)


def missing(places: Sequence[Place]) -> list[Place]:
    """The places whose pictures have to be made: not there yet, and of a model that is."""
    return [place for place in places if place.problem is None and not place.made]


def make(
    places: Sequence[Place],
    *,
    load: Callable[[Path], Any] | None = None,
    batch_size: int = 1,
    progress: Callable[[Place, int, int], Any] = lambda place, done, count: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Draw the missing pictures, in order, a model at a time; returns how many this call drew.

    Args:
        places: of `plan`; those that are made, or have a problem, are passed over.
        load: the pipeline of a checkpoint or pipeline folder, from a caller's cache; `sampling.load_pipeline` where None. One at
            a time is used, and its scheduler put back.
        batch_size: pictures at once, where they differ in prompt and seed alone.
        progress: called with each place when its picture is there, how many are there and how many were missing.
        cancelled: asked before each batch, and while another session draws.

    Raises:
        UserError: a model cannot be loaded or changed since the plan, or the disk does not take a picture. What was made
            stays, and the same call goes on from there.
    """
    wanted = missing(places)
    done, drawn, current, pipeline = 0, 0, None, None
    for batch in batches(wanted, batch_size):
        first = batch[0]
        with _turn(first.run, cancelled) as had:
            if not had or cancelled():
                return drawn
            absent = {place.path: place for place in batch if not is_made(first.run, place.model_hash, place.cell)}
            if absent:
                model = first.run / first.checkpoint
                if current != (model, first.model_hash):
                    pipeline, current = _load(model, first.model_hash, load), (model, first.model_hash)
                for place, picture in zip(absent.values(), _draw(pipeline, list(absent.values())), strict=True):
                    _save(place.run, place.checkpoint, place.model_hash, place.cell, picture)
                drawn += len(absent)
        for place in batch:
            done += 1
            progress(place, done, len(wanted))
    return drawn


def batches(places: Sequence[Place], size: int) -> Iterator[list[Place]]:
    """What `make` draws at once: up to `size` places of one model and the same settings, a model after another."""
    groups: dict[Any, dict[Any, list[Place]]] = {}
    for place in places:
        model = (place.run, place.checkpoint, place.model_hash)
        groups.setdefault(model, {}).setdefault(replace(place.cell, prompt="", seed=0), []).append(place)
    for settings in groups.values():
        for group in settings.values():
            for start in range(0, len(group), size):
                yield group[start : start + size]


def _load(model: Path, model_hash: str, load: Callable[[Path], Any] | None) -> Any:
    pipeline = load(model) if load else _load_pipeline(model)
    if weights_hash(model) != model_hash:
        raise UserError(f"{model} has changed since the grid was planned; plan it again")
    return pipeline


def _load_pipeline(model: Path) -> Any:
    from t2i.pictures import sampling

    return sampling.load_pipeline(model, device=sampling.best_device())


def _draw(pipeline: Any, places: Sequence[Place], watch: Callable[..., None] | None = None) -> "np.ndarray":
    """Pictures uint8 [N, R, R, 3] of places that differ in prompt and seed alone; `watch` as `sampling.generate` takes it."""
    from t2i.pictures import sampling

    cell, saved = places[0].cell, pipeline.scheduler
    try:
        pipeline.scheduler = sampling.make_scheduler(cell.scheduler, saved.config, cell.num_inference_steps)
        return sampling.generate(
            pipeline, [place.cell.prompt for place in places], [place.cell.seed for place in places],
            negative_prompt=cell.negative_prompt, guidance_scale=cell.guidance_scale,
            num_inference_steps=cell.num_inference_steps, guidance_end=cell.guidance_end, batch_size=len(places),
            progress=False, watch=watch,
        )  # fmt: skip
    finally:
        pipeline.scheduler = saved


# --- One picture, watched --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A picture and some of its steps: uint8 [R, R, 3] each, the steps with their numbers from 1, the finished one not among them.

    note: why it is not in the store; "" where it is.
    """

    picture: "np.ndarray"
    steps: tuple[tuple[int, "np.ndarray"], ...]
    note: str = ""


class _Stopped(Exception):
    """Raised between two steps of a picture that nobody wants any more."""


def shown_steps(count: int) -> list[int]:
    """The steps of `count` that are shown: the first, the last, and some evenly between; `STEPS` at most."""
    return sorted({1 + round((count - 1) * number / (STEPS - 1)) for number in range(STEPS)})


def read_watched(place: Place) -> Watched | None:
    """A stored picture with what the store has of its steps (none where it was not watched); None: no whole picture."""
    import numpy as np

    image = read_cell(place.run, place.model_hash, place.cell)
    if image is None:
        return None
    found = _read(_steps_path(place), place.model_hash, place.cell, STEPS * MAX_SIDE)
    strip, known = found if found else (None, {})
    numbers = known.get("steps")
    if not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
        numbers = []
    parts: tuple[tuple[int, np.ndarray], ...] = ()
    if strip is not None and strip.size == (len(numbers) * image.width, image.height):
        pixels = np.asarray(strip).reshape(image.height, len(numbers), image.width, 3)
        parts = tuple((number, pixels[:, column]) for column, number in enumerate(numbers))
    return Watched(np.asarray(image), parts)


def make_watched(
    place: Place,
    *,
    load: Callable[[Path], Any] | None = None,
    progress: Callable[[int, int, "np.ndarray | None"], Any] = lambda step, count, picture: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Watched | None:
    """Draw one picture and some of its steps, and store them; what is stored is not drawn again. None where it was cancelled.

    The same picture, bit for bit, as without watching. A store that cannot be written only leaves its note: a model may lie
    on a disk that is read-only.

    Args:
        load: as `make` takes it.
        progress: called after each denoising step with its number, how many there are, and at the shown ones what the model
            takes the finished picture to be, uint8 [R, R, 3].
        cancelled: asked before each step, and while others draw.

    Raises:
        UserError: the model cannot be loaded or has changed since the plan.
    """
    import numpy as np

    if place.problem is not None:
        raise UserError(place.problem)
    with ExitStack() as stack:
        note = ""
        try:
            had = stack.enter_context(_turn(place.run, cancelled))
        except UserError as error:
            had, note = True, f"not kept: {error}"
        if not had or cancelled():
            return None
        stored = read_watched(place)
        if stored and stored.steps:
            return stored
        pipeline = _load(place.run / place.checkpoint, place.model_hash, load)
        steps: list[tuple[int, np.ndarray]] = []

        def watch(step: int, count: int, decode: Callable[[], "np.ndarray"]) -> None:
            if cancelled():
                raise _Stopped
            picture = None
            if step < count and step in shown_steps(count):
                picture = decode()[0]
                steps.append((step, picture))
            progress(step, count, picture)

        try:
            drawn = _draw(pipeline, [place], watch)[0]
        except _Stopped:
            return None
        if not note:
            try:
                _keep_watched(place, drawn, steps, own=stored is None)
            except UserError as error:
                note = f"not kept: {error}"
        return Watched(drawn, tuple(steps), note)


def _steps_path(place: Place) -> Path:
    return place.path.with_suffix(".steps.png")


def _keep_watched(place: Place, picture: "np.ndarray", steps: Sequence[tuple[int, "np.ndarray"]], own: bool) -> None:
    """Store a picture and its steps, and remove the oldest ones beyond `KEPT`. own: the picture is there for no grid."""
    import numpy as np

    cell = (place.run, place.checkpoint, place.model_hash, place.cell)
    if own:
        _save(*cell, picture)
    if steps:
        strip = np.concatenate([part for _, part in steps], axis=1)
        _save(*cell, strip, _steps_path(place), steps=[number for number, _ in steps], own=own)
    by_age = sorted((place.run / STORE).glob("*.steps.png"), key=lambda path: path.stat().st_mtime_ns)
    for path in by_age[:-KEPT]:
        if (read_parameters(path) or {}).get("own"):
            path.with_name(path.name.replace(".steps.png", ".png")).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def zipped(places: Sequence[Place]) -> bytes:
    """A ZIP of the pictures that are there, each with its parameters in it, and of all parameters together as cells.json."""
    file, rows = io.BytesIO(), []
    with zipfile.ZipFile(file, "w") as archive:
        for place in places:
            if place.problem is None and read_cell(place.run, place.model_hash, place.cell) is not None:
                name = "-".join(
                    f"{what}{number + 1}" for what, number in zip(("tab", "row", "column"), place.at, strict=True)
                )
                archive.write(place.path, f"{name}.png")
                model = f"{place.run.resolve().name}/{place.checkpoint}"
                rows.append(
                    {"file": f"{name}.png", "model": model, "model_hash": place.model_hash, **place.cell.settings()}
                )
        archive.writestr("cells.json", json.dumps(rows, indent=2, ensure_ascii=False))
    return file.getvalue()


def evaluated(run: Path) -> tuple[Cell, list[Axis]] | None:
    """The grid that evaluate_checkpoints.py left: its cell and the axes checkpoint, guidance_scale and sample; None: none."""
    try:
        found = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["sweep"]
        samples = tuple((str(prompt), int(seed)) for prompt, seed in zip(found["prompts"], found["seeds"], strict=True))
        axes = [
            Axis("checkpoint", tuple(map(str, found["checkpoints"]))),
            Axis("guidance_scale", tuple(map(float, found["guidance_scales"]))),
            Axis("sample", samples),
        ]
        cell = Cell(
            samples[0][0], seed=samples[0][1], num_inference_steps=int(found["num_inference_steps"]),
            scheduler=str(found["scheduler"]), guidance_end=float(found.get("guidance_end", 1.0)),
        )  # fmt: skip
        return cell, axes
    except (OSError, ValueError, KeyError, TypeError, IndexError, UserError):
        return None
