"""Read captions strictly from files beside images: metadata.jsonl, .csv or .parquet, and x.txt or x.caption for x.jpg.

A value that cannot be a caption is refused, and the error names file and line. A file must be UTF-8, or UTF-16 or UTF-32
with a byte order mark. Invalid bytes are refused and never replaced.
"""

import ast
import codecs
import csv
import io
import json
import math
import re
import tokenize
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2i.data.images import LFS_POINTER
from t2i.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")  # If an image has both files, the first one is read.
# TABLES and TEXTS are reasons for which files are left out.
TABLES = "tables that are not named metadata.csv or metadata.jsonl"
TEXTS = "text files without an image"
BYTE_ORDER_MARKS = (  # The mark of UTF-32 begins with the mark of UTF-16, so it stands first.
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
DELIMITERS = ",;\t|"
DELIMITER_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_NUMBER = r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?"  # It matches digits in one way only, so a long line takes no longer.
DETECTION_LABELS = re.compile(rf"\s*\d+(\s+{_NUMBER}){{4,}}\s*", re.IGNORECASE)  # YOLO: class, then box or polygon.
_OPEN_QUOTE = '{}, line {}: a quotation mark is not closed; close it, or write "" for a quotation mark inside a text'
_NEXT_ROW = r'\n"?[^{0}\n"]+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?)"?{0}'


def refuse_pointer(path: Path) -> None:
    """Raise `UserError` if the file is a Git LFS pointer, whose content has not been downloaded."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:  # The reader of the file reports this error.
        return
    if pointer:
        raise UserError(f"{path} is a Git LFS pointer without the file's content; run git lfs pull in its repository")


def read_text(path: Path) -> str:
    """Return the text of a file with its line ends unchanged.

    Raises:
        UserError: the file cannot be read, is a Git LFS pointer, or is not in UTF-8, UTF-16 or UTF-32. The message names
            the first line with invalid bytes.
    """
    refuse_pointer(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make the file readable, or remove it") from None
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise UserError(
            f"{path}, line {line} is not {name} (byte 0x{data[error.start]:02x}, as older Windows programs write it); "
            "save the file as UTF-8"
        ) from None
    if text.count("\0") > len(text) / 4:
        raise UserError(f"{path} is UTF-16 without a byte order mark; save the file as UTF-8")
    return text


def read_sidecar(path: Path) -> str | list[str]:
    """Return the caption in a file beside an image. If several lines are not empty, each line is a caption.

    Raises:
        UserError: the file cannot be read, or it holds detection labels (YOLO) instead of a caption.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and all(map(DETECTION_LABELS.fullmatch, lines)):
        line = text.split("\n").index(lines[0]) + 1
        raise UserError(
            f"{path}, line {line} holds detection labels ({lines[0].strip()[:40]!r}) instead of a caption; move such files "
            "to another folder"
        )
    return [line.strip() for line in lines] if len(lines) > 1 else text


def metadata_rows(path: Path, caption_columns: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a metadata file, each with its line number.

    Args:
        path: path of the metadata file (.jsonl, .csv or .parquet).
        caption_columns: names of the caption columns. Without names, use `caption`, and `text` for rows whose `caption`
            is empty.

    Returns:
        (line number from 1, row). The captions in a row are texts, lists of texts, or None.

    Raises:
        UserError: the file or a line cannot be read, or a caption is not text. The message names the line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        refuse_pointer(path)
        try:
            rows = list(enumerate(pq.read_table(path).to_pylist(), 1))
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} cannot be read ({' '.join(str(error).split())[:200]}); write the file again"
            ) from None
    else:
        text = read_text(path)
        names = ("file_name", "caption", "text", "label", *caption_columns)
        rows = list(_csv_rows(path, text, names) if suffix == ".csv" else _json_rows(path, text))
    for line, row in rows:
        row.pop("", None)  # pandas writes its index as a column without a name.
        for column in caption_columns or ["caption", "text"]:
            if column in row:
                where = f"{path}, line {line}: column {column!r}"
                value = _list_in_cell(row[column], where) if suffix == ".csv" else row[column]
                row[column] = _caption(value, where)
                texts = row[column] if isinstance(row[column], list) else [row[column]]
                if not caption_columns and any(text and text.strip() for text in texts):
                    break  # `text` is read only if `caption` is empty.
    return rows


