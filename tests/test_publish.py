"""Publishing a model with the real commands to a Hub on 127.0.0.1: card, pictures, repetition, edits, failures."""

import io
import json
import shutil

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from PIL import Image

from conftest import TINY
from loopback_hub import LoopbackHub
from t2i.config import Recipe, TrainUnetConfig
from t2i.errors import UserError
from t2i.evaluation.figures import percent
from t2i.files import read_json, write_json
from t2i.hub import model_card, publish
from t2i.pictures import sampling
from test_cards import EVALUATION, make_run

REPO = "models/me/tiny"
OPTIONS = ("--hub_model_id", "me/tiny", "--gallery_pictures", 4)
EVALUATED = ['a flower: "blue" # no', "- [x] & *y", "a blue flower", "no"]  # what YAML could read otherwise


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory):
    """The tiny run, evaluated, its data set said to be of the Hub."""
    run = tmp_path_factory.mktemp("publish") / "unet"
    shutil.copytree(workspace / "unet", run, ignore=shutil.ignore_patterns("evaluation"))
    report = {"guidance_scale": 3.0, "num_inference_steps": 2, "checkpoint": "checkpoint-000008", "prompts": 4}
    report |= {"prompt_following": {"all": 0.25}}
    write_json(run / "provenance.json", read_json(run / "provenance.json") | {"dataset_id": "me/drawn"})
    write_json(run / "evaluation/evaluation.json", {"report": report, "cells": [], "prompts": EVALUATED})
    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def failed(hub, run, command):
    """What the command said while the Hub failed, what it changed in the run folder, and the commits then."""
    before = contents(run)
    hub.fault("500", times=float("inf"), path="/commit/", seconds=0)
    failed = command(
        "publish_model.py", "--model", run, *OPTIONS, "--license", "mit", "--hub_deadline", 1,
        cwd=run.parent, env=hub.environment(), code=2, fork=True,
    )  # fmt: skip
    hub.mend()
    changed = {path for path, content in contents(run).items() if content != before.get(path)}
    return failed, changed, len(hub.commits(REPO))


@pytest.fixture(scope="module")
def published(hub, run, workspace, command, failed):
    """What training said when it published its finished run afterwards."""
    training = ("--config", "tiny.yaml", "--dataset", "dataset", "--vae", "vae", "--output_dir", run, "--push_to_hub")
    return command(
        "train_unet.py", *training, *OPTIONS, "--license", "mit", cwd=workspace, env=hub.environment()
    ).stdout


def test_a_push_that_fails_costs_one_sentence_and_nothing_on_disk(failed):
    failed, changed, commits = failed
    assert failed.stderr.strip().splitlines()[-1].startswith("error: the push to me/tiny failed: the Hub answers 500")
    assert "Traceback" not in failed.stderr
    assert "drawing 4 pictures for the card" in failed.stdout
    pictures = {f"pipeline/images/gallery-0{number}.png" for number in range(4)}
    assert changed == {"pipeline/README.md", "pipeline/.eval_results/drawn.yaml", *pictures}
    assert commits == 1  # the creation


def test_training_publishes_its_finished_run(hub, published):
    assert "reusing the finished run" in published
    assert "drawing" not in published  # the pictures are those of the attempt before
    assert f"{hub.url}/me/tiny has it now" in published
    assert "by stock diffusers: the UNet is the same" in published
    assert len(hub.commits(REPO)) == 2


