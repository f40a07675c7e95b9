"""Values of a grid's axis: what users type, what it means, and what is refused."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.errors import UserError
from t2i.pictures import axes

MEANINGS = [
    ("seed", "1-10", list(range(1, 11))),
    ("seed", "1-10(+2)", [1, 3, 5, 7, 9]),
    ("seed", "10-1(-3)", [10, 7, 4, 1]),
    ("seed", "1-10[5]", [1, 3, 5, 7, 10]),
    ("seed", " 3 , 1-2 , 3 ", [3, 1, 2]),
    ("seed", "9223372036854775807", [2**63 - 1]),
    ("guidance_scale", "1.5-7.5(+1.5)", [1.5, 3.0, 4.5, 6.0, 7.5]),
    ("guidance_scale", "0-1(+0.1)", [number / 10 for number in range(11)]),
    ("guidance_scale", "-0.0,0", [0.0]),
    ("guidance_scale", "0-10[6]", [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
]


@pytest.mark.parametrize(("axis", "text", "values"), MEANINGS)
def test_ranges_mean_what_they_mean_in_automatic1111(axis, text, values):
    assert repr(axes.parse(axis, text)) == repr(values)


MISTAKES = [
    ("guidance_scale", "NaN", "NaN is neither a number nor a range"),
    ("guidance_scale", "inf", "inf is neither"),
    ("guidance_scale", "1e99", "1e99 is more than 100"),
    ("seed", "1e99", "1e99 is more than 9223372036854775807"),
    ("seed", "-1", "-1 is less than 0"),
    ("seed", "1.5", "1.5 is not a whole number"),
    ("seed", "", "seed has no value"),
    ("seed", " , ", "seed has no value"),
    ("seed", "10-1", "write 10-1(-1)"),
    ("seed", "1-10(-2)", "write 1-10(+2)"),
    ("seed", "1-10(+0)", "step of 0"),
    ("seed", "0-1e18(+1)", "more than 100 values"),
    ("seed", "1-10[999999999999999]", "at most 100"),
    ("seed", "1-10[0]", "asks for no value"),
    ("num_inference_steps", "0-5", "0 is less than 1"),
    ("checkpoint", "checkpoint-000011", "did you mean checkpoint-000010?"),
    ("checkpoint", "", "give one or more of: checkpoint-000010"),
    ("checkpoint", "../../etc/passwd", "is unknown"),
    ("scheduler", '"open', "odd quotation mark"),
    ("prompt", "\n \n", "prompt has no value"),
    ("prompt", "x" * 2001, "2,001 characters"),
    ("prompt", "\ud800", "surrogate"),
    ("colour", "red", "axis colour is unknown"),
]


@pytest.mark.parametrize(("axis", "text", "sentence"), MISTAKES)
def test_mistakes_name_axis_value_and_mend(axis, text, sentence):
    with pytest.raises(UserError) as error:
        axes.parse(axis, text, ["checkpoint-000010", "checkpoint-000020", "ddim"])
    assert sentence in str(error.value)
    assert axis in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shortest_text():
    assert axes.format_values("seed", list(range(1, 11))) == "1-10"
    assert axes.format_values("seed", [1, 3, 5, 7, 9, 20]) == "1-9[5],20"
    assert axes.format_values("seed", [1, 3, 5, 7, 10]) == "1-10[5]"
    assert axes.format_values("guidance_scale", [1.5, 3.0, 4.5, 6.0, 7.5]) == "1.5-7.5[5]"


numbers = {
    "seed": st.integers(0, 2**63 - 1) | st.integers(0, 20),
    "num_inference_steps": st.integers(1, 1000),
    "guidance_scale": st.floats(1e-5, 100) | st.integers(0, 200).map(lambda number: number / 2),
}


@given(st.sampled_from(sorted(numbers)).flatmap(
    lambda axis: st.tuples(st.just(axis), st.lists(numbers[axis], min_size=1, max_size=12, unique=True))
))  # fmt: skip
def test_numbers_come_back(case):
    axis, values = case
    text = axes.format_values(axis, values)
    assert axes.parse(axis, text) == values
    assert len(text) <= len(",".join(map(str, values)))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
                .filter(str.strip), min_size=1, max_size=6, unique=True))  # fmt: skip
def test_words_come_back(words):
    words = [word.strip() for word in words if word.strip() and "\x00" not in word]
    words = list(dict.fromkeys(words))
    if words:
        assert axes.parse("run", axes.format_values("run", words), words) == words


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
                .map(str.strip).filter(bool), min_size=1, max_size=6, unique=True))  # fmt: skip
def test_prompts_come_back(prompts):
    assert axes.parse("prompt", axes.format_values("prompt", prompts)) == prompts


@given(
    st.sampled_from([*axes.NUMBERS, *axes.WORDS, *axes.TEXTS]),
    st.text("0123456789eE+-.,()[] \n\"'Na", max_size=60) | st.text(max_size=60),
)
def test_any_text_gives_values_within_bounds_or_one_sentence(axis, text):
    start = time.thread_time()
    try:
        values = axes.parse(axis, text, ["1", "Na", "e"])
    except UserError as error:
        values, sentence = None, str(error)
    if values is None:
        assert "\n" not in sentence
        assert axis in sentence
        assert len(sentence) < 300
    else:
        assert 1 <= len(values) <= axes.MAX_VALUES
        if axis in axes.NUMBERS:
            kind, low, high = axes.NUMBERS[axis]
            assert all(type(value) is kind and low <= value <= high for value in values)
    assert time.thread_time() - start < 1


@pytest.mark.parametrize("text", ["9" * 10**6, "1-" * 10**5, "0-1e18(+1e-6)", "1e999999-1", "((" * 10**5, "1," * 10**6])
def test_hostile_text_is_refused_at_once(text):
    start = time.thread_time()
    with pytest.raises(UserError):
        axes.parse("seed", text)
    assert time.thread_time() - start < 0.5
