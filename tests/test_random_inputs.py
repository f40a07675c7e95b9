"""The short form of benchmarks/random_inputs.py: random options and damaged data sets end in a sentence, without a loss."""

import json
import subprocess
import sys

from conftest import ROOT


def test_random_options_and_damaged_data_sets_end_as_promised(workspace, environment):
    words = [sys.executable, str(ROOT / "benchmarks/random_inputs.py"), "--workspace", str(workspace), "--seed", "7"]
    words += ["--commands", "6", "--data_sets", "10", "--subprocesses", "0"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["faults"] == 0
    assert {"0", "2"} <= told["commands"]["exit codes"].keys() | told["data sets"]["exit codes"].keys()
