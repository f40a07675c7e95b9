"""Repairs in place: edited captions and images to leave out, as trainings read them; no cache of images is made anew."""

import hashlib
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2i import models
from t2i.captions import ledger
from t2i.config import DataConfig, VaeConfig
from t2i.data import caches, preparing, repairs
from t2i.data.dataset_folder import save_dataset_folder
from t2i.data.prepared import Selection
from t2i.errors import UserError


def photo(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (20 * number, 90, 120)).save(file, "PNG")
    return file.getvalue()


def digest(number: int) -> str:
    return hashlib.sha256(photo(number)).hexdigest()[:32]


def make_photos(folder: Path, count: int = 6) -> Path:
    """A class folder `rose` with differing images, of which `copy.png` is a copy of `0.png`."""
    (folder / "train" / "rose").mkdir(parents=True)
    (folder / "test" / "rose").mkdir(parents=True)
    for number in range(count):
        (folder / "train" / "rose" / f"{number}.png").write_bytes(photo(number))
    (folder / "train" / "rose" / "copy.png").write_bytes(photo(0))
    (folder / "test" / "rose" / "again.png").write_bytes(photo(1))
    return folder


def load(folder: Path, tmp_path: Path, **options):
    said: list[str] = []
    config = DataConfig(
        dataset=str(folder), resolution=16, cache_dir=str(tmp_path / "cache"), validation_fraction=0.01,
        caption_template=["a {label}", "photo of a {label}"], **options,
    )  # fmt: skip
    return preparing.load_splits(config, say=said.append), "\n".join(said)


def files(split) -> list[str]:
    return [Path(file).name for file in split.rows["file"]]


