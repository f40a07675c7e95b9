"""The widgets that choose a grid of pictures: its axes, their values, and the settings that all its pictures share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import streamlit as st

from helpers.page_url import Choice, asked, name_choices
from helpers.run_files import best_checkpoint, first_prompt
from helpers.run_list import checkpoints_of, step_of
from t2i.errors import UserError
from t2i.pictures import axes, cells
from t2i.pictures.png import SCHEDULERS, fitting_schedulers, student_steps

AXES = {  # of `cells.AXES`, as they are called on the page
    "guidance_scale": "guidance scale",
    "checkpoint": "checkpoint",
    "sample": "evaluated prompt",
    "prompt": "prompt",
    "seed": "seed",
    "num_inference_steps": "steps",
    "guidance_end": "guidance end",
    "guidance_rescale": "guidance rescale",
    "scheduler": "scheduler",
    "run": "run",
}
AXIS_KEYS = ("columns", "rows", "tabs")  # of the widgets that choose axes, in the session and in the URL
BEST, LAST = "best", "last"  # checkpoints that every run has
GUIDANCE = "1.5,3,7.5"  # guidance scales of a run that was not evaluated
FOUR_SCALES, SEEDS = "1.5,3,5,7.5", 4  # guidance scales and number of seeds that one button varies
CHECKPOINTS = 4  # checkpoints of such a run, the newest
AXIS_PX = 170  # width of a widget that chooses an axis
HELP = "Type one or more values: a list 1.5,3, a range 1-10, a range in steps 1-10(+3), or five evenly spaced values 1-10[5]."


@dataclass(frozen=True)
class Grid:
    """A chosen grid: the `axes` of columns, rows and (third, if any) tabs, with the labels of their values.

    The fields run, checkpoint and cell hold the settings that all pictures share because no axis varies them.
    """

    run: Path
    checkpoint: str
    cell: cells.Cell
    axes: tuple[cells.Axis, ...]
    labels: tuple[tuple[str, ...], ...]

    def plan(self, tab: int | None = None, rows: slice = slice(None)) -> list[cells.PlannedCell]:
        """Plan the cells of all tabs of the grid, or only of `rows` in one tab.

        Positions of cells (`at`) count from the first planned tab and row.
        """
        chosen = [self.axes[0], cells.Axis(self.axes[1].name, self.axes[1].values[rows])]
        for axis in self.axes[2:]:
            chosen.append(axis if tab is None else cells.Axis(axis.name, axis.values[tab : tab + 1]))
        return cells.plan(self.run, self.checkpoint, self.cell, chosen, stands_for=self.models())

    def models(self, tabs: slice = slice(None)) -> dict[tuple[Path, str], str]:
        """Return which checkpoint of a run is drawn, by the run and the value of the axis of checkpoints, for some tabs."""
        values = {axis.name: axis.values for axis in self.axes[:2]}
        values |= {axis.name: axis.values[tabs] for axis in self.axes[2:]}
        models = product(values.get("run", (self.run,)), values.get("checkpoint", (self.checkpoint,)))
        return {(run, name): checkpoint_in(run, name) for run, name in models}

    def first_tab_models(self) -> set[tuple[Path, str]]:
        """Return the run and checkpoint of each model in the first tab of the grid."""
        return {(run, shown) for (run, _), shown in self.models(slice(1)).items()}


@dataclass(frozen=True)
class Offer:
    """What a page offers for a grid over the chosen `runs`, before the widgets stand.

    Attributes:
        axes: names of the axes that a user can choose.
        chosen: the present axes of columns, rows and (third, if any) tabs.
        evaluated: the grid that the evaluation of the first run left.
        first_values: first values of the widgets.
    """

    runs: dict[str, Path]
    axes: list[str]
    chosen: list[str]
    evaluated: cells.EvaluatedGrid | None
    first_values: dict[str, Any]


def name_grid(
    runs: dict[str, Path], evaluated: cells.EvaluatedGrid | None, best_scale: float, first_runs: list[str]
) -> Offer:
    """Give the widgets of a grid their first values, name these in the URL, and return what the grid offers.

    Args:
        runs: the chosen runs, at least one.
        evaluated: the grid that the evaluation of the first run left, which gives the first values.
        best_scale: first guidance scale.
        first_runs: first value of the widget that chooses runs.
    """
    has_samples = bool(evaluated and evaluated.samples.values)
    offered = [name for name in AXES if has_samples or name != "sample"]
    first_axes = {
        "columns": "run" if len(runs) > 1 else "guidance_scale",
        "rows": "checkpoint",
        "tabs": "sample" if has_samples else "none",
    }
    now = {key: axis_now(key, first, offered) for key, first in first_axes.items()}
    chosen = [name for name in now.values() if name != "none"]
    values = first_values(runs, evaluated, best_scale, chosen)
    for name in st.session_state.pop("_reset", set()) & set(values) & set(st.session_state):
        st.session_state[name] = values[name]
    named: dict[str, Choice] = {"run": first_runs, **now, **values}
    if samples := named.pop("sample", None):  # by default all evaluated prompts, which would make a long URL
        named["tab"] = next(iter(asked("sample") or samples))
    name_choices(named, {key: AXES.get(name, name) for key, name in now.items()})
    return Offer(runs, offered, chosen, evaluated, values)


def axis_now(key: str, first: str, offered: Sequence[str]) -> str:
    """Return the present axis of a widget: the chosen one, or the one in the URL, or otherwise `first`."""
    names = {title: name for name, title in AXES.items()}
    name = next(iter(asked(key)), first)
    name = names.get(name, name)
    if name in offered or (key == "tabs" and name == "none"):
        return name
    st.session_state[key] = first  # the URL holds no axis
    return first


def choose_grid(offer: Offer) -> Grid:
    """Show the widgets of a grid, and return the grid. Unless `run` is an axis, the grid shows only the first run.

    Raises:
        UserError: the chosen axes or values cannot form a grid.
    """
    choose_axes(offer)
    show_shortcuts(offer)
    with st.expander("Values: checkpoints, prompts, guidance scales, seeds …"):
        typed = choose_values(offer)
    chosen, runs = offer.chosen, offer.runs
    check_axes(chosen)  # only now that all widgets stand: a widget that is not shown loses what was typed
    values = read_values(typed)
    values["run"] = list(runs.values())[: None if "run" in chosen else 1]
    grid_axes = tuple(cells.Axis(name, tuple(values[name])) for name in chosen)
    titles = {"run": list(runs), "sample": typed.get("sample", [])}
    labels = tuple(tuple(titles.get(axis.name) or map(value_label, axis.values)) for axis in grid_axes)
    if "sample" in values:  # a sample is a prompt and its seed
        values["prompt"], values["seed"] = zip(*values.pop("sample"), strict=True)
    on_axis = {*chosen, *(("prompt", "seed") if "sample" in chosen else ())}
    shared = {name: several[0] if name in on_axis else single_value(name, several) for name, several in values.items()}
    run, checkpoint = shared.pop("run"), shared.pop("checkpoint")
    return Grid(run, checkpoint, cells.Cell(**shared), grid_axes, labels)


# --- Axes ------------------------------------------------------------------------------------------------------------


def choose_axes(offer: Offer) -> None:
    """Show the widgets for columns, rows and (third, if any) tabs."""
    row = st.container(horizontal=True, vertical_alignment="bottom")  # two in a row on a phone
    for key in AXIS_KEYS:
        row.selectbox(
            key.capitalize(),
            ["none", *offer.axes] if key == "tabs" else offer.axes,
            index=None,
            required=True,
            format_func=lambda name: AXES.get(name, name),
            key=key,
            bind="query-params",
            on_change=reset_axes,
            width=AXIS_PX,
        )
    row.button("Swap", on_click=swap_axes, help="Exchange columns and rows.")
    st.session_state["_axes"] = offer.chosen


def show_shortcuts(offer: Offer) -> None:
    """Show a field for a prompt of the user's own, and a button that varies seeds and guidance scales at once."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    prompts = [] if {"sample", "prompt"} & set(offer.chosen) else asked("prompt")
    st.session_state["_own_prompt"] = prompts[0] if len(prompts) == 1 and "\n" not in prompts[0] else ""
    row.text_input(
        "Own prompt",
        key="_own_prompt",
        label_visibility="collapsed",
        placeholder="type a prompt of your own, and press Enter",
        max_chars=2000,
        on_change=take_own_prompt,
        args=(offer,),
        width=2 * AXIS_PX,
    )
    count = offered_scales(offer.runs, FOUR_SCALES).count(",") + 1
    row.button(
        f"{SEEDS} seeds × {count} scales" if count > 1 else f"{SEEDS} seeds",
        on_click=vary_seeds_and_scales,
        args=(offer,),
        help="Show the prompt by the best checkpoint, with a row per seed and a column per guidance scale.",
    )


