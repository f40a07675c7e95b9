"""The captioned pictures of a data set: search, the audit of its captions, and the pictures that were left out."""

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
from helpers.charts import bar_chart
from helpers.components import data_address, gallery
from helpers.page_texts import shorten, show_empty_state, warn
from helpers.page_url import asked, gone_names, name_choices, warn_of_gone
from helpers.run_files import read_settings
from helpers.run_list import OUTPUTS, find_runs

from t2i.captions.auditing import CHECKS, clean_caption
from t2i.data import browse
from t2i.data.images import BadImage
from t2i.errors import UserError
from t2i.files import read_json
from t2i.runs import find_prepared

PICTURES = 24  # pictures on a page: 2, 3, 4 and 6 columns divide it
SIDE, LARGE = 320, 1024  # most pixels per side of a picture in the gallery, and of the chosen one
CAPTION_CHARACTERS = 300  # characters of a caption in the gallery; the chosen picture shows all of them
ANY = "any"
CLICK = "A click on a picture shows it larger, with all its captions."
FINDINGS = {name.replace("_", " "): name for name in CHECKS}  # as they are called on the page and in the URL


def main() -> None:
    st.title("Data")
    sets = find_data()
    if not sets:
        show_empty_state(
            "No data set in outputs/ yet. This draws one in a minute; scripts/caption_to_hub.py makes one of photos:",
            "python scripts/make_flowers.py --output_dir outputs/demo/dataset --count 4000 --size 64",
        )
        return
    left, right = st.columns([3, 1])
    gone = gone_names("dataset", sets)
    name = next(iter(asked("dataset")), "" if gone else next(iter(sets)))
    folder, runs = sets.get(name, (None, {}))
    splits = browse.find_splits(folder, caption_columns(runs)) if folder else {}
    if splits:
        name_choices({"dataset": name, "split": next(iter(splits))})
    options: dict[str, Any] = {"index": None, "required": True, "bind": "query-params", "on_change": first_page}
    left.selectbox("Data set", list(sets), key="dataset", **options)
    if folder is None or not splits:
        warn_of_gone(gone or [name], f"{OUTPUTS}/", "choose another data set")
        return
    chosen = right.selectbox("Split", list(splits), key="split", **options)
    split = splits[chosen] if chosen in splits else next(iter(splits.values()))
    try:
        rows = browse.read_rows(split)
        show_split(split, rows)
    except UserError as error:
        warn(error)
    show_quarantine(folder, runs)


def find_data() -> dict[str, tuple[Path, dict[str, Path]]]:
    """Return the folders of data sets by name, each with the runs that read it.

    The page lists the dataset folders below outputs/ and the dataset folders that a run names. For a run on another
    source of images, the page lists the folder of the run's prepared images. The page opens only the listed folders,
    whatever a URL says.
    """
    inside = OUTPUTS.resolve()
    shards = [file for level in ("*", "*/data", "*/*", "*/*/data") for file in OUTPUTS.glob(f"{level}/*.parquet")]
    shards = [file for file in shards if file.resolve().is_relative_to(inside)]
    folders = sorted({file.parent.parent if file.parent.name == "data" else file.parent for file in shards})
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    sets: dict[str, tuple[Path, dict[str, Path]]] = {
        folder.relative_to(OUTPUTS).as_posix(): (folder, {}) for folder in folders
    }
    names = {folder.resolve(): name for name, (folder, _) in sets.items()}
    for name, run in find_runs("any").items():
        settings = read_settings(run).get("data")
        if not isinstance(settings, dict) or not isinstance(settings.get("dataset"), str):
            continue
        source = settings["dataset"]
        folder = data_folder(source, settings, run)
        if folder is not None:
            title = names.setdefault(folder.resolve(), source if folder == Path(source) else f"{source} ({name})")
            sets.setdefault(title, (folder, {}))[1][name] = run
    return sets


def data_folder(source: str, settings: dict[str, Any], run: Path) -> Path | None:
    """Return the folder of a run's data set: the dataset folder, or otherwise the folder of the prepared images."""
    try:
        if browse.find_splits(Path(source)):
            return Path(source)
        identity = read_json(run / "run.json").get("identity", {})
        return find_prepared(str(settings.get("cache_dir")), identity.get("dataset_hash"))
    except (
        OSError,
        ValueError,
        AttributeError,
        RuntimeError,
        UserError,
    ):  # of a path that no folder can have, or files gone
        return None


