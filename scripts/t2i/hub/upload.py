"""Push a folder to the Hugging Face Hub as one commit, and retry until a deadline. This module imports no torch.

A push compares the folder with the head of the repository, uploads files that differ, and commits with that head as
parent. If somebody commits in between, the Hub refuses the push, and the next attempt starts from the new head: no edit
is lost. A later attempt does not upload files again that an earlier attempt uploaded. A push changes no file on disk.
"""

import difflib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, set_client_factory
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    filter_repo_objects,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)
from huggingface_hub.utils._http import default_client_factory

from t2i.errors import UserError
from t2i.files import files_below, sha256_file
from t2i.loading import NO_XET, RepoType
from t2i.redaction import redact

CARD = "README.md"
EVAL_RESULTS = ".eval_results"  # folder that the Hub reads evaluation results from
SILENCE_S = 120.0  # a request fails if no byte moves for so long; the Hub takes a minute for large commits
SHORTEST_SILENCE_S = 10.0  # the same limit close to the deadline; huggingface_hub's own limit for downloads
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # waits between attempts; they double, and the Hub may ask for more
CHECK_S = 15.0  # time limit of the check whether a push will be allowed
QUOTED_CHARACTERS = 300  # characters of the Hub's own message that are shown
LICENSE_LIST = "https://huggingface.co/docs/hub/repositories-licenses"
# The identifiers that the Hub accepts in a card: the table of LICENSE_LIST (huggingface/hub-docs 242f4a1 of 2026-08-22).
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()  # noqa: SIM905 - saves a hundred quotation marks


class HubError(UserError):
    """Error if the Hub, the network or the token prevents a push. The error's message is one sentence."""


@dataclass(frozen=True)
class Target:
    """The branch or pull request that receives a push.

    Contradictory options of the branch and the pull request raise `HubError`.
    """

    # Branch to push to, created from main if it is missing, or refs/pr/N of a pull request. With None, push to main.
    revision: str | None = None
    create_pr: bool = False  # Whether a pull request to main is opened.

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, "main"):
            raise HubError("--create_pr opens a pull request to main; leave out --hub_revision, or --create_pr")
        if self.revision is not None and not re.fullmatch(r"(refs/pr/\d+|[\w][\w./-]*)", self.revision, re.ASCII):
            raise HubError(f"--hub_revision {self.revision!r} is not a valid name of a branch; give one such as dev")


MAIN = Target()


@dataclass
class Pushed:
    """The result of a push."""

    url: str
    commit: str  # Hash of the pushed commit, 40 hex digits.
    changed: bool  # Whether files were uploaded. The value is False if the Hub already had all files.
    # Files on the Hub that the push left as they were, since they are not its own.
    others: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.url} {'has it now' if self.changed else 'is up to date'} (commit {self.commit[:7]})"


def check_repo_id(repo_id: str | None, option: str) -> str:
    """Return `repo_id` if the Hub allows it as a name `owner/name`.

    If the Hub does not allow the name, raise `HubError` with the name of `option`.
    """
    if repo_id and _is_repo_id(repo_id):
        return repo_id
    shown = f"{option} {redact(repo_id)!r} is not a repository of the Hub" if repo_id else f"{option} is missing"
    address = r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://|git@hf\.co:"
    meant = re.sub(
        rf"^(?:{address})?(?:(?:datasets|models|spaces)/)?", "", (repo_id or "").strip(), flags=re.IGNORECASE
    )
    meant = re.sub(r"(?:/(?:tree|blob|resolve)/.*|[?#].*|\.git/*|/+)$", "", meant)
    if meant != repo_id and _is_repo_id(meant):
        raise HubError(f"{shown}; give {meant}")
    raise HubError(f"{shown}; give owner/name, both of letters and digits joined by a single '-', '_' or '.'")


def _is_repo_id(text: str) -> bool:
    word = r"\w([\w.-]{0,94}\w)?"
    return bool(re.fullmatch(f"{word}/{word}", text, re.ASCII)) and not re.search(r"--|\.\.|\.git$", text)


