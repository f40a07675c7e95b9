"""The page Playground: a picture drawn step by step, its steps, the nearest training images, strangers, vanishing files."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest
from transformers import CLIPTokenizer

import test_compare
from t2i.models import learn_bpe
from t2i.pictures import cells
from t2i.pictures.png import png_bytes, read_parameters
from test_compare import EVIL
from test_evaluation_wall import evaluated_run, paint

APP = Path(__file__).resolve().parents[1] / "dashboard" / "streamlit_app.py"
DRAW, OTHER = "Draw", "Draw with a random seed"
ALONE = """  # the page as it stands where there is a model and nothing else: none of these packages, no run.json
import json, sys, time
for name in ("mlflow", "datasets", "accelerate", "deepspeed", "sagemaker", "torchmetrics"):
    sys.modules[name] = None
from streamlit.testing.v1 import AppTest
app = AppTest.from_file(sys.argv[1], default_timeout=120)
app.query_params["num_inference_steps"] = "7"
app.switch_page("views/playground.py").run()
assert "torch" not in sys.modules
next(button for button in app.button if button.label == "Draw").click().run()
while not app.get("download_button"):
    assert not app.exception and not app.warning, (app.exception, [one.value for one in app.warning])
    time.sleep(0.2)
    app.run()
found = [one.proto.json for one in app.get("bidi_component") if one.proto.component_name == "scrubber"]
print([step["label"] for step in json.loads(found[0])[0]["steps"]], [caption.value for caption in app.caption][-1])
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(folder: Path, **settings) -> Path:
    """A run with two checkpoints and a finished pipeline, in files that stand for weights."""
    run = test_compare.make_run(folder, **settings)
    (run / "pipeline" / "model_index.json").write_text("{}")
    return run


def presets(app: AppTest):
    return app.get("button_group")[0]


def show(**query: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=120)
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page("views/playground.py").run()
    assert not app.exception
    return app


def press(app: AppTest, label: str) -> AppTest:
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception
    return app


def wait(app: AppTest, ended) -> AppTest:
    """Look again until `ended`, as the page does by itself in a browser."""
    deadline = time.monotonic() + 120
    while not ended(app):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        app.run()
        assert not app.exception
    return app


def has_picture(app: AppTest) -> bool:
    return bool(app.get("download_button"))


def texts(app: AppTest) -> str:
    return " ".join(element.value for element in [*app.text, *app.caption])


def warnings(app: AppTest) -> str:
    return " ".join(element.value for element in app.warning).replace("\\", "")


def steps(app: AppTest) -> list[str]:
    """The labels of the slider below the picture."""
    return [one["label"] for one in test_compare.component(app, "scrubber").get("steps", [])]


def captions(app: AppTest) -> list[str]:
    return [image.proto.imgs[0].caption for image in app.get("image")]


class Painter:
    """Paints instead of drawing: a gray that grows with the steps. Holds at `held` until `go` is set."""

    def __init__(self) -> None:
        self.places: list[cells.PlannedCell] = []
        self.at_once = self.most = 0
        self.go = threading.Event()
        self.go.set()

    def draw(self, pipeline, places, watch=None):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            count = places[0].cell.num_inference_steps
            for step in range(1, count + 1):
                watch(step, count, lambda step=step: np.full((1, 8, 8, 3), step, np.uint8))
                if step > 1:
                    while not self.go.is_set():
                        time.sleep(0.01)
                        watch(step, count, lambda: np.zeros((1, 8, 8, 3), np.uint8))
            self.places += places
            return np.full((len(places), 8, 8, 3), 200, np.uint8)
        finally:
            self.at_once -= 1


@pytest.fixture
def painter(monkeypatch):
    painter = Painter()
    show()  # puts the dashboard's folder on the path
    monkeypatch.setattr(cells, "_draw", painter.draw)
    monkeypatch.setattr(sys.modules["helpers.drawing_jobs"], "load_pipeline", lambda model: None)
    yield painter
    painter.go.set()


def test_one_arrives_at_the_evaluated_settings_and_draws_with_one_button(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one")
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation | {"report": {"guidance_scale": 3.0}}))
    (run / "config.yaml").write_text("train_unet: {validation_prompts: ['a **red** flower']}")
    app = show()
    assert app.text_area(key="prompt").value == "a **red** flower"
    assert app.number_input(key="guidance_scale").value == 3.0
    assert app.selectbox(key="checkpoint").value == "pipeline"
    assert "not drawn yet" in texts(app)
    wait(press(app, DRAW), has_picture)
    cell = painter.places[0].cell
    assert (cell.prompt, cell.guidance_scale, cell.seed) == ("a **red** flower", 3.0, 7)
    assert steps(app) == ["step 1", "step 2", "step 3", "finished"]  # of 4, as evaluated
    again = show()  # another visitor with the same URL
    assert has_picture(again)
    assert steps(again) == steps(app)
    assert len(painter.places) == 1


