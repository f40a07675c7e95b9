"""Submit a training to Amazon SageMaker with an accelerate YAML, and download the training's result.

python scripts/launch_sagemaker.py --config_file accelerate_configs/sagemaker.yaml scripts/train_unet.py --config flowers
python scripts/launch_sagemaker.py --config_file accelerate_configs/sagemaker.yaml --fetch JOB

The arguments after the training script's name belong to the script, and are sent as typed. In each container of the
job, `accelerate launch` runs the script with the YAML that --inside names. The launcher checks the job, shows it and
asks for consent before it sends anything to AWS.

AWS's packages are imported in functions, because importing them takes seconds. --help and refused commands need none of
AWS's packages.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from t2i.clouds import aws_account as aws
from t2i.clouds import aws_errors, costs, launch, sagemaker_job, staging
from t2i.clouds.staging import ROOT, Command, hash_inputs, read_inside
from t2i.config import check_optimizer
from t2i.data.split_names import FOLDER_SHARD
from t2i.errors import UserError, run_main
from t2i.files import read_optional, write_json

CONFIGS = ROOT / "accelerate_configs"
LOGS = "/aws/sagemaker/TrainingJobs"  # CloudWatch's group
POLL_S = 10.0
ENDED = ("Completed", "Failed", "Stopped")


def main() -> None:
    options = read_options()
    launch.check_options(options)
    file = Path(options.config_file)
    config = None if options.stop or options.fetch else sagemaker_job.read_config(file)
    place = config or staging.read_keys(sagemaker_job.Place, file)
    aws.find_region(place)
    with aws_errors.in_words():  # errors that have no sentence of their own
        if config:
            plan_and_submit(options, config)
        elif options.stop:
            stop(options.stop, place)
        else:
            folder = staging.expand_user(options.output_dir or f"outputs/{options.fetch}")
            fetch(options.fetch, folder, place, follows=options.wait)


def plan_and_submit(options: argparse.Namespace, config: sagemaker_job.SageMakerConfig) -> None:
    """Check the command and the account, show the plan, ask, and submit the job."""
    command = sagemaker_job.read_command(options.command)
    inside = Path(options.inside)
    inner = read_inside(inside)
    sagemaker_job.check_precision(config, inside, inner)
    if command.script in ("train_unet.py", "distill_unet.py"):  # the others never run under DeepSpeed
        check_optimizer(command.settings.optimizer, inner)
    sagemaker_job.tracking_server(config)  # refuses an address that cannot be used
    inputs = sagemaker_job.local_inputs(command, config)
    sagemaker_job.check_isolation(command, config, inputs)
    token = aws.secrets_here(config).get("HF_TOKEN", "")
    launch.check_push(command, token_travels=bool(token))
    own_secret = sagemaker_job.SECRETS in config.additional_args.environment  # may hold another token
    unchecked = "" if own_secret else launch.check_hub_ids(command, inputs, token)

    # check the account
    account = aws.look(config, inputs)
    if account.missing and not options.dry_run:
        raise UserError("; ".join(account.missing))

    # plan
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    prices = costs.read_prices()
    images = options.train_images or (costs.count_images(command.recipe.data) if command.recipe else None)
    estimate = costs.estimate(command, config, inner, prices, images, options.samples_per_second)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "code"
        sagemaker_job.stage(source, command, config, inside, inputs)
        folders = hash_inputs(command, inputs)
        hashes = {name: digest for name, (digest, _) in folders.items()}
        files = {name: local_files for name, (_, local_files) in folders.items()}
        secrets = aws.secrets_here(config)
        where = f"{config.region} ({config.region_from})"
        plan = [f"{command.script} on SageMaker in {where}, in each container by {inside.name}:"]
        plan += costs.report(estimate, command, config, prices)
        all_notes = [
            *notes(command, config, estimate, secrets),
            launch.precision_note(config.ec2_instance_type, config.mixed_precision, inner),
            unchecked,
        ]
        plan += [f"NOTE: {note}" for note in all_notes if note]
        plan += [f"MISSING: {sentence}" for sentence in account.missing]
        if options.dry_run:
            request = build_request(config, account, source, aws.channels_of(inputs, hashes, account), secrets)
            print(json.dumps(request, indent=2, default=str))
            print("\n".join(plan), file=sys.stderr)
            return
        print("\n".join(plan))
        launch.confirm(options.yes)

        # submit
        channels = aws.upload(inputs, files, hashes, account)
        secret = aws.store_secret(config, secrets, account)
        job = submit(config, account, source, channels, secret)
    file = shlex.quote(str(options.config_file))
    print(
        f"submitted {job}\n"
        f"  state: aws sagemaker describe-training-job --training-job-name {job} --region {config.region}\n"
        f"  stop:  python scripts/launch_sagemaker.py --config_file {file} --stop {job}\n"
        f"  fetch: python scripts/launch_sagemaker.py --config_file {file} --fetch {job}"
        f"{launch.place_of_student(command, job)}"
    )
    if options.wait and (bad_end := describe_end(job, follow(job, config, account.session))):
        raise UserError(bad_end)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config_file", default=str(CONFIGS / "sagemaker.yaml"), help="accelerate's YAML for SageMaker"
    )
    parser.add_argument(
        "--inside",
        default=str(CONFIGS / "deepspeed_zero2.yaml"),
        help="accelerate's YAML for the training in the job's containers",
    )
    launch.add_options(parser)
    return parser.parse_args()


# --- The plan --------------------------------------------------------------------------------------------------------


def notes(
    command: Command,
    config: sagemaker_job.SageMakerConfig,
    estimate: costs.Estimate,
    secrets: dict[str, str],
) -> list[str]:
    """Return sentences that a user should read before paying for the job."""
    spot = "spot " if config.additional_args.use_spot_instances else ""
    texts = [
        f"accounts start with a quota of 0 for {config.ec2_instance_type}; request {config.num_machines} or more in Service Quotas, "
        f'SageMaker, "{config.ec2_instance_type} for {spot}training job usage"'
    ]
    if secrets:
        texts.append(
            f"{', '.join(secrets)} go to Secrets Manager as {aws.secret_name(config, secrets)}; the role must be allowed to read it"
        )
    unsent = launch.secrets_here(sagemaker_job.tracking_server(config)[0])
    if unsent and config.additional_args.enable_network_isolation:
        texts.append(f"the job gets no {', '.join(unsent)}, since it has no network (enable_network_isolation)")
    if command.recipe is None:
        texts.append(
            f"{command.script} is your own script: local folders in its arguments are not sent; "
            f"--fetch brings home what the script writes to {sagemaker_job.RUN}"
        )
    own_secret = sagemaker_job.SECRETS in config.additional_args.environment
    if getattr(command.settings, "push_to_hub", False) and "HF_TOKEN" not in secrets and not own_secret:
        texts.append("push_to_hub needs a token in the job: export HF_TOKEN (the token of hf auth login is not sent)")
    if note := sagemaker_job.tracking_server(config)[1]:
        texts.append(note)
    texts += sagemaker_job.estimator_notes(config)
    too_long = costs.too_long(estimate, config)
    return [*texts, too_long] if too_long else texts


# --- The request -----------------------------------------------------------------------------------------------------


def build_request(
    config: sagemaker_job.SageMakerConfig,
    account: aws.Account,
    source: Path,
    channels: dict[str, str],
    secrets: dict[str, str],
) -> dict[str, Any]:
    """Return the job's request as the SDK would send it to AWS. Making the request sends nothing."""
    import boto3
    from botocore.exceptions import EndpointConnectionError
    from sagemaker.core.helper.session_helper import Session

    class DrySession(Session):  # without the two methods that write to S3
        def upload_data(self, path: str, bucket: str, key_prefix: str = "data", **_: Any) -> str:
            return f"s3://{bucket}/{key_prefix}"

        def default_bucket(self) -> str:
            return account.bucket

    class Seen(Exception):
        pass

    def stop(params: dict[str, Any], **_: Any) -> None:
        raise Seen(params)

    def refuse(request: Any, **_: Any) -> None:
        raise EndpointConnectionError(endpoint_url=request.url)

    boto = boto3.Session("-", "-", region_name=config.region, profile_name=config.profile)
    boto.events.register("provide-client-params.sagemaker.CreateTrainingJob", stop)
    boto.events.register_first("before-send", refuse)
    quick = {
        "SAGEMAKER_VALIDATE_ROLE": "false",  # `aws.look` checked the role as far as possible
        "AWS_MAX_ATTEMPTS": "1",  # what is refused here need not be tried again
    }
    before = {name: os.environ.get(name) for name in quick}
    os.environ.update(quick)
    secret = aws.secret_name(config, secrets) if secrets else None
    try:
        trainer(
            config, account, aws.sdk_session(account, DrySession, boto_session=boto), source, channels, secret
        ).train(wait=False)
    except Seen as seen:
        return seen.args[0]
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    raise AssertionError("the SDK sent no CreateTrainingJob")


