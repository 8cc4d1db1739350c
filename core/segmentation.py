"""Segmentation: the encoder inside a U-shaped net that tells of every voxel its class; loss, steps, Dice of held-out scans.

Shape legend: N scans, K classes with the background, which is number 0, G the grid of a volume (X, Y, Z).
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from core.config import RunConfig
from core.data.augment import DrawnCutout, DrawnWarp
from core.data.feed import Ring, Waited, read_ahead
from core.data.label_maps import LabelMaps
from core.data.site import SiteData
from core.data.views import DrawnViews, ViewPolicy
from core.evaluation.intervals import Evaluation, NotEvaluableError, subject_bootstrap
from core.finetuning import batches_of_round, finetuning_views, parameter_groups, trained_parts
from core.models import Segmenter
from core.seeding import generator, seed
from core.settings import DpSgd
from core.stages import StageName
from core.training import TrainResult, mixed_precision, take_steps

SMOOTHING = 1e-5
TASK = "segmentation"


class SegmentationError(ValueError):
    """A segmentation that cannot be learnt; the text holds counts only and may leave the site."""


def soft_dice_loss(logits_NKG: Tensor, classes_NG: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|) with the softmax P and the truth T of all scans together, mean over classes but the background.

    Milletari et al., 3DV 2016, without squares and with the sums over the batch, as nnU-Net (Isensee et al., Nature Methods 2021)
    and MONAI's ``DiceLoss(include_background=False, softmax=True, to_onehot_y=True, batch=True)``. A class that the batch does
    not show costs what is told of it.
    """
    told_NKG = logits_NKG.softmax(dim=1)[:, 1:]
    truth_NKG = one_hot(classes_NG.long(), logits_NKG.shape[1]).movedim(-1, 1)[:, 1:].to(told_NKG.dtype)
    axes = [0, *range(2, logits_NKG.ndim)]
    both_K, sum_K = (told_NKG * truth_NKG).sum(axes), told_NKG.sum(axes) + truth_NKG.sum(axes)
    return (1 - (2 * both_K + SMOOTHING) / (sum_K + SMOOTHING)).mean()


def loss_terms(logits_NKG: Tensor, classes_NG: Tensor) -> dict[str, Tensor]:
    """Soft Dice loss and the mean cross-entropy of the voxels, weighed alike."""
    return {"dice": soft_dice_loss(logits_NKG, classes_NG), "cross_entropy": cross_entropy(logits_NKG, classes_NG.long())}


def moved_along(classes_NG: Tensor, drawn: DrawnViews, num_classes: int) -> Tensor:
    """Classes (N, *grid) where a view has moved them: each class is interpolated as the image is, a voxel is that of the largest.

    What comes in from outside is background. Nothing but the warps of a view moves voxels.
    """
    warps = [piece for piece in drawn.pieces if isinstance(piece, DrawnWarp) and piece.on_B.any()]
    if not warps:
        return classes_NG
    shown_NKG = one_hot(classes_NG.long(), num_classes).movedim(-1, 1)[:, 1:].float()
    moved_NKG = reduce(lambda images, warp: warp.apply(images), warps, shown_NKG)
    background_N1G = 1 - moved_NKG.sum(dim=1, keepdim=True)
    return torch.cat([background_N1G, moved_NKG], dim=1).argmax(dim=1).to(classes_NG.dtype)


def segmentation_scans(data: SiteData, label_maps: LabelMaps) -> SiteData:
    """The labelled scans of a site's training split.

    Raises:
        SegmentationError: none shows any class but the background.
    """
    data = label_maps.labelled(data)
    if not any(label_maps.maps[scan.path].any() for scan in data.scans):
        raise SegmentationError(
            f"site {data.site}: training scans must show one class of {', '.join(label_maps.classes)} or more, got {len(data)} "
            "labelled scans that do not. Mend the pattern, suffix or codes of the label maps, or leave the site out of "
            "data.target_sites."
        )
    return data


def segmentation_losses(
    model: Segmenter,
    data: SiteData,
    label_maps: LabelMaps,
    config: RunConfig,
    stage: StageName,
    round_number: int,
    device: torch.device,
    waited: Waited,
) -> Iterator[dict[str, Tensor]]:
    """Dice and cross-entropy of each local step of a round, on views of scans and their label maps alike.

    Every stage sees views, which move the label map as they move the scan; only boxes are not cut out, for what is blanked is
    still there in the label map.

    Args:
        model: encoder and decoder with the round's weights, on ``device``.
        data: labelled scans.
        label_maps: theirs.
        config: the run's.
        stage: what is trained; under a decoder trained alone the encoder keeps no gradients.
        round_number: counts from 1.
        device: where to compute.
        waited: gets the seconds spent waiting for data.
    """
    views = finetuning_views(config)
    assert isinstance(views, ViewPolicy | None)
    batches = batches_of_round(data, config, stage, round_number)
    view_generator = generator(config.seed, "views", stage, data.site, round_number)
    encoder_learns = len(trained_parts(model, stage, round_number, config)) > 1
    ring = Ring()
    for batch, stored in read_ahead(batches, lambda batch: data.read(batch.first, device, ring), waited):
        inputs = data.on_device(stored, device)
        pieces = () if views is None else views.draw(inputs.shape, view_generator).pieces
        drawn = DrawnViews(tuple(piece for piece in pieces if not isinstance(piece, DrawnCutout)))
        classes_NG = label_maps.of([data.scans[i] for i in batch.first]).to(device)
        viewed = drawn.apply(inputs, model.encoder.input_scale)
        with mixed_precision(config, device):
            with torch.set_grad_enabled(encoder_learns):
                pyramid = model.encoder.pyramid(viewed)
            logits_NKG = model.head(viewed, pyramid)
        yield loss_terms(logits_NKG.float(), moved_along(classes_NG, drawn, label_maps.num_classes))


