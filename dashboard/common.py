"""What the pages share: which runs there are, their files read with care, and lines drawn. Imports no torch."""

import gc
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
import yaml

from t2i.errors import UserError
from t2i.files import read_json
from t2i.hub.model_card import escape_markdown
from t2i.pictures.png import cut_prompt
from t2i.redaction import redact_config
from t2i.runs import checkpoint_step
from t2i.tracking.curves import POINTS, Curve, smooth, thin

alt.utils.schemapi.disable_debug_mode()  # charts are made by code alone: checking each against Vega-Lite's schema costs 0.1 s
OUTPUTS = Path("outputs")
DEPTH = 6  # levels of folders below outputs/ in which runs are looked for
MOST_FOLDERS = 5000  # that are looked into, and names of one folder: each click looks again
INSIDE = {"pipeline", "evaluation", "samples", "cells", "reconstructions"}  # folders of runs, which hold none
CHART_POINTS = 60_000  # of a chart, over all its lines: what a browser draws without stuttering
HEIGHT = 360  # of a chart with axes and legend, in pixels
MARGIN = 8  # pixels between the outermost points and the frame, in which marks on them stand whole
LEGEND_LINES = 20  # with more, a legend would be taller than its chart; names are then shown at the pointer


@cache
def settle(what: str) -> None:
    """Once for `what`, libraries that were just loaded: they stay, so the garbage collector need never look at them again.

    Streamlit collects after each run of a script, and nobody is answered meanwhile: 0.1 s over the libraries of a page,
    several times that with torch and diffusers.
    """
    gc.collect()
    gc.freeze()


def headed(title: str) -> Any:
    """The page's title; gives the place beside it, for what is chosen first: in one row, the rest comes sooner."""
    left, right = st.columns([1, 5], vertical_alignment="bottom")
    left.title(title)
    return right


def find_runs(kind: str = "unet") -> dict[str, Path]:
    """Run folders below outputs/, the newest first: name -> folder. Nothing else can be opened, whatever a URL says.

    Linked folders are found as well, each folder once and by its own name first.

    kind: "unet" (denoisers with something to show) or "any" (whatever has metrics: also VAEs, and runs just begun). A
    folder with a pipeline alone counts, so that a model of the Hub can be put there: outputs/NAME/pipeline.
    """
    found = {folder: changed for folder in _folders() if (changed := _changed(folder)) is not None}
    newest = sorted(found, key=lambda folder: found[folder], reverse=True)
    return {folder.relative_to(OUTPUTS).as_posix(): folder for folder in newest if _is_kind(folder, kind)}


def _folders() -> Iterator[Path]:
    """The folders below outputs/ that may be runs, each once, those behind links last; bounded in depth and number."""
    waiting, links = deque([(OUTPUTS, 0)]), deque[tuple[Path, int]]()
    seen: set[tuple[int, int]] = set()
    while (waiting or links) and len(seen) < MOST_FOLDERS:
        folder, depth = waiting.popleft() if waiting else links.popleft()
        try:
            state = os.stat(folder)  # a link may lead back to a folder above it
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            if depth:
                yield folder
            if depth < DEPTH:
                with os.scandir(folder) as entries:
                    for entry in islice(entries, MOST_FOLDERS):
                        own = entry.name in INSIDE or entry.name.startswith((".", "checkpoint-", "node-"))
                        if not own and entry.is_dir():
                            (links if entry.is_symlink() else waiting).append((folder / entry.name, depth + 1))
        except OSError:  # not to be read, or gone meanwhile
            continue


def _changed(folder: Path) -> float | None:
    """When a run last wrote its state; None for a folder that is no run."""
    for name in ("run.json", "pipeline/model_index.json"):
        with suppress(OSError):
            state = os.stat(folder / name)
            if S_ISREG(state.st_mode):
                return state.st_mtime
    return None


