"""Augmentation of images, piece by piece: drawn at random on the CPU, applied to a whole batch on its device, replayable.

A piece says how far images may change. Its ``draw`` takes everything random from a generator on the CPU, so that a seed means
the same on every device; the drawn piece's ``apply`` has no randomness left. Images are volumes or 2-D images of any number of
channels, which share what is drawn. What comes in from outside an image is 0.

Three things keep it fast without a GPU. Whatever moves voxels is one matrix an image, so that mirroring, turning and cropping
cost one interpolation together, and none where voxels only change places. What acts along one axis (blur, thick slices, ghosts,
motion) is a product with a small matrix. Gaussian noise is not drawn voxel by voxel but read from a pool.

Shape legend: B images, C channels, D axes of the grid (2 or 3), G the grid itself (X, Y, Z or X, Y; X is right-left), E = D + 1,
N voxels along an axis, K terms of a polynomial along an axis, M boxes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

POOL_SIZE = 2**22
"""Values in the pool of Gaussian noise: 16 MiB on each device in use."""
RUN_SIZE = 2**20
"""Largest number of neighbouring voxels that take their noise from one place in the pool."""
BLUR_RADIUS_SDS = 3.0
NUM_GHOSTS = (4, 10)
BIAS_FIELD_ORDER = 3

D = TypeVar("D", bound="Drawn", covariant=True)


def check_limits(where: str, knobs: object, limits: Mapping[str, float]) -> None:
    """Refuse a knob outside 0 and its limit.

    Raises:
        ValueError: with ``where``, the knob, its limit and what was got.
    """
    for name, limit in limits.items():
        if not 0 <= getattr(knobs, name) <= limit:
            raise ValueError(f"{where}: {name} must be between 0 and {limit:g}, got {getattr(knobs, name)!r}.")


@dataclass(frozen=True)
class Drawn(ABC):
    """The random part of one piece for B images: everything ``apply`` needs.

    Attributes:
        on_B: which images change; the others stay as they are, bit for bit.
    """

    on_B: Tensor

    def __getitem__(self, rows: Tensor) -> Self:
        """What was drawn for some of the images, chosen by index or mask."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: v[rows] for name, v in values.items() if isinstance(v, Tensor | Drawn)}
        return replace(self, **chosen)

    def apply(self, images_BCG: Tensor, *, reuse: bool = False) -> Tensor:
        """The changed images.

        Args:
            images_BCG: (B, C, X, Y) or (B, C, X, Y, Z), of the number of images and the grid that were drawn for.
            reuse: whether the memory of ``images_BCG`` may be written to; otherwise it is left as it is.

        Returns:
            A tensor of the same shape, dtype and device; a new one, unless ``reuse``.
        """
        images_BCG, given = images_BCG.contiguous(), images_BCG
        reuse = reuse or images_BCG is not given
        if self.on_B.all():
            return self._change(images_BCG, reuse)
        changed_BCG = images_BCG if reuse else images_BCG.clone()
        if self.on_B.any():
            rows = self.on_B.nonzero()[:, 0]
            changed_BCG[rows] = self[rows]._change(images_BCG[rows], True)
        return changed_BCG

    @abstractmethod
    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        """Change every image, of which there is one or more; contiguous."""


@dataclass(frozen=True, kw_only=True)
class Piece(ABC, Generic[D]):
    """How far one piece of an augmentation may change an image; it does nothing where its knobs are 0.

    Attributes:
        chance: share of the images that change.
    """

    limits: ClassVar[Mapping[str, float]]
    """The largest value of each knob; the smallest is 0."""
    chance: float = 1.0

    def __post_init__(self) -> None:
        check_limits(type(self).__name__, self, {**self.limits, "chance": 1.0})

    @property
    def is_on(self) -> bool:
        """Whether any image can change."""
        return self.chance > 0 and any(getattr(self, name) > 0 for name in self.limits)

    def draw(self, num_images: int, grid_shape: Sequence[int], generator: torch.Generator) -> D:
        """Draw what happens to each of ``num_images`` images of a grid of 2 or 3 axes; the generator is on the CPU."""
        if len(grid_shape) not in (2, 3):
            raise ValueError(f"{type(self).__name__}: grid_shape must have 2 or 3 axes, got {tuple(grid_shape)!r}.")
        on_B = torch.rand(num_images, generator=generator) < self.chance
        return self._draw(on_B, tuple(grid_shape), _Uniform(num_images, generator))

    @abstractmethod
    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: "_Uniform") -> D: ...


