"""Prepare the parts of every cloud job: the checked training command, the input folders, and the staged code.

This module imports no torch.
"""

import dataclasses
import hashlib
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from t2i.captions.texts import check_templates
from t2i.command_line import option, plain_option, typed_options
from t2i.config import PACKAGED_NETWORKS, Recipe, parse, read_yaml, with_settings_of_model
from t2i.config_types import checked
from t2i.errors import UserError
from t2i.files import files_below, read_optional, sha256_file, write_text
from t2i.pictures.png import student_steps
from t2i.redaction import holds_token, redact
from t2i.runs import GUIDE, check_finished, code_revision, own_checkpoint

ROOT = Path(__file__).parents[3]

# Sections of the recipe that each training script parses: their arguments are checked before anything is sent.
SECTIONS: dict[str, tuple[str, ...]] = {
    "train_unet.py": ("data", "vae", "unet", "train_unet"),
    "train_vae.py": ("data", "vae", "train_vae"),
    "distill_unet.py": ("data", "distill"),
    "caption_to_hub.py": ("source", "caption"),
}
# Options that may name a local folder: their section of the recipe, and the part of a run folder that is sent.
FOLDERS = {
    "dataset": ("data", ""),
    "vae": ("vae", "vae"),
    "text_encoder": ("unet", "pipeline"),
    "pretrained_model_name_or_path": ("unet", "pipeline"),
    "perceptual_network": ("train_vae", ""),
    "alignment_network": ("train_unet", ""),
    "captioner": ("caption", ""),
    "audit_tokenizer": ("caption", ""),
    "model": ("distill", ""),
}
HUB_ID = r"[\w.-]+(/[\w.-]+)?"  # Old repositories of the Hub have no owner. Pipelines always have one.
AT_HOME = ("make_flowers.py", "generate_images.py", "evaluate_checkpoints.py", "publish_model.py", "publish_space.py",
           "export_pipeline.py", "clean_caches.py", "run_recipe.py", "launch_local.py", "launch_sagemaker.py",
           "run_sagemaker_job.py", "launch_hf_job.py", "run_hf_job.py", "run_container.py", "list_jobs.py")  # fmt: skip
# Files of these folders that a container gets. Others, such as runs, databases and files of tokens, stay here.
SENT = {"scripts": (".py", ".yaml", ".txt", ".md"), "datasets_card": (".md",)}
# Files of a teacher's models that a job gets. Weights in other formats are never read.
SENT_OF_MODELS = (".json", ".txt", ".model", ".safetensors")


# --- The training command --------------------------------------------------------------------------------------------


@dataclass
class Command:
    """A training script with its arguments as typed, and the settings that the arguments give."""

    script: str  # File name of the training script in scripts/.
    arguments: list[str]
    recipe: Recipe | None  # The recipe as the training script will read it. The recipe is None for a user's own script.

    @cached_property
    def teacher(self) -> "Teacher | None":
        """The local model that a distillation learns from, as `find_teacher` found it first, even if its training continues."""
        return find_teacher(self)

    @property
    def settings(self) -> Any:
        """Return the recipe's section of the training script, or None for a user's own script."""
        return getattr(self.recipe, SECTIONS[self.script][-1]) if self.recipe else None

    def has_option(self, name: str) -> bool:
        """Return whether the training script has an option, which is one of `FOLDERS`."""
        section, sections = FOLDERS[name][0], SECTIONS.get(self.script, ())
        return section in sections or (section == "data" and "source" in sections)

    def folder_options(self) -> dict[str, str]:
        """Return the values of the options in `FOLDERS` that are set."""
        values = {
            name: getattr(getattr(self.recipe, FOLDERS[name][0]), name) for name in FOLDERS if self.has_option(name)
        }
        if "captioner" in values:
            values["captioner"] = _sent_captioner(values["captioner"])
        return {name: value for name, value in values.items() if value and value not in PACKAGED_NETWORKS}


