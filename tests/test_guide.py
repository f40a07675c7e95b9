"""A guide: earlier weights that a training keeps in its pipeline, and that take part in each guided picture."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loopback_hub import LoopbackHub
from t2i import models
from t2i.errors import UserError
from t2i.files import hash_files
from t2i.hub import model_card, publish
from t2i.pictures import cells, engines, guide, sampling
from t2i.runs import guide_folder

PROMPTS = ["a red flower", "a blue flower at night"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory, command):
    """A training like that of the workspace, with the weights of its fourth of eight updates as the guide."""
    folder = tmp_path_factory.mktemp("guided")
    options = ("--config", workspace / "tiny.yaml", "--dataset", workspace / "dataset", "--vae", workspace / "vae",
               "--report_to", "none", "--learning_rate", 0.01, "--guide_step", 4, "--output_dir", folder / "unet")  # fmt: skip
    command("train_unet.py", *options, cwd=workspace)
    return folder / "unet"


def draw(pipeline, prompts=PROMPTS, **options):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "progress": False} | options
    return sampling.generate(pipeline, prompts, range(len(prompts)), **options).astype(int)


def by_hand(run, scale, steps=4):
    """The pictures of PROMPTS by the formula, without the stock pipeline's loop."""
    stock = sampling.load_pipeline(run / "pipeline")
    strong, weak = guide.unguided(stock.unet), guide.guide_of(stock.unet)
    pictures = []
    for seed, prompt in enumerate(PROMPTS):
        hidden = models.encode_captions(stock.text_encoder, stock.tokenizer, ["", prompt])
        half, whole = hidden.mean(0, keepdim=True), hidden[1:]
        size = (1, strong.config.in_channels, strong.config.sample_size, strong.config.sample_size)
        latents = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        stock.scheduler.set_timesteps(steps)
        with torch.no_grad():
            for timestep in stock.scheduler.timesteps:
                worse = weak(latents, timestep, half).sample
                output = worse + scale * (strong(latents, timestep, whole).sample - worse)
                latents = stock.scheduler.step(output, timestep, latents).prev_sample
            decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
        pictures.append(stock.image_processor.postprocess(decoded, output_type="np")[0] * 255)
    return np.stack(pictures)


def test_the_training_keeps_the_average_of_that_update(run):
    kept, last = load_file(run / "pipeline/guide" / WEIGHTS), load_file(run / "pipeline/unet" / WEIGHTS)
    saved = load_file(run / "checkpoint-000004/unet_ema" / WEIGHTS)
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert any(not torch.equal(kept[name], last[name]) for name in last)
    assert json.loads((run / "pipeline/guide/guide.json").read_text()) == {"step": 4}
    assert len({file.stat().st_mode for file in (run / "pipeline/guide").iterdir()}) == 1
    assert not list((run / "pipeline").glob(".*"))


