"""Measure the seconds in which the page Runs opens, filters and redraws with 100 runs, in Chromium.

python benchmarks/dashboard_runs.py [outputs folder]

The figure `first` is from the first click of a tab on the link to Runs until the page is complete, and loads the browser's
code for tables. The figure `open` is the same for a later click. The figure `filter` is from the click on a status until
the filtered tables are there, and `all` the same without a filter again. The figures are medians of five tabs, after one
tab that is not measured. Without a folder of runs, the runs are synthetic: 34 denoisers with the files of
`dashboard_start.py`'s run, 33 students and 33 autoencoders.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, keep
from dashboard_start import make_run
from playwright.sync_api import Page, sync_playwright

sys.path.append(str(ROOT / "tests"))
from browser import CHROMIUM, INSTALL, settle
from streamlit_client import serve

TABS = 5
KINDS = {"unet": 34, "turbo": 33, "vae": 33}


def make_runs(outputs: Path) -> None:
    """Make 100 runs of three kinds, whose settings and states differ."""
    first = outputs / "run-000" / "unet"
    make_run(first)
    number = 0
    for kind, count in KINDS.items():
        for _ in range(count):
            run = outputs / f"run-{number:03d}" / kind
            if run != first:
                shutil.copytree(first, run)
            if kind == "vae":
                shutil.rmtree(run / "evaluation")
                shutil.rmtree(run / "pipeline")
                (run / "vae").mkdir()
            status = "finished" if number % 10 or kind != "unet" else "failed"
            state = {"status": status, "steps": 900 + number, "train_images": 4000, "machine": "2 CPU cores"}
            (run / "run.json").write_text(json.dumps(state | ({"student": {}} if kind == "turbo" else {})))
            settings = {f"option_{key}": key for key in range(120)} | {"learning_rate": number / 1000, "seed": number}
            (run / "config.yaml").write_text(json.dumps({"data": {"resolution": 64}, f"train_{kind}": settings}))
            hashes = {f"input_{key}": f"{number:064x}" for key in range(25)}
            (run / "provenance.json").write_text(json.dumps({"code": "unknown", **hashes}))
            number += 1


def measure(page: Page, address: str) -> dict[str, float]:
    """Return the seconds of one tab by figure."""
    seconds = {}

    def timed(name: str, selector: str, until: str) -> None:
        target = page.locator(selector).first
        target.click(trial=True)
        began = time.monotonic()
        target.click()
        page.wait_for_function(until, timeout=60_000)
        settle(page)
        seconds[name] = time.monotonic() - began

    tables = "() => document.querySelectorAll('[data-testid=stDataFrame] canvas').length >= {}"
    page.goto(f"{address}/curves")
    settle(page)
    timed("first", "a[href$='/runs']", f"() => location.pathname == '/runs' && ({tables.format(4)})()")
    settle(page)
    page.locator("a[href$='/curves']").first.click()
    page.wait_for_function("() => location.pathname == '/curves'")
    settle(page)
    timed("open", "a[href$='/runs']", f"() => location.pathname == '/runs' && ({tables.format(4)})()")
    settle(page)
    page.get_by_label("Status").click()
    option = "[role=option]:has-text('failed')"
    # The sentence above the settings changes with the runs that are shown, and comes with their tables.
    told = (
        "() => document.querySelector('[data-testid=stMain]').innerText.match(/[0-9]+ of [0-9]+ settings differ/)?.[0]"
    )
    of_all = page.evaluate(told)
    timed("filter", option, f"() => ![undefined, '{of_all}'].includes(({told})())")
    settle(page)
    page.keyboard.press("Escape")
    timed("all", "[data-testid=stMultiSelect] [aria-label='Clear all']", f"() => ({told})() == '{of_all}'")
    return seconds


def main() -> None:
    if CHROMIUM is None:
        sys.exit(f"there is no Chromium; {INSTALL}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if len(sys.argv) > 1:
            (folder / "outputs").symlink_to(Path(sys.argv[1]).resolve())
        else:
            make_runs(folder / "outputs")
        with serve(folder, folder / "log.txt") as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tabs = []
            for _ in range(1 + TABS):
                page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
                tabs.append(measure(page, server.url))
                page.context.close()
            browser.close()
    seconds = {key: round(statistics.median(tab[key] for tab in tabs[1:]), 2) for key in tabs[0]}
    for key, value in seconds.items():
        print(f"{key:8s} {value:.2f} s")
    keep("dashboard_runs", {"seconds": seconds, "first_tab": {key: round(value, 2) for key, value in tabs[0].items()}})


if __name__ == "__main__":
    main()
