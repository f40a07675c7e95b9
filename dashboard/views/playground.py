"""One picture from a prompt: drawn step by step, with some of its steps, the training images nearest to it, and a history.

What is chosen stands in the URL, and a picture that was drawn before is shown at once. Needs neither MLflow nor datasets, so that
it can stand alone where there is a model and nothing else.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from common import escape, find_runs, nothing_yet, say_cut, warn
from drawing import PictureJob
from grid import best_scale, checkpoints_of, first_prompt
from neighbours import show_neighbours
from PIL import Image

from t2i.errors import UserError
from t2i.pictures import cells
from t2i.pictures.png import PRESETS, SCHEDULERS, fitting_schedulers, png_bytes

# Bounds of this page, wherever it runs, as strangers may use it; generate_images.py and Compare take more.
MAX_PROMPT, MAX_STEPS, MAX_SCALE, MAX_SEED = 1000, 50, 50.0, 2**53 - 1  # a browser's numbers are exact up to this seed
HISTORY = 12  # pictures of a session that stay at hand
THUMB, SMALL, LARGE = 72, 84, 384  # pixels a side on the page: in the history, of a step, of the picture


def main() -> None:
    st.title("Playground")
    runs = find_runs()
    if not runs:
        nothing_yet(
            "No run in outputs/ yet. This fills it, in about a quarter of an hour on two CPU cores:", "make demo"
        )
        return
    left, right = st.columns([2, 3], gap="large")
    with left:
        found = choose_model(runs)
        if found is None:
            return
        settings, asked = choose_settings(found[0])
    with right:
        say_cut(found[0], [settings["prompt"], settings["negative_prompt"]])
        try:
            place = cells.plan(*found, cells.Cell(**settings), [])[0]
        except UserError as error:
            warn(error)
        else:
            show_result(place, asked)
    show_history()


# --- What is chosen --------------------------------------------------------------------------------------------------


def choose_model(runs: dict[str, Path]) -> tuple[Path, str] | None:
    """Widgets for a run and one of its checkpoints; None where it has none."""
    name = st.selectbox("Run", list(runs), key="run", bind="query-params", on_change=forget_checkpoint)
    run = runs.get(str(name), next(iter(runs.values())))
    known = checkpoints_of(run)[::-1]
    if not known:
        st.text("no whole checkpoint yet; training writes the first one soon")
        return None
    checkpoint = st.selectbox("Checkpoint", known, key="checkpoint", bind="query-params")
    return run, checkpoint if checkpoint in known else known[0]


def forget_checkpoint() -> None:
    """Another run has other checkpoints, and another guidance scale suits it."""
    for name in ("checkpoint", "guidance_scale"):
        st.session_state.pop(name, None)


def choose_settings(run: Path) -> tuple[dict[str, Any], bool]:
    """The form: the settings of a picture, as `cells.Cell` takes them, and whether it was sent."""
    found = cells.evaluated(run)
    first = first_prompt(run)[:MAX_PROMPT]
    usual = found[0] if found else cells.Cell(first)
    short = {name: key for key, name in SCHEDULERS.items()}
    names = fitting_schedulers(cells.schedule_of(run))
    own = short.get(usual.scheduler, "ddim")
    above = st.container()  # for what the form's values decide
    with st.form("_picture"):
        prompt = st.text_area(
            "Prompt", first, key="prompt", bind="query-params", max_chars=MAX_PROMPT, height=80,
            help="Ctrl+Enter draws it",
        )  # fmt: skip
        negative = st.text_input(
            "Negative prompt", key="negative_prompt", bind="query-params", max_chars=MAX_PROMPT,
            help="what to stay away from",
        )  # fmt: skip
        one, two = st.columns(2)
        seed = one.number_input(
            "Seed", 0, MAX_SEED, min(usual.seed, MAX_SEED), key="seed", bind="query-params",
            help="the noise that the picture begins as; the same seed gives the same picture",
        )  # fmt: skip
        scale = two.number_input(
            "Guidance scale", 0.0, MAX_SCALE, min(best_scale(run, found), MAX_SCALE), 0.5, "%g", key="guidance_scale",
            bind="query-params", help="how strongly to follow the prompt; 1: without guidance",
        )  # fmt: skip
        steps = one.number_input(
            "Steps", 1, MAX_STEPS, min(usual.num_inference_steps, MAX_STEPS), key="num_inference_steps",
            bind="query-params", help="denoising steps; the time to draw grows with them",
        )  # fmt: skip
        scheduler = two.selectbox(
            "Scheduler", names, index=names.index(own) if own in names else 0, key="scheduler",
            bind="query-params",
        )  # fmt: skip
        end = one.number_input(
            "Guidance end", 0.0, 1.0, usual.guidance_end, 0.1, "%g", key="guidance_end", bind="query-params",
            help="share of the steps, from the first on, that are guided; the others take half the time",
        )  # fmt: skip
        with st.container(horizontal=True):
            draw = st.form_submit_button("Draw", type="primary", shortcut=None)
            other = st.form_submit_button("Draw with a random seed", on_click=take_random_seed)
    settings = {
        "prompt": clean(prompt),
        "negative_prompt": clean(negative),
        "seed": int(seed or 0),
        "guidance_scale": float(scale or 0),
        "num_inference_steps": int(steps or 1),
        "scheduler": str(scheduler),
        "guidance_end": 1.0 if end is None else float(end),
    }
    with above:
        show_preset(settings)
    return settings, draw or other


def clean(text: str | None) -> str:
    """A prompt of a URL may be longer than the field takes, or hold lone surrogates, which no file can store."""
    return (text or "")[:MAX_PROMPT].encode("utf-8", "replace").decode("utf-8")


def show_preset(settings: dict[str, Any]) -> None:
    """The presets, marked the one that the form's settings are."""
    alike = (name for name, preset in PRESETS.items() if preset._asdict().items() <= settings.items())
    st.session_state["_preset"] = next(alike, None)
    st.segmented_control(
        "Preset", list(PRESETS), key="_preset", on_change=take_preset,
        help="scheduler, steps, and the share of them that is guided: "
        + ", ".join(f"{name} {one[0]} {one[1]} {one[2]:g}" for name, one in PRESETS.items()),
    )  # fmt: skip


