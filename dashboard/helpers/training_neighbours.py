"""Show the training images nearest to a picture, so that a user sees whether the model copied one of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from helpers.page_texts import escape, warn
from helpers.run_files import read_or_warn, read_settings
from t2i.config import DataConfig
from t2i.errors import UserError
from t2i.runs import find_prepared

NEIGHBOURS = 4
SETS = 2  # training sets in memory: 3 KB per image
MAX_IMAGES = 50_000  # images of a training set: 150 MB in memory, half a minute on two cores
WIDTH = 128  # pixels per side on the page
HELP = (
    "Relative distance: the distance of 16 x 16 thumbnails to the nearest training image, divided by the mean to the 50 nearest. "
    "The evaluation's memorisation figures use it too. With 1, the nearest image is as far away as the 50 nearest."
)


@dataclass(frozen=True)
class TrainingSet:
    """A run's prepared training images (pixels and rows memory mapped), and how near unseen images are to the training
    images.
    """

    split: Any
    embedding: Any
    unseen: np.ndarray  # Relative distances of unseen images to the training images, sorted.


def show_neighbours(run: Path, picture: np.ndarray | None) -> None:
    """Show a switch, and if it is on, the training images nearest to a picture.

    If the training images are not on this machine, say so.

    Args:
        picture: the picture, uint8 [R, R, 3], or None while the picture is being drawn. The switch is shown with and
            without a picture, so that its state is kept.
    """
    folder = find_images(run)
    if folder is None:
        st.caption(
            "The images this model was trained on are not on this machine, so its picture cannot be compared with them."
        )
        return
    if not st.toggle("Nearest training images", key="nearest", bind="query-params", help=HELP) or picture is None:
        return
    try:
        with st.spinner("comparing with the training images"):
            training = training_set(folder)
            nearest, nearer_share = compare(training, picture)
    except (UserError, OSError) as error:
        warn(error)
        return
    with st.container(horizontal=True, gap="small"):
        for row, distance in nearest:
            with st.container(width=WIDTH, gap=None):
                caption = str(training.split.rows[row].get("caption") or "no caption")
                st.image(training.split.pixels[row], width=WIDTH, alt=f"training image: {caption}", output_format="PNG")
                st.caption(escape(f"{distance:.2f} · {caption}"))
    st.text(judgement(nearest[0][1], nearer_share))


def find_images(run: Path) -> Path | None:
    """Return the folder of a run's prepared images, by the hash in run.json, or None if the folder is not on this machine."""
    identity = read_or_warn(run / "run.json").get("identity")
    section = read_settings(run).get("data")
    cache_dir = section.get("cache_dir") if isinstance(section, dict) else None
    return find_prepared(
        cache_dir if isinstance(cache_dir, str) else DataConfig().cache_dir,
        identity.get("dataset_hash") if isinstance(identity, dict) else None,
    )


@st.cache_resource(max_entries=SETS, show_spinner=False)
def training_set(folder: Path) -> TrainingSet:
    """Return the prepared images in `folder` and their embedding, computed once: the folder's content never changes."""
    try:  # only here: these need torch, and a Space has neither module's packages
        from t2i.data import prepared
        from t2i.evaluation import memorisation
    except ImportError as error:
        raise UserError(
            f"the training images need {error.name}, which is not installed; pip install -r requirements.txt"
        ) from None
    train, validation, test = prepared.open_prepared(folder)
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


def compare(training: TrainingSet, picture: np.ndarray) -> tuple[list[tuple[int, float]], float | None]:
    """Find the training images nearest to a picture, and the share of unseen images that have a nearer training image.

    The share of unseen images is None if there are no unseen images.
    """
    from t2i.evaluation import memorisation

    nearest = memorisation.nearest_images(picture, training.embedding, NEIGHBOURS)
    nearer_share = float((training.unseen < nearest[0][1]).mean()) if len(training.unseen) else None
    return nearest, nearer_share


def judgement(distance: float, nearer_share: float | None) -> str:
    """Return a sentence that judges a picture's relative distance to the training images, for the page."""
    if distance < 0.5:
        return "Relative distance under 0.5: as near as a copy. Look whether the model remembers this image."
    if nearer_share is None:
        return "Relative distance of 0.5 or more: no near copy."
    return f"No near copy: {nearer_share:.0%} of real images that training never saw lie nearer to a training image."
