"""Pushing to the Hub: the real clients against a Hub on 127.0.0.1, through every fault that can occur."""

import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import get_session

from conftest import SCRIPTS
from loopback_hub import LoopbackHub
from t2i.config import DataConfig, Recipe, TrainUnetConfig, TrainVaeConfig
from t2i.errors import UserError
from t2i.files import read_json, write_json
from t2i.hub import publish
from t2i.hub import upload as t2i_hub
from t2i.hub.upload import HubError, Target, check_access, check_license, check_repo_id, push_folder
from t2i.loading import explain_loading
from test_cards import EVALUATION, make_run

REPO = "datasets/me/flowers"
FILES = ["data/*.parquet", "notes.txt"]
FOREVER = float("inf")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, this process's clients brought to it. They read the constants' environment variables at import only."""
    with LoopbackHub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "flowers"
    (folder / "data").mkdir(parents=True)
    for index in range(3):
        (folder / f"data/train-{index}.parquet").write_bytes(bytes([index]) * 200_000)
    (folder / "notes.txt").write_text("drawn\n")
    (folder / "run.json").write_text("{}")  # not to be pushed
    (folder / "data/.train-0.parquet.7.part").write_bytes(b"half")
    return folder


def push(folder, said=None, **options):
    said = [] if said is None else said
    return push_folder(
        folder,
        "me/flowers",
        "dataset",
        **({"files": FILES, "message": "flowers", "deadline": 20, "say": said.append} | options),
    )


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def pushed_contents(folder):
    return {
        name: content
        for name, content in contents(folder).items()
        if name.endswith((".parquet", ".txt")) and "/." not in name
    }


def without_attributes(files):
    return {name: content for name, content in files.items() if name != ".gitattributes"}


# --- What a push does ------------------------------------------------------------------------------------------------


def test_evaluation_results_of_another_run_are_deleted_and_those_of_people_stay(hub, tmp_path, monkeypatch):
    def push_run(dataset):
        recipe = Recipe(data=DataConfig(dataset=dataset))
        run = make_run(tmp_path / "runs" / dataset, recipe)
        files = publish.write_eval_results(run, recipe, read_json(run / "run.json"), EVALUATION["report"])
        return push_folder(
            run / "pipeline", "me/tiny", "model", files=["unet/*", *files], message="run",
            outdated=publish.is_from_evaluation,
        )  # fmt: skip

    monkeypatch.chdir(tmp_path)
    push_run("me/drawn")
    ours = hub.files("models/me/tiny")[".eval_results/drawn.yaml"]
    mine = b"- dataset: {id: me/mine, task_id: mine}\n  value: 0.5\n"
    kept = {".eval_results/mine.yaml": mine, ".eval_results/mixed.yaml": ours + mine, ".eval_results/odd.yaml": b"\xff"}
    hub.edit("models/me/tiny", kept)
    others = push_run("me/shells").others
    assert {path: content for path, content in hub.files("models/me/tiny").items() if path in kept} == kept
    assert set(kept) < set(others)
    assert ".eval_results/drawn.yaml" not in hub.files("models/me/tiny")
    assert push_run("photos").changed  # A run on no data set of the Hub has no such results.
    assert ".eval_results/shells.yaml" not in hub.files("models/me/tiny")


def test_first_push_creates_a_private_repository_and_the_second_changes_nothing(hub, folder):
    said, before = [], contents(folder)
    first = push(folder, said)
    assert first.changed
    assert first.url == f"{hub.url}/{REPO}"
    assert first.commit == hub.commits(REPO)[-1].id
    assert hub.repos[REPO].private
    assert without_attributes(hub.files(REPO)) == pushed_contents(folder)
    requests = len(hub.requests)
    second = push(folder, said)
    assert (second.changed, second.commit) == (False, first.commit)
    assert len(hub.commits(REPO)) == 2
    assert len(hub.requests) - requests == 2  # one look at the head, one at its files
    assert said == []
    assert contents(folder) == before
    assert get_session().timeout.read is None  # other users of huggingface_hub get its own client again


def test_a_repository_may_be_public_and_stays_as_visible_as_it_is(hub, folder):
    push(folder, private=False)
    assert not hub.repos[REPO].private
    (folder / "notes.txt").write_text("drawn again\n")
    push(folder, private=True)
    assert not hub.repos[REPO].private
    assert len(hub.commits(REPO)) == 3


def test_stale_files_go_and_foreign_files_stay(hub, folder):
    push(folder)
    hub.edit(REPO, {"LICENSE": "mine", "data/extra.csv": "a,b", "data/.hidden.parquet": "x"})
    uploads = len(hub.uploads)
    (folder / "data/train-2.parquet").unlink()
    (folder / "data/train-1.parquet").write_bytes(b"other")
    push(folder)
    kept = {"LICENSE": b"mine", "data/extra.csv": b"a,b", "data/.hidden.parquet": b"x"}
    assert without_attributes(hub.files(REPO)) == pushed_contents(folder) | kept
    assert len(hub.commits(REPO)) == 4  # created, pushed, edited, pushed
    assert len(hub.uploads) == uploads + 1
    assert len(without_attributes(hub.commits(REPO)[1].files)) == 4  # earlier revisions stay
    push(folder, files=[*FILES, "data/.hidden.parquet"])
    assert "data/.hidden.parquet" not in hub.files(REPO)


def test_linked_folders_are_pushed(hub, folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.jpg").write_bytes(b"a rose")
    (folder / "rose").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "round").symlink_to(folder, target_is_directory=True)
    push(folder, files=["*"])
    files = without_attributes(hub.files(REPO))
    assert files["rose/1.jpg"] == b"a rose"
    assert not [name for name in files if name.startswith("round/")]


def test_an_edit_between_head_and_commit_survives(hub, folder):
    push(folder)
    (folder / "notes.txt").write_text("drawn again\n")
    hub.edit(REPO, {"README.md": "---\nlicense: mit\n---\nwritten by hand\n"})
    seen, said = [], []

    def merge(card):
        seen.append(card)
        if len(seen) == 1:  # while the push is under way
            hub.edit(REPO, {"README.md": "---\nlicense: mit\n---\nwritten by hand, and corrected\n", "LICENSE": "mine"})
        return f"{card}\n## Counts\n3\n"

    done = push(folder, said, merge_card=merge)
    assert hub.files(REPO)["README.md"].decode().endswith("\nwritten by hand, and corrected\n\n## Counts\n3\n")
    assert hub.files(REPO)["LICENSE"] == b"mine"
    assert hub.files(REPO)["notes.txt"] == b"drawn again\n"
    assert done.changed
    assert [card.count("corrected") for card in seen] == [0, 1]
    assert len(said) == 1
    assert "the Hub answers 412: A commit has happened since" in said[0]
    assert not (folder / "README.md").exists()


def test_a_new_repository_has_no_card_to_merge(hub, folder):
    seen = []
    push(folder, merge_card=lambda card: seen.append(card) or "---\nlicense: mit\n---\n# Flowers\n", files=["*"])
    assert seen == [None]
    assert hub.files(REPO)["README.md"].startswith(b"---")
    assert "run.json" in hub.files(REPO)
    assert not push(folder, merge_card=str, files=["*"]).changed


def test_a_space_is_made_for_what_its_card_says(hub, folder):
    (folder / "README.md").write_text("---\nsdk: docker\n---\n")
    done = push_folder(folder, "club/show", "space", files=["*.md"], message="show")
    assert done.url == f"{hub.url}/spaces/club/show"
    assert hub.repos["spaces/club/show"].sdk == "docker"


# --- Faults that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method", "path", "words"),
    [
        ("429", "POST", "/commit/", "the Hub answers 429: ordered by the test (asking to wait 1 s)"),
        ("500", "GET", "/api/datasets/me/flowers", "the Hub answers 500: ordered by the test"),
        ("503", "POST", "/preupload/", "the Hub answers 503: ordered by the test"),
        ("502", "POST", "/objects/batch", "the Hub answers 502: ordered by the test"),
        ("409", "POST", "/repos/create", "the Hub answers 409: ordered by the test"),
        ("reset", "PUT", "/lfs/", "the connection to the Hub failed"),
        ("lost", "POST", "/commit/", "the connection to the Hub failed"),
    ],
)
def test_a_fault_that_passes_is_told_and_tried_again(hub, folder, monkeypatch, kind, method, path, words):
    monkeypatch.setattr(t2i_hub, "FIRST_WAIT_S", 0.6 if kind == "reset" else 0.1)
    hub.fault(kind, method=method, path=path)
    said, before = [], contents(folder)
    done = push(folder, said)
    assert done.changed
    assert done.commit == hub.commits(REPO)[-1].id
    assert without_attributes(hub.files(REPO)) == pushed_contents(folder)
    assert len(hub.commits(REPO)) == 2
    assert len(hub.uploads) == len(set(hub.uploads)) == 3  # nothing that had arrived was uploaded again
    assert len(said) == 1, said
    assert words in said[0]
    assert f"; trying again in {int(kind in ('429', 'reset'))} s (" in said[0]
    assert contents(folder) == before


def test_a_slow_hub_is_waited_for(hub, folder, monkeypatch):
    monkeypatch.setattr(t2i_hub, "FIRST_WAIT_S", 0.1)
    hub.fault("500", path="/commit/")
    hub.fault("slow", times=FOREVER, seconds=0.15)
    said, began = [], time.monotonic()
    assert push(folder, said, deadline=1).changed
    assert time.monotonic() - began > 1  # the deadline counts from the first failure
    assert len(said) == 1
    assert "(1 s left)" in said[0]


# --- Faults that stay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method", "path", "words"),
    [
        ("412", "POST", "/commit/", "the Hub answers 412: ordered by the test"),
        ("stalled", "GET", "/api/datasets/me/flowers", "the Hub was silent for 1 s"),
        ("stalled", "PUT", "/lfs/", "the Hub was silent for 1 s"),
        ("reset", "PUT", "/lfs/", "the connection to the Hub failed"),
    ],
)
def test_a_fault_that_stays_ends_at_the_deadline(hub, folder, kind, method, path, words):
    hub.fault(kind, method=method, path=path, times=FOREVER, seconds=0)
    said, before, began = [], contents(folder), time.monotonic()
    with pytest.raises(HubError) as error:
        push(folder, said, deadline=1)
    assert 0.9 < time.monotonic() - began < 20  # not the minutes of the default deadline
    text = str(error.value)
    assert text.startswith(f"the push to me/flowers failed: {words}")
    assert text.endswith(f"; {folder} is unchanged, and the same command repeats the push")
    assert "\n" not in text
    assert contents(folder) == before
    hub.mend()
    assert push(folder).changed


def test_a_wait_beyond_the_deadline_is_not_begun(hub, folder):
    hub.fault("429", path="/commit/", seconds=600)
    said, began = [], time.monotonic()
    with pytest.raises(HubError, match=r"429: ordered by the test \(asking to wait 600 s\)"):
        push(folder, said, deadline=60)
    assert time.monotonic() - began < 20  # not the 60 s of the deadline
    assert said == []


def test_a_dead_hub_is_an_unreachable_one(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="the connection to the Hub failed"):
        push(folder, deadline=1)


# --- Refusals --------------------------------------------------------------------------------------------------------


def refused(hub, folder, capfd, said):
    """The sentence of a push that was refused at once, with no token in anything written."""
    requests = len(hub.requests)
    with pytest.raises(HubError) as error:
        push(folder, said)
    text = str(error.value)
    written = "".join([text, *said, *capfd.readouterr()])
    for token in (hub.token, hub.read_token, "hf_" + "Canary00" * 4):
        assert token not in written
    assert said == []
    assert "hf auth login" in text
    assert "HF_TOKEN" in text
    assert "\n" not in text
    assert len(hub.requests) - requests <= 4
    return text


def test_refused_tokens(hub, folder, capfd, monkeypatch):
    said = []
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Canary00" * 4)
    assert "the Hub answers 401" in refused(hub, folder, capfd, said)
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert "the Hub answers 403" in refused(hub, folder, capfd, said)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token" in refused(hub, folder, capfd, said)
    assert hub.repos == {}


def test_a_token_refused_in_mid_push_is_not_printed(hub, folder, capfd):
    push(folder)
    (folder / "notes.txt").write_text("drawn again\n")
    hub.fault("401", path="/commit/")
    with pytest.raises(HubError) as error:
        push(folder)
    assert hub.token not in "".join([str(error.value), *capfd.readouterr()])
    assert len([path for _, path in hub.requests if "/commit/" in path]) == 2
    assert "is unchanged" in str(error.value)


def test_refusals_that_hf_xet_meets(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.fault("403", path="/xet-write-token/", times=FOREVER)
    with pytest.raises(HubError, match="the Hub answers 403: Forbidden; run `hf auth login`"):
        push(folder)
    hub.mend()
    with pytest.raises(HubError, match=r"no Xet storage.*set HF_HUB_DISABLE_XET=1"):  # which this Hub has not
        push(folder)


def test_servers_words_are_stripped_of_secrets(hub, folder, monkeypatch):
    from loopback_hub import Handler, Refusal

    def leak(handler, repo, revision):
        raise Refusal(400, f"bad\nrequest with {handler.headers['Authorization']} and token={handler.hub.read_token}")

    monkeypatch.setattr(Handler, "commit", leak)
    with pytest.raises(HubError) as error:
        push(folder)
    assert "the Hub answers 400: bad request with Bearer [redacted]" in str(error.value)
    assert "hf_" not in str(error.value)


def test_invalid_cards_are_refused_before_anything_is_uploaded(hub, folder):
    with pytest.raises(HubError, match=r"Invalid metadata in README.md"):
        push(folder, merge_card=lambda card: "---\nlicense: [mit\n---\n")
    assert hub.uploads == []
    assert len(hub.commits(REPO)) == 1


def test_mistakes_that_need_no_hub(hub, folder, monkeypatch):
    for wrong in (
        "a b",
        "x/y/z",
        "flowers",
        "me/",
        "me/a--b",
        "me/flowers.git",
        "https://huggingface.co/me/flowers",
        "",
        None,
    ):
        with pytest.raises(UserError) as error:
            check_repo_id(wrong, "--hub_dataset_id")
        assert str(error.value).startswith("--hub_dataset_id ")
    assert check_repo_id("me/oxford-flowers_1.0", "--hub_dataset_id") == "me/oxford-flowers_1.0"
    with pytest.raises(HubError, match="no file that matches"):
        push(folder, files=["*.csv"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(folder)
    assert hub.requests == []


# --- Looking ahead ---------------------------------------------------------------------------------------------------


def test_access_is_known_before_the_work(hub, folder, monkeypatch):
    said = []
    check_access("me/flowers", "dataset", said.append)  # will be created
    check_access("club/flowers", "dataset", said.append)
    push(folder)
    check_access("me/flowers", "dataset", said.append)
    assert said == []
    check_access("others/flowers", "dataset", said.append)
    assert said.pop() == "warning: the token belongs to me, who may not be allowed to create others/flowers"
    hub.create("datasets/others/flowers", private=False)
    with pytest.raises(HubError, match="403"):
        check_access("others/flowers", "dataset", said.append)
    for token, words in ((hub.read_token, "may only read"), ("hf_wrong", "the Hub answers 401"), (None, "no token")):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match=words) as error:
            check_access("me/flowers", "dataset", said.append)
        assert "hf auth login" in str(error.value)
    assert said == []


def test_roles_and_scopes_are_known_before_the_work(hub, monkeypatch):
    """What whoami tells of organizations and fine-grained tokens, as the Hub writes it."""
    from loopback_hub import Handler

    whoami, said = Handler.whoami, []

    def account(role=None, scoped=None):
        def answer(handler):
            status, body, headers = whoami(handler)
            body["orgs"] = [{"name": "Club"} | ({"roleInOrg": role} if role else {})]
            if scoped is not None:
                scopes = [
                    {"entity": {"type": kind, "name": name}, "permissions": rights} for kind, name, rights in scoped
                ]
                limits = {"global": ["discussion.write"], "scoped": scopes}
                body["auth"]["accessToken"] = {"role": "fineGrained", "fineGrained": limits}
            return status, body, headers

        monkeypatch.setattr(Handler, "whoami", answer)

    write, read = ["repo.content.read", "repo.write"], ["repo.content.read"]
    hub.create("datasets/club/there")
    for role, scoped, repo, words in (
        ("read", None, "club/new", "may only read in club"),
        (None, [("user", "me", write)], "club/new", "the fine-grained token of me may not write to club/new"),
        (None, [("org", "club", read)], "club/there", "may not write to club/there"),
        (None, [("dataset", "club/new", write)], "club/new", "may not create repositories of club"),
        (None, [], "me/new", "give it write access to repositories of me"),
    ):
        account(role, scoped)
        with pytest.raises(HubError, match=words):
            check_access(repo, "dataset", said.append)
    for role, scoped, repo in (
        ("write", None, "club/new"), ("admin", [("org", "Club", write)], "club/new"),
        ("read", [("dataset", "club/there", write)], "club/there"), (None, [("user", "me", write)], "me/new"),
    ):  # fmt: skip
        account(role, scoped)
        check_access(repo, "dataset", said.append)
    assert said == []
    account("contributor")
    check_access("club/new", "dataset", said.append)
    assert said == [
        "warning: me is a contributor in club, and may not be allowed to create club/new or to write to it later"
    ]


@pytest.mark.parametrize(
    "given",
    [
        "me/flowers.git", "https://huggingface.co/datasets/me/flowers", "datasets/me/flowers", "hf.co/me/flowers/",
        "https://huggingface.co/me/flowers/tree/main", " me/flowers ", "https://huggingface.co/datasets/me/flowers.git",
    ],
)  # fmt: skip
def test_an_address_of_the_hub_gets_the_name_that_is_meant(given):
    with pytest.raises(HubError, match=r"--hub_dataset_id '.*' is not a repository of the Hub; give me/flowers$"):
        check_repo_id(given, "--hub_dataset_id")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("CC-BY-4.0", "cc-by-4.0"), ("CC BY 4.0", "cc-by-4.0"), ("Apache 2.0", "apache-2.0"), ("GPLv3", "gpl-3.0"),
        ("CC0", "cc0-1.0"), ("The MIT License", "mit"), ("https://creativecommons.org/licenses/by-nc-sa/4.0/", "cc-by-nc-sa-4.0"),
        ("cc-by", "cc-by-4.0"), ("unlicensed", "unlicense"), ("proprietary", "give other"),
    ],
)  # fmt: skip
def test_a_licence_that_the_hub_has_not_is_known_before_the_work(given, meant):
    with pytest.raises(HubError, match=f"did you mean {meant}|{meant};"):
        check_license(given)
    for taken in ("cc-by-4.0", "unknown", "other", "openrail++", None):
        check_license(taken)


def test_what_cannot_be_loaded_says_why(hub, monkeypatch, tmp_path):
    """By the real clients: gated, private or misspelled, a wrong revision or token, offline, no network."""
    from diffusers import AutoencoderKL

    from loopback_hub import Handler, Refusal
    from t2i.models import load_vae

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)

    def told(name="me/vae", revision=None):
        with pytest.raises(UserError) as error:
            load_vae(name, revision)
        return str(error.value)

    hub.create("models/me/vae")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, latent_channels=1)
    vae.save_pretrained(tmp_path / "vae")
    push_folder(tmp_path / "vae", "me/vae", "model", files=["*"], message="vae")
    assert "me/vae has no revision v9; " in told(revision="v9")
    assert "the Hub shows no me/misspelled: correct the name, or your token may not read it" in told("me/misspelled")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in told()
    monkeypatch.delenv("HF_TOKEN")
    assert "correct the name, or it is private: `hf auth login`, or set HF_TOKEN" in told()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    resolve = Handler.resolve

    def gated(*_, **__):
        raise Refusal(403, "Access to model me/vae is restricted", "GatedRepo")

    monkeypatch.setattr(Handler, "resolve", gated)
    assert f"me/vae is gated: accept its conditions at {hub.url}/me/vae" in told()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it, or first run, with a network, `hf download me/vae`" in told()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Handler, "resolve", resolve)
    assert load_vae("me/vae").config.latent_channels == 1  # and what was refused was the fault's doing alone
    assert explain_loading(ValueError("no such thing"), "me/vae") is None


def test_a_push_that_repeating_cannot_help_does_not_advise_it(hub, folder, monkeypatch):
    from loopback_hub import Handler, Refusal

    def refuse(handler):
        raise Refusal(400, '"license" must be one of [apache-2.0, mit]')

    monkeypatch.setattr(Handler, "validate_yaml", refuse)
    (folder / "README.md").write_text("---\nlicense: MIT\n---\n")
    with pytest.raises(HubError) as error:
        push(folder, files=["README.md", "notes.txt"])
    assert "correct that, then push again" in str(error.value)
    assert "repeats the push" not in str(error.value)


@pytest.mark.parametrize("kind", ["429", "500", "reset", "stalled"])
def test_a_hub_that_cannot_be_asked_is_no_obstacle(hub, monkeypatch, kind):
    monkeypatch.setattr(t2i_hub, "CHECK_S", 0.5)
    hub.fault(kind, path="whoami")
    said = []
    check_access("me/flowers", "dataset", said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: cannot check now whether me/flowers may be written to: ")


# --- The clients that read what was pushed ---------------------------------------------------------------------------

CLIENTS = """
import os, sys
from pathlib import Path
from t2i.hub.upload import push_folder
import datasets, huggingface_hub, torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel

