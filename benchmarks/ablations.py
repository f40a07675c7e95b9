"""Compare changes of the recipe at equal time: the demo's denoiser, three seeds, validation loss and prompt following.

python benchmarks/ablations.py [steps] [seeds] [arm ...]

The comparison needs a finished `make demo` in outputs/demo for data, VAE, text encoder and classifier. Each arm is
`train_unet.py` with the recipe `demo` and the changes that `ARMS` lists. Each arm runs on one thread, two arms at once.
This script patches in changes that the suite does not offer. A measurement at the start gives slower arms fewer steps,
and faster arms more. Each trained arm draws PROMPTS pictures, half of them of held-out combinations of attributes, and
the demo's classifier reads them. The baseline is the demo's former denoiser (`FORMER`), and its 200 steps take a quarter
of the demo's former time. Finished arms of an earlier run are reused.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import ROOT, keep

WORK = ROOT / ".cache" / "ablations"
DEMO = ROOT / "outputs" / "demo"
PROMPTS, SCALE, PROMPT_SEED = 192, 2.0, 77
PROBE = (4, 16)  # steps that a cost is measured between

# Options of train_unet.py that make the recipe `demo` what it was when the kept results were measured.
FORMER = [
    "--unet_channels", "48", "96", "144", "--addition_embed_type", "None", "--resnet_time_scale_shift", "default",
    "--optimizer", "adamw", "--learning_rate", "1e-3", "--train_batch_size", "32",
]  # fmt: skip

# arm: options of train_unet.py, and the names of functions below that change it
ARMS: dict[str, tuple[list[str], list[str]]] = {
    "baseline": ([], []),
    "zero_init": ([], ["zero_init"]),
    "min_snr_5": (["--snr_gamma", "5"], []),
    "epsilon": (["--prediction_type", "epsilon", "--no-rescale_betas_zero_snr"], []),
    "logit_normal": ([], ["logit_normal"]),
    "no_flip": (["--no-random_flip"], []),
    "no_ema": (["--no-use_ema"], []),
    "short_ema": (["--ema_decay", "0.9"], []),
    "lr_half": (["--learning_rate", "5e-4"], []),
    "lr_double": (["--learning_rate", "2e-3"], []),
    "batch_16": (["--train_batch_size", "16"], []),
    "batch_64": (["--train_batch_size", "64"], []),
    "muon": (["--optimizer", "muon"], []),
    "batch_8": (["--train_batch_size", "8"], []),
    "batch_16_logit_normal": (["--train_batch_size", "16"], ["logit_normal"]),
}
# a step of these does not cost what the baseline's does
COSTLY = ("batch_16", "batch_64", "muon", "batch_8", "batch_16_logit_normal")


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seeds = range(int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    names = ["baseline", *(name for name in sys.argv[3:] or ARMS if name != "baseline")]
    if not (DEMO / "unet" / "evaluation" / "classifier").is_dir():
        sys.exit("outputs/demo holds no finished evaluation; run make demo first")
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / f"results-{steps}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}

    cost = dict.fromkeys(ARMS, 1.0)
    costly = [name for name in COSTLY if name in names]
    if any((name, seed) not in done for name in costly for seed in seeds):
        seconds = {
            name: [launch(name, 0, PROBE[1], "probe")["step_seconds"] for _ in range(2)]
            for name in ["baseline", *costly]
        }
        cost |= {name: min(seconds[name]) / min(seconds["baseline"]) for name in costly}
        print("cost of a step:", {name: round(cost[name], 3) for name in costly}, flush=True)
    todo = [(name, seed) for seed in seeds for name in names if (name, seed) not in done]

    def work(job: tuple[str, int]) -> None:
        name, seed = job
        row = launch(name, seed, round(steps / cost[name]), "measure")
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(json.dumps(row), flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, todo))
    keep(f"ablations_{steps}", {"steps": steps, "prompts": PROMPTS, "arms": summary(rows)})


def launch(name: str, seed: int, steps: int, what: str) -> dict[str, Any]:
    """Run a training in a process with one thread. Return the training's last line, the result."""
    words = [sys.executable, __file__, "--one", name, str(seed), str(steps), what]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    done = subprocess.run(words, env=environment, cwd=WORK, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stdout[-1000:]} {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str, seed: int, steps: int, measured: bool) -> None:
    """Train an arm, draw, measure, and print one line of JSON."""
    import torch

    import train_unet
    from t2i.data import flowers
    from t2i.evaluation import attributes
    from t2i.pictures import sampling
    from t2i.training import loop

    torch.set_num_threads(1)
    options, changes = ARMS[name]
    for change in changes:
        CHANGES[change]()
    times = []
    record = loop.record

    def timed(row: Any, step: int, *rest: Any) -> None:
        times.append((step, time.perf_counter()))
        record(row, step, *rest)

    loop.record = timed
    loop.resume = lambda *_: ({"step": 0}, None)  # neither resumed nor saved: these runs are not kept
    loop.save = lambda *_: None
    folder = WORK / f"{name}-{seed}-{steps}{'' if measured else '-probe'}"
    shutil.rmtree(folder, ignore_errors=True)
    sys.argv = [
        "train_unet.py", "--config", "demo", "--dataset", str(DEMO / "dataset"), "--vae", str(DEMO / "vae"),
        "--cache_dir", str(WORK / "cache"), "--output_dir", str(folder), "--seed", str(seed), "--report_to", "none",
        "--max_train_steps", str(steps), "--lr_warmup_steps", str(round(steps * 0.06)), "--validation_steps", str(steps),
        "--checkpointing_steps", str(steps), "--validation_images", "64" if measured else "1", "--validation_prompts",
        "--logging_steps", "4", *FORMER, *options,
    ]  # fmt: skip
    train_unet.main()
    state = json.loads((folder / "run.json").read_text())
    known = [(step, at) for step, at in times if step in PROBE]
    row = {"arm": name, "seed": seed, "steps": steps, "val_loss": state["val_loss"]}
    row["bands"] = {key: value for key, value in state.items() if key.startswith("val_loss_")}
    if not measured:
        row["step_seconds"] = (known[1][1] - known[0][1]) / (PROBE[1] - PROBE[0])
    else:
        prompts = flowers.prompts(PROMPTS // 2, PROMPT_SEED, False) + flowers.prompts(PROMPTS // 2, PROMPT_SEED, True)
        pipeline = sampling.load_pipeline(folder / "pipeline", scheduler="unipc")
        pictures = sampling.generate(
            pipeline, [text for _, text in prompts], range(PROMPTS), guidance_scale=SCALE, num_inference_steps=10,
            batch_size=32, progress=False,
        )  # fmt: skip
        classifier = attributes.Classifier.load(DEMO / "unet" / "evaluation" / "classifier")
        row["following"] = attributes.prompt_following(classifier, pictures, [wanted for wanted, _ in prompts])
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(row))