def take_preset() -> None:
    """A preset's settings go into the form; the picture is drawn when that is sent."""
    name = st.session_state["_preset"]
    if name in PRESETS:
        st.session_state.update(PRESETS[name]._asdict())


def take_random_seed() -> None:
    st.session_state["seed"] = random.randrange(2**32)


# --- The picture -----------------------------------------------------------------------------------------------------


def show_result(place: cells.Place, asked: bool) -> None:
    """The picture, if it was made; else how it comes about."""
    if place.problem is not None:
        warn(UserError(place.problem))
        return
    known, job = st.session_state.get("_picture_job", (None, None))
    if job is not None and (known != place.path or asked):  # something else was chosen
        job.stopped.set()
        job = None
    if job is not None and job.finished.is_set():
        st.session_state.pop("_picture_job")
        take_result(place, job)
        job = None
    watched = look_up(place)
    if asked and job is None and (watched is None or not watched.steps):
        job = PictureJob.start(place)
        st.session_state["_picture_job"] = (place.path, job)
    if job is not None:
        show_job(job, place)
        show_neighbours(place.run, None)
    elif watched is not None:
        show_picture(watched, place)
    elif not asked:
        st.text("This picture is not drawn yet. Draw makes it.")


def take_result(place: cells.Place, job: PictureJob) -> None:
    """What a finished job leaves: its picture, or why there is none."""
    if job.error:
        warn(UserError(job.error))
    if job.result is not None and job.result.note:  # no store took it: the session keeps the last such picture
        st.session_state["_unkept"] = (place.path, job.result)


def look_up(place: cells.Place) -> cells.Watched | None:
    path, watched = st.session_state.get("_unkept", (None, None))
    return watched if path == place.path else cells.read_watched(place)


def show_job(job: PictureJob, place: cells.Place) -> None:
    """How far it is, and the newest of its steps, twice a second."""

    @st.fragment(run_every=0.5)
    def watch() -> None:
        job.look()
        if job.finished.is_set():
            st.rerun()
        words = {
            "waiting": "waiting: another picture is being drawn on this server",
            "loading": "loading the model",
        }
        text = words.get(job.stage, f"step {job.step} of {job.steps}")
        st.progress(job.step / max(1, job.steps), text=text)
        if st.button("Stop"):
            job.stopped.set()
        if job.preview is not None:
            st.image(
                job.preview, width=LARGE, alt=f"what the model takes the picture to be: {place.cell.prompt}",
                output_format="PNG",
            )  # fmt: skip
        elif job.stage == "drawing":
            st.text("the first preview comes in a moment")

    watch()