def check_license(license: str | None, option: str = "license") -> None:
    """Raise `HubError` if the Hub does not accept `license` in a card.

    The error's message names `option` and the nearest licence.

    A `license` of None is accepted.
    """
    if license is None or license in LICENSES:
        return
    near = _near_licenses(license)
    meant = f"did you mean {' or '.join(near)}?" if near else "for a licence that the Hub does not list, give other;"
    raise HubError(f"{option} {redact(license)!r} is not one of the Hub's licences; {meant} the list: {LICENSE_LIST}")


def _near_licenses(text: str) -> list[str]:
    """Return up to three of the Hub's identifiers that `text` may mean, the nearest first."""
    address = re.search(r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)/(\d\.\d)", text, re.IGNORECASE)
    words = f"cc-{address[1]}-{address[2]}" if address else text
    words = re.sub(
        r"[^a-z0-9.+]+", "-", words.lower().replace("creative commons", "cc").replace("attribution", "by")
    ).strip("-")
    words = words.replace("cc-zero", "cc0").replace("publicdomain", "cc0").replace("public-domain", "cc0")
    words = re.sub(r"-?(licen[cs]e|version|international|only|or-later|the)(?=-|$)", "", words).strip("-")
    words = re.sub(r"(?<=[a-z])-?v?(\d)(?=[.-]|$)", r"-\1", words).replace("cc-0", "cc0")
    forms = (words, f"{words}.0", words.replace("-", ""))
    exact = [name for name in LICENSES if name in forms]
    begun = sorted((name for name in LICENSES if words and name.startswith(words)), reverse=True)
    begun.sort(key=len)  # the shortest first, and of these the newest version
    return (exact or begun or difflib.get_close_matches(words, LICENSES, n=2, cutoff=0.7))[:3]


def check_access(repo_id: str, repo_type: RepoType, say: Callable[[str], Any] = print, target: Target = MAIN) -> None:
    """Ask the Hub once, within seconds, whether `push_folder` may write to `repo_id`.

    Scripts ask the Hub before hours of work.

    Opening a pull request needs only read access. If the Hub cannot be asked now, a warning is printed, since the push
    comes later.

    Raises:
        HubError: The token is missing or wrong, the token or its account may not write, or HF_HUB_OFFLINE is set.
    """
    api = _connect(check_repo_id(repo_id, "repo_id"))
    user: dict[str, Any] = {}
    try:
        with limited(CHECK_S):
            user = api.whoami()
            if target.create_pr:
                api.auth_check(repo_id, repo_type=repo_type)
                return
            if (_token_of(user)).get("role") == "read":
                raise HubError(f"the token of {user.get('name')} may only read; {_login(repo_id)}")
            _check_scope(user, repo_id, repo_type)
            api.auth_check(repo_id, repo_type=repo_type, write=True)
    except (OSError, ValueError) as error:
        failure = _read_failure(error, api)
        if failure.status == HTTPStatus.NOT_FOUND and target.create_pr:
            raise HubError(_no_repository(repo_id)) from None
        if failure.status == HTTPStatus.NOT_FOUND:  # the push will create it
            _check_create(user, repo_id, say)
        elif failure.denied:
            raise HubError(f"{failure.reason}; {_login(repo_id)}") from None
        else:
            say(f"warning: cannot check now whether {repo_id} may be written to: {failure.reason}")


def holds(repo_id: str, repo_type: RepoType, path: str, target: Target = MAIN) -> bool:
    """Return whether a repository holds a file on main, or on the branch of `target`. False if the Hub cannot say."""
    api = _connect(repo_id)
    for branch in {None, target.revision}:
        try:
            with limited(CHECK_S):
                if api.get_paths_info(repo_id, path, revision=branch, repo_type=repo_type):
                    return True
        except (OSError, ValueError):  # The repository or its branch does not exist yet, or the Hub does not answer.
            continue
    return False


def _no_repository(repo_id: str) -> str:
    return (
        f"{repo_id} does not exist, so no pull request can be opened in it; correct the name, or leave out --create_pr"
    )


def _token_of(user: dict[str, Any]) -> dict[str, Any]:
    """Return the facts on the token that the Hub's `whoami` answers, or {} if the answer holds no such facts."""
    token = (user.get("auth") or {}).get("accessToken")
    return token if isinstance(token, dict) else {}


