"""Clean captions, and audit them for faults that would harm a training. This module imports no torch.

The audit runs a set of checks (`CHECKS`) that need no second model. A *finding* is a caption that fails a check. The checks
for contradictions with the image's label or colors are conservative. They miss many contradictions, but few findings are wrong.
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

CLIP_LIMIT = 77  # tokens with start and end, for a tokenizer that names no limit
TOKENIZER_BATCH = 1000  # captions handed to the tokenizer at a time
NAME_WORDS = 8  # words of a class name at most; a longer label is a sentence
SHOWN_CHARACTERS = 160  # characters of a caption or file name in the audit's examples

# The checks, in the order in which they are shown, and what each of them finds in a caption.
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
    """Return a caption as one line of text that every file format can hold, or "" for None.

    Control characters and lone surrogates are removed, and runs of whitespace become one blank. All other characters stay,
    also those that join or direct letters. A second call changes nothing.
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

# The rules: name of an opening, and the pattern that is removed from the caption's beginning. A blank matches any whitespace.
# Two openings stay on purpose: CLIP knows "a photo of a rose" from its training, and "a close-up of a rose" says how the rose
# is shown. Later sentences stay too: what they say of "the image" is mostly about its parts.
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
    """Return the name of the rule of `OPENINGS` that matches the beginning of `text`; None if no rule does."""
    return next((name for name, pattern in OPENINGS.items() if _after(pattern, text)), None)


def strip_boilerplate(text: str) -> tuple[str, bool]:
    """Return `text` without openings that talk about the image, and whether it had one.

       "The image shows a rose" becomes "A rose". If the opening begins with a capital, so does the rest.
    A caption that is only an opening stays
       unchanged. A second call changes nothing. The rules are `OPENINGS`.
    """
    rest, stripped = text, False
    while True:
        after = next((after for pattern in OPENINGS.values() if (after := _after(pattern, rest))), "")
        if not after:
            return rest, stripped
        rest = after[0].upper() + after[1:] if rest.lstrip()[0].isupper() else after
        stripped = True


def _after(pattern: re.Pattern[str], text: str) -> str:
    """Return the text after an opening, or "" if the opening does not match or no word follows the opening."""
    match = pattern.match(text)
    rest = text[match.end() :].strip() if match else ""
    return rest if _has_words(rest) else ""


def _has_words(text: str) -> bool:
    """Return whether the text holds more than whitespace, punctuation and invisible characters."""
    return any(unicodedata.category(letter)[0] not in "ZPC" for letter in text)


# --- What models leave behind ----------------------------------------------------------------------------------------

_SPECIAL = re.compile(
    r"</?[A-Za-z][A-Za-z0-9_]{0,40}/?>"  # <s>, </s>, <pad>, <loc_12>, <DETAILED_CAPTION>, <image>; HTML tags as well
    r"|<\|[^<>|\s]{1,40}\|>"  # <|endoftext|>
    r"|<0x[0-9A-Fa-f]{2}>"
    r"|\[(?:UNK|CLS|SEP|PAD|MASK|/?INST)\]"
)


def special_tokens(text: str) -> list[str]:
    """Return the tokens and markup of models that leaked into a caption, in order, e.g. `</s>`, `<loc_12>`, `[UNK]`."""
    return _SPECIAL.findall(text)


# --- Repetitions -----------------------------------------------------------------------------------------------------

PHRASE_WORDS = 8  # words of a repeated phrase at most
PHRASE_TIMES, WORD_TIMES = 3, 4  # repetitions in a row: "a hat on top of" three times, or "very" four times


