"""Reader of any folder of images beside a table of labels, and which layout a folder has.

An image (.nii, .nii.gz, .mgz or .npy) belongs to the one subject of the table that its path names: as told by a pattern such as
``raw/patient{subject}/study{session}_T1W.nii.gz``, or else by the id that stands in the path as a whole, its words and numbers
compared without case and leading zeros. Without a pattern, masks, label maps and images of another contrast are put aside by
their own words. Errors and problems name subjects and files: they are for the site's own eyes.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Literal

from core.data.bids import TABLE, OneSubjectError, find_any_image, list_sites, scanner_name
from core.data.labels import (
    SESSION_WORDS,
    Columns,
    Flaw,
    LabelError,
    Labels,
    LabelTable,
    check_targets,
    joined,
    loose_key,
    natural_key,
    read_labels,
    read_sidecar,
    site_names,
)
from core.data.manifest import Manifest, Problem, Scan

Layout = Literal["bids", "openbhb", "files"]
ENDINGS = (".nii.gz", ".nii", ".mgz", ".npy")
OTHER_FORMATS: Mapping[str, str] = {
    **dict.fromkeys((".dcm", ".ima"), "DICOM, which dcm2niix converts"),
    **dict.fromkeys(
        (".hdr", ".img"), "a pair of header and image; convert its source, for Analyze does not tell left from right"
    ),
    **dict.fromkeys((".head", ".brik", ".brik.gz"), "AFNI, which 3dAFNItoNIFTI converts"),
    **dict.fromkeys((".mnc", ".mnc.gz"), "MINC, which mnc2nii converts"),
    **dict.fromkeys((".par", ".rec"), "Philips PAR/REC, which dcm2niix converts"),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd", ".mgh.gz"), "no NIfTI; save it as .nii.gz"),
    **dict.fromkeys((".nii.bz2", ".nii.xz", ".nii.zip", ".nii.zst"), "compressed in another way than .nii.gz; compress it again"),
}
"""Files that hold images but are not read, and what to do: each is a problem, so that none is passed over in silence."""
FIELDS = ("subject", "session", "site")
SUBJECT_WORDS = frozenset({"sub", "subj", "subject", "patient", "pat", "participant", "person", "case", "id"})
# A number behind one of these is never a subject's.
OTHER_WORDS = SESSION_WORDS | {
    "t",
    "run",
    "scan",
    "echo",
    "acq",
    "rep",
    "rec",
    "day",
    "month",
    "year",
    "v",
    "s",
    "mm",
    "inv",
    "part",
}
LABEL_WORDS = frozenset(
    {"mask", "brainmask", "label", "labels", "seg", "segmentation", "dseg", "probseg", "lesion", "lesions"}
) | {
    *("gt", "groundtruth", "consensus", "aseg", "aparc", "dlmuse", "dlicv", "parcellation", "atlas", "roi", "rois", "warp", "xfm")
}
CONTRAST_WORDS = frozenset(
    {"flair", "pd", "pdw", "dwi", "adc", "swi", "bold", "func", "fmri", "rest", "asl", "dti", "mra", "qsm"}
) | {*("t2", "t2w", "t2star", "t1c", "t1ce", "t1gd", "b0", "perf", "cbf", "fieldmap", "fmap")}
AGAIN_WORDS = SESSION_WORDS | {"run", "repeat", "rep", "scan", "retest", "acq", "b"}

_logger = logging.getLogger("isocenter")


@dataclass(frozen=True)
class _Found:
    """An image and what its path tells of it; "" where it tells nothing."""

    path: Path
    relative: str
    subject: str = ""
    session: str = ""
    site: str = ""


def list_file_sites(
    root: Path, *, table: Path | None = None, pattern: str | None = None, columns: Columns | None = None
) -> tuple[str, ...]:
    """Names of the sites, sorted: those of the pattern's {site}, else of the table's column, else the folder's own name.

    Raises:
        ValueError: as `read_files`.
    """
    return tuple(sorted(_sites(root, *_joined(root, table, pattern, columns or Columns())[:2], pattern, columns)))


def read_files(
    root: Path, site: str, *, table: Path | None = None, pattern: str | None = None, columns: Columns | None = None
) -> Manifest:
    """Join the images below a folder with a table of labels.

    Without ``table`` it is the one file .csv or .tsv below the folder whose subjects are most of the images'; without any,
    subjects are read from the pattern or the file names, have no age and count as controls, and the log says so.

    Problems, all logged: "no_image" of a row; "no_row" of an image that names none or several of the table's subjects;
    "label_image", "other_contrast" and "derived_image" of one that was put aside by its own words or since its name is that of
    another image and more; "other_format" of one in a format that is not read (`OTHER_FORMATS`); those of the table (see
    `labels.read_labels`); "age_of_first_visit" (the table has the age at a first visit alone, and it stands in for that of a
    later one); "no_site" and "two_sites" as in `bids.read_site`.

    Args:
        root: the folder.
        site: one of ``list_file_sites``; any name where nothing tells sites.
        table: the file of labels.
        pattern: path below the folder, with {subject}, {session}, {site} and *; an image that it does not match is not read.
        columns: which columns and codes of the table mean what.

    Raises:
        ValueError: a missing folder or file, a table that cannot be understood, two tables that fit alike, a pattern without
            {subject} or that no image matches, or an unknown site.
    """
    columns = columns or Columns()
    found, labels, problems = _joined(root, table, pattern, columns)
    sites = _sites(root, found, labels, pattern, columns)
    if _tells_sites(labels, pattern) and site not in sites:
        raise ValueError(f"site: it must be one of {', '.join(sites)}, got {site!r}. Mend the name or data.root.")
    if labels is None:
        _logger.warning("%s: no table: every subject of site %s counts as control and has no age.", root, site)
    elif "diagnosis" not in labels.roles:
        _logger.warning("%s: no column 'diagnosis': every subject of site %s counts as control.", labels.path, site)

    rows: dict[str, list[Labels]] = {}
    elsewhere: set[str] = set()
    if labels is not None:
        names = (
            site_names(labels, columns)
            if "site" in labels.roles and "{site}" not in (pattern or "")
            else [site] * len(labels.rows)
        )
        for row, name in zip(labels.rows, names, strict=True):
            if name == site:
                rows.setdefault(row.subject, []).append(row)
            else:
                elsewhere.add(row.subject)
                problems += (
                    [] if name else [Problem("no_site", f"{labels.path}, row {row.row}", "the subject's site is not known")]
                )
    scans = []
    first = min((image.session for image in found), key=natural_key, default="")
    for image in found:
        if image.site not in ("", site) or (image.subject in elsewhere and image.subject not in rows):
            continue
        if image.subject in rows and image.subject in elsewhere:
            problems.append(Problem("two_sites", str(image.path), "the subject has rows at two sites; leave one"))
            continue
        told = rows.get(image.subject, [Labels(image.subject, flaws=(Flaw("no_age", "no table has its age"),))])
        row = joined(told, image.session)
        flaws = [flaw for flaw in row.flaws if flaw.kind != "no_scanner"]
        if labels is not None and labels.first_visit and row.age and image.session != first:
            what = f"the table has the age at the first visit alone, {row.age.years:g}; it is used"
            flaws.append(Flaw("age_of_first_visit", what))
        sidecar, fault = read_sidecar(image.path.parent / f"{_stem(image.path.name)}.json")
        problems += [fault] if fault else []
        problems += [Problem(flaw.kind, str(image.path), flaw.what) for flaw in flaws]
        subject = f"sub-{image.subject.removeprefix('sub-')}"
        scanner = row.scanner or scanner_name(sidecar)
        age_years = row.age and row.age.years
        session = image.session and f"ses-{image.session.removeprefix('ses-')}"
        scans.append(Scan(subject, session, site, scanner, image.path, age_years, row.sex, row.diagnosis, row.split, row.targets))
    if any(scan.scanner for scan in scans) or (labels is not None and "scanner" in labels.roles):
        what = "nothing tells the scanner; the site's name is used"
        problems += [Problem("no_scanner", str(scan.path), what) for scan in scans if not scan.scanner]
    scans = [replace(scan, scanner=scan.scanner or site) for scan in scans]
    imaged = {image.subject for image in found}
    if "{site}" not in (pattern or ""):
        problems += [Problem("no_image", subject, f"no image below {root} is its") for subject in rows if subject not in imaged]
    for problem in problems:
        _logger.warning("site %s: %s: %s: %s.", site, problem.kind, problem.where, problem.what)
    return Manifest(site, tuple(scans), tuple(problems))


def detect_layout(root: Path) -> Layout:
    """Which reader a folder is for; the log says why.

    Raises:
        ValueError: no folder, or one that holds no image and no participants.tsv.
    """
    layout, reason = layout_and_reason(root)
    _logger.info("%s: read as data.layout=%s: %s.", root, layout, reason)
    return layout


def layout_and_reason(root: Path) -> tuple[Layout, str]:
    """Which reader a folder is for, and why; raises as `detect_layout`."""
    if not root.is_dir():
        list_sites(root)
    if any((root / part / "derivatives").is_dir() for part in ("train", "val")):
        return "openbhb", "it has train/derivatives or val/derivatives"
    try:
        sites = list_sites(root)
    except OneSubjectError:
        raise
    except ValueError:
        if _walk(root):
            return "files", f"it has images, and neither {TABLE} nor sub-* folders in the places where BIDS has them"
        if _other_images(root):
            raise _no_images(root) from None
        raise
    if not find_any_image(root, sites) and _walk(root):
        return "files", f"it has {TABLE}, and images that have no BIDS names"
    return "bids", f"it has participants.tsv or sub-* folders of {len(sites)} {'site' if len(sites) == 1 else 'sites'}"


def _tells_sites(labels: LabelTable | None, pattern: str | None) -> bool:
    return "{site}" in (pattern or "") or (labels is not None and "site" in labels.roles)


def _sites(
    root: Path, found: Sequence[_Found], labels: LabelTable | None, pattern: str | None, columns: Columns | None
) -> tuple[str, ...]:
    if "{site}" in (pattern or ""):
        return tuple(sorted({image.site for image in found}))
    if labels is not None and "site" in labels.roles:
        return tuple(sorted(set(filter(None, site_names(labels, columns)))))
    return (re.sub(r"[^A-Za-z0-9_-]", "-", root.resolve().name),)


def _joined(
    root: Path, table: Path | None, pattern: str | None, columns: Columns
) -> tuple[list[_Found], LabelTable | None, list[Problem]]:
    """The images with the subjects that the table knows, the table, and the problems of both."""
    if not root.is_dir():
        list_sites(root)
    paths = _walk(root)
    if not paths:
        raise _no_images(root)
    problems = [Problem("other_format", str(path), f"it is {what}") for path, what in _other_images(root)]
    found = [_Found(path, path.relative_to(root).as_posix()) for path in paths]
    found = _by_pattern(root, found, pattern) if pattern is not None else _wanted(found, problems)
    labels = _choose_table(root, found, table, columns)
    if labels is None:
        if pattern is None:
            found = [replace(image, subject=_named_subject(image.relative), session=_session(image.relative)) for image in found]
        return found, None, problems
    problems += labels.problems
    finder = _Finder.of(row.subject for row in labels.rows)
    kept = []
    for image in found:
        candidates = finder.same(image.subject) if pattern is not None else finder.named_in(image.relative)
        if len(candidates) == 1:
            session = image.session or ("" if pattern is not None else _session(image.relative))
            kept.append(replace(image, subject=candidates[0], session=session))
            continue
        what = f"{len(candidates)} subjects of {labels.path} stand in its path" if candidates else f"no subject of {labels.path}"
        remedy = "mend the table" if pattern is not None else "tell where the id stands with data.pattern=.../{subject}..."
        problems.append(Problem("no_row", str(image.path), f"{what}{'' if candidates else ' stands in its path'}; {remedy}"))
    return kept, labels, problems


def _no_images(root: Path) -> ValueError:
    others = _other_images(root)
    got = f"{len(others)} files such as {others[0][0].name}: {others[0][1]}" if others else "none. Name another folder"
    return ValueError(f"data.root: {str(root)!r} must hold images ({', '.join(ENDINGS)}), got {got}.")


def _other_images(root: Path) -> list[tuple[Path, str]]:
    """Images below a folder in formats that are not read, and what to do."""

    def what(path: Path) -> str:
        return next(what for ending, what in OTHER_FORMATS.items() if path.name.lower().endswith(ending))

    return [(path, what(path)) for path in _walk(root, tuple(OTHER_FORMATS))]


def _walk(root: Path, endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """Every file with such an ending below a folder, sorted; linked folders are entered once, hidden ones and loops are not."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        state = Path(place).stat()
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place) / name for name in files if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(found)


