"""Curves of many runs: colors that stay, groups by a setting, a baseline, and a list that names the lines."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
import yaml
from hypothesis import given
from hypothesis import strategies as st_
from streamlit.testing.v1 import AppTest

from t2i.tracking.curves import Curve, average
from test_dashboard import APP, EVIL, charts, make_run, make_store, show

sys.path.append(str(APP.parent))  # as the dashboard itself does

CURVES = st_.lists(
    st_.dictionaries(st_.integers(0, 40), st_.floats(-1e6, 1e6), min_size=1, max_size=12), min_size=1, max_size=5
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def session(monkeypatch):
    """A session of a browser, without one."""
    state: dict = {}
    monkeypatch.setattr(st, "session_state", state)
    return state


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def to_curve(points: dict[int, float]) -> Curve:
    steps = np.array(sorted(points))
    return Curve(steps, np.full(len(steps), np.nan), np.array([points[step] for step in steps]))


@given(CURVES)
def test_a_mean_lies_between_the_lowest_and_the_highest_curve(points):
    curves = [to_curve(one) for one in points]
    mean, low, high = average(curves)
    assert (low <= mean.values + 1e-6).all()
    assert (mean.values <= high + 1e-6).all()
    assert (np.diff(mean.steps) > 0).all()
    for step in set(mean.steps.tolist()):
        at = [one[step] for one in points if step in one]
        here = mean.steps == step
        assert low[here][0] <= min(at)
        assert max(at) <= high[here][0]
    if len(curves) == 1:
        assert mean.values.tolist() == curves[0].values.tolist()


def test_a_mean_takes_few_steps_and_only_runs_that_have_them():
    long = Curve(np.arange(10_000), np.full(10_000, np.nan), np.ones(10_000))
    mean, _, _ = average([long, to_curve({0: 3.0, 10: 3.0})], points=100)
    assert len(mean) == 100
    assert (mean.values[mean.steps > 10] == 1).all()  # the short run has ended
    assert mean.values[0] == 2


@given(st_.lists(st_.text(min_size=1, max_size=8), max_size=60, unique=True), st_.data())
def test_runs_that_are_added_change_no_color(names, data):
    from helpers.run_colors import COLORS, color_runs, repeats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(st, "session_state", {})
        some = names[: data.draw(st_.integers(0, len(names)))]
        before, dotted_before = color_runs(some), repeats(some)
        after = color_runs(names)
        assert before.items() <= after.items()
        first = color_runs(names[: len(COLORS)]) if not some else {}
        assert len(names) > len(COLORS) or len(set(after.values())) == len(names) >= len(first)
        dotted = repeats(names)
        assert dotted & set(some) == dotted_before
        looks = {(color, name in dotted) for name, color in after.items()}
        assert len(looks) == min(len(names), 2 * len(COLORS))  # Only from the 49th run on do two curves look alike.


def test_every_color_is_seen_on_both_backgrounds():
    from helpers.charts import BASELINE
    from helpers.run_colors import COLORS, RAMP

    for color in (*COLORS, *RAMP, BASELINE):
        assert contrast(color, "#ffffff") >= 3, color
        assert contrast(color, "#0e1117") >= 3, color
    assert len(set(COLORS)) == len(COLORS)


def test_settings_that_group_runs_are_offered():
    from helpers.run_colors import color_values, differing_settings, ordered

    runs = {
        f"r{n}": {"lr": (1e-3, 2e-3, 1e-2)[n % 3], "name": f"r{n}", "same": 1, **({"opt": "muon"} if n % 2 else {})}
        for n in range(6)
    }
    found = differing_settings(runs, 8)
    assert list(found) == ["opt", "lr"]  # one value per run groups nothing
    assert found["opt"] == {name: "muon" if int(name[1:]) % 2 else "not set" for name in runs}
    values = ordered(found["lr"].values())
    assert values == ["0.001", "0.002", "0.01"]  # by size, not by text
    assert len(set(color_values(values).values())) == 3
    assert len(set(color_values(ordered(found["opt"].values())).values())) == 2


def many_runs(folder: Path, count: int) -> None:
    for number in range(count):
        run = make_run(folder / "outputs" / f"run{number:02d}")
        rows = [{"step": step, "train_loss": 1 / step + number, "val_loss": number} for step in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"train_unet": {"learning_rate": 1e-3 * (1 + number % 2)}, "seed": number}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))


def lines_of(app: AppTest) -> list[dict]:
    """The list beside the charts, as the page sent it."""
    sent = [json.loads(one.proto.json)[0] for one in app.get("bidi_component") if "lines" in one.proto.json]
    return sent[-1]["lines"]


def layers(app: AppTest) -> list[dict]:
    return charts(app)[0]["layer"]


def test_many_runs_keep_the_height_and_are_named_in_a_list(tmp_path):
    many_runs(tmp_path, 30)
    app = show("curves")
    spec = charts(app)[0]
    assert spec["height"] == 480
    assert all(layer["encoding"]["color"]["legend"] is None for layer in spec["layer"])
    lines = lines_of(app)
    assert [line["name"] for line in lines] == [f"run{number:02d}" for number in range(30)]  # the lowest loss first
    assert lines[3]["figures"] == "val_loss 3"
    scale = layers(app)[0]["encoding"]["color"]["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == {line["name"]: line["color"] for line in lines}
    assert sum(line["dotted"] for line in lines) == 6  # of 30 runs in 24 colors
    assert layers(app)[0]["encoding"]["strokeDash"]["scale"]["range"] == [[1, 0], [2, 2]]
    few = show("curves", runs="run07")
    assert {line["name"]: line["color"] for line in lines_of(few)}.keys() == {"run07"}


def test_runs_are_colored_and_averaged_by_a_setting_beside_a_baseline(tmp_path):
    many_runs(tmp_path, 6)
    app = show("curves", color="train_unet.learning_rate", baseline="run02", metric="val_loss")
    assert [box.value for box in app.selectbox if box.label in ("Color by", "Baseline")] == [
        "train_unet.learning_rate",
        "run02",
    ]
    lines = lines_of(app)
    assert (lines[0]["name"], lines[0]["dashed"]) == ("run02", True)
    assert lines[1]["figures"] == "0.001 · val_loss 0 · -2"
    assert len({line["color"] for line in lines[1:]}) == 2
    assert layers(app)[-1]["mark"]["strokeDash"] == [7, 4]
    next(one for one in app.toggle if one.label == "Mean per color").set_value(True).run()
    assert not app.exception
    assert [(line["name"], line["figures"]) for line in lines_of(app)] == [
        ("run02", "0.001 · val_loss 2"),
        ("0.001", "2 runs · val_loss 2 · +0"),
        ("0.002", "3 runs · val_loss 3 · +1"),
    ]
    assert layers(app)[0]["mark"]["type"] == "area"


def test_figures_over_the_guidance_scale_have_the_runs_colors_and_one_legend(tmp_path):
    for name in ("one", "two"):
        run = make_run(tmp_path / "outputs" / name)
        rows = [
            {"checkpoint": checkpoint, "guidance_scale": scale, "judge": {"kernel_distance": 1.0, "named": 0.5}}
            for checkpoint in ("checkpoint-000010", "checkpoint-000020") for scale in (1.5, 3.0)
        ]  # fmt: skip
        if name == "two":  # has no figure of the first chart, whose legend all share
            rows = [row | {"judge": {"named": 0.5}} for row in rows]
        (run / "evaluation").mkdir(exist_ok=True)
        (run / "evaluation" / "evaluation.json").write_text(json.dumps({"cells": rows}))
    app = show("curves", figure=["judge.kernel_distance", "judge.named"])
    colors = {line["name"]: line["color"] for line in lines_of(app)}
    first, second = (chart["layer"][0]["encoding"] for chart in charts(app)[-2:])
    for encoding in (first, second):
        scale = encoding["color"]["scale"]
        assert dict(zip(scale["domain"], scale["range"], strict=True)) == colors
        assert encoding["x"]["axis"] == {"values": [1.5, 3.0], "format": ".4~g"}
        assert [one.get("title") for one in encoding["tooltip"][:2]] == [None, "checkpoint"]
    assert first["color"]["legend"]["columns"] == first["strokeDash"]["legend"]["columns"]  # of several rows on a phone
    assert second["color"]["legend"] is second["strokeDash"]["legend"] is None


def test_hostile_names_and_choices_draw_a_page(tmp_path):
    run = make_run(tmp_path / "outputs" / EVIL)
    make_run(tmp_path / "outputs" / "one")
    (run / "config.yaml").write_text(yaml.safe_dump({"unet": {EVIL: EVIL}}))
    for query in ({"color": "<b>", "baseline": "../x", "mean": "maybe"}, {"color": f"unet.{EVIL}", "mean": "true"}):
        app = show("curves", **query)
        assert charts(app)
        assert lines_of(app)


def test_a_run_in_mlflow_is_named_by_its_folder(tmp_path):
    make_store(tmp_path)
    run = make_run(tmp_path / "outputs" / "demo" / "unet")
    (run / "mlflow_spool").mkdir()
    (run / "mlflow_spool" / "state.json").write_text(json.dumps({"run_id": f"{1:032x}"[::-1]}))
    app = show("curves", source="MLflow")
    assert {line["name"] for line in lines_of(app)} == {"demo/unet", "unet (00000000)"}
