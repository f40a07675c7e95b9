"""Pictures from a prompt: drafts while it is typed, then one picture step by step, or several by seeds, words and models.

A picture that stands alone comes with some of its denoising steps and the training images nearest to it. The URL holds
the chosen settings, and a picture that was drawn before is shown at once. This page needs neither MLflow nor datasets,
so that a Space can consist of only this page and a model.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st
from helpers.components import data_address, scrubber
from helpers.drawing_jobs import PictureJob, running_job
from helpers.page_links import MAX_PROMPT, MAX_SCALE, MAX_SEED, MAX_STEPS, SHORT_NAMES, grid_link
from helpers.page_texts import escape, show_no_runs, warn
from helpers.page_url import Choice, asked, gone_names, name_choices, warn_of_gone
from helpers.picture_set import show_set
from helpers.picture_strip import show_strip
from helpers.picture_table import encode_png
from helpers.run_files import best_checkpoint, best_run, best_scale, first_prompt, read_or_warn, warn_of_cut_prompts
from helpers.run_list import OUTPUTS, checkpoints_of, find_runs, warn_of_unlisted
from helpers.training_neighbours import show_neighbours
from helpers.typed_drafts import forget_text, show_draft
from streamlit.delta_generator import DeltaGenerator

from t2i.errors import UserError
from t2i.pictures import cells, wildcards
from t2i.pictures.png import (
    TURBO,
    Preset,
    fastest_preset,
    fitting_schedulers,
    png_bytes,
    presets_of,
    scheduler_problem,
    student_steps,
)
from t2i.runs import find_student

SETTINGS = (
    "seed",
    "guidance_scale",
    "num_inference_steps",
    "scheduler",
    "guidance_end",
    "guidance_rescale",
)  # widgets of the form
SEEDS = ("1", "4", "9")  # pictures of each prompt, with seeds that follow each other
MOST_PICTURES = 36  # of one set: alternatives in the prompt times seeds
MOST_DRAFTS = 9  # of these that are drawn while the prompt is typed
OWN = 12  # pictures of a session that a page remembers whose pictures nobody else may see
# Prompt, picture and form follow each other on a phone. On a wide page the picture is beside the other two.
LAYOUT = """<style>
.st-key-play { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); grid-template-rows: auto 1fr; column-gap: 3rem;
  grid-template-areas: "ask result" "form result"; align-items: start; }
.st-key-play > :has(> .st-key-play_ask) { grid-area: ask; }
.st-key-play > :has(> .st-key-play_result) { grid-area: result; }
.st-key-play > :has(> .st-key-play_form) { grid-area: form; }
.st-key-play > * { min-width: 0; width: 100%; }
.st-key-prompt [data-testid=InputInstructions] { display: none; } /* It says Ctrl and Enter, but Enter does. */
.st-key-play_result :has(> .st-key-play_listen) { position: absolute; }
.st-key-play_result:has(.st-key-play_draft img) .st-key-play_full { display: none; }
@media (max-width: 640px) { .st-key-play { grid-template-columns: minmax(0, 1fr); grid-template-rows: none;
  grid-template-areas: "ask" "result" "form"; } }
