"""Count the interactions of ten tasks in the dashboard, and measure their seconds.

python benchmarks/dashboard_tasks.py [--outputs FOLDER]

Chromium works on each task in a real `streamlit run dashboard`. A task ends when the wanted thing is in sight, which is
checked. An interaction is a click, or a text that is typed into a field and sent by a key. Opening a list is a click of
its own. In the task for the keyboard, each key is an interaction. The figure `seconds` starts with the last interaction,
and ends when the wanted thing is in sight. The figure `server_s` adds up the script runs from the page's opening until
then, without those that start by themselves. The first drawing, which imports torch, comes before the tasks.

Without `--outputs`, small runs are trained in a temporary folder, within two minutes. A given folder is copied, because
the tasks draw pictures, edit a caption and start a training.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from common import ROOT, SCRIPTS, keep
from playwright.sync_api import Browser, Error, Locator, Page, sync_playwright

sys.path.append(str(ROOT / "tests"))
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from browser import CHROMIUM, INSTALL, settle
from load_dashboard import Load, draw_with, environment, models_in, prepare
from streamlit_client import Session, serve

WINDOW = {"width": 1280, "height": 800}
LONGEST_S = 120  # until the wanted thing is in sight, at most
OWN_PROMPT = "a red flower in the morning"
WRONG, CORRECTED = "a tulip in the grass", "a rose in the grass"
PAINTED = """images => images.filter(one => one.complete && one.naturalWidth > 0 && one.checkVisibility()).map(one => one.src)"""


class Hands:
    """A tab of the browser. Its interactions are counted, and its script runs on the server are timed."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address
        self.page: Page = browser.new_context(viewport=WINDOW).new_page()  # type: ignore[arg-type]
        self.page.set_default_timeout(1000 * LONGEST_S)
        self.page.on("websocket", self._listen)
        self.interactions = 0
        self.seconds = self.server_s = 0.0
        self._last, self._asked = time.monotonic(), 0.0

    def open(self, path: str = "", **query: Any) -> Page:
        self._last = time.monotonic()
        self.page.goto(f"{self.address}/{path}" + (f"?{urlencode(query, doseq=True)}" if query else ""))
        settle(self.page)
        return self.page

    def click(self, target: Locator) -> None:
        target.click(trial=True)  # scrolls to it, and waits until it can be clicked
        self._last = time.monotonic()
        target.click()
        self.interactions += 1

    def type(self, field: Locator, text: str, key: str = "Enter") -> None:
        """Type a text into a field, and send it by a key."""
        field.fill(text)
        self.press(key)

    def press(self, key: str) -> None:
        self._last = time.monotonic()
        self.page.keyboard.press(key)
        self.interactions += 1

    def wait(self, is_there: Callable[[], Any], what: str) -> None:
        """Wait until the wanted thing is in sight. Raises AssertionError after `LONGEST_S`."""
        while not is_there():
            if time.monotonic() - self._last > LONGEST_S:
                raise AssertionError(f"not in sight: {what}")
            self.page.wait_for_timeout(10)
        self.seconds = time.monotonic() - self._last

    def _listen(self, socket: Any) -> None:
        socket.on("framesent", self._sent)
        socket.on("framereceived", self._received)

    def _sent(self, frame: bytes | str) -> None:
        message = BackMsg()
        message.ParseFromString(frame if isinstance(frame, bytes) else frame.encode())
        if message.WhichOneof("type") == "rerun_script" and not message.rerun_script.is_auto_rerun:
            self._asked = self._asked or time.monotonic()

    def _received(self, frame: bytes | str) -> None:
        message = ForwardMsg()
        message.ParseFromString(frame if isinstance(frame, bytes) else frame.encode())
        is_end = message.WhichOneof("type") == "script_finished"
        if is_end and message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN and self._asked:
            self.server_s += time.monotonic() - self._asked
            self._asked = 0.0


@dataclass
class Workspace:
    """What the tasks find.

    Attributes:
        folder: the working directory of the server, which holds outputs/.
        runs: names of the runs that can draw, an evaluated one first.
        inputs: the folder with the data set and the autoencoder that the watched training reads.
        gate: grids stop after their first batch for as long as this file exists.
    """

    folder: Path
    runs: list[str]
    inputs: Path
    gate: Path

    def evaluation(self) -> dict[str, Any]:
        file = self.folder / "outputs" / self.runs[0] / "evaluation" / "evaluation.json"
        return dict(json.loads(file.read_text()))


