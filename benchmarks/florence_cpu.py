"""Measure memory and time per image of Florence-2-large on this machine's processor.

python benchmarks/florence_cpu.py [large|base]

Florence-2 is built from the published config with random weights, which do the same work as trained weights. The
captions have exactly 64 new tokens. Each batch size runs in a process of its own, after one warm-up, in the suite's
precision for CPUs.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, keep

BATCHES = (1, 4)
BEAMS = (1, 3)  # 3 is the default of caption_to_hub.py
TOKENS = 64


def main() -> None:
    size = sys.argv[1] if len(sys.argv) > 1 else "large"
    sys.path.append(str(ROOT / "tests"))
    from small_models import florence

    with tempfile.TemporaryDirectory() as name:
        model = florence(Path(name) / "model", size)
        rows = [json.loads(measured(model, batch, beams)) for beams in BEAMS for batch in BATCHES]
    best = {
        beams: min((row for row in rows if row["beams"] == beams), key=lambda row: row["seconds_per_image"])
        for beams in BEAMS
    }
    keep(f"florence_{size}_cpu", {"tokens": TOKENS, "parameters_m": rows[0]["parameters_m"], "rows": rows,
                                  "best": {f"beams_{beams}": row for beams, row in best.items()}})  # fmt: skip


def measured(model: Path, batch: int, beams: int) -> str:
    """Return the JSON line that this file prints in a process of its own."""
    words = [sys.executable, __file__, "--one", str(model), str(batch), str(beams)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    line = done.stdout.splitlines()[-1]
    print(line, flush=True)
    return line


def one(model: Path, batch: int, beams: int) -> None:
    import torch
    from PIL import Image

    from t2i import config
    from t2i.captions import captioners
    from t2i.data import flowers
    from t2i.machine import peak_rss_bytes
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    settings = config.CaptionConfig(captioner=[str(model)], max_new_tokens=TOKENS, num_beams=beams)
    (captioner,) = captioners.load(
        captioners.resolve(str(model)), settings, torch.device("cpu"), torch.float32
    ).values()
    images = [Image.fromarray(pixels) for _, pixels, _ in flowers.draw_many(0, 0, batch, 512, False, 1)]
    inputs = captioner.prepare(images)
    captioner.generate({key: value[:1] for key, value in inputs.items()} if batch > 1 else inputs)  # warms up
    start = time.perf_counter()
    ids = captioner.generate(inputs)
    seconds = time.perf_counter() - start
    assert ids.shape[1] >= TOKENS
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(json.dumps({"batch": batch, "beams": beams, "seconds_per_image": round(seconds / batch, 2),
                      "peak_rss_gb": round(peak_rss_bytes() / 1e9, 2), "parameters_m": round(weights / 4e6, 1)}))  # fmt: skip


if __name__ == "__main__":
    one(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == ["--one"] else main()
