"""Explain in one sentence, with the fix, why something cannot be loaded from the Hugging Face Hub. This module imports no torch."""

import os
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from t2i.config import SourceConfig, check_dataset, near_folder
from t2i.errors import UserError

RepoType = Literal["dataset", "model", "space"]

NO_XET = "this Hub has no Xet storage, which huggingface_hub uses by default; set HF_HUB_DISABLE_XET=1"


def explain_loading(
    error: BaseException, repo_id: str, revision: str | None = None, repo_type: RepoType = "model"
) -> str | None:
    """Return one sentence on why `repo_id` cannot be loaded from the Hub, with the fix.

    The result is None if the cause is not the Hub.

    Args:
        error: Exception of transformers, diffusers, datasets or huggingface_hub. The causes of the exception are examined as well.
        repo_id: Name of the repository, `owner/name`.
        revision: Branch, tag or commit that should be loaded. With None, the branch main is meant.
        repo_type: Kind of the repository: model, dataset or space.
    """
    page = f"{constants.ENDPOINT}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    chain = list(_causes(error))
    logged_in = "with the account of your token" if get_token() else "and log in: `hf auth login`, or set HF_TOKEN"

    def find(*kinds: type[BaseException]) -> BaseException | None:
        return next((one for one in chain if isinstance(one, kinds)), None)

    answers = (one for one in chain if isinstance(one, HfHubHTTPError) and one.response is not None)
    status = next((one.response.status_code for one in answers), None)
    if find(GatedRepoError):
        return f"{repo_id} is gated: accept its conditions at {page} {logged_in}"
    if find(RevisionNotFoundError):
        return f"{repo_id} has no revision {revision or 'main'}; {page}/tree/main shows its branches and tags"
    if find(RepositoryNotFoundError) or (status == HTTPStatus.UNAUTHORIZED and not get_token()):
        access = (
            "or your token may not read it: use another one (`hf auth login`)"
            if get_token()
            else "or it is private: `hf auth login`, or set HF_TOKEN"
        )
        return f"the Hub shows no {repo_id}: correct the name, {access}"
    if status == HTTPStatus.UNAUTHORIZED and get_token():
        return "the Hub does not accept your token (401); run `hf auth login` again, or correct HF_TOKEN"
    if status == HTTPStatus.FORBIDDEN:
        return f"your token may not read {repo_id} (403); give it that access, or use another one (`hf auth login`)"
    if status is not None and (status >= 500 or status == HTTPStatus.TOO_MANY_REQUESTS):
        return f"the Hub is busy (it answers {status}); try again in a few minutes"
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("0", "")
    ]
    if is_offline_mode() and find(LocalEntryNotFoundError, OfflineModeIsEnabled):
        kind = "" if repo_type == "model" else f" --repo-type {repo_type}"
        revised = f" --revision {revision}" if revision else ""
        switch = offline[0] if offline else "HF_HUB_OFFLINE"
        return (
            f"{repo_id} is not in the Hub's cache here, and {switch} is set; unset it, or first run, with a network, "
            f"`hf download {repo_id}{kind}{revised}`"
        )
    if (find(LocalEntryNotFoundError) or any(_is_transport(one) for one in chain)) and not is_offline_mode():
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached, and {repo_id} is not in its cache here; check the network, "
            "HTTPS_PROXY and HF_ENDPOINT"
        )
    if any("xet-read-token" in str(one) for one in chain):
        return NO_XET
    return None


def find_dataset(config: SourceConfig) -> None:
    """Check that `--dataset` exists, before slow imports.

    Other faults of the Hub are reported later, when the data set is loaded.

    Raises:
        UserError: The data set is neither a folder, nor in the cache, nor on the Hub.
    """
    name = str(config.dataset)
    if check_dataset(config.dataset) or _is_cached(name):
        return
    try:
        HfApi().dataset_info(name, revision=config.dataset_revision, timeout=10)
    except (OSError, ValueError, RuntimeError) as error:
        gone = isinstance(error, RepositoryNotFoundError | OfflineModeIsEnabled) and not isinstance(
            error, GatedRepoError
        )
        why = explain_loading(error, name, config.dataset_revision, "dataset")
        if gone and why:
            near = near_folder(Path(name))
            meant = f"did you mean {near}? Else: " if near else ""
            raise UserError(f"--dataset {name}: there is no such folder here; {meant}{why}") from None


def find_model(name: str, option: str, revision: str | None = None) -> None:
    """Check that a model, which a later stage loads, is a folder, in the cache or on the Hub.

    Args:
        name: folder or Hub id of the model.
        option: option that names the model, for messages.
        revision: branch, tag or commit of a Hub model.

    Raises:
        UserError: The model is nowhere, or the Hub does not show it to this user.
    """
    path = Path(name).expanduser()
    if path.exists() or (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        return
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except (OSError, ValueError, RuntimeError) as error:
        near = near_folder(path)
        meant = f"did you mean {near}? Else: " if near else ""
        why = explain_loading(error, name, revision) or "give a folder, or a Hub id of the form owner/name"
        raise UserError(f"--{option} {name}: there is no such folder here; {meant}{why}") from None


def _is_cached(name: str) -> bool:
    """Return whether the cache of the Hub or of `datasets` holds any file of a data set."""
    home = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    downloads = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return downloads.is_dir() or any(home.glob(f"{name.split('/')[0]}___*")) or (home / name).is_dir()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, the nearest first."""
    seen: set[int] = set()
    todo: BaseException | None = error
    while todo is not None and id(todo) not in seen:
        seen.add(id(todo))
        yield todo
        todo = todo.__cause__ or todo.__context__


def _is_transport(error: BaseException) -> bool:
    """Return whether an exception is a transport error of huggingface_hub's HTTP client."""
    return any(cls.__name__ == "TransportError" and cls.__module__.startswith("httpx") for cls in type(error).__mro__)
