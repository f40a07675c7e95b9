"""Make captions: clean a text, make texts of a label, and put a prefix before them. This module imports neither torch nor datasets."""

import re
from collections.abc import Iterable
from typing import Any

from t2i.errors import UserError


def clean(value: Any) -> str:
    """Return a caption as one line of text. A list of captions gives its first non-empty one."""
    if isinstance(value, (list, tuple)):
        return next((text for text in map(clean, value) if text), "")
    return "" if value is None else " ".join(str(value).split())


def prefixed(caption: str, prefix: str) -> str:
    """Put `--caption_prefix` before a caption, unless the caption is empty or already begins with the prefix."""
    words = clean(prefix)
    return caption if not words or not caption or _begins_with(caption, words) else f"{words} {caption}"


def unprefixed(caption: str, prefix: str) -> str:
    """Return a caption without the `--caption_prefix` at its beginning, if it begins with the prefix."""
    words = clean(prefix)
    return caption.removeprefix(words).lstrip() if _begins_with(caption, words) else caption


def _begins_with(caption: str, words: str) -> bool:
    """Return whether a caption begins with whole words: "photo" does not begin "photograph"."""
    is_cut = words[-1:].isalnum() and caption[len(words) :][:1].isalnum()
    return caption.startswith(words) and not is_cut


def check_templates(templates: list[str]) -> None:
    """Raise `UserError` if a template of `--caption_template` has no place for the label, so that all captions would be alike."""
    for template in templates:
        if "{label}" not in template:
            raise UserError(
                f"caption_template {template!r} does not contain {{label}}; write e.g. 'a photo of a {{label}}'"
            )


def label_captions(label: str | None, templates: list[str]) -> list[str]:
    """Return the distinct captions for a label, made from `templates`. No label gives one empty caption."""
    words = clean(re.sub(r"[_-]", " ", label)) if label is not None else ""
    return list(dict.fromkeys(template.replace("{label}", words) for template in templates)) if words else [""]


def prefixed_all(captions: Iterable[str], prefix: str) -> list[str]:
    """Return the distinct captions of an image with `--caption_prefix` before each; see `prefixed`."""
    return list(dict.fromkeys(prefixed(caption, prefix) for caption in captions))
