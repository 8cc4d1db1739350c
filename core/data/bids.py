"""Readers of BIDS-like folders: participants.tsv joined with the images found beside it.

Three layouts are known by what they hold:

- one folder per site, each with its own participants.tsv (``root/<site>/participants.tsv``);
- one participants.tsv with a column ``site`` at the root, images in ``root/<site>/`` or in one BIDS tree at the root;
- a single BIDS data set (``root/participants.tsv``), which is one site under any name.

An image is ``<folder>/[sub-<label>/[ses-<label>/]anat/]sub-<label>_[ses-<label>_]*<suffix>.nii[.gz]``; ``derivatives/``
and ``sourcedata/`` are never entered. Errors and problems name subjects and files: they are for the site's own eyes.
"""

import csv
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from core.data.manifest import MAX_AGE_YEARS, Manifest, Problem, Scan

TABLE = "participants.tsv"
MISSING = frozenset({"", "n/a", "na", "nan", "-"})
# The first of these columns that a table has is used; names are compared in lower case.
AGE_COLUMNS = ("age", "age_years")
SEX_COLUMNS = ("sex", "gender")
DIAGNOSIS_COLUMNS = ("diagnosis", "dx", "group")
SEXES: Mapping[str, Literal["F", "M"]] = {"f": "F", "female": "F", "m": "M", "male": "M"}

_logger = logging.getLogger("isocenter")
_image_name = re.compile(r"(?P<subject>[^_]+)_(?:(?P<session>ses-[^_]+)_)?")


def list_sites(root: Path) -> tuple[str, ...]:
    """Names of the sites below ``root``, sorted; a single data set is one site, named as its folder.

    Raises:
        ValueError: The folder is missing, holds no participants.tsv, or a row of its column ``site`` is empty.
    """
    if not root.is_dir():
        raise ValueError(f"data.root: it must be an existing folder, got {str(root)!r}. Name the folder with data.root=<folder>.")
    if (root / TABLE).is_file():
        columns, rows = _read_table(root / TABLE)
        return tuple(sorted({_site(root, row) for row in rows})) if "site" in columns else (root.resolve().name,)
    sites = sorted(table.parent.name for table in root.glob(f"*/{TABLE}"))
    sites = [site for site in sites if site not in ("derivatives", "sourcedata")]
    if not sites:
        raise ValueError(
            f"data.root: it must hold {TABLE}, or one folder per site that does, got {str(root)!r} without. "
            "Name the folder with data.root=<folder>."
        )
    return tuple(sites)


def read_site(root: Path, site: str, *, suffix: str = "T1w") -> Manifest:
    """Join a site's participants.tsv with its images.

    Column names are compared in lower case, a participant's ``sub-`` is optional, and an empty cell, "n/a", "na",
    "nan" or "-" is a missing value. Without a diagnosis column (``diagnosis``, ``dx`` or ``group``) every subject
    counts as "control", and the log says so; without a scanner, the scanner is the site.

    Every row and image that cannot be used fully is a problem, and logged: "no_image" (a row), "no_row" and
    "wrong_name" (an image), or a value missing in a scan: "no_age", "bad_age" (not a number of years), "bad_sex"
    (neither F nor M), "no_diagnosis", "no_scanner".

    Args:
        root: A folder as described at the top of this module.
        site: One of ``list_sites(root)``; any name for a single data set.
        suffix: The BIDS suffix of the images.

    Raises:
        ValueError: A missing folder, an unknown site, or a table that cannot be understood.
    """
    sites = list_sites(root)
    has_root_table = (root / TABLE).is_file()
    if not has_root_table:
        _check_site(site, sites)
    table = root / TABLE if has_root_table else root / site / TABLE
    columns, rows = _read_table(table)
    folder, site_rows = table.parent, rows
    if has_root_table and "site" in columns:
        _check_site(site, sites)
        site_rows = [row for row in rows if _site(root, row) == site]
        folder = root / site if (root / site).is_dir() else root

    if not any(column in columns for column in DIAGNOSIS_COLUMNS):
        _logger.warning("%s: no column 'diagnosis': every subject of site %s counts as control.", table, site)
    row_of: dict[str, dict[str, str]] = {}
    for row in site_rows:
        subject = _subject(row["participant_id"])
        if subject in row_of:
            raise ValueError(f"{table}: participant_id must be unique, got {subject!r} twice. Leave one row a subject.")
        row_of[subject] = row
    elsewhere = {_subject(row["participant_id"]) for row in rows} - row_of.keys() if folder == root else set()

    scans: list[Scan] = []
    problems: list[Problem] = []
    for path in _find_images(folder, suffix):
        subject, session = _entities(path)
        if not _agrees_with_folders(path.relative_to(folder), subject, session):
            problems.append(Problem("wrong_name", str(path), "the file names another subject or session than its folder"))
        elif subject in row_of:
            scan, flaws = _scan(site, subject, session, path, row_of[subject])
            scans.append(scan)
            problems.extend(flaws)
        elif subject not in elsewhere:
            problems.append(Problem("no_row", str(path), f"the subject is not in {table}"))
    imaged = {scan.subject for scan in scans}
    problems.extend(
        Problem("no_image", subject, f"no {suffix} image below {folder}") for subject in row_of if subject not in imaged
    )
    for problem in problems:
        _logger.warning("site %s: %s: %s: %s.", site, problem.kind, problem.where, problem.what)
    return Manifest(site, tuple(scans), tuple(problems))


