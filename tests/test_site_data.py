"""Where a site finds its scans and how they become inputs: layouts, masks, bytes, and a site's own words on its files."""

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from client.site import holdings, this_site
from core.config import ConfigError, load_config
from core.data.manifest import UnusableScansError
from core.data.site import ImageSource, VolumeStore
from core.faults import SiteError
from server.app import agreed_inputs
from server.sites import Node, RunError

GRID = "data.voxel_size_mm=8 data.shape=[11,13,11]"


def write_image(path: Path, seed: int) -> None:
    """A small image of random values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(1, 1000, (11, 13, 11)).astype(np.int16)
    path.write_bytes(gzip.compress(nib.Nifti1Image(values, np.diag([8.0, 8, 8, 1])).to_bytes(), 1, mtime=0))


@pytest.fixture
def visits(tmp_path: Path) -> Path:
    """Images that are named as no standard says, beside a table that calls things by its own names."""
    root = tmp_path / "visits"
    for number in range(1, 7):
        for visit in (1, 2):
            write_image(root / "raw" / f"case{number:02d}" / f"visit{visit}.nii.gz", 10 * number + visit)
    rows = "".join(f"{number};{30 + number},{'k' if number % 2 else 'p'}\n".replace(",", ";") for number in range(1, 7))
    (root / "list.csv").write_text("nr;years;klass\n" + rows)
    return root


OWN_WORDS = "'pattern=\"raw/case{subject}/visit{session}.nii.gz\"' columns.subject=nr columns.age=years columns.diagnosis=klass "
OWN_WORDS += "columns.controls=[k] columns.patients=[p]"


def node_config(root: Path, **more: str | float) -> dict[str, object]:
    """What a real site tells about itself."""
    return {"site": "here", "data-root": str(root), "cache-root": str(root.parent / "cache"), **more}


def test_a_site_tells_how_its_own_files_are_read_and_the_run_does_not(visits: Path) -> None:
    config = load_config(f"data=folder data.root=/of/the/run {GRID}")

    site = this_site(node_config(visits, reading=OWN_WORDS), config)
    held = holdings(site, config)

    scans = [scan for data in held.splits.values() for scan in data.scans]
    assert len(scans) == 12
    assert {scan.diagnosis for scan in scans} == {"control", "patient"}
    assert sorted({scan.age_years for scan in scans}) == [31, 32, 33, 34, 35, 36]
    unsaid = holdings(this_site(node_config(visits), config), config)
    assert {scan.age_years for data in unsaid.splits.values() for scan in data.scans} == {None}


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ("voxel_size_mm=1", "a key must be one of layout, suffix, .*, got 'voxel_size_mm'"),
        ("root=/elsewhere", "got 'root'"),
        ("suffix.x=1", "got 'suffix.x'"),
        ("layout=dicom", "reading: layout: Input should be 'auto', 'bids', 'files' or 'openbhb'"),
        ("columns.sxe=Sex", r"reading: columns\.sxe: "),
        ("layout=[", "reading: no viable alternative"),
        ("pattern=a{subject}.nii", "such a value must stand in double quotes"),
    ],
)
def test_what_a_site_must_not_or_cannot_say_is_refused_without_its_words(tmp_path: Path, reading: str, message: str) -> None:
    config = load_config(f"data=folder data.root=/of/the/run {GRID}")

    with pytest.raises(ConfigError, match=message):
        config.data.read_as(reading)
    with pytest.raises(SiteError) as raised:
        this_site(node_config(tmp_path, reading=reading), config)
    assert "reading must hold only layout" in str(raised.value)
    assert reading not in str(raised.value)


def test_a_site_says_how_much_may_be_unusable(tmp_path: Path, write_site: Callable[..., None]) -> None:
    root = tmp_path / "site"
    write_site(root, seed=1)
    for name in ("sub-000", "sub-001"):
        next((root / name).glob("**/*.nii.gz")).write_bytes(b"")
    config = load_config(f"data=folder data.root=/of/the/run {GRID} data.max_unusable=1")

    with pytest.raises(
        UnusableScansError, match=r"at most 5% .* got 2 of 12, unreadable 2.*max_unusable of the site's own policy"
    ):
        holdings(this_site(node_config(root), config), config)
    held = holdings(this_site(node_config(root, **{"max-unusable": 0.2}), config), config)
    assert held.num_scans == 10


def test_a_mask_and_bytes_reach_the_inputs_and_the_signature(tmp_path: Path, write_site: Callable[..., None]) -> None:
    root = tmp_path / "site"
    write_site(root, seed=1)
    mask = np.zeros((11, 13, 11), np.uint8)
    mask[3:8, 4:9, 3:8] = 1
    nib.save(nib.Nifti1Image(mask, np.diag([8.0, 8, 8, 1])), tmp_path / "mask.nii")
    stores = {}
    for name, words in {"plain": "", "masked": "", "bytes": "data.stored=uint8"}.items():
        config = load_config(f"data=folder data.root=/of/the/run {GRID} {words}")
        told = node_config(root, **({"mask": str(tmp_path / "mask.nii")} if name == "masked" else {}))
        data = holdings(this_site(told, config), config).splits["train"]
        stores[name] = (data.store.signature, data.inputs([0], torch.device("cpu"))[0, 0].numpy())

    (plain, values), (masked, inside), (as_bytes, rounded) = stores["plain"], stores["masked"], stores["bytes"]
    assert plain == as_bytes != masked
    assert (inside[mask == 0] == 0).all()
    assert inside[mask == 1].std() > 0.1
    np.testing.assert_allclose(rounded, values, atol=0.5 / 255 + 1e-3)


def test_layouts_are_found_by_what_a_folder_holds_and_may_be_told(
    visits: Path, tmp_path: Path, write_site: Callable[..., None]
) -> None:
    write_site(tmp_path / "bids", seed=1)
    (tmp_path / "openbhb" / "train" / "derivatives").mkdir(parents=True)

    def source(root: Path, layout: str = "auto") -> ImageSource:
        config = load_config(
            f"data=folder data.root={root} data.layout={layout} data.columns.subject={'nr' if root == visits else 'null'}"
        )
        opened = config.data.source(tmp_path / "cache", config.data.places)
        assert isinstance(opened, ImageSource)
        return opened

    assert source(tmp_path / "bids").known_layout == "bids"
    assert source(visits).known_layout == "files"
    assert source(tmp_path / "openbhb").known_layout == "openbhb"
    assert source(tmp_path / "bids", "files").known_layout == "files"
    assert source(tmp_path / "bids").sites() == ("bids",)
    _, store = source(tmp_path / "bids").open("bids")
    assert isinstance(store, VolumeStore)
    assert store.shape == (1, 40, 48, 40)


def test_openbhb_arrays_become_volumes_with_the_official_splits(tmp_path: Path) -> None:
    root = tmp_path / "openbhb"
    rows = ["participant_id\tsex\tage\tsite\tdiagnosis\tsiteXacq\tsplit"]
    for number, split in enumerate(["train", "train", "internal_test", "external_test"]):
        rows.append(f"{100 + number}\tmale\t{20 + number}\t1\tcontrol\t5\t{split}")
        part = "train" if split == "train" else "val"
        folder = root / part / "derivatives" / f"sub-{100 + number}" / "ses-1"
        folder.mkdir(parents=True)
        image = np.random.default_rng(number).random((1, 1, 121, 145, 121), dtype=np.float32)
        np.save(folder / f"sub-{100 + number}_preproc-cat12vbm_desc-gm_T1w.npy", image)
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    config = load_config(f"data=folder data.root={root} data.voxel_size_mm=6 data.shape=[30,36,30]")
    source = config.data.source(tmp_path / "cache", config.data.places)

    assert source.sites() == ("site-5",)
    held = holdings(this_site({"partition-id": 0, "num-partitions": 1}, config), config)
    assert {split: [s.subject for s in data.scans] for split, data in held.splits.items()} == {
        "train": ["sub-100"], "val": ["sub-101"], "test": ["sub-102", "sub-103"]
    }  # fmt: skip
    assert held.splits["test"].inputs([0, 1], torch.device("cpu")).shape == (2, 1, 30, 36, 30)


def test_sites_with_different_masks_are_not_mixed() -> None:
    nodes = [
        Node(i, name, {"num-inputs": 1, "inputs": f"volumes (4, 4, 4) {mask}"}) for i, (name, mask) in enumerate(("ax", "by"))
    ]

    assert agreed_inputs(nodes[:1], "images") == 1
    with pytest.raises(
        RunError, match=r"same channels, grid and mask at every site, got 2 different sets: 1 at a; 1 at b\. Give"
    ):
        agreed_inputs(nodes, "images")
