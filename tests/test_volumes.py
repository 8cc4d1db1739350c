"""Volumes against analytic images, and the cache against everything that may happen to a file."""

import gzip
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from core.data.volumes import VolumeError, VolumeSettings, load_volume

SHARED = Path(__file__).parents[2] / "shared" / "data"
ORIENTATIONS = [
    "".join(axis[sign] for axis, sign in zip(axes, signs, strict=True))
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product((0, 1), repeat=3)
]
AS_STORED = VolumeSettings(voxel_size_mm=2.0, shape=(12, 14, 10), normalisation="none")


def head(shape: tuple[int, int, int] = (12, 14, 10)) -> NDArray[np.float32]:
    """Smooth random brightness in a ball without any symmetry, 0 outside, in RAS order."""
    position = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    brightness = 100 + 40 * position[0] + 25 * position[1] ** 2 - 30 * position[2]
    return np.where((position**2).sum(axis=0) < 0.9, brightness, 0.0).astype(np.float32)


def save(
    path: Path,
    values: NDArray[np.generic],
    voxel_sizes_mm: tuple[float, float, float] = (2.0, 2.0, 2.0),
    orientation: str = "RAS",
    image_type: type[nib.Nifti1Image] = nib.Nifti1Image,
) -> Path:
    """Write values given in RAS order, stored in another order of axes."""
    affine = np.diag([*voxel_sizes_mm, 1.0])
    affine[:3, 3] = (-11.0, 5.0, 30.0)
    image = image_type(values, affine)
    stored = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation))
    nib.save(image.as_reoriented(stored), path)
    return path


def edited(path: Path, **fields: object) -> Path:
    """Overwrite header fields of an uncompressed NIfTI-1 file, unchecked."""
    content = path.read_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + content[348:])
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_one_head_stored_in_any_order_of_axes_is_one_volume(tmp_path: Path, orientation: str) -> None:
    path = save(tmp_path / "a.nii", head(), orientation=orientation)

    assert nib.aff2axcodes(nib.load(path).affine) == tuple(orientation)
    np.testing.assert_array_equal(load_volume(path, AS_STORED), head())


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PSR"])
def test_interpolation_reproduces_a_linear_image_in_mm_from_its_centre(tmp_path: Path, orientation: str) -> None:
    # Averages over blocks and linear interpolation are exact on linear functions, whatever the voxel sizes.
    def linear(shape: tuple[int, int, int], voxel_sizes_mm: tuple[float, float, float]) -> NDArray[np.float64]:
        axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, voxel_sizes_mm, strict=True)]
        x, y, z = np.meshgrid(*axes, indexing="ij")
        return 3 * x + 5 * y - 2 * z + 40

    stored_shape, voxel_sizes_mm = (41, 60, 20), (0.9, 1.2, 4.5)
    path = save(tmp_path / "a.nii.gz", linear(stored_shape, voxel_sizes_mm).astype(np.float32), voxel_sizes_mm, orientation)
    settings = VolumeSettings(voxel_size_mm=3.0, shape=(13, 16, 41), normalisation="none")

    volume = load_volume(path, settings)

    inside = (slice(1, -1), slice(None), slice(6, -6))  # the image is 37 mm wide, 72 mm deep and 90 mm high
    expected = linear(settings.shape, (3.0, 3.0, 3.0))
    np.testing.assert_allclose(volume[inside], expected[inside], atol=1e-3)
    assert (volume[:, :, :4] == 0).all()
    assert (volume[:, :, -4:] == 0).all()


