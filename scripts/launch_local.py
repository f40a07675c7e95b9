"""Run accelerate's launcher, and end with the training's own exit code, without a second traceback.

python scripts/launch_local.py --config_file accelerate_configs/cpu.yaml scripts/train_unet.py …

On Ctrl-C or SIGTERM this launcher waits until the training has saved a checkpoint. `accelerate launch` itself would end at
once.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from t2i.errors import UserError, run_main
from t2i.launch_config import check_launch_config
from t2i.training.stopping import EXIT_STOPPED

SAVE_S = 600  # Longest wait for processes that save after a signal. torch's launcher would kill them after 30 s.


def main() -> None:
    # accelerate is imported after this file's folder has left the path, as modules there have common names.
    sys.path.pop(0)
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = launch_command_parser().parse_args()
    if options.config_file:
        check_launch_config(Path(options.config_file), "--config_file")
        try:
            load_config_from_file(options.config_file)
        except ValueError as error:
            raise UserError(f"--config_file {options.config_file}: {error}") from None
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_S))
    options.quiet = False  # --quiet would hide the exit code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode if error.returncode > 0 else 128 - error.returncode) from None
    except Exception as error:
        # torch's launcher of several processes raises it after it has passed a signal on.
        if type(error).__name__ != "SignalException":
            raise
        raise SystemExit(EXIT_STOPPED) from None


def pass_on(number: int, frame: Any) -> None:
    """Forward a signal to the training, unless it is a Ctrl-C that the terminal has already sent to all processes."""
    if number != signal.SIGINT or not (os.name == "nt" or sys.stdin.isatty()):  # Windows sends it to all as well.
        for process in psutil.Process().children():
            process.send_signal(number)


if __name__ == "__main__":
    run_main(main)
