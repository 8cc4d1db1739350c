"""ComBat on representations from sums alone: additive and multiplicative scanner effects, shrunk by empirical Bayes.

Johnson, Li & Rabinovic 2007 (doi:10.1093/biostatistics/kxj037), as Fortin et al. 2018 (doi:10.1016/j.neuroimage.2017.11.024)
brought it to images. For batch b (a scanner of a site), covariates x and feature f

    h = alpha + x beta + sigma (gamma_b + sqrt(delta_b) e)     becomes     sigma (z - gamma_b) / sqrt(delta_b) + alpha + x beta

with z = (h - alpha - x beta) / sigma. Everything is a function of each batch's count, means, variances and covariances with
the covariates, so that one exchange is enough and equals ComBat on pooled data.

Shape legend: N subjects, F features, C covariates, B batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from core.messages import check_fields, notes_of
from core.settings import MomentPolicy

CONVERGENCE = 1e-4
MAX_STEPS = 1000
VARIES = 1e-12
"""A variance is one when it is more than this share of the mean square."""


@dataclass(frozen=True)
class BatchMoments:
    """What a site sends of its batches: first and second moments, divided by the count; no covariance between features.

    Attributes:
        batch_B: (B,) code of the scanner, unique inside the site.
        count_B: (B,) subjects, rounded by the site.
        mean_BF: (B, F) means of the features.
        variance_BF: (B, F) their variances.
        covariate_mean_BC: (B, C) means of the covariates.
        covariate_covariance_BCC: (B, C, C) their covariance.
        cross_covariance_BCF: (B, C, F) covariance of covariates and features.
        withheld: what is not told and why, in words that may leave the site.
    """

    batch_B: Tensor
    count_B: Tensor
    mean_BF: Tensor
    variance_BF: Tensor
    covariate_mean_BC: Tensor
    covariate_covariance_BCC: Tensor
    cross_covariance_BCF: Tensor
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        (batches, features), covariates = self.mean_BF.shape, self.covariate_mean_BC.shape[-1]
        shapes = {
            "batch_B": (batches,),
            "count_B": (batches,),
            "variance_BF": (batches, features),
            "covariate_mean_BC": (batches, covariates),
            "covariate_covariance_BCC": (batches, covariates, covariates),
            "cross_covariance_BCF": (batches, covariates, features),
        }
        check_fields("batch moments", self, shapes)
        if (self.count_B < 2).any() or (self.variance_BF < 0).any() or len(set(self.batch_B.tolist())) != batches:
            raise ValueError(
                "batch moments: batches must differ, counts be at least 2 and variances not negative, got "
                f"{self.batch_B.tolist()!r} of {self.count_B.tolist()!r}. Ask the site for its log."
            )


@dataclass(frozen=True)
class Combat:
    """The fitted map h -> h: affine in the features of a subject whose batch and covariates are known.

    The covariates of a subject enter its result wherever a batch's spread is not 1. What is to be predicted from the result
    must therefore not be among them: its held-out values would leak.

    Attributes:
        batches: site and scanner code of each batch, sorted.
        intercept_F: (F,) mean at covariates 0 over all batches.
        slope_CF: (C, F) effect of the covariates.
        scale_F: (F,) residual standard deviation; 0 where a feature never varies, which then stays as it is.
        shift_BF: (B, F) additive effect gamma* in units of the scale.
        spread_BF: (B, F) multiplicative effect sqrt(delta*).
        explained_F: (F,) share of the variance left by the covariates that the batches explain (partial R2).
        notes: what took no part and why.
    """

    batches: tuple[tuple[str, int], ...]
    intercept_F: Tensor
    slope_CF: Tensor
    scale_F: Tensor
    shift_BF: Tensor
    spread_BF: Tensor
    explained_F: Tensor
    notes: tuple[str, ...] = ()

    def indices(self, site: str, scanner_N: Tensor) -> Tensor:
        """(N,) position of each subject's batch, -1 for one that is unknown to the fit."""
        position = {batch: index for index, batch in enumerate(self.batches)}
        return torch.tensor([position.get((site, int(code)), -1) for code in scanner_N], dtype=torch.long)

    def __call__(self, features_NF: Tensor, batch_N: Tensor, covariates_NC: Tensor | None = None) -> Tensor:
        """The features without scanner effects, (N, F), in their own units.

        ComBat knows nothing of a batch it was not fitted on: standardised by the pooled model, without shift and spread of
        its own, and put back, the features of such a subject (index -1) come out as they went in, whatever its covariates.

        Args:
            features_NF: (N, F) features.
            batch_N: (N,) positions from `indices`.
            covariates_NC: (N, C) as in the fit; may be left out when that had none.

        Raises:
            ValueError: other covariates than in the fit, or a value missing for a subject of a known batch.
        """
        known_N = batch_N >= 0
        covariates_NC = _covariates(covariates_NC, features_NF)
        if covariates_NC.shape[1] != len(self.slope_CF):
            raise ValueError(f"combat: covariates must be the {len(self.slope_CF)} of the fit, got {covariates_NC.shape[1]!r}.")
        missing = int((~covariates_NC[known_N].isfinite()).any(dim=1).sum())
        if missing:
            raise ValueError(f"combat: covariates must be finite, got {missing!r} subjects without. Leave these subjects out.")
        known_nF = features_NF[known_N].double()
        expected_nF = self.intercept_F + covariates_NC[known_N] @ self.slope_CF
        batch_n = batch_N[known_N]
        harmonised_nF = (known_nF - expected_nF - self.scale_F * self.shift_BF[batch_n]) / self.spread_BF[batch_n] + expected_nF
        result_NF = features_NF.clone()
        result_NF[known_N] = torch.where(self.scale_F > 0, harmonised_nF, known_nF).to(features_NF)
        return result_NF


