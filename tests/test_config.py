"""Settings: defaults <- recipe <- command line, and what is refused."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from t2i.config import RECIPES, Recipe, check_unet, check_vae, load_recipe, parse, to_dict
from t2i.errors import UserError

SECTIONS = ("data", "vae", "unet", "train_unet")


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_survives_being_resolved(path, tmp_path):
    loaded = load_recipe(path.stem)
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(to_dict(loaded)))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == loaded


def test_the_command_line_wins_over_the_recipe_over_the_defaults(tmp_path):
    path = recipe(tmp_path, "train_unet: {learning_rate: 3e-4, seed: 5}\n")
    chosen = parse(SECTIONS, "", ["--config", path, "--seed", "7"])
    assert (chosen.train_unet.learning_rate, chosen.train_unet.seed) == (3e-4, 7)
    assert chosen.train_unet.adam_beta1 == 0.9


def test_the_names_of_diffusers_scripts_are_accepted():
    for name in ("--dataset", "--dataset_name", "--train_data_dir"):
        assert parse(SECTIONS, "", [name, "x/y"]).data.dataset == "x/y"
    chosen = parse(SECTIONS, "", ["--validation_prompts", "a b", "c", "--num_train_epochs", "3", "--snr_gamma", "5"])
    assert chosen.train_unet.validation_prompts == ["a b", "c"]
    assert (chosen.train_unet.num_train_epochs, chosen.train_unet.snr_gamma) == (3, 5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trian_unet: {}\n", "did you mean 'train_unet'"),
        ("train_unet: {learnin_rate: 1}\n", "did you mean 'learning_rate'"),
        ("train_unet: {use_ema: 'yes'}\n", "use_ema = 'yes'"),
        ("train_unet: {use_ema: 1}\n", "use_ema = 1"),
        ("train_unet: {proportion_empty_prompts: 1.5}\n", "proportion_empty_prompts = 1.5"),
        ("train_unet: 3\n", "must hold keys and values"),
        ("- a\n", "must hold sections"),
        ("train_unet: [\n", "not valid YAML"),
        ("unet: {prediction_type: x0}\n", "prediction_type = 'x0' is not usable: give 'epsilon' or 'v_prediction'"),
        ("train_unet: {seed: 2.5}\n", "seed = 2.5 is not usable: give a whole number, without a unit"),
        ("train_unet: {seed: true}\n", "seed = True is not usable: give a number"),
        ("train_unet: {max_train_steps: true}\n", "max_train_steps = True is not usable: give a number"),
        ("train_unet: {learning_rate: fast}\n", "learning_rate = 'fast' is not usable: give a number"),
        ("train_unet: {learning_rate: 0}\n", "it must be greater than 0"),
        ("train_unet: {use_ema: 'yes'}\n", "write true or false, without quotes"),
        ("train_unet: {run_name: 3}\n", "run_name = 3 is not usable: it is not text; put it in quotes"),
        (
            "data: {image_column: no}\n",
            "image_column = False is not usable: YAML reads no as false; write 'no' in quotes",
        ),
        ("data: {image_column: }\n", "it is empty; give a value, or delete the key"),
        ("vae: {vae_channels: 32}\n", "vae_channels = 32 is not usable: give a list, such as [a, b]"),
        ("train_unet: {train_batch_size: 0}\n", "it must be at least 1"),
        (
            "vae: {}\n\nunet: {}\nvae: {}\n",
            "recipe.yaml, line 4: key vae stands in line 1 already; delete one of the two",
        ),
        ("train_unet:\n  seed: 1\n  'seed': 2\n", "recipe.yaml, line 3: key seed stands in line 2 already"),
        ("zzz: {}\n", "'zzz'; give one of data, caption, vae, unet"),
        ("vae: {qqqqqq: 1}\n", "'qqqqqq'; give one of vae, vae_revision, vae_channels"),
        ("train_unet: {train_batch_size: yes}\n", "train_batch_size = True is not usable: give a number"),
        ("evaluate: {guidance_scales: []}\n", "guidance_scales = []"),
        ("vae: {vae_channels: []}\n", "vae_channels = []"),
        ("unet: {unet_channels: []}\n", "unet_channels = []"),
    ],
)
def test_mistakes_in_a_recipe_name_file_and_key(tmp_path, text, sentence):
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        load_recipe(recipe(tmp_path, text))
    assert sentence in str(error.value)


def test_a_recipe_is_found_in_the_home_and_without_an_ending(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("train_unet: {seed: 5}")
    assert load_recipe("~/mine").train_unet.seed == load_recipe("mine").train_unet.seed == 5


def test_a_recipe_may_merge_and_must_be_in_utf_8(tmp_path):
    twice = "train_unet: &a {seed: 3, use_ema: false}\ntrain_vae: {<<: *a, seed: 4}\n"  # a merged key may be given anew
    assert (
        load_recipe(recipe(tmp_path, twice)).train_vae.seed,
        load_recipe(recipe(tmp_path, twice)).train_unet.seed,
    ) == (4, 3)
    for encoding in ("utf-16", "utf-16-le", "latin-1"):
        (tmp_path / "a.yaml").write_bytes("data: {image_column: é}\n".encode(encoding))
        with pytest.raises(UserError, match=r"a\.yaml is not in UTF-8; save it as UTF-8"):
            load_recipe(str(tmp_path / "a.yaml"))


def test_an_unknown_recipe_names_the_known():
    with pytest.raises(UserError, match=r"demo, flowers, photos"):
        load_recipe("no_such")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rescale_betas_zero_snr"], "set prediction_type: v_prediction"),
        (["--unet_channels", "16", "32"], "give one type per level"),
        (["--resolution", "72"], "multiple of 16, such as 64"),  # latents of side 18 are not halved twice
        (["--resolution", "66"], "resolution 66 does not fit"),
        (["--vae", "folder", "--resolution", "4096"], "resolution = 4096"),
        (
            ["--vae", "folder", "--resolution", "36"],
            "multiple of 8, such as 32",
        ),  # a factor of 2, read in its config.json
        (["--output_dir", "~nobody_of_this_name/x"], "there is no user 'nobody_of_this_name'"),
        (["--output_dir", ""], "it is empty"),
        (["--run_name", "caf\udce9"], "not UTF-8"),
        (["--config", "blind.yaml"], "nothing asks the autoencoder to look like the image"),
        (["--train_batch_size", "99999999999"], "train_batch_size"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_the_parser(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blind.yaml").write_text("train_vae: {mse_weight: 0, ssim_weight: 0}")
    (tmp_path / "folder/vae").mkdir(parents=True)
    (tmp_path / "folder/vae/config.json").write_text('{"block_out_channels": [8, 8]}')
    with pytest.raises(UserError) as error:
        parse(SECTIONS, "", options)
    assert sentence in str(error.value)


def test_the_sides_of_an_autoencoder_and_its_denoiser_fit_or_are_refused():
    settings = parse(("data", "vae", "train_vae"), "", ["--resolution", "72", "--crop_size", "36"])
    check_vae(settings)  # an autoencoder of its own is fine
    with pytest.raises(UserError, match="cannot halve 2 times"):
        check_unet(settings)
    for crop in ("34", "76"):  # no multiple of 4; larger than the image
        with pytest.raises(UserError, match=f"crop_size {crop} does not fit"):
            parse(("data", "vae", "train_vae"), "", ["--resolution", "72", "--crop_size", crop])


def test_a_path_of_the_home_is_expanded_wherever_it_is_written(tmp_path):
    chosen = parse(SECTIONS, "", ["--config", recipe(tmp_path, "data: {cache_dir: ~/cache}\n"), "--output_dir=~/run"])
    assert chosen.train_unet.output_dir == str(Path.home() / "run")
    assert chosen.data.cache_dir == str(Path.home() / "cache")


FIELDS = [
    (section, item.name)
    for section, cls in to_dict(Recipe()).items()
    for item in dataclasses.fields(getattr(Recipe(), section))
]


@settings(max_examples=150)
@given(
    st.sampled_from(FIELDS),
    st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)),
)
def test_any_value_is_taken_or_refused_in_one_sentence(tmp_path_factory, field, value):
    section, key = field
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump({section: {key: value}}))
    sentence = refusal(path)
    assert sentence is None or (key in sentence and "\n" not in sentence)


def refusal(path):
    """What a recipe is refused with, or None."""
    try:
        load_recipe(str(path))
    except UserError as error:
        return str(error)
    return None


def test_list_options_add_up_and_of_others_the_last_holds_which_is_said(capsys):
    words = ["--validation_prompts", "a", "b c", "--seed", "3", "--validation-prompts=d=e", "f", "--vae", "x"]
    chosen = parse(SECTIONS, "", words)
    assert chosen.train_unet.validation_prompts == ["a", "b c", "d=e", "f"]
    assert (chosen.train_unet.seed, chosen.vae.vae) == (3, "x")
    words = ["--fail_on", "empty=0", "--label_names", "a", "--fail_on", "over_limit=0.1", "--label_names", "b"]
    chosen = parse(("source", "caption"), "", words)
    assert (chosen.caption.fail_on, chosen.data.label_names) == (["empty=0", "over_limit=0.1"], ["a", "b"])
    assert "twice" not in capsys.readouterr().err
    for twice, sentence in (
        (["--seed", "1", "--seed=2"], "--seed is given twice (--seed 1, then --seed 2); the last one holds"),
        (["--use_ema", "--no_use_ema"], "--use_ema is given twice (--use_ema, then --no_use_ema)"),
        (["--dataset", "a", "--dataset_name", "b"], "--dataset is given twice (--dataset a, then --dataset_name b)"),
        (["--config", "demo", "--config", "photos"], "--config is given twice"),
    ):
        chosen = parse(SECTIONS, "", twice)
        assert sentence in capsys.readouterr().err
    assert chosen.unet.unet_channels == parse(SECTIONS, "", ["--config", "photos"]).unet.unet_channels
    assert parse(SECTIONS, "", ["--seed", "1", "--seed=2"]).train_unet.seed == 2
    with pytest.raises(UserError, match="bytes that are not UTF-8"):
        parse(SECTIONS, "", ["--output_dir", "caf\udce9"])


def test_lists_of_captions_may_be_written_as_one_text_or_none(tmp_path):
    """Recipes and run folders from before these options took several values hold a text or null."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "data: {caption_column: null, caption_template: 'a {label}'}\ncaption: {captioner: label, task: <OD>}\n"
    )
    found = load_recipe(str(recipe))
    assert (found.data.caption_column, found.data.caption_template) == ([], ["a {label}"])
    assert (found.caption.captioner, found.caption.task) == (["label"], ["<OD>"])
    written = to_dict(found)  # as older versions wrote these settings, and read them
    assert (written["data"]["caption_column"], written["data"]["caption_template"]) == (None, "a {label}")
    assert (written["caption"]["captioner"], written["caption"]["task"]) == ("label", "<OD>")
    chosen = parse(
        ("source", "caption"), "", ["--config", str(recipe), "--caption_column", "a", "b", "--task", "<CAPTION>"]
    )
    assert to_dict(chosen)["data"]["caption_column"] == ["a", "b"]
    assert (chosen.data.caption_column, chosen.caption.task) == (["a", "b"], ["<CAPTION>"])
    for empty in ("data: {caption_template: []}", "caption: {task: []}", "caption: {captioner: null}"):
        recipe.write_text(empty)
        with pytest.raises(UserError, match=r"is not usable: give at least one$"):
            load_recipe(str(recipe))
    with pytest.raises(UserError, match=r"task = \[\] is not usable: give at least one$"):
        parse(("caption",), "", ["--task"])


