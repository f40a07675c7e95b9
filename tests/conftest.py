"""What several test files share: a home without user settings, the commands, and one small finished run."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path

import botocore.loaders
import pytest
from filelock import FileLock
from hypothesis import settings
from streamlit.components.v2 import manifest_scanner

from streamlit_client import free_port
from warm_python import WarmPython, start

# Before torch is imported. Several workers share the cores: threads that wait for each other would only keep them busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("suite", deadline=None)  # A busy machine exceeds any deadline of an example.
settings.load_profile("suite")
ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
LONGEST_S = 900  # Seconds of a command. It ends only what hangs: on a busy machine, a tiny recipe takes minutes.
WARM = "T2I_WARM_PYTHON"  # the folder that all workers share

# small enough that every command takes seconds
TINY = """
data: {resolution: 32}
vae: {vae_channels: [8, 8], vae_layers: 1}
unet:
  text_hidden_size: 32
  text_layers: 1
  text_max_length: 24
  unet_channels: [16, 32]
  unet_layers: 1
  down_block_types: [DownBlock2D, CrossAttnDownBlock2D]
  attention_head_dim: 2
  prediction_type: v_prediction
  rescale_betas_zero_snr: true
train_vae:
  train_batch_size: 4
  max_train_steps: 12
  lr_warmup_steps: 2
  learning_rate: 2.0e-3
  validation_steps: 6
  checkpointing_steps: 6
  checkpoints_total_limit: 2
train_unet:
  train_batch_size: 4
  max_train_steps: 8
  lr_warmup_steps: 2
  validation_steps: 4
  validation_images: 8
  checkpointing_steps: 4
  num_inference_steps: 2
  validation_prompts: [a red flower]
evaluate:
  guidance_scales: [1.0, 3.0]
  num_inference_steps: 2
  sweep_prompts: 4
  report_prompts: 6
  classifier_steps: 4
  classifier_drawings: 64
"""


# Files whose tests take longest, the longest first: with the short ones at the end, no worker waits for the other one for long.
# The second needs no workspace, which the first one's worker makes meanwhile.
LONGEST = (
    "test_commands", "test_zero", "test_rehearsal", "test_resume", "test_caption_to_hub", "test_browser", "test_engines",
    "test_sagemaker", "test_publish", "test_gpu_session", "test_random_inputs", "test_cells", "test_curves_server", "test_portable",
    "test_tracking", "test_playground", "test_load", "test_space", "test_data", "test_hub",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Run the longest files first; the order within a file stays."""
    rank = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True, scope="session")
def _installed_once():
    """Read once what installed packages say: botocore's services, for each client, and components, for each page under test."""
    with pytest.MonkeyPatch.context() as patch:
        services = cache(botocore.loaders.JSONFileLoader().load_file)
        patch.setattr(botocore.loaders.JSONFileLoader, "load_file", staticmethod(services))
        patch.setattr(manifest_scanner, "scan_component_manifests", cache(manifest_scanner.scan_component_manifests))
        yield


@pytest.fixture(autouse=True)
def _own_main():
    """Streamlit's AppTest leaves the dashboard in place of `__main__`, which every process of a pool would then run first."""
    own = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = own


@pytest.fixture(autouse=True)
def _own_tracking_server():
    """Commands that run in the tests' process move a server's user and password into MLflow's variables: undo it."""
    before = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW")}
    yield
    for key in [key for key in os.environ if key.startswith("MLFLOW") and key not in before]:
        del os.environ[key]
    os.environ.update(before)


