"""A phantom consortium: six hospitals' T1-weighted brain scans as BIDS NIfTI, with the anatomy behind every scan known.

Anatomy and scanner are kept apart. An `Anatomy` is a handful of numbers that depend on age, sex and disease;
`render` turns it into a noise-free volume by evaluating signed distances, so that any voxel size and head pose is
exact; `degrade` and `to_nifti` do what a scanner does to it, one knob each. Coordinates are millimetres in RAS,
(0, 0, 0) at the centre of the field of view; intensities are relative to white matter, which is 1.

Letters: X, Y, Z voxels to the right, anterior and superior; P points.
"""

import csv
import gzip
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial.transform import Rotation

from core.data.augment import DrawnBiasField, DrawnBlur, DrawnGamma, magnitude, unit_log_field

FORMAT_VERSION = 3
FIELD_OF_VIEW_MM = (184.0, 216.0, 176.0)
WHITE_MATTER_STORED = 500.0  # stored intensity of white matter at gain 1
SECOND_SESSION_YEARS = (0.8, 1.6)
ATROPHY_YEARS = (10.0, 30.0)

AIR, BONE, CSF, MUSCLE, GREY, FAT, WHITE = 0.0, 0.10, 0.22, 0.42, 0.68, 0.88, 1.0
THALAMUS, STRIATUM, CEREBELLUM, BRAINSTEM = 0.84, 0.74, 0.76, 0.92

Float32 = npt.NDArray[np.float32]
Sex = Literal["F", "M"]
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """What a machine and its protocol do to an image; the defaults are neutral, each knob acts alone.

    Args:
        name: Unique in the consortium.
        voxel_size_mm: Along right, anterior and superior, whatever the stored orientation.
        orientation: Axis codes in which the file is stored, such as "LAS".
        contrast_gamma: Exponent of the tissue contrast curve; white matter stays 1. Neutral: 1.
        gain: Factor on all intensities. Neutral: 1.
        bias_field_strength: Standard deviation of the logarithm of the coil's sensitivity. Neutral: 0.
        coil: Seed of the coil's sensitivity pattern; scanners of one model share it.
        noise_sd: Rician noise, relative to white matter. Neutral: 0.
        blur_fwhm_mm: Full width at half maximum of the point spread beyond the voxel. Neutral: 0.
        scl_slope: NIfTI intensity scale of the int16 file; None stores the intensities as they are.
    """

    name: str
    voxel_size_mm: Triple = (4.0, 4.0, 4.0)
    orientation: str = "RAS"
    contrast_gamma: float = 1.0
    gain: float = 1.0
    bias_field_strength: float = 0.0
    coil: int = 0
    noise_sd: float = 0.0
    blur_fwhm_mm: float = 0.0
    scl_slope: float | None = None

    def __post_init__(self) -> None:
        where = f"scanner {self.name!r}"
        for knob in ("contrast_gamma", "gain"):
            if not getattr(self, knob) > 0:
                raise ValueError(f"{where}: {knob} must be positive, got {getattr(self, knob)!r}. Neutral is 1.")
        for knob in ("bias_field_strength", "noise_sd", "blur_fwhm_mm"):
            if not getattr(self, knob) >= 0:
                raise ValueError(f"{where}: {knob} must be zero or more, got {getattr(self, knob)!r}. Neutral is 0.")
        if not all(size > 0 for size in self.voxel_size_mm):
            raise ValueError(f"{where}: voxel_size_mm must be three positive lengths, got {self.voxel_size_mm!r}.")
        if sorted(self.orientation.translate(str.maketrans("LPI", "RAS"))) != ["A", "R", "S"]:
            raise ValueError(f"{where}: orientation must name each body axis once, got {self.orientation!r}. Try 'RAS'.")
        if self.scl_slope is not None and not self.scl_slope > 0:
            raise ValueError(f"{where}: scl_slope must be positive or None, got {self.scl_slope!r}.")


