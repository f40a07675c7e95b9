"""The verdict of an evaluation: which setting is best and why, what is right, and how close pictures come to copies."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.evaluation.figures import Z
from t2i.evaluation.verdict import TOPICS, choose, make_verdict, outcome, verdict_of

SCALES = (1.5, 3.0)


def result(checkpoint, scale, distance=None, following=None, clip=None, loss=None, error=4.0, clipped=None):
    """A result of a sweep, as evaluate_checkpoints.py stores it."""
    judge = None if distance is None else {"kernel_distance": distance, "standard_error": error}
    shares = None if following is None else {"petal_color": following, "petal_count": following, "all": following / 2}
    score = None if clip is None else {"mean": clip}
    colors = None if clipped is None else {"pictures": clipped, "real": 0.07}
    return {"checkpoint": f"checkpoint-{checkpoint:06d}", "guidance_scale": scale, "judge": judge,
            "prompt_following": shares, "clip_score": score, "val_loss": loss, "clipped": colors}  # fmt: skip


def evaluation(results, best=None, copies=0.0, of_unseen=0.01, control=1.0, **more):
    best = best or choose(results, 3.0).best
    report = {
        "checkpoint": best["checkpoint"],
        "guidance_scale": best["guidance_scale"],
        "prompts": 256,
        "unseen_images": 400,
        "probe_accuracy": {"petal_color": 0.99, "petal_count": 0.8},
        "prompt_following": {"petal_color": 0.9, "petal_count": 0.4, "all": 0.3},
        "prompt_following_held_out": {"petal_color": 0.9, "petal_count": 0.4, "all": 0.25},
        "memorisation": {"copies": copies, "copies_held_out": of_unseen},
        "judge": {"control_copies": control},
        "clip_score": None,
    }
    return {"report": report | more, "cells": results, "sweep": {"prompts": ["a flower"] * 24}}


def said(found, topic):
    return " ".join(make_verdict(found)["sentences"][topic])


def test_the_judge_chooses_and_the_runner_up_is_named():
    near = [result(10, 3.0, 50.0, 0.9), result(20, 1.5, 12.0, 0.5), result(20, 3.0, 28.5, 0.9)]
    found = evaluation(near)
    assert said(found, "best") == (
        "3 settings were compared, on 24 pictures each. A setting is a checkpoint and a guidance scale. "
        "checkpoint-000020 at guidance scale 1.5 has the lowest kernel distance to real images: 12.0. "
        "checkpoint-000020 at guidance scale 3 comes second with 28.5. "
        "The difference is larger than chance explains (11.1). "
        "All other figures are of 256 new pictures at the best setting."
    )
    best = make_verdict(found)["best"]
    assert (best["chosen_by"], best["value"], best["difference"]) == ("judge.kernel_distance", 12.0, 16.5)
    assert best["is_clear"] is True


def test_prompt_following_decides_among_distances_that_chance_explains():
    close = [result(10, 3.0, 12.0, 0.50), result(20, 1.5, 23.0, 0.55), result(20, 3.0, 99.0, 1.0)]
    text = said(evaluation(close), "best")
    assert (
        "2 settings look equally near to real images: 24 pictures cannot tell them apart (lowest kernel distance: 12.0 ± 4.0). "
        "Of these, checkpoint-000020 at guidance scale 1.5 gets the most attributes right, on average: 55.0%. "
        "checkpoint-000010 at guidance scale 3 comes second with 50.0%." in text
    )
    assert "With 24 pictures, a difference of up to" in text
    close[1] = result(20, 1.5, 23.0, 0.50)
    tie = said(evaluation(close), "best")
    assert "checkpoint-000010 at guidance scale 3 equals it, but is an earlier checkpoint." in tie
    close[0] = result(20, 3.0, 12.0, 0.50)
    farther = "guidance scale 1.5 equals it, but its kernel distance is higher (23.0 instead of 12.0)."
    assert farther in said(evaluation(close), "best")
    close[0] = result(10, 3.0, 12.0, 0.50)
    close[1] = result(20, 1.5, 15.0, 0.9)
    assert "is larger than chance explains" in said(evaluation(close), "best")
    close[1] = result(20, 1.5, 23.2, 0.9)  # Chance explains a difference of 11.1.
    assert "has the lowest kernel distance to real images: 12.0" in said(evaluation(close), "best")


def test_colors_like_those_of_photos_decide_among_distances_that_chance_explains():
    glaring = [result(20, 3.0, 40.0, 0.3, clipped=0.04), result(20, 5.0, 22.0, 0.3, clipped=0.08),
               result(20, 7.5, 14.0, 0.4, clipped=0.12)]  # fmt: skip
    text = said(evaluation(glaring), "best")
    assert "checkpoint-000020 at guidance scale 5 has the share of clipped colors" in text
    assert (
        "2 guidance scales of checkpoint-000020 look equally near to real images: 24 pictures cannot tell them apart "
        "(lowest kernel distance: 14.0 ± 4.0)." in text
    )
    assert "has the share of clipped colors nearest to that of real images: 8.0% (real images: 7.0%)." in text
    assert "checkpoint-000020 at guidance scale 7.5 comes second with 12.0%." in text
    assert make_verdict(evaluation(glaring))["best"]["is_clear"] is None
    glaring.append(result(10, 7.5, 15.0, 0.4, clipped=0.07))  # Colors choose no checkpoint.
    assert "checkpoint-000020 at guidance scale 5 has the share of clipped colors" in said(evaluation(glaring), "best")
    glaring[1:] = [result(20, 5.0, 30.0, 0.3, clipped=0.08), glaring[2]]
    text = said(evaluation(glaring), "best")
    assert "has the lowest kernel distance to real images: 14.0." in text
    assert "larger than chance explains (11.1)" in text


def test_a_clip_score_a_loss_and_a_single_setting_are_called_what_they_are():
    scored = [result(10, 3.0, clip=21.0), result(20, 3.0, clip=23.0)]
    assert "has the highest CLIP score: 23.00." in said(evaluation(scored), "best")
    assert make_verdict(evaluation(scored))["best"]["is_clear"] is None
    only_losses = [result(10, 3.0, loss=0.2), result(20, 3.0, loss=0.1), result(20, 1.5, loss=0.1)]
    found = evaluation(only_losses)
    assert found["report"]["checkpoint"] == "checkpoint-000020"
    assert "lowest validation loss" in said(found, "best")
    assert said(evaluation(only_losses[:1]), "best") == "Only checkpoint-000010 at guidance scale 3 was evaluated."
    other = evaluation([result(10, 3.0, 12.0), result(20, 3.0, 50.0)], best=result(20, 3.0, 50.0))
    assert "by another rule" in said(other, "best")


def test_what_is_right_has_its_interval_and_the_classifiers_own_errors():
    found = evaluation([result(10, 3.0)])
    text = said(found, "right")
    assert text.startswith("30.0% (25–36%) of 256 pictures show the whole combination")
    assert "training never showed, the share is 25.0% (18–33%)" in text
    assert "right is the petal color (90.0%), most often wrong the petal count (right in 40.0%)" in text
    assert "petal count right in 80.0% of unseen real images" in text
    drawn = {"petal_color": 0.9, "petal_count": 0.4, "petal_shape": 0.6, "all": 0.3}
    text = said(evaluation([result(10, 3.0)], prompt_following=drawn), "right")
    assert text.startswith(
        "30.0% (25–36%) of 256 pictures show the petal color and petal count that their prompt names."
    )
    labelled = {"prompt_following": {"label": 0.5, "all": 0.5}, "probe_accuracy": {"label": 0.75}}
    text = said(evaluation([result(10, 3.0)], prompt_following_held_out=None, **labelled), "right")
    assert "show the label that their prompt names. Of unseen real images, the same test recognises 75.0%" in text
    nothing = evaluation([result(10, 3.0)], prompt_following=None, memorisation=None)
    assert "was not measured" in said(nothing, "right")
    assert "was not measured" in said(nothing, "copies")


@pytest.mark.parametrize(
    ("copies", "of_unseen", "control", "sentence"),
    [
        (0.0, 0.01, 1.0, "no more frequent than among unseen real images"),
        (0.02, 0.01, 1.0, "may be chance"),
        (0.2, 0.01, 1.0, "copies more than chance explains"),
        (
            0.0,
            0.01,
            0.3,
            "The test is weak here: of training images that the autoencoder reconstructed, it finds only 30.0%",
        ),
    ],
)
def test_copies_stand_beside_those_among_unseen_images(copies, of_unseen, control, sentence):
    text = said(evaluation([result(10, 3.0)], copies=copies, of_unseen=of_unseen, control=control), "copies")
    assert sentence in text
    assert "the same test finds 1.0% (0–3%) among 400 real images that training never saw" in text
    assert ("weak" in text) == (control < 0.9)


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 20), st.integers(0, 24), st.integers(1, 8)), min_size=2, max_size=8
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_best_is_never_beaten_by_more_than_the_rule_allows(rows, is_judged, is_read, is_photo):
    """The figure that the verdict names is the one by which no rival is better."""
    results = [
        result(
            10 * step,
            float(scale),
            distance if is_judged else None,
            right / 24 if is_read else None,
            loss=0.1,
            clipped=clipped / 50 if is_photo else None,
        )
        for scale, (step, distance, right, clipped) in enumerate(rows)
    ]
    found = choose(results, 3.0)
    verdict = make_verdict(evaluation(results))["best"]
    assert (verdict["checkpoint"], verdict["guidance_scale"]) == (
        found.best["checkpoint"],
        found.best["guidance_scale"],
    )
    if is_judged:
        lowest = min(one["judge"]["kernel_distance"] for one in results)
        assert found.best["judge"]["kernel_distance"] <= lowest + Z * 4.0 * 2**0.5
    if verdict["chosen_by"] == "clipped.pictures":
        assert abs(verdict["value"] - 0.07) <= abs(verdict["runner_up"]["value"] - 0.07)
    if verdict["chosen_by"] == "prompt_following":
        assert verdict["value"] >= verdict["runner_up"]["value"]
        assert 0 <= verdict["limit"] <= Z / (12**0.5)
    elif verdict["chosen_by"] == "judge.kernel_distance":
        assert verdict["value"] <= verdict["runner_up"]["value"]
        assert verdict["is_clear"] == (verdict["difference"] > Z * 4.0 * 2**0.5)


def test_an_evaluation_without_verdict_gets_the_verdict_it_would_have_stored():
    old = evaluation([result(10, 3.0, 12.0, 0.5), result(20, 3.0, 40.0, 0.5)])
    assert verdict_of(json.loads(json.dumps(old))) == make_verdict(old)
    stored = {topic: [f"said before about {topic}"] for topic in TOPICS}
    assert verdict_of(old | {"verdict": {"sentences": stored}})["sentences"] == stored
    assert verdict_of(old | {"verdict": {"sentences": {"best": 3}}}) == make_verdict(old)
    assert verdict_of(None) is verdict_of({}) is verdict_of({"report": {}, "cells": []}) is None


def paths(value, prefix=()):
    """The places of a JSON value, all of them."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


WHOLE = evaluation([result(10, 3.0, 12.0, 0.5, clipped=0.1), result(20, 3.0, 15.0, 0.5, clipped=0.05)])
EVIL = "<b>_*" * 100


@given(st.sampled_from([path for path in paths(WHOLE) if path]), st.sampled_from([None, [], {}, EVIL, -1, 1e999, True]))
def test_a_damaged_evaluation_gets_no_verdict_or_short_sentences(path, value):
    broken = copy.deepcopy(WHOLE)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    verdict = verdict_of(broken)
    for sentences in verdict["sentences"].values() if verdict else ():
        assert all(len(text) <= 200 for text in sentences)


def test_a_reading_is_told_as_right_and_wrong():
    reading = {"petal_color": {"wanted": "red", "read": "red"}, "petal_count": {"wanted": 5, "read": 8}, "b": 3}
    assert outcome(reading) == (["petal color red"], ["petal count: 8 instead of 5"])
    assert outcome({"label": {"wanted": None, "read": "rose"}}) == outcome(None) == ([], [])
