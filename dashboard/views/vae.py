"""Show what a VAE keeps of an image: validation images beside their reconstructions by VAEs and checkpoints, with PSNR."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from helpers.charts import curves_chart, layered, nominal, quantity
from helpers.components import data_address
from helpers.folder_curves import folder_curves
from helpers.model_pool import drawing_turn
from helpers.page_texts import MAKE_FLOWERS, shorten, show_empty_state, warn
from helpers.page_url import gone_names, name_choices, warn_of_gone
from helpers.picture_table import encode_png, show_pair, show_pictures
from helpers.run_files import read_or_warn
from helpers.run_list import OUTPUTS, find_runs, step_of
from helpers.tables import show_rows, table_of_rows
from PIL import Image

from t2i.errors import UserError
from t2i.evaluation.figures import is_finite
from t2i.pictures import reconstructions
from t2i.pictures.reconstructions import Images, Vae

COUNTS = [4, 8, 16]  # images on a page
CAPTION_CHARACTERS = 60  # characters of a caption beside its row
COLUMNS = 3  # VAEs that are chosen by default, the newest


def main() -> None:
    st.title("VAE")
    runs = find_runs("any")
    vaes = {f"{name}/{vae.name}": vae for name, run in runs.items() for vae in reconstructions.find_vaes(run)}
    sources = [
        name for name, run in runs.items() if any(vae.run == run and vae.name != "pipeline" for vae in vaes.values())
    ]
    if not sources:
        show_empty_state(
            "No VAE in outputs/ yet. To compare its checkpoints here, add --checkpoints_total_limit 4. These commands draw a "
            "data set and train a VAE in a few minutes on two CPU cores:",
            f"{MAKE_FLOWERS}\n"
            "python scripts/train_vae.py --config demo --dataset outputs/demo/dataset --output_dir outputs/demo/vae",
        )
        return
    left, right = st.columns([3, 1])
    of_newest = [name for name in vaes if name.startswith(f"{sources[0]}/")]
    gone, gone_images = gone_names("vae", vaes), gone_names("images", sources)
    name_choices({"vae": of_newest[-COLUMNS:], "images": sources[0]})
    names = left.multiselect("VAEs", list(vaes), key="vae", bind="query-params", placeholder="choose one or more")
    source = right.selectbox(
        "Validation images of",
        sources,
        index=None,
        required=True,
        key="images",
        bind="query-params",
        on_change=first_page,
    )
    warn_of_gone([*gone, *gone_images], f"{OUTPUTS}/", "choose others, or restore the folders")
    chosen = {name: vaes[name] for name in names if name in vaes}
    if not chosen or source not in sources:
        st.text("choose one or more VAEs")
        return
    pictures, curves = st.columns([3, 2], gap="large")
    with pictures:
        st.header("Reconstructions")
        try:
            show_reconstructions(chosen, reconstructions.validation_images(runs[source]))
        except UserError as error:
            warn(error)
    with curves:
        show_curves({name: run for name, run in runs.items() if any(vae.run == run for vae in chosen.values())}, chosen)


def first_page() -> None:
    """Go to the first page after the user chose other images, since these images may fill fewer pages."""
    st.session_state["page"] = 1


def show_reconstructions(vaes: dict[str, Vae], images: Images) -> None:
    """Show a widget that chooses the images, the number of missing reconstructions, and the table of reconstructions."""
    left, right = st.columns(2)
    count = left.selectbox("Images", COUNTS, index=1, key="count", bind="query-params", on_change=first_page)
    pages = max(1, -(-len(images) // count))
    page = right.number_input(
        f"Page, of {pages:,}", min_value=1, max_value=pages, key="page", bind="query-params", disabled=pages == 1
    )
    here = range(count * (page - 1), min(len(images), count * page))
    originals = [np.asarray(images.pixels[number]) for number in here]
    problems: dict[str, str] = {}
    stored: dict[str, list[Any]] = {}
    for name, vae in vaes.items():
        try:
            stored[name] = [reconstructions.read(vae, image) for image in originals]
        except UserError as error:  # a checkpoint that was deleted meanwhile, or is half copied
            stored[name], problems[name] = [None] * len(originals), str(error)
    missing = sum(made is None for name in vaes for made in stored[name] if name not in problems)
    pressed, bar = False, None
    if missing:
        st.text(f"{missing:,} of {len(vaes) * len(originals):,} reconstructions are not made yet")
        pressed = st.button(f"Reconstruct {missing:,} images", type="primary")
        bar = st.empty()  # above the table, which stays in sight meanwhile
    show_table(vaes, images, here, originals, stored, problems)
    if pressed:
        reconstruct([vae for name, vae in vaes.items() if name not in problems], originals, bar)
        if not any(made for row in stored.values() for made in row):  # show the first ones beside their originals
            st.session_state["_chosen"] = {"left": (0, 0), "right": (0, 1)}
        st.rerun()


def reconstruct(vaes: Sequence[Vae], originals: Sequence[np.ndarray], place: Any) -> None:
    """Make the missing reconstructions of the shown images, while no other thread of this server draws.

    Finished reconstructions stay stored, even if the user leaves the page.
    """
    total = len(vaes) * len(originals)
    bar = place.progress(0.0, text="loading the model, or waiting for another drawing to end")
    for number, vae in enumerate(vaes):
        with drawing_turn():
            reconstructions.make(vae, originals, progress=partial(_show_progress, bar, number * len(originals), total))


def _show_progress(bar: Any, before: int, total: int, done: int) -> None:
    bar.progress((before + done) / total, f"{before + done:,} of {total:,}")


def show_table(
    vaes: dict[str, Vae],
    images: Images,
    here: range,
    originals: list[np.ndarray],
    stored: dict[str, list[Any]],
    problems: dict[str, str],
) -> None:
    """Show originals and reconstructions: a row per image, a column per VAE, and PSNR and SSIM under each reconstruction."""
    columns = ["original", *(header(name, stored[name]) for name in vaes)]
    rows = [
        f"{number}: {shorten(images.captions[number] or images.files[number], CAPTION_CHARACTERS)}" for number in here
    ]
    shown: dict[str, dict[str, Any]] = {}
    for row, image in enumerate(originals):
        title = f"image {here[row]}"
        caption = images.captions[here[row]]
        shown[f"original, {title}"] = {
            "row": row,
            "column": 0,
            "source": data_address(encode_png(image)),
            "label": f"original, {title}",
            "under": "",
            "note": "",
            "alt": f"original, {title}: {caption}",
            "open": partial(Image.fromarray, image),
        }
        for column, name in enumerate(vaes, 1):
            made = stored[name][row]
            label = f"{name}, {title}" + (f", {made.psnr:.2f} dB" if made else "")
            shown[f"{name}, {title}"] = {
                "row": row,
                "column": column,
                "source": data_address(encode_png(np.asarray(made.picture))) if made else "",
                "label": label,
                "alt": f"{label}: {caption}",
                "under": f"{made.psnr:.2f} dB, SSIM {made.ssim:.3f}" if made else "",
                "note": "" if made else problems.get(name, "not made yet"),
                "open": partial(_picture, made),
            }
    if pair := show_pictures(shown, columns, rows, "image \\ VAE", is_by_row=True):
        show_pair(shown, *pair)


def _picture(made: Any) -> Image.Image | None:
    return made.picture if made else None


def header(name: str, stored: list[Any]) -> str:
    """Return a VAE's name with the mean PSNR of its shown reconstructions."""
    finite = [made.psnr for made in stored if made and math.isfinite(made.psnr)]
    return f"{name}: mean {np.mean(finite):.2f} dB of {len(finite)}" if finite else name


