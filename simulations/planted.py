"""Known truth: does the evaluation find the site effect that is there, and does erasure remove that and nothing else?

``python -m simulations.planted`` plants a site effect twice. In a table it is drawn: features of known covariance get offsets in
known directions. In images it is counterfactual: the same anatomies are scanned on every scanner, so the encoder's table of
anatomy by scanner holds the effect that the consortium, where each subject meets one scanner, can only estimate.

Shape legend: N subjects, F features, S sites or scanners, A anatomies, K planted directions, Q given columns.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.optimize import brentq

from client.site import holdings, this_site
from core.checkpoint import load_checkpoint, load_strictly, write_atomically
from core.config import ImageData, RunConfig, load_config
from core.data.bids import list_sites
from core.data.volumes import VolumeSettings, load_volume
from core.erasure import Eraser, covariates, fit_eraser, scanner_sums
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, subject_bootstrap
from core.evaluation.outcomes import Notes
from core.evaluation.probes import age_error, chance_and_floor, site_predictability
from core.evaluation.spread import spread_outcomes
from core.models import Pretrainer, RowEncoder, build_pretrainer, num_erased
from core.moments import MomentPolicy
from core.report import COLOURS, MARKERS, STYLE
from core.scaling import input_sums, standardisation_from
from simulations.age_maps import healthy_embeddings
from simulations.cohort import CONSORTIUM, PRETRAINING_SITES, Scanner, acquire, draw_anatomy

Floats = NDArray[np.float64]
Figure3 = tuple[float, float, float]
Told = Callable[[str], None]

NUM_SITES, SUBJECTS_PER_SITE, NUM_FEATURES, RANK = 6, 100, 40, 2
MEAN_AGE, SD_AGE = 50.0, 15.0
PROBED_SHARE = 0.2
COHORT_SCALE, NUM_ANATOMIES = 1.0, 60
SPLIT = "data.fractions=[0.6,0,0.4] finetune=none evaluation=none simulation.share_per_scan=false"
TABLE_RUN = "experiment=roi num_rounds=6"
IMAGE_RUN = "data.target_sites=[] debias=erasure debias.erase_to=all num_rounds=8"


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


def given_columns(age_N: Floats, male_N: Floats) -> Floats:
    """(N, 4) what the evaluation holds fixed: a constant, age, its square, sex."""
    centred_N = (age_N - age_N.mean()) / age_N.std()
    return np.stack([np.ones_like(age_N), centred_N, np.square(centred_N), male_N], axis=1)


def beyond(values_NF: Floats, given_NQ: Floats) -> Floats:
    """The part of the values that no linear function of the given columns gives."""
    return np.asarray(values_NF - given_NQ @ np.linalg.lstsq(given_NQ, values_NF, rcond=None)[0])


def planted_share(between_F: Floats, within_F: Floats, total_F: Floats) -> float:
    """Share of site in the variance at equal age and sex, features in standard deviations: what `explained_variance` estimates.

    Args:
        between_F: variance of the site's offset beyond age and sex.
        within_F: variance at one site, beyond age and sex.
        total_F: variance of the feature over all subjects.
    """
    return float((between_F / total_F).sum() / ((between_F + within_F) / total_F).sum())


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


def recovered_share(embeddings: Embeddings) -> Figure3:
    """`explained_variance` of site among held-out subjects, with its interval."""
    [outcome] = [
        outcome
        for outcome in spread_outcomes(embeddings, Notes(), seed=0)
        if (outcome.task, outcome.metric) == ("site", "explained_variance")
    ]
    return subject_bootstrap(outcome.subjects_N, outcome.statistic(), seed=0)


def fitted_eraser(
    features_NF: Floats, about: Embeddings, policy: MomentPolicy, *, age_degree: int = 1, max_directions: int | None = None
) -> Eraser:
    """The eraser from the sums of the training subjects, as the apps fit it.

    Args:
        features_NF: of every subject.
        about: who these are; its features are not used, they are rounded.
        policy: of every site.
        age_degree: as in `covariates`.
        max_directions: as in `fit_eraser`.

    Raises:
        ValueError: no site is large enough to tell slopes.
    """
    features = torch.from_numpy(features_NF)
    given = covariates(
        torch.from_numpy(about.age_years),
        torch.from_numpy((about.sex == "M").astype(np.float64)),
        torch.zeros(len(about)),
        age_degree=age_degree,
    )
    scanner = torch.from_numpy(np.unique(about.scanner, return_inverse=True)[1])
    train_N = about.split == "train"
    sites = [torch.from_numpy(train_N & (about.site == site)) for site in np.unique(about.site)]
    reference = standardisation_from([input_sums(features[site_N], policy) for site_N in sites])
    told = [
        scanner_sums(reference.standard(features[site_N]), given[site_N], scanner[site_N], policy=policy)[0] for site_N in sites
    ]
    eraser = fit_eraser(told, reference, max_directions=max_directions)
    if eraser is None:
        raise ValueError("planted: a site must tell how features change with age, got none. Lower simulation.min_group.")
    return eraser


def value_of(evaluations: Sequence[Evaluation], metric: str, stage: str) -> float:
    """One figure over all sites."""
    [value] = [e.value for e in evaluations if (e.metric, e.site, e.stage) == (metric, "all", stage)]
    return value


def age_fit(embeddings: Embeddings) -> tuple[float, float]:
    """R2 and mean absolute error in years of age, by ridge, held-out subjects."""
    found, _ = age_error(embeddings, stage="planted", regime="pooled", seed=0, num_resamples=1)
    return value_of(found, "r2", "planted"), value_of(found, "mae", "planted")


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


def run_apps(overrides: str, num_sites: int, folder: Path) -> tuple[RunConfig, Path]:
    """Run the real apps over virtual sites in this process; the configuration and the folder of checkpoints."""
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.in_process import run_in_process

    text = f"{overrides} {SPLIT} output={json.dumps(str(folder))} name=run"
    run_in_process(
        server_app,
        client_app,
        text,
        {number + 1: {"partition-id": number, "num-partitions": num_sites} for number in range(num_sites)},
    )
    return load_config(text), folder / "run" / "checkpoints"


def last_state(checkpoints: Path, stage: str) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint of a stage."""
    return load_checkpoint(max(checkpoints.glob(f"{stage}-*.safetensors"))).state