def _sent_captioner(captioners: list[str]) -> str:
    """Return the captioner that may be a folder to send, or the first model if there are several captioners.

    Raises:
        UserError: there are several captioners, and one of them is a folder.
    """
    if len(captioners) == 1:
        return captioners[0]
    for name in captioners:
        if name.startswith("s3://") or expand_user(name).exists():
            raise UserError(
                f"--captioner {name} is a folder beside other captioners, and a job gets one; give its Hub id"
            )
    return next((name for name in captioners if name not in ("label", "existing")), captioners[0])


def read_command(words: list[str], cloud: str) -> Command:
    """Check the training script and its arguments by the script's own rules.

    Args:
        words: words of the command line after the options of the launcher: the script and its arguments.
        cloud: name of the cloud in messages.

    Raises:
        UserError: the script cannot run in clouds, or the value of an option is wrong.
        SystemExit: an option is unknown. An unknown option gives exit code 2, as in the training script itself.
    """
    if not words:
        raise UserError(
            "no training script: give one after the options, such as scripts/train_unet.py --config flowers"
        )
    script = Path(words[0])
    if script.resolve().parent != ROOT / "scripts" or script.suffix != ".py":
        raise UserError(
            f"{words[0]} is not a script in {ROOT / 'scripts'}; move the script there, since only that folder is sent"
        )
    if not script.is_file():
        raise UserError(f"{words[0]} does not exist; check its name")
    sections, arguments = SECTIONS.get(script.name), words[1:]
    if any(redact(word) != word for word in [*arguments, " ".join(arguments)]):
        raise UserError(
            "an argument looks like a credential, which the job's log would show; remove it, and export HF_TOKEN or "
            "MLFLOW_TRACKING_PASSWORD in the launching shell"
        )
    if script.name in AT_HOME:
        raise UserError(f"{script.name} runs on your own machine; scripts for {cloud} are {', '.join(SECTIONS)}")
    distils = "distill" in (sections or ())
    words = with_settings_of_model(arguments) if distils else arguments
    recipe = parse(sections, f"{script.name}, before it is sent to {cloud}", words) if sections else None
    if recipe and distils and not recipe.distill.model:
        raise UserError("no model: give --model with the run folder of train_unet.py, whose denoiser is distilled")
    if recipe:
        check_templates(recipe.data.caption_template)
    command = Command(script.name, arguments, recipe)
    settings = [file for file in command.teacher.files if file.suffix == ".yaml"] if distils and command.teacher else []
    own = recipe_file(words)
    for file in [*([Path(own)] if own else []), *settings]:
        if redact(text := file.read_text(encoding="utf-8")) != text:
            raise UserError(f"{file} holds what looks like a credential, and would be sent to the cloud; remove it")
    return command


def recipe_file(arguments: list[str]) -> str | None:
    """Return the recipe file that `--config` names if it is a user's own file, otherwise None."""
    config = option(arguments, "config")
    return config if config and Path(config).suffix else None


def container_arguments(command: Command, inputs: dict[str, str], channels: str, run: str, cache: str) -> list[str]:
    """Return the typed arguments, followed by options with the paths in the container, which override typed paths.

    Args:
        inputs: input folders by the name of their option.
        channels: folder in the container that holds one folder per input.
        run: path of the run folder in the container.
        cache: path of the folder for caches in the container.
    """
    words = list(command.arguments)
    sent = [name for name in FOLDERS if name in inputs and command.has_option(name)]
    if "captioner" in sent:  # this option collects its values, so the path in the container must stand alone
        typed = typed_options(words)
        words = [word for name, _, parts in typed if plain_option(name) != "captioner" for word in parts]
    if recipe_file(words):
        words += ["--config", "recipe.yaml"]
    teacher = command.teacher
    places = {"model": PurePosixPath("model", teacher.path)} if teacher else {}
    words += [word for name in sent for word in (f"--{name}", f"{channels}/{places.get(name, name)}")]
    if command.recipe:
        words += ["--output_dir", run]
        if "data" in SECTIONS[command.script]:
            words += ["--cache_dir", cache]
    return words


# --- Inputs ----------------------------------------------------------------------------------------------------------


