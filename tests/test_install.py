"""The installation: the locks fit the requirements, and this environment holds the locked versions."""

import re
import subprocess
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT, SCRIPTS

LOCKS = {"requirements.txt": "requirements.lock", "requirements-train.txt": "requirements-train.lock"}
ENVIRONMENTS = [
    {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system, "platform_system": name,
     "platform_machine": machine, "os_name": "nt" if system == "win32" else "posix"}
    for python in ("3.11", "3.12", "3.13")
    for system, name, machine in (("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64"), ("win32", "Windows", "AMD64"))
]  # fmt: skip


def requirements(file):
    """A requirements file's lines and those of the files that it names."""
    for line in (ROOT / file).read_text().splitlines():
        text = line.split(" #")[0].strip()
        if text.startswith("-r "):
            yield from requirements(text.removeprefix("-r "))
        elif text and not text.startswith("#"):
            yield Requirement(text)


def pins(file):
    """A lock's lines, each with the hashes below it."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / file).read_text()).replace("\\\n", " ")
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        yield Requirement(requirement.strip()), [word.strip() for word in hashes]


@pytest.mark.parametrize(("file", "lock"), LOCKS.items())
def test_the_lock_fits_the_requirements_on_every_system(file, lock):
    wanted = [requirement for requirement in requirements(file) if requirement.name != "torch"]
    assert len(wanted) > 20
    for environment in ENVIRONMENTS:
        found = {}
        for pin, _ in pins(lock):
            if pin.marker is None or pin.marker.evaluate(environment):
                assert canonicalize_name(pin.name) not in found, f"{pin.name} stands twice for {environment}"
                found[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
        for requirement in wanted:
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pinned = found.get(canonicalize_name(requirement.name))
                assert pinned in requirement.specifier, f"{requirement} is {pinned} in {lock} (make lock)"


@pytest.mark.parametrize("lock", LOCKS.values())
def test_a_lock_names_files_by_their_hashes_and_no_index_and_no_torch(lock):
    for pin, hashes in pins(lock):
        assert re.fullmatch(r"==[^*]+", str(pin.specifier)), pin
        assert hashes, pin
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", word) for word in hashes), pin
        assert not re.match(r"(torch|triton|nvidia-.*|cuda-.*)$", pin.name), pin
    assert not re.search(r"://|--(extra-)?index|--find-links", (ROOT / lock).read_text())


def test_less_is_installed_to_train_alone_in_the_same_versions():
    everything = {pin.name: str(pin) for pin, _ in pins("requirements.lock")}
    some = {pin.name: str(pin).split(" ;")[0].split(";")[0] for pin, _ in pins("requirements-train.lock")}
    assert not {"sagemaker", "boto3", "moto", "pytest", "playwright"} & set(some)
    assert {name: everything[name].split(" ;")[0].split(";")[0] for name in some} == some
    assert len(some) < 0.8 * len(everything)


def test_this_environment_holds_what_is_locked():
    """The same versions on every day; skipped where something else was installed on purpose, such as newer wheels."""
    found = {}
    for pin, _ in pins("requirements.lock"):
        if pin.marker is None or pin.marker.evaluate():
            try:
                found[str(pin)] = version(pin.name) in pin.specifier
            except PackageNotFoundError:
                found[str(pin)] = False
    wrong = [pin for pin, fits in found.items() if not fits]
    if not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("the environment was not made by this Makefile")
    assert wrong == []


def made(*words):
    """What make would run."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", " ")


def test_make_train_alone_trains_what_the_demo_trains():
    said = " ".join(made("-o", ".venv/.ready", "train").split())
    demo = "--config demo --dataset outputs/demo/dataset"
    assert "make_flowers.py --output_dir outputs/demo/dataset" in said
    assert f"train_vae.py {demo} --output_dir outputs/demo/vae" in said
    assert f"train_unet.py {demo} --vae outputs/demo/vae --output_dir outputs/train/unet" in said
    said = made("-o", ".venv/.ready", "train", "ARGS=--config photos --dataset photos")
    assert "make_flowers" not in said
    assert "train_unet.py --config photos --dataset photos" in said


@pytest.mark.parametrize("target", ["space SPACE=o/n", "train ARGS=x", "clean-caches"])
def test_a_dry_run_in_any_spelling_is_one_and_another_word_ends_make(target):
    words = ["-o", ".venv/.ready", *target.split(), "MODEL=m"]
    assert all("--dry_run" in made(*words, f"DRY_RUN={value}") for value in ("1", "True", "YES", "on"))
    assert all("--dry_run" not in made(*words, f"DRY_RUN={value}") for value in ("", "0", "False", "no"))
    done = subprocess.run(["make", "-n", *words, "DRY_RUN=perhaps"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "write 1 for yes or 0 for no, not perhaps" in done.stderr


def test_no_target_drops_a_variable_that_others_honour():
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "publish", "MODEL=m", "REPO=o/n", "DRY_RUN=1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "make publish has no dry run" in done.stderr
    said = made("-o", ".venv/.ready", "demo", "CONFIG=gpu.yaml", "ARGS=--train_unet.seed 1")
    assert "--output_dir outputs/demo --accelerate_config gpu.yaml --train_unet.seed 1" in " ".join(said.split())
    assert "--accelerate_config" not in made("-o", ".venv/.ready", "demo")


def test_the_install_takes_the_lock_by_uv_or_by_pip():
    said = made("-W", "requirements.lock", ".venv/.ready")
    assert "uv pip install --python .venv/bin/python --no-deps --requirement requirements.lock" in said
    assert "pip install --disable-pip-version-check --no-deps --requirement requirements.lock" in said
    assert re.search(r"pip install --disable-pip-version-check torch==\d+\.\d+\.\d+\n", said)
    assert "--quiet" not in said


def test_scripts_requirements_are_those_of_sagemaker():
    """The container has a torch of its own, and installs the folder's requirements.txt."""
    names = {canonicalize_name(requirement.name) for requirement in requirements("scripts/requirements.txt")}
    assert not {"torch", "sagemaker", "streamlit"} & names
    assert {"filelock", "psutil"} <= names
    assert (SCRIPTS / "requirements.txt").is_file()
