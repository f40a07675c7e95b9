"""Captions: cleaning, openings, and an audit that finds planted faults and little else."""

import json
import math
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import SCRIPTS, photos
from t2i.captions import auditing
from t2i.captions.auditing import (
    CHECKS,
    audit,
    audit_lines,
    boilerplate_opening,
    check_thresholds,
    class_namer,
    clean_caption,
    contradicted_colors,
    dominant_colors,
    flower_colors,
    parse_thresholds,
    special_tokens,
    strip_boilerplate,
)
from t2i.data import flowers
from t2i.errors import UserError

ANY_TEXT = st.text(st.characters(), max_size=60)  # every code point, surrogates and controls included
RTL = "ורד אדום 🌹 گل‌های سرخ"  # with the joiner that Persian plurals need
PALETTE = flowers.ATTRIBUTES["petal_color"]
FLAT = {
    "white": (250, 250, 250),
    "yellow": (250, 220, 30),
    "orange": (250, 130, 20),
    "red": (220, 20, 25),
    "pink": (250, 150, 190),
    "purple": (130, 40, 190),
    "blue": (40, 70, 220),
    "burgundy": (100, 10, 30),
    "green": (60, 120, 40),
    "brown": (90, 60, 30),
    "grey": (110, 110, 110),
    "black": (9, 9, 9),
}
SURE_COLORS = {  # species of the real photos that come in one color
    **dict.fromkeys(("buttercup", "colts-foot", "dandelion", "sunflower"), "yellow"),
    **dict.fromkeys(("daisy", "lily-valley", "windflower"), "white"),
}


# --- Cleaning --------------------------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_a_clean_caption_is_one_line_that_any_file_holds(text):
    clean = clean_caption(text)
    assert clean == clean_caption(clean) == " ".join(clean.split())
    assert {unicodedata.category(letter) for letter in clean}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    assert clean.encode("utf-8").decode("utf-8") == clean
    letters = [letter for letter in text if unicodedata.category(letter)[0] in "LNPSM"]
    assert [letter for letter in clean if unicodedata.category(letter)[0] in "LNPSM"] == letters


def test_what_cleaning_keeps_and_drops():
    assert clean_caption(RTL) == RTL
    assert clean_caption(" a\x00red\n\trose \x1b[31m\ud800 ") == "a red rose [31m"
    assert clean_caption(None) == ""


# --- Openings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        # as Florence-2 writes them: <DETAILED_CAPTION>, then <MORE_DETAILED_CAPTION>
        ("The image shows a pink rose with green leaves.", "A pink rose with green leaves."),
        ("The image shows an orange lily in a garden.", "An orange lily in a garden."),
        (
            "In this image we can see a flower. In the background it is blurred.",
            "A flower. In the background it is blurred.",
        ),
        ("In this image, I can see a flower and a bee.", "A flower and a bee."),
        ("In this picture we can see few flowers.", "Few flowers."),
        ("In the image there is a pink flower.", "A pink flower."),
        ("In the center of the image there is a sunflower.", "A sunflower."),
        ("In the foreground of this image, there are white daisies.", "White daisies."),
        ("This is an image of a daisy.", "A daisy."),
        ("This is a macro photography image of a flower.", "A macro photography image of a flower."),
        ("This is a close-up of a poppy.", "A close-up of a poppy."),
        ("This image is taken outdoors. In this image, a bee is on a flower.", "A bee is on a flower."),
        ("The image is a close-up of a pink flower.", "A close-up of a pink flower."),
        ("The image appears to be a photograph of a lotus.", "A photograph of a lotus."),
        # other captioners
        ("This picture features two lilies.", "Two lilies."),
        ("the photo depicts the rose", "the rose"),
        ("Sure, here is a caption: The image captures a tulip.", "A tulip."),
        ("We can see that there are tulips.", "Tulips."),
        ("The main subject of the image is a dahlia.", "A dahlia."),
    ],
)
def test_openings_about_the_image_are_stripped(text, stripped):
    assert strip_boilerplate(text) == (stripped, True)
    assert boilerplate_opening(text)
    assert boilerplate_opening(stripped) is None