def trainer(
    config: sagemaker_job.SageMakerConfig,
    account: aws.Account,
    session: Any,
    source: Path,
    channels: dict[str, str],
    secret: str | None,
) -> Any:
    """Return the SageMaker SDK's `ModelTrainer` for this job."""
    from sagemaker.core.shapes import MetricDefinition, S3DataSource
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import (
        CheckpointConfig,
        Compute,
        InputData,
        Networking,
        OutputDataConfig,
        SourceCode,
        StoppingCondition,
        Tag,
    )

    extra = config.additional_args
    spot = extra.use_spot_instances
    networking = None
    if extra.subnets or extra.encrypt_inter_container_traffic or extra.enable_network_isolation:
        networking = Networking(
            subnets=extra.subnets or None,
            security_group_ids=extra.security_group_ids or None,
            enable_network_isolation=extra.enable_network_isolation or None,
            enable_inter_container_traffic_encryption=extra.encrypt_inter_container_traffic or None,
        )
    streamed = extra.input_mode == "FastFile"
    output = {"s3_output_path": extra.output_path, "kms_key_id": extra.output_kms_key}

    def data(uri: str) -> Any:  # the SDK copies a plain text, whatever the job's input mode
        kind = {"s3_data_type": "S3Prefix", "s3_data_distribution_type": "FullyReplicated"}
        return S3DataSource(s3_uri=uri, **kind) if streamed else uri

    made = ModelTrainer(
        sagemaker_session=session,
        role=account.role,
        base_job_name=config.base_job_name,
        training_image=account.image,
        # `exec` makes the script the container's first process, which SageMaker's SIGTERM reaches.
        source_code=SourceCode(
            source_dir=str(source),
            requirements=None if extra.enable_network_isolation else "scripts/requirements.txt",
            command="exec python3 scripts/run_sagemaker_job.py",
        ),
        compute=Compute(
            instance_type=config.ec2_instance_type,
            instance_count=config.num_machines,
            volume_size_in_gb=extra.volume_size,
            volume_kms_key_id=extra.volume_kms_key,
            keep_alive_period_in_seconds=extra.keep_alive_period_in_seconds,
            enable_managed_spot_training=spot or None,
        ),
        networking=networking,
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=extra.max_run,
            max_wait_time_in_seconds=(extra.max_wait or extra.max_run) if spot else None,
        ),
        checkpoint_config=CheckpointConfig(s3_uri=extra.checkpoint_s3_uri),
        output_data_config=OutputDataConfig(**output) if any(output.values()) else None,
        training_input_mode=extra.input_mode,
        input_data_config=[InputData(channel_name=name, data_source=data(uri)) for name, uri in channels.items()],
        environment=environment(config, secret),
        tags=[Tag(key=key, value=value) for key, value in extra.tags.items()] or None,
    )
    if config.sagemaker_metrics_file:
        metrics = sagemaker_job.read_table(config.sagemaker_metrics_file, "sagemaker_metrics_file")
        made.with_metric_definitions([MetricDefinition(name=name, regex=regex) for name, regex in metrics.items()])
    return made