def _check_scope(user: dict[str, Any], repo_id: str, repo_type: RepoType) -> None:
    """Raise `HubError` if the token is fine-grained and covers neither the repository nor its owner."""
    writable = _writable(user)
    if writable is None or repo_id.lower() in writable or repo_id.split("/")[0].lower() in writable:
        return
    raise HubError(
        f"the fine-grained token of {user.get('name')} may not write to {repo_id}: give it write access to repositories of "
        f"{repo_id.split('/')[0]} (https://huggingface.co/settings/tokens), or {_login(repo_id)}"
    )


def _writable(user: dict[str, Any]) -> set[str] | None:
    """Return the owners and repositories (lower case) to which a fine-grained token may write, or None for other tokens."""
    token = _token_of(user)
    limits = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(limits, dict) or not isinstance(limits.get("scoped"), list):
        return None
    writes = {"repo.write", "repo.content.write"}
    if writes & set(limits.get("global") or []):
        return None
    scopes = [
        scope for scope in limits["scoped"] if isinstance(scope, dict) and writes & set(scope.get("permissions") or [])
    ]
    return {str((scope.get("entity") or {}).get("name")).lower() for scope in scopes}


def _check_create(user: dict[str, Any], repo_id: str, say: Callable[[str], Any]) -> None:
    """Raise `HubError` if the account or its token surely may not create `repo_id`.

    Print a warning if the account or token probably may not create it.
    """
    owner, name = repo_id.split("/")[0], user.get("name")
    writable = _writable(user)
    if writable is not None and owner.lower() not in writable:  # the token covers the repository but not its owner
        raise HubError(
            f"{repo_id} does not exist, and the fine-grained token of {name} may not create repositories of {owner}; create it "
            f"in the browser, or {_login(repo_id)}"
        )
    if owner.lower() == str(name).lower():
        return
    organizations = {str(org.get("name")).lower(): org for org in user.get("orgs") or [] if isinstance(org, dict)}
    if owner.lower() not in organizations:
        say(f"warning: the token belongs to {name}, who may not be allowed to create {repo_id}")
        return
    role = organizations[owner.lower()].get("roleInOrg")
    if role in ("read", "no_access"):
        raise HubError(
            f"{name} may only read in {owner} (role {role}) and cannot create {repo_id}; ask an administrator of {owner} for "
            f"the role write, or push to {name}/{repo_id.split('/')[1]}"
        )
    if role == "contributor":  # by the Hub's manual, they may create repositories and write to those
        say(
            f"warning: {name} is a contributor in {owner}, and may not be allowed to create {repo_id} or to write to it later"
        )


