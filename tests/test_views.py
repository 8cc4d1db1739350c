"""Views: replayable, each knob alone does what it says, and nothing at 0."""

import pytest
import torch

from core.data.views import DrawnViews, RowViewPolicy, ViewPolicy

OFF = {"flip_probability": 0.0, "rotation_degrees": 0.0, "translation_voxels": 0.0, "scale_range": 0.0,
       "cutout_fraction": 0.0, "noise_sd": 0.0}  # fmt: skip
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
    assert noise.std(dim=1) == pytest.approx(drawn.noise_sd_B.numpy(), rel=0.1)


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
    with pytest.raises(ValueError, match=r"cutout_fraction must be between 0 and 0\.9, got 2"):
        ViewPolicy(cutout_fraction=2)


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
