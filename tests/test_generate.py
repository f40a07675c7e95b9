"""generate_images.py: refusals before it draws, its messages, and no picture of other settings overwritten."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import urlsplit

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from huggingface_hub import constants
from PIL import Image

import generate_images
from loopback_hub import LoopbackHub
from t2i.errors import UserError
from t2i.pictures import sampling
from t2i.pictures.png import read_parameters
from t2i.training import denoiser


@pytest.fixture
def draw(workspace, tmp_path, monkeypatch):
    """Run the script's main in a folder of its own; gives the folder's pictures by name, with their bytes."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pictures are small
    pipeline = sampling.load_pipeline(workspace / "unet")
    scheduler = pipeline.scheduler

    def load(model, **options):
        if options.get("device") != "cpu" or str(model) != "kept":
            return load_pipeline(model, **options)
        pipeline.scheduler = scheduler
        return pipeline

    load_pipeline = sampling.load_pipeline
    monkeypatch.setattr(sampling, "load_pipeline", load)

    def run(*words, model="kept", folder="pictures"):
        given = ["generate_images.py", "--model", str(model), "--output_dir", folder, *words]
        given += [] if "--num_inference_steps" in words else ["--num_inference_steps", "2"]
        given += [] if "--device" in words else ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", given)
        generate_images.main()
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    yield run
    torch.set_num_threads(threads)


def test_another_command_continues_the_numbers_and_the_same_writes_the_same(draw):
    first = draw("--prompt", "a red flower")
    assert list(first) == ["0000-seed0.png"]
    both = draw("--prompt", "a blue flower", "--grid")
    assert list(both) == ["0000-seed0.png", "0001-seed0.png", "grid.png"]
    assert both["0000-seed0.png"] == first["0000-seed0.png"]
    assert draw("--prompt", "a blue flower", "--grid") == both
    more = draw("--prompt", "a blue flower", "a red flower", "--grid", "--guidance_scale", "3")
    assert {name: more[name] for name in both} == both
    assert sorted(more.keys() - both) == ["0002-seed0.png", "0003-seed0.png", "grid-0001.png"]
    Path("pictures/0000-seed0.png").write_bytes(b"edited by somebody")
    kept = draw("--prompt", "a red flower")
    assert kept["0000-seed0.png"] == b"edited by somebody"
    assert kept["0004-seed0.png"] == first["0000-seed0.png"]


def test_prompts_given_several_times_are_all_drawn(draw, capsys):
    draw("--prompt", "a", "b", "--prompt", "c", "--prompt=a")
    said = capsys.readouterr().out.splitlines()
    assert [line.rsplit(": ", 1)[1] for line in said] == ["a", "b", "c", "a"]
    assert read_parameters(Path("pictures/0002-seed0.png"))["prompt"] == "c"


def test_a_prompt_beyond_the_models_tokens_is_said(draw, capsys):
    draw("--prompt", "red flower " * 30 + "and an elephant", "a flower", "--negative_prompt", "dog " * 40)
    said = capsys.readouterr().err
    assert said.count("WARNING: prompt") == 2
    assert 'and the model reads 24: "' in said
    assert 'elephant" is cut off' in said