def segment(
    model: Segmenter,
    data: SiteData,
    label_maps: LabelMaps,
    config: RunConfig,
    *,
    stage: StageName,
    round_number: int,
    device: torch.device,
) -> TrainResult:
    """A round's local steps on one site's labelled training scans, as `core.finetuning.finetune`; the model is trained in place.

    Raises:
        SegmentationError: private training, in which one scan's loss must not depend on the others.
        NotFiniteError: a loss was NaN or infinite.
    """
    if isinstance(config.privacy, DpSgd):
        raise SegmentationError("segmentation: privacy must be another than dp_sgd, for Dice couples the scans of a batch.")
    torch.manual_seed(seed(config.seed, stage, data.site, round_number))
    parts = trained_parts(model, stage, round_number, config)
    groups = parameter_groups(parts, stage, round_number, config)
    optimiser = torch.optim.AdamW(groups, weight_decay=config.finetune.weight_decay)
    model.train()
    waited, started = Waited(), time.perf_counter()
    losses = segmentation_losses(model, data, label_maps, config, stage, round_number, device, waited)
    where = f"site {data.site}, {stage}, round {round_number}"
    metrics, num_steps = take_steps(losses, optimiser, config.finetune.local_steps, where)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    state = {name: value.detach() for name, value in model.named_parameters() if id(value) in trained}
    return TrainResult(state, len(data), metrics, time.perf_counter() - started, waited.seconds, num_steps)


