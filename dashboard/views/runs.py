"""The runs in a table: their best checkpoints, the differences of their settings, their provenance and their cards."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import streamlit as st
from helpers.folder_curves import folder_curves
from helpers.live_trainings import show_trainings
from helpers.page_texts import show_no_runs, title_row
from helpers.page_url import name_choices
from helpers.run_files import measured_results, read_or_warn, read_settings
from helpers.run_list import checkpoints_of, choose_runs, find_runs, step_of
from helpers.tables import column, show_rows

from t2i.evaluation.figures import figure, flatten, interval, is_finite, rank
from t2i.redaction import redact_config
from t2i.run_lock import run_status

FACTS = {  # of run.json, by the titles of their columns
    "steps": "steps",
    "train_images": "training images",
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "psnr_db": "PSNR in dB",
}
STUDENTS = {"val_loss": "student_val_loss"}  # figures that mean something else for a student
CARD_CHARACTERS = 20_000  # characters of a model card that are shown


def main() -> None:
    runs = find_runs("any")
    if not runs:
        st.title("Runs")
        show_no_runs()
        return
    states = {name: read_or_warn(run / "run.json") for name, run in runs.items()}
    status = {name: run_status(run, states[name]) for name, run in runs.items()}
    statuses = sorted(set(status.values()))
    kept = title_row("Runs").multiselect(
        "Status", statuses, key="status", bind="query-params", placeholder="any status"
    )  # a status comes from a file, so it is looked up among those there
    show_trainings(runs)
    names = [name for name in choose_runs(list(runs)) if not kept or status[name] in kept]
    if not names:
        st.text("no run matches")
        return
    show_rows([row_of(name, status[name], states[name]) for name in names])
    chosen = {name: runs[name] for name in names}
    show_best(chosen, states)
    show_settings(chosen)
    show_provenance(chosen, states)
    show_cards(chosen)


def row_of(name: str, status: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a run in the table of runs: the run's present status, and facts from run.json."""
    seconds = state.get("seconds")
    row: dict[str, Any] = {"run": name, "status": status}
    for key, title in FACTS.items():
        row[title] = state[key] if is_finite(state.get(key)) else None
    known = state.get("extensions")
    entries = [entry for entry in known if isinstance(entry, dict)] if isinstance(known, list) else []
    lengths = [str(entry["from_steps"]) for entry in entries if is_finite(entry.get("from_steps"))]
    row["extended from"] = ", ".join(lengths) or None
    row["minutes"] = None
    if isinstance(seconds, dict):
        row["minutes"] = round(sum(value for value in seconds.values() if is_finite(value)) / 60, 1)
    row["machine"] = str(state.get("machine", ""))
    return row


def show_best(runs: dict[str, Path], states: dict[str, dict[str, Any]]) -> None:
    """Show each run's checkpoint (and guidance scale) with the best value of a chosen figure.

    Only figures that have a better direction can be chosen. If a figure has an interval, the table counts the run's other
    values that lie within the interval of the best one, and so may be as good.
    """
    st.header("Best checkpoint")
    rows = {name: candidates(run, "student" in states[name]) for name, run in runs.items()}
    keys = {key for measured in rows.values() for row in measured for key in row["values"] if figure(key).better}
    if not keys:
        st.text("no checkpoint of these runs was measured")
        return
    titles = {figure(key).name: key for key in sorted(keys, key=lambda key: (rank(key), key))}
    if (named := st.query_params.get("measure")) in keys:  # an address may name the key
        st.session_state["measure"] = figure(str(named)).name
    name_choices({"measure": next(iter(titles))})
    title = st.selectbox("Figure", list(titles), index=None, required=True, key="measure", bind="query-params")
    if title not in titles:
        st.text("choose a figure")
        return
    key = titles[title]
    better = figure(key).better
    best = [row for name, measured in rows.items() if (row := best_row(name, measured, key))]
    best.sort(key=lambda row: row["value"], reverse=better == "higher")
    st.text(f"{title}, {better} is better: the best of each run, the best run first")
    show_rows(best)
    if any(row["95% interval"] for row in best):
        st.caption("Values within the interval of the best one may be as good: the difference can be chance.")
    kinds = {(str(rows[row["run"]][0].get("judge")), trained_on(states[row["run"]])) for row in best}
    if key.startswith("judge.") and len(kinds) > 1:
        st.caption("Compare only runs of one data set and one judge: these runs have several.")


def trained_on(state: dict[str, Any]) -> str:
    """Return the hash of the images that a run was trained on, or "None"."""
    identity = state.get("identity")
    return str(identity.get("dataset_hash") if isinstance(identity, dict) else None)