@dataclass(frozen=True, kw_only=True)
class Site:
    """A hospital: its scanners (subjects take turns) and whom it scans.

    Args:
        name: Folder of its BIDS data set.
        scanners: At least one.
        num_healthy: Controls.
        num_patients: Subjects with the disease.
        age_range_years: Ages are uniform between these.
        repeat_fraction: Share of each group with a second session.
    """

    name: str
    scanners: tuple[Scanner, ...]
    num_healthy: int
    num_patients: int = 0
    age_range_years: tuple[float, float]
    repeat_fraction: float = 0.15


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One focal pathology of the medial temporal lobe: darker tissue around a shrunken hippocampus.

    `centre_mm` is in a head of scale 1, `volume_ml` as it is.
    """

    centre_mm: Triple
    volume_ml: float


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The ground truth of one subject at one age.

    `atrophy_years` is by how much the tissue of a patient is older than the subject. `aspect` stretches the head along right,
    anterior and superior; `ventricle_asymmetry` is the relative excess of the right ventricle's radius, `hippocampus_asymmetry`
    that of the right hippocampus; `folding` shifts the phases of the waves that fold the cortex.
    """

    age_years: float
    sex: Sex
    head_scale: float
    ventricle_volume_ml: float
    cortical_thickness_mm: float
    sulcal_width_mm: float
    lesion: Lesion | None
    atrophy_years: float
    aspect: Triple
    ventricle_asymmetry: float
    hippocampus_asymmetry: float
    scalp_thickness_mm: float
    folding: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where the head lies in the field of view: rotation vector in degrees, then translation."""

    rotation_deg: Triple = (0.0, 0.0, 0.0)
    translation_mm: Triple = (0.0, 0.0, 0.0)


CENTRED = Pose()

_NORTH = Scanner(
    name="north-1",
    voxel_size_mm=(4.0, 4.0, 4.0),
    orientation="LAS",
    contrast_gamma=1.0,
    gain=1.0,
    bias_field_strength=0.15,
    coil=1,
    noise_sd=0.03,
    blur_fwhm_mm=2.0,
)
_EAST = Scanner(
    name="east-1",
    voxel_size_mm=(3.6, 3.6, 4.4),
    orientation="RAS",
    contrast_gamma=1.25,
    gain=0.6,
    bias_field_strength=0.10,
    coil=2,
    noise_sd=0.04,
    blur_fwhm_mm=3.5,
)
_SOUTH_1 = Scanner(
    name="south-1",
    voxel_size_mm=(4.0, 3.8, 3.8),
    orientation="PSR",
    contrast_gamma=0.88,
    gain=1.6,
    bias_field_strength=0.2,
    coil=3,
    noise_sd=0.05,
    blur_fwhm_mm=1.0,
    scl_slope=0.5,
)
_SOUTH_2 = Scanner(
    name="south-2",
    voxel_size_mm=(4.4, 4.0, 4.0),
    orientation="LPS",
    contrast_gamma=1.08,
    gain=0.9,
    bias_field_strength=0.25,
    coil=4,
    noise_sd=0.07,
    blur_fwhm_mm=4.0,
)
_WEST = Scanner(
    name="west-1",
    voxel_size_mm=(4.2, 3.4, 4.2),
    orientation="RAS",
    contrast_gamma=1.12,
    gain=1.2,
    bias_field_strength=0.3,
    coil=5,
    noise_sd=0.025,
    blur_fwhm_mm=0.0,
)
_HILL = Scanner(
    name="hill-1",
    voxel_size_mm=(4.4, 4.2, 3.8),
    orientation="ASL",
    contrast_gamma=0.85,
    gain=2.0,
    bias_field_strength=0.2,
    coil=6,
    noise_sd=0.05,
    blur_fwhm_mm=3.0,
    scl_slope=0.5,
)

PRETRAINING_SITES = ("north", "east", "south", "west")
TARGET_SITES = ("harbor", "hill")
CONSORTIUM: tuple[Site, ...] = (
    Site(name="north", scanners=(_NORTH,), num_healthy=110, age_range_years=(18, 65)),
    Site(name="east", scanners=(_EAST,), num_healthy=90, age_range_years=(35, 85)),
    Site(name="south", scanners=(_SOUTH_1, _SOUTH_2), num_healthy=110, age_range_years=(18, 85)),
    Site(name="west", scanners=(_WEST,), num_healthy=80, age_range_years=(25, 75)),
    Site(
        name="harbor",
        scanners=(replace(_NORTH, name="harbor-1"),),
        num_healthy=60,
        num_patients=60,
        age_range_years=(20, 75),
    ),
    Site(name="hill", scanners=(_HILL,), num_healthy=50, num_patients=50, age_range_years=(20, 75)),
)


def _typical_ventricle_volume_ml(age_years: float) -> float:
    return 9.0 * math.exp(0.021 * (age_years - 18.0))


def _typical_cortical_thickness_mm(age_years: float) -> float:
    return 3.5 - 0.016 * (age_years - 18.0)


def _typical_sulcal_width_mm(age_years: float) -> float:
    return 0.8 + 0.030 * (age_years - 18.0)


def draw_anatomy(rng: np.random.Generator, age_years: float, sex: Sex, patient: bool) -> Anatomy:
    """Draws a subject: typical values for the age and sex times individual variation.

    A patient has a lesion, and tissue as of somebody older.
    """
    head_scale = (1.03 if sex == "M" else 0.97) * math.exp(rng.normal(0, 0.028))
    side = rng.choice((-1.0, 1.0))
    lesion_offset_mm = rng.normal(0, 2.5, 3)
    lesion_volume_ml = math.exp(rng.uniform(math.log(0.8), math.log(12.0)))
    lesion_centre_mm = _triple(np.array(_HIPPOCAMPUS) * (side, 1, 1) + lesion_offset_mm)
    healthy = Anatomy(
        age_years=age_years,
        sex=sex,
        head_scale=head_scale,
        ventricle_volume_ml=_typical_ventricle_volume_ml(age_years) * math.exp(rng.normal(0, 0.2)),
        cortical_thickness_mm=_typical_cortical_thickness_mm(age_years) * math.exp(rng.normal(0, 0.04)),
        sulcal_width_mm=_typical_sulcal_width_mm(age_years) * math.exp(rng.normal(0, 0.15)),
        lesion=None,
        atrophy_years=0.0,
        aspect=_triple(np.exp(rng.normal(0, 0.02, 3))),
        ventricle_asymmetry=rng.normal(0, 0.05),
        hippocampus_asymmetry=rng.normal(0, 0.06),
        scalp_thickness_mm=rng.uniform(3.0, 6.5),
        folding=tuple(rng.normal(0, 0.3, _NUM_FOLDS)),
    )
    if not patient:
        return healthy
    atrophy_years = rng.uniform(*ATROPHY_YEARS)
    lesion = Lesion(centre_mm=lesion_centre_mm, volume_ml=lesion_volume_ml)
    return replace(age_by(healthy, atrophy_years), age_years=age_years, lesion=lesion, atrophy_years=atrophy_years)


def age_by(anatomy: Anatomy, years: float) -> Anatomy:
    """The same subject `years` later: age-typical values move, what sets the subject apart from them stays."""
    then, now = anatomy.age_years, anatomy.age_years + years
    return replace(
        anatomy,
        age_years=now,
        ventricle_volume_ml=anatomy.ventricle_volume_ml
        * (_typical_ventricle_volume_ml(now) / _typical_ventricle_volume_ml(then)),
        cortical_thickness_mm=anatomy.cortical_thickness_mm
        * (_typical_cortical_thickness_mm(now) / _typical_cortical_thickness_mm(then)),
        sulcal_width_mm=anatomy.sulcal_width_mm * (_typical_sulcal_width_mm(now) / _typical_sulcal_width_mm(then)),
    )


def draw_pose(rng: np.random.Generator) -> Pose:
    """Draws a patient's position: a few degrees, a few millimetres."""
    return Pose(rotation_deg=_triple(rng.normal(0, 1.5, 3)), translation_mm=_triple(rng.normal(0, 1.0, 3)))


