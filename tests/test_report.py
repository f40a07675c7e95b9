"""The HTML report of an evaluation: complete in one file, safe whatever the run's files say, and small enough to mail."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from t2i.evaluation import report
from t2i.evaluation.verdict import make_verdict
from t2i.pictures import cells
from test_compare import PROMPTS
from test_evaluation_wall import evaluated_run

EVIL = "\"><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)> '&amp;"
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


class Page(HTMLParser):
    """What a browser reads: the elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str, **attributes) -> int:
        return sum(name == tag and attributes.items() <= known.items() for name, known in self.elements)


def reported_run(folder: Path, side: int = 8, **more) -> Path:
    """An evaluated run with all files that a report reads."""
    run = evaluated_run(folder, **more)
    (run / "config.yaml").write_text(f"data:\n  dataset: '<b>set</b>'\nhub_token: {SECRET}\n")
    (run / "provenance.json").write_text(json.dumps({"dataset": EVIL, "code": "abc"}))
    known = {"identity": {"guidance_scales": [1.5], "checkpoints": [EVIL]}}
    (run / "evaluation" / "run.json").write_text(json.dumps(known))
    if side > 8:
        noise = np.random.default_rng(0)
        for path in (run / "cells").glob("*.png"):
            path.unlink()
        for step in ("checkpoint-000010", "checkpoint-000020"):
            for scale in (1.5, 3.0):
                made = [cells.Cell(prompt, "", seed, scale, 4) for prompt, seed in zip(PROMPTS, (7, 8), strict=True)]
                pictures = noise.integers(0, 256, (2, side, side, 3), np.uint8)
                cells.save_cells(run, step, cells.weights_hash(run / step), made, pictures)
    return run


def evaluation_of(run: Path) -> dict:
    return json.loads((run / "evaluation" / "evaluation.json").read_text())


def pair(side: int = 8) -> report.Pair:
    picture = np.full((side, side, 3), 200, np.uint8)
    return report.Pair(picture, picture, 0.42, f"prompt {EVIL}", f"caption {EVIL}")


def test_the_report_holds_all_of_the_evaluation(tmp_path):
    run = reported_run(tmp_path / "one")
    path = report.write_report(run, evaluation_of(run), [pair()])
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    for sentences in make_verdict(evaluation_of(run))["sentences"].values():
        assert all(sentence in page.text for sentence in sentences)
    assert page.count("figure", **{"class": "miss"}) == page.count("figure", **{"class": "hit"}) == 1
    assert page.count("td", **{"class": "best"}) == 2  # once per prompt
    assert page.count("img") == 2 + 2 * 4 + 2
    assert page.count("polyline") == 2
    for words in (
        "0.42: prompt",
        "kernel distance to real images",
        "Provenance",
        "Settings of the training",
        "<b>set</b>",
    ):
        assert words in page.text


def test_the_report_names_no_folder_of_this_machine(tmp_path):
    run = reported_run(tmp_path / "one")
    (run / "config.yaml").write_text(
        "data: {dataset: /home/someone/photos}\nvae: {vae: /home/someone/vae}\ncaption: {captioner: [/home/someone/blip]}\n"
    )
    (run / "provenance.json").write_text(json.dumps({"dataset": "photos", "vae_run": {"from": "/home/someone/base"}}))
    (run / "evaluation" / "run.json").write_text(json.dumps({"identity": {"judge_network": "/home/someone/judge"}}))
    evaluation = evaluation_of(run)
    evaluation["report"]["clip_score"] = {"mean": 30.0, "model": "/home/someone/clip"}
    text = report.write_report(run, evaluation, []).read_text(encoding="utf-8")
    assert "/home/someone" not in text
    assert all(
        f"{word}" in Page(text).text for word in ("dataset: photos", "vae: vae", "- blip", "base", "judge", "clip")
    )


@pytest.mark.parametrize(
    ("name", "title"), [("one", "one"), ("a <i>run & more", "a <i>run & more"), ("roses/unet", "roses")]
)
def test_no_text_of_a_file_becomes_markup_and_nothing_is_loaded(tmp_path, name, title):
    wanted = {"wanted": EVIL, "read": EVIL + "2"}
    sentences = {topic: [EVIL] for topic in ("best", "right", "copies")}
    run = reported_run(tmp_path / name, readings=[{EVIL: wanted}] * 2, verdict={"sentences": sentences})
    evaluation = evaluation_of(run)
    evaluation["cells"][0]["prompt_following"] = {EVIL: 0.5, "all": 0.5}
    evaluation["report"][EVIL] = EVIL
    page = Page(report.write_report(run, evaluation, [pair()]).read_text(encoding="utf-8"))
    assert page.text.count("<script>alert(1)</script>") > 8
    assert f"Evaluation of {title}" in page.text
    assert {tag for tag, _ in page.elements} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "h3",
            "p",
            "div",
            "figure",
            "figcaption",
            "img",
        ),
        *("table", "tr", "td", "th", "svg", "polyline", "text", "details", "summary", "pre"),
    }
    for tag, attributes in page.elements:
        assert not any(key.startswith("on") or key in ("href", "style", "srcset") for key in attributes), (
            tag,
            attributes,
        )
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    (policy,) = (known["content"] for _, known in page.elements if known.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "url(" not in report.STYLE
    assert "@import" not in report.STYLE
    assert SECRET not in page.text
    assert "hub_token: '[redacted]'" in page.text


def test_pictures_shrink_until_the_file_can_be_mailed(tmp_path, monkeypatch):
    run = reported_run(tmp_path / "one", side=300)
    path = report.write_report(run, evaluation_of(run), [pair(300)])
    assert path.stat().st_size > 2_000_000
    assert Page(path.read_text()).count("img") == 12
    monkeypatch.setattr(report, "MOST_BYTES", 700_000)
    assert path.stat().st_size > 700_000
    path = report.write_report(run, evaluation_of(run), [pair(300)])
    assert path.stat().st_size <= 700_000
    assert "data:image/jpeg" in path.read_text()
    # The smallest pictures fit, however many checkpoints, scales and prompts there are.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    grids = report.GRID_PROMPTS * (report.GRID_CHECKPOINTS + 1) * (report.GRID_SCALES + 1)
    pictures = report.WALL_PICTURES + grids + 2 * report.PAIRS
    side, kind = report.SIZES[-1]
    assert len(report._data(noise, side, kind, "")) * pictures < 15_000_000 / 2


def test_a_report_without_pictures_or_verdict_says_so(tmp_path):
    run = reported_run(tmp_path / "one")
    evaluation = evaluation_of(run)
    for path in (run / "cells").glob("*.png"):
        path.unlink()
    evaluation["report"]["prompts"] = None
    page = Page(report.write_report(run, evaluation, []).read_text())
    assert "lacks the figures of a verdict" in page.text
    assert "not in the run folder" in page.text
    assert page.count("img") == 0