def push_folder(
    folder: Path,
    repo_id: str,
    repo_type: RepoType,
    *,
    files: list[str],
    message: str,
    private: bool = True,
    deadline: float = 900.0,
    merge_card: Callable[[str | None], str] | None = None,
    outdated: Callable[[bytes], bool] | None = None,
    say: Callable[[str], Any] = print,
    target: Target = MAIN,
) -> Pushed:
    """Make the files of a repository equal to those of `folder`, in one commit.

    If all files are equal already, no commit is made.

    Failures of a push that may pass are retried: 408, 409, 412, 429, 5xx, a broken connection, silence. Retries of a
    push end `deadline` seconds after the first failure began. A transfer that makes progress is never cut.

    huggingface_hub's own retries within a request are off. Requests, some of which would wait for ever, fail after
    `SILENCE_S` without a byte. A silent Hub therefore ends the push at most `SHORTEST_SILENCE_S` after the deadline.
    Most repositories upload through hf_xet, which has its own limits: a silent storage fails after up to 6 times 300 s
    (HF_XET_CLIENT_RETRY_MAX_ATTEMPTS, HF_XET_CLIENT_READ_TIMEOUT).

    Args:
        folder: Folder of the files to push, whose linked folders are pushed too. The push does not change the folder.
        repo_id: Name of the repository, `owner/name`. A missing repository is created.
        repo_type: Kind of the repository: model, dataset or space.
        files: Patterns of the files to push, relative to `folder`. As in huggingface_hub, `*` also matches `/`. Files
            on the Hub that match and are not in `folder` are deleted. Other files on the Hub stay. A hidden file is
            pushed only if its full name is given.
        message: Message of the pushed commit.
        private: Whether a new repository is private. An existing repository keeps its visibility.
        deadline: Seconds during which a failing push is retried.
        merge_card: Function that makes the README.md to push from the README.md on the Hub, which is None if the Hub
            has no README.md. Each attempt to push calls `merge_card`. Without `merge_card`, README.md is pushed like
            any other file.
        outdated: Function that tells from the content of a file in `.eval_results/` on the Hub whether an earlier push wrote
            it. Such a file is deleted if `files` does not name it.
        say: Function that prints one line on the reason and the time of the next attempt.
        target: Branch or pull request that receives the push.

    Raises:
        HubError: The push has finally failed. The error's message contains no secrets.
    """
    check_repo_id(repo_id, "repo_id")
    names = (path.relative_to(folder).as_posix() for path in files_below(folder))
    local = {name: folder / name for name in _matching(names, files)}
    if not local:
        raise HubError(f"{folder} has no file that matches {', '.join(files)}; nothing is pushed")
    api = _connect(repo_id)
    url = _address(api, repo_id, repo_type) + (f"/tree/{target.revision}" if target.revision else "")
    wait, sent, left = FIRST_WAIT_S, False, deadline
    until: float | None = None
    while True:
        silence_s = min(max(left, SHORTEST_SILENCE_S), SILENCE_S, deadline)
        try:
            with limited(silence_s):
                head = _open_head(api, repo_id, repo_type, private, folder, merge_card, target)
                operations, others = _differences(
                    api, repo_id, repo_type, head, local, files, merge_card, outdated
                )  # fmt: skip
                if not operations:  # the Hub had all files, or a commit arrived whose answer was lost
                    return Pushed(url, head, changed=sent, others=others)
                sent = True
                commit = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    repo_type=repo_type,
                    parent_commit=head,
                    revision=target.revision,
                    create_pr=target.create_pr,
                )
                return Pushed(commit.pr_url or url, commit.oid, changed=True, others=others)
        except (OSError, RuntimeError, ValueError) as error:
            failure = _read_failure(error, api)
        now = time.monotonic()
        until = until or now + deadline - (silence_s if failure.silence else 0)
        left = until - now
        _check_retry(failure, repo_id, left, f"{folder} is unchanged")
        pause = min(max(wait, failure.retry_after), left)
        say(
            f"the push to {repo_id} is interrupted: {failure.reason}; trying again in {pause:.0f} s ({left:.0f} s left)"
        )
        time.sleep(pause)
        wait, left = min(2 * wait, LONGEST_WAIT_S), left - pause


def _check_retry(failure: "_Failure", repo_id: str, left: float, unchanged: str) -> None:
    """Raise `HubError` if a failed push is not tried again in the `left` seconds."""
    if failure.denied:
        raise HubError(f"{failure.reason}; {_login(repo_id)}; {unchanged}")
    if not failure.passing:  # the same command would fail in the same way
        raise HubError(f"the push to {repo_id} failed: {failure.reason}; correct that, then push again; {unchanged}")
    if left <= 0 or failure.retry_after > left:
        raise HubError(
            f"the push to {repo_id} failed: {failure.reason}; {unchanged}, and the same command repeats the push"
        )


# --- What differs ----------------------------------------------------------------------------------------------------


def _matching(paths: Iterable[str], patterns: list[str]) -> list[str]:
    hidden = re.compile(r"(^|/)\.")
    visible = (path for path in paths if path in patterns or not hidden.search(path))
    return sorted(filter_repo_objects(visible, allow_patterns=patterns))