def environment(config: sagemaker_job.SageMakerConfig, secret: str | None) -> dict[str, str]:
    """Return the environment variables of the container. `secret` names the job's secret in Secrets Manager."""
    server, _ = sagemaker_job.tracking_server(config)
    variables = launch.forwarded_variables(server, config.additional_args.environment)
    return variables | {sagemaker_job.SECRETS: secret} if secret else variables


def submit(
    config: sagemaker_job.SageMakerConfig,
    account: aws.Account,
    source: Path,
    channels: dict[str, str],
    secret: str | None,
) -> str:
    """Submit the job to SageMaker and return the job's name."""
    begin, end = "SageMaker does not accept the job: ", "; nothing runs and nothing is billed"
    try:
        with aws_errors.in_words(begin, end):
            made = trainer(config, account, aws.sdk_session(account), source, channels, secret)
            made.train(wait=False, logs=False)
    except ValueError as error:  # from the SDK's checks of the role and of the request
        raise UserError(f"{begin}{aws_errors.brief(error)}{end}") from None
    return made._latest_training_job.training_job_name


# --- Waiting and fetching --------------------------------------------------------------------------------------------


def follow(job: str, config: sagemaker_job.Place, session: Any) -> dict[str, Any]:
    """Print the job's log until the job ends, and return SageMaker's description. Ctrl-C leaves the job running."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, logs = session.client("sagemaker"), session.client("logs")
    seen: dict[str, str] = {}
    start, status = time.monotonic(), ""
    try:
        while True:
            state = client.describe_training_job(TrainingJobName=job)
            for line in new_lines(logs, job, seen):
                print(line)
            now = f"{state['TrainingJobStatus']}, {state.get('SecondaryStatus', '')}"
            if now != status:
                print(f"[{(time.monotonic() - start) / 60:.0f} min] {now}", flush=True)
                status = now
            if state["TrainingJobStatus"] in ENDED:
                break
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(
            f"\n{job} keeps running; stop it with --stop {job}, or follow it again with --fetch {job} --wait",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    except (ClientError, BotoCoreError) as error:
        if is_unknown(error):
            raise UserError(f"{job} cannot be followed: {aws_errors.brief(error)}; {check_name(config)}") from None
        raise UserError(
            f"{job} cannot be followed any more: {aws_errors.explain(error)}; it keeps running, and "
            f"--fetch {job} --wait follows it again"
        ) from None
    paid, ran = state.get("BillableTimeInSeconds"), state.get("TrainingTimeInSeconds")
    if paid and ran:
        print(f"trained {ran / 60:.0f} min, billed {paid / 60:.0f} min per machine")
    return dict(state)


def describe_end(job: str, state: dict[str, Any]) -> str:
    """Return how a job ended that did not complete, and how its run resumes. Return "" for a completed job."""
    if state["TrainingJobStatus"] == "Completed":
        return ""
    uri = state.get("CheckpointConfig", {}).get("S3Uri")
    return (
        f"{job} ended as {state['TrainingJobStatus']}: {state.get('FailureReason', 'no reason given')}; "
        f"a new job resumes from its checkpoints with checkpoint_s3_uri: {uri}"
    )


def new_lines(logs: Any, job: str, seen: dict[str, str]) -> list[str]:
    """Return the log lines of all machines since the last call.

    Each call updates `seen`, which holds the next token of each log stream: `{stream: token}`.
    """
    from botocore.exceptions import ClientError

    lines = []
    try:
        streams = logs.describe_log_streams(logGroupName=LOGS, logStreamNamePrefix=f"{job}/")["logStreams"]
    except ClientError:  # the first job of an account creates the group
        return []
    for stream in streams:
        name = stream["logStreamName"]
        host = name.split("/")[-1].rpartition("-")[0]  # JOB/algo-1-1732000000
        while True:
            token = {"nextToken": seen[name]} if name in seen else {}
            # AWS requires startFromHead with each token, too.
            answer = logs.get_log_events(logGroupName=LOGS, logStreamName=name, startFromHead=True, **token)
            lines += [f"{host}: {event['message'].rstrip()}" for event in answer["events"]]
            if answer["nextForwardToken"] == seen.get(name):
                break
            seen[name] = answer["nextForwardToken"]
    return lines


def is_unknown(error: Exception) -> bool:
    """Return whether AWS answers that a job, or an object of it, does not exist."""
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return code in ("ValidationException", "ResourceNotFound", "404", "NoSuchKey", "NoSuchBucket")


def check_name(config: sagemaker_job.Place) -> str:
    """Return the advice for an unknown job."""
    return f"check its name and the region {config.region} ({config.region_from})"


def stop(job: str, config: sagemaker_job.Place) -> None:
    """Ask SageMaker to stop a job. The job saves a checkpoint first."""
    from botocore.exceptions import ClientError

    session = aws.open_session(config)
    aws.check_credentials(session)
    client = session.client("sagemaker")
    try:
        status = client.describe_training_job(TrainingJobName=job)["TrainingJobStatus"]
        if status in ENDED:
            raise UserError(f"{job} has ended already ({status}); nothing is left to stop")
        client.stop_training_job(TrainingJobName=job)
    except ClientError as error:
        if is_unknown(error):
            raise UserError(f"{job} cannot be stopped: {aws_errors.brief(error)}; {check_name(config)}") from None
        raise UserError(f"{job} cannot be stopped: {aws_errors.explain(error)}") from None
    print(f"{job} is being stopped; it saves a checkpoint first, and --fetch brings its curves home")


def fetch(job: str, folder: Path, config: sagemaker_job.Place, follows: bool) -> None:
    """Download the result of an ended job as a run folder: model, settings, curves and samples, but no checkpoints.

    With `follows`, print the job's log until the job ends. A job that did not complete is fetched, too, and then raises
    `UserError`.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        with launch.fetched_into(folder) as part:
            session = aws.open_session(config)
            aws.check_credentials(session)
            if follows:
                follow(job, config, session)
            state = session.client("sagemaker").describe_training_job(TrainingJobName=job)
            if state["TrainingJobStatus"] not in ENDED:
                raise UserError(
                    f"{job} is still running ({state.get('SecondaryStatus', '')}); fetch it when it has ended, or add --wait"
                )
            s3, uri = session.client("s3"), state.get("CheckpointConfig", {}).get("S3Uri")
            fetch_model(s3, state.get("ModelArtifacts", {}).get("S3ModelArtifacts"), part)
            if uri:
                fetch_run(s3, uri, part)
            write_json(part / "sagemaker.json", {key: state.get(key) for key in ("TrainingJobName", "TrainingJobStatus",
                       "BillableTimeInSeconds", "TrainingTimeInSeconds", "FailureReason", "ResourceConfig")})  # fmt: skip
    except ClientError as error:
        if is_unknown(error):
            raise UserError(f"{job} cannot be fetched: {aws_errors.brief(error)}; {check_name(config)}") from None
        raise UserError(f"{job} cannot be fetched: {aws_errors.explain(error)}") from None
    except BotoCoreError:  # some of these are OSErrors, too
        raise
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{job} cannot be stored in {folder} ({aws_errors.brief(error)}); make room, and fetch it again"
        ) from None
    launch.say_fetched(folder, describe_end(job, state), follows)


