"""Write dataset cards: fill in datasets_card/dataset_card.md, and merge it with people's edits. This module imports no torch.

Generated text stands between markers, `<!-- t2i:audit begin … -->` to `<!-- t2i:audit end -->`. `merge_cards` renews
the blocks between markers and the YAML keys that describe the files. All other text of a card stays as a person wrote
it.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from PIL import Image, ImageDraw, ImageOps

from t2i.captions.auditing import CHECKS
from t2i.errors import UserError
from t2i.hub.markdown import escape_markdown, one_line
from t2i.hub.model_card import BEGIN, END, NOT_MEASURED
from t2i.pictures.png import lettered

TEMPLATE = Path(__file__).parents[3] / "datasets_card" / "dataset_card.md"
_BLOCK = re.compile(r"<!-- t2i:(\w+) begin\b[^>]*-->(?:(?!<!-- t2i:).)*<!-- t2i:\1 end -->", re.DOTALL)
FILE_KEYS = ("dataset_info", "configs")  # describe the files, one list entry per configuration; ours is "default"


def render_dataset_card(
    *,
    name: str,
    source: str,
    splits: Mapping[str, int],
    making: Mapping[str, Any],
    audit: Mapping[str, Any],
    quarantine: Sequence[Mapping[str, str]] = (),
    provenance: Mapping[str, Any] | None = None,
    grid: str | None = None,
    repo_id: str | None = None,
    license: str = "unknown",
    language: Sequence[str] = ("en",),
    source_datasets: Sequence[str] = ("original",),
    tags: Sequence[str] = (),
    several_captions: bool = False,
) -> str:
    """Return the text of a dataset card. `save_dataset_folder` adds the YAML keys that describe the files.

    Every text on the card may come from users, so each one is redacted, cut to 200 characters and escaped.

    Args:
        name: Name of the data set, used as title and `pretty_name`.
        source: Origin of the images, in words or as a Hub id.
        splits: Number of images by split, in order, without empty splits.
        making: Rows of the table on how the captions were made: captioner, model, revision, task, counts.
        audit: Result of the caption audit, from `t2i.captions.auditing.audit`.
        quarantine: Rows with the `reason` of each image that was left out of the data set.
        provenance: Rows of the card's table of hashes and revisions.
        grid: Path of a picture within the data set's folder, such as `images/grid.png`.
        repo_id: Repository of the data set on the Hub. With None, the card's loading example names the folder.
        license: The Hub's identifier of the data set's licence.
        language: Languages of the captions, as ISO 639-1 codes.
        source_datasets: Origin of the data set for the Hub: `original`, or `extended|ORG/NAME`.
        tags: Tags of the card in addition to `text-to-image` and `image-captions`.
        several_captions: Whether the column `caption` holds lists of captions.

    Raises:
        UserError: The template of the dataset card is missing.
    """
    if not TEMPLATE.is_file():
        raise UserError(
            f"{TEMPLATE.name} is missing; restore {TEMPLATE.parent.name}/{TEMPLATE.name} from the repository"
        )
    data = DatasetCardData(
        license=one_line(license) or "unknown",
        language=[one_line(code) for code in language],
        pretty_name=one_line(name) or "Captioned images",
        task_categories=["text-to-image"],
        size_categories=[size_category(sum(splits.values()))],
        source_datasets=[one_line(entry) for entry in source_datasets],
        annotations_creators=["machine-generated"],
        tags=list(dict.fromkeys(["text-to-image", "image-captions", *map(one_line, tags)])),
    )
    reasons = Counter(row.get("reason", "").split(":")[0] for row in quarantine)
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        begin=BEGIN.format,
        end=END.format,
        title=_text(name),
        count=f"{sum(splits.values()):,}",
        source=_text(source),
        grid=grid,
        making={_text(label): _text(value) for label, value in making.items()},
        splits={_text(split): f"{images:,}" for split, images in splits.items()},
        quarantine={_text(reason): f"{images:,}" for reason, images in reasons.most_common()},
        audit=[_audit_row(check, audit["checks"][check]) for check in CHECKS],
        lengths=_lengths(audit["tokens"]),
        stripped=", ".join(f"“{_text(opening)}” {count:,} ×" for opening, count in audit["stripped"].items()),
        examples=[
            [_text(check), _text(row["file"]), caption_text(row["caption"]), _text(row["note"] or CHECKS[check])]
            for check in CHECKS
            for row in audit["checks"][check]["examples"]
        ],
        several=several_captions,
        load=repo_id if repo_id and re.fullmatch(r"[\w./-]+", repo_id, re.ASCII) else "path/to/this/folder",
        first_split=re.sub(r"\W", "", next(iter(splits), "train")),
        provenance={_text(label): _text(value) for label, value in (provenance or {}).items()},
    )
    return str(card).rstrip("\n") + "\n"


def size_category(count: int) -> str:
    """Return the Hub's name for a data set of `count` rows, such as `1K<n<10K` for 1,000 to 9,999."""
    if count < 1000:
        return "n<1K"
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    power = len(str(count)) - 4  # powers of ten above a thousand
    return f"{names[power]}<n<{names[power + 1]}" if power + 1 < len(names) else "n>1T"


