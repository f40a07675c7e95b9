"""Measure the milliseconds from the last key in the Playground's prompt to its draft, in Chromium.

python benchmarks/dashboard_typing.py OUTPUTS [RUN]

OUTPUTS is a folder of runs, such as outputs after `make demo`. The first draft loads the model and is not measured. Each
of 20 measurements changes the prompt by one key. It starts with the key's event in the page, and ends with the first
frame after the draft of the new text is in the page, decoded. The pause of 250 ms after the last key is part of it.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, keep
from playwright.sync_api import sync_playwright

sys.path.append(str(ROOT / "tests"))
from browser import CHROMIUM, INSTALL, serve, settle

KEYS = 20
GOAL_MS = 500
# The time of a draft is known in the page alone: asking the page from outside takes several milliseconds.
WATCH = """
() => {
  window.shown = {};
  const look = () => {
    for (const image of document.querySelectorAll(".st-key-play_draft img")) {
      if (image.complete && image.naturalWidth) window.shown[image.alt] ??= performance.now();
    }
    requestAnimationFrame(look);
  };
  look();
  document.addEventListener("keydown", () => { window.began = performance.now(); }, true);
}
"""


def main(outputs: Path, run: str | None) -> None:
    if CHROMIUM is None:
        sys.exit(f"there is no Chromium; {INSTALL}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        Path(folder, "outputs").symlink_to(outputs.resolve())
        with serve(Path(folder)) as address:
            page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
            page.goto(f"{address}/playground" + (f"?run={run}" if run else ""))
            settle(page)
            took = [type_key(page, number) for number in range(KEYS + 1)][1:]
    load = os.getloadavg()[0]
    median = statistics.median(took)
    print(
        f"{KEYS} keys: median {median:.0f} ms, {min(took):.0f} to {max(took):.0f} ms, at a load of {load:.1f}; goal {GOAL_MS} ms"
    )
    keep(
        "dashboard_typing",
        {"median_ms": median, "best_ms": min(took), "worst_ms": max(took), "load": load, "goal_ms": GOAL_MS},
    )


def type_key(page, number: int) -> float:
    """Type one more letter, and return the milliseconds until its draft is shown."""
    field = page.get_by_role("textbox", name="Prompt", exact=True)
    if not number:
        page.evaluate(WATCH)
        field.fill("a red flower ")
        field.press("End")
    text = field.input_value() + "x"
    field.press("x")
    page.wait_for_function("alt => window.shown[alt]", arg=f"draft: {text}", timeout=300_000)
    return page.evaluate("alt => window.shown[alt] - window.began", f"draft: {text}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
