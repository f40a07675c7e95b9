"""The captioning command: every source, resuming, edits, hostile captions, and the way from photos to the Hub and back."""

import fcntl
import importlib
import json
import os
import sys

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

import caption_to_hub
from conftest import SCRIPTS, photos
from loopback_hub import LoopbackHub
from prove_captions import draw_photos, prove
from small_models import blip, florence
from t2i.captions import captioners, ledger
from t2i.config import CaptionConfig, Recipe
from t2i.data.images import HEIF_FIX
from t2i.errors import UserError

FAST = ("--caption_batch_size", 4, "--max_new_tokens", 6, "--num_beams", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return florence(tmp_path_factory.mktemp("models") / "florence")


@pytest.fixture
def drawn(tmp_path):
    return draw_photos(tmp_path / "photos", 12)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """The script's `main` in this process, which saves the seconds of its imports."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["caption_to_hub.py", *map(str, arguments)])
        caption_to_hub.main()

    return run


def line(image, caption="a flower"):
    return {**ledger.Key(image, "m", "r", "t", "p")._asdict(), "caption": caption}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_florence_captions_resume_edits_and_added_images(drawn, model, command, run_main, capsys, tmp_path):
    words = ("--dataset", drawn, "--captioner", model, "--output_dir", "out", *FAST, "--audit_tokenizer", model)
    first = command("caption_to_hub.py", *words, cwd=tmp_path)
    made = rows_of(tmp_path / "out")
    assert len({row["image"] for row in made}) == len(made) == 12
    assert all(row["caption"] and row["task"] == "<DETAILED_CAPTION>" for row in made)
    assert "audit of 12 captions" in first.stdout
    run_main(*words)
    assert "nothing to do" in capsys.readouterr().out
    assert rows_of(tmp_path / "out") == made
    # edited by hand, by an editor that leaves off the last line's end; two photos are added, one of them a copy
    made[3]["caption"] = "a flower, as a person described it"
    text = "\n".join(json.dumps(row) for row in made)
    (tmp_path / "out" / "captions.jsonl").write_text(text, encoding="utf-8")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(drawn / "new.png")
    (drawn / "copy.png").write_bytes((drawn / "0003.png").read_bytes())
    run_main(*words)
    assert "captions: 12 exist already, 1 will be made" in capsys.readouterr().out
    assert rows_of(tmp_path / "out")[:12] == made
    assert len(rows_of(tmp_path / "out")) == 13
    table = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert sum(text == "a flower, as a person described it" for text in table["caption"]) == 2
    assert "| Edited by hand | 2 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (drawn / "0000.png").read_bytes() in [
        row["bytes"] for row in table.cast_column("image", datasets.Image(decode=False))["image"]
    ]


STAND_IN_FOR_PILLOW_HEIF = """
from PIL import Image, ImageFile

class HeifFile(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        self._mode, self._size = "RGB", (32, 32)

    def load(self):
        self.im = Image.new("RGB", self.size, "red").im

def register_heif_opener():
    Image.register_open("HEIF", HeifFile, lambda head: head[4:12] == b"ftypheic")
"""


@pytest.mark.skipif(not HEIF_FIX, reason="pillow-heif is installed")
def test_photos_of_a_phone_are_captioned_once_their_decoder_is_installed(drawn, run_main, command, capsys, tmp_path):
    (drawn / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (drawn / "phone.txt").write_text("a red square")
    words = ("--dataset", drawn, "--captioner", "existing", "--output_dir", "out", "--audit_tokenizer", tmp_path / "no")
    run_main(*words, "--max_bad_share", 0.5)
    assert "1 of 13 images cannot be used" in capsys.readouterr().out
    (tmp_path / "pillow_heif.py").write_text(STAND_IN_FOR_PILLOW_HEIF)
    script = SCRIPTS / "caption_to_hub.py"
    later = f"import runpy, sys; sys.path[:0] = {[str(tmp_path), str(SCRIPTS)]}; runpy.run_path({str(script)!r}, run_name='__main__')"
    (tmp_path / "installed.py").write_text(later)
    command(tmp_path / "installed.py", *words, cwd=tmp_path, fork=True)
    assert "a red square" in datasets.load_dataset(str(tmp_path / "out"), split="train")["caption"]


def test_captions_of_every_kind_stay_valid(run_main, tmp_path):
    hostile = ["", "x" * 10_000, "زهرة حمراء جميلة", "a\0b", "---\nlicense: evil\n---", "| a | b |\n|---|---|", "```\ncode",
               "<script>alert(1)</script>", "<!-- t2i:audit end -->", "{{ 7 * 7 }} {% raw %}", "half an emoji \ud83d",
               "a red flower"]  # fmt: skip
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(len(hostile)):
        Image.new("RGB", (32, 32), (number * 20, 100, 50)).save(folder / f"{number:02d}.png")
    lines = [json.dumps({"file_name": f"{number:02d}.png", "caption": text}) for number, text in enumerate(hostile)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = (
        "--dataset",
        folder,
        "--captioner",
        "existing",
        "--output_dir",
        "out",
        "--audit_tokenizer",
        tmp_path / "none",
    )
    run_main(*words)
    captions = datasets.load_dataset(str(tmp_path / "out"), split="train")["caption"]
    assert list(captions) == [" ".join(text.replace("\0", " ").replace("\ud83d", "?").split()) for text in hostile]
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown"
    assert card.content.count("<!-- t2i:audit end -->") == 1
    assert "<script>" not in card.content
    with pytest.raises(UserError, match="empty"):
        run_main(*words, "--fail_on", "empty=0", "duplicates=1")


def test_a_dry_run_says_what_was_understood_and_leaves_nothing(run_main, drawn, tmp_path, capsys):
    run_main("--dataset", drawn, "--captioner", "nowhere", "--output_dir", "out", "--dry_run")
    said = capsys.readouterr().out
    assert "images        train 12" in said
    assert "captions      to be made by nowhere" in said
    (drawn / "0003.caption").write_text("another")
    run_main("--dataset", drawn, "--captioner", "existing", "--output_dir", "out", "--dry_run")
    said = capsys.readouterr().out
    assert "12 from .txt files" in said
    assert "caption files beside another that is read: 1 (0003.caption)" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "numbers").mkdir()
    drawn.rename(tmp_path / "numbers" / "1")
    with pytest.raises(UserError, match="its classes are numbers"):
        run_main("--dataset", tmp_path / "numbers", "--captioner", "label", "--output_dir", "out", "--dry_run")


def test_an_edited_caption_stays_when_the_text_it_replaced_changes(drawn, run_main, tmp_path, capsys):
    words = ("--dataset", drawn, "--captioner", "existing", "--output_dir", "out", "--audit_tokenizer", tmp_path / "no")
    run_main(*words)
    rows = rows_of(tmp_path / "out")
    rows[3]["caption"] = "as a person described it"
    (tmp_path / "out" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (drawn / "0003.txt").write_text("another text")
    (drawn / "0004.txt").write_text("a new text")
    run_main(*words)
    assert "1 captions that you edited are kept" in capsys.readouterr().out
    captions = datasets.load_dataset(str(tmp_path / "out"), split="train")["caption"]
    assert {"as a person described it", "a new text"} <= set(captions)
    assert "another text" not in captions


def test_existing_captions_of_parquet_are_named(run_main, drawn, tmp_path, capsys):
    images = [
        {"bytes": path.read_bytes(), "path": None} for path in sorted(drawn.glob("*.*"))[:3] if path.suffix != ".txt"
    ]
    rows = {"image": images, "text": [["a rose", "a red one"]] * len(images)}
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "parquet" / "train.parquet")
    run_main("--dataset", tmp_path / "parquet", "--captioner", "existing", "--output_dir", "out", "--dry_run")
    said = capsys.readouterr().out
    assert "captions      column 'text'" in said
    assert "2 per image: each training step draws one of them" in said


def test_a_damaged_photo_whose_name_holds_a_line_separator_is_counted_on_the_card(run_main, drawn, tmp_path):
    (drawn / "a\u2028b.png").write_bytes(b"damaged")
    words = ("--captioner", "existing", "--audit_tokenizer", "no", "--max_bad_share", 0.5)
    run_main("--dataset", drawn, "--output_dir", "out", *words)
    assert "| not an image | 1 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_damaged_images_in_other_columns_are_not_decoded(run_main, drawn, model, tmp_path):
    images = [path.read_bytes() for path in sorted(drawn.glob("*.png"))[:3]]
    cut = [{"bytes": data[:150], "path": None} for data in images]
    columns = {"image": [{"bytes": data, "path": None} for data in images], "mask": cut, "text": ["a", "b", "c"],
               "painter": ["x", "y", "z"], "size": [1, 2, 3]}  # fmt: skip
    rows = datasets.Dataset.from_dict(columns)
    for column in ("image", "mask"):
        rows = rows.cast_column(column, datasets.Image())
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(OSError, match=r"[Tt]runcated"):
        datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))[0]
    run_main(
        "--dataset", "set", "--captioner", "existing", model, "--output_dir", "out", *FAST, "--audit_tokenizer", "no"
    )
    made = datasets.load_dataset(str(tmp_path / "out"), split="train").cast_column(
        "image", datasets.Image(decode=False)
    )
    assert made.column_names == ["image", "caption", "painter", "size"]
    assert [image["bytes"] for image in made["image"]] == images
    assert [captions[0] for captions in made["caption"]] == ["a", "b", "c"]
    assert (list(made["painter"]), list(made["size"])) == (["x", "y", "z"], [1, 2, 3])


def test_several_tasks_give_an_image_several_captions(drawn, model, run_main, capsys, tmp_path):
    tasks = ("<CAPTION>", "<MORE_DETAILED_CAPTION>")
    words = ("--dataset", drawn, "--output_dir", "out", *FAST, "--audit_tokenizer", model)
    run_main(*words, "--captioner", model, "--task", tasks[0])
    single = rows_of(tmp_path / "out")
    assert datasets.load_dataset(str(tmp_path / "out"), split="train").features["caption"] == datasets.Value("string")
    run_main(*words, "--captioner", "existing", model, "--task", *tasks)
    rows = rows_of(tmp_path / "out")
    assert rows[:12] == single  # what was made stays, and belongs to its task
    assert len(rows) == 36
    assert {task: sum(row["task"] == task for row in rows) for task in (*tasks, "")} == dict.fromkeys((*tasks, ""), 12)
    table = datasets.load_dataset(str(tmp_path / "out"), split="train")
    texts = {path.stem: path.read_text().strip() for path in drawn.glob("*.txt")}
    by_image = {}
    for row in rows:
        by_image.setdefault(row["file"], []).append(row)
    for captions in table["caption"]:
        assert captions[0] in texts.values()
        (of_image,) = (rows for rows in by_image.values() if captions[0] in {row["caption"] for row in rows})
        assert set(captions) == {row["caption"] for row in of_image if row["caption"]}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Captions per image | " in card
    assert "The column `caption` holds a list of captions" in card
    assert "| Task | &lt;CAPTION&gt;, &lt;MORE" in card
    # an edit of one of an image's captions leaves the others alone, and a second run makes nothing
    rows[20]["caption"] = "as a person described it"
    (tmp_path / "out" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    capsys.readouterr()
    run_main(*words, "--captioner", "existing", model, "--task", *tasks)
    assert rows_of(tmp_path / "out") == rows
    table = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert sum("as a person described it" in captions for captions in table["caption"]) == 1
    run_main(*words, "--captioner", "existing", model, "--task", *tasks)
    assert "nothing to do" in capsys.readouterr().out


def test_labels_and_lists_give_several_captions_and_edits_stay_with_their_text(run_main, tmp_path, capsys):
    for number in range(4):
        folder = tmp_path / "photos" / ("rose", "tulip")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 50, 100, 50)).save(folder / f"{number}.png")
    words = ("--dataset", "photos", "--captioner", "label", "--output_dir", "out", "--audit_tokenizer", "none")
    templates = ("--caption_template", "a photo of a {label}", "{label}", "--caption_prefix", "sks")
    run_main(*words, *templates, "--dry_run")
    assert "2 per image: each training step draws one of them" in capsys.readouterr().out
    run_main(*words, *templates, "--fail_on", "duplicates=0")  # those of one label share captions on purpose
    table = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert sorted(table["caption"]) == 2 * [["sks a photo of a rose", "sks rose"]] + 2 * [
        ["sks a photo of a tulip", "sks tulip"]
    ]
    assert "| Template | a photo of a {label}; {label} |" in (tmp_path / "out" / "README.md").read_text()
    rows = rows_of(tmp_path / "out")
    edited = next(row for row in rows if row["caption"] == "rose")
    edited["caption"] = "my rose"
    (tmp_path / "out" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_main(*words, *templates[:2], "a picture of a {label}", *templates[3:])
    captions = list(datasets.load_dataset(str(tmp_path / "out"), split="train")["caption"])
    assert captions.count(["sks a photo of a rose", "sks my rose"]) == 1  # its text has changed, and its edit is kept
    assert captions.count(["sks a photo of a rose", "sks a picture of a rose"]) == 1
    assert "1 captions that you edited are kept" in capsys.readouterr().out


def test_a_class_column_named_as_captions_gives_the_names(tmp_path):
    features = datasets.Features(
        {"kind": datasets.ClassLabel(names=["daisy", "rose"]), "more": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_dict({"kind": [1, 0, -1], "more": ["red", None, "none"]}, features=features)
    recipe = Recipe()
    recipe.data.caption_column = ["kind", "more"]
    assert caption_to_hub.existing_texts(rows, "train", recipe) == [["rose", "red"], ["daisy"], ["none"]]


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_tasks_that_no_captioner_takes_are_refused_before_photos_are_read(more, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(caption_to_hub, "inspect_photos", lambda *_: pytest.fail("the photos are read"))
    words = ("--dataset", draw_photos(tmp_path / "photos", 1), "--output_dir", "out", "--task", "<CAPTION>", "<OD>")
    with pytest.raises(UserError, match="names 2 tasks, which only Florence-2 takes; name one task"):
        run_main(*words, "--captioner", blip(tmp_path / "blip"), "existing", *more)


@pytest.mark.parametrize("script", ["train_vae", "train_unet"])
def test_a_training_s_dry_run_ends_after_the_table(script, drawn, tmp_path, monkeypatch, capsys):
    drawn.rename(tmp_path / "rose")
    words = ("--dataset", tmp_path, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / ".cache", "--dry_run")
    monkeypatch.setattr(sys, "argv", [script, *map(str, words), "--resolution", "16"])
    importlib.import_module(script).main()
    said = capsys.readouterr().out
    assert "classes       1, 12 images each (rose)" in said
    assert "12 from .txt files" in said
    assert "rose/0000.png → " in said
    assert not (tmp_path / "run").exists()


def test_a_lock_that_another_process_of_the_run_opened_first_is_no_stranger(tmp_path):
    for name in (".lock", ".lock-1", ".lock-12"):
        (tmp_path / name).touch()
        caption_to_hub.require_own(tmp_path, tmp_path / "photos")
    (tmp_path / ".lockers").touch()
    with pytest.raises(UserError, match="holds something else"):
        caption_to_hub.require_own(tmp_path, tmp_path / "photos")


def test_nothing_is_written_where_something_else_lies(drawn, run_main, tmp_path):
    """`data/` of another project, a training's run.json, the photos themselves."""
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "mine.txt").write_text("dear")
    for folder in (tmp_path / "project", drawn, drawn / "captioned"):
        with pytest.raises(UserError, match=r"holds something else|lies in the data set"):
            run_main("--dataset", drawn, "--captioner", "existing", "--output_dir", folder)
    assert (tmp_path / "project" / "data" / "mine.txt").read_text() == "dear"
    assert len(list(drawn.iterdir())) == 24


def test_columns_that_differ_by_split_become_text(run_main, tmp_path):
    for split, year in (("train", 1990), ("test", "about 1990")):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(folder / "a.png")
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": "a red one", "year": year}))
    run_main(
        "--dataset",
        tmp_path / "photos",
        "--captioner",
        "existing",
        "--output_dir",
        "out",
        "--audit_tokenizer",
        tmp_path / "no",
    )
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert (loaded["train"]["year"][0], loaded["test"]["year"][0]) == ("1990", "about 1990")


def test_prose_edited_here_and_on_the_hub_is_not_lost(monkeypatch, tmp_path):
    from t2i.hub import upload
    from t2i.hub.model_card import BEGIN, END

    card = f"---\nlicense: unknown\n---\n{{}}\n{BEGIN.format('audit')}\n{{}}\n{END.format('audit')}\n"
    (tmp_path / caption_to_hub.WORK).mkdir()
    (tmp_path / caption_to_hub.WORK / "pushed.md").write_text(card.format("prose", "old"))
    (tmp_path / "README.md").write_text(card.format("mine", "new"))

    def push_folder(*arguments, merge_card, **options):
        merge_card(card.format("theirs", "old"))
        return upload.Pushed("https://hub/x", "0" * 40, changed=True)

    monkeypatch.setattr(upload, "push_folder", push_folder)
    caption_to_hub.push(tmp_path, CaptionConfig(hub_dataset_id="me/x"))
    assert "theirs" in (tmp_path / "README.md").read_text()
    assert "mine" in (tmp_path / "README.local.md").read_text()


def test_photos_that_say_where_they_were_taken_are_counted_before_a_push(run_main, monkeypatch, tmp_path, capsys):
    (tmp_path / "photos/rose").mkdir(parents=True)
    for number, (place, ending) in enumerate(
        ((True, "jpg"), (True, "png"), (True, "webp"), (False, "jpg"), (False, "png"))
    ):
        exif = Image.Exif()
        exif[0x0110] = "phone"
        if place:
            exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 0.0)})
        Image.new("RGB", (32, 32), (40 * number, 9, 9)).save(tmp_path / f"photos/rose/{number}.{ending}", exif=exif)
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        words = ("--dataset", tmp_path / "photos", "--captioner", "label", "--output_dir", "out", "--audit_tokenizer",
                 tmp_path / "none", "--hub_dataset_id", "me/photos")  # fmt: skip
        run_main(*words)
        assert "GPS" not in capsys.readouterr().out
        run_main(*words, "--push_to_hub")
    said = capsys.readouterr().out
    assert (
        "NOTE: 3 photos contain their location (GPS in EXIF), and go to me/photos unchanged; to prevent that, remove"
        in said
    )
    assert said.index("GPS") < said.index("has it now")