@torch.no_grad()
def _told(model: Segmenter, data: SiteData, device: torch.device, batch_size: int = 4) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of some scans and the logits (N, K, *grid) of each as it is, batch by batch: those of all would not fit."""
    model.eval()
    for start in range(0, len(data), batch_size):
        rows = list(range(start, min(start + batch_size, len(data))))
        yield rows, model(data.inputs(rows, device)).float()


def segmentation_validation_loss(model: Segmenter, data: SiteData, label_maps: LabelMaps, device: torch.device) -> float:
    """Mean over labelled scans that no step has seen of Dice loss and cross-entropy of each by itself."""
    losses = []
    for rows, logits_NKG in _told(model, data, device):
        for row, logits_KG in zip(rows, logits_NKG, strict=True):
            classes_NG = label_maps.of([data.scans[row]]).to(device)
            losses.append(float(sum(loss_terms(logits_KG[None], classes_NG).values())))
    return sum(losses) / len(losses)


def dice(told_NG: Tensor, truth_NG: Tensor, num_classes: int) -> NDArray[np.float64]:
    """2 |A B| / (|A| + |B|) of voxels told and true of each class but the background, (N, K - 1); NaN where both have none."""
    scores = torch.full((len(told_NG), num_classes - 1), torch.nan, dtype=torch.float64)
    for number in range(1, num_classes):
        told, truth = (told_NG == number).flatten(1), (truth_NG == number).flatten(1)
        both, total = (told & truth).sum(dim=1).double(), (told.sum(dim=1) + truth.sum(dim=1)).double()
        scores[:, number - 1] = torch.where(total > 0, 2 * both / total, torch.nan).cpu()
    return scores.numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class DiceScores:
    """The Dice of each labelled scan.

    Attributes:
        classes: names of the K - 1 classes but the background.
        dice_NK: (N, K - 1) NaN where a scan shows none of a class and none was told.
        subject: (N,) text, unique together with ``site``.
        site: (N,) text.
        split: (N,) val or test.
    """

    classes: tuple[str, ...]
    dice_NK: NDArray[np.float64]
    subject: NDArray[np.str_]
    site: NDArray[np.str_]
    split: NDArray[np.str_]

    @classmethod
    def concatenate(cls, parts: Sequence["DiceScores"]) -> "DiceScores":
        """One table from several of the same classes, in their order."""
        (classes,) = {part.classes for part in parts}
        columns = ("dice_NK", "subject", "site", "split")
        return cls(classes=classes, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns})


def dice_scores(model: Segmenter, splits: Mapping[str, SiteData], label_maps: LabelMaps, device: torch.device) -> DiceScores:
    """The Dice of the labelled scans of some splits of a site, each scan as it is."""
    parts = []
    for split, whole in splits.items():
        data = label_maps.labelled(whole)
        found = [np.empty((0, len(label_maps.classes)))]
        for rows, logits_NKG in _told(model, data, device):
            truth_NG = label_maps.of([data.scans[row] for row in rows]).to(device)
            found.append(dice(logits_NKG.argmax(dim=1), truth_NG, label_maps.num_classes))
        parts.append(
            DiceScores(
                classes=label_maps.classes,
                dice_NK=np.concatenate(found),
                subject=np.array([scan.subject for scan in data.scans], dtype=np.str_),
                site=np.array([data.site] * len(data), dtype=np.str_),
                split=np.array([split] * len(data), dtype=np.str_),
            )
        )
    return DiceScores.concatenate(parts)


def evaluate_dice(
    scores: DiceScores,
    *,
    stage: str,
    regime: str,
    seed: int,
    known_sites: Collection[str] | None = None,
    num_resamples: int = 1000,
) -> tuple[list[Evaluation], list[str]]:
    """Mean Dice of the test scans with 95 % subject-bootstrap intervals, and notes on what has none.

    ``dice_<class>`` is the mean over the scans that show the class, or of which it was told; ``dice`` that of each scan's mean
    over these classes. Over all known sites (site "all"), at each site where there are several, and ``_unseen`` at the others.
    """
    in_test = scores.split == "test"
    dice_NK, site_N = scores.dice_NK[in_test], scores.site[in_test]
    subject_N = np.char.add(np.char.add(site_N, "/"), scores.subject[in_test])
    known = np.isin(site_N, sorted(known_sites)) if known_sites is not None else np.ones(len(site_N), bool)
    columns = {"dice": _row_means(dice_NK), **{f"dice_{name}": dice_NK[:, i] for i, name in enumerate(scores.classes)}}
    groups = [("", "all", known), ("_unseen", "all", ~known)]
    sites = np.unique(site_N).tolist()
    for site in sites if len(sites) > 1 else ():
        here = site_N == site
        groups.append(("" if known[here].all() else "_unseen", site, here))
    evaluations, notes = [], []
    if not known.any():
        notes.append(f"{stage}: {TASK}: no test scan at a site that was trained on has a label map.")
    for ending, site, mask in groups:
        for metric, all_values in columns.items() if mask.any() else ():
            shown = mask & np.isfinite(all_values)
            values, subjects = all_values[shown], subject_N[shown]
            if without := int(mask.sum() - shown.sum()):
                notes.append(
                    f"{stage}: {TASK} {metric}{ending} at site {site}: {without} of {mask.sum()} test scans show nothing of it "
                    "and nothing was told; they are not in the mean."
                )
            try:
                value, low, high = subject_bootstrap(subjects, _mean_of(values), num_resamples=num_resamples, seed=seed)
            except NotEvaluableError as error:
                notes.append(f"{stage}: {TASK} {metric}{ending} at site {site} has no value: {error}")
                continue
            evaluations.append(
                Evaluation(
                    stage=stage,
                    task=TASK,
                    metric=metric + ending,
                    value=value,
                    low=low,
                    high=high,
                    regime=regime,
                    site=site,
                    num_subjects=len(np.unique(subjects)),
                    seed=seed,
                )
            )
    return evaluations, notes


def _mean_of(values_N: NDArray[np.float64]) -> Callable[[NDArray[np.intp]], float]:
    return lambda rows: float(values_N[rows].mean())


def _row_means(values_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the finite values of each row; NaN where there is none."""
    finite_NK = np.isfinite(values_NK)
    sum_N, count_N = np.where(finite_NK, values_NK, 0.0).sum(axis=1), finite_NK.sum(axis=1)
    return np.where(count_N > 0, sum_N / np.maximum(count_N, 1), np.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One held-out scan beside its label map and what a model tells: an image of a person, not to leave the site.

    Attributes:
        site: its site.
        image: (X, Y, Z) float32.
        truth: (X, Y, Z) class numbers, 0 background.
        told: likewise.
        place: voxel in whose three planes most of the truth is seen.
    """

    site: str
    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    told: NDArray[np.uint8]
    place: tuple[int, int, int]


def example(model: Segmenter, data: SiteData, label_maps: LabelMaps, device: torch.device) -> Example | None:
    """The first labelled scan that shows a class, as a picture needs it; None where there is none."""
    data = label_maps.labelled(data)
    shown = [i for i, scan in enumerate(data.scans) if label_maps.maps[scan.path].any()]
    if not shown:
        return None
    first = {data.scans[shown[0]].path}
    data = data.select(lambda scan: scan.path in first)
    ((_, logits_NKG),) = _told(model, data, device)
    truth = label_maps.maps[data.scans[0].path]
    place = [int(np.moveaxis(truth > 0, axis, 0).sum(axis=(1, 2)).argmax()) for axis in range(3)]
    return Example(
        site=data.site,
        image=data.inputs([0], device)[0, 0].cpu().numpy(),
        truth=truth,
        told=logits_NKG[0].argmax(dim=0).to(torch.uint8).cpu().numpy(),
        place=(place[0], place[1], place[2]),
    )
