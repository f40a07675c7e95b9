"""Every page of a real server: hostile URLs, damaged and vanishing runs, and words that look like code."""

import ast
import json
import shutil
from urllib.parse import urlencode

import pytest

from streamlit_client import ROOT, Session, serve
from test_compare import EVIL, evaluate, make_run

PAGES = [  # as they stand in the URL; found in the source, so that a new page is here as well
    name
    for node in ast.parse((ROOT / "dashboard" / "streamlit_app.py").read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id == "PAGES"
    for name in ast.literal_eval(node.value)
]
URLS = ["", *PAGES[1:]]  # the first is where one arrives
MARKS = "![x](//a.b) **c**"  # short enough for a tab
HOSTILE = {
    "checkpoint": "../../etc/passwd", "run": "../../../etc", "runs": "/etc/passwd", "guidance_scale": "NaN", "seed": "1e99",
    "num_inference_steps": "-1", "prompt": "\x00" + EVIL, "negative_prompt": EVIL, "scheduler": "os.system", "columns": "run",
    "guidance_end": "NaN",
    "rows": "../", "tabs": "<b>", "tab": "1e99", "page": "-1", "left": "row 9, column 9", "right": "\u202e", "view": "x",
    "metric": "../x", "name": "*", "smoothing": "NaN", "source": "file:///etc/passwd", "image": "../../etc/passwd", "n": "NaN",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with serve(folder, folder.parent / "faults.log") as running:
        running.folder = folder
        yield running


@pytest.fixture(autouse=True)
def outputs(server):
    """An empty outputs folder for each test, and the server in health after it."""
    folder = server.folder / "outputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    assert server.health() == 200
    assert "Traceback" not in server.log.read_text()


def show(server, page: str, query: dict[str, str] | None = None) -> Session:
    with Session(server.url).connected() as session:
        session.open(page, urlencode(query or {}))
    assert not session.problems
    assert session.has("heading")
    assert "`None`" not in session.texts()  # what Streamlit shows of an expression that stands alone
    return session


def read_as_markdown(session: Session) -> str:
    """All that the browser would read Markdown in: notes, warnings, labels, and the options of tabs."""
    words = []
    for kind, element, _ in session.elements.values():
        if kind in ("markdown", "alert", "heading"):
            words.append(element.body)
        words.append(getattr(element, "label", ""))
        if kind in ("radio", "button_group"):
            words += [getattr(option, "content", option) for option in element.options]
        assert not getattr(element, "allow_html", False)
    return "\n".join(words)


@pytest.mark.parametrize("page", URLS)
def test_an_empty_folder_gets_a_sentence_and_a_command(server, page):
    session = show(server, page)
    assert len(session.texts()) >= 2
    assert session.has("code")


@pytest.mark.parametrize("page", URLS)
def test_a_hostile_url_opens_nothing(server, outputs, page):
    make_run(outputs / "one")
    session = show(server, page, HOSTILE)
    shown = str([element for _, element, _ in session.elements.values()])
    assert "root:" not in shown  # of /etc/passwd
    answers = [text for text in session.texts() if "which the page's address names" not in text]
    assert "/etc" not in " ".join(answers)
    assert "<script" not in read_as_markdown(session)


@pytest.mark.parametrize("page", URLS)
def test_half_written_checkpoints_and_files(server, outputs, page):
    run = make_run(outputs / "one")
    (run / "checkpoint-000020" / "unet" / "weights.safetensors").write_text("cut")
    (run / "checkpoint-000030").mkdir()
    for name in ("run.json", "provenance.json", "quarantine.json", "config.yaml", "evaluation/evaluation.json"):
        (run / name).write_text('{"status": "runn')
    (run / "pipeline" / "model_index.json").write_text("{")
    show(server, page)


@pytest.mark.parametrize("page", URLS)
def test_numbers_that_no_table_takes(server, outputs, page):
    run = make_run(outputs / "one", evaluated=False)
    evaluate(run, ["checkpoint-000010"])
    file = run / "evaluation" / "evaluation.json"
    found = json.loads(file.read_text())
    cell = {"checkpoint": "checkpoint-000010", "guidance_scale": 10**20, "val_loss": 10**30, "kid": {"mean": 10**200}}
    file.write_text(json.dumps(found | {"cells": [cell, cell | {"guidance_scale": 2}], "report": {"prompts": 10**30}}))
    state = {"status": ["x"], "steps": 10**25, "val_loss": 10**200, "seconds": {"train": 10**200}, "psnr_db": 1e305}
    (run / "run.json").write_text(json.dumps(state))
    (run / "metrics.jsonl").write_text(
        '{"step": 1000000000000000000000000, "val_loss": 1}\n{"step": 1, "val_loss": 1e308}\n'
    )
    show(server, page)


@pytest.mark.parametrize("page", URLS)
def test_a_run_deleted_while_it_is_shown(server, outputs, page):
    make_run(outputs / "one")
    make_run(outputs / "two")
    with Session(server.url).connected() as session:
        session.open(page)
        shutil.rmtree(outputs / "one")
        session.go(page)
        shutil.rmtree(outputs / "two")
        session.go(page)
        assert not session.problems
        assert session.has("heading")


@pytest.mark.parametrize("page", URLS)
def test_words_from_outside_are_shown_as_they_are(server, outputs, page):
    name = EVIL.replace("/", "\u2215")
    for prompts in ([MARKS, "b"], [EVIL, MARKS]):
        run = make_run(outputs / name, evaluated=False)
        evaluate(run, ["checkpoint-000010"])
        found = json.loads((run / "evaluation" / "evaluation.json").read_text())
        found["sweep"]["prompts"] = prompts
        found["report"] = {EVIL: EVIL, "prompt": MARKS}
        (run / "evaluation" / "evaluation.json").write_text(json.dumps(found))
        (run / "run.json").write_text(json.dumps({"status": EVIL, "machine": MARKS}))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, EVIL: 1.0, MARKS: 2.0}) + "\n")
        (run / "pipeline" / "README.md").write_text(f"---\ntitle: {EVIL}\n---\n# {MARKS} {EVIL}")
        read = read_as_markdown(show(server, page))
        assert "<script" not in read
        assert "**" not in read
        assert "![x](" not in read
        shutil.rmtree(run)


def test_a_grid_of_ten_thousand_asks_and_one_of_a_million_is_refused(server, outputs):
    make_run(outputs / "one")
    grid = {"columns": "guidance scale", "rows": "seed", "guidance_scale": "1-100", "prompt": "a flower"}
    session = show(server, "", grid | {"tabs": "none", "seed": "1-100"})
    assert "10,000 of 10,000 pictures are not drawn yet" in " ".join(session.texts())
    assert len(session.data("picture_grid")["cells"]) == 100
    session = show(server, "", grid | {"tabs": "steps", "seed": "1-100", "num_inference_steps": "1-100"})
    assert "a grid of 1,000,000 pictures is more than 10,000" in " ".join(session.texts())
    assert not session.data("picture_grid")
