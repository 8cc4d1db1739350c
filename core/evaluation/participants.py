"""Who takes part in a figure: healthy, at which sites, in which split, in which class.

Shapes: N scans.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import SplineTransformer

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import NotEvaluableError
from core.evaluation.outcomes import Notes

Attribute = Literal["site", "scanner"]

MIN_TRAIN_SUBJECTS = 5
MIN_HELD_OUT_SUBJECTS = 5


def healthy_scans(embeddings: Embeddings, notes: Notes) -> Embeddings:
    """Controls only, since diagnosis would confound site and age; all scans where no diagnosis is known at all."""
    if (embeddings.diagnosis == "").all():
        notes.add("no scan has a diagnosis, all are taken as healthy for site, scanner and age")
        return embeddings
    unknown = int((embeddings.diagnosis == "").sum())
    if unknown:
        notes.add(f"{unknown} scans of unknown diagnosis take no part in site, scanner and age")
    return embeddings.select(embeddings.diagnosis == "control")


def healthy_with_age(embeddings: Embeddings, notes: Notes) -> Embeddings:
    """Healthy scans whose age is known."""
    healthy = healthy_scans(embeddings, notes)
    with_age = np.isfinite(healthy.age_years)
    if not with_age.all():
        notes.add(f"age: {(~with_age).sum()} healthy scans without an age take no part")
    return healthy.select(with_age)


def at_sites(embeddings: Embeddings, names: Collection[str] | None) -> npt.NDArray[np.bool_]:
    """(N,) whether a scan is of one of these sites; of any when there are no names."""
    return np.full(len(embeddings), True) if names is None else np.isin(embeddings.site, sorted(names))


def train_test(embeddings: Embeddings) -> tuple[Embeddings, Embeddings]:
    """The scans of split train, and those of split test."""
    return embeddings.select(embeddings.split == "train"), embeddings.select(embeddings.split == "test")


def num_subjects(embeddings: Embeddings) -> int:
    """Different subjects behind the scans."""
    return len(np.unique(embeddings.subjects))


def labels_of(embeddings: Embeddings, attribute: Attribute) -> npt.NDArray[np.str_]:
    """(N,) the site, or the scanner within its site."""
    if attribute == "site":
        return embeddings.site
    return np.array([f"{site} / {scanner}" for site, scanner in zip(embeddings.site, embeddings.scanner, strict=True)])


def check_scanners(embeddings: Embeddings, notes: Notes) -> None:
    """Refuse scanners that are the sites under another name, and say which have no name."""
    sites_without = sorted(set(embeddings.site[embeddings.scanner == ""].tolist()))
    if sites_without:
        notes.add(f"scanner: unnamed scanners count as one a site at {', '.join(sites_without)}")
    if len(np.unique(labels_of(embeddings, "scanner"))) == len(np.unique(embeddings.site)):
        raise NotEvaluableError("scanner: a site must have two scanners to tell them from sites, got 1 at each.")


def site_classes(embeddings: Embeddings, attribute: Attribute, notes: Notes) -> tuple[Embeddings, Embeddings, list[str]]:
    """Train and test scans of the sites or scanners that take part in a probe fitted on train, and their names.

    Raises:
        NotEvaluableError: Fewer than 2 classes with 5 train subjects and 1 test subject, or scanners that are the sites.
    """
    label_N = labels_of(embeddings, attribute)
    if attribute == "scanner":
        check_scanners(embeddings, notes)
    classes, small = [], []
    for name in np.unique(label_N).tolist():
        num_train, num_test = (num_subjects(part) for part in train_test(embeddings.select(label_N == name)))
        if num_train >= MIN_TRAIN_SUBJECTS and num_test >= 1:
            classes.append(name)
        else:
            small.append(f"{name} ({num_train} train, {num_test} test)")
    if small:
        notes.add(
            f"{attribute}: left out for fewer than {MIN_TRAIN_SUBJECTS} train subjects or no test subject: {', '.join(small)}"
        )
    if len(classes) < 2:
        raise NotEvaluableError(
            f"{attribute}: {attribute}s with at least {MIN_TRAIN_SUBJECTS} train subjects and 1 test subject must be "
            f"at least 2, got {classes!r}."
        )
    return *train_test(embeddings.select(np.isin(label_N, classes))), classes


def held_out_classes(embeddings: Embeddings, attribute: Attribute, notes: Notes) -> tuple[Embeddings, list[str]]:
    """Test scans of the sites or scanners with 5 held-out subjects, and their names.

    Raises:
        NotEvaluableError: Fewer than 2 such classes, or scanners that are the sites.
    """
    if attribute == "scanner":
        check_scanners(embeddings, notes)
    _, test = train_test(embeddings)
    label_N = labels_of(test, attribute)
    size_of = {name: num_subjects(test.select(label_N == name)) for name in np.unique(label_N).tolist()}
    classes = [name for name, size in size_of.items() if size >= MIN_HELD_OUT_SUBJECTS]
    small = [f"{name} ({size})" for name, size in size_of.items() if size < MIN_HELD_OUT_SUBJECTS]
    if small:
        notes.add(
            f"{attribute}: left out of what held-out subjects alone tell for fewer than {MIN_HELD_OUT_SUBJECTS} of them: "
            f"{', '.join(small)}"
        )
    if len(classes) < 2:
        raise NotEvaluableError(
            f"{attribute}: {attribute}s with at least {MIN_HELD_OUT_SUBJECTS} test subjects must be at least 2, got {classes!r}."
        )
    return test.select(np.isin(label_N, classes)), classes


def age_and_sex(embeddings: Embeddings) -> Embeddings:
    """The same scans with a cubic spline of age, and sex, in place of h."""
    age_N1 = embeddings.age_years[:, None]
    male_N1 = (embeddings.sex == "M").astype(np.float64)[:, None]
    columns = [male_N1]
    train_age = age_N1[embeddings.split == "train"]
    if len(train_age) and train_age.min() < train_age.max():
        spline = SplineTransformer(n_knots=5, degree=3, include_bias=False, extrapolation="constant").fit(train_age)
        columns.append(spline.transform(age_N1))
    return replace(embeddings, h_NF=np.hstack(columns).astype(np.float32))
