"""The one local loop: pretraining and fine-tuning, federated, pooled and local-only all take their steps here.

Shape legend: N scans in a batch, R = 2 N rows (first views, then second views), F features of h, D of z.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core import progress
from core.config import RunConfig
from core.data.feed import Ring, Waited, read_ahead
from core.data.sampling import DrawnBatch, subject_batches
from core.data.site import SiteData
from core.losses import EmbeddedViews
from core.memory import keep_freed_memory
from core.models import Pretrainer
from core.moments import GroupMoments, Reference
from core.seeding import generator, seed


class NotFiniteError(RuntimeError):
    """A loss left the numbers. The text names no scan and may leave the site."""


@dataclass(frozen=True)
class TrainResult:
    """What a site's local steps gave.

    Attributes:
        state: the weights that the steps trained, by name; what stays frozen is not among them.
        num_scans: scans the site trained on, its weight in the average; with DP-SGD the number of subjects.
        metrics: mean over the local steps of every term, by name.
        seconds: how long the local steps took.
        waited_s: how much of that they stood still for their data.
        num_steps: local steps that were taken; fewer than planned where a deadline ended them.
        privacy: what DP-SGD guarantees by now, as `core.privacy.Guarantee.describe` tells it; empty without.
    """

    state: dict[str, Tensor]
    num_scans: int
    metrics: dict[str, float]
    seconds: float
    waited_s: float
    num_steps: int
    privacy: dict[str, Any] = field(default_factory=dict)


def learning_rate(base: float, round_number: int, num_rounds: int, warmup_rounds: int) -> float:
    """Linear rise over the warm-up rounds, then half a cosine down; rounds count from 1."""
    if round_number <= warmup_rounds:
        return base * round_number / (warmup_rounds + 1)
    progress = (round_number - 1 - warmup_rounds) / max(1, num_rounds - warmup_rounds)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def choose_device(name: str) -> torch.device:
    """The named device, or for ``auto`` the GPU where there is one; a GPU asked for and absent is an error, never the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one this site has, got {name!r} and no GPU is visible.")
    return device


def pretraining_scans(data: SiteData, config: RunConfig) -> SiteData:
    """The scans that pretraining may see: those of healthy subjects, or all where ``data.pretrain_on`` says so."""
    return data.select(lambda scan: config.data.pretrain_on == "all" or scan.diagnosis == "control")


