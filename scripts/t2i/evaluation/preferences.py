"""Keep which of two pictures a person preferred, and count the preferences with an interval. This module imports no torch.

The file `<run>/preferences.jsonl` has a line for each answer. It is only appended to, and a later answer about the same
pair of pictures replaces the earlier one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.evaluation.figures import wilson
from t2i.files import append_jsonl, hash_json, json_lines
from t2i.pictures.cells import PlannedCell
from t2i.runs import checkpoint_step
from t2i.tracking.spool import SPOOL_FILE

FILE = "preferences.jsonl"
MOST_BYTES = 20_000_000  # of a file: whoever opens the dashboard may answer, and the disk must not fill
CHOICES = ("first", "second", "neither")


@dataclass(frozen=True)
class Count:
    """How many pairs of pictures were judged for the first model, for the second model, and for neither."""

    first: int = 0
    second: int = 0
    neither: int = 0

    @property
    def decided(self) -> int:
        return self.first + self.second

    @property
    def judged(self) -> int:
        return self.decided + self.neither

    @property
    def share(self) -> float | None:
        """Return the share of decided pairs that the first model won, 0 to 1; None if no pair is decided."""
        return self.first / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the Wilson interval of 95 % of `share`."""
        return None if self.share is None else wilson(self.share, self.decided)

    @property
    def winner(self) -> str:
        """Return "first" or "second" if the interval of the share is above or below one half, otherwise "neither"."""
        low, high = self.interval or (0.0, 1.0)
        return "first" if low > 0.5 else "second" if high < 0.5 else "neither"


def record(first: PlannedCell, second: PlannedCell, preferred: str) -> None:
    """Append an answer to the file of each of both runs.

    Args:
        first, second: two pictures of the same prompt and seed.
        preferred: one of `CHOICES`.

    Raises:
        UserError: a file cannot be written, or is full.
    """
    if preferred not in CHOICES:
        raise UserError(f"preference {preferred[:40]!r} is unknown; take one of {', '.join(CHOICES)}")
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "prompt": first.cell.prompt,
        "seed": first.cell.seed,
        "first": _model(first),
        "second": _model(second),
        "preferred": preferred,
    }
    for run in dict.fromkeys((first.run, second.run)):
        file = run / FILE
        try:
            if file.is_file() and file.stat().st_size > MOST_BYTES:
                raise UserError(f"{file} is full ({MOST_BYTES:,} bytes); move it away, and answer again")
            append_jsonl(file, row)
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error.strerror}); make it writable, and answer again"
            ) from None


def answers(first: PlannedCell, second: PlannedCell) -> dict[tuple[str, int], str]:
    """Return the last answer about each pair of pictures of two models: (prompt, seed) -> one of `CHOICES`.

    An answer with the models the other way round counts too. Damaged lines are left out.

    Args:
        first, second: pictures that stand for their models and settings, whatever their prompts and seeds.
    """
    keys = [_key(_model(first)), _key(_model(second))]
    found = {}
    for row in json_lines(first.run / FILE):
        try:
            pair = [_key(row["first"]), _key(row["second"])]
            at, preferred = (str(row["prompt"]), int(row["seed"])), str(row["preferred"])
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        if preferred not in CHOICES or keys not in (pair, pair[::-1]):
            continue
        swapped = {"first": "second", "second": "first"}
        found[at] = preferred if pair == keys else swapped.get(preferred, preferred)
    return found


def count(preferred: Sequence[str]) -> Count:
    """Count answers, each one of `CHOICES`."""
    return Count(*(list(preferred).count(choice) for choice in CHOICES))


def track(first: PlannedCell, second: PlannedCell, counted: Count, experiment: str) -> Path | None:
    """Log how often the first model won against the second one, in the MLflow run of the first model's training.

    A later result replaces an earlier one in MLflow's table. The status of the run stays, as the training may be at work.

    Args:
        experiment: name of the MLflow experiment of a run that was never tracked. With "", use the default one.

    Returns:
        The file in which records wait for MLflow, or None if MLflow has all records.

    Raises:
        UserError: MLflow cannot use its URI.
    """
    from t2i.tracking.mlflow_tracker import DEFAULT_EXPERIMENT, Tracker

    run, opponent = first.run, _model(second)["model"]
    values: dict[str, float] = {"won": counted.first, "lost": counted.second, "no_difference": counted.neither}
    if counted.share is not None:
        values["share_won"] = counted.share
    tracker = Tracker(run, experiment=experiment or DEFAULT_EXPERIMENT, run_name=run.name, config={}, guest=True)
    name = f"blind_test/{opponent} at {second.cell.guidance_scale:g}"
    tracker.log_metrics(
        {f"{name}/{key}": value for key, value in values.items()}, checkpoint_step(run / first.checkpoint) or 0
    )
    return run / SPOOL_FILE if tracker.finish() else None


def _model(planned: PlannedCell) -> dict[str, Any]:
    """Return what a picture shares with all others of its model and settings."""
    settings = {key: value for key, value in planned.cell.settings().items() if key not in ("prompt", "seed")}
    name = f"{planned.run.resolve().name}/{planned.checkpoint}"
    return {"model": name, "model_hash": planned.model_hash, **settings}


def _key(model: dict[str, Any]) -> str:
    """Return the identity of a model with settings. The name is left out: a copied or renamed run is the same model."""
    return hash_json({key: value for key, value in model.items() if key != "model"})
