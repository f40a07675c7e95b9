"""Measure the seconds from `streamlit run dashboard` to the first page with a run, of each change of page, and of a click.

python benchmarks/dashboard_start.py [outputs folder]

Each measurement starts a new process and uses a real websocket. The files of a measurement are in the system's page
cache. The figure `seconds_page` starts at Streamlit's import, which is timed in separate processes, and ends with the
first page and its evaluated grid. The figures `page_change_s` are those of the other pages, each opened for the first
time, one after the other in a new process. The figure `switch` starts with the message of a click on another picture.
The figure `switch` ends with the last message of the answer, which holds both pictures and their difference. Without a
folder of runs, the measured run is synthetic: four checkpoints at five guidance scales, and 256 reported pictures, all
of noise.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, keep

sys.path.append(str(ROOT / "tests"))
from streamlit_client import Session, serve
from t2i.files import sha256_file
from t2i.pictures import cells

STARTS, SWITCHES = 5, 20
CHECKPOINTS, SCALES, PROMPTS, REPORTED = (280, 560, 840, 1120), (1.0, 1.5, 3.0, 5.0, 7.5), 4, 256
IMPORT = (
    "import time; t = time.perf_counter(); import streamlit, streamlit.web.bootstrap; print(time.perf_counter() - t)"
)


def make_run(run: Path) -> None:
    """Make a run folder as training and evaluation leave it, with placeholders for weights."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (run / "pipeline" / part).mkdir(parents=True)
        (run / "pipeline" / part / "config.json").write_text(part)
    names = [f"checkpoint-{step:06d}" for step in CHECKPOINTS]
    for name in names:
        weights = run / name / "unet" / "weights.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(name.encode())
        known = {"bytes": len(name), "sha256": sha256_file(weights)}
        (run / name / "manifest.json").write_text(json.dumps({"files": {"unet/weights.safetensors": known}}))
    (run / "run.json").write_text(json.dumps({"status": "finished", "steps": CHECKPOINTS[-1]}))
    rows = [{"step": step, "train_loss": 1 / step, "val_loss": 2 / step} for step in range(10, CHECKPOINTS[-1] + 1, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, seeds = [f"flower {number}" for number in range(PROMPTS)], list(range(PROMPTS))
    sweep = {"checkpoints": names, "guidance_scales": SCALES, "num_inference_steps": 20, "scheduler": "DDIMScheduler",
             "prompts": prompts, "seeds": seeds}  # fmt: skip
    found = [{"checkpoint": name, "guidance_scale": scale, "val_loss": 0.5} for name in names for scale in SCALES]
    (run / "evaluation").mkdir()
    report = {"checkpoint": names[-1], "guidance_scale": SCALES[2], "prompts": REPORTED}
    reported = {"prompts": [f"reported {number}" for number in range(REPORTED)], "seeds": list(range(REPORTED))}
    content = {"report": report, "cells": found, "sweep": sweep, **reported}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    noise = np.random.default_rng(0)
    samples = list(zip(prompts, seeds, strict=True))
    drawn = [(name, scale, samples) for name in names for scale in SCALES]
    drawn.append((names[-1], SCALES[2], list(zip(*reported.values(), strict=True))))
    for name, scale, pairs in drawn:
        made = [cells.Cell(prompt, "", seed, scale, 20) for prompt, seed in pairs]
        pictures = noise.integers(0, 255, (len(pairs), 64, 64, 3), dtype=np.uint8)
        cells.save_cells(run, name, cells.weights_hash(run / name), made, pictures)


def import_seconds(cwd: Path) -> float:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=cwd, capture_output=True, text=True, check=True)
    return float(done.stdout)


def first_page(cwd: Path) -> float:
    """Return the seconds from the command to the complete page."""
    began = time.monotonic()
    with serve(cwd, cwd / "log.txt", env=ENVIRONMENT) as server, Session(server.url).connected() as session:
        session.open()
        seconds = time.monotonic() - began
        if session.problems or not session.data("picture_grid"):
            raise SystemExit(f"no grid on the first page: {session.problems} {session.texts()}")
    return seconds


def page_changes(cwd: Path) -> dict[str, float]:
    """Return the seconds until each other page has come, one after the other in a new process."""
    with serve(cwd, cwd / "log.txt", env=ENVIRONMENT) as server, Session(server.url).connected() as session:
        session.open()
        seconds = {page: session.go(page) for page in sorted(session.pages) if page}
        if session.problems:
            raise SystemExit(f"a page has an error: {session.problems}")
    return seconds


def switches(cwd: Path) -> list[float]:
    with serve(cwd, cwd / "log.txt", env=ENVIRONMENT) as server, Session(server.url).connected() as session:
        session.open()
        grid = session.data("picture_grid")
        places = [(cell["row"], cell["column"]) for cell in grid["cells"] if cell["source"]]
        seconds = []
        for number in range(SWITCHES):
            left, place = number % 2 == 1, places[(7 * number + 3) % len(places)]
            seconds.append(session.choose(*place, left=left))
            if tuple(session.data("picture_grid")["left" if left else "right"]) != place:
                raise SystemExit(f"{place} was not chosen")
    return seconds


ENVIRONMENT: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        if sys.argv[1:]:
            (cwd / "outputs").symlink_to(Path(sys.argv[1]).resolve())
        else:
            make_run(cwd / "outputs" / "demo" / "unet")
        imports = [import_seconds(cwd) for _ in range(STARTS + 1)][1:]  # the first brings the files into memory
        pages = [first_page(cwd) for _ in range(STARTS + 1)][1:]
        changed = [page_changes(cwd) for _ in range(STARTS)]
        switched = switches(cwd)
    imported = statistics.median(imports)
    keep(
        "dashboard_start",
        {
            "seconds_page": round(statistics.median(pages) - imported, 2),
            "goal": 1.5,
            "seconds_import_streamlit": round(imported, 2),
            "pages_with_import": [round(seconds, 2) for seconds in pages],
            "page_change_s": {page: round(statistics.median(one[page] for one in changed), 2) for page in changed[0]},
            "page_change_goal_s": 1.0,
            "switch_ms_median": round(1000 * statistics.median(switched)),
            "switch_ms_worst": round(1000 * max(switched)),
            "switch_goal_ms": 200,
            "switches": len(switched),
        },
    )


if __name__ == "__main__":
    main()
