"""A planted site effect in a table: features of known covariance get offsets in known directions.

Shape legend: N subjects, F features, S sites, K planted directions, E erased directions.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq

from client.site import holdings, this_site
from core.checkpoint import load_strictly
from core.config import RunConfig
from core.erasure import Eraser
from core.evaluation.embeddings import Embeddings
from core.evaluation.probes import chance_and_floor, site_predictability
from core.models import RowEncoder, build_pretrainer, num_erased
from core.settings import MomentPolicy
from simulations.planted_measures import (
    Figure3,
    Floats,
    age_fit,
    beyond,
    fitted_eraser,
    given_columns,
    last_state,
    planted_share,
    projector_gap,
    recovered_share,
    run_apps,
    value_of,
)

NUM_SITES, SUBJECTS_PER_SITE, NUM_FEATURES, RANK = 6, 100, 40, 2
MEAN_AGE, SD_AGE = 50.0, 15.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is planted in a table.

    Attributes:
        share: of the variance at equal age and sex that site explains, features in standard deviations; see `planted_share`.
        confounding: share of the variance of age that lies between sites.
        scale_spread: standard deviation of the logarithm of a site's noise: what no offset shows and no projection removes.
    """

    share: float
    confounding: float = 0.3
    scale_spread: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.share < 1 and 0 <= self.confounding < 1 and self.scale_spread >= 0):
            raise ValueError(
                f"planted: share and confounding must be from 0 to below 1, scale_spread not negative, got {self!r}."
            )

    def __str__(self) -> str:
        confounded = f", age {self.confounding:g} by site" if self.confounding != 0.3 else ""
        return f"table{confounded}{', unequal noise' if self.scale_spread else ''}"


