"""Captions as text: cleaning, and an audit that says what a training on them would suffer from. Imports no torch.

The audit (`audit`) counts what can be counted without a second model: empty captions, captions that the text encoder
would cut, captions shared by different images, leftovers of the captioner, and captions that contradict the image's label
or its colors. The last two are conservative: they miss much, so that what they name is worth a look.
"""

import difflib
import math
import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t2i.errors import UserError

CLIP_LIMIT = 77  # tokens, with start and end; of a tokenizer that names no limit of its own
TOKENIZER_BATCH = 1000  # captions handed to the tokenizer at a time
NAME_WORDS = 8  # of a class's name; a longer label is a sentence
SHOWN_CHARACTERS = 160  # of a caption or file name among the audit's examples

# What the audit counts, in the order in which it is shown. Each is a share of all captions.
CHECKS = {
    "empty": "no words at all",
    "over_limit": "longer than the text encoder reads",
    "duplicates": "shared with a different image",
    "repetitions": "repeats the same words",
    "boilerplate": "opens with talk about the image",
    "special_tokens": "holds tokens or markup of a model",
    "label_contradictions": "names another class than the label",
    "color_contradictions": "names colors that the image does not show",
}


# --- Cleaning --------------------------------------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def clean_caption(text: str | None) -> str:
    """One line of text that every file format can hold: no control characters, lone surrogates or runs of whitespace.

    All other characters stay, those that join and direct letters too. None becomes "". Never raises; a second call
    changes nothing.
    """
    if text is None:
        return ""
    return " ".join(_SURROGATE.sub("", _CONTROL.sub(" ", str(text))).split())


# --- Openings that talk about the image ------------------------------------------------------------------------------

_IMAGE = r"(?:image|picture|photo|photograph|pic)s?"
_THE_IMAGE = rf"(?:the|this|these) (?:(?:given|above|provided|close-?up|macro|colou?r) )?{_IMAGE}"
_SHOWS = (
    r"(?:(?:clearly |also )?(?:shows?|depicts?|features?|displays?|presents?|portrays?|captures?|contains?|includes?|"
    r"represents?|illustrates?|showcases?|reveals?|highlights?)|consists? of|(?:appears?|seems?) to (?:show|depict|be)|"
    r"is (?:showing|depicting|featuring|displaying|capturing|focused on)|has(?= an? ))"
)
_SEE = r"(?:we|i|you|one) (?:can (?:clearly |also )?)?(?:see|observe|notice)(?: that)?(?: there (?:is|are))?"
_CENTER = r"in (?:the )?(?:cent(?:er|re)|middle|foreground|front)"
_VIEW = rf"(?:{_IMAGE}|close[- ]?up|view|shot|painting|drawing|illustration|snapshot)"

# The one table of rules. Each opening is (name, what is taken off the caption's beginning); a blank is any whitespace.
# Kept on purpose: "a photo of a rose", which CLIP knows from its own training, and "a close-up of a rose", which says
# how the rose is shown. Sentences after the first stay too: what they say of "the image" is mostly about its parts.
_OPENINGS = {
    "Caption:": r"(?:(?:sure|certainly|here)\b[^:.]{0,60}|(?:the )?(?:caption|description)(?: of the image)?):",
    "The image is taken …": rf"{_THE_IMAGE} (?:is|was) (?:taken|clicked|captured) (?:out|in)(?:doors?|side)\.",
    "The image shows …": rf"{_THE_IMAGE} {_SHOWS}(?: us)?",
    "The image is a …": rf"{_THE_IMAGE} (?:is|are)(?: of|(?= an? (?!bit\b|little\b|lot\b)))",
    "This is an image of …": rf"(?:this|that|it|here) is (?:an?|the) {_IMAGE} (?:of|showing|with)",
    "This is a … image of …": rf"(?:this|that|it|here) is(?= an? (?:[\w-]+ ){{0,4}}{_VIEW} (?:of|showing|with)\b)",
    "In the center of the image …": rf"{_CENTER} of {_THE_IMAGE},? (?:{_SEE}|there (?:is|are))",
    "In this image we can see …": rf"(?:in|on|within) {_THE_IMAGE},? (?:{_SEE}|there (?:is|are|exists?))",
    "In this image …": rf"in {_THE_IMAGE}(?:,|(?= an? ))",
    "We can see …": rf"(?:here,? )?{_SEE}",
    "The subject of the image is …": rf"the (?:main )?(?:subject|focus) of {_THE_IMAGE} (?:is|are)",
}
OPENINGS = {
    name: re.compile(r"\s*" + rule.replace(" ", r"\s+") + r"[\s,:;]+", re.IGNORECASE)
    for name, rule in _OPENINGS.items()
}


