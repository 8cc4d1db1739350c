"""Image files decoded: one 3-D picture as numbers, its axes in right-anterior-superior order, or one sentence that tells why not.

The home of nibabel's headers. A file is told by its content, whatever its name says. Its voxels are read here, chunk by chunk,
so that nothing is allocated or decompressed that the file does not hold, and no second copy of the image is ever made.

Axis names in comments: X left to right, Y back to front, Z bottom to top (RAS). ``VolumeError`` names a file: catch it inside
the site and log it there.
"""

import gzip
import io
import math
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
from nibabel import MGHImage, Nifti1Header, Nifti2Header
from nibabel.affines import obliquity, voxel_sizes
from nibabel.freesurfer.mghformat import data_type_codes as mgh_data_types
from nibabel.nifti1 import data_type_codes as nifti_data_types
from nibabel.orientations import aff2axcodes, apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

MAX_VOXELS = 10**8
"""The largest image in memory; a head of 320 x 512 x 512 has 84 million voxels."""

MAX_VALUE = 1e37
"""The largest value in size; differences of two such values are finite in 32 bits."""

_CHUNK_VOXELS = 2**16  # converted at once, inside the processor's cache
_HEAD_BYTES = 2**14  # enough for every header and for the mark of every known kind of file
_MAX_OFFSET = 2**24  # where the image starts at the latest: NIfTI extensions come before it
_MAX_TAIL = 2**16  # after the image: zeros that fill a NIfTI file's last block, the tags of an MGH file
_MAX_DEFLATION = 1032  # no gzip file becomes longer than this times its size
_MAX_ANGLE_DEGREES = 45.0  # between qform and sform; beyond it, they name other sides of the head
_SAME_ANGLE_DEGREES = 1.0
_SAME_SIZE = 0.02  # relative difference of voxel sizes
_MM_PER_UNIT = {0: ("mm", 1.0), 1: ("metre", 1e3), 2: ("mm", 1.0), 3: ("micron", 1e-3)}  # xyzt_units & 7

_VBM = (121, 145, 121)
_MNI152 = (182, 218, 182)
_OPENBHB_GRIDS = {  # stored left-anterior-superior; the same as in the NIfTI masks published with OpenBHB
    _VBM: ("CAT12 VBM at 1.5 mm", np.array([[-1.5, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 1.5, -72], [0, 0, 0, 1]])),
    _MNI152: ("MNI152 at 1 mm", np.array([[-1.0, 0, 0, 90], [0, 1.0, 0, -126], [0, 0, 1.0, -72], [0, 0, 0, 1]])),
}

