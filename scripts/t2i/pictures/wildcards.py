"""Expand alternatives in a prompt, such as `{red|blue} flower`, to several prompts. This module imports no torch."""

import re

from t2i.errors import UserError

TOKENS = re.compile(r"\\[{|}]|[{|}]|[^\\{|}]+|\\")
EXAMPLE = "write alternatives as in {red|blue} flower"


def expand(text: str, limit: int) -> list[str]:
    r"""Return all prompts that a text with alternatives stands for, in the order of the alternatives.

    Braces may be nested, and an alternative may be empty. `\{`, `\|` and `\}` stand for the characters themselves. A
    text without braces is returned unchanged. In other texts, spaces beside an empty alternative are removed.

    Args:
        text: prompt with alternatives.
        limit: largest number of prompts.

    Returns:
        The different prompts, 1 to `limit`.

    Raises:
        UserError: braces are not balanced or are empty, or there are more than `limit` prompts.
    """
    if not re.search("[{}]", text):
        return [text]
    # For each open brace: the finished alternatives, and the beginnings of the present one. The first level is the text.
    levels: list[tuple[list[str], list[str]]] = [([], [""])]
    before = ""
    has_braces = False
    for token in TOKENS.findall(text):
        finished, present = levels[-1]
        if token == "{":
            has_braces = True
            levels.append(([], [""]))
        elif token == "|" and len(levels) > 1:
            levels[-1] = ([*finished, *present], [""])
        elif token == "}":
            if len(levels) == 1:
                raise UserError(rf"the prompt has a }} without its {{; {EXAMPLE}, or \}} for the character")
            if before == "{":
                raise UserError(rf"the prompt has empty braces {{}}; {EXAMPLE}, or \{{ for the character")
            options = dict.fromkeys([*finished, *present])
            levels.pop()
            finished, present = levels[-1]
            levels[-1] = (finished, list(dict.fromkeys(start + end for start in present for end in options)))
        else:
            words = token[1] if len(token) == 2 and token[0] == "\\" else token
            levels[-1] = (finished, [start + words for start in present])
        before = token
        if sum(map(len, levels[-1])) > limit:
            raise UserError(f"the prompt's braces stand for more than {limit} prompts; give fewer alternatives")
    if len(levels) > 1:
        raise UserError(rf"the prompt has a {{ without its }}; {EXAMPLE}, or \{{ for the character")
    prompts = levels[0][1]
    return list(dict.fromkeys(re.sub(" {2,}", " ", one).strip(" ") for one in prompts)) if has_braces else prompts


def literal(prompt: str) -> str:
    r"""Return the text that `expand` turns into this one prompt: with `\{`, `\|` and `\}` if it has braces."""
    return re.sub(r"([{|}])", r"\\\1", prompt) if re.search("[{}]", prompt) else prompt
