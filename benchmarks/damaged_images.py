"""Train on 10,000 images, 300 of them damaged in eight ways, with train_vae.py and train_unet.py: neither script may
stop.

python benchmarks/damaged_images.py [images] [damaged]

The real scripts run for a few steps each. The quarantine of both scripts must list exactly the damaged files.
"""

import io
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from common import keep, run_script
from memory_flat import RECIPE
from PIL import Image


def png_bomb() -> bytes:
    """Return a PNG whose header claims 100,000 x 100,000 px."""
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def damage(kind: int, image: Image.Image) -> bytes:
    """Return the bytes of a file, damaged in the given way, 0 to 7."""
    jpeg, png = encoded(image, "JPEG"), encoded(image, "PNG")
    return (
        b"",  # empty
        jpeg[: len(jpeg) // 2],  # cut off
        png[: len(png) // 2],
        b"<!DOCTYPE html><html><body>404 not found</body></html>",  # a web page named .jpg
        png_bomb(),
        encoded(image.resize((32, 32)), "ICO"),  # a format outside the list
        np.random.default_rng(kind).bytes(2000),  # noise
        encoded(image.resize((4, 4)), "PNG"),  # too small
    )[kind]


def main() -> None:
    count, bad = [int(word) for word in sys.argv[1:]] or [10_000, 300]
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        (cwd / "recipe.yaml").write_text(RECIPE)
        rng = np.random.default_rng(0)
        damaged = set()
        for number in range(count):
            label = ("daisy", "rose")[number % 2]
            path = cwd / "photos" / label / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((40, 40))
            if number % (count // bad) == 0 and len(damaged) < bad:
                path.write_bytes(damage(len(damaged) % 8, image))
                damaged.add(f"{label}/{path.name}")
            else:
                path.write_bytes(encoded(image, "JPEG"))
        run_script("train_vae.py", "--config", "recipe.yaml", "--dataset", "photos", "--output_dir", "vae", cwd=cwd)
        run_script(
            "train_unet.py",
            "--config",
            "recipe.yaml",
            "--dataset",
            "photos",
            "--vae",
            "vae",
            "--output_dir",
            "unet",
            cwd=cwd,
        )
        reasons: dict[str, int] = {}
        for run in ("vae", "unet"):
            rows = [json.loads(line) for line in (cwd / run / "quarantine.jsonl").read_text().splitlines()]
            listed = {row["file"] for row in rows}
            if listed != damaged or len(rows) != len(damaged):
                raise SystemExit(
                    f"{run}: {len(rows)} quarantined, {len(listed - damaged)} wrongly, {len(damaged - listed)} missed"
                )
            reasons = {}
            for row in rows:
                kind = row["reason"].split(":")[0]
                reasons[kind] = reasons.get(kind, 0) + 1
        keep("damaged_images", {"ratio": 1.0, "goal": 1.0, "images": count, "damaged": bad, "reasons": reasons})


if __name__ == "__main__":
    main()