def batch_moments(
    features_NF: Tensor, scanner_N: Tensor, covariates_NC: Tensor | None = None, *, policy: MomentPolicy
) -> BatchMoments:
    """What a site sends for `fit_combat`: moments of each scanner with as many subjects as its policy asks for variances.

    Args:
        features_NF: (N, F) features, one row a subject.
        scanner_N: (N,) integer code of the scanner.
        covariates_NC: (N, C) what shall be kept (age in years, sex 0 or 1), NaN where unknown: that subject takes no part.
        policy: what the site lets out.
    """
    covariates_NC = _covariates(covariates_NC, features_NF)
    known_N = covariates_NC.isfinite().all(dim=1)
    withheld: tuple[str, ...] = () if known_N.all() else ("subjects without all covariates take no part",)
    least = max(2, policy.min_group, policy.diagonal_subjects)
    told = []
    for code in torch.unique(scanner_N).tolist():
        if int((known_N & (scanner_N == code)).sum()) >= least:
            told.append(code)
        else:
            withheld += (f"scanner {code} is not harmonised: its variances need {least} subjects",)
    code_B = torch.tensor(told, dtype=scanner_N.dtype)
    taken_N = known_N & torch.isin(scanner_N, code_B)
    h_NF, x_NC = features_NF[taken_N].double(), covariates_NC[taken_N]
    member_BN = (code_B[:, None] == scanner_N[taken_N]).double()
    share_BN = member_BN / member_BN.sum(dim=1, keepdim=True)
    mean_BF, mean_BC = share_BN @ h_NF, share_BN @ x_NC
    h_NF, x_NC = h_NF - member_BN.T @ mean_BF, x_NC - member_BN.T @ mean_BC
    return BatchMoments(
        code_B.double(),
        torch.tensor([float(max(2, policy.rounded(int(count)))) for count in member_BN.sum(dim=1)], dtype=torch.float64),
        mean_BF,
        share_BN @ h_NF.square(),
        mean_BC,
        torch.einsum("bn,nc,nd->bcd", share_BN, x_NC, x_NC),
        torch.einsum("bn,nc,nf->bcf", share_BN, x_NC, h_NF),
        withheld,
    )


