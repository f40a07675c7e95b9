"""Python's part of gpu_session.sh: packing for a machine without a network, and few files of figures and pictures.

python benchmarks/gpu_session.py pack --dataset PHOTOS [--peer PATH/train_text_to_image.py] [--machine LIST] [--limit_mb 64]
"""

import argparse
import email
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import ROOT, SCRIPTS, describe_machine
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from t2i.errors import UserError, run_main

PACKED = Path(
    os.environ.get("GPU_SESSION_FOLDER", ROOT / "gpu_session")
)  # ignored by git; the device's machine gets it if it is named
LEFT_OUT = {"deepspeed", "mlflow"}  # of the suite's requirements: one GPU needs no ZeRO, and nothing is tracked
# The machine as pip names it: a platform stands for wheels of exactly its version of glibc.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
TARGET = {
    "python_version": "3.12", "python_full_version": "3.12.3", "implementation_name": "cpython", "os_name": "posix",
    "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
    "platform_python_implementation": "CPython", "extra": "",
}  # fmt: skip
QUALITY = 90  # of the photos' JPEGs
CORE = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub")


def main() -> None:
    actions = {"pack": pack, "check": check, "collect": collect, "pictures": draw}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    packing = commands.add_parser("pack", help="make gpu_session/ on a machine with a package index")
    packing.add_argument("--dataset", required=True, help="data set of photos: Hub id, dataset folder or imagefolder")
    packing.add_argument("--peer", type=Path, help="path of diffusers' examples/text_to_image/train_text_to_image.py")
    packing.add_argument("--machine", type=Path, default=Path(__file__).with_name("gpu_machine.txt"),
                         help="file with the GPU machine's packages, as pip list --format=freeze prints them")  # fmt: skip
    packing.add_argument(
        "--limit_mb", type=float, default=64.0, help="limit of the working tree and gpu_session/ together, in MiB"
    )
    packing.add_argument("--resolution", type=int, default=128, help="width and height of the packed photos in px")
    packing.add_argument("--max_train_samples", type=int, help="maximum number of training photos to pack")
    commands.add_parser("check", help="print the machine as JSON; end with an error if a package is missing")
    inner = {
        "collect": ["log", "offset", "file", "step", "seconds", "ending", "command"],
        "pictures": ["run", "vae_run", "prompts", "file"],
    }
    for name, words in inner.items():
        command = commands.add_parser(name, help="used by gpu_session.sh run")
        for word in words:
            command.add_argument(word)
    options = parser.parse_args()
    actions[options.action](options)


