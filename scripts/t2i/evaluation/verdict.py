"""Choose the best checkpoint and guidance scale, and say in plain sentences what an evaluation found.

The evaluation stores its verdict in evaluation.json. The dashboard, the model card and the HTML report read the verdict
by `verdict_of`, so all of them say the same. This module imports no torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2i.data.flowers import COMBINED
from t2i.evaluation.figures import Z, is_finite, percent, wilson, words

TOPICS = {"right": "Follows its prompts", "copies": "Copies of training images", "best": "Best setting"}
NAME_CHARACTERS = 60  # longest name from a file within a sentence
CONTROL = 0.9  # With a smaller share of control images found, the test for copies overlooks copies.
DISTANCE, FOLLOWING, CLIP, LOSS = "judge.kernel_distance", "prompt_following", "clip_score.mean", "val_loss"
CLIPPED = "clipped.pictures"
REASONS = {
    FOLLOWING: "gets the most attributes right, on average",
    CLIP: "has the highest CLIP score",
    DISTANCE: "has the lowest kernel distance to real images",
    CLIPPED: "has the share of clipped colors nearest to that of real images",
}


@dataclass(frozen=True)
class Choice:
    """The chosen result of a sweep, and why it was chosen.

    Attributes:
        best: the chosen result.
        key: the figure that chose: `DISTANCE`, `FOLLOWING`, `CLIP`, `CLIPPED` or `LOSS`.
        rivals: the other results that this figure compared, the best of them first.
        lowest: the result with the lowest kernel distance, if the judge only narrowed the choice. Otherwise None.
    """

    best: dict[str, Any]
    key: str
    rivals: list[dict[str, Any]]
    lowest: dict[str, Any] | None = None


def choose(sweep_results: Sequence[dict[str, Any]], guidance_scale: float) -> Choice:
    """Choose the best setting of a sweep: a checkpoint with a guidance scale.

    The judge narrows the choice to the settings whose kernel distance is not measurably higher than the lowest. Photos keep the
    checkpoint of the lowest distance, and colors choose among its guidance scales. Distances of photos fall as guidance
    grows, while colors become glaring. So the best scale has the share of clipped colors that is nearest to that of real
    images. Drawings have no such share. Among their settings, prompt following (or else the CLIP score) decides, and then the
    later checkpoint. Without either, the lowest distance decides.

    Without a judge, only prompt following or the CLIP score chooses the best setting. If nothing was measured, the result has
    the guidance scale nearest to the recipe's, and the checkpoint with the lowest validation loss.

    Args:
        sweep_results: figures of each setting (a checkpoint with a guidance scale), at least one.
        guidance_scale: guidance scale of the recipe.
    """
    close, lowest = list(sweep_results), None
    if sweep_results[0]["judge"]:
        near = sorted(sweep_results, key=_distance)
        lowest = near[0]
        close = [result for result in near if _distance(result) - _distance(lowest) <= _chance(result, lowest)]
        is_photo = all(result.get("clipped") for result in near)
        if is_photo:
            close = [result for result in close if result["checkpoint"] == lowest["checkpoint"]]
            close.sort(key=lambda result: abs(result["clipped"]["pictures"] - result["clipped"]["real"]))
        if is_photo and len(close) > 1:
            return Choice(close[0], CLIPPED, close[1:], lowest)
        if len(close) == 1 or not (lowest["prompt_following"] or lowest["clip_score"]):
            return Choice(lowest, DISTANCE, near[1:])
    if close[0]["prompt_following"] or close[0]["clip_score"]:
        ranked = sorted(
            close,
            key=lambda result: (sweep_score(result), _step(result["checkpoint"])),
            reverse=True,
        )
        return Choice(ranked[0], FOLLOWING if close[0]["prompt_following"] else CLIP, ranked[1:], lowest)
    ranked = sorted(
        close,
        key=lambda result: (
            abs(result["guidance_scale"] - guidance_scale),
            math.inf if result["val_loss"] is None else result["val_loss"],
        ),
    )
    return Choice(ranked[0], LOSS, ranked[1:])


def _distance(result: Mapping[str, Any]) -> float:
    return float(result["judge"]["kernel_distance"])


def _chance(result: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest difference of two kernel distances that chance alone explains in 95 % of cases."""
    return Z * math.hypot(*(float(one["judge"]["standard_error"]) for one in (result, other)))