@dataclass(frozen=True)
class _Uniform:
    """Uniform numbers, (B, *shape) in double precision."""

    num_images: int
    generator: torch.Generator

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        unit = torch.rand((self.num_images, *shape), generator=self.generator, dtype=torch.float64)
        return low + (high - low) * unit

    def integers(self, low: int, high: int) -> Tensor:
        """Whole numbers (B,) from ``low`` to ``high`` - 1."""
        return torch.randint(low, high, (self.num_images,), generator=self.generator)


@dataclass(frozen=True)
class DrawnWarp(Drawn):
    """Images read at other places: that of voxel p is matrix p, both in voxels from the centre of the grid.

    Interpolation is linear between voxels and 0 outside, as in MONAI's ``Affine`` with ``padding_mode="zeros"`` and the same
    matrix. Where every image only moves by whole voxels or is mirrored nothing is interpolated.

    Attributes:
        matrix_BEE: homogeneous, double precision.
    """

    matrix_BEE: Tensor

    def then(self, later: "DrawnWarp") -> "DrawnWarp":
        """Both, one after the other, as one."""
        eye_EE = torch.eye(self.matrix_BEE.shape[-1], dtype=torch.float64)
        first_BEE, second_BEE = (torch.where(d.on_B[:, None, None], d.matrix_BEE, eye_EE) for d in (self, later))
        return DrawnWarp(self.on_B | later.on_B, first_BEE @ second_BEE)

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        del reuse
        linear_BDD, shift_BD = self.matrix_BEE[:, :-1, :-1], self.matrix_BEE[:, :-1, -1]
        if not torch.equal(linear_BDD, torch.diag_embed(linear_BDD.diagonal(dim1=1, dim2=2))):
            return _interpolated(images_BCG, linear_BDD, shift_BD)
        scale_BD = linear_BDD.diagonal(dim1=1, dim2=2)
        if (scale_BD.abs() == 1).all() and torch.equal(shift_BD, shift_BD.round()):
            return _moved(images_BCG, scale_BD < 0, shift_BD.long())
        # Without a rotation linear interpolation goes axis by axis.
        for axis, size in enumerate(images_BCG.shape[2:]):
            index_N = torch.arange(size, dtype=torch.float64)
            centre = (size - 1) / 2
            place_BN = scale_BD[:, axis, None] * (index_N - centre) + shift_BD[:, axis, None] + centre
            images_BCG = along_axis(images_BCG, (1 - (place_BN[:, :, None] - index_N).abs()).clamp(min=0), axis)
        return images_BCG


def _moved(images_BCG: Tensor, mirrored_BD: Tensor, shift_BD: Tensor) -> Tensor:
    """Images of mirrored and shifted voxels, (B, C, *grid): voxel p is that at (-p or p) + shift."""
    if not shift_BD.any() and (mirrored_BD == mirrored_BD[0]).all():
        return images_BCG.flip([axis for axis, mirrored in enumerate(mirrored_BD[0].tolist(), 2) if mirrored])
    moved_BCG = torch.zeros_like(images_BCG)
    sizes = images_BCG.shape[2:]
    for target, source, mirrored_D, shift_D in zip(moved_BCG, images_BCG, mirrored_BD.tolist(), shift_BD.tolist(), strict=True):
        # A mirrored axis is mirrored first, and then moves the other way.
        moves = [-s if mirrored else s for mirrored, s in zip(mirrored_D, shift_D, strict=True)]
        to = [slice(max(0, -s), max(0, size + min(0, -s))) for s, size in zip(moves, sizes, strict=True)]
        of = [slice(max(0, s), max(0, size + min(0, s))) for s, size in zip(moves, sizes, strict=True)]
        axes = [axis for axis, mirrored in enumerate(mirrored_D, 1) if mirrored]
        target[:, *to] = (source.flip(axes) if axes else source)[:, *of]
    return moved_BCG


def _interpolated(images_BCG: Tensor, linear_BDD: Tensor, shift_BD: Tensor) -> Tensor:
    """Images read at linear p + shift, (B, C, *grid)."""
    sizes = images_BCG.shape[2:]
    places_BGD = images_BCG.new_empty(len(images_BCG), *sizes, len(sizes))
    for axis, size in enumerate(sizes):
        # Sums of one line for each axis; grid_sample wants fractions of half the axis, the last axis first.
        lines = [
            linear_BDD[:, axis, other, None] * (torch.arange(n, dtype=torch.float64) - (n - 1) / 2)
            for other, n in enumerate(sizes)
        ]
        lines[0] = lines[0] + shift_BD[:, axis, None]
        on_grid = [
            (line_BN * (2 / size)).to(images_BCG).reshape([-1, *(1,) * other, n, *(1,) * (len(sizes) - 1 - other)])
            for other, (line_BN, n) in enumerate(zip(lines, sizes, strict=True))
        ]
        torch.add(sum(on_grid[1:-1], start=on_grid[0]), on_grid[-1], out=places_BGD[..., len(sizes) - 1 - axis])
    return grid_sample(images_BCG, places_BGD, align_corners=False)


