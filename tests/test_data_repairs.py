"""Repairs on the page Data: captions edited in place, pictures left out, sorting by loss, near duplicates over splits."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import streamlit

from t2i.config import DataConfig
from t2i.data import browse, repairs
from t2i.data.preparing import load_splits
from t2i.evaluation import image_losses
from test_data_page import _own_folder, gallery, make_set, picture, rows_of, show, words  # noqa: F401

CAPTIONS = ["a red tulip", "a rose", "a rose by the lake", "a lily"]
LABELS = ["tulip", "rose", "rose", "lily"]


@pytest.fixture
def only_here(monkeypatch):
    """The page is bound to this machine."""
    options = {"server.address": "127.0.0.1", "server.allowedHosts": ["localhost", "127.0.0.1"]}
    monkeypatch.setattr(streamlit, "get_option", lambda name: options.get(name))
    return options


@pytest.fixture
def flowers(tmp_path):
    return make_set(tmp_path / "outputs" / "flowers", CAPTIONS, LABELS)


def press(app, label):
    next(button for button in app.button if button.label == label).click()
    app.run()
    assert not app.exception
    return app


def trained(folder):
    splits = load_splits(DataConfig(dataset=str(folder), resolution=16, cache_dir="cache"), say=lambda _: None)
    return [caption for split in (splits.train, splits.validation) if split for caption in split.rows["caption"]]


def test_a_caption_is_edited_in_place_and_trainings_read_it(flowers, only_here):
    app = show(picture="1")
    app.text_area[0].set_value("a  tulip, not a rose\n")
    press(app, "Save")
    app.run()
    assert [one["caption"] for one in gallery(app)] == ["a red tulip", "a tulip, not a rose", *CAPTIONS[2:]]
    assert not app.text_area  # the dialog is closed
    assert rows_of(show(finding="edited")) == [1]
    assert sorted(trained(flowers)) == sorted(["a red tulip", "a tulip, not a rose", *CAPTIONS[2:]])
    app = show(picture="1")
    assert app.text_area[0].value == "a tulip, not a rose"
    assert "Before the edit: a rose" in [caption.value.replace("\\", "") for caption in app.caption]
    app.text_area[0].set_value("one\ntwo")
    press(app, "Save")
    assert "write at most 1 lines, not 2" in words(app)
    assert browse.read_rows(browse.find_splits(flowers)["train"]).captions[1] == ["a rose"]  # what is stored stays


def test_an_unchanged_text_changes_no_caption(tmp_path, only_here):
    captions = [["a red\ntulip"], ["a\x07rose", "a  rose", "a rose"]]
    folder = make_set(tmp_path / "outputs" / "flowers", captions, ["tulip", "rose"])
    for row, text in ((0, "a red tulip"), (1, "a\x07rose\na rose")):
        app = show(picture=str(row))
        assert app.text_area[0].value == text
        assert [toast.value for toast in press(app, "Save").toast] == ["Nothing was changed."]
    assert not (folder / repairs.CAPTIONS).exists()
    app = show(picture="1")
    app.text_area[0].set_value("a\x07rose\na lily")
    press(app, "Save")
    assert browse.read_rows(browse.find_splits(folder, home=folder)["train"]).captions[1] == ["a\x07rose", "a lily"]


def test_a_picture_is_left_out_and_taken_back(flowers, only_here):
    app = show(picture="3")
    press(app, "Leave out of training")
    app.run()
    assert "left out of training: 1" in words(app)
    assert "left out of training" in gallery(app)[3]["finding"]
    assert rows_of(show(finding="left out")) == [3]
    assert sorted(trained(flowers)) == sorted(CAPTIONS[:3])
    press(show(picture="3"), "Train on this picture again")
    assert sorted(trained(flowers)) == sorted(CAPTIONS)


def test_a_picture_is_taken_back_after_its_file_was_renamed(flowers, only_here):
    press(show(picture="3"), "Leave out of training")
    (line,) = repairs.read_repairs(flowers).left_out
    repairs.set_left_out(flowers, line["image"], "train", line["file"], False)
    repairs.set_left_out(flowers, line["image"], "train", "an earlier name.png", True)
    assert sorted(trained(flowers)) == sorted(CAPTIONS[:3])
    press(show(picture="3"), "Train on this picture again")
    assert sorted(trained(flowers)) == sorted(CAPTIONS)


def test_a_save_keeps_what_another_session_saved_meanwhile(flowers, only_here):
    first, second = show(picture="1"), show(picture="1")
    first.text_area[0].set_value("a tulip")
    press(first, "Save")
    second.text_area[0].set_value("a peony")
    press(second, "Save")
    assert "the captions of picture 1 were edited meanwhile; open the picture again" in words(second)
    assert second.text_area[0].value == "a tulip"
    assert sorted(trained(flowers)) == sorted(["a red tulip", "a tulip", *CAPTIONS[2:]])
    second.text_area[0].set_value("a daisy")
    press(second, "Save")
    assert browse.read_rows(browse.find_splits(flowers, home=flowers)["train"]).captions[1] == ["a daisy"]


@pytest.mark.parametrize(
    "shard", ["data/{}-00000-of-00001-0123456789abcdef", "{}-00000-of-00001", "{}/0000", "{}_0", "data/{}"]
)
def test_a_picture_of_the_test_split_is_left_out_of_it_whatever_its_shard_is_called(shard, flowers, only_here):
    for split in ("train", "test"):
        to = flowers / f"{shard.format(split)}.parquet"
        to.parent.mkdir(exist_ok=True)
        (flowers / "data" / f"{split}-00000-of-00001.parquet").rename(to)
    (flowers / "README.md").unlink()  # it assigns the files by their first names
    app = show(dataset="flowers", picture="1", split="test")
    assert app.selectbox[1].options == ["train", "test"]
    press(app, "Leave out of training")
    config = DataConfig(dataset=str(flowers), resolution=16, cache_dir="cache", validation_fraction=0)
    splits = load_splits(config, say=lambda _: None)
    assert (len(splits.train), len(splits.test)) == (4, 1)


SPLIT_COLUMNS = {
    "one split": ({"split": ["test"] * 8}, "train"),
    "two splits": ({"split": ["train", "test"] * 4}, "test"),
    "another word": ({"split": ["train", "test"] * 3 + ["train", "new"]}, "train"),
    "two columns": ({"set": ["meadow"] * 8, "split": ["train", "test"] * 4}, "test"),
}


@pytest.mark.parametrize("form", ["csv", "parquet", "parquet with a test file"])
@pytest.mark.parametrize("columns", SPLIT_COLUMNS)
def test_a_picture_is_left_out_of_the_split_in_which_the_training_has_it(form, columns, tmp_path):
    """A column that names one split only, or a word that is no split, sorts no images. So do files with names of splits."""
    columns, split = SPLIT_COLUMNS[columns]
    folder, images = tmp_path / "a", [picture(number) for number in range(8)]
    folder.mkdir()
    if form == "csv":
        lines = [",".join(["file_name,text", *columns])]
        lines += [",".join([f"{row}.png,a rose", *(values[row] for values in columns.values())]) for row in range(8)]
        (folder / "metadata.csv").write_text("\n".join(lines))
        for number, data in enumerate(images):
            (folder / f"{number}.png").write_bytes(data)
    else:
        pq.write_table(pa.table({"image": images, "text": ["a rose"] * 8, **columns}), folder / "train.parquet")
    if form == "parquet with a test file":
        split = "train"
        pq.write_table(pa.table({"image": images[:2], "text": ["a rose"] * 2}), folder / "test.parquet")
    config = DataConfig(dataset=str(folder), resolution=16, cache_dir="cache", validation_fraction=0)
    before = load_splits(config, say=lambda _: None)
    prepared = tmp_path / "cache" / "pixels" / before.fingerprint
    shown = browse.find_splits(prepared if form == "csv" else folder, home=folder)
    shown = shown[split] if form == "csv" else shown["train"]
    rows, (ids, files) = browse.read_rows(shown), browse.identities(shown)
    row = ids.index(hashlib.sha256(images[1]).hexdigest()[: len(ids[0])])
    own = browse.own_splits(shown, rows)[row]
    assert own == split
    repairs.set_left_out(folder, ids[row], own, files[row], True)
    after = load_splits(config, say=lambda _: None)
    assert len(getattr(after, split)) == len(getattr(before, split)) - 1
    again = browse.find_splits(shown.folder, home=folder)[shown.name]
    assert browse.read_rows(again).left_out == {row}


@pytest.mark.parametrize(
    ("options", "env", "sentence"),
    [
        ({"server.address": None}, {}, "other machines may open this page"),
        ({"server.address": "0.0.0.0"}, {}, "other machines may open this page"),
        ({"server.allowedHosts": ["example.org"]}, {}, "other machines may open this page"),  # behind a proxy
        ({}, {"SPACE_ID": "org/space"}, "A Space shows data and never edits it"),
    ],
)
def test_editing_is_off_where_others_may_open_the_page(options, env, sentence, flowers, only_here, monkeypatch):
    before = show(picture="1")
    only_here.update(options)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    before.text_area[0].set_value("overwritten")  # of a page that was open before
    press(before, "Save")
    assert not (flowers / "captions.jsonl").exists()
    app = show(picture="1")
    assert not app.text_area
    assert not [button for button in app.button if "raining" in button.label]
    assert any(sentence in caption.value for caption in app.caption)
    assert app.code[0].value == "a rose"


def test_data_of_the_hub_cannot_be_edited(tmp_path, only_here):
    photos = make_set(tmp_path / "photos", CAPTIONS, LABELS)
    splits = load_splits(DataConfig(dataset=str(photos), resolution=16), say=lambda _: None)
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"identity": {"dataset_hash": splits.fingerprint}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1}\n')
    (run / "config.yaml").write_text("data: {dataset: owner/flowers, cache_dir: .cache/t2i}\n")
    app = show(picture="0")
    assert not app.text_area
    assert any("This data set is on the Hub, so it cannot be edited here" in caption.value for caption in app.caption)


def test_prepared_photos_are_edited_in_their_own_folder(tmp_path, only_here):
    for label in ("rose", "lily"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        make_set(tmp_path / label, [f"{label}"] * 2, [label] * 2)
        for row, image in enumerate(browse.read_pictures(browse.find_splits(tmp_path / label)["train"], [0, 1])):
            image.rotate(90 * (label == "rose")).resize((8 + row, 9)).save(tmp_path / "photos" / label / f"{row}.png")
    config = DataConfig(
        dataset=str(tmp_path / "photos"), resolution=8, caption_template=["a {label}", "{label}"], caption_prefix="sks"
    )
    splits = load_splits(config, say=lambda _: None)
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"identity": {"dataset_hash": splits.fingerprint}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1}\n')
    (run / "config.yaml").write_text(
        f"data: {{dataset: {tmp_path / 'photos'}, cache_dir: .cache/t2i, caption_prefix: sks}}\n"
    )
    app = show(picture="0", split="validation")
    before = app.text_area[0].value.split("\n")
    app.text_area[0].set_value("\n".join(text.replace("rose", "tulip").replace("lily", "tulip") for text in before))
    press(app, "Save")
    press(show(picture="0", split="validation"), "Leave out of training")
    left_out = repairs.read_repairs(tmp_path / "photos").left_out
    assert [line["split"] for line in left_out] == ["train"]  # validation was drawn from it
    repairs.set_left_out(tmp_path / "photos", left_out[0]["image"], "train", left_out[0]["file"], False)
    again = load_splits(config, say=lambda _: None)
    assert again.fingerprint == splits.fingerprint
    assert again.validation.captions()[0] == ["sks a tulip", "sks tulip"]


def test_pictures_are_sorted_by_how_much_their_captions_raise_the_loss(flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(image_losses, "weights_hash", lambda folder: "w")
    run = tmp_path / "outputs" / "run"
    (run / "pipeline" / "unet").mkdir(parents=True)
    (run / "image_losses").mkdir()
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text(f"data: {{dataset: {flowers}, cache_dir: cache}}\n")
    ids, _ = browse.identities(browse.find_splits(flowers)["train"])
    pairs = {0: (0.9, 1.0), 1: (0.6, 0.5), 2: (2.1, 2.0)}  # picture 3 was added later
    found = {"weights": "w", "ids": [ids[row][:16] for row in pairs], "losses": list(pairs.values())}
    (run / "image_losses" / "pipeline.json").write_text(json.dumps(found))
    app = show(dataset="flowers", sort="loss of run, pipeline")
    assert rows_of(app) == [1, 2, 0, 3]
    assert gallery(app)[0]["finding"] == "the caption changes the loss by +20.0% to 0.600"
    assert rows_of(show(dataset="flowers", sort="loss of run, pipeline", search="rose")) == [1, 2]
    assert rows_of(show(dataset="flowers")) == [0, 1, 2, 3]


def test_a_measurement_of_another_data_sets_losses_is_not_shown(flowers, only_here):
    run = flowers.parent / "run"
    (run / "pipeline" / "unet").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text(f"data: {{dataset: {flowers}, cache_dir: cache}}\n")
    app = show(dataset="flowers")
    job = sys.modules["helpers.loss_jobs"].LossJob(
        key="k", run=Path("outputs/other"), checkpoint="pipeline", settings={}, done=3, total=10
    )
    app.session_state["_loss_job"] = job
    app.run()
    assert not app.get("progress")
    assert any(button.label == "Measure the loss of each picture" for button in app.button)
    job.run = Path("outputs/run")
    assert [one.proto.text for one in app.run().get("progress")] == ["3 of 10 pictures"]


def test_near_duplicates_are_grouped_over_splits(tmp_path):
    from PIL import Image, ImageDraw

    from t2i.data.dataset_folder import save_dataset_folder

    def drawn(number, size=64):
        image = Image.new("RGB", (64, 64), (30 * number, 120, 90))
        ImageDraw.Draw(image).ellipse((5 * number, 8, 30 + 4 * number, 40 + number), fill=(200, 40 * number, 10))
        return image.resize((size, size))

    train = [{"image": drawn(number), "caption": f"flower {number}"} for number in (0, 1, 2, 3)]
    test = [{"image": drawn(2, 48), "caption": "again"}, {"image": drawn(5), "caption": "another"}]
    save_dataset_folder(tmp_path / "outputs" / "one", {"train": iter(train), "test": iter(test)})
    app = show(finding="near duplicates")
    assert [(one["split"], one["row"]) for one in gallery(app)] == [("train", 2), ("test", 0)]
    assert gallery(app)[0]["heading"] == "2 pictures that are nearly the same: 1 in train, 1 in test"
    assert gallery(app)[1]["finding"] == "in test"
    assert rows_of(show(finding="near duplicates", search="flower 1")) == []


def test_near_duplicates_over_three_splits_with_repairs_are_read_once(tmp_path):
    folder = make_set(tmp_path / "outputs" / "one", CAPTIONS, LABELS)
    test = folder / "data" / "test-00000-of-00001.parquet"
    shutil.copy(test, test.with_name("validation-00000-of-00001.parquet"))
    ids, files = browse.identities(browse.find_splits(folder)["train"])
    repairs.set_left_out(folder, ids[0], "train", files[0], True)
    app = show(finding="near duplicates")
    assert {one["split"] for one in gallery(app)} == {"train", "validation", "test"}
    read = browse.read_rows.cache_info().misses
    app.run()
    assert browse.read_rows.cache_info().misses == read
