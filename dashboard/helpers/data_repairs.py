"""Edit captions and mark images to leave out on the page Data, where that is allowed."""

import os
from pathlib import Path

import streamlit as st

from helpers.page_rights import has_control, is_space
from helpers.page_texts import escape
from t2i.captions.texts import clean, unprefixed
from t2i.config import read_yaml
from t2i.data import browse
from t2i.data.repairs import edit_captions, editing, set_left_out
from t2i.errors import UserError
from t2i.files import hash_json


def why_not(home: Path | None) -> str:
    """Return why a data set cannot be edited on this page, or "" if it can be."""
    if is_space():
        return "A Space shows data and never edits it."
    if not has_control():
        return (
            "Editing is off, because other machines may open this page. "
            "To edit, start the dashboard with --server.address 127.0.0.1."
        )
    if home is None:
        return (
            "This data set is on the Hub, so it cannot be edited here. To get an editable folder, run "
            "scripts/caption_to_hub.py with --captioner existing."
        )
    if not os.access(home, os.W_OK):
        return f"Editing is off, because {home} is read-only."
    return ""


def show_editor(split: browse.Split, rows: browse.Rows, number: int) -> None:
    """Show the captions of a picture as a text that can be edited, and a button that leaves the picture out.

    If the page may not edit the data set, show the captions and the reason.
    """
    reason = why_not(split.home)
    if reason or not rows.has_captions:
        for caption in rows.captions[number]:
            st.code(browse.visible(caption) or "(no caption)", language=None, wrap_lines=True)
        st.caption(escape(reason))
    else:
        texts = texts_of(rows, number)
        count = max(1, len(texts))
        key = f"captions {split.name} {number} {hash_json(texts)}"  # What was edited elsewhere replaces typed texts.
        with st.form(f"edit {split.name} {number}", border=False):
            st.text_area(
                "Caption" if count == 1 else f"Captions, one per line, at most {count}",
                "\n".join(texts), key=key, height="content",
            )  # fmt: skip
            st.form_submit_button("Save", type="primary", on_click=save, args=(split, number, key, texts))
        if number in rows.edited:
            original = browse.read_rows(split.as_stored()).captions[number]
            st.caption(escape(f"Before the edit: {' / '.join(map(browse.visible, original))}"))
    if not reason:
        is_out = number in rows.left_out
        label = "Train on this picture again" if is_out else "Leave out of training"
        st.button(label, on_click=leave_out, args=(split, rows, number, not is_out))
    if error := st.session_state.pop("_error", ""):
        st.warning(escape(error))
    if st.session_state.pop("_saved", False):
        st.rerun()  # the page behind the dialog shows the change


def texts_of(rows: browse.Rows, number: int) -> list[str]:
    """Return the captions of a picture as a training reads them, so that to save an unchanged text changes nothing."""
    return list(dict.fromkeys(filter(None, map(clean, rows.captions[number]))))


def save(split: browse.Split, number: int, key: str, shown: list[str]) -> None:
    """Write the typed captions of a picture into captions.jsonl, and close the dialog.

    Nothing is written if the picture has other captions than `shown`, because another session edited them.
    """
    if why_not(split.home):  # a button of a page that was opened before
        return
    stored, home = split.as_stored(), Path(str(split.home))
    try:
        ids, files = browse.identities(stored)
        with editing(home):
            present = browse.find_splits(split.folder, split.captions, home, split.prefix).get(split.name, split)
            rows = browse.read_rows(present)
            if number >= len(rows) or texts_of(rows, number) != shown:
                raise UserError(f"the captions of picture {number} were edited meanwhile; open the picture again")
            changed = edit_captions(
                home, require_id(ids[number]), files[number],
                [unprefixed(clean(text), split.prefix) for text in browse.read_rows(stored).captions[number]],
                [unprefixed(clean(line), split.prefix) for line in st.session_state[key].split("\n")], captioning_prefix(split),
            )  # fmt: skip
    except UserError as error:
        st.session_state["_error"] = str(error)
        return
    close(f"{changed} of the captions changed. Trainings read them from now on." if changed else "Nothing was changed.")


def leave_out(split: browse.Split, rows: browse.Rows, number: int, is_left_out: bool) -> None:
    """Write a picture into left_out.jsonl, or take it off that list, and close the dialog."""
    if why_not(split.home):
        return
    try:
        ids, files = browse.identities(split.as_stored())
        own, image = browse.own_splits(split, rows), require_id(ids[number])
        copies = [row for row, one in enumerate(ids) if (one, own[row]) == (image, own[number])]
        others = [files[row] for row in copies if row != number]
        set_left_out(Path(str(split.home)), image, own[number], files[number], is_left_out, others)
    except UserError as error:
        st.session_state["_error"] = str(error)
        return
    close(
        f"Trainings {'leave picture' if is_left_out else 'read picture'} {number}{' out' if is_left_out else ''} from now on."
    )


def require_id(image: str) -> str:
    if not image:
        raise UserError("this picture has no image file, so nothing can be noted on it; add the image to the data set")
    return image


def close(message: str) -> None:
    st.session_state["picture"] = ""
    st.session_state["_saved"] = True
    st.session_state["_said"] = message


def captioning_prefix(split: browse.Split) -> str:
    """Return the prefix that scripts/caption_to_hub.py put before the captions of a dataset folder; "" without one."""
    try:
        data = read_yaml(split.folder / "config.yaml").get("data")
        return str(data.get("caption_prefix") or "") if isinstance(data, dict) else ""
    except (OSError, UserError, AttributeError):
        return ""
