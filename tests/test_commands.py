"""The commands that users type, on models built here: training, resuming, drawing, evaluating, whole recipes, mistakes."""

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

import run_recipe
from conftest import SCRIPTS, TINY
from t2i.data import flowers
from t2i.pictures import cells
from t2i.run_lock import lock_run

# The help of launch_local.py is accelerate's own, which imports torch.
SCRIPT_NAMES = sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "launch_local.py")


def report_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_training_leaves_what_it_promises(workspace):
    vae, unet = report_of(workspace / "vae"), report_of(workspace / "unet")
    assert vae["status"] == unet["status"] == "finished"
    assert vae["psnr_db"] > vae["psnr_db_before"]
    assert json.loads((workspace / "vae/vae/config.json").read_text())["scaling_factor"] == vae["scaling_factor"]
    assert {path.name for path in (workspace / "unet").glob("checkpoint-*")} == {
        "checkpoint-000004",
        "checkpoint-000008",
    }
    rows = [json.loads(line) for line in (workspace / "unet/metrics.jsonl").read_text().splitlines()]
    bands = {key for row in rows for key in row if key.startswith("val_loss_")}
    assert len(bands) == 4
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert len(list((workspace / "unet/samples").glob("step-*.png"))) == 2
    assert yaml.safe_load((workspace / "unet/config.yaml").read_text())["unet"]["unet_channels"] == [16, 32]
    assert not [path for path in workspace.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_the_terminal_shows_only_what_the_suite_says(workspace):
    """Saving a model imports DeepSpeed, which warned of a missing GPU on standard output."""
    for name in ("vae.log", "unet.log"):
        assert not re.search(r"\bINFO\b|\[WARNING\]|real_accelerator", (workspace / name).read_text())


def test_a_finished_run_is_reused_and_another_refused(workspace, command):
    common = ("--config", "tiny.yaml", "--dataset", "dataset", "--output_dir", "vae")
    again = command("train_vae.py", *common, cwd=workspace)
    assert "reusing the finished VAE" in again.stdout
    other = command("train_vae.py", *common, "--learning_rate", "0.5", cwd=workspace, code=2)
    assert "TrainVae.learning_rate" in other.stderr
    assert "another --output_dir" in other.stderr


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(workspace, command, tmp_path):
    unet = tmp_path / "unet"
    shutil.copytree(workspace / "unet", unet)
    shutil.rmtree(unet / "checkpoint-000008")
    state = report_of(unet)
    (unet / "run.json").write_text(json.dumps(state | {"status": "running"}))
    common = ("--config", "tiny.yaml", "--dataset", "dataset", "--vae", "vae", "--output_dir", unet)
    done = command("train_unet.py", *common, cwd=workspace)  # plain python, where the first run was launched
    assert "resuming from" in done.stdout
    for part in ("unet", "unet_ema"):
        first = (workspace / "unet/checkpoint-000008" / part / "diffusion_pytorch_model.safetensors").read_bytes()
        assert (unet / "checkpoint-000008" / part / "diffusion_pytorch_model.safetensors").read_bytes() == first


def test_stock_diffusers_draws_the_same_picture(workspace, command, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    prompt = "a red flower with five petals"
    options = ("--prompt", prompt, "a blue one", "--seed", 7, "--num_inference_steps", 3, "--output_dir", tmp_path)
    command("generate_images.py", "--model", "unet", *options, "--grid", cwd=workspace)
    ours = np.asarray(Image.open(tmp_path / "0000-seed7.png")).astype(int)
    pipeline = StableDiffusionPipeline.from_pretrained(workspace / "unet/pipeline")
    stock = pipeline(prompt, generator=torch.Generator().manual_seed(7), num_inference_steps=3, guidance_scale=7.5)
    assert np.abs(ours - np.asarray(stock.images[0]).astype(int)).mean() <= 1
    text = json.loads(Image.open(tmp_path / "0000-seed7.png").text["parameters"])
    assert (text["prompt"], text["seed"], text["guidance_scale"]) == (prompt, 7, 7.5)
    assert text["unet_hash"] == report_of(workspace / "unet")["output_unet_hash"]
    assert (tmp_path / "grid.png").is_file()


def test_a_picture_does_not_depend_on_its_batch(workspace):
    from t2i.pictures import sampling

    pipeline = sampling.load_pipeline(workspace / "unet" / "checkpoint-000004")
    prompts, seeds = ["a red flower", "a white flower", "a blue flower"], [3, 4, 5]
    together = sampling.generate(pipeline, prompts, seeds, num_inference_steps=3, batch_size=3, progress=False)
    alone = sampling.generate(pipeline, prompts, seeds, num_inference_steps=3, batch_size=1, progress=False)
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 1


def test_evaluation_writes_figures_pictures_and_card(workspace, command):
    from huggingface_hub import ModelCard

    done = command(
        "evaluate_checkpoints.py", "--config", "tiny.yaml", "--model", "unet", "--dataset", "dataset", cwd=workspace
    )
    results = json.loads((workspace / "unet/evaluation/evaluation.json").read_text())
    pairs = {(cell["checkpoint"], cell["guidance_scale"]) for cell in results["cells"]}
    assert len(pairs) == 4
    for cell in results["cells"]:
        assert set(cell["prompt_following"]) == {*flowers.ATTRIBUTES, "all"}
        assert cell["judge"]["network"] == "efficientnet-lite0"
        assert (
            cell["judge"]["kernel_distance"] > 3 * cell["judge"]["standard_error"] > 0
        )  # an untrained model draws noise
        assert cell["judge"]["named"] is None
        assert (workspace / "unet/evaluation" / cell["grid"]).is_file()
    judged = results["report"]["judge"]
    assert judged["real"]["kernel_distance"] < judged["pictures"]["kernel_distance"]
    assert (
        judged["real"]["frechet_distance"] > 1
    )  # The reference holds other drawings than those that it is compared with.
    assert results["report"]["prompts"] == judged["pictures"]["pictures"] == 6
    assert "judged by efficientnet-lite0" in done.stdout
    assert "chosen: checkpoint-" in done.stdout
    card = ModelCard.load(workspace / "unet/pipeline/README.md")
    assert card.data.eval_results
    for sentences in results["verdict"]["sentences"].values():
        assert " ".join(sentences) in done.stdout
    best = results["verdict"]["best"]
    assert {key: best[key] for key in ("checkpoint", "guidance_scale")}.items() <= results["report"].items()
    assert "- **Best setting**: 4 settings were compared, on 4 pictures each. " in card.content
    read = [{name: one["wanted"] == one["read"] for name, one in reading.items()} for reading in results["readings"]]
    shares = {name: np.mean([one[name] for one in read]) for name in flowers.ATTRIBUTES}
    assert shares == {name: results["report"]["prompt_following"][name] for name in shares}
    measured = cells.read_cells(workspace / "unet")
    assert (
        len(measured) == 4 * 4 + 6
    )  # four pairs of checkpoint and scale with four pictures each, and the reported ones
    assert all(reading.keys() == set(flowers.ATTRIBUTES) and distance > 0 for reading, distance in measured.values())
    assert not (workspace / "unet/evaluation/report.html").exists()
    before = (workspace / "unet/evaluation/evaluation.json").stat().st_mtime_ns
    again = command("evaluate_checkpoints.py", "--config", "tiny.yaml", "--model", "unet", "--dataset", "dataset",
                    "--report", cwd=workspace)  # fmt: skip
    assert "reusing the finished evaluation" in again.stdout
    assert (workspace / "unet/evaluation/evaluation.json").stat().st_mtime_ns == before
    page = (workspace / "unet/evaluation/report.html").read_text()
    assert page.count("<img") == 6 + 3 * 4 + 2 * 6  # The wall, a grid for three of four prompts, and pairs.
    assert "measured on 6 pictures, of which 6 are shown" in page
    assert "Pictures nearest to training images" in page
    tracked = [path for path in workspace.rglob("report.html") if path.parent.name != "evaluation"]
    assert tracked
    with lock_run(workspace / "unet/evaluation", 0, lambda: None):  # another evaluation is at work
        options = ("--config", "tiny.yaml", "--model", "unet", "--dataset", "dataset", "--report")
        refused = command("evaluate_checkpoints.py", *options, "--eval_seed", 7, cwd=workspace, code=2)
        assert "another run is at work in unet/evaluation (process " in refused.stderr
        assert refused.stderr.strip().endswith("wait for it, stop it, or give another --model")
        command("evaluate_checkpoints.py", *options, cwd=workspace)  # it reuses the finished one
    assert (workspace / "unet/evaluation/evaluation.json").stat().st_mtime_ns == before
    shutil.rmtree(workspace / "unet/cells")  # as clean_caches.py does
    again = command("evaluate_checkpoints.py", "--model", "unet", "--redraw", cwd=workspace)
    assert "drawing 6 of 6 reported pictures" in again.stdout
    assert (workspace / "unet/evaluation/evaluation.json").stat().st_mtime_ns == before
    command("evaluate_checkpoints.py", "--config", "tiny.yaml", "--model", "unet", "--dataset", "dataset", "--report",
            cwd=workspace)  # fmt: skip
    assert (workspace / "unet/evaluation/report.html").read_text().count("<img") == 6 + 2 * 6


def test_labels_of_photos_are_read_by_a_probe(workspace, command, tmp_path):
    shutil.copytree(workspace / "unet", tmp_path / "unet", ignore=shutil.ignore_patterns("evaluation", "cells"))
    drawings = flowers.draw_many(5, 0, 600, 32, False, workers=1)
    colors = [(one["petal_color"], image) for one, image, _ in drawings if one["petal_color"] in ("white", "burgundy")]
    for number, (color, image) in enumerate(colors):
        folder = tmp_path / "photos" / ("test" if number % 4 == 0 else "train") / color
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    options = ("--config", workspace / "tiny.yaml", "--model", tmp_path / "unet", "--dataset", tmp_path / "photos")
    done = command("evaluate_checkpoints.py", *options, "--checkpoints", "checkpoint-000004", cwd=tmp_path)
    report = json.loads((tmp_path / "unet/evaluation/evaluation.json").read_text())["report"]
    assert report["probe_accuracy"]["label"] == report["judge"]["real"]["named"] > 0.8
    assert report["prompt_following"]["label"] == report["judge"]["pictures"]["named"]
    assert 0 <= report["judge"]["reconstructions"]["named"] <= 1
    assert not (tmp_path / "unet/evaluation/classifier").exists()
    assert "(on unseen real images: " in done.stdout
    found = json.loads((tmp_path / "unet/evaluation/evaluation.json").read_text())
    assert {reading["label"]["wanted"] for reading in found["readings"]} <= {"white", "burgundy"}
    assert "pictures show the label that their prompt names" in found["verdict"]["sentences"]["right"][0]


def test_evaluation_by_a_preset_and_the_card_draw_alike(workspace, command, tmp_path):
    shutil.copytree(workspace / "unet", tmp_path / "unet", ignore=shutil.ignore_patterns("evaluation", "cells"))
    options = ("--config", workspace / "tiny.yaml", "--model", tmp_path / "unet", "--dataset", workspace / "dataset",
               "--preset", "draft", "--checkpoints", "checkpoint-000004", "--classifier_steps", 0,
               "--judge_network", "None", "--report", "--guidance_rescale", 0.7)  # fmt: skip
    command("evaluate_checkpoints.py", *options, cwd=tmp_path)
    found = json.loads((tmp_path / "unet/evaluation/evaluation.json").read_text())
    assert found["report"]["judge"] is None
    assert (tmp_path / "unet/evaluation/report.html").stat().st_size > 10_000
    for part in ("report", "sweep"):
        assert (found[part]["scheduler"], found[part]["num_inference_steps"]) == ("UniPCMultistepScheduler", 3)
        assert (found[part]["guidance_end"], found[part]["guidance_rescale"]) == (0.3, 0.7)
    card = (tmp_path / "unet/pipeline/README.md").read_text()
    assert "- **Scheduler**: UniPCMultistep, 3 steps, the first 1 of them guided" in card
    assert "from diffusers import UniPCMultistepScheduler, StableDiffusionPipeline" in card
    assert "pipeline.scheduler = UniPCMultistepScheduler.from_config" in card
    said = f"guidance_scale={found['report']['guidance_scale']:g},  # the evaluation drew with generate_images.py --guidance_end 0.3"
    assert f"{said}\n    guidance_rescale=0.7,\n    height=" in card
    evaluated = cells.evaluated_grid(tmp_path / "unet")
    assert evaluated.cell.guidance_rescale == 0.7
    assert all(one.made for one in cells.plan(tmp_path / "unet", "checkpoint-000004", evaluated.cell, evaluated.axes))
    assert "UniPCMultistep (inference)" in card


def test_a_whole_recipe_and_its_second_run(workspace, command, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ("--config", "tiny.yaml", "--output_dir", "out", "--dataset", workspace / "dataset")
    first = command("run_recipe.py", *options, cwd=tmp_path)
    report = json.loads((tmp_path / "out/report.json").read_text())
    for heads in ("probe_accuracy", "prompt_following"):
        assert {"petal_color", "background", "center_color", "petal_count"} <= set(report[heads])
        assert all(0 <= share <= 1 for share in report[heads].values())
    assert {"train_vae", "train_unet", "evaluate"} == set(report["seconds"])
    assert report["vae"]["psnr_db"] > 0
    assert report["peak_rss_bytes"] > 1e8
    assert (tmp_path / report["pipeline"] / "model_index.json").is_file()
    assert "streamlit run dashboard" in first.stdout
    told = Path("/proc/cpuinfo")  # of Linux alone
    flags = set(told.read_text().split()) if told.is_file() else set()
    half = "bf16" if flags & {"avx512_bf16", "amx_bf16"} else "no"  # of the processor that this test runs on
    assert json.loads((tmp_path / "out/unet/run.json").read_text())["precision"] == half

    def fork(words):
        """A stage of the second run: the command behind the launcher, whose words ran in the first."""
        script = next(at for at, word in enumerate(words) if Path(word).name in SCRIPT_NAMES)
        precision = {"ACCELERATE_MIXED_PRECISION": "bf16"} if "bf16" in words[:script] else {}
        done = command(Path(words[script]).name, *words[script + 1 :], cwd=tmp_path, env=precision)
        print(done.stdout)
        return SimpleNamespace(wait=lambda: done.returncode)

    monkeypatch.chdir(tmp_path)
    for name, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}.items():  # run_recipe.py sets what is not set
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run_recipe, "subprocess", SimpleNamespace(Popen=fork))
    monkeypatch.setattr(sys, "argv", ["run_recipe.py", *map(str, options)])
    run_recipe.main()
    assert capsys.readouterr().out.count("reusing the finished") == 3
    assert json.loads((tmp_path / "out/report.json").read_text()) == report


@pytest.mark.parametrize("script", SCRIPT_NAMES)
def test_help_imports_no_torch(script, command, tmp_path):
    spy = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    spy += "finally: print('torch' in sys.modules or 'diffusers' in sys.modules)"
    (tmp_path / "spy.py").write_text(spy)
    done = command(
        tmp_path / "spy.py", SCRIPTS / script, cwd=tmp_path, env={"PYTHONPATH": str(SCRIPTS), "COLUMNS": "400"}
    )
    assert done.stdout.strip().endswith("False")
    without = ("run_sagemaker_job.py", "run_hf_job.py")
    assert "default:" in done.stdout or script in without  # they have no options
    lines = [line.strip("│ ") for line in done.stdout.splitlines()]
    empty = ("(default:", "(required", "(optional")
    bare = [above for above, line in pairwise(lines) if above.startswith("-") and line.startswith(empty)]
    assert not bare, f"these options have no help: {bare}"


MISTAKES = [
    ("make_flowers.py", ["--output_dir", "s3://bucket/x"], "output_dir = 's3://bucket/x'"),
    ("train_unet.py", ["--dataset", "dataset"], "no VAE: give --vae"),
    ("train_unet.py", [], "no data set: give --dataset"),
    ("train_unet.py", ["--dataset", "nowhere/at/all"], "nowhere/at/all"),
    ("train_unet.py", ["--config", "bad.yaml"], "did you mean 'learning_rate'?"),
    ("train_unet.py", ["--learnin_rate", "1"], "--learning_rate"),
    ("train_unet.py", ["--dataset", "dataset", "--rescale_betas_zero_snr"], "set prediction_type: v_prediction"),
    ("train_vae.py", ["--dataset", "dataset", "--crop_size", "7"], "crop_size 7"),
    ("train_vae.py", ["--max_grad_norm", "0"], "max_grad_norm"),
    ("generate_images.py", ["--model", "unet"], "no prompt"),
    ("generate_images.py", ["--model", "dataset", "--prompt", "x"], "neither a run folder"),
    ("generate_images.py", ["--model", "unet", "--prompt", "x", "--scheduler", "os"], "unknown scheduler"),
    ("evaluate_checkpoints.py", ["--model", "unet", "--checkpoints", "checkpoint-9"], "checkpoint-000004"),
    ("make_flowers.py", ["--output_dir", "vae"], "holds other files"),
    (
        "run_recipe.py",
        ["--config", "late.yaml", "--dataset", "dataset", "--output_dir", "late"],
        "resolution 30 gives latents",
    ),
    (
        "run_recipe.py",
        ["--config", "tiny.yaml", "--accelerate_config", "none.yaml"],
        "--accelerate_config none.yaml cannot be read",
    ),
    (
        "train_unet.py",
        [
            "--config",
            "tiny.yaml",
            "--dataset",
            "dataset",
            "--vae",
            "vae",
            "--output_dir",
            "unet",
            "--max_train_steps",
            "4",
        ],
        "raise max_train_steps or num_train_epochs, and change nothing else",
    ),
    ("make_flowers.py", ["--output_dir", "tiny.yaml/below"], "a file stands where a folder is needed"),
    (
        "run_recipe.py",
        ["--config", "elsewhere.yaml", "--dataset", "dataset", "--output_dir", "late"],
        "clip nowhere/at-all in section evaluate cannot be read",
    ),
    (
        "make_flowers.py",
        ["--output_dir", "dataset", "--count", "9"],
        "delete dataset and .dataset",
    ),
    ("publish_model.py", ["--model", "unet"], "--hub_model_id is missing"),
    ("publish_model.py", ["--model", "vae", "--hub_model_id", "me/vae"], "holds no pipeline"),
]


def test_a_wrong_tracking_address_is_refused_before_the_data_set_is_read(workspace, command):
    (workspace / "empty").mkdir(exist_ok=True)
    arguments = ("--dataset", "empty", "--vae", "vae", "--output_dir", "untracked")
    done = command("train_unet.py", *arguments, cwd=workspace, code=2, env={"MLFLOW_TRACKING_URI": "localhost:5000"})
    assert "give http://localhost:5000" in done.stderr


@pytest.mark.parametrize(("script", "arguments", "sentence"), MISTAKES)
def test_mistakes_get_one_sentence(script, arguments, sentence, workspace, command):
    (workspace / "bad.yaml").write_text("train_unet: {learnin_rate: 1}\n")
    (workspace / "elsewhere.yaml").write_text(TINY + "  clip: nowhere/at-all\n")
    (workspace / "late.yaml").write_text(TINY.replace("resolution: 32", "resolution: 30"))
    done = command(script, *arguments, cwd=workspace, code=2)
    assert sentence in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_two_processes_of_torchrun_train_the_same_samples_as_one(workspace, command):
    common = ("--config", "tiny.yaml", "--dataset", "dataset", "--vae", "vae", "--report_to", "none", "--max_train_steps", 3,
              "--checkpointing_steps", 3, "--logging_steps", 1)  # fmt: skip
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611")
    env = {"ACCELERATE_USE_CPU": "true"}
    command(
        "train_unet.py",
        *common,
        "--train_batch_size",
        2,
        "--output_dir",
        "two",
        cwd=workspace,
        launcher=torchrun,
        env=env,
    )
    command("train_unet.py", *common, "--train_batch_size", 4, "--output_dir", "one", cwd=workspace, env=env)
    norms = [
        [
            json.loads(line)["grad_norm"]
            for line in (workspace / name / "metrics.jsonl").read_text().splitlines()
            if "grad_norm" in line
        ]
        for name in ("one", "two")
    ]
    assert report_of(workspace / "two")["processes"] == 2
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-3)  # gradients are averaged over the same samples
