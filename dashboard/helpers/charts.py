"""Make charts: curves over steps or hours, figures over a setting, and bars.

A chart is a Vega-Lite specification (https://vega.github.io/vega-lite/docs) as a dict, whose data are an Arrow table.
Altair makes the same dict from a pandas table, but to import both costs a new server 0.7 s of its first page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from helpers.tables import column
from t2i.tracking.curves import POINTS, Curve, average, smooth, thin

CHART_POINTS = 60_000  # points of a chart, over all its lines: a browser draws them without stuttering
HEIGHT, TALL = 360, 480  # pixels of a chart with axes and legend, and of one with many lines
MARGIN, SIDE = 8, 16  # pixels between the outermost points and the frame, so that marks and labels on them are not cut
MOST_TICKS = 12  # measured values that an axis labels each
LEGEND_LINES, LEGEND_ROW = 8, 18  # most lines of a legend below a chart, and pixels per line
DASHES = 5  # patterns of lines that Vega-Lite has
MANY_LINES = 12  # with more lines, each is thin and pale until the pointer meets it
DOTS = [2, 2]  # pixels drawn and left out of a dotted line
BASELINE = "#767676"  # color of the pinned run, visible on both backgrounds
ZOOM = {"name": "zoom", "select": {"type": "interval", "encodings": ["x", "y"]}, "bind": "scales"}  # by wheel and drag

Rows = Sequence[tuple[str, str, Curve]]  # run, metric, and its curve
Chart = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """How the curves of runs are told apart."""

    groups: Mapping[str, str]  # What a run's color stands for: the run itself, or its value of a setting.
    colors: Mapping[str, str]  # CSS color per group.
    baseline: str = ""  # Run that is drawn dashed and gray, on top of all others.
    repeats: frozenset[str] = frozenset()  # Runs whose color another run has. A chart of one metric dots them.
    is_averaged: bool = False  # Whether one line per group shows the mean of its runs, within a band of all.


def curves_chart(
    rows: Rows,
    weight: float = 0.0,
    log: bool = False,
    wall_time: bool = False,
    look: Look | None = None,
    colors: Mapping[str, str] | None = None,
) -> Chart | None:
    """Return a chart of curves, smoothed and then thinned; None if there is nothing to draw.

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
    return told_apart(drawn, x, log, look) if look else line_chart(drawn, x, log, colors=colors)


def told_apart(drawn: Rows, x: str, log: bool, look: Look) -> Chart:
    """Return a chart whose lines have the colors of their groups. The line at the pointer stands out and tells its name.

    A list beside the chart names the lines, so the chart has no legend of runs, and keeps its height with any number.
    """
    plain = [one for one in drawn if one[0] != look.baseline]
    base_rows = [one for one in drawn if one[0] == look.baseline]
    layers = []
    if look.is_averaged and plain:
        plain, bands = averaged(plain, look.groups)
        area = {"type": "area", "opacity": 0.18}
        layers.append(grouped(bands, area, encode_groups(plain, x, log, "low", look) | {"y2": {"field": "high"}}))
    is_many = len(plain) > MANY_LINES
    if plain:
        group_of = {run: run if look.is_averaged else look.groups[run] for run, _, _ in plain}
        table = table_of(plain, group_of, look.repeats)
        encoding = encode_groups(plain, x, log, "value", look)
        line = {"type": "line", "clip": True}
        emphasis = {
            "strokeWidth": at_pointer(3.5, 1.2 if is_many else 2),
            "opacity": at_pointer(1, 0.6 if is_many else 1),
        }
        layers.append(grouped(table, line, encoding | emphasis))
        names = ["run"] if group_of.keys() == set(group_of.values()) else ["run", "group"]
        tooltip = {"tooltip": [nominal(name) for name in (*names, "metric")]}
        # A line of two pixels is hard to meet: an invisible wide one lies upon it.
        wide = grouped(table, line | {"strokeWidth": 12, "opacity": 0.001}, encoding | tooltip)
        select = {"type": "point", "fields": ["run"], "on": "pointerover", "clear": "pointerout"}
        layers.append(wide | {"params": [{"name": "pointed", "select": select}]})
    if base_rows:
        line = {"type": "line", "clip": True, "strokeWidth": 3, "strokeDash": [7, 4]}
        encoding = encode_groups(base_rows, x, log, "value", replace(look, repeats=frozenset()))
        encoding |= {"color": {"value": BASELINE}, "tooltip": [nominal("run"), nominal("metric")]}
        layers.append(grouped(table_of(base_rows, {look.baseline: look.baseline}), line, encoding))
    layers[0]["params"] = [*layers[0].get("params", []), ZOOM]
    return layered(layers, TALL if is_many else HEIGHT)