def _stem(name: str) -> str:
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def _by_pattern(root: Path, found: Sequence[_Found], pattern: str) -> list[_Found]:
    """The images whose path a pattern matches whole."""
    fields = re.findall(r"\{([^{}]*)\}", pattern)
    if "subject" not in fields or not set(fields) <= set(FIELDS):
        raise ValueError(
            f"data.pattern: it must have {{subject}}, may have {{session}}, {{site}} and *, got {pattern!r}. "
            "Write it like 'data.pattern=\"raw/patient{subject}/study{session}_T1W.nii.gz\"'."
        )
    parts: list[str] = []
    for text in re.split(r"(\{[^{}]*\}|\*+/?)", pattern):
        name = text.strip("{}") if text.startswith("{") else ""
        if name:
            parts.append(f"(?P={name})" if f"(?P<{name}>" in "".join(parts) else f"(?P<{name}>[^/]+?)")
        elif text == "**/":
            parts.append("(?:.*/)?")
        else:
            parts.append("[^/]*" + "/" * text.endswith("/") if text.startswith("*") else re.escape(text))
    expression = re.compile("".join(parts))
    matched = [(image, match) for image in found if (match := expression.fullmatch(image.relative))]
    if not matched:
        example = found[0].relative
        raise ValueError(
            f"data.pattern: it must match an image below {root}, got {pattern!r}, which matches none of {len(found)}. "
            f"One image is {example!r}."
        )
    if len(matched) < len(found):
        _logger.info("%s: %d of %d images match data.pattern; the others are not read.", root, len(matched), len(found))
    told = [(image, match.groupdict()) for image, match in matched]
    return [
        _Found(image.path, image.relative, names["subject"], names.get("session", ""), names.get("site", ""))
        for image, names in told
    ]


