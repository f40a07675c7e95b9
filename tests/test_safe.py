"""`streamlit run dashboard` from the repository's root is safe by default: the dashboard's own settings hold."""

import http.client
import os
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from streamlit_client import ROOT, RUN, Server, Session, serve

HANDSHAKE = (
    "GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """From the root, as README says; nothing of the user's own settings."""
    home = tmp_path_factory.mktemp("home")
    with serve(ROOT, home / "log.txt", app="dashboard", env={"HOME": str(home)}) as running:
        yield running


def handshake(server: Server, host: str, origin: str) -> int:
    """The status that a websocket gets: 101 opens it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(HANDSHAKE.format(host=host, origin=origin).encode())
        return int(connection.recv(100).split()[1])


def upload(server: Server, session: str, size: int, token: str = "") -> int:
    """The status of a file that is sent, with or without the token of the page."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + b"a" * size + b"\r\n--x--\r\n"
    )
    headers = {
        "Content-Type": "multipart/form-data; boundary=x",
        "Cookie": f"_streamlit_xsrf={token}",
        "X-Xsrftoken": token,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("PUT", f"/_stcore/upload_file/{session}/1", body, headers if token else headers | {"Cookie": ""})
    return connection.getresponse().status


def test_it_listens_on_this_machine_alone(server):
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(server.process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_another_sites_name_or_page_opens_no_session(server):
    own = f"127.0.0.1:{server.port}"
    assert handshake(server, own, f"http://{own}") == 101
    assert handshake(server, f"localhost:{server.port}", f"http://localhost:{server.port}") == 101
    evil = f"evil.example:{server.port}"
    assert handshake(server, evil, f"http://{evil}") == 403  # a name that was bent to this address
    assert handshake(server, own, "http://evil.example") == 403  # another site's page


def test_behind_a_proxy_by_the_documented_line(tmp_path):
    """Whether the proxy keeps the browser's Host or sends its own; all other names and pages stay outside."""
    host = "abc.studio.us-east-1.sagemaker.aws"
    documented = (ROOT / "dashboard/streamlit_app.py").read_text().replace("HOST", host)
    flags = [word for word in documented.split() if word.startswith(("--server.allowed", "--server.cors"))]
    assert len(flags) == 3
    with serve(ROOT, tmp_path / "log.txt", app="dashboard", command=(*RUN, *flags)) as proxied:
        own = f"localhost:{proxied.port}"
        assert [handshake(proxied, name, f"https://{host}") for name in (host, own)] == [101, 101]
        assert handshake(proxied, own, f"http://{own}") == 101
        assert handshake(proxied, "evil.example", f"https://{host}") == 403
        assert handshake(proxied, own, "http://evil.example") == 403


def test_uploads_need_the_pages_token_and_are_small(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/_stcore/health")
    token = connection.getresponse().getheader("Set-Cookie").split("_streamlit_xsrf=")[1].split(";")[0]
    with Session(server.url).connected() as session:
        session.open()
        assert upload(server, session.session_id, 1000) == 403
        assert upload(server, session.session_id, 1000, token) == 204
        assert upload(server, session.session_id, 6 * 2**20, token) == 413


def test_nothing_is_sent_anywhere(server):
    with Session(server.url).connected() as session:
        session.open()
        assert not session.config.gather_usage_stats


def test_an_exceptions_text_stays_on_the_server(tmp_path: Path):
    for folder in ("dashboard", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "dashboard" / "views" / "runs.py").open("a") as page:
        page.write('\nraise RuntimeError("geheim in " + __file__)\n')
    with serve(tmp_path, tmp_path / "log.txt", app="dashboard") as server, Session(server.url).connected() as session:
        session.open("runs")
        assert len(session.problems) == 1
        shown = str([element for _, element, _ in session.elements.values()])
        assert "geheim" not in shown
        assert os.fspath(tmp_path) not in shown
        assert "geheim" in server.log.read_text()
        session.go("curves")  # the other pages stay whole
        assert len(session.problems) == 1
        assert server.health() == 200
