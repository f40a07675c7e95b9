"""Let artifacts follow an MLflow database that was moved to another folder. This module imports no MLflow."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote


def follow_move(database: Path) -> list[str]:
    """Correct the artifact locations in a SQLite database whose folder was moved, renamed or copied.

    MLflow stores artifact locations as absolute paths `…/mlruns/NAME`. Only locations that were once beside this
    database are corrected. A location `…/mlruns/NAME` is corrected if `…` no longer exists, if `…` holds a database of
    the same name, or if `mlruns/NAME` is beside this database. Artifacts of a run that exist only in the old folder
    stay in the old folder.

    Args:
        database: path of the SQLite file.

    Returns:
        A sentence for each experiment with runs whose location was corrected.
    """
    sentences = []
    with closing(sqlite3.connect(database, timeout=30)) as store, store:
        rows = store.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for experiment, name, location in rows:
            old = _absolute_path(location)
            if old is None or old.parent.name != "mlruns":
                continue
            new, home = database.parent / "mlruns" / old.name, old.parent.parent
            if old == new or (old.exists() and new.exists() and old.samefile(new)):
                continue
            if home.exists() and not new.exists() and not (home / database.name).exists():
                continue  # the user chose that place
            uri = new.as_uri() if location.startswith("file:") else str(new)
            store.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (uri, experiment))
            runs = store.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,)
            ).fetchall()
            for run, artifacts in runs:
                rest = (artifacts or "").removeprefix(location)
                here = new / unquote(rest.lstrip("/"))
                if rest.startswith("/") and (here.exists() or not (old / unquote(rest.lstrip("/"))).exists()):
                    store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (uri + rest, run))
            if runs:
                sentences.append(
                    f"MLflow's database was moved: artifacts of the experiment {name} go to, and come from, {new}"
                )
    return sentences


def _absolute_path(location: str | None) -> Path | None:
    """Return the absolute path that an artifact location names, or None for a server's or a relative location."""
    text = location or ""
    path = Path(unquote(text.removeprefix("file://")) if text.startswith("file:///") else text)
    return path if path.is_absolute() else None
