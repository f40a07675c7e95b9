"""The mathematics: stateless draws, targets, weights, against closed forms and diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from t2i import diffusion

WHOLE = st.integers(0, 2**40)


@given(WHOLE, WHOLE, st.lists(WHOLE, min_size=1, max_size=5, unique=True))
def test_draws_are_a_function_of_seed_step_and_sample(seed, step, samples):
    shape = (2, 3, 3)
    together = diffusion.draw(seed, step, samples, shape, 1000)
    backwards = diffusion.draw(seed, step, samples[::-1], shape, 1000)
    assert torch.equal(together.noise, backwards.noise.flip(0))
    assert torch.equal(together.timesteps, backwards.timesteps.flip(0))
    alone = diffusion.draw(seed, step, samples[:1], shape, 1000)
    assert torch.equal(together.uniform[:1], alone.uniform)
    assert torch.equal(together.posterior_noise[:1], alone.posterior_noise)
    assert not torch.equal(alone.noise, diffusion.draw(seed, step + 1, samples[:1], shape, 1000).noise)
    assert not torch.equal(alone.noise, alone.posterior_noise)


def test_draws_have_the_right_distribution():
    drawn = diffusion.draw(0, 0, list(range(4000)), (1, 4, 4), 1000)
    assert abs(drawn.noise.mean()) < 0.02
    assert abs(drawn.noise.std() - 1) < 0.02
    assert abs(drawn.timesteps.float().mean() - 499.5) < 15
    assert drawn.timesteps.min() < 10
    assert drawn.timesteps.max() > 989
    assert abs((drawn.uniform[:, 1] < 0.1).float().mean() - 0.1) < 0.02
    assert abs(torch.corrcoef(drawn.uniform.T).fill_diagonal_(0)).max() < 0.05


@given(st.integers(0, 10**6))
def test_validation_timesteps_lie_one_in_each_band(sample):
    levels = diffusion.validation_timesteps(sample, 1000)
    assert [level // 250 for level in levels] == [0, 1, 2, 3]


def test_posterior_sample_has_the_moments_it_was_given():
    mean, log_variance = torch.full((1, 1, 64, 64), 3.0), torch.full((1, 1, 64, 64), -2.0)
    sample = diffusion.sample_posterior(torch.cat([mean, log_variance], 1), torch.randn(1, 1, 64, 64))
    assert abs(sample.mean() - 3) < 0.05
    assert abs(sample.var() / torch.exp(torch.tensor(-2.0)) - 1) < 0.1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_zero_for_the_true_answer_and_weighted_as_published(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    latents, noise, timesteps = (
        torch.randn(6, 4, 4, 4),
        torch.randn(6, 4, 4, 4),
        torch.tensor([1, 100, 300, 500, 700, 999]),
    )
    alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    true = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    class Answer:
        def __init__(self, sample):
            self.sample = sample

    def perfect(noisy, levels, context):
        return Answer(true)

    def off_by_one(noisy, levels, context):
        return Answer(true + 1)

    context = torch.zeros(6, 2, 3)
    assert diffusion.denoising_loss(perfect, scheduler, latents, noise, timesteps, context).abs().max() < 1e-10
    plain = diffusion.denoising_loss(off_by_one, scheduler, latents, noise, timesteps, context)
    weighted = diffusion.denoising_loss(off_by_one, scheduler, latents, noise, timesteps, context, snr_gamma=5.0)
    snr = (alpha / (1 - alpha)).flatten()
    expected = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(weighted / plain, expected, rtol=1e-4, atol=1e-6)