def _is_kind(folder: Path, kind: str) -> bool:
    own = [path for path in folder.glob("checkpoint-*") if checkpoint_step(path) is not None]
    trained = (folder / "pipeline").is_dir() or bool(own)
    if kind == "any":
        return trained or (folder / "metrics.jsonl").is_file()
    return trained and not (folder / "vae").is_dir() and not any((path / "vae").is_dir() for path in own)


def read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where it is missing, and a warning where it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except UserError as error:
        st.warning(escape(error))
        return {}
    except (OSError, RecursionError) as error:  # deleted meanwhile, or nested to do harm
        st.warning(escape(f"{path} cannot be read ({type(error).__name__})"))
        return {}
    return value if isinstance(value, dict) else {}


def settings_of(run: Path) -> dict[str, Any]:
    """A run's config.yaml without secrets; {} where it is missing, and a warning where it is damaged."""
    file = run / "config.yaml"
    try:
        return _parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        st.warning(escape(f"{file} cannot be read ({type(error).__name__}); restore it from config.public.yaml"))
        return {}


@lru_cache(maxsize=512)  # 12 ms a recipe: seconds a click with 200 runs; nobody changes what it gives
def _parse(text: str) -> dict[str, Any]:
    value = yaml.safe_load(text)
    return redact_config(value) if isinstance(value, dict) else {}


def cells_of(run: Path) -> list[dict[str, Any]]:
    """The evaluated cells of a run: dictionaries with a checkpoint and a finite guidance scale."""
    found = read(run / "evaluation" / "evaluation.json").get("cells")
    cells = [cell for cell in found if isinstance(cell, dict)] if isinstance(found, list) else []
    return [cell for cell in cells if is_finite(cell.get("guidance_scale"))]


def is_finite(value: Any) -> bool:
    """Whether a value of a file is a number that tables and charts take."""
    most = 2**63 if isinstance(value, int) else 1e300
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < most


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as one row: `memorisation.share_closer`."""
    row: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{key}.")
        else:
            kept = isinstance(value, float | bool | None) or is_finite(value)  # a table takes no larger integer
            row[f"{prefix}{key}"] = value if kept else str(value)
    return row


def choose_runs(runs: list[str], key: str = "runs") -> list[str]:
    """Widgets for any number of the named runs: a part of the name, and names. None chosen: all that match.

    key: of the names in the URL; another for each kind of name.
    """
    left, right = st.columns([1, 3])
    part = left.text_input("Name contains", key="name", bind="query-params")
    names = right.multiselect("Runs", runs, key=key, bind="query-params", placeholder="all that match")
    chosen = [name for name in names if name in runs]
    if key == "runs":
        st.session_state["_runs"] = chosen  # they go along to other pages
    chosen = chosen or runs
    return [name for name in chosen if part.strip().casefold() in name.casefold()]


def lines(
    rows: list[tuple[str, str, Curve]], weight: float = 0.0, log: bool = False, wall_time: bool = False
) -> alt.Chart | None:
    """A chart of (run, metric, curve): smoothed, then thinned. None where nothing can be drawn.

    log: values of 0 and below have no place there and are left out. wall_time: hours since a curve's first record.
    """
    points = min(POINTS, max(50, CHART_POINTS // max(1, len(rows))))
    drawn = []
    for run, metric, curve in rows:
        curve = smooth(curve, weight)
        known = (curve.values > 0 if log else np.isfinite(curve.values)) & (np.isfinite(curve.times) | (not wall_time))
        curve = thin(Curve(curve.steps[known], curve.times[known], curve.values[known]), points)
        if len(curve):
            drawn.append((run, metric, curve))
    if not drawn:
        return None
    counts = [len(curve) for _, _, curve in drawn]
    frame = pd.DataFrame(
        {
            "x": np.concatenate([(c.times - c.times.min()) / 3600 if wall_time else c.steps for _, _, c in drawn]),
            "value": np.concatenate([curve.values for _, _, curve in drawn]),
            "run": named([run for run, _, _ in drawn], counts),
            "metric": named([metric for _, metric, _ in drawn], counts),
        }
    )
    return line_chart(frame, "hours" if wall_time else "step", log)


def named(names: list[str], counts: list[int]) -> pd.Categorical:
    """Each of `names` so many times. Categories: a name is sent, and compared with others, once and not with each point."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return pd.Categorical.from_codes(np.repeat([numbers[name] for name in names], counts), list(numbers))