def _wanted(found: Sequence[_Found], problems: list[Problem]) -> list[_Found]:
    """The images that are no masks, label maps, other contrasts or versions of another one, by their own words."""
    kept = []
    for image in found:
        words = re.findall(r"[a-z]+\d*[a-z]*|\d+", image.relative.lower())
        plain = {*words, *re.findall("[a-z]+", image.relative.lower())}
        if odd := sorted(plain & LABEL_WORDS):
            problems.append(Problem("label_image", str(image.path), f"not read: {odd[0]!r} in its path tells no scan"))
        elif odd := sorted(plain & CONTRAST_WORDS):
            problems.append(
                Problem("other_contrast", str(image.path), f"not read: {odd[0]!r} in its path tells no plain T1w scan")
            )
        else:
            kept.append(image)
    stems: dict[Path, dict[str, _Found]] = {}
    for image in kept:
        stems.setdefault(image.path.parent, {}).setdefault(_stem(image.path.name), image)
    plain_images = []
    for image in kept:
        stem = _stem(image.path.name)
        beginnings = (stem[:end] for end in range(1, len(stem)))
        shorter = [other for other in beginnings if other in stems[image.path.parent]]
        more = [stem[len(other) :] for other in shorter]
        grown = [text for text in more if re.match(r"[_.-][a-zA-Z]", text) and loose_key(text)[0] not in AGAIN_WORDS]
        if grown or stems[image.path.parent][stem] is not image:
            problems.append(Problem("derived_image", str(image.path), "not read: another image has its name, or its beginning"))
        else:
            plain_images.append(image)
    return plain_images


