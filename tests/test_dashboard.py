"""The dashboard: an empty folder, runs, and queries and files that must not make it show more."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from t2i.run_lock import lock_run

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "dashboard" / "streamlit_app.py"
HEAVY = {"torch", "diffusers", "transformers", "datasets", "mlflow", "accelerate"}
OPEN_ALL = """
import sys
from streamlit.testing.v1 import AppTest
for page in sys.argv[2:]:
    app = AppTest.from_file(sys.argv[1], default_timeout=20)
    app.switch_page(f"views/{page}.py").run()
    assert not app.exception and app.title, page
print(*sorted(sys.modules))
"""

PAGES = ("compare", "playground", "curves", "runs")
EVIL = "<script>alert(1)<\u2215script> **bold** [x](javascript:y)"  # a folder's name holds no real slash


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
    Image.new("RGB", (32, 32)).save(folder / "evaluation" / "report.png")
    return folder


def show(page: str = "compare", **query: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=20)
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page(f"views/{page}.py").run()
    assert not app.exception
    return app


def texts(app: AppTest) -> list[str]:
    return [element.value for element in app.text]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_folder_names_the_command(page: str) -> None:
    app = show(page)
    assert [element.value for element in app.code] == ["make demo"]
    assert not app.multiselect


@pytest.mark.parametrize("page", ["compare", "playground", "blind"])
def test_pages_of_pictures_wait_for_a_denoiser_beside_an_autoencoder(tmp_path: Path, page: str) -> None:
    (tmp_path / "outputs" / "demo" / "vae").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "vae" / "run.json").write_text("{}")
    (tmp_path / "outputs" / "demo" / "vae" / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1}\n')
    app = show(page)
    assert [info.value for info in app.info] == [
        "outputs/ has no run that draws pictures yet. A denoiser appears here when its training starts."
    ]
    assert not app.code


@pytest.mark.parametrize("page", [*PAGES, "blind", "data", "vae"])
def test_a_folder_whose_name_is_not_utf8_is_named_once_and_left_out(tmp_path: Path, page: str) -> None:
    make_run(tmp_path / "outputs" / "one")
    try:
        make_run(tmp_path / "outputs" / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system takes no such names")
    app = show(page)
    named = [warning.value.replace("\\", "") for warning in app.warning if "not UTF-8" in warning.value]
    assert len(named) == 1
    assert "outputs/caf\ufffd; rename" in named[0]
    assert len([one for one in app.run().warning if "not UTF-8" in one.value]) == 1
    assert list(sys.modules["helpers.run_list"].find_runs("any")) == ["one"]


def test_a_run_shows_figures_curves_and_pictures(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "demo" / "unet")
    (tmp_path / "outputs" / "demo" / "vae").mkdir()
    (tmp_path / "outputs" / "demo" / "vae" / "run.json").write_text("{}")  # no pipeline: not shown
    app = show()
    assert app.multiselect[0].options == ["demo/unet"]
    assert "status: finished   steps: 20" in texts(app)
    cells, report = (element.value for element in app.dataframe)
    assert list(cells["guidance scale"]) == [1.5, 3.0, 1.5, 3.0]
    assert list(cells["prompt following, petal color"]) == [0.9] * 4
    assert dict(zip(report["figure"], report["value"], strict=True))["prompt following, petal color"] == "97.5%"
    assert len(app.get("image")) == 1  # the report's
    assert len(app.get("vega_lite_chart")) == 1


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two")
    app = show()
    app.multiselect[0].set_value(["one", "two"]).run()
    assert not app.exception
    assert {"one", "two"} <= set(texts(app))
    assert len(app.get("image")) == 2


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


def test_a_picture_elsewhere_or_damaged_is_not_shown(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    report = make_run(tmp_path / "outputs" / "one") / "evaluation" / "report.png"
    report.unlink()
    assert any("missing" in text for text in texts(show()))
    report.symlink_to(tmp_path / "secret.png")
    app = show()
    assert not app.get("image")
    assert any("missing" in text for text in texts(app))
    report.unlink()
    report.write_bytes(b"<html>")
    app = show()
    assert not app.get("image")
    assert any("cannot be read" in text for text in texts(app))


def test_compare_names_the_best_checkpoint_and_what_the_judge_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    results = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert any("Best: checkpoint-000020 at guidance scale 3.0" in text for text in texts(show()))
    row = {"network": "lite0", "kernel_distance": 12.5, "standard_error": 0.5}
    results["report"]["judge"] = {"network": "lite0", "real": row, "pictures": {**row, "kernel_distance": 80.0}}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(results))
    app = show()
    assert any("Judged by lite0" in text for text in texts(app))
    table = next(frame.value for frame in app.dataframe if "kernel distance" in frame.value)
    assert table["kernel distance"].tolist() == [12.5, 80.0]
    assert table.iloc[:, 0].tolist() == ["unseen real images", "pictures"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    (run / "evaluation" / "evaluation.json").write_text('{"cells": [')
    app = show()
    (warning,) = app.warning
    assert "evaluation.json is not readable JSON" in warning.value.replace("\\", "")
    assert any("evaluate_checkpoints.py --model outputs/one" in element.value for element in app.code)


def test_no_page_imports_what_is_heavy(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "one")
    words = [sys.executable, "-c", OPEN_ALL, str(APP), *PAGES]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_settings_are_safe() -> None:
    for file in APP.parent.rglob("*.py"):
        assert "unsafe_allow_html" not in file.read_text()
    for file in (APP.parent / "assets").glob("*.js"):
        assert "innerHTML" not in file.read_text()
    settings = tomllib.loads((APP.parent / ".streamlit" / "config.toml").read_text())
    assert settings["server"]["address"] == "127.0.0.1"
    assert settings["server"]["allowedHosts"] == ["localhost", "127.0.0.1"]
    assert settings["client"]["showErrorDetails"] == "none"
    assert not settings["browser"]["gatherUsageStats"]


def charts(app: AppTest) -> list[dict]:
    return [json.loads(element.proto.spec) for element in app.get("vega_lite_chart")]


def make_store(folder: Path, runs: int = 2) -> None:
    """What of MLflow's tables is read, without the seconds that MLflow takes to make all."""
    with sqlite3.connect(folder / "mlflow.db") as store:
        store.execute("CREATE TABLE runs (run_uuid, name, status, lifecycle_stage, start_time)")
        store.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
        store.execute("CREATE TABLE latest_metrics (key, run_uuid)")
        for n in range(runs):
            store.execute("INSERT INTO runs VALUES (?, 'unet', 'FINISHED', 'active', ?)", (f"{n:032x}"[::-1], n))
            store.execute("INSERT INTO latest_metrics VALUES ('train_loss', ?)", (f"{n:032x}"[::-1],))
            rows = [("train_loss", 1 / step, 1000 * step, f"{n:032x}"[::-1], step, 0) for step in range(1, 2001)]
            store.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
    store.close()


