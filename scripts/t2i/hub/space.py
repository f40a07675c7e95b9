"""Build and push a Space for a model: the dashboard's playground page, the page's requirements, and the model.

This module imports no torch.

The files of the Space are found by following the imports of the page. The staged folder is a complete Docker Space. The
command in the Space's Dockerfile starts the Space on any machine.
"""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import constants, snapshot_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from t2i.errors import UserError
from t2i.files import read_json, share_weights, write_json, write_text
from t2i.hub import model_card, upload
from t2i.hub.dataset_card import merge_cards
from t2i.hub.markdown import one_line
from t2i.hub.publish import pipeline_files
from t2i.loading import explain_loading
from t2i.redaction import redact
from t2i.runs import GUIDE, guide_folder

ROOT = Path(__file__).parents[3]
STAGED = Path("outputs/spaces")  # Spaces are staged here, each in its folder ORG/NAME
PAGES = ("dashboard/streamlit_app.py", "dashboard/views/playground.py")  # the pages of a Space
SETTINGS = "dashboard/.streamlit/config.toml"
FILES = ("Dockerfile", "README.md", "requirements.txt", "constraints.txt", SETTINGS, "dashboard/*.py", "dashboard/assets/*",
         "scripts/t2i/*.py", "scripts/t2i/*/*.py", "outputs/*/pipeline/*", "outputs/*/config.yaml",
         "outputs/*/evaluation/evaluation.json")  # fmt: skip # what is pushed; pictures drawn in the folder are not
# Packages that a Space does without if they are imported inside functions: they serve trainings, stores of metrics and data
# sets. It needs openvino only if compiled models come along; nncf makes these elsewhere. sqlalchemy belongs to mlflow.
LEFT_OUT = ("accelerate", "mlflow", "sqlalchemy", "datasets", "torchmetrics", "openvino", "nncf")
COMPILED = "openvino"  # a pipeline's folder of models that `make export` compiled, in OpenVINO's format
COMPILED_SUFFIXES = (".xml", ".bin")
PACKAGES = {"PIL": "pillow", "yaml": "PyYAML"}  # imports whose name in requirements.txt differs
SPACE_BYTES = 1_000_000_000  # the Hub's limit of a Space, for all its commits together
MODEL_SUFFIXES = (".safetensors", ".json", ".txt")  # no pickles and no code
VARIANTS = re.compile(r"\.(fp16|bf16|non_ema)\.")  # second copies of the weights, which are not loaded

# The Hub's Streamlit template (spaces/streamlit/streamlit-template-space) with the user that the Hub's manual asks for. The
# template's apt-get is left out: only wheels are installed, and the health check needs no curl.
DOCKERFILE = """\
FROM python:3.11-slim

# The Hub runs containers as user 1000.
RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user PATH=/home/user/.local/bin:$PATH
WORKDIR /home/user/app

# torch for CPUs: PyPI's torch brings several GB of CUDA. If this index cannot be reached, pip uses PyPI's.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --chown=user requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --requirement requirements.txt --constraint constraints.txt
COPY --chown=user . .

# Only in the container: the Hub's proxy connects from outside and decides which names lead here. Elsewhere,
# dashboard/.streamlit limits the same command to its machine. XSRF protection stays on: its cookie is needed only for
# uploads, which this app does not have. An iframe of huggingface.co does not send it.
ENV STREAMLIT_SERVER_ADDRESS=0.0.0.0 STREAMLIT_SERVER_ALLOWED_HOSTS=*
# A free Space has two cores, however many the processor reports. All files are in the container.
ENV OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1

EXPOSE 8501
HEALTHCHECK CMD python -c "import urllib.request; urllib.request.urlopen('http://localhost:8501/_stcore/health')"
ENTRYPOINT ["streamlit", "run", "dashboard", "--server.port=8501", "--server.headless=true"]
"""


@dataclass
class Model:
    """The model of a Space: pipeline folder, name and files."""

    folder: Path
    # Name of the model, as the user gave it. For an absolute path or a path with "..", the name is only the last part
    # of the path.
    name: str
    hub_id: str | None
    files: list[str]  # Paths of the model's files and its card, relative to `folder`.


# --- The model -------------------------------------------------------------------------------------------------------


