"""Students: what they learn, what they are drawn with, and what is refused. Commands are those that users type."""

import copy
import json
import runpy
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from PIL import Image
from streamlit.testing.v1 import AppTest

import distill_unet
from conftest import ROOT, SCRIPTS
from t2i import models
from t2i.clouds import staging
from t2i.config import DistillConfig, Recipe, run_of
from t2i.data.caches import to_pixels
from t2i.diffusion import jump, jump_loss
from t2i.errors import UserError
from t2i.evaluation import image_losses
from t2i.evaluation.metrics import psnr
from t2i.files import write_json
from t2i.pictures import cells, guide, sampling
from t2i.pictures.png import (
    choose_preset,
    fastest_preset,
    presets_of,
    read_parameters,
    scheduler_problem,
    student_steps,
)
from t2i.runs import find_student
from t2i.training import tiny_decoder, trajectories

OPTIONS = (
    "--trajectories", 48, "--validation_images", 8, "--max_train_steps", 48, "--lr_warmup_steps", 4,
    "--checkpointing_steps", 16, "--logging_steps", 4, "--report_to", "none", "--decoder_steps", 60,
)  # fmt: skip
PROMPT = "a red flower with five round petals"


@pytest.fixture(scope="module")
def teacher(workspace, tmp_path_factory):
    """A copy of the finished tiny run in a folder of its own, where a student may lie beside it."""
    run = tmp_path_factory.mktemp("distilled") / "unet"
    shutil.copytree(workspace / "unet", run, ignore=shutil.ignore_patterns("evaluation", "cells"))
    return run


@pytest.fixture(scope="module")
def student(workspace, command, teacher):
    """The teacher's student by the real command, made in the workspace, whose data set the settings name."""
    command("distill_unet.py", "--model", teacher, "--output_dir", teacher.with_name("turbo"), *OPTIONS, cwd=workspace)
    return teacher.with_name("turbo")


@pytest.fixture
def run_main(monkeypatch, workspace, teacher):
    """`distill_unet.py`'s main in this process, in the workspace: saves the seconds of its imports."""

    def run(*arguments):
        monkeypatch.chdir(workspace)
        monkeypatch.setattr(sys, "argv", ["distill_unet.py", *map(str, arguments)])
        distill_unet.main()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the commands: sums in another order differ in the last bit
    yield run
    torch.set_num_threads(threads)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- What a student is -----------------------------------------------------------------------------------------------


def test_a_student_comes_nearer_to_its_teachers_pictures(student):
    errors = {row["step"]: row["val_picture"] for row in rows(student) if "val_picture" in row}
    losses = {row["step"]: row["val_loss"] for row in rows(student) if "val_loss" in row}
    assert sorted(errors) == [0, 16, 32, 48]  # step 0: the teacher itself, drawing as the student does
    assert errors[48] < 0.9 * errors[0]
    assert losses[48] < 0.9 * losses[0]
    result = json.loads((student / "run.json").read_text())
    assert result["val_picture"] == errors[48]


def test_a_run_tells_its_teacher_and_how_the_student_draws(student, teacher):
    result, origin = (json.loads((student / name).read_text()) for name in ("run.json", "provenance.json"))
    hashed = json.loads((teacher / "run.json").read_text())["output_unet_hash"]
    assert result["identity"]["teacher_hash"] == origin["teacher_hash"] == hashed != result["output_unet_hash"]
    # Without an evaluation, the guidance is that of the teacher's validation pictures.
    assert result["student"] == {"num_inference_steps": 2, "guidance_scale": 1.0, "distilled_guidance_scale": 7.5}
    card = (student / "pipeline" / "README.md").read_text()
    assert "num_inference_steps=2,\n    guidance_scale=1,\n" in card
    assert f"UNet `{hashed}`" in card
    assert (student / "samples" / "step-000048.png").is_file()


def test_no_file_of_a_students_pipeline_names_a_folder_of_this_machine(student, teacher):
    for file in student.rglob("*.json"):
        if file.parent != student:  # The run's own files are not published.
            assert str(teacher.parent) not in file.read_text(), file


