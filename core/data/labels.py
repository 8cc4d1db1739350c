"""Tables of labels (age, sex, site, diagnosis, scanner, split): the one place where they are read, understood and checked.

Text is UTF-8, its cells separated by tab, comma or semicolon. Columns are found by their usual names, compared without case
and punctuation, or told by `Columns`. What a cell means is told by the cell, by the data dictionary beside the table (BIDS
sidecar: Units, Levels) or by `Columns`, in no other way: a value that could mean two things is missing, and a flaw says so.
"""

import csv
import difflib
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from core.data.manifest import MAX_AGE_YEARS, SPLITS, Problem

MISSING = frozenset({"", "n/a", "na", "nan", "-", "none", "null", "unknown", "#n/a"})
DELIMITERS = "\t;,"
ROLES = ("subject", "session", "site", "scanner", "age", "sex", "diagnosis", "split")
# The first of these that a table has is the column, whatever else fits; without one, the only column that fits below is.
USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "subject": ("participant_id", "subject", "subject_id"),
    "session": ("session", "session_id"),
    "site": ("site",),
    "scanner": ("scanner",),
    "age": ("age", "age_years"),
    "sex": ("sex", "gender"),
    "diagnosis": ("diagnosis", "dx", "group"),
    "split": ("split",),
}
OTHER_NAMES: Mapping[str, frozenset[str]] = {
    "subject": frozenset({"participant", "sub", "subid", "subj", "subjid", "patient", "patientid", "id"})
    | {"mrid", "mriid", "ixiid", "ptid", "caseid"},
    "session": frozenset({"ses", "sesid", "visit", "visitid", "timepoint"}),
    "site": frozenset({"siteid", "sitename", "studysite", "institution", "institutionid"})
    | {"center", "centre", "centerid", "centreid"},
    "scanner": frozenset({"scannerid", "scannername", "scannermodel"}),
    "age": frozenset(),  # see _is_age
    "sex": frozenset({"patientsex", "subjectsex", "participantsex", "sexatbirth"}),
    "diagnosis": frozenset({"dxgroup", "diagnosisgroup", "clinicalgroup"}),
    "split": frozenset(),
}
_before_age = frozenset({"patient", "subject", "participant"})
_after_age = frozenset({"at", "first", "the", "of", "in", "scan", "scans", "study", "visit", "session", "mri", "imaging"}) | {
    "baseline",
    "acquisition",
    "entry",
    "exam",
    "examination",
}
SEXES: Mapping[str, Literal["F", "M"]] = {
    **dict.fromkeys(("f", "female", "w", "woman"), "F"),
    **dict.fromkeys(("m", "male", "man"), "M"),
}
CONTROLS = frozenset(
    {"control", "controls", "hc", "healthy", "healthy control", "healthy controls", "nc", "cn", "ctrl", "ctl", "hv"}
    | {"healthy volunteer", "healthy volunteers", "normal control", "cognitively normal", "typically developing"}
)
YEARS: Mapping[str, float] = {"years": 1.0, "months": 1 / 12, "weeks": 7 / 365.25, "days": 1 / 365.25}
_units = {
    **dict.fromkeys(("y", "yr", "yrs", "year", "years", "a"), "years"),
    **dict.fromkeys(("mo", "mos", "month", "months"), "months"),
    **dict.fromkeys(("w", "wk", "wks", "week", "weeks"), "weeks"),
    **dict.fromkeys(("d", "day", "days"), "days"),
}
_name_units = frozenset(word for word in _units if len(word) > 1 or word == "y")
_dicom_units = {"Y": "years", "M": "months", "W": "weeks", "D": "days"}
_splits: Mapping[str, str] = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("valid", "validation", "dev"), "val"),
    **dict.fromkeys(("testing", "internal_test", "external_test"), "test"),
}
SESSION_WORDS = frozenset({"ses", "session", "visit", "study", "timepoint", "tp", "wave"})
CODES_OF_NO_AGE = frozenset({888.0, 999.0, 9999.0})

_logger = logging.getLogger("isocenter")
_number_text = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)