PLANS = (
    *(Plan(share=share) for share in (0.0, 0.05, 0.1, 0.2, 0.4)),
    Plan(share=0.2, confounding=0.6),
    Plan(share=0.2, scale_spread=0.4),
)
ERASERS: Mapping[str, Mapping[str, int]] = {
    "all": {},
    "planted rank": {"max_directions": RANK},
    "age squared": {"age_degree": 2},
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Consortium:
    """Rows of features with the truth behind them.

    Attributes:
        clean_NF: what age, sex and the subject give.
        offset_NF: what the site adds.
        directions_KF: orthonormal rows that span the offsets.
        site_N: site of each subject.
        age_N: years.
        male_N: 1 for M, 0 for F.
        test_N: whether the subject is held out.
    """

    clean_NF: Floats
    offset_NF: Floats
    directions_KF: Floats
    site_N: NDArray[np.int64]
    age_N: Floats
    male_N: Floats
    test_N: NDArray[np.bool_]

    def rows(self) -> Floats:
        """(N, F) what the sites measure."""
        return self.clean_NF + self.offset_NF

    def embeddings(self, rows_NF: Floats) -> Embeddings:
        """Any features of the subjects, as the evaluation takes them."""
        names_N = np.array([f"site-{site}" for site in self.site_N])
        return Embeddings(
            h_NF=rows_NF.astype(np.float32),
            subject=np.arange(len(rows_NF)),
            site=names_N,
            scanner=names_N,
            sex=np.where(self.male_N > 0, "M", "F"),
            diagnosis=np.full(len(rows_NF), "control"),
            split=np.where(self.test_N, "test", "train"),
            age_years=self.age_N,
        )

    def write(self, path: Path) -> None:
        """The table that a consortium would hand in."""
        header = ["participant_id", "age", "sex", "site", *(f"f{number:02d}" for number in range(self.rows().shape[1]))]
        lines = [",".join(header)]
        for number, row_F in enumerate(self.rows()):
            about = [
                f"{number:04d}",
                repr(float(self.age_N[number])),
                "FM"[int(self.male_N[number])],
                f"site-{self.site_N[number]}",
            ]
            lines.append(",".join([*about, *(repr(float(value)) for value in row_F)]))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_consortium(plan: Plan, seed: int) -> Consortium:
    """A table of sites of equal size, a curved age effect and correlated noise in every feature, a planted offset a site.

    Sites lie in the first planted direction in the order of their mean ages, so that site is confounded with age in the
    features too. The offsets are scaled until `planted_share` is the plan's, with variances as drawn from, not as they came out.
    """
    random = np.random.default_rng(seed)
    num_subjects = NUM_SITES * SUBJECTS_PER_SITE
    site_N = np.arange(num_subjects) % NUM_SITES
    order_S = np.linspace(-1, 1, NUM_SITES) / np.linspace(-1, 1, NUM_SITES).std()
    inside_N = random.uniform(-np.sqrt(3), np.sqrt(3), num_subjects)
    age_N = MEAN_AGE + SD_AGE * (np.sqrt(plan.confounding) * order_S[site_N] + np.sqrt(1 - plan.confounding) * inside_N)
    male_N = random.integers(0, 2, num_subjects).astype(np.float64)

    decades_N = (age_N - MEAN_AGE) / 20
    causes_N3 = np.stack([decades_N, np.expm1(decades_N), male_N], axis=1)
    fixed_NF = causes_N3 @ (random.normal(size=(3, NUM_FEATURES)) * np.array([[0.8], [0.4], [0.4]]))
    common_5F = random.normal(0, 0.5, (5, NUM_FEATURES))
    noise_NF = random.normal(size=(num_subjects, 5)) @ common_5F + random.normal(0, 0.7, (num_subjects, NUM_FEATURES))
    scale_S = np.exp(plan.scale_spread * random.normal(size=NUM_SITES))
    within_F = np.square(scale_S).mean() * (np.square(common_5F).sum(axis=0) + 0.7**2)

    directions_KF = np.linalg.qr(random.normal(size=(NUM_FEATURES, RANK)))[0].T
    place_SK = random.normal(0, 0.7, (NUM_SITES, RANK))
    place_SK[:, 0] += 0.7 * order_S
    unit_NF = (place_SK - place_SK.mean(axis=0))[site_N] @ directions_KF
    unit_F = np.square(beyond(unit_NF, given_columns(age_N, male_N))).mean(axis=0)

    def excess(size: float) -> float:
        total_F = (fixed_NF + size * unit_NF).var(axis=0) + within_F
        return planted_share(size**2 * unit_F, within_F, total_F) - plan.share

    size = brentq(excess, 0.0, 100.0) if plan.share else 0.0
    return Consortium(
        clean_NF=fixed_NF + scale_S[site_N, None] * noise_NF,
        offset_NF=size * unit_NF,
        directions_KF=directions_KF,
        site_N=site_N,
        age_N=age_N,
        male_N=male_N,
        test_N=np.arange(num_subjects) // NUM_SITES % 5 >= 3,
    )


@dataclass(frozen=True, kw_only=True)
class Erased:
    """What an eraser did to a table whose truth is known; variances of standardised features.

    Attributes:
        num_directions: erased.
        share: `explained_variance` of site that is left among held-out subjects, with its interval.
        planted_left: share of the planted variance that is left; None where nothing is planted.
        angle_degrees: the largest between a planted direction and the erased space; None likewise.
        outside_kept: share of the variance outside of the planted directions that is left.
        age_r2: from what is left, held-out subjects.
        age_mae: likewise, in years.
    """

    num_directions: int
    share: Figure3
    planted_left: float | None
    angle_degrees: float | None
    outside_kept: float
    age_r2: float
    age_mae: float


def judge(consortium: Consortium, eraser: Eraser) -> Erased:
    """Hold an eraser against the truth."""
    erased_NF = eraser(torch.from_numpy(consortium.rows())).numpy()
    mean_F, scale_F, erased_EF = (value.numpy() for value in (eraser.mean_F, eraser.scale_F, eraser.directions_KF))
    planted_FK = np.linalg.qr((consortium.directions_KF / scale_F).T)[0]
    before_NF, after_NF = ((rows_NF - mean_F) / scale_F for rows_NF in (consortium.rows(), erased_NF))
    outside = [np.square(rows_NF - rows_NF @ planted_FK @ planted_FK.T).sum() for rows_NF in (before_NF, after_NF)]
    standard_NF = consortium.offset_NF / scale_F
    left_NF = standard_NF - standard_NF @ erased_EF.T @ erased_EF
    is_planted = bool(standard_NF.any())
    sine = float(np.linalg.svd(planted_FK - erased_EF.T @ (erased_EF @ planted_FK), compute_uv=False)[0])
    r2, mae = age_fit(consortium.embeddings(erased_NF))
    return Erased(
        num_directions=len(erased_EF),
        share=recovered_share(consortium.embeddings(erased_NF)),
        planted_left=float(np.square(left_NF).sum() / np.square(standard_NF).sum()) if is_planted else None,
        angle_degrees=float(np.degrees(np.arcsin(min(1.0, sine)))) if is_planted else None,
        outside_kept=float(outside[1] / outside[0]),
        age_r2=r2,
        age_mae=mae,
    )


def site_probes(consortium: Consortium, eraser: Eraser) -> dict[str, dict[str, float]]:
    """Site from features before and after erasure and from age and sex alone, by probe: balanced accuracies."""
    metrics = ("balanced_accuracy", "balanced_accuracy_heldout", "balanced_accuracy_boosting")
    tables = {
        "raw": consortium.embeddings(consortium.rows()),
        "erased": consortium.embeddings(eraser(torch.from_numpy(consortium.rows())).numpy()),
    }
    found = [
        evaluation
        for stage, table in tables.items()
        for evaluation in site_predictability(table, stage=stage, regime="pooled", seed=0, num_resamples=1)[0]
    ]
    found += [e for e in chance_and_floor(tables["raw"], regime="pooled", seed=0, num_resamples=1)[0] if e.task == "site"]
    return {stage: {m: value_of(found, m, stage) for m in metrics} for stage in ("raw", "erased", "age_sex_floor")}


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """One table.

    Attributes:
        plan: what was planted.
        seed: of the draw.
        recovered: `explained_variance` of site, with its interval.
        raw: R2 and mean absolute error of age from the features.
        oracle: the same without the planted offsets.
        erased: by eraser.
        probes: of `site_probes`, where asked for.
    """

    plan: Plan
    seed: int
    recovered: Figure3
    raw: tuple[float, float]
    oracle: tuple[float, float]
    erased: dict[str, Erased]
    probes: dict[str, dict[str, float]] | None


def study_table(plan: Plan, seed: int, *, probes: bool = False) -> TableResult:
    """Plant, find, erase."""
    consortium = draw_consortium(plan, seed)
    rows = consortium.embeddings(consortium.rows())
    erasers = {name: fitted_eraser(consortium.rows(), rows, MomentPolicy(), **options) for name, options in ERASERS.items()}
    return TableResult(
        plan=plan,
        seed=seed,
        recovered=recovered_share(rows),
        raw=age_fit(rows),
        oracle=age_fit(consortium.embeddings(consortium.clean_NF)),
        erased={name: judge(consortium, eraser) for name, eraser in erasers.items()},
        probes=site_probes(consortium, erasers["all"]) if probes else None,
    )


@dataclass(frozen=True, kw_only=True)
class AppsResult:
    """What the real apps made of a table.

    Attributes:
        plan: what was planted.
        eraser_gap: `projector_gap` of the eraser in the run's encoder and the one fitted here from the same training subjects.
        inputs: `explained_variance` of site in what the encoder of the run without debiasing begins with.
        inputs_erased: likewise with debias=erasure.
        h: in the trained representation, without debiasing.
        h_erased: likewise with debias=erasure.
    """

    plan: Plan
    eraser_gap: float
    inputs: Figure3
    inputs_erased: Figure3
    h: Figure3
    h_erased: Figure3


def study_apps(plan: Plan, seed: int, overrides: str) -> AppsResult:
    """The table as a file through the real apps, without debiasing and with erasure before the encoder."""
    consortium = draw_consortium(plan, seed)
    shares: dict[str, Figure3] = {}
    gap = np.inf
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary) / "table.csv"
        consortium.write(table)
        for debias, ending in (("none", ""), ("erasure", "_erased")):
            text = f"{overrides} debias={debias} data.table={json.dumps(str(table))}"
            config, checkpoints = run_apps(text, NUM_SITES, Path(temporary) / debias)
            state = last_state(checkpoints, "pretrain")
            erased = num_erased(state)
            model = build_pretrainer(
                config.encoder, config.embedding_size, config.seed, num_inputs=NUM_FEATURES, num_erased=erased
            )
            load_strictly(model, state)
            assert isinstance(model.encoder, RowEncoder)
            split = split_as(consortium, config)
            rows = torch.from_numpy(consortium.rows()).float()
            with torch.no_grad():
                inputs_NF, h_NF = (part.double().numpy() for part in (model.encoder.standardise(rows), model.encoder(rows)))
            shares[f"inputs{ending}"] = recovered_share(split.embeddings(inputs_NF))
            shares[f"h{ending}"] = recovered_share(split.embeddings(h_NF))
            if erased:
                about = split.embeddings(consortium.rows())
                ours = fitted_eraser(about.h_NF.astype(np.float64), about, config.policy.moment_policy())
                gap = projector_gap(model.encoder.standardise.directions.detach(), ours.directions_KF)
    return AppsResult(plan=plan, eraser_gap=gap, **shares)


def split_as(consortium: Consortium, config: RunConfig) -> Consortium:
    """The consortium with the held-out subjects of a run of its table."""
    test_N = np.zeros(len(consortium.test_N), dtype=np.bool_)
    for number in range(NUM_SITES):
        held = holdings(this_site({"partition-id": number, "num-partitions": NUM_SITES}, config), config)
        test_N[[int(scan.subject.removeprefix("sub-")) for scan in held.splits["test"].scans]] = True
    return replace(consortium, test_N=test_N)
