"""Draw the cells (pictures) of grids once each, and keep them in a content-addressed store in the run folder.

The file of a cell (a stored picture) is `<run>/cells/<key>.png`. The key of a cell is a hash of all that decides the
picture: the model's weights, prompt, seed and settings. A picture with equal weights, prompt, seed and settings is
stored once, whichever grid or command draws it. The file of a cell is written atomically as soon as its picture is
drawn. If a page watched the drawing, `<key>.steps.png` holds the picture at some denoising steps, from left to right.

This module imports no torch before a picture is drawn, because pages and `--help` must start quickly.
"""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from t2i.config_types import MAX_GUIDANCE
from t2i.errors import UserError
from t2i.files import hash_files, hash_json, read_json, read_object, read_optional
from t2i.pictures.png import (
    DAMAGE,
    PNDM_STEPS,
    SCHEDULERS,
    TURBO,
    guidance_problem,
    guided_steps,
    pixel_hash,
    presets_of,
    read_parameters,
    save_picture,
    scheduler_problem,
)
from t2i.runs import GUIDE, checkpoint_folders, guide_folder

STORE = "cells"  # folder of a run
MAX_CELLS = 10_000  # cells of a plan
MAX_SIDE = 4096  # pixels; a larger picture in a store is foreign
STEPS = 6  # shown steps of a watched picture, the last included: decoding one costs as much as several denoising steps
MAX_WATCHED = 500  # watched pictures of a store: strangers may type any prompts, and the disk must not fill
AXES = (
    "checkpoint",
    "run",
    "guidance_scale",
    "num_inference_steps",
    "guidance_end",
    "guidance_rescale",
    "scheduler",
    "seed",
    "prompt",
    "negative_prompt",
    "sample",
)


