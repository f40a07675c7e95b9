"""Show what an evaluation found on top of the page Compare: its verdict, and a wall of pictures at the best setting."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from helpers.components import gallery
from helpers.grid_choice import sample_titles, show_sample
from helpers.page_texts import escape
from helpers.picture_table import stored_address
from helpers.run_files import read_or_warn
from t2i.evaluation.verdict import TOPICS, headline, outcome, verdict_of
from t2i.pictures import cells
from t2i.runs import guide_problem, run_title

Reported = tuple[str, int, Any]  # Prompt, seed and reading of a picture, as `cells.best_samples` returns them.
WALL, MOST = 64, 512  # Pictures of the wall at first, and when all are asked for.
LISTED = 2  # More right attributes of a picture than these are counted below it.


def show_best(run: Path, evaluated: cells.EvaluatedGrid) -> None:
    """Show the verdict of a run's evaluation, and beside it a wall of the pictures that the verdict is about.

    Beside each other, both start right below the page's title. Pictures that miss what their prompt asks for have an
    outline.
    """
    evaluation = read_or_warn(run / "evaluation" / "evaluation.json")
    left, right = st.columns([1, 3], gap="medium")
    with left:
        show_verdict(run, evaluation)
    with right:
        shown = choose_pictures(cells.best_samples(evaluated, evaluation))
        planned = cells.best_cells(run, evaluated, evaluation.get("report"), shown) if shown else []
        if planned and not any(one.made for one in planned):
            problem = next((one.problem for one in planned if one.problem), None) or guide_problem(run)
            st.caption(
                escape(problem or "The pictures of this evaluation are not in the run folder. This draws them again:")
            )
            command = f"python scripts/evaluate_checkpoints.py --model {shlex.quote(run.as_posix())} --redraw"
            if problem is None:
                st.code(command, language="sh", wrap_lines=True)
        elif planned:
            wall = [wall_picture(row, *one) for row, one in enumerate(zip(planned, shown, strict=True))]
            titles = {sample: title for title, sample in sample_titles(evaluated).items()}
            take = partial(take_clicked_prompt, run, [(*one[:2], titles.get(one[:2])) for one in shown])
            gallery({"pictures": wall, "wall": True, "action": "Show in the grid"}, key="_wall", on_chosen=take)


def choose_pictures(pictures: Sequence[Reported]) -> list[Reported]:
    """Show the widget that chooses some pictures, all, or those that miss something, and return the chosen ones.

    Few pictures are all shown, without the widget. "Some" are spread evenly, because the prompts of held-out combinations
    come last.
    """
    title = "Pictures at the best setting. An outline marks a picture that gets something of its prompt wrong."
    if len(pictures) <= WALL:
        if pictures:
            st.caption(title)
        return list(pictures)
    misses = [one for one in pictures if outcome(one[2])[1]]
    most = "all" if len(pictures) <= MOST else f"{MOST} of"
    titles = {"some": f"{WALL} of {len(pictures)}, evenly spread", "all": f"{most} {len(pictures)}"}
    first = "" if len(misses) <= MOST else f"{MOST} of "
    titles |= {"misses": f"{first}{len(misses)} with a miss"} if misses else {}
    shown = st.segmented_control(
        title,
        list(titles),
        format_func=lambda name: titles.get(name, name),
        default="some",
        required=True,
        key="wall",
    )
    if shown == "misses":
        return misses[:MOST]
    count = min(len(pictures), MOST) if shown == "all" else WALL
    return [pictures[len(pictures) * place // count] for place in range(count)]


def wall_picture(row: int, planned: cells.PlannedCell, sample: Reported) -> dict[str, Any]:
    """Return a picture as `gallery` shows it, with the texts of what it shows and misses of its prompt."""
    prompt, _, reading = sample
    source = stored_address(planned.path) if planned.made else ""
    note = "" if source else planned.problem or "not drawn yet"
    return {"source": source, "note": note, "row": row, **texts_of(prompt, reading)}


def show_verdict(run: Path, evaluation: dict[str, Any]) -> None:
    """Show the sentences of an evaluation's verdict, and the download of the HTML report if there is one.

    The first screen shows the best setting, whether it copies, and the share of right pictures, which has the longest text.
    """
    verdict = verdict_of(evaluation)
    for topic in ("best", "copies", "right") if verdict else ():
        head = ": ".join(filter(None, [TOPICS[topic], escape(headline(verdict.get(topic)))]))
        st.markdown(f"**{head}**  \n" + " ".join(map(escape, verdict["sentences"][topic])))
    folder = run / "evaluation"
    if verdict is None:
        st.caption(
            escape(f"No verdict: {folder}/evaluation.json lacks figures. Remove this folder and evaluate again.")
        )
    report = folder / "report.html"
    if report.is_file() and report.resolve().parent == folder.resolve():  # no link to another file
        name = f"{run_title(run)}-report.html"
        st.download_button(
            "Report as one file",
            partial(read_file, report),
            name,
            "text/html",
            key=f"_report_{run.as_posix()}",  # Runs may share a title.
            on_click="ignore",
        )


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b"this report is gone; reload the page"


def texts_of(prompt: str, reading: Any) -> dict[str, Any]:
    """Return the texts of a picture on the wall: its prompt, and what of the prompt it shows and misses.

    Of many right attributes only the number stands below the picture. The tooltip lists them.
    """
    right, wrong = outcome(reading)
    listed = f"✓ {', '.join(right)}" if right else ""
    return {
        "alt": prompt,
        "caption": prompt,
        "label": listed
        if len(right) <= LISTED
        else f"{'' if wrong else '✓ '}{len(right)} of {len(right) + len(wrong)}",
        "finding": f"✗ {'; '.join(wrong)}" if wrong else "",
        "is_miss": bool(wrong),
        "title": "\n\n".join(filter(None, [prompt, listed, "A click shows this picture in the grid below."])),
    }


def take_clicked_prompt(run: Path, shown: Sequence[tuple[str, int, str | None]]) -> None:
    """Show the clicked picture in the grid: on the tab of its prompt, or without tabs if it is no prompt of the sweep.

    Args:
        run: the evaluated run.
        shown: prompt and seed of each picture, and the title of its tab if there is one.
    """
    chosen = getattr(st.session_state.get("_wall"), "chosen", None)
    row = chosen.get("row") if isinstance(chosen, dict) else None
    if not isinstance(row, int) or not 0 <= row < len(shown):
        return
    prompt, seed, title = shown[row]
    if title and st.session_state.get("tabs") == "sample":
        st.session_state["tab"] = title
    else:
        show_sample(run, prompt, seed)
