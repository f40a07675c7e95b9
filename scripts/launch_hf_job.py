"""Submit a training to Hugging Face Jobs, resume it, follow it, stop it, and download its result.

python scripts/launch_hf_job.py --config_file accelerate_configs/hf_jobs.yaml scripts/train_unet.py --config flowers
python scripts/launch_hf_job.py --config_file accelerate_configs/hf_jobs.yaml --fetch JOB

The arguments after the training script's name belong to the script, and are sent as typed. Checkpoints go to a private
repository of yours as they are made. The same command resumes from them after a timeout, a stop or a failure. The
launcher checks the job, shows it and asks for consent before it sends anything to the Hub.

huggingface_hub is imported in functions, because importing it takes a second, which --help need not take.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.clouds import costs, hf_job, launch, staging
from t2i.config import check_optimizer
from t2i.errors import UserError, run_main
from t2i.files import write_json

if TYPE_CHECKING:
    from t2i.clouds.hf_account import Account, Run

CONFIGS = staging.ROOT / "accelerate_configs"


def main() -> None:
    options = read_options()
    launch.check_options(options)
    file = Path(options.config_file)
    config = None if options.stop or options.fetch else hf_job.read_config(file)
    payer = config or staging.read_keys(hf_job.Payer, file)
    from t2i.clouds import hf_account

    with hf_account.in_words():  # errors that have no sentence of their own
        account = hf_account.look(payer)
        if config:
            plan_and_submit(options, config, account)
        elif options.stop:
            stop(options.stop, account)
        else:
            folder = staging.expand_user(options.output_dir or f"outputs/{options.fetch}")
            fetch(options.fetch, folder, account, follows=options.wait)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_file", default=str(CONFIGS / "hf_jobs.yaml"), help="the YAML for Hugging Face Jobs")
    parser.add_argument(
        "--inside", help="accelerate's YAML for the training in the container (default: by the flavor's GPUs)"
    )
    launch.add_options(parser)
    return parser.parse_args()


# --- The plan --------------------------------------------------------------------------------------------------------


def plan_and_submit(options: argparse.Namespace, config: hf_job.HfJobsConfig, account: "Account") -> None:
    """Check the command, show the plan, ask, and submit the job."""
    from t2i.clouds import hf_account
    from t2i.training.distributed import quiet_libraries

    hf_job.check_secrets(config, Path(options.config_file))
    hf_account.ask_hardware(account)
    hf_account.check_flavor(config, account)
    command = staging.read_command(options.command, hf_job.CLOUD)
    prices = costs.read_prices(hf_job.PRICES)
    hf_account.renew_prices(prices, account)
    gpus = hf_account.count_gpus(config.flavor, prices, account)
    inside = Path(options.inside) if options.inside else hf_job.default_inside(config.flavor, gpus)
    inner = staging.read_inside(inside)
    hf_job.check_precision(config, inside, inner, 1 if gpus is None else gpus)
    if command.script in ("train_unet.py", "distill_unet.py"):  # the others never run under DeepSpeed
        check_optimizer(command.settings.optimizer, inner)
    inputs = hf_job.local_inputs(command)
    launch.check_push(command, token_travels=bool(account.token))
    if account.missing and not options.dry_run:
        raise UserError("; ".join(account.missing))
    unchecked = "" if account.missing else launch.check_hub_ids(command, inputs, account.token)
    hashes = {name: digest for name, (digest, _) in staging.hash_inputs(command, inputs).items()}
    repo_id = f"{account.namespace or 'NAMESPACE'}/{hf_job.run_name(command, config, hashes)}"
    whole = hf_job.command_hash(command, hashes)
    images = options.train_images or (costs.count_images(command.recipe.data) if command.recipe else None)
    quiet_libraries()  # counting a UNet's weights imports torch and transformers
    estimate = costs.estimate(command, config, inner, prices, images, options.samples_per_second)
    run = hf_account.find_run(account, repo_id, whole)
    if not options.dry_run:
        check_run(run, estimate, command.script)
    secrets = hf_job.secrets_here(config, account.token)
    plan = [f"{command.script} on {hf_job.CLOUD}, in the container by {inside.name}:"]
    plan += costs.report(estimate, command, config, prices)
    slow = launch.precision_note(config.flavor, config.mixed_precision, inner)
    all_notes = [*notes(command, config, estimate, repo_id, run.newest, secrets), slow, unchecked]
    plan += [f"NOTE: {note}" for note in all_notes if note]
    plan += [f"MISSING: {sentence}" for sentence in account.missing]
    if options.dry_run:
        hidden = dict.fromkeys(secrets, "[redacted]")
        request = hf_job.request(config, account.namespace or "NAMESPACE", repo_id, "COMMIT", whole, hidden)
        print(json.dumps(request, indent=2))
        print("\n".join(plan), file=sys.stderr)
        return
    print("\n".join(plan))
    launch.confirm(options.yes)
    run = hf_account.find_run(account, repo_id, whole)  # meanwhile, another launch may have been faster
    check_run(run, estimate, command.script)
    job = submit(command, config, account, inside, inputs, hashes, repo_id, secrets)
    own = f"python scripts/launch_hf_job.py --config_file {shlex.quote(str(options.config_file))}"
    fetch = f"{own} --fetch {job.id}{launch.place_of_student(command, job.id)}"
    print(f"submitted {job.id}\n  page:  {job.url}\n  stop:  {own} --stop {job.id}\n  fetch: {fetch}")
    if options.wait:
        ended = follow(job.id, account)
        if ended.status.stage != "COMPLETED":
            raise UserError(hf_account.describe_end(account.api, ended))


def check_run(run: "Run", estimate: costs.Estimate, script: str) -> None:
    """Raise `UserError` if the run of the command's repository is at work, has finished, or cannot be resumed by this command."""
    if run.active:
        raise UserError(
            f"{run.active} is at work on the same command; stop it with --stop {run.active}, or fetch it once it ended"
        )
    longer = estimate.updates and run.steps and estimate.updates > run.steps
    if script == "train_vae.py" and run.completed and not run.newest and (run.finished_by or longer):
        raise UserError(
            f"{run.completed} has finished the run of this command, and no checkpoint is left to extend it from; bring it home "
            f"with --fetch {run.completed}, and train it further as a new run with --vae outputs/{run.completed}"
        )
    if job := run.finished_by:
        raise UserError(
            f"{job} has finished the run of this command; bring it home with --fetch {job}, raise --max_train_steps to extend "
            "it, or start another run, for example by --run_name"
        )
    other, now = "", estimate
    if run.steps and now.updates and now.updates < run.steps:
        other = f"fewer updates than its run ({now.updates} instead of {run.steps}); raise --max_train_steps"
    elif run.global_batch and now.global_batch and now.global_batch != run.global_batch:
        numbers = f"{now.global_batch} instead of {run.global_batch}"
        other = f"another number of samples per update than its run ({numbers}); choose a flavor with as many GPUs"
    if other:
        raise UserError(f"this command asks for {other}, or start another run, for example with --run_name")