@pytest.mark.parametrize(
    "text",
    [
        *("a photo of a rose", "A close-up of a rose.", "There is a rose.", "This is a rose.", "The image is blurry."),
        *(
            "The image is a bit dark.",
            "A rose. The image shows it from above.",
            "Imagery of roses",
            "",
            "The image shows",
        ),
        *("The image shows …", "In this image we can see", RTL),
    ],
)
def test_other_captions_stay(text):
    assert strip_boilerplate(text) == (text, False)
    assert boilerplate_opening(text) is None


OPENING = st.sampled_from(
    ["The image shows ", "in this image, we can see ", "This is an image of ", "This image is a ", "İn the picture, "]
)


@settings(max_examples=200)
@given(st.lists(OPENING, max_size=3).map("".join), ANY_TEXT)
def test_stripping_is_idempotent_and_never_empties(opening, rest):
    text = clean_caption(opening + rest)
    stripped, found = strip_boilerplate(text)
    assert strip_boilerplate(stripped) == (stripped, False)
    assert bool(stripped) == bool(text)
    assert found or stripped == text
    assert clean_caption(stripped) == stripped


# --- Tokens and labels -----------------------------------------------------------------------------------------------


def test_leaked_tokens_are_found():
    text = "</s><s>a rose<loc_12><loc_999> <DETAILED_CAPTION><pad> [UNK]<|endoftext|> 3 < 4 > 2 [sic] <3 <not a tag>"
    assert special_tokens(text) == [
        *("</s>", "<s>", "<loc_12>", "<loc_999>", "<DETAILED_CAPTION>", "<pad>", "[UNK]", "<|endoftext|>")
    ]


CLASSES = [
    "rose",
    "desert-rose",
    "tigerlily",
    "lily-valley",
    "colts-foot",
    "daisy",
    "iris",
    "bird_of_paradise",
    "7",
    "tulips",
]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Roses are red.", {"rose"}),
        ("a desert rose", {"desert-rose"}),
        ("a rose beside a desert rose", {"rose", "desert-rose"}),
        ("orange tiger lilies", {"tigerlily"}),
        ("lily of the valley", {"lily-valley"}),
        ("a colt's foot, or coltsfoot", {"colts-foot"}),
        ("DAISIES and irises", {"daisy", "iris"}),
        ("birds of paradise", set()),
        ("a bird of paradise", {"bird_of_paradise"}),
        ("7 primroses", set()),
        ("a tulip", {"tulips"}),
        ("it arose; prose", set()),
        ("", set()),
    ],
)
def test_classes_are_named_by_whole_words(text, named):
    assert class_namer(CLASSES)(text) == named


@pytest.mark.parametrize(
    ("text", "label", "contradicts"),
    [
        ("a tulip", "rose", True),
        ("a rose and a tulip", "rose", False),
        ("a pink rose", "desert-rose", False),  # a part of its name
        ("a desert rose", "rose", True),
        ("a red flower", "rose", False),
        ("a tulip", None, False),
        ("Tulips", "tulips", False),
    ],
)
def test_contradictions_with_the_label(text, label, contradicts):
    texts, labels = [text, *[""] * len(CLASSES)], [label, *CLASSES]
    result = audit(texts, [str(i) for i in range(len(texts))], labels=labels)
    assert result["checks"]["label_contradictions"]["count"] == contradicts


# --- Colors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "colors"),
    [
        ("a single red flower with a golden center, in a meadow", ["red"]),
        ("A purple and white flower", ["purple", "white"]),
        ("a daisy with a yellow and brown center", []),
        ("a yellow sunflower against a bright blue sky", ["yellow"]),
        ("The sky is a clear blue. The petals are pink.", ["pink"]),
        ("white petals, green leaves, an orange butterfly", ["white"]),
        ("a flower that is yellow in color", ["yellow"]),
        ("a red-orange lily", ["red", "orange"]),
        ("a hundred bluebells", []),
        (RTL, []),
    ],
)
def test_colors_of_petals_are_told_from_those_around(text, colors):
    assert flower_colors(text) == colors


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (300, 40), (500, 700)])
def test_flat_colors_have_their_names(size):
    for name, color in FLAT.items():
        shares = dominant_colors(np.full((*size, 3), color, np.uint8))
        assert shares[name] == 1.0, (name, shares)
        assert set(shares) == set(auditing.COLORS)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert "green" not in [name for names in auditing.COLOR_WORDS.values() for name in names]


