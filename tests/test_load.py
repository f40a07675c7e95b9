"""The dashboard under load: the short form of `make load-dashboard`."""

import shutil

from load_dashboard import run_load


def test_sessions_that_click_around_meet_no_error(tmp_path, workspace):
    for name in ("one", "two"):  # of the same weights, but models of their own: six in all
        shutil.copytree(workspace / "unet", tmp_path / "outputs" / name)
    run_load(tmp_path, sessions=5, seconds=8, seed=0)