def caption_text(caption: str) -> str:
    """Return a caption for Markdown and its tables, shortened and escaped.

    Text that runs from right to left is isolated, so that the text around it keeps its order.
    """
    shown = escape_markdown(caption) or "(empty)"
    if any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in shown):
        return f"\u2068{shown}\u2069"  # first strong isolate … pop directional isolate
    return shown


def caption_grid(
    pixels: Sequence[np.ndarray], captions: Sequence[str], columns: int = 4, side: int = 128, lines: int = 4
) -> Image.Image:
    """Return one image with pictures in rows, each picture with its caption below.

    If no installed font has the letters of a caption, the caption's number in brackets replaces the caption.

    Args:
        pixels: The pictures, uint8 [H, W, 3] each. The middle square of each picture is shown.
        captions: The captions, one per picture.
        columns: Number of pictures per row.
        side: Width and height of a picture in px.
        lines: Maximum number of lines per caption.

    Raises:
        ValueError: `pixels` is empty.
    """
    if not len(pixels):
        raise ValueError("no pictures")
    gap = 4
    height = 12 * lines + 2
    rows = math.ceil(len(pixels) / columns)
    size = (min(columns, len(pixels)) * (side + gap) + gap, rows * (side + height + gap) + gap)
    grid = Image.new("RGB", size, "white")
    for number, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        x, y = gap + number % columns * (side + gap), gap + number // columns * (side + height + gap)
        grid.paste(ImageOps.fit(Image.fromarray(picture), (side, side), Image.Resampling.LANCZOS), (x, y))
        note = Image.new("RGB", (side, height), "white")  # drawn apart, so no line runs into the next caption
        words, font = lettered(one_line(caption), number + 1)
        text = _wrap(words, font, side, lines)
        ImageDraw.Draw(note).multiline_text((0, 2), text, fill="black", font=font, spacing=2)
        grid.paste(note, (x, y + side))
    return grid


def merge_cards(new: str, existing: str | None, renewed: Collection[str] = ("size_categories",)) -> str:
    """Return the card `existing`, which a person may have edited, with all generated parts renewed from the card `new`.

    Merging the result with `new` again changes nothing.

    The merged card takes from `new`:
    - the generated blocks between markers
    - the YAML keys that the argument `renewed` lists, and YAML keys that the card `existing` lacks
    - the entries of the configuration `default` in the YAML keys `configs` and `dataset_info`
    - the licence, if the card `existing` says `license: unknown`

    The merged card takes prose, other YAML keys, comments and other configurations from `existing`. A generated block
    that a person deleted from the card is not written again. If the card `existing` has no generated block, its body
    does not change. If the card `existing` has no body, as a stub that the Hub made, it gets the body of `new`.

    Raises:
        UserError: The YAML of the card `existing` is broken.
    """
    if existing is None or not existing.strip("\ufeff \t\r\n"):
        return new
    new_front, new_body = _split(new)
    front, body = _split(re.sub(r"\r\n?", "\n", existing.lstrip("\ufeff")))
    if body.strip():
        blocks = {match[1]: match[0] for match in _BLOCK.finditer(new_body)}
        body = _BLOCK.sub(lambda match: blocks.get(match[1], match[0]), body)
    else:
        body = new_body
    return f"---\n{_merge_front(new_front, front, renewed)}---\n{body}"


def without_keys(card: str, keys: Collection[str]) -> str:
    """Return a card without some keys of its front matter, and without the comments above these keys.

    Raises:
        UserError: The YAML of the card is broken.
    """
    front, body = _split(card)
    return f"---\n{''.join(text for key, text in _keys(front).items() if key not in keys)}---\n{body}"


# --- Parts of the card -----------------------------------------------------------------------------------------------


def _audit_row(check: str, result: Mapping[str, Any]) -> list[str]:
    if result["share"] is None:
        return [_text(CHECKS[check]), NOT_MEASURED, NOT_MEASURED, ""]
    kinds = ", ".join(f"{caption_text(kind)} ({count:,})" for kind, count in list(result["kinds"].items())[:3])
    return [_text(CHECKS[check]), f"{result['count']:,}", f"{result['share']:.1%}", kinds]


