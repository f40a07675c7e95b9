"""Cleaning removes nothing that was not chosen, that cannot be made again, or that an active run needs."""

import json
import os
import re
import sys

import pytest

import clean_caches
from conftest import SCRIPTS
from t2i import run_lock
from t2i.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Caches and two runs, one finished and one interrupted, each with checkpoints, cells and spool."""
    monkeypatch.chdir(tmp_path)
    for name in ("done", "killed"):
        run = tmp_path / "outputs" / name
        for part in ("checkpoint-000001", "cells", "samples", "pipeline", "mlflow_spool"):
            (run / part).mkdir(parents=True)
            (run / part / "weights").write_bytes(b"x" * 1000)
        (run / "pipeline" / "model_index.json").write_text("{}")
        manifest = {"step": 1, "node": 0, "nodes": 1, "files": {"weights": {"bytes": 1000, "sha256": ""}}}
        (run / "checkpoint-000001" / "manifest.json").write_text(json.dumps(manifest))
        (run / "mlflow_spool.jsonl").write_text("{}\n")
        (run / "mlflow_spool" / "state.json").write_text(json.dumps({"offset": 3, "set_aside": []}))
        (run / "run.json").write_text(json.dumps({"status": "finished" if name == "done" else "unfinished"}))
    for name in ("pixels", "latents", "somebody_elses"):
        (tmp_path / ".cache" / "t2i" / name).mkdir(parents=True)
        (tmp_path / ".cache" / "t2i" / name / "array").write_bytes(b"x" * 2_000_000)
    return tmp_path


def clean(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["clean_caches.py", *words])
    clean_caches.main()


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_every_kind_of_cache_is_known():
    files = sorted((SCRIPTS / "t2i").rglob("*.py"))
    written = [name for file in files for name in re.findall(r'Path\(cache_dir\) / "(\w+)"', file.read_text())]
    assert set(clean_caches.CACHES) == {"pixels", *written}


def test_everything_is_listed_and_nothing_removed_unasked(folder, monkeypatch, capsys):
    before = files(folder)
    clean(monkeypatch, "--dry_run")
    said = capsys.readouterr().out
    assert "caches: 4.0 MB (prepared images" in said
    assert "cells: 0.0 MB" in said
    assert os.path.join("outputs", "killed", "checkpoint") not in said  # it resumes from there
    assert "somebody_elses" not in said
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match="no terminal is attached to choose in; name what to remove: --remove caches"):
        clean(monkeypatch)
    assert files(folder) == before


def test_what_is_chosen_goes_and_all_else_stays(folder, monkeypatch, capsys):
    before = files(folder)
    clean(monkeypatch, "--remove", "caches", "checkpoints", "spools")
    gone = {path.replace(os.sep, "/") for path in before - files(folder)}
    assert {path for path in gone if path.count("/") == 2} == {
        ".cache/t2i/pixels", ".cache/t2i/latents", "outputs/done/checkpoint-000001", "outputs/done/mlflow_spool",
        "outputs/done/mlflow_spool.jsonl",
    }  # fmt: skip
    assert "removed caches: 4.0 MB" in capsys.readouterr().out


def test_each_kind_is_asked_for(folder, monkeypatch, capsys):
    answers = {"caches": "n", "cells": "y", "checkpoints": "", "spools": "no"}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: answers[text.split()[1].rstrip("?")])
    clean(monkeypatch)
    assert (folder / ".cache" / "t2i" / "pixels").is_dir()
    assert not list(folder.rglob("cells"))
    assert (folder / "outputs" / "done" / "checkpoint-000001").is_dir()


def test_a_training_that_still_prepares_its_images_keeps_the_caches(folder, monkeypatch, capsys):
    """It holds its lock, and has no run.json yet."""
    with run_lock.lock_run(folder / "outputs" / "new", 0, lambda: None):
        clean(monkeypatch, "--remove", "caches", "cells")
    assert f"{os.path.join('outputs', 'new')} is at work" in capsys.readouterr().out
    assert (folder / ".cache" / "t2i" / "pixels").is_dir()
    assert not (folder / "outputs" / "done" / "cells").exists()
    clean(monkeypatch, "--remove", "caches")
    assert not (folder / ".cache" / "t2i" / "pixels").exists()


@pytest.mark.parametrize("inside", [".", "evaluation"])
def test_a_finished_run_that_is_extended_or_evaluated_keeps_its_checkpoints(inside, folder, monkeypatch):
    done = folder / "outputs" / "done"
    before = files(folder)
    with run_lock.lock_run(done / inside, 0, lambda: None):
        clean(monkeypatch, "--remove", "caches", "checkpoints", "spools")
    assert before <= files(folder)
    clean(monkeypatch, "--remove", "checkpoints")
    assert not (done / "checkpoint-000001").exists()


def test_runs_behind_links_are_seen_and_circles_of_links_end(folder, monkeypatch, capsys):
    (folder / "scratch").mkdir()
    (folder / "outputs" / "killed").rename(folder / "scratch" / "big")
    (folder / "outputs" / "big").symlink_to(folder / "scratch" / "big", target_is_directory=True)
    (folder / "outputs" / "again").symlink_to(folder / "outputs" / "done", target_is_directory=True)
    (folder / "outputs" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "scratch" / "big" / "round").symlink_to(folder / "outputs", target_is_directory=True)
    with run_lock.lock_run(folder / "scratch" / "big", 0, lambda: None):
        clean(monkeypatch, "--remove", "caches", "cells")
    said = capsys.readouterr().out
    assert f"{os.path.join('outputs', 'big')} is at work" in said
    assert said.count(os.path.join("done", "cells")) == 1
    assert (folder / ".cache" / "t2i" / "pixels").is_dir()
    clean(monkeypatch, "--remove", "cells", "caches")
    assert (folder / "scratch" / "big" / "cells").is_dir()  # Others may use what lies outside `outputs`.
    assert not (folder / ".cache" / "t2i" / "pixels").exists()


def test_a_run_at_work_and_the_caches_are_left_alone(folder, monkeypatch, capsys):
    killed = folder / "outputs" / "killed"
    with run_lock.lock_run(killed, 0, lambda: None):
        clean(monkeypatch, "--remove", "caches", "cells")
    said = capsys.readouterr().out
    assert f"{os.path.join('outputs', 'killed')} is at work or cannot be read: it is left alone" in said
    assert (killed / "cells").is_dir()
    assert (folder / ".cache" / "t2i" / "pixels").is_dir()
    assert not (folder / "outputs" / "done" / "cells").exists()