def test_a_negative_prompt_without_guidance_is_said(draw, capsys):
    draw("--prompt", "a flower", "--negative_prompt", "a dog", "--guidance_scale", "1")
    assert "WARNING: negative_prompt has no effect at guidance scale 1" in capsys.readouterr().err
    draw("--prompt", "a flower", "--negative_prompt", "a dog", "--guidance_scale", "1.5")
    assert "no effect" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--guidance_scale", "inf"], "guidance_scale = inf is not usable"),
        (["--guidance_scale", "nan"], "guidance_scale = nan is not usable"),
        (["--guidance_scale", "1e30"], "it must be at most 1000"),
        (["--guidance_end", "nan"], "guidance_end = nan is not usable"),
        (["--guidance_rescale", "2"], "guidance_rescale = 2.0 is not usable"),
        (["--seed", str(2**64)], "it must be at most 9223372036854775807"),
        (["--seed", str(2**63 - 1), "--num_images_per_prompt", "2"], "leaves no seeds"),
        (["--device", "gpu"], "device gpu cannot be used"),
        (["--device", "meta"], "device meta cannot be used"),
        (["--device", "cuda:99"], "device cuda:99 cannot be used"),
        (["--prompt", "caf\udce9"], "bytes that are not UTF-8"),
        (["--scheduler", "heun"], "needs some of the image in the last noise level"),
        (["--scheduler", "pndm"], "scheduler pndm needs 4 steps or more here, not 2"),
        (["--scheduler", "VQDiffusionScheduler"], "is not for this kind of model; take one of ddim"),
        (["--prompt_file", "latin.txt"], "it is not UTF-8"),
        (["--prompt_file", "."], "prompt_file . cannot be read (Is a directory)"),
    ],
)
def test_mistakes_are_sentences_before_anything_is_drawn(draw, monkeypatch, words, sentence):
    monkeypatch.setattr(sampling, "generate", None)  # nothing is drawn
    Path("latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(UserError) as error:
        draw("--prompt", "x", *words)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        ("unet", ["--revision", "v2"], "revision v2 is a revision of the Hub"),
        ("unet/pipeline", ["--weights", "raw"], "leave out --weights raw, or give a checkpoint"),
        ("me/flowers", ["--weights", "raw"], "leave out --weights raw, or give a checkpoint"),
        ("bare", ["--weights", "raw"], "the checkpoints of the finished run in"),
    ],
)
def test_options_that_would_change_nothing_are_refused(draw, workspace, tmp_path, model, words, sentence):
    bare = tmp_path / "bare"
    (bare / "pipeline" / "unet").mkdir(parents=True)
    shutil.copyfile(workspace / "unet" / "run.json", bare / "run.json")
    places = {"bare": bare, "me/flowers": model}
    with pytest.raises(UserError) as error:
        draw("--prompt", "x", *words, model=places.get(model, workspace / model))
    assert sentence in str(error.value)


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/t2i", "x" * 300])
def test_a_folder_that_cannot_be_written_is_said_before_drawing(draw, monkeypatch, folder):
    monkeypatch.setattr(sampling, "generate", None)
    Path("file").touch()
    with pytest.raises(UserError, match=r"^output_dir .* cannot be written"):
        draw("--prompt", "x", folder=folder)


def test_a_prompt_file_of_windows(draw, capsys):
    Path("a.txt").write_bytes("\ufeffété\r\n\r\nrose\r\n".encode())
    Path("b.txt").write_bytes("été\nrose\n".encode("utf-16"))
    first = draw("--prompt_file", "a.txt")
    assert read_parameters(Path("pictures/0000-seed0.png"))["prompt"] == "été"
    assert draw("--prompt_file", "b.txt") == first


def test_numbers_that_overflow_and_memory_that_ends_get_a_sentence(draw, workspace, monkeypatch):
    broken = sampling.load_pipeline(workspace / "unet")
    with torch.no_grad():
        broken.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"numbers overflowed at guidance_scale 7\.5 with DDIMScheduler"):
        sampling.generate(broken, ["x"], [0], num_inference_steps=2, progress=False)

    for full in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),  # on Windows
    ):
        monkeypatch.setattr(type(broken), "__call__", Mock(side_effect=full))
        with pytest.raises(UserError, match=r"memory does not suffice for 1 pictures at once .*--batch_size"):
            sampling.generate(broken, ["x"], [0], num_inference_steps=2, progress=False)


