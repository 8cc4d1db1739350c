"""What the server makes of the sites' sums: the directions that probes see, the probes, their scores, notes in sentences.

Probes that need a covariance see as many directions as sites can tell one of; nearest means, beside them, see all that the run
asks for, since small sites too can tell a mean. The steps are in `federated_site`.

Shapes: F features, K directions or classes, G groups, E bins.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.evaluation.age_sums import WHOLE, AgeErrors, FoldMoments, age_scores, choose_alpha, r2_interval
from core.evaluation.class_sums import (
    SHARED,
    ClassCounts,
    ClassMoments,
    LogisticGradient,
    SiteProbe,
    fit_lda,
    fit_logistic,
    site_score,
)
from core.evaluation.federated_site import FLOORS, GroupMeans
from core.evaluation.intervals import Evaluation, NotEvaluableError
from core.evaluation.outcomes import Results
from core.evaluation.score_sums import ScoreCounts, area_under_curve, area_variance, pooled_counts
from core.evaluation.sums import Z_95, between_group_directions, mean_of_shares

# Five columns and many subjects: shrinkage would hide how site depends on age.
FLOOR_SHRINKAGE = 0.01


def check_codes(message: object, site: str, probe: SiteProbe | None = None) -> None:
    """Refuse folds, scanners or classes that no site has.

    Raises:
        ValueError: a code out of range, twice, or of another site's class.
    """
    match message:
        case FoldMoments(fold_G=codes):
            known = torch.arange(WHOLE, 64)
        case ClassMoments(scanner_C=codes):
            known = torch.arange(10_000)
        case ClassCounts(class_C=codes):
            assert probe is not None
            known = torch.tensor([k for k, (owner, _) in enumerate(probe.classes) if owner in (site, SHARED)])
        case _:
            return
    if len(torch.unique(codes)) < len(codes) or not torch.isin(codes.double(), known.double()).all():
        raise ValueError(f"{type(message).__name__}: codes must be different and the site's own, got {codes.tolist()!r}.")


def num_seen(columns: Mapping[str, int], most: int) -> int:
    """Directions that probes with a covariance see: as many as two sites can tell one of, beside age; 0 where there are none.

    Args:
        columns: `affordable_columns` of the sites that fit the probes.
        most: directions that there are.
    """
    largest = sorted(columns.values())[-2:]
    return max(0, min(most, largest[0] - 1)) if len(largest) == 2 else 0


def group_directions(groups: Mapping[str, GroupMeans], known: Collection[str], count: int) -> Tensor:
    """Orthonormal rows (at most count, F): where means of the known sites' groups, or of patients and controls, differ most.

    Of a site that is not known counts only how its patients differ from its controls: that it is another site must not show.

    Raises:
        NotEvaluableError: no groups that differ are told.
    """
    at_known = [groups[site] for site in sorted(groups) if site in known]
    counts, means = [part.count_G for part in at_known], [part.mean_GF for part in at_known]
    if not counts or not len(torch.cat(counts)):
        raise NotEvaluableError("probes from sums: groups of scans must be told for the choice of directions, got none.")
    centre_F = torch.cat(counts) @ torch.cat(means) / torch.cat(counts).sum()
    for site in sorted(groups):
        part = groups[site]
        patients = part.patient_G == 1
        if site in known or not patients.any() or patients.all():
            continue
        controls = part.count_G[~patients]
        own_F = controls @ part.mean_GF[~patients] / controls.sum()
        counts.append(part.count_G[patients])
        means.append(part.mean_GF[patients] - own_F + centre_F)
    try:
        return between_group_directions(torch.cat(counts), torch.cat(means), count)
    except ValueError as error:
        raise NotEvaluableError(f"probes from sums: {error}") from None


Ask = Callable[[SiteProbe, Tensor], Mapping[str, LogisticGradient]]


def fit_classes(name: str, parts: Mapping[str, ClassMoments], ask: Ask | None) -> SiteProbe:
    """A probe of classes: nearest means, linear discriminants, or logistic regression where somebody can be asked for gradients.

    Raises:
        NotEvaluableError: fewer than two classes, no covariance, or scanners that are the sites.
    """
    if name.startswith("scanner") and all(len(part.scanner_C) < 2 for part in parts.values()):
        raise NotEvaluableError("scanner: a site must tell two scanners to tell them from sites, got at most 1 at each.")
    shared = name == "diagnosis"
    if "nearest" in name:
        # As discriminants with the spread of all sites, 1, in every direction.
        parts = {site: replace(part, within_FF=torch.eye(part.mean_CF.shape[1]).double()) for site, part in parts.items()}
        return fit_lda(parts, shrinkage=0.0)
    if shared:
        parts = {site: part for site, part in parts.items() if len(part.scanner_C) == 2}
    if ask is not None:
        return fit_logistic(parts, ask, shared=shared)
    return fit_lda(parts, shared=shared, **({"shrinkage": FLOOR_SHRINKAGE} if name in FLOORS else {}))


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Evaluations of one stage from what sites counted.

    Attributes:
        stage: as in `Evaluation`.
        seed: of the run.
    """

    stage: str
    seed: int

    def age(self, known: Mapping[str, AgeErrors], unseen: Mapping[str, AgeErrors]) -> Results:
        """Mean absolute error, over all sites and at each, and R2; at sites that no probe has met likewise.

        Raises:
            NotEvaluableError: no known site tells errors.
        """
        alpha = choose_alpha(known)
        scores, notes = age_scores(known, alpha)
        found = [self._figure("age", "mae_sums", s.mae, s.low, s.high, s.num_subjects, site) for site, s in scores.items()]
        if math.isfinite(scores["all"].r2):
            low, high = r2_interval(scores["all"])
            found.append(self._figure("age", "r2_sums", scores["all"].r2, low, high, scores["all"].num_subjects))
        texts = list(notes)
        if unseen:
            try:
                scores, notes = age_scores(unseen, alpha)
            except NotEvaluableError as reason:
                return found, [*texts, *str(reason).partition(". ")[2].split("; "), "no unseen site is scored"]
            texts += notes
            found += [
                self._figure("age", "mae_sums_unseen", s.mae, s.low, s.high, s.num_subjects, site) for site, s in scores.items()
            ]
        return found, texts

    def classes(self, task: str, metric: str, probe: SiteProbe, counts: Mapping[str, ClassCounts], *, chance: bool) -> Results:
        """Balanced accuracy of site or scanner, and 1 / number of classes scored where that is asked for.

        Raises:
            NotEvaluableError: fewer than two classes are told.
        """
        score = site_score(probe, counts)
        subjects = round(float(score.count_CK.sum()))
        found = [self._figure(task, metric, score.balanced_accuracy, score.low, score.high, subjects)]
        if chance:
            constant = Scorer(stage="chance", seed=self.seed)
            found.append(constant._figure(task, metric, 1 / len(score.classes), None, None, subjects))
        return found, list(score.notes)

    def diagnosis(self, metric: str, counts: Mapping[str, ScoreCounts]) -> Results:
        """Area under the ROC curve, its interval that of DeLong et al. (1988) and as much wider as binning may have moved it.

        Raises:
            NotEvaluableError: no site tells both labels.
        """
        value, tied, notes = area_under_curve(counts)
        count_2E = pooled_counts(counts)
        half = Z_95 * math.sqrt(area_variance(count_2E)) + tied
        subjects = round(float(count_2E.sum()))
        return [self._figure("diagnosis", metric, value, max(value - half, 0.0), min(value + half, 1.0), subjects)], list(notes)

    def accuracy(self, metric: str, counts: Mapping[str, ScoreCounts]) -> list[Evaluation]:
        """Balanced accuracy of a diagnosis at probability 0.5, an edge between bins."""
        count_2E = pooled_counts(counts)
        half = count_2E.shape[1] // 2
        hits_2 = torch.stack([count_2E[0, :half].sum(), count_2E[1, half:].sum()])
        return [self._figure("diagnosis", metric, *mean_of_shares(hits_2, count_2E.sum(dim=1)), round(float(count_2E.sum())))]

    def _figure(
        self, task: str, metric: str, value: float, low: float | None, high: float | None, subjects: int, site: str = "all"
    ) -> Evaluation:
        return Evaluation(
            stage=self.stage,
            task=task,
            metric=metric,
            value=value,
            low=low,
            high=high,
            regime="federated",
            site=site,
            num_subjects=subjects,
            seed=self.seed,
        )