@dataclass(frozen=True)
class Cell:
    """The prompt and settings of a picture, without the model.

    Attributes:
        seed: seed of the noise, 0 to 2**63 - 1.
        guidance_scale: scale of classifier-free guidance, 0 to 1000.
        num_inference_steps: number of denoising steps, 1 to 1000.
        scheduler: a key of `png.SCHEDULERS` or a class name of diffusers. The cell stores the scheduler's class name.
        guidance_end: share of the steps, from the first step on, that are guided, 0 to 1.
        guidance_rescale: how far guidance keeps the contrast of an unguided picture, 0 to 1.

    Raises:
        UserError: a setting of the picture is out of its bounds.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    guidance_scale: float = 7.5
    num_inference_steps: int = 30
    scheduler: str = "DDIMScheduler"
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"{name} cannot be stored (it is no text, or holds a lone surrogate); type it anew")
        for name in ("seed", "num_inference_steps"):  # 1.0 and True would give the same picture another key
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name} {str(getattr(self, name))[:40]} is not a whole number; give one such as 1")
        for name, example in (("guidance_scale", 7.5), ("guidance_end", 1.0), ("guidance_rescale", 0.7)):
            if type(getattr(self, name)) not in (int, float):
                raise UserError(f"{name} {str(getattr(self, name))[:40]} is not a number; give one such as {example}")
        scheduler_class = SCHEDULERS.get(self.scheduler.lower(), self.scheduler)
        if scheduler_class not in SCHEDULERS.values() and not re.fullmatch(r"\w{1,80}Scheduler", scheduler_class):
            raise UserError(f"unknown scheduler {self.scheduler[:40]!r}; take one of {', '.join(SCHEDULERS)}")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise UserError(
                f"guidance_scale {self.guidance_scale} is out of bounds; give 0 to {MAX_GUIDANCE:g}, such as 7.5"
            )
        if not 0 <= self.guidance_end <= 1:
            raise UserError(f"guidance_end {self.guidance_end} is not a share of the steps; give 0 to 1, such as 0.5")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale {self.guidance_rescale} is out of bounds; give 0 to 1, such as 0.7")
        if not 1 <= self.num_inference_steps <= 1000:
            raise UserError(f"num_inference_steps {self.num_inference_steps} is out of bounds; give 1 to 1000")
        if scheduler_class == "PNDMScheduler" and self.num_inference_steps < PNDM_STEPS:
            raise UserError(
                f"num_inference_steps {self.num_inference_steps} is too few for pndm; give {PNDM_STEPS} or more"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is out of bounds; give 0 to {2**63 - 1}")
        object.__setattr__(self, "scheduler", scheduler_class)
        for name in ("guidance_scale", "guidance_end", "guidance_rescale"):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)  # 7 is 7.0, and -0.0 is 0.0

    @property
    def samples(self) -> int:
        """Return the picture's number of UNet samples, which determines the time: two per guided step, one per unguided
        step.
        """
        guided = guided_steps(self.num_inference_steps, self.guidance_end) if self.guidance_scale > 1 else 0
        return self.num_inference_steps + guided

    def settings(self) -> dict[str, Any]:
        """Return the fields of a cell that identify the picture.

        A `guidance_end` of 1 and a `guidance_rescale` of 0 are left out, so that pictures from before these settings
        existed keep their keys.
        """
        without = {"guidance_end": 1.0, "guidance_rescale": 0.0}
        return {key: value for key, value in asdict(self).items() if key not in without or value != without[key]}


@dataclass(frozen=True)
class Axis:
    """An axis of a grid: its name, which is one of `AXES`, and its values.

    Values of the axis checkpoint are folder names within the run ("checkpoint-000500", "pipeline"). Values of the axis run
    are run folders (`Path`). Values of the axis sample are pairs of a prompt and its seed, as evaluate_checkpoints.py draws
    them. Values of any other axis are those of the field of `Cell` with the same name.
    """

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class PlannedCell:
    """A cell of a planned grid, with the model that draws it.

    Attributes:
        at: position of the cell in the grid, (tab, row, column).
        model_hash: hash of the model's weights, or "" if the picture cannot be drawn.
        path: file of the cell's picture, which may not exist yet.
        made: whether the store already has the cell's picture.
        problem: one sentence on why the picture cannot be drawn (its model is missing), or "".
    """

    at: tuple[int, int, int]
    run: Path
    checkpoint: str
    model_hash: str
    cell: Cell
    path: Path
    made: bool
    problem: str | None = None


# --- Identity of a model ---------------------------------------------------------------------------------------------


def weights_hash(folder: Path, weights: str = "ema") -> str:
    """Return a hash (16 hex digits) of a model: UNet, VAE, text encoder, tokenizer and noise schedule.

    A run's pipeline that holds the same weights as one of the run's checkpoints has the hash of that checkpoint. A
    checkpoint's manifest holds its UNet's hashes, and run.json holds the hash of a finished run's pipeline. Other weight
    files are read once, and again only if their size or time changes.

    Args:
        folder: a checkpoint of a run, its `pipeline/`, or any pipeline folder.
        weights: weights of a checkpoint to use, "ema" or "raw".

    Raises:
        UserError: the folder is neither a checkpoint nor a pipeline, or the folder is incomplete.
    """
    if (folder / "model_index.json").is_file():
        twin = _checkpoint_of_pipeline(folder) if folder.name == "pipeline" else None
        if twin:
            return weights_hash(*twin)
        run = read_optional(folder.parent / "run.json") if folder.name == "pipeline" else {}
        if run.get("status") == "finished" and run.get("output_unet_hash"):
            return hash_json({"unet": run["output_unet_hash"], **_frozen_part_hashes(folder, run, None)})
        return hash_json({"unet": hash_files(folder / "unet"), **_frozen_part_hashes(folder, run, None)})
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{folder} is neither a complete checkpoint nor a pipeline; take one that training has finished"
        )
    unet = {name: file["sha256"] for name, file in _unet_files(folder, weights).items()}
    if not unet:
        raise UserError(f"{folder / 'manifest.json'} names no UNet; restore the checkpoint from a copy")
    run = read_optional(folder.parent / "run.json")
    return hash_json({"unet": unet, **_frozen_part_hashes(folder.parent / "pipeline", run, folder)})


def _unet_files(checkpoint: Path, weights: str) -> dict[str, dict[str, Any]]:
    """Return the files of a checkpoint's UNet by name, each with "bytes" and "sha256", from the checkpoint's manifest."""
    try:
        files = read_json(checkpoint / "manifest.json")["files"]
        part = "unet_ema" if weights == "ema" and any(name.startswith("unet_ema/") for name in files) else "unet"
        named = {name.split("/", 1)[1]: file for name, file in files.items() if name.startswith(f"{part}/")}
        return {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in named.items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{checkpoint / 'manifest.json'} is damaged; restore it from a copy") from None


def _checkpoint_of_pipeline(pipeline: Path) -> tuple[Path, str] | None:
    """Return the checkpoint of the run whose weights a pipeline holds, and which of its weights; None without one.

    Training ends with a checkpoint and a pipeline of equal weights, so their pictures are equal too. Files of weights are
    compared by size first: the hash of a large file takes seconds.
    """
    try:
        sizes = {path.name: path.stat().st_size for path in (pipeline / "unet").glob("*.safetensors")}
    except OSError:  # deleted meanwhile
        return None
    for checkpoint in reversed(checkpoint_folders(pipeline.parent)):
        for weights in ("ema", "raw"):
            files = {
                name: file for name, file in _unet_files(checkpoint, weights).items() if name.endswith(".safetensors")
            }
            if files and sizes == {name: file["bytes"] for name, file in files.items()}:
                own = hash_files(pipeline / "unet")
                if all(own[name] == file["sha256"] for name, file in files.items()):
                    return checkpoint, weights
    return None


def _frozen_part_hashes(pipeline: Path, run: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """Return the hashes of the frozen models that the checkpoints of a run share.

    The identity of the run in run.json holds these hashes. That of a student names the VAE of its teacher. A guide has no
    hash there.

    Args:
        checkpoint: the checkpoint that draws, or None for the pipeline itself.
    """
    names = {"vae": "vae_hash", "text_encoder": "text_encoder_hash", "tokenizer": "tokenizer_hash"}
    if run.get("decoder_psnr_db") is not None:
        names["vae"] = "tiny_hash"  # No identity holds it, so the files are hashed.
    identity = run.get("identity")
    identity = identity if isinstance(identity, dict) else {}
    hashes = {part: identity.get(key) or hash_files(pipeline / part) for part, key in names.items()}
    guide = guide_folder(pipeline, checkpoint) if (pipeline / GUIDE).is_dir() else None
    return hashes | {"scheduler": hash_files(pipeline / "scheduler")} | ({"guide": hash_files(guide)} if guide else {})


# --- The store -------------------------------------------------------------------------------------------------------


def cell_path(run: Path, model_hash: str, cell: Cell) -> Path:
    """Return the path of a cell's picture, `<run>/cells/<key>.png`."""
    return run / STORE / f"{hash_json({'model_hash': model_hash, **cell.settings()})}.png"