def test_parquet_files_of_others_survive_a_push(monkeypatch, tmp_path, capsys):
    """Splits that were not read, and other configurations, below data/ or not. Earlier shards of the own split go."""
    names = ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002", "unsupervised-00000-of-00001",
             "small/train-00000-of-00001", "train-extra")  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"captioned")
    (tmp_path / "README.md").write_text("---\nlicense: unknown\n---\n")
    (tmp_path / caption_to_hub.WORK).mkdir()
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        hub.create("datasets/me/photos")
        hub.edit("datasets/me/photos", {f"data/{name}.parquet": "another's" for name in names})
        caption_to_hub.push(tmp_path, CaptionConfig(hub_dataset_id="me/photos"))
        files = {name: content for name, content in hub.files("datasets/me/photos").items() if name.endswith("parquet")}
        caption_to_hub.push(tmp_path, CaptionConfig(hub_dataset_id="me/photos"))
    others = [f"data/{name}.parquet" for name in sorted(names[3:])]
    assert files == {"data/train-00000-of-00001.parquet": b"captioned", **dict.fromkeys(others, b"another's")}
    told = (
        f"NOTE: 3 other Parquet files stay in me/photos ({', '.join(others)}); delete them there if they are of no use"
    )
    assert capsys.readouterr().out.count(told) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--captioner", "microsoft/Florence-2-large"], "florence-community/Florence-2-large"),
        (["--captioner", "MODEL", "--task", "<CAPTIN>"], "<CAPTION>"),
        (["--captioner", "MODEL", "--task", "<OD>", "--prompt", "x"], "takes no prompt"),
        (["--captioner", "MODEL", "--task", "<REGION_TO_CATEGORY>"], "needs --prompt"),
        (
            ["--captioner", "BLIP", "--task", "<CAPTION>", "<OD>"],
            "names 2 tasks, which only Florence-2 takes; name one",
        ),
        (["--captioner", "MODEL", "florence2", "--captioner_revision", "main"], "could belong to several captioners"),
        (["--captioner", "nowhere/at/all"], "neither florence2"),
        (["--captioner", "PHOTOS"], "config.json"),
        (["--captioner", "label"], "no labels"),
        (["--captioner", "label", "--caption_template", "a flower"], "'a flower' does not contain {label}; write"),
        (["--captioner", "existing", "--fail_on", "emty=0"], "empty"),
        (["--captioner", "existing", "--push_to_hub"], "--hub_dataset_id"),
    ],
)
def test_mistakes(arguments, sentence, drawn, model, tmp_path, run_main):
    """A sentence each, before anything is captioned."""
    places = {"MODEL": model, "PHOTOS": drawn}
    places |= {"BLIP": blip(tmp_path / "blip")} if "BLIP" in arguments else {}
    words = [places.get(word, word) for word in arguments]
    with pytest.raises(UserError) as error:
        run_main("--dataset", drawn, "--output_dir", tmp_path / "out", *words)
    assert sentence in str(error.value)
    assert not (tmp_path / "out" / "captions.jsonl").exists()


