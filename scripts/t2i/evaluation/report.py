"""Write an evaluation as one HTML file that opens without a network and without a server. This module imports no torch.

Pictures are in the file as data addresses, and curves as SVG. Every text from a file is redacted and escaped, and the
policy in the file's head forbids the browser to load anything from elsewhere.
"""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from t2i.evaluation.figures import figure, figure_text, flatten, told
from t2i.evaluation.verdict import TOPICS, is_setting, outcome, verdict_of
from t2i.files import read_optional, write_text
from t2i.hub.markdown import one_line
from t2i.pictures import cells
from t2i.redaction import public_yaml, redact_config, without_paths
from t2i.runs import run_title
from t2i.tracking.curves import Curve, read_folder, thin

NAME = "report.html"
MOST_BYTES = 15_000_000  # larger files are refused by many mail servers
# Longest side in pixels and format of the pictures: the first pair with which the file is small enough.
SIZES = ((512, "PNG"), (256, "JPEG"), (128, "JPEG"), (64, "JPEG"))
WALL_PICTURES, PAIRS = 48, 6
GRID_PROMPTS, GRID_CHECKPOINTS, GRID_SCALES = 3, 12, 8
CURVES, CURVE_POINTS, CURVE_WIDTH, CURVE_HEIGHT = 12, 300, 320, 120
TEXT_CHARACTERS, SETTINGS_CHARACTERS, ROWS = 500, 50_000, 200
STATE_KEYS = ("steps", "machine", "precision", "processes", "distribution", "train_images", "output_unet_hash")
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; } h3 { font-size: 1rem; margin: 0.8rem 0 0.2rem; }
p { margin: 0.2rem 0; } .verdict, .wall, .pairs, .curves { display: grid; gap: 0.8rem; }
.verdict { grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.wall { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.pairs, .curves { grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); }
figure { margin: 0; } figcaption, td, th { font-size: 0.85rem; } figcaption { overflow-wrap: anywhere; }
img { width: 100%; display: block; box-sizing: border-box; border: 3px solid transparent; border-radius: 4px; }
.miss img { border-color: #d9480f; } .best img { border-color: #1971c2; }
.two { display: grid; grid-template-columns: 1fr 1fr; } .wrong { font-weight: 600; } .right { opacity: 0.75; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: 0.2rem 0.6rem 0.2rem 0; text-align: left; max-width: 40rem; overflow-wrap: break-word; }
.grid td { width: 9rem; min-width: 5rem; padding: 2px; vertical-align: top; }
svg { width: 100%; height: auto; } polyline { fill: none; stroke: #1971c2; stroke-width: 1.5; }
text { font-size: 11px; fill: currentColor; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Finished HTML. All other text is escaped before it becomes part of the file."""


@dataclass(frozen=True)
class Pair:
    """A drawn picture and its nearest training image, both uint8 [R, R, 3], with their texts and relative distance."""

    picture: np.ndarray
    image: np.ndarray
    distance: float
    prompt: str
    caption: str


def write_report(run: Path, evaluation: Mapping[str, Any], pairs: Sequence[Pair]) -> Path:
    """Write `evaluation/report.html` of a run atomically, and return its path. The file has at most 15 MB.

    Args:
        run: run folder of train_unet.py.
        evaluation: content of the run's evaluation.json.
        pairs: pictures with their nearest training images, the nearest pair first.
    """
    text = ""
    for side, kind in SIZES:
        text = page(run, evaluation, pairs[:PAIRS], side, kind)
        if len(text.encode("utf-8")) <= MOST_BYTES:
            break
    path = run / "evaluation" / NAME
    write_text(path, text)
    return path


def page(run: Path, evaluation: Mapping[str, Any], pairs: Sequence[Pair], side: int, kind: str) -> str:
    """Return the report as HTML.

    Args:
        side: longest side of the pictures in pixels. Smaller pictures keep their size.
        kind: format of the pictures, "PNG" or "JPEG".
    """
    name = _text(run_title(run))
    sections = [
        tag("h1", f"Evaluation of {name}"),
        *_verdict(evaluation),
        *_wall(run, evaluation, side, kind),
        *_sweep(run, evaluation, side, kind),
        *_pairs(pairs, side, kind),
        *_curves(run),
        *_tables(run, evaluation),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Evaluation of {name}"),
        tag("style", Html(STYLE)),
    )
    return "<!doctype html>\n" + tag("html", head, "\n", tag("body", *sections), lang="en") + "\n"


def tag(element: str, *content: Any, **attributes: Any) -> Html:
    """Return an HTML element. Content and attributes that are not `Html` are escaped.

    A trailing `_` of an attribute's name is removed, and any other `_` becomes `-`.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    inside = "".join(one if isinstance(one, Html) else html.escape(str(one)) for one in content)
    return Html(f"<{element}{words}>" if element in ("meta", "img") else f"<{element}{words}>{inside}</{element}>\n")


# --- Sections --------------------------------------------------------------------------------------------------------


def _verdict(evaluation: Mapping[str, Any]) -> Iterator[Html]:
    verdict = verdict_of(evaluation)
    if verdict is None:
        yield tag("p", "This evaluation lacks the figures of a verdict.")
        return
    parts = [
        tag("div", tag("h3", title), *(tag("p", _text(text)) for text in verdict["sentences"][topic]))
        for topic, title in TOPICS.items()
    ]
    yield tag("div", *parts, class_="verdict")


def _wall(run: Path, evaluation: Mapping[str, Any], side: int, kind: str) -> Iterator[Html]:
    yield tag("h2", "Pictures at the best setting")
    shown = []
    for planned, reading in reported_pictures(run, evaluation, WALL_PICTURES):
        image = _image(planned, side, kind)
        if image:
            right, wrong = outcome(reading)
            words = [tag("div", _text(planned.cell.prompt))]
            words += [tag("div", f"✓ {_text(', '.join(right))}", class_="right")] if right else []
            words += [tag("div", f"✗ {_text('; '.join(wrong))}", class_="wrong")] if wrong else []
            shown.append(tag("figure", image, tag("figcaption", *words), class_="miss" if wrong else "hit"))
    if not shown:
        yield tag("p", "The pictures of this evaluation are not in the run folder.")
        return
    notes = (
        ["An outline marks a picture that gets something of its prompt wrong."] if evaluation.get("readings") else []
    )
    if "seeds" in evaluation:
        notes.append(
            f"The shares above were measured on {len(evaluation['seeds'])} pictures, of which {len(shown)} are shown."
        )
    else:
        notes.append("The setting was chosen on these pictures. The shares above were measured on other pictures.")
    yield tag("p", " ".join(notes))
    yield tag("div", *shown, class_="wall")


def _sweep(run: Path, evaluation: Mapping[str, Any], side: int, kind: str) -> Iterator[Html]:
    """Yield the figures of each checkpoint and guidance scale, and a grid of pictures for some of the prompts."""
    yield tag("h2", "Checkpoints and guidance scales")
    flat = [told(result) for result in evaluation.get("cells") or [] if isinstance(result, Mapping)][:ROWS]
    keys = ["checkpoint", "guidance_scale", "val_loss", "judge.kernel_distance", "judge.standard_error",
            *dict.fromkeys(key for row in flat for key in row if key.startswith("prompt_following.")),
            "clip_score.mean", "memorisation.copies"]  # fmt: skip
    keys = [key for key in keys if any(row.get(key) is not None for row in flat)]
    rows = [[figure_text(key, row.get(key)) for key in keys] for row in flat]
    yield _table([figure(key).name for key in keys], rows)
    evaluated = cells.evaluated_grid(run)
    if evaluated is None:
        return
    report = evaluation["report"]
    some = {*_spread(evaluated.guidance_scales.values, GRID_SCALES), float(report["guidance_scale"])}
    scales = cells.Axis("guidance_scale", tuple(scale for scale in evaluated.guidance_scales.values if scale in some))
    some = {*_spread(evaluated.checkpoints.values, GRID_CHECKPOINTS), report["checkpoint"]}
    checkpoints = cells.Axis("checkpoint", tuple(name for name in evaluated.checkpoints.values if name in some))
    samples = cells.Axis("sample", _spread(evaluated.samples.values, GRID_PROMPTS))
    planned = cells.plan(run, "", evaluated.cell, [scales, checkpoints, samples])
    for tab, (prompt, _) in enumerate(samples.values):
        lines = [
            tag("tr", tag("th", "checkpoint \\ guidance scale"), *(tag("th", f"{scale:g}") for scale in scales.values))
        ]
        for row, checkpoint in enumerate(checkpoints.values):
            here = [one for one in planned if one.at[:2] == (tab, row)]
            drawn = [
                tag(
                    "td",
                    _image(one, side, kind) or "not drawn",
                    class_="best" if is_setting(report, checkpoint, one.cell.guidance_scale) else "other",
                )
                for one in here
            ]
            lines.append(tag("tr", tag("th", _text(checkpoint)), *drawn))
        yield tag("h3", _text(prompt))
        yield tag("div", tag("table", *lines, class_="grid"), class_="scroll")


def _pairs(pairs: Sequence[Pair], side: int, kind: str) -> Iterator[Html]:
    if not pairs:
        return
    yield tag("h2", "Pictures nearest to training images")
    yield tag(
        "p",
        "Left is a reported picture, right its nearest training image. The distance is relative to the 50 nearest "
        "images; under 0.5 is as near as a copy.",
    )
    shown = []
    for pair in pairs:
        both = tag(
            "div",
            _data(pair.picture, side, kind, pair.prompt),
            _data(pair.image, side, kind, pair.caption),
            class_="two",
        )
        words = f"{pair.distance:.2f}: {_text(pair.prompt)} | {_text(pair.caption)}"
        shown.append(tag("figure", both, tag("figcaption", words)))
    yield tag("div", *shown, class_="pairs")


def _curves(run: Path) -> Iterator[Html]:
    curves = read_folder(run)
    first = [key for key in ("val_loss", "train_loss") if key in curves]
    names = [*first, *(key for key in sorted(curves) if key not in first)][:CURVES]
    drawn = [drawing for name in names if (drawing := _curve(name, thin(curves[name], CURVE_POINTS)))]
    if drawn:
        yield tag("h2", "Curves of the training")
        yield tag("div", *drawn, class_="curves")


def _curve(name: str, curve: Curve) -> Html | None:
    """Return a curve as SVG, with its lowest and highest value and its last step."""
    low, high, first, last = curve.values.min(), curve.values.max(), int(curve.steps[0]), int(curve.steps[-1])
    with np.errstate(over="ignore"):
        span = high - low
    if not np.isfinite(span):
        return None
    left, top, width, height = 4, 16, CURVE_WIDTH - 8, CURVE_HEIGHT - 34
    x = left + width * (curve.steps - first) / max(1, last - first)
    y = top + height * (1 - (curve.values - low) / (span or 1))
    points = " ".join(f"{across:.1f},{down:.1f}" for across, down in zip(x, y, strict=True))
    return tag(
        "figure",
        tag("figcaption", _text(figure(name).name)),
        tag(
            "svg",
            tag("polyline", points=points),
            tag("text", f"{high:.4g}", x=left, y=12),
            tag("text", f"{low:.4g}", x=left, y=CURVE_HEIGHT - 4),
            tag("text", f"steps {first:,} to {last:,}", x=CURVE_WIDTH - 4, y=CURVE_HEIGHT - 4, text_anchor="end"),
            viewBox=f"0 0 {CURVE_WIDTH} {CURVE_HEIGHT}",
        ),
    )


def _tables(run: Path, evaluation: Mapping[str, Any]) -> Iterator[Html]:
    """Yield the tables of the report's figures, of provenance and of settings."""
    report = without_paths(evaluation["report"])
    values = [[figure(key).name, figure_text(key, value, report.get("prompts"))] for key, value in told(report).items()]
    state, identity = read_optional(run / "run.json"), read_optional(run / "evaluation" / "run.json").get("identity")
    known = {key: state[key] for key in STATE_KEYS if state.get(key) is not None}
    provenance = flatten(redact_config(without_paths(read_optional(run / "provenance.json") | known)))
    settings = flatten(redact_config(without_paths(identity))) if isinstance(identity, dict) else {}
    for title, rows in (
        ("Figures", values),
        ("Provenance", [[key, figure_text("", value)] for key, value in provenance.items()]),
        ("Settings of the evaluation", [[key, figure_text("", value)] for key, value in settings.items()]),
    ):
        yield tag("h2", title)
        yield _table([], rows[:ROWS])
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    yield tag("h2", "Settings of the training")
    yield tag("details", tag("summary", "show"), tag("pre", public_yaml(without_paths(recipe))[:SETTINGS_CHARACTERS]))


# --- Parts -----------------------------------------------------------------------------------------------------------


def reported_pictures(
    run: Path, evaluation: Mapping[str, Any], most: int | None = None
) -> list[tuple[cells.PlannedCell, Any]]:
    """Return the planned cell and the reading of each picture that the evaluation reports, or of `most` spread evenly.

    Without an evaluated grid there are none.
    """
    evaluated = cells.evaluated_grid(run)
    if evaluated is None:
        return []
    samples = cells.best_samples(evaluated, evaluation)
    samples = samples if most is None else list(_spread(samples, most))
    planned = cells.best_cells(run, evaluated, evaluation.get("report"), samples) if samples else []
    return [(one, reading) for one, (*_, reading) in zip(planned, samples, strict=False)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    lines = [tag("tr", *(tag("th", _text(word)) for word in head))] if head else []
    lines += [tag("tr", *(tag("td", _text(word)) for word in row)) for row in rows]
    return tag("div", tag("table", *lines), class_="scroll")


def _image(planned: cells.PlannedCell, side: int, kind: str) -> Html | None:
    """Return a stored picture as an element, or None if it is not in the store."""
    picture = cells.read_cell(planned.run, planned.model_hash, planned.cell) if planned.made else None
    return None if picture is None else _data(np.asarray(picture), side, kind, planned.cell.prompt)


def _data(picture: np.ndarray, side: int, kind: str, alt: str) -> Html:
    """Return a picture, uint8 [R, R, 3], as an element that holds its data."""
    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, kind, quality=85)  # PNG has no quality
    data = base64.b64encode(file.getvalue()).decode()
    return tag("img", src=f"data:image/{kind.lower()};base64,{data}", alt=_text(alt))


def _spread(values: Sequence[Any], count: int) -> tuple[Any, ...]:
    """Return at most `count` values at even distances, the first and the last among them."""
    if len(values) <= count:
        return tuple(values)
    return tuple(values[round(number * (len(values) - 1) / (count - 1))] for number in range(count))


def _text(value: Any) -> str:
    return one_line(value, TEXT_CHARACTERS)