def test_images_are_left_out_of_their_split_and_counted_and_no_file_changes(tmp_path):
    folder = make_photos(tmp_path / "photos")
    whole, said = load(folder, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    assert "left out by" not in said
    assert whole.repair_hashes() == {}
    repairs.set_left_out(folder, digest(1), "train", "train/rose/1.png", True)
    repairs.set_left_out(folder, digest(0)[:16], "train", "train/rose/copy.png", True)  # one of two copies
    fewer, said = load(folder, tmp_path)
    assert "reusing the prepared images" in said
    gone = {"1.png", "copy.png"}
    kept = [files(part) for part in (fewer.train, fewer.validation) if part]
    assert {name for names in kept for name in names} == {"0.png", "2.png", "3.png", "4.png", "5.png"}
    counts = [
        f"{len(gone & set(files(split)))} of {name}"
        for name, split in (("train", whole.train), ("validation", whole.validation))
        if gone & set(files(split))
    ]
    assert f"2 images left out by left_out.jsonl ({', '.join(counts)}), 0 images with edited captions" in said
    assert files(fewer.test) == ["again.png"]  # the same image in another split stays
    assert fewer.fingerprint == whole.fingerprint  # the dashboard finds the prepared images by it
    assert list(fewer.repair_hashes()) == ["left_out_hash"]
    for row, name in enumerate(files(fewer.train)):
        np.testing.assert_array_equal(fewer.train.pixels[row], whole.train.pixels[files(whole.train).index(name)])
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before

    repairs.set_left_out(folder, digest(1), "train", "train/rose/1.png", False)
    repairs.set_left_out(folder, digest(0), "train", "train/rose/copy.png", False)
    again, said = load(folder, tmp_path)
    assert files(again.train) == files(whole.train)
    assert again.repair_hashes() == {}


def test_an_image_left_out_from_validation_drawn_from_train_is_of_train(tmp_path):
    folder = make_photos(tmp_path / "photos")
    whole, _ = load(folder, tmp_path)
    name, image = whole.validation.rows["file"][0], whole.validation.rows["id"][0]
    repairs.set_left_out(folder, image, "train", "another name.png", True)  # renamed since: found by its content
    fewer, _ = load(folder, tmp_path)
    assert fewer.validation is None or name not in fewer.validation.rows["file"][:]
    assert files(fewer.train) == files(whole.train)


def test_without_any_training_image_the_message_names_the_list(tmp_path):
    folder = make_photos(tmp_path / "photos")
    for number in range(6):
        repairs.set_left_out(folder, digest(number), "train", "", True)
    with pytest.raises(UserError, match=r"no training image that is not left out; shorten its left_out\.jsonl"):
        load(folder, tmp_path)


def test_edited_captions_are_trained_on_and_survive_another_prefix(tmp_path):
    folder = make_photos(tmp_path / "photos")
    whole, _ = load(folder, tmp_path)
    name = files(whole.train)[0]
    original = ["a rose", "photo of a rose"]
    image = whole.train.rows["id"][0]
    assert repairs.edit_captions(folder, image, name, original, ["a  tulip", "photo of a rose"]) == 1
    once, said = load(folder, tmp_path)
    assert "reusing the prepared images" in said
    assert once.train.captions()[0] == ["a tulip", "photo of a rose"]
    assert once.train.rows["caption"][0] == "a tulip"
    assert all(texts == original for texts in once.train.captions()[1:] if texts != once.train.captions()[0])
    assert list(once.repair_hashes()) == ["edits_hash"]
    assert once.repair_hashes(captions=False) == {}  # an autoencoder reads no captions
    prefixed, _ = load(folder, tmp_path, caption_prefix="sks")
    assert prefixed.train.captions()[0] == ["sks a tulip", "sks photo of a rose"]
    # a further edit, a dropped caption, and the way back
    assert repairs.edit_captions(folder, image, name, original, ["a lily"]) == 2
    assert load(folder, tmp_path)[0].train.captions()[0] == ["a lily"]
    assert repairs.edit_captions(folder, image, name, original, ["a rose"]) == 1
    assert load(folder, tmp_path)[0].train.captions()[0] == ["a rose"]


@settings(max_examples=15)
@given(st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=3), max_size=4))
def test_whatever_is_typed_is_what_is_read(tmp_path_factory, typed):
    folder = tmp_path_factory.mktemp("edits")
    original = ["one", "two", "three"]
    present = original
    for texts in typed:
        wanted = [text for text in map(repairs.clean_caption, texts) if text]
        if not wanted or len(wanted) > len(present):
            with pytest.raises(UserError, match="needs a caption" if not wanted else "at most"):
                repairs.edit_captions(folder, digest(0), "x", original, texts)
            continue
        repairs.edit_captions(folder, digest(0), "x", original, texts)
        present = repairs.read_repairs(folder).edited_captions(digest(0)[:16], original)
        assert present == list(dict.fromkeys(wanted))
    assert repairs.read_repairs(folder).edited_captions(digest(1), original) == original
    assert present == original or ledger.read(folder / "captions.jsonl")  # the captioning reads the file as well