def read_cell(run: Path, model_hash: str, cell: Cell) -> Image.Image | None:
    """Return the RGB picture of a cell, or None if its file is missing, damaged, changed or of another cell."""
    stored = _read(cell_path(run, model_hash, cell), model_hash, cell)
    return stored[0] if stored else None


def _read(
    path: Path, model_hash: str, cell: Cell, longest: int = MAX_SIDE
) -> tuple[Image.Image, dict[str, Any]] | None:
    """Return a stored picture and its parameters, or None if they are incomplete or belong to another cell."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "RGB" or max(image.size) > longest or image.height > MAX_SIDE:
                return None
            image.load()
            parameters = json.loads(image.info["parameters"])
            expected = {"model_hash": model_hash, "pixel_hash": pixel_hash(image), **cell.settings()}
            if not isinstance(parameters, dict) or any(parameters.get(key) != expected[key] for key in expected):
                return None
            return image.copy(), parameters
    except DAMAGE:
        return None


def is_made(run: Path, model_hash: str, cell: Cell) -> bool:
    """Return whether `read_cell` gives a picture. An unchanged file of a picture is decoded only once."""
    try:
        stat = cell_path(run, model_hash, cell).stat()
    except OSError:
        return False
    return _is_readable(run, model_hash, cell, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=65536)
def _is_readable(run: Path, model_hash: str, cell: Cell, *state: int) -> bool:
    return read_cell(run, model_hash, cell) is not None


def save_cells(run: Path, checkpoint: str, model_hash: str, cells: Sequence[Cell], pictures: np.ndarray) -> None:
    """Store pictures, uint8 [N, R, R, 3], that were drawn elsewhere.

    Pictures that are already in the store do not change.
    """
    with _lock_store(run, lambda: False):
        for cell, picture in zip(cells, pictures, strict=True):
            if not is_made(run, model_hash, cell):
                _save(run, checkpoint, model_hash, cell, picture)


def _save(
    run: Path,
    checkpoint: str,
    model_hash: str,
    cell: Cell,
    picture: np.ndarray,
    path: Path | None = None,
    **more: Any,
) -> None:
    """Write a picture into the store atomically. The caller holds the lock of the store.

    Args:
        path: file to write, such as the file of the picture's steps. With None, write the cell's own file.
        more: further parameters to write into the picture's file.
    """
    path = path or cell_path(run, model_hash, cell)
    part = path.with_name(f".{path.stem}.part.png")
    shown = {"model": f"{run.resolve().name}/{checkpoint}", "pixel_hash": pixel_hash(Image.fromarray(picture)), **more}
    try:
        save_picture(part, picture, {**cell.settings(), "model_hash": model_hash, **shown})
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room on the disk, and draw the grid again"
        ) from None


@contextmanager
def _lock_store(run: Path, cancelled: Callable[[], bool]) -> Iterator[bool]:
    """Wait until no other thread or process draws for a run.

    Yield False if `cancelled` becomes true before this session's turn.

    The session that drew last must queue behind the sessions that wait to draw. A session that draws a long grid lets a
    session with a single picture draw in between.
    """
    store = run / STORE
    try:
        store.mkdir(exist_ok=True)
        gate, lock = (FileLock(store / name, thread_local=False) for name in (".gate", ".lock"))
        try:
            is_locked = _acquire(gate, cancelled) and _acquire(lock, cancelled)
        finally:
            gate.release()
    except OSError as error:
        raise UserError(
            f"{store} cannot be written ({error.strerror}); give a run folder that can be written"
        ) from None
    try:
        yield is_locked
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


def plan(
    run: Path,
    checkpoint: str,
    cell: Cell,
    axes: Sequence[Axis],
    limit: int = MAX_CELLS,
    stands_for: Mapping[tuple[Path, str], str] = MappingProxyType({}),
) -> list[PlannedCell]:
    """Return the cells of a grid, tab by tab and row by row.

    A missing model raises no error. The cells of a missing model have the reason in `problem`.

    Args:
        run, checkpoint, cell: settings that no axis varies. The checkpoint may be "pipeline", the finished model.
        axes: axes of the columns, rows and tabs, up to three with different names.
        stands_for: which checkpoint of a run is drawn, by the run and the value of the axis checkpoint. Runs have different
            checkpoints, so a value may stand for another checkpoint in each run. Other values are names of checkpoints.

    Raises:
        UserError: the grid has more than `limit` cells, or an axis is unknown or given twice.
    """
    names = [axis.name for axis in axes]
    fields = [field for name in names for field in (("prompt", "seed") if name == "sample" else (name,))]
    if len(axes) > 3 or len(set(fields)) < len(fields) or not set(names) <= set(AXES):
        raise UserError(f"axes {', '.join(names)} make no grid; take up to three different ones of {', '.join(AXES)}")
    columns, rows, tabs = [len(axis.values) for axis in axes] + [1] * (3 - len(axes))
    if columns * rows * tabs > limit:
        raise UserError(f"a grid of {columns * rows * tabs:,} pictures is more than {limit:,}; take fewer values")
    models: dict[tuple[Path, str], tuple[str, str, str | None]] = {}
    planned = []
    for tab, row, column in product(range(tabs), range(rows), range(columns)):
        settings: dict[str, Any] = {"run": run, "checkpoint": checkpoint}
        for axis, number in zip(axes, (column, row, tab), strict=False):
            value = axis.values[number]
            if axis.name == "sample":
                settings["prompt"], settings["seed"] = value
            else:
                settings[axis.name] = value
        wanted = settings.pop("run"), settings.pop("checkpoint")
        if wanted not in models:
            name = stands_for.get(wanted, wanted[1])
            models[wanted] = (name, *_find_model(wanted[0], name))
        name, model_hash, problem = models[wanted]
        model = (wanted[0], name)
        own_cell = replace(cell, **settings)
        schedule = schedule_of(model[0])
        problem = problem or scheduler_problem(own_cell.scheduler, schedule, own_cell.num_inference_steps)
        path = cell_path(model[0], model_hash, own_cell)
        made = problem is None and is_made(model[0], model_hash, own_cell)
        if not made:  # Pictures that an earlier version drew with guidance are shown.
            problem = problem or guidance_problem(own_cell.guidance_scale, schedule)
        planned.append(PlannedCell((tab, row, column), *model, model_hash, own_cell, path, made, problem))
    return planned


def schedule_of(run: Path) -> dict[str, Any]:
    """Return the config of the scheduler with which a run's model was saved, or {} if it is unreadable.

    A scheduler's config decides which other schedulers fit the model.
    """
    file = run / "pipeline" / "scheduler" / "scheduler_config.json"
    try:
        stat = file.stat()
        return _schedule(file, stat.st_size, stat.st_mtime_ns)
    except (OSError, UserError, RecursionError):
        return {}


@lru_cache(maxsize=512)  # read for each cell of a grid; no caller changes the result
def _schedule(file: Path, *state: int) -> dict[str, Any]:
    return read_object(file)


def first_cell(run: Path, prompt: str) -> Cell:
    """Return a picture of a run that was not evaluated: with the settings of preset turbo, or otherwise the defaults."""
    turbo = presets_of(schedule_of(run)).get(TURBO)
    return Cell(prompt, guidance_scale=1.0, **turbo._asdict()) if turbo else Cell(prompt)


def _find_model(run: Path, checkpoint: str) -> tuple[str, str | None]:
    """Return the hash of a run's checkpoint and None, or if the checkpoint cannot be used, "" and the reason."""
    names = [path.name for path in checkpoint_folders(run)]
    if (run / "pipeline" / "unet").is_dir():
        names.append("pipeline")
    if checkpoint not in names:  # an unknown name is never joined into a path
        return "", f"{run} holds no complete {checkpoint[:40]}; there are: {', '.join(names) or 'none'}"
    try:
        return weights_hash(run / checkpoint), None
    except UserError as error:
        return "", str(error)