</style>"""
LARGE = 384  # pixels per side of the picture on the page


def main() -> None:
    st.title("Playground")
    runs = find_runs()
    if not runs:
        show_no_runs(find_runs("any"))
        return
    st.html(LAYOUT)
    with st.container(key="play"):
        ask, result, form = (st.container(key=f"play_{name}") for name in ("ask", "result", "form"))
    with form:
        model = choose_model(runs)
    if model is None:
        return
    with form:
        models = [model, *choose_beside(runs, model)]
    settings, asked_to_draw = choose_settings(model[0], ask, form)
    keep_choices()
    if asked_to_draw:
        forget_text()
    with result:
        draft = st.container()
        with st.container(key="play_full"):
            covered = show_pictures(models, settings, asked_to_draw)
    show_strip(list(runs.values()), own_pictures(), settings_text, bring_back)
    drafter, fast = choose_drafter(model)
    live = bool(fast) and st.session_state["_as_typed"]
    with draft:  # last: it waits for the draft
        show_draft(
            lambda text: plan_set([drafter], settings | fast | {"prompt": clean(text)})[:MOST_DRAFTS], live, covered
        )


# --- What is chosen --------------------------------------------------------------------------------------------------


def choose_model(runs: dict[str, Path]) -> tuple[Path, str] | None:
    """Show widgets that choose a run and one of its checkpoints, and return both.

    The result is None if the run has no checkpoint, or if the URL names a run or checkpoint that does not exist.
    """
    gone = gone_names("run", runs)
    kept: dict[str, Any] = st.session_state.get("_kept", {})  # from an earlier visit of this page
    kept = kept if not st.query_params and kept.get("run") in runs else {}
    first = next(iter(asked("run")), "") or ("" if gone else kept.get("run") or best_run(runs))
    run = runs.get(first)
    names = checkpoints_of(run)[::-1] if run else []
    if kept.get("checkpoint") not in names:
        kept.pop("checkpoint", None)
    gone_checkpoints = gone_names("checkpoint", names) if run else []
    if run and names:
        if st.query_params.get("scheduler") not in (None, *fitting_schedulers(cells.schedule_of(run))):
            del st.query_params["scheduler"]  # It would draw something wrong with this model.
        name_choices({"run": first, "checkpoint": best_checkpoint(run) or names[0], **first_settings(run), **kept})
    options: dict[str, Any] = {"index": None, "required": True, "bind": "query-params"}
    st.selectbox("Run", list(runs), key="run", on_change=take_run, **options)
    if run is None:
        warn_of_unlisted(gone)
        return None
    if not names:
        st.text("no complete checkpoint yet; training writes the first one soon")
        return None
    checkpoint = st.selectbox("Checkpoint", names, key="checkpoint", **options)
    if checkpoint not in names:
        st.text("choose a checkpoint")
        warn_of_gone(gone_checkpoints, run.as_posix(), "choose another checkpoint")
        return None
    return run, checkpoint


def keep_choices() -> None:
    """Keep the choices of this page for its next visit: a change of page drops those of the page before."""
    keys = ("run", "checkpoint", "prompt", "negative_prompt", "pictures", *SETTINGS)
    st.session_state["_kept"] = {key: value for key in keys if (value := st.session_state.get(key)) not in (None, "")}


def take_run() -> None:
    """Set the widgets that depend on the newly chosen run: the checkpoint, the guidance scale, and what does not suit it."""
    state, run = st.session_state, find_runs().get(st.session_state["run"])
    if run is not None and checkpoints_of(run):
        first = first_settings(run)
        state["checkpoint"] = best_checkpoint(run)
        state["guidance_scale"] = first["guidance_scale"]
        if scheduler_problem(state["scheduler"] or "ddim", cells.schedule_of(run), state["num_inference_steps"]):
            state.update({name: first[name] for name in ("scheduler", "num_inference_steps", "guidance_end")})


def first_settings(run: Path) -> dict[str, Choice]:
    """Return the first values of the form's widgets.

    They are those of the first picture that the run's evaluation reports, so that the page opens with a picture. Without
    reported pictures, the form has the run's first prompt.
    """
    evaluated = cells.evaluated_grid(run)
    prompt = first_prompt(run)
    default = evaluated.cell if evaluated else cells.first_cell(run, prompt)
    seed = default.seed
    evaluation = read_or_warn(run / "evaluation" / "evaluation.json")
    if evaluated and "seeds" in evaluation and (reported := cells.best_samples(evaluated, evaluation)):
        prompt, seed, _ = reported[0]
    prompt = prompt[:MAX_PROMPT]
    schedulers = fitting_schedulers(cells.schedule_of(run))
    scheduler = SHORT_NAMES.get(default.scheduler, "ddim")
    return {
        "prompt": wildcards.literal(prompt),
        "pictures": SEEDS[0],
        "seed": min(seed, MAX_SEED),
        "guidance_scale": min(best_scale(run, evaluated), MAX_SCALE),
        "num_inference_steps": min(default.num_inference_steps, MAX_STEPS),
        "scheduler": scheduler if scheduler in schedulers else next(iter(schedulers), "ddim"),
        "guidance_end": default.guidance_end,
        "guidance_rescale": default.guidance_rescale,
    }


def choose_settings(run: Path, ask: DeltaGenerator, form: DeltaGenerator) -> tuple[dict[str, Any], bool]:
    """Show the prompt and the buttons in the container `ask`, and all other settings of a picture in `form`.

    Return the chosen settings as a `cells.Cell`, and whether to draw them.
    """
    first = first_settings(run)
    with ask:
        prompt = st.text_area(
            "Prompt",
            key="prompt",
            bind="query-params",
            max_chars=MAX_PROMPT,
            height=80,
            help="Enter draws, Shift and Enter begin a new line. {red|blue} flower draws a red and a blue one.",
        )
        with st.container(horizontal=True):
            draw = st.button("Draw", type="primary", key="draw")
            other = st.button("Draw with a random seed", on_click=take_random_seed)
    above = form.container()  # for the presets, which depend on the values below
    with form.container(border=True):
        negative = st.text_input(
            "Negative prompt",
            key="negative_prompt",
            bind="query-params",
            max_chars=MAX_PROMPT,
            help="Negative prompt: what the picture should not show.",
        )
        one, two = st.columns(2)
        seed = number(
            one,
            "Seed",
            "seed",
            0,
            MAX_SEED,
            help="Seed of the noise from which the picture is made. The same seed gives the same picture.",
        )
        scale = number(
            one,
            "Guidance scale",
            "guidance_scale",
            0.0,
            MAX_SCALE,
            0.5,
            help="Strength with which the picture follows the prompt. A guidance scale of 1 disables guidance.",
        )
        steps = number(
            two,
            "Steps",
            "num_inference_steps",
            1,
            MAX_STEPS,
            help="Number of denoising steps. The time to draw grows with the number of steps.",
        )
        scheduler = two.selectbox(
            "Scheduler",
            fitting_schedulers(cells.schedule_of(run)),
            index=None,
            required=True,
            key="scheduler",
            bind="query-params",
        )
        end = number(
            one,
            "Guidance end",
            "guidance_end",
            0.0,
            1.0,
            0.1,
            help="Share of the steps, from the first step on, that are guided. Unguided denoising steps take half the time.",
        )
        rescale = number(
            two, "Guidance rescale", "guidance_rescale", 0.0, 1.0, 0.1,
            help="How far guidance keeps the contrast of an unguided picture. 0.35 to 0.7 prevents glaring colors.",
        )  # fmt: skip
    settings = {
        "prompt": clean(prompt),
        "negative_prompt": clean(negative),
        "seed": seed,
        "guidance_scale": scale,
        "num_inference_steps": steps,
        "scheduler": scheduler,
        "guidance_end": end,
        "guidance_rescale": rescale,
    }
    settings |= {key: first[key] for key, value in settings.items() if value is None}  # a field was emptied
    with above:
        show_preset(presets_of(cells.schedule_of(run)), settings)
        choose_pictures()
    return settings, draw or other


def choose_pictures() -> None:
    """Show the number of pictures of each prompt, and the switch of the drafts."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    row.segmented_control(
        "Pictures",
        SEEDS,
        key="pictures",
        bind="query-params",
        required=True,
        help="Number of pictures of each prompt. Their seeds follow each other.",
    )
    st.session_state["_as_typed"] = row.toggle(
        "Draw as you type",
        value=st.session_state.get("_as_typed", True),
        key="live",
        help="Draw a draft in few steps whenever you pause. Drafts are not stored.",
    )


