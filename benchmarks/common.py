"""Share code among the benchmarks: keep results with the machine and the versions that made them."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.append(str(SCRIPTS))

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of the processor, those that matter to speed


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(gpu: str | None = None) -> dict[str, Any]:
    """Return the machine's processor, cores and relevant abilities. gpu: the GPU's name, if one is measured."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = next(
        (line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    known = next((line for line in cpu.splitlines() if line.startswith("flags")), "").split()
    machine: dict[str, Any] = {"cpu": model, "cores": cores(), "flags": [flag for flag in FLAGS if flag in known]}
    return {"gpu": gpu, **machine} if gpu else machine


def keep(name: str, result: dict[str, Any], gpu: str | None = None) -> None:
    """Print a result and store it with machine and versions in `results/<name>.json`, or in `BENCHMARK_RESULTS`.

    gpu: the GPU's name, if one was measured.
    """
    versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers", "accelerate")}
    versions = {"python": platform.python_version(), **versions}
    row = {"name": name, **result, "machine": describe_machine(gpu), "versions": versions}
    folder = Path(os.environ.get("BENCHMARK_RESULTS", ROOT / "benchmarks" / "results"))
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps(row), flush=True)


def judged_cells(row: dict[str, Any]) -> str:
    """Return the judge's figures of `Judge.describe` as cells of a table: named, distance, Fréchet, precision, recall."""
    named = f"{row['named']:.1%}" if row["named"] is not None else ""
    distance = f"{row['kernel_distance']:.1f} ± {row['standard_error']:.1f}"
    return f"{named} | {distance} | {row['frechet_distance']:.1f} | {row['precision']:.1%} | {row['recall']:.1%}"


def run_script(script: str, *arguments: Any, cwd: Path) -> str:
    """Run one of the suite's scripts and return its output.

    Raises `RuntimeError` with the script's last lines if the script fails.
    """
    words = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
    )
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}: {done.stdout[-1000:]} {done.stderr[-3000:]}")
    return done.stdout