def test_fine_noise_is_averaged_and_not_sampled(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((48, 48, 48)).astype(np.float32)
    path = save(tmp_path / "a.nii", noise, (1.0, 1.0, 1.0))

    volume = load_volume(path, VolumeSettings(voxel_size_mm=4.0, shape=(12, 12, 12), normalisation="none"))

    assert volume.std() == pytest.approx(1 / np.sqrt(4**3), rel=0.1)


def test_a_grid_of_the_wanted_voxel_size_is_cropped_and_padded_but_never_interpolated(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", head((12, 14, 10)))

    volume = load_volume(path, replace(AS_STORED, shape=(8, 15, 13)))

    expected = np.pad(head((12, 14, 10))[2:10], ((0, 0), (0, 1), (1, 2)))
    np.testing.assert_array_equal(volume, expected)


@pytest.mark.parametrize("normalisation", ["none", "robust"])
@pytest.mark.parametrize("image_type", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("stored", ["int16", "uint16", "float64", ">f4", "4-D", "oblique"])
def test_one_head_stored_in_any_way_is_one_volume(
    tmp_path: Path, stored: str, image_type: type[nib.Nifti1Image], normalisation: str
) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    values = head()[..., None] if stored == "4-D" else head()
    if stored == "oblique":
        tilt = np.deg2rad(12)
        affine[1:3, 1:3] = 2 * np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    image = image_type(values, affine)
    if stored in ("int16", "uint16", "float64"):
        image.set_data_dtype(stored)  # nibabel then chooses a slope and an intercept
    if stored == ">f4":
        image = image_type(values, affine, image.header.as_byteswapped(">"))
    nib.save(image, tmp_path / "a.nii.gz")
    settings = replace(AS_STORED, normalisation=normalisation)
    plain = load_volume(save(tmp_path / "b.nii", head()), settings)

    volume = load_volume(tmp_path / "a.nii.gz", settings)

    np.testing.assert_allclose(volume, plain, atol=1e-3 * plain.max())
    assert volume.dtype == np.float32


def test_robust_normalisation_by_hand(tmp_path: Path) -> None:
    # 1000 voxels: 900 of 10 (p2 = 10) and 110 .. 209 (p98 = 189.02), so the foreground is over 10 + 17.9.
    values = np.full(1000, 10.0, np.float32)
    values[:100] = np.arange(110, 210)
    values = values.reshape(10, 10, 10)
    settings = VolumeSettings(voxel_size_mm=2.0, shape=(10, 10, 10), normalisation="robust")

    volume = load_volume(save(tmp_path / "a.nii", values), settings)

    # The 99.5 percentile of 110 .. 209 lies at 0.995 * 99 = 98.505 steps over 110.
    high = 110 + 98.505
    np.testing.assert_allclose(volume, np.clip((values - 10) / (high - 10), 0, 1), atol=1e-6)
    assert volume.max() == 1.0


def test_robust_normalisation_removes_gain_offset_and_a_hot_voxel(tmp_path: Path) -> None:
    settings = replace(AS_STORED, normalisation="robust")
    plain = load_volume(save(tmp_path / "a.nii", head()), settings)
    hot = head()
    hot[6, 7, 5] = 1e9

    other_gain = load_volume(save(tmp_path / "b.nii", head() * 37 - 500), settings)
    with_hot_voxel = load_volume(save(tmp_path / "c.nii", hot), settings)

    np.testing.assert_allclose(other_gain, plain, atol=1e-5)
    with_hot_voxel[6, 7, 5] = plain[6, 7, 5]
    np.testing.assert_allclose(with_hot_voxel, plain, atol=5e-3)


def test_padding_does_not_change_the_intensities(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", head() + 300)
    small = replace(AS_STORED, normalisation="robust")

    large = load_volume(path, replace(small, shape=(32, 34, 30)))

    np.testing.assert_array_equal(large[10:-10, 10:-10, 10:-10], load_volume(path, small))


def damaged(path: Path, content: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(content(path.read_bytes()))
    return path


def filled(value: float) -> NDArray[np.float32]:
    return np.full((12, 14, 10), value, np.float32)


def with_one(value: float) -> NDArray[np.float32]:
    values = head()
    values[0, 0, 0] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (with_one(np.nan), "all values must be finite"),
        (with_one(-np.inf), "all values must be finite"),
        (np.where(head() > 0, head().astype(np.float64), 1e300), "all values must be finite"),
        (filled(0.0), "values must differ, got 0 everywhere"),
        (filled(7.5), "values must differ, got 7.5 everywhere"),
        (with_one(65505.0), "values must be at most 65504 in size, got 65505"),
        (with_one(-1e5), "values must be at most 65504 in size"),
        (head() * 1e-12, "must differ in float16"),
        (head()[:, :, 0], "must be one 3-D volume"),
        (head()[:, :, :1], "must be one 3-D volume of two slices or more"),
        (np.stack([head()] * 3, axis=-1), "must be one 3-D volume"),
        (head().astype(np.complex64), "voxels must be real numbers"),
    ],
)
def test_values_that_make_no_volume_are_refused(tmp_path: Path, values: NDArray[np.generic], message: str) -> None:
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "a.nii.gz")

    with pytest.raises(VolumeError, match=message):
        load_volume(tmp_path / "a.nii.gz", AS_STORED)


def test_a_volume_without_foreground_cannot_be_normalised(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.pad(np.ones((2, 2, 2), np.float32), 5))

    with pytest.raises(VolumeError, match="more than 2 % of the voxels inside the grid must be foreground"):
        load_volume(path, replace(AS_STORED, normalisation="robust"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": [3, 32000, 32000, 32000, 1, 1, 1, 1]}, "must have at most 134217728 voxels"),
        ({"dim": [3, 12, -14, 10, 1, 1, 1, 1]}, "must be one 3-D volume"),
        ({"dim": [0, 12, 14, 10, 1, 1, 1, 1]}, "must be one 3-D volume"),
        ({"sform_code": 0, "qform_code": 0}, "must have a qform or an sform"),
        ({"srow_x": [0, 0, 0, 0]}, "affine must be invertible"),
        ({"srow_x": [0, 2, 0, 0]}, "affine must be invertible"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine must be invertible"),
        ({"srow_x": [2000, 0, 0, 0]}, "voxel sizes from 0.05 to 50 mm"),
        ({"scl_slope": np.nan}, "scl_slope and scl_inter must be finite, got nan"),
        ({"scl_slope": 1, "scl_inter": np.inf}, "scl_slope and scl_inter must be finite"),
        ({"vox_offset": 1e30}, "vox_offset must be from 348"),
        ({"vox_offset": 20000}, "must be a readable NIfTI file"),
        ({"datatype": 9999}, "must be a readable NIfTI file"),
        ({"magic": b"abc"}, "must be a readable NIfTI file"),
    ],
)
def test_headers_that_lie_are_refused_before_a_voxel_is_read(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    path = edited(save(tmp_path / "a.nii", head()), **fields)

    with pytest.raises(VolumeError, match=message):
        load_volume(path, AS_STORED)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.nii", lambda content: content[:-1]),
        ("a.nii", lambda content: content[:100]),
        ("a.nii", lambda _: b""),
        ("a.nii", gzip.compress),
        ("a.nii.gz", lambda content: content[: len(content) // 2]),
        ("a.nii.gz", lambda content: content[:-8] + b"\0\0\0\0" + content[-4:]),
        ("a.nii.gz", gzip.decompress),
        ("a.nii.gz", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ],
)
def test_damaged_files_are_one_sentence_with_its_cause(tmp_path: Path, name: str, content: Callable[[bytes], bytes]) -> None:
    path = damaged(save(tmp_path / name, head()), content)

    with pytest.raises(VolumeError, match=r"must be a readable NIfTI file, got .*Fetch or export") as raised:
        load_volume(path, AS_STORED)
    assert raised.value.__cause__ is not None
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="FileNotFoundError"):
        load_volume(tmp_path / "a.nii", AS_STORED)
    with pytest.raises(VolumeError, match=r"must be a \.nii or \.nii\.gz file, got '\.mgz'"):
        load_volume(tmp_path / "a.mgz", AS_STORED)


@pytest.mark.parametrize(
    "change",
    [
        {"voxel_size_mm": 0.0},
        {"voxel_size_mm": float("nan")},
        {"shape": (12, 14)},
        {"shape": [12, 14, 10]},
        {"shape": (12, 14, 0)},
        {"shape": (12, 14, 10.0)},
        {"shape": (4096, 4096, 4096)},
        {"normalisation": "zscore"},
    ],
)
def test_settings_are_checked_when_built(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"VolumeSettings: {next(iter(change))} must be"):
        replace(AS_STORED, **change)  # type: ignore[arg-type]


@pytest.mark.skipif(not (SHARED / "ixi_hh_2mm").is_dir(), reason="../shared/data/ixi_hh_2mm is not there")
def test_a_real_t1w_scan_is_upright_and_scaled() -> None:
    path = min((SHARED / "ixi_hh_2mm" / "nifti").glob("*.nii.gz"))
    settings = VolumeSettings(voxel_size_mm=4.0, shape=(44, 52, 44), normalisation="robust")

    volume = load_volume(path, settings)

    assert volume.min() == 0
    assert volume.max() == 1
    assert np.median(volume[:4]) < 0.05  # air beside the head
    assert volume[18:26, 20:32, 20:28].mean() > 0.3  # brain in the middle


@pytest.mark.skipif(not (SHARED / "nifti_corner_cases").is_dir(), reason="../shared/data/nifti_corner_cases is not there")
def test_third_party_files_load_or_are_refused() -> None:
    settings = VolumeSettings(voxel_size_mm=4.0, shape=(32, 32, 32), normalisation="robust")
    refused = set()
    for path in sorted((SHARED / "nifti_corner_cases").glob("*/*")):
        try:
            volume = load_volume(path, settings)
        except VolumeError:
            refused.add(path.name)
        else:
            assert volume.shape == (32, 32, 32)
            assert np.isfinite(volume).all()
            assert volume.max() == 1

    assert {"bad_crc.nii.gz", "truncated_data.nii", "nan_inf_5pct.nii.gz", "no_qform_no_sform.nii.gz"} <= refused
    assert not refused & {"big_endian.nii.gz", "ok_two_gzip_members.nii.gz", "oblique.nii.gz", "uint8_scl.nii.gz"}