def test_colors_are_looked_up_quickly():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    seconds = []
    for _ in range(30):
        start = time.thread_time()
        dominant_colors(pixels)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.002


@pytest.fixture(scope="module")
def drawn():
    return [(shown, dominant_colors(image), words) for shown, image, words in flowers.draw_many(7, 0, 200, 32)]


def test_true_captions_of_drawings_are_hardly_ever_doubted(drawn):
    doubted = [words for _, shares, words in drawn if contradicted_colors(words, shares)]
    assert len(doubted) <= 0.005 * len(drawn), doubted


def test_swapped_petal_colors_of_drawings_are_often_found(drawn):
    """Not always: skies are blue, centers golden, clouds white, and neighbours such as red and burgundy count as one."""
    found = {background: [] for background in flowers.ATTRIBUTES["background"]}
    for shown, shares, words in drawn:
        for color in set(PALETTE) - {shown["petal_color"]}:
            swapped = words.replace(shown["petal_color"], color, 1)
            found[shown["background"]].append(bool(contradicted_colors(swapped, shares)))
    rates = {background: float(np.mean(hits)) for background, hits in found.items()}
    assert np.mean(list(rates.values())) > 0.48, rates
    assert rates["meadow"] > 0.62, rates


def test_real_photos_of_one_color_are_hardly_ever_doubted():
    root = photos()
    doubted, found = [], []
    for species, color in SURE_COLORS.items():
        for file in sorted(root.glob(f"*/{species}/*.jpg"))[::2]:
            with Image.open(file) as photo:
                photo.draft("RGB", (64, 64))
                shares = dominant_colors(np.asarray(photo.convert("RGB")))
            if contradicted_colors(f"a {color} {species} in a garden", shares):
                doubted.append(file.name)
            found += [bool(contradicted_colors(f"a {wrong} {species}", shares)) for wrong in ("red", "purple", "pink")]
    assert len(found) == 3 * 40 * len(SURE_COLORS)
    assert len(doubted) <= 0.015 * 40 * len(SURE_COLORS), doubted
    assert np.mean(found) > 0.85


# --- The audit -------------------------------------------------------------------------------------------------------


class WordTokenizer:
    """Counts words as tokens, and a start and an end."""

    model_max_length = 8

    def __call__(self, texts, truncation, verbose):
        assert len(texts) <= auditing.TOKENIZER_BATCH
        assert not truncation
        return {"input_ids": [[0, *range(len(text.split())), 0] for text in texts]}


PLANTED = [  # (image, file, label, colors, raw, caption)
    ("a", "a.jpg", "rose", {"red": 0.4}, "The image shows a red rose.", "A red rose."),
    ("b", "b.jpg", "rose", {"red": 0.4}, "The image shows a red rose.", "A red rose."),
    ("b", "copy.jpg", "rose", {"red": 0.4}, None, "a red rose."),  # a copy of b
    ("c", "c.jpg", "tulip", {"pink": 0.2, "green": 0.5}, None, "a rose"),
    ("d", "d.jpg", "tulip", {"pink": 0.2, "green": 0.5}, None, "a blue tulip in a garden with nine other tulips"),
    ("e", "e.jpg", "tulip", None, None, "a tulip</s><pad><pad>"),
    ("f", "f.jpg", None, {"white": 1.0}, None, "…"),
    ("g", "g.jpg", None, {"white": 1.0}, None, "The picture shows petals"),
]