def _read_table(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """Columns in lower case, and the rows that are not blank, of a tab-separated UTF-8 file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, delimiter="\t", strict=True) if any(map(str.strip, line))]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the table must be tab-separated UTF-8 text, got {error}. Save it as such.") from error
    columns = tuple(name.strip().lower() for name in lines[0]) if lines else ()
    if "participant_id" not in columns or len(set(columns)) != len(columns):
        raise ValueError(
            f"{path}: columns must be tab-separated, each named once, and one be participant_id, got {list(columns)}."
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise ValueError(f"{path}: row {number} must have {len(columns)} fields, got {len(line)}. Mend the row.")
        rows.append({name: cell.strip() for name, cell in zip(columns, line, strict=True)})
        if rows[-1]["participant_id"].lower() in MISSING:
            raise ValueError(f"{path}: row {number} must have a participant_id, got none. Fill or remove the row.")
    return columns, rows


def _check_site(site: str, sites: Sequence[str]) -> None:
    if site not in sites:
        raise ValueError(f"site: it must be one of {', '.join(sites)}, got {site!r}. Mend the name or data.root.")


def _site(root: Path, row: Mapping[str, str]) -> str:
    if row["site"].lower() in MISSING:
        raise ValueError(f"{root / TABLE}: column site must be filled in every row, got {row['site']!r}. Fill it.")
    return row["site"]


def _subject(text: str) -> str:
    return f"sub-{text.removeprefix('sub-')}"


def _find_images(folder: Path, suffix: str) -> list[Path]:
    places = ("", "sub-*/anat/", "sub-*/ses-*/anat/")
    endings = (f"*_{suffix}.nii", f"*_{suffix}.nii.gz")
    return sorted(path for place in places for ending in endings for path in folder.glob(place + ending))


def _entities(path: Path) -> tuple[str, str]:
    match = _image_name.match(path.name)
    assert match is not None  # _find_images asks for an underscore
    return _subject(match["subject"]), match["session"] or ""


def _agrees_with_folders(path: Path, subject: str, session: str) -> bool:
    """Whether a path relative to its data set lies in the folders its own name asks for, or in none."""
    folders = path.parts[:-1]
    return folders in ((), tuple(part for part in (subject, session, "anat") if part))


def _cell(row: Mapping[str, str], columns: Sequence[str]) -> str | None:
    """The row's value in the first of the columns that the table has; None where it is missing."""
    text = next((row[column] for column in columns if column in row), "")
    return None if text.lower() in MISSING else text


def _scan(site: str, subject: str, session: str, path: Path, row: Mapping[str, str]) -> tuple[Scan, list[Problem]]:
    problems: list[Problem] = []

    def note(kind: str, what: str) -> None:
        problems.append(Problem(kind, str(path), what))

    age_text = _cell(row, AGE_COLUMNS)
    age_years = None if age_text is None else _age(age_text)
    if age_text is None:
        note("no_age", "the table has no age")
    elif age_years is None:
        note("bad_age", f"age must be a number of years from 0 to {MAX_AGE_YEARS:g}, got {age_text!r}")

    sex_text = _cell(row, SEX_COLUMNS)
    sex = None if sex_text is None else SEXES.get(sex_text.lower())
    if sex_text is not None and sex is None:
        note("bad_sex", f"sex must be F, M, female or male, got {sex_text!r}")

    diagnosis: str | None = "control"
    if any(column in row for column in DIAGNOSIS_COLUMNS):
        diagnosis = _cell(row, DIAGNOSIS_COLUMNS)
        if diagnosis is None:
            note("no_diagnosis", "the table has no diagnosis")

    scanner = _cell(row, ("scanner",))
    if scanner is None and "scanner" in row:
        note("no_scanner", "the table has no scanner; the site's name is used")

    diagnosis = diagnosis and diagnosis.lower()
    return Scan(subject, session, site, scanner or site, path, age_years, sex, diagnosis), problems


def _age(text: str) -> float | None:
    try:
        age_years = float(text)
    except ValueError:
        return None
    return age_years if 0.0 <= age_years <= MAX_AGE_YEARS else None
