"""Names that a split may have, and columns that name splits. This module imports no package, so that a web page can import it."""

from collections.abc import Iterable
from typing import Any

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SPLIT_COLUMNS = {"split", "set", "subset"}  # Columns that name an image's split.
# Pattern of the shards of a dataset folder, with the split and the number of shards.
FOLDER_SHARD = r"data/(?P<split>[^/]+)-\d{5}-of-(?P<count>\d{5})\.parquet"


def named_splits(column: str, values: Iterable[Any]) -> set[str]:
    """Return the splits that a column names, or no split if the column does not name the split of each row.

    A column that does is called split, set or subset, and holds only names of splits, of at least two splits.

    Args:
        column: name of the column.
        values: all its values, or all distinct ones. Empty values are passed over.
    """
    if column.strip().lower() not in SPLIT_COLUMNS:
        return set()
    named = {SPLIT_NAMES.get(str(value).strip().lower()) for value in values if value}
    splits = named - {None}
    return {str(split) for split in splits} if len(splits) > 1 and splits == named else set()
