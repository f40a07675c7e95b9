"""Summarize how a data set was understood, in one short table that is printed before any work begins."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from t2i.data.records import OTHER_SPLITS, Source
from t2i.files import read_json

_MISREAD = re.compile("[ÂÃ][\u0080-\u00bf]|â€|Ã[ƒ‚]|ï»¿")  # UTF-8 that was read as Windows-1252.
_JOINERS = "\u200c\u200d"  # Persian and emoji need these invisible characters, so they are allowed and shown.
_INVISIBLE = re.compile("[\0-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff]")
_NO_VALUE = re.compile(
    r"[<(\[]?(nan|none|null|nil|n/?a|undefined|unknown|todo|tbd|true|false)[>)\]]?[.:!]?"
    r"|#(n/a|(name|value|ref|null|num|div/0|error)[?!]?)",
    re.IGNORECASE,
)
_MESSAGE = re.compile(
    r"(\w*error|exception|failed)\s*:|traceback \(|http\w* error|(i'm|i am|we are)( \w+)? (sorry|unable)|sorry[,.]"
    r"|i (cannot|can't|can not)\b|as an ai\b",
    re.IGNORECASE,
)
_ESCAPE = re.compile(r"\\(u[0-9a-f]{4}|x[0-9a-f]{2}|[nrt\"'])", re.IGNORECASE)
_SETTINGS = re.compile(r"\bnegative prompt:|\bsteps: ?\d|\bcfg scale: ?\d", re.IGNORECASE)
# Kinds of odd captions, which are rarely meant as captions: name -> test of (caption, file). A caption counts for the
# first kind whose test is true.
ODD: dict[str, Callable[[str, str], Any]] = {
    "with replacement characters (U+FFFD)": lambda text, file: "\ufffd" in text,
    "with misread characters (such as Ã©)": lambda text, file: _MISREAD.search(text),
    "with braces or brackets around": lambda text, file: re.fullmatch(r"[\[{(].*[\]})]", text),
    "with markup or a template": lambda text, file: re.search(r"<\w+[^>]*>|\{\w*\}|\{\{", text),
    "with HTML entities (such as &amp;)": lambda text, file: re.search(r"&(#\d+|#x[0-9a-f]+|[a-z]+\d*);", text, re.IGNORECASE),
    "with written-out escapes (such as \\u00e9)": lambda text, file: _ESCAPE.search(text),
    "with web addresses": lambda text, file: re.search(r"\bhttps?://|\bwww\.\w", text, re.IGNORECASE),
    "with settings of a generator (such as Steps: 20)": lambda text, file: _SETTINGS.search(text),
    "of numbers only": lambda text, file: not re.search(r"[^\W\d_]", text) and re.search(r"\d", text),
    "of numbers mostly": lambda text, file: 2 * len(re.findall(r"(?<!\S)[-+.,]*\d[-+\d.,]*(?!\S)", text)) > len(text.split()),
    "that say no value (nan, none, null)": lambda text, file: _NO_VALUE.fullmatch(text),
    "that are messages of a program": lambda text, file: _MESSAGE.match(text.replace("’", "'")),
    "with control or invisible characters": lambda text, file: _INVISIBLE.search(text),
    "that are file names": lambda text, file: (
        text in (Path(file).name, Path(file).stem) or re.fullmatch(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|txt)", text)
    ),
    "without letters": lambda text, file: not re.search(r"[^\W\d_]", text),
}  # fmt: skip


def describe(splits: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Count the captions and classes of a data set.

    Args:
        splits: columns of each split: `{split: {"file": [...], "caption": [...], "label": [...] or absent}}`. If images
            have several captions, `captions` holds a list of all captions per image.

    Returns:
        `classes`: figures on the classes, or None if the data set has no labels. `captions`: number of all, empty and
        distinct captions, words of the longest one, the odd ones by kind, and `per_image`, the lowest, mean and highest
        number of captions per image. `examples`: three pairs (file, first caption).
    """
    classes: Counter[str] = Counter()
    distinct: set[str] = set()
    odd: dict[str, dict[str, Any]] = {}
    empty = longest = 0
    pairs = [
        (file, caption)
        for part in splits.values()
        for file, captions in zip(part["file"], _all_captions(part), strict=True)
        for caption in captions
    ]
    numbers = [len(captions) for part in splits.values() for captions in _all_captions(part)]
    for part in splits.values():
        classes.update(label for label in part.get("label") or () if label is not None)
    for file, caption in pairs:
        empty += not caption
        longest = max(longest, len(caption.split()))
        if caption not in distinct:
            distinct.add(caption)
            kind = next((kind for kind, test in ODD.items() if test(caption, file)), None) if caption else None
            if kind:
                entry = odd.setdefault(kind, {"count": 0, "first": [], "texts": []})
                entry["texts"].append(caption)
                if len(entry["first"]) < 2:
                    entry["first"].append(f"{file}: {_short(caption, 40)!r}")
    for entry in odd.values():
        texts = set(entry.pop("texts"))
        entry["count"] = sum(caption in texts for _, caption in pairs)
    coded = [name for name in classes if re.search(r"\d", name)]
    by_letters: dict[str, list[str]] = {}
    for name in classes:
        by_letters.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), []).append(name)
    ranked = classes.most_common()
    first: dict[str, list[Any]] = next(iter(splits.values()), {"file": [], "caption": []})
    shown = sorted({0, len(first["file"]) // 2, len(first["file"]) - 1}) if first["file"] else []
    return {
        "classes": {
            "count": len(ranked),
            "largest": ranked[0],
            "smallest": ranked[-1],
            "with_digits": (len(coded), *coded[:1]),
            "alike": [names for names in by_letters.values() if len(names) > 1],
        }
        if ranked
        else None,
        "captions": {
            "count": len(pairs),
            "empty": empty,
            "distinct": len(distinct - {""}),
            "longest": longest,
            "odd": odd,
            "per_image": (min(numbers), len(pairs) / len(numbers), max(numbers)) if numbers else None,
        },
        "examples": [(first["file"][row], first["caption"][row]) for row in shown],
    }


def _all_captions(part: dict[str, list[Any]]) -> list[list[str]]:
    return part.get("captions") or [[caption] for caption in part["caption"]]


def table(report: dict[str, Any]) -> str:
    """Return the lines of the summary table, from the report of a prepared data set (`t2i.data.preparing`)."""
    found = report["understood"]
    captions, classes = found["captions"], found["classes"]
    rows = [("data set", f"{report['dataset']} ({report.get('form', 'form unknown')})")]
    if report.get("revision"):
        rows.append(("revision", report["revision"]))
    rows.append(("images", _splits(report)))
    if classes:
        (large, most), (small, least) = classes["largest"], classes["smallest"]
        text = f"{classes['count']:,}, from {least:,} images ({small}) to {most:,} ({large})"
        if most == least:
            text = f"{classes['count']:,}, {most:,} images each ({large}{'' if small == large else f' … {small}'})"
        coded, *such = classes["with_digits"]
        digits = f"; numbers in the names of {coded:,}, such as {such[0]}" if coded else ""
        rows.append(("classes", text + digits))
        if alike := classes.get("alike"):  # Older reports do not have this figure.
            shown = [", ".join(map(_visible, names)) for names in alike[:3]]
            rows.append(("", _counted(len(alike), "names that differ only by capitals, spaces or accents", shown)))
    parts = [f"{count:,} {origin}" for origin, count in (report.get("captions_from") or {}).items() if count]
    rows.append(("captions", "; ".join([*parts, *report.get("caption_columns", ())]) or "none yet"))
    if report.get("captions_missing"):
        rows[-1] = ("captions", "none, and this training needs none")
    elif captions:
        text = f"{captions['distinct']:,} distinct, {captions['empty']:,} empty, longest {captions['longest']:,} words"
        rows.append(("", text))
        fewest, mean, most = captions.get("per_image") or (1, 1, 1)
        if most > 1:
            number = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,} ({mean:.1f} on average)"
            rows.append(("", f"{number} per image: each training step draws one of them"))
    if report.get("caption_prefix"):
        rows.append(("", f"each begins with {_short(report['caption_prefix'], 40)!r} (--caption_prefix)"))
    if lines := report.get("files_of_several_lines"):
        text = "1 caption file has" if lines == 1 else f"{lines:,} caption files have"
        rows.append(("", f"{text} several lines: each line is a caption"))
    if shared := report.get("shared_caption_files"):
        text = "1 caption file serves" if len(shared) == 1 else f"{len(shared):,} caption files each serve"
        more = "; …" if len(shared) > 1 else ""
        rows.append(("", f"{text} several images: {', '.join(shared[0][:4])}{more}"))
    odd = captions["odd"] if captions else {}
    rows += [("odd captions", _counted(entry["count"], kind, entry["first"])) for kind, entry in odd.items()]
    copies = {key: count for key, count in report.get("duplicates", {}).items() if count}
    if copies:
        rows.append(("copies", ", ".join(f"{count:,} {_COPIES.get(key, key)}" for key, count in copies.items())))
    bad = [f"{count:,} {reason}" for reason, count in report.get("quarantined_by_reason", {}).items()]
    if bad:
        rows.append(("bad images", ", ".join(bad)))
    left_out = report.get("left_out") or {}
    rows += [("left out", _counted(entry["count"], reason, entry["first"])) for reason, entry in left_out.items()]
    if report.get("not_used_because_of_max_train_samples"):
        rows.append(("", f"{report['not_used_because_of_max_train_samples']:,} by --max_train_samples"))
    rows += [("examples", f"{file} → {_short(caption, 70) or '(empty)'}") for file, caption in found["examples"]]
    lines, last = [], ""
    for name, text in rows:
        lines.append(f"  {'' if name == last else name:<14}{_one_line(text)}")
        last = name
    return "\n".join(["how the data set was understood:", *lines])


_COPIES = {
    "train": "within train",
    "validation": "within validation",
    "test": "within test",
    "validation_also_in_train": "of validation in train as well",
    "test_also_in_train": "of test in train as well",
}


def _splits(report: dict[str, Any]) -> str:
    counts = {name: part["images"] for name, part in report["splits"].items()}
    drawn = " (from train)" if str(report.get("validation_from", "")).startswith("train") else ""
    return ", ".join(
        f"{name} {count:,}{drawn if name == 'validation' else ''}" for name, count in counts.items() if count
    )


def _counted(count: int, what: str, first: Iterable[str]) -> str:
    shown = list(first)
    return f"{what}: {count:,} ({'; '.join(shown)}{'; …' if count > len(shown) else ''})"


def _visible(name: str) -> str:
    """Write out the combining accents of a name.

    Without this replacement, é as one character and é as two characters would look the same.
    """
    return "".join(f"\\u{ord(mark):04x}" if unicodedata.combining(mark) else mark for mark in name)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() or character in _JOINERS else "?" for character in text)


def read_report(folder: Path, source: Source) -> dict[str, Any]:
    """Return the report of a cache folder, with the files that the current listing of the data set leaves out.

    Files that the listing leaves out are not part of the cache's key, so they may have changed since.
    """
    report = read_json(folder / "report.json")
    if "understood" not in report:  # An older version prepared the images, and did not count captions.
        report["understood"] = describe_folder(
            folder, [name for name, part in report["splits"].items() if part["images"]]
        )
    other = {key: value for key, value in report.get("left_out", {}).items() if key == OTHER_SPLITS}
    left_out = {**source.notes.get("left_out", {}), **other}
    return {**report, **source.notes, "dataset": source.name, "left_out": left_out}


def describe_folder(folder: Path, splits: Iterable[str]) -> dict[str, Any]:
    columns = {}
    for name in splits:
        with pa.OSFile(str(folder / f"{name}.arrow")) as file:
            rows = pa.ipc.open_stream(file).read_all()
            kept = [key for key in ("file", "caption", "label") if key in rows.column_names]
            if "captions" in rows.column_names and pa.types.is_list(rows.schema.field("captions").type):
                kept.append("captions")  # a data set may have a column of this name with other content
            columns[name] = rows.select(kept).to_pydict()
    return describe(columns)
