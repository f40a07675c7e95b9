"""Metrics: the classifier learns, known values are reproduced, copies are found, and networks load from a folder."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from t2i.errors import UserError
from t2i.evaluation import attributes, figures, judge, memorisation, metrics, networks

COLORS = {"red": (200, 30, 40), "blue": (40, 60, 200), "white": (230, 230, 225)}
HEADS = {"color": list(COLORS), "side": [1, 2]}


def discs(count: int, size: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Colored discs on noisy ground, in the upper (1) or lower (2) half."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 120, (count, size, size, 3), dtype=np.uint8)
    labels = {"color": rng.integers(3, size=count), "side": rng.integers(2, size=count)}
    rows, columns = np.mgrid[:size, :size] / size
    for i in range(count):
        y, x = (0.3, 0.7)[labels["side"][i]] + rng.uniform(-0.05, 0.05), rng.uniform(0.3, 0.7)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < rng.uniform(0.15, 0.22) ** 2
        pixels[i][inside] = list(COLORS.values())[labels["color"][i]]
    return pixels, labels


@pytest.fixture(scope="module")
def classifier() -> attributes.Classifier:
    pixels, labels = discs(240, 32, seed=0)
    return attributes.train_classifier(pixels, labels, HEADS, steps=60, batch_size=32, seed=0, width=8, progress=False)


def test_classifier_learns_both_heads_and_reads_other_sizes(classifier: attributes.Classifier) -> None:
    pixels, labels = discs(120, 32, seed=1)
    found = attributes.accuracy(classifier, pixels, labels)
    assert min(found.values()) >= 0.95, found
    larger = pixels.repeat(2, 1).repeat(2, 2)
    assert min(attributes.accuracy(classifier, larger, labels).values()) >= 0.95
    wrong = {"color": (labels["color"] + 1) % 3}
    assert attributes.accuracy(classifier, pixels, wrong)["color"] <= 0.05


def test_prompt_following_counts_values_not_indices(classifier: attributes.Classifier) -> None:
    pixels, labels = discs(60, 32, seed=2)
    wanted = [
        {"color": HEADS["color"][c], "side": HEADS["side"][s], "shape": "disc"}
        for c, s in zip(labels["color"], labels["side"], strict=True)
    ]
    for i in range(30):  # half of the prompts ask for the other side
        wanted[i]["side"] = 3 - wanted[i]["side"]
    shares = attributes.prompt_following(classifier, pixels, wanted)
    assert shares["color"] >= 0.95
    assert shares["side"] == pytest.approx(0.5, abs=0.05)
    assert shares["all"] == pytest.approx(0.5, abs=0.06)
    assert attributes.prompt_following(classifier, pixels, wanted, ["color"])["all"] == shares["color"]


def test_training_repeats_by_seed_and_leaves_the_callers_generator_alone() -> None:
    pixels, labels = discs(40, 32, seed=3)
    torch.manual_seed(7)
    untouched = torch.rand(1)

    def train(seed: int) -> torch.Tensor:
        model = attributes.train_classifier(
            pixels, labels, HEADS, steps=3, batch_size=16, seed=seed, width=8, progress=False
        )
        return model.features(attributes.to_tensor(pixels[:4], 32))

    torch.manual_seed(7)
    first = train(0)
    assert torch.equal(torch.rand(1), untouched)
    assert torch.equal(train(0), first)
    assert not torch.equal(train(1), first)


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_the_classifier_learns_in_any_number_of_steps(steps: int) -> None:
    pixels, labels = discs(8, 32, seed=3)
    attributes.train_classifier(pixels, labels, HEADS, steps=steps, batch_size=4, seed=0, width=8, progress=False)


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_classifier_shapes_and_round_trip(resolution: int, tmp_path) -> None:
    model = attributes.Classifier(HEADS, resolution, width=8).eval()
    x = torch.rand(2, 3, resolution, resolution) * 2 - 1
    logits = model(x)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {"color": (2, 3), "side": (2, 2)}
    assert model.features(x).shape == (2, 64)
    model.save(tmp_path / "classifier")
    modes = {file.stat().st_mode for file in (tmp_path / "classifier").iterdir()}
    assert len(modes) == 1  # Weights can be read by whoever can read the settings.
    again = attributes.Classifier.load(tmp_path / "classifier")
    assert again.heads == HEADS
    assert torch.equal(again(x)["color"], logits["color"])


def test_load_names_what_is_wrong(tmp_path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        attributes.Classifier.load(tmp_path)
    attributes.Classifier(HEADS, 32, width=8).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="no classifier"):
        attributes.Classifier.load(tmp_path)


def test_augment_keeps_shape_and_changes_pictures() -> None:
    pixels, _ = discs(32, 32, seed=4)
    x = attributes.to_tensor(pixels, 32)
    assert x.shape == (32, 3, 32, 32)
    assert x.min() >= -1
    assert x.max() <= 1
    torch.manual_seed(0)
    changed = attributes._augment(x)
    assert changed.shape == x.shape
    assert 0.01 < (changed - x).abs().mean().item() < 1


def test_psnr_and_ssim_known_values() -> None:
    torch.manual_seed(0)
    a = torch.rand(3, 3, 32, 32) - 0.5
    b = a + torch.tensor([0.02, 0.2, 0.4]).view(3, 1, 1, 1)
    expected = 10 * torch.log10(4 / torch.tensor([0.02, 0.2, 0.4]) ** 2)
    torch.testing.assert_close(metrics.psnr(a, b), expected, rtol=1e-4, atol=1e-3)
    assert torch.isinf(metrics.psnr(a, a)).all()
    torch.testing.assert_close(metrics.ssim(a, a), torch.ones(3))
    noise = torch.randn_like(a)
    close, far = metrics.ssim(a, a + 0.02 * noise), metrics.ssim(a, a + 0.3 * noise)
    assert close.shape == (3,)
    assert (close > 0.98).all()
    assert (far < 0.9).all()
    # two flat pictures: only the luminance term is left, (2 x y + c1) / (x^2 + y^2 + c1), c1 = (0.01 * 2)^2
    flat = metrics.ssim(torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25))
    assert flat.item() == pytest.approx((0.25 + 4e-4) / (0.3125 + 4e-4), abs=1e-3)
    assert metrics.ssim(a[:1], b[:1]).shape == (1,)


@pytest.mark.parametrize("size", [(2, 3, 16, 16), (1, 3, 9, 31)])
def test_uniform_ssim_is_that_of_torchmetrics(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a = (torch.rand(size) * 2 - 1).requires_grad_()
    b = (a.detach() + 0.2 * torch.randn(size)).clamp(-1, 1)
    known = structural_similarity_index_measure(a, b, data_range=2.0, gaussian_kernel=False, kernel_size=7)
    found = metrics.uniform_ssim(a, b)
    torch.testing.assert_close(found, known)
    slopes = [torch.autograd.grad(value, a)[0] for value in (found, known)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)
    assert metrics.uniform_ssim(b, b).item() == pytest.approx(1.0)


def test_memorisation_flags_copies_and_passes_fresh_pictures() -> None:
    rng = np.random.default_rng(0)

    def scenes(count: int) -> np.ndarray:  # smooth random scenes: 6 x 6 colors enlarged
        small = torch.from_numpy(rng.random((count, 3, 6, 6), dtype=np.float32))
        large = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 1)
        return (large * 255).byte().permute(0, 2, 3, 1).numpy()

    train, held_out, fresh = scenes(400), scenes(200), scenes(200)
    chosen = rng.permutation(400)[:100]
    noisy = np.clip(train[chosen] + rng.normal(0, 12, train[chosen].shape), 0, 255).astype(np.uint8)
    honest = memorisation.memorisation(fresh, train, held_out)
    assert honest["share_closer"] <= 0.06
    assert honest["median_ratio"] == pytest.approx(1, abs=0.05)
    assert honest["probability_closer"] == pytest.approx(0.5, abs=0.1)
    assert honest["near_copies"] == honest["near_copies_held_out"] == 0
    for copies in (noisy, noisy[:, :, ::-1]):  # a mirrored copy is a copy too
        caught = memorisation.memorisation(copies, train, held_out)
        assert caught["share_closer"] == caught["near_copies"] == 1.0
        assert caught["probability_closer"] == pytest.approx(1)
        assert caught["median_ratio"] < 0.5
        assert np.array_equal(caught["nearest"], chosen)
    pale = (fresh * 0.6 + 50).astype(np.uint8)  # nearer to everything, a copy of nothing
    assert memorisation.memorisation(pale, train, held_out)["share_closer"] <= 0.05
    with pytest.raises(UserError, match="held-out"):
        memorisation.memorisation(fresh, train, held_out[:0])


def test_diversity_of_many_real_images_is_that_of_all_their_classes() -> None:
    classes = torch.arange(1200.0)[:, None].div(600, rounding_mode="floor")  # two classes, one after the other
    assert metrics.diversity(classes[::2], classes)["real"] == pytest.approx(0.5, abs=0.01)


def test_the_share_that_lies_closer_by_chance_is_larger_with_few_unseen_images() -> None:
    draw = partial(np.random.default_rng(1).integers, 0, 256, dtype=np.uint8)
    train = memorisation.pixel_embedding(draw(size=(60, 16, 16, 3)))
    shares = [
        memorisation.Memory(train, draw(size=(10, 16, 16, 3))).measure(draw(size=(20, 16, 16, 3)))["share_closer"]
        for _ in range(12)
    ]
    assert figures.chance_closer(10) == pytest.approx(np.mean(shares), abs=0.05) == pytest.approx(0.1, abs=0.05)
    assert figures.chance_closer(100_000) == pytest.approx(0.01, rel=0.01)


def test_nearest_in_blocks_equals_the_full_search() -> None:
    torch.manual_seed(0)
    train, queries = torch.randn(9000, 5), torch.randn(300, 5)
    distances, rows = memorisation._nearest(queries, train, 7)
    full = torch.cdist(queries, train).topk(7, largest=False)
    torch.testing.assert_close(distances, full.values, rtol=1e-3, atol=1e-3)
    assert (rows[:, 0] == full.indices[:, 0]).all()


def test_diversity_is_one_for_the_real_thing_and_zero_for_one_picture_repeated() -> None:
    torch.manual_seed(0)
    centers = torch.tensor([[0.0] * 8, [50.0] * 8])
    groups = [0, 1] * 100
    real, fresh = (centers.repeat(100, 1) + torch.randn(200, 8) for _ in range(2))
    assert metrics.diversity(fresh, real, groups, groups)["ratio"] == pytest.approx(1, abs=0.1)
    assert metrics.diversity(centers.repeat(100, 1), real, groups, groups)["ratio"] == pytest.approx(0, abs=1e-5)
    assert metrics.diversity(centers.repeat(100, 1), real)["ratio"] > 0.9  # without groups the two prompts differ
    with pytest.raises(UserError, match="group"):
        metrics.diversity(fresh, real, [f"only {i}" for i in range(200)], groups)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """A CLIP of random weights, saved as transformers saves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=16)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(vocab), "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    config = CLIPConfig(
        text_config=small | text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def test_clip_score_equals_the_cosine_by_hand(clip_folder: str) -> None:
    from transformers import CLIPModel, CLIPProcessor

    pictures, _ = discs(5, 48, seed=7)
    prompts = ["red", "a blue disc", "white", "red and blue", "x" * 60]  # the last one exceeds the tokenizer's 16
    score = metrics.clip_score(pictures, prompts, clip_folder)
    assert score is not None
    assert score["pictures"] == 5
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        inputs = processor(text=prompts[:1], images=[pictures[0]], return_tensors="pt")
        by_hand = 100 * model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
    one = metrics.clip_score(pictures[:1], prompts[:1], clip_folder)
    assert one is not None
    assert one["mean"] == pytest.approx(max(by_hand, 0), abs=1e-3)
    assert metrics.clip_score(pictures, prompts, None) is None


