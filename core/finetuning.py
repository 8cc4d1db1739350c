"""Encoder and head on labelled scans: linear probe, full fine-tuning, from scratch."""

import time
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from core.config import RunConfig
from core.data.feed import Ring, Waited, read_ahead
from core.data.sampling import SamplingPolicy, subject_batches
from core.data.site import SiteData
from core.models import Classifier
from core.seeding import generator, seed
from core.training import TrainResult, learning_rate, take_steps

Stage = Literal["linear_probe", "full_finetuning", "from_scratch"]
CLASSES = ("control", "patient")


def diagnosis_codes(data: SiteData) -> Tensor:
    """(N,) class of each scan: 0 control, 1 patient."""
    return torch.tensor([CLASSES.index(scan.diagnosis) for scan in data.scans])


def finetuning_losses(
    model: Classifier, data: SiteData, config: RunConfig, stage: Stage, round_number: int, device: torch.device, waited: Waited
) -> Iterator[dict[str, Tensor]]:
    """Cross-entropy of each local step of a round, classes weighted alike; a linear probe sees the scans as they are."""
    purpose = (stage, data.site, round_number)
    batches = subject_batches(
        data.scans,
        batch_size=config.finetune.batch_size,
        num_batches=config.finetune.local_steps,
        policy=SamplingPolicy(),
        generator=generator(config.seed, "batches", *purpose),
    )
    view_generator = generator(config.seed, "views", *purpose)
    labels = diagnosis_codes(data)
    weights = (len(labels) / (2 * labels.bincount(minlength=2).clamp_min(1))).to(device)
    ring = Ring()
    for batch, stored in read_ahead(batches, lambda batch: data.read(batch.first, device, ring), waited):
        inputs = data.on_device(stored, device)
        if stage == "linear_probe":
            with torch.no_grad():
                h_NF = model.encoder(inputs)
            logits_NC = model.head(h_NF)
        else:
            drawn = config.views.draw(inputs.shape, view_generator)
            logits_NC = model(drawn.apply(inputs, model.encoder.input_scale))
        yield {"cross_entropy": torch.nn.functional.cross_entropy(logits_NC, labels[batch.first].to(device), weights)}


def finetune(
    model: Classifier, data: SiteData, config: RunConfig, *, stage: Stage, round_number: int, device: torch.device
) -> TrainResult:
    """A round's local steps on one site's labelled scans; the model is trained in place.

    Raises:
        NotFiniteError: a loss was NaN or infinite.
    """
    torch.manual_seed(seed(config.seed, stage, data.site, round_number))
    chosen = config.finetune
    decline = learning_rate(1.0, round_number, chosen.num_rounds, warmup_rounds=0)
    groups = [{"params": model.head.parameters(), "lr": decline * chosen.head_learning_rate}]
    if stage != "linear_probe":
        groups.append({"params": model.encoder.parameters(), "lr": decline * chosen.learning_rate})
    model.train()
    waited, started = Waited(), time.perf_counter()
    losses = finetuning_losses(model, data, config, stage, round_number, device, waited)
    metrics = take_steps(
        losses,
        torch.optim.AdamW(groups, weight_decay=chosen.weight_decay),
        f"site {data.site}, {stage}, round {round_number}",
    )
    part = model.head if stage == "linear_probe" else model
    prefix = "head." if stage == "linear_probe" else ""
    state = {f"{prefix}{name}": value for name, value in part.state_dict().items()}
    return TrainResult(state, len(data), metrics, time.perf_counter() - started, waited.seconds)
