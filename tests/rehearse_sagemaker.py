"""Rehearse a SageMaker job without AWS, from `launch_sagemaker.py` to a picture: moto takes it, two hosts here run it.

python tests/rehearse_sagemaker.py [--fresh] [--keep folder]        (make sagemaker-rehearse, FRESH=1)

tests/local_sagemaker.py runs the very CreateTrainingJob request and the very S3 objects of the submission. Two containers have
namespaces of their own. Their first process is the SDK's entry point, which includes its install step. They train the demo
recipe for some steps under ZeRO-2. They are interrupted as spot machines are, by SIGTERM and 120 s later SIGKILL, and resume
from S3. `--fetch` brings the model home, and generate_images.py draws from it. With --fresh, their Python has only torch before
the install step. The rehearsal needs root on Linux. It needs no network, except for the packages of --fresh.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]

import launch_sagemaker  # noqa: E402
from local_sagemaker import LocalJob, Network, aws, fresh_image, why_not  # noqa: E402
from t2i.config import load_recipe  # noqa: E402

ODD = '00\'42 a=b "c"'  # a run's name that no shell, no JSON and no launcher may change
YAML = """\
compute_environment: AMAZON_SAGEMAKER
distributed_type: 'NO'
ec2_instance_type: ml.g4dn.xlarge
num_machines: 2
mixed_precision: 'no'   # these hosts have no GPU
iam_role_name: sagemaker
region: us-east-1
base_job_name: rehearsal
sagemaker_metrics_file: {metrics}
additional_args: {{use_spot_instances: true, max_run: 3600, max_wait: 7200}}
"""
SECRET = "canary-of-the-rehearsal"


def rehearse(
    folder: Path,
    arguments: list[str],
    stop_at: int,
    steps: int,
    fresh: bool = False,
    run_script: Callable[..., Any] | None = None,
) -> list[str]:
    """Rehearse everything in `folder` and return the transcript.

    Args:
        arguments: those of train_unet.py, with data set and VAE.
        stop_at: the step whose checkpoint the interruption waits for.
        steps: length of the training.
        fresh: whether the containers' Python has only torch at first.
        run_script: runs a script of this suite on this machine, by its name, arguments and `cwd`. None: Python does.
    """
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    (folder / "sagemaker.yaml").write_text(YAML.format(metrics=ROOT / "accelerate_configs/sagemaker_metrics.tsv"))
    launcher = ["--config_file", str(folder / "sagemaker.yaml")]
    words = [*arguments, "--run_name", ODD, "--report_to", "none", "--max_train_steps", str(steps)]
    python_bin, extra = None, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if fresh:
        start = time.monotonic()
        python_bin, offline = fresh_image(folder, ROOT / "scripts/requirements.txt", "2.13.0")
        extra |= offline
        say(
            f"a Python that has only torch, and the wheels of scripts/requirements.txt: {time.monotonic() - start:.0f} s"
        )
    with aws() as cloud, Network() as network, mock.patch.dict(os.environ, {"MLFLOW_TRACKING_PASSWORD": SECRET}):
        told = launch([*launcher, "--yes", str(ROOT / "scripts/train_unet.py"), *words])
        request = cloud.requests[-1]
        say(f"submitted {request['TrainingJobName']}: {request['ResourceConfig']['InstanceCount']} machines")
        s3 = cloud.session.client("s3")
        assert SECRET not in told + json.dumps(request), "the credential is in the request or on the terminal"
        environment = {key: value for key, value in request["Environment"].items() if key != "T2I_SECRETS"}
        request = request | {"Environment": environment}  # Secrets Manager is not reachable from these hosts
        with LocalJob(request, s3, folder / "hosts", network, python_bin=python_bin, extra_env=extra) as job:
            job.start()
            timeout = 900  # on a busy machine; the rehearsal itself takes a minute or two
            with halted_at_checkpoint(job, stop_at, timeout):
                wait_for_checkpoint(job, s3, request, stop_at, timeout)
                say(f"step {stop_at}: the checkpoints of both hosts are in S3")
                assert job.interrupt(grace=120.0) == "Interrupted", told_by(job)
            say(f"interrupted as a spot job is: SIGTERM, {job.exit_codes}")
            assert set(job.exit_codes.values()) == {75}, told_by(job)
            first = job.logs()
            say(quote(first["algo-1"], r"^machine 1 of 2: .{60}"))
            say(quote(first["algo-1"], r"^\d+ steps of .*ZeRO stage 2"))
            job.start()
            assert job.wait(timeout=timeout) == "Completed", told_by(job)
            say(quote(job.logs()["algo-1"], r"^resuming from .*checkpoint-\d+.*"))
            say(quote(job.logs()["algo-1"], r"^pipeline left in /opt/ml/model"))
            assert SECRET not in "".join([*first.values(), *job.logs().values()]), "the credential is in a log"
        finish_in_moto(request)
        home = folder / "home" / request["TrainingJobName"]
        told = launch([*launcher, "--fetch", request["TrainingJobName"], "--output_dir", str(home)])
        say(f"fetched: {told.strip().splitlines()[-1].replace(str(folder), '…')}")
    state = json.loads((home / "run.json").read_text())
    assert (state["processes"], state["zero_stage"], state["steps"]) == (2, 2, steps), state
    assert load_recipe(str(home / "config.yaml")).train_unet.run_name == ODD
    say(f"one training of {state['processes']} processes, ZeRO stage {state['zero_stage']}, {state['steps']} steps")
    draw = ("generate_images.py", "--model", str(home), "--prompt", "a red flower", "--num_inference_steps", "4",
            "--output_dir", str(folder / "pictures"))  # fmt: skip
    done = (run_script or run_python)(*draw, cwd=folder)
    pictures = sorted((folder / "pictures").glob("*.png"))
    assert pictures, done.stdout
    say(f"a picture of the fetched model: {pictures[0].name}")
    return lines


def launch(words: list[str]) -> str:
    """Run launch_sagemaker.py's main in this process, where moto is. Return its output."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", ["launch_sagemaker.py", *words]), contextlib.redirect_stdout(out):
        launch_sagemaker.main()
    return out.getvalue()


