"""Find the runs below outputs/ and their checkpoints, and show the widgets that choose among runs."""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from stat import S_ISREG

import streamlit as st

from helpers.page_texts import escape, warn_once
from helpers.page_url import gone_names, warn_of_gone
from t2i.runs import checkpoint_folders, checkpoint_step

OUTPUTS = Path("outputs")
DEPTH = 6  # levels of folders below outputs/ that are searched for runs
MOST_FOLDERS = 5000  # folders that are searched, and entries read per folder: each click searches again
INSIDE_RUNS = {"pipeline", "evaluation", "samples", "cells", "reconstructions"}  # folders of a run, which hold no runs


def find_runs(kind: str = "unet") -> dict[str, Path]:
    """Return the run folders below outputs/ by name, the newest run first.

    Pages open only run folders in this list, whatever a URL says. Run folders behind symbolic links are found as well.
    Each run folder is listed once, by its own name rather than by the name of a link. A warning names run folders whose
    names are not UTF-8, because no browser shows such names.

    Args:
        kind: "unet" for runs of denoisers that have pictures or models, or "any" for every run with metrics, such as VAEs.
            A folder with only a pipeline is also a run, so a model of the Hub can be put into outputs/NAME/pipeline.
    """
    changed = {folder: time for folder in _candidates() if (time := _changed(folder)) is not None}
    unreadable = sorted(os.fsencode(folder).decode(errors="replace") for folder in changed if not _is_utf8(folder))
    if unreadable:
        several = f"{', '.join(unreadable[:3])}{', …' if len(unreadable) > 3 else ''}"
        warn_once(f"Runs whose names are not UTF-8 are not listed: {several}; rename these folders")
    newest_first = sorted(filter(_is_utf8, changed), key=lambda folder: changed[folder], reverse=True)
    return {folder.relative_to(OUTPUTS).as_posix(): folder for folder in newest_first if _is_kind(folder, kind)}


def _candidates() -> Iterator[Path]:
    """Yield the folders below outputs/ that may be runs, each folder once, and linked folders last.

    The depth and the number of the searched folders are limited.
    """
    waiting, links = deque([(OUTPUTS, 0)]), deque[tuple[Path, int]]()
    seen: set[tuple[int, int]] = set()
    while (waiting or links) and len(seen) < MOST_FOLDERS:
        folder, depth = waiting.popleft() if waiting else links.popleft()
        try:
            state = os.stat(folder)  # a link may lead back to a folder above it
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            if depth:
                yield folder
            if depth < DEPTH:
                with os.scandir(folder) as entries:
                    for entry in islice(entries, MOST_FOLDERS):
                        of_a_run = entry.name in INSIDE_RUNS or entry.name.startswith((".", "checkpoint-", "node-"))
                        if not of_a_run and entry.is_dir():
                            (links if entry.is_symlink() else waiting).append((folder / entry.name, depth + 1))
        except OSError:  # the folder is unreadable, or was deleted meanwhile
            continue


def _changed(folder: Path) -> float | None:
    """Return the time at which a run last wrote its state, or None for a folder that is not a run."""
    for name in ("run.json", "pipeline/model_index.json"):
        with suppress(OSError):
            state = os.stat(folder / name)
            if S_ISREG(state.st_mode):
                return state.st_mtime
    return None


def _is_utf8(folder: Path) -> bool:
    return str(folder).encode(errors="ignore").decode() == str(folder)


def _is_kind(folder: Path, kind: str) -> bool:
    checkpoints = [path for path in folder.glob("checkpoint-*") if checkpoint_step(path) is not None]
    has_model = (folder / "pipeline").is_dir() or bool(checkpoints)
    if kind == "any":
        return has_model or (folder / "metrics.jsonl").is_file()
    return has_model and not (folder / "vae").is_dir() and not any((path / "vae").is_dir() for path in checkpoints)


def checkpoints_of(run: Path) -> list[str]:
    """Return the names of a run's checkpoints, the oldest first, and then of its finished pipeline."""
    names = [folder.name for folder in checkpoint_folders(run)]
    return names + (["pipeline"] if (run / "pipeline" / "unet").is_dir() else [])


def step_of(checkpoint: str) -> float:
    """Return the step in a checkpoint's name; NaN for other names."""
    digits = checkpoint.removeprefix("checkpoint-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else math.nan


def warn_of_unlisted(names: Sequence[str]) -> None:
    """Show a warning for runs of the URL that a page of pictures does not list, whether they exist or not."""
    others = find_runs("any") if names else {}
    gone = [name for name in names if name not in others]
    warn_of_gone(gone, f"{OUTPUTS}/", "choose another run, or restore the folder")
    for name in [name for name in names if name in others][:3]:
        st.warning(
            escape(
                f"{name} draws no pictures: it is an autoencoder, or has no checkpoint yet; open it on Curves or Runs"
            )
        )


def choose_runs(runs: list[str], key: str = "runs") -> list[str]:
    """Show widgets that choose among `runs`, by a part of the name and by the full name, and return the chosen runs.

    If no full name is chosen, all runs whose name contains the part are returned. Runs that the URL names and that do not
    exist get a warning, and no other runs are returned in their place.

    Args:
        key: name of the URL parameter that holds the chosen names. Widgets for different kinds of names need different
            keys.
    """
    gone = gone_names(key, runs)
    left, right = st.columns([1, 3])
    name_part = left.text_input("Name contains", key="name", bind="query-params")
    names = right.multiselect("Runs", runs, key=key, bind="query-params", placeholder="all that match")
    chosen = [name for name in names if name in runs]
    if key == "runs":
        st.session_state["_runs"] = chosen  # they go along to other pages
    warn_of_gone(gone, f"{OUTPUTS}/" if key == "runs" else "the store", "choose other runs")
    if not gone:
        chosen = chosen or runs
    return [name for name in chosen if name_part.strip().casefold() in name.casefold()]
