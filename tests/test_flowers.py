"""Drawn flowers: pure by seed, complete captions, and held-out combinations that training never sees."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import make_flowers
from t2i.data import flowers
from t2i.errors import UserError

PLAIN = {
    "petal_color": "pink",
    "center_color": "golden",
    "background": "sky",
    "petal_count": 5,
    "petal_shape": "round",
    "arrangement": "single",
}
every_attributes = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in flowers.ATTRIBUTES.items()})


def combinations():
    for values in itertools.product(*(flowers.ATTRIBUTES[name] for name in flowers.COMBINED)):
        yield dict(zip(flowers.COMBINED, values, strict=True))


def picture(size=64, seed=0, **changes):
    return flowers.draw(PLAIN | changes, size, np.random.default_rng(seed)).astype(float)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40), size=st.integers(32, 96), held_out=st.booleans())
def test_drawing_is_pure(seed, index, size, held_out):
    attributes, image, words = flowers.drawing(seed, index, size, held_out)
    flowers.drawing(seed + 1, index, 33)  # another drawing in between leaves no trace
    np.random.seed(seed % 2**32)
    again, image_again, words_again = flowers.drawing(seed, index, size, held_out)
    assert (attributes, words) == (again, words_again)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, image_again)
    assert flowers.is_held_out(attributes) == held_out


@settings(max_examples=300)
@given(attributes=every_attributes, seed=st.integers(0, 2**32))
def test_caption_names_every_attribute(attributes, seed):
    words = flowers.caption(attributes, np.random.default_rng(seed)).replace(",", " ").replace(":", " ").split()
    assert len(words) <= 22
    assert words.count(attributes["petal_color"]) == 1
    assert words[words.index("center") - 1] == attributes["center_color"]
    assert words[words.index("petals") - 1] == attributes["petal_shape"]
    assert words[words.index("petals") - 2] == flowers.COUNT_WORDS[attributes["petal_count"]]
    assert attributes["background"] in words
    assert [kind for kind in flowers.ATTRIBUTES["arrangement"] if kind in words] == [attributes["arrangement"]]
    # Nothing else that reads like an attribute, so that a caption cannot contradict its picture.
    for name in ("petal_color", "background", "petal_shape"):
        assert [value for value in flowers.ATTRIBUTES[name] if value in words] == [attributes[name]]


def test_captions_vary():
    captions = {flowers.caption(PLAIN, np.random.default_rng(seed)) for seed in range(200)}
    assert len(captions) >= 6


def test_same_scene_at_every_size():
    attributes, large, words = flowers.drawing(5, 9, 128)
    attributes_small, small, words_small = flowers.drawing(5, 9, 64)
    assert (attributes, words) == (attributes_small, words_small)
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 5


@pytest.mark.parametrize("size", [32, 33, 511, 512])
@pytest.mark.parametrize("arrangement", flowers.ATTRIBUTES["arrangement"])
def test_sizes_at_the_edges(size, arrangement):
    image = picture(size, arrangement=arrangement, petal_count=13)
    assert image.shape == (size, size, 3)
    assert image.std() > 20


@pytest.mark.parametrize("size", [0, -64, 31, 513])
def test_size_out_of_range(size):
    with pytest.raises(UserError, match=f"size {size} .* 32 and 512"):
        flowers.drawing(0, 0, size)


def test_unknown_value_and_negative_seed():
    with pytest.raises(UserError, match="petal_color 'green'"):
        picture(petal_color="green")
    with pytest.raises(UserError, match="background None"):
        flowers.draw({k: v for k, v in PLAIN.items() if k != "background"}, 64, np.random.default_rng(0))
    for seed, index in ((-1, 0), (0, -1)):
        with pytest.raises(UserError, match="negative"):
            flowers.drawing(seed, index, 64)
    with pytest.raises(UserError, match="negative"):
        flowers.prompts(3, -1)


def test_every_attribute_shows():
    """Changing one attribute and nothing else changes the picture: none is written in captions only."""
    for name, values in flowers.ATTRIBUTES.items():
        pictures = [picture(**{name: value}) for value in values]
        for a, b in itertools.combinations(pictures, 2):
            assert (np.abs(a - b).max(-1) > 24).mean() > 0.01, name


def test_petals_end_at_their_tips():
    """Far from the flower the picture is the same whatever its petals: no stray paint."""
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    outside = np.hypot(x - 0.5, y - 0.455) > 0.49
    for count in flowers.ATTRIBUTES["petal_count"]:
        pictures = [picture(128, petal_shape=shape, petal_count=count) for shape in flowers.ATTRIBUTES["petal_shape"]]
        # The stem and leaves follow from the seed before the petals do.
        assert np.ptp(pictures, axis=0)[outside].max() <= 2


def test_petals_show_their_color():
    """Mean color of a ring through the petals is nearest to that of the named color, on every background."""
    y, x = (np.mgrid[:64, :64] + 0.5) / 64
    ring = (np.hypot(x - 0.5, y - 0.455) > 0.21) & (np.hypot(x - 0.5, y - 0.455) < 0.3)
    colors = {name: np.array(palette[1], float) for name, palette in flowers.PETALS.items()}
    for color, background in itertools.product(flowers.ATTRIBUTES["petal_color"], flowers.ATTRIBUTES["background"]):
        seen = np.median(picture(petal_color=color, background=background)[ring], 0)
        assert min(colors, key=lambda name: np.abs(colors[name] - seen).sum()) == color, (color, background, seen)


def test_held_out_share_and_coverage():
    every = list(combinations())
    held_out = [c for c in every if flowers.is_held_out(c)]
    training = [c for c in every if not flowers.is_held_out(c)]
    assert 0.15 < len(held_out) / len(every) < 0.25
    for a, b in itertools.combinations(flowers.COMBINED, 2):  # training sees each pair of values
        seen = {(c[a], c[b]) for c in training}
        assert seen == set(itertools.product(flowers.ATTRIBUTES[a], flowers.ATTRIBUTES[b]))
    for name in flowers.COMBINED:  # and every value is tested
        assert {c[name] for c in held_out} == set(flowers.ATTRIBUTES[name])
    # The split is part of the data: it must not move between versions.
    assert len(held_out) == 71
    assert flowers.is_held_out(PLAIN) is False


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts(held_out):
    pairs = flowers.prompts(60, 3, held_out)
    assert pairs == flowers.prompts(60, 3, held_out) != flowers.prompts(60, 4, held_out)
    assert all(flowers.is_held_out(attributes) == held_out for attributes, _ in pairs)
    assert len({tuple(attributes[name] for name in flowers.COMBINED) for attributes, _ in pairs}) == 60
    assert all(attributes["petal_color"] in words for attributes, words in pairs)


def test_draw_many_is_the_same_with_any_number_of_workers():
    alone = list(flowers.draw_many(7, 3, 20, 32, workers=1))
    together = list(flowers.draw_many(7, 3, 20, 32, workers=2))
    assert len(alone) == len(together) == 20
    for i, (one, two) in enumerate(zip(alone, together, strict=True)):
        assert one[0] == two[0]
        assert one[2] == two[2] == flowers.drawing(7, 3 + i, 32)[2]
        np.testing.assert_array_equal(one[1], two[1])


@pytest.mark.parametrize("folder", [".", "/", ".."])
def test_a_folder_without_a_name_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_flowers.py", "--output_dir", folder])
    with pytest.raises(UserError, match="ends without a name; give a new folder"):
        make_flowers.main()
