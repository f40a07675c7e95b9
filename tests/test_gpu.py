"""Training on one NVIDIA GPU, skipped without one: a step recorded as a CUDA graph trains as single kernels do."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from conftest import ROOT, SCRIPTS, TINY
from t2i.training import checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# bf16 rounds to 3 digits and fp16 to 4; the order in which kernels add is not always the same
NEARNESS = {"no": 1e-3, "bf16": 2e-2, "fp16": 2e-2}


SINGLE = (
    "-m",
    "accelerate.commands.launch",
    "--quiet",
    "--config_file",
    str(ROOT / "accelerate_configs/single_gpu.yaml"),
)


def launch(command, folder, script, name, precision, *options, launcher=None):
    words = launcher or (*SINGLE, "--mixed_precision", precision)
    settings = ("--config", "tiny.yaml", "--dataset", "dataset", "--report_to", "none", "--output_dir", name,
                "--logging_steps", 1)  # fmt: skip
    return command(script, *settings, *options, cwd=folder, launcher=words, env={"CUDA_VISIBLE_DEVICES": "0"})


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "tiny.yaml").write_text(TINY)
    command("make_flowers.py", "--output_dir", "dataset", "--count", 40, "--validation_count", 12, "--test_count", 4,
            "--size", 32, "--workers", 1, cwd=folder)  # fmt: skip
    launch(command, folder, "train_vae.py", "vae", "no", "--ssim_weight", 0.1)
    return folder


@pytest.fixture(scope="module")
def graph(folder, command):
    """A recorded training in float32."""
    launch(command, folder, "train_unet.py", "graph_no", "no", "--vae", "vae")
    return folder / "graph_no"


def test_autoencoder(folder, command):
    launch(command, folder, "train_vae.py", "vae_kernels", "no", "--ssim_weight", 0.1, "--no-cuda_graphs")
    assert len(losses(folder / "vae")) == 12
    np.testing.assert_allclose(losses(folder / "vae"), losses(folder / "vae_kernels"), rtol=NEARNESS["no"])


def test_saving_the_average_needs_no_memory_of_the_gpu(tmp_path):
    module = AutoencoderKL(block_out_channels=(64,)).to("cuda")
    parameters = list(module.parameters())
    before, average = [parameter.detach().clone() for parameter in parameters], [torch.rand_like(p) for p in parameters]
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    checkpoints.save_weights(tmp_path, module, parameters, average)
    assert torch.cuda.max_memory_allocated() - held < sum(weight.nbytes for weight in parameters) / 2
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))


@pytest.mark.parametrize("precision", NEARNESS)
def test_denoiser_and_going_on(folder, command, precision):
    graph, kernels = f"recorded_{precision}", f"kernels_{precision}"
    launch(command, folder, "train_unet.py", graph, precision, "--vae", "vae")
    launch(command, folder, "train_unet.py", kernels, precision, "--vae", "vae", "--no-cuda_graphs")
    assert len(losses(folder / graph)) == 8
    np.testing.assert_allclose(losses(folder / graph), losses(folder / kernels), rtol=NEARNESS[precision])

    shutil.copytree(folder / graph, folder / f"again_{precision}")
    shutil.rmtree(folder / f"again_{precision}/checkpoint-000008")
    state = json.loads((folder / graph / "run.json").read_text())
    assert state["machine"].startswith("1 x ")
    (folder / f"again_{precision}/run.json").write_text(json.dumps(state | {"status": "running"}))
    done = launch(command, folder, "train_unet.py", f"again_{precision}", precision, "--vae", "vae")
    assert "resuming from" in done.stdout
    np.testing.assert_allclose(
        losses(folder / f"again_{precision}")[-4:], losses(folder / graph)[-4:], rtol=NEARNESS[precision]
    )


def test_accumulated_gradients_are_not_recorded(folder, graph, command):
    options = ("--vae", "vae", "--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    launch(command, folder, "train_unet.py", "halves", "no", *options)
    np.testing.assert_allclose(losses(folder / "halves"), losses(graph), rtol=5e-3)  # convolutions in TF32


def test_a_process_alone_under_ddp_is_not_recorded(folder, graph, command):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    launch(command, folder, "train_unet.py", "ddp", "no", "--vae", "vae", launcher=torchrun)
    np.testing.assert_allclose(losses(folder / "ddp"), losses(graph), rtol=5e-3)


SETTING = """
import sys
from types import SimpleNamespace

sys.path.append("{scripts}")
import torch

from t2i import config
from t2i.training.cuda_graph import capture

weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), device=torch.device("cuda"))
trained = SimpleNamespace(parameters=[weight])

def recorded(compute):
    return capture(compute, lambda: (torch.ones(3, device="cuda"),), trained, config.TrainUnetConfig(), accelerator)
"""
REPLAYS = """
def compute(x):
    loss = (weight * x).square().sum()
    loss.backward()
    return loss.detach()

backward = recorded(compute)
assert weight.grad is None
for scale in (2.0, 3.0):
    loss = backward(torch.full((3,), scale, device="cuda"))
    assert (loss.item(), weight.grad.tolist()) == (3 * scale**2, [2 * scale**2] * 3)
    weight.grad = None
with torch.no_grad():
    weight.mul_(2.0)  # in place, as an optimiser does
assert backward(torch.ones(3, device="cuda")).item() == 12.0
"""
WAITS = """
from t2i.errors import UserError

def compute(x):
    if weight.sum().item() > 0:  # waits for the GPU, which a graph cannot
        (weight * x).sum().backward()

try:
    recorded(compute)
except UserError as error:
    assert "cannot be recorded" in str(error) and "give --no-cuda_graphs" in str(error), error
else:
    raise AssertionError("recorded")
"""


@pytest.mark.parametrize("code", [REPLAYS, WAITS], ids=["replays", "waits"])
def test_recording(code, environment):
    """In a process of its own: a recording that fails leaves the GPU's state of its process in pieces."""
    words = [sys.executable, "-c", SETTING.replace("{scripts}", str(SCRIPTS)) + code]
    done = subprocess.run(words, env=environment | {"CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
