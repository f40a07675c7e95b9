"""Draw drafts of a prompt while it is typed: the newest text replaces the drawing of an older one, and nothing is stored."""

import time
from collections.abc import Callable, Sequence

import streamlit as st

from helpers.components import typing
from helpers.drawing_jobs import DraftJob
from helpers.page_texts import escape, shorten
from t2i.errors import UserError
from t2i.pictures import cells

PAUSE_MS = 250  # after the last key
# The page waits for a draft, so that it appears without a further question of the browser. If a draft takes longer, as
# when the model is loaded, the page asks again and again, and a newer text need not wait for the older one's draft.
WAIT_S, LOOK_S = 0.5, 0.5
YIELD_S = 0.05  # how often a waiting page lets a press of a button end the wait
PIXELS = 384  # pixels per side of one draft on the page, or of all drafts in a row together


@st.fragment
def show_draft(plan: Callable[[str], Sequence[cells.PlannedCell]], live: bool, covered: bool) -> None:
    """Listen to the prompt's field, and show pictures of its text that the user did not send yet, in few steps.

    Args:
        plan: function that returns the drafts of a text. It raises `UserError` for a text without pictures.
        live: whether to draw while the user types.
        covered: whether the page shows the full picture of the prompt that was sent, or draws it.
    """
    with st.container(key="play_listen"):  # takes no room
        typing("prompt", "draw", live, PAUSE_MS, key="_typing", on_typed=take_text)
    text = typed_text() if live else None
    if text is None or not text.strip() or (covered and text == st.session_state.get("prompt")):
        stop_draft()
        return
    try:
        planned = plan(text)
        job = job_of(planned)
    except UserError as error:
        stop_draft()
        with st.container(key="play_draft"):
            st.caption(escape(error))
        return
    place, deadline = st.empty(), time.monotonic() + WAIT_S
    while not job.finished.wait(YIELD_S) and time.monotonic() < deadline:
        place.empty()  # Streamlit ends this run here if the user pressed a button meanwhile
    if not job.finished.is_set():
        watch(job)
        return
    if job.error:
        st.warning(escape(job.error))
    elif job.pictures is not None:
        show_pictures(job, text)


def take_text() -> None:
    """Remember the reported text, and the prompt that was sent before it."""
    text = getattr(st.session_state.get("_typing"), "typed", None)
    if isinstance(text, str):
        st.session_state["_typed"] = (text, st.session_state.get("prompt"))


def typed_text() -> str | None:
    """Return the text that the user typed, or None if the prompt has been changed otherwise since then."""
    text, before = st.session_state.get("_typed", (None, None))
    return text if st.session_state.get("prompt") in (text, before) else None


def forget_text() -> None:
    """Drop the typed text and its drafts, because the full picture is wanted."""
    st.session_state.pop("_typed", None)
    stop_draft()


def stop_draft() -> None:
    job: DraftJob | None = st.session_state.pop("_draft", None)
    if job is not None:
        job.stopped.set()


def job_of(planned: Sequence[cells.PlannedCell]) -> DraftJob:
    """Return the job that draws these drafts. A job for an older text is stopped."""
    job: DraftJob | None = st.session_state.get("_draft")
    if job is None or [one.path for one in job.planned] != [one.path for one in planned]:
        stop_draft()
        job = st.session_state["_draft"] = DraftJob.start(planned)
    return job


def watch(job: DraftJob) -> None:
    """Say that a draft takes longer, and show it as soon as it is finished."""

    @st.fragment(run_every=LOOK_S)
    def look() -> None:
        job.look()
        if job.finished.is_set():
            st.rerun()
        st.caption("The draft is waiting for the model to be loaded, or for another picture.")

    look()


def show_pictures(job: DraftJob, text: str) -> None:
    """Show finished drafts in the place of the full picture, and how to get that."""
    cell = job.planned[0].cell
    with st.container(key="play_draft"):
        with st.container(horizontal=True, gap="small"):
            columns = {1: 1, 2: 2, 3: 3, 4: 2}.get(len(job.planned), 3)
            for one, picture in zip(job.planned, job.pictures if job.pictures is not None else (), strict=True):
                alt = f"draft: {one.cell.prompt}"
                st.image(picture, width=PIXELS // columns, alt=alt, output_format="PNG")
        steps = f"{cell.num_inference_steps} steps" if cell.num_inference_steps > 1 else "one step"
        st.caption(f"A draft of “{escape(shorten(text, 80))}” in {steps}. Enter draws the full picture.")