def test_frozen_models_are_written_once_and_the_pipeline_is_whole(student, workspace):
    """Windows refuses to replace files that are mapped into memory, as those of loaded models are."""
    for run, first in ((workspace / "unet", "checkpoint-000004"), (student, "checkpoint-000016")):
        for part in ("vae", "text_encoder"):
            (weights,) = (run / "pipeline" / part).glob("*.safetensors")
            assert weights.stat().st_mtime_ns < (run / first / "manifest.json").stat().st_mtime_ns
        drawn = DiffusionPipeline.from_pretrained(run / "pipeline")
        assert models.hash_model(drawn.unet) == json.loads((run / "run.json").read_text())["output_unet_hash"]


def test_whoever_may_read_a_folder_may_read_the_weights_in_it(student, workspace):
    weights = [file for run in (workspace / "vae", workspace / "unet", student) for file in run.rglob("*.safetensors")]
    assert {"optimizer.safetensors", "rng-0.safetensors", "model.safetensors"} < {file.name for file in weights}
    assert not [file for file in weights if file.stat().st_mode & 0o777 != file.parent.stat().st_mode & 0o666]


def test_a_tiny_decoder_takes_the_autoencoders_place(student, teacher):
    tiny, vae = models.load_decoder(str(student / "pipeline")), models.load_vae(str(teacher))
    assert isinstance(tiny, AutoencoderTiny)
    assert models.vae_factor(tiny) == models.vae_factor(vae)
    latents = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    wanted, made, new = (
        to_pixels(tiny_decoder.decode(one, latents)) for one in (vae, tiny, tiny_decoder.build_tiny(vae, 0))
    )
    assert psnr(made, wanted).mean() > psnr(new, wanted).mean() + 3
    assert json.loads((student / "run.json").read_text())["decoder_psnr_db"] > 10


def test_only_large_autoencoders_get_a_tiny_decoder_by_default():
    sizes = {(32, 64): 0, (64, 128): 1500, (128, 256, 512, 512): 1500}
    for channels, steps in sizes.items():
        small = AutoencoderKL(block_out_channels=(32,), norm_num_groups=1)
        small.register_to_config(block_out_channels=channels)
        assert tiny_decoder.default_steps(small) == steps


def test_a_damaged_tiny_decoder_in_the_cache_is_named(student, tmp_path):
    latents = np.zeros((2, 4, 4, 4), np.float16)
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=1)
    config = DistillConfig(decoder_steps=1)
    made, _ = tiny_decoder.cache_tiny(vae, latents, latents, config, str(tmp_path))
    again, _ = tiny_decoder.cache_tiny(vae, latents, latents, config, str(tmp_path))
    assert models.hash_model(made) == models.hash_model(again)
    (weights,) = tmp_path.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged; delete the folder"):
        tiny_decoder.cache_tiny(vae, latents, latents, config, str(tmp_path))


@pytest.fixture(scope="module")
def picture(student, command):
    """A picture that the command draws with the student by default."""
    folder = student.with_name("pictures")
    command("generate_images.py", "--model", student, "--prompt", PROMPT, "--output_dir", folder, cwd=folder.parent)
    return folder / "0000-seed0.png"


def test_stock_diffusers_draws_with_a_student_what_the_suite_draws(student, picture, caplog):
    known = read_parameters(picture)
    assert (known["num_inference_steps"], known["guidance_scale"], known["scheduler"]) == (2, 1.0, "DDIMScheduler")
    stock = DiffusionPipeline.from_pretrained(student / "pipeline", safety_checker=None)
    # diffusers saves a key of AutoencoderTiny that it warns of when it loads it.
    messages = [record.getMessage() for record in caplog.records if "AutoencoderTiny" not in record.getMessage()]
    assert not [message for message in messages if "not expected" in message]
    draws = {"num_inference_steps": 2, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0)}
    drawn = stock(PROMPT, **draws).images[0]
    assert np.abs(np.asarray(drawn, np.int16) - np.asarray(Image.open(picture), np.int16)).max() <= 1


