"""Read tracking addresses: find the MLflow server or database that a setting means, or refuse it. This module imports no MLflow.

The default tracking address is `sqlite:///mlflow.db` in the working directory. The variable `MLFLOW_TRACKING_URI` names
another server or database. A user and password in a tracking address are used only for the connection, and are recorded
nowhere.
"""

import os
import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from t2i.errors import UserError
from t2i.redaction import redact, remember_secret

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
MANAGED_MLFLOW = "sagemaker-mlflow"  # the package that speaks to SageMaker's managed MLflow
MANAGED_ARN = re.compile(r"arn:aws[\w-]*:sagemaker:[a-z0-9-]+:\d{12}:mlflow-(tracking-server|app)/[\w-]+")

_ENCODED = "write / ? # @ of the password as %2F %3F %23 %40"
_OR_VARIABLES = ", or give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"  # for http(s) servers only


@dataclass(frozen=True)
class Address:
    """A tracking URI, split into its parts."""

    uri: str  # The stored URI of an http(s) server lacks user and password.
    user: str = ""
    password: str = ""

    @property
    def is_server(self) -> bool:
        """Return whether the tracking address is that of a server that is reached over HTTP."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def is_local(self) -> bool:
        """Return whether the tracking address means this machine, so that other machines cannot use the address."""
        host = (urlsplit(self.uri).hostname or "").rstrip(".")
        number = re.fullmatch(r"127(\.\d+){1,3}|0|0\.0\.0\.0|::1?|::ffff:127.*", host)
        return bool(number) or host == "localhost" or host.endswith(".localhost")


def split_uri(uri: str, name: str = "MLFLOW_TRACKING_URI") -> Address:
    """Split a tracking URI into its parts, without side effects.

    Args:
        uri: tracking URI, as the user wrote it.
        name: words for the URI in a message.

    Raises:
        UserError: MLflow cannot use the URI. The error's message gives the fix, and shows no part of a password.
    """
    uri = uri.strip()
    after_host = re.match(r"(?i)https?:/*[^/?#]*(.*)", uri, re.DOTALL)
    if after_host and "@" in after_host[1]:  # user and password end at this @, but a URL's host ends at the first / ? #
        raise UserError(f"{name} has an @ after its server's name; {_ENCODED}{_OR_VARIABLES}")
    try:
        parts = urlsplit(uri)
    except ValueError:  # its text is not shown, as it may hold a part of a password
        raise UserError(f"{name} is no address: [ and ] are for IPv6; write those of a password as %5B %5D") from None
    try:
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        example = f"{parts.scheme}://host:port" + ("" if after_host else "/database")
        fix = f"give {example}; if it has a password, {_ENCODED}{_OR_VARIABLES if after_host else ''}"
        raise UserError(f"{name} has no valid port (1 to 65535); {fix}") from None
    _check_address(uri, name)
    if parts.scheme not in ("http", "https"):
        return Address(uri)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return Address(bare, unquote(parts.username or ""), unquote(parts.password or ""))


def resolve_uri(tracking_uri: str | None) -> str:
    """Return the tracking URI to connect to.

    The user and password of an http(s) server move to MLflow's own environment variables.

    Args:
        tracking_uri: tracking URI in the settings. With None, use `MLFLOW_TRACKING_URI`, otherwise the default.

    Raises:
        UserError: MLflow cannot use the URI, as in `split_uri`.
    """
    chosen = (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "").strip() or DEFAULT_TRACKING_URI
    address = split_uri(chosen)
    parts = urlsplit(chosen)
    if parts.password:
        remember_secret(parts.password)
    if address.is_server and "@" in parts.netloc:
        os.environ["MLFLOW_TRACKING_USERNAME"] = address.user
        if address.password:
            os.environ["MLFLOW_TRACKING_PASSWORD"] = address.password
        if os.environ.get("MLFLOW_TRACKING_URI", "").strip() == chosen:
            os.environ["MLFLOW_TRACKING_URI"] = address.uri  # child processes read the password in the other variables
    return address.uri


def _check_address(uri: str, name: str) -> None:
    """Raise `UserError` if MLflow 3 cannot write to `uri`; the message gives the address that is probably meant."""
    parts = urlsplit(uri)
    scheme, bare = parts.scheme.partition("+")[0], uri.rpartition("@")[2]
    shown = f"{name}={redact(uri) if '://' in uri or '@' not in uri else '[redacted]@' + bare}"
    if scheme in ("http", "https"):
        if not parts.hostname:
            raise UserError(f"{shown} names no host; give {scheme}://host:port")
        return
    if scheme in ("sqlite", "postgresql", "postgres", "mysql", "mssql", "databricks") and not uri.startswith(scheme):
        fix = f"{scheme}{uri[len(scheme) :]}" if "@" not in uri else f"{scheme}://…"
        raise UserError(f"{shown} begins with capitals, which MLflow does not know; give {fix}")
    if scheme == "sqlite":
        _check_sqlite(uri, shown)
        return
    if scheme == "postgres":
        raise UserError(f"{shown} begins with postgres://, which SQLAlchemy does not know; give postgresql://…")
    if scheme in ("postgresql", "mysql", "mssql") or uri.startswith("databricks"):
        return
    if scheme == "arn":
        _check_managed(uri, shown)
        return
    if scheme and scheme in {entry.name for entry in entry_points(group="mlflow.tracking_store")}:  # of a plugin
        return
    host = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|localhost|[\w-]+(?:\.[\w-]+)*)(:\d{1,5})?(/.*)?", bare)
    if "://" not in uri and (re.search(r"\.(db|sqlite3?)$", uri) or _is_sqlite_file(Path(uri))):
        raise UserError(f"{shown} lacks sqlite:///; give sqlite:///{uri}")
    if "://" not in uri and os.path.exists(uri):
        kind = "folder" if os.path.isdir(uri) else "file"
        raise UserError(
            f"{shown} is a {kind} here, to which MLflow 3 cannot write; give {DEFAULT_TRACKING_URI} or http(s)://…"
        )
    if host and "://" not in uri and (host[2] or host[1] == "localhost" or "." in host[1].strip(".")):
        local = host[2] or host[1] == "localhost" or re.fullmatch(r"[\d.]+", host[1])
        wanted = "http" if local else "https"
        user = ", and the user in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if bare != uri else ""
        raise UserError(f"{shown} lacks {wanted}://; give {wanted}://{bare}{user}")
    raise UserError(
        f"{shown} is no server that MLflow 3 can write to; give http(s)://host:port, sqlite:///file.db or postgresql://…"
    )


def _check_sqlite(uri: str, shown: str) -> None:
    file = re.sub(r"^sqlite(\+\w+)?:/*", "", uri)
    if not file or file == ":memory:":
        raise UserError(f"{shown} names no file, and so keeps nothing; give {DEFAULT_TRACKING_URI}")
    if not re.match(r"sqlite(\+\w+)?:///", uri):
        raise UserError(f"{shown} lacks slashes; give sqlite:///{file}, or sqlite:////{file} for a path from the root")


def _check_managed(uri: str, shown: str) -> None:
    if not is_managed(uri):
        raise UserError(
            f"{shown} is no ARN of SageMaker's managed MLflow; give "
            "arn:aws:sagemaker:REGION:ACCOUNT:mlflow-tracking-server/NAME, or …:mlflow-app/ID"
        )
    if "arn" not in {entry.name for entry in entry_points(group="mlflow.tracking_store")}:
        raise UserError(f"{shown} is SageMaker's managed MLflow, which needs a package: pip install {MANAGED_MLFLOW}")


def _is_sqlite_file(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(15) == b"SQLite format 3"
    except (OSError, ValueError):
        return False


def is_managed(uri: str) -> bool:
    """Return whether a tracking URI is the ARN of SageMaker's managed MLflow."""
    return bool(MANAGED_ARN.fullmatch(uri))


def uses_proxy(uri: str) -> str | None:
    """Return the proxy, without password, that the environment sets for an http(s) server, or None without a proxy."""
    parts = urlsplit(uri)
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    return redact(proxy) if proxy and parts.hostname and not proxy_bypass(parts.hostname) else None


def database_file(uri: str) -> Path | None:
    """Return the absolute path of the file that a SQLite tracking URI names, or None for other URIs."""
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute() if uri.startswith("sqlite:///") else None
