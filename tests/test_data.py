"""Every input form gives the same rows; splits are stable; damage is listed; pixels are reused; the sampler is pure."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2i.captions.texts import prefixed, unprefixed
from t2i.config import DataConfig
from t2i.data import caption_files, dataset_folder, overview, preparing, tables
from t2i.data.dataset_folder import save_dataset_folder
from t2i.data.images import decode_image, fit
from t2i.data.preparing import batch_indices, count_long_captions, epoch_order, load_splits
from t2i.data.repairs import edit_captions
from t2i.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "oxford-flowers-12"
Photo = namedtuple("Photo", "split label name data caption")
datasets.disable_progress_bars()


def png(index: int, size: int = 20) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def photos(train: int = 8, test: int = 3) -> list[Photo]:
    """Odd names, upper-case and unusual extensions, two classes."""
    names = ["rose {}.png", "übergroße_blüte{}.JPG", "flower-{}.jfif", "no_extension_{}", "a.b.{}.webp"]
    found = []
    for index in range(train + test):
        split, label = "train" if index < train else "test", ("colts-foot", "sun_flower")[index % 2]
        label_words = label.replace("-", " ").replace("_", " ")
        caption = f"a photo of a {label_words}, a type of flower"
        found.append(Photo(split, label, names[index % 5].format(index), png(index), caption))
    return found


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def config(dataset: Path | str, tmp_path: Path, **changes) -> DataConfig:
    chosen = {"resolution": 16, "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.25} | changes
    return DataConfig(dataset=str(dataset), **chosen)


def load(dataset: Path | str, tmp_path: Path, **changes) -> preparing.Splits:
    return load_splits(config(dataset, tmp_path, **changes), say=lambda text: None)


def content(splits: preparing.Splits) -> dict[str, dict[str, tuple[str, bytes]]]:
    """id -> (caption, pixels) of each split."""
    found = {}
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        rows = [] if split is None else list(zip(split.rows, split.pixels, strict=True))
        found[name] = {row["id"]: (row["caption"], pixels.tobytes()) for row, pixels in rows}
    return found


# Input forms


def class_folders(folder: Path) -> Path:
    for photo in photos():
        write(folder / photo.split / photo.label / photo.name, photo.data)
    return folder


def metadata_jsonl_at_the_top(folder: Path) -> Path:
    lines = []
    for photo in photos():
        write(folder / photo.split / photo.name, photo.data)
        lines.append(json.dumps({"file_name": f"{photo.split}/{photo.name}", "caption": photo.caption}))
    write(folder / "metadata.jsonl", "\ufeff" + "\n".join(lines) + "\n\n")
    return folder


def metadata_csv_in_each_split(folder: Path) -> Path:
    tables = {"train": "file_name,text\n", "test": "file_name,text\n"}
    for photo in photos():
        write(folder / photo.split / "images" / photo.name, photo.data)
        tables[photo.split] += f'images/{photo.name},"{photo.caption}"\n'
    for split, table in tables.items():
        write(folder / split / "metadata.csv", table)
    return folder


def sidecars(folder: Path) -> Path:
    for photo in photos():
        path = write(folder / photo.split / photo.name, photo.data)
        write(path.with_suffix(".txt"), f" {photo.caption}\n")
    return folder


def parquet(folder: Path) -> Path:
    rows = {
        split: [{"image": p.data, "caption": p.caption, "petals": 5} for p in photos() if p.split == split]
        for split in ("train", "test")
    }
    assert save_dataset_folder(folder, rows) == {"train": 8, "test": 3}
    return folder


def parquet_with_class_labels(folder: Path) -> Path:
    names = ["colts-foot", "sun_flower"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {
        split: [{"image": p.data, "label": names.index(p.label)} for p in photos() if p.split == split]
        for split in ("train", "test")
    }
    save_dataset_folder(folder, rows, features)
    return folder


def plain_parquet_without_card(folder: Path) -> Path:
    parquet(folder)
    (folder / "README.md").unlink()
    return folder


FORMS = [
    class_folders,
    metadata_jsonl_at_the_top,
    metadata_csv_in_each_split,
    sidecars,
    parquet,
    parquet_with_class_labels,
    plain_parquet_without_card,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_input_form_gives_the_same_rows(form, tmp_path):
    splits = load(form(tmp_path / "flowers and more"), tmp_path)
    found = content(splits)
    expected = {p.data: (p.caption, fit(decode_image(p.data), 16).tobytes()) for p in photos()}
    assert sorted(value for part in found.values() for value in part.values()) == sorted(expected.values())
    assert set(found["test"].values()) == {expected[p.data] for p in photos() if p.split == "test"}
    assert content(load(class_folders(tmp_path / "other"), tmp_path)) == found  # and so the same validation split
    assert len(splits.validation.pixels) >= 1
    assert splits.train.pixels.dtype == np.uint8
    assert isinstance(splits.train.pixels, np.memmap)
    assert splits.train.rows.cache_files  # memory mapped, not in memory
    assert splits.quarantine == []
    assert splits.report["quarantined"] == 0


def test_a_hub_data_set_gives_the_same_rows(tmp_path, monkeypatch):
    folder, real, asked = parquet(tmp_path / "hub"), datasets.load_dataset, []

    def from_hub(name, revision=None):
        asked.append((name, revision))
        return real(str(folder), cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    found = content(load("owner/flowers", tmp_path, dataset_revision="abc123"))
    assert asked == [("owner/flowers", "abc123")]
    monkeypatch.undo()
    assert found == content(load(folder, tmp_path))


def test_a_folder_without_splits_and_attributes_kept(tmp_path):
    for photo in photos():
        write(tmp_path / "plain" / photo.label / photo.name, photo.data)
    splits = load(tmp_path / "plain", tmp_path)
    assert splits.test is None
    assert len(splits.train.rows) + len(splits.validation.rows) == 11
    assert set(splits.train.rows["label"]) == {"colts-foot", "sun_flower"}  # as the folders are named
    rows = load(parquet(tmp_path / "parquet"), tmp_path).train.rows
    assert rows[0]["petals"] == 5
    assert set(rows.column_names) == {"id", "file", "caption", "petals"}


def test_columns_can_be_named(tmp_path):
    rows = [{"image": png(i), "florence": f"flower {i}", "caption": "no"} for i in range(4)]
    save_dataset_folder(tmp_path / "a", {"train": rows})
    assert load(tmp_path / "a", tmp_path, caption_column=["florence"]).train.rows[0]["caption"].startswith("flower")
    renamed = datasets.load_dataset(str(tmp_path / "a"), cache_dir=str(tmp_path / "hf")).rename_column("image", "img")
    (tmp_path / "b").mkdir()
    renamed["train"].to_parquet(tmp_path / "b" / "train.parquet")
    assert len(load(tmp_path / "b", tmp_path, image_column="img").train.rows) == 3


@pytest.mark.parametrize("empty", [True, False])
def test_the_autoencoder_needs_no_captions(empty, tmp_path):
    """What it prepared is no way around the check for those who need them."""
    for number in range(4):
        write(tmp_path / f"photos/{number}.png", png(number))
        if empty:
            write(tmp_path / f"photos/{number}.txt", "")
    said = []
    splits = preparing.load_splits(config(tmp_path / "photos", tmp_path), said.append, captions=False)
    assert len(splits.train) + len(splits.validation) == 4
    assert "none, and this training needs none" in "\n".join(said)
    with pytest.raises(UserError, match="captions of .* are empty" if empty else "neither captions nor labels"):
        load(tmp_path / "photos", tmp_path)


def test_a_prefix_comes_before_each_caption_once(tmp_path):
    folder = tmp_path / "photos"
    for number, text in enumerate(["a rose", "sks a tulip", ""]):
        write(folder / f"{number}.png", png(number))
        write(folder / f"{number}.txt", text)
    said = []
    splits = preparing.load_splits(config(folder, tmp_path, caption_prefix=" sks "), said.append)
    assert captions_of(splits) == {"0.png": "sks a rose", "1.png": "sks a tulip", "2.png": ""}
    assert "each begins with ' sks ' (--caption_prefix)" in "\n".join(said)
    plain = load(folder, tmp_path)  # another cache
    assert captions_of(plain)["0.png"] == "a rose"


@pytest.mark.parametrize(
    ("caption", "prefix", "expected"),
    [
        ("photograph of a rose", "photo", "photo photograph of a rose"),
        ("photo: a rose", "photo", "photo: a rose"),
        ("photo", "photo", "photo"),
        ("sks style,rose", "sks style,", "sks style,rose"),
    ],
)
def test_only_whole_words_of_a_caption_are_its_prefix(caption, prefix, expected):
    assert prefixed(caption, prefix) == expected
    assert unprefixed(caption, prefix) == (caption if caption != expected else caption.removeprefix(prefix).lstrip())


def test_empty_captions_stay_and_are_counted(tmp_path):
    rows = [{"image": png(i), "caption": "" if i < 3 else "a  rose\nin bloom"} for i in range(8)]
    save_dataset_folder(tmp_path / "a", {"train": rows, "validation": [rows[5]], "test": [rows[6]]})
    splits = load(tmp_path / "a", tmp_path)
    assert splits.report["splits"]["train"] | {"fingerprint": ""} == {
        "images": 8,
        "empty_captions": 3,
        "fingerprint": "",
    }
    assert set(splits.train.rows["caption"]) == {"", "a rose in bloom"}
    assert splits.report["duplicates"]["validation_also_in_train"] == 1
    assert splits.report["duplicates"]["test_also_in_train"] == 1


# Mistakes


def test_mistakes_are_one_sentence_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "flat" / "x.png", png(0))
    write(tmp_path / "only_test" / "test" / "rose" / "x.png", png(0))
    write(tmp_path / "evil" / "metadata.jsonl", '{"file_name": "../../etc/passwd", "caption": "x"}\n')
    write(tmp_path / "rooted" / "metadata.csv", "file_name,caption\n/etc/passwd,x\n")
    write(tmp_path / "nameless" / "metadata.jsonl", '{"filename": "x.png", "caption": "x"}\n')
    write(tmp_path / "broken" / "metadata.jsonl", '{"file_name": "x.png"\n')
    write(tmp_path / "bad_parquet" / "train.parquet", b"PAR1 no")
    save_dataset_folder(tmp_path / "good", {"train": [{"image": png(i), "caption": "x"} for i in range(3)]})
    save_dataset_folder(tmp_path / "wordless", {"train": [{"image": png(i), "label": i} for i in range(3)]})
    save_dataset_folder(tmp_path / "blank", {"train": [{"image": png(i), "caption": ""} for i in range(3)]})
    mistakes = [
        (tmp_path / "gone", {}, "no such folder"),
        (tmp_path / "flat" / "x.png", {}, "is a file; give the folder"),
        ("nobody/no-such-flowers", {}, "'nobody/no-such-flowers': there is no such folder here, and the Hub"),
        (tmp_path / "empty", {}, "holds no images"),
        (tmp_path / "flat", {}, "neither captions nor labels .* --caption_column"),
        (tmp_path / "only_test", {}, "no train"),
        (tmp_path / "evil", {}, "metadata.jsonl, line 1 names '../../etc/passwd', which is outside"),
        (tmp_path / "rooted", {}, "'/etc/passwd', which is outside"),
        (tmp_path / "nameless", {}, "line 1 has no file_name .it has filename, caption."),
        (tmp_path / "broken", {}, "metadata.jsonl, line 1 cannot be read"),
        (tmp_path / "bad_parquet", {}, "Parquet files cannot be read"),
        (tmp_path / "good", {"image_column": "imag"}, "no column 'imag'; it has image, caption; did you mean .* image"),
        (tmp_path / "good", {"caption_column": ["captoin"]}, "did you mean --caption_column caption"),
        (tmp_path / "good", {"image_column": "caption"}, "column 'caption' holds .* instead of captions"),
        (tmp_path / "good", {"caption_template": ["a flower"]}, "does not contain {label}"),
        (tmp_path / "wordless", {}, "column 'label' holds numbers without names"),
        (tmp_path / "blank", {}, "all captions of .* are empty"),
    ]
    for dataset, changes, message in mistakes:
        with pytest.raises(UserError, match=message):
            load(dataset, tmp_path, **changes)
    assert not list((tmp_path / "cache").rglob("*.part"))  # nothing half-made stays behind
    with pytest.raises(UserError, match="--dataset"):
        load_splits(DataConfig(dataset=None, cache_dir=str(tmp_path / "cache")))


def test_a_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    folder = class_folders(tmp_path / "a")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="MB are needed"):
        load(folder, tmp_path)


def test_an_image_path_outside_the_folder_is_never_read(tmp_path):
    secret = write(tmp_path / "secret.png", png(99))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = [{"image": {"bytes": png(i), "path": None}, "caption": "x"} for i in range(3)]
    rows += [{"image": {"bytes": None, "path": path}, "caption": "x"} for path in (str(secret), "../secret.png")]
    (tmp_path / "a").mkdir()
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)  # datasets' own writer would embed the files
    pq.write_table(table, tmp_path / "a" / "train.parquet")
    with pytest.raises(UserError, match=r"2 of 5 images .*40.0%.*max_bad_share"):
        load(tmp_path / "a", tmp_path)


# Captions that are surely wrong, and those that may be meant


BAD_CAPTIONS = {
    "a comma that is not quoted": (
        {"metadata.csv": "file_name,text\n0.png,red\n1.png,a rose, wet with dew\n"},
        r"metadata.csv, line 3 has 3 fields, but the header has 2; put quotation marks around a text with a comma",
    ),
    "a comma after a text of two lines": (
        {"metadata.csv": 'file_name,text\n0.png,"red\nand wet"\n1.png,a rose, wet\n'},
        "metadata.csv, line 4 has 3 fields",
    ),
    "a semicolon that is not quoted": (
        {"metadata.csv": "file_name;text\n0.png;red; wet\n"},
        "line 2 has 3 fields, .*with a semicolon",
    ),
    "a quotation mark that swallows rows": (
        {"metadata.csv": 'file_name,text\n0.png,"a red rose\n1.png,"a tulip"\n2.png,x\n'},
        "metadata.csv, line 2: a quotation mark is not closed",
    ),
    "a header without file_name": (
        {"metadata.csv": "filename,text\n0.png,red\n"},
        r"metadata.csv, line 1 has no column file_name \(it has filename, text\); rename 'filename' to file_name",
    ),
    "quotation marks after backslashes": (
        {"metadata.csv": 'file_name,text\n0.png,"a rose"\n1.png,"a \\"red\\" rose 0"\n'},
        r"metadata.csv, line 3 has a backslash before a quotation mark .*; write a quotation mark within a text twice",
    ),
    "one quotation mark after a backslash": (
        {"metadata.csv": 'sep=;\r\nfile_name;text\r\n0.png;"a 5\\" rose"\r\n'},
        "metadata.csv, line 3 has a backslash before",
    ),
    "backslashes without quotation marks around": (
        {"metadata.csv": 'file_name,text\n0.png,a \\"red\\" rose\n'},
        "metadata.csv, line 2 has a backslash before",
    ),
    "a backslash before the last quotation mark": (
        {"metadata.csv": 'file_name,text\n0.png,"a 5\\""\n1.png,b\n'},
        "metadata.csv, line 2: a quotation mark is not closed",
    ),
    "an end inside quotation marks": (
        {"metadata.csv": 'sep=,\nfile_name,text\n0.png,"red\nand wet"\n1.png,"a tulip, half of '},
        "metadata.csv, line 5: a quotation mark is not closed; close it, or write",
    ),
    "an end after a doubled mark": ({"metadata.csv": 'file_name,text\n0.png,"a ""rose""'}, "line 2: a quotation mark"),
    "a comma under a column without a name": (
        {"metadata.csv": "file_name,text,\n0.png,a rose, wet\n"},
        "line 2 has 3 fields, but the header has 2; .*, or name the last",
    ),
    "a pointer in place of a table": (
        {"METADATA.CSV": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"},
        "METADATA.CSV is a Git LFS pointer without the file's content; run git lfs pull",
    ),
    "a pointer in place of a caption": (
        {"0.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        r"0\.txt is a Git LFS pointer",
    ),
    "a column twice": ({"metadata.csv": "file_name,text,text\n0.png,a,b\n"}, "names the column 'text' twice"),
    "an object": (
        {"metadata.jsonl": '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": {"en": "x"}}\n'},
        r"metadata.jsonl, line 2: column 'text' holds an object \({'en': 'x'}\) instead of a caption; write a text",
    ),
    "objects in a list": (
        {"metadata.jsonl": '{"file_name": "0.png", "caption": [{"raw": "x"}]}\n'},
        "line 1: column 'caption' holds an object",
    ),
    "a number among texts": (
        {"metadata.jsonl": '{"file_name": "0.png", "text": "a"}\n\n{"file_name": "1.png", "text": 5}\n'},
        "line 3: column 'text' holds a number",
    ),
    "a comma after an object": (
        {"metadata.jsonl": '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "b"},\n'},
        "metadata.jsonl, line 2 cannot be read .Extra data, column 36.; write one complete JSON object per line",
    ),
    "another encoding in a table": (
        {"metadata.csv": "file_name,text\n0.png,a\n1.png,caf\u00e9\n".encode("cp1252")},
        "metadata.csv, line 3 is not UTF-8 .byte 0xe9.*save the file as UTF-8",
    ),
    "another encoding beside an image": ({"0.txt": "it’s red".encode("cp1252")}, r"0\.txt, line 1 is not UTF-8"),
    "UTF-16 without a mark": ({"0.txt": "a rose".encode("utf-16-le")}, r"0\.txt is UTF-16 without a byte order mark"),
    "detection labels": ({"0.txt": "\n0 0.5 0.5 .1 1\n2 1e-1 0.5 0.1 0.2\n"}, r"0\.txt, line 2 holds detection labels"),
    "outlines of objects": ({"0.caption": "3 0.1 0.2 0.3 0.4 0.5 0.6"}, r"0\.caption, line 1 holds detection labels"),
}


@pytest.mark.parametrize("kind", BAD_CAPTIONS)
def test_captions_that_are_surely_wrong_are_refused_with_file_and_line(kind, tmp_path):
    files, message = BAD_CAPTIONS[kind]
    for index in range(3):
        write(tmp_path / "a" / f"{index}.png", png(index))
    for name, text in files.items():
        write(tmp_path / "a" / name, text)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a", tmp_path)


GOOD_CAPTIONS = {
    "semicolons": {"metadata.csv": 'file_name;text\n0.png;"a; red"\n1.png;b\n2.png;c\n'},
    "Excel's own first line": {"metadata.csv": 'sep=;\nfile_name;text\n0.png;"a; red"\n1.png;b\n2.png;c\n'},
    "line ends of old Macs": {"metadata.csv": "file_name,text\r0.png,a; red\r1.png,b\r2.png,c\r"},
    "tabs": {"metadata.csv": "file_name\ttext\n0.png\ta; red\n1.png\tb\n2.png\tc\n"},
    "spaces after commas": {"metadata.csv": 'file_name, text\n0.png, "a; red"\n1.png, b\n2.png, c\n'},
    "fields without a text": {"metadata.csv": "file_name,text\n0.png,a; red,,\n1.png,b\n2.png,c\n"},
    "pandas' index": {"metadata.csv": ",file_name,text\n0,0.png,a; red\n1,1.png,b\n2,2.png,c\n"},
    "nameless columns": {"metadata.csv": "file_name,,text, ,\n0.png,5,a; red,,\n1.png,5,b\n2.png,5,c,,,\n"},
    "a nameless key": {"metadata.jsonl": "".join(
        json.dumps({"": 5, "file_name": f"{i}.png", "text": text}) + "\n" for i, text in enumerate(["a; red", "b", "c"])
    )},
    "capitals of Windows": {"Metadata.csv": "file_name,text\n0.png,a; red\n1.png,b\n2.png,c\n"},
    "capitals of an ending": {
        "metadata.JSONL": "".join(
            json.dumps({"file_name": f"{i}.png", "text": text}) + "\n" for i, text in enumerate(["a; red", "b", "c"])
        )
    },
    "marks within a text": {"metadata.csv": 'file_name,text\n0.png,a; red\n1.png,b\n2.png,"c"'},
    "paths of Windows": {"metadata.csv": 'file_name,from,text\n0.png,"C:\\a\\",a; red\n1.png,"D:\\" ,b\n2.png,"[""\\""""]",c\n'},
    "a table of UTF-16": {"metadata.csv": "file_name,text\n0.png,a; red\n1.png,b\n2.png,c\n".encode("utf-16")},
    "files of UTF-16 and UTF-8": {
        "0.txt": "a; red".encode("utf-16"), "1.txt": b"\xef\xbb\xbfb", "2.txt": "c".encode("utf-32"),
    },
    "kohya's files": {"0.caption": "a; red", "1.caption": "b", "2.caption": "c"},
    "whole names and capitals": {"0.png.txt": "a; red", "1.TXT": "b", "2.png.caption": "c"},
    "lists among texts": {
        "metadata.jsonl": '{"file_name": "0.png", "text": ["", "a; red", "x"]}\n{"file_name": "1.png", "text": "b"}\n'
        '{"file_name": "2.png", "text": ["c"]}\n'
    },
    "a text where there is no caption": {
        "metadata.csv": "file_name,text,caption\n0.png,a; red, \n1.png,no,b\n2.png,c,\n"
    },
    "captions in some objects": {
        "metadata.jsonl": '{"file_name": "0.png", "text": "a; red"}\n{"file_name": "1.png", "caption": "b", "text": 5}\n'
        '{"file_name": "2.png", "caption": null, "text": "c"}\n'
    },
    "numbers beyond 64 bits beside": {
        "metadata.jsonl": "".join(
            json.dumps({"file_name": f"{i}.png", "text": text, "phash": 2**64 - i}) + "\n"
            for i, text in enumerate(["a; red", "b", "c"])
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD_CAPTIONS)
def test_captions_as_programs_write_them_are_read(kind, tmp_path):
    for index in range(3):
        write(tmp_path / "a" / f"{index}.png", png(index))
    for name, text in GOOD_CAPTIONS[kind].items():
        write(tmp_path / "a" / name, text)
    splits = load(tmp_path / "a", tmp_path)
    assert captions_of(splits) == {"0.png": "a; red", "1.png": "b", "2.png": "c"}
    assert splits.report.get("several_captions") == (1 if kind == "lists among texts" else 0)


def test_which_of_two_columns_is_read_is_said(tmp_path):
    rows = [{"image": png(i), "caption": "a", "text": "b"} for i in range(3)]
    save_dataset_folder(tmp_path / "a", {"train": rows})
    assert load(tmp_path / "a", tmp_path).report["caption_columns"] == [
        "column 'caption'", "column 'text' is not used, as there is 'caption'"
    ]  # fmt: skip
    save_dataset_folder(tmp_path / "b", {"train": [row | {"caption": " "} for row in rows]})
    with pytest.raises(
        UserError, match=r"all captions .* are empty; column 'text' holds text: give --caption_column text"
    ):
        load(tmp_path / "b", tmp_path)
    for index in range(3):
        write(tmp_path / "c" / f"{index}.png", png(index))
    write(tmp_path / "c/metadata.csv", "file_name,caption,text\n0.png,a,\n1.png,,b\n2.png,c,d\n")
    assert load(tmp_path / "c", tmp_path).report["caption_columns"] == [
        "column 'text' is read where 'caption' is empty"
    ]


def test_where_captions_come_from_is_said(tmp_path):
    rows = [{"label": ("rose", "tulip")[i % 2], "prompt": f"a red rose {i}", "color": "dark red"} for i in range(6)]
    for index, row in enumerate(rows):
        write(tmp_path / "a" / f"{index}.png", png(index))
        write(tmp_path / "b/own" / f"{index}.png", png(index))
        row["file_name"] = f"{index}.png"
    write(tmp_path / "a/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    said = []
    load_splits(config(tmp_path / "a", tmp_path), said.append)
    assert "6 from the class, column 'label' of metadata.jsonl; not used: column 'prompt'\n" in said[1]
    said.clear()
    load_splits(config(tmp_path / "a", tmp_path, caption_column=["prompt"]), said.append)
    assert "6 from metadata.jsonl; column 'prompt'\n" in said[1]
    save_dataset_folder(tmp_path / "shards", {
        "train": [{"image": png(i), **row, "notes": "it was seen in May", "more": [row["prompt"]]} for i, row in enumerate(rows)]
    })  # fmt: skip
    assert load(tmp_path / "shards", tmp_path).report["caption_columns"] == [
        "class, column 'label'", "not used: columns 'prompt', 'notes', 'more'"
    ]  # fmt: skip
    rows = [{"image": png(i), "caption": "a", "text": "a red rose", "label": "bird of paradise"} for i in range(3)]
    save_dataset_folder(tmp_path / "two", {"train": rows})
    assert load(tmp_path / "two", tmp_path, caption_column=["caption"]).report["caption_columns"] == [
        "column 'caption'", "not used: column 'text'"
    ]  # fmt: skip
    # Another folder has captions, so the rows without captions stay without any.
    write(tmp_path / "b/own/metadata.csv", "file_name,labels\n" + "".join(f"{i}.png,rose\n" for i in range(6)))
    assert load(tmp_path / "b", tmp_path).report["captions_from"] == {
        "from the class, column 'labels' of metadata.csv": 6
    }
    write(tmp_path / "b/tulip/9.png", png(9))
    write(tmp_path / "b/tulip/9.txt", "a tulip")
    assert load(tmp_path / "b", tmp_path).report["captions_from"] == {"without any": 6, "from .txt files": 1}


def test_caption_files_that_serve_several_images_or_hide_others_are_said(tmp_path):
    for name in ("3.jpg", "3.png", "3.webp", "4.png"):
        write(tmp_path / "a" / name, png(len(name)))
    for name in ("3.txt", "4.txt", "4.TXT"):
        write(tmp_path / "a" / name, "a rose")
    said = []
    splits = load_splits(config(tmp_path / "a", tmp_path), said.append)
    assert "1 caption file serves several images: 3.jpg, 3.png, 3.webp" in said[1]
    assert splits.report["left_out"]["caption files beside another that is read"]["first"] == ["4.TXT"]


def captions_of(splits: preparing.Splits) -> dict[str, str]:
    parts = (splits.train, splits.validation, splits.test)
    return {row["file"]: row["caption"] for part in parts if part is not None for row in part.rows}


def test_no_value_is_an_empty_caption_and_mixed_forms_keep_theirs(tmp_path):
    """NaN; one caption file among classes; a folder with metadata among others."""
    for index in range(8):
        write(tmp_path / "a" / ("rose", "tulip")[index % 2] / f"{index}.png", png(index))
    write(tmp_path / "a/rose/0.txt", "my own")
    write(tmp_path / "a/rose/2.txt", "")
    splits = load(tmp_path / "a", tmp_path)
    found = captions_of(splits)
    assert (found["rose/0.png"], found["rose/2.png"]) == ("my own", "")
    assert set(found.values()) == {"my own", "", *(f"a photo of a {c}, a type of flower" for c in ("rose", "tulip"))}
    assert splits.report["captions_from"] == {"from .txt files": 2, "from class names": 6}
    write(tmp_path / "b/train/rose/0.png", png(0))
    write(tmp_path / "b/train/rose/0.txt", "my own")
    write(tmp_path / "b/test/rose/1.png", png(1))
    assert captions_of(load(tmp_path / "b", tmp_path))["test/rose/1.png"] == "a photo of a rose, a type of flower"
    write(
        tmp_path / "a/lily/metadata.jsonl",
        '{"file_name": "8.png", "text": "a lily"}\n{"file_name": "9.png", "text": NaN}',
    )
    for index in (8, 9):
        write(tmp_path / "a/lily" / f"{index}.png", png(index))
    assert captions_of(load(tmp_path / "a", tmp_path)) == found | {"lily/8.png": "a lily", "lily/9.png": ""}


def test_classes_that_are_numbers_are_refused_in_every_form(tmp_path):
    for form in ("folders", "csv", "jsonl", "floats", "parquet", "names"):
        for index in range(6):
            home = tmp_path / form / str(index % 2) if form == "folders" else tmp_path / form
            if form not in ("parquet", "names"):
                write(home / f"{index}.png", png(index))
    lines = "".join(f"{i}.png,{i % 2}\n" for i in range(6))
    write(tmp_path / "csv/metadata.csv", "file_name,label\n" + lines)
    rows = [{"file_name": f"{i}.png", "label": i % 2} for i in range(6)]
    write(tmp_path / "jsonl/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    write(
        tmp_path / "floats/metadata.jsonl", "\n".join(json.dumps(row | {"label": row["label"] + 1.0}) for row in rows)
    )
    save_dataset_folder(tmp_path / "parquet", {"train": [{"image": png(i), "label": i % 2} for i in range(6)]})
    classes = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1"])})
    save_dataset_folder(tmp_path / "names", {"train": [{"image": png(i), "label": i % 2} for i in range(6)]}, classes)
    for form in ("folders", "csv", "jsonl", "floats", "parquet", "names"):
        with pytest.raises(UserError, match=r"its classes are numbers|holds numbers without names"):
            load(tmp_path / form, tmp_path)
        with pytest.raises(UserError, match="replace the numbers by names") as refused:
            load(tmp_path / form, tmp_path)
        assert ("--label_names" in str(refused.value)) == (form == "floats")  # The others count from 0.
    message = (
        "no name for the classes 0; its names are those of the classes 1 to 2; replace the numbers by names in the"
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path / "csv", tmp_path, label_names=["rose", "tulip"])
    said = load(class_folders(tmp_path / "words"), tmp_path, label_names=["rose"]).report["caption_columns"]
    assert said == ["--label_names is not used, as no class is a number"]
    found = set(captions_of(load(tmp_path / "floats", tmp_path, label_names=["rose", "tulip"])).values())
    assert found == {"a photo of a rose, a type of flower", "a photo of a tulip, a type of flower"}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "folders", "names"])
