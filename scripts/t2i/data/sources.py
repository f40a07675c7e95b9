"""Where captioned images come from: folders, Parquet, the Hub; candidates by split, not yet decoded.

`find_source` accepts by one option (`SourceConfig.dataset`):

| input | captions |
|---|---|
| Hub id, folder with Parquet shards (`save_dataset_folder`) | column `caption`, else `text`, else from the label |
| folder of `Dataset.save_to_disk`, of webdataset's .tar shards | the same |
| `[train/]<class>/x.jpg` | from the class name, by `caption_template` |
| images with `metadata.jsonl`, `.csv` or `.parquet` (`file_name`, …) | column `caption`, else `text`, else from `label` |
| images with `x.txt`, `x.caption` or `x.jpg.txt` beside `x.jpg` | that file; an image without one keeps its class name |

Where captions exist at all, an empty one stays empty: such an image is kept, and trained as unconditional.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE

from t2i.config import SourceConfig, check_dataset
from t2i.data.caption_files import METADATA, SIDECARS, metadata_rows, read_sidecar, refuse_pointer
from t2i.data.folders import (
    NOT_IMAGE_NAMES,
    RAW,
    READABLE,
    SPLIT_NAMES,
    TABLES,
    TEXTS,
    LeftOut,
    leave_out,
    list_files,
    pick_images,
    plain_name,
    split_depth,
    split_look_alikes,
    split_name,
    without_suffix,
)
from t2i.data.images import BadImage, read_image_file
from t2i.errors import UserError
from t2i.files import hash_json, sha256_file
from t2i.machine import usable_cores

WORKERS = min(8, usable_cores())  # Pillow and hashlib release the GIL, so threads serve
NOT_CLASS_NAMES = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "data"}
SPLIT_COLUMNS = {"split", "set", "subset"}
OTHER_SPLITS = "splits that are not read"
ARCHIVES = {".zip", ".7z", ".rar", ".tgz", ".gz", ".bz2", ".xz", ".zst"}
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?(\.\w+)")
CAPTION_FIX = (
    "add a caption column, a metadata.jsonl, .txt files beside the images, or one folder a class; --caption_column "
    "names another column"
)


_AS_METADATA = (
    "save it as metadata.csv with the columns file_name and caption, or as metadata.jsonl with one such object per line"
)


@dataclass
class Source:
    name: str
    identity: str  # hash of the content: another one, another cache
    open: Callable[[Path], dict[str, datasets.Dataset]]  # scratch folder -> candidates by split, images not decoded
    roots: tuple[Path, ...]  # images given by path must lie below one of these; relative ones start at the first
    disk_bytes: int = 0  # what `open` writes to its scratch folder
    quarantine: list[dict[str, str]] = field(default_factory=list)  # found while listing
    notes: dict[str, Any] = field(default_factory=dict)  # for the report


def find_source(cfg: SourceConfig) -> Source:
    name, folder = str(cfg.dataset), check_dataset(cfg.dataset)
    return _local_source(name, folder, cfg) if folder else _hub_source(name, cfg)


def _local_source(name: str, folder: Path, cfg: SourceConfig) -> Source:
    files, left_out = list_files(folder)
    saved = "dataset_dict.json" in files or {"state.json", "dataset_info.json"} <= set(files)
    if saved and any(file.endswith(".arrow") for file in files):
        return _disk_source(name, folder, files, left_out)
    parquet = [
        file for file in files
        if file.lower().endswith(".parquet") and PurePosixPath(file).name.lower() not in METADATA
    ]  # fmt: skip
    shards = [file for file in parquet if _holds_images(folder / file, cfg)]
    passed: LeftOut = {}
    images = [] if shards else pick_images(folder, files, passed)
    if shards or (parquet and not images):
        return _shard_source(name, folder, files, shards or parquet, cfg, "Parquet", left_out)
    endings = Counter(PurePosixPath(file).suffix.lower() for file in files)
    if not images and endings[".tar"]:
        tars = [file for file in files if file.lower().endswith(".tar")]
        return _shard_source(name, folder, files, tars, cfg, "webdataset", left_out)
    if not images and (archives := sorted(ARCHIVES & endings.keys())):
        raise UserError(
            f"{name} holds archives ({', '.join(archives)}) and no images; unpack them, and give that folder"
        )
    for file in parquet:
        leave_out(left_out, "Parquet files without an image column", file)
    return _folder_source(name, folder, files, images, cfg, left_out | passed)


# Data sets that `datasets` reads


def _hub_source(name: str, cfg: SourceConfig) -> Source:
    left_out: LeftOut = {}
    try:
        loaded = datasets.load_dataset(name, *_config_name(cfg), revision=cfg.dataset_revision)
    except Exception as error:  # network, spelling, access, format: datasets raises a dozen types
        raise _load_error(
            f"--dataset {name!r}: there is no such folder here, and the Hub data set could not be loaded",
            error,
            "check the spelling and the network, or give the path of a folder",
        ) from error
    read = _commit(loaded)
    if cfg.dataset_revision and read:  # a Hub that is not reached is answered from the cache, by any commit there
        wanted = _cached_commit(name, cfg.dataset_revision)
        if not read.startswith(wanted):
            loaded, read = _load_cached(name, cfg, wanted)
    rows = _name_splits(name, loaded, left_out)
    identity = hash_json(
        [[split, [sha256_file(Path(f["filename"])) for f in rows[split].cache_files]] for split in rows]
    )
    roots = (Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
    notes = {"form": "Hub data set", "left_out": left_out, **({"revision": read} if read else {})}
    return Source(name, identity, lambda scratch: rows, roots, notes=notes)


def _config_name(cfg: SourceConfig) -> list[str]:
    return [cfg.dataset_config_name] if cfg.dataset_config_name else []


def _load_error(what: str, error: Exception, fix: str) -> UserError:
    """The sentence for what `datasets` raised: its own words, and the fix that belongs to them."""
    own = " ".join(str(error).split())
    if isinstance(error, datasets.exceptions.DatasetGenerationError) or not own:
        own = _cause(error)
    own = own.split(" Example of usage:")[0][:400].rstrip(".")
    if "onfig name is missing" in own or own.startswith("BuilderConfig"):
        fix = "choose a configuration by --dataset_config_name"
    elif "evision" in own and "exist" in own:
        fix = "give a branch, tag or commit that is there as --dataset_revision"
    elif "gated" in own or "cannot be accessed" in own:
        fix = "check the spelling; if it is private or gated, ask for access and log in by `hf auth login`"
    return UserError(f"{what} ({own}); {fix}")


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _commit(loaded: datasets.DatasetDict) -> str | None:
    """The commit of a loaded Hub data set: `datasets` names the folder of its cache by it."""
    files = [file["filename"] for part in loaded.values() for file in part.cache_files]
    folder = Path(files[0]).parent.name if files else ""
    return folder if re.fullmatch(r"[0-9a-f]{40}", folder) else None


def _cached_commit(name: str, revision: str) -> str:
    """The commit (or its beginning) that `revision` stands for, by the local cache, else by the Hub."""
    if re.fullmatch(r"[0-9a-f]{7,40}", revision):
        return revision
    reference = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / revision
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=10).sha)
    except Exception as error:  # network, access: a dozen types
        raise _not_cached(name, revision) from error


def _not_cached(name: str, revision: str) -> UserError:
    return UserError(
        f"--dataset_revision {revision} of {name} is not in the local cache, and the Hub is not reached; run once with "
        "a network, or give a revision that was read before"
    )


def _load_cached(name: str, cfg: SourceConfig, commit: str) -> tuple[datasets.DatasetDict, str]:
    """What `datasets` keeps of a commit in its cache, and the whole commit."""
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, short = name.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(short)])
    kept = sorted(folder.glob(f"{cfg.dataset_config_name or '*'}/*/{commit}*/dataset_info.json"))
    if len(kept) != 1:
        raise _not_cached(name, str(cfg.dataset_revision))
    config, version, folder_name = kept[0].parts[-4:-1]
    try:
        builder = Cache(repo_id=name, dataset_name=short, config_name=config, version=version, hash=folder_name)
        return builder.as_dataset(), folder_name
    except Exception as error:
        raise _load_error(f"--dataset {name}: commit {commit} in the local cache cannot be read", error,
                          "delete that cache, and run with a network") from error  # fmt: skip


def _holds_images(shard: Path, cfg: SourceConfig) -> bool:
    """Whether a Parquet file has a column that could hold images, or cannot be read."""
    try:
        schema = pq.read_schema(shard)
    except (OSError, pa.ArrowException):
        return True
    named = {cfg.image_column, "image", "file_name"} & set(schema.names)
    kinds = [kind.storage_type if isinstance(kind, pa.ExtensionType) else kind for kind in schema.types]
    return bool(named) or any(
        pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0) for kind in kinds
    )


def _shard_source(
    name: str, folder: Path, files: list[str], shards: list[str], cfg: SourceConfig, form: str, left_out: LeftOut
) -> Source:
    """Parquet or .tar shards, which `datasets` converts, and sorts into splits by the card or by their names."""
    _check_shards(name, folder, shards)
    card = folder / "README.md"
    front = _front_matter(card) if card.is_file() else []  # which shard is which split
    content = [front, [[shard, sha256_file(folder / shard)] for shard in shards]]
    roots, named, pictures = _pictures_beside(folder, shards, cfg)
    for file in pick_images(folder, sorted(set(files) - set(shards) - named), left_out):
        leave_out(left_out, "pictures beside the shards", file)
    for file in files:
        if PurePosixPath(file).name.lower() in METADATA:
            leave_out(left_out, "tables beside the shards", file)
    content += [pictures] if pictures else []
    content += [_config_name(cfg)] if cfg.dataset_config_name else []

    def load(scratch: Path) -> dict[str, datasets.Dataset]:
        # `datasets` reads brackets and :: in a path as patterns, and takes pictures beside the shards for the data
        # set: it is shown links to the shards alone, in a folder whose name is plain
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="t2i-") as plain:
            for file in [*shards, *(["README.md"] if card.is_file() else [])]:
                link = Path(plain) / "data" / file
                _link((folder / file).resolve(), link.with_suffix(link.suffix.lower()))
            try:
                os.symlink(scratch.resolve(), Path(plain) / "cache", target_is_directory=True)
            except OSError:  # Windows without the right to make links
                cache = scratch
            else:
                cache = Path(plain) / "cache"
            try:
                loaded = datasets.load_dataset(str(Path(plain) / "data"), *_config_name(cfg), cache_dir=str(cache))
            except Exception as error:
                raise _load_error(
                    f"--dataset {name}: its {form} files cannot be read", error, "fix or rewrite them"
                ) from error
        rows = _name_splits(name, loaded, left_out)
        if form == "Parquet":
            unread = sum(pq.read_metadata(folder / shard).num_rows for shard in shards) - sum(map(len, loaded.values()))
            if unread > 0:  # beside files named train and test, `datasets` reads no others
                leave_out(left_out, OTHER_SPLITS, f"{unread:,} rows in files that no split names")
        return {split: _name_columns(part, cfg, form) for split, part in rows.items()}

    size = sum((folder / shard).stat().st_size for shard in shards)
    notes = {"form": f"{form}, {len(shards)} {'file' if len(shards) == 1 else 'files'}", "left_out": left_out}
    return Source(name, hash_json(content), load, roots, disk_bytes=2 * size, notes=notes)


def _front_matter(card: Path) -> list[str]:
    """What stands between the lines `---` of a data set's card."""
    try:
        return card.read_text(encoding="utf-8").split("---")[1:2]
    except UnicodeDecodeError:
        raise UserError(f"{card} is not UTF-8, and says which file is which split; save it as UTF-8") from None


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(file, link)
    except OSError:  # Windows without the right to make links
        shutil.copyfile(file, link)