_SAVE = "Save the scan as a NIfTI file (.nii.gz)."
_UNPACK = "Decompress it, and compress the NIfTI file with gzip if at all."
_FETCH = "Fetch or export the file again."
_LFS = "a Git LFS pointer, not the image it stands for. Fetch it with 'git lfs pull'."
_ANNEX = "a git-annex pointer, not the image it stands for. Fetch it with 'git annex get'."
_FOREIGN = (  # where in the file, its mark, what it is and what to do
    (0, rb"version https://(git-lfs|hawser)\.github\.com", _LFS),
    (0, rb"[\w./\\ -]{0,400}annex[/\\]objects[/\\]", _ANNEX),
    (128, rb"DICM", "a DICOM file. Convert its series with dcm2niix."),
    (0, rb"[\x02\x08]\0[\0-\x20]\0([A-Z]{2}|[^\0]\0\0\0)", "a DICOM file without preamble. Convert its series with dcm2niix."),
    (0, rb"NRRD\d", "an NRRD file. " + _SAVE),
    (0, rb"ObjectType\s*=|NDims\s*=", "a MetaImage file. " + _SAVE),
    (0, rb"\s*type\s*=\s*(string|integer|float)-attribute", "an AFNI .HEAD file. Convert it with 3dAFNItoNIFTI."),
    (0, rb"CDF[\x01\x02\x05]", "a MINC or other NetCDF file. Convert it with mnc2nii."),
    (0, rb"\x89HDF\r\n", "a MINC 2 or other HDF5 file. Convert it with mnc2nii."),
    (0, rb"MATLAB ", "a MATLAB file. " + _SAVE),
    (0, rb"\xff\xff[\xfe\xff]", "a FreeSurfer surface. Name a volume such as mri/T1.mgz."),
    (0, rb"\x89PNG", "a PNG picture. " + _SAVE),
    (0, rb"\xff\xd8\xff", "a JPEG picture. " + _SAVE),
    (0, rb"GIF8", "a GIF picture. " + _SAVE),
    (0, rb"II\*\0|MM\0\*", "a TIFF picture. " + _SAVE),
    (0, rb"PK\x03\x04|PK\x05\x06", "a zip or .npz archive. Unpack it and name one image file."),
    (257, rb"ustar", "a tar archive. Unpack it and name one image file."),
    (0, rb"\x1f\x8b", "a file compressed twice. Decompress it once with gunzip."),
    (0, rb"BZh\d", "a bzip2 file. " + _UNPACK),
    (0, rb"\xfd7zXZ", "an xz file. " + _UNPACK),
    (0, rb"\x28\xb5\x2f\xfd", "a zstd file. " + _UNPACK),
    (0, rb"7z\xbc\xaf", "a 7z archive. " + _UNPACK),
    (0, rb"%PDF", "a PDF file. " + _SAVE),
    (0, rb"(?i:\s*<(!doctype html|html))", "an HTML page, as a failed download leaves. " + _FETCH),
    (0, rb"\s*<\?xml", "an XML file such as a GIFTI surface. " + _SAVE),
    (340, rb"....n(\+1|i1)\0", "a damaged NIfTI-1 header. " + _FETCH),
    (4, rb"n(\+2|i2)\0", "a damaged NIfTI-2 header. " + _FETCH),
    (0, rb"\0{64}", "a file that starts with zeros, as an unfinished download does. " + _FETCH),
)
_UNTOLD = {  # kinds of file that have no mark: the name is the only hint
    ".img": "the voxels of an Analyze or NIfTI pair (.hdr and .img). Save both as one NIfTI file (.nii.gz).",
    ".BRIK": "the voxels of an AFNI pair (.HEAD and .BRIK). Convert it with 3dAFNItoNIFTI.",
}


class VolumeError(ValueError):
    """An image file that cannot become a volume; the message, one line, names the file and the fault."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a file's name may hold a line break


class _RefusedError(Exception):
    """The sentence of a VolumeError, before the file's name."""


@dataclass(frozen=True, eq=False)
class Image:
    """One decoded image.

    Attributes:
        values: Array (X, Y, Z) in RAS order, scaled as the header says, finite and not constant; a view of other strides.
        voxel_sizes_mm: Array (3,) along X, Y and Z.
        affine: Array (4, 4) from voxel numbers of ``values`` to mm in the scanner's or the template's RAS space.
        stored_shape: The shape in the file, with axes of length 1.
        stored_orientation: Where the stored axes point, such as "LAS".
        stored_dtype: The type of the stored voxels, such as "int16".
        oblique_degrees: Largest angle between a voxel axis and its nearest RAS axis; an oblique image is not rotated.
        notes: What was decided where the file leaves a choice; each one sentence.
    """

    values: NDArray[np.float32]
    voxel_sizes_mm: NDArray[np.float64]
    affine: NDArray[np.float64]
    stored_shape: tuple[int, ...]
    stored_orientation: str
    stored_dtype: str
    oblique_degrees: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where the voxels of an image file lie.

    Attributes:
        shape: Voxels along X, Y and Z.
        voxel_sizes_mm: Their edges along X, Y and Z.
        stored_orientation: Where the stored axes point, such as "LAS".
        stored_dtype: The type of the stored voxels, such as "int16".
        oblique_degrees: Largest angle between a voxel axis and its nearest RAS axis.
    """

    shape: tuple[int, int, int]
    voxel_sizes_mm: tuple[float, float, float]
    stored_orientation: str
    stored_dtype: str
    oblique_degrees: float


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What the header of any of the formats says of the voxels after it."""

    stored_shape: tuple[int, ...]
    shape: tuple[int, int, int]  # without the axes of length 1
    dtype: np.dtype[np.generic]
    offset: int  # bytes before the first voxel
    affine: NDArray[np.float64]  # from stored voxel numbers to RAS mm
    order: Literal["F", "C"] = "F"
    slope: float = 1.0
    intercept: float = 0.0
    tail_is_free: bool = False
    notes: tuple[str, ...] = ()