# Landmarks of a head of scale 1, in mm; paired structures are given on the right.
_HIPPOCAMPUS = (27.0, -14.0, -16.0)
_VENTRICLE_PATH = ((9.0, 36.0, 8.0), (10.0, 6.0, 22.0), (24.0, -38.0, 14.0), (35.0, -14.0, -10.0))
_VENTRICLE_THICKNESS = (1.0, 1.0, 0.6)  # of each stretch of the path, relative
_SULCAL_DEPTH_MM = 15.0
_LESION_OPACITY = 0.55
# Waves whose zero surfaces are the sulci; subjects share the waves and shift their phases.
_NUM_FOLDS = 9
_fold_rng = np.random.default_rng(19)
_FOLD_DIRECTIONS = _fold_rng.normal(size=(_NUM_FOLDS, 3))
_FOLD_LENGTHS_MM = _fold_rng.uniform(26, 36, (_NUM_FOLDS, 1))
_FOLD_PHASES = _fold_rng.uniform(0, 2 * np.pi, _NUM_FOLDS)
_FOLD_WAVES = 2 * np.pi / _FOLD_LENGTHS_MM * _FOLD_DIRECTIONS / np.linalg.norm(_FOLD_DIRECTIONS, axis=1, keepdims=True)


def field_of_view_shape(voxel_size_mm: Triple) -> tuple[int, int, int]:
    """Voxels (X, Y, Z) that cover the field of view."""
    x, y, z = (math.ceil(extent / size) for extent, size in zip(FIELD_OF_VIEW_MM, voxel_size_mm, strict=True))
    return x, y, z


def render(
    anatomy: Anatomy,
    voxel_size_mm: Triple = (4.0, 4.0, 4.0),
    shape: tuple[int, int, int] | None = None,
    pose: Pose = CENTRED,
) -> Float32:
    """Renders the noise-free T1-weighted volume, white matter 1, edges softened over about a voxel.

    Args:
        anatomy: Whom to render.
        voxel_size_mm: Along right, anterior, superior.
        shape: Voxels (X, Y, Z) around the centre of the field of view; by default all of it.
        pose: Where the head lies.

    Returns:
        (X, Y, Z) float32, axes to the right, anterior, superior.
    """
    shape_XYZ = field_of_view_shape(voxel_size_mm) if shape is None else shape
    head_3XYZ = _head_coordinates(anatomy, voxel_size_mm, shape_XYZ, pose)
    x, y, z = head_3XYZ
    near_XYZ = np.square(x / 90) + np.square((y + 2) / 108) + np.square((z + 20) / 112) < 1
    p_3P = head_3XYZ[:, near_XYZ]
    # A sigmoid of this steepness has the slope that averaging over a voxel gives an edge.
    soft = _SoftEdge(steepness=4.0 * anatomy.head_scale / float(np.mean(voxel_size_mm)))

    neck, face = _ellipsoid(p_3P, (0, -22, -84), (54, 58, 66)), _ellipsoid(p_3P, (0, 38, -60), (48, 50, 46))
    head = _union(_union(_ellipsoid(p_3P, (0, -2, 4), (73, 90, 71)), neck, 12), face, 12)
    floor = -p_3P[2] - 22 - 0.12 * p_3P[1]
    vault = _intersection(_ellipsoid(p_3P, (0, -2, 6), (68, 85, 65)), floor, 12)
    vault = _union(vault, _ellipsoid(_mirrored(p_3P), (41, 0, -22), (24, 45, 24)), 3)
    vault = _union(vault, _ellipsoid(p_3P, (0, -44, -34), (51, 37, 33)), 5)

    # A head is a stack of nested tissues: paint from the outside in.
    image_P = FAT * soft.inside(head - anatomy.scalp_thickness_mm / anatomy.head_scale)
    _paint(image_P, soft.inside(head), MUSCLE)
    _paint(image_P, soft.inside(_ellipsoid(p_3P, (0, 60, -52), (12, 18, 18))), AIR)
    _paint(image_P, soft.inside(vault - 5), BONE)
    _paint(image_P, soft.inside(vault), CSF)
    indoors = vault < 5
    low = indoors & (p_3P[2] < 5)
    image_P[low] = _paint_hindbrain(image_P[low], p_3P[:, low], soft)
    image_P[indoors] = _paint_cerebrum(image_P[indoors], p_3P[:, indoors], anatomy, soft)
    deep = indoors & (_ellipsoid(p_3P, (0, -4, 2), (58, 68, 52)) < 0)
    image_P[deep] = _paint_deep(image_P[deep], p_3P[:, deep], anatomy, soft)

    volume_XYZ = np.zeros(shape_XYZ, np.float32)
    volume_XYZ[near_XYZ] = image_P
    return volume_XYZ