# --- Curves ----------------------------------------------------------------------------------------------------------


def show_curves(runs: dict[str, Path], vaes: dict[str, Vae]) -> None:
    """Show PSNR on the validation split over training, with the chosen checkpoints marked, and the runs' final figures."""
    st.header("PSNR in training")
    curves = {name: folder_curves(run) for name, run in runs.items()}
    for metric, title in (("val_psnr_db", "PSNR in dB"), ("val_ssim", "SSIM")):
        rows = [(name, metric, metrics[metric]) for name, metrics in curves.items() if metric in metrics]
        chart = curves_chart(rows)
        if chart is None:
            continue
        points = [
            {"run": name, "VAE": vae.name, "x": float(curve.steps[at]), "value": float(curve.values[at])}
            for name, _, curve in rows
            for vae in vaes.values()
            if vae.run == runs[name]
            for at in [index_on_curve(vae, curve.steps)]
            if at is not None
        ]
        if points:
            marks = {
                "data": table_of_rows(points),
                "mark": {"type": "point", "size": 110, "filled": True, "color": "#d6336c", "opacity": 1},
                "encoding": {
                    "x": quantity("x"),
                    "y": quantity("value"),
                    "tooltip": [nominal("run"), nominal("VAE"), quantity("x", title="step"), quantity("value")],
                },
            }
            chart = layered([chart, marks], 240)
        st.text(f"{title}, mean over the validation split")
        st.vega_lite_chart(chart | {"height": 240})
    states = {name: read_or_warn(run / "run.json") for name, run in runs.items()}
    keys = {"psnr_db_before": "before", "psnr_db": "after", "test_psnr_db": "on test", "ssim": "SSIM after"}
    table = [
        {"run": name} | {title: round(state[key], 3) for key, title in keys.items() if is_finite(state.get(key))}
        for name, state in states.items()
    ]
    if any(len(row) > 1 for row in table):
        st.text("PSNR in dB before and after training")
        show_rows(table)
    if not any("val_psnr_db" in metrics for metrics in curves.values()):
        st.text("no curve yet")


def index_on_curve(vae: Vae, steps: np.ndarray) -> int | None:
    """Return the point of a validation curve that belongs to a VAE.

    For a checkpoint, the point on the curve is the newest validation up to the checkpoint's step. For the finished VAE,
    the point on the curve is the last validation.
    """
    if not len(steps) or vae.name == "start":
        return None
    step = steps[-1] if vae.name == "vae" else step_of(vae.name)
    before = np.flatnonzero(steps <= step)
    return int(before[-1]) if len(before) else None


main()
