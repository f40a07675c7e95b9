"""Run a command in the suite's container. SIGTERM reaches the training, which saves a checkpoint and ends with exit code 75.

python scripts/run_container.py accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train_unet.py --config demo

This is the entry point of the Dockerfile. `accelerate launch` as a container's first process would ignore SIGTERM.
"""

import argparse
import os
import sys
from pathlib import Path

from t2i.clouds.container import LOGGED, Training
from t2i.training.stopping import EXIT_STOPPED

LAUNCHERS = ("accelerate", "torchrun")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="command", help="command to run (default: show this help)"
    )
    words = parser.parse_args().command
    if not words:
        parser.print_help()
        return 0
    script = next((Path(word).name for word in words if word.endswith(".py")), "")
    try:
        if words[0] not in LAUNCHERS or not script:
            os.execvp(words[0], words)  # the command itself becomes the first process
        training = Training(words, Path.cwd(), os.environ | LOGGED, script)
        code = training.run()
    except OSError as error:
        print(
            f"error: {words[0]} cannot be run ({error.strerror}); give a command, such as accelerate launch …",
            file=sys.stderr,
        )
        return 127
    if training.has_saved and code:
        print("stopped: the checkpoint is saved, and the same command resumes from it", flush=True)
        return EXIT_STOPPED
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
