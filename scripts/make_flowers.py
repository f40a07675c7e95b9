"""Draw flowers with captions into a dataset folder that the training scripts and `datasets.load_dataset` read.

python scripts/make_flowers.py --output_dir outputs/demo/dataset --count 4000 --size 64

The flowers of the data set are drawn by make_flowers.py, not photographed. The attributes of each drawn flower are
known, so it can be measured what a model learns. A fifth of the attribute combinations is held out: these combinations
occur only in the test split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from t2i.command_line import check_options, parse_options
from t2i.config_types import Count, LocalPath, Natural
from t2i.errors import UserError, run_main
from t2i.runs import RunFolder


@dataclass
class Options:
    """Options of the drawn data set."""

    output_dir: LocalPath = "outputs/flowers"  # Dataset folder to write.
    count: Annotated[int, Field(ge=2, lt=2**31)] = 4000  # Number of drawings in the training split.
    validation_count: Count = 256  # Number of drawings in the validation split.
    test_count: Count = 256  # Number of drawings in the test split, all of held-out attribute combinations.
    size: Annotated[int, Field(ge=32, le=512)] = 64  # Width and height of each drawing in pixels.
    seed: Natural = 0  # Seed of the random numbers. The same seed draws the same flowers.
    # Number of processes that draw. The drawings do not depend on the number of processes.
    workers: Annotated[int, Field(ge=1, le=256)] = 2


def main() -> None:
    options = check_options(parse_options(Options, __doc__ or ""))
    from tqdm import tqdm

    from t2i.data import flowers
    from t2i.data.dataset_folder import save_dataset_folder

    folder = Path(options.output_dir)
    if folder.name in ("", ".."):
        raise UserError(f"--output_dir {folder} ends without a name; give a new folder, such as outputs/flowers")
    wanted = {"count": options.count, "validation_count": options.validation_count, "test_count": options.test_count,
              "size": options.size, "seed": options.seed, "version": flowers.VERSION}  # fmt: skip
    marker = folder.with_name(f".{folder.name}")  # The run's record stands beside the dataset folder, not in it.
    try:
        run = RunFolder(marker, wanted)
    except UserError as error:
        reason = str(error).split("(", 1)[-1].split(")", 1)[0]
        raise UserError(
            f"{folder} holds other drawings ({reason}); give another --output_dir, or delete {folder} and {marker}"
        ) from None
    if run.finished and folder.is_dir():
        print(f"reusing the drawings in {folder}")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files; give another --output_dir, or delete it to draw anew")

    def rows(start: int, count: int, held_out: bool, name: str) -> Iterator[dict[str, Any]]:
        drawn = flowers.draw_many(options.seed, start, count, options.size, held_out, options.workers)
        for attributes, image, caption in tqdm(
            drawn, total=count, desc=f"drawing {name}", unit="flower", mininterval=0.5
        ):
            yield {"image": image, "caption": caption, **attributes}

    first, second = options.count, options.count + options.validation_count
    splits = {
        "train": rows(0, options.count, False, "train"),
        "validation": rows(first, options.validation_count, False, "validation"),
        "test": rows(second, options.test_count, True, "test"),
    }
    with run.timed("draw"):
        counts = save_dataset_folder(folder, splits, card_text=card(options, flowers.HELD_OUT_SHARE))
    run.finish(**counts)
    print(f"{sum(counts.values())} drawings of {options.size} px in {folder}: {counts}")


def card(options: Options, held_out_share: float) -> str:
    """Return the dataset card: what the pictures are, and the command that draws them again."""
    return f"""---
license: cc0-1.0
language: [en]
task_categories: [text-to-image]
pretty_name: Drawn flowers
annotations_creators: [machine-generated]
---
# Drawn flowers

Flowers drawn by a program, {options.size} x {options.size} px, with captions that state their attributes (petal color, count
and shape, center color, background, arrangement). The flowers are no photographs. They exist so that training and measuring a
text-to-image model can be tried anywhere, with known attributes.

{held_out_share:.0%} of the combinations of petal color, center color, background and petal count are held out. They occur only
in the test split.

`python scripts/make_flowers.py --count {options.count} --validation_count {options.validation_count} \
--test_count {options.test_count} --size {options.size} --seed {options.seed}` draws the same pictures again.
"""


if __name__ == "__main__":
    run_main(main)
