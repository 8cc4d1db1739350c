"""Private fine-tuning: what one subject can move, the noise, the draws, and what they come to."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from core.config import compose_plain
from core.losses import NTXent
from core.models import Classifier, Encoder, SmallEncoder
from core.privacy import (
    NOT_COVERED,
    Guarantee,
    PrivateSteps,
    assert_private,
    clipped_sum,
    epsilon,
    harden,
    noise_multiplier_for,
    secret_normal,
    secret_uniform,
)
from core.settings import ClipAndNoise, DpSgd

Subject = tuple[Tensor, Tensor]
"""Inputs of a subject's scans, and the number to tell of each."""
Mechanism = Callable[[nn.Module, list[Subject]], Tensor]
CLIP_NORM = 0.5
CLIPPING_ALONE = DpSgd(target_epsilon=math.inf, delta=1e-3, clip_norm=CLIP_NORM)


class Rows(Encoder):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


def linear_head() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 1).double()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(SmallEncoder(1, 2, 2), 1).double()


def loss_of(model: nn.Module, subject: Subject) -> Tensor:
    inputs, values = subject
    return (model(inputs)[:, 0] - values).square().sum()


def missing(model: nn.Module) -> Tensor:
    return 0.0 * next(model.parameters()).sum()


def private_sum(model: nn.Module, subjects: list[Subject]) -> Tensor:
    """What a step adds up, from the weights that it moves: no noise, everybody drawn."""
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = PrivateSteps(optimiser, CLIPPING_ALONE, num_subjects=8, batch_size=8, num_steps=1)
    assert steps.draw() == list(range(8))
    absent = [missing(model) for _ in range(8 - len(subjects))]
    steps.step([loss_of(model, subject) for subject in subjects] + absent)
    after = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(before, model.parameters())
    return 8 * (before - after)


def per_scan_sum(model: nn.Module, subjects: list[Subject]) -> Tensor:
    """The mistake of clipping each scan, not each subject."""
    scans = [(inputs[i : i + 1], values[i : i + 1]) for inputs, values in subjects for i in range(len(values))]
    return clipped_sum((loss_of(model, scan) for scan in scans), list(model.parameters()), CLIP_NORM)[0]


def coupled_sum(model: nn.Module, subjects: list[Subject]) -> Tensor:
    """The mistake of a contrastive loss of the batch whose gradient is split by subject, then clipped."""
    del model
    inputs = torch.cat([inputs[:1] for inputs, _ in subjects])[:, :6]
    weight = nn.Parameter(torch.eye(6, dtype=torch.float64) + 0.1)
    z_ND = inputs @ weight
    z_ND.retain_grad()
    NTXent(temperature=0.5)(z_ND, z_ND + 0.0).backward()
    assert z_ND.grad is not None
    gradient_ND = z_ND.grad.nan_to_num(nan=0.0)
    rows = (torch.outer(x, g) for x, g in zip(inputs, gradient_ND, strict=True))
    return torch.stack([row * (0.01 / row.norm().clamp_min(0.01)) for row in rows]).sum(dim=0).flatten() * (CLIP_NORM / 0.01)