def test_legacy_folder_is_refused_and_its_code_not_run(tmp_path):
    code = tmp_path / "modeling_florence2.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    settings = {
        "model_type": "florence2",
        "auto_map": {"AutoConfig": "modeling_florence2.X"},
        "vision_config": {"model_type": "davit"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="never run here"):
        captioners.resolve(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_weights_that_need_unpickling_are_refused(tmp_path, model):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="safetensors"):
        captioners.resolve(str(tmp_path))


def test_other_models_caption_through_the_auto_classes(tmp_path):
    import torch

    images = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 40), "blue")]
    folder = blip(tmp_path / "blip")
    for prompt in ("", "a red"):
        config = CaptionConfig(max_new_tokens=5, num_beams=1, prompt=prompt)
        name = captioners.resolve(str(folder))
        (captioner,) = captioners.load(name, config, torch.device("cpu"), torch.float32).values()
        texts = captioner.read(captioner.generate(captioner.prepare(images)), images)
        assert len(texts) == 2
        assert not any("[" in text or (prompt and text.startswith(prompt)) for text in texts)


@pytest.mark.parametrize("task", ["<OD>", "<OCR_WITH_REGION>", "<CAPTION_TO_PHRASE_GROUNDING>"])
def test_structured_tasks_become_words(task, model):
    import torch

    config = CaptionConfig(task=[task], prompt="a flower" if "GROUNDING" in task else "", max_new_tokens=6)
    captioner = captioners.load(captioners.resolve(str(model)), config, torch.device("cpu"), torch.float32)[task]
    images = [Image.new("RGB", (40, 30), "red")]
    assert all(isinstance(text, str) for text in captioner.read(captioner.generate(captioner.prepare(images)), images))
    answer = {"labels": ["</s>red flower", "leaf", "red flower"], "bboxes": []}
    assert captioners._labels(answer) == "red flower, leaf"


