"""The dataset card: valid for the Hub, unbreakable by captions, and it keeps a person's edits."""

import re

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.captions.auditing import CHECKS, audit
from t2i.data.dataset_folder import save_dataset_folder
from t2i.errors import UserError
from t2i.hub.dataset_card import BEGIN, END, caption_grid, merge_cards, render_dataset_card, size_category

BLOCKS = ["summary", "captions", "splits", "audit", "loading", "provenance"]
MARKERS = [form.format(name) for name in BLOCKS for form in (BEGIN, END)]
HOSTILE = [
    "",
    "x" * 10_000,
    "word " * 2_000,
    "ורד אדום \u202e evil \u2066 |",
    "a\x00rose\x1b[31m",
    "---\nlicense: mit\n---",
    "\"quoted\" 'single'",
    "a | b | c",
    "`code` ``` ```python",
    "```\nrm -rf /\n```",
    "<script>alert(1)</script><b>",
    BEGIN.format("audit"),
    END.format("audit"),
    f"{END.format('audit')}\n# A title of mine",
    "![x](javascript:y) [a](http://b.example) # h $x$ {{ card_data }} {% if x %}",
    "hf_abcdefghijklmnopqrst",
    "\ud83c\ud800",
]


def card(text="A rose.", *, raw="The image shows a rose.", count=12, **changes):
    texts, ids = [text, text, "", f"{text} <loc_1>", "a blue tulip"], [str(i) for i in range(5)]
    labels = ["rose", "tulip", text or None, "tulip", "rose"]
    options = {
        "name": "Roses & co",
        "source": "nelorth/oxford-flowers",
        "splits": {"train": count, "validation": 3},
        "making": {"Captioner": "Florence-2", "Model": "florence-community/Florence-2-large", "Edited by hand": 3},
        "audit": audit(
            texts, ids, labels=labels, files=[text] * 5, colors=[{"red": 0.9}] * 5, raw=[raw] * 5, examples=5
        ),
        "quarantine": [{"file": "a", "reason": "truncated: 3 bytes"}, {"file": "b", "reason": "truncated: 4 bytes"}],
        "provenance": {"Captions": "122d9d32bee31e14"},
        "grid": "images/grid.png",
        "repo_id": "someone/roses",
    }
    return render_dataset_card(**options | changes)


def block(text, name):
    """What stands in a generated block; None where there is none."""
    found = re.findall(f"{re.escape(BEGIN.format(name))}\n(.*?)\n{re.escape(END.format(name))}", text, re.DOTALL)
    assert len(found) <= 1
    return found[0] if found else None


def front(text):
    return DatasetCard(text).data.to_dict()


PLAIN = card()
OTHER = card("A daisy.", count=2000)


# --- The card --------------------------------------------------------------------------------------------------------


def test_the_card_is_filled_in():
    text = card()
    data = DatasetCard(text).data
    assert (data.license, data.language, data.pretty_name) == ("unknown", ["en"], "Roses & co")
    assert (data.task_categories, data.size_categories) == (["text-to-image"], ["n<1K"])
    assert (data.annotations_creators, data.source_datasets) == (["machine-generated"], ["original"])
    assert {"text-to-image", "image-captions"} <= set(data.tags)
    assert "# Roses &amp; co\n" in text
    assert "![Images of this data set with their captions](images/grid.png)" in block(text, "summary")
    assert "| Edited by hand | 3 |" in block(text, "captions")
    assert "| train | 12 |" in block(text, "splits")
    assert "| truncated | 2 |" in block(text, "splits")
    assert 'load_dataset("someone/roses")' in block(text, "loading")
    assert "| Captions | 122d9d32bee31e14 |" in block(text, "provenance")
    shown = block(text, "audit")
    assert f"| {CHECKS['duplicates']} | 2 | 40.0% | A rose. (2) |" in shown
    assert f"| {CHECKS['over_limit']} | not measured | not measured |  |" in shown
    assert "| color\\_contradictions | A rose. | a blue tulip | names blue; the image shows red 90% |" in shown
    assert "“The image shows …” 5 ×" in shown
    assert "{{" not in text
    assert "{%" not in text


