"""The page Data: captions shown literally, search, the audit's findings, the quarantine, damaged and vanishing files."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from t2i.config import DataConfig
from t2i.data import browse
from t2i.data.dataset_folder import save_dataset_folder
from t2i.data.preparing import load_splits

APP = Path(__file__).resolve().parents[1] / "dashboard" / "streamlit_app.py"
EVIL = "a <script>alert(1)</script> **bold** [x](javascript:y) $z$ שלום \x00 rose"
CAPTIONS = [
    EVIL,
    "a red tulip by the lake",
    "a Tulip, red and tall",
    "The image shows a yellow tulip</s>",
    "",
    "x" * 10_000,
]
LABELS = ["rose", "tulip", "rose", "tulip", "rose", "tulip"]
OPEN = """
import sys
from streamlit.testing.v1 import AppTest
app = AppTest.from_file(sys.argv[1], default_timeout=60)
app.switch_page("views/data.py").run()
assert not app.exception and "6 pictures, 1 to 6 shown" in [text.value for text in app.text]
print(*sorted(sys.modules))
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16 + number, 16), (40 * (number % 6), 90, 120)).save(file, "PNG")
    return file.getvalue()


def make_set(folder: Path, captions=CAPTIONS, labels=LABELS) -> Path:
    rows = [
        {"image": picture(number), "caption": caption, "label": label, "photographer": f"p{number % 2}"}
        for number, (caption, label) in enumerate(zip(captions, labels, strict=True))
    ]
    save_dataset_folder(folder, {"train": iter(rows), "test": iter(rows[:2])})
    return folder


def show(**query: str | list[str]) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=30)
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page("views/data.py").run()
    assert not app.exception
    return app


def gallery(app: AppTest) -> list[dict]:
    found = [e.proto for e in app.get("bidi_component") if e.proto.component_name == "gallery"]
    return json.loads(found[0].json)[0]["pictures"] if found else []


def rows_of(app: AppTest) -> list[int]:
    return [one["row"] for one in gallery(app)]


def words(app: AppTest) -> str:
    return " ".join(element.value for element in [*app.text, *app.warning]).replace("\\", "")


def test_an_empty_folder_names_the_command():
    app = show(dataset="../../etc")
    assert "make_flowers.py" in app.code[0].value


def test_captions_are_shown_as_they_are(tmp_path):
    make_set(tmp_path / "outputs" / "one" / "dataset")
    app = show(picture="0")
    shown = gallery(app)
    assert [one["label"] for one in shown] == LABELS
    assert shown[0]["caption"] == EVIL.replace("\x00", "␀")
    assert len(shown[5]["caption"]) <= 300
    assert shown[4]["caption"] == "(no caption)"
    assert all(one["source"].startswith("data:image/png;base64,") for one in shown)
    assert app.code[0].value == EVIL.replace("\x00", "␀")
    assert not any("<script" in element.value for element in [*app.markdown, *app.caption, *app.warning])


def test_the_whole_of_a_long_caption_stands_beside_its_picture(tmp_path):
    make_set(tmp_path / "outputs" / "one")
    assert show(picture="5").code[0].value == CAPTIONS[5]
    assert "there are pictures 0 to 5" in words(show(picture="6"))


@pytest.mark.parametrize("form", ["dataset folder", "prepared"])
def test_all_captions_of_a_picture_are_shown_searched_and_audited(form, tmp_path):
    several = [["a red tulip", "The image shows a tulip"], ["a rose"], ["a lily", "a white lily", "a tall lily"]]
    rows = [{"image": picture(number), "caption": captions} for number, captions in enumerate(several)]
    save_dataset_folder(tmp_path / "outputs" / "one", {"train": iter(rows)})
    split = browse.find_splits(tmp_path / "outputs" / "one")["train"]
    if form == "prepared":
        config = DataConfig(dataset=str(tmp_path / "outputs" / "one"), resolution=16, cache_dir=str(tmp_path / "cache"))
        folder = tmp_path / "cache" / "pixels" / load_splits(config, say=lambda text: None).fingerprint
        found = [browse.read_rows(split) for split in browse.find_splits(folder).values()]
        assert sorted(captions for rows in found for captions in rows.captions) == sorted(several)
        assert not any("captions" in rows.columns for rows in found)
        return
    assert browse.read_rows(split).captions == several
    assert [one["caption"] for one in gallery(show())] == ["a red tulip (+1 more)", "a rose", "a lily (+2 more)"]
    assert [code.value for code in show(picture="2").code] == several[2]
    assert rows_of(show(search="tall")) == [2]
    app = show(finding="boilerplate")
    assert rows_of(app) == [0]
    assert sorted(browse.words(split)[0].tolist()) == [2, 2, 3, 3, 3, 5]