def decode(path: Path) -> Image:
    """Read one image file: NIfTI-1, NIfTI-2 or MGH, each gzip-compressed or not, or an OpenBHB array (.npy).

    An .npy says nothing of left and right, so only OpenBHB's two grids are known: CAT12 VBM at 1.5 mm (121, 145, 121) and
    MNI152 at 1 mm (182, 218, 182), with leading axes of length 1 allowed. Where both are set and agree on the sides of the
    head, a NIfTI sform goes before its qform.

    Raises:
        VolumeError: The file is not there, is of another kind, is damaged, longer or shorter than its header says, or is not
            one real-valued 3-D image of at most ``MAX_VOXELS`` finite values with a known orientation.
    """
    with _one_sentence(path), _opened(path) as (stream, num_bytes):
        header = _checked_header(stream, num_bytes, path)
        values = _read_values(stream, header)

    orientation = io_orientation(header.affine)
    affine_ras = header.affine @ inv_ornt_aff(orientation, values.shape)
    return Image(
        values=apply_orientation(values, orientation),
        voxel_sizes_mm=voxel_sizes(affine_ras),
        affine=affine_ras,
        stored_shape=header.stored_shape,
        stored_orientation=_codes(header.affine),
        stored_dtype=header.dtype.name,
        oblique_degrees=float(np.degrees(obliquity(header.affine)).max()),
        notes=header.notes,
    )


