"""What sites and server do in turn to evaluate an encoder from sums: all probes together, each as `sums` has it.

Probes that need a covariance see as many directions as sites can tell one of; nearest means, beside them, see all that the run
asks for, since small sites too can tell a mean.

1. A site tells sums of its representations and how many columns a covariance may have there (`let_out`, `affordable_columns`).
2. Sites tell means of groups of scans (`group_means`); the server chooses the directions that probes see (`group_directions`).
3. Sites tell moments of the projected representations (`probe_moments`); the server fits the probes (`fit_age`, `fit_classes`).
4. Sites count the probes' errors on held-out subjects (`probe_errors`); the server scores them.

Every sum of step 1 to 3 is of the same subjects, those of `let_out`, so that no two of them differ by a few subjects alone. No
framework is known here; who asks whom is in `server.evaluation`.

Shapes: N subjects, F features, K directions, G groups, P columns of age and sex, E bins.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from core.evaluation.intervals import Evaluation, NotEvaluableError
from core.evaluation.outcomes import Results
from core.evaluation.sums import (
    WHOLE,
    Z_95,
    AgeErrors,
    ClassCounts,
    ClassMoments,
    ErrorScore,
    FoldMoments,
    LogisticGradient,
    RidgeCandidates,
    ScoreCounts,
    SiteProbe,
    age_errors,
    age_scores,
    area_under_curve,
    between_group_directions,
    choose_alpha,
    class_moments,
    count_classes,
    fit_lda,
    fit_logistic,
    fold_moments,
    logistic_gradient,
    mean_of_shares,
    score_counts,
    site_score,
)
from core.moments import MomentPolicy, age_groups

AGE_CELL_YEARS = 5.0
AGE_CENTRE_YEARS, AGE_UNIT_YEARS = 50.0, 20.0
AGE_KNOTS_YEARS = (20.0, 40.0, 60.0)
# Five columns and many subjects: shrinkage would hide how site depends on age.
FLOOR_SHRINKAGE = 0.01

SITE_PROBES = ("site", "scanner", "site_nearest", "scanner_nearest")
FLOORS = tuple(f"{name}_floor" for name in SITE_PROBES)
CLASS_PROBES = (*SITE_PROBES, *FLOORS, "diagnosis")

ProbeMoments = FoldMoments | ClassMoments
ProbeErrors = AgeErrors | ClassCounts | ScoreCounts


@dataclass(frozen=True)
class Subjects:
    """Subjects of one split of a site, one row each.

    Attributes:
        x_NF: (N, F) what a probe sees of them.
        age_N: (N,) years, NaN where unknown.
        male_N: (N,) 1 for M, 0 for F, NaN where unknown.
        patient_N: (N,) 1 for patients, 0 for controls.
        scanner_N: (N,) integer code of the scanner, the same in every split of the site.
        fold_N: (N,) from `sums.subject_folds`.
    """

    x_NF: Tensor
    age_N: Tensor
    male_N: Tensor
    patient_N: Tensor
    scanner_N: Tensor
    fold_N: Tensor

    def __len__(self) -> int:
        return len(self.x_NF)

    def select(self, mask_N: Tensor) -> "Subjects":
        """Those for whom the mask holds."""
        return Subjects(*(getattr(self, field.name)[mask_N] for field in fields(self)))

    def healthy(self) -> "Subjects":
        """The controls."""
        return self.select(self.patient_N == 0)


@dataclass(frozen=True)
class GroupMeans:
    """What a site tells for the choice of directions: means of groups of one diagnosis, one scanner and neighbouring ages.

    Attributes:
        count_G: (G,) subjects, rounded by the site.
        mean_GF: (G, F) means of the standardised features.
        patient_G: (G,) 1 for a group of patients, 0 of controls.
    """

    count_G: Tensor
    mean_GF: Tensor
    patient_G: Tensor

    def __post_init__(self) -> None:
        groups = len(self.mean_GF)
        if self.mean_GF.ndim != 2 or self.count_G.shape != (groups,) or self.patient_G.shape != (groups,):
            raise ValueError(f"group means: counts and diagnoses must be one a group, got {groups} groups of another shape.")
        if not self.mean_GF.isfinite().all() or not (self.count_G > 0).all():
            raise ValueError("group means: means must be finite and counts positive. Ask the site for its log.")
        if not ((self.patient_G == 0) | (self.patient_G == 1)).all():
            raise ValueError("group means: a group must be of controls (0) or patients (1). Ask the site for its log.")


# At a site.


def let_out(train: Subjects, policy: MomentPolicy) -> Subjects:
    """The training subjects that every sum is of: those of one diagnosis and scanner, of known or unknown age, that are enough.

    The difference of two sums, say of a site and of all its scanners that are told, is so never that of a few subjects.
    """
    group_N3 = torch.stack([train.patient_N.double(), train.scanner_N.double(), train.age_N.isnan().double()], dim=1)
    _, group_N, count_G = torch.unique(group_N3, dim=0, return_inverse=True, return_counts=True)
    return train.select(count_G[group_N] >= policy.min_group)


def affordable_columns(train: Subjects, most: int, policy: MomentPolicy) -> int:
    """Columns that a covariance of the site's healthy training subjects may have, at most so many."""
    count = len(train.healthy())
    if count < max(1, policy.min_group):
        return 0
    each = policy.covariance_subjects_per_feature
    return most if each == 0 else min(most, count // each)


def group_means(train: Subjects, policy: MomentPolicy) -> GroupMeans:
    """Means of the standardised features of groups of one diagnosis, one scanner and neighbouring ages."""
    counts, means, patients = [], [], []
    for patient in (0, 1):
        for scanner in torch.unique(train.scanner_N):
            part = train.select((train.patient_N == patient) & (train.scanner_N == scanner))
            for members in age_groups(part.age_N, bin_years=AGE_CELL_YEARS, min_group=policy.min_group):
                counts.append(float(policy.rounded(len(members))))
                means.append(part.x_NF[members].double().mean(dim=0))
                patients.append(float(patient))
    return GroupMeans(
        torch.tensor(counts, dtype=torch.float64),
        torch.stack(means) if means else train.x_NF.new_zeros(0, train.x_NF.shape[1]).double(),
        torch.tensor(patients, dtype=torch.float64),
    )


def age_and_sex(age_N: Tensor, male_N: Tensor) -> Tensor:
    """(N, P) what the floor sees: a linear spline of age with public knots, in public units, and sex (unknown: halfway)."""
    age_N = (age_N.double() - AGE_CENTRE_YEARS) / AGE_UNIT_YEARS
    beyond = [(age_N - (knot - AGE_CENTRE_YEARS) / AGE_UNIT_YEARS).clamp_min(0.0) for knot in AGE_KNOTS_YEARS]
    return torch.stack([age_N, *beyond, male_N.double().nan_to_num(0.5)], dim=1)


def rows_of(probe: str, subjects: Subjects, seen: int) -> tuple[Tensor, Tensor]:
    """What a probe of classes sees of the subjects that it is of, (N, seen), and the code of each one's class.

    A floor has columns of its own.
    """
    if probe == "diagnosis":
        return subjects.x_NF[:, :seen], subjects.patient_N.long()
    subjects = subjects.healthy()
    if probe in FLOORS:
        subjects = subjects.select(~subjects.age_N.isnan())
    x_NF = age_and_sex(subjects.age_N, subjects.male_N) if probe in FLOORS else subjects.x_NF[:, :seen]
    return x_NF, subjects.scanner_N.long() if probe.startswith("scanner") else torch.zeros(len(subjects), dtype=torch.long)


def probe_moments(train: Subjects, probes: Collection[str], seen: int, policy: MomentPolicy) -> dict[str, ProbeMoments]:
    """What a site tells for some probes, "age" or of `CLASS_PROBES`, of the first ``seen`` directions.

    Nearest means see every direction, and need no covariance. A site that has one diagnosis alone tells nothing for the probe of
    diagnosis: the site would give it away.
    """
    told: dict[str, ProbeMoments] = {}
    for name in probes:
        if name == "age":
            healthy = train.healthy()
            told[name] = fold_moments(healthy.x_NF[:, :seen], healthy.age_N, healthy.fold_N, policy=policy)
            continue
        nearest = "nearest" in name
        x_NF, code_N = rows_of(name, train, train.x_NF.shape[1] if nearest else seen)
        if name == "diagnosis" and len(torch.unique(code_N)) < 2:
            x_NF, code_N = x_NF[:0], code_N[:0]
        moments = class_moments(x_NF, code_N, policy=policy)
        if nearest:
            of_means = tuple(text for text in moments.withheld if "covariance" not in text)
            moments = replace(moments, within_FF=moments.within_FF[:0, :0], withheld=of_means)
        told[name] = moments
    return told


def probe_gradient(
    probe_name: str, probe: SiteProbe, class_weight_K: Tensor, train: Subjects, *, site: str, policy: MomentPolicy
) -> LogisticGradient:
    """A site's part of a logistic probe's step."""
    return logistic_gradient(
        probe, class_weight_K, *rows_of(probe_name, train, probe.weight_KF.shape[1]), site=site, policy=policy
    )


def probe_errors(
    candidates: RidgeCandidates | None,
    probes: Mapping[str, SiteProbe],
    train: Subjects,
    test: Subjects,
    *,
    site: str,
    known: bool,
    policy: MomentPolicy,
) -> dict[str, ProbeErrors]:
    """How the probes do on a site's held-out subjects; age, at a site that no probe has met, on all its healthy subjects.

    Args:
        candidates: of age; None where age is not evaluated.
        probes: by their names in `CLASS_PROBES`.
        train: what the site gave `probe_moments`; of a site not known all its training subjects.
        test: its held-out subjects.
        site: its name.
        known: whether the site took part in pretraining, and so in the fit of the probes of age, site and scanner.
        policy: what the site lets out.
    """
    found: dict[str, ProbeErrors] = {}
    if candidates is not None:
        seen = candidates.weight_LAF.shape[2]
        fitted, scored = (replace(part, x_NF=part.x_NF[:, :seen]).healthy() for part in (train, test))
        if known:
            own, held_out = (fitted.x_NF, fitted.age_N, fitted.fold_N), (scored.x_NF, scored.age_N)
            found["age"] = age_errors(candidates, own, held_out, site=site, policy=policy)
        else:
            everyone = torch.cat([fitted.x_NF, scored.x_NF]), torch.cat([fitted.age_N, scored.age_N])
            found["age"] = age_errors(candidates, None, everyone, site=site, policy=policy)
    for name, probe in probes.items():
        x_NF, code_N = rows_of(name, test, probe.weight_KF.shape[1])
        if name == "diagnosis":
            found[name] = told_scores(probe.decisions(x_NF).softmax(dim=1)[:, 1], code_N, policy)
        else:
            exact = count_classes(probe, x_NF, code_N, site=site, policy=replace(policy, round_counts_to=1))
            found[name] = replace(exact, count_CK=_rounded_totals(exact.count_CK, policy))
    return found


def told_scores(score_N: Tensor, label_N: Tensor, policy: MomentPolicy) -> ScoreCounts:
    """Histograms of scores of held-out subjects, one of each label, as far as the site's policy allows."""
    exact = score_counts(score_N, label_N, policy=replace(policy, round_counts_to=1))
    return replace(exact, count_2E=_rounded_totals(exact.count_2E, policy)) if exact.count_2E.shape[1] else exact


def _rounded_totals(count_CK: Tensor, policy: MomentPolicy) -> Tensor:
    """Rows of exact shares and rounded totals: a share is a mean, and rounding small counts one by one would bias it."""
    total_C = count_CK.sum(dim=1, keepdim=True)
    rounded_C = torch.tensor([[float(policy.rounded(int(total)))] for total in total_C], dtype=torch.float64).reshape(-1, 1)
    return count_CK * rounded_C / total_C


# At the server.


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
            known = torch.tensor([k for k, (owner, _) in enumerate(probe.classes) if owner in (site, "")])
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
        count_2E = _told(counts)
        half = Z_95 * math.sqrt(area_variance(count_2E)) + tied
        subjects = round(float(count_2E.sum()))
        return [self._figure("diagnosis", metric, value, max(value - half, 0.0), min(value + half, 1.0), subjects)], list(notes)

    def accuracy(self, metric: str, counts: Mapping[str, ScoreCounts]) -> list[Evaluation]:
        """Balanced accuracy of a diagnosis at probability 0.5, an edge between bins."""
        count_2E = _told(counts)
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


def r2_interval(score: ErrorScore) -> tuple[float, float]:
    """A 95 % interval of R2 = 1 - MSE / variance of age that is rather too wide, for normal errors and ages.

    The logarithms of both have variance 2 / N each, and would covary only to narrow it (delta method).
    """
    half = Z_95 * 2 / math.sqrt(score.num_subjects)
    return 1 - (1 - score.r2) * math.exp(half), 1 - (1 - score.r2) * math.exp(-half)


def area_variance(count_2E: Tensor) -> float:
    """Variance of the area under the ROC curve of binned scores (DeLong et al. 1988, doi:10.2307/2531595), from (2, E) counts."""
    negative_E, positive_E = count_2E
    num_negative, num_positive = negative_E.sum(), positive_E.sum()
    below_E = (negative_E.cumsum(0) - negative_E / 2) / num_negative
    above_E = (num_positive - positive_E.cumsum(0) + positive_E / 2) / num_positive
    area = (positive_E * below_E).sum() / num_positive
    of_positive = (positive_E * (below_E - area).square()).sum() / (num_positive - 1).clamp_min(1) / num_positive
    of_negative = (negative_E * (above_E - area).square()).sum() / (num_negative - 1).clamp_min(1) / num_negative
    return float(of_positive + of_negative)


def _told(counts: Mapping[str, ScoreCounts]) -> Tensor:
    return torch.stack([part.count_2E.double() for part in counts.values() if part.count_2E.shape[1]]).sum(dim=0)


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