def test_parts_that_are_missing_leave_no_trace():
    text = card(grid=None, quarantine=[], repo_id=None, provenance=None)
    assert "![" not in text
    assert "Every image of the source could be used." in text
    assert 'load_dataset("path/to/this/folder")' in text
    assert 'load_dataset("path/to/this/folder")' in card(repo_id=f'x")\n```\n{END.format("loading")}')
    assert [name for name in BLOCKS if block(text, name) is None] == []


@pytest.mark.parametrize(
    ("count", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9_999, "1K<n<10K"), (10_000, "10K<n<100K"), (8 * 10**5, "100K<n<1M"),
     (10**6, "1M<n<10M"), (10**9, "1B<n<10B"), (10**11, "100B<n<1T"), (10**12, "n>1T"), (10**14, "n>1T")],
)  # fmt: skip
def test_sizes_are_named_as_the_hub_names_them(count, category):
    assert size_category(count) == category


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_break_neither_card_nor_markers(hostile):
    changes = dict.fromkeys(("name", "source", "license"), hostile)
    text = card(
        hostile, raw=hostile, making={hostile: hostile}, provenance={hostile: hostile}, tags=[hostile],
        quarantine=[{"file": hostile, "reason": hostile}], source_datasets=[hostile], **changes,
    )  # fmt: skip
    text.encode("utf-8")
    data = DatasetCard(text).data
    assert set(data.to_dict()) == set(front(PLAIN))
    assert data.size_categories == ["n<1K"]
    body = DatasetCard(text).text
    assert [body.count(marker) for marker in MARKERS] == [1] * len(MARKERS)
    assert "hf_abcdefghijklmnopqrst" not in text
    assert "<script" not in body
    assert not re.search(r"(?<!\\)\]\((?!images/grid)", body)
    assert [line for line in body.splitlines() if line.startswith(("---", "license:"))] == []
    assert [line for line in body.splitlines() if line.startswith("```")] == ["```python", "```"]
    assert body.count("\u2068") == body.count("\u2069")
    assert not re.search("[\u202a-\u202e\u2066\x00-\x09\x0b-\x1f]", body)
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == len([line for line in PLAIN.splitlines() if line.startswith("#")])
    for table in re.split(r"\n(?!\|)", body):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, table
    assert max(map(len, body.splitlines())) < 2_000
    assert merge_cards(text, text) == text
    renewed = merge_cards(PLAIN, text)
    assert [block(DatasetCard(renewed).text, name) for name in BLOCKS] == [block(PLAIN, name) for name in BLOCKS]


# --- Merging ---------------------------------------------------------------------------------------------------------

LINE = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>\u2028\u2029"), max_size=30)
PROSE = st.lists(LINE, max_size=3).map(lambda lines: "\n".join(["Mine:", *lines]))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.dates(), LINE), lambda inner: st.lists(inner, max_size=3)
)
OWN_KEYS = st.dictionaries(
    st.one_of(st.sampled_from(["license", "pretty_name", "tags", "language", "viewer"]), LINE.map("x-{}".format)),
    VALUE, max_size=4,
)  # fmt: skip


