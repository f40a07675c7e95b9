"""What the documents name exists: commands with their options and values, make targets, recipes, files, tests, links, pictures.

Each command is parsed by its script's own parser, and none is run. No torch is imported.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import re
import shlex
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

from conftest import ROOT, SCRIPTS
from t2i import config

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "scripts" / "recipes" / "README.md",
]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"(?m)^([a-z][\w-]*):(?!=)", MAKEFILE))
FOREIGN = {
    "apt-get",
    "aws",
    "docker",
    "export",
    "hf",
    "mlflow",
    "pip",
    "source",
    "uv",
}  # programs whose options are not checked
LAUNCHERS = {"accelerate", "torchrun"}
PROGRAMS = {*FOREIGN, *LAUNCHERS, "make", "python", "streamlit"}
ARGS_OF = {
    "publish": "publish_model.py",
    "space": "publish_space.py",
    "clean-caches": "clean_caches.py",
    "jobs": "list_jobs.py",
}  # make target: its script
DIAGRAMS = {"README.md": 1, "docs/architecture.md": 1, "docs/clouds.md": 2}  # blocks that hold no commands
FOLDERS = "accelerate_configs|benchmarks|dashboard|datasets_card|docs|scripts|tests"


class Snippet(NamedTuple):
    """A command of a document, and where it stands."""

    page: str
    line: int
    text: str


def is_command(text: str) -> bool:
    """Whether a line of code begins with a program, or with a script of this repository."""
    words = re.sub(r"^([A-Z_]+=\S+ )+", "", text.strip()).split()
    first = words[0] if words and "─" not in text else ""
    return (first in PROGRAMS and len(words) > 1) or bool(
        re.fullmatch(r"(\w+/)*\w+\.(py|sh)", first) and len(words) > 1
    )


def fenced(page: Path) -> Iterator[tuple[int, str, list[str]]]:
    """The code blocks of a document: first line, language, lines."""
    language: str | None = None
    block: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip().startswith("```"):
            if language is not None:
                yield number - len(block), language, block
            language, block = (line.strip("` ") if language is None else None), []
        elif language is not None:
            block.append(line)


def prose(page: Path) -> list[tuple[int, str]]:
    """The lines of a document without its code blocks."""
    kept, inside = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.strip().startswith("```")
        inside ^= fence
        if not fence and not inside:
            kept.append((number, line))
    return kept


def inline(page: Path) -> Iterator[tuple[int, str]]:
    """The inline code of a document."""
    for number, line in prose(page):
        for code in re.findall(r"`([^`]+)`", line):
            yield number, code


def commands() -> list[Snippet]:
    """The commands of all documents, and those at the head of each script."""
    found: list[Snippet] = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for number, language, block in fenced(page):
            if language == "" and is_command(block[0]):
                for line in "\n".join(block).replace("\\\n", " ").splitlines():
                    found += [Snippet(name, number, line)] if line.strip() and not line.startswith("#") else []
        found += [Snippet(name, number, code) for number, code in inline(page) if is_command(code)]
    for script in sorted(SCRIPTS.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        for line in docstring.replace("\\\n", " ").splitlines():
            found += [Snippet(f"scripts/{script.name}", 1, line)] if is_command(line) else []
    return found


def check(text: str) -> None:
    """Check one command; raise `AssertionError`, `SystemExit` or the script's own error if it cannot be typed."""
    words = [word for word in shlex.split(text, comments=True) if word != "…"]
    if "&&" in words:
        check(shlex.join(words[: words.index("&&")]))
        words = words[words.index("&&") + 1 :]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    program, *rest = words
    if program == "make":
        check_make(rest)
    elif rest[:1] == ["config"]:
        assert program == "accelerate"
    elif program in LAUNCHERS:
        check_launch(rest)
    elif program == "streamlit":
        check_streamlit(rest)
    elif program == "python":
        check_python(rest)
    elif program.endswith((".py", ".sh")):
        check_script(program, rest)
    else:
        assert program in FOREIGN, f"{program} is no program that the documents may use"