def hostile(usual: list[Subject]) -> Iterator[Subject]:
    """Subjects as they come, copied, huge, not numbers, and made to point one way."""
    torch.manual_seed(1)
    shape = usual[0][0].shape[1:]
    for scale in (1.0, 1e-6, 1e6, 1e150):
        yield scale * torch.randn(4, *shape, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    yield usual[0]
    yield torch.full((2, *shape), math.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    yield torch.full((1, *shape), math.inf, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for sign in (1.0, -1.0):
        yield torch.ones(3, *shape, dtype=torch.float64), torch.full((3,), sign * 1e9, dtype=torch.float64)
    ramp = torch.linspace(-1, 1, usual[0][0][0].numel(), dtype=torch.float64).reshape(shape)
    for sign in (1.0, -1.0):
        yield (usual[0][0][:1] + sign * 0.1 * ramp).clone(), usual[0][1][:1]


def largest_moves(mechanism: Mechanism, model: nn.Module, shape: tuple[int, ...], *, alike: bool = False) -> tuple[float, float]:
    """How far one subject moves the sum, in clipping norms: present against missing, and exchanged for another."""
    torch.manual_seed(2)
    one = torch.randn(1, *shape, dtype=torch.float64)
    usual = [
        (one.expand(3, *shape).clone() if alike else torch.randn(3, *shape, dtype=torch.float64), torch.randn(3).double())
        for _ in range(7)
    ]
    without = mechanism(model, usual)
    sums = [mechanism(model, [*usual, subject]) for subject in hostile(usual)]
    present = max(float((total - without).norm()) for total in sums)
    exchanged = max(float((one - other).norm()) for one in sums for other in sums)
    return present / CLIP_NORM, exchanged / CLIP_NORM


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("build", "shape"), [(linear_head, (6,)), (convolutions, (1, 16, 16))])
def test_one_subject_moves_a_step_by_the_clipping_norm_at_most(
    build: Callable[[], nn.Module], shape: tuple[int, ...], alike: bool
) -> None:
    present, exchanged = largest_moves(private_sum, build(), shape, alike=alike)
    assert 0.99 < present < 1 + 1e-9
    assert 1.5 < exchanged < 2 + 1e-9


@pytest.mark.parametrize("mistake", [per_scan_sum, coupled_sum])
def test_the_probe_finds_what_is_not_private(mistake: Mechanism) -> None:
    present, exchanged = largest_moves(mistake, linear_head(), (6,), alike=True)
    assert present > 1.5
    assert exchanged > 2.5


def test_a_step_without_noise_is_one_of_plain_clipped_gradients() -> None:
    torch.manual_seed(3)
    subjects = [(scale * torch.randn(2, 6).double(), torch.randn(2).double()) for scale in (0.01, 1.0, 100.0)]
    ours, plain = linear_head(), linear_head()
    optimisers = [torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1) for net in (ours, plain)]
    steps = PrivateSteps(optimisers[0], CLIPPING_ALONE, num_subjects=3, batch_size=5, num_steps=4)
    for _ in range(4):
        steps.step(loss_of(ours, subjects[number]) for number in steps.draw())
        total = [torch.zeros_like(p) for p in plain.parameters()]
        for subject in subjects:
            plain.zero_grad()
            loss_of(plain, subject).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), CLIP_NORM)
            total = [sum_ + p.grad for sum_, p in zip(total, plain.parameters(), strict=True)]
        for p, sum_ in zip(plain.parameters(), total, strict=True):
            p.grad = sum_ / 3
        optimisers[1].step()
    assert steps.spent() == math.inf
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        # PyTorch clips to its norm + 1e-6.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_subject_that_is_not_finite_adds_nothing_and_is_counted() -> None:
    model, number = nn.Linear(6, 1).double(), torch.ones(1).double()
    subjects = [torch.full((1, 6), value, dtype=torch.float64) for value in (1.0, math.nan, 1e200)]
    parameters = list(model.parameters())
    expected, none = clipped_sum([loss_of(model, (subjects[0], number))], parameters, 1.0)
    got, num_not_finite = clipped_sum([loss_of(model, (rows, number)) for rows in subjects], parameters, 1.0)
    assert torch.equal(got, expected)
    assert (none, num_not_finite) == (0, 2)
    steps = PrivateSteps(torch.optim.SGD(parameters, lr=0.1), CLIPPING_ALONE, num_subjects=3, batch_size=3, num_steps=2)
    for _ in range(2):
        steps.step([loss_of(model, (subjects[i], number)) for i in steps.draw()])
    assert steps.num_not_finite == 4
    assert all(p.isfinite().all() for p in parameters)