@dataclass(frozen=True)
class _Finder:
    """The subjects of a table by their loose names."""

    by_key: Mapping[tuple[str | int, ...], tuple[str, ...]]

    @classmethod
    def of(cls, subjects: Iterable[str]) -> "_Finder":
        keys: dict[tuple[str | int, ...], tuple[str, ...]] = {}
        for subject in dict.fromkeys(subjects):
            key = loose_key(subject.removeprefix("sub-"))
            keys[key] = (*keys.get(key, ()), subject)
        return cls(keys)

    def same(self, name: str) -> list[str]:
        """The subjects that a name may be: the one spelt so, else all of its loose name."""
        subjects = self.by_key.get(loose_key(name.removeprefix("sub-")), ())
        return [subject for subject in subjects if subject.removeprefix("sub-") == name.removeprefix("sub-")] or list(subjects)

    def named_in(self, relative: str) -> list[str]:
        """The subjects whose names stand in a path; a longer name before one that is part of it."""
        path = PurePosixPath(relative)
        text = str(path.parent / _stem(path.name))
        key = loose_key(text)
        longest = max(map(len, self.by_key), default=0)
        spans = [
            (start, end)
            for start in range(len(key))
            for end in range(start + 1, min(start + longest, len(key)) + 1)
            if key[start:end] in self.by_key and not (end - start == 1 and isinstance(key[start], int) and _is_other(key, start))
        ]
        spans = [
            span for span in spans if not any(span != other and other[0] <= span[0] and span[1] <= other[1] for other in spans)
        ]
        told = [span for span in spans if span[0] > 0 and key[span[0] - 1] in SUBJECT_WORDS]
        subjects = {subject for start, end in told or spans for subject in self.by_key[key[start:end]]}
        exact = {s for s in subjects if re.search(rf"(?<![A-Za-z0-9]){re.escape(s.removeprefix('sub-'))}(?![A-Za-z0-9])", text)}
        return sorted(exact if len(exact) == 1 else subjects)


