"""Two models compared by eye without knowing which is which: a pair of pictures at a time, by keyboard, with a win rate."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from helpers.components import data_address, picture_pair
from helpers.drawing_jobs import GridJob, running_job
from helpers.grid_table import show_progress
from helpers.page_texts import escape, show_no_runs, warn
from helpers.page_url import asked, gone_names, name_choices
from helpers.picture_table import encode_png
from helpers.run_files import best_checkpoint, best_scale, first_prompt, read_settings, sweep_results
from helpers.run_list import OUTPUTS, checkpoints_of, find_runs, warn_of_unlisted

from t2i.errors import UserError
from t2i.evaluation import preferences
from t2i.pictures import cells
from t2i.pictures.png import presets_of

MOST_PAIRS = 100  # pairs of pictures of one comparison
UNEVALUATED_PAIRS = 16  # seeds of the run's own prompt, if no evaluation gives prompts
AS_EVALUATED = "as evaluated"
SIDES = {"a": "First model", "b": "Second model"}
MAX_SCALE = 50.0

Pair = tuple[cells.PlannedCell, cells.PlannedCell]


def main() -> None:
    st.title("Blind test")
    runs = find_runs()
    if not runs:
        show_no_runs(find_runs("any"))
        return
    test = st.container()  # above the models: their widgets come first in this function, as the test depends on them
    with st.expander("The two models", expanded=False):
        models = choose_models(runs)
    if models is not None:
        with test:
            show_test(models)


def show_test(models: Sequence[tuple[Path, str, cells.Cell]]) -> None:
    """Show a pair of pictures, the buttons that answer, and the count, or why there are no pairs."""
    try:
        pairs = plan_pairs(models)
    except UserError as error:
        warn(error)
        return
    problem = next((one.problem for pair in pairs for one in pair if one.problem), None)
    if problem:
        warn(UserError(problem))
        return
    if pairs[0][0].path == pairs[0][1].path:
        st.text(
            "Both sides are the same model with the same settings. Choose another checkpoint, scale or preset below."
        )
        return
    st.caption(
        "Which picture is better? The page does not say which model drew which picture. You can answer by arrow keys."
    )
    draw_missing(pairs)
    known = preferences.answers(*pairs[0])
    ask([pair for pair in pairs if all(one.made for one in pair)], known)
    show_result(pairs, known)


# --- What is compared ------------------------------------------------------------------------------------------------


def choose_models(runs: dict[str, Path]) -> list[tuple[Path, str, cells.Cell]] | None:
    """Show the widgets of both sides, and return each side's run, checkpoint and settings.

    The result is None while a choice is missing, or if the URL names something that does not exist.
    """
    evaluated = [name for name in runs if cells.evaluated_grid(runs[name])] or list(runs)
    first = {"a": evaluated[0], "b": evaluated[1] if len(evaluated) > 1 else evaluated[0]}
    gone = {f"{side}_run": gone_names(f"{side}_run", runs) for side in SIDES}
    names = {side: next(iter(asked(f"{side}_run")), "") or first[side] for side in SIDES}
    choices: dict[str, str | float] = {}
    for side, name in names.items():
        if name in runs and not gone[f"{side}_run"]:
            choices |= first_choices(runs[name], side, is_second=side == "b" and names["a"] == names["b"])
    name_choices({f"{side}_run": names[side] for side in SIDES if not gone[f"{side}_run"]} | choices)
    chosen = []
    for column, (side, title) in zip(st.columns(len(SIDES), gap="large"), SIDES.items(), strict=True):
        with column:
            chosen.append(choose_model(runs, side, title))
            warn_of_unlisted(gone[f"{side}_run"])
    models = [one for one in chosen if one is not None]
    return models if len(models) == len(SIDES) else None


def first_choices(run: Path, side: str, is_second: bool) -> dict[str, str | float]:
    """Return the first values of a side's widgets: the model that the evaluation chose.

    The second side of the same run begins with another checkpoint, or with another evaluated guidance scale.
    """
    names, best = checkpoints_of(run), best_checkpoint(run)
    scale = best_scale(run, cells.evaluated_grid(run))
    others = [float(row["guidance_scale"]) for row in sweep_results(run) if row["guidance_scale"] != scale]
    if is_second and others:
        scale = others[0]
    elif is_second:
        best = next((name for name in names if name not in (best, "pipeline")), best)
    checkpoint = {f"{side}_checkpoint": best} if best else {}
    return {**checkpoint, f"{side}_scale": min(scale, MAX_SCALE), f"{side}_preset": AS_EVALUATED}


def choose_model(runs: dict[str, Path], side: str, title: str) -> tuple[Path, str, cells.Cell] | None:
    """Show the widgets of a side, and return its run, checkpoint and settings, or None while a choice is missing."""
    options: dict[str, Any] = {"index": None, "required": True, "bind": "query-params"}
    st.selectbox(f"{title}: run", list(runs), key=f"{side}_run", on_change=take_run, args=(side,), **options)
    run = runs.get(st.session_state.get(f"{side}_run") or "")
    if run is None:
        return None
    names = checkpoints_of(run)[::-1]
    one, two, three = st.columns([2, 1, 2])
    checkpoint = one.selectbox("Checkpoint", names, key=f"{side}_checkpoint", **options)
    scale = two.number_input(
        "Guidance scale", 0.0, MAX_SCALE, None, 0.5, "%g", key=f"{side}_scale", bind="query-params"
    )
    presets = presets_of(cells.schedule_of(run))
    preset = three.selectbox("Scheduler and steps", [AS_EVALUATED, *presets], key=f"{side}_preset", **options)
    if checkpoint not in names:
        st.text("choose a checkpoint" if names else "no complete checkpoint yet; training writes the first one soon")
        return None
    evaluated = cells.evaluated_grid(run)
    settings = evaluated.cell if evaluated else cells.first_cell(run, first_prompt(run))
    named = presets[preset]._asdict() if preset in presets else {}
    scale = best_scale(run, evaluated) if scale is None else scale  # the field was emptied
    return run, checkpoint, replace(settings, guidance_scale=scale, **named)


def take_run(side: str) -> None:
    """Set the widgets that depend on the newly chosen run of a side."""
    run = find_runs().get(st.session_state[f"{side}_run"] or "")
    if run is not None:
        other = st.session_state.get("b_run" if side == "a" else "a_run")
        is_second = side == "b" and other == st.session_state[f"{side}_run"]
        st.session_state.update(first_choices(run, side, is_second))


def plan_pairs(models: Sequence[tuple[Path, str, cells.Cell]]) -> list[Pair]:
    """Plan the pictures of both models: the prompts and seeds of an evaluation, otherwise seeds of the first run's prompt.

    Raises:
        UserError: a model's settings make no picture.
    """
    grids = [grid for run, _, _ in models if (grid := cells.evaluated_grid(run))]
    samples = grids[0].samples.values if grids else [(models[0][2].prompt, seed) for seed in range(UNEVALUATED_PAIRS)]
    axis = cells.Axis("sample", tuple(samples[:MOST_PAIRS]))
    first, second = (cells.plan(run, checkpoint, cell, [axis]) for run, checkpoint, cell in models)
    return list(zip(first, second, strict=True))


# --- Drawing, asking, counting ---------------------------------------------------------------------------------------


def draw_missing(pairs: Sequence[Pair]) -> None:
    """Offer to draw the pictures that are missing, and show the progress of their drawing. Finished pairs can be judged."""
    missing = cells.missing([one for pair in pairs for one in pair])
    key = ("blind", *(one.path for one in pairs[0]))
    job: GridJob | None = st.session_state.get("_blind_job") or running_job(key)
    if job is not None and (job.key != key or job.finished.is_set()):
        if job.error:
            warn(UserError(job.error))
        if job.key != key and job is st.session_state.get("_started_blind"):  # else another session draws it
            job.stopped.set()
        job = None
    st.session_state["_blind_job"] = job
    if job is None and missing:
        row = st.container(horizontal=True, vertical_alignment="center")
        whole = sum(one.made and two.made for one, two in pairs)
        row.text(f"{whole} of {len(pairs)} pairs are drawn", width="content")
        if row.button(f"Draw the missing {len(missing)} pictures"):
            job = st.session_state["_blind_job"] = st.session_state["_started_blind"] = GridJob.start(key, missing)
    if job is not None:
        watch(job)


def watch(job: GridJob) -> None:
    @st.fragment(run_every=1)
    def look() -> None:
        if job.finished.is_set():
            st.rerun()
        show_progress(job)

    look()


def ask(pairs: Sequence[Pair], known: Mapping[tuple[str, int], str]) -> None:
    """Show a pair that has no answer yet, and the buttons that answer. Order and sides are drawn anew in each session."""
    if not pairs:
        return
    for key in ("_blind_again", "_blind_last"):
        if st.session_state.get(key) not in [at(pair) for pair in pairs]:  # other models were chosen meanwhile
            st.session_state.pop(key, None)
    seed = st.session_state.setdefault("_blind_seed", random.randrange(2**32))
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    again: tuple[str, int] | None = st.session_state.get("_blind_again")
    open_pairs = [
        pairs[number]
        for number in order
        if again == at(pairs[number]) or (not again and at(pairs[number]) not in known)
    ]
    if not open_pairs:
        st.success(f"All {len(pairs)} pairs are judged.")
        show_back()
        return
    pair = open_pairs[0]
    is_swapped = random.Random(f"{seed} {at(pair)}").random() < 0.5
    shown = pair[::-1] if is_swapped else pair
    st.text(f"“{pair[0].cell.prompt}”")
    data = {}
    for side, one in zip(("left", "right"), shown, strict=True):
        image = cells.read_cell(one.run, one.model_hash, one.cell)
        # Stored files name their model, so the browser gets the pixels alone.
        source = data_address(encode_png(np.asarray(image))) if image else ""
        data[side] = {"source": source, "alt": f"{side}: {one.cell.prompt}", "label": side}
    picture_pair({"mode": "side by side", **data}, key="_blind_pair")
    sides = ("second", "first") if is_swapped else ("first", "second")
    with st.container(horizontal=True):
        for label, key, preferred in (
            ("Left is better", "Left", sides[0]),
            ("No difference", "Down", "neither"),
            ("Right is better", "Right", sides[1]),
        ):
            st.button(label, shortcut=key, on_click=partial(take_answer, pair, preferred))
        show_back()
    if error := st.session_state.pop("_blind_error", None):
        warn(error)


def show_back() -> None:
    last = st.session_state.get("_blind_last")
    st.button("Back", shortcut="Up", on_click=go_back, disabled=last is None, help="Judge the last pair again.")


def at(pair: Pair) -> tuple[str, int]:
    return pair[0].cell.prompt, pair[0].cell.seed


def take_answer(pair: Pair, preferred: str) -> None:
    try:
        preferences.record(*pair, preferred)
    except UserError as error:
        st.session_state["_blind_error"] = error
        return
    st.session_state["_blind_last"] = at(pair)
    st.session_state.pop("_blind_again", None)


def go_back() -> None:
    st.session_state["_blind_again"] = st.session_state.pop("_blind_last")


def show_result(pairs: Sequence[Pair], known: Mapping[tuple[str, int], str]) -> None:
    """Show how many pairs are judged, and on demand the share that the first model won, with its interval."""
    counted = preferences.count([choice for pair in pairs if (choice := known.get(at(pair)))])
    st.text(f"{counted.judged} of {len(pairs)} pairs judged")
    if not counted.judged or not st.toggle("Show the result", key="_blind_result"):
        return
    names = [f"{one.run.as_posix().removeprefix(f'{OUTPUTS}/')}/{one.checkpoint}" for one in pairs[0]]
    for title, name, one, wins in zip(SIDES.values(), names, pairs[0], (counted.first, counted.second), strict=True):
        st.text(f"{title}, {name} at guidance scale {one.cell.guidance_scale:g}: better in {wins}")
    st.text(f"No difference: {counted.neither}")
    if counted.share is not None and counted.interval is not None:
        low, high = counted.interval
        words = {"first": "The first model is better.", "second": "The second model is better."}
        st.markdown(
            f"The first model wins **{100 * counted.share:.0f} %** of the decided pairs "
            f"({100 * low:.0f}–{100 * high:.0f} %). "
            + words.get(counted.winner, "This does not say which model is better: the interval holds 50 %.")
        )
    st.caption(escape(f"The answers are kept in {pairs[0][0].run / preferences.FILE}."))
    if st.button("Record the result in MLflow"):
        try:
            with st.spinner("MLflow"):
                waiting = preferences.track(*pairs[0], counted, experiment_of(pairs[0][0].run))
            st.text(
                f"MLflow has not taken all records of this run yet. They wait in {waiting}, and are sent when MLflow answers."
                if waiting
                else "The result stands in the MLflow run of the first model's training."
            )
        except UserError as error:
            warn(error)


def experiment_of(run: Path) -> str:
    section = read_settings(run).get("train_unet")
    return str(section.get("experiment") or "") if isinstance(section, dict) else ""


main()
