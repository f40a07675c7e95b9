"""Kill training at random moments, resume it, and compare everything with an undisturbed run.

python tests/prove_resume.py --kills 20
python tests/prove_resume.py --extend --updates 400     (finished after 200 updates and extended, against 400 at once)

`make prove-resume` runs both.

Modes are one process, one in bf16, two gloo processes, DeepSpeed ZeRO-2 on two, and a distillation. The runs use gradient
accumulation 2, caption dropout, flips and shuffling, and cross the ends of epochs. SIGKILL hits every process of the run at one moment,
launcher and workers alike. Of six kills, three come as soon as a save begins, and one while the command starts. The others
come at random moments after the first step. The same command starts again until the run ends. No process may be left, and none
may have stopped by itself. Samples of each step, learning rates, losses and gradient norms must be the same. Weights and
moving average must be the same bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
sys.path.append(str(Path(__file__).parent))

from processes import kill_all, marked, new_mark  # noqa: E402
from t2i.run_lock import run_status  # noqa: E402

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
distill:
  {max_train_steps: 24, train_batch_size: 4, gradient_accumulation_steps: 2, lr_warmup_steps: 4, validation_steps: 6,
   trajectories: 20, decoder_steps: 20, validation_images: 4, checkpointing_steps: 3, logging_steps: 1, report_to: none}
"""
MODES = {"one": "cpu", "bf16": "cpu", "two": "cpu", "zero2": "deepspeed_zero2", "distill": "cpu"}
ALONE = ("one", "bf16", "distill")  # modes with one process
PRECISION = {"zero2": "no", "bf16": "bf16"}  # where it is not the config's


def prepare(folder: Path) -> None:
    """Make drawn flowers, a small VAE, a teacher and the recipe in `folder`."""
    (folder / "recipe.yaml").write_text(SETTINGS)
    scripts = ROOT / "scripts"
    draw = [scripts / "make_flowers.py", "--output_dir", "dataset", "--count", IMAGES, "--validation_count", 4, "--test_count", 4,
            "--size", 32, "--workers", 1]  # fmt: skip
    vae = [scripts / "train_vae.py", "--config", "recipe.yaml", "--dataset", "dataset", "--output_dir", "vae"]
    teacher = [scripts / "train_unet.py", "--config", "recipe.yaml", "--dataset", "dataset", "--vae", "vae", "--output_dir", "teacher",
               "--max_train_steps", 5]  # fmt: skip
    for words in (draw, vae, teacher):
        subprocess.run(
            [sys.executable, *map(str, words)], cwd=folder, check=True, capture_output=True, env=environment()
        )


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def prove(
    folder: Path, mode: str, kills: int, seed: int, run_whole: Callable[[Path, list[str]], None] | None = None
) -> str:
    """Run the proof of one mode in `folder` and return a summary. Raises AssertionError for any difference.

    Args:
        run_whole: runs a training to its end, by its output folder and the arguments of train_unet.py. It runs the undisturbed
            training, and the end of a disturbed one after the last kill. With None, the launcher does.
    """
    chance, workers = random.Random(f"{mode} {seed}"), 1 if mode in ALONE else 2
    whole, disturbed = folder / f"{mode}-undisturbed", folder / f"{mode}-disturbed"
    starting_s = 0.0
    if run_whole:
        run_whole(whole, arguments(whole, mode))
    else:
        began = time.monotonic()
        end, _ = start(folder, whole, mode)
        assert wait_for_step(whole, end, 0), log_of(whole)
        starting_s = time.monotonic() - began
        assert end.wait(timeout=600) == 0, log_of(whole)
    assert json.loads((whole / "run.json").read_text())["processes"] == workers
    done, in_saves, starting, runs = 0, 0, 0, 0
    while done < kills:
        shutil.rmtree(disturbed, ignore_errors=True)
        while True:
            if run_whole and done >= kills:
                run_whole(disturbed, arguments(disturbed, mode))
                break
            logged = log_size(disturbed)
            (process, mark), last, early = start(folder, disturbed, mode), done >= kills, done % 6 == 5
            if last or (not early and not wait_for_step(disturbed, process, logged)):
                code = process.wait(timeout=600)
                assert code == 0, log_of(disturbed)
                break
            known: set[int] = set()
            if early:
                time.sleep(chance.uniform(0, starting_s))
            elif done % 2 == 0:
                known = marked(mark)
                wait_for_save(disturbed, process, 60)
            else:
                time.sleep(chance.uniform(0, 1.5))
            saving: list[Path] = []
            killed = kill_all(mark, known, lambda: saving.extend(disturbed.glob(".checkpoint-*.part")))  # noqa: B023
            if process.wait() == 0:  # it had come to its end
                break
            said = (disturbed / "log.txt").read_bytes()[logged:]
            assert b"stopped after" not in said, log_of(disturbed)
            assert b"SIGTERM" not in said, log_of(disturbed)
            if not early and (status := settled_status(disturbed)) != "finished":
                assert len(killed) > workers, f"{len(killed)} processes for a launcher and {workers} workers"
                assert status == "interrupted", status
            done, starting, in_saves = done + 1, starting + early, in_saves + bool(saving and not early)
        compare(whole, disturbed)
        runs += 1
    assert 4 * in_saves >= done, f"only {in_saves} of {done} kills fell into a save"
    return (
        f"{mode}: {done} kills of all processes ({in_saves} inside a save, {starting} before the first step) in {runs} runs of "
        f"{STEPS} steps; all equal, bit for bit"
    )