def find_model(model: str | None) -> Model:
    """Return the pipeline that `model` names: a run folder, a pipeline folder, or a Hub id, which is downloaded.

    Raises:
        UserError: The pipeline does not exist, or it has no safetensors weights.
    """
    if not model:
        raise UserError("no model: give --model with a run folder of train_unet.py or a Hub id ORG/NAME")
    path = Path(model).expanduser()
    repo_id = None if path.exists() else model_card.hub_id(model)
    if repo_id:
        folder = _download(repo_id)
    elif (path / "model_index.json").is_file():
        folder = path
    elif (path / "pipeline" / "model_index.json").is_file():
        folder = path / "pipeline"
    elif path.is_dir():
        raise UserError(
            f"{model} holds no pipeline (no pipeline/model_index.json); give a run folder of train_unet.py, or a Hub id"
        )
    else:
        raise UserError(f"model {model} is neither a folder here nor a Hub id of the form ORG/NAME; correct the path")
    components = _components(folder, model)
    files = _model_files(folder)
    for part in ("unet", "vae", "text_encoder", *([GUIDE] if guide_folder(folder) else [])):
        weights = [file for file in files if file.startswith(f"{part}/") and file.endswith(".safetensors")]
        if part not in (*components, GUIDE) or not weights:
            raise UserError(
                f"{model} has no safetensors weights of its {part}; let training finish, or copy the complete folder"
            )
        for file in weights:
            _check_weights(folder / file)
    shown = model if repo_id or not (path.is_absolute() or ".." in path.parts) else path.resolve().name
    return Model(folder, shown, repo_id, files)


def _download(repo_id: str) -> Path:
    wanted = ["README.md", "model_index.json", *(f"*/*{suffix}" for suffix in MODEL_SUFFIXES)]
    wanted += [f"{COMPILED}/*{suffix}" for suffix in COMPILED_SUFFIXES]
    unwanted = ["*.fp16.*", "*.bf16.*", "*.non_ema.*", "safety_checker/*", "images/*", "checkpoint*"]
    if constants.is_offline_mode():
        print(f"HF_HUB_OFFLINE is set; {repo_id} is read from the local cache of the Hub")
    try:
        return Path(snapshot_download(repo_id, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # network, access, absence: huggingface_hub raises a dozen types
        reason = explain_loading(error, repo_id) or " ".join(redact(str(error) or type(error).__name__).split())[:300]
        raise UserError(
            f"there is no folder {repo_id} here, and as a Hub id it cannot be downloaded: {reason}"
        ) from None


def _components(folder: Path, model: str) -> set[str]:
    """Return the components of a pipeline that model_index.json names."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{model} holds no pipeline (no model_index.json); give a model that diffusers loads")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise UserError(f"{model} is a {index.get('_class_name')}; the playground needs a StableDiffusionPipeline")
    return {name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0]}


def _model_files(folder: Path) -> list[str]:
    """Return the paths of the model's files, with the model card."""
    paths = (path for pattern in pipeline_files(folder) for path in folder.glob(pattern) if path.is_file())
    names = [
        path.relative_to(folder).as_posix()
        for path in paths
        if path.suffix in MODEL_SUFFIXES + COMPILED_SUFFIXES * (path.parent.name == COMPILED)
    ]
    names = [name for name in names if not name.startswith("safety_checker/") and not VARIANTS.search(name)]
    return sorted([*names, *(["README.md"] if (folder / "README.md").is_file() else [])])


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="numpy") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a complete safetensors file ({' '.join(str(error).split())[:200]}); copy the file again"
        ) from None


# --- The code --------------------------------------------------------------------------------------------------------


@cache
def code() -> tuple[list[Path], list[str]]:
    """Return the code files of a Space, relative to the repository's root, and the packages that these files import.

    Imports inside functions are followed too, unless the imported module needs a package in `LEFT_OUT`.
    """
    files: dict[Path, None] = {}
    packages: set[str] = set()
    todo = [ROOT / page for page in PAGES]
    while todo:
        file = todo.pop()
        if file in files:
            continue
        files[file] = None
        for name, late in _imports(file):
            module = _module(name)
            if module and not (late and _is_left_out(module)):
                todo.append(module)
            elif not module and not (late and name.split(".")[0] in LEFT_OUT):
                packages.add(name.split(".")[0])
    todo = [ROOT / SETTINGS]
    todo += {folder / "__init__.py" for file in files for folder in file.parents if (folder / "__init__.py").is_file()}
    texts = [file.read_text(encoding="utf-8") for file in files]
    todo += [asset for asset in (ROOT / "dashboard/assets").iterdir() if any(asset.name in text for text in texts)]
    return sorted(file.relative_to(ROOT) for file in {*files, *todo}), sorted(packages)


def _imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Return (module, whether the import is inside a function) for all imports of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in late
            names = (
                f"{node.module}.{alias.name}" for alias in node.names
            )  # modules of a package are imported as names
            yield from ((name, node in late) for name in names if _module(name))


