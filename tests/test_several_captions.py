"""Several captions for an image: every form of input, what is refused, what is cached, and a training that resumes."""

import importlib
import io
import json
import re
import shutil
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import evaluate_checkpoints
import train_unet
from t2i import diffusion
from t2i.config import DataConfig, Recipe, TrainUnetConfig, load_recipe
from t2i.data import caption_files, prepared, preparing
from t2i.data.caches import TextCache
from t2i.data.dataset_folder import save_dataset_folder
from t2i.errors import UserError
from t2i.files import read_json
from test_data import png, write

WANTED = {
    "0.png": ["a rose", "a red rose in the rain"],
    "1.png": ["a tulip"],
    "2.png": ["a lily", "white", "a white lily"],
}


def images(folder, captions=WANTED):
    for number, name in enumerate(captions):
        write(folder / name, png(number))


def in_rows(folder, columns):
    """A Parquet file with the images of `WANTED` and these columns."""
    folder.mkdir(parents=True)
    cells = [{"bytes": png(number), "path": name} for number, name in enumerate(WANTED)]
    pq.write_table(pa.table({"image": cells, **columns}), folder / "train.parquet")


def beside(folder, texts):
    images(folder)
    for name, text in texts.items():
        write(folder / name, text)


def of_disk(folder):
    cells = [{"bytes": png(number), "path": name} for number, name in enumerate(WANTED)]
    rows = datasets.Dataset.from_dict({"image": cells, "caption": list(WANTED.values())})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(folder))


def lines(column, values):
    return "".join(json.dumps({"file_name": name, column: value}) + "\n" for name, value in values.items())


SPREAD = {
    "short": ["a rose", "a tulip", "a lily"],
    "more": [None, "", ["white"]],
    "long": ["a  red rose\nin the rain", "a tulip", "a white lily"],
}
# form of input: how it is made, and the words that the command needs beside --dataset
FORMS = {
    "a list column": (lambda folder: in_rows(folder, {"caption": list(WANTED.values())}), ()),
    "a list column with a name": (
        lambda folder: in_rows(folder, {"x": list(WANTED.values())}), ("--caption_column", "x")
    ),
    "several columns": (
        lambda folder: in_rows(folder, {**SPREAD, "more": [None, None, "white"]}), ("--caption_column", "short", "more", "long")
    ),
    "a folder of save_to_disk": (of_disk, ()),
    "lines of a .txt": (
        lambda folder: beside(
            folder,
            {"0.txt": "a rose\r\n\r\n a red rose in the rain \r\n", "1.txt": "a tulip\n",
             "2.txt": "a lily\nwhite\na white lily"},
        ),
        (),
    ),
    "lists in metadata.jsonl": (
        lambda folder: beside(
            folder, {"metadata.jsonl": lines("text", WANTED | {"1.png": "a tulip", "0.png": [*WANTED["0.png"], ""]})}
        ),
        (),
    ),
    "several columns of metadata.jsonl": (
        lambda folder: beside(folder, {"metadata.jsonl": "".join(
            json.dumps({"file_name": name, **{key: SPREAD[key][row] for key in SPREAD}}) + "\n" for row, name in enumerate(WANTED)
        )}),
        ("--caption_column", "short", "--caption_column", "more", "long"),
    ),
    "lists in metadata.csv": (
        lambda folder: beside(
            folder,
            {"metadata.csv": 'file_name,caption\n0.png,"[""a rose"", ""a red rose in the rain""]"\n1.png,a tulip\n'
             "2.png,\"['a lily', 'white', 'a white lily']\"\n"},
        ),
        (),
    ),
    "several columns of metadata.csv": (
        lambda folder: beside(
            folder,
            {"metadata.csv": "file_name,a,b,c\n0.png,a rose,a red rose in the rain,\n1.png,,a tulip,a tulip\n"
             "2.png,a lily,white,a white lily\n"},
        ),
        ("--caption_column", "a", "b", "c"),
    ),
}  # fmt: skip