Code = Annotated[str, Field(coerce_numbers_to_str=True)]
Split = Literal["train", "val", "test"]


class LabelError(ValueError):
    """A table that cannot be understood; ``what`` and ``remedy`` name no subject and no cell, ``got`` may."""

    def __init__(self, where: str, what: str, remedy: str, got: str) -> None:
        super().__init__(f"{where}: {what}, got {got}. {remedy}.")
        self.what, self.remedy, self.got = what, remedy, got


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a table holds what, and how it writes it; None: found by its usual names.

    Attributes:
        subject: column of the subject's name, unique in the table.
        age: column of the age, in years unless its name or the data dictionary tells another unit.
        sex: column of the sex.
        site: column of the site; a table without one is one site.
        diagnosis: column of the diagnosis; in a table without one all are controls.
        scanner: column of the scanner; without one it is the site.
        site_pattern: regular expression that a cell of ``site`` must match whole; its one group is the site's name.
        controls: codes of the diagnosis beside "control" and words that mean it.
        patients: codes of the diagnosis beside other words, all of which are patients.
        females: codes of the sex beside "f" and "female".
        males: codes of the sex beside "m" and "male".
        missing: codes of a missing value beside the empty cell, "n/a", "na", "nan", "-", "none", "null" and "unknown".
        targets: columns that fine-tuning may learn, as they are written; never features, and may be those of a role too.
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
    targets: tuple[str, ...] = ()
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
            if both := set(map(code, getattr(self, first))) & set(map(code, getattr(self, second))):
                raise ValueError(f"{first} and {second} must have no code in common, got {min(both)!r} in both")
        if len(self.target_columns) < len(self.targets) or "" in self.target_columns.values():
            raise ValueError(f"targets must be different columns, each with a name, got {list(self.targets)}")

    def told(self, role: str) -> str | None:
        """The column told for a role, in lower case."""
        name = getattr(self, role, None)
        return name.strip().lower() if name else None

    @property
    def target_columns(self) -> dict[str, str]:
        """The column of each target, in lower case, by the name that the configuration writes; one column once."""
        names = {name.strip().lower(): name for name in self.targets}
        return {written: name for name, written in names.items()}

    @property
    def missing_codes(self) -> frozenset[str]:
        """Every code of a missing value, as `code` writes it."""
        return MISSING | {code(text) for text in self.missing}


class Flaw(NamedTuple):
    """What is wrong with a label: the kind of problem and its sentence."""

    kind: str
    what: str


class Age(NamedTuple):
    """An age in years; ``whole`` if told as whole years, true for a year, ``capped`` if it may be any above."""

    years: float
    whole: bool = False
    capped: bool = False


@dataclass(frozen=True)
class Labels:
    """What one row tells; "" and None are missing values, each with a flaw where a table has a column for it."""

    subject: str = ""
    row: int = 0
    session: str = ""
    site: str = ""
    scanner: str = ""
    age: Age | None = None
    sex: Literal["F", "M"] | None = None
    diagnosis: str | None = "control"
    split: Split | None = None
    flaws: tuple[Flaw, ...] = ()
    targets: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TextTable:
    """A table as text: column names in lower case, and the cells of each row that is not blank, by its number in the file."""

    path: Path
    names: tuple[str, ...]
    rows: Mapping[int, Mapping[str, str]]


@dataclass(frozen=True)
class LabelTable:
    """A table of labels, understood.

    Attributes:
        path: the file.
        roles: column of each role that the table has.
        rows: one for each row that names a subject, in the order of the file.
        first_visit: the ages are those at a first visit, says the column's name.
        problems: rows that name no subject, and a data dictionary that cannot be read.
        names: every column, in lower case.
    """

    path: Path
    roles: Mapping[str, str]
    rows: tuple[Labels, ...]
    first_visit: bool = False
    problems: tuple[Problem, ...] = ()
    names: tuple[str, ...] = ()