def missing(planned: Sequence[PlannedCell]) -> list[PlannedCell]:
    """Return the cells of a plan that can be drawn and have no picture yet."""
    return [one for one in planned if one.problem is None and not one.made]


def make(
    planned: Sequence[PlannedCell],
    *,
    load: Callable[[Path], Any] | None = None,
    batch_size: int = 1,
    progress: Callable[[PlannedCell, int, int], Any] = lambda cell, done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
    as_watched: bool = False,
) -> int:
    """Draw the missing pictures of a plan, in order and one model at a time; return how many this call drew.

    Args:
        planned: cells that `plan` returned. Cells whose picture exists or cannot be drawn are skipped.
        load: function that returns the pipeline of a checkpoint or pipeline folder, for example from a cache. With
            None, `sampling.load_pipeline` loads the pipeline. One pipeline is used at a time, and the scheduler of the
            pipeline is restored after drawing.
        batch_size: number of pictures drawn at once, if the pictures differ only in prompt and seed.
        progress: function that is called after each picture with its cell, the number drawn, and the number of pictures
            to draw.
        cancelled: function that returns whether to stop, called before each denoising step and while another session
            draws. The pictures of an unfinished batch are dropped.
        as_watched: whether the pictures count among the watched ones, of which only the newest `MAX_WATCHED` stay.

    Raises:
        UserError: a model cannot be loaded or has changed since the plan, or a picture cannot be written. Finished
            pictures stay, and the same call draws the missing pictures.
    """
    wanted = missing(planned)
    done, drawn, current, pipeline = 0, 0, None, None
    for batch in batches(wanted, batch_size):
        first = batch[0]
        with _lock_store(first.run, cancelled) as is_locked:
            if not is_locked or cancelled():
                return drawn
            absent = {one.path: one for one in batch if not is_made(first.run, one.model_hash, one.cell)}
            if absent:
                model = first.run / first.checkpoint
                if current != (model, first.model_hash):
                    pipeline, current = _load(model, first.model_hash, load), (model, first.model_hash)
                try:
                    pictures = _draw(pipeline, list(absent.values()), _stop_if(cancelled))
                except _Stopped:
                    return drawn
                for one, picture in zip(absent.values(), pictures, strict=True):
                    if as_watched:
                        _save_watched(one, picture, (), own=True)
                    else:
                        _save(one.run, one.checkpoint, one.model_hash, one.cell, picture)
                drawn += len(absent)
        for one in batch:
            done += 1
            progress(one, done, len(wanted))
    return drawn