def best_row(name: str, measured: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """Return the table's row of a run for a figure, or None if the run has no such figure."""
    known = [row for row in measured if key in row["values"]]
    if not known:
        return None
    choose = max if figure(key).better == "higher" else min
    best = choose(known, key=lambda row: row["values"][key])
    value = best["values"][key]
    bounds = interval(key, value, best["pictures"], best["values"].get("judge.standard_error"))
    inside = [row for row in known if row is not best and bounds and bounds[0] <= row["values"][key] <= bounds[1]]
    return {
        "run": name,
        "checkpoint": best["checkpoint"],
        "guidance scale": best["scale"] if figure(key).is_guided else None,
        "value": value,
        "95% interval": f"{bounds[0]:.3g} to {bounds[1]:.3g}" if bounds else None,
        "others within it": len(inside) if bounds else None,
    }


def candidates(run: Path, is_student: bool) -> list[dict[str, Any]]:
    """Return all figures measured for a run's checkpoints, by the evaluation and during training at the checkpoint's step.

    Checkpoints that were removed since are marked.
    """
    there = checkpoints_of(run)
    rows = [
        row if row["checkpoint"] in there else row | {"checkpoint": f"{row['checkpoint']} (removed)"}
        for row in measured_results(run)
    ]
    curves = {key: curve for key, curve in folder_curves(run).items() if key.startswith("val_")}
    for name in there:
        step = step_of(name)
        values = {
            key: float(curve.values[curve.steps == step][0]) for key, curve in curves.items() if step in curve.steps
        }
        if values and not math.isnan(step):
            rows.append({"checkpoint": name, "scale": None, "pictures": None, "values": values})
    if is_student:
        rows = [
            row | {"values": {STUDENTS.get(key, key): value for key, value in row["values"].items()}} for row in rows
        ]
    return rows


def show_settings(runs: dict[str, Path]) -> None:
    """Show the settings of the chosen runs side by side, either all settings or only those that differ."""
    st.header("Settings")
    settings = [flatten(read_settings(run)) for run in runs.values()]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    rows = {key: [str(values.get(key, "")) for values in settings] for key in keys}
    only = st.toggle("Differences only", value=True, key="diff", bind="query-params")
    if only and len(runs) > 1:
        rows = {key: row for key, row in rows.items() if len(set(row)) > 1}
        st.text(f"{len(rows)} of {len(keys)} settings differ")
    elif only:
        st.text("choose two or more runs for their differences")
    if rows:
        show_columns("setting", list(rows), list(runs), list(rows.values()))


def show_provenance(runs: dict[str, Path], states: dict[str, dict[str, Any]]) -> None:
    """Show the hashes and versions that the chosen runs were made from, side by side."""
    st.header("Provenance")
    sources = []
    for name, run in runs.items():
        keys_of_state = ("machine", "precision", "processes", "distribution", "output_unet_hash")
        of_state = {key: value for key in keys_of_state if (value := states[name].get(key)) is not None}
        sources.append(flatten(redact_config(read_or_warn(run / "provenance.json") | of_state)))
    keys = list(dict.fromkeys(key for values in sources for key in values))
    if not keys:
        st.text("nothing was recorded of where these runs come from")
        return
    rows = [["" if values.get(key) is None else str(values[key]) for values in sources] for key in keys]
    show_columns("what", keys, list(runs), rows)


def show_columns(title: str, keys: list[str], names: list[str], rows: list[list[str]]) -> None:
    """Show a table with a column per run, and the rows' keys in a first column that stays in sight.

    Args:
        title: title of the first column.
        keys: R keys.
        names: N titles of the other columns.
        rows: texts, [R][N].
    """
    columns = [column(keys), *(column(texts) for texts in zip(*rows, strict=True))]
    st.dataframe(
        pa.Table.from_arrays(columns, names=[title, *names]),
        hide_index=True,
        column_config={title: st.column_config.TextColumn(pinned=True)},
        lazy=False,
    )


def show_cards(runs: dict[str, Path]) -> None:
    """Show the model card of a run as plain text, folded away.

    The Markdown of a model card, which may hold users' texts, is never rendered.
    """
    st.header("Model card")
    cards = [name for name, run in runs.items() if (run / "pipeline" / "README.md").is_file()]
    if not cards:
        st.text("None of these runs has a card yet; the evaluation writes it:")
        st.code("python scripts/evaluate_checkpoints.py --model outputs/RUN", language="sh", wrap_lines=True)
        return
    name = st.selectbox("Card of", cards, key="card", bind="query-params")
    try:
        text = (runs[str(name)] / "pipeline" / "README.md").read_text(encoding="utf-8", errors="replace")
    except (OSError, KeyError):
        st.text("this card is gone")
        return
    with st.expander("Source of the card"):  # All of it: no key reaches a box that scrolls.
        st.code(text[:CARD_CHARACTERS], language="markdown", wrap_lines=True)


main()
