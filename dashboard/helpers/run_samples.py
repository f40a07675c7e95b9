"""Show the samples of training over its steps: the same prompt from the same seed, with a slider over the steps."""

import re
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

from helpers.live_trainings import status_of
from helpers.run_files import read_settings

EVERY_S = 5  # seconds between two looks for new samples of a running training
ABREAST = 3  # runs in a row
ALL = "all prompts"
COLUMNS, GAP = 8, 2  # of a file of samples: pictures in a row, and pixels between pictures
WIDTH = 256  # pixels of one picture on the page
STEP = re.compile(r"step-([0-9]{6,15})\.png")


def show_samples(runs: dict[str, Path]) -> None:
    """Show each run's samples at the step of a slider, and follow running trainings while the slider is at its end."""
    if not any(sample_files(run) for run in runs.values()):
        return
    is_live = any(status_of(run) == "running" for run in runs.values())

    @st.fragment(run_every=EVERY_S if is_live else None)
    def watch() -> None:
        files = {name: found for name, run in runs.items() if (found := sample_files(run))}
        if not files:  # the folder was removed meanwhile
            return
        prompts = {name: prompts_of(runs[name]) for name in files}
        st.header("Samples of training")
        left, right = st.columns([2, 3], gap="medium", vertical_alignment="bottom")
        options = [ALL, *dict.fromkeys(prompt for of_run in prompts.values() for prompt in of_run)]
        prompt = left.selectbox("Prompt of the samples", options, key="_sample_prompt")
        step = choose_step(right, sorted({step for found in files.values() for step in found}))
        names = list(files)
        for start in range(0, len(names), ABREAST):
            row = names[start : start + ABREAST]
            for column, name in zip(st.columns(len(row)), row, strict=True):
                with column:
                    show_sample(name, files[name], step, prompts[name], str(prompt))

    watch()


def choose_step(place: Any, steps: list[int]) -> int:
    """Show the slider over the steps of the samples, and return the chosen step.

    The slider stays at its end when a training draws newer samples, unless the user has moved it.
    """
    state = st.session_state
    newest, chosen = state.get("_newest_sample"), state.get("_sample_step")
    if chosen not in steps or chosen == newest:
        state["_sample_step"] = steps[-1]
    state["_newest_sample"] = steps[-1]
    if len(steps) < 2:
        place.text(f"step {steps[0]:,}")
        return steps[0]
    return int(place.select_slider("Step of the samples", steps, key="_sample_step"))


def show_sample(name: str, files: dict[int, Path], step: int, prompts: list[str], prompt: str) -> None:
    """Show a run's samples at its last step that is not after `step`, otherwise at its first one."""
    shown = max((known for known in files if known <= step), default=min(files))
    try:
        with Image.open(files[shown]) as image:
            picture = crop(image.convert("RGB"), prompts, prompt)
    except Exception:  # whatever Pillow says of a file that is damaged or gone
        st.text(f"{name}, step {shown:,}: {files[shown].name} cannot be read")
        return
    if picture is None:
        st.text(f"{name}, step {shown:,}: this prompt was not drawn")
        return
    single = picture.width == picture.height
    alt = f"{name} at step {shown}: {prompt if single else '; '.join(prompts)[:300]}"
    st.image(picture, width=WIDTH if single else "content", alt=alt, output_format="PNG")
    seed = f", seed {prompts.index(prompt)}" if single and prompt in prompts else ""
    st.text(f"{name}, step {shown:,}{seed}")


def crop(grid: Image.Image, prompts: list[str], prompt: str) -> Image.Image | None:
    """Return the picture of one prompt from a file of samples, or the entire file for `ALL`.

    A run that was resumed with other prompts has files whose size does not fit. They are shown as they are.
    """
    columns = min(COLUMNS, len(prompts))
    if prompt == ALL or not columns:
        return grid
    if prompt not in prompts:
        return None
    rows = -(-len(prompts) // columns)
    side = (grid.width + GAP) // columns - GAP
    if (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP) != grid.size:
        return grid
    number = prompts.index(prompt)
    x, y = (number % columns) * (side + GAP), (number // columns) * (side + GAP)
    return grid.crop((x, y, x + side, y + side))


def sample_files(run: Path) -> dict[int, Path]:
    """Return the files of a run's samples by their steps. Links to files elsewhere are left out."""
    folder = run / "samples"
    try:
        found = {int(name[1]): path for path in folder.iterdir() if (name := STEP.fullmatch(path.name))}
        return {step: path for step, path in found.items() if path.resolve().parent == folder.resolve()}
    except OSError:
        return {}


def prompts_of(run: Path) -> list[str]:
    """Return the prompts of a run's samples, each drawn from the seed that is its number."""
    section = read_settings(run).get("train_unet")
    prompts = section.get("validation_prompts") if isinstance(section, dict) else None
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
