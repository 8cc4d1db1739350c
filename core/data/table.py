"""Reader of a table of regional features (thickness, volumes): one row a subject, many sites or one.

Ages, sexes, sites and diagnoses stand in the same table or in a second one that is joined on the subject. Which columns
hold them is found as in ``bids`` or told by `Columns`; the features are all other columns of numbers, sorted by name.

`TableError` names columns only and may leave the site; the rows it is about are in the site's own log.
"""

import csv
import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from core.data.bids import AGE_COLUMNS, DIAGNOSIS_COLUMNS, MISSING, SEX_COLUMNS, SEXES
from core.data.manifest import MAX_AGE_YEARS, SITE_NAME, Manifest, Problem, Scan

# The first of these that a table has is used, unless `Columns` names another; names are compared in lower case.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "subject": ("participant_id", "subject", "subject_id"),
    "age": AGE_COLUMNS,
    "sex": SEX_COLUMNS,
    "site": ("site",),
    "diagnosis": DIAGNOSIS_COLUMNS,
    "scanner": ("scanner",),
}
DELIMITERS = ",;\t"

_logger = logging.getLogger("isocenter")

Code = Annotated[str, Field(coerce_numbers_to_str=True)]


class TableError(ValueError):
    """A table that cannot be understood; the text names columns and counts, no subject and no cell, and may leave the site."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a table holds what, and how it writes it; None: found by its usual names.

    Attributes:
        subject: column of the subject's name, unique in the table.
        age: column of the age in years.
        sex: column of the sex.
        site: column of the site; a table without one is one site.
        diagnosis: column of the diagnosis; in a table without one all are controls.
        scanner: column of the scanner; without one it is the site.
        site_pattern: regular expression that a cell of ``site`` must match whole; its one group is the site's name.
        controls: codes of the diagnosis beside "control".
        patients: codes of the diagnosis beside "patient".
        females: codes of the sex beside "f" and "female".
        males: codes of the sex beside "m" and "male".
        missing: codes of a missing value beside the empty cell, "n/a", "na", "nan" and "-".
        features: patterns with * and ? of the features' columns; None: every other column of numbers.
        ignore: patterns of columns that are not read.
    """

    subject: str | None = None
    age: str | None = None
    sex: str | None = None
    site: str | None = None
    diagnosis: str | None = None
    scanner: str | None = None
    site_pattern: str | None = None
    controls: tuple[Code, ...] = ()
    patients: tuple[Code, ...] = ()
    females: tuple[Code, ...] = ()
    males: tuple[Code, ...] = ()
    missing: tuple[Code, ...] = ()
    features: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.site_pattern is not None:
            try:
                groups = re.compile(self.site_pattern).groups
            except re.error as error:
                raise ValueError(f"site_pattern must be a regular expression, got {self.site_pattern!r}: {error}") from None
            if groups != 1:
                raise ValueError(f"site_pattern must have one group, the site's name, got {self.site_pattern!r} with {groups}")
        for first, second in (("controls", "patients"), ("females", "males")):
            if both := set(map(_code, getattr(self, first))) & set(map(_code, getattr(self, second))):
                raise ValueError(f"{first} and {second} must have no code in common, got {min(both)!r} in both")


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """The features of scans, one row each; NaN where a value is missing.

    Attributes:
        names: name of each feature.
        values_NF: (N, F) float32.
    """

    names: tuple[str, ...]
    values_NF: NDArray[np.float32]

    @property
    def num_inputs(self) -> int:
        """Number of features."""
        return len(self.names)

    @property
    def signature(self) -> str:
        """SHA-256 of the names in their order: equal at sites whose rows mean the same."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def read(self, indices: Sequence[int]) -> NDArray[np.float32]:
        """Rows (B, F), a copy."""
        return self.values_NF[list(indices)]


@dataclass(frozen=True)
class TableSource:
    """A table of the features of one site or many.

    Attributes:
        table: file with one row a subject, its values separated by comma, semicolon or tab.
        participants: file that holds labels (age, sex, site, diagnosis, scanner), joined on the subject; what it has counts
            before what the table has. None: the table holds all.
        columns: where and how both hold what.
    """

    table: Path
    participants: Path | None
    columns: Columns

    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted; a table without a column of sites is one site, named as the file.

        Raises:
            TableError: a file is missing or cannot be understood.
        """
        read = self._read()
        return read.sites if "site" in read.roles else (re.sub(r"[^A-Za-z0-9_-]", "-", self.table.stem),)

    def open(self, site: str) -> tuple[Manifest, FeatureRows]:
        """The rows of one site and their features, both in the order of the manifest; any name for a table that is one site.

        What cannot be used fully is a problem, and logged: "no_features" (a participant without a row in the table), "no_row"
        (a row of the table without participant), "no_site" (a row whose site is not known: counted at every site), or a value
        missing: "missing_features", "no_age", "bad_age", "bad_sex", "no_diagnosis", "no_scanner".

        Raises:
            TableError: as `sites`; or the table does not have the site.
        """
        return self._read().open(site)

    def _read(self) -> "_Table":
        files = {"table": self.table} | ({"participants": self.participants} if self.participants else {})
        for key, file in files.items():
            if not file.is_file():
                raise _refusal(f"data.{key}", "it must be an existing file", f"Name it with data.{key}=<file>", str(file))
        return _read(self, tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files.values()))


