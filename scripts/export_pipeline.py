"""Compile a model for fast pictures on a CPU, and write the compiled models into its pipeline folder.

python scripts/export_pipeline.py --model outputs/demo/unet

A part of the model computes in 8 bits if measured pictures stay nearly the same. The script prints the measured quality
of the 8-bit pictures. After the export, generate_images.py and the dashboard draw by the compiled models. Publishing
the model publishes its compiled models too. After another training, the compiled models are no longer valid. Run this
script again to replace invalid compiled models. It does not compile valid ones again.
"""

from dataclasses import dataclass
from pathlib import Path

from t2i.command_line import check_options, parse_options
from t2i.config import Recipe, load_recipe
from t2i.config_types import PathText
from t2i.errors import UserError, run_main
from t2i.files import read_json, read_object


@dataclass
class Options:
    """Options of compiling a model."""

    model: PathText | None = None  # Run folder of train_unet.py, or a pipeline folder; this option is required.


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    if not options.model:
        raise UserError("no model: give --model with a run folder of train_unet.py, or a pipeline folder")
    path = Path(options.model).expanduser()
    found = [folder for folder in (path, path / "pipeline") if (folder / "model_index.json").is_file()]
    if not found:
        raise UserError(f"{path} holds no pipeline (no model_index.json in it or in pipeline/); let training finish")
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    from t2i.pictures import engines, quantization, sampling
    from t2i.pictures.png import student_steps

    run = found[0].resolve().parent
    trained = (run / "run.json").is_file() and (run / "config.yaml").is_file()
    recipe = load_recipe(str(run / "config.yaml")) if trained else Recipe()
    schedule = read_object(found[0] / "scheduler" / "scheduler_config.json")
    scale = 1.0 if student_steps(schedule) else recipe.train_unet.guidance_scale
    folder = found[0] / engines.FOLDER
    if quantization.is_current(found[0], scale):
        print(f"reusing the compiled models in {folder}: {quality(folder)}")
        return
    quantization.export(sampling.load_pipeline(found[0]), found[0], scale)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"compiled models of {size / 1e6:.0f} MB in {folder}: {quality(folder)}")


def quality(folder: Path) -> str:
    """Return what of the compiled models in a folder computes in 8 bits, and how near their pictures are to others."""
    known = read_json(folder / "engine.json")
    scale = f"at guidance scale {known['guidance_scale']:g}"
    if not known["int8"]:
        return f"none in 8 bits, {scale}"
    return (
        f"{' and '.join(known['int8'])} in 8 bits, pictures within {known['psnr_db']} dB PSNR of those without, {scale}"
    )


if __name__ == "__main__":
    run_main(main)
