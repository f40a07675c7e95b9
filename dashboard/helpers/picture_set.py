"""Show several pictures of one prompt: by seeds, by alternatives in braces, or by two models side by side."""

from collections.abc import Callable, Sequence
from functools import partial

import streamlit as st

from helpers.components import gallery
from helpers.drawing_jobs import GridJob, running_job
from helpers.grid_table import show_progress
from helpers.page_texts import warn
from helpers.picture_table import stored_address
from t2i.errors import UserError
from t2i.pictures import cells

LOOK_S = 0.5  # between two looks at pictures that are being drawn


def show_set(
    planned: Sequence[cells.PlannedCell],
    columns: int,
    caption: Callable[[cells.PlannedCell], str],
    on_chosen: Callable[[cells.PlannedCell], None],
    asked: bool,
) -> bool:
    """Show the pictures of a plan, and draw the missing ones if `asked`. Return whether any is drawn or being drawn.

    Args:
        columns: pictures in a row.
        caption: function that returns the text below a picture.
        on_chosen: called with the picture that a user clicks.
    """
    if problem := next((one.problem for one in planned if one.problem), None):
        warn(UserError(problem))
        return True
    key = ("set", *(one.path for one in planned))
    job: GridJob | None = st.session_state.get("_set_job") or running_job(key)
    if job is not None and (job.key != key or job.finished.is_set()):
        if job.error:
            warn(UserError(job.error))
        if job.key != key and job is st.session_state.get("_started_set"):  # else another session draws it
            job.stopped.set()
        job = None
    missing = cells.missing(planned)
    if asked and job is None and missing:
        job = st.session_state["_started_set"] = GridJob.start(key, missing, as_watched=True)
    st.session_state["_set_job"] = job
    if job is None and len(missing) == len(planned):
        st.text("These pictures are not drawn yet. Draw makes them.")
        return False

    @st.fragment(run_every=LOOK_S if job else None)
    def look() -> None:
        if job is not None:
            if job.finished.is_set():
                st.rerun()
            show_progress(job)
        elif missing:
            st.text(f"{len(missing)} of {len(planned)} pictures are not drawn yet. Draw makes them.")
        data = {
            "columns": columns,
            "action": "Open",
            "pictures": [card(planned, row, caption) for row in range(len(planned))],
        }
        gallery(data, key="_set", on_chosen=partial(take_choice, planned, on_chosen))
        if st.session_state.pop("_set_chosen", False):
            st.rerun()  # the widgets outside this fragment have changed

    look()
    return True


def card(
    planned: Sequence[cells.PlannedCell], row: int, caption: Callable[[cells.PlannedCell], str]
) -> dict[str, str | int]:
    """Return a picture of the gallery. A picture that is not drawn yet is a gray field."""
    one = planned[row]
    source = stored_address(one.path)
    return {"source": source, "alt": one.cell.prompt, "caption": caption(one), "row": row, "note": "not drawn yet"}


def take_choice(planned: Sequence[cells.PlannedCell], on_chosen: Callable[[cells.PlannedCell], None]) -> None:
    chosen = getattr(st.session_state.get("_set"), "chosen", None)
    row = chosen.get("row") if isinstance(chosen, dict) else None
    if isinstance(row, int) and 0 <= row < len(planned):
        on_chosen(planned[row])
        st.session_state["_set_chosen"] = True
