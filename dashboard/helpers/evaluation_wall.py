"""Show what an evaluation found on top of the page Compare: its verdict, and a wall of pictures at the best setting."""

from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from helpers.components import gallery
from helpers.grid_choice import sample_titles
from helpers.page_texts import escape
from helpers.picture_table import stored_address
from helpers.run_files import read_or_warn
from t2i.evaluation.verdict import TOPICS, outcome, verdict_of
from t2i.pictures import cells
from t2i.runs import run_title


def show_best(run: Path, evaluated: cells.EvaluatedGrid) -> None:
    """Show the verdict of a run's evaluation, and beside it a wall of the evaluated prompts at the best setting.

    Beside each other, both start right below the page's title. Pictures that miss what their prompt asks for have an
    outline.
    """
    evaluation = read_or_warn(run / "evaluation" / "evaluation.json")
    left, right = st.columns([1, 3], gap="medium")
    with left:
        show_verdict(run, evaluation)
    readings = evaluation.get("readings")
    pictures = []
    for number, planned in enumerate(cells.best_cells(run, evaluated, evaluation.get("report"))):
        reading = readings[number] if isinstance(readings, list) and number < len(readings) else None
        source = stored_address(planned.path) if planned.made else ""
        note = "" if source else planned.problem or "not drawn yet"
        pictures.append({"source": source, "note": note, "row": number, **texts_of(planned.cell.prompt, reading)})
    if any(picture["source"] for picture in pictures):
        take = partial(take_clicked_prompt, list(sample_titles(evaluated)))
        with right:
            gallery({"pictures": pictures, "wall": True, "action": "Show in the grid"}, key="_wall", on_chosen=take)


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


def take_clicked_prompt(titles: list[str]) -> None:
    """Show the clicked prompt in the grid, if evaluated prompts are the grid's tabs."""
    chosen = getattr(st.session_state.get("_wall"), "chosen", None)
    row = chosen.get("row") if isinstance(chosen, dict) else None
    if isinstance(row, int) and 0 <= row < len(titles):
        st.session_state["tab"] = titles[row]