@pytest.mark.parametrize("page", PAGES)
def test_a_hostile_url_shows_the_page_as_without_it(tmp_path: Path, page: str) -> None:
    make_run(tmp_path / "outputs" / "one")
    hostile = {"sample": "../../etc/passwd", "guidance_scale": "NaN", "seed": "1e99", "smoothing": "NaN"}
    hostile |= {
        "metric": "<b>",
        "figure": "x",
        "scale": "none",
        "source": "file:///etc",
    }
    hostile |= {"x": "9", "card": "..", "status": "\x00", "best": "1e99", "diff": "perhaps", "bands": "-1"}
    plain, app = show(page), show(page, **hostile)
    assert texts(app) == texts(plain)
    assert len(app.get("vega_lite_chart")) == len(plain.get("vega_lite_chart"))
    assert len(app.get("image")) == len(plain.get("image"))
    assert "passwd" not in str([*texts(app), *(element.value for element in app.markdown)])


@pytest.mark.parametrize("page", PAGES)
def test_a_run_that_the_url_names_and_that_is_not_there_gets_a_sentence(tmp_path: Path, page: str) -> None:
    make_run(tmp_path / "outputs" / "one")
    app = show(page, **{"run" if page in ("compare", "playground") else "runs": "../<b>one"})
    warning = app.warning[0].value.replace("\\", "")
    assert "outputs/ holds no ../&lt;b&gt;one, which the page's address names; choose" in warning
    assert not app.get("vega_lite_chart")
    assert not app.get("image")
    assert not app.get("bidi_component")