@dataclass(frozen=True, kw_only=True)
class Flip(Piece[DrawnWarp]):
    """Mirroring.

    Attributes:
        flip_probability: chance of mirroring the X axis, left and right.
        flip_other_probability: chance of mirroring each other axis, for images without an up and down.
    """

    limits: ClassVar[Mapping[str, float]] = {"flip_probability": 1.0, "flip_other_probability": 1.0}
    flip_probability: float = 0.0
    flip_other_probability: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnWarp:
        probability_D = torch.tensor([self.flip_probability, *[self.flip_other_probability] * (len(grid_shape) - 1)])
        flipped_BD = uniform(0, 1, len(grid_shape)) < probability_D
        return DrawnWarp(on_B & flipped_BD.any(dim=1), _homogeneous(torch.diag_embed(1.0 - 2.0 * flipped_BD.double())))


@dataclass(frozen=True, kw_only=True)
class Affine(Piece[DrawnWarp]):
    """Rotation about the centre, change of size, shift; no shear.

    Attributes:
        rotation_degrees: largest rotation about each axis, in voxels of equal edges.
        translation_voxels: largest shift along each axis, rounded to whole voxels.
        scale_range: largest relative change of size.
    """

    limits: ClassVar[Mapping[str, float]] = {"rotation_degrees": 180.0, "translation_voxels": 8.0, "scale_range": 0.5}
    rotation_degrees: float = 0.0
    translation_voxels: float = 0.0
    scale_range: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnWarp:
        num_angles = 3 if len(grid_shape) == 3 else 1
        angles_BA = uniform(-1, 1, num_angles) * math.radians(self.rotation_degrees)
        scale_B = 1 + uniform(-1, 1) * self.scale_range
        shift_BD = (uniform(-1, 1, len(grid_shape)) * self.translation_voxels).round()
        return DrawnWarp(on_B, _homogeneous(_rotation(angles_BA) * scale_B[:, None, None], -shift_BD))


@dataclass(frozen=True, kw_only=True)
class Crop(Piece[DrawnWarp]):
    """A part of the image, enlarged to the whole grid (torchvision's ``RandomResizedCrop``, its share by edge, not by area).

    Attributes:
        crop_fraction: largest share of each axis that is left out; the same share of all axes.
    """

    limits: ClassVar[Mapping[str, float]] = {"crop_fraction": 0.9}
    crop_fraction: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnWarp:
        left_out_B = uniform(0, self.crop_fraction)
        size_D = torch.tensor(grid_shape, dtype=torch.float64)
        shift_BD = uniform(-0.5, 0.5, len(grid_shape)) * left_out_B[:, None] * size_D
        scale_BD = (1 - left_out_B)[:, None].expand(-1, len(grid_shape))
        return DrawnWarp(on_B, _homogeneous(torch.diag_embed(scale_BD), shift_BD))


def _homogeneous(linear_BDD: Tensor, shift_BD: Tensor | None = None) -> Tensor:
    """Matrices (B, E, E) that also shift."""
    num_axes = linear_BDD.shape[-1]
    matrix_BEE = torch.eye(num_axes + 1, dtype=torch.float64).repeat(len(linear_BDD), 1, 1)
    matrix_BEE[:, :-1, :-1] = linear_BDD
    if shift_BD is not None:
        matrix_BEE[:, :-1, -1] = shift_BD
    return matrix_BEE


def _rotation(angles_BA: Tensor) -> Tensor:
    """Rotation matrices from one angle in 2-D, from angles about each of three axes in 3-D, in radians."""
    num_axes = 2 if angles_BA.shape[1] == 1 else 3
    planes = [(0, 1)] if num_axes == 2 else [(1, 2), (0, 2), (0, 1)]
    rotation_BDD = torch.eye(num_axes, dtype=torch.float64).repeat(len(angles_BA), 1, 1)
    for angle_B, (i, j) in zip(angles_BA.T, planes, strict=True):
        turn_BDD = torch.eye(num_axes, dtype=torch.float64).repeat(len(angles_BA), 1, 1)
        turn_BDD[:, i, i] = turn_BDD[:, j, j] = angle_B.cos()
        turn_BDD[:, j, i] = angle_B.sin()
        turn_BDD[:, i, j] = -angle_B.sin()
        rotation_BDD = rotation_BDD @ turn_BDD
    return rotation_BDD


