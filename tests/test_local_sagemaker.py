"""The stand-in for SageMaker: two hosts run the real SDK's submission, and see what SageMaker's hosts would see."""

import copy
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

import local_sagemaker
from local_sagemaker import LocalJob, Network, aws, need_containers, why_not

pytestmark = pytest.mark.usefixtures("containers", "nothing_left")

MARK = f"mark-{uuid.uuid4()}"  # in the environment of all processes of the containers

# what runs on the hosts: by $MODE, and it writes down what it sees as a checkpoint named after the host
JOB = """
import json, os, pathlib, shutil, signal, socket, subprocess, sys, time, urllib.error, urllib.request

mode, me, ml = os.environ["MODE"], os.environ["SM_CURRENT_HOST"], pathlib.Path("/opt/ml")
mine = ml / "checkpoints" / me
mine.mkdir(exist_ok=True)

def meet():
    if me == "algo-1":
        with socket.create_server((socket.gethostbyname(me), 7777)) as server:
            connection = server.accept()[0]
    else:
        for _ in range(200):
            try:
                connection = socket.create_connection(("algo-1", 7777))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    connection.sendall(socket.gethostname().encode())
    other = connection.recv(100).decode()
    try:
        outside = str(socket.create_connection(("192.0.2.77", 80), timeout=3))
    except OSError as error:
        outside = error.strerror
    pathlib.Path("/tmp/t2i-left-behind").touch()
    pathlib.Path(sys.prefix, "t2i-left-behind").touch()
    seen = {
        "name": socket.gethostname(), "other": other, "outside": outside, "pid": os.getpid(), "session": os.getsid(0),
        "first": pathlib.Path("/proc/1/cmdline").read_text().split("\\0")[:-1], "environment": dict(os.environ),
        "processes": sum(name.isdigit() for name in os.listdir("/proc")), "home": os.listdir(pathlib.Path.home()),
        "shared": os.listdir("/dev/shm"), "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "ml": sorted(str(path.relative_to(ml)) for path in ml.rglob("*") if "sm_drivers" not in path.parts),
        "config": {file.stem: json.loads(file.read_text()) for file in (ml / "input/config").iterdir()},
        "service": urllib.request.urlopen(os.environ["SERVICE"], timeout=5).read().decode(),
    }
    (mine / "seen.json").write_text(json.dumps(seen))
    (ml / "checkpoints" / "same").write_text(me)
    (ml / "model" / f"{me}.txt").write_text("model of " + me)
    (ml / "model" / "shared.txt").write_text("shared of " + me)

def train():
    file, left = mine / "step", ml / "checkpoints" / "left"
    first = int(file.read_text()) if file.exists() else 0
    (mine / f"started-at-{first}").write_text(f"{left.exists()} {os.listdir(ml / 'model')}")
    left.write_text("a checkpoint that is removed later")
    (ml / "model" / "unfinished").touch()
    if first:
        return
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    (mine / "ready").touch()
    for step in range(1, 10_000):
        time.sleep(0.05)
        file.write_text(str(step))
        if stop:
            left.unlink()
            (mine / "stopped").write_text(str(step))
            sys.exit(0)

def stubborn():
    signal.signal(signal.SIGTERM, lambda *_: (mine / "term").touch())
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (mine / "ready").touch()
    while True:
        time.sleep(1)

def fail():
    if me == "algo-2":
        (ml / "output" / "failure").write_text("x" * 2000)
        sys.exit(3)
    time.sleep(1000)

globals()[mode]()
"""


@pytest.fixture(scope="module")
def containers():
    need_containers()


@pytest.fixture
def nothing_left(containers, monkeypatch):
    """After each test the machine is as before it, as far as this test is concerned: interfaces, mounts, processes, files."""
    made = []

    def connect(network):
        made.append(connected(network))
        return made[-1]

    connected = Network._connect
    monkeypatch.setattr(Network, "_connect", connect)
    before = os.path.exists("/opt/ml"), Path("/proc/mounts").read_text()
    yield
    assert not set(made) & set(interfaces())
    assert (os.path.exists("/opt/ml"), Path("/proc/mounts").read_text()) == before
    assert not [child for child in psutil.Process().children(recursive=True) if child.name() in ("unshare", "sleep")]
    assert not [process.pid for process in psutil.process_iter() if MARK in environment_of(process)]
    assert not Path("/tmp/t2i-left-behind").exists()
    assert not Path(sys.prefix, "t2i-left-behind").exists()


def interfaces():
    return [name for _, name in socket.if_nameindex()]


def environment_of(process):
    try:
        return Path(f"/proc/{process.pid}/environ").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def cloud():
    with aws() as cloud:
        cloud.s3 = cloud.session.client("s3")
        cloud.s3.create_bucket(Bucket="mine")
        yield cloud


