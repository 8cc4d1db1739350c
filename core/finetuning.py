"""Encoder and head on labelled scans: what each stage trains, which scans it sees, its steps, its loss on held-out subjects."""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core import progress
from core.config import RunConfig
from core.data.feed import Ring, Waited, read_ahead
from core.data.sampling import DrawnBatch, SamplingPolicy, subject_batches
from core.data.site import SiteData, Store
from core.data.views import DrawnRowViews, DrawnViews, RowViewPolicy, ViewPolicy
from core.evaluation.predictions import MAIN_FIGURE, Predictions, resampled_figure
from core.memory import keep_freed_memory
from core.models import Classifier, Segmenter
from core.privacy import NOT_COVERED, PrivateSteps, assert_private
from core.seeding import generator, seed
from core.settings import DpSgd
from core.stages import STAGES, StageName
from core.targets import Target, TargetError
from core.training import TrainResult, embed, learning_rate, mixed_precision, take_steps

KEPT_REPRESENTATIONS = 4

log = logging.getLogger("isocenter")


def labelled(data: SiteData, target: Target) -> SiteData:
    """The scans of which something of the target is known.

    Raises:
        TargetError: a column that is not there, or a cell that is no class and no number.
    """
    known_N = (~target.values(data.scans).isnan()).any(dim=1).tolist()
    kept = {scan.path for scan, known in zip(data.scans, known_N, strict=True) if known}
    return data.select(lambda scan: scan.path in kept)


def num_classes(data: SiteData, target: Target) -> int:
    """Different values of the target among the scans, at most 2 with several findings or a number; 2 are enough to learn from."""
    values_NL = target.values(data.scans)
    different = [len(set(column[~column.isnan()].tolist())) for column in values_NL.T]
    return min(max(different), 2 if target.kind in ("multilabel", "regression") else len(target.names))


def training_scans(data: SiteData, config: RunConfig) -> SiteData:
    """The labelled scans, or the fraction of the subjects of each class that ``finetune.label_fraction`` leaves.

    A smaller fraction is a part of every larger one. With several findings, or a number, all subjects are one class.

    Raises:
        TargetError: fewer than two classes are left, or the fraction leaves a class empty.
    """
    target, fraction = config.finetune.target, config.finetune.label_fraction
    data = labelled(data, target)
    if num_classes(data, target) < 2:
        raise TargetError(
            f"site {data.site}: training scans must show two classes of {target.task} or more, got {num_classes(data, target)} "
            f"in {len(data)} labelled scans. See `isocenter check`, or leave the site out of data.target_sites."
        )
    if fraction == 1.0:
        return data
    values_NL = target.values(data.scans)
    class_of: dict[str, float] = {}
    for scan, value in zip(data.scans, values_NL[:, 0].tolist(), strict=True):
        class_of.setdefault(scan.subject, value if target.kind in ("binary", "multiclass") else 0.0)
    kept: set[str] = set()
    for value in sorted(set(class_of.values())):
        subjects = sorted(subject for subject in class_of if class_of[subject] == value)
        order = torch.randperm(len(subjects), generator=generator(config.seed, "fraction", data.site, str(value))).tolist()
        taken = round(fraction * len(subjects))
        if taken == 0:
            name = target.names[int(value)] if target.kind in ("binary", "multiclass") else target.task
            raise TargetError(
                f"site {data.site}: finetune.label_fraction must leave subjects of every class, {fraction:g} leaves none of the "
                f"{len(subjects)} {name}. Take a larger fraction."
            )
        kept |= {subjects[i] for i in order[:taken]}
    data = data.select(lambda scan: scan.subject in kept)
    if num_classes(data, target) < 2:
        raise TargetError(
            f"site {data.site}: finetune.label_fraction must leave two different values of {target.task}, {fraction:g} does not. "
            "Take a larger fraction."
        )
    return data


def trained_parts(model: Classifier | Segmenter, stage: StageName, round_number: int, config: RunConfig) -> list[nn.Module]:
    """What a round of a stage trains: the head, and the last parts of the encoder or all of them, the last part first."""
    parts = model.encoder.parts[::-1]
    trains = STAGES[stage].trains
    if STAGES[stage].thaws and round_number <= config.finetune.frozen_rounds:
        trains = "head"
    return [model.head, *{"head": [], "last_block": parts[:1], "all": parts}[trains]]


