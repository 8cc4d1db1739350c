"""What the planted study measures: the share of site, the eraser from sums, age, and runs of the real apps.

Shape legend: N subjects, F features, K directions, Q given columns.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.checkpoint import last_checkpoints, load_checkpoint
from core.config import RunConfig, load_config
from core.erasure import Eraser, covariates, fit_eraser, scanner_sums
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, subject_bootstrap
from core.evaluation.outcomes import Notes
from core.evaluation.probes import age_error
from core.evaluation.spread import spread_outcomes
from core.scaling import input_sums, standardisation_from
from core.settings import MomentPolicy

Floats = NDArray[np.float64]
Figure3 = tuple[float, float, float]
"""A value and the bounds of its interval."""

SPLIT = "data.fractions=[0.6,0,0.4] finetune=none evaluation=none policy.share_per_scan=false"


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
        raise ValueError("planted: a site must tell how features change with age, got none. Lower policy.min_group.")
    return eraser


def value_of(evaluations: Sequence[Evaluation], metric: str, stage: str) -> float:
    """One figure over all sites."""
    [value] = [e.value for e in evaluations if (e.metric, e.site, e.stage) == (metric, "all", stage)]
    return value


def age_fit(embeddings: Embeddings) -> tuple[float, float]:
    """R2 and mean absolute error in years of age, by ridge, held-out subjects."""
    found, _ = age_error(embeddings, stage="planted", regime="pooled", seed=0, num_resamples=1)
    return value_of(found, "r2", "planted"), value_of(found, "mae", "planted")


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
    return load_checkpoint(last_checkpoints(checkpoints.parent)[stage]).state


def projector_gap(first_KF: torch.Tensor, second_KF: torch.Tensor) -> float:
    """Largest difference between the projections on two sets of orthonormal rows: 0 where both span the same."""
    first, second = first_KF.double(), second_KF.double()
    return float((first.T @ first - second.T @ second).abs().max())