def painted(pictures: Locator) -> list[str]:
    """Return the addresses of the pictures that are loaded and visible."""
    return list(pictures.evaluate_all(PAINTED))


def grid_pictures(page: Page) -> Locator:
    return page.locator(".grid td img")


def draw_grid(hands: Hands) -> int:
    """Press the red button, which draws the missing pictures that are in sight, and return their number."""
    # by CSS, as an open list hides the rest of the page from roles
    button = hands.page.locator("button", has_text=re.compile(r"^Draw (\d+ pictures|this prompt \(\d+\))$"))
    count = int("".join(filter(str.isdigit, button.inner_text())))
    hands.click(button)
    return count


def is_in_window(place: Locator) -> bool:
    box = place.bounding_box()
    return box is not None and box["y"] >= 0 and box["y"] + box["height"] <= WINDOW["height"]


def is_right_of(place: Locator, other: Locator) -> bool:
    """Return whether both are there, one to the right of the other. A page that is drawn again lacks them for a moment."""
    box, left = place.bounding_box(), other.bounding_box()
    return bool(box and left) and box["x"] >= left["x"] + left["width"]  # type: ignore[index]


# --- The tasks -------------------------------------------------------------------------------------------------------


def find_best_checkpoint(hands: Hands, space: Workspace) -> None:
    best = space.evaluation()["report"]["checkpoint"]
    page = hands.open()
    verdict = page.locator("[data-testid=stMarkdown]", has_text="Best setting")
    hands.wait(lambda: best in verdict.first.inner_text(), "the verdict")
    hands.wait(lambda: is_in_window(verdict.first), "the verdict without scrolling")
    hands.wait(lambda: painted(page.locator(".wall img")), "pictures of the best setting")


def draw_own_prompt(hands: Hands, space: Workspace) -> None:
    page = hands.open()
    hands.type(page.get_by_role("textbox", name="Own prompt"), OWN_PROMPT)
    settle(page)
    count = draw_grid(hands)
    hands.wait(lambda: len(painted(grid_pictures(page))) >= max(2, count), "a picture per guidance scale")
    texts = grid_pictures(page).evaluate_all("images => images.map(one => one.alt)")
    assert all(text.endswith(OWN_PROMPT) for text in texts), texts
    assert len({text.split(",")[0] for text in texts if text.startswith("guidance scale")}) >= 2, texts


def compare_curves(hands: Hands, space: Workspace) -> None:
    page = hands.open(run=space.runs[0])
    hands.click(page.get_by_role("combobox", name="Runs"))
    hands.click(page.get_by_role("option", name=space.runs[1], exact=True))
    settle(page)
    count = draw_grid(hands)
    hands.wait(lambda: len(painted(grid_pictures(page))) >= max(2, count), "pictures of both runs")
    legend = page.locator("[data-testid=stVegaLiteChart] .role-legend text")
    hands.wait(lambda: {*space.runs[:2]} <= {*legend.all_text_contents()}, "curves of both runs")
    chart, grid = (page.locator(name).first for name in ("[data-testid=stVegaLiteChart]", ".grid"))
    hands.wait(lambda: is_right_of(chart, grid), "the curves, beside the pictures")


def find_neighbours(hands: Hands, space: Workspace) -> None:
    page = hands.open("playground", run=space.runs[0])
    picture = page.locator(".st-key-play_result [data-testid=stImage] img").first
    hands.click(page.get_by_role("button", name="Draw", exact=True))
    page.get_by_role("button", name="Download PNG").wait_for()
    settle(page)
    hands.click(page.locator("label", has_text="Nearest training images"))
    near = page.get_by_role("img", name=re.compile("^training image: "))
    hands.wait(lambda: len(painted(near)) == 4 and painted(picture), "the nearest training images")


def draw_four_by_four(hands: Hands, space: Workspace) -> None:
    page = hands.open()
    hands.click(page.get_by_role("button", name="4 seeds × 4 scales"))
    page.locator(".grid th", has_text="seed \\ guidance scale").wait_for()
    settle(page)
    draw_grid(hands)
    hands.wait(lambda: len(painted(grid_pictures(page))) == 16, "16 pictures")
    assert [page.locator(f".grid {part} th").count() for part in ("thead", "tbody")] == [5, 4]


