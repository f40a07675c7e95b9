"""Run the staged training script in a SageMaker container, as this machine's part of the job's training.

exec python3 scripts/run_sagemaker_job.py        (the command of launch_sagemaker.py's jobs; users never type it)

This script reads job.json beside scripts/ and SageMaker's resourceconfig.json, and runs `accelerate launch` with the staged YAML.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from t2i.clouds import launch, sagemaker_job
from t2i.clouds.aws_errors import brief
from t2i.clouds.container import LOGGED, Training
from t2i.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = Path("/opt/ml/input/config/resourceconfig.json")
MODEL = Path("/opt/ml/model")
FAILURE = Path("/opt/ml/output/failure")
RUN = Path(sagemaker_job.RUN)
PORT = "7777"  # unused in AWS's images
HOSTS_WAIT_S = 300.0  # for the other machines' names


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not (ROOT / "job.json").is_file() or not CONFIG.is_file():
        print(
            "error: this script runs in a SageMaker container; submit a job with scripts/launch_sagemaker.py",
            file=sys.stderr,
        )
        return 2
    job = json.loads((ROOT / "job.json").read_text(encoding="utf-8"))
    resources = json.loads(CONFIG.read_text(encoding="utf-8"))
    hosts = sorted(resources["hosts"])
    if len(hosts) != job["machines"]:
        return fail(
            f"the job asked for {job['machines']} machines and has {len(hosts)}: {', '.join(hosts)}; submit it again"
        )
    rank = hosts.index(resources["current_host"])
    for host in hosts:
        if not wait_for_name(host):
            return fail(f"the machine {host} has no address after {HOSTS_WAIT_S:.0f} s; submit the job again")
    processes = len(hosts) * max(1, int(os.environ.get("SM_NUM_GPUS", "0")))
    try:
        environment = make_environment(resources["network_interface_name"], processes)
    except UserError as error:
        return fail(str(error))
    words = launch_words(job, hosts, rank, processes)
    print(f"machine {rank + 1} of {len(hosts)}: {' '.join(words[2:])}", flush=True)
    return run(words, environment, job["script"], first=rank == 0)


def launch_words(job: dict[str, Any], hosts: list[str], rank: int, processes: int) -> list[str]:
    """Return the `accelerate launch` command of this machine of the job.

    No shell reads the command, so arguments arrive as typed.
    """
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate.yaml"),
             "--num_machines", str(len(hosts)), "--machine_rank", str(rank), "--num_processes", str(processes),
             "--main_process_ip", hosts[0], "--main_process_port", PORT]  # fmt: skip
    if job["zero"] and len(hosts) > 1:
        words += ["--deepspeed_multinode_launcher", "standard"]  # the default, pdsh, logs in to the other machine
    if job["mixed_precision"]:
        words += ["--mixed_precision", job["mixed_precision"]]
    return [*words, str(ROOT / "scripts" / job["script"]), *job["arguments"]]


def make_environment(interface: str, processes: int) -> dict[str, str]:
    """Return the environment variables of the training: SageMaker's network, the world size, and the secret's credentials.

    Raises:
        UserError: the job's role may not read the secret, or the secret holds no JSON object.
    """
    variables = os.environ | {
        "NCCL_SOCKET_IFNAME": interface,
        "GLOO_SOCKET_IFNAME": interface,
        "T2I_WORLD_SIZE": str(processes),
        **LOGGED,
    }
    variables.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{RUN.parent / 'mlflow.db'}")
    if name := os.environ.get(sagemaker_job.SECRETS):
        import boto3  # only AWS's images have it and botocore
        from botocore.exceptions import BotoCoreError, ClientError

        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        try:
            answer = boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=name)
            secrets = dict(json.loads(answer["SecretString"]))
        except (BotoCoreError, ClientError) as error:
            raise UserError(
                f"the secret {name} cannot be read ({brief(error)}); allow the role secretsmanager:GetSecretValue, or submit again "
                f"without a secret: remove {sagemaker_job.SECRETS} from the YAML, and unset {', '.join(launch.SECRET_NAMES)}"
            ) from None
        except (KeyError, ValueError, TypeError):
            raise UserError(
                f'the secret {name} holds no JSON object; write it as {{"HF_TOKEN": "…"}}, and submit the job again'
            ) from None
        variables |= {key: str(value) for key, value in secrets.items()}
        print(f"{', '.join(secrets)} from the secret {name}", flush=True)
    return variables


def wait_for_name(host: str) -> bool:
    """Wait until a machine's name has an address, since containers start at different moments.

    Return whether the machine's name now has an address.
    """
    end = time.monotonic() + HOSTS_WAIT_S
    while time.monotonic() < end:
        try:
            socket.gethostbyname(host)
            return True
        except OSError:
            time.sleep(1.0)
    return False


def run(words: list[str], environment: dict[str, str], script: str, first: bool) -> int:
    """Run the training, and copy the model to the folder that SageMaker uploads. Return the container's exit code."""
    training = Training(words, ROOT, environment, script)
    code = training.run()
    if first and (code == 0 or is_finished()):  # also if the push of a finished run failed
        leave_model()
    if training.has_saved and code:
        print(
            "interrupted: the checkpoint is saved; SageMaker resumes from it, or a new job with its checkpoint_s3_uri",
            flush=True,
        )
        return 75
    if code:
        return fail(training.error or f"the training ended with code {code}; its log gives the reason")
    return 0


def is_finished() -> bool:
    """Return whether the run's own state says that its training came to its end."""
    file = RUN / "run.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("status") == "finished"


def leave_model() -> None:
    """Copy only the final pipeline or VAE to the folder that becomes model.tar.gz."""
    for name in ("pipeline", "vae"):
        if (RUN / name).is_dir():
            shutil.copytree(RUN / name, MODEL / name, dirs_exist_ok=True)
            print(f"{name} left in {MODEL}", flush=True)


def fail(reason: str) -> int:
    """Write the reason of a failure to the file that SageMaker's console shows, and return exit code 1."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    FAILURE.parent.mkdir(parents=True, exist_ok=True)
    FAILURE.write_text(reason[:1024], encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main())
