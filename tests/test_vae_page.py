"""The page VAE: reconstructions of a run's validation images by its checkpoints, made once, with training's own figures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from t2i.errors import UserError
from t2i.files import read_json
from t2i.pictures import reconstructions
from t2i.runs import checkpoint_folders

APP = Path(__file__).resolve().parents[1] / "dashboard" / "streamlit_app.py"
NAMES = ["checkpoint-000006", "checkpoint-000012", "vae"]
OPEN = """
import sys
from streamlit.testing.v1 import AppTest
app = AppTest.from_file(sys.argv[1], default_timeout=60)
app.switch_page("views/vae.py").run()
assert not app.exception and [button.label for button in app.button] == ["Reconstruct 24 images"]
print(*sorted(sys.modules))
"""


@pytest.fixture
def run(workspace, tmp_path, monkeypatch):
    """The workspace's VAE run, copied, as outputs/one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "vae", tmp_path / "outputs" / "one")
    shutil.copytree(workspace / ".cache", tmp_path / ".cache")
    return tmp_path / "outputs" / "one"


def show(**query: str | list[str]) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page("views/vae.py").run()
    assert not app.exception
    return app


def component(app: AppTest, name: str) -> dict:
    found = [e.proto for e in app.get("bidi_component") if e.proto.component_name == name]
    return json.loads(found[0].json)[0] if found else {}


def words(app: AppTest) -> str:
    return " ".join(element.value for element in [*app.text, *app.warning]).replace("\\", "")


def button(app: AppTest):
    return next((one for one in app.button if one.label.startswith("Reconstruct")), None)


def test_an_empty_folder_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = show(vae="../../etc").code[0].value.splitlines()
    assert first.startswith("python scripts/make_flowers.py --output_dir outputs/demo/dataset ")
    assert second.startswith("python scripts/train_vae.py --config demo --dataset outputs/demo/dataset ")


def test_training_keeps_the_checkpoints_that_were_asked_for(workspace):
    assert [path.name for path in checkpoint_folders(workspace / "vae")] == NAMES[:2]
    assert [vae.name for vae in reconstructions.find_vaes(workspace / "vae")] == NAMES
    assert [vae.name for vae in reconstructions.find_vaes(workspace / "unet")] == ["pipeline"]


def test_the_figures_are_those_that_training_measured(run):
    images = reconstructions.validation_images(run)
    originals = [np.asarray(image) for image in images.pixels]
    assert len(images) == 12
    state, means = read_json(run / "run.json"), {}
    for vae in reconstructions.find_vaes(run):
        assert reconstructions.make(vae, originals) == 12
        assert reconstructions.make(vae, originals) == 0
        made = [reconstructions.read(vae, image) for image in originals]
        means[vae.name] = np.mean([one.psnr for one in made]), np.mean([one.ssim for one in made])
    assert means["vae"] == pytest.approx((state["psnr_db"], state["ssim"]), abs=1e-3)
    assert means["checkpoint-000012"] == pytest.approx(means["vae"], abs=1e-3)  # the average, before folding
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    at = {row["step"]: row["val_psnr_db"] for row in rows if "val_psnr_db" in row}
    assert means["checkpoint-000006"][0] == pytest.approx(at[6], abs=1e-3)
    assert means["checkpoint-000006"][0] < means["vae"][0]


def test_pictures_are_made_by_a_button_and_then_kept(run):
    app = show(count="4")
    assert "12 of 12 reconstructions are not made yet" in words(app)
    assert component(app, "picture_grid")["columns"] == ["original", *(f"one/{name}" for name in NAMES)]
    button(app).click().run()
    assert not app.exception
    assert button(app) is None
    grid = component(app, "picture_grid")
    assert all("mean" in title and title.endswith("dB of 4") for title in grid["columns"][1:])
    assert all(cell["source"].startswith("data:image/png;base64,") for cell in grid["cells"])
    assert [bool(cell["under"]) for cell in grid["cells"][:4]] == [False, True, True, True]
    pair = component(app, "picture_pair")
    assert pair["left"]["label"] == "original, image 0"
    assert pair["right"]["label"].startswith("one/checkpoint-000006, image 0, ")
    again = show(count="4", vae=["one/vae"], view="difference")
    assert button(again) is None
    assert len(component(again, "picture_grid")["columns"]) == 2
    assert component(again, "picture_pair")["mode"] == "difference"
    assert len(again.get("arrow_vega_lite_chart")) + len(again.get("vega_lite_chart")) >= 1