@dataclass(frozen=True, kw_only=True)
class _SoftEdge:
    """Partial volume: how much of a voxel lies on the inner side of a surface at a signed distance."""

    steepness: float  # per mm

    def inside(self, distance_P: Float32) -> Float32:
        # The logistic function, by way of the quicker tanh.
        half_P: Float32 = 0.5 * np.tanh(0.5 * self.steepness * distance_P)
        return 0.5 - half_P

    def inside_tube(self, distance_P: Float32, radius_P: Float32) -> Float32:
        """Fraction within a radius of a line; the square of the radius gives way to the variance softening adds to it."""
        variance = math.pi**2 / 3 / self.steepness**2
        return self.inside(distance_P - np.sqrt(np.maximum(np.square(radius_P) - variance, 0)))

    def sheet(self, distance_P: Float32, half_width: float) -> Float32:
        """Fraction within `half_width` of a surface; zero for a sheet without width."""
        return self.inside(distance_P - half_width) - self.inside(distance_P + half_width)


def _paint_hindbrain(image_P: Float32, p_3P: Float32, soft: _SoftEdge) -> Float32:
    paired_3P = _mirrored(p_3P)
    _paint(image_P, soft.inside(_capsule(p_3P, (0, -14, -8), (0, -28, -84)) - 11), BRAINSTEM)
    cerebellum = _union(_ellipsoid(paired_3P, (22, -46, -36), (28, 30, 22)), _ellipsoid(p_3P, (0, -44, -36), (14, 26, 20)), 5)
    folia = 0.08 * np.sin(2 * np.pi / 13 * (p_3P[2] + 0.35 * p_3P[1]))
    _paint(image_P, soft.inside(cerebellum), CEREBELLUM + folia)
    _paint(image_P, soft.inside(_ellipsoid(paired_3P, (14, -42, -34), (15, 14, 7))), WHITE)
    return image_P


def _paint_cerebrum(image_P: Float32, p_3P: Float32, anatomy: Anatomy, soft: _SoftEdge) -> Float32:
    scale = anatomy.head_scale
    half_sulcus = 0.5 * anatomy.sulcal_width_mm / scale
    thickness = anatomy.cortical_thickness_mm / scale
    paired_3P = _mirrored(p_3P)

    # Two hemispheres with a flat floor and temporal lobes below; its surface recedes as its sulci widen.
    floor = -p_3P[2] - 19 - 0.12 * p_3P[1]
    dome = _intersection(_ellipsoid(p_3P, (0, -2, 8), (65.5, 82.5, 61.5)), floor, 10)
    pial = _union(dome, _ellipsoid(paired_3P, (43, 0, -22), (20, 42, 20)), 3) + half_sulcus
    # Three families of sheets carry fluid inwards, grey matter on both sides: folds, the fissure between the
    # hemispheres down to the corpus callosum, and the Sylvian fissures.
    fold = _fold_distance(p_3P, anatomy.folding)
    callosum = _ellipsoid(p_3P, (0, -2, 8), (30, 48, 24))
    sylvian = np.abs(paired_3P[2] + 6 - np.float32(0.25) * paired_3P[1])
    sylvian_end = np.maximum(36 - paired_3P[0], np.abs(paired_3P[1] - 4) - 32)

    def uncut(half_width: float, margin: float) -> Float32:
        """Fraction outside all sheets, when they are this thick and reach this much further."""
        folds_P = soft.sheet(fold, half_width) * soft.inside(-(pial + _SULCAL_DEPTH_MM + margin))
        fissure_P = soft.sheet(paired_3P[0], half_width) * soft.inside(-(callosum + margin))
        sylvian_P = soft.sheet(sylvian, half_width) * soft.inside(sylvian_end - margin)
        outside_P: Float32 = (1 - folds_P) * (1 - fissure_P) * (1 - sylvian_P)
        return outside_P

    tissue = soft.inside(pial) * uncut(half_sulcus, 0.0)
    white = soft.inside(pial + thickness) * uncut(half_sulcus + thickness, thickness)
    _paint(image_P, tissue, GREY)
    _paint(image_P, np.minimum(white, tissue), WHITE)

    return image_P