def test_captions_of_the_columns_that_a_run_names_are_shown(tmp_path):
    rows = [
        {"image": picture(0), "caption": ["no"], "short": "a rose", "long": ["a red rose", "a rose"]},
        {"image": picture(1), "caption": ["no"], "short": None, "long": ["a tulip"]},
    ]
    save_dataset_folder(tmp_path / "photos", {"train": iter(rows)})
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1}\n')
    (run / "config.yaml").write_text(
        f"data: {{dataset: {tmp_path / 'photos'}, caption_column: [short, long], cache_dir: .cache/t2i}}\n"
    )
    app = show(picture="0")
    assert [one["caption"] for one in gallery(app)] == ["a rose (+1 more)", "a tulip"]
    assert [code.value for code in app.code] == ["a rose", "a red rose"]
    assert "by --caption_column short long" in words(app)
    (run / "config.yaml").write_text(f"data: {{dataset: {tmp_path / 'photos'}, caption_column: short}}\n")
    assert [one["caption"] for one in gallery(show())] == ["a rose", "(no caption)"]


def test_lists_of_a_fixed_size_are_captions(tmp_path):
    kind = pa.list_(pa.string(), 2)
    cells = [{"bytes": picture(number), "path": None} for number in range(2)]
    several = [["a rose", "a red rose"], ["a lily", None]]
    folder = tmp_path / "outputs" / "one"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": cells, "text": pa.array(several, kind)}), folder / "train.parquet")
    assert browse.read_rows(browse.find_splits(folder)["train"]).captions == [several[0], ["a lily"]]
    pq.write_table(pa.table({"image": cells, "tags": pa.array(several, kind)}), folder / "train.parquet")
    assert "No column is named caption or text" in words(show())


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("TULIP red", [1, 2]),  # every word, anywhere, in any case
        ('"red tulip"', [1]),  # as it stands
        ('"red tulip" lake', [1]),
        ("tul", [1, 2, 3]),
        ("**bold**", [0]),
        (".*(", []),
        ('"', [0, 1, 2, 3, 4, 5]),
        ("nothing of this", []),
    ],
)
def test_search(tmp_path, query, rows):
    make_set(tmp_path / "outputs" / "one")
    assert rows_of(show(search=query)) == rows


def test_filters_and_findings_work_together(tmp_path):
    make_set(tmp_path / "outputs" / "one")
    assert rows_of(show(by="label", value=["rose"])) == [0, 2, 4]
    assert rows_of(show(by="photographer", value=["p1"], search="tulip")) == [1, 3]
    app = show(finding="label contradictions")
    assert rows_of(app) == [2]
    assert gallery(app)[0]["finding"] == "names tulip; the label is rose"
    assert rows_of(show(finding="boilerplate")) == [3]
    assert rows_of(show(finding="special tokens")) == [0, 3]
    assert rows_of(show(finding="empty", by="label", value=["tulip"])) == []


def test_duplicates_stand_in_groups_and_those_of_a_template_are_explained(tmp_path):
    captions = ["a rose", "a lily", "A  rose", "one lily", "a lily", "a rose", "a daisy", "a daisy"]
    labels = ["rose", "lily", "rose", "lily", "lily", "rose", "daisy", "aster"]
    make_set(tmp_path / "outputs" / "one", captions, labels)
    app = show(finding="duplicates")
    assert rows_of(app) == [0, 2, 5, 1, 4, 6, 7]
    assert [one["heading"] for one in gallery(app)] == ["a rose", "", "", "a lily", "", "a daisy", ""]
    assert {one["finding"] for one in gallery(app)[:3]} == {"shared by 3 images"}
    assert "5 of 7 duplicates share a caption only with pictures of the same label: a template" in words(app)
    assert rows_of(show(finding="duplicates", search="lily")) == [1, 4]
    assert [one["heading"] for one in gallery(show())] == [""] * 8
    # without labels, a template's pictures have the same values in all columns that tell kinds apart
    several = [["a rose", "my rose"], ["my rose"], ["a rose"], ["a tulip"]]
    rows = [
        {"image": picture(number), "caption": captions, "color": color}
        for number, (captions, color) in enumerate(zip(several, ["red", "red", "white", "white"], strict=True))
    ]
    save_dataset_folder(tmp_path / "two", {"train": iter(rows)})
    split = browse.find_splits(tmp_path / "two")["train"]
    assert browse.duplicate_groups(split) == [[0, 2], [1]]  # each picture once, at its first shared caption
    assert browse.template_groups(split) == (1, ["color"])


def test_the_words_of_captions_have_no_punctuation_and_no_common_words(tmp_path):
    captions = ["a buttercup, by the lake", "Buttercup! It's a baby's-breath.", "the buttercup", "цветок и buttercup"]
    make_set(tmp_path / "one", captions, LABELS[:4])
    counts, frequent = browse.words(browse.find_splits(tmp_path / "one")["train"])
    assert counts.tolist() == [5, 4, 2, 3]
    assert frequent[0] == ("buttercup", 4)
    assert {word for word, _ in frequent} == {"buttercup", "lake", "it's", "baby's-breath", "цветок", "и"}


