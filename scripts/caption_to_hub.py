"""Caption photos: a dataset folder with its card, on disk and, if asked, on the Hub.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/caption_to_hub.py --dataset path/to/photos \
    --output_dir outputs/captioned --push_to_hub --hub_dataset_id ORG/NAME

Each batch of captions is appended to captions.jsonl, so the same command resumes a killed run. If you add photos later, only
these are captioned. Captions that you edit in captions.jsonl are kept. The photos themselves are stored unchanged.
"""

# Functions import torch, accelerate and transformers themselves: `--help` and the checks of options must not wait for them.

import json
import os
import re
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from PIL import Image
from tqdm import tqdm

from t2i.captions import auditing, ledger
from t2i.captions.ledger import WORK, Key
from t2i.captions.texts import check_templates, label_captions, prefixed, prefixed_all
from t2i.config import CaptionConfig, Recipe, dataset_name, parse, to_dict
from t2i.config_types import unlisted
from t2i.data import overview, prepared, records, sources, workers
from t2i.data.dataset_folder import save_dataset_folder
from t2i.data.images import HEIF_FIX, BadImage, decode_image, fit, has_gps, image_bytes, image_digest
from t2i.data.split_names import FOLDER_SHARD
from t2i.errors import UserError, run_main
from t2i.files import hash_json, json_lines, read_json, read_optional, sha256_file, write_json, write_text
from t2i.hub import dataset_card, model_card, upload
from t2i.redaction import public_yaml
from t2i.run_lock import lock_run
from t2i.runs import FREE_OF_CAPTIONING, RunFolder, code_revision
from t2i.training.distributed import broadcast_from_main, make_accelerator

if TYPE_CHECKING:
    from t2i.captions.captioners import ModelName

DECODE_SIDE = 768  # px; Florence-2 reads images at 768 px, other models at less
GRID, GRID_SIDE = 16, 128  # pictures in the card, and their side in px
BATCHES_AHEAD = 2  # batches that a thread decodes while the model generates
NO_MODEL = ("label", "existing")  # captioners that take their text from the data set
# Options that older folders do not record. They enter a run's settings only if they are set, so older folders still match.
NEWER_OPTIONS = ("no_repeat_ngram_size", "repetition_penalty")


@dataclass
class Photo:
    """An image of the source and the result of its inspection."""

    split: str
    row: int  # Row of the image within its split.
    file: str
    id: str  # First 32 hex digits of the SHA-256 of the image file.
    reason: str | None  # Reason why the image cannot be used, or None.
    colors: dict[str, float]  # Share of the image by color name. Empty if the image cannot be used.


@dataclass
class Entry:
    """A photo and its captions, as the data set gets them."""

    photo: Photo
    label: str | None
    # Line of captions.jsonl for each caption. The captions are cleaned and have the prefix.
    lines: dict[str, dict[str, Any]]

    @property
    def captions(self) -> list[str]:
        return list(self.lines)


def main() -> None:
    # options
    recipe = parse(("source", "caption"), __doc__ or "")
    config = recipe.caption
    limits = auditing.parse_thresholds(config.fail_on)
    check_templates(recipe.data.caption_template)
    upload.check_license(config.license or None)
    if config.push_to_hub:
        upload.check_repo_id(config.hub_dataset_id, "--hub_dataset_id")
    folder = Path(config.output_dir or "outputs/captioned")

    # accelerator
    accelerator = make_accelerator()
    is_main = accelerator.is_main_process
    if config.dry_run:
        if is_main:
            print_input(recipe)
        accelerator.wait_for_everyone()
        return
    if is_main and config.push_to_hub:  # before hours of work
        target = upload.Target(config.hub_revision, config.create_pr)
        upload.check_access(str(config.hub_dataset_id), "dataset", target=target)
    if is_main:
        require_own(folder, Path(str(recipe.data.dataset)).expanduser())

    with lock_run(folder, accelerator.process_index, accelerator.wait_for_everyone):
        # data
        (folder / WORK).mkdir(exist_ok=True)
        names = model_names(config)
        tasks_of(names, config)  # refuses tasks that no captioner takes, before photos are decoded
        source = sources.find_source(recipe.data)
        settings = run_settings(recipe, source, names)
        run = RunFolder(folder, settings | {"captions": captions_hash(folder)}, replace=True)
        unchanged = run.finished and (folder / "README.md").is_file() and (folder / "data").is_dir()

        if broadcast_from_main(unchanged, accelerator):
            if is_main:  # another node may have no run.json
                print(f"nothing to do: {folder} holds the captions of these {run.state['images']:,} images")
        else:
            # captions
            rows = open_rows(source, recipe, folder, accelerator)
            photos = load_photos(source, rows, recipe, folder, accelerator)
            missing, keys = plan_captions(photos, rows, recipe, names, folder, accelerator)
            accelerator.wait_for_everyone()  # all processes read captions.jsonl before one of them appends to it
            with run.timed("caption"):
                make_captions(missing, source, rows, recipe, names, folder, accelerator)
            accelerator.wait_for_everyone()

            # dataset folder
            if is_main:
                new_run = RunFolder(folder, settings | {"captions": captions_hash(folder)}, replace=True)
                new_run.state["seconds"] = run.state["seconds"]
                write_dataset(photos, keys, source, rows, recipe, names, new_run, folder)

        # audit and push
        if is_main:
            audit = read_json(folder / "audit.json")
            print("\n".join(auditing.audit_lines(audit)))
            auditing.check_thresholds(audit, limits)
            if config.push_to_hub:
                push(folder, config)
    accelerator.wait_for_everyone()