def boilerplate_opening(text: str) -> str | None:
    """The name of the rule of `OPENINGS` that takes something off the beginning of `text`; None where none does."""
    return next((name for name, pattern in OPENINGS.items() if _after(pattern, text)), None)


def strip_boilerplate(text: str) -> tuple[str, bool]:
    """`text` without openings that talk about the image ("The image shows a rose" -> "A rose"), and whether there were any.

    `OPENINGS` are the rules. A capital at the beginning is passed on to what stays. A caption that is nothing but an
    opening stays as it is, and a second call changes nothing.
    """
    rest, found = text, False
    while True:
        after = next((after for pattern in OPENINGS.values() if (after := _after(pattern, rest))), "")
        if not after:
            return rest, found
        rest = after[0].upper() + after[1:] if rest.lstrip()[0].isupper() else after
        found = True


def _after(pattern: re.Pattern[str], text: str) -> str:
    """What follows an opening; "" where it is not there or nothing with a word follows."""
    match = pattern.match(text)
    rest = text[match.end() :].strip() if match else ""
    return rest if _has_words(rest) else ""


def _has_words(text: str) -> bool:
    """Whether there is more than whitespace, punctuation and characters without a shape."""
    return any(unicodedata.category(letter)[0] not in "ZPC" for letter in text)


# --- What models leave behind ----------------------------------------------------------------------------------------

_SPECIAL = re.compile(
    r"</?[A-Za-z][A-Za-z0-9_]{0,40}/?>"  # <s>, </s>, <pad>, <loc_12>, <DETAILED_CAPTION>, <image>; HTML tags as well
    r"|<\|[^<>|\s]{1,40}\|>"  # <|endoftext|>
    r"|<0x[0-9A-Fa-f]{2}>"
    r"|\[(?:UNK|CLS|SEP|PAD|MASK|/?INST)\]"
)


def special_tokens(text: str) -> list[str]:
    """Tokens and markup of models that leaked into a caption, e.g. `</s>`, `<loc_12>`, `[UNK]`, in their order."""
    return _SPECIAL.findall(text)


# --- Repetitions -----------------------------------------------------------------------------------------------------

PHRASE_WORDS = 8  # of a phrase that is looked for
PHRASE_TIMES, WORD_TIMES = 3, 4  # in a row: "a hat on top of" three times, or "very" four times


def repeated_phrase(text: str) -> str | None:
    """The first phrase that a caption says over and over, in a row; None if there is none.

    Of a script without blanks, single characters count as words do, and six times in a row are needed.
    """
    words = re.findall(r"[^\W_]+", text.casefold())
    if found := _in_a_row(words, WORD_TIMES, PHRASE_TIMES):
        return " ".join(found)
    found = next((found for word in words if len(word) > PHRASE_WORDS and (found := _in_a_row(word, 6, 6))), None)
    return "".join(found) if found else None


def _in_a_row(words: Sequence[str], times: int, phrase_times: int) -> Sequence[str] | None:
    for size in range(1, PHRASE_WORDS + 1):
        needed, alike = size * ((times if size == 1 else phrase_times) - 1), 0
        for at in range(size, len(words)):
            alike = alike + 1 if words[at] == words[at - size] else 0
            if alike >= needed:
                return words[at - size + 1 : at + 1]
    return None


