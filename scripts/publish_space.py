"""Publish a model as a Space of the Hugging Face Hub, where everybody can try it: the dashboard's playground on two free cores.

python scripts/publish_space.py --model outputs/demo/unet --space ORG/NAME
python scripts/publish_space.py --model ORG/MODEL --space ORG/NAME --dry_run

The Space is staged as a folder first, which starts here by the very command that the Hub runs. The same command repeats a
push that failed, and changes nothing where nothing changed; what people wrote into the Space's README.md stays.
"""

import shlex
import sys
from dataclasses import dataclass

from t2i.command_line import check_options, parse_options
from t2i.config_types import Flag, PathText, Positive
from t2i.errors import run_main


@dataclass
class Options:
    """The model and its Space."""

    model: PathText | None = None  # run folder of train_unet.py, pipeline folder, or Hub id ORG/MODEL
    space: str | None = None  # ORG/NAME on the Hub; log in by `hf auth login`, or set HF_TOKEN
    dry_run: Flag = False  # stage the folder and say how to start it here; nothing is pushed
    hub_private_repo: Flag = True  # a new Space is private; an existing one stays as it is
    hub_deadline: Positive = 900.0  # s; a push that fails is tried again for so long


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    from t2i.hub import space, upload

    repo_id = upload.check_repo_id(options.space, "--space")
    if not options.dry_run:
        upload.check_access(repo_id, "space")

    # stage
    model = space.find_model(options.model)
    folder = space.stage(model, repo_id)
    environment = f"source {shlex.quote(sys.prefix)}/bin/activate && " if sys.prefix != sys.base_prefix else ""
    print(
        f"staged in {folder} ({space.folder_size(folder) / 1e6:.0f} MB); it starts here, on http://localhost:8501, by"
    )
    print(f"  {environment}cd {shlex.quote(str(folder))} && {shlex.join(space.start_command(folder))}", flush=True)
    if options.dry_run:
        return

    # push
    pushed = space.push(
        folder, repo_id, message=f"Playground of {model.name}", private=options.hub_private_repo,
        deadline=options.hub_deadline,
    )  # fmt: skip
    print(f"{pushed.url} {'has it now' if pushed.changed else 'is up to date'} (commit {pushed.commit[:7]})")
    if pushed.changed:
        print("the Hub builds and starts it within minutes; a new Space is private until its settings say otherwise")


if __name__ == "__main__":
    run_main(main)