def plain_environment(home):
    """Environment of a subprocess: an empty home, no network for the Hub, one thread, tracking beside the test's files."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "HF_", "ACCELERATE"))}
    return kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def pytest_configure(config):
    """Give all workers one folder: with the processes that fork commands, and with the names of the scripts that have started."""
    if hasattr(config, "workerinput") or not hasattr(os, "fork"):
        return
    folder = Path(tempfile.mkdtemp(prefix="t2i-", dir="/tmp"))  # an address has 107 characters at most
    (folder / "home").mkdir()
    warm = WarmPython(folder, plain_environment(folder / "home"))
    os.environ[WARM] = str(folder)
    config.add_cleanup(lambda: (warm.close(), shutil.rmtree(folder), os.environ.pop(WARM)))


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """`plain_environment` with a home of this worker."""
    return plain_environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def command(environment):
    """Return a function that runs a script as users type it, and returns the finished process with its output as text.

    A script's runs start Python anew until one has finished. Later runs are forked from a process that has imported the
    libraries, unless `env` has variables that Python reads as it starts. If `env` has variables of the Hub, which libraries
    read at import, that process has imported the others alone.
    Runs with a launcher always start anew. `fork=True` is for a test's own code: its start is nothing to test.
    """

    def run(script, *arguments, cwd, launcher=(), code=0, env=None, fork=False):
        words = [sys.executable, *launcher, str(SCRIPTS / script), *map(str, arguments)]
        variables = environment | (env or {})
        started = (
            Path(os.environ[WARM], f"{script}.started")
            if WARM in os.environ and not Path(script).is_absolute()
            else None
        )
        is_read_at_start = any(key.startswith(("OMP_", "MKL_", "PYTHON", "TRANSFORMERS_")) for key in env or {})
        may_fork = WARM in os.environ and not launcher and not is_read_at_start
        if may_fork and (fork or (started and started.exists())):
            done = warm_start(script, arguments, cwd, variables).wait(LONGEST_S)
        else:
            done = subprocess.run(
                words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=LONGEST_S, check=False
            )
        assert done.returncode == code, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        if code == 0 and started:
            started.touch()
        return done

    return run


def warm_start(script, arguments, cwd, variables):
    """Fork a script with these variables."""
    reads_hub = any(
        key.startswith("HF_") and (key, value) != ("HF_HUB_OFFLINE", "1") for key, value in variables.items()
    )
    return start(Path(os.environ[WARM]), SCRIPTS / script, list(map(str, arguments)), cwd, variables, reads_hub)


@pytest.fixture(scope="session")
def ranks(command, environment):
    """Return a function that trains on two processes as torchrun starts them, but forked. It returns their output."""

    def run(script, *arguments, cwd, env=None):
        port = str(free_port())
        if WARM not in os.environ:
            torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port)
            return command(script, *arguments, cwd=cwd, launcher=torchrun, env=env).stdout
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables = environment | common | (env or {})
        both = [warm_start(script, arguments, cwd, variables | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
        done = [process.wait(LONGEST_S) for process in both]
        assert not any(process.returncode for process in done), "\n".join(process.stderr[-5000:] for process in done)
        return "".join(process.stdout for process in done)

    return run


@pytest.fixture(scope="session")
def launcher():
    """The words before a script's name: the real accelerate launcher with the README's configuration."""
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    return ("-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, command, launcher):
    """A finished run of the tiny recipe by the real commands: dataset/, vae/, unet/ in a folder of its own."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return train_workspace(tmp_path_factory.mktemp("workspace"), command, launcher)
    trained = tmp_path_factory.getbasetemp().parent / "trained"  # once for all workers, which each write into a copy
    with FileLock(f"{trained}.lock"):
        if not trained.is_dir():
            part = trained.with_name("trained.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            train_workspace(part, command, launcher).rename(trained)
    own = Path(shutil.copytree(trained, tmp_path_factory.mktemp("workspace") / "run"))
    with closing(sqlite3.connect(own / "mlflow.db")) as store, store:  # MLflow keeps whole paths
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (f"{trained}.part", str(own)))
    return own


def train_workspace(folder, command, launcher):
    (folder / "tiny.yaml").write_text(TINY)
    command("make_flowers.py", "--output_dir", "dataset", "--count", 40, "--validation_count", 12, "--test_count", 12,
            "--size", 32, "--workers", 1, cwd=folder)  # fmt: skip
    common = ("--config", "tiny.yaml", "--dataset", "dataset")
    # Plain python starts quicker; test_a_whole_recipe_and_its_second_run trains a VAE by the launcher.
    folder.joinpath("vae.log").write_text(command("train_vae.py", *common, "--output_dir", "vae", cwd=folder).stdout)
    folder.joinpath("unet.log").write_text(
        command("train_unet.py", *common, "--vae", "vae", "--output_dir", "unet", cwd=folder, launcher=launcher).stdout
    )
    return folder


def photos() -> Path:
    """The real photos beside the repository, where there are some; a test that needs them is skipped otherwise."""
    folder = ROOT.parent / "shared" / "data" / "oxford-flowers-12"
    if not folder.is_dir():
        pytest.skip("needs the photos in ../shared/data/oxford-flowers-12, which are not part of the project")
    return folder
