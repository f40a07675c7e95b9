"""Write a dataset folder: Parquet shards and a dataset card, laid out on disk as on the Hub."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard
from PIL import Image

from t2i.data.images import read_image_file
from t2i.errors import UserError

ROWS_PER_SHARD = 1000  # Rows per Parquet file of a dataset folder: at most about 100 MB of photos.


def save_dataset_folder(
    folder: str | Path,
    splits: Mapping[str, Iterable[dict[str, Any]]],
    features: datasets.Features | None = None,
    card_text: str = "",
) -> dict[str, int]:
    """Write a dataset folder that `datasets.load_dataset(folder)` reads without further options.

    A dataset folder holds `data/<split>-00000-of-0000N.parquet` and README.md. The dataset folder appears only when it
    is complete.

    Args:
        folder: the dataset folder, which must not exist or must be empty.
        splits: the rows of each split. Each iterable is consumed once, one split after the other, so generators keep
            memory small. A row has `image`, `caption`, and further columns, the same ones in each row. `image` is
            encoded bytes, the path of a file as `Path`, a PIL image, or uint8 [H, W, 3]. PIL images and arrays become PNG.
            `caption` is a text, or a list of texts in each row.
        features: types of the columns. With None, the first row decides the types.
        card_text: text of the dataset card, with or without YAML front matter. Splits and columns are added to the card.

    Returns:
        The number of rows written per split.

    Raises:
        UserError: `folder` exists and is not empty, there are no rows, or the columns of the rows differ.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give another folder, or delete this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "data").mkdir(parents=True)
    try:
        counts: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for split, rows in splits.items():
            features, counts[split], sizes[split] = _write_shards(part / "data", split, iter(rows), features)
        if features is None:
            raise UserError(f"there are no images to write to {folder}; give at least one row")
        infos = {split: {"name": split, "num_bytes": sizes[split], "num_examples": counts[split]} for split in counts}
        (part / "README.md").write_text(_card(card_text, features, infos), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def _write_shards(
    folder: Path, split: str, rows: Iterator[dict[str, Any]], features: datasets.Features | None
) -> tuple[datasets.Features | None, int, int]:
    count, size, shards = 0, 0, 0
    while (first := next(rows, None)) is not None:
        features = features or _features(first)
        schema = features.arrow_schema
        path = folder / f"{split}-{shards:05d}.part"
        with pq.ParquetWriter(path, schema) as writer:
            batch = [_encode(first, features)]
            written = 1
            while written < ROWS_PER_SHARD and (row := next(rows, None)) is not None:
                batch.append(_encode(row, features))
                written += 1
                if len(batch) == 100:
                    writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                    batch = []
            if batch:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        count, size, shards = count + written, size + path.stat().st_size, shards + 1
    for shard in range(shards):
        os.replace(folder / f"{split}-{shard:05d}.part", folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    return features, count, size


def _features(row: dict[str, Any]) -> datasets.Features:
    kinds = {bool: "bool", int: "int64", float: "float64", str: "string"}
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key == "image":
            found[key] = datasets.Image()
        elif type(value) in kinds:
            found[key] = datasets.Value(kinds[type(value)])
        elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            found[key] = datasets.List(datasets.Value("string"))
        else:
            raise UserError(
                f"column {key!r} holds a {type(value).__name__}; write text, lists of texts, numbers or truth values, or give features"
            )
    return datasets.Features(found)


def _encode(row: dict[str, Any], features: datasets.Features) -> dict[str, Any]:
    if row.keys() != features.keys():
        raise UserError(
            f"a row has the columns {', '.join(row)}, but the first row has {', '.join(features)}; "
            "give each row the same columns"
        )
    image = row["image"]
    if isinstance(image, Path):
        image = {"bytes": read_image_file(image), "path": image.name}
    elif isinstance(image, bytes):
        image = {"bytes": image, "path": None}
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    return features.encode_example({**row, "image": image})


def _card(text: str, features: datasets.Features, infos: dict[str, dict[str, Any]]) -> str:
    card = DatasetCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}", ignore_metadata_errors=True)
    size = sum(info["num_bytes"] for info in infos.values())
    info = datasets.DatasetInfo(
        features=features,
        splits=datasets.SplitDict.from_split_dict(list(infos.values())),
        download_size=size,
        dataset_size=size,
    )
    datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(card.data)
    files = [{"split": split, "path": f"data/{split}-*"} for split in infos]
    card.data["configs"] = [{"config_name": "default", "data_files": files}]
    return str(card)