CLASS_WORDS = {
    "site": {"scanner 0 is": "the site is"},
    "diagnosis": {"scanner 0 is": "the label control is", "scanner 1 is": "the label patient is", "site probe": "probe"},
}


def gathered(probe: str, notes: Sequence[str], sites: Collection[str]) -> list[str]:
    """Notes of a probe, one a reason with the sites that give it, as sentences."""
    sites_of: dict[str, list[str]] = {}
    for note in dict.fromkeys(notes):
        site, _, reason = note.partition(": ")
        site, reason = (site, reason) if site in sites else ("", note)
        for old, new in CLASS_WORDS.get(probe.partition("_")[0], {}).items():
            reason = reason.replace(old, new)
        sites_of.setdefault(reason.removesuffix("."), []).append(site)
    return [
        f"{_name(probe)}: {', '.join(filter(None, who)) + ': ' if any(who) else ''}{reason}." for reason, who in sites_of.items()
    ]


def refused(probe: str, reason: NotEvaluableError, sites: Collection[str]) -> list[str]:
    """A probe's figure that could not be had, and what the sites say to it, as sentences."""
    what, _, notes = str(reason).partition(": ")[2].partition(". ")
    return [
        f"Not evaluated: {_name(probe)}: {what.removesuffix('.')}.",
        *gathered(probe, notes.split("; ") if notes else [], sites),
    ]


def _name(probe: str) -> str:
    name = probe.removesuffix("_floor").replace("_nearest", " by nearest mean")
    return f"floor of {name}" if probe in FLOORS else name