def notes(
    command: staging.Command, config: hf_job.HfJobsConfig, estimate: costs.Estimate, repo_id: str, newest: str,
    secrets: dict[str, str],
) -> list[str]:  # fmt: skip
    """Return sentences that a user should read before paying for the job."""
    save = config.save_before_timeout / 60
    texts = [
        f"the run is kept in the private repository {repo_id}",
        f"the training resumes there from {newest}" if newest else "the training starts anew, since no run is there",
        f"{save:g} min before the timeout the training saves a checkpoint and ends; the same command resumes from it",
        f"the job gets these secrets: {', '.join(secrets)}",
    ]
    if command.recipe is None:
        texts.append(
            f"{command.script} is your own script: local folders in its arguments are not sent; "
            f"--fetch brings home what the script writes to {hf_job.WORK}/run"
        )
    return [text for text in (*texts, hf_job.tracking_server(config)[1], costs.too_long(estimate, config)) if text]


def submit(
    command: staging.Command, config: hf_job.HfJobsConfig, account: "Account", inside: Path, inputs: dict[str, str],
    hashes: dict[str, str], repo_id: str, secrets: dict[str, str],
) -> Any:  # fmt: skip
    """Upload inputs and code, submit the job, and return the Hub's `JobInfo`."""
    from t2i.clouds import hf_account

    teacher = command.teacher
    files = {"model": teacher.names} if teacher else {}
    repositories = hf_account.upload_inputs(account, inputs, hashes, files)
    with tempfile.TemporaryDirectory() as name:
        hf_job.stage(Path(name), command, config, inside, repositories, repo_id)
        commit = hf_account.upload_code(Path(name), repo_id)
    whole = hf_job.command_hash(command, hashes)
    with hf_account.in_words("the Hub does not start the job: ", "; nothing runs and nothing is billed"):
        return account.api.run_job(**hf_job.request(config, account.namespace, repo_id, commit, whole, secrets))


