"""Faster steps that change nothing (prefetched batches, the average in one pass), and remarks on a schedule."""

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_unet
from t2i import models
from t2i.config import TrainConfig, UnetConfig
from t2i.data.caches import TextCache
from t2i.training import checkpoints
from t2i.training.loop import Average, build_optimizer, rate_share, warn_of_warmup
from t2i.training.prefetch import Prefetcher


def test_a_batch_is_made_while_the_one_before_is_trained_on():
    made, threads = [], set()

    def make(number):
        made.append(number)
        threads.add(threading.current_thread())
        return number * number

    batches = Prefetcher(make, 4, torch.device("cuda"))
    assert batches.take(1) == 1
    for _ in range(200):
        if made == [1, 2]:
            break
        time.sleep(0.01)
    assert made == [1, 2]
    assert threading.current_thread() in threads
    assert len(threads) == 2
    assert [batches.take(2), batches.take(3)] == [4, 9]
    assert made == [1, 2, 3]  # there is no batch 4
    assert batches.take(0) == 0  # any other number is made when asked for


def test_saving_the_average_leaves_the_weights_as_they_are(tmp_path):
    torch.manual_seed(0)
    module = AutoencoderKL(block_out_channels=(8,), norm_num_groups=1)
    parameters = list(module.parameters())
    before, average = [parameter.detach().clone() for parameter in parameters], [torch.rand_like(p) for p in parameters]
    checkpoints.save_weights(tmp_path, module, parameters, average)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    saved = AutoencoderKL.from_pretrained(tmp_path)
    assert all(torch.equal(now, then) for now, then in zip(saved.parameters(), average, strict=True))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_only_beside_an_nvidia_gpu_a_thread_makes_batches(device):
    """On an Apple GPU, two threads that give commands end the process."""
    threads = []
    batches = Prefetcher(lambda number: threads.append(threading.current_thread()), 9, torch.device(device))
    for number in range(3):
        batches.take(number)
    assert threads == [threading.current_thread()] * 3


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_making_a_batch_raises_arrives_and_waiting_is_counted(device):
    def make(number):
        time.sleep(0.02)
        if number == 1:
            raise ValueError("image 7 is gone")
        return number

    batches = Prefetcher(make, 9, torch.device(device))
    assert batches.take(0) == 0
    assert batches.waited >= 0.02
    with pytest.raises(ValueError, match="image 7 is gone"):
        batches.take(1)
    assert batches.take(2) == 2


def test_the_validation_loss_takes_no_more_images_at_once_than_training_and_stays_the_same():
    torch.manual_seed(0)
    moments = np.random.default_rng(0).normal(size=(9, 1, 8, 8, 8)).astype(np.float16)
    embeddings = np.random.default_rng(1).normal(size=(9, 3, 8)).astype(np.float16)
    blocks = ["DownBlock2D", "CrossAttnDownBlock2D"]
    small = UnetConfig(
        unet_channels=[8, 16], unet_layers=1, down_block_types=blocks, attention_head_dim=2, text_hidden_size=8
    )
    unet, batches = models.build_unet(small, 8, 4, 8), []
    unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    text = TextCache(embeddings, np.arange(9), np.ones(9, np.int64))
    inputs = train_unet.Inputs(models.build_noise_scheduler(small), {"validation": (moments, text)}, 1.0, [])
    accelerator = SimpleNamespace(
        num_processes=1, process_index=0, device=torch.device("cpu"), autocast=nullcontext, reduce=lambda sums: sums
    )
    whole = train_unet.validation_loss(unet, inputs, 9, accelerator)
    assert set(batches) == {9}
    batches.clear()
    assert train_unet.validation_loss(unet, inputs, 9, accelerator, 2) == pytest.approx(whole, rel=1e-5)
    assert set(batches) == {2, 1}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.0, 0.9999), st.integers(1, 30))
