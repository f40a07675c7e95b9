"""The pages show running trainings and the samples over their steps, and ask for something only where that is allowed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import streamlit as st
from PIL import Image
from streamlit.testing.v1 import AppTest

from t2i.pictures.png import picture_grid
from t2i.run_lock import lock_run
from t2i.training import live
from test_dashboard import APP, EVIL, make_run, show, texts

sys.path.append(str(APP.parent))  # as the dashboard itself does

ALONE = SimpleNamespace(num_processes=1, is_main_process=True)
PROMPTS = [f"flower {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "SPACE_ID", "T2I_DASHBOARD_CONTROL"):
        monkeypatch.delenv(name, raising=False)
    bind(monkeypatch, "127.0.0.1", ["localhost", "127.0.0.1"])


def bind(monkeypatch: pytest.MonkeyPatch, address: str | None, hosts: list[str]) -> None:
    """Say where the pages are served: a test of pages has no server."""
    told = {"server.address": address, "server.allowedHosts": hosts}
    known = st.get_option
    monkeypatch.setattr(st, "get_option", lambda key: told[key] if key in told else known(key))


def sample(run: Path, step: int, color: int) -> None:
    """Samples of one step: each prompt's picture has its number as its red, and the step's color as its green."""
    pictures = np.zeros((len(PROMPTS), 16, 16, 3), np.uint8)
    pictures[..., 0], pictures[..., 1] = np.arange(len(PROMPTS))[:, None, None], color
    (run / "samples").mkdir(exist_ok=True)
    picture_grid(pictures, columns=8).save(run / "samples" / f"step-{step:06d}.png")


@pytest.fixture
def run(tmp_path):
    """A run that a training of this process is at work on, with samples of two steps."""
    run = make_run(tmp_path / "outputs" / "one")
    (run / "run.json").write_text(json.dumps({"status": "unfinished"}))
    (run / "config.yaml").write_text(json.dumps({"train_unet": {"validation_prompts": PROMPTS}}))
    sample(run, 10, 100)
    sample(run, 20, 200)
    with lock_run(run, 0, lambda: None):
        yield run


def labels(app: AppTest) -> list[str]:
    return [button.label for button in app.button]


@pytest.mark.parametrize("page", ["compare", "curves", "runs"])
def test_a_running_training_tells_how_far_it_is(run, page):
    assert any(text == "one · making data, caches and models ready" for text in texts(show(page)))
    with live.listen(run, 1200, 4000, 32, ALONE) as training:
        training.after(1201)
        training.write()
        app = show(page)
        line = next(text for text in texts(app) if text.startswith("one · step 1,201 of 4,000 · "))
        assert "B of memory" in line
        assert line.endswith(" s ago")
        assert labels(app)[:3] == ["Sample now", "Evaluate", "Save and stop"]
        app.button[0].click().run()
        assert live.read_requests(run / live.REQUESTS) == ({"sample"}, [])
        assert labels(app)[0] == "Sample now …"
        assert app.button[0].disabled


def test_a_training_that_starts_later_appears_at_the_next_click(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    (run / "run.json").write_text(json.dumps({"status": "unfinished"}))
    app = show("runs")
    assert not any("one · " in text for text in texts(app))
    with lock_run(run, 0, lambda: None):
        assert any(text.startswith("one · ") for text in texts(app.run()))


def test_a_training_that_ended_is_not_shown(tmp_path):
    run = make_run(tmp_path / "outputs" / "one")
    (run / live.LIVE).write_text(json.dumps({"step": 3, "steps": 9}))
    for status in ("finished", "unfinished"):
        (run / "run.json").write_text(json.dumps({"status": status}))
        app = show("runs")
        assert not any("one · " in text for text in texts(app))
        assert not app.button


@pytest.mark.parametrize(
    ("address", "hosts", "variables", "may"),
    [
        ("127.0.0.1", ["localhost", "127.0.0.1"], {}, (True, True)),
        ("::1", ["localhost"], {}, (True, True)),
        ("0.0.0.0", ["localhost"], {}, (False, True)),
        (None, ["localhost"], {}, (False, True)),  # all addresses
        ("127.0.0.1", [], {}, (False, True)),  # any name
        ("127.0.0.1", ["localhost", "lab.example.org"], {}, (False, True)),  # a proxy
        ("127.0.0.1", ["localhost"], {"SPACE_ID": "me/space"}, (False, False)),
    ],
)
def test_only_a_page_that_nobody_else_opens_has_control(monkeypatch, address, hosts, variables, may):
    from helpers.page_rights import CONTROL, has_control

    bind(monkeypatch, address, hosts)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    by_default = has_control()
    monkeypatch.setenv(CONTROL, "on")
    assert (by_default, has_control()) == may


def test_without_control_there_is_no_button_and_an_old_one_does_nothing(run, monkeypatch):
    with live.listen(run, 0, 4, 1, ALONE):
        app = show("runs")
        assert "Save and stop" in labels(app)
        bind(monkeypatch, "0.0.0.0", ["localhost"])
        app.button[2].click().run()  # of a page from before the server was bound elsewhere
        assert not (run / live.REQUESTS).exists()
        assert any(text.startswith("one · step 0 of 4") for text in texts(app))
        assert not app.button


def test_a_training_of_another_machine_is_not_asked(run):
    with live.listen(run, 0, 4, 1, ALONE):
        row = json.loads((run / live.LIVE).read_text()) | {"host": "elsewhere"}
        (run / live.LIVE).write_text(json.dumps(row))
        (run / ".lock").write_text("\n" + json.dumps({"host": "elsewhere", "pid": row["pid"]}) + "\n")
        app = show("runs")
        assert any(text.startswith("one · step 0 of 4") for text in texts(app))
        assert not app.button


def test_a_foreign_file_of_requests_is_kept_and_named(run):
    with live.listen(run, 0, 4, 1, ALONE):
        (run / live.REQUESTS).write_text("mine")
        app = show("runs")
        app.button[0].click().run()
        assert "requests.json is not readable JSON" in app.warning[0].value.replace("\\", "")
        assert (run / live.REQUESTS).read_text() == "mine"


@pytest.mark.parametrize("row", ["[]", "{", "[" * 3000, '{"step": "x", "steps": -1, "time": 7, "answered": [1]}', EVIL])
def test_a_foreign_live_json_shows_no_error(run, row):
    with live.listen(run, 0, 4, 1, ALONE):
        known = json.loads((run / live.LIVE).read_text())
        text = json.dumps(known | json.loads(row)) if row.startswith('{"') else row
        (run / live.LIVE).write_text(text)
        assert any(text.startswith("one · ") for text in texts(show("runs")))


def shown(app: AppTest) -> list[str]:
    return [text for text in texts(app) if ", step " in text]


def test_the_samples_of_one_prompt_stand_at_any_step(run):
    app = show()
    assert shown(app) == ["one, step 20"]
    prompt = next(box for box in app.selectbox if box.label == "Prompt of the samples")
    assert prompt.options == ["all prompts", *PROMPTS]
    prompt.set_value("flower 9").run()
    app.select_slider[0].set_value(10).run()
    assert not app.exception
    assert shown(app) == ["one, step 10, seed 9"]
    sample(run, 30, 250)
    app.run()
    assert shown(app) == ["one, step 10, seed 9"]  # the user has moved the slider
    app.select_slider[0].set_value(30).run()
    sample(run, 40, 255)
    app.run()
    assert shown(app) == ["one, step 40, seed 9"]  # it was at its end, which it follows


def test_a_prompt_is_cut_out_where_it_stands(run):
    from helpers.run_samples import ALL, crop

    with Image.open(run / "samples" / "step-000020.png") as grid:
        for number, prompt in enumerate(PROMPTS):
            assert crop(grid, PROMPTS, prompt).getcolors() == [(256, (number, 200, 0))]
        assert crop(grid, PROMPTS, ALL).size == grid.size
        assert crop(grid, PROMPTS, "another") is None
        assert crop(grid, PROMPTS[:3], PROMPTS[0]).size == grid.size  # resumed with other prompts


def test_damaged_samples_and_links_are_no_error(run, tmp_path):
    (run / "samples" / "step-000030.png").write_bytes(b"no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (run / "samples" / "step-000040.png").symlink_to(tmp_path / "secret.png")
    app = show()
    assert "one, step 30: step-000030.png cannot be read" in texts(app)
