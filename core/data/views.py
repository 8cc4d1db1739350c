"""Augmented views of volumes: drawn once from a seed, applied to a whole batch on the device, replayable.

Shape legend: B volumes, 1 channel, X, Y, Z voxels (right-left is the X axis).
"""

from dataclasses import dataclass

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
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"views: {name} must be between 0 and {limit:g}, got {getattr(self, name)!r}.")
        if not any(getattr(self, name) for name in limits):
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


def draw(policy: ViewPolicy, num_volumes: int, shape: tuple[int, int, int], generator: torch.Generator) -> DrawnViews:
    """Draw one view of each volume; the same generator state gives the same view on every device."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator) * 2 - 1

    angles_B3 = uniform(num_volumes, 3) * torch.pi / 180 * policy.rotation_degrees
    scale_B = 1 + uniform(num_volumes) * policy.scale_range
    # Rotations act on millimetres, the sampling grid on fractions of each axis: conjugate by the extent.
    extent_3 = torch.tensor(shape, dtype=torch.float32)
    linear_B33 = _rotation(angles_B3) * scale_B[:, None, None] * extent_3[None, None, :] / extent_3[None, :, None]
    return DrawnViews(
        flip_B=torch.rand(num_volumes, generator=generator) < policy.flip_probability,
        shift_B3=(uniform(num_volumes, 3) * policy.translation_voxels).round().long(),
        linear_B33=linear_B33 if policy.rotation_degrees > 0 or policy.scale_range > 0 else None,
        cutout_centre_B3=torch.rand(num_volumes, 3, generator=generator),
        cutout_fraction=policy.cutout_fraction,
        noise_sd_B=torch.rand(num_volumes, generator=generator) * policy.noise_sd,
        noise_seed=int(torch.randint(2**62, (), generator=generator)),
    )


def apply(volumes_B1XYZ: Tensor, drawn: DrawnViews) -> Tensor:
    """The drawn view of each volume, (B, 1, X, Y, Z), a new tensor on the same device; what comes in from outside is 0."""
    viewed_B1XYZ = torch.zeros_like(volumes_B1XYZ)
    flips, shifts = drawn.flip_B.tolist(), drawn.shift_B3.tolist()
    for target, source, flip, shift_3 in zip(viewed_B1XYZ, volumes_B1XYZ, flips, shifts, strict=True):
        to = [slice(max(0, s), size + min(0, s)) for s, size in zip(shift_3, source.shape[1:], strict=True)]
        of = [slice(max(0, -s), size + min(0, -s)) for s, size in zip(shift_3, source.shape[1:], strict=True)]
        target[:, to[0], to[1], to[2]] = (source.flip(1) if flip else source)[:, of[0], of[1], of[2]]
    if drawn.linear_B33 is not None:
        # grid_sample counts its coordinates from the last axis to the first.
        affine_B34 = torch.nn.functional.pad(drawn.linear_B33[:, [2, 1, 0]][:, :, [2, 1, 0]], (0, 1)).to(viewed_B1XYZ)
        grid_BXYZ3 = torch.nn.functional.affine_grid(affine_B34, list(viewed_B1XYZ.shape), align_corners=False)
        viewed_B1XYZ = torch.nn.functional.grid_sample(viewed_B1XYZ, grid_BXYZ3, align_corners=False)
    if drawn.cutout_fraction > 0:
        boxes = _boxes(drawn.cutout_centre_B3, drawn.cutout_fraction, tuple(viewed_B1XYZ.shape[2:]))
        for target, box in zip(viewed_B1XYZ, boxes, strict=True):
            target[:, box[0], box[1], box[2]] = 0.0
    if (drawn.noise_sd_B > 0).any():
        generator = torch.Generator(viewed_B1XYZ.device).manual_seed(drawn.noise_seed)
        noise_B1XYZ = torch.empty_like(viewed_B1XYZ).normal_(generator=generator)
        viewed_B1XYZ.addcmul_(noise_B1XYZ, drawn.noise_sd_B.to(noise_B1XYZ)[:, None, None, None, None])
    return viewed_B1XYZ


def _boxes(centre_B3: Tensor, fraction: float, shape: tuple[int, ...]) -> list[list[slice]]:
    """The voxels of each cut-out box, which may stick out of the volume."""
    return [
        [
            slice(max(0, round((c - fraction / 2) * size)), max(0, round((c + fraction / 2) * size)))
            for c, size in zip(centre_3, shape, strict=True)
        ]
        for centre_3 in centre_B3.tolist()
    ]
