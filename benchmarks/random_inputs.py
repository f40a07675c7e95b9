"""Run every script with random options and damaged data sets: no traceback, no other exit code, nothing lost.

python benchmarks/random_inputs.py --commands 1000 --data_sets 1000 --subprocesses 100

Each case is a function of (seed, number), so `--only commands 17` repeats one case. Most cases run in a process forked
after the imports, so that a case takes a tenth of a second instead of seven. The last `--subprocesses` cases of each
kind run as users type them. A case passes under three conditions: it ends with exit code 0, 2 or 75 without a
traceback, a refusal is one sentence, and no file of data sets or finished runs was changed or removed. The script needs
`os.fork`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from common import SCRIPTS, keep, run_script

RECIPE = """
data: {resolution: 32}
vae: {vae_channels: [8, 8], vae_layers: 1}
unet:
  {text_hidden_size: 32, text_layers: 1, text_max_length: 24, unet_channels: [16, 32], unet_layers: 1, attention_head_dim: 2,
   down_block_types: [DownBlock2D, CrossAttnDownBlock2D], prediction_type: v_prediction, rescale_betas_zero_snr: true}
train_vae: {train_batch_size: 4, max_train_steps: 2, lr_warmup_steps: 1, validation_steps: 2, checkpointing_steps: 1, report_to: none}
train_unet:
  {train_batch_size: 4, max_train_steps: 2, lr_warmup_steps: 1, validation_steps: 2, validation_images: 4, checkpointing_steps: 1,
   num_inference_steps: 2, report_to: none}
evaluate:
  {guidance_scales: [3.0], num_inference_steps: 2, sweep_prompts: 2, report_prompts: 2, classifier_steps: 1, classifier_drawings: 32}
"""
SECONDS = 60  # of a case, after which it gets SIGTERM, as a scheduler would end it
MEMORY = 8 * 2**30  # bytes of address space of a forked case, as of a small machine
GOOD_CODES = {0, 2, 75}
COMMON = "--config tiny.yaml --dataset dataset "
# script -> (options that make a short run of it, the sections of the recipe that its options come from)
SHORT_RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "make_flowers.py": ("--output_dir new --count 4 --validation_count 1 --test_count 1 --size 32 --workers 1", ()),
    "caption_to_hub.py": (
        "--config tiny.yaml --dataset photos --captioner existing --output_dir new --audit_tokenizer unet/pipeline/tokenizer",
        ("source", "caption"),
    ),
    "train_vae.py": (COMMON + "--output_dir new", ("data", "vae", "train_vae")),
    "train_unet.py": (COMMON + "--vae vae --output_dir new", ("data", "vae", "unet", "train_unet")),
    "generate_images.py": ("--model unet --prompt 'a red flower' --num_inference_steps 2 --output_dir new", ()),
    "evaluate_checkpoints.py": (COMMON + "--model copy", ("data", "evaluate")),
    "export_pipeline.py": ("--model copy", ()),
    "publish_model.py": ("--model unet --hub_model_id me/model", ()),
    "publish_space.py": ("--model unet --space me/space --dry_run", ()),
    "run_recipe.py": (COMMON + "--output_dir new --accelerate_config none.yaml", ()),
    "launch_sagemaker.py": (f"--dry_run --train_images 100 '{SCRIPTS / 'train_unet.py'}' --config flowers", ()),
    "run_sagemaker_job.py": ("", ()),
}
LAUNCH_OPTIONS = ("config_file", "inside", "train_images", "samples_per_second", "fetch", "output_dir")
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "64",
    "1.5",
    "1e3",
    "2147483647",
    "9223372036854775808",
    "1" + "0" * 30,
    "0x10",
    "١٢",
]
REALS = ["0", "1", "0.5", "-0.5", "1e-30", "1e30", "1e400", "inf", "-inf", "nan", "1,5", ".5"]
TEXTS = [
    *(
        "",
        " ",
        "~",
        "~/x",
        "~nobody/x",
        "nowhere",
        "nowhere/at/all",
        "me/model",
        "photos",
        "dataset",
        "vae",
        "unet",
        "empty",
        "blob",
    ),
    *(
        "unet/checkpoint-000002",
        "unet/pipeline",
        "unet/run.json",
        "tiny.yaml",
        "a b",
        "été",
        "caf\udce9",
        "a" * 300,
        "-x",
        "{label}",
    ),
    *(
        "{",
        "[1, 2]",
        "null",
        "latest",
        "..",
        "/dev/null",
        "/proc/self/x",
        "x\ny",
        "%s%n",
        "'",
        "s3://bucket/x",
        "label",
        "caption",
    ),
    *("http://127.0.0.1:9/x", "C:\\photos"),
]


class Case(NamedTuple):
    """A case: a command line, and the folder that the command may write to."""

    script: str
    arguments: list[str]


class Outcome(NamedTuple):
    """The ending of a case. `fault` names the case's fault, or is None if the case passed."""

    fault: str | None
    code: int | None
    output: str


