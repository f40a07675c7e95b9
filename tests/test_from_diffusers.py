"""Command lines of diffusers' own training scripts, as its README and its tests have them."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train_unet
import train_vae
from conftest import ROOT, TINY
from t2i.config import TrainConfig, TrainUnetConfig, TrainVaeConfig, UnetConfig, parse
from t2i.errors import UserError
from t2i.files import write_json
from t2i.from_diffusers import THEIR_OPTIONS
from t2i.hub import publish
from t2i.training import distributed, loop

UNET, VAE = ("data", "vae", "unet", "train_unet"), ("data", "vae", "train_vae")

README_UNET = """
  --pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4
  --dataset_name=lambdalabs/naruto-blip-captions
  --use_ema
  --resolution=512 --center_crop --random_flip
  --train_batch_size=1
  --gradient_accumulation_steps=4
  --gradient_checkpointing
  --max_train_steps=15000
  --learning_rate=1e-05
  --max_grad_norm=1
  --lr_scheduler="constant" --lr_warmup_steps=0
  --output_dir="sd-naruto-model"
"""
README_VAE = [
    """
    --pretrained_model_name_or_path stabilityai/sd-vae-ft-mse
    --dataset_name=cifar10
    --image_column=img
    --validation_image images/bird.jpg images/car.jpg images/dog.jpg images/frog.jpg
    --num_train_epochs 100
    --gradient_accumulation_steps 2
    --learning_rate 4.5e-6
    --lr_scheduler cosine
    --report_to wandb
    """,
    """
    --pretrained_model_name_or_path stabilityai/sd-vae-ft-mse
    --num_train_epochs 100
    --gradient_accumulation_steps 2
    --learning_rate 4.5e-6
    --lr_scheduler cosine
    --report_to wandb
    --mixed_precision bf16
    --train_data_dir /path/to/ImageNet/train
    --validation_image ./image.png
    --decoder_only
    """,
]
# test_text_to_image.py, class TestTextToImage: what all its cases share, then each command by the case's name
SHARED = """
    --pretrained_model_name_or_path hf-internal-testing/tiny-stable-diffusion-torch
    --dataset_name hf-internal-testing/dummy_image_text_data
    --resolution 64 --center_crop --random_flip --train_batch_size 1 --gradient_accumulation_steps 1
    --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0 --output_dir out
"""
CASES = {
    "text_to_image": "--max_train_steps 2",
    "checkpointing": "--max_train_steps 4 --checkpointing_steps=2 --seed=0",
    "checkpointing, resumed": "--max_train_steps 2 --checkpointing_steps=1 --resume_from_checkpoint=checkpoint-4 --seed=0",
    "checkpointing_use_ema": "--max_train_steps 4 --checkpointing_steps=2 --use_ema --seed=0",
    "checkpoints_total_limit": "--max_train_steps 6 --checkpointing_steps=2 --checkpoints_total_limit=2 --seed=0",
    "removes_multiple_checkpoints": "--max_train_steps 8 --checkpointing_steps=2 --resume_from_checkpoint=checkpoint-4 "
    "--checkpoints_total_limit=2 --seed=0",
}
# all options of the two scripts, with a value that they take
OPTIONS_UNET = """
    input_perturbation=0.1 pretrained_model_name_or_path=a/b revision=main variant=fp16 dataset_name=a/b
    dataset_config_name=x train_data_dir=a image_column=img caption_column=text max_train_samples=5
    validation_prompts=x output_dir=out cache_dir=c seed=3 resolution=64 center_crop random_flip train_batch_size=2
    num_train_epochs=3 max_train_steps=4 gradient_accumulation_steps=2 gradient_checkpointing learning_rate=1e-4
    scale_lr lr_scheduler=constant lr_warmup_steps=0 snr_gamma=5.0 dream_training dream_detail_preservation=1.0
    use_8bit_adam allow_tf32 use_ema offload_ema foreach_ema non_ema_revision=x dataloader_num_workers=2
    adam_beta1=0.9 adam_beta2=0.99 adam_weight_decay=0.01 adam_epsilon=1e-8 max_grad_norm=1.0 push_to_hub
    hub_token=hf_abc prediction_type=epsilon hub_model_id=a/b logging_dir=logs mixed_precision=bf16
    report_to=tensorboard local_rank=0 checkpointing_steps=5 checkpoints_total_limit=2 resume_from_checkpoint=latest
    enable_xformers_memory_efficient_attention noise_offset=0.1 validation_epochs=5 tracker_project_name=x
    image_interpolation_mode=lanczos