def largest_gap_to_normal(values: Tensor) -> float:
    """Kolmogorov and Smirnov's statistic times the root of the number of values; above 2.7 once in a million."""
    ordered = values.double().sort().values
    normal = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(len(values) + 1).double() / len(values)
    return float(torch.maximum((normal - steps[:-1]).abs(), (normal - steps[1:]).abs()).max()) * math.sqrt(len(values))


def test_secret_numbers_are_even_and_normal_and_follow_no_seed() -> None:
    for draw in (secret_uniform, secret_normal):
        values = []
        for _ in range(2):
            torch.manual_seed(0)
            values.append(draw(20_001))
        assert not torch.equal(*values)
        assert (len(draw(0)), len(draw(1)), values[0].dtype) == (0, 1, torch.float64)
    even, normal = secret_uniform(20_000), secret_normal(20_000)
    assert even.min() > 0
    assert even.max() <= 1
    assert float(even.mean()) == pytest.approx(0.5, abs=0.013)
    assert largest_gap_to_normal(normal) < 2.7
    assert largest_gap_to_normal(1.2 * normal) > 2.7
    assert abs(float((normal[:10_000] * normal[10_000:]).mean())) < 0.06


def test_every_step_is_noised_one_that_drew_nobody_too() -> None:
    weight = nn.Parameter(torch.zeros(10_000))
    choice = DpSgd(target_epsilon=1.0, delta=1e-4, clip_norm=0.25)
    steps = PrivateSteps(torch.optim.SGD([weight], lr=1.0), choice, num_subjects=20, batch_size=2, num_steps=100)
    noises: dict[bool, list[Tensor]] = {True: [], False: []}
    while not (noises[True] and noises[False]):
        torch.manual_seed(0)
        before, drawn = weight.detach().clone(), steps.draw()
        steps.step(weight[0] * 0.0 for _ in drawn)
        # The sum is divided by the 2 expected, not by those drawn.
        noises[not drawn].append(2 * (before - weight.detach()) / (steps.noise_multiplier * 0.25))
    for noise in (noises[True][0], noises[False][0]):
        assert float(noise.std()) == pytest.approx(1.0, abs=0.045)
        assert largest_gap_to_normal(noise) < 2.7
    assert not torch.equal(noises[True][0], noises[False][0])


def test_draws_are_poisson_and_follow_no_seed() -> None:
    weight = nn.Parameter(torch.zeros(1))
    choice = DpSgd(target_epsilon=math.inf, delta=1e-4)
    steps = PrivateSteps(torch.optim.SGD([weight], lr=1.0), choice, num_subjects=100, batch_size=10, num_steps=200)
    draws = []
    for _ in range(200):
        torch.manual_seed(0)
        draws.append(steps.draw())
        steps.step(weight[0] for _ in draws[-1])
    sizes = torch.tensor([len(drawn) for drawn in draws]).double()
    assert float(sizes.mean()) == pytest.approx(10, abs=6 * math.sqrt(9 / 200))
    assert float(sizes.var()) == pytest.approx(9, rel=0.7)
    assert set().union(*draws) == set(range(100))
    assert all(drawn == sorted(set(drawn)) for drawn in draws)
    # The divisor is fixed: a step moves the weight by those drawn over those expected.
    assert float(-weight.detach()) == pytest.approx(float(sizes.sum()) / 10, rel=1e-5)


TABLE_D = """
0.7   8.9  18.8  41.6  97    15.9  112   88
1     3.9  8.6   19.8  47.7  7.8   50.6  50.5
1.5   2.0  4.3   9.9   23.8  4.0   24.1  27.9
2     1.3  2.9   6.5   15.3  2.6   15.4  18.7
3     0.8  1.7   3.8   8.7   1.5   8.7   11.0
5     0.4  0.9   2.0   4.6   0.8   4.6   5.8
"""
COLUMNS = ((0.032, 500), (0.064, 500), (0.128, 500), (0.256, 500), (0.128, 100), (0.128, 2000), (1.0, 50))


