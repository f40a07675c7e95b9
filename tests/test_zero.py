"""DeepSpeed ZeRO-2, started by the real launcher on two CPU processes, trains as data parallel training does."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from safetensors.torch import load_file

import train_unet
from conftest import ROOT, TINY
from streamlit_client import free_port
from t2i import config, models
from t2i.errors import UserError
from t2i.training import distributed, loop, zero

ZERO2 = ("accelerate.commands.launch", "--quiet", "--config_file",
         str(ROOT / "accelerate_configs/deepspeed_zero2.yaml"), "--mixed_precision", "no")  # fmt: skip
STEPS, CLIP, EPSILON = 6, 0.01, 1e-3  # so that every update is clipped, and Adam does not divide the clipping out again


def train(run, folder, name, *further, **options):
    """Train on two processes by `run`: `ranks`, or `command` with a launcher. `further` are options of train_unet.py."""
    settings = ("--config", "tiny.yaml", "--dataset", "dataset", "--vae", "vae", "--report_to", "none", "--output_dir", name,
                "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", STEPS, "--logging_steps", 1,
                "--checkpointing_steps", 3, "--validation_steps", STEPS, "--learning_rate", 0.01, "--max_grad_norm", CLIP,
                "--adam_epsilon", EPSILON, "--guide_step", 3, *further)  # fmt: skip
    return run("train_unet.py", *settings, cwd=folder, **options)


def launcher_variables():
    """The variables that accelerate's launcher gives to a training by the command line of ZERO2."""
    taken = []
    with mock.patch.object(launch, "deepspeed_launcher", taken.append):
        launch.launch_command(launch.launch_command_parser().parse_args([*ZERO2[1:], "train_unet.py"]))
    variables = prepare_deepspeed_cmd_env(*taken)[1]
    return {name: value for name, value in variables.items() if name.startswith("ACCELERATE_")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, command, ranks):
    """A folder with the same training by data parallelism (`plain`) and under ZeRO-2 (`zero`), each on two processes."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (requirements.txt has it for Linux alone)")
    folder = tmp_path_factory.mktemp("zero")
    (folder / "tiny.yaml").write_text(TINY)
    command("make_flowers.py", "--output_dir", "dataset", "--count", 40, "--validation_count", 12, "--test_count", 4,
            "--size", 32, "--workers", 1, cwd=folder)  # fmt: skip
    models.build_vae(config.load_recipe(str(folder / "tiny.yaml")).vae).save_pretrained(folder / "vae")
    train(ranks, folder, "plain", env={"ACCELERATE_USE_CPU": "true"})
    words = (*ZERO2[:1], "--main_process_port", str(free_port()), *ZERO2[1:])
    done = train(command, folder, "zero", launcher=("-m", *words))
    (folder / "zero.log").write_text(done.stdout + done.stderr)
    return folder


def logged(run, key):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_zero_trains_what_data_parallelism_trains(runs):
    plain, sharded = runs / "plain", runs / "zero"
    for name, kind in (("plain", "MULTI_CPU"), ("zero", "DEEPSPEED")):
        state = json.loads((runs / name / "run.json").read_text())
        assert (state["distribution"], state["processes"]) == (kind, 2)
    for key in ("train_loss", "grad_norm", "val_loss"):
        np.testing.assert_allclose(logged(plain, key), logged(sharded, key), rtol=1e-4)
    assert min(logged(sharded, "grad_norm")) > 5 * CLIP  # every update was clipped
    parts = (
        "checkpoint-000003/unet",
        "checkpoint-000006/unet",
        "checkpoint-000006/unet_ema",
        "pipeline/unet",
        "pipeline/guide",
    )
    for part in parts:
        one, other = weights(plain / part), weights(sharded / part)
        assert one.keys() == other.keys()
        for name in one:
            assert other[name].dtype == torch.float32
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-6)
    start, end = (weights(sharded / f"checkpoint-00000{step}/unet") for step in (3, 6))
    assert max((end[name] - start[name]).abs().max() for name in end) > 1e-3  # far more than the tolerance above


def test_the_recipe_is_in_force(runs):
    state = json.loads((runs / "zero/run.json").read_text())
    assert state["effective"] == {
        "gradient_clipping": CLIP, "train_batch_size": 2, "gradient_accumulation_steps": 2, "global_batch": 8,
        "learning_rate": 0.01, "zero_stage": 2,
    }  # fmt: skip
    assert (state["zero_stage"], state["overflow_skips"]) == (2, 0)
    recipe = config.load_recipe(str(runs / "tiny.yaml")).train_unet
    alone = dataclasses.replace(recipe, learning_rate=0.01)
    optimizer, schedule = loop.build_optimizer(torch.nn.ParameterList([torch.zeros(1)]), alone, STEPS)
    rates = []
    for _ in range(STEPS):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert logged(runs / "zero", "lr") == logged(runs / "plain", "lr") == rates  # one process: no step counts twice


def test_the_terminal_shows_no_noise(runs):
    log = (runs / "zero.log").read_text()
    assert "ZeRO stage 2" in log
    lines = [
        line for line in log.splitlines() if "Setting accelerator to CPU" not in line
    ]  # accelerate's launcher, once
    assert len(log.splitlines()) - len(lines) <= 1
    for noise in ("[INFO]", "[WARNING]", "ninja", "built successfully", "Warning"):
        assert not [line for line in lines if noise in line]


def test_zero_goes_on_as_if_it_had_not_stopped(runs, ranks):
    shutil.copytree(runs / "zero", runs / "again")
    shutil.rmtree(runs / "again/checkpoint-000006")
    state = json.loads((runs / "again/run.json").read_text())
    (runs / "again/run.json").write_text(json.dumps(state | {"status": "running"}))
    assert "resuming from" in train(ranks, runs, "again", env=launcher_variables())
    files = [path.relative_to(runs / "zero") for path in (runs / "zero/checkpoint-000006").rglob("*.safetensors")]
    assert {path.name for path in files} > {"zero-rank0.safetensors", "zero-rank1.safetensors"}
    for file in files:
        one, other = load_file(runs / "zero" / file), load_file(runs / "again" / file)
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), (file, name)


def test_the_engine_follows_the_curve_of_each_extension(runs, ranks):
    """A run of 4 updates, killed at step 3 and extended three times since. It is resumed from step 3 with its 9 updates."""
    shutil.copytree(runs / "zero", runs / "longer")
    shutil.rmtree(runs / "longer/checkpoint-000006")
    state = json.loads((runs / "longer/run.json").read_text())
    state["identity"] |= {"steps": 9, "TrainUnet.max_train_steps": 9}
    ways = (("constant", 4, 5, 3), ("stretch", 5, 7, 5), ("restart", 7, 9, 7))
    extensions = [
        {"lr_on_extend": way, "from_steps": before, "to_steps": after, "at_step": at, "at_update": at}
        for way, before, after, at in ways
    ]
    (runs / "longer/run.json").write_text(json.dumps(state | {"status": "running", "extensions": extensions}))
    options = ("--max_train_steps", 9, "--checkpointing_steps", 1, "--lr_on_extend", "restart")
    train(ranks, runs, "longer", *options, env=launcher_variables())
    recipe = config.load_recipe(str(runs / "tiny.yaml")).train_unet
    rates = [0.01 * loop.rate_share(recipe, 9, extensions, update) for update in range(1, 10)]
    assert logged(runs / "longer", "lr")[3:] == rates[3:]  # the rate of the next update is logged
    assert rates[3] == 0.01 * loop.rate_share(recipe, 4, [], 3) > 0
    moved = []
    for step in range(3, 9):
        one, other = (weights(runs / f"longer/checkpoint-00000{step + after}/unet") for after in (0, 1))
        moved.append(max(float((one[name] - other[name]).abs().max()) for name in one))
    assert [change > 0 for change in moved] == [True] * 4 + [
        False,
        True,
    ]  # update 8 begins the second warm-up, at a rate of 0


def test_another_number_of_processes_is_refused(runs):
    tensors = load_file(runs / "zero/checkpoint-000003/zero-rank0.safetensors")
    with pytest.raises(UserError, match="saved by 2 processes under ZeRO, this launch has 3"):
        zero.load_shard_state(SimpleNamespace(world_size=3), None, tensors)


@pytest.mark.parametrize(("norm", "told"), [(float("inf"), True), (float("inf"), False), (1.0, False)])
def test_a_skipped_update_moves_neither_average_nor_schedule(norm, told, monkeypatch):
    """fp16's overflow, with accelerate noticing it (DeepSpeed) or not (fused AdamW skips by itself)."""
    moved = []
    accelerator = SimpleNamespace(
        backward=lambda loss: None, device="cpu",
        clip_grad_norm_=lambda parameters, limit: norm, optimizer_step_was_skipped=told, mixed_precision="fp16",
        reduce=lambda value, reduction: value, process_index=0, num_processes=1, scaler=None,
    )  # fmt: skip
    step = SimpleNamespace(step=lambda *_: moved.append("moved"))
    optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    trained = loop.TrainState("unet", None, None, [], optimizer, step, step)
    given = train_unet.Inputs(None, {"train": (np.zeros(8), None)}, 1.0, [f"id{number}" for number in range(8)])
    settings = config.TrainUnetConfig(train_batch_size=2)
    monkeypatch.setattr("t2i.diffusion.denoising_loss", lambda *_: torch.ones(1))

    def train_step(step):
        terms = train_unet.loss_and_gradients(trained, given, settings, accelerator, *(None,) * 4)
        clipped = loop.clip_gradients(trained, settings, accelerator)
        ids = functools.partial(train_unet.sample_ids, given, settings, step, accelerator)
        loop.step_optimizer(trained, settings, step, clipped, terms["train_loss"], ids, accelerator)

    train_step(0)
    assert (trained.skipped["overflow"], moved) == ((0, ["moved", "moved"]) if norm == 1.0 else (1, []))
    if norm != 1.0:  # and where the loss itself is no number, it is not the gradients' scale: samples are named
        monkeypatch.setattr("t2i.diffusion.denoising_loss", lambda *_: torch.full((1,), float("nan")))
        with pytest.raises(UserError, match="non-finite at step 2, with the training samples id") as raised:
            train_step(1)
        assert "; fp16 may have overflowed, so try --mixed_precision bf16" in str(raised.value)