def read_text(path: Path, columns: Columns | None = None) -> TextTable:
    """Read the cells of a table; missing values become "".

    Args:
        path: the file.
        columns: which columns to ignore, and codes of missing values.

    Raises:
        LabelError: not such a file, or a row with more or fewer cells than the header.
    """
    columns = columns or Columns()
    try:
        text = path.read_bytes().decode("utf-8-sig")
        delimiter = _delimiter(path, text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = {number: line for number, line in enumerate(reader, start=1) if any(map(str.strip, line))}
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        what = "it must be UTF-8 text, separated by comma, semicolon or tab"
        raise LabelError(str(path), what, "Save it as such", str(error)) from None
    header = [name.strip().lower() for name in next(iter(lines.values()), [])]
    # A nameless column is the row number that some programs write, or what follows a last separator.
    kept = [i for i, name in enumerate(header) if name and not matches(name, columns.ignore)]
    names = tuple(header[i] for i in kept)
    missing = columns.missing_codes
    rows = {}
    for number, line in list(lines.items())[1:]:
        surplus = line[len(header) :]
        if len(line) < len(header) or any(map(str.strip, surplus)):
            what = f"every row must have {len(header)} cells"
            raise LabelError(str(path), what, "Mend it", f"{len(line)} in row {number}")
        cells = [line[i].strip() for i in kept]
        rows[number] = {name: "" if code(cell) in missing else cell for name, cell in zip(names, cells, strict=True)}
    return TextTable(path, names, rows)


def check_names(table: TextTable) -> None:
    """Refuse a table with two columns of one name; to be asked once its first line is known to be one of names.

    Raises:
        LabelError: which one.
    """
    if double := [name for name in table.names if table.names.count(name) > 1]:
        what = f"each column must be named once (in lower case), got {double[0]!r} twice"
        raise LabelError(str(table.path), what, "Rename or ignore one", f"columns {', '.join(table.names)}")


def find_column(table: TextTable, role: str, columns: Columns) -> str | None:
    """The column of a role: the one told, else one of its usual names, else the only one that fits; None if none does.

    Raises:
        LabelError: a column told that the table lacks, or two that fit equally.
    """
    told = columns.told(role)
    if told is not None:
        if told in table.names:
            return told
        raise _no_column(str(table.path), role, getattr(columns, role), table.names)
    taken = {name for other in ROLES if other != role and (name := columns.told(other)) is not None}
    fitting = {name: _key(name) for name in table.names if name not in taken}
    wanted = [_key(name) for name in USUAL_NAMES[role]]
    usual = sorted((wanted.index(key), name) for name, key in fitting.items() if key in wanted)
    other = [
        name
        for name, key in fitting.items()
        if key not in wanted and (key in OTHER_NAMES[role] or (role == "age" and _is_age(name)))
    ]
    found = [name for _, name in usual] + other
    if len(found) > 1:
        if not usual:
            what = f"one column must be the {role}, and {len(found)} fit"
            remedy = f"Name one with data.columns.{role}=..., or leave one with data.columns.ignore=[...]"
            raise LabelError(str(table.path), what, remedy, ", ".join(found))
        _logger.info("%s: column %r is the %s; %s not read.", table.path, found[0], role, ", ".join(map(repr, found[1:])))
    return found[0] if found else None


def check_targets(where: str, names: Sequence[str], columns: Columns) -> None:
    """Refuse targets that are none of the columns, which are in lower case.

    Raises:
        LabelError: the first, and the columns nearest to it.
    """
    for target, name in columns.target_columns.items():
        if name not in names:
            raise _no_column(where, "targets", target, names)


def _no_column(where: str, role: str, told: str, names: Sequence[str]) -> LabelError:
    near = ", ".join(difflib.get_close_matches(told.strip().lower(), names, n=3)) or "none"
    return LabelError(where, f"data.columns.{role} must be a column of the table", f"Nearest: {near}", repr(told))


def is_label(name: str) -> bool:
    """Whether a column is never a feature: its name, in lower case, is a usual one of a role."""
    return any(_key(name) in map(_key, names) for names in USUAL_NAMES.values()) or _is_age(name)


def find_columns(table: TextTable, columns: Columns) -> dict[str, str]:
    """The column of each role that the table has; raises as `find_column`."""
    found = {role: find_column(table, role, columns) for role in ROLES}
    return {role: name for role, name in found.items() if name is not None}


def read_labels(path: Path, columns: Columns | None = None, *, sidecar: Mapping[str, Any] | None = None) -> LabelTable:
    """Read and check a table of labels.

    The kinds of flaw are "no_age", "bad_age" (no age since birth from 0 to 120 years), "capped_age" (such as "89+", used as
    89), "doubtful_age" (the data dictionary contradicts itself; its Units count), "bad_sex", "no_diagnosis", "bad_diagnosis"
    (a code that nothing explains), "no_scanner", "bad_split" and "double_row" (a second row of the same subject and session).
    A diagnosis that is neither missing nor a word or code of control is "patient"; the log tells the original words.

    Args:
        path: the file.
        columns: which columns and codes mean what.
        sidecar: the data dictionary; None: the .json file beside the table, where there is one.

    Raises:
        LabelError: a table that cannot be read, or without a column of subjects or one that ``columns`` tells.
    """
    columns = columns or Columns()
    problems = []
    if sidecar is None:
        sidecar, fault = read_sidecar(path.with_suffix(".json"))
        problems += [fault] if fault else []
    table = read_text(path, columns)
    roles = find_columns(table, columns)
    if "subject" not in roles:
        what = f"one column must be the subject's name, such as {', '.join(USUAL_NAMES['subject'])}"
        raise LabelError(str(path), what, "Name it with data.columns.subject=...", str(list(table.names)))
    check_targets(str(path), table.names, columns)
    check_names(table)
    empty = [number for number, row in table.rows.items() if not row[roles["subject"]]]
    what = f"column {roles['subject']} must name a subject in every row; fill or remove the row"
    problems += [Problem("no_subject", f"{path}, row {number}", what) for number in empty]
    rows = {number: row for number, row in table.rows.items() if number not in empty}
    meanings = Meanings.of({role: (name, [row[name] for row in rows.values()]) for role, name in roles.items()}, sidecar, columns)
    cells = [{role: row[name] for role, name in roles.items()} for row in rows.values()]
    targets = [tuple((target, row[name]) for target, name in columns.target_columns.items()) for row in rows.values()]
    labels = read_rows(cells, targets, list(rows), meanings, str(path))
    return LabelTable(path, roles, tuple(labels), meanings.age.first_visit, tuple(problems), table.names)


def read_sidecar(path: Path) -> tuple[dict[str, Any], Problem | None]:
    """A .json file that holds a dictionary; an empty one where there is no file, and a problem where it cannot be read."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError, RecursionError) as error:
        return {}, Problem("bad_sidecar", str(path), f"it must be UTF-8 JSON and is not read: {error}")
    if not isinstance(found, dict):
        return {}, Problem("bad_sidecar", str(path), "it must be a JSON object and is not read")
    return found, None


@dataclass(frozen=True)
class AgeColumn:
    """What the numbers of a column of ages mean.

    Attributes:
        unit: one of `YEARS`; None if they cannot be ages since birth.
        doubt: why the unit is doubtful; "" if it is not.
        commas: 34,5 is 34.5 all through the column.
        first_visit: they are the ages at a first visit.
    """

    unit: str | None = "years"
    doubt: str = ""
    commas: bool = False
    first_visit: bool = False

    @classmethod
    def of(cls, name: str, cells: Iterable[str], entry: Mapping[str, Any]) -> "AgeColumn":
        """From the column's name, its cells, and its entry in the data dictionary."""
        words = _words(name)
        told = _text(entry.get("Units"))
        description = " ".join(_text(entry.get(key)) for key in ("Description", "LongName"))
        described = {_units[word] for word in re.findall(r"(?:in |\()(years|months|weeks|days)\b", description.lower())}
        named = {_units[word] for word in words if word in _name_units}
        gestational = _is_gestational(told or f"{name} {description}")
        if gestational:
            unit, doubt = None, ""
        elif told.lower() in MISSING:
            [unit] = named if len(named) == 1 else described if len(described) == 1 else {"years"}
            doubt = f"its name tells {unit}, its description {_listed(described)}" if described - {unit} else ""
        else:
            known = unit_of(told)
            unit, doubt = known or "years", "" if known else f"its Units are {told!r}, taken as years"
            if known and (described | named) - {known}:
                doubt = f"its Units are {told!r}, its name or description tells {_listed((described | named) - {known})}"
        filled = [cell for cell in cells if cell]
        commas = all(re.fullmatch(r"\d+(,\d{1,2})?", cell, re.ASCII) for cell in filled)
        return cls(unit, doubt, commas, "first" in words or "baseline" in words)

    def read(self, text: str) -> tuple[Age | None, list[Flaw]]:
        """The age that a cell that is not missing tells."""
        plain = text.strip().replace(",", ".") if self.commas else text.strip()
        capped = re.fullmatch(r"(?:>=?|≥)\s*(\S.*)|(\S.*?)\s*\+", plain)
        if capped:
            plain = capped[1] or capped[2]
        number, unit = plain, self.unit
        if not _number_text.fullmatch(plain):
            dicom = re.fullmatch(r"(\d{3})([DWMY])", plain)
            parts = re.fullmatch(r"([\d.]+)[\s_]*([A-Za-z()_ .]+)", plain, re.ASCII)
            if dicom:
                number, unit = dicom[1], _dicom_units[dicom[2]]
            elif parts:
                number = parts[1]
                unit = None if _is_gestational(parts[2]) else unit_of(parts[2]) or ""
        if unit is None:
            return None, [Flaw("bad_age", f"age must be counted from birth, and gestational age is not, got {text!r}")]
        value = float(number) if _number_text.fullmatch(number) else math.nan
        years = value * YEARS.get(unit, math.nan)
        if not 0.0 <= years <= MAX_AGE_YEARS or (unit != "days" and value in CODES_OF_NO_AGE):
            return None, [Flaw("bad_age", f"age must be a number of years from 0 to {MAX_AGE_YEARS:g}, got {text!r}")]
        flaws = [Flaw("capped_age", f"the age is only told as {text!r}; {years:g} is used")] if capped else []
        if self.doubt and unit == self.unit and number == plain:
            flaws.append(Flaw("doubtful_age", f"age {text!r} is taken in {unit}, and the column is not clear: {self.doubt}"))
        return Age(years, unit == "years" and "." not in number, bool(capped)), flaws


@dataclass(frozen=True)
class Meanings:
    """What the cells of a table mean: its ages, its Levels in lower case by code, and the codes that a site told."""

    age: AgeColumn = AgeColumn()
    sexes: Mapping[str, Literal["F", "M"]] = field(default_factory=dict)
    diagnoses: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, tuple[str, Sequence[str]]], sidecar: Mapping[str, Any], columns: Columns) -> "Meanings":
        """From the columns found (role: name and cells), the data dictionary, and the codes told."""
        entries = {str(name).strip().lower(): entry for name, entry in sidecar.items() if isinstance(entry, Mapping)}

        def levels(role: str) -> dict[str, str]:
            told = entries.get(found[role][0], {}).get("Levels") if role in found else None
            named = told.items() if isinstance(told, Mapping) else ()
            return {code(str(key)): _level(value) for key, value in named}

        age = AgeColumn()
        if "age" in found:
            name, cells = found["age"]
            age = AgeColumn.of(name, cells, entries.get(name, {}))
        sexes = dict(SEXES)
        for key, text in levels("sex").items():
            means = {SEXES[word] for word in re.findall("[a-z]+", text) if word in SEXES}
            if len(means) == 1:
                sexes.setdefault(key, means.pop())
        sexes.update(dict.fromkeys(map(code, columns.females), "F"))
        sexes.update(dict.fromkeys(map(code, columns.males), "M"))
        diagnoses = {key: "control" if _is_healthy(text) else "patient" for key, text in levels("diagnosis").items() if text}
        diagnoses |= dict.fromkeys(CONTROLS, "control")
        diagnoses |= {code(text): "control" for text in columns.controls} | {code(text): "patient" for text in columns.patients}
        return cls(age, sexes, diagnoses)