def find_inputs(command: Command) -> dict[str, str]:
    """Return the local folders and s3:// folders that the command's options and recipe name, by option."""
    inputs = {}
    for name, value in command.folder_options().items():
        part = FOLDERS[name][1]
        folder = expand_user(value)
        if value.startswith("s3://"):
            inputs[name] = value
        elif name == "model" and (teacher := command.teacher):
            inputs[name] = str(teacher.folder)
        elif folder.is_dir():
            inner_folders = [folder / part, folder / "pipeline" / part] if part else []
            inputs[name] = str(next((inner for inner in inner_folders if inner.is_dir()), folder.resolve()))
        elif folder.exists():
            raise UserError(f"--{name} {value} is a file; give the folder that holds it")
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+" if name == "model" else HUB_ID, value) or value.startswith("."):
            raise UserError(f"--{name} {value} does not exist; give a local folder, an s3:// folder or a Hub id")
    return inputs


def expand_user(value: str) -> Path:
    """Return a path with `~` expanded, or unchanged if the user after `~` does not exist."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


@dataclass
class Teacher:
    """A model on this machine that a distillation learns from, as its job needs it."""

    folder: Path  # Folder of the files. The job sees them at the same paths in a folder of its own.
    path: str  # Path of the model in this folder. "." is the folder itself.
    files: list[Path]  # The files that are sent.

    @property
    def names(self) -> list[str]:
        """Return the paths of the files in the folder."""
        return [file.relative_to(self.folder).as_posix() for file in self.files]


def find_teacher(command: Command) -> Teacher | None:
    """Return the teacher that `--model` names, or None if the command has none on this machine.

    Of a run, its settings, the choice of its evaluation and its pipeline are sent. A checkpoint's averaged weights take
    the place of the pipeline's.

    Raises:
        UserError: the folder holds no denoiser, a student, or a run that has not finished.
    """
    value = command.folder_options().get("model", "")
    folder = expand_user(value).absolute()
    folder = own_checkpoint(folder.parent, str(folder))
    if not value or not folder.is_dir():
        return None
    check_finished(folder)
    home, pipeline, checkpoint = folder, folder / "pipeline", None
    if (folder / "model_index.json").is_file():  # the run around a pipeline has its settings
        home, pipeline = folder.parent if (folder.parent / "config.yaml").is_file() else folder, folder
    elif (folder / "state.json").is_file():
        home, pipeline, checkpoint = folder.parent, folder.parent / "pipeline", folder
    averaged = checkpoint is not None and (checkpoint / "unet_ema").is_dir()
    unet = (checkpoint or pipeline) / ("unet_ema" if averaged else "unet")
    needed = [*([folder / "run.json"] if folder not in (pipeline, checkpoint) else []), unet / "config.json"]
    needed += [pipeline / "vae" / "config.json"]
    if missing := next((file for file in needed if not file.is_file()), None):
        raise UserError(
            f"--model {value} lacks {missing}; give a run folder of train_unet.py, one of its checkpoints, or a whole pipeline"
        )
    if student_steps(read_optional(pipeline / "scheduler" / "scheduler_config.json")):
        raise UserError(f"{value} is a student already; give --model with the run that it was distilled from")
    index = {} if checkpoint else read_optional(pipeline / "model_index.json")
    parts = [name for name, kind in index.items() if isinstance(kind, list)]
    parts = parts or ["vae", "text_encoder", "tokenizer", "scheduler"]
    models = [unet, *(pipeline / name for name in (*parts, GUIDE) if name != "unet")]
    files = [file for model in models for file in model.rglob("*") if file.suffix in SENT_OF_MODELS]
    about = ("state.json", "manifest.json") if checkpoint else ("model_index.json",)
    files += [(checkpoint or pipeline) / name for name in about]
    files += [home / name for name in ("config.yaml", "run.json", "evaluation/evaluation.json")]
    path = (checkpoint or folder).relative_to(home).as_posix()
    return Teacher(home, path, [file for file in files if file.is_file()])


def hash_inputs(command: Command, inputs: dict[str, str]) -> dict[str, tuple[str, list[Path]]]:
    """Return `hash_folder` of each local folder in `inputs`, by option. Only the files that are sent are hashed."""
    teacher = command.teacher
    files = {"model": teacher.files} if teacher else {}
    local = {name: Path(value) for name, value in inputs.items() if "://" not in value}
    return {name: hash_folder(folder, files.get(name)) for name, folder in local.items()}


def hash_folder(folder: Path, files: list[Path] | None = None) -> tuple[str, list[Path]]:
    """Hash the content of a folder. Uploads are named by this hash, so that equal folders are sent once.

    Args:
        files: files of the folder to hash. With None, all files but hidden ones.

    Returns:
        The first 16 hex digits of the hash over paths and contents, and the hashed files, with those of linked folders.
            Hidden files of the folder are skipped.
    """
    found = files_below(folder) if files is None else sorted(path for path in files if path.is_file())
    files = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder} holds no files; give a folder with files")
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
    return total.hexdigest()[:16], files


# --- YAML files of accelerate ----------------------------------------------------------------------------------------


def read_inside(path: Path) -> dict[str, Any]:
    """Read the accelerate YAML for the containers. A YAML for a cloud or for an unsupported kind of ZeRO raises `UserError`."""
    values = read_mapping(path)
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise UserError(
            f"--inside {path} describes a cloud; name a YAML for the job's machines, such as deepspeed_zero2.yaml"
        )
    zero = values.get("deepspeed_config") or {}
    if values.get("distributed_type") == "DEEPSPEED" and (not isinstance(zero, dict) or zero.get("zero_stage") != 2):
        raise UserError(
            f"--inside {path}: deepspeed_config needs zero_stage: 2, and no separate DeepSpeed file; use deepspeed_zero2.yaml"
        )
    return values


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values. A file with other content raises `UserError`."""
    try:
        values = read_yaml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give an accelerate YAML") from None
    if values is None:
        raise UserError(
            f"{path} is empty; give keys such as compute_environment, mixed_precision and num_machines, or write them with "
            f"accelerate config --config_file {path}"
        )
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, not {str(values)[:40]!r}; write key: value, one per line")
    return values