def along_axis(images_BCG: Tensor, matrix_BNN: Tensor, axis: int) -> Tensor:
    """Multiply every line of voxels along an axis of the grid by a matrix.

    Args:
        images_BCG: (B, C, *grid).
        matrix_BNN: (B, N out, N in), or (1, N out, N in) for all images.
        axis: of the grid, from 0.

    Returns:
        (B, C, *grid) with N out voxels along the axis; a new tensor.
    """
    matrix_BNN = matrix_BNN.to(images_BCG)
    shape = list(images_BCG.shape)
    shape[axis + 2] = matrix_BNN.shape[1]
    if axis + 3 == images_BCG.ndim:
        lines_BLN = images_BCG.reshape(len(images_BCG), -1, images_BCG.shape[-1])
        return (lines_BLN @ matrix_BNN.transpose(1, 2)).reshape(shape)
    before = math.prod(images_BCG.shape[1 : axis + 2])
    slabs_BANL = images_BCG.reshape(len(images_BCG), before, images_BCG.shape[axis + 2], -1)
    return (matrix_BNN[:, None] @ slabs_BANL).reshape(shape)


@dataclass(frozen=True)
class _DrawnAlongAxis(Drawn):
    """A change along one axis of each image."""

    axis_B: Tensor

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        changed_BCG = images_BCG if reuse else torch.empty_like(images_BCG)
        for axis in sorted(set(self.axis_B.tolist())):
            rows = (self.axis_B == axis).nonzero()[:, 0]
            matrix_BNN = self[rows]._matrix(images_BCG.shape[axis + 2])
            if len(rows) == len(images_BCG):
                return along_axis(images_BCG, matrix_BNN, axis)
            changed_BCG[rows] = along_axis(images_BCG[rows], matrix_BNN, axis)
        return changed_BCG

    @abstractmethod
    def _matrix(self, size: int) -> Tensor:
        """What an axis of ``size`` voxels is multiplied by, (B, N, N)."""


def _filter(response_BN: Tensor, size: int) -> Tensor:
    """The matrix (B, N, N) of a real symmetric filter from its response at the frequencies 0, 1, ... N // 2."""
    kernel_BN: Tensor = torch.fft.irfft(response_BN.to(torch.complex128), n=size)
    index_N = torch.arange(size)
    return kernel_BN[:, (index_N[:, None] - index_N) % size]


@dataclass(frozen=True)
class DrawnBlur(Drawn):
    """Gaussian smoothing, (B, D) standard deviations in voxels.

    The kernel is sampled at the voxels, cut at 3 standard deviations and brought to sum 1; the image goes on beyond its border as
    its mirror image, as in scipy's ``gaussian_filter``. MONAI's ``GaussianSmooth`` integrates over voxels, goes to 4 standard
    deviations, and lets the image fade to 0 at its border.
    """

    sd_BD: Tensor

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        del reuse
        for axis, size in enumerate(images_BCG.shape[2:]):
            images_BCG = along_axis(images_BCG, _blur_matrix(self.sd_BD[:, axis], size), axis)
        return images_BCG


def _blur_matrix(sd_B: Tensor, size: int) -> Tensor:
    sd_B = sd_B.double()
    radius_B = (BLUR_RADIUS_SDS * sd_B + 0.5).long()
    offset_O = torch.arange(-int(radius_B.max()), int(radius_B.max()) + 1)
    weight_BO = torch.exp(-0.5 * (offset_O / sd_B[:, None].clamp(min=1e-6)) ** 2) * (offset_O.abs() <= radius_B[:, None])
    weight_BO = weight_BO / weight_BO.sum(dim=1, keepdim=True)
    place_NO = (torch.arange(size)[:, None] + offset_O) % (2 * size)
    place_NO = torch.minimum(place_NO, 2 * size - 1 - place_NO)
    matrix_BNN = torch.zeros(len(sd_B), size, size, dtype=torch.float64)
    return matrix_BNN.scatter_add_(2, place_NO.expand(len(sd_B), -1, -1), weight_BO[:, None].expand(-1, size, -1))


@dataclass(frozen=True, kw_only=True)
class Blur(Piece[DrawnBlur]):
    """Gaussian smoothing.

    Attributes:
        blur_sd_voxels: largest standard deviation along each axis.
    """

    limits: ClassVar[Mapping[str, float]] = {"blur_sd_voxels": 8.0}
    blur_sd_voxels: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnBlur:
        return DrawnBlur(on_B, uniform(0, self.blur_sd_voxels, len(grid_shape)))


