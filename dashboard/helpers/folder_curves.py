"""Read the curves of run folders once: of 100 runs, each click would take a second to read them again."""

from pathlib import Path

import streamlit as st

from t2i.tracking.curves import Curve, read_folder


def folder_curves(run: Path) -> dict[str, Curve]:
    """Return the curves of a run folder by metric, read again only after metrics.jsonl has changed."""
    try:
        state = (run / "metrics.jsonl").stat()
    except OSError:
        return {}
    return _folder_curves(run.as_posix(), (state.st_mtime_ns, state.st_size))


@st.cache_resource(max_entries=500, show_spinner=False)  # a resource is returned without a copy; no caller changes it
def _folder_curves(run: str, stamp: tuple[int, int]) -> dict[str, Curve]:
    return read_folder(Path(run))
