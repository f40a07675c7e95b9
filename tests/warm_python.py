"""Start commands at once: fork them from a process that has imported the libraries, which takes a command 8 s otherwise.

    with WarmPython(environment) as python:
        done = python.run(script, arguments, cwd=folder, timeout=280)

The process has imported only libraries, nothing of the suite, and has computed nothing. A child runs the script as
`python script` does, and ends as an interpreter ends. Only a real start shows the faults of a start. For that reason, `command`
of conftest.py starts each script once as users do before it forks.
"""

import contextlib
import gc
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

LIBRARIES = (
    "import accelerate, datasets, diffusers, mlflow, numpy, PIL.Image, pyarrow, torch, torch.utils.flop_counter, transformers\n"
    "from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel\n"
    "from diffusers.optimization import get_scheduler\n"
    "from diffusers.training_utils import EMAModel\n"
    "from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer\n"
)


class WarmPython:
    """The process that forks, and its side of this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait()

    def run(self, script: Path, arguments: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, as `subprocess.run(..., capture_output=True, text=True)` does."""
        with tempfile.TemporaryDirectory() as name:
            out, err = Path(name, "out"), Path(name, "err")
            request = {"words": [str(script), *arguments], "cwd": str(cwd), "out": str(out), "err": str(err)}
            self.server.stdin.write(json.dumps(request).encode() + b"\n")
            self.server.stdin.flush()
            child = int(self.server.stdout.readline())
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                os.kill(child, signal.SIGKILL)
                self.server.stdout.readline()
                raise subprocess.TimeoutExpired(request["words"], timeout, out.read_bytes(), err.read_bytes())
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(request["words"], code, out.read_text(), err.read_text())


def main() -> None:
    """Fork a child for each request, a line of JSON; answer with its number, and with its exit code when it has ended."""
    exec(LIBRARIES, {})
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.buffer.readline():
        child = os.fork()
        if child == 0:
            answers.close()
            become(json.loads(line))
            return
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def become(request: dict) -> None:
    """Be the command of a request, from its first line on."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY | os.O_CREAT), (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):  # fmt: skip
        file = os.open(name, flags)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    sys.argv = request["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    random.seed()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