def trained_names(model: Classifier, stage: StageName, round_number: int, config: RunConfig) -> frozenset[str]:
    """Names of the weights that a round of a stage trains."""
    parts = trained_parts(model, stage, round_number, config)
    trained = {id(parameter) for part in parts for parameter in part.parameters() if parameter.requires_grad}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in trained)


def parameter_groups(parts: list[nn.Module], stage: StageName, round_number: int, config: RunConfig) -> list[dict[str, Any]]:
    """The parts with their learning rates in a round; in the encoder each has that of the part behind it times the decay.

    A net that starts from random weights has one rate for all of the encoder.
    """
    chosen = config.finetune
    decline = learning_rate(1.0, round_number, chosen.num_rounds, chosen.warmup_rounds)
    decay = chosen.layer_decay if STAGES[stage].start == "pretrained" else 1.0
    rates = [chosen.head_learning_rate, *(chosen.learning_rate * decay**depth for depth in range(len(parts) - 1))]
    return [
        {"params": [p for p in part.parameters() if p.requires_grad], "lr": decline * rate}
        for part, rate in zip(parts, rates, strict=True)
    ]


_representations: OrderedDict[tuple[object, ...], tuple[Store, Tensor]] = OrderedDict()


def frozen_representations(encoder: nn.Module, data: SiteData, device: torch.device) -> Tensor:
    """Representations (N, F) of every scan as it is, on the device: computed once for all rounds that leave it as it is."""
    digest = hashlib.sha256()
    for value in encoder.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    key = (digest.hexdigest(), data.site, data.positions, id(data.store), str(device))
    if key not in _representations:
        # The store is held, so that its id is no other's.
        _representations[key] = (data.store, embed(encoder, data, device)[0])
        while len(_representations) > KEPT_REPRESENTATIONS:
            _representations.popitem(last=False)
    return _representations[key][1].to(device)


def batches_of_round(data: SiteData, config: RunConfig, stage: StageName, round_number: int) -> Iterator[DrawnBatch]:
    """The batches of a round of a stage at a site, one scan a subject."""
    return subject_batches(
        data.scans,
        batch_size=config.finetune.batch_size,
        num_batches=config.finetune.local_steps,
        policy=SamplingPolicy(),
        generator=generator(config.seed, "batches", stage, data.site, round_number),
    )


def finetuning_losses(
    model: Classifier,
    data: SiteData,
    config: RunConfig,
    stage: StageName,
    round_number: int,
    device: torch.device,
    waited: Waited,
) -> Iterator[dict[str, Tensor]]:
    """The target's loss in each local step of a round; a frozen encoder sees the scans as they are, one that is trained views."""
    target = config.finetune.target
    batches = batches_of_round(data, config, stage, round_number)
    values_NL = target.values(data.scans).to(device)
    weights = class_weights(values_NL, config)
    if len(trained_parts(model, stage, round_number, config)) == 1:
        h_NF = frozen_representations(model.encoder, data, device)
        for batch in batches:
            logits_NK = model.head(h_NF[batch.first])
            yield {"supervised": target.loss(logits_NK, values_NL[batch.first], weights).mean()}
        return
    views = finetuning_views(config)
    view_generator = generator(config.seed, "views", stage, data.site, round_number)
    ring = Ring()
    for batch, stored in read_ahead(batches, lambda batch: data.read(batch.first, device, ring), waited):
        inputs = data.on_device(stored, device)
        viewed = inputs if views is None else views.draw(inputs.shape, view_generator).apply(inputs, model.encoder.input_scale)
        with mixed_precision(config, device):
            logits_NK = model(viewed)
        yield {"supervised": target.loss(logits_NK.float(), values_NL[batch.first], weights).mean()}


def finetuning_views(config: RunConfig) -> ViewPolicy | RowViewPolicy | None:
    """The views that an encoder is fine-tuned on; None: scans as they are."""
    chosen = config.finetune.views
    return None if chosen == "none" else chosen or config.views


def class_weights(values_NL: Tensor, config: RunConfig) -> Tensor | None:
    """Weights of the classes by their number among the scans, or None where the run weighs scans alike."""
    if config.finetune.class_weights == "none":
        return None
    weights = config.finetune.target.balanced_weights(values_NL)
    return None if weights is None else weights.to(values_NL.device)