"""
OPTIONS_VAE = """
    pretrained_model_name_or_path=a/b model_config_name_or_path=a/b revision=main output_dir=out cache_dir=c seed=3
    resolution=64 train_batch_size=2 num_train_epochs=3 max_train_steps=4 checkpointing_steps=5
    checkpoints_total_limit=2 resume_from_checkpoint=latest gradient_accumulation_steps=2 gradient_checkpointing
    learning_rate=1e-4 disc_learning_rate=1e-4 scale_lr lr_scheduler=constant disc_lr_scheduler=constant
    lr_warmup_steps=0 lr_num_cycles=1 lr_power=1.0 use_8bit_adam use_ema dataloader_num_workers=2 adam_beta1=0.9
    adam_beta2=0.99 adam_weight_decay=0.01 adam_epsilon=1e-8 max_grad_norm=1.0 push_to_hub hub_token=hf_abc
    hub_model_id=a/b logging_dir=logs allow_tf32 report_to=wandb mixed_precision=fp16
    enable_xformers_memory_efficient_attention set_grads_to_none dataset_name=a/b dataset_config_name=x
    train_data_dir=a image_column=img max_train_samples=5 validation_image=a.png validation_steps=5
    tracker_project_name=x rec_loss=l1 kl_scale=1e-6 perceptual_scale=0.5 disc_start=5 disc_factor=1.0
    disc_scale=1.0 disc_loss=hinge decoder_only
