"""Caption photos: a dataset folder with its card, on disk and, if asked, on the Hub.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/caption_to_hub.py --dataset path/to/photos \
    --output_dir outputs/captioned --push_to_hub --hub_dataset_id ORG/NAME

Captions are kept in captions.jsonl as they are made: a killed run goes on where it stopped, photos added later are
captioned alone, and captions edited there by hand survive. The photos themselves are stored as they are.
"""

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

from t2i.captions.ledger import Key
from t2i.config import CaptionConfig, Recipe, parse, to_dict
from t2i.errors import UserError, run_main
from t2i.files import hash_json, read_json, sha256_file, write_json, write_text
from t2i.run_lock import lock_run
from t2i.runs import RunFolder, code_revision

if TYPE_CHECKING:
    import datasets
    from PIL import Image

    from t2i.captions.captioners import ModelName
    from t2i.data.records import Source

DECODE_SIDE = 768  # px; Florence-2 looks at 768 px, other models at less
LOOK_SIDE = 64  # px; colors are looked up at this size
WORK = (
    ".captioning"  # within the output folder: what the script keeps for itself, and the sign that the folder is its own
)
GRID, GRID_SIDE = 16, 128  # pictures in the card, and their side in px
AHEAD = 2  # batches that are decoded while the model works
# What may change without another data set: how the work is done and where it goes.
PASSING = {
    "output_dir",
    "dry_run",
    "caption_batch_size",
    "fail_on",
    "push_to_hub",
    "hub_private_repo",
    "hub_deadline",
    "hub_revision",
    "create_pr",
}
# Options that came later: while they are unset they stay out of a run's settings, so that earlier folders still match.
LATER = ("no_repeat_ngram_size", "repetition_penalty")


@dataclass
class Photo:
    """One image of the source, looked at once."""

    split: str
    row: int  # in its split
    file: str
    id: str  # first 32 hex digits of the SHA-256 of the image file
    reason: str | None  # why it cannot be used
    colors: dict[str, float]  # named colors and their shares, where it can


def main() -> None:
    recipe = parse(("source", "caption"), __doc__ or "")
    config = recipe.caption
    from t2i.captions import auditing
    from t2i.hub import upload

    limits = auditing.parse_thresholds(config.fail_on)
    upload.check_license(config.license or None)
    if config.push_to_hub:
        upload.check_repo_id(config.hub_dataset_id, "--hub_dataset_id")
    folder = Path(config.output_dir or "outputs/captioned")

    # accelerator
    from t2i.training.distributed import broadcast_from_main, make_accelerator

    accelerator = make_accelerator()
    if config.dry_run:
        if accelerator.is_main_process:
            with tempfile.TemporaryDirectory(prefix="t2i-") as scratch:
                understand(recipe, Path(scratch))
        accelerator.wait_for_everyone()
        return
    if config.push_to_hub and accelerator.is_main_process:
        target = upload.Target(config.hub_revision, config.create_pr)
        upload.check_access(str(config.hub_dataset_id), "dataset", target=target)  # before hours of work
    if accelerator.is_main_process:
        require_own(folder, Path(str(recipe.data.dataset)).expanduser())
    with lock_run(folder, accelerator.process_index, accelerator.wait_for_everyone):
        (folder / WORK).mkdir(exist_ok=True)
        # data
        from t2i.data.sources import find_source

        source = find_source(recipe.data)
        name = model_name(config)
        settings = {key: value for key, value in asdict(config).items() if key not in PASSING}
        settings = {key: value for key, value in settings.items() if value is not None or key not in LATER}
        settings |= {"images": source.identity, "model": asdict(name) | {"path": ""}, "columns": columns_of(recipe)}
        run = RunFolder(folder, settings | {"captions": captions_hash(folder)}, replace=True)
        unchanged = run.finished and (folder / "README.md").is_file() and (folder / "data").is_dir()
        if broadcast_from_main(unchanged, accelerator):
            if accelerator.is_main_process:  # another node may have no run.json
                print(f"nothing to do: {folder} holds the captions of these {run.state['images']:,} images")
        else:
            # caption
            rows = open_rows(source, recipe, folder, accelerator)
            photos = look(source, rows, recipe, folder, accelerator)
            todo, wanted = work_list(photos, rows, recipe, name, folder, accelerator)
            accelerator.wait_for_everyone()  # each has read captions.jsonl before one adds to it
            with run.timed("caption"):
                caption(todo, source, rows, recipe, name, folder, accelerator)
            accelerator.wait_for_everyone()
            # finish
            if accelerator.is_main_process:
                state = RunFolder(folder, settings | {"captions": captions_hash(folder)}, replace=True)
                state.state["seconds"] = run.state["seconds"]
                write_dataset(photos, wanted, source, rows, recipe, name, state, folder)
        if accelerator.is_main_process:
            audit = read_json(folder / "audit.json")
            print("\n".join(auditing.audit_lines(audit)))
            auditing.check_thresholds(audit, limits)
            if config.push_to_hub:
                push(folder, config)
    accelerator.wait_for_everyone()