def _module(name: str) -> Path | None:
    """Return the file of a module or package of this suite, or None for any other module."""
    path = (ROOT / "scripts" if name.split(".")[0] == "t2i" else ROOT / "dashboard") / Path(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _is_left_out(file: Path) -> bool:
    """Return whether importing a module needs a package in `LEFT_OUT`."""
    modules = [name for name, late in _imports(file) if not late]
    return any(name.split(".")[0] in LEFT_OUT for name in modules) or any(
        _is_left_out(inner) for name in modules if (inner := _module(name))
    )


def requirements(compiled: bool) -> tuple[str, str]:
    """Return requirements.txt, the packages that the code imports, and constraints.txt, the project's pins for all packages.

    A package without a pin is a dependency of another package.

    Args:
        compiled: Whether the Space has compiled models, which OpenVINO runs.
    """
    pins: dict[str, str] = {}
    for name in ("requirements.txt", "requirements-train.txt", "scripts/requirements.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if match := re.match(r"([\w.-]+)==[^#]+", line):
                pins[match[1].lower()] = match[0].strip()
    wanted = [PACKAGES.get(package, package).lower() for package in code()[1]] + ["openvino"] * compiled
    return (
        "".join(f"{pins[package]}\n" for package in sorted(wanted) if package in pins),
        "".join(f"{pins[package]}\n" for package in sorted(pins)),
    )


# --- The folder ------------------------------------------------------------------------------------------------------


def stage(model: Model, repo_id: str, say: Callable[[str], Any] = print) -> Path:
    """Write the Space `repo_id` of `model` as a new folder, and return the folder.

    If the Space would exceed the Hub's limit of size, it has no compiled models. If it still does, its weights are stored
    as float16. With float16 weights, drawing still computes in float32.

    Raises:
        UserError: The Space exceeds the Hub's limit even with float16 weights.
    """
    folder = STAGED / repo_id
    sources = {folder / file: ROOT / file for file in code()[0]}
    pipeline = folder / "outputs" / repo_id.split("/")[1] / "pipeline"
    sources |= {pipeline / file: model.folder / file for file in model.files}
    size = sum(source.stat().st_size for source in sources.values())
    if size > SPACE_BYTES and any(target.parent.name == COMPILED for target in sources):
        say(f"{size / 1e9:.2f} GB exceed the limit of a Space; leaving out the compiled models")
        sources = {target: source for target, source in sources.items() if target.parent.name != COMPILED}
        size = sum(source.stat().st_size for source in sources.values())
    halved = size > SPACE_BYTES
    if halved:
        say(
            f"{size / 1e9:.2f} GB exceed the limit of a Space; storing the weights as float16 (pictures differ by about 1/255)"
        )
    if folder.exists():
        shutil.rmtree(folder)
    for target, source in sources.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if halved and target.suffix == ".safetensors":
            _write_half(source, target)
        else:
            shutil.copyfile(source, target)
    share_weights(folder)
    if folder_size(folder) > SPACE_BYTES:
        raise UserError(
            f"the Space would be {folder_size(folder) / 1e9:.2f} GB, and the Hub takes at most {SPACE_BYTES / 1e9:.0f} GB; "
            "use a smaller model"
        )
    few, all_pins = requirements(any(target.parent.name == COMPILED and target.suffix == ".xml" for target in sources))
    texts = {"Dockerfile": DOCKERFILE, "requirements.txt": few, "constraints.txt": all_pins}
    for name, text in (texts | {"README.md": card(model, repo_id)}).items():
        write_text(folder / name, text)
    write_page_defaults(pipeline.parent, model)
    return folder


def _write_half(source: Path, target: Path) -> None:
    """Copy a file of weights, and convert float32 tensors to float16 if float16 can hold their values."""
    with safe_open(source, framework="numpy") as weights, np.errstate(over="ignore"):
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no dictionary
        for name, tensor in tensors.items():
            half = tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor
            tensors[name] = half if np.isfinite(half).all() else tensor
        save_file(tensors, target, metadata=weights.metadata())


def write_page_defaults(run: Path, model: Model) -> None:
    """Write the prompt and settings of the model card's example as files of a run.

    The Space's page starts with the prompt and settings of this example.
    """
    text = _read_card(model)
    prompt = re.search(r"""(?m)^\s*("(?:[^"\\\n]|\\.)+"),$""", text)
    steps, scale = (re.search(rf"\b{name}=(\d+(?:\.\d+)?)", text) for name in ("num_inference_steps", "guidance_scale"))
    words = "a flower"
    with suppress(ValueError):  # not a JSON string
        words = json.loads(prompt[1]).encode("utf-8", "replace").decode() if prompt else words
    write_text(run / "config.yaml", yaml_dump({"train_unet": {"validation_prompts": [words]}}))
    if steps and scale:
        named = re.search(r"(?m)^pipeline\.scheduler = (\w+Scheduler)\.from_config", text, re.ASCII)
        rescale = re.search(r"\bguidance_rescale=(\d(?:\.\d+)?)", text)
        end = re.search(r"--guidance_end (\d(?:\.\d+)?)", text)
        saved = read_json(model.folder / "model_index.json").get("scheduler") or [None, "DDIMScheduler"]
        sweep = {
            "checkpoints": ["pipeline"],
            "guidance_scales": [float(scale[1])],
            "scheduler": named[1] if named else saved[1],
            "num_inference_steps": int(float(steps[1])),
            "guidance_end": float(end[1]) if end else 1.0,
            "guidance_rescale": float(rescale[1]) if rescale else 0.0,
            "prompts": [words],
            "seeds": [0],
        }
        write_json(
            run / "evaluation" / "evaluation.json", {"report": {"guidance_scale": float(scale[1])}, "sweep": sweep}
        )


def start_command(folder: Path) -> list[str]:
    """Return the command by which the Dockerfile in `folder` starts the Space.

    The returned command must run in `folder`.
    """
    match = re.search(r"(?m)^ENTRYPOINT (\[.*\])$", (folder / "Dockerfile").read_text(encoding="utf-8"))
    assert match is not None, f"{folder}/Dockerfile has no ENTRYPOINT"
    return list(json.loads(match[1]))


def folder_size(folder: Path) -> int:
    """Return the size in bytes of the files to push in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- Its card --------------------------------------------------------------------------------------------------------


def card(model: Model, repo_id: str) -> str:
    """Return the README.md of a Space: the Space's settings for the Hub, and the abilities and limits of its model."""
    front, body = _split(_read_card(model))
    title = " ".join(re.split(r"[-_.]+", repo_id.split("/")[1]))
    license = front.get("license")
    data: dict[str, Any] = {
        "title": title[:1].upper() + title[1:],
        "emoji": "🌼",
        "colorFrom": "pink",
        "colorTo": "green",
        "sdk": "docker",
        "app_port": 8501,
        "tags": ["streamlit"],
        "pinned": False,
        "short_description": "Pictures from prompts, on two cores",  # the Hub takes 60 characters
        **({"license": one_line(license)} if isinstance(license, str) and license != "unknown" else {}),
        **({"models": [model.hub_id]} if model.hub_id else {}),
    }
    drawer = f"[{model.hub_id}]({constants.ENDPOINT}/{model.hub_id})" if model.hub_id else "a latent diffusion model"
    summary = re.search(r"<!-- t2i:summary begin[^>]*-->\s*(.+?)\n\s*\n", body, re.DOTALL)
    limits = re.search(r"(?ims)^##\s[^\n]*limit[^\n]*\n(.*?)(?=^##\s|\Z)", body)
    command = f"make space MODEL={shlex.quote(model.name)} SPACE={repo_id}"
    text = f"""\
# {data["title"]}

{model_card.BEGIN.format("space")}
Write a prompt, and {drawer} draws a picture of it. This Space has two CPU cores and no GPU.
{_plain(summary[1]) if summary else ""}

## Limitations

{(_plain(limits[1]) if limits else "") or "The model's card names none."}

## Where this comes from

The command `{one_line(command)}` made this Space. Run it again to update the Space.

To start the Space on another machine, copy this repository. In the copy, run `pip install -r requirements.txt -c constraints.txt`
and then `{shlex.join(json.loads(DOCKERFILE.split("ENTRYPOINT ")[1]))}`.
{model_card.END.format("space")}
"""
    return f"---\n{yaml_dump(data, sort_keys=False)}---\n{text}"


def merge_card(new: str, existing: str | None) -> str:
    """Merge the README.md `new` with a person's edits of the Space's README.md.

    The SDK, port and model in the merged front matter come from `new`.
    """
    return merge_cards(new, existing, ("sdk", "app_port", "models"))


def _read_card(model: Model) -> str:
    """Return the text of a model's card, or "" if the model has no card."""
    readme = model.folder / "README.md"
    return readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Return the front matter and the body of a model's card. A broken front matter is returned as {}."""
    match = REGEX_YAML_BLOCK.search(text)
    try:
        front = yaml.safe_load(match[2]) if match else None
    except (yaml.YAMLError, ValueError):
        front = None
    return front if isinstance(front, dict) else {}, text[match.end() :] if match else text


def _plain(text: str) -> str:
    """Remove the comments from the Markdown of a model's card, since they could look like markers of the Space's card."""
    return re.sub(r"<!--.*?(-->|\Z)", "", text, flags=re.DOTALL).strip()


# --- The push --------------------------------------------------------------------------------------------------------


def push(folder: Path, repo_id: str, *, message: str, private: bool, deadline: float) -> upload.Pushed:
    """Push `folder` as the Space `repo_id`. Raises `upload.HubError` as `upload.push_folder` does."""
    new = (folder / "README.md").read_text(encoding="utf-8")
    return upload.push_folder(
        folder,
        repo_id,
        "space",
        files=list(FILES),
        message=message,
        private=private,
        deadline=deadline,
        merge_card=lambda existing: merge_card(new, existing),
    )