def read_rows(
    rows: Sequence[Mapping[str, str]],
    targets: Sequence[tuple[tuple[str, str], ...]],
    numbers: Sequence[int],
    meanings: Meanings,
    where: str,
) -> list[Labels]:
    """The labels of rows of cells by role, checked; a role that the rows lack has no column, "" is a missing value.

    Args:
        rows: cells by role.
        targets: names and cells of the targets of each row, which are not checked.
        numbers: number of each row in its file.
        meanings: what the cells mean.
        where: the table, for the log.
    """
    labels = [
        replace(_labels(row, number, meanings), targets=of_row)
        for row, number, of_row in zip(rows, numbers, targets, strict=True)
    ]
    words = Counter((row["diagnosis"], found.diagnosis) for row, found in zip(rows, labels, strict=True) if "diagnosis" in row)
    told = ", ".join(
        f"{text or 'missing'} is {means or 'not known'} ({n})" for (text, means), n in sorted(words.items(), key=str)
    )
    if words:
        level = logging.INFO if any(means == "control" for _, means in words) else logging.WARNING
        hint = "" if level == logging.INFO else "; no row is a control: name their code with data.columns.controls"
        _logger.log(level, "%s: diagnosis: %s%s.", where, told, hint)
    return _validated(rows, labels)


