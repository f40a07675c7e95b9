"""Check the AWS account of a job, and upload the job's data and credentials.

A job's data goes to SageMaker's bucket, in folders named by a hash of the content. A job's credentials go to AWS's
Secrets Manager. This module imports no torch. AWS's packages are imported in functions, because importing them takes
seconds.
"""

import hashlib
import json
import logging
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from t2i.clouds import costs, launch, sagemaker_job
from t2i.clouds.aws_errors import NO_CREDENTIALS, NOT_ALLOWED, brief, explain, in_words
from t2i.errors import UserError

PLACEHOLDER = "000000000000"  # stands for the account in a dry run without credentials
DEFAULT_REGION = "us-east-1"
JOBS = 50  # number of jobs that are listed; each is asked for once
ROLE_ARN = re.compile(r"arn:(aws[a-z-]*):iam::(\d{12}):role/((?:[\w+=,.@-]+/)*)([\w+=,.@-]{1,64})", re.ASCII)
ROLE_NAME = re.compile(r"/?(?:[\w+=,.@-]+/)*([\w+=,.@-]{1,64})", re.ASCII)


@dataclass
class Account:
    """The AWS account of a job, with sentences on what the account lacks."""

    session: Any  # Session of boto3, or None without credentials.
    number: str = PLACEHOLDER
    partition: str = "aws"  # AWS's group of regions: aws, aws-cn or aws-us-gov.
    bucket: str = ""  # Bucket for uploads: the bucket of output_path, otherwise the account's SageMaker bucket.
    prefix: str = ""  # Folder for uploads in the bucket, without outer slashes.
    own_bucket: bool = False  # Whether the YAML names the bucket for uploads.
    kms_key: str | None = None  # Key that encrypts the uploads.
    role: str = ""  # ARN of the role that the job runs as.
    image: str = ""
    missing: list[str] = field(default_factory=list)  # Sentences for the user on what the account lacks.


def look(config: sagemaker_job.SageMakerConfig, inputs: dict[str, str]) -> Account:
    """Ask AWS whether the account has what the job needs.

    Mistakes in the YAML that no account can fix raise `UserError`. Faults of the account itself are listed in the
    account's `missing`.
    """
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from sagemaker.core import image_uris

    logging.getLogger("sagemaker").setLevel(logging.ERROR)  # the plan names the defaults already
    session = open_session(config)
    kinds = session.client("sagemaker", aws_access_key_id="-", aws_secret_access_key="-").meta.service_model
    instance_types = kinds.shape_for("TrainingInstanceType").enum
    if config.ec2_instance_type not in instance_types:
        family = config.ec2_instance_type.split(".")[1]
        near = ", ".join(sorted(kind for kind in instance_types if kind.split(".")[1] == family)[:4])
        raise UserError(
            f"ec2_instance_type {config.ec2_instance_type} is not a machine that SageMaker trains on"
            + (f"; that family has {near}" if near else "; use ml.g4dn.xlarge, or look at AWS's list")
        )
    partitions = session.get_available_partitions()
    regions = {region: part for part in partitions for region in session.get_available_regions("sagemaker", part)}
    if config.region not in regions:
        raise UserError(
            f"region {config.region} ({config.region_from}) has no SageMaker; use {DEFAULT_REGION}, or look at AWS's list"
        )
    account = Account(session, partition=regions[config.region])
    account.image = config.image_uri or find_image(image_uris, config)
    # Without a network, the default time limits would take minutes.
    limits = Config(connect_timeout=10, read_timeout=20, retries={"total_max_attempts": 2})
    try:
        account.number = session.client("sts", config=limits).get_caller_identity()["Account"]
    except (ClientError, BotoCoreError, EOFError, OSError) as error:  # a profile's command or file raises the last two
        account.missing.append(explain(error))
    extra = config.additional_args
    account.kms_key, account.own_bucket = extra.output_kms_key, bool(extra.output_path)
    account.bucket = f"sagemaker-{config.region}-{account.number}"  # as the SDK names it
    if extra.output_path:
        parts = urlsplit(extra.output_path)
        account.bucket, account.prefix = parts.netloc, parts.path.strip("/")
    account.role = find_role(config, account)
    if not account.missing:
        check_buckets(config, inputs, account)
    return account