def test_the_average_is_that_of_diffusers(sizes, decay, steps):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    ours, theirs = Average(weights, decay=decay), EMAModel(weights, decay=decay, foreach=True)
    for _ in range(steps):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight))
        ours.step(weights)
        theirs.step(weights)
    for one, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.optimization_step == theirs.optimization_step


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "share"),
    [
        *(("cosine", 500, 4, "0.8%"), ("linear", 10, 10, "100.0%"), ("polynomial", 10, 10, "100.0%")),
        *(("cosine", 9, 10, None), ("constant", 500, 4, None)),
    ],
)
def test_a_warm_up_that_is_too_long_is_said_with_the_rate_that_it_reaches(schedule, warmup, steps, share):
    config, said = TrainConfig(lr_scheduler=schedule, lr_warmup_steps=warmup, learning_rate=0.5), []
    warn_of_warmup(config, steps, said.append)
    assert [share in line for line in said] == ([True] if share else [])
    if share:  # the rate after the last update is what the sentence says
        optimizer, rates = build_optimizer(torch.nn.ParameterList([torch.zeros(1)]), config, steps)
        for _ in range(steps):
            optimizer.step()
            rates.step()
        reached = rates.get_last_lr()[0] / config.learning_rate
        assert f"{reached:.1%}" == share or steps == warmup  # at the end of both, cosine and linear fall to zero


SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def plain_rates(config, steps, count):
    """The first `count` learning rates of diffusers' schedule of `steps` updates, as shares of the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
    )
    rates = []
    for _ in range(count):
        rates.append(schedule.get_last_lr()[0] / config.learning_rate)
        optimizer.step()
        schedule.step()
    return rates


def extension(before, after, way, at_step=None, skipped=0):
    at = before if at_step is None else at_step
    return {"from_steps": before, "to_steps": after, "at_step": at, "at_update": at - skipped, "lr_on_extend": way}


@settings(max_examples=50)
@given(st.sampled_from(SCHEDULES), st.integers(0, 5), st.integers(1, 20), st.integers(1, 20), st.data())
def test_the_rate_of_an_extension_is_the_one_that_its_name_says(name, warmup, before, added, data):
    """From a checkpoint anywhere in the run: stretch gives the longer run's rates, restart the schedule anew, constant one rate."""
    config = TrainConfig(lr_scheduler=name, lr_warmup_steps=warmup, learning_rate=0.5)
    at, after = data.draw(st.integers(1, before)), before + added
    assume(name != "polynomial" or warmup not in (before, after, after - at))  # diffusers divides by zero there
    first, whole = plain_rates(config, before, before + 1), plain_rates(config, after, after)
    continued = {
        "stretch": whole[at:],
        "restart": plain_rates(config, after - at, after - at),
        "constant": [first[at]] * (after - at),
    }
    for way, rest in continued.items():
        extended = [extension(before, after, way, at)]
        rates = [rate_share(config, after, extended, update) for update in range(after)]
        assert rates == pytest.approx(first[:at] + rest), way
    assert [rate_share(config, after, [], update) for update in range(after)] == pytest.approx(whole)


def test_each_extension_keeps_its_rates_when_another_follows():
    config = TrainConfig(lr_scheduler="linear", lr_warmup_steps=0, learning_rate=0.5)
    one, two = extension(4, 8, "stretch"), extension(8, 10, "constant", at_step=6)
    three = extension(10, 14, "restart", skipped=1)  # an update was skipped, so the schedule counts 9 at step 10
    rates = [rate_share(config, 14, [one, two, three], update) for update in range(13)]
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25, 0.5, 0.375, 0.25, 0.25, 0.25, 1, 0.75, 0.5, 0.25])
    # An extension from an earlier checkpoint replaces what came after that checkpoint.
    rates = [rate_share(config, 12, [one, extension(8, 12, "stretch", at_step=2)], update) for update in range(12)]
    assert rates == pytest.approx([1, 0.75, *(1 - update / 12 for update in range(2, 12))])


@pytest.mark.parametrize(("way", "said"), [("stretch", 0), ("restart", 1), ("constant", 0)])
def test_a_second_warm_up_that_is_too_long_is_said(way, said):
    lines = []
    warn_of_warmup(TrainConfig(lr_warmup_steps=50), 240, lines.append, [extension(200, 240, way)])
    assert len(lines) == said
    assert all("training of 40 updates" in line for line in lines)