@dataclass(frozen=True)
class DrawnResolution(_DrawnAlongAxis):
    """Slices about ``factor_B`` voxels thick along an axis, a whole number of them: averaged, then interpolated linearly."""

    factor_B: Tensor

    def _matrix(self, size: int) -> Tensor:
        return torch.stack([_thick_slices(size, max(1, round(size / factor))) for factor in self.factor_B.tolist()])


def _thick_slices(size: int, num_slices: int) -> Tensor:
    thickness = size / num_slices
    voxel_N = torch.arange(size, dtype=torch.float64)
    slice_S = torch.arange(num_slices, dtype=torch.float64)
    end_SN = torch.minimum(voxel_N + 1, (slice_S[:, None] + 1) * thickness)
    share_SN = (end_SN - torch.maximum(voxel_N, slice_S[:, None] * thickness)).clamp(min=0) / thickness
    place_N = ((voxel_N + 0.5) / thickness - 0.5).clamp(0, num_slices - 1)
    return (1 - (place_N[:, None] - slice_S).abs()).clamp(min=0) @ share_SN


@dataclass(frozen=True, kw_only=True)
class Resolution(Piece[DrawnResolution]):
    """Thick slices along one axis, any (TorchIO's ``RandomAnisotropy``, which takes every n-th voxel instead of averages).

    Attributes:
        resolution_range: how much thicker than a voxel slices become at most, in voxels.
    """

    limits: ClassVar[Mapping[str, float]] = {"resolution_range": 8.0}
    resolution_range: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnResolution:
        return DrawnResolution(on_B, uniform.integers(0, len(grid_shape)), uniform(1, 1 + self.resolution_range))