@pytest.mark.parametrize("names", [[], ["no", "yes"]])
def test_truth_values_are_no_classes(form, names, tmp_path):
    for index in range(6):
        home = tmp_path / "a" / str(index % 2 == 1) if form == "folders" else tmp_path / "a"
        if form not in ("parquet", "names"):
            write(home / f"{index}.png", png(index))
    rows = [{"file_name": f"{i}.png", "label": i % 2 == 1} for i in range(6)]
    if form == "jsonl":
        write(tmp_path / "a/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    elif form == "csv":
        write(tmp_path / "a/metadata.csv", "file_name,label\n" + "".join(f"{i}.png,{i % 2 == 1}\n" for i in range(6)))
    elif form != "folders":
        kind = {"parquet": datasets.Value("bool"), "names": datasets.ClassLabel(names=["False", "True"])}[form]
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        save_dataset_folder(tmp_path / "a", {"train": [{"image": png(i), "label": i % 2} for i in range(6)]}, features)
    with pytest.raises(
        UserError, match=r"has no captions, and its .*(true and false|False and True).*; replace them by names$"
    ):
        load(tmp_path / "a", tmp_path, label_names=names)


def test_floats_in_a_table_are_numbers_and_years_need_no_names(tmp_path):
    for index in range(6):
        write(tmp_path / "a" / f"{index}.png", png(index))
        write(tmp_path / "b/rose" / str(2021 + index % 2) / f"{index}.png", png(index))
        write(tmp_path / "c/rose" / str(1 + 4 * (index % 2)) / f"{index}.png", png(index))
    write(tmp_path / "a/metadata.csv", "file_name,label\n" + "".join(f"{i}.png,{i % 2 + 1}.0\n" for i in range(6)))
    with pytest.raises(
        UserError, match=r"classes are numbers \(1.0, 2.0\); give the names of the classes by --label_names"
    ):
        load(tmp_path / "a", tmp_path)
    found = set(captions_of(load(tmp_path / "a", tmp_path, label_names=["rose", "tulip"])).values())
    assert found == {"a photo of a rose, a type of flower", "a photo of a tulip, a type of flower"}
    with pytest.raises(UserError, match=r"classes are numbers \(2021, 2022\); replace the numbers by names$"):
        load(tmp_path / "b", tmp_path)
    with pytest.raises(
        UserError, match=r"the classes 2021, 2022; .* 1 to 2; replace the numbers by names in the data set$"
    ):
        load(tmp_path / "b", tmp_path, label_names=["rose", "tulip"])
    with pytest.raises(UserError, match=r"no name for the classes 5; .* 1 to 2; add the missing names$"):
        load(tmp_path / "c", tmp_path, label_names=["rose", "tulip"])


def test_columns_that_hold_no_text_are_no_captions(tmp_path):
    for column, value in (("number", 5), ("struct", {"en": "x"}), ("list", [{"raw": "x"}])):
        table = pa.table({"image": pa.array([{"bytes": png(i), "path": None} for i in range(3)]), "text": [value] * 3})
        (tmp_path / column).mkdir()
        pq.write_table(table, tmp_path / column / "train.parquet")
        with pytest.raises(UserError, match=r"column 'text' holds (int64|objects with en|lists of objects)"):
            load(tmp_path / column, tmp_path)


def test_the_table_says_what_was_understood(tmp_path):
    odd = [
        "12",
        "['a', 'b']",
        "caf\ufffd",
        "CafÃ©",
        "nan",
        "IMG_5",
        "0 0.5 0.5 1",
        "{label} rose",
        "a rose",
        "a rose",
        "",
    ]
    names = [*(f"IMG_{index}.png" for index in range(len(odd)))]
    for index, name in enumerate(names):
        write(tmp_path / "a" / name, png(index))
    write(tmp_path / "a" / "extra.png", png(0))
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, odd, strict=True)]
    write(tmp_path / "a" / "metadata.jsonl", "\n".join(lines))
    said = []
    splits = load_splits(config(tmp_path / "a", tmp_path), said.append)
    table = said[1]
    for line in ("11 from metadata.jsonl; column 'text'", "9 distinct, 1 empty, longest 4 words", "IMG_0.png: '12'",
                 "with braces or brackets", "with replacement characters", "with misread", "that say no value", "that are file names",
                 "with markup or a template", "not in the metadata: 1 (extra.png)", "IMG_0.png → 12"):  # fmt: skip
        assert line in table
    assert "of numbers only: 2" in table
    assert "rose'" not in table.split("examples")[0].replace("{label} rose'", "")
    # a cache from before captions were counted opens as well, and a file that came later is said without a new cache
    report = next((tmp_path / "cache").rglob("report.json"))
    old = json.loads(report.read_text())
    for key in ("understood", "several_captions", "caption_columns", "left_out", "captions_from", "form"):
        old.pop(key)
    report.write_text(json.dumps(old))
    write(tmp_path / "a" / "more.png", png(50))
    said.clear()
    assert load_splits(config(tmp_path / "a", tmp_path), said.append).fingerprint == splits.fingerprint
    assert "not in the metadata: 2 (extra.png; more.png)" in said[1]
    assert "9 distinct" in said[1]