def _paint_deep(image_P: Float32, p_3P: Float32, anatomy: Anatomy, soft: _SoftEdge) -> Float32:
    paired_3P = _mirrored(p_3P)
    right_P = np.sign(p_3P[0])
    _paint(image_P, soft.inside(_ellipsoid(paired_3P, (10, -16, 5), (8, 14, 9))), THALAMUS)
    _paint(image_P, soft.inside(_ellipsoid(paired_3P, (27, 4, 2), (6, 17, 10))), STRIATUM)
    _paint(image_P, soft.inside(_ellipsoid(paired_3P, (17, 22, 8), (6, 11, 9))), STRIATUM)

    lesion, lesion_radius = anatomy.lesion, 0.0
    swelling_P = 6 * anatomy.hippocampus_asymmetry * right_P
    if lesion is not None:
        lesion_radius = _ball_radius_mm(lesion.volume_ml) / anatomy.head_scale
        swelling_P -= np.float32(0.3 * lesion_radius) * (right_P == np.sign(lesion.centre_mm[0]))
    _paint(image_P, soft.inside(_ellipsoid(paired_3P, _HIPPOCAMPUS, (7, 19, 7)) - swelling_P), GREY)
    if lesion is not None:
        ball = _ellipsoid(p_3P, lesion.centre_mm, (lesion_radius, lesion_radius, lesion_radius))
        _paint(image_P, _LESION_OPACITY * soft.inside(ball), CSF)

    radius = _ventricle_radius_mm(anatomy.ventricle_volume_ml / (anatomy.head_scale**3 * math.prod(anatomy.aspect)))
    radius_P = radius * (1 + anatomy.ventricle_asymmetry * right_P)
    ventricle_P = np.zeros_like(image_P)
    for (start, end), relative in zip(pairwise(_VENTRICLE_PATH), _VENTRICLE_THICKNESS, strict=True):
        stretch_P = soft.inside_tube(_capsule(paired_3P, start, end), relative * radius_P)
        ventricle_P = np.maximum(ventricle_P, stretch_P)
    _paint(image_P, ventricle_P, CSF)
    _paint(image_P, soft.inside(_ellipsoid(p_3P, (0, -10, 2), (2.5, 15, 11))), CSF)
    return image_P


def _axis_mm(num_voxels: int, voxel_size_mm: float) -> npt.NDArray[np.float64]:
    """Voxel centres along one axis of a volume centred on the origin."""
    return np.linspace(-0.5, 0.5, num_voxels) * ((num_voxels - 1) * voxel_size_mm)


def _head_coordinates(
    anatomy: Anatomy, voxel_size_mm: Triple, shape_XYZ: tuple[int, int, int], pose: Pose
) -> npt.NDArray[np.float32]:
    """Where each voxel lies in the subject's own head of scale 1: (3, X, Y, Z)."""
    x, y, z = np.ix_(
        *(_axis_mm(n, size) - shift for n, size, shift in zip(shape_XYZ, voxel_size_mm, pose.translation_mm, strict=True))
    )
    back = Rotation.from_rotvec(pose.rotation_deg, degrees=True).inv().as_matrix()
    back /= anatomy.head_scale * np.array(anatomy.aspect)[:, None]
    return np.stack([(row[0] * x + row[1] * y + row[2] * z) for row in back], dtype=np.float32)


def _mirrored(p_3P: Float32) -> Float32:
    """Both sides of the body laid on the right one."""
    return np.stack((np.abs(p_3P[0]), p_3P[1], p_3P[2]))


def _ellipsoid(p_3P: Float32, centre: Sequence[float], radii: Sequence[float]) -> Float32:
    """Signed distance, negative inside, exact to first order at the surface."""
    sides_3 = np.array(radii, np.float32)[:, None]
    unit_3P = (p_3P - np.array(centre, np.float32)[:, None]) / sides_3
    norm_P = _length(unit_3P)
    unit_3P /= sides_3
    return norm_P * (norm_P - 1) / (_length(unit_3P) + 1e-6)


def _capsule(p_3P: Float32, start: Sequence[float], end: Sequence[float]) -> Float32:
    """Distance to a line segment."""
    along_3 = np.subtract(end, start, dtype=np.float32)[:, None]
    from_start_3P = p_3P - np.array(start, np.float32)[:, None]
    share_P = (_dot(along_3, from_start_3P) / _dot(along_3, along_3)).clip(0, 1)
    return _length(from_start_3P - share_P * along_3)


