"""Build the Dockerfile without Docker, step by step in a fresh root folder, and run containers of it in namespaces of their own.

    image = Image(folder, python_bin)          # stands for FROM: this machine's /usr, and a Python that has torch
    image.build()                              # COPY, RUN, ENV, USER, … in order
    container = image.start(["accelerate", "launch", …], mounts={here: "/data"})

The root folder has nothing of this machine but /usr, the folders of that Python, and the accounts of /etc that `useradd` reads.
A container's entry point is its first process, so signals behave as in Docker. Not covered: layers, networks, GPUs, limits.
It needs root on Linux.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
TOOLS = ("chroot", "env", "mount", "unshare", "useradd")
ACCOUNTS = ("passwd", "group", "shadow", "gshadow", "login.defs", "nsswitch.conf", "hosts", "resolv.conf")
# The first process of a container until it becomes the entry point. Words: root, number of mounts, mounts, command.
ENTER = """
set -eu
root=$1 count=$2
shift 2
for _ in $(seq "$count"); do
  mount --bind ${3:+-o "$3"} "$1" "$root$2"
  shift 3
done
mount -t proc proc "$root/proc"
exec "$@"
"""


def why_not() -> str | None:
    """Return in one sentence why this machine cannot build and run the image; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a fresh root folder needs root on Linux"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"missing: {', '.join(missing)}"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return f"namespaces are refused: {done.stderr.strip()}" if done.returncode else None


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, in order: name and rest."""
    text = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.split()[0].upper(), line.split(None, 1)[1]) for line in lines]


def context(folder: Path) -> list[str]:
    """Return the files that .dockerignore lets into the image, as paths below `folder`. The last matching line decides."""
    lines = [line.strip() for line in (folder / ".dockerignore").read_text().splitlines()]
    rules = [(line.lstrip("!"), line.startswith("!")) for line in lines if line and not line.startswith("#")]
    found = []
    for base, _, names in os.walk(folder):
        for path in (Path(base, name).relative_to(folder) for name in names):
            parts = [str(path), *map(str, list(path.parents)[:-1])]
            kept = True
            for pattern, lets_in in rules:
                own = [part.split("/")[-1] for part in parts] if pattern.startswith("**/") else parts
                if any(fnmatch.fnmatchcase(part, pattern.removeprefix("**/")) for part in own):
                    kept = lets_in
            found += [str(path)] if kept else []
    return sorted(found)


class Image:
    """The image of a Dockerfile in a root folder.

    Args:
        folder: folder for the root folder. It must be reachable by every user.
        python_bin: folder of the Python that stands for the base image's.
        environment: further variables of RUN, such as pip's.
        is_read_only: whether RUN may not change that Python.
    """

    def __init__(
        self, folder: Path, python_bin: Path, environment: dict[str, str] | None = None, is_read_only: bool = True
    ):
        python_bin = python_bin.resolve()  # commands there name it so in their first lines
        self.root, self.python_bin, self.of_run = folder / "root", python_bin, environment or {}
        self.steps: list[str] = []
        self.env = {"PATH": f"{python_bin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
        self.user, self.workdir, self.entrypoint, self.volumes = "0", "/", [], []
        self.arguments = {"REVISION": "0123456789abcdef"}
        real = Path(os.path.realpath(python_bin / "python3")).parents[1]
        self.of_this_machine = ["/usr", str(real)]  # folders that are visible, and cannot be changed
        self._mounts = [
            ("/dev", "/dev", ""),
            (str(python_bin.parent), str(python_bin.parent), "ro" if is_read_only else ""),
        ]

    def build(self) -> None:
        """Do each step of the Dockerfile."""
        self.root.mkdir(parents=True)
        for name in ("bin", "lib", "lib64", "sbin"):
            (self.root / name).symlink_to(f"usr/{name}")
        for name in ("etc", "proc", "tmp", "home"):
            (self.root / name).mkdir()
        (self.root / "tmp").chmod(0o1777)
        for name in ACCOUNTS:
            if Path("/etc", name).is_file():
                shutil.copy(Path("/etc", name), self.root / "etc" / name)
        for name in ("ssl", "ca-certificates"):
            if Path("/etc", name).is_dir():
                shutil.copytree(Path("/etc", name), self.root / "etc" / name, symlinks=True)
        for name, rest in instructions((ROOT / "Dockerfile").read_text()):
            getattr(self, f"_{name.lower()}")(rest)
            self.steps.append(f"{name} {rest}")

    def _from(self, rest: str) -> None:
        """Do nothing, since this machine's folders stand for the base image."""

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self.arguments.setdefault(name, default)

    def _env(self, rest: str) -> None:
        self.env |= dict(word.split("=", 1) for word in shlex.split(rest))

    def _copy(self, rest: str) -> None:
        source, target = rest.split()
        for name in context(ROOT) if source == "." else [source]:
            to = self.root / target.lstrip("/") / name if source == "." else self.root / target.lstrip("/")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to)

    def _run(self, rest: str) -> None:
        variables = self.env | self.arguments | self.of_run
        done = subprocess.run(
            self.words(["sh", "-c", rest], variables, {}), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _user(self, rest: str) -> None:
        self.user = rest

    def _workdir(self, rest: str) -> None:
        self.workdir = rest

    def _volume(self, rest: str) -> None:
        self.volumes = json.loads(rest)

    def _entrypoint(self, rest: str) -> None:
        self.entrypoint = json.loads(rest)

    def words(self, command: list[str], variables: dict[str, str], mounts: dict[Path, str]) -> list[str]:
        """Return the command line that runs `command` in the root folder, as its own first process."""
        every = [
            *((name, name, "ro") for name in self.of_this_machine),
            *self._mounts,
            *((str(here), there, "") for here, there in mounts.items()),
        ]
        for _, there, _ in every:
            (self.root / there.lstrip("/")).mkdir(parents=True, exist_ok=True)
        listed = [word for mount in every for word in mount]
        user = [] if self.user == "0" else [f"--userspec={self.user}:{self.user}"]
        return [
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh", str(self.root), str(len(every)),
            *listed, "chroot", *user, str(self.root), "env", "-i", "-C", self.workdir,
            *(f"{name}={value}" for name, value in variables.items()), *command,
        ]  # fmt: skip

    def start(
        self, command: list[str], mounts: dict[Path, str], environment: dict[str, str] | None = None
    ) -> "Container":
        """Start a container, as `docker run -v here:there … IMAGE command` does."""
        return Container(self.words([*self.entrypoint, *command], self.env | (environment or {}), mounts))


class Container:
    """A running container. `log` is what it has printed, once it has ended."""

    def __init__(self, words: list[str]) -> None:
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log = ""

    @property
    def first(self) -> psutil.Process:
        """Return the container's first process."""
        return psutil.Process(self._process.pid).children()[0]

    def wait_for(self, file: Path, seconds: float) -> None:
        """Wait until a file exists."""
        end = time.monotonic() + seconds
        while not file.exists():
            assert self._process.poll() is None, self._process.communicate()[0][-6000:]
            assert time.monotonic() < end, f"{file} does not exist after {seconds:.0f} s"
            time.sleep(0.01)

    def end(self, seconds: float) -> int:
        """Wait until the container has ended, and return its exit code."""
        self.log = self._process.communicate(timeout=seconds)[0]
        return self._process.returncode

    def stop(self, seconds: float) -> int:
        """Ask the container to end, as `docker stop` does, and return its exit code."""
        self.first.terminate()
        return self.end(seconds)

    def kill(self) -> None:
        self._process.kill()
