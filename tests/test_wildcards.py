"""Alternatives in a prompt: every form that a user may type, and a sentence for those that mean nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.errors import UserError
from t2i.pictures.wildcards import expand, literal


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a red flower", ["a red flower"]),
        ("", [""]),
        ("  two  spaces | a bar \\ ", ["  two  spaces | a bar \\ "]),
        ("{red|blue} flower", ["red flower", "blue flower"]),
        ("{red|blue} {rose|tulip}", ["red rose", "red tulip", "blue rose", "blue tulip"]),
        ("a {red|{light|dark} blue} flower", ["a red flower", "a light blue flower", "a dark blue flower"]),
        ("a {|tall} flower", ["a flower", "a tall flower"]),
        ("{red|red|blue} flower", ["red flower", "blue flower"]),
        ("{red} flower", ["red flower"]),
        ("{a|b}|c", ["a|c", "b|c"]),
        (r"a \{red\|blue\} flower", ["a {red|blue} flower"]),
        (r"{\||\}}", ["|", "}"]),
        ("{|}", [""]),
        ("{rot|grün} 花\n{a|b}", ["rot 花\na", "rot 花\nb", "grün 花\na", "grün 花\nb"]),
    ],
)
def test_alternatives_become_prompts_in_their_order(text, prompts):
    assert expand(text, 36) == prompts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{red|blue flower", "a { without its }"),
        ("red|blue} flower", "a } without its {"),
        ("{a|{b} flower", "a { without its }"),
        ("a {} flower", "empty braces {}"),
        ("{" * 500, "a { without its }"),
        ("{a|b}" * 200, "more than 36 prompts"),
        ("{" + "|".join(map(str, range(37))) + "}", "more than 36 prompts"),
    ],
)
def test_what_means_nothing_gets_one_sentence(text, said):
    with pytest.raises(UserError, match=said.replace("{", r"\{").replace("}", r"\}")) as error:
        expand(text, 36)
    assert "\n" not in str(error.value)


def test_any_depth_of_braces_is_read():
    assert expand("{" * 400 + "a" + "}" * 400, 36) == ["a"]


@given(st.text(st.sampled_from("ab {}|\\"), max_size=30))
def test_a_picture_s_own_prompt_comes_back_as_it_is(prompt):
    assert expand(literal(prompt), 1) == [prompt]


@given(st.text(st.sampled_from("ab {}|\\"), max_size=40))
def test_any_text_gives_prompts_or_a_sentence(text):
    try:
        prompts = expand(text, 5)
    except UserError:
        return
    assert 1 <= len(prompts) <= 5
    assert len(set(prompts)) == len(prompts)
