"""Kill training at random moments, resume it, and compare everything with an undisturbed run.

python tests/prove_resume.py --kills 20     (make prove-resume)

Modes: one process, one in bf16, two gloo processes, DeepSpeed ZeRO-2 on two. With gradient accumulation 2, caption dropout, flips and
shuffling, across epochs' ends: SIGKILL to the whole process group, a third of the time as soon as a save is seen under
way, else at a random moment after the first step; start the same command again, until it ends. Then the samples of each
step, learning rates, losses and gradient norms must be the same, and weights and moving average bit for bit.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

STEPS, IMAGES = 24, 40
SETTINGS = """
data: {resolution: 32}
vae: {vae_channels: [8, 8], vae_layers: 1}
unet:
  {text_hidden_size: 32, text_layers: 1, text_max_length: 24, unet_channels: [32, 64], unet_layers: 1, attention_head_dim: 2,
   down_block_types: [DownBlock2D, CrossAttnDownBlock2D], prediction_type: v_prediction, rescale_betas_zero_snr: true}
train_vae: {max_train_steps: 4, train_batch_size: 4, lr_warmup_steps: 1, validation_steps: 4, report_to: none}
train_unet:
  {max_train_steps: 24, train_batch_size: 4, gradient_accumulation_steps: 2, lr_warmup_steps: 4, validation_steps: 6,
   validation_images: 4, checkpointing_steps: 3, logging_steps: 1, report_to: none}
"""
MODES = {"one": "cpu", "bf16": "cpu", "two": "cpu", "zero2": "deepspeed_zero2"}
ALONE = ("one", "bf16")  # modes with one process
PRECISION = {"zero2": "no", "bf16": "bf16"}  # where it is not the config's


def prepare(folder: Path) -> None:
    """Drawn flowers, a small VAE and the recipe, in `folder`."""
    (folder / "recipe.yaml").write_text(SETTINGS)
    scripts = ROOT / "scripts"
    draw = [scripts / "make_flowers.py", "--output_dir", "dataset", "--count", IMAGES, "--validation_count", 4, "--test_count", 4,
            "--size", 32, "--workers", 1]  # fmt: skip
    vae = [scripts / "train_vae.py", "--config", "recipe.yaml", "--dataset", "dataset", "--output_dir", "vae"]
    for words in (draw, vae):
        subprocess.run(
            [sys.executable, *map(str, words)], cwd=folder, check=True, capture_output=True, env=environment()
        )


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def prove(folder: Path, mode: str, kills: int, seed: int) -> str:
    """Run the proof of one mode in `folder`; returns a line that sums up. Raises AssertionError for what differs."""
    chance = random.Random(f"{mode} {seed}")
    whole = folder / f"{mode}-undisturbed"
    end = start(folder, whole, mode)
    assert end.wait(timeout=600) == 0, log_of(whole)
    assert json.loads((whole / "run.json").read_text())["processes"] == (1 if mode in ALONE else 2)
    done, in_saves, runs = 0, 0, 0
    while done < kills:
        disturbed = folder / f"{mode}-disturbed"
        shutil.rmtree(disturbed, ignore_errors=True)
        while True:
            process, last = start(folder, disturbed, mode), done >= kills
            if last or not wait_for_step(disturbed, process):
                code = process.wait(timeout=600)
                assert code == 0, log_of(disturbed)
                break
            if done % 3 == 0:
                wait_for_save(disturbed, process, 20)
            else:
                time.sleep(chance.uniform(0, 1.5))
            if process.poll() is not None:
                assert process.returncode == 0, log_of(disturbed)
                break
            kill(process)
            done += 1
            in_saves += any(disturbed.glob(".checkpoint-*"))
        compare(whole, disturbed)
        runs += 1
    assert 4 * in_saves >= done, f"only {in_saves} of {done} kills fell into a save"
    return f"{mode}: {done} kills ({in_saves} inside a save) in {runs} runs of {STEPS} steps; all equal, bit for bit"


def start(folder: Path, output: Path, mode: str) -> subprocess.Popen[bytes]:
    """The training as users start it, in a process group of its own."""
    output.mkdir(exist_ok=True)
    config = folder / f"{mode}.yaml"
    text = (ROOT / "accelerate_configs" / f"{MODES[mode]}.yaml").read_text()
    if mode == "two":
        text = text.replace("num_processes: 1", "num_processes: 2").replace("'NO'", "MULTI_GPU")
    config.write_text(text)
    per_process = 4 if mode in ALONE else 2
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config),
             *(["--mixed_precision", PRECISION[mode]] if mode in PRECISION else []), str(ROOT / "scripts" / "train_unet.py"),
             "--config", "recipe.yaml", "--dataset", "dataset", "--vae", "vae", "--output_dir", str(output),
             "--train_batch_size", str(per_process)]  # fmt: skip
    settings = environment()
    if mode == "zero2":
        settings.pop("ACCELERATE_USE_CPU")
    log = open(output / "log.txt", "ab")  # noqa: SIM115 - the child's, which outlives this call
    return subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=settings, start_new_session=True)


def wait_for_step(output: Path, process: subprocess.Popen[bytes]) -> bool:
    """Until this process has made a step; False where it ends before."""
    file = output / "metrics.jsonl"
    before = file.stat().st_mtime_ns if file.is_file() else 0
    started = time.time_ns()
    while process.poll() is None:
        if file.is_file() and file.stat().st_mtime_ns > max(before, started) and rows_of(output):
            return True
        time.sleep(0.005)
    return False


def wait_for_save(output: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until a checkpoint is being written."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if any(output.glob(".checkpoint-*.part")):
            return
        time.sleep(0.0005)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows_of(output: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    text = (output / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def log_of(output: Path) -> str:
    return (output / "log.txt").read_text(errors="replace")[-4000:]


def compare(whole: Path, disturbed: Path) -> None:
    """Samples, learning rates, losses, norms by step; weights, average and optimiser byte by byte."""
    first, second = rows_of(whole), rows_of(disturbed)
    assert len(first) == len(second), f"{len(first)} rows of metrics against {len(second)}"
    for ours, theirs in zip(first, second, strict=True):
        assert ours == theirs, f"step {ours['step']}: {ours} against {theirs}"
    ledger = rows_of(whole, "samples.jsonl")
    assert len(ledger) == STEPS
    assert ledger == rows_of(disturbed, "samples.jsonl"), "other samples"
    name = f"checkpoint-{STEPS:06d}"
    files = sorted(file.relative_to(whole) for file in (whole / name).rglob("*.safetensors"))
    files += [file.relative_to(whole) for file in (whole / "pipeline" / "unet").glob("*.safetensors")]
    assert len(files) >= 4
    for file in files:
        assert (whole / file).read_bytes() == (disturbed / file).read_bytes(), f"{file} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in each mode")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        lines = []
        for mode in options.modes:
            lines.append(prove(folder, mode, options.kills, options.seed))
            print(lines[-1], flush=True)
        print(f"proved: {'; '.join(lines)}")


if __name__ == "__main__":
    main()