def choose_beside(runs: dict[str, Path], model: tuple[Path, str]) -> list[tuple[Path, str]]:
    """Show the widget that chooses a second model, and return it in a list, which is empty without one."""
    others = {
        f"{name}/{checkpoint}": (run, checkpoint)
        for name, run in sorted(runs.items(), key=lambda item: item[1] != model[0])
        for checkpoint in checkpoints_of(run)[::-1]
        if (run, checkpoint) != model
    }
    if st.query_params.get("beside", st.session_state.get("beside")) not in (None, "", *others):
        st.query_params.pop("beside", None)
        st.session_state.pop("beside", None)
    chosen = st.selectbox(
        "Compare with",
        list(others),
        index=None,
        key="beside",
        bind="query-params",
        placeholder="another checkpoint",
        help="A second checkpoint draws the same prompt with the same seed and settings.",
    )
    return [others[chosen]] if chosen in others else []


def number(column: DeltaGenerator, title: str, key: str, low: Any, high: Any, step: Any = None, *, help: str) -> Any:
    """Show the widget of a number, and return its value; None if the user emptied it. Floats are shown without zeros."""
    shown = "%g" if isinstance(low, float) else None
    return column.number_input(title, low, high, None, step, shown, key=key, bind="query-params", help=help)


def clean(text: str | None) -> str:
    """Clean a prompt from a URL: shorten it to the field's limit, and remove lone surrogates, which no file can hold."""
    return (text or "")[:MAX_PROMPT].encode("utf-8", "replace").decode("utf-8")


