"""The page Compare: grids of stored and of new pictures, a compared pair, and curves with marked checkpoints."""

import io
import json
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from streamlit.testing.v1 import AppTest

from t2i.files import sha256_file
from t2i.pictures import cells, png
from t2i.pictures.png import difference, labelled_grid

APP = Path(__file__).resolve().parents[1] / "dashboard" / "streamlit_app.py"
EVIL = "a <script>alert(1)</script> **bold** [x](javascript:y) flower"
PROMPTS = ["a red flower", EVIL]
SCALES = [1.5, 3.0]


def make_run(folder: Path, steps=(10, 20), evaluated=True) -> Path:
    """A run as training and evaluation leave it, with files that stand for weights; its pictures are painted."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / "pipeline" / part).mkdir(parents=True)
        (folder / "pipeline" / part / "config.json").write_text(json.dumps({"part": part, "run": folder.name}))
    for step in steps:
        checkpoint = folder / f"checkpoint-{step:06d}"
        (checkpoint / "unet").mkdir(parents=True)
        weights = checkpoint / "unet" / "weights.safetensors"
        weights.write_text(f"{folder.name} {step}")
        known = {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)}
        (checkpoint / "manifest.json").write_text(json.dumps({"files": {"unet/weights.safetensors": known}}))
    (folder / "run.json").write_text(json.dumps({"status": "finished", "steps": steps[-1]}))
    rows = [{"step": step, "train_loss": 1 / step, "val_loss": 2 / step} for step in range(10, 30, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluated:
        evaluate(folder, [f"checkpoint-{step:06d}" for step in steps])
    return folder


def evaluate(folder: Path, checkpoints: list[str]) -> None:
    sweep = {"checkpoints": checkpoints, "guidance_scales": SCALES, "num_inference_steps": 4,
             "scheduler": "DDIMScheduler", "prompts": PROMPTS, "seeds": [7, 8]}  # fmt: skip
    rows = [{"checkpoint": name, "guidance_scale": scale} for name in checkpoints for scale in SCALES]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps({"cells": rows, "sweep": sweep}))
    for number, name in enumerate(checkpoints):
        for scale in SCALES:
            made = [cells.Cell(prompt, "", seed, scale, 4) for prompt, seed in zip(PROMPTS, (7, 8), strict=True)]
            pictures = np.stack([np.full((8, 8, 3), 60 * number + 20 * scale + n, np.uint8) for n in range(2)])
            cells.save_cells(folder, name, cells.weights_hash(folder / name), made, pictures)


AXIS_KEYS = ("columns", "rows", "tabs")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def show(**query: str | list[str]) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=20)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception
    return app


def component(app: AppTest, name: str) -> dict:
    """The data of the grid or the pair as the browser gets it."""
    found = [element.proto for element in app.get("bidi_component") if element.proto.component_name == name]
    return json.loads(found[0].json)[0] if found else {}


def grid_of(app: AppTest) -> dict:
    return component(app, "picture_grid")


def warnings(app: AppTest) -> str:
    return " ".join(element.value for element in app.warning).replace("\\", "")


def texts(app: AppTest) -> str:
    return " ".join(element.value for element in app.text)


def test_the_evaluations_grid_opens_at_once_and_shows_words_as_they_are(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show(tab=f"2. {EVIL}")
    grid = grid_of(app)
    assert grid["columns"] == ["1.5", "3"]
    assert grid["rows"] == ["checkpoint-000010", "checkpoint-000020"]
    assert [cell["alt"] for cell in grid["cells"]][1] == f"guidance scale 3, checkpoint-000010: {EVIL}"
    assert all(cell["source"].startswith("data:image/png;base64,") for cell in grid["cells"])
    assert len({cell["source"] for cell in grid["cells"]}) == 4
    assert "not drawn yet" not in texts(app)
    for element in [*app.markdown, *app.warning, *app.caption]:
        assert "<script" not in element.value


def test_axes_are_swapped_with_the_compared_pictures(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show(left="guidance scale 1.5, checkpoint-000020", right="guidance scale 3, checkpoint-000010")
    before = component(app, "picture_pair")
    assert before["left"]["label"] == "guidance scale 1.5, checkpoint-000020"
    assert (grid_of(app)["left"], grid_of(app)["right"]) == (
        [1, 0],
        [0, 1],
    )  # marked in the grid from the first look on
    next(button for button in app.button if button.label == "Swap").click().run()
    assert grid_of(app)["columns"] == ["checkpoint-000010", "checkpoint-000020"]
    after = component(app, "picture_pair")
    assert [after[side]["source"] for side in ("left", "right")] == [
        before[side]["source"] for side in ("left", "right")
    ]


def test_an_own_prompt_takes_the_place_of_evaluated_ones_and_one_button_varies_seeds_and_scales(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    report = {"checkpoint": "checkpoint-000010", "guidance_scale": 3.0}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation | {"report": report}))
    app = show(tab=f"2. {EVIL}")
    press(app, "4 seeds × 4 scales")
    grid = grid_of(app)
    assert (grid["columns"], grid["rows"]) == (["1.5", "3", "5", "7.5"], ["7", "8", "9", "10"])
    assert {cell["alt"].split(": ", 1)[1] for cell in grid["cells"]} == {EVIL}
    assert [app.text_input(key="_own_prompt").value, app.text_area(key="prompt").value] == [EVIL, EVIL]
    assert app.multiselect(key="checkpoint").value == ["checkpoint-000010"]

    app = show()
    app.text_input(key="_own_prompt").input("  a teal **flower** ").run()
    grid = grid_of(app)
    assert (grid["columns"], grid["rows"]) == (["1.5", "3"], ["checkpoint-000010"])
    assert [app.selectbox(key=key).value for key in AXIS_KEYS] == ["guidance_scale", "checkpoint", "none"]
    assert {cell["alt"].split(": ", 1)[1] for cell in grid["cells"]} == {"a teal **flower**"}
    assert any(button.label == "Draw 2 pictures" for button in app.button)
    press(app, "4 seeds × 4 scales")
    assert {cell["alt"].split(": ", 1)[1] for cell in grid_of(app)["cells"]} == {"a teal **flower**"}
    app.text_input(key="_own_prompt").input(" ").run()
    assert app.text_input(key="_own_prompt").value == "a teal **flower**"  # an empty prompt changes nothing
    assert not app.exception

    make_run(tmp_path / "outputs" / "two", evaluated=False)
    app = show(run=["one", "two"], rows="evaluated prompt", tabs="checkpoint")
    app.text_input(key="_own_prompt").input("a teal flower").run()
    assert [app.selectbox(key=key).value for key in AXIS_KEYS] == ["run", "prompt", "checkpoint"]
    assert (grid_of(app)["columns"], grid_of(app)["rows"]) == (["one", "two"], ["a teal flower"])
    press(app, "4 seeds × 4 scales")
    assert [app.selectbox(key=key).value for key in AXIS_KEYS] == ["guidance_scale", "seed", "run"]
    assert len(grid_of(app)["cells"]) == 16
    assert not warnings(app)


def press(app: AppTest, label: str) -> None:
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception


def test_an_axis_that_stood_elsewhere_changes_places_and_a_seed_takes_evaluated_prompts_off_the_tabs(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show()
    assert [app.selectbox(key=key).value for key in AXIS_KEYS] == ["guidance_scale", "checkpoint", "sample"]
    for place, name, expected in (
        ("columns", "checkpoint", ["checkpoint", "guidance_scale", "sample"]),
        ("tabs", "checkpoint", ["sample", "guidance_scale", "checkpoint"]),
        ("tabs", "sample", ["checkpoint", "guidance_scale", "sample"]),
        ("rows", "seed", ["checkpoint", "seed", "none"]),
        ("tabs", "prompt", ["checkpoint", "seed", "prompt"]),
        ("rows", "prompt", ["checkpoint", "prompt", "seed"]),
    ):
        app.selectbox(key=place).select(name).run()
        assert not app.exception
        assert [app.selectbox(key=key).value for key in AXIS_KEYS] == expected
        assert not warnings(app)
        assert grid_of(app)


def test_a_click_chooses_a_picture_and_the_ways_to_compare(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show()
    app.session_state["_chosen"] = {"right": (1, 1)}
    app.run()
    assert app.selectbox(key="right").value == "guidance scale 3, checkpoint-000020"
    assert grid_of(app)["right"] == [1, 1]
    pair = component(app, "picture_pair")
    assert pair["mode"] == "slider"
    assert pair["difference"]["label"].startswith("mean difference 90.0 of 255")  # 60 a checkpoint + 20 x 1.5 of scale
    app.session_state["_chosen"] = {"right": (99, 99)}  # nothing but what is shown
    app.run()
    assert component(app, "picture_pair")["left"]["label"] == pair["left"]["label"]


def test_the_pipeline_shows_the_pictures_of_the_checkpoint_with_its_weights(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    shutil.copy(run / "checkpoint-000020" / "unet" / "weights.safetensors", run / "pipeline" / "unet")
    (run / "pipeline" / "model_index.json").write_text("{}")
    grid = grid_of(show(checkpoint=["checkpoint-000020", "pipeline"]))
    assert [bool(cell["source"]) for cell in grid["cells"]] == [True] * 4
    assert grid["cells"][0]["source"] == grid["cells"][2]["source"]
    (run / "pipeline" / "unet" / "weights.safetensors").write_text("two 20")
    grid = grid_of(show(checkpoint=["checkpoint-000020", "pipeline"]))
    assert [bool(cell["source"]) for cell in grid["cells"]] == [True, True, False, False]


def test_a_new_grid_never_compares_a_picture_with_itself(tmp_path):
    run = make_run(tmp_path / "outputs" / "one", evaluated=False)
    app = show(checkpoint="checkpoint-000010", guidance_scale="1-3", num_inference_steps="4", prompt="a flower")
    assert not component(app, "picture_pair")
    for number in range(1, 4):  # as a job leaves them, one after the other
        made = [cells.Cell("a flower", guidance_scale=number, num_inference_steps=4)]
        weights = cells.weights_hash(run / "checkpoint-000010")
        cells.save_cells(run, "checkpoint-000010", weights, made, np.full((1, 8, 8, 3), number, np.uint8))
        app.run()
        assert not app.exception
        pair = component(app, "picture_pair")
        assert bool(pair) == (number > 1)
    assert pair["left"]["label"] == "guidance scale 1, checkpoint-000010"
    assert pair["right"]["label"] == "guidance scale 2, checkpoint-000010"
    asked = show(**dict(app.query_params) | {"left": "guidance scale 2, checkpoint-000010"})
    assert component(asked, "picture_pair")["right"]["label"] == "guidance scale 1, checkpoint-000010"


def test_a_picture_at_the_best_setting_is_compared_with_its_neighbour_at_first(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    report = {"checkpoint": "checkpoint-000020", "guidance_scale": 3.0, "num_inference_steps": 4}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation | {"report": report}))
    grid = grid_of(show())
    assert (grid["left"], grid["right"]) == ([1, 0], [1, 1])
    asked = grid_of(show(left="guidance scale 3, checkpoint-000020"))  # the best one is taken by the left side
    assert (asked["left"], asked["right"]) == ([1, 1], [1, 0])
    report["num_inference_steps"] = 30  # none of these pictures
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation | {"report": report}))
    grid = grid_of(show())
    assert (grid["left"], grid["right"]) == ([0, 0], [0, 1])


def test_each_picture_names_its_values_on_all_axes(tmp_path):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    app = show(
        tabs="seed", seed="4,7", tab="7", guidance_scale="1.5,3", checkpoint="checkpoint-000010", prompt="a flower"
    )
    names = [cell["alt"] for cell in grid_of(app)["cells"]]
    assert names == [f"guidance scale {scale}, checkpoint-000010, seed 7: a flower" for scale in ("1.5", "3")]


def test_the_same_axis_twice_and_several_values_without_an_axis(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    assert "stands on two axes" in warnings(show(columns="checkpoint"))
    assert "its own seed" in warnings(show(columns="seed"))
    app = show(columns="seed", tabs="none", guidance_scale="1.5,3")
    assert "guidance scale has 2 values and stands on no axis" in warnings(app)
    assert app.text_input(key="seed").value == "7-10"  # the other widgets stay


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"guidance_scale": "NaN"}, "guidance_scale NaN is neither a number nor a range"),
        ({"seed": "1e99", "tabs": "none", "columns": "seed", "guidance_scale": "1"}, "seed 1e99 is more than"),
        ({"num_inference_steps": "0"}, "num_inference_steps 0 is less than 1"),
        ({"guidance_scale": "1-100(+0.001)"}, "more than 100 values"),
        ({"columns": "x", "left": "row 9999999, column -1", "tab": "x", "page": "x"}, ""),
        ({"run": "../one"}, "outputs/ holds no ../one, which the page's address names"),
        ({"checkpoint": "../../etc/passwd"}, "one holds no ../../etc/passwd, which the page's address names"),
    ],
)
def test_a_hostile_url_gets_a_sentence_or_nothing(tmp_path, query, sentence):
    make_run(tmp_path / "outputs" / "one")
    app = show(**query)
    assert sentence in warnings(app)
    assert bool(warnings(app)) == bool(sentence)
    assert "passwd" not in texts(app) + str(grid_of(app))
    assert bool(grid_of(app)) != bool(sentence)


def test_a_shared_address_shows_the_same_pictures_after_newer_runs(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show()
    named = dict(app.query_params)
    assert (named["run"], named["checkpoint"]) == ("one", ["checkpoint-000010", "checkpoint-000020"])
    assert [named[key] for key in AXIS_KEYS] == ["guidance scale", "checkpoint", "evaluated prompt"]
    assert (named["guidance_scale"], named["tab"]) == ("1.5,3", "1. a red flower")
    for number, name in enumerate(("two", "three"), start=1):
        make_run(tmp_path / "outputs" / name, steps=(10, 30))
        os.utime(tmp_path / "outputs" / name / "run.json", (2e9 + number, 2e9 + number))
    assert grid_of(show(**named)) == grid_of(app)
    assert show().query_params["run"] == "three"
    app = show(**named)
    app.run()
    assert dict(app.query_params) == named  # also what equals a default


def test_a_run_that_is_gone_gets_a_sentence_and_no_other_runs_pictures(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show(run="gone")
    for _ in range(2):
        assert "outputs/ holds no gone, which the page's address names" in warnings(app)
        assert not grid_of(app)
        app.run()
    app.multiselect(key="run").set_value(["one"]).run()
    assert not warnings(app)
    assert grid_of(app)["rows"] == ["checkpoint-000010", "checkpoint-000020"]


def make_student(folder: Path) -> Path:
    """A run of distill_unet.py that was not evaluated."""
    run = make_run(folder, evaluated=False)
    (run / "pipeline" / "model_index.json").write_text("{}")
    schedule = {"_class_name": "DDIMScheduler", "_student_steps": 2}
    (run / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return run


def test_a_student_is_offered_without_guidance_and_refused_with_it(tmp_path):
    make_student(tmp_path / "outputs" / "turbo")
    app = show()
    assert grid_of(app)["columns"] == ["1"]
    press(app, "4 seeds")
    assert (grid_of(app)["columns"], len(grid_of(app)["rows"])) == (["1"], 4)
    assert "4 of 4 pictures are not drawn yet" in texts(app)
    first, second = (cell["note"] for cell in grid_of(show(guidance_scale="1,3", checkpoint="pipeline"))["cells"])
    assert first == "not drawn yet"
    assert second == "guidance_scale 3: the model is a student, which has learnt guidance; give guidance_scale 1"


def test_ten_thousand_cells_are_shown_in_pages_and_ask_first(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    wide = {
        "columns": "guidance scale",
        "rows": "seed",
        "tabs": "none",
        "guidance_scale": "1-100",
        "prompt": "a flower",
    }
    app = show(**wide, seed="1-100")
    assert "10,000 of 10,000 pictures are not drawn yet" in texts(app)
    assert len(grid_of(app)["cells"]) == 100
    draw = next(button for button in app.button if button.label.startswith("Draw"))
    assert draw.disabled
    app.checkbox[0].check().run()
    assert not next(button for button in app.button if button.label.startswith("Draw")).disabled
    app.text_input(key="seed").set_value("1-99").run()  # another grid asks anew
    assert next(button for button in app.button if button.label.startswith("Draw 9,900")).disabled
    assert "10,200 pictures is more than 10,000" in warnings(
        show(**wide | {"tabs": "steps"}, seed="1-51", num_inference_steps="4,5")
    )
    page = show(**wide, seed="1-100", page="3–3")
    assert grid_of(page)["rows"] == ["3"]


def test_a_later_page_names_the_rows_of_the_whole_grid(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    axes = {"columns": "guidance scale", "rows": "seed", "tabs": "none", "prompt": "a flower"}
    shown = grid_of(show(**axes, guidance_scale="1-100", seed="1-2", page="2–2"))
    assert shown["rows"] == ["2"]
    assert [(cell["row"], cell["column"]) for cell in shown["cells"]] == [(1, column) for column in range(100)]


def test_half_written_checkpoints_are_not_offered(tmp_path):
    run = make_run(tmp_path / "outputs" / "one", steps=(10, 20, 30), evaluated=False)
    (run / "checkpoint-000020" / "unet" / "weights.safetensors").write_text("cut")
    app = show()
    assert app.multiselect(key="checkpoint").options == ["checkpoint-000010", "checkpoint-000030", "pipeline"]
    assert grid_of(app)["rows"] == ["checkpoint-000010", "checkpoint-000030"]
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(run / "pipeline" / "unet")
    assert "no complete checkpoint yet" in texts(show())


def test_a_run_deleted_while_shown(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two")
    app = show(run="one")
    shutil.rmtree(run / "checkpoint-000010")
    app.run()
    assert grid_of(app)["rows"] == ["checkpoint-000020"]
    shutil.rmtree(run)
    app.run()
    assert not app.exception


def test_two_runs_stand_in_columns_and_their_curves_beside(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two", steps=(10, 30))
    app = show(run="one")
    app.multiselect(key="run").set_value(["one", "two"]).run()
    grid = grid_of(app)
    assert grid["columns"] == ["one", "two"]
    assert grid["rows"] == ["best", "last"]
    assert "holds no complete" not in str(grid["cells"])
    chart = json.loads(app.get("vega_lite_chart")[0].proto.spec)
    points = next(layer for layer in chart["layer"] if layer["mark"]["type"] == "point")
    lines = next(layer for layer in chart["layer"] if layer["mark"]["type"] == "line")
    assert lines["encoding"]["color"]["scale"] == points["encoding"]["stroke"]["scale"]  # a point has its line's color
    assert any(param["name"] == "mark" for param in chart.get("params", []) + points.get("params", []))
    app.multiselect(key="run").set_value(["two"]).run()
    assert grid_of(app)["rows"] == ["checkpoint-000010", "checkpoint-000030"]
    assert grid_of(app)["columns"] == ["1.5", "3"]


def test_runs_with_different_steps_align_by_best_last_or_nearest_step(tmp_path):
    make_run(tmp_path / "outputs" / "one", steps=(10, 20))
    two = make_run(tmp_path / "outputs" / "two", steps=(14, 30))
    for name in ("one", "two"):
        (tmp_path / "outputs" / name / "pipeline" / "model_index.json").write_text("{}")
    known = json.loads((two / "evaluation" / "evaluation.json").read_text())
    report = {"report": {"checkpoint": "checkpoint-000014", "guidance_scale": 3.0}}
    (two / "evaluation" / "evaluation.json").write_text(json.dumps(known | report))
    query = {"run": ["one", "two"], "guidance_scale": "3"}
    shown = ["best", "checkpoint-000010", "checkpoint-000020"]
    grid = grid_of(show(**query, checkpoint=shown))
    assert (grid["columns"], grid["rows"]) == (["one", "two"], shown)
    assert [cell["under"] for cell in grid["cells"]] == [
        *("pipeline", "checkpoint-000014"),
        *("", "nearest step: checkpoint-000014"),
        *("", "nearest step: checkpoint-000014"),
    ]
    assert all(cell["source"] for cell in grid["cells"] if cell["under"] != "pipeline")
    assert not any("no complete" in cell["note"] for cell in grid["cells"])
    (two / "checkpoint-000014" / "manifest.json").unlink()
    rows = grid_of(show(**query, checkpoint=["best", "checkpoint-000010"]))["cells"]
    assert [cell["under"] for cell in rows][1::2] == ["pipeline", "nearest step: checkpoint-000030"]


def test_one_prompt_can_be_drawn_alone(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    app = show(guidance_scale="1.5,3,5", tab=f"2. {EVIL}")
    assert "4 of 12 pictures are not drawn yet" in texts(app)
    next(button for button in app.button if button.label == "Draw this prompt (2)").click().run()
    deadline = time.monotonic() + 60
    while "not drawn yet" in str(grid_of(app)) and time.monotonic() < deadline:
        time.sleep(0.1)
        app.run()
    assert {place.cell.prompt for place in painter} == {EVIL}
    assert len(painter) == 2
    app.run()
    assert "2 of 12 pictures are not drawn yet" in texts(app)


def test_a_chosen_point_chooses_its_checkpoint(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show(checkpoint="checkpoint-000010")
    assert grid_of(app)["rows"] == ["checkpoint-000010"]
    app.session_state["_point"] = "checkpoint-000020"  # what a click leaves
    app.run()
    assert grid_of(app)["rows"] == ["checkpoint-000010", "checkpoint-000020"]
    app = show(rows="steps", checkpoint="checkpoint-000010")
    app.session_state["_point"] = "checkpoint-000020"
    app.run()
    assert app.multiselect(key="checkpoint").value == ["checkpoint-000020"]


def click(app: AppTest, metric: str, *checkpoints: str) -> None:
    """Select points of a curve, as a click in the browser does, or none."""
    chart = next(one.proto for one in app.get("vega_lite_chart") if one.proto.id.endswith(f"_curve_{metric}"))
    points = [{"run": "one", "checkpoint": name} for name in checkpoints]
    states = app._tree.get_widget_states()
    states.widgets.add(id=chart.id, string_value=json.dumps({"selection": {"mark": points}}))
    app._run(states)
    assert not app.exception


def test_each_click_on_a_curve_chooses_its_own_checkpoint(tmp_path):
    make_run(tmp_path / "outputs" / "one", steps=(10, 20, 30))
    app = show(rows="steps", checkpoint="checkpoint-000030", metric=["train_loss", "val_loss"])
    for metric, clicked, expected in (
        ("train_loss", "checkpoint-000010", "checkpoint-000010"),
        ("val_loss", "checkpoint-000020", "checkpoint-000020"),
        ("train_loss", "checkpoint-000020", "checkpoint-000020"),
        ("val_loss", "checkpoint-000010", "checkpoint-000010"),
        ("val_loss", None, "checkpoint-000010"),  # a click beside all points
    ):
        click(app, metric, *filter(None, [clicked]))
        assert app.multiselect(key="checkpoint").value == [expected]


def test_a_model_that_was_not_trained_here_gets_no_command_and_a_name_with_blanks_gets_quotes(tmp_path):
    theirs = make_run(tmp_path / "outputs" / "theirs", evaluated=False)
    (theirs / "pipeline" / "model_index.json").write_text("{}")
    (theirs / "run.json").unlink()
    app = show(run="theirs")
    assert "This model was not trained here" in texts(app)
    assert "status" not in texts(app)
    assert not app.code
    make_run(tmp_path / "outputs" / "my run", evaluated=False)
    app = show(run="my run")
    assert app.code[0].value == "python scripts/evaluate_checkpoints.py --model 'outputs/my run'"


def progress(app: AppTest) -> str:
    return " ".join(element.proto.text for element in app.get("progress"))


def test_the_time_left_counts_no_loading_and_a_batch_is_stopped_within(tmp_path, painter, monkeypatch):
    run = make_run(tmp_path / "outputs" / "one")
    jobs = sys.modules["helpers.drawing_jobs"]
    loads = []

    def load(model):
        start = time.monotonic()
        time.sleep(0.05)
        loads.append(time.monotonic() - start)

    monkeypatch.setattr(jobs, "load_pipeline", load)
    cell = cells.Cell("a flower", num_inference_steps=4)
    planned = cells.plan(run, "checkpoint-000010", cell, [cells.Axis("seed", tuple(range(48)))])
    painter.go.clear()
    start = time.monotonic()
    job = jobs.GridJob.start("key", planned)
    while len(painter) < 44:
        job.look()
        time.sleep(0.02)
    assert (job.done, len(loads)) == (40, 11)
    assert jobs.running_job("key") is job
    assert 0 < job.drawing_s <= time.monotonic() - start - sum(loads)
    assert job.seconds_left() == job.drawing_s / 40 * 8
    job.stopped.set()
    assert job.finished.wait(30)  # although the batch is not finished
    assert (job.done, job.error, jobs.running_job("key")) == (40, "", None)


class Drawn(list):
    """The cells that were painted. From the 41st on, painting waits until `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()


@pytest.fixture
def painter(monkeypatch):
    """Pictures painted instead of drawn; the model in memory is none."""
    drawn = Drawn()

    def paint(pipeline, places, watch):
        drawn.extend(places)
        while len(drawn) > 40 and not drawn.go.wait(0.02):
            watch(1, 4, None)
        return np.stack([np.full((8, 8, 3), place.cell.num_inference_steps, np.uint8) for place in places])

    show()  # puts the dashboard's folder on the path
    monkeypatch.setattr(cells, "_draw", paint)
    monkeypatch.setattr(sys.modules["helpers.drawing_jobs"], "load_pipeline", lambda model: None)
    yield drawn
    drawn.go.set()


def test_missing_pictures_are_announced_and_drawn(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    app = show(guidance_scale="1.5,3,5", num_inference_steps="4")
    assert "4 of 12 pictures are not drawn yet" in texts(app)
    assert [bool(cell["source"]) for cell in grid_of(app)["cells"]] == [True, True, False] * 2
    next(button for button in app.button if button.label == "Draw all 4 pictures").click().run()
    deadline = time.monotonic() + 10
    while "not drawn yet" in str(grid_of(app)) and time.monotonic() < deadline:
        time.sleep(0.1)
        app.run()
    assert all(cell["source"] for cell in grid_of(app)["cells"])
    assert len(painter) == 4
    assert "not drawn yet" not in texts(show(guidance_scale="1.5,3,5"))


def test_a_stopped_grid_goes_on_where_it_stopped(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    query = {"columns": "seed", "tabs": "none", "seed": "1-50", "guidance_scale": "2", "prompt": "a flower"}
    app = show(**query)
    painter.go.clear()
    next(button for button in app.button if button.label == "Draw 100 pictures").click().run()
    while len(painter) < 44:
        time.sleep(0.02)
    app.run()
    again = show(**dict(app.query_params))  # a reload: another session
    assert re.search("4[0-4] of 100 drawn", progress(again))
    assert not [button for button in again.button if button.label.startswith("Draw")]
    next(button for button in again.button if button.label == "Stop").click().run()
    assert "stopping" in progress(again) or "pictures are not drawn yet" in texts(again)
    for thread in threading.enumerate():
        if thread.name == "grid":
            thread.join(60)
    made = len(list((tmp_path / "outputs" / "one" / "cells").glob("[0-9a-f]*.png"))) - 8
    assert 40 <= made < 100
    app = show(**query)
    assert f"{100 - made} of 100 pictures are not drawn yet: about" in texts(app)


def test_a_model_that_cannot_be_loaded_gets_a_sentence(tmp_path, monkeypatch):
    make_run(tmp_path / "outputs" / "one")
    app = show(guidance_scale="9")
    next(button for button in app.button if button.label.startswith("Draw")).click().run()
    deadline = time.monotonic() + 60  # loading torch takes long on a busy machine
    while not warnings(app) and time.monotonic() < deadline:
        time.sleep(0.1)
        app.run()
    assert "outputs/one/checkpoint-000010 is neither a run folder, a checkpoint nor a pipeline" in warnings(app)
    assert next(button for button in app.button if button.label.startswith("Draw"))  # it can be tried again


def test_what_is_shown_can_be_downloaded(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    axes = [
        cells.Axis("guidance_scale", (1.5, 3.0, 9.0)),
        cells.Axis("sample", tuple(zip(PROMPTS, (7, 8), strict=True))),
    ]
    places = cells.plan(run, "checkpoint-000010", cells.Cell("x", num_inference_steps=4), axes)
    with zipfile.ZipFile(io.BytesIO(cells.zip_pictures(places))) as archive:
        rows = json.loads(archive.read("cells.json"))
        assert [row["file"] for row in rows] == [f"tab1-row{r}-column{c}.png" for r in (1, 2) for c in (1, 2)]
        picture = Image.open(io.BytesIO(archive.read(rows[3]["file"])))
    assert json.loads(picture.info["parameters"])["prompt"] == rows[3]["prompt"] == EVIL


def test_a_grid_with_labels():
    one = Image.new("RGB", (16, 16), "red")
    grid = labelled_grid([[one, None], [one, one]], ["row", "ряд 🌸 " * 99], ["1", "a long label " * 99], "title")
    colors = np.asarray(grid).reshape(-1, 3)
    assert (colors == (255, 0, 0)).all(axis=1).sum() == 3 * 96 * 96
    assert grid.width < 500


def test_labels_in_any_script(monkeypatch):
    """A label is drawn in letters that a font has; else its number is, and the file spells it. Never question marks or boxes."""
    labels = ["красная роза", "赤いバラ", "a “red” rose — at dawn", "a 赤 rose"]
    one = Image.new("RGB", (16, 16), "red")
    monkeypatch.setattr(png, "_font_files", lambda: ())  # no font here
    png._font_for.cache_clear()
    assert [png.lettered(label, 7)[0] for label in labels] == [
        "[7]",
        "[7]",
        'a "red" rose - at dawn',
        "[7] a rose",
    ]
    assert png.lettered("červená růže, café")[0] == "cervená ruze, café"  # Latin-1 stays
    plain = png.labelled_grid([[one] * 2] * 2, ["赤いバラ", "plain"], ["赤いバラ", "красная роза"], "title")
    saved = Image.open(io.BytesIO(png.grid_png(plain)))
    assert saved.info["legend"] == "[1] 赤いバラ\n[2] красная роза"
    monkeypatch.undo()
    png._font_for.cache_clear()
    if png._font_for(frozenset(labels[0])):  # of matplotlib, which MLflow brings
        assert png.lettered(labels[0])[0] == labels[0]
        rows = [labels[0], "plain"]
        assert "legend" not in png.labelled_grid([[one]] * 2, rows, [labels[2]]).info


@given(st.integers(0, 255), st.integers(0, 255), st.integers(1, 9), st.integers(1, 9))
def test_the_difference_of_two_pictures(one, two, side, other):
    left, right = np.full((side, side, 3), one, np.uint8), np.full((other, other, 3), two, np.uint8)
    stretched, mean = difference(left, right)
    assert mean == abs(one - two)
    assert stretched.shape == (max(side, other),) * 2 + (3,)
    assert (stretched == (255 if one != two else 0)).all()
    assert difference(right, left)[1] == mean
