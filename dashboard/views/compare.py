"""One or two runs side by side: pictures by checkpoint and guidance scale, their figures, the losses, the report."""

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from common import cells_of, find_runs, flat, lines, nothing_yet, read

from t2i.curves import read_folder


def main() -> None:
    st.title("Compare")
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
    if not chosen:
        st.text("choose one or two runs")
    for number, (column, name) in enumerate(zip(st.columns(max(1, len(chosen))), chosen, strict=False)):
        with column:
            show_run(name, runs[name], "_2" if number else "")


def show_run(name: str, run: Path, suffix: str) -> None:
    """One run in a column; `suffix` is that of its names in the URL. Names go to widgets that show text as it is."""
    st.text(name)
    state = read(run / "run.json")
    st.text(f"status: {state.get('status', 'unknown')}   steps: {state.get('steps', 'not finished')}")
    cells = cells_of(run)
    st.subheader("Pictures")
    show_pictures(run, cells, suffix)
    st.subheader("Losses")
    curves = read_folder(run)
    chart = lines([(name, metric, curves[metric]) for metric in ("train_loss", "val_loss") if metric in curves])
    if chart is None:
        st.text("no losses yet")
    else:
        st.altair_chart(chart)
    st.subheader("Checkpoints and guidance scales")
    if cells:
        st.dataframe(pd.DataFrame([flat(cell) for cell in cells]), hide_index=True)
    else:
        st.text("Not evaluated yet. This does it:")
        st.code(f"python scripts/evaluate_checkpoints.py --model {run.as_posix()}", language="sh")
        return
    report = read(run / "evaluation" / "evaluation.json").get("report")
    if isinstance(report, dict):
        st.subheader("Report, on prompts of its own")
        rows = [
            (key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in flat(report).items()
        ]
        st.dataframe(pd.DataFrame(rows, columns=["figure", "value"]), hide_index=True)
        show_file(run / "evaluation", "report.png")


def show_pictures(run: Path, cells: list[dict[str, Any]], suffix: str) -> None:
    """The grid of a checkpoint at a guidance scale; before the evaluation, the newest samples of training."""
    by_cell = {(str(cell.get("checkpoint")), float(cell["guidance_scale"])): cell.get("grid") for cell in cells}
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
    scale = scales[0]
    if len(scales) > 1:
        scale = st.select_slider(
            "Guidance scale", scales, format_func="{:g}".format, key=f"guidance_scale{suffix}", bind="query-params"
        )
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


main()
