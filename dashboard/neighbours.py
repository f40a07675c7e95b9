"""The training images nearest to a picture: whether a model made something, or remembers it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from common import escape, read, settings_of, warn

from t2i.config import DataConfig
from t2i.errors import UserError
from t2i.runs import find_prepared

NEIGHBOURS = 4
SETS = 2  # training sets in memory: 3 KB an image
MAX_IMAGES = 50_000  # of a training set: 150 MB in memory, half a minute on two cores
WIDTH = 128  # pixels a side on the page
HELP = (
    "Distances are those of the evaluation's memorisation figures: between thumbnails of 16 x 16, mirrored or not, to the nearest "
    "training image over the mean to the 50 nearest. A picture that stands as near to its neighbour as to all others has 1."
)


@dataclass(frozen=True)
class TrainingSet:
    """A run's prepared training images: pixels and rows memory mapped, their embedding, and how near unseen images are."""

    split: Any
    embedding: Any
    unseen: np.ndarray  # relative distances of images that training never saw, sorted


def show_neighbours(run: Path, picture: np.ndarray | None) -> None:
    """A switch, and under it the nearest training images; one sentence where they are not on this machine.

    picture: uint8 [R, R, 3]; None while it is drawn: the switch stays, else it would forget its state.
    """
    folder = find_images(run)
    if folder is None:
        st.caption(
            "The images this model was trained on are not on this machine, so its picture cannot be held beside them."
        )
        return
    if not st.toggle("Nearest training images", key="nearest", bind="query-params", help=HELP) or picture is None:
        return
    try:
        with st.spinner("comparing with the training images"):
            known = training_set(folder)
            found, nearer = compare(known, picture)
    except (UserError, OSError) as error:
        warn(error)
        return
    with st.container(horizontal=True, gap="small"):
        for row, distance in found:
            with st.container(width=WIDTH, gap=None):
                caption = str(known.split.rows[row].get("caption") or "no caption")
                st.image(known.split.pixels[row], width=WIDTH, alt=f"training image: {caption}", output_format="PNG")
                st.caption(escape(f"{distance:.2f} · {caption}"))
    st.text(judgement(found[0][1], nearer))


def find_images(run: Path) -> Path | None:
    """The folder of the images that a run was trained on, by the hash in its run.json; None where it is not here."""
    identity = read(run / "run.json").get("identity")
    section = settings_of(run).get("data")
    cache_dir = section.get("cache_dir") if isinstance(section, dict) else None
    return find_prepared(
        cache_dir if isinstance(cache_dir, str) else DataConfig().cache_dir,
        identity.get("dataset_hash") if isinstance(identity, dict) else None,
    )


@st.cache_resource(max_entries=SETS, show_spinner=False)
def training_set(folder: Path) -> TrainingSet:
    """The prepared images in `folder` (by content, so they never change) and their embedding; computed once."""
    try:
        from t2i.data import preparing
        from t2i.evaluation import memorisation
    except ImportError as error:
        raise UserError(
            f"the training images need {error.name}, which is not installed; pip install -r requirements.txt"
        ) from None
    train, validation, test = preparing.open_prepared(folder)
    if train is None or len(train) < 2:
        raise UserError(f"{folder} holds too few training images to compare with")
    if len(train) > MAX_IMAGES:
        raise UserError(
            f"{len(train):,} training images are more than the {MAX_IMAGES:,} that this page compares with; "
            "evaluate_checkpoints.py measures memorisation on all"
        )
    embedding = memorisation.pixel_embedding(train.pixels)
    unseen = test or validation
    near = memorisation.relative_distances(unseen.pixels, embedding) if unseen else np.zeros(0, np.float32)
    return TrainingSet(train, embedding, np.sort(near))


def compare(known: TrainingSet, picture: np.ndarray) -> tuple[list[tuple[int, float]], float | None]:
    """The nearest training images, and which share of unseen images has a nearer one (None: there are none)."""
    from t2i.evaluation import memorisation

    found = memorisation.nearest_images(picture, known.embedding, NEIGHBOURS)
    nearer = float((known.unseen < found[0][1]).mean()) if len(known.unseen) else None
    return found, nearer


def judgement(distance: float, nearer: float | None) -> str:
    if distance < 0.5:
        return "Relative distance under 0.5: as near as a copy. Look whether the model remembers this image."
    if nearer is None:
        return "Relative distance of 0.5 or more: no near copy."
    return f"No near copy: {nearer:.0%} of real images that training never saw lie nearer to a training image."
