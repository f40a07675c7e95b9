"""Every input form gives the same rows; splits hold still; damage is listed; pixels are reused; the sampler is pure."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
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

from t2i import data, dataset_folder
from t2i.config import DataConfig
from t2i.data import batch_indices, count_long_captions, epoch_order, load_splits
from t2i.dataset_folder import save_dataset_folder
from t2i.images import decode_image, fit
from t2i.runs import UserError

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


def load(dataset: Path | str, tmp_path: Path, **changes) -> data.Splits:
    return load_splits(config(dataset, tmp_path, **changes), say=lambda text: None)


def content(splits: data.Splits) -> dict[str, dict[str, tuple[str, bytes]]]:
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
    assert load(tmp_path / "a", tmp_path, caption_column="florence").train.rows[0]["caption"].startswith("flower")
    renamed = datasets.load_dataset(str(tmp_path / "a"), cache_dir=str(tmp_path / "hf")).rename_column("image", "img")
    (tmp_path / "b").mkdir()
    renamed["train"].to_parquet(tmp_path / "b" / "train.parquet")
    assert len(load(tmp_path / "b", tmp_path, image_column="img").train.rows) == 3


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
        (tmp_path / "broken", {}, "metadata.jsonl cannot be read"),
        (tmp_path / "bad_parquet", {}, "Parquet files cannot be read"),
        (tmp_path / "good", {"image_column": "imag"}, "no column 'imag'; it has image, caption; did you mean .* image"),
        (tmp_path / "good", {"caption_column": "captoin"}, "did you mean --caption_column caption"),
        (tmp_path / "good", {"image_column": "caption"}, "outside the dataset folder|missing file|no usable"),
        (tmp_path / "good", {"caption_template": "a flower"}, "lacks {label}"),
        (tmp_path / "wordless", {}, "'label' is a number without a name"),
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
        "movie.mp4": b"\0\0\0\x18ftypisom" + bytes(30),
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


def ids(splits: data.Splits, name: str) -> set[str]:
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
    assert said[1].startswith("reusing")
    assert len(said) == 2
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    assert content(second) == content(first)
    assert not second.train.pixels.flags.writeable


def test_every_setting_that_matters_makes_another_cache(tmp_path):
    folder = class_folders(tmp_path / "a")
    changes = [
        {},
        {"resolution": 8},
        {"caption_template": "{label}"},
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
    monkeypatch.setattr(data, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
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
        "from t2i.config import DataConfig; from t2i import data\n"
        f"cfg = DataConfig(dataset={str(folder)!r}, resolution=16, cache_dir={str(tmp_path / 'cache')!r})\n"
        "build = data._build\n"
        "data._build = lambda *args: (time.sleep(0.5), build(*args))\n"  # wide enough that the second one must wait
        f"ready = pathlib.Path({str(tmp_path)!r}); (ready / ('ready' + sys.argv[1])).touch()\n"
        "while not ((ready / 'ready0').exists() and (ready / 'ready1').exists()): time.sleep(0.01)\n"
        "print(data.load_splits(cfg).fingerprint)\n"
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


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 60), batch=st.integers(1, 90), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
def test_every_sample_comes_once_an_epoch(n, batch, seed, epochs):
    steps = -(-n * epochs // batch)
    stream = np.concatenate([batch_indices(n, batch, seed, step) for step in range(steps)])
    assert len(stream) == steps * batch
    assert stream.dtype == np.int64
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(deadline=None, max_examples=40)
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
    rows = data.load_splits(config).train.rows
    assert set(rows["label"]) == {"pink primrose", "sweet pea"}
    assert "a photo of a sweet pea, a type of flower" in rows["caption"]