# --- Jobs ------------------------------------------------------------------------------------------------------------


def follow(job_id: str, account: "Account") -> Any:
    """Print the job's log until the job ends, and return the Hub's `JobInfo`. Ctrl-C leaves the job running."""
    from t2i.clouds import hf_account

    account.require()
    keeps = f"; {job_id} keeps running, and --fetch {job_id} --wait follows it again"
    try:
        with hf_account.in_words("the log cannot be followed any more: ", keeps):
            for line in account.api.fetch_job_logs(job_id=job_id, namespace=account.namespace, follow=True):
                print(line, flush=True)
            job = account.api.wait_for_job(job_id, namespace=account.namespace)
    except KeyboardInterrupt:
        print(f"\n{job_id} keeps running; stop it with --stop {job_id}", file=sys.stderr)
        raise SystemExit(130) from None
    if job.durations and job.durations.running_secs:
        print(f"{job_id} ran {job.durations.running_secs / 60:.0f} min")
    return job


def stop(job_id: str, account: "Account") -> None:
    """Cancel a job. Its checkpoints and captions stay in its repository."""
    from t2i.clouds import hf_account
    from t2i.clouds.mirror import CAPTIONS_S

    account.require()
    job = account.api.inspect_job(job_id=job_id, namespace=account.namespace)
    if not hf_account.repository_of(job):
        raise UserError(f"{job_id} was not submitted by this suite; stop a job that `make jobs` lists")
    if job.status.stage in hf_account.ENDED:
        raise UserError(f"{job_id} has ended already ({job.status.stage}); nothing is left to stop")
    account.api.cancel_job(job_id=job_id, namespace=account.namespace)
    print(
        f"{job_id} is cancelled; checkpoints and captions in its repository are kept, and the same command resumes from them "
        f"(captions go there every {CAPTIONS_S / 60:g} min)"
    )


def fetch(job_id: str, folder: Path, account: "Account", follows: bool) -> None:
    """Download the run of an ended job as a run folder: model, settings, curves and samples, but no checkpoints.

    With `follows`, print the job's log until the job ends. A job that did not complete is fetched, too, and then raises
    `UserError`.
    """
    from huggingface_hub import snapshot_download

    from t2i.clouds import hf_account

    account.require()
    with launch.fetched_into(folder) as part:
        if follows:
            follow(job_id, account)
        job = account.api.inspect_job(job_id=job_id, namespace=account.namespace)
        repo_id = hf_account.repository_of(job)
        if not repo_id:
            raise UserError(f"{job_id} was not submitted by this suite; fetch a job that `make jobs` lists")
        if job.status.stage not in hf_account.ENDED:
            raise UserError(f"{job_id} is still running; fetch it when it has ended, or add --wait")
        if not account.api.repo_exists(repo_id):
            raise UserError(f"the repository {repo_id} of {job_id} no longer exists, so nothing of its run is left")
        files = [name for name in account.api.list_repo_files(repo_id) if name.startswith("run/")]
        wanted = [name for name in files if launch.is_result(name.removeprefix("run/"))]
        with tempfile.TemporaryDirectory(dir=part.parent) as scratch:
            snapshot_download(
                repo_id,
                allow_patterns=wanted or ["run/run.json"],
                local_dir=scratch,
                token=account.token,
                max_workers=1,
            )
            for path in (Path(scratch) / "run").glob("*"):
                path.replace(part / path.name)
        write_json(
            part / "hf_job.json",
            {"id": job.id, "stage": job.status.stage, "flavor": job.flavor, "repository": repo_id, "url": job.url,
             "running_seconds": job.durations.running_secs if job.durations else None},
        )  # fmt: skip
    launch.say_fetched(
        folder, "" if job.status.stage == "COMPLETED" else hf_account.describe_end(account.api, job), follows
    )


if __name__ == "__main__":
    run_main(main)
