"""Run all stages of a recipe: data, autoencoder, denoiser, evaluation, report. `make demo` runs the recipe `demo`.

python scripts/run_recipe.py --config scripts/recipes/demo.yaml --output_dir outputs/demo

Each stage is a command that you can run yourself. The command of a stage is printed before it runs. Finished stages of
an earlier run are reused. Settings that cannot work together are refused before the first stage.

Any key of the recipe can be set by --SECTION.KEY, such as --train_unet.max_train_steps 20. The sections are data, vae,
unet, train_vae, train_unet and evaluate.
"""

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro

from t2i.command_line import check_options, parse_options, plain_option, typed_options
from t2i.config import (
    PACKAGED_NETWORKS,
    Recipe,
    check_dataset,
    check_optimizer,
    check_report_to,
    check_unet,
    check_vae,
    load_recipe,
    override,
    read_yaml,
)
from t2i.config_types import LocalPath, PathText, known_key
from t2i.errors import UserError, run_main
from t2i.evaluation.figures import attribute_names, chance_closer
from t2i.files import read_json, read_optional, write_json
from t2i.launch_config import check_launch_config
from t2i.loading import find_model
from t2i.runs import own_checkpoint
from t2i.training.distributed import NO_FP16
from t2i.training.stopping import EXIT_STOPPED

# t2i.data, t2i.hub and transformers are imported in functions: they take seconds, and most runs do without them.
SCRIPTS = Path(__file__).parent
SECTIONS = ("data", "vae", "unet", "train_vae", "train_unet", "evaluate")  # the sections that stages read
# Options of the stages that run_recipe.py sets itself, and what to do instead of setting them.
SET_HERE = {
    "output_dir": "give --output_dir",
    "dataset": "give --dataset",
    "dataset_name": "give --dataset",
    "train_data_dir": "give --dataset",
    "model": "leave it out",
    "dry_run": "leave it out",
}
VAE_OPTIONS = (
    "vae",
    "pretrained_vae_model_name_or_path",
    "vae_revision",
)  # The denoiser gets the autoencoder made here.
# exit codes of a stage after Ctrl-C or SIGTERM: before its first step, after saving a checkpoint, and ended by the signal
RESUMABLE = (130, EXIT_STOPPED, 143, -signal.SIGINT, -signal.SIGTERM)


@dataclass
class Options:
    """Options of running a recipe."""

    config: str = "demo"  # Recipe: a YAML file, or the name of one in scripts/recipes.
    output_dir: LocalPath = "outputs/demo"  # Folder for the results of all stages.
    # Data set: a Hub id, a dataset folder or an imagefolder. Without a data set, flowers are drawn.
    dataset: Annotated[PathText | None, tyro.conf.arg(aliases=["--dataset_name", "--train_data_dir"])] = None
    # accelerate's YAML for the trainings. Without a YAML, train on this CPU, and the denoiser in bf16 if the CPU
    # computes in bf16.
    accelerate_config: PathText | None = None


def main() -> None:
    plain_words, overrides = take_overrides(sys.argv[1:])
    options = check_options(parse_options(Options, __doc__ or "", plain_words))
    recipe = load_recipe(options.config)
    if options.dataset:
        override(recipe, "data", ["--dataset", options.dataset])
    for section, words in overrides.items():
        override(recipe, section, [word for option in words for word in option])
    check_stages(recipe, options)
    folder = Path(options.output_dir)
    dataset = recipe.data.dataset or str(folder / "dataset")
    if not recipe.data.dataset:
        size = str(recipe.data.resolution)
        drawing = python("make_flowers.py", "--output_dir", dataset, "--size", size)
        stage("draw", "drawing flowers", drawing, folder, folder / ".dataset" / "run.json")
    common = ["--config", options.config, "--dataset", dataset]
    vae, unet = folder / "vae", folder / "unet"
    config = options.accelerate_config or str(SCRIPTS.parent / "accelerate_configs" / "cpu.yaml")
    quiet_launcher(config)
    if options.dataset and not (vae / "run.json").is_file():
        from t2i.data.preparing import load_splits

        # The autoencoder needs no captions. A data set without captions is refused before its hours of training.
        load_splits(recipe.data, say=lambda _: None)
    changed = options_of(overrides, "data", "vae", "train_vae")
    training = launch([config], "train_vae.py", *common, "--output_dir", str(vae), *changed)
    stage("train_vae", "training the autoencoder", training, folder, vae / "run.json")
    set_already = options.accelerate_config or recipe.train_unet.mixed_precision
    bf16 = [] if set_already or not computes_in_bf16() else ["--mixed_precision", "bf16"]
    changed = options_of(overrides, "data", "vae", "unet", "train_unet", without=VAE_OPTIONS)
    training = launch([config, *bf16], "train_unet.py", *common, "--vae", str(vae), "--output_dir", str(unet), *changed)
    stage("train_unet", "caching, then training the denoiser", training, folder, unet / "run.json")
    changed = options_of(overrides, "data", "evaluate")
    evaluation = python("evaluate_checkpoints.py", *common, "--model", str(unet), *changed)
    stage("evaluate", "evaluating", evaluation, folder, unet / "evaluation" / "run.json")

    report = make_report(folder)
    write_json(folder / "report.json", report)
    print_table(report, folder)


