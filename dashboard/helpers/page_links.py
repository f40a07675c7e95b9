"""Links between pictures on Compare and in the Playground: each names all settings in the URL of the other page."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import streamlit as st

from helpers.page_url import url_text
from helpers.run_list import OUTPUTS
from t2i.pictures import axes, cells, wildcards
from t2i.pictures.png import SCHEDULERS, student_steps

VIEWS = Path(__file__).parents[1] / "views"
SHORT_NAMES = {name: key for key, name in SCHEDULERS.items()}  # by the class names of diffusers
# Bounds of the Playground, which strangers may use; generate_images.py and Compare accept more.
MAX_PROMPT, MAX_STEPS, MAX_SCALE, MAX_SEED = 1000, 50, 50.0, 2**53 - 1  # a browser's numbers are exact up to this seed
Query = dict[str, str | list[str]]


def playground_link(planned: cells.PlannedCell, label: str) -> None:
    """Show a link that opens a picture in the Playground, unless the picture's settings are out of that page's bounds."""
    query = playground_query(planned)
    if query and (VIEWS / "playground.py").is_file():
        st.page_link("views/playground.py", label=label, icon=":material/arrow_forward:", query_params=query)


def playground_query(planned: cells.PlannedCell) -> Query:
    """Return the Playground's URL parameters for a picture, or {} if the page does not offer its settings."""
    cell = planned.cell
    prompt = wildcards.literal(cell.prompt)
    within = (
        len(prompt) <= MAX_PROMPT
        and len(cell.negative_prompt) <= MAX_PROMPT
        and cell.num_inference_steps <= MAX_STEPS
        and cell.guidance_scale <= MAX_SCALE
        and cell.seed <= MAX_SEED
        and cell.scheduler in SHORT_NAMES
        and planned.problem is None
    )
    if not within:
        return {}
    model = {"run": planned.run.relative_to(OUTPUTS).as_posix(), "checkpoint": planned.checkpoint, "pictures": "1"}
    settings = asdict(cell) | {"prompt": prompt, "scheduler": SHORT_NAMES[cell.scheduler]}
    return model | {key: url_text(value) for key, value in settings.items() if value != ""}


def grid_link(planned: Sequence[cells.PlannedCell]) -> None:
    """Show a link that opens pictures of the Playground as a grid in Compare."""
    query = grid_query(planned)
    if query and (VIEWS / "compare.py").is_file():
        st.page_link(
            "views/compare.py", label="Make a grid of this", icon=":material/arrow_forward:", query_params=query
        )


def grid_query(planned: Sequence[cells.PlannedCell]) -> Query:
    """Return Compare's URL parameters for a grid that holds these pictures, or {} if no grid can hold them.

    A grid has two axes at least. If the pictures do not differ so much, guidance scales and seeds are added.
    """
    cell = planned[0].cell
    prompts = list(dict.fromkeys(one.cell.prompt for one in planned))
    seeds = list(dict.fromkeys(one.cell.seed for one in planned))
    runs = list(dict.fromkeys(one.run.relative_to(OUTPUTS).as_posix() for one in planned))
    checkpoints = list(dict.fromkeys(one.checkpoint for one in planned))
    if any(not prompt or prompt.splitlines() != [prompt.strip()] for prompt in prompts):  # one prompt per line
        return {}
    if cell.scheduler not in SHORT_NAMES or any(one.problem for one in planned):
        return {}
    several = {"run": len(runs), "checkpoint": len(checkpoints), "prompt": len(prompts), "seed": len(seeds)}
    chosen = [name for name, count in several.items() if count > 1]
    if len(chosen) > 3:  # a grid has three axes
        return {}
    scales = [cell.guidance_scale]
    if len(chosen) < 2:
        chosen.append("guidance_scale")
        if not any(
            student_steps(cells.schedule_of(one.run)) for one in planned
        ):  # students draw without guidance alone
            scales = sorted({max(1.0, scales[0] / 2), scales[0], min(MAX_SCALE, scales[0] * 2)})
    if len(chosen) < 2:
        chosen.append("seed")
        seeds = [seeds[0] + number for number in range(3)]
    titles = {"guidance_scale": "guidance scale"}
    named = [titles.get(name, name) for name in chosen] + ["none"] * (3 - len(chosen))
    return {
        "run": runs,
        "columns": named[0],
        "rows": named[1],
        "tabs": named[2],
        "checkpoint": checkpoints,
        "prompt": "\n".join(prompts),
        "seed": axes.format_values("seed", seeds),
        "guidance_scale": axes.format_values("guidance_scale", scales),
        "num_inference_steps": str(cell.num_inference_steps),
        "guidance_end": axes.format_values("guidance_end", [cell.guidance_end]),
        "guidance_rescale": axes.format_values("guidance_rescale", [cell.guidance_rescale]),
        "scheduler": [SHORT_NAMES[cell.scheduler]],
        **({"negative_prompt": cell.negative_prompt} if cell.negative_prompt else {}),
    }