def take_own_prompt(offer: Offer) -> None:
    """Show the typed prompt in the grid, by the best checkpoint. The evaluated prompts leave the axes."""
    state = st.session_state
    prompt = state["_own_prompt"].strip()
    if prompt:
        remove_samples()
        show_by_best(offer, prompt)
        state["_reset"] = {"seed"}


def remove_samples() -> None:
    """Take the evaluated prompts from the axes. Rows or columns get the prompt as their axis."""
    state = st.session_state
    for key in AXIS_KEYS:
        if state.get(key) == "sample":
            state[key] = "none" if key == "tabs" else "prompt"


def show_sample(run: Path, prompt: str, seed: int) -> None:
    """Show a prompt with a seed in the grid, at the settings of the run's evaluation, the best one among them."""
    state = st.session_state
    remove_samples()
    state.update(prompt=prompt, seed=str(seed), negative_prompt="")
    state["_reset"] = set(AXES) - {"run", "prompt", "seed"}
    if "checkpoint" not in [state.get(key) for key in AXIS_KEYS]:
        state["checkpoint"] = [best_checkpoint(run)]
        state["_reset"] -= {"checkpoint"}
    for name in ("tab", "page"):
        state.pop(name, None)


def vary_seeds_and_scales(offer: Offer) -> None:
    """Show the prompt of the shown tab with several seeds and guidance scales. Several runs stand on the tabs."""
    state = st.session_state
    prompt = "".join(asked("prompt")).split("\n")[0]
    if "sample" in offer.chosen:
        samples = sample_titles(offer.evaluated)
        prompt, _ = samples.get(state.get("tab", ""), next(iter(samples.values())))
    state.update(columns="guidance_scale", rows="seed", tabs="run" if len(offer.runs) > 1 else "none")
    show_by_best(offer, prompt)
    state["guidance_scale"] = offered_scales(offer.runs, FOUR_SCALES)
    state["_reset"] = {"seed"}


