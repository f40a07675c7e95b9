"""Compare pictures by the suite's presets with the stock pipeline on a CPU, at the model card's sizes.

python benchmarks/generate.py [rounds] [run folder of make demo]

The stock pipeline is diffusers' StableDiffusionPipeline: eager, fp32, DDIM, 30 steps, with guidance, decoded. Preset
turbo draws in 4, 2 or 1 steps with a student of the same sizes, whose decoder is tiny. The models have random weights,
which compute as long as trained weights. The presets and the stock pipeline alternate within one run, at batch 1 and 8,
and the figures are medians. The trained demo shows what the presets cost in quality: PSNR to the stock picture of the same
seed over 16 prompts, and prompt following over 256 prompts.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from card_model import save_card_model, save_card_student
from common import ROOT, keep

WORK = ROOT / ".cache" / "benchmark_generate"
PROMPT = "a photo of a red flower with a golden center"
GUIDANCE, DEMO_GUIDANCE = 7.5, 3.0
TURBO = {"turbo_4": 4, "turbo_2": 2, "turbo_1": 1}
ARMS = ("stock", "exact", "fast", "draft", *TURBO)
GOALS = {"exact": 3.7, "fast": 10.0, "draft": 20.0, "turbo_4": 50.0, "turbo_2": 90.0, "turbo_1": 90.0}
GOALS_OF_EIGHT = {"turbo_4": 40.0}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    demo = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "outputs" / "demo" / "unet")
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    from t2i.pictures import engines, quantization, sampling

    model = save_card_model(WORK / "model")
    if not engines.is_exported(model):
        quantization.export(sampling.load_pipeline(model), model, GUIDANCE)
    student = save_card_student(WORK / "student", model)
    if not engines.is_exported(student):
        quantization.export(sampling.load_pipeline(student), student, 1.0)
    if (demo / "evaluation").is_dir() and not engines.is_exported(demo / "pipeline"):
        quantization.export(sampling.load_pipeline(demo), demo / "pipeline", DEMO_GUIDANCE)
    compiled = sampling.load_pipeline(model, engine="openvino")
    pipelines = dict.fromkeys(ARMS, compiled)
    pipelines |= dict.fromkeys(TURBO, sampling.load_pipeline(student, engine="openvino"))
    pipelines["stock"] = sampling.load_pipeline(model)
    seconds: dict[tuple[str, int], list[float]] = {}
    pictures = {}
    for number in range(rounds + 1):
        for batch in (1, 8) if number == rounds else (1,):
            for arm in ARMS if number % 2 else ARMS[::-1]:
                if arm != "stock":
                    forget(pipelines[arm])
                start = time.perf_counter()
                drawn = draw(arm, pipelines[arm], [PROMPT] * batch, GUIDANCE)
                if number:  # the first warms up
                    seconds.setdefault((arm, batch), []).append((time.perf_counter() - start) / batch)
                pictures[arm] = drawn[:1]
                print(f"{arm}, batch {batch}: {time.perf_counter() - start:.2f} s", flush=True)
    medians = {f"{arm}_batch_{batch}": statistics.median(values) for (arm, batch), values in seconds.items()}
    ratios = {arm: round(medians["stock_batch_1"] / medians[f"{arm}_batch_1"], 2) for arm in GOALS}
    eights = {arm: round(medians["stock_batch_8"] / medians[f"{arm}_batch_8"], 2) for arm in GOALS}
    keep(
        "generate",
        {
            "ratio": ratios["exact"], "goal": GOALS["exact"], "ratios": ratios, "goals": GOALS, "ratios_batch_8": eights,
            "goals_batch_8": GOALS_OF_EIGHT,
            "seconds_per_picture": {name: round(value, 3) for name, value in medians.items()},
            "psnr_exact_random_weights_db": round(float(psnr(pictures["stock"], pictures["exact"])[0]), 1),
            "rounds": rounds, "demo": quality(demo) if (demo / "evaluation").is_dir() else None,
        },
    )  # fmt: skip


def draw(arm: str, pipeline: Any, prompts: list[str], scale: float, **options: Any) -> np.ndarray:
    """Draw an arm's pictures with seeds 0, 1, …. The stock pipeline draws as preset `exact` does. A student has no guidance."""
    from t2i.pictures import sampling
    from t2i.pictures.png import STUDENT, choose_preset

    config = pipeline.scheduler.config | ({STUDENT: TURBO[arm]} if arm in TURBO else {})
    name = {"stock": "exact"}.get(arm, arm.partition("_")[0])
    scheduler, steps, end = choose_preset(name, config)
    saved, pipeline.scheduler = pipeline.scheduler, sampling.make_scheduler(scheduler, config)
    made = sampling.generate(
        pipeline,
        prompts,
        range(len(prompts)),
        guidance_scale=1.0 if arm in TURBO else scale,
        num_inference_steps=steps,
        guidance_end=end,
        progress=False,
        **options,
    )
    pipeline.scheduler = saved
    return made


def forget(compiled: Any) -> None:
    """Drop the compiled text encoder's cached prompts, except the empty one, which every picture needs."""
    ids = compiled.tokenizer("", padding="max_length", return_tensors="np").input_ids.astype(np.int64)
    known = compiled.text_encoder.known
    compiled.text_encoder.known = {key: hidden for key, hidden in known.items() if key == ids.tobytes()}


def psnr(wanted: np.ndarray, found: np.ndarray) -> Any:
    """Return the PSNR in dB, [N], of pictures uint8 [N, R, R, 3]."""
    from t2i.data import caches
    from t2i.evaluation import metrics

    return metrics.psnr(caches.to_pixels(wanted), caches.to_pixels(found))


def quality(run: Path) -> dict[str, Any]:
    """Compare the presets' pictures with the stock pipeline's, with the demo's model."""
    from t2i.data import flowers
    from t2i.evaluation import attributes
    from t2i.pictures import cells, sampling
    from t2i.pictures.png import student_steps
    from t2i.runs import find_student

    pipelines = dict.fromkeys(ARMS, sampling.load_pipeline(run, engine="openvino"))
    pipelines["stock"], arms = sampling.load_pipeline(run), [arm for arm in ARMS if arm not in TURBO]
    if student := find_student(run):
        arm = f"turbo_{student_steps(cells.schedule_of(student))}"
        pipelines[arm] = sampling.load_pipeline(student, engine="openvino")
        arms.append(arm)
    classifier = attributes.Classifier.load(run / "evaluation" / "classifier")
    known = [(text, wanted) for held in (False, True) for wanted, text in flowers.prompts(128, 1001, held)]
    texts, wanted = [text for text, _ in known], [attributes for _, attributes in known]
    drawn = {arm: draw(arm, pipelines[arm], texts, DEMO_GUIDANCE, batch_size=32) for arm in arms}
    nearness = {arm: psnr(drawn["stock"][::16], drawn[arm][::16]) for arm in arms if arm != "stock"}
    following = {arm: attributes.prompt_following(classifier, pictures, wanted) for arm, pictures in drawn.items()}
    return {
        "guidance_scale": DEMO_GUIDANCE, "prompts": len(texts),
        "psnr_to_stock_worst_of_16_db": {arm: round(float(values.min()), 1) for arm, values in nearness.items()},
        "prompt_following": {
            arm: {name: round(share, 3) for name, share in shares.items()} for arm, shares in following.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