def finetune(
    model: Classifier, data: SiteData, config: RunConfig, *, stage: StageName, round_number: int, device: torch.device
) -> TrainResult:
    """A round's local steps on one site's labelled training scans; the model is trained in place.

    As in pretraining the optimiser starts afresh every round, so that a round depends on the weights it receives alone.

    Args:
        model: encoder and head with the round's weights, on ``device``.
        data: what `training_scans` gives.
        config: the run's.
        stage: what is trained.
        round_number: counts from 1.
        device: where to compute.

    Raises:
        NotFiniteError: a loss was NaN or infinite.
    """
    torch.manual_seed(seed(config.seed, stage, data.site, round_number))
    parts = trained_parts(model, stage, round_number, config)
    groups = parameter_groups(parts, stage, round_number, config)
    model.train()
    waited, started = Waited(), time.perf_counter()
    optimiser = torch.optim.AdamW(groups, weight_decay=config.finetune.weight_decay)
    guarantee: dict[str, Any] = {}
    if isinstance(config.privacy, DpSgd):
        # The mean of the losses is no private sum, so it is not told.
        metrics, num_steps = dict[str, float](), config.finetune.local_steps
        guarantee = take_private_steps(model, data, config, stage, round_number, device, optimiser)
    else:
        losses = finetuning_losses(model, data, config, stage, round_number, device, waited)
        where = f"site {data.site}, {stage}, round {round_number}"
        metrics, num_steps = take_steps(losses, optimiser, config.finetune.local_steps, where)
    names = trained_names(model, stage, round_number, config)
    state = {name: value.detach() for name, value in model.named_parameters() if name in names}
    if isinstance(config.privacy, DpSgd):
        # A subject's number of scans, and the time it took, would tell that it was there; the number of subjects is known.
        return TrainResult(state, len({scan.subject for scan in data.scans}), metrics, 0.0, 0.0, num_steps, guarantee)
    return TrainResult(state, len(data), metrics, time.perf_counter() - started, waited.seconds, num_steps)


def private_steps_before(stage: StageName, round_number: int, config: RunConfig) -> tuple[int, int]:
    """Steps on a site's subjects before a round of a stage, and in all rounds of all stages: every one is accounted for."""
    chosen = config.finetune
    rounds_before = chosen.stages.index(stage) * chosen.num_rounds + round_number - 1
    return rounds_before * chosen.local_steps, len(chosen.stages) * chosen.num_rounds * chosen.local_steps


def take_private_steps(
    model: Classifier,
    data: SiteData,
    config: RunConfig,
    stage: StageName,
    round_number: int,
    device: torch.device,
    optimiser: torch.optim.Optimizer,
) -> dict[str, Any]:
    """A round's steps of DP-SGD, a subject with all its scans drawn, clipped and noised as one; what is guaranteed by now."""
    choice, target = config.privacy, config.finetune.target
    assert isinstance(choice, DpSgd)
    assert_private(model, couples_scans=False)
    keep_freed_memory()
    subjects = sorted({scan.subject for scan in data.scans})
    rows_of = {subject: [i for i, scan in enumerate(data.scans) if scan.subject == subject] for subject in subjects}
    values_NL = target.values(data.scans).to(device)
    before, in_all = private_steps_before(stage, round_number, config)
    steps = PrivateSteps(
        optimiser,
        choice,
        num_subjects=len(subjects),
        batch_size=config.finetune.batch_size,
        num_steps=in_all,
        steps_before=before,
    )
    only_head = len(trained_parts(model, stage, round_number, config)) == 1
    h_NF = frozen_representations(model.encoder, data, device) if only_head else None
    views = finetuning_views(config)

    def loss(number: int, step: int) -> Tensor:
        rows = rows_of[subjects[number]]
        if h_NF is not None:
            logits_NK = model.head(h_NF[rows])
        else:
            inputs = data.inputs(rows, device)
            # A subject's view is its own, whoever else is drawn.
            random = generator(config.seed, "views", stage, data.site, round_number, step, number)
            viewed = inputs if views is None else views.draw(inputs.shape, random).apply(inputs, model.encoder.input_scale)
            logits_NK = model(viewed)
        return target.loss(logits_NK, values_NL[rows]).mean()

    for step in range(config.finetune.local_steps):
        steps.step(loss(number, step) for number in steps.draw())
        progress.tell("step", step + 1, config.finetune.local_steps)
    if steps.num_not_finite:
        log.warning(
            "site %s: the gradients of %d subjects drawn were not finite and added nothing", data.site, steps.num_not_finite
        )
    # Accounting takes seconds: it is done when a stage ends.
    return steps.guarantee.describe(steps.steps_taken) if round_number == config.finetune.num_rounds else {}