def test_the_audit_is_that_of_the_captioning_where_its_notes_are_there(tmp_path):
    folder = make_set(tmp_path / "outputs" / "one", ["a red tulip", "a red tulip", "a red tulip"], ["tulip"] * 3)
    split = browse.find_splits(folder)["train"]
    assert browse.audit(split)["color_contradictions"] is None
    assert set(browse.audit(split)["duplicates"] or ()) == {0, 1, 2}
    photos = [
        {"split": "train", "row": number, "file": "x", "id": "same", "reason": reason, "colors": {"blue": 0.9}}
        for number, reason in enumerate([None, "truncated", None, None])
    ]
    (folder / ".captioning").mkdir()
    (folder / ".captioning" / "photos-0.jsonl").write_text("".join(json.dumps(photo) + "\n" for photo in photos))
    browse.audit.cache_clear()
    found = browse.audit(split)
    assert set(found["color_contradictions"] or ()) == {0, 1, 2}
    assert found["duplicates"] == {}  # one image, three times


@pytest.mark.parametrize("captioner", ["label", "[label, existing]", "[existing, label]", "existing"])
def test_images_of_a_label_share_captions_that_are_made_of_the_label(captioner, tmp_path):
    """The first two images share a caption of their class. The second and the third share one although their classes differ."""
    several = [
        ["sks a red_rose", "sks red rose"], ["sks a red rose", "sks red rose", "sks mine"],
        ["sks tulip", "sks mine"], ["sks daisy", "sks a daisy"],
    ]  # fmt: skip
    folder = make_set(tmp_path / "one", several, ["red_rose", "red_rose", "tulip", "daisy"])
    (folder / "config.yaml").write_text(
        f"data: {{caption_template: ['a {{label}}', '{{label}}'], caption_prefix: sks}}\n"
        f"caption: {{captioner: {captioner}}}\n"
    )
    found = set(browse.audit(browse.find_splits(folder)["train"])["duplicates"] or ())
    assert found == ({0, 1, 2} if captioner == "existing" else {1, 2})


def test_pages(tmp_path):
    many = 60
    make_set(tmp_path / "outputs" / "one", [f"flower {number}" for number in range(many)], ["rose", "tulip"] * 30)
    app = show(page="3")
    assert rows_of(app) == list(range(48, 60))
    app.text_input(key="search").set_value("flower 5").run()
    assert rows_of(app) == [5, 15, 25, 35, 45, *range(50, 60)]  # another choice starts at its first page
    assert rows_of(show(page="99999")) == list(range(24))
    assert rows_of(show(page="3", split="test")) == [0, 1]


def test_a_hostile_url_shows_no_more_than_there_is(tmp_path):
    make_set(tmp_path / "outputs" / "one")
    (tmp_path / "elsewhere").mkdir()
    make_set(tmp_path / "elsewhere" / "secret", ["hidden"], ["x"])
    app = show(dataset="../elsewhere/secret")
    for _ in range(2):
        assert "outputs/ holds no ../elsewhere/secret, which the page's address names" in words(app)
        assert not app.get("bidi_component")
        app.run()
    app = show(split="../x", page="NaN", picture="1e99", by="__class__", value="<b>", finding="<i>",
               search="\x00\ud7ff")  # fmt: skip
    assert "hidden" not in json.dumps(gallery(app)) + words(app)
    assert "there are pictures 0 to 5" in words(app)


def test_a_damaged_picture_has_a_sentence_in_its_place(tmp_path):
    whole = picture(3)
    rows = [{"image": data, "caption": "a flower"} for data in (whole, whole[:60], b"GIF no picture", b"")]
    save_dataset_folder(tmp_path / "outputs" / "one", {"train": iter(rows)})
    shown = gallery(show(picture="2"))
    assert shown[0]["source"]
    assert [bool(one["source"]) for one in shown[1:]] == [False] * 3
    assert all(one["note"].startswith("cannot be shown: ") for one in shown[1:])