# --- Options and folders ---------------------------------------------------------------------------------------------


def require_own(folder: Path, dataset: Path) -> None:
    """Check that this script may write into `folder`.

    Raises:
        UserError: `folder` holds files that this script did not write, or it lies in the folder of the data set.
    """
    if dataset.is_dir() and folder.resolve().is_relative_to(dataset.resolve()):
        raise UserError(
            f"--output_dir {folder} lies in the data set {dataset}, whose images would mix with it; give another folder"
        )
    if not folder.is_dir() or (folder / WORK).is_dir():
        return
    # Another process of this run may have opened its lock there already.
    if any(not re.fullmatch(r"\.lock(-[0-9]+)?", path.name) for path in folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds something else; give a new or an empty folder")


def model_names(config: CaptionConfig) -> list["ModelName"]:
    """Return the name and the exact revision of each captioner.

    Raises:
        UserError: a model is not found, or `captioner_revision` could belong to several models.
    """
    from t2i.captions.captioners import ModelName, resolve

    captioners = list(dict.fromkeys(config.captioner))
    if config.captioner_revision and len(set(captioners) - set(NO_MODEL)) > 1:
        raise UserError(
            f"--captioner_revision {config.captioner_revision} could belong to several captioners; leave it out, or caption "
            "by one of them"
        )
    names = [
        ModelName(captioner, "", "") if captioner in NO_MODEL else resolve(captioner, config.captioner_revision)
        for captioner in captioners
    ]
    return list({(name.model, name.revision): name for name in names}.values())


def run_settings(recipe: Recipe, source: records.Source, names: list["ModelName"]) -> dict[str, Any]:
    """Return the settings that must be unchanged for the captions in the output folder to be reused."""
    settings = {key: value for key, value in asdict(recipe.caption).items() if key not in FREE_OF_CAPTIONING}
    settings = {key: value for key, value in settings.items() if value is not None or key not in NEWER_OPTIONS}
    settings |= {key: unlisted(settings[key]) for key in ("captioner", "task")}
    data = recipe.data
    prefix = [data.caption_prefix] if data.caption_prefix else []
    texts = [unlisted(data.caption_column), unlisted(data.caption_template)]
    columns = [data.image_column, *texts, data.label_names, *prefix]
    models = [asdict(name) | {"path": ""} for name in names]
    return settings | {
        "images": source.identity,
        "model": models if len(models) > 1 else models[0],
        "columns": columns,
        **({} if HEIF_FIX else {"heif": True}),  # With pillow-heif, photos are read that were left out without it.
    }


def captions_hash(folder: Path) -> str:
    """Return a hash of captions.jsonl; "" if the file does not exist."""
    file = folder / "captions.jsonl"
    return sha256_file(file)[:16] if file.is_file() else ""


# --- Photos ----------------------------------------------------------------------------------------------------------


def print_input(recipe: Recipe) -> None:
    """Print the summary of the data set that this command would read, and write nothing."""
    if len(recipe.caption.task) > 1 and "florence2" not in recipe.caption.captioner:
        tasks_of(model_names(recipe.caption), recipe.caption)  # refuses tasks that no captioner takes
    source = sources.find_source(recipe.data)
    with tempfile.TemporaryDirectory(prefix="t2i-") as scratch:
        rows = ordered_rows(source, recipe, Path(scratch))
        photos = list(inspect_photos(source, rows, recipe))
        print_overview(source, rows, photos, recipe)
        check_bad_share(source, photos, recipe, Path(scratch))


def open_rows(source: records.Source, recipe: Recipe, folder: Path, accelerator: Any) -> dict[str, datasets.Dataset]:
    """Return the rows of the source by split, with undecoded images."""
    with accelerator.local_main_process_first():  # the other processes reuse its copy of Parquet files
        return ordered_rows(source, recipe, folder / WORK / "source")


def ordered_rows(source: records.Source, recipe: Recipe, scratch: Path) -> dict[str, datasets.Dataset]:
    """Return the rows of the source by split, train first. Temporary copies of files go to `scratch`."""
    rows = source.open(scratch)
    order = [split for split in ("train", "validation", "test") if split in rows]
    return {split: records.check_image_column(rows[split], recipe.data, source.name, split) for split in order}


def load_photos(
    source: records.Source, rows: dict[str, Any], recipe: Recipe, folder: Path, accelerator: Any
) -> list[Photo]:
    """Return all photos. The main process inspects them once and stores the result in `WORK`."""
    identity = [source.identity, recipe.data.image_column, *([] if HEIF_FIX else ["heif"])]
    stored = folder / WORK / f"photos-{hash_json(identity)}.jsonl"
    if accelerator.is_main_process and not stored.is_file():
        write_text(stored, "".join(json.dumps(asdict(photo)) + "\n" for photo in inspect_photos(source, rows, recipe)))
    accelerator.wait_for_everyone()
    photos = [Photo(**json.loads(line)) for line in stored.read_text(encoding="utf-8").splitlines()]
    if accelerator.is_main_process:
        bad = bad_photos(source, photos)
        print_overview(source, rows, photos, recipe)
        listing = folder / "quarantine.jsonl"
        write_text(listing, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
        check_bad_share(source, photos, recipe, listing)
        if bad:
            print(f"{len(bad):,} of {len(photos):,} images cannot be used; {listing} lists them with the reason")
    return photos


def inspect_photos(source: records.Source, rows: dict[str, Any], recipe: Recipe) -> Iterator[Photo]:
    """Decode each image once, and yield a `Photo` with hash and colors, or with the reason why it cannot be used."""

    def inspect(cell: Any) -> tuple[str | None, str, str | None, dict[str, float]]:
        name, digest = cell and cell["path"], image_digest(cell, source.roots).hex()[:32]
        try:
            data = image_bytes(cell, source.roots)
            pixels = fit(decode_image(data, draft_side=auditing.COLOR_SIDE), auditing.COLOR_SIDE)
        except BadImage as error:
            return name, digest, error.reason, {}
        return name, digest, None, auditing.dominant_colors(pixels)

    total = sum(map(len, rows.values()))
    bar = tqdm(total=total, desc="images", unit="image", mininterval=0.5)
    with ThreadPoolExecutor(workers.WORKERS) as pool, bar:
        for split, split_rows in rows.items():
            column = split_rows.select_columns([recipe.data.image_column])
            cells = (row[recipe.data.image_column] for row in column)
            for index, (name, digest, reason, colors) in enumerate(workers.in_order(pool, inspect, cells)):
                yield Photo(split, index, records.shown_file(name, split, index), digest, reason, colors)
                bar.update()


def bad_photos(source: records.Source, photos: list[Photo]) -> list[dict[str, Any]]:
    """Return file, split and reason of each image that cannot be used."""
    bad = [{"file": photo.file, "split": photo.split, "reason": photo.reason} for photo in photos if photo.reason]
    return source.quarantine + bad


def check_bad_share(source: records.Source, photos: list[Photo], recipe: Recipe, listing: Path) -> None:
    """Raise `UserError` if more images are bad than `--max_bad_share` allows. `listing` is the file that lists these images."""
    total = len(photos) + len(source.quarantine)
    prepared.check_bad_share(source.name, bad_photos(source, photos), total, recipe.data.max_bad_share, listing)


def print_overview(source: records.Source, rows: dict[str, Any], photos: list[Photo], recipe: Recipe) -> None:
    """Print the summary table of `t2i.data.overview`: the images, and the captions if the data set has any."""
    usable = [photo for photo in photos if not photo.reason]
    texts = source_texts(rows, recipe)
    captioners = recipe.caption.captioner
    models = [captioner for captioner in captioners if captioner not in NO_MODEL]
    labels = {split: labels_of(split_rows, recipe) for split, split_rows in rows.items()}
    columns: dict[str, dict[str, list[Any]]] = {
        split: {"file": [], "caption": [], "captions": [], "label": []} for split in rows
    }
    for photo in usable:
        table, names = columns[photo.split], labels[photo.split]
        found = [text for by_split in texts.values() for text in by_split[photo.split][photo.row] if text]
        captions = prefixed_all(found or [""], recipe.data.caption_prefix)
        table["file"].append(photo.file)
        table["caption"].append(captions[0])
        table["captions"].append(captions)
        table["label"].append(names[photo.row] if names else None)
    copies = {
        split: len(table["file"]) - len({photo.id for photo in usable if photo.split == split})
        for split, table in columns.items()
    }
    understood = overview.describe(columns)
    notes = dict(source.notes)
    origins = [f"to be made by {', '.join(models)}"] if models else []
    origins += ["from the class"] if "label" in captioners else []
    if "existing" in captioners:
        of_splits = {
            split: (records.caption_columns(split_rows, recipe.data, source.name, split)[0], None)
            for split, split_rows in rows.items()
        }
        origins += records.caption_origins(rows, of_splits, "captions_from" in notes, recipe.data)
    else:
        notes["captions_from"] = {}
    notes["caption_columns"] = origins
    if models:
        examples = [(file, "(to be made)") for file, _ in understood["examples"]]
        understood |= {"captions": None, "examples": examples}
    reasons = Counter(row["reason"].split(":")[0] for row in bad_photos(source, photos))
    report = {
        "dataset": source.name,
        "splits": {split: {"images": len(table["file"])} for split, table in columns.items()},
        "quarantined_by_reason": dict(reasons.most_common()),
        "duplicates": copies,
        "understood": understood,
        "caption_prefix": recipe.data.caption_prefix,
    }
    print(overview.table(report | notes))


# --- Captions --------------------------------------------------------------------------------------------------------


def plan_captions(
    photos: list[Photo],
    rows: dict[str, Any],
    recipe: Recipe,
    names: list["ModelName"],
    folder: Path,
    accelerator: Any,
) -> tuple[dict[Key, tuple[Photo, str]], list[list[Key]]]:
    """Compare the photos with captions.jsonl, and find the captions that are still missing.

    Copies of an image share their captions, unless the data set has captions for each copy.

    Returns:
        The captions to make, `{key: (photo, text)}`. The text is "" if a model makes the caption.
        The keys of each photo's captions. Photos that cannot be used have none.
    """
    texts = source_texts(rows, recipe)
    tasks = tasks_of(names, recipe.caption)
    done = ledger.read(folder / "captions.jsonl")
    edited: dict[tuple[str, str], list[Key]] = {}  # by image and model
    for key, row in done.items():
        if is_edited(row):
            edited.setdefault((key.image, key.model), []).append(key)
    missing: dict[Key, tuple[Photo, str]] = {}
    keys: list[list[Key]] = []
    outdated = 0  # edited captions whose label or text has changed since
    for photo in photos:
        planned: dict[Key, str] = {}  # the text of each key
        for name in names if not photo.reason else ():
            if name.revision:
                model, prompt = (name.model, name.revision), recipe.caption.prompt
                planned |= {Key(photo.id, *model, task, prompt): "" for task in tasks[model]}
                continue
            own = {Key(photo.id, name.model, "", "", hash_json(text)): text
                   for text in texts[name.model][photo.split][photo.row]}  # fmt: skip
            replaced = [key for key in edited.get((photo.id, name.model), ()) if key not in own]
            for key, text in own.items():
                kept = replaced.pop() if key not in done and replaced else None
                outdated += kept is not None
                planned[kept or key] = text
        keys.append(list(planned))
        for key, text in planned.items():
            if key not in done:
                missing.setdefault(key, (photo, text))

    distinct = {key for keys_of_photo in keys for key in keys_of_photo}
    settings = generation_settings(recipe.caption)
    other = sum(done[key].get("settings", settings) != settings for key in distinct if key in done)
    if other:
        accelerator.print(
            f"{other:,} captions were made with other settings and are kept; to make them again, delete their lines in "
            "captions.jsonl"
        )
    if outdated:
        accelerator.print(
            f"{outdated:,} captions that you edited are kept, though their text in the data set has changed; to take the new "
            "text, delete their lines in captions.jsonl"
        )
    existing = len(distinct) - len(missing)
    if existing and missing:
        accelerator.print(f"captions: {existing:,} exist already, {len(missing):,} will be made")
    return missing, keys


def is_edited(line: dict[str, Any]) -> bool:
    """Return whether a person has edited the caption in this line of captions.jsonl."""
    return bool(line.get("made") != hash_json(line["caption"]))


def tasks_of(names: list["ModelName"], config: CaptionConfig) -> dict[tuple[str, str], list[str]]:
    """Return the tasks by model and revision: all of `--task` for Florence-2, and the first task for other models.

    Raises:
        UserError: `--task` names several tasks, and no captioner is a Florence-2.
    """
    from t2i.captions.captioners import takes_tasks

    tasks, models = list(dict.fromkeys(config.task)), [name for name in names if name.revision]
    one = len(tasks) == 1
    of_models = {(name.model, name.revision): tasks if one or takes_tasks(name) else tasks[:1] for name in models}
    if models and tasks not in of_models.values():
        raise UserError(
            f"--task names {len(tasks)} tasks, which only Florence-2 takes; name one task, or --captioner florence2"
        )
    return of_models


def source_texts(rows: dict[str, Any], recipe: Recipe) -> dict[str, dict[str, list[list[str]]]]:
    """Return the captions that come from the data set itself or from its labels.

    Returns:
        The captions of each row, `{captioner: {split: captions}}`, for those captioners that are in `NO_MODEL`.
    """
    texts: dict[str, dict[str, list[list[str]]]] = {}
    for kind in recipe.caption.captioner:
        for split, split_rows in rows.items() if kind in NO_MODEL else ():
            make = label_texts if kind == "label" else existing_texts
            texts.setdefault(kind, {})[split] = make(split_rows, split, recipe)
    return texts


def label_texts(split_rows: datasets.Dataset, split: str, recipe: Recipe) -> list[list[str]]:
    """Return the captions that the label of each row gives by `--caption_template`."""
    data, labels = recipe.data, labels_of(split_rows, recipe)
    if labels is None and split == "train":
        raise UserError(
            f"{data.dataset} has no labels; choose another --captioner, or sort the images into class folders"
        )
    records.check_label_names(labels or [], data, str(data.dataset))
    return [label_captions(label, data.caption_template) for label in labels or [None] * len(split_rows)]


def existing_texts(split_rows: datasets.Dataset, split: str, recipe: Recipe) -> list[list[str]]:
    """Return the captions that each row brings."""
    name = str(recipe.data.dataset)
    columns = records.caption_columns(split_rows, recipe.data, name, split)[0]
    if not columns and split == "train":
        raise UserError(f"{name} has no captions; {records.CAPTION_FIX}")
    kinds = split_rows.features
    texts = [[records.plain(kinds[column], value) for value in split_rows[column][:]] for column in columns]
    values = zip(*texts, strict=True) if columns else [()] * len(split_rows)
    rows = (dict(zip(columns, row, strict=True)) for row in values)
    return [records.clean_all(row, f"{name} ({split}), row {number}") for number, row in enumerate(rows)]


def labels_of(split_rows: datasets.Dataset, recipe: Recipe) -> list[str | None] | None:
    """Return the label name of each row, or None if the split has no labels."""
    column = records.label_column(split_rows)
    if column is None:
        return None
    kind = split_rows.features[column]
    return [records.label_name(records.plain(kind, value), recipe.data.label_names) for value in split_rows[column]]


def make_captions(
    missing: dict[Key, tuple[Photo, str]],
    source: records.Source,
    rows: dict[str, Any],
    recipe: Recipe,
    names: list["ModelName"],
    folder: Path,
    accelerator: Any,
) -> None:
    """Make this process's share of the missing captions and append each batch to captions.jsonl."""
    config, own = recipe.caption, slice(accelerator.process_index, None, accelerator.num_processes)
    given = [(key, photo, text) for key, (photo, text) in missing.items() if not key.revision]
    if given:
        ledger.append(folder / "captions.jsonl", [ledger_line(*caption, config) for caption in given[own]])
    for name in names:
        of_model = [(key, photo) for key, (photo, _) in missing.items() if key[1:3] == (name.model, name.revision)]
        if not name.revision or not of_model:
            continue

        import torch

        from t2i.captions import captioners

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        with accelerator.local_main_process_first():  # the other processes reuse its download
            by_task = captioners.load(name, config, accelerator.device, dtype)
        for task, captioner in by_task.items():
            work = [(key, photo) for key, photo in of_model if key.task == task][own]
            for batch, texts in caption_batches(work, captioner, source, rows, recipe, accelerator):
                made = [(key, photo, text) for (key, photo), text in zip(batch, texts, strict=True)]
                ledger.append(folder / "captions.jsonl", [ledger_line(*caption, config) for caption in made])
        del by_task, captioner  # two models need not fit into memory together


def caption_batches(
    work: list[tuple[Key, Photo]],
    captioner: Any,
    source: records.Source,
    rows: dict[str, Any],
    recipe: Recipe,
    accelerator: Any,
) -> Iterator[tuple[list[tuple[Key, Photo]], list[str]]]:
    """Yield batches of photos with their captions. A thread decodes the next batches meanwhile.

    The batch size is halved if memory runs out."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    column = recipe.data.image_column
    # Other columns may hold images too, and damaged ones, which nobody needs to decode.
    cells_of = {split: split_rows.select_columns([column]) for split, split_rows in rows.items()}

    def load(batch: list[tuple[Key, Photo]]) -> tuple[list[Any], list[Image.Image], Any]:
        cells = (cells_of[photo.split][photo.row][column] for _, photo in batch)
        images = [decode_image(image_bytes(cell, source.roots), draft_side=DECODE_SIDE) for cell in cells]
        return batch, images, captioner.prepare(images)

    size, position = recipe.caption.caption_batch_size, 0
    process = f" (process 1 of {accelerator.num_processes})" if accelerator.num_processes > 1 else ""
    task = f" {work[0][0].task}" if work and len(recipe.caption.task) > 1 else ""
    bar = tqdm(total=len(work), desc=f"captions{task}{process}", unit="image", disable=not accelerator.is_main_process)
    with ThreadPoolExecutor(1) as pool, bar:
        loading: deque[Future[Any]] = deque()
        while loading or position < len(work):
            while len(loading) < BATCHES_AHEAD and position < len(work):
                loading.append(pool.submit(load, work[position : position + size]))
                position += size
            batch, images, inputs = loading.popleft().result()
            if len(batch) <= size:
                try:
                    texts = captioner.read(captioner.generate(inputs), images)
                except (RuntimeError, MemoryError) as error:
                    if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                        raise
                    if len(batch) == 1:
                        raise UserError(
                            "memory runs out for a single image; use a smaller model, or lower --num_beams or --max_new_tokens"
                        ) from None
                    size = max(1, len(batch) // 2)
                    clear_device_cache(garbage_collection=True)
                    tqdm.write(f"out of memory: continuing with batches of {size}")
                else:
                    yield batch, texts
                    bar.update(len(batch))
                    continue
            smaller = [batch[start : start + size] for start in range(0, len(batch), size)]
            loading.extendleft(reversed([pool.submit(load, items) for items in smaller]))


def generation_settings(config: CaptionConfig) -> str:
    """Return the settings of text generation that are not part of a caption's key, although they change the captions."""
    openings = "stripped" if config.strip_boilerplate else "kept"
    newer = "".join(f", {key} {value:g}" for key in NEWER_OPTIONS if (value := getattr(config, key)) is not None)
    return f"{config.num_beams} beams, at most {config.max_new_tokens} tokens, openings {openings}{newer}"


def ledger_line(key: Key, photo: Photo, text: str, config: CaptionConfig) -> dict[str, Any]:
    """Return the line of captions.jsonl for a caption.

    In the line, `made` is a hash of the caption, by which later edits are recognised. `raw` is the text before cleaning, if
    cleaning changed it.
    """
    caption = auditing.clean_caption(text)
    if config.strip_boilerplate and key.revision:
        caption = auditing.strip_boilerplate(caption)[0]
    line = {**key._asdict(), "file": photo.file, "caption": caption, "made": hash_json(caption)}
    if key.revision:
        line["settings"] = generation_settings(config)
    return line | ({"raw": text} if text != caption else {})


# --- The dataset folder ----------------------------------------------------------------------------------------------


def write_dataset(
    photos: list[Photo],
    keys: list[list[Key]],
    source: records.Source,
    rows: dict[str, Any],
    recipe: Recipe,
    names: list["ModelName"],
    run: RunFolder,
    folder: Path,
) -> None:
    """Write the data set's Parquet shards, audit and card from the present content of captions.jsonl."""
    lines = ledger.read(folder / "captions.jsonl")
    labels = {split: labels_of(split_rows, recipe) for split, split_rows in rows.items()}
    entries = []
    for photo, keys_of_photo in zip(photos, keys, strict=True):
        if keys_of_photo:
            labels_of_split = labels[photo.split]
            label = labels_of_split[photo.row] if labels_of_split else None
            entries.append(make_entry(photo, label, [lines[key] for key in keys_of_photo], recipe.data.caption_prefix))
    labelled = any(labels.values())
    write_json(folder / "audit.json", audit := audit_of(entries, labelled, recipe))

    staging = folder / WORK / "dataset"
    shutil.rmtree(staging, ignore_errors=True)
    features = features_of(rows, labelled, any(len(entry.lines) > 1 for entry in entries), recipe)
    by_split = {split: [entry for entry in entries if entry.photo.split == split] for split in rows}
    located: list[str] = []
    splits = {
        split: dataset_rows(split_entries, rows[split], source, features, recipe, located)
        for split, split_entries in by_split.items()
        if split_entries
    }
    card = make_card(entries, audit, recipe, names, source, rows, folder)
    counts = save_dataset_folder(staging, splits, features, card)

    readme = folder / "README.md"
    new_card = (staging / "README.md").read_text(encoding="utf-8")
    old_card = readme.read_text(encoding="utf-8") if readme.is_file() else None
    renewed = {"size_categories", *(["license"] if recipe.caption.license != "unknown" else [])}
    merged = dataset_card.merge_cards(new_card, old_card, renewed)
    shutil.rmtree(folder / "data", ignore_errors=True)
    os.replace(staging / "data", folder / "data")
    write_text(readme, merged)
    shutil.rmtree(folder / WORK / "source", ignore_errors=True)
    write_text(folder / "config.yaml", public_yaml(to_dict(recipe)))
    run.finish(images=sum(counts.values()), splits=counts, images_with_gps=len(located))
    print(f"{sum(counts.values()):,} captioned images in {folder}: {counts}")


def make_entry(photo: Photo, label: str | None, lines: list[dict[str, Any]], prefix: str) -> Entry:
    """Return a photo with its distinct captions. An empty caption stays only if there is no other."""
    by_caption: dict[str, dict[str, Any]] = {}
    for line in lines:  # captions.jsonl holds captions without the prefix, as they were made or edited
        by_caption.setdefault(prefixed(auditing.clean_caption(line["caption"]), prefix), line)
    return Entry(photo, label, {text: line for text, line in by_caption.items() if text} or by_caption)


def audit_of(entries: list[Entry], labelled: bool, recipe: Recipe) -> dict[str, Any]:
    """Return the audit of all captions. Images of one label share captions that are made of labels on purpose."""
    each = [(entry, caption, line) for entry in entries for caption, line in entry.lines.items()]
    return auditing.audit(
        [caption for _, caption, _ in each],
        [
            str(entry.label) if (line["model"], line["revision"]) == ("label", "") else entry.photo.id
            for entry, _, line in each
        ],
        files=[entry.photo.file for entry, _, _ in each],
        labels=[entry.label for entry, _, _ in each] if labelled else None,
        colors=[entry.photo.colors for entry, _, _ in each],
        raw=[line.get("raw") for _, _, line in each],
        tokenizer=load_tokenizer(recipe.caption.audit_tokenizer),
    )


def make_card(
    entries: list[Entry],
    audit: dict[str, Any],
    recipe: Recipe,
    names: list["ModelName"],
    source: records.Source,
    rows: dict[str, Any],
    folder: Path,
) -> str:
    """Return the text of the dataset card, and write its picture grid to images/grid.png."""
    config, data = recipe.caption, recipe.data
    shown = entries[:: max(1, len(entries) // GRID)][:GRID]  # from all over the data set
    cells_of = {split: split_rows.select_columns([data.image_column]) for split, split_rows in rows.items()}
    cells = (cells_of[entry.photo.split][entry.photo.row][data.image_column] for entry in shown)
    images = (decode_image(image_bytes(cell, source.roots), draft_side=GRID_SIDE) for cell in cells)
    grid = dataset_card.caption_grid(
        [fit(image, GRID_SIDE) for image in images], [entry.captions[0] for entry in shown], side=GRID_SIDE
    )
    (folder / "images").mkdir(exist_ok=True)
    grid.save(folder / "images" / "grid.png")

    numbers = [len(entry.lines) for entry in entries]
    lines = [line for entry in entries for line in entry.lines.values()]
    several = max(numbers, default=0) > 1
    making: dict[str, Any] = {"Captioner": ", ".join(config.captioner), "Captions": f"{len(lines):,}"}
    if several:
        making["Captions per image"] = (
            f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else max(numbers)
        )
    making["Edited by hand"] = f"{sum(map(is_edited, lines)):,}"
    if "label" in config.captioner:
        making["Template"] = "; ".join(data.caption_template)
    models = [name for name in names if name.revision]
    if models:
        settings = Counter(line["settings"] for line in lines if "settings" in line)
        making |= {
            "Model": ", ".join(name.model for name in models),
            "Revision": ", ".join(name.revision for name in models),
            "Task": ", ".join(config.task),
            "Prompt": config.prompt or "none",
            "Settings": "; ".join(f"{text} ({count:,})" for text, count in settings.most_common()),
        }
    if data.caption_prefix:
        making["Prefix of each caption"] = data.caption_prefix
    hub_id = model_card.hub_id(data.dataset)
    return dataset_card.render_dataset_card(
        name=str(config.hub_dataset_id or folder.resolve().name).split("/")[-1],
        source=hub_id or dataset_name(data),
        splits=dict(Counter(entry.photo.split for entry in entries)),
        making=making,
        audit=audit,
        quarantine=list(json_lines(folder / "quarantine.jsonl")),
        provenance={
            "Images": source.identity,
            "Captions": captions_hash(folder),
            "Data set revision": source.notes.get("revision") or "none",
            "Code revision": code_revision(),
        },
        grid="images/grid.png",
        several_captions=several,
        repo_id=config.hub_dataset_id,
        license=config.license,
        source_datasets=[f"extended|{hub_id}"] if hub_id else ["original"],
    )


def load_tokenizer(source: str) -> Any:
    """Return the CLIP tokenizer that counts tokens. If it cannot be loaded, print why and return None."""
    from transformers import CLIPTokenizer

    from t2i.models import load_part

    with suppress(UserError):  # a copy in the Hub's cache needs no network
        return load_part(CLIPTokenizer, source, "tokenizer", local_files_only=True)
    try:
        with upload.limited(upload.CHECK_S):  # one check of the audit is not worth minutes of retries
            return load_part(CLIPTokenizer, source, "tokenizer")
    except UserError as error:
        print(f"caption lengths are not measured: {error}; or name a folder with a tokenizer in --audit_tokenizer")
        return None


def features_of(rows: dict[str, datasets.Dataset], labelled: bool, several: bool, recipe: Recipe) -> datasets.Features:
    """Return the columns of the dataset folder: image, caption, label, and the source's other plain columns.

    If an image has several captions, `caption` holds lists. A column whose type differs between splits becomes text.
    """
    text, train = datasets.Value("string"), rows["train"]
    reserved: set[str | None] = {
        recipe.data.image_column,
        "image",
        "caption",
        "text",
        "label",
        "labels",
        *recipe.data.caption_column,
    }
    reserved.add(records.label_column(train))
    caption = datasets.List(text) if several else text
    columns = {"image": datasets.Image(), "caption": caption, **({"label": text} if labelled else {})}
    for key, kind in train.features.items():
        if key in reserved or not records.is_plain(kind):
            continue
        alike = all(split_rows.features.get(key, kind) == kind for split_rows in rows.values())
        columns[key] = kind if alike and not isinstance(kind, datasets.ClassLabel) and kind.dtype != "null" else text
    return datasets.Features(columns)


def dataset_rows(
    entries: list[Entry],
    split_rows: datasets.Dataset,
    source: records.Source,
    features: datasets.Features,
    recipe: Recipe,
    located: list[str],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split of the dataset folder. The bytes of the images do not change.

    Names of photos that say where they were taken are appended to `located`.
    """
    other = features.keys() - {"image", "caption", "label"}
    wanted = [key for key in split_rows.column_names if key in other or key == recipe.data.image_column]
    selected = split_rows.select_columns(wanted)
    for entry in entries:
        row = selected[entry.photo.row]
        data = image_bytes(row[recipe.data.image_column], source.roots)
        if has_gps(data):
            located.append(entry.photo.file)
        image = {"bytes": data, "path": Path(entry.photo.file).name}
        caption = entry.captions if isinstance(features["caption"], datasets.List) else entry.captions[0]
        out: dict[str, Any] = {"image": image, "caption": caption, "label": entry.label}
        for key in features:
            if key not in out:
                value = records.plain(split_rows.features[key], row[key]) if key in row else None
                out[key] = str(value) if value is not None and features[key].dtype == "string" else value
        yield {key: value for key, value in out.items() if key in features}


def push(folder: Path, config: CaptionConfig) -> None:
    """Upload the dataset folder to the Hub. Texts that people wrote into the card, here or on the Hub, stay."""
    if located := read_optional(folder / "run.json").get("images_with_gps"):
        print(
            f"NOTE: {located:,} photos contain their location (GPS in EXIF), and go to {config.hub_dataset_id} unchanged; to "
            "prevent that, remove the location from your photos (exiftool -r -gps:all= FOLDER), and caption them again"
        )
    card, pushed = folder / "README.md", folder / WORK / "pushed.md"
    ours = card.read_text(encoding="utf-8")
    last = pushed.read_text(encoding="utf-8") if pushed.is_file() else None
    merged = ours

    def merge(theirs: str | None) -> str:
        nonlocal merged  # if the Hub's card is the one of the last push, ours contains all of it
        merged = ours if theirs in (None, last) else dataset_card.merge_cards(ours, theirs)
        return merged

    shards = (re.fullmatch(FOLDER_SHARD, f"data/{path.name}") for path in folder.glob("data/*.parquet"))
    number = "[0-9]" * 5
    own = [
        f"data/{split}-{number}-of-{number}.parquet" for split in sorted({shard["split"] for shard in shards if shard})
    ]
    result = upload.push_folder(
        folder,
        str(config.hub_dataset_id),
        "dataset",
        files=["README.md", *own, "images/grid.png"],
        message="Captioned images",
        private=config.hub_private_repo,
        deadline=config.hub_deadline,
        merge_card=merge,
        target=upload.Target(config.hub_revision, config.create_pr),
    )
    edited_here = last is None or dataset_card.merge_cards(ours, last) != ours
    if merged != ours and edited_here:
        local = folder / "README.local.md"
        write_text(local, ours)
        print(f"README.md was edited on the Hub and here: the Hub's text is kept, yours is in {local}")
    write_text(card, merged)
    write_text(pushed, merged)
    print(result)
    if others := [name for name in result.others if name.endswith(".parquet")]:
        print(
            f"NOTE: {len(others):,} other Parquet files stay in {config.hub_dataset_id} ({', '.join(others[:3])}"
            f"{', …' if len(others) > 3 else ''}); delete them there if they are of no use"
        )


if __name__ == "__main__":
    run_main(main)