def find_image(image_uris: Any, config: sagemaker_job.SageMakerConfig) -> str:
    """Return AWS's image for the YAML's versions.

    If AWS has no image for these versions, raise `UserError` with the changes that the YAML needs.
    """

    def retrieve(config: sagemaker_job.SageMakerConfig) -> str:
        wanted: dict[str, Any] = {"framework": "pytorch", "version": config.pytorch_version}
        if config.transformers_version:
            wanted = {
                "framework": "huggingface", "version": config.transformers_version,
                "base_framework_version": f"pytorch{config.pytorch_version}",
            }  # fmt: skip
        return image_uris.retrieve(
            **wanted, region=config.region, py_version=config.py_version, instance_type=config.ec2_instance_type,
            image_scope="training",
        )  # fmt: skip

    try:
        return retrieve(config)
    except (ValueError, KeyError) as error:
        reason = brief(error)
    changes = sagemaker_job.version_changes(config)
    try:
        retrieve(replace(config, **sagemaker_job.VERSIONS))
    except (ValueError, KeyError):
        changes = []  # these changes would not help
    fix = f"in the YAML {', '.join(changes)}, or name image_uri" if changes else "name image_uri in the YAML"
    named = ", ".join(f"{key} {getattr(config, key)}" for key in sagemaker_job.VERSIONS if getattr(config, key))
    raise UserError(
        f"AWS has no container image with {named} for {config.ec2_instance_type} machines ({reason}); {fix}"
    )


def find_role(config: sagemaker_job.SageMakerConfig, account: Account) -> str:
    """Return the ARN of the job's role. Faults of the role are added to the account's `missing`.

    A role's ARN in the YAML is used unchanged. For a role's name, AWS is asked for the ARN, because a role's ARN
    contains a path.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    name = config.iam_role_name
    if not name:
        account.missing.append(
            "iam_role_name is empty: name the role that the job runs as (AWS console, IAM, Roles, SageMaker execution)"
        )
        return f"arn:{account.partition}:iam::{account.number}:role/ROLE"
    written = ROLE_ARN.fullmatch(name)
    plain = ROLE_NAME.fullmatch(name)
    if not written and not plain:
        raise UserError(
            f"iam_role_name {name!r} is neither a role's name nor its ARN; copy the ARN, arn:aws:iam::ACCOUNT:role/NAME, from "
            "AWS's console (IAM, Roles)"
        )
    role = written[4] if written else plain[1] if plain else ""
    arn = name if written else f"arn:{account.partition}:iam::{account.number}:role/{name.lstrip('/')}"
    if account.missing:  # AWS cannot be asked
        return arn
    if written and (written[1], written[2]) != (account.partition, account.number):
        of = f"partition {written[1]}" if written[2] == account.number else f"account {written[2]}"
        here = f"{account.partition}, by the region" if written[2] == account.number else account.number
        account.missing.append(
            f"the role {name} is of {of}, and the job goes to {here}; launch with that account's credentials (profile in the "
            "YAML), or name a role of the job's account in iam_role_name"
        )
        return arn
    try:
        real_arn = str(account.session.client("iam").get_role(RoleName=role)["Role"]["Arn"])
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchEntity":
            account.missing.append(
                f"the role {name} is not in account {account.number}: create it (AWS console, IAM, Roles, SageMaker "
                "execution), or name another role in iam_role_name"
            )
        elif not written:
            why = "you may not look it up (iam:GetRole)" if code in NOT_ALLOWED else explain(error)
            account.missing.append(
                f"the ARN of the role {name} is unknown: {why}; give it in iam_role_name, as AWS's console shows it "
                "(IAM, Roles)"
            )
        return arn  # as written: AWS itself will refuse it if it does not exist
    except BotoCoreError as error:
        account.missing.append(f"the role {name} cannot be looked up: {explain(error)}")
        return arn
    if (written or "/" in name) and real_arn != arn:
        account.missing.append(
            f"the role {role} has the ARN {real_arn}, and iam_role_name says {name}; write that ARN in iam_role_name"
        )
        return arn
    return real_arn


def check_buckets(config: sagemaker_job.SageMakerConfig, inputs: dict[str, str], account: Account) -> None:
    """Add a sentence to the account's `missing` for each bucket of the job that cannot be opened, or that is in another
    region.
    """
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
                account.missing.append(f"the bucket s3://{bucket} does not exist; correct its name, or create it")
                continue
            if status == 403 and "x-amz-bucket-region" not in headers:
                account.missing.append(
                    f"the bucket s3://{bucket} is closed to you; ask its owner for access, or name another bucket"
                )
                continue
        except BotoCoreError as error:
            account.missing.append(f"the bucket s3://{bucket} cannot be checked: {explain(error)}")
            continue
        region = headers.get("x-amz-bucket-region", config.region)
        if region != config.region:
            account.missing.append(
                f"the bucket s3://{bucket} is in {region}, the job in {config.region}; SageMaker reads only the job's "
                "region, so copy the data there, or change region in the YAML"
            )


# --- Region and credentials -------------------------------------------------------------------------------------------


def find_region(config: sagemaker_job.Place) -> None:
    """Set the job's region and its origin: the YAML, AWS_REGION, AWS_DEFAULT_REGION, the profile, or else us-east-1."""
    if config.region:
        config.region_from = "region in the YAML"
        return
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        if value := os.environ.get(name, "").strip():
            config.region, config.region_from = value, f"by {name}"
            break
    else:
        _profiles_region(config)
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", config.region):
        raise UserError(
            f"{config.region!r} ({config.region_from}) is not an AWS region; set region in the YAML, such as us-east-1"
        )