def _dot(a_3P: Float32, b_3P: Float32) -> Float32:
    # Spelt out: the rounding of a matrix product may depend on the number of BLAS threads.
    product_P: Float32 = a_3P[0] * b_3P[0] + a_3P[1] * b_3P[1] + a_3P[2] * b_3P[2]
    return product_P


def _length(a_3P: Float32) -> Float32:
    length_P: Float32 = np.sqrt(_dot(a_3P, a_3P))
    return length_P


def _union(a_P: Float32, b_P: Float32, blend_mm: float) -> Float32:
    """The nearer surface, rounded where the two meet."""
    closeness_P = np.maximum(1 - np.abs(a_P - b_P) / blend_mm, 0)
    union_P: Float32 = np.minimum(a_P, b_P) - 0.25 * blend_mm * np.square(closeness_P)
    return union_P


def _intersection(a_P: Float32, b_P: Float32, blend_mm: float) -> Float32:
    return -_union(-a_P, -b_P, blend_mm)


def _fold_distance(p_3P: Float32, phase_shifts: Sequence[float]) -> Float32:
    """Unsigned distance, to first order, to the zero surfaces of a sum of waves."""
    value_P = np.zeros_like(p_3P[0])
    slope_3P = np.zeros_like(p_3P)
    for wave, phase, shift in zip(_FOLD_WAVES.astype(np.float32), _FOLD_PHASES, phase_shifts, strict=True):
        angle_P = _dot(wave, p_3P) + np.float32(phase + shift)
        value_P += np.sin(angle_P)
        slope_3P += wave[:, None] * np.cos(angle_P)
    distance_P: Float32 = np.abs(value_P) / (_length(slope_3P) + 0.02)
    return distance_P


def _paint(image_P: Float32, fraction_P: Float32, intensity: float | Float32) -> None:
    image_P += fraction_P * (intensity - image_P)


def _ball_radius_mm(volume_ml: float) -> float:
    return math.cbrt(1000 * volume_ml * 3 / (4 * math.pi))


def _ventricle_radius_mm(volume_ml: float) -> float:
    """Radius that gives both ventricles together this volume: a power law, within 1 % from 4 to 65 ml."""
    return 4.42 * math.pow(volume_ml / 12.0, 0.485)


def _triple(values: npt.NDArray[np.float64]) -> Triple:
    x, y, z = (float(value) for value in values)
    return x, y, z


# One image for the pieces of augmentation: in double precision, so that threads and processors round to the same floats.
_ONE = torch.ones(1, dtype=torch.bool)


def _image(volume: Float32) -> torch.Tensor:
    return torch.from_numpy(volume.astype(np.float64))[None, None]


def _volume(image: torch.Tensor) -> Float32:
    volume: Float32 = image[0, 0].numpy().astype(np.float32)
    return volume


def contrast_curve(volume: Float32, gamma: float) -> Float32:
    """Raises intensities relative to white matter to `gamma`."""
    if gamma == 1:
        return volume
    drawn = DrawnGamma(_ONE, torch.tensor([gamma]).double(), torch.tensor([[AIR, WHITE]]))
    return _volume(drawn.apply(_image(volume), reuse=True))


def blur(volume: Float32, fwhm_mm: float, voxel_size_mm: Triple) -> Float32:
    """Gaussian point spread, the same in mm along every axis."""
    if fwhm_mm == 0:
        return volume
    sd_mm = fwhm_mm / math.sqrt(8 * math.log(2))
    drawn = DrawnBlur(_ONE, sd_mm / torch.tensor([voxel_size_mm], dtype=torch.float64))
    return _volume(drawn.apply(_image(volume), reuse=True))


def bias_field(
    shape: tuple[int, int, int], voxel_size_mm: Triple, strength: float, coil: int, rng: np.random.Generator
) -> Float32:
    """Sensitivity of a coil: exp of a quadratic whose pattern is the coil's own, a little different in every scan.

    Args:
        shape: Voxels (X, Y, Z).
        voxel_size_mm: Their size.
        strength: Standard deviation of the logarithm over the field of view; 0 gives ones.
        coil: Seed of the pattern.
        rng: Draws what changes from scan to scan.

    Returns:
        (X, Y, Z) float32, positive, geometric mean 1.
    """
    weights = np.random.default_rng(coil).normal(size=9) + rng.normal(0, 0.25, 9)
    x, y, z = ((n - 1) / 2 * size for n, size in zip(shape, voxel_size_mm, strict=True))
    # In Legendre polynomials from one end of the field of view to the other: t^2 is 2/3 of the second, and a constant.
    coefficients = torch.zeros(1, 3, 3, 3, dtype=torch.float64)
    coefficients[0, [1, 0, 0], [0, 1, 0], [0, 0, 1]] = torch.from_numpy(weights[:3] * (x, y, z))
    coefficients[0, [2, 0, 0], [0, 2, 0], [0, 0, 2]] = torch.from_numpy(weights[3:6] * np.square((x, y, z)) * (2 / 3))
    coefficients[0, [1, 0, 1], [1, 1, 0], [0, 1, 1]] = torch.from_numpy(weights[6:] * (x * y, y * z, x * z))
    drawn = DrawnBiasField(_ONE, strength * unit_log_field(coefficients, shape))
    return _volume(drawn.field(shape, coefficients))