def fit_combat(parts: Mapping[str, BatchMoments], *, reference: tuple[str, int] | None = None) -> Combat:
    """ComBat with empirical Bayes from the `batch_moments` of every site; equal to the fit on pooled data.

    Batches are ordered by site and scanner, so that the order of the sites changes nothing.

    Args:
        parts: what each site told, by its name.
        reference: site and scanner to harmonise to; its own subjects stay as they are. The mean of all when not given.

    Raises:
        ValueError: no batch is told, fewer than two features vary (there is no prior then), covariates that do not vary
            inside any batch, a batch in which all subjects are alike, or an unknown reference.
    """
    notes = notes_of(parts)
    rows = sorted((site, int(code), row) for site, part in parts.items() for row, code in enumerate(part.batch_B))
    if not rows:
        raise ValueError(f"combat: at least one scanner must be told, got none. {'; '.join(notes) or 'No site answered'}.")
    batches = tuple((site, code) for site, code, _ in rows)
    if reference is not None and reference not in batches:
        raise ValueError(f"combat: reference must be one of {batches}, got {reference!r}.")
    columns = [field.name for field in fields(BatchMoments) if field.name not in ("batch_B", "withheld")]
    pooled = {name: torch.stack([getattr(parts[site], name)[row].double() for site, _, row in rows]) for name in columns}
    count_B, mean_BF, variance_BF = pooled["count_B"], pooled["mean_BF"], pooled["variance_BF"]
    covariate_mean_BC, cross_BCF = pooled["covariate_mean_BC"], pooled["cross_covariance_BCF"]
    covariance_BCC, share_B = pooled["covariate_covariance_BCC"], count_B / count_B.sum()

    # Intercepts of the batches take up all between them; what is inside them gives the slopes (Frisch-Waugh).
    slope_CF = _slopes(
        torch.einsum("b,bcd->cd", share_B, covariance_BCC),
        torch.einsum("b,bcf->cf", share_B, cross_BCF),
        share_B @ covariate_mean_BC.square(),
    )
    intercept_BF = mean_BF - covariate_mean_BC @ slope_CF
    residual_BF = _residual_variance(variance_BF, cross_BCF, covariance_BCC, slope_CF)
    base = None if reference is None else batches.index(reference)
    intercept_F = share_B @ intercept_BF if base is None else intercept_BF[base]
    pooled_F = share_B @ residual_BF if base is None else residual_BF[base]
    varies_F = pooled_F > VARIES * (share_B @ (variance_BF + mean_BF.square()))
    if int(varies_F.sum()) < 2:
        raise ValueError(f"combat: at least 2 features must vary for a prior over features, got {int(varies_F.sum())!r}.")
    scale_F = torch.where(varies_F, pooled_F, 0.0).sqrt()

    scale_V = scale_F[varies_F]
    hat_BV = (intercept_BF - intercept_F)[:, varies_F] / scale_V
    within_BV = residual_BF[:, varies_F] / scale_V.square()
    shift_BF, spread_BF = torch.zeros_like(mean_BF), torch.ones_like(mean_BF)
    for b, (site, code) in enumerate(batches):
        if not within_BV[b].any():
            raise ValueError(f"combat: subjects of site {site}, scanner {code} must differ, got all alike. Leave it out.")
        if b != base:
            gamma_V, delta_V = _empirical_bayes(hat_BV[b], within_BV[b], float(count_B[b]))
            shift_BF[b, varies_F], spread_BF[b, varies_F] = gamma_V, delta_V.sqrt()
    if not varies_F.all():
        notes += (f"{int((~varies_F).sum())} features do not vary and stay as they are",)
    # A feature constant in every batch has no residual variance, but its means may differ: the batches explain all of it.
    explained_F = _explained(share_B, mean_BF, variance_BF, covariate_mean_BC, covariance_BCC, cross_BCF, residual_BF)
    return Combat(batches, intercept_F, slope_CF, scale_F, shift_BF, spread_BF, explained_F, notes)


def pooled_combat(features_NF: Tensor, batch_N: Tensor, covariates_NC: Tensor | None = None) -> Combat:
    """ComBat fitted on data in one place; the batches are ("pooled", code).

    Args:
        features_NF: (N, F) features, one row a subject.
        batch_N: (N,) integer code of the scanner.
        covariates_NC: (N, C) covariates.
    """
    everything = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)
    return fit_combat({"pooled": batch_moments(features_NF, batch_N, covariates_NC, policy=everything)})