def test_the_hub_holds_a_private_pipeline_with_card_and_pictures(hub, run, published):
    files = hub.files(REPO)
    assert hub.repos[REPO].private
    assert {path.split("/")[0] for path in files} == {
        *(".eval_results", ".gitattributes", "README.md", "images", "model_index.json"),
        *("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    }
    card = ModelCard(files["README.md"].decode())
    result = read_json(run / "run.json")
    assert {figure.metric_name for figure in card.data.eval_results} >= {
        "Validation diffuser loss",
        "Prompt following: combined attributes",
    }
    assert (card.data.license, card.data.datasets) == ("mit", ["me/drawn"])
    assert 'from_pretrained("me/tiny")' in card.text
    assert "<Gallery />" in card.text
    assert f"moving average (EMA 0.9999), from the end of training (UNet `{result['output_unet_hash']}`)" in card.text
    prompts = [*yaml.safe_load(TINY)["train_unet"]["validation_prompts"], *EVALUATED[:3]]
    assert [entry["text"] for entry in card.data["widget"]] == prompts
    for seed, entry in enumerate(card.data["widget"]):
        known = json.loads(Image.open(io.BytesIO(files[entry["output"]["url"]])).info["parameters"])
        assert known == {"prompt": prompts[seed], "seed": seed, "unet": result["output_unet_hash"],
                         "guidance_scale": 3.0, "num_inference_steps": 2,
                         "scheduler": "DDIMScheduler", "guidance_end": 1.0}  # fmt: skip


def edit(card):
    """A card with words and a picture of a person's own."""
    card = card.replace("## Intended Use\n", "## Intended Use\n\n- Greeting cards, as I hoped.\n")
    return card.replace(
        "widget:\n", "thumbnail: images/mine.png\nwidget:\n- text: mine\n  output:\n    url: images/mine.png\n"
    )


def test_nothing_is_drawn_or_pushed_twice_and_edits_on_the_hub_stay(hub, run, command, published):
    edited = hub.edit(REPO, {"README.md": edit(hub.files(REPO)["README.md"].decode()), "images/mine.png": b"mine"})
    uploads = len(hub.uploads)
    again = command("publish_model.py", "--model", run, *OPTIONS, cwd=run.parent, env=hub.environment()).stdout
    assert "drawing" not in again
    assert "me/tiny is up to date" in again
    assert "by stock diffusers: the UNet is the same" in again
    assert hub.commits(REPO)[-1] == edited  # the licence too, which this command leaves open
    assert len(hub.uploads) == uploads


def test_a_new_card_keeps_what_a_person_wrote(run, published):
    evaluation = read_json(run / "evaluation/evaluation.json")
    gallery = [("a red flower", "images/gallery-00.png")]
    old, new = (
        model_card.write_model_card(run, evaluation | {"report": evaluation["report"] | {"prompt_following": {"all": share}}},
                               model_card.Publication("me/tiny", license, pictures))
        for share, license, pictures in ((0.25, "mit", []), (0.5, "apache-2.0", gallery))
    )  # fmt: skip
    assert publish.merge_model_card(new, None, licensed=True) == new
    merged = publish.merge_model_card(new, edit(old.replace("widget: []", "widget:")), licensed=True)
    card = ModelCard(merged)
    assert (card.data.license, card.data["thumbnail"]) == ("apache-2.0", "images/mine.png")
    assert {entry["text"] for entry in card.data["widget"]} == {"a red flower", "mine"}
    assert [figure.metric_value for figure in card.data.eval_results][1:] == [0.5]
    assert "- Greeting cards, as I hoped." in merged
    share = percent(0.5, evaluation["report"]["prompts"])
    assert f"| Prompt following, combined attributes | {share} |" in merged
    assert publish.merge_model_card(new, merged, licensed=True) == merged


def test_another_gallery_renews_the_pictures_of_ours_alone():
    def card(*widget):
        return f"---\nlicense: unknown\nwidget: {json.dumps([{'text': url, 'output': {'url': url}} for url in widget])}\n---\n# Title\n"

    def urls(text):
        return [entry["text"] for entry in ModelCard(text).data["widget"]]

    existing = card("images/mine.png", "images/gallery-00.png", "images/gallery-01.png")
    merged = publish.merge_model_card(card("images/gallery-00.png"), existing, licensed=False)
    assert urls(merged) == ["images/gallery-00.png", "images/mine.png"]
    assert publish.merge_model_card(card("images/gallery-00.png"), merged, licensed=False) == merged
    assert urls(publish.merge_model_card(card(), merged, licensed=False)) == ["images/mine.png"]
    with pytest.raises(UserError, match="front matter"):
        publish.merge_model_card(card(), "---\na: [\n---\n# Title\n", licensed=False)


def card_of(folder, dataset, base=None):
    """The published card of a run on a data set of the Hub, fine-tuned from `base`."""
    recipe = Recipe()
    recipe.data.dataset, recipe.unet.pretrained_model_name_or_path = dataset, base
    publication = model_card.Publication("me/tiny", "mit", [])
    return model_card.write_model_card(make_run(folder, recipe), EVALUATION, publication)


@pytest.mark.parametrize(("dataset", "base"), [("me/shells", "me/other-base"), ("photos", None)])
def test_another_run_renews_the_data_set_and_base_model_of_ours_alone(dataset, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # So that no folder of this name is a data set here.
    old, new = card_of(tmp_path / "old", "me/drawn", "me/base"), card_of(tmp_path / "new", dataset, base)
    merged = publish.merge_model_card(new, old, licensed=True)
    data = ModelCard(merged).data
    assert (data.datasets, data.base_model) == (ModelCard(new).data.datasets, base)
    assert publish.merge_model_card(new, merged, licensed=True) == merged
    edited = old.replace("- me/drawn\n", "- me/drawn\n- me/mine\n").replace(
        "base_model: me/base", "base_model: me/mine"
    )
    assert ModelCard(edited).data.datasets == ["me/drawn", "me/mine"]
    data = ModelCard(publish.merge_model_card(new, edited, licensed=True)).data
    assert (data.datasets, data.base_model) == (["me/drawn", "me/mine"], "me/mine")


def test_prompts_of_the_gallery():
    recipe = Recipe(
        train_unet=TrainUnetConfig(validation_prompts=["a rose", "a  rose\n", "", "hf_abcdefghijklmnopqrst"])
    )
    assert publish.gallery_prompts(recipe, ["a", "a rose", "b", "a", "c", "d"], 4) == ["a rose", "[redacted]", "a", "c"]
    assert publish.gallery_prompts(recipe, ["a"], 1) == ["a rose"]
    assert publish.gallery_prompts(recipe, ["a"], 0) == []
    assert publish.gallery_prompts(Recipe(), [], 8) == []


def test_a_picture_is_drawn_anew_where_it_is_torn(tmp_path):
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    sampling.save_picture(tmp_path / "a.png", pixels, {"prompt": "é", "seed": 0})
    assert sampling.read_parameters(tmp_path / "a.png") == {"prompt": "é", "seed": 0}
    whole = (tmp_path / "a.png").read_bytes()
    for content in (whole[:-500], b"", b"text"):
        (tmp_path / "a.png").write_bytes(content)
        assert sampling.read_parameters(tmp_path / "a.png") is None
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert sampling.read_parameters(tmp_path / "b.png") is None
    assert sampling.read_parameters(tmp_path / "none.png") is None


def test_evaluation_results_name_the_data_set_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe()
    recipe.data.dataset, recipe.data.dataset_revision = "nelorth/oxford-flowers", "a" * 40
    run = make_run(tmp_path / "run", recipe)
    files = publish.write_eval_results(run, recipe, read_json(run / "run.json"), EVALUATION["report"])
    assert files == [".eval_results/oxford-flowers.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load((run / "pipeline" / files[0]).read_text()))
    values = {entry.task_id: entry.value for entry in entries}
    assert values["validation_diffuser_loss"] == 0.2114
    assert values["prompt_following_petal_color"] == 0.984
    assert "clip_score" not in values  # not measured
    assert len(values) == len(entries) == 9
    assert entries[-1] == EvalResultEntry(
        "nelorth/oxford-flowers", "kernel_distance", 31.2, "a" * 40,
        notes="kernel distance; 256 pictures by checkpoint-000750 at guidance scale 3, 20 steps",
    )  # fmt: skip
    provenance = read_json(run / "provenance.json")
    write_json(run / "provenance.json", provenance | {"dataset_id": None})  # it was a folder of that name
    assert publish.write_eval_results(run, recipe, read_json(run / "run.json"), EVALUATION["report"]) == []
    assert "datasets:" not in model_card.write_model_card(run, None)


@pytest.mark.parametrize(
    ("identity", "is_published"),
    [({}, True), ({"unet_hash": "new"}, True), ({"unet_hash": "old"}, False), ({"unet_hash": None}, False)],
)
def test_figures_of_earlier_weights_are_not_published(identity, is_published, tmp_path, capsys):
    write_json(tmp_path / "evaluation/evaluation.json", EVALUATION)
    write_json(tmp_path / "evaluation/run.json", {"identity": identity})
    assert publish.evaluation_of(tmp_path, "new") == (EVALUATION if is_published else {})
    said = "run scripts/evaluate_checkpoints.py again, then publish again" in capsys.readouterr().out
    assert said != is_published


def test_another_model_on_the_hub_is_told(workspace, monkeypatch):
    import diffusers

    pipeline = sampling.load_pipeline(workspace / "unet")
    other = sampling.load_pipeline(workspace / "unet" / "checkpoint-000004")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(UserError, match="is not what was published \\(UNet"):
        publish.check_loads_back(pipeline, "me/tiny", "0" * 40, "a red flower", 3.0)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [(None, "is not a run folder"), ("running", "is not finished"), ("finished", "holds no pipeline")],
)
def test_what_cannot_be_published(tmp_path, state, sentence):
    if state:
        write_json(tmp_path / "run.json", {"status": state})
    with pytest.raises(UserError, match=sentence):
        publish.find_run(str(tmp_path))


def test_training_asks_for_the_repository_before_it_starts():
    with pytest.raises(UserError, match="--hub_model_id is missing"):
        publish.check_push(TrainUnetConfig(push_to_hub=True), None)
