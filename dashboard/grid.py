"""What a grid of pictures shows, as chosen by widgets and the URL: its axes, their values, and what is the same in all cells."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from common import is_finite, read, settings_of

from t2i.errors import UserError
from t2i.pictures import axes, cells
from t2i.pictures.png import SCHEDULERS, fitting_schedulers
from t2i.runs import checkpoint_folders

AXES = {  # of `cells.AXES`, as they are called on the page
    "guidance_scale": "guidance scale",
    "checkpoint": "checkpoint",
    "sample": "evaluated prompt",
    "prompt": "prompt",
    "seed": "seed",
    "num_inference_steps": "steps",
    "guidance_end": "guidance end",
    "scheduler": "scheduler",
    "run": "run",
}
GUIDANCE = "1.5,3,7.5"  # of a run that was not evaluated
AXIS_PX = 170  # of a widget that chooses an axis
CHECKPOINTS = 4  # the newest, of such a run
PLACE = re.compile(r"row (?P<row>\d{1,5}), column (?P<column>\d{1,5})")
HELP = "One value or several: 1.5,3 or a range 1-10, by steps 1-10(+3), or five values evenly spaced 1-10[5]."


@dataclass(frozen=True)
class Grid:
    """A grid: `axes` of columns, rows and (if there are three) tabs, the labels of their values, and what no axis says."""

    run: Path
    checkpoint: str
    cell: cells.Cell
    axes: tuple[cells.Axis, ...]
    labels: tuple[tuple[str, ...], ...]

    def places(self, tab: int | None = None, rows: slice = slice(None)) -> list[cells.Place]:
        """The places of all tabs or of one, and of `rows` of it; `at` counts from the first of these."""
        chosen = [self.axes[0], cells.Axis(self.axes[1].name, self.axes[1].values[rows])]
        for axis in self.axes[2:]:
            chosen.append(axis if tab is None else cells.Axis(axis.name, axis.values[tab : tab + 1]))
        return cells.plan(self.run, self.checkpoint, self.cell, chosen)


def choose_grid(runs: dict[str, Path]) -> Grid:
    """Widgets for a grid over the chosen runs (one or more; the first unless `run` is an axis). Raises `UserError`."""
    first = next(iter(runs.values()))
    found = cells.evaluated(first)
    samples = list(found[1][2].values) if found else []
    chosen = choose_axes(bool(samples), len(runs) > 1)
    with st.expander("Values: checkpoints, prompts, guidance scales, seeds …"):
        typed = choose_values(runs, found, samples, chosen)
    check_axes(chosen)  # and the values, now that all widgets stand: one that is not drawn would lose what was typed
    values = read_values(typed)
    values["run"] = list(runs.values()) if "run" in chosen else [first]
    taken = tuple(cells.Axis(name, tuple(values[name])) for name in chosen)
    titles = {"run": list(runs), "sample": typed.get("sample", [])}
    labels = tuple(tuple(titles.get(axis.name) or map(label, axis.values)) for axis in taken)
    if "sample" in values:  # it says prompt and seed
        values["prompt"], values["seed"] = zip(*values.pop("sample"), strict=True)
    on_axis = {*chosen, *(("prompt", "seed") if "sample" in chosen else ())}
    fixed = {name: found[0] if name in on_axis else only(name, found) for name, found in values.items()}
    run, checkpoint = fixed.pop("run"), fixed.pop("checkpoint")
    return Grid(run, checkpoint, cells.Cell(**fixed), taken, labels)


def choose_axes(evaluated: bool, several: bool) -> list[str]:
    """Widgets for what stands on columns, rows and (third, if any) tabs. Several runs stand beside each other."""
    known = [name for name in AXES if evaluated or name != "sample"]
    row = st.container(horizontal=True, vertical_alignment="bottom")  # two in a row on a phone
    columns = row.selectbox(
        "Columns", known, index=known.index("run") if several else 0, format_func=AXES.__getitem__, key="columns",
        bind="query-params", on_change=reset_fixed, width=AXIS_PX,
    )  # fmt: skip
    rows = row.selectbox(
        "Rows", known, index=1, format_func=AXES.__getitem__, key="rows", bind="query-params", on_change=reset_fixed,
        width=AXIS_PX,
    )  # fmt: skip
    third = row.selectbox(
        "Tabs", ["none", *known], index=1 + known.index("sample") if evaluated else 0,
        format_func=lambda name: AXES.get(name, name), key="tabs", bind="query-params", on_change=reset_fixed,
        width=AXIS_PX,
    )  # fmt: skip
    row.button("Swap", on_click=swap_axes, help="exchange columns and rows")
    chosen = [str(columns), str(rows), *([str(third)] if third != "none" else [])]
    st.session_state["_axes"] = chosen
    return chosen


def swap_axes() -> None:
    """Called before the page is drawn anew, as a widget's value can be set then alone."""
    state = st.session_state
    state["columns"], state["rows"] = state["rows"], state["columns"]
    for side in ("left", "right"):  # the same two pictures stay chosen
        found = PLACE.fullmatch(str(state.get(side)))
        if found:
            state[side] = name_of(int(found["column"]) - 1, int(found["row"]) - 1)