def test_the_evaluation_draws_as_the_student_does(student, workspace, command):
    few = ("--checkpoints", "checkpoint-000048", "--classifier_steps", 0, "--judge_network", "None")
    command("evaluate_checkpoints.py", "--model", student, *few, cwd=workspace)
    report = json.loads((student / "evaluation" / "evaluation.json").read_text())["report"]
    settings = {key: report[key] for key in ("guidance_scale", "scheduler", "num_inference_steps", "guidance_end")}
    expected = {"guidance_scale": 1.0, "scheduler": "DDIMScheduler", "num_inference_steps": 2, "guidance_end": 1.0}
    assert settings == expected
    assert "the student draws in 2 steps, without guidance" in (student / "pipeline" / "README.md").read_text()


def test_preset_turbo_finds_the_student_beside_its_teacher(student, teacher, picture, command, tmp_path):
    assert find_student(teacher) == student
    words = ("--model", teacher, "--preset", "turbo", "--prompt", PROMPT, "--output_dir", "pictures")
    command("generate_images.py", *words, cwd=tmp_path)
    assert (tmp_path / "pictures" / picture.name).read_bytes() == picture.read_bytes()


def test_the_same_command_reuses_the_student(student, teacher, run_main, capsys):
    run_main(
        "--model", f"{teacher}/", "--output_dir", student, *OPTIONS
    )  # the same model, as a shell completes its name
    assert "reusing the finished run" in capsys.readouterr().out


def test_a_job_gets_of_its_teacher_what_it_needs(teacher, tmp_path):
    """What is sent of a run, a checkpoint of a training or a pipeline draws as on this machine, by the same settings."""
    run = tmp_path / "unet"
    shutil.copytree(teacher, run)
    shutil.copytree(run / "checkpoint-000004" / "unet_ema", run / "pipeline" / "guide")
    write_json(run / "pipeline" / "guide" / "guide.json", {"step": 4})
    write_json(run / "evaluation" / "evaluation.json", {"report": {"guidance_scale": 3.0, "guidance_rescale": 0.7}})
    (run / "pipeline" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    training = tmp_path / "training"
    shutil.copytree(run, training, ignore=lambda folder, _: ["unet"] if Path(folder).name == "pipeline" else [])
    state = json.loads((run / "run.json").read_text()) | {"status": "unfinished"}
    write_json(training / "run.json", {key: value for key, value in state.items() if key != "output_unet_hash"})
    for model, inside, checkpoints in (
        (run, ".", set()), (run / "checkpoint-4", "checkpoint-000004", {"checkpoint-000004"}), (run / "pipeline", "pipeline", set()),
        (tmp_path / "pipeline", ".", set()), (training / "checkpoint-000008", "checkpoint-000008", {"checkpoint-000008"}),
    ):  # fmt: skip
        words = [str(SCRIPTS / "distill_unet.py"), "--model", str(model), "--dataset", "a/b", "--resolution", "32"]
        sent = staging.find_teacher(staging.read_command(words, "a cloud"))
        assert sent.path == inside
        assert {name.split("/")[0] for name in sent.names if name.startswith("check")} == checkpoints
        assert not [
            name for name in sent.names if name.endswith((".bin", ".png", "optimizer.safetensors", "README.md"))
        ]
        there = tmp_path / "job" / str(len(list(tmp_path.glob("job/*"))))
        for name in sent.names:
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sent.folder / name, there / name)
        here, copied = (sampling.load_pipeline(path).unet for path in (model, there / sent.path))
        assert models.hash_model(guide.unguided(copied)) == models.hash_model(guide.unguided(here))
        assert guide.guide_hash(copied) == guide.guide_hash(here)
        assert (guide.guide_of(copied) is None) == (inside == "checkpoint-000004")
        chosen = [distill_unet.choose_guidance(Recipe(), run_of(str(path))) for path in (model, there / sent.path)]
        assert chosen == ([(7.5, 0.0)] * 2 if model == tmp_path / "pipeline" else [(3.0, 0.7)] * 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no model: give --model with the run folder"),
        (["--model", "STUDENT"], "is a student already"),
        (["--model", "WORKSPACE/vae"], r"vae lacks .*unet.config\.json; give a run folder of train_unet\.py"),
        (["--model", "TRAINING"], "training has not finished; let it finish, or give one of its checkpoints"),
        (["--model", "flowers"], "--model flowers does not exist; give a local folder, an s3:// folder or a Hub id"),
    ],
)
def test_a_job_without_a_teacher_is_refused(words, sentence, student, workspace, tmp_path):
    write_json(tmp_path / "training" / "run.json", {"status": "unfinished"})
    places = {"STUDENT": student, "WORKSPACE/vae": workspace / "vae", "TRAINING": tmp_path / "training"}
    words = [str(places.get(word, word)) for word in words]
    words = [str(SCRIPTS / "distill_unet.py"), "--dataset", "a/b", *words]
    with pytest.raises(UserError, match=sentence):
        staging.find_inputs(staging.read_command(words, "a cloud"))