@pytest.fixture
def dry_run(monkeypatch, capsys, tmp_path):
    """Run train_unet.py with --dry_run in this process. Return what it says, and the captions of each image."""

    def run(*words):
        more = ("--cache_dir", tmp_path / "cache", "--resolution", 16, "--output_dir", tmp_path / "run", "--dry_run")
        monkeypatch.setattr(sys, "argv", ["train_unet.py", *map(str, (*words, *more))])
        importlib.import_module("train_unet").main()
        (folder,) = {path.parent for path in (tmp_path / "cache" / "pixels").glob("*/report.json")}
        splits = [split for split in prepared.open_prepared(folder) if split]
        return capsys.readouterr().out, {
            file: captions
            for split in splits
            for file, captions in zip(split.rows["file"], split.captions(), strict=True)
        }

    return run


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_all_captions_and_the_table_says_how_many(form, dry_run, tmp_path):
    make, words = FORMS[form]
    make(tmp_path / "a")
    said, captions = dry_run("--dataset", tmp_path / "a", *words)
    assert captions == WANTED
    assert "1 to 3 (2.0 on average) per image: each training step draws one of them" in said
    assert "6 distinct, 0 empty, longest 6 words" in said
    assert re.search(r"2\.png → a lily$", said, re.MULTILINE)  # the first caption where one is shown
    if ".txt" in form:
        assert "2 caption files have several lines: each line is a caption" in said
    if form.startswith("several columns"):
        assert f"columns {', '.join(map(repr, [word for word in words if word[:2] != '--']))}" in said


def test_templates_give_classes_several_captions_with_the_prefix(dry_run, tmp_path):
    for number, flower in enumerate(("oxeye_daisy", "rose", "rose")):
        write(tmp_path / "a" / flower / f"{number}.png", png(number))
    write(tmp_path / "a" / "rose" / "2.txt", "my own")
    words = ("--caption_template", "a photo of a {label}", "{label}", "--caption_prefix", "sks")
    said, captions = dry_run("--dataset", tmp_path / "a", *words)
    assert captions == {
        "oxeye_daisy/0.png": ["sks a photo of a oxeye daisy", "sks oxeye daisy"],
        "rose/1.png": ["sks a photo of a rose", "sks rose"],
        "rose/2.png": ["sks my own"],
    }
    assert "1 to 2 (1.7 on average) per image" in said
    with pytest.raises(UserError, match=r"caption_template 'a rose' does not contain \{label\}"):
        dry_run("--dataset", tmp_path / "a", "--caption_template", "{label}", "a rose")