def _check_shards(name: str, folder: Path, shards: list[str]) -> None:
    """Raise `UserError` for shards that are Git LFS pointers, and where some of a numbered set are missing."""
    numbered: dict[tuple[str, int, str], set[int]] = {}
    for shard in shards:
        refuse_pointer(folder / shard)
        if found := _NUMBERED.fullmatch(shard):  # train-00000-of-00005.parquet
            before, number, count, ending = found.groups()
            numbered.setdefault((before, int(count), ending), set()).add(int(number))
    for (before, count, ending), there in numbered.items():
        missing = [f"{before}-{number:05d}-of-{count:05d}{ending}" for number in range(count) if number not in there]
        if missing:
            raise UserError(
                f"{name} lacks {len(missing):,} of {count:,} files: {', '.join(missing[:3])}"
                f"{', …' if len(missing) > 3 else ''}; download them, or rename those here to use them alone"
            )


def _pictures_beside(
    folder: Path, shards: list[str], cfg: SourceConfig
) -> tuple[tuple[Path, ...], set[str], list[str]]:
    """Roots, paths from `folder` and hashes of the pictures that Parquet files name by path, in a column of text."""
    paths: list[str] = []
    for shard in shards if all(shard.lower().endswith(".parquet") for shard in shards) else ():
        try:
            schema = pq.read_schema(folder / shard)
            column = cfg.image_column if cfg.image_column in schema.names else "file_name"
            if column in schema.names and _is_text(schema.field(column).type):
                found = pq.read_table(folder / shard, columns=[column]).column(column).to_pylist()
                paths += [path for path in found if path]
        except (OSError, pa.ArrowException):
            return (folder,), set(), []  # said when it is loaded
    roots: tuple[Path, ...] = (folder,)
    homes = {(folder / shard).parent for shard in shards}
    if paths and len(homes) == 1 and not (folder / paths[0]).is_file():
        roots = (homes.pop(), folder)  # paths start at the Parquet file, or at the folder
    with ThreadPoolExecutor(WORKERS) as pool:
        cells = ({"bytes": None, "path": path} for path in paths)
        named = {os.path.relpath(roots[0] / path, folder).replace(os.sep, "/") for path in paths}
        return roots, named, [digest.hex() for digest in in_order(pool, lambda cell: image_digest(cell, roots), cells)]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _name_columns(rows: datasets.Dataset, cfg: SourceConfig, form: str) -> datasets.Dataset:
    """Columns of other forms by our names: `file_name` of a Parquet file, and webdataset's endings."""
    names = {} if cfg.image_column in rows.column_names else {"file_name": cfg.image_column}
    if form == "webdataset":
        images = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        names = dict.fromkeys(images[:1], cfg.image_column) | {"txt": "caption", "cls": "label"}
    for old, new in names.items():
        if old in rows.column_names and new not in rows.column_names:
            rows = rows.rename_column(old, new)
    return rows