def test_an_autoencoder_is_not_carried_to_compare_and_not_called_gone(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "one")
    (tmp_path / "outputs" / "vae" / "vae").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "outputs" / "one" / name, tmp_path / "outputs" / "vae")
    app = show("curves")
    app.multiselect(key="runs").select("one").select("vae").run()
    app.switch_page("views/compare.py").run()
    assert app.multiselect(key="run").value == ["one"]
    assert not app.warning
    for page in ("compare", "playground"):
        assert "vae draws no pictures" in show(page, run="vae").warning[0].value
    assert "vae draws no pictures" in show("blind", a_run="vae").warning[0].value


def test_a_gone_run_that_is_restored_is_gone_no_more(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "one")
    app = show("runs", runs="two")
    assert "outputs/ holds no two" in app.warning[0].value
    make_run(tmp_path / "outputs" / "two")
    assert not app.run().warning


@pytest.mark.parametrize("page", PAGES)
def test_a_run_deleted_while_shown(tmp_path: Path, page: str) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    make_run(tmp_path / "outputs" / "two")
    key = "run" if page == "compare" else "runs"
    app = show(page, **{key: "one"})
    shutil.rmtree(run)
    app.run()
    assert not app.exception
    assert "one" not in texts(app)
    shutil.rmtree(tmp_path / "outputs")
    app.run()
    assert not app.exception
    assert [element.value for element in app.code] == ["make demo"]


@pytest.mark.parametrize("page", PAGES)
def test_a_half_written_run(tmp_path: Path, page: str) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    (run / "checkpoint-000030").mkdir()
    (run / "checkpoint-000030" / "manifest.json").write_text('{"files": {"unet')
    for name in ("run.json", "evaluation/evaluation.json", "provenance.json", "config.yaml"):
        (run / name).write_text('{"status": "runn')
    (run / "metrics.jsonl").write_text('{"step": 1, "train_lo')
    app = show(page)
    assert app.warning or page in ("curves", "playground")
    assert not any("checkpoint-000030" in text for text in texts(app))


@pytest.mark.parametrize("page", PAGES)
def test_names_are_shown_as_they_are(tmp_path: Path, page: str) -> None:
    run = make_run(tmp_path / "outputs" / EVIL)
    (run / "pipeline" / "README.md").write_text(f"---\ntitle: {EVIL}\n---\n<script>alert(2)</script>")
    (run / "config.yaml").write_text(f"data: {{dataset: '{EVIL}'}}")
    cell = {"checkpoint": EVIL, "guidance_scale": 1.0, "grid": EVIL, "caption": EVIL, "val_loss": 0.5}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps({"cells": [cell], "report": {EVIL: EVIL}}))
    (run / "provenance.json").write_text("[" * 3 + EVIL)
    app = show(page)
    for element in [*app.markdown, *app.warning, *app.info, *app.caption]:
        assert "<script" not in element.value
        assert "**bold**" not in element.value
    assert not any(getattr(element.proto, "allow_html", False) for element in app.markdown)


