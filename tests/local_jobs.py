"""Hugging Face Jobs on 127.0.0.1: the loopback Hub with the routes of Jobs, which runs submitted commands on this machine.

    with JobsHub(folder) as hub:
        subprocess.run(launcher, env=os.environ | hub.environment())
        hub.jobs[-1].wait(60)

Routes and fields are those that huggingface_hub 2.4 sends and reads (hf_api.py, _jobs_api.py). A job's command runs with the
submitted environment and secrets, in mounts of its own: /tmp/t2i-job is a folder of that job alone. The "image" is this
machine, with this Python as python3. pip may not use an index, and looks only for the packages that are named.

Faults to order: `fault("402", method="POST", path="/api/jobs")` and every other status, as of any route;
`missing_images` holds images that cannot be pulled; `cut_logs` is how many log streams break after their first line;
`JobRun.preempt()` kills a job as a lost machine does, and `JobRun.time_out()` as its timeout does, which is kept by the clock as
well. `exchanges` holds method, path, headers and body of each request.
Not covered: volumes, ports, ssh, several machines, attempts after the first, prices that change.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from loopback_hub import Handler, LoopbackHub, Refusal

WORK = "/tmp/t2i-job"  # of t2i.clouds.hf_job
GRACE_S = 20.0  # from SIGTERM to SIGKILL of a cancelled job
ENDED = ("COMPLETED", "CANCELED", "ERROR")
# micro-dollars per minute
HARDWARE = {"cpu-basic": 167, "cpu-performance": 31667, "t4-small": 6667, "l4x1": 13333, "l4x4": 63333, "a10g-small": 16667,
            "a100-large": 41667, "h200": 83333}  # fmt: skip
JOB_ROUTES = [
    ("GET", r"/api/jobs/hardware", "hardware"),
    ("GET", r"/api/jobs/(?P<namespace>[^/]+)", "list_jobs"),
    ("POST", r"/api/jobs/(?P<namespace>[^/]+)", "run_job"),
    ("GET", r"/api/jobs/(?P<namespace>[^/]+)/(?P<job_id>[^/]+)", "inspect"),
    ("GET", r"/api/jobs/(?P<namespace>[^/]+)/(?P<job_id>[^/]+)/logs", "logs"),
    ("POST", r"/api/jobs/(?P<namespace>[^/]+)/(?P<job_id>[^/]+)/cancel", "cancel"),
]
# The first word after the script is the job's own folder, which becomes /tmp/t2i-job.
IN_MOUNTS = f'mkdir -p {WORK} && mount --bind "$1" {WORK} && shift && exec "$@"'


def unshared() -> list[str]:
    """Return the words before a command that give it mounts of its own."""
    return ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", IN_MOUNTS, "sh"]


def why_not(folder: Path) -> str | None:
    """Return in one sentence why this machine cannot run such jobs; None if it can."""
    if not shutil.which("unshare"):
        return "unshare is missing: install util-linux (Linux only)"
    done = subprocess.run([*unshared(), str(folder), "true"], capture_output=True, text=True, check=False)
    return f"jobs need mounts of their own: {done.stderr.strip()}" if done.returncode else None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class JobRun:
    """A submitted job and its process."""

    def __init__(self, job_id: str, namespace: str, spec: dict[str, Any], hub: "JobsHub") -> None:
        self.id, self.namespace, self.spec = job_id, namespace, spec
        self.stage, self.message = "SCHEDULING", None
        self.created, self.started, self.finished = now(), None, None
        self.lines: list[tuple[str, str]] = []  # (timestamp, line)
        self._folder, self._seconds, self._begin = hub.folder / job_id, 0.0, 0.0
        self._process: subprocess.Popen[str] | None = None
        if spec.get("dockerImage") in hub.missing_images:
            self.end("ERROR", f"Failed to pull image {spec['dockerImage']}: not found")
        else:
            self._start(hub)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def work(self) -> Path:
        """Return the folder that the job sees as /tmp/t2i-job."""
        return self._folder / "work"

    def _start(self, hub: "JobsHub") -> None:
        for name in ("work", "home"):
            (self._folder / name).mkdir(parents=True)
        given = {**self.spec["environment"], **self.spec.get("secrets", {})}
        of_hub = {key: value for key, value in hub.environment().items() if key != "HF_TOKEN"}
        machine = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
                   "HOME": str(self._folder / "home"), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8",
                   "PIP_NO_DEPS": "1",  # the requirements' own requirements are all here; checking them takes 8 s
                   "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        self._process = subprocess.Popen(
            [*unshared(), str(self._folder / "work"), *self.spec["command"], *self.spec["arguments"]],
            env=machine | of_hub | hub.extra_env | given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self.stage, self.started, self._begin = "RUNNING", now(), time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()
        timer = threading.Timer(self.spec.get("timeoutSeconds", 1800), self.time_out)
        timer.daemon = True
        timer.start()

    def _read(self) -> None:
        self.lines.append((now(), f"===== Job started at {self.started} ====="))
        for line in self._process.stdout:
            self.lines.append((now(), line.rstrip("\n")))
        code = self._process.wait()
        self.end("COMPLETED" if code == 0 else "ERROR", None if code == 0 else f"Job failed with exit code {code}")

    def end(self, stage: str, message: str | None) -> None:
        """End the job, unless it has ended."""
        if self.stage not in ENDED:
            self._seconds = time.monotonic() - self._begin if self._begin else 0.0
            self.finished, self.message, self.stage = now(), message, stage

    def kill(self, message: str) -> None:
        """End the job and all its processes at once."""
        self.end("ERROR", message)
        if self._process and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def time_out(self) -> None:
        """End the job as its timeout does, at this moment."""
        self.kill("Job timeout")

    def preempt(self) -> None:
        """End the job as a machine that is taken away does."""
        self.kill("The machine was reclaimed")

    def cancel(self) -> None:
        """Ask the job to end, and kill it after a while."""
        self.end("CANCELED", None)
        self._process.terminate()
        timer = threading.Timer(GRACE_S, self.kill, ("",))
        timer.daemon = True
        timer.start()

    def wait(self, timeout: float) -> str:
        """Wait until the job and its process have ended, and return its stage."""
        end = time.monotonic() + timeout
        while self.stage not in ENDED or (self._process and self._process.poll() is None):
            assert time.monotonic() < end, f"{self.id} is {self.stage}\n{self.log()[-6000:]}"
            time.sleep(0.05)
        return self.stage

    def log(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def info(self) -> dict[str, Any]:
        """Return what the Hub tells of a job. Of secrets it tells the names alone."""
        seconds = self._seconds or (time.monotonic() - self._begin if self._begin else None)
        known = {
            key: self.spec.get(key)
            for key in ("dockerImage", "command", "arguments", "environment", "flavor", "labels")
        }
        return known | {
            "id": self.id, "createdAt": self.created, "startedAt": self.started, "finishedAt": self.finished,
            "secrets": dict.fromkeys(self.spec.get("secrets", {}), ""), "retry": self.spec.get("attempts", 1) - 1,
            "status": {"stage": self.stage, "message": self.message},
            "durations": {"runningSecs": seconds and int(seconds + 1)},
            "owner": {"id": "1", "name": self.namespace, "type": "user"},
        }  # fmt: skip


class JobsHub(LoopbackHub):
    """The loopback Hub with Jobs. `folder` gets a folder per job. `requests_of_jobs` holds each submitted specification."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.jobs, self.requests_of_jobs = folder, [], []
        self.exchanges: list[tuple[str, str, dict[str, str], bytes]] = []
        self.missing_images: set[str] = set()
        self.cut_logs = 0
        self.extra_env: dict[str, str] = {}  # of every job's machine
        self._server.RequestHandlerClass = type("Bound", (JobsHandler,), {"hub": self})

    def __exit__(self, *exception: object) -> None:
        for job in self.jobs:
            job.kill("the test has ended")
        super().__exit__(*exception)