def test_a_clip_score_keeps_no_graph_of_its_pictures(clip_folder: str) -> None:
    pictures, _ = discs(2, 48, seed=7)
    outputs: list[bool] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: outputs.append(torch.is_grad_enabled()))
    try:
        metrics.clip_score(pictures, ["red", "blue"], clip_folder)
    finally:
        hook.remove()
    assert outputs
    assert not any(outputs)


def test_a_network_from_a_folder_judges_pictures(clip_folder: str) -> None:
    real, labels = discs(80, 32, seed=8)
    same, _ = discs(80, 32, seed=9)
    network = networks.FeatureNetwork(clip_folder)
    features = network.features(real)
    equal = judge.kernel_distance(features, network.features(same))
    blue = judge.kernel_distance(features, network.features(real[labels["color"] == 1]))
    assert abs(equal["mean"]) < 0.3 * blue["mean"]


@pytest.fixture
def save_vit(tmp_path):
    """Return a function that saves a small ViT of a class, and its processor, in a folder."""
    from transformers import ViTImageProcessorPil

    def save(cls, **options) -> str:
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        cls(cls.config_class(**small, image_size=32, patch_size=8, **options)).save_pretrained(tmp_path)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_a_classifier_judges_pictures_without_a_random_pooler(save_vit) -> None:
    from transformers import ViTForImageClassification

    folder, (pictures, _) = save_vit(ViTForImageClassification), discs(3, 32, seed=0)
    features, identities = [], set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = networks.FeatureNetwork(folder)
        features.append(network.features(pictures))
        identities.add(network.identity())
    torch.testing.assert_close(*features, rtol=0, atol=0)
    assert features[0].shape == (3, 16)
    assert len(identities) == 1