NEAR = {
    "0.PNG": "0.png",
    "0": "0.png",
    "0 .png": "0.png",
    "0.jpg": "0.png",
    "other/0.png": "0.png",
    "a%20b.png": "a b.png",
}


@pytest.mark.parametrize("name", NEAR)
def test_a_missing_file_with_a_near_name_is_named(name, tmp_path):
    for there in ("0.png", "a b.png", "c.png"):
        write(tmp_path / "a" / there, png(len(there)))
    write(tmp_path / "a/metadata.csv", f"file_name,text\n{name},a rose\nc.png,b\n")
    with pytest.raises(UserError, match=rf"{name} \(missing file: did you mean {NEAR[name]}\?\)"):
        load(tmp_path / "a", tmp_path)
    write(tmp_path / "a/metadata.csv", f"file_name,text\n{name},a rose\n")
    with pytest.raises(UserError, match=rf"no usable image to train on: {name} \(missing file: did you mean"):
        load(tmp_path / "a", tmp_path)


@pytest.mark.parametrize("name", ["captions.json", "labels.csv", "captions.txt"])
def test_a_table_that_may_hold_the_captions_is_named(name, tmp_path):
    write(tmp_path / "a/0.png", png(0))
    write(tmp_path / "a" / name, "x")
    with pytest.raises(
        UserError, match=f"if {name} holds the captions, save it as metadata.csv with the columns file_nam"
    ):
        load(tmp_path / "a", tmp_path)