def pack(options: argparse.Namespace) -> None:
    """Make `gpu_session/` atomically: wheels, photos and the peer's script."""
    if options.peer and not options.peer.is_file():
        raise UserError(f"no file {options.peer}; give --peer the path of diffusers' train_text_to_image.py")
    if not options.machine.is_file():
        raise UserError(f"no file {options.machine}; give --machine the output of pip list --format=freeze there")
    part = PACKED.with_name(f"{PACKED.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        there = read_packages(options.machine)
        wanted = read_packages(ROOT / "scripts" / "requirements.txt").values()
        download([one for one in wanted if one.name not in LEFT_OUT], there, part / "wheels")
        if options.peer:
            shutil.copy(options.peer, part / "train_text_to_image.py")
        left = int(options.limit_mb * 2**20) - tree_bytes() - folder_bytes(part)
        pack_photos(options, part / "photos", left)
        if (PACKED / "results").is_dir():
            (PACKED / "results").rename(part / "results")
        shutil.rmtree(PACKED, ignore_errors=True)
        part.rename(PACKED)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sizes = {"working tree": tree_bytes()} | {path.name: folder_bytes(path) for path in sorted(PACKED.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 2**20:6.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:6.1f} MiB  of {options.limit_mb:g} MiB; carry the tree and {PACKED.name}/")


def read_packages(path: Path) -> dict[str, Requirement]:
    """Read packages by canonical name. Comments and lines without a requirement are skipped."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-") and " @ " not in line]
    return {canonicalize_name(one.name): one for one in found}


def download(wanted: list[Requirement], there: dict[str, Requirement], folder: Path) -> None:
    """Download wheels of `wanted` and their requirements that the machine lacks.

    Raises `UserError` if a wheel is missing.
    """
    folder.mkdir()
    waiting, done = list(wanted), set[str]()
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in there:
            tell_misfit(requirement, there[name])
        if name in done or name in there or (requirement.marker and not requirement.marker.evaluate(TARGET)):
            continue
        done.add(name)
        requirement.marker = None
        before = set(folder.iterdir())
        words = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", "3.12"]
        words += ["--implementation", "cp", *(word for one in PLATFORMS for word in ("--platform", one))]
        fetched = subprocess.run(
            [sys.executable, *words, "--dest", str(folder), str(requirement)], capture_output=True, text=True
        )
        if fetched.returncode:
            reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"pip brings no wheel of {requirement} for Python 3.12 on x86-64 Linux ({reason})")
        (wheel,) = set(folder.iterdir()) - before
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}", flush=True)
        waiting += requirements_of(wheel)


def tell_misfit(requirement: Requirement, there: Requirement) -> None:
    """Print the version that a packed wheel wants, if the machine has another."""
    versions = [one.version for one in there.specifier]
    brought = all(one.operator != "==" for one in requirement.specifier)  # a pin of the suite is no need
    if versions and brought and not requirement.specifier.contains(versions[0], prereleases=True):
        print(f"NOTE: {requirement} is wanted, and the machine has {versions[0]}", flush=True)


def requirements_of(wheel: Path) -> Iterator[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if not requirement.marker or requirement.marker.evaluate(TARGET):
            yield requirement


def pack_photos(options: argparse.Namespace, folder: Path, room: int) -> None:
    """Write photos as small JPEGs with captions: a dataset folder.

    Raises `UserError` if the limit leaves too little room for the photos.
    """
    import tempfile

    from PIL import Image

    from t2i.config import DataConfig
    from t2i.data import preparing

    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(
            dataset=options.dataset, resolution=options.resolution, cache_dir=cache,
            max_train_samples=options.max_train_samples,
        )  # fmt: skip
        splits = preparing.load_splits(config)
        size = 0
        for name, split in (("train", splits.train), ("validation", splits.validation)):
            if split is None:
                continue
            (folder / name).mkdir(parents=True)
            rows = []
            for number, (pixels, caption) in enumerate(zip(split.pixels, split.rows["caption"], strict=True)):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
                size += file.tell()
                (folder / name / f"{number:06d}.jpg").write_bytes(file.getvalue())
                rows.append(json.dumps({"file_name": f"{number:06d}.jpg", "caption": caption}, ensure_ascii=False))
            if name == "train":  # the captions that most photos have
                common = Counter(split.rows["caption"]).most_common(8)
                (folder.parent / "prompts.txt").write_text(
                    "\n".join(text for text, _ in common) + "\n", encoding="utf-8"
                )
            text = "\n".join(rows) + "\n"
            size += len(text.encode())
            (folder / name / "metadata.jsonl").write_text(text, encoding="utf-8")
        if size > room:
            fit = max(int(len(splits.train) * room / size * 0.95), 0)
            raise UserError(
                f"{len(splits.train)} photos take {size / 2**20:.1f} MiB and {room / 2**20:.1f} MiB are left of "
                f"{options.limit_mb:g}; give --max_train_samples {fit}"
            )


def tree_bytes() -> int:
    """Return the bytes of the files that travel: tracked files, and untracked files that git does not ignore."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, capture_output=True, check=True).stdout.split(b"\0")
    paths = {ROOT / os.fsdecode(name) for name in names if name}
    return sum(path.lstat().st_size for path in paths if path.is_file() and PACKED.name not in path.parts)


def folder_bytes(path: Path) -> int:
    return (
        path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    )


def check(_: argparse.Namespace) -> None:
    """Print the machine as the first line of the figures. Raises `UserError` with the missing packages."""
    needed = [
        "torch",
        "transformers",
        "accelerate",
        "diffusers",
        "datasets",
        "pydantic",
        "tyro",
        "torchmetrics",
        "psutil",
    ]
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"missing here: {', '.join(missing)}; run gpu_session.sh pack and carry gpu_session/ along")
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in CORE} | {"torch": torch.__version__}
    print(json.dumps({"machine": describe_machine(gpu), "versions": {"python": platform.python_version(), **versions}}))


def collect(options: argparse.Namespace) -> None:
    """Append a step to the figures: its ending, and the JSON lines in the log after `offset`."""
    with open(options.log, "rb") as log:
        log.seek(int(options.offset))
        lines = log.read().decode(errors="replace").splitlines()
    rows: list[dict[str, Any]] = [
        {"command": options.command, "ending": options.ending, "seconds": int(options.seconds)}
    ]
    for line in lines:
        with suppress(ValueError):  # cut in the middle
            rows += [json.loads(line)] if line.startswith("{") else []
    with open(options.file, "a", encoding="utf-8") as figures:
        for row in rows:
            figures.write(json.dumps({"run": options.step, **row}) + "\n")


def draw(options: argparse.Namespace) -> None:
    """Draw a grid of the prompts by a run's newest weights, label it, and print the run's figures."""
    from PIL import Image, ImageDraw

    from t2i.files import read_object

    run, vae = Path(options.run), Path(options.vae_run)
    folder = run.with_name("pictures")
    words = ["--model", run, "--prompt_file", options.prompts, "--num_images_per_prompt", 4, "--guidance_scale", 3.0]
    words += ["--output_dir", folder, "--grid", "--batch_size", 32]
    subprocess.run([sys.executable, SCRIPTS / "generate_images.py", *map(str, words)], check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: row[key] for row in rows for key in ("step", "train_loss", "val_loss") if key in row}
    last["vae_psnr_db"] = read_object(vae / "run.json").get("psnr_db")
    print(json.dumps(last | {"seconds_of_stages": read_object(run / "run.json").get("seconds")}))
    grid = Image.open(folder / "grid.png").convert("RGB")
    said = [
        f"The suite's own small VAE and text encoder; a UNet trained from scratch, {last.get('step')} updates.",
        "A row per prompt:", *Path(options.prompts).read_text(encoding="utf-8").splitlines(),
    ]  # fmt: skip
    sheet = Image.new(
        "RGB", (max(grid.width, *(7 * len(line) for line in said)) + 8, grid.height + 16 * len(said)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(said):
        pen.text((4, 2 + 16 * number), line.encode("latin-1", "replace").decode("latin-1"), fill="black")
    sheet.paste(grid, (0, 16 * len(said)))
    sheet.save(options.file)


if __name__ == "__main__":
    run_main(main)