"""


def test_the_lines_of_diffusers_readme_mean_here_what_they_mean_there(capsys):
    for words in (
        README_UNET,
        README_UNET.replace("--dataset_name=lambdalabs/naruto-blip-captions", "--train_data_dir=photos"),
    ):
        chosen = parse(UNET, "", shlex.split(words))
        train = chosen.train_unet
        assert chosen.unet.pretrained_model_name_or_path == "CompVis/stable-diffusion-v1-4"
        assert chosen.data.dataset in ("lambdalabs/naruto-blip-captions", "photos")
        assert (chosen.data.resolution, chosen.data.random_flip, train.use_ema) == (512, True, True)
        assert (train.train_batch_size, train.gradient_accumulation_steps, train.max_train_steps) == (1, 4, 15000)
        assert (train.learning_rate, train.max_grad_norm, train.lr_warmup_steps) == (1e-5, 1.0, 0)
        assert (train.lr_scheduler, train.output_dir, train.gradient_checkpointing) == (
            "constant",
            "sd-naruto-model",
            True,
        )
    assert (
        "--center_crop of diffusers' scripts is left out: images are cropped at the centre" in capsys.readouterr().err
    )
    cifar, imagenet = (parse(VAE, "", shlex.split(words)) for words in README_VAE)
    assert (cifar.vae.vae, cifar.data.dataset, cifar.data.image_column) == (
        "stabilityai/sd-vae-ft-mse",
        "cifar10",
        "img",
    )
    assert (cifar.train_vae.report_to, cifar.train_vae.vae_train_part) == ("wandb", "all")
    assert (imagenet.train_vae.mixed_precision, imagenet.train_vae.vae_train_part) == ("bf16", "decoder")
    assert imagenet.data.dataset == "/path/to/ImageNet/train"
    assert "--validation_image of diffusers' scripts is left out" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_the_commands_of_diffusers_tests_are_understood(case):
    chosen = parse(UNET, "", shlex.split(SHARED + CASES[case]))
    assert chosen.train_unet.scale_lr
    assert (chosen.train_unet.learning_rate, chosen.data.resolution, chosen.train_unet.train_batch_size) == (
        5e-4,
        64,
        1,
    )
    if "resume" in CASES[case]:
        assert chosen.train_unet.resume_from_checkpoint == "checkpoint-4"


@pytest.mark.parametrize(("sections", "options"), [(UNET, OPTIONS_UNET), (VAE, OPTIONS_VAE)], ids=["unet", "vae"])
def test_every_option_of_theirs_is_taken_or_answered(sections, options, capsys):
    page = (ROOT / "docs" / "from_diffusers.md").read_text()
    taken, notes = [], []
    for option in options.split():
        name = option.split("=")[0]
        harmless, answer = THEIR_OPTIONS.get(option.replace("=", " "), THEIR_OPTIONS.get(name, (True, "")))
        assert f"`--{name}`" in page or f"`--{option.replace('=', ' ')}`" in page, name
        if harmless:
            taken.append(f"--{option}")
            notes.append(answer)
            continue
        for typed in (f"--{option}", f"--{option.replace('_', '-')}"):
            with pytest.raises(UserError) as error:
                parse(sections, "", [typed])
            assert str(error.value) == f"--{name} of diffusers' scripts: {answer}"
            assert "hf_abc" not in str(error.value)
    parse(sections, "", taken)
    said = capsys.readouterr().err
    assert all(answer in said for answer in notes)


def test_the_page_says_what_the_scripts_say():
    page = (ROOT / "docs" / "from_diffusers.md").read_text()
    for name, (harmless, answer) in THEIR_OPTIONS.items():
        assert f"| `--{name}` | {'left out' if harmless else 'refused'} | {answer} |" in page, name


def test_options_of_their_autoencoder():
    def train(words):
        return parse(VAE, "", shlex.split(words))

    assert train("--rec_loss l1 --kl_scale 1e-3").train_vae.l1_weight == 1
    chosen = train("--rec-loss=l2 --kl_scale 1e-3 --revision main --pretrained_model_name_or_path 'my vae/x'")
    assert (chosen.train_vae.mse_weight, chosen.train_vae.l1_weight, chosen.train_vae.kl_weight) == (1, 0, 1e-3)
    assert (chosen.vae.vae, chosen.vae.vae_revision) == ("my vae/x", "main")
    with pytest.raises(UserError, match="takes l1 or l2"):
        train("--rec_loss huber")
    with pytest.raises(UserError, match="always resized by Lanczos"):
        parse(UNET, "", ["--image_interpolation_mode", "bicubic"])
    assert (
        parse(UNET, "", ["--validation_prompt", "a b", "--num_inference_steps", "10"]).train_unet.num_inference_steps
        == 10
    )


def test_lengths_and_rates_that_their_options_mean():
    class Accelerator:
        num_processes = 2
        print = staticmethod(lambda text: said.append(text))

    said = []
    config = TrainUnetConfig(
        validation_epochs=2.0, train_batch_size=4, num_train_epochs=3.0, scale_lr=True, learning_rate=1e-4
    )
    assert loop.total_steps(config, 100, 1) == 75
    assert (config.validation_steps, config.validation_epochs) == (50, None)
    for _ in range(2):  # what a resumed run reads back is not scaled again
        distributed.scale_learning_rate(config, Accelerator)
        assert config.learning_rate == pytest.approx(8e-4)
    assert said == ["--scale_lr: the peak learning rate is 0.0008, for 8 images per update"]
    names = set(loop.identity(UnetConfig(), TrainUnetConfig()))
    assert "TrainUnet.noise_offset" not in names  # a run made before this option is the same run
    assert "TrainUnet.noise_offset" in loop.identity(TrainUnetConfig(noise_offset=0.1))


@pytest.mark.parametrize(
    ("launched", "typed", "wanted", "outcome"),
    [
        (None, "", "bf16", "bf16"),  # plain python
        ("no", "", "bf16", "bf16"),  # what the launcher says where nobody asked
        ("bf16", "bf16", "bf16", "bf16"),
        ("fp16", "", None, "fp16"),
        ("fp16", "", "bf16", UserError),
        ("bf16", "bf16", "no", UserError),
        ("no", "no", "bf16", UserError),
        ("no", "no", "no", "no"),
    ],
)
def test_the_scripts_precision_acts_where_the_launch_set_none(launched, typed, wanted, outcome, monkeypatch):
    class Launcher:
        @staticmethod
        def cmdline():
            launch = ["python", "accelerate", "launch", *(["--mixed_precision", typed] if typed else [])]
            return [*launch, "scripts/train_unet.py", "--mixed_precision", str(wanted)]

    monkeypatch.setattr(sys, "argv", ["scripts/train_unet.py"])
    monkeypatch.setattr(distributed, "find_launcher", lambda: Launcher if launched else None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched or "")
    config = TrainConfig(mixed_precision=wanted)
    if outcome is UserError:
        with pytest.raises(UserError, match=f"the launch sets mixed_precision {launched}.*--mixed_precision {wanted}"):
            distributed.choose_precision(config)
    else:
        distributed.choose_precision(config)
        assert distributed.os.environ["ACCELERATE_MIXED_PRECISION"] == outcome


def test_trackers_beside_mlflow_get_the_same(monkeypatch, tmp_path):
    calls = []

    class Other:
        name = "tensorboard"

        def log(self, values, step):
            calls.append((values, step))

        def log_images(self, values, step, dataformats):
            calls.append((values["samples"].shape, step, dataformats))

        def finish(self):
            calls.append("finished")

    class Mlflow(Other):
        view = log_artifact = "there"
        log_metrics = Other.log

        def log_image(self, image, name, step):
            calls.append((name, step))

        def finish(self, status):
            calls.append(status)

    tracker = loop.BesideMlflow(Mlflow(), Other())
    tracker.log_metrics({"loss": 1.0}, 3)
    tracker.log_image(torch.zeros(4, 5, 3).numpy(), "samples", 3)
    tracker.finish("KILLED")
    row = ({"loss": 1.0}, 3)
    assert calls == [row, row, ("samples", 3), ((1, 4, 5, 3), 3, "NHWC"), "KILLED", "finished"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="run: pip install tensorboard"):
        loop.check_tracker(TrainConfig(report_to="tensorboard"))


def test_a_published_autoencoder(tmp_path, monkeypatch):
    figures = {"psnr_db": 27.3, "psnr_db_before": 20.0, "ssim": 0.9, "ssim_before": 0.5, "scaling_factor": 0.9}
    write_json(tmp_path / "run.json", {**figures, "steps": 1200, "output_vae_hash": "abc"})
    write_json(tmp_path / "vae/config.json", {"block_out_channels": [8, 8, 8]})
    pushed = {}

    def push_folder(folder, repo_id, kind, *, files, message, merge_card, **options):
        pushed.update(folder=folder, repo_id=repo_id, files=files, card=merge_card(None), again=merge_card)
        return publish.upload.Pushed("https://hub/me/vae", "1234567890", changed=True)

    monkeypatch.setattr(publish.upload, "push_folder", push_folder)
    config = TrainVaeConfig(push_to_hub=True, hub_model_id="me/vae", license="mit")
    publish.publish_vae(tmp_path, config)
    assert (pushed["folder"], pushed["repo_id"]) == (tmp_path / "vae", "me/vae")
    assert pushed["files"] == ["config.json", "diffusion_pytorch_model.safetensors", "README.md"]
    card = pushed["card"]
    for words in ("license: mit", "27.30", 'AutoencoderKL.from_pretrained("me/vae")', "4 px per latent"):
        assert words in card
    assert pushed["again"](card.replace("# Autoencoder", "# Mine")).count("# Mine") == 1
    with pytest.raises(UserError, match="--hub_model_id is missing"):
        publish.check_push(TrainVaeConfig(push_to_hub=True), None)
    assert {train_vae.publish, train_unet.publish} == {publish}


def test_a_case_of_theirs_trains_and_loads_as_theirs(workspace, tmp_path, monkeypatch, capsys):
    """test_text_to_image_checkpointing on the workspace's pipeline, with options that only change the noise."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "unet/pipeline", "base")
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = SHARED.replace("--resolution 64", "--resolution 32") + CASES["checkpointing"].replace("4", "2", 1)
    words = words.replace("hf-internal-testing/tiny-stable-diffusion-torch", "base") + " --noise_offset 0.05"
    words = words.replace("hf-internal-testing/dummy_image_text_data", str(workspace / "dataset"))
    own = "--config tiny.yaml --report_to none --input_perturbation 0.1 --validation_epochs 99 --checkpointing_steps 1"
    monkeypatch.setattr(
        sys, "argv", ["train_unet.py", *shlex.split(own + words.replace("--checkpointing_steps=2", ""))]
    )
    train_unet.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("pipeline in out/pipeline: ")
    unet = UNet2DConditionModel.from_pretrained("out", subfolder="checkpoint-000001/unet")
    pipeline = StableDiffusionPipeline.from_pretrained("out/pipeline", unet=unet)
    assert pipeline("a prompt", num_inference_steps=1).images
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume_from_checkpoint=checkpoint-1"])
    with pytest.raises(UserError, match="has finished, so it is not resumed from checkpoint-1"):
        train_unet.main()
    assert (Path("out") / "checkpoint-000001").is_dir()
