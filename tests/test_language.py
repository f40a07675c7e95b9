"""Sentences are short, in the documents and in the code: `python tests/test_language.py` prints the figures and the longest ones.

A sentence ends at `.`, `!` or `?` before a space or the end, and with its list item, paragraph or docstring entry. Code blocks,
tables, headings and pictures are left out. Inline code and a placeholder of an f-string count as one word.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "scripts" / "recipes" / "README.md",
]
CODE = sorted([*(ROOT / "scripts").rglob("*.py"), *(ROOT / "dashboard").rglob("*.py")])
KINDS = ("docstrings", "help texts", "error messages")
MEAN, LONGEST, README_WORDS = 18, 35, 900  # words per sentence, words of README.md
SHORT_FORMS = re.compile(r"\b(e\.g|i\.e|cf|vs|approx|etc)\.(?=\s)")
COMMAND = re.compile(r"(\$ |\w+=\S+ )?(python3?|accelerate launch|torchrun|streamlit run|make|pip|mlflow|export) \S")
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")


class Sentence(NamedTuple):
    """A sentence, where its text begins, and how many words it has."""

    path: Path
    line: int
    text: str

    @property
    def words(self) -> int:
        return sum(any(letter.isalnum() for letter in word) for word in self.text.split())

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.words} words: {self.text}"


def plain(text: str) -> str:
    """`text` without Markdown: inline code and links are what a reader counts of them."""
    text = re.sub(r"(`+)(?=[^`]).+?(?<=[^`])\1", " CODE ", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"https?://\S+", "URL", text)
    text = re.sub(r" CODE (?=[.!?,;:)])", " CODE", text)
    return SHORT_FORMS.sub(r"\1", re.sub(r"[*_]{2}|(?<!\w)\*|\*(?!\w)", "", text))


def split(path: Path, blocks: list[tuple[int, str]]) -> Iterator[Sentence]:
    """The sentences of blocks of text, each with the line at which it begins."""
    for line, block in blocks:
        for text in re.split(r"(?<=[.!?])[)\"'”]*\s+", " ".join(plain(block).split())):
            sentence = Sentence(path, line, text.strip())
            if sentence.words:
                yield sentence


def blocks_of(text: str, first_line: int = 1, docstring: bool = False) -> list[tuple[int, str]]:
    """Paragraphs and list items of Markdown or of a docstring, without code blocks, tables and headings."""
    blocks: list[tuple[int, list[str]]] = []
    fenced = in_command = open_block = False
    entry_indent: int | None = None  # of the entries of a docstring's Args section; -1: of its first line, not seen yet
    for number, line in enumerate(text.splitlines(), first_line):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith("```"):
            fenced, open_block = not fenced, False
            continue
        if in_command or (docstring and COMMAND.match(stripped)):
            in_command, open_block = stripped.endswith("\\"), False
            continue
        if fenced or not stripped or stripped.startswith(("|", "#", "<", "---")):
            open_block = False
            continue
        if docstring and SECTION.match(stripped):
            entry_indent, stripped, open_block = -1, SECTION.sub("", stripped, count=1).strip(), False
            if not stripped:
                continue
        elif entry_indent is not None:
            entry_indent = indent if entry_indent == -1 else entry_indent
            open_block = open_block and indent > entry_indent
        if not open_block or re.match(r"([-*]|\d+\.) ", stripped):
            blocks.append((number, []))
        open_block = True
        blocks[-1][1].append(re.sub(r"^([-*]|\d+\.) ", "", stripped))
    return [(number, " ".join(lines)) for number, lines in blocks]


def page_sentences(path: Path) -> list[Sentence]:
    """The sentences of a document."""
    return list(split(path, blocks_of(path.read_text(encoding="utf-8"))))


def literal(node: ast.expr) -> str | None:
    """The text of a message, with one word for whatever is filled in; None if nothing of it is written there."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [literal(node.left), literal(node.right)]
        return "".join(side or "X" for side in sides) if any(sides) else None
    if isinstance(node, ast.IfExp):
        return max((literal(node.body) or "", literal(node.orelse) or ""), key=len) or None
    return None


def error_names(trees: list[ast.Module]) -> set[str]:
    """UserError and the classes made from it."""
    names, size = {"UserError"}, 0
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while size < len(names):
        size = len(names)
        names |= {node.name for node in classes if {getattr(base, "id", "") for base in node.bases} & names}
    return names


