"""Read data sets by the library `datasets`: from the Hub, Parquet or .tar shards, or `Dataset.save_to_disk`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE

from t2i.config import SourceConfig
from t2i.data.caption_files import METADATA
from t2i.data.folders import leave_out, names_splits, pick_images, told_split
from t2i.data.images import image_digest
from t2i.data.records import OTHER_SPLITS, LeftOut, Source
from t2i.data.split_names import SPLIT_COLUMNS, SPLIT_NAMES
from t2i.data.workers import WORKERS, in_order
from t2i.errors import UserError
from t2i.files import hash_json, sha256_file

_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?(\.\w+)")


def hub_source(name: str, cfg: SourceConfig) -> Source:
    left_out: LeftOut = {}
    try:
        loaded = datasets.load_dataset(name, *_config_name(cfg), revision=cfg.dataset_revision)
    except Exception as error:  # For network, spelling, access and format, datasets raises a dozen types.
        raise _load_error(
            f"--dataset {name!r}: there is no such folder here, and the Hub data set could not be loaded",
            error,
            "check the spelling and the network, or give the path of a folder",
        ) from error
    read = _commit(loaded)
    if cfg.dataset_revision and read:  # Without a network, `datasets` silently loads any cached commit.
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
    """Return a `UserError` for an error of `datasets`: its own words, and a fix that suits them."""
    own = " ".join(str(error).split())
    if isinstance(error, datasets.exceptions.DatasetGenerationError) or not own:
        own = _cause(error)
    own = own.split(" Example of usage:")[0][:400].rstrip(".")
    if "onfig name is missing" in own or own.startswith("BuilderConfig"):
        fix = "choose a configuration by --dataset_config_name"
    elif "evision" in own and "exist" in own:
        fix = "give an existing branch, tag or commit as --dataset_revision"
    elif "gated" in own or "cannot be accessed" in own:
        fix = "check the spelling; if the data set is private or gated, ask for access and log in by `hf auth login`"
    return UserError(f"{what} ({own}); {fix}")


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _commit(loaded: datasets.DatasetDict) -> str | None:
    """Return the commit of a loaded Hub data set, which is the name of its folder in the cache of `datasets`."""
    files = [file["filename"] for part in loaded.values() for file in part.cache_files]
    folder = Path(files[0]).parent.name if files else ""
    return folder if re.fullmatch(r"[0-9a-f]{40}", folder) else None


def _cached_commit(name: str, revision: str) -> str:
    """Return the commit (or its beginning) that `revision` names, from the local cache, otherwise from the Hub."""
    if re.fullmatch(r"[0-9a-f]{7,40}", revision):
        return revision
    reference = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / revision
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=10).sha)
    except Exception as error:  # For network and access, the Hub's client raises a dozen types.
        raise _not_cached(name, revision) from error


def _not_cached(name: str, revision: str) -> UserError:
    return UserError(
        f"--dataset_revision {revision} of {name} is not in the local cache, and the Hub cannot be reached; run once with "
        "a network, or give a revision that is in the cache"
    )


def _load_cached(name: str, cfg: SourceConfig, commit: str) -> tuple[datasets.DatasetDict, str]:
    """Return the data set that `datasets` keeps in its cache for a commit, and the full commit hash."""
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


def shard_source(
    name: str, folder: Path, files: list[str], shards: list[str], cfg: SourceConfig, form: str, left_out: LeftOut
) -> Source:
    """Return a source of Parquet or .tar shards. `datasets` converts the shards later.

    `datasets` assigns each shard to a split, by the dataset card or by the shard's name.
    """
    _check_shards(name, shards)
    card = folder / "README.md"
    front = _front_matter(card) if card.is_file() else []  # The front matter may assign shards to splits.
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
        # `datasets` reads brackets and :: in a path as patterns, and takes pictures beside the shards for the data set.
        # It therefore gets a folder with a plain name, which holds only links to the shards.
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
            if unread > 0:  # If there are files named train and test, `datasets` reads no other files.
                leave_out(left_out, OTHER_SPLITS, f"{unread:,} rows in files that no split names")
        return {split: _name_columns(part, cfg, form) for split, part in rows.items()}

    size = sum((folder / shard).stat().st_size for shard in shards)
    notes = {"form": f"{form}, {len(shards)} {'file' if len(shards) == 1 else 'files'}", "left_out": left_out}
    return Source(
        name,
        hash_json(content),
        load,
        roots,
        disk_bytes=2 * size,
        count=partial(_count_rows, folder, shards) if form == "Parquet" else None,
        notes=notes,
    )


def _count_rows(folder: Path, shards: list[str]) -> dict[str, int]:
    """Return the rows by split of Parquet shards, by their footers and names, or {} if a shard has no such footer.

    If some shards are named by a split, others are not counted, as `datasets` does not read them. Without any names, all
    are the train split.
    """
    counts: Counter[str] = Counter()
    try:
        for shard in shards:
            words = re.split(r"[^a-z0-9]+", shard.lower())  # data/train-00000-of-00002.parquet
            split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")
            counts[split] += pq.read_metadata(folder / shard).num_rows
    except (OSError, pa.ArrowException):
        return {}
    unnamed = counts.pop("", 0)
    return dict(counts) or {"train": unnamed}


def _front_matter(card: Path) -> list[str]:
    """Return the front matter of a dataset card: the text between the lines `---`."""
    try:
        return card.read_text(encoding="utf-8").split("---")[1:2]
    except UnicodeDecodeError:
        raise UserError(f"{card}, which assigns files to splits, is not UTF-8; save the file as UTF-8") from None


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(file, link)
    except OSError:  # Windows without the right to make links
        shutil.copyfile(file, link)


def _check_shards(name: str, shards: list[str]) -> None:
    """Raise `UserError` if some of a numbered set of shards are missing."""
    numbered: dict[tuple[str, int, str], set[int]] = {}
    for shard in shards:
        if found := _NUMBERED.fullmatch(shard):  # train-00000-of-00005.parquet
            before, number, count, ending = found.groups()
            numbered.setdefault((before, int(count), ending), set()).add(int(number))
    for (before, count, ending), there in numbered.items():
        missing = [f"{before}-{number:05d}-of-{count:05d}{ending}" for number in range(count) if number not in there]
        if missing:
            raise UserError(
                f"{name} lacks {len(missing):,} of {count:,} files: {', '.join(missing[:3])}"
                f"{', …' if len(missing) > 3 else ''}; download the missing files, or rename the others to use only these"
            )


def _pictures_beside(
    folder: Path, shards: list[str], cfg: SourceConfig
) -> tuple[tuple[Path, ...], set[str], list[str]]:
    """Find the pictures that Parquet files name by path, in a column of text.

    Returns:
        Root folders of the paths, the paths relative to `folder`, and the SHA-256 of each picture file.
    """
    paths: list[str] = []
    for shard in shards if all(shard.lower().endswith(".parquet") for shard in shards) else ():
        try:
            schema = pq.read_schema(folder / shard)
            column = cfg.image_column if cfg.image_column in schema.names else "file_name"
            if column in schema.names and _is_text(schema.field(column).type):
                found = pq.read_table(folder / shard, columns=[column]).column(column).to_pylist()
                paths += [path for path in found if path]
        except (OSError, pa.ArrowException):
            return (folder,), set(), []  # Loading the file will raise the error.
    roots: tuple[Path, ...] = (folder,)
    homes = {(folder / shard).parent for shard in shards}
    if paths and len(homes) == 1 and not (folder / paths[0]).is_file():
        roots = (homes.pop(), folder)  # Paths start at the Parquet file, or at the data set's folder.
    with ThreadPoolExecutor(WORKERS) as pool:
        cells = ({"bytes": None, "path": path} for path in paths)
        named = {os.path.relpath(roots[0] / path, folder).replace(os.sep, "/") for path in paths}
        return roots, named, [digest.hex() for digest in in_order(pool, lambda cell: image_digest(cell, roots), cells)]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _name_columns(rows: datasets.Dataset, cfg: SourceConfig, form: str) -> datasets.Dataset:
    """Rename the columns of other forms: `file_name` of Parquet files, and the extensions that webdataset uses."""
    names = {} if cfg.image_column in rows.column_names else {"file_name": cfg.image_column}
    if form == "webdataset":
        images = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        names = dict.fromkeys(images[:1], cfg.image_column) | {"txt": "caption", "cls": "label"}
    for old, new in names.items():
        if old in rows.column_names and new not in rows.column_names:
            rows = rows.rename_column(old, new)
    return rows


def disk_source(name: str, folder: Path, files: list[str], left_out: LeftOut) -> Source:
    """Return a source for a folder that `Dataset.save_to_disk` wrote."""
    _check_shards(name, files)
    identity = hash_json([[file, sha256_file(folder / file)] for file in files])

    def load(scratch: Path) -> dict[str, datasets.Dataset]:
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:
            fix = "save the data set again by Dataset.save_to_disk"
            raise _load_error(f"--dataset {name}: its Arrow files cannot be read", error, fix) from error
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict({"train": loaded})
        return _name_splits(name, loaded, left_out)

    notes = {"form": "folder of Dataset.save_to_disk", "left_out": left_out}
    return Source(name, identity, load, (folder,), notes=notes)


def _name_splits(name: str, loaded: datasets.DatasetDict, left_out: LeftOut) -> dict[str, datasets.Dataset]:
    rows: dict[str, datasets.Dataset] = {}
    left_out.pop(OTHER_SPLITS, None)  # An earlier call may have counted other splits.
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
            f"{name} has no images to train on (splits: {', '.join(map(str, loaded))}); rename one of the splits to train"
        )
    return rows if len(rows) > 1 else _split_by_column(name, rows["train"])


def _split_by_column(name: str, rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Sort `rows` into the splits that a column names. Without such a column, all rows are the train split."""
    for column in rows.column_names:
        text = isinstance(kind := rows.features[column], datasets.Value) and "string" in kind.dtype
        if text and column.lower() in SPLIT_COLUMNS and names_splits(name, column, rows.unique(column)):
            found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
            for index, value in enumerate(rows[column]):
                found[told_split(f"{name}, row {index}", column, value, None, "")].append(index)
            return {split: rows.select(indices) for split, indices in found.items() if indices}
    return {"train": rows}
