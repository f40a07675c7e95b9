"""Imports go one way, and settings import nothing heavy."""

import ast
import json
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPTS

SCRIPT_FILES = sorted(SCRIPTS.glob("*.py"))
MODULES = sorted((SCRIPTS / "t2i").rglob("*.py"))


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


def module_name(path):
    """Name of a module of `t2i`, as an import spells it."""
    return ".".join(path.relative_to(SCRIPTS).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path) for path in MODULES}
GROUND = {
    f"t2i.{name}"
    for name in (
        *("config", "config_types", "command_line", "from_diffusers", "errors", "files", "machine", "redaction"),
        *("run_lock", "runs", "diffusion", "models", "loading"),
    )
}


def without_type_checking(tree):
    """Yield all nodes but those of `if TYPE_CHECKING:` blocks, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from without_type_checking(other)
        else:
            yield node
            yield from without_type_checking(node)


def imported_modules(text, names):
    """Return which of the modules `names` a file's text imports, inside functions as well."""
    modules = set()
    for node in without_type_checking(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= whole & names or {node.module}
    return modules & names


def circles(imports):
    """Return the modules that reach themselves by imports; `imports` maps a module to those that it imports."""

    def reached(module):
        seen, waiting = set(), [module]
        while waiting:
            fresh = imports[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        return seen

    return {module for module in imports if module in reached(module)}


IMPORTS = {module_name(path): imported_modules(path.read_text(), NAMES) for path in MODULES}


def test_no_imports_form_a_circle():
    assert circles(IMPORTS) == set()
    text = "if TYPE_CHECKING:\n    import a\ndef f():\n    from room import b, c\nfrom d import e\n"
    assert imported_modules(text, {"a", "room.b", "room.c", "d"}) == {"room.b", "room.c", "d"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}


def test_no_import_leads_upward():
    assert set(IMPORTS) >= GROUND
    upward = {(module, room) for module in GROUND for room in IMPORTS[module] - GROUND}
    assert upward == set()


@pytest.mark.parametrize("path", [*SCRIPT_FILES, *MODULES], ids=lambda path: path.name)
def test_functions_stay_short_enough_to_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 120 if path in SCRIPT_FILES and node.name == "main" else 90
            assert node.end_lineno - node.lineno < limit, f"{node.name} has more than {limit} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_only_scripts_make_an_accelerator(path):
    if path.name != "distributed.py":
        assert "Accelerator(" not in path.read_text()


LIGHT = (
    "config",
    "config_types",
    "command_line",
    "from_diffusers",
    "errors",
    "files",
    "machine",
    "redaction",
    "run_lock",
    "runs",
    "evaluation.figures",
    "evaluation.report",
    "evaluation.verdict",
    "hub.model_card",
    "pictures.axes",
    "pictures.png",
    "pictures.cells",
    "tracking.curves",
    "training.live",
    "tracking.mlflow_tracker",
    "tracking.addresses",
    "data.browse",
    "pictures.reconstructions",
    "hub.space",
    "hub.upload",
)


@pytest.fixture(scope="module")
def heavy_after():
    """{light module: heavy libraries that are there once it is imported}, the modules one after another in one process."""
    code = (
        f"import importlib, json, sys; sys.path.append({str(SCRIPTS)!r}); found = {{}}\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(f't2i.{name}')\n"
        "    found[name] = sorted({'torch', 'diffusers'} & set(sys.modules))\n"
        "print(json.dumps(found))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module, heavy_after):
    assert heavy_after[module] == []


def test_every_requirement_is_pinned_and_explained():
    for path in (ROOT / "requirements.txt", ROOT / "requirements-train.txt", SCRIPTS / "requirements.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert "==" in line.split("#")[0], line
                assert "#" in line, line


def test_the_scale_of_latents_has_one_home():
    for path in [*SCRIPT_FILES, *MODULES]:
        assert "0.18215" not in path.read_text()


# Modules that only Unix has (Python's documentation, "Unix-specific services"), and what of `os` and `signal` is Unix's alone.
UNIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
UNIX_NAMES = {
    "os": {
        "O_CLOEXEC", "O_DIRECTORY", "fchmod", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getuid",
        "killpg", "mkfifo", "pread", "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "setsid", "statvfs",
        "sysconf", "uname", "wait", "waitpid",
    },
    "signal": {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"},
}  # fmt: skip


def at_import(tree):
    """The nodes that run when a file is imported: all that are in no function's body."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += [] if isinstance(node, ast.Lambda) else [*node.decorator_list, *node.args.defaults]
        else:
            waiting += ast.iter_child_nodes(node)


def unix_only(text):
    """What of a file's text runs on Unix alone: imports at import, and names of `os` and `signal` anywhere in it."""
    tree = ast.parse(text)
    for node in at_import(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.split(".")[0] in UNIX_MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in UNIX_NAMES.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name in UNIX_NAMES.get(node.module or "", ()))


SUITE = [*SCRIPT_FILES, *MODULES, *sorted((ROOT / "dashboard").rglob("*.py"))]


def test_nothing_of_unix_alone_is_needed():
    assert {str(path): found for path in SUITE if (found := list(unix_only(path.read_text())))} == {}
    bad = "import os, fcntl\ndef f():\n    import resource\n    os.pread(1, 2, 3)\nfrom signal import SIGKILL\n"
    assert set(unix_only(bad)) == {"fcntl", "os.pread", "SIGKILL"}


def test_text_files_are_utf8_on_every_system():
    """Windows would read and write text in a code page of its own."""
    found = []
    for path in SUITE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and "encoding" not in {word.arg for word in node.keywords}:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                modes = [word.value for word in (*node.args, *node.keywords) if isinstance(word, ast.Constant)]
                binary = any(isinstance(mode, str) and set(mode) <= set("rwab+") and "b" in mode for mode in modes)
                is_text = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
                if is_text or (isinstance(node.func, ast.Name) and name == "open" and not binary):
                    found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