# --- The cases -------------------------------------------------------------------------------------------------------


def options_of(script: str) -> dict[str, Any]:
    """Return the names of a script's options and their types."""
    if script == "launch_sagemaker.py":
        return dict.fromkeys(LAUNCH_OPTIONS, str)
    if script == "run_sagemaker_job.py":
        return {}
    sections = SHORT_RUNS[script][1]
    if not sections:
        spec = importlib.util.spec_from_file_location(Path(script).stem, SCRIPTS / script)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        classes = [module.Options]
    else:
        from t2i import config

        recipe = config.Recipe()
        classes = [config.SourceConfig if name == "source" else type(getattr(recipe, name)) for name in sections]
    return {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}


def value_of(kind: Any, chance: random.Random) -> list[str] | None:
    """Return the words of a right or wrong value for an option of that type; None for a switch."""
    plain = str(kind)
    if "bool" in plain:
        return None
    if "Literal" in plain:
        members = [word.strip("' ") for word in plain.split("Literal[")[1].split("]")[0].split(",")]
        return [chance.choice([*members, *members, "none", "X", ""])]
    pool = NUMBERS if "int" in plain else REALS + NUMBERS if "float" in plain else TEXTS
    if chance.random() < 0.1:
        pool = TEXTS
    return [chance.choice(pool) for _ in range(chance.choice([0, 1, 2, 3]) if "list" in plain else 1)]


def random_command(number: int, seed: int) -> Case:
    """Make case `number`: a script, its short run, and up to four options changed, repeated, misspelt or left out."""
    chance = random.Random(f"commands {seed} {number}")
    script = list(SHORT_RUNS)[number % len(SHORT_RUNS)]
    words, options = shlex.split(SHORT_RUNS[script][0]), options_of(script)
    extra: list[str] = []
    for _ in range(chance.randint(0 if script != "run_sagemaker_job.py" else 1, 4)):
        name = chance.choice(list(options) or ["config"])
        value = value_of(options.get(name, str), chance)
        spelt = name if chance.random() < 0.93 else name[:-1] + chance.choice("xyz")
        flag = f"--{spelt}" if value is not None or chance.random() < 0.5 else f"--no-{spelt}"
        if f"--{name}" in words and chance.random() < 0.8:  # replace, so that no option is given twice by accident
            at = words.index(f"--{name}")
            del words[at : at + 2]
        extra += [f"{flag}={value[0]}"] if value and chance.random() < 0.3 else [flag, *(value or [])]
    if chance.random() < 0.05 and words:
        del words[chance.randrange(len(words))]
    if script == "launch_sagemaker.py":
        return Case(script, [*extra, *words])
    return Case(script, [*words, *extra])


FORMS = ("classes", "jsonl", "lists", "csv", "sidecars", "parquet", "drawn")


def random_data_set(number: int, seed: int, folder: Path) -> Case:
    """Make case `number`: a small data set in `folder` with up to four kinds of damage, and a command that reads it."""
    chance = random.Random(f"data {seed} {number}")
    make_data_set(folder, chance.choice(FORMS), chance)
    for _ in range(chance.randint(1, 4)):
        damage(folder, chance)
    last = [
        "--cache_dir",
        "new/cache",
        *chance.choice([[], [], ["--max_bad_share", "1"], ["--caption_column", "text"]]),
    ]
    script = chance.choice(("train_vae.py", "train_unet.py", "train_unet.py", "caption_to_hub.py"))
    words = shlex.split(SHORT_RUNS[script][0])
    words[words.index("--dataset") + 1] = str(folder)
    if script == "caption_to_hub.py":
        words, last = words[2:], last[2:]
    return Case(script, [*words, *last])


