"""Explain errors of AWS, each in one sentence with the fix.

This module imports no torch. AWS's packages are imported in functions, because importing them takes seconds.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from t2i.errors import UserError

NO_CREDENTIALS = "no AWS credentials: run aws configure, or export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
UNKNOWN_KEY = ("InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "AuthFailure", "InvalidToken",
               "SignatureDoesNotMatch", "IncompleteSignature", "InvalidSignatureException", "NotAuthorized",
               "MissingAuthenticationToken", "MissingAuthenticationTokenException")  # fmt: skip
NOT_ALLOWED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403")


@contextmanager
def in_words(begin: str = "", end: str = "") -> Iterator[None]:
    """Turn an exception of AWS's clients into a `UserError`, whose text is `begin`, the cause with its fix, and `end`."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error) as error:
        raise UserError(f"{begin}{explain(error)}{end}") from None
    except EOFError as error:  # botocore asks for the code of a profile
        raise UserError(f"{begin}{explain(error)}{end}") from None
    except ValueError as error:
        if not re.match("Invalid endpoint|invalid literal for int", str(error)):
            raise
        raise UserError(
            f"{begin}AWS's client cannot use this environment ({brief(error)}); correct AWS_ENDPOINT_URL and similar variables{end}"
        ) from None


def explain(error: BaseException) -> str:
    """Return the meaning and the fix of an exception of AWS's clients: one sentence, without a full stop."""
    from botocore import exceptions as boto

    if not isinstance(error, boto.ClientError | boto.BotoCoreError) and isinstance(
        error.__context__, boto.ClientError | boto.BotoCoreError
    ):  # an upload wraps its cause
        error = error.__context__
    words = brief(error)
    if isinstance(error, boto.ClientError):
        return _explain_answer(error)
    if isinstance(error, EOFError):
        return (
            "the AWS profile asks for a code (mfa_serial), and no terminal is attached to type it in; log in first, or "
            "launch in a terminal"
        )
    if isinstance(error, boto.ProfileNotFound):
        name = str(error.kwargs.get("profile"))
        where = next(
            (key for key in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE") if os.environ.get(key) == name), "the YAML's profile"
        )
        return f"the AWS profile {name} ({where}) is not in ~/.aws/config; run aws configure --profile {name}, or name another profile"
    if isinstance(error, boto.NoCredentialsError):
        return NO_CREDENTIALS
    if isinstance(error, boto.PartialCredentialsError):
        return (
            f"the AWS credentials are incomplete: {error.kwargs.get('cred_var')} is missing ({error.kwargs.get('provider')}); set "
            "it, or run aws configure"
        )
    if isinstance(error, boto.SSOError | boto.TokenRetrievalError):
        return f"the AWS login has expired ({words}); run aws sso login, with --profile if it is not the default one"
    if isinstance(error, boto.LoginError):
        return f"the AWS login has expired ({words}); run aws login, with --profile if it is not the default one"
    if isinstance(error, boto.MissingDependencyException):
        return f"AWS's client lacks a package ({words}); install it"
    # a command or file that a profile names
    outside = isinstance(error, OSError) and not isinstance(error, boto.BotoCoreError)
    if isinstance(error, boto.CredentialRetrievalError) or outside:
        return f"AWS credentials cannot be fetched ({words}); correct their command or file in ~/.aws/config, or run aws configure"
    if isinstance(error, boto.ConfigParseError | boto.ConfigNotFound):
        return (
            f"{error.kwargs.get('path', '~/.aws/config')} cannot be read as AWS's settings ({words}); correct this file"
        )
    if isinstance(error, boto.NoRegionError | boto.InvalidRegionError):
        return f"AWS's region is missing or wrong ({words}); set region in the YAML, such as us-east-1"
    if isinstance(error, boto.ProxyConnectionError):
        return f"the proxy to AWS does not answer ({words}); correct or unset HTTPS_PROXY"
    if isinstance(error, boto.SSLError):
        return f"AWS's certificate is not trusted ({words}); name your company's certificates in AWS_CA_BUNDLE"
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        return f"AWS cannot be reached ({words}); check the network, HTTPS_PROXY and AWS_ENDPOINT_URL"
    return f"AWS's client cannot continue ({words}); correct ~/.aws/config or the AWS_ variables of the environment"


def _explain_answer(error: Any) -> str:
    """Return the meaning and the fix of an error that AWS answered."""
    answer = error.response.get("Error", {})
    code, words = str(answer.get("Code", "")), brief(error)
    if code in EXPIRED:
        return f"the AWS credentials have expired ({code}); renew them with aws sso login or aws configure, or export new ones"
    if code in UNKNOWN_KEY:
        return (
            f"AWS does not accept the credentials ({code}); run aws configure, or export the correct AWS_ACCESS_KEY_ID"
        )
    if code in ("RequestTimeTooSkewed", "RequestInTheFuture"):
        return f"this machine's clock is wrong ({code}); correct it, and launch again"
    if code in NOT_ALLOWED:
        return f"your AWS credentials may not do this ({words}); ask the account's administrator to allow {error.operation_name}"
    if code in ("ResourceLimitExceeded", "LimitExceededException", "ServiceQuotaExceededException"):
        return f"the account's limit is reached ({words}); request more in Service Quotas, SageMaker"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
    if "Throttl" in code or code in ("TooManyRequestsException", "SlowDown") or status >= 500:
        return f"AWS is busy ({words}); launch again in a minute"
    return f"AWS refuses the request ({words})"


def brief(error: BaseException) -> str:
    """Return an exception's message on one line of at most 200 letters."""
    return " ".join(str(error).split())[:200]