def repeated_phrase(text: str) -> str | None:
    """Return the first phrase that a caption repeats several times in a row; None if there is none.

    In scripts without blanks, characters take the place of words, and six repetitions in a row are needed.
    """
    words = re.findall(r"[^\W_]+", text.casefold())
    if phrase := _in_a_row(words, WORD_TIMES, PHRASE_TIMES):
        return " ".join(phrase)
    long_words = (word for word in words if len(word) > PHRASE_WORDS)
    return next(("".join(phrase) for word in long_words if (phrase := _in_a_row(word, 6, 6))), None)


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
    """Return a function that finds the classes that a text names.

    A class is found as whole words, in any spelling: plurals, hyphens, underscores and blanks make no difference, so
    "tiger lilies" names `tigerlily`. Within a longer name, a shorter one is not found: "a desert rose" names `desert-rose`
    but not `rose`. Classes without a letter, or of more than `NAME_WORDS` words, are never found.
    """
    names = [name for name in classes if any(map(str.isalpha, name)) and len(_words(name)) <= NAME_WORDS]
    by_form: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for form in _forms("".join(_words(name))):
            by_form[form].add(name)
    # A singular keeps the first three letters of its plural. With them, most words are ruled out at once.
    heads = {form[:3] for form in by_form}
    longest = 1 + max(
        (len(_words(name)) for name in names), default=0
    )  # one more, since "sun flower" names `sunflower`

    def named(text: str) -> set[str]:
        words = _words(text)
        named_classes: set[str] = set()
        covered = 0
        for start, word in enumerate(words):
            if len(word) >= 3 and word[:3] not in heads:
                continue
            for end in range(min(start + longest, len(words)), max(start, covered), -1):  # not within an earlier name
                forms = _forms("".join(words[start:end]))
                if matches := set().union(*(by_form.get(form, ()) for form in forms)):
                    named_classes |= matches
                    covered = end
                    break
        return named_classes

    return named


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", text.casefold().replace("'", "").replace("’", ""))
    return [word for word in words if word not in _FILLERS]


def _forms(word: str) -> set[str]:
    """Return a word and its possible singulars."""
    forms = {word}
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(ending) and len(word) >= len(ending) + 3:
            forms.add(word[: -len(ending)] + singular)
    return forms


def _contradicted(label: str, named: set[str]) -> set[str]:
    """Return the named classes that contradict `label`.

    There are none if `label` is named too. A class whose name is a part of the label's does not contradict it.
    """
    label_words = "".join(_words(label))
    return set() if label in named else {name for name in named if "".join(_words(name)) not in label_words}


# --- Colors ----------------------------------------------------------------------------------------------------------

COLOR_SIDE = 64  # px; of larger images only every n-th pixel is read
MIN_SHARE = 0.015  # of the weighted pixels; a color with a smaller share counts as absent

# Named colors as boxes in HSV: hue in degrees (from, to; across 0 if from > to), saturation and value 0..1 (from, to).
# Neighbours overlap, since people draw the lines in different places and cameras shift them: a violet-blue bluebell is
# both blue and purple. A color without any pixel is surely absent; nothing more is needed. Foliage, soil and shadow are
# green, brown, grey and black in nearly every photo, so captions are not checked for these.
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
# Words for the colors of flowers, each with the named colors that it can mean.
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
# Nouns that are not petals. A color right before one of them, or said of one ("the sky is blue"), is ignored.
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
    """Return the named colors of an image with their shares, the largest first.

    `COLORS` gives the range of each name. Pixels in the middle count more, since flowers are photographed there: a Gaussian
    weight has a standard deviation of a third of each side. A pixel may have two names or none, so shares need not add up
    to 1.

    Args:
        pixels: the image, uint8 [H, W, 3], sRGB.

    Returns:
        Share of the weighted pixels by name, 0..1.
    """
    step = max(1, math.ceil(max(pixels.shape[:2]) / COLOR_SIDE))
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
    """Return the color words by which `caption` describes flowers, each once. Colors of centers or leaves are ignored."""
    words = re.findall(r"[^\W\d_]+|[.,;:!?()]", caption.casefold())
    colors: list[str] = []
    for position, word in enumerate(words):
        if word in COLOR_WORDS and word not in colors and not _not_of_petals(words, position):
            colors.append(word)
    return colors


def _not_of_petals(words: list[str], position: int) -> bool:
    """Return whether the color at `position` describes no petal: a noun follows it, or "the sky is" stands before it."""
    for word in words[position + 1 : position + 6]:
        if _NOT_PETALS.fullmatch(word):
            return True
        if _STOPS.fullmatch(word):
            break
    before = words[max(0, position - 4) : position]
    link = next((at for at, word in enumerate(before) if word in ("is", "are")), 0)
    return link > 0 and bool(_NOT_PETALS.fullmatch(before[link - 1]))


