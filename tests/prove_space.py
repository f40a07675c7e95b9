"""Start a Space in an environment with only its own requirements: it is pushed, fetched, started, and draws.

python tests/prove_space.py [--model outputs/demo/unet] [--keep folder]        (make prove-space)

The Hub is a server on 127.0.0.1. The Space is installed as its Dockerfile says, from pip's index, and started by the
Dockerfile's own command. Requests come as the Hub's proxy sends them. Then the page draws a picture. It must be the picture
that the suite draws from the same model. Without --model, a tiny model is trained first. All takes some minutes, most of them
for torch.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]

from conftest import TINY  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402
from t2i.hub import space  # noqa: E402

REPO = "me/tiny-flowers"
PROMPT, STEPS = "a red flower", 2

# Run within the Space by its own Python, which sees nothing else: draws by the page, and tells what was imported from where.
DRAW = """
import json, os, sys, time
from pathlib import Path
from streamlit.testing.v1 import AppTest

app = AppTest.from_file("dashboard/streamlit_app.py", default_timeout=60).run()
assert not app.exception, app.exception
before = {name for name in ("torch", "diffusers") if name in sys.modules}
labelled = lambda widgets, label: next(widget for widget in widgets if widget.label == label)
labelled(app.text_area, "Prompt").set_value(sys.argv[1])
labelled(app.number_input, "Steps").set_value(int(sys.argv[2]))
labelled(app.button, "Draw").click().run()
end = time.monotonic() + 220
while time.monotonic() < end:
    pictures = [path for path in Path("outputs").glob("*/cells/*.png") if not path.name.endswith((".steps.png", ".part.png"))]
    told = [element.value for kind in (app.exception, app.warning, app.error) for element in kind]
    if pictures or told:
        break
    time.sleep(2)  # a run of the page holds the interpreter, which the drawing thread needs for its imports
    app.run()
texts = [element.value for kind in (app.text, app.caption) for element in kind]
app.run()
told += [element.value for kind in (app.exception, app.warning, app.error) for element in kind]
files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
files = {name: os.path.realpath(file) for name, file in files.items() if file and os.path.exists(file)}
print(json.dumps({"pictures": list(map(str, pictures)), "told": told, "texts": texts, "files": files, "early": sorted(before)}))
"""


def dockerfile(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """Return the install command, the environment and the start command in a Space's Dockerfile."""
    text = (folder / "Dockerfile").read_text()
    words = [word for line in re.findall(r"(?m)^ENV (.*)$", text) for word in shlex.split(line)]
    environment = dict(word.split("=", 1) for word in words)
    for name in ("HOME", "PATH"):
        environment.pop(name)
    return re.findall(r"(?m)^RUN (pip .*)$", text)[0], environment, space.start_command(folder)


