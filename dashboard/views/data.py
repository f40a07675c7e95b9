"""The captioned pictures of a data set: search, the audit of its captions, and the pictures that were left out."""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
from helpers.charts import bar_chart
from helpers.components import data_address, gallery
from helpers.data_repairs import show_editor
from helpers.loss_jobs import measured_losses, show_measuring
from helpers.page_texts import MAKE_FLOWERS, escape, shorten, show_empty_state, warn
from helpers.page_url import asked, gone_names, name_choices, warn_of_gone
from helpers.run_files import read_settings
from helpers.run_list import OUTPUTS, find_runs
from helpers.tables import table_of_rows

from t2i.captions.auditing import CHECKS
from t2i.data import browse
from t2i.data.images import BadImage
from t2i.data.repairs import ID_DIGITS
from t2i.data.split_names import SPLIT_NAMES
from t2i.errors import UserError
from t2i.evaluation.image_losses import Losses, excess
from t2i.files import read_json
from t2i.runs import find_prepared

PICTURES = 24  # pictures on a page: 2, 3, 4 and 6 columns divide it
SIDE, LARGE = 320, 1024  # most pixels per side of a picture in the gallery, and of the chosen one
CAPTION_CHARACTERS = 300  # characters of a caption in the gallery; the chosen picture shows all of them
ANY = "any"
NEAR, OUT, EDITED = MARKS = ("near duplicates", "left out", "edited")
ORDER = "order of the data set"
SORT_HELP = "A model's loss sorts wrong captions to the front. “Wrong captions” beside the pictures measures it."
CLICK = "A click on a picture shows it larger, with all its captions."
FINDINGS = {name.replace("_", " "): name for name in CHECKS}  # as they are called on the page and in the URL


def main() -> None:
    st.title("Data")
    sets = find_data()
    if not sets:
        show_empty_state(
            "No data set in outputs/ yet. This draws one in a minute; scripts/caption_to_hub.py makes one of photos:",
            MAKE_FLOWERS,
        )
        return
    left, right = st.columns([3, 1])
    gone = gone_names("dataset", sets)
    name = next(iter(asked("dataset")), "" if gone else next(iter(sets)))
    found = sets.get(name)
    splits = found.splits() if found else {}
    if splits:
        name_choices({"dataset": name, "split": next(iter(splits))})
    options: dict[str, Any] = {"index": None, "required": True, "bind": "query-params", "on_change": first_page}
    left.selectbox("Data set", list(sets), key="dataset", **options)
    if found is None or not splits:
        warn_of_gone(gone or [name], f"{OUTPUTS}/", "choose another data set")
        return
    chosen = right.selectbox("Split", list(splits), key="split", **options)
    split = splits[chosen] if chosen in splits else next(iter(splits.values()))
    try:
        show_split(found, splits, split)
    except UserError as error:
        warn(error)
    show_quarantine(found.folder, found.runs)


@dataclass
class DataSet:
    """A data set that the page shows.

    Attributes:
        folder: the dataset folder, or the folder of a run's prepared images.
        home: the folder with the data set's repairs, or None for a data set of the Hub.
        prefix: the `--caption_prefix` of prepared captions.
        runs: the runs that read the data set, by name, the newest first.
    """

    folder: Path
    home: Path | None
    prefix: str = ""
    runs: dict[str, Path] = field(default_factory=dict)

    def splits(self) -> dict[str, browse.Split]:
        return browse.find_splits(self.folder, caption_columns(self.runs), self.home, self.prefix)


