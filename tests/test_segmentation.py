"""Label maps on the grid of their scans, the U-shaped net, its loss, its steps and the Dice of held-out scans."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import RunConfig, load_config
from core.data.augment import DrawnCutout
from core.data.feed import Waited
from core.data.label_maps import LabelChoice, LabelMaps, read_label_maps
from core.data.manifest import Scan
from core.data.site import SiteData
from core.data.views import ViewPolicy
from core.data.volumes import VolumeSettings, load_volume
from core.models import MLP, DenseNet, Encoder, EncoderChoice, ResNet, Segmenter, Small, build_pretrainer, build_segmenter
from core.report_segmentation import draw_examples
from core.segmentation import (
    DiceScores,
    SegmentationError,
    dice,
    dice_scores,
    evaluate_dice,
    example,
    loss_terms,
    moved_along,
    segment,
    segmentation_losses,
    segmentation_scans,
    segmentation_validation_loss,
    soft_dice_loss,
)

CPU = torch.device("cpu")
IXI = Path(__file__).parents[2] / "shared" / "data" / "ixi_hh_2mm"


def scan_of(path: Path, subject: str = "sub-01", session: str = "ses-2", site: str = "north") -> Scan:
    return Scan(subject, session, site, "scanner", path, 40.0, "F", "patient")


@dataclass(frozen=True)
class Memory:
    """A store of volumes in memory."""

    volumes: Tensor  # (N, 1, X, Y, Z)
    dtype = torch.float32
    unit = 1.0
    signature = "memory"

    @property
    def num_inputs(self) -> int:
        return self.volumes.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.volumes.shape[1:])

    def fill(self, target: Tensor, indices: Sequence[int]) -> None:
        target.copy_(self.volumes[list(indices)])


def blobs(num: int = 6, grid: tuple[int, int, int] = (11, 13, 9), site: str = "north") -> tuple[SiteData, LabelMaps]:
    """Noisy scans with a bright box (class 1) and a dark one (class 2) somewhere, and where they are."""
    random = np.random.default_rng(0)
    volumes = random.normal(0.5, 0.05, (num, 1, *grid)).astype(np.float32)
    scans, maps = [], {}
    for number, volume in enumerate(volumes):
        scans.append(scan_of(Path(f"{site}-{number}.nii"), subject=f"sub-{number:02d}", site=site))
        truth = np.zeros(grid, np.uint8)
        for code, at in ((1, (1, 2, 2)), (2, (6, 7, 3))):
            start = np.asarray(at) + random.integers(0, 3, 3)
            truth[tuple(slice(a, a + 4) for a in start)] = code
        volume[0][truth == 1] += 0.5
        volume[0][truth == 2] -= 0.5
        maps[scans[-1].path] = truth
    data = SiteData(site, tuple(scans), tuple(range(num)), Memory(torch.from_numpy(volumes)))
    return data, LabelMaps(("bright", "dark"), maps)


def config_of(more: str = "") -> RunConfig:
    return load_config(
        f"experiment=tiny finetune=both finetune.num_rounds=2 finetune.batch_size=6 finetune.head_learning_rate=0.02 {more}"
    )


# ---- label maps


def oblique_affine(voxel_sizes_mm: Sequence[float]) -> NDArray[np.float64]:
    affine = np.eye(4)
    about_x, about_z = np.radians(11), np.radians(-7)
    turn_x = [[1, 0, 0], [0, np.cos(about_x), -np.sin(about_x)], [0, np.sin(about_x), np.cos(about_x)]]
    turn_z = [[np.cos(about_z), -np.sin(about_z), 0], [np.sin(about_z), np.cos(about_z), 0], [0, 0, 1]]
    affine[:3, :3] = np.array(turn_x) @ np.array(turn_z) @ np.diag(voxel_sizes_mm)
    affine[:3, 3] = (37.0, -81.0, 12.0)
    return affine


def save(path: Path, values: NDArray[np.generic], affine: NDArray[np.float64], orientation: str = "RAS") -> Path:
    image = nib.Nifti1Image(values, affine)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(turn), path)
    return path


@pytest.mark.parametrize(
    ("voxel_sizes_mm", "shape"),
    [
        ((4.0, 4.0, 4.0), (11, 13, 9)),
        ((4.0, 4.0, 4.0), (22, 24, 21)),
        ((1.5, 1.0, 3.0), (16, 15, 17)),
        ((5.0, 4.0, 6.0), (30, 9, 12)),
    ],
)
def test_a_label_map_covers_what_it_labels_once_both_are_on_the_grid(
    tmp_path: Path, voxel_sizes_mm: tuple[float, float, float], shape: tuple[int, int, int]
) -> None:
    stored = tuple(round(68 / mm) + extra for mm, extra in zip(voxel_sizes_mm, (0, 1, 2), strict=True))
    mm = np.stack(
        np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(stored, voxel_sizes_mm, strict=True)], indexing="ij")
    )
    blob = np.linalg.norm(mm - np.array([3.0, -4.0, 5.0]).reshape(3, 1, 1, 1), axis=0) < 15
    affine = oblique_affine(voxel_sizes_mm)
    path = save(tmp_path / "scan.nii.gz", np.where(blob, 100, 1).astype(np.int16), affine, "RAS")
    save(tmp_path / "scan_seg.nii", np.where(blob, 7, 3).astype(np.uint8), affine, "PIL")

    settings = VolumeSettings(voxel_size_mm=4.0, shape=shape, normalisation="none")
    scan = scan_of(path)
    maps = read_label_maps([scan], settings, LabelChoice(codes=(7,), suffix="_seg"), tmp_path)
    covered, bright = maps.maps[path] == 1, load_volume(path, settings) > 50

    assert maps.of([scan]).shape == (1, *shape)
    assert covered.any()
    if voxel_sizes_mm == (4.0, 4.0, 4.0):
        np.testing.assert_array_equal(covered, bright)
    else:
        assert 2 * (covered & bright).sum() / (covered.sum() + bright.sum()) > 0.85
        centres = [np.argwhere(inside).mean(axis=0) for inside in (covered, bright)]
        np.testing.assert_allclose(*centres, atol=0.5)


def test_codes_become_the_numbers_of_their_classes_and_all_others_background(tmp_path: Path) -> None:
    codes = np.arange(4 * 4 * 4).reshape(4, 4, 4).astype(np.int16) - 2
    path = save(tmp_path / "data" / "sub-01" / "scan.nii", codes + 5, np.eye(4))
    save(tmp_path / "labels" / "north" / "ses-2" / "01-lesion_x.nii.gz", codes, np.eye(4), "LPS")
    choice = LabelChoice(
        codes=((51, -2), 7), names=("lesion", "scar"), pattern="labels/{site}/ses-{session}/{subject}-lesion*.nii.gz"
    )
    settings = VolumeSettings(voxel_size_mm=1.0, shape=(4, 4, 4), normalisation="none")
    maps = read_label_maps([scan_of(path)], settings, choice, tmp_path)

    assert maps.classes == ("lesion", "scar")
    assert maps.num_classes == choice.num_classes == 3
    expected = np.vectorize(lambda code: {51: 1, -2: 1, 7: 2}.get(code, 0))(codes)
    np.testing.assert_array_equal(maps.maps[path], expected)
    assert LabelChoice(codes=((51, 52), 7), suffix="_seg").classes == ("51_52", "7")


def test_each_scan_without_a_usable_label_map_is_named_counted_and_unlabelled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.arange(216).reshape(6, 6, 6).astype(np.int16)
    shifted = np.eye(4)
    shifted[0, 3] = 0.3
    labels = {
        "good": (values % 2, np.eye(4), "_seg.nii"),
        "nearly": (values % 2, np.eye(4) + 1e-4 * np.eye(4), "_seg.nii.gz"),
        "blank": (values * 0, np.eye(4), "_seg.nii.gz"),
        "shape": (values[:5] % 2, np.eye(4), "_seg.nii"),
        "place": (values % 2, shifted, "_seg.nii"),
        "flipped": (values % 2, np.diag([-1.0, 1, 1, 1]), "_seg.nii"),
        "shares": ((values / 216).astype(np.float32), np.eye(4), "_seg.nii"),
        "two": (values % 2, np.eye(4), "_seg.nii"),
    }
    scans = []
    for name in (*labels, "missing", "broken"):
        scans.append(scan_of(save(tmp_path / f"{name}.nii.gz", values, np.eye(4)), subject=f"sub-{name}"))
        if name in labels:
            stored, affine, ending = labels[name]
            save(tmp_path / f"{name}{ending}", stored.astype(np.float32 if name == "shares" else np.int16), affine)
    save(tmp_path / "two_seg.nii.gz", values % 2, np.eye(4))
    (tmp_path / "broken_seg.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:90])
    settings = VolumeSettings(voxel_size_mm=1.0, shape=(6, 6, 6), normalisation="none")

    with caplog.at_level(logging.WARNING, logger="isocenter"):
        maps = read_label_maps(scans, settings, LabelChoice(suffix="_seg"), tmp_path)

    kinds = {Path(problem.where).name.split(".")[0]: problem.kind for problem in maps.problems}
    assert kinds == {
        "shape": "label_geometry",
        "place": "label_geometry",
        "flipped": "label_geometry",
        "shares": "label_values",
        "two": "label_maps",
        "missing": "no_label_map",
        "broken": "unreadable_label_map",
    }
    assert all(any(name in record.getMessage() for record in caplog.records) for name in kinds)
    data = SiteData("north", tuple(scans), tuple(range(len(scans))), Memory(torch.zeros(len(scans), 1, 6, 6, 6)))
    assert [scan.subject for scan in maps.labelled(data).scans] == ["sub-good", "sub-nearly", "sub-blank"]
    assert not maps.maps[scans[2].path].any()
    assert len(segmentation_scans(data, maps)) == 3
    with pytest.raises(SegmentationError, match=r"site north: training scans must show one class of 1 or more, got 1 labelled"):
        segmentation_scans(data.select(lambda scan: scan.subject in ("sub-blank", "sub-two")), maps)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"codes": ()}, "codes must be those of 1 to 255 classes"),
        ({"codes": (1, (2, 1))}, "none twice"),
        ({"codes": ((),)}, "codes must be"),
        ({"codes": (2**24 + 1,)}, "whole numbers"),
        ({"names": ("a", "b")}, "names must be 1 different"),
        ({"suffix": None}, "one of pattern and suffix"),
        ({"pattern": "{subject}.nii"}, "one of pattern and suffix"),
        ({"suffix": "a/b"}, "end of a file's name"),
        ({"suffix": None, "pattern": "a.nii"}, "with {subject}"),
        ({"suffix": None, "pattern": "{subject}/{age}.nii"}, "with {subject}"),
        ({"suffix": None, "pattern": "../{subject}.nii"}, "below data.root"),
        ({"suffix": None, "pattern": "/tmp/{subject}.nii"}, "below data.root"),
    ],
)
def test_a_choice_that_tells_no_label_maps_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelChoice(**({"suffix": "_seg"} | keys))  # type: ignore[arg-type]


def test_real_label_maps_lie_on_what_they_label() -> None:
    if not IXI.is_dir():
        pytest.skip("the IXI label maps are not there")
    path = next(iter(sorted((IXI / "nifti").glob("*.nii.gz"))))
    settings = VolumeSettings(voxel_size_mm=4.0, shape=(44, 56, 52), normalisation="robust")
    choice = LabelChoice(codes=((51, 52), (81, 82)), pattern="dlmuse/{subject}_DLMUSE.nii.gz")
    scan = scan_of(path, subject=path.name.removesuffix(".nii.gz"))
    classes, volume = read_label_maps([scan], settings, choice, IXI).maps[path], load_volume(path, settings)
    # The fluid is dark, and least bright where its map says that it is.
    inside = classes == 1
    assert inside.sum() > 100
    moved = [volume[np.roll(inside, step, axis)].mean() for axis in range(3) for step in (-1, 1)]
    assert volume[inside].mean() < min(*moved, 0.8 * volume[classes == 2].mean())


# ---- the net


@pytest.mark.parametrize(
    ("choice", "grid", "finest"),
    [
        (Small(width=4), (11, 14, 9), (6, 7, 5)),
        (Small(width=2), (17, 10), (9, 5)),
        (ResNet(), (17, 14), (17, 14)),
        (DenseNet(), (35, 33), (18, 17)),
    ],
    ids=["small 3-D", "small 2-D", "resnet18", "densenet121"],
)
def test_every_image_encoder_tells_its_pyramid_and_every_grid_comes_back(
    choice: EncoderChoice, grid: tuple[int, ...], finest: tuple[int, ...]
) -> None:
    model = build_segmenter(choice, 3, 0, num_inputs=2, spatial_dims=len(grid))
    images = torch.rand(2, 2, *grid)
    pyramid = model.encoder.pyramid(images)
    assert tuple(pyramid[0].shape[2:]) == finest
    assert tuple(level.shape[1] for level in pyramid) == model.encoder.pyramid_channels
    for finer, coarser in pairwise(pyramid):
        assert all(n // 2 <= half <= (n + 1) // 2 for n, half in zip(finer.shape[2:], coarser.shape[2:], strict=True))
    torch.testing.assert_close(pyramid[-1].flatten(2).mean(dim=2), model.encoder(images))

    logits = model(images)
    assert logits.shape == (2, 3, *grid)
    torch.autograd.backward(logits.square().mean())
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    # What one scan is told does not depend on the other.
    torch.testing.assert_close(model(images[:1]), logits[:1], atol=1e-4, rtol=1e-3)


def test_a_segmenter_is_seeded_and_takes_a_pretrained_encoder_by_its_names() -> None:
    model, again = build_segmenter(Small(width=4), 2, 7), build_segmenter(Small(width=4), 2, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    pretrained = {
        name: w for name, w in build_pretrainer(Small(width=4), 8, 0).state_dict().items() if name.startswith("encoder.")
    }
    assert set(pretrained) == {name for name in model.state_dict() if name.startswith("encoder.")}
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "head"}
    assert [part for part, _ in model.named_children()] == ["encoder", "head"]


def test_an_encoder_of_rows_cannot_segment() -> None:
    with pytest.raises(ValueError, match="small, densenet121 or resnet18, got one of rows"):
        build_segmenter(MLP(), 2, 0, num_inputs=5)


# ---- the loss


@pytest.mark.parametrize("grid", [(4, 5), (3, 4, 2)])
def test_the_loss_is_what_loops_and_monai_compute(grid: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, *grid, generator=random, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(0, 3, (3, *grid), generator=random).to(torch.uint8)  # class 3 is never shown
    told, cross = [[], [], []], []  # type: ignore[var-annotated]
    shares = torch.exp(logits.detach())
    shares = shares / shares.sum(dim=1, keepdim=True)
    for scan in range(3):
        for place in np.ndindex(*grid):
            true = int(classes[(scan, *place)])
            cross.append(-float(torch.log(shares[(scan, true, *place)])))
            for number in (1, 2, 3):
                told[number - 1].append((float(shares[(scan, number, *place)]), float(true == number)))
    by_class = []
    for pairs in told:
        both, total = sum(p * t for p, t in pairs), sum(p + t for p, t in pairs)
        by_class.append(1 - (2 * both + 1e-5) / (total + 1e-5))

    terms = loss_terms(logits, classes)
    assert float(terms["dice"].detach()) == pytest.approx(sum(by_class) / 3)
    assert float(terms["cross_entropy"].detach()) == pytest.approx(sum(cross) / len(cross))
    torch.autograd.backward(terms["dice"] + terms["cross_entropy"])
    assert logits.grad is not None
    assert logits.grad.isfinite().all()

    from monai.losses import DiceLoss

    theirs = DiceLoss(include_background=False, softmax=True, to_onehot_y=True, batch=True)
    torch.testing.assert_close(soft_dice_loss(logits, classes), theirs(logits, classes[:, None].long()))


def test_a_perfect_prediction_costs_nothing_and_the_opposite_all() -> None:
    classes = torch.tensor([[[0, 1], [1, 0]]])
    logits = 60.0 * torch.stack([classes == 0, classes == 1], dim=1)
    assert float(soft_dice_loss(logits, classes)) == pytest.approx(0, abs=1e-6)
    assert float(soft_dice_loss(-logits, classes)) == pytest.approx(1, abs=1e-5)


# ---- views


def test_a_view_moves_the_label_map_as_it_moves_the_scan() -> None:
    # A scan that is its own label map: what the view makes of it, cut at one half, is where the map must be.
    policy = ViewPolicy(
        flip_probability=0.5, flip_other_probability=0.5, rotation_degrees=40, translation_voxels=2, scale_range=0.2, noise_sd=0
    )
    data, label_maps = blobs(8)
    classes = label_maps.of(data.scans)
    drawn = policy.draw((8, 1, *classes.shape[1:]), torch.Generator().manual_seed(0))
    warps = type(drawn)(tuple(piece for piece in drawn.pieces if not isinstance(piece, DrawnCutout)))
    moved = moved_along(classes, drawn, 3)
    assert moved.dtype == torch.uint8
    assert not torch.equal(moved, classes)
    for number in (1, 2):
        image = warps.apply((classes == number).float()[:, None], torch.ones(1))[:, 0]
        # Where both classes and the background share a voxel none may have half of it.
        torch.testing.assert_close((moved == number) & (image > 0.5), image > 0.5)
        assert ((moved == number) & (image < 1 / 3)).sum() == 0


class Threshold(Encoder):
    """Gives the image itself, from which `Told` knows the class."""

    num_features = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @property
    def parts(self) -> list[nn.Module]:
        return [nn.Linear(1, 1)]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        return [images * self.weight]


class Told(nn.Module):
    def forward(self, images: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        del images
        certain = 1e4 * (pyramid[0] - 0.5)
        return torch.cat([-certain, certain], dim=1)


@pytest.mark.parametrize("stage", ["linear_probe", "full_finetuning"])
def test_in_training_scans_and_label_maps_are_moved_together(stage: str) -> None:
    data, label_maps = blobs()
    maps = {path: (truth == 1).astype(np.uint8) for path, truth in label_maps.maps.items()}
    images = torch.stack([torch.from_numpy(maps[scan.path]).float()[None] for scan in data.scans])
    data = SiteData(data.site, data.scans, data.positions, Memory(images))
    model = Segmenter.__new__(Segmenter)
    nn.Module.__init__(model)
    model.encoder, model.head = Threshold(), Told()  # type: ignore[assignment]
    config = config_of("views.noise_sd=0 views.rotation_degrees=30 views.cutout_fraction=0.5")
    losses = list(segmentation_losses(model, data, LabelMaps(("bright",), maps), config, stage, 1, CPU, Waited()))  # type: ignore[arg-type]
    assert len(losses) == config.finetune.local_steps
    assert all(float(terms["dice"].detach()) < 1e-3 for terms in losses)
    assert all(terms["dice"].requires_grad == (stage == "full_finetuning") for terms in losses)


# ---- training and scores


def test_a_frozen_encoder_stays_as_it_is_and_an_unfrozen_one_learns() -> None:
    data, label_maps = blobs()
    config = config_of()
    for stage, moves in (("linear_probe", False), ("full_finetuning", True), ("from_scratch", True)):
        model = build_segmenter(config.encoder, 3, 0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = segment(model, data, label_maps, config, stage=stage, round_number=1, device=CPU)  # type: ignore[arg-type]
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert any(name.startswith("encoder.") for name in changed) == moves
        assert {name for name in before if name.startswith("head.")} <= changed
        assert set(result.state) == {name for name in before if moves or name.startswith("head.")}
        assert set(result.metrics) == {"loss", "dice", "cross_entropy"}
        assert result.metrics["loss"] == pytest.approx(result.metrics["dice"] + result.metrics["cross_entropy"])
        assert result.num_scans == len(data)

    again = build_segmenter(config.encoder, 3, 0)
    segment(again, data, label_maps, config, stage="from_scratch", round_number=1, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_two_boxes_are_learnt_and_found_in_scans_that_no_step_saw() -> None:
    data, label_maps = blobs(12)
    train, test = data.select(lambda scan: scan.subject < "sub-08"), data.select(lambda scan: scan.subject >= "sub-08")
    config = config_of(
        "finetune.local_steps=14 encoder.width=8 finetune.learning_rate=0.01 views.rotation_degrees=0 views.noise_sd=0"
    )
    model = build_segmenter(config.encoder, 3, 0)
    before = segmentation_validation_loss(model, test, label_maps, CPU)
    for round_number in (1, 2):
        segment(model, train, label_maps, config, stage="from_scratch", round_number=round_number, device=CPU)
    assert segmentation_validation_loss(model, test, label_maps, CPU) < 0.5 * before
    scores = dice_scores(model, {"val": train, "test": test}, label_maps, CPU)
    assert scores.split.tolist() == ["val"] * 8 + ["test"] * 4
    assert scores.dice_NK[8:].mean() > 0.7

    shown = example(model, test, label_maps, CPU)
    assert shown is not None
    np.testing.assert_array_equal(shown.truth, label_maps.maps[test.scans[0].path])
    both = dice(torch.from_numpy(shown.told)[None], torch.from_numpy(shown.truth)[None], 3)
    np.testing.assert_allclose(both[0], scores.dice_NK[8])
    assert all((np.take(shown.truth, at, axis=axis) > 0).any() for axis, at in enumerate(shown.place))
    assert draw_examples([shown, shown]).startswith(b"\x89PNG")
    nothing = LabelMaps(label_maps.classes, {path: truth * 0 for path, truth in label_maps.maps.items()})
    assert example(model, test, nothing, CPU) is None


def test_private_segmentation_is_refused() -> None:
    data, label_maps = blobs()
    config = config_of("privacy=dp_sgd num_rounds=0 debias=none start=run finetune.class_weights=none")
    with pytest.raises(SegmentationError, match="must be another than dp_sgd"):
        segment(build_segmenter(config.encoder, 3, 0), data, label_maps, config, stage="linear_probe", round_number=1, device=CPU)


def test_dice_is_what_loops_count() -> None:
    random = np.random.default_rng(3)
    told, truth = random.integers(0, 4, (2, 5, 3, 4, 2))
    told[0][told[0] == 2] = truth[0][truth[0] == 2] = 0  # neither shows class 2
    truth[1][truth[1] == 3] = 0  # told and not there
    found = dice(torch.from_numpy(told), torch.from_numpy(truth), 4)
    for scan in range(5):
        for number in (1, 2, 3):
            a = {place for place in np.ndindex(3, 4, 2) if told[scan][place] == number}
            b = {place for place in np.ndindex(3, 4, 2) if truth[scan][place] == number}
            expected = 2 * len(a & b) / (len(a) + len(b)) if a or b else np.nan
            np.testing.assert_equal(found[scan, number - 1], expected)
    assert np.isnan(found[0, 1])
    assert found[1, 2] == 0


def test_figures_of_dice_are_means_over_scans_with_intervals_over_subjects() -> None:
    nan = np.nan
    scores = DiceScores.concatenate(
        [
            DiceScores(
                classes=("lesion", "scar"),
                dice_NK=np.array(rows),
                subject=np.array(subjects),
                site=np.array([site] * len(rows)),
                split=np.array(splits),
            )
            for site, rows, subjects, splits in (
                ("b", [[0.9, 0.7], [0.5, nan], [nan, nan], [0.0, 0.0]], ["s1", "s1", "s2", "s9"], ["test"] * 3 + ["val"]),
                ("a", [[0.8, 0.4], [0.6, 0.2]], ["s1", "s2"], ["test", "test"]),
                ("c", [[0.1, 0.1], [0.3, nan]], ["s1", "s2"], ["test", "test"]),
            )
        ]
    )
    evaluations, notes = evaluate_dice(
        scores, stage="linear_probe", regime="federated", seed=1, known_sites={"a", "b"}, num_resamples=50
    )
    found = {(e.metric, e.site): e for e in evaluations}
    assert found["dice_lesion", "all"].value == pytest.approx((0.9 + 0.5 + 0.8 + 0.6) / 4)
    assert found["dice_lesion", "all"].num_subjects == 3
    assert found["dice_scar", "all"].value == pytest.approx((0.7 + 0.4 + 0.2) / 3)
    assert found["dice", "all"].value == pytest.approx((0.8 + 0.5 + 0.6 + 0.4) / 4)
    assert found["dice_lesion_unseen", "all"].value == found["dice_lesion_unseen", "c"].value == pytest.approx(0.2)
    assert found["dice", "a"].value == pytest.approx(0.5)
    lesion = found["dice_lesion", "all"]
    assert lesion.low is not None
    assert lesion.high is not None
    assert 0.6 <= lesion.low <= lesion.value <= lesion.high <= 0.8
    assert {e.task for e in evaluations} == {"segmentation"}
    assert ("dice", "b") not in found  # one subject is left
    assert any("dice_lesion at site b has no value" in note for note in notes)
    assert any("dice_lesion at site all: 1 of 5 test scans show nothing of it" in note for note in notes)
    nothing, why = evaluate_dice(scores, stage="linear_probe", regime="federated", seed=1, known_sites={"z"}, num_resamples=5)
    assert all(e.metric.endswith("_unseen") for e in nothing)
    assert any("no test scan at a site that was trained on" in note for note in why)