@dataclass(frozen=True, eq=False)
class _File:
    """One file: its columns in lower case, and a row of cells a subject."""

    key: str
    names: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class _Table:
    """Both files, understood; ``roles`` says in which file and column each label is."""

    source: TableSource
    files: tuple[_File, ...]
    roles: Mapping[str, tuple[_File, str]]
    site_of: Mapping[str, str]
    features: FeatureRows

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.site_of.values())))

    def open(self, site: str) -> tuple[Manifest, FeatureRows]:
        if "site" in self.roles and site not in self.sites:
            remedy = "Mend the site's name or the table"
            raise _refusal("data.columns.site", "the column must hold this site's name", remedy, f"{site!r}, not in {self.sites}")
        for role in ("diagnosis", "age"):
            if role not in self.roles:
                counts = "counts as control" if role == "diagnosis" else "has no age"
                _logger.warning("%s: no column %r: every subject of site %s %s.", self.source.table, role, site, counts)
        row_of = {subject: row for row, subject in enumerate(self.files[0].rows)}
        subjects = sorted(set().union(*(file.rows for file in self.files)))
        scans: list[Scan] = []
        problems: list[Problem] = []
        for subject in subjects:
            place = f"{self.source.table}#{subject}"
            if "site" in self.roles and self.site_of.get(subject) != site:
                if subject not in self.site_of:
                    problems.append(Problem("no_site", place, "the subject's site is not known"))
                continue
            if subject not in row_of:
                problems.append(Problem("no_features", place, "the subject has no row of features"))
            elif subject not in self.files[-1].rows:
                problems.append(Problem("no_row", place, f"the subject is not in {self.source.participants}"))
            else:
                missing = int(np.isnan(self.features.values_NF[row_of[subject]]).sum())
                if missing:
                    what = f"{missing} of {self.features.num_inputs} features are missing; their means stand in"
                    problems.append(Problem("missing_features", place, what))
                labels = {role: file.rows[subject][column] for role, (file, column) in self.roles.items()}
                scans.append(_scan(subject, site, Path(place), labels, self.source.columns, problems))
        for problem in problems:
            _logger.warning("site %s: %s: %s: %s.", site, problem.kind, problem.where, problem.what)
        manifest = Manifest(site, tuple(scans), tuple(problems))
        rows = [row_of[scan.subject] for scan in manifest.scans]
        return manifest, FeatureRows(self.features.names, self.features.values_NF[rows])


