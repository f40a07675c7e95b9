"""Publish a model as a Space of the Hugging Face Hub: anybody can try it in the dashboard's playground, on two free cores.

python scripts/publish_space.py --model outputs/demo/unet --space ORG/NAME
python scripts/publish_space.py --model ORG/MODEL --space ORG/NAME --dry_run

The Space is first staged as a folder, which starts on this machine exactly as on the Hub. Run this script again to
repeat a push that failed. If nothing changed in the Space's folder, a repeated push changes nothing on the Hub. Text
that people wrote into the Space's README.md stays.
"""

import shlex
import sys
from dataclasses import dataclass

from t2i.command_line import check_options, parse_options
from t2i.config_types import Flag, PathText, Positive
from t2i.errors import run_main
from t2i.hub import space, upload


@dataclass
class Options:
    """Options of publishing a Space."""

    model: PathText | None = None  # Run folder of train_unet.py, pipeline folder, or Hub id ORG/MODEL.
    space: str | None = None  # Space ORG/NAME on the Hub. Log in by `hf auth login`, or set HF_TOKEN.
    # Stage the folder of the Space, print how to start the Space on this machine, and push nothing.
    dry_run: Flag = False
    hub_private_repo: Flag = True  # Make a new Space private. An existing Space keeps its visibility.
    hub_deadline: Positive = 900.0  # Seconds during which a failed push is retried.


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    repo_id = upload.check_repo_id(options.space, "--space")
    if not options.dry_run:
        upload.check_access(repo_id, "space")

    # stage
    model = space.find_model(options.model)
    folder = space.stage(model, repo_id)
    environment = f"source {shlex.quote(sys.prefix)}/bin/activate && " if sys.prefix != sys.base_prefix else ""
    print(
        f"staged in {folder} ({space.folder_size(folder) / 1e6:.0f} MB); to start it here, on http://localhost:8501, run"
    )
    print(f"  {environment}cd {shlex.quote(str(folder))} && {shlex.join(space.start_command(folder))}", flush=True)
    if options.dry_run:
        return

    # push
    pushed = space.push(
        folder,
        repo_id,
        message=f"Playground of {model.name}",
        private=options.hub_private_repo,
        deadline=options.hub_deadline,
    )
    print(pushed)
    if pushed.changed:
        print("the Hub builds and starts it within minutes; a new Space is private until you change its settings")


if __name__ == "__main__":
    run_main(main)
