"""Compiled models: the same pictures, chosen by themselves where they are there and fresh, a sentence where they cannot be had."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SCRIPTS
from t2i import engines, sampling
from t2i.runs import UserError

PROMPTS = ["a red flower", "a blue flower at night", "a white flower"]


@pytest.fixture(scope="module")
def exported(workspace, command, tmp_path_factory):
    """A copy of a finished run whose pipeline the real command has compiled."""
    run = tmp_path_factory.mktemp("exported") / "unet"
    shutil.copytree(workspace / "unet", run)
    done = command("export_pipeline.py", "--model", run, cwd=run.parent)
    assert f"MB in {run}/pipeline/openvino" in done.stdout
    return run


def draw(pipeline, prompts=PROMPTS, **options):
    return sampling.generate(
        pipeline, prompts, range(len(prompts)), num_inference_steps=4, progress=False, **options
    ).astype(int)


def is_compiled(pipeline) -> bool:
    return isinstance(pipeline.unet, engines.CompiledUnet)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_compiled_models_draw_the_stock_picture(exported, scale):
    stock, compiled = sampling.load_pipeline(exported), sampling.load_pipeline(exported, engine="auto")
    assert is_compiled(compiled)
    assert not is_compiled(stock)
    wanted, found = draw(stock, guidance_scale=scale), draw(compiled, guidance_scale=scale)
    assert np.abs(wanted - found).mean() < 1.0  # of 255: bf16 where the processor has it
    assert np.abs(wanted - wanted[::-1]).mean() > 2.0  # pictures that differ at all


def test_a_picture_does_not_depend_on_its_batch(exported):
    pipeline = sampling.load_pipeline(exported, engine="openvino")
    together, alone = draw(pipeline), draw(pipeline, batch_size=1)
    assert (together == alone).all()


def test_other_weights_make_compiled_models_stale(exported, tmp_path):
    run = tmp_path / "unet"
    shutil.copytree(exported, run)
    weights = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert not is_compiled(sampling.load_pipeline(run, engine="auto"))


def test_half_of_compiled_models_do_not_count(exported, tmp_path):
    run = tmp_path / "unet"
    shutil.copytree(exported, run)
    (run / "pipeline" / "openvino" / "unet.bin").unlink()
    assert not is_compiled(sampling.load_pipeline(run, engine="auto"))


def test_a_checkpoint_is_compiled_on_demand_alone(exported):
    checkpoint = exported / "checkpoint-000004"
    assert not is_compiled(sampling.load_pipeline(checkpoint, engine="auto"))
    compiled = sampling.load_pipeline(checkpoint, engine="openvino")
    assert is_compiled(compiled)
    assert np.abs(draw(compiled) - draw(sampling.load_pipeline(checkpoint))).mean() < 1.0


def test_mistakes_get_a_sentence(exported):
    with pytest.raises(UserError, match="unknown engine 'onnx'; take one of auto, torch, openvino"):
        sampling.load_pipeline(exported, engine="onnx")
    with pytest.raises(UserError, match="engine openvino draws on the CPU, not on cuda"):
        sampling.load_pipeline(exported, engine="openvino", device=torch.device("cuda"))
    code = (
        "import sys; sys.modules['openvino'] = None; sys.path.append(sys.argv[1]); from t2i import engines, sampling\n"
        "try: sampling.load_pipeline(sys.argv[2] + '/checkpoint-000004', engine='openvino')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, SCRIPTS, exported], capture_output=True, text=True, check=True)
    assert "UserError engine openvino is not installed; run: pip install" in done.stdout


def test_presets_by_the_command(exported, command, tmp_path):
    arguments = ("--model", exported, "--prompt", "a red flower", "--output_dir", tmp_path)
    command("generate_images.py", *arguments, "--preset", "draft", cwd=tmp_path)
    known = json.loads(Image.open(tmp_path / "0000-seed0.png").info["parameters"])
    assert (known["scheduler"], known["num_inference_steps"]) == ("DPMSolverMultistepScheduler", 5)
    command(
        "generate_images.py",
        *arguments,
        "--preset",
        "fast",
        "--num_inference_steps",
        2,
        "--engine",
        "torch",
        cwd=tmp_path,
    )
    again = json.loads(Image.open(tmp_path / "0000-seed0.png").info["parameters"])
    assert again["num_inference_steps"] == 2
    assert (
        again["unet_hash"] == known["unet_hash"] == json.loads((exported / "run.json").read_text())["output_unet_hash"]
    )


def test_no_pipeline_gets_a_sentence(command, tmp_path):
    done = command("export_pipeline.py", "--model", tmp_path, cwd=tmp_path, code=2)
    assert "holds no pipeline (no model_index.json in it or in pipeline/)" in done.stdout + done.stderr
    assert "no model: give --model" in command("export_pipeline.py", cwd=tmp_path, code=2).stderr