def choose_drafter(model: tuple[Path, str]) -> tuple[tuple[Path, str], dict[str, Any]]:
    """Return the model that draws drafts, and its settings: the student beside the model, or the model by its fastest preset.

    Without a preset that suits the model, the settings are {}.
    """
    student = find_student(model[0])
    drafter = (student, "pipeline") if student else model
    preset = fastest_preset(cells.schedule_of(drafter[0]))
    is_turbo = preset is not None and student_steps(cells.schedule_of(drafter[0])) is not None
    return drafter, (preset._asdict() if preset else {}) | ({"guidance_scale": 1.0} if is_turbo else {})


def show_preset(presets: dict[str, Preset], settings: dict[str, Any]) -> None:
    """Show the presets of the form, and mark the preset that equals the settings in the form."""
    alike = (name for name, preset in presets.items() if preset._asdict().items() <= settings.items())
    st.session_state["_preset"] = next(alike, None)
    st.segmented_control(
        "Preset",
        list(presets),
        key="_preset",
        on_change=take_preset,
        args=(presets,),
        help="Scheduler, number of steps, and share of guided steps: "
        + ", ".join(f"{name} {one[0]} {one[1]} {one[2]:g}" for name, one in presets.items()),
    )


def take_preset(presets: dict[str, Preset]) -> None:
    """Put a preset's settings into the form, so that the next picture is drawn with them."""
    name = st.session_state["_preset"]
    if name in presets:
        st.session_state.update(presets[name]._asdict())
    if name == TURBO:
        st.session_state["guidance_scale"] = 1.0


def take_random_seed() -> None:
    st.session_state["seed"] = random.randrange(2**32)


# --- The picture -----------------------------------------------------------------------------------------------------


def plan_set(models: Sequence[tuple[Path, str]], settings: dict[str, Any]) -> list[cells.PlannedCell]:
    """Plan the pictures of all models, prompts and seeds, those of the same prompt and seed beside each other.

    Raises:
        UserError: the prompt's braces have an error, the settings make no picture, or there are too many pictures.
    """
    prompts = wildcards.expand(settings["prompt"], MOST_PICTURES)
    count = int(st.session_state.get("pictures") or SEEDS[0])
    if len(prompts) * count > MOST_PICTURES:
        raise UserError(
            f"{len(prompts)} prompts with {count} seeds each are more than {MOST_PICTURES} pictures; "
            "take fewer pictures, or fewer alternatives in braces"
        )
    seeds = cells.Axis("seed", tuple(range(settings["seed"], settings["seed"] + count)))
    cell = cells.Cell(**settings | {"prompt": prompts[0]})
    plans = [cells.plan(*model, cell, [seeds, cells.Axis("prompt", tuple(prompts))]) for model in models]
    return [one for same in zip(*plans, strict=True) for one in same]


def show_pictures(models: Sequence[tuple[Path, str]], settings: dict[str, Any], asked: bool) -> bool:
    """Show the picture or pictures of the chosen settings, and draw them if `asked`.

    Return whether any of them is drawn or being drawn, or cannot be.
    """
    try:
        planned = plan_set(models, settings)
    except UserError as error:
        warn(error)
        return True
    prompts = dict.fromkeys(one.cell.prompt for one in planned)
    warn_of_cut_prompts(models[0][0], [*list(prompts)[:3], settings["negative_prompt"]])
    if settings["negative_prompt"] and settings["guidance_scale"] <= 1:
        st.warning("The negative prompt has no effect at guidance scale 1 or less, without guidance.")
    if len(planned) == 1:
        covered = show_result(planned[0], asked)
        grid_link(planned)
        return covered
    for one in planned:
        if one.made:
            note_own(one)
    columns = 2 if len(models) > 1 or len(planned) <= 4 else 3
    caption = partial(set_caption, has_models=len(models) > 1, has_prompts=len(prompts) > 1)
    covered = show_set(planned, columns, caption, bring_back, asked)
    grid_link(planned)
    return covered


