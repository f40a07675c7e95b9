"""run_recipe.py: keys of the recipe on its command line, and Ctrl-C."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import run_recipe
from conftest import ROOT, SCRIPTS
from t2i.config import Recipe, check_dataset, load_recipe, override
from t2i.errors import UserError
from t2i.launch_config import check_launch_config
from t2i.loading import find_dataset

TYPED = """--config photos --train_vae.max_train_steps 20 --train_unet.max-train-steps=30 --output_dir out
--data.resolution 32 --vae.vae a/b
--vae.pretrained-vae-model-name-or-path a/b --train_unet.no_use_ema --train_unet.validation_prompts a rose --vae.vae_layers 2"""


def test_keys_of_the_recipe_go_to_the_scripts_that_read_them():
    own, overrides = run_recipe.take_overrides(TYPED.split())
    assert own == ["--config", "photos", "--output_dir", "out"]
    taken = run_recipe.options_of(overrides, "data", "vae", "train_vae")
    path = "--vae a/b --pretrained_vae_model_name_or_path a/b"
    assert " ".join(taken) == f"--resolution 32 {path} --vae_layers 2 --max_train_steps 20"
    unet = run_recipe.options_of(overrides, "data", "vae", "unet", "train_unet", without=run_recipe.VAE_OPTIONS)
    assert " ".join(unet) == (
        "--resolution 32 --vae_layers 2 --max_train_steps 30 --no_use_ema --validation_prompts a rose"
    )
    recipe = load_recipe("photos")
    for section, words in overrides.items():
        override(recipe, section, [word for option in words for word in option])
    assert (recipe.train_vae.max_train_steps, recipe.train_unet.max_train_steps) == (20, 30)
    assert (recipe.data.resolution, recipe.vae.vae, recipe.train_unet.use_ema) == (32, "a/b", False)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--trian_unet.seed 3", "unknown section of option --trian_unet.seed: 'trian_unet'; did you mean 'train_unet'"),
        ("--train_unet.output_dir x", "run_recipe.py sets it for each stage; give --output_dir"),
        ("--data.train_data_dir x", "give --dataset"),
        ("--train_vae.dry_run", "leave it out"),
    ],
)
def test_what_no_stage_reads_is_refused(typed, sentence):
    with pytest.raises(UserError) as error:
        run_recipe.take_overrides(typed.split())
    assert sentence in str(error.value)


def test_values_of_keys_are_checked_as_the_scripts_check_them(capsys):
    with pytest.raises(UserError, match=r"max_train_steps = 0 is not usable: it must be at least 1"):
        override(Recipe(), "train_unet", ["--max_train_steps", "0"])
    with pytest.raises(SystemExit) as ended:
        override(Recipe(), "train_unet", ["--max_train_stepz", "3"])
    assert ended.value.code == 2
    assert "--max_train_steps" in capsys.readouterr().err


CHILD = """
import signal, sys, time
def end(number, frame): time.sleep(0.3); sys.exit(75)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def wait_for_file(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_stage_and_gives_its_exit_code(number, tmp_path):
    ready = tmp_path / "ready"

    def interrupt():
        wait_for_file(ready)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_recipe.wait_for(subprocess.Popen([sys.executable, "-c", CHILD, str(ready)])) == 75
    thread.join()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_ends_as_the_training_does_and_without_a_traceback(number, tmp_path, environment):
    (tmp_path / "child.py").write_text(CHILD)
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    words = run_recipe.launch([str(config)], "child.py", str(tmp_path / "ready"))
    words[words.index(str(SCRIPTS / "child.py"))] = str(tmp_path / "child.py")
    launcher = subprocess.Popen(words, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_file(tmp_path / "ready")
    launcher.send_signal(number)
    said = launcher.communicate(timeout=60)[1].decode()
    assert launcher.returncode == 75
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read (No such file or directory); name a YAML of"),
        ("train_unet: {seed: 1}", "is no YAML of accelerate; name one of accelerate_configs/"),
        ("- a", "is no YAML of accelerate"),
        ("a: [", "launch.yaml"),
        (
            "compute_environment: AMAZON_SAGEMAKER",
            "is for AMAZON_SAGEMAKER, not for this machine; submit the job with make train",
        ),
        ("compute_environment: LOCAL_MACHINE", "has no distributed_type; write distributed_type: 'NO'"),
        ("distributed_type: NO", "YAML reads distributed_type: NO as false; write distributed_type: 'NO'"),
        ("distributed_type: MULTI_GPU\nmixed_precision: no", "write mixed_precision: 'no'"),
    ],
)
def test_a_launch_by_a_wrong_yaml_gets_one_sentence(text, sentence, tmp_path, command):
    file = tmp_path / "launch.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as told:
        check_launch_config(file, "--accelerate_config")
    assert sentence in str(told.value)
    done = command("launch_local.py", "--config_file", file, "x.py", cwd=tmp_path, code=2, fork=True)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_stages_that_were_run_one_by_one_are_reported_too(tmp_path, monkeypatch, capsys):
    images = ["real", "reconstructions", "pictures"]
    report = {
        "guidance_scale": 2.0, "prompt_following": {"color": 0.5}, "probe_accuracy": {}, "unseen_images": 10,
        "memorisation": {"share_closer": 0.1}, "judge": {name: {"kernel_distance": 3.0} for name in images},
    }  # fmt: skip
    for folder, results in (
        ("vae", {"psnr_db": 20.0}),
        ("unet", {"train_loss": 1.0, "val_loss": 1.0, "steps": 8}),
        ("unet/evaluation", {"report": report}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(json.dumps(results | {"peak_rss_bytes": 1}))
    monkeypatch.setattr(run_recipe, "stage", lambda *_: None)  # each is reused
    monkeypatch.setattr(sys, "argv", ["run_recipe.py", "--config", "demo", "--output_dir", str(tmp_path)])
    run_recipe.main()
    said = capsys.readouterr().out
    assert "chosen guidance scale            2.0" in said
    assert "memorised (chance: 9.9%)       10.0%" in said
    assert json.loads((tmp_path / "report.json").read_text())["seconds"] == {}


def test_another_data_set_has_no_revision_of_the_recipes(tmp_path, monkeypatch):
    kept = {}

    def keep(recipe, options):
        kept["data"] = recipe.data
        raise SystemExit

    monkeypatch.setattr(run_recipe, "check_stages", keep)
    for words, revision in (
        ([], load_recipe("flowers").data.dataset_revision),
        (["--dataset", "me/flowers"], None),
        (["--dataset", "me/flowers", "--data.dataset_revision", "v9"], "v9"),
    ):
        monkeypatch.setattr(sys, "argv", ["run_recipe.py", "--config", "flowers", *words])
        with pytest.raises(SystemExit):
            run_recipe.main()
        assert kept["data"].dataset_revision == revision
    assert kept["data"].dataset == "me/flowers"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("unet.text_encoder", "nowhere/here", "--text_encoder nowhere/here: there is no such folder here"),
        ("unet.pretrained_model_name_or_path", "./no", "--pretrained_model_name_or_path ./no: there is no such folder"),
        ("vae.vae", "nowhere/here", "--vae nowhere/here: there is no such folder here"),
        ("train_unet.mixed_precision", "fp16", "mixed_precision fp16 needs a GPU"),
        ("train_unet.report_to", "wandb", "report_to wandb needs a package that is not installed"),
        ("evaluate.clip", "efficientnet-lite0", "clip efficientnet-lite0 in section evaluate cannot be read"),
        ("evaluate.judge_network", "text", "judge_network text in section evaluate has no preprocessor_config.json"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(key, value, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, find=importlib.util.find_spec: None if name == "wandb" else find(name)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"model_type": "clip_text_model"}')
    recipe = load_recipe("demo")
    section, name = key.split(".")
    setattr(getattr(recipe, section), name, value)
    with pytest.raises(UserError) as told:
        run_recipe.check_stages(recipe, run_recipe.Options(output_dir=str(tmp_path / "out")))
    assert sentence in str(told.value)
    assert not (tmp_path / "out/vae").exists()


def test_a_mistyped_data_set_is_found_without_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/dataset").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("")
    assert check_dataset("outputs/dataset") == Path("outputs/dataset")
    assert check_dataset("owner/name") is None
    for name, sentence in (
        ("./outputs/datset", "did you mean outputs/dataset?"),
        ("outputs/dataset/deeper/x", "fix the path"),
        ("/outptus/dataset", "a Hub id is written owner/name"),
        ("a.txt", "is a file; give the folder that holds it"),
        (None, "no data set: give --dataset"),
    ):
        with pytest.raises(UserError, match="dataset") as error:
            check_dataset(name)
        assert sentence in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = f"""
import sys; sys.path.append({str(SCRIPTS)!r})
from t2i.config import DataConfig; from t2i.loading import find_dataset
try: find_dataset(DataConfig(dataset="outputs/datset"))
except Exception as error: print(error, "torch" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "did you mean outputs/dataset? Else: outputs/datset is not in the Hub's cache here" in said
    assert said.strip().endswith("False")
    find_dataset(Recipe(data=type(Recipe().data)(dataset="outputs/dataset")).data)


def test_a_checkpoint_that_the_run_went_back_to_may_be_gone(tmp_path):
    """Later checkpoints have taken its place. The training then resumes from the newest one."""
    recipe, options = load_recipe("demo"), run_recipe.Options(output_dir=str(tmp_path))
    recipe.train_unet.resume_from_checkpoint = "checkpoint-000900"
    with pytest.raises(UserError, match="has no such checkpoint"):
        run_recipe.check_stages(recipe, options)
    (tmp_path / "unet").mkdir()
    state = {"went_back": {"checkpoint": "checkpoint-000900", "steps": 2000}}
    (tmp_path / "unet" / "run.json").write_text(json.dumps(state))
    run_recipe.check_stages(recipe, options)
    recipe.train_unet.resume_from_checkpoint = "checkpoint-000800"
    with pytest.raises(UserError, match="has no such checkpoint"):
        run_recipe.check_stages(recipe, options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("distributed_type: MULTIGPU\n", "'MULTIGPU' is not a valid"),
        ("distributed_type: 'NO'\nnum_process: 2\n", "unknown keys (['num_process'])"),
    ],
)
def test_a_mistyped_yaml_of_accelerate_gets_one_sentence(text, sentence, tmp_path, command):
    (tmp_path / "launch.yaml").write_text(text)
    said = command("launch_local.py", "--config_file", "launch.yaml", "x.py", cwd=tmp_path, code=2, fork=True).stderr
    assert sentence in said
    assert "Traceback" not in said


def test_processes_of_a_launch_share_the_cores(tmp_path, monkeypatch):
    (tmp_path / "two.yaml").write_text("use_cpu: true\nnum_processes: 4\nnum_machines: 2\n")
    monkeypatch.setattr(run_recipe.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_recipe.quiet_launcher(str(tmp_path / "two.yaml"))
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_a_recipe_in_the_home_of_nobody_is_told():
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe("~nobody-of-this-name/x.yaml")


def test_processes_that_save_after_a_signal_are_not_killed_after_30_seconds(tmp_path, command):
    """torch's launcher of several processes reads this variable."""
    (tmp_path / "child.py").write_text("import os\nprint('waits', os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])\n")
    said = command("launch_local.py", "--config_file", ROOT / "accelerate_configs/cpu.yaml", "child.py", cwd=tmp_path)
    assert "waits 600" in said.stdout


def test_the_time_of_a_stage_counts_what_it_took_before_an_interruption(tmp_path):
    marker = tmp_path / "unet" / "run.json"
    work = "import pathlib, sys, time; time.sleep(0.3); path = pathlib.Path(sys.argv[1]); path.parent.mkdir(exist_ok=True); "

    def run(end):
        run_recipe.stage("train_unet", "training", [sys.executable, "-c", work + end, str(marker)], tmp_path, marker)
        return json.loads((tmp_path / "stages.json").read_text())["train_unet"]

    with pytest.raises(SystemExit):
        run("sys.exit(75)")
    whole = run("path.write_text('{}')")
    assert whole >= 0.6
    assert run("") == whole  # reused
    marker.unlink()
    marker.parent.rmdir()
    assert run("path.write_text('{}')") < whole  # a new run