def _scan(subject: str, site: str, path: Path, labels: Mapping[str, str], columns: Columns, problems: list[Problem]) -> Scan:
    """A row's labels as a scan; "" is a missing one, and a role that ``labels`` lacks has no column."""

    def note(kind: str, what: str) -> None:
        problems.append(Problem(kind, str(path), what))

    age_text = labels.get("age", "")
    age_years = _number(age_text)
    if not age_text:
        note("no_age", "the table has no age")
    elif age_years is None or not 0.0 <= age_years <= MAX_AGE_YEARS:
        note("bad_age", f"age must be a number of years from 0 to {MAX_AGE_YEARS:g}, got {age_text!r}")
        age_years = None

    sex_text = labels.get("sex", "")
    sexes = {**SEXES, **dict.fromkeys(map(_code, columns.females), "F"), **dict.fromkeys(map(_code, columns.males), "M")}
    sex = sexes.get(_code(sex_text))
    if sex_text and sex is None:
        note("bad_sex", f"sex must be F, M, female, male or a code that data.columns tells, got {sex_text!r}")

    diagnosis: str | None = "control"
    if "diagnosis" in labels:
        words = dict.fromkeys(columns.controls, "control") | dict.fromkeys(columns.patients, "patient")
        known = {_code(code): word for code, word in words.items()}
        diagnosis = known.get(_code(labels["diagnosis"]), labels["diagnosis"].lower()) or None
        if diagnosis is None:
            note("no_diagnosis", "the table has no diagnosis")

    scanner = labels.get("scanner", site)
    if not scanner:
        note("no_scanner", "the table has no scanner; the site's name is used")
    return Scan(subject, "", site, scanner or site, path, age_years, sex, diagnosis)  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def _read(source: TableSource, _: object) -> _Table:
    """Read and join the files of a source; once, until one of them changes."""
    files = [_read_file("table", source.table, source.columns)]
    if source.participants is not None:
        files.append(_read_file("participants", source.participants, source.columns))
    roles = {}
    for role, usual in COLUMNS.items():
        told = getattr(source.columns, role)
        wanted = (told.strip().lower(),) if told else usual
        found = [(file, name) for file in reversed(files) for name in wanted if name in file.names]
        if told and not found:
            known = [name for file in files for name in file.names]
            near = ", ".join(difflib.get_close_matches(wanted[0], known, n=3)) or "none"
            remedy = "" if source.participants else "; if another table holds it, name that with data.participants=<file>"
            raise TableError(f"data.columns.{role}: it must be a column of the table, got {told!r}; nearest: {near}{remedy}.")
        if found and role != "subject":
            roles[role] = found[0]
    site_of = _sites(*roles["site"], source.columns) if "site" in roles else {}
    return _Table(source, tuple(files), roles, site_of, _features(files[0], source.columns))


def _read_file(key: str, path: Path, columns: Columns) -> _File:
    where = f"data.{key}"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            delimiter = max(DELIMITERS, key=first.count)
            file.seek(0)
            lines = [line for line in csv.reader(file, delimiter=delimiter, strict=True) if any(map(str.strip, line))]
    except (csv.Error, UnicodeDecodeError) as error:
        raise _refusal(
            where, "it must be UTF-8 text, separated by comma, semicolon or tab", "Save it as such", str(error)
        ) from None
    header = [name.strip().lower() for name in lines[0]] if lines else []
    # A nameless column is the row number that some programs write, or what follows a last separator.
    kept = [i for i, name in enumerate(header) if name and not _matches(name, columns.ignore)]
    names = tuple(header[i] for i in kept)
    told = columns.subject.strip().lower() if columns.subject else ""
    subject_column = next((name for name in (told, *COLUMNS["subject"]) if name in names), None)
    if subject_column is None:
        raise TableError(
            f"{where}: one column must be the subject's name, got {len(names)} columns and none of "
            f"{', '.join(COLUMNS['subject'])}. Name it with data.columns.subject=..."
        )
    if double := [name for name in names if names.count(name) > 1]:
        raise TableError(
            f"{where}: each column must be named once (in lower case), got {double[0]!r} twice. Rename or ignore one."
        )
    missing = {_code(code) for code in columns.missing} | MISSING
    rows: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise _refusal(where, f"every row must have {len(header)} cells", "Mend it", f"{len(line)} in row {number}")
        cells = [line[i].strip() for i in kept]
        row = {name: "" if _code(cell) in missing else cell for name, cell in zip(names, cells, strict=True)}
        if not row[subject_column]:
            raise _refusal(
                f"{where}: column {subject_column}", "it must be filled in every row", "Fill it", f"none in row {number}"
            )
        subject = f"sub-{row[subject_column].removeprefix('sub-')}"
        if subject in rows:
            raise _refusal(f"{where}: column {subject_column}", "a subject must have one row", "Leave one", f"{subject} again")
        rows[subject] = row
    return _File(key, names, rows)