def find_data() -> dict[str, DataSet]:
    """Return the data sets by name.

    The page lists the dataset folders below outputs/ and the dataset folders that a run names. For a run on another
    source of images, the page lists the folder of the run's prepared images. The page opens only the listed folders,
    whatever a URL says.
    """
    inside = OUTPUTS.resolve()
    shards = [file for level in ("*", "*/data", "*/*", "*/*/data") for file in OUTPUTS.glob(f"{level}/*.parquet")]
    shards = [file for file in shards if file.resolve().is_relative_to(inside)]
    folders = sorted({file.parent.parent if is_part(file.parent) else file.parent for file in shards})
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    sets = {folder.relative_to(OUTPUTS).as_posix(): DataSet(folder, folder) for folder in folders}
    names = {found.folder.resolve(): name for name, found in sets.items()}
    for name, run in find_runs("any").items():
        settings = read_settings(run).get("data")
        if not isinstance(settings, dict) or not isinstance(settings.get("dataset"), str):
            continue
        source = settings["dataset"]
        folder = data_folder(source, settings, run)
        if folder is not None:
            is_itself = folder == Path(source)
            title = names.setdefault(folder.resolve(), source if is_itself else f"{source} ({name})")
            home = Path(source) if Path(source).is_dir() else None
            prefix = "" if is_itself else str(settings.get("caption_prefix") or "")
            sets.setdefault(title, DataSet(folder, home, prefix)).runs[name] = run
    return sets


def is_part(folder: Path) -> bool:
    """Return whether a folder with shards is only a part of a data set: `data`, or a split beside `train`."""
    is_split = folder.name in SPLIT_NAMES and folder.parent != OUTPUTS and (folder.parent / "train").is_dir()
    return folder.name == "data" or is_split


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


def show_split(found: DataSet, splits: dict[str, browse.Split], split: browse.Split) -> None:
    """Show the filters and the gallery of a split, and beside the gallery figures on the captions."""
    rows = browse.read_rows(split)
    if message := st.session_state.pop("_said", ""):
        st.toast(escape(message))
    measured = measured_losses(found.runs)
    left, right = st.columns([3, 2], gap="large")
    with left:
        choice = choose_pictures(splits, split, rows, measured)
        show_pictures(splits, split, choice)
    with right:  # after the pictures, which are there sooner
        if rows.has_captions:
            if split.captions:
                st.text(
                    f"A run reads these captions by --caption_column {' '.join(map(browse.visible, split.captions))}."
                )
            show_measuring(found.runs, found.home, measured)
            show_audit(browse.audit(split), len(rows), split)
            show_lengths(split)
        elif rows.labels:
            st.text("This data set has no captions: training writes them from the labels.")
        else:
            st.text(
                "No column is named caption or text. This page shows other columns once a run reads captions from them."
            )


Picture = tuple[str, int]  # name of a split, and a row of it


@dataclass
class Choice:
    """The pictures that match the filters.

    Attributes:
        pictures: the pictures in their order.
        notes: a remark on some pictures.
        groups: number of the group of each picture, if the pictures stand in groups. A group has a heading.
        headings: heading of each group by its number.
    """

    pictures: list[Picture]
    notes: dict[Picture, str] = field(default_factory=dict)
    groups: dict[Picture, int] = field(default_factory=dict)
    headings: list[str] = field(default_factory=list)


def choose_pictures(
    splits: dict[str, browse.Split], split: browse.Split, rows: browse.Rows, measured: dict[str, Losses]
) -> Choice:
    """Show the filters of the gallery, and return the pictures that match the filters."""
    options: dict[str, Any] = {"bind": "query-params", "on_change": first_page}
    one, two = st.columns([2, 1])
    query = one.text_input("Search in captions", key="search", placeholder='words, or "a phrase in quotes"', **options)
    orders = {ORDER: None} | {f"loss of {name}": losses for name, losses in measured.items()}
    order = two.selectbox("Sort by", list(orders), key="sort", help=SORT_HELP, **options)
    one, two, three = st.columns(3)
    findings = [ANY, *FINDINGS, *MARKS] if rows.has_captions else [ANY, NEAR, OUT]
    finding = one.selectbox("Finding", findings, key="finding", **options)
    kinds = browse.kinds_of(rows)
    column = (
        two.selectbox("Filter by", list(kinds), key="by", bind="query-params", on_change=no_values) if kinds else None
    )
    values = kinds[column] if column else []
    chosen = (
        three.multiselect("Values", sorted(set(values)), key="value", placeholder="any", **options) if column else []
    )
    texts = ["\n".join(captions) for captions in rows.captions]
    shown = browse.search(texts, query) if query.strip() else list(range(len(rows)))
    if chosen:
        shown = [row for row in shown if values[row] in chosen]
    matching = set(shown)
    if finding == NEAR:
        return near_duplicates(splits, split, matching)
    choice = Choice([(split.name, row) for row in shown])
    if finding in FINDINGS:
        notes = browse.audit(split)[FINDINGS[finding]] or {}
        choice = Choice([(split.name, row) for row in shown if row in notes])
        choice.notes = {(split.name, row): note for row, note in notes.items()}
        if finding == "duplicates":
            choice = in_groups(split, rows, matching, choice.notes)
    elif finding in (OUT, EDITED):
        marked = rows.left_out if finding == OUT else rows.edited
        choice = Choice([(split.name, row) for row in shown if row in marked])
    losses = orders.get(order)
    return by_loss(split, choice, losses) if losses else choice


