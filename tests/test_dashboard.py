"""The dashboard: what it shows of an empty folder and of runs, and that neither queries nor files make it show more."""

import ast
import json
import shutil
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "dashboard" / "streamlit_app.py"
LIGHT = {"json", "re", "sys", "pathlib", "typing", "altair", "pandas", "streamlit", "yaml", "common"} | {
    f"t2i.{module}" for module in ("cards", "curves", "runs", "tracking")
}


def make_run(folder: Path) -> Path:
    """A run folder with two checkpoints at two guidance scales."""
    (folder / "pipeline").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    (folder / "run.json").write_text(json.dumps({"status": "finished", "steps": 20}))
    rows = [{"step": step, "train_loss": 1 / step} for step in range(10, 30, 10)] + [{"step": 20, "val_loss": 0.4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    cells = [
        {
            "checkpoint": f"checkpoint-0000{step}",
            "guidance_scale": scale,
            "grid": f"grid-checkpoint-0000{step}-{scale:g}.png",
        }
        | {"val_loss": 0.4, "prompt_following": {"petal_color": 0.9}, "kid": None}
        for step in (10, 20)
        for scale in (1.5, 3.0)
    ]
    for number, known in enumerate(cells):
        Image.new("RGB", (16 + number, 16)).save(folder / "evaluation" / known["grid"])
    report = {"guidance_scale": 3.0, "checkpoint": "checkpoint-000020", "prompt_following": {"petal_color": 0.975}}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps({"cells": cells, "report": report}))
    return folder


def show(**query: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=20)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception
    return app


def texts(app: AppTest) -> list[str]:
    return [element.value for element in app.text]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_empty_folder_names_the_command() -> None:
    app = show()
    assert [element.value for element in app.code] == ["make demo"]
    assert not app.multiselect


def test_a_run_shows_figures_curves_and_pictures(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "demo" / "unet")
    (tmp_path / "outputs" / "demo" / "vae").mkdir()
    (tmp_path / "outputs" / "demo" / "vae" / "run.json").write_text("{}")  # no pipeline: not shown
    app = show()
    assert app.multiselect[0].options == ["demo/unet"]
    assert "status: finished   steps: 20" in texts(app)
    cells, report = (element.value for element in app.dataframe)
    assert list(cells["guidance_scale"]) == [1.5, 3.0, 1.5, 3.0]
    assert list(cells["prompt_following.petal_color"]) == [0.9] * 4
    assert dict(zip(report["figure"], report["value"], strict=True))["prompt_following.petal_color"] == "0.975"
    assert len(app.get("image")) == 1
    assert len(app.get("vega_lite_chart")) == 1
    first = app.get("image")[0].proto.imgs[0].url
    app.selectbox[0].select("checkpoint-000010").run()
    assert app.get("image")[0].proto.imgs[0].url != first
    second = app.get("image")[0].proto.imgs[0].url
    app.select_slider[0].set_value(3.0).run()
    assert app.get("image")[0].proto.imgs[0].url != second


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two")
    app = show()
    app.multiselect[0].set_value(["one", "two"]).run()
    assert not app.exception
    assert len(app.selectbox) == 2
    assert {"one", "two"} <= set(texts(app))


def test_a_query_opens_only_what_is_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two")
    make_run(tmp_path / "secret")
    for query in ("../secret", "<script>alert(1)</script>\n---"):
        app = show(run=query)
        assert sorted(app.multiselect[0].options) == ["one", "two"]
        assert not any("secret" in text or "script" in text for text in texts(app))
    for name in ("one", "two"):
        assert show(run=name).multiselect[0].value == [name]


def test_a_hostile_evaluation_shows_no_other_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    run = make_run(tmp_path / "outputs" / "one")
    (run / "evaluation" / "linked.png").symlink_to(tmp_path / "secret.png")
    (run / "evaluation" / "damaged.png").write_bytes(b"<html>")
    grids = ["../../../secret.png", "/etc/passwd", "linked.png", None, ["x"], "damaged.png"]
    cells = [{"checkpoint": "checkpoint-1", "guidance_scale": scale, "grid": grid} for scale, grid in enumerate(grids)]
    evaluation = {"cells": [*cells, 5, {"checkpoint": [1], "guidance_scale": [2]}], "report": "none"}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    app = show()
    for scale in range(len(grids)):
        app.select_slider[0].set_value(scale).run()
        assert not app.exception
        assert not app.get("image")
        assert any("missing" in text or "cannot be read" in text for text in texts(app))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    (run / "evaluation" / "evaluation.json").write_text('{"cells": [')
    app = show()
    assert "evaluation.json is not readable JSON" in app.warning[0].value.replace("\\", "")
    assert any("evaluate_checkpoints.py --model outputs/one" in element.value for element in app.code)


def test_imports_are_light_and_settings_safe() -> None:
    files = [APP, *sorted(APP.parent.glob("common.py")), *sorted((APP.parent / "pages").glob("*.py"))]
    for file in files:
        imports = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
        assert names <= LIGHT, file  # nothing of them imports torch: tests/test_architecture.py
        assert "unsafe_allow_html" not in file.read_text()
    settings = tomllib.loads((APP.parent / ".streamlit" / "config.toml").read_text())
    assert settings["server"]["address"] == "127.0.0.1"
    assert settings["server"]["allowedHosts"] == ["localhost", "127.0.0.1"]
    assert settings["client"]["showErrorDetails"] == "none"
    assert not settings["browser"]["gatherUsageStats"]


def test_a_hostile_url_shows_the_usual_page(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "one")
    usual = show(run="one")
    app = show(run="one", checkpoint="../../etc/passwd", guidance_scale="NaN", seed="1e99")
    assert app.selectbox[0].value == usual.selectbox[0].value
    assert app.select_slider[0].value == usual.select_slider[0].value
    shared = show(run="one", checkpoint="checkpoint-000010", guidance_scale="3.0")
    assert (shared.selectbox[0].value, shared.select_slider[0].value) == ("checkpoint-000010", 3.0)


def test_a_run_deleted_while_shown_leaves_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    app = show(run="one")
    shutil.rmtree(run)
    app.run()
    assert not app.exception
    assert [element.value for element in app.code] == ["make demo"]