def name_of(row: int, column: int) -> str:
    """A place's name in the URL; one cell is one name, whatever the labels are."""
    return f"row {row + 1}, column {column + 1}"


def check_axes(chosen: Sequence[str]) -> None:
    for name in chosen:
        if chosen.count(name) > 1:
            raise UserError(f"{AXES[name]} stands on two axes; choose another for one of them")
    if "sample" in chosen and {"prompt", "seed"} & set(chosen):
        raise UserError("an evaluated prompt has its own seed; take prompt and seed off the other axes, or it")


def choose_values(
    runs: dict[str, Path], found: Any, samples: Sequence[tuple[str, int]], chosen: Sequence[str]
) -> dict[str, Any]:
    """Widgets for the values of each setting, as they are typed: several where it stands on an axis."""
    known = list(dict.fromkeys(name for run in runs.values() for name in checkpoints_of(run)))
    first = next(iter(runs.values()))
    cell = found[0] if found else cells.Cell(first_prompt(first))
    typed: dict[str, Any] = {
        "checkpoint": pick("Checkpoint", "checkpoint", known, usual_checkpoints(known, found, chosen))
    }
    if "sample" in chosen:
        names = [f"{number}. {prompt}" for number, (prompt, _) in enumerate(samples, start=1)]
        typed["sample"] = pick("Evaluated prompts", "sample", names, names)
        typed["samples"] = dict(zip(names, samples, strict=True))
    else:
        prompts = [cell.prompt, *(prompt for prompt, _ in samples[1:3] if "prompt" in chosen)]
        typed["prompt"] = st.text_area(
            "Prompt, one a line",
            anew("prompt", "\n".join(prompts)),
            key="prompt",
            bind="query-params",
            height=80,
            max_chars=20_000,
        )
    scales = axes.format_values("guidance_scale", found[1][1].values) if found else GUIDANCE
    seed, steps = cell.seed, cell.num_inference_steps
    usual = {  # several on an axis, a single one elsewhere
        "guidance_scale": scales if "guidance_scale" in chosen else f"{best_scale(first, found):g}",
        "num_inference_steps": f"{max(1, steps // 2)},{steps}" if "num_inference_steps" in chosen else str(steps),
        "guidance_end": "0.5,1" if "guidance_end" in chosen else f"{cell.guidance_end:g}",
        "seed": f"{seed}-{seed + 3}" if "seed" in chosen else str(seed),
    }
    if "sample" in chosen:
        usual.pop("seed")
    for place, (name, text) in zip(st.columns(len(usual)), usual.items(), strict=True):
        title = AXES[name].capitalize()
        typed[name] = place.text_input(
            title, anew(name, text), key=name, bind="query-params", help=HELP, max_chars=2000
        )
    short = {name: key for key, name in SCHEDULERS.items()}
    fitting = [fitting_schedulers(cells.schedule_of(run)) for run in runs.values()]
    offered = [name for name in SCHEDULERS if any(name in names for names in fitting)]
    own = short.get(cell.scheduler, "ddim")
    several = [own, *(name for name in ("dpm++", "unipc") if name != own and "scheduler" in chosen)]
    typed["scheduler"] = pick("Scheduler", "scheduler", offered, [name for name in several if name in offered])
    st.session_state.pop("_anew", None)
    typed["negative_prompt"] = st.text_input(
        "Negative prompt", key="negative_prompt", bind="query-params", max_chars=2000
    )
    return typed


def anew(name: str, usual: Any) -> Any:
    """The value that a widget has until another is chosen; set to it where axes or runs were chosen since.

    Set, not forgotten: the browser would keep what it shows.
    """
    if name in st.session_state.get("_anew", ()):
        st.session_state[name] = usual
    return usual