def make_data_set(folder: Path, form: str, chance: random.Random) -> None:
    """Make eight noisy images of two kinds with captions, in one of `FORMS`."""
    import numpy as np
    from PIL import Image

    images = []
    for number in range(8):
        pixels = np.random.default_rng([chance.randrange(2**30), number]).integers(0, 255, (24, 20, 3), np.uint8)
        images.append(
            (f"{number}.{chance.choice(['jpg', 'png', 'webp'])}", Image.fromarray(pixels), f"a rose, number {number}")
        )
    if form in ("parquet", "drawn"):
        from t2i.data.dataset_folder import save_dataset_folder

        rows = [{"image": np.asarray(image), "caption": text} for _, image, text in images]
        save_dataset_folder(folder, {"train": rows[:6], "validation": rows[6:]} if form == "drawn" else {"train": rows})
        return
    folder.mkdir(parents=True)
    kinds = ("daisy", "rose")
    for number, (name, image, text) in enumerate(images):
        path = folder / (kinds[number % 2] if form == "classes" else "") / name
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        if form == "sidecars":
            path.with_suffix(".txt").write_text(text)
    if form in ("jsonl", "lists"):
        texts = {"jsonl": lambda text: text, "lists": lambda text: [text, "a rose"]}[form]
        rows = [json.dumps({"file_name": name, "caption": texts(text)}) for name, _, text in images]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    if form == "csv":
        lines = ["file_name,text", *(f'{name},"{text}"' for name, _, text in images)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def damage(folder: Path, chance: random.Random) -> None:
    """Damage a data set's folder once, as disks, editors, archives or people do."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return
    file = chance.choice(files)
    data = file.read_bytes()
    described = chance.choice([path for path in files if path.suffix in (".jsonl", ".csv", ".txt", ".md")] or [file])
    odd = chance.choice(
        ["été.jpg", "a b [1].png", "x::y.jpg", "#1.jpg", "😀.png", "a'b\".jpg", "CON.jpg", "x" * 200 + ".jpg"]
    )
    beside = chance.choice([".xmp", ".AAE", ".MOV", ".json", ".npz", ".db", ".txt"])
    doings = {
        "cut": lambda: file.write_bytes(data[: len(data) // 2]),
        "empty": lambda: file.write_bytes(b""),
        "noise": lambda: file.write_bytes(chance.randbytes(200)),
        "flip": lambda: file.write_bytes(bytes([*data[:40], data[40] ^ 255, *data[41:]]) if len(data) > 41 else b"x"),
        "remove": file.unlink,
        "rename": lambda: file.rename(file.with_name(odd)),
        "bytes in the name": lambda: os.rename(file, os.fsencode(file.parent) + b"/caf\xe9.jpg"),
        "folder": lambda: (file.unlink(), file.mkdir()),
        "link away": lambda: (file.unlink(), file.symlink_to("/etc/hostname")),
        "dangling": lambda: (folder / "gone.jpg").symlink_to("nothing"),
        "loop": lambda: (folder / "loop").symlink_to(folder, target_is_directory=True),
        "split link": lambda: (folder / "test").symlink_to(folder, target_is_directory=True),
        "companion": lambda: file.with_suffix(beside).write_bytes(b"<x/>"),
        "thumbnails": lambda: ((folder / "@eaDir").mkdir(exist_ok=True), shutil.copy(file, folder / "@eaDir")),
        "pipe": lambda: os.mkfifo(folder / "pipe.jpg"),
        "utf16": lambda: described.write_bytes(described.read_bytes().decode("utf-8", "replace").encode("utf-16")),
        "cp1252": lambda: described.write_bytes(described.read_bytes() + "é’".encode("cp1252")),
        "nul": lambda: described.write_bytes(described.read_bytes() + b"\0\0"),
        "line": lambda: described.write_bytes(described.read_bytes() + chance.choice(
            [b"{\n", b"[]\n", b"1,2,3,4\n", b'{"file_name": 5}\n', b'{"file_name": "../x.jpg", "caption": "x"}\n', b'"\n', b"\n\n\n",
             b'{"file_name": "0.jpg", "caption": {"a": 1}}\n', b'{"file_name": "0.jpg", "caption": []}\n',
             b'{"file_name": "1.jpg", "caption": NaN, "n": 99999999999999999999}\n',
             b"0 0.5 0.5 0.2 0.2\n", b"---\nconfigs: [\n", b"---\nlicense: 1\n---\n"])),
        "no caption": lambda: described.write_bytes(b""),
        "deeper": lambda: (file.parent / "a/b/c").mkdir(parents=True, exist_ok=True) or file.rename(file.parent / "a/b/c" / file.name),
        "number class": lambda: ((folder / "1").mkdir(exist_ok=True), shutil.copy(file, folder / "1" / file.name)),
        "archive": lambda: shutil.make_archive(str(folder / "more"), chance.choice(["zip", "tar"]), file.parent),
        "nothing": lambda: [path.unlink() for path in files],
    }  # fmt: skip
    with contextlib.suppress(OSError, UnicodeError):  # an earlier damage stands in its way, or zip cannot hold a name
        doings[chance.choice(list(doings))]()


# --- Running them ----------------------------------------------------------------------------------------------------


def make_workspace(folder: Path) -> Path:
    """Make the cases' folder: drawn flowers, photos, a finished VAE and denoiser, and other files."""
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    counts = ("--count", 16, "--validation_count", 4, "--test_count", 4, "--size", 32, "--workers", 1)
    run_script("make_flowers.py", "--output_dir", "dataset", *counts, cwd=folder)
    common = ("--config", "tiny.yaml", "--dataset", "dataset")
    run_script("train_vae.py", *common, "--output_dir", "vae", cwd=folder)
    run_script("train_unet.py", *common, "--vae", "vae", "--output_dir", "unet", cwd=folder)
    finish_workspace(folder)
    return folder


def finish_workspace(folder: Path) -> None:
    """Add the other files that the cases name to a folder with dataset/, vae/ and unet/."""
    make_data_set(folder / "photos", "sidecars", random.Random(0))
    (folder / "empty").mkdir()
    (folder / "blob").write_bytes(bytes(range(256)))
    shutil.copytree(folder / "unet", folder / "copy")  # evaluation and export write beside the weights


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file that no case may change: data sets, weights, checkpoints, recipes."""
    rows = {}
    for top in ("dataset", "photos", "damaged", "vae", "unet", "copy", "blob", "tiny.yaml"):
        path = folder / top
        for file in [path] if path.is_file() else path.rglob("*"):
            kept = top in ("dataset", "photos", "damaged") or file.suffix == ".safetensors" or file == path
            if kept and file.is_file() and "evaluation" not in file.parts and "openvino" not in file.parts:
                status = file.stat()
                rows[os.fsdecode(os.fsencode(file.relative_to(folder)))] = (status.st_size, status.st_mtime_ns)
    return rows


def import_everything() -> None:
    """Import the libraries that the scripts import in their functions, so that forks have them."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    os.environ.update(AWS_EC2_METADATA_DISABLED="true")
    import accelerate  # noqa: F401
    import datasets
    import diffusers  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401
    import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for name in ("CLIPTextModel", "CLIPTokenizer", "Florence2ForConditionalGeneration"):
        getattr(transformers, name)
    from t2i import models  # noqa: F401
    from t2i.data import flowers, preparing  # noqa: F401
    from t2i.evaluation import metrics  # noqa: F401
    from t2i.hub import model_card, upload  # noqa: F401
    from t2i.pictures import engines, sampling  # noqa: F401
    from t2i.training import checkpoints, loop  # noqa: F401


def run_forked(case: Case, folder: Path, seconds: float = SECONDS) -> Outcome:
    """Run a case in `folder` in a process forked from this one, with its output in a file."""
    log = folder / "case.log"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            os.environ["HOME"] = str(folder / "home")
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (
                os.fdopen(1, "w", buffering=1),
                os.fdopen(2, "w", buffering=1, errors="backslashreplace"),
            )
            sys.argv = [str(SCRIPTS / case.script), *case.arguments]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status, began, asked = 0, time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > seconds * (2 if asked else 1):
            os.killpg(child, signal.SIGKILL if asked else signal.SIGTERM)
            asked = True
        time.sleep(0.01)
    return judge(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace"), asked)


def run_typed(case: Case, folder: Path, seconds: float = 3 * SECONDS) -> Outcome:
    """Run a case as users type it."""
    words = [sys.executable, str(SCRIPTS / case.script), *map(os.fsencode, case.arguments)]
    environment = os.environ | {"HOME": str(folder / "home"), "PYTHONPATH": ""}
    with open(folder / "case.log", "wb") as log:
        process = subprocess.Popen(
            words, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        asked = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            asked = True
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return judge(process.returncode, (folder / "case.log").read_text(encoding="utf-8", errors="replace"), asked)


def judge(code: int, output: str, asked: bool) -> Outcome:
    """Judge a case by its ending. asked: whether SIGTERM was sent, which ends scripts that do not train at once."""
    refusal = any(mark in output for mark in ("error: ", "For full helptext", "usage: "))
    fault = None
    if "Traceback (most recent call last)" in output:
        fault = "a traceback"
    elif code not in GOOD_CODES and not (asked and code == -signal.SIGTERM):
        fault = f"exit code {code}"
    elif code == 2 and not refusal:
        fault = "refused without a sentence"
    elif code == 2 and sum(line.startswith("error: ") for line in output.splitlines()) > 1:
        fault = "more than one sentence"
    return Outcome(fault, code, output)


def run_cases(
    folder: Path, kind: str, numbers: list[int], seed: int, typed: int, report: Any = print
) -> dict[str, Any]:
    """Run cases of a kind, "commands" or "data sets", in the workspace `folder`. Return counts and faults."""
    codes: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    (folder / "home").mkdir(exist_ok=True)
    pristine = folder.with_name(f"{folder.name}.pristine")
    if not pristine.exists():
        shutil.copytree(folder, pristine, symlinks=True, copy_function=shutil.copy2)
    for place, number in enumerate(numbers):
        clean(folder)
        if kind == "commands":
            case = random_command(number, seed)
        else:
            case = random_data_set(number, seed, folder / "damaged")
            case = Case(case.script, [word.replace(str(folder / "damaged"), "damaged") for word in case.arguments])
        before = snapshot(folder)
        began = time.monotonic()
        outcome = (run_typed if place >= len(numbers) - typed else run_forked)(case, folder)
        changed = [name for name, status in before.items() if snapshot(folder).get(name) != status]
        fault = outcome.fault or (f"changed or removed {changed[0]}" if changed else None)
        codes[str(outcome.code)] += 1
        if fault:
            line = {
                "kind": kind,
                "number": number,
                "fault": fault,
                "command": [case.script, *case.arguments],
                "output": outcome.output[-1500:],
            }
            faults.append(line)
            report(json.dumps({**line, "output": outcome.output.strip().splitlines()[-1:]}), flush=True)
        if changed:
            restore(folder, pristine)
        if time.monotonic() - began > SECONDS:
            report(f"{kind} {number}: {time.monotonic() - began:.0f} s: {[case.script, *case.arguments]}", flush=True)
        if place % 100 == 99:
            report(f"{kind}: {place + 1} of {len(numbers)}, {len(faults)} faults, codes {dict(codes)}", flush=True)
    clean(folder)
    return {
        "cases": len(numbers),
        "as typed": min(typed, len(numbers)),
        "exit codes": dict(codes.most_common()),
        "faults": faults,
    }


OWN = ("dataset", "photos", "vae", "unet", "copy", "blob", "empty", "tiny.yaml", ".cache", ".dataset", "home")


def clean(folder: Path) -> None:
    """Remove a case's files, except those it was given."""
    for path in folder.iterdir():
        if path.name not in OWN:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def restore(folder: Path, pristine: Path) -> None:
    """Restore the cases' workspace."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(pristine, folder, symlinks=True, dirs_exist_ok=True, copy_function=shutil.copy2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=1000, help="number of random command lines")
    parser.add_argument("--data_sets", type=int, default=1000, help="number of damaged data sets")
    parser.add_argument(
        "--subprocesses",
        type=int,
        default=100,
        help="number of cases, half of each kind, that run in new processes, as users type them",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"), help="run one case and show all that it says")
    parser.add_argument(
        "--workspace", help="folder with dataset/, vae/ and unet/, of which a copy is used (default: make a new one)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the figures in benchmarks/results")
    options = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work" / "here"
        if options.workspace:
            for part in ("dataset", "vae", "unet"):
                shutil.copytree(Path(options.workspace) / part, folder / part)
            (folder / "tiny.yaml").write_text(RECIPE)
            finish_workspace(folder)
        else:
            make_workspace(folder)
        if options.only:
            kind, number = options.only[0].replace("_", " "), int(options.only[1])
            print(json.dumps(run_cases(folder, kind, [number], options.seed, 0), indent=1))
            return
        results = {
            kind: run_cases(folder, kind, list(range(count)), options.seed, options.subprocesses // 2)
            for kind, count in (("commands", options.commands), ("data sets", options.data_sets))
        }
    faults = [fault for result in results.values() for fault in result.pop("faults")]
    share = len(faults) / max(1, options.commands + options.data_sets)
    if options.keep:
        keep("random_inputs", {"ratio": share, "goal": 0.0, **results, "seed": options.seed})
    print(json.dumps({**results, "faults": len(faults)}))
    if faults:
        raise SystemExit(f"{len(faults)} cases ended in another way than promised")


if __name__ == "__main__":
    main()
