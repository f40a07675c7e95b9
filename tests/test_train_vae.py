"""Terms of the autoencoder's training: each improves what it is for, and a training with all of them resumes bit for bit."""

import itertools
import json
import os
import shutil
import socket
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import make_flowers
import train_vae
from conftest import TINY
from t2i import models
from t2i.config import TrainVaeConfig, parse
from t2i.data.caches import to_pixels
from t2i.data.preparing import load_splits
from t2i.errors import UserError
from t2i.evaluation.networks import load_efficientnet_lite
from t2i.training import autoencoder_losses as losses
from t2i.training import discriminator, perceptual

WEIGHTS = "diffusion_pytorch_model.safetensors"
ALL_TERMS = (
    "--perceptual_weight",
    0.1,
    "--adversarial_weight",
    0.5,
    "--equivariance_share",
    0.5,
    "--adversarial_start",
    2,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Sums in another order differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def narrow(monkeypatch):
    """A discriminator of few channels, which saves seconds."""
    monkeypatch.setattr(discriminator, "WIDTH", 16)


def main_of(script, folder, *arguments):
    """Run a script's main in this process, in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 40 drawn flowers and the tiny recipe."""
    folder = tmp_path_factory.mktemp("vaes")
    (folder / "tiny.yaml").write_text(TINY)
    main_of(make_flowers, folder, "--output_dir", "dataset", "--count", 40, "--validation_count", 12, "--test_count", 4,
            "--size", 32, "--workers", 1)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def train(folder):
    """Return a function that trains an autoencoder and returns the run's folder."""
    numbers = itertools.count()

    def run(*arguments, output=None):
        output = output or folder / f"vae-{next(numbers)}"
        main_of(train_vae, folder, "--config", "tiny.yaml", "--dataset", "dataset", "--report_to", "none", "--output_dir", output,
                "--validation_steps", 1000, *arguments)  # fmt: skip
        return output

    return run


@pytest.fixture(scope="module")
def pixels(folder):
    """Validation images that no training sees, [12, 3, 32, 32]."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = parse(("data",), "", ["--config", "tiny.yaml", "--dataset", "dataset"]).data
        return to_pixels(load_splits(config, say=lambda text: None).validation.pixels[:])


@pytest.fixture(scope="module")
def pretrained(train):
    return train(
        "--max_train_steps", 120, "--learning_rate", 1e-2, "--train_batch_size", 8, "--checkpointing_steps", 1000
    )


@pytest.fixture(scope="module")
def tune(train, pretrained):
    """Return a function that fine-tunes the pretrained autoencoder with options, and returns the new one."""

    def run(*options, vae=pretrained):
        run = train("--vae", vae, "--max_train_steps", 24, "--crop_size", 16, "--learning_rate", 2e-3, "--lr_warmup_steps", 4,
                    "--ema_decay", 0.9, "--train_batch_size", 8, "--checkpointing_steps", 1000, *options)  # fmt: skip
        return models.load_vae(str(run))

    return run


@pytest.fixture(scope="module")
def plain(tune):
    """The pretrained autoencoder after the same updates without any further term."""
    return tune()


@torch.no_grad()
def reconstruct(vae, pixels, transform=lambda images: images):
    return vae.decode(transform(vae.encode(pixels).latent_dist.mean)).sample


# --- Each term improves what it is for -------------------------------------------------------------------------------


def test_the_perceptual_term_brings_features_nearer(tune, plain, pixels):
    features = perceptual.PerceptualNetwork("efficientnet-lite2")

    def distance(vae):
        return float(losses.perceptual_distance(features, reconstruct(vae, pixels), pixels))

    assert distance(tune("--perceptual_weight", 1.0)) < 0.95 * distance(plain)


def test_the_equivariance_penalty_lets_latents_be_turned_and_shrunk(tune, plain, pixels):
    def error(vae):
        total = 0.0
        for turns, scale in ((1, 0.5), (2, 0.25), (3, 0.75)):
            transform = partial(losses.turn_and_shrink, turns=turns, scale=scale)
            total += float(F.mse_loss(reconstruct(vae, pixels, transform), transform(pixels)))
        return total

    assert error(tune("--equivariance_share", 1.0)) < 0.9 * error(plain)


def test_a_larger_weight_of_kl_brings_latents_nearer_to_the_normal_distribution(tune, plain, pixels):
    def divergence(vae):
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        return float(losses.kl_divergence(posterior.mean, posterior.logvar)) / pixels.numel()

    assert divergence(tune("--kl_weight", 0.1)) < 0.97 * divergence(plain)


def fine_detail(images):
    """Return the energy of what a blur removes."""
    return float((images - F.avg_pool2d(images, 3, 1, 1)).square().mean())


def test_the_discriminator_brings_fine_detail_back(tune, pixels, narrow):
    """Squared error smooths what it is unsure of. The drawings are few, so the discriminator is narrow and learns slowly."""
    options = ("--vae_train_part", "decoder", "--max_train_steps", 60)
    against = ("--adversarial_weight", 1.0, "--discriminator_learning_rate", 2e-5)
    missing, still_missing = (
        1 - fine_detail(reconstruct(vae, pixels)) / fine_detail(pixels)
        for vae in (tune(*options), tune(*options, *against))
    )
    assert 0 < still_missing < 0.95 * missing


# --- Phases ----------------------------------------------------------------------------------------------------------


def test_the_last_updates_move_the_decoder_alone(train, pretrained):
    """The encoder keeps the average that it had when they began, and latents stay what they were."""
    run = train("--vae", pretrained, "--max_train_steps", 6, "--decoder_only_steps", 3, "--checkpointing_steps", 3,
                "--equivariance_share", 1.0, "--checkpoints_total_limit", 2)  # fmt: skip
    began, ended = load_file(run / "checkpoint-000003/vae_ema" / WEIGHTS), load_file(run / "vae" / WEIGHTS)
    raw = load_file(run / "checkpoint-000006/vae" / WEIGHTS)
    start = load_file(pretrained / "vae" / WEIGHTS)
    held = [name for name in ended if name.startswith(("encoder.", "quant_conv."))]
    assert len(held) > 10
    for name in held:
        assert torch.equal(began[name], ended[name]), name
        assert torch.equal(began[name], raw[name]), name
    assert any(not torch.equal(start[name], began[name]) for name in held)
    for name in ("decoder.conv_out.weight", "post_quant_conv.weight"):
        assert not torch.equal(began[name], ended[name])


def test_fine_tuning_names_the_scaling_factor_before_if_it_changes(train, pretrained, capsys):
    before = models.load_vae(str(pretrained)).config.scaling_factor
    options = ("--vae", pretrained, "--max_train_steps", 1, "--learning_rate", 1e-2, "--lr_warmup_steps", 0)
    after = models.load_vae(str(train(*options))).config.scaling_factor
    assert f"; scaling_factor {after:.4f} ({before:.4f} before)\n" in capsys.readouterr().out
    train(*options, "--vae_train_part", "decoder")
    assert capsys.readouterr().out.endswith(f"; scaling_factor {before:.4f}\n")


def test_whole_images_follow_crops():
    config = TrainVaeConfig(crop_size=16, crop_steps=3, gradient_accumulation_steps=2)
    assert [train_vae.image_side(config, 32, number) for number in range(8)] == [16] * 6 + [32] * 2
    assert train_vae.image_side(TrainVaeConfig(crop_size=16), 32, 10**6) == 16
    assert train_vae.image_side(TrainVaeConfig(), 32, 0) == 32


def test_each_phase_has_its_options():
    vae = models.build_vae(parse(("vae",), "", ["--vae_channels", "8", "8"]).vae)
    assert train_vae.step_options(vae, TrainVaeConfig(), 32, 0, 10) == {}
    config = TrainVaeConfig(
        adversarial_weight=0.5,
        adversarial_start=4,
        decoder_only_steps=3,
        equivariance_share=1.0,
        equivariance_start=1,
        gradient_accumulation_steps=2,
    )
    options = [train_vae.step_options(vae, config, 32, number, 10) for number in range(20)]
    assert [set(one) for one in options] == [set()] * 2 + [{"transform"}] * 6 + [{"transform", "adversarial"}] * 6 + [
        {"decoder_only", "adversarial"}
    ] * 6


# --- Exactness -------------------------------------------------------------------------------------------------------


def test_without_further_terms_a_step_is_the_step_that_it_was(pixels):
    """The gradients are those of the plain loss, bit for bit."""
    gradients = []
    for written_out in (False, True):
        torch.manual_seed(0)
        vae = models.build_vae(parse(("vae",), "", ["--vae_channels", "8", "8"]).vae)
        noise, config = torch.randn(12, 4, 16, 16), TrainVaeConfig(l1_weight=0.3)
        if written_out:
            posterior = vae.encode(pixels).latent_dist
            mean, log_variance = posterior.mean, posterior.logvar.clamp(-30.0, 20.0)
            reconstruction = vae.decode(mean + posterior.std * noise).sample
            error = reconstruction - pixels
            kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum() / pixels.numel()
            loss = 1.0 * error.square().mean() + 0.3 * error.abs().mean() + 1e-6 * kl
            (loss + 0.1 * (1.0 - losses.uniform_ssim(reconstruction, pixels))).backward()
        else:
            state = SimpleNamespace(model=models.Autoencoder(vae), module=vae, discriminator=None)
            accelerator = SimpleNamespace(backward=lambda loss: loss.backward())
            train_vae.loss_and_gradients(state, None, config, accelerator, pixels, noise)
        gradients.append([weight.grad for weight in vae.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def assert_same(whole, again, checkpoint):
    """Compare a checkpoint of two trainings with a discriminator, and their autoencoders, bit for bit."""
    files = [file.relative_to(whole) for file in (whole / checkpoint).rglob("*.safetensors")]
    # Other threads of the tests' process may draw from Python's random numbers. prove_resume.py compares these states, too.
    files = [file for file in files if not file.name.startswith("rng-")]
    assert {str(file.relative_to(file.parts[0])) for file in files} >= {
        "discriminator/discriminator.safetensors", "discriminator/optimizer.safetensors", "optimizer.safetensors"
    }  # fmt: skip
    for file in [*files, Path("vae") / WEIGHTS]:
        one, other = load_file(whole / file), load_file(again / file)
        assert one.keys() == other.keys()
        assert not [name for name in one if not torch.equal(one[name], other[name])], file


def test_a_training_with_all_terms_resumes_bit_for_bit(train, pretrained, narrow):
    options = ("--vae", pretrained, "--max_train_steps", 6, "--checkpointing_steps", 3, "--checkpoints_total_limit", 2,
               "--gradient_accumulation_steps", 2, "--decoder_only_steps", 2, "--crop_size", 16, "--crop_steps", 5, 
               *ALL_TERMS)  # fmt: skip
    whole = train(*options)
    again = shutil.copytree(whole, whole.with_name("again"))
    shutil.rmtree(again / "checkpoint-000006")
    state = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(state | {"status": "running"}))
    train(*options, output=again)
    assert_same(whole, again, "checkpoint-000006")
    first, last = (
        load_file(whole / f"checkpoint-00000{step}/discriminator/discriminator.safetensors") for step in (3, 6)
    )
    assert not torch.equal(first["0.weight"], last["0.weight"])


def test_an_extended_training_is_one_that_had_its_length_from_the_start(train, narrow):
    """Crops and discriminator begin at fixed updates. The decoder's phase moves to the new end, unless it has begun."""
    options = ("--lr_scheduler", "constant", "--checkpointing_steps", 2, "--crop_size", 16, "--crop_steps", 3, "--adversarial_weight",
               0.5, "--adversarial_start", 1, "--decoder_only_steps", 1)  # fmt: skip
    whole, run = train(*options, "--max_train_steps", 4), train(*options, "--max_train_steps", 3)
    longer = (*options, "--max_train_steps", 4)
    with pytest.raises(UserError, match=r"at step 3 .* trained its decoder alone .*from a checkpoint up to step 2"):
        train(*longer, output=run)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    train(*longer, "--resume_from_checkpoint", "checkpoint-2", output=run)
    assert_same(whole, run, "checkpoint-000004")
    assert json.loads((run / "run.json").read_text())["extensions"][0]["at_step"] == 2
    for checkpoint in run.glob("checkpoint-*"):  # as a training with --checkpoints_total_limit 1 ends
        shutil.rmtree(checkpoint)
    with pytest.raises(
        UserError, match=r"keeps no checkpoint from which its 4 updates could be extended to 5; .*give --vae"
    ):
        train(*options, "--max_train_steps", 5, output=run)


def test_a_command_that_names_a_checkpoint_goes_back_once(train, capsys):
    """A job repeats its command after each interruption, and must not lose what it has trained since."""
    options = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--max_train_steps", 2)
    back = (*options, "--resume_from_checkpoint", "checkpoint-1")
    run = train(*options)
    for status in ("stopped", "finished", "stopped"):
        state = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(state | {"status": status}))
        train(*back, output=run)
    first, second, third = capsys.readouterr().out.split("how the data set was understood")[2:]
    assert "made anew from step 1, and removed now: checkpoint-000002" in first
    assert "reusing the finished VAE" in second
    assert "went back to checkpoint-1 before, so it resumes from its newest checkpoint; to go back once more" in third
    assert f"resuming from {run / 'checkpoint-000002'}" in third
    assert "removed now" not in third
    train(*back, "--max_train_steps", 3, output=run)  # another length is another wish
    assert "removed now: checkpoint-000002" in capsys.readouterr().out


