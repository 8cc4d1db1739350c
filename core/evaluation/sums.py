"""What all probes from sums share: the features that they see, folds of subjects, intervals without resampling.

Every scan's representation stays at home: a probe is fitted from sums, its errors counted at the sites. Three steps, one exchange
each: a site function (features, labels, policy) -> a small dataclass of arrays; a server function (those of all sites, by name)
-> what to try; a site function -> counts. Fitted on the same subjects, a probe is the same as on pooled data. What a site
withholds it says in words, and the result repeats it under the site's name. The probes are in `age_sums`, `class_sums` and
`score_sums`; in what order site and server call them is in `federated_site` and `federated_server`.

Features come standardised by the `core.moments.Reference` of all sites (`standardised`), and projected to few directions where
covariances of all features would need more subjects than sites have. Intervals are in closed form, since no subject can be
resampled: normal for errors, Wilson's (Zou & Donner 2008, doi:10.1002/sim.3095) for a mean of recalls.

Shapes: N subjects, F features, K directions, G groups, C shares.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.moments import Reference

NUM_FOLDS = 5
Z_95 = 1.959963984540054


def standardised(features_NF: Tensor, reference: Reference, directions_KF: Tensor | None = None) -> Tensor:
    """Features in units of all sites' standard deviation, float64, as coordinates along the directions where these are given."""
    standard_NF = (features_NF.double() - reference.mean_D.double()) / reference.scale_D.double()
    seen_NF: Tensor = standard_NF if directions_KF is None else standard_NF @ directions_KF.double().T
    return seen_NF


def random_directions(features: int, count: int, *, seed: int) -> Tensor:
    """Orthonormal rows (count, F) that depend on the seed alone, never on data.

    Raises:
        ValueError: more directions than features.
    """
    if not 1 <= count <= features:
        raise ValueError(f"random_directions: count must be 1 to the {features} features, got {count!r}.")
    normal_FK = torch.from_numpy(np.random.default_rng(seed).normal(size=(features, count)))
    basis_FK, triangle_KK = torch.linalg.qr(normal_FK)
    directions_KF: Tensor = (basis_FK * triangle_KK.diagonal().sign()).T.contiguous()
    return directions_KF


def between_group_directions(count_G: Tensor, mean_GF: Tensor, count: int) -> Tensor:
    """Orthonormal rows (at most count, F): where group means that sites may send (`GroupMeans`, `ClassMoments`) differ most.

    Fewer than asked for when the means span fewer. A probe of the groups' labels loses least on these directions.

    Raises:
        ValueError: fewer than two groups that differ.
    """
    weight_G = count_G.double() / count_G.sum()
    centred_GF = mean_GF.double() - weight_G @ mean_GF.double()
    _, size_R, directions_RF = torch.linalg.svd(weight_G.sqrt()[:, None] * centred_GF, full_matrices=False)
    rank = int((size_R > 1e-10 * (1 + mean_GF.abs().max())).sum())
    if rank == 0:
        raise ValueError("between_group_directions: at least two group means must differ, got none that do.")
    kept_KF: Tensor = directions_RF[: min(count, rank)]
    return kept_KF


def subject_folds(subjects: Sequence[str], site: str) -> Tensor:
    """(N,) fold of each subject, by a hash of the site and the subject: the same in every run, whoever else takes part."""
    digests = [hashlib.sha256(json.dumps([site, subject]).encode()).digest() for subject in subjects]
    return torch.tensor([int.from_bytes(digest[:8], "big") % NUM_FOLDS for digest in digests], dtype=torch.long)


def covariance_of(rows_ND: Tensor) -> Tensor:
    """Covariance of the columns, divided by the count."""
    centred_ND = rows_ND - rows_ND.mean(dim=0)
    return centred_ND.T @ centred_ND / len(rows_ND)


def mean_of_shares(hits_C: Tensor, total_C: Tensor) -> tuple[float, float, float]:
    """Mean of independent shares with its 95 % interval from each one's Wilson interval (Zou & Donner 2008, section 2)."""
    share_C = hits_C / total_C
    centre_C = (hits_C + Z_95**2 / 2) / (total_C + Z_95**2)
    half_C = Z_95 / (total_C + Z_95**2) * (hits_C * (1 - share_C) + Z_95**2 / 4).sqrt()
    below = float((share_C - centre_C + half_C).norm()) / len(share_C)
    above = float((centre_C + half_C - share_C).norm()) / len(share_C)
    value = float(share_C.mean())
    return value, max(value - below, 0.0), min(value + above, 1.0)