def own_environment(python_bin: Path, home: Path) -> dict[str, str]:
    """Return the variables of a process that may see only the Space and its Python."""
    foreign = ("PYTHON", "STREAMLIT", "MLFLOW", "HF_", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return kept | {"HOME": str(home), "PATH": f"{python_bin}:/usr/bin:/bin"}


@contextlib.contextmanager
def serving(folder: Path, python_bin: Path, container: bool) -> Iterator[int]:
    """Start the Space in `folder` by its Dockerfile's command, in its environment if `container`, and give its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    _, environment, command = dockerfile(folder)
    environment = own_environment(python_bin, folder) | (environment if container else {})
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [str(python_bin / command[0]), *command[1:], f"--server.port={port}"], cwd=folder, env=environment, stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while answer(port, "/_stcore/health") != 200:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < end, (folder / "server.log").read_text()
            time.sleep(0.1)
        yield port
        assert server.poll() is None, (folder / "server.log").read_text()
    finally:
        server.terminate()
        server.wait(20)


def answer(port: int, path: str, headers: dict[str, str] | None = None) -> int | None:
    """Return the status of a GET to the server; None without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def opens(port: int, host: str, origin: str) -> bool:
    """Return whether a page at `origin`, with the server as `host`, may open the websocket that brings all content."""
    headers = {"Host": host, "Origin": origin, "Connection": "Upgrade", "Upgrade": "websocket",
               "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
               "Sec-WebSocket-Protocol": "streamlit"}  # fmt: skip
    return answer(port, "/_stcore/stream", headers) == 101


def draw(folder: Path, python: Path, prompt: str = PROMPT, steps: int = STEPS) -> dict:
    """Draw a picture on the Space's page in `folder`. Return what DRAW prints."""
    done = subprocess.run(
        [str(python), "-I", "-c", DRAW, prompt, str(steps)], cwd=folder, capture_output=True, text=True, timeout=280,
        env=own_environment(python.parent, folder) | dockerfile(folder)[1] | {"OMP_NUM_THREADS": "1"},  # others draw here too
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["pictures"]) == 1, told | {"files": len(told["files"])}
    return told


def same_picture(file: Path, model: Path) -> dict:
    """Check that the suite draws the same picture from `model`. Return the parameters in the picture's file."""
    import numpy as np
    from PIL import Image

    from t2i.pictures import sampling

    known = json.loads(Image.open(file).info["parameters"])
    here = sampling.generate(
        sampling.load_pipeline(model, scheduler=known["scheduler"]), [known["prompt"]], [known["seed"]], progress=False,
        guidance_scale=known["guidance_scale"], num_inference_steps=known["num_inference_steps"],
    )[0]  # fmt: skip
    picture = np.asarray(Image.open(file))
    assert picture.shape == here.shape
    assert np.abs(picture.astype(int) - here).max() <= 1  # another number of threads adds in another order
    assert picture.std() > 0
    return known | {"shape": picture.shape}


def publish(model: Path | str, hub: LoopbackHub, folder: Path) -> str:
    """Push the Space of `model` to `hub`, as users do. Return the command's output."""
    command = [sys.executable, str(ROOT / "scripts/publish_space.py"), "--model", str(model), "--space", REPO]
    return subprocess.run(
        command, cwd=folder, env=os.environ | hub.environment(), capture_output=True, text=True, check=True
    ).stdout


def train(folder: Path) -> Path:
    """Train a tiny run."""
    (folder / "tiny.yaml").write_text(TINY)
    common = ["--config", "tiny.yaml", "--dataset", "dataset", "--report_to", "none"]
    for words in (
        ["make_flowers.py", "--output_dir", "dataset", "--count", "40", "--validation_count", "12", "--test_count", "4",
         "--size", "32"],
        ["train_vae.py", *common, "--output_dir", "vae"],
        ["train_unet.py", *common, "--vae", "vae", "--output_dir", "unet"],
    ):  # fmt: skip
        command = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:]]
        subprocess.run(
            command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    return folder / "unet"


def prove(folder: Path, model: Path | None) -> None:
    from huggingface_hub import snapshot_download

    run = model.resolve() if model else train(folder)
    with LoopbackHub() as hub:
        print(publish(run, hub, folder))
        assert "is up to date" in publish(run, hub, folder)
        there = Path(
            snapshot_download(
                REPO, repo_type="space", local_dir=folder / "space", endpoint=hub.url, token=hub.token,
                cache_dir=folder / "cache",
            )
        )  # fmt: skip
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    install = shlex.split(dockerfile(there)[0].replace('--extra-index-url "$TORCH_INDEX" ', ""))
    subprocess.run([str(python), "-m", *install, "-qq", "--disable-pip-version-check"], cwd=there, check=True)
    packages = json.loads(
        subprocess.run([str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, check=True).stdout
    )
    size = sum(path.lstat().st_size for path in (folder / "venv").rglob("*") if not path.is_dir())
    took = time.monotonic() - start
    print(
        f"a new environment with requirements.txt: {took:.0f} s, {len(packages)} packages, {size / 1e6:.0f} MB",
        flush=True,
    )
    start = time.monotonic()
    with serving(there, python.parent, container=True) as port:
        print(f"started by {shlex.join(dockerfile(there)[2])}: healthy after {time.monotonic() - start:.1f} s")
        host = "me-tiny-flowers.hf.space"
        assert opens(port, host, f"https://{host}")
        assert not opens(port, host, "https://elsewhere.example")
        print(f"its page opens as https://{host}, and for no other site's page", flush=True)
    start = time.monotonic()
    told = draw(there, python)
    known = same_picture(there / told["pictures"][0], run)
    print(f"drew {known['prompt']!r} in {known['num_inference_steps']} steps, {known['shape']}, in a new process within "
          f"{time.monotonic() - start:.0f} s: the picture that the suite draws")  # fmt: skip
    inside = (str(there.resolve()), str((folder / "venv").resolve()), os.path.dirname(os.__file__))
    outside = {name: file for name, file in told["files"].items() if not file.startswith(inside)}
    assert not outside, outside
    print(f"{len(told['files'])} modules, none from outside the Space and its environment")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="finished run folder; without it a tiny one is trained")
    parser.add_argument("--keep", type=Path, help="folder for everything, kept afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = (options.keep or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prove(folder, options.model)


if __name__ == "__main__":
    main()