def test_networks_without_all_weights_or_with_random_features_judge_nothing(save_vit) -> None:
    from transformers import ViTForImageClassification, ViTMAEModel

    with pytest.raises(UserError, match=r"as the network of the judge \(its features differ from call to call\)"):
        networks.FeatureNetwork(save_vit(ViTMAEModel))
    folder = save_vit(ViTForImageClassification)
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match="is not among its weights, so they are of another kind of model"):
        networks.FeatureNetwork(folder)


def test_networks_that_cannot_be_had_are_one_sentence(tmp_path) -> None:
    pixels, _ = discs(4, 32, seed=0)
    missing = str(tmp_path / "missing")
    with pytest.raises(UserError, match="network of the judge"):
        networks.FeatureNetwork(missing)
    with pytest.raises(UserError, match="CLIP model") as caught:
        metrics.clip_score(pixels, ["a"] * 4, missing)
    assert "\n" not in str(caught.value)


def test_the_interval_of_a_share() -> None:
    # Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert figures.wilson(hits / count, count) == pytest.approx((low, high), abs=1e-4)
    assert figures.percent(0.75, 32) == "75.0% (58–87%)"
    assert figures.percent(0.75) == "75.0%"


def test_no_figure_chooses_that_noise_or_a_copy_would_win() -> None:
    for key in (
        "diversity.ratio",
        "diversity.real",
        "memorisation.median_ratio",
        "judge.standard_error",
        "unknown_figure",
    ):
        assert figures.figure(key).better is None
    assert figures.figure("judge.kernel_distance").better == "lower"
    known = figures.figure("prompt_following.petal_color")
    assert (known.name, known.better, known.is_share) == ("prompt following, petal color", "higher", True)


def test_a_figure_that_repeats_the_label_is_told_once():
    shares = {"label": 0.6, "all": 0.6}
    told = figures.told({"prompt_following": shares, "prompt_following_held_out": shares, "steps": {"all": 3}})
    assert told == {"prompt_following.label": 0.6, "prompt_following_held_out.label": 0.6, "steps.all": 3}
    assert figures.figure("prompt_following_held_out.all").name == "prompt following held out, combined attributes"


def test_clipped_colors_are_those_near_black_or_white():
    pictures = np.full((2, 4, 4, 3), 128, np.uint8)
    assert metrics.clipped_share(pictures) == 0
    pictures[0, :, :, 0] = 255
    pictures[0, :2, :, 1] = 5
    assert metrics.clipped_share(pictures) == (16 + 8) / 96
    pictures[1, :, :, 2] = 6  # not near enough
    assert metrics.clipped_share(pictures) == 24 / 96