@pytest.mark.parametrize("option", ["caption_column", "caption_template", "captioner", "task"])
def test_blank_texts_in_lists_of_captions_are_refused(option, tmp_path):
    section = "data" if option.startswith("caption_") else "caption"
    recipe = tmp_path / "own.yaml"
    for blank in ("''", "['a {label}', ' ']"):
        recipe.write_text(f"{section}: {{{option}: {blank}}}\n")
        with pytest.raises(UserError, match=f"{option} = .* is not usable: it holds an empty text; write the text"):
            load_recipe(str(recipe))
    with pytest.raises(UserError, match="it holds an empty text"):
        parse(("source", "caption"), "", [f"--{option}", ""])


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_every_number_of_a_recipe_is_finite(tmp_path, value):
    for section in dataclasses.fields(Recipe):
        for item in dataclasses.fields(section.default_factory):
            default = item.default
            if isinstance(default, float) or item.name in ("snr_gamma", "guidance_scales"):
                shown = f"[{value}]" if item.name == "guidance_scales" else value
                with pytest.raises(UserError, match=f"{item.name}.* is not usable"):
                    load_recipe(recipe(tmp_path, f"{section.name}: {{{item.name}: {shown}}}\n"))


def test_revisions_of_folders_and_senseless_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(
        UserError, match="--dataset_revision v9 is a revision of the Hub, and --dataset photos is a folder here"
    ):
        parse(SECTIONS, "", ["--dataset", "photos", "--dataset_revision", "v9"])
    assert parse(SECTIONS, "", ["--dataset", "me/photos", "--dataset_revision", "v9"]).data.dataset_revision == "v9"
    for words in (["--num_inference_steps", "1001"], ["--proportion_empty_prompts", "1.0"]):
        with pytest.raises(UserError, match=words[0][2:]):
            parse(SECTIONS, "", words)
    with pytest.raises(UserError, match="num_inference_steps"):
        parse(("data", "evaluate"), "", ["--num_inference_steps", "1500"])