def contradicted_colors(caption: str, shares: Mapping[str, float]) -> list[str]:
    """Return the flower colors that `caption` names, if the image shows none of them. Otherwise return [].

    On 400 drawings of 64 px, no true caption was reported, and 55% of captions with a wrong petal color were. On 640 photos
    of species with one color, 0.8% of true captions were reported, and 75% of wrong ones. tests/test_captions.py checks this.

    Args:
        caption: The caption to check.
        shares: Result of `dominant_colors` for its image.
    """
    words = flower_colors(caption)
    shown = any(shares.get(name, 0.0) >= MIN_SHARE for word in words for name in COLOR_WORDS[word])
    return [] if shown else words


# --- The audit -------------------------------------------------------------------------------------------------------


# Result of a check: a note on each finding by the caption's index, None if not measured; and how often each kind occurs.
_Result = tuple[dict[int, str] | None, Mapping[str, int]]


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
    """Run all checks on captions and return the findings as plain data for JSON.

    Item i of every sequence belongs to the same image.

    Args:
        captions: The captions, as a training will read them.
        image_ids: Hashes of the images. Copies of an image may share a caption.
        files: File names of the images, to show in the examples. With None, the examples show the image ids.
        labels: Class name of each image, or None for an image without a class. With None for all, skip the checks of labels.
        colors: Result of `dominant_colors` for each image. With None, skip the check of colors.
        raw: Text of each caption before cleaning, or None if cleaning changed nothing. Removed openings are counted by it.
        tokenizer: Tokenizer of the text encoder, from transformers. With None, skip the check of lengths.
        examples: Maximum number of examples per check.
        of_labels: Whether the captions come from the labels, so that images of one label share a caption on purpose.

    Returns:
        captions: Number of captions.
        tokens: `limit`, `min`, `median`, `mean`, `max` and `histogram` of tokens per caption, or None if not measured.
        stripped: Number of captions by the opening that was removed.
        checks: For each check the `count` of findings, the `share` of captions with findings, `kinds` and `examples`. `kinds`
            counts each token, opening, etc. An example has `file`, `caption` and `note`. Count and share are None if the
            check was not measured.

    Raises:
        ValueError: The sequences of the arguments differ in length.
    """
    files = image_ids if files is None else files
    for column in (image_ids, files, labels, colors, raw):
        if column is not None and len(column) != len(captions):
            raise ValueError(f"{len(column)} items beside {len(captions)} captions")
    lengths = None if tokenizer is None else _token_lengths(captions, tokenizer)
    limit = 0 if tokenizer is None else token_limit(tokenizer)
    owners = [str(label) for label in labels] if of_labels and labels is not None else image_ids
    openings = {i: name for i, text in enumerate(captions) if (name := boilerplate_opening(text))}
    results: dict[str, _Result] = {
        "empty": ({i: "" for i, text in enumerate(captions) if not _has_words(text)}, {}),
        "over_limit": (_over_limit(lengths, limit), {}),
        "duplicates": _duplicates(captions, owners),
        "repetitions": _repetitions(captions),
        "boilerplate": (openings, Counter(openings.values())),
        "special_tokens": _special_tokens(captions),
        "label_contradictions": _label_contradictions(captions, labels),
        "color_contradictions": _color_contradictions(captions, colors),
    }
    checks: dict[str, Any] = {}
    for check, (findings, kinds) in results.items():
        shown = list((findings or {}).items())[:examples]
        checks[check] = {
            "count": None if findings is None else len(findings),
            "share": None if findings is None else len(findings) / max(1, len(captions)),
            "kinds": dict(Counter(kinds).most_common(10)),
            "examples": [
                {"file": _short(files[i]), "caption": _short(captions[i]), "note": _short(note)} for i, note in shown
            ],
        }
    before = {
        i: name for i, text in enumerate(raw or ()) if text and (name := boilerplate_opening(clean_caption(text)))
    }
    stripped = Counter(name for i, name in before.items() if openings.get(i) != name)
    return {
        "captions": len(captions),
        "tokens": _token_statistics(lengths, limit),
        "stripped": dict(stripped.most_common()),
        "checks": checks,
    }


