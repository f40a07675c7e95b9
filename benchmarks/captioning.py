"""Compare the captioning loop with the bare `generate`: the cost of decoding, preparing, reading and fsync.

python benchmarks/captioning.py [tiny|base] [rounds]

Rounds of the captioning loop and of the bare `generate` alternate within one run. The captioning loop is
`caption_to_hub.py`'s own: a thread decodes and prepares JPEGs, and captions are appended to captions.jsonl with fsync.
The bare `generate` gets the same batches, prepared beforehand. Florence-2 has random weights and generates 64 new
tokens per caption with one beam.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, keep

SETTINGS = {"tiny": {"images": 96, "batch": 8}, "base": {"images": 12, "batch": 4}}
SIDE = 512  # px of the JPEGs
TOKENS = 64


def main() -> None:
    size = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    count, batch = SETTINGS[size]["images"], SETTINGS[size]["batch"]
    sys.path.append(str(ROOT / "tests"))
    import torch
    from PIL import Image

    import caption_to_hub
    from small_models import florence
    from t2i import config
    from t2i.captions import captioners, ledger
    from t2i.data import flowers, sources
    from t2i.training import distributed

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        for number, (_, pixels, _) in enumerate(flowers.draw_many(0, 0, count, SIDE, False, 2)):
            Image.fromarray(pixels).save(folder / "photos" / f"{number}.jpg", quality=92)
        florence(folder / "model", size)
        recipe = config.Recipe()
        recipe.data.dataset = str(folder / "photos")
        recipe.caption = config.CaptionConfig(
            captioner=[str(folder / "model")], caption_batch_size=batch, max_new_tokens=TOKENS, num_beams=1
        )
        accelerator = distributed.make_accelerator()
        model_name = captioners.resolve(str(folder / "model"))
        (captioner,) = captioners.load(model_name, recipe.caption, accelerator.device, torch.float32).values()
        source = sources.find_source(recipe.data)
        rows = caption_to_hub.open_rows(source, recipe, folder, accelerator)
        photos = [caption_to_hub.Photo("train", row, f"{row}.jpg", f"{row:032x}", None, {}) for row in range(count)]
        work = [(ledger.Key(photo.id, "", "", "", ""), photo) for photo in photos]
        prepared = [
            captioner.prepare([Image.open(folder / "photos" / f"{row}.jpg") for row in range(start, start + batch)])
            for start in range(0, count, batch)
        ]

        def ours(path: Path) -> None:
            for part, texts in caption_to_hub.caption_batches(work, captioner, source, rows, recipe, accelerator):
                made = zip(part, texts, strict=True)
                lines = [caption_to_hub.ledger_line(key, photo, text, recipe.caption) for (key, photo), text in made]
                ledger.append(path, lines)

        def bare() -> None:
            for inputs in prepared:
                captioner.generate(inputs)

        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        for turn in range(rounds + 1):
            for arm in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                start = time.perf_counter()
                ours(folder / f"captions-{turn}.jsonl") if arm == "ours" else bare()
                if turn:  # the first warms up
                    seconds[arm].append(time.perf_counter() - start)
    speeds = {
        f"images_per_second_{arm}": round(count / statistics.median(values), 3) for arm, values in seconds.items()
    }
    ratio = statistics.median(seconds["bare"]) / statistics.median(seconds["ours"])
    keep(f"captioning_{size}", {"ratio": round(ratio, 4), "goal": 0.9, "batch": batch, "images": count, **speeds})


if __name__ == "__main__":
    main()
