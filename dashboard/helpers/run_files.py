"""Read the files of a run without failing: a missing file gives {}, and a damaged file also shows a warning on the page."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import streamlit as st
import yaml

from helpers.page_texts import escape, warn_once
from helpers.run_list import checkpoints_of
from t2i.errors import UserError
from t2i.evaluation.figures import flatten, is_finite
from t2i.files import read_json
from t2i.pictures.cells import EvaluatedGrid, schedule_of
from t2i.pictures.png import cut_prompt, student_steps
from t2i.redaction import redact_config


def read_or_warn(path: Path, read: Callable[[Path], Any] = read_json) -> dict[str, Any]:
    """Return a file's JSON object; {} if the file is missing, and {} with a warning if it is damaged.

    Args:
        read: reads the file. It raises `UserError` if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = read(path)
    except UserError as error:
        warn_once(str(error))
        return {}
    except (OSError, RecursionError) as error:  # deleted meanwhile, or nested to do harm
        warn_once(f"{path} cannot be read ({type(error).__name__})")
        return {}
    return value if isinstance(value, dict) else {}


def read_settings(run: Path) -> dict[str, Any]:
    """Return a run's config.yaml without secrets; {} if it is missing, and {} with a warning if it is damaged."""
    file = run / "config.yaml"
    try:
        return _parse_settings(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        st.warning(escape(f"{file} cannot be read ({type(error).__name__}); restore it from config.public.yaml"))
        return {}


@lru_cache(maxsize=512)  # a recipe takes 12 ms: seconds per click with 200 runs; no caller changes the result
def _parse_settings(text: str) -> dict[str, Any]:
    value = yaml.safe_load(text)
    return redact_config(value) if isinstance(value, dict) else {}


def sweep_results(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's evaluation: dictionaries with a checkpoint and a finite guidance scale."""
    return _rows_of(read_or_warn(run / "evaluation" / "evaluation.json"))


def _rows_of(evaluation: Any) -> list[dict[str, Any]]:
    rows = evaluation.get("cells") if isinstance(evaluation, dict) else None
    results = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [result for result in results if is_finite(result.get("guidance_scale"))]


def _pictures_of(evaluation: dict[str, Any]) -> int | None:
    """Return the number of pictures on which each row of an evaluation was measured, or None if it is unknown."""
    sweep = evaluation.get("sweep")
    prompts = sweep.get("prompts") if isinstance(sweep, dict) else None
    return len(prompts) if isinstance(prompts, list) and prompts else None


def measured_results(run: Path) -> list[dict[str, Any]]:
    """Return what an evaluation measured for each checkpoint and guidance scale of a run.

    Returns:
        Dictionaries of "checkpoint", "scale", "pictures" (their number, or None), "judge" (the network, or None) and
            "values" (finite figures by their flattened keys). No caller changes them.
    """
    return read_or_warn(run / "evaluation" / "evaluation.json", _measured_results).get("results", [])


def _measured_results(file: Path) -> dict[str, Any]:
    found = file.stat()
    return {"results": _parse_results(file, found.st_mtime_ns, found.st_size)}


@lru_cache(maxsize=512)  # Parsing 100 evaluations takes 0.2 s. A file that changes has another time or size.
def _parse_results(file: Path, changed_ns: int, size: int) -> list[dict[str, Any]]:
    evaluation = read_json(file)
    report = evaluation.get("report") if isinstance(evaluation, dict) else None
    judged = report.get("judge") if isinstance(report, dict) else None
    results = []
    for row in _rows_of(evaluation):
        values = {key: value for key, value in flatten(row).items() if is_finite(value) and key != "guidance_scale"}
        results.append(
            {
                "checkpoint": str(row.get("checkpoint")),
                "scale": row["guidance_scale"],
                "pictures": _pictures_of(evaluation),
                "judge": judged.get("network") if isinstance(judged, dict) else None,
                "values": values,
            }
        )
    return results


def best_scale(run: Path, evaluated: EvaluatedGrid | None) -> float:
    """Return the guidance scale that the evaluation chose, otherwise the first evaluated one, otherwise 3, or 1 for a student."""
    report = read_or_warn(run / "evaluation" / "evaluation.json").get("report")
    scale = report.get("guidance_scale") if isinstance(report, dict) else None
    if is_finite(scale):
        return float(scale)  # type: ignore[arg-type]
    if evaluated:
        return float(evaluated.guidance_scales.values[0])
    return 1.0 if student_steps(schedule_of(run)) else 3.0


def best_checkpoint(run: Path) -> str | None:
    """Return the checkpoint that a run's evaluation chose, otherwise its newest model; None if it has no checkpoint."""
    names = checkpoints_of(run)
    report = read_or_warn(run / "evaluation" / "evaluation.json").get("report")
    chosen = report.get("checkpoint") if isinstance(report, dict) else None
    return chosen if isinstance(chosen, str) and chosen in names else next(iter(names[::-1]), None)


def best_run(runs: dict[str, Path]) -> str:
    """Return the name of the run with the best evaluated model, otherwise of the newest run.

    The newest evaluated run is compared with those that the same judge evaluated and that were trained on the same images:
    other distances cannot be compared.

    Args:
        runs: at least one run, the newest first.
    """
    found: dict[str, tuple[tuple[Any, Any], float]] = {}
    for name, run in runs.items():
        report = read_or_warn(run / "evaluation" / "evaluation.json").get("report")
        if not isinstance(report, dict):
            continue
        judged = report.get("judge") if isinstance(report.get("judge"), dict) else {}
        identity = read_or_warn(run / "run.json").get("identity")
        images = identity.get("dataset_hash") if isinstance(identity, dict) else None
        distance = judged.get("kernel_distance")
        found[name] = ((judged.get("network"), images), distance if is_finite(distance) else math.inf)
    if not found:
        return next(iter(runs))
    newest = next(iter(found))
    same = [name for name, (kind, _) in found.items() if kind == found[newest][0] and None not in kind]
    return min(same or [newest], key=lambda name: found[name][1])


def first_prompt(run: Path) -> str:
    """Return the first prompt of a run's samples, which is the default prompt of a picture."""
    section = read_settings(run).get("train_unet")
    prompts = section.get("validation_prompts") if isinstance(section, dict) else None
    return str(prompts[0]) if isinstance(prompts, list) and prompts else "a flower"


def warn_of_cut_prompts(run: Path, prompts: Sequence[str]) -> None:
    """Warn of prompts that are too long for the run's model, and quote the words that the model does not read."""
    folder = run / "pipeline" / "tokenizer"
    limit = read_or_warn(folder / "tokenizer_config.json").get("model_max_length")
    long = [prompt for prompt in dict.fromkeys(prompts) if is_finite(limit) and len(prompt.encode()) + 2 > limit]
    for prompt in long:
        try:
            if (folder / "tokenizer.json").is_file() and _tokens(folder, prompt) <= limit:
                continue
            warning = cut_prompt(_tokenizer(folder), prompt)
        except Exception:  # of a damaged file; the model that needs it says so when it is loaded
            return
        if warning:
            st.warning(escape(warning))


@lru_cache(maxsize=1024)
def _tokens(folder: Path, prompt: str) -> int:
    """Return how many tokens a prompt has."""
    from tokenizers import Tokenizer  # transformers would take a second to import

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return len(tokenizer.encode(prompt).ids)


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer  # its first import takes a second, and only prompts that are cut need it

    return CLIPTokenizer.from_pretrained(folder)


# --- Values of files -------------------------------------------------------------------------------------------------
