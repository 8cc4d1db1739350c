"""Reader of a table of regional features (thickness, volumes): one row a subject, many sites or one.

Ages, sexes, sites and diagnoses stand in the same table or in a second one that is joined on the subject, and so do the
targets of fine-tuning. Which columns hold them is found or told as `labels` says; the features are all other columns of
numbers, sorted by name.

`TableError` names columns only and may leave the site; the rows it is about are in the site's own log.
"""

import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.labels import (
    ROLES,
    USUAL_NAMES,
    LabelError,
    Labels,
    Meanings,
    TextTable,
    check_names,
    find_column,
    is_label,
    matches,
    number_of,
    read_rows,
    read_sidecar,
    read_text,
    stamp,
)
from core.data.labels import Columns as Columns
from core.data.manifest import SITE_NAME, Manifest, Problem, Scan

_logger = logging.getLogger("isocenter")


class TableError(ValueError):
    """A table that cannot be understood; the text names columns and counts, no subject and no cell, and may leave the site."""


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
    def shape(self) -> tuple[int, ...]:
        """One number a feature."""
        return (len(self.names),)

    @property
    def dtype(self) -> torch.dtype:
        """Single precision."""
        return torch.float32

    @property
    def unit(self) -> float:
        """Features are numbers as they stand."""
        return 1.0

    @property
    def signature(self) -> str:
        """SHA-256 of the names in their order: equal at sites whose rows mean the same."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def fill(self, target: Tensor, indices: Sequence[int]) -> None:
        """Copy rows to (B, F)."""
        target.copy_(torch.from_numpy(self.values_NF[list(indices)]))


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
        return _read(self, tuple(map(stamp, files.values())))


@dataclass(frozen=True, eq=False)
class _File:
    """One file, and its rows and their numbers by subject."""

    key: str
    text: TextTable
    rows: Mapping[str, Mapping[str, str]]
    numbers: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class _Table:
    """Both files, understood; ``roles`` says in which file and column each label is."""

    source: TableSource
    files: tuple[_File, ...]
    roles: Mapping[str, tuple[_File, str]]
    labels: Mapping[str, Labels]
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
                found = self.labels[subject]
                problems += [Problem(flaw.kind, place, flaw.what) for flaw in found.flaws]
                age_years = found.age and found.age.years
                scanner = found.scanner or site
                about = (found.sex, found.diagnosis, found.split, found.targets)
                scans.append(Scan(subject, "", site, scanner, Path(place), age_years, *about))
        for problem in problems:
            _logger.warning("site %s: %s: %s: %s.", site, problem.kind, problem.where, problem.what)
        manifest = Manifest(site, tuple(scans), tuple(problems))
        rows = [row_of[scan.subject] for scan in manifest.scans]
        return manifest, FeatureRows(self.features.names, self.features.values_NF[rows])


@lru_cache(maxsize=4)
def _read(source: TableSource, _: object) -> _Table:
    """Read and join the files of a source; once, until one of them changes."""
    files = [_read_file("table", source.table, source.columns)]
    if source.participants is not None:
        files.append(_read_file("participants", source.participants, source.columns))
    roles = {}
    for role in ROLES:
        told = source.columns.told(role)
        found = [(file, name) for file in reversed(files) if (name := _column(file, role, source.columns, told)) is not None]
        if told and not found:
            raise _no_column(role, told, files)
        if found and role not in ("subject", "session"):
            roles[role] = found[0]
    targets = {}
    for target, name in source.columns.target_columns.items():
        holding = [file for file in reversed(files) if name in file.text.names]
        if not holding:
            raise _no_column("targets", target, files)
        targets[target] = (holding[0], name)
    site_of = _sites(*roles["site"], source.columns) if "site" in roles else {}
    labels = _labels(files, roles, targets, source.columns)
    return _Table(source, tuple(files), roles, labels, site_of, _features(files[0], source.columns))


def _no_column(role: str, told: str, files: Sequence[_File]) -> TableError:
    known = [name for file in files for name in file.text.names]
    near = ", ".join(difflib.get_close_matches(told.strip().lower(), known, n=3)) or "none"
    remedy = "" if len(files) > 1 else "; if another table holds it, name that with data.participants=<file>"
    return TableError(f"data.columns.{role}: it must be a column of the table, got {told!r}; nearest: {near}{remedy}.")


def _labels(
    files: Sequence[_File],
    roles: Mapping[str, tuple[_File, str]],
    targets: Mapping[str, tuple[_File, str]],
    columns: Columns,
) -> dict[str, Labels]:
    """The labels of the subjects that every file has."""
    sidecar: dict[str, Any] = {}
    for file in files:
        told, fault = read_sidecar(file.text.path.with_suffix(".json"))
        if fault is not None:
            _logger.warning("%s: %s: %s.", fault.kind, fault.where, fault.what)
        sidecar |= told
    subjects = [subject for subject in files[0].rows if all(subject in file.rows for file in files)]
    cells = {role: (name, [file.rows[subject][name] for subject in subjects]) for role, (file, name) in roles.items()}
    rows = [{role: texts[i] for role, (_, texts) in cells.items()} for i in range(len(subjects))]
    rows = [{**row, "subject": subject} for row, subject in zip(rows, subjects, strict=True)]
    numbers = [files[0].numbers[subject] for subject in subjects]
    told_of = [tuple((target, file.rows[subject][name]) for target, (file, name) in targets.items()) for subject in subjects]
    labels = read_rows(rows, told_of, numbers, Meanings.of(cells, sidecar, columns), str(files[0].text.path))
    return dict(zip(subjects, labels, strict=True))


def _column(file: _File, role: str, columns: Columns, told: str | None) -> str | None:
    """The column of a role in one of the files; one that is told may stand in the other."""
    if told is not None:
        return told if told in file.text.names else None
    try:
        return find_column(file.text, role, columns)
    except LabelError as error:
        raise TableError(f"data.{file.key}: {error.what}, got {error.got}. {error.remedy}.") from None


def _read_file(key: str, path: Path, columns: Columns) -> _File:
    where = f"data.{key}"
    try:
        text = read_text(path, columns)
    except LabelError as error:
        raise _refusal(where, error.what, error.remedy, error.got) from None
    told = columns.told("subject")
    subject_column = (
        told if told in text.names else _column(_File(key, text, {}, {}), "subject", replace(columns, subject=None), None)
    )
    if subject_column is None:
        raise TableError(
            f"{where}: one column must be the subject's name, got {len(text.names)} columns and none of "
            f"{', '.join(USUAL_NAMES['subject'])}. Name it with data.columns.subject=..."
        )
    try:
        check_names(text)
    except LabelError as error:
        raise TableError(f"{where}: {error.what}. {error.remedy}.") from None
    rows: dict[str, Mapping[str, str]] = {}
    numbers: dict[str, int] = {}
    for number, row in text.rows.items():
        if not row[subject_column]:
            raise _refusal(
                f"{where}: column {subject_column}", "it must be filled in every row", "Fill it", f"none in row {number}"
            )
        subject = f"sub-{row[subject_column].removeprefix('sub-')}"
        if subject in rows:
            raise _refusal(f"{where}: column {subject_column}", "a subject must have one row", "Leave one", f"{subject} again")
        rows[subject] = row
        numbers[subject] = number
    return _File(key, text, rows, numbers)


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
    # An age or a target that stands in both files must not become a feature in one of them.
    told = {*(columns.told(role) for role in ROLES), *columns.target_columns.values()}
    candidates = sorted(name for name in table.text.names if name not in told and not is_label(name))
    if columns.features is not None:
        for pattern in columns.features:
            if not any(matches(name, (pattern,)) for name in candidates):
                raise TableError(f"data.columns.features: each pattern must match a column of the table, got {pattern!r}.")
        candidates = [name for name in candidates if matches(name, columns.features)]
    names, values, texts = [], [], []
    for name in candidates:
        cells = [row[name] for row in table.rows.values()]
        numbers = [number_of(cell) if cell else math.nan for cell in cells]
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