def rician_noise(volume: Float32, sd: float, rng: np.random.Generator) -> Float32:
    """Magnitude of the signal after Gaussian noise in both channels."""
    if sd == 0:
        return volume
    real, imaginary = (
        torch.from_numpy(noise).double() for noise in sd * rng.standard_normal((2, *volume.shape), dtype=np.float32)
    )
    return _volume(magnitude(real + _image(volume), imaginary[None, None]))


def degrade(volume: Float32, scanner: Scanner, rng: np.random.Generator) -> Float32:
    """What the scanner makes of the true volume, rendered at its voxel size; neutral knobs change no bit.

    Args:
        volume: (X, Y, Z), white matter 1, axes to the right, anterior, superior.
        scanner: Its knobs, applied in the order contrast, blur, bias field, noise, gain.
        rng: Draws the noise and the scan's own part of the bias field.

    Returns:
        (X, Y, Z) float32, zero or more.
    """
    signal = blur(contrast_curve(volume, scanner.contrast_gamma), scanner.blur_fwhm_mm, scanner.voxel_size_mm)
    signal = signal * bias_field(signal.shape, scanner.voxel_size_mm, scanner.bias_field_strength, scanner.coil, rng)
    return scanner.gain * rician_noise(signal, scanner.noise_sd, rng)


def to_nifti(signal: Float32, scanner: Scanner) -> bytes:
    """Stores a volume as the scanner does: int16, its own orientation, an affine that says where each voxel lies.

    Args:
        signal: (X, Y, Z), white matter 1, axes to the right, anterior, superior.
        scanner: Gives voxel size, orientation and intensity scale.

    Returns:
        The bytes of a .nii file; white matter reads as `WHITE_MATTER_STORED`.
    """
    slope = scanner.scl_slope or 1.0
    stored = np.rint(signal * (WHITE_MATTER_STORED / slope)).clip(0, np.iinfo(np.int16).max).astype(np.int16)
    affine = np.diag((*scanner.voxel_size_mm, 1.0))
    affine[:3, 3] = [_axis_mm(n, size)[0] for n, size in zip(signal.shape, scanner.voxel_size_mm, strict=True)]
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(scanner.orientation)
    )
    affine = affine @ nib.orientations.inv_ornt_aff(turn, signal.shape)
    image = nib.Nifti1Image(nib.orientations.apply_orientation(stored, turn), affine)
    image.header.set_slope_inter(slope, 0)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    content: bytes = image.to_bytes()
    return content


def acquire(anatomy: Anatomy, scanner: Scanner, rng: np.random.Generator) -> bytes:
    """One scan: a new pose, rendered at the scanner's voxel size, degraded, stored as the bytes of a .nii file."""
    volume = render(anatomy, scanner.voxel_size_mm, pose=draw_pose(rng))
    return to_nifti(degrade(volume, scanner, rng), scanner)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """One row of a site's table; `index` counts within the site's controls or patients."""

    site: Site
    participant: str
    scanner: Scanner
    patient: bool
    index: int
    num_sessions: int


def write_cohort(
    root: Path,
    seed: int = 0,
    scale: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    num_workers: int = 1,
) -> None:
    """Writes the consortium, one BIDS data set a site, and `truth.tsv` with the anatomy behind every scan.

    The folder appears complete or not at all. The same seed gives the same bytes (on one machine and one set of
    library versions) whatever `num_workers`; a smaller `scale` gives the first subjects of each group of a larger one.

    Args:
        root: Folder to make; a cohort written earlier, and nothing else, is replaced.
        seed: Of everything drawn.
        scale: Factor on the number of subjects of each group, which is at least 4.
        progress: Called with scans written and scans in all.
        num_workers: Threads.

    Raises:
        ValueError: `scale` or `num_workers` is out of range, or `root` holds something else.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"cohort: scale must be positive, got {scale!r}. 1.0 writes the consortium as designed.")
    if num_workers < 1:
        raise ValueError(f"cohort: num_workers must be 1 or more, got {num_workers!r}. Give the number of cores.")
    root = root.resolve()
    if root.exists() and not _is_only_a_cohort(root):
        raise ValueError(
            f"cohort: {root} must be missing, empty or an unchanged cohort, got a path that holds something else. "
            "Name another folder."
        )
    subjects = [subject for site in CONSORTIUM for subject in _subjects(site, scale)]
    description = _description(seed, scale)
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        partial = Path(temporary) / "cohort"
        truth: list[dict[str, str]] = []
        with ThreadPoolExecutor(num_workers) as pool:
            jobs = [pool.submit(_write_subject, partial, seed, subject) for subject in subjects]
            try:
                for job in jobs:
                    truth += job.result()
                    if progress is not None:
                        progress(len(truth), description["num_scans"])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for site in CONSORTIUM:
            _write_site(partial / site.name, [row for row in truth if row["site"] == site.name])
        _write_table(partial / "truth.tsv", truth)
        _write_json(partial / "cohort.json", description)
        if root.exists():
            root.rename(Path(temporary) / "replaced")
        partial.rename(root)


def ensure_cohort(
    root: Path,
    seed: int = 0,
    scale: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    num_workers: int = 1,
) -> bool:
    """Writes the consortium unless `root` already holds this one; see `write_cohort`.

    Returns:
        Whether anything was written.
    """
    marker = root / "cohort.json"
    if marker.is_file() and json.loads(marker.read_text()) == _description(seed, scale):
        return False
    write_cohort(root, seed, scale, progress, num_workers)
    return True


def _description(seed: int, scale: float) -> dict[str, Any]:
    """What `cohort.json` says: all that decides the content, and how many files there are."""
    sessions = [subject.num_sessions for site in CONSORTIUM for subject in _subjects(site, scale)]
    description = {
        "version": FORMAT_VERSION,
        "seed": seed,
        "scale": scale,
        "num_subjects": len(sessions),
        "num_scans": sum(sessions),
        "num_files": sum(sessions) + sum(n > 1 for n in sessions) + 3 * len(CONSORTIUM) + 2,
        "sites": [asdict(site) for site in CONSORTIUM],
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(description))
    return as_stored


def _is_only_a_cohort(root: Path) -> bool:
    """Whether nothing of anybody else's would be lost with `root`."""
    if not root.is_dir():
        return False
    num_files = sum(not path.is_dir() for path in root.rglob("*"))
    marker = root / "cohort.json"
    return num_files == (json.loads(marker.read_text())["num_files"] if marker.is_file() else 0)


