"""What takes how long, side by side with what one would otherwise write or install: `python -m simulations.speed --help`.

Ours and theirs are first checked to agree in loss and gradient, then timed in turn in one run, forward and backward, so that a
busy machine slows both alike. "paper" is the formula of the paper in ordinary torch, below, with the structure of the authors'
code: the whole matrix of similarities, masks or weights over it, and autograd for the rest.

Shape legend: N scans, R = 2 N rows (all first views, then all second views), D embedding size.
"""

import gc
import importlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

from core.losses import (
    BarlowTwins,
    DecoupledUniformity,
    EmbeddedViews,
    EnD,
    EpsSupInfoNCE,
    Exp,
    FairKL,
    InfoNCE,
    Kernel,
    NTXent,
    SupCon,
    Threshold,
    YAware,
)

if TYPE_CHECKING:
    from rich.table import Table

Metadata = Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor, Metadata], Tensor]

EMBEDDING_SIZE = 128
TOLERANCE = 1e-4  # relative, in float32, of the loss and of the gradient
TEMPERATURE = 0.1
MARGIN = 0.25
BANDWIDTH_YEARS = 5.0
REDUNDANCY_WEIGHT = 0.0051
UNIFORMITY_SCALE = 2.0
VARIANCE_FLOOR = 1e-2
LEAST_PAIRS = 4.0  # of an anchor and a side, for FairKL to count it


def to_rows(z1_ND: Tensor, z2_ND: Tensor) -> Tensor:
    """Both views below each other, at unit length."""
    return functional.normalize(torch.cat([z1_ND, z2_ND]), dim=1)


def similarities(z1_ND: Tensor, z2_ND: Tensor) -> Tensor:
    """Of every row to every row, (R, R)."""
    rows_RD = to_rows(z1_ND, z2_ND)
    return rows_RD @ rows_RD.T


def itself(matrix_RR: Tensor) -> Tensor:
    """Mask of the pairs of a row with itself."""
    return torch.eye(len(matrix_RR), dtype=torch.bool)


def equal(values_N: Tensor) -> Tensor:
    """Mask of the pairs of rows that share a value, such as a class."""
    values_R = values_N.repeat(2)
    return values_R[:, None] == values_R[None, :]


def likeness(values_N: Tensor) -> Tensor:
    """Gaussian kernel of a label in years over the pairs of rows."""
    values_R = values_N.repeat(2)
    return torch.exp(-((values_R[:, None] - values_R[None, :]) ** 2) / (2 * BANDWIDTH_YEARS**2))


def ntxent(z1_ND: Tensor, z2_ND: Tensor, _: Metadata) -> Tensor:
    """NT-Xent: cross-entropy of finding the other view among all rows but the anchor (Chen et al. 2020, eq. 1)."""
    logits_RR = similarities(z1_ND, z2_ND) / TEMPERATURE
    logits_RR = logits_RR.masked_fill(itself(logits_RR), -torch.inf)
    other_view_R = torch.arange(len(logits_RR)).roll(len(z1_ND))
    return functional.cross_entropy(logits_RR, other_view_R)


def dcl(z1_ND: Tensor, z2_ND: Tensor, _: Metadata) -> Tensor:
    """Decoupled contrastive learning: NT-Xent without the positive in its denominator (Yeh et al., ECCV 2022, eq. 6)."""
    logits_RR = similarities(z1_ND, z2_ND) / TEMPERATURE
    same_scan_RR = equal(torch.arange(len(z1_ND)))
    positive_R = logits_RR.diagonal(len(z1_ND)).repeat(2)
    return (torch.logsumexp(logits_RR.masked_fill(same_scan_RR, -torch.inf), dim=1) - positive_R).mean()


