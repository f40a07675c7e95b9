"""The walk of a checkpoint onto Compare: which modules it enters, and that wall and grid are planned once per render.

python tests/test_compare_flow.py     prints the call list of docs/architecture.md

The run's evaluation has a verdict, so the walk leads over the wall of the best pictures to the grid.

The walk begins at the `main` of the page and ends when the grid's cells are handed to the browser (`picture_grid`). A
function is on the walk if the checkpoint's name stands in its arguments or in what it returns. Functions are listed in the
order of their first call; comprehensions and lambdas belong to the function around them. Neighbours of one module in that list
are one stop. A stop is a re-entry if the walk has been in that module before, so re-entries = stops - modules.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "scripts"), str(Path(__file__).parent)]

import pytest

from conftest import ROOT
from test_compare import EVIL, grid_of, show
from test_evaluation_wall import evaluated_run

CHECKPOINT = "checkpoint-000010"
MOST_REENTRIES = 5
PAGE = ("dashboard/views/compare.py", "main")
LAST = "picture_grid"
Function = tuple[str, str]  # file below the repository's root, qualified name


class Walk:
    """The suite's functions that a render calls, by a profile function."""

    def __init__(self) -> None:
        self.calls: dict[Function, int] = {}
        self.carrying: set[Function] = set()
        self.is_open = False

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith((f"{ROOT}/dashboard", f"{ROOT}/scripts")):
            return
        function = Path(code.co_filename).relative_to(ROOT).as_posix(), code.co_qualname.removesuffix(".<locals>.draw")
        if code.co_name.startswith("<"):  # a module's body, a comprehension or a lambda
            return
        self.is_open = self.is_open or function == PAGE
        if not self.is_open:
            return
        if event == "call":
            self.calls[function] = self.calls.get(function, 0) + 1
        values = frame.f_locals.values() if event == "call" else [result]
        if any(CHECKPOINT in repr(value)[:50_000] for value in values):
            self.carrying.add(function)
        if function[1] == LAST and event == "return":
            self.is_open = False

    def stops(self) -> list[tuple[str, list[str]]]:
        """The modules in the order of the walk, each with its functions."""
        walked = [function for function in self.calls if function in self.carrying]
        grouped = groupby(walked, key=lambda function: function[0])
        return [(module, [name for _, name in functions]) for module, functions in grouped]


@contextmanager
def walking() -> Iterator[Walk]:
    walk = Walk()
    threading.setprofile(walk)  # of threads that start now: AppTest runs the page in one
    try:
        yield walk
    finally:
        threading.setprofile(None)


def walk_of_compare(folder: Path) -> Walk:
    """The walk on a small evaluated run in `folder`/outputs, after a first render that imports what is needed."""
    evaluated_run(folder / "outputs" / "one")
    query = {"tab": f"2. {EVIL}"}
    show(**query)
    with walking() as walk:
        app = show(**query)
    assert len(grid_of(app)["cells"]) == 4
    return walk


def reentries(stops: list[tuple[str, list[str]]]) -> int:
    return len(stops) - len({module for module, _ in stops})


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Walk:
    monkeypatch.chdir(tmp_path)
    return walk_of_compare(tmp_path)


def test_the_walk_of_a_checkpoint_is_short_and_plans_wall_and_grid_once(walk):
    stops = walk.stops()
    assert stops[-1] == ("dashboard/helpers/components.py", [LAST])
    assert walk.calls["scripts/t2i/pictures/cells.py", "plan"] == 2
    assert reentries(stops) <= MOST_REENTRIES, call_list(stops)


def call_list(stops: list[tuple[str, list[str]]]) -> str:
    lines = [f"{number}. `{module}`: {', '.join(names)}" for number, (module, names) in enumerate(stops, start=1)]
    modules = len({module for module, _ in stops})
    return "\n".join([*lines, f"{len(stops)} stops in {modules} modules, {reentries(stops)} re-entries"])


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        print(call_list(walk_of_compare(Path(name)).stops()))
        os.chdir(ROOT)