class JobsHandler(Handler):
    """The routes of Jobs before those of repositories."""

    def route(self) -> tuple[int, Any, dict[str, str]]:
        self.hub.exchanges.append((self.command, self.path, dict(self.headers), self.body))
        for method, pattern, name in JOB_ROUTES:
            match = re.fullmatch(pattern, self.url.path)
            if match and method == self.command:
                try:
                    with self.hub.lock:
                        if name != "hardware":  # everybody may read prices
                            self.check_write(match["namespace"])
                        return getattr(self, name)(**match.groupdict())
                except Refusal as refusal:
                    return refusal.answer
        return super().route()

    def reply(self, status: int, body: Any, headers: dict[str, str]) -> None:
        if not isinstance(body, Iterator):
            super().reply(status, body, headers)
            return
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in body:
            if event is None:
                self.reset()
                return
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

    def find(self, namespace: str, job_id: str) -> JobRun:
        for job in self.hub.jobs:
            if (job.id, job.namespace) == (job_id, namespace):
                return job
        raise Refusal(404, "Job not found")

    def hardware(self) -> tuple[int, Any, dict[str, str]]:
        fields = {"cpu": "4 vCPU", "ram": "15 GB", "unitLabel": "minute"}
        gpu = {"type": "gpu", "model": "GPU", "vram": "16 GB", "manufacturer": "Nvidia"}
        return 200, [{"name": name, "prettyName": name, "unitCostMicroUSD": micro, "unitCostUSD": micro / 1e6, **fields,
                      "accelerator": None if name.startswith("cpu") else gpu | {"quantity": "4" if name.endswith("x4") else "1"}}
                     for name, micro in HARDWARE.items()], {}  # fmt: skip

    def list_jobs(self, namespace: str) -> tuple[int, Any, dict[str, str]]:
        wanted = [value.partition("=")[::2] for key, value in parse_qsl(self.url.query) if key == "label"]
        found = [job for job in self.hub.jobs if job.namespace == namespace]
        found = [job for job in found if all(job.spec.get("labels", {}).get(key) == value for key, value in wanted)]
        return 200, [job.info() for job in found], {}

    def run_job(self, namespace: str) -> tuple[int, Any, dict[str, str]]:
        spec = json.loads(self.body)
        if spec["flavor"] not in HARDWARE:
            raise Refusal(400, f"Invalid flavor {spec['flavor']}")
        self.hub.requests_of_jobs.append(spec)
        job = JobRun(f"{len(self.hub.jobs) + 1:024x}", namespace, spec, self.hub)
        self.hub.jobs.append(job)
        return 200, job.info(), {}

    def inspect(self, namespace: str, job_id: str) -> tuple[int, Any, dict[str, str]]:
        return 200, self.find(namespace, job_id).info(), {}

    def cancel(self, namespace: str, job_id: str) -> tuple[int, Any, dict[str, str]]:
        self.find(namespace, job_id).cancel()
        return 200, {}, {}

    def logs(self, namespace: str, job_id: str) -> tuple[int, Any, dict[str, str]]:
        return 200, self.events(self.find(namespace, job_id)), {}

    def events(self, job: JobRun) -> Iterator[dict[str, str] | None]:
        """Yield the log's lines until the job ends, or None to break the connection."""
        cut = self.hub.cut_logs > 0
        self.hub.cut_logs -= cut
        for number in itertools.count():
            while number >= len(job.lines):
                if job.stage in ENDED or self.hub.closing.is_set():
                    return
                time.sleep(0.05)
            yield {"timestamp": job.lines[number][0], "data": job.lines[number][1]}
            if cut and number:
                yield None
