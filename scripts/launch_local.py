"""accelerate's launcher, which ends as the training that it started: with its exit code, and without a traceback of its own.

python scripts/launch_local.py --config_file accelerate_configs/cpu.yaml scripts/train_unet.py …

On Ctrl-C it waits until the training has saved a checkpoint; `accelerate launch` itself ends at once.
"""

import signal
import subprocess
import sys
from typing import Any

import psutil

EXIT_STOPPED = 75  # as in t2i.training.stopping, which this file, started by its path, does not import


def main() -> None:
    sys.path.pop(0)  # this file's folder, whose modules have common names
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = launch_command_parser().parse_args()
    options.quiet = False  # quiet, it would hide the exit code
    signal.signal(signal.SIGINT, pass_on)
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode if error.returncode > 0 else 128 - error.returncode) from None
    except Exception as error:
        # torch's launcher for several processes raises it once it has passed a signal on.
        if type(error).__name__ != "SignalException":
            raise
        raise SystemExit(EXIT_STOPPED) from None


def pass_on(number: int, frame: Any) -> None:
    """Send a signal on to the training, unless a terminal has sent it to all."""
    if not sys.stdin.isatty():
        for process in psutil.Process().children():
            process.send_signal(number)


if __name__ == "__main__":
    main()
