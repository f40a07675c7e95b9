"""What the pages share: which runs there are, and words shown as they are. Imports no torch."""

from pathlib import Path
from typing import Any

import streamlit as st

from t2i.cards import escape_markdown
from t2i.runs import UserError, checkpoint_folders, read_json

OUTPUTS = Path("outputs")


def find_runs(kind: str = "unet") -> dict[str, Path]:
    """Run folders below outputs/, the newest first: name -> folder. Nothing else can be opened, whatever a URL says.

    kind: "unet" (trained denoisers) or "vae".
    """
    found = [file for pattern in ("*/run.json", "*/*/run.json") for file in OUTPUTS.glob(pattern) if file.is_file()]
    found.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    folders = [file.parent for file in found if file.resolve().is_relative_to(OUTPUTS.resolve())]
    return {folder.relative_to(OUTPUTS).as_posix(): folder for folder in folders if _is_kind(folder, kind)}


def _is_kind(folder: Path, kind: str) -> bool:
    if kind == "vae":
        return (folder / "vae").is_dir() or any((folder / "samples").glob("reconstructions-*.png"))
    if any((folder / "samples").glob("reconstructions-*.png")):
        return False
    return (folder / "pipeline").is_dir() or any(folder.glob("checkpoint-*"))


def checkpoints_of(run: Path) -> dict[str, Path]:
    """The whole checkpoints of a run, oldest first, and `final`, its pipeline, when there is one: name -> folder."""
    found = {folder.name: folder for folder in checkpoint_folders(run)}
    if (run / "pipeline" / "unet").is_dir():
        found["final"] = run / "pipeline"
    return found


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


def cells_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells (checkpoint x guidance scale) of an evaluation.json, those that have both."""
    found = evaluation.get("cells")
    cells = [cell for cell in found if isinstance(cell, dict)] if isinstance(found, list) else []
    return [cell for cell in cells if isinstance(cell.get("guidance_scale"), int | float)]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as one row: `memorisation.share_closer`."""
    row: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{key}.")
        else:
            row[f"{prefix}{key}"] = value if isinstance(value, int | float | None) else str(value)
    return row


def nothing_yet(sentence: str, command: str) -> None:
    """An empty state: what is missing, and the command that fills it."""
    st.info(escape_markdown(sentence))
    st.code(command, language="sh")


def escape(text: Any) -> str:
    """Words from outside (captions, prompts, names) for a widget that would read Markdown in them."""
    return escape_markdown(text)
