"""The model card: every row of the reference card, valid front matter, no invention, no leak."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from t2i.config import Recipe, to_dict
from t2i.errors import UserError
from t2i.files import write_json
from t2i.hub import model_card

REFERENCE_ROWS = [
    *("Architecture", "Text Encoder", "VAE", "Noise Scheduler", "Image Resolution", "Latent Space"),
    *("Dataset", "Captions", "Training Platform", "Distribution", "Precision", "Optimizer", "Gradient Clipping"),
    *("CFG Training", "Scheduler", "CFG Scale", "Inference time"),
]
REFERENCE_TEXTS = [
    *("## Model Details", "## Training", "## Inference", "## Evaluation", "## Limitations", "## Intended Use"),
    *("## Ethical Considerations", "| Train diffuser loss |", "| Val diffuser loss |", "Experiment tracking:"),
    *("- Domain-specific:", "- Low resolution:", "- Limited dataset:", "- Demonstration of", "- Educational reference"),
    *("- Not intended for production use", "- Dataset:", "- Harmful or biased content:"),
]
SHARES = {"petal_color": 0.984, "center_color": 0.9, "background": 0.99, "petal_count": 0.53, "all": 0.44}
MEMORISATION = {
    "share_closer": 0.012,
    "copies": 0.012,
    "median_ratio": 1.013,
    "probability_closer": 0.5,
    "near_copies": 0.0,
}
JUDGED = {
    "kernel_distance": 31.2,
    "standard_error": 0.8,
    "named": None,
    "frechet_distance": 120.4,
    "precision": 0.61,
    "recall": 0.302,
    "copies": 0.004,
}
EVALUATION = {
    "report": {
        "guidance_scale": 3.0,
        "checkpoint": "checkpoint-000750",
        "prompt_following": SHARES,
        "prompt_following_held_out": {**SHARES, "petal_color": 0.961},
        "probe_accuracy": {"petal_color": 0.9987},
        "memorisation": MEMORISATION,
        "diversity": {"ratio": 0.95},
        "judge": {"network": "efficientnet-lite0", "kernel_distance": 31.2, "pictures": JUDGED, "real": JUDGED},
        "clip_score": None,
        "prompts": 256,
        "unseen_images": 100,
        "num_inference_steps": 20,
        "seconds_per_picture_cpu": 0.81,
        "seconds_per_picture_gpu": None,
    },
    "cells": [
        {
            "checkpoint": "checkpoint-000750",
            "guidance_scale": 3.0,
            "val_loss": 0.2114,
            "grid": "grid.png",
            "judge": None,
        }
        | {"prompt_following": SHARES, "memorisation": MEMORISATION}
    ],
}
HOSTILE = (
    "flowers | `x` <script>alert(1)</script>\n---\nlicense: mit\n# title [a](javascript:b) $x$ hf_abcdefghijklmnopqrst"
)


def make_run(folder: Path, recipe: Recipe | None = None, **results) -> Path:
    """A finished run folder of train_unet.py without weights."""
    recipe = recipe or Recipe()
    recipe.data.dataset = recipe.data.dataset or "outputs/demo/dataset"
    recipe.data.resolution = 64
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(recipe)), encoding="utf-8")
    known = {"status": "finished", "seconds": {"cache": 30.0, "train": 600.0}, "train_loss": 0.2031, "val_loss": 0.2114}
    known |= {"val_loss_0_250": 0.4, "steps": 1000, "train_images": 2400, "processes": 2, "precision": "bf16"}
    known |= {"machine": "2 CPU cores (AMD EPYC)", "distribution": "MULTI_CPU", "peak_rss_bytes": 1_500_000_000}
    known |= {"tracking": "https://mlflow.example/#/experiments/1/runs/2", "quarantined": 3}
    write_json(folder / "run.json", known | results)
    provenance = {"dataset": Path(recipe.data.dataset).name, "dataset_hash": "122d9d32bee31e14", "vae_hash": "aa"}
    write_json(folder / "provenance.json", provenance)
    parts = {
        "unet/config.json": {"block_out_channels": [48, 96, 144], "layers_per_block": 1, "sample_size": 16},
        "vae/config.json": {"block_out_channels": [32, 64, 64], "latent_channels": 4, "scaling_factor": 0.9},
        "text_encoder/config.json": {"hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 32},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    }
    for name, config in parts.items():
        write_json(folder / "pipeline" / name, config)
    return folder


def row(text: str, label: str) -> str:
    """The value of a row, whether of a table or of the list under Inference."""
    found = re.findall(rf"^(?:\| (?:\*\*)?{re.escape(label)}(?:\*\*)? \| (.*) \||- \*\*{label}\*\*: (.*))$", text, re.M)
    assert found, f"no row {label}"
    return found[0][0] or found[0][1]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("evaluation", [EVALUATION, None])
def test_every_row_of_the_reference_card_is_there(tmp_path: Path, evaluation: dict | None) -> None:
    text = model_card.write_model_card(make_run(tmp_path / "run"), evaluation)
    assert (tmp_path / "run" / "pipeline" / "README.md").read_text(encoding="utf-8") == text
    assert all(row(text, label) for label in REFERENCE_ROWS)
    assert [part for part in REFERENCE_TEXTS if part not in text] == []
    assert "{{" not in text
    assert "{%" not in text


def test_the_card_names_muon_and_the_network_of_an_alignment(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train_unet"] |= {"optimizer": "muon", "alignment_weight": 0.5}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = model_card.write_model_card(run, EVALUATION)
    assert row(text, "Optimizer").startswith("Muon for matrices, AdamW for other weights, learning rate")
    assert row(text, "Alignment") == "with efficientnet-lite2, weight 0.5"


def test_the_card_says_which_prompts_and_weights_were_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = model_card.write_model_card(run, EVALUATION)
    assert "Both were chosen on other prompts." in text
    assert "this folder holds the raw ones" not in text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train_unet"] |= {"save_raw_weights": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = model_card.write_model_card(run, EVALUATION | {"prompts": ["a", "b"], "sweep": {"prompts": ["b"]}})
    assert "Both were chosen on other pictures, which share 1 of 2 different prompts." in text
    assert "The evaluation draws with the averaged weights, and this folder holds the raw ones." in text


def test_rows_are_filled_from_the_run(tmp_path: Path) -> None:
    text = model_card.write_model_card(make_run(tmp_path / "run"), EVALUATION)
    assert "channels 48/96/144" in row(text, "Architecture")
    assert row(text, "Image Resolution") == "64 × 64 px"
    assert row(text, "Latent Space") == "16 × 16 × 4"
    assert row(text, "Dataset") == "dataset"
    assert row(text, "Images") == "2,400 in the training split"
    assert row(text, "Unreadable images left out") == "3"
    assert row(text, "Training Platform") == "2 CPU cores (AMD EPYC)"
    assert row(text, "Distribution") == "data parallel, 2 CPU processes"
    assert row(text, "Precision") == "BF16 mixed precision"
    assert row(text, "Length") == "1,000 weight updates of 32 samples, 13.3 epochs"
    assert "cosine schedule with 500 updates" in row(text, "Optimizer")
    assert row(text, "Train diffuser loss") == "0.2031"
    assert row(text, "Val diffuser loss") == "0.2114"
    assert row(text, "Scheduler") == "DDIM, 20 steps"
    assert row(text, "Inference time") == "0.81 s per picture on CPU, not measured on GPU"
    assert row(text, "CLIP score") == "not measured"
    assert row(text, "CFG Scale") == "3 (chosen by the evaluation)"
    assert "| petal color | 98.4% (96–99%) | 96.1% | 99.9% |" in text
    assert "| checkpoint-000750 | 3.00 | 0.2114 | 85.1% | 1.2% | not measured |" in text
    assert "By chance, about 2.0% of the pictures lie closer than 99% of the unseen images do. A larger" in text
    assert "[MLflow](https://mlflow.example/#/experiments/1/runs/2)" in text
    assert "The weights in this folder come from the end of training." in text
    assert "guidance_scale=3,\n    height=64," in text


def test_an_extended_run_names_its_total_and_the_lengths_before(tmp_path: Path) -> None:
    extensions = [{"from_steps": 200, "to_steps": 600, "lr_on_extend": "constant"},
                  {"from_steps": 600, "to_steps": 1000, "lr_on_extend": HOSTILE}, {"from_steps": 1000}, 7]  # fmt: skip
    text = model_card.write_model_card(make_run(tmp_path / "run", extensions=extensions), None)
    length = row(text, "Length")
    assert length.startswith(
        "1,000 weight updates of 32 samples, 13.3 epochs, extended from 200 (learning rate: constant) and 600 (learning rate: "
    )
    assert "<script>" not in length
    assert "1,000 (" not in length  # the extension that has not ended yet


def test_what_is_unknown_reads_not_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", val_loss=float("nan"))
    result = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {"status": "running", "val_loss": result["val_loss"]})
    (run / "provenance.json").unlink()
    (run / "pipeline" / "vae" / "config.json").unlink()
    text = model_card.write_model_card(run, None)
    for label in (
        "Latent Space",
        "Training Platform",
        "Distribution",
        "Precision",
        "Images",
        "Length",
        "Training time",
    ):
        assert row(text, label) == "not measured", label
    for label in ("Train diffuser loss", "Val diffuser loss", "CLIP score", "VAE reconstruction of validation images"):
        assert row(text, label) == "not measured", label
    assert "Training has not finished" in text
    assert "Experiment tracking: none" in text
    assert "model-index" not in text


def test_front_matter_is_valid_and_model_index_round_trips(tmp_path: Path) -> None:
    recipe = Recipe()
    recipe.data.dataset = "nelorth/oxford-flowers"
    text = model_card.write_model_card(make_run(tmp_path / "oxford", recipe), EVALUATION)
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-image", "unknown")
    assert {"text-to-image", "diffusers", "stable-diffusion"} <= set(data.tags)
    assert data.datasets == ["nelorth/oxford-flowers"]
    again = ModelCardData(**data.to_dict())
    assert again.model_name == "oxford"
    assert again.eval_results == data.eval_results
    values = {result.metric_name: result.metric_value for result in again.eval_results}
    assert values["Prompt following: petal color"] == 0.984
    assert values["Validation diffuser loss"] == 0.2114
    assert values["kernel distance"] == 31.2
    assert "clip score" not in values


@pytest.mark.parametrize("decoder", [{}, {"decoder_psnr_db": 31.2}])
def test_the_card_of_a_student_names_its_loss_and_its_decoder(tmp_path: Path, decoder: dict) -> None:
    run = make_run(tmp_path / "run", student={"num_inference_steps": 2}, **decoder)
    of_vae = {"psnr_db": 28.125, "ssim": 0.91, "scaling_factor": 0.9, "from": None}
    write_json(run / "provenance.json", {"dataset": "dataset", "teacher_hash": "bb", "vae_run": of_vae})
    text = model_card.write_model_card(run, EVALUATION)
    assert row(text, "Val distillation loss") == "0.2114"
    assert "| Checkpoint | CFG Scale | Val distillation loss |" in text
    assert "diffuser loss" not in text
    assert "Validation distillation loss" in {result.metric_name for result in ModelCard(text).data.eval_results}
    assert ("VAE reconstruction" in text) == ("and the reconstruction were measured" in text) == (not decoder)
    assert ("31.2 dB PSNR to its pictures" in row(text, "Decoder")) == bool(decoder)


def test_the_share_of_combined_attributes_is_called_so_and_a_label_is_told_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = model_card.write_model_card(run, EVALUATION)
    assert "| combined attributes | 44.0% (38–50%) | 44.0% | not measured |" in text
    names = [result.metric_name for result in ModelCard(text).data.eval_results]
    assert "Prompt following: combined attributes" in names
    report = EVALUATION["report"] | {"prompt_following": {"label": 0.6, "all": 0.6}}
    text = model_card.write_model_card(run, EVALUATION | {"report": report})
    assert row(text, "Prompt following, label") == "60.0% (54–66%)"
    assert text.count("| label | 60.0% (54–66%) |") == 1
    assert "combined attributes" not in text
    names = [result.metric_name for result in ModelCard(text).data.eval_results]
    assert [name for name in names if name.startswith("Prompt")] == ["Prompt following: label"]


def test_the_differences_from_the_reference_are_named(tmp_path: Path) -> None:
    recipe = Recipe()
    recipe.data.dataset = "nelorth/oxford-flowers"
    recipe.unet.text_encoder = "openai/clip-vit-large-patch14"
    text = model_card.write_model_card(make_run(tmp_path / "run", recipe), None)
    differences = text.partition("## Differences")[2]
    assert "WarmupLR" in differences
    for label in ("Image Resolution", "Precision", "Distribution", "VAE"):
        assert f"| {label} |" in differences, label
    for label in ("Text Encoder", "Dataset", "Gradient Clipping", "CFG Training", "Latent Space", "CFG Scale"):
        assert f"| {label} |" not in differences, label


def test_a_vae_of_ours_is_described_by_its_own_run(tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.yaml").write_text("vae:\n  vae: stabilityai/sd-vae-ft-mse\n")
    write_json(vae / "run.json", {"output_vae_hash": "aa", "psnr_db": 28.125, "ssim": 0.91, "scaling_factor": 0.9})
    recipe = Recipe()
    recipe.vae.vae = str(vae)
    text = model_card.write_model_card(make_run(tmp_path / "run", recipe), None)
    assert row(text, "VAE") == "`stabilityai/sd-vae-ft-mse`, fine-tuned"
    assert row(text, "VAE reconstruction of validation images") == "28.12 dB PSNR, 0.910 SSIM"
    write_json(vae / "run.json", {"output_vae_hash": "another", "psnr_db": 30.0})  # trained anew since
    text = model_card.write_model_card(tmp_path / "run", None)
    assert row(text, "VAE reconstruction of validation images") == "not measured"


def test_hostile_names_neither_break_nor_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sesame-opens-42")
    recipe = Recipe()
    recipe.data.dataset = f"/home/someone/{HOSTILE} sesame-opens-42"
    recipe.data.caption_column = [HOSTILE]
    recipe.vae.vae = "/home/someone/" + HOSTILE.replace("/", "")
    recipe.train_unet.run_name = HOSTILE
    recipe.train_unet.validation_prompts = ['a "red"\n```\n<script> flower']
    evaluation = {"report": {**EVALUATION["report"], "prompt_following": {HOSTILE: 0.5}}, "cells": []}
    run = make_run(tmp_path / "run", recipe, machine=HOSTILE, tracking="sqlite:////home/someone/a|b.db")
    write_json(run / "provenance.json", {"dataset": HOSTILE + " sesame-opens-42", "code": "x|y"})
    text = model_card.write_model_card(run, evaluation)
    card = ModelCard(text)
    assert card.data.license == "unknown"
    assert card.data.eval_results[0].dataset_name.startswith("flowers | `x` <script>")
    body = card.text
    assert "<script>" not in body.replace("``` <script> flower", "")  # literal within the code block
    assert not re.search(r"(?<!\\)\]\(javascript", body)
    assert [line for line in body.splitlines() if line.startswith(("---", "# title", "license"))] == []
    assert body.count("\n```") == 2
    for leak in ("hf_abcdefghijklmnopqrst", "sesame-opens-42", "/home/someone"):
        assert leak not in text
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("| **")]
    assert set(columns) == {3}


@pytest.mark.parametrize(
    ("view", "shown"),
    [
        ("mlflow ui --backend-store-uri sqlite:////home/someone/mlflow.db", "local MLflow database mlflow.db"),
        ("https://me:pass@dagshub.com/me/x.mlflow/#/experiments/3", "https://[redacted]@dagshub"),
        (
            "SageMaker Studio, or: aws sagemaker create-presigned-mlflow-app-url --arn "
            "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-app/app-ABC --region eu-west-1",
            "SageMaker's managed MLflow",
        ),
        ("https://a.example/x) <b>", r"https\://a.example/x) &lt;b&gt;"),
    ],
)
def test_tracking_shows_no_folder_and_no_password(tmp_path: Path, view: str, shown: str) -> None:
    text = model_card.write_model_card(make_run(tmp_path / "run", tracking=view), None)
    line = next(line for line in text.splitlines() if line.startswith("Experiment tracking:"))
    assert shown.replace("\\", "") in line.replace("\\", "")
    for private in ("pass@", "/home/someone", "123456789012"):
        assert private not in text


def test_a_run_without_its_files_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json is missing"):
        model_card.write_model_card(run, None)


def test_no_heavy_import() -> None:
    code = "import sys, t2i.hub.model_card, huggingface_hub.repocard; print([m for m in ('torch', 'mlflow') if m in sys.modules])"
    scripts = Path(model_card.__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=scripts, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
