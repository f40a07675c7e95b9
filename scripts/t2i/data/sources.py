"""Find the captioned images of a data set: in a folder, in Parquet files, or on the Hub.

This module decodes no image.

`find_source` accepts every input in this list by one option (`SourceConfig.dataset`):

| input | source of the captions |
|---|---|
| Hub id, folder with Parquet shards (`save_dataset_folder`) | column `caption`, else `text`, else from the label |
| folder of `Dataset.save_to_disk`, of webdataset's .tar shards | the same |
| `[train/]<class>/x.jpg` | from the class name, by `caption_template` |
| images with `metadata.jsonl`, `.csv` or `.parquet` (`file_name`, …) | column `caption`, else `text`, else from `label` |
| images with `x.txt`, `x.caption` or `x.jpg.txt` beside `x.jpg` | that file; an image without one keeps its class name |

If a data set has captions, an empty caption is not replaced. An image with an empty caption is kept, and trained
without a condition.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from t2i.config import SourceConfig, check_dataset
from t2i.data.caption_files import METADATA
from t2i.data.folders import folder_source, holds_images, leave_out, list_files, pick_images, refuse_pointers
from t2i.data.records import LeftOut, Source
from t2i.data.tables import disk_source, hub_source, shard_source
from t2i.errors import UserError

ARCHIVES = {".zip", ".7z", ".rar", ".tgz", ".gz", ".bz2", ".xz", ".zst"}


def find_source(cfg: SourceConfig) -> Source:
    """Return the source that `cfg.dataset` names: a folder if it exists, otherwise a data set on the Hub."""
    name, folder = str(cfg.dataset), check_dataset(cfg.dataset)
    return _local_source(name, folder, cfg) if folder else hub_source(name, cfg)


def _local_source(name: str, folder: Path, cfg: SourceConfig) -> Source:
    files, left_out = list_files(folder)
    saved = "dataset_dict.json" in files or {"state.json", "dataset_info.json"} <= set(files)
    if saved and any(file.endswith(".arrow") for file in files):
        saved_files = [file for file in files if PurePosixPath(file).suffix in (".arrow", ".json")]
        refuse_pointers(folder, saved_files)
        return disk_source(name, folder, saved_files, left_out)
    parquet = [
        file for file in files
        if file.lower().endswith(".parquet") and PurePosixPath(file).name.lower() not in METADATA
    ]  # fmt: skip
    passed: LeftOut = {}
    images = pick_images(folder, files, passed)
    tars = [file for file in files if file.lower().endswith(".tar")]
    shards = [file for file in parquet if holds_images(folder / file, cfg)]
    if shards or (parquet and not images and not tars):
        refuse_pointers(folder, shards or parquet)
        return shard_source(name, folder, files, shards or parquet, cfg, "Parquet", left_out)
    for file in parquet:  # img2dataset writes one with addresses and sizes beside each .tar.
        leave_out(left_out, "Parquet files without an image column", file)
    endings = Counter(PurePosixPath(file).suffix.lower() for file in files)
    if not images and tars:
        refuse_pointers(folder, tars)
        return shard_source(name, folder, files, tars, cfg, "webdataset", left_out)
    if not images and (archives := sorted(ARCHIVES & endings.keys())):
        raise UserError(
            f"{name} holds archives ({', '.join(archives)}) and no images; unpack the archives, and give the unpacked folder"
        )
    return folder_source(name, folder, files, images, cfg, left_out | passed)