def fetch_run(s3: Any, uri: str, folder: Path) -> None:
    """Download the run folder's own files without checkpoints.

    A finished run whose job failed later, such as by its push to the Hub, has its model only here. A model that `folder`
    already has from the job's archive is left out, and so is the incomplete model of an unfinished run.
    """
    parts = urlsplit(uri)
    prefix = f"{parts.path.strip('/')}/run/".lstrip("/")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=parts.netloc, Prefix=prefix)
    found = {item["Key"][len(prefix) :]: item["LastModified"] for page in pages for item in page.get("Contents", [])}
    wanted = {name for name in found if launch.is_result(name)} - stale_shards(found)
    model = {name for name in wanted if name.startswith(("pipeline/", "vae/"))}
    here = tuple(f"{name}/" for name in ("pipeline", "vae") if (folder / name).is_dir())
    download(s3, parts.netloc, prefix, wanted - model, folder)
    if read_optional(folder / "run.json").get("status") == "finished":
        missing = {name for name in model if not name.startswith(here)}
        download(s3, parts.netloc, prefix, missing, folder)


def download(s3: Any, bucket: str, prefix: str, names: set[str], folder: Path) -> None:
    """Download objects below a prefix of a bucket to the same relative paths below `folder`."""
    for name in sorted(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, prefix + name, str(folder / name))


