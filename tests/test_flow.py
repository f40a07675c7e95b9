"""An image's way into the cache is a walk through few modules, and none of them hands it to and fro.

The walk of one image is what `load_splits` calls for a data set of one image, in all threads. It is counted so:

- A step is the first call of a function of `t2i.data`. Later calls of the same function are no steps, so a generator
  that is resumed for each record is one step. Lambdas and comprehensions belong to the function that they stand in,
  and constructors that `dataclass` generates are no steps.
- A stop is a series of steps in one module.
- The walk re-enters a module if it comes to a stop in a module where it has stopped before: stops less modules.

`python tests/test_flow.py` prints the stops of each walk with their steps.
"""

import sys
import tempfile
import threading
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))  # run as a program, it has no conftest.py
from t2i.data.dataset_folder import save_dataset_folder
from t2i.data.preparing import load_splits
from test_data import config, png, write

MOST_REENTRIES = 5
ROOM = "t2i.data."


def trace(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """Call `function` and return the (module, function) of each step, in order."""
    steps: dict[tuple[str, str], None] = {}

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith(ROOM) and "<" not in frame.f_code.co_name + frame.f_code.co_filename:
            steps.setdefault((module.removeprefix(ROOM), frame.f_code.co_qualname.replace(".<locals>", "")))

    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(steps)


def stops(steps: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Group the steps that follow each other in one module."""
    return [(module, [name for _, name in group]) for module, group in groupby(steps, key=lambda step: step[0])]


def class_folder(folder: Path) -> None:
    write(folder / "rose" / "0.png", png(0))


def parquet(folder: Path) -> None:
    save_dataset_folder(folder, {"train": [{"image": png(0), "caption": "a rose"}]})


FORMS = {"class folder": class_folder, "Parquet": parquet}


def walk(form: str, folder: Path) -> list[tuple[str, list[str]]]:
    """Return the stops of the one image of a data set of this form, from `load_splits` to the opened cache."""
    FORMS[form](folder / "photos")
    cfg = config(folder / "photos", folder)
    return stops(trace(lambda: load_splits(cfg, say=lambda text: None)))


def reentries(walked: list[tuple[str, list[str]]]) -> int:
    """Count the stops in a module that the walk had left."""
    return len(walked) - len({module for module, _ in walked})


def lines(form: str, walked: list[tuple[str, list[str]]]) -> str:
    """Return the walk as text, one stop per line."""
    modules = len({module for module, _ in walked})
    head = f"{form}: {len(walked)} stops in {modules} modules, {reentries(walked)} of them re-enter a module"
    return "\n".join([head, *(f"  {module}: {', '.join(names)}" for module, names in walked)])


@pytest.mark.parametrize("form", FORMS)
def test_an_image_re_enters_few_modules_on_its_way_into_the_cache(form, tmp_path):
    walked = walk(form, tmp_path)
    assert (walked[0][0], walked[-1][0]) == ("preparing", "prepared")
    assert {"folders", "sources", "records", "images"} <= {module for module, _ in walked}
    assert reentries(walked) <= MOST_REENTRIES, lines(form, walked)


if __name__ == "__main__":
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            print(lines(form, walk(form, Path(folder))))