def in_two_processes(train, *arguments, output, **variables):
    """Run a training in two forked processes that average their gradients, with further environment variables.

    With LOCAL_WORLD_SIZE 1, each process is that of another node.
    """
    local = {"LOCAL_WORLD_SIZE": "2"} | variables
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                AcceleratorState._reset_state(True)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % int(local["LOCAL_WORLD_SIZE"])), "WORLD_SIZE": "2",
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **local}  # fmt: skip
                train(*arguments, output=output)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_two_processes_train_what_one_does(train, pretrained, narrow, tmp_path):
    """Also the discriminator, whose gradients and balance are means over the processes."""
    options = ("--vae", pretrained, "--max_train_steps", 4, "--decoder_only_steps", 1, "--checkpointing_steps", 4, "--crop_size", 16,
               "--checkpoints_total_limit", 2, "--adam_epsilon", 1e-3, *ALL_TERMS)  # fmt: skip
    one = train(*options, "--train_batch_size", 4)
    in_two_processes(train, *options, "--train_batch_size", 2, output=tmp_path / "two")
    for file in (f"vae/{WEIGHTS}", f"vae_ema/{WEIGHTS}", "discriminator/discriminator.safetensors"):
        alone, shared = (load_file(run / "checkpoint-000004" / file) for run in (one, tmp_path / "two"))
        for name in alone:
            torch.testing.assert_close(alone[name], shared[name], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_two_nodes_is_resumed_on_one(train, tmp_path, capfd):
    """The random states of the second node's process lie in its own folder."""
    options = ("--checkpoints_total_limit", 2, "--lr_scheduler", "constant")
    in_two_processes(train, *options, "--max_train_steps", 1, output=tmp_path / "run", LOCAL_WORLD_SIZE="1")
    assert (tmp_path / "run/node-1/checkpoint-000001/rng-1.safetensors").is_file()
    in_two_processes(train, *options, "--max_train_steps", 2, output=tmp_path / "run")
    assert "on 2 process(es) instead of 2 process(es) of 2 nodes: weights, average," in capfd.readouterr().out
    assert (tmp_path / "run/checkpoint-000002/rng-1.safetensors").is_file()


def test_a_finished_training_of_two_nodes_leaves_no_checkpoint_behind(train, tmp_path):
    run, length = tmp_path / "run", ("--max_train_steps", 2, "--checkpointing_steps", 1)
    in_two_processes(train, *length, "--checkpoints_total_limit", 1, output=run, LOCAL_WORLD_SIZE="1")
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "node-1").is_dir()
    assert not [*run.rglob("checkpoint-*")]


