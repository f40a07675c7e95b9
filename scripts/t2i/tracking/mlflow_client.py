"""Import MLflow's client quietly, and explain its exceptions to users. This module imports no torch.

MLflow is imported in functions, because importing it takes seconds.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from t2i.redaction import redact
from t2i.tracking.addresses import database_file, uses_proxy

# Python module of a database's driver -> the package that holds it
DRIVERS = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "mysql": "mysql-connector-python",
    "pyodbc": "pyodbc",
    "pymssql": "pymssql",
}
_SQLITE_FAULTS = {
    "unable to open database file": "the database cannot be opened; correct its path in MLFLOW_TRACKING_URI, "
    "or the folder's rights",
    "readonly database": "the database is not writable; correct its permissions, or name another in MLFLOW_TRACKING_URI",
    "file is not a database": "this file is no SQLite database; name another in MLFLOW_TRACKING_URI",
    "malformed": "the database is damaged; restore a backup, or name another in MLFLOW_TRACKING_URI",
    "disk is full": "the database's disk is full; make room",
}


class Unusable(RuntimeError):
    """Error of an MLflow store that refuses records until the user changes something in the store.

    The error's text gives the fix.
    """


def say(text: str) -> None:
    """Print a line on stderr, without secrets. A line printed this way leaves progress bars intact."""
    tqdm.write(redact(text), file=sys.stderr)


def set_variables() -> None:
    """Set MLflow's variables so that it prints little and gives up on a dead server at once.

    The user's own settings of MLflow stay in effect. MLflow's own retries are not needed, because the sender of the spool
    retries. MLflow reads some variables at its import, which DeepSpeed may cause.
    """
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",  # otherwise it prints a line for each of 60 database migrations
    }.items():
        os.environ.setdefault(name, value)


def import_mlflow() -> Any:
    """Import MLflow after `set_variables`."""
    set_variables()
    import mlflow

    return mlflow


def explain(error: BaseException, uri: str) -> tuple[str, bool]:
    """Explain an exception of MLflow's client.

    Args:
        error: exception of MLflow's client.
        uri: tracking URI, without user and password.

    Returns:
        First, the meaning of the exception, with the fix if it is known. Second, whether waiting may help.
    """
    text = str(error)
    if isinstance(error, Unusable):
        return text, False
    if module := re.search(r"No module named '([\w.]+)'", text):
        package = DRIVERS.get(module[1].partition(".")[0], module[1])
        return f"its driver {module[1]} is not installed; run: pip install {package}", False
    if schema := re.search(r"found version (\w+)|Can't locate revision identified by '(\w+)'", text):
        return _explain_schema(schema[1] or schema[2], uri), False
    for words, meaning in _SQLITE_FAULTS.items():
        if words in text:
            return meaning, "full" in words
    if "Invalid or unsupported" in text or "UnsupportedModelRegistryStoreURIException" in type(error).__name__:
        return f"{first_line(error)}; correct MLFLOW_TRACKING_URI", False
    if urlsplit(uri).scheme in ("http", "https"):
        return _explain_answer(error, text, uri)
    return f"does not take records ({first_line(error)})", True


def missing_driver(uri: str) -> ImportError | None:
    """Return an error if the driver for a database's URI is not installed, otherwise None."""
    if urlsplit(uri).scheme.partition("+")[0] not in ("postgresql", "mysql", "mssql"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        return error
    except ArgumentError:  # MLflow reports what is wrong with the URI
        pass
    return None


def first_line(error: BaseException) -> str:
    """Return the most telling part of an error, in one line."""
    text = str(error)
    cause = re.search(r"\[Errno -?\d+\] ([\w ,'-]+)|(timed out)|Response body: '?(.{1,160})", text)
    line = next(filter(None, cause.groups())) if cause else text.strip().partition("\n")[0][:200]
    return line.strip().removesuffix("'") or type(error).__name__


def _explain_answer(error: BaseException, text: str, uri: str) -> tuple[str, bool]:
    """Explain a failed request to an MLflow server."""
    proxy, line = uses_proxy(uri), first_line(error)
    around = (
        f"; the request went through the proxy {proxy}: set NO_PROXY={urlsplit(uri).hostname} to go past it"
        if proxy
        else ""
    )
    if "ProxyError" in text or "Tunnel connection failed" in text:
        why = re.search(r"Tunnel connection failed: [\w ]+|\[Errno -?\d+\] [\w ,'-]+", text)
        return f"the proxy {proxy or ''} does not let the request through ({why[0] if why else line}){around}", True
    if re.search(r"Response body: '?\s*<(!doctype|html|\?xml)", text, re.IGNORECASE):
        fix = f"correct the address in MLFLOW_TRACKING_URI{around}"
        return f"it answers with a web page, not as MLflow does; {fix}", True
    if "CERTIFICATE_VERIFY_FAILED" in text or "SSLError" in text:
        fix = (
            "name your company's in MLFLOW_TRACKING_SERVER_CERT_PATH, or correct http and https in MLFLOW_TRACKING_URI"
        )
        return f"its certificate is not accepted; {fix}", True
    code = re.search(r"error code (\d{3})", text)
    kind = getattr(error, "error_code", "")
    codes = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}
    status = int(code[1]) if code else codes.get(kind, 0)
    if status in (401, 403):
        refused = "does not accept the credentials" if status == 401 else "does not let these credentials write"
        return f"it {refused} ({line}); correct {_credentials()}{around}", True
    if status == 407:
        return f"the proxy {proxy or ''} asks for a password; write it into HTTP_PROXY and HTTPS_PROXY{around}", True
    if status == 404 and kind in ("", "ENDPOINT_NOT_FOUND", "INTERNAL_ERROR"):
        return f"it has no MLflow at this address ({line}); correct MLFLOW_TRACKING_URI{around}", True
    return f"does not take records ({line})", True


def _credentials() -> str:
    """Return the names of the environment variables that hold, or could hold, the credentials for an MLflow server."""
    if os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return "MLFLOW_TRACKING_TOKEN"
    return "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def _explain_schema(version: str, uri: str) -> str:
    """Return the fix for a database whose tables belong to another MLflow.

    The argument `version` is the version of the database's tables.
    """
    import mlflow

    file = database_file(uri)
    shown = f"sqlite:///{file}" if file else redact(uri)
    versions = Path(str(mlflow.__file__)).parent / "store" / "db_migrations" / "versions"
    if any(versions.glob(f"{version}_*.py")):
        copy = f"copy {file.name}, then run" if file else "back it up, then run"
        return f"the database is of an older MLflow than {mlflow.__version__}: {copy}: mlflow db upgrade {shown}"
    return (
        f"the database is of a newer MLflow than {mlflow.__version__}, which cannot read it: install that MLflow "
        "(pip install --upgrade mlflow), or name another database in MLFLOW_TRACKING_URI"
    )