def stop_and_resume(hands: Hands, space: Workspace) -> None:
    axes = {"columns": "guidance scale", "rows": "seed", "tabs": "none"}
    values = {"guidance_scale": "1.25,2.25,3.25,4.25", "seed": "21-24", "prompt": "a red flower"}
    page = hands.open(run=space.runs[0], **axes, **values)
    space.gate.touch()
    try:
        assert draw_grid(hands) == 16
        hands.wait(lambda: 0 < len({*painted(grid_pictures(page))}) < 16, "the first pictures")
        hands.click(page.get_by_role("button", name="Stop", exact=True))
    finally:
        space.gate.unlink()
    page.get_by_role("button", name=re.compile("^Draw ")).wait_for()
    settle(page)
    first = painted(grid_pictures(page))
    assert draw_grid(hands) == 16 - len(first)
    # A page may show a grid twice for a moment, so distinct pictures are counted.
    hands.wait(lambda: len({*painted(grid_pictures(page))}) == 16, "16 pictures")
    assert {*first} < {*painted(grid_pictures(page))}, "pictures were drawn again"


def correct_caption(hands: Hands, space: Workspace) -> None:
    page = hands.open("data", dataset="captions")
    hands.click(page.get_by_role("combobox", name="Finding"))
    hands.click(page.get_by_role("option", name="label contradictions", exact=True))
    hands.click(page.get_by_role("button", name=f"Show larger: {WRONG}"))
    field = page.get_by_role("dialog").get_by_role("textbox", name="Caption")
    hands.type(field, CORRECTED, "Control+Enter")
    hands.wait(lambda: page.get_by_text("no picture matches").is_visible(), "that nothing contradicts its label")
    row = json.loads((space.folder / "outputs" / "captions" / "captions.jsonl").read_text(encoding="utf-8"))
    assert (row["replaces"], row["caption"]) == (WRONG, CORRECTED), row


def watch_training(hands: Hands, space: Workspace) -> None:
    def shown_step() -> int:
        found = re.search(r"live · step ([\d,]+) of", page.locator("[data-testid=stMain]").inner_text())
        return int(found[1].replace(",", "")) if found else 0

    with training(space):
        page = hands.open("runs")
        hands.wait(shown_step, "the training's step")
        seconds, first = hands.seconds, shown_step()
        hands.wait(lambda: shown_step() > first, "a later step, without an interaction")
        hands.seconds = seconds


def share_view(hands: Hands, space: Workspace) -> None:
    page = hands.open()
    hands.wait(lambda: len(painted(grid_pictures(page))) >= 2, "the grid")
    shared, pictures = page.url, painted(grid_pictures(page))
    hands.interactions += 1  # the address is copied from the browser's own bar
    other = Hands(hands.browser, hands.address)
    page = other.open(shared.removeprefix(f"{hands.address}/"))
    other.wait(lambda: painted(grid_pictures(page)) == pictures, "the same pictures in another browser")
    hands.seconds, hands.server_s = other.seconds, hands.server_s + other.server_s
    other.page.context.close()


def compare_by_keyboard(hands: Hands, space: Workspace) -> None:
    page = hands.open(run=space.runs[0])
    hands.wait(lambda: len(painted(grid_pictures(page))) >= 3, "the grid")
    focused = page.locator(".grid td button:focus")
    for key in ("Alt+g", "ArrowDown", "Enter"):
        hands.press(key)
    chosen = focused.get_attribute("aria-label") or ""
    compared = page.locator(".pair .over img, .pair .frame.over img")
    hands.wait(
        lambda: compared.count() and compared.first.get_attribute("alt") == chosen, "the chosen picture, compared"
    )
    hands.wait(lambda: len(painted(page.locator(".pair img"))) == 2, "both compared pictures")


@contextmanager
def training(space: Workspace) -> Iterator[None]:
    """Train outputs/live in the background until the end of the block."""
    words = ["--config", "tiny.yaml", "--dataset", "dataset", "--vae", "outputs/vae", "--max_train_steps", "100000"]
    words += ["--output_dir", str(space.folder / "outputs" / "live")]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train_unet.py"), *words], cwd=space.inputs, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        live = space.folder / "outputs" / "live" / "live.json"
        until = time.monotonic() + LONGEST_S
        while not live.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError("the training to watch did not start")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


TASKS = (  # what, the page where it begins, interactions at most, function
    ("find the best checkpoint, and why", "Compare", 0, find_best_checkpoint),
    ("draw an own prompt at two guidance scales or more", "Compare", 3, draw_own_prompt),
    ("see the curves of two runs beside their pictures", "Compare", 3, compare_curves),
    ("see the training images nearest to a picture", "Playground", 2, find_neighbours),
    ("draw a grid of 4 seeds × 4 guidance scales", "Compare", 4, draw_four_by_four),
    ("stop a grid, and draw the rest", "Compare", 3, stop_and_resume),
    ("find a wrong caption, and correct it", "Data", 4, correct_caption),
    ("watch a training", "Runs", 0, watch_training),
    ("share a view", "Compare", 1, share_view),
    ("compare two pictures by the keyboard alone", "Compare", 3, compare_by_keyboard),
)