@contextlib.contextmanager
def halted_at_checkpoint(job: LocalJob, step: int, timeout: float) -> Iterator[None]:
    """Halt the training of every host once all have written a checkpoint, until each is told to stop.

    So the training cannot come to its end before it is interrupted, however slow or fast the machine is.
    """
    wanted = [
        job.folder
        / host
        / "ml/checkpoints/run"
        / (f"node-{number}" if number else "")
        / f"checkpoint-{step:06d}/manifest.json"
        for number, host in enumerate(job.hosts)
    ]
    end = time.monotonic() + timeout
    while not all(file.is_file() for file in wanted):
        assert time.monotonic() < end, f"no checkpoint of step {step} ({job.status})\n{told_by(job)}"
        assert job.status == "InProgress", told_by(job)
        time.sleep(0.002)
    trainings = job.trainings()
    for training in trainings:
        training.suspend()
    assert len(trainings) == len(job.hosts), trainings

    def go_on() -> None:
        for training in trainings:
            while not is_pending(training, signal.SIGTERM) and time.monotonic() < end + timeout:
                time.sleep(0.01)
        for training in trainings:
            training.resume()

    waiting = threading.Thread(target=go_on, daemon=True)
    waiting.start()
    yield
    waiting.join()


def is_pending(process: psutil.Process, number: int) -> bool:
    """Return whether a halted process has been sent a signal, or has ended."""
    with contextlib.suppress(OSError):
        fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        return bool((int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)) >> (number - 1) & 1)
    return True


def run_python(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of this suite as users do."""
    words = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


def wait_for_checkpoint(job: LocalJob, s3, request: dict, step: int, timeout: float) -> None:
    """Wait until both hosts' parts of a checkpoint are in S3."""
    bucket, _, prefix = request["CheckpointConfig"]["S3Uri"].removeprefix("s3://").partition("/")
    wanted = {f"{prefix}/run/{part}checkpoint-{step:06d}/manifest.json" for part in ("", "node-1/")}
    end = time.monotonic() + timeout
    while time.monotonic() < end and job.status == "InProgress":
        there = {item["Key"] for item in s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])}
        if wanted <= there:
            return
        time.sleep(0.2)
    raise AssertionError(f"no checkpoint of step {step} ({job.status})\n{told_by(job)}")


def told_by(job: LocalJob) -> str:
    """Return the ends of the hosts' logs."""
    return "\n".join(f"--- {host} {job.exit_codes.get(host)}\n{text[-6000:]}" for host, text in job.logs().items())


def quote(text: str, pattern: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern} is not in the log:\n{text[-6000:]}"
    return "  algo-1: " + found[0]


def finish_in_moto(request: dict) -> None:
    """Tell moto that the job has completed and where its model is, since moto starts no job."""
    from moto.sagemaker.models import sagemaker_backends

    job = sagemaker_backends["123456789012"]["us-east-1"].training_jobs[request["TrainingJobName"]]
    job.training_job_status = "Completed"
    model = f"{request['OutputDataConfig']['S3OutputPath']}/{request['TrainingJobName']}/output/model.tar.gz"
    job.model_artifacts = {"S3ModelArtifacts": model}


def make_inputs(folder: Path) -> list[str]:
    """Draw a small data set and train the demo's VAE for some steps. Return train_unet.py's arguments that name them."""
    common = {"cwd": folder, "check": True, "env": os.environ | {"HF_HUB_OFFLINE": "1"}}
    python = [sys.executable]
    subprocess.run([*python, str(ROOT / "scripts/make_flowers.py"), "--output_dir", "dataset", "--count", "320",
                    "--validation_count", "32", "--test_count", "8", "--size", "64"], **common)  # fmt: skip
    subprocess.run([*python, str(ROOT / "scripts/train_vae.py"), "--config", "demo", "--dataset", "dataset", "--output_dir", "vae",
                    "--max_train_steps", "40", "--report_to", "none"], **common)  # fmt: skip
    return ["--config", "demo", "--dataset", str(folder / "dataset"), "--vae", str(folder / "vae")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="the hosts' Python has only torch before the install step")
    parser.add_argument("--keep", type=Path, help="folder for everything, kept afterwards")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        raise SystemExit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = make_inputs(folder)
        rehearse(folder, [*arguments, "--checkpointing_steps", "10", "--validation_steps", "10"], 10, 30, options.fresh)


if __name__ == "__main__":
    main()