def planted(**changes):
    ids, files, labels, colors, raw, texts = (list(column) for column in zip(*PLANTED, strict=True))
    return audit(texts, ids, **{"files": files, "labels": labels, "colors": colors, "raw": raw} | changes)


def test_the_audit_finds_what_was_planted():
    result = planted(tokenizer=WordTokenizer(), examples=9)
    checks = result["checks"]
    files = {name: [row["file"] for row in check["examples"]] for name, check in checks.items()}
    assert list(checks) == list(CHECKS)
    assert files == {
        "empty": ["f.jpg"],
        "over_limit": ["d.jpg"],
        "duplicates": ["a.jpg", "b.jpg", "copy.jpg"],
        "repetitions": [],
        "boilerplate": ["g.jpg"],
        "special_tokens": ["e.jpg"],
        "label_contradictions": ["c.jpg"],
        "color_contradictions": ["d.jpg"],
    }
    assert {name: check["count"] for name, check in checks.items()} == {
        name: len(found) for name, found in files.items()
    }
    assert checks["duplicates"]["share"] == 3 / 8
    assert checks["duplicates"]["kinds"] == {"A red rose.": 3}
    assert checks["special_tokens"]["kinds"] == {"<pad>": 2, "</s>": 1}
    assert checks["label_contradictions"]["examples"][0]["note"] == "names rose; the label is tulip"
    assert checks["color_contradictions"]["examples"][0]["note"] == "names blue; the image shows green 50%, pink 20%"
    assert result["stripped"] == {"The image shows …": 2}
    tokens = result["tokens"]
    assert (tokens["limit"], tokens["min"], tokens["median"], tokens["max"]) == (8, 3, 5, 12)
    assert sum(tokens["histogram"].values()) == len(PLANTED)
    assert json.loads(json.dumps(result)) == result


def test_what_was_not_looked_at_is_not_measured():
    result = planted(labels=None, colors=None, raw=None)
    missing = [name for name, check in result["checks"].items() if check["share"] is None]
    assert missing == ["over_limit", "label_contradictions", "color_contradictions"]
    assert result["tokens"] is None
    assert audit([], [], tokenizer=WordTokenizer())["checks"]["over_limit"]["share"] == 0
    with pytest.raises(ValueError, match="2 items beside 1 captions"):
        audit(["a"], ["1", "2"])


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a man with " + "a hat on top of " * 12 + "a hat", "a hat on top of"),
        ("dai " * 16, "dai"),
        ("Red, red, RED, red petals", "red"),
        ("a rose and a rose and a rose and a rose", "a rose and"),
        ("花" * 9, "花"),
        ("バラの" * 8, "バラの"),
        ("a very very very large flower", None),
        ("a red rose, a white rose and a yellow rose in the grass", None),
        ("bougainvillea " * 2 + "hahahaha", None),
        ("", None),
    ],
)
def test_captions_that_repeat_themselves(text, phrase):
    assert auditing.repeated_phrase(text) == phrase
    assert audit([text], ["1"])["checks"]["repetitions"]["count"] == (phrase is not None)


def test_captions_of_labels_share_theirs_on_purpose():
    """Only a caption that different labels share is a duplicate then."""
    texts, labels = ["a rose", "a rose", "a lily", "a lily"], ["rose", "rose", "lily", "tiger-lily"]
    found = audit(texts, list("1234"), labels=labels, of_labels=True)["checks"]["duplicates"]
    assert (found["count"], found["kinds"]) == (2, {"a lily": 2})
    assert audit(texts, list("1234"), labels=labels)["checks"]["duplicates"]["count"] == 4


def test_an_audit_of_before_has_no_figure_of_a_newer_check():
    before = audit(["a rose"], ["1"])
    del before["checks"]["repetitions"]
    assert any("repetitions" in line and "not measured" in line for line in auditing.audit_lines(before))
    with pytest.raises(UserError, match="repetitions was not measured"):
        auditing.check_thresholds(before, {"repetitions": 0.0})


def test_a_copy_may_share_its_caption():
    assert audit(["a rose", "a rose"], ["same", "same"])["checks"]["duplicates"]["count"] == 0


