"""Pictures of grids: each is made once and whole, is shown without torch, and is never shown damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate_images
from conftest import SCRIPTS
from t2i.errors import UserError
from t2i.pictures import cells, png, sampling
from t2i.pictures.cells import Axis, Cell

CELL = Cell("a red flower", num_inference_steps=2)
DRAWER = """  # a process that makes a grid; it paints instead of drawing, which needs no torch and so starts at once
import sys, time; from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from t2i.pictures import cells

def paint(pipeline, places, watch):
    time.sleep(0.002)
    return np.stack([np.full((32, 32, 3), place.cell.seed, np.uint8) for place in places])

cells._draw = paint
places = cells.plan(Path(sys.argv[2]), "checkpoint-000004", cells.Cell("a red flower", num_inference_steps=2),
                    [cells.Axis("seed", tuple(range(int(sys.argv[3]))))])
if len(sys.argv) > 4:  # wait for the other one
    Path(sys.argv[4]).touch()
    while len(list(Path(sys.argv[4]).parent.glob("ready-*"))) < 2: pass
made = cells.make(places, load=lambda model: None, progress=lambda place, done, count: print("cell", done, flush=True))
print("made", made)
"""


@pytest.fixture
def run(workspace, tmp_path):
    """A copy of the finished run, as training left it: other tests evaluate the original."""
    return Path(
        shutil.copytree(
            workspace / "unet", tmp_path / "unet", ignore=shutil.ignore_patterns("cells", "evaluation", "mlflow*")
        )
    )


def drawer(run, environment, *arguments):
    words = [sys.executable, "-c", DRAWER, SCRIPTS, run, *arguments]
    return subprocess.Popen(list(map(str, words)), env=environment, stdout=subprocess.PIPE, text=True)


def test_a_grid_is_drawn_once_and_as_generate_images_draws(run, monkeypatch, tmp_path):
    axes = [Axis("checkpoint", ("checkpoint-000004", "pipeline")), Axis("scheduler", ("ddim", "euler"))]
    places = cells.plan(run, "pipeline", CELL, axes)
    assert [place.at for place in places] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    seen = []
    assert cells.make(places, progress=lambda place, done, count: seen.append((place.path.is_file(), done, count))) == 4
    assert seen == [(True, number, 4) for number in (1, 2, 3, 4)]
    again = cells.plan(run, "pipeline", CELL, axes)
    assert all(place.made for place in again)
    assert cells.make(again) == cells.make(places) == 0
    words = ["generate_images.py", "--model", run / places[0].checkpoint, "--prompt", CELL.prompt, "--seed", 0,
             "--num_inference_steps", 2, "--output_dir", tmp_path / "ddim"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    generate_images.main()
    pipeline = sampling.load_pipeline(run / places[3].checkpoint, scheduler="euler")
    euler = sampling.generate(pipeline, [CELL.prompt], [0], num_inference_steps=2, progress=False)[0]
    for place, theirs in ((places[0], Image.open(tmp_path / "ddim" / "0000-seed0.png")), (places[3], euler)):
        ours = np.asarray(cells.read_cell(place.run, place.model_hash, place.cell)).astype(int)
        assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1


def test_batches_draw_the_same_and_damage_is_mended(run):
    axes = [Axis("seed", (1, 2, 3))]
    places = cells.plan(run, "pipeline", CELL, axes)
    cells.make(places, batch_size=3)
    first = [np.asarray(cells.read_cell(run, place.model_hash, place.cell)).astype(int) for place in places]
    whole = places[0].path.read_bytes()
    places[0].path.write_bytes(whole[:-200])
    Image.new("RGB", (32, 32), "red").save(places[1].path)  # foreign
    shutil.copy(places[1].path.parent / places[0].path.name, places[2].path)  # another's, cut off as well
    assert [place.made for place in cells.plan(run, "pipeline", CELL, axes)] == [False] * 3
    places[2].path.write_bytes(whole)  # another's, whole
    assert cells.read_cell(run, places[2].model_hash, places[2].cell) is None
    assert cells.make(cells.plan(run, "pipeline", CELL, axes)) == 3
    for place, before in zip(places, first, strict=True):
        now = np.asarray(cells.read_cell(run, place.model_hash, place.cell)).astype(int)
        assert np.abs(now - before).max() <= 1


def test_repainted_or_torn_bytes_are_never_shown(run):
    place = cells.plan(run, "pipeline", CELL, [])[0]
    cells.make([place])
    whole = place.path.read_bytes()
    painted = Image.open(place.path)
    info = json.loads(painted.info["parameters"])
    pixels = np.asarray(painted).copy()
    pixels[0, 0, 0] ^= 1
    cells.save_picture(place.path, pixels, info)
    assert cells.read_cell(run, place.model_hash, CELL) is None
    before = np.asarray(cells.read_cell(run, place.model_hash, CELL) or 0)
    assert before.ndim == 0
    random = np.random.default_rng(0)
    for position in random.integers(0, len(whole), 200):
        torn = bytearray(whole)
        torn[position] ^= 1 << int(random.integers(8))
        for content in (bytes(torn), whole[:position]):
            place.path.write_bytes(content)
            shown = cells.read_cell(run, place.model_hash, CELL)
            assert shown is None or png.pixel_hash(shown) == info["pixel_hash"]


def test_killed_and_gone_on(run, environment):
    first = drawer(run, environment, 200)
    for line in first.stdout:
        if line == "cell 3\n":
            break
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    there = {path: path.stat().st_mtime_ns for path in (run / "cells").glob("[0-9a-f]*.png")}
    assert 3 <= len(there) < 200
    places = cells.plan(run, "checkpoint-000004", CELL, [Axis("seed", tuple(range(len(there) + 2)))])
    assert sum(place.made for place in places) == len(there)
    assert cells.make(places) == 2
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in there.items())


def test_two_processes_make_each_cell_once(run, environment, tmp_path):
    both = [drawer(run, environment, 20, tmp_path / f"ready-{name}") for name in "ab"]
    made = [int(one.communicate(timeout=60)[0].split()[-1]) for one in both]
    assert sum(made) == 20
    assert len(list((run / "cells").glob("[0-9a-f]*.png"))) == 20


def test_a_grid_is_cancelled_and_waits_for_its_turn(run):
    places = cells.plan(run, "pipeline", CELL, [Axis("seed", (1, 2, 3))])
    asked = []
    assert cells.make(places, progress=lambda *_: asked.append(1), cancelled=lambda: bool(asked)) == 1
    start = time.perf_counter()
    with cells._lock_store(run, lambda: False):
        assert cells.make(places[2:], cancelled=lambda: time.perf_counter() - start > 0.3) == 0


def test_evaluations_grid_opens_without_torch(run, command, workspace, environment):
    command("evaluate_checkpoints.py", "--config", "tiny.yaml", "--model", run, "--dataset", "dataset", cwd=workspace)
    code = """