def _labels(row: Mapping[str, str], number: int, meanings: Meanings) -> Labels:
    """One row; what the schema of `_validated` checks is not yet."""
    flaws: list[Flaw] = []
    age = None
    if row.get("age"):
        age, flaws = meanings.age.read(row["age"])
    else:
        flaws.append(Flaw("no_age", "the table has no age"))
    diagnosis: str | None = "control"
    if "diagnosis" in row:
        text = row["diagnosis"]
        key = code(text)
        diagnosis = meanings.diagnoses.get(key) or meanings.diagnoses.get(" ".join(re.findall("[a-z]+", key)))
        if not text:
            diagnosis = None
            flaws.append(Flaw("no_diagnosis", "the table has no diagnosis"))
        elif diagnosis is None and number_of(text) is None:
            diagnosis = "patient"
        elif diagnosis is None:
            what = f"the code {text!r} means nothing here; tell it by data.columns.controls and patients, or by Levels"
            flaws.append(Flaw("bad_diagnosis", what))
    if "scanner" in row and not row["scanner"]:
        flaws.append(Flaw("no_scanner", "the table has no scanner; the site's name is used"))
    return Labels(
        row.get("subject", ""),
        number,
        row.get("session", ""),
        row.get("site", ""),
        row.get("scanner", ""),
        age,
        meanings.sexes.get(code(row.get("sex", ""))),
        diagnosis,
        _splits.get(row.get("split", "").lower()),  # type: ignore[arg-type]
        tuple(flaws),
    )