def test_a_damaged_or_foreign_file_is_made_anew(run):
    vae = reconstructions.find_vaes(run)[-1]
    images = [np.asarray(image) for image in reconstructions.validation_images(run).pixels[:3]]
    reconstructions.make(vae, images)
    paths = [reconstructions._file(vae, image)[0] for image in images]
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    shutil.copy(paths[2], paths[1])
    assert [reconstructions.read(vae, image) is None for image in images] == [True, True, False]
    assert reconstructions.make(vae, images) == 2
    config = vae.folder / "config.json"
    config.write_text(config.read_text() + "\n")  # another model: nothing of it is there
    assert [reconstructions.read(vae, image) for image in images] == [None] * 3


def test_the_vae_that_was_fine_tuned_is_the_start(run):
    other = run.parent / "two"
    shutil.copytree(run, other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("vae: null", "vae: outputs/one", 1))
    found = reconstructions.find_vaes(other)
    assert [vae.name for vae in found] == ["start", *NAMES]
    assert found[0].folder.resolve() == (run / "vae").resolve()


def test_what_goes_while_it_is_shown_gets_a_sentence(run):
    app = show(count="4")
    (run / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    button(app).click().run()
    assert not app.exception
    assert "cannot be loaded" in words(app)
    for file in (run / "vae").iterdir():
        if file.suffix != ".json":
            file.unlink()
    shutil.rmtree(run / "checkpoint-000006")
    app.run()
    assert not app.exception
    shutil.rmtree(Path(".cache"))
    app.run()
    assert not app.exception
    assert "no longer in .cache/t2i" in words(app)
    shutil.rmtree(run)
    app.run()
    assert not app.exception
    assert "train_vae.py" in app.code[0].value


def test_a_hostile_url_and_hostile_files(run):
    app = show(vae=["../../etc/passwd", "one/vae"], count="1e9", page="NaN", left="<b>", right="row 99, column 99",
               view="<script>")  # fmt: skip
    assert len(component(app, "picture_grid")["cells"]) == 16
    assert "outputs/ holds no ../../etc/passwd, which the page's address names" in words(app)
    app = show(vae="one/vae", images="../x")
    for _ in range(2):
        assert "outputs/ holds no ../x, which the page's address names" in words(app)
        assert not component(app, "picture_grid")
        app.run()
    for text in ("[]", "{", '{"identity": []}', '{"identity": {"dataset_hash": "../../../../etc"}}'):
        (run / "run.json").write_text(text)
        assert "picture_grid" not in words(show())
        with pytest.raises(UserError):
            reconstructions.validation_images(run)
    settings = (run / "config.yaml").read_text()
    for name in ("~nobody-there/x", "x" * 5000):  # of an unknown user, and longer than a path can be
        text = settings.replace("vae: null", f"vae: {name}", 1).replace(
            "cache_dir: .cache/t2i", f"cache_dir: {name}", 1
        )
        assert text.count(name) == 2
        (run / "config.yaml").write_text(text)
        (run / "run.json").write_text('{"identity": {"dataset_hash": "0123456789abcdef"}}')
        assert ("there is no user 'nobody-there' here" if name[0] == "~" else "no longer in") in words(show())
    (run / "config.yaml").write_text("[" * 5000)
    assert not show().exception


def test_labels_end_with_a_whole_word_and_another_count_starts_at_its_first_page(run):
    app = show(count="4", page="3")
    assert [int(row.partition(":")[0]) for row in component(app, "picture_grid")["rows"]] == [8, 9, 10, 11]
    app.selectbox(key="count").select(8).run()
    assert app.number_input(key="page").value == 1
    assert len(component(app, "picture_grid")["rows"]) == 8
    page_texts = sys.modules["helpers.page_texts"]
    assert page_texts.shorten("a red flower", 12) == "a red flower"
    assert page_texts.shorten("a red, flower", 12) == "a red…"
    assert page_texts.shorten("x" * 99, 12) == "x" * 11 + "…"


def test_images_that_do_not_fit_the_vae(run):
    vae = reconstructions.find_vaes(run)[-1]
    with pytest.raises(UserError, match="multiples of 2"):
        reconstructions.make(vae, [np.zeros((33, 33, 3), np.uint8)])


def test_a_disk_that_takes_nothing(run):
    vae = reconstructions.find_vaes(run)[-1]
    (run / reconstructions.STORE).write_text("a file in its place")
    with pytest.raises(UserError, match="cannot be written"):
        reconstructions.make(vae, [np.asarray(Image.new("RGB", (32, 32)))])


def test_looking_imports_no_torch(run):
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(APP)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=run.parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not {"torch", "datasets", "diffusers", "transformers"} & set(done.stdout.split())
