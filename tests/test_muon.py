"""The optimiser Muon, and the parts of a UNet that recipes may choose beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import run_recipe
from conftest import SCRIPTS
from t2i import models
from t2i.config import Recipe, TrainUnetConfig, UnetConfig
from t2i.errors import UserError
from t2i.training import checkpoints
from t2i.training.distributed import write_deepspeed_config
from t2i.training.muon import Muon, orthogonalise


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([(4, 6), (6, 4), (6, 6), (3, 2, 3, 3), (8, 2, 1, 1), (1, 5)]), min_size=1, max_size=5),
    st.integers(0, 2**31),
    st.floats(-4, 4),
)
def test_updates_of_matrices_have_singular_values_near_one(shapes, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    tensors = [10**exponent * torch.randn(shape, generator=generator) for shape in shapes]
    for tensor, update in zip(tensors, orthogonalise(tensors), strict=True):
        assert update.shape == tensor.shape
        u, sizes, v = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
        whole = sizes > sizes.max() / 10  # The iterations lift small singular values only in part.
        assert torch.diag(u.T @ update.flatten(1) @ v.T)[whole].sub(0.95).abs().max() < 0.3
    assert torch.equal(orthogonalise([torch.zeros(2, 3)])[0], torch.zeros(2, 3))


def test_matrices_are_updated_as_torch_does_and_all_else_by_adamw():
    torch.manual_seed(0)
    shapes = {"a": (12, 24), "kernel": (8, 4, 3, 3), "bias": (7,), "conv_in.w": (5, 3)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    theirs["kernel"] = torch.nn.Parameter(weights["kernel"].flatten(1).clone())
    muon = Muon(ours.items(), ("conv_in",), lr=0.02, weight_decay=0.1)
    peers = [
        torch.optim.Muon([theirs["a"], theirs["kernel"]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs["bias"], theirs["conv_in.w"]], lr=0.02, weight_decay=0.1),
    ]
    for _ in range(4):
        for name, parameter in ours.items():
            parameter.grad = torch.randn(parameter.shape)
            theirs[name].grad = parameter.grad.clone().view(theirs[name].shape)
        for optimizer in (muon, *peers):
            optimizer.step()
    for name, before in weights.items():
        moved = (ours[name] - before).norm()
        apart = (ours[name].flatten() - theirs[name].flatten()).norm() / moved
        assert moved > 0.1
        assert apart < (0.03 if name in ("a", "kernel") else 1e-6), name  # torch iterates in bf16


def test_a_saved_optimizer_goes_on_bit_for_bit(tmp_path):
    def made():
        torch.manual_seed(1)
        weights = {"a": torch.nn.Parameter(torch.randn(6, 4)), "b": torch.nn.Parameter(torch.randn(3))}
        return weights, Muon(weights.items(), (), lr=0.05)

    def steps(weights, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter in weights.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole, optimizer = made()
    steps(whole, optimizer, range(6))
    first, optimizer = made()
    steps(first, optimizer, range(3))
    numbers = checkpoints.save_optimizer(tmp_path, optimizer)
    second, optimizer = made()
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    checkpoints.load_optimizer(tmp_path, optimizer, numbers)
    steps(second, optimizer, range(3, 6))
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_pooled_text_changes_what_a_block_without_cross_attention_computes():
    torch.manual_seed(0)
    config = UnetConfig(
        unet_channels=[8],
        unet_layers=1,
        attention_head_dim=2,
        down_block_types=["DownBlock2D"],
        addition_embed_type="text",
    )
    unet = models.build_unet(config, 4, 3, 48).eval()
    assert unet.config.addition_embed_type_num_heads == 1  # 32 channels a head at least
    outputs = []
    unet.down_blocks[0].register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    latents = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        for text in torch.randn(2, 1, 5, 48):
            unet(latents, 500, text)
    assert not torch.equal(*outputs)


def test_a_loaded_step_number_moves_to_the_device_of_its_weight():
    def made(device):
        parameter = torch.nn.Parameter(torch.zeros(3, device=device))
        return parameter, Muon([("bias", parameter)], (), lr=0.1)

    parameter, optimizer = made("cpu")
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    parameter, optimizer = made("meta")  # It stands for a GPU.
    optimizer.load_state_dict(state)
    assert {name: str(value.device) for name, value in optimizer.state[parameter].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


def test_muon_under_deepspeed_is_refused_before_any_stage(tmp_path):
    recipe = Recipe(train_unet=TrainUnetConfig(optimizer="muon"))
    zero = SCRIPTS.parent / "accelerate_configs" / "deepspeed_zero2.yaml"
    options = run_recipe.Options(output_dir=str(tmp_path / "out"), accelerate_config=str(zero))
    with pytest.raises(UserError, match="muon does not run under DeepSpeed; set optimizer: adamw, or take a YAML"):
        run_recipe.check_stages(recipe, options)
    options.accelerate_config = str(zero.with_name("cpu.yaml"))
    run_recipe.check_stages(recipe, options)


def test_muon_under_deepspeed_is_refused():
    with pytest.raises(UserError, match="muon does not run under DeepSpeed"):
        write_deepspeed_config({"zero_optimization": {"stage": 2}}, TrainUnetConfig(optimizer="muon"), 2)