def table_d() -> Iterator[tuple[float, float, int, str]]:
    for row in TABLE_D.split("\n")[1:-1]:
        noise, *cells = row.split()
        yield from ((float(noise), *column, cell) for column, cell in zip(COLUMNS, cells, strict=True))


def check_table_d(cells: Iterable[tuple[float, float, int, str]]) -> None:
    """Epsilons at a delta of 1e-4, PRV, found beforehand with Opacus; rounded to two digits behind the point, then as printed."""
    for noise, rate, steps, printed in cells:
        unit = 10.0 ** -len(printed.partition(".")[2])
        assert epsilon(noise, rate, steps, 1e-4) == pytest.approx(float(printed), abs=0.5 * unit + 0.005)


def test_epsilons_are_those_of_the_table() -> None:
    # The others take seconds: they were checked by calling check_table_d(table_d()).
    check_table_d(cell for cell in table_d() if cell[0] == 5 or cell[2] == 50 or cell[:3] == (1.5, 0.128, 100))


def test_epsilon_agrees_with_the_gaussian_mechanism_and_the_looser_accountant() -> None:
    # With everybody in every step, T steps of noise s are one of s / sqrt(T) (Balle and Wang 2018, theorem 8).
    def delta_of(eps: float, mu: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)

    for noise, steps in ((3.0, 1), (3.0, 16), (40.0, 100)):
        got = epsilon(noise, 1.0, steps, 1e-5)
        assert delta_of(got, math.sqrt(steps) / noise) <= 1e-5 <= delta_of(got - 0.025, math.sqrt(steps) / noise)
    tight, loose = (epsilon(1.5, 0.05, 300, 1e-5, accountant) for accountant in ("prv", "rdp"))
    assert tight < loose < 1.3 * tight
    assert epsilon(0.01, 1.0, 1000, 1e-5) == epsilon(0.01, 1.0, 1000, 1e-5, "rdp") > 500


@pytest.mark.parametrize(("target", "num_subjects", "num_steps"), [(0.5, 20, 3), (1.0, 160, 100), (8.0, 16, 20)])
def test_all_steps_spend_the_target_and_no_step_comes_free(target: float, num_subjects: int, num_steps: int) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.AdamW([{"params": [weight], "lr": 0.1}])
    choice = DpSgd(target_epsilon=target, delta=1e-4)
    size = {"num_subjects": num_subjects, "batch_size": 16, "num_steps": num_steps}
    first = PrivateSteps(optimiser, choice, **size)
    spent = [first.spent()]
    for _ in range(2):
        first.step(weight.square().sum() for _ in first.draw())
        spent.append(first.spent())
    later = PrivateSteps(optimiser, choice, **size, steps_before=2)
    assert (later.spent(), later.noise_multiplier) == (spent[-1], first.noise_multiplier)
    for _ in range(num_steps - 2):
        later.step(weight.square().sum() for _ in later.draw())
    spent += [later.guarantee.spent(round(part * num_steps)) for part in (0.4, 0.7)] + [later.spent()]
    assert spent[0] == 0
    assert all(one <= other for one, other in pairwise(spent[:3]))
    assert all(one < other for one, other in pairwise(spent[3:]))
    assert 0.98 * target <= spent[-1] <= target
    with pytest.raises(ValueError, match=f"privacy: steps must be at most the {num_steps} that the noise was made for"):
        later.draw()


def test_a_step_needs_one_number_of_each_subject_drawn() -> None:
    weight, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    frozen.grad = torch.ones(2)
    steps = PrivateSteps(torch.optim.SGD([weight, frozen], lr=1.0), CLIPPING_ALONE, num_subjects=2, batch_size=2, num_steps=3)
    steps.draw()
    with pytest.raises(ValueError, match="losses must be one a drawn subject, 2, got 1"):
        steps.step([weight.sum()])
    with pytest.raises(ValueError, match=r"a subject's loss must be one number .* got shape \(2,\)\."):
        steps.step([weight, weight])
    with pytest.raises(ValueError, match=r"got shape \(\) without a gradient"):
        steps.step([torch.zeros(()), weight.sum()])
    weight.grad = torch.full((2,), math.nan)
    steps.step(weight.sum() * 0.0 for _ in range(2))
    assert torch.equal(weight, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2))
    with pytest.raises(ValueError, match="the optimiser must have weights to train"):
        PrivateSteps(torch.optim.SGD([frozen], lr=1.0), CLIPPING_ALONE, num_subjects=2, batch_size=2, num_steps=3)


def test_what_makes_an_epsilon_false_is_refused() -> None:
    model = Classifier(Rows(4), 2)
    assert_private(model, couples_scans=False)
    with pytest.raises(ValueError, match=r"couples scans.*252 clipping norms instead of 2"):
        assert_private(model, couples_scans=NTXent.couples_scans)
    frozen = nn.Sequential(nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="got BatchNorm1d at '0'"):
        assert_private(frozen.eval(), couples_scans=False)
    model.register_buffer("seen", torch.zeros(3))
    with pytest.raises(ValueError, match=r"got the buffers \['seen'\]"):
        assert_private(model, couples_scans=False)
    with pytest.raises(ValueError, match="must have weights to train"):
        assert_private(nn.Linear(4, 1).requires_grad_(False), couples_scans=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("target_epsilon", value) for value in (0.0, -1.0, 0.001, 101.0, math.nan)],
        *[("delta", value) for value in (0.0, 1.0, -0.1, math.nan)],
        *[("clip_norm", value) for value in (0.0, -1.0, math.inf, math.nan)],
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"privacy: {field} must be"):
        DpSgd(**{field: value})


def test_a_guarantee_must_be_one() -> None:
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            Guarantee(choice=DpSgd(), num_subjects=sizes[0], batch_size=sizes[1], num_steps=sizes[2])
    with pytest.raises(ValueError, match=r"delta must be less than 1 / number of subjects, got 0\.01 with 100"):
        Guarantee(choice=DpSgd(delta=0.01), num_subjects=100, batch_size=10, num_steps=1)


def test_a_guarantee_is_described_for_reports_and_model_cards() -> None:
    choice = DpSgd(**compose_plain(["privacy=dp_sgd", "privacy.target_epsilon=2", "privacy.delta=1e-4"])["privacy"])
    assert choice == DpSgd(target_epsilon=2.0, delta=1e-4)
    guarantee = Guarantee(choice=choice, num_subjects=10, batch_size=30, num_steps=50)
    told = json.loads(json.dumps(guarantee.describe(50), allow_nan=False))
    assert told["noise_multiplier"] == noise_multiplier_for(2.0, 1e-4, 1.0, 50)
    assert 1.96 <= told["epsilon"] <= 2 < told["epsilon_rdp"]
    assert (told["delta"], told["adjacency"], told["unit"], told["accountant"]) == (1e-4, "zero_out", "subject", "PRV")
    assert (told["clip_norm"], told["sample_rate"], told["steps"]) == (1.0, 1.0, 50)
    assert told["not_covered"] == list(NOT_COVERED)
    assert f"({told['epsilon']:.2f}, 0.0001)-differentially private" in told["summary"]
    assert guarantee.expected_batch_size == 10
    nothing = Guarantee(choice=CLIPPING_ALONE, num_subjects=10, batch_size=3, num_steps=5).describe(5)
    assert (nothing["epsilon"], nothing["noise_multiplier"]) == (None, 0.0)
    assert "nothing is guaranteed" in nothing["summary"]


def test_weights_that_private_steps_gave_leave_as_they_are() -> None:
    before, after = {"w": torch.zeros(3)}, {"w": torch.full((3,), 9.0)}
    assert harden(after, before, DpSgd()) == after
    seeded = []
    for _ in range(2):
        torch.manual_seed(0)
        seeded.append(harden(after, before, ClipAndNoise(noise_multiplier=1.0))["w"])
    assert not torch.equal(*seeded)
