"""Serve the dashboard and drive it in Chromium: shared by tests/test_browser.py and tests/look.py."""

import ast
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The system's Chromium gets security updates. Its headless shell has no windows, and needs a tenth less time.
CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
INSTALL = "apt-get install --no-install-recommends chromium-headless-shell fonts-dejavu-core"
WIDTHS = {"wide": (1280, 800), "narrow": (390, 844)}  # a laptop's window, a phone
SCHEMES = ("light", "dark")
RUN = ("-m", "streamlit", "run")


def dashboard_pages() -> dict[str, str]:
    """Return the pages that streamlit_app.py lists: name in the URL -> title."""
    tree = ast.parse((ROOT / "dashboard" / "streamlit_app.py").read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAGES"
    )


@contextmanager
def serve(folder: Path, env: dict[str, str] | None = None, begin: Callable[..., Any] | None = None) -> Iterator[str]:
    """Run the dashboard in `folder`, which holds outputs/, and give its address.

    begin: starts the server by the words after `streamlit run` and gives its process. None: `streamlit run` does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(ROOT / "dashboard"), "--server.headless=true", f"--server.port={port}"]
    begin = begin or partial(start, *RUN, cwd=folder, env=env)
    server = begin(*words)
    address = f"http://localhost:{port}"
    try:
        wait_for_health(address, server)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=10)


def start(*words: str, cwd: Path, env: dict[str, str] | None) -> subprocess.Popen:
    """Start Python with these words."""
    return subprocess.Popen(
        [sys.executable, *words], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_health(address: str, server: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=5):
                return
        except OSError:
            if server.poll() is not None:
                said = server.stderr.read() if isinstance(server, subprocess.Popen) else server.wait(1).stderr
                raise RuntimeError(f"streamlit has ended: {said[-2000:]}") from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def settle(page) -> None:
    """Wait until the page is drawn: the script has run, and nothing of the run before is shown."""
    page.wait_for_selector("h1")
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")
    page.wait_for_function("!document.querySelector('[data-stale=true], [data-testid=stSkeleton]')")