def read_geometry(path: Path) -> Geometry:
    """What the header of an image file says, without its voxels.

    Raises:
        VolumeError: As `decode`, but for faults that only the voxels show: a file cut off or damaged behind its header.
    """
    with _one_sentence(path), _opened(path) as (stream, num_bytes):
        header = _checked_header(stream, num_bytes, path)
    orientation = io_orientation(header.affine)
    order = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    sizes_mm = voxel_sizes(header.affine)
    return Geometry(
        shape=(header.shape[order[0]], header.shape[order[1]], header.shape[order[2]]),
        voxel_sizes_mm=(float(sizes_mm[order[0]]), float(sizes_mm[order[1]]), float(sizes_mm[order[2]])),
        stored_orientation=_codes(header.affine),
        stored_dtype=header.dtype.name,
        oblique_degrees=float(np.degrees(obliquity(header.affine)).max()),
    )


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Every fault as a VolumeError that names the file."""
    try:
        yield
    except _RefusedError as refused:
        raise VolumeError(f"{path}: {refused}") from None
    except Exception as error:
        detail = " ".join(str(error).split())
        raise VolumeError(
            f"{path}: the image must be a readable, undamaged file, got {type(error).__name__} ({detail}). {_FETCH}"
        ) from error


def _checked_header(stream: BinaryIO, num_bytes: int, path: Path) -> _Header:
    head = stream.read(_HEAD_BYTES)
    with np.errstate(all="ignore"):  # what overflows is refused
        header = _read_header(head, path.name)
        _check_header(header, num_bytes)
    return header


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file's content, decompressed while it is read, and the most bytes that it can hold."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise _RefusedError("the image must be a file, got a folder. Name one image file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise _RefusedError("the image must be a regular file, got a device or a pipe. Name one image file.")
        file = path.open("rb")
    except FileNotFoundError:
        if not path.is_symlink():
            raise _RefusedError("the image must be a file that is there, got none. Mend the name, or fetch the file.") from None
        target = str(path.readlink())
        if re.search(r"annex[/\\]objects", str(path.resolve())):  # at the end of a chain of links
            raise _RefusedError(
                f"the image must be there, got a broken git-annex link to {target!r}. Fetch it with 'git annex get'."
            ) from None
        raise _RefusedError(f"the image must be there, got a broken link to {target!r}. Mend the link.") from None
    except PermissionError:
        raise _RefusedError("the image must be readable by this user, got permission denied. Mend its rights.") from None
    with file:
        if status.st_size == 0:
            raise _RefusedError(f"the image must hold a scan, got an empty file. {_FETCH}")
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if compressed:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)), status.st_size * _MAX_DEFLATION
        else:
            yield file, status.st_size


def _foreign(kind: str) -> _RefusedError:
    return _RefusedError(f"the image must be a NIfTI, MGH or OpenBHB .npy file, got {kind}")


def _read_header(head: bytes, name: str) -> _Header:
    """The header of a file of a known kind; what any other file is, in a sentence."""
    if head.startswith(b"\x93NUMPY"):
        return _npy_header(head)
    if head.startswith(b"\0\0\0\1"):
        return _mgh_header(head)
    for header_type, size, mark in ((Nifti1Header, 348, head[344:348]), (Nifti2Header, 540, head[4:8])):
        for endianness in ("<", ">"):
            if head[:4] == struct.pack(f"{endianness}i", size):
                return _nifti_header(head, header_type, size, endianness, mark)
    if not head:
        raise _foreign(f"a file that is empty once decompressed. {_FETCH}")
    for start, mark_pattern, kind in _FOREIGN:
        if re.match(mark_pattern, head[start:], re.DOTALL):
            raise _foreign(kind)
    for suffix, kind in _UNTOLD.items():
        if name.removesuffix(".gz").endswith(suffix):
            raise _foreign(kind)
    if not re.search(rb"[\0-\x08\x0e-\x1f]", head):
        raise _foreign(f"text that starts with {head[:24]!r}. Name the image file itself.")
    raise _foreign(f"a file of another kind that starts with {head[:8]!r}. {_SAVE}")


def _nifti_header(head: bytes, header_type: type[Nifti1Header], size: int, endianness: str, mark: bytes) -> _Header:
    if len(head) < size:
        raise _foreign(f"a NIfTI or Analyze header cut off after {len(head)} bytes. {_FETCH}")
    if mark in (b"ni1\0", b"ni2\0"):
        raise _foreign("the header of a NIfTI pair (.hdr and .img). Save both as one NIfTI file (.nii.gz).")
    if mark not in (b"n+1\0", b"n+2\0"):
        raise _foreign(
            "an Analyze header (.hdr), which does not tell left from right, or a NIfTI header that lost its mark. "
            "Convert the scan again from its source."
        )
    header = header_type(head[:size], endianness, check=False)
    if 3000 <= header["intent_code"] < 3100:
        raise _foreign("a CIFTI file, which holds rows of a table. Name the subject's image instead.")
    dim = [int(size) for size in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise _RefusedError(f"dim[0], the number of axes, must be from 1 to 7, got {dim[0]}. {_FETCH}")
    stored_shape = tuple(dim[1 : 1 + dim[0]])
    shape = _spatial(stored_shape)
    code = int(header["datatype"])
    if code not in nifti_data_types.code:
        raise _RefusedError(f"datatype must be a code of the NIfTI standard, got {code}. {_FETCH}")
    offset = float(header["vox_offset"])
    if not (size + 4 <= offset <= _MAX_OFFSET and offset.is_integer()):
        raise _RefusedError(f"vox_offset must be a whole number from {size + 4} to {_MAX_OFFSET}, got {offset:g}. {_FETCH}")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0.0:  # the standard's word for values stored as they are
        slope, intercept = 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise _RefusedError(f"scl_slope and scl_inter must be finite, got {slope:g} and {intercept:g}. {_FETCH}")
    affine, notes = _nifti_affine(header)
    return _Header(
        stored_shape=stored_shape,
        shape=shape,
        dtype=nifti_data_types.dtype[code].newbyteorder(endianness),
        offset=int(offset),
        slope=slope,
        intercept=intercept,
        affine=affine,
        notes=notes,
    )


def _nifti_affine(header: Nifti1Header) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine (4, 4) to mm, and what had to be decided."""
    units = int(header["xyzt_units"]) & 7
    if units not in _MM_PER_UNIT:
        raise _RefusedError(f"xyzt_units must name metre, mm, micron or nothing for space, got code {units}. {_FETCH}")
    name, mm_per_unit = _MM_PER_UNIT[units]
    notes = [] if mm_per_unit == 1 else [f"Its voxel sizes are stored in {name} and taken as such."]
    sizes_mm = np.asarray(header["pixdim"][1:4], dtype=np.float64) * mm_per_unit
    if not (np.isfinite(sizes_mm).all() and (sizes_mm > 0).all()):
        raise _RefusedError(f"the voxel sizes in pixdim must be over 0 mm, got {sizes_mm.tolist()}. {_FETCH}")
    has_qform, has_sform = header["qform_code"] > 0, header["sform_code"] > 0
    if not has_qform and not has_sform:
        raise _RefusedError(
            "the image must have a qform or an sform, got neither, so left is unknown. Convert the scan again from its source."
        )
    to_mm = np.diag([mm_per_unit, mm_per_unit, mm_per_unit, 1.0])
    if has_qform:
        if header["pixdim"][0] == 0:
            header["pixdim"][0] = 1  # as the standard reads it
        try:
            qform = to_mm @ header.get_qform()
        except (HeaderDataError, ValueError) as error:
            raise _RefusedError(f"the qform must be a rotation, got one of which nibabel says: {error}. {_FETCH}") from None
        if not has_sform:
            return qform, tuple(notes)
    sform = to_mm @ header.get_sform()
    _check_affine(sform)
    if has_qform:
        _check_affine(qform)
        angle_degrees = _angle_degrees(sform, qform)
        if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0 or angle_degrees > _MAX_ANGLE_DEGREES:
            raise _RefusedError(
                f"qform and sform must name the same sides of the head, got {_codes(qform)} and {_codes(sform)}, "
                f"{angle_degrees:.0f} degrees apart. Keep the one that is right, or convert the scan again from its source."
            )
        if angle_degrees > _SAME_ANGLE_DEGREES:
            notes.append(f"Its sform is turned by {angle_degrees:.1f} degrees from its qform; the sform is taken.")
    if not np.allclose(voxel_sizes(sform), sizes_mm, rtol=_SAME_SIZE):
        taken, other = (np.round(sizes, 3).tolist() for sizes in (voxel_sizes(sform), sizes_mm))
        notes.append(f"Its sform says voxels of {taken} mm and its pixdim {other} mm; the sform is taken.")
    return sform, tuple(notes)


