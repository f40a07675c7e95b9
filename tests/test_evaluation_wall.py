"""The top of the page Compare: the verdict of an evaluation, the wall of pictures at the best setting, the report's download."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from t2i.evaluation.verdict import TOPICS, make_verdict
from t2i.pictures import cells
from test_compare import APP, EVIL, PROMPTS, SCALES, component, grid_of, make_run, show, warnings
from test_verdict import evaluation, result

sys.path.append(str(APP.parent))  # as the dashboard does
READINGS = [
    {"petal_color": {"wanted": "red", "read": "red"}, "petal_count": {"wanted": 5, "read": 5}},
    {"petal_color": {"wanted": "red", "read": EVIL}, "petal_count": {"wanted": 5, "read": 5}},
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluated_run(folder: Path, **more) -> Path:
    """A run whose evaluation has figures, but no verdict, as earlier versions left it; checkpoint 20 at scale 3 is the best."""
    run = make_run(folder)
    file = run / "evaluation" / "evaluation.json"
    distances = {(20, 3.0): 10.0}
    results = [result(step, scale, distances.get((step, scale), 50.0), 0.5) for step in (10, 20) for scale in SCALES]
    figures = evaluation(results)
    sweep = json.loads(file.read_text())["sweep"]
    file.write_text(json.dumps(figures | {"sweep": sweep, "readings": READINGS} | more))
    return run


def marked(app) -> str:
    return " ".join(element.value for element in app.markdown).replace("\\", "")


def test_the_verdict_and_the_wall_stand_above_the_grid(tmp_path):
    run = evaluated_run(tmp_path / "outputs" / "one")
    app = show()
    assert not warnings(app)
    verdict = make_verdict(json.loads((run / "evaluation" / "evaluation.json").read_text()))
    for topic, title in TOPICS.items():
        assert f"**{title}: " in marked(app)
        assert " ".join(verdict["sentences"][topic]) in marked(app)
    assert "**Best setting: checkpoint-000020 at guidance scale 3**" in marked(app)
    assert "**Copies of training images: 0.0%**" in marked(app)
    names = [element.proto.component_name for element in app.get("bidi_component")]
    assert names == ["gallery", "picture_grid", "picture_pair"]
    wall = component(app, "gallery")["pictures"]
    assert [picture["caption"] for picture in wall] == PROMPTS
    best = [cell["source"] for cell in grid_of(app)["cells"]][3]  # of the first prompt, checkpoint 20 at scale 3
    assert wall[0]["source"] == best
    assert [picture["is_miss"] for picture in wall] == [False, True]
    assert wall[0]["label"] == "✓ petal color red, petal count 5"
    assert wall[1]["finding"].startswith("✗ petal color: a <script>")
    assert "<script" not in marked(app)


def test_a_stored_verdict_is_shown_and_its_markdown_is_not_read(tmp_path):
    stored = {"sentences": {topic: [f"{EVIL} {topic}"] for topic in TOPICS}}
    evaluated_run(tmp_path / "outputs" / "one", verdict=stored, readings="none")
    app = show()
    shown = [element.value for element in app.markdown if "best" in element.value]
    assert "\\*\\*bold\\*\\*" in shown[0]
    assert "<script" not in shown[0]
    assert not any(picture["is_miss"] for picture in component(app, "gallery")["pictures"])


def save_pictures(run: Path, sets) -> None:
    (run / "evaluation" / "pictures.json").write_text(json.dumps(sets))


def test_pictures_of_the_grid_have_their_figures_below_them(tmp_path):
    run = evaluated_run(tmp_path / "outputs" / "one")
    missed = {"petal_color": {"wanted": "red", "read": "blue"}, "petal_count": {"wanted": 5, "read": 5}}
    samples = {"prompts": PROMPTS, "seeds": [7, 8]}
    one = {"model_hash": cells.weights_hash(run / "checkpoint-000010"), "guidance_scale": SCALES[0], **samples}
    two = one | {"guidance_scale": SCALES[1], "readings": [READINGS[0]], "distances": []}
    one |= {"readings": [missed, READINGS[0]], "distances": [0.321, 0.9]}

    def below():
        return [cell["under"] for cell in grid_of(show(tabs="sample"))["cells"]]

    assert below() == [""] * 4  # an evaluation of an earlier version
    save_pictures(run, [one, two])
    measured = ["✗ petal color: blue instead of red\ndistance 0.32", "✓ 2 of 2", "", ""]
    assert below() == measured
    damaged = (
        None,
        7,
        {},
        one | {"guidance_scale": 10**400},
        one | {"seeds": [7]},
        one | {"prompts": 5},
        two | {"seeds": "x"},
    )
    save_pictures(run, [*damaged, one, two])
    assert below() == measured
    for text in (
        "{",
        "7",
        "[" * 100_000,
        json.dumps([one | {"readings": 5, "distances": {}}, two | {"readings": [5]}]),
    ):
        (run / "evaluation" / "pictures.json").write_text(text)
        assert below() == [""] * 4
    save_pictures(run, [one | {"model_hash": "of other weights"}])
    assert below() == [""] * 4


def test_what_differs_between_two_pictures_is_said(tmp_path):
    evaluated_run(tmp_path / "outputs" / "one")
    app = show(tabs="sample")
    said = next(element.value for element in app.text if element.value.startswith("Different: "))
    assert said == f"Different: guidance scale {SCALES[0]} → {SCALES[1]}"
    differing = sys.modules["helpers.picture_table"].differing
    assert differing({"a": 1, "b": None}, {"a": 1}) == "All settings are equal."
    assert differing({"a": 1}, {"a": 1, "b": 2}) == "Different: b – → 2"
    long = "a photo of a flower with many thin petals and a center that is quite "
    assert differing({"p": f"{long}red"}, {"p": f"{long}blue, too"}) == "Different: p … red → … blue, too"
    assert differing({"p": long}, {"p": "short"}).startswith("Different: p a photo of a flower")


def test_tables_have_places_without_values_and_columns_of_mixed_types(monkeypatch, tmp_path):
    evaluated_run(tmp_path / "outputs" / "one")
    show()
    tables, sent = sys.modules["helpers.tables"], []
    monkeypatch.setattr(tables.st, "dataframe", lambda table, **options: sent.append(table.to_pydict()))
    tables.show_rows([])
    tables.show_rows(
        [{"a": 1, "n": math.nan, "x": 2**70}, {"b": "\ud800", "a": math.nan, "c": None}, {"b": 5, "a": 2.5}]
    )
    tables.show_rows([{"t": True, "i": 2**62, "m": True}, {"i": np.int64(-1), "m": 1}])
    assert sent == [
        {},
        {"a": [1, None, 2.5], "x": [2.0**70, None, None], "b": [None, "?", "5"]},
        {"t": [True, None], "i": [2**62, -1], "m": ["True", "1"]},
    ]


@example([10**400, 0.5])
@example([math.inf, 1])
@given(st.lists(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), max_size=20))
def test_a_column_holds_its_values(values):
    """Of one type as they are, else as text."""
    from helpers.tables import column

    made = column(values)
    made.validate(full=True)
    given = [None if value != value else value for value in values]
    kinds = {
        bool if isinstance(value, bool) else str if isinstance(value, str) else float
        for value in given
        if value is not None
    }
    is_too_large = any(isinstance(value, int) and abs(value) > sys.float_info.max for value in values)
    if kinds <= {bool} or (kinds == {float} and not is_too_large):
        assert made.to_pylist() == pytest.approx(given, abs=0)
    else:
        plain = [None if value is None else str(value).encode("utf-8", "replace").decode() for value in given]
        assert made.to_pylist() == plain


def test_the_first_page_waits_for_no_large_library(tmp_path):
    """Of an evaluated run, with verdict, wall, grid, pair, curves and tables."""
    evaluated_run(tmp_path / "outputs" / "one")
    code = """
