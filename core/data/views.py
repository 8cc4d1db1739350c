"""Augmented views: drawn once from a seed, applied to a whole batch on the device, replayable.

A policy says how far two views may differ: `ViewPolicy` of images, `RowViewPolicy` of rows of features. Its ``draw`` gives the
random part of one view, whose ``apply`` makes the view.

Shape legend: B scans; images have C channels and a grid G (X, Y, Z or X, Y; right-left is the X axis); rows have F features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeVar

import torch
from torch import Tensor

from core.data.augment import (
    Affine,
    BiasField,
    Blur,
    Crop,
    Cutout,
    Drawn,
    DrawnNoise,
    DrawnWarp,
    Flip,
    Gamma,
    Ghosting,
    Jitter,
    Motion,
    Noise,
    Piece,
    Resolution,
    RicianNoise,
    check_limits,
)

D = TypeVar("D", bound=Drawn)
# In the order in which they are applied: pose, tissue, coil, k-space, noise, and last what no scanner does.
_WARPS: tuple[type[Piece[DrawnWarp]], ...] = (Flip, Affine, Crop)
_ARTEFACTS: tuple[type[Piece[Drawn]], ...] = (Gamma, BiasField, Motion, Ghosting, Resolution, Blur, RicianNoise, Jitter)
_ALWAYS: tuple[type[Piece[Drawn]], ...] = (Noise, Cutout)
_LIMITS = {name: limit for kind in (*_WARPS, *_ARTEFACTS, *_ALWAYS) for name, limit in kind.limits.items()}


@dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """How far two views of an image, a volume or 2-D, may differ; every knob at 0 leaves the image as it is.

    The knobs are those of the pieces of `core.data.augment`, which say more. Rotations are the slowest step.

    Attributes:
        flip_probability: chance of mirroring left and right (the X axis).
        flip_other_probability: chance of mirroring each other axis.
        rotation_degrees: largest rotation about each axis.
        translation_voxels: largest shift along each axis, rounded to whole voxels.
        scale_range: largest relative change of size.
        crop_fraction: largest share of each axis that a crop leaves out before it is enlarged to the grid.
        gamma_range: the power of the contrast curve lies between 1 / (1 + this) and 1 + this.
        bias_field_strength: largest standard deviation of the logarithm of the coil's sensitivity.
        motion_degrees: largest rotation of a head that moves during the scan.
        motion_voxels: largest shift of a head that moves during the scan, rounded to whole voxels.
        ghost_strength: largest share that is lost of each line of k-space that makes ghosts.
        resolution_range: how many voxels thicker than one slices become at most, along one axis.
        blur_sd_voxels: largest standard deviation of Gaussian smoothing along each axis.
        rician_sd: largest standard deviation of Rician noise, in units of the normalised image.
        jitter: largest relative change of brightness and of contrast.
        noise_sd: largest standard deviation of added Gaussian noise, in units of the normalised image.
        cutout_fraction: edge of a box that is blanked, as a fraction of each axis.
        cutout_boxes: how many boxes.
        artefact_chance: share of the views that each of the knobs from ``gamma_range`` to ``jitter`` changes.
    """

    kind: Literal["images"] = "images"
    flip_probability: float = 0.5
    flip_other_probability: float = 0.0
    rotation_degrees: float = 8.0
    translation_voxels: float = 2.0
    scale_range: float = 0.05
    crop_fraction: float = 0.0
    gamma_range: float = 0.0
    bias_field_strength: float = 0.0
    motion_degrees: float = 0.0
    motion_voxels: float = 0.0
    ghost_strength: float = 0.0
    resolution_range: float = 0.0
    blur_sd_voxels: float = 0.0
    rician_sd: float = 0.0
    jitter: float = 0.0
    noise_sd: float = 0.05
    cutout_fraction: float = 0.25
    cutout_boxes: int = 1
    artefact_chance: float = 1.0

    def __post_init__(self) -> None:
        check_limits("views", self, {**_LIMITS, "artefact_chance": 1.0})
        _check_any([*self._warps, *self._others])

    @property
    def _warps(self) -> list[Piece[DrawnWarp]]:
        return self._on(_WARPS, 1.0)

    @property
    def _others(self) -> list[Piece[Drawn]]:
        return self._on(_ARTEFACTS, self.artefact_chance) + self._on(_ALWAYS, 1.0)

    def _on(self, kinds: Iterable[type[Piece[D]]], chance: float) -> list[Piece[D]]:
        """The pieces of these kinds with the policy's knobs, where these do anything."""
        pieces = [kind(chance=chance, **{name: getattr(self, name) for name in kind.limits}) for kind in kinds]
        return [piece for piece in pieces if piece.is_on]

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> "DrawnViews":
        """Draw one view of each image of a batch of this shape; the same generator state gives the same view everywhere."""
        warps = [piece.draw(shape[0], shape[2:], generator) for piece in self._warps]
        others = [piece.draw(shape[0], shape[2:], generator) for piece in self._others]
        return DrawnViews((*([reduce(DrawnWarp.then, warps)] if warps else []), *others))


