"""What a fine-tuned model says of held-out scans: the table of it, and the figures by which it is judged.

Figures are of subjects: the scores of a subject's scans are averaged first. Whatever is chosen after training, which is the
score from which on a finding counts as told, is chosen on `val`; everything is scored on `test`.

Shapes: N scans, L labels, K scores, M rows of a subject and a label, S subjects, R resamples, C classes, B bins.
"""

import csv
import hmac
import io
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from core.checkpoint import write_atomically
from core.data.site import SiteData
from core.evaluation.intervals import MAX_UNDEFINED_SHARE, Evaluation, NotEvaluableError
from core.evaluation.outcomes import Floats, Ints, Notes, Results
from core.evaluation.sums import mean_of_shares
from core.targets import Target

SPLITS = ("val", "test")
SEX_WORDS = {"F": "female", "M": "male"}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
NUM_BINS = 10
MIN_BIN_SUBJECTS = 5
EVEN_ODDS = 0.5
WEIGHTS_AT_ONCE = 2_000_000

Statistic = Callable[[Floats], Floats]
"""(R, M) how often each row is counted -> (R,) the figure of each such sample, nan where it is undefined."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Scores of N scans beside what is known about them; it leaves a site only where results of single scans may.

    Attributes:
        target: What is told.
        values_NL: (N, L) float64 as `Target.values` gives them, nan where unknown.
        scores_NK: (N, K) float64 as `Target.scores` gives them: probabilities, or the number in its unit.
        subject: (N,) int or text; with `site` it names a subject.
        site: (N,) text, not empty.
        sex: (N,) "F", "M" or "" for unknown.
        split: (N,) "val" or "test"; all scans of a subject are in one.

    Raises:
        ValueError: A wrong shape, dtype or value, or a subject in two splits; the text holds counts only.
    """

    target: Target
    values_NL: Floats
    scores_NK: Floats
    subject: npt.NDArray[Any]
    site: npt.NDArray[np.str_]
    sex: npt.NDArray[np.str_]
    split: npt.NDArray[np.str_]

    def __post_init__(self) -> None:
        num_scans = len(self.site)
        for name, width in (("values_NL", len(self.target.labels)), ("scores_NK", self.target.num_outputs)):
            table = getattr(self, name)
            if table.shape != (num_scans, width) or table.dtype != np.float64:
                raise ValueError(
                    f"Predictions: {name} must be float64 of shape {(num_scans, width)}, got {(table.dtype.name, table.shape)!r}."
                )
        for name in _COLUMNS:
            column = getattr(self, name)
            if column.shape != (num_scans,) or column.dtype.kind not in ("iuU" if name == "subject" else "U"):
                raise ValueError(
                    f"Predictions: {name} must be one text for each of the {num_scans} scans, "
                    f"got {(column.dtype.name, column.shape)!r}."
                )
        classes = len(self.target.names)
        is_class_NL = np.isin(self.values_NL, range(classes)) if classes else np.isfinite(self.values_NL)
        is_score_NK = np.isfinite(self.scores_NK) & (not classes or (self.scores_NK >= 0) & (self.scores_NK <= 1))
        kind = f"a class from 0 to {classes - 1}" if classes else "finite"
        for name, right_N, constraint in (
            ("values_NL", (is_class_NL | np.isnan(self.values_NL)).all(axis=1), f"{kind}, or nan"),
            ("scores_NK", is_score_NK.all(axis=1), "probabilities" if classes else "finite"),
            ("site", self.site != "", "a text that is not empty"),
            ("sex", np.isin(self.sex, (*SEX_WORDS, "")), "F, M or empty"),
            ("split", np.isin(self.split, SPLITS), "val or test"),
        ):
            if not right_N.all():
                wrong = int((~right_N).sum())
                raise ValueError(f"Predictions: {name} must be {constraint}, got {wrong!r} of {num_scans} scans that are not.")
        in_both = np.intersect1d(*(self.subjects[self.split == split] for split in SPLITS))
        if len(in_both):
            raise ValueError(f"Predictions: a subject must be in one split, got {len(in_both)!r} in both; split by subject.")

    def __len__(self) -> int:
        return len(self.site)

    @property
    def subjects(self) -> Ints:
        """(N,) int that is unique to a subject across sites."""
        codes_2N = np.stack([np.unique(column, return_inverse=True)[1] for column in (self.site, self.subject)])
        return np.unique(codes_2N, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def select(self, mask: npt.NDArray[Any]) -> "Predictions":
        """The scans of an (N,) boolean mask, or of an array of indices."""
        columns = ("values_NL", "scores_NK", *_COLUMNS)
        return Predictions(target=self.target, **{name: getattr(self, name)[mask] for name in columns})

    @classmethod
    def concatenate(cls, parts: Sequence["Predictions"]) -> Self:
        """One table from several, in their order, say one a site.

        Raises:
            ValueError: No part, or parts of different targets.
        """
        if len({part.target for part in parts}) != 1:
            raise ValueError(
                f"Predictions.concatenate: parts must be of one target, got {len({part.target for part in parts})!r} targets."
            )
        columns = ("values_NL", "scores_NK", *_COLUMNS)
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}
        return cls(target=parts[0].target, **joined)

    @classmethod
    def of(cls, data: SiteData, target: Target, scores_NK: Floats, split: str) -> Self:
        """The scores of a site's scans of one split, in their order, beside what is known of them."""
        return cls(
            target=target,
            values_NL=target.values(data.scans).numpy(),
            scores_NK=scores_NK,
            subject=np.array([scan.subject for scan in data.scans], dtype=np.str_),
            site=np.array([data.site] * len(data), dtype=np.str_),
            sex=np.array([scan.sex or "" for scan in data.scans], dtype=np.str_),
            split=np.array([split] * len(data), dtype=np.str_),
        )

    def save(self, path: Path) -> None:
        """Write the columns as an .npz, whole or not at all; the target is told apart."""
        memory = io.BytesIO()
        np.savez_compressed(memory, **{name: value for name, value in vars(self).items() if name != "target"})
        write_atomically(path, memory.getvalue())

    @classmethod
    def load(cls, path: Path, target: Target) -> Self:
        """Read the columns that were saved."""
        with np.load(path, allow_pickle=False) as columns:
            return cls(target=target, **dict(columns))

    def write_csv(self, path: Path, key: bytes, *, known_sites: Collection[str] | None = None) -> None:
        """Write a row a scan, whole or not at all, with a pseudonym in place of the subject; UTF-8, lines end as RFC 4180 says.

        The pseudonym is the first 12 hexadecimal digits of HMAC-SHA256 of ``site/subject``: who has the key can find a subject
        again, nobody else. A text that a spreadsheet would take for a formula has a ' before it (OWASP, CSV Injection).

        Args:
            path: Of the file.
            key: Secret of the site or the run, not empty.
            known_sites: As in `evaluate_predictions`.
        """
        if not key:
            raise ValueError("Predictions.write_csv: key must be some secret bytes, got none. Make one with secrets.token_bytes.")
        target = self.target
        thresholds_L, _ = operating_points(self, known_sites=known_sites)
        told_NL = _told(target, self.scores_NK, thresholds_L)
        told_names = target.names if target.kind == "multiclass" else target.names[1:]
        headings = ["pseudonym", "site", "split", "sex", *(f"true {label}" for label in target.labels)]
        headings += [f"probability of {label}={name}" for label in target.labels for name in told_names]
        headings += [f"predicted {label}" for label in target.labels]
        content = io.StringIO(newline="")
        writer = csv.writer(content)
        writer.writerow(map(_text, headings))
        for n in range(len(self)):
            site, subject = str(self.site[n]), str(self.subject[n])
            row = [_pseudonym(key, site, subject), _text(site), str(self.split[n]), str(self.sex[n])]
            row += [_cell(target, value) for value in self.values_NL[n]]
            row += [f"{score:.6g}" for score in self.scores_NK[n] if target.names]
            writer.writerow(row + [_cell(target, value) for value in told_NL[n]])
        write_atomically(path, content.getvalue().encode())