def stale_shards(dates: dict[str, datetime]) -> set[str]:
    """Return the shards of earlier captionings: SageMaker's sync deletes nothing, so they lie beside those of the last one.

    Args:
        dates: date of each file of the run folder.
    """
    sets: dict[str, dict[int, list[str]]] = {}  # split -> number of shards -> shards
    for name in dates:
        if shard := re.fullmatch(FOLDER_SHARD, name):
            sets.setdefault(shard["split"], {}).setdefault(int(shard["count"]), []).append(name)
    stale: set[str] = set()
    for by_count in sets.values():
        ages = {count: (len(names) == count, max(dates[name] for name in names)) for count, names in by_count.items()}
        newest = max(ages, key=lambda count: ages[count])  # a complete set before others
        stale |= {name for count, names in by_count.items() if count != newest for name in names}
    return stale


def fetch_model(s3: Any, uri: str | None, folder: Path) -> None:
    """Download the model of a job, if the job has saved one."""
    from botocore.exceptions import ClientError

    if not uri:
        return
    parts = urlsplit(uri)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "model.tar.gz"
        try:
            s3.download_file(parts.netloc, parts.path.lstrip("/"), str(archive))
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return
            raise
        with tarfile.open(archive) as tar:
            for member in tar:  # The filters of `tarfile`, which refuse bad archives, need Python 3.11.4.
                path, file = PurePath(member.name), tar.extractfile(member) if member.isfile() else None
                is_known = file is not None or member.isdir()
                if not is_known or path.is_absolute() or path.drive or ".." in path.parts:
                    raise UserError(
                        f"{uri} holds {member.name!r}, which is no plain file in a folder of its own; nothing was fetched"
                    )
                if file:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    with open(folder / path, "wb") as copy:
                        shutil.copyfileobj(file, copy)


if __name__ == "__main__":
    run_main(main)