def _disk_source(name: str, folder: Path, files: list[str], left_out: LeftOut) -> Source:
    """A folder of `Dataset.save_to_disk`."""
    kept = [file for file in files if PurePosixPath(file).suffix in (".arrow", ".json")]
    _check_shards(name, folder, kept)
    identity = hash_json([[file, sha256_file(folder / file)] for file in kept])

    def load(scratch: Path) -> dict[str, datasets.Dataset]:
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:
            fix = "save it anew by Dataset.save_to_disk"
            raise _load_error(f"--dataset {name}: its Arrow files cannot be read", error, fix) from error
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict({"train": loaded})
        return _name_splits(name, loaded, left_out)

    notes = {"form": "folder of Dataset.save_to_disk", "left_out": left_out}
    return Source(name, identity, load, (folder,), notes=notes)


def _name_splits(name: str, loaded: datasets.DatasetDict, left_out: LeftOut) -> dict[str, datasets.Dataset]:
    rows: dict[str, datasets.Dataset] = {}
    left_out.pop(OTHER_SPLITS, None)  # of an earlier look
    for split, part in loaded.items():
        known = SPLIT_NAMES.get(str(split).lower())
        if known and known not in rows and len(part):
            rows[known] = part
        elif len(part) and len(loaded) > 1:
            leave_out(left_out, OTHER_SPLITS, f"{split}, {len(part):,} rows")
    if "train" not in rows and len(loaded) == 1 and not rows:
        rows["train"] = next(iter(loaded.values()))
    if not len(rows.get("train", ())):
        raise UserError(
            f"{name} has no images to train on (splits: {', '.join(map(str, loaded))}); name one of them train"
        )
    return rows if len(rows) > 1 else _split_by_column(name, rows["train"])