def test_a_training_lives_on_if_its_samples_cannot_be_drawn(workspace, monkeypatch, tmp_path, capsys):
    unet = sampling.load_pipeline(workspace / "unet").unet.train()
    settings = {"prompts": ["x"], "num_inference_steps": 2}
    denoiser.draw_samples(unet, tmp_path, settings, None, 7)
    assert "WARNING: no validation pictures at step 7: " in capsys.readouterr().err

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "to", fails)
    denoiser.draw_samples(unet, workspace / "unet", settings, None, 8)
    said = capsys.readouterr().err
    assert "step 8: the memory is full (CUDA out of memory. Tried to allocate 2 GiB); to see pictures, lower" in said
    assert unet.training


def test_a_rescaled_picture_says_so_and_others_are_as_before(draw, tmp_path):
    draw("--prompt", "a red flower", "--guidance_rescale", "0.7")
    draw("--prompt", "a red flower")
    known = [read_parameters(path) for path in sorted(tmp_path.rglob("*.png"))]
    assert sorted(one.get("guidance_rescale", 0.0) for one in known) == [0.0, 0.7]


def test_when_guidance_ends_the_prompt_stays(workspace):
    pipeline, contexts = sampling.load_pipeline(workspace / "unet"), []
    pipeline.unet.register_forward_pre_hook(
        lambda module, inputs, options: contexts.append(options["encoder_hidden_states"]), with_kwargs=True
    )
    sampling.generate(pipeline, ["a red flower"], [0], num_inference_steps=4, guidance_end=0.5, progress=False)
    assert [len(context) for context in contexts] == [2, 2, 1, 1]
    empty, prompt = contexts[0]
    assert not torch.equal(empty, prompt)
    assert all(torch.equal(context[0], prompt) for context in contexts[2:])