# --- Labels ----------------------------------------------------------------------------------------------------------

_FILLERS = {"of", "the", "a", "an", "s", "in"}  # "lily of the valley" names the class lily-valley


def class_namer(classes: Iterable[str]) -> Callable[[str], set[str]]:
    """A function that finds the classes that a text names as whole words, however they are written.

    Plurals, hyphens, underscores and blanks count as the same (`tigerlily`, "tiger lilies"), and a class within the name
    of another one that stands there does not count ("a desert rose" names `desert-rose`, not `rose`). Classes without a
    letter, or of more than eight words, name nothing.
    """
    known_names = [name for name in classes if any(map(str.isalpha, name)) and len(_words(name)) <= NAME_WORDS]
    known: dict[str, set[str]] = defaultdict(set)
    for name in known_names:
        for form in _forms("".join(_words(name))):
            known[form].add(name)
    heads = {form[:3] for form in known}  # a singular keeps the first three letters: most words need no further look
    longest = 1 + max((len(_words(name)) for name in known_names), default=0)  # "sun flower" is two words for sunflower

    def named(text: str) -> set[str]:
        words = _words(text)
        found: set[str] = set()
        covered = 0
        for start, word in enumerate(words):
            if len(word) >= 3 and word[:3] not in heads:
                continue
            for end in range(min(start + longest, len(words)), max(start, covered), -1):  # not within an earlier name
                forms = _forms("".join(words[start:end]))
                if names := set().union(*(known.get(form, ()) for form in forms)):
                    found |= names
                    covered = end
                    break
        return found

    return named


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", text.casefold().replace("'", "").replace("’", ""))
    return [word for word in words if word not in _FILLERS]


def _forms(word: str) -> set[str]:
    """A word and what may be its singular."""
    forms = {word}
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(ending) and len(word) >= len(ending) + 3:
            forms.add(word[: -len(ending)] + singular)
    return forms


def _contradicted(label: str, named: set[str]) -> set[str]:
    """The named classes that speak against `label`: none if it is named itself, or if they are a part of its name."""
    own = "".join(_words(label))
    return set() if label in named else {name for name in named if "".join(_words(name)) not in own}


# --- Colors ----------------------------------------------------------------------------------------------------------

LOOKED_AT = 64  # px; larger images are thinned out to this
MIN_SHARE = 0.015  # of the weighted pixels: a color with less does not show