def understand(recipe: Recipe, scratch: Path) -> None:
    """Say what was understood of the input, and end there."""
    from t2i.data.prepared import check_bad_share
    from t2i.data.sources import find_source

    source = find_source(recipe.data)
    rows = candidates(source, recipe, scratch)
    photos = list(_look(source, rows, recipe))
    bad = bad_photos(source, photos)
    say_understood(source, rows, photos, recipe)
    check_bad_share(source.name, bad, len(photos) + len(source.quarantine), recipe.data.max_bad_share, scratch)


def say_understood(source: "Source", rows: dict[str, Any], photos: list[Photo], recipe: Recipe) -> None:
    """The table of `t2i.data.overview`: the captions that are there, where they are used, else the images alone."""
    from t2i.data import overview
    from t2i.data.records import caption_columns, caption_origins, count_several, prefixed

    good = [photo for photo in photos if not photo.reason]
    texts = source_texts(rows, recipe)
    labels = {split: labels_of(part, recipe) for split, part in rows.items()}
    columns: dict[str, dict[str, list[Any]]] = {split: {"file": [], "caption": [], "label": []} for split in rows}
    for photo in good:
        part, names = columns[photo.split], labels[photo.split]
        part["file"].append(photo.file)
        part["caption"].append(prefixed(texts[photo.split][photo.row], recipe.data.caption_prefix) if texts else "")
        part["label"].append(names[photo.row] if names else None)
    copies = {
        split: len(part["file"]) - len({p.id for p in good if p.split == split}) for split, part in columns.items()
    }
    found = overview.describe(columns)
    notes = dict(source.notes)
    if texts is None:  # a model makes them
        notes |= {"captions_from": {}, "caption_columns": [f"to be made by {recipe.caption.captioner}"]}
        found |= {"captions": None, "examples": [(file, "(to be made)") for file, _ in found["examples"]]}
    elif recipe.caption.captioner == "label":
        notes |= {"captions_from": {}, "caption_columns": ["from the class"]}
    else:
        captions = {
            split: (caption_columns(part, recipe.data, source.name, split)[0], None) for split, part in rows.items()
        }
        notes["caption_columns"] = caption_origins(rows, captions, "captions_from" in notes, recipe.data)
        notes["several_captions"] = 0
        for split, (column, _) in captions.items():
            kept = rows[split].select([photo.row for photo in good if photo.split == split])
            notes["several_captions"] += count_several(kept[column]) if column else 0
    reasons = Counter(row["reason"].split(":")[0] for row in bad_photos(source, photos))
    report = {
        "dataset": source.name,
        "splits": {split: {"images": len(part["file"])} for split, part in columns.items()},
        "quarantined_by_reason": dict(reasons.most_common()),
        "duplicates": copies,
        "understood": found,
        "caption_prefix": recipe.data.caption_prefix,
    }
    print(overview.table(report | notes))


def bad_photos(source: "Source", photos: list[Photo]) -> list[dict[str, Any]]:
    """File, split and reason of each image that cannot be used."""
    bad = [{"file": photo.file, "split": photo.split, "reason": photo.reason} for photo in photos if photo.reason]
    return source.quarantine + bad


