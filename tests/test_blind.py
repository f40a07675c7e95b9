"""The page Blind test: pairs of pictures whose models stay hidden, answers that are kept, and the share that each model won."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from t2i.errors import UserError
from t2i.evaluation import preferences
from t2i.pictures import cells
from test_compare import APP, PROMPTS, component, make_run
from test_playground import press

CHECKPOINTS = {"a_checkpoint": "checkpoint-000020", "b_checkpoint": "checkpoint-000010"}
SAME = dict.fromkeys(CHECKPOINTS, "checkpoint-000010")
LEFT, EQUAL, RIGHT = "Left is better", "No difference", "Right is better"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def show(**query: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page("views/blind.py").run()
    assert not app.exception
    return app


def texts(app: AppTest) -> str:
    return " ".join(element.value for element in [*app.text, *app.markdown, *app.success])


def side_by_side(app: AppTest) -> list[str]:
    """The data addresses of the two shown pictures, the left one first."""
    pair = component(app, "picture_pair")
    return [pair[side]["source"] for side in ("left", "right")] if pair else []


def picture(run: Path, checkpoint: str, prompt: int = 0, scale: float = 1.5) -> cells.PlannedCell:
    cell = cells.Cell(PROMPTS[prompt], seed=7 + prompt, guidance_scale=scale, num_inference_steps=4)
    return cells.plan(run, checkpoint, cell, [])[0]


def side(planned: cells.PlannedCell) -> tuple[cells.Cell, str]:
    return planned.cell, planned.checkpoint


def test_one_model_wins_every_pair_wherever_it_stands(tmp_path, monkeypatch):
    run = make_run(tmp_path / "outputs" / "one")
    opened, read = [], cells.read_cell

    def reading(*picture):
        opened.append(read(*picture).getpixel((0, 0))[0])
        return read(*picture)

    monkeypatch.setattr(cells, "read_cell", reading)
    app = show(a_scale="1.5", b_scale="1.5", **CHECKPOINTS)
    while LEFT in [button.label for button in app.button]:
        for element in [*app.text, *app.caption, *app.markdown]:
            assert "checkpoint" not in element.value  # nothing tells which model drew which picture
        pixels = opened[-2:]  # of the left and the right picture; the second checkpoint's are brighter
        assert abs(pixels[0] - pixels[1]) == 60
        assert len(set(side_by_side(app))) == 2
        press(app, LEFT if pixels[0] > pixels[1] else RIGHT)
    assert "All 2 pairs are judged." in texts(app)
    assert "2 of 2 pairs judged" in texts(app)
    assert "wins" not in texts(app)
    app.toggle[0].set_value(True).run()
    assert "wins **100 %** of the decided pairs (34–100 %)" in texts(app)
    assert "does not say which model is better" in texts(app)
    rows = [json.loads(line) for line in (run / preferences.FILE).read_text().splitlines()]
    assert {row["preferred"] for row in rows} == {"first"}
    assert {row["first"]["model"] for row in rows} == {"one/checkpoint-000020"}


def test_back_replaces_the_last_answer(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    app = press(show(**CHECKPOINTS), EQUAL)
    assert "1 of 2 pairs judged" in texts(app)
    app = press(press(app, "Back"), LEFT)
    assert "1 of 2 pairs judged" in texts(app)
    assert next(button for button in app.button if button.label == "Back").disabled is False
    rows = [json.loads(line)["preferred"] for line in (run / preferences.FILE).read_text().splitlines()]
    assert rows[0] == "neither"
    assert rows[1] in ("first", "second")


def test_back_leads_to_the_last_pair_of_all_and_to_none_of_other_models(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show(**CHECKPOINTS)
    app.session_state["_blind_again"] = app.session_state["_blind_last"] = ("a prompt of another run", 7)
    app = press(press(app.run(), EQUAL), EQUAL)
    assert "All 2 pairs are judged." in texts(app)
    app = press(press(app, "Back"), LEFT)
    assert "All 2 pairs are judged." in texts(app)
    app = press(app, "Back")
    assert LEFT in [button.label for button in app.button]


def test_two_runs_both_keep_the_answers_and_equal_sides_are_refused(tmp_path):
    one, two = make_run(tmp_path / "outputs" / "one"), make_run(tmp_path / "outputs" / "two")
    app = press(show(a_run="one", b_run="two", **CHECKPOINTS), RIGHT)
    assert (one / preferences.FILE).read_text() == (two / preferences.FILE).read_text()
    app = show(a_run="one", b_run="one", a_scale="3", b_scale="3", **SAME)
    assert "Both sides are the same model" in texts(app)
    app = show(a_run="gone", b_run="two")
    assert "holds no gone" in app.warning[0].value
    assert not side_by_side(app)


def test_a_result_goes_to_the_experiment_of_the_first_models_run(tmp_path, monkeypatch):
    run = make_run(tmp_path / "outputs" / "one")
    (run / "config.yaml").write_text("train_unet: {experiment: roses}\n")
    first, second = (picture(run, f"checkpoint-0000{step}0") for step in (2, 1))
    preferences.record(first, second, "first")
    recorded = []
    waiting = iter((None, run / "mlflow_spool.jsonl"))
    monkeypatch.setattr(preferences, "track", lambda *given: recorded.append(given) or next(waiting))
    app = show(a_scale="1.5", b_scale="1.5", **CHECKPOINTS)
    app.toggle[0].set_value(True).run()
    app = press(app, "Record the result in MLflow")
    assert "The result stands in the MLflow run" in texts(app)
    app = press(app, "Record the result in MLflow")
    assert f"They wait in {run}/mlflow_spool.jsonl" in texts(app)
    assert "stands in the MLflow run" not in texts(app)
    one, two, counted, experiment = recorded[0]
    assert (one.cell, one.checkpoint, two.cell, two.checkpoint) == (*side(first), *side(second))
    assert (counted, experiment) == (preferences.Count(first=1), "roses")


def test_missing_pictures_are_offered_for_drawing(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show(a_scale="1.5", b_scale="2.5", **CHECKPOINTS)
    assert "0 of 2 pairs are drawn" in texts(app)
    assert "Draw the missing 2 pictures" in [button.label for button in app.button]
    assert not side_by_side(app)


def test_the_drawing_of_another_session_is_not_stopped(monkeypatch):
    run = make_run(Path("outputs") / "one")  # as the page names it
    app = show(a_scale="1.5", b_scale="2.5", **CHECKPOINTS)
    jobs = sys.modules["helpers.drawing_jobs"]
    first = (picture(run, name, 0, scale) for name, scale in zip(CHECKPOINTS.values(), (1.5, 2.5), strict=True))
    job = jobs.GridJob(key=("blind", *(one.path for one in first)), missing=[])
    monkeypatch.setitem(jobs._running, job.key, job)
    assert app.run().get("progress")
    assert not app.number_input(key="b_scale").set_value(2.0).run().get("progress")
    assert not job.stopped.is_set()


def test_an_empty_folder_and_a_run_without_checkpoints_say_what_is_missing(tmp_path):
    assert "make demo" in show().code[0].value
    folder = tmp_path / "outputs" / "new" / "pipeline"
    folder.mkdir(parents=True)
    (folder.parent / "run.json").write_text("{}")
    assert "no complete checkpoint yet" in texts(show())


def test_a_full_or_foreign_file_never_breaks_the_page(tmp_path, monkeypatch):
    run = make_run(tmp_path / "outputs" / "one")
    file = run / preferences.FILE
    file.write_bytes(b'{"first": 3}\n\xff\xfe\nnull\n' + b"[" * 100_000 + b'\n{"preferred": "first"}\n')
    app = show(**CHECKPOINTS)
    assert "0 of 2 pairs judged" in texts(app)
    monkeypatch.setattr(preferences, "MOST_BYTES", 10)
    app = press(app, LEFT)
    assert "is full" in app.warning[0].value
    assert "0 of 2 pairs judged" in texts(app)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(preferences.CHOICES), st.booleans()), max_size=12))
def test_the_last_answer_about_each_pair_counts_in_either_order(tmp_path_factory, given_answers):
    run = tmp_path_factory.getbasetemp() / "judged" / "one"
    if not run.is_dir():
        make_run(run)
    (run / preferences.FILE).unlink(missing_ok=True)
    pairs = [(picture(run, "checkpoint-000010", n), picture(run, "checkpoint-000020", n)) for n in range(2)]
    expected = {}
    mirrored = {"first": "second", "second": "first", "neither": "neither"}
    for number, choice, is_swapped in given_answers:
        first, second = pairs[number]
        if is_swapped:
            preferences.record(second, first, mirrored[choice])
        else:
            preferences.record(first, second, choice)
        expected[PROMPTS[number], 7 + number] = choice
    assert preferences.answers(*pairs[0]) == expected
    swapped = preferences.answers(*pairs[0][::-1])
    assert swapped == {at: mirrored[choice] for at, choice in expected.items()}
    other = picture(run, "checkpoint-000010", scale=3.0), pairs[0][1]
    assert preferences.answers(*other) == {}


def test_a_count_says_who_won_only_if_its_interval_does():
    few, many = preferences.Count(3, 0, 5), preferences.Count(30, 5)
    assert (few.judged, few.share, few.winner) == (8, 1.0, "neither")
    assert (many.winner, preferences.Count(5, 30).winner) == ("first", "second")
    assert preferences.Count(0, 0, 4).share is None
    assert preferences.Count(0, 0, 4).winner == "neither"
    with pytest.raises(UserError, match="unknown; take one of first, second, neither"):
        preferences.record(None, None, "both")