def grouped(table: pa.Table, mark: dict[str, Any], encoding: dict[str, Any]) -> Chart:
    """Return a layer with a line or band per run and metric."""
    return {"data": table, "mark": mark, "encoding": encoding | {"detail": [nominal("run"), nominal("metric")]}}


def encode_groups(drawn: Rows, x: str, log: bool, y: str, look: Look) -> dict[str, Any]:
    """Return the encodings of axes, of a color per group, and of dashes per metric or per repeated color."""
    colors = {"domain": list(look.colors), "range": list(look.colors.values())}
    encoding = {**axes_of(x, log, y), "color": nominal("group", scale=colors, legend=None)}
    if len({metric for _, metric, _ in drawn}) > 1:
        encoding["strokeDash"] = nominal("metric", title=None, legend={"orient": "top"})
    elif look.repeats:
        dashes = {"domain": [False, True], "range": [[1, 0], DOTS]}
        encoding["strokeDash"] = nominal("repeats", scale=dashes, legend=None)
    return encoding


def at_pointer(value: float, otherwise: float) -> dict[str, Any]:
    """Return the encoding that has `value` for the line at the pointer."""
    return {"condition": {"param": "pointed", "value": value, "empty": False}, "value": otherwise}


def averaged(drawn: Rows, groups: Mapping[str, str]) -> tuple[Rows, pa.Table]:
    """Return the mean curve per group and metric, named by its group, and the bands from the lowest to the highest run."""
    members: dict[tuple[str, str], list[Curve]] = {}
    for run, metric, curve in drawn:
        members.setdefault((groups[run], metric), []).append(curve)
    averages = [(group, metric, average(curves)) for (group, metric), curves in members.items()]
    means = [(group, metric, mean) for group, metric, (mean, _, _) in averages]
    bands = table_of(means, {group: group for group, _, _ in means}).drop_columns(["value"])
    for name, number in (("low", 1), ("high", 2)):
        bands = bands.append_column(name, column(np.concatenate([found[number] for _, _, found in averages])))
    return means, bands


def table_of(drawn: Rows, groups: Mapping[str, str] | None = None, repeats: frozenset[str] = frozenset()) -> pa.Table:
    """Return the points of curves, whose steps are x, as rows: x, value, run, metric, and the run's group and repeats."""
    counts = [len(curve) for _, _, curve in drawn]
    columns = {
        "x": column(np.concatenate([curve.steps for _, _, curve in drawn])),
        "value": column(np.concatenate([curve.values for _, _, curve in drawn])),
        "run": repeat_names([run for run, _, _ in drawn], counts),
        "metric": repeat_names([metric for _, metric, _ in drawn], counts),
    }
    if groups is not None:
        of_line = [groups[run] for run, _, _ in drawn]
        columns["group"] = repeat_names(of_line, counts)
        columns["repeats"] = column(np.repeat([group in repeats for group in of_line], counts))
    return pa.table(columns)


