"""Check accelerate's YAML of a launch on this machine. This module imports no torch."""

from pathlib import Path

from t2i.config import read_yaml
from t2i.errors import UserError


def check_launch_config(path: Path, option: str) -> None:
    """Raise `UserError` if accelerate cannot launch a training on this machine by a YAML.

    Args:
        path: path of the YAML.
        option: option that names the YAML, for messages.
    """
    try:
        values = read_yaml(path)
    except OSError as error:
        folder = Path(__file__).parents[2] / "accelerate_configs"
        raise UserError(f"{option} {path} cannot be read ({error.strerror}); name a YAML of {folder}") from None
    if not isinstance(values, dict) or not {"compute_environment", "distributed_type"} & values.keys():
        raise UserError(f"{option} {path} is no YAML of accelerate; name one of accelerate_configs/, or a copy of it")
    for key, text in (("mixed_precision", "no"), ("distributed_type", "NO")):
        if values.get(key) is False:
            raise UserError(f"{option} {path}: YAML reads {key}: {text} as false; write {key}: '{text}'")
    kind = values.get("compute_environment") or "LOCAL_MACHINE"
    if kind != "LOCAL_MACHINE":
        raise UserError(
            f"{option} {path} is for {kind}, not for this machine; submit the job with make train CONFIG={path}"
        )
    if not values.get("distributed_type"):
        raise UserError(f"{option} {path} has no distributed_type; write distributed_type: 'NO' for one process")
