"""The judge's distances, its probe and its networks."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.kid import poly_mmd

import evaluate_checkpoints
from t2i.config import DataConfig, EvaluateConfig, Recipe
from t2i.data import preparing, repairs
from t2i.data.caches import cache_features
from t2i.data.dataset_folder import save_dataset_folder
from t2i.errors import UserError
from t2i.evaluation import judge, memorisation
from t2i.evaluation.figures import other_prompts
from t2i.evaluation.networks import FeatureNetwork, load_efficientnet_lite
from t2i.runs import RunFolder


def normal(count: int, width: int = 16, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=20)
@given(n=st.integers(3, 40), m=st.integers(3, 40), shift=st.floats(0, 2), seed=st.integers(0, 1000))
def test_the_kernel_distance_is_the_unbiased_squared_mmd(n: int, m: int, shift: float, seed: int) -> None:
    real, generated = normal(n, seed=seed), normal(m, seed=seed + 1, shift=shift)
    kernel = [(a.double() @ b.double().T / 16 + 1) ** 3 for a, b in ((real, real), (real, generated), (generated,) * 2)]
    expected = (kernel[0].sum() - kernel[0].diag().sum()) / (n * (n - 1)) - 2 * kernel[1].mean()
    expected += (kernel[2].sum() - kernel[2].diag().sum()) / (m * (m - 1))
    found = judge.kernel_distance(real, generated)
    assert found["mean"] == pytest.approx(1000 * float(expected), rel=1e-3, abs=1e-1)
    assert found == judge.kernel_distance(real, generated, judge.within(real))
    if n == m:
        assert found["mean"] == pytest.approx(1000 * float(poly_mmd(real, generated)), rel=1e-2, abs=1.0)


def test_the_standard_error_is_the_spread_over_new_pictures() -> None:
    photos = normal(400, seed=1)
    found = [
        judge.kernel_distance(normal(400, seed=2 * s), normal(60, seed=2 * s + 1, shift=0.3)) for s in range(5, 65)
    ]
    spread = float(np.std([one["mean"] for one in found]))
    told = float(np.mean([one["standard_error"] for one in found]))
    assert 0.75 < told / spread < 1.35
    far = judge.kernel_distance(photos, normal(60, seed=3, shift=1.0))
    assert far["mean"] > 4 * far["standard_error"]


def test_blocks_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(50), normal(37, seed=1)
    whole = judge.kernel_sums(a, b)
    monkeypatch.setattr(judge, "BLOCK", 8)
    for one, other in zip(judge.kernel_sums(a, b), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_two_pictures_are_too_few_for_a_distance() -> None:
    with pytest.raises(UserError, match="at least 3 pictures on both sides, not 2; raise --sweep_prompts"):
        judge.kernel_distance(normal(10), normal(2))


@pytest.mark.parametrize("count", [12, 400])  # fewer and more pictures than features
def test_the_frechet_distance_of_gaussians_is_that_of_the_formula(count: int) -> None:
    a, b = normal(count, 20), normal(count, 20, seed=1) * 2 + 1
    covariances = [torch.cov(x.double().T) for x in (a, b)]
    values = torch.linalg.eigvals(covariances[0] @ covariances[1])
    expected = (
        (a.double().mean(0) - b.double().mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace()
    )
    expected -= 2 * values.real.clamp(min=0).sqrt().sum()
    assert judge.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-4)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_precision_falls_with_implausible_pictures_and_recall_with_missing_ones() -> None:
    photos = torch.cat([normal(100, 4), normal(100, 4, seed=1, shift=30)])
    half = normal(200, 4, seed=2)  # one of the two kinds of photos
    astray = torch.cat([normal(100, 4, seed=3), normal(100, 4, seed=4, shift=-30)])
    assert judge.precision_recall(photos, half)["precision"] > 0.8
    assert judge.precision_recall(photos, half)["recall"] < 0.55
    assert judge.precision_recall(photos, astray)["precision"] < 0.55


def test_the_probe_reads_labels_of_unseen_rows_and_always_alike() -> None:
    centers = 2 * normal(3, seed=5)
    labels = ["rose", "tulip", "daisy"] * 40
    train, fresh = (centers.repeat(40, 1) + normal(120, seed=seed) for seed in (6, 7))
    probe = judge.Probe(train, labels)
    assert probe.accuracy(fresh, labels) > 0.95
    assert probe.accuracy(fresh, labels[1:] + labels[:1]) < 0.05
    assert torch.equal(judge.Probe(train, labels).weights, probe.weights)


def test_the_penalty_of_the_probe_is_the_best_when_each_row_is_left_out() -> None:
    features, labels = normal(40, 60), ["a", "b"] * 20  # noise with more features than rows, so that penalties matter
    features[::2, 0] += 2
    probe = judge.Probe(features, labels)
    x = (features - probe.mean) / probe.std
    right = {}
    for penalty in judge.PENALTIES:
        hits = 0
        for row in range(40):
            rest = [other for other in range(40) if other != row]
            ones = torch.cat([x[rest].double(), torch.ones(39, 1, dtype=torch.float64)], 1)  # with an intercept
            wanted = torch.tensor([[1.0, 0.0] if labels[other] == "a" else [0.0, 1.0] for other in rest]).double()
            ridge = penalty * torch.eye(61, dtype=torch.float64)
            ridge[-1, -1] = 0
            weights = torch.linalg.solve(ones.T @ ones + ridge, ones.T @ wanted)
            scores = torch.cat([x[row].double(), torch.ones(1)]) @ weights
            hits += "ab"[int(scores.argmax())] == labels[row]
        right[penalty] = hits
    assert right[probe.penalty] == max(right.values())


def test_statistics_of_pixels_tell_soft_pictures_from_sharp_ones() -> None:
    rng = np.random.default_rng(0)
    sharp, other = (rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8) for _ in range(2))
    soft = sharp.reshape(40, 16, 2, 16, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    statistics = judge.pixel_statistics(sharp)
    assert statistics.shape == (40, 45)
    same = judge.kernel_distance(statistics, judge.pixel_statistics(other))["mean"]
    assert judge.kernel_distance(statistics, judge.pixel_statistics(soft))["mean"] > 10 * abs(same)


def test_spread_takes_rows_from_first_to_last() -> None:
    assert judge.spread(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert judge.spread(np.arange(3), 4).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return FeatureNetwork("efficientnet-lite0")


def test_compiled_features_are_those_of_torch(network: FeatureNetwork) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    found = network.features(pictures, batch_size=2)
    assert found.shape == (3, 1280)
    assert network.compiled is not None
    plain = FeatureNetwork("efficientnet-lite0")
    plain.compiled = None
    torch.testing.assert_close(found, plain.features(pictures), rtol=1e-3, atol=1e-3)


def test_the_second_network_teaches_the_autoencoder_and_differs() -> None:
    model = load_efficientnet_lite("efficientnet-lite2")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.extract_features(torch.zeros(1, 3, 64, 64)).shape[:2] == (1, 1280)


def test_features_of_real_images_are_cached_by_content(network: FeatureNetwork, tmp_path, capsys) -> None:
    pixels, rows = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), np.array([0, 2, 4])
    first = cache_features(pixels, rows, "a", network, str(tmp_path))
    torch.testing.assert_close(first, network.features(pixels[rows]), rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    assert torch.equal(cache_features(pixels, rows, "a", network, str(tmp_path)), first)
    assert "reusing features of 3 images" in capsys.readouterr().out
    for images, fingerprint in ((rows, "b"), (rows + 0 * rows - (rows > 2), "a")):
        cache_features(pixels, images, fingerprint, network, str(tmp_path))
        assert "computing features" in capsys.readouterr().out


def test_pictures_without_a_label_are_not_counted(network: FeatureNetwork) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    pixels[::2] //= 4  # dark and bright pictures
    features, labels = network.features(pixels), ["dark", "bright"] * 6
    one = judge.Judge(network, features, pixels, judge.Probe(features, labels))
    assert one.measure(features, [*labels[:4], *[None] * 8])["named"] == 1.0
    assert one.measure(features, [None] * 12)["named"] is None


def test_copies_are_told_from_new_pictures_also_if_soft_or_mirrored() -> None:
    rng = np.random.default_rng(2)
    train, fresh = (rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2) for _ in range(2))
    soft = ((train.astype(int) * 9 + 128) // 10).astype(np.uint8)
    thumbnails = memorisation.pixel_embedding(train)
    assert memorisation.copied(soft, thumbnails).all()
    assert memorisation.copied(soft[:, :, ::-1], thumbnails).all()
    assert not memorisation.copied(fresh, thumbnails).any()
    twins = memorisation.pixel_embedding(np.concatenate([train, train[:, :, ::-1], soft]))
    assert memorisation.copied(soft, twins).all()  # a photo that stands there three times is copied all the same
    assert not memorisation.copied(fresh, twins).any()


@pytest.mark.parametrize("noise", [0, 1])
def test_a_picture_far_from_many_copies_of_one_photo_copies_nothing(noise) -> None:
    rng = np.random.default_rng(2)
    other, fresh = (rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2) for _ in range(2))
    twins = (100 + other[:1] // 5 + rng.integers(0, noise + 1, (60, 32, 32, 3))).astype(np.uint8)
    train = memorisation.pixel_embedding(np.concatenate([twins, other]))
    assert not memorisation.copied(fresh, train).any()  # their 50 nearest images are all twins
    copy = twins[:1] if noise else ((twins[:1].astype(int) * 9 + 128) // 10).astype(np.uint8)
    assert memorisation.copied(np.concatenate([copy, copy[:, :, ::-1], other]), train).all()
    assert not memorisation.copied(fresh, train[:60]).any()  # there is no other photo at all


@pytest.mark.parametrize("is_same", [True, False])
def test_images_that_may_have_been_trained_on_are_said(is_same, workspace, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "unet"
    shutil.copytree(workspace / "unet", run, ignore=shutil.ignore_patterns("evaluation", "cells"))
    state = json.loads((run / "run.json").read_text())
    state["identity"]["dataset_hash"] += "" if is_same else "0"
    (run / "run.json").write_text(json.dumps(state))
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(evaluate_checkpoints, "prepare_study", None)  # nothing is drawn
    monkeypatch.setattr(sys, "argv", ["evaluate_checkpoints.py", "--model", str(run)])
    with pytest.raises(TypeError):
        evaluate_checkpoints.main()
    assert ("Images that count as unseen may be training images." in capsys.readouterr().err) != is_same


def test_images_left_out_since_the_training_are_said(captioned, capsys) -> None:
    recipe, splits = captioned
    row = splits.train.rows[0]
    identity = {"dataset_hash": splits.fingerprint}
    try:
        repairs.set_left_out(Path(recipe.data.dataset), row["id"], "train", row["file"], True)
        fewer = evaluate_checkpoints.load_data(recipe, recipe, {"identity": identity})
        said = "WARNING: left_out.jsonl of"
        assert said in capsys.readouterr().err
        assert len(fewer.train) == len(splits.train) - 1
        evaluate_checkpoints.load_data(recipe, recipe, {"identity": identity | fewer.repair_hashes()})
        assert said not in capsys.readouterr().err
    finally:
        repairs.set_left_out(Path(recipe.data.dataset), row["id"], "train", row["file"], False)
    evaluate_checkpoints.load_data(
        recipe, recipe, {"identity": identity | fewer.repair_hashes()}
    )  # All copies are found.
    assert "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report_to", "sentence"),
    [("mlflow", "MLFLOW_TRACKING_URI=localhost:5000 lacks http"), ("none", "holds no checkpoint")],
)
def test_a_wrong_tracking_address_is_refused_before_an_evaluation(report_to, sentence, tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {{dataset: photos}}\ntrain_unet: {{report_to: {report_to}}}\n")
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    monkeypatch.setattr(sys, "argv", ["evaluate_checkpoints.py", "--model", str(tmp_path)])
    with pytest.raises(UserError, match=sentence):
        evaluate_checkpoints.main()


def test_an_evaluation_of_a_run_without_checkpoints_says_why(tmp_path) -> None:
    for status, sentence in (
        ("finished", "were removed; restore one from a copy"),
        ("unfinished", "train with scripts"),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"status": status}))
        with pytest.raises(UserError, match=sentence):
            evaluate_checkpoints.choose_checkpoints(tmp_path, EvaluateConfig())


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> tuple[Recipe, preparing.Splits]:
    """A captioned data set, whose rows are sorted by their 102 classes as those of class folders are."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = [
        {"image": np.full((16, 16, 3), number // 2, np.uint8), "caption": f"class {number // 3}, photo {number}"}
        for number in range(306)
    ]
    save_dataset_folder(folder / "photos", {"train": rows[:6], "test": rows})
    recipe = Recipe(data=DataConfig(dataset=str(folder / "photos"), resolution=16, cache_dir=str(folder / "cache")))
    return recipe, preparing.load_splits(recipe.data, say=lambda text: None)


def test_prompts_of_a_captioned_set_name_most_of_its_classes(captioned) -> None:
    recipe, splits = captioned
    assert evaluate_checkpoints.kind_of(splits) == "captioned"
    sweep, reported = (
        evaluate_checkpoints.make_prompts("captioned", splits, recipe, count, 0, offset).texts
        for count, offset in ((24, 0), (256, 24))
    )
    assert len({text.split(",")[0] for text in sweep}) > 16
    assert len({text.split(",")[0] for text in reported}) > 90
    assert len({*sweep, *reported}) == 24 + 256
    assert evaluate_checkpoints.make_prompts("captioned", splits, recipe, 256, 1, 24).texts == reported


def test_captions_of_validation_are_prompts_if_the_test_split_has_none(tmp_path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    rows = {split: [{"image": image + at, "caption": f"{split} 0"}] for at, split in enumerate(("train", "validation"))}
    save_dataset_folder(tmp_path / "photos", rows | {"test": [{"image": image + 2, "caption": ""}]})
    recipe = Recipe(data=DataConfig(dataset=str(tmp_path / "photos"), resolution=16, cache_dir=str(tmp_path / "cache")))
    splits = preparing.load_splits(recipe.data, say=lambda text: None)
    assert evaluate_checkpoints.make_prompts("captioned", splits, recipe, 2, 0, 0).texts == ["validation 0"] * 2


def test_an_evaluation_on_the_first_captions_is_said_to_be_made_again(captioned, tmp_path, capsys) -> None:
    _, splits = captioned
    inputs = evaluate_checkpoints.input_hashes(tmp_path, {}, splits, "captioned")
    evaluate_checkpoints.say_other_prompts(tmp_path, inputs)  # There is no evaluation yet.
    for identity, is_said in ((inputs, False), ({"dataset_hash": splits.fingerprint}, True)):
        RunFolder(tmp_path, identity, replace=True).finish()
        evaluate_checkpoints.say_other_prompts(tmp_path, inputs)
        assert ("it is made again on random captions" in capsys.readouterr().out) == is_said
    assert not RunFolder(tmp_path, inputs, replace=True).finished


@pytest.mark.parametrize(
    ("following", "names"),
    [
        ({"petal_color": 0.9, "all": 0.4}, ["petal color", "combined attributes"]),
        ({"label": 0.6, "all": 0.6}, ["label"]),
    ],
)
def test_the_terminal_calls_shares_of_prompts_by_their_names(following, names, tmp_path, capsys) -> None:
    result = {"checkpoint": "checkpoint-000004", "guidance_scale": 3.0, "val_loss": 0.1, "prompt_following": following}
    evaluate_checkpoints.print_sweep([result | {"judge": None, "memorisation": None}])
    head, line = capsys.readouterr().out.strip().splitlines()
    assert re.sub(" {2,}", "|", head).split("|")[3:-2] == names
    assert len(line) == len(head)
    report = result | {"prompts": 100, "probe_accuracy": {}, "judge": None, "memorisation": None}
    evaluate_checkpoints.print_report({"report": report}, tmp_path)
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if "%" in line] == names


def test_prompts_that_chose_the_setting_are_counted() -> None:
    results = {"prompts": ["a", "b", "b"], "sweep": {"prompts": ["c", "b"]}}
    assert other_prompts(results) == "other pictures, which share 1 of 2 different prompts"
    assert other_prompts({"prompts": ["a"], "sweep": {"prompts": ["b"]}}) == other_prompts({}) == "other prompts"


def test_a_network_that_taught_the_autoencoder_is_no_judge(tmp_path, monkeypatch) -> None:
    for name, text in (("vae", "train_vae: {perceptual_weight: 0.1}"), ("unet", f"vae: {{vae: {tmp_path / 'vae'}}}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    evaluate_checkpoints.check_judge(tmp_path / "unet", EvaluateConfig())
    taught = EvaluateConfig(judge_network="efficientnet-lite2")
    with pytest.raises(
        UserError, match="judge_network efficientnet-lite2: the autoencoder was trained on this network"
    ):
        evaluate_checkpoints.check_judge(tmp_path / "unet", taught)
    (tmp_path / "unet" / "config.yaml").write_text("train_unet: {alignment_weight: 0.5}")
    with pytest.raises(UserError, match="judge_network efficientnet-lite2: the denoiser was aligned with this network"):
        evaluate_checkpoints.check_judge(tmp_path / "unet", taught)
    monkeypatch.chdir(tmp_path / "vae")  # A config.yaml of another run in the working directory says nothing.
    (tmp_path / "unet" / "config.yaml").write_text("vae: {vae: null}")
    evaluate_checkpoints.check_judge(tmp_path / "unet", taught)
