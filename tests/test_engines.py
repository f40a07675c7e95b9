"""Compiled models: they draw the same pictures, are chosen if present and fresh, and give a sentence if they cannot be used."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import SCRIPTS
from t2i.errors import UserError
from t2i.pictures import engines, png, quantization, sampling

PROMPTS = ["a red flower", "a blue flower at night", "a white flower"]


@pytest.fixture(scope="module")
def exported(workspace, command, tmp_path_factory):
    """A copy of a finished run whose pipeline the real command has compiled."""
    run = tmp_path_factory.mktemp("exported") / "unet"
    shutil.copytree(workspace / "unet", run)
    done = command("export_pipeline.py", "--model", run, cwd=run.parent)
    assert f"MB in {run}/pipeline/openvino: " in done.stdout
    quality = (
        "dB PSNR of those without" in done.stdout or ": none in 8 bits" in done.stdout
    )  # as the processor computes
    assert quality
    assert "at guidance scale 7.5" in done.stdout
    return run


def has_8_bit_products() -> bool:
    """Whether the processor multiplies and adds 8-bit numbers without saturating (VNNI, AMX). Only Linux tells."""
    told = Path("/proc/cpuinfo")
    return bool(set(told.read_text().split()) & {"avx512_vnni", "avx_vnni", "amx_int8"}) if told.is_file() else True


def draw(pipeline, prompts=PROMPTS, **options):
    return sampling.generate(
        pipeline, prompts, range(len(prompts)), num_inference_steps=4, progress=False, **options
    ).astype(int)


def is_compiled(pipeline) -> bool:
    return isinstance(pipeline.unet, engines.CompiledUnet)


def test_valid_compiled_models_are_not_compiled_again(exported, command):
    file = exported / "pipeline/openvino/engine.json"
    before = file.stat().st_mtime_ns
    done = command("export_pipeline.py", "--model", exported, cwd=exported.parent)
    assert f"reusing the compiled models in {exported}/pipeline/openvino: " in done.stdout
    assert file.stat().st_mtime_ns == before
    assert quantization.is_current(exported / "pipeline", 7.5)
    assert not quantization.is_current(exported / "pipeline", 3.0)  # Other pictures decide what computes in 8 bits.


def test_a_unet_that_scales_and_shifts_by_the_timestep_is_compiled(exported):
    pipeline = sampling.load_pipeline(exported)
    config = dict(pipeline.unet.config) | {"resnet_time_scale_shift": "scale_shift"}
    torch.manual_seed(0)
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    wanted, found = draw(pipeline, guidance_scale=1.0), draw(engines.compile_pipeline(pipeline), guidance_scale=1.0)
    assert np.abs(wanted - found).mean() < 1.0
    assert np.abs(wanted - wanted[::-1]).mean() > 2.0


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


def test_guidance_that_ends_costs_half_from_there_and_draws_as_stock_does(exported):
    stock, compiled = sampling.load_pipeline(exported), sampling.load_pipeline(exported, engine="openvino")
    sizes = []
    hook = stock.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole, half = draw(stock), draw(stock, guidance_end=0.5)
    hook.remove()
    assert sizes == [6] * 4 + [6, 6, 3, 3]
    assert np.abs(whole - half).mean() > 0
    assert (draw(stock) == whole).all()  # nothing of it stays
    assert (draw(stock, guidance_end=0.8) == whole).all()  # of 4 steps the fourth as well
    found = draw(compiled, guidance_end=0.5)
    assert np.abs(half - found).mean() < 1.0
    assert set(compiled.unet.networks) == {1, 2}
    assert (draw(compiled, guidance_end=0.5, batch_size=1) == found).all()


def test_rescaled_guidance_keeps_the_contrast_of_an_unguided_picture(exported):
    stock, compiled = sampling.load_pipeline(exported), sampling.load_pipeline(exported, engine="openvino")
    options = {"guidance_scale": 30.0}
    plain, glaring, rescaled = (
        draw(stock, guidance_scale=1.0),
        draw(stock, **options),
        draw(stock, guidance_rescale=1.0, **options),
    )
    far, near = (abs(pictures.std() - plain.std()) for pictures in (glaring, rescaled))
    assert near < far / 2
    # A scale of 30 enlarges the rounding of compiled models too.
    mild = {"guidance_scale": 7.5, "guidance_rescale": 1.0}
    assert np.abs(draw(compiled, **mild) - draw(stock, **mild)).mean() < 1.0
    assert (draw(stock, guidance_rescale=0.0, **options) == glaring).all()


def test_one_seed_for_several_prompts_without_guidance(exported):
    stock, compiled = (sampling.load_pipeline(exported, engine=engine) for engine in ("torch", "openvino"))
    wanted, found = (
        sampling.generate(
            pipeline, PROMPTS[:2], [5, 5], guidance_scale=1.0, num_inference_steps=3, progress=False
        ).astype(int)
        for pipeline in (stock, compiled)
    )
    assert np.abs(wanted - found).mean() < 1.0


def test_a_step_of_two_calls_is_guided_in_both_or_in_neither(exported):
    pipeline, sizes = sampling.load_pipeline(exported, scheduler="KDPM2DiscreteScheduler"), []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    sampling.generate(pipeline, PROMPTS[:1], [0], num_inference_steps=4, guidance_end=0.5, progress=False)
    assert sizes == [2, 2, 2, 2, 1, 1, 1]


@given(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_one_step_at_least_is_guided_and_all_at_the_end(steps, end, later):
    low, high = sorted((png.guided_steps(steps, end), png.guided_steps(steps, later)))
    assert 1 <= low <= high <= steps
    assert (png.guided_steps(steps, min(end, later)), png.guided_steps(steps, 1.0)) == (low, steps)


def test_eight_bits_are_kept_only_where_pictures_stay(exported, monkeypatch):
    known = json.loads((exported / "pipeline" / "openvino" / "engine.json").read_text())
    if known["int8"] or has_8_bit_products():  # without them, sums of products saturate, and pictures differ
        assert known["int8"]
        assert known["psnr_db"] >= quantization.LEAST_DB
    monkeypatch.setattr(quantization, "LEAST_DB", 1000.0)
    pipeline = sampling.load_pipeline(exported)
    models = engines.convert(pipeline)
    made, int8, worst = quantization.quantise(models, lambda networks: engines.wrap_networks(pipeline, networks), 3.0)
    assert (made, int8, worst) == (models, [], None)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_upsampling_with_fewer_multiplications_is_that_of_diffusers(height, width, channels, batch, seed):
    torch.manual_seed(seed)
    layer, images = Upsample2D(channels, use_conv=True), torch.randn(batch, channels, height, width)
    with torch.no_grad():
        assert torch.allclose(engines._upsample(layer, images), layer(images), atol=1e-5)
        other = Upsample2D(channels, use_conv=False)
        assert torch.equal(engines._upsample(other, images), other(images))


def test_encoded_prompts_are_kept_and_few(exported, monkeypatch):
    pipeline = sampling.load_pipeline(exported, engine="openvino")
    network, asked = pipeline.text_encoder.network, []
    pipeline.text_encoder.network = lambda ids: asked.append(1) or network(ids)
    first = draw(pipeline)
    assert len(asked) == 4  # three prompts and the empty one
    assert (draw(pipeline) == first).all()
    assert len(asked) == 4
    monkeypatch.setattr(engines, "TEXTS_KEPT", 2)
    assert (draw(pipeline) == first).all()
    assert len(pipeline.text_encoder.known) == 2


def test_a_pipeline_keeps_its_scheduler(exported, tmp_path):
    pipeline = sampling.load_pipeline(exported, scheduler="unipc")
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    shutil.copytree(exported / "pipeline" / "openvino", tmp_path / "openvino")
    compiled = sampling.load_pipeline(tmp_path, engine="auto")
    assert is_compiled(compiled)
    assert type(compiled.scheduler) is UniPCMultistepScheduler
    assert compiled.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type


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


def test_damaged_compiled_models_get_a_sentence_and_old_ones_do_not_count(exported, tmp_path):
    run = tmp_path / "unet"
    shutil.copytree(exported, run)
    network = run / "pipeline" / "openvino" / "unet.xml"
    network.write_bytes(network.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"compiled models in .*openvino cannot be loaded .*or take --engine torch"):
        sampling.load_pipeline(run, engine="auto")
    assert not quantization.is_current(run / "pipeline", 7.5)  # So the command that the sentence names mends them.
    engine = network.with_name("engine.json")
    engine.write_text(json.dumps(json.loads(engine.read_text()) | {"format": 1}))
    assert not is_compiled(sampling.load_pipeline(run, engine="auto"))


def test_a_checkpoint_is_compiled_on_demand_alone(exported):
    checkpoint = exported / "checkpoint-000004"
    assert not is_compiled(sampling.load_pipeline(checkpoint, engine="auto"))
    compiled = sampling.load_pipeline(checkpoint, engine="openvino")
    assert is_compiled(compiled)
    assert np.abs(draw(compiled) - draw(sampling.load_pipeline(checkpoint))).mean() < 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_finds_its_stack_after_another_thread_has_dropped_the_model():
    """Without it, Ctrl-C kills the process with a segmentation fault."""
    code = """
