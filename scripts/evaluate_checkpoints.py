"""Evaluate checkpoints over guidance scales: distance to real images, prompt following, copies of training images.

python scripts/evaluate_checkpoints.py --model outputs/demo/unet

Each checkpoint draws pictures for the same few prompts at each guidance scale. The best pair of checkpoint and guidance
scale is chosen on a few prompts, and reported on other prompts. The script writes evaluation/ into the run folder, and
the model card into the run's pipeline/.

With --report, the script also writes evaluation/report.html, one file that can be mailed. For a finished evaluation, the
script then only writes this file.
"""

import dataclasses
import itertools
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.config import (
    PACKAGED_NETWORKS,
    DataConfig,
    EvaluateConfig,
    Recipe,
    TrainUnetConfig,
    load_recipe,
    parse,
    with_settings_of_model,
)
from t2i.errors import UserError, run_main
from t2i.evaluation.figures import attribute_names, chance_closer, other_prompts, percent
from t2i.evaluation.verdict import choose, make_verdict, verdict_of
from t2i.files import hash_files, read_object, read_optional, write_json
from t2i.pictures.png import SCHEDULERS, Preset, choose_preset, scheduler_problem, student_steps
from t2i.run_lock import lock_run
from t2i.runs import (
    RunFolder,
    checkpoint_copies,
    checkpoint_folders,
    checkpoint_step,
    guide_folder,
    guide_problem,
    own_checkpoint,
)
from t2i.tracking.addresses import resolve_uri

if TYPE_CHECKING:
    import numpy as np

CONTROLS = 256  # Training images whose reconstructions must count as copies.
REFERENCE_DRAWINGS = 512  # New drawings that pictures of drawn flowers are compared with.
NEAR_COPY = 0.1  # An image with a smaller relative distance to a training image is the same photo.
CAPTIONS_SEED = 0  # Seed of the order in which captions become prompts. Sweep and report take theirs from one order.
RANDOM_CAPTIONS = "random captions"  # Earlier versions took the first captions of a split, and before that labels.
REPORT_SEED = 1_000_000  # This is added to the seeds of the reported pictures, so that they differ from the sweep's.


@dataclass
class Prompts:
    """Prompts to draw, and the attributes that their pictures should show."""

    texts: list[str]
    # Wanted value of each attribute, per prompt. Without labels in the data set, the list of wanted values is empty.
    wanted: list[dict[str, Any]]
    held_out: list[bool]  # For each prompt, whether its combination of attributes never occurred in training.


@dataclass
class Study:
    """The models, images and settings that all drawings and measurements of an evaluation share."""

    run: Path
    kind: str  # Kind of the data set, from `kind_of`.
    splits: Any
    unseen: Any  # Images that training never saw, uint8 [N, R, R, 3].
    unseen_labels: Any  # Label of each unseen image, object [N]. Images without a label have None.
    unseen_features: Any  # The judge's features of the unseen images. With None, there is no judge.
    recipe: Recipe
    preset: Preset
    classifier: Any  # The classifier that reads the attributes of drawn flowers. Other data sets have None.
    judge: Any  # An `evaluation.judge.Judge`. With None, pictures are not compared with real images.
    memory: Any  # An `evaluation.memorisation.Memory`. With None, there are too few images to look for copies.