ODD = {
    "that say no value": ["#NAME?", "#N/A", "true", "False", "TODO", "unknown", "n/a."],
    "with control or invisible": ["a\u200brose", "a\x07rose", "\ufeffa rose", "ro\u00adse"],
    "that are messages": ["Error: no image", "I am sorry, I see none", "I cannot help", "I’m sorry", "ValueError: x"],
    "of numbers mostly": ["12 5 rose", "-1.5 2,3 x"],
    "with HTML entities": ["salt &amp; pepper", "caf&eacute;", "it&#39;s red", "&#xE9;t&eacute;"],
    "with written-out escapes": [r"caf\u00e9", r"caf\xe9", r"a rose\nin bloom", r"a rose\n", r"a \"red\" rose"],
    "with web addresses": ["a rose, https://example.org/1.jpg", "HTTP://x.org", "a rose from www.example.org"],
    "with settings of a generator": [
        "Negative prompt: blurry, ugly",
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1",
        "a rose Steps: 5",
        "a rose negative prompt: ugly",
    ],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_captions_are_marked(kind):
    found = overview.describe({"train": {"file": ["x.png"] * len(ODD[kind]), "caption": ODD[kind]}})
    assert [(key[: len(kind)], entry["count"]) for key, entry in found["captions"]["odd"].items()] == [
        (kind, len(ODD[kind]))
    ]


def test_common_captions_are_not_odd():
    good = [
        "a rose - red - in bloom",
        "an unknown flower",
        "true blue",
        "گل‌ها",
        "👩‍🌾 with a rose",
        "a sorry sight",
        "#rose",
        "roses & tulips; lilies",
        "a rose in steps: first a bud",
        "a rose w/o leaves and/or thorns",
        'the words "red rose" on it\'s label',
    ]
    assert not overview.describe({"train": {"file": ["x.png"] * len(good), "caption": good}})["captions"]["odd"]


def test_classes_that_differ_by_capitals_or_accents_alone_are_said(tmp_path):
    for index, name in enumerate(("Rose", "rose", "\u00e9t\u00e9", "e\u0301te\u0301", "lily")):
        write(tmp_path / "a" / name / "0.png", png(index))
    said = []
    load_splits(config(tmp_path / "a", tmp_path), said.append)
    assert "names that differ only by capitals, spaces or accents: 2 (" in said[1]
    assert "Rose, rose" in said[1] or "rose, Rose" in said[1]
    assert "e\\u0301te\\u0301" in said[1]


# What is ours, and what is left alone


def test_tables_beside_classes_are_named(tmp_path):
    for name in ("rose/0.png", "tulip/1.png"):
        write(tmp_path / "a" / name, png(len(name)))
    for name in ("captions.json", "meta_cap.JSON", "list.csv"):
        write(tmp_path / "a" / name, "{}")
    tables = "tables that are not named metadata.csv or metadata.jsonl"
    assert load(tmp_path / "a", tmp_path).report["left_out"][tables]["count"] == 3
    write(tmp_path / "a/captions.jsonl", '{"file_name": "rose/0.png", "text": "a rose"}\n')
    assert load(tmp_path / "a", tmp_path).report["left_out"][tables]["count"] == 4


def test_files_of_the_suite_are_no_misnamed_tables(tmp_path):
    folder = parquet(tmp_path / "a")
    edit_captions(folder, "0" * 32, "x.png", ["a rose"], ["a tulip"])
    for name in ("audit.json", "left_out.jsonl", "quarantine.jsonl", "run.json"):
        write(folder / name, "")
    assert load(folder, tmp_path).report["left_out"] == {}


def test_files_and_folders_of_other_programs_are_left_out_and_said(tmp_path):
    rose = tmp_path / "a" / "rose"
    for index in range(4):
        write(rose / f"IMG {index}.JPG", png(index))
        for name in ("xmp", "XML", "AAE", "MOV", "npz", "psd", "cr2", "json", "THM"):
            write(rose / f"IMG {index}.{name}", png(90) if name == "THM" else b"<x/>")
        write(rose / f"IMG {index}.JPG.xmp", b"<x/>")
    for name in ("ehthumbs.db", "Picasa.ini", "photos.lnk", "clip.mp4", "list.xlsx"):
        write(rose / name, b"\0\1")
    folders = (
        "@eaDir/IMG 0.JPG",
        ".thumbnails",
        "__MACOSX",
        "Cat Previews.lrdata/1",
        "CaptureOne/Cache",
        "#recycle",
        "Thumbs",
    )
    for folder in folders:
        write(rose / folder / "x.jpg", png(70))
    write(rose / "._IMG 0.JPG", b"\0\5\x16\7")
    splits = load(tmp_path / "a", tmp_path)
    assert sorted(captions_of(splits)) == [f"rose/IMG {index}.JPG" for index in range(4)]
    assert splits.quarantine == []
    counts = {reason: entry["count"] for reason, entry in splits.report["left_out"].items()}
    assert counts == {
        "companion files": 40, "other files": 5, "folders of other programs, and hidden ones": 7, "hidden files": 1,
    }  # fmt: skip
    write(rose / "alone.psd", b"8BPS" + bytes(30))  # pictures, and what could be one, are bad images
    write(rose / "alone.nef", b"II*\0" + bytes(30))
    write(rose / "no_extension", b"x")
    bad = {row["file"] for row in load(tmp_path / "a", tmp_path, max_bad_share=0.9).quarantine}
    assert bad == {"rose/alone.psd", "rose/alone.nef", "rose/no_extension"}


def test_icons_of_folders_are_no_images(tmp_path):
    for index, name in enumerate(("rose/0.png", "tulip/1.png", "rose/2.png")):
        write(tmp_path / "a" / name, png(index))
    before = load(tmp_path / "a", tmp_path)
    for name in ("Icon\r", "rose/Icon\r", "tulip/Icon\uf00d"):
        write(tmp_path / "a" / name, b"")
    splits = load(tmp_path / "a", tmp_path)
    assert splits.quarantine == []
    assert splits.fingerprint == before.fingerprint


def test_links_hide_no_split_and_rename_no_class(tmp_path):
    for index in range(4):
        write(tmp_path / "a/train/rose" / f"{index}.png", png(index))
    (tmp_path / "a/test").symlink_to("train")
    (tmp_path / "a/train/a_best").symlink_to("rose")
    (tmp_path / "a/train/rose/up").symlink_to("../..")
    splits = load(tmp_path / "a", tmp_path)
    assert set(captions_of(splits)) == {f"train/rose/{index}.png" for index in range(4)}
    links = splits.report["left_out"]["folders read already"]
    assert links["count"] == 3
    assert links["first"][0] == "train/a_best → train/rose"
    for index in range(4):  # both splits are links into one store
        write(tmp_path / "b/store" / ("one", "two")[index % 2] / "rose" / f"{index}.png", png(index))
    (tmp_path / "b/train").symlink_to("store/one")
    (tmp_path / "b/test").symlink_to("store/two")
    assert len(load(tmp_path / "b", tmp_path).test) == 2


def test_names_match_in_both_forms_of_unicode(tmp_path):
    for index in range(3):
        write(tmp_path / "a" / unicodedata.normalize("NFD", f"été {index}.png"), png(index))
        write(tmp_path / "b/rose" / unicodedata.normalize("NFD", f"été {index}.png"), png(index))
        write(tmp_path / "b/rose" / unicodedata.normalize("NFC", f"été {index}.txt"), f"own {index}")
    rows = [
        {"file_name": unicodedata.normalize("NFC", f"été {index}.png"), "text": f"own {index}"} for index in range(3)
    ]
    write(tmp_path / "a/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    for folder in ("a", "b"):
        splits = load(tmp_path / folder, tmp_path)
        assert splits.quarantine == []
        assert set(captions_of(splits).values()) == {"own 0", "own 1", "own 2"}


# Forms that `datasets` writes


@pytest.mark.parametrize("name", ["flowers [2024]", "a::b", "what? *"])
def test_parquet_is_read_whatever_its_path(name, tmp_path):
    found = content(load(parquet(tmp_path / name), tmp_path))
    assert found == content(load(parquet(tmp_path / "plain"), tmp_path))
    splits = load(tmp_path / name, tmp_path / name)  # the cache as well
    assert content(splits) == found


def test_parquet_that_names_pictures_beside_it(tmp_path):
    for index in range(4):
        write(tmp_path / "a/images" / f"{index}.png", png(index))
        write(tmp_path / "b/train/images" / f"{index}.png", png(index))
    paths, texts = [f"images/{index}.png" for index in range(4)], [f"rose {index}" for index in range(4)]
    pq.write_table(pa.table({"image": paths, "text": texts}), tmp_path / "a/data.parquet")
    pq.write_table(pa.table({"file_name": paths, "text": texts}), tmp_path / "b/train/part.parquet")
    (tmp_path / "c").mkdir()
    shutil.copytree(tmp_path / "b/train/images", tmp_path / "c/images")
    pq.write_table(pa.table({"file_name": paths, "text": texts}), tmp_path / "c/metadata.parquet")
    found = {f"images/{index}.png": f"rose {index}" for index in range(4)}
    for folder in ("a", "b", "c"):
        assert captions_of(load(tmp_path / folder, tmp_path)) == found
    (tmp_path / "e").mkdir()
    for split in ("train", "extra"):  # `datasets` reads no other file beside those of splits
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "text": ["a"] * 3}
        pq.write_table(pa.table(rows), tmp_path / "e" / f"{split}.parquet")
    assert "3 rows in files that no split names" in str(load(tmp_path / "e", tmp_path).report["left_out"])
    before = load(tmp_path / "a", tmp_path).fingerprint
    write(tmp_path / "a/images/0.png", png(77))  # another picture, another cache
    assert load(tmp_path / "a", tmp_path).fingerprint != before
    for index in range(4):  # embeddings beside photos are no data set
        write(tmp_path / "d/rose" / f"{index}.png", png(index))
    pq.write_table(pa.table({"embedding": [[0.0, 1.0]]}), tmp_path / "d/embeddings.parquet")
    assert len(captions_of(load(tmp_path / "d", tmp_path))) == 4


def test_a_configuration_is_chosen_and_the_names_are_said(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "many" / name).mkdir(parents=True)
        rows = pa.table({"image": [png(i) for i in range(4)], "text": [f"{name} {i}" for i in range(4)]})
        pq.write_table(rows, tmp_path / "many" / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("a", "b"))
    write(tmp_path / "many/README.md", f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=r"\['a', 'b'\].*; choose a configuration by --dataset_config_name"):
        load(tmp_path / "many", tmp_path)
    with pytest.raises(UserError, match=r"BuilderConfig 'c'.*; choose a configuration by --dataset_config_name"):
        load(tmp_path / "many", tmp_path, dataset_config_name="c")
    splits = [load(tmp_path / "many", tmp_path, dataset_config_name=name) for name in ("a", "b")]
    assert [{text[0] for text in captions_of(part).values()} for part in splits] == [{"a"}, {"b"}]


def write_tar(path: Path, parts: dict[str, Callable[[int], bytes]]) -> None:
    """A shard of webdataset with four samples of one file per ending."""
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for index in range(4):
            for ending, make in parts.items():
                blob = make(index)
                entry = tarfile.TarInfo(f"{index:09d}.{ending}")
                entry.size = len(blob)
                tar.addfile(entry, io.BytesIO(blob))


def test_what_img2dataset_writes_is_read_as_it_is(tmp_path):
    """Beside each .tar lie a Parquet file of addresses and a file of counts."""
    rows = [
        {"url": f"https://x/{index}.jpg", "caption": f"rose {index}", "key": f"{index:09d}", "status": "success",
         "error_message": None, "width": 20, "height": 20, "exif": "{}", "sha256": "0" * 64}
        for index in range(4)
    ]  # fmt: skip
    parts = {"jpg": png, "txt": lambda index: f"rose {index}".encode(), "json": lambda i: json.dumps(rows[i]).encode()}
    write_tar(tmp_path / "a/00000.tar", parts)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a/00000.parquet")
    write(tmp_path / "a/00000_stats.json", json.dumps({"count": 4, "successes": 4}))
    splits = load(tmp_path / "a", tmp_path)
    assert set(captions_of(splits).values()) == {f"rose {index}" for index in range(4)}
    assert splits.report["form"] == "webdataset, 1 file"
    left_out = splits.report["left_out"]["Parquet files without an image column"]
    assert left_out == {"count": 1, "first": ["00000.parquet"]}


def test_folders_of_save_to_disk_webdataset_and_archives(tmp_path):
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "text": [f"rose {i}" for i in range(4)]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": table, "extra": table}).save_to_disk(str(tmp_path / "dict"))
    write_tar(tmp_path / "tar/00000.tar", {"png": png, "txt": lambda index: f"rose {index}".encode()})
    for form in ("disk", "dict", "tar"):
        splits = load(tmp_path / form, tmp_path)
        assert set(captions_of(splits).values()) == {f"rose {index}" for index in range(4)}
    assert splits.report["form"] == "webdataset, 1 file"
    assert splits.report["left_out"] == {}
    assert "extra, 4 rows" in str(load(tmp_path / "dict", tmp_path).report["left_out"])
    write(tmp_path / "zip/photos.zip", b"PK")
    with pytest.raises(UserError, match=r"holds archives \(.zip\) and no images; unpack the archives"):
        load(tmp_path / "zip", tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data/train-00000-of-00001.parquet"], r"00001.parquet is a Git LFS pointer without .*; run git lfs pull"),
        (["metadata.parquet", "0.png"], "metadata.parquet is a Git LFS pointer"),
        (["00000.tar"], "00000.tar is a Git LFS pointer"),
        (["state.json", "dataset_info.json", "data-00000-of-00001.arrow"], "is a Git LFS pointer"),
        (["rose/0.png", "rose/1.png"], r"0.png \(Git LFS pointer: run git lfs pull\)"),
    ],
)
def test_git_lfs_pointers_are_refused(names, message, tmp_path):
    for name in names:
        write(tmp_path / "a" / name, POINTER)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a", tmp_path)


