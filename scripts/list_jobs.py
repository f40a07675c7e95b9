"""List this suite's jobs on every cloud: state, cost so far, and the command that fetches each job.

python scripts/list_jobs.py

A cloud that cannot be asked, for example because it has no credentials here, gets a line with the reason instead.
"""

import argparse
import sys
from pathlib import Path

from t2i.clouds import launch, staging
from t2i.errors import UserError, run_main

CONFIGS = ("hf_jobs.yaml", "sagemaker.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = [str(staging.ROOT / "accelerate_configs" / name) for name in CONFIGS]
    parser.add_argument(
        "--config_files", nargs="+", default=files, help="YAML of each cloud (default: those in accelerate_configs/)"
    )
    jobs: list[launch.Job] = []
    reasons = []
    paths = [Path(name) for name in parser.parse_args().config_files]
    for path in paths:
        try:
            jobs += jobs_of(path)
        except UserError as error:
            reasons.append(f"{path.name}: {error}")
    if len(reasons) < len(paths):
        print("\n".join(launch.job_table(jobs)))
    for reason in reasons:
        print(f"no jobs by {reason}", file=sys.stderr)
    if len(reasons) == len(paths):
        raise UserError("no cloud could be asked for jobs; fix one of the reasons above")


def jobs_of(path: Path) -> list[launch.Job]:
    """Return the jobs of the cloud that a YAML describes. Packages of a cloud are imported only if it is asked."""
    kind = staging.read_mapping(path).get("compute_environment")
    if kind == "HF_JOBS":
        from t2i.clouds import hf_account, hf_job

        with hf_account.in_words():
            return hf_account.jobs(hf_account.look(hf_job.read_config(path)), path)
    if kind == "AMAZON_SAGEMAKER":
        from t2i.clouds import aws_account, aws_errors, sagemaker_job

        config = sagemaker_job.read_config(path)
        aws_account.find_region(config)
        with aws_errors.in_words():
            return aws_account.jobs(config, path)
    raise UserError(f"{path} is for no cloud; name hf_jobs.yaml, sagemaker.yaml or a copy of them")


if __name__ == "__main__":
    run_main(main)
