"""Small copies of hub repositories, in the hub's own layout: data files, and the README.md that names them.

The true files cannot be had in a test; column names, types, split names and file names here are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Rows = Sequence[Mapping[str, Any]]


def parquet(folder: Path, subsets: Mapping[str, Mapping[str, Rows]], labels: Sequence[str] = ()) -> None:
    """A repository of files `SUBSET/SPLIT-00000-of-00001.parquet`; a column `label` holds class labels."""
    from datasets import ClassLabel, Dataset

    configs = []
    for subset, splits in subsets.items():
        (folder / subset).mkdir(parents=True, exist_ok=True)
        files = []
        for split, rows in splits.items():
            table = Dataset.from_list([dict(row) for row in rows])
            if labels and "label" in table.column_names:
                table = table.cast_column("label", ClassLabel(names=list(labels)))
            table.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
            files.append({"split": split, "path": f"{subset}/{split}-*"})
        configs.append({"config_name": subset, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")


def one_json(folder: Path, name: str, rows: Rows) -> None:
    """A repository of one JSON file, without subsets, as MetaMathQA is one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps([dict(row) for row in rows]), encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
