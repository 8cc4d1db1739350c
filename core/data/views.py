"""Augmented views: drawn once from a seed, applied to a whole batch on the device, replayable.

A policy says how far two views may differ: `ViewPolicy` of volumes, `RowViewPolicy` of rows of features. Its ``draw`` gives the
random part of one view, whose ``apply`` makes the view.

Shape legend: B scans; volumes have 1 channel, X, Y, Z voxels (right-left is the X axis); rows have F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """How far two views of a scan may differ; every knob at 0 leaves the volume as it is.

    Attributes:
        flip_probability: chance of mirroring left and right.
        rotation_degrees: largest rotation about each axis; this and ``scale_range`` need an interpolation, the slowest step.
        translation_voxels: largest shift along each axis, rounded to whole voxels.
        scale_range: largest relative change of size.
        cutout_fraction: edge of the box that is blanked, as a fraction of each axis.
        noise_sd: largest standard deviation of added Gaussian noise, in units of the normalised volume.
    """

    kind: Literal["images"] = "images"
    flip_probability: float = 0.5
    rotation_degrees: float = 8.0
    translation_voxels: float = 2.0
    scale_range: float = 0.05
    cutout_fraction: float = 0.25
    noise_sd: float = 0.05

    def __post_init__(self) -> None:
        limits = {
            "flip_probability": 1.0,
            "rotation_degrees": 180.0,
            "translation_voxels": 8.0,
            "scale_range": 0.5,
            "cutout_fraction": 0.9,
            "noise_sd": 10.0,
        }
        _check_knobs(self, limits)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> "DrawnViews":
        """Draw one view of each volume of a batch of this shape; the same generator state gives the same view everywhere."""
        num_volumes, extent = shape[0], shape[2:]

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator) * 2 - 1

        angles_B3 = uniform(num_volumes, 3) * torch.pi / 180 * self.rotation_degrees
        scale_B = 1 + uniform(num_volumes) * self.scale_range
        # Rotations act on millimetres, the sampling grid on fractions of each axis: conjugate by the extent.
        extent_3 = torch.tensor(extent, dtype=torch.float32)
        linear_B33 = _rotation(angles_B3) * scale_B[:, None, None] * extent_3[None, None, :] / extent_3[None, :, None]
        return DrawnViews(
            flip_B=torch.rand(num_volumes, generator=generator) < self.flip_probability,
            shift_B3=(uniform(num_volumes, 3) * self.translation_voxels).round().long(),
            linear_B33=linear_B33 if self.rotation_degrees > 0 or self.scale_range > 0 else None,
            cutout_centre_B3=torch.rand(num_volumes, 3, generator=generator),
            cutout_fraction=self.cutout_fraction,
            noise_sd_B=torch.rand(num_volumes, generator=generator) * self.noise_sd,
            noise_seed=int(torch.randint(2**62, (), generator=generator)),
        )


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
        _check_knobs(self, {"mask_probability": 0.9, "noise_sd": 10.0})

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> "DrawnRowViews":
        """Draw one view of each row of a batch of this shape; the same generator state gives the same view everywhere."""
        noise_sd_B = torch.rand(shape[0], generator=generator) * self.noise_sd
        return DrawnRowViews(
            mask_BF=torch.rand(tuple(shape), generator=generator) < self.mask_probability,
            noise_BF=torch.randn(tuple(shape), generator=generator) * noise_sd_B[:, None],
        )


def _check_knobs(policy: ViewPolicy | RowViewPolicy, limits: Mapping[str, float]) -> None:
    for name, limit in limits.items():
        if not 0 <= getattr(policy, name) <= limit:
            raise ValueError(f"views: {name} must be between 0 and {limit:g}, got {getattr(policy, name)!r}.")
    if not any(getattr(policy, name) for name in limits):
        raise ValueError("views: at least one augmentation must be on, got none: two equal views teach nothing.")


@dataclass(frozen=True)
class DrawnViews:
    """The random part of one view of B volumes: everything ``apply`` needs."""

    flip_B: Tensor
    shift_B3: Tensor
    linear_B33: Tensor | None
    cutout_centre_B3: Tensor
    cutout_fraction: float
    noise_sd_B: Tensor
    noise_seed: int

    def apply(self, volumes_B1XYZ: Tensor, scale: Tensor) -> Tensor:
        """The drawn view of each volume, (B, 1, X, Y, Z), a new tensor on the same device; what comes in from outside is 0.

        ``scale`` (1,) is the unit of the noise.
        """
        viewed_B1XYZ = torch.zeros_like(volumes_B1XYZ)
        flips, shifts = self.flip_B.tolist(), self.shift_B3.tolist()
        for target, source, flip, shift_3 in zip(viewed_B1XYZ, volumes_B1XYZ, flips, shifts, strict=True):
            to = [slice(max(0, s), size + min(0, s)) for s, size in zip(shift_3, source.shape[1:], strict=True)]
            of = [slice(max(0, -s), size + min(0, -s)) for s, size in zip(shift_3, source.shape[1:], strict=True)]
            target[:, to[0], to[1], to[2]] = (source.flip(1) if flip else source)[:, of[0], of[1], of[2]]
        if self.linear_B33 is not None:
            # grid_sample counts its coordinates from the last axis to the first.
            affine_B34 = torch.nn.functional.pad(self.linear_B33[:, [2, 1, 0]][:, :, [2, 1, 0]], (0, 1)).to(viewed_B1XYZ)
            grid_BXYZ3 = torch.nn.functional.affine_grid(affine_B34, list(viewed_B1XYZ.shape), align_corners=False)
            viewed_B1XYZ = torch.nn.functional.grid_sample(viewed_B1XYZ, grid_BXYZ3, align_corners=False)
        if self.cutout_fraction > 0:
            boxes = _boxes(self.cutout_centre_B3, self.cutout_fraction, tuple(viewed_B1XYZ.shape[2:]))
            for target, box in zip(viewed_B1XYZ, boxes, strict=True):
                target[:, box[0], box[1], box[2]] = 0.0
        if (self.noise_sd_B > 0).any():
            generator = torch.Generator(viewed_B1XYZ.device).manual_seed(self.noise_seed)
            noise_B1XYZ = torch.empty_like(viewed_B1XYZ).normal_(generator=generator)
            viewed_B1XYZ.addcmul_(noise_B1XYZ, (self.noise_sd_B.to(noise_B1XYZ) * scale)[:, None, None, None, None])
        return viewed_B1XYZ


@dataclass(frozen=True)
class DrawnRowViews:
    """The random part of one view of B rows: which features are masked, and the noise in units of their standard deviation."""

    mask_BF: Tensor
    noise_BF: Tensor

    def apply(self, rows_BF: Tensor, scale: Tensor) -> Tensor:
        """The drawn view of each row, (B, F), a new tensor on the same device; ``scale`` (F,) is the unit of the noise."""
        viewed_BF = rows_BF + self.noise_BF.to(rows_BF) * scale
        return viewed_BF.masked_fill_(self.mask_BF.to(rows_BF.device), torch.nan)


def _rotation(angles_B3: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3) from angles about the three axes, in radians."""
    cos_B3, sin_B3 = angles_B3.cos(), angles_B3.sin()
    one_B, zero_B = torch.ones(len(angles_B3)), torch.zeros(len(angles_B3))
    rotation_B33 = torch.eye(3).expand(len(angles_B3), 3, 3)
    for axis in range(3):
        c, s = cos_B3[:, axis], sin_B3[:, axis]
        i, j = [k for k in range(3) if k != axis]
        turn = [[one_B if a == b else zero_B for b in range(3)] for a in range(3)]
        turn[i][i], turn[i][j], turn[j][i], turn[j][j] = c, -s, s, c
        rotation_B33 = rotation_B33 @ torch.stack([torch.stack(row, dim=1) for row in turn], dim=1)
    return rotation_B33


def _boxes(centre_B3: Tensor, fraction: float, shape: tuple[int, ...]) -> list[list[slice]]:
    """The voxels of each cut-out box, which may stick out of the volume."""
    return [
        [
            slice(max(0, round((c - fraction / 2) * size)), max(0, round((c + fraction / 2) * size)))
            for c, size in zip(centre_3, shape, strict=True)
        ]
        for centre_3 in centre_B3.tolist()
    ]
