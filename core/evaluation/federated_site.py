"""What a site tells of its subjects when an encoder is evaluated from sums: all probes together, each as its module has it.

1. A site tells sums of its representations and how many columns a covariance may have there (`let_out`, `affordable_columns`).
2. Sites tell means of groups of scans (`group_means`); the server chooses the directions that probes see (`group_directions`).
3. Sites tell moments of the projected representations (`probe_moments`); the server fits the probes (`fit_ridge`, `fit_classes`).
4. Sites count the probes' errors on held-out subjects (`probe_errors`); the server scores them (`Scorer`).

Every sum of step 1 to 3 is of the same subjects, those of `let_out`, so that no two of them differ by a few subjects alone. The
server's half is `federated_server`. No framework is known in either; who asks whom is in `server.evaluation`.

Shapes: N subjects, F features, G groups, P columns of age and sex, C classes of a site, K classes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from core.evaluation.age_sums import AgeErrors, FoldMoments, RidgeCandidates, age_errors, fold_moments
from core.evaluation.class_sums import (
    ClassCounts,
    ClassMoments,
    LogisticGradient,
    SiteProbe,
    class_moments,
    count_classes,
    logistic_gradient,
)
from core.evaluation.score_sums import ScoreCounts, score_counts
from core.messages import check_fields
from core.moments import age_groups
from core.settings import MomentPolicy

AGE_CELL_YEARS = 5.0
AGE_CENTRE_YEARS, AGE_UNIT_YEARS = 50.0, 20.0
AGE_KNOTS_YEARS = (20.0, 40.0, 60.0)

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
        groups, _ = self.mean_GF.shape
        check_fields("group means", self, {"count_G": (groups,), "patient_G": (groups,)}, positive=self.count_G)
        if not ((self.patient_G == 0) | (self.patient_G == 1)).all():
            raise ValueError("group means: a group must be of controls (0) or patients (1). Ask the site for its log.")


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
