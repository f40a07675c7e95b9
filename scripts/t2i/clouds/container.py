"""Run a training in a container: `accelerate launch`, its log, and signals passed on. This module imports no torch."""

import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

WORKER_POLL_S = 0.2  # Wait between two looks for the training's processes.
# Variables of every training in a container.
LOGGED = {
    "PYTHONUNBUFFERED": "1",
    "TQDM_MININTERVAL": "60",  # s; in a log, each update of a progress bar is a line
}


class Training:
    """The launcher of a training, whose log is printed. SIGTERM and Ctrl-C reach the training.

    Args:
        words: the command of the launcher.
        folder: working directory of the training.
        environment: environment variables of the training.
        script: file name of the training script, by which the training's processes are found.

    Attributes:
        stopped: whether the training was asked to save a checkpoint and end.
        error: the training's own message of an error, or "".
    """

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str], script: str) -> None:
        self.words, self.folder, self.environment, self.script = words, folder, environment, script
        self.stopped, self.error = False, ""
        self._launcher: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """Run the launcher, print its log until it ends, and return its exit code."""
        # Before the launcher starts: the container's first process loses signals that it does not handle.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._launcher = subprocess.Popen(
            self.words, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        for line in self._launcher.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("error: "):
                self.error = line.removeprefix("error: ").strip()
        return self._launcher.wait()

    @property
    def has_saved(self) -> bool:
        """Return whether the training ended because it was asked to, without an error."""
        return self.stopped and not self.error

    def stop(self) -> None:
        """Ask the training to save a checkpoint and end, unless the training has ended already."""
        if self._launcher is None or self._launcher.poll() is None:
            self.stopped = True
            threading.Thread(target=self._pass_on, daemon=True).start()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop()

    def _pass_on(self) -> None:
        """Send SIGTERM directly to the training's processes. If the launcher has started none yet, wait for them.

        The launcher would kill the training's processes after 30 s, but saving a checkpoint may take longer.
        """
        while self._launcher is None or self._launcher.poll() is None:
            if self._launcher and self._signal_workers(self._launcher.pid):
                return
            time.sleep(WORKER_POLL_S)

    def _signal_workers(self, launcher: int) -> int:
        """Send SIGTERM to the training's processes below the launcher, and return their number."""
        count = 0
        with suppress(psutil.Error):  # a process may end meanwhile, which must not end this one
            for worker in psutil.Process(launcher).children(recursive=True):
                with suppress(psutil.Error):
                    if any(word.endswith(self.script) for word in worker.cmdline()):
                        worker.send_signal(signal.SIGTERM)
                        count += 1
        return count
