"""Views: replayable, each knob alone does what it says, and nothing at 0."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.views import DrawnViews, RowViewPolicy, ViewPolicy

KNOBS = [field.name for field in fields(ViewPolicy) if field.name not in ("kind", "cutout_boxes", "artefact_chance")]
OFF = dict.fromkeys(KNOBS, 0.0)
POLICIES = sorted(path for path in (Path(__file__).parents[1] / "configs/views").glob("*.yaml") if path.stem != "table")
SHAPE = (10, 12, 8)
UNIT = torch.ones(1)


def volumes(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 1, *SHAPE, generator=torch.Generator().manual_seed(0)) + 0.5


def view(seed: int = 0, **knobs: float) -> torch.Tensor:
    return drawn_view(seed, **knobs).apply(volumes(), UNIT)


def drawn_view(seed: int = 0, **knobs: float) -> DrawnViews:
    return ViewPolicy(**{**OFF, **knobs}).draw((3, 1, *SHAPE), torch.Generator().manual_seed(seed))


def test_the_same_seed_gives_the_same_view_and_another_another() -> None:
    knobs = {"flip_probability": 0.5, "rotation_degrees": 10.0, "cutout_fraction": 0.3, "noise_sd": 0.1, "scale_range": 0.1}
    assert torch.equal(view(1, **knobs), view(1, **knobs))
    assert not torch.equal(view(1, **knobs), view(2, **knobs))


def test_tiny_knobs_leave_the_volume_as_it_is_and_the_source_is_never_touched() -> None:
    source = volumes()
    viewed = drawn_view(noise_sd=1e-30).apply(source, UNIT)
    assert torch.equal(viewed, source)
    viewed.zero_()
    assert torch.equal(source, volumes())


def test_flip_mirrors_left_and_right() -> None:
    assert torch.equal(view(flip_probability=1.0), volumes().flip(2))


def test_translation_moves_by_whole_voxels_and_fills_with_zero() -> None:
    for source, moved in zip(volumes(), view(4, translation_voxels=3.0), strict=True):
        found = [
            (x, y, z)
            for x in range(-3, 4)
            for y in range(-3, 4)
            for z in range(-3, 4)
            if torch.equal(moved[0] > 0, torch.roll(inside(x, y, z), (0, 0, 0), (0, 1, 2)))
            and torch.equal(moved[0][inside(x, y, z)], torch.roll(source[0], (x, y, z), (0, 1, 2))[inside(x, y, z)])
        ]
        assert len(found) == 1


def inside(*shift: int) -> torch.Tensor:
    """Voxels that a shifted volume still covers."""
    mask = torch.ones(SHAPE, dtype=torch.bool)
    for axis, s in enumerate(shift):
        index = torch.arange(SHAPE[axis])
        keep = (index >= s) & (index < SHAPE[axis] + s)
        mask &= keep.reshape([-1 if a == axis else 1 for a in range(3)])
    return mask


def test_cutout_blanks_one_box_of_the_given_size() -> None:
    blanked = (view(2, cutout_fraction=0.5) == 0).flatten(1).sum(dim=1)
    assert (blanked <= 5 * 6 * 4).all()
    assert (blanked >= 2 * 3 * 2).all()


def test_noise_has_the_drawn_size() -> None:
    drawn = drawn_view(noise_sd=0.2)
    noise = (drawn.apply(volumes(), UNIT) - volumes()).flatten(1)
    assert noise.std(dim=1) == pytest.approx(drawn.pieces[0].sd_B.numpy(), rel=0.1)


def test_rotation_keeps_a_ball_and_turns_a_bar() -> None:
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, 21) for _ in range(3)), indexing="ij")
    ball = torch.sigmoid(20 * (0.5 - (x**2 + y**2 + z**2).sqrt()))[None, None]
    bar = ((y.abs() < 0.2) & (z.abs() < 0.2)).float()[None, None]
    drawn = ViewPolicy(**{**OFF, "rotation_degrees": 60.0}).draw(ball.shape, torch.Generator().manual_seed(1))
    assert float((drawn.apply(ball, UNIT) - ball).abs().max()) < 0.1
    assert float((drawn.apply(bar, UNIT) - bar).abs().max()) > 0.9


def test_rotation_on_an_uneven_grid_is_a_rotation_of_millimetres() -> None:
    x, y, z = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (21, 31, 25)), indexing="ij")
    ball = torch.sigmoid(2 * (6 - (x**2 + y**2 + z**2).sqrt()))[None, None]
    drawn = ViewPolicy(**{**OFF, "rotation_degrees": 45.0}).draw(ball.shape, torch.Generator().manual_seed(3))
    assert float((drawn.apply(ball, UNIT) - ball).abs().max()) < 0.1


def test_equal_views_and_bad_knobs_are_refused() -> None:
    with pytest.raises(ValueError, match="two equal views teach nothing"):
        ViewPolicy(**OFF)
    with pytest.raises(ValueError, match="two equal views teach nothing"):
        ViewPolicy(**OFF | {"blur_sd_voxels": 1.0}, artefact_chance=0.0)
    with pytest.raises(ValueError, match="two equal views teach nothing"):
        ViewPolicy(**OFF | {"cutout_fraction": 0.3}, cutout_boxes=0)
    with pytest.raises(ValueError, match=r"views: artefact_chance must be between 0 and 1, got 2"):
        ViewPolicy(artefact_chance=2)
    with pytest.raises(ValueError, match=r"cutout_fraction must be between 0 and 0\.9, got 2"):
        ViewPolicy(cutout_fraction=2)


@pytest.mark.parametrize("knob", KNOBS)
@pytest.mark.parametrize("shape", [(8, 1, *SHAPE), (8, 3, 12, 10)])
def test_each_knob_alone_makes_two_views_of_a_volume_and_of_an_image(knob: str, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    source, generator = images.clone(), torch.Generator().manual_seed(1)
    policy = ViewPolicy(**OFF | {knob: 3.0 if knob.endswith("voxels") else 0.45})
    first, second = (policy.draw(shape, generator).apply(images, UNIT) for _ in range(2))
    assert first.shape == second.shape == shape
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.equal(images, source)


def test_a_view_that_nothing_befalls_is_a_copy() -> None:
    source = volumes()
    viewed = drawn_view(blur_sd_voxels=1.0, artefact_chance=1e-9).apply(source, UNIT)
    assert torch.equal(viewed, source)
    viewed.zero_()
    assert torch.equal(source, volumes())


def test_artefacts_befall_a_share_of_the_views() -> None:
    policy = ViewPolicy(**OFF | {"blur_sd_voxels": 2.0, "jitter": 0.5}, artefact_chance=0.25)
    images = torch.rand(400, 1, 6, 5)
    viewed = policy.draw(images.shape, torch.Generator().manual_seed(0)).apply(images, UNIT)
    untouched = (viewed == images).flatten(1).all(dim=1).float().mean()
    assert float(untouched) == pytest.approx(0.75**2, abs=0.08)


def test_flip_of_the_other_axes() -> None:
    assert torch.equal(view(flip_other_probability=1.0), volumes().flip(3, 4))


def test_cutout_of_several_boxes() -> None:
    blank = [(view(1, cutout_fraction=0.3, cutout_boxes=boxes) == 0).float().mean() for boxes in (1, 6)]
    assert blank[1] > 2 * blank[0] > 0


def test_poses_are_one_interpolation() -> None:
    pose = {"flip_probability": 0.5, "rotation_degrees": 5.0, "translation_voxels": 2.0, "scale_range": 0.1, "crop_fraction": 0.2}
    assert len(drawn_view(**pose).pieces) == 1


def test_noise_is_in_units_of_the_scale() -> None:
    drawn = drawn_view(noise_sd=0.2)
    once, thrice = (drawn.apply(volumes(), torch.tensor([scale])) - volumes() for scale in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
class TestPolicyOfTheConfigs:
    def policy(self, path: Path) -> ViewPolicy:
        return ViewPolicy(**yaml.safe_load(path.read_text()))

    def test_names_every_knob_so_that_each_can_be_overridden(self, path: Path) -> None:
        assert set(yaml.safe_load(path.read_text())) == {field.name for field in fields(ViewPolicy)}

    @pytest.mark.parametrize("shape", [(4, 1, *SHAPE), (4, 3, 14, 12)])
    def test_is_replayable_and_finite(self, path: Path, shape: tuple[int, ...]) -> None:
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        first, again = (self.policy(path).draw(shape, torch.Generator().manual_seed(7)).apply(images, UNIT) for _ in range(2))
        assert torch.equal(first, again)
        assert first.isfinite().all()
        assert not torch.equal(first, self.policy(path).draw(shape, torch.Generator().manual_seed(8)).apply(images, UNIT))

    def test_does_to_a_batch_what_it_does_one_by_one(self, path: Path) -> None:
        drawn = self.policy(path).draw((3, 1, *SHAPE), torch.Generator().manual_seed(2))
        alone = [
            DrawnViews(tuple(piece[torch.tensor([row])] for piece in drawn.pieces)).apply(volumes()[row : row + 1], UNIT)
            for row in range(3)
        ]
        torch.testing.assert_close(drawn.apply(volumes(), UNIT), torch.cat(alone), rtol=1e-4, atol=1e-5)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_is_the_same_on_another_device(self, path: Path) -> None:
        drawn = self.policy(path).draw((3, 1, *SHAPE), torch.Generator().manual_seed(2))
        there = drawn.apply(volumes().cuda(), UNIT.cuda()).cpu()
        torch.testing.assert_close(there, drawn.apply(volumes(), UNIT), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    knobs=st.dictionaries(st.sampled_from(KNOBS), st.floats(1e-3, 1.0), min_size=1),
    boxes=st.integers(1, 8),
    chance=st.floats(0.1, 1.0),
    shape=st.lists(st.integers(1, 9), min_size=4, max_size=5),
)
def test_any_policy_gives_finite_views_of_the_same_shape(
    knobs: dict[str, float], boxes: int, chance: float, shape: list[int]
) -> None:
    # Shares of the largest value that each knob takes.
    largest: dict[str, Any] = {**dict.fromkeys(KNOBS, 1.0), "scale_range": 0.5, "crop_fraction": 0.9, "cutout_fraction": 0.9}
    largest |= {"rotation_degrees": 180.0, "motion_degrees": 45.0, "translation_voxels": 8.0, "motion_voxels": 8.0, "jitter": 0.9}
    largest |= {"gamma_range": 4.0, "bias_field_strength": 2.0, "resolution_range": 8.0, "blur_sd_voxels": 8.0}
    scaled = {name: share * largest[name] for name, share in knobs.items()}
    policy = ViewPolicy(**OFF | scaled, cutout_boxes=boxes, artefact_chance=chance)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    viewed = policy.draw(shape, torch.Generator().manual_seed(1)).apply(images, UNIT)
    assert viewed.isfinite().all()
    assert (viewed.shape, viewed.dtype) == (images.shape, torch.float32)


ROWS = torch.arange(40.0).reshape(4, 10)
SCALES = torch.linspace(1, 100, 10)


def test_the_same_seed_gives_the_same_view_of_rows_and_another_another() -> None:
    def view_of_rows(seed: int) -> torch.Tensor:
        return RowViewPolicy().draw(ROWS.shape, torch.Generator().manual_seed(seed)).apply(ROWS, SCALES).nan_to_num(nan=-1e9)

    assert torch.equal(view_of_rows(1), view_of_rows(1))
    assert not torch.equal(view_of_rows(1), view_of_rows(2))
    assert torch.equal(ROWS, torch.arange(40.0).reshape(4, 10))


def test_masked_features_are_missing_and_the_others_as_they_were() -> None:
    rows = torch.rand(200, 50, generator=torch.Generator().manual_seed(0))
    drawn = RowViewPolicy(mask_probability=0.3, noise_sd=0.0).draw(rows.shape, torch.Generator().manual_seed(0))
    viewed = drawn.apply(rows, torch.ones(50))
    assert float(viewed.isnan().float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(viewed[~viewed.isnan()], rows[~viewed.isnan()])


def test_noise_of_rows_is_in_units_of_each_feature_and_missing_stays_missing() -> None:
    rows = torch.zeros(5000, 10)
    rows[:, 3] = torch.nan
    drawn = RowViewPolicy(mask_probability=0.0, noise_sd=0.6).draw(rows.shape, torch.Generator().manual_seed(0))
    viewed = drawn.apply(rows, SCALES)
    assert viewed[:, 3].isnan().all()
    # A row's standard deviation is uniform from 0 to 0.6: the mean square is 0.6^2 / 3.
    spread = (viewed / SCALES).square().mean(dim=0).sqrt()[[0, 1, 2, 4, 5, 6, 7, 8, 9]]
    assert spread.numpy() == pytest.approx(0.6 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("knobs", [{"mask_probability": 0.95}, {"noise_sd": -1.0}, {"mask_probability": 0.0, "noise_sd": 0.0}])
def test_bad_knobs_of_rows_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="views: "):
        RowViewPolicy(**knobs)


@pytest.mark.parametrize("policy", [ViewPolicy(motion_degrees=2.0, jitter=0.2), RowViewPolicy()])
def test_a_repeated_view_is_the_same_for_every_image(policy: ViewPolicy | RowViewPolicy) -> None:
    shape = (3, 1, 8, 9, 7) if isinstance(policy, ViewPolicy) else (3, 6)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn = policy.draw((1, *shape[1:]), torch.Generator().manual_seed(1))
    together = drawn.repeated(3).apply(inputs, torch.ones(1))
    alone = torch.cat([drawn.apply(one, torch.ones(1)) for one in inputs.chunk(3)])
    torch.testing.assert_close(together, alone, equal_nan=True)
    assert not together.equal(inputs)