def show_by_best(offer: Offer, prompt: str) -> None:
    """Let the best checkpoint of each run draw a prompt."""
    state = st.session_state
    several = len(offer.runs) > 1
    state.update(prompt=prompt, checkpoint=[BEST if several else best_checkpoint(next(iter(offer.runs.values())))])
    for name in ("tab", "page"):
        state.pop(name, None)


def swap_axes() -> None:
    """Exchange columns and rows.

    Streamlit calls this callback before the page runs, while the values of widgets can still be set.
    """
    state = st.session_state
    state["columns"], state["rows"] = state["rows"], state["columns"]


def check_axes(chosen: Sequence[str]) -> None:
    for name in chosen:
        if chosen.count(name) > 1:
            raise UserError(f"{AXES[name]} stands on two axes; choose another for one of them")
    if "sample" in chosen and {"prompt", "seed"} & set(chosen):
        raise UserError(
            "an evaluated prompt has its own seed; remove prompt and seed from the other axes, or remove evaluated prompt"
        )


def reset_axes() -> None:
    """Give each setting that is no longer an axis a single value, and each setting that became an axis several values."""
    state = st.session_state
    for name in ("tab", "page"):
        state.pop(name, None)
    make_room_for_axis()
    changed = {state.get(key) for key in AXIS_KEYS} ^ set(state.get("_axes", ()))
    state["_reset"] = changed | ({"prompt", "seed"} if "sample" in changed else set())


def make_room_for_axis() -> None:
    """Exchange a newly chosen axis with the axis that it replaces.

    If another axis becomes prompt or seed, evaluated prompts leave the tabs.
    """
    state = st.session_state
    now = [state.get(key) for key in AXIS_KEYS]
    before = [*state.get("_axes", now), "none"][:3]
    for old, new, key in zip(before, now, AXIS_KEYS, strict=True):
        for other in AXIS_KEYS:
            if old != new and other != key and state.get(other) == new and (old != "none" or other == "tabs"):
                state[other] = old
    if state.get("tabs") == before[2] == "sample" and {"prompt", "seed"} & {state.get("columns"), state.get("rows")}:
        state["tabs"] = "none"