def _validated(rows: Sequence[Mapping[str, str]], labels: list[Labels]) -> list[Labels]:
    """The labels with a flaw for each cell that the schema refuses."""
    if not labels:
        return labels
    # Half a second that only those who read tables pay.
    import pandas as pd
    from pandera.errors import SchemaErrors
    from pandera.pandas import Check, Column, DataFrameSchema

    def texts(name: str) -> list[str | None]:
        return [getattr(found, name) or row.get(name) or None for row, found in zip(rows, labels, strict=True)]

    frame = pd.DataFrame(
        {
            "subject": pd.Series([f"{found.subject}\t{found.session}" for found in labels], dtype=object),
            "age": pd.Series([found.age.years if found.age else math.nan for found in labels], dtype=float),
            "sex": pd.Series(texts("sex"), dtype=object),
            "split": pd.Series(texts("split"), dtype=object),
        }
    )
    schema = DataFrameSchema(
        {
            "subject": Column(object, unique=True, report_duplicates="exclude_first"),
            "age": Column(float, Check.in_range(0.0, MAX_AGE_YEARS), nullable=True),
            "sex": Column(object, Check.isin(["F", "M"]), nullable=True),
            "split": Column(object, Check.isin(SPLITS), nullable=True),
        }
    )
    try:
        schema.validate(frame, lazy=True)
    except SchemaErrors as error:
        sentences = {
            "subject": ("double_row", "the subject has a row already; leave one, or tell them apart by a column session"),
            "age": ("bad_age", f"age must be a number of years from 0 to {MAX_AGE_YEARS:g}"),
            "sex": ("bad_sex", "sex must be F, M, female, male or a code that Levels or data.columns tell"),
            "split": ("bad_split", f"split must be one of {', '.join(SPLITS)}"),
        }
        failures = error.failure_cases
        for name, case, index in zip(failures["column"], failures["failure_case"], failures["index"], strict=True):
            kind, what = sentences[name]
            got = "" if name == "subject" else f", got {case!r}"
            found = labels[int(index)]
            labels[int(index)] = replace(found, flaws=(*found.flaws, Flaw(kind, f"row {found.row}: {what}{got}")))
    return labels


