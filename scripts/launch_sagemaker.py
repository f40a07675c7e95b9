"""Submit a training to Amazon SageMaker by an accelerate YAML, and bring its result home.

python scripts/launch_sagemaker.py --config_file accelerate_configs/sagemaker.yaml scripts/train_unet.py --config flowers
python scripts/launch_sagemaker.py --config_file accelerate_configs/sagemaker.yaml --fetch JOB

What follows the script's name are its own arguments, sent as typed. In each container `accelerate launch` runs the script
with the YAML that --inside names. Nothing is sent before everything was checked, shown and confirmed.
"""

import argparse
import json
import logging
import os
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from t2i import costs, jobs
from t2i.runs import UserError, run_main, write_json

CONFIGS = jobs.ROOT / "accelerate_configs"
LOGS = "/aws/sagemaker/TrainingJobs"  # CloudWatch's group
POLL_S = 10.0
PLACEHOLDER = "000000000000"  # stands for the account in a dry run without credentials
ENDED = ("Completed", "Failed", "Stopped")


def main() -> None:
    options = read_options()
    config = jobs.read_config(Path(options.config_file))
    if options.fetch:
        fetch(options.fetch, Path(options.output_dir or f"outputs/{options.fetch}"), config)
        return
    command = jobs.read_command(options.command)
    inside = check_inside(Path(options.inside))
    inputs = jobs.local_inputs(command, config)

    # look at the account
    account = look(config, inputs, inside)
    if account.missing and not options.dry_run:
        raise UserError("; ".join(account.missing))

    # plan
    from t2i.distributed import quiet_libraries

    quiet_libraries()
    prices = costs.read_prices()
    images = options.train_images or (costs.count_images(command.recipe.data) if command.recipe else None)
    estimate = costs.estimate(command, config, prices, images, options.samples_per_second)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "code"
        jobs.stage(source, command, config, inside, inputs)
        hashes = {channel: jobs.hash_folder(Path(value))[0] for channel, value in inputs.items() if "://" not in value}
        secrets = secrets_here(config)
        plan = [f"{command.script} on SageMaker in {config.region}, in each container by {inside.name}:"]
        plan += costs.report(estimate, command, config, prices)
        plan += [f"NOTE: {note}" for note in notes(config, estimate, secrets)]
        plan += [f"MISSING: {sentence}" for sentence in account.missing]
        if options.dry_run:
            request = build_request(config, account, source, channels_of(inputs, hashes, account), secrets)
            print(json.dumps(request, indent=2, default=str))
            print("\n".join(plan), file=sys.stderr)
            return
        print("\n".join(plan))
        confirm(options.yes)

        # submit
        channels = upload(inputs, hashes, account)
        secret = store_secret(config, secrets, account)
        job = submit(config, account, source, channels, secret)
    print(
        f"submitted {job}\n"
        f"  state: aws sagemaker describe-training-job --training-job-name {job} --region {config.region}\n"
        f"  stop:  aws sagemaker stop-training-job --training-job-name {job} --region {config.region}\n"
        f"  fetch: python scripts/launch_sagemaker.py --config_file {options.config_file} --fetch {job}"
    )
    if options.wait:
        wait(job, config, account)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_file", default=str(CONFIGS / "sagemaker.yaml"), help="accelerate YAML for SageMaker")
    parser.add_argument(
        "--inside",
        default=str(CONFIGS / "deepspeed_zero2.yaml"),
        help="accelerate YAML that holds in the containers",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the request as JSON, and the plan; send nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before submitting")
    parser.add_argument("--wait", action="store_true", help="follow the job's log until it ends")
    parser.add_argument("--train_images", type=positive(int), help="images trained on, for the estimate")
    parser.add_argument("--samples_per_second", type=positive(float), help="of the job, as measured, for the estimate")
    parser.add_argument("--fetch", metavar="JOB", help="bring the result of this job home instead")
    parser.add_argument("--output_dir", help="folder for --fetch (default: outputs/JOB)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="scripts/X.py …", help="script and its arguments")
    return parser.parse_args()


def positive(kind: Any) -> Any:
    """A parser of numbers above zero."""

    def parse(text: str) -> Any:
        if (value := kind(text)) <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    return parse


def check_inside(path: Path) -> Path:
    """The YAML for the containers; it must be one for machines, not for SageMaker."""
    if jobs.read_yaml(path).get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise UserError(f"--inside {path} is for SageMaker itself; name one for machines, such as deepspeed_zero2.yaml")
    return path


# --- The account -----------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """Where the job goes: what could be learnt of it, and what is missing."""

    session: Any  # boto3's; None without credentials
    number: str = PLACEHOLDER
    bucket: str = ""  # SageMaker's, of the account
    role: str = ""  # ARN
    image: str = ""
    missing: list[str] = field(default_factory=list)  # sentences for the user


def look(config: jobs.SageMakerConfig, inputs: dict[str, str], inside: Path) -> Account:
    """Check against AWS what the job needs. Raises `UserError` for what no account mends; lists the rest in `missing`."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ProfileNotFound
    from sagemaker.core import image_uris

    logging.getLogger("sagemaker").setLevel(logging.ERROR)  # what it says of defaults is in the plan
    try:
        session = boto3.Session(profile_name=config.profile, region_name=config.region)
    except ProfileNotFound:
        raise UserError(
            f"profile {config.profile} is not in ~/.aws; run aws configure --profile {config.profile}"
        ) from None
    kinds = session.client("sagemaker", aws_access_key_id="-", aws_secret_access_key="-").meta.service_model
    known = kinds.shape_for("TrainingInstanceType").enum
    if config.ec2_instance_type not in known:
        near = ", ".join(
            sorted(kind for kind in known if kind.split(".")[1] == config.ec2_instance_type.split(".")[1])[:4]
        )
        raise UserError(
            f"ec2_instance_type {config.ec2_instance_type} is no machine that SageMaker trains on"
            + (f"; of that family there are {near}" if near else "; take ml.g4dn.xlarge, or look at AWS's list")
        )
    if config.region not in session.get_available_regions("sagemaker"):
        raise UserError(f"region {config.region} is none that has SageMaker; take us-east-1, or look at AWS's list")
    account = Account(session)
    account.image = config.image_uri or find_image(image_uris, config)
    try:
        account.number = session.client("sts").get_caller_identity()["Account"]
    except NoCredentialsError:
        account.missing.append(
            "no AWS credentials: run aws configure, or export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    except (ClientError, BotoCoreError) as error:
        account.missing.append(
            f"AWS does not accept the credentials ({brief(error)}); run aws configure, or aws sso login"
        )
    account.bucket = f"sagemaker-{config.region}-{account.number}"  # as the SDK names it
    account.role = find_role(config, account)
    if not account.missing:
        check_buckets(config, inputs, account)
    return account


def find_image(image_uris: Any, config: jobs.SageMakerConfig) -> str:
    """AWS's image for the YAML's versions."""
    wanted: dict[str, Any] = {"framework": "pytorch", "version": config.pytorch_version}
    if config.transformers_version:
        wanted = {
            "framework": "huggingface", "version": config.transformers_version,
            "base_framework_version": f"pytorch{config.pytorch_version}",
        }  # fmt: skip
    try:
        return image_uris.retrieve(
            **wanted, region=config.region, py_version=config.py_version, instance_type=config.ec2_instance_type,
            image_scope="training",
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise UserError(
            f"AWS has no image for pytorch_version {config.pytorch_version}, py_version {config.py_version} "
            f"({brief(error)}); take pytorch_version: 2.9.0 with py_version: py312, or name image_uri"
        ) from None


def find_role(config: jobs.SageMakerConfig, account: Account) -> str:
    """The role's ARN; `missing` gets a sentence where there is none."""
    from botocore.exceptions import BotoCoreError, ClientError

    name = config.iam_role_name
    arn = name if name.startswith("arn:") else f"arn:aws:iam::{account.number}:role/{name or 'ROLE'}"
    if not name:
        account.missing.append(
            "iam_role_name is empty: name the role that the job runs as (AWS console, IAM, Roles, SageMaker execution)"
        )
    elif not account.missing:
        try:
            return account.session.client("iam").get_role(RoleName=name.split("/")[-1])["Role"]["Arn"]
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchEntity":
                account.missing.append(
                    f"the role {name} is not in account {account.number}: make it (AWS console, IAM, Roles, SageMaker "
                    "execution), or name another in iam_role_name"
                )
            # not allowed to look: AWS itself will say whether the role serves
        except BotoCoreError as error:
            account.missing.append(f"the role {name} cannot be looked up ({brief(error)})")
    return arn


def check_buckets(config: jobs.SageMakerConfig, inputs: dict[str, str], account: Account) -> None:
    """Every s3:// that the job names must be a bucket in its own region."""
    from botocore.exceptions import BotoCoreError, ClientError

    extra = config.additional_args
    named = [*inputs.values(), extra.output_path or "", extra.checkpoint_s3_uri or ""]
    for bucket in sorted({urlsplit(uri).netloc for uri in named if uri.startswith("s3://")}):
        try:
            headers = account.session.client("s3").head_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
        except ClientError as error:
            headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
            status = error.response["ResponseMetadata"].get("HTTPStatusCode")
            if status == 404:
                account.missing.append(f"the bucket s3://{bucket} does not exist; correct its name, or make it")
                continue
            if status == 403 and "x-amz-bucket-region" not in headers:
                account.missing.append(f"the bucket s3://{bucket} is closed to you; ask its owner, or name another")
                continue
        except BotoCoreError as error:
            account.missing.append(f"the bucket s3://{bucket} cannot be looked at ({brief(error)})")
            continue
        region = headers.get("x-amz-bucket-region", config.region)
        if region != config.region:
            account.missing.append(
                f"the bucket s3://{bucket} is in {region}, the job in {config.region}: SageMaker reads buckets of its own "
                "region; copy it there, or change region in the YAML"
            )


def brief(error: Exception) -> str:
    """An exception's message on one short line."""
    return " ".join(str(error).split())[:200]


# --- The plan --------------------------------------------------------------------------------------------------------


def secrets_here(config: jobs.SageMakerConfig) -> dict[str, str]:
    """Credentials of this environment that the job needs; they travel through Secrets Manager alone."""
    if jobs.SECRETS in config.additional_args.environment:
        return {}  # the user's own secret
    found = {name: os.environ[name] for name in jobs.SECRET_NAMES if os.environ.get(name)}
    parts = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if parts.password:
        found |= {"MLFLOW_TRACKING_USERNAME": parts.username or "", "MLFLOW_TRACKING_PASSWORD": parts.password}
    return found


def notes(config: jobs.SageMakerConfig, estimate: costs.Estimate, secrets: dict[str, str]) -> list[str]:
    """What a user should know before paying."""
    spot = "spot " if config.additional_args.use_spot_instances else ""
    found = [
        f"accounts start with a quota of 0 for {config.ec2_instance_type}; look at Service Quotas, SageMaker, "
        f'"{config.ec2_instance_type} for {spot}training job usage": {config.num_machines} or more'
    ]
    if secrets:
        found.append(
            f"{', '.join(secrets)} go to Secrets Manager as {secret_name(config)}, which the role must be allowed to read"
        )
    if not environment(config, None).get("MLFLOW_TRACKING_URI", "").startswith("http"):
        found.append("no MLflow server (MLFLOW_TRACKING_URI is not an address): curves come home with --fetch")
    too_long = costs.too_long(estimate, config)
    return [*found, too_long] if too_long else found


def confirm(yes: bool) -> None:
    """Ask, unless told not to."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is here to confirm; add --yes (make: YES=1), or look first with --dry_run (DRY_RUN=1)")
    if input("submit? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not submitted, nothing was sent")


# --- The request -----------------------------------------------------------------------------------------------------


def build_request(
    config: jobs.SageMakerConfig, account: Account, source: Path, channels: dict[str, str], secrets: dict[str, str]
) -> dict[str, Any]:
    """The request as the SDK would send it; nothing leaves this machine."""
    import boto3
    from botocore.exceptions import EndpointConnectionError
    from sagemaker.core.helper.session_helper import Session

    class DrySession(Session):  # the two places where the SDK's session writes to S3
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

    boto = boto3.Session("-", "-", region_name=config.region)
    boto.events.register("provide-client-params.sagemaker.CreateTrainingJob", stop)
    boto.events.register_first("before-send", refuse)
    os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"  # the role was looked at, as far as it can be
    secret = secret_name(config) if secrets else None
    try:
        trainer(config, account, DrySession(boto_session=boto), source, channels, secret).train(wait=False)
    except Seen as seen:
        return seen.args[0]
    finally:
        del os.environ["SAGEMAKER_VALIDATE_ROLE"]
    raise AssertionError("the SDK sent no CreateTrainingJob")


def trainer(
    config: jobs.SageMakerConfig,
    account: Account,
    session: Any,
    source: Path,
    channels: dict[str, str],
    secret: str | None,
) -> Any:
    """The SDK's `ModelTrainer` for this job."""
    from sagemaker.core.shapes import MetricDefinition
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
    if extra.subnets or extra.encrypt_inter_container_traffic:
        networking = Networking(
            subnets=extra.subnets or None,
            security_group_ids=extra.security_group_ids or None,
            enable_inter_container_traffic_encryption=extra.encrypt_inter_container_traffic or None,
        )
    made = ModelTrainer(
        sagemaker_session=session,
        role=account.role,
        base_job_name=config.base_job_name,
        training_image=account.image,
        # `exec`: the script becomes the container's first process, the one that SageMaker's SIGTERM reaches
        source_code=SourceCode(
            source_dir=str(source),
            requirements="scripts/requirements.txt",
            command="exec python3 scripts/run_sagemaker_job.py",
        ),
        compute=Compute(
            instance_type=config.ec2_instance_type,
            instance_count=config.num_machines,
            volume_size_in_gb=extra.volume_size,
            enable_managed_spot_training=spot or None,
        ),
        networking=networking,
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=extra.max_run,
            max_wait_time_in_seconds=(extra.max_wait or extra.max_run) if spot else None,
        ),
        checkpoint_config=CheckpointConfig(s3_uri=extra.checkpoint_s3_uri),
        output_data_config=OutputDataConfig(s3_output_path=extra.output_path) if extra.output_path else None,
        input_data_config=[InputData(channel_name=name, data_source=uri) for name, uri in channels.items()],
        environment=environment(config, secret),
        tags=[Tag(key=key, value=value) for key, value in extra.tags.items()] or None,
    )
    if config.sagemaker_metrics_file:
        metrics = jobs.read_table(config.sagemaker_metrics_file, "sagemaker_metrics_file")
        made.with_metric_definitions([MetricDefinition(name=name, regex=regex) for name, regex in metrics.items()])
    return made


def environment(config: jobs.SageMakerConfig, secret: str | None) -> dict[str, str]:
    """The container's variables: those of the YAML, the MLflow server's address without its user, the secret's name."""
    found = dict(config.additional_args.environment)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(uri)
    if uri.startswith("http"):
        found.setdefault("MLFLOW_TRACKING_URI", parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    if secret:
        found[jobs.SECRETS] = secret
    return found


def channels_of(inputs: dict[str, str], hashes: dict[str, str], account: Account) -> dict[str, str]:
    """Where each channel is, or will be, in S3: a folder of this machine by the hash of its content."""
    return {
        name: value if value.startswith("s3://") else f"s3://{account.bucket}/t2i-inputs/{hashes[name]}"
        for name, value in inputs.items()
    }


def submit(
    config: jobs.SageMakerConfig, account: Account, source: Path, channels: dict[str, str], secret: str | None
) -> str:
    """Send the job; returns its name."""
    from botocore.exceptions import BotoCoreError, ClientError
    from sagemaker.core.helper.session_helper import Session

    try:
        made = trainer(config, account, Session(boto_session=account.session), source, channels, secret)
        made.train(wait=False, logs=False)
    except (ClientError, BotoCoreError, ValueError) as error:  # ValueError: the SDK's checks of the role
        raise UserError(
            f"SageMaker does not take the job ({brief(error)}); nothing runs and nothing is billed"
        ) from None
    return made._latest_training_job.training_job_name


def upload(inputs: dict[str, str], hashes: dict[str, str], account: Account) -> dict[str, str]:
    """Upload the folders of this machine, each once by its content, and return where each channel is."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError
    from sagemaker.core.helper.session_helper import Session

    try:
        account.bucket = Session(boto_session=account.session).default_bucket()  # makes it, if there is none yet
        send_folders(inputs, hashes, account)
    except (ClientError, BotoCoreError, S3UploadFailedError) as error:
        raise UserError(
            f"S3 does not take the data ({brief(error)}); what was sent is kept, the same command sends the rest"
        ) from None
    return channels_of(inputs, hashes, account)


def send_folders(inputs: dict[str, str], hashes: dict[str, str], account: Account) -> None:
    """Send what S3 does not have yet of the folders, file by file."""
    s3 = account.session.client("s3")
    for channel, digest in hashes.items():
        files = jobs.hash_folder(Path(inputs[channel]))[1]
        prefix = f"t2i-inputs/{digest}/"
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=account.bucket, Prefix=prefix)
        there = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
        names = {prefix + file.relative_to(inputs[channel]).as_posix(): file for file in files}
        todo = {key: file for key, file in names.items() if there.get(key) != file.stat().st_size}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: s3.upload_file(str(item[1]), account.bucket, item[0]), todo.items()))
        print(f"{channel}: {len(todo):,} of {len(names):,} files uploaded to s3://{account.bucket}/{prefix}")


def secret_name(config: jobs.SageMakerConfig) -> str:
    return f"t2i/{config.base_job_name}"


def store_secret(config: jobs.SageMakerConfig, secrets: dict[str, str], account: Account) -> str | None:
    """Put credentials into Secrets Manager; returns the secret's name."""
    from botocore.exceptions import BotoCoreError, ClientError

    if not secrets:
        return None
    name, client = secret_name(config), account.session.client("secretsmanager")
    try:
        try:
            client.create_secret(Name=name, SecretString=json.dumps(secrets))
        except client.exceptions.ResourceExistsException:
            client.put_secret_value(SecretId=name, SecretString=json.dumps(secrets))
    except (ClientError, BotoCoreError) as error:
        raise UserError(
            f"Secrets Manager does not take {', '.join(secrets)} as {name} ({brief(error)}); allow it, name a secret of your "
            f"own in environment, {jobs.SECRETS}, of the YAML, or unset them"
        ) from None
    return name


# --- Waiting and fetching --------------------------------------------------------------------------------------------


def wait(job: str, config: jobs.SageMakerConfig, account: Account) -> None:
    """Follow the job's log until it ends. Ctrl-C leaves the job running."""
    client, logs = account.session.client("sagemaker"), account.session.client("logs")
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
            f"\n{job} goes on; stop it with: aws sagemaker stop-training-job --training-job-name {job} --region {config.region}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    if state["TrainingJobStatus"] != "Completed":
        raise UserError(f"{job} ended as {state['TrainingJobStatus']}: {state.get('FailureReason', 'no reason given')}")
    paid, ran = state.get("BillableTimeInSeconds"), state.get("TrainingTimeInSeconds")
    if paid and ran:
        print(f"trained {ran / 60:.0f} min, billed {paid / 60:.0f} min a machine")


def new_lines(logs: Any, job: str, seen: dict[str, str]) -> list[str]:
    """Log lines that were not read yet, of all machines. seen: `{stream: token}`, kept from call to call."""
    from botocore.exceptions import ClientError

    lines = []
    try:
        streams = logs.describe_log_streams(logGroupName=LOGS, logStreamNamePrefix=f"{job}/")["logStreams"]
    except ClientError:  # the group is not there before the first job of an account
        return []
    for stream in streams:
        name = stream["logStreamName"]
        host = name.split("/")[-1].rpartition("-")[0]  # JOB/algo-1-1732000000
        while True:
            more = {"nextToken": seen[name]} if name in seen else {"startFromHead": True}
            answer = logs.get_log_events(logGroupName=LOGS, logStreamName=name, **more)
            lines += [f"{host}: {event['message'].rstrip()}" for event in answer["events"]]
            if answer["nextForwardToken"] == seen.get(name):
                break
            seen[name] = answer["nextForwardToken"]
    return lines


def fetch(job: str, folder: Path, config: jobs.SageMakerConfig) -> None:
    """Bring a finished job's result home as a run folder: model, settings, curves and samples; not its checkpoints."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there already; give another --output_dir, or delete it")
    session = boto3.Session(profile_name=config.profile, region_name=config.region)
    s3 = session.client("s3")
    try:
        state = session.client("sagemaker").describe_training_job(TrainingJobName=job)
        if state["TrainingJobStatus"] == "InProgress":
            raise UserError(
                f"{job} is still at work ({state.get('SecondaryStatus', 'InProgress')}); fetch it when it has ended"
            )
        folder.mkdir(parents=True, exist_ok=True)
        fetch_run(s3, state["CheckpointConfig"]["S3Uri"], folder)
        model = state.get("ModelArtifacts", {}).get("S3ModelArtifacts")
        if model:
            with tempfile.TemporaryDirectory() as scratch:
                parts, archive = urlsplit(model), Path(scratch) / "model.tar.gz"
                s3.download_file(parts.netloc, parts.path.lstrip("/"), str(archive))
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")  # refuses paths that lead out, links and devices
    except ClientError as error:
        raise UserError(
            f"{job} cannot be fetched ({brief(error)}); check its name and region {config.region}"
        ) from None
    except BotoCoreError as error:
        raise UserError(f"AWS cannot be asked ({brief(error)}); run aws configure, or check the network") from None
    write_json(folder / "sagemaker.json", {key: state.get(key) for key in ("TrainingJobName", "TrainingJobStatus",
               "BillableTimeInSeconds", "TrainingTimeInSeconds", "FailureReason", "ResourceConfig")})  # fmt: skip
    what = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no model"
    if state["TrainingJobStatus"] != "Completed":
        print(f"{job} ended as {state['TrainingJobStatus']}: {state.get('FailureReason', 'no reason given')}")
    print(
        f"{folder}: {what}; python scripts/generate_images.py --model {folder} --prompt …, or streamlit run dashboard"
    )


def fetch_run(s3: Any, uri: str, folder: Path) -> None:
    """The run folder's own files from the job's checkpoints in S3; checkpoints and the model stay there."""
    parts = urlsplit(uri)
    prefix = parts.path.strip("/") + "/run/"
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=parts.netloc, Prefix=prefix):
        for item in page.get("Contents", []):
            name = Path(item["Key"][len(prefix) :])
            head = name.parts[0] if name.parts else "."
            if head.startswith((".", "checkpoint-", "node-")) or head in ("pipeline", "vae") or ".." in name.parts:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(parts.netloc, item["Key"], str(folder / name))


if __name__ == "__main__":
    run_main(main)