def reset_values() -> None:
    """Reset the widgets to the values of a newly chosen run, which has other checkpoints and another evaluation.

    Several chosen runs are shown side by side.
    """
    state = st.session_state
    for name in ("tab", "page", "left", "right"):
        state.pop(name, None)
    state["_reset"] = set(AXES)
    several = len(state.get("run", ())) > 1
    if several and "run" not in [state.get(key) for key in AXIS_KEYS]:
        state["columns"] = "run"
    elif not several:
        for key, default in (("columns", "guidance_scale"), ("rows", "checkpoint"), ("tabs", "none")):
            if state.get(key) == "run":
                state[key] = default


# --- Values ----------------------------------------------------------------------------------------------------------


def first_values(
    runs: dict[str, Path], evaluated: cells.EvaluatedGrid | None, best_scale: float, chosen: Sequence[str]
) -> dict[str, Any]:
    """Return the first value of each setting's widget: several values if the setting is an axis, otherwise one value."""
    run = next(iter(runs.values()))
    cell = evaluated.cell if evaluated else cells.first_cell(run, first_prompt(run))
    samples = list(evaluated.samples.values) if evaluated else []
    values: dict[str, Any] = {"checkpoint": default_checkpoints(checkpoint_names(runs), evaluated, chosen)}
    if "sample" in chosen:
        values["sample"] = list(sample_titles(evaluated))
    else:
        values["prompt"] = "\n".join([cell.prompt, *(prompt for prompt, _ in samples[1:3] if "prompt" in chosen)])
    scales = axes.format_values("guidance_scale", evaluated.guidance_scales.values) if evaluated else GUIDANCE
    scales = offered_scales(runs, scales)
    values |= default_texts(cell, scales if "guidance_scale" in chosen else f"{best_scale:g}", chosen)
    short_names = {name: key for key, name in SCHEDULERS.items()}
    first = short_names.get(cell.scheduler, "ddim")
    several = [name for name in ("dpm++", "unipc") if name != first and "scheduler" in chosen]
    values["scheduler"] = [name for name in (first, *several) if name in fitting_all(runs)]
    return values


def checkpoint_names(runs: dict[str, Path]) -> list[str]:
    """Return the names of the checkpoints to choose from.

    Several runs have different checkpoints, so the names begin with those that every run has.
    """
    names = dict.fromkeys(name for run in runs.values() for name in checkpoints_of(run))
    return [*((BEST, LAST) if len(runs) > 1 else ()), *names]


def checkpoint_in(run: Path, wanted: str) -> str:
    """Return the checkpoint of a run that is shown beside those of other runs, which have other steps.

    Args:
        wanted: `BEST`, `LAST`, or the name of a checkpoint. If the run has no checkpoint of that name, the one at the nearest
            step is returned, and the later one of two that are equally near.
    """
    names = checkpoints_of(run)
    if wanted == BEST:
        return best_checkpoint(run) or wanted
    if wanted in names or not names:
        return wanted
    step = step_of(wanted)
    apart = {name: abs(step_of(name) - step) for name in names[::-1]}
    near = {name: distance for name, distance in apart.items() if math.isfinite(distance)}
    return min(near, key=lambda name: near[name]) if near else names[-1]


def sample_titles(evaluated: cells.EvaluatedGrid | None) -> dict[str, tuple[str, int]]:
    """Return each evaluated prompt and its seed, by the title that the page shows for the two."""
    samples = evaluated.samples.values if evaluated else ()
    return {f"{number}. {prompt}": (prompt, seed) for number, (prompt, seed) in enumerate(samples, start=1)}


def fitting_all(runs: dict[str, Path]) -> list[str]:
    """Return the schedulers that fit a model of the runs."""
    fitting = [fitting_schedulers(cells.schedule_of(run)) for run in runs.values()]
    return [name for name in SCHEDULERS if any(name in names for names in fitting)]