def unit_of(text: str) -> str | None:
    """The unit of time that a text names, as a key of `YEARS`; None if it names none or several.

    >>> unit_of("month(s)"), unit_of("years old"), unit_of("score")
    ('months', 'years', None)
    """
    found = {_units[word] for word in re.findall("[a-z]+", text.lower().replace("(s)", "")) if word in _units}
    return found.pop() if len(found) == 1 else None


def ages_agree(first: Age, second: Age) -> bool:
    """Whether two tellings of one age contradict each other by no more than a year, a fifth below five years.

    Whole years are true for the year that follows them, and a capped age for all above.
    """
    low, high = sorted((first, second))
    if low.capped or (low.whole and math.floor(high.years) == low.years):
        return True
    return high.years - low.years <= (0.2 * high.years if low.years < 5.0 else 1.0)


def code(text: str) -> str:
    """A code as it is compared: in lower case, a number by its value (1 and 1.0 are one code)."""
    number = number_of(text)
    return text.strip().lower() if number is None else repr(number)


def number_of(text: str) -> float | None:
    """A finite number that float32 holds."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= 3.4028234663852886e38 else None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name in lower case matches one of the patterns with * and ?."""
    return any(fnmatchcase(name, pattern.lower()) for pattern in patterns)


def loose_key(name: str) -> tuple[str | int, ...]:
    """A name by its words and numbers: sub-01, SUB-001 and sub_1 have one key.

    >>> loose_key("Sub-001a") == loose_key("sub_1A")
    True
    """
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^\W\d_]+|\d+", name.lower()))


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """A name by its words and numbers, to sort ses-2 before ses-10."""
    return tuple((0, part) if isinstance(part, int) else (1, part) for part in loose_key(name))


def _delimiter(path: Path, text: str) -> str:
    """The separator that is most frequent in the first line that is not blank, outside of quotes; tab before the others."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    first = re.sub(r'"[^"]*"', "", first)
    if path.suffix.lower() == ".tsv" and "\t" in first:
        return "\t"
    return max(DELIMITERS, key=first.count)


def _key(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def _is_age(name: str) -> bool:
    """Whether a column's name tells an age at a scan, and no other age: "patient_age_at_first_study", "Age (months)"."""
    glued = re.sub("(?<=patient|subject)age", " age", " ".join(_words(name)).replace("ageat", "age at "))
    words = re.sub("age(?=years|months|weeks|days)", "age ", glued).split()
    if "age" not in words:
        return False
    before, after = words[: words.index("age")], words[words.index("age") + 1 :]
    return set(before) <= _before_age and all(word in _after_age or word in _name_units for word in after)


def _is_gestational(text: str) -> bool:
    return re.search(r"gestation|menstrual|conception|(?<![a-z])(pma|ga)(?![a-z])", text.lower()) is not None


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _level(value: object) -> str:
    """The text of a level, which may be an object with a Description."""
    if isinstance(value, Mapping):
        value = value.get("Description") or value.get("Label") or value.get("label")
    return _text(value).lower()


def _is_healthy(text: str) -> bool:
    """Whether the text of a level tells a healthy person and nobody else."""
    words = set(re.findall("[a-z]+", text))
    healthy = {"healthy", "control", "controls", "neurotypical"} & words or {"typically", "developing"} <= words
    return text in CONTROLS or (bool(healthy) and not words & {"non", "not", "no", "patient", "patients", "un"})