BAD = {
    "an empty list in a table": (
        lambda folder: beside(folder, {"metadata.jsonl": lines("caption", WANTED | {"1.png": []})}), (),
        r"metadata.jsonl, line 2: column 'caption' holds an empty list; write \"\" for an image without a caption",
    ),
    "null in a list of a table": (
        lambda folder: beside(folder, {"metadata.jsonl": lines("text", WANTED | {"2.png": ["a lily", None]})}), (),
        r"metadata.jsonl, line 3: column 'text' holds a list with an empty entry \(null\); remove the entry, or write its text",
    ),
    "numbers in a list of a table": (
        lambda folder: beside(folder, {"metadata.csv": 'file_name,text\n0.png,a\n1.png,"[1, \'x\']"\n2.png,b\n'}), (),
        r"metadata.csv, line 3: column 'text' holds a number \(1\) instead of a caption; write a text",
    ),
    "an empty list in Parquet": (
        lambda folder: in_rows(folder, {"caption": [["a"], [], ["b"]]}), (),
        r"train, row 1 \(1.png\): column 'caption' holds an empty list",
    ),
    "null in a list of Parquet": (
        lambda folder: in_rows(folder, {"a": ["x"] * 3, "b": [["a"], ["c"], ["b", None]]}), ("--caption_column", "a", "b"),
        r"train, row 2 \(2.png\): column 'b' holds a list with an empty entry",
    ),
    "numbers in a list of Parquet": (
        lambda folder: in_rows(folder, {"caption": ["x"] * 3, "n": [[1], [2, 3], [4]]}), ("--caption_column", "caption", "n"),
        "column 'n' holds lists of int64 instead of captions; write texts or lists of texts",
    ),
    "a missing second column": (
        lambda folder: in_rows(folder, {"caption": ["x"] * 3, "florence": ["y"] * 3}), ("--caption_column", "caption", "florense"),
        r"has no column 'florense'; it has image, caption, florence; did you mean --caption_column florence\?",
    ),
    "a missing second column of a table": (
        lambda folder: beside(folder, {"metadata.csv": "file_name,a\n0.png,x\n1.png,y\n2.png,z\n"}), ("--caption_column", "a", "b"),
        r"has no column 'b'; it has image, a; name another column by --caption_column",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_surely_wrong_gets_one_sentence(kind, dry_run, tmp_path):
    make, words, sentence = BAD[kind]
    make(tmp_path / "a")
    with pytest.raises(UserError, match=sentence) as raised:
        dry_run("--dataset", tmp_path / "a", *words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["an empty list in Parquet", "null in a list of Parquet"])
def test_a_training_without_captions_takes_images_with_unusable_lists(kind, tmp_path):
    make, words, sentence = BAD[kind]
    make(tmp_path / "a")
    config = DataConfig(dataset=str(tmp_path / "a"), resolution=16, cache_dir=str(tmp_path / "cache"))
    config.caption_column = list(words[1:])
    splits = preparing.load_splits(config, say=lambda text: None, captions=False)
    assert len(splits.train) + len(splits.validation) == len(WANTED)
    with pytest.raises(UserError, match=sentence):  # from the prepared images
        preparing.load_splits(config, say=lambda text: None)


def test_cells_that_only_look_like_lists_stay_captions(dry_run, tmp_path):
    cells = {"0.png": "[a rose]", "1.png": "[1980]", "2.png": "[x](y)]"}
    table = "file_name;text\n" + "".join(f"{name};{text}\n" for name, text in cells.items())
    beside(tmp_path / "a", {"metadata.csv": table})
    assert dry_run("--dataset", tmp_path / "a")[1] == {name: [text] for name, text in cells.items()}


def list_in(cell):
    return caption_files._list_in_cell(cell, "a.csv, line 2: column 'text'")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(TEXT, min_size=1, max_size=4), st.integers(10, 200))
def test_lists_in_cells_are_read_as_json_python_and_numpy_write_them(texts, width):
    cells = [json.dumps(texts), json.dumps(texts, ensure_ascii=False), str(texts)]
    with np.printoptions(linewidth=width):
        cells.append(str(np.array(texts, dtype=object)))  # pandas writes a list column of Parquet so
    for cell in cells:
        assert list_in(cell) == texts


def test_what_pandas_makes_of_a_list_column_is_read(tmp_path):
    in_rows(tmp_path / "a", {"caption": [["a rose", "a 'red' \"rose\""], ["a tulip"], ["the 'red' 'rose'", "b"]]})
    table = pd.read_parquet(tmp_path / "a" / "train.parquet", columns=["caption"]).assign(file_name=list(WANTED))
    table.to_csv(tmp_path / "metadata.csv", index=False)
    rows = caption_files.metadata_rows(tmp_path / "metadata.csv", [])
    assert [row["caption"] for _, row in rows] == [list(texts) for texts in table["caption"]]
    table.assign(caption=[["a rose", float("nan")], ["x"], ["y"]]).to_csv(tmp_path / "metadata.csv", index=False)
    with pytest.raises(UserError, match=r"line 2: column 'caption' holds a list with an empty entry \(null\)"):
        caption_files.metadata_rows(tmp_path / "metadata.csv", [])


@pytest.mark.parametrize(
    "cell", ["[1980]", "[2]", "[1, 2.5]", "[1 2]", "[a rose]", "[it's]", "[x](y)]", "a", "[1", "", None]
)
def test_cells_without_texts_in_quotes_stay_as_they_are(cell):
    assert list_in(cell) == cell


@pytest.mark.parametrize("cell", ["['a' 'b', 'c']", "['a', b]", "['a' ... 'b']", '[ "Peace" in bloom]', "['it's']"])
def test_cells_that_begin_like_a_list_of_texts_are_read_or_refused(cell):
    with pytest.raises(
        UserError, match=r"a.csv, line 2: column 'text' begins like a list of texts, but cannot be read"
    ):
        list_in(cell)


# What stays as it was


def bitmap(number):
    out = io.BytesIO()
    Image.new("RGB", (20, 20), (40 * number, 90, 120)).save(out, "BMP")
    return out.getvalue()


def test_sets_of_one_caption_keep_their_caches(tmp_path):
    """The names were written down before images could have several captions."""
    for number in range(4):
        write(tmp_path / "classes" / ("rose", "tulip")[number % 2] / f"{number}.bmp", bitmap(number))
        write(tmp_path / "beside" / f"{number}.bmp", bitmap(number))
        write(tmp_path / "beside" / f"{number}.txt", f"flower {number}\n\n")
        write(tmp_path / "table" / f"{number}.bmp", bitmap(number))
    rows = [json.dumps({"file_name": f"{n}.bmp", "florence": [f"flower {n}"], "captions": "x"}) for n in range(4)]
    write(tmp_path / "table" / "metadata.jsonl", "\n".join(rows))
    found = {}
    for name, changes in {"classes": {}, "beside": {}, "table": {"caption_column": ["florence"]}}.items():
        config = DataConfig(dataset=str(tmp_path / name), resolution=16, cache_dir=str(tmp_path / "cache"), **changes)
        splits = preparing.load_splits(config, say=lambda text: None)
        found[name] = splits.fingerprint
        assert splits.train.captions() == [[caption] for caption in splits.train.rows["caption"]]
    assert found == GOLDEN


GOLDEN = {"classes": "84fc272c167bdc65", "beside": "600829d000dd4e68", "table": "3616fd4caa6b7ed2"}


def test_batches_of_sets_of_one_caption_are_what_they_were():
    """Neither noise, timesteps, flips nor dropped captions move. The reference is the code before captions were drawn."""
    chance = np.random.default_rng(0)
    latents = chance.standard_normal((5, 2, 4, 3, 3)).astype(np.float32)
    text = TextCache(chance.standard_normal((4, 2, 2)).astype(np.float16), np.array([1, 2, 1, 3, 0]), np.ones(5, int))
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    inputs = train_unet.Inputs(scheduler, {"train": (latents, text)}, 0.5, None)
    config = TrainUnetConfig(train_batch_size=8, seed=3, proportion_empty_prompts=0.3, noise_offset=0.1)
    place = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    for step in range(5):
        batch = train_unet.make_batch(inputs, config, place, step)
        indices = preparing.batch_indices(5, 8, 3, step)
        draws = diffusion.draw(3, step, indices.tolist(), (2, 3, 3), 1000, noise_offset=0.1)
        rows = text.rows[indices]
        rows[draws.uniform[:, 1].numpy() < 0.3] = 0
        flips = (draws.uniform[:, 0].numpy() < 0.5).astype(int)
        moments = torch.from_numpy(latents[indices, flips])
        assert torch.equal(batch[0], 0.5 * diffusion.sample_posterior(moments, draws.posterior_noise))
        assert torch.equal(batch[1], draws.noise)
        assert torch.equal(batch[2], draws.timesteps)
        assert torch.equal(batch[3], torch.from_numpy(text.embeddings[rows]).float())


def test_a_cache_that_holds_the_first_of_several_captions_is_not_taken_for_all(dry_run, tmp_path):
    """Versions without several captions wrote such caches. They stay for the runs that read them."""
    in_rows(tmp_path / "a", {"caption": list(WANTED.values())})
    dry_run("--dataset", tmp_path / "a")
    pixels = tmp_path / "cache" / "pixels"
    (new,) = (path.parent for path in pixels.glob("*/report.json"))
    (lock,) = pixels.glob("*.lock")
    old = pixels / lock.stem
    assert new != old
    new.rename(old)
    config = DataConfig(dataset=str(tmp_path / "a"), resolution=16, cache_dir=str(tmp_path / "cache"))
    splits = preparing.load_splits(config, say=lambda text: None)
    assert splits.fingerprint == new.name
    assert old.is_dir()
    assert preparing.load_splits(config, say=lambda text: None).fingerprint == new.name


def test_evaluation_prompts_are_those_of_the_first_caption(tmp_path):
    rows = [
        {"image": png(n), "label": flower, "caption": [f"{flower} {n}", "other"]} for n, flower in enumerate("abab")
    ]
    save_dataset_folder(tmp_path / "several", {"train": rows, "test": rows})
    save_dataset_folder(tmp_path / "one", {
        split: [row | {"caption": row["caption"][0]} for row in rows] for split in ("train", "test")
    })  # fmt: skip
    prompts = {}
    rows = [{key: row[key] for key in ("image", "label")} for row in rows]
    save_dataset_folder(tmp_path / "labels", {"train": rows, "test": rows})
    for name, templates in (
        ("several", ["{label}"]),
        ("one", ["{label}"]),
        ("labels", ["a photo of a {label}", "{label}"]),
    ):
        data = DataConfig(dataset=str(tmp_path / name), resolution=16, cache_dir=str(tmp_path / "cache"))
        data.caption_template = templates
        splits = preparing.load_splits(data, say=lambda text: None)
        kind = evaluate_checkpoints.kind_of(splits)
        assert kind == ("labelled" if name == "labels" else "captioned")
        prompts[name] = evaluate_checkpoints.make_prompts(kind, splits, Recipe(data=data), 6, 0, 1)
    assert prompts["several"] == prompts["one"]
    assert set(prompts["one"].texts) == {"a 0", "b 1", "a 2", "b 3"}
    assert set(prompts["labels"].texts) == {"a photo of a a", "a photo of a b"}
    for text, wanted in zip(prompts["labels"].texts, prompts["labels"].wanted, strict=True):
        assert text == f"a photo of a {wanted['label']}"
    for recipe in ("photos", "flowers"):
        first, *others = load_recipe(recipe).data.caption_template
        assert first == DataConfig().caption_template[0]
        assert len(others) >= 3


# The command


def test_a_training_embeds_each_caption_once_and_resumes_bit_for_bit(workspace, command, tmp_path):
    shared = ["a flower", "one flower in a photo"]
    rows = [
        {"image": np.full((32, 32, 3), 8 * n, np.uint8), "caption": [f"flower {n % 6}", *shared][: 1 + n % 3]}
        for n in range(24)
    ]
    save_dataset_folder(tmp_path / "photos", {"train": rows, "validation": rows[:9]})
    shutil.copy(workspace / "tiny.yaml", tmp_path)
    words = ("--config", "tiny.yaml", "--dataset", "photos", "--vae", workspace / "vae", "--max_train_steps", 6,
             "--checkpointing_steps", 2, "--validation_steps", 6, "--report_to", "none", "--cache_dir", "cache")  # fmt: skip
    said = command("train_unet.py", *words, "--output_dir", "whole", cwd=tmp_path).stdout
    assert "1 to 3 (2.0 on average) per image" in said
    assert "computing embeddings of 9 distinct captions" in said  # six, two that are shared, and the empty one
    assert "computing embeddings of 7 distinct captions" in said  # the first of each validation image
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("checkpoint-000004", "checkpoint-000006", "pipeline/unet"):
        shutil.rmtree(tmp_path / "part" / name)
    state = read_json(tmp_path / "part" / "run.json")
    (tmp_path / "part" / "run.json").write_text(json.dumps({**state, "status": "running"}))
    assert "reusing embeddings" in command("train_unet.py", *words, "--output_dir", "part", cwd=tmp_path).stdout
    name = "pipeline/unet/diffusion_pytorch_model.safetensors"
    whole, part = load_file(tmp_path / "whole" / name), load_file(tmp_path / "part" / name)
    assert all(torch.equal(whole[key], part[key]) for key in whole)