# Named colors as boxes in HSV: hue in degrees (from, to; across 0 where from > to), saturation and value 0..1 (from, to).
# Neighbours overlap, since people draw the lines in different places and cameras shift them: a violet-blue bluebell is
# both blue and purple. What matters is that a color without any pixel is surely absent. Green, brown, grey and black are
# those of foliage, soil and shadow, which nearly every photo shows: no caption is held to them.
COLORS: dict[str, tuple[tuple[tuple[float, float], tuple[float, float], tuple[float, float]], ...]] = {
    "white": (((0, 360), (0.0, 0.25), (0.6, 1.0)),),
    "yellow": (((40, 70), (0.3, 1.0), (0.5, 1.0)),),
    "orange": (((8, 44), (0.5, 1.0), (0.5, 1.0)),),
    "red": (((340, 18), (0.5, 1.0), (0.25, 1.0)),),
    "pink": (((295, 20), (0.1, 0.7), (0.5, 1.0)), ((295, 345), (0.4, 1.0), (0.5, 1.0))),
    "purple": (((245, 335), (0.15, 1.0), (0.15, 1.0)), ((335, 350), (0.2, 1.0), (0.15, 0.75))),
    "blue": (((185, 268), (0.2, 1.0), (0.2, 1.0)),),
    "burgundy": (((320, 15), (0.3, 1.0), (0.12, 0.62)),),
    "green": (((65, 175), (0.15, 1.0), (0.12, 1.0)),),
    "brown": (((10, 45), (0.25, 1.0), (0.15, 0.62)),),
    "grey": (((0, 360), (0.0, 0.2), (0.2, 0.62)),),
    "black": (((0, 360), (0.0, 1.0), (0.0, 0.2)),),
}
# Words for the colors of flowers, each with the names that it may stand for.
COLOR_WORDS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("white", "yellow", "orange", "red", "pink", "purple", "blue", "burgundy")},
    "ivory": ("white", "yellow"), "cream": ("white", "yellow"), "whitish": ("white",),
    "golden": ("yellow", "orange"), "gold": ("yellow", "orange"), "yellowish": ("yellow", "orange", "white"),
    "apricot": ("orange", "yellow", "pink"), "peach": ("orange", "yellow", "pink"), "coral": ("orange", "red", "pink"),
    "salmon": ("orange", "red", "pink"), "scarlet": ("red", "orange"), "crimson": ("red", "burgundy", "pink"),
    "ruby": ("red", "burgundy", "pink"), "reddish": ("red", "burgundy", "pink", "orange"), "maroon": ("burgundy", "red"),
    "magenta": ("pink", "purple"), "fuchsia": ("pink", "purple"), "pinkish": ("pink", "red", "purple"),
    "mauve": ("purple", "pink"), "lilac": ("purple", "pink", "blue"), "lavender": ("purple", "pink", "blue"),
    "violet": ("purple", "blue"), "purplish": ("purple", "pink", "blue"), "indigo": ("purple", "blue"),
    "bluish": ("blue", "purple"), "navy": ("blue",), "azure": ("blue",),
}  # fmt: skip
# A color right before one of these, or said of one ("the sky is blue"), is not a petal's.
_NOT_PETALS = re.compile(
    r"(?:anther|backdrop|background|bee|beetle|branch|bug|building|bush|butterfly|butterflie|car|cent(?:er|re)|cloth|cloud"
    r"|core|dis[ck]|dress|eye|fence|field|foliage|foreground|frame|grass|ground|hand|house|insect|ladybug|lake|leaf|leave"
    r"|lettering|light|middle|moss|pistil|plate|pollen|pond|pot|rock|shirt|sign|sky|skie|soil|spider|stalk|stamen|stem"
    r"|stigma|stone|sun|sunset|surface|table|text|tree|vase|wall|water|watermark|window|wood)(?:e?s)?"
)
# Where the search for the noun behind a color ends.
_STOPS = re.compile(
    r"flowers?|petals?|bloss?oms?|blooms?|blooming|growing|in|on|at|with|of|against|under|from|by|for|to|near|that|which"
    r"|is|are|has|have|it|its|this|the|an?|\W"
)


def dominant_colors(pixels: np.ndarray) -> dict[str, float]:
    """The named colors of `pixels` (uint8 [H, W, 3], sRGB) with their shares 0..1, the largest first.

    `COLORS` gives each name's range. Pixels in the middle count for more, with a Gaussian weight (standard deviation a
    third of each side), since that is where flowers are photographed. Shares need not add up to 1: a pixel may bear two
    names or none.
    """
    step = max(1, math.ceil(max(pixels.shape[:2]) / LOOKED_AT))
    rgb = pixels[::step, ::step].astype(np.float32) / 255
    value = rgb.max(2)
    chroma = value - rgb.min(2)
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue, saturation = 60 * sector, chroma / np.where(value > 0, value, 1)
    rows, columns = (np.exp(-0.5 * np.square(np.linspace(-1.5, 1.5, side))) for side in hue.shape)
    weight = np.outer(rows, columns)
    weight /= weight.sum()
    shares = {}
    for name, boxes in COLORS.items():
        inside = np.zeros(hue.shape, bool)
        for (first, last), (dull, vivid), (dark, bright) in boxes:
            turn = (hue >= first) & (hue <= last) if first <= last else (hue >= first) | (hue <= last)
            inside |= turn & (saturation >= dull) & (saturation <= vivid) & (value >= dark) & (value <= bright)
        shares[name] = round(float(weight[inside].sum()), 4)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def flower_colors(caption: str) -> list[str]:
    """The color words of `COLOR_WORDS` that `caption` uses of flowers, each once: none of centers, leaves, skies, bees."""
    words = re.findall(r"[^\W\d_]+|[.,;:!?()]", caption.casefold())
    found = []
    for position, word in enumerate(words):
        if word in COLOR_WORDS and word not in found and not _not_of_petals(words, position):
            found.append(word)
    return found