@dataclass(frozen=True, kw_only=True)
class RowViewPolicy:
    """How far two views of a row of features may differ.

    Attributes:
        mask_probability: chance that a feature is masked: it becomes a missing value, for which its mean stands in.
        noise_sd: largest standard deviation of added Gaussian noise, in units of each feature's own.
    """

    kind: Literal["table"] = "table"
    mask_probability: float = 0.5
    noise_sd: float = 0.3

    def __post_init__(self) -> None:
        check_limits("views", self, {"mask_probability": 0.9, "noise_sd": 10.0})
        _check_any((self.mask_probability, self.noise_sd))

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> "DrawnRowViews":
        """Draw one view of each row of a batch of this shape; the same generator state gives the same view everywhere."""
        noise_sd_B = torch.rand(shape[0], generator=generator) * self.noise_sd
        return DrawnRowViews(
            mask_BF=torch.rand(tuple(shape), generator=generator) < self.mask_probability,
            noise_BF=torch.randn(tuple(shape), generator=generator) * noise_sd_B[:, None],
        )


def _check_any(on: Iterable[object]) -> None:
    if not any(on):
        raise ValueError("views: at least one augmentation must be on, got none: two equal views teach nothing.")


@dataclass(frozen=True)
class DrawnViews:
    """The random part of one view of B images: everything ``apply`` needs."""

    pieces: tuple[Drawn, ...]

    def repeated(self, num_images: int) -> "DrawnViews":
        """The first image's view for each of so many images."""
        return DrawnViews(tuple(piece[torch.zeros(num_images, dtype=torch.long)] for piece in self.pieces))

    def apply(self, images_BCG: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """The drawn view of each image, (B, C, *grid), on the same device; what comes in from outside is 0.

        Args:
            images_BCG: the images, of any grid of 2 or 3 axes; they are left as they are.
            scale: (1,), the unit of the noise.
            out: where the views go, of the shape of the images, because fresh memory costs more than noise; None: a new tensor.
        """
        viewed_BCG = images_BCG if out is None else out.copy_(images_BCG)
        for piece in self.pieces:
            if piece.on_B.any():
                drawn = piece.in_units_of(scale) if isinstance(piece, DrawnNoise) else piece
                viewed_BCG = drawn.apply(viewed_BCG, reuse=viewed_BCG is not images_BCG)
        if out is not None:
            return out if viewed_BCG is out else out.copy_(viewed_BCG)
        return images_BCG.clone() if viewed_BCG is images_BCG else viewed_BCG


@dataclass(frozen=True)
class DrawnRowViews:
    """The random part of one view of B rows: which features are masked, and the noise in units of their standard deviation."""

    mask_BF: Tensor
    noise_BF: Tensor

    def repeated(self, num_rows: int) -> "DrawnRowViews":
        """The first row's view for each of so many rows."""
        return DrawnRowViews(self.mask_BF[:1].expand(num_rows, -1), self.noise_BF[:1].expand(num_rows, -1))

    def apply(self, rows_BF: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """The drawn view of each row, (B, F), on the same device, in ``out`` or new; ``scale`` (F,) is the unit of the noise."""
        viewed_BF = torch.add(rows_BF, self.noise_BF.to(rows_BF) * scale, out=out)
        return viewed_BF.masked_fill_(self.mask_BF.to(rows_BF.device), torch.nan)