def test_shards_that_are_missing_and_files_beside_are_named(tmp_path):
    folder = parquet(tmp_path / "a")
    for name in ("cover.png", "list.csv", "metadata.csv", "data/train-00001.parquet.incomplete", "data/x.part"):
        write(folder / name, png(5) if name == "cover.png" else "x")
    counts = {reason: entry["first"] for reason, entry in load(folder, tmp_path).report["left_out"].items()}
    assert counts == {
        "pictures beside the shards": ["cover.png"],
        "tables beside the shards": ["metadata.csv"],
        "tables that are not named metadata.csv or metadata.jsonl": ["list.csv"],
        "unfinished downloads": ["data/train-00001.parquet.incomplete", "data/x.part"],
    }
    shard = folder / "data/train-00000-of-00001.parquet"
    shard.rename(folder / "data/train-00003-of-00005-0123456789abcdef.parquet")
    message = (
        "lacks 4 of 5 files: data/train-00000-of-00005.parquet, .*, …; download the missing files, or rename the others"
    )
    with pytest.raises(UserError, match=message):
        load(folder, tmp_path)


def test_a_revision_is_read_from_the_cache_or_refused(tmp_path, monkeypatch):
    """Where the Hub is not reached, `datasets` answers with the newest commit in its cache, whichever was asked for."""
    commits = {"old": "a" * 40, "new": "b" * 40}
    kept = tmp_path / "hf/me___flowers/default/0.0.0"
    for name, commit in commits.items():
        save_dataset_folder(tmp_path / name, {"train": [{"image": png(i), "caption": f"{name} {i}"} for i in range(4)]})
        rows = datasets.load_dataset(str(tmp_path / name), cache_dir=str(tmp_path / "made" / name))
        made = Path(rows["train"].cache_files[0]["filename"])
        shutil.copytree(made.parent, kept / commit)
        (kept / commit / made.name).rename(kept / commit / "flowers-train.arrow")
    newest = datasets.DatasetDict(
        {"train": datasets.Dataset.from_file(str(kept / commits["new"] / "flowers-train.arrow"))}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: newest)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(tables, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write(tmp_path / "hub/datasets--me--flowers/refs/v1", commits["old"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision, name in (
        (None, "new"),
        (commits["new"], "new"),
        (commits["old"], "old"),
        ("aaaaaaaa", "old"),
        ("v1", "old"),
    ):
        splits = load("me/flowers", tmp_path, dataset_revision=revision)
        assert {text.split()[0] for text in captions_of(splits).values()} == {name}
        assert splits.report["revision"] == commits[name]
    for revision in ("v9", "c" * 40):
        with pytest.raises(UserError, match=f"--dataset_revision {revision} of me/flowers is not in the local cache"):
            load("me/flowers", tmp_path, dataset_revision=revision)


# Damage


def damaged(folder: Path, good: int = 40) -> list[str]:
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(png(7, 64))).save(jpeg, "JPEG")
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html></html>",
        "cut.jpg": jpeg.getvalue()[:1500],
        "cut.png": png(3)[:600],
        "icon.png": b"\0\0\1\0" + bytes(30),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "layers.psd": b"8BPS" + bytes(30),
        "tiny.png": png(5, 2),
        "zeros.jpg": bytes(3000),
        "movie.jpg": b"\0\0\0\x18ftypisom" + bytes(30),
    }
    for index in range(good):
        write(folder / "rose" / f"{index}.png", png(index + 100))
    for name, content in bad.items():
        write(folder / "rose" / name, content)
    (folder / "rose" / "link.jpg").symlink_to(folder / "gone.jpg")
    os.mkfifo(folder / "rose" / "pipe.jpg")
    return sorted(f"rose/{name}" for name in (*bad, "link.jpg", "pipe.jpg"))


def test_damaged_images_are_listed_never_deleted_never_fatal(tmp_path):
    bad = damaged(tmp_path / "a")
    before = sorted(path.name for path in (tmp_path / "a" / "rose").iterdir())
    splits = load(tmp_path / "a", tmp_path, max_bad_share=0.3)
    assert sorted(row["file"] for row in splits.quarantine) == bad
    assert all(row["reason"] and row["split"] in ("train", "validation") for row in splits.quarantine)
    assert len(splits.train.rows) + len(splits.validation.rows) == 40
    assert splits.report["quarantined"] == 12
    assert sum(splits.report["quarantined_by_reason"].values()) == 12
    assert len(splits.report["quarantined_by_reason"]) >= 6
    for row, pixels in zip(splits.train.rows, splits.train.pixels, strict=True):  # no row slipped
        assert (fit(decode_image(tmp_path / "a" / row["file"]), 16) == pixels).all()
    assert sorted(path.name for path in (tmp_path / "a" / "rose").iterdir()) == before
    with pytest.raises(UserError, match=r"12 of 52 images .*23.1%.* 5.0% allowed: .*--max_bad_share"):
        load(tmp_path / "a", tmp_path, max_bad_share=0.05)


def test_damage_in_parquet_is_listed_with_its_row(tmp_path):
    rows = [{"image": png(i) if i != 2 else b"<html>", "caption": "x"} for i in range(30)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    save_dataset_folder(tmp_path / "a", {"train": rows}, features)
    splits = load(tmp_path / "a", tmp_path)
    assert [(row["file"], row["reason"]) for row in splits.quarantine] == [
        ("train[2]", "not an image: starts with '<html>'")
    ]
    assert len(splits.train.rows) + len(splits.validation.rows) == 29


def test_no_usable_image_at_all(tmp_path):
    write(tmp_path / "a" / "rose" / "x.jpg", b"")
    with pytest.raises(UserError, match="no usable training image"):
        load(tmp_path / "a", tmp_path, max_bad_share=1.0)


def test_files_outside_metadata_and_splits_are_counted(tmp_path):
    folder = metadata_jsonl_at_the_top(tmp_path / "a")
    write(folder / "train" / "unlisted.png", png(50))
    assert load(folder, tmp_path).report["files_not_in_metadata"] == 1
    folder = class_folders(tmp_path / "b")
    write(folder / "extra" / "x.png", png(50))
    assert load(folder, tmp_path).report["files_outside_splits"] == 1


# Splits


def in_folders(folder: Path, names: str) -> Path:
    """Two classes in each of the folders; a final ~ stands for a space."""
    for index, name in enumerate(names.split()):
        for label in ("rose", "tulip"):
            write(folder / name.replace("~", " ") / label / f"{index}.png", png(2 * index + (label == "rose")))
    return folder


@pytest.mark.parametrize("names", ["data/train data/test", "a/b/Training a/b/val", "train~ test~", "Train TEST"])
def test_splits_are_found_below_a_common_folder(names, tmp_path):
    splits = load(in_folders(tmp_path / "a", names), tmp_path, validation_fraction=0)
    assert len(splits.test or splits.validation) == len(splits.train) == 2
    assert set(splits.train.rows["label"]) == {"rose", "tulip"}


@pytest.mark.parametrize("column", ["split", "Set", "subset"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_column_that_names_splits_is_used(form, column, tmp_path):
    values = ["train", "Training", "test", "val", "train"]
    if form == "csv":
        for index in range(5):
            write(tmp_path / "a" / f"{index}.png", png(index))
        lines = [f"{index}.png,flower {index},{value}" for index, value in enumerate(values)]
        write(tmp_path / "a/metadata.csv", "\n".join([f"file_name,text,{column}", *lines]))
    else:
        (tmp_path / "a").mkdir()
        rows = {"image": [png(i) for i in range(5)], "text": [f"flower {i}" for i in range(5)], column: values}
        pq.write_table(pa.table(rows), tmp_path / "a/train.parquet")
    splits = load(tmp_path / "a", tmp_path)
    found = [list(part.rows["caption"]) for part in (splits.train, splits.validation, splits.test)]
    assert found == [["flower 0", "flower 1", "flower 4"], ["flower 3"], ["flower 2"]]


def test_metadata_above_the_splits_that_names_bare_files_is_told_the_names(tmp_path):
    for split in ("train", "test"):
        for index in range(2):
            write(tmp_path / "a/photos" / split / f"{split}{index}.png", png(index + 2 * (split == "test")))
    lines = [f"{split}{index}.png,a rose" for split in ("train", "test") for index in range(2)]
    write(tmp_path / "a/metadata.csv", "\n".join(["file_name,text", *lines, "gone.png,a rose"]))
    with pytest.raises(UserError, match=r"train0\.png \(missing file: did you mean photos/train/train0\.png\?\)"):
        load(tmp_path / "a", tmp_path)


def test_damaged_images_whose_names_hold_line_separators_are_quarantined(tmp_path):
    names = ["a\u2028b.png", "c\u0085d.png", "e\u2029f.png"]
    for index, name in enumerate([*names, "0.png", "1.png", "2.png"]):
        write(tmp_path / "a/rose" / name, "damaged" if name in names else png(index))
    for _ in range(2):  # once prepared, once from the cache
        splits = load(tmp_path / "a", tmp_path, max_bad_share=0.6)
        assert sorted(row["file"] for row in splits.quarantine) == sorted(f"rose/{name}" for name in names)


def test_a_caption_that_begins_with_many_numbers_is_read_at_once(tmp_path):
    text = "0 " + "123 " * 40 + "rose"
    start = time.perf_counter()
    assert caption_files.read_sidecar(write(tmp_path / "0.txt", text)) == text
    assert time.perf_counter() - start < 1


def test_persian_and_emoji_are_shown_as_they_are(tmp_path):
    captions = ["گل\u200cها", "👩\u200d🌾 with a rose", "a\u202erose\x07"]
    for index, caption in enumerate(captions):
        write(tmp_path / f"a/{index}.png", png(index))
        write(tmp_path / f"a/{index}.txt", caption)
    said = []
    load_splits(config(tmp_path / "a", tmp_path, validation_fraction=0), said.append)
    shown = [line.split(" → ")[1] for line in said[1].split("\n") if " → " in line]
    assert sorted(shown) == sorted([*captions[:2], "a?rose?"])


SPLIT_COLUMN_MISTAKES = {
    "empty": ("0.png,train\n1.png,test\n2.png,\n", "metadata.csv, line 4: column 'split' is empty; write train"),
    "no train": (
        "0.png,val\n1.png,test\n",
        "column 'split' names test and validation but no train; write train into the rows",
    ),
    "another folder": (
        "test/0.png,train\n1.png,test\n",
        "line 2: column 'split' says train, but test/0.png lies in the folder of test",
    ),
}


@pytest.mark.parametrize("kind", SPLIT_COLUMN_MISTAKES)
def test_split_columns_that_cannot_be_followed_are_refused(kind, tmp_path):
    lines, message = SPLIT_COLUMN_MISTAKES[kind]
    for name in ("0.png", "1.png", "2.png", *(("train/3.png", "test/0.png") if kind == "another folder" else ())):
        write(tmp_path / "a" / name, png(len(name)))
    write(tmp_path / "a/metadata.csv", "file_name,split\n" + lines)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a", tmp_path)


LOOK_ALIKES = {
    "training_set test_set": (
        "test_set, training_set look like splits; rename these folders to test, train, or give --dataset .*/a/training_set"
    ),
    "train_images test_images": "rename these folders to test, train",
    "seg_train seg_test seg_pred": "seg_test, seg_train look like splits",
    "train2017 val2017": "rename these folders to train, validation",
    "trainA trainB testA testB": "testA, testB, trainA, trainB look like splits; rename these folders to test, train$",
    "data/TrainSet data/valset": "give --dataset .*/a/data/TrainSet",
    "data/train data/test extra": "data/test, data/train look like splits; make folders test, train at the top",
    "rose/train rose/test tulip/train": "rose/test, rose/train look like splits; make folders",
    "a/val a/test": "rename the folder with the training images to train",
    "red blue test": "/a: the folder test is named like a split but .*; move the classes into train/, or rename the folder$",
    "red Validation~": "the folder Validation  is named like a split",
    "red blue val test": "the folder test is named like a split",
    "data/red data/dev": "the folder data/dev is named like a split .* into data/train/",
}


@pytest.mark.parametrize("names", LOOK_ALIKES)
def test_folders_that_look_like_splits_are_refused(names, tmp_path):
    with pytest.raises(UserError, match=LOOK_ALIKES[names]):
        load(in_folders(tmp_path / "a", names), tmp_path)


def test_a_split_beside_class_folders_without_folders_of_its_own_is_refused(tmp_path):
    for index, name in enumerate(("rose", "tulip", "validation")):
        write(tmp_path / "a" / name / f"{index}.png", png(index))
    with pytest.raises(UserError, match=r"the folder validation is named like a split .* or rename the folder"):
        load(tmp_path / "a", tmp_path)
    lines = "".join(f"{name}/{index}.png,a flower,{split}\n" for index, (name, split) in enumerate(
        (("rose", "train"), ("tulip", "train"), ("validation", "val"))
    ))  # fmt: skip
    write(tmp_path / "a/metadata.csv", "file_name,text,split\n" + lines)  # The column keeps the images out of train.
    assert captions_of(load(tmp_path / "a", tmp_path)).keys() == {"rose/0.png", "tulip/1.png", "validation/2.png"}
    (tmp_path / "a/metadata.csv").unlink()
    (tmp_path / "a/validation").rename(tmp_path / "a/a validation")
    assert "a validation" in set(load(tmp_path / "a", tmp_path, validation_fraction=0).train.rows["label"])


def test_a_class_called_train_is_refused_and_a_split_is_not(tmp_path):
    folder = tmp_path / "a"
    for index, name in enumerate(("bus", "car", "train", "train")):
        write(folder / name / f"{index}.png", png(index))
    with pytest.raises(
        UserError, match=r"the folder train may be a class, .* \(bus, car\); rename it .* use only this folder$"
    ):
        load(folder, tmp_path)
    shutil.copytree(folder, tmp_path / "captioned")
    for index in (2, 3):
        write(tmp_path / f"captioned/train/{index}.txt", "a flower")
    shutil.copytree(folder, tmp_path / "renamed")
    (tmp_path / "renamed/train").rename(tmp_path / "renamed/trains")
    write(folder / "readme/notes.txt", "x")
    for index in (2, 3):
        write(folder / f"train/rose/{index}.png", (folder / f"train/{index}.png").read_bytes())
        (folder / f"train/{index}.png").unlink()
    for name, count in (("a", 2), ("captioned", 2), ("renamed", 4)):
        assert len(captions_of(load(tmp_path / name, tmp_path))) == count


@pytest.mark.parametrize(
    "names",
    ["train_station", "steam_train test_tube bus car lily", "latest trainer", "data/train", "train/rose train/test"],
)
def test_classes_that_hold_such_words_are_classes(names, tmp_path):
    assert load(in_folders(tmp_path / "a", names), tmp_path).test is None


def ids(splits: preparing.Splits, name: str) -> set[str]:
    return set(getattr(splits, name).rows["id"])


def test_adding_renaming_and_copying_images_moves_no_other(tmp_path):
    for index in range(60):
        write(tmp_path / "a" / "rose" / f"{index}.png", png(index))
    first = load(tmp_path / "a", tmp_path)
    assert 5 <= len(first.validation.rows) <= 28  # 15 expected
    for index in range(60, 90):
        write(tmp_path / "a" / "rose" / f"{index}.png", png(index))
    (tmp_path / "a" / "rose" / "0.png").rename(tmp_path / "a" / "rose" / "zzz.png")
    shutil.copy(tmp_path / "a" / "rose" / "1.png", tmp_path / "a" / "rose" / "copy.png")
    second = load(tmp_path / "a", tmp_path)
    assert ids(first, "train") <= ids(second, "train")
    assert ids(first, "validation") <= ids(second, "validation")
    assert not ids(second, "train") & ids(second, "validation")
    assert second.report["duplicates"]["train"] + second.report["duplicates"]["validation"] == 1
    other = load(tmp_path / "a", tmp_path, split_seed=1)
    assert ids(other, "validation") != ids(second, "validation")


def test_max_train_samples_takes_the_first_by_hash_and_leaves_validation(tmp_path):
    for index in range(60):
        write(tmp_path / "a" / "rose" / f"{index}.png", png(index))
    everything, some, few = (load(tmp_path / "a", tmp_path, max_train_samples=n) for n in (None, 20, 10))
    assert len(some.train.rows) == 20
    assert len(few.train.rows) == 10
    assert ids(few, "train") < ids(some, "train") < ids(everything, "train")
    assert ids(few, "validation") == ids(everything, "validation")
    assert len(np.load(next(Path(few.train.rows.cache_files[0]["filename"]).parent.glob("train.npy")))) == 10


def test_tiny_data_sets(tmp_path):
    write(tmp_path / "a" / "rose" / "0.png", png(0))
    assert load(tmp_path / "a", tmp_path, validation_fraction=0.01).validation is None
    write(tmp_path / "a" / "rose" / "1.png", png(1))
    splits = load(tmp_path / "a", tmp_path, validation_fraction=0.01)
    assert len(splits.train.rows) == len(splits.validation.rows) == 1
    splits = load(tmp_path / "a", tmp_path, validation_fraction=0.89)
    assert len(splits.train.rows) == len(splits.validation.rows) == 1


# The cache


def test_the_second_call_reuses_and_says_so(tmp_path):
    folder, said = class_folders(tmp_path / "a"), []
    first = load_splits(config(folder, tmp_path), said.append)
    assert said[0].startswith("preparing 11 images")
    assert "16 px" in said[0]
    assert "MB" in said[0]
    second = load_splits(config(folder, tmp_path), said.append)
    assert said[1].startswith("how the data set was understood:")
    assert said[2].startswith("reusing")
    assert said[3] == said[1]
    assert len(said) == 4
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    assert content(second) == content(first)
    assert not second.train.pixels.flags.writeable


def test_every_setting_that_matters_makes_another_cache(tmp_path):
    folder = class_folders(tmp_path / "a")
    changes = [
        {},
        {"resolution": 8},
        {"caption_template": ["{label}"]},
        {"split_seed": 5},
        {"max_train_samples": 3},
    ]
    splits = [load(folder, tmp_path, **change) for change in changes]
    assert len({part.fingerprint for part in splits}) == len(changes)
    # Latents are cached by the split's fingerprint: other captions of the same pixels leave it as it is.
    assert splits[0].train.fingerprint == splits[2].train.fingerprint
    assert len({part.train.fingerprint for part in splits}) == len(changes) - 1


def test_a_replaced_file_of_the_same_size_and_time_is_seen(tmp_path):
    for index in range(3):
        out = io.BytesIO()
        Image.new("RGB", (16, 16), (index, 0, 0)).save(out, "BMP")
        write(tmp_path / "a" / "rose" / f"{index}.bmp", out.getvalue())
    first = load(tmp_path / "a", tmp_path)
    path = tmp_path / "a" / "rose" / "1.bmp"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-3] + b"\x09\x09\x09")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    second = load(tmp_path / "a", tmp_path)
    assert second.fingerprint != first.fingerprint
    assert (ids(second, "train") | ids(second, "validation")) != (ids(first, "train") | ids(first, "validation"))


def test_a_changed_parquet_shard_or_sidecar_is_seen(tmp_path):
    folder = parquet(tmp_path / "a")
    first = load(folder, tmp_path)
    shutil.rmtree(folder)
    save_dataset_folder(folder, {"train": [{"image": png(i), "caption": "new"} for i in range(5)]})
    assert load(folder, tmp_path).fingerprint != first.fingerprint
    folder = sidecars(tmp_path / "b")
    first = load(folder, tmp_path)
    write(next(folder.glob("train/*.txt")), "another caption")
    assert "another caption" in {caption for caption, _ in content(load(folder, tmp_path))["train"].values()} | {
        caption for caption, _ in content(load(folder, tmp_path))["validation"].values()
    }


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_cache(tmp_path, monkeypatch):
    folder = class_folders(tmp_path / "a")
    monkeypatch.setattr(preparing, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path)
    monkeypatch.undo()
    said = []
    load_splits(config(folder, tmp_path), said.append)
    assert said[0].startswith("preparing")


def test_two_processes_at_once_build_once(tmp_path):
    folder = class_folders(tmp_path / "a")
    script = (
        "import sys, time, pathlib; sys.path.insert(0, 'scripts')\n"
        "from t2i.config import DataConfig; from t2i.data import preparing\n"
        f"cfg = DataConfig(dataset={str(folder)!r}, resolution=16, cache_dir={str(tmp_path / 'cache')!r})\n"
        "build = preparing._build\n"
        "preparing._build = lambda *args: (time.sleep(0.5), build(*args))[1]\n"  # wide enough that the second one must wait
        f"ready = pathlib.Path({str(tmp_path)!r}); (ready / ('ready' + sys.argv[1])).touch()\n"
        "while not ((ready / 'ready0').exists() and (ready / 'ready1').exists()): time.sleep(0.01)\n"
        "print(preparing.load_splits(cfg).fingerprint)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("preparing" in output for output in outputs) == 1
    assert sum("reusing" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


# The sampler


@settings(max_examples=60)
@given(n=st.integers(1, 60), batch=st.integers(1, 90), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
def test_every_sample_comes_once_an_epoch(n, batch, seed, epochs):
    steps = -(-n * epochs // batch)
    stream = np.concatenate([batch_indices(n, batch, seed, step) for step in range(steps)])
    assert len(stream) == steps * batch
    assert stream.dtype == np.int64
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=40)
@given(n=st.integers(1, 60), batch=st.integers(1, 32), seed=st.integers(0, 2**32), step=st.integers(0, 10**6))
def test_the_sampler_is_a_pure_function_and_ranks_share_a_batch(n, batch, seed, step):
    expected = batch_indices(n, batch, seed, step)
    epoch_order.cache_clear()
    assert (batch_indices(n, batch, seed, step) == expected).all()
    # The same samples, whatever the batch size: a run that goes on with half the batch sees the same stream.
    single = np.concatenate([batch_indices(n, 1, seed, step * batch + i) for i in range(batch)])
    assert (single == expected).all()
    ranks = [expected[rank::2] for rank in range(2)]
    assert sorted(np.concatenate(ranks)) == sorted(expected)


def test_orders_differ_by_epoch_and_seed_and_cannot_be_spoiled():
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(1000, 0, 0)[0] = 1
    with pytest.raises(ValueError, match="no samples"):
        batch_indices(0, 4, 0, 0)


# Dataset folders and captions


def test_save_dataset_folder_is_read_by_plain_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_folder, "ROWS_PER_SHARD", 4)
    kinds = [png(0), Image.open(io.BytesIO(png(1))), np.asarray(Image.open(io.BytesIO(png(2)))), png(3), png(4)]
    kinds[3] = write(tmp_path / "x.png", png(3))
    train = ({"image": image, "caption": f"flower {i}", "petals": i} for i, image in enumerate(kinds))
    test = [{"image": png(9), "caption": "ünïcode 🌸", "petals": 0}]
    card = "---\nlicense: mit\ntags:\n- flowers\n---\n# Flowers\n\nHello --- there.\n"
    counts = save_dataset_folder(tmp_path / "out", {"train": train, "test": test}, card_text=card)
    assert counts == {"train": 5, "test": 1}
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {split: len(rows) for split, rows in loaded.items()} == counts
    assert loaded["train"].features["petals"] == datasets.Value("int64")
    for i, row in enumerate(loaded["train"]):
        assert row["caption"] == f"flower {i}"
        assert row["petals"] == i
        assert (np.asarray(row["image"]) == np.asarray(Image.open(io.BytesIO(png(i))))).all()
    assert loaded["test"][0]["caption"] == "ünïcode 🌸"
    read = huggingface_hub.DatasetCard.load(tmp_path / "out" / "README.md")
    assert read.data["license"] == "mit"
    assert "Hello --- there." in read.text
    assert read.data["dataset_info"]["splits"][0]["num_examples"] == 5
    with pytest.raises(UserError, match="not empty"):
        save_dataset_folder(tmp_path / "out", {"train": test})


def test_a_failed_save_leaves_nothing(tmp_path):
    rows = [{"image": png(0), "caption": "x"}, {"image": png(1), "text": "x"}]
    with pytest.raises(UserError, match="a row has the columns image, text"):
        save_dataset_folder(tmp_path / "out", {"train": rows})
    with pytest.raises(UserError, match="no images to write"):
        save_dataset_folder(tmp_path / "out", {"train": []})
    assert list(tmp_path.iterdir()) == []


def test_long_captions_are_counted():
    class Words:
        model_max_length = 5

        def __call__(self, texts, truncation, verbose):
            assert truncation is False
            return {"input_ids": [[0, *range(len(text.split())), 1] for text in texts]}

    captions = (text for text in ["a rose", "a red rose", "a very red rose", "one two three four five six"] * 1000)
    assert count_long_captions(captions, Words()) == {"limit": 5, "over": 2000, "longest": 8}
    assert count_long_captions([], Words()) == {"limit": 5, "over": 0, "longest": 0}


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not there: the real photos are no part of the project")
def test_the_real_photos(tmp_path):
    start = time.perf_counter()
    splits = load(PHOTOS, tmp_path, resolution=32, validation_fraction=0.05)
    assert len(splits.train.rows) + len(splits.validation.rows) == 720
    assert len(splits.test.rows) == 240
    assert splits.quarantine == []
    assert len(set(splits.train.rows["label"])) == 12
    assert "a photo of a colts foot, a type of flower" in set(splits.train.rows["caption"])
    assert time.perf_counter() - start < 60


def test_number_labels_get_their_names(tmp_path: Path) -> None:
    """As in Oxford 102 on the Hub, whose labels are the numbers of the data set's authors."""
    folder = tmp_path / "numbers"
    for label in ("1", "2"):
        (folder / label).mkdir(parents=True)
        for number in range(4):
            color = (60 * number, 90 * int(label), 40)
            Image.new("RGB", (16, 16), color).save(folder / label / f"{number}.png")
    config = DataConfig(
        dataset=str(folder),
        resolution=16,
        cache_dir=str(tmp_path / "cache"),
        label_names=["pink primrose", "sweet pea"],
    )
    rows = preparing.load_splits(config).train.rows
    named = {(Path(file).parent.name, label) for file, label in zip(rows["file"], rows["label"], strict=True)}
    assert named == {("1", "pink primrose"), ("2", "sweet pea")}
    assert "a photo of a sweet pea, a type of flower" in rows["caption"]