def draw_unstored(
    planned: Sequence[PlannedCell],
    *,
    load: Callable[[Path], Any] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Draw the pictures of a batch, uint8 [N, R, R, 3], and store none; return None if the drawing was cancelled.

    Args:
        planned: cells of one model that differ only in prompt and seed.
        load, cancelled: as for `make`. This function waits for no other session.

    Raises:
        UserError: the model cannot be loaded or has changed since the plan.
    """
    if problem := next((one.problem for one in planned if one.problem), None):
        raise UserError(problem)
    pipeline = _load(planned[0].run / planned[0].checkpoint, planned[0].model_hash, load)
    try:
        return _draw(pipeline, planned, _stop_if(cancelled))
    except _Stopped:
        return None


def _stop_if(cancelled: Callable[[], bool]) -> Callable[[int, int, Callable[[], np.ndarray]], None]:
    """Return a function for `sampling.generate` that ends the drawing after a step once `cancelled` is true."""

    def watch(step: int, count: int, decode: Callable[[], np.ndarray]) -> None:
        if cancelled():
            raise _Stopped

    return watch


def batches(planned: Sequence[PlannedCell], size: int) -> Iterator[list[PlannedCell]]:
    """Yield the batches that `make` draws: up to `size` cells of one model with the same settings, one model after another."""
    models: dict[Any, dict[Any, list[PlannedCell]]] = {}
    for one in planned:
        model = (one.run, one.checkpoint, one.model_hash)
        models.setdefault(model, {}).setdefault(replace(one.cell, prompt="", seed=0), []).append(one)
    for settings in models.values():
        for group in settings.values():
            for start in range(0, len(group), size):
                yield group[start : start + size]


def _load(model: Path, model_hash: str, load: Callable[[Path], Any] | None) -> Any:
    pipeline = load(model) if load else _load_pipeline(model)
    if weights_hash(model) != model_hash:
        raise UserError(f"{model} has changed since the grid was planned; plan it again")
    return pipeline


def _load_pipeline(model: Path) -> Any:
    from t2i.pictures import sampling  # imports torch

    return sampling.load_pipeline(model, device=sampling.best_device())


def _draw(pipeline: Any, batch: Sequence[PlannedCell], watch: Callable[..., None] | None = None) -> np.ndarray:
    """Draw cells that differ only in prompt and seed: uint8 [N, R, R, 3].

    The argument `watch` is that of `sampling.generate`.
    """
    from t2i.pictures import sampling  # imports torch

    cell, saved = batch[0].cell, pipeline.scheduler
    try:
        pipeline.scheduler = sampling.make_scheduler(cell.scheduler, saved.config, cell.num_inference_steps)
        return sampling.generate(
            pipeline,
            [one.cell.prompt for one in batch],
            [one.cell.seed for one in batch],
            negative_prompt=cell.negative_prompt,
            guidance_scale=cell.guidance_scale,
            num_inference_steps=cell.num_inference_steps,
            guidance_end=cell.guidance_end,
            guidance_rescale=cell.guidance_rescale,
            batch_size=len(batch),
            progress=False,
            watch=watch,
        )
    finally:
        pipeline.scheduler = saved


# --- One picture, watched --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A drawn picture and its states at some denoising steps, uint8 [R, R, 3] each.

    Attributes:
        steps: pairs of a step's number, from 1, and the picture at that step, without the finished picture.
        note: reason why the drawn picture is not in the store, or "".
    """

    picture: np.ndarray
    steps: tuple[tuple[int, np.ndarray], ...]
    note: str = ""


class _Stopped(Exception):
    """Exception that ends the drawing of a cancelled picture, between two steps."""


def shown_steps(count: int) -> list[int]:
    """Return which of `count` denoising steps are shown: the first, the last, and some evenly between, at most `STEPS`."""
    return sorted({1 + round((count - 1) * number / (STEPS - 1)) for number in range(STEPS)})


def read_watched(planned: PlannedCell) -> Watched | None:
    """Return a stored picture with its stored denoising steps, if there are any.

    The result is None if the store has no complete picture.
    """
    image = read_cell(planned.run, planned.model_hash, planned.cell)
    if image is None:
        return None
    stored = _read(_steps_path(planned), planned.model_hash, planned.cell, STEPS * MAX_SIDE)
    strip, parameters = stored if stored else (None, {})
    numbers = parameters.get("steps")
    if not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
        numbers = []
    steps: tuple[tuple[int, np.ndarray], ...] = ()
    if strip is not None and strip.size == (len(numbers) * image.width, image.height):
        pixels = np.asarray(strip).reshape(image.height, len(numbers), image.width, 3)
        steps = tuple((number, pixels[:, column]) for column, number in enumerate(numbers))
    return Watched(np.asarray(image), steps)


def newest_watched(runs: Sequence[Path], count: int, words: str = "", starred: bool = False) -> list[PlannedCell]:
    """Return the newest watched pictures in the stores of runs, at most `count`, the newest first.

    Pictures of models that a run no longer has are left out.

    Args:
        words: words that the prompt or the model's name must contain, in any order and case. "" is in all of them.
        starred: whether to return only starred pictures.
    """
    files = [(changed, run, file) for run in runs for changed, file in _steps_by_age(run)]
    found: list[PlannedCell] = []
    for changed, run, file in sorted(files, reverse=True):
        if len(found) == count:
            break
        if starred and not _star_path(file).exists():
            continue
        known = dict(_watched_settings(file, changed))
        model = str(known.pop("model", ""))
        text = f"{known.get('prompt')} {model}".casefold()
        if not all(word in text for word in words.casefold().split()):
            continue
        try:
            planned = plan(run, model.rpartition("/")[2], Cell(**known), [])[0]
        except (UserError, TypeError, AttributeError):  # a foreign file
            continue
        if planned.made and _steps_path(planned) == file:
            found.append(planned)
    return found


@lru_cache(maxsize=8192)  # read again for each word that a user searches
def _watched_settings(file: Path, *state: int) -> Mapping[str, Any]:
    parameters = read_parameters(file)
    names = [*Cell.__dataclass_fields__, "model"]
    return {name: parameters[name] for name in names if name in parameters} if isinstance(parameters, dict) else {}


def _steps_by_age(run: Path) -> list[tuple[int, Path]]:
    """Return the files of the steps of a run's watched pictures with their times in ns, the oldest first."""
    aged = []
    for path in (run / STORE).glob("*.steps.png"):
        with suppress(OSError):  # deleted meanwhile
            aged.append((path.stat().st_mtime_ns, path))
    return sorted(aged)


def make_watched(
    planned: PlannedCell,
    *,
    load: Callable[[Path], Any] | None = None,
    progress: Callable[[int, int, np.ndarray | None], Any] = lambda step, count, picture: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Watched | None:
    """Draw and store one picture and some of its denoising steps; return None if the drawing was cancelled.

    A watched picture is the same, bit for bit, as one drawn without watching. A picture that is stored with its steps
    is not drawn again. If the store cannot be written, as on a read-only disk, the picture gets a note and no error is
    raised.

    Args:
        load: function that returns the pipeline of a checkpoint or pipeline folder.
        progress: function that is called after each denoising step with the step's number, the number of steps, and a
            picture. The picture at a step is the model's guess of the result, uint8 [R, R, 3], or None at steps that
            are not shown.
        cancelled: function that returns whether to stop, called before each step and while other sessions draw.

    Raises:
        UserError: the model cannot be loaded or has changed since the plan.
    """
    if planned.problem is not None:
        raise UserError(planned.problem)
    with ExitStack() as stack:
        note = ""
        try:
            is_locked = stack.enter_context(_lock_store(planned.run, cancelled))
        except UserError as error:
            is_locked, note = True, f"not kept: {error}"
        if not is_locked or cancelled():
            return None
        stored = read_watched(planned)
        if stored and stored.steps:
            return stored
        pipeline = _load(planned.run / planned.checkpoint, planned.model_hash, load)
        steps: list[tuple[int, np.ndarray]] = []

        def watch(step: int, count: int, decode: Callable[[], np.ndarray]) -> None:
            if cancelled():
                raise _Stopped
            picture = None
            if step < count and step in shown_steps(count):
                picture = decode()[0]
                steps.append((step, picture))
            progress(step, count, picture)

        try:
            drawn = _draw(pipeline, [planned], watch)[0]
        except _Stopped:
            return None
        if not note:
            try:
                own = stored is None or bool((read_parameters(_steps_path(planned)) or {}).get("own"))
                _save_watched(planned, drawn if stored is None else None, steps, own)
            except UserError as error:
                note = f"not kept: {error}"
        return Watched(drawn, tuple(steps), note)


def _steps_path(planned: PlannedCell) -> Path:
    return planned.path.with_suffix(".steps.png")


def _save_watched(
    planned: PlannedCell, picture: np.ndarray | None, steps: Sequence[tuple[int, np.ndarray]], own: bool
) -> None:
    """Store a picture and its steps, and remove the oldest watched pictures beyond `MAX_WATCHED`.

    Args:
        picture: the picture, or None if the store has it already.
        own: whether a page added the picture to the store. A picture of a grid stays when its steps are removed.
    """
    cell = (planned.run, planned.checkpoint, planned.model_hash, planned.cell)
    if picture is not None:
        _save(*cell, picture)
    # Without steps, one black pixel stands for them: the file says that a page drew the picture.
    strip = np.concatenate([part for _, part in steps], axis=1) if steps else np.zeros((1, 1, 3), np.uint8)
    _save(*cell, strip, _steps_path(planned), steps=[number for number, _ in steps], own=own)
    unstarred = [path for _, path in _steps_by_age(planned.run) if not _star_path(path).exists()]
    for path in unstarred[:-MAX_WATCHED]:
        if (read_parameters(path) or {}).get("own"):
            path.with_name(path.name.replace(".steps.png", ".png")).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _star_path(picture: Path) -> Path:
    """Return the file that stars a picture if it exists, by the file of the picture or of its steps."""
    return picture.with_name(f"{picture.name.partition('.')[0]}.star")


def is_starred(planned: PlannedCell) -> bool:
    """Return whether a user starred a stored picture. A starred picture is not removed for newer ones."""
    return _star_path(planned.path).exists()


def set_star(planned: PlannedCell, starred: bool) -> None:
    """Star a stored picture, or remove its star.

    Raises:
        UserError: the store cannot be written.
    """
    path = _star_path(planned.path)
    try:
        path.touch() if starred else path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make its folder writable") from None


# --- Downloads and evaluations ---------------------------------------------------------------------------------------


def zip_pictures(planned: Sequence[PlannedCell]) -> bytes:
    """Return a ZIP file of the stored pictures, which contain their parameters, and of cells.json with all parameters."""
    file, rows = io.BytesIO(), []
    with zipfile.ZipFile(file, "w") as archive:
        for one in planned:
            if one.problem is None and read_cell(one.run, one.model_hash, one.cell) is not None:
                tab, row, column = one.at
                name = f"tab{tab + 1}-row{row + 1}-column{column + 1}.png"
                archive.write(one.path, name)
                model = f"{one.run.resolve().name}/{one.checkpoint}"
                rows.append({"file": name, "model": model, "model_hash": one.model_hash, **one.cell.settings()})
        archive.writestr("cells.json", json.dumps(rows, indent=2, ensure_ascii=False))
    return file.getvalue()


@dataclass(frozen=True)
class EvaluatedGrid:
    """The grid that evaluate_checkpoints.py left in the store: a cell with the settings that all pictures share, and
    the axes.
    """

    cell: Cell
    checkpoints: Axis
    guidance_scales: Axis
    samples: Axis

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        return self.checkpoints, self.guidance_scales, self.samples


def best_samples(evaluated: EvaluatedGrid, evaluation: Mapping[str, Any]) -> list[tuple[str, int, Any]]:
    """Return prompt, seed and reading of each picture that an evaluation reports at the chosen setting.

    The verdict states the shares of these pictures. Evaluations of earlier versions have no seeds of them, so the pictures
    of the sweep take their place. A damaged list is empty.

    Returns:
        For each picture also its entry of "readings", {"wanted": ..., "read": ...} per attribute. It is None if the
            picture was not read.
    """
    samples: Sequence[tuple[str, int]] = evaluated.samples.values
    if "seeds" in evaluation:
        try:
            pairs = zip(evaluation["prompts"], evaluation["seeds"], strict=True)
            samples = [(str(prompt), int(seed)) for prompt, seed in pairs]
        except (KeyError, TypeError, ValueError, OverflowError):
            return []
    further = [*_list(evaluation.get("readings")), *[None] * len(samples)]
    return [(prompt, seed, reading) for (prompt, seed), reading in zip(samples, further, strict=False)]


def read_cells(run: Path) -> Mapping[tuple[str, Cell], tuple[Any, Any]]:
    """Return the reading and the distance of each picture of a run's evaluation, by the hash of its model and by its cell.

    A reading is as in `best_samples`. A distance is that to the nearest training image, as `memorisation` defines it. What
    was not measured is None. Evaluations of earlier versions have none, and a damaged part is left out.
    """
    evaluated, file = evaluated_grid(run), run / "evaluation" / "pictures.json"
    try:
        state = file.stat()
    except OSError:
        return {}
    return _read_cells(file, evaluated.cell, state.st_size, state.st_mtime_ns) if evaluated else {}


@lru_cache(maxsize=8)  # for as long as the file stays as it is
def _read_cells(file: Path, common: Cell, *state: int) -> Mapping[tuple[str, Cell], tuple[Any, Any]]:
    found: dict[tuple[str, Cell], tuple[Any, Any]] = {}
    try:
        sets = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return found
    for drawn in sets if isinstance(sets, list) else ():
        try:
            scale, samples = float(drawn["guidance_scale"]), zip(drawn["prompts"], drawn["seeds"], strict=True)
            pairs = zip_longest(_list(drawn.get("readings")), _list(drawn.get("distances")))
            for (prompt, seed), measured in zip(samples, pairs, strict=False):
                cell = replace(common, prompt=str(prompt), seed=int(seed), guidance_scale=scale)
                found[str(drawn["model_hash"]), cell] = measured
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, UserError):
            continue
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def best_cells(
    run: Path, evaluated: EvaluatedGrid, report: Any, samples: Sequence[tuple[str, int, Any]]
) -> list[PlannedCell]:
    """Plan some of `best_samples` at the checkpoint and guidance scale that the evaluation chose.

    Args:
        report: "report" in evaluation.json. If it names no usable pair, there are no pictures.
    """
    try:
        cell = replace(evaluated.cell, guidance_scale=float(report["guidance_scale"]))
        axis = Axis("sample", tuple((prompt, seed) for prompt, seed, _ in samples))
        return plan(run, str(report["checkpoint"]), cell, [axis])
    except (KeyError, TypeError, ValueError, OverflowError, UserError):
        return []


def evaluated_grid(run: Path) -> EvaluatedGrid | None:
    """Return the grid of a run's evaluation, or None if the run was not evaluated."""
    try:
        sweep = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["sweep"]
        samples = tuple((str(prompt), int(seed)) for prompt, seed in zip(sweep["prompts"], sweep["seeds"], strict=True))
        return EvaluatedGrid(
            Cell(
                samples[0][0],
                seed=samples[0][1],
                num_inference_steps=int(sweep["num_inference_steps"]),
                scheduler=str(sweep["scheduler"]),
                guidance_end=float(sweep.get("guidance_end", 1.0)),
                guidance_rescale=float(sweep.get("guidance_rescale", 0.0)),
            ),
            Axis("checkpoint", tuple(map(str, sweep["checkpoints"]))),
            Axis("guidance_scale", tuple(map(float, sweep["guidance_scales"]))),
            Axis("sample", samples),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, UserError):
        return None