def caption_columns(runs: dict[str, Path]) -> tuple[str, ...]:
    """Return the caption columns that the newest of `runs` with `--caption_column` reads; () without such a run."""
    for run in runs.values():
        settings = read_settings(run).get("data")
        named = settings.get("caption_column") if isinstance(settings, dict) else None
        columns = tuple(name for name in (named if isinstance(named, list) else [named]) if name)
        if columns and all(isinstance(name, str) for name in columns):
            return columns
    return ()


def first_page() -> None:
    """Reset the gallery after a new choice: go to its first page, and forget the chosen picture."""
    st.session_state["page"] = 1
    st.session_state["picture"] = ""


def show_split(split: browse.Split, rows: browse.Rows) -> None:
    """Show the filters and the gallery of a split, and beside the gallery figures on the captions."""
    left, right = st.columns([3, 2], gap="large")
    with left:
        shown, notes = choose_rows(split, rows)
        show_pictures(split, rows, shown, notes)
    with right:  # after the pictures, which are there sooner
        if rows.has_captions:
            if split.captions:
                st.text(
                    f"A run reads these captions by --caption_column {' '.join(map(browse.visible, split.captions))}."
                )
            show_audit(browse.audit(split), len(rows), split)
            show_lengths(split)
        elif rows.labels:
            st.text("This data set has no captions: training writes them from the labels.")
        else:
            st.text(
                "No column is named caption or text. This page shows other columns once a run reads captions from them."
            )


def choose_rows(split: browse.Split, rows: browse.Rows) -> tuple[list[int], dict[int, str]]:
    """Show the filters of the gallery. Return the rows that match the filters, and the audit's remark on each row.

    Duplicates are returned in groups that share a caption.
    """
    query = st.text_input(
        "Search in captions",
        key="search",
        bind="query-params",
        on_change=first_page,
        placeholder='words, or "a phrase in quotes"',
    )
    one, two, three = st.columns(3)
    finding = one.selectbox("Caption audit", [ANY, *FINDINGS], key="finding", bind="query-params", on_change=first_page)
    kinds = browse.kinds_of(rows)
    column = (
        two.selectbox("Filter by", list(kinds), key="by", bind="query-params", on_change=no_values) if kinds else None
    )
    values = kinds[column] if column else []
    chosen = (
        three.multiselect(
            "Values", sorted(set(values)), key="value", bind="query-params", on_change=first_page, placeholder="any"
        )
        if column
        else []
    )
    texts = ["\n".join(captions) for captions in rows.captions]
    shown = browse.search(texts, query) if query.strip() else list(range(len(rows)))
    notes: dict[int, str] = {}
    if finding in FINDINGS and rows.has_captions:
        notes = browse.audit(split)[FINDINGS[finding]] or {}
        order = [row for group in browse.duplicate_groups(split) for row in group] if finding == "duplicates" else shown
        matching = set(shown) & notes.keys()
        shown = [row for row in order if row in matching]
    if chosen:
        shown = [row for row in shown if values[row] in chosen]
    return shown, notes


def no_values() -> None:
    st.session_state["value"] = []
    first_page()


