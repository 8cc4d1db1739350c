"""Image files of every kind that a hospital's folder holds: one upright picture each, or one sentence that tells why not."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.freesurfer import mghformat
from numpy.typing import NDArray

from core.data.decode import MAX_VOXELS, VolumeError, decode
from core.data.volumes import VolumeSettings, load_volume

SHARED = Path(__file__).parents[2] / "shared" / "data"
CORNER_CASES = SHARED / "nifti_corner_cases"
FLIPS = ["".join(axes) for axes in itertools.product("RL", "AP", "SI")]
VBM = (121, 145, 121)
MNI152 = (182, 218, 182)


def gz(content: bytes, level: int = 9) -> bytes:
    """Compressed, the same at any time."""
    return gzip.compress(content, level, mtime=0)


def head() -> NDArray[np.float32]:
    """Brightness (6, 7, 5) without any symmetry, in RAS order."""
    x, y, z = np.meshgrid(np.arange(6), np.arange(7), np.arange(5), indexing="ij")
    return (10 * x + 3 * y**2 + 25 * z + 0.5 * x * y * z).astype(np.float32)


def affine_of(orientation: str = "RAS", sizes_mm: tuple[float, float, float] = (2.0, 3.0, 1.5)) -> NDArray[np.float64]:
    """Affine (4, 4) of voxels stored along these axes."""
    affine = np.zeros((4, 4))
    for column, (code, size_mm) in enumerate(zip(orientation, sizes_mm, strict=True)):
        row = next(row for row, codes in enumerate(("RL", "AP", "SI")) if code in codes)
        affine[row, column] = size_mm if code in "RAS" else -size_mm
    affine[:, 3] = (-11.0, 5.0, 30.0, 1.0)
    return affine


def nifti(
    values: NDArray[np.generic] | None = None,
    affine: NDArray[np.float64] | None = None,
    header_type: type[nib.Nifti1Header] = nib.Nifti1Header,
    order: str = "<",
    tail: bytes = b"",
    **fields: object,
) -> bytes:
    """A NIfTI file with any header field overwritten, unchecked; sform and qform say the same."""
    values = head() if values is None else values
    header = header_type(endianness=order)
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    header.set_qform(affine_of() if affine is None else affine, 1)
    header.set_sform(affine_of() if affine is None else affine, 1)
    header["magic"], header["vox_offset"] = (b"n+1", 352) if header_type is nib.Nifti1Header else (b"n+2", 544)
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4) + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F") + tail


def mgh(values: NDArray[np.generic] | None = None, affine: NDArray[np.float64] | None = None, **fields: object) -> bytes:
    image = nib.MGHImage(head() if values is None else values, affine_of() if affine is None else affine)
    file = io.BytesIO()
    image.to_file_map({"image": nib.FileHolder(fileobj=file)})
    content = file.getvalue()
    header = np.frombuffer(content[: mghformat.header_dtype.itemsize], mghformat.header_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    return header.tobytes() + content[header.nbytes :]


def npy(values: NDArray[np.generic], version: tuple[int, int] = (1, 0)) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, values, version)
    return content.getvalue()


@cache
def template(shape: tuple[int, ...] = VBM) -> NDArray[np.uint8]:
    return (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def fault(path: Path) -> str:
    """The sentence without the file's name."""
    with pytest.raises(VolumeError) as raised:
        decode(path)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("header_type", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
@pytest.mark.parametrize("orientation", FLIPS)
def test_one_head_is_one_image_however_it_is_stored(
    tmp_path: Path, orientation: str, dtype: str, header_type: type[nib.Nifti1Header]
) -> None:
    stored = np.round((head() - 400) / -2)  # whole numbers from 0 to 255: the same picture in every dtype
    flips = tuple(slice(None, None, 1 if code in "RAS" else -1) for code in orientation)
    content = nifti(stored[flips].astype(dtype), affine_of(orientation), header_type, ">", scl_slope=-2, scl_inter=400)

    for path in (write(tmp_path / "a.nii", content), write(tmp_path / "a.nii.gz", gz(content))):
        image = decode(path)

        np.testing.assert_allclose(image.values, stored * -2 + 400, atol=1e-3)
        np.testing.assert_allclose(image.voxel_sizes_mm, (2.0, 3.0, 1.5))
        assert image.values.dtype == np.float32
        assert (image.stored_orientation, image.stored_dtype) == (orientation, np.dtype(dtype).name)
        assert (image.stored_shape, image.oblique_degrees, image.notes) == ((6, 7, 5), 0, ())


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a", "A.NII", "a.txt"])
@pytest.mark.parametrize("pack", [bytes, gz, lambda content: gz(content[:400]) + gz(content[400:])])
def test_the_content_and_not_the_name_tells_the_format(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    for content in (nifti(), mgh()):
        np.testing.assert_array_equal(decode(write(tmp_path / name, pack(content))).values, head())


@pytest.mark.parametrize("orientation", ["RAS", "LIA", "PSR"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
def test_mgh_has_its_orientation_and_its_tags(tmp_path: Path, orientation: str, dtype: str) -> None:
    stored = np.round(head()).astype(dtype)
    image = nib.Nifti1Image(stored, affine_of())
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation))
    )
    content = mgh(np.asarray(turned.dataobj), turned.affine) + b"\0\0\0\3 talairach.xfm"

    decoded = decode(write(tmp_path / "a.mgz", gz(content)))

    np.testing.assert_array_equal(decoded.values, stored)
    np.testing.assert_allclose(decoded.voxel_sizes_mm, (2.0, 3.0, 1.5), rtol=1e-6)
    np.testing.assert_allclose(decoded.affine, affine_of(), atol=1e-5)
    assert decoded.stored_orientation == orientation


@pytest.mark.parametrize(("shape", "size_mm"), [(VBM, 1.5), ((1, 1, *VBM), 1.5), ((1, *MNI152), 1.0), (MNI152, 1.0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_openbhb_array_lies_as_openbhb_s_masks_do(
    tmp_path: Path, shape: tuple[int, ...], size_mm: float, order: str, version: tuple[int, int]
) -> None:
    stored = np.asarray(template(shape), order=order)

    image = decode(write(tmp_path / "a.npy", npy(stored, version)))

    np.testing.assert_array_equal(image.values, stored.reshape(shape[-3:])[::-1])
    np.testing.assert_array_equal(image.voxel_sizes_mm, [size_mm] * 3)
    # The anterior commissure of MNI space is where these templates say.
    origin = np.linalg.inv(image.affine)[:3, 3] * size_mm
    np.testing.assert_allclose(origin, np.array(((shape[-3] - 1) * size_mm - 90, 126, 72)))
    assert image.stored_orientation == "LAS"
    assert "OpenBHB" in image.notes[0]


@pytest.mark.parametrize("name", ["mni_cerebrum-gm-mask_1.5mm.nii.gz", "quasiraw_space-MNI152_desc-brain_T1w.nii.gz"])
@pytest.mark.skipif(not (SHARED / "openbhb_masks").is_dir(), reason="../shared/data/openbhb_masks is not there")
def test_an_openbhb_array_is_its_nifti_file(tmp_path: Path, name: str) -> None:
    path = SHARED / "openbhb_masks" / name
    from_nifti = decode(path)

    from_array = decode(write(tmp_path / "a.npy", npy(np.asarray(nib.load(path).dataobj)[None, None])))

    np.testing.assert_array_equal(from_array.values, from_nifti.values)
    np.testing.assert_array_equal(from_array.affine, from_nifti.affine)


def test_an_oblique_image_says_its_angle_and_is_not_rotated(tmp_path: Path) -> None:
    affine, tilt = affine_of(sizes_mm=(2.0, 2.0, 2.0)), np.deg2rad(12)
    affine[1:3, 1:3] = 2 * np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])

    image = decode(write(tmp_path / "a.nii", nifti(affine=affine)))

    np.testing.assert_array_equal(image.values, head())
    assert image.oblique_degrees == pytest.approx(12, abs=1e-3)
    np.testing.assert_allclose(image.voxel_sizes_mm, [2, 2, 2], rtol=1e-6)
    assert image.notes == ()


@pytest.mark.parametrize(
    ("units", "per_mm", "word"), [(0, 1, ""), (2, 1, ""), (10, 1, ""), (1, 1e-3, "metre"), (3, 1e3, "micron")]
)
@pytest.mark.parametrize("form", ["qform_code", "sform_code"])
def test_voxel_sizes_are_brought_to_mm(tmp_path: Path, form: str, units: int, per_mm: float, word: str) -> None:
    affine = np.diag([per_mm, per_mm, per_mm, 1.0]) @ affine_of()

    image = decode(write(tmp_path / "a.nii", nifti(affine=affine, xyzt_units=units, **{form: 0})))

    np.testing.assert_allclose(image.voxel_sizes_mm, (2.0, 3.0, 1.5), rtol=1e-5)
    np.testing.assert_allclose(image.affine, affine_of(), rtol=1e-5, atol=1e-5)
    assert [word in note for note in image.notes] == ([True] if word else [])


def test_a_slope_of_zero_is_no_scaling_and_a_qfac_of_zero_is_one(tmp_path: Path) -> None:
    pixdim = [0, 2.0, 3.0, 1.5, 0, 0, 0, 0]
    path = write(tmp_path / "a.nii", nifti(scl_slope=0, scl_inter=np.nan, sform_code=0, pixdim=pixdim))

    np.testing.assert_array_equal(decode(path).values, head())


def test_what_qform_and_sform_leave_open_is_noted_or_refused(tmp_path: Path) -> None:
    tilt = np.deg2rad(10)
    rotation = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    turned = affine_of()
    turned[:3, :3] = rotation @ turned[:3, :3]
    larger = affine_of(sizes_mm=(2.2, 3.3, 1.65))

    def with_sform(affine: NDArray[np.float64]) -> Path:
        return write(tmp_path / "a.nii", nifti(srow_x=affine[0], srow_y=affine[1], srow_z=affine[2]))

    assert decode(with_sform(turned)).notes == ("Its sform is turned by 10.0 degrees from its qform; the sform is taken.",)
    np.testing.assert_allclose(decode(with_sform(larger)).voxel_sizes_mm, (2.2, 3.3, 1.65))
    assert "pixdim [2.0, 3.0, 1.5] mm; the sform is taken" in decode(with_sform(larger)).notes[0]
    assert "same sides of the head, got RAS and LAS" in fault(with_sform(affine_of("LAS")))
    assert "same sides of the head, got RAS and LPS, 180 degrees apart" in fault(with_sform(affine_of("LPS")))


def filled(value: float) -> NDArray[np.float32]:
    return np.full((6, 7, 5), value, np.float32)


def with_one(value: float) -> NDArray[np.float64]:
    values = head().astype(np.float64)
    values[0, 0, 0] = value
    return values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (with_one(np.nan), "all values must be finite"),
        (with_one(-np.inf), "all values must be finite"),
        (with_one(1e300), "all values must be finite and at most 1e+37"),
        (with_one(-2e37), "all values must be finite and at most 1e+37"),
        (filled(np.nan), "all values must be finite"),
        (filled(0.0), "values must differ, got 0 everywhere"),
        (filled(7.5), "values must differ, got 7.5 everywhere"),
        (head()[0, 0], "must be one 3-D volume of two slices or more along each axis, got shape (5,)"),
        (head()[:, :, 0], "must be one 3-D volume of two slices or more along each axis, got shape (6, 7)"),
        (head()[:, :, :1], "got shape (6, 7, 1)"),
        (np.stack([head()] * 3, axis=-1), "got shape (6, 7, 5, 3)"),
        (np.stack([head()] * 3, axis=-1)[..., None, :], "got shape (6, 7, 5, 1, 3)"),
        (head().astype(np.complex64), "voxels must be real numbers of at most 64 bits, got complex numbers (complex64)"),
        (np.zeros((6, 7, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "voxels must be real numbers"),
    ],
)
def test_values_that_are_no_scan_are_refused(tmp_path: Path, values: NDArray[np.generic], words: str) -> None:
    assert words in fault(write(tmp_path / "a.nii.gz", gz(nifti(values))))


@pytest.mark.parametrize("shape", [(6, 7, 5, 1), (6, 7, 5, 1, 1), (6, 7, 5, 1, 1, 1, 1)])
def test_axes_of_length_one_are_dropped(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = decode(write(tmp_path / "a.nii", nifti(head().reshape(shape))))

    np.testing.assert_array_equal(image.values, head())
    assert image.stored_shape == shape


@pytest.mark.parametrize("header_type", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": [0, 6, 7, 5, 1, 1, 1, 1]}, "dim[0], the number of axes, must be from 1 to 7, got 0"),
        ({"dim": [8, 6, 7, 5, 1, 1, 1, 1]}, "dim[0], the number of axes, must be from 1 to 7, got 8"),
        ({"dim": [3, 6, -7, 5, 1, 1, 1, 1]}, "got shape (6, -7, 5)"),
        ({"dim": [3, 6, 0, 5, 1, 1, 1, 1]}, "got shape (6, 0, 5)"),
        ({"dim": [4, 6, 7, 5, 0, 1, 1, 1]}, "got shape (6, 7, 5, 0)"),
        ({"dim": [3, 32000, 32000, 32000, 1, 1, 1, 1]}, f"must have at most {MAX_VOXELS} voxels"),
        ({"dim": [3, 400, 400, 400, 1, 1, 1, 1]}, "the file must hold the 2560"),
        ({"datatype": 9999}, "datatype must be a code of the NIfTI standard, got 9999"),
        ({"datatype": 0}, "voxels must be real numbers of at most 64 bits, got colours or bits"),
        ({"datatype": 1}, "voxels must be real numbers of at most 64 bits, got colours or bits"),
        ({"datatype": 1536}, "voxels must be real numbers of at most 64 bits"),
        ({"vox_offset": 0}, "vox_offset must be a whole number from"),
        ({"vox_offset": 10**8}, "vox_offset must be a whole number from"),
        ({"vox_offset": 600}, "the file must hold"),
        ({"scl_slope": np.nan}, "scl_slope and scl_inter must be finite, got nan"),
        ({"scl_slope": 1, "scl_inter": np.inf}, "scl_slope and scl_inter must be finite"),
        ({"scl_slope": 1e-38, "scl_inter": 1}, "values must differ"),
        ({"xyzt_units": 5}, "xyzt_units must name metre, mm, micron or nothing"),
        ({"xyzt_units": 1}, "voxel sizes from 0.05 to 50 mm"),
        ({"xyzt_units": 3}, "voxel sizes from 0.05 to 50 mm"),
        ({"pixdim": [1, 2, 0, 2, 0, 0, 0, 0]}, "voxel sizes in pixdim must be over 0 mm"),
        ({"pixdim": [1, 2, -3, 2, 0, 0, 0, 0]}, "voxel sizes in pixdim must be over 0 mm"),
        ({"pixdim": [1, 2, np.nan, 2, 0, 0, 0, 0]}, "voxel sizes in pixdim must be over 0 mm"),
        ({"sform_code": 0, "qform_code": 0}, "must have a qform or an sform, got neither"),
        ({"srow_x": [0, 0, 0, 0]}, "affine must be invertible"),
        ({"srow_x": [0, 3, 0, 0]}, "affine must be invertible"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine must be invertible"),
        ({"srow_x": [2, 0, 0, np.inf]}, "affine must be invertible"),
        ({"srow_x": [2000, 0, 0, 0]}, "voxel sizes from 0.05 to 50 mm"),
        ({"srow_x": [3e38, 3e38, 3e38, 3e38]}, "affine must be invertible"),
        ({"sform_code": 0, "quatern_b": np.nan}, "affine must be invertible"),
        ({"sform_code": 0, "quatern_b": 7}, "the qform must be a rotation"),
        ({"pixdim": [3, 2, 3, 2, 0, 0, 0, 0]}, "the qform must be a rotation"),
    ],
)
def test_headers_that_lie_are_refused(
    tmp_path: Path, fields: dict[str, object], words: str, header_type: type[nib.Nifti1Header]
) -> None:
    assert words in fault(write(tmp_path / "a.nii", nifti(header_type=header_type, **fields)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (mgh(np.stack([head()] * 2, axis=-1)), "got shape (6, 7, 5, 2)"),
        (mgh(goodRASFlag=0), "goodRASFlag must be set, got 0, so left is unknown"),
        (mgh(type=7), "type must be a code of the MGH format, got 7"),
        (mgh(delta=[1, 0, 1]), "voxel sizes must be over 0 mm"),
        (mgh(Mdc=np.ones((3, 3))), "affine must be invertible"),
        (mgh()[:100], "an MGH header cut off after 100 bytes"),
        (mgh()[:700], "the file must hold the 1124 bytes its header says, got at most 700"),
        (mgh() + bytes(2**17), "the file must end after its image"),
        (mgh(filled(3.0)), "values must differ, got 3 everywhere"),
        (npy(head()), "an .npy array does not tell left from right, so its shape must be (121, 145, 121) or (182, 218, 182)"),
        (npy(template((2, *VBM[1:]))), "an .npy array does not tell left from right"),
        (npy(template((1, 1, 284))), "an .npy array does not tell left from right"),
        (npy(template()).replace(b"'descr': '|u1'", b"'descr': '<c8'"), "voxels must be real numbers of at most 64 bits"),
        (npy(template())[:-9], "the file must hold the"),
        (npy(template()) + b"more", "the file must end after its image"),
        (npy(np.array([None, 1])), "an .npy array does not tell left from right"),
        (npy(template()).replace(b"'descr': '|u1'", b"'descr': '|O8'"), "voxels must be real numbers"),
        (npy(template(), (3, 0)), "the .npy format must be version 1.0 or 2.0, got (3, 0)"),
        (npy(template())[:40], "must be a readable, undamaged file"),
    ],
)
def test_other_formats_are_checked_as_well(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in fault(write(tmp_path / "a", content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (nifti()[:-1], "the file must hold the"),
        (nifti()[:100], "header cut off after 100 bytes"),
        (gz(nifti())[:300], "must be a readable, undamaged file, got EOFError"),
        (gz(nifti()[:-1]), "got 1 bytes too few"),
        (gz(nifti())[:-8] + b"\0\0\0\0" + gz(nifti())[-4:], "got BadGzipFile (CRC check failed"),
        (gz(nifti())[:-4] + b"\0\0\0\0", "got BadGzipFile"),
        (gz(nifti()) + b"garbage", "got BadGzipFile"),
        (nifti(tail=b"garbage"), "the file must end after its image"),
        (gz(nifti(tail=b"garbage")), "the file must end after its image"),
        (gz(nifti(tail=bytes(2**24))), "the file must end after its image"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in fault(write(tmp_path / "a.nii.gz", content))


@pytest.mark.parametrize("content", [nifti(tail=bytes(512)), gz(nifti()) + bytes(512)])
def test_zeros_that_fill_the_last_block_are_no_damage(tmp_path: Path, content: bytes) -> None:
    np.testing.assert_array_equal(decode(write(tmp_path / "a.nii", content)).values, head())


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.nii", nifti())
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer, not the image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "'git lfs pull'"),
        (b"/annex/objects/SHA256E-s9--0.nii.gz\n", "'git annex get'"),
        (b"../../.git/annex/objects/0f/1k/MD5E-s9--0.nii.gz/MD5E-s9--0.nii.gz", "a git-annex pointer, not the image"),
        (bytes(128) + b"DICM\2\0\0\0UL", "a DICOM file. Convert its series with dcm2niix."),
        (b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100", "a DICOM file without preamble"),
        (b"\x08\x00\x05\x00\x0a\x00\x00\x00ISO_IR 100", "a DICOM file without preamble"),
        (b"NRRD0004\n# Complete NRRD file format\ntype: short\n", "an NRRD file"),
        (b"ObjectType = Image\nNDims = 3\n", "a MetaImage file"),
        (b"\ntype = string-attribute\nname = DATASET_NAME\n", "an AFNI .HEAD file"),
        (b"CDF\x01\0\0\0\0", "a MINC or other NetCDF file"),
        (b"\x89HDF\r\n\x1a\n", "a MINC 2 or other HDF5 file"),
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64", "a MATLAB file"),
        (b"\xff\xff\xfecreated by", "a FreeSurfer surface"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG picture"),
        (b"GIF89a", "a GIF picture"),
        (b"II*\0\x08\0\0\0", "a TIFF picture"),
        (zipped(), "a zip or .npz archive"),
        (bytes(257) + b"ustar\x0000", "a tar archive"),
        (gz(gz(nifti())), "a file compressed twice"),
        (gz(b""), "empty once decompressed"),
        (bz2.compress(nifti()), "a bzip2 file"),
        (lzma.compress(nifti()), "an xz file"),
        (b"\x28\xb5\x2f\xfd\x04", "a zstd file"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"%PDF-1.4", "a PDF file"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page, as a failed download leaves"),
        (b'<?xml version="1.0"?><GIFTI>', "an XML file such as a GIFTI surface"),
        (b"participant_id\tage\nsub-1\t20\n", "text that starts with b'participant_id"),
        (bytes(4096), "a file that starts with zeros, as an unfinished download does"),
        (b"\x07nonsense", "a file of another kind that starts with b'\\x07nonsens'"),
        (nifti(magic=b"ni1"), "the header of a NIfTI pair (.hdr and .img)"),
        (nifti(header_type=nib.Nifti2Header, magic=b"ni2"), "the header of a NIfTI pair (.hdr and .img)"),
        (nifti(magic=b""), "an Analyze header (.hdr), which does not tell left from right"),
        (nifti(header_type=nib.Nifti2Header, intent_code=3006), "a CIFTI file"),
        (b"\x07" + nifti()[1:], "a damaged NIfTI-1 header"),
        (b"\x07" + nifti(header_type=nib.Nifti2Header)[1:], "a damaged NIfTI-2 header"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_name(tmp_path: Path, content: bytes, words: str) -> None:
    sentence = fault(write(tmp_path / "a.nii.gz", content))

    assert "the image must be a NIfTI, MGH or OpenBHB .npy file, got " in sentence
    assert words in sentence


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.img", "the voxels of an Analyze or NIfTI pair"), ("a+orig.BRIK", "AFNI pair"), ("a+orig.BRIK.gz", "AFNI pair")],
)
def test_bare_voxels_are_told_by_their_name(tmp_path: Path, name: str, words: str) -> None:
    assert words in fault(write(tmp_path / name, b"\x07\1\2\3"))


def test_what_is_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "annex.nii.gz").symlink_to("../.git/annex/objects/0f/1k/MD5E-s9--0.nii.gz/MD5E-s9--0.nii.gz")
    (tmp_path / "chain.nii.gz").symlink_to("annex.nii.gz")
    (tmp_path / "broken.nii.gz").symlink_to("nowhere.nii.gz")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")

    assert "broken git-annex link" in fault(tmp_path / "annex.nii.gz")
    assert "git annex get" in fault(tmp_path / "chain.nii.gz")
    assert "broken link to 'nowhere.nii.gz'" in fault(tmp_path / "broken.nii.gz")
    assert "must be a readable, undamaged file, got " in fault(tmp_path / "loop.nii")
    assert "must be a file, got a folder" in fault(tmp_path / "folder.nii")
    assert "got a device or a pipe" in fault(tmp_path / "pipe.nii")
    assert "must be a file that is there, got none" in fault(tmp_path / "missing.nii")
    assert "got an empty file" in fault(write(tmp_path / "empty.nii.gz", b""))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.nii", nifti())
    monkeypatch.setattr(Path, "open", denied)
    assert "permission denied" in fault(path)


def test_a_line_break_in_a_name_does_not_break_the_sentence(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"a b\.nii: the image must be a file that is there"):
        decode(tmp_path / "a\nb.nii")


@pytest.mark.parametrize(
    "content",
    [
        nifti(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]),
        nifti(dim=[3, 400, 400, 400, 1, 1, 1, 1]),
        gz(nifti(dim=[3, 400, 400, 400, 1, 1, 1, 1])),
        gz(nifti(vox_offset=2**24)),
        gz(nifti(tail=bytes(2**25))),
        gz(bytes(2**25)),
        gz(b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(2**25)),
        mgh(dims=[20000, 20000, 20000, 1]),
    ],
)
def test_no_memory_is_taken_for_what_a_header_only_claims(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.nii.gz", content)
    tracemalloc.start()
    try:
        fault(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_image_is_held_once(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((128, 128, 64))
    path = write(tmp_path / "a.nii.gz", gz(nifti(values, scl_slope=2, scl_inter=1), 1))
    tracemalloc.start()
    try:
        decode(path)
        assert tracemalloc.get_traced_memory()[1] < values.size * 4 + 2**22
    finally:
        tracemalloc.stop()


OUTCOMES: dict[str, tuple[tuple[int, ...], str] | str] = {
    "dcm_qa/ax_asc_35sl_6.nii": "got shape (64, 64, 35, 2)",
    "derived/anisotropic_1x1x6.nii.gz": ((33, 41, 25), "RAS"),
    "derived/bad_crc.nii.gz": "CRC check failed",
    "derived/bad_datatype.nii": "datatype must be a code of the NIfTI standard, got 9999",
    "derived/big_endian.nii.gz": ((33, 41, 25), "LAS"),
    "derived/complex64.nii.gz": "voxels must be real numbers of at most 64 bits, got complex numbers (complex64)",
    "derived/corrupt_deflate_byte.nii.gz": "must be a readable, undamaged file",
    "derived/dim0_zero.nii": "dim[0], the number of axes, must be from 1 to 7, got 0",
    "derived/fiveD.nii.gz": ((33, 41, 25), "LAS"),
    "derived/float64.nii.gz": ((33, 41, 25), "LAS"),
    "derived/fourD_one_volume.nii.gz": ((33, 41, 25), "LAS"),
    "derived/fourD_three_volumes.nii.gz": "got shape (33, 41, 25, 3)",
    "derived/gzip_named_nii.nii": ((33, 41, 25), "LAS"),
    "derived/hot_voxel_1e9.nii.gz": ((33, 41, 25), "LAS"),
    "derived/int16_scl_0.5_-100.nii.gz": ((33, 41, 25), "LAS"),
    "derived/int16_scl_slope_neg.nii.gz": ((33, 41, 25), "LAS"),
    "derived/nan_inf_5pct.nii.gz": "all values must be finite",
    "derived/no_qform_no_sform.nii.gz": "must have a qform or an sform, got neither",
    "derived/oblique.nii.gz": ((33, 41, 25), "RAS"),
    "derived/ok_float32.nii.gz": ((33, 41, 25), "LAS"),
    "derived/ok_two_gzip_members.nii.gz": ((33, 41, 25), "LAS"),
    "derived/truncated_data.nii": "the file must hold the 135652 bytes its header says, got at most 67826",
    "derived/twoD_slice.nii.gz": "got shape (33, 41)",
    "derived/uint8_scl.nii.gz": ((33, 41, 25), "LAS"),
    "derived/vox_offset_beyond_eof.nii": "vox_offset must be a whole number",
    "derived/zero_byte.nii.gz": "got an empty file",
    "monai/anatomical_label.nii.gz": ((33, 41, 25), "LAS"),
    "nibabel/analyze.hdr": "an Analyze header (.hdr)",
    "nibabel/bad_datatype+orig.HEAD": "an AFNI .HEAD file",
    "nibabel/example4d.nii.gz": "got shape (128, 96, 24, 2)",
    "nibabel/functional.nii": "got shape (17, 21, 3, 20)",
    "nibabel/row_major.dconn.nii": "a CIFTI file",
    "nibabel/standard.nii.gz": ((4, 5, 7), "RAS"),
    "nibabel/test.mgz": "got shape (3, 4, 5, 2)",
    "nibabel/tiny.mnc": "a MINC or other NetCDF file",
    "nifti-test-data/ATestReferenceImageForReadingAndWriting.nii.gz": "got shape (23, 17, 11, 7, 3)",
    "nifti-test-data/e4.60005.nii.gz": "got shape (64, 64, 34, 1, 4)",
    "nifti-test-data/rand.hdr": "a file of another kind",
    "nifti-test-data/run.210.nii": "got shape (17, 23, 19, 7, 5, 3, 2)",
}


@pytest.mark.skipif(not CORNER_CASES.is_dir(), reason="../shared/data/nifti_corner_cases is not there")
def test_third_party_files_are_images_or_sentences() -> None:
    outcomes: dict[str, tuple[tuple[int, ...], str] | str] = {}
    for path in sorted(CORNER_CASES.glob("*/*")):
        name = path.relative_to(CORNER_CASES).as_posix()
        try:
            image = decode(path)
        except VolumeError as error:
            words = OUTCOMES.get(name)
            outcomes[name] = words if isinstance(words, str) and words in str(error) else str(error)
        else:
            outcomes[name] = (image.values.shape, image.stored_orientation)

    assert outcomes == OUTCOMES


@cache
def fuzzed(kind: str) -> bytes:
    stored = (head() * 10).astype(np.int16)
    return {
        "nifti1": nifti(stored, scl_slope=0.1),
        "nifti2": nifti(stored, header_type=nib.Nifti2Header, scl_slope=0.1),
        "mgh": mgh(stored),
        "npy": npy(template()),
    }[kind]


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(
    kind=st.sampled_from(["nifti1", "nifti2", "mgh", "npy"]),
    is_packed=st.booleans(),
    in_header=st.lists(st.tuples(st.integers(0, 559), st.integers(0, 255)), max_size=6),
    anywhere=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=2),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
    tail=st.one_of(st.just(b""), st.binary(max_size=20)),
    normalisation=st.sampled_from(["robust", "none"]),
)
def test_whatever_a_file_holds_it_is_a_finite_volume_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    is_packed: bool,
    in_header: list[tuple[int, int]],
    anywhere: list[tuple[float, int]],
    kept: float,
    tail: bytes,
    normalisation: str,
) -> None:
    content = bytearray(fuzzed(kind))
    for offset, byte in in_header:
        content[offset] = byte
    packed = bytearray(gz(content, 1) if is_packed else content)
    for share, byte in anywhere:
        packed[int(share * len(packed))] = byte
    path = write(tmp_path_factory.getbasetemp() / "fuzzed", bytes(packed[: int(kept * len(packed))]) + tail)
    tracemalloc.start()
    try:
        volume = load_volume(path, VolumeSettings(voxel_size_mm=2.0, shape=(8, 9, 10), normalisation=normalisation))  # type: ignore[arg-type]
    except VolumeError as error:
        sentence = str(error)
    else:
        sentence = ""
        assert volume.shape == (8, 9, 10)
        assert np.isfinite(volume).all()
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(sentence.splitlines()) <= 1
    assert peak_bytes < 2**23 + (4 * np.prod(VBM) if kind == "npy" else 0)
