"""Readers of BIDS-like folders: participants.tsv joined with the images found beside it.

Three layouts are known by what they hold:

- one folder per site, each a data set (``root/<site>/participants.tsv`` or ``root/<site>/sub-*/``);
- one participants.tsv with a column of sites at the root, images in ``root/<site>/`` or in one BIDS tree at the root;
- a single BIDS data set (at ``root`` or in ``root/rawdata``), which is one site under any name.

An image is ``<folder>/[sub-<label>/[ses-<label>/]anat/]sub-<label>_[<entities>_]<suffix>`` and .nii, .nii.gz or .mgz.
``derivatives/<pipeline>/`` is read only when asked for and ``sourcedata/`` never. Errors and problems name subjects and files:
they are for the site's own eyes.

An age is told by participants.tsv, and for one session by its row of ``*_sessions.tsv``, its image's row of ``*_scans.tsv`` and
the image's own .json. What is told for a session counts before participants.tsv, whose age is that at the first session.
Sources of one age that contradict each other by more than a year (below five years, a fifth) leave it missing.

A target of fine-tuning is told by the same tables: an image's row of ``*_scans.tsv`` counts before its session's row of
``*_sessions.tsv``, and participants.tsv only where neither has the column: a score that is missing there is not another day's.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from core.data.labels import (
    MISSING,
    Age,
    AgeColumn,
    Columns,
    Flaw,
    LabelError,
    Labels,
    LabelTable,
    ages_agree,
    agreed,
    check_targets,
    find_column,
    joined,
    loose_key,
    natural_key,
    read_labels,
    read_sidecar,
    read_text,
    site_names,
    stamp,
)
from core.data.manifest import Manifest, Problem, Scan

TABLE = "participants.tsv"
ENDINGS = (".nii", ".nii.gz", ".mgz")
NO_SITES = frozenset({"derivatives", "sourcedata", "code", "phenotype", "stimuli"})
# Entities that only processed images have: two that differ in these are one scan.
DERIVED = ("space", "res", "den", "desc", "label")
ASIDE: Mapping[str, str] = {
    "chunk_image": "chunk-: it shows a part of the head",
    "phase_image": "part-: it is no magnitude image",
    "contrast_image": "ce-: it was taken with a contrast agent",
    "echo_image": "echo-: another echo of the same scan is read",
    "inversion_image": "inv-: another inversion of the same scan is read",
    "derived_image": f"{', '.join(f'{key}-' for key in DERIVED)}: another version of the same scan is read",
    "double_image": "the same image is there in another format",
}
"""Kinds of image that are put aside, and why: each is a problem, and is read if the suffix has its entity."""
AGE_KEYS = frozenset({"age", "patientage", "subjectage"})

_logger = logging.getLogger("isocenter")


class OneSubjectError(ValueError):
    """The folder is that of one subject."""


def list_sites(root: Path, *, participants: Path | None = None, columns: Columns | None = None) -> tuple[str, ...]:
    """Names of the sites below ``root``, sorted; a single data set is one site, named as its folder.

    Raises:
        ValueError: the folder is missing, holds no data set, or its table cannot be understood.
    """
    base = _base(root)
    if not _is_data_set(base):
        return _site_folders(base)
    table = _table(base, participants, columns)
    if table is not None and "site" in table.roles:
        return tuple(sorted({name for name in site_names(table, columns) if name}))
    return (root.resolve().name,)


def find_any_image(root: Path, sites: Sequence[str]) -> bool:
    """Whether an image with a BIDS name lies where `read_site` looks; it need not be of any suffix."""
    base = _base(root)
    folders = [base, *(base / site for site in sites)]
    places = ("sub-*_", "sub-*/anat/sub-*_", "sub-*/ses-*/anat/sub-*_", "sub-*/*/sub-*_", "sub-*/ses-*/*/sub-*_")
    return any(any(folder.glob(f"{place}*{ending}")) for folder in folders for place in places for ending in ENDINGS)


def read_site(
    root: Path,
    site: str,
    *,
    suffix: str = "T1w",
    derivatives: str | None = None,
    participants: Path | None = None,
    columns: Columns | None = None,
) -> Manifest:
    """Join a site's participants.tsv with its images.

    Without participants.tsv the subjects are the folders. A participant's ``sub-`` is optional; a row and a folder whose names
    differ only in case, punctuation or leading zeros belong together where no other can ("inexact_id"). Without a diagnosis every
    subject counts as "control", and the log says so. The scanner is that of the table, else that of the images' .json files
    (make, model, field and a hash of the device), else the site.

    Every row and image that cannot be used fully is a problem, and logged: "no_image" (a row or folder of a subject),
    "no_row", "wrong_name" (it lies in the folder of another subject or session) and "two_sites" (its subject has rows at two
    sites) of an image; the kinds of `ASIDE`; those of `labels.read_labels`; "contradictory_age", "contradictory_sex",
    "contradictory_diagnosis" and "contradictory_target" (the value is missing then), "age_of_first_visit" (it stands in for that
    of a later session); "wrong_row" (a row of ``*_scans.tsv`` names another subject's image or none), "bad_table" and
    "bad_sidecar" (one that cannot be read), "no_site" (of a row), "shared_subject" (a subject of this site is at another too).

    Args:
        root: a folder as described at the top of this module.
        site: one of ``list_sites(root)``; any name for a single data set.
        suffix: the BIDS suffix of the images, after entities that they must have, such as ``space-MNI152_desc-preproc_T1w``.
        derivatives: read ``derivatives/<this>/`` in place of the raw images.
        participants: table in place of participants.tsv.
        columns: which columns and codes of the table mean what; a target may stand in the tables of sessions and scans alone.

    Raises:
        ValueError: a missing folder, an unknown site, a table that cannot be understood, a target that no table has, or images
            in several versions (``space-``, ``desc-``) of which the suffix tells none.
    """
    columns = columns or Columns()
    base = _base(root)
    single = _is_data_set(base)
    if not single:
        _check_site(site, _site_folders(base))
    data_set = base if single else base / site
    table = _table(data_set, participants, columns)
    folder, rows, others, problems = _rows_of_site(data_set, single, table, site, columns)
    images_folder = _derivatives(folder, data_set, derivatives) if derivatives else folder

    found, aside = _find_images(images_folder, suffix)
    if table is None:
        names = sorted({image.subject for image in found} | {path.name for path in folder.glob("sub-*") if path.is_dir()})
        rows = {name: [Labels(name, flaws=(Flaw("no_age", "no table has its age"),))] for name in names}
    where = data_set if table is None else table.path
    if table is None or "diagnosis" not in table.roles:
        missing = f"no {TABLE}" if table is None else "no column 'diagnosis'"
        _logger.warning("%s: %s: every subject of site %s counts as control.", where, missing, site)
    elsewhere = others if folder == data_set else set()
    problems += [] if table is None else table.problems
    problems += [
        Problem(kind, str(image.path), f"not read: {ASIDE[kind]}")
        for kind, image in aside
        if image.subject in rows or image.subject not in elsewhere
    ]
    row_of, inexact = _matched(sorted({image.subject for image in found}), rows)
    problems += [Problem("inexact_id", subject, f"taken for {row_of[subject]!r} of {where}") for subject in inexact]
    both = rows.keys() & others
    two_sites = both if folder == data_set else set()
    what = f"{where} has the subject at another site too"
    problems += [Problem("shared_subject", subject, what) for subject in sorted(both - two_sites)]

    tree = _Tree(folder, images_folder)
    by_subject: dict[str, list[_Image]] = {}
    for image in found:
        if not image.agrees_with_folders(images_folder):
            what = "the file names another subject or session than its folder"
            problems.append(Problem("wrong_name", str(image.path), what))
        elif row_of.get(image.subject) in two_sites:
            problems.append(Problem("two_sites", str(image.path), "the subject has rows at two sites; leave one"))
        elif image.subject in row_of:
            by_subject.setdefault(image.subject, []).append(image)
        elif image.subject not in elsewhere:
            problems.append(Problem("no_row", str(image.path), f"the subject is not in {where}"))
    stems: dict[str, set[str]] = {}
    for image in (*found, *(image for _, image in aside)):
        stems.setdefault(image.subject, set()).add(image.stem)
    scans: list[Scan] = []
    first_visit = table is not None and table.first_visit
    columns_seen = set(() if table is None else table.names)
    for subject in sorted(by_subject.keys() | {row for row in rows if (folder / row).is_dir()}):
        visits = _Visits.read(tree, subject, suffix, stems.get(subject, set()) if derivatives is None else None, columns)
        problems += visits.problems
        columns_seen |= visits.names
        for image in by_subject.get(subject, []):
            labels = joined(rows[row_of[subject]], image.session)
            scan, flaws = _scan(site, image, labels, visits, tree, first_visit)
            targets, contradictions = _targets(image, labels, visits, columns)
            scans.append(replace(scan, targets=targets))
            problems += [Problem(flaw.kind, str(image.path), flaw.what) for flaw in (*flaws, *contradictions)]
    check_targets(str(where), sorted(columns_seen), columns)
    if scans and any(scan.scanner for scan in scans):
        what = "nothing tells the scanner; the site's name is used"
        problems += [Problem("no_scanner", str(scan.path), what) for scan in scans if not scan.scanner]
    elif table is not None and "scanner" in table.roles:
        what = "the table has no scanner; the site's name is used"
        problems += [Problem("no_scanner", str(scan.path), what) for scan in scans]
    scans = [replace(scan, scanner=scan.scanner or site) for scan in scans]
    imaged = {row_of[scan.subject] for scan in scans}
    for subject in rows:
        if subject not in imaged:
            problems.append(Problem("no_image", subject, f"no {suffix} image to be read below {images_folder}"))
    problems += tree.problems
    for problem in problems:
        _logger.warning("site %s: %s: %s: %s.", site, problem.kind, problem.where, problem.what)
    return Manifest(site, tuple(scans), tuple(problems))


@dataclass(frozen=True)
class _Image:
    """An image file and what its name tells: the entities in their order, without the suffix."""

    path: Path
    stem: str
    entities: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> "_Image":
        stem = _stem(path.name)
        return cls(path, stem, _entities(stem))

    @property
    def subject(self) -> str:
        return _subject(self.stem.split("_")[0])

    @property
    def session(self) -> str:
        return f"ses-{self.entities['ses']}" if "ses" in self.entities else ""

    def agrees_with_folders(self, folder: Path) -> bool:
        """Whether it lies in the folders that its own name asks for, or in none."""
        parts = self.path.relative_to(folder).parts[:-1]
        return parts in ((), tuple(part for part in (self.subject, self.session, "anat") if part))


def _base(root: Path) -> Path:
    """The folder whose data set or sites are read: ``root``, or ``root/rawdata``."""
    if not root.is_dir():
        got = str(root)
        if root.is_file():
            remedy = "Unpack it and name the folder" if root.suffix in (".zip", ".gz", ".tar", ".tgz") else "Name its folder"
            raise ValueError(f"data.root: it must be a folder, got the file {got!r}. {remedy} with data.root=<folder>.")
        raise ValueError(f"data.root: it must be an existing folder, got {got!r}. Name the folder with data.root=<folder>.")
    if _is_data_set(root):
        return root
    if _is_data_set(root / "rawdata"):
        return root / "rawdata"
    if any((root / name).is_dir() for name in ("anat", "func")) or (any(root.glob("ses-*")) and root.name.startswith("sub-")):
        raise OneSubjectError(
            f"data.root: it must be the folder of all subjects, got {str(root)!r}, which is that of one. "
            f"Name the folder above with data.root={root.parent}."
        )
    return root


def _is_data_set(folder: Path) -> bool:
    return (folder / TABLE).is_file() or (folder / TABLE).is_symlink() or any(path.is_dir() for path in folder.glob("sub-*"))


def _site_folders(base: Path) -> tuple[str, ...]:
    folders = (path for path in base.glob("*") if path.name not in NO_SITES and not path.name.startswith("."))
    sites = sorted(path.name for path in folders if path.is_dir() and _is_data_set(path))
    if not sites:
        deeper = sorted({str(table.parent) for table in base.glob(f"*/*/{TABLE}")})
        hint = f"Name {deeper[0]} or the folder above it" if deeper else "Name the folder"
        raise ValueError(
            f"data.root: it must hold {TABLE} or folders sub-*, or one folder per site that does, got {str(base)!r} without. "
            f"{hint} with data.root=<folder>, or read any folder of images with data.layout=files."
        )
    return tuple(sites)


def _table(data_set: Path, participants: Path | None, columns: Columns | None) -> LabelTable | None:
    if participants is not None and not participants.is_file():
        raise ValueError(f"data.participants: it must be an existing file, got {str(participants)!r}. Mend its name.")
    path = participants or data_set / TABLE
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path}: it must be a file, got a link to none. Fetch the file (datalad get, git annex get) or mend it."
        )
    return _read_table(path, stamp(path), columns or Columns()) if path.is_file() else None


@lru_cache(maxsize=64)
def _read_table(path: Path, _: object, columns: Columns) -> LabelTable:
    if columns.targets:
        # The others may stand in the tables of sessions and scans.
        names = read_text(path, columns).names
        targets = tuple(target for target, name in columns.target_columns.items() if name in names)
        columns = replace(columns, targets=targets)
    return read_labels(path, columns)


def _rows_of_site(
    data_set: Path, single: bool, table: LabelTable | None, site: str, columns: Columns | None
) -> tuple[Path, dict[str, list[Labels]], set[str], list[Problem]]:
    """The folder of a site's images, its rows by subject, the subjects that have rows elsewhere, and rows of no site.

    The table in a site's own folder is all the site's, unless its column of sites names the site.
    """
    if table is None:
        return data_set, {}, set(), []
    rows: dict[str, list[Labels]] = {}
    others: set[str] = set()
    problems = []
    folder = data_set
    names = site_names(table, columns) if "site" in table.roles else [site] * len(table.rows)
    if not single and site not in names:
        names = [site] * len(table.rows)
    elif single and "site" in table.roles:
        _check_site(site, sorted(set(filter(None, names))))
        written = {labels.site for labels, name in zip(table.rows, names, strict=True) if name == site}
        folder = next((data_set / name for name in (site, *sorted(written)) if (data_set / name).is_dir()), data_set)
    for labels, name in zip(table.rows, names, strict=True):
        subject = _subject(labels.subject)
        if name == site:
            rows.setdefault(subject, []).append(labels)
        else:
            others.add(subject)
            if not name:
                problems.append(Problem("no_site", f"{table.path}, row {labels.row}", "the subject's site is not known"))
    return folder, rows, others, problems


def _check_site(site: str, sites: Sequence[str]) -> None:
    if site not in sites:
        raise ValueError(f"site: it must be one of {', '.join(sites)}, got {site!r}. Mend the name or data.root.")


def _derivatives(folder: Path, data_set: Path, name: str) -> Path:
    for place in (folder, data_set):
        if (place / "derivatives" / name).is_dir():
            return place / "derivatives" / name
    known = sorted(path.name for path in (data_set / "derivatives").glob("*") if path.is_dir())
    raise ValueError(
        f"data.derivatives: it must be a folder of {data_set / 'derivatives'}, got {name!r}. "
        f"There {'are ' + ', '.join(known) if known else 'is none'}; mend the name or leave it out to read the raw images."
    )


def _subject(text: str) -> str:
    return f"sub-{re.sub('^sub-', '', text, flags=re.IGNORECASE)}"


def _loose(subject: str) -> tuple[str | int, ...]:
    """A subject's loose name without the word before it: 1, sub01 and sub-001 have one."""
    key = loose_key(subject)
    while key[:1] == ("sub",):
        key = key[1:]
    return key


def _stem(name: str) -> str:
    return next((name.removesuffix(ending) for ending in sorted(ENDINGS, key=len, reverse=True) if name.endswith(ending)), name)


def _entities(stem: str) -> dict[str, str]:
    return {key: value for key, _, value in (part.partition("-") for part in stem.split("_")[:-1])}


def _find_images(folder: Path, suffix: str) -> tuple[list[_Image], list[tuple[str, _Image]]]:
    """The images to read, and those put aside with their kind of `ASIDE`; no file is opened."""
    *told, last = suffix.split("_")
    wanted = dict(part.split("-", 1) for part in told if "-" in part)
    paths = sorted(
        path
        for place in ("", "sub-*/anat/", "sub-*/ses-*/anat/")
        for ending in ENDINGS
        for path in folder.glob(f"{place}*_{last}{ending}")
    )
    images = [_Image.of(path) for path in paths]
    images = [image for image in images if wanted.items() <= image.entities.items()]
    aside: list[tuple[str, _Image]] = []

    def put_aside(kind: str, chosen: set[Path]) -> None:
        aside.extend((kind, image) for image in images if image.path in chosen)
        images[:] = [image for image in images if image.path not in chosen]

    entities = {"chunk_image": ("chunk",), "contrast_image": ("ce",), "phase_image": ("part",)}
    for kind, [key] in entities.items():
        odd = {image.path for image in images if key in image.entities and key not in wanted}
        put_aside(kind, odd - {image.path for image in images if image.entities.get("part") == "mag" and key == "part"})
    for kind, key in (("echo_image", "echo"), ("inversion_image", "inv")):
        groups: dict[object, list[_Image]] = {}
        for image in images:
            if key in image.entities and key not in wanted:
                groups.setdefault(_without(image, (key,)), []).append(image)
        firsts = {min(group, key=lambda image: natural_key(image.entities[key])).path for group in groups.values()}
        put_aside(kind, {image.path for group in groups.values() for image in group} - firsts)
    versions = {image.path: _version(image, wanted) for image in images}
    plain = set(versions.values()) if len(set(versions.values())) < 2 else {()}
    if images and not plain & set(versions.values()):
        names = sorted("_".join(f"{key}-{value}" for key, value in version) for version in set(versions.values()))
        raise ValueError(
            f"{folder}: the images must be of one version, or one be told, got {', '.join(names)}. "
            f"Name one in data.suffix, such as data.suffix={names[0]}_{last}."
        )
    put_aside("derived_image", {path for path, version in versions.items() if version not in plain})
    stems: set[tuple[Path, str]] = set()
    double = set()
    for image in images:
        place = (image.path.parent, image.stem)
        if place in stems:
            double.add(image.path)
        stems.add(place)
    put_aside("double_image", double)
    return images, aside


def _without(image: _Image, keys: Sequence[str]) -> tuple[object, ...]:
    return (image.path.parent, *((key, value) for key, value in image.entities.items() if key not in keys))


def _version(image: _Image, wanted: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The entities that only processed images have, but for those told."""
    return tuple((key, image.entities[key]) for key in DERIVED if key in image.entities and key not in wanted)


def _matched(subjects: Sequence[str], rows: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
    """The row of each subject that has images: the one of its name, else the only one of its loose name; and the latter."""
    row_of = {subject: subject for subject in subjects if subject in rows}
    inexact = []
    keys: dict[object, list[str]] = {}
    for row in rows.keys() - row_of.keys():
        keys.setdefault(_loose(row), []).append(row)
    left = [subject for subject in subjects if subject not in row_of]
    alike = Counter(map(_loose, left))
    for subject in left:
        same = keys.get(_loose(subject), [])
        if len(same) == alike[_loose(subject)] == 1:
            row_of[subject] = same[0]
            inexact.append(subject)
    return row_of, inexact


@dataclass
class _Tree:
    """The .json files of a data set, read once, and inherited from the folders above (BIDS inheritance principle)."""

    folder: Path
    images_folder: Path
    problems: list[Problem] = field(default_factory=list)
    _listed: dict[Path, list[tuple[Path, set[tuple[str, str]], str]]] = field(default_factory=dict)
    _read: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def own(self, path: Path) -> dict[str, Any]:
        """One file; empty where there is none, and a problem where it cannot be read."""
        if path not in self._read:
            self._read[path], fault = read_sidecar(path)
            self.problems += [fault] if fault else []
        return self._read[path]

    def inherited(self, path: Path, entities: Mapping[str, str], suffix: str) -> dict[str, Any]:
        """What is told of a file by all the .json files that apply to it, the nearest last."""
        told: dict[str, Any] = {}
        for root in dict.fromkeys((self.folder, self.images_folder)):
            place = root
            relative = path.parent.relative_to(self.images_folder if path.is_relative_to(self.images_folder) else self.folder)
            for part in ("", *relative.parts):
                place = place / part
                for file, needed, kind in self._jsons(place):
                    if kind == suffix and needed <= set(entities.items()):
                        told |= self.own(file)
        return told

    def _jsons(self, place: Path) -> list[tuple[Path, set[tuple[str, str]], str]]:
        if place not in self._listed:
            files = sorted(place.glob("*.json"), key=lambda file: (file.name.count("_"), file.name))
            self._listed[place] = [(file, set(_entities(file.stem).items()), file.stem.split("_")[-1]) for file in files]
        return self._listed[place]


class _Told(NamedTuple):
    """What a row of a table of sessions or scans tells: an age, and cells by the column of a target."""

    age: Age | None
    flaws: tuple[Flaw, ...]
    targets: Mapping[str, str]


@dataclass
class _Visits:
    """What is told for the sessions and images of one subject, in which columns."""

    of_session: dict[str, list[_Told]] = field(default_factory=dict)
    of_image: dict[str, list[_Told]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, tree: _Tree, subject: str, suffix: str, stems: set[str] | None, columns: Columns) -> "_Visits":
        """From the subject's tables; rows of images of this suffix that are not ``stems`` are wrong, unless that is None."""
        visits = cls()
        home = tree.folder / subject
        for path in sorted(home.glob("*_sessions.tsv")):
            for _, name, told in visits._rows(tree, path, "session", columns):
                session = f"ses-{name.removeprefix('ses-')}"
                visits.order.append(session)
                visits.of_session.setdefault(session, []).append(told)
        places = ("*/anat/", "anat/", "*/", "")
        for path in (path for place in places for path in sorted(home.glob(f"{place}*_scans.tsv"))):
            for number, name, told in visits._rows(tree, path, "filename", columns):
                stem = _stem(PurePosixPath(name.replace("\\", "/")).name)
                if stem.split("_")[-1] != suffix.split("_")[-1]:
                    continue
                if stems is not None and stem not in stems:
                    other = _subject(stem.split("_")[0])
                    what = f"it names a file of {other}" if other != subject else "it names a file that is not there"
                    visits.problems.append(Problem("wrong_row", f"{path}, row {number}", f"{what}: {name}"))
                else:
                    visits.of_image.setdefault(stem, []).append(told)
        return visits

    def _rows(self, tree: _Tree, path: Path, key: str, columns: Columns) -> Iterator[tuple[int, str, _Told]]:
        """Number and name of the rows of a table of sessions or scans, and what they tell."""
        try:
            table = read_text(path, Columns(missing=columns.missing, ignore=columns.ignore))
            name = "filename" if key == "filename" and key in table.names else find_column(table, "session", Columns())
            age = find_column(table, "age", Columns())
        except LabelError as error:
            self.problems.append(Problem("bad_table", str(path), str(error).rstrip(".")))
            return
        if name is None or (key == "filename") != (name == "filename"):
            self.problems.append(Problem("bad_table", str(path), f"it must have a column {key}, got {list(table.names)}"))
            return
        self.names |= set(table.names)
        kind = path.stem.split("_")[-1]
        entry = {k.lower(): v for k, v in tree.inherited(path, _entities(path.stem), kind).items()}.get(age or "", {})
        cells = [row[age] for row in table.rows.values()] if age else []
        column = AgeColumn.of(age or "", cells, entry if isinstance(entry, Mapping) else {})
        for number, row in table.rows.items():
            told, flaws = column.read(row[age]) if age and row[age] else (None, [])
            where = f"{path.name}, row {number}"
            targets = {column: row[column] for column in columns.target_columns.values() if column in row}
            yield number, row[name], _Told(told, tuple(Flaw(flaw.kind, f"{where}: {flaw.what}") for flaw in flaws), targets)

    @property
    def youngest(self) -> float | None:
        """The least of the ages told for all the subject's sessions, in years."""
        rows = [told for of_name in (*self.of_session.values(), *self.of_image.values()) for told in of_name]
        return min((told.age.years for told in rows if told.age is not None), default=None)


def _scan(site: str, image: _Image, labels: Labels, visits: _Visits, tree: _Tree, first_visit: bool) -> tuple[Scan, list[Flaw]]:
    """One image with its labels; the scanner is "" where nothing tells it."""
    own = tree.own(image.path.parent / f"{image.stem}.json")
    rows = [*visits.of_image.get(image.stem, []), *visits.of_session.get(image.session, [])]
    told = [(row.age, row.flaws) for row in rows]
    for key, value in own.items():
        is_age = key.lower().replace("_", "") in AGE_KEYS and isinstance(value, int | float | str)
        if is_age and str(value).strip().lower() not in MISSING:
            age, flaws = AgeColumn().read(str(value))
            told.append((age, tuple(Flaw(flaw.kind, f"{image.stem}.json: {flaw.what}") for flaw in flaws)))
    ages = [(age, flaws) for age, flaws in told if age is not None]
    kept = [flaw for flaw in labels.flaws if flaw.kind not in ("no_age", "no_scanner")]
    kept += [flaw for age, flaws in told if age is None for flaw in flaws]
    age_years = None
    if any(not ages_agree(first[0], other[0]) for i, first in enumerate(ages) for other in ages[:i]):
        kept.append(Flaw("contradictory_age", f"its ages are {_listed([age for age, _ in ages])}: mend the tables"))
    elif ages and labels.age and not _follows(ages[0][0], labels.age, visits):
        pair = _listed([labels.age, ages[0][0]])
        kept.append(
            Flaw("contradictory_age", f"its ages in the table of subjects and of the session are {pair}: mend the tables")
        )
    elif ages:
        age_years = ages[0][0].years
        kept = [flaw for flaw in kept if flaw.kind not in ("capped_age", "doubtful_age")] + list(ages[0][1])
    elif labels.age:
        age_years = labels.age.years
        if first_visit and not _is_earliest(image, visits, tree):
            kept.append(Flaw("age_of_first_visit", f"the table has the age at the first visit alone, {age_years:g}; it is used"))
    elif not any(flaw.kind == "bad_age" for flaw in kept):
        kept.append(Flaw("no_age", "no table has its age"))
    entities = dict(image.entities)
    suffix = image.stem.split("_")[-1]
    scanner = labels.scanner or scanner_name(tree.inherited(image.path, entities, suffix))
    return Scan(
        image.subject, image.session, site, scanner, image.path, age_years, labels.sex, labels.diagnosis, labels.split
    ), kept


def _targets(image: _Image, labels: Labels, visits: _Visits, columns: Columns) -> tuple[tuple[tuple[str, str], ...], list[Flaw]]:
    """Name and text of the targets of an image, each told by the nearest rows, and what is wrong with them."""
    of_subject = dict(labels.targets)
    targets, flaws = [], []
    for target, name in columns.target_columns.items():
        nearest = (visits.of_image.get(image.stem, []), visits.of_session.get(image.session, []))
        told = [[row.targets[name] for row in rows if name in row.targets] for rows in nearest]
        cell = of_subject.get(target, "")
        if any(told):
            cell, contradictions = agreed(target, next((cells for cells in told if any(cells)), []))
            flaws += contradictions
        targets.append((target, cell))
    return tuple(targets), flaws


def _is_earliest(image: _Image, visits: _Visits, tree: _Tree) -> bool:
    """Whether the image is of the subject's first session."""
    sessions = {path.name for path in (tree.folder / image.subject).glob("ses-*")} | {image.session}
    first = visits.order[0] if image.session in visits.order else min(sessions, key=natural_key)
    return image.session == first


def _follows(age: Age, at_first: Age, visits: _Visits) -> bool:
    """Whether a session's age fits the age at the first: it is the same in the youngest told, and no younger later."""
    later = visits.youngest is not None and visits.youngest < age.years
    return ages_agree(age, at_first) or (later and age.years > at_first.years)


def _listed(ages: Sequence[Age]) -> str:
    return ", ".join(f"{age.years:.4g}" for age in ages)


def scanner_name(sidecar: Mapping[str, Any]) -> str:
    """A scanner by what an image's .json tells: make, model, field, and a hash of its station and serial number; "" if nothing.

    A device's number identifies a hospital and may stand beside representations that leave it; its hash tells devices apart.
    """
    parts = [str(sidecar.get(key) or "").strip().lower() for key in ("Manufacturer", "ManufacturersModelName")]
    tesla = sidecar.get("MagneticFieldStrength")
    parts += [f"{float(tesla):.1f}t"] if isinstance(tesla, int | float) and not isinstance(tesla, bool) and tesla > 0 else []
    device = [str(sidecar.get(key) or "").strip() for key in ("StationName", "DeviceSerialNumber")]
    parts += [hashlib.sha256("/".join(device).encode()).hexdigest()[:6]] if any(device) else []
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(part for part in parts if part)).strip("-")