def _not_of_petals(words: list[str], position: int) -> bool:
    """Whether the color at `position` belongs to something that is no petal: a noun soon after it, or "the sky is"."""
    for word in words[position + 1 : position + 6]:
        if _NOT_PETALS.fullmatch(word):
            return True
        if _STOPS.fullmatch(word):
            break
    before = words[max(0, position - 4) : position]
    link = next((at for at, word in enumerate(before) if word in ("is", "are")), 0)
    return link > 0 and bool(_NOT_PETALS.fullmatch(before[link - 1]))


def contradicted_colors(caption: str, shares: Mapping[str, float]) -> list[str]:
    """The flower colors of `caption` where the image shows none of them, else []; `shares` as `dominant_colors` gives them.

    Measured at 64 px: of 400 drawings no true caption is doubted, and 55% of those with another petal color are; of 640
    photos of species that have one color 0.8%, and 75% with another color. tests/test_captions.py holds this.
    """
    words = flower_colors(caption)
    shown = any(shares.get(name, 0.0) >= MIN_SHARE for word in words for name in COLOR_WORDS[word])
    return [] if shown else words


# --- The audit -------------------------------------------------------------------------------------------------------


def audit(
    captions: Sequence[str],
    image_ids: Sequence[str],
    *,
    files: Sequence[str] | None = None,
    labels: Sequence[str | None] | None = None,
    colors: Sequence[Mapping[str, float] | None] | None = None,
    raw: Sequence[str | None] | None = None,
    tokenizer: Any = None,
    examples: int = 3,
    of_labels: bool = False,
) -> dict[str, Any]:
    """What is wrong with captions, as plain data for JSON. Item i of every sequence belongs to the same image.

    Args:
        captions: as they are to be trained on.
        image_ids: hashes of the images: copies of an image may share a caption.
        files: names of the images, for the examples; None: the ids.
        labels: class names, None where an image has none; None: labels were not looked at.
        colors: of each image, as `dominant_colors` gives them; None likewise.
        raw: what the captioner said, None where that is the caption; for counting the openings that were stripped.
        tokenizer: of the text encoder, as transformers makes them; None: lengths were not measured.
        examples: this many at most of each kind.
        of_labels: the captions are made from the labels, so images of one label share theirs on purpose.

    Returns:
        `captions`: their number; `tokens`: `limit`, `min`, `median`, `mean`, `max`, `histogram` (tokens up to -> captions),
        or None; `stripped`: captions by opening that was taken off; `checks`: of each name in `CHECKS` a `count`, a `share`
        of all captions (both None where not measured), `kinds` (how often each token, opening …) and `examples` (`file`,
        `caption`, `note`).

    Raises:
        ValueError: sequences of different lengths.
    """
    files = image_ids if files is None else files
    for column in (image_ids, files, labels, colors, raw):
        if column is not None and len(column) != len(captions):
            raise ValueError(f"{len(column)} items beside {len(captions)} captions")
    lengths = None if tokenizer is None else _token_lengths(captions, tokenizer)
    limit = 0 if tokenizer is None else token_limit(tokenizer)
    checks: dict[str, Any] = {}

    def add(name: str, notes: Mapping[int, str] | None, kinds: Mapping[str, int] | None = None) -> None:
        """`notes`: what to say of each caption that is caught, by its number; None: not measured."""
        shown = [] if notes is None else list(notes.items())[:examples]
        checks[name] = {
            "count": None if notes is None else len(notes),
            "share": None if notes is None else len(notes) / max(1, len(captions)),
            "kinds": dict(Counter(kinds or {}).most_common(10)),
            "examples": [
                {"file": _short(files[i]), "caption": _short(captions[i]), "note": _short(note)} for i, note in shown
            ],
        }

    add("empty", {i: "" for i, text in enumerate(captions) if not _has_words(text)})
    too_long = lengths and {i: f"{length} tokens" for i, length in enumerate(lengths) if length > limit}
    add("over_limit", None if lengths is None else too_long or {})
    owners = [str(label) for label in labels] if of_labels and labels is not None else image_ids
    add("duplicates", *_duplicates(captions, owners))
    repeated = {i: phrase for i, text in enumerate(captions) if (phrase := repeated_phrase(text))}
    add("repetitions", {i: f"repeats {phrase!r}" for i, phrase in repeated.items()}, Counter(repeated.values()))
    openings = {i: name for i, text in enumerate(captions) if (name := boilerplate_opening(text))}
    add("boilerplate", openings, Counter(openings.values()))
    tokens = {i: found for i, text in enumerate(captions) if (found := special_tokens(text))}
    add(
        "special_tokens",
        {i: " ".join(found) for i, found in tokens.items()},
        Counter(t for f in tokens.values() for t in f),
    )
    add("label_contradictions", *_label_contradictions(captions, labels))
    add("color_contradictions", *_color_contradictions(captions, colors))
    said = {i: name for i, text in enumerate(raw or ()) if text and (name := boilerplate_opening(clean_caption(text)))}
    stripped = Counter(name for i, name in said.items() if openings.get(i) != name)
    return {
        "captions": len(captions),
        "tokens": _token_statistics(lengths, limit),
        "stripped": dict(stripped.most_common()),
        "checks": checks,
    }


