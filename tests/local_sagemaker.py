"""Run SageMaker training on this one machine, by the very `CreateTrainingJob` request that the SDK sends.

    with aws() as cloud, Network() as network:
        ModelTrainer(..., role=cloud.role, sagemaker_session=Session(boto_session=cloud.session)).train(wait=False)
        with LocalJob(cloud.requests[-1], cloud.session.client("s3"), folder, network) as job:
            job.start()
            assert job.wait(timeout=60) == "Completed", job.logs()

Each host is a container made by util-linux's `unshare` and iproute2's `ip`. It has mounts, processes and a host name of its
own. Its entry point is PID 1, so signals behave as in docker. Its eth0 reaches only the other hosts and `network.address` on
this machine. The "image" is this machine's root folder with an empty home. Files that a container writes below /opt, /tmp and
the Python environment are its own and vanish with it.

Not covered: GPUs, inputs other than S3 prefixes copied to every host, output.tar.gz, time limits, VPCs, several instance
groups. It needs root on Linux. If the kernel gives namespaces to users, the whole command can run instead inside
`unshare --map-root-user --net --mount sh -c "ip link set lo up; …"`.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from unittest import mock

import psutil

SYNC_SECONDS = 1.0  # between two looks at the checkpoint folders
STOP_SECONDS = 5.0  # from SIGTERM to SIGKILL of the others when one host has failed
TOOLS = ("ip", "mount", "nsenter", "setpriv", "setsid", "unshare")

# PID 1 of a container until it becomes the entry point. Old /proc is there until the end: it leads to the network's namespace.
# Order matters where the job's folder is below /tmp: after /tmp is overlaid, it can only be reached as the working directory.
SETUP = r"""
set -eu
host=$1 address=$2 switch=/proc/$3/ns/net folder=$4 image=$5
shift 5
echo "$host" > /proc/sys/kernel/hostname
ip link set lo up
nsenter --net="$switch" ip link delete "$host" 2> /dev/null || true  # the kernel removes the last run's a moment late
ip link add eth0 type veth peer name "$host" netns "$switch"
nsenter --net="$switch" ip link set "$host" master bridge up
ip address add "$address/24" dev eth0
ip link set eth0 up
own() {  # what is written there stays in this container
    mkdir -p "$2/upper" "$2/work"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$1"
}
mount -t tmpfs tmpfs "$folder/layers"
cd "$folder/layers"
own /opt opt
mkdir -p /opt/ml /opt/home
mount --bind "$folder/ml" /opt/ml
mount --bind "$folder/home" /opt/home
mount --bind "$folder/hosts" /etc/hosts
own /tmp tmp
case "$image/" in /opt/* | /tmp/*) ;; *) own "$image" image ;; esac
mount -t tmpfs tmpfs /dev/shm
mount -t proc proc /proc
cd /
unset OLDPWD
exec setsid "$@"
"""


class Network:
    """The network of one job's hosts, 10.123.N.0/24: this machine is `address`, and the hosts are .11, .12, …

    It is a bridge in a network namespace that one process holds. So this machine's bridges, forwarding and firewall rules do
    not matter. Everything vanishes with that process, which dies with this one.
    """

    def __enter__(self) -> Self:
        script = "ip link add bridge type bridge && ip link set bridge up && echo ready && exec sleep infinity"
        self._switch = subprocess.Popen(
            [*dying_with_us(), "unshare", "--net", "sh", "-c", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self._interface = ""
        try:
            line = self._switch.stdout.readline().strip()  # type: ignore[union-attr]
            if line != "ready":
                raise OSError(line)
            self._interface = self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._interface:
            subprocess.run(["ip", "link", "delete", self._interface], check=False, capture_output=True)
        self._switch.kill()
        self._switch.communicate()

    @property
    def process(self) -> int:
        """Return the process that holds the bridge's namespace."""
        return self._switch.pid

    @property
    def address(self) -> str:
        """Return this machine's address for the hosts. They reach nothing else than servers on it (or on 0.0.0.0)."""
        return self.address_of(1)

    def address_of(self, number: int) -> str:
        return f"10.123.{self._number}.{number}"

    def _connect(self) -> str:
        """Join this machine to the bridge. The interface's name is unique, and so reserves its number."""
        for self._number in random.sample(range(1, 255), 254):
            name, subnet = f"t2i-sm{self._number}", f"10.123.{self._number}.0/24"
            if ip("-4", "route", "show", "table", "all", "root", subnet):
                continue
            try:
                ip("link", "add", name, "type", "veth", "peer", "name", "machine", "netns", str(self._switch.pid))
            except OSError as error:
                if "exists" in str(error):
                    continue
                raise
            self._interface = name
            inside = ("nsenter", f"--net=/proc/{self._switch.pid}/ns/net")
            run(*inside, "ip", "link", "set", "machine", "master", "bridge", "up")
            ip("address", "add", f"{self.address}/24", "dev", name)
            ip("link", "set", name, "up")
            return name
        raise OSError("no subnet of 10.123.0.0/16 is free")

    def container(self, number: int, host: str, folder: Path, image: Path, words: list[str]) -> list[str]:
        """Return the command that runs `words` as PID 1 of a container.

        Its `folder` holds ml/ and home/, which become /opt/ml and /opt/home, the file hosts, and an empty layers/.
        """
        unshare = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        own = [host, self.address_of(10 + number), str(self.process), str(folder), str(image)]
        return [*dying_with_us(), *unshare, "bash", "-c", SETUP, "container", *own, *words]


class LocalJob:
    """One training job. A second `start` after `interrupt` is SageMaker's restart of a spot job: new containers, the same S3.

    `exit_codes` holds the hosts' codes in the order of their ends, 137 for a killed one. The hosts' files are below
    `folder`/<host>/ml until the next start. Their output is in `folder`/<host>-<run>.log.
    """

    def __init__(
        self, request: dict[str, Any], s3: Any, folder: Path, network: Network, *,
        python_bin: Path | None = None, extra_env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.request, self.s3, self.folder, self.network = request, s3, folder.resolve(), network
        self.python_bin = python_bin or Path(sys.executable).parent
        self.name: str = request["TrainingJobName"]
        resources = request["ResourceConfig"]
        self.hosts = [f"algo-{number + 1}" for number in range(resources["InstanceCount"])]
        self.status, self.failure_reason, self.runs = "Starting", "", 0
        self.exit_codes: dict[str, int] = {}
        region = s3.meta.region_name
        # what docker and SageMaker set, and the two variables for a pip without a network
        self.environment = {
            "PATH": f"{self.python_bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/opt/home", "LANG": "C.UTF-8", "AWS_REGION": region, "TRAINING_JOB_NAME": self.name,
            "TRAINING_JOB_ARN": f"arn:aws:sagemaker:{region}:123456789012:training-job/{self.name}",
            "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        } | request.get("Environment", {}) | (extra_env or {})  # fmt: skip
        checkpoints = request.get("CheckpointConfig", {})
        self._remote = checkpoints.get("S3Uri", "").rstrip("/")
        self._local = Path(checkpoints.get("LocalPath", "/opt/ml/checkpoints")).relative_to("/opt/ml")
        self._synced: dict[Path, tuple[int, int]] = {}
        self._thread: threading.Thread | None = None
        self._grace: float | None = None
        self._closing = False
        self._error: BaseException | None = None
        self._containers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End all running containers at once, without a last sync."""
        self._closing = True
        if self._thread:
            self._thread.join()

    def start(self) -> None:
        """Start the containers of all hosts. The job then runs by itself; `wait` for it."""
        assert self._thread is None or not self._thread.is_alive(), "the job is running"
        self.status, self.failure_reason, self.exit_codes, self._grace = "InProgress", "", {}, None
        self.runs += 1
        self._synced.clear()
        for host in self.hosts:
            self._prepare(host)
        # A thread of its own for the whole run: the kernel kills the containers with the thread that started them.
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> str:
        """Wait for the end and return the status: "Completed", "Failed" or "Interrupted"."""
        assert self._thread, "start it first"
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.name} still runs after {timeout} s")
        if self._error:
            raise self._error
        return self.status

    def interrupt(self, grace: float = 120.0) -> str:
        """Interrupt as a spot instance is: SIGTERM for every host's PID 1, then SIGKILL after `grace` seconds."""
        self._grace = grace
        return self.wait(grace + 60)

    def trainings(self) -> list[psutil.Process]:
        """Return the processes that train: of each host's `accelerate launch`, those that run the script."""
        found = []
        for container in self._containers.values():
            for process in psutil.Process(container.pid).children(recursive=True):
                words = process.cmdline()
                script = any(Path(word).name.startswith("train_") for word in words)
                if script and "accelerate.commands.launch" not in words:
                    found.append(process)
        return found

    def logs(self) -> dict[str, str]:
        """Return standard output and error of each host in this run."""
        return {host: self._log(host).read_text(errors="replace") for host in self.hosts}

    def _log(self, host: str) -> Path:
        return self.folder / f"{host}-{self.runs}.log"

    def _prepare(self, host: str) -> None:
        """Make a new instance: /opt/ml as SageMaker fills it, with nothing of an earlier run but S3's content."""
        own = self.folder / host
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        self._log(host).touch()
        folders = ("home", "layers", "ml/input/config", "ml/input/data", "ml/model", "ml/output/data")
        for folder in (*folders, Path("ml", self._local)):
            (own / folder).mkdir(parents=True)
        addresses = [f"{self.network.address_of(11 + n)} {name}\n" for n, name in enumerate(self.hosts)]
        (own / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n" + "".join(addresses))
        kind, group = self.request["ResourceConfig"]["InstanceType"], "homogeneousCluster"
        channels = {channel["ChannelName"]: channel for channel in self.request.get("InputDataConfig", [])}
        files: dict[str, Any] = {
            "resourceconfig": {
                "current_host": host,
                "current_instance_type": kind,
                "current_group_name": group,
                "hosts": self.hosts,
                "instance_groups": [{"instance_group_name": group, "instance_type": kind, "hosts": self.hosts}],
                "network_interface_name": "eth0",
            },
            "hyperparameters": self.request.get("HyperParameters", {}),
            "inputdataconfig": {
                name: {
                    "TrainingInputMode": channel.get("InputMode", "File"),
                    "S3DistributionType": "FullyReplicated",
                    "RecordWrapperType": channel.get("RecordWrapperType", "None"),
                }
                for name, channel in channels.items()
            },
        }
        for name, content in files.items():
            (own / "ml" / "input" / "config" / f"{name}.json").write_text(json.dumps(content))
        for name, channel in channels.items():
            source = channel["DataSource"]["S3DataSource"]
            simple = source.get("S3DataDistributionType", "FullyReplicated") == "FullyReplicated"
            if source["S3DataType"] != "S3Prefix" or not simple:
                raise NotImplementedError(f"channel {name}: only S3Prefix, FullyReplicated")
            if not self._download(source["S3Uri"], own / "ml" / "input" / "data" / name):
                raise FileNotFoundError(f"channel {name}: there is nothing at {source['S3Uri']}")  # as SageMaker fails
        if self._remote:
            for file in self._download(self._remote + "/", own / "ml" / self._local):
                self._synced[file] = version(file)

    def _download(self, uri: str, folder: Path) -> list[Path]:
        """Download every object at a prefix as a file. The prefix may also be one object's whole name."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for key in (entry["Key"] for entry in page.get("Contents", []) if not entry["Key"].endswith("/")):
                name = Path(key).name if key == prefix else key.removeprefix(prefix)
                if key != prefix and not (prefix.endswith("/") or name.startswith("/")):
                    raise ValueError(f"{uri} is also the beginning of {key}: end it with a slash")
                file = folder / name.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self.s3.get_object(Bucket=bucket, Key=key)["Body"].read())
                files.append(file)
        return files

    def _run(self) -> None:
        containers = self._containers = {}
        try:
            for number, host in enumerate(self.hosts, 1):
                containers[host] = self._container(number, host)
            stopped = self._watch(containers)
            if not self._closing:
                self._sync()
                self._finish(stopped)
        except BaseException as error:
            self._error = error  # for `wait`
        finally:
            for container in containers.values():
                kill(container)

    def _container(self, number: int, host: str) -> subprocess.Popen[bytes]:
        algorithm = self.request["AlgorithmSpecification"]
        words = [*algorithm["ContainerEntrypoint"], *algorithm.get("ContainerArguments", [])]
        command = self.network.container(number, host, self.folder / host, self.python_bin.parent.resolve(), words)
        with open(self._log(host), "wb") as log:
            return subprocess.Popen(
                command,
                cwd="/",
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _watch(self, containers: dict[str, subprocess.Popen[bytes]]) -> bool:
        """Watch until every host has ended: sync, and stop all after a failure or `interrupt`. Return whether interrupted."""
        kill_at = next_sync = float("inf")
        if self._remote:
            next_sync = time.monotonic() + SYNC_SECONDS
        interrupted = False
        while not self._closing:
            for host, container in containers.items():
                if host not in self.exit_codes and container.poll() is not None:
                    self.exit_codes[host] = container.returncode
            if len(self.exit_codes) == len(containers):
                break
            failed = any(self.exit_codes.values())
            if (failed or self._grace is not None) and kill_at == float("inf"):
                interrupted = self._grace is not None and not failed
                kill_at = time.monotonic() + (STOP_SECONDS if self._grace is None else self._grace)
                for container in containers.values():
                    for process in processes_of(container):
                        process.terminate()
            if time.monotonic() >= kill_at:
                for host, container in containers.items():
                    if host not in self.exit_codes:
                        kill(container)
                        self.exit_codes[host] = 137  # docker's; `unshare` says 1 of a process that was killed
            if time.monotonic() >= next_sync:
                self._sync()
                next_sync = time.monotonic() + SYNC_SECONDS
            time.sleep(0.02)
        return interrupted

    def _sync(self) -> None:
        """Upload changed files of the checkpoint folders to S3: whole, in random order, all hosts to one place."""
        if not self._remote:
            return
        bucket, _, prefix = self._remote.removeprefix("s3://").partition("/")
        found = []
        for host in self.hosts:
            top = self.folder / host / "ml" / self._local
            found += [(top, Path(folder, name)) for folder, _, names in os.walk(top) for name in names]
        random.shuffle(found)
        for top, file in found:
            with contextlib.suppress(FileNotFoundError):  # moved on meanwhile
                now = version(file)
                if file.is_file() and self._synced.get(file) != now:
                    key = f"{prefix}/{file.relative_to(top)}".lstrip("/")
                    self.s3.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
                    self._synced[file] = now

    def _finish(self, interrupted: bool) -> None:
        """Finish the job: a completed one's model goes to S3, and a failed one's reason comes from its host's file."""
        if interrupted:
            self.status = "Interrupted"
        elif any(self.exit_codes.values()):
            written = [self.folder / host / "ml/output/failure" for host, code in self.exit_codes.items() if code]
            written = sorted((file for file in written if file.is_file()), key=lambda file: file.stat().st_mtime_ns)
            host, code = next((host, code) for host, code in self.exit_codes.items() if code)
            reason = written[0].read_text(errors="replace") if written else f"{host} ended with exit code {code}"
            self.status, self.failure_reason = "Failed", reason[:1024]
        else:
            archive = self.folder / "model.tar.gz"
            with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                seen: set[str] = set()
                for top in (self.folder / host / "ml/model" for host in self.hosts):
                    for file in sorted(top.rglob("*")):
                        name = str(file.relative_to(top))
                        if name not in seen:
                            tar.add(file, name, recursive=False)
                        seen.add(name)
            bucket, _, prefix = self.request["OutputDataConfig"]["S3OutputPath"].removeprefix("s3://").partition("/")
            key = "/".join(filter(None, (prefix.rstrip("/"), self.name, "output", archive.name)))
            self.s3.put_object(Bucket=bucket, Key=key, Body=archive.read_bytes())
            self.status = "Completed"


def version(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_mtime_ns, state.st_size


def processes_of(container: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return PID 1 of a running container: the one child of its `unshare`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(container.pid).children() if container.poll() is None else []
    return []


def kill(container: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to PID 1. The kernel ends all others of the container before it reports PID 1's end."""
    while container.poll() is None:
        for process in processes_of(container) or [container]:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            container.wait(0.2)


def dying_with_us() -> list[str]:
    """Return the words before a command that the kernel is to kill when its starting thread ends, in whatever way."""
    return ["setpriv", "--pdeathsig", "KILL"]


def run(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def ip(*words: str) -> str:
    return run("ip", *words)


def why_not() -> str | None:
    """Return in one sentence why this machine cannot run such containers; None if it can."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} missing: install iproute2 and util-linux (Linux only)"
    try:
        with Network() as network, TemporaryDirectory() as name:
            for folder in ("ml", "home", "layers"):
                Path(name, folder).mkdir()
            Path(name, "hosts").touch()
            run(*network.container(1, "algo-1", Path(name), Path(sys.prefix).resolve(), ["true"]))
    except OSError as error:
        return f"containers cannot be made here without root's rights: {str(error).splitlines()[-1]}"
    return None


def need_containers() -> None:
    """Skip the test if containers are impossible; fail it under T2I_REQUIRE_NAMESPACES=1, which CI sets."""
    import pytest

    reason = why_not()
    if reason and os.environ.get("T2I_REQUIRE_NAMESPACES") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def fresh_image(folder: Path, requirements: Path, torch: str) -> tuple[Path, dict[str, str]]:
    """Make an image with only torch, and fetch the job's packages for the offline install in its containers.

    Returns `python_bin` and the variables for `extra_env`. Packages installed in a container vanish with it.
    """
    run(sys.executable, "-m", "venv", str(folder / "image"))
    pip = (str(folder / "image" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", f"torch=={torch}")
    report = folder / "report.json"
    run(*pip, "install", "--dry-run", "--report", str(report), "--requirement", str(requirements))
    chosen = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    # setuptools and wheel build, in the container, what comes as source
    pins = [f"{package['name']}=={package['version']}" for package in chosen] + ["setuptools", "wheel"]
    run(*pip, "download", "--no-deps", "--dest", str(folder / "wheels"), *pins)
    return folder / "image" / "bin", {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels")}


@dataclass
class Cloud:
    """The AWS that `aws` makes: a session, a role that may do everything, and the requested training jobs."""

    session: Any
    role: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def aws(region: str = "us-east-1") -> Iterator[Cloud]:
    """Give AWS within this process, by moto: S3, IAM, STS and a SageMaker that records training jobs and starts none."""
    import boto3
    from moto import mock_aws
    from moto.core.responses import ActionResult, EmptyResult
    from moto.iam.responses import IamResponse
    from moto.sagemaker.responses import SageMakerResponse

    def allow(response: Any) -> ActionResult:  # the SDK asks whether the role suffices; moto does not know the question
        actions = response._get_param("ActionNames", [])
        decisions = [{"EvalActionName": action, "EvalDecision": "allowed"} for action in actions]
        return ActionResult({"EvaluationResults": decisions, "IsTruncated": False})

    create = SageMakerResponse.create_training_job

    def take_down(response: Any) -> ActionResult:
        cloud.requests.append(json.loads(response.body))
        return create(response)

    def stop(response: Any) -> EmptyResult:  # moto cannot stop training jobs
        name = response._get_param("TrainingJobName")
        response.sagemaker_backend.describe_training_job(name)  # raises moto's error for an unknown job
        response.sagemaker_backend.training_jobs[name].training_job_status = "Stopping"
        return EmptyResult()

    settings = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": region}  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, settings))
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL"):
            os.environ.pop(name, None)
        stack.enter_context(mock_aws())
        stack.enter_context(mock.patch.object(IamResponse, "simulate_principal_policy", allow, create=True))
        stack.enter_context(mock.patch.object(SageMakerResponse, "create_training_job", take_down))
        stack.enter_context(mock.patch.object(SageMakerResponse, "stop_training_job", stop, create=True))
        telemetry = "sagemaker.core.telemetry.telemetry_logging._send_telemetry_request"  # moto would not stop it
        stack.enter_context(mock.patch(telemetry))
        session = boto3.Session(region_name=region)
        trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        role = session.client("iam").create_role(RoleName="sagemaker", AssumeRolePolicyDocument=policy)["Role"]["Arn"]
        cloud = Cloud(session, role)
        yield cloud