def projector_gap(first_KF: torch.Tensor, second_KF: torch.Tensor) -> float:
    """Largest difference between the projections on two sets of orthonormal rows: 0 where both span the same."""
    first, second = first_KF.double(), second_KF.double()
    return float((first.T @ first - second.T @ second).abs().max())


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
                ours = fitted_eraser(about.h_NF.astype(np.float64), about, config.simulation.moment_policy())
                gap = projector_gap(model.encoder.standardise.directions.detach(), ours.directions_KF)
    return AppsResult(plan=plan, eraser_gap=gap, **shares)


def split_as(consortium: Consortium, config: RunConfig) -> Consortium:
    """The consortium with the held-out subjects of a run of its table."""
    test_N = np.zeros(len(consortium.test_N), dtype=np.bool_)
    for number in range(NUM_SITES):
        held = holdings(this_site({"partition-id": number, "num-partitions": NUM_SITES}, config), config)
        test_N[[int(scan.subject.removeprefix("sub-")) for scan in held.splits["test"].scans]] = True
    return replace(consortium, test_N=test_N)


@dataclass(frozen=True, kw_only=True, eq=False)
class Counterfactual:
    """The same anatomies on every scanner.

    Attributes:
        volumes_AS1XYZ: as the encoder sees them; every scan has its own pose and noise.
        scanners: names, in the order of the second axis.
        age_A: years.
        male_A: 1 for M, 0 for F.
    """

    volumes_AS1XYZ: torch.Tensor
    scanners: tuple[str, ...]
    age_A: Floats
    male_A: Floats

    @torch.no_grad()
    def embed(self, model: Pretrainer) -> Floats:
        """(A, S, F) the representation of each anatomy on each scanner."""
        model.eval()
        return np.stack([model.encoder(volumes_S1XYZ).double().numpy() for volumes_S1XYZ in self.volumes_AS1XYZ])


