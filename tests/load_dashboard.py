"""Load the dashboard: many sessions click at random over real websockets, without an error and within memory bounds.

python tests/load_dashboard.py --sessions 20 --seconds 120     (make load-dashboard)

The dashboard is a real `streamlit run dashboard` on this machine. Its run is trained here in seconds, or comes from
`--outputs FOLDER`, whose run folders then get the drawn pictures. Each session opens pages by URLs with values of the
runs, or by the names at the top. It gives any visible widget any valid value, presses buttons, and clicks pictures to
compare. Together, the sessions draw with more models than dashboard/helpers/model_pool.py keeps. Answer times are those
of a machine that also runs the clients.
"""

import argparse
import math
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

import psutil

from conftest import TINY
from streamlit_client import ROOT, Server, Session, serve

for _folder in ("scripts", "dashboard"):
    sys.path.append(str(ROOT / _folder))

TEXTS = {  # what is typed: right and wrong
    "guidance_scale": ("1", "1.5,3", "1-7(+3)", "0-4[3]", "NaN", "-1"),
    "num_inference_steps": ("2", "3", "2,3", "0"),
    "seed": ("1", "7-9", "1e99", "12,13"),
    "prompt": ("a red flower", "a <b>blue</b> flower\na **white** one", ""),
    "name": ("", "one", "nothing like it", "*"),
}
OTHER_TEXTS = ("", "flower", "<script>alert(1)</script>")
MOST_PICTURES = 24  # that a session draws at once
THINK_S = (0.3, 2.0)  # between an answer and the next click
SPARE_MB = 64  # of memory that was given back and is kept for later, by the threads of sessions
TAB_MB = 3  # of memory for a tab: Streamlit keeps what it shows, and that of a closed one for two minutes
DRAWING_S = (
    300  # A session looks at its drawing for no longer. Twenty models are drawn with before, each in up to ten seconds.
)


