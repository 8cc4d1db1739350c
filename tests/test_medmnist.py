"""MedMNIST: official files with their counts, sets of one's own, and everything that may be wrong with an .npz."""

import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import load_config
from core.data.manifest import SPLITS, split_by_subject
from core.data.medmnist import SUBSETS, MedMnistError, MedMnistSource
from core.data.site import SiteData

SHARED = Path(__file__).parents[2] / "shared" / "data" / "medmnist"


def write_subset(path: Path, shape: tuple[int, ...] = (6, 7), *, column: bool = True, **changed: object) -> Path:
    """A small set of one's own: 8, 3 and 4 images in train, val and test, every other one of class 1."""
    random = np.random.default_rng(0)
    arrays: dict[str, object] = {}
    for split, count in zip(SPLITS, (8, 3, 4), strict=True):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
        labels = (np.arange(count) % 2).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None] if column else labels
    arrays |= changed
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})  # type: ignore[arg-type]
    return path


def source(path: Path, num_sites: int = 1, controls: tuple[int, ...] | None = (0,), spatial_dims: int = 2) -> MedMnistSource:
    return MedMnistSource(path, num_sites, controls, spatial_dims, path.parent / "cache")


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize(
    ("shape", "dims", "channels"), [((6, 7), 2, 1), ((6, 7, 3), 2, 3), ((5, 6, 7), 3, 1), ((5, 6, 7, 3), 3, 3)]
)
def test_images_of_every_shape_come_with_their_class_and_split(
    tmp_path: Path, shape: tuple[int, ...], dims: int, channels: int, column: bool
) -> None:
    path = write_subset(tmp_path / "own.npz", shape, column=column)
    with np.load(path) as file:
        stored = np.concatenate([file[f"{split}_images"] for split in SPLITS])

    manifest, images = source(path, spatial_dims=dims).open("here")

    assert images.num_inputs == channels
    assert len(manifest.scans) == 15
    splits = split_by_subject(manifest)
    assert {name: len(part.scans) for name, part in splits.items()} == {"train": 8, "val": 3, "test": 4}
    assert sum(scan.diagnosis == "patient" for scan in manifest.scans) == 4 + 1 + 2
    assert [scan.targets for scan in splits["val"].scans] == [(("label", "0"),), (("label", "1"),), (("label", "0"),)]
    # The manifest is sorted by name: test, train, val.
    in_order = np.concatenate([stored[11:], stored[:8], stored[8:11]])
    expected = in_order[:, None] if channels == 1 else np.moveaxis(in_order, -1, 1)
    if dims == 2:  # an array of rows of pixels; the first axis must be right-left
        expected = expected.swapaxes(2, 3)
    batch = torch.empty(15, *images.shape, dtype=torch.uint8)
    images.fill(batch, range(15))
    np.testing.assert_array_equal(batch, expected)
    inputs = SiteData("here", manifest.scans, tuple(range(15)), images).inputs([3], torch.device("cpu"))
    np.testing.assert_allclose(inputs[0], batch[3] / 255, atol=1e-6)


def test_images_are_dealt_to_virtual_sites_once_each_and_equal_ones_together(tmp_path: Path) -> None:
    train = np.random.default_rng(1).integers(0, 256, (8, 6, 7), dtype=np.uint8)
    train[5] = train[0]
    path = write_subset(tmp_path / "own.npz", train_images=train)
    parts = source(path, num_sites=3)

    manifests = {site: parts.open(site)[0] for site in parts.sites()}

    assert parts.sites() == ("part-1", "part-2", "part-3")
    subjects = [scan.subject for manifest in manifests.values() for scan in manifest.scans]
    assert len(subjects) == len(set(subjects)) == 15
    (site,) = [site for site, manifest in manifests.items() if manifest.problems]
    assert manifests[site].problem_counts() == {"twin": 1}
    assert {"sub-train000000", "sub-train000005"} <= {scan.subject for scan in manifests[site].scans}
    with pytest.raises(MedMnistError, match="must be one of part-1, part-2, part-3, got 'part-4'"):
        parts.open("part-4")


def test_a_set_without_a_healthy_class_counts_as_controls_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_subset(tmp_path / "own.npz")

    with caplog.at_level(logging.WARNING, "isocenter"):
        manifest, _ = source(path, controls=None).open("here")

    assert {scan.diagnosis for scan in manifest.scans} == {"control"}
    assert "no class is known to be healthy (data.controls)" in caplog.text


def test_of_several_findings_none_is_a_control(tmp_path: Path) -> None:
    labels = np.zeros((8, 14), np.uint8)
    labels[2, 5] = labels[4, 0] = 1
    others = {f"{split}_labels": np.zeros((count, 14), np.uint8) for split, count in (("val", 3), ("test", 4))}

    manifest, _ = source(write_subset(tmp_path / "own.npz", train_labels=labels, **others), controls=None).open("here")

    assert [s.subject for s in manifest.scans if s.diagnosis == "patient"] == ["sub-train000002", "sub-train000004"]
    told = {s.subject: [name for name, text in s.targets if text == "1"] for s in manifest.scans}
    assert (told["sub-train000002"], told["sub-train000004"], told["sub-val000000"]) == (["label_5"], ["label_0"], [])
    assert {tuple(name for name, _ in s.targets) for s in manifest.scans} == {tuple(f"label_{i}" for i in range(14))}