def check_make(words: list[str]) -> None:
    """Check targets, variables, and the arguments that a target hands to a script."""
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    for name in variables:
        assert re.search(rf"\$[({{]{name}[)}}]|(?m:^{name} [:?]?=)", MAKEFILE), f"the Makefile reads no {name}"
    assert set(targets) <= TARGETS, f"no target {set(targets) - TARGETS}"
    for name in ("CONFIG", "INSIDE", "REQUIREMENTS"):
        assert "…" in variables.get(name, "…") or (ROOT / variables[name]).is_file(), f"no file {variables[name]}"
    arguments = [word for word in shlex.split(variables.get("ARGS", "")) if word != "…"]
    for target in targets:
        if target in ("train", "sagemaker-train", "hf-train"):
            check_script(variables.get("SCRIPT", "scripts/train_unet.py"), arguments)
        elif target in ARGS_OF and not any("…" in word for word in arguments):
            check_script(ARGS_OF[target], [*required(ARGS_OF[target]), *arguments])
    if "LAUNCH_ARGS" in variables:
        check_script("scripts/launch_sagemaker.py", shlex.split(variables["LAUNCH_ARGS"]))


def required(script: str) -> list[str]:
    """What the Makefile gives to a script beside ARGS."""
    return {
        "publish_model.py": ["--model", "a", "--hub_model_id", "a/b"],
        "publish_space.py": ["--model", "a", "--space", "a/b"],
    }.get(script, [])


def check_python(words: list[str]) -> None:
    """Check `python -m module` and `python path/to/script.py`."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
    elif words[0] == "scripts/launch_local.py":
        check_launch(["launch", *words[1:]])
    else:
        check_script(words[0], words[1:])


def check_launch(words: list[str]) -> None:
    """Check `accelerate launch`: its options, its YAML, and the script with its options."""
    words = words[1:] if words[:1] == ["launch"] else words
    place = next((place for place, word in enumerate(words) if word.endswith(".py")), len(words))
    for name in names_of(words[:place]):
        assert f'"{name}"' in text_of_package("accelerate", "commands/launch.py"), f"accelerate launch has no {name}"
    if "--config_file" in words[:place]:
        file = words[words.index("--config_file") + 1]
        assert file.endswith("/X.yaml") or (ROOT / file).is_file(), f"no file {file}"
    if words[place:]:
        check_script(words[place], words[place + 1 :])


def check_streamlit(words: list[str]) -> None:
    """Check `streamlit run dashboard` and settings such as `--server.port`."""
    assert words[:2] == ["run", "dashboard"]
    for name in names_of(words[2:]):
        assert f'"{name[2:]}"' in text_of_package("streamlit", "config.py"), f"Streamlit has no setting {name}"


def names_of(words: list[str]) -> list[str]:
    """The options among words: `--name`, also of `--name=value`."""
    return [word.split("=")[0] for word in words if word.startswith("--")]


@cache
def text_of_package(package: str, file: str) -> str:
    """The source of a file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return (Path(str(spec.submodule_search_locations[0])) / file).read_text(encoding="utf-8")


def check_script(name: str, words: list[str]) -> None:
    """Check that a script exists, and let its own parser read the words."""
    path = ROOT / name if "/" in name else next(iter(ROOT.glob(f"scripts/{name}")), ROOT / "benchmarks" / name)
    if re.match(r"(PATH|path)/|train_(text_to_image|autoencoderkl)\.py", name):
        return  # diffusers' own
    assert path.is_file(), f"no file {name}"
    words = [word for word in words if "…" not in word]
    if path.parent != SCRIPTS:
        sources = [path, path.with_suffix(".py")]
        text = "".join(source.read_text(encoding="utf-8") for source in sources if source.is_file())
        for word in names_of(words):
            assert re.search(rf"""["' (]{word}[)"' ]""", text), f"{name} has no {word}"
        return
    parse(path.stem, words)