def require_own(folder: Path, dataset: Path) -> None:
    """Raise `UserError` unless `folder` is new, empty or made by this script, and apart from the data set's folder."""
    if dataset.is_dir() and folder.resolve().is_relative_to(dataset.resolve()):
        raise UserError(
            f"--output_dir {folder} lies in the data set {dataset}, whose images would mix with it; give another"
        )
    if not folder.is_dir() or (folder / WORK).is_dir():
        return
    # Another process of this run may have opened its lock there already.
    if any(not re.fullmatch(r"\.lock(-[0-9]+)?", path.name) for path in folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds something else; give a new folder, or an empty one")


def model_name(config: CaptionConfig) -> "ModelName":
    """The captioner and its exact revision."""
    from t2i.captions.captioners import ModelName, resolve

    return ModelName(config.captioner, "", "") if config.captioner in ("label", "existing") else resolve(config)


def columns_of(recipe: Recipe) -> list[Any]:
    """The settings that say which column is what."""
    data = recipe.data
    prefix = [data.caption_prefix] if data.caption_prefix else []
    return [data.image_column, data.caption_column, data.caption_template, data.label_names, *prefix]


def captions_hash(folder: Path) -> str:
    file = folder / "captions.jsonl"
    return sha256_file(file)[:16] if file.is_file() else ""


def open_rows(source: "Source", recipe: Recipe, folder: Path, accelerator: Any) -> dict[str, "datasets.Dataset"]:
    """The candidates by split, images not decoded."""
    with accelerator.local_main_process_first():  # the others find its copy of Parquet files
        return candidates(source, recipe, folder / WORK / "source")


def candidates(source: "Source", recipe: Recipe, scratch: Path) -> dict[str, "datasets.Dataset"]:
    """The candidates by split, train first; what must be written for that goes to `scratch`."""
    from t2i.data.records import check_image_column

    rows = source.open(scratch)
    order = [split for split in ("train", "validation", "test") if split in rows]
    return {split: check_image_column(rows[split], recipe.data, source.name, split) for split in order}


def look(source: "Source", rows: dict[str, Any], recipe: Recipe, folder: Path, accelerator: Any) -> list[Photo]:
    """Every image, decoded once by the first process: its hash, colors, or why it cannot be used. Kept in `WORK`."""
    from t2i.data.images import HEIF_FIX
    from t2i.data.prepared import check_bad_share

    seen = [source.identity, recipe.data.image_column, *([] if HEIF_FIX else ["heif"])]
    kept = folder / WORK / f"photos-{hash_json(seen)}.jsonl"
    if accelerator.is_main_process and not kept.is_file():
        write_text(kept, "".join(json.dumps(asdict(photo)) + "\n" for photo in _look(source, rows, recipe)))
    accelerator.wait_for_everyone()
    photos = [Photo(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()]
    if accelerator.is_main_process:
        bad = bad_photos(source, photos)
        say_understood(source, rows, photos, recipe)
        listing = folder / "quarantine.jsonl"
        write_text(listing, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
        check_bad_share(source.name, bad, len(photos) + len(source.quarantine), recipe.data.max_bad_share, listing)
        if bad:
            print(f"{len(bad):,} of {len(photos):,} images cannot be used; {listing} lists them with the reason")
    return photos


def _look(source: "Source", rows: dict[str, Any], recipe: Recipe) -> Iterator[Photo]:
    from tqdm import tqdm

    from t2i.captions.auditing import dominant_colors
    from t2i.data.images import BadImage, decode_image, fit, image_bytes, image_digest
    from t2i.data.records import shown_file
    from t2i.data.workers import WORKERS, in_order

    def look_at(cell: Any) -> tuple[str, str | None, dict[str, float], str | None]:
        name, digest = cell and cell["path"], image_digest(cell, source.roots).hex()[:32]
        try:
            pixels = fit(decode_image(image_bytes(cell, source.roots), draft_side=LOOK_SIDE), LOOK_SIDE)
        except BadImage as error:
            return digest, error.reason, {}, name
        return digest, None, dominant_colors(pixels), name

    count = sum(map(len, rows.values()))
    with ThreadPoolExecutor(WORKERS) as pool, tqdm(total=count, desc="images", unit="image", mininterval=0.5) as bar:
        for split, part in rows.items():
            cells = (row[recipe.data.image_column] for row in part.select_columns([recipe.data.image_column]))
            for index, (digest, reason, colors, name) in enumerate(in_order(pool, look_at, cells)):
                yield Photo(split, index, shown_file(name, split, index), digest, reason, colors)
                bar.update()


def work_list(
    photos: list[Photo], rows: dict[str, Any], recipe: Recipe, name: "ModelName", folder: Path, accelerator: Any
) -> tuple[dict[Key, tuple[Photo, str]], list[Key | None]]:
    """Captions to make, `{key: (one photo of it, its text where no model is asked)}`, and each photo's key (None: unusable).

    Copies of an image share a caption, unless each brings a text of its own.
    """
    from t2i.captions import ledger

    texts = source_texts(rows, recipe)
    done = ledger.read(folder / "captions.jsonl")
    by_hand = {key.image: key for key, row in done.items() if key.model == name.model and is_edited(row)}
    todo: dict[Key, tuple[Photo, str]] = {}
    wanted: list[Key | None] = []
    outdated = 0  # captions that were edited, and whose label or text has changed since
    for photo in photos:
        if photo.reason:
            wanted.append(None)
            continue
        if texts is None:
            text, key = "", Key(photo.id, name.model, name.revision, recipe.caption.task, recipe.caption.prompt)
        else:
            text = texts[photo.split][photo.row]
            key = Key(photo.id, name.model, "", "", hash_json(text))
            if key not in done and photo.id in by_hand:
                key, outdated = by_hand[photo.id], outdated + 1
        wanted.append(key)
        if key not in done:
            todo.setdefault(key, (photo, text))
    settings = settings_of(recipe.caption)
    other = sum(done[key].get("settings", settings) != settings for key in {key for key in wanted if key in done})
    if other:
        accelerator.print(
            f"{other:,} captions were made with other settings and are kept; delete their lines in captions.jsonl to have them made "
            "anew"
        )
    if outdated:
        accelerator.print(
            f"{outdated:,} captions that you edited are kept, though their text in the data set is another now; delete their lines "
            "in captions.jsonl to take that"
        )
    made = len({key for key in wanted if key}) - len(todo)
    if made and todo:
        accelerator.print(f"{made:,} captions are there already, {len(todo):,} are to be made")
    return todo, wanted


def is_edited(line: dict[str, Any]) -> bool:
    """Whether a line of captions.jsonl holds another caption than the one that was made."""
    return bool(line.get("made") != hash_json(line["caption"]))


def source_texts(rows: dict[str, Any], recipe: Recipe) -> dict[str, list[str]] | None:
    """The captions that need no model, by split: from labels, or those there; None where a model makes them."""
    from t2i.data.records import CAPTION_FIX, caption_columns, check_label_names, clean, label_caption

    kind, data = recipe.caption.captioner, recipe.data
    if kind not in ("label", "existing"):
        return None
    texts = {}
    for split, part in rows.items():
        if kind == "label":
            labels = labels_of(part, recipe)
            if labels is None and split == "train":
                raise UserError(
                    f"{data.dataset} has no labels; take another --captioner, or sort the images into class folders"
                )
            check_label_names(labels or [], data, str(data.dataset))
            texts[split] = [label_caption(label, data.caption_template) for label in labels or [None] * len(part)]
        else:
            column = caption_columns(part, data, str(data.dataset), split)[0]
            if column is None and split == "train":
                raise UserError(f"{data.dataset} has no captions; {CAPTION_FIX}")
            texts[split] = [clean(text) for text in part[column]] if column else [""] * len(part)
    return texts


def labels_of(part: "datasets.Dataset", recipe: Recipe) -> list[str | None] | None:
    """The names of a split's labels; None where it has no labels."""
    from t2i.data.records import label_column, label_name, plain

    column = label_column(part)
    if column is None:
        return None
    kind = part.features[column]
    return [label_name(plain(kind, value), recipe.data.label_names) for value in part[column]]


def caption(
    todo: dict[Key, tuple[Photo, str]], source: "Source", rows: dict[str, Any], recipe: Recipe, name: "ModelName",
    folder: Path, accelerator: Any,
) -> None:  # fmt: skip
    """Make this process's share of the captions and append them to captions.jsonl, a batch at a time."""
    from t2i.captions import captioners, ledger

    work = list(todo.items())[accelerator.process_index :: accelerator.num_processes]
    if not todo:
        return
    if recipe.caption.captioner in ("label", "existing"):
        made = [ledger_row(key, photo, text, recipe.caption) for key, (photo, text) in work]
        ledger.append(folder / "captions.jsonl", made)
        return
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    with accelerator.local_main_process_first():  # of a download
        captioner = captioners.load(name, recipe.caption, accelerator.device, dtype)
    shares = [(key, photo) for key, (photo, _) in work]
    for batch, texts in caption_batches(shares, captioner, source, rows, recipe, accelerator):
        made = [ledger_row(key, photo, text, recipe.caption) for (key, photo), text in zip(batch, texts, strict=True)]
        ledger.append(folder / "captions.jsonl", made)


def caption_batches(
    work: list[tuple[Key, Photo]],
    captioner: Any,
    source: "Source",
    rows: dict[str, Any],
    recipe: Recipe,
    accelerator: Any,
) -> Iterator[tuple[list[tuple[Key, Photo]], list[str]]]:
    """Batches with their texts, the next ones decoded by a thread meanwhile; halved when memory runs out."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
    from tqdm import tqdm

    from t2i.data.images import decode_image, image_bytes

    def load(batch: list[tuple[Key, Photo]]) -> tuple[list[Any], list["Image.Image"], Any]:
        cells = (rows[photo.split][photo.row][recipe.data.image_column] for _, photo in batch)
        images = [decode_image(image_bytes(cell, source.roots), draft_side=DECODE_SIDE) for cell in cells]
        return batch, images, captioner.prepare(images)

    size, position = recipe.caption.caption_batch_size, 0
    share = f" (process 1 of {accelerator.num_processes})" if accelerator.num_processes > 1 else ""
    bar = tqdm(total=len(work), desc=f"captions{share}", unit="image", disable=not accelerator.is_main_process)
    with ThreadPoolExecutor(1) as pool, bar:
        ready: deque[Future[Any]] = deque()
        while ready or position < len(work):
            while len(ready) < AHEAD and position < len(work):
                ready.append(pool.submit(load, work[position : position + size]))
                position += size
            batch, images, inputs = ready.popleft().result()
            if len(batch) <= size:
                try:
                    texts = captioner.read(captioner.generate(inputs), images)
                except (RuntimeError, MemoryError) as error:
                    if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                        raise
                    if len(batch) == 1:
                        raise UserError(
                            "memory runs out for a single image; take a smaller model, fewer --num_beams or --max_new_tokens"
                        ) from None
                    size = max(1, len(batch) // 2)
                    clear_device_cache(garbage_collection=True)
                    tqdm.write(f"out of memory: going on with {size} images at once")
                else:
                    yield batch, texts
                    bar.update(len(batch))
                    continue
            parts = [batch[start : start + size] for start in range(0, len(batch), size)]
            ready.extendleft(reversed([pool.submit(load, part) for part in parts]))


def settings_of(config: CaptionConfig) -> str:
    """What shapes a model's captions beside what they belong to."""
    openings = "stripped" if config.strip_boilerplate else "kept"
    chosen = "".join(f", {key} {value:g}" for key in LATER if (value := getattr(config, key)) is not None)
    return f"{config.num_beams} beams, at most {config.max_new_tokens} tokens, openings {openings}{chosen}"


def ledger_row(key: Key, photo: Photo, text: str, config: CaptionConfig) -> dict[str, Any]:
    """A line of captions.jsonl; `made` tells a caption that was edited later, `raw` is what was stripped or cleaned."""
    from t2i.captions.auditing import clean_caption, strip_boilerplate

    caption = clean_caption(text)
    if config.strip_boilerplate and config.captioner not in ("label", "existing"):
        caption = strip_boilerplate(caption)[0]
    row = {**key._asdict(), "file": photo.file, "caption": caption, "made": hash_json(caption)}
    if config.captioner not in ("label", "existing"):
        row["settings"] = settings_of(config)
    return row | ({"raw": text} if text != caption else {})


def write_dataset(
    photos: list[Photo], wanted: list[Key | None], source: "Source", rows: dict[str, Any], recipe: Recipe,
    name: "ModelName", run: RunFolder, folder: Path,
) -> None:  # fmt: skip
    """The dataset folder's Parquet, audit and card, from the captions as they stand in captions.jsonl."""
    from t2i.captions import auditing, ledger
    from t2i.data.dataset_folder import save_dataset_folder
    from t2i.data.records import prefixed
    from t2i.hub.dataset_card import merge_cards
    from t2i.redaction import public_yaml

    lines = ledger.read(folder / "captions.jsonl")
    kept = [(photo, lines[key]) for photo, key in zip(photos, wanted, strict=True) if key]
    labels = {split: labels_of(part, recipe) for split, part in rows.items()}
    known = [names[photo.row] if (names := labels[photo.split]) else None for photo, _ in kept]
    prefix = recipe.data.caption_prefix  # captions.jsonl keeps captions as they were made or edited
    texts = [prefixed(auditing.clean_caption(line["caption"]), prefix) for _, line in kept]
    audit = auditing.audit(
        texts,
        [photo.id for photo, _ in kept],
        files=[photo.file for photo, _ in kept],
        labels=known if any(labels.values()) else None,
        colors=[photo.colors for photo, _ in kept],
        raw=[line.get("raw") for _, line in kept],
        tokenizer=load_tokenizer(recipe.caption.audit_tokenizer),
        of_labels=recipe.caption.captioner == "label",
    )
    write_json(folder / "audit.json", audit)
    part = folder / WORK / "dataset"
    shutil.rmtree(part, ignore_errors=True)
    features = features_of(rows, any(labels.values()), recipe)
    by_split: dict[str, list[tuple[Photo, str, str | None]]] = {split: [] for split in rows}
    for (photo, _), text, label in zip(kept, texts, known, strict=True):
        by_split[photo.split].append((photo, text, label))
    splits = {
        split: dataset_rows(found, rows[split], source, features, recipe) for split, found in by_split.items() if found
    }
    edited = sum(map(is_edited, (line for _, line in kept)))
    card = make_card(
        [photo for photo, _ in kept],
        texts,
        [line for _, line in kept],
        edited,
        audit,
        recipe,
        name,
        source,
        rows,
        folder,
    )
    counts = save_dataset_folder(part, splits, features, card)
    readme = folder / "README.md"
    text = (part / "README.md").read_text(encoding="utf-8")
    renewed = {"size_categories", *(["license"] if recipe.caption.license != "unknown" else [])}
    text = merge_cards(text, readme.read_text(encoding="utf-8") if readme.is_file() else None, renewed)
    shutil.rmtree(folder / "data", ignore_errors=True)
    os.replace(part / "data", folder / "data")
    write_text(readme, text)
    shutil.rmtree(folder / WORK / "source", ignore_errors=True)
    write_text(folder / "config.yaml", public_yaml(to_dict(recipe)))
    run.finish(images=sum(counts.values()), splits=counts)
    print(f"{sum(counts.values()):,} captioned images in {folder}: {counts}")


def make_card(
    photos: list[Photo], texts: list[str], lines: list[dict[str, Any]], edited: int, audit: dict[str, Any], recipe: Recipe,
    name: "ModelName",
    source: "Source", rows: dict[str, Any], folder: Path,
) -> str:  # fmt: skip
    """The card's text; its picture grid goes to images/grid.png."""
    from t2i.config import dataset_name
    from t2i.data.images import decode_image, fit, image_bytes
    from t2i.hub import dataset_card, model_card

    config, data = recipe.caption, recipe.data
    shown = range(0, len(photos), max(1, len(photos) // GRID))[:GRID]  # from all over the data set
    cells = (rows[photos[i].split][photos[i].row][data.image_column] for i in shown)
    pixels = [fit(decode_image(image_bytes(cell, source.roots), draft_side=GRID_SIDE), GRID_SIDE) for cell in cells]
    (folder / "images").mkdir(exist_ok=True)
    dataset_card.caption_grid(pixels, [texts[i] for i in shown], side=GRID_SIDE).save(folder / "images" / "grid.png")
    making: dict[str, Any] = {
        "Captioner": config.captioner,
        "Captions": f"{len(texts):,}",
        "Edited by hand": f"{edited:,}",
    }
    if config.captioner == "label":
        making |= {"Template": data.caption_template}
    elif config.captioner != "existing":
        kinds = Counter(line.get("settings") for line in lines)
        making |= {"Model": name.model, "Revision": name.revision, "Task": config.task, "Prompt": config.prompt or "none",
                   "Settings": "; ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())}  # fmt: skip
    if data.caption_prefix:
        making |= {"Prefix of each caption": data.caption_prefix}
    hub_id = model_card.hub_id(data.dataset)
    quarantine = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    return dataset_card.render_dataset_card(
        name=str(config.hub_dataset_id or folder.resolve().name).split("/")[-1],
        source=hub_id or dataset_name(data),
        splits=dict(Counter(photo.split for photo in photos)),
        making=making,
        audit=audit,
        quarantine=quarantine,
        provenance={"Images": source.identity, "Captions": captions_hash(folder),
                    "Data set revision": source.notes.get("revision") or "none",
                    "Code revision": code_revision()},
        grid="images/grid.png",
        repo_id=config.hub_dataset_id,
        license=config.license,
        source_datasets=[f"extended|{hub_id}"] if hub_id else ["original"],
    )  # fmt: skip


def load_tokenizer(source: str) -> Any:
    """The CLIP tokenizer that counts tokens; None, with a word on it, where it cannot be had."""
    from transformers import CLIPTokenizer

    from t2i.hub import upload
    from t2i.models import load_part

    with suppress(UserError):  # a copy in the Hub's cache serves, and needs no network
        return load_part(CLIPTokenizer, source, "tokenizer", local_files_only=True)
    try:
        with upload.limited(upload.CHECK_S):  # one figure of the audit is not worth minutes of trying again
            return load_part(CLIPTokenizer, source, "tokenizer")
    except UserError as error:
        print(f"caption lengths are not measured: {error}; or name a folder with a tokenizer in --audit_tokenizer")
        return None


def features_of(rows: dict[str, "datasets.Dataset"], labelled: bool, recipe: Recipe) -> "datasets.Features":
    """The columns of the dataset folder: image, caption, label, and the source's other plain columns.

    A column that is of another type in another split becomes text.
    """
    import datasets

    from t2i.data.records import is_plain, label_column

    text, first = datasets.Value("string"), rows["train"]
    taken = {recipe.data.image_column, "image", "caption", "text", "label", "labels", recipe.data.caption_column}
    taken.add(label_column(first))
    others = {}
    for key, kind in first.features.items():
        if key in taken or not is_plain(kind):
            continue
        alike = all(part.features.get(key, kind) == kind for part in rows.values())
        others[key] = kind if alike and not isinstance(kind, datasets.ClassLabel) and kind.dtype != "null" else text
    own = {"image": datasets.Image(), "caption": text, **({"label": text} if labelled else {})}
    return datasets.Features({**own, **others})


def dataset_rows(
    found: list[tuple[Photo, str, str | None]], part: "datasets.Dataset", source: "Source", features: "datasets.Features",
    recipe: Recipe,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A split's rows as the dataset folder has them; images byte for byte as they came."""
    from t2i.data.images import image_bytes
    from t2i.data.records import plain

    for photo, caption, label in found:
        row = part[photo.row]
        image = {"bytes": image_bytes(row[recipe.data.image_column], source.roots), "path": Path(photo.file).name}
        out: dict[str, Any] = {"image": image, "caption": caption, "label": label}
        for key in features:
            if key not in out:
                value = plain(part.features[key], row[key]) if key in row else None
                out[key] = str(value) if value is not None and features[key].dtype == "string" else value
        yield {key: value for key, value in out.items() if key in features}


def push(folder: Path, config: CaptionConfig) -> None:
    """Upload Parquet, card and pictures; what people wrote into the card, here or on the Hub, stays."""
    from t2i.hub import upload
    from t2i.hub.dataset_card import merge_cards

    card, pushed = folder / "README.md", folder / WORK / "pushed.md"
    ours = card.read_text(encoding="utf-8")
    last = pushed.read_text(encoding="utf-8") if pushed.is_file() else None
    merged = ours

    def merge(theirs: str | None) -> str:
        nonlocal merged  # where the Hub's is unchanged since the last push, ours has all of it
        merged = ours if theirs in (None, last) else merge_cards(ours, theirs)
        return merged

    done = upload.push_folder(
        folder, str(config.hub_dataset_id), "dataset", files=["README.md", "data/*.parquet", "images/grid.png"],
        message="Captioned images", private=config.hub_private_repo, deadline=config.hub_deadline, merge_card=merge,
        target=upload.Target(config.hub_revision, config.create_pr),
    )  # fmt: skip
    if merged != ours and (last is None or merge_cards(ours, last) != ours):  # edited here as well as there
        write_text(folder / "README.local.md", ours)
        print(
            f"README.md was edited on the Hub and here: the Hub's text is kept, yours is in {folder / 'README.local.md'}"
        )
    write_text(card, merged)
    write_text(pushed, merged)
    print(f"{done.url} {'is up to date' if not done.changed else 'has it now'} (commit {done.commit[:7]})")


if __name__ == "__main__":
    run_main(main)