def _covariates(covariates_NC: Tensor | None, features_NF: Tensor) -> Tensor:
    return torch.zeros(len(features_NF), 0, dtype=torch.float64) if covariates_NC is None else covariates_NC.double()


def _slopes(covariance_CC: Tensor, cross_CF: Tensor, mean_square_C: Tensor) -> Tensor:
    spread_C = covariance_CC.diagonal().sqrt()
    if (spread_C.square() <= VARIES * (mean_square_C + spread_C.square())).any():
        raise ValueError("combat: covariates must vary inside a scanner, got one that does not. Leave it out.")
    correlation_CC = covariance_CC / spread_C[:, None] / spread_C
    if len(spread_C) and torch.linalg.eigvalsh(correlation_CC)[0] < 1e-10:
        raise ValueError("combat: covariates must not determine one another, got some that do. Leave one out.")
    slope_CF: Tensor = torch.linalg.solve(correlation_CC, cross_CF / spread_C[:, None]) / spread_C[:, None]
    return slope_CF


def _residual_variance(variance_BF: Tensor, cross_BCF: Tensor, covariance_BCC: Tensor, slope_CF: Tensor) -> Tensor:
    explained_BF = torch.einsum("cf,bcf->bf", slope_CF, cross_BCF)
    squared_BF = torch.einsum("cf,bcd,df->bf", slope_CF, covariance_BCC, slope_CF)
    return (variance_BF - 2 * explained_BF + squared_BF).clamp_min(0.0)


def _empirical_bayes(hat_F: Tensor, within_F: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Posterior shift and squared spread of one batch (F,), by the iteration and stopping rule of the published code.

    The inverse gamma prior is written without its parameters, which are infinite when the variances of all features agree.
    """
    variance_F = within_F * count / (count - 1)
    prior_shift, prior_shift_variance = hat_F.mean(), hat_F.var()
    prior_spread, prior_spread_variance = variance_F.mean(), variance_F.var()
    shift_F, spread_F = hat_F, variance_F
    for _ in range(MAX_STEPS):
        weight = prior_shift_variance * count
        new_shift_F = (weight * hat_F + spread_F * prior_shift) / (weight + spread_F)
        squares_F = count * (within_F + (hat_F - new_shift_F).square())
        new_spread_F = (prior_spread_variance * (squares_F / 2 + prior_spread) + prior_spread**3) / (
            prior_spread_variance * (count / 2 + 1) + prior_spread.square()
        )
        change = max(
            float(((new - old).abs() / old).nan_to_num(nan=0.0).max())
            for new, old in ((new_shift_F, shift_F), (new_spread_F, spread_F))
        )
        shift_F, spread_F = new_shift_F, new_spread_F
        if change <= CONVERGENCE:
            break
    return shift_F, spread_F


def _explained(
    share_B: Tensor,
    mean_BF: Tensor,
    variance_BF: Tensor,
    covariate_mean_BC: Tensor,
    covariance_BCC: Tensor,
    cross_BCF: Tensor,
    residual_BF: Tensor,
) -> Tensor:
    """1 - (residual with batches and covariates) / (residual with covariates alone), (F,); 0 where nothing is left."""
    mean_F, mean_C = share_B @ mean_BF, share_B @ covariate_mean_BC
    offset_BF, offset_BC = mean_BF - mean_F, covariate_mean_BC - mean_C
    total_CC = torch.einsum("b,bcd->cd", share_B, covariance_BCC + offset_BC[:, :, None] * offset_BC[:, None, :])
    total_CF = torch.einsum("b,bcf->cf", share_B, cross_BCF + offset_BC[:, :, None] * offset_BF[:, None, :])
    total_F = share_B @ (variance_BF + offset_BF.square())
    left_F = total_F - (total_CF * _slopes(total_CC, total_CF, share_B @ covariate_mean_BC.square())).sum(dim=0)
    varies_F = left_F > VARIES * (total_F + mean_F.square())
    return torch.where(varies_F, 1 - (share_B @ residual_BF) / left_F.where(varies_F, 1.0), 0.0).clamp(0.0, 1.0)
