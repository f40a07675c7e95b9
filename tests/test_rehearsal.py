"""A SageMaker job rehearsed on this machine as two hosts: the short form of `make sagemaker-rehearse`."""

from conftest import TINY
from local_sagemaker import need_containers
from rehearse_sagemaker import rehearse
from t2i import config, models


def test_a_job_played_through_on_two_hosts(tmp_path, command):
    need_containers()
    (tmp_path / "tiny.yaml").write_text(TINY)
    command("make_flowers.py", "--output_dir", "dataset", "--count", 40, "--validation_count", 8, "--test_count", 4,
            "--size", 32, "--workers", 1, cwd=tmp_path)  # fmt: skip
    models.build_vae(config.load_recipe(str(tmp_path / "tiny.yaml")).vae).save_pretrained(tmp_path / "vae")
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--dataset", str(tmp_path / "dataset"), "--vae", str(tmp_path / "vae"),
                 "--checkpointing_steps", "20", "--validation_steps", "20"]  # fmt: skip
    rehearse(tmp_path, arguments, stop_at=20, steps=60, run_script=command)