def supcon(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """SupCon: mean log-softmax of the rows of the anchor's class (Khosla et al. 2020, eq. 2)."""
    logits_RR = similarities(z1_ND, z2_ND) / TEMPERATURE
    logits_RR = logits_RR - logits_RR.max(dim=1, keepdim=True).values.detach()
    others_RR = (~itself(logits_RR)).float()
    positives_RR = equal(metadata["diagnosis"]).float() * others_RR
    log_softmax_RR = logits_RR - torch.log((torch.exp(logits_RR) * others_RR).sum(dim=1, keepdim=True))
    return -((positives_RR * log_softmax_RR).sum(dim=1) / positives_RR.sum(dim=1)).mean()


def eps_supinfonce(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """epsilon-SupInfoNCE: every positive against the negatives, at a margin (Barbano et al., ICLR 2023, eq. 9)."""
    logits_RR = similarities(z1_ND, z2_ND) / TEMPERATURE
    logits_RR = logits_RR - logits_RR.max(dim=1, keepdim=True).values.detach()
    same_class_RR = equal(metadata["diagnosis"])
    positives_RR = same_class_RR.float() * (~itself(logits_RR)).float()
    negatives_R1 = (torch.exp(logits_RR) * (~same_class_RR).float()).sum(dim=1, keepdim=True)
    log_share_RR = logits_RR - torch.log(torch.exp(logits_RR - MARGIN) + negatives_R1)
    return -((positives_RR * log_share_RR).sum(dim=1) / positives_RR.sum(dim=1)).mean()


def yaware(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """y-aware InfoNCE: log-softmax weighted by the likeness of ages (Dufumier et al., MICCAI 2021, eq. 2)."""
    logits_RR = similarities(z1_ND, z2_ND) / TEMPERATURE
    itself_RR = itself(logits_RR)
    weights_RR = likeness(metadata["age_years"]).masked_fill(itself_RR, 0.0)
    weights_RR = weights_RR / weights_RR.sum(dim=1, keepdim=True)
    log_softmax_RR = torch.log_softmax(logits_RR.masked_fill(itself_RR, -torch.inf), dim=1)
    return -(weights_RR * log_softmax_RR.masked_fill(itself_RR, 0.0)).sum(dim=1).mean()


def l_exp(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """L^exp: the more alike two ages, the less a pair repels (Barbano et al., ISBI 2023, eq. 6; shifted as in the code)."""
    logits_RR = similarities(z1_ND, z2_ND) / TEMPERATURE
    logits_RR = logits_RR - logits_RR.max(dim=1, keepdim=True).values.detach()
    weights_RR = likeness(metadata["age_years"])
    repulsion_RR = torch.exp(logits_RR * (1 - weights_RR)).masked_fill(itself(logits_RR), 0.0)
    weights_RR = weights_RR.masked_fill(itself(logits_RR), 0.0)
    log_share_RR = logits_RR - torch.log(repulsion_RR.sum(dim=1, keepdim=True))
    return -((weights_RR * log_share_RR).sum(dim=1) / weights_RR.sum(dim=1)).mean()


def threshold(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """L^thr: k competes with the rows less like the anchor than itself (Barbano et al., ISBI 2023, eq. 5), in R^3 memory."""
    logits_RR = similarities(z1_ND, z2_ND) / TEMPERATURE
    itself_RR = itself(logits_RR)
    weights_RR = likeness(metadata["age_years"]).masked_fill(itself_RR, 0.0)
    less_alike_RRR = (weights_RR[:, None, :] < weights_RR[:, :, None]) & ~itself_RR[:, None, :]
    repulsion_RR = (torch.exp(logits_RR)[:, None, :] * less_alike_RRR).sum(dim=2)
    repels_RR = less_alike_RRR.any(dim=2)
    terms_RR = torch.where(repels_RR, torch.where(repels_RR, repulsion_RR, 1.0).log() - logits_RR, 0.0)
    return ((weights_RR * terms_RR).sum(dim=1) / weights_RR.sum(dim=1)).mean()


def decoupled_uniformity(z1_ND: Tensor, z2_ND: Tensor, _: Metadata) -> Tensor:
    """Decoupled uniformity: distances between the means of the views (Dufumier et al., ICML 2023, eq. 3)."""
    centroids_ND = (functional.normalize(z1_ND, dim=1) + functional.normalize(z2_ND, dim=1)) / 2
    return functional.pdist(centroids_ND).pow(2).mul(-UNIFORMITY_SCALE).exp().mean().log()


def barlow_twins(z1_ND: Tensor, z2_ND: Tensor, _: Metadata) -> Tensor:
    """Barlow Twins: the correlations of the features of two views (Zbontar et al., ICML 2021, eq. 1)."""
    one_ND, two_ND = (functional.batch_norm(z_ND, None, None, training=True) for z_ND in (z1_ND, z2_ND))
    correlation_DD = one_ND.T @ two_ND / len(z1_ND)
    on_diagonal = (correlation_DD.diagonal() - 1).pow(2).sum()
    off_diagonal = correlation_DD.masked_fill(itself(correlation_DD), 0.0).pow(2).sum()
    return on_diagonal + REDUNDANCY_WEIGHT * off_diagonal


def weighted_fairkl(similarity_RR: Tensor, weights_RR: Tensor, metadata: Metadata) -> Tensor:
    """KL of Gaussians fitted to bias-aligned and to bias-conflicting pairs of each anchor (Barbano et al., ICLR 2023, eq. 10)."""
    aligned_RR = equal(metadata["scanner"])
    pairs_RR = ~equal(torch.arange(len(metadata["scanner"])))
    total = torch.zeros(())
    for sign_RR in (weights_RR, 1 - weights_RR):
        sizes, means, variances = [], [], []
        for side_RR in (aligned_RR, ~aligned_RR):
            share_RR = sign_RR * (side_RR & pairs_RR)
            size_R = share_RR.sum(dim=1)
            mean_R = (share_RR * similarity_RR).sum(dim=1) / size_R.clamp_min(1.0)
            variance_R = (share_RR * (similarity_RR - mean_R[:, None]) ** 2).sum(dim=1) / size_R.clamp_min(1.0)
            sizes.append(size_R)
            means.append(mean_R)
            variances.append(variance_R + VARIANCE_FLOOR)
        (v_a, v_c), gap_R = variances, means[0] - means[1]
        kl_R = 0.5 * ((v_a + gap_R**2) / v_c - torch.log(v_a / v_c) - 1)
        counts_R = (sizes[0] >= LEAST_PAIRS) & (sizes[1] >= LEAST_PAIRS)
        total = total + kl_R[counts_R].sum() / counts_R.sum().clamp_min(1)
    return total


def fairkl_of_age(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """FairKL of scanners, at ages alike and unlike."""
    return weighted_fairkl(similarities(z1_ND, z2_ND), likeness(metadata["age_years"]), metadata)


def eps_supinfonce_and_fairkl(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """Both losses of Barbano et al. (ICLR 2023), added: FairKL of scanners, at equal diagnoses and at others."""
    fairkl = weighted_fairkl(similarities(z1_ND, z2_ND), equal(metadata["diagnosis"]).float(), metadata)
    return eps_supinfonce(z1_ND, z2_ND, metadata) + fairkl


def end(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """EnD: scanners disentangled one by one, diagnoses entangled across them (Tartaglione et al., CVPR 2021, eqs. 4-6)."""
    similarity_RR = similarities(z1_ND, z2_ND)
    later_RR = (~equal(torch.arange(len(z1_ND)))).tril(diagonal=-1)
    bias_R = metadata["scanner"].repeat(2)
    disentangle, num_aligned = torch.zeros(()), torch.zeros(())
    for bias in torch.unique(bias_R):
        has_R = bias_R == bias
        aligned_RR = (has_R[:, None] & has_R[None, :] & later_RR).float()
        disentangle = disentangle + (similarity_RR * aligned_RR).sum().abs()
        num_aligned = num_aligned + aligned_RR.sum()
    entangled_RR = (equal(metadata["diagnosis"]) & ~equal(metadata["scanner"]) & later_RR).float()
    entangle = 1 - (entangled_RR * (1 + similarity_RR) / 2).sum() / entangled_RR.sum()
    return disentangle / num_aligned + entangle


_EPS = EpsSupInfoNCE(temperature=TEMPERATURE, margin=MARGIN, label="diagnosis")
_FAIRKL = FairKL(
    kernel=Kernel(bandwidths={"diagnosis": 0}), bias="scanner", min_weight=LEAST_PAIRS, variance_floor=VARIANCE_FLOOR
)


def our_eps_supinfonce_and_fairkl(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
    """Ours of the two losses, on one matrix of similarities."""
    views = EmbeddedViews((z1_ND, z2_ND), metadata)
    return _EPS.of(views) + _FAIRKL.of(views)


_KERNEL = Kernel(bandwidths={"age_years": BANDWIDTH_YEARS})
OURS: dict[str, Loss] = {
    "ntxent": NTXent(temperature=TEMPERATURE),
    "dcl": InfoNCE(temperature=TEMPERATURE, margin=math.inf),
    "supcon": SupCon(temperature=TEMPERATURE, label="diagnosis"),
    "eps_supinfonce": _EPS,
    "yaware": YAware(temperature=TEMPERATURE, kernel=_KERNEL),
    "exp": Exp(temperature=TEMPERATURE, kernel=_KERNEL),
    "threshold": Threshold(temperature=TEMPERATURE, kernel=_KERNEL),
    "decoupled_uniformity": DecoupledUniformity(scale=UNIFORMITY_SCALE),
    "barlow_twins": BarlowTwins(redundancy_weight=REDUNDANCY_WEIGHT),
    "fairkl": FairKL(kernel=_KERNEL, bias="scanner", min_weight=LEAST_PAIRS, variance_floor=VARIANCE_FLOOR),
    "eps_supinfonce+fairkl": our_eps_supinfonce_and_fairkl,
    "end": EnD(label="diagnosis", bias="scanner"),
}
PAPER: dict[str, Loss] = {
    "ntxent": ntxent,
    "dcl": dcl,
    "supcon": supcon,
    "eps_supinfonce": eps_supinfonce,
    "yaware": yaware,
    "exp": l_exp,
    "threshold": threshold,
    "decoupled_uniformity": decoupled_uniformity,
    "barlow_twins": barlow_twins,
    "fairkl": fairkl_of_age,
    "eps_supinfonce+fairkl": eps_supinfonce_and_fairkl,
    "end": end,
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One of our losses and the same loss by another hand.

    Attributes:
        name: of the loss.
        against: whose the other one is: "paper" or a package.
        ours: called with two views and metadata.
        theirs: the same.
        most_scans: what memory allows the other one; None: any number.
    """

    name: str
    against: str
    ours: Loss
    theirs: Loss
    most_scans: int | None = None


@cache
def declare_torchvision_operators() -> torch.library.Library:
    """Let a torchvision that was built for another torch be imported: lightly imports it, the losses here do not use it."""
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library  # cached: the operators live as long as it does


def lightly_pairs() -> list[Pair]:
    """Against lightly's losses; ImportError without lightly."""
    try:
        lightly: Any = importlib.import_module("lightly.loss")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        declare_torchvision_operators()
        lightly = importlib.import_module("lightly.loss")
    theirs = {
        "ntxent": lightly.NTXentLoss(temperature=TEMPERATURE),
        "dcl": lightly.DCLLoss(temperature=TEMPERATURE),
        "barlow_twins": lightly.BarlowTwinsLoss(lambda_param=REDUNDANCY_WEIGHT),
    }

    def without_metadata(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        return lambda z1_ND, z2_ND, _: loss(z1_ND, z2_ND)

    return [Pair(name=name, against="lightly", ours=OURS[name], theirs=without_metadata(loss)) for name, loss in theirs.items()]


def metric_learning_pairs() -> list[Pair]:
    """Against the losses of pytorch-metric-learning; ImportError without it."""
    losses: Any = importlib.import_module("pytorch_metric_learning.losses")
    by_class, by_scan = losses.SupConLoss(temperature=TEMPERATURE), losses.NTXentLoss(temperature=TEMPERATURE)

    def their_supcon(z1_ND: Tensor, z2_ND: Tensor, metadata: Metadata) -> Tensor:
        loss: Tensor = by_class(torch.cat([z1_ND, z2_ND]), metadata["diagnosis"].repeat(2))
        return loss

    def their_ntxent(z1_ND: Tensor, z2_ND: Tensor, _: Metadata) -> Tensor:
        loss: Tensor = by_scan(torch.cat([z1_ND, z2_ND]), torch.arange(len(z1_ND)).repeat(2))
        return loss

    against = "pytorch-metric-learning"
    return [
        Pair(name="supcon", against=against, ours=OURS["supcon"], theirs=their_supcon),
        Pair(name="ntxent", against=against, ours=OURS["ntxent"], theirs=their_ntxent, most_scans=256),
    ]


def all_pairs() -> tuple[list[Pair], list[str]]:
    """Every pair that can be measured here, and a note for each package that is not installed."""
    pairs = [
        Pair(name=name, against="paper", ours=OURS[name], theirs=theirs, most_scans=256 if name == "threshold" else None)
        for name, theirs in PAPER.items()
    ]
    notes = []
    for package, pairs_of in (("lightly", lightly_pairs), ("pytorch-metric-learning", metric_learning_pairs)):
        try:
            pairs += pairs_of()
        except ImportError:
            notes.append(f"{package}: not installed (pip install {package})")
    return sorted(pairs, key=lambda pair: list(OURS).index(pair.name)), notes


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Two views of N scans, (N, D) each, and their metadata."""

    z1: Tensor
    z2: Tensor
    metadata: Metadata

    @classmethod
    def random(cls, num_scans: int, seed: int = 0) -> "Batch":
        """Views that resemble each other, ages between 20 and 80, two diagnoses, four scanners."""
        generator = torch.Generator().manual_seed(seed)
        scans_ND, *noises = (torch.randn(num_scans, EMBEDDING_SIZE, generator=generator) for _ in range(3))
        z1, z2 = (scans_ND + noise_ND for noise_ND in noises)
        metadata = {
            # Of whole quarters of a year the differences are exact, so that both sides of a pair see the same ties.
            "age_years": torch.randint(80, 320, (num_scans,), generator=generator) / 4,
            "diagnosis": torch.randint(2, (num_scans,), generator=generator),
            "scanner": torch.randint(4, (num_scans,), generator=generator),
        }
        return cls(z1=z1.requires_grad_(), z2=z2.requires_grad_(), metadata=metadata)


def forward_and_backward(loss: Loss, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, (2 N, D)."""
    value = loss(batch.z1, batch.z2, batch.metadata)
    return value.detach(), torch.cat(torch.autograd.grad(value, (batch.z1, batch.z2)))


class DisagreementError(RuntimeError):
    """Two losses that should be one are not."""


def check_agreement(pair: Pair, batch: Batch) -> None:
    """Raise DisagreementError unless losses and gradients are equal to a relative 1e-4, or if there is no gradient to compare."""
    ours, theirs = (forward_and_backward(loss, batch) for loss in (pair.ours, pair.theirs))
    for what, one, other in zip(("loss", "gradient"), ours, theirs, strict=True):
        difference, size = float((one - other).norm()), float(other.norm())
        # Written so that what is not a number fails.
        if not (size > 0 and difference <= TOLERANCE * size):
            raise DisagreementError(
                f"speed: the {what} of {pair.name} must be that of {pair.against} to a relative {TOLERANCE:g}, "
                f"got a difference of {difference:.3g} at a size of {size:.3g} ({len(batch.z1)} scans)."
            )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians of one pair, in milliseconds, and of the ratios of the turns, theirs over ours, with 10th and 90th percentile."""

    loss: str
    against: str
    num_scans: int
    repeats: int
    ours_ms: float
    theirs_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float


def measure(pair: Pair, batch: Batch, repeats: int, seconds: float) -> Timing:
    """Check that both agree, which warms them up, then time them in turn: ``repeats`` times, and on for ``seconds``."""
    check_agreement(pair, batch)
    taken: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(taken) < repeats or time.perf_counter() - started < seconds:
        taken.append((_milliseconds(pair.ours, batch), _milliseconds(pair.theirs, batch)))
    ours_ms, theirs_ms = torch.tensor(taken, dtype=torch.float64).unbind(dim=1)
    p10, ratio, p90 = (theirs_ms / ours_ms).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Timing(
        loss=pair.name,
        against=pair.against,
        num_scans=len(batch.z1),
        repeats=len(taken),
        ours_ms=float(ours_ms.quantile(0.5)),
        theirs_ms=float(theirs_ms.quantile(0.5)),
        ratio=ratio,
        ratio_p10=p10,
        ratio_p90=p90,
    )


def _milliseconds(loss: Loss, batch: Batch) -> float:
    # Of the processor: the turns of other programs are not counted. On one thread of an idle machine it is what a clock shows.
    started = time.process_time()
    forward_and_backward(loss, batch)
    return 1e3 * (time.process_time() - started)


def compare_losses(
    sizes: Sequence[int],
    *,
    only: Sequence[str] = (),
    repeats: int = 5,
    seconds: float = 1.5,
    on_pair: Callable[[str, int, int], None] = lambda _text, _done, _total: None,
) -> tuple[list[Timing], list[str]]:
    """Timings of every pair at every size, and notes on what was left out.

    Args:
        sizes: numbers of scans.
        only: names of the losses to measure; empty for all.
        repeats: of every pair at least.
        seconds: and on for as long.
        on_pair: told before each pair: what comes, how many are done, how many there are.

    Raises:
        DisagreementError: where ours and theirs differ.
    """
    pairs, notes = all_pairs()
    pairs = [pair for pair in pairs if not only or pair.name in only]
    batches = {size: Batch.random(size) for size in sizes}
    timings: list[Timing] = []
    chosen = [(pair, size) for pair in pairs for size in sizes if pair.most_scans is None or size <= pair.most_scans]
    for done, (pair, size) in enumerate(chosen):
        on_pair(f"{pair.name} against {pair.against}, {size} scans", done, len(chosen))
        gc.collect()  # not in the middle of a timing
        timings.append(measure(pair, batches[size], repeats, seconds))
    notes += [
        f"{pair.name} against {pair.against}: only up to {pair.most_scans} scans, beyond which theirs takes gigabytes"
        for pair in pairs
        if pair.most_scans is not None and max(sizes) > pair.most_scans
    ]
    return timings, notes


def machine_facts() -> dict[str, str | int]:
    """What the figures depend on, without saying which machine it is."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "embedding_size": EMBEDDING_SIZE,
    }


def as_table(timings: Sequence[Timing], notes: Sequence[str]) -> "Table":
    """The timings, a section for each loss."""
    from rich.table import Table

    facts = ", ".join(f"{name} {value}" for name, value in machine_facts().items())
    table = Table(title="Processor time of forward and backward of a loss of two views", caption="\n".join([facts, *notes]))
    table.add_column("loss", no_wrap=True)
    table.add_column("theirs", no_wrap=True)
    for heading in ("scans", "ours ms", "theirs ms", "theirs / ours", "10 to 90 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing, following in zip(timings, [*timings[1:], None], strict=True):
        table.add_row(
            timing.loss,
            timing.against,
            str(timing.num_scans),
            f"{timing.ours_ms:.2f}",
            f"{timing.theirs_ms:.2f}",
            f"{timing.ratio:.2f}",
            f"{timing.ratio_p10:.2f} to {timing.ratio_p90:.2f}",
            end_section=following is None or following.loss != timing.loss,
        )
    return table


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def main() -> None:
    """Measure what takes how long, side by side with what one would otherwise write or install."""


@app.command()
def losses(
    sizes: Annotated[
        list[int] | None, typer.Option(min=8, help="Scans in a batch; repeat for several.", show_default="256, 1024, 2048")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Time every pair at least so often.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="And go on for so long with every pair; 0: do not.")] = 1.5,
    only: Annotated[
        list[str] | None, typer.Option(help=f"One loss; repeat for several. One of: {', '.join(OURS)}.", show_default="all")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
) -> None:
    """Time our losses against the papers' formulas in plain torch, and against lightly and pytorch-metric-learning.

    Two views, one thread, float32, time of the processor. Each pair must first agree in loss and gradient; then ours and theirs
    take turns, and the ratio is the median over turns: above 1, ours is faster. Packages that are not installed are left out,
    with a note.

    Example: python -m simulations.speed losses --sizes 1024 --only yaware --only exp
    """
    from rich.console import Console
    from rich.progress import Progress

    unknown = sorted(set(only or ()) - set(OURS))
    if unknown:
        raise typer.BadParameter(f"only must be one of {', '.join(OURS)}, got {', '.join(unknown)}.", param_hint="--only")
    torch.set_num_threads(1)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting")
        try:
            timings, notes = compare_losses(
                sizes or (256, 1024, 2048),
                only=only or (),
                repeats=repeats,
                seconds=seconds,
                on_pair=lambda text, done, total: bar.update(task, description=text, completed=done, total=total),
            )
        except DisagreementError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
    Console(width=120).print(as_table(timings, notes))
    if output:
        figures = {"machine": machine_facts(), "timings": [asdict(timing) for timing in timings], "notes": notes}
        output.write_text(json.dumps(figures, indent=1))
        typer.echo(f"figures: {output}")


@app.command()
def data(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of NIfTI images, a set each.", show_default="the MCIC and T1w sets of ../shared/data"),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Cached epochs of each side.")] = 5,
    first_turns: Annotated[int, typer.Option(min=1, help="First epochs of each side, from nothing.")] = 2,
    memory: Annotated[bool, typer.Option(help="Measure memory too, each size in a process of its own.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
) -> None:
    """Time how fast scans are fed to training, against MONAI's PersistentDataset and CacheDataset with the same transforms.

    An epoch gives two augmented views of every scan (views=brain) on a 1.5 mm grid. The first epoch decodes, the others are
    cached. Both sides must first make alike volumes of a scan; then all take turns in one run, and the ratios are ours over
    theirs in the same turn: above 1, ours is faster. Memory is measured in a process of its own for each number of scans.

    Example: python -m simulations.speed data mine/ --turns 3
    """
    from rich.console import Console
    from rich.progress import Progress

    from simulations import speed_data

    sets = {folder.name: speed_data.find_scans(folder) for folder in folders} if folders else speed_data.usual_sets()
    for name, paths in sets.items():
        if len(paths) < 3:
            raise typer.BadParameter(f"a set must have three scans or more, got {len(paths)} in {name}. Name another folder.")
    feeds: list[speed_data.Fed] = []
    held: dict[str, dict[speed_data.Kind, list[tuple[int, float]]]] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        for name, paths in sets.items():
            try:
                feeds += speed_data.compare_feeds(
                    name, paths, first_turns=first_turns, turns=turns, on_turn=lambda text: bar.update(task, description=text)
                )
            except ValueError as error:
                typer.echo(f"{name}: {error}", err=True)
                raise typer.Exit(1) from None
            if memory:
                bar.update(task, description=f"{name}: memory")
                held[name] = speed_data.measure_memory(paths)
    console = Console(width=120)
    console.print(speed_data.as_table(feeds))
    for name, found in held.items():
        console.print(speed_data.as_memory_table(name, found))
    console.print(", ".join(f"{key} {value}" for key, value in speed_data.facts().items()))
    if output:
        figures = {"machine": speed_data.facts(), "feeds": [asdict(feed) for feed in feeds], "memory_mb": held}
        output.write_text(json.dumps(figures, indent=1))
        typer.echo(f"figures: {output}")


@app.command()
def steps(
    turns: Annotated[int, typer.Option(min=1, help="Processes of each kind.")] = 5,
    num_steps: Annotated[int, typer.Option(min=1, help="Timed steps of a process.")] = 8,
) -> None:
    """Time steps of pretraining with the memory that a step frees kept for the next, as training does, or given back.

    The default encoder on 64 volumes of its default grid, one thread, time of the processor; the two take turns as processes of
    their own, and the ratio is given back over kept in the same turn.

    Example: python -m simulations.speed steps --turns 3
    """
    from simulations.speed_steps import in_own_process

    ratios = []
    for turn in range(1, turns + 1):
        try:
            kept, back = (in_own_process(kept=kept, num_steps=num_steps) for kept in (True, False))
        except RuntimeError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        ratios.append(back["ms"] / kept["ms"])
        typer.echo(
            f"turn {turn}: kept {kept['ms']:.0f} ms a step, {kept['faults']:.0f} page faults, {kept['mb']:.0f} MB; "
            f"given back {back['ms']:.0f} ms, {back['faults']:.0f} page faults, {back['mb']:.0f} MB"
        )
    typer.echo(f"given back / kept: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {turns} turns")


@app.command()
def deployment(
    turns: Annotated[int, typer.Option(min=1, help="Runs of each system.")] = 3,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of a run; the first is left out.")] = 4,
    override: Annotated[
        list[str] | None, typer.Option(help="A further override of our run; repeatable.", show_default="none")
    ] = None,
    wire: Annotated[bool, typer.Option(help="Count our bytes on the wire too, in a further run through a relay.")] = False,
    peers: Annotated[
        Path | None, typer.Option(help="Folder of the environment that NVFlare is installed into.", show_default="in the cache")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
) -> None:
    """Time what a round costs beside its training, deployed, against NVFlare: server and two sites as processes, over TLS.

    One step of DenseNet121 a round, all weights exchanged. Overhead is the round's time at the server less the training of the
    site that trained longest. The two take turns, and ratios are ours over NVFlare's in the same turn: below 1, ours is less.
    NVFlare is installed into an environment of its own when it is missing.

    Example: python -m simulations.speed deployment --turns 1 --rounds 3
    """
    from tempfile import TemporaryDirectory

    from rich.console import Console
    from rich.progress import Progress

    from core.data.site import default_cache_root
    from simulations import speed_deployment
    from simulations.cohort import ensure_cohort

    try:
        python = speed_deployment.peer_python(peers or default_cache_root() / "peers", lambda text: typer.echo(text, err=True))
        with TemporaryDirectory(prefix="iso-speed-") as temporary, Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting", total=None)
            run = speed_deployment.OurRun(
                cohort=Path(temporary) / "cohort",
                num_rounds=rounds,
                overrides=override or (),
                tell=lambda text: bar.update(task, description=text),
            )
            ensure_cohort(run.cohort, scale=speed_deployment.COHORT_SCALE)
            taken = speed_deployment.take_turns(turns, Path(temporary), run, python)
            counted = speed_deployment.count_on_the_wire(Path(temporary), run) if wire else None
    except speed_deployment.PeerError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    crossed = speed_deployment.payload(taken, override or (), counted)
    Console(width=120).print(speed_deployment.as_table(taken, crossed))
    typer.echo(", ".join(f"{key} {value}" for key, value in speed_deployment.facts().items()))
    if output:
        figures = {
            "machine": speed_deployment.facts(),
            "turns": [asdict(turn) for turn in taken],
            "compared": [asdict(row) for row in speed_deployment.compare(taken)],
            "payload": asdict(crossed),
        }
        output.write_text(json.dumps(figures, indent=1))
        typer.echo(f"figures: {output}")


if __name__ == "__main__":
    app()
