"""Measure a model's loss on each picture of a data set, in a thread, and sort pictures by it."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from helpers.data_repairs import why_not
from helpers.drawing_jobs import Job, running_job
from helpers.model_pool import drawing_turn, room_for_own_model
from helpers.page_texts import escape, warn
from helpers.run_files import best_checkpoint, read_settings
from helpers.run_list import find_runs
from t2i.errors import UserError
from t2i.evaluation import image_losses
from t2i.pictures import cells
from t2i.pictures.png import student_steps

ABOUT = "A model trained on these pictures finds wrong captions: a caption that contradicts its picture raises the model's loss."


@dataclass(kw_only=True)
class LossJob(Job):
    """A thread that measures the losses of a checkpoint: `done` of `total` pictures are measured."""

    run: Path
    checkpoint: str
    settings: dict[str, Any]
    done: int = 0
    total: int = 0
    _turn: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def start(cls, run: Path, checkpoint: str, settings: dict[str, Any]) -> "LossJob":
        job = cls(key=("losses", run, checkpoint), run=run, checkpoint=checkpoint, settings=settings)
        job._start("losses", job._measure)
        return job

    def _measure(self) -> None:
        try:
            if not self._has_no_turn():
                with room_for_own_model():
                    image_losses.measure(
                        self.run, self.checkpoint, self.settings, _load, self._count, self._has_no_turn
                    )
        finally:
            self._turn.close()

    def _has_no_turn(self) -> bool:
        """Let a waiting picture be drawn, then take the next turn. Return whether the job was cancelled meanwhile."""
        self._turn.close()
        self._turn = ExitStack()
        return not self._turn.enter_context(drawing_turn(self.is_cancelled))

    def _count(self, done: int, total: int) -> None:
        self.done, self.total = done, total


def _load(model: Path) -> Any:
    from t2i.pictures import sampling  # this imports torch, for which a page that only shows pictures must not wait

    return sampling.load_pipeline(model, device=sampling.best_device())


def measured_losses(runs: dict[str, Path]) -> dict[str, image_losses.Losses]:
    """Return the losses that models trained on a data set have on its pictures, by the names of the models.

    Args:
        runs: the runs that read the data set, by name.
    """
    found = {}
    for name, checkpoint in models_of(runs).items():
        try:
            losses = image_losses.read(runs[name], checkpoint)
        except (UserError, OSError) as error:
            warn(error)
            continue
        if losses:
            found[f"{name}, {checkpoint}"] = losses
    return found


def models_of(runs: dict[str, Path]) -> dict[str, str]:
    """Return the best checkpoint of each run of a denoiser but of students, which did not learn from images."""
    denoisers = find_runs()
    teachers = [name for name, run in runs.items() if name in denoisers and not student_steps(cells.schedule_of(run))]
    best = {name: best_checkpoint(runs[name]) for name in teachers}
    return {name: checkpoint for name, checkpoint in best.items() if checkpoint}


def show_measuring(runs: dict[str, Path], home: Path | None, measured: dict[str, image_losses.Losses]) -> None:
    """Show which models have measured their losses, and a button that measures those of another model, with progress."""
    st.subheader("Wrong captions")
    st.text(ABOUT)
    models = models_of(runs)
    if not models:
        st.text("No model in outputs/ was trained on this data set yet.")
        return
    if measured:
        st.caption(escape(f"Sort by the loss of {' or of '.join(measured)}: wrong captions come first."))
    jobs = [job for name, one in models.items() if (job := running_job(("losses", runs[name], one)))]
    job = jobs[0] if jobs else st.session_state.get("_loss_job")
    if job is not None and job.run in runs.values():  # not of another data set
        show_job(job)
        return
    fresh = [name for name, checkpoint in models.items() if f"{name}, {checkpoint}" not in measured]
    reason = why_not(home) if home else ""  # the losses of data of the Hub can be measured
    if not fresh or reason:
        st.caption(escape(reason))
        return
    name = st.selectbox("Model", fresh, key="loss_model") or fresh[0]
    if st.button("Measure the loss of each picture"):
        settings = read_settings(runs[name]).get("data")
        settings = settings if isinstance(settings, dict) else {}
        st.session_state["_loss_job"] = LossJob.start(runs[name], models[name], settings)
        st.rerun()


def show_job(job: LossJob) -> None:
    @st.fragment(run_every=1)
    def watch() -> None:
        job.look()
        if job.finished.is_set():
            st.session_state["_loss_job"] = None
            if job.error:
                st.session_state["_said"] = job.error
            st.rerun()
        share = job.done / job.total if job.total else 0.0
        text = f"{job.done:,} of {job.total:,} pictures" if job.total else "loading the model"
        st.progress(share, text)
        if st.button("Stop"):
            job.stopped.set()

    watch()