def test_batches_are_halved_until_they_fit(drawn, tmp_path):
    """A captioner that has room for two images only, as `generate` says it on a GPU."""
    from t2i.data.sources import find_source
    from t2i.training.distributed import make_accelerator

    recipe, sizes = Recipe(), []
    recipe.data.dataset, recipe.caption.caption_batch_size = str(drawn), 8

    def generate(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return images

    captioner = captioners.Captioner(
        lambda images: images, generate, lambda ids, images: [str(image.size) for image in images]
    )
    accelerator = make_accelerator()
    source = find_source(recipe.data)
    rows = caption_to_hub.open_rows(source, recipe, tmp_path, accelerator)
    found = list(caption_to_hub.inspect_photos(source, rows, recipe))
    work = [(ledger.Key(photo.id, "", "", "", ""), photo) for photo in found]
    done = list(caption_to_hub.caption_batches(work, captioner, source, rows, recipe, accelerator))
    assert [item for batch, _ in done for item in batch] == work  # all, once, in order
    assert sizes[:2] == [8, 4]
    assert max(sizes[2:]) == 2
    sizes.clear()
    recipe.caption.caption_batch_size = 1
    captioner.generate = lambda images: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(UserError, match="single image"):
        list(caption_to_hub.caption_batches(work, captioner, source, rows, recipe, accelerator))


# --- The ledger ------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_taken_off_and_costs_nothing(tmp_path):
    path = tmp_path / "captions.jsonl"
    ledger.append(path, [line("a"), line("b", "línea\nزهرة \ud800")])
    whole = path.read_bytes()
    for cut in range(1, 60):
        path.write_bytes(whole + json.dumps(line("c")).encode()[:cut])
        assert [key.image for key in ledger.read(path)] == ["a", "b"]
        ledger.append(path, [line("d")])
        assert [key.image for key in ledger.read(path)] == ["a", "b", "d"]
    assert len((tmp_path / "captions.jsonl.torn").read_bytes().splitlines()) == 59  # what was cut off is kept


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (json.dumps(line("b", "BIG")).replace("BIG", 'a "BIG" tulip'), "JSON: Expecting ',' delimiter"),
        (json.dumps([line("a"), line("b")]), "it is not a JSON object"),
        (json.dumps({**line("b"), "caption": None}), "caption must be there, as text"),
        ("null", "it is not a JSON object"),
    ],
)
def test_a_last_line_that_was_edited_is_never_cut_off(broken, reason, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(line("x")) + "\n" + broken)
    for act in (ledger.read, lambda file: ledger.append(file, [line("c")])):
        with pytest.raises(UserError, match=reason):
            act(path)
    assert path.read_text().endswith(broken)


