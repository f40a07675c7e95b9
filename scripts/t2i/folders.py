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

from t2i.caption_files import METADATA, SIDECARS
from t2i.images import starts_like_an_image

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
READABLE = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
# Pictures that are not read here: alone they are bad images, beside a readable one its companions.
RAW = {".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"}
UNREADABLE = RAW | {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".psd", ".psb", ".eps", ".tga"}
UNREADABLE |= {".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".dds", ".qoi", ".icns"}
NOT_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".html", ".py", ".lock"}
NOT_IMAGES |= {".caption", ".parquet"}
NOT_IMAGE_NAMES = {"readme", "license", "licence", "copying", "notice", "thumbs.db", "desktop.ini", "sha256sums"}
FOREIGN_FOLDERS = re.compile(  # of storage systems, unpackers and photo programs: copies, thumbnails, what was deleted
    r"\..*|__macosx.*|@eadir|@tmp|[@#$]recycle(\.bin)?|#snapshot|@recently.*|@transcode|system volume information"
    r"|lost\+found|found\.\d+|.*\.lrdata|.*\.lrcat-data|captureone|ipod photo cache|_?thumb(s|nails?)|__pycache__",
    re.IGNORECASE,
)
SILENT_FOLDERS = {".git", ".cache", ".locks"}  # never images

LeftOut = dict[str, dict[str, Any]]  # reason -> count, and the first names


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
                split = SPLIT_NAMES.get(inside[0].lower())
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
        elif suffix in (".csv", ".tsv", ".jsonl"):
            leave_out(left_out, "tables that are not named metadata.csv or metadata.jsonl", file)
        elif suffix not in NOT_IMAGES:
            if starts_like_an_image(folder / file):
                images.append(file)
            else:
                leave_out(left_out, "other files", file)
    return images
