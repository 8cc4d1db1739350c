"""Objectives of alignment and uniformity: views of a scan close to each other, scans spread over the sphere.

Shape legend: V views, N scans, R = V N rows (all first views, then all second views ...), D embedding size.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.losses.embedded import EmbeddedViews, Objective, log_sum_exp
from core.losses.kernels import Kernel, check_at_least_zero, check_positive


@dataclass(frozen=True, kw_only=True)
class AlignmentUniformity(Objective):
    """Conditional alignment and uniformity: alignment weighted by how alike labels are, uniformity by how unlike.

    alignment_weight sum_ij w_ij ||z_i - z'_j||^2 / sum_ij w_ij + uniformity_weight log mean_{i != j} (w_max - w_ij)
    e^{-scale ||z_i - z_j||^2}, the first over pairs of rows of two views, the second over pairs of rows of one view, w the kernel
    of the labels and w_max its peak (Dufumier et al. 2021, arXiv 2111.05643, eqs. 3-4). With unknown labels these are the
    alignment and the uniformity of Wang and Isola (ICML 2020). Uniformity without any unlike pair is 0, alignment of a single
    view is 0.

    >>> z = torch.eye(2).double()
    >>> round(float(AlignmentUniformity()(z, z, {"age_years": torch.tensor([20.0, 80.0])})), 4)  # 0 + log e^{-2 * 2}
    -4.0
    """

    kernel: Kernel = field(default_factory=Kernel)
    alignment_weight: float = 1.0
    uniformity_weight: float = 1.0
    scale: float = 2.0

    def __post_init__(self) -> None:
        check_positive("objective alignment_uniformity", scale=self.scale)
        check_at_least_zero(
            "objective alignment_uniformity",
            alignment_weight=self.alignment_weight,
            uniformity_weight=self.uniformity_weight,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of the kernel."""
        return self.kernel.labels

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        return self.alignment_weight * self.alignment(views) + self.uniformity_weight * self.uniformity(views)

    def alignment(self, views: EmbeddedViews) -> Tensor:
        """Weighted mean squared distance of rows of two views."""
        if views.num_views == 1:
            return views.zero()
        weights_RR = views.pair_weights(self.kernel) * ~_same_view(views)
        squares_R = views.rows.square().sum(dim=1)
        size_R = weights_RR.sum(dim=1)
        return 2.0 * (squares_R * size_R - (views.any_similarity * weights_RR).sum(dim=1)).sum() / size_R.sum()

    def uniformity(self, views: EmbeddedViews) -> Tensor:
        """Logarithm of the mean potential of rows of one view, weighted by how unlike they are."""
        unlike_RR = (self.kernel.peak - views.pair_weights(self.kernel)).clamp_min_(0.0).fill_diagonal_(0.0) * _same_view(views)
        if not bool((unlike_RR > 0).any()):
            return views.zero()
        # ||z_i - z_j||^2 = 2 - 2 s_ij
        log_sums_R = log_sum_exp(views, 2.0 * self.scale, unlike_RR, shift=1.0, largest=4.0 * self.scale)
        return torch.logsumexp(log_sums_R, dim=0) - math.log(views.num_views * views.num_scans * (views.num_scans - 1))


def _same_view(views: EmbeddedViews) -> Tensor:
    view_R = torch.arange(views.num_views, device=views.z_VND.device).repeat_interleave(views.num_scans)
    return view_R[:, None] == view_R[None, :]