def in_groups(split: browse.Split, rows: browse.Rows, matching: set[int], notes: dict[Picture, str]) -> Choice:
    """Return the duplicates in groups that share a caption."""
    choice = Choice([], notes)
    for number, group in enumerate(browse.duplicate_groups(split)):
        here = [(split.name, row) for row in group if row in matching]
        choice.pictures += here
        choice.groups |= dict.fromkeys(here, number)
        choice.headings.append(shorten(browse.visible(rows.captions[group[0]][0]), CAPTION_CHARACTERS))
    return choice


def near_duplicates(splits: dict[str, browse.Split], split: browse.Split, matching: set[int]) -> Choice:
    """Return the groups of nearly equal pictures, over all splits, that have a matching picture in the shown split."""
    progress = st.progress(0.0, "comparing the pictures")
    groups = browse.near_duplicates(
        list(splits.values()), lambda share: progress.progress(share, "comparing the pictures")
    )
    progress.empty()
    choice = Choice([])
    for group in groups:
        if not any(name == split.name and row in matching for name, row in group):
            continue
        counts = Counter(name for name, _ in group)
        shown = ", ".join(f"{count} in {browse.visible(name)}" for name, count in counts.items())
        choice.pictures += group
        choice.groups |= dict.fromkeys(group, len(choice.headings))
        choice.headings.append(f"{len(group)} pictures that are nearly the same: {shown}")
    return choice


def by_loss(split: browse.Split, choice: Choice, losses: Losses) -> Choice:
    """Return the pictures by how much their captions raise the loss, the highest first. Pictures without loss come last."""
    ids, _ = browse.identities(split.as_stored())
    found = {picture: losses[ids[picture[1]][:ID_DIGITS]] for picture in choice.pictures
             if ids[picture[1]][:ID_DIGITS] in losses}  # fmt: skip
    pictures = sorted(choice.pictures, key=lambda one: -excess(found[one]) if one in found else math.inf)
    notes = {
        one: f"the caption changes the loss by {excess(pair):+.1%} to {pair[0]:.3f}" for one, pair in found.items()
    }
    return Choice(
        pictures, {one: " · ".join(filter(None, [choice.notes.get(one), notes.get(one)])) for one in pictures}
    )


def no_values() -> None:
    st.session_state["value"] = []
    first_page()


def show_pictures(splits: dict[str, browse.Split], split: browse.Split, choice: Choice) -> None:
    """Show a page of the gallery, and the chosen picture in a dialog, which is in sight wherever the page is scrolled to."""
    rows, shown = browse.read_rows(split), choice.pictures
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
    if choice.groups and here:
        left.text(f"{len(set(choice.groups.values())):,} groups")
    marks = [("left out of training", rows.left_out), ("captions edited", rows.edited)]
    if text := ", ".join(f"{words}: {len(marked):,}" for words, marked in marks if marked):
        left.text(text)
    number = int(chosen) if chosen.isascii() and chosen.isdigit() and len(chosen) < 10 else -1
    if chosen and not 0 <= number < len(rows):
        st.text(f"there are pictures 0 to {len(rows) - 1:,}")
    if here:
        gallery({"pictures": cards(splits, split, choice, here)}, key="_gallery", on_chosen=take_chosen)
        st.session_state["_shown"] = here  # a click names the position on the page
    if 0 <= number < len(rows):
        note = choice.notes.get((split.name, number), "")
        st.dialog(f"Picture {number}", width="medium", on_dismiss=close_picture)(show_chosen)(split, number, note)


