"""Reader of OpenBHB, as it is downloaded (Dufumier et al., NeuroImage 2022).

``participants.tsv`` at the root, and maps in
``{train,val}/derivatives/sub-<id>/ses-<n>/sub-<id>_preproc-cat12vbm_desc-gm_T1w.npy`` or ``..._preproc-quasiraw_T1w.npy``.
A site is a centre with one acquisition setting (``siteXacq``). The official split is kept: both of its test sets are "test".
"""

import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

from core.data.labels import Columns, Labels, LabelTable, code, joined, loose_key, number_of, read_labels, read_text, stamp
from core.data.manifest import SITE_NAME, Manifest, Problem, Scan

Modality = Literal["vbm", "quasiraw"]
NAMES: dict[Modality, str] = {"vbm": "preproc-cat12vbm_desc-gm_T1w", "quasiraw": "preproc-quasiraw_T1w"}
PARTS = ("train", "val")
PASSED = frozenset({"1", "1.0", "true", "yes", "pass", "passed", "ok", "accept", "accepted"})

_logger = logging.getLogger("isocenter")


def list_openbhb_sites(root: Path, columns: Columns | None = None) -> tuple[str, ...]:
    """Names of the sites, in the order of their numbers: "site-12" for the code 12.

    Raises:
        ValueError: no participants.tsv, or it cannot be understood.
    """
    _, sites = _read(root, columns)
    return tuple(sorted({site for site in sites if site}, key=lambda name: (len(name), name)))


def read_openbhb(root: Path, site: str, modality: Modality = "vbm", columns: Columns | None = None) -> Manifest:
    """The maps of one site with the labels of their subjects.

    Problems, all logged: "no_image" of a row, "no_row" of an image (counted at every site), "failed_qc" of an image that qc.tsv
    has a verdict against, "no_site" of a row, "wrong_split" of an image in another part (train, val) than its row tells, which
    counts; and those of the table (see `labels.read_labels`).

    Args:
        root: the folder that holds participants.tsv, train/ and val/.
        site: one of ``list_openbhb_sites(root)``.
        modality: "vbm" for grey-matter maps, "quasiraw" for minimally processed scans.
        columns: which columns and codes of participants.tsv mean what; a site that is told counts before siteXacq.

    Raises:
        ValueError: as `list_openbhb_sites`; or an unknown site.
    """
    table, sites = _read(root, columns)
    if site not in sites:
        known = list_openbhb_sites(root, columns)
        raise ValueError(f"site: it must be one of {', '.join(known)}, got {site!r}. Mend the name or data.root.")
    problems = list(table.problems)
    rows: dict[tuple[str | int, ...], list[Labels]] = {}
    elsewhere = set()
    for labels, name in zip(table.rows, sites, strict=True):
        if name == site:
            rows.setdefault(_key(labels.subject), []).append(labels)
        else:
            elsewhere.add(_key(labels.subject))
            if not name:
                problems.append(Problem("no_site", f"{table.path}, row {labels.row}", "the subject's site is not known"))
    failed = _failed(root, modality, problems)
    scans = []
    imaged = set()
    for part in PARTS:
        for path in sorted((root / part / "derivatives").glob(f"sub-*/ses-*/sub-*_{NAMES[modality]}.npy")):
            subject, session = path.parts[-3], path.parts[-2]
            key = _key(subject)
            if key not in rows:
                if key not in elsewhere:
                    problems.append(Problem("no_row", str(path), f"the subject is not in {table.path}"))
                continue
            imaged.add(key)
            if (key, loose_key(session)) in failed or (key, ()) in failed:
                problems.append(Problem("failed_qc", str(path), "qc.tsv has a verdict against it"))
                continue
            labels = joined(rows[key], session)
            split = labels.split or ("train" if part == "train" else "test")
            if (split == "train") != (part == "train"):
                problems.append(Problem("wrong_split", str(path), f"its row tells {split}, its folder {part}; the row counts"))
            problems += [Problem(flaw.kind, str(path), flaw.what) for flaw in labels.flaws]
            age_years = labels.age and labels.age.years
            scanner = labels.scanner or site
            about = (labels.sex, labels.diagnosis, split, labels.targets)
            scans.append(Scan(subject, session, site, scanner, path, age_years, *about))
    for key, same in rows.items():
        if key not in imaged:
            problems.append(Problem("no_image", same[0].subject, f"no {NAMES[modality]}.npy below {root}"))
    for problem in problems:
        _logger.warning("site %s: %s: %s: %s.", site, problem.kind, problem.where, problem.what)
    return Manifest(site, tuple(scans), tuple(problems))


def _read(root: Path, columns: Columns | None) -> tuple[LabelTable, list[str]]:
    path = root / "participants.tsv"
    if not path.is_file():
        raise ValueError(
            f"data.root: it must hold participants.tsv, train/ and val/ as OpenBHB does, got {str(root)!r} without the first. "
            "Name that folder with data.root=<folder>."
        )
    return _read_table(path, stamp(path), columns or Columns())


@lru_cache(maxsize=4)
def _read_table(path: Path, _: object, columns: Columns) -> tuple[LabelTable, list[str]]:
    """The rows, and the site of each, "" where it is not known."""
    table = read_labels(path, columns)
    text = read_text(path, columns)
    column = "sitexacq" if "sitexacq" in text.names and columns.site is None else table.roles.get("site")
    if column is None:
        raise ValueError(f"{path}: one column must be siteXacq or site, got {list(text.names)}. Take the table of OpenBHB.")
    return table, [_site_name(text.rows[labels.row][column]) for labels in table.rows]


def _site_name(cell: str) -> str:
    number = number_of(cell)
    if number is not None and number.is_integer():
        return f"site-{int(number)}"
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", cell).strip("-_")
    return name if re.fullmatch(SITE_NAME, name) else ""


def _key(subject: str) -> tuple[str | int, ...]:
    """A subject's name; a number that a program wrote as 1234.0 is 1234."""
    return loose_key(re.sub(r"\.0+$", "", subject.removeprefix("sub-")))


def _failed(root: Path, modality: Modality, problems: list[Problem]) -> set[tuple[tuple[str | int, ...], tuple[str | int, ...]]]:
    """Subjects and sessions that a column of verdicts in qc.tsv (qc, or that of the modality) does not let pass."""
    path = root / "qc.tsv"
    if not path.is_file():
        return set()
    try:
        table = read_text(path)
    except ValueError as error:
        problems.append(Problem("bad_table", str(path), str(error).rstrip(".")))
        return set()
    verdicts = [name for name in ("qc", f"{modality}_qc", f"qc_{modality}", "pass") if name in table.names]
    if "participant_id" not in table.names or not verdicts:
        _logger.info("%s: no column of verdicts (qc, %s_qc or pass): no scan is left out by it.", path, modality)
        return set()
    failed = set()
    for row in table.rows.values():
        told = [row[name].lower() for name in verdicts if row[name]]
        if any(code(text) not in PASSED for text in told):
            session = row.get("session", "")
            failed.add((_key(row["participant_id"]), loose_key(f"ses-{session.removeprefix('ses-')}") if session else ()))
    return failed
