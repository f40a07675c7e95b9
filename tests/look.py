"""Take screenshots of the dashboard's pages: wide and narrow, light and dark.

python tests/look.py OUT_DIR [PAGE?QUERY …]

It shows the runs below outputs/ in the working directory. Without pages, it takes all of them. Files are named
<number>-<page>-<width>-<scheme>.png.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from browser import CHROMIUM, INSTALL, SCHEMES, WIDTHS, dashboard_pages, serve, settle


def main(folder: Path, wanted: list[str]) -> None:
    if CHROMIUM is None:
        sys.exit(f"there is no Chromium; {INSTALL}")
    folder.mkdir(parents=True, exist_ok=True)
    with serve(Path.cwd()) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for number, name in enumerate(wanted or dashboard_pages()):
            for width, (pixels, height) in WIDTHS.items():
                for scheme in SCHEMES:
                    page = browser.new_page(viewport={"width": pixels, "height": height}, color_scheme=scheme)
                    page.goto(f"{address}/{name.removeprefix('compare')}")  # the first page has no name
                    settle(page)
                    page.wait_for_timeout(500)  # charts move into place
                    # The page scrolls inside an element: the window is made as tall as it.
                    tall = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
                    page.set_viewport_size({"width": pixels, "height": max(height, min(tall, 8000))})
                    page.wait_for_timeout(500)
                    file = folder / f"{number}-{name.partition('?')[0] or 'compare'}-{width}-{scheme}.png"
                    page.screenshot(path=file)
                    print(file, flush=True)
                    page.close()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