rows = {"image": ["a.png", "b.png"], "caption": ["a rose", "a lily"]}
folder = Path("flowers")
datasets.Dataset.from_dict(rows).to_parquet(folder / "data/train-00000.parquet")
card = "---\\nconfigs:\\n- config_name: default\\n  data_files:\\n  - split: train\\n    path: data/train-*\\n---\\n# Flowers\\n"
done = push_folder(folder, "me/flowers", "dataset", files=["data/*"], message="flowers", merge_card=lambda _: card)
read = datasets.load_dataset("me/flowers", token=os.environ["HF_TOKEN"])
assert read["train"].to_dict() == rows
assert list(datasets.load_dataset("me/flowers", split="train", streaming=True))[1]["caption"] == "a lily"

both = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows), test=datasets.Dataset.from_dict(rows))
for _ in range(2):
    both.push_to_hub("me/pushed", private=True)
assert datasets.load_dataset("me/pushed", split="test").to_dict() == rows
old = datasets.load_dataset("me/flowers", revision=done.commit, split="train", download_mode="force_redownload")
assert old.to_dict() == rows

unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32,), layers_per_block=1,
                   down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
pipeline = Path("pipeline")
DDPMPipeline(unet, DDPMScheduler()).save_pretrained(pipeline)
text = CLIPTextModel(CLIPTextConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                    num_attention_heads=1, max_position_embeddings=8))
text.save_pretrained(pipeline / "text_encoder")
model = push_folder(pipeline, "me/model", "model", files=["*.json", "*.safetensors"], message="model")
loaded = DiffusionPipeline.from_pretrained("me/model")
assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), loaded.unet.state_dict().values(), strict=True))
encoder = CLIPTextModel.from_pretrained("me/model", subfolder="text_encoder")
assert torch.equal(next(encoder.parameters()), next(text.parameters()))