def _codes(affine: NDArray[np.float64]) -> str:
    return "".join(aff2axcodes(affine))


def _angle_degrees(affine: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The largest angle between the same voxel axis under two affines."""
    axes, other_axes = (matrix[:3, :3] / voxel_sizes(matrix) for matrix in (affine, other))
    return float(np.degrees(np.arccos(np.clip((axes * other_axes).sum(axis=0), -1.0, 1.0))).max())


def _mgh_header(head: bytes) -> _Header:
    if len(head) < 284:
        raise _foreign(f"an MGH header cut off after {len(head)} bytes. {_FETCH}")
    header = MGHImage.header_class(head[:284], check=False)
    code = int(header["type"])
    if code not in mgh_data_types.code:
        raise _RefusedError(f"the type must be a code of the MGH format, got {code}. {_FETCH}")
    if head[28:30] == b"\0\0":  # nibabel would put a coronal affine in its place
        raise _RefusedError("goodRASFlag must be set, got 0, so left is unknown. Convert the scan again from its source.")
    if not (np.isfinite(header["delta"]).all() and (header["delta"] > 0).all()):
        raise _RefusedError(f"the voxel sizes must be over 0 mm, got {header['delta'].tolist()}. {_FETCH}")
    stored_shape = tuple(int(size) for size in header["dims"])
    return _Header(
        stored_shape=stored_shape,
        shape=_spatial(stored_shape),
        dtype=mgh_data_types.numpy_dtype[code],
        offset=284,
        affine=header.get_affine().astype(np.float64),
        tail_is_free=True,
    )


def _npy_header(head: bytes) -> _Header:
    start = io.BytesIO(head)
    version = np.lib.format.read_magic(start)
    if version == (1, 0):
        stored_shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(start)
    elif version == (2, 0):
        stored_shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(start)
    else:
        raise _RefusedError(f"the .npy format must be version 1.0 or 2.0, got {version}. {_SAVE}")
    shape = stored_shape[-3:]
    if shape not in _OPENBHB_GRIDS or math.prod(stored_shape[:-3]) != 1:
        raise _RefusedError(
            f"an .npy array does not tell left from right, so its shape must be {_VBM} or {_MNI152}, as in OpenBHB, "
            f"got {stored_shape}. {_SAVE}"
        )
    grid, affine = _OPENBHB_GRIDS[shape]
    return _Header(
        stored_shape=stored_shape,
        shape=shape,
        dtype=dtype,
        offset=start.tell(),
        affine=affine,
        order="F" if is_fortran else "C",
        notes=(f"Its shape is OpenBHB's grid {grid}, whose orientation LAS is taken.",),
    )


def _spatial(stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(stored_shape) < 3 or min(stored_shape[:3]) < 2 or any(size != 1 for size in stored_shape[3:]):
        raise _RefusedError(
            f"the image must be one 3-D volume of two slices or more along each axis, got shape {stored_shape}. "
            "Save one volume of it as its own file, or name another image."
        )
    x, y, z = stored_shape[:3]
    return x, y, z


def _check_affine(affine: NDArray[np.float64]) -> None:
    sizes_mm = voxel_sizes(affine)
    if not (
        np.isfinite(affine).all()
        and (sizes_mm >= 0.05).all()
        and (sizes_mm <= 50.0).all()
        and abs(np.linalg.det(affine[:3, :3] / sizes_mm)) > 0.1
    ):
        raise _RefusedError(
            f"the affine must be invertible with voxel sizes from 0.05 to 50 mm, got {affine[:3].tolist()}. "
            "Convert the scan again from its source."
        )


def _check_header(header: _Header, max_bytes: int) -> None:
    """Refuse what cannot become a volume before a voxel is allocated or read."""
    if math.prod(header.shape) > MAX_VOXELS:
        raise _RefusedError(f"the image must have at most {MAX_VOXELS} voxels, got shape {header.shape}. Downsample it.")
    if header.dtype.kind not in "biuf" or header.dtype.itemsize > 8:
        kind = {"c": f"complex numbers ({header.dtype.name})", "V": "colours or bits"}.get(header.dtype.kind, header.dtype.name)
        raise _RefusedError(f"voxels must be real numbers of at most 64 bits, got {kind}. Save one real value per voxel.")
    num_bytes = header.offset + math.prod(header.shape) * header.dtype.itemsize
    if num_bytes > max_bytes:
        raise _RefusedError(f"the file must hold the {num_bytes} bytes its header says, got at most {max_bytes}. {_FETCH}")
    _check_affine(header.affine)


def _read_values(stream: BinaryIO, header: _Header) -> NDArray[np.float32]:
    """The values (shape) in stored order, scaled; the stream is read to its end, where gzip keeps its checksum."""
    num_voxels = math.prod(header.shape)
    values = np.empty(num_voxels, np.float32)
    is_scaled = (header.slope, header.intercept) != (1.0, 0.0)
    slope, intercept = np.float64(header.slope), np.float64(header.intercept)
    low, high = np.float32(np.inf), np.float32(-np.inf)
    stream.seek(header.offset)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        for start in range(0, num_voxels, _CHUNK_VOXELS):
            part = values[start : start + _CHUNK_VOXELS]
            content = stream.read(part.size * header.dtype.itemsize)
            if len(content) < part.size * header.dtype.itemsize:
                missing = (num_voxels - start) * header.dtype.itemsize - len(content)
                raise _RefusedError(f"the file must hold all voxels its header says, got {missing} bytes too few. {_FETCH}")
            stored = np.frombuffer(content, header.dtype)
            part[...] = stored * slope + intercept if is_scaled else stored
            low, high = np.minimum(low, part.min()), np.maximum(high, part.max())
    tail = stream.read(_MAX_TAIL + 1)
    if len(tail) > _MAX_TAIL or not (header.tail_is_free or not tail.strip(b"\0")):
        raise _RefusedError(f"the file must end after its image, got {len(tail)} bytes or more behind it. {_FETCH}")
    if not (low >= -MAX_VALUE and high <= MAX_VALUE):
        raise _RefusedError(
            f"all values must be finite and at most {MAX_VALUE:g} in size, got values from {low:g} to {high:g}. Replace what is "
            "not a measurement, by 0 where there is no signal."
        )
    if low == high:
        raise _RefusedError(f"values must differ, got {low:g} everywhere. {_FETCH}")
    return values.reshape(header.shape, order=header.order)
