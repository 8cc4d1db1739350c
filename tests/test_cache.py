"""The cache of volumes against everything that may happen to a file."""

import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.data import cache as cache_module
from core.data.bids import list_sites, read_site
from core.data.cache import CacheError, open_cache, plan_build
from core.data.decode import VolumeError
from core.data.manifest import Manifest, Scan, check_problem_share
from core.data.site import SiteData, VolumeStore
from core.data.volumes import VolumeSettings, load_volume

SHARED = Path(__file__).parents[2] / "shared" / "data"
AS_STORED = VolumeSettings(voxel_size_mm=2.0, shape=(12, 14, 10), normalisation="none")


def head(shape: tuple[int, int, int] = (12, 14, 10)) -> NDArray[np.float32]:
    """Smooth random brightness in a ball without any symmetry, 0 outside, in RAS order."""
    position = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    brightness = 100 + 40 * position[0] + 25 * position[1] ** 2 - 30 * position[2]
    return np.where((position**2).sum(axis=0) < 0.9, brightness, 0.0).astype(np.float32)


def save(path: Path, values: NDArray[np.generic]) -> Path:
    """Write values given in RAS order, 2 mm."""
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


def site_of(folder: Path, num_scans: int = 3) -> Manifest:
    """A site with one different scan for each of its subjects."""
    scans = []
    for number in range(num_scans):
        path = save(folder / f"sub-{number}_T1w.nii.gz", head() * (1 + number))
        scans.append(Scan(f"sub-{number}", "", "north", "north", path, 40.0, "F", "control"))
    return Manifest("north", tuple(scans))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images decoded so far."""
    names = []

    def counted(path: Path, settings: VolumeSettings) -> NDArray[np.float32]:
        names.append(path.name)
        return load_volume(path, settings)

    monkeypatch.setattr(cache_module, "load_volume", counted)
    return names


def test_a_cache_holds_each_volume_in_the_manifests_order(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    cache, manifest = open_cache(
        site_of(tmp_path), AS_STORED, tmp_path / "cache", num_workers=2, progress=lambda *call: calls.append(call)
    )
    batch = cache.read([2, 0, 2])

    assert len(cache) == len(manifest.scans) == 3
    assert (cache.shape, batch.shape, batch.dtype) == ((12, 14, 10), (3, 12, 14, 10), np.float16)
    for row, index in zip(batch, (2, 0, 2), strict=True):
        np.testing.assert_array_equal(row, load_volume(manifest.scans[index].path, AS_STORED).astype(np.float16))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    batch[:] = 0
    assert cache.read(np.array([2])).any()
    assert cache.read([]).shape == (0, 12, 14, 10)


@pytest.mark.parametrize("indices", [[3], [-1], [[0, 1]]])
def test_reading_scans_that_there_are_not_is_refused(tmp_path: Path, indices: list[int]) -> None:
    cache, _ = open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")

    with pytest.raises(ValueError, match="indices must be a list of numbers from 0 to 2"):
        cache.read(indices)


def test_a_second_opening_decodes_nothing(tmp_path: Path, decoded: list[str]) -> None:
    first, _ = open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")
    assert len(decoded) == 3

    second, _ = open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")

    assert len(decoded) == 3
    assert first == second


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = site_of(tmp_path)
    hashed: list[str] = []
    digest = cache_module._file_digest

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    monkeypatch.setattr(cache_module, "_file_digest", counted)
    open_cache(manifest, AS_STORED, tmp_path / "cache")
    open_cache(manifest, AS_STORED, tmp_path / "cache")
    assert len(hashed) == 6  # so fresh that they may change again within a tick of the clock

    monkeypatch.setattr(cache_module, "SETTLED_S", -1.0)
    open_cache(manifest, AS_STORED, tmp_path / "cache")
    open_cache(manifest, AS_STORED, tmp_path / "cache")
    assert len(hashed) == 9

    changed, content = manifest.scans[1].path, manifest.scans[2].path.read_bytes()
    times = changed.stat()
    changed.write_bytes(content)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    open_cache(manifest, AS_STORED, tmp_path / "cache")
    assert hashed[9:] == [changed.name]

    (tmp_path / "cache" / "files.json").write_text("{broken")
    open_cache(manifest, AS_STORED, tmp_path / "cache")
    assert len(hashed) == 13


def copied(scan: Scan, name: str, **changes: object) -> Scan:
    """Another scan with the same picture, stored in another way."""
    path = scan.path.parent / name
    image = nib.load(scan.path)
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("LPS"))
    nib.save(nib.Nifti2Image(turned.get_fdata(), turned.affine), path)
    return replace(scan, path=path, **changes)  # type: ignore[arg-type]


def test_identical_files_are_decoded_once(tmp_path: Path, decoded: list[str]) -> None:
    manifest = site_of(tmp_path)
    twin = replace(manifest.scans[0], session="ses-2", path=tmp_path / "again_T1w.nii.gz")
    twin.path.write_bytes(manifest.scans[0].path.read_bytes())

    open_cache(replace(manifest, scans=(*manifest.scans, twin)), AS_STORED, tmp_path / "cache")

    assert len(decoded) == 3


def test_a_picture_twice_under_one_subject_is_used_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = site_of(tmp_path)
    twin = copied(manifest.scans[0], "again_T1w.nii", session="ses-2")

    cache, readable = open_cache(replace(manifest, scans=(*manifest.scans, twin)), AS_STORED, tmp_path / "cache")

    assert readable.scans == manifest.scans
    assert len(cache) == 3
    assert readable.problem_counts() == {"copy": 1}
    assert "again_T1w.nii" in caplog.text
    check_problem_share(readable)


def test_a_picture_under_two_subjects_is_not_used_at_all(tmp_path: Path) -> None:
    manifest = site_of(tmp_path)
    twin = copied(manifest.scans[0], "sub-9_T1w.nii", subject="sub-9")

    cache, readable = open_cache(replace(manifest, scans=(*manifest.scans, twin)), AS_STORED, tmp_path / "cache")

    assert [scan.subject for scan in readable.scans] == ["sub-1", "sub-2"]
    np.testing.assert_array_equal(cache.read([0])[0], (head() * 2).astype(np.float16))
    assert readable.problem_counts() == {"duplicate": 2}
    assert all("sub-9_T1w.nii" in problem.what and "Find out whose it is" in problem.what for problem in readable.problems)
    with pytest.raises(ValueError, match="duplicate 2"):
        check_problem_share(readable)


def test_bytes_hold_a_normalised_scan_to_half_a_step(tmp_path: Path) -> None:
    settings = replace(AS_STORED, normalisation="robust", stored="uint8")
    manifest = site_of(tmp_path)
    for number, scan in enumerate(manifest.scans):
        save(scan.path, head() + np.random.default_rng(number).normal(0, 5, (12, 14, 10)))

    cache, manifest = open_cache(manifest, settings, tmp_path / "cache")
    stored = cache.read([0, 1, 2])

    assert stored.dtype == np.uint8
    for values, scan in zip(stored, manifest.scans, strict=True):
        np.testing.assert_allclose(values * cache.unit, load_volume(scan.path, settings), atol=0.5 / 255 + 1e-6)
    inputs = SiteData("north", manifest.scans, (0, 1, 2), VolumeStore(cache)).inputs([1], torch.device("cpu"))
    assert inputs.shape == (1, 1, 12, 14, 10)
    np.testing.assert_allclose(inputs[0, 0].numpy(), stored[1] / 255, atol=1e-6)


def test_what_there_is_to_do_is_told_before_it_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = site_of(tmp_path)
    open_cache(replace(manifest, scans=manifest.scans[:1]), AS_STORED, tmp_path / "cache")

    plan = plan_build(manifest, AS_STORED, tmp_path / "cache")
    with caplog.at_level(logging.INFO, "isocenter"):
        open_cache(manifest, AS_STORED, tmp_path / "cache")

    assert (plan.num_images, plan.num_missing, plan.missing_bytes) == (3, 2, 2 * 2 * 12 * 14 * 10)
    assert "preparing 2 of 3 images, 0.0 MB" in caplog.text
    assert plan_build(manifest, AS_STORED, tmp_path / "cache").num_missing == 0


def test_a_disk_that_is_too_small_stops_before_anything_is_decoded(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=10_000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: full)

    with pytest.raises(CacheError, match=r"must have 0\.00 GB for 3 images, got 0\.00 GB free\. Free some"):
        open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")

    assert decoded == []


def test_other_content_other_settings_and_other_code_are_other_entries(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = site_of(tmp_path)
    before, _ = open_cache(manifest, AS_STORED, tmp_path / "cache")

    save(manifest.scans[1].path, head() * 9)
    after, _ = open_cache(manifest, AS_STORED, tmp_path / "cache")
    assert decoded[3:] == ["sub-1_T1w.nii.gz"]
    assert float(after.read([1]).max()) > 2 * float(before.read([1]).max())

    open_cache(manifest, replace(AS_STORED, shape=(10, 10, 10)), tmp_path / "cache")
    assert len(decoded) == 7
    monkeypatch.setattr(cache_module, "CODE_VERSION", cache_module.CODE_VERSION + 1)
    open_cache(manifest, AS_STORED, tmp_path / "cache")
    assert len(decoded) == 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"PK\x03\x04" + path.read_bytes()),
        lambda path: np.save(path, np.zeros((12, 14, 10), np.float32)),
        lambda path: np.save(path, np.zeros((3, 3, 3), np.float16)),
    ],
)
def test_a_damaged_entry_is_built_again_and_logged(
    tmp_path: Path, decoded: list[str], caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    cache, manifest = open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")
    expected = cache.read([0, 1, 2])
    damage(cache.paths[1])

    with caplog.at_level(logging.WARNING, "isocenter"):
        repaired, _ = open_cache(manifest, AS_STORED, tmp_path / "cache")

    assert decoded[3:] == ["sub-1_T1w.nii.gz"]
    assert str(cache.paths[1]) in caplog.text
    np.testing.assert_array_equal(repaired.read([0, 1, 2]), expected)


def test_unreadable_scans_leave_the_manifest_and_are_named_in_the_local_log_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = site_of(tmp_path, num_scans=4)
    cut = manifest.scans[1].path
    cut.write_bytes(cut.read_bytes()[:-20])
    manifest.scans[2].path.unlink()
    calls: list[tuple[int, int]] = []

    with caplog.at_level(logging.WARNING, "isocenter"):
        cache, readable = open_cache(manifest, AS_STORED, tmp_path / "cache", progress=lambda *call: calls.append(call))

    assert [scan.subject for scan in readable.scans] == ["sub-0", "sub-3"]
    assert len(cache) == 2
    np.testing.assert_array_equal(cache.read([1])[0], load_volume(manifest.scans[3].path, AS_STORED).astype(np.float16))
    assert readable.problem_counts() == {"unreadable": 2}
    assert calls[-1] == (3, 3)  # the missing file is no image to make ready
    for scan in manifest.scans[1:3]:
        assert str(scan.path) in caplog.text
    with pytest.raises(ValueError, match="got 2 of 4, unreadable 2") as raised:
        check_problem_share(readable)
    assert "sub-" not in str(raised.value)


def test_a_build_that_stops_leaves_no_half_entry_and_goes_on_where_it_was(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = site_of(tmp_path)
    write = cache_module._write_whole

    def full_disk(path: Path, parts: Iterable[bytes]) -> None:
        def cut() -> Iterator[bytes]:
            yield next(iter(parts))
            raise OSError(28, "No space left on device")

        write(path, cut() if len(decoded) == 2 else parts)

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "_write_whole", full_disk)
        with pytest.raises(OSError, match="No space left"):
            open_cache(manifest, AS_STORED, tmp_path / "cache", num_workers=1)
    assert not list(tmp_path.glob("cache/*/*.tmp"))
    num_decoded = len(decoded)
    num_stored = len(list(tmp_path.glob("cache/*/*.npy")))

    cache, readable = open_cache(manifest, AS_STORED, tmp_path / "cache")

    assert len(decoded) - num_decoded == 3 - num_stored < 3
    assert len(cache) == 3
    assert readable.problems == ()


def test_a_flipped_bit_is_found_when_the_scan_is_first_read_and_mended(
    tmp_path: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache, manifest = open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")
    expected = cache.read([0, 1, 2])
    content = bytearray(cache.paths[1].read_bytes())
    content[1000] ^= 1
    cache.paths[1].write_bytes(content)

    again, _ = open_cache(manifest, AS_STORED, tmp_path / "cache")
    np.testing.assert_array_equal(again.read([0, 1, 2]), expected)

    assert decoded[3:] == ["sub-1_T1w.nii.gz"]
    assert f"{cache.paths[1]} is damaged" in caplog.text


def test_an_entry_lost_in_a_run_is_mended_but_not_from_another_image(tmp_path: Path) -> None:
    cache, manifest = open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")
    expected = cache.read([1])
    cache.paths[1].unlink()
    np.testing.assert_array_equal(cache.read([1]), expected)

    cache.paths[1].unlink()
    save(manifest.scans[1].path, head() * 9)
    with pytest.raises(VolumeError, match="has changed since the run began"):
        cache.read([1])


def test_builds_at_the_same_time_decode_once_and_agree(tmp_path: Path, decoded: list[str]) -> None:
    manifest = site_of(tmp_path, num_scans=6)
    together = threading.Barrier(4)
    batches = []

    def build() -> None:
        together.wait()
        batches.append(open_cache(manifest, AS_STORED, tmp_path / "cache", num_workers=2)[0].read(range(6)))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(batches) == 4
    for batch in batches:
        np.testing.assert_array_equal(batch, batches[0])
    assert sorted(decoded) == [scan.path.name for scan in manifest.scans]
    assert len(list(tmp_path.glob("cache/*/*"))) == 6


@pytest.mark.slow
def test_two_processes_build_one_cache(tmp_path: Path) -> None:
    rows = [f"{scan.subject}\t40\n" for scan in site_of(tmp_path, num_scans=6).scans]
    (tmp_path / "participants.tsv").write_text("participant_id\tage\n" + "".join(rows))
    code = (
        "import sys; from pathlib import Path; from core.data.bids import read_site;"
        "from core.data.cache import open_cache; from core.data.volumes import VolumeSettings; root = Path(sys.argv[1]);"
        "settings = VolumeSettings(voxel_size_mm=2.0, shape=(12, 14, 10), normalisation='none');"
        "cache, _ = open_cache(read_site(root, 'north'), settings, root / 'cache');"
        "print(float(cache.read(range(6)).sum(dtype='float64')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    here = Path(__file__).parents[1]

    builders = [subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [builder.communicate()[0].split()[-1] for builder in builders]

    assert [builder.returncode for builder in builders] == [0, 0]
    cache, _ = open_cache(read_site(tmp_path, "north"), AS_STORED, tmp_path / "cache")
    assert sums == [str(float(cache.read(range(6)).sum(dtype="float64")))] * 2
    assert len(list(tmp_path.glob("cache/*/*"))) == 6


def test_a_pickled_cache_is_small_and_reads_the_same(tmp_path: Path) -> None:
    cache, _ = open_cache(site_of(tmp_path), AS_STORED, tmp_path / "cache")
    cache.read([0, 1, 2])

    content = pickle.dumps(cache)

    assert len(content) < cache.paths[0].stat().st_size
    np.testing.assert_array_equal(pickle.loads(content).read([1]), cache.read([1]))


@pytest.mark.skipif(not (SHARED / "mcic_vbm_4mm").is_dir(), reason="../shared/data/mcic_vbm_4mm is not there")
def test_grey_matter_maps_of_four_real_sites(tmp_path: Path) -> None:
    root = SHARED / "mcic_vbm_4mm"
    settings = VolumeSettings(voxel_size_mm=4.0, shape=(45, 54, 45), normalisation="none")

    for site in list_sites(root):
        cache, manifest = open_cache(read_site(root, site), settings, tmp_path, num_workers=2)
        check_problem_share(manifest)
        assert manifest.problems == ()
        batch = cache.read(range(len(cache))).astype(np.float32)
        assert batch.min() >= 0
        assert batch.max() <= 1
        # Grey matter fills 500 to 900 ml, and left is left: nibabel's own flip of the stored LAS image agrees.
        assert (np.abs(batch.sum(axis=(1, 2, 3)) * 0.064 - 850) < 400).all()
        stored = nib.as_closest_canonical(nib.load(manifest.scans[0].path)).get_fdata()
        np.testing.assert_allclose(batch[0], stored, atol=1e-3)
