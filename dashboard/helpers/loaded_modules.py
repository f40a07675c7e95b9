"""Keep loaded libraries out of the garbage collector's way."""

import gc
from functools import cache


@cache
def freeze_loaded(libraries: str) -> None:
    """Exempt all live objects from garbage collection, once per name in `libraries`.

    Streamlit collects garbage after each run of a page, and the server answers no request meanwhile. Garbage collection
    over a page's libraries takes 0.1 s, and several times as long with torch and diffusers. Loaded libraries stay in
    memory, so they need no garbage collection.
    """
    gc.collect()
    gc.freeze()
