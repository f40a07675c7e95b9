"""Names that a split may have. This module imports nothing, so that a web page can import it."""

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SPLIT_COLUMNS = {"split", "set", "subset"}  # Columns that name an image's split.
# Pattern of the shards of a dataset folder, with the split and the number of shards.
FOLDER_SHARD = r"data/(?P<split>[^/]+)-\d{5}-of-(?P<count>\d{5})\.parquet"