def zero_init() -> None:
    """Set the last layer of the UNet and of each residual and attention block to zero (Ho et al., arXiv:2006.11239, code)."""
    from t2i import models

    build = models.build_unet

    def built(*arguments: Any) -> Any:
        import torch

        unet = build(*arguments)
        ends = [unet.conv_out]
        for module in unet.modules():
            ends += [module.conv2] if hasattr(module, "conv2") else []
            ends += [module.proj_out] if hasattr(module, "proj_out") else []
        for end in ends:
            torch.nn.init.zeros_(end.weight)
            torch.nn.init.zeros_(end.bias)
        return unet

    models.build_unet = built


def logit_normal() -> None:
    """Draw timesteps from a logit-normal distribution (Esser et al., arXiv:2403.03206, section 3.1), by the random
    numbers of the original draw.
    """
    import torch

    from t2i import diffusion

    draw = diffusion.draw

    def drawn(seed: int, step: int, samples: list[int], shape: Any, levels: int) -> Any:
        draws = draw(seed, step, samples, shape, levels)
        normal = torch.special.ndtri((draws.timesteps.double() + 0.5) / levels)
        draws.timesteps = (torch.sigmoid(normal) * levels).long().clamp(0, levels - 1)
        return draws

    diffusion.draw = drawn


CHANGES = {"zero_init": zero_init, "logit_normal": logit_normal}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each seed's figures, their means, and the mean ratio to the baseline of the same seed."""
    base = {row["seed"]: row for row in rows if row["arm"] == "baseline"}
    found = {}
    for name in ARMS:
        mine = [row for row in rows if row["arm"] == name]
        if not mine:
            continue
        found[name] = {
            "steps": mine[0]["steps"],
            "val_loss": [round(row["val_loss"], 5) for row in mine],
            "val_loss_mean": round(statistics.mean(row["val_loss"] for row in mine), 5),
            "val_loss_ratio": round(statistics.mean(row["val_loss"] / base[row["seed"]]["val_loss"] for row in mine), 4),
            "following": {
                key: round(100 * statistics.mean(row["following"][key] for row in mine), 1) for key in mine[0]["following"]
            },
            "following_all": [round(100 * row["following"]["all"], 1) for row in mine],
        }  # fmt: skip
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:  # the same file is the process that trains one arm
        one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "measure")
    else:
        main()
