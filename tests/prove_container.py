"""Build the Dockerfile's steps for real, and train, stop and resume in containers of the result. No Docker is needed.

python tests/prove_container.py [--keep folder]        (make prove-container)
python tests/prove_container.py --size                 (make prove-container SIZE=1)

A new environment with only torch stands for the base image. The steps of the Dockerfile then run one by one in a new root
folder, with pip's index. A container trains a tiny model on drawn flowers as another user than root, gets SIGTERM, saves and
ends with 75. A second container resumes and finishes the run, and a third one draws a picture. It needs root on Linux and some
minutes. --size only adds up the installed packages of scripts/requirements.txt, without torch and what torch needs.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]

from packaging.requirements import Requirement  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

from conftest import TINY  # noqa: E402
from local_image import Container, Image, context, why_not  # noqa: E402

TORCH = "2.13.0"


def needed(names: list[str]) -> dict[str, Distribution]:
    """Return the installed packages that requirements bring, by name, with all that these need in turn."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        waiting += [Requirement(text) for text in found[name].requires or []]
    return found


def size() -> None:
    """Print what the image's layers hold beside the base image."""
    lines = (line.split(" #")[0].strip() for line in (ROOT / "scripts/requirements.txt").read_text().splitlines())
    own = needed([line for line in lines if line and not line.startswith("#")])
    of_torch = needed(["torch"])
    sizes = {
        name: sum(path.stat().st_size for path in map(Path, map(package.locate_file, package.files or [])) if path.is_file())
        for name, package in own.items()
        if name not in of_torch
    }  # fmt: skip
    largest = sorted(sizes, key=lambda name: -sizes[name])[:6]
    code = sum((ROOT / name).stat().st_size for name in context(ROOT))
    print(f"{len(sizes)} packages: {sum(sizes.values()) / 1e6:.0f} MB, on top of the base image, uncompressed")
    print("largest: " + ", ".join(f"{name} {sizes[name] / 1e6:.0f}" for name in largest))
    print(f"{len(context(ROOT))} files of the suite: {code / 1e6:.1f} MB")


def prove(folder: Path) -> None:
    """Do everything in `folder`, and print a transcript."""
    start = time.monotonic()
    base = folder / "base"
    subprocess.run([sys.executable, "-m", "venv", str(base)], check=True)
    pip = [str(base / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={TORCH}"], check=True)
    print(f"base: a Python with torch {TORCH} and nothing else, {time.monotonic() - start:.0f} s", flush=True)
    start = time.monotonic()
    settings = pip_settings()
    image = Image(folder / "image", base / "bin", settings, is_read_only=False)
    image.of_this_machine += local_folders(settings)
    image.build()
    print(f"{len(image.steps)} steps of the Dockerfile: {time.monotonic() - start:.0f} s", flush=True)
    data = folder / "data"
    mounts = {data: "/data", data / "outputs": "/suite/outputs", data / "cache": "/suite/.cache"}
    for path in mounts:
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["chown", "10001", str(path)], check=True)
    (data / "tiny.yaml").write_text(TINY)
    common = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> Container:
        return image.start(list(words), mounts, common)

    draw = ["--count", "40", "--validation_count", "8", "--test_count", "4", "--size", "32", "--workers", "1"]
    end(run("python3", "scripts/make_flowers.py", "--output_dir", "/suite/outputs/dataset", *draw), 0)
    launch = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml"]
    options = ["--config", "/data/tiny.yaml", "--dataset", "/suite/outputs/dataset", "--report_to", "none"]
    end(run(*launch, "scripts/train_vae.py", *options, "--output_dir", "/suite/outputs/vae"), 0)
    train = [*launch, "scripts/train_unet.py", *options, "--vae", "/suite/outputs/vae", "--output_dir",
             "/suite/outputs/unet", "--checkpointing_steps", "20", "--validation_steps", "20", "--max_train_steps",
             "400"]  # fmt: skip
    first = run(*train)
    first.wait_for(data / "outputs/unet/checkpoint-000020/manifest.json", 600)
    first.first.terminate()
    end(first, 75)
    saved = sorted(path.name for path in (data / "outputs/unet").glob("checkpoint-*"))
    print(f"SIGTERM to the first process: exit code 75, {saved[-1]}", flush=True)
    second = run(*train)
    log = end(second, 0)
    print(next(line for line in log.splitlines() if line.startswith("resuming from")), flush=True)
    end(run("python3", "scripts/generate_images.py", "--model", "/suite/outputs/unet", "--prompt", "a red flower",
            "--num_inference_steps", "2", "--output_dir", "/suite/outputs/pictures"), 0)  # fmt: skip
    pictures = list((data / "outputs/pictures").glob("*.png"))
    assert pictures
    assert all(path.stat().st_uid == 10001 for path in pictures)
    print(f"{pictures[0].name} of the finished model, drawn as user 10001", flush=True)


def end(container: Container, code: int) -> str:
    """Wait for a container, check its exit code, and return its log."""
    found = container.end(900)
    assert found == code, f"exit code {found}\n{container.log[-6000:]}"
    return container.log


def pip_settings() -> dict[str, str]:
    """Return pip's settings on this machine as variables, since the new root folder has no file of settings."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = (line.partition("=")[::2] for line in listed.stdout.splitlines())
    return {f"PIP_{key.partition('.')[2].upper().replace('-', '_')}": value.strip("'") for key, value in pairs}


def local_folders(settings: dict[str, str]) -> list[str]:
    """Return the folders of this machine that pip's settings name, also those of the files that they name.

    An index in a folder `simple` links to packages in a folder beside it, so the folder above both is returned.
    """
    words = (word.removeprefix("file://") for value in settings.values() for word in value.split())
    paths = [Path(word) for word in words if word.startswith("/")]
    return sorted({
        str(path if path.is_dir() and path.name != "simple" else path.parent) for path in paths if path.exists()
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="store_true", help="only add up the packages")
    parser.add_argument("--keep", type=Path, help="folder for everything, kept afterwards")
    options = parser.parse_args()
    if options.size:
        size()
        return
    if reason := why_not():
        raise SystemExit(f"error: {reason}")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = (options.keep or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        prove(folder)


if __name__ == "__main__":
    main()