def test_the_guide_changes_no_weight_of_the_training(run, workspace, command, tmp_path):
    options = ("--config", workspace / "tiny.yaml", "--dataset", workspace / "dataset", "--vae", workspace / "vae",
               "--report_to", "none", "--learning_rate", 0.01, "--output_dir", tmp_path / "unet")  # fmt: skip
    said = command("train_unet.py", *options, "--guide_step", 8, cwd=workspace).stdout
    assert "no guide, which would be kept at update 8" in said  # The last weights cannot guide themselves.
    assert not (tmp_path / "unet/pipeline/guide").exists()
    ours, theirs = (load_file(folder / "pipeline/unet" / WEIGHTS) for folder in (run, tmp_path / "unet"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_extended_from_that_update_keeps_the_guide(run, workspace, command, tmp_path):
    copy = shutil.copytree(run, tmp_path / "unet")
    settings = (copy / "run.json").read_text().replace('"TrainUnet.guide_step": 4', '"TrainUnet.guide_step": 8')
    (copy / "run.json").write_text(settings)
    shutil.rmtree(copy / "pipeline/guide")
    command("train_unet.py", "--config", workspace / "tiny.yaml", "--dataset", workspace / "dataset", "--vae", workspace / "vae",
            "--report_to", "none", "--learning_rate", 0.01, "--guide_step", 8, "--max_train_steps", 10,
            "--output_dir", copy, cwd=workspace)  # fmt: skip
    kept, saved = (load_file(copy / part / WEIGHTS) for part in ("pipeline/guide", "checkpoint-000008/unet_ema"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    state = json.loads((copy / "run.json").read_text())
    assert guide_folder(copy / "pipeline")
    (copy / "run.json").write_text(json.dumps(state | {"steps": 8}))  # as while it was extended
    assert guide_folder(copy / "pipeline") is None


def test_pictures_follow_the_formula_in_any_batch(run):
    pipeline = sampling.load_pipeline(run)
    found = draw(pipeline)
    assert np.abs(found - by_hand(run, 3.0)).max() <= 1.01  # of 255: rounding
    assert np.abs(found - draw(pipeline, batch_size=1)).max() <= 1
    stock = sampling.load_pipeline(run)
    stock.unet = guide.unguided(stock.unet)
    assert np.abs(found - draw(stock)).mean() > 0.5
    assert (draw(pipeline, guidance_scale=1.0) == draw(stock, guidance_scale=1.0)).all()
    outside = pipeline(PROMPTS[0], num_inference_steps=4, guidance_scale=3.0, output_type="np",
                       generator=torch.Generator().manual_seed(0)).images[0] * 255  # fmt: skip
    assert np.abs(outside - draw(stock)[0]).max() <= 1.01  # Only `generate` lets the guide take part.


def test_guidance_ends_negative_prompts_count_and_steps_are_watched(run):
    pipeline = sampling.load_pipeline(run)
    plain = draw(pipeline)
    assert (plain != draw(pipeline, guidance_end=0.5)).any()
    assert (plain != draw(pipeline, negative_prompt="a blue flower")).any()
    seen = []
    watched = draw(pipeline, watch=lambda number, count, picture: seen.append(picture()))
    assert (watched == plain).all()
    assert len(seen) == 4


def test_only_later_checkpoints_have_the_guide(run, tmp_path):
    first, last = run / "checkpoint-000004", run / "checkpoint-000008"
    assert guide.guide_of(sampling.load_pipeline(first).unet) is None
    assert guide.guide_of(sampling.load_pipeline(last).unet) is not None
    assert (draw(sampling.load_pipeline(last)) == draw(sampling.load_pipeline(run))).all()
    copy = shutil.copytree(run, tmp_path / "unet")
    with_guide = {name: cells.weights_hash(copy / name) for name in (first.name, last.name, "pipeline")}
    assert with_guide[last.name] == with_guide["pipeline"]
    shutil.rmtree(copy / "pipeline/guide")
    without = {name: cells.weights_hash(copy / name) for name in with_guide}
    assert without[first.name] == with_guide[first.name]
    assert without[last.name] == without["pipeline"] != with_guide[last.name]
    shutil.copytree(copy / first.name / "unet_ema", copy / "pipeline/guide")  # as docs/pictures.md says
    shutil.copytree(copy / first.name, copy / f"{first.name}-backup")
    guided = {
        name: guide_folder(copy / "pipeline", copy / name) for name in (first.name, f"{first.name}-backup", last.name)
    }
    assert list(guided.values()) == [None, None, copy / "pipeline/guide"]
    assert (draw(sampling.load_pipeline(copy)) == draw(sampling.load_pipeline(run))).all()


def test_an_evaluation_with_another_guide_is_not_published_or_drawn_again(run, tmp_path, command):
    copy = shutil.copytree(run, tmp_path / "unet")
    (copy / "evaluation").mkdir()
    state = {"identity": {"guide": hash_files(copy / "pipeline/guide")}}
    (copy / "evaluation/run.json").write_text(json.dumps(state))
    assert publish.hash_guide(copy)
    shutil.rmtree(copy / "pipeline/guide")
    with pytest.raises(UserError, match="drawn with another guide than"):
        publish.hash_guide(copy)
    done = command("evaluate_checkpoints.py", "--model", copy, "--redraw", cwd=tmp_path, code=2)
    assert "another guide" in done.stderr
    (copy / "evaluation/run.json").write_text('{"identity": {}}')
    assert publish.hash_guide(copy) is None


def test_the_code_of_the_card_draws_the_same_picture(run, tmp_path):
    text = model_card.write_model_card(run, None)
    assert "- **Guidance**: by the model's weights of update 4 in `guide/`" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace("path/to/pipeline", str(run / "pipeline")).replace("picture.png", str(tmp_path / "picture.png"))
    drawn = {}
    exec(code, drawn)
    settings = {"guidance_scale": 7.5, "num_inference_steps": 2}
    found = draw(sampling.load_pipeline(run), ["a red flower"], **settings)[0]
    assert np.abs(found - np.asarray(drawn["picture"]).astype(int)).max() <= 1
    assert "guide/*" in publish.pipeline_files(run / "pipeline")


def test_compiled_models_are_guided_too(run, workspace):
    compiled = sampling.load_pipeline(run, engine="openvino")
    assert isinstance(guide.guide_of(compiled.unet), engines.CompiledUnet)
    found, wanted = draw(compiled), draw(sampling.load_pipeline(run))
    assert np.abs(found - wanted).mean() < 1.5  # bf16 where the processor has it
    assert (draw(compiled, batch_size=1) == found).all()
    twice = sampling.generate(compiled, PROMPTS, [3, 3], num_inference_steps=2, guidance_scale=3.0, progress=False)
    alone = sampling.generate(compiled, PROMPTS[1:], [3], num_inference_steps=2, guidance_scale=3.0, progress=False)
    assert (twice[1] == alone[0]).all()  # equal noise, other prompts
    assert guide.guide_hash(compiled.unet) == guide.guide_hash(sampling.load_pipeline(run).unet)
    assert sampling.unet_hash(compiled) == sampling.unet_hash(sampling.load_pipeline(run))
    assert set(engines.weight_fingerprints(run / "pipeline")) - set(
        engines.weight_fingerprints(workspace / "unet/pipeline")
    ) == {"guide"}


def test_a_guide_on_the_hub_guides_and_others_are_not_missed(run, command, tmp_path):
    files = {
        file.relative_to(run / "pipeline").as_posix(): file for file in (run / "pipeline").rglob("*") if file.is_file()
    }
    with LoopbackHub() as hub:
        hub.create("models/me/guided")
        hub.create("models/me/plain")
        hub.edit("models/me/guided", {name: file.read_bytes() for name, file in files.items()})
        plain = {name: file.read_bytes() for name, file in files.items() if not name.startswith("guide/")}
        hub.edit("models/me/plain", plain)
        options = ("--prompt", PROMPTS[0], "--num_inference_steps", 2)
        for name in ("guided", "plain"):
            command("generate_images.py", "--model", f"me/{name}", *options, "--output_dir", tmp_path / name, cwd=tmp_path,
                    env=hub.environment(), fork=True)  # fmt: skip
        offline = hub.environment() | {"HF_HUB_OFFLINE": "1"}
        options = ("--prompt", PROMPTS[0], "--num_inference_steps", 2, "--output_dir", tmp_path / "offline")
        again = command("generate_images.py", "--model", "me/guided", *options, cwd=tmp_path, env=offline, fork=True)
    known = [sampling.read_parameters(tmp_path / name / "0000-seed0.png") for name in ("guided", "plain")]
    assert "drawn without a guide" not in again.stderr
    assert known[0] == sampling.read_parameters(tmp_path / "offline/0000-seed0.png")
    assert [one.get("guide_hash") for one in known] == [guide.guide_hash(sampling.load_pipeline(run).unet), None]
    assert known[0]["unet_hash"] == known[1]["unet_hash"]
    found = np.asarray(Image.open(tmp_path / "guided/0000-seed0.png")).astype(int)
    wanted = draw(sampling.load_pipeline(run), PROMPTS[:1], num_inference_steps=2, guidance_scale=7.5)[0]
    assert np.abs(found - wanted).max() <= 1


def test_a_guide_that_cannot_be_read_is_named(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "unet")
    (copy / "pipeline/guide" / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(UserError, match="pipeline/guide"):
        sampling.load_pipeline(copy)
    assert guide_folder(copy / "pipeline") == copy / "pipeline/guide"