def test_curves_of_folders_by_band_smoothed_and_over_guidance(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = make_run(tmp_path / "outputs" / name)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('\n{"step": 20, "val_loss_0_250": 0.5, "lr": 0.1}\n')
    app = show("curves")
    assert texts(app)[0] == "losses"
    assert len(charts(app)) == 2  # losses, and the first figure over the guidance scale
    assert charts(app)[0]["layer"][0]["encoding"]["strokeDash"]["field"] == "metric"
    app = show("curves", name="ONE", metric="lr", bands="true", smoothing="0.5", scale="log")
    assert texts(app)[:2] == ["lr", "losses"]
    assert charts(app)[0]["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"
    app.radio(key="x").set_value("wall time").run()
    assert "no times were recorded: these runs were trained without MLflow" in texts(app)
    assert not app.caption


def test_a_running_run_alone_is_live(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    (run / "run.json").write_text('{"status": "running"}')
    make_store(tmp_path, runs=1)  # MLflow calls a killed run RUNNING as well
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        store.execute("UPDATE runs SET status = 'RUNNING'")
    store.close()
    (run / "mlflow_spool").mkdir()
    (run / "mlflow_spool" / "state.json").write_text(json.dumps({"run_id": "0" * 32}))
    with lock_run(run, 0, lambda: None):
        assert "drawn again" in show("curves").caption[0].value
        assert "drawn again" in show("curves", source="MLflow").caption[0].value
    assert not show("curves").caption  # it was killed
    assert not show("curves", source="MLflow").caption
    assert list(show("runs").dataframe[0].value["status"]) == ["interrupted"]


def test_curves_of_a_sqlite_store_are_thinned(tmp_path: Path) -> None:
    make_store(tmp_path, runs=25)
    app = show("curves", source="MLflow")
    assert "losses" in texts(app)
    assert len(charts(app)[0]["layer"][0]["encoding"]["color"]["scale"]["domain"]) == 25
    app = show("curves", source="MLflow", name="(10000000)")
    assert len(charts(app)) == 1
    assert not app.caption


def test_stores_that_do_not_answer_get_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is missing" in show("curves", source="MLflow").warning[0].value.replace("\\", "")
    (tmp_path / "mlflow.db").write_text("half a database" * 99)
    assert "cannot be read" in show("curves", source="MLflow").warning[0].value
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense")
    assert "MLFLOW" in show("curves", source="MLflow").warning[0].value
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    assert "does not answer" in show("curves", source="MLflow").warning[0].value
    assert time.monotonic() - began < 30  # not the minutes for which MLflow tries again


def test_a_server_that_keeps_silent_does_not_block_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        app = show("curves", source="MLflow")
        assert time.monotonic() - began < 9  # not the 10 s for which a request waits
        assert "waiting for the server's list of runs" in texts(app)


def test_the_table_of_runs(tmp_path: Path) -> None:
    for name, rate in (("one", 1), ("two", 2)):
        run = make_run(tmp_path / "outputs" / name)
        (run / "config.yaml").write_text(f"train_unet: {{learning_rate: {rate}, seed: 0, hub_token: hf_geheim}}")
        (run / "provenance.json").write_text(json.dumps({"code": f"commit {rate}"}))
    (tmp_path / "outputs" / "two" / "run.json").write_text('{"status": "running"}')
    extensions = [{"from_steps": 5}, {"from_steps": 10}, {"from_steps": "<b>"}, 7]
    (tmp_path / "outputs" / "one" / "run.json").write_text(
        json.dumps({"status": "finished", "steps": 20, "extensions": extensions})
    )
    (tmp_path / "outputs" / "one" / "pipeline" / "README.md").write_text("# Card <b>of one</b>")
    app = show("runs", measure="prompt_following.petal_color")
    table, best, settings, provenance = (element.value for element in app.dataframe)
    assert sorted(table["run"]) == ["one", "two"]
    one = table.set_index("run").loc["one"]
    assert (one["steps"], one["extended from"]) == (20, "5, 10")
    assert list(best["value"]) == [0.9, 0.9]
    assert any(text.startswith("prompt following, petal color, higher is better") for text in texts(app))
    assert list(settings["setting"]) == ["train_unet.learning_rate"]
    assert list(provenance.set_index("what").loc["code", ["one", "two"]]) == ["commit 1", "commit 2"]
    assert app.code[0].value == "# Card <b>of one</b>"
    app.toggle[0].set_value(False).run()
    assert list(app.dataframe[2].value["setting"]) == [
        f"train_unet.{key}" for key in ("learning_rate", "seed", "hub_token")
    ]
    assert "geheim" not in app.dataframe[2].value.to_string()
    assert list(show("runs", status="running").dataframe[0].value["run"]) == ["two"]
    filtered = show("runs", status="running", runs="one")
    assert "no run matches" in texts(filtered)
    assert not filtered.warning  # the chosen run is there, and ended
    assert list(show("runs", name="ON").dataframe[0].value["run"]) == ["one"]
    assert "no run matches" in texts(show("runs", name="none such"))


def test_only_figures_with_a_direction_choose_and_a_share_has_its_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    known = json.loads((run / "evaluation" / "evaluation.json").read_text())
    for result, share in zip(known["cells"], (23 / 32, 24 / 32, 8 / 32, 7 / 32), strict=True):
        result["prompt_following"] = {"all": share}
        result["memorisation"] = {"median_ratio": share, "copies": share}
        result["diversity"] = {"ratio": share, "real": 1.0}
        result["judge"] = {"kernel_distance": 100 * share, "standard_error": 2.0}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(known | {"sweep": {"prompts": ["a flower"] * 32}}))
    app = show("runs")
    offered = ["kernel distance to real images", "prompt following, combined attributes", "validation loss"]
    assert app.selectbox(key="measure").options == offered
    row = app.dataframe[1].value.iloc[0]
    assert (row["value"], row["95% interval"], row["others within it"]) == (21.875, "18 to 25.8", 1)
    app.selectbox(key="measure").set_value(offered[1]).run()
    row = app.dataframe[1].value.iloc[0]
    assert (row["value"], row["95% interval"], row["others within it"]) == (0.75, "0.579 to 0.867", 1)
    assert row["guidance scale"] == 3.0
    app.selectbox(key="measure").set_value("validation loss").run()
    assert "guidance scale" not in app.dataframe[1].value  # which the loss does not depend on


def test_runs_ranks_only_what_can_be_compared(tmp_path: Path) -> None:
    for name, judge in (("one", "efficientnet-lite0"), ("two", "dinov2"), ("student", "dinov2")):
        run = make_run(tmp_path / "outputs" / name)
        known = json.loads((run / "evaluation" / "evaluation.json").read_text())
        for result in known["cells"]:
            result |= {"checkpoint": "checkpoint-000001", "judge": {"kernel_distance": 9.0, "standard_error": 2.0}}
        known["report"] = {"judge": {"network": judge}}
        (run / "evaluation" / "evaluation.json").write_text(json.dumps(known))
        (run / "run.json").write_text(json.dumps({"student": {}} if name == "student" else {}))
    app = show("runs")
    assert "Compare only runs of one data set and one judge: these runs have several." in [
        caption.value for caption in app.caption
    ]
    assert set(app.dataframe[1].value["checkpoint"]) == {"checkpoint-000001 (removed)"}
    app.selectbox(key="measure").set_value("validation loss").run()
    assert sorted(app.dataframe[1].value["run"]) == ["one", "two"]
    app.selectbox(key="measure").set_value("validation loss of students").run()
    assert list(app.dataframe[1].value["run"]) == ["student"]
    alone = show("runs", runs="two")
    assert not [caption for caption in alone.caption if "several" in caption.value]


def test_a_model_of_the_hub_is_a_run_of_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "theirs" / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "outputs" / "theirs" / "pipeline" / "model_index.json").write_text("{}")
    app = show()
    assert app.multiselect(key="run").options == ["theirs"]
    assert app.multiselect(key="checkpoint").options == ["pipeline"]
    for page in PAGES:
        assert not show(page).exception


def test_linked_and_deeper_runs_are_listed_once_and_without_loops(tmp_path: Path) -> None:
    for name in ("outputs/one", "outputs/a/b/c/deep", "outputs/flowers/unet", "elsewhere/far"):
        make_run(tmp_path / name)
    outputs = tmp_path / "outputs"
    (outputs / "linked").symlink_to(tmp_path / "elsewhere" / "far")
    (outputs / "again").symlink_to(outputs / "one")
    (outputs / "loop").symlink_to(outputs)
    (outputs / "a" / "up").symlink_to("..")
    (outputs / "gone").symlink_to("nowhere")
    show()
    found = sys.modules["helpers.run_list"].find_runs()
    assert set(found) == {"one", "linked", "a/b/c/deep", "flowers/unet"}
    assert "linked" in show("compare", run="linked").multiselect[0].value


@pytest.mark.parametrize("page", [*PAGES, "vae"])
def test_foreign_files_and_copies_break_no_page(tmp_path: Path, page: str) -> None:
    run = make_run(tmp_path / "outputs" / "one")
    for name in (".DS_Store", "Thumbs.db", "run.json.bak", "checkpoint-notes.txt"):
        (run / name).write_bytes(b"\0\1")
    for name in (
        "checkpoint-000020-backup",
        "checkpoint-000020 (copy)",
        "checkpoint-\u0663\u0663\u0663\u0663\u0663\u0663",
    ):
        (run / name / "vae").mkdir(parents=True)
        (run / name / "manifest.json").write_text('{"step": 20, "files": {}}')
    for name, text in (("empty", ""), ("list", "[1]"), ("text", '"x"'), ("other", '{"status": ["a"], "identity": 3}')):
        (make_run(tmp_path / "outputs" / name) / "run.json").write_text(text)
    (tmp_path / "outputs" / ".DS_Store").write_bytes(b"")
    show(page)
    assert "one" in sys.modules["helpers.run_list"].find_runs()