def repeat_names(names: list[str], counts: list[int]) -> pa.DictionaryArray:
    """Return a column in which each name of `names` is repeated as often as `counts` says.

    The column is encoded as a dictionary: each name is sent and compared once instead of once per point.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    codes = np.repeat(np.array([numbers[name] for name in names], np.int32), counts)
    return pa.DictionaryArray.from_arrays(column(codes), column(list(numbers)))


def line_chart(
    drawn: Rows,
    x: str,
    log: bool = False,
    marks: bool = False,
    colors: Mapping[str, str] | None = None,
    metric: str = "metric",
    shared: Sequence[tuple[str, str]] = (),
    has_legend: bool = True,
) -> Chart:
    """Return a chart of curves, whose steps are x, with a legend. Names of runs are shown literally.

    Args:
        marks: whether each point has a mark, and the axis labels the values of x.
        colors: CSS color per run. Without it runs have colors of the page's theme.
        metric: what the second name of a row stands for.
        shared: run and metric of all lines of all charts that share one legend. By default the chart's own lines.
        has_legend: whether the chart has a legend.
    """
    pairs = shared or [(run, metric) for run, metric, _ in drawn]
    names, metrics = (list(dict.fromkeys(column)) for column in zip(*pairs, strict=True))
    is_by_run = len(names) > 1 or (bool(colors) and len(metrics) == 1)
    lines = max(len(names), len(metrics))
    legend, height = None, HEIGHT  # the title already names a single line, and too many lines have no room
    if has_legend and 1 < lines <= LEGEND_LINES:
        height += LEGEND_ROW * (lines - 1)  # the legend takes no height from the plot, also on a phone
        columns = {"expr": "width < 500 ? 1 : 2"}  # on a phone each name has a row for itself
        legend = {"orient": "bottom", "columns": columns, "labelLimit": 400}
    color = nominal("run" if is_by_run else "metric", title=None, legend=legend)
    if is_by_run and (named := {run: css for run, css in (colors or {}).items() if run in names}):
        color["scale"] = {"domain": list(named), "range": list(named.values())}
    elif shared:
        color["scale"] = {"domain": names if is_by_run else metrics}
    table = table_of(drawn)
    encoding: dict[str, Any] = {
        **axes_of(x, log, "value", np.unique(table["x"].to_numpy()).tolist() if marks else ()),
        "color": color,
        "tooltip": [
            nominal("run"),
            nominal("metric", title=metric),
            quantity("x", title=x, format=".6~g"),
            quantity("value", format=".5~g"),
        ],
    }
    if len(names) > 1 and 1 < len(metrics) <= DASHES:
        height += LEGEND_ROW * len(metrics) if legend else 0
        encoding["strokeDash"] = nominal("metric", title=None, legend=legend and {**legend, "orient": "top"})
        if shared:
            encoding["strokeDash"]["scale"] = {"domain": metrics}
    elif lines > 1:
        encoding["detail"] = [nominal("run"), nominal("metric")]
    chart = {"data": table, "mark": {"type": "line", "clip": True}, "encoding": encoding, "params": [ZOOM]}
    if not marks:
        return chart | {"height": height}
    # As a layer of their own: the legend of dashes would show the marks of one layer instead.
    without_dashes = {name: value for name, value in encoding.items() if name != "strokeDash"}
    points = {
        "data": table,
        "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1, "clip": True},
        "encoding": without_dashes,
    }
    return layered([chart, points], height)


def layered(layers: Sequence[Chart], height: int) -> Chart:
    """Return the chart of several layers, the last on top. Layers may share a table, which is sent once."""
    tables = {id(one["data"]): one["data"] for one in layers}
    names = {key: f"table{number}" for number, key in enumerate(tables)}
    units, params = [], []
    for number, one in enumerate(layers):
        unit = {"name": f"layer{number}", "data": {"name": names[id(one["data"])]}}
        units.append(unit | {"mark": one["mark"], "encoding": one["encoding"]})
        params += [param | {"views": [unit["name"]]} for param in one.get("params", ())]
    datasets = {names[key]: table for key, table in tables.items()}
    return {"datasets": datasets, "layer": units, "params": params, "height": height}


def axes_of(x: str, log: bool, y: str, measured: Sequence[float] = ()) -> dict[str, Any]:
    """Return the encodings of both axes. A few `measured` values of x are the axis's ticks."""
    ticks: dict[str, Any] = {"tickCount": 8}
    if x == "step":
        ticks |= {"format": ",d", "tickMinStep": 1}
    if 0 < len(measured) <= MOST_TICKS:
        # Without a number of digits, the distance of the ticks decides, and 1.5 becomes 2.
        ticks = {"values": list(measured), "format": ".4~g"}
    y_scale = {"type": "log" if log else "linear", "zero": False, "padding": MARGIN}
    return {
        "x": quantity("x", title=x, axis=ticks, scale={"zero": False, "nice": False, "padding": SIDE}),
        "y": quantity(y, title=None, axis={"tickCount": 6}, scale=y_scale),
    }


def quantity(field: str, **more: Any) -> dict[str, Any]:
    """Return the encoding of a column of numbers."""
    return {"field": field, "type": "quantitative", **more}


def nominal(field: str, **more: Any) -> dict[str, Any]:
    """Return the encoding of a column of names."""
    return {"field": field, "type": "nominal", **more}


def bar_chart(table: pa.Table, x: str, y: str) -> Chart:
    """Return bars of the column `y` over binned values, whose bounds are the columns from and to."""
    encoding = {
        "x": quantity("from", title=x, bin="binned", axis={"tickMinStep": 1}),
        "x2": {"field": "to"},
        "y": quantity(y, title=y),
        "tooltip": [quantity("from"), quantity("to", title="below"), quantity(y)],
    }
    return {"data": table, "mark": {"type": "bar"}, "encoding": encoding, "height": 220}
