"""Keep a run folder in a private repository of the Hub, as its checkpoints are made. This module imports no torch."""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, snapshot_download

from t2i.captions.ledger import is_inspection
from t2i.errors import UserError
from t2i.hub import upload
from t2i.runs import checkpoint_folders

CAPTIONS = "captions.jsonl"  # file of a captioning

POLL_S = 5.0  # between two looks at the run folder
FOLLOW_S = 60.0  # Time for which the push of a checkpoint is retried. The next look tries again.
CAPTIONS_S = 300.0  # between two pushes of captions that are being made


class Mirror:
    """The copy of a run folder in a private repository, where the folder is named run/.

    A thread pushes the run folder once per new checkpoint, and every `CAPTIONS_S` while a captioning adds captions. Each
    push is one commit, so the repository never holds part of a checkpoint. Checkpoints that the training removes are
    removed in the repository.

    Args:
        work: folder that holds run/. A copy of it is made beside it during a push, by hard links if possible.
        repo_id: the repository, `owner/name`.
        say: function that prints one line.
    """

    def __init__(self, work: Path, repo_id: str, say: Callable[[str], Any] = print) -> None:
        self.run, self.repo_id, self._say = work / "run", repo_id, say
        self._copy, self._pushed = work / "sent", ""
        self._captions, self._pushed_at = 0, time.monotonic()  # bytes of the captions that were pushed last, and when
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def restore(self) -> str:
        """Download the run of an earlier job, and return what it resumes from: a checkpoint's name, `CAPTIONS` or ""."""
        # One file at a time: on a failed connection huggingface_hub closes the client that its other threads still use.
        snapshot_download(self.repo_id, allow_patterns=["run/*"], local_dir=self.run.parent, max_workers=1)
        self._pushed, self._captions = self._newest(), _size(self.run / CAPTIONS)
        return self.resumes_from()

    def resumes_from(self) -> str:
        """Return what a run resumes from on this machine: the newest checkpoint's name, `CAPTIONS` or ""."""
        return self._newest() or (CAPTIONS if _size(self.run / CAPTIONS) else "")

    def _newest(self) -> str:
        folders = checkpoint_folders(self.run)
        return folders[-1].name if folders else ""

    def start(self) -> None:
        """Push each new checkpoint from now on."""
        self._thread.start()

    def end(self, deadline: float) -> None:
        """Push the run folder for the last time. The push is retried for `deadline` seconds.

        Raises:
            UserError: the Hub did not accept the push.
        """
        self._ended.set()
        self._thread.join()
        self._push(deadline)

    def _check_owner(self, here: set[str]) -> None:
        """Raise `UserError` if the repository has a newer checkpoint that is not of this run: another job writes it."""
        try:
            there = newest_checkpoint(HfApi(), self.repo_id)
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError):  # all that huggingface_hub raises
            return  # The push, which follows, tries again and tells the reason.
        if there and there not in here and step_of(there) > step_of(self._pushed):
            raise UserError(
                f"{there} is in {self.repo_id}, and not of this job; stop the other job of the same command"
            )

    def _follow(self) -> None:
        while not self._ended.wait(POLL_S):
            captions = _size(self.run / CAPTIONS) != self._captions and time.monotonic() - self._pushed_at > CAPTIONS_S
            if self._newest() in ("", self._pushed) and not captions:
                continue
            try:
                self._push(FOLLOW_S)
            except (UserError, OSError) as error:  # the next checkpoint, or the end of the training, tries again
                self._say(f"WARNING: {self.resumes_from()} is not in {self.repo_id} yet: {error}")

    def _push(self, deadline: float) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        copy_run(self.run, self._copy / "run")
        whole, captions = checkpoint_folders(self._copy / "run"), _size(self._copy / "run" / CAPTIONS)
        newest = whole[-1].name if whole else ""
        self._check_owner({folder.name for folder in whole})
        if not any((self._copy / "run").iterdir()):
            return  # a training that ended before it made a file
        message = f"run at {newest}" if newest else "run without a checkpoint"
        hidden = [path.relative_to(self._copy).as_posix() for path in self._copy.glob("run/.*/*")]
        upload.push_folder(
            self._copy,
            self.repo_id,
            "model",
            files=["run/*", *hidden],
            message=message,
            deadline=deadline,
            say=self._say,
        )
        shutil.rmtree(self._copy, ignore_errors=True)
        self._pushed, self._captions, self._pushed_at = newest, captions, time.monotonic()
        if newest or captions:
            self._say(f"{newest or CAPTIONS} is in {self.repo_id}")


def newest_checkpoint(api: HfApi, repo_id: str) -> str:
    """Return the name of the newest checkpoint of the run in a repository, or ""."""
    return _newest_checkpoint(api.list_repo_files(repo_id))


def _newest_checkpoint(files: Iterable[str]) -> str:
    found = (re.fullmatch(r"run/(checkpoint-(\d+))/manifest\.json", path) for path in files)
    steps = {int(match[2]): match[1] for match in found if match}
    return steps[max(steps)] if steps else ""


def resumes_from(api: HfApi, repo_id: str) -> str:
    """Return what a job resumes from in a repository: the newest checkpoint, the file of captions, or "".

    Repositories of earlier versions lack the inspected photos beside the captions. A captioning cannot resume there.
    """
    files = api.list_repo_files(repo_id)
    if newest := _newest_checkpoint(files):
        return newest
    is_whole = f"run/{CAPTIONS}" in files and any(is_inspection(file.removeprefix("run/")) for file in files)
    return CAPTIONS if is_whole else ""


def _size(file: Path) -> int:
    """Return the size of a file in bytes, or 0 if the file does not exist."""
    return file.stat().st_size if file.is_file() else 0


def step_of(name: str) -> int:
    """Return the step of a checkpoint's name, or -1 for ""."""
    return int(name.rpartition("-")[2]) if name else -1


def copy_run(run: Path, copy: Path) -> None:
    """Copy a run folder at one moment: its complete checkpoints by hard links, and its other visible files.

    Of the hidden files, only the one that lets a captioning resume is copied. Checkpoints that the training removes
    meanwhile are left out.
    """
    copy.mkdir(parents=True)
    for folder in checkpoint_folders(run):
        try:
            shutil.copytree(folder, copy / folder.name, copy_function=_link)
        except (OSError, shutil.Error):  # removed meanwhile
            shutil.rmtree(copy / folder.name, ignore_errors=True)
    for file in run.rglob("*"):
        name = file.relative_to(run)
        hidden = any(part.startswith(".") for part in name.parts) and not is_inspection(name.as_posix())
        if hidden or name.parts[0].startswith("checkpoint-"):
            continue
        if file.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(file, copy / name)


def _link(source: str, target: str) -> None:
    """Make a hard link, or a copy if the disk has no hard links. A checkpoint's files never change."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