def choose_values(offer: Offer) -> dict[str, Any]:
    """Show a widget for each setting, and return the typed texts. The typed text of an axis holds several values."""
    several = "A run without a checkpoint at a step shows its nearest one." if len(offer.runs) > 1 else None
    typed: dict[str, Any] = {"checkpoint": pick("Checkpoint", "checkpoint", checkpoint_names(offer.runs), help=several)}
    if "sample" in offer.chosen:
        typed["samples"] = sample_titles(offer.evaluated)
        typed["sample"] = pick("Evaluated prompts", "sample", list(typed["samples"]), list(typed["samples"]))
    else:
        typed["prompt"] = st.text_area(
            "Prompt, one per line", key="prompt", bind="query-params", height=80, max_chars=20_000
        )
    numbers = [name for name in axes.NUMBERS if name in offer.first_values]
    for column, name in zip(st.columns(len(numbers)), numbers, strict=True):
        typed[name] = column.text_input(
            AXES[name].capitalize(), key=name, bind="query-params", help=HELP, max_chars=2000
        )
    typed["scheduler"] = pick("Scheduler", "scheduler", fitting_all(offer.runs))
    typed["negative_prompt"] = st.text_input(
        "Negative prompt", key="negative_prompt", bind="query-params", max_chars=2000
    )
    return typed


def offered_scales(runs: dict[str, Path], scales: str) -> str:
    """Return the guidance scales to offer for pictures by the settings of the first run: `scales`, or 1 for a student."""
    return "1" if student_steps(cells.schedule_of(next(iter(runs.values())))) else scales


def default_texts(cell: cells.Cell, scales: str, chosen: Sequence[str]) -> dict[str, str]:
    """Return the default text of each typed setting: several values if the setting is an axis, otherwise one value."""
    seed, steps = cell.seed, cell.num_inference_steps
    texts = {
        "guidance_scale": scales,
        "num_inference_steps": f"{max(1, steps // 2)},{steps}" if "num_inference_steps" in chosen else str(steps),
        "guidance_end": "0.5,1" if "guidance_end" in chosen else f"{cell.guidance_end:g}",
        "guidance_rescale": "0,0.7" if "guidance_rescale" in chosen else f"{cell.guidance_rescale:g}",
        "seed": f"{seed}-{seed + SEEDS - 1}" if "seed" in chosen else str(seed),
    }
    if "sample" in chosen:
        texts.pop("seed")
    return texts


def default_checkpoints(
    names: Sequence[str], evaluated: cells.EvaluatedGrid | None, chosen: Sequence[str]
) -> list[str]:
    """Return the evaluated checkpoints, or the newest ones if none was evaluated.

    If no axis takes several checkpoints, return only the last one. Runs side by side are shown by what all of them have.
    """
    if BEST in names and "run" in chosen:
        return [BEST, LAST] if "checkpoint" in chosen else [BEST]
    swept = [name for name in evaluated.checkpoints.values if name in names] if evaluated else []
    defaults = swept or [name for name in names if name != "pipeline"][-CHECKPOINTS:] or list(names)
    return defaults if "checkpoint" in chosen else defaults[-1:]


def pick(
    title: str, name: str, offered: Sequence[str], default: Sequence[str] | None = None, help: str | None = None
) -> list[str]:
    """Show a widget for a list of names, and return the chosen names in the order of the list."""
    chosen = st.multiselect(title, offered, default=default, key=name, bind="query-params", help=help)
    return [value for value in offered if value in chosen]


def read_values(typed: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the typed or chosen values of each setting. Raises `UserError` for an invalid value."""
    samples = typed.pop("samples", {})
    values: dict[str, list[Any]] = {"negative_prompt": [typed["negative_prompt"]]}
    for name, value in typed.items():
        if name in axes.NUMBERS or name == "prompt":
            values[name] = axes.parse(name, value)
        elif name != "negative_prompt":
            if not value:
                raise UserError(f"{AXES[name]}: no value is chosen; choose one or more values")
            values[name] = [samples[title] for title in value] if name == "sample" else value
    return values


def single_value(name: str, values: Sequence[Any]) -> Any:
    if len(values) > 1:
        raise UserError(
            f"{AXES[name]} has {len(values)} values and stands on no axis; put it on an axis, or give a single value"
        )
    return values[0]


def value_label(value: Any) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
