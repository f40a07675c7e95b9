"""Repair a data set in place: captions edited by hand, and images to leave out. No image and no original text is changed.

The repairs of a data set are two files in its folder. `left_out.jsonl` lists the images that no training reads, one per line.
`captions.jsonl` holds edited captions, as `t2i.captions.ledger` writes them: the field `replaces` of an edited line is the
caption that the line's `caption` replaces. `scripts/caption_to_hub.py` keeps these edits too.

Both files are applied to the prepared images of a data set, so every cache of images stays valid. This module imports
neither torch nor `datasets`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from t2i.captions import ledger
from t2i.captions.auditing import clean_caption
from t2i.captions.ledger import Key
from t2i.captions.texts import prefixed, unprefixed
from t2i.errors import UserError
from t2i.files import hash_json, write_text

LEFT_OUT, CAPTIONS = "left_out.jsonl", "captions.jsonl"
ID_DIGITS = 16  # Hex digits of an image's SHA-256 by which repairs find it: prepared images keep no more.
EDITED = "edited"  # `model` of a caption that only a person has written.


@dataclass
class Repairs:
    """The repairs of a data set.

    Attributes:
        left_out: the lines of `left_out.jsonl`: `image` (at least 16 hex digits of the image file's SHA-256), `split` and
            `file`.
        edits: edited lines of `captions.jsonl` by the first 16 digits of their image, in the order of the file.
    """

    left_out: list[dict[str, str]] = field(default_factory=list)
    edits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def left_out_hash(self) -> str:
        """Return a hash of the images that are left out; "" if there are none."""
        return hash_json(sorted([line[key] for key in _FIELDS] for line in self.left_out)) if self.left_out else ""

    def edits_hash(self) -> str:
        """Return a hash of the edited captions; "" if there are none."""
        edits = {image: [(line["replaces"], edited(line)) for line in lines] for image, lines in self.edits.items()}
        return hash_json(edits) if edits else ""

    def is_left_out(self, ids: Sequence[str], files: Sequence[str], split: str) -> np.ndarray:
        """Return which images of a split are left out, bool [N].

        A line of the list leaves out the copy that has its file name. If no copy has that name, it leaves out every
        copy of the image in the split.

        Args:
            ids: at least 16 hex digits of each image file's SHA-256.
            files: file name of each image.
            split: the data set's own split.
        """
        found = np.zeros(len(ids), bool)
        lines = [line for line in self.left_out if line["split"] == split]
        wanted = {line["image"][:ID_DIGITS] for line in lines}
        rows: dict[str, list[int]] = {}
        for row, image in enumerate(ids):
            if image[:ID_DIGITS] in wanted:
                rows.setdefault(image[:ID_DIGITS], []).append(row)
        for line in lines:
            copies = rows.get(line["image"][:ID_DIGITS], [])
            found[[row for row in copies if files[row] == line["file"]] or copies] = True
        return found

    def edited_captions(self, image: str, captions: list[str], prefix: str = "") -> list[str]:
        """Return the captions of an image after the edits: distinct ones, and an empty one only if there is no other.

        Args:
            image: at least 16 hex digits of the image file's SHA-256.
            captions: the captions of the image as the data set holds them, each with `prefix`.
            prefix: the training's `--caption_prefix`.
        """
        replaced = {
            prefixed(line["replaces"], prefix): prefixed(edited(line), prefix)
            for line in self.edits.get(image[:ID_DIGITS], ())
        }
        texts = list(dict.fromkeys(replaced.get(caption, caption) for caption in captions))
        return [text for text in texts if text] or texts[:1]


_FIELDS = ("image", "split", "file")


def edited(line: dict[str, Any]) -> str:
    """Return the caption of an edited line as a training reads it: with the prefix that the data set's captions have."""
    return prefixed(clean_caption(line["caption"]), str(line.get("prefix", "")))


def read_repairs(folder: Path | None) -> Repairs:
    """Return the repairs of a data set in a folder. None stands for a data set of the Hub, which has no repairs.

    Lines of `captions.jsonl` without `replaces` are no repairs, whatever they hold.

    Raises:
        UserError: a line of a list cannot be read. The message names file and line.
    """
    repairs = Repairs()
    if folder is None:
        return repairs
    for number, line in _lines(folder / LEFT_OUT):
        row = _parsed(line)
        if not row or not all(isinstance(row.get(key), str) for key in _FIELDS) or len(row["image"]) < ID_DIGITS:
            raise UserError(
                f'{folder / LEFT_OUT}, line {number} names no image; write {{"image": …, "split": …, "file": …}} with '
                f"at least {ID_DIGITS} digits of the image's SHA-256, or delete the line"
            )
        repairs.left_out.append({key: row[key] for key in _FIELDS})
    by_key: dict[Key, dict[str, Any]] = {}
    for number, line in _lines(folder / CAPTIONS):
        if '"replaces"' not in line:
            continue
        row = _parsed(line)
        if not row or not all(isinstance(row.get(key), str) for key in (*Key._fields, "caption", "replaces")):
            raise UserError(
                f"{folder / CAPTIONS}, line {number} is no edited caption; fix the line, or delete it and edit again"
            )
        by_key[Key(*(row[key] for key in Key._fields))] = row
    for key, row in by_key.items():
        if edited(row) != row["replaces"]:
            repairs.edits.setdefault(key.image[:ID_DIGITS], []).append(row)
    return repairs


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}); save it as UTF-8, or delete it") from None
    yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