def test_a_slip_of_the_hand_names_the_line(tmp_path):
    path = tmp_path / "captions.jsonl"
    ledger.append(path, [line("a"), line("b"), line("c")])
    text = path.read_text()
    path.write_text(text.replace('"image": "b"', '"image": "b'))
    with pytest.raises(UserError, match="line 2"):
        ledger.read(path)
    path.write_text(text.rstrip("\n"))  # an editor left off the end of the last line: it still counts
    ledger.append(path, [line("d")])
    assert [key.image for key in ledger.read(path)] == ["a", "b", "c", "d"]


def test_of_two_lines_for_a_caption_the_later_one_is_used(tmp_path):
    path = tmp_path / "captions.jsonl"
    ledger.append(path, [line("a", "a rose"), line("b", "a tulip")])
    ledger.append(path, [line("a", "a red rose")])
    assert {key.image: row["caption"] for key, row in ledger.read(path).items()} == {"a": "a red rose", "b": "a tulip"}


def test_another_run_in_the_same_folder_is_refused(drawn, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr("t2i.run_lock.WAIT_FOR_UNKNOWN_S", 0.0)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="another run is at work"):
            run_main("--dataset", drawn, "--captioner", "existing", "--output_dir", "out")


def test_killed_captioning_loses_nothing_and_makes_nothing_twice(tmp_path, model, ranks):
    """A sample of `make prove-captions`, on two processes, which also covers one writing beside the other."""

    def run_last(arguments):  # what is not killed needs no launcher
        return ranks("caption_to_hub.py", *arguments, cwd=tmp_path, env={"ACCELERATE_USE_CPU": "true"})

    drawn = draw_photos(tmp_path / "photos", 60)
    print(prove(tmp_path, drawn, model, processes=2, kills=1, seed=os.getpid(), run_last=run_last))


