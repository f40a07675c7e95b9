"""`streamlit run` as users type it, with a thread beside it that counts the denoisers in the process's memory.

python tests/observed_streamlit.py COUNTS run dashboard …

COUNTS gets a line a second: how many there are by the garbage collector's own list, whoever holds them. The dashboard runs as it is.
"""

import gc
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from streamlit.web import cli

CLASS = "UNet2DConditionModel"  # by name: nothing heavy is imported for it


def count(file: Path) -> None:
    with file.open("w") as counts:
        while True:
            kinds = Counter(map(type, gc.get_objects()))  # in C: the sessions hardly feel it
            print(sum(n for kind, n in kinds.items() if kind.__name__ == CLASS), file=counts, flush=True)
            time.sleep(1)


if __name__ == "__main__":
    threading.Thread(target=count, args=(Path(sys.argv.pop(1)),), daemon=True).start()
    sys.argv[0] = "streamlit"
    cli.main(prog_name="streamlit")