def _lengths(tokens: Mapping[str, Any] | None) -> str:
    if tokens is None:
        return f"Length in tokens: {NOT_MEASURED}."
    numbers = "{min} to {max}, median {median:g}, mean {mean:g}".format(**tokens)
    bars = ", ".join(f"{count:,} up to {edge}" for edge, count in tokens["histogram"].items() if edge != "more")
    return f"Length in tokens: {numbers}. The text encoder reads {tokens['limit']} tokens. Captions by length: {bars}."


def _text(value: Any) -> str:
    return escape_markdown(value) or "—"


def _wrap(text: str, font: Any, width: int, lines: int) -> str:
    """Break `text` into at most `lines` lines of `width` px. Words that are longer than a line are cut."""
    rows = [""]
    for word in text.split():
        while word:
            joined = f"{rows[-1]} {word}".strip()
            if font.getlength(joined) <= width:
                rows[-1], word = joined, ""
            elif rows[-1]:
                rows.append("")
            else:
                fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                rows[-1], word = word[:fits], word[fits:]
                rows.append("")
    rows = [row for row in rows if row]
    return "\n".join(rows if len(rows) <= lines else [*rows[: lines - 1], rows[lines - 1][:-1] + "…"])


# --- YAML front matter ----------------------------------------------------------------------------------------------
# Front matter is handled as text, one top-level key at a time. A parser would lose comments and turn `language: no` into
# `language: false`.


def _split(card: str) -> tuple[str, str]:
    """Return the front matter of a card, without its lines of dashes, and the body."""
    match = REGEX_YAML_BLOCK.search(card)
    if match:
        return match[2] + "\n", card[match.end() :]
    if empty := re.match(r"\s*---\n---[ \t]*(?:\n|$)", card):
        return "", card[empty.end() :]
    if re.match(r"\s*---[ \t]*\n", card):
        raise _broken("its front matter does not end with a line ---")
    return "", card


def _merge_front(new: str, existing: str, renewed: Collection[str]) -> str:
    ours, theirs = _keys(new), _keys(existing)
    merged = dict(theirs)
    for key, text in ours.items():
        if key not in theirs or key in renewed or (key == "license" and _value(theirs, key) == "unknown"):
            merged[key] = text
        elif key in FILE_KEYS:
            foreign = [entry for entry in _entries(theirs, key) if entry.get("config_name", "default") != "default"]
            default = [entry for entry in _entries(ours, key) if entry.get("config_name", "default") == "default"]
            if foreign:
                default = [{"config_name": "default", **entry} for entry in default]
                text = yaml_dump({key: [*default, *foreign]}, sort_keys=False)
            merged[key] = text
    return "".join(merged.values())


def _entries(keys: Mapping[str, str], key: str) -> list[dict[str, Any]]:
    """Return the configurations in a card's `configs` or `dataset_info`, which is a list of mappings or one mapping."""
    value = _value(keys, key)
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]


def _value(keys: Mapping[str, str], key: str) -> Any:
    return (yaml.safe_load(keys[key]) or {}).get(key)


def _keys(front: str) -> dict[str, str]:
    """Return the text of each top-level key of YAML, in order: the lines of the key and the comments above it."""
    try:
        node = yaml.compose(front, Loader=yaml.SafeLoader)
        value = yaml.safe_load(front)
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(front, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 2}" if where else ""
        raise _broken(f"{' '.join(str(getattr(error, 'problem', None) or error).split())[:200]}{line}") from None
    if not value:
        return {}
    if not isinstance(value, dict) or not isinstance(node, yaml.MappingNode):
        raise _broken("it is not a list of `key: value`")
    names = [str(key.value) for key, _ in node.value]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise _broken(f"the key {repeated[0]} occurs twice")
    if node.flow_style or aliases or any(key.start_mark.column for key, _ in node.value):
        # `{a: 1}`, indented keys, or aliases between keys cannot be cut into lines: write the YAML anew
        front = yaml.dump(value, Dumper=_PlainDumper, allow_unicode=True, sort_keys=False)
        node = yaml.compose(front, Loader=yaml.SafeLoader)
        assert isinstance(node, yaml.MappingNode)
    lines = front.splitlines(keepends=True)
    starts = []
    for key, _ in node.value:
        start = key.start_mark.line
        while start > 0 and lines[start - 1].startswith("#"):
            start -= 1
        starts.append(start)
    starts[0] = 0
    ends = [*starts[1:], len(lines)]
    return {name: "".join(lines[start:end]) for name, start, end in zip(names, starts, ends, strict=True)}


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _broken(reason: str) -> UserError:
    return UserError(
        f"the YAML front matter of README.md is broken ({reason}); fix it, or delete README.md to have it written again"
    )