import ctypes, gc, sys, threading
sys.path.append(sys.argv[1])
import numpy, openvino
from openvino import opset13
from t2i.pictures import engines

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def mapped():
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in open("/proc/self/maps")]
    return not stack.start or any(low <= stack.start < high for low, high in spans)

one = opset13.parameter([1, 4], numpy.float32)
held = [engines.compile_model(openvino.Model([opset13.relu(one)], [one], "one"))]
thread = threading.Thread(target=lambda: (held.clear(), gc.collect()))
thread.start()
thread.join()
print(mapped())
"""
    done = subprocess.run([sys.executable, "-c", code, SCRIPTS], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_mistakes_get_a_sentence(exported):
    with pytest.raises(UserError, match="unknown engine 'onnx'; take one of auto, torch, openvino"):
        sampling.load_pipeline(exported, engine="onnx")
    with pytest.raises(UserError, match="engine openvino draws on the CPU, not on cuda"):
        sampling.load_pipeline(exported, engine="openvino", device=torch.device("cuda"))
    code = (
        "import sys; sys.modules['openvino'] = None; sys.path.append(sys.argv[1]); from t2i.pictures import engines, sampling\n"
        "try: sampling.load_pipeline(sys.argv[2] + '/checkpoint-000004', engine='openvino')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, SCRIPTS, exported], capture_output=True, text=True, check=True)
    assert "UserError engine openvino is not installed; run: pip install" in done.stdout


def test_presets_by_the_command(exported, command, tmp_path):
    arguments = ("--model", exported, "--prompt", "a red flower", "--output_dir", tmp_path)
    command("generate_images.py", *arguments, "--preset", "draft", cwd=tmp_path)
    known = json.loads(Image.open(tmp_path / "0000-seed0.png").info["parameters"])
    assert (known["scheduler"], known["num_inference_steps"]) == ("UniPCMultistepScheduler", 3)
    assert known["guidance_end"] == 0.3
    command(
        "generate_images.py",
        *arguments,
        "--preset",
        "fast",
        "--num_inference_steps",
        2,
        "--guidance_end",
        1,
        "--engine",
        "torch",
        cwd=tmp_path,
    )
    again = json.loads(Image.open(tmp_path / "0001-seed0.png").info["parameters"])  # beside the first one's picture
    assert (again["num_inference_steps"], again["guidance_end"]) == (2, 1.0)
    assert (
        again["unet_hash"] == known["unet_hash"] == json.loads((exported / "run.json").read_text())["output_unet_hash"]
    )


def test_no_pipeline_gets_a_sentence(command, tmp_path):
    done = command("export_pipeline.py", "--model", tmp_path, cwd=tmp_path, code=2)
    assert "holds no pipeline (no model_index.json in it or in pipeline/)" in done.stdout + done.stderr
    assert "no model: give --model" in command("export_pipeline.py", cwd=tmp_path, code=2).stderr