def test_an_official_name_must_have_official_counts(tmp_path: Path) -> None:
    path = write_subset(tmp_path / "adrenalmnist3d_64.npz", (5, 6, 7))

    with pytest.raises(MedMnistError, match=r"must have \(1188, 98, 298\) images, got \(8, 3, 4\)\. Fetch the file again"):
        source(path, spatial_dims=3).open("here")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_images": None}, "must hold the arrays train_images, .*, got none called val_images"),
        ({"val_images": np.zeros((3, 9, 9), np.uint8)}, "must be uint8 of one size"),
        ({"train_images": np.zeros((8, 6, 7), np.float64)}, "must be uint8 of one size"),
        (
            {"train_labels": np.zeros((7, 1), np.uint8)},
            r"one row for each of 8 images, got uint8 \(7, 1\)",
        ),
        ({"test_labels": np.zeros((4, 1), np.float32)}, "test_labels must be whole numbers"),
        ({"train_labels": np.array([None] * 8)}, "train_labels must have 1 to .* bytes .*, got 0"),
    ],
)
def test_arrays_that_are_no_subset_are_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    path = write_subset(tmp_path / "own.npz", **changed)

    with pytest.raises(MedMnistError, match=message) as raised:
        source(path).open("here")
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    good = write_subset(tmp_path / "good.npz").read_bytes()
    contents = {"empty.npz": b"", "text.npz": b"version https://git-lfs", "cut.npz": good[:-200], "bits.npz": bytearray(good)}
    contents["bits.npz"][300] ^= 255  # type: ignore[index]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MedMnistError, match=rf"^{name}: train_images must be readable, got .*\. Fetch the file again\.$"):
            source(tmp_path / name).open("here")
    with pytest.raises(MedMnistError, match="got No such file or directory"):
        source(tmp_path / "absent.npz").open("here")
    assert not list(tmp_path.glob("cache/**/*.part"))


def test_an_array_that_claims_more_than_there_is_room_for_is_not_unpacked(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (32000, 32000, 32000)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("train_images.npy", header.getvalue())

    with pytest.raises(MedMnistError, match=r"train_images must have 1 to .* bytes to fit .* disk, got 32768000000000"):
        source(tmp_path / "bomb.npz").open("here")


def test_more_bytes_than_the_header_tells_are_not_written(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (8, 6, 7)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", header.getvalue() + bytes(2**27))

    with pytest.raises(MedMnistError, match="more bytes than its header tells"):
        source(tmp_path / "bomb.npz").open("here")


def test_arrays_are_unpacked_once(tmp_path: Path) -> None:
    path = write_subset(tmp_path / "own.npz")
    source(path).open("here")
    entries = {entry: entry.stat().st_mtime_ns for entry in tmp_path.glob("cache/medmnist/*/*.npy")}

    _, images = source(path).open("here")

    assert len(entries) == 6
    assert {entry: entry.stat().st_mtime_ns for entry in entries} == entries
    assert isinstance(images.arrays[0], np.memmap)


def test_every_official_subset_has_three_counts() -> None:
    assert len(SUBSETS) == 18
    assert all(min(subset.counts) > 0 for subset in SUBSETS.values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/medmnist is not there")
@pytest.mark.parametrize(("name", "dims", "healthy", "twins"), [("breastmnist", 2, 1, 1), ("adrenalmnist3d", 3, 0, 0)])
def test_official_files_load_with_their_counts(tmp_path: Path, name: str, dims: int, healthy: int, twins: int) -> None:
    official = MedMnistSource(SHARED / f"{name}.npz", 1, None, dims, tmp_path)
    with np.load(SHARED / f"{name}.npz") as file:
        labels = np.concatenate([file[f"{split}_labels"].ravel() for split in SPLITS])

    (site,) = official.sites()
    manifest, images = official.open(site)

    splits = split_by_subject(manifest)
    assert tuple(len(splits[split].scans) for split in SPLITS) == SUBSETS[name].counts
    assert images.grid == (28,) * dims
    assert sum(scan.diagnosis == "control" for scan in manifest.scans) == (labels == healthy).sum()
    assert manifest.problem_counts() == ({"twin": twins} if twins else {})


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/medmnist is not there")
def test_the_official_counts_are_those_published() -> None:
    rows = [line.split("\t") for line in (SHARED / "official_counts_md5.tsv").read_text().splitlines()[1:]]

    assert {row[0].lower(): tuple(map(int, row[1:4])) for row in rows} == {name: s.counts for name, s in SUBSETS.items()}


@pytest.mark.parametrize("encoder", ["small", "densenet121", "resnet18"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_image_encoder_takes_flat_images_and_volumes(encoder: str, dims: int) -> None:
    from core.models import build_pretrainer

    config = load_config([f"encoder={encoder}"])
    model = build_pretrainer(config.encoder, 8, 0, num_inputs=3, spatial_dims=dims)

    h_NF, z_ND = model(torch.randn(2, 3, *[32] * dims))

    assert h_NF.shape == (2, model.encoder.num_features)
    assert z_ND.shape == (2, 8)