def _csv_rows(path: Path, text: str, names: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    first, rest = [*re.split(r"\r\n|\r|\n", text, maxsplit=1), ""][:2]
    told = re.fullmatch(r"sep=(.)", first, re.IGNORECASE)  # Excel writes such a first line.
    skipped = 0
    if told:
        text, skipped = rest, 1
        first = re.split(r"\r\n|\r|\n", text, maxsplit=1)[0]
    cells = {mark: [cell.strip().strip('"').strip() for cell in first.split(mark)] for mark in DELIMITERS}
    delimiter = (
        told[1]
        if told
        else next((mark for mark in DELIMITERS if "file_name" in cells[mark]), max(DELIMITERS, key=first.count))
    )
    _refuse_backslashes(path, text, skipped, delimiter)
    # Spaces are part of a field, unless the header or a quotation mark shows that they only separate fields.
    raw = [cell.strip('"') for cell in first.split(delimiter)]
    spaced = any(name not in raw and name in cells.get(delimiter, ()) for name in names)
    reader: Any = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        spaced = spaced or any(cell.startswith(" ") and cell.lstrip()[:1] == '"' for row in reader for cell in row)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced)
        columns = [name.strip() if spaced or not name.strip() else name for name in reader.fieldnames or ()]
        named = len(columns)
        while columns and not columns[-1]:  # The header ends with commas. Text there comes from an unquoted caption.
            columns.pop()
        reader.fieldnames = columns
        twice = next((name for name in columns if name and columns.count(name) > 1), None)
        if twice:
            raise UserError(f"{path}, line 1 names the column {twice!r} twice; rename one of them")
        if columns and "file_name" not in columns:
            near = next((name for name in columns if re.search("file|image|path", name, re.IGNORECASE)), None)
            fix = f"rename {near!r} to file_name" if near else "name the column with the image files file_name"
            raise UserError(
                f"{path}, line {1 + skipped} has no column file_name (it has {', '.join(filter(None, columns))}); {fix}"
            )
        line = reader.line_num
        start = 1 + skipped
        for row in reader:
            start, line = line + 1 + skipped, reader.line_num
            more = row.pop(None, None)  # Fields beyond the columns of the header.
            if more and any(cell.strip() for cell in more):
                raise UserError(
                    f"{path}, line {start} has {len(columns) + len(more)} fields, but the header has {len(columns)}; "
                    f"put quotation marks around a text with a {DELIMITER_NAMES.get(delimiter, delimiter)}"
                    f"{', or name the last column' if named > len(columns) else ''}"
                )
            swallowed = _NEXT_ROW.format(re.escape(delimiter))
            if any(value and "\n" in value and re.search(swallowed, value, re.IGNORECASE) for value in row.values()):
                raise UserError(_OPEN_QUOTE.format(path, start))
            yield start, row
        _refuse_open_quote(path, text, start - skipped, skipped, delimiter, spaced)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + skipped} cannot be read ({error}); fix that line") from None


def _refuse_backslashes(path: Path, text: str, skipped: int, delimiter: str) -> None:
    """Raise `UserError` if quotation marks within texts are escaped by backslashes, which CSV readers keep as text.

    A backslash before a closing quotation mark, as in a path of Windows, is allowed.
    """
    found = re.search(rf'\\"(?!"|[^\S\r\n]*({re.escape(delimiter)}|[\r\n]|$))', text)
    if found:
        line = len(re.findall(r"\r\n|\r|\n", text[: found.start()])) + 1 + skipped
        raise UserError(
            f'{path}, line {line} has a backslash before a quotation mark (\\"); write a quotation mark within a text twice, as ""'
        )


