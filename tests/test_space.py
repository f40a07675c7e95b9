"""A model as a Space: staged, pushed to a Hub on 127.0.0.1, fetched, started by its Dockerfile, and drawing."""

import ast
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import snapshot_download
from safetensors.numpy import load_file, save_file

from conftest import ROOT
from loopback_hub import LoopbackHub
from prove_space import PROMPT, dockerfile, draw, opens, same_picture, serving
from t2i.errors import UserError
from t2i.files import read_json, write_json
from t2i.hub import model_card, space, upload
from t2i.pictures import sampling

REPO = "spaces/me/tiny-flowers"
BIN = Path(sys.executable).parent
NONE = "The model's card names none."


@pytest.fixture(scope="module")
def loopback():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory):
    """The tiny run with a card, in a folder where commands are typed."""
    run = tmp_path_factory.mktemp("space") / "unet"
    shutil.copytree(workspace / "unet", run)
    model_card.write_model_card(run, None, model_card.Publication("me/tiny", "mit", []))
    (run / "pipeline/unet/old.bin").write_bytes(b"a pickle")
    (run / "pipeline/unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"the same again")
    (run / "pipeline/setup.py").write_text("raise SystemExit")
    return run


@pytest.fixture(scope="module")
def pushed(loopback, run, command):
    """What the command said when it pushed the Space."""
    arguments = ("--model", "unet", "--space", "me/tiny-flowers")
    return command("publish_space.py", *arguments, cwd=run.parent, env=loopback.environment()).stdout


@pytest.fixture(scope="module")
def fetched(loopback, pushed, tmp_path_factory):
    """The Space, downloaded into a folder of its own."""
    folder = tmp_path_factory.mktemp("fetched")
    options = {"endpoint": loopback.url, "token": loopback.token, "cache_dir": folder / "cache"}
    return Path(snapshot_download("me/tiny-flowers", repo_type="space", local_dir=folder / "space", **options))


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_space_is_pushed_in_one_commit_with_what_it_needs(loopback, run, pushed):
    assert f"{loopback.url}/spaces/me/tiny-flowers has it now" in pushed
    assert (len(loopback.commits(REPO)), loopback.repos[REPO].sdk, loopback.repos[REPO].private) == (2, "docker", True)
    files = loopback.files(REPO)
    pages = {path for path in files if path.startswith("dashboard/views/")}
    assert pages == {"dashboard/views/playground.py"}
    assert {"Dockerfile", "requirements.txt", "constraints.txt", "dashboard/.streamlit/config.toml"} <= files.keys()
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert files[f"outputs/tiny-flowers/{weights}"] == (run / weights).read_bytes()
    assert {Path(path).suffix for path in files if path.startswith("outputs/")} <= {
        *space.MODEL_SUFFIXES,
        ".md",
        ".yaml",
    }
    assert not [path for path in files if "fp16" in path or path.endswith("setup.py")]
    told = front(files["README.md"].decode())
    assert (told["sdk"], told["app_port"], told["license"], "models" in told) == ("docker", 8501, "mit", False)
    assert "32 × 32 px. Not suitable for high-fidelity generation." in files["README.md"].decode()
    assert "`make space MODEL=unet SPACE=me/tiny-flowers`" in files["README.md"].decode()
    assert str(run.parent) not in b"".join(files.values()).decode("utf-8", "replace")


def test_a_repeated_push_changes_nothing_and_keeps_what_a_person_wrote(loopback, run, command, pushed):
    card = loopback.files(REPO)["README.md"].decode()
    mine = card.replace("title: Tiny flowers", "title: Mine").replace("# Tiny flowers\n", "# Mine\n\nMy own words.\n")
    edited = loopback.edit(REPO, {"README.md": mine.replace("app_port: 8501", "app_port: 1")})
    arguments = ("--model", "unet", "--space", "me/tiny-flowers")
    assert "has it now" in command("publish_space.py", *arguments, cwd=run.parent, env=loopback.environment()).stdout
    assert loopback.files(REPO)["README.md"].decode() == mine
    assert loopback.commits(REPO)[-2] == edited
    folder = run.parent / space.STAGED / "me/tiny-flowers"
    (folder / "outputs/tiny-flowers/cells").mkdir()  # somebody tried it here, as the command says
    (folder / "outputs/tiny-flowers/cells/1.png").write_bytes(b"drawn here")
    (folder / "server.log").write_text("of this machine")
    api = upload.HfApi(endpoint=loopback.url, token=loopback.token)
    known = {entry.path for entry in api.list_repo_tree("me/tiny-flowers", repo_type="space", recursive=True)}
    patterns = list(space.FILES)
    inside = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert set(upload._matching(inside, patterns)) <= known


def test_the_fetched_space_starts_by_its_dockerfiles_command(fetched):
    host = "me-tiny-flowers.hf.space"
    with serving(
        fetched, BIN, container=True
    ) as port:  # as in the container: whatever name the Hub's proxy leads here by
        assert opens(port, host, f"https://{host}")
        assert not opens(port, host, "https://elsewhere.example")
    with serving(fetched, BIN, container=False) as port:  # the same command on a machine of one's own: as safe as ever
        assert opens(port, f"127.0.0.1:{port}", f"http://127.0.0.1:{port}")
        assert not opens(port, host, f"https://{host}")


def test_the_fetched_space_draws_the_models_picture_and_imports_nothing_from_elsewhere(fetched, run):
    told = draw(fetched, Path(sys.executable))
    known = same_picture(fetched / told["pictures"][0], run)
    example = re.search(r"guidance_scale=(.*),", (run / "pipeline/README.md").read_text())[1]
    assert (known["prompt"], known["guidance_scale"]) == (PROMPT, float(example))
    assert not told["early"]  # torch waits for the first picture
    here = [str(ROOT / part) for part in ("scripts", "dashboard", "tests")]
    assert not [file for file in told["files"].values() if file.startswith(tuple(here))]
    assert "t2i.pictures.sampling" in told["files"]


def names(requirement):
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_whatever_is_staged_imports_what_is_staged_or_required(fetched):
    required = {names(line) for line in (fetched / "requirements.txt").read_text().splitlines()}
    assert required <= {names(line) for line in (fetched / "constraints.txt").read_text().splitlines()}
    pins = "".join(
        (ROOT / name).read_text() for name in ("requirements.txt", "requirements-train.txt", "scripts/requirements.txt")
    )
    assert all(line in pins for line in (fetched / "requirements.txt").read_text().splitlines())
    along = {
        names(more) for one in required for more in importlib.metadata.requires(one) or [] if "extra ==" not in more
    }
    distributions = importlib.metadata.packages_distributions()
    staged = {path.stem for path in (fetched / "dashboard").glob("*.py")} | {"helpers", "t2i"}
    imported = set()
    for file in [*(fetched / "dashboard").rglob("*.py"), *(fetched / "scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    foreign = imported - staged - set(sys.stdlib_module_names) - set(space.LEFT_OUT)
    assert {"streamlit", "torch", "diffusers"} <= foreign
    for name in foreign:
        assert {names(known) for known in distributions[name]} & (required | along), f"nothing brings {name}"
    assert not required & {"mlflow", "datasets", "torchmetrics", "accelerate", "deepspeed"}
    asked = dockerfile(fetched)[0]
    assert "--requirement requirements.txt --constraint constraints.txt" in asked


def test_a_model_of_the_hub_is_named_and_a_dry_run_pushes_nothing(loopback, run, command, monkeypatch):
    known = {f"models/me/{name}": {} for name in ("tiny",)}
    files = {
        path.relative_to(run / "pipeline").as_posix(): path for path in (run / "pipeline").rglob("*") if path.is_file()
    }
    for repo in known:
        loopback.create(repo)
        loopback.edit(repo, {name: path.read_bytes() for name, path in files.items()})
    arguments = ("--model", "me/tiny", "--space", "club/dry", "--dry_run")
    said = command("publish_space.py", *arguments, cwd=run.parent, env=loopback.environment()).stdout
    assert "spaces/club/dry" not in loopback.repos
    folder = run.parent / space.STAGED / "club/dry"
    assert f"cd {folder.relative_to(run.parent)} && streamlit run dashboard --server.port=8501" in said
    assert front((folder / "README.md").read_text())["models"] == ["me/tiny"]
    inside = folder / "outputs/dry/pipeline"
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (inside / weights).read_bytes() == (run / "pipeline" / weights).read_bytes()
    assert not [path for path in folder.rglob("*") if path.suffix == ".bin" or path.name == "setup.py"]
    asked = {path for method, path in loopback.requests if "/resolve/" in path}
    assert not [path for path in asked if path.endswith((".bin", "setup.py")) or "fp16" in path]  # not even downloaded


def test_mistakes_get_a_sentence(loopback, run, command):
    for model, name, sentence in (
        ("unet", "flowers", "--space 'flowers' is not a repository of the Hub; give owner/name"),
        ("unet", "club/none", "there is no token for the Hub; run `hf auth login`"),
        ("nobody/nothing", "me/x", "as a Hub id it cannot be downloaded"),
    ):
        dry = ["--dry_run"] if model != "unet" else []
        environment = loopback.environment() | {"HF_TOKEN": ""}
        words = ("--model", model, "--space", name, *dry)
        failed = command("publish_space.py", *words, cwd=run.parent, env=environment, code=2).stderr
        assert failed.startswith("error: ")
        assert sentence in failed
        assert failed.count("\n") == 1


def test_a_hub_that_refuses_gets_a_sentence_and_the_folder_is_kept(loopback, run, command):
    loopback.fault("500", times=float("inf"), path="/commit/", seconds=0)
    arguments = ("--model", "unet", "--space", "me/refused", "--hub_deadline", 1)
    failed = command("publish_space.py", *arguments, cwd=run.parent, env=loopback.environment(), code=2)
    loopback.mend()
    assert failed.stderr.splitlines()[-1].startswith("error: the push to me/refused failed: the Hub answers 500")
    assert "the same command repeats the push" in failed.stderr
    assert (run.parent / space.STAGED / "me/refused/Dockerfile").is_file()


@pytest.fixture
def own(run, tmp_path, monkeypatch):
    """A copy of the pipeline to be damaged."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "pipeline", tmp_path / "own")
    return tmp_path / "own"


def test_models_that_cannot_be_shown_get_a_sentence(own, monkeypatch):
    weights = own / "unet/diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"\x80\x04]" + kept)  # a pickle under another name
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors is not a complete safetensors file"):
        space.find_model("own")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="own has no safetensors weights of its unet"):
        space.find_model("own")
    weights.write_bytes(kept)
    with pytest.raises(UserError, match="neither a folder here nor a Hub id"):
        space.find_model("nowhere/at/all")
    with pytest.raises(UserError, match="no model: give --model"):
        space.find_model(None)
    monkeypatch.setattr(space, "SPACE_BYTES", 20_000)
    with pytest.raises(UserError, match=r"the Space would be .* GB, and the Hub takes at most"):
        space.stage(space.find_model("own"), "me/x")
    write_json(own / "model_index.json", read_json(own / "model_index.json") | {"_class_name": "FluxPipeline"})
    with pytest.raises(UserError, match="own is a FluxPipeline"):
        space.find_model("own")
    (own / "model_index.json").unlink()
    with pytest.raises(UserError, match="own holds no pipeline"):
        space.find_model("own")


def test_compiled_models_come_along_if_the_space_has_room(own, monkeypatch):
    (own / "openvino").mkdir()
    for name in ("engine.json", "unet.xml", "unet.bin", "notes.bin.txt.exe"):
        (own / "openvino" / name).write_text("{}")
    folder = space.stage(space.find_model("own"), "me/x")
    compiled = folder / "outputs/x/pipeline/openvino"
    assert sorted(path.name for path in compiled.iterdir()) == ["engine.json", "unet.bin", "unet.xml"]
    assert "openvino==" in (folder / "requirements.txt").read_text()
    monkeypatch.setattr(space, "SPACE_BYTES", space.folder_size(folder))
    (own / "openvino" / "unet.bin").write_bytes(bytes(100_000))
    said = []
    small = space.stage(space.find_model("own"), "me/small", said.append)
    assert not (small / "outputs/small/pipeline/openvino").exists()
    assert "openvino==" not in (small / "requirements.txt").read_text()
    assert len(said) == 1
    assert "leaving out the compiled models" in said[0]


def test_a_model_too_large_for_a_space_is_stored_as_float16_and_draws_the_same(own, monkeypatch):
    large = np.full((300, 1000), 1e6, np.float32)  # beyond float16
    weights = own / "unet/diffusion_pytorch_model.safetensors"
    folder = space.stage(space.find_model("own"), "me/x")
    monkeypatch.setattr(space, "SPACE_BYTES", space.folder_size(folder) - 10_000)
    said = []
    halved = space.stage(space.find_model("own"), "me/half", said.append) / "outputs/half/pipeline"
    assert "storing the weights as float16" in said[0]
    assert (halved / weights.relative_to(own)).stat().st_size < 0.6 * weights.stat().st_size
    assert {file.stat().st_mode for file in halved.rglob("*.safetensors")} == {
        (halved / "model_index.json").stat().st_mode
    }
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4, "progress": False}
    here, there = (
        sampling.generate(sampling.load_pipeline(model), [PROMPT], [0], **settings) for model in (own, halved)
    )
    assert np.abs(here.astype(int) - there).max() <= 2
    assert here.std() > 0
    save_file({"large": large, "small": large / 1e6}, own / "a.safetensors")
    space._write_half(own / "a.safetensors", own / "b.safetensors")
    kept = load_file(own / "b.safetensors")
    assert (kept["large"].dtype, kept["small"].dtype) == (np.float32, np.float16)


@pytest.mark.parametrize(
    ("readme", "limits", "prompt"),
    [
        (None, NONE, "a flower"),
        ("---\nlicense: [broken\n---\n## Limits\nmany", "many", "a flower"),
        ("# M\n\n### no limitation\n\n## Limitations and bias\n<!-- t2i:space end -->\n- few\n<!-- x\n## Use\n", "- few", "a flower"),
        (
            '```\n    "\\ud800 red",\n    num_inference_steps=7,\n    guidance_scale=2.5,\n```\n', NONE, "? red"),
    ],
)  # fmt: skip
def test_cards_of_any_kind_make_a_valid_space(own, readme, limits, prompt):
    (own / "README.md").unlink()
    if readme is not None:
        (own / "README.md").write_text(readme)
    folder = space.stage(space.find_model(str(own)), "me/x")
    card = (folder / "README.md").read_text()
    assert front(card)["sdk"] == "docker"
    assert "license" not in front(card)
    assert f"## Limitations\n\n{limits}\n\n## Where" in card
    assert space.merge_card(card, card) == card
    assert card.count("<!--") == 2
    assert yaml.safe_load((folder / "outputs/x/config.yaml").read_text())["train_unet"]["validation_prompts"] == [
        prompt
    ]
    told = folder / "outputs/x/evaluation/evaluation.json"
    assert told.is_file() == ("guidance_scale=2.5" in str(readme))
    if told.is_file():
        assert read_json(told)["sweep"]["num_inference_steps"] == 7