@settings(max_examples=60)
@given(
    deleted=st.sets(st.sampled_from(BLOCKS)), edited=st.sets(st.sampled_from(BLOCKS)),
    prose=st.lists(PROSE, min_size=len(BLOCKS), max_size=len(BLOCKS)), keys=OWN_KEYS, flow=st.booleans(),
)  # fmt: skip
def test_a_persons_edits_survive_and_generated_parts_are_renewed(deleted, edited, prose, keys, flow):
    old, new = PLAIN, OTHER
    start, body = old.index("# Roses"), old[old.index("# Roses") :]
    for name, text in zip(BLOCKS, prose, strict=True):
        whole = f"{BEGIN.format(name)}\n{block(old, name)}\n{END.format(name)}"
        inner = whole.replace("|", "¦") if name in edited else whole
        body = body.replace(whole, text if name in deleted else f"{text}\n\n{inner}\n")
    data = yaml.safe_load(old[:start].strip("-\n")) | keys
    mine = f"---\n{yaml.safe_dump(data, allow_unicode=True, default_flow_style=flow)}---\n{body}"
    merged = merge_cards(new, mine)
    assert merge_cards(new, merged) == merged
    for name, text in zip(BLOCKS, prose, strict=True):
        assert text in merged
        if len(deleted) < len(BLOCKS):
            assert block(merged, name) == (None if name in deleted else block(new, name))
    kept = yaml.safe_load(merged.split("\n---\n")[0].strip("-\n"))
    assert {key: kept[key] for key in keys if (key, keys[key]) != ("license", "unknown")} == keys
    assert kept["size_categories"] == ["1K<n<10K"]
    outside = re.sub("<!-- t2i.*?end -->", "", merged, flags=re.DOTALL).split("\n---\n", 1)[1]
    assert outside == re.sub("<!-- t2i.*?end -->", "", mine, flags=re.DOTALL).split("\n---\n", 1)[1]


@settings(max_examples=200)
@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from([*MARKERS[:4], "---\n", "\n---\n", "a: 1\n", "\n", "x", "\r\n", "# "])).map("".join),
    )
)
def test_any_card_is_merged_for_good_or_refused(existing):
    try:
        merged = merge_cards(PLAIN, existing)
    except UserError:
        return
    assert merge_cards(PLAIN, merged) == merged
    assert front(merged)["size_categories"] == ["n<1K"]


@pytest.mark.parametrize(
    "stub", [None, "", "\ufeff\n \n", "---\n---\n", "---\n{}\n---\n", "---\n# nothing yet\n---\n\n"]
)
def test_an_empty_card_becomes_the_new_one(stub):
    new = PLAIN
    assert DatasetCard(merge_cards(new, stub)).text == DatasetCard(new).text
    assert front(merge_cards(new, stub)) == front(new)


def test_a_stub_of_the_hub_keeps_its_licence():
    merged = merge_cards(PLAIN, "---\nlicense: cc-by-4.0\n---\n")
    assert front(merged) == front(PLAIN) | {"license": "cc-by-4.0"}
    assert [name for name in BLOCKS if block(merged, name) is None] == []


def test_an_unknown_licence_gives_way():
    assert front(merge_cards(card(license="mit"), PLAIN))["license"] == "mit"
    assert front(merge_cards(PLAIN, card(license="mit")))["license"] == "mit"


def test_a_card_without_blocks_is_its_writers_own():
    mine = "# My flowers\n\nI picked them myself.\n"
    assert DatasetCard(merge_cards(PLAIN, mine)).text == mine


def test_unpaired_markers_are_prose():
    mine = PLAIN.replace(END.format("splits"), "").replace(BEGIN.format("audit"), "")
    merged = merge_cards(OTHER, mine)
    assert "A rose." in merged  # the audit that lost its marker
    assert "A daisy." not in merged
    assert merge_cards(OTHER, merged) == merged


def test_yaml_survives_to_the_letter():
    written = "# chosen after long talks\nlicense: cc-by-4.0  # really\nlanguage: no\ncolors: &c\n- 0o7\n- 12:30:00\n"
    mine = f"---\r\n{written}size_categories: x\n---\n# Mine\r\n"
    merged = merge_cards(PLAIN, mine)
    assert merged.startswith(f"---\n{written}size_categories:\n- n<1K\n")
    assert merged.endswith("---\n# Mine\n")