def scan_counterfactual(
    age_A: Floats, settings: VolumeSettings, seed: int, scanners: Sequence[Scanner], told: Told
) -> Counterfactual:
    """Draw a healthy anatomy of each age and scan it on every scanner."""
    random = np.random.default_rng(seed)
    male_A = random.integers(0, 2, len(age_A)).astype(np.float64)
    volumes = np.zeros((len(age_A), len(scanners), 1, *settings.shape), np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "scan.nii"
        for a, (age, male) in enumerate(zip(age_A, male_A, strict=True)):
            told(f"scanning anatomy {a + 1} of {len(age_A)} on {len(scanners)} scanners")
            anatomy = draw_anatomy(random, float(age), "M" if male else "F", False)
            for s, scanner in enumerate(scanners):
                path.write_bytes(acquire(anatomy, scanner, random))
                # The cache of a site holds float16.
                volumes[a, s, 0] = load_volume(path, settings).astype(np.float16)
    return Counterfactual(
        volumes_AS1XYZ=torch.from_numpy(volumes),
        scanners=tuple(scanner.name for scanner in scanners),
        age_A=age_A,
        male_A=male_A,
    )


@dataclass(frozen=True)
class Components:
    """Variance components of a table of anatomies by scanners, (F,) each, without bias from mean squares.

    Attributes:
        scanner_F: between scanners.
        anatomy_F: between anatomies.
        rest_F: what pose, noise and the pair of anatomy and scanner add.
    """

    scanner_F: Floats
    anatomy_F: Floats
    rest_F: Floats


def components(h_ASF: Floats) -> Components:
    """Two-way analysis of variance without replication (scanners and anatomies as random effects)."""
    num_anatomies, num_scanners, _ = h_ASF.shape
    mean_F, by_anatomy_AF, by_scanner_SF = h_ASF.mean(axis=(0, 1)), h_ASF.mean(axis=1), h_ASF.mean(axis=0)
    rest_ASF = h_ASF - by_anatomy_AF[:, None] - by_scanner_SF + mean_F
    rest_F = np.square(rest_ASF).sum(axis=(0, 1)) / ((num_anatomies - 1) * (num_scanners - 1))
    scanner_F = np.square(by_scanner_SF - mean_F).sum(axis=0) / (num_scanners - 1) - rest_F / num_anatomies
    anatomy_F = np.square(by_anatomy_AF - mean_F).sum(axis=0) / (num_anatomies - 1) - rest_F / num_scanners
    return Components(scanner_F, anatomy_F, rest_F)


def counterfactual_share(h_ASF: Floats, about: Counterfactual, seen: Embeddings) -> Figure3:
    """The share that `explained_variance` is to find in a consortium, by the counterfactual table; jackknife over anatomies.

    The held-out subjects `seen` tell who is on which scanner at which age, and the unit of each feature; offsets and variances
    come from the counterfactual table alone.
    """
    one_hot_NS = (seen.scanner[:, None] == np.array(about.scanners)).astype(np.float64)
    design_NS = beyond(one_hot_NS, given_columns(seen.age_years, (seen.sex == "M").astype(np.float64)))
    weight_S = one_hot_NS.mean(axis=0)
    total_F = seen.h_NF.astype(np.float64).var(axis=0)
    varies_F = total_F > 0
    given_AQ = given_columns(about.age_A, about.male_A)

    def statistic(chosen: NDArray[np.intp]) -> float:
        table_ASF, given_aQ = h_ASF[chosen][:, :, varies_F], given_AQ[chosen]
        offset_SF = table_ASF.mean(axis=0)
        # What the error of the means adds to the variance between them.
        error_F = components(table_ASF).rest_F / len(chosen) * np.square(design_NS).sum() / len(design_NS)
        between_F = np.square(design_NS @ offset_SF).mean(axis=0) - error_F
        left_ASF = np.stack([beyond(table_ASF[:, s], given_aQ) for s in range(len(weight_S))], axis=1)
        free = len(chosen) - given_aQ.shape[1]
        within_F = np.einsum("s,asf->f", weight_S, np.square(left_ASF)) / free
        return planted_share(between_F, within_F, total_F[varies_F])

    num_anatomies = len(h_ASF)
    everyone = np.arange(num_anatomies)
    value = statistic(everyone)
    # A bootstrap repeats anatomies, which would pass for agreement within a scanner; the jackknife does not.
    left_out_A = np.array([statistic(np.delete(everyone, a)) for a in everyone])
    error = 1.96 * float(np.sqrt((num_anatomies - 1) * left_out_A.var()))
    return value, value - error, value + error


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """One encoder of images; a scanner counts as a site.

    Attributes:
        encoder: untrained or pretrained.
        planted: share of scanner by the counterfactual table, with its interval over anatomies.
        recovered: `explained_variance` of the observed consortium, with its interval over subjects.
        planted_erased: `planted` behind the eraser that the consortium's training subjects gave.
        erased: `recovered` behind it.
        scanner_left: share of the counterfactual variance between scanners that the eraser leaves.
        anatomy_kept: share of the counterfactual variance between anatomies that it leaves.
        oracle_anatomy_kept: the same for the directions in which scanners truly differ: what any projection costs.
        age_r2: from h, held-out subjects.
        age_r2_erased: behind the eraser.
        eraser_gap: `projector_gap` of the run's eraser; None for the untrained encoder, behind which a run fits none.
    """

    encoder: str
    planted: Figure3
    recovered: Figure3
    planted_erased: Figure3
    erased: Figure3
    scanner_left: float
    anatomy_kept: float
    oracle_anatomy_kept: float
    age_r2: float
    age_r2_erased: float
    eraser_gap: float | None


def study_encoder(
    name: str, model: Pretrainer, observed: Embeddings, about: Counterfactual, policy: MomentPolicy, of_run: Eraser | None
) -> ImageResult:
    """Hold what the consortium tells of an encoder against the same anatomies on every scanner."""
    by_scanner = replace(observed, site=observed.scanner)
    eraser = fitted_eraser(observed.h_NF.astype(np.float64), observed, policy)
    behind = replace(by_scanner, h_NF=eraser(torch.from_numpy(observed.h_NF)).numpy())
    table_ASF = about.embed(model)
    effect_SF = torch.from_numpy(table_ASF.mean(axis=0) - table_ASF.mean(axis=(0, 1))) / eraser.scale_F
    _, size_K, directions_KF = torch.linalg.svd(effect_SF, full_matrices=False)
    true_directions = replace(eraser, directions_KF=directions_KF[size_K > 1e-9 * size_K[0]])

    erased_ASF = eraser(torch.from_numpy(table_ASF)).numpy()
    before, after, best = (
        components(values_ASF / eraser.scale_F.numpy())
        for values_ASF in (table_ASF, erased_ASF, true_directions(torch.from_numpy(table_ASF)).numpy())
    )
    held_out = observed.split == "test"

    return ImageResult(
        encoder=name,
        planted=counterfactual_share(table_ASF, about, by_scanner.select(held_out)),
        recovered=recovered_share(by_scanner),
        planted_erased=counterfactual_share(erased_ASF, about, behind.select(held_out)),
        erased=recovered_share(behind),
        scanner_left=float(after.scanner_F.sum() / before.scanner_F.sum()),
        anatomy_kept=float(after.anatomy_F.sum() / before.anatomy_F.sum()),
        oracle_anatomy_kept=float(best.anatomy_F.sum() / before.anatomy_F.sum()),
        age_r2=age_fit(by_scanner)[0],
        age_r2_erased=age_fit(behind)[0],
        eraser_gap=None if of_run is None else projector_gap(of_run.directions_KF, eraser.directions_KF),
    )


def study_images(root: Path, told: Told, overrides: str) -> list[ImageResult]:
    """The phantom consortium in `root` through the real apps, and both its encoders on every scanner."""
    told("pretraining on the phantom consortium")
    with tempfile.TemporaryDirectory() as temporary:
        text = f"{overrides} data.root={json.dumps(str(root))}"
        config, checkpoints = run_apps(text, len(list_sites(root)), Path(temporary))
        of_run = Eraser(**last_state(checkpoints, "eraser"))
        states = {"untrained": last_state(checkpoints, "untrained"), "pretrained": last_state(checkpoints, "pretrain")}
    observed = {name: healthy_embeddings(config, state) for name, state in states.items()}
    first = observed["untrained"]
    ages = first.age_years[first.split == "test"]
    assert isinstance(config.data, ImageData)
    settings = VolumeSettings(
        voxel_size_mm=config.data.voxel_size_mm, shape=config.data.shape, normalisation=config.data.normalisation
    )
    scanners = [scanner for site in CONSORTIUM if site.name in PRETRAINING_SITES for scanner in site.scanners]
    drawn_A = np.random.default_rng(1).choice(ages, NUM_ANATOMIES)
    about = scan_counterfactual(drawn_A, settings, 1, scanners, told)
    results = []
    for name, state in states.items():
        told(f"holding the {name} encoder against the truth")
        model = build_pretrainer(config.encoder, config.embedding_size, config.seed, num_classes=config.num_classes)
        load_strictly(model, state)
        policy = config.simulation.moment_policy()
        results.append(study_encoder(name, model, observed[name], about, policy, of_run if name == "pretrained" else None))
    return results


def mean_of(values: Sequence[float | None]) -> str:
    """The mean over seeds, - where there is none."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def holds(results: Sequence[TableResult]) -> int:
    """In how many tables the interval holds the planted share."""
    return sum(result.recovered[1] <= result.plan.share <= result.recovered[2] for result in results)


def tabulate(tables: Sequence[TableResult], apps: Sequence[AppsResult], images: Sequence[ImageResult]) -> Table:
    """Planted and recovered, and what erasure leaves of site and of all else; means over seeds."""
    found = Table(title="Share of site in the variance at equal age and sex, and what erasure does; held-out subjects")
    headings = ("planted", "recovered", "in interval", "erased", "planted left", "rest kept", "at planted rank")
    found.add_column("", no_wrap=True)
    for heading in (*headings, "age R2", "erased", "oracle", "site held-out", "erased", "floor"):
        found.add_column(heading, justify="right")
    plans = list(dict.fromkeys(result.plan for result in tables))
    for plan in plans:
        of_plan = [result for result in tables if result.plan == plan]
        probes = [result.probes for result in of_plan if result.probes is not None]
        found.add_row(
            str(plan),
            f"{plan.share:.3f}",
            mean_of([result.recovered[0] for result in of_plan]),
            f"{holds(of_plan)} of {len(of_plan)}",
            mean_of([result.erased["all"].share[0] for result in of_plan]),
            mean_of([result.erased["all"].planted_left for result in of_plan]),
            mean_of([result.erased["all"].outside_kept for result in of_plan]),
            mean_of([result.erased["planted rank"].outside_kept for result in of_plan]),
            mean_of([result.raw[0] for result in of_plan]),
            mean_of([result.erased["all"].age_r2 for result in of_plan]),
            mean_of([result.oracle[0] for result in of_plan]),
            *(mean_of([p[stage]["balanced_accuracy_heldout"] for p in probes]) for stage in ("raw", "erased", "age_sex_floor")),
        )
    found.add_section()
    for run in apps:
        found.add_row("apps: inputs", f"{run.plan.share:.3f}", f"{run.inputs[0]:.3f}", "", f"{run.inputs_erased[0]:.3f}")
        found.add_row("apps: trained h", "", f"{run.h[0]:.3f}", "", f"{run.h_erased[0]:.3f}")
    for image in images:
        found.add_row(
            f"images, {image.encoder}",
            f"{image.planted[0]:.3f}",
            f"{image.recovered[0]:.3f}",
            f"{int(image.recovered[1] <= image.planted[0] <= image.recovered[2])} of 1",
            f"{image.erased[0]:.3f}",
            f"{image.scanner_left:.3f}",
            f"{image.anatomy_kept:.3f}",
            f"{image.oracle_anatomy_kept:.3f}",
            f"{image.age_r2:.3f}",
            f"{image.age_r2_erased:.3f}",
        )
    return found


def draw(tables: Sequence[TableResult], images: Sequence[ImageResult]) -> Figure:
    """Recovered against planted share, before and behind the eraser, with 95 % intervals and the line where they agree."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        most = max([r.plan.share for r in tables] + [image.planted[0] for image in images])
        axis.plot([0, 1.15 * most], [0, 1.15 * most], color="0.6", linewidth=1, zorder=0, label="recovered = planted")
        axis.axhline(0, color="0.85", linewidth=1, zorder=0)

        def points(number: int, label: str, planted: Sequence[float], found: Sequence[Figure3], hollow: bool) -> None:
            values = np.array(found)
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            axis.errorbar(
                planted,
                values[:, 0],
                yerr=errors,
                linestyle="none",
                marker=MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                markerfacecolor="white" if hollow else None,
                markersize=5,
                linewidth=0.8,
                label=label,
            )

        # Tables of one share stand side by side.
        places: dict[int, float] = {}
        for share in {r.plan.share for r in tables}:
            alike = [r for r in tables if r.plan.share == share]
            places |= {id(r): share + 0.008 * most * (i - 0.5 * (len(alike) - 1)) for i, r in enumerate(alike)}
        kinds = list(dict.fromkeys(str(r.plan) for r in tables))
        for number, kind in enumerate(kinds):
            of_kind = [r for r in tables if str(r.plan) == kind]
            at = [places[id(r)] for r in of_kind]
            points(number, kind, at, [r.recovered for r in of_kind], hollow=False)
            points(number, "_", at, [r.erased["all"].share for r in of_kind], hollow=True)
        for number, image in enumerate(images, start=len(kinds)):
            points(number, f"images, {image.encoder}", [image.planted[0]], [image.recovered], hollow=False)
            points(number, "_", [image.planted[0]], [image.erased], hollow=True)
            axis.plot(image.planted[1:], [image.recovered[0]] * 2, color=COLOURS[number % len(COLOURS)], linewidth=0.8)
        axis.set_xlabel("planted share of site in the variance at equal age and sex")
        axis.set_ylabel("recovered share, held-out subjects (hollow: behind the eraser)")
        axis.legend(loc="upper left")
    return figure


def main(
    output: Annotated[Path, typer.Option(help="Folder for the figure, its numbers and the phantom images.")] = Path(
        "runs/planted"
    ),
    seeds: Annotated[
        int, typer.Option(min=1, help="Tables of each kind, drawn with seeds 0, 1, ...; images are drawn once.")
    ] = 5,
) -> None:
    """Plant a site effect of known size, then ask: does the evaluation find it, does erasure remove it and nothing else?

    Tables: six sites, 40 features with curved age, sex and correlated noise, an offset a site in two known directions. The
    planted share of site in the variance at equal age and sex is set exactly; `recovered` is the evaluation's explained_variance
    on held-out subjects. `planted left` is what the eraser leaves of the planted variance (0: all gone), `rest kept` what it
    leaves of the variance outside of the planted directions (1: nothing else gone), `at planted rank` the same when it is
    told how many directions to erase (debias.erase_directions). `oracle` is age from the features without any offset. A site
    is hidden when the held-out probe is no better than `floor`, which knows age and sex alone.

    Images: every phantom anatomy is scanned on every scanner, so the share of the scanner in h is known without a model; the
    consortium, each subject on one scanner, must agree. There `planted left` is the variance between scanners that is left,
    `rest kept` that between anatomies, and `at planted rank` what erasing the true directions would keep of it.

    Prints a table and writes planted.png and planted.json; a few minutes on two cores. The same options give the same numbers.

    For a first look: --seeds 1
    """
    from simulations.cli import write_phantom

    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("isocenter").setLevel(logging.WARNING)
    started = time.monotonic()
    root = (output / "phantom").resolve()
    write_phantom(root, seed=0, scale=COHORT_SCALE)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tables", total=len(PLANS) * seeds)
        tables = []
        for plan in PLANS:
            for seed in range(seeds):
                tables.append(study_table(plan, seed, probes=plan.share == PROBED_SHARE))
                bar.advance(task)
        bar.update(task, description="tables through the apps", total=None)
        apps = [study_apps(Plan(share=PROBED_SHARE), 0, TABLE_RUN)]
        images = study_images(root, lambda text: bar.update(task, description=text), IMAGE_RUN)
    Console(width=160).print(tabulate(tables, apps, images))
    planted = [result for result in tables if result.plan.share > 0]
    typer.echo(
        f"intervals that hold the planted share: {holds(planted)} of {len(planted)}; with nothing planted "
        f"{holds(tables) - holds(planted)} of {len(tables) - len(planted)}"
    )
    gaps = [run.eraser_gap for run in apps] + [image.eraser_gap for image in images if image.eraser_gap is not None]
    typer.echo(f"projection of the runs' erasers against ours: at most {max(gaps):.1e} apart")
    output.mkdir(parents=True, exist_ok=True)
    draw(tables, images).savefig(output / "planted.png", dpi=150)
    content = {
        name: [asdict(result) for result in results] for name, results in (("tables", tables), ("apps", apps), ("images", images))
    }
    write_atomically(output / "planted.json", (json.dumps(content, indent=1) + "\n").encode())
    typer.echo(f"figure: {output / 'planted.png'}")
    typer.echo(f"figures: {output / 'planted.json'}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
