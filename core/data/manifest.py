"""The table of a site's scans: which there are, which cannot be used, and how subjects are split.

A ``Problem`` has a kind, of which counts may leave the site, and a place and a text, which stay in the site's local
log. Errors raised here name subjects, and must not leave the site either, except those of ``check_problem_share``.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

MAX_AGE_YEARS = 120.0
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SITE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
MAX_UNUSABLE = 0.05
UNUSABLE_KINDS = frozenset(
    {"no_image", "no_row", "no_features", "wrong_name", "unreadable", "failed_qc", "two_sites", "duplicate"}
)
"""Kinds of problem that lose a scan the site wanted. The others leave a scan in the manifest, with a value missing or doubtful,
or name an image that was put aside because it is none of those wanted (a slab, a phase image, a second copy)."""


@dataclass(frozen=True)
class Scan:
    """One image file of one session of one subject, or its row in a table (the path is then ``<table>#<subject>``).

    ``session`` is "" where the site has none; ``diagnosis`` is "control", "patient" or None; ``split`` is where a study put
    the subject for good, None where it is free; ``targets`` are name and text of the columns that a run asks for, "" where a cell
    is missing.
    """

    subject: str
    session: str
    site: str
    scanner: str
    path: Path
    age_years: float | None
    sex: Literal["F", "M"] | None
    diagnosis: str | None
    split: Split | None = None
    targets: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.age_years is not None and not 0.0 <= self.age_years <= MAX_AGE_YEARS:
            raise ValueError(f"{self.path}: age_years must be from 0 to {MAX_AGE_YEARS:g}, got {self.age_years!r}.")
        if self.sex not in ("F", "M", None):
            raise ValueError(f"{self.path}: sex must be 'F', 'M' or None, got {self.sex!r}.")
        if self.split not in (*SPLITS, None):
            raise ValueError(f"{self.path}: split must be one of {SPLITS} or None, got {self.split!r}.")


@dataclass(frozen=True)
class Problem:
    """A fault of one row or one image: counts by ``kind`` may leave the site, ``where`` and ``what`` may not."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class Manifest:
    """The scans of one site, sorted by subject, session and file name, and the problems met on the way.

    Raises:
        ValueError: A scan of another site, a path listed twice, or a subject with two sexes, diagnoses or splits.
    """

    site: str
    scans: tuple[Scan, ...]
    problems: tuple[Problem, ...] = ()

    def __post_init__(self) -> None:
        ordered = sorted(self.scans, key=lambda scan: (scan.subject, scan.session, scan.path.name, scan.path))
        object.__setattr__(self, "scans", tuple(ordered))
        for path, count in Counter(scan.path for scan in self.scans).items():
            if count > 1:
                raise ValueError(f"{path}: an image must be listed once, got {count} times; remove the double rows.")
        first: dict[str, Scan] = {}
        for scan in self.scans:
            if scan.site != self.site:
                raise ValueError(f"{scan.path}: site must be {self.site!r}, got {scan.site!r}.")
            known = first.setdefault(scan.subject, scan)
            for column in ("sex", "diagnosis", "split"):
                values = (getattr(known, column), getattr(scan, column))
                if values[0] != values[1]:
                    raise ValueError(f"{scan.subject}: {column} must be the same in all scans, got {values}; mend the table.")

    @property
    def num_subjects(self) -> int:
        """Number of different subjects among the scans."""
        return len({scan.subject for scan in self.scans})

    def select(self, predicate: Callable[[Scan], bool]) -> "Manifest":
        """The same manifest with only the scans for which ``predicate`` is true; all problems stay."""
        return replace(self, scans=tuple(scan for scan in self.scans if predicate(scan)))

    def healthy(self) -> "Manifest":
        """The scans of subjects whose diagnosis is "control"."""
        return self.select(lambda scan: scan.diagnosis == "control")

    def problem_counts(self) -> dict[str, int]:
        """Number of problems by kind, in alphabetical order: this is all that may leave the site."""
        return dict(sorted(Counter(problem.kind for problem in self.problems).items()))


class UnusableScansError(ValueError):
    """Too many of a site's scans cannot be used; the text holds counts only and may leave the site."""


def check_problem_share(manifest: Manifest, max_share: float = MAX_UNUSABLE) -> None:
    """Stop when too many of the scans a site lists cannot be used.

    A site lists the scans of its manifest and those that a problem of an unusable kind kept out of it. The message
    holds counts only: no subject, no path.

    Raises:
        UnusableScansError: No scan is left, or more than ``max_share`` of the listed scans are unusable.
    """
    counts = {kind: count for kind, count in manifest.problem_counts().items() if kind in UNUSABLE_KINDS}
    num_unusable = sum(counts.values())
    num_listed = len(manifest.scans) + num_unusable
    if manifest.scans and num_unusable <= max_share * num_listed:
        return
    by_kind = "".join(f", {kind} {count}" for kind, count in counts.items())
    raise UnusableScansError(
        f"site {manifest.site!r}: unusable scans must be at most {max_share:.0%} of those listed and leave at least "
        f"one, got {num_unusable} of {num_listed}{by_kind}. See the site's local log for their names, then mend or "
        "unlist them, or allow more with data.max_unusable of the run and max_unusable of the site's own policy."
    )


def split_by_subject(
    manifest: Manifest, *, split_seed: int = 0, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
) -> dict[str, Manifest]:
    """Split one site's scans into train, val and test, so that no subject is in two of them.

    Within each diagnosis the subjects are ranked by a SHA-256 of (split_seed, site, diagnosis, subject) and cut at the
    fractions: the order of rows does not matter, and a subject added later moves few others. A diagnosis with three
    subjects or more is in every split whose fraction is not 0.

    Args:
        manifest: The scans of one site.
        split_seed: Another seed gives another split.
        fractions: Shares of the subjects in train, val and test; their sum is 1.

    Returns:
        A manifest for each of "train", "val" and "test"; problems stay with the manifest that was split.
    """
    if min(fractions) < 0.0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(f"split_by_subject: fractions must be at least 0 and sum to 1, got {fractions}.")
    told = {scan.subject: scan.split for scan in manifest.scans}
    free = [scan for scan in manifest.scans if scan.split is None]
    split_of: dict[str, str] = {subject: split for subject, split in told.items() if split is not None}
    split_of |= _cut(free, manifest.site, split_seed, fractions)
    if "val" not in told.values() and fractions[0] + fractions[1] > 0.0:
        in_train = [scan for scan in manifest.scans if scan.split == "train"]
        share = fractions[0] / (fractions[0] + fractions[1])
        split_of |= _cut(in_train, manifest.site, split_seed, (share, 1.0 - share, 0.0))
    return {
        name: Manifest(manifest.site, tuple(scan for scan in manifest.scans if split_of[scan.subject] == name)) for name in SPLITS
    }


def _cut(scans: Iterable[Scan], site: str, split_seed: int, fractions: tuple[float, float, float]) -> dict[str, str]:
    """The split of each subject of some scans."""
    strata: dict[str | None, set[str]] = {}
    for scan in scans:
        strata.setdefault(scan.diagnosis, set()).add(scan.subject)
    split_of: dict[str, str] = {}
    for diagnosis, subjects in strata.items():
        ranked = sorted(subjects, key=lambda subject: _digest(split_seed, site, diagnosis, subject))
        sizes = _split_sizes(len(ranked), fractions)
        names = [name for name, size in zip(SPLITS, sizes, strict=True) for _ in range(size)]
        split_of.update(zip(ranked, names, strict=True))
    return split_of


def _digest(*parts: int | str | None) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _split_sizes(num_subjects: int, fractions: tuple[float, ...]) -> list[int]:
    """Whole numbers nearest to the fractions (largest remainder first), none 0 where there are subjects enough.

    >>> _split_sizes(10, (0.6, 0.2, 0.2)), _split_sizes(3, (0.6, 0.2, 0.2)), _split_sizes(1, (0.6, 0.2, 0.2))
    ([6, 2, 2], [1, 1, 1], [1, 0, 0])
    """
    sizes = [math.floor(num_subjects * fraction) for fraction in fractions]
    by_remainder = sorted(range(len(sizes)), key=lambda i: sizes[i] - num_subjects * fractions[i])
    for i in by_remainder[: num_subjects - sum(sizes)]:
        sizes[i] += 1
    wanted = [i for i, fraction in enumerate(fractions) if fraction > 0.0]
    if num_subjects >= len(wanted):
        for i in wanted:
            if sizes[i] == 0:
                sizes[sizes.index(max(sizes))] -= 1
                sizes[i] = 1
    return sizes