def read_keys(cls: Any, path: Path) -> Any:
    """Return a dataclass made of those keys of a YAML file that it has. The file may have mistakes in other keys."""
    names = {item.name for item in dataclasses.fields(cls) if item.init}
    values = {key: value for key, value in read_mapping(path).items() if key in names and value is not None}
    return checked(cls, values, str(path))


# --- What is sent ----------------------------------------------------------------------------------------------------


def stage(folder: Path, command: Command, inside: Path) -> None:
    """Write the files that every container gets: scripts/, templates of cards, the inner YAML, the recipe and the revision.

    The requirements get the package of the tracker in `report_to`.

    Raises:
        UserError: a file holds a token, which everybody with access to the job's files could read.
    """
    for name, suffixes in SENT.items():
        shutil.copytree(ROOT / name, folder / name, ignore=partial(_left_out, suffixes))
    for file in sorted(folder.rglob("*")):
        if file.is_file() and holds_token(file.read_text(encoding="utf-8", errors="replace")):
            raise UserError(
                f"{file.relative_to(folder)} holds what looks like a token, and would be sent to the cloud; remove it there"
            )
    shutil.copyfile(inside, folder / "accelerate.yaml")
    tracker = getattr(command.settings, "report_to", "none")
    if tracker not in ("none", "mlflow"):  # other jobs need no such package
        pinned = ""
        with suppress(PackageNotFoundError):
            pinned = f"=={version(tracker)}"
        with open(folder / "scripts" / "requirements.txt", "a", encoding="utf-8") as requirements:
            requirements.write(f"{tracker}{pinned}  # --report_to {tracker}\n")
    if recipe := recipe_file(command.arguments):
        shutil.copyfile(recipe, folder / "recipe.yaml")
    write_text(folder / "REVISION", code_revision() + "\n")


def _left_out(suffixes: tuple[str, ...], folder: str, names: list[str]) -> set[str]:
    """Return the names in a folder that are not sent: hidden ones, links, runs, and files with other suffixes."""
    paths = {name: Path(folder, name) for name in names}
    return {
        name
        for name, path in paths.items()
        if name.startswith((".", "__pycache__")) or name == "outputs" or path.is_symlink()
        or not (path.is_dir() or path.suffix in suffixes)
    }  # fmt: skip
