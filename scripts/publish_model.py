"""Publish a finished training run on the Hugging Face Hub: pipeline, model card, pictures, evaluation results.

python scripts/publish_model.py --model outputs/demo/unet --hub_model_id ORG/NAME --license apache-2.0

After the push, stock diffusers loads the model from the Hub, and the model is compared with the run's model. Run this
script again to repeat a push that failed. If nothing changed in the run, a repeated push changes nothing on the Hub.
Text that people wrote into the card on the Hub stays.
"""

from dataclasses import dataclass

from t2i.command_line import check_options, parse_options
from t2i.config_types import Flag, Natural, PathText, Positive
from t2i.errors import run_main
from t2i.hub import publish, upload
from t2i.training.distributed import quiet_libraries


@dataclass
class Options:
    """Options of publishing a model."""

    model: PathText | None = None  # Finished run folder of train_unet.py.
    # Repository ORG/NAME on the Hub. Log in by `hf auth login`, or set HF_TOKEN.
    hub_model_id: str | None = None
    hub_private_repo: Flag = True  # Make a new repository private. An existing repository keeps its visibility.
    hub_deadline: Positive = 900.0  # Seconds during which a failed push is retried.
    hub_revision: str | None = None  # Branch to push to, created from main if it is missing. With None, push to main.
    create_pr: Flag = False  # Open a pull request instead of pushing to main. Each push opens a new pull request.
    # The Hub's identifier of the licence, such as apache-2.0. With None, use the licence of the run, otherwise the
    # licence on the Hub.
    license: str | None = None
    gallery_pictures: Natural = 8  # Pictures on the card, drawn for prompts of the validation and the evaluation.


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    run = publish.find_run(options.model)
    repo_id = upload.check_repo_id(options.hub_model_id, "--hub_model_id")
    publish.choose_license(run, options.license)
    target = upload.Target(options.hub_revision, options.create_pr)
    upload.check_access(repo_id, "model", target=target)
    quiet_libraries()
    publish.publish_run(
        run,
        repo_id,
        license=options.license,
        pictures=options.gallery_pictures,
        private=options.hub_private_repo,
        deadline=options.hub_deadline,
        target=target,
    )


if __name__ == "__main__":
    run_main(main)
