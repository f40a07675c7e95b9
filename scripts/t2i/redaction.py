"""Replace secrets in texts and settings by "[redacted]". This module imports no torch."""

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import yaml

REDACTED = "[redacted]"
_SECRET_ENDINGS = ("token", "secret", "password", "passwd", "passphrase", "credential", "apikey")
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key")}
_HARMLESS_LAST_WORDS = {"file", "path", "dir", "folder", "sock", "length", "count", "type", "name", "index", "limit"}
_SPECIAL_TOKENS = {"bos", "eos", "unk", "pad", "cls", "sep", "mask"}  # a tokenizer's `pad_token` is no secret
_NAME_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_HARMLESS_VALUE = re.compile(r"(?i)[-+]?[\d.]+(e[-+]?\d+)?|true|false|null|none|~|\[redacted\]|\[?|\{|<.*>")
_URL_USER = re.compile(r"(?<=://)[^\s/?#'\"<>]+(?=@)")
_URL_QUERY = re.compile(r"(?i)([?&](?:key|sig|signature|x-(?:amz|goog)-(?:signature|credential))=)[^&\s\"'#]+")
_ASSIGNMENT = re.compile(  # `name: value`, `name=value`, `--name value`
    r"(?i)((?<![\w.-])[\w.-]*?(?:token|secret|passw|passphrase|credential|(?:api|access|private|account)[_-]?key)"
    r"[\w.-]*(?:[\"']?[ \t]*[:=][ \t]*|[ \t]+(?=[^-\s])))"
    r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;&})]+)"
)
_TOKEN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|gh[oprsu]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|sk-[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
    r"|(?i:(?<=bearer )|(?<=authorization: basic ))[\w.~+/=-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",
    re.DOTALL,
)
_url_passwords: set[str] = set()  # from the tracking URLs of this process


def remember_secret(password: str) -> None:
    """Remember a URL's password, so that `redact` replaces it from now on, as written and decoded."""
    _url_passwords.update({password, unquote(password)})


@lru_cache(maxsize=4096)  # Each redacted text asks for all variables of the environment.
def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in _NAME_WORDS.findall(name)]
    if not words or words[-1] in _HARMLESS_LAST_WORDS or _SPECIAL_TOKENS & set(words):
        return False
    return any(word.removesuffix("s").endswith(_SECRET_ENDINGS) and word != "tokens" for word in words) or any(
        pair in _SECRET_PAIRS for pair in pairwise(words)
    )


def _secret_values() -> list[str]:
    """Return the values that are secret in every text, the longest first.

    Secret values are those of environment variables with a secret name, and passwords in URLs of any variable.
    """
    values = set(_url_passwords)
    for name, value in os.environ.items():
        if _is_secret_name(name):
            values.add(value)
        for user in _URL_USER.findall(value):
            values.add(user.partition(":")[2])
    values = {value for value in values if len(value) >= 8 and not value.startswith(REDACTED)}
    forms = {form for value in values for form in (value, quote(value, safe=""), json.dumps(value)[1:-1])}
    return sorted(forms, key=len, reverse=True)


def _redact_assignment(match: re.Match[str]) -> str:
    name, value = match.groups()
    bare = value.strip("\"'")
    is_assigned = name.startswith("-") or name.rstrip().endswith((":", "="))  # otherwise it is a sentence about a token
    if not is_assigned or not _is_secret_name(name) or _HARMLESS_VALUE.fullmatch(bare):
        return match.group()
    mark = value[0] if value[0] in "\"'" else ""
    return f"{name}{mark}{REDACTED}{mark}"


def holds_token(text: str) -> bool:
    """Return whether a text holds what has the shape of a token, such as one of the Hub, or of a private key."""
    return bool(_TOKEN_SHAPES.search(text))


def redact(text: str) -> str:
    """Replace every secret in a text by "[redacted]".

    `redact` replaces four kinds of secrets:
    - A value from 8 characters on is secret if its environment variable has a secret name (token, password, api_key, …).
    - Users, passwords and query tokens in URLs are secret.
    - Values that a text assigns to secret names are secret (`hub_token: x`, `--hub_token x`).
    - Tokens of a known shape are secret (Hugging Face, AWS, GitHub, JWT, private keys).
    """
    return _redact(text, _secret_values())


def _redact(text: str, secrets: list[str]) -> str:
    for value in secrets:
        text = text.replace(value, REDACTED)
    text = _URL_USER.sub(REDACTED, text)
    text = _URL_QUERY.sub(rf"\g<1>{REDACTED}", text)
    text = _ASSIGNMENT.sub(_redact_assignment, text)
    return _TOKEN_SHAPES.sub(REDACTED, text)


def redact_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested config, with "[redacted]" for values of secret names and secrets within other texts."""
    return _redact_items(config, _secret_values())


def _redact_items(config: Mapping[str, Any], secrets: list[str]) -> dict[str, Any]:
    return {key: _redact_value(str(key), value, secrets) for key, value in config.items()}


def _redact_value(key: str, value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return _redact_items(value, secrets)
    if isinstance(value, list | tuple):
        return [_redact_value(key, item, secrets) for item in value]
    if isinstance(value, str | Path):
        harmless = _HARMLESS_VALUE.fullmatch(str(value)) or not _is_secret_name(key)
        return _redact(str(value), secrets) if harmless else REDACTED
    return value


def public_yaml(settings: dict[str, Any]) -> str:
    """Return settings as YAML that `load_recipe` reads, without the secrets that a user typed into an option."""
    return yaml.safe_dump(redact_config(settings), sort_keys=False)


def without_paths(settings: Any) -> Any:
    """Return settings with each absolute path cut to its last part, so that they can be published."""
    if isinstance(settings, Mapping):
        return {key: without_paths(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_paths(value) for value in settings]
    return Path(settings).name if isinstance(settings, str) and Path(settings).is_absolute() else settings
