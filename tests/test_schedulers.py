"""Valid schedulers for a model, measured with a denoiser whose right answer is known."""

import inspect
import math
from functools import cache

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from t2i.errors import UserError
from t2i.pictures import sampling
from t2i.pictures.png import RIGHT, SCHEDULERS, last_signal, scheduler_problem

SPREAD = 0.5  # of the images, around their mean
MEAN = 0.6 + 0.8 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False, "clip_sample": False}
TRAILING = BASE | {"timestep_spacing": "trailing"}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
MODELS = {
    "zero terminal SNR": TRAILING | ZERO | {"beta_schedule": "squaredcos_cap_v2"},
    "velocity": TRAILING | {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    "epsilon": TRAILING | {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"},
    "Stable Diffusion": BASE | {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
}
BY_CHANCE = {
    "DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "SASolverScheduler", "TCDScheduler",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    yield
    torch.set_num_threads(threads)


@cache
def saved(model):
    return {"_class_name": "DDIMScheduler", **DDIMScheduler(**MODELS[model]).config}


@cache
def levels(model):
    """The signal of each noise level, squared, and log(noise / signal)."""
    alphas = DDIMScheduler(**MODELS[model]).alphas_cumprod.double()
    return alphas.tolist(), ((1 - alphas) / alphas.clamp(min=1e-12)).sqrt().log().tolist()


def predict(x, timestep, model):
    """What a perfect model says of images N(MEAN, SPREAD^2): the closed form of the posterior mean, between levels as well."""
    alphas, noise = levels(model)
    place = min(len(alphas) - 1.0, max(0.0, float(timestep)))
    low, part = int(place), place % 1
    level = math.exp(noise[low] * (1 - part) + noise[min(low + 1, len(alphas) - 1)] * part)
    a, b = 1 / math.hypot(1, level), level / math.hypot(1, level)
    if not part:
        a, b = alphas[low] ** 0.5, (1 - alphas[low]) ** 0.5
    scale = (x - a * MEAN) / (a * a * SPREAD**2 + b * b)
    epsilon, image = b * scale, MEAN + a * SPREAD**2 * scale
    return epsilon if saved(model)["prediction_type"] == "epsilon" else a * epsilon - b * image


@cache
def draw(cls, model, steps):
    """Images [32, 4, 4, 4] as multiples of SPREAD from MEAN, drawn as the pipeline draws."""
    scheduler = getattr(diffusers, cls).from_config(saved(model))
    scheduler.set_timesteps(steps)
    x = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    more = (
        {"generator": torch.Generator().manual_seed(5)}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for timestep in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(x, timestep), timestep, model)
        x = scheduler.step(output, timestep, x, **more, return_dict=False)[0]
    return (x - MEAN) / SPREAD


@pytest.mark.parametrize("model", MODELS)
def test_what_is_offered_draws_what_ddim_draws(model):
    offered = 0
    for steps in (4, 16):
        wanted = draw("DDIMScheduler", model, steps)
        for cls in sorted(RIGHT):
            if scheduler_problem(cls, saved(model), steps):
                continue
            offered += 1
            drawn = draw(cls, model, steps)
            told = f"{cls}, {steps} steps: mean {drawn.mean():.2f}, spread {drawn.std():.2f}, DDIM {wanted.std():.2f}"
            assert abs(drawn.mean()) < abs(wanted.mean()) + 0.2, told
            assert wanted.std() - 0.2 < drawn.std() < max(1.2, wanted.std() + 0.3), told
            if cls not in BY_CHANCE and steps == 16:
                assert (drawn - wanted).abs().mean() < 0.25, told
    assert offered > 23


@pytest.mark.parametrize(
    ("cls", "model", "steps"),
    [
        ("HeunDiscreteScheduler", "zero terminal SNR", 20),
        ("HeunDiscreteScheduler", "epsilon", 20),
        ("KDPM2AncestralDiscreteScheduler", "zero terminal SNR", 8),
        ("PNDMScheduler", "epsilon", 20),
        ("HeunDiscreteScheduler", "Stable Diffusion", 2),
        ("KDPM2DiscreteScheduler", "Stable Diffusion", 4),
        ("EDMEulerScheduler", "velocity", 20),
        ("EDMDPMSolverMultistepScheduler", "Stable Diffusion", 20),
        ("IPNDMScheduler", "Stable Diffusion", 20),
        ("CMStochasticIterativeScheduler", "velocity", 20),
        ("DDIMInverseScheduler", "velocity", 20),
        ("CogVideoXDDIMScheduler", "epsilon", 4),
        ("LCMScheduler", "velocity", 20),
    ],
)
def test_what_is_refused_draws_something_else(cls, model, steps):
    drawn, wanted = draw(cls, model, steps), draw("DDIMScheduler", model, steps)
    assert not (abs(drawn.mean()) < 0.3 and wanted.std() - 0.2 < drawn.std() < 1.25)
    problem = scheduler_problem(cls, saved(model), steps)
    assert problem.startswith(f"scheduler {cls} ")
    assert "take one of ddim, " in problem
    with pytest.raises(UserError, match="take one of ddim"):
        sampling.make_scheduler(cls, saved(model), steps)


def test_every_other_class_of_diffusers_is_refused():
    others = {name for name in dir(diffusers) if name.endswith("Scheduler")} - RIGHT
    assert len(others) > 20
    for cls in sorted(others):
        with pytest.raises(UserError, match=r"take one of ddim|unknown scheduler"):
            sampling.make_scheduler(cls, saved("zero terminal SNR"), 16)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_needs_its_four_steps(steps):
    assert f"needs 4 steps or more here, not {steps}" in scheduler_problem("pndm", saved("velocity"), steps)
    own = saved("Stable Diffusion") | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    assert scheduler_problem("pndm", own, steps) is None


def test_a_model_with_a_scheduler_of_its_own_kind_keeps_it():
    lcm = saved("Stable Diffusion") | {"_class_name": "LCMScheduler"}
    assert scheduler_problem("LCMScheduler", lcm, 4) is None
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert "take FlowMatchEulerDiscreteScheduler" in scheduler_problem("ddim", flow, 4)
    assert scheduler_problem("ddim", {"num_train_timesteps": "many"}) is None  # of a damaged file: nothing is known


def test_the_last_signal_is_that_of_diffusers():
    for model in MODELS:
        alpha = float(DDIMScheduler(**MODELS[model]).alphas_cumprod[-1])
        assert last_signal(saved(model)) == pytest.approx(alpha, rel=1e-3, abs=1e-9)


def test_latents_are_not_clipped_by_a_default():
    config = {key: value for key, value in saved("Stable Diffusion").items() if key != "clip_sample"}
    assert not sampling.make_scheduler("ddim", config | {"_class_name": "PNDMScheduler"}).config.clip_sample
    assert set(SCHEDULERS.values()) <= RIGHT
