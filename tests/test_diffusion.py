"""The mathematics: stateless draws, targets, weights, against closed forms and diffusers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import train_unet
import train_vae
from t2i import diffusion
from t2i.config import TrainUnetConfig
from t2i.data.caches import TextCache
from t2i.data.prepared import Split

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


@given(WHOLE, WHOLE, st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_copies_within_a_step_draw_their_own_and_the_first_as_ever(seed, step, samples):
    drawn = diffusion.draw(seed, step, samples, (1, 2, 2), 1000)
    assert len({noise.numpy().tobytes() for noise in drawn.noise}) == len(samples)
    assert len({coins.numpy().tobytes() for coins in drawn.uniform}) == len(samples)
    for sample in set(samples):
        alone = diffusion.draw(seed, step, [sample], (1, 2, 2), 1000)
        assert torch.equal(drawn.noise[samples.index(sample)], alone.noise[0])


@given(WHOLE, WHOLE, st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_drawn_caption_is_a_function_of_seed_step_sample_and_copy(seed, step, pairs):
    samples, counts = [sample for sample, _ in pairs], [count for _, count in pairs]
    copies = diffusion.occurrences(samples)
    drawn = diffusion.draw_captions(seed, step, samples, counts)
    assert all(0 <= caption < count for caption, count in zip(drawn, counts, strict=True))
    one = diffusion.draw_captions(seed, step, samples, [1] * len(samples))
    assert one == [0] * len(samples)  # a sample with one caption
    for row, (sample, count, copy) in enumerate(zip(samples, counts, copies, strict=True)):  # whatever the batch
        assert diffusion.draw_captions(seed, step, [sample], [count], [copy]) == [drawn[row]]
    if copies[0] == 0:
        assert diffusion.draw_captions(seed, step, samples[:1], counts[:1]) == drawn[:1]


@settings(max_examples=30)
@given(WHOLE, WHOLE, st.integers(2, 4))
def test_each_caption_is_drawn_as_often_as_another(seed, sample, count):
    """The step, the sample and the copy each choose anew, so 400 draws miss the share of a caption by little."""
    of_steps = [diffusion.draw_captions(seed, step, [sample], [count])[0] for step in range(400)]
    of_samples = diffusion.draw_captions(seed, 3, [sample + other for other in range(400)], [count] * 400)
    of_copies = diffusion.draw_captions(seed, 3, [sample] * 400, [count] * 400)
    for drawn in (of_steps, of_samples, of_copies):
        shares = np.bincount(drawn, minlength=count) / 400
        assert abs(shares - 1 / count).max() < 0.13  # over five deviations of a share of a half
    assert of_steps != [diffusion.draw_captions(seed + 1, step, [sample], [count])[0] for step in range(400)]
    neighbours = np.array(of_steps[:-1]) * count + np.array(of_steps[1:])  # each pair is as frequent as another
    assert len(set(neighbours.tolist())) == count**2


def test_a_drawn_caption_does_not_depend_on_the_processes_that_share_an_update():
    images, batch = 5, 8
    counts = np.array([1, 3, 2, 4, 1])
    text = TextCache(np.zeros((12, 1, 1), np.float16), np.arange(1, 12), counts)
    latents = np.zeros((images, 1, 2, 2, 2), np.float32)
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    given = train_unet.Inputs(scheduler, {"train": (latents, text)}, 1.0, None)
    embeddings = np.arange(12, dtype=np.float16)[:, None, None]
    text.embeddings = embeddings  # the embedding of a caption is its row
    found = []
    for world, parts in ((1, 1), (2, 1), (1, 4), (2, 2)):
        size = batch // world // parts
        config = TrainUnetConfig(train_batch_size=size, gradient_accumulation_steps=parts, seed=5)
        rows = np.empty((20, batch), int)
        for step in range(20):
            for part in range(parts):
                for rank in range(world):
                    place = SimpleNamespace(num_processes=world, process_index=rank, device=torch.device("cpu"))
                    context = train_unet.make_batch(given, config, place, step * parts + part)[3]
                    start = part * batch // parts + rank
                    rows[step, start : (part + 1) * batch // parts : world] = context.flatten()
        found.append(rows)
    assert all((rows == found[0]).all() for rows in found)
    assert set(found[0].ravel()) == set(range(12))  # each caption, and the empty one where a caption is dropped
    dropped = (found[0] == 0).mean()
    assert 0.02 < dropped < 0.25


@pytest.mark.parametrize(("images", "batch"), [(3, 16), (16, 16), (10, 8)])
def test_copies_are_counted_over_the_whole_update(images, batch):
    """However an update is shared out over processes and parts, each of its samples draws the same; no two draw alike."""
    drawn = []
    for world, parts in ((1, 1), (2, 1), (1, 4), (2, 2)):
        config = SimpleNamespace(train_batch_size=batch // world // parts, gradient_accumulation_steps=parts, seed=5)
        given = SimpleNamespace(caches={"train": (range(images), None)})
        noise: list = [None] * batch
        for part in range(parts):
            for rank in range(world):
                place = SimpleNamespace(num_processes=world, process_index=rank)
                indices = train_unet.sample_indices(given, config, 7, part, place).tolist()
                copies = train_unet.sample_copies(given, config, 7, part, place)
                found = diffusion.draw(5, 7, indices, (1, 2, 2), 1000, copies).noise
                start = part * batch // parts + rank
                noise[start : (part + 1) * batch // parts : world] = found
        drawn.append(torch.stack(noise))
    assert len({one.numpy().tobytes() for one in drawn[0]}) == batch
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_the_vae_counts_copies_over_its_processes():
    train = Split(np.zeros((3, 8, 8, 3), np.uint8), None, "")
    config = SimpleNamespace(train_batch_size=4, seed=0, crop_size=None, channels_last=False)
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=2, block_out_channels=[1, 1]))
    noise = []
    for rank in (0, 1):
        place = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        noise += train_vae.make_batch(train, config, True, vae, place, 0)[1]
    assert len({one.numpy().tobytes() for one in noise}) == 8


def test_captions_are_dropped_alike_from_plain_and_mirrored_images():
    count, share = 2000, 0.3
    latents = np.full((count, 2, 2, 1, 1), -30.0, np.float32)  # no spread around the means below
    latents[:, :, 0, 0, 0] = [0.0, 1.0]  # of the image and of its mirror image
    ones = np.ones(count, np.int64)
    text = TextCache(np.array([0.0, 1.0], np.float16).reshape(2, 1, 1), ones, ones)
    inputs = train_unet.Inputs(DDPMScheduler(), {"train": (latents, text)}, 1.0, None)
    config = TrainUnetConfig(train_batch_size=count, proportion_empty_prompts=share, seed=0)
    place = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    drawn, _, _, context = train_unet.make_batch(inputs, config, place, 0)
    mirrored, dropped = drawn.flatten().round() == 1, context.flatten() == 0
    assert abs(mirrored.float().mean() - 0.5) < 0.05
    for kind in (mirrored, ~mirrored):
        assert abs(dropped[kind].float().mean() - share) < 0.05


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


def test_noise_beyond_the_plain_one_changes_no_other_draw():
    plain = diffusion.draw(0, 3, [4, 9], (2, 8, 8), 1000)
    assert plain.input_noise is None
    more = diffusion.draw(0, 3, [4, 9], (2, 8, 8), 1000, noise_offset=0.5, input_perturbation=0.1)
    for name in ("posterior_noise", "timesteps", "uniform"):
        assert torch.equal(getattr(plain, name), getattr(more, name))
    shift = more.noise - plain.noise  # one number a channel of a sample
    assert shift.std(dim=(2, 3)).max() < 1e-6
    assert shift.mean(dim=(2, 3)).unique().numel() == 4
    assert 0.8 < ((more.input_noise - more.noise) / 0.1).std() < 1.2
    again = diffusion.draw(0, 3, [9], (2, 8, 8), 1000, noise_offset=0.5, input_perturbation=0.1)  # whatever the batch
    assert torch.equal(again.input_noise[0], more.input_noise[1])
    assert torch.equal(diffusion.draw(0, 3, [4, 9], (2, 8, 8), 1000, input_perturbation=0.1).noise, plain.noise)


def test_a_perturbed_input_keeps_its_target():
    class Scheduler:
        config = SimpleNamespace(prediction_type="epsilon")
        add_noise = staticmethod(lambda latents, noise, timesteps: noise)

    def unet(noisy, timesteps, context):
        asked.append(noisy)
        return SimpleNamespace(sample=noise)

    asked, noise, other = [], torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    steps = torch.zeros(2, dtype=torch.int64)
    losses = diffusion.denoising_loss(unet, Scheduler, noise * 0, noise, steps, None, None, other)
    assert torch.equal(asked[0], other)
    assert losses.abs().max() == 0