def _address(api: HfApi, repo_id: str, repo_type: RepoType) -> str:
    return f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def _open_head(
    api: HfApi,
    repo_id: str,
    repo_type: RepoType,
    private: bool,
    folder: Path,
    merge_card: Callable[[str | None], str] | None,
    target: Target,
) -> str:
    """Return the commit on which the push builds. A missing repository or branch is created."""
    head = _head(api, repo_id, repo_type)
    if head is None and target.create_pr:
        raise HubError(_no_repository(repo_id))
    if head is None:
        _create(api, repo_id, repo_type, private, folder, merge_card)
        head = str(api.repo_info(repo_id, repo_type=repo_type).sha)
    return _branch(api, repo_id, repo_type, target.revision) if target.revision else head


def _head(api: HfApi, repo_id: str, repo_type: RepoType) -> str | None:
    """Return the newest commit of a repository, or None if the repository does not exist."""
    try:
        return str(api.repo_info(repo_id, repo_type=repo_type).sha)
    except HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.NOT_FOUND:
            raise
    return None


def _branch(api: HfApi, repo_id: str, repo_type: RepoType, revision: str) -> str:
    """Return the newest commit of a branch or pull request. A missing branch is created from main."""
    try:
        return str(api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha)
    except RevisionNotFoundError:
        if revision.startswith("refs/"):
            raise HubError(
                f"{repo_id} has no {revision}; give the number of an open pull request, or a branch"
            ) from None
    api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    return str(api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha)


def _create(
    api: HfApi,
    repo_id: str,
    repo_type: RepoType,
    private: bool,
    folder: Path,
    merge_card: Callable[[str | None], str] | None,
) -> None:
    sdk = None
    if repo_type == "space":  # its card names the SDK that it runs on
        card = merge_card(None) if merge_card else (folder / CARD).read_text(encoding="utf-8")
        sdk = (re.findall(r"(?m)^sdk:\s*(\w+)", card) or ["static"])[0]
    api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=sdk)


def _differences(
    api: HfApi,
    repo_id: str,
    repo_type: RepoType,
    head: str,
    local: dict[str, Path],
    files: list[str],
    merge_card: Callable[[str | None], str] | None,
    outdated: Callable[[bytes], bool] | None,
) -> tuple[list[CommitOperationAdd | CommitOperationDelete], list[str]]:
    """Return the operations of the commit that makes the repository at `head` equal to the folder, and other files there."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type=repo_type)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    contents: dict[str, Path | bytes] = dict(local)
    at_head = f"{_address(api, repo_id, repo_type)}/resolve/{head}"
    if merge_card:
        card = _read(api, f"{at_head}/{CARD}").decode("utf-8") if CARD in remote else None
        contents[CARD] = merge_card(card).encode("utf-8")
    stale = [path for path in _matching(remote, files) if path not in contents]
    results = filter_repo_objects(remote, allow_patterns=[f"{EVAL_RESULTS}/*.yaml"]) if outdated else ()
    stale += [
        path
        for path in results
        if outdated and path not in contents and outdated(_read(api, f"{at_head}/{quote(path)}"))
    ]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(
            CommitOperationAdd(path, str(content) if isinstance(content, Path) else content)
            for path, content in contents.items()
            if not _is_same(content, remote.get(path))
        ),
        *(CommitOperationDelete(path, is_folder=False) for path in stale),
    ]
    return operations, sorted(remote.keys() - contents.keys() - set(stale))


def _read(api: HfApi, address: str) -> bytes:
    response = get_session().get(address, headers=build_hf_headers(token=api.token))
    hf_raise_for_status(response)
    return response.content


def _is_same(content: Path | bytes, entry: RepoFile | None) -> bool:
    """Return whether the Hub's file equals the local file.

    LFS files are compared by SHA-256, other files by git's SHA-1.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if entry is None or size != entry.size:
        return False
    if entry.lfs:
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)
        return digest == entry.lfs.sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + data).hexdigest() == entry.blob_id


# --- Connections and their failures ----------------------------------------------------------------------------------


@dataclass
class _Failure:
    """The reason why a request failed, and whether a retry may help."""

    reason: str  # Message on the failure for a person, without secrets.
    status: int | None = None  # HTTP status of the Hub's answer.
    denied: bool = False  # Whether the token is wrong or lacks a permission.
    passing: bool = False  # Whether a retry of the request may help.
    silence: bool = False  # Whether the Hub stopped answering, so that the failure began earlier.
    retry_after: float = 0.0  # Seconds that the Hub asks the client to wait.