def show_picture(watched: cells.Watched, place: cells.Place) -> None:
    """The picture, its steps, its file, and the training images nearest to it."""
    if watched.note:
        warn(UserError(watched.note))
    remember(watched, place)
    cell = place.cell
    st.image(watched.picture, width=LARGE, alt=cell.prompt or "a picture without a prompt", output_format="PNG")
    model = f"{place.run.resolve().name}/{place.checkpoint}"
    st.download_button(
        "Download PNG", lambda: picture_file(watched, place), f"seed{cell.seed}.png", "image/png", on_click="ignore",
        help=f"with its parameters in it, as generate_images.py writes them; {escape(model)}",
    )  # fmt: skip
    show_steps(watched, place)
    show_neighbours(place.run, watched.picture)


def picture_file(watched: cells.Watched, place: cells.Place) -> bytes:
    """The PNG with its parameters, also of a picture that no store has."""
    model = f"{place.run.resolve().name}/{place.checkpoint}"
    return png_bytes(watched.picture, {**asdict(place.cell), "model_hash": place.model_hash, "model": model})


def show_steps(watched: cells.Watched, place: cells.Place) -> None:
    """Some of the steps from left to right: what the model takes the finished picture to be."""
    if not watched.steps:
        if place.cell.num_inference_steps > 1:
            st.caption("This picture was made without being watched; Draw shows its steps.")
        return
    shown = [*watched.steps, (place.cell.num_inference_steps, watched.picture)]
    with st.container(horizontal=True, gap="small"):
        for number, (step, picture) in enumerate(shown):
            last = number == len(shown) - 1
            label = "finished" if last else f"step {step}"
            st.image(picture, label, width=SMALL, alt=f"{label}: {place.cell.prompt}", output_format="PNG")
    st.caption(
        "What the model takes the finished picture to be at each step (the predicted x0, decoded): first a blur of the "
        "prompt's colors, then forms, then detail. Each costs a run of the decoder, so these few stand for all."
    )


# --- History ---------------------------------------------------------------------------------------------------------


def remember(watched: cells.Watched, place: cells.Place) -> None:
    """Add a picture to this session's history, the newest first; a thumbnail and its settings are all that is kept."""
    history = [entry for entry in st.session_state.get("_history", []) if entry["path"] != place.path]
    seen = next((one for one in st.session_state.get("_history", []) if one["path"] == place.path), None)
    if seen is None:
        image = Image.fromarray(watched.picture).resize((THUMB, THUMB), Image.Resampling.LANCZOS)
        seen = {"path": place.path, "place": place, "thumbnail": np.asarray(image)}
        st.session_state["_history"] = [seen, *history][:HISTORY]


def show_history() -> None:
    """This session's pictures; a button brings a picture's settings back."""
    history: Sequence[dict[str, Any]] = st.session_state.get("_history", [])
    if len(history) < 2:
        return
    st.subheader("This session's pictures")
    with st.container(horizontal=True, gap="small"):
        for number, entry in enumerate(history):
            place: cells.Place = entry["place"]
            with st.container(width=THUMB + 48, gap=None):
                st.image(entry["thumbnail"], width=THUMB, alt=place.cell.prompt, output_format="PNG")
                st.button(
                    f"Seed {place.cell.seed}", key=f"_back_{number}", on_click=bring_back, args=(place,),
                    type="tertiary", help="bring its settings back",
                )  # fmt: skip


def bring_back(place: cells.Place) -> None:
    """Set the widgets to a picture's settings; a run that is gone meanwhile changes nothing."""
    names = {folder: name for name, folder in find_runs().items()}
    if place.run in names:
        short = {name: key for key, name in SCHEDULERS.items()}
        st.session_state.update(
            run=names[place.run], checkpoint=place.checkpoint, **asdict(place.cell) | {"scheduler": short[place.cell.scheduler]}
        )  # fmt: skip


main()