def test_a_teachers_settings_with_a_credential_are_not_sent(tmp_path):
    run = tmp_path / "unet"
    for name in ("run.json", "pipeline/unet/config.json", "pipeline/vae/config.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    (run / "config.yaml").write_text("data: {dataset: 'https://me:hf_abcdefghijklmnopqrstuv@example.org/a'}")
    words = [str(SCRIPTS / "distill_unet.py"), "--config", "demo", "--dataset", "a/b", "--model", str(run)]
    with pytest.raises(UserError, match=r"unet/config\.yaml holds what looks like a credential"):
        staging.read_command(words, "a cloud")


# --- Stop and resume -------------------------------------------------------------------------------------------------

KILLED = """
import os, runpy, signal, sys
sys.path.append({scripts!r})
from t2i.training import loop
step_optimizer = loop.step_optimizer
def step(train_state, config, number, *others):
    if number == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    step_optimizer(train_state, config, number, *others)
loop.step_optimizer = step
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_killed_distillation_resumes_bit_for_bit(student, teacher, command, run_main, workspace, tmp_path, capsys):
    killer = tmp_path / "killer.py"
    killer.write_text(KILLED.format(scripts=str(SCRIPTS), script=str(SCRIPTS / "distill_unet.py")))
    words = ("--model", teacher, "--output_dir", tmp_path / "killed", *OPTIONS)
    command(killer, *words, cwd=workspace, code=-9, fork=True)
    assert not (tmp_path / "killed" / "checkpoint-000032").exists()
    run_main(*words)
    assert "checkpoint-000016" in capsys.readouterr().out
    for file in (
        "checkpoint-000048/unet/diffusion_pytorch_model.safetensors",
        "checkpoint-000048/unet_ema/diffusion_pytorch_model.safetensors",
        "checkpoint-000048/optimizer.safetensors",
        "pipeline/unet/diffusion_pytorch_model.safetensors",
        "pipeline/vae/diffusion_pytorch_model.safetensors",
    ):
        assert (tmp_path / "killed" / file).read_bytes() == (student / file).read_bytes(), file
    last = {row["step"]: row for row in rows(tmp_path / "killed")}[48]
    assert last == {row["step"]: row for row in rows(student)}[48]


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("distill_unet.py", [], "no model: give --model"),
        ("distill_unet.py", ["--model", "TEACHER", "--output_dir", "TEACHER"], "is the teacher's own run"),
        ("distill_unet.py", ["--model", "STUDENT"], "is a student already"),
        ("distill_unet.py", ["--model", "TRAINING"], "has not finished; let it finish, or give one of its checkpoints"),
        ("distill_unet.py", ["--model", "TEACHER", "--num_inference_steps", "3"], "num_inference_steps"),
        ("distill_unet.py", ["--model", "TEACHER", "--resolution", "64"], "give --resolution 32"),
        ("distill_unet.py", ["--model", "nowhere/at/all", "--dataset", "dataset"], "neither a folder here nor a Hub id"),
        ("distill_unet.py", ["--model", "TEACHER", "--output_dir", "OTHER", "--seed", "1"], "holds another run"),
        ("distill_unet.py", ["--model", "TEACHER", "--output_dir", "OTHER", "--guidance_scale", "2"], "guidance_scale: 7.5"),
        ("distill_unet.py", ["--model", "TEACHER", "--output_dir", "OLDER"], "teacher_solver: null there, [\"unipc\", 8, 1.0]"),
        ("train_unet.py", ["--config", "tiny.yaml", "--dataset", "dataset", "--vae", "STUDENT"], "holds a tiny autoencoder"),
        ("generate_images.py", ["--model", "STUDENT", "--prompt", "x", "--preset", "fast"], "only in 2 steps of DDIMSch"),
        ("generate_images.py", ["--model", "STUDENT", "--prompt", "x", "--num_inference_steps", "8"], "take preset turbo"),
        ("generate_images.py", ["--model", "STUDENT", "--prompt", "x", "--guidance_scale", "3"], "has learnt guidance"),
        ("generate_images.py", ["--model", "unet", "--prompt", "x", "--preset", "turbo"], "needs a student"),
        ("evaluate_checkpoints.py", ["--model", "unet", "--preset", "turbo"], "needs a student"),
        ("evaluate_checkpoints.py", ["--model", "STUDENT", "--preset", "draft"], "take preset turbo"),
        ("evaluate_checkpoints.py", ["--model", "STUDENT", "--guidance_scales", "1", "3"], "give --guidance_scales 1"),
        ("evaluate_checkpoints.py", ["--model", "STUDENT", "--guidance_scales", "3", "--preset", "turbo"], "has learnt guid"),
        ("evaluate_checkpoints.py", ["--model", "unet", "--split_seed", "3"], "split_seed 3: the model was trained with 0"),
        ("evaluate_checkpoints.py", ["--model", "unet", "--resolution", "64"], "give --resolution 32"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    script, arguments, sentence, student, teacher, workspace, tmp_path, monkeypatch, capsys
):
    other = tmp_path / "new"  # A process keeps the lock of a folder until it ends.
    if {"OTHER", "OLDER"} & {*arguments}:
        other.mkdir()
        state = json.loads((student / "run.json").read_text())
        if "OLDER" in arguments:  # A version whose teacher drew otherwise did not say how.
            del state["identity"]["teacher_solver"]
        (other / "run.json").write_text(json.dumps(state))
    training = tmp_path / "training"
    write_json(training / "run.json", {"status": "unfinished"})
    places = {"TEACHER": teacher, "STUDENT": student, "OTHER": other, "OLDER": other, "TRAINING": training}
    words = [str(places.get(word, word)) for word in arguments]
    options = [*map(str, OPTIONS), "--output_dir", str(other)] if script == "distill_unet.py" else []
    options = options[:-2] if "--output_dir" in words else options
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "argv", [script, *options, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


# --- Parts -----------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "velocity": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "beta_schedule": "squaredcos_cap_v2",
    },
    "noise": {"prediction_type": "epsilon", "beta_schedule": "scaled_linear"},
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_jump_is_a_step_of_ddim(kind, steps):
    scheduler = DDIMScheduler(**SCHEDULES[kind], timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    scheduler.set_timesteps(steps)
    levels = torch.tensor([*scheduler.timesteps.tolist(), -1])
    sample, output = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for here, there in pairwise(levels):
        moved = jump(scheduler, sample, output, here.repeat(3), there.repeat(3))
        torch.testing.assert_close(moved, scheduler.step(output, here, sample).prev_sample, rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_jump_is_the_error_of_the_velocity():
    class Answer(torch.nn.Module):
        def forward(self, latents, timesteps, hidden):
            return type("Output", (), {"sample": self.output})

    scheduler = DDIMScheduler(**SCHEDULES["velocity"], timestep_spacing="trailing", set_alpha_to_one=True)
    latents, right, wrong = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    here, there, unet = torch.tensor([999, 249]), torch.tensor([749, -1]), Answer()
    later = jump(scheduler, latents, right, here, there)
    for output in (right, wrong):
        unet.output = output
        loss = jump_loss(unet, scheduler, latents, later, here, there, torch.zeros(2, 1, 1))
        torch.testing.assert_close(loss, (output - right).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_the_guidance_of_the_evaluation_is_distilled_unless_another_is_asked_for(tmp_path):
    recipe = Recipe()
    recipe.train_unet.guidance_rescale = 0.35
    assert distill_unet.choose_guidance(recipe, tmp_path) == (7.5, 0.35)
    for report, found in (
        ({"guidance_scale": 3}, (3.0, 0.0)),
        ({"guidance_scale": 5.0, "guidance_rescale": 0.7}, (5.0, 0.7)),
    ):
        write_json(tmp_path / "evaluation" / "evaluation.json", {"report": report})
        assert distill_unet.choose_guidance(recipe, tmp_path) == found
    recipe.distill.guidance_scale = 2.0
    assert distill_unet.choose_guidance(recipe, tmp_path) == (2.0, 0.7)
    recipe.distill.guidance_rescale = 0.0
    assert distill_unet.choose_guidance(recipe, tmp_path) == (2.0, 0.0)
    assert "guidance_rescale" not in distill_unet.identity_of(recipe, {})
    recipe.distill.guidance_rescale = 0.7
    assert distill_unet.identity_of(recipe, {})["guidance_rescale"] == 0.7


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("guided", [False, True])
def test_a_trajectory_ends_in_the_picture_that_the_solver_draws(teacher, guided, rescale):
    pipeline = sampling.load_pipeline(teacher, scheduler="unipc")
    if guided:  # by a UNet that answers otherwise
        weak = copy.deepcopy(pipeline.unet)
        for weight in weak.parameters():
            weight.data *= 0.8
        guide.attach(pipeline, weak)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    hidden = models.encode_captions(pipeline.text_encoder, pipeline.tokenizer, ["", "a red flower", "a blue flower"])
    found = trajectories.solve_trajectories(
        guide.unguided(pipeline.unet), guide.guide_of(pipeline.unet), pipeline.scheduler, 3.0, rescale, hidden[:1], 5, noise,
        hidden[1:],
    )  # fmt: skip
    assert found.shape == (2, 5, 4, 16, 16)
    assert torch.equal(found[:, 0], noise)
    with guide.guiding(pipeline):
        drawn = pipeline(
            prompt_embeds=hidden[1:], negative_prompt_embeds=hidden[:1].repeat(2, 1, 1), latents=noise, guidance_scale=3.0,
            guidance_rescale=rescale, num_inference_steps=trajectories.SOLVER.num_inference_steps, output_type="latent",
        ).images  # fmt: skip
    torch.testing.assert_close(found[:, -1], drawn, rtol=1e-3, atol=1e-3)


def test_a_student_has_one_preset_and_other_models_have_the_others():
    plain = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    student = plain | {"_student_steps": 2}
    assert list(presets_of(plain)) == ["exact", "fast", "draft"]
    assert presets_of(student) == {"turbo": ("ddim", 2, 1.0)}
    assert fastest_preset(student) == choose_preset(None, student) == choose_preset("turbo", student)
    assert choose_preset(None, plain) == choose_preset("exact", plain)
    with pytest.raises(UserError, match="needs a student"):
        choose_preset("turbo", plain)
    assert scheduler_problem("ddim", student, 2) is None
    assert "take preset turbo" in str(scheduler_problem("ddim", student, 30))
    assert "take preset turbo" in str(scheduler_problem("unipc", student))
    assert [student_steps({"_student_steps": wrong}) for wrong in (None, 0, True, "4", 2.0)] == [None] * 5


def test_losses_of_images_are_measured_with_the_teacher(student):
    with pytest.raises(UserError, match="measure the losses of its teacher"):
        image_losses.measure(student, "pipeline", {}, load=sampling.load_pipeline)


def test_the_playground_drafts_with_the_student_and_offers_turbo(student, teacher, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    Path("outputs").mkdir()
    for run in (teacher, student):
        Path("outputs", run.name).symlink_to(run)
    app = AppTest.from_file(str(ROOT / "dashboard" / "streamlit_app.py"), default_timeout=120)
    app.query_params["run"] = "turbo"
    app.switch_page("views/playground.py").run()
    assert not app.exception
    values = {key: app.session_state[key] for key in ("guidance_scale", "num_inference_steps", "scheduler")}
    assert values == {"guidance_scale": 1.0, "num_inference_steps": 2, "scheduler": "ddim"}
    assert app.get("button_group")[0].options == ["turbo"]
    next(box for box in app.selectbox if box.label == "Run").set_value("unet").run()
    assert not app.exception
    assert cells.first_cell(Path("outputs/turbo"), PROMPT).num_inference_steps == 2
    assert find_student(Path("outputs/unet")) == Path("outputs/turbo")
