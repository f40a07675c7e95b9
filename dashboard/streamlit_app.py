"""One or two runs side by side: pictures by checkpoint and guidance scale, their figures, the curves, the report.

streamlit run dashboard

Run it from the repository root: it shows the run folders below outputs/. It reads files alone and computes nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

scripts = str(Path(__file__).resolve().parents[1] / "scripts")
if scripts not in sys.path:
    sys.path.append(scripts)  # appended: a script's name must not hide a package's

from t2i.cards import escape_markdown  # noqa: E402
from t2i.runs import UserError, read_json  # noqa: E402

OUTPUTS = Path("outputs")
POINTS = 2000  # of a curve, at most: what a browser draws at once


def main() -> None:
    st.set_page_config(page_title="Text-to-image runs", layout="wide")
    st.title("Text-to-image runs")
    runs = find_runs()
    if not runs:
        st.info("No run in outputs/ yet. This fills it, in about a quarter of an hour on two CPU cores:")
        st.code("make demo", language="sh")
        return
    names = st.multiselect(
        "Runs", list(runs), default=list(runs)[:1], max_selections=2, key="run", bind="query-params",
        placeholder="choose one or two runs",
    )  # fmt: skip
    chosen = [name for name in names if name in runs]
    for column, name in zip(st.columns(max(1, len(chosen))), chosen, strict=False):
        with column:
            show_run(name, runs[name])


def find_runs() -> dict[str, Path]:
    """Training runs below outputs/, the newest first: name -> folder. Nothing else can be opened."""
    found = [file for pattern in ("*/run.json", "*/*/run.json") for file in OUTPUTS.glob(pattern) if file.is_file()]
    found.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    folders = [file.parent for file in found if file.resolve().is_relative_to(OUTPUTS.resolve())]
    return {
        folder.relative_to(OUTPUTS).as_posix(): folder
        for folder in folders
        if (folder / "pipeline").is_dir() or any(folder.glob("checkpoint-*"))
    }


def show_run(name: str, run: Path) -> None:
    """One run in a column. Names go to widgets that show text as it is, never to Markdown."""
    st.text(name)
    state = read(run / "run.json")
    st.text(f"status: {state.get('status', 'unknown')}   steps: {state.get('steps', 'not finished')}")
    evaluation = read(run / "evaluation" / "evaluation.json")
    found = evaluation.get("cells")
    cells = [cell for cell in found if isinstance(cell, dict)] if isinstance(found, list) else []
    cells = [cell for cell in cells if isinstance(cell.get("guidance_scale"), int | float)]
    st.subheader("Pictures")
    show_pictures(name, run, cells)
    st.subheader("Losses")
    show_curves(run)
    st.subheader("Checkpoints and guidance scales")
    if cells:
        st.dataframe(pd.DataFrame([flat(cell) for cell in cells]), hide_index=True)
    else:
        st.text("Not evaluated yet. This does it:")
        st.code(f"python scripts/evaluate_checkpoints.py --model {run.as_posix()}", language="sh")
    report = evaluation.get("report")
    if isinstance(report, dict):
        st.subheader("Report, on prompts of its own")
        rows = [
            (key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in flat(report).items()
        ]
        st.dataframe(pd.DataFrame(rows, columns=["figure", "value"]), hide_index=True)
        show_file(run / "evaluation", "report.png")


def show_pictures(name: str, run: Path, cells: list[dict[str, Any]]) -> None:
    """The grid of a checkpoint at a guidance scale; before the evaluation, the newest samples of training."""
    by_cell = {(str(cell.get("checkpoint")), cell.get("guidance_scale")): cell.get("grid") for cell in cells}
    if not by_cell:
        samples = sorted(path.name for path in (run / "samples").glob("step-*.png"))
        if samples:
            st.text(f"samples of training, {Path(samples[-1]).stem}")
            show_file(run / "samples", samples[-1])
        else:
            st.text("no pictures yet")
        return
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _ in by_cell))
    checkpoint = st.selectbox("Checkpoint", checkpoints, index=len(checkpoints) - 1, key=f"checkpoint of {name}")
    scales = [scale for known, scale in by_cell if known == checkpoint]
    scale = st.select_slider("Guidance scale", scales, key=f"scale of {name}") if len(scales) > 1 else scales[0]
    show_file(run / "evaluation", by_cell.get((str(checkpoint), scale)))


def show_file(folder: Path, name: Any) -> None:
    """A PNG that lies in `folder` itself; `name` comes from a file, so it is looked up rather than joined to a path."""
    known = {path.name: path for path in folder.glob("*.png") if path.resolve().parent == folder.resolve()}
    if isinstance(name, str) and name in known:
        try:
            st.image(known[name].read_bytes(), output_format="PNG")
        except Exception:  # whatever Pillow says of a damaged file
            st.text(f"{name} cannot be read")
    else:
        st.text("this picture is missing")


def show_curves(run: Path) -> None:
    """Training and validation loss over steps, from metrics.jsonl."""
    points = []
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
            points += [(row["step"], key, float(row[key])) for key in ("train_loss", "val_loss") if key in row]
        except (ValueError, KeyError, TypeError):
            continue  # torn by the death of a run
    if not points:
        st.text("no losses yet")
        return
    curves = pd.DataFrame(points, columns=["step", "curve", "loss"]).dropna()
    thin = [rows.iloc[:: len(rows) // POINTS + 1] for _, rows in curves.groupby("curve")]
    st.line_chart(pd.concat(thin), x="step", y="loss", color="curve")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as one row: `memorisation.share_closer`."""
    row: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{key}.")
        else:
            row[f"{prefix}{key}"] = value if isinstance(value, int | float | None) else str(value)
    return row


def read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where it is missing, and a warning where it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except UserError as error:
        st.warning(escape_markdown(error))
        return {}
    return value if isinstance(value, dict) else {}


main()