@pytest.mark.parametrize(
    ("section", "text", "words", "expected"),
    [
        ("train_unet", "max_train_steps: 900", "--num_train_epochs 100", {"num_train_epochs": 100, "max_train_steps": None}),
        ("train_unet", "max_train_steps: 900", "--num-train-epochs=7", {"num_train_epochs": 7, "max_train_steps": None}),
        ("train_unet", "max_train_steps: 900", "--num_train_epochs 7 --max_train_steps 900", {"max_train_steps": 900}),
        ("train_unet", "validation_epochs: 2", "--validation_steps 500", {"validation_epochs": None}),
        ("evaluate", "preset: fast", "--num_inference_steps 30", {"preset": None, "num_inference_steps": 30}),
        ("evaluate", "preset: fast", "--sweep_prompts 4", {"preset": "fast"}),
        ("data", "{dataset: a/b, dataset_revision: v1}", "--dataset_name a/b", {"dataset_revision": "v1"}),
        ("data", "{dataset: a/b, dataset_revision: v1}", "--train_data_dir c/d", {"dataset_revision": None}),
        ("data", "{dataset: a/b, dataset_revision: v1}", "--dataset c/d --dataset_revision v1", {"dataset_revision": "v1"}),
    ],
)  # fmt: skip
def test_a_typed_option_replaces_what_says_the_same_in_another_way(section, text, words, expected, tmp_path):
    text = text if text.startswith("{") else f"{{{text}}}"
    sections = ("data", "evaluate") if section == "evaluate" else SECTIONS
    chosen = getattr(
        parse(sections, "", ["--config", recipe(tmp_path, f"{section}: {text}\n"), *words.split()]), section
    )
    assert {key: getattr(chosen, key) for key in expected} == expected


def test_the_yaml_for_a_mac_trains_on_its_gpu_in_float32_in_one_process(monkeypatch):
    """accelerate's launcher reads the YAML, and accelerate takes the GPU of a Mac as soon as torch says that there is one."""
    taken = []
    with mock.patch.object(launch, "simple_launcher", taken.append):
        words = ["--quiet", "--config_file", str(ROOT / "accelerate_configs/mps.yaml"), "train_unet.py"]
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    command, environment = prepare_simple_launcher_cmd_env(*taken)
    assert command[1:] == ["train_unet.py"]
    assert (environment["ACCELERATE_USE_CPU"], environment["ACCELERATE_MIXED_PRECISION"]) == ("False", "no")
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")  # accelerate changes it
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    assert PartialState.default_device.fget(None) == torch.device("mps")