# --- The workspace ---------------------------------------------------------------------------------------------------


def make_workspace(folder: Path, outputs: Path | None) -> Workspace:
    """Make the folder in which the server works: with a copy of `outputs`, or with small runs that are trained here."""
    inputs = folder / "inputs" if outputs else folder
    if outputs:
        inputs.mkdir()
        shutil.copytree(outputs, folder / "outputs")
        if (outputs.resolve().parent / ".cache").is_dir():  # the images that the runs were trained on
            (folder / ".cache").symlink_to(outputs.resolve().parent / ".cache")
    prepare(inputs, only_inputs=outputs is not None)
    make_captions(folder / "outputs" / "captions")
    os.chdir(folder)  # runs are found below outputs/ in the working directory
    found = list(dict.fromkeys(run for run, _ in models_in(Path("outputs"))))
    runs = sorted(found, key=lambda run: not Path("outputs", run, "evaluation", "evaluation.json").is_file())
    if not runs:
        raise SystemExit(f"{outputs} holds no run that can draw")
    return Workspace(folder, runs, inputs, folder / "gate")


def make_captions(folder: Path) -> None:
    """Make a data set of which one caption contradicts its label."""
    from PIL import Image

    from t2i.data.dataset_folder import save_dataset_folder

    captions = ["a rose", WRONG, "a tulip by the lake", "a red tulip"]
    rows = [
        {"image": Image.new("RGB", (32, 32), (60 * number, 90, 120)), "caption": caption, "label": label}
        for number, (caption, label) in enumerate(zip(captions, ("rose", "rose", "tulip", "tulip"), strict=True))
    ]
    save_dataset_folder(folder, {"train": iter(rows)})


def work(browser: Browser, address: str, space: Workspace, number: int) -> dict[str, Any]:
    """Work on a task, and return its row."""
    task, page, allowed, function = TASKS[number - 1]
    hands, problem = Hands(browser, address), ""
    if function is compare_curves and len(space.runs) < 2:
        problem = "not measured: it needs a second run"
    else:
        try:
            function(hands, space)
        except (AssertionError, Error) as error:
            problem = f"failed: {(str(error) or repr(error)).splitlines()[0]}"
    hands.page.context.close()
    row: dict[str, Any] = {"number": number, "task": task, "page": page, "interactions": hands.interactions,
                           "allowed": allowed, "seconds": round(hands.seconds, 2),
                           "server_s": round(hands.server_s, 2)}  # fmt: skip
    return row | {"problem": problem} if problem else row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| task | page | interactions | allowed | seconds | on the server |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = [
            row["interactions"],
            "–" if row["allowed"] is None else row["allowed"],
            row["seconds"],
            row["server_s"],
        ]
        figures = [row["problem"], "–", "–", "–"] if "problem" in row else figures
        lines.append(f"| {row['number']}. {row['task']} | {row['page']} | " + " | ".join(map(str, figures)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, help="a folder of finished runs, rather than small ones trained here")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit(f"there is no Chromium; {INSTALL}")
    with tempfile.TemporaryDirectory() as name:
        space = make_workspace(Path(name), options.outputs)
        command = (sys.executable, str(ROOT / "tests" / "gated_streamlit.py"), str(space.gate), "run")
        with serve(space.folder, space.folder / "log.txt", command=command, env=environment()) as server:
            with Session(server.url).connected() as session:
                draw_with(session, models_in(Path("outputs"))[0], Load())
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                rows = [work(browser, server.url, space, number) for number in range(1, len(TASKS) + 1)]
                browser.close()
        os.chdir(ROOT)
    print(table(rows))
    runs = str(options.outputs) if options.outputs else "small ones, trained for this"
    keep("dashboard_tasks", {"tasks": rows, "runs": runs, "load_average": [round(one, 1) for one in os.getloadavg()]})
    if late := [row["number"] for row in rows if "problem" in row or row["interactions"] > (row["allowed"] or 10**9)]:
        raise SystemExit(f"tasks that fail or need more interactions than allowed: {late}")


if __name__ == "__main__":
    main()