def show_pictures(split: browse.Split, rows: browse.Rows, shown: list[int], notes: dict[int, str]) -> None:
    """Show a page of the gallery, and the chosen picture in a dialog, which is in sight wherever the page is scrolled to."""
    pages = max(1, -(-len(shown) // PICTURES))
    left, middle, right = st.columns([3, 1, 1], vertical_alignment="bottom")
    chosen = middle.text_input("Picture", key="picture", bind="query-params", placeholder="number", help=CLICK)
    page = right.number_input(
        f"Page, of {pages:,}", min_value=1, max_value=pages, key="page", bind="query-params", disabled=pages == 1
    )
    start = PICTURES * (int(page) - 1)
    here = shown[start : start + PICTURES]
    pictures = f"{len(rows):,} pictures" if len(shown) == len(rows) else f"{len(shown):,} of {len(rows):,} pictures"
    left.text(f"{pictures}, {start + 1:,} to {start + len(here):,} shown" if here else "no picture matches")
    number = int(chosen) if chosen.isascii() and chosen.isdigit() and len(chosen) < 10 else -1
    if chosen and not 0 <= number < len(rows):
        st.text(f"there are pictures 0 to {len(rows) - 1:,}")
    if here:
        sources = thumbnails(split, tuple(here))
        cards = [card(rows, row, sources[position], notes.get(row, "")) for position, row in enumerate(here)]
        for before, one, row in zip([None, *here], cards, here, strict=False):
            one["heading"] = (
                heading_between(rows, before, row) if st.session_state.get("finding") == "duplicates" else ""
            )
        gallery({"pictures": cards}, key="_gallery", on_chosen=take_chosen)
    if 0 <= number < len(rows):
        st.dialog(f"Picture {number}", width="medium", on_dismiss=close_picture)(show_chosen)(
            split, rows, number, notes
        )


def card(rows: browse.Rows, row: int, picture: str, note: str) -> dict[str, Any]:
    """Return the data of a picture in the gallery.

    `picture` is the picture's data address, or the reason why the picture cannot be shown.
    """
    there = picture.startswith("data:")
    first, *others = rows.captions[row]
    short = shorten(browse.visible(first), CAPTION_CHARACTERS)
    more = f" (+{len(others)} more)" if others else ""
    label = browse.visible(rows.labels[row] or "") if rows.labels else ""
    empty = "(no caption)" if rows.has_captions else ""
    return {
        "row": row,
        "source": picture if there else "",
        "note": "" if there else picture,
        "alt": short or f"picture {row}",
        "caption": f"{short}{more}" or empty,
        "label": label[:100],
        "finding": browse.visible(note),
        "title": f"picture {row}",
    }


@lru_cache(maxsize=32)
def thumbnails(split: browse.Split, rows: tuple[int, ...], side: int = SIDE) -> list[str]:
    """Return the picture of each row as a data address, or the reason why the picture cannot be shown.

    A split whose files changed is read again.
    """
    return [
        f"cannot be shown: {picture.reason}"
        if isinstance(picture, BadImage)
        else data_address(browse.as_file(picture, side))
        for picture in browse.read_pictures(split, rows, side)
    ]


def heading_between(rows: browse.Rows, before: int | None, row: int) -> str:
    """Return the heading above a duplicate that shares no caption with the duplicate before it; "" within a group."""
    shared = shared_captions(rows, row)
    if before is not None and shared & shared_captions(rows, before):
        return ""
    return shorten(browse.visible(rows.captions[row][0]), CAPTION_CHARACTERS)


def shared_captions(rows: browse.Rows, row: int) -> set[str]:
    return {clean_caption(caption).casefold() for caption in rows.captions[row]}


def take_chosen() -> None:
    """Remember the clicked picture. The page then looks up the row of the clicked picture among the rows that exist."""
    clicked = getattr(st.session_state.get("_gallery"), "chosen", None)
    if isinstance(clicked, dict) and isinstance(clicked.get("row"), int):
        st.session_state["picture"] = str(clicked["row"])


def close_picture() -> None:
    st.session_state["picture"] = ""


def show_chosen(split: browse.Split, rows: browse.Rows, number: int, notes: dict[int, str]) -> None:
    """Show a picture, all its captions, its other columns and its finding."""
    left, right = st.columns(2)
    source = thumbnails(split, (number,), LARGE)[0]
    if source.startswith("data:"):
        alt = browse.visible(rows.captions[number][0])[:CAPTION_CHARACTERS] or f"picture {number}"
        left.image(source, alt=alt, width="stretch")  # small ones enlarged, as in the gallery
    else:
        left.text(source)
    for caption in rows.captions[number]:
        right.code(browse.visible(caption) or "(no caption)", language=None, wrap_lines=True)
    facts = {"label": rows.labels[number]} if rows.labels else {}
    facts |= {name: values[number] for name, values in rows.columns.items()}
    if note := notes.get(number):
        facts["finding"] = note
    shown = [(name, browse.visible(str(value))) for name, value in facts.items() if value is not None]
    if shown:
        right.dataframe(pd.DataFrame(shown, columns=["what", "value"]), hide_index=True)


# --- What the captions are like --------------------------------------------------------------------------------------


def show_audit(findings: dict[str, Any], total: int, split: browse.Split) -> None:
    """Show the findings of the caption audit as a table.

    A click on a row of the table shows the pictures of the row's finding.
    """
    st.subheader("Caption audit")
    rows = []
    for title, name in FINDINGS.items():
        count = None if findings[name] is None else len(findings[name])
        share = "not measured" if count is None else f"{count / max(1, total):.1%}"
        rows.append({"finding": title, "captions": count, "share": share, "what it means": CHECKS[name]})
    st.dataframe(
        pd.DataFrame(rows).astype({"captions": "Int64"}),
        hide_index=True,
        on_select=take_finding,
        selection_mode="single-row",
        key="_audit",
        placeholder="–",
    )
    st.caption("Choosing a row shows the pictures it is about.")
    if text := said_of_templates(split, len(findings["duplicates"] or ())):
        st.text(text)
    st.text(measured_elsewhere(split.folder))


def said_of_templates(split: browse.Split, duplicates: int) -> str:
    """Return a sentence on duplicates that a template made, or "" if there are none."""
    count, names = browse.template_groups(split)
    if not count:
        return ""
    kind = "label" if names == ["label"] else "attributes"
    share = f"All {count:,} duplicates" if count == duplicates else f"{count:,} of {duplicates:,} duplicates"
    return (
        f"{share} share a caption only with pictures of the same {kind}: a template writes such captions, and they are no "
        "fault. Several captions per picture vary them; docs/data.md says how."
    )


def measured_elsewhere(folder: Path) -> str:
    """Return a sentence on the token counts that the full audit of caption_to_hub.py measured, or a sentence that says
    the audit was not run.
    """
    try:
        full_audit = read_json(folder / "audit.json")
        tokens, over = full_audit["tokens"], full_audit["checks"]["over_limit"]["count"]
        if tokens and over is not None:
            return (
                f"By caption_to_hub.py, over all splits: {int(over):,} captions are longer than the {int(tokens['limit'])} tokens "
                f"that the text encoder reads; {int(tokens['min'])} to {int(tokens['max'])} tokens, median {float(tokens['median']):g}."
            )
    except (UserError, OSError, KeyError, TypeError, ValueError):
        pass
    return "Tokens and colors are measured by scripts/caption_to_hub.py, which sees tokenizer and pictures."


def take_finding() -> None:
    """Remember the chosen row of the audit's table."""
    chosen = st.session_state["_audit"]["selection"]["rows"]
    names = list(FINDINGS)
    st.session_state["finding"] = names[chosen[0]] if chosen and chosen[0] < len(names) else ANY
    first_page()


def show_lengths(split: browse.Split) -> None:
    """Show the lengths of the captions, and the most frequent words in the captions."""
    st.subheader("Words of a caption")
    counts, frequent = browse.words(split)
    st.text(f"{counts.min()} to {counts.max()} words, median {np.median(counts):g}, mean {counts.mean():.1f}")
    width = max(1, -(-int(counts.max() + 1) // 30))
    bars = Counter((counts // width * width).tolist())
    frame = pd.DataFrame(sorted(bars.items()), columns=["from", "captions"])
    frame["to"] = frame["from"] + width
    st.altair_chart(bar_chart(frame, "words", "captions"))
    table = pd.DataFrame(
        [(browse.visible(word)[:100], count) for word, count in frequent], columns=["word", "captions that hold it"]
    )
    st.dataframe(table, hide_index=True, height=240)
    st.caption("Words such as “a” and “with” are not in this table.")


# --- Quarantine ------------------------------------------------------------------------------------------------------


def show_quarantine(folder: Path, runs: dict[str, Path]) -> None:
    """Show the images that captioning or training left out, and the reasons.

    No image file is deleted, so users can fix undecodable images.
    """
    st.subheader("Quarantine")
    lists = {"the data set": folder / "quarantine.jsonl"} | {run: at / "quarantine.jsonl" for run, at in runs.items()}
    rows = [{"left out by": name, **row} for name, file in lists.items() for row in browse.read_quarantine(file)]
    if not rows:
        st.text("No image of this data set was left out.")
        return
    frame = pd.DataFrame(rows)
    frame["kind"] = [reason.split(":")[0] for reason in frame["reason"]]
    left, right = st.columns([1, 2])
    distinct = frame.drop_duplicates(["split", "file", "kind"])
    kinds = distinct["kind"].value_counts().rename_axis("reason").reset_index(name="images")
    left.dataframe(kinds, hide_index=True)
    right.dataframe(frame[["file", "split", "reason", "left out by"]], hide_index=True)


main()