def set_caption(planned: cells.PlannedCell, has_models: bool, has_prompts: bool) -> str:
    """Return what makes a picture differ from the others of its set."""
    model = [f"{planned.run.as_posix().removeprefix(f'{OUTPUTS}/')}/{planned.checkpoint}"] if has_models else []
    prompt = [f"“{planned.cell.prompt}”"] if has_prompts else []
    return " · ".join([*model, *prompt, f"seed {planned.cell.seed}"])


def show_result(planned: cells.PlannedCell, asked: bool) -> bool:
    """Show the stored picture, or else the job that draws the picture, or else how to start drawing.

    Return whether the picture of these settings is drawn or being drawn, or cannot be.
    """
    if planned.problem is not None:
        warn(UserError(planned.problem))
        return True
    job: PictureJob | None = st.session_state.get("_picture_job")
    if job is not None and asked:
        if job is st.session_state.get("_started_picture"):  # by this session: another one may still watch the job
            job.stopped.set()
        job = None
    if not asked and (job is None or job.planned.path != planned.path):  # the page may have been loaded again
        job = running_job(planned.path) or job
    if job is not None and job.finished.is_set():
        st.session_state.pop("_picture_job", None)
        take_result(job)
        job = None
    watched = look_up(planned)
    if asked and job is None and (watched is None or not watched.steps):
        job = PictureJob.start(planned)
        st.session_state["_started_picture"] = job
    if job is not None:
        st.session_state["_picture_job"] = job
    is_other = job is not None and job.planned.path != planned.path  # settings were changed while the job draws
    if job is not None and not (is_other and watched):
        if is_other:
            st.text(
                "The picture being drawn has earlier settings. Draw stops it, and draws one with the present settings."
            )
        show_job(job)
        show_neighbours(planned.run, None)
    elif watched is not None:
        show_picture(watched, planned)
    elif not asked:
        st.text("This picture is not drawn yet. Draw makes it.")
        show_stale()
    return watched is not None or (job is not None and not is_other)


def take_result(job: PictureJob) -> None:
    """Take the picture of a finished drawing job, or show a warning why the job has no picture."""
    if job.error:
        warn(UserError(job.error))
    if job.result is not None:
        st.session_state["_last"] = job.planned
        if job.result.note:  # the store did not take it: the session keeps the last such picture
            st.session_state["_unkept"] = (job.planned.path, job.result)


def look_up(planned: cells.PlannedCell) -> cells.Watched | None:
    path, watched = st.session_state.get("_unkept", (None, None))
    return watched if path == planned.path else cells.read_watched(planned)


def show_job(job: PictureJob) -> None:
    """Show the progress of a drawing job and the picture at its newest step, twice per second."""

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
        text = "stopping" if job.stopped.is_set() else text
        st.progress(job.step / max(1, job.steps), text=text)
        st.button("Stop", on_click=job.stopped.set, disabled=job.stopped.is_set())
        if job.preview is not None:
            st.image(
                job.preview,
                width=LARGE,
                alt=f"what the model takes the picture to be: {job.planned.cell.prompt}",
                output_format="PNG",
            )
        elif job.stage == "drawing":
            st.text("the first preview comes in a moment")

    watch()


def show_picture(watched: cells.Watched, planned: cells.PlannedCell) -> None:
    """Show the picture, its steps, its file, and the training images nearest to it."""
    if watched.note:
        warn(UserError(watched.note))
    st.session_state["_last"] = planned
    note_own(planned)
    cell = planned.cell
    show_steps(watched, planned)
    st.text(settings_text(planned))
    model = f"{planned.run.resolve().name}/{planned.checkpoint}"
    st.download_button(
        "Download PNG",
        lambda: picture_file(watched, planned),
        f"seed{cell.seed}.png",
        "image/png",
        on_click="ignore",
        help=f"PNG file with the picture's parameters, as generate_images.py writes them; {escape(model)}",
    )
    explain_steps(watched, planned)
    show_neighbours(planned.run, watched.picture)