def sweep_score(result: Mapping[str, Any]) -> float:
    """Return the mean share of attributes that follow the prompt, else the CLIP score.

    A higher share or score is better.
    """
    if result["prompt_following"]:
        shares = [share for name, share in result["prompt_following"].items() if name != "all"]
        return round(sum(shares) / len(shares), 3)
    return float(result["clip_score"]["mean"])


def verdict_of(evaluation: Any) -> dict[str, Any] | None:
    """Return the verdict in the content of an evaluation.json, or make it from the figures there.

    Evaluations of earlier versions have no verdict, but all its figures. The result is None if the figures are missing or
    damaged.
    """
    if not isinstance(evaluation, Mapping):
        return None
    stored = evaluation.get("verdict")
    if isinstance(stored, Mapping) and isinstance(stored.get("sentences"), Mapping):
        lists = [stored["sentences"].get(topic) for topic in TOPICS]
        if all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
            return dict(stored)
    try:
        return make_verdict(evaluation)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):  # a damaged file
        return None


def make_verdict(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Make the verdict of an evaluation.

    Args:
        evaluation: "report", "cells" (the sweep's results) and "sweep" of evaluate_checkpoints.py.

    Returns:
        Figures under the keys of `TOPICS`, and under "sentences" a list of sentences for each of these keys. No sentence
            has more than 200 characters.
    """
    report, sweep = evaluation["report"], evaluation["sweep"]
    right, right_sentences = _right(report)
    copies, copies_sentences = _copies(report)
    best, best_sentences = _best(report, evaluation["cells"], len(sweep["prompts"]))
    sentences = {"right": right_sentences, "copies": copies_sentences, "best": best_sentences}
    return {"right": right, "copies": copies, "best": best, "sentences": sentences}


def outcome(reading: Any) -> tuple[list[str], list[str]]:
    """Return what a picture shows as wanted, and what it shows instead of what was wanted, as texts.

    Args:
        reading: a picture's entry of "readings" in evaluation.json: {"wanted": ..., "read": ...} per attribute.
    """
    right: list[str] = []
    wrong: list[str] = []
    for name, values in reading.items() if isinstance(reading, Mapping) else ():
        if not isinstance(values, Mapping) or values.get("wanted") is None:
            continue
        wanted, read, shown = values["wanted"], values.get("read"), words(_name(name))
        if wanted == read:
            right.append(f"{shown} {_name(wanted)}")
        else:
            wrong.append(f"{shown}: {_name(read)} instead of {_name(wanted)}")
    return right, wrong


def headline(figures: Any) -> str:
    """Return the one figure of a topic of a verdict: the best setting, or a share. If it is missing, the text is empty."""
    figures = figures if isinstance(figures, Mapping) else {}
    if is_finite(figures.get("share")):
        return percent(float(figures["share"]))
    name, scale = figures.get("checkpoint"), figures.get("guidance_scale")
    return f"{name} at guidance scale {scale:g}" if isinstance(name, str) and is_finite(scale) else ""


def is_setting(results: Any, checkpoint: Any, scale: Any) -> bool:
    """Return whether an object of an evaluation, such as its report, is about this checkpoint and guidance scale."""
    return (results["checkpoint"], float(results["guidance_scale"])) == (checkpoint, float(scale))


# --- Topics ----------------------------------------------------------------------------------------------------------


def _right(report: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the figures and sentences on what the model gets right."""
    following, count = report["prompt_following"], report["prompts"]
    if not following:
        if report["clip_score"]:
            score = float(report["clip_score"]["mean"])
            return {"clip_score": score}, [
                f"The pictures have a CLIP score of {score:.2f}.",
                "It compares models that the same CLIP model measured. Which pictures are right was not measured.",
            ]
        return {}, ["Whether the pictures follow their prompts was not measured."]
    share = float(following["all"])
    shares = {name: float(value) for name, value in following.items() if name != "all"}
    figures = {"share": share, "interval": list(wilson(share, count)), "pictures": count, "attributes": shares}
    accuracy = {name: float(value) for name, value in (report["probe_accuracy"] or {}).items() if value is not None}
    if len(shares) == 1:
        (name,) = shares
        sentences = [f"{percent(share, count)} of {count} pictures show the {_name(name)} that their prompt names."]
        if name in accuracy:
            sentences.append(f"Of unseen real images, the same test recognises {percent(accuracy[name])}.")
        return figures, sentences
    top, bottom = max(shares, key=lambda name: shares[name]), min(shares, key=lambda name: shares[name])
    combined = [words(name) for name in shares if name in COMBINED]
    # Drawings have further attributes, which are no part of a combination.
    names = f"{', '.join(combined[:-1])} and {combined[-1]}" if 1 < len(combined) < len(shares) else "whole combination"
    sentences = [f"{percent(share, count)} of {count} pictures show the {names} that their prompt names."]
    held_out = report.get("prompt_following_held_out")
    if held_out:
        unseen, pictures = float(held_out["all"]), count // 2
        figures |= {"held_out": {"share": unseen, "interval": list(wilson(unseen, pictures)), "pictures": pictures}}
        sentences.append(f"For combinations that training never showed, the share is {percent(unseen, pictures)}.")
    sentences.append(
        f"Most often right is the {words(_name(top))} ({percent(shares[top])}), "
        f"most often wrong the {words(_name(bottom))} (right in {percent(shares[bottom])})."
    )
    if accuracy:
        weakest = min(accuracy, key=lambda name: accuracy[name])
        sentences.append(
            "The classifier that reads the pictures errs too: "
            f"it reads the {words(_name(weakest))} right in {percent(accuracy[weakest])} of unseen real images."
        )
    return figures, sentences


def _copies(report: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the figures and sentences on how close the pictures come to copies, beside unseen real images."""
    measured, count = report["memorisation"], report["prompts"]
    if not measured or measured.get("copies") is None:
        return {}, ["Whether the pictures copy training images was not measured."]
    share, of_unseen, unseen = float(measured["copies"]), float(measured["copies_held_out"]), report["unseen_images"]
    (low, high), (unseen_low, unseen_high) = wilson(share, count), wilson(of_unseen, unseen)
    control = (report["judge"] or {}).get("control_copies")
    figures = {
        "share": share,
        "interval": [low, high],
        "pictures": count,
        "share_of_unseen_images": of_unseen,
        "interval_of_unseen_images": [unseen_low, unseen_high],
        "unseen_images": unseen,
        "control": control,
        "is_more": low > unseen_high,
    }
    sentences = [
        f"{percent(share, count)} of {count} pictures are copies of a training image.",
        f"As a check, the same test finds {percent(of_unseen, unseen)} among {unseen} real images that training never saw.",
    ]
    if low > unseen_high:
        sentences.append("The model copies more than chance explains.")
    elif share > of_unseen:
        sentences.append("The intervals overlap, so the difference may be chance.")
    else:
        sentences.append("So copies are no more frequent than among unseen real images.")
    if control is not None and control < CONTROL:
        sentences.append(
            f"The test is weak here: of training images that the autoencoder reconstructed, it finds only {percent(control)}."
        )
    return figures, sentences


def _best(
    report: Mapping[str, Any], results: Sequence[dict[str, Any]], pictures: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the figures and sentences on the best checkpoint and guidance scale, and why it was chosen.

    Args:
        pictures: number of pictures on which each result was measured.
    """
    name, scale = report["checkpoint"], float(report["guidance_scale"])
    figures: dict[str, Any] = {"checkpoint": name, "guidance_scale": scale, "settings": len(results)}
    if len(results) == 1:
        return figures | {"chosen_by": None}, [f"Only {_setting(report)} was evaluated."]
    sentences = [
        f"{len(results)} settings were compared, on {pictures} pictures each. A setting is a checkpoint and a guidance scale."
    ]
    others = f"All other figures are of {report['prompts']} new pictures at the best setting."
    choice = choose(results, scale)
    (best, *_) = [result for result in results if is_setting(result, name, scale)]
    if choice.key == LOSS:
        sentences.append(
            f"{_setting(report)} has the lowest validation loss at its guidance scale. No figure of pictures chose it."
        )
        sentences.append(others)
        return figures | {"chosen_by": LOSS, "value": best["val_loss"]}, sentences
    if best is not choice.best:
        sentences.append(f"An earlier version of the evaluation chose {_setting(report)}, by another rule.")
        sentences.append(others)
        return figures | {"chosen_by": None}, sentences
    value, other, runner_up = _value(best, choice.key), _value(choice.rivals[0], choice.key), choice.rivals[0]
    among = ""
    if choice.lowest:
        judged = choice.lowest["judge"]
        distance = f"{judged['kernel_distance']:.1f} ± {judged['standard_error']:.1f}"
        those = f"guidance scales of {_name(name)}" if choice.key == CLIPPED else "settings"
        sentences.append(
            f"{len(choice.rivals) + 1} {those} look equally near to real images: {pictures} pictures cannot tell them apart "
            f"(lowest kernel distance: {distance})."
        )
        among = "Of these, "
    real = f" (real images: {percent(_real(best))})" if choice.key == CLIPPED else ""
    sentences.append(f"{among}{_setting(best)} {REASONS[choice.key]}: {_shown(value, choice.key)}{real}.")
    is_tie = choice.key in (FOLLOWING, CLIP) and value == other
    if is_tie and _step(best["checkpoint"]) != _step(runner_up["checkpoint"]):
        sentences.append(f"{_setting(runner_up)} equals it, but is an earlier checkpoint.")
    elif is_tie and choice.lowest:
        farther = f"its kernel distance is higher ({_distance(runner_up):.1f} instead of {_distance(best):.1f})"
        sentences.append(f"{_setting(runner_up)} equals it, but {farther}.")
    else:
        sentences.append(f"{_setting(runner_up)} comes second with {_shown(other, choice.key)}.")
    limit = _limit(best, runner_up, choice.key, pictures)
    gap = abs(value - other)
    if limit is not None:
        known = f"{limit:.1f}" if choice.key == DISTANCE else f"{100 * limit:.1f} percentage points"
        sentences.append(
            f"The difference is larger than chance explains ({known})."
            if gap > limit
            else f"With {pictures} pictures, a difference of up to {known} can be chance, so the runner-up may be as good."
        )
    sentences.append(others)
    return figures | {
        "chosen_by": choice.key,
        "value": value,
        "runner_up": {
            "checkpoint": runner_up["checkpoint"],
            "guidance_scale": runner_up["guidance_scale"],
            "value": other,
        },
        "difference": gap,
        "limit": limit,
        "is_clear": None if limit is None else gap > limit,
    }, sentences


def _value(result: Mapping[str, Any], key: str) -> float:
    if key == CLIPPED:
        return float(result["clipped"]["pictures"])
    return _distance(result) if key == DISTANCE else sweep_score(result)


def _real(result: Mapping[str, Any]) -> float:
    """Return the share of clipped colors in real images, 0 to 1; 0 if it was not measured."""
    return float((result.get("clipped") or {}).get("real") or 0.0)


def _limit(result: Mapping[str, Any], other: Mapping[str, Any], key: str, pictures: int) -> float | None:
    """Return the largest difference between two results that chance alone explains in 95 % of cases.

    It joins the intervals of both results, as of independent pictures. The CLIP score has no known interval.
    """
    if key == DISTANCE:
        return _chance(result, other)
    if key == FOLLOWING:
        shares = [sweep_score(one) for one in (result, other)]
        return math.hypot(*((high - low) / 2 for low, high in (wilson(share, pictures) for share in shares)))
    return None


def _shown(value: float, key: str) -> str:
    return percent(value) if key in (FOLLOWING, CLIPPED) else f"{value:.2f}" if key == CLIP else f"{value:.1f}"


def _setting(result: Mapping[str, Any]) -> str:
    return f"{_name(result['checkpoint'])} at guidance scale {float(result['guidance_scale']):g}"


def _step(checkpoint: str) -> int:
    """Return the step in a checkpoint's name, or 0. The name comes from a file, so it never becomes part of a path."""
    name = re.fullmatch(r"checkpoint-([0-9]{1,15})", checkpoint)
    return int(name[1]) if name else 0


def _name(value: Any) -> str:
    return str(value)[:NAME_CHARACTERS]