def token_limit(tokenizer: Any) -> int:
    """Tokens that a text encoder reads of a caption, start and end included; 77 (CLIP's) where the tokenizer names none."""
    limit = int(tokenizer.model_max_length)
    return limit if limit < 1_000_000 else CLIP_LIMIT  # transformers writes 10**30 for "none"


def _token_lengths(captions: Sequence[str], tokenizer: Any) -> list[int]:
    lengths: list[int] = []
    for start in range(0, len(captions), TOKENIZER_BATCH):
        batch = list(captions[start : start + TOKENIZER_BATCH])
        lengths += map(len, tokenizer(batch, truncation=False, verbose=False)["input_ids"])
    return lengths


def _token_statistics(lengths: list[int] | None, limit: int) -> dict[str, Any] | None:
    if not lengths:
        return None
    width = max(1, -(-limit // 8))  # eight bars up to the limit
    bars = Counter(min(9, -(-length // width)) * width for length in lengths)
    return {
        "limit": limit,
        "min": min(lengths),
        "median": statistics.median(lengths),
        "mean": round(statistics.fmean(lengths), 2),
        "max": max(lengths),
        "histogram": {str(edge) if edge <= 8 * width else "more": bars[edge] for edge in sorted(bars)},
    }


def _duplicates(captions: Sequence[str], image_ids: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(captions):
        if _has_words(text):
            groups[text.casefold()].append(i)  # CLIP reads in lower case
    shared = [group for group in groups.values() if len({image_ids[i] for i in group}) > 1]
    shared.sort(key=len, reverse=True)
    notes = {group[0]: f"at {len(group)} images" for group in shared}  # first: one example a caption
    notes |= {i: "" for group in shared for i in group[1:]}
    return notes, {_short(captions[group[0]]): len(group) for group in shared}


def _label_contradictions(
    captions: Sequence[str], labels: Sequence[str | None] | None
) -> tuple[dict[int, str] | None, dict[str, int]]:
    if labels is None or not any(labels):
        return None, {}
    named = class_namer({label for label in labels if label})
    notes, kinds = {}, Counter[str]()
    for i, (text, label) in enumerate(zip(captions, labels, strict=True)):
        if label and (others := _contradicted(label, named(text))):
            notes[i] = f"names {', '.join(sorted(others))}; the label is {label}"
            kinds.update(f"{label} named {other}" for other in others)
    return notes, kinds


def _color_contradictions(
    captions: Sequence[str], colors: Sequence[Mapping[str, float] | None] | None
) -> tuple[dict[int, str] | None, dict[str, int]]:
    if colors is None:
        return None, {}
    notes, kinds = {}, Counter[str]()
    for i, (text, shares) in enumerate(zip(captions, colors, strict=True)):
        if shares and (words := contradicted_colors(text, shares)):
            shown = sorted(shares.items(), key=lambda item: -item[1])[:3]
            notes[i] = (
                f"names {', '.join(words)}; the image shows {', '.join(f'{name} {share:.0%}' for name, share in shown)}"
            )
            kinds.update(words)
    return notes, kinds


def _short(text: str) -> str:
    text = clean_caption(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


# --- Limits ----------------------------------------------------------------------------------------------------------


def parse_thresholds(entries: Iterable[str]) -> dict[str, float]:
    """Limits of the audit from `name=share`, name one of `CHECKS`, share 0..1; to be called before captioning starts.

    Raises UserError for an unknown name (naming the nearest), for a share that is no number from 0 to 1, and for a name
    that comes twice.
    """
    limits: dict[str, float] = {}
    for entry in entries:
        name, _, text = (part.strip() for part in entry.partition("="))
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.0)[0]
            raise UserError(f"--fail_on {entry!r}: the audit has no figure {name!r}; did you mean {near!r}?")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise UserError(
                f"--fail_on {entry!r}: write {name}=SHARE with a share of the captions from 0 to 1, e.g. {name}=0.05"
            )
        if name in limits:
            raise UserError(f"--fail_on gives {name} twice; keep one of them")
        limits[name] = share
    return limits


def check_thresholds(audit: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """Raise UserError with one sentence on every figure of the audit that is over its limit or was not measured.

    limits: as `parse_thresholds` returns them. A figure that equals its limit passes.
    """
    failed = []
    for name, limit in limits.items():
        check = audit["checks"].get(name, {"share": None})  # an audit of before has no figure of a newer check
        if check["share"] is None:
            failed.append(f"{name} was not measured, its limit is {limit:g}")
        elif check["share"] > limit:
            count = f"{check['count']:,} of {audit['captions']:,}"
            failed.append(f"{name} is {check['share']:.4g} ({count}), its limit is {limit:g}")
    if failed:
        raise UserError(f"the captions fail --fail_on: {'; '.join(failed)}; fix the captions, or change the limits")


# --- For the terminal ------------------------------------------------------------------------------------------------


def audit_lines(audit: Mapping[str, Any]) -> list[str]:
    """The audit as a short table for the terminal: a line a figure, with its share, what it means, and one example."""
    lines = [f"audit of {audit['captions']:,} captions"]
    tokens = audit["tokens"]
    if tokens is None:
        lines.append("  tokens: not measured (no tokenizer)")
    else:
        lines.append(
            "  tokens: {min} to {max}, median {median:g}, mean {mean:g}; the text encoder reads {limit}".format(
                **tokens
            )
        )
    if audit["stripped"]:
        openings = ", ".join(f"{count:,} {name}" for name, count in list(audit["stripped"].items())[:3])
        lines.append(f"  openings taken off: {openings}")
    width = max(map(len, CHECKS))
    for name, meaning in CHECKS.items():
        check = audit["checks"].get(name, {"share": None})
        if check["share"] is None:
            lines.append(f"  {name:{width}}  not measured")
            continue
        example = next(({**row} for row in check["examples"]), None)
        shown = f" — {example['file']}: {example['caption'][:60]!r}" if example else ""
        lines.append(f"  {name:{width}} {check['count']:8,} {check['share']:7.1%}  {meaning}{shown}")
    return lines