@dataclass(frozen=True)
class DrawnGhosts(_DrawnAlongAxis):
    """Every n-th line of k-space along an axis, but the middle one, weakened by a share: n copies of the image, displaced.

    An axis too short for an n-th line has half as many ghosts as voxels.
    """

    num_ghosts_B: Tensor
    strength_B: Tensor

    def _matrix(self, size: int) -> Tensor:
        frequency_N = torch.arange(size // 2 + 1)
        num_ghosts_B = self.num_ghosts_B.clamp(max=max(1, size // 2))
        weakened_BN = (frequency_N % num_ghosts_B[:, None] == 0) & (frequency_N > 0)
        return _filter(1 - self.strength_B[:, None] * weakened_BN, size)


@dataclass(frozen=True, kw_only=True)
class Ghosting(Piece[DrawnGhosts]):
    """Ghosts along one axis, any, as from a pulse or breathing (TorchIO's ``RandomGhosting``): 4 to 10 of them.

    Attributes:
        ghost_strength: largest share that is lost of each weakened line of k-space.
    """

    limits: ClassVar[Mapping[str, float]] = {"ghost_strength": 1.0}
    ghost_strength: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnGhosts:
        axis_B, num_ghosts_B = uniform.integers(0, len(grid_shape)), uniform.integers(NUM_GHOSTS[0], NUM_GHOSTS[1] + 1)
        return DrawnGhosts(on_B, axis_B, num_ghosts_B, uniform(0, self.ghost_strength))


@dataclass(frozen=True)
class DrawnMotion(_DrawnAlongAxis):
    """A head that moved once: the middle lines of k-space along an axis show it before, the outer ones after.

    Attributes:
        share_B: of the lines, acquired before the move.
        warp: the move.
    """

    share_B: Tensor
    warp: DrawnWarp

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        moved_BCG = self.warp.apply(images_BCG)
        difference_BCG = torch.sub(images_BCG, moved_BCG, out=images_BCG if reuse else None)
        return super()._change(difference_BCG, True).add_(moved_BCG)

    def _matrix(self, size: int) -> Tensor:
        frequency_N = torch.arange(size // 2 + 1)
        return _filter((frequency_N <= self.share_B[:, None] * (size // 2)).double(), size)


@dataclass(frozen=True, kw_only=True)
class Motion(Piece[DrawnMotion]):
    """One move during the scan, after 20 to 80 % of the lines of k-space, which were acquired from the middle outwards.

    TorchIO's ``RandomMotion`` moves more than once and acquires line after line; from the middle outwards one product with a
    matrix is exact.

    Attributes:
        motion_degrees: largest rotation about each axis.
        motion_voxels: largest shift along each axis, rounded to whole voxels.
    """

    limits: ClassVar[Mapping[str, float]] = {"motion_degrees": 45.0, "motion_voxels": 8.0}
    motion_degrees: float = 0.0
    motion_voxels: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnMotion:
        axis_B, share_B = uniform.integers(0, len(grid_shape)), uniform(0.2, 0.8)
        move = Affine(rotation_degrees=self.motion_degrees, translation_voxels=self.motion_voxels)
        return DrawnMotion(on_B, axis_B, share_B, move._draw(torch.ones_like(on_B), grid_shape, uniform))


@dataclass(frozen=True)
class DrawnGamma(Drawn):
    """Intensities, as fractions of a range, raised to a power; as MONAI's ``AdjustContrast``.

    Attributes:
        gamma_B: the powers.
        range_B2: lowest and highest intensity, which stay; below the lowest is taken as the lowest. None takes each image's own.
    """

    gamma_B: Tensor
    range_B2: Tensor | None = None

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        if self.range_B2 is None:
            low_B, high_B = images_BCG.flatten(1).amin(dim=1), images_BCG.flatten(1).amax(dim=1)
        else:
            low_B, high_B = self.range_B2.to(images_BCG).T
        width_B = torch.where(high_B > low_B, high_B - low_B, 1)
        low_B1, width_B1 = _like(low_B, images_BCG), _like(width_B, images_BCG)
        changed_BCG = torch.sub(images_BCG, low_B1, out=images_BCG if reuse else None).div_(width_B1)
        if self.range_B2 is not None:
            changed_BCG.clamp_(min=0)
        # exp(gamma log x) is no faster: processors take many times as long for log(0), and for the tiny numbers it gives.
        changed_BCG.pow_(_like(self.gamma_B, images_BCG))
        return torch.addcmul(low_B1, changed_BCG, width_B1, out=changed_BCG)


@dataclass(frozen=True, kw_only=True)
class Gamma(Piece[DrawnGamma]):
    """A contrast curve: intensities, from each image's lowest to its highest, raised to a power.

    Attributes:
        gamma_range: the power lies between 1 / (1 + this) and 1 + this, evenly on a logarithmic scale.
    """

    limits: ClassVar[Mapping[str, float]] = {"gamma_range": 4.0}
    gamma_range: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnGamma:
        del grid_shape
        return DrawnGamma(on_B, torch.exp(uniform(-1, 1) * math.log1p(self.gamma_range)))


@dataclass(frozen=True)
class DrawnJitter(Drawn):
    """Intensities times ``brightness_B``, their distance from the image's mean also times ``contrast_B``."""

    brightness_B: Tensor
    contrast_B: Tensor

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        mean_B = images_BCG.flatten(1).mean(dim=1)
        gain_B = (self.brightness_B * self.contrast_B).to(images_BCG)
        offset_B = (self.brightness_B * (1 - self.contrast_B)).to(images_BCG) * mean_B
        out = images_BCG if reuse else None
        return torch.addcmul(_like(offset_B, images_BCG), images_BCG, _like(gain_B, images_BCG), out=out)


@dataclass(frozen=True, kw_only=True)
class Jitter(Piece[DrawnJitter]):
    """Brightness and contrast, as torchvision's ``ColorJitter`` without its clipping to 0 and 1.

    Attributes:
        jitter: largest relative change of each.
    """

    limits: ClassVar[Mapping[str, float]] = {"jitter": 0.9}
    jitter: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnJitter:
        del grid_shape
        low, high = 1 - self.jitter, 1 + self.jitter
        return DrawnJitter(on_B, uniform(low, high), uniform(low, high))


@dataclass(frozen=True)
class DrawnBiasField(Drawn):
    """Intensities times the exponential of a polynomial, as in MONAI's ``RandBiasField``.

    Attributes:
        coefficients_BK: (B, K, K, K), or (B, K, K) in 2-D: of products of Legendre polynomials of order 0 to K - 1, one factor an
            axis, which runs from -1 to 1 between the centres of its first and last voxel.
    """

    coefficients_BK: Tensor

    def field(self, grid_shape: Sequence[int], like: Tensor) -> Tensor:
        """What intensities are multiplied by, (B, 1, *grid), of the dtype and on the device of ``like``."""
        log_field_B1G = self.coefficients_BK[:, None].to(like)
        for axis in reversed(range(len(grid_shape))):
            basis_NK = legendre(grid_shape[axis], self.coefficients_BK.shape[1])
            log_field_B1G = along_axis(log_field_B1G.contiguous(), basis_NK[None], axis)
        return log_field_B1G.exp_()

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        field_B1G = self.field(images_BCG.shape[2:], images_BCG)
        return torch.mul(images_BCG, field_B1G, out=images_BCG if reuse else None)


def legendre(size: int, num_terms: int) -> Tensor:
    """Legendre polynomials of order 0 to K - 1 at N places from -1 to 1, (N, K) in double precision."""
    place_N = torch.linspace(-1, 1, size, dtype=torch.float64) if size > 1 else torch.zeros(1, dtype=torch.float64)
    terms = [torch.ones_like(place_N), place_N]
    for order in range(1, num_terms - 1):
        terms.append(((2 * order + 1) * place_N * terms[order] - order * terms[order - 1]) / (order + 1))
    return torch.stack(terms[:num_terms], dim=1)


def unit_log_field(coefficients_BK: Tensor, grid_shape: Sequence[int]) -> Tensor:
    """The same polynomials, shifted and scaled to mean 0 and standard deviation 1 over the voxels.

    Both are exact, from the sums along each axis alone; a polynomial that is constant on the grid becomes 0.
    """
    num_terms = coefficients_BK.shape[1]
    image_BK = coefficients_BK[:, None].double()
    mean_BK, smooth_BK = image_BK, image_BK
    for axis, size in enumerate(grid_shape):
        basis_NK = legendre(size, num_terms)
        mean_BK = along_axis(mean_BK, basis_NK.mean(dim=0)[None, None], axis)
        smooth_BK = along_axis(smooth_BK, (basis_NK.T @ basis_NK / size)[None], axis)
    mean_B = mean_BK.flatten()
    variance_B = (image_BK * smooth_BK).flatten(1).sum(dim=1) - mean_B**2
    centred_BK = coefficients_BK.double().clone()
    centred_BK.flatten(1)[:, 0] -= mean_B
    scale_B = torch.where(variance_B > 1e-12, variance_B.clamp(min=1e-12).rsqrt(), 0.0)
    return centred_BK * scale_B.reshape([-1] + [1] * len(grid_shape))


@dataclass(frozen=True, kw_only=True)
class BiasField(Piece[DrawnBiasField]):
    """Uneven sensitivity of the coil: the exponential of a polynomial of third order (MONAI's ``RandBiasField``).

    MONAI bounds the coefficients, here the spread is set: it does not depend on the number of terms.

    Attributes:
        bias_field_strength: largest standard deviation over the voxels of the logarithm of the sensitivity, whose mean is 0.
    """

    limits: ClassVar[Mapping[str, float]] = {"bias_field_strength": 2.0}
    bias_field_strength: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnBiasField:
        num_axes, num_terms = len(grid_shape), BIAS_FIELD_ORDER + 1
        orders = torch.meshgrid(*[torch.arange(num_terms)] * num_axes, indexing="ij")
        wanted_K = torch.stack(orders).sum(dim=0) <= BIAS_FIELD_ORDER
        coefficients_BK = unit_log_field(uniform(-1, 1, *[num_terms] * num_axes) * wanted_K, grid_shape)
        strength_B = uniform(0, self.bias_field_strength)
        return DrawnBiasField(on_B, coefficients_BK * strength_B.reshape([-1] + [1] * num_axes))


@lru_cache(maxsize=4)
def _noise_pool(device: torch.device) -> Tensor:
    """`POOL_SIZE` standard normal values, the same on every device."""
    return torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(0)).to(device)


def _add_noise(source_V: Tensor, target_V: Tensor, sd: Tensor, generator: torch.Generator) -> None:
    """Write source + sd * noise to the target (which may be the source), run by run of voxels."""
    pool = _noise_pool(target_V.device)
    num_runs = -(-len(target_V) // RUN_SIZE)
    places = torch.randint(2 * (POOL_SIZE - RUN_SIZE), (num_runs,), generator=generator).tolist()
    for run, place in enumerate(places):
        start, stop = run * RUN_SIZE, min((run + 1) * RUN_SIZE, len(target_V))
        offset, negative = divmod(place, 2)
        noise_V = pool[offset : offset + stop - start]
        torch.addcmul(source_V[start:stop], noise_V, sd, value=-1 if negative else 1, out=target_V[start:stop])


@dataclass(frozen=True)
class DrawnNoise(Drawn):
    """Gaussian noise of standard deviation ``sd_B``; ``seed_B`` alone decides its pattern.

    A pool of `POOL_SIZE` standard normal values is made once. Each run of at most `RUN_SIZE` voxels of each image adds (or
    subtracts) as many neighbouring values from a random place in it: within a run the values are as independent as drawn ones,
    and what two runs share is displaced by millions of values unless their places, of three million, almost agree. So noise is
    normal and white within an image, and different in two views of it; only over many images does it repeat.
    """

    sd_B: Tensor
    seed_B: Tensor

    def in_units_of(self, unit: Tensor) -> Self:
        """The same noise, its standard deviation times ``unit``, (1,) or (B,)."""
        return replace(self, sd_B=self.sd_B.to(unit.device) * unit)

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        noisy_BCG = images_BCG if reuse else torch.empty_like(images_BCG)
        for source, target, sd, seed in zip(images_BCG, noisy_BCG, self.sd_B.to(images_BCG), self.seed_B.tolist(), strict=True):
            _add_noise(source.view(-1), target.view(-1), sd, torch.Generator().manual_seed(seed))
        return noisy_BCG


@dataclass(frozen=True, kw_only=True)
class Noise(Piece[DrawnNoise]):
    """Gaussian noise.

    Attributes:
        noise_sd: largest standard deviation, in units of the normalised volume.
    """

    limits: ClassVar[Mapping[str, float]] = {"noise_sd": 10.0}
    noise_sd: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnNoise:
        del grid_shape
        return DrawnNoise(on_B, uniform(0, self.noise_sd), uniform.integers(0, 2**62))


def magnitude(real: Tensor, imaginary: Tensor) -> Tensor:
    """What a scanner stores of a signal with noise in both channels; ``real`` is overwritten."""
    return torch.hypot(real, imaginary, out=real)


@dataclass(frozen=True)
class DrawnRicianNoise(DrawnNoise):
    """Magnitude of the signal after noise as that of `DrawnNoise` in both channels; as MONAI's ``RandRicianNoise``."""

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        noisy_BCG = images_BCG if reuse else torch.empty_like(images_BCG)
        zero_V = images_BCG.new_zeros(()).expand(images_BCG[0].numel())
        imaginary_V = torch.empty_like(images_BCG[0]).view(-1)
        for source, target, sd, seed in zip(images_BCG, noisy_BCG, self.sd_B.to(images_BCG), self.seed_B.tolist(), strict=True):
            generator = torch.Generator().manual_seed(seed)
            _add_noise(source.view(-1), target.view(-1), sd, generator)
            _add_noise(zero_V, imaginary_V, sd, generator)
            magnitude(target.view(-1), imaginary_V)
        return noisy_BCG


@dataclass(frozen=True, kw_only=True)
class RicianNoise(Piece[DrawnRicianNoise]):
    """The noise of magnitude images, never negative: what air looks like in a scan.

    Attributes:
        rician_sd: largest standard deviation in each of the two channels, in units of the normalised volume.
    """

    limits: ClassVar[Mapping[str, float]] = {"rician_sd": 10.0}
    rician_sd: float = 0.0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnRicianNoise:
        del grid_shape
        return DrawnRicianNoise(on_B, uniform(0, self.rician_sd), uniform.integers(0, 2**62))


@dataclass(frozen=True)
class DrawnCutout(Drawn):
    """Boxes set to 0.

    Attributes:
        centre_BMD: centres as fractions of each axis; a box may stick out.
        fraction: edge as a fraction of each axis.
    """

    centre_BMD: Tensor
    fraction: float

    def _change(self, images_BCG: Tensor, reuse: bool) -> Tensor:
        changed_BCG = images_BCG if reuse else images_BCG.clone()
        sizes = images_BCG.shape[2:]
        for image, centre_MD in zip(changed_BCG, self.centre_BMD.tolist(), strict=True):
            for centre_D in centre_MD:
                edges = [(c - self.fraction / 2, c + self.fraction / 2) for c in centre_D]
                box = [slice(max(0, round(a * n)), max(0, round(b * n))) for (a, b), n in zip(edges, sizes, strict=True)]
                image[:, *box] = 0.0
        return changed_BCG


@dataclass(frozen=True, kw_only=True)
class Cutout(Piece[DrawnCutout]):
    """Blank boxes (DeVries and Taylor, 2017).

    Attributes:
        cutout_fraction: edge of a box, as a fraction of each axis.
        cutout_boxes: how many.
    """

    limits: ClassVar[Mapping[str, float]] = {"cutout_fraction": 0.9, "cutout_boxes": 8}
    cutout_fraction: float = 0.0
    cutout_boxes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.cutout_boxes) is not int:
            raise ValueError(f"Cutout: cutout_boxes must be a whole number, got {self.cutout_boxes!r}.")

    @property
    def is_on(self) -> bool:
        """Whether any image can change."""
        return self.chance > 0 and self.cutout_fraction > 0 and self.cutout_boxes > 0

    def _draw(self, on_B: Tensor, grid_shape: tuple[int, ...], uniform: _Uniform) -> DrawnCutout:
        return DrawnCutout(on_B, uniform(0, 1, self.cutout_boxes, len(grid_shape)), self.cutout_fraction)


def _like(value_B: Tensor, images_BCG: Tensor) -> Tensor:
    """One value an image, (B, 1, 1, ...), where the images are."""
    return value_B.to(images_BCG).reshape([-1] + [1] * (images_BCG.ndim - 1))