# --- From photos to the Hub and back ---------------------------------------------------------------------------------

LOAD_BACK = """
import sys, datasets, numpy as np, torch
from diffusers import DiffusionPipeline
table = datasets.load_dataset("me/flowers-12")
print({split: part.num_rows for split, part in table.items()}, table["train"][0]["caption"])
pipeline = DiffusionPipeline.from_pretrained("me/flowers-model")
picture = pipeline("a photo of a daisy", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
print(type(pipeline).__name__, picture.size)
"""


def test_from_photos_to_the_hub_and_back(workspace, command, run_main, model, tmp_path):
    chosen = sorted(photos().rglob("*.jpg"))[::4]  # 180 and 60 of 720 and 240, of every class
    source = tmp_path / "source"
    for file in chosen:
        copy = source / file.relative_to(photos())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    with LoopbackHub() as hub:
        online = hub.environment()
        part = tmp_path / "part"  # the native path to its end, on some photos
        part.mkdir()
        for number, file in enumerate(chosen[::15]):
            (part / f"{number}.jpg").write_bytes(file.read_bytes())
        run_main("--dataset", part, "--captioner", model, "--output_dir", "florence", *FAST, "--audit_tokenizer", model)
        assert len(rows_of(tmp_path / "florence")) == 16
        words = ("caption_to_hub.py", "--dataset", source, "--captioner", "label", "--output_dir", "captioned",
                 "--audit_tokenizer", workspace / "unet", "--push_to_hub", "--hub_dataset_id", "me/flowers-12")  # fmt: skip
        command(*words, cwd=tmp_path, env=online)
        assert len(rows_of(tmp_path / "captioned")) == len({file.read_bytes() for file in source.rglob("*.jpg")})
        commits = len(hub.commits("datasets/me/flowers-12"))
        again = command(*words, cwd=tmp_path, env=online)
        assert "is up to date" in again.stdout
        assert len(hub.commits("datasets/me/flowers-12")) == commits
        command("train_unet.py", "--config", workspace / "tiny.yaml", "--dataset", "me/flowers-12", "--vae", workspace / "vae",
                "--output_dir", "model", "--max_train_steps", 2, "--report_to", "none", "--validation_prompts", "a photo of a daisy",
                "--push_to_hub", "--hub_model_id", "me/flowers-model", cwd=tmp_path, env=online)  # fmt: skip
        (tmp_path / "load_back.py").write_text(LOAD_BACK)
        back = command(tmp_path / "load_back.py", cwd=tmp_path, env=online, fork=True)
        assert "{'train': 180, 'test': 60} a photo of a" in back.stdout
        assert "StableDiffusionPipeline (32, 32)" in back.stdout