def privacy_notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What DP-SGD guarantees at each site after the rounds told in these lines, and what not; empty without it."""
    told: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        told |= line.get("privacy", {})
    if not told:
        return []
    notes = []
    for site, about in sorted(told.items()):
        how = (
            f"{about['steps']:g} steps, each drawing a subject with probability {about['sample_rate']:.4g}, clipping norm "
            f"{about['clip_norm']:g}, noise multiplier {about['noise_multiplier']:.4g}"
        )
        if about.get("epsilon") is None:
            notes.append(f"{site}: gradients were clipped for each subject and no noise was added, nothing is guaranteed: {how}.")
        else:
            notes.append(
                f"{site}: fine-tuning is ({about['epsilon']:.2f}, {about['delta']:g})-differentially private for a subject with "
                f"all scans, present or missing (zero-out adjacency; PRV accountant; unit: subject): {how}."
            )
    if all(about.get("epsilon") is None for about in told.values()):
        return notes
    exchanged = (
        "A subject exchanged for another moves a step by up to twice as much, and the same noise guarantees less: what is an "
        "epsilon of 8 at a delta of 1e-4 is between 9 and 19 then."
    )
    return [*notes, exchanged, f"Not covered by it: {'; '.join(NOT_COVERED)}."]


def predict(model: Classifier, splits: Mapping[str, SiteData], config: RunConfig, device: torch.device) -> Predictions:
    """What the model tells of the labelled scans of some splits of a site.

    Raises:
        TargetError: as `labelled`.
    """
    target = config.finetune.target
    parts = []
    for split, whole in splits.items():
        data = labelled(whole, target)
        scores_NK = target.scores(averaged_logits(model, data, config, device))
        parts.append(Predictions.of(data, target, scores_NK.numpy(), split))
    return Predictions.concatenate(parts)


def averaged_logits(model: Classifier, data: SiteData, config: RunConfig, device: torch.device) -> Tensor:
    """Outputs of the head for each scan, (N, K) float64: the mean over the scan as it is and its test-time views.

    Every scan is seen through the same views, so that its outputs do not depend on which scans are there beside it.
    """
    views, (logits_NK,) = finetuning_views(config), embed(model, data, device)
    total_NK = logits_NK.double()
    for turn in range(config.finetune.test_time_views):
        assert views is not None  # which the configuration has checked
        drawn = views.draw((1, *data.store.shape), generator(config.seed, "test-time views", turn))

        def viewed(inputs: Tensor, drawn: DrawnViews | DrawnRowViews = drawn) -> Tensor:
            return drawn.repeated(len(inputs)).apply(inputs, model.encoder.input_scale)

        total_NK += embed(model, data, device, view=viewed)[0].double()
    return total_NK / (1 + config.finetune.test_time_views)


def prediction_notes(config: RunConfig) -> list[str]:
    """How scores of held-out scans came about, where it is not by the scan alone."""
    number = config.finetune.test_time_views
    if number == 0 or not config.finetune.stages:
        return []
    return [f"A score is the mean over a scan and {number} random views of it; an exported model tells of the scan alone."]


def validation_loss(model: Classifier, data: SiteData, config: RunConfig, device: torch.device) -> float:
    """What a round is chosen by, the smaller the better: mean loss over the labelled scans, classes weighted as in training.

    With ``finetune.validate_by=figure`` it is 1 - AUC, or the error of a number; NaN where the scans show one class.

    Args:
        model: encoder and head.
        data: at least one labelled scan of subjects that no step has seen.
        config: the run's.
        device: where to compute.
    """
    target = config.finetune.target
    (logits_NK,) = embed(model, data, device)
    if config.finetune.validate_by == "figure":
        predictions = Predictions.of(data, target, target.scores(logits_NK.double()).numpy(), "test")
        figure = float(resampled_figure(predictions, sites={data.site}, num_resamples=0, seed=0)[0])
        return 1.0 - figure if MAIN_FIGURE[target.kind][1] else figure
    values_NL = target.values(data.scans)
    return float(target.loss(logits_NK, values_NL, class_weights(values_NL, config)).mean())
