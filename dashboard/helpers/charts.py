"""Make charts: curves over steps or hours, figures over a setting, and bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from t2i.tracking.curves import POINTS, Curve, average, smooth, thin

alt.utils.schemapi.disable_debug_mode()  # only code makes charts: checking each against Vega-Lite's schema costs 0.1 s
CHART_POINTS = 60_000  # points of a chart, over all its lines: a browser draws them without stuttering
HEIGHT, TALL = 360, 480  # pixels of a chart with axes and legend, and of one with many lines
MARGIN, SIDE = 8, 16  # pixels between the outermost points and the frame, so that marks and labels on them are not cut
MOST_TICKS = 12  # measured values that an axis labels each
LEGEND_LINES, LEGEND_ROW = (
    8,
    18,
)  # most lines of a legend below a chart, and pixels per line; other names are at the pointer
MANY_LINES = 12  # with more lines, each is thin and pale until the pointer meets it
DOTS = [2, 2]  # pixels drawn and left out of a dotted line
BASELINE = "#767676"  # color of the pinned run, visible on both backgrounds


@dataclass(frozen=True)
class Look:
    """How the curves of runs are told apart."""

    groups: Mapping[str, str]  # What a run's color stands for: the run itself, or its value of a setting.
    colors: Mapping[str, str]  # CSS color per group.
    baseline: str = ""  # Run that is drawn dashed and gray, on top of all others.
    repeats: frozenset[str] = frozenset()  # Runs whose color another run has. A chart of one metric dots them.
    is_averaged: bool = False  # Whether one line per group shows the mean of its runs, within a band of all.


def curves_chart(
    rows: list[tuple[str, str, Curve]],
    weight: float = 0.0,
    log: bool = False,
    wall_time: bool = False,
    look: Look | None = None,
    colors: Mapping[str, str] | None = None,
) -> alt.Chart | alt.LayerChart | None:
    """Return a chart of (run, metric, curve), smoothed and then thinned; None if there is nothing to draw.

    Args:
        weight: strength of the smoothing, at least 0 and below 1. A weight of 0 disables smoothing.
        log: whether the scale of the values is logarithmic. A logarithmic scale leaves out values of 0 and below.
        wall_time: whether x is the hours since a curve's first record, instead of the step.
        look: colors, groups and baseline. Without it the chart has a legend.
        colors: CSS color per run of a chart with a legend. Without it runs have colors of the page's theme.
    """
    points = min(POINTS, max(50, CHART_POINTS // max(1, len(rows))))
    drawn = []
    for run, metric, curve in rows:
        curve = smooth(curve, weight)
        shown = (curve.values > 0 if log else np.isfinite(curve.values)) & (np.isfinite(curve.times) | (not wall_time))
        curve = thin(Curve(curve.steps[shown], curve.times[shown], curve.values[shown]), points)
        if len(curve):
            across = (curve.times - curve.times.min()) / 3600 if wall_time else curve.steps
            drawn.append((run, metric, Curve(across, curve.times, curve.values)))
    if not drawn:
        return None
    x = "hours" if wall_time else "step"
    return told_apart(drawn, x, log, look) if look else line_chart(frame_of(drawn), x, log, colors=colors)


def frame_of(drawn: Sequence[tuple[str, str, Curve]]) -> pd.DataFrame:
    """Return the points of (run, metric, curve), whose curves' steps are x, as rows of a table."""
    counts = [len(curve) for _, _, curve in drawn]
    return pd.DataFrame(
        {
            "x": np.concatenate([curve.steps for _, _, curve in drawn]),
            "value": np.concatenate([curve.values for _, _, curve in drawn]),
            "run": repeat_names([run for run, _, _ in drawn], counts),
            "metric": repeat_names([metric for _, metric, _ in drawn], counts),
        }
    )