def test_a_prefix_comes_before_each_caption_and_leaves_those_made_alone(run_main, tmp_path, capsys):
    for number, name in enumerate(("rose", "rose", "lily")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 20, 100, 50)).save(tmp_path / f"photos/{name}/{number}.png")
    words = (
        "--dataset",
        tmp_path / "photos",
        "--captioner",
        "label",
        "--output_dir",
        "out",
        "--caption_template",
        "a {label}",
    )
    words += (
        "--audit_tokenizer",
        tmp_path / "none",
        "--fail_on",
        "duplicates=0",
    )  # images of a class share theirs on purpose
    run_main(*words, "--caption_prefix", "sks style,")
    table = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert sorted(table["caption"]) == ["sks style, a lily", "sks style, a rose", "sks style, a rose"]
    assert {row["caption"] for row in rows_of(tmp_path / "out")} == {"a lily", "a rose"}
    said = capsys.readouterr().out
    assert "each begins with 'sks style,' (--caption_prefix)" in said
    assert "→ sks style, a " in said
    assert "| Prefix of each caption | sks style, |" in (tmp_path / "out/README.md").read_text()
    run_main(*words)  # another prefix, or none, is another data set
    assert set(datasets.load_dataset(str(tmp_path / "out"), split="train")["caption"]) == {"a lily", "a rose"}


def test_without_the_hub_no_tokenizer_of_two_tokens_counts(monkeypatch, tmp_path, capsys):
    """transformers makes a tokenizer of its special tokens alone where it gets no files."""
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow/tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    assert caption_to_hub.load_tokenizer(str(tmp_path / "hollow")) is None
    assert "holds no vocabulary" in capsys.readouterr().out
    assert caption_to_hub.load_tokenizer("nobody/nowhere") is None  # the tests have no network
    said = capsys.readouterr().out
    assert said.startswith("caption lengths are not measured: ")
    assert "--audit_tokenizer" in said


@pytest.mark.parametrize(
    ("text", "prompt", "rest"),
    [
        ("a flower in the grass, red", "A flower in the grass,", "red"),
        ("a flower , red", "A flower, ", "red"),
        ("an apple", "a", "an apple"),
        ("a rose", "", "a rose"),
        ("a tulip", "A rose", "a tulip"),
    ],
)
def test_a_prompt_is_taken_off_in_any_capitals_and_spaces(text, prompt, rest):
    assert captioners.without_prompt(text, prompt) == rest