def arguments(output: Path, mode: str) -> list[str]:
    """Return the arguments of the training script."""
    if mode == "distill":
        return ["--config", "recipe.yaml", "--dataset", "dataset", "--model", "teacher", "--output_dir", str(output)]
    return ["--config", "recipe.yaml", "--dataset", "dataset", "--vae", "vae", "--output_dir", str(output),
            "--train_batch_size", "4" if mode in ALONE else "2"]  # fmt: skip


def start(folder: Path, output: Path, mode: str, *options: str) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    """Start the training as users do, with further options. Return its process and the mark of all its processes."""
    output.mkdir(exist_ok=True)
    config = folder / f"{mode}.yaml"
    text = (ROOT / "accelerate_configs" / f"{MODES[mode]}.yaml").read_text()
    if mode == "two":
        text = text.replace("num_processes: 1", "num_processes: 2").replace("'NO'", "MULTI_GPU")
    config.write_text(text)
    script = "distill_unet.py" if mode == "distill" else "train_unet.py"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config),
             *(["--mixed_precision", PRECISION[mode]] if mode in PRECISION else []), str(ROOT / "scripts" / script),
             *arguments(output, mode), *options]  # fmt: skip
    settings = environment()
    if mode == "zero2":
        settings.pop("ACCELERATE_USE_CPU")
    mark = new_mark()
    with open(output / "log.txt", "ab") as log:
        process = subprocess.Popen(
            words, cwd=folder, stdout=log, stderr=log, env=settings | mark, start_new_session=True
        )
    return process, mark


def wait_for_step(output: Path, process: subprocess.Popen[bytes], logged: int) -> bool:
    """Wait until this launch logs a step, behind the log's first `logged` bytes. Return False if it ends before."""
    while process.poll() is None:
        with open(output / "log.txt", "rb") as log:
            log.seek(logged)
            if b"\nstep " in b"\n" + log.read():
                return True
        time.sleep(0.005)
    return False


def wait_for_save(output: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until a checkpoint is being written."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if any(output.glob(".checkpoint-*.part")):
            return
        time.sleep(0.0005)


def rows_of(output: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    text = (output / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def settled_status(output: Path) -> str:
    """Return the run's status after a kill. Of a process, the kernel frees its lock last."""
    until = time.monotonic() + 10
    while (status := run_status(output)) == "running" and time.monotonic() < until:
        time.sleep(0.01)
    return status


def log_size(output: Path) -> int:
    return (output / "log.txt").stat().st_size if (output / "log.txt").is_file() else 0


def log_of(output: Path) -> str:
    return (output / "log.txt").read_text(errors="replace")[-4000:]


def prove_extension(folder: Path, mode: str, updates: int) -> str:
    """Extend a finished run of half the updates, and compare it with a run that had all of them from the start."""
    whole, extended, half = folder / f"{mode}-at-once", folder / f"{mode}-extended", updates // 2
    updates = 2 * half  # Both runs validate at the half, where the shorter one ends.
    for output, steps in ((whole, updates), (extended, half), (extended, updates)):
        settings = {"lr_scheduler": "constant", "max_train_steps": steps, "checkpointing_steps": half}
        process, _ = start(folder, output, mode, *(f"--{key}={value}" for key, value in settings.items()))
        assert process.wait(timeout=600) == 0, log_of(output)
        state = json.loads((output / "run.json").read_text())
        assert (state["status"], state["steps"]) == ("finished", steps)
    assert [known["at_step"] for known in state["extensions"]] == [half]
    compare(whole, extended, updates)
    return f"{mode}: extended from {half} to {updates} updates; all equal to {updates} at once, bit for bit"


def compare(whole: Path, disturbed: Path, steps: int = STEPS) -> None:
    """Compare samples, learning rates, losses and norms by step; weights, average and optimiser byte by byte."""
    first, second = rows_of(whole), rows_of(disturbed)
    assert len(first) == len(second), f"{len(first)} rows of metrics against {len(second)}"
    for ours, theirs in zip(first, second, strict=True):
        assert ours == theirs, f"step {ours['step']}: {ours} against {theirs}"
    ledger = rows_of(whole, "samples.jsonl")
    assert len(ledger) == steps
    assert ledger == rows_of(disturbed, "samples.jsonl"), "other samples"
    name = f"checkpoint-{steps:06d}"
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
    parser.add_argument("--extend", action="store_true", help="extend a finished training instead of killing one")
    parser.add_argument("--updates", type=int, default=STEPS, help="weight updates of an extended training")
    options = parser.parse_args()
    if options.updates != STEPS and not options.extend:
        parser.error("--updates needs --extend")
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        lines = []
        for mode in options.modes:
            if options.extend:
                lines.append(prove_extension(folder, mode, options.updates))
            else:
                lines.append(prove(folder, mode, options.kills, options.seed))
            print(lines[-1], flush=True)
        print(f"proved: {'; '.join(lines)}")


if __name__ == "__main__":
    main()