@pytest.fixture(scope="module")
def submit(cloud, tmp_path_factory, containers):
    """A function that has the real SDK ask for a job of job.py, with an installation or without; returns its request."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import CheckpointConfig, Compute, InputData, OutputDataConfig, SourceCode

    folder = tmp_path_factory.mktemp("source")
    (folder / "job.py").write_text(JOB)
    (folder / "requirements.txt").write_text(f"psutil=={version('psutil')}\n")
    cloud.s3.put_object(Bucket="mine", Key="data/train/one.txt", Body=b"1")
    cloud.s3.put_object(Bucket="mine", Key="data/train/deep/two.txt", Body=b"2")

    @functools.cache
    def submit(requirements):
        trainer = ModelTrainer(
            training_image="123456789012.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.13.0-gpu-py311",
            source_code=SourceCode(source_dir=str(folder), command="exec python3 job.py", requirements=requirements),
            compute=Compute(instance_type="ml.g4dn.xlarge", instance_count=2),
            output_data_config=OutputDataConfig(s3_output_path="s3://mine/outputs"),
            checkpoint_config=CheckpointConfig(s3_uri="s3://mine/checkpoints"),
            environment={"GREETING": "it's $HOME"},
            base_job_name="stand-in",
            role=cloud.role,
            sagemaker_session=Session(boto_session=cloud.session),
        )
        channel = InputData(channel_name="train", data_source="s3://mine/data/train")
        trainer.train(input_data_config=[channel], wait=False)
        return cloud.requests[-1]

    return submit


@pytest.fixture
def job(cloud, submit, tmp_path, request):
    """A function that makes the job of a mode, with checkpoints in a place of the test's own."""
    place = f"checkpoints/{request.node.name}"

    def make(mode, network, requirements=None):
        asked = copy.deepcopy(submit(requirements))
        asked["CheckpointConfig"]["S3Uri"] = f"s3://mine/{place}"
        made = LocalJob(asked, cloud.s3, tmp_path, network, extra_env={"MODE": mode, "MARK": MARK})
        made.place = f"{place}/"
        return made

    return make


def names(s3, prefix):
    found = s3.list_objects_v2(Bucket="mine", Prefix=prefix).get("Contents", [])
    return {entry["Key"].removeprefix(prefix) for entry in found}


def content(s3, key):
    return s3.get_object(Bucket="mine", Key=key)["Body"].read()


def remote(job):
    """The checkpoints in S3, of a job that rests: moto cannot hand out what is just being overwritten."""
    return {name: content(job.s3, job.place + name).decode() for name in names(job.s3, job.place)}


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


class Service(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].encode())

    def log_message(self, *_):
        pass


