"""Publish a finished training run on the Hugging Face Hub: pipeline, model card, pictures, evaluation results.

python scripts/publish_model.py --model outputs/demo/unet --hub_model_id ORG/NAME --license apache-2.0

The model is loaded back from there by stock diffusers and compared. The same command repeats a push that failed, and
changes nothing where nothing changed; what people wrote into the card on the Hub stays.
"""

from dataclasses import dataclass

from t2i.command_line import check_options, parse_options
from t2i.config_types import Flag, Natural, PathText, Positive
from t2i.errors import run_main


@dataclass
class Options:
    """The model and its repository."""

    model: PathText | None = None  # finished run folder of train_unet.py
    hub_model_id: str | None = None  # ORG/NAME on the Hub; log in by `hf auth login`, or set HF_TOKEN
    hub_private_repo: Flag = True  # a new repository is private; an existing one stays as it is
    hub_deadline: Positive = 900.0  # s; a push that fails is tried again for so long
    hub_revision: str | None = None  # branch to push to, made from main if it is missing; None: main
    create_pr: Flag = False  # open a pull request in place of pushing to main; each push opens a new one
    license: str | None = None  # as the Hub names licences, e.g. apache-2.0; None: the run's, else the one on the Hub
    gallery_pictures: Natural = 8  # pictures on the card, drawn for the validation's and the evaluation's prompts


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    from t2i.hub import publish, upload

    run = publish.find_run(options.model)
    repo_id = upload.check_repo_id(options.hub_model_id, "--hub_model_id")
    publish.choose_license(run, options.license)
    target = upload.Target(options.hub_revision, options.create_pr)
    upload.check_access(repo_id, "model", target=target)
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    publish.publish_run(
        run, repo_id, license=options.license, pictures=options.gallery_pictures, private=options.hub_private_repo,
        deadline=options.hub_deadline, target=target,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