@pytest.mark.parametrize(
    "broken",
    [
        "---\nlicense: [mit\n---\n# Mine",
        "---\nlicense: mit\n\tx: y\n---\n",
        "---\n- a\n- b\n---\n",
        "---\njust words\n---\n",
        "---\nlicense: mit\n# Mine",
        "---\nlicense: mit\nlicense: apache-2.0\n---\n",
        "---\nx: 2024-13-45\n---\n",
        "---\nx: \x00\n---\n",
        "---\nx: !!python/object:os.system {}\n---\n",
    ],
)
def test_broken_yaml_is_refused_with_its_mend(broken):
    with pytest.raises(UserError, match=r"front matter of README\.md is broken .*; fix it, or delete README\.md"):
        merge_cards(PLAIN, broken)


def folder_card(folder, count, text=""):
    image = np.zeros((8, 8, 3), np.uint8)
    rows = [{"image": image, "caption": "a rose"}] * count
    save_dataset_folder(folder, {"train": rows}, card_text=text or PLAIN)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_files_keys_are_renewed_and_other_configurations_stay(tmp_path):
    old, new = folder_card(tmp_path / "old", 2), folder_card(tmp_path / "new", 3)
    assert merge_cards(new, None) == merge_cards(new, old) == merge_cards(new, new) == new
    data = front(old)
    other = {"config_name": "small", "features": [{"name": "caption", "dtype": "string"}]}
    data["dataset_info"] = [{"config_name": "default", **data["dataset_info"]}, other]
    data["configs"] += [{"config_name": "small", "data_files": "small/*.parquet"}]
    mine = f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n# Mine\n"
    merged = merge_cards(new, mine)
    assert merge_cards(new, merged) == merged
    kept = front(merged)
    assert kept["configs"] == data["configs"]
    assert kept["dataset_info"] == [{"config_name": "default", **front(new)["dataset_info"]}, other]
    assert kept["dataset_info"][0]["splits"][0]["num_examples"] == 3
    alone = f"---\n{yaml.safe_dump({'dataset_info': other})}---\n# Mine\n"
    assert [info["config_name"] for info in front(merge_cards(new, alone))["dataset_info"]] == ["default", "small"]
    (tmp_path / "new" / "README.md").write_text(
        merge_cards(new, old.replace("# Roses", "# My roses")), encoding="utf-8"
    )
    loaded = datasets.load_dataset(str(tmp_path / "new"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["caption"] == ["a rose"] * 3


# --- The picture -----------------------------------------------------------------------------------------------------


def test_the_grid_shows_pictures_and_captions():
    pictures = [np.full((*size, 3), 200, np.uint8) for size in ((64, 64), (300, 200), (9, 40), (128, 128), (1, 1))]
    grid = caption_grid(pictures, ["a rose", *HOSTILE[1:4], ""], columns=4, side=96)
    pixels = np.asarray(grid)
    assert grid.size == (4 * 100 + 4, pixels.shape[0])
    assert (pixels[10:90, 10:90] == 200).all()
    assert (pixels[100:140, 4:100] < 100).any()  # letters
    assert (pixels[pixels.shape[0] // 2 :, 110:] == 255).all()  # no fifth column, an empty caption
    assert caption_grid(pictures[:1], ["a"]).width == 136
    with pytest.raises(ValueError, match="no pictures"):
        caption_grid([], [])


@pytest.mark.parametrize("caption", HOSTILE, ids=range(len(HOSTILE)))
def test_no_caption_leaves_its_cell(caption):
    pictures = np.full((4, 16, 16, 3), 9, np.uint8)
    plain, hostile = (np.asarray(caption_grid(pictures, [text, "", "", ""], columns=2)) for text in ("", caption))
    assert plain.shape == hostile.shape
    plain, hostile = plain.copy(), hostile.copy()
    plain[132:190, 4:132] = hostile[132:190, 4:132] = 0
    assert (plain == hostile).all()
