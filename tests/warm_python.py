"""Start commands at once: fork them from a process that has imported the libraries, which takes a command 12 s otherwise.

    python = WarmPython(folder, environment)   # once for all workers of a test run
    done = start(folder, script, arguments, cwd, variables, reads_hub=False).wait(900)

Where a command line is wanted in place of `python script arguments`, it is `python tests/warm_python.py FOLDER script arguments`.

Two processes fork. Both have imported only libraries, nothing of the suite, and have computed nothing. The first has no library
that reads the Hub's variables (HF_…) at its import. The second one, forked from the first, has them all. A child runs the script
as `python script` does, and ends as an interpreter ends. Only a real start shows the faults of a start. For that reason,
`command` of conftest.py starts each script once as users do before it forks.
"""

import contextlib
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

EARLY = (
    "import torch, torch._dynamo, torch.distributed, torch.utils.flop_counter\n"
    "import numpy, pandas, PIL.Image, pyarrow, pyarrow.dataset, pyarrow.parquet, scipy.optimize, scipy.stats\n"
    "import mlflow, mlflow.store.tracking.sqlalchemy_store\n"
)
LATE = (
    "import accelerate, datasets, diffusers, transformers\n"
    "from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel\n"
    "from diffusers.optimization import get_scheduler\n"
    "from diffusers.training_utils import EMAModel\n"
    "from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer\n"
)
# MLflow is imported as the suite imports it: without a line for each migration of a database.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR"}


class WarmPython:
    """The owner of the processes that fork. They import when the first request comes, and end with the owner."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment | QUIET,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.server.stdout.readline()  # both addresses are there

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


@dataclass
class Running:
    """A forked command: its process number, and the folder of its output."""

    words: list[str]
    pid: int
    connection: socket.socket
    answers: TextIO
    output: tempfile.TemporaryDirectory

    def poll(self) -> int | None:
        """Return None while it runs, as `subprocess.Popen.poll` does."""
        return 0 if select.select([self.connection], [], [], 0)[0] else None

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end, as `subprocess.run(..., capture_output=True, text=True)` does."""
        out, err = (Path(self.output.name, name) for name in ("out", "err"))
        with self.output, self.connection, self.answers:
            self.connection.settimeout(timeout)
            try:
                code = int(self.answers.readline())
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.words, timeout, out.read_bytes(), err.read_bytes()) from None
            return subprocess.CompletedProcess(self.words, code, out.read_text(), err.read_text())


def start(
    folder: Path, script: Path, arguments: list[str], cwd: Path, environment: dict[str, str], reads_hub: bool
) -> Running:
    """Fork a command from the processes of `folder`. reads_hub: the environment's HF_… differ from the server's."""
    output = tempfile.TemporaryDirectory()
    words = [str(script), *arguments]
    request = {"words": words, "cwd": str(cwd), "environment": environment, "output": output.name}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / ("early" if reads_hub else "late")))
    connection.sendall(json.dumps(request).encode() + b"\n")
    answers = connection.makefile()
    return Running(words, int(answers.readline()), connection, answers, output)


def main() -> None:
    """Serve the two addresses in the folder until standard input ends."""
    listeners = {}
    for name in ("early", "late"):
        listeners[name] = socket.socket(socket.AF_UNIX)
        listeners[name].bind(str(Path(sys.argv[1], name)))
        listeners[name].listen(16)
    print("ready", flush=True)
    if 0 in select.select([0, *listeners.values()], [], [])[0]:
        return
    exec(EARLY, {})
    if os.fork() == 0:
        listeners.pop("early").close()
        exec(LATE, {})
    else:
        listeners.pop("late").close()
    gc.freeze()
    signal.signal(signal.SIGCHLD, forget_ended)
    (listener,) = listeners.values()
    while 0 not in select.select([0, listener], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(connection)
            return
        connection.close()


def forget_ended(*_: object) -> None:
    """Collect ended children, so that their time counts as this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def keep(connection: socket.socket) -> None:
    """Fork the command of a connection's request; answer with its number, and with its exit code when it has ended."""
    with connection.makefile() as lines:
        request = json.loads(lines.readline())
    child = os.fork()
    if child == 0:
        connection.close()
        become(request)
        return
    with contextlib.suppress(OSError):  # nobody waits any more
        connection.sendall(f"{child}\n".encode())
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
    os._exit(0)


def become(request: dict) -> None:
    """Be the command of a request, from its first line on."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY | os.O_CREAT), (2, "err", os.O_WRONLY | os.O_CREAT),
    ):  # fmt: skip
        file = os.open(Path(request["output"], name), flags)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    sys.path[0] = str(Path(sys.argv[0]).absolute().parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    random.seed()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        done = start(
            Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], Path.cwd(), dict(os.environ), reads_hub=False
        ).wait(600)
        sys.stderr.write(done.stderr)  # before the results, which a terminal shows below progress bars
        sys.stderr.flush()
        sys.stdout.write(done.stdout)
        sys.exit(done.returncode)
    with contextlib.suppress(KeyboardInterrupt):
        main()