def _sites(file: _File, column: str, columns: Columns) -> dict[str, str]:
    """The site of each subject that has one."""
    where = f"data.columns.site: column {column}"
    cells = {subject: row[column] for subject, row in file.rows.items() if row[column]}
    if columns.site_pattern is not None:
        found = {subject: re.fullmatch(columns.site_pattern, cell) for subject, cell in cells.items()}
        if unlike := [subject for subject, match in found.items() if match is None]:
            what = f"every cell must match site_pattern, {len(unlike)} of {len(cells)} do not"
            raise _refusal(where, what, "Mend data.columns.site_pattern", ", ".join(unlike))
        cells = {subject: match[1] or "" for subject, match in found.items() if match is not None}
    if odd := sorted({cell for cell in cells.values() if not re.fullmatch(SITE_NAME, cell)}):
        what = "a site's name must be at most 64 letters, digits, - and _"
        remedy = r"Take it out of the cells with data.columns.site_pattern, such as '(\w+) .*', or mend the table"
        raise _refusal(where, what, remedy, ", ".join(map(repr, odd)))
    return cells


def _features(table: _File, columns: Columns) -> FeatureRows:
    """The columns of numbers, sorted by name so that their order in the file does not matter."""
    told = {getattr(columns, role) for role in COLUMNS} - {None}
    # An age that stands in both files must not become a feature in one of them.
    labels = {name.strip().lower() for name in told} | {name for usual in COLUMNS.values() for name in usual}
    candidates = sorted(name for name in table.names if name not in labels)
    if columns.features is not None:
        for pattern in columns.features:
            if not any(_matches(name, (pattern,)) for name in candidates):
                raise TableError(f"data.columns.features: each pattern must match a column of the table, got {pattern!r}.")
        candidates = [name for name in candidates if _matches(name, columns.features)]
    names, values, texts = [], [], []
    for name in candidates:
        cells = [row[name] for row in table.rows.values()]
        numbers = [_number(cell) if cell else math.nan for cell in cells]
        unread = numbers.count(None)
        if unread and columns.features is None and unread == len(cells) - cells.count(""):
            texts.append(name)
            continue
        if unread:
            subjects = [subject for subject, number in zip(table.rows, numbers, strict=True) if number is None]
            what = f"a feature must be a finite number with a decimal point, {unread} of {len(cells)} cells are not"
            remedy = "Mend them, name their code with data.columns.missing, or leave the column out with data.columns.ignore"
            raise _refusal(f"data.table: column {name}", what, remedy, ", ".join(subjects))
        names.append(name)
        values.append(numbers)
    if not names:
        raise TableError(f"data.table: it must have a column of numbers that is a feature, got {len(texts)} columns of text.")
    _logger.info("data.table: %d features; columns of text left out: %s", len(names), ", ".join(texts) or "none")
    return FeatureRows(tuple(names), np.array(values, dtype=np.float32).T)


def _refusal(where: str, what: str, remedy: str, got: str) -> TableError:
    """An error that may leave the site, after what is at fault was logged for the site's own eyes."""
    _logger.error("%s: %s, got %s.", where, what, got)
    return TableError(f"{where}: {what}. {remedy}; the site's local log tells more.")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern.lower()) for pattern in patterns)


def _code(text: str) -> str:
    """A code as it is compared: in lower case, a number by its value (1 and 1.0 are one code)."""
    number = _number(text)
    return text.strip().lower() if number is None else repr(number)


def _number(text: str) -> float | None:
    """A finite number that float32 holds."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None