def take_overrides(argv: list[str]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Separate the options `--section.key` from a command line.

    Returns:
        First, the words of the command line except options `--section.key`. Second, the options `--section.key` of each
            section, as options of the section's script.

    Raises:
        UserError: no stage has the section, or run_recipe.py sets the option itself.
    """
    plain_words: list[str] = []
    overrides: dict[str, list[list[str]]] = {}
    for word, values, typed in typed_options(argv):
        section, dot, key = plain_option(word).partition(".")
        if not dot or not word.startswith("--"):
            plain_words += typed
            continue
        known_key(section, dict.fromkeys(SECTIONS), f"section of option {word}")
        if key in SET_HERE:
            raise UserError(f"{word}: run_recipe.py sets it for each stage; {SET_HERE[key]}")
        overrides.setdefault(section, []).append([f"--{key}", *values])
    return plain_words, overrides


def options_of(overrides: dict[str, list[list[str]]], *sections: str, without: tuple[str, ...] = ()) -> list[str]:
    """Return the command-line words that override some sections, for the script that reads these sections."""
    options = (words for section in sections for words in overrides.get(section, []))
    return [word for words in options if plain_option(words[0]) not in without for word in words]


def check_stages(recipe: Recipe, options: Options) -> None:
    """Refuse settings before the first stage if a later stage would refuse these settings, perhaps after hours."""
    check_vae(recipe)
    check_unet(recipe)
    if recipe.data.dataset:
        check_dataset(recipe.data.dataset)
    if options.accelerate_config:
        check_launch_config(Path(options.accelerate_config), "--accelerate_config")
        check_optimizer(recipe.train_unet.optimizer, read_yaml(Path(options.accelerate_config)))
    folder, resume = Path(options.output_dir), recipe.train_unet.resume_from_checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    went_back = read_optional(folder / "unet" / "run.json").get("went_back") or {}  # of `t2i.training.loop.went_back`
    is_new = resume not in (None, "latest") and Path(resume).name != went_back.get("checkpoint")
    if is_new and not own_checkpoint(folder / "unet", str(resume)).is_dir():
        raise UserError(
            f"resume_from_checkpoint {resume}: {folder / 'unet'} has no such checkpoint; name one of its checkpoints, or latest"
        )
    for name, option, revision in (
        (recipe.vae.vae, "vae", recipe.vae.vae_revision),
        (recipe.unet.text_encoder, "text_encoder", recipe.unet.text_encoder_revision),
        (recipe.unet.pretrained_model_name_or_path, "pretrained_model_name_or_path", recipe.unet.revision),
    ):
        if name:
            find_model(name, option, revision)
    for training in (recipe.train_vae, recipe.train_unet):
        check_report_to(training.report_to)
        if training.mixed_precision == "fp16" and not options.accelerate_config:
            raise UserError(NO_FP16)  # Without --accelerate_config, the recipe runs on the CPU.
    aligned = recipe.train_unet.alignment_network if recipe.train_unet.alignment_weight else None
    networks = {
        "judge_network": (recipe.evaluate.judge_network, "evaluate"),
        "clip": (recipe.evaluate.clip, "evaluate"),
        "alignment_network": (aligned, "train_unet"),
    }
    for key, (source, section) in networks.items():
        if source and (source not in PACKAGED_NETWORKS or key == "clip"):
            from transformers import AutoConfig
            from transformers.utils import cached_file

            try:
                AutoConfig.from_pretrained(source)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(f"{key} {source} in section {section} cannot be read ({reason}); correct it") from None
            names = ("preprocessor_config.json", "processor_config.json")
            if not any(cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names):
                raise UserError(
                    f"{key} {source} in section {section} has no {names[0]}, so it reads no images; give a model of images"
                )
    if recipe.evaluate.engine == "openvino" and importlib.util.find_spec("openvino") is None:
        raise UserError(
            "engine openvino in section evaluate needs OpenVINO; run: pip install -r requirements.txt, or set engine: auto"
        )
    if recipe.train_unet.push_to_hub:
        from t2i.hub import upload

        target = upload.Target(recipe.train_unet.hub_revision, recipe.train_unet.create_pr)
        upload.check_access(
            upload.check_repo_id(recipe.train_unet.hub_model_id, "--hub_model_id"), "model", target=target
        )


def python(script: str, *arguments: str) -> list[str]:
    """Return the command that runs a script in scripts/."""
    return [sys.executable, str(SCRIPTS / script), *arguments]


def launch(config: list[str], script: str, *arguments: str) -> list[str]:
    """Return the command that launches a training by an accelerate config.

    Args:
        config: path of the accelerate config, followed by further options of the launcher.
        script: file name of the training script.
        arguments: arguments of the training script.
    """
    accelerate = [sys.executable, str(SCRIPTS / "launch_local.py"), "--config_file", *config]
    return [*accelerate, str(SCRIPTS / script), *arguments]


def computes_in_bf16() -> bool:
    """Return whether the CPU has instructions for bf16.

    Without such instructions bf16 is slower than fp32. On systems other than Linux, the result is False.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def quiet_launcher(config: str) -> None:
    """On a CPU, set the environment variables that accelerate's launcher would otherwise warn about at each stage."""
    path = Path(config)
    if path.is_file() and "use_cpu: true" in path.read_text(encoding="utf-8"):
        values = read_yaml(path)
        processes = max(int(values.get("num_processes") or 1) // int(values.get("num_machines") or 1), 1)
        threads = max((psutil.cpu_count(logical=False) or 1) // processes, 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # the launcher's own choice
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def stage(name: str, title: str, command: list[str], folder: Path, marker: Path) -> None:
    """Run a stage of the recipe, with the stage's output on this terminal.

    Args:
        name: name of the stage in stages.json, where its seconds are added up, also those before an interruption.
        title: description of the stage, to be printed.
        command: command line of the stage.
        folder: folder that holds stages.json.
        marker: file that the stage writes only if the stage does any work.

    Raises:
        SystemExit: the stage was interrupted and has saved its state.
        UserError: the stage of the recipe has failed.
    """
    print(f"\n== {title}\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    before = marker.stat().st_mtime_ns if marker.is_file() else None
    is_new, start = not marker.parent.is_dir(), time.perf_counter()
    code = wait_for(subprocess.Popen(command))
    if code or (marker.is_file() and marker.stat().st_mtime_ns != before):
        seconds = read_optional(folder / "stages.json")
        earlier = 0.0 if is_new else seconds.get(name, 0.0)
        write_json(folder / "stages.json", {**seconds, name: round(earlier + time.perf_counter() - start, 1)})
    if code in RESUMABLE:
        print(f"interrupted while {title}: the same command resumes", file=sys.stderr)
        raise SystemExit(code if code > 0 else EXIT_STOPPED)
    if code:
        raise UserError(
            f"{title} ended with exit code {code}; fix the error above and run the same command again: "
            "finished stages are kept"
        )


def wait_for(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the process of a stage, and return the exit code of the process.

    On Ctrl-C or SIGTERM, run_recipe.py waits until the stage, which gets the signal too, has saved its state.
    """

    def pass_on(number: int, frame: Any) -> None:
        # A terminal sends Ctrl-C to the stage as well, and so does Windows.
        if number != signal.SIGINT or not (os.name == "nt" or sys.stdin.isatty()):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_report(folder: Path) -> dict[str, Any]:
    """Return the results of all stages of a recipe.

    The time of a stage is that of all runs that worked on it, and its memory that of the last one.
    """
    vae, unet = read_json(folder / "vae" / "run.json"), read_json(folder / "unet" / "run.json")
    evaluation = read_json(folder / "unet" / "evaluation" / "run.json")
    return {
        "seconds": read_optional(folder / "stages.json"),  # Without a file, the stages were run one by one.
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in (vae, unet, evaluation)),
        "vae": {key: vae.get(key) for key in ("psnr_db", "ssim", "test_psnr_db", "test_ssim")},
        "unet": {key: unet[key] for key in ("train_loss", "val_loss", "steps")},
        **evaluation["report"],
        "pipeline": str(folder / "unet" / "pipeline"),
    }


def print_table(report: dict[str, Any], folder: Path) -> None:
    """Print the main results, the paths of pictures and pipeline, and the command that opens the dashboard."""
    print("\n== results")
    for name, value in report["seconds"].items():
        print(f"  {name:<28}{value / 60:8.1f} min")
    print(f"  {'peak memory':<28}{report['peak_rss_bytes'] / 1e9:8.2f} GB")
    print(f"  {'VAE on validation':<28}{report['vae']['psnr_db']:8.2f} dB")
    print(f"  {'chosen guidance scale':<28}{report['guidance_scale']:8.1f}")
    print(f"  {'as prompted':<28}{'share':>8}   accuracy on photos or drawings")
    for key, name in attribute_names(report["prompt_following"]).items():
        share, probe = report["prompt_following"][key], report["probe_accuracy"].get(key)
        print(f"    {name:<26}{share:8.1%}   {f'{probe:.1%}' if probe is not None else ''}")
    if report["memorisation"]:
        title = f"memorised (chance: {chance_closer(report['unseen_images']):.1%})"
        print(f"  {title:<28}{report['memorisation']['share_closer']:8.1%}")
    if report["judge"]:
        distances = {name: report["judge"][name]["kernel_distance"] for name in ("pictures", "reconstructions", "real")}
        print(f"  {'kernel distance (judge)':<28}{distances['pictures']:8.1f}", end="")
        print(f"   reconstructions: {distances['reconstructions']:.1f}, real images: {distances['real']:.1f}")
    print(f"\npictures: {folder / 'unet' / 'evaluation'}/*.png   report: {folder / 'report.json'}")
    print(f"pipeline for diffusers: {report['pipeline']}")
    print("compare checkpoints and guidance scales: .venv/bin/streamlit run dashboard   (or: make dashboard)")


if __name__ == "__main__":
    run_main(main)
