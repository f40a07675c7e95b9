"""How much code the launchers of both clouds share. As a program, it prints the lines of each part.

python tests/test_cloud_lines.py
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
LAUNCHERS = {
    "SageMaker": ("launch_sagemaker.py", "run_sagemaker_job.py"),
    "Hugging Face Jobs": ("launch_hf_job.py", "run_hf_job.py"),
}


def imported(file: Path) -> set[Path]:
    """Return the modules of t2i/clouds that a file imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("t2i.clouds"):
            names |= {node.module.split(".")[-1], *(alias.name for alias in node.names)}
    found = (SCRIPTS / "t2i/clouds" / f"{name}.py" for name in names)
    return {path for path in found if path.is_file()}


def reached(names: tuple[str, ...]) -> set[Path]:
    """Return scripts and the modules of t2i/clouds that they need, also indirectly."""
    waiting, found = [SCRIPTS / name for name in names], set()
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imported(file)
    return found


def code_lines(file: Path) -> int:
    """Return the number of lines that hold code: no blank lines, comments or docstrings."""
    text = file.read_text(encoding="utf-8")
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def parts() -> dict[str, dict[str, int]]:
    """Return the lines of code per file: of the part that both clouds need, and of each cloud's own."""
    needed = {cloud: reached(names) for cloud, names in LAUNCHERS.items()}
    both = set.intersection(*needed.values())
    groups = {"shared": both, **{cloud: files - both for cloud, files in needed.items()}}
    return {name: {file.name: code_lines(file) for file in sorted(files)} for name, files in groups.items()}


def test_each_cloud_is_small_beside_what_is_shared():
    found = {name: sum(files.values()) for name, files in parts().items()}
    assert found["Hugging Face Jobs"] < 850  # to read in one sitting
    assert found["shared"] > 400
    assert {"launch.py", "costs.py", "staging.py", "container.py"} <= set(parts()["shared"])


def test_the_documents_have_these_figures():
    text = " ".join((SCRIPTS.parent / "docs/clouds.md").read_text(encoding="utf-8").split())
    found = {name: f"{sum(files.values()):,}" for name, files in parts().items()}
    assert f"share {found['shared']} lines" in text
    assert f"{found['Hugging Face Jobs']} lines of its own, and SageMaker {found['SageMaker']}." in text


def test_no_cloud_needs_the_other():
    for cloud, files in parts().items():
        prefixes = {
            "Hugging Face Jobs": ("aws_", "sagemaker_"),
            "SageMaker": ("hf_",),
            "shared": ("aws_", "sagemaker_", "hf_"),
        }
        assert not [name for name in files if name.startswith(prefixes[cloud])]


def test_lines_are_those_of_code(tmp_path):
    file = tmp_path / "a.py"
    head = '"""A module.\n\nText.\n"""\n\nimport os  # why\n\n\n# comment\n'
    file.write_text(head + 'def f(\n    a,\n):\n    """Return."""\n    return [\n        a,\n    ]\n')
    assert code_lines(file) == 7


def main() -> None:
    for name, files in parts().items():
        print(f"{name}: {sum(files.values())} lines of code")
        for file, lines in files.items():
            print(f"  {file:24} {lines:4}")


if __name__ == "__main__":
    sys.exit(main())