def _refuse_open_quote(path: Path, text: str, start: int, skipped: int, delimiter: str, spaced: bool) -> None:
    """Raise `UserError` if the last row ends inside quotation marks. The last row begins at line `start` of `text`."""
    last = islice(io.StringIO(text, newline=""), start - 1, None)
    try:
        list(csv.reader(last, delimiter=delimiter, skipinitialspace=spaced, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(_OPEN_QUOTE.format(path, start + skipped)) from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text, newline=""), 1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line.strip())
        except (ValueError, RecursionError) as error:
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                f"{path}, line {number} cannot be read ({what}); write one complete JSON object per line"
            ) from None
        if not isinstance(parsed, dict):
            raise UserError(
                f'{path}, line {number} is not a JSON object; write {{"file_name": …, "caption": …}} per line'
            )
        yield number, parsed


def _list_in_cell(cell: Any, where: str) -> Any:
    """Return the list of captions that a cell of a CSV file holds, written by JSON, Python, numpy or pandas; else the cell.

    A list of numbers alone, such as [1980], is a text.

    Raises:
        UserError: the cell begins like a list of texts, but cannot be read. `where` begins the message.
    """
    text = cell.strip() if isinstance(cell, str) else ""
    if not (text.startswith("[") and text.endswith("]")):
        return cell
    found = None
    for read in (json.loads, _python_list):
        try:
            found = read(text)
            break
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
    if isinstance(found, list):
        numbers = bool(found) and all(isinstance(item, (int, float)) and item == item for item in found)
        return cell if numbers else found
    if text[1:].lstrip()[:1] in ("'", '"'):
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise UserError(
            f'{where} begins like a list of texts, but cannot be read ({shown}); write the list as JSON: ["a rose", "a red rose"]'
        )
    return cell


def whole_number(cell: Any) -> Any:
    """Return a label such as `1.0` as `1`, and any other value of a CSV file unchanged. pandas writes numbers so."""
    found = re.fullmatch(r"\s*(\d+)[.,]0*\s*", cell) if isinstance(cell, str) else None
    return found[1] if found else cell


def _python_list(text: str) -> Any:
    """Return the value of a list as Python or numpy writes it. `nan` becomes None.

    numpy writes no commas between texts. Python would join such texts into one.

    Raises:
        ValueError: the text is no literal, is shortened by numpy, or has commas only between some of its texts.
        SyntaxError: the text is no literal. tokenize.TokenError: a quotation mark or a bracket is not closed.
    """
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    values = (tokenize.STRING, tokenize.NAME)
    touching = {
        place
        for place, (left, right) in enumerate(pairwise(tokens), 1)
        if left.type in values and right.type in values and tokenize.STRING in (left.type, right.type)
    }
    words = ["None" if token.string == "nan" else token.string for token in tokens]
    if "..." in words or (touching and "," in words):
        raise ValueError("no complete list")
    return ast.literal_eval("".join("," * (place in touching) + word + " " for place, word in enumerate(words)))


def check_list(captions: list[Any], where: str) -> None:
    """Raise `UserError` for a list of captions that is empty or holds None. `where` begins the message."""
    if not captions:
        raise UserError(f'{where} holds an empty list; write "" for an image without a caption, or add its captions')
    if any(text is None or text != text for text in captions):  # NaN differs from itself
        raise UserError(f"{where} holds a list with an empty entry (null); remove the entry, or write its text")


def _caption(value: Any, where: str) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        check_list(value, where)
        return [_caption(item, where) for item in value]
    kinds = {dict: "an object", list: "a list of lists", bool: "a truth value"}
    shown = str(value) if len(str(value)) <= 40 else str(value)[:37] + "..."
    raise UserError(
        f"{where} holds {kinds.get(type(value), 'a number')} ({shown}) instead of a caption; write a text, or a list of texts"
    )