api = huggingface_hub.HfApi()
api.upload_folder(repo_id="me/model", folder_path=str(pipeline), path_in_repo="copy")
assert len(api.list_repo_files("me/model")) == 2 * len(api.list_repo_files("me/model", revision=model.commit)) - 1
api.delete_folder("copy", "me/model")
snapshot = Path(api.snapshot_download("me/model", revision=model.commit))
assert (snapshot / "unet/config.json").read_bytes() == (pipeline / "unet/config.json").read_bytes()
with huggingface_hub.HfFileSystem().open("datasets/me/flowers/data/train-00000.parquet") as file:
    file.seek(-4, 2)
    assert file.read() == b"PAR1"
for call, error in ((lambda: api.repo_info("me/none"), huggingface_hub.errors.RepositoryNotFoundError),
                    (lambda: api.repo_info("me/model", revision="v9"), huggingface_hub.errors.RevisionNotFoundError),
                    (lambda: api.hf_hub_download("me/model", "none"), huggingface_hub.errors.EntryNotFoundError),
                    (lambda: huggingface_hub.HfApi(token=False).repo_info("me/model"), huggingface_hub.errors.HfHubHTTPError)):
    try:
        call()
    except error:
        continue
    raise AssertionError(error)
print(done.commit)
"""


def test_the_real_clients_read_what_was_pushed(tmp_path, command):
    (tmp_path / "clients.py").write_text(CLIENTS)
    with LoopbackHub() as hub:
        variables = hub.environment() | {"PYTHONPATH": str(SCRIPTS), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = command(tmp_path / "clients.py", cwd=tmp_path, env=variables, fork=True)
        assert done.stdout.split()[-1] == hub.commits(REPO)[-1].id
        assert len(hub.commits(REPO)) == 2
        assert hub.repos["models/me/model"].private
        assert hub.token not in done.stdout + done.stderr


# --- Branches and pull requests --------------------------------------------------------------------------------------


def test_a_branch_is_made_once_and_main_stays(hub, folder):
    push(folder)
    main = hub.files("datasets/me/flowers")
    (folder / "notes.txt").write_text("changed\n")
    done = push(folder, target=Target("try/1"))
    assert done.url.endswith("/datasets/me/flowers/tree/try/1")
    assert hub.files("datasets/me/flowers") == main
    branch = hub.repos["datasets/me/flowers"].refs["try/1"]
    assert (branch.id, branch.files["notes.txt"].content) == (done.commit, b"changed\n")
    assert not push(folder, target=Target("try/1")).changed  # a repeated push changes nothing


def test_a_pull_request_needs_to_read_alone(hub, folder, monkeypatch):
    push(folder)
    main = hub.files("datasets/me/flowers")
    (folder / "notes.txt").write_text("proposed\n")
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    check_access("me/flowers", "dataset", target=Target(create_pr=True))
    done = push(folder, target=Target(create_pr=True))
    assert done.url == f"{hub.url}/datasets/me/flowers/discussions/1"
    assert hub.files("datasets/me/flowers") == main
    assert hub.repos["datasets/me/flowers"].refs["refs/pr/1"].files["notes.txt"].content == b"proposed\n"
    with pytest.raises(HubError, match="me/none does not exist, so no pull request can be opened in it"):
        check_access("me/none", "dataset", target=Target(create_pr=True))


@pytest.mark.parametrize(
    ("revision", "create_pr", "sentence"),
    [
        ("dev", True, "leave out --hub_revision, or --create_pr"),
        ("my branch", False, "--hub_revision 'my branch' is not a valid name of a branch"),
    ],
)
def test_a_target_that_is_none(revision, create_pr, sentence):
    with pytest.raises(HubError, match=sentence):
        Target(revision, create_pr)


def test_a_pull_request_that_is_not_there(hub, folder):
    push(folder)
    with pytest.raises(HubError, match="me/flowers has no refs/pr/7; give the number of an open pull request"):
        push(folder, target=Target("refs/pr/7"))


# --- Autoencoders ----------------------------------------------------------------------------------------------------


def test_an_autoencoder_leaves_the_files_of_others(hub, tmp_path):
    """Weights in folders of the same repository are not the autoencoder's, even with the same file name."""
    weights = "diffusion_pytorch_model.safetensors"
    figures = {"psnr_db": 27.3, "psnr_db_before": 20.0, "ssim": 0.9, "ssim_before": 0.5, "scaling_factor": 0.9}
    write_json(tmp_path / "run.json", {**figures, "steps": 1200, "output_vae_hash": "abc"})
    write_json(tmp_path / "vae/config.json", {"block_out_channels": [8, 8, 8]})
    (tmp_path / "vae" / weights).write_bytes(b"new")
    others = {f"{part}/{weights}": part.encode() for part in ("unet", "text_encoder", "vae")}
    hub.create("models/me/both")
    hub.edit("models/me/both", {**others, weights: b"old"})
    config = TrainVaeConfig(push_to_hub=True, hub_model_id="me/both", license="mit")
    publish.check_push(config, SimpleNamespace(is_main_process=True))
    publish.publish_vae(tmp_path, config)
    files = hub.files("models/me/both")
    assert {path: files.get(path) for path in others} == others
    assert files[weights] == b"new"
    assert "4 px per latent" in files["README.md"].decode()


@pytest.mark.parametrize("branch", [None, "dev", "new"])
def test_an_autoencoder_is_not_pushed_beside_a_pipeline(hub, branch):
    hub.create("models/me/both")
    main = SimpleNamespace(is_main_process=True)
    config = TrainVaeConfig(push_to_hub=True, hub_model_id="me/both", license="mit", hub_revision=branch)
    publish.check_push(config, main)
    hub.edit("models/me/both", {"model_index.json": "{}"})
    if branch == "dev":
        hub.repos["models/me/both"].refs["dev"] = hub.commits("models/me/both")[-1]
        hub.edit("models/me/both", {"model_index.json": None})
    with pytest.raises(UserError, match=r"me/both holds a pipeline .*; give another one, such as me/both-vae$"):
        publish.check_push(config, main)
    publish.check_push(TrainUnetConfig(push_to_hub=True, hub_model_id="me/both", license="mit"), main)