def test_what_the_url_says_is_drawn_and_the_file_carries_it(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    query = {"run": "one", "checkpoint": "checkpoint-000010", "prompt": EVIL, "negative_prompt": "**n**", "seed": "41",
             "guidance_scale": "2.5", "num_inference_steps": "50", "scheduler": "dpm++"}  # fmt: skip
    app = wait(press(show(**query), DRAW), has_picture)
    assert steps(app) == [f"step {step}" for step in (1, 11, 21, 30, 40)] + ["finished"]
    place = painter.places[0]
    assert place.checkpoint == "checkpoint-000010"
    assert place.cell == cells.Cell(EVIL, "**n**", 41, 2.5, 50, "DPMSolverMultistepScheduler")
    for element in [*app.markdown, *app.warning, *app.caption]:
        assert "script" not in element.value
    assert read_parameters(place.path)["prompt"] == EVIL
    file = Image.open(io.BytesIO(png_bytes(np.zeros((8, 8, 3), np.uint8), {"prompt": EVIL})))
    assert json.loads(file.info["parameters"]) == {"prompt": EVIL}


def test_a_preset_fills_the_form_and_shows_when_the_form_is_one(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    app = show()
    assert presets(app).value is None  # as evaluated: DDIM, 4 steps
    assert presets(show(scheduler="unipc", num_inference_steps="3", guidance_end="0.3")).value == "draft"
    presets(app).set_value("fast").run()
    assert not app.exception
    assert (app.selectbox(key="scheduler").value, app.number_input(key="num_inference_steps").value) == ("unipc", 8)
    assert app.number_input(key="guidance_end").value == 0.5
    place = wait(press(app, DRAW), has_picture) and painter.places[0]
    assert (place.cell.scheduler, place.cell.num_inference_steps) == ("UniPCMultistepScheduler", 8)
    assert place.cell.guidance_end == 0.5
    app.number_input(key="num_inference_steps").set_value(9)
    app = wait(press(app, DRAW), lambda app: len(painter.places) == 2)
    assert painter.places[1].cell.num_inference_steps == 9
    assert presets(app).value is None


@pytest.mark.parametrize(
    "query",
    [
        {"guidance_scale": "NaN", "seed": "1e99", "num_inference_steps": "-1"},
        {"guidance_scale": "inf", "seed": "-5", "num_inference_steps": "1000", "scheduler": "<x>", "nearest": "maybe"},
        {"guidance_scale": "1e308", "seed": str(2**63), "num_inference_steps": "", "run": ""},
        {"prompt": "\x00\u202e" + "a" * 5000, "negative_prompt": "n" * 5000, "seed": "0x10"},
    ],
)  # fmt: skip
def test_a_hostile_url_falls_back_to_what_is_allowed(tmp_path, painter, query):
    make_run(tmp_path / "outputs" / "one")
    (tmp_path / "etc").mkdir()
    app = wait(press(show(**query), DRAW), has_picture)
    place = painter.places[0]
    assert (place.run, place.checkpoint) == (Path("outputs/one"), "pipeline")
    assert 0 <= place.cell.guidance_scale <= 50
    assert 1 <= place.cell.num_inference_steps <= 50
    assert len(place.cell.prompt) <= 1000
    assert len(place.cell.negative_prompt) <= 1000
    assert not warnings(app)
    assert list((tmp_path / "etc").iterdir()) == []


def test_the_address_names_every_choice_and_keeps_its_meaning(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    app = show()
    named = dict(app.query_params)
    assert (named["run"], named["seed"], named["num_inference_steps"]) == ("one", "7", "4")
    assert {"checkpoint", "prompt", "guidance_scale", "scheduler", "guidance_end", "guidance_rescale"} <= set(named)
    make_run(tmp_path / "outputs" / "newer", steps=(30,))
    os.utime(tmp_path / "outputs" / "newer" / "run.json", (2e9, 2e9))
    again = show(**named)
    assert (again.selectbox(key="run").value, dict(again.query_params)) == ("one", named)
    assert show().selectbox(key="run").value == "newer"
    gone = show(**named | {"checkpoint": "checkpoint-000005"})
    assert "outputs/one holds no checkpoint-000005, which the page's address names" in warnings(gone)
    for _ in range(2):
        assert not [button for button in gone.button if button.label == DRAW]
        gone.run()


def test_it_opens_on_the_best_of_the_runs_that_can_be_compared(tmp_path):
    for number, (name, distance, images) in enumerate((("far", 90.0, "a"), ("near", 40.0, "a"), ("other", 1.0, "b"))):
        run = make_run(tmp_path / "outputs" / name)
        known = json.loads((run / "evaluation" / "evaluation.json").read_text())
        judged = {"network": "lite0", "kernel_distance": distance}
        known["report"] = {"checkpoint": "checkpoint-000010", "guidance_scale": 1.5, "judge": judged}
        (run / "evaluation" / "evaluation.json").write_text(json.dumps(known))
        (run / "run.json").write_text(json.dumps({"status": "finished", "identity": {"dataset_hash": images}}))
        os.utime(run / "run.json", (2e9 - number, 2e9 - number))
    app = show()
    assert (app.selectbox(key="run").value, app.selectbox(key="checkpoint").value) == ("near", "checkpoint-000010")
    assert app.number_input(key="guidance_scale").value == 1.5


def test_choices_and_pictures_survive_other_pages_and_a_reload(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    app = wait(press(show(seed="3", prompt="a **red** flower"), DRAW), has_picture)
    assert "seed 3 · guidance scale 1.5 · 4 steps of ddim · one/pipeline" in texts(app)
    app.number_input(key="seed").set_value(4)
    wait(press(app, DRAW), has_picture)
    app.text_area(key="prompt").set_value("another flower").run()
    assert not has_picture(app)
    assert "not drawn yet" in texts(app)
    assert "an earlier one: its prompt or settings differ" in warnings(app)
    assert "seed 4" in texts(app)  # of the earlier picture
    app.query_params.clear()
    app.switch_page("views/runs.py").run()
    app.query_params.clear()
    app.switch_page("views/playground.py").run()
    assert not app.exception
    assert (app.text_area(key="prompt").value, app.number_input(key="seed").value) == ("another flower", 4)
    assert {"Seed 3", "Seed 4"} <= {button.label for button in app.button}
    again = show(**dict(app.query_params))  # a reload: another session
    assert (again.text_area(key="prompt").value, again.number_input(key="seed").value) == ("another flower", 4)
    press(again, "Seed 3")
    assert has_picture(again)
    assert again.text_area(key="prompt").value == "a **red** flower"


def test_changed_settings_do_not_end_a_drawing_and_draw_replaces_it(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    painter.go.clear()
    app = wait(press(show(seed="1"), DRAW), lambda app: "step 2 of 4" in progress(app))
    app.number_input(key="seed").set_value(2).run()
    assert "The picture being drawn has earlier settings" in texts(app)
    assert "step 2 of 4" in progress(app)
    painter.go.set()
    wait(app, lambda app: "not drawn yet" in texts(app))
    assert "seed 1 ·" in texts(app)  # the earlier picture, which is finished
    assert [place.cell.seed for place in painter.places] == [1]
    wait(press(app, DRAW), has_picture)
    assert [place.cell.seed for place in painter.places] == [1, 2]


def test_pndm_with_too_few_steps_gets_a_sentence(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    app = press(show(scheduler="pndm", num_inference_steps="2"), DRAW)
    assert "too few for pndm" in warnings(app)
    assert app.number_input(key="num_inference_steps").value == 2  # and the form stays


def test_a_student_takes_no_guidance(tmp_path, painter):
    test_compare.make_student(tmp_path / "outputs" / "turbo")
    app = show()
    assert app.number_input(key="guidance_scale").value == 1
    assert links(app, "Make a grid of this")["guidance_scale"] == ["1"]
    app = press(show(guidance_scale="3"), DRAW)
    assert "has learnt guidance; give guidance_scale 1" in warnings(app)
    assert not painter.places


def test_only_schedulers_that_are_right_for_the_model_are_offered(tmp_path, painter):
    folder = make_run(tmp_path / "outputs" / "flowers") / "pipeline" / "scheduler"
    folder.mkdir(exist_ok=True)
    schedule = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    (folder / "scheduler_config.json").write_text(json.dumps(schedule))
    app = show(scheduler="heun")
    offered = next(box for box in app.selectbox if box.label == "Scheduler")
    assert "heun" not in offered.options
    assert {"ddim", "unipc", "euler", "pndm"} <= set(offered.options)
    assert offered.value == "ddim"
    place = cells.plan(tmp_path / "outputs" / "flowers", "checkpoint-000010", cells.Cell("x", scheduler="heun"), [])[0]
    assert "needs some of the image in the last noise level" in place.problem


@pytest.mark.parametrize("kept", [["tokenizer.json"], ["vocab.json", "merges.txt"]], ids=["one file", "older files"])
def test_a_prompt_that_the_model_reads_in_part_is_said(tmp_path, painter, kept):
    vocab, merges = learn_bpe(["a red flower with five petals"])
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=5)
    tokenizer("a", truncation=True, padding="max_length")  # as training leaves it: cut and padded
    folder = make_run(tmp_path / "outputs" / "flowers") / "pipeline" / "tokenizer"
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    for path in folder.iterdir():
        if path.name not in {"tokenizer_config.json", *kept}:
            path.unlink()
    assert not warnings(show(prompt="a red flower"))
    said = warnings(show(prompt="a red flower with five petals"))
    assert 'has 8 tokens, and the model reads 5: "with five petals" is cut off' in said
    assert warnings(show(prompt="a red flower" + " with five petals" * 20)).endswith("is cut off; shorten the prompt")


def test_two_sessions_draw_one_after_the_other(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    painter.go.clear()
    one, two = press(show(seed="1"), DRAW), press(show(seed="2"), DRAW)
    wait(one, lambda app: "step 2 of 4" in progress(app))
    two.run()
    assert "waiting: another picture" in progress(two)
    assert captions(one) == [""]  # the preview
    painter.go.set()
    wait(one, has_picture)
    wait(two, has_picture)
    assert painter.most == 1
    assert {place.cell.seed for place in painter.places} == {1, 2}


def progress(app: AppTest) -> str:
    return " ".join(element.proto.text for element in app.get("progress"))


def test_a_stopped_picture_leaves_nothing_and_the_next_one_comes(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one", evaluated=False)
    painter.go.clear()
    app = wait(press(show(num_inference_steps="4"), DRAW), lambda app: "step 2 of 4" in progress(app))
    press(app, "Stop")
    wait(app, lambda app: "not drawn yet" in texts(app))
    assert not list((run / "cells").glob("*.png"))
    press(app, DRAW)
    wait(app, lambda app: "step 2 of 4" in progress(app))
    app.number_input(key="seed").set_value(5)
    press(app, DRAW)  # another one instead of that
    painter.go.set()
    wait(app, has_picture)
    assert [place.cell.seed for place in painter.places] == [5]


def test_a_random_seed_is_drawn_and_the_history_brings_settings_back(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two")
    app = wait(press(show(run="one", seed="3"), DRAW), has_picture)
    press(app, OTHER)
    wait(app, has_picture)
    seed = app.number_input(key="seed").value
    assert seed != 3
    app.selectbox(key="run").set_value("two").run()
    assert "not drawn yet" in texts(app)
    assert app.number_input(key="seed").value == seed  # only what the run decides is set anew
    press(app, "Seed 3")
    assert app.selectbox(key="run").value == "one"
    assert app.number_input(key="seed").value == 3
    assert has_picture(app)
    for number in range(20, 40):
        app.number_input(key="seed").set_value(number)
        wait(press(app, DRAW), has_picture)
    assert len([button for button in app.button if button.label.startswith("Seed")]) == 12


# --- As you type -----------------------------------------------------------------------------------------------------


def type_text(app: AppTest, text: str) -> AppTest:
    """Type a text and pause, without sending it, as assets/typing.js reports it."""
    app.session_state["_typed"] = (text, app.text_area(key="prompt").value)
    app.run()
    assert not app.exception
    return app


def drafts(app: AppTest) -> str:
    return " ".join(one.value for one in app.caption if "draft" in one.value.lower()).replace("\\", "")


def test_the_page_opens_with_the_first_reported_picture(tmp_path, painter):
    reported = [("a reported flower", 1_000_007), ("another", 1_000_008)]
    prompts, seeds = zip(*reported, strict=True)
    paint(evaluated_run(tmp_path / "outputs" / "one", prompts=prompts, seeds=seeds), reported)
    app = show()
    assert app.text_area(key="prompt").value == "a reported flower"
    assert app.number_input(key="seed").value == 1_000_007
    assert has_picture(app)
    assert not painter.places  # The evaluation has drawn it.


@pytest.mark.parametrize(("scale", "is_said"), [("1", True), ("1.5", False)])
def test_a_negative_prompt_without_guidance_is_said(tmp_path, painter, scale, is_said):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    assert ("negative prompt has no effect" in warnings(show(guidance_scale=scale, negative_prompt="n"))) == is_said


def test_a_typed_text_gets_a_draft_that_nothing_stores(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one", evaluated=False)
    app = show(seed="3", guidance_scale="2", negative_prompt="n")
    assert not drafts(app)
    type_text(app, "a blue flower")
    assert "A draft of “a blue flower” in 3 steps. Enter draws the full picture." in drafts(app)
    assert app.text_area(key="prompt").value != "a blue flower"
    assert [place.cell for place in painter.places] == [
        cells.Cell("a blue flower", "n", 3, 2.0, 3, "UniPCMultistepScheduler", 0.3)
    ]
    assert not list((run / "cells").glob("*.png"))
    app.run()  # nothing is drawn twice
    app.text_area(key="prompt").set_value("a blue flower").run()  # the field is left
    assert "A draft of “a blue flower”" in drafts(app)
    assert len(painter.places) == 1
    wait(press(app, DRAW), has_picture)
    assert not drafts(app)
    assert painter.places[1].cell.num_inference_steps > 3


def test_a_newer_text_and_the_full_picture_replace_a_draft_that_is_being_drawn(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    app = show()
    painter.go.clear()
    for text in ("a", "a b", "a blue"):
        type_text(app, text)
        assert "The draft is waiting" in drafts(app)
    painter.go.set()
    wait(app, lambda app: "A draft of “a blue”" in drafts(app))
    assert [place.cell.prompt for place in painter.places] == ["a blue"]
    painter.go.clear()
    type_text(app, "a blue flower")
    app.text_area(key="prompt").set_value("a blue flower")
    press(app, DRAW)
    painter.go.set()
    wait(app, has_picture)
    assert [place.cell.num_inference_steps > 3 for place in painter.places] == [False, True]


def test_a_text_without_pictures_gets_a_sentence_and_the_switch_ends_drafts(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    app = type_text(show(), "a {red flower")
    assert "the prompt has a { without its }" in texts(app).replace("\\", "")
    type_text(app, "   ")
    assert not drafts(app)
    app.toggle(key="live").set_value(False).run()
    type_text(app, "a red flower")
    assert not painter.places
    app.switch_page("views/runs.py").run()
    app.switch_page("views/playground.py").run()
    assert not app.toggle(key="live").value


def test_a_draft_that_breaks_is_said(tmp_path, painter, monkeypatch):
    make_run(tmp_path / "outputs" / "one", evaluated=False)

    def breaks(pipeline, places, watch):
        raise MemoryError("no room")

    monkeypatch.setattr(cells, "_draw", breaks)
    app = wait(type_text(show(), "a red flower"), warnings)
    assert "drawing ended with MemoryError (no room)" in warnings(app)


# --- Several pictures ------------------------------------------------------------------------------------------------


def shown_set(app: AppTest) -> list[tuple[str, bool]]:
    """The captions of the pictures of a set, and whether each is drawn."""
    return [(one["caption"], bool(one["source"])) for one in test_compare.component(app, "gallery").get("pictures", [])]


def is_whole(app: AppTest) -> bool:
    return bool(shown_set(app)) and all(drawn for _, drawn in shown_set(app)) and not app.get("progress")


def test_seeds_and_alternatives_fill_a_set_that_is_stored(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one", evaluated=False)
    query = {"pictures": "4", "seed": "7", "prompt": "{red|blue} flower"}
    app = show(**query)
    assert "not drawn yet" in texts(app)
    wait(press(app, DRAW), is_whole)
    captions = [f"“{color} flower” · seed {seed}" for color in ("red", "blue") for seed in (7, 8, 9, 10)]
    assert shown_set(app) == [(caption, True) for caption in captions]
    assert len(painter.places) == 8
    assert shown_set(show(**query)) == shown_set(app)
    assert len(list((run / "cells").glob("*.steps.png"))) == 8  # they are among the page's own, which have a limit
    type_text(app, "{red|blue|pink} flower")
    assert len(painter.places) == 8 + 9  # the first drafts of twelve
    app.text_area(key="prompt").set_value("a tulip").run()
    app.segmented_control(key="pictures").set_value("9").run()
    wait(press(app, DRAW), is_whole)
    assert [caption for caption, _ in shown_set(app)] == [f"seed {seed}" for seed in range(7, 16)]


def test_a_session_stops_its_own_set_and_no_set_of_another(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    painter.go.clear()
    query = {"pictures": "4", "seed": "7", "num_inference_steps": "4"}
    one = press(show(**query), DRAW)
    two = show(**query)
    assert progress(two)
    job = two.session_state["_set_job"]
    two.number_input(key="seed").set_value(70).run()
    assert not job.stopped.is_set()
    one.number_input(key="seed").set_value(70).run()
    assert job.stopped.is_set()


def test_too_many_pictures_and_braces_that_do_not_fit_get_a_sentence(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    app = press(show(pictures="9", prompt="{a|b|c|d|e}"), DRAW)
    assert "5 prompts with 9 seeds each are more than 36 pictures" in warnings(app)
    assert "the prompt has a } without its {" in warnings(press(show(prompt="red} flower"), DRAW))
    assert not painter.places
    wait(press(show(prompt=r"a \{red\} flower"), DRAW), has_picture)
    assert painter.places[0].cell.prompt == "a {red} flower"


def test_a_second_checkpoint_draws_the_same_beside_the_first(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    make_run(tmp_path / "outputs" / "two", evaluated=False)
    app = show(run="one", checkpoint="checkpoint-000010", seed="5", beside="two/checkpoint-000020")
    assert app.selectbox(key="beside").value == "two/checkpoint-000020"
    wait(press(app, DRAW), is_whole)
    assert [caption for caption, _ in shown_set(app)] == [
        "one/checkpoint-000010 · seed 5", "two/checkpoint-000020 · seed 5"
    ]  # fmt: skip
    first, second = painter.places
    assert first.cell == second.cell
    assert first.model_hash != second.model_hash or first.run != second.run
    gone = show(run="one", beside="two/<b>gone")
    assert gone.selectbox(key="beside").value is None


def test_pictures_are_found_by_words_and_by_their_star(tmp_path, painter, monkeypatch):
    monkeypatch.setattr(sys.modules["helpers.picture_strip"], "has_control", lambda: True)
    run = make_run(tmp_path / "outputs" / "one", evaluated=False)
    for seed, prompt in enumerate(("a red rose", "a blue rose", "a red tulip")):
        wait(press(show(seed=str(seed), prompt=prompt), DRAW), has_picture)
    app = show(find="Rose RED")
    assert strip(app) == ["Seed 0"]
    press(app, "☆")
    assert [button.label for button in app.button if button.label in "★☆"] == ["★"]
    app.text_input(key="find").set_value("").run()
    assert set(strip(app)) == {"Seed 0", "Seed 1", "Seed 2"}
    app.toggle(key="starred").set_value(True).run()
    assert strip(app) == ["Seed 0"]
    most, cells.MAX_WATCHED = cells.MAX_WATCHED, 1
    try:
        wait(press(show(seed="9", prompt="a lily"), DRAW), has_picture)
    finally:
        cells.MAX_WATCHED = most
    assert len(list((run / "cells").glob("*.steps.png"))) == 2  # the newest one and the starred one
    assert strip(show(starred="true")) == ["Seed 0"]
    press(app, "★")
    assert strip(app) == []
    assert "no picture matches" in texts(app)


def test_pictures_of_a_copied_run_folder_are_shown_beside_those_of_the_run(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one", evaluated=False)
    wait(press(show(seed="3"), DRAW), has_picture)
    shutil.copytree(run, tmp_path / "outputs" / "copy")
    assert strip(show(run="one")) == ["Seed 3", "Seed 3"]


def strip(app: AppTest) -> list[str]:
    return [button.label for button in app.button if button.label.startswith("Seed")]


def links(app: AppTest, label: str) -> dict[str, list[str]]:
    found = [one.proto for one in app.get("page_link") if one.proto.label == label]
    return parse_qs(found[0].query_string) if found else {}


def follow(app: AppTest, label: str, page: str) -> AppTest:
    """Open the page of a link in another session."""
    other = AppTest.from_file(str(APP), default_timeout=120)
    other.query_params.update(links(app, label))
    other.switch_page(f"views/{page}.py").run()
    assert not other.exception
    return other


def test_pictures_become_a_grid_and_a_grids_picture_opens_here(tmp_path, painter):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    make_run(tmp_path / "outputs" / "two", evaluated=False)
    query = {"run": "two", "checkpoint": "checkpoint-000010", "seed": "5", "guidance_scale": "3", "scheduler": "unipc"}
    app = wait(press(show(**query, prompt="a **red** flower"), DRAW), has_picture)
    grid = test_compare.grid_of(compare := follow(app, "Make a grid of this", "compare"))
    assert (grid["columns"], grid["rows"]) == (["1.5", "3", "6"], ["5", "6", "7"])
    assert [bool(one["source"]) for one in grid["cells"]] == [False, True, *[False] * 7]
    assert not warnings(compare)
    compare.query_params["left"] = "guidance scale 3, seed 5"
    compare.session_state["left"] = "guidance scale 3, seed 5"
    compare.run()
    back = follow(compare, "Open the left picture in the Playground", "playground")
    assert has_picture(back)
    assert dict(back.query_params)["prompt"] in ("a **red** flower", ["a **red** flower"])
    several = show(**query, prompt="{red|blue} rose", pictures="4", beside="two/checkpoint-000020")
    grid = test_compare.grid_of(follow(several, "Make a grid of this", "compare"))
    assert (grid["columns"], grid["rows"]) == (["checkpoint-000010", "checkpoint-000020"], ["red rose", "blue rose"])
    assert not links(show(**query, prompt="two\nlines"), "Make a grid of this")  # Compare has a prompt per line
    other = show(**query, prompt="rose", beside="one/checkpoint-000020")
    grid = test_compare.grid_of(follow(other, "Make a grid of this", "compare"))
    steps = ["checkpoint-000010", "checkpoint-000020"]
    assert (grid["columns"], sorted(grid["rows"])) == (["two", "one"], steps)
    four = show(**query, prompt="{red|blue} rose", pictures="4", beside="one/checkpoint-000020")
    assert not links(four, "Make a grid of this")  # Compare has three axes


def test_strangers_find_no_stars_and_in_a_space_only_their_own_pictures(tmp_path, painter, monkeypatch):
    make_run(tmp_path / "outputs" / "one", evaluated=False)
    monkeypatch.setenv("SPACE_ID", "me/flowers")
    for seed in (1, 2):
        wait(press(show(seed=str(seed)), DRAW), has_picture)
    app = show()
    assert strip(app) == ["Seed 2", "Seed 1"]
    assert not [button for button in app.button if button.label in "★☆"]
    app.session_state["_own"] = []
    monkeypatch.setattr(Path, "is_file", lambda path, real=Path.is_file: path.name != "compare.py" and real(path))
    app.switch_page("views/playground.py").run()
    assert strip(app) == []
    for seed in (3, 4):
        app.number_input(key="seed").set_value(seed)
        wait(press(app, DRAW), has_picture)
    assert strip(app) == ["Seed 4", "Seed 3"]


def test_a_grids_picture_is_shown_at_once_and_its_steps_on_demand(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one")
    query = {"checkpoint": "checkpoint-000010", "prompt": "a red flower", "seed": "7", "guidance_scale": "1.5"}
    app = show(**query)
    assert has_picture(app)
    assert "were not recorded" in texts(app)
    wait(press(app, DRAW), steps)
    assert len(painter.places) == 1
    before = painter.places[0].path.read_bytes()
    for number in range(3):  # a limit that steps beyond reach
        most, cells.MAX_WATCHED = cells.MAX_WATCHED, 2
        try:
            wait(press(show(**query | {"prompt": str(number)}), DRAW), has_picture)
        finally:
            cells.MAX_WATCHED = most
    assert len(list((run / "cells").glob("*.steps.png"))) == 2
    assert not painter.places[1].path.is_file()  # the page's own oldest one made room
    assert painter.places[0].path.read_bytes() == before  # the grid's stays, without its steps
    assert "not drawn yet" in texts(show(**query | {"prompt": "0"}))


def test_a_store_that_cannot_be_written(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one", evaluated=False)
    (run / "cells").write_text("")  # stands for a read-only disk, which root does not know
    app = wait(press(show(), DRAW), has_picture)
    assert "not kept:" in warnings(app)
    app.run()
    assert has_picture(app)  # by this session
    assert "not drawn yet" in texts(show())


def test_files_that_go_or_are_damaged_while_shown(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one", steps=(10, 20, 30))
    make_run(tmp_path / "outputs" / "two")
    (run / "checkpoint-000020" / "unet" / "weights.safetensors").write_text("cut")
    app = show(run="one")
    assert app.selectbox(key="checkpoint").options == ["pipeline", "checkpoint-000030", "checkpoint-000010"]
    wait(press(app, DRAW), has_picture)
    for path in (run / "cells").glob("*.steps.png"):
        path.write_bytes(path.read_bytes()[:-100])
    app.run()
    assert has_picture(app)
    assert "were not recorded" in texts(app)
    shutil.rmtree(run)
    app.run()
    assert not app.exception
    assert app.selectbox(key="run").options == ["two"]
    assert "holds no one" in warnings(app)  # No other run takes its place unasked.
    app.selectbox(key="run").set_value("two").run()
    press(app, DRAW)
    shutil.rmtree(tmp_path / "outputs" / "two")
    app.run()
    assert [element.value for element in app.code] == ["make demo"]


def test_a_runs_name_is_shown_as_it_is_where_its_picture_is_offered(tmp_path, painter):
    make_run(tmp_path / "outputs" / "a *b* c")
    app = wait(press(show(), DRAW), has_picture)
    assert r"a \*b\* c" in app.get("download_button")[0].proto.help


def test_a_model_that_cannot_be_loaded_and_a_drawing_that_breaks(tmp_path, painter, monkeypatch):
    make_run(tmp_path / "outputs" / "one")

    def breaks(pipeline, places, watch):
        raise MemoryError("no [room](javascript:x)")

    monkeypatch.setattr(cells, "_draw", breaks)
    app = wait(press(show(), DRAW), warnings)
    assert "drawing ended with MemoryError" in warnings(app)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    app = wait(press(show(), DRAW), warnings)
    assert "the pipeline in outputs/one/pipeline cannot be loaded" in warnings(app)
    press(app, DRAW)  # it can be tried again


def test_pages_with_the_same_names_in_their_urls(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two")
    app = show(run="one", seed="5", guidance_scale="2")
    for page in ("compare", "playground", "runs", "playground", "compare"):
        app.switch_page(f"views/{page}.py").run()
        assert not app.exception, page


def test_without_training_images_a_sentence_says_so(tmp_path, painter):
    run = make_run(tmp_path / "outputs" / "one")
    (tmp_path / "secret").mkdir()
    np.save(tmp_path / "secret" / "train.npy", np.zeros((4, 8, 8, 3), np.uint8))
    for identity in ({}, {"dataset_hash": "0123456789abcdef"}, {"dataset_hash": "../../../secret"}, ["x"]):
        (run / "run.json").write_text(json.dumps({"status": "finished", "identity": identity}))
        app = show(nearest="true")
        if not has_picture(app):
            wait(press(app, DRAW), has_picture)
        assert "are not on this machine" in texts(app)
        assert [toggle.key for toggle in app.toggle] == ["live"]


@pytest.fixture
def trained(workspace, tmp_path):
    """A copy of the finished run below outputs/, beside the prepared images that it was trained on."""
    ignored = shutil.ignore_patterns("cells", "evaluation", "mlflow*")
    run = Path(shutil.copytree(workspace / "unet", tmp_path / "outputs" / "tiny", ignore=ignored))
    (tmp_path / ".cache").symlink_to(workspace / ".cache")
    return run.relative_to(tmp_path)


def test_the_watched_picture_is_the_same_bit_for_bit(trained):
    from t2i.pictures import sampling

    for scheduler in ("ddim", "euler", "KDPM2DiscreteScheduler"):
        cell = cells.Cell("a red flower", "blue", 3, 4.0, 5, scheduler)
        seen = []
        watched = cells.make_watched(
            cells.plan(trained, "pipeline", cell, [])[0],
            progress=lambda step, count, picture, seen=seen: seen.append((step, count, picture is not None)),
        )
        pipeline = sampling.load_pipeline(trained, scheduler=scheduler)
        theirs = sampling.generate(pipeline, [cell.prompt], [3], negative_prompt="blue", guidance_scale=4.0,
                                   num_inference_steps=5, progress=False)[0]  # fmt: skip
        assert np.array_equal(watched.picture, theirs)
        count = 9 if scheduler == "KDPM2DiscreteScheduler" else 5  # it asks the model twice a step, but for the last
        assert [one[:2] for one in seen] == [(step, count) for step in range(1, count + 1)]
        assert sum(drawn for *_, drawn in seen) == len(watched.steps) <= cells.STEPS - 1
        stored = cells.read_watched(cells.plan(trained, "pipeline", cell, [])[0])
        assert np.array_equal(stored.picture, theirs)
        for (step, picture), (again, kept) in zip(watched.steps, stored.steps, strict=True):
            assert step == again
            assert np.array_equal(picture, kept)


def test_the_nearest_training_images_are_those_of_the_evaluation(trained, tmp_path):
    from t2i.data import prepared
    from t2i.evaluation import memorisation
    from t2i.runs import prepared_folder

    show()
    neighbours = sys.modules["helpers.training_neighbours"]
    folder = neighbours.find_images(trained)
    fingerprint = json.loads((trained / "run.json").read_text())["identity"]["dataset_hash"]
    assert folder == prepared_folder(".cache/t2i", fingerprint)
    train, _, test = prepared.open_prepared(folder)
    picture = np.clip(train.pixels[5].astype(int) + 2, 0, 255).astype(np.uint8)[:, ::-1]  # a copy, mirrored
    expected = memorisation.memorisation(np.stack([picture, test.pixels[0]]), train.pixels, test.pixels)
    known = neighbours.training_set(folder)
    for number, one in enumerate((picture, test.pixels[0])):
        found, nearer = neighbours.compare(known, one)
        assert found[0][0] == expected["nearest"][number]
        assert found[0][1] == pytest.approx(expected["relative_distance"][number], abs=1e-3)
        assert len({row for row, _ in found}) == len(found) == 4
        assert [distance for _, distance in found] == sorted(distance for _, distance in found)
        if number == 0:
            assert found[0][0] == 5
            assert "as near as a copy" in neighbours.judgement(found[0][1], nearer)
    cell = cells.Cell("a red flower", seed=0, guidance_scale=3.0, num_inference_steps=30)
    place = cells.plan(trained, "pipeline", cell, [])[0]
    cells.save_cells(trained, "pipeline", place.model_hash, [cell], picture[None])
    app = show(nearest="true")
    assert f"0.03 · {train.rows[5]['caption']}" in texts(app).replace("\\", "")
    assert "as near as a copy" in texts(app)
    (folder_copy := tmp_path / "damaged").mkdir()
    (folder_copy / "train.npy").write_bytes(b"\x93NUMPY")
    (folder_copy / "report.json").write_text(json.dumps({"splits": {"train": {"images": 3, "fingerprint": ""}}}))
    with pytest.raises(neighbours.UserError, match="is damaged"):
        neighbours.training_set(folder_copy)


def test_the_model_alone_is_enough(trained, tmp_path, environment):
    for path in trained.iterdir():
        if path.name != "pipeline":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(APP)], cwd=tmp_path, env=environment | {"PATH": os.environ["PATH"]},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == (
        "['step 1', 'step 2', 'step 3', 'step 5', 'step 6', 'finished'] The images this model was trained on are "
        "not on this machine, so its picture cannot be compared with them."
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler"])
def test_the_predicted_x0_is_the_schedulers_own(name, kind):
    import torch
    from diffusers import DDIMScheduler

    from t2i.pictures.sampling import make_scheduler, predicted_x0

    saved = DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="leading")
    scheduler = make_scheduler(name, saved.config)
    scheduler.set_timesteps(10)
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    if kind == "sample" and name == "euler":
        pytest.skip("diffusers' Euler gives no such prediction")
    sample = sample * scheduler.init_noise_sigma
    timestep = scheduler.timesteps[0]
    seen = scheduler.scale_model_input(sample, timestep)
    theirs = scheduler.step(output, timestep, sample).pred_original_sample
    assert torch.allclose(predicted_x0(scheduler, seen, output, timestep), theirs, atol=1e-3)


def test_a_model_that_a_job_keeps_counts_among_those_in_memory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(APP.parent)
    from helpers import model_pool

    from t2i.pictures import sampling

    monkeypatch.setattr(model_pool, "_pipelines", OrderedDict())
    monkeypatch.setattr(model_pool, "weights_hash", lambda model: "")
    monkeypatch.setattr(sampling, "load_pipeline", lambda model, **options: model.name)

    def load(*names):
        for name in names:
            assert model_pool.load_pipeline(tmp_path / name) == name
        return list(model_pool._pipelines.values())

    assert load("a", "b", "a", "c") == ["a", "c"]  # the least recently used one went
    with model_pool.room_for_own_model():
        assert list(model_pool._pipelines.values()) == ["c"]
        assert load("d") == ["d"]
        with model_pool.room_for_own_model(), model_pool.room_for_own_model():
            assert load("e") == ["e"]  # one may always be loaded
    assert load("a") == ["e", "a"]