def test_a_set_that_changes_or_goes_while_it_is_shown(tmp_path):
    folder = make_set(tmp_path / "outputs" / "one")
    make_set(tmp_path / "outputs" / "two", ["another"], ["x"])
    app = show(dataset="one")
    shutil.rmtree(folder)
    make_set(folder, ["written anew"], ["x"])
    assert [one["caption"] for one in gallery(app.run())] == ["written anew"]
    shard = next((folder / "data").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    app.run()
    assert not app.exception
    assert "cannot be read" in words(app)
    shutil.rmtree(folder)
    app.run()
    assert not app.exception
    assert "holds no one" in words(app)  # No other set takes its place unasked.
    app.selectbox(key="dataset").set_value("two").run()
    assert [one["caption"] for one in gallery(app)] == ["another"]


def test_files_that_go_between_listing_and_reading(tmp_path):
    split = browse.find_splits(make_set(tmp_path / "one"))["train"]
    browse.read_rows(split)
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(browse.UserError, match="no longer exists"):
        browse.read_pictures(split, [0])


def test_labels_kept_as_numbers_have_their_names_and_need_no_captions(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["daisy", "rose"])})
    rows = [{"image": picture(number), "label": label} for number, label in enumerate([1, 0, -1])]
    save_dataset_folder(tmp_path / "outputs" / "one", {"train": iter(rows)}, features)
    app = show()
    assert [one["label"] for one in gallery(app)] == ["rose", "daisy", ""]
    assert "training writes them from the labels" in words(app)
    make_set(tmp_path / "outputs" / "two")
    app = show(dataset="two", finding="duplicates")
    assert app.selectbox(key="finding").value == "duplicates"
    app.selectbox(key="dataset").set_value("one").run()  # no finding of captions stays chosen
    app = app.run()
    assert app.selectbox(key="finding").options == ["any", "near duplicates", "left out"]
    assert app.selectbox(key="finding").value == "any"
    assert rows_of(app) == [0, 1, 2]


def test_the_audit_counts_pictures(tmp_path):
    make_set(tmp_path / "outputs" / "one", [["a rose", "a rose </s>", "a lily </s>"], ["a tulip"]], ["rose", "tulip"])
    table = next(frame.value for frame in show().dataframe if "finding" in frame.value)
    assert list(table.columns) == ["finding", "pictures", "share", "what it means"]
    assert table.set_index("finding").loc["special tokens", "pictures"] == 1


def test_the_pictures_of_scattered_rows_are_those_of_the_rows(tmp_path):
    rows = [{"image": np.full((8, 8, 3), number % 256, np.uint8), "caption": str(number)} for number in range(250)]
    folder = tmp_path / "one"
    save_dataset_folder(folder, {"train": iter(rows)})
    split = browse.find_splits(folder)["train"]
    found = browse.read_pictures(split, [249, 0, 101, 99, 100])
    assert [np.asarray(one)[0, 0, 0] for one in found] == [249, 0, 101, 99, 100]


def test_the_quarantine_of_the_set_and_of_the_runs_that_read_it(tmp_path):
    folder = make_set(tmp_path / "outputs" / "one")
    lines = [{"file": f"<b>{n}.jpg", "split": "train", "reason": f"truncated: {n} bytes"} for n in range(2)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"file": "torn'
    (folder / "quarantine.jsonl").write_text(text)
    run = tmp_path / "outputs" / "run"
    run.mkdir()
    (run / "run.json").write_text('{"status": "running"}')
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1}\n')
    (run / "config.yaml").write_text("data: {dataset: outputs/one}\n")
    more = {"file": "\ud800.png", "split": "test", "reason": "empty file"}
    (run / "quarantine.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps(more) + "\n")
    frames = [frame.value for frame in show(dataset="one").dataframe]
    kinds = next(frame for frame in frames if list(frame.columns) == ["reason", "images"])
    assert dict(zip(kinds["reason"], kinds["images"], strict=True)) == {"truncated": 2, "empty file": 1}
    listed = next(frame for frame in frames if "left out by" in frame.columns)
    assert list(listed["left out by"]) == ["the data set", "the data set", "run", "run"]


def test_what_a_run_read_of_another_source_is_shown_as_it_was_prepared(tmp_path):
    photos = tmp_path / "photos" / "rose"
    photos.mkdir(parents=True)
    for number in range(6):
        (photos / f"{number}.png").write_bytes(picture(number))
    (photos / "bad.png").write_bytes(b"no picture")
    splits = load_splits(
        DataConfig(dataset=str(tmp_path / "photos"), resolution=16, max_bad_share=0.5), say=lambda _: None
    )
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"identity": {"dataset_hash": splits.fingerprint}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1}\n')
    (run / "config.yaml").write_text(f"data: {{dataset: {tmp_path / 'photos'}, cache_dir: .cache/t2i}}\n")
    shown = gallery(show())
    assert {one["caption"] for one in shown} == {"a photo of a rose, a type of flower"}
    assert len(shown) == len(splits.train)
    (run / "run.json").write_text(json.dumps({"identity": {"dataset_hash": "../../../../etc"}}))
    assert "make_flowers.py" in show().code[0].value


def test_looking_imports_neither_torch_nor_datasets(tmp_path):
    make_set(tmp_path / "outputs" / "one")
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(APP)], capture_output=True, text=True, timeout=120, check=True
    )
    assert not {"torch", "datasets", "diffusers", "transformers"} & set(done.stdout.split())
