"""Quotations in the documents stand in the code."""

import ast
import re

import pytest

from conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
FOREIGN = {"pip": "THESE PACKAGES DO NOT MATCH THE HASHES", "Python": "ModuleNotFoundError: No module named"}


def texts():
    """Texts of the code, with … where something is filled in; of the Makefile as it stands."""
    files = [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "dashboard").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield (ROOT / "Makefile").read_text(encoding="utf-8")


def quoted():
    """The first cells of the tables whose head is `message`, each with the rest of its row."""
    head = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            head = ""
        elif not head:
            head = cells[0]
        elif head == "message" and not line.startswith("|---"):
            yield cells


def test_each_quoted_message_stands_in_the_code():
    code = list(texts())
    rows = list(quoted())
    assert len(rows) > 35
    missing = []
    for message, cause, fix in rows:
        assert cause.endswith("."), cause
        assert fix.endswith((".", ")", "`")), fix
        if any(message.endswith(f"({program})") for program in FOREIGN):
            continue
        parts = [part.strip(" ;:") for part in re.fullmatch(r"`(.*)`", message)[1].split("…")]
        missing += [f"{part!r} of {message}" for part in parts if part and not any(part in text for text in code)]
    assert missing == []


@pytest.mark.parametrize("name", ["clean-caches", "lock", "export"])
def test_targets_that_documents_name_are_there(name):
    assert re.search(rf"(?m)^{name}:", (ROOT / "Makefile").read_text())


def test_documents_name_the_pinned_torch_and_the_first_commands():
    pin = re.search(r"(?m)^torch==[0-9.]+", (ROOT / "requirements-train.txt").read_text())[0]
    assert f"pip install {pin}`" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make demo", "make test", "make dashboard", "source .venv/bin/activate"):
        assert command in readme