def _connect(repo_id: str) -> HfApi:
    if is_offline_mode():
        raise HubError(f"HF_HUB_OFFLINE is set; unset it to push to {repo_id}")
    token = get_token()
    if not token:
        raise HubError(f"there is no token for the Hub; {_login(repo_id)}")
    return HfApi(token=token)


def _login(repo_id: str) -> str:
    return f"run `hf auth login` or set HF_TOKEN, with a token that has write access to {repo_id}"


@contextmanager
def limited(silence_s: float) -> Iterator[None]:
    """Let huggingface_hub send each request only once, and let a request fail after `silence_s` seconds without a byte."""

    def factory() -> httpx2.Client:
        client = default_client_factory()
        client.send = partial(_send, client.send, silence_s)  # type: ignore[method-assign]
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _send(
    send: Callable[..., httpx2.Response], silence_s: float, request: httpx2.Request, **options: Any
) -> httpx2.Response:
    """Send a request to the Hub. Raise the errors that huggingface_hub would retry silently or misread."""
    # The client's own timeout does not serve: huggingface_hub passes timeout=None with some requests.
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), silence_s)
    try:
        response = send(request, **options)
    except httpx2.TimeoutException as error:
        raise TimeoutError(f"the Hub was silent for {silence_s:.3g} s") from error
    except httpx2.TransportError as error:
        raise ConnectionError(f"the connection to the Hub failed ({error})") from error
    if response.status_code in (401, 403, 408, 409, 412, 429) or response.status_code >= 500:
        response.read()
        hf_raise_for_status(response)
    return response


def _read_failure(error: BaseException, api: HfApi) -> _Failure:
    """Return the failure that an exception of huggingface_hub means.

    The uploads of huggingface_hub wrap the real exception in a RuntimeError.
    """
    cause: BaseException = error
    while isinstance(cause, RuntimeError) and cause.__cause__:
        cause = cause.__cause__
    seconds, words = 0, str(cause) or type(cause).__name__
    if "/xet-" in words and "token/" in words and "404" in words:  # the request for the address of the upload
        return _Failure(NO_XET)
    of_xet = re.search(r"HTTP status \w+ error \((\d+) ([^)]*)\)", words)  # hf_xet raises ConnectionError for all
    if isinstance(cause, HfHubHTTPError):
        response = cause.response
        status, words = response.status_code, cause.server_message or response.reason_phrase
        header, limit = response.headers.get("Retry-After", ""), parse_ratelimit_headers(response.headers)
        seconds = int(header) if header.isdigit() else limit.reset_in_seconds if limit and not limit.remaining else 0
    elif of_xet:
        status, words = int(of_xet[1]), of_xet[2]
    elif isinstance(cause, PermissionError) and cause.filename is None:  # how hf_xet reports a refused token
        status = 401
    elif isinstance(cause, json.JSONDecodeError):
        return _Failure(f"{api.endpoint} does not answer as a Hub does; check HF_ENDPOINT")
    else:
        # A retry does not help if a local file cannot be read, or if huggingface_hub finds a fault in the files.
        stays = isinstance(cause, ValueError) or (isinstance(cause, OSError) and cause.filename is not None)
        return _Failure(_quote(words, api), passing=not stays, silence=isinstance(cause, TimeoutError))
    if status == HTTPStatus.BAD_REQUEST and "license" in words.lower():
        words = f"{words}; choose a --license of {LICENSE_LIST}"
    return _Failure(
        f"the Hub answers {status}: {_quote(words, api)}" + (f" (asking to wait {seconds} s)" if seconds else ""),
        status,
        denied=status in (401, 403),
        passing=status in (408, 409, 412, 429) or status >= 500,
        retry_after=seconds,
    )


def _quote(text: str, api: HfApi) -> str:
    line = " ".join(redact(text.replace(str(api.token), "[redacted]")).split())
    return line if len(line) <= QUOTED_CHARACTERS else f"{line[:QUOTED_CHARACTERS]}…"
