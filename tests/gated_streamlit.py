"""Run `streamlit run` as users type it, whose grids stop after one batch for as long as a file exists.

python tests/gated_streamlit.py FILE run dashboard …

So a test sees a grid half drawn for certain, however fast or busy the machine is.
"""

import sys
import time
from pathlib import Path
from typing import Any

from streamlit.web import cli

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from t2i.pictures import cells


def gate(file: Path, make: Any = cells.make) -> Any:
    has_passed = False  # a batch, since the file is there

    def make_when_open(*arguments: Any, **options: Any) -> Any:
        nonlocal has_passed
        while has_passed and file.exists():
            time.sleep(0.05)
        has_passed = file.exists()
        return make(*arguments, **options)

    return make_when_open


if __name__ == "__main__":
    cells.make = gate(Path(sys.argv.pop(1)))
    sys.argv[0] = "streamlit"
    cli.main(prog_name="streamlit")