import sys
from streamlit.testing.v1 import AppTest
before = set(sys.modules)
app = AppTest.from_file(sys.argv[1], default_timeout=60).run()
assert not app.exception and len(app.get("bidi_component")) == 3 and app.dataframe, app.exception
print(sorted({"altair", "pandas", "torch", "transformers", "diffusers", "mlflow", "tyro", "scipy"} & (set(sys.modules) - before)))
"""
    words = [sys.executable, "-c", code, str(APP)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_evaluation_without_figures_and_several_runs(tmp_path):
    make_run(tmp_path / "outputs" / "one")
    app = show()
    assert any("lacks figures" in element.value for element in app.caption)
    assert not component(app, "gallery")
    evaluated_run(tmp_path / "outputs" / "two")
    app = show(run=["one", "two"])
    assert "**Best setting: " in marked(app)
    assert not component(app, "gallery")
    make_run(tmp_path / "outputs" / "three", evaluated=False)
    app = show(run="three")
    assert not component(app, "gallery")
    assert not any("lacks figures" in element.value for element in app.caption)


def test_a_click_on_the_wall_shows_its_prompt_in_the_grid(tmp_path, monkeypatch):
    run = evaluated_run(tmp_path / "outputs" / "one")
    app = show()
    module, tabs = (
        sys.modules["helpers.evaluation_wall"],
        [(PROMPTS[0], 7, f"1. {PROMPTS[0]}"), (EVIL, 8, f"2. {EVIL}")],
    )
    state = {"_wall": SimpleNamespace(chosen={"row": 1}), "tabs": "sample"}
    monkeypatch.setattr(module.st, "session_state", state)
    module.take_clicked_prompt(run, tabs)
    for wrong in ({"row": 9}, {"row": "1"}, None):
        state["_wall"] = SimpleNamespace(chosen=wrong)
        module.take_clicked_prompt(run, tabs)
    assert state["tab"] == f"2. {EVIL}"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    app.session_state["tab"] = state["tab"]
    app.run()
    assert EVIL in grid_of(app)["cells"][0]["alt"]


@pytest.mark.parametrize(("columns", "scales"), [("guidance_scale", "1,2"), ("seed", "2")])
def test_a_click_on_a_reported_picture_shows_it_in_the_grid(columns, scales, tmp_path, monkeypatch):
    """Whatever was chosen before: here other scales, another number of steps, and rows that are no checkpoints."""
    prompts = [f"flower {number}" for number in range(3)]
    run = evaluated_run(tmp_path / "outputs" / "one", prompts=prompts, seeds=[1000, 1001, 1002], readings=[])
    paint(run, list(zip(prompts, (1000, 1001, 1002), strict=True)))
    app = show(columns=columns, rows="num_inference_steps", tabs="none", guidance_scale=scales, prompt="another")
    assert "flower 1" not in str(grid_of(app)["cells"])
    module = sys.modules["helpers.evaluation_wall"]
    state = {key: app.session_state[key] for key in ("columns", "rows", "tabs")}
    state["_wall"] = SimpleNamespace(chosen={"row": 1})
    monkeypatch.setattr(module.st, "session_state", state)
    module.take_clicked_prompt(run, [(prompt, 1000 + number, None) for number, prompt in enumerate(prompts)])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    del state["_wall"]
    for key, value in state.items():
        app.session_state[key] = value
    app.run()
    assert not warnings(app)
    drawn = [cell for cell in grid_of(app)["cells"] if cell["source"]]
    assert [cell["source"] for cell in drawn] == [component(app, "gallery")["pictures"][1]["source"]]


def paint(run: Path, samples: list[tuple[str, int]]) -> None:
    """Store a picture of each prompt and seed at the best setting, each of another grey."""
    made = [cells.Cell(prompt, seed=seed, guidance_scale=3.0, num_inference_steps=4, scheduler="DDIMScheduler")
            for prompt, seed in samples]  # fmt: skip
    pictures = np.arange(len(samples), dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    cells.save_cells(run, "checkpoint-000020", cells.weights_hash(run / "checkpoint-000020"), made, pictures)


def test_the_wall_shows_the_reported_pictures_some_all_or_those_with_a_miss(tmp_path):
    prompts = [f"flower {number}" for number in range(100)]
    reported = {"prompts": prompts, "seeds": list(range(1000, 1100)), "readings": READINGS * 50}
    run = evaluated_run(tmp_path / "outputs" / "one", **reported)
    app = show()
    assert not component(app, "gallery")  # None of them is in the run folder.
    assert any("are not in the run folder" in element.value for element in app.caption)
    paint(run, list(zip(prompts, reported["seeds"], strict=True)))
    app = show()
    shown = component(app, "gallery")["pictures"]
    assert len(shown) == 64
    assert all(picture["source"] for picture in shown)
    assert (shown[0]["caption"], shown[-1]["caption"]) == ("flower 0", "flower 98")
    for choice, rows in (("all", list(range(100))), ("misses", list(range(1, 100, 2)))):
        app.session_state["wall"] = choice
        app.run()
        shown = component(app, "gallery")["pictures"]
        assert [picture["caption"] for picture in shown] == [f"flower {row}" for row in rows]


def test_many_right_attributes_are_counted_and_listed_in_the_tooltip(tmp_path):
    right = {name: {"wanted": "red", "read": "red"} for name in ("petal_color", "center_color", "background")}
    evaluated_run(tmp_path / "outputs" / "one", readings=[right, right | READINGS[1]])
    first, second = component(show(), "gallery")["pictures"]
    assert (first["label"], first["finding"]) == ("✓ 3 of 3", "")
    assert "✓ petal color red, center color red, background red" in first["title"]
    assert (second["label"], second["is_miss"]) == ("3 of 4", True)


@pytest.mark.parametrize("seeds", [None, 3, "12", [1], [1, "x"], [1, float("inf")], [1, None]])
def test_damaged_seeds_leave_the_verdict_without_a_wall(seeds, tmp_path):
    evaluated_run(tmp_path / "outputs" / "one", prompts=PROMPTS, seeds=seeds)
    app = show()
    assert not app.exception
    assert "**Best setting: " in marked(app)
    assert not component(app, "gallery")


def test_the_report_is_offered_if_it_lies_in_the_run_folder(tmp_path):
    run = evaluated_run(tmp_path / "outputs" / "one")

    def offered() -> list[str]:
        return [element.proto.label for element in show().get("download_button") if "Report" in element.proto.label]

    assert offered() == []
    report = run / "evaluation" / "report.html"
    (tmp_path / "other.html").write_text("private")
    report.symlink_to(tmp_path / "other.html")
    assert offered() == []
    report.unlink()
    report.write_text("a report")
    assert offered() == ["Report as one file"]


def test_runs_of_one_name_in_two_folders_offer_both_reports(tmp_path):
    names = ["first/unet", "second/unet", "more/first"]
    for name in names:
        (evaluated_run(tmp_path / "outputs" / name) / "evaluation" / "report.html").write_text("a report")
    app = show(run=names)
    labels = [element.proto.label for element in app.get("download_button")]
    assert labels.count("Report as one file") == 3