def told_apart(drawn: Sequence[tuple[str, str, Curve]], x: str, log: bool, look: Look) -> alt.LayerChart:
    """Return a chart whose lines have the colors of their groups. The line at the pointer stands out and tells its name.

    A list beside the chart names the lines, so the chart has no legend of runs, and keeps its height with any number.
    """
    plain = [one for one in drawn if one[0] != look.baseline]
    bands = pd.DataFrame()
    if look.is_averaged:
        plain, bands = averaged(plain, look.groups)
    group_of = {run: run if look.is_averaged else look.groups[run] for run, _, _ in plain}
    pointed = alt.selection_point(name="pointed", fields=["run"], on="pointerover", clear="pointerout", empty=False)
    is_many = len(plain) > MANY_LINES
    layers = []
    if len(bands):
        layers.append(base_of(bands, x, log, "low", look).mark_area(opacity=0.18).encode(y2="high:Q"))
    if plain:
        frame = frame_of(plain)
        counts = [len(curve) for _, _, curve in plain]
        frame["group"] = repeat_names([group_of[run] for run, _, _ in plain], counts)
        base = base_of(frame, x, log, "value", look)
        width = alt.condition(pointed, alt.value(3.5), alt.value(1.2 if is_many else 2))
        opacity = alt.condition(pointed, alt.value(1), alt.value(0.6 if is_many else 1))
        layers.append(base.mark_line(clip=True).encode(strokeWidth=width, opacity=opacity))
        # A line of two pixels is hard to meet: an invisible wide one lies upon it.
        tooltip = [
            f"{name}:N" for name in (("run",) if group_of.keys() == set(group_of.values()) else ("run", "group"))
        ]
        wide = base.mark_line(clip=True, strokeWidth=12, opacity=0.001).encode(tooltip=[*tooltip, "metric:N"])
        layers.append(wide.add_params(pointed))
    if base_rows := [one for one in drawn if one[0] == look.baseline]:
        frame = frame_of(base_rows).assign(group=look.baseline)
        marked = base_of(frame, x, log, "value", replace(look, repeats=frozenset())).encode(
            color=alt.ColorValue(BASELINE), tooltip=["run:N", "metric:N"]
        )
        layers.append(marked.mark_line(clip=True, strokeWidth=3, strokeDash=[7, 4]))
    return alt.layer(*layers).properties(height=TALL if is_many else HEIGHT).interactive()


def base_of(frame: pd.DataFrame, x: str, log: bool, y: str, look: Look) -> alt.Chart:
    """Return a chart without a mark: the axes, a color per group, and a line per run and metric."""
    colors = alt.Scale(domain=list(look.colors), range=list(look.colors.values()))
    encoding: dict[str, Any] = {
        **axes_of(x, log, y),
        "color": alt.Color("group:N", scale=colors, legend=None),
        "detail": ["run:N", "metric:N"],
    }
    if frame["metric"].nunique() > 1 and "run" in frame:
        encoding["strokeDash"] = alt.StrokeDash("metric:N", title=None, legend=alt.Legend(orient="top"))
    elif look.repeats:
        frame = frame.assign(repeats=frame["group"].isin(look.repeats))
        dashes = alt.Scale(domain=[False, True], range=[[1, 0], DOTS])
        encoding["strokeDash"] = alt.StrokeDash("repeats:N", scale=dashes, legend=None)
    return alt.Chart(frame).encode(**encoding)


def averaged(
    drawn: Sequence[tuple[str, str, Curve]], groups: Mapping[str, str]
) -> tuple[list[tuple[str, str, Curve]], pd.DataFrame]:
    """Return the mean curve per group and metric, named by its group, and the bands from the lowest to the highest run."""
    members: dict[tuple[str, str], list[Curve]] = {}
    for run, metric, curve in drawn:
        members.setdefault((groups[run], metric), []).append(curve)
    means, bands = [], []
    for (group, metric), curves in members.items():
        mean, low, high = average(curves)
        means.append((group, metric, mean))
        bands.append(
            pd.DataFrame({"x": mean.steps, "low": low, "high": high, "run": group, "group": group, "metric": metric})
        )
    return means, pd.concat(bands, ignore_index=True) if bands else pd.DataFrame()


