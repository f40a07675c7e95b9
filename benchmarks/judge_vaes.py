"""Judge autoencoders: how much of a photo is left after encoding and decoding it, as a network sees it.

python benchmarks/judge_vaes.py PHOTOS outputs/photos/vae outputs/other/vae

The first row is the floor: photos that no autoencoder has touched. PHOTOS is anything that `--dataset` takes. A probe needs labels.
"""

import argparse

import numpy as np
from common import describe_machine, judged_cells

from t2i import models
from t2i.config import JUDGE, DataConfig
from t2i.data.caches import cache_features
from t2i.data.preparing import load_splits
from t2i.evaluation.judge import MAX_REFERENCE, Judge, Probe, spread
from t2i.evaluation.networks import FeatureNetwork
from t2i.pictures.reconstructions import reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="PHOTOS", help="data set with photos that the autoencoders never saw")
    parser.add_argument("vaes", metavar="VAE", nargs="+", help="run folders of train_vae.py, paths or Hub ids")
    parser.add_argument("--resolution", type=int, default=64, help="side of the photos in pixels (default: 64)")
    parser.add_argument("--judge_network", default=JUDGE, help="network that judges (default: %(default)s)")
    options = parser.parse_args()
    data = DataConfig(dataset=options.dataset, resolution=options.resolution, validation_fraction=0.05)
    splits = load_splits(data, say=lambda _: None)
    photos = splits.test or splits.validation
    network = FeatureNetwork(options.judge_network)
    rows = spread(np.arange(len(splits.train)), MAX_REFERENCE)
    reference = cache_features(splits.train.pixels, rows, splits.train.fingerprint, network, data.cache_dir)
    unseen = cache_features(photos.pixels, np.arange(len(photos)), photos.fingerprint, network, data.cache_dir)
    labels = photos.rows["label"] if "label" in photos.rows.column_names else None
    probe = None if labels is None else Probe(reference, np.array(splits.train.rows["label"], dtype=object)[rows])
    judge = Judge(network, reference, splits.train.pixels, probe)
    print(f"Machine: {describe_machine()['cpu']}.")
    print(f"{len(photos)} photos judged by {network.name}, against {len(reference)} training photos")
    print(
        "\n| | PSNR, dB | SSIM | named | distance | Fréchet | precision | recall |\n|---|---|---|---|---|---|---|---|"
    )
    print_row("the photos", None, judge.describe(photos.pixels, unseen, labels, len(photos)))
    for source in options.vaes:
        vae = models.load_vae(source)
        images, psnr, ssim = reconstruct(vae, photos.pixels)
        row = judge.describe(images, network.features(images), labels, len(photos))
        print_row(source, (float(psnr.mean()), float(ssim.mean())), row)


def print_row(name: str, reconstruction: tuple[float, float] | None, row: dict) -> None:
    """Print a row of the table."""
    psnr, ssim = (f"{reconstruction[0]:.2f}", f"{reconstruction[1]:.3f}") if reconstruction else ("", "")
    print(f"| {name} | {psnr} | {ssim} | {judged_cells(row)} |", flush=True)


if __name__ == "__main__":
    main()
