"""Run a whole recipe: data, autoencoder, denoiser, evaluation, report. `make demo` is this with the recipe `demo`.

python scripts/run_recipe.py --config scripts/recipes/demo.yaml --output_dir outputs/demo

Each stage is one of the commands that the README names, printed before it runs. A finished stage is reused.
"""

import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from t2i.config import check_options, load_recipe, parse_options
from t2i.runs import UserError, hash_json, read_json, run_main, write_json

SCRIPTS = Path(__file__).parent


@dataclass
class Options:
    """The run."""

    config: str = "demo"  # recipe: a YAML file, or the name of one in scripts/recipes
    output_dir: str = "outputs/demo"  # everything goes below it
    dataset: Annotated[str | None, tyro.conf.arg(aliases=["--dataset_name", "--train_data_dir"])] = (
        None  # Hub id, dataset folder or imagefolder; None: flowers are drawn
    )
    accelerate_config: str = "accelerate_configs/cpu.yaml"  # machine, processes and precision of the trainings


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    recipe = load_recipe(options.config)
    folder = Path(options.output_dir)
    dataset = options.dataset or recipe.data.dataset or str(folder / "dataset")
    report_file = folder / "report.json"
    earlier = read_json(report_file) if report_file.is_file() else {}
    seconds: dict[str, float] = {}

    if not (options.dataset or recipe.data.dataset):
        size = str(recipe.data.resolution)
        seconds["draw"] = stage("drawing flowers", python("make_flowers.py", "--output_dir", dataset, "--size", size))
    common = ["--config", options.config, "--dataset", dataset]
    vae, unet = str(folder / "vae"), str(folder / "unet")
    seconds["train_vae"] = stage(
        "training the autoencoder", launch(options, "train_vae.py", *common, "--output_dir", vae)
    )
    seconds["train_unet"] = stage(
        "caching, then training the denoiser",
        launch(options, "train_unet.py", *common, "--vae", vae, "--output_dir", unet),
    )
    seconds["evaluate"] = stage("evaluating", python("evaluate_checkpoints.py", *common, "--model", unet))

    report = make_report(folder, seconds, earlier)
    write_json(report_file, report)
    print_table(report, folder)


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *arguments]


def launch(options: Options, script: str, *arguments: str) -> list[str]:
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        options.accelerate_config,
    ]
    return [*accelerate, str(SCRIPTS / script), *arguments]


def stage(title: str, command: list[str]) -> float:
    """Run a stage, its output on this terminal; return its seconds. Ends this run when the stage fails."""
    print(f"\n== {title}\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command).returncode
    if code:
        raise UserError(
            f"{title} ended with exit code {code}; mend what it said above and run the same command again: finished stages are kept"
        )
    return round(time.perf_counter() - start, 1)


def make_report(folder: Path, seconds: dict[str, float], earlier: dict[str, Any]) -> dict[str, Any]:
    """What the stages found, in one file. Reused stages keep the seconds and memory of the run that did the work."""
    vae, unet = read_json(folder / "vae" / "run.json"), read_json(folder / "unet" / "run.json")
    evaluation = read_json(folder / "unet" / "evaluation" / "evaluation.json")
    inputs = hash_json([vae["identity"], unet["identity"], evaluation["identity"]])
    reused = earlier.get("inputs") == inputs
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "seconds": earlier["seconds"] if reused else seconds,
        "peak_rss_bytes": earlier["peak_rss_bytes"] if reused else peak,
        "vae": {key: vae.get(key) for key in ("psnr_db", "ssim", "test_psnr_db", "test_ssim")},
        "unet": {key: unet[key] for key in ("train_loss", "val_loss", "steps")},
        **evaluation["report"],
        "pipeline": str(folder / "unet" / "pipeline"),
        "inputs": inputs,
    }


def print_table(report: dict[str, Any], folder: Path) -> None:
    """The results in short, where the pictures are, and the command that opens the dashboard."""
    print("\n== results")
    for name, value in report["seconds"].items():
        print(f"  {name:<28}{value / 60:8.1f} min")
    print(f"  {'peak memory':<28}{report['peak_rss_bytes'] / 1e9:8.2f} GB")
    print(f"  {'VAE on validation':<28}{report['vae']['psnr_db']:8.2f} dB")
    print(f"  {'chosen guidance scale':<28}{report['guidance_scale']:8.1f}")
    print(f"  {'reads off the pictures':<28}{'right':>8}   classifier alone")
    for name, share in report.get("prompt_following", {}).items():
        known = report["probe_accuracy"].get(name)
        print(f"    {name.replace('_', ' '):<26}{share:8.1%}   {f'{known:.1%}' if known is not None else ''}")
    if report.get("memorisation"):
        print(f"  {'memorised (chance: 1 %)':<28}{report['memorisation']['share_closer']:8.1%}")
    print(f"\npictures: {folder / 'unet' / 'evaluation'}/*.png   report: {folder / 'report.json'}")
    print(f"pipeline for diffusers: {report['pipeline']}")
    print("compare checkpoints and guidance scales: .venv/bin/streamlit run dashboard   (or: make dashboard)")


if __name__ == "__main__":
    run_main(main)
