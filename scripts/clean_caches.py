"""List files that can be made again, such as caches, with their sizes, and remove the kinds that you choose.

python scripts/clean_caches.py

Every removal needs your confirmation. Finished models, metrics, evaluations and samples are never removed. The script
does not touch runs that are at work.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from t2i.command_line import check_options, parse_options
from t2i.config import DataConfig
from t2i.config_types import Flag, PathText
from t2i.errors import UserError, run_main
from t2i.files import read_object
from t2i.run_lock import LOCK, UNFINISHED, run_status
from t2i.runs import checkpoint_folders

CACHES = (
    "pixels",
    "latents",
    "text",
    "features",
    "alignment",
    "trajectories",
    "tiny_decoders",
)  # the suite's folders in a cache folder, where others may keep more
Kind = Literal["caches", "cells", "checkpoints", "spools"]
KINDS = get_args(Kind)
LOST = {
    "caches": "prepared images, latents and text embeddings; the next training computes them again",
    "cells": "pictures of evaluations, grids and reconstructions; evaluate_checkpoints.py --redraw and the dashboard draw them",
    "checkpoints": "checkpoints of finished runs; pipelines stay, but a run cannot be extended or its checkpoints compared",
    "spools": "records that MLflow's server has taken; nothing is lost unless you move to another server",
}


@dataclass
class Options:
    """Folders to look in, and kinds to remove without asking."""

    outputs: PathText = "outputs"  # Folder that holds the run folders.
    cache_dir: PathText = DataConfig().cache_dir  # Folder for prepared images, latents and text embeddings.
    # Kinds to remove without asking.
    remove: Annotated[list[Kind], Field(max_length=4)] = field(default_factory=list)
    dry_run: Flag = False  # List the files without removing any.


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    runs, busy = find_runs(Path(options.outputs).expanduser())
    for run in busy:
        print(f"{run} is at work or cannot be read: it is left alone")
    caches = Path(options.cache_dir).expanduser()
    if busy and caches.is_dir():
        print(f"{caches} may be in use by that run: it is left alone")
    find: dict[str, Callable[[], list[Path]]] = {
        "caches": lambda: [] if busy else [path for path in (caches / name for name in CACHES) if path.is_dir()],
        "cells": lambda: [path for run in runs for path in (run / "cells", run / "reconstructions") if path.is_dir()],
        "checkpoints": lambda: [path for run in runs if is_finished(run) for path in checkpoint_folders(run)],
        "spools": lambda: [path for run in runs if is_finished(run) and is_sent(run) for path in spool_of(run)],
    }
    removable = {kind: find[kind]() for kind in KINDS}
    sizes = {path: size_of(path) for paths in removable.values() for path in paths}
    for kind, paths in removable.items():
        print(f"\n{kind}: {sum(map(sizes.__getitem__, paths)) / 1e6:,.1f} MB ({LOST[kind]})")
        for path in sorted(paths, key=sizes.__getitem__, reverse=True):
            print(f"  {sizes[path] / 1e6:10,.1f} MB  {path}")
    if options.dry_run or not sizes:
        return
    print()
    if not options.remove and not sys.stdin.isatty():
        raise UserError(
            f"no terminal is attached to choose in; name what to remove: --remove {' '.join(KINDS)}, or look with --dry_run"
        )
    for kind, paths in removable.items():
        if paths and (kind in options.remove or (not options.remove and said_yes(kind))):
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            print(f"removed {kind}: {sum(map(sizes.__getitem__, paths)) / 1e6:,.1f} MB")


def find_runs(outputs: Path) -> tuple[list[Path], list[Path]]:
    """Return the idle run folders below `outputs`, and the folders that are at work or unreadable, also behind links.

    Idle runs outside `outputs`, to which only a link leads, are left out: other people may use them. A run is at work if a
    process holds its lock, or the lock of a folder in it, such as `evaluation/` and `cells/`. A training holds the lock before
    it writes run.json, and while it extends a finished run.
    """
    found, root = dict(walk(outputs)), os.path.realpath(outputs)
    locked = [
        folder
        for folder, files in found.items()
        if LOCK in files and run_status(folder, {"status": UNFINISHED}) == "running"
    ]
    folders = sorted(folder for folder in found if (folder / "run.json").is_file())
    runs: list[Path] = []
    busy = [folder for folder in locked if not any(folder.is_relative_to(run) for run in folders)]
    for run in folders:
        try:
            read_object(run / "run.json")
            if any(folder.is_relative_to(run) for folder in locked):
                busy.append(run)
            elif Path(os.path.realpath(run)).is_relative_to(root):
                runs.append(run)
        except UserError:
            busy.append(run)
    return runs, busy


def walk(outputs: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield all folders from `outputs` down, each with the names of its files. Links are followed, and a folder is met once."""
    root, seen = Path(os.path.realpath(outputs)), set[str]()
    for folder, names, files in os.walk(outputs, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or (seen and root.is_relative_to(real)):  # a link may lead to a folder above
            names.clear()
            continue
        seen.add(real)
        names.sort(key=lambda name: os.path.islink(os.path.join(folder, name)))
        yield Path(folder), files


def is_finished(run: Path) -> bool:
    """Return whether a run has finished and saved its model, so that its checkpoints may be removed."""
    has_model = (run / "pipeline" / "model_index.json").is_file() or (run / "vae" / "config.json").is_file()
    return has_model and read_object(run / "run.json").get("status") == "finished"


def spool_of(run: Path) -> Iterator[Path]:
    """Yield the files and folders of a run that hold records for MLflow."""
    return (path for path in (run / "mlflow_spool.jsonl", run / "mlflow_spool") if path.exists())


def is_sent(run: Path) -> bool:
    """Return whether MLflow's server has taken all records of a run."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((run / "mlflow_spool" / "state.json").read_text(encoding="utf-8"))
        return bool(state["offset"] == (run / "mlflow_spool.jsonl").stat().st_size and not state["set_aside"])
    return False


def size_of(path: Path) -> int:
    """Return the size in bytes of a file, or of all files below a folder. A symbolic link has size 0."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def said_yes(kind: str) -> bool:
    """Ask on the terminal whether to remove the files of one kind."""
    try:
        return input(f"remove {kind}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


if __name__ == "__main__":
    run_main(main)