def _profiles_region(config: sagemaker_job.Place) -> None:
    import botocore.session

    with in_words():
        session = botocore.session.Session(profile=config.profile)
        value = session.get_scoped_config().get("region")
    named = session.profile or "default"
    config.region = value or DEFAULT_REGION
    config.region_from = f"from the profile {named}" if value else "the default"


def open_session(config: sagemaker_job.Place) -> Any:
    """Return boto3's session for the YAML's profile and region."""
    import boto3

    with in_words():
        return boto3.Session(profile_name=config.profile, region_name=config.region)


def check_credentials(session: Any) -> None:
    """Raise `UserError` if there are no AWS credentials, or if the credentials cannot be fetched."""
    with in_words():
        try:
            credentials = session.get_credentials()
        except OSError as error:  # a profile's command or file fails
            raise UserError(explain(error)) from None
    if credentials is None:
        raise UserError(NO_CREDENTIALS)


def jobs(config: sagemaker_job.SageMakerConfig, file: Path) -> list[launch.Job]:
    """Return the newest `JOBS` jobs that this suite submitted with the YAML's base_job_name.

    A job's cost so far is that of the price file for its billed time, or for its training time as long as it runs.
    `file` is the YAML of the commands that fetch the jobs.
    """
    session = open_session(config)
    check_credentials(session)
    client, prices = session.client("sagemaker"), costs.read_prices().usd_per_hour
    base = f"{config.base_job_name}-"
    listed = client.list_training_jobs(
        NameContains=base, SortBy="CreationTime", SortOrder="Descending", MaxResults=JOBS
    )["TrainingJobSummaries"]
    found = []
    for name in (summary["TrainingJobName"] for summary in listed):
        if not name.startswith(base):
            continue
        state = client.describe_training_job(TrainingJobName=name)
        kind, machines = (state["ResourceConfig"][key] for key in ("InstanceType", "InstanceCount"))
        seconds, begin = state.get("BillableTimeInSeconds"), state.get("TrainingStartTime")
        if seconds is None and begin:
            seconds = ((state.get("TrainingEndTime") or datetime.now(UTC)) - begin).total_seconds()
        usd = launch.usd_so_far(prices.get(kind), seconds, machines)
        fetch = f"python scripts/launch_sagemaker.py --config_file {shlex.quote(str(file))} --fetch {name}"
        found.append(launch.Job(name, state["TrainingJobStatus"], f"{machines} x {kind}", usd, fetch))
    return found


# --- Uploads and secrets -----------------------------------------------------------------------------------------------


def channels_of(inputs: dict[str, str], hashes: dict[str, str], account: Account) -> dict[str, str]:
    """Return the S3 address of each input channel.

    The S3 address of a local folder holds the hash of the folder's content.
    """
    return {
        # SageMaker copies every key with this prefix: without the slash, flowers would bring flowers-old along.
        name: (
            value if value.startswith("s3://") else f"s3://{account.bucket}/{_prefix(account, hashes[name])}"
        ).rstrip("/")
        + "/"
        for name, value in inputs.items()
    }