def test_an_edit_keeps_the_key_of_the_captioning_and_nothing_is_replaced_twice(tmp_path):
    key = ledger.Key(digest(0), "label", "", "", "0123")
    line = {**key._asdict(), "file": "x", "caption": "a rose", "made": "m"}
    ledger.append(tmp_path / "captions.jsonl", [line])
    assert repairs.read_repairs(tmp_path).edits == {}
    repairs.edit_captions(tmp_path, digest(0), "x", ["sks a rose"], ["sks a tulip"], prefix="sks")
    row = ledger.read(tmp_path / "captions.jsonl")[key]
    assert (row["caption"], row["made"], row["replaces"]) == ("a tulip", "m", "sks a rose")
    assert repairs.read_repairs(tmp_path).edited_captions(digest(0), ["sks a rose"]) == ["sks a tulip"]
    # the captioning has run again, so the data set holds the edited caption; then the first caption comes back
    repairs.edit_captions(tmp_path, digest(0), "x", ["sks a tulip"], ["sks a rose"], prefix="sks")
    assert repairs.read_repairs(tmp_path).edited_captions(digest(0), ["sks a tulip"]) == ["sks a rose"]
    repairs.edit_captions(tmp_path, digest(0), "x", ["sks a tulip"], ["skselia"], prefix="sks")  # no letter is lost
    assert repairs.read_repairs(tmp_path).edited_captions(digest(0), ["sks a tulip"]) == ["sks skselia"]
    assert len(ledger.read(tmp_path / "captions.jsonl")) == 1


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("left_out.jsonl", "{", "left_out.jsonl, line 2 names no image"),
        ("left_out.jsonl", '{"image": "short", "split": "train", "file": "x"}', "line 2 names no image"),
        ("left_out.jsonl", "\udce9", "left_out.jsonl cannot be read"),
        ("captions.jsonl", '{"replaces": 1}', "captions.jsonl, line 2 is no edited caption"),
    ],
)
def test_a_damaged_list_is_refused_with_its_line(tmp_path, file, line, message):
    (tmp_path / file).write_bytes(b"\n" + line.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        repairs.read_repairs(tmp_path)


def test_a_table_of_somebody_elses_is_no_repair(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"image": "1.jpg", "text": "a rose"}\nnot even JSON\n')
    assert repairs.read_repairs(tmp_path) == repairs.Repairs()
    with pytest.raises(UserError, match="is not a caption"):  # and nothing is written into it
        repairs.edit_captions(tmp_path, digest(0), "x", ["a rose"], ["a tulip"])
    assert repairs.read_repairs(None) == repairs.Repairs()


def test_a_longer_list_makes_no_latents_anew(tmp_path):
    rows = [{"image": photo(number), "caption": f"flower {number}"} for number in range(8)]
    folder = tmp_path / "set"
    save_dataset_folder(folder, {"train": iter(rows), "validation": iter(rows[:1])})
    torch.manual_seed(0)
    vae = models.build_vae(VaeConfig(vae_channels=[8, 8], vae_layers=1)).eval()

    def latents(limit=None):
        said: list[str] = []
        split = load(folder, tmp_path)[0].train
        pixels = split.first(limit)
        identity = {"images": split.fingerprint, "vae": "v"}
        made = caches.cache_latents(pixels, identity, vae, str(tmp_path / "cache"), flip=False, say=said.append)
        return made, said[0]

    whole, said = latents()
    assert said.startswith("computing latents of 8 images")
    for number in (2, 5):
        repairs.set_left_out(folder, digest(number), "train", f"train[{number}]", True)
    fewer, said = latents()
    assert said.startswith("reusing latents of 8 images")
    assert isinstance(fewer, Selection)
    assert fewer.shape == (6, *whole.shape[1:])
    kept = [0, 1, 3, 4, 6, 7]
    np.testing.assert_array_equal(fewer[np.array([1, 2]), 0], whole[[1, 3], 0])  # as a batch reads them
    np.testing.assert_array_equal(np.asarray(fewer), whole[kept])
    part, said = latents(limit=3)
    assert said.startswith("computing latents of 3 images")
    np.testing.assert_allclose(part, whole[[0, 1, 3]], atol=1e-5)


def test_the_list_is_one_json_object_a_line(tmp_path):
    for _ in range(2):
        repairs.set_left_out(tmp_path, digest(0), "train", "ü.png", True)
    lines = (tmp_path / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"image": digest(0), "split": "train", "file": "ü.png"}]


def test_an_image_is_taken_off_the_list_with_names_that_no_copy_has(tmp_path):
    names = ("old.png", "new.png", "copy.png")
    for split in ("train", "test"):
        for name in names:
            repairs.set_left_out(tmp_path, digest(0), split, name, True)
    repairs.set_left_out(tmp_path, digest(1), "train", "old.png", True)
    repairs.set_left_out(tmp_path, digest(0), "train", "new.png", False, ["copy.png"])
    rest = [(line["image"], line["split"], line["file"]) for line in repairs.read_repairs(tmp_path).left_out]
    assert rest == [
        (digest(0), "train", "copy.png"),
        *((digest(0), "test", name) for name in names),
        (digest(1), "train", "old.png"),
    ]


def test_an_edit_waits_until_another_session_has_read_and_written(tmp_path):
    def edit(text):
        with repairs.editing(tmp_path):
            repairs.edit_captions(tmp_path, digest(0), "x", ["a rose"], [text])

    other = threading.Thread(target=edit, args=["a lily"])
    with repairs.editing(tmp_path):
        other.start()
        other.join(0.2)
        assert other.is_alive()
        edit("a tulip")
    other.join(30)
    assert [json.loads(line)["caption"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()] == [
        "a tulip",
        "a lily",
    ]
