"""Kill captioning at random moments, and check that no caption is lost or made twice.

python tests/prove_captions.py --kills 20     (make prove-captions)

The command captions drawn flowers with a small random Florence-2, once with one process and once with two. SIGKILL hits every
process of the run at one moment, launcher and workers alike. The moment is random after the first caption. Every third kill
comes as soon as a file grows, which is within a write or beside one. The same command starts again after each kill, and at
last runs to its end. After each kill, no process may be left, and every line on disk must be unchanged. At the end, each image
must have exactly one line.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
sys.path.append(str(Path(__file__).parent))

from processes import kill_all, marked, new_mark  # noqa: E402


def prove(
    folder: Path,
    photos: Path,
    model: Path,
    processes: int,
    kills: int,
    seed: int,
    run_last: Callable[[list[str]], str] | None = None,
) -> str:
    """Run the proof in `folder` and return a summary. Raises AssertionError for a broken promise.

    Args:
        run_last: runs the last command to its end by the arguments of caption_to_hub.py, and returns its output. None: the
            launcher does.
    """
    chance = random.Random(seed)
    output, ledger = folder / f"captioned-{processes}", folder / f"captioned-{processes}" / "captions.jsonl"
    count = sum(1 for _ in photos.glob("*.png"))
    kept: list[str] = []
    done = 0
    while done < kills:
        process, mark = start(photos, model, output, processes)
        before = len(kept)
        while len(lines(ledger)) <= before and process.poll() is None:  # until its first caption
            time.sleep(0.01)
        known = marked(mark)
        if done % 3 == 0:
            wait_for_write(ledger, process)
        else:
            time.sleep(chance.uniform(0, 0.5))
        killed = kill_all(mark, known)
        process.wait()
        now = lines(ledger)
        assert now, f"it ended before its first caption: {log_of(output).read_text(errors='replace')[-12000:]}"
        finished = len(now) >= count and len(killed) <= processes  # a worker had come to its end
        assert finished or len(killed) > processes, (
            f"{len(killed)} processes for a launcher and {processes} workers, {len(now)} of {count} captions: "
            + log_of(output).read_text(errors="replace")[-3000:]
        )
        assert now[:before] == kept, "a caption that was on disk is gone or changed"
        kept = now
        done += not finished
        if finished or len(kept) >= count:  # nothing is left to interrupt: begin anew
            check(kept, count)
            ledger.unlink()
            kept = []
    if run_last:
        with open(log_of(output), "a") as log:
            log.write(run_last(arguments(photos, model, output)))
    else:
        end, _ = start(photos, model, output, processes)
        assert end.wait(timeout=300) == 0, log_of(output).read_text(errors="replace")[-3000:]
    now = lines(ledger)
    assert now[: len(kept)] == kept, "a caption that was on disk is gone or changed"
    check(now, count)
    if processes > 1:
        assert f"process 1 of {processes}" in log_of(output).read_text(errors="replace"), "it ran on one process"
    return f"{processes} process(es): {done} kills of all processes, {count} images, no caption lost, none made twice"


def arguments(photos: Path, model: Path, output: Path) -> list[str]:
    """Return the arguments of caption_to_hub.py."""
    return ["--dataset", str(photos), "--captioner", str(model), "--output_dir", str(output), "--caption_batch_size", "2",
            "--max_new_tokens", "8", "--num_beams", "1", "--audit_tokenizer", str(model)]  # fmt: skip


def start(photos: Path, model: Path, output: Path, processes: int) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    """Start the command as users type it. Return its process and the mark of all its processes."""
    settings = (ROOT / "accelerate_configs" / "cpu.yaml").read_text()
    if processes > 1:
        settings = settings.replace("num_processes: 1", f"num_processes: {processes}").replace("'NO'", "MULTI_GPU")
    config = output.with_name(f"cpu-{processes}.yaml")
    config.write_text(settings)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    words = [*launch, str(ROOT / "scripts" / "caption_to_hub.py"), *arguments(photos, model, output)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    mark = new_mark()
    with open(log_of(output), "ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment | mark, start_new_session=True)
    return process, mark


def wait_for_write(ledger: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the file grows."""
    size = len(lines(ledger))
    while process.poll() is None and len(lines(ledger)) == size:
        time.sleep(0.0005)


def log_of(output: Path) -> Path:
    """Return the log's path, beside the output folder, which belongs to the command."""
    return output.with_name(f"{output.name}.log")


def lines(ledger: Path) -> list[str]:
    """Return the complete lines of the file."""
    return ledger.read_text(encoding="utf-8").split("\n")[:-1] if ledger.is_file() else []


def check(rows: list[str], count: int) -> None:
    """Check that each image has exactly one line."""
    images = [json.loads(row)["image"] for row in rows]
    assert len(images) == len(set(images)), "an image was captioned twice"
    assert len(images) == count, f"{len(images)} captions for {count} images"


def draw_photos(folder: Path, count: int) -> Path:
    """Draw `count` small pictures, each with a caption file beside it."""
    from PIL import Image

    from t2i.data import flowers

    folder.mkdir(parents=True)
    for number, (_, image, caption) in enumerate(flowers.draw_many(0, 0, count, 32, False, 1)):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(caption)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills for each number of processes")
    parser.add_argument("--images", type=int, default=600, help="images to caption")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    from small_models import florence

    with TemporaryDirectory() as name:
        folder = Path(name)
        photos, model = draw_photos(folder / "photos", options.images), florence(folder / "model")
        for processes in (1, 2):
            print(prove(folder, photos, model, processes, options.kills, options.seed), flush=True)


if __name__ == "__main__":
    main()