def main() -> None:
    recipe = parse(("data", "evaluate"), __doc__ or "", with_settings_of_model(sys.argv[1:]))
    config = recipe.evaluate
    if not config.model:
        raise UserError("no model: give --model with the run folder of train_unet.py")
    run = Path(config.model)
    if config.redraw:
        draw_missing(run, config)
        return
    training = read_object(run / "run.json")
    recipe_of_run = load_recipe(str(run / "config.yaml"))
    trained = recipe_of_run.train_unet
    if not recipe.data.dataset:
        raise UserError("no data set: give --dataset with the one that the model was trained on")
    check_data(recipe.data, recipe_of_run.data)
    if trained.report_to != "none":
        resolve_uri(None)  # A wrong MLFLOW_TRACKING_URI is refused now, not after the evaluation.
    checkpoints = choose_checkpoints(run, config)
    check_judge(run, config)

    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    from t2i.hub import model_card

    if config.engine == "openvino":
        from t2i.pictures import engines

        engines.import_openvino()  # refused now, not after the classifier
    preset = sampler(run, config)
    splits = load_data(recipe, recipe_of_run, training)
    folder, kind = run / "evaluation", kind_of(splits)
    inputs = {"checkpoints": checkpoints, **input_hashes(run, training, splits, kind)}
    say_other_prompts(folder, inputs)
    state = RunFolder(folder, {**evaluation_settings(config, preset), **inputs}, replace=True)
    if state.finished:
        print(f"reusing the finished evaluation in {folder}")
        print_sweep(state.state["cells"])
        print_verdict(verdict_of(state.state))
        if config.report:
            save_report(run, state.state, splits.train, trained)
        return
    held = ExitStack()  # It holds the lock until the evaluation ends.
    held.enter_context(lock_run(folder, 0, lambda: None, "--model"))
    (folder / "report.html").unlink(missing_ok=True)  # of the evaluation that this one replaces

    study, accuracy, left_out = prepare_study(kind, recipe, splits, preset, state)

    # sweep
    with state.timed("sweep"):
        sweep, sweep_results, single = draw_sweep(study, checkpoints, folder)
    best = choose(sweep_results, trained.guidance_scale).best

    # report
    with state.timed("report"):
        prompts, pictures, figures, reported = draw_report(study, best)
    save_grid(pictures[:: max(1, len(pictures) // 64)], folder / "report.png", 64)  # from first to last prompt
    report = {
        "guidance_scale": best["guidance_scale"],
        "checkpoint": best["checkpoint"],
        "prompts": len(prompts.texts),
        **preset._asdict(),
        "guidance_rescale": config.guidance_rescale,
        "probe_accuracy": accuracy,
        "unseen_images": len(study.unseen),
        "near_copies_left_out": left_out,
        **figures,
        "prompt_following_held_out": following_of(pictures, prompts, study.classifier, True),
        "prompt_following_seen": following_of(pictures, prompts, study.classifier, False),
        **time_one_picture(run / best["checkpoint"], prompts.texts[0], preset, best["guidance_scale"]),
    }
    results: dict[str, Any] = {"report": report, "cells": sweep_results, "sweep": sweep}
    results |= {key: reported[key] for key in ("prompts", "seeds", "readings")} | {"verdict": make_verdict(results)}
    write_json(folder / "pictures.json", [*single, reported])
    write_json(folder / "evaluation.json", results)
    model_card.write_model_card(run, results)
    state.finish(**results)
    if trained.report_to != "none":
        track(run, results, trained.experiment)
    print_sweep(sweep_results)
    print_report(results, folder)
    print_verdict(results["verdict"])
    if config.report:
        save_report(run, results, splits.train, trained)


def load_data(recipe: Recipe, recipe_of_run: Recipe, training: dict[str, Any]) -> Any:
    """Return the prepared splits. Warn if the model was trained on another data set, or with other images left out.

    Args:
        recipe_of_run: settings of the training.
        training: content of the training's run.json.
    """
    from t2i.data import preparing
    from t2i.data.repairs import LEFT_OUT

    recipe.data.random_crops = recipe_of_run.data.random_crops  # So the images that the training prepared are found.
    splits, identity = preparing.load_splits(recipe.data), training.get("identity", {})
    if splits.fingerprint != identity.get("dataset_hash"):
        print(
            f"WARNING: {recipe.data.dataset} is not the data set that the model was trained on, or its captions have changed. "
            "Images that count as unseen may be training images.",
            file=sys.stderr,
        )
    left_out = splits.repair_hashes().get("left_out_hash")
    if left_out and left_out != identity.get("left_out_hash"):
        print(
            f"WARNING: {LEFT_OUT} of {recipe.data.dataset} has changed since the training. If it leaves out images that the "
            "model was trained on, copies of them are not found; train again to be sure.",
            file=sys.stderr,
        )
    return splits


def input_hashes(run: Path, training: dict[str, Any], splits: Any, kind: str) -> dict[str, Any]:
    """Return what stands for the inputs of an evaluation, beside its settings and checkpoints."""
    guide = guide_folder(run / "pipeline")
    hashes = {
        "dataset_hash": splits.fingerprint,
        "unet_hash": training.get("output_unet_hash"),
        **splits.repair_hashes(),
    }
    if guide:
        hashes["guide"] = hash_files(guide)
    if kind == "captioned":
        hashes["prompts"] = RANDOM_CAPTIONS
    return hashes


def say_other_prompts(folder: Path, inputs: dict[str, Any]) -> None:
    """Say so if an earlier version made the evaluation in `folder`, on other prompts.

    Args:
        inputs: what stands for the inputs of the new evaluation.
    """
    before = read_optional(folder / "run.json").get("identity") or {}
    if before and "prompts" in inputs and before.get("prompts") != inputs["prompts"]:
        print(
            f"NOTE: an earlier version made the evaluation in {folder} on other prompts; it is made again on random captions "
            "of unseen images"
        )


def prepare_study(
    kind: str, recipe: Recipe, splits: Any, preset: Preset, state: RunFolder
) -> tuple[Study, dict[str, float], int]:
    """Choose the unseen images, and learn the classifier and the judge of an evaluation.

    Args:
        kind: kind of the data set, from `kind_of`.
        state: the folder of the evaluation, which keeps the classifier and how long each phase takes.

    Returns:
        The study, the accuracy of the classifier or of the judge's probe by attribute, and the number of held-out images
            that were left out because they nearly equal a training image.
    """
    from t2i.evaluation.judge import MAX_UNSEEN, spread
    from t2i.evaluation.memorisation import Memory, pixel_embedding

    held_out: Any = splits.test or splits.validation
    thumbnails = pixel_embedding(splits.train.pixels)
    fresh = unseen_rows(held_out.pixels, thumbnails)
    left_out = len(held_out) - len(fresh)
    fresh = spread(fresh, MAX_UNSEEN)
    unseen, labels = held_out.pixels[fresh], labels_of(held_out, fresh)
    with state.timed("classifier"):
        classifier, accuracy = prepare_classifier(kind, splits, recipe.evaluate, state.folder)
    with state.timed("judge"):
        judge, features = prepare_judge(kind, splits, fresh, recipe)
    if judge and judge.probe:
        accuracy = {"label": judge.probe.accuracy(features, labels)}
    memory = Memory(thumbnails, unseen) if len(splits.train) > 1 and len(unseen) > 1 else None
    run = Path(recipe.evaluate.model or "")
    study = Study(run, kind, splits, unseen, labels, features, recipe, preset, classifier, judge, memory)
    return study, accuracy, left_out


def check_data(asked: DataConfig, trained: DataConfig) -> None:
    """Refuse other settings than those that decided which images the model was trained on, and how large they were."""
    for key in ("resolution", "validation_fraction", "split_seed", "max_train_samples"):
        if getattr(asked, key) != getattr(trained, key):
            raise UserError(
                f"{key} {getattr(asked, key)}: the model was trained with {getattr(trained, key)}, so other images would count "
                f"as unseen; give --{key} {getattr(trained, key)}"
            )


def check_judge(run: Path, config: EvaluateConfig) -> None:
    """Refuse a judge that the run or its autoencoder was trained on."""
    recipe = load_recipe(str(run / "config.yaml"))
    if recipe.train_unet.alignment_weight and recipe.train_unet.alignment_network == config.judge_network:
        raise UserError(
            f"judge_network {config.judge_network}: the denoiser was aligned with this network; take another judge"
        )
    vae = recipe.vae.vae
    if vae is None or not (Path(vae) / "config.yaml").is_file():
        return  # It is no run folder here, so nothing tells what its training used.
    training = load_recipe(str(Path(vae) / "config.yaml")).train_vae
    if training.perceptual_weight and training.perceptual_network == config.judge_network:
        raise UserError(
            f"judge_network {config.judge_network}: the autoencoder was trained on this network; take another judge"
        )


def evaluation_settings(config: EvaluateConfig, preset: Preset) -> dict[str, Any]:
    """Return the settings that decide the result of an evaluation.

    A finished evaluation is reused only if its settings have not changed since.
    """
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in ("model", "preset", "report", "redraw")
    }
    if config.engine != "openvino":
        del settings["engine"]  # The other engines draw the same pictures.
    if config.judge_network and config.judge_network not in PACKAGED_NETWORKS:
        settings["pooler"] = "learnt"  # In earlier versions that of a classifier was random.
    if not config.guidance_rescale:
        del settings["guidance_rescale"]  # Evaluations from before this setting existed had none.
    return settings | preset._asdict() if config.preset else settings


def draw_sweep(
    study: Study, checkpoints: list[str], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw and measure each checkpoint at each guidance scale.

    Return what was drawn, and for each pair of checkpoint and guidance scale a result and the figures of single pictures.
    """
    config = study.recipe.evaluate
    prompts = make_prompts(study.kind, study.splits, study.recipe, config.sweep_prompts, config.eval_seed, 0)
    sweep = {
        "checkpoints": checkpoints,
        "guidance_scales": config.guidance_scales,
        **study.preset._asdict(),
        "guidance_rescale": config.guidance_rescale,
        "prompts": prompts.texts,
        "seeds": [config.eval_seed + number for number in range(len(prompts.texts))],
    }
    results: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    for checkpoint, scale in itertools.product(checkpoints, config.guidance_scales):
        pictures = draw(study.run / checkpoint, prompts, scale, study.preset, config, config.eval_seed)
        drawn = sweep | {"guidance_scale": scale}
        keep(study.run, checkpoint, pictures, drawn)
        features = judged_features(study, pictures)
        figures = measure(study, pictures, features, prompts)
        readings = read_pictures(study, pictures, features, prompts)
        single.append(figures_of_pictures(study.run, checkpoint, drawn, readings, figures.pop("distances")))
        grid = f"grid-{checkpoint}-{scale:g}.png"
        save_grid(pictures, folder / grid)
        val_loss = logged_loss(study.run, checkpoint)
        results.append(
            {"checkpoint": checkpoint, "guidance_scale": scale, "val_loss": val_loss, "grid": grid, **figures}
        )
    return sweep, results, single


def report_seeds(config: EvaluateConfig, count: int) -> list[int]:
    """Return the seeds of the reported pictures, which the sweep does not use."""
    return [config.eval_seed + REPORT_SEED + number for number in range(count)]


def draw_report(study: Study, best: dict[str, Any]) -> "tuple[Prompts, np.ndarray, dict[str, Any], dict[str, Any]]":
    """Draw and measure the best pair of checkpoint and guidance scale, on prompts and seeds that the sweep did not use.

    The pictures are kept for the dashboard. Return the prompts, the pictures, their figures, and those of single pictures.
    """
    config = study.recipe.evaluate
    count, seed = config.report_prompts, config.eval_seed + 1
    prompts = make_prompts(study.kind, study.splits, study.recipe, count, seed, config.sweep_prompts)
    checkpoint, scale = study.run / best["checkpoint"], best["guidance_scale"]
    seeds = report_seeds(config, len(prompts.texts))
    pictures = draw(checkpoint, prompts, scale, study.preset, config, seeds[0])
    settings = study.preset._asdict() | {"guidance_scale": scale, "guidance_rescale": config.guidance_rescale}
    drawn = {**settings, "prompts": prompts.texts, "seeds": seeds}
    keep(study.run, best["checkpoint"], pictures, drawn)
    features = judged_features(study, pictures)
    figures = measure(study, pictures, features, prompts)
    if features is not None:
        figures["judge"] = compare(study, pictures, features, prompts, figures)
    readings = read_pictures(study, pictures, features, prompts)
    single = figures_of_pictures(study.run, best["checkpoint"], drawn, readings, figures.pop("distances"))
    return prompts, pictures, figures, single


def figures_of_pictures(
    run: Path, checkpoint: str, drawn: dict[str, Any], readings: list[dict[str, Any]], distances: list[float]
) -> dict[str, Any]:
    """Return an entry of pictures.json: what was drawn, with the `read_pictures` and the distance of each picture."""
    from t2i.pictures import cells

    what = {key: drawn[key] for key in ("guidance_scale", "prompts", "seeds")}
    return {
        "model_hash": cells.weights_hash(run / checkpoint),
        **what,
        "readings": readings,
        "distances": distances,
    }


def choose_checkpoints(run: Path, config: EvaluateConfig) -> list[str]:
    """Return the named checkpoints of the run, or all its checkpoints, oldest first."""
    known = [path.name for path in checkpoint_folders(run)]
    copies = checkpoint_copies(run)
    if not known and copies:
        raise UserError(
            f"{run} holds no checkpoint of its own, only copies ({', '.join(copies)}); give one copy its old name back"
        )
    if not known and read_object(run / "run.json").get("status") == "finished":
        raise UserError(
            f"the checkpoints of the finished run in {run} were removed; restore one from a copy, or train in another folder"
        )
    if not known:
        raise UserError(f"{run} holds no checkpoint; train with scripts/train_unet.py --output_dir {run}")
    wanted = [name if name in copies else own_checkpoint(run, name).name for name in config.checkpoints]
    for name in wanted:
        if name in copies:
            raise UserError(
                f"checkpoint {name} is a copy, and copies are not evaluated; name one of {', '.join(known)}, "
                "or give the copy its old name back"
            )
        if name not in known:
            raise UserError(f"checkpoint {name} is not in {run}; its checkpoints are: {', '.join(known)}")
    return wanted or known


def kind_of(splits: Any) -> str:
    """Return the kind of a data set: `drawn`, `labelled` or `captioned`.

    Drawn flowers have attributes. The captions of a `labelled` set say nothing but labels, so that images share them. All
    other sets are `captioned`, also if they have labels.
    """
    from t2i.data import flowers

    columns = splits.train.rows.column_names
    if set(flowers.ATTRIBUTES) <= set(columns):
        return "drawn"
    kinds = len(known_labels(splits.train)) if "label" in columns else 0
    if kinds < 2:
        return "captioned"
    labels, captions = splits.train.rows["label"], splits.train.rows["caption"]
    pairs = [pair for pair in zip(labels, captions, strict=True) if pair[0] is not None]
    # A label may have further captions, if a person edited some.
    return "labelled" if 2 * (len(set(pairs)) - kinds) <= len(pairs) - kinds else "captioned"


def known_labels(split: Any) -> list[str]:
    """Return the different labels of a split, in sorted order. Images without a label are skipped."""
    return sorted({label for label in split.rows["label"] if label is not None})


def prepare_classifier(kind: str, splits: Any, config: EvaluateConfig, folder: Path) -> tuple[Any, dict[str, float]]:
    """Train the classifier that reads the attributes of drawn flowers, on new drawings.

    Return the classifier of flowers, with its accuracy on the data set's held-out combinations. There is no classifier
    for data sets other than drawn flowers.
    """
    from t2i.data import flowers
    from t2i.evaluation.attributes import accuracy, train_classifier

    if kind != "drawn" or not config.classifier_steps:
        return None, {}
    unseen = splits.test or splits.validation
    heads = {name: list(values) for name, values in flowers.ATTRIBUTES.items()}
    pixels, attributes = draw_flowers(config.eval_seed, config.classifier_drawings, splits.train.pixels.shape[1])
    classifier = train_classifier(
        pixels, encode(heads, attributes), heads, steps=config.classifier_steps, batch_size=32, seed=config.eval_seed
    )
    classifier.save(folder / "classifier")
    truth = [
        dict(zip(heads, values, strict=True)) for values in zip(*(unseen.rows[name] for name in heads), strict=True)
    ]
    return classifier, accuracy(classifier, unseen.pixels, encode(heads, truth))


def draw_flowers(seed: int, count: int, size: int) -> "tuple[np.ndarray, list[dict[str, Any]]]":
    """Draw new flowers. Half of them have combinations of attributes that the training split never has.

    Returns:
        Drawings, uint8 [count, size, size, 3], and the attributes of each.
    """
    import numpy as np

    from t2i.data import flowers

    pixels = np.empty((count, size, size, 3), np.uint8)
    attributes = []
    for held_out, start, end in ((False, 0, count // 2), (True, count // 2, count)):
        drawn = flowers.draw_many(seed, start, end - start, size, held_out, workers=2)
        for number, (known, image, _) in enumerate(drawn, start):
            pixels[number] = image
            attributes.append(known)
    return pixels, attributes


def prepare_judge(kind: str, splits: Any, fresh: "np.ndarray", recipe: Recipe) -> tuple[Any, Any]:
    """Load the judge's network and compute its features of the real images.

    Return the judge and the features of the unseen images.

    Distances are measured to the training images, and for drawn flowers to new drawings. The probe
    learns the labels of the training images. Both are None without a network, or with too few images.

    Args:
        fresh: `unseen_rows` of the data set.
    """
    import numpy as np

    from t2i.data import flowers
    from t2i.data.caches import cache_features
    from t2i.evaluation import judge
    from t2i.evaluation.networks import FeatureNetwork

    train, held_out, config = splits.train, splits.test or splits.validation, recipe.data
    if not recipe.evaluate.judge_network or min(len(train), len(fresh)) < 3:
        return None, None
    network = FeatureNetwork(recipe.evaluate.judge_network)
    unseen = cache_features(held_out.pixels, fresh, held_out.fingerprint, network, config.cache_dir)
    if kind == "drawn":
        seed, size = recipe.evaluate.eval_seed + 1, train.pixels.shape[1]
        drawings, _ = draw_flowers(seed, REFERENCE_DRAWINGS, size)
        name, every = f"drawings {flowers.VERSION} {seed} {size}", np.arange(REFERENCE_DRAWINGS)
        return judge.Judge(network, cache_features(drawings, every, name, network, config.cache_dir), drawings), unseen
    rows = judge.spread(np.arange(len(train)), judge.MAX_REFERENCE)
    reference = cache_features(train.pixels, rows, train.fingerprint, network, config.cache_dir)
    labels = labels_of(train, rows)
    probe = judge.Probe(reference, labels.tolist()) if kind == "labelled" else None
    return judge.Judge(network, reference, judge.spread(train.pixels, judge.MAX_STATISTICS), probe), unseen


def labels_of(split: Any, rows: "np.ndarray | None" = None) -> "np.ndarray":
    """Return the label of each image of a split, or of some rows of the split: object [N].

    Images without a label get None.
    """
    import numpy as np

    known = "label" in split.rows.column_names
    labels = np.array(split.rows["label"] if known else [None] * len(split), dtype=object)
    return labels if rows is None else labels[rows]


def unseen_rows(pixels: "np.ndarray", thumbnails: Any) -> "np.ndarray":
    """Return the numbers of the held-out images that are no near copies of training images.

    Args:
        pixels: held-out images, uint8 [N, R, R, 3].
        thumbnails: `pixel_embedding` of the training images.
    """
    import numpy as np

    from t2i.evaluation import memorisation

    if len(thumbnails) < 2:
        return np.arange(len(pixels))
    return np.flatnonzero(memorisation.relative_distances(pixels, thumbnails) > NEAR_COPY)


def compare(
    study: Study, pictures: "np.ndarray", features: Any, prompts: Prompts, figures: dict[str, Any]
) -> dict[str, Any]:
    """Return the judge's figures of the pictures, of real images (floor) and of the VAE's reconstructions (ceiling).

    Args:
        features: the judge's features of the pictures.
        figures: figures that `measure` returned for the pictures.
    """
    from t2i import models
    from t2i.evaluation import judge as judges
    from t2i.evaluation import memorisation
    from t2i.pictures import sampling
    from t2i.pictures.reconstructions import reconstruct

    judge, memory = study.judge, study.memory
    vae = models.load_decoder(str(study.run / "pipeline")).to(sampling.best_device())
    reconstructions = reconstruct(vae, study.unseen)[0]
    control = reconstruct(vae, judges.spread(study.splits.train.pixels, CONTROLS))[0]
    count = min(len(pictures), len(study.unseen), len(judge.reference))
    copies, of_reconstructions = figures["memorisation"], judge.network.features(reconstructions)
    copied = float(memorisation.copied(reconstructions, memory.thumbnails).mean())
    sets = {
        "pictures": (pictures, features, labels_wanted(prompts), copies["copies"]),
        "reconstructions": (reconstructions, of_reconstructions, study.unseen_labels, copied),
        "real": (study.unseen, study.unseen_features, study.unseen_labels, copies["copies_held_out"]),
    }
    rows = {
        name: judge.describe(images, of_images, labels, count) | {"copies": share}
        for name, (images, of_images, labels, share) in sets.items()
    }
    return {
        "network": judge.network.name,
        **rows,
        "control_copies": float(memorisation.copied(control, memory.thumbnails).mean()),
        **figures["judge"],
    }


def labels_wanted(prompts: Prompts) -> list[Any] | None:
    """Return the label that each prompt asks for, or None if the prompts ask for no label."""
    labels = [wanted.get("label") for wanted in prompts.wanted]
    return labels if any(label is not None for label in labels) else None


def encode(heads: dict[str, list[Any]], attributes: list[dict[str, Any]]) -> "dict[str, np.ndarray]":
    """Return attribute values as indices into `heads`: name -> int64 [N].

    Attribute values that `heads` does not know become -1.
    """
    import numpy as np

    index = {name: {value: number for number, value in enumerate(values)} for name, values in heads.items()}
    return {name: np.array([index[name].get(known[name], -1) for known in attributes]) for name in heads}


def make_prompts(kind: str, splits: Any, recipe: Any, count: int, seed: int, offset: int) -> Prompts:
    """Return `count` prompts.

    Kind `drawn`: half of the prompts name held-out combinations. Kind `labelled`: captions of random training images, which
    name their labels. Kind `captioned`: the prompts are captions of random unseen images.

    Args:
        offset: number of captions to skip, because other prompts use these captions.
    """
    import numpy as np

    from t2i.data import flowers

    if kind == "drawn":
        seen = flowers.prompts(count - count // 2, seed, False)
        held_out = flowers.prompts(count // 2, seed, True)
        texts, wanted = [text for _, text in seen + held_out], [known for known, _ in seen + held_out]
        return Prompts(texts, wanted, [False] * len(seen) + [True] * len(held_out))
    if kind == "labelled":
        # Prompts have the mix of the training labels, as the real images have that pictures are compared with.
        rows = zip(splits.train.rows["label"], splits.train.rows["caption"], strict=True)
        known = [row for row in rows if row[0] is not None]
        chosen = [known[row] for row in np.random.default_rng(seed).integers(len(known), size=count)]
        return Prompts([caption for _, caption in chosen], [{"label": label} for label, _ in chosen], [False] * count)
    captions: list[str] = []
    for split in (splits.test, splits.validation):  # A test split may have no captions, although training has them.
        captions = captions or [caption for caption in (split.rows["caption"] if split else ()) if caption]
    if not captions:
        raise UserError(f"{recipe.data.dataset} has no caption in its test or validation split; give a captioned set")
    # Rows have the order of their paths, so the first ones may show few of the classes that pictures are compared with.
    order = np.random.default_rng(CAPTIONS_SEED).permutation(len(captions))
    texts = [captions[order[(offset + number) % len(captions)]] for number in range(count)]
    return Prompts(texts, [], [False] * count)


def sampler(run: Path, config: EvaluateConfig) -> Preset:
    """Return the sampling settings of the evaluation.

    The settings name the scheduler by its class name in diffusers.
    """
    file = run / "pipeline" / "scheduler" / "scheduler_config.json"
    schedule = read_object(file)
    saved = schedule.get("_class_name")
    if not isinstance(saved, str):
        raise UserError(f"{file} has no key _class_name; restore the file from a copy")
    if student_steps(schedule) and max(config.guidance_scales) > 1:
        scales = ", ".join(f"{scale:g}" for scale in config.guidance_scales)
        raise UserError(
            f"guidance_scales {scales}: the model is a student, which has learnt guidance; give --guidance_scales 1"
        )
    if config.preset:
        preset = choose_preset(config.preset, schedule)
        problem = scheduler_problem(preset.scheduler, schedule, preset.num_inference_steps)
        if problem:
            raise UserError(f"preset {config.preset}: {problem}")
        return preset._replace(scheduler=SCHEDULERS[preset.scheduler])
    if student := student_steps(schedule):
        return Preset(saved, student, 1.0)
    return Preset(saved, config.num_inference_steps, 1.0)


def draw(
    checkpoint: Path, prompts: Prompts, scale: float, preset: Preset, config: EvaluateConfig, seed: int
) -> "np.ndarray":
    """Return pictures of the prompts by a checkpoint's moving-average weights: uint8 [N, R, R, 3]."""
    from t2i.pictures import sampling

    pipeline = load(checkpoint, config.engine)
    pipeline.scheduler = sampling.make_scheduler(
        preset.scheduler, pipeline.scheduler.config, preset.num_inference_steps
    )
    print(f"{checkpoint.name}, guidance scale {scale:g}: {len(prompts.texts)} pictures", flush=True)
    return sampling.generate(
        pipeline, prompts.texts, [seed + number for number in range(len(prompts.texts))], guidance_scale=scale,
        num_inference_steps=preset.num_inference_steps, guidance_end=preset.guidance_end,
        guidance_rescale=config.guidance_rescale, batch_size=config.eval_batch_size,
    )  # fmt: skip


_kept: dict[Path, Any] = {}  # the pipeline that drew last


def load(checkpoint: Path, engine: str) -> Any:
    """Return the pipeline of a checkpoint, which stays loaded for the checkpoint's next guidance scale."""
    from t2i.pictures import sampling

    if checkpoint not in _kept:
        _kept.clear()  # before loading: both at once may not fit
        device = "cpu" if engine == "openvino" else sampling.best_device()
        _kept[checkpoint] = sampling.load_pipeline(checkpoint, device=device, engine=engine)
    return _kept[checkpoint]


def keep(run: Path, checkpoint: str, pictures: "np.ndarray", drawn: dict[str, Any]) -> None:
    """Store drawn pictures as cells of the dashboard's grids, so that the dashboard need not draw them."""
    from t2i.pictures import cells

    made = [
        cells.Cell(
            prompt, seed=seed, guidance_scale=drawn["guidance_scale"],
            num_inference_steps=drawn["num_inference_steps"], scheduler=drawn["scheduler"], guidance_end=drawn["guidance_end"],
            guidance_rescale=drawn["guidance_rescale"],
        )
        for prompt, seed in zip(drawn["prompts"], drawn["seeds"], strict=True)
    ]  # fmt: skip
    cells.save_cells(run, checkpoint, cells.weights_hash(run / checkpoint), made, pictures)


def judged_features(study: Study, pictures: "np.ndarray") -> Any:
    """Return the judge's features of pictures, or None without a judge or with too few pictures for a distance."""
    return study.judge.network.features(pictures) if study.judge and len(pictures) > 2 else None


def measure(study: Study, pictures: "np.ndarray", features: Any, prompts: Prompts) -> dict[str, Any]:
    """Return the figures of one set of pictures with their `judged_features`. What is not measured is None.

    "distances" are those of each picture to its nearest training image, as `memorisation` defines them, or an empty list.
    """
    from t2i.data.flowers import COMBINED
    from t2i.evaluation import attributes, memorisation, metrics

    judge = study.judge
    enough = study.memory is not None and len(pictures) > 1
    copies = study.memory.measure(pictures) if enough else {}
    judged, following = None, None
    if features is not None:
        judged = judge.measure(features, labels_wanted(prompts))
    if study.classifier:
        following = attributes.prompt_following(study.classifier, pictures, prompts.wanted, COMBINED)
    elif judged and judged["named"] is not None:
        following = {"label": judged["named"], "all": judged["named"]}
    return {
        "prompt_following": following,
        "memorisation": {name: value for name, value in copies.items() if isinstance(value, float)} or None,
        "diversity": metrics.diversity(memorisation.pixel_embedding(pictures), study.memory.unseen) if enough else None,
        "judge": judged,
        "clipped": clipped_colors(study, pictures),
        "clip_score": metrics.clip_score(pictures, prompts.texts, study.recipe.evaluate.clip),
        "distances": [round(float(distance), 3) for distance in copies.get("relative_distance", ())],
    }


def clipped_colors(study: Study, pictures: "np.ndarray") -> dict[str, float] | None:
    """Return the share of clipped colors in the pictures and in unseen real images. Drawings have flat colors: None."""
    from t2i.evaluation import metrics

    if study.kind == "drawn" or not len(study.unseen):
        return None
    return {"pictures": metrics.clipped_share(pictures), "real": metrics.clipped_share(study.unseen)}


def read_pictures(study: Study, pictures: "np.ndarray", features: Any, prompts: Prompts) -> list[dict[str, Any]]:
    """Return what the classifier or the probe reads in each picture: {"wanted": ..., "read": ...} per attribute.

    If neither reads pictures of this data set, the list is empty.
    """
    from t2i.evaluation import attributes

    labels = labels_wanted(prompts)
    if study.classifier:
        heads = study.classifier.heads
        found = attributes.predict(study.classifier, pictures)
        read = [{name: heads[name][found[name][row]] for name in heads} for row in range(len(pictures))]
    elif study.judge and study.judge.probe and features is not None and labels is not None:
        read = [{"label": label} for label in study.judge.probe.predict(features)]
    else:
        return []
    return [
        {name: {"wanted": wanted.get(name), "read": value} for name, value in values.items()}
        for values, wanted in zip(read, prompts.wanted, strict=True)
    ]


def following_of(pictures: "np.ndarray", prompts: Prompts, classifier: Any, held_out: bool) -> dict[str, float] | None:
    """Return prompt following, only on prompts whose attribute combinations are held out (or seen in training)."""
    from t2i.data.flowers import COMBINED
    from t2i.evaluation import attributes

    rows = [number for number, held in enumerate(prompts.held_out) if held == held_out]
    if classifier is None or not any(prompts.held_out):
        return None
    return attributes.prompt_following(classifier, pictures[rows], [prompts.wanted[row] for row in rows], COMBINED)


def logged_loss(run: Path, checkpoint: str) -> float | None:
    """Return the validation loss that training logged at the checkpoint's step, or None."""
    step = checkpoint_step(run / checkpoint)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["val_loss"] for row in rows if row["step"] == step and "val_loss" in row]
    return losses[-1] if losses else None


def time_one_picture(checkpoint: Path, prompt: str, preset: Preset, scale: float) -> dict[str, float | None]:
    """Return the seconds that torch needs for a single picture, on the CPU and on a GPU if there is one.

    To measure the seconds, two pictures are drawn, and the second one is timed."""
    from t2i.pictures import sampling

    seconds: dict[str, float | None] = {"seconds_per_picture_cpu": None, "seconds_per_picture_gpu": None}
    _kept.clear()
    for device in dict.fromkeys(["cpu", sampling.best_device()]):
        name = "cpu" if device == "cpu" else "gpu"
        pipeline = sampling.load_pipeline(checkpoint, scheduler=preset.scheduler, device=device)
        for _ in range(2):
            start = time.perf_counter()
            sampling.generate(
                pipeline,
                [prompt],
                [0],
                guidance_scale=scale,
                num_inference_steps=preset.num_inference_steps,
                guidance_end=preset.guidance_end,
                progress=False,
            )
            seconds[f"seconds_per_picture_{name}"] = round(time.perf_counter() - start, 3)
    return seconds


def draw_missing(run: Path, config: EvaluateConfig) -> None:
    """Draw the reported pictures of a finished evaluation that are no longer in the run folder.

    Raises:
        UserError: the run has no evaluation, or its best checkpoint or guide is gone.
    """
    if problem := guide_problem(run):
        raise UserError(problem)
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    from t2i.evaluation import report
    from t2i.pictures import cells

    evaluation = read_object(run / "evaluation" / "evaluation.json")
    planned = [planned for planned, _ in report.reported_pictures(run, evaluation)]
    if not planned:
        raise UserError(f"{run} has no evaluation with reported pictures; leave out --redraw to evaluate it")
    if problem := next((one.problem for one in planned if one.problem), None):
        raise UserError(problem)
    gone = cells.missing(planned)
    print(f"drawing {len(gone)} of {len(planned)} reported pictures, which are no longer in {run}", flush=True)
    cells.make(gone, load=partial(load, engine=config.engine), batch_size=config.eval_batch_size)


def save_report(run: Path, results: dict[str, Any], train: Any, trained: TrainUnetConfig) -> None:
    """Write the HTML report of a finished evaluation, and send it to the training's MLflow run.

    Args:
        results: content of evaluation.json.
        train: training split, in which the images nearest to the pictures are looked up.
        trained: settings of the training.
    """
    import numpy as np

    from t2i.evaluation import memorisation, report
    from t2i.pictures import cells
    from t2i.tracking.mlflow_tracker import Tracker

    thumbnails = memorisation.pixel_embedding(train.pixels)
    pairs: list[report.Pair] = []
    for planned, _ in report.reported_pictures(run, results) if len(train) > 1 else ():
        drawn = cells.read_cell(planned.run, planned.model_hash, planned.cell) if planned.made else None
        if drawn is None:
            continue
        picture = np.asarray(drawn)
        ((row, distance),) = memorisation.nearest_images(picture, thumbnails, 1)
        caption = str(train.rows[row].get("caption") or "")
        pairs.append(report.Pair(picture, np.asarray(train.pixels[row]), distance, planned.cell.prompt, caption))
        pairs = sorted(pairs, key=lambda pair: pair.distance)[: report.PAIRS]
    path = report.write_report(run, results, pairs)
    print(f"report in one file: {path}")
    if trained.report_to != "none":
        tracker = Tracker(run, experiment=trained.experiment, run_name=run.name, config={}, guest=True)
        tracker.log_artifact(path)
        tracker.finish()


def save_grid(pictures: "np.ndarray", path: Path, count: int = 32) -> None:
    """Save the first pictures as one PNG, eight per row."""
    from t2i.pictures import sampling

    sampling.picture_grid(pictures[:count], columns=8, scale=max(1, 128 // pictures.shape[1])).save(path)


def track(run: Path, results: dict[str, Any], experiment: str) -> None:
    """Send the figures and grids to the training's MLflow run."""
    from PIL import Image

    from t2i.tracking.mlflow_tracker import Tracker

    tracker = Tracker(run, experiment=experiment, run_name=run.name, config={}, guest=True)
    for result in results["cells"]:
        step = checkpoint_step(run / result["checkpoint"]) or 0
        name = f"guidance_{result['guidance_scale']:g}"
        figures = dict(result["prompt_following"] or {})
        figures |= {"memorisation": result["memorisation"]["share_closer"]} if result["memorisation"] else {}
        copies = (result["memorisation"] or {}).get("copies")
        figures |= {"copies": copies} if copies is not None else {}
        figures |= {"kernel_distance": result["judge"]["kernel_distance"]} if result["judge"] else {}
        tracker.log_metrics({f"{name}/{key}": value for key, value in figures.items()}, step)
        tracker.log_image(Image.open(run / "evaluation" / result["grid"]), name, step)
    final = results["report"]["prompt_following"] or {}
    tracker.log_metrics({f"report/{key}": value for key, value in final.items()}, 0)
    tracker.log_artifact(run / "evaluation" / "evaluation.json")
    tracker.log_artifact(run / "pipeline" / "README.md")
    tracker.finish()


def print_sweep(sweep_results: list[dict[str, Any]]) -> None:
    """Print one line per checkpoint and guidance scale."""
    names = attribute_names(sweep_results[0]["prompt_following"])
    widths = {head: max(15, len(name) + 2) for head, name in names.items()}
    print(
        f"\n{'checkpoint':<20}{'guidance':>9}{'val loss':>10}"
        + "".join(f"{name:>{widths[head]}}" for head, name in names.items())
        + f"{'distance':>16}{'copies':>8}"
    )
    for result in sweep_results:
        shares = "".join(f"{result['prompt_following'][head]:>{width}.1%}" for head, width in widths.items())
        loss = f"{result['val_loss']:.4f}" if result["val_loss"] is not None else "-"
        judged = result["judge"]
        distance = f"{judged['kernel_distance']:.1f} ± {judged['standard_error']:.1f}" if judged else "-"
        copies = f"{result['memorisation']['copies']:.1%}" if result["memorisation"] else "-"
        print(f"{result['checkpoint']:<20}{result['guidance_scale']:>9g}{loss:>10}{shares}{distance:>16}{copies:>8}")


def print_report(results: dict[str, Any], folder: Path) -> None:
    """Print the figures of the chosen checkpoint and guidance scale on the prompts of the report."""
    report = results["report"]
    print(
        f"\nchosen: {report['checkpoint']} at guidance scale {report['guidance_scale']:g}, on {other_prompts(results)}; "
        f"here {report['prompts']} pictures:"
    )
    for head, name in attribute_names(report["prompt_following"]).items():
        known = report["probe_accuracy"].get(head)
        text = percent(report["prompt_following"][head], report["prompts"])
        print(f"  {name:<20}{text:>18}" + (f"   (on unseen real images: {known:.1%})" if known is not None else ""))
    if report["judge"]:
        print_judge(report["judge"])
    if report["memorisation"]:
        share, chance = report["memorisation"]["share_closer"], chance_closer(report["unseen_images"])
        print(
            f"  memorisation: {share:.1%} closer to a training image than 99 % of unseen images (chance: {chance:.1%})"
        )
    print(f"pictures: {folder}/*.png")


def print_verdict(verdict: dict[str, Any] | None) -> None:
    """Print the sentences of the verdict."""
    for sentences in (verdict or {"sentences": {}})["sentences"].values():
        print(" ".join(sentences))


def print_judge(judged: dict[str, Any]) -> None:
    """Print the judge's table: the pictures between the VAE's reconstructions (ceiling) and real images (floor)."""
    print(f"\njudged by {judged['network']} (kernel distance x 1000; lower is better):")
    columns = ("named", "distance", "Fréchet", "precision", "recall", "pixels", "copies")
    print(f"  {'':<18}" + "".join(f"{column:>{16 if column == 'distance' else 10}}" for column in columns))
    titles = {
        "real": "real images",
        "reconstructions": "reconstructions",
        "pictures": "pictures",
    }
    for name, title in titles.items():
        row = judged[name]
        named = f"{row['named']:.1%}" if row["named"] is not None else "-"
        distance = f"{row['kernel_distance']:.1f} ± {row['standard_error']:.1f}"
        shares = f"{row['precision']:>10.1%}{row['recall']:>10.1%}{row['pixel_distance']:>10.1f}{row['copies']:>10.1%}"
        print(f"  {title:<18}{named:>10}{distance:>16}{row['frechet_distance']:>10.1f}{shares}")
    print(f"  copies, control: {judged['control_copies']:.1%} of reconstructed training images count as copies\n")


if __name__ == "__main__":
    run_main(main)