def line_chart(frame: pd.DataFrame, x: str, log: bool = False, marks: bool = False) -> alt.Chart:
    """Lines of `frame`'s columns x, value, run and metric. Names stand in cells, which are shown as they are."""
    runs, metrics = frame["run"].nunique(), frame["metric"].nunique()
    color = "run" if runs > 1 else "metric"
    legend = None  # of one line, which the title names already, and of too many
    if 1 < max(runs, metrics) <= LEGEND_LINES:
        columns = alt.ExprRef("width < 500 ? 1 : 2")  # on a phone a name has the line for itself
        legend = alt.Legend(orient="bottom", columns=columns, labelLimit=400)
    ticks = alt.Axis(format=",d", tickMinStep=1, tickCount=8) if x == "step" else alt.Axis(tickCount=8)
    encoding: dict[str, Any] = {
        "x": alt.X("x:Q", title=x, axis=ticks, scale=alt.Scale(zero=False, nice=False, padding=MARGIN)),
        "y": alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=6),
                   scale=alt.Scale(type="log" if log else "linear", zero=False, padding=MARGIN)),
        "color": alt.Color(f"{color}:N", title=None, legend=legend),
        "tooltip": [
            alt.Tooltip("run:N"), alt.Tooltip("metric:N"), alt.Tooltip("x:Q", title=x, format=".6~g"),
            alt.Tooltip("value:Q", format=".5~g"),
        ],
    }  # fmt: skip
    if runs > 1 and metrics > 1:
        encoding["strokeDash"] = alt.StrokeDash("metric:N", title=None, legend=legend and alt.Legend(orient="top"))
    elif runs > 1 or metrics > 1:
        encoding["detail"] = ["run:N", "metric:N"]
    return alt.Chart(frame).mark_line(point=marks, clip=True).encode(**encoding).properties(height=HEIGHT).interactive()


def step_of(checkpoint: str) -> float:
    """The step in a checkpoint's name; NaN for other names."""
    digits = checkpoint.removeprefix("checkpoint-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else math.nan


def nothing_yet(sentence: str, command: str) -> None:
    """An empty state: what is missing, and the command that fills it."""
    st.info(escape(sentence))
    st.code(command, language="sh", wrap_lines=True)


def escape(text: Any) -> str:
    """Words from outside (captions, prompts, names) for a widget that would read Markdown in them."""
    return escape_markdown(text)


def shorten(text: str, most: int) -> str:
    """`text`, or those of its first words that fit into `most` characters, and "…"."""
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0].rstrip(" ,;") + "…"


def say_cut(run: Path, prompts: Sequence[str]) -> None:
    """Warn of prompts that the run's model reads only in part, and say what it does not read."""
    folder = run / "pipeline" / "tokenizer"
    limit = read(folder / "tokenizer_config.json").get("model_max_length")
    long = [prompt for prompt in dict.fromkeys(prompts) if is_finite(limit) and len(prompt.encode()) + 2 > limit]
    for prompt in long:
        try:
            cut = cut_prompt(_tokenizer(folder), prompt)
        except Exception:  # of a damaged file; the model that needs it says so when it is loaded
            return
        if cut:
            st.warning(escape(cut))


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer  # some seconds at its first use, for long prompts alone

    return CLIPTokenizer.from_pretrained(folder)


def warn(error: Exception) -> None:
    """A mistake's sentence; it may hold words from outside."""
    st.warning(escape(error))