@dataclass(frozen=True, kw_only=True)
class DecoupledUniformity(Objective):
    """Decoupled uniformity: the mean of a scan's views, its centroid, is far from every other scan's.

    log mean_{i < j} e^{-scale ||mu_i - mu_j||^2}, mu_i the mean of the unit rows of scan i. With a ``kernel`` centroids are
    estimated with the help of labels, mu <- (K + regularisation I)^-1 K mu, K the kernel of the labels (Dufumier et al., ICML
    2023, eqs. 3 and 7); an unlabelled scan keeps its own centroid, shrunk by 1 + regularisation like every other. Fewer than
    two scans: 0. Alignment needs no term of its own: centroids are longest, and furthest apart, when views agree.

    >>> z = torch.eye(2).double()
    >>> round(float(DecoupledUniformity()(z, z)), 4)  # log e^{-2 * 2}
    -4.0
    """

    scale: float = 2.0
    kernel: Kernel | None = None
    regularisation: float = 0.01

    def __post_init__(self) -> None:
        check_positive("objective decoupled_uniformity", scale=self.scale, regularisation=self.regularisation)
        if self.kernel is not None and self.kernel.shape in ("epanechnikov", "cosine"):
            raise ValueError(
                "objective decoupled_uniformity: the kernel must be positive definite, such as rbf, cauchy or linear, "
                f"got {self.kernel.shape!r}."
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of the kernel."""
        return self.kernel.labels if self.kernel else ()

    def loss(self, views: EmbeddedViews) -> Tensor:
        """Of any number of views."""
        if views.num_scans < 2:
            return views.zero()
        centroids_ND = views.by_view(views.rows).mean(dim=0)
        if self.kernel is not None:
            centroids_ND = self.prior(views, self.kernel).to(centroids_ND) @ centroids_ND
        log_sum: Tensor = _LogPotential.apply(centroids_ND, self.scale)  # type: ignore[no-untyped-call]
        return log_sum - math.log(views.num_scans * (views.num_scans - 1))

    def prior(self, views: EmbeddedViews, kernel: Kernel) -> Tensor:
        """(K + regularisation I)^-1 K, a constant, by Cholesky decomposition in float64; labels of the first view."""
        labels = {name: values[: views.num_scans] for name, values in views.labels(kernel.labels).items()}
        kernel_NN = kernel.weights(labels).double().fill_diagonal_(kernel.peak)
        identity_NN = torch.eye(len(kernel_NN), dtype=torch.float64, device=kernel_NN.device)
        return torch.cholesky_solve(kernel_NN, torch.linalg.cholesky(kernel_NN + self.regularisation * identity_NN))


class _LogPotential(torch.autograd.Function):
    """log sum_{i != j} e^{-scale ||c_i - c_j||^2}."""

    @staticmethod
    def forward(ctx: Any, centroids_ND: Tensor, scale: float) -> Tensor:
        terms_NN = _log_potentials(centroids_ND, scale)
        largest = terms_NN.amax()
        terms_NN.sub_(largest).exp_()
        sums_N = terms_NN.sum(dim=1)
        ctx.scale = scale
        ctx.save_for_backward(centroids_ND, terms_NN, sums_N)
        return sums_N.sum().log() + largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        centroids_ND, terms_NN, sums_N = ctx.saved_tensors
        if torch.is_grad_enabled():
            value = torch.logsumexp(_log_potentials(centroids_ND, ctx.scale).flatten(), dim=0)
            (back_ND,) = torch.autograd.grad(value, centroids_ND, gradient, create_graph=True)
            return back_ND, None
        # sum_j p_ij (c_j - c_i), p the shares of the sum, from either end of a pair
        with torch.autocast(centroids_ND.device.type, enabled=False):
            drawn_ND = (terms_NN @ centroids_ND).addcmul_(sums_N[:, None], centroids_ND, value=-1.0)
        return drawn_ND.mul_(4.0 * ctx.scale * gradient / sums_N.sum()), None


def _log_potentials(centroids_ND: Tensor, scale: float) -> Tensor:
    """-scale ||c_i - c_j||^2, without the diagonal."""
    squares_N = scale * centroids_ND.square().sum(dim=1)
    exponents_NN = (2.0 * scale * centroids_ND) @ centroids_ND.T
    return exponents_NN.sub_(squares_N[:, None]).sub_(squares_N[None, :]).fill_diagonal_(-torch.inf)
