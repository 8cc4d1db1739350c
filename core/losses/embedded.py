"""The embeddings of a step, and what its losses share: rows of unit length and one matrix of their similarities.

Every pair loss of this package is made of sums over the pairs of an anchor, sum_j f(z_i.z_j) with weights that are the same
from j to i. The gradient of such sums with respect to the similarities may be written symmetric, which saves one of the two
matrix products on the way back to z; the functions below do that, and save what can be saved between the passes.

Shape legend: V views, N scans, R = V N rows (all first views, then all second views ...), D embedding size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from core.losses.kernels import Kernel

# Up to this inverse temperature exp() of every logit, and every sum of them, is far inside float32: no maximum to subtract.
SAFE_EXPONENT = 30.0
LOWEST = 1e30  # stands for infinity where a difference of two must not be NaN


class EmbeddedViews:
    """Embeddings of V views of N scans with the scans' metadata.

    >>> views = EmbeddedViews((torch.eye(2), 3 * torch.eye(2)), {"age_years": torch.tensor([20.0, 30.0])})
    >>> views.similarity
    tensor([[1., 0., 1., 0.],
            [0., 1., 0., 1.],
            [1., 0., 1., 0.],
            [0., 1., 0., 1.]])
    """

    def __init__(self, views: Sequence[Tensor], metadata: Mapping[str, Tensor] | None = None) -> None:
        """Take the views as they are; rows are brought to unit length when a loss asks for them.

        Args:
            views: (N, D) embeddings of each view; half precision is computed in float32.
            metadata: for each name a value a scan, (N,), or a value a view of a scan, (V, N), e.g. where two views come from
                two scanners. NaN means unknown.
        """
        if not views or any(view.ndim != 2 or not len(view) or view.shape != views[0].shape for view in views):
            raise ValueError(
                "loss: views must be matrices of the same shape (scans, features), of a scan or more, "
                f"got {[tuple(v.shape) for v in views]}."
            )
        self.num_views, self.num_scans = len(views), len(views[0])
        self.views = [view if view.dtype in (torch.float32, torch.float64) else view.float() for view in views]
        self.metadata = dict(metadata or {})

    @cached_property
    def z_VND(self) -> Tensor:  # noqa: N802
        """The views as they are, stacked."""
        return torch.stack(self.views)

    @cached_property
    def rows(self) -> Tensor:
        """Rows of unit length; a zero row stays zero and its gradient finite."""
        return torch.nn.functional.normalize(self.z_VND.flatten(0, 1), dim=1)

    def label(self, name: str) -> Tensor:
        """A metadata value of every row, in the type it comes in."""
        if name not in self.metadata:
            raise ValueError(f"loss: metadata must hold {name!r}, got {sorted(self.metadata)}.")
        value = self.metadata[name].to(self.z_VND.device)
        if value.shape == (self.num_scans,):
            return value.repeat(self.num_views)
        if value.shape == (self.num_views, self.num_scans):
            return value.flatten()
        raise ValueError(
            f"loss: metadata {name!r} must have shape {(self.num_scans,)} or {(self.num_views, self.num_scans)}, "
            f"got {tuple(value.shape)}."
        )

    def logits(self) -> Tensor:
        """The classifier's logits of every row, from metadata ``logits``, (N, C) or (V, N, C)."""
        if "logits" not in self.metadata:
            raise ValueError(f"loss: metadata must hold 'logits' of a classifier, got {sorted(self.metadata)}.")
        logits = self.metadata["logits"].to(self.z_VND.dtype)
        if logits.ndim == 2 and len(logits) == self.num_scans:
            return logits.repeat(self.num_views, 1)
        if logits.ndim == 3 and logits.shape[:2] == (self.num_views, self.num_scans):
            return logits.flatten(0, 1)
        raise ValueError(
            f"loss: metadata 'logits' must have shape {(self.num_scans, 'classes')} or "
            f"{(self.num_views, self.num_scans, 'classes')}, got {tuple(logits.shape)}."
        )

    def labels(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Metadata values of every row, by name."""
        return {name: self.label(name) for name in names}

    @cached_property
    def similarity(self) -> Tensor:
        """Similarities z_i.z_j. Only for losses that give it a symmetric gradient; the others take ``any_similarity``."""
        similarity_RR: Tensor = _Similarity.apply(self.rows, None)  # type: ignore[no-untyped-call]
        return similarity_RR

    @cached_property
    def any_similarity(self) -> Tensor:
        """The same matrix for a loss whose gradient in it need not be symmetric."""
        similarity_RR: Tensor = _Similarity.apply(self.rows, self.similarity.detach())  # type: ignore[no-untyped-call]
        return similarity_RR

    def by_view(self, values: Tensor) -> Tensor:
        """Values of every row, (R, ...), as (V, N, ...)."""
        return values.view(self.num_views, self.num_scans, *values.shape[1:])

    def fill_own_(self, matrix_RR: Tensor, value: float) -> Tensor:
        """Set, in place, the entries of two rows of one scan, the row itself among them."""
        shape = (self.num_views, self.num_scans, self.num_views, self.num_scans)
        matrix_RR.view(shape).diagonal(dim1=1, dim2=3).fill_(value)
        return matrix_RR

    def own_similarity(self) -> Tensor:
        """Mean similarity of every row to the other views of its scan; there must be some."""
        rows_VND = self.by_view(self.rows)
        to_all_VN = (rows_VND * rows_VND.sum(dim=0)).sum(dim=2)
        to_itself_VN = rows_VND.square().sum(dim=2)
        return ((to_all_VN - to_itself_VN) / (self.num_views - 1)).flatten()

    def pair_weights(self, kernel: Kernel) -> Tensor:
        """Pair weights of a label kernel; two views of one scan weigh its peak, labelled or not, a row is no pair of itself."""
        return self.fill_own_(self.kernel_weights(kernel), kernel.peak).fill_diagonal_(0.0)

    def kernel_weights(self, kernel: Kernel) -> Tensor:
        """Weights of a label kernel between rows, (R, R), as the labels alone have it."""
        if all(self.metadata[name].ndim == 1 for name in kernel.labels if name in self.metadata):
            # The views of a scan share its labels: the weights of scans, tiled.
            labels = {name: values[: self.num_scans] for name, values in self.labels(kernel.labels).items()}
            return kernel.weights(labels).to(self.z_VND.dtype).repeat(self.num_views, self.num_views)
        return kernel.weights(self.labels(kernel.labels)).to(self.z_VND.dtype)

    def zero(self) -> Tensor:
        """0, with a gradient of zeros, unless an embedding is not a number."""
        return (self.rows * 0.0).sum()


class Objective(ABC):
    """A loss of V views of the scans of a batch; subclasses are frozen dataclasses of their hyper-parameters.

    ``couples_scans`` says whether the gradient at one scan depends on another: then DP-SGD on single scans is void.
    """

    couples_scans: ClassVar[bool] = True

    def __call__(self, z1_ND: Tensor, z2_ND: Tensor, metadata: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss, a scalar, of two views (N, D) each, with the scans' metadata: (N,) values by name, NaN where unknown."""
        return self.of(EmbeddedViews((z1_ND, z2_ND), metadata))

    def of(self, views: EmbeddedViews) -> Tensor:
        """The loss, a scalar, of any number of views; losses of one step share what they compute of them."""
        with torch.autocast(views.views[0].device.type, enabled=False):
            return self.loss(views)

    @abstractmethod
    def loss(self, views: EmbeddedViews) -> Tensor:
        """The loss, a scalar, in float32 or float64."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the metadata that the loss reads."""
        return ()


def log_sum_exp(
    views: EmbeddedViews,
    exponent: float | Tensor,
    factor_RR: Tensor | None = None,
    *,
    shift: float = 0.0,
    largest: float | None = None,
) -> Tensor:
    """Log sum_j f_ij exp(c_ij (s_ij - shift)) of every anchor, (R,); very low, not infinite, over nothing.

    Args:
        views: whose similarities s.
        exponent: c, one number (an inverse temperature) or symmetric constants (R, R).
        factor_RR: f, symmetric constants, 0 or positive; 0 leaves a pair out. Without: 1 for all but the anchor itself.
        shift: subtracted from the similarities.
        largest: bound of c (s - shift) in absolute value; without: c.
    """
    return draw_and_repel(views, None, exponent, factor_RR, shift=shift, largest=largest)[1]


def draw_and_repel(
    views: EmbeddedViews,
    weights_RR: Tensor | None,
    exponent: float | Tensor,
    factor_RR: Tensor | None = None,
    *,
    shift: float = 0.0,
    largest: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum_j w_ij s_ij of every anchor, (R,), and `log_sum_exp`, in one go; the weights are symmetric constants."""
    bound = exponent if largest is None else largest
    assert isinstance(bound, float)
    if bound <= SAFE_EXPONENT:
        drawn_R, sum_R = _DrawAndRepel.apply(views.similarity, weights_RR, exponent, factor_RR, shift)  # type: ignore[no-untyped-call]
        nothing_R = sum_R == 0
        lowest = math.log(torch.finfo(sum_R.dtype).tiny)
        return drawn_R, torch.where(nothing_R, lowest, torch.where(nothing_R, 1.0, sum_R).log())
    logits_RR = (views.any_similarity - shift) * exponent
    if factor_RR is None:
        factor_RR = torch.ones_like(logits_RR, requires_grad=False).fill_diagonal_(0.0)
    drawn_R = torch.zeros_like(logits_RR[0]) if weights_RR is None else (views.any_similarity * weights_RR).sum(dim=1)
    return drawn_R, torch.logsumexp(logits_RR + factor_RR.log().clamp_min(-LOWEST), dim=1)


def log_add_exp(one: Tensor, other: Tensor) -> Tensor:
    """Log(e^one + e^other), with finite derivatives of every order also where ``other`` stands for nothing."""
    return one - torch.nn.functional.logsigmoid(one - other)


def weighted_cross_entropy(weights_RR: Tensor, drawn_R: Tensor, log_partition_R: Tensor, temperature: float) -> Tensor:
    """Log-partition minus the weighted mean logit of the positives, of every anchor, (R,); 0 for an anchor without any."""
    size_R = weights_RR.sum(dim=1)
    logit_R = drawn_R / (temperature * torch.where(size_R > 0, size_R, 1.0))
    return torch.where(size_R > 0, log_partition_R - logit_R, 0.0)


def margin_loss(views: EmbeddedViews, temperature: float, positives_RR: Tensor, margin: float, guard: float = 0.0) -> Tensor:
    """Sum over an anchor's positives of -log [ e^{l_ip} / ( e^{l_ip - margin} + sum_N e^{l_in} + guard ) ], (R,).

    Args:
        views: whose logits l = s / temperature.
        temperature: positive.
        positives_RR: symmetric zeros and ones, 0 on the diagonal; the negatives N are the other pairs.
        margin: in units of the logit.
        guard: added to the sum, 0 or positive.
    """
    if (1.0 + margin * temperature) / temperature <= SAFE_EXPONENT:
        sum_R: Tensor = _MarginLoss.apply(views.similarity, 1.0 / temperature, positives_RR, math.exp(margin), guard)  # type: ignore[no-untyped-call]
        return sum_R - margin * positives_RR.sum(dim=1)
    negatives_RR = (1.0 - positives_RR).fill_diagonal_(0.0)
    log_negatives_R = log_sum_exp(views, 1.0 / temperature, negatives_RR)
    if guard:
        log_negatives_R = log_add_exp(log_negatives_R.new_tensor(math.log(guard)), log_negatives_R)
    logits_RR = views.any_similarity / temperature
    return (positives_RR * (log_add_exp(logits_RR - margin, log_negatives_R[:, None]) - logits_RR)).sum(dim=1)


def group_moments(views: EmbeddedViews, weights_RR: Tensor, groups_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Sum_j w_ij s_ij and sum_j w_ij s_ij^2 over the rows j of each group, (R, B) each, for every anchor.

    Args:
        views: whose similarities s.
        weights_RR: symmetric constants.
        groups_RB: 1 where a row belongs to a group.
    """
    first_RB, second_RB = _GroupMoments.apply(views.similarity, weights_RR, groups_RB)  # type: ignore[no-untyped-call]
    return first_RB, second_RB


class _Similarity(torch.autograd.Function):
    """rows rows^T. Without ``known`` the gradient that comes back is taken to be symmetric."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, known_RR: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows_RD)
        ctx.symmetric = known_RR is None
        if known_RR is not None:
            return known_RR.view_as(known_RR)
        with torch.autocast(rows_RD.device.type, enabled=False):
            return rows_RD @ rows_RD.T

    @staticmethod
    def backward(ctx: Any, gradient_RR: Tensor) -> tuple[Tensor, None]:
        (rows_RD,) = ctx.saved_tensors
        with torch.autocast(rows_RD.device.type, enabled=False):
            # A derivative of this derivative brings gradients that are not symmetric any more.
            if ctx.symmetric and not torch.is_grad_enabled():
                return (gradient_RR @ rows_RD).mul_(2.0), None
            return gradient_RR @ rows_RD + gradient_RR.T @ rows_RD, None


# In the functions below a row gradient g_i f_ij goes back as (g_i + g_j) f_ij / 2. They work in place, in as few matrices as they
# can: at a thousand scans it is memory that takes the time. For a second derivative, backward() differentiates the formula
# itself; its similarities are made symmetric first, so that what comes back is symmetric too.


def _outer_sum(one_R: Tensor) -> Tensor:
    return one_R[:, None] + one_R[None, :]


def _differentiable(formula: Callable[[Tensor], Any], similarity_RR: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    outputs = formula((similarity_RR + similarity_RR.T) / 2)
    (gradient_RR,) = torch.autograd.grad(outputs, similarity_RR, gradients, create_graph=True)
    return gradient_RR


class _DrawAndRepel(torch.autograd.Function):
    """sum_j w_ij s_ij, 0 without weights, and sum_j f_ij exp(c_ij (s_ij - shift))."""

    @staticmethod
    def forward(
        ctx: Any,
        similarity_RR: Tensor,
        weights_RR: Tensor | None,
        exponent: float | Tensor,
        factor_RR: Tensor | None,
        shift: float,
    ) -> tuple[Tensor, Tensor]:
        terms_RR = torch.empty_like(similarity_RR) if weights_RR is None else similarity_RR * weights_RR
        drawn_R = terms_RR.new_zeros(len(terms_RR)) if weights_RR is None else terms_RR.sum(dim=1)
        if shift:
            torch.sub(similarity_RR, shift, out=terms_RR).mul_(exponent)
        else:
            torch.mul(similarity_RR, exponent, out=terms_RR)
        terms_RR.exp_()
        terms_RR = terms_RR.fill_diagonal_(0.0) if factor_RR is None else terms_RR.mul_(factor_RR)
        ctx.constants = weights_RR, exponent, factor_RR, shift
        ctx.save_for_backward(similarity_RR, terms_RR)
        return drawn_R, terms_RR.sum(dim=1)

    @staticmethod
    def backward(ctx: Any, to_drawn_R: Tensor, to_sum_R: Tensor) -> tuple[Tensor, None, None, None, None]:
        similarity_RR, terms_RR = ctx.saved_tensors
        weights_RR, exponent, factor_RR, shift = ctx.constants
        if torch.is_grad_enabled():
            weights = 0.0 if weights_RR is None else weights_RR
            factors = 1.0 - torch.eye(len(terms_RR)).to(terms_RR) if factor_RR is None else factor_RR

            def formula(s_RR: Tensor) -> tuple[Tensor, Tensor]:
                return (s_RR * weights).sum(dim=1), (((s_RR - shift) * exponent).exp() * factors).sum(dim=1)

            back_RR = _differentiable(formula, similarity_RR, [to_drawn_R, to_sum_R])
            return back_RR, None, None, None, None
        if isinstance(exponent, float):
            back_RR = _outer_sum(to_sum_R * (exponent / 2)).mul_(terms_RR)
        else:
            back_RR = _outer_sum(to_sum_R / 2).mul_(terms_RR).mul_(exponent)
        if weights_RR is not None:
            half_R = to_drawn_R / 2
            back_RR.addcmul_(weights_RR, half_R[:, None]).addcmul_(weights_RR, half_R[None, :])
        return back_RR, None, None, None, None


class _MarginLoss(torch.autograd.Function):
    """sum_p log(e_ip + u_i) - l_ip with l = scale s, e = exp(l), u_i = factor (sum_N e_in + guard), factor = exp(margin)."""

    @staticmethod
    def forward(ctx: Any, similarity_RR: Tensor, scale: float, positives_RR: Tensor, factor: float, guard: float) -> Tensor:
        exp_RR = (similarity_RR * scale).exp_()
        negative_RR = exp_RR * positives_RR
        negative_RR = torch.sub(exp_RR, negative_RR, out=negative_RR).fill_diagonal_(0.0)
        u_R = negative_RR.sum(dim=1).add_(guard).mul_(factor)
        ctx.constants = scale, positives_RR, factor, guard
        ctx.save_for_backward(similarity_RR, exp_RR, negative_RR, u_R)
        return (exp_RR + u_R[:, None]).log_().sub_(similarity_RR, alpha=scale).mul_(positives_RR).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient_R: Tensor) -> tuple[Tensor, None, None, None, None]:
        similarity_RR, exp_RR, negative_RR, u_R = ctx.saved_tensors
        scale, positives_RR, factor, guard = ctx.constants
        if torch.is_grad_enabled():
            negatives_RR = (1.0 - positives_RR).fill_diagonal_(0.0)

            def formula(s_RR: Tensor) -> Tensor:
                e_RR = (scale * s_RR).exp()
                u_R1 = factor * ((e_RR * negatives_RR).sum(dim=1, keepdim=True) + guard)
                per_pair_RR: Tensor = ((e_RR + u_R1).log() - scale * s_RR) * positives_RR
                return per_pair_RR.sum(dim=1)

            return _differentiable(formula, similarity_RR, [gradient_R]), None, None, None, None
        half_R = gradient_R * (scale / 2)
        # A positive in its own denominator, as seen from the anchor and from the other row; the negatives; the logit itself.
        back_RR = exp_RR + u_R[:, None]
        torch.div(positives_RR, back_RR, out=back_RR)
        to_u_R = half_R * back_RR.sum(dim=1) * factor
        other_RR = exp_RR + u_R[None, :]
        torch.div(positives_RR, other_RR, out=other_RR)
        back_RR.mul_(half_R[:, None]).addcmul_(other_RR, half_R[None, :]).mul_(exp_RR)
        back_RR.addcmul_(torch.add(to_u_R[:, None], to_u_R[None, :], out=other_RR), negative_RR)
        back_RR.addcmul_(torch.add(half_R[:, None], half_R[None, :], out=other_RR), positives_RR, value=-1.0)
        return back_RR, None, None, None, None


class _GroupMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, similarity_RR: Tensor, weights_RR: Tensor, groups_RB: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(similarity_RR, weights_RR, groups_RB)
        terms_RR = similarity_RR * weights_RR
        first_RB = terms_RR @ groups_RB
        return first_RB, terms_RR.mul_(similarity_RR) @ groups_RB

    @staticmethod
    def backward(ctx: Any, first_RB: Tensor, second_RB: Tensor) -> tuple[Tensor, None, None]:
        similarity_RR, weights_RR, groups_RB = ctx.saved_tensors

        def factors(gradient_RB: Tensor) -> tuple[Tensor, Tensor]:
            """Of gradient groups^T + groups gradient^T, one product."""
            return torch.cat([gradient_RB, groups_RB], dim=1), torch.cat([groups_RB, gradient_RB], dim=1).T

        with torch.autocast(similarity_RR.device.type, enabled=False):
            if torch.is_grad_enabled():

                def formula(s_RR: Tensor) -> tuple[Tensor, Tensor]:
                    return (s_RR * weights_RR) @ groups_RB, (s_RR.square() * weights_RR) @ groups_RB

                return _differentiable(formula, similarity_RR, [first_RB, second_RB]), None, None
            back_RR = torch.mm(*factors(second_RB)).mul_(similarity_RR)
            return back_RR.addmm_(*factors(first_RB / 2)).mul_(weights_RR), None, None
