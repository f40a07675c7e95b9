"""Imports go one way, and settings import nothing heavy."""

import ast
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPTS

SCRIPT_FILES = sorted(SCRIPTS.glob("*.py"))
MODULES = sorted((SCRIPTS / "t2i").glob("*.py"))


def imported(path):
    """Names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    "path", [*SCRIPT_FILES, *MODULES, *sorted((ROOT / "dashboard").rglob("*.py"))], ids=lambda path: path.name
)
def test_nothing_imports_a_script(path):
    scripts = {script.stem for script in SCRIPT_FILES}
    assert not scripts & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_only_scripts_make_an_accelerator(path):
    if path.name != "distributed.py":
        assert "Accelerator(" not in path.read_text()


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "runs",
        "cards",
        "axes",
        "pictures",
        "cells",
        "curves",
        "tracking",
        "browse",
        "reconstructions",
        "space",
    ],
)
def test_light_modules_import_no_torch(module):
    code = f"import sys; sys.path.append({str(SCRIPTS)!r}); import t2i.{module}; print({{'torch', 'diffusers'}} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


def test_every_requirement_is_pinned_and_explained():
    for path in (ROOT / "requirements.txt", SCRIPTS / "requirements.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert "==" in line.split("#")[0], line
                assert "#" in line, line


def test_the_scale_of_latents_has_one_home():
    for path in [*SCRIPT_FILES, *MODULES]:
        assert "0.18215" not in path.read_text()