def test_a_launch_for_deepspeed_trains_what_data_parallelism_trains(train, pretrained, tmp_path):
    """The autoencoder is small, so a launch under ZeRO-2 trains it data parallel, bit for bit."""
    options = ("--vae", pretrained, "--max_train_steps", 3, "--gradient_accumulation_steps", 2, "--train_batch_size", 2)
    in_two_processes(train, *options, output=tmp_path / "plain")
    launch = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    in_two_processes(train, *options, output=tmp_path / "zero", **launch)
    plain, zero = (load_file(tmp_path / name / "vae" / WEIGHTS) for name in ("plain", "zero"))
    assert all(torch.equal(plain[name], zero[name]) for name in plain)


# --- Parts -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(1, 64), st.sampled_from([1, 2, 4, 8]))
def test_a_transform_is_a_function_of_seed_and_batch(seed, number, latents, factor):
    latents = max(latents, 8 // factor)
    drawn = losses.draw_transform(seed, number, 1.0, latents, factor)
    again = losses.draw_transform(seed, number, 1.0, latents, factor)
    assert drawn.keywords == again.keywords
    assert losses.draw_transform(seed, number, 0.0, latents, factor) is None
    images, shrunk = torch.zeros(1, 3, latents * factor, latents * factor), torch.zeros(1, 4, latents, latents)
    images, shrunk = drawn(images), drawn(shrunk)
    assert images.shape[-1] == images.shape[-2] == shrunk.shape[-1] * factor
    assert images.shape[-1] >= 8
    assert latents >= shrunk.shape[-1] >= latents / 4


def test_transforms_have_their_share_and_differ():
    drawn = [losses.draw_transform(0, number, 0.5, 16, 4) for number in range(400)]
    chosen = [one.keywords for one in drawn if one]
    assert 160 < len(chosen) < 240
    assert {one["turns"] for one in chosen} == {1, 2, 3}
    assert {one["scale"] * 16 for one in chosen} == set(range(4, 16))


def test_an_image_is_turned_as_its_latents_are():
    latents = torch.randn(1, 2, 4, 4)
    images = latents.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    for turns in (1, 2, 3):
        turned = losses.turn_and_shrink(latents, turns, 1.0).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        assert torch.equal(losses.turn_and_shrink(images, turns, 1.0), turned)


def test_the_discriminator_sees_each_image_alone_and_learns(narrow):
    config = TrainVaeConfig(discriminator_learning_rate=1e-3)
    judge, same = discriminator.Discriminator(config, "cpu"), discriminator.Discriminator(config, "cpu")
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(judge(images)[1:2], judge(images[1:2]), rtol=1e-4, atol=1e-5)
    assert judge(images).shape == (3, 1, 4, 4)
    assert judge(images[:, :, :8, :8]).shape == (3, 1, 1, 1)
    assert torch.equal(judge(images), same(images))
    made, alone = 0.1 * images, SimpleNamespace(num_processes=1)
    before = losses.discriminator_loss(judge(images), judge(made))
    for _ in range(6):
        losses.discriminator_loss(judge(images), judge(made)).backward()
        judge.step(config, alone)
    assert losses.discriminator_loss(judge(images), judge(made)) < before
    known = [weight.clone() for weight in judge.parameters]
    (judge(images).sum() * float("nan")).backward()
    judge.step(config, alone)  # a non-finite gradient moves nothing
    assert all(torch.equal(one, other) for one, other in zip(known, judge.parameters, strict=True))


def test_the_balance_makes_both_gradients_alike():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 3, 3)
    images = layer(torch.randn(2, 4, 8, 8))
    terms, adversary = torch.randn_like(images), 100 * torch.randn_like(images)
    factor = losses.balance(images, terms, adversary, layer.weight, lambda tensor: tensor)
    tiny = losses.balance(images, terms * 1e-12, adversary * 1e-12, layer.weight, lambda tensor: tensor)
    norms = [torch.autograd.grad(images, layer.weight, one, retain_graph=True)[0].norm() for one in (terms, adversary)]
    torch.testing.assert_close(factor * norms[1], norms[0])
    torch.testing.assert_close(factor, tiny, rtol=1e-3, atol=0)
    none = losses.balance(images, terms, 0 * adversary, layer.weight, lambda tensor: tensor)
    assert torch.isfinite(none)