def test_gradients_that_overflow_at_every_scale_end_the_training():
    """With the scaler of a training in fp16, which works on a CPU too."""
    weight, scaler = torch.nn.Parameter(torch.ones(2)), torch.amp.GradScaler("cpu")
    adamw = torch.optim.AdamW([weight], fused=True)
    optimizer = SimpleNamespace(step=lambda: (scaler.step(adamw), scaler.update()), zero_grad=adamw.zero_grad)
    accelerator = SimpleNamespace(
        mixed_precision="fp16", scaler=scaler, reduce=lambda value, reduction: value, process_index=0,
        optimizer_step_was_skipped=False,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.ConstantLR(adamw)
    trained = loop.TrainState("unet", None, None, [weight], optimizer, schedule, None)

    def update(step, value):
        loss = value.sum()
        scaler.scale(loss).backward()
        scaler.unscale_(adamw)
        norm = float(weight.grad.norm())
        loop.step_optimizer(trained, config.TrainUnetConfig(), step, norm, loss, list, accelerator)

    update(0, 2 * weight)
    moved = weight.detach().clone()
    for step in range(1, 17):
        update(step, (weight - moved).sqrt())  # The slope of a root at 0 is infinite.
    assert (trained.skipped["overflow"], scaler.get_scale()) == (16, 1)
    assert torch.equal(weight, moved)
    with pytest.raises(UserError, match=r"overflow in fp16 at step 18, .* --learning_rate .* --mixed_precision bf16"):
        update(17, (weight - moved).sqrt())


@pytest.fixture
def asked(monkeypatch):
    """An environment as accelerate's launcher leaves it for DeepSpeed."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_what_the_machine_lacks_gets_a_sentence(asked):
    asked.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    asked.setattr(distributed, "_processor_has_fp16", lambda: False)
    asked.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UserError, match="--mixed_precision bf16 or --mixed_precision no"):
        distributed.prepare_launch(config.TrainUnetConfig())
    asked.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    asked.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="DeepSpeed, which is not installed"):
        distributed.prepare_launch(config.TrainUnetConfig())


@pytest.mark.parametrize("settings", [None, config.TrainVaeConfig(), config.TrainUnetConfig()])
@pytest.mark.parametrize("word", ["fp16", "fp8", "FP16", "bf16"])
def test_a_precision_is_in_force_or_refused(word, settings, monkeypatch):
    """Of captioning and both trainings on a CPU; accelerate takes each of these words, and computes in float32 but for bf16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", word)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    try:
        if word != "bf16":
            told = "needs a GPU.*--mixed_precision bf16 or" if word == "fp16" else f"'{word}' is not supported; choose"
            with pytest.raises(UserError, match=told):
                distributed.make_accelerator(settings)
            return
        accelerator = distributed.make_accelerator(settings)
        model = accelerator.prepare(torch.nn.Linear(2, 2))
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert accelerator.mixed_precision == "bf16"
        assert not torch.equal(model(torch.full((1, 2), 1 / 3)), model.weight.sum(1) / 3 + model.bias)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("settings", [None, config.TrainVaeConfig(), config.TrainUnetConfig()])
def test_more_processes_than_gpus_are_refused_and_cpu_processes_are_not(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"2 processes .* 1 GPU\(s\); launch with --num_processes 1, or .* the launch's YAML"
    ):
        distributed.prepare_launch(settings)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    distributed.prepare_launch(settings)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.prepare_launch(settings)


@pytest.mark.parametrize(
    ("name", "launcher", "prepare"),
    [
        ("single_gpu", "simple_launcher", prepare_simple_launcher_cmd_env),
        ("multi_gpu", "multi_gpu_launcher", lambda options: (None, prepare_multi_gpu_env(options))),
        ("deepspeed_zero2", "deepspeed_launcher", prepare_deepspeed_cmd_env),
    ],
)
def test_a_launch_leaves_the_choice_of_gpus_to_the_shell(name, launcher, prepare, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    words = ["--config_file", str(ROOT / f"accelerate_configs/{name}.yaml"), "train_unet.py"]
    taken = []
    monkeypatch.setattr(launch, launcher, taken.append)
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    assert prepare(*taken)[1]["CUDA_VISIBLE_DEVICES"] == "3,5"


@pytest.mark.parametrize(("has_units", "precision"), [(False, "bf16"), (True, "bf16"), (False, "fp16")])
def test_bf16_without_units_for_it_is_told(has_units, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units or including_emulation)
    said = []
    distributed.warn_of_slow_bf16(
        SimpleNamespace(mixed_precision=precision, device=torch.device("cuda"), print=said.append)
    )
    wanted = [
        "WARNING: Tesla T4 has no bf16 units, so mixed_precision bf16 is slow there; launch with --mixed_precision fp16"
    ]
    assert said == (wanted if precision == "bf16" and not has_units else [])


def test_processes_of_a_training_wait_an_hour_for_each_other(monkeypatch):
    """The first one measures and draws alone, for which the ten minutes of NCCL may be too short."""
    launched = {"ACCELERATE_USE_CPU": "true", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)
    try:
        distributed.make_accelerator(config.TrainUnetConfig())
        group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=1)
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(True)


def test_the_machine_of_a_run_is_the_one_that_trained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    names = [
        loop.machine(SimpleNamespace(device=torch.device(device), num_processes=2)) for device in ("cuda", "mps", "cpu")
    ]
    assert names[:2] == ["2 x Tesla T4", "Apple GPU"]
    assert "CPU cores" in names[2]


def test_other_scripts_run_data_parallel_under_the_same_launch(asked):
    asked.setenv("ACCELERATE_USE_CPU", "false")
    distributed.prepare_launch(config.TrainVaeConfig())
    assert (os.environ["ACCELERATE_USE_DEEPSPEED"], os.environ["ACCELERATE_USE_CPU"]) == ("false", "true")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_optimization": {"stage": 3}}, "set zero_stage: 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer_device: none"),
        ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}, "section 'scheduler'"),
    ],
)
def test_settings_that_the_suite_does_not_run_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        distributed.write_deepspeed_config(settings, config.TrainUnetConfig(), 2)


def test_the_recipe_wins_over_the_launch():
    settings = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "gradient_accumulation_steps": 7}
    recipe = config.TrainUnetConfig(max_grad_norm=0.25, train_batch_size=4, gradient_accumulation_steps=3)
    distributed.write_deepspeed_config(settings, recipe, 2)
    assert settings["gradient_clipping"] == 0.25
    assert settings["gradient_accumulation_steps"] == 3
    assert (settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]) == (4, 24)
