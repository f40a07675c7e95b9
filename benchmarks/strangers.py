"""Mix drawn pictures with real photos under random names, so that somebody who knows nothing of them can tell them apart.

python benchmarks/strangers.py PHOTOS outputs/new/unet outputs/old/unet --output_dir outputs/strangers

Each run must have been evaluated: its pictures have the checkpoint and guidance scale that the evaluation chose. Each run
draws the same prompts from the seeds 0, 1, 2 and so on, and no picture is chosen by hand. The photos are the first test
photos of the same species. Readers see the output folder, which holds nothing but the pictures. A folder beside it with
"-key" in its name holds key.json, which tells what each picture is, and a sheet per run with its pictures above the photos.
Readers must not see that folder.

Readers answer in a JSON file: {"NAME.png": {"real": true, "species": "rose"}}. Then count the answers:

python benchmarks/strangers.py --output_dir outputs/strangers --answers answers.json
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import common  # noqa: F401  makes t2i importable
import numpy as np
from PIL import Image

from t2i.captions.texts import label_captions, prefixed
from t2i.config import load_recipe
from t2i.data.preparing import load_splits
from t2i.evaluation.figures import percent
from t2i.files import read_object, write_json
from t2i.pictures.png import picture_grid
from t2i.pictures.sampling import generate, load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="PHOTOS", nargs="?", help="data set of the runs, one class per species")
    parser.add_argument("runs", metavar="RUN", nargs="*", help="evaluated run folders of train_unet.py")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/strangers"), help="folder for the pictures")
    parser.add_argument("--count", type=int, default=24, help="pictures per source (default: 24)")
    parser.add_argument("--species", type=int, default=12, help="species, those with the most photos (default: 12)")
    parser.add_argument("--answers", type=Path, help="answers of a reader to count, instead of drawing")
    options = parser.parse_args()
    if options.answers:
        score(read_object(key_folder(options.output_dir) / "key.json"), read_object(options.answers))
        return
    if not options.runs:
        parser.error("name PHOTOS and a RUN to draw with, or give --answers")
    if options.output_dir.exists():
        parser.error(
            f"{options.output_dir} exists, and its pictures would mix with new ones; give another --output_dir"
        )
    draw(options)


def key_folder(output_dir: Path) -> Path:
    """Return the folder beside the readers' folder that tells what each picture is."""
    return output_dir.with_name(f"{output_dir.name}-key")


def draw(options: argparse.Namespace) -> None:
    """Write pictures of all sources under random names, with the key and the sheets."""
    recipe = load_recipe(str(Path(options.runs[0]) / "config.yaml"))
    recipe.data.dataset = options.dataset
    splits = load_splits(recipe.data, say=lambda _: None)
    common_labels = Counter(splits.train.rows["label"]).most_common(options.species)
    species = sorted(label for label, _ in common_labels)
    wanted = [species[number % len(species)] for number in range(options.count)]
    sources = {"real": real_photos(splits.test or splits.validation, wanted)}
    captions = [label_captions(label, recipe.data.caption_template[:1])[0] for label in wanted]
    texts = [prefixed(caption, recipe.data.caption_prefix) for caption in captions]
    for run in map(Path, options.runs):
        report = read_object(run / "evaluation" / "evaluation.json")["report"]
        pipeline = load_pipeline(
            run / report["checkpoint"], scheduler=report["scheduler"], num_inference_steps=report["num_inference_steps"]
        )
        sources[str(run)] = generate(
            pipeline, texts, list(range(options.count)), guidance_scale=report["guidance_scale"],
            num_inference_steps=report["num_inference_steps"], guidance_end=report["guidance_end"],
            guidance_rescale=report.get("guidance_rescale", 0.0),
        )  # fmt: skip
    pictures, secret = options.output_dir, key_folder(options.output_dir)
    pictures.mkdir(parents=True)
    secret.mkdir(exist_ok=True)
    key = {}
    for source, images in sources.items():
        for image, label in zip(images, wanted, strict=True):
            name = f"{random.SystemRandom().getrandbits(40):010x}.png"
            # No text, no time and no size tells where a picture comes from.
            Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC).save(pictures / name)
            key[name] = {"source": source, "species": label}
    write_json(secret / "key.json", dict(sorted(key.items())))
    for number, run in enumerate(options.runs):
        both = np.concatenate([sources[str(Path(run))], sources["real"]])
        picture_grid(both, columns=options.count // 2).save(secret / f"sheet-{number}.png")
    print(f"{len(key)} pictures in {pictures}, of {', '.join(species)}")


def real_photos(photos: Any, wanted: list[str]) -> np.ndarray:
    """Return the first photos of the wanted species, uint8 [N, R, R, 3], none of them twice."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(photos.rows["label"]):
        rows.setdefault(label, []).append(row)
    short = [label for label, number in Counter(wanted).items() if len(rows.get(label, [])) < number]
    if short:
        sys.exit(f"too few unseen photos of {', '.join(short)}; give a smaller --count")
    return np.stack([photos.pixels[rows[label].pop(0)] for label in wanted])


def score(key: dict[str, Any], answers: dict[str, Any]) -> None:
    """Print for each source how many pictures were called real, and how many species were named."""
    missing = sorted(key.keys() - answers.keys())
    if missing:
        sys.exit(f"{len(missing)} pictures have no answer, such as {missing[0]}; complete the file")
    print("| source | called real | species named |\n|---|---|---|")
    for source in dict.fromkeys(known["source"] for known in key.values()):
        names = [name for name, known in key.items() if known["source"] == source]
        real = sum(bool(answers[name]["real"]) for name in names)
        named = sum(answers[name]["species"].strip().lower() == key[name]["species"].lower() for name in names)
        cells = [f"{right} of {len(names)}, {percent(right / len(names), len(names))}" for right in (real, named)]
        print(f"| {source} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