def parse(script: str, words: list[str]) -> None:
    """Parse a command line as a script of scripts/ does, up to its first work."""
    if sections := sections_of(script):
        config.parse(sections, "", words)
    elif script in ("launch_sagemaker", "launch_hf_job"):
        module = importlib.import_module(script)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [script, *words])
            command = module.read_options().command
        if command:
            check_script(command[0], command[1:])
    elif script == "run_recipe":
        module = importlib.import_module(script)
        own, overrides = module.take_overrides(words)
        recipe = config.load_recipe(module.check_options(module.parse_options(module.Options, "", own)).config)
        for section, options in overrides.items():
            config.override(recipe, section, [word for option in options for word in option])
    elif script in ("run_sagemaker_job", "run_hf_job", "list_jobs"):
        assert words == []
    elif script == "run_container":
        check(shlex.join(words))
    else:
        module = importlib.import_module(script)
        module.check_options(module.parse_options(module.Options, "", words))


@cache
def sections_of(script: str) -> tuple[str, ...]:
    """The sections of the recipe that a script parses: the first argument of its call of `parse`; () for other scripts."""
    for node in ast.walk(ast.parse((SCRIPTS / f"{script}.py").read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "parse"
            and isinstance(node.args[0], ast.Tuple)
        ):
            return tuple(ast.literal_eval(node.args[0]))
    return ()


def test_every_command_of_the_documents_can_be_typed():
    found = commands()
    assert len(found) > 90
    wrong = []
    for page, line, text in {snippet.text: snippet for snippet in found}.values():
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                check(text)
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}:{line}: {text}\n    {error} {said.getvalue()[-600:]}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "make nothing",
        "make train COLOR=red",
        "make demo REQUIREMENTS=none.txt",
        'make train ARGS="--learning_rat 1"',
        "make clean-caches ARGS='--removed caches'",
        "python scripts/nothing.py",
        "python scripts/train_unet.py --config nothing",
        "python scripts/train_unet.py --max_train_steps some",
        "python scripts/generate_images.py --promt a",
        "python scripts/run_recipe.py --train_vae.max_train_step 20",
        "python benchmarks/random_inputs.py --comands 3",
        "accelerate launch --config_file accelerate_configs/none.yaml scripts/train_vae.py",
        "accelerate launch --quiett scripts/train_vae.py",
        "torchrun scripts/train_vae.py --configg demo",
        "streamlit run dashboard --server.allowedHost=x",
        "conda install torch",
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(text):
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises((AssertionError, config.UserError, SystemExit)),
    ):
        check(text)


def test_each_code_block_holds_commands_python_or_a_known_diagram():
    diagrams: dict[str, int] = {}
    for page in PAGES:
        for number, language, block in fenced(page):
            if language == "python":
                for node in ast.walk(ast.parse("\n".join(block))):
                    if isinstance(node, ast.ImportFrom):
                        assert importlib.util.find_spec(str(node.module)), f"{page}:{number}"
            elif not is_command(block[0]):
                name = str(page.relative_to(ROOT))
                diagrams[name] = diagrams.get(name, 0) + 1
            assert language in ("", "python"), f"{page}:{number}: {language}"
    assert diagrams == DIAGRAMS


