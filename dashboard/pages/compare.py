"""Compare, the first page: one or two runs side by side, by checkpoint and guidance scale, with curves and the report."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from common import cells_of, find_runs, flat, nothing_yet, read

POINTS = 2000  # of a curve, at most: what a browser draws at once


def main() -> None:
    st.title("Text-to-image runs")
    runs = find_runs()
    if not runs:
        nothing_yet(
            "No run in outputs/ yet. This fills it, in about a quarter of an hour on two CPU cores:", "make demo"
        )
        return
    names = st.multiselect(
        "Runs", list(runs), default=list(runs)[:1], max_selections=2, key="run", bind="query-params",
        placeholder="choose one or two runs",
    )  # fmt: skip
    chosen = [name for name in names if name in runs]
    for number, (column, name) in enumerate(zip(st.columns(max(1, len(chosen))), chosen, strict=False)):
        with column:
            show_run(name, runs[name], suffix=f"_{number + 1}" if number else "")


def show_run(name: str, run: Path, suffix: str) -> None:
    """One run in a column. Names go to widgets that show text as it is, never to Markdown.

    suffix: of the column's names in the URL, so that two runs have a checkpoint each.
    """
    st.text(name)
    state = read(run / "run.json")
    st.text(f"status: {state.get('status', 'unknown')}   steps: {state.get('steps', 'not finished')}")
    evaluation = read(run / "evaluation" / "evaluation.json")
    cells = cells_of(evaluation)
    st.subheader("Pictures")
    show_pictures(run, cells, suffix)
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


def show_pictures(run: Path, cells: list[dict[str, Any]], suffix: str) -> None:
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
    checkpoint = st.selectbox(
        "Checkpoint", checkpoints, index=len(checkpoints) - 1, key=f"checkpoint{suffix}", bind="query-params"
    )
    scales = [scale for known, scale in by_cell if known == checkpoint]
    if len(scales) > 1:
        scale = st.select_slider("Guidance scale", scales, key=f"guidance_scale{suffix}", bind="query-params")
    else:
        scale = scales[0]
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


main()