def mixed_precision(config: RunConfig, device: torch.device) -> torch.autocast:
    """What a model computes in: bfloat16 where the run says so, which needs no scaling of losses; its weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def take_steps(
    losses: Iterator[dict[str, Tensor]], optimiser: torch.optim.Optimizer, num_steps: int, where: str
) -> tuple[dict[str, float], int]:
    """One optimiser step for each set of weighted loss terms drawn: the mean of every term and of their sum, ``loss``; the steps.

    It ends before all are drawn when the time for it is over (`core.progress.until`), after one step at least.
    """
    keep_freed_memory()
    sums: dict[str, Tensor] = {}
    steps = 0
    for terms in losses:
        total = torch.stack(list(terms.values())).sum()
        if not total.isfinite():
            raise NotFiniteError(
                f"{where}, local step {steps + 1}: the loss must be finite, got "
                f"{ {name: float(value.detach()) for name, value in terms.items()} }. Lower learning_rate or debias.weight."
            )
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        optimiser.step()
        steps += 1
        for name, value in {"loss": total, **terms}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        if not progress.tell("step", steps, num_steps):
            break
    return {name: float(value) / steps for name, value in sums.items()}, steps


def pretraining_losses(
    model: Pretrainer,
    data: SiteData,
    config: RunConfig,
    round_number: int,
    device: torch.device,
    remote: Mapping[str, GroupMoments],
    references: Mapping[str, Reference],
    waited: Waited,
) -> Iterator[dict[str, Tensor]]:
    """Objective and FairKL of each local step of a round."""
    batches = subject_batches(
        data.scans,
        batch_size=config.batch_size,
        num_batches=config.local_steps,
        policy=config.sampling,
        generator=generator(config.seed, "batches", data.site, round_number),
    )
    view_generator = generator(config.seed, "views", data.site, round_number)
    labels = {"age_years": data.ages(), "sex": data.sexes(), "scanner": data.scanner_codes()}
    num_subjects = len({scan.subject for scan in data.scans})
    weight = config.debias.weight_in_round(round_number)

    ring, viewed = Ring(), torch.empty(0)

    def read(batch: DrawnBatch) -> Tensor:
        return data.read(batch.first if batch.second == batch.first else batch.first + batch.second, device, ring)

    for batch, stored in read_ahead(batches, read, waited):
        inputs = data.on_device(stored, device)
        first, second = inputs[: len(batch)], inputs[-len(batch) :]
        metadata = {name: label[batch.first].to(device) for name, label in labels.items()}
        if batch.second != batch.first:
            metadata = {name: torch.stack([value, labels[name][batch.second].to(device)]) for name, value in metadata.items()}
        drawn = [config.views.draw(first.shape, view_generator) for _ in range(2)]
        if viewed.shape != (2 * len(batch), *first.shape[1:]):
            viewed = first.new_empty(2 * len(batch), *first.shape[1:])
        for view, images, out in zip(drawn, (first, second), viewed.chunk(2), strict=True):
            view.apply(images, model.encoder.input_scale, out)
        with mixed_precision(config, device):
            h_RF, z_RD = model(viewed)
        h_RF, z_RD = h_RF.float(), z_RD.float()
        if model.classifier is not None:
            metadata["logits"] = torch.stack(model.classifier(h_RF).chunk(2))
        embedded = EmbeddedViews(z_RD.chunk(2), metadata)
        terms = {"objective": config.objective.of(embedded)}
        if weight > 0:
            fairkl = config.debias.fairkl()
            scale = len(batch) / num_subjects
            divergences = []
            for space in config.debias.spaces:
                views = EmbeddedViews(h_RF.chunk(2), metadata) if space == "h" else embedded
                if space in references:
                    views = EmbeddedViews(references[space].rows(views.z_VND.flatten(0, 1)).chunk(2), metadata)
                divergences.append(fairkl.of(views, remote.get(space), scale))
            terms["fairkl"] = weight * torch.stack(divergences).sum()
        yield terms


def pretrain(
    model: Pretrainer,
    data: SiteData,
    config: RunConfig,
    *,
    round_number: int,
    device: torch.device,
    remote: Mapping[str, GroupMoments] | None = None,
    references: Mapping[str, Reference] | None = None,
) -> TrainResult:
    """A round's local steps on one site's scans; the model is trained in place.

    The optimiser starts afresh every round, so a round depends on nothing but the weights it receives: sites keep no state,
    and a resumed run equals one never stopped.

    Args:
        model: encoder and projector with the round's weights, on ``device``.
        data: the site's scans.
        config: the run's.
        round_number: counts from 1.
        device: where to compute.
        remote: moments of the other sites' groups, for FairKL across sites, by space ("h" or "z").
        references: what the features of a space are standardised by before FairKL, here and in ``remote``.

    Raises:
        NotFiniteError: a loss was NaN or infinite.
    """
    torch.manual_seed(seed(config.seed, "pretrain", data.site, round_number))
    rate = learning_rate(config.learning_rate, round_number, config.num_rounds, config.warmup_rounds)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=config.weight_decay)
    model.train()
    waited, started = Waited(), time.perf_counter()
    losses = pretraining_losses(model, data, config, round_number, device, remote or {}, references or {}, waited)
    metrics, steps = take_steps(losses, optimiser, config.local_steps, f"site {data.site}, round {round_number}")
    return TrainResult(dict(model.state_dict()), len(data), metrics, time.perf_counter() - started, waited.seconds, steps)


@torch.no_grad()
def embed(
    model: nn.Module,
    data: SiteData,
    device: torch.device,
    *,
    batch_size: int = 32,
    view: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Outputs of the model in evaluation mode for each scan as it is, without views, on the CPU; one tensor an output.

    Args:
        model: gives a tensor, or several.
        data: the scans.
        device: where to compute.
        batch_size: scans at once.
        view: of a batch of inputs, (B, C, *grid) or (B, I), to be used instead of them.
    """
    keep_freed_memory()
    model.eval()
    outputs: list[tuple[Tensor, ...]] = []
    for start in range(0, max(1, len(data)), batch_size):
        inputs = data.inputs(range(start, min(start + batch_size, len(data))), device)
        if view is not None and len(inputs):
            inputs = view(inputs)
        # Not every net takes a batch of none: one blank scan tells the widths of the outputs.
        result = model(inputs if len(inputs) else inputs.new_zeros(1, *inputs.shape[1:]))
        rows = result if isinstance(result, tuple) else (result,)
        outputs.append(tuple(row[: len(inputs)] for row in rows))
        progress.tell("scan", min(start + batch_size, len(data)), len(data))
    return tuple(torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