def _split_by_column(name: str, rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """The splits that a column of `rows` names, where there is one."""
    for column in rows.column_names:
        text = isinstance(kind := rows.features[column], datasets.Value) and "string" in kind.dtype
        if text and column.lower() in SPLIT_COLUMNS and _names_splits(name, column, rows.unique(column)):
            found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
            for index, value in enumerate(rows[column]):
                found[_told_split(f"{name}, row {index}", column, value, None, "")].append(index)
            return {split: rows.select(indices) for split, indices in found.items() if indices}
    return {"train": rows}


def _names_splits(name: str, column: str, values: Iterable[Any]) -> bool:
    """Whether a column says which row is in which split: it is called so, and holds several splits' names alone."""
    if column.strip().lower() not in SPLIT_COLUMNS:
        return False
    splits = {split_name(str(value)) for value in values if value}
    if None in splits or len(splits) < 2:
        return False
    if "train" not in splits:
        raise UserError(
            f"{name}: column {column!r} names {' and '.join(sorted(map(str, splits)))} but no train; add it"
        )
    return True


# Folders of images


def _folder_source(
    name: str, folder: Path, files: list[str], images: list[str], cfg: SourceConfig, left_out: LeftOut
) -> Source:
    tops = {file.split("/")[0] for file in files if "/" in file}
    depth = split_depth(files, images)
    if tops and not depth and all(map(split_name, tops)):
        raise UserError(
            f"{name} has the splits {', '.join(sorted(tops))} but no train; name the folder to train on train"
        )
    columns, notes, quarantine = _folder_columns(name, folder, files, images, depth, cfg, left_out)
    if not columns and quarantine:
        shown = ", ".join(f"{row['file']} ({row['reason']})" for row in quarantine[:3])
        raise UserError(f"{name} has no image to train on that can be used: {shown}; fix or replace them")
    if not columns:
        endings = Counter(PurePosixPath(file).suffix.lower() or "no ending" for file in files).most_common(4)
        found = f" (it holds {', '.join(f'{count:,} of {ending}' for ending, count in endings)})" if endings else ""
        skipped = [first for entry in left_out.values() for first in entry["first"]][:3]
        found += f"; left out: {', '.join(skipped)}" if skipped else ""
        raise UserError(
            f"{name} holds no images to train on{found}; give a folder with photos, Parquet shards, or a Hub id"
        )
    rows = {split: _folder_rows(part) for split, part in columns.items()}
    digest = hashlib.sha256()
    with ThreadPoolExecutor(WORKERS) as pool:
        for split, part in rows.items():
            contents = in_order(pool, lambda image: image_digest(image, (folder,)), (row["image"] for row in part))
            for row, content in zip(part, contents, strict=True):
                digest.update(json.dumps([split, row], default=str, sort_keys=True).encode())
                digest.update(content)
    identity = hash_json([digest.hexdigest(), quarantine])
    return Source(name, identity, lambda scratch: rows, (folder,), quarantine=quarantine, notes=notes)


def _folder_columns(
    name: str, folder: Path, files: list[str], images: list[str], depth: int, cfg: SourceConfig, left_out: LeftOut
) -> tuple[dict[str, dict[str, list[Any]]], dict[str, Any], list[dict[str, str]]]:
    """Columns by split (image; where known caption, label, the metadata's), notes, and what cannot be listed."""
    columns: dict[str, dict[str, list[Any]]] = {}
    quarantine: list[dict[str, str]] = []
    origins: Counter[str] = Counter()

    def split_of(file: str) -> str | None:
        return split_name(file.split("/")[depth - 1]) if depth else "train"

    metadata = [file for file in files if PurePosixPath(file).name.lower() in METADATA]
    described = tuple(str(PurePosixPath(file).parent) for file in metadata)
    if len(set(described)) < len(described):
        raise UserError(f"{name} has two of {', '.join(METADATA)} in one folder; keep one of them")
    listed, outside = set(), 0
    exact, there = set(files), {plain_name(file): file for file in files}
    by_text: list[tuple[str, int, Any]] = []  # rows of metadata that have a `text`: read where they have no caption
    near_files: _NearFiles | None = None  # made once a file is missing
    tables = {file: metadata_rows(folder / file, cfg.caption_column) for file in metadata}
    rows = [row for found in tables.values() for _, row in found]
    keys = dict.fromkeys(key for row in rows for key in row)
    split_column = next((key for key in keys if _names_splits(name, key, (row.get(key) for row in rows))), None)
    for file, found in tables.items():
        for line, row in found:
            where = f"{folder / file}, line {line}"
            target = _inside(str(PurePosixPath(file).parent), row.pop("file_name", None), where, row)
            target = target if target in exact else there.get(plain_name(target), target)
            listed.add(target)
            if target not in exact:
                near_files = near_files or _NearFiles(images)
                if near := near_files.find(target):
                    reason = f"missing file: did you mean {near}?"
                    quarantine.append({"file": target, "split": split_of(target) or "none", "reason": reason})
                    continue
            split = split_of(target)
            if split_column:
                split = _told_split(where, split_column, row.get(split_column), split, target)
            if split is None:
                outside += 1
                leave_out(left_out, "outside the splits", target)
            else:
                origins[f"from {PurePosixPath(file).name}"] += 1
                if cfg.caption_column is None and isinstance(row.get("text"), (str, list)):
                    by_text.append((split, len(columns.get(split, {"image": ()})["image"]), row["text"]))
                _add_row(columns, split, {**row, "image": target})

    sidecars, hidden = _sidecars(files)
    for file in hidden:
        leave_out(left_out, "caption files beside another that is read", file)
    served: dict[str, list[str]] = {}  # images by the caption file that is read for them
    own = [file for file in images if not _is_below(file, described)]
    labels = {_class_of(file, depth) for file in own}
    use_labels = not (len(labels) == 1 and str(next(iter(labels))).lower() in NOT_CLASS_NAMES)
    used: set[str] = set()
    joined = 0
    by_class: list[tuple[str, int, str | None]] = []  # rows that have a class and no caption file
    for file in own:
        split = split_of(file)
        if not _is_utf8(file):  # neither Arrow nor JSON can hold such a name
            shown = file.encode("utf-8", "backslashreplace").decode()
            quarantine.append(
                {"file": shown, "split": split or "none", "reason": "unreadable: the file's name is not UTF-8"}
            )
        elif PurePosixPath(file).suffix.lower() in RAW:  # some hold a thumbnail that Pillow would take for the photo
            quarantine.append({"file": file, "split": split or "none", "reason": "format not allowed: camera raw"})
        elif split is None:
            outside += 1
            leave_out(left_out, "outside the splits", file)
        else:
            known: dict[str, Any] = {"image": file}
            if beside := _sidecars_of(file, sidecars):
                known["caption"] = read_sidecar(folder / beside[0])
                origins[f"from {PurePosixPath(beside[0]).suffix.lower()} files"] += 1
                joined += "\n" in known["caption"].strip()
                used.update(beside)
                served.setdefault(beside[0], []).append(file)
                for other in beside[1:]:
                    leave_out(left_out, "caption files beside another that is read", other)
            if use_labels and (label := _class_of(file, depth)) is not None:
                known["label"] = label
            if not beside:
                by_class.append((split, len(columns.get(split, {"image": ()})["image"]), known.get("label")))
            _add_row(columns, split, known)
    for split, position, text in by_text:
        if "caption" in columns[split] and not clean(columns[split]["caption"][position]):
            columns[split]["caption"][position] = text
    _fill_from_classes(name, columns, by_class, origins, cfg)
    for file in sorted(set(sidecars.values()) - used):
        if PurePosixPath(file).stem.lower() not in NOT_IMAGE_NAMES:
            described_too = _is_below(file, described)
            leave_out(left_out, "text files beside metadata" if described_too else TEXTS, file)
    unlisted = [file for file in images if _is_below(file, described) and file not in listed]
    for file in unlisted:
        leave_out(left_out, "not in the metadata", file)
    forms = [*sorted({PurePosixPath(file).name for file in metadata}), *(["caption files"] if used else [])]
    forms += ["one folder per class"] if not forms and use_labels and labels != {None} else []
    notes = {
        "form": f"folder of images{', ' if forms else ''}{', '.join(forms)}",
        "captions_from": dict(origins),
        "joined_lines": joined,
        "shared_caption_files": [files for files in served.values() if len(files) > 1],
        "files_not_in_metadata": len(unlisted),
        "files_outside_splits": outside,
        "left_out": left_out,
    }
    if "train" not in columns:
        columns.clear()
    _refuse_look_alikes(name, columns.get("train", {"image": []})["image"])
    return columns, notes, quarantine


def _told_split(where: str, column: str, value: Any, split: str | None, target: str) -> str:
    """The split that a metadata row names; refused where it would train on a validation or test folder."""
    told = split_name(str(value or ""))
    if told is None:
        raise UserError(f"{where}: column {column!r} is empty; write train, validation or test")
    if split not in (None, "train", told):
        raise UserError(
            f"{where}: column {column!r} says {told}, but {target} lies in {split}; make them agree, or rename the column"
        )
    return told


def _refuse_look_alikes(name: str, images: list[str]) -> None:
    """Raise `UserError` where folders that are all trained on look like splits: a test set would be among them."""
    alike = split_look_alikes(images)
    if not alike:
        return
    parent = str(PurePosixPath(next(iter(alike))).parent)
    splits = ", ".join(dict.fromkeys(alike.values()))
    if "train" not in alike.values():
        fix = "name the folder to train on train"
    elif all(parent == "." or _is_below(image, (parent,)) for image in images):
        fix = f"rename them {splits}"
    else:
        fix = f"make folders {splits} at the top of the data set, with the others below these"
    train = [folder for folder, split in alike.items() if split == "train"]
    only = f", or give --dataset {Path(name) / train[0]} to use that alone" if len(train) == 1 else ""
    raise UserError(f"{name}: {', '.join(alike)} look like splits; {fix}{only}")


def _sidecars(files: list[str]) -> tuple[dict[str, str], list[str]]:
    """Caption files by the name of what they stand beside, with their ending in lower case: `rose/0.jpg.txt`.

    Then those that another hides, whose ending differs in capitals alone.
    """
    found: dict[str, str] = {}
    hidden: list[str] = []
    for file in files:
        suffix = PurePosixPath(file).suffix
        if suffix.lower() in SIDECARS:
            key = plain_name(without_suffix(file) + suffix.lower())
            if key in found:
                hidden.append(found[key] if suffix.islower() else file)
            if key not in found or suffix.islower():
                found[key] = file
    return found, hidden


def _sidecars_of(file: str, sidecars: dict[str, str]) -> list[str]:
    """The caption files of an image, the one to read first."""
    names = dict.fromkeys((without_suffix(file), file))  # the same where there is no ending
    keys = (plain_name(name) + suffix for name in names for suffix in SIDECARS)
    return [sidecars[key] for key in keys if key in sidecars]


def _fill_from_classes(
    name: str, columns: dict[str, dict[str, list[Any]]], by_class: list[tuple[str, int, str | None]],
    origins: Counter[str], cfg: SourceConfig,
) -> None:  # fmt: skip
    """Where some images have captions of their own, give the others that of their class."""
    keys = (cfg.caption_column, "caption", "text")
    column = {split: next((key for key in keys if key in part), None) for split, part in columns.items()}
    lacking = [(split, row, label_name(label, cfg.label_names)) for split, row, label in by_class if column[split]]
    if any(label for _, _, label in lacking):
        check_label_names((label for _, _, label in lacking), cfg, name)
    for split, row, label in lacking:
        if label:
            columns[split][str(column[split])][row] = label_caption(label, cfg.caption_template)
    for part in columns.values():  # text beside lists of texts becomes a list
        for key in filter(None, keys):
            if any(isinstance(value, list) for value in part.get(key, ())):
                part[key] = [[value] if isinstance(value, str) else value for value in part[key]]
    for _, _, label in by_class:
        origins["from class names" if label else "without any"] += 1


def _inside(base: str, target: Any, where: str, row: dict[str, Any]) -> str:
    """A metadata row's file name as a path in the dataset folder; refused when it leads outside."""
    if not isinstance(target, str) or not target:
        raise UserError(f"{where} has no file_name (it has {', '.join(map(str, row)) or 'nothing'}); add it")
    path = PurePosixPath(target.replace("\\", "/"))
    if "\0" in target or not _is_utf8(target):
        raise UserError(f"{where} has the file_name {target!r}, which no file can have; fix it")
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", target):
        raise UserError(f"{where} names {target!r}, which is outside its folder; name files below it only")
    return str(PurePosixPath(base) / path)


class _NearFiles:
    """Finds the one image that a name in metadata is likely to mean: other capitals, spaces, ending or folder."""

    def __init__(self, images: list[str]):
        self.by_name: list[dict[str, list[str]]] = []
        for image in images:
            for depth, name in enumerate(self.names(image)):
                if depth == len(self.by_name):
                    self.by_name.append({})
                self.by_name[depth].setdefault(name, []).append(image)

    @staticmethod
    def names(path: str) -> list[str]:
        plain_path = re.sub(r"[\s_-]|%20", "", plain_name(path)).lower()
        ends = PurePosixPath(plain_path).suffix in READABLE
        stem = without_suffix(plain_path) if ends else plain_path
        return [plain_path, stem, PurePosixPath(plain_path).name, PurePosixPath(stem).name]

    def find(self, target: str) -> str | None:
        found = (known.get(name) for known, name in zip(self.by_name, self.names(target), strict=False))
        near = next(filter(None, found), [])
        return near[0] if len(near) == 1 else None


def _add_row(columns: dict[str, dict[str, list[Any]]], split: str, row: dict[str, Any]) -> None:
    part = columns.setdefault(split, {"image": []})
    count = len(part["image"])
    for key in [key for key in row if key not in part]:
        part[key] = [None] * count
    for key, values in part.items():
        values.append(row.get(key))


def _is_below(file: str, folders: tuple[str, ...]) -> bool:
    return any(folder == "." or file.startswith(folder + "/") for folder in folders)


def _class_of(file: str, depth: int) -> str | None:
    parents = file.split("/")[depth:-1]
    return parents[-1] if parents else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _folder_rows(columns: dict[str, list[Any]]) -> datasets.Dataset:
    for key, values in columns.items():
        try:
            pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            # 5 and "five" in one column; whole numbers beyond 64 bits; half an emoji
            lists = all(value is None or isinstance(value, list) for value in values)
            columns[key] = [_as_text(value, lists) for value in values]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


def _as_text(value: Any, keep_list: bool) -> Any:
    if keep_list and isinstance(value, list):
        return [_as_text(item, keep_list=False) for item in value]
    return None if value is None else str(value).encode("utf-8", "replace").decode()


# Images and their hashes


def in_order(pool: Executor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`pool.map` that never holds more than a few items, so that memory does not grow with their number."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= 4 * WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def image_bytes(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """The file's bytes of an undecoded image cell; raises BadImage."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImage("missing image")
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(os.path.abspath(roots[0] / image["path"]))  # folds "..", keeps links: the Hub's cache is made of them
    if not any(path.is_relative_to(os.path.abspath(root)) for root in roots):
        raise BadImage("outside the dataset folder")
    return read_image_file(path)


def image_digest(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """SHA-256 of the image file; of its path where it cannot be read."""
    try:
        return hashlib.sha256(image_bytes(image, roots)).digest()
    except BadImage as error:
        return hashlib.sha256(f"{error.reason} {image and image['path']}".encode()).digest()


def shown_file(path: str | None, split: str, index: int) -> str:
    if not path:
        return f"{split}[{index}]"
    return Path(path).name if os.path.isabs(path) else path


# Captions and labels


def check_image_column(rows: datasets.Dataset, cfg: SourceConfig, name: str, split: str) -> datasets.Dataset:
    _require_column(rows, cfg.image_column, "--image_column", name, split)
    try:
        return rows.cast_column(cfg.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise UserError(
            f"column {cfg.image_column!r} of {name} holds no images ({rows.features[cfg.image_column]}); "
            f"--image_column names another of: {', '.join(rows.column_names)}"
        ) from error


def _require_column(rows: datasets.Dataset, column: str, option: str, name: str, split: str) -> None:
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, 1, 0.4)
        hint = f"; did you mean {option} {near[0]}?" if near else f"; {option} names another"
        raise UserError(f"{name} ({split}) has no column {column!r}; it has {', '.join(rows.column_names)}{hint}")


def label_column(rows: datasets.Dataset) -> str | None:
    """The column of the class: `label`, `labels`, or the first of class labels; None where there is none."""
    named = (column for column in ("label", "labels") if column in rows.column_names)
    classes = (key for key, value in rows.features.items() if isinstance(value, datasets.ClassLabel))
    return next(named, None) or next(classes, None)


def caption_columns(
    rows: datasets.Dataset, cfg: SourceConfig, name: str, split: str, left_out: LeftOut | None = None
) -> tuple[str | None, str | None]:
    """(caption column, label column), each None where there is none. Only the training split must have one of them.

    left_out: what the listing left out, to name the table that may hold the captions.
    Raises `UserError` for captions that are no text, and for labels that are to become captions and have no names.
    """
    columns = rows.column_names
    label = label_column(rows)
    if cfg.caption_column is not None:
        if split == "train":
            _require_column(rows, cfg.caption_column, "--caption_column", name, split)
        caption = cfg.caption_column if cfg.caption_column in columns else None
    else:
        caption = next((column for column in ("caption", "text") if column in columns), None)
    if caption is None and label is None and split == "train":
        passed = {reason: (left_out or {}).get(reason, {"count": 0}) for reason in (TABLES, TEXTS)}
        several = passed[TEXTS]["count"] > 1  # not a table, but notes or labels of each image
        meant = [
            entry["first"][0] for key, entry in passed.items() if entry["count"] and not (key == TEXTS and several)
        ]
        fix = f"if {meant[0]} holds the captions, {_AS_METADATA}" if meant else CAPTION_FIX
        raise UserError(f"{name} has neither captions nor labels (columns: {', '.join(columns)}); {fix}")
    if caption is not None and not _holds_text(rows.features[caption]):
        raise UserError(
            f"{name}: column {caption!r} holds no text ({_kind(rows.features[caption])}), so no captions; write text, or a "
            "list of texts, or name another --caption_column"
        )
    if caption is None and label is not None:
        check_label_names(class_names(rows, label, cfg, name), cfg, name)
    return caption, label


def _holds_text(kind: Any) -> bool:
    """Whether a column is text, a list of texts, a class label, or empty."""
    inner = getattr(kind, "feature", kind)
    return isinstance(kind, datasets.ClassLabel) or (
        isinstance(inner, datasets.Value) and ("string" in inner.dtype or inner.dtype == "null")
    )


def _kind(kind: Any) -> str:
    if isinstance(kind, dict):
        return f"objects with {', '.join(kind)}"
    inner = getattr(kind, "feature", None)
    return f"lists of {_kind(inner)}" if inner is not None else str(getattr(kind, "dtype", kind))


def class_names(rows: datasets.Dataset, label: str, cfg: SourceConfig, name: str) -> list[str]:
    """The distinct classes of a label column, as captions name them. Raises `UserError` for numbers without names."""
    kind = rows.features[label]
    if not isinstance(kind, (datasets.Value, datasets.ClassLabel)):
        raise UserError(f"{name} has no captions, and its {label!r} holds {_kind(kind)}; {CAPTION_FIX}")
    numeric = isinstance(kind, datasets.Value) and kind.dtype not in ("string", "large_string", "null")
    if numeric and not cfg.label_names:
        raise UserError(
            f"{name} has no captions, and its {label!r} is a number without a name; give --label_names, or {CAPTION_FIX}"
        )
    found = (label_name(plain(kind, value), cfg.label_names) for value in rows.unique(label))
    return [text for text in found if text]


def has_numbers(rows: datasets.Dataset, label: str, cfg: SourceConfig) -> bool:
    """Whether a label column has numbers that `label_names` names."""
    values = (plain(rows.features[label], value) for value in rows.unique(label))
    return any(label_name(value, cfg.label_names) != label_name(value, []) for value in values)


def check_label_names(labels: Iterable[str | None], cfg: SourceConfig, name: str) -> None:
    """Raise `UserError` where classes that are to become captions are numbers, which say nothing of an image."""
    known = {label for label in labels if label}
    numbers = sorted((label for label in known if re.fullmatch(r"\s*[-+]?\d+([.,]\d*)?\s*", label)), key=_by_number)
    shown = ", ".join(label.strip() for label in numbers[:3]) + (" …" if len(numbers) > 3 else "")
    if numbers and cfg.label_names:
        fix = (
            "add the others"
            if _by_number(numbers[0]) > 0
            else "numbers start at 1: put the names in place of the numbers"
        )
        raise UserError(
            f"{name}: --label_names has no name for the classes {shown}; its names stand for 1 to {len(cfg.label_names)}; "
            f"{fix}"
        )
    if numbers and len(numbers) == len(known):
        raise UserError(
            f"{name} has no captions, and its classes are numbers ({shown}); give their names by --label_names, or in "
            "place of the numbers"
        )


def _by_number(label: str) -> float:
    return float(label.strip().replace(",", "."))


def is_plain(kind: Any) -> bool:
    return isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and "binary" not in kind.dtype)


def plain(kind: Any, value: Any) -> Any:
    if isinstance(kind, datasets.ClassLabel) and value is not None:
        return kind.int2str(value) if value >= 0 else None  # -1 stands for "no label"
    return value


def clean(value: Any) -> str:
    """One line of text; of a list of captions the first that is not empty."""
    if isinstance(value, (list, tuple)):
        return next((text for text in map(clean, value) if text), "")
    return "" if value is None else " ".join(str(value).split())


def label_name(value: Any, names: list[str]) -> str | None:
    """A label as text; a number from 1 on by its name in `names`, where there are names."""
    if (
        names and isinstance(value, float) and value.is_integer()
    ):  # pandas writes whole numbers so, where some are missing
        value = int(value)
    text = None if value is None or value != value else str(value)  # NaN differs from itself
    if names and text is not None and text.isdecimal() and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    return text


def prefixed(caption: str, prefix: str) -> str:
    """A caption with `--caption_prefix` before it, once: not where it is there already, nor before an empty caption."""
    words = clean(prefix)
    return caption if not words or not caption or caption.startswith(words) else f"{words} {caption}"


def label_caption(label: str | None, template: str) -> str:
    """The caption that a label gets by `template`; empty for no label."""
    words = clean(re.sub(r"[_-]", " ", label)) if label is not None else ""
    return template.replace("{label}", words) if words else ""
