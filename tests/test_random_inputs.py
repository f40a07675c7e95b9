"""The short form of benchmarks/random_inputs.py: random options and damaged data sets end in a sentence, without a loss."""

import json

from conftest import ROOT


def test_random_options_and_damaged_data_sets_end_as_promised(workspace, command):
    options = ("--workspace", workspace, "--seed", 7, "--commands", 6, "--data_sets", 10, "--subprocesses", 0)
    done = command(ROOT / "benchmarks/random_inputs.py", *options, cwd=ROOT, fork=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["faults"] == 0
    assert {"0", "2"} <= told["commands"]["exit codes"].keys() | told["data sets"]["exit codes"].keys()