def field_comments(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The comments behind and above the fields of dataclasses, as tyro reads them for `--help`."""
    text = path.read_text(encoding="utf-8")
    comments = {
        token.start[0]: (token.string.lstrip("#: "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(type:|noqa|fmt:|---)", token.string)
    }
    for node in ast.walk(tree):
        decorators = getattr(node, "decorator_list", []) if isinstance(node, ast.ClassDef) else []
        if not any("dataclass" in ast.unparse(decorator) for decorator in decorators):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign):
                continue
            behind = [line for line in range(field.lineno, (field.end_lineno or 0) + 1) if line in comments]
            if behind:
                yield (
                    behind[0],
                    re.sub(r"\s*#\s*(type:|noqa|fmt:).*", "", " ".join(comments[line][0] for line in behind)),
                )
            first = field.lineno
            while comments.get(first - 1, ("", False))[1]:
                first -= 1
            if first < field.lineno:
                yield first, " ".join(comments[line][0] for line in range(first, field.lineno))


@cache
def code_sentences() -> dict[str, list[Sentence]]:
    """The sentences of docstrings, of help texts, and of the literal texts of UserError, in scripts/ and dashboard/."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}
    errors = error_names(list(trees.values()))
    sentences: dict[str, list[Sentence]] = defaultdict(list)
    for path, tree in trees.items():
        sentences["help texts"] += split(path, list(field_comments(path, tree)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if docstring := ast.get_docstring(node):
                    line = node.body[0].lineno
                    sentences["docstrings"] += split(path, blocks_of(docstring, line, docstring=True))
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                messages = node.args[:1] if name in errors else []
                sentences["error messages"] += texts_of(path, messages)
                helps = [word.value for word in node.keywords if word.arg == "help"]
                sentences["help texts"] += texts_of(path, helps)
    return sentences


def texts_of(path: Path, nodes: list[ast.expr]) -> Iterator[Sentence]:
    """The sentences of literal texts."""
    for node in nodes:
        yield from split(path, [(node.lineno, literal(node) or "")])


def too_long(sentences: list[Sentence]) -> list[str]:
    """What is wrong with them: sentences over the limit, and a mean over the limit."""
    wrong = [str(sentence) for sentence in sorted(sentences, key=lambda one: -one.words) if sentence.words > LONGEST]
    average = mean(sentence.words for sentence in sentences)
    return wrong + ([f"mean of {average:.1f} words per sentence, over {MEAN}"] if average > MEAN else [])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_of_the_documents_are_short(path):
    assert too_long(page_sentences(path)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_of_the_code_are_short(kind):
    assert too_long(code_sentences()[kind]) == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def test_the_measure_counts_what_a_reader_reads(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n\nOne two `three four` five. Six [seven eight](a b.md)!\nNine e.g. ten\n\n- eleven\n  twelve\n- thirteen\n"
        "\n```\nno words here\n```\n\n| a | table |\n|---|---|\n\n![a picture](b.png)\n"
    )
    assert [sentence.words for sentence in page_sentences(page)] == [4, 3, 3, 2, 1]
    assert [one.line for one in page_sentences(page)] == [3, 3, 3, 6, 8]
    docstring = (
        "Return a thing.\n\npython x.py --a b \\\n    --c\n\nArgs:\n    one: two three,\n        four.\n    five: six\n"
    )
    blocks = blocks_of(docstring, docstring=True)
    assert [text for _, text in blocks] == ["Return a thing.", "one: two three, four.", "five: six"]
    tree = ast.parse("class A(UserError): pass\nraise A(f'one {two + 3} three' + ' four')")
    assert error_names([tree]) == {"UserError", "A"}
    assert literal(tree.body[1].exc.args[0]) == "one X three four"
    source = tmp_path / "options.py"
    source.write_text(
        "@dataclass\nclass A:\n    b: int = 1  # One.\n    # Two\n    # three.\n    c: int = 2\n    d: int = 3\n"
    )
    assert list(field_comments(source, ast.parse(source.read_text()))) == [(3, "One."), (4, "Two three.")]


def main() -> int:
    """Print the figures, the longest sentences and where they are; return 1 if a limit is exceeded."""
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    groups = {str(path.relative_to(ROOT)): page_sentences(path) for path in PAGES} | code_sentences()
    pages = [sentence for path in PAGES for sentence in groups[str(path.relative_to(ROOT))]]
    code = [sentence for kind in KINDS for sentence in groups[kind]]
    print(f"{'':28} sentences  mean  longest  over {LONGEST}  over 25")
    for name, group in (groups | {"all documents": pages, "all code": code}).items():
        counts = [sentence.words for sentence in group]
        over = [sum(count > limit for count in counts) for limit in (LONGEST, 25)]
        print(f"{name:28} {len(counts):9} {mean(counts):5.1f} {max(counts):8} {over[0]:8} {over[1]:8}")
    print(f"README.md: {len((ROOT / 'README.md').read_text(encoding='utf-8').split())} words of {README_WORDS}")
    for title, group in (("documents", pages), ("code", code)):
        print(f"\nthe longest sentences of the {title}:")
        for sentence in sorted(group, key=lambda one: -one.words)[:many]:
            print(sentence)
    return int(any(too_long(group) for group in groups.values()))


if __name__ == "__main__":
    sys.exit(main())