def token_limit(tokenizer: Any) -> int:
    """Return how many tokens a text encoder reads, with start and end; CLIP's 77 if the tokenizer names no limit."""
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


def _over_limit(lengths: list[int] | None, limit: int) -> dict[int, str] | None:
    if lengths is None:
        return None
    return {i: f"{length} tokens" for i, length in enumerate(lengths) if length > limit}


def _repetitions(captions: Sequence[str]) -> _Result:
    phrases = {i: phrase for i, text in enumerate(captions) if (phrase := repeated_phrase(text))}
    return {i: f"repeats {phrase!r}" for i, phrase in phrases.items()}, Counter(phrases.values())


def _special_tokens(captions: Sequence[str]) -> _Result:
    tokens = {i: leaked for i, text in enumerate(captions) if (leaked := special_tokens(text))}
    kinds = Counter(token for leaked in tokens.values() for token in leaked)
    return {i: " ".join(leaked) for i, leaked in tokens.items()}, kinds


def _duplicates(captions: Sequence[str], image_ids: Sequence[str]) -> _Result:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(captions):
        if _has_words(text):
            groups[text.casefold()].append(i)  # CLIP reads in lower case
    shared = [group for group in groups.values() if len({image_ids[i] for i in group}) > 1]
    shared.sort(key=len, reverse=True)
    notes = {group[0]: f"shared by {len(group)} images" for group in shared}  # these first: one example per caption
    notes |= {i: f"shared by {len(group)} images" for group in shared for i in group[1:]}
    return notes, {_short(captions[group[0]]): len(group) for group in shared}


def _label_contradictions(captions: Sequence[str], labels: Sequence[str | None] | None) -> _Result:
    if labels is None or not any(labels):
        return None, {}
    named = class_namer({label for label in labels if label})
    notes, kinds = {}, Counter[str]()
    for i, (text, label) in enumerate(zip(captions, labels, strict=True)):
        if label and (others := _contradicted(label, named(text))):
            notes[i] = f"names {', '.join(sorted(others))}; the label is {label}"
            kinds.update(f"{label} named {other}" for other in others)
    return notes, kinds


def _color_contradictions(captions: Sequence[str], colors: Sequence[Mapping[str, float] | None] | None) -> _Result:
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
    """Return the limits that `--fail_on` gives as `check=share`.

    Returns:
        The largest allowed share of findings by check, 0..1.

    Raises:
        UserError: A check is unknown (the message names the nearest one) or occurs twice, or a share is not from 0 to 1.
    """
    limits: dict[str, float] = {}
    for entry in entries:
        name, _, text = (part.strip() for part in entry.partition("="))
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.0)[0]
            raise UserError(f"--fail_on {entry!r}: the audit has no check {name!r}; did you mean {near!r}?")
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
    """Check the audit against the limits of `parse_thresholds`. A share that equals its limit passes.

    Raises:
        UserError: Some checks exceed their limits or were not measured. The message names these checks.
    """
    failed = []
    for name, limit in limits.items():
        check = audit["checks"].get(name, {"share": None})  # audit.json of an older version lacks newer checks
        if check["share"] is None:
            failed.append(f"{name} was not measured, its limit is {limit:g}")
        elif check["share"] > limit:
            count = f"{check['count']:,} of {audit['captions']:,}"
            failed.append(f"{name} is {check['share']:.4g} ({count}), its limit is {limit:g}")
    if failed:
        raise UserError(f"the captions fail --fail_on: {'; '.join(failed)}; fix the captions, or change the limits")


# --- For the terminal ------------------------------------------------------------------------------------------------


def audit_lines(audit: Mapping[str, Any]) -> list[str]:
    """Return the lines of a short table of the audit: per check the count, share, meaning and one example."""
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
        lines.append(f"  openings removed: {openings}")
    width = max(map(len, CHECKS))
    for name, meaning in CHECKS.items():
        check = audit["checks"].get(name, {"share": None})
        if check["share"] is None:
            lines.append(f"  {name:{width}}  not measured")
            continue
        example = next(iter(check["examples"]), None)
        shown = f" — {example['file']}: {example['caption'][:60]!r}" if example else ""
        lines.append(f"  {name:{width}} {check['count']:8,} {check['share']:7.1%}  {meaning}{shown}")
    return lines