def test_lengths_are_those_of_the_real_tokenizer():
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    tokens = audit(["a rose", "rose " * 20], ["1", "2"], tokenizer=tokenizer)["tokens"]
    assert (tokens["limit"], tokens["min"], tokens["max"]) == (77, 7, 82)
    tokenizer.model_max_length = 10**30  # what transformers writes where no limit is known
    assert auditing.token_limit(tokenizer) == 77


@settings(max_examples=50)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT, st.one_of(st.none(), ANY_TEXT)), max_size=6))
def test_any_captions_can_be_audited(rows):
    texts, ids, labels = ([row[i] for row in rows] for i in range(3))
    colors = [{"red": 1.0} for _ in rows]
    result = audit(texts, ids, labels=labels, colors=colors, raw=labels, tokenizer=WordTokenizer())
    json.dumps(result).encode("utf-8")
    for check in result["checks"].values():
        assert check["share"] is None or 0 <= check["share"] <= 1
        for row in check["examples"]:
            assert all(clean_caption(text) == text and len(text) <= auditing.SHOWN_CHARACTERS for text in row.values())
    for line in audit_lines(result):
        line.encode("utf-8")
        assert line.isprintable() or not any(unicodedata.category(letter) == "Cc" for letter in line)


# --- Limits and the terminal -----------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(list(CHECKS)), st.floats(0, 1)))
def test_limits_are_read_as_they_are_written(limits):
    assert parse_thresholds(f" {name} = {share!r} " for name, share in limits.items()) == limits


@given(st.one_of(ANY_TEXT, st.tuples(st.sampled_from(list(CHECKS)), ANY_TEXT).map("=".join)))
def test_any_other_limit_is_a_users_mistake(entry):
    try:
        (share,) = parse_thresholds([entry]).values()
    except UserError:
        return
    assert 0 <= share <= 1
    assert not math.isnan(share)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("emtpy=0", "did you mean 'empty'"),
        ("overlimit=0.05", "did you mean 'over_limit'"),
        ("color=0.1", "did you mean 'color_contradictions'"),
        ("empty", "a share of the captions from 0 to 1"),
        ("empty=5%", "a share of the captions from 0 to 1"),
        ("empty=1.5", "a share of the captions from 0 to 1"),
        ("empty=-0.1", "a share of the captions from 0 to 1"),
        ("empty=nan", "a share of the captions from 0 to 1"),
    ],
)
def test_mistaken_limits_are_named(entry, says):
    with pytest.raises(UserError, match=says):
        parse_thresholds(["duplicates=0.5", entry])
    with pytest.raises(UserError, match="twice"):
        parse_thresholds(["empty=0", "empty=0.1"])


def test_violated_limits_are_named_with_value_and_limit():
    result = planted()
    check_thresholds(result, parse_thresholds(["empty=0.125", "duplicates=0.5", "special_tokens=1"]))
    check_thresholds(result, {})
    with pytest.raises(UserError) as error:
        check_thresholds(result, parse_thresholds(["empty=0", "duplicates=0.25", "boilerplate=0.5", "over_limit=0"]))
    assert str(error.value) == (
        "the captions fail --fail_on: empty is 0.125 (1 of 8), its limit is 0; duplicates is 0.375 (3 of 8), its limit is "
        "0.25; over_limit was not measured, its limit is 0; fix the captions, or change the limits"
    )


def test_the_terminal_shows_every_figure():
    lines = audit_lines(planted(tokenizer=WordTokenizer()))
    rows = [line for line in lines if line.split()[0] in CHECKS]
    assert [row.split()[0] for row in rows] == list(CHECKS)
    assert len({row.index("%") for row in rows}) == 1
    assert "37.5%  shared with a different image — a.jpg: 'A red rose.'" in "\n".join(rows)
    assert "not measured (no tokenizer)" in "\n".join(audit_lines(planted()))
    assert all(len(line) < 160 for line in lines)


def test_no_torch_is_imported():
    code = "import sys, t2i.captions.auditing, t2i.hub.dataset_card; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