def _subjects(site: Site, scale: float) -> list[_Subject]:
    subjects: list[_Subject] = []
    for patient, full_size in ((False, site.num_healthy), (True, site.num_patients)):
        size = max(4, round(full_size * scale)) if full_size else 0
        for index in range(size):
            # Evenly spread, starting with the first subject, so that the smallest cohort has second sessions too.
            repeated = math.ceil((index + 1) * site.repeat_fraction) > math.ceil(index * site.repeat_fraction)
            subjects.append(
                _Subject(
                    site=site,
                    participant=f"sub-{len(subjects) + 1:04d}",
                    scanner=site.scanners[index % len(site.scanners)],
                    patient=patient,
                    index=index,
                    num_sessions=1 + repeated,
                )
            )
    return subjects


def _write_subject(root: Path, seed: int, subject: _Subject) -> list[dict[str, str]]:
    """Draws, scans and writes one subject; returns a row of the truth for each session."""
    diagnosis = "patient" if subject.patient else "control"
    key = f"{seed}/{subject.site.name}/{diagnosis}/{subject.index}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()))
    age_years = round(rng.uniform(*subject.site.age_range_years), 1)
    anatomy = draw_anatomy(rng, age_years, "M" if rng.random() < 0.5 else "F", subject.patient)

    rows = []
    folder = root / subject.site.name / subject.participant
    for number in range(1, subject.num_sessions + 1):
        if number > 1:
            anatomy = age_by(anatomy, round(rng.uniform(*SECOND_SESSION_YEARS), 1))
        session = f"ses-{number:02d}"
        path = folder / session / "anat" / f"{subject.participant}_{session}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(acquire(anatomy, subject.scanner, rng), compresslevel=1, mtime=0))
        rows.append(
            {
                "site": subject.site.name,
                "participant_id": subject.participant,
                "session": session,
                "age": f"{anatomy.age_years:.1f}",
                "sex": anatomy.sex,
                "diagnosis": diagnosis,
                "scanner": subject.scanner.name,
                "ventricle_volume_ml": f"{anatomy.ventricle_volume_ml:.3f}",
                "cortical_thickness_mm": f"{anatomy.cortical_thickness_mm:.3f}",
                "lesion_volume_ml": f"{anatomy.lesion.volume_ml if anatomy.lesion else 0:.3f}",
                "atrophy_years": f"{anatomy.atrophy_years:.1f}",
            }
        )
    if len(rows) > 1:
        _write_table(
            folder / f"{subject.participant}_sessions.tsv",
            [{"session_id": row["session"], "age": row["age"]} for row in rows],
        )
    return rows


def _write_site(folder: Path, truth: list[dict[str, str]]) -> None:
    name = f"Phantom consortium: {folder.name}"
    _write_json(folder / "dataset_description.json", {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "raw"})
    _write_json(folder / "participants.json", _PARTICIPANT_COLUMNS)
    _write_table(
        folder / "participants.tsv",
        [
            {column: row[column] for column in ("participant_id", *_PARTICIPANT_COLUMNS)}
            for row in truth
            if row["session"] == "ses-01"
        ],
    )


_PARTICIPANT_COLUMNS = {
    "age": {"Description": "Age at the first session", "Units": "year"},
    "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
    "diagnosis": {"Description": "Diagnosis", "Levels": {"control": "healthy", "patient": "atrophy and one temporal lesion"}},
    "scanner": {"Description": "Name of the scanner of all sessions"},
}


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