def repeat_names(names: list[str], counts: list[int]) -> pd.Categorical:
    """Return a category column in which each name of `names` is repeated as often as `counts` says.

    A category column sends and compares each name once instead of once per point.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return pd.Categorical.from_codes(np.repeat([numbers[name] for name in names], counts), list(numbers))


def line_chart(
    frame: pd.DataFrame, x: str, log: bool = False, marks: bool = False, colors: Mapping[str, str] | None = None
) -> alt.Chart:
    """Return a chart of `frame`'s columns x, value, run and metric. Names of runs are shown literally."""
    runs, metrics = frame["run"].nunique(), frame["metric"].nunique()
    color = "run" if runs > 1 or (colors and metrics == 1) else "metric"
    legend, height = None, HEIGHT  # the title already names a single line, and too many lines have no room
    if 1 < max(runs, metrics) <= LEGEND_LINES:
        height += LEGEND_ROW * (max(runs, metrics) - 1)  # the legend takes no height from the plot, also on a phone
        columns = alt.ExprRef("width < 500 ? 1 : 2")  # on a phone each name has a row for itself
        legend = alt.Legend(orient="bottom", columns=columns, labelLimit=400)
    named = {run: css for run, css in (colors or {}).items() if run in set(frame["run"])} if color == "run" else {}
    scale = alt.Scale(domain=list(named), range=list(named.values())) if named else alt.Undefined
    encoding: dict[str, Any] = {
        **axes_of(x, log, "value", sorted(frame["x"].unique()) if marks else ()),
        "color": alt.Color(f"{color}:N", title=None, legend=legend, scale=scale),
        "tooltip": [
            alt.Tooltip("run:N"),
            alt.Tooltip("metric:N"),
            alt.Tooltip("x:Q", title=x, format=".6~g"),
            alt.Tooltip("value:Q", format=".5~g"),
        ],
    }
    if runs > 1 and metrics > 1:
        encoding["strokeDash"] = alt.StrokeDash("metric:N", title=None, legend=legend and alt.Legend(orient="top"))
    elif runs > 1 or metrics > 1:
        encoding["detail"] = ["run:N", "metric:N"]
    return alt.Chart(frame).mark_line(point=marks, clip=True).encode(**encoding).properties(height=height).interactive()


def axes_of(x: str, log: bool, y: str, measured: Sequence[float] = ()) -> dict[str, Any]:
    """Return the encodings of both axes. A few `measured` values of x are the axis's ticks."""
    ticks = alt.Axis(format=",d", tickMinStep=1, tickCount=8) if x == "step" else alt.Axis(tickCount=8)
    if 0 < len(measured) <= MOST_TICKS:
        ticks = alt.Axis(values=[float(value) for value in measured], format="~g")
    y_scale = alt.Scale(type="log" if log else "linear", zero=False, padding=MARGIN)
    return {
        "x": alt.X("x:Q", title=x, axis=ticks, scale=alt.Scale(zero=False, nice=False, padding=SIDE)),
        "y": alt.Y(f"{y}:Q", title=None, axis=alt.Axis(tickCount=6), scale=y_scale),
    }


def bar_chart(frame: pd.DataFrame, x: str, y: str) -> alt.Chart:
    """Return bars of `frame`'s column `y` over binned values, whose bounds are the columns from and to."""
    tooltip = [alt.Tooltip("from:Q"), alt.Tooltip("to:Q", title="below"), f"{y}:Q"]
    across = alt.X("from:Q", title=x, bin="binned", axis=alt.Axis(tickMinStep=1))
    bars = alt.Chart(frame).mark_bar().encode(x=across, x2="to:Q", y=alt.Y(f"{y}:Q", title=y), tooltip=tooltip)
    return bars.properties(height=220)