def usual_checkpoints(known: Sequence[str], found: Any, chosen: Sequence[str]) -> list[str]:
    """The evaluated checkpoints, or the newest; a single one where no axis takes them."""
    if "run" in chosen and "checkpoint" not in chosen:
        return list(known[-1:])  # of all runs the finished pipeline, rather than a step that only one has
    swept = [name for name in found[1][0].values if name in known] if found else []
    usual = swept or [name for name in known if name != "pipeline"][-CHECKPOINTS:] or list(known)
    return usual if "checkpoint" in chosen else usual[-1:]


def pick(title: str, name: str, known: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Names chosen from a list, in the list's order."""
    chosen = st.multiselect(title, known, default=anew(name, list(usual)), key=name, bind="query-params")
    return [value for value in known if value in chosen]


def read_values(typed: dict[str, Any]) -> dict[str, list[Any]]:
    """The values that were typed or chosen, checked."""
    samples = typed.pop("samples", {})
    values: dict[str, list[Any]] = {"negative_prompt": [typed["negative_prompt"]]}
    for name, value in typed.items():
        if name in axes.NUMBERS or name == "prompt":
            values[name] = axes.parse(name, value)
        elif name != "negative_prompt":
            if not value:
                raise UserError(f"{AXES[name]}: none is chosen; choose one or more")
            values[name] = [samples[one] for one in value] if name == "sample" else value
    return values


def only(name: str, values: Sequence[Any]) -> Any:
    if len(values) > 1:
        raise UserError(
            f"{AXES[name]} has {len(values)} values and stands on no axis; put it on one, or give a single value"
        )
    return values[0]


def label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def checkpoints_of(run: Path) -> list[str]:
    """Names of what a run can draw with, oldest first, the finished pipeline last."""
    names = [folder.name for folder in checkpoint_folders(run)]
    return names + (["pipeline"] if (run / "pipeline" / "unet").is_dir() else [])


def best_scale(run: Path, found: Any) -> float:
    """The guidance scale that the evaluation chose; 3 where there is none."""
    report = read(run / "evaluation" / "evaluation.json").get("report")
    scale = report.get("guidance_scale") if isinstance(report, dict) else None
    if is_finite(scale):
        return float(scale)  # type: ignore[arg-type]
    return float(found[1][1].values[0]) if found else 3.0


def first_prompt(run: Path) -> str:
    """A prompt that the run's samples were drawn from, for a grid that nobody has chosen one for."""
    section = settings_of(run).get("train_unet")
    prompts = section.get("validation_prompts") if isinstance(section, dict) else None
    return str(prompts[0]) if isinstance(prompts, list) and prompts else "a flower"


def reset_fixed() -> None:
    """A setting that left its axis goes back to a single value, and one that came to an axis to several."""
    state = st.session_state
    for name in ("tab", "page"):
        state.pop(name, None)
    make_room()
    changed = {state.get("columns"), state.get("rows"), state.get("tabs")} ^ set(state.get("_axes", ()))
    state["_anew"] = changed | ({"prompt", "seed"} if "sample" in changed else set())


def make_room() -> None:
    """Where the axis just chosen stood elsewhere, the two change places; evaluated prompts leave the tabs to prompt or seed."""
    state = st.session_state
    places = ("columns", "rows", "tabs")
    now = [state.get(place) for place in places]
    before = [*state.get("_axes", now), "none"][:3]
    for old, new, place in zip(before, now, places, strict=True):
        for other in places:
            if old != new and other != place and state.get(other) == new and (old != "none" or other == "tabs"):
                state[other] = old
    if state.get("tabs") == before[2] == "sample" and {"prompt", "seed"} & {state.get("columns"), state.get("rows")}:
        state["tabs"] = "none"


def reset_values() -> None:
    """Another run has other checkpoints and another evaluation: its values are shown. Several runs stand beside each other."""
    state = st.session_state
    for name in ("tab", "page", "left", "right"):
        state.pop(name, None)
    state["_anew"] = set(AXES)
    several = len(state.get("run", ())) > 1
    if several and "run" not in (state.get("columns"), state.get("rows"), state.get("tabs")):
        state["columns"] = "run"
    elif not several:
        for name, usual in (("columns", "guidance_scale"), ("rows", "checkpoint"), ("tabs", "none")):
            if state.get(name) == "run":
                state[name] = usual
