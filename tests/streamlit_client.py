"""A browser's side of Streamlit without a browser: a real `streamlit run dashboard`, and sessions over real websockets.

A session keeps a page's elements by their place, as a browser does. Widgets are set by their `key`, which stands in the URL.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parents[1]
RUN = (sys.executable, "-m", "streamlit", "run")  # what `streamlit run` is
MESSAGE_BYTES = 200 * 2**20  # of one message, as Streamlit's own limit is
VALUES = {  # an element's kind -> the field of its state
    "selectbox": "string_value", "radio": "string_value", "text_input": "string_value", "text_area": "string_value",
    "multiselect": "string_array_value", "button_group": "string_array_value", "slider": "double_array_value",
    "select_slider": "string_array_value", "number_input": "double_value", "checkbox": "bool_value", "button": "trigger_value",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Server:
    """A running dashboard."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def health(self) -> int:
        """Return the status of the health check; 0 without an answer within 10 s."""
        return get(f"{self.url}/_stcore/health")


def get(url: str, **headers: str) -> int:
    """Return the status of a GET; 0 without an answer within 10 s."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def serve(
    cwd: Path,
    log: Path,
    app: Path | str = ROOT / "dashboard",
    command: tuple[str, ...] = RUN,
    env: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run `streamlit run <app>` in the folder `cwd` until the end of the block, with its output in the file `log`."""
    port = free_port()
    words = [*command, str(app), "--server.port", str(port), "--server.headless", "true"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, cwd=cwd, env=os.environ | (env or {}), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(port, process, log)
    try:
        until = time.monotonic() + 60
        while server.health() != 200:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"streamlit did not start: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.02)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Session:
    """A tab of a browser: `with Session(url).connected() as session: session.open("curves")`.

    elements: the shown elements by place: (kind, element, id of its fragment).
    """

    url: str
    timeout: float = 60.0  # seconds for an answer
    elements: dict[tuple[int, ...], tuple[str, Any, str]] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)  # name in the URL -> hash
    looks: dict[str, float] = field(
        default_factory=dict
    )  # fragments that ask to be run again, and each how many seconds
    problems: list[str] = field(default_factory=list)  # exceptions that were ever shown, and errors in a script's end
    config: Any = None  # what the server told the browser of its settings
    session_id: str = ""
    _page: dict[str, str] = field(default_factory=dict)
    _drawn: set[tuple[int, ...]] = field(default_factory=set)
    _fragments: tuple[str, ...] = ()

    @contextlib.contextmanager
    def connected(self, **options: Any) -> Iterator["Session"]:
        address = self.url.replace("http", "ws", 1) + "/_stcore/stream"
        options = {"origin": self.url, "subprotocols": ["streamlit"], "proxy": None} | options
        with connect(address, max_size=MESSAGE_BYTES, open_timeout=self.timeout, compression=None, **options) as socket:
            self._socket = socket
            yield self

    # --- What a user does ---------------------------------------------------------------------------------------------

    def open(self, page: str = "", query: str = "") -> float:
        """Open a page by its URL, as in a new tab. Only the first call may be this one. Return the seconds until all has come."""
        self._page = {"page_name": page, "query_string": query}
        seconds = self._run()
        self._page = {"query_string": query, "page_script_hash": self.pages.get(page, "")}
        return seconds

    def go(self, page: str) -> float:
        """Click a page's name at the top."""
        self._page = {"query_string": "", "page_script_hash": self.pages[page]}
        return self._run()

    def set(self, key: str, value: Any) -> float:
        """Give a widget a value: names are texts, a choice of several is a list."""
        kind, element, fragment = self.find(key)
        return self._run({element.id: {VALUES[kind]: value}}, fragment)

    def click(self, label: str) -> float:
        """Press the button whose label begins with this text."""
        _, element, fragment = next(
            found for found in self.elements.values() if found[0] == "button" and found[1].label.startswith(label)
        )
        return self._run({element.id: {"trigger_value": True}}, fragment)

    def choose(self, row: int, column: int, left: bool = False) -> float:
        """Click a picture of the grid, as assets/grid.js reports it."""
        _, element, fragment = self.component("picture_grid")
        event = {"event": "chosen", "value": {"row": row, "column": column, "left": left}}
        trigger = f"$$STREAMLIT_INTERNAL_KEY_{element.id}__events"
        return self._run({trigger: {"json_trigger_value": json.dumps([event])}}, fragment)

    def look(self) -> float:
        """Run the fragments that ask to be rerun by themselves; return 0.0 if none does."""
        return sum(self._run(fragment=fragment, auto=True) for fragment in list(self.looks))

    # --- What is there to be seen -------------------------------------------------------------------------------------

    def find(self, key: str) -> tuple[str, Any, str]:
        """Return a widget by its key: kind, element, fragment. Raises KeyError if it is not shown."""
        for found in self.elements.values():
            if found[0] in VALUES and found[1].id.endswith(f"-{key}"):
                return found
        raise KeyError(f"no widget {key} on this page: {[kind for kind, _, _ in self.elements.values()]}")

    def has(self, kind: str, label: str = "") -> bool:
        """Return whether an element of this kind, whose label begins with this text, is shown."""
        return any(
            found[0] == kind and str(getattr(found[1], "label", "")).startswith(label)
            for found in self.elements.values()
        )

    def component(self, name: str) -> tuple[str, Any, str]:
        for found in self.elements.values():
            if found[0] == "bidi_component" and found[1].component_name == name:
                return found
        raise KeyError(f"no {name} on this page")

    def data(self, name: str) -> dict[str, Any]:
        """Return a component's data; {} if it is not shown."""
        with contextlib.suppress(KeyError):
            return dict(json.loads(self.component(name)[1].json)[0])
        return {}

    def texts(self) -> list[str]:
        """Return all texts, warnings and notes, as they were sent."""
        shown = {"text": "body", "alert": "body", "markdown": "body", "heading": "body", "code": "code_text"}
        return [getattr(element, shown[kind]) for kind, element, _ in self.elements.values() if kind in shown]

    # --- The protocol -------------------------------------------------------------------------------------------------

    def _run(self, states: dict[str, dict[str, Any]] | None = None, fragment: str = "", auto: bool = False) -> float:
        message = BackMsg()
        state = message.rerun_script
        for name, value in self._page.items():
            setattr(state, name, value)
        state.fragment_id, state.is_auto_rerun = fragment, auto
        for identity, known in (states or {}).items():  # the server remembers all that were set before
            widget = state.widget_states.widgets.add(id=identity)
            for name, value in known.items():
                if name.endswith("_array_value"):
                    getattr(widget, name).data.extend(value)
                else:
                    setattr(widget, name, value)
        began = time.monotonic()
        self._socket.send(message.SerializeToString())
        while not self._take(self._receive(began)):
            pass
        return time.monotonic() - began

    def _receive(self, began: float) -> Any:
        left = self.timeout - (time.monotonic() - began)
        if left <= 0:
            raise TimeoutError(f"no whole answer within {self.timeout:g} s")
        message = ForwardMsg()
        message.ParseFromString(self._socket.recv(timeout=left))
        return message

    def _take(self, message: Any) -> bool:
        """Keep a message's content. Return True at the end of an answer."""
        kind = message.WhichOneof("type")
        if kind == "new_session":
            self._fragments = tuple(message.metadata.run.fragment_ids)
            self._drawn.clear()
            self.config, self.session_id = message.new_session.config, message.new_session.initialize.session_id
            if not self._fragments:
                self.elements.clear()
                self.looks.clear()
        elif kind == "navigation":
            self.pages = {page.url_pathname: page.page_script_hash for page in message.navigation.app_pages}
        elif kind == "page_info_changed":
            self._page["query_string"] = message.page_info_changed.query_string
        elif kind == "auto_rerun":
            self.looks[message.auto_rerun.fragment_id] = message.auto_rerun.interval
        elif kind == "session_event" and message.session_event.WhichOneof("type") == "script_compilation_exception":
            self.problems.append(str(message.session_event.script_compilation_exception.message))
        elif kind == "delta":
            self._take_delta(tuple(message.metadata.delta_path), message.delta)
        elif kind == "script_finished":
            return self._finish(message.script_finished)
        return False

    def _take_delta(self, place: tuple[int, ...], delta: Any) -> None:
        self._drawn.add(place)
        if delta.WhichOneof("type") != "new_element":
            self.elements.pop(place, None)
            return
        kind = delta.new_element.WhichOneof("type")
        element = getattr(delta.new_element, kind)
        if kind == "slider" and element.type == element.SELECT_SLIDER:
            kind = "select_slider"  # its state is an option's text
        self.elements[place] = (kind, element, delta.fragment_id)
        if kind == "exception":
            self.problems.append(f"{element.type}: {element.message}")

    def _finish(self, status: int) -> bool:
        if status == ForwardMsg.FINISHED_EARLY_FOR_RERUN:
            return False  # it begins anew by itself
        if status == ForwardMsg.FINISHED_WITH_COMPILE_ERROR:
            self.problems.append("the page's script cannot be compiled")
        for place in [place for place, found in self.elements.items() if found[2] in self._fragments]:
            if place not in self._drawn:  # of the fragment that ran, what it did not draw again is gone
                del self.elements[place]
        return True
