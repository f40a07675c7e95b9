"""Show the trainings that run now, again every few seconds, and ask them for samples, for an evaluation, or to stop."""

import platform
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import streamlit as st

from helpers.page_rights import has_control
from helpers.page_texts import warn
from t2i.errors import UserError
from t2i.evaluation.figures import is_finite
from t2i.run_lock import holders, run_status
from t2i.training.live import REQUESTS, ask, read_live, read_requests

EVERY_S = 2  # seconds between two looks at the running trainings
MOST = 6  # trainings that are shown one by one
BUTTONS = {
    "sample": (
        "Sample now",
        "Draw the validation prompts with the present weights. An autoencoder measures and reconstructs validation images instead.",
    ),
    "evaluate": (
        "Evaluate",
        "Measure the validation images with the present weights, and draw the validation prompts.",
    ),
    "stop": ("Save and stop", "Save a checkpoint and end the training. The same command resumes it."),
}


def show_trainings(runs: dict[str, Path]) -> None:
    """Show how far the running ones of `runs` are, and look again every two seconds without running the page.

    If a training ends, the page runs again, so that its tables and curves show the end.
    """
    running = running_runs(runs)
    if not running:
        return
    is_first = True

    @st.fragment(run_every=EVERY_S)
    def watch() -> None:
        nonlocal is_first
        if not is_first and running_runs(running) != running:
            st.rerun()
        is_first = False
        if error := st.session_state.pop("_ask_error", None):
            warn(error)
        for name, run in list(running.items())[:MOST]:
            show_training(name, run)
        if len(running) > MOST:
            st.caption(f"{len(running) - MOST} more trainings run; choose runs to see theirs")

    watch()


def running_runs(runs: dict[str, Path]) -> dict[str, Path]:
    """Return the runs that a training is at work on now."""
    return {name: run for name, run in runs.items() if status_of(run) == "running"}


def status_of(run: Path) -> str:
    """Return a run's present status, or "unknown" if its run.json cannot be read: the pages warn of that where they show it."""
    try:
        return run_status(run)
    except (UserError, OSError, RecursionError):
        return "unknown"


def show_training(name: str, run: Path) -> None:
    """Show a running training: its step, its pace, its memory and its last sign of life, and buttons for requests."""
    processes = holders(run)
    row = present(read_live(run), processes)
    with st.container(border=True, gap="small"):
        line = st.container(horizontal=True, vertical_alignment="center", gap="small")
        line.text(f"{name} · {progress_text(row, any(one['ends'] for one in processes))}", width="stretch")
        if row and may_ask(processes):
            waiting = waiting_requests(run)
            for kind, (title, words) in BUTTONS.items():
                line.button(
                    f"{title} …" if kind in waiting else title,
                    key=f"_ask_{kind}_{name}",
                    help=words,
                    disabled=kind in waiting,
                    on_click=send,
                    args=(run, kind),
                )
        steps = row.get("steps")
        if is_finite(steps) and is_finite(row.get("step")) and steps > 0:
            st.progress(min(1.0, max(0.0, row["step"] / steps)))


def present(row: dict[str, Any], processes: Collection[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of live.json if one of a run's `holders` wrote it; {} for one of an earlier process."""
    return row if any((one["host"], one["pid"]) == (row.get("host"), row.get("pid")) for one in processes) else {}


def progress_text(row: dict[str, Any], ends: bool) -> str:
    """Return how far a training is, as words between dots. What live.json does not tell is left out."""
    if not row:
        return "about to end" if ends else "making data, caches and models ready"
    parts = []
    if is_finite(row.get("step")) and is_finite(row.get("steps")):
        parts.append(f"step {row['step']:,.0f} of {row['steps']:,.0f}")
    if is_finite(row.get("samples_per_second")):
        rate = row["samples_per_second"]
        parts.append(f"{rate:,.0f} samples/s" if rate >= 100 else f"{rate:.3g} samples/s")
    if is_finite(row.get("seconds_left")):
        parts.append(f"{span(row['seconds_left'])} left")
    for key, place in (("memory_bytes", "of memory"), ("gpu_memory_bytes", "on the GPU")):
        if is_finite(row.get(key)):
            parts.append(f"{row[key] / 1e9:.1f} GB {place}" if row[key] >= 1e9 else f"{row[key] / 1e6:.0f} MB {place}")
    if row.get("doing"):
        parts.append(str(row["doing"])[:100])
    elif isinstance(row.get("answered"), dict) and row["answered"]:
        done = {"sample": "drew samples", "evaluate": "measured", "stop": "saved"}
        last = {key: step for key, step in row["answered"].items() if key in done and is_finite(step)}
        parts += [f"{done[key]} at step {last[key]:,.0f}" for key in sorted(last, key=lambda key: -last[key])[:1]]
    with suppress(TypeError, ValueError, OverflowError):
        parts.append(f"last sign of life {span(time.time() - datetime.fromisoformat(row['time']).timestamp())} ago")
    return " · ".join(parts)


def span(seconds: float) -> str:
    """Return a duration in the largest unit that is still exact enough."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# --- Requests --------------------------------------------------------------------------------------------------------


def may_ask(processes: Collection[dict[str, Any]]) -> bool:
    """Return whether this page may ask a run's processes: they work on this machine, and only its users open the page."""
    return any(one["host"] == platform.node() for one in processes) and has_control()


def waiting_requests(run: Path) -> set[str]:
    """Return the requests that the training has not taken yet."""
    with suppress(UserError):
        return read_requests(run / REQUESTS)[0] if (run / REQUESTS).exists() else set()
    return set()


def send(run: Path, kind: str) -> None:
    """Ask a run's training for something, if that is still allowed."""
    if not may_ask(holders(run)):
        return
    try:
        ask(run, kind)
    except UserError as error:
        st.session_state["_ask_error"] = error
