"""Volumes against analytic images: one grid, one scale of intensities, one mask."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from core.data.decode import VolumeError
from core.data.volumes import VolumeSettings, load_mask, load_volume

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


def with_one(value: float) -> NDArray[np.float32]:
    values = head()
    values[0, 0, 0] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (with_one(65505.0), "values must be at most 65504 in size, got 65505"),
        (with_one(-1e5), "values must be at most 65504 in size"),
        (head() * 1e-12, "must differ in float16"),
    ],
)
def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path, values: NDArray[np.generic], message: str) -> None:
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "a.nii.gz")

    with pytest.raises(VolumeError, match=message):
        load_volume(tmp_path / "a.nii.gz", AS_STORED)


def test_a_volume_without_foreground_cannot_be_normalised(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.pad(np.ones((2, 2, 2), np.float32), 5))

    with pytest.raises(VolumeError, match="more than 2 % of the voxels inside the grid must be foreground"):
        load_volume(path, replace(AS_STORED, normalisation="robust"))


@pytest.mark.parametrize(("stored_mm", "wanted_mm"), [(1.0, 2.5), (1.0, 1.3), (3.0, 1.0), (0.7, 2.1)])
def test_interpolation_is_that_of_a_loop_over_the_formula(tmp_path: Path, stored_mm: float, wanted_mm: float) -> None:
    values = np.random.default_rng(0).standard_normal((9, 10, 11)).astype(np.float32)
    path = save(tmp_path / "a.nii", values, (stored_mm, stored_mm, stored_mm), "PIR")
    settings = VolumeSettings(voxel_size_mm=wanted_mm, shape=(6, 7, 8), normalisation="none")

    volume = load_volume(path, settings)

    expected = values.astype(np.float64)
    for axis, wanted in enumerate(settings.shape):
        lines = np.moveaxis(expected, axis, 0)
        num = len(lines)
        block = max(1, int(wanted_mm / stored_mm + 1e-6))
        first = (num % block) // 2
        averages = [lines[first + i * block : first + (i + 1) * block].mean(axis=0) for i in range(num // block)]
        centres_mm = [(first + i * block + (block - 1) / 2 - (num - 1) / 2) * stored_mm for i in range(num // block)]
        covering = min(int(np.ceil(num * stored_mm / wanted_mm - 1e-3)), wanted)
        covering += (wanted - covering) % 2
        margin = (wanted - covering) // 2
        new = np.zeros((wanted, *lines.shape[1:]))
        for row in range(margin, margin + covering):
            position_mm = (row - (wanted - 1) / 2) * wanted_mm
            after = sum(centre <= position_mm for centre in centres_mm)
            if after in (0, len(averages)):
                new[row] = averages[0 if after == 0 else -1]
            else:
                share = (position_mm - centres_mm[after - 1]) / (centres_mm[after] - centres_mm[after - 1])
                new[row] = (1 - share) * averages[after - 1] + share * averages[after]
        expected = np.moveaxis(new, 0, axis)
    np.testing.assert_allclose(volume, expected, atol=1e-5)


def ball(shape: tuple[int, int, int] = (12, 14, 10)) -> NDArray[np.uint8]:
    position = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    return ((position**2).sum(axis=0) < 0.5).astype(np.uint8)


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "PSR"])
def test_outside_the_mask_is_0_and_inside_makes_the_scale(tmp_path: Path, orientation: str) -> None:
    mask = save(tmp_path / "mask.nii.gz", ball(), orientation=orientation)
    settings = replace(AS_STORED, normalisation="robust", mask=mask)
    outside = np.where(ball() == 1, head(), 5e4).astype(np.float32)

    volume = load_volume(save(tmp_path / "a.nii", head()), settings)

    inside = head()[ball() == 1]
    p2, p98 = np.percentile(inside, (2, 98))
    high = np.percentile(inside[inside > p2 + 0.1 * (p98 - p2)], 99.5)
    np.testing.assert_allclose(volume, np.where(ball() == 1, np.clip((head() - p2) / (high - p2), 0, 1), 0), atol=1e-5)
    np.testing.assert_array_equal(load_volume(save(tmp_path / "b.nii", outside), settings), volume)


def test_a_mask_lies_on_the_grid_as_the_scans_do(tmp_path: Path) -> None:
    # Eight regions, each of 12 mm: whichever way scan and mask are resampled, a kept voxel is a voxel of its region.
    signs = np.sign(np.arange(12) - 5.5)
    octants = (2 * signs[:, None, None] + 3 * signs[None, :, None] + 9 * signs[None, None, :] + 20).astype(np.float32)
    scan = save(tmp_path / "a.nii", octants, (2.0, 2.0, 2.0), "LPI")
    fine = np.repeat(np.repeat(np.repeat(octants > 29, 2, 0), 2, 1), 2, 2).astype(np.uint8)
    mask = tmp_path / "mask.nii.gz"
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = np.array([-11.0, 5.0, 30.0]) - 0.5
    nib.save(nib.Nifti1Image(fine, affine), mask)
    for voxel_size_mm, shape in ((2.0, (12, 12, 12)), (2.0, (8, 16, 10)), (3.0, (8, 8, 8)), (1.5, (16, 20, 12))):
        settings = VolumeSettings(voxel_size_mm=voxel_size_mm, shape=shape, normalisation="none", mask=mask)

        volume = load_volume(scan, settings)

        x, y, z = (np.sign(np.arange(size) - (size - 1) / 2) for size in shape)
        grid = 2 * x[:, None, None] + 3 * y[None, :, None] + 9 * z[None, None, :] + 20
        covered = np.ones(shape, bool)
        for axis, size in enumerate(shape):
            margin = max(0, (size - round(24 / voxel_size_mm)) // 2)
            inner = np.zeros(size, bool)
            inner[margin : size - margin] = True
            covered &= inner.reshape([-1 if other == axis else 1 for other in range(3)])
        np.testing.assert_array_equal(volume > 0, (grid > 29) & covered)


def test_a_mask_that_fits_no_voxel_or_no_scan_is_refused(tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii", head())
    rim = np.zeros((12, 14, 10), np.uint8)
    rim[0] = 1
    mask = save(tmp_path / "rim.nii.gz", rim)
    robust = replace(AS_STORED, normalisation="robust")

    with pytest.raises(VolumeError, match=r"rim\.nii\.gz: the mask must keep a voxel of the grid"):
        load_volume(scan, replace(robust, mask=mask, shape=(6, 6, 6)))
    with pytest.raises(VolumeError, match=r"a\.nii: the image must cover the field of view of the mask, .* mm"):
        load_volume(scan, replace(robust, mask=save(tmp_path / "large.nii", ball((14, 16, 12)))))
    with pytest.raises(VolumeError, match=r"none\.nii: the image must be a file that is there"):
        load_volume(scan, replace(robust, mask=tmp_path / "none.nii"))
    with pytest.raises(VolumeError, match=r"a\.nii: more than 2 % of the voxels"):
        load_volume(scan, replace(robust, mask=mask))  # the rim of the head is air
    beside = np.zeros((13, 14, 10), np.uint8)  # one voxel wider than the scan, and kept only there
    beside[0] = 1
    with pytest.raises(VolumeError, match=r"a\.nii: the image must have a voxel inside the mask and the grid"):
        load_volume(scan, replace(robust, shape=(16, 14, 10), mask=save(tmp_path / "beside.nii", beside)))


def test_a_mask_is_decoded_once_until_its_file_changes(tmp_path: Path) -> None:
    mask = save(tmp_path / "mask.nii", ball())
    settings = replace(AS_STORED, mask=mask)

    first = load_mask(settings)

    assert load_mask(settings) is first
    assert not first.inside.flags.writeable
    save(mask, 1 - ball())
    os.utime(mask, ns=(0, 0))
    np.testing.assert_array_equal(load_mask(settings).inside, ~first.inside)


@pytest.mark.parametrize(
    "change",
    [
        {"voxel_size_mm": 0.0},
        {"voxel_size_mm": float("nan")},
        {"shape": (12, 14)},
        {"shape": [12, 14, 10]},
        {"shape": (12, 14, 0)},
        {"shape": (12, 14, 10.0)},
        {"shape": (512, 512, 512)},
        {"normalisation": "zscore"},
        {"mask": "mask.nii.gz"},
        {"stored": "int8"},
        {"stored": "uint8"},
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
