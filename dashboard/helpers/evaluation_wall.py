"""Show what an evaluation found on top of the page Compare: its verdict, and a wall of pictures at the best setting."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from helpers.components import gallery
from helpers.grid_choice import AXIS_KEYS, sample_titles, show_sample
from helpers.page_texts import escape
from helpers.picture_table import stored_address
from helpers.run_files import read_or_warn
from t2i.evaluation.verdict import TOPICS, outcome, verdict_of
from t2i.pictures import cells
from t2i.runs import run_title

Reported = tuple[cells.PlannedCell, Any]  # A picture of `cells.best_pictures`.
WALL = 64  # More pictures than these are shown only when asked for.


def show_best(run: Path, evaluated: cells.EvaluatedGrid) -> None:
    """Show the verdict of a run's evaluation, and beside it a wall of the pictures that the verdict is about.

    Beside each other, both start right below the page's title. Pictures that miss what their prompt asks for have an
    outline.
    """
    evaluation = read_or_warn(run / "evaluation" / "evaluation.json")
    left, right = st.columns([1, 3], gap="medium")
    with left:
        show_verdict(run, evaluation)
    pictures = cells.best_pictures(run, evaluated, evaluation)
    samples = [(planned.cell.prompt, planned.cell.seed) for planned, _ in pictures]
    titles = {sample: title for title, sample in sample_titles(evaluated).items()}
    if not any(planned.made for planned, _ in pictures):
        return
    with right:
        wall = [wall_picture(row, planned, reading) for row, (planned, reading) in choose_pictures(pictures)]
        gallery(
            {"pictures": wall, "wall": True, "action": "Show in the grid"},
            key="_wall",
            on_chosen=partial(take_clicked_prompt, [(*sample, titles.get(sample)) for sample in samples]),
        )


def choose_pictures(pictures: Sequence[Reported]) -> list[tuple[int, Reported]]:
    """Show the widget that chooses some pictures, all, or those that miss something. Return the chosen ones, numbered.

    Few pictures are all shown, without the widget. "Some" are spread evenly, because the prompts of held-out combinations
    come last.
    """
    numbered = list(enumerate(pictures))
    misses = [(row, (planned, reading)) for row, (planned, reading) in numbered if outcome(reading)[1]]
    if len(pictures) <= WALL:
        return numbered
    shares = {"some": f"{WALL} of {len(pictures)} pictures", "all": f"all {len(pictures)}"}
    shares |= {"misses": f"{len(misses)} with a miss"} if misses else {}
    shown = st.segmented_control(
        "Pictures at the best setting",
        list(shares),
        format_func=lambda name: shares.get(name, name),
        default="some",
        required=True,
        key="wall",
        label_visibility="collapsed",
    )
    if shown == "misses":
        return misses
    return numbered if shown == "all" else [numbered[len(numbered) * place // WALL] for place in range(WALL)]


def wall_picture(row: int, planned: cells.PlannedCell, reading: Any) -> dict[str, Any]:
    """Return a picture as `gallery` shows it, with the texts of what it shows and misses of its prompt."""
    source = stored_address(planned.path) if planned.made else ""
    note = "" if source else planned.problem or "not drawn yet"
    return {"source": source, "note": note, "row": row, **texts_of(planned.cell.prompt, reading)}


def show_verdict(run: Path, evaluation: dict[str, Any]) -> None:
    """Show the sentences of an evaluation's verdict, and the download of the HTML report if there is one.

    The best setting comes first, so that it is in sight without scrolling.
    """
    verdict = verdict_of(evaluation)
    for topic in sorted(TOPICS, key=lambda topic: topic != "best") if verdict else ():
        st.markdown(f"**{TOPICS[topic]}**  \n" + " ".join(map(escape, verdict["sentences"][topic])))
    folder = run / "evaluation"
    if verdict is None:
        st.caption(
            escape(f"No verdict: {folder}/evaluation.json lacks figures. Remove this folder and evaluate again.")
        )
    report = folder / "report.html"
    if report.is_file() and report.resolve().parent == folder.resolve():  # no link to another file
        name = f"{run_title(run)}-report.html"
        st.download_button("Report as one file", partial(read_file, report), name, "text/html", on_click="ignore")


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b"this report is gone; reload the page"


def texts_of(prompt: str, reading: Any) -> dict[str, Any]:
    """Return the texts of a picture on the wall: its prompt, and what of the prompt it shows and misses."""
    right, wrong = outcome(reading)
    return {
        "alt": prompt,
        "caption": prompt,
        "label": f"✓ {', '.join(right)}" if right else "",
        "finding": f"✗ {'; '.join(wrong)}" if wrong else "",
        "is_miss": bool(wrong),
        "title": f"{prompt}\n\nA click shows this prompt in the grid below.",
    }


def take_clicked_prompt(shown: Sequence[tuple[str, int, str | None]]) -> None:
    """Show the clicked picture's prompt in the grid: on its tab, or without tabs if it is no prompt of the sweep.

    Args:
        shown: prompt and seed of each picture, and the title of its tab if there is one.
    """
    chosen = getattr(st.session_state.get("_wall"), "chosen", None)
    row = chosen.get("row") if isinstance(chosen, dict) else None
    if not isinstance(row, int) or not 0 <= row < len(shown):
        return
    prompt, seed, title = shown[row]
    if title and "sample" in [st.session_state.get(key) for key in AXIS_KEYS]:
        st.session_state["tab"] = title
    else:
        show_sample(prompt, seed)
