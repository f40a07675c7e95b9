"""The AWS account that a job goes to: what it has, what is missing there, and what is put into it before the job.

Data goes to SageMaker's bucket by its content, credentials to Secrets Manager. Imports no torch.
"""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from t2i import jobs
from t2i.runs import UserError

PLACEHOLDER = "000000000000"  # stands for the account in a dry run without credentials


@dataclass
class Account:
    """Where the job goes: what could be learnt of it, and what is missing."""

    session: Any  # boto3's; None without credentials
    number: str = PLACEHOLDER
    partition: str = "aws"  # AWS's own kind of region: aws, aws-cn, aws-us-gov
    bucket: str = ""  # SageMaker's, of the account
    role: str = ""  # ARN
    image: str = ""
    missing: list[str] = field(default_factory=list)  # sentences for the user


def look(config: jobs.SageMakerConfig, inputs: dict[str, str]) -> Account:
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
    partitions = session.get_available_partitions()
    regions = {region: part for part in partitions for region in session.get_available_regions("sagemaker", part)}
    if config.region not in regions:
        raise UserError(f"region {config.region} is none that has SageMaker; take us-east-1, or look at AWS's list")
    account = Account(session, partition=regions[config.region])
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
    arn = name if name.startswith("arn:") else f"arn:{account.partition}:iam::{account.number}:role/{name or 'ROLE'}"
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


# --- What is put into it ----------------------------------------------------------------------------------------------


def channels_of(inputs: dict[str, str], hashes: dict[str, str], account: Account) -> dict[str, str]:
    """Where each channel is, or will be, in S3: a folder of this machine by the hash of its content."""
    return {
        # with a slash: SageMaker takes all that begins so, and flowers is also the beginning of flowers-old
        name: (value if value.startswith("s3://") else f"s3://{account.bucket}/t2i-inputs/{hashes[name]}").rstrip("/")
        + "/"
        for name, value in inputs.items()
    }


def upload(
    inputs: dict[str, str], files: dict[str, list[Path]], hashes: dict[str, str], account: Account
) -> dict[str, str]:
    """Upload the folders of this machine, each once by its content, and return where each channel is.

    files, hashes: of each folder, as `jobs.hash_folder` gives them.
    """
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError
    from sagemaker.core.helper.session_helper import Session

    try:
        account.bucket = Session(boto_session=account.session).default_bucket()  # makes it, if there is none yet
        send_folders(inputs, files, hashes, account)
    except (ClientError, BotoCoreError, S3UploadFailedError) as error:
        raise UserError(
            f"S3 does not take the data ({brief(error)}); what was sent is kept, the same command sends the rest"
        ) from None
    return channels_of(inputs, hashes, account)


def send_folders(
    inputs: dict[str, str], files: dict[str, list[Path]], hashes: dict[str, str], account: Account
) -> None:
    """Send what S3 does not have yet of the folders, file by file."""
    s3 = account.session.client("s3")
    for channel, digest in hashes.items():
        prefix = f"t2i-inputs/{digest}/"
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=account.bucket, Prefix=prefix)
        there = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
        names = {prefix + file.relative_to(inputs[channel]).as_posix(): file for file in files[channel]}
        todo = {key: file for key, file in names.items() if there.get(key) != file.stat().st_size}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: s3.upload_file(str(item[1]), account.bucket, item[0]), todo.items()))
        print(f"{channel}: {len(todo):,} of {len(names):,} files uploaded to s3://{account.bucket}/{prefix}")


def secret_name(config: jobs.SageMakerConfig, secrets: dict[str, str]) -> str:
    """A name for these credentials alone: an earlier job that restarts still finds its own. The hash is slow to guess by."""
    text = json.dumps(secrets, sort_keys=True).encode()
    digest = hashlib.scrypt(text, salt=config.base_job_name.encode(), n=2**14, r=8, p=1, dklen=6).hex()
    return f"t2i/{config.base_job_name}-{digest}"


def store_secret(config: jobs.SageMakerConfig, secrets: dict[str, str], account: Account) -> str | None:
    """Put credentials into Secrets Manager; returns the secret's name."""
    from botocore.exceptions import BotoCoreError, ClientError

    if not secrets:
        return None
    name, client = secret_name(config, secrets), account.session.client("secretsmanager")
    try:
        with suppress(client.exceptions.ResourceExistsException):  # of these very credentials
            client.create_secret(Name=name, SecretString=json.dumps(secrets))
    except (ClientError, BotoCoreError) as error:
        raise UserError(
            f"Secrets Manager does not take {', '.join(secrets)} as {name} ({brief(error)}); allow it, name a secret of your "
            f"own in environment, {jobs.SECRETS}, of the YAML, or unset them"
        ) from None
    return name


def secrets_here(config: jobs.SageMakerConfig) -> dict[str, str]:
    """Credentials of this environment that the job needs; they travel through Secrets Manager alone."""
    if jobs.SECRETS in config.additional_args.environment:
        return {}  # the user's own secret
    found = {name: os.environ[name] for name in jobs.SECRET_NAMES if os.environ.get(name)}
    parts = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if parts.username:
        found["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    if parts.password:
        found["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return found