@dataclass
class Load:
    """Measurements and faults of all sessions together."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each kind of click
    problems: list[str] = field(default_factory=list)
    models: set[tuple[str, str]] = field(default_factory=set)  # (run, checkpoint) that were drawn with
    known: set[str] = field(default_factory=set)  # pages that there are
    pages: set[str] = field(default_factory=set)  # and those that answered
    tabs: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def took(self, what: str, seconds: float) -> None:
        with self.lock:
            self.seconds.setdefault(what, []).append(seconds)

    def opened(self, how: str, page: str, seconds: float) -> None:
        self.took(f"{how} {page or 'compare'}", seconds)
        with self.lock:
            self.pages.add(page)


def prepare(folder: Path, only_inputs: bool = False) -> None:
    """Make two small runs of real weights below `folder`/outputs, one of them evaluated: seven models in all.

    only_inputs: make only what a run is trained on, a data set and an autoencoder.
    """
    (folder / "tiny.yaml").write_text(TINY)
    common = ("--config", "tiny.yaml", "--dataset", "dataset")
    unet = (*common, "--vae", "outputs/vae")
    commands = (
        ("make_flowers.py", "--output_dir", "dataset", "--count", "40", "--validation_count", "12", "--test_count", "12",
         "--size", "32", "--workers", "1"),
        ("train_vae.py", *common, "--output_dir", "outputs/vae"),
        ("train_unet.py", *unet, "--output_dir", "outputs/one", "--checkpointing_steps", "2"),
        ("train_unet.py", *unet, "--output_dir", "outputs/two", "--seed", "1"),
        ("evaluate_checkpoints.py", *common, "--model", "outputs/one"),
    )  # fmt: skip
    for script, *arguments in commands[: 2 if only_inputs else None]:
        words = [sys.executable, str(ROOT / "scripts" / script), *arguments]
        done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{script}: {done.stdout[-1000:]} {done.stderr[-3000:]}")


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def models_in(outputs: Path) -> list[tuple[str, str]]:
    """Return (run, checkpoint) of all models below `outputs` that can draw."""
    from helpers.run_list import checkpoints_of

    runs = sorted({file.parent for level in ("*", "*/*") for file in outputs.glob(f"{level}/run.json")})
    denoisers = [run for run in runs if not (run / "vae").is_dir()]  # A VAE has checkpoints too, and cannot draw.
    return [(run.relative_to(outputs).as_posix(), name) for run in denoisers for name in checkpoints_of(run)]


# --- A session -------------------------------------------------------------------------------------------------------


def click_around(url: str, number: int, models: list[tuple[str, str]], until: float, seed: int, load: Load) -> None:
    """Play sessions one after another, as a user who opens new tabs, until the time `until`."""
    chance = random.Random(f"{seed} {number}")
    mine = [models[number % len(models)], *chance.sample(models, len(models))]
    tour = True
    while tour or time.monotonic() < until:
        try:
            with Session(url).connected() as session:
                load.tabs += 1
                use_tab(session, chance, mine, until, tour, load)
                tour = False
                load.problems.extend(f"session {number}: {problem}" for problem in session.problems)
        except Exception as error:  # no answer, a connection that ended, a widget that is not there: all are faults
            load.problems.append(f"session {number}: {type(error).__name__}: {error}")
            return


def use_tab(
    session: Session, chance: random.Random, mine: list[tuple[str, str]], until: float, tour: bool, load: Load
) -> None:
    """Draw with the next model, or open any page; visit all pages on the first tour; then click around."""
    if mine:
        draw_with(session, mine.pop(0), load)
    else:
        page = chance.choice(sorted(load.known))
        load.opened("open", page, session.open(page, random_query(chance)))
    for page in chance.sample(sorted(session.pages), len(session.pages) if tour else 0):
        load.opened("go to", page, session.go(page))
        check(session)
    for _ in range(chance.randint(10, 30)):
        if time.monotonic() > until:
            return
        time.sleep(chance.uniform(*THINK_S))
        kind = chance.random()
        if kind < 0.2 and session.data("picture_grid"):
            switch(session, chance, load)
        elif kind < 0.35:
            page = chance.choice(sorted(session.pages))
            load.opened("go to", page, session.go(page))
        elif kind < 0.45 and buttons(session):
            press(session, chance.choice(buttons(session)), until, load)
        elif session.looks:
            load.took("look again", session.look())
        else:
            change(session, chance, load)
        check(session)


def draw_with(session: Session, model: tuple[str, str], load: Load) -> None:
    """Open a small grid of one model by its URL, with a seed of its own, and draw it."""
    run, checkpoint = model
    new = random.SystemRandom().randrange(10**9)  # never drawn by an earlier load of the same folder
    query = {
        "run": run, "columns": "guidance scale", "rows": "seed", "tabs": "none", "checkpoint": checkpoint,
        "guidance_scale": "1.5,3", "seed": new, "num_inference_steps": 2, "prompt": "a red flower",
    }  # fmt: skip
    load.opened("open", "", session.open("", urlencode(query)))
    load.known = set(session.pages)
    if not session.has("button", "Draw"):
        raise AssertionError(f"nothing to draw for {run} {checkpoint}: {session.texts()}")
    press(session, "Draw", time.monotonic() + DRAWING_S, load)
    left = [cell["note"] for cell in session.data("picture_grid")["cells"] if not cell["source"]]
    if left:
        raise AssertionError(f"{run} {checkpoint} was not drawn: {left} {session.texts()}")
    with load.lock:
        load.models.add(model)


def press(session: Session, label: str, until: float, load: Load) -> None:
    """Press a button, and look at the results while they come, as users do."""
    began, usual = time.monotonic(), session.timeout
    session.timeout = DRAWING_S  # reconstructions are made while their page shows a bar, when it is their turn
    load.took("press a button", session.click(label))
    session.timeout = usual
    until = min(until, began + DRAWING_S)
    while session.looks and time.monotonic() < until:
        time.sleep(min(session.looks.values()))
        load.took("look again", session.look())
    if label.startswith("Draw"):
        load.took("draw, to the last picture", time.monotonic() - began)


def buttons(session: Session) -> list[str]:
    """Return the buttons that may be pressed, without those of large drawings."""
    labels = [
        element.label for kind, element, _ in session.elements.values() if kind == "button" and not element.disabled
    ]
    counts = [int("0" + "".join(letter for letter in label if letter.isdigit())) for label in labels]
    return [label for label, count in zip(labels, counts, strict=True) if count <= MOST_PICTURES]


def switch(session: Session, chance: random.Random, load: Load) -> None:
    grid = session.data("picture_grid")
    row, column = chance.randrange(len(grid["rows"])), chance.randrange(len(grid["columns"]))
    load.took("switch the compared cell", session.choose(row, column, left=chance.random() < 0.5))


def change(session: Session, chance: random.Random, load: Load) -> None:
    """Give any widget of the page any valid value."""
    choices: list[tuple[str, Any]] = []
    for kind, element, _ in session.elements.values():
        value = random_value(kind, element, chance)
        if value is not None and element.id.count("-") > 1:
            choices.append((element.id.split("-", 2)[2], value))
    if choices:
        key, value = chance.choice(choices)
        load.took("change a widget", session.set(key, value))


def random_value(kind: str, element: Any, chance: random.Random) -> Any:
    """Return a value for a widget; None if it takes none."""
    if kind in ("selectbox", "radio"):
        return chance.choice(list(element.options)) if element.options else None
    if kind == "multiselect":
        options = list(element.options)
        return chance.sample(options, chance.randint(0, min(3, len(options))))
    if kind == "button_group":
        return [chance.choice(list(element.options)).content]
    if kind == "checkbox":
        return chance.random() < 0.5
    if kind == "select_slider":
        return [chance.choice(list(element.options))]
    if kind == "slider":
        return [chance.uniform(element.min, element.max)]
    if kind == "number_input":
        low = element.min if element.has_min else 0
        return float(round(low + chance.random() * min(4, element.max - low if element.has_max else 4)))
    if kind in ("text_input", "text_area"):
        return chance.choice(TEXTS.get(element.id.split("-", 2)[2] if element.id.count("-") > 1 else "", OTHER_TEXTS))
    return None


def random_query(chance: random.Random) -> str:
    """Return a URL's query with right and wrong values."""
    known = {key: chance.choice(values) for key, values in TEXTS.items() if chance.random() < 0.3}
    known |= {"left": "row 1, column 2"} if chance.random() < 0.3 else {"run": "../../etc/passwd"}
    return urlencode(known)


