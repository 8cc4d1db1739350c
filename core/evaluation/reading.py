"""Representations to evaluate: of a run, in one file of ours, or somebody else's arrays beside a table.

Shapes: N scans, F features.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import numpy.typing as npt

from core.evaluation.embeddings import DIAGNOSES, SPLITS, Embeddings

PREFIX = "embeddings-"
ROLES = "roles.json"
STAGES = ("raw", "untrained", "pretrained", "erased")
REQUIRED = ("subject", "site")
OPTIONAL = ("age", "sex", "diagnosis", "scanner", "split")
SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "": ""}
MISSING = ("", "n/a", "na", "nan")
TRAIN_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class Representations:
    """One or more representations of the same scans.

    Attributes:
        name: Of the folder or file.
        by_stage: Embeddings by stage, in the order in which a run makes them; somebody else's by file name.
        notes: Sentences on what had to be assumed.
        unseen: Sites that took no part in pretraining, as a run says.
    """

    name: str
    by_stage: dict[str, Embeddings]
    notes: list[str]
    unseen: tuple[str, ...] = ()

    @property
    def delivered(self) -> str:
        """The stage that a run delivers: erased, else pretrained, else the last one."""
        return next((stage for stage in ("erased", "pretrained") if stage in self.by_stage), list(self.by_stage)[-1])


def read_representations(path: Path) -> Representations:
    """Read what there is to evaluate; nothing in a file is executed.

    Args:
        path: The folder of a run (its `embeddings-<stage>.npz`), one such file, or a folder with `*.npy` of (N, F)
            numbers and one .csv or .tsv table of N rows in the same order. The table has the columns subject and site, and may
            have age (years), sex (F, M, female, male), diagnosis (control, patient), scanner and split (train, val, test); an
            empty cell is unknown. Without a column split, 60 % of the subjects are train and the others test, by a hash of
            site and subject.

    Raises:
        ValueError: None of these, or what is in them cannot be understood; in one line.
    """
    if path.is_file() and path.suffix == ".npz":
        return Representations(name=path.stem, by_stage={path.stem.removeprefix(PREFIX): _load(path)}, notes=[])
    if path.is_dir():
        stages = {file.stem.removeprefix(PREFIX): file for file in sorted(path.glob(f"{PREFIX}*.npz"))}
        if stages:
            ordered = sorted(stages, key=[*STAGES, *stages].index)
            by_stage = {stage: _load(stages[stage]) for stage in ordered}
            unseen = _read_unseen(path / ROLES) if (path / ROLES).is_file() else ()
            return Representations(name=path.name, by_stage=by_stage, notes=[], unseen=unseen)
        tables = sorted(file for file in path.iterdir() if file.suffix.lower() in (".csv", ".tsv"))
        arrays = sorted(path.glob("*.npy"))
        if arrays and len(tables) == 1:
            return _read_arrays(path.resolve().name, arrays, tables[0])
        raise ValueError(
            f"{path}: it must hold {PREFIX}<stage>.npz, or *.npy beside one .csv or .tsv table, got {len(arrays)} arrays and "
            f"{len(tables)} tables. `isocenter evaluate --help` describes both."
        )
    raise ValueError(f"{path}: it must be a folder or an .npz file, got {'another file' if path.exists() else 'nothing'}.")


def _read_unseen(path: Path) -> tuple[str, ...]:
    try:
        roles = json.loads(path.read_text(encoding="utf-8"))
        return tuple(str(site) for site in roles["unseen"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: it must list the unseen sites, as a run writes them, got something else.") from error


def _load(path: Path) -> Embeddings:
    if not is_zipfile(path):
        raise ValueError(f"{path}: it must be an .npz file that `Embeddings.save` wrote, got something else. Copy it again.")
    try:
        return Embeddings.load(path)
    except (ValueError, BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_arrays(name: str, arrays: Sequence[Path], table: Path) -> Representations:
    rows, notes = _read_table(table)
    columns = {column: np.array([row.get(column, "") for row in rows], dtype=np.str_) for column in (*REQUIRED, *OPTIONAL)}
    if "split" not in rows[0]:
        columns["split"] = _split_by_hash(columns["site"], columns["subject"])
        notes.append(
            f"{table.name} has no column split: {TRAIN_SHARE:.0%} of the subjects are train and the others test, by a hash of "
            "site and subject. An encoder that was trained on some of them looks better than it is."
        )
    subject_N = np.zeros(len(rows), dtype=np.int64)
    for site in np.unique(columns["site"]):
        of_site = columns["site"] == site
        subject_N[of_site] = np.unique(columns["subject"][of_site], return_inverse=True)[1]
    ages = np.array([float(text or "nan") for text in columns["age"]])
    by_stage = {}
    for path in arrays:
        h_NF = _load_array(path, len(rows), table)
        try:
            by_stage[path.stem] = Embeddings(
                h_NF=h_NF,
                subject=subject_N,
                site=columns["site"],
                scanner=columns["scanner"],
                sex=columns["sex"],
                diagnosis=columns["diagnosis"],
                split=columns["split"],
                age_years=ages,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Representations(name=name, by_stage=by_stage, notes=notes)


def _load_array(path: Path, num_rows: int, table: Path) -> npt.NDArray[np.float32]:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: it must be a .npy file of numbers, got something else. Save a matrix with numpy.save."
        ) from error
    if values.ndim != 2 or values.dtype.kind not in "fiu" or len(values) != num_rows:
        raise ValueError(
            f"{path}: it must be a matrix of numbers with the {num_rows} rows of {table.name}, "
            f"got {(values.dtype.name, values.shape)!r}."
        )
    with np.errstate(over="ignore"):  # Embeddings refuses what is infinite then
        return np.asarray(values, dtype=np.float32)


def _read_table(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Rows with the known columns, each cell as `Embeddings` has it, and notes."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            names = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            raw = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the table must be UTF-8 text in columns, got {error}. Save it as such.") from error
    if not raw or any(column not in names for column in REQUIRED):
        raise ValueError(f"{path}: the table must have rows and the columns {', '.join(REQUIRED)}, got {names!r}.")
    notes = [
        f"{path.name} has no column {column}: it is unknown of every scan."
        for column in OPTIONAL
        if column not in names and column != "split"
    ]
    return [_row(path, number, row) for number, row in enumerate(raw, start=2)], notes


def _row(path: Path, number: int, row: dict[Any, Any]) -> dict[str, str]:
    if None in row:
        raise ValueError(f"{path}: row {number} must have as many fields as there are columns, got more. Mend the row.")
    cells = {}
    for column in (*REQUIRED, *OPTIONAL):
        if column not in row:
            continue
        text = (row[column] or "").strip()
        cells[column] = "" if text.lower() in MISSING else text
    for column in REQUIRED:
        if not cells[column]:
            raise ValueError(f"{path}: row {number} must have a {column}, got none. Fill or remove the row and its features.")
    cells["sex"] = cells.get("sex", "").lower()
    for column, known in (("sex", tuple(SEXES)), ("diagnosis", DIAGNOSES), ("split", SPLITS)):
        if column in cells and cells[column] not in known:
            raise ValueError(
                f"{path}: {column} of row {number} must be one of {', '.join(filter(None, known))}, got {cells[column]!r}."
            )
    cells["sex"] = SEXES[cells["sex"]]
    try:
        float(cells.get("age") or 0)
    except ValueError:
        raise ValueError(f"{path}: age of row {number} must be a number of years or empty, got {cells['age']!r}.") from None
    return cells


def _split_by_hash(site_N: npt.NDArray[np.str_], subject_N: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    """(N,) train or test, the same for a subject whatever else is in the table."""
    digests = [hashlib.sha256(f"{site}/{subject}".encode()).digest() for site, subject in zip(site_N, subject_N, strict=True)]
    share_N = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
    return np.where(share_N < TRAIN_SHARE, "train", "test")