def test_what_the_hosts_see(job, cloud, monkeypatch):
    monkeypatch.setenv("CALLERS_SECRET", "leaked")
    with Network() as network, job("meet", network, "requirements.txt") as meeting:
        server = ThreadingHTTPServer((network.address, 0), Service)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        meeting.environment["SERVICE"] = f"http://{network.address}:{server.server_port}"
        meeting.start()
        status, logs = meeting.wait(60), meeting.logs()
        server.shutdown()
        server.server_close()
    assert status == "Completed", logs
    assert meeting.exit_codes == {"algo-1": 0, "algo-2": 0}
    assert "Requirement already satisfied: psutil" in logs["algo-1"]
    kept = remote(meeting)
    assert set(kept) == {"algo-1/seen.json", "algo-2/seen.json", "same"}
    assert kept["same"] in meeting.hosts  # whoever came last
    for number, (host, other) in enumerate([("algo-1", "algo-2"), ("algo-2", "algo-1")]):
        seen = json.loads(kept[f"{host}/seen.json"])
        assert (seen["name"], seen["other"], seen["outside"]) == (host, other, "Network is unreachable")
        assert seen["service"] == network.address_of(11 + number)
        # exec'ed all the way: Python is PID 1 of the container and gets its signals
        assert (seen["pid"], seen["session"], seen["processes"]) == (1, 1, 1)
        assert seen["first"] == ["python3", "job.py"]
        assert seen["home"] == seen["shared"] == []
        assert seen["interfaces"] == ["eth0", "lo"]
        environment = seen["environment"]
        assert "CALLERS_SECRET" not in environment
        assert environment["GREETING"] == "it's $HOME"
        assert environment["TRAINING_JOB_NAME"] == cloud.requests[-1]["TrainingJobName"]
        assert json.loads(environment["SM_HOSTS"]) == ["algo-1", "algo-2"]
        assert (environment["SM_CURRENT_HOST_RANK"], environment["SM_NUM_GPUS"]) == (str(number), "0")
        group = {"instance_group_name": "homogeneousCluster", "instance_type": "ml.g4dn.xlarge", "hosts": meeting.hosts}
        assert seen["config"]["resourceconfig"] == {
            "current_host": host, "current_instance_type": "ml.g4dn.xlarge", "current_group_name": "homogeneousCluster",
            "hosts": ["algo-1", "algo-2"], "instance_groups": [group], "network_interface_name": "eth0",
        }  # fmt: skip
        assert set(seen["config"]["inputdataconfig"]) == {"train", "code", "sm_drivers"}
        expected = {
            "input/data/train/one.txt",
            "input/data/train/deep/two.txt",
            "input/data/code/job.py",
            "output/data",
            "model",
        }
        assert expected < set(seen["ml"])
    archive = content(cloud.s3, f"outputs/{meeting.name}/output/model.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        model = {name: tar.extractfile(name).read().decode() for name in tar.getnames()}
    assert model == {"algo-1.txt": "model of algo-1", "algo-2.txt": "model of algo-2", "shared.txt": "shared of algo-1"}


def test_an_interruption_and_the_restart(job):
    with Network() as network, job("train", network) as training:
        training.start()
        wait_for(lambda: {"algo-1/step", "algo-2/step"} <= names(training.s3, training.place))  # synced while it runs
        began = time.monotonic()
        assert training.interrupt(grace=20) == "Interrupted", training.logs()
        assert time.monotonic() - began < 15  # it does not wait for the 20 s when all have ended
        assert training.exit_codes == {"algo-1": 0, "algo-2": 0}
        kept = remote(training)
        for host in training.hosts:
            assert kept[f"{host}/stopped"] == kept[f"{host}/step"]  # what SIGTERM's handler wrote was synced last
        assert "left" in kept  # removed on the hosts, not in S3
        training.start()
        assert training.wait(60) == "Completed", training.logs()
        for host in training.hosts:
            assert remote(training)[f"{host}/started-at-{kept[f'{host}/step']}"] == "True []"
        assert training.runs == 2


def test_one_that_does_not_stop_is_killed_with_its_children(job):
    with Network() as network, job("stubborn", network) as stubborn:
        stubborn.start()
        wait_for(lambda: {"algo-1/ready", "algo-2/ready"} <= names(stubborn.s3, stubborn.place))
        assert stubborn.interrupt(grace=1) == "Interrupted"
        assert set(stubborn.exit_codes.values()) == {137}
        assert {"algo-1/term", "algo-2/term"} <= names(stubborn.s3, stubborn.place)


def test_a_host_that_fails_ends_the_others(job, monkeypatch):
    monkeypatch.setattr(local_sagemaker, "STOP_SECONDS", 0.5)
    with Network() as network, job("fail", network) as failing:
        failing.start()
        assert failing.wait(60) == "Failed"
    # the other has no handler for SIGTERM, which does nothing to a PID 1 then
    assert list(failing.exit_codes.items()) == [("algo-2", 3), ("algo-1", 137)]
    assert failing.failure_reason == "x" * 1024


def test_leaving_early_leaves_nothing(job):
    def leave():
        with Network() as network, Network() as other, job("stubborn", network) as left:
            assert network.address != other.address
            left.start()
            wait_for(lambda: all(left.logs().values()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()


def test_a_killed_caller_leaves_nothing(tmp_path):
    code = f"""
import sys, pathlib, subprocess
sys.path.insert(0, {str(Path(__file__).parent)!r})
from local_sagemaker import Network
folder = pathlib.Path({str(tmp_path)!r})
for name in ("ml", "home", "layers"):
    (folder / name).mkdir()
(folder / "hosts").touch()
with Network() as network:
    command = network.container(1, "algo-1", folder, pathlib.Path(sys.prefix), ["sh", "-c", "echo up; sleep 1000"])
    print(network._interface, flush=True)
    subprocess.run(command, env={{"PATH": "/usr/sbin:/usr/bin:/bin", "MARK": {MARK!r}}})
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    interface = caller.stdout.readline().strip()
    assert caller.stdout.readline() == "up\n"
    assert interface in interfaces()
    below = psutil.Process(caller.pid).children(recursive=True)
    assert {"sleep", "unshare"} <= {process.name() for process in below}
    caller.send_signal(signal.SIGKILL)
    caller.communicate()
    _, alive = psutil.wait_procs(below, timeout=5)
    assert not alive
    wait_for(lambda: interface not in interfaces())


def test_an_ambiguous_prefix_and_an_empty_channel(job, cloud, tmp_path):
    cloud.s3.put_object(Bucket="mine", Key="data/training/other.txt", Body=b"3")
    with Network() as network:
        made = job("meet", network)
        with pytest.raises(ValueError, match=r"data/train is also the beginning of data/training/other.txt"):
            made._download("s3://mine/data/train", tmp_path / "a")
        assert [file.name for file in made._download("s3://mine/data/train/one.txt", tmp_path / "b")] == ["one.txt"]
        made.request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = "s3://mine/nothing"
        with pytest.raises(FileNotFoundError, match="there is nothing at s3://mine/nothing"):
            made.start()


def test_the_reason_for_not_running(monkeypatch):
    assert why_not() is None
    monkeypatch.setenv("PATH", "")
    assert why_not().endswith("missing: install iproute2 and util-linux (Linux only)")