def upload(
    inputs: dict[str, str], files: dict[str, list[Path]], hashes: dict[str, str], account: Account
) -> dict[str, str]:
    """Upload the local folders, equal folders only once, and return each channel's S3 address.

    Args:
        inputs: local folder or s3:// folder of each input channel.
        files: files in the local folder of each input channel.
        hashes: `staging.hash_folder` of the local folder of each input channel.
        account: the AWS account that `look` returned.
    """
    begin = f"the bucket {account.bucket} cannot be used for uploads: "
    own = (
        ""
        if account.own_bucket
        else "; or name a bucket of your own: output_path: s3://BUCKET/FOLDER in additional_args"
    )
    with in_words(begin, own):
        sdk_session(account).default_bucket()  # creates SageMaker's bucket if it is missing
    with in_words("S3 does not accept the data: ", "; uploaded files are kept, and the same command uploads the rest"):
        send_folders(inputs, files, hashes, account)
    return channels_of(inputs, hashes, account)


def sdk_session(account: Account, kind: Any = None, **options: Any) -> Any:
    """Return the SageMaker SDK's session that uploads to the account's bucket. `kind` is a subclass of the SDK's Session."""
    from sagemaker.core.helper.session_helper import Session

    if account.own_bucket:
        options |= {"default_bucket": account.bucket, "default_bucket_prefix": account.prefix or None}
    return (kind or Session)(**{"boto_session": account.session} | options)


def _prefix(account: Account, digest: str) -> str:
    return "/".join(part for part in (account.prefix, "t2i-inputs", digest) if part)


def send_folders(
    inputs: dict[str, str], files: dict[str, list[Path]], hashes: dict[str, str], account: Account
) -> None:
    """Upload the files of local folders, except files that S3 already has."""
    s3 = account.session.client("s3")
    more = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": account.kms_key} if account.kms_key else None
    for channel, digest in hashes.items():
        prefix = f"{_prefix(account, digest)}/"
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=account.bucket, Prefix=prefix)
        stored = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
        names = {prefix + file.relative_to(inputs[channel]).as_posix(): file for file in files[channel]}
        todo = {key: file for key, file in names.items() if stored.get(key) != file.stat().st_size}
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda item: s3.upload_file(str(item[1]), account.bucket, item[0], ExtraArgs=more), todo.items()
                )
            )
        print(f"{channel}: {len(todo):,} of {len(names):,} files uploaded to s3://{account.bucket}/{prefix}")


def secret_name(config: sagemaker_job.SageMakerConfig, secrets: dict[str, str]) -> str:
    """Return the name in Secrets Manager of the secret for these credentials.

    A secret for other credentials gets another name.

    Since other credentials get another secret, an earlier job that restarts still finds its own credentials.

    The secret's name contains a slow hash of the credentials, so that nobody can guess the credentials from the name.
    """
    text = json.dumps(secrets, sort_keys=True).encode()
    digest = hashlib.scrypt(text, salt=config.base_job_name.encode(), n=2**14, r=8, p=1, dklen=6).hex()
    return f"t2i/{config.base_job_name}-{digest}"


def store_secret(config: sagemaker_job.SageMakerConfig, secrets: dict[str, str], account: Account) -> str | None:
    """Store credentials in Secrets Manager and return the name of the secret, or None without credentials."""
    if not secrets:
        return None
    name, client = secret_name(config, secrets), account.session.client("secretsmanager")
    begin = f"Secrets Manager does not accept {', '.join(secrets)} as {name}: "
    end = (
        f"; or name a secret of your own as {sagemaker_job.SECRETS} in the YAML's environment, or unset these variables"
    )
    with in_words(begin, end), suppress(client.exceptions.ResourceExistsException):  # the same credentials
        client.create_secret(Name=name, SecretString=json.dumps(secrets))
    return name


def secrets_here(config: sagemaker_job.SageMakerConfig) -> dict[str, str]:
    """Return the credentials of this shell that the job needs.

    Return no credentials if the YAML names a secret of the user, or if the job has no network to read a secret by.
    """
    if sagemaker_job.SECRETS in config.additional_args.environment or config.additional_args.enable_network_isolation:
        return {}
    return launch.secrets_here(sagemaker_job.tracking_server(config)[0])
