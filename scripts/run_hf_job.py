"""Run the staged training script in a container of Hugging Face Jobs, and keep its run in a private repository.

exec python3 code/scripts/run_hf_job.py        (the command of launch_hf_job.py's jobs; users never type it)

This script reads job.json beside scripts/, resumes the run of an earlier job, and runs `accelerate launch` with the staged YAML.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from t2i.clouds.container import LOGGED, Training
from t2i.clouds.mirror import Mirror
from t2i.errors import UserError
from t2i.redaction import redact
from t2i.training.stopping import EXIT_STOPPED

CODE = Path(__file__).parents[1]
WORK = CODE.parent
DEADLINE_S = 900.0  # the last push is retried so long, if the timeout leaves so much time


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not (CODE / "job.json").is_file():
        print(
            "error: this script runs in a container of Hugging Face Jobs; submit a job with scripts/launch_hf_job.py",
            file=sys.stderr,
        )
        return 2
    start = time.monotonic() - float(os.environ.get("T2I_SECONDS", "0"))
    job = json.loads((CODE / "job.json").read_text(encoding="utf-8"))
    mirror = Mirror(WORK, job["repository"], say)
    try:
        download(mirror, job)
    except (OSError, RuntimeError, ValueError) as error:  # all that huggingface_hub raises
        say(
            f"error: the run or its inputs cannot be downloaded ({redact(' '.join(str(error).split()))}); submit the job again"
        )
        return 1
    words = launch_words(job, count_gpus())
    say(" ".join(words[2:]))
    training = Training(words, CODE, make_environment(), job["script"])
    timer = threading.Timer(
        max(1.0, job["save_after"] - (time.monotonic() - start)), end_before_timeout, (training, job)
    )
    timer.daemon = True
    timer.start()
    mirror.start()
    code = training.run()
    timer.cancel()
    left = job["timeout"] - (time.monotonic() - start)
    return finish(training, mirror, code, min(DEADLINE_S, max(30.0, left)))


def download(mirror: Mirror, job: dict[str, Any]) -> None:
    """Download the run of an earlier job, and the inputs of this job."""
    if restored := mirror.restore():
        say(f"the run of an earlier job is here, at {restored}")
    for name, repo_id in job["inputs"].items():
        snapshot_download(repo_id, repo_type="dataset", local_dir=WORK / "inputs" / name)


def launch_words(job: dict[str, Any], gpus: int) -> list[str]:
    """Return the `accelerate launch` command of the training. No shell reads it, so arguments arrive as typed."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CODE / "accelerate.yaml"),
             "--num_processes", str(max(1, gpus))]  # fmt: skip
    if job["mixed_precision"]:
        words += ["--mixed_precision", job["mixed_precision"]]
    return [*words, str(CODE / "scripts" / job["script"]), *job["arguments"]]


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs of this machine, by their device files, as torch is slow to import."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def make_environment() -> dict[str, str]:
    """Return the environment variables of the training. Without an MLflow server, records go to the run's folder."""
    variables = os.environ | LOGGED
    variables.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{WORK / 'mlflow.db'}")
    return variables


def end_before_timeout(training: Training, job: dict[str, Any]) -> None:
    """Let the training save a checkpoint and end, since the Hub is about to end the job."""
    say(f"the job's timeout of {job['timeout']} s is near: the training saves a checkpoint and ends")
    training.stop()


def finish(training: Training, mirror: Mirror, code: int, deadline: float) -> int:
    """Send the run to its repository for the last time, say how the job ended, and return the container's exit code."""
    try:
        mirror.end(deadline)
    except (UserError, OSError) as error:
        say(f"error: the run is not in {mirror.repo_id}: {error}")
        return 1
    if training.has_saved and code:
        newest = mirror.resumes_from()
        at = (
            f"at {newest}, which is in {mirror.repo_id}; the same command resumes"
            if newest
            else "before the first checkpoint; the same command starts anew"
        )
        say(f"stopped {at}")
        return EXIT_STOPPED
    if code:
        say(f"error: {training.error or f'the training ended with code {code}; its log gives the reason'}")
        return 1
    say(f"finished; the run is in {mirror.repo_id}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
