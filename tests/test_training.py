"""Faster steps that change nothing (prefetched batches, the average in one pass), and remarks on a schedule."""

import threading
import time

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st

from t2i.config import TrainConfig
from t2i.training.loop import Average, build_optimizer, warn_of_warmup
from t2i.training.prefetch import Prefetcher


def test_a_batch_is_made_while_the_one_before_is_trained_on():
    made, threads = [], set()

    def make(number):
        made.append(number)
        threads.add(threading.current_thread())
        return number * number

    batches = Prefetcher(make, 4, in_thread=True)
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


@pytest.mark.parametrize("in_thread", [True, False])
def test_what_making_a_batch_raises_arrives_and_waiting_is_counted(in_thread):
    def make(number):
        time.sleep(0.02)
        if number == 1:
            raise ValueError("image 7 is gone")
        return number

    batches = Prefetcher(make, 9, in_thread=in_thread)
    assert batches.take(0) == 0
    assert batches.waited >= 0.02
    with pytest.raises(ValueError, match="image 7 is gone"):
        batches.take(1)
    assert batches.take(2) == 2


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
    [("cosine", 500, 4, "0.8%"), ("linear", 10, 10, "100.0%"), ("cosine", 9, 10, None), ("constant", 500, 4, None)],
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
