"""A training tells how far it is, and takes requests between two steps, which change nothing of what it learns."""

import json
import os
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from t2i.errors import UserError
from t2i.runs import checkpoint_folders
from t2i.training import live, loop
from t2i.training.stopping import EXIT_STOPPED
from test_resume import COMMON, run_main  # noqa: F401 - a fixture

ALONE = SimpleNamespace(num_processes=1, is_main_process=True)
FOREIGN = (
    "[1, 2", "[]", '"stop"', '{"requests": "stop"}', '{"stop": true}', "\x00\xff", "[" * 3000, "stop", "x" * 5000, "NaN",
)  # fmt: skip


def write(run: Path, text: str) -> Path:
    """A file of requests, newer than the one before even where clocks are coarse."""
    file = run / live.REQUESTS
    file.write_bytes(text.encode("latin-1"))
    os.utime(file, ns=(time.time_ns(), time.time_ns()))
    return file


def weights(run: Path) -> dict[str, dict[str, bytes]]:
    """What a training learnt and from where it goes on: weights, average, moments and random states of each checkpoint.

    Python's own random state is left out: no training draws from it, but a sender of curves that waits for a server does, such as
    one that a test before has left in this process.
    """
    files = [path for folder in checkpoint_folders(run) for path in sorted(folder.rglob("*.safetensors"))]
    tensors = {path: {name: value.numpy().tobytes() for name, value in load_file(path).items()} for path in files}
    for path, content in tensors.items():
        if path.name.startswith("rng-"):
            del content["python"]
    return {str(path.relative_to(run)): content for path, content in tensors.items()}


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Three of ten steps are made, and the next look for requests is due at once."""
    monkeypatch.setattr(live, "LOOK_S", 0)
    monkeypatch.setattr(live, "WRITE_S", 0)
    with live.listen(tmp_path, 3, 10, 32, ALONE) as one:
        yield one


def test_it_says_how_far_it_is(training, tmp_path):
    row = live.read_live(tmp_path)
    assert (row["step"], row["steps"], row["pid"], row["samples_per_second"]) == (3, 10, os.getpid(), None)
    for done in (4, 5, 6):
        time.sleep(0.02)
        training.after(done)
    row = live.read_live(tmp_path)
    assert row["step"] == 6
    assert 0 < row["samples_per_second"] <= 32 / 0.02
    assert 4 * 0.02 <= row["seconds_left"] < 60
    assert 1e6 < row["memory_bytes"] < 1e12


def test_requests_are_taken_once_and_their_answer_is_told(training, tmp_path):
    live.ask(tmp_path, "sample")
    live.ask(tmp_path, "evaluate")  # asked before the first was taken
    asked = training.after(4)
    assert (asked.sample, asked.evaluate, asked.stop) == (True, True, False)
    assert live.read_live(tmp_path)["doing"] == "drawing samples; measuring the validation images"
    assert training.after(5) == live.Asked()
    row = live.read_live(tmp_path)
    assert (row["doing"], row["answered"]) == ("", {"sample": 4, "evaluate": 4})
    live.ask(tmp_path, "stop")
    assert training.after(6).stop
    live.ask(tmp_path, "stop")
    assert not training.after(10).stop  # the last step ends the training anyway


@pytest.mark.parametrize("text", FOREIGN)
def test_a_foreign_file_gets_one_sentence_and_stays(training, tmp_path, text, capsys):
    file = write(tmp_path, text)
    assert [training.after(done) for done in (4, 5, 6)] == [live.Asked()] * 3
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert str(file) in said
    assert file.read_bytes() == text.encode("latin-1")
    write(tmp_path, '{"requests": ["sample"]}')
    assert training.after(7) == live.Asked(sample=True)


def test_other_kinds_of_files_and_requests_get_a_sentence(training, tmp_path, capsys):
    file = tmp_path / live.REQUESTS
    os.mkfifo(file)  # reading it would wait for ever
    assert training.after(4) == live.Asked()
    assert "no regular file" in capsys.readouterr().err
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert training.after(5) == live.Asked()
    assert "no regular file" in capsys.readouterr().err
    file.unlink()
    file.mkdir()
    assert training.after(6) == live.Asked()
    file.rmdir()
    write(tmp_path, '{"requests": ["reboot", "sample", 7]}')
    assert training.after(7) == live.Asked(sample=True)
    assert "asks for 'reboot', 7, which no training does; ask for sample, evaluate, stop" in capsys.readouterr().err
    write(tmp_path, "")  # about to be written
    assert training.after(8) == live.Asked()
    assert capsys.readouterr().err == ""


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)
    )
)
def test_any_json_is_a_request_or_gets_a_sentence(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("any") / live.REQUESTS
    for content in (value, {"requests": value}):
        file.write_text(json.dumps(content))
        known, foreign, refused = set(), [], str(file)
        try:
            known, foreign = live.read_requests(file)
        except UserError as error:
            refused = str(error)
        assert str(file) in refused
        assert known <= set(live.KINDS)
        assert all(isinstance(one, str) for one in foreign)


def test_an_old_request_stops_no_new_training(tmp_path, capsys):
    file = write(tmp_path, '{"requests": ["stop"]}')
    os.utime(file, (1e9, 1e9))
    with live.listen(tmp_path, 0, 5, 1, ALONE) as training:
        assert not training.after(1).stop
    assert not file.exists()
    assert "older than this training" in capsys.readouterr().err


def test_a_full_or_read_only_disk_ends_nothing(training, tmp_path, monkeypatch, capsys):
    live.ask(tmp_path, "sample")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(live, "write_json", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert training.after(4) == live.Asked(sample=True)
    assert training.after(5) == live.Asked()  # it was taken, though it is still there
    assert "cannot be removed (Permission denied)" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be written"):
        live.ask(tmp_path, "sample")


class Rank:
    """A process of two, as accelerate describes it: sums over both are those that the test says."""

    num_processes, device = 2, "cpu"

    def __init__(self, rank: int, others: list[float]) -> None:
        self.is_main_process, self.others, self.messages = rank == 0, others, 0

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.messages += 1
        return tensor + tensor.new_tensor(self.others)


def test_all_ranks_agree_in_the_one_message_that_signals_need(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LOOK_S", 0)
    first, second = Rank(0, [0, 0, 0]), Rank(1, [0, 1, 0])
    with live.listen(tmp_path, 0, 5, 1, first) as one, live.listen(tmp_path, 0, 5, 1, second) as two:
        live.ask(tmp_path, "sample")
        assert two.after(1) == live.Asked(sample=True)
        assert (tmp_path / live.REQUESTS).exists()  # only the main process reads the file
        assert one.after(1) == live.Asked(sample=True)
        assert (first.messages, second.messages) == (1, 1)


def test_requests_change_no_bit_of_a_training(run_main, tmp_path, monkeypatch, capsys):  # noqa: F811 - a fixture
    """Samples, an evaluation, and a stop with a resume: weights, average, moments and random states stay the same."""
    options = ("--max_train_steps", 6, "--lr_warmup_steps", 1, "--checkpointing_steps", 2, "--validation_steps", 6,
               "--logging_steps", 1, "--validation_images", 2, "--num_inference_steps", 1)  # fmt: skip
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    run_main("--output_dir", plain, *options)
    monkeypatch.setattr(live, "LOOK_S", 0)
    record, wishes = loop.record, {1: "sample", 3: "evaluate", 5: "stop"}

    def ask_then_record(row, step, folder, *others):
        if "train_loss" in row and step in wishes:
            live.ask(folder, wishes.pop(step))
        record(row, step, folder, *others)

    monkeypatch.setattr(loop, "record", ask_then_record)
    with pytest.raises(SystemExit) as ended:
        run_main("--output_dir", asked, *options)
    assert ended.value.code == EXIT_STOPPED
    traceback.clear_frames(ended.tb)  # this process ends its run, as its lock says
    assert json.loads((asked / "run.json").read_text())["status"] == "stopped"
    assert checkpoint_folders(asked)[-1].name == "checkpoint-000005"
    run_main("--output_dir", asked, *options)
    said = capsys.readouterr()
    assert "saving a checkpoint and stopping" in said.err
    assert "drawing samples" in said.err
    assert {path.name for path in (asked / "samples").iterdir()} >= {f"step-{step:06d}.png" for step in (1, 2, 3, 6)}
    rows = [json.loads(line) for line in (asked / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 3, 4, 6]
    before, after = weights(plain), weights(asked)
    assert {name.split("/")[0] for name in before} == {f"checkpoint-{step:06d}" for step in (2, 4, 6)}
    assert all(after[name] == content for name, content in before.items())
