"""What lies in a folder of images: which files are images, and what is left out, with the reason.

Files of cameras, editors, annotators and storage systems are no images: only what has an image's extension, none at
all, or an image's first bytes is tried as one.
"""

import heapq
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from t2i.data.caption_files import METADATA, SIDECARS
from t2i.data.images import HEIF_FIX, starts_like_an_image

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
# Pictures that are not read here: alone they are bad images, beside a readable one its companions.
RAW = {".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"}
UNREADABLE = RAW | {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".psd", ".psb", ".eps", ".tga"}
if not HEIF_FIX:  # pillow-heif is installed
    READABLE |= {".heic", ".heif"}
    UNREADABLE -= READABLE
UNREADABLE |= {".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".dds", ".qoi", ".icns"}
NOT_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".html", ".py", ".lock"}
NOT_IMAGES |= {".caption", ".parquet"}
NOT_IMAGE_NAMES = {"readme", "license", "licence", "copying", "notice", "thumbs.db", "desktop.ini", "sha256sums"}
NOT_IMAGE_NAMES |= {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
UNFINISHED = {".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2"}
FOREIGN_FOLDERS = re.compile(  # of storage systems, unpackers and photo programs: copies, thumbnails, what was deleted
    r"\..*|__macosx.*|@eadir|@tmp|[@#$]recycle(\.bin)?|#snapshot|@recently.*|@transcode|system volume information"
    r"|lost\+found|found\.\d+|.*\.lrdata|.*\.lrcat-data|captureone|ipod photo cache|_?thumb(s|nails?)|__pycache__",
    re.IGNORECASE,
)
SILENT_FOLDERS = {".git", ".cache", ".locks"}  # never images

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # "trainA" and "TestSet" are two words each
_SET_ENDINGS = re.compile(r"(set|data|images?|imgs?|photos?|pics)$")

TABLES = "tables that are not named metadata.csv or metadata.jsonl"
TEXTS = "text files without an image"

LeftOut = dict[str, dict[str, Any]]  # reason -> count, and the first names


def split_name(folder: str) -> str | None:
    """The split that a folder of this name holds, or None."""
    return SPLIT_NAMES.get(folder.strip().lower())


def split_depth(files: Iterable[str], images: Iterable[str]) -> int:
    """How many folders lead to an image's split: 0 without splits, 1 for `train/x.jpg`, 2 for `data/train/x.jpg`."""
    if any(split_name(file.split("/")[0]) == "train" for file in files if "/" in file):
        return 1
    homes = _homes(images)
    for depth in range(1, max(map(len, homes), default=0)):
        if len({home[:depth] for home in homes}) > 1 or any(len(home) < depth for home in homes):
            return 0
        splits = {split_name(home[depth]) for home in homes if len(home) > depth} - {None}
        if "train" in splits and len(splits) > 1:
            return depth + 1
    return 0


def split_look_alikes(images: Iterable[str]) -> dict[str, str]:
    """`{folder: split}` of folders side by side whose names hold words such as train and test, as `train_images` does.

    At least half of the folders there must have such names: among many classes, `steam_train` and `test_tube` are two.
    """
    beside: dict[tuple[str, ...], set[str]] = {}
    for home in _homes(images):
        for depth, name in enumerate(home):
            beside.setdefault(home[:depth], set()).add(name)
    for parent, names in sorted(beside.items()):
        alike = {name: split for name in sorted(names) if (split := _split_in(name))}
        if len(set(alike.values())) > 1 and 2 * len(alike) >= len(names):
            return {"/".join((*parent, name)): split for name, split in alike.items()}
    return {}


def _homes(images: Iterable[str]) -> set[tuple[str, ...]]:
    return {tuple(image.split("/")[:-1]) for image in images}


def _split_in(name: str) -> str | None:
    words = (word.lower() for word in _WORDS.findall(name))
    found = (SPLIT_NAMES.get(word) or SPLIT_NAMES.get(_SET_ENDINGS.sub("", word)) for word in words)
    return next(filter(None, found), None)


def leave_out(left_out: LeftOut, reason: str, name: str) -> None:
    """Count a file or folder that is left out for `reason`."""
    entry = left_out.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += 1
    if len(entry["first"]) < 3:
        entry["first"].append(name.encode("utf-8", "backslashreplace").decode())


def list_files(folder: Path) -> tuple[list[str], LeftOut]:
    """Relative paths (with /) of all files below `folder`, a folder's own before those below it, and what is left out.

    A folder that is reached by several paths is read once: by its path in a split, else its own, else a link's.
    """
    found: list[str] = []
    left_out: LeftOut = {}
    seen: dict[str, str] = {}
    root = os.path.realpath(folder)
    waiting: list[tuple[tuple[Any, ...], tuple[str, ...], bool]] = [((), (), False)]
    while waiting:
        _, parts, linked = heapq.heappop(waiting)
        current, shown = os.path.join(folder, *parts), "/".join(parts)
        real = os.path.realpath(current)
        above = parts and Path(root).is_relative_to(real)
        if real in seen or above:
            leave_out(left_out, "folders read already", f"{shown} → {seen.get(real) or real}")
            continue
        seen[real] = shown
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            leave_out(left_out, f"folders that cannot be read ({error.strerror})", shown or str(folder))
            continue
        for entry in entries:
            inside = (*parts, entry.name)
            path = "/".join(inside)
            if _is_folder(entry):
                if FOREIGN_FOLDERS.fullmatch(entry.name):
                    if entry.name not in SILENT_FOLDERS:
                        leave_out(left_out, "folders of other programs, and hidden ones", path)
                    continue
                by_link = linked or entry.is_symlink()
                split = split_name(inside[0])
                heapq.heappush(waiting, ((split is None, by_link, split != "train", inside), inside, by_link))
            elif not entry.name.startswith("."):
                found.append(path)
            elif PurePosixPath(entry.name).suffix.lower() in READABLE:
                leave_out(left_out, "hidden files", path)
    return sorted(found, key=_reading_order), left_out


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _reading_order(path: str) -> list[tuple[bool, str]]:
    *folders, name = path.split("/")
    return [*((True, part) for part in folders), (False, name)]


def plain_name(path: str) -> str:
    """A path as it compares: Macs write é as two characters (NFD), others as one (NFC)."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def without_suffix(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def pick_images(folder: Path, files: Iterable[str], left_out: LeftOut) -> list[str]:
    """Those of `files` that are tried as images; the others go to `left_out`, unless they are ours."""
    files = list(files)
    readable = {file for file in files if PurePosixPath(file).suffix.lower() in READABLE}
    beside = readable | {without_suffix(file) for file in readable}
    images = []
    for file in files:
        path = PurePosixPath(file)
        suffix, name = path.suffix.lower(), path.name.lower()
        companion = bool(suffix) and file not in readable and without_suffix(file) in beside
        if suffix in SIDECARS or name in METADATA or name in NOT_IMAGE_NAMES:
            continue
        if companion:
            leave_out(left_out, "companion files", file)
        elif file in readable or not suffix or suffix in UNREADABLE:
            images.append(file)
        elif suffix in (".csv", ".tsv", ".jsonl", ".json"):
            leave_out(left_out, TABLES, file)
        elif suffix not in NOT_IMAGES:
            if starts_like_an_image(folder / file):
                images.append(file)
            else:
                leave_out(left_out, "unfinished downloads" if suffix in UNFINISHED else "other files", file)
    return images