def _listed(units: Iterable[str]) -> str:
    return " and ".join(sorted(units))


def site_names(table: LabelTable, columns: Columns | None) -> list[str]:
    """The name of the site of each row, "" where it is not known; what a name may not hold is a hyphen.

    Raises:
        LabelError: cells that ``site_pattern`` does not match, or two sites of one name.
    """
    pattern = columns.site_pattern if columns else None
    cells = [row.site for row in table.rows]
    if pattern is not None:
        found = [re.fullmatch(pattern, cell) for cell in cells]
        unlike = [cell for cell, match in zip(cells, found, strict=True) if cell and match is None]
        if unlike:
            what = f"every cell of column {table.roles['site']} must match site_pattern, {len(unlike)} of {len(cells)} do not"
            raise LabelError(str(table.path), what, "Mend data.columns.site_pattern", ", ".join(sorted(set(unlike))))
        cells = [(match[1] or "") if match else "" for match in found]
    name_of = {cell: re.sub(r"[^A-Za-z0-9_-]+", "-", cell).strip("-_")[:64] for cell in cells}
    names = [name for cell, name in name_of.items() if cell]
    if "" in names or len(set(names)) != len(names):
        what = f"column {table.roles['site']} must tell sites apart by letters and digits"
        raise LabelError(str(table.path), what, "Rename sites", ", ".join(sorted(name_of)))
    return [name_of[cell] for cell in cells]


def stamp(path: Path) -> tuple[tuple[int, int], ...]:
    """What changes when a table or the data dictionary beside it does."""
    files = (file.stat() for file in (path, path.with_suffix(".json")) if file.is_file())
    return tuple((state.st_mtime_ns, state.st_size) for state in files)


def joined(rows: Sequence[Labels], session: str) -> Labels:
    """What all rows of one subject tell of one session: by the row of that session, where rows tell sessions.

    A subject has one sex, diagnosis and split, a session one text of each target: where its rows contradict each other, the value
    is missing.
    """
    same = [row for row in rows if row.session and _session_key(row.session) == _session_key(session)] or list(rows)
    found = same[0]
    flaws = [flaw for row in same for flaw in row.flaws]
    if any(row.age and found.age and not ages_agree(row.age, found.age) for row in same[1:]):
        flaws.append(Flaw("contradictory_age", "rows of the subject tell different ages, and none tells the session"))
        found = replace(found, age=None)
    elif found.age is None:
        found = replace(found, age=next((row.age for row in same if row.age), None))
    told = {name: {getattr(row, name) for row in rows} - {None} for name in ("sex", "diagnosis", "split")}
    for name, values in told.items():
        if len(values) > 1:
            flaws.append(Flaw(f"contradictory_{name}", f"rows of the subject tell {' and '.join(sorted(values))}"))
    sex, diagnosis, split = (values.pop() if len(values) == 1 else None for values in told.values())
    targets = []
    for column, (target, _) in enumerate(found.targets):
        cell, contradictions = agreed(target, [row.targets[column][1] for row in same])
        targets.append((target, cell))
        flaws += contradictions
    flaws = list(dict.fromkeys(flaws))
    return replace(found, sex=sex, diagnosis=diagnosis, split=split, flaws=tuple(flaws), targets=tuple(targets))


def agreed(target: str, cells: Sequence[str]) -> tuple[str, list[Flaw]]:
    """The one text that cells of a target tell, numbers by value; "" where they tell none, or, with a flaw, several."""
    told = {code(cell): cell for cell in reversed(cells) if cell}
    if len(told) > 1:
        return "", [Flaw("contradictory_target", f"column {target!r} tells {' and '.join(sorted(told.values()))}")]
    return next(iter(told.values()), ""), []


def _session_key(name: str) -> tuple[str | int, ...]:
    """A session's name without the word for session, with numbers by value."""
    key = loose_key(name)
    return key[1:] if len(key) > 1 and key[0] in SESSION_WORDS else key