def _is_other(key: Sequence[str | int], place: int) -> bool:
    """Whether a number stands behind a word that tells it is no subject's."""
    return place > 0 and key[place - 1] in OTHER_WORDS


def _session(relative: str) -> str:
    """The session that a path names, such as "2" of study2; "" if none."""
    key = loose_key(str(PurePosixPath(relative).parent / _stem(PurePosixPath(relative).name)))
    named = [str(after) for before, after in pairwise(key) if before in SESSION_WORDS]
    return named[-1] if named else ""


def _named_subject(relative: str) -> str:
    """The subject that a path names: behind a word for one, else the file's name up to contrast or session, else its folder."""
    path = PurePosixPath(relative)
    before = "|".join(sorted(SUBJECT_WORDS - {"id"}, key=len, reverse=True))
    match = re.search(rf"(?<![A-Za-z])(?:{before})[-_]?([A-Za-z]*\d+)", relative)
    if match:
        return match[1]
    words = "|".join(sorted(SESSION_WORDS, key=len, reverse=True))
    for name in (_stem(path.name), *reversed(path.parent.parts)):
        cut = re.split(rf"(?i)(?:^|[_.\s-])(?:t1w?|mprage|anat|(?:{words})[-_]?\w+)(?![A-Za-z0-9])", name)[0]
        if cut:
            return cut
    return _stem(path.name)


def _choose_table(root: Path, found: Sequence[_Found], table: Path | None, columns: Columns) -> LabelTable | None:
    """The table told, else the one below the folder that fits most images and tells most; None without any."""
    if table is not None:
        if not table.is_file():
            raise ValueError(f"data.participants: it must be an existing file, got {str(table)!r}. Mend its name.")
        return read_labels(table, columns)
    fitting: list[tuple[tuple[int, int], LabelTable]] = []
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in (".csv", ".tsv") and path.is_file()):
        try:
            labels = read_labels(path, columns)
        except LabelError as error:
            _logger.info("%s: not the table of labels: %s", path, error)
            continue
        finder = _Finder.of(row.subject for row in labels.rows)
        matched = sum(
            len(finder.same(image.subject) if image.subject else finder.named_in(image.relative)) == 1 for image in found
        )
        if matched:
            fitting.append(((matched, len(labels.roles)), labels))
    if not fitting and columns.targets:
        # No table would leave all targets unknown: the one that fits but for them tells which it lacks.
        without = _choose_table(root, found, None, replace(columns, targets=()))
        if without is not None:
            check_targets(str(without.path), without.names, columns)
        what = "a table that fits the images must have the columns of data.columns.targets"
        raise LabelError(str(root), what, "Name the table with data.participants=<file>", "none")
    if not fitting:
        return None
    best = max(score for score, _ in fitting)
    chosen, *others = [labels for score, labels in fitting if score == best]
    for other in others:
        if _told(other) != _told(chosen):
            raise ValueError(
                f"data.participants: one table must fit best, got {chosen.path} and {other.path} that tell different labels. "
                "Name one with data.participants=<file>."
            )
    _logger.info("%s: the table of labels: it fits %d of %d images.", chosen.path, best[0], len(found))
    return chosen


def _told(table: LabelTable) -> list[Labels]:
    return [replace(row, row=0, flaws=()) for row in table.rows]