import sys; from pathlib import Path
sys.modules["torch"] = sys.modules["diffusers"] = None
sys.path.insert(0, sys.argv[1])
from t2i.pictures import cells
run = Path(sys.argv[2])
grid = cells.evaluated_grid(run)
places = cells.plan(run, "pipeline", grid.cell, grid.axes)
assert cells.make(places) == 0
print([len(axis.values) for axis in grid.axes], all(cells.read_cell(run, place.model_hash, place.cell) for place in places))
"""
    words = [sys.executable, "-c", code, str(SCRIPTS), str(run)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[2, 2, 4] True", done.stderr
    drawn = cells.evaluated_grid(run)
    place = cells.plan(run, "pipeline", drawn.cell, drawn.axes)[5]
    stored = np.asarray(cells.read_cell(run, place.model_hash, place.cell)).astype(int)
    place.path.unlink()
    cells.make([cells.replace(place, made=False)])
    assert np.abs(np.asarray(cells.read_cell(run, place.model_hash, place.cell)).astype(int) - stored).max() <= 1


def test_a_models_hash(run, tmp_path):
    known = {name: cells.weights_hash(run / name) for name in ("checkpoint-000004", "checkpoint-000008", "pipeline")}
    assert len(set(known.values())) == 2
    assert known["pipeline"] == known["checkpoint-000008"]  # the same weights, so the same pictures
    assert cells.plan(run, "pipeline", CELL, [])[0].path == cells.plan(run, "checkpoint-000008", CELL, [])[0].path
    assert cells.weights_hash(run / "checkpoint-000004", "raw") != known["checkpoint-000004"]
    alone = Path(shutil.copytree(run / "pipeline", tmp_path / "alone"))
    first = cells.weights_hash(alone)
    weights = alone / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert cells.weights_hash(alone) != first
    with pytest.raises(UserError, match="neither a complete checkpoint nor a pipeline"):
        cells.weights_hash(tmp_path)


def test_mistakes_are_sentences(run, tmp_path):
    for name in ("../../etc/passwd", "checkpoint-000099", ""):
        place = cells.plan(run, name, CELL, [])[0]
        assert "there are: checkpoint-000004" in place.problem
        assert cells.make([place]) == 0
    assert cells.plan(tmp_path / "gone", "pipeline", CELL, [])[0].problem.endswith("there are: none")
    (run / "checkpoint-000008" / "state.json").unlink()  # half-written
    assert "no complete" in cells.plan(run, "checkpoint-000008", CELL, [])[0].problem
    with pytest.raises(UserError, match="10,100 pictures"):
        cells.plan(run, "pipeline", CELL, [Axis("seed", tuple(range(100))), Axis("guidance_scale", tuple(range(101)))])
    with pytest.raises(UserError, match="different"):
        cells.plan(run, "pipeline", CELL, [Axis("seed", (1,)), Axis("sample", (("a", 1),))])
    for wrong in (
        {"guidance_scale": float("nan")}, {"guidance_scale": "7"}, {"seed": 2**63}, {"seed": 1.0}, {"num_inference_steps": 0},
        {"num_inference_steps": True}, {"num_inference_steps": 3, "scheduler": "pndm"}, {"scheduler": "os"},
        {"prompt": "\ud800"}, {"negative_prompt": None}, {"guidance_end": 1.5}, {"guidance_end": "1"}, {"guidance_end": float("nan")},
        {"guidance_rescale": -0.1}, {"guidance_rescale": "1"}, {"guidance_rescale": float("nan")},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            Cell(**{"prompt": "a"} | wrong)
    assert Cell("a", guidance_scale=7) == Cell("a", guidance_scale=7.0)
    assert set(Cell("a").settings()) == {
        "prompt",
        "negative_prompt",
        "seed",
        "guidance_scale",
        "num_inference_steps",
        "scheduler",
    }
    assert Cell("a", guidance_end=0.5).settings()["guidance_end"] == 0.5
    assert Cell("a", guidance_rescale=0.7).settings()["guidance_rescale"] == 0.7
    half = Cell("a", guidance_end=0.5, num_inference_steps=5)
    assert (Cell("a").samples, half.samples, Cell("a", guidance_scale=1).samples) == (60, 8, 30)
    place = cells.plan(run, "pipeline", CELL, [])[0]
    shutil.rmtree(run)  # deleted while shown
    with pytest.raises(UserError, match="cannot be written"):
        cells.make([place])