def options_of(cls: type) -> Iterator[str]:
    """The names and aliases of a dataclass's options, and of those nested in it."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kind = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(kind):
            yield from options_of(kind)
            continue
        aliases = [
            alias for note in getattr(hint, "__metadata__", ()) for alias in getattr(note, "aliases", None) or ()
        ]
        yield from (name, f"no_{name}", *(alias.removeprefix("--") for alias in aliases))


def known_options() -> set[str]:
    """The names of all options of the scripts and benchmarks, and of what launches them."""
    names = {"config", "SECTION.KEY", *options_of(config.Recipe)}
    for script in SCRIPTS.glob("*.py"):
        if "class Options" in script.read_text(encoding="utf-8"):
            names |= set(options_of(importlib.import_module(script.stem).Options))
    sources = [
        SCRIPTS / "launch_sagemaker.py",
        SCRIPTS / "launch_hf_job.py",
        SCRIPTS / "t2i/clouds/launch.py",
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.sh"),
    ]
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *(ROOT / "tests").glob("*.py"))]
    texts.append(text_of_package("accelerate", "commands/launch.py"))
    return names | {name for text in texts for name in re.findall(r"[\"' ]--([a-z_]+)[)\"' ]", text)}


def test_options_named_in_the_documents_exist():
    options = known_options()
    wrong = []
    for page in PAGES:
        if page.name == "from_diffusers.md":
            continue  # it names options of theirs; tests/test_from_diffusers.py checks it
        for number, code in inline(page):
            if code.split()[0] in FOREIGN or code.startswith("python -m"):
                continue
            for name in re.findall(r"(?:^|\s)--([\w.-]+)", code):
                known = name in options or name.partition(".")[2] in options or name.startswith("server.")
                wrong += [] if known else [f"{page.name}:{number}: --{name}"]
    assert wrong == []


def test_recipes_named_in_the_documents_exist():
    wrong = []
    for page in PAGES:
        for number, line in prose(page):
            for name in re.findall(r"\brecipe `(\w+)`", line):
                wrong += [] if (SCRIPTS / "recipes" / f"{name}.yaml").is_file() else [f"{page.name}:{number}: {name}"]
    table = (SCRIPTS / "recipes" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?m)^\| `(\w+)` \|", table))
    assert wrong == []
    assert listed == {path.stem for path in (SCRIPTS / "recipes").glob("*.yaml")}


def test_files_named_in_the_documents_exist():
    wrong = []
    for page in PAGES:
        for number, code in inline(page) if page.name != "architecture.md" else ():  # which the next test reads
            for path in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./*-]+", code):
                wrong += [] if list(ROOT.glob(path.rstrip("./"))) else [f"{page.name}:{number}: {path}"]
    assert wrong == []


def test_the_architecture_page_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    behaviours, lines = page.split("## Read one line per file")
    named = re.findall(r"`((?:scripts|dashboard)/[\w/]+\.py)`", lines)
    files = {
        str(path.relative_to(ROOT)).replace("\\", "/")
        for folder in ("scripts", "dashboard")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    cells = re.findall(r"(?m)^\| .* \| `([\w/.]+)`.* \|$", behaviours)
    missing = [cell for cell in cells if not any((ROOT / folder / cell).exists() for folder in (".", "scripts/t2i"))]
    wrong = [
        *(f"no line for {file}" for file in sorted(files - set(named))),
        *(f"no file for the line {file}" for file in sorted(set(named) - files)),
        *(f"no file for the answer {file}" for file in sorted(set(missing))),
    ]
    assert wrong == [], "\n".join(wrong)
    assert len(named) == len(set(named))
    assert len(cells) > 60


def test_the_file_tree_of_readme_exists():
    tree = next(block for _, language, block in fenced(ROOT / "README.md") if not is_command(block[0]))
    folders: list[str] = []
    missing = []
    for line in tree:
        depth, (name, comment) = (len(line) - len(line.lstrip())) // 2, line.split(maxsplit=1)
        folders = [*folders[:depth], name]
        assert len(folders) == depth + 1, line
        missing += [] if (ROOT / "".join(folders)).exists() else [line]
        beside = re.findall(r"\w+(?:\.py|/)", comment)
        home = ROOT / "".join(folders if name.endswith("/") else folders[:-1])
        missing += [word for word in beside if not (home / word).exists()]
    assert missing == []


def test_tests_named_as_proofs_exist():
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    names = {
        path.name: re.findall(r"(?m)^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"))
        for path in (ROOT / "tests").glob("test_*.py")
    }
    anywhere = [name for file in names.values() for name in file]
    quoted = re.findall(r"`(test_[\w…]+)`", page)
    assert len(quoted) > 15
    missing = [name for name in quoted if not any(re.fullmatch(name.replace("…", r"\w*"), known) for known in anywhere)]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_and_pictures_resolve():
    wrong, pictures = [], 0
    for page in PAGES:
        for number, line in prose(page):
            for mark, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", line):
                if re.match(r"https?://", target):
                    continue
                file, _, anchor = unquote(target).partition("#")
                goal = page.parent / file if file else page
                pictures += bool(mark)
                if not goal.is_file() or (anchor and anchor not in anchors(goal)):
                    wrong.append(f"{page.name}:{number}: {target}")
    assert wrong == []
    assert pictures >= 4


def test_each_guide_is_linked_from_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []
