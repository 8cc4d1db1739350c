"""Pieces of augmentation: each against MONAI or an explicit computation, exact at 0, replayable, batched as one by one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.layers import GaussianFilter
from monai.transforms import AdjustContrast, RandBiasField, ScaleIntensity
from monai.transforms import Affine as MonaiAffine
from torch.nn.functional import avg_pool1d, interpolate

from core.data.augment import (
    POOL_SIZE,
    RUN_SIZE,
    Affine,
    BiasField,
    Blur,
    Crop,
    Cutout,
    Drawn,
    DrawnBiasField,
    DrawnBlur,
    DrawnCutout,
    DrawnGamma,
    DrawnGhosts,
    DrawnJitter,
    DrawnMotion,
    DrawnNoise,
    DrawnResolution,
    DrawnRicianNoise,
    DrawnWarp,
    Flip,
    Gamma,
    Ghosting,
    Jitter,
    Motion,
    Noise,
    Piece,
    Resolution,
    RicianNoise,
    along_axis,
    legendre,
    unit_log_field,
)

GRIDS = [(11, 14, 8), (13, 10)]
ALL = torch.ones(1, dtype=torch.bool)
PIECES: list[Piece[Drawn]] = [
    Flip(flip_probability=0.5, flip_other_probability=0.5),
    Affine(rotation_degrees=30.0, translation_voxels=3.0, scale_range=0.2),
    Affine(translation_voxels=3.0),
    Crop(crop_fraction=0.5),
    Gamma(gamma_range=1.0),
    BiasField(bias_field_strength=0.5),
    Motion(motion_degrees=10.0, motion_voxels=3.0),
    Ghosting(ghost_strength=0.8),
    Resolution(resolution_range=3.0),
    Blur(blur_sd_voxels=2.0),
    RicianNoise(rician_sd=0.2),
    Jitter(jitter=0.5),
    Noise(noise_sd=0.2),
    Cutout(cutout_fraction=0.4, cutout_boxes=2),
]


def name_of(piece: Piece[Drawn]) -> str:
    return type(piece).__name__


def images(num: int, grid_shape: tuple[int, ...], channels: int = 1) -> torch.Tensor:
    return torch.rand(num, channels, *grid_shape, generator=torch.Generator().manual_seed(0))


def smooth_images(num: int, grid_shape: tuple[int, ...]) -> torch.Tensor:
    return DrawnBlur(ALL, torch.full((1, len(grid_shape)), 1.5)).apply(images(num, grid_shape))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inner(image: torch.Tensor, margin: int = 4) -> torch.Tensor:
    """Without the voxels near the border."""
    return image[(..., *[slice(margin, -margin)] * (image.ndim - 2))]


@pytest.mark.parametrize("grid_shape", GRIDS)
@pytest.mark.parametrize("piece", PIECES, ids=name_of)
class TestEveryPiece:
    def test_is_replayable_and_leaves_its_input(self, piece: Piece[Drawn], grid_shape: tuple[int, ...]) -> None:
        given = images(4, grid_shape, 2)
        first, again = (piece.draw(4, grid_shape, seeded(1)).apply(given) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, piece.draw(4, grid_shape, seeded(2)).apply(given))
        assert torch.equal(given, images(4, grid_shape, 2))
        assert (first.shape, first.dtype) == (given.shape, given.dtype)
        assert first.isfinite().all()
        first.zero_()
        assert torch.equal(given, images(4, grid_shape, 2))

    def test_with_leave_to_reuse_memory_gives_the_same(self, piece: Piece[Drawn], grid_shape: tuple[int, ...]) -> None:
        drawn = piece.draw(4, grid_shape, seeded(1))
        assert torch.equal(drawn.apply(images(4, grid_shape), reuse=True), drawn.apply(images(4, grid_shape)))

    def test_does_to_a_batch_what_it_does_one_by_one(self, piece: Piece[Drawn], grid_shape: tuple[int, ...]) -> None:
        drawn, given = piece.draw(4, grid_shape, seeded(3)), images(4, grid_shape)
        together = drawn.apply(given)
        alone = [drawn[torch.tensor([row])].apply(given[row : row + 1]) for row in range(4)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)

    def test_does_the_same_to_every_layout_of_memory(self, piece: Piece[Drawn], grid_shape: tuple[int, ...]) -> None:
        drawn, given = piece.draw(4, grid_shape, seeded(3)), images(4, grid_shape)
        strided = given.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert torch.equal(drawn.apply(strided), drawn.apply(given))
        assert torch.equal(strided, given)

    def test_by_chance_changes_a_part_and_no_bit_of_the_rest(self, piece: Piece[Drawn], grid_shape: tuple[int, ...]) -> None:
        given = images(40, grid_shape)
        drawn = replace(piece, chance=0.4).draw(40, grid_shape, seeded(0))
        changed = (drawn.apply(given) != given).flatten(1).any(dim=1)
        assert not changed[~drawn.on_B].any()
        assert 4 <= int(changed.sum()) <= 28

    def test_at_zero_is_off(self, piece: Piece[Drawn], grid_shape: tuple[int, ...]) -> None:
        del grid_shape
        assert piece.is_on
        assert not type(piece)().is_on
        assert not replace(piece, chance=0.0).is_on

    def test_refuses_impossible_knobs_and_grids(self, piece: Piece[Drawn], grid_shape: tuple[int, ...]) -> None:
        for name, limit in {**piece.limits, "chance": 1.0}.items():
            for value in (-1, limit + 1, math.nan):
                with pytest.raises(ValueError, match=rf"^{name_of(piece)}: {name} must be between 0 and .*, got {value}\.$"):
                    type(piece)(**{name: value})
        with pytest.raises(ValueError, match="grid_shape must have 2 or 3 axes, got"):
            piece.draw(1, grid_shape[:1], seeded(0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    index=st.integers(0, len(PIECES) - 1),
    share=st.floats(0.001, 1),
    seed=st.integers(0, 2**32),
    grid_shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    level=st.sampled_from([0.0, 1.0, -3.0, 1e4]),
)
def test_any_piece_of_any_strength_keeps_any_image_finite(
    index: int, share: float, seed: int, grid_shape: list[int], level: float
) -> None:
    piece = PIECES[index]
    knobs = {name: limit * share if isinstance(limit, float) else limit for name, limit in piece.limits.items()}
    image = images(2, tuple(grid_shape)) * level
    changed = type(piece)(**knobs).draw(2, grid_shape, seeded(seed)).apply(image)
    assert changed.isfinite().all()
    assert (changed.shape, changed.dtype) == (image.shape, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("piece", PIECES, ids=name_of)
def test_a_piece_does_the_same_on_another_device(piece: Piece[Drawn]) -> None:
    drawn, given = piece.draw(4, GRIDS[0], seeded(3)), images(4, GRIDS[0])
    torch.testing.assert_close(drawn.apply(given.cuda()).cpu(), drawn.apply(given), rtol=1e-4, atol=1e-5)


# MONAI maps with the matrix of the same orientation: from places in the output to places in the input.
@pytest.mark.parametrize("grid_shape", GRIDS)
def test_affine_and_crop_equal_monai_with_the_same_matrix(grid_shape: tuple[int, ...]) -> None:
    given = images(3, grid_shape, 2)
    turn = Affine(rotation_degrees=40.0, translation_voxels=3.0, scale_range=0.3).draw(3, grid_shape, seeded(5))
    drawn = turn.then(Crop(crop_fraction=0.4).draw(3, grid_shape, seeded(6)))
    for image, matrix, viewed in zip(given, drawn.matrix_BEE, drawn.apply(given), strict=True):
        resample = MonaiAffine(affine=matrix.numpy(), padding_mode="zeros", image_only=True)
        np.testing.assert_allclose(viewed.numpy(), np.asarray(resample(image)), atol=1e-4)


@pytest.mark.parametrize("grid_shape", GRIDS)
def test_a_crop_alone_is_interpolated_axis_by_axis_to_the_same(grid_shape: tuple[int, ...]) -> None:
    given = images(3, grid_shape)
    drawn = Crop(crop_fraction=0.6).draw(3, grid_shape, seeded(1)).then(Flip(flip_probability=0.5).draw(3, grid_shape, seeded(1)))
    barely_turned = drawn.matrix_BEE.clone()
    barely_turned[:, 0, 1] = 1e-9
    turned = DrawnWarp(drawn.on_B, barely_turned).apply(given)
    torch.testing.assert_close(drawn.apply(given), turned, rtol=0, atol=1e-5)


def test_a_crop_shows_a_part_from_within_the_image() -> None:
    ramp = torch.arange(64.0).reshape(1, 1, 64, 1).expand(50, 1, 64, 64) + 1
    drawn = Crop(crop_fraction=0.5).draw(50, (64, 64), seeded(0))
    first, last = inner(drawn.apply(ramp), 1)[:, 0, [0, -1], 0].T
    assert float(first.min()) >= 1
    assert float(last.max()) <= 64
    assert 0.5 * 61 <= float((last - first).min()) < 0.6 * 61 < float((last - first).max()) <= 61


@pytest.mark.parametrize("grid_shape", GRIDS)
def test_mirrors_and_shifts_one_after_the_other_are_one_without_interpolation(grid_shape: tuple[int, ...]) -> None:
    given = images(6, grid_shape)
    pieces = [Flip(flip_probability=0.5, flip_other_probability=0.5), Affine(translation_voxels=4.0), Flip(flip_probability=1.0)]
    drawn = [piece.draw(6, grid_shape, seeded(seed)) for seed, piece in enumerate(pieces)]
    one_by_one = drawn[2].apply(drawn[1].apply(drawn[0].apply(given)))
    assert torch.equal(drawn[0].then(drawn[1]).then(drawn[2]).apply(given), one_by_one)
    assert set(one_by_one.flatten().tolist()) <= {0.0, *given.flatten().tolist()}


def test_a_shift_off_the_grid_leaves_nothing() -> None:
    matrix = torch.eye(3, dtype=torch.float64).repeat(1, 1, 1)
    matrix[0, 0, 2] = 9
    assert not DrawnWarp(ALL, matrix).apply(images(1, (5, 5))).any()


@pytest.mark.parametrize("sd_voxels", [0.8, 1.7])
def test_blur_equals_monai_away_from_the_border(sd_voxels: float) -> None:
    given = images(2, (24, 26, 22))
    theirs = GaussianFilter(3, sd_voxels, truncated=3.0, approx="sampled")
    # MONAI does not bring the sum of the cut kernel to 1.
    expected = theirs(given) / inner(theirs(torch.ones_like(given)), 8).mean()
    ours = DrawnBlur(torch.ones(2, dtype=torch.bool), torch.full((2, 3), sd_voxels)).apply(given)
    torch.testing.assert_close(inner(ours, 6), inner(expected, 6), rtol=0, atol=1e-4)


def test_blur_keeps_a_constant_image_and_the_sum_and_leaves_an_axis_of_sd_0() -> None:
    drawn = DrawnBlur(ALL, torch.tensor([[2.0, 0.0, 6.0]]))
    torch.testing.assert_close(drawn.apply(torch.full((1, 1, 9, 8, 7), 3.0)), torch.full((1, 1, 9, 8, 7), 3.0))
    given = images(1, (9, 8, 7))
    torch.testing.assert_close(drawn.apply(given).sum(dim=(0, 1, 2, 4)), given.sum(dim=(0, 1, 2, 4)))


def test_gamma_equals_monai() -> None:
    given = images(2, GRIDS[0]) * 5 - 2
    ours = DrawnGamma(torch.ones(2, dtype=torch.bool), torch.tensor([0.6, 1.9])).apply(given)
    for image, gamma, changed in zip(given, (0.6, 1.9), ours, strict=True):
        torch.testing.assert_close(changed, AdjustContrast(gamma)(image).as_tensor(), rtol=0, atol=1e-4)


def test_gamma_of_a_given_range_keeps_its_ends() -> None:
    given = torch.tensor([[[[-1.0, 0.0, 0.5, 1.0, 2.0]]]])
    drawn = DrawnGamma(ALL, torch.tensor([2.0]), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(drawn.apply(given), torch.tensor([[[[0.0, 0.0, 0.25, 1.0, 4.0]]]]))


def test_jitter_equals_monai() -> None:
    given = images(1, GRIDS[0])
    brighter = DrawnJitter(ALL, torch.tensor([1.3]), torch.ones(1)).apply(given)
    torch.testing.assert_close(brighter, ScaleIntensity(minv=None, maxv=None, factor=0.3)(given).as_tensor())
    both = DrawnJitter(ALL, torch.tensor([1.3]), torch.tensor([0.6])).apply(given)
    torch.testing.assert_close(both, 1.3 * (given.mean() + 0.6 * (given - given.mean())))


def test_bias_field_equals_monai_with_the_same_coefficients() -> None:
    theirs = RandBiasField(prob=1.0, degree=3, coeff_range=(-0.3, 0.3))
    theirs.set_random_state(seed=0)
    given = images(1, GRIDS[0])
    expected = theirs(given[0])
    coefficients = torch.zeros(1, 4, 4, 4, dtype=torch.float64)
    orders = [(i, j, k) for i in range(4) for j in range(4 - i) for k in range(4 - i - j)]
    for order, value in zip(orders, theirs._coeff, strict=True):
        coefficients[0][order] = value
    torch.testing.assert_close(DrawnBiasField(ALL, coefficients).apply(given)[0], expected.as_tensor(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid_shape", GRIDS)
def test_bias_field_has_the_drawn_spread(grid_shape: tuple[int, ...]) -> None:
    drawn = BiasField(bias_field_strength=0.5).draw(200, grid_shape, seeded(0))
    log_field = drawn.field(grid_shape, torch.zeros((), dtype=torch.float64)).log().flatten(1)
    spread = log_field.std(dim=1, correction=0)
    assert float(log_field.mean(dim=1).abs().max()) < 1e-12
    assert float(spread.max()) == pytest.approx(0.5, abs=0.02)
    assert float(spread.mean()) == pytest.approx(0.25, abs=0.03)
    assert not unit_log_field(torch.ones(1, 4, 4, 4), (1, 1, 1)).any()


def test_legendre_polynomials_are_numpys() -> None:
    np.testing.assert_allclose(legendre(9, 5).numpy(), np.polynomial.legendre.legvander(np.linspace(-1, 1, 9), 4), atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_axis_multiplies_every_line(axis: int) -> None:
    given, matrix = images(2, (5, 6, 7), 3), torch.rand(2, 4, (5, 6, 7)[axis])
    lines = ["bnx,bcxyz->bcnyz", "bny,bcxyz->bcxnz", "bnz,bcxyz->bcxyn"][axis]
    expected = np.einsum(lines, matrix.numpy(), given.numpy())
    np.testing.assert_allclose(along_axis(given, matrix, axis).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("axis", "size"), [(0, 12), (1, 15), (2, 9)])
def test_ghosts_equal_weakened_lines_of_k_space(axis: int, size: int) -> None:
    given = images(1, (12, 15, 9))
    spectrum = np.fft.fft(given[0, 0].double().numpy(), axis=axis)
    frequency = np.round(np.fft.fftfreq(size, 1 / size)).astype(int)
    kept = np.where((frequency % 4 == 0) & (frequency != 0), 1 - 0.7, 1.0)
    expected = np.fft.ifft(spectrum * np.expand_dims(kept, [a for a in range(3) if a != axis]), axis=axis)
    drawn = DrawnGhosts(ALL, torch.tensor([axis]), torch.tensor([4]), torch.tensor([0.7]))
    # At the highest of an even number of frequencies a line is its own mirror image.
    np.testing.assert_allclose(drawn.apply(given)[0, 0].numpy(), expected.real, atol=1e-5)


def test_ghosts_are_displaced_copies() -> None:
    point = torch.zeros(1, 1, 24, 6)
    point[0, 0, 3, 2] = 1
    ghosts = DrawnGhosts(ALL, torch.tensor([0]), torch.tensor([4]), torch.tensor([0.8])).apply(point)[0, 0, :, 2]
    assert ghosts.abs().topk(4).indices.sort().values.tolist() == [3, 9, 15, 21]


@pytest.mark.parametrize("axis", [0, 1])
def test_motion_equals_lines_of_k_space_of_two_poses(axis: int) -> None:
    given = smooth_images(1, (16, 13))
    warp = Affine(rotation_degrees=20.0, translation_voxels=2.0).draw(1, (16, 13), seeded(2))
    drawn = DrawnMotion(ALL, torch.tensor([axis]), torch.tensor([0.5]), warp)
    size = (16, 13)[axis]
    before, after = (np.fft.fft(image[0, 0].double().numpy(), axis=axis) for image in (given, warp.apply(given)))
    early = np.abs(np.fft.fftfreq(size, 1 / size)) <= 0.5 * (size // 2)
    expected = np.fft.ifft(np.where(np.expand_dims(early, 1 - axis), before, after), axis=axis)
    np.testing.assert_allclose(drawn.apply(given)[0, 0].numpy(), expected.real, atol=1e-5)


def test_resolution_by_a_whole_factor_is_averaging_and_linear_interpolation() -> None:
    given = images(1, (12, 7))
    ours = DrawnResolution(ALL, torch.tensor([0]), torch.tensor([3.0])).apply(given)
    lines = given[0, 0].T[None]
    torch.testing.assert_close(ours[0, 0].T[None], interpolate(avg_pool1d(lines, 3), scale_factor=3, mode="linear"))


def test_resolution_by_any_factor_keeps_a_constant_and_the_mean_of_the_middle() -> None:
    drawn = Resolution(resolution_range=4.0).draw(8, (31, 33), seeded(0))
    torch.testing.assert_close(drawn.apply(torch.ones(8, 1, 31, 33)), torch.ones(8, 1, 31, 33))
    ramp = torch.arange(31.0)[:, None] + torch.arange(33.0)
    changed = drawn.apply(ramp.expand(8, 1, 31, 33))
    # Averages of voxels, each of one value, lie on a ramp to a fraction of its step.
    torch.testing.assert_close(inner(changed, 4), inner(ramp.expand(8, 1, 31, 33), 4), rtol=0, atol=0.1)


def noise(num: int, grid_shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    drawn = DrawnNoise(torch.ones(num, dtype=torch.bool), torch.ones(num), torch.arange(num) + 1000 * seed)
    return drawn.apply(torch.zeros(num, 1, *grid_shape)).flatten(1).double()


def test_noise_is_standard_normal_and_white() -> None:
    for row in noise(3, (121, 145, 121)):
        standard_error = len(row) ** -0.5
        assert abs(float(row.mean())) < 5 * standard_error
        assert abs(float(row.var()) - 1) < 5 * 2**0.5 * standard_error
        assert abs(float((row**3).mean())) < 5 * 15**0.5 * standard_error
        assert abs(float((row**4).mean()) - 3) < 5 * 96**0.5 * standard_error
        for lag in (1, 121, 121 * 145, RUN_SIZE):
            assert abs(float((row[lag:] * row[:-lag]).mean())) < 5 * (len(row) - lag) ** -0.5


def test_noise_of_two_views_of_two_images_and_of_two_channels_is_uncorrelated() -> None:
    first, second = noise(20, (60, 60, 60)), noise(20, (60, 60, 60), seed=1)
    correlation = torch.corrcoef(torch.cat([first, second]))
    assert float((correlation - torch.eye(40)).abs().max()) < 6 * 60**-1.5
    drawn = DrawnNoise(ALL, torch.ones(1), torch.zeros(1, dtype=torch.long))
    channels = drawn.apply(torch.zeros(1, 3, 128, 128, 128)).flatten(2)[0]
    assert float((torch.corrcoef(channels) - torch.eye(3)).abs().max()) < 5 * 128**-1.5


def test_places_in_the_pool_and_signs_follow_from_the_seed_alone() -> None:
    given = images(3, GRIDS[0])
    drawn = Noise(noise_sd=0.1).draw(3, GRIDS[0], seeded(0))
    apart = [drawn[torch.tensor([row])].apply(given[row : row + 1]) for row in (2, 0, 1)]
    torch.manual_seed(5)
    assert torch.equal(drawn.apply(given)[[2, 0, 1]], torch.cat(apart))
    same_value = torch.stack([noise(1, (1, 1), seed) for seed in range(500)]).flatten()
    assert 200 < int((same_value > 0).sum()) < 300
    assert POOL_SIZE >= 4 * RUN_SIZE


def test_noise_in_units_of_a_scale() -> None:
    drawn, given = Noise(noise_sd=0.1).draw(2, GRIDS[1], seeded(0)), torch.zeros(2, 1, *GRIDS[1])
    torch.testing.assert_close(drawn.in_units_of(torch.tensor([3.0])).apply(given), 3 * drawn.apply(given))


def test_rician_noise_is_rayleigh_in_air_and_gaussian_where_the_signal_is_strong() -> None:
    drawn = DrawnRicianNoise(torch.ones(2, dtype=torch.bool), torch.full((2,), 0.1), torch.arange(2))
    signal = torch.stack([torch.zeros(1, 60, 60, 60), torch.ones(1, 60, 60, 60)])
    air, tissue = drawn.apply(signal).flatten(1)
    assert float(air.min()) >= 0
    assert float(air.mean()) == pytest.approx(0.1 * math.sqrt(math.pi / 2), rel=0.01)
    assert float(air.square().mean()) == pytest.approx(0.02, rel=0.01)
    assert float(tissue.std()) == pytest.approx(0.1, rel=0.02)


def test_cutout_blanks_every_box_and_nothing_else() -> None:
    centres = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    blank = DrawnCutout(ALL, centres, 0.4).apply(torch.ones(1, 3, 10, 20)) == 0
    expected = torch.zeros(10, 20, dtype=torch.bool)
    expected[3:7, 6:14] = True
    expected[:2, 16:] = True
    assert torch.equal(blank, expected.expand(1, 3, 10, 20))
    with pytest.raises(ValueError, match=r"Cutout: cutout_boxes must be a whole number, got 1\.5\."):
        Cutout(cutout_boxes=1.5)  # type: ignore[arg-type]