def cards(
    splits: dict[str, browse.Split], split: browse.Split, choice: Choice, here: list[Picture]
) -> list[dict[str, Any]]:
    """Return the data of the pictures of a page of the gallery."""
    sources: dict[Picture, str] = {}
    for name in dict.fromkeys(name for name, _ in here):
        of_split = tuple(row for one, row in here if one == name)
        addresses = thumbnails(splits[name].as_stored(), of_split)
        sources |= {(name, row): address for row, address in zip(of_split, addresses, strict=True)}
    found = []
    for before, picture in zip([None, *here], here, strict=False):
        name, row = picture
        rows = browse.read_rows(splits[name])
        marks = ["left out of training" * (row in rows.left_out), "caption edited" * (row in rows.edited)]
        marks = [f"in {name}" * (name != split.name), choice.notes.get(picture, ""), *marks]
        group = choice.groups.get(picture)
        is_first = group is not None and (before is None or choice.groups.get(before) != group)
        heading = choice.headings[group] if group is not None and is_first else ""
        found.append(card(rows, picture, sources[picture], " · ".join(filter(None, marks))) | {"heading": heading})
    return found


def card(rows: browse.Rows, picture: Picture, source: str, note: str) -> dict[str, Any]:
    """Return the data of a picture in the gallery.

    `source` is the picture's data address, or the reason why the picture cannot be shown.
    """
    split, row = picture
    there = source.startswith("data:")
    first, *others = rows.captions[row]
    short = shorten(browse.visible(first), CAPTION_CHARACTERS)
    more = f" (+{len(others)} more)" if others else ""
    label = browse.visible(rows.labels[row] or "") if rows.labels else ""
    empty = "(no caption)" if rows.has_captions else ""
    return {
        "row": row,
        "split": split,
        "source": source if there else "",
        "note": "" if there else source,
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


def take_chosen() -> None:
    """Remember the clicked picture. A picture of another split also chooses that split."""
    clicked = getattr(st.session_state.get("_gallery"), "chosen", None)
    if not isinstance(clicked, dict) or not isinstance(clicked.get("row"), int):
        return
    names = {name for name, row in st.session_state.get("_shown", ()) if row == clicked["row"]}
    if isinstance(clicked.get("split"), str) and clicked["split"] in names:
        st.session_state["split"] = clicked["split"]
    st.session_state["picture"] = str(clicked["row"])


def close_picture() -> None:
    st.session_state["picture"] = ""


def show_chosen(split: browse.Split, number: int, note: str) -> None:
    """Show a picture, all its captions, its other columns and its finding. Captions can be edited if that is allowed."""
    rows = browse.read_rows(split)
    left, right = st.columns(2)
    source = thumbnails(split.as_stored(), (number,), LARGE)[0]
    if source.startswith("data:"):
        alt = browse.visible(rows.captions[number][0])[:CAPTION_CHARACTERS] or f"picture {number}"
        left.image(source, alt=alt, width="stretch")  # small ones enlarged, as in the gallery
    else:
        left.text(source)
    with right:
        show_editor(split, rows, number)
    facts = {"label": rows.labels[number]} if rows.labels else {}
    facts |= {name: values[number] for name, values in rows.columns.items()}
    if note:
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
        rows.append({"finding": title, "pictures": count, "share": share, "what it means": CHECKS[name]})
    st.dataframe(
        pd.DataFrame(rows).astype({"pictures": "Int64"}),
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
    bars = sorted(Counter((counts // width * width).tolist()).items())
    rows = [{"from": start, "to": start + width, "captions": captions} for start, captions in bars]
    st.vega_lite_chart(bar_chart(table_of_rows(rows), "words", "captions"))
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
        st.text("No image of this data set is damaged.")
        return
    frame = pd.DataFrame(rows)
    frame["kind"] = [reason.split(":")[0] for reason in frame["reason"]]
    left, right = st.columns([1, 2])
    distinct = frame.drop_duplicates(["split", "file", "kind"])
    kinds = distinct["kind"].value_counts().rename_axis("reason").reset_index(name="images")
    left.dataframe(kinds, hide_index=True)
    right.dataframe(frame[["file", "split", "reason", "left out by"]], hide_index=True)


main()
