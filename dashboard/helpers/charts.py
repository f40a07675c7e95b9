"""Make charts: curves over steps or hours, figures over a setting, and bars."""

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from t2i.tracking.curves import POINTS, Curve, smooth, thin

alt.utils.schemapi.disable_debug_mode()  # only code makes charts: checking each against Vega-Lite's schema costs 0.1 s
CHART_POINTS = 60_000  # points of a chart, over all its lines: a browser draws them without stuttering
HEIGHT = 360  # pixels of a chart with axes and legend
MARGIN = 8  # pixels between the outermost points and the frame, so that marks on them are not cut
LEGEND_LINES = 20  # with more lines, a legend is taller than its chart, and names are shown at the pointer instead


def curves_chart(
    rows: list[tuple[str, str, Curve]], weight: float = 0.0, log: bool = False, wall_time: bool = False
) -> alt.Chart | None:
    """Return a chart of (run, metric, curve), smoothed and then thinned; None if there is nothing to draw.

    Args:
        weight: strength of the smoothing, at least 0 and below 1. A weight of 0 disables smoothing.
        log: whether the scale of the values is logarithmic. A logarithmic scale leaves out values of 0 and below.
        wall_time: whether x is the hours since a curve's first record, instead of the step.
    """
    points = min(POINTS, max(50, CHART_POINTS // max(1, len(rows))))
    drawn = []
    for run, metric, curve in rows:
        curve = smooth(curve, weight)
        shown = (curve.values > 0 if log else np.isfinite(curve.values)) & (np.isfinite(curve.times) | (not wall_time))
        curve = thin(Curve(curve.steps[shown], curve.times[shown], curve.values[shown]), points)
        if len(curve):
            drawn.append((run, metric, curve))
    if not drawn:
        return None
    counts = [len(curve) for _, _, curve in drawn]
    frame = pd.DataFrame(
        {
            "x": np.concatenate([(c.times - c.times.min()) / 3600 if wall_time else c.steps for _, _, c in drawn]),
            "value": np.concatenate([curve.values for _, _, curve in drawn]),
            "run": repeat_names([run for run, _, _ in drawn], counts),
            "metric": repeat_names([metric for _, metric, _ in drawn], counts),
        }
    )
    return line_chart(frame, "hours" if wall_time else "step", log)


def repeat_names(names: list[str], counts: list[int]) -> pd.Categorical:
    """Return a category column in which each name of `names` is repeated as often as `counts` says.

    A category column sends and compares each name once instead of once per point.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return pd.Categorical.from_codes(np.repeat([numbers[name] for name in names], counts), list(numbers))


def line_chart(frame: pd.DataFrame, x: str, log: bool = False, marks: bool = False) -> alt.Chart:
    """Return a chart of `frame`'s columns x, value, run and metric. Names of runs are shown literally."""
    runs, metrics = frame["run"].nunique(), frame["metric"].nunique()
    color = "run" if runs > 1 else "metric"
    legend = None  # the title already names a single line, and too many lines have no room
    if 1 < max(runs, metrics) <= LEGEND_LINES:
        columns = alt.ExprRef("width < 500 ? 1 : 2")  # on a phone each name has a row for itself
        legend = alt.Legend(orient="bottom", columns=columns, labelLimit=400)
    ticks = alt.Axis(format=",d", tickMinStep=1, tickCount=8) if x == "step" else alt.Axis(tickCount=8)
    y_scale = alt.Scale(type="log" if log else "linear", zero=False, padding=MARGIN)
    encoding: dict[str, Any] = {
        "x": alt.X("x:Q", title=x, axis=ticks, scale=alt.Scale(zero=False, nice=False, padding=MARGIN)),
        "y": alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=6), scale=y_scale),
        "color": alt.Color(f"{color}:N", title=None, legend=legend),
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
    return alt.Chart(frame).mark_line(point=marks, clip=True).encode(**encoding).properties(height=HEIGHT).interactive()


def bar_chart(frame: pd.DataFrame, x: str, y: str) -> alt.Chart:
    """Return bars of `frame`'s column `y` over binned values, whose bounds are the columns from and to."""
    tooltip = [alt.Tooltip("from:Q"), alt.Tooltip("to:Q", title="below"), f"{y}:Q"]
    across = alt.X("from:Q", title=x, bin="binned", axis=alt.Axis(tickMinStep=1))
    bars = alt.Chart(frame).mark_bar().encode(x=across, x2="to:Q", y=alt.Y(f"{y}:Q", title=y), tooltip=tooltip)
    return bars.properties(height=220)