# --- Writing ---------------------------------------------------------------------------------------------------------


def set_left_out(
    folder: Path, image: str, split: str, file: str, is_left_out: bool, others: Collection[str] = ()
) -> None:
    """Add an image to the list of a data set's folder, or take it off the list.

    A line whose file no copy of the image has leaves out every copy, so it goes with the line that is taken off.

    Args:
        folder: the data set's folder.
        image: hex digits of the image file's SHA-256, at least 16.
        split: the data set's own split.
        file: file name of the image.
        is_left_out: whether trainings leave the image out.
        others: file names of the image's other copies in the split.

    Raises:
        UserError: the list cannot be read or written.
    """
    line = {"image": image, "split": split, "file": file}
    try:
        with FileLock(folder / f".{LEFT_OUT}.lock"):
            rest = [
                row for row in read_repairs(folder).left_out
                if (row["image"][:ID_DIGITS], row["split"]) != (image[:ID_DIGITS], split)
                or (row["file"] != file and (is_left_out or row["file"] in others))
            ]  # fmt: skip
            rows = [*rest, line] if is_left_out else rest
            write_text(folder / LEFT_OUT, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise _not_writable(folder / LEFT_OUT, error) from None


@contextmanager
def editing(folder: Path) -> Iterator[None]:
    """Let no one else edit captions of a data set during the `with` block, so that captions read in it are the present ones.

    Raises:
        UserError: the data set's folder cannot be written.
    """
    try:
        with ledger.lock(folder / CAPTIONS):
            yield
    except OSError as error:
        raise _not_writable(folder / CAPTIONS, error) from None


def edit_captions(folder: Path, image: str, file: str, original: list[str], after: list[str], prefix: str = "") -> int:
    """Replace captions of an image, by lines at the end of `captions.jsonl`.

    A line that an earlier edit or `scripts/caption_to_hub.py` wrote for a caption keeps its key, so that script keeps the
    edit as well.

    Args:
        folder: the data set's folder.
        image: hex digits of the image file's SHA-256, at least 16.
        file: file name of the image.
        original: the captions that the data set holds, without edits.
        after: the new captions, in the order in which `Repairs.edited_captions` returns the present ones. Present
            captions without a successor are dropped.
        prefix: the prefix that `scripts/caption_to_hub.py` put before the data set's captions.

    Returns:
        The number of changed captions.

    Raises:
        UserError: no caption is left, there are more captions than before, or the file cannot be read or written.
    """
    path = folder / CAPTIONS
    try:
        repairs = read_repairs(folder)
        before = repairs.edited_captions(image, original)
        after = [text if text in before else clean_caption(text) for text in after]
        after = [text for text in after if text]
        if not after:
            raise UserError("an image needs a caption; write one, or leave the image out")
        if len(after) > len(before):
            raise UserError(
                f"the image has {len(before)} captions, so write at most {len(before)} lines, not {len(after)}"
            )
        padded = after + [""] * (len(before) - len(after))
        new = {old: text for old, text in zip(before, padded, strict=True) if old != text}
        rows = [row for key, row in ledger.read(path).items() if key.image[:ID_DIGITS] == image[:ID_DIGITS]]
        present = [(text, repairs.edited_captions(image, [text])[0]) for text in original]
        lines = [_edited_line(rows, image, file, text, new[old], prefix) for text, old in present if old in new]
        if lines:
            ledger.append(path, lines)
    except OSError as error:
        raise _not_writable(path, error) from None
    return len(new)


def _edited_line(
    rows: list[dict[str, Any]], image: str, file: str, original: str, new: str, prefix: str
) -> dict[str, Any]:
    words = clean_caption(prefix)
    line = next((row for row in rows if row.get("replaces") == original), None)
    line = line or next((row for row in rows if prefixed(clean_caption(row["caption"]), prefix) == original), None)
    if line is None:
        line = {**Key(image, EDITED, "", "", hash_json(original))._asdict(), "file": file, "made": hash_json(original)}
    own = unprefixed(new, words)  # The file holds captions without the prefix.
    return {**line, "replaces": original, "caption": own, **({"prefix": words} if words else {})}


def _not_writable(path: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return UserError(f"{path} cannot be written ({reason}); make its folder writable")