def show_stale() -> None:
    """Show the picture that was drawn last, and say that it does not show the present settings."""
    before: cells.PlannedCell | None = st.session_state.get("_last")
    watched = look_up(before) if before else None
    if before and watched:
        st.warning("The picture below is an earlier one: its prompt or settings differ from those chosen now.")
        st.image(watched.picture, width=LARGE, alt=f"an earlier picture: {before.cell.prompt}", output_format="PNG")
        st.text(settings_text(before))


def settings_text(planned: cells.PlannedCell) -> str:
    """Return a picture's own settings as a line of text."""
    cell = planned.cell
    end = f" until {cell.guidance_end:g} of the steps" if cell.guidance_end < 1 else ""
    rescaled = f", rescaled by {cell.guidance_rescale:g}" if cell.guidance_rescale else ""
    parts = [
        f"seed {cell.seed}",
        f"guidance scale {cell.guidance_scale:g}{end}{rescaled}",
        f"{cell.num_inference_steps} steps of {SHORT_NAMES.get(cell.scheduler, cell.scheduler)}",
        f"{planned.run.as_posix().removeprefix(f'{OUTPUTS}/')}/{planned.checkpoint}",
        f"“{cell.prompt}”",
        *([f"without “{cell.negative_prompt}”"] if cell.negative_prompt else []),
    ]
    return " · ".join(parts)


def picture_file(watched: cells.Watched, planned: cells.PlannedCell) -> bytes:
    """Return a picture's PNG file with its parameters, even if the store does not have the picture."""
    model = f"{planned.run.resolve().name}/{planned.checkpoint}"
    return png_bytes(watched.picture, {**asdict(planned.cell), "model_hash": planned.model_hash, "model": model})


def show_steps(watched: cells.Watched, planned: cells.PlannedCell) -> None:
    """Show a picture, and below it a slider over the model's guesses of it at some of the denoising steps."""
    prompt = planned.cell.prompt or "a picture without a prompt"
    if not watched.steps:
        st.image(watched.picture, width=LARGE, alt=prompt, output_format="PNG")
        return
    steps = [
        {"source": data_address(encode_png(picture)), "label": f"step {step}", "alt": f"step {step}: {prompt}"}
        for step, picture in watched.steps
    ]
    finished = {"source": data_address(encode_png(watched.picture)), "label": "finished", "alt": prompt}
    scrubber({"title": "Denoising steps", "steps": [*steps, finished]}, key="_steps")


def explain_steps(watched: cells.Watched, planned: cells.PlannedCell) -> None:
    if watched.steps:
        st.caption(
            "At some of the steps, the slider shows how the model predicts the finished picture (x0, decoded): "
            "first a blur of the prompt's colors, then forms, then detail."
        )
    elif planned.cell.num_inference_steps > 1:
        st.caption("The steps of this picture were not recorded. Draw shows them.")


# --- Earlier pictures ------------------------------------------------------------------------------------------------


def own_pictures() -> list[cells.PlannedCell] | None:
    """Return the pictures that this session drew, or None if the page shows all stored ones.

    A Space has this page alone, and strangers share it, so nobody gets the pictures of others there.
    """
    return None if (Path(__file__).parent / "compare.py").is_file() else st.session_state.get("_own", [])


def note_own(planned: cells.PlannedCell) -> None:
    """Remember a shown picture, the newest first."""
    own: list[cells.PlannedCell] = st.session_state.get("_own", [])
    if all(one.path != planned.path for one in own):
        st.session_state["_own"] = [planned, *own][:OWN]


def bring_back(planned: cells.PlannedCell) -> None:
    """Set the widgets to the settings of one picture alone, unless the picture's run no longer exists."""
    names = {folder: name for name, folder in find_runs().items()}
    if planned.run in names:
        forget_text()
        settings = asdict(planned.cell) | {
            "scheduler": SHORT_NAMES[planned.cell.scheduler],
            "prompt": wildcards.literal(planned.cell.prompt),
        }
        alone = {"pictures": SEEDS[0], "beside": None}
        st.session_state.update(run=names[planned.run], checkpoint=planned.checkpoint, **alone, **settings)


main()