def test_copies_of_checkpoints(draw, workspace, tmp_path):
    run = workspace / "unet"
    (tmp_path / "run").mkdir()
    for name in ("run.json", "config.yaml"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    (tmp_path / "run" / "checkpoint-000008-backup").symlink_to(run / "checkpoint-000008")
    with pytest.raises(UserError, match=r"has no checkpoint of its own, only copies; give --model .*-backup"):
        draw("--prompt", "x", model=tmp_path / "run")
    (tmp_path / "alone").symlink_to(run / "checkpoint-000008")
    with pytest.raises(UserError, match=r"is a checkpoint without its run: .* pipeline/ beside it, which is missing"):
        draw("--prompt", "x", model=tmp_path / "alone")
    (tmp_path / "run" / "pipeline").symlink_to(run / "pipeline")
    assert draw("--prompt", "x", model=tmp_path / "run" / "checkpoint-000008-backup")
    pictures = sampling.generate(
        sampling.load_pipeline(run / "checkpoint-000008"), ["x"], [0], num_inference_steps=2, progress=False
    )
    assert np.array_equal(np.asarray(Image.open("pictures/0000-seed0.png")), pictures[0])


def test_a_copy_that_is_damaged_or_not_whole_draws_nothing(draw, workspace, tmp_path):
    run = Path(shutil.copytree(workspace / "unet", tmp_path / "copied"))
    weights = run / "checkpoint-000008/unet_ema/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(
        data[:-5000] + bytes(5000)
    )  # of the right size, as a copy that was broken off in a preallocated file
    with pytest.raises(UserError, match=r"unet_ema.*is damaged \(its SHA-256"):
        draw("--prompt", "x", model=run / "checkpoint-000008")
    shutil.rmtree(run / "pipeline/tokenizer")
    with pytest.raises(UserError, match=r"lacks tokenizer, which its model_index\.json names"):
        draw("--prompt", "x", model=run)


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        ("a red\u2028flower\r\na blue\x0bone\r".encode(), ["a red\u2028flower", "a blue\x0bone"]),
        ("red\nblue".encode("utf-16"), ["red", "blue"]),
        ("red\nblue".encode("utf-16-le"), "holds zero bytes, as UTF-16 does"),
        (b"caf\xe9", "it is not UTF-8"),
    ],
)
def test_a_prompt_file_has_one_prompt_per_line(data, prompts, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(data)
    options = generate_images.Options(prompt_file=str(tmp_path / "prompts.txt"))
    if isinstance(prompts, list):
        assert generate_images.read_prompts(options) == prompts
    else:
        with pytest.raises(UserError, match=prompts):
            generate_images.read_prompts(options)


# --- Pipelines that other programs saved -----------------------------------------------------------------------------


@pytest.fixture
def foreign(workspace, tmp_path):
    """A copy of the workspace's pipeline folder, and a function that changes its model_index.json."""
    folder = Path(shutil.copytree(workspace / "unet" / "pipeline", tmp_path / "foreign"))
    index = json.loads((folder / "model_index.json").read_text())
    return folder, lambda **parts: (folder / "model_index.json").write_text(json.dumps(index | parts))


def test_a_pipeline_in_half_precision_draws_as_in_float32(foreign, tmp_path):
    folder, _ = foreign
    pipeline = sampling.load_pipeline(folder)
    options = {"guidance_scale": 2.0, "num_inference_steps": 2, "progress": False}
    wanted = sampling.generate(pipeline, ["a red flower"], [0], **options)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half")
    half = sampling.load_pipeline(tmp_path / "half")
    assert {model.dtype for model in (half.unet, half.vae, half.text_encoder)} == {torch.float32}
    drawn = sampling.generate(half, ["a red flower"], [0], **options)
    assert np.abs(drawn.astype(int) - wanted).max() <= 2


def test_pipelines_of_other_kinds_are_refused_before_their_weights_are_read(draw, foreign):
    folder, change = foreign
    change(_class_name="StableDiffusionXLPipeline")
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(UserError, match=r"foreign is a StableDiffusionXLPipeline, .* give a StableDiffusionPipeline"):
        draw("--prompt", "x", model=folder)


def test_pipelines_of_other_kinds_on_the_hub_are_refused(draw, foreign, tmp_path, monkeypatch):
    folder, change = foreign
    change(_class_name="StableDiffusionXLPipeline")
    with LoopbackHub() as hub:
        hub.create("models/me/xl")
        hub.edit("models/me/xl", {"model_index.json": (folder / "model_index.json").read_bytes()})
        template = hub.url + urlsplit(constants.HUGGINGFACE_CO_URL_TEMPLATE).path
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        with pytest.raises(
            UserError, match=r"^model me/xl is a StableDiffusionXLPipeline, .* give a StableDiffusionPipe"
        ):
            draw("--prompt", "x", model="me/xl")


def test_a_pipeline_without_its_safety_checker_draws(draw, foreign):
    folder, change = foreign
    wanted = draw("--prompt", "a red flower", model=folder)
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change(
        safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"], requires_safety_checker=True
    )
    assert draw("--prompt", "a red flower", model=folder) == wanted


# --- Guidance that ends early ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("steps", [4, 6, 12])
def test_pndm_guides_as_many_steps_as_ddim(workspace, steps, skips):
    """PNDM calls the UNet several times in its first steps."""
    last, pipeline = [], sampling.load_pipeline(workspace / "unet")
    config = pipeline.scheduler.config
    for scheduler in (DDIMScheduler.from_config(config), PNDMScheduler.from_config(config, skip_prk_steps=skips)):
        calls = []
        hook = pipeline.unet.register_forward_pre_hook(
            lambda module, inputs, calls=calls: calls.append((len(inputs[0]), int(inputs[1])))
        )
        pipeline.scheduler = scheduler
        sampling.generate(pipeline, ["x"], [0], num_inference_steps=steps, guidance_end=0.5, progress=False)
        hook.remove()
        last.append(min(timestep for rows, timestep in calls if rows == 2))
        assert any(rows == 1 for rows, _ in calls)
    assert abs(last[0] - last[1]) <= 1000 / steps + 1
