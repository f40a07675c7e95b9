"""Run `streamlit run` as users type it, with a thread that counts the denoisers in the process's memory.

python tests/observed_streamlit.py COUNTS run dashboard …

Each second, COUNTS gets a line with their number, whoever holds them. The dashboard is unchanged: the class notes each of its
instances by a weak reference. The garbage collector's list of all objects is no substitute. It holds tuples that another
thread still fills, and reading those ends in a SystemError.
"""

import importlib.abc
import importlib.util
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from streamlit.web import cli

MODULE, CLASS = "diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel"
living: Any = weakref.WeakSet()


class Notice(importlib.abc.MetaPathFinder):
    """When the class's module is imported, sooner or later or never, make its instances known."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_notice(module: Any) -> None:
            execute(module)
            getattr(module, CLASS).__new__ = new

        spec.loader.exec_module = execute_and_notice  # type: ignore[method-assign]
        return spec


def new(cls: type, *arguments: Any, **options: Any) -> Any:
    made = object.__new__(cls)
    living.add(made)
    return made


def count(file: Path) -> None:
    with file.open("w") as counts:
        while True:
            print(len(living), file=counts, flush=True)
            time.sleep(1)


if __name__ == "__main__":
    sys.meta_path.insert(0, Notice())
    threading.Thread(target=count, args=(Path(sys.argv.pop(1)),), daemon=True).start()
    sys.argv[0] = "streamlit"
    cli.main(prog_name="streamlit")