def check(session: Session) -> None:
    """Record failed drawings and errors on a page as faults."""
    for kind, element, _ in session.elements.values():
        if kind == "alert" and (element.format == element.ERROR or "drawing ended with" in element.body):
            session.problems.append(element.body)


# --- The server ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """The server, observed twice per second."""

    server: Server
    counts: Path
    rss: list[float] = field(default_factory=list)  # MB
    unhealthy: int = 0

    def look(self) -> None:
        self.rss.append(psutil.Process(self.server.process.pid).memory_info().rss / 1e6)
        self.unhealthy += self.server.health() != 200

    def models(self) -> int:
        """Return the highest number of denoisers in memory at once."""
        return max((int(line) for line in self.counts.read_text().split()), default=0)


def run_load(folder: Path, sessions: int, seconds: float, seed: int) -> None:
    """Put the load on `folder`/outputs and print its table. Raises AssertionError for every fault."""
    from helpers.model_pool import MODELS

    models, counts, load = models_in(folder / "outputs"), folder / "models.txt", Load()
    assert len(models) > MODELS, f"{folder / 'outputs'} holds {len(models)} models; more than {MODELS} are needed"
    command = (sys.executable, str(ROOT / "tests" / "observed_streamlit.py"), str(counts), "run")
    with serve(folder, folder / "streamlit.log", command=command, env=environment()) as server:
        watch = Watch(server, counts)
        watch.look()
        with Session(
            server.url
        ).connected() as session:  # what everybody shares: each page's libraries, and a first model
            session.open()
            for page in sorted(filter(None, session.pages)):
                session.go(page)
        watch.look()
        with Session(server.url).connected() as session:
            draw_with(session, models[0], load)
        watch.look()
        load.seconds.clear()
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=click_around, args=(server.url, number, models, until, seed, load), daemon=True)
            for number in range(sessions)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and time.monotonic() < until + DRAWING_S + 30:
            watch.look()
            time.sleep(0.5)
        load.problems += [f"{thread.name} did not end" for thread in threads if thread.is_alive()]
        watch.look()
        log = server.log.read_text(errors="replace")
    start, first, drawn, *rest = watch.rss
    weights = max(bytes_of(folder / "outputs" / run / name) for run, name in models) / 1e6
    bound = drawn + SPARE_MB + MODELS * weights + TAB_MB * load.tabs
    print_latencies(load)
    print(f"memory, MB: {start:.0f} at the start, {first:.0f} with all pages shown, {drawn:.0f} with a picture drawn, "
          f"{max(rest):.0f} at most, {rest[-1]:.0f} at the end; bound {bound:.0f} = that with a picture "
          f"+ {SPARE_MB} to spare + {MODELS} models of {weights:.0f} + {TAB_MB} for each of {load.tabs} tabs")  # fmt: skip
    print(f"models: {watch.models()} in memory at most (cap {MODELS}), {len(load.models)} of {len(models)} drawn with")
    print(f"pages: {', '.join(sorted(page or 'compare' for page in load.pages))}; {len(load.problems)} errors")
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)  # colors
    traceback = log[log.find("Traceback") :][:20_000] if "Traceback" in log else ""
    assert not load.problems, "\n".join([*load.problems[:20], traceback])
    assert not watch.unhealthy, f"{watch.unhealthy} of {len(watch.rss)} health checks failed"
    assert not traceback, traceback
    assert load.pages == load.known, f"not every page answered: {load.known - load.pages}"
    assert len(load.models) > MODELS, f"only {len(load.models)} models were drawn with"
    assert 1 <= watch.models() <= MODELS, f"{watch.models()} models were in memory at once"
    assert max(rest) < bound, f"{max(rest):.0f} MB is more than {bound:.0f}"


def bytes_of(model: Path) -> int:
    """Return the bytes of the weights loaded for a model: a checkpoint's own, and those shared with the run's pipeline."""
    files = {*model.rglob("*.safetensors"), *(model.parent / "pipeline").rglob("*.safetensors")}
    return sum(file.stat().st_size for file in files if "optimizer" not in file.name)


def print_latencies(load: Load) -> None:
    print(f"{'seconds':30}{'count':>7}{'median':>9}{'95 %':>9}{'worst':>9}")
    for what, took in sorted(load.seconds.items()):
        took = sorted(took)
        high = took[math.ceil(0.95 * len(took)) - 1]
        print(f"{what:30}{len(took):7}{statistics.median(took):9.3f}{high:9.3f}{took[-1]:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--outputs", type=Path, help="a folder of runs, rather than small ones trained here")
    parser.add_argument("--seed", type=int, default=0, help="of the clicks")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        if options.outputs:
            (folder / "outputs").symlink_to(options.outputs.resolve())
        else:
            prepare(folder)
        run_load(folder, options.sessions, options.seconds, options.seed)


if __name__ == "__main__":
    main()