def test_folded_normalisations_leave_features_and_let_gradients_through():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    whole = load_efficientnet_lite("efficientnet-lite2")
    wanted = whole._swish(whole._bn0(whole._conv_stem(images)))
    for block in whole._blocks:
        wanted = block(wanted)
    network = perceptual.PerceptualNetwork("efficientnet-lite2")
    network.train()  # as `vae.train()` would
    features = network._packaged_depths(images)
    assert [part.shape[-1] for part in features] == [32, 16, 8, 4, 2]
    torch.testing.assert_close(features[-1], wanted, rtol=1e-3, atol=1e-3)
    assert float(losses.perceptual_distance(network, images, images)) < 1e-9
    other = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    losses.perceptual_distance(network, other, images).backward()
    assert other.grad.abs().min() > 0
    assert all(weight.grad is None for weight in network.parameters())


def test_a_vision_model_of_transformers_gives_the_features(tmp_path):
    from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

    model = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7)
    )
    model.save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    network = perceptual.PerceptualNetwork(str(tmp_path))
    images = torch.randn(2, 3, 32, 32).requires_grad_()
    features = network(images)
    assert [part.shape for part in features] == [(2, 16, 101)] * 4  # 70 px in patches of 7, and the class token
    losses.perceptual_distance(network, images, torch.zeros_like(images)).backward()
    assert images.grad.abs().max() > 0
    assert network.identity == models.hash_model(model)
    with pytest.raises(UserError, match="nothing may be trained on it"):
        perceptual.PerceptualNetwork("efficientnet-lite0")
    with pytest.raises(UserError, match="cannot be loaded as perceptual_network"):
        perceptual.PerceptualNetwork(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--perceptual_network efficientnet-lite0", "judges pictures"),
        ("--perceptual_weight 0.1 --config judged.yaml", "judges pictures"),
        ("--crop_steps 100", "needs crop_size"),
        ("--vae_train_part decoder", "give --vae with the autoencoder to fine-tune"),
        ("--decoder_only", "give --vae with the autoencoder to fine-tune"),
        ("--vae_train_part decoder --decoder_only_steps 5", "leave out decoder_only_steps 5"),
        ("--vae_train_part decoder --equivariance_share 0.5", "which vae_train_part decoder keeps"),
        ("--adversarial_weight 0.5 --crop_size 4", "at least 8 px, not 4"),
        ("--adversarial_weight 0.5 --compile", "leave out --compile"),
        ("--equivariance_share 1.5", "equivariance_share"),
        ("--adversarial_weight=-1", "adversarial_weight"),
    ],
)
def test_terms_that_cannot_work_are_refused(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judged.yaml").write_text("evaluate: {judge_network: efficientnet-lite2}")
    with pytest.raises(UserError, match=sentence):
        parse(("data", "vae", "train_vae"), "", options.split())


def test_a_phase_that_never_comes_is_told():
    said = []
    config = TrainVaeConfig(adversarial_weight=0.5, adversarial_start=10, decoder_only_steps=10)
    train_vae.warn_of_steps(config, 10, said.append)
    assert ["never used" in said[0], "never trained" in said[1]] == [True, True]
    train_vae.warn_of_steps(TrainVaeConfig(crop_size=32, crop_steps=10), 10, said.append)
    assert "no update sees whole images" in said.pop()
    late = TrainVaeConfig(equivariance_share=0.5, equivariance_start=7, decoder_only_steps=3)
    train_vae.warn_of_steps(late, 10, said.append)
    assert "equivariance_start 7 is not below 7" in said.pop()
    train_vae.warn_of_steps(late, 11, said.append)
    train_vae.warn_of_steps(config, 11, said.append)
    train_vae.warn_of_steps(TrainVaeConfig(), 10, said.append)
    assert len(said) == 2