_COLUMNS = ("subject", "site", "sex", "split")


def _pseudonym(key: bytes, site: str, subject: str) -> str:
    return hmac.digest(key, f"{site}/{subject}".encode(), "sha256").hex()[:12]


def _text(cell: str) -> str:
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell


def _cell(target: Target, value: float) -> str:
    if math.isnan(value):
        return ""
    return _text(target.names[int(value)]) if target.names else f"{value:.6g}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What figures are of: a row for each subject and label; two where a subject's scans are of two classes.

    Attributes:
        label_M: (M,) number of the label.
        truth_M: (M,) class or number.
        score_MK: (M, K) mean score of the scans; (M, 1) that of the label with multilabel.
        subject_M: (M,) int that is unique to a subject.
        site_M: (M,) site names.
        sex_M: (M,) "F", "M" or "".
    """

    label_M: Ints
    truth_M: Floats
    score_MK: Floats
    subject_M: Ints
    site_M: npt.NDArray[np.str_]
    sex_M: npt.NDArray[np.str_]

    def select(self, mask_M: npt.NDArray[np.bool_]) -> "Rows":
        """The rows of a mask."""
        return Rows(**{field.name: getattr(self, field.name)[mask_M] for field in fields(self)})

    @property
    def num_subjects(self) -> int:
        """Different subjects behind the rows."""
        return len(np.unique(self.subject_M))


def subject_rows(predictions: Predictions, split: str, sites: Collection[str] | None = None) -> Rows:
    """The scans of one split whose label is known, averaged by subject, at some sites or at all."""
    target = predictions.target
    subject_N = predictions.subjects
    wanted_N = predictions.split == split
    if sites is not None:
        wanted_N &= np.isin(predictions.site, sorted(sites))
    parts = []
    for label in range(len(target.labels)):
        at_n = np.flatnonzero(wanted_N & ~np.isnan(predictions.values_NL[:, label]))
        value_n = predictions.values_NL[at_n, label]
        key_2n = np.stack([subject_N[at_n], value_n if target.names else np.zeros(len(at_n))])
        _, first_M, row_n = np.unique(key_2n, axis=1, return_index=True, return_inverse=True)
        score_nk = predictions.scores_NK[at_n][:, [label] if target.kind == "multilabel" else slice(None)]
        sum_MK = np.zeros((len(first_M), 1 + score_nk.shape[1]))
        np.add.at(sum_MK, row_n.reshape(-1), np.column_stack([value_n, score_nk]))
        mean_MK = sum_MK / np.bincount(row_n.reshape(-1), minlength=len(first_M))[:, None]
        first_M = at_n[first_M]
        parts.append(
            Rows(
                label_M=np.full(len(first_M), label),
                truth_M=mean_MK[:, 0],
                score_MK=mean_MK[:, 1:],
                subject_M=subject_N[first_M],
                site_M=predictions.site[first_M],
                sex_M=predictions.sex[first_M],
            )
        )
    return Rows(**{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Rows)})


def operating_points(predictions: Predictions, *, known_sites: Collection[str] | None = None) -> tuple[Floats, list[str]]:
    """(L,) the score from which on each label counts as positive, and why it is 0.5 where `val` cannot choose it.

    That score of a `val` subject at the known sites which maximises sensitivity + specificity - 1 (Youden 1950, Cancer 3, 32-35);
    the highest of several. (0,) with several classes, of which the most probable is told, and with numbers.
    """
    target = predictions.target
    if target.kind not in ("binary", "multilabel"):
        return np.empty(0), []
    rows = subject_rows(predictions, "val", known_sites)
    thresholds_L = np.full(len(target.labels), EVEN_ODDS)
    no_choice: dict[str, list[str]] = {}
    for number, label in enumerate(target.labels):
        of_label = rows.label_M == number
        score_m, positive_m = rows.score_MK[of_label, 0], rows.truth_M[of_label] == 1
        positives, negatives = int(positive_m.sum()), int((~positive_m).sum())
        if not positives or not negatives:
            no_choice.setdefault("val has not both classes", []).append(label)
            continue
        levels = np.unique(score_m)[::-1]
        found = np.searchsorted(np.sort(-score_m[positive_m]), -levels, side="right")
        false = np.searchsorted(np.sort(-score_m[~positive_m]), -levels, side="right")
        # In whole numbers, so that equals are equal.
        youden = found * negatives - false * positives
        if youden.max() > 0:
            thresholds_L[number] = levels[int(youden.argmax())]
        else:
            no_choice.setdefault("no score of val tells its classes apart", []).append(label)
    return thresholds_L, [f"{', '.join(labels)}: {why}, so the operating point is 0.5" for why, labels in no_choice.items()]


def _told(target: Target, score_NK: Floats, thresholds_L: Floats) -> Floats:
    """(N, L) the class at the operating point, the most probable one, or the number."""
    if target.kind == "regression":
        return score_NK
    told_NL = score_NK.argmax(axis=1)[:, None] if target.kind == "multiclass" else score_NK >= thresholds_L
    return np.asarray(told_NL, dtype=np.float64)


def confusion(predictions: Predictions, *, known_sites: Collection[str] | None = None) -> Ints:
    """(L, C, C) test subjects at the known sites by true and by told class, at the operating point."""
    target = predictions.target
    classes = len(target.names)
    thresholds_L, _ = operating_points(predictions, known_sites=known_sites)
    rows = subject_rows(predictions, "test", known_sites)
    told_M = _told(target, rows.score_MK, thresholds_L[rows.label_M][:, None] if len(thresholds_L) else thresholds_L)[:, 0]
    place_M = (rows.label_M * classes + rows.truth_M.astype(np.int64)) * classes + told_M.astype(np.int64)
    return np.bincount(place_M, minlength=len(target.labels) * classes**2).reshape(-1, classes, classes)


class ReliabilityBin(NamedTuple):
    """Rows of like score: the mean score, how often it came true with its 95 % Wilson interval, and how many they are."""

    mean_score: float
    frequency: float
    low: float
    high: float
    size: int


def reliability(predictions: Predictions, bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """How often what is told with a score comes true, in bins of about as many test subjects, by score.

    Of the positive class, of all findings together, or of the most probable class. A bin of fewer than 5 subjects is joined to
    the smaller neighbour; the intervals take rows as independent, which the findings of one subject are not.

    Raises:
        ValueError: A target without classes.
    """
    if not predictions.target.names:
        raise ValueError("reliability: the target must have classes, got regression. Its calibration_slope tells as much.")
    rows = subject_rows(predictions, "test")
    true_M, score_M = _told_and_true(predictions.target, rows)
    if not len(score_M):
        return []
    bin_M = _bins(score_M, bins)
    groups = [np.flatnonzero(bin_M == number) for number in np.unique(bin_M)]

    def size(place: int) -> int:
        return len(np.unique(rows.subject_M[groups[place]]))

    while len(groups) > 1 and size(small := min(range(len(groups)), key=size)) < MIN_BIN_SUBJECTS:
        near = min((place for place in (small - 1, small + 1) if 0 <= place < len(groups)), key=size)
        first, second = sorted((small, near))
        groups[first : second + 1] = [np.concatenate([groups[first], groups[second]])]
    if size(0) < MIN_BIN_SUBJECTS:
        return []
    found = []
    for group in groups:
        hits, total = (torch.tensor([float(count)], dtype=torch.float64) for count in (true_M[group].sum(), len(group)))
        found.append(ReliabilityBin(float(score_M[group].mean()), *mean_of_shares(hits, total), len(group)))
    return found


def _told_and_true(target: Target, rows: Rows) -> tuple[Floats, Floats]:
    """(M,) whether it came true, 0 or 1, and (M,) the score of it."""
    if target.kind == "multiclass":
        return (rows.score_MK.argmax(axis=1) == rows.truth_M).astype(np.float64), rows.score_MK.max(axis=1)
    return rows.truth_M, rows.score_MK[:, 0]


def _bins(score_M: Floats, bins: int) -> Ints:
    """(M,) the bin of each score, between quantiles of the scores; equal scores are in one bin."""
    return np.searchsorted(np.quantile(score_M, np.linspace(0, 1, bins + 1)[1:-1]), score_M)


# Figures as functions of how often each row is counted: a resample is a row of weights, and all are computed at once.


def _share(hit_M: npt.NDArray[Any], of_M: npt.NDArray[Any]) -> Statistic:
    """Weighted mean of `hit` over the rows `of`."""
    among_M = of_M.astype(np.float64)
    return lambda weight_RM: (weight_RM @ (hit_M * among_M)) / (weight_RM @ among_M)


def _mean(value_M: Floats) -> Statistic:
    return _share(value_M, np.ones(len(value_M)))


def _mean_of(statistics: Sequence[Statistic], *, at_least: int = 1) -> Statistic:
    """Mean of those that are defined; nan where they are fewer than `at_least`."""

    def statistic(weight_RM: Floats) -> Floats:
        value_RF = np.column_stack([np.full(len(weight_RM), np.nan), *(of(weight_RM) for of in statistics)])
        defined_R = np.isfinite(value_RF).sum(axis=1)
        return np.where(defined_R >= at_least, np.nansum(value_RF, axis=1) / np.maximum(defined_R, 1), np.nan)

    return statistic


def _area(positive_M: npt.NDArray[np.bool_], score_M: Floats, of_M: npt.NDArray[np.bool_]) -> Statistic:
    """Share of (positive, negative) pairs among the rows `of` in the right order, ties half."""
    positives, negatives = np.flatnonzero(of_M & positive_M), np.flatnonzero(of_M & ~positive_M)
    negatives = negatives[np.argsort(score_M[negatives], kind="stable")]
    below, not_above = (np.searchsorted(score_M[negatives], score_M[positives], side=side) for side in ("left", "right"))

    def statistic(weight_RM: Floats) -> Floats:
        lower_RN = np.pad(weight_RM[:, negatives].cumsum(axis=1), ((0, 0), (1, 0)))
        won_R = (weight_RM[:, positives] * (lower_RN[:, below] + lower_RN[:, not_above])).sum(axis=1) / 2
        return np.asarray(won_R / (weight_RM[:, positives].sum(axis=1) * lower_RN[:, -1]))

    return statistic


def _average_precision(positive_M: npt.NDArray[np.bool_], score_M: Floats) -> Statistic:
    """Mean over positives of the share of positives among rows with at least their score; nan without both classes."""
    order_M = np.argsort(-score_M, kind="stable")
    last_M = np.searchsorted(-score_M[order_M], -score_M[order_M], side="right") - 1
    found_M = positive_M[order_M].astype(np.float64)

    def statistic(weight_RM: Floats) -> Floats:
        sorted_RM = weight_RM[:, order_M]
        found_RM, told_RM = (sorted_RM * found_M).cumsum(axis=1), sorted_RM.cumsum(axis=1)
        precision_RM = found_RM[:, last_M] / np.maximum(told_RM[:, last_M], 1)
        precision_R = (sorted_RM * found_M * precision_RM).sum(axis=1) / found_RM[:, -1]
        return np.asarray(np.where(found_RM[:, -1] < told_RM[:, -1], precision_R, np.nan))

    return statistic


def _mean_recall(truth_M: Floats, told_M: Floats, of_M: npt.NDArray[np.bool_]) -> Statistic:
    """Balanced accuracy of the rows `of`: mean recall over the classes that a sample has; nan when there is only one."""
    recalls = [_share(told_M == value, of_M & (truth_M == value)) for value in np.unique(truth_M[of_M])]
    return _mean_of(recalls, at_least=2)


def _calibration_error(true_M: Floats, score_M: Floats) -> Statistic:
    """Expected calibration error: distance of score and truth in a bin, mean over bins by weight (Naeini et al. 2015, AAAI).

    Ten bins between quantiles of the scores of all rows, which is less biased with few subjects than equal widths, of which some
    are nearly empty (Roelofs et al. 2022, arXiv:2012.08668). Few subjects make it too large all the same.
    """
    bin_M = _bins(score_M, NUM_BINS)
    excess_MB = (score_M - true_M)[:, None] * (bin_M[:, None] == np.unique(bin_M))
    return lambda weight_RM: np.abs(weight_RM @ excess_MB).sum(axis=1) / weight_RM.sum(axis=1)


def _of_number(truth_M: Floats, score_M: Floats) -> dict[str, Statistic]:
    """Mean absolute and root mean squared error, R2, correlation, and the slope of the truth on what is predicted."""
    # From a value among them: sums of squares are exactly 0 where nothing varies.
    true_M, told_M = (column_M - np.sort(column_M)[len(column_M) // 2] for column_M in (truth_M, score_M))
    square_M = np.square(truth_M - score_M)

    def spread(first_M: Floats, second_M: Floats, weight_RM: Floats) -> Floats:
        product_R = weight_RM @ (first_M * second_M)
        spread_R = product_R - (weight_RM @ first_M) * (weight_RM @ second_M) / weight_RM.sum(axis=1)
        return spread_R if first_M is not second_M else np.where(spread_R > 1e-12 * product_R, spread_R, np.nan)

    def correlation(weight_RM: Floats) -> Floats:
        scale_R = np.sqrt(spread(true_M, true_M, weight_RM)) * np.sqrt(spread(told_M, told_M, weight_RM))
        return np.asarray(np.clip(spread(true_M, told_M, weight_RM) / scale_R, -1, 1))

    return {
        "mae": _mean(np.abs(truth_M - score_M)),
        "rmse": lambda weight_RM: np.sqrt(_mean(square_M)(weight_RM)),
        "r2": lambda weight_RM: 1 - weight_RM @ square_M / spread(true_M, true_M, weight_RM),
        "pearson": correlation,
        "calibration_slope": lambda w_RM: spread(true_M, told_M, w_RM) / spread(told_M, told_M, w_RM),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Figure:
    task: str
    metric: str
    statistic: Statistic
    num_subjects: int


def _figures(target: Target, rows: Rows, thresholds_L: Floats) -> tuple[list[_Figure], list[str]]:
    """All figures of these rows, and what had to be left out of some."""
    truth_M, score_M, remarks = rows.truth_M, rows.score_MK[:, 0], []
    every_M = np.full(len(truth_M), True)
    statistics: dict[str, Statistic]
    single = []
    if target.kind == "regression":
        statistics = _of_number(truth_M, score_M)
    elif target.kind == "binary":
        positive_M, told_M = truth_M == 1, score_M >= thresholds_L[0]
        statistics = {
            "auc": _area(positive_M, score_M, every_M),
            "average_precision": _average_precision(positive_M, score_M),
            "balanced_accuracy": _mean_recall(truth_M, told_M.astype(np.float64), every_M),
            "accuracy": _mean((positive_M == told_M).astype(np.float64)),
            "sensitivity": _share(told_M, positive_M),
            "specificity": _share(~told_M, ~positive_M),
            "brier": _mean(np.square(score_M - truth_M)),
            "ece": _calibration_error(truth_M, score_M),
        }
    elif target.kind == "multiclass":
        present = [number for number in range(len(target.names)) if 0 < (truth_M == number).sum() < len(truth_M)]
        absent = [name for number, name in enumerate(target.names) if number not in present]
        if present and absent:
            remarks.append(f"no subject is {' or '.join(absent)}, which the mean of AUCs leaves out")
        true_M, confidence_M = _told_and_true(target, rows)
        told_M = rows.score_MK.argmax(axis=1).astype(np.float64)
        statistics = {
            "auc": _mean_of([_area(truth_M == number, rows.score_MK[:, number], every_M) for number in present]),
            "balanced_accuracy": _mean_recall(truth_M, told_M, every_M),
            "accuracy": _mean(true_M),
            "ece": _calibration_error(true_M, confidence_M),
        }
    else:
        told_M = (score_M >= thresholds_L[rows.label_M]).astype(np.float64)
        of_labels = {label: rows.label_M == number for number, label in enumerate(target.labels)}
        both = {label: of_M for label, of_M in of_labels.items() if len(np.unique(truth_M[of_M])) == 2}
        areas = {label: _area(truth_M == 1, score_M, of_M) for label, of_M in both.items()}
        if both and len(both) < len(of_labels):
            alone = [label for label in of_labels if label not in both]
            remarks.append(f"{', '.join(alone)}: subjects are of one class only, which means leave out")
        statistics = {
            "auc": _mean_of(list(areas.values())),
            "balanced_accuracy": _mean_of([_mean_recall(truth_M, told_M, of_M) for of_M in both.values()]),
        }
        single = [
            _Figure(task=label, metric="auc", statistic=areas[label], num_subjects=rows.select(of_M).num_subjects)
            for label, of_M in both.items()
        ]
    of_task = [
        _Figure(task=target.task, metric=metric, statistic=statistic, num_subjects=rows.num_subjects)
        for metric, statistic in statistics.items()
    ]
    return of_task + single, remarks


def _intervals(
    rows: Rows, statistics: Sequence[Statistic], *, num_resamples: int, seed: int
) -> list[tuple[float, float, float] | NotEvaluableError]:
    """What `intervals.subject_bootstrap` gives for each statistic: the same resamples, drawn once, many at a time."""
    subjects, subject_M = np.unique(rows.subject_M, return_inverse=True)
    if len(subjects) < 2:
        few = NotEvaluableError(f"subjects must be at least 2 for an interval, got {len(subjects)!r}")
        return [few for _ in statistics]
    random = np.random.default_rng(seed)
    max_undefined = int(MAX_UNDEFINED_SHARE * num_resamples)
    drawn = num_resamples + max_undefined
    at_once = max(1, WEIGHTS_AT_ONCE // len(subject_M))
    parts = [[statistic(np.ones((1, len(subject_M))))] for statistic in statistics]
    for start in range(0, drawn, at_once):
        size = min(at_once, drawn - start)
        drawn_RS = random.integers(len(subjects), size=(size, len(subjects))) + len(subjects) * np.arange(size)[:, None]
        count_RS = np.bincount(drawn_RS.ravel(), minlength=size * len(subjects)).reshape(size, -1).astype(np.float64)
        weight_RM = count_RS[:, subject_M]
        for values, statistic in zip(parts, statistics, strict=True):
            values.append(statistic(weight_RM))
    found: list[tuple[float, float, float] | NotEvaluableError] = []
    for values in parts:
        (value,), resampled_R = values[0], np.concatenate(values[1:])
        defined_R = resampled_R[np.isfinite(resampled_R)][:num_resamples]
        if not math.isfinite(value):
            found.append(NotEvaluableError("it needs subjects of every class, or values that vary"))
        elif len(defined_R) < num_resamples:
            found.append(NotEvaluableError(f"more than {MAX_UNDEFINED_SHARE:.0%} of the resamples lack a class or do not vary"))
        else:
            low, high = np.quantile(defined_R, [0.025, 0.975])
            found.append((float(value), float(low), float(high)))
    return found


MAIN_FIGURE = {"binary": ("auc", True), "multiclass": ("auc", True), "multilabel": ("auc", True), "regression": ("mae", False)}
"""What a kind of target is compared by, and whether more of it is better."""


def resampled_figure(predictions: Predictions, *, sites: Collection[str], num_resamples: int, seed: int) -> Floats:
    """The main figure of some sites' test subjects, then that of each resample of them, (1 + R,); nan where it is undefined.

    With the same seed, predictions of the same subjects have the same resamples.
    """
    rows = subject_rows(predictions, "test", sites)
    metric, _ = MAIN_FIGURE[predictions.target.kind]
    figures, _ = _figures(predictions.target, rows, np.full(len(predictions.target.labels), EVEN_ODDS))
    [statistic] = [found.statistic for found in figures if (found.task, found.metric) == (predictions.target.task, metric)]
    subjects, subject_M = np.unique(rows.subject_M, return_inverse=True)
    random = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = [statistic(np.ones((1, len(subject_M))))]
        for _ in range(num_resamples):
            count_S = np.bincount(random.integers(len(subjects), size=len(subjects)), minlength=len(subjects))
            values.append(statistic(count_S[None, subject_M].astype(np.float64)))
    return np.concatenate(values)


def evaluate_predictions(
    predictions: Predictions,
    *,
    stage: str,
    regime: str,
    seed: int,
    known_sites: Collection[str] | None = None,
    num_resamples: int = 1000,
) -> Results:
    """How good predictions of test subjects are, with 95 % subject-bootstrap intervals, and notes on what has no value.

    Of two classes: `auc`, `average_precision`, `brier`, `ece`, and at the operating point (see `operating_points`)
    `balanced_accuracy`, `accuracy`, `sensitivity` and `specificity`. Of several: `auc` (each class against the rest, mean over
    classes), `balanced_accuracy`, `accuracy`, `ece` of the class that is told. Of findings: `auc` and `balanced_accuracy`, means
    over labels, and the `auc` of each label as a task of its own. Of a number: `mae`, `rmse`, `r2`, `pearson` and
    `calibration_slope`, of the truth on the prediction. A resample without a class or finding takes its mean over the others.

    Over all known sites (site "all"); of female and male subjects there (`auc_female`, `auc_male`); at each, where there are
    several sites; at the other sites together and singly (`auc_unseen`), which no operating point has seen either.

    Args:
        predictions: Of val and test scans; scans without a label take no part.
        stage: What was trained, as in `core.stages`.
        regime: federated, pooled or local-only.
        seed: Of the run.
        known_sites: The sites that were trained on; all where not given.
        num_resamples: Of the bootstrap.
    """
    target = predictions.target
    notes = Notes(f"{stage}: ")
    known = sorted(known_sites if known_sites is not None else np.unique(predictions.site).tolist())
    thresholds_L, remarks = operating_points(predictions, known_sites=known)
    for text in remarks:
        notes.add(text)
    in_test = predictions.split == "test"
    unlabelled = int(np.isnan(predictions.values_NL[in_test]).all(axis=1).sum())
    if unlabelled:
        notes.add(f"{target.task}: {unlabelled} test scans without a label take no part")
    rows = subject_rows(predictions, "test")
    twice = len(rows.subject_M) - len(np.unique(np.stack([rows.subject_M, rows.label_M]), axis=1).T)
    if twice:
        notes.add(f"{target.task}: {twice} times a subject's scans are of two classes; each class is scored on its own scans")
    is_known_M = np.isin(rows.site_M, known)
    if not is_known_M.any():
        notes.refused(NotEvaluableError(f"{stage}: {target.task}: no test scan at a site that was trained on has a label."))
    groups = [("", "all", is_known_M)]
    if target.labels != ("sex",):
        groups += [(f"_{word}", "all", is_known_M & (rows.sex_M == sex)) for sex, word in SEX_WORDS.items()]
        without = rows.select(is_known_M & (rows.sex_M == "")).num_subjects
        if without:
            notes.add(f"{target.task}: {without} test subjects of unknown sex are in no figure of one sex")
    groups.append(("_unseen", "all", ~is_known_M))
    sites = np.unique(rows.site_M).tolist()
    groups += [
        ("" if site in known else "_unseen", site, rows.site_M == site) for site in sites if len(sites) > 1 or site not in known
    ]

    evaluations = []
    for ending, site, mask_M in groups:
        if not mask_M.any():
            continue
        figures, remarks = _figures(target, rows.select(mask_M), thresholds_L)
        for text in remarks:
            notes.add(f"{target.task} auc{ending} at site {site}: {text}")
        with np.errstate(divide="ignore", invalid="ignore"):
            found = _intervals(
                rows.select(mask_M), [figure.statistic for figure in figures], num_resamples=num_resamples, seed=seed
            )
        no_value: dict[tuple[str, str], list[str]] = {}
        for figure, result in zip(figures, found, strict=True):
            metric = figure.metric + ending
            if isinstance(result, NotEvaluableError):
                no_value.setdefault((figure.task, str(result)), []).append(metric)
                continue
            value, low, high = result
            evaluations.append(
                Evaluation(
                    stage=stage,
                    task=figure.task,
                    metric=metric,
                    value=value,
                    low=low,
                    high=high,
                    regime=regime,
                    site=site,
                    num_subjects=figure.num_subjects,
                    seed=seed,
                )
            )
        for (task, reason), metrics in no_value.items():
            verb = "have" if len(metrics) > 1 else "has"
            notes.add(f"{task} {', '.join(metrics)} at site {site} {verb} no value: {reason}")
    return evaluations, list(dict.fromkeys(notes.texts))
