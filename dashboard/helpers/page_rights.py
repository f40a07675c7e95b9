"""Say whether a page may change files or steer trainings: by default only if nobody but this machine can open it."""

import os
from ipaddress import ip_address
from typing import Any

import streamlit as st

CONTROL = "T2I_DASHBOARD_CONTROL"  # environment variable: "on" lets everybody who opens the pages change files


def is_space() -> bool:
    return "SPACE_ID" in os.environ  # The Hub sets it in each Space.


def has_control() -> bool:
    """Return whether the page shows buttons that change data or act on trainings.

    By default it does so only if nobody but this machine can open it. Behind a proxy the server is bound to this machine
    as well, so the host names that it admits are also looked at. A Space never has control.
    """
    if is_space():
        return False
    if os.environ.get(CONTROL) == "on":
        return True
    hosts = [st.get_option("server.address"), *(st.get_option("server.allowedHosts") or [None])]
    return all(map(is_loopback, hosts))


def is_loopback(host: Any) -> bool:
    """Return whether a host name or an address means this machine alone."""
    try:
        return host == "localhost" or ip_address(str(host)).is_loopback
    except ValueError:
        return False
