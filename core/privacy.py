"""What leaves a site: hardening of its update, and fine-tuning whose steps are differentially private for a subject.

Only `DpSgd` claims differential privacy, and of fine-tuning only: one site's update is not a crowd to hide in.

Shape legend: P trained weights, flat, one after another.
"""

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from core.models import assert_no_batchnorm
from core.settings import LARGEST_EPSILON, ClipAndNoise, DpSgd, PrivacyChoice

State = dict[str, Tensor]
Accountant = Literal["prv", "rdp"]

NOT_COVERED = (
    "the encoder that fine-tuning starts from, and all else that a site tells: moments, metrics, predictions, logs, seconds",
    "the choice of hyper-parameters and of the best of several runs on these subjects",
    "early stopping, or the choice of a round by a score",
    "the number of subjects, which batch size and sampling rate tell",
    "preprocessing that looks at all subjects: an eraser, ComBat, standardisation, class weights, a fraction of each class",
    "a subject registered at several sites, whose epsilons add up",
)


def secret_uniform(num: int) -> Tensor:
    """(num,) float64, even on (0, 1], from the operating system's entropy.

    Not from torch's generators: they take 32 bits of a seed, which can be tried out, and a run's seed is no secret at all.
    """
    if num == 0:
        return torch.empty(0, dtype=torch.float64)
    words = torch.frombuffer(bytearray(os.urandom(8 * num)), dtype=torch.int64)
    return ((words & (2**53 - 1)) + 1).double() * 2.0**-53


def secret_normal(num: int) -> Tensor:
    """(num,) float64, standard normal, from the operating system's entropy (Box and Muller 1958)."""
    radius, turn = secret_uniform(num + num % 2).chunk(2)
    radius, angle = (-2.0 * radius.log()).sqrt(), 2.0 * math.pi * turn
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:num]


def harden(local: Mapping[str, Tensor], received: Mapping[str, Tensor], choice: PrivacyChoice) -> State:
    """The state that may leave the site: ``received`` plus the clipped and noised update; equal to ``local`` without either.

    With `DpSgd` the steps themselves were clipped and noised.
    """
    if not isinstance(choice, ClipAndNoise):
        return dict(local)
    floating = [name for name, value in local.items() if value.is_floating_point()]
    norm = torch.cat([(local[name].double() - received[name].double()).flatten() for name in floating]).norm()
    if norm <= choice.clip_norm and choice.noise_multiplier == 0:
        return dict(local)
    scale = min(1.0, choice.clip_norm / max(float(norm), 1e-30))
    hardened = dict(local)
    for name in floating:
        update = (local[name].double() - received[name].double()) * scale
        if choice.noise_multiplier:
            noise = secret_normal(update.numel()).view_as(update).to(update.device)
            update += choice.noise_multiplier * choice.clip_norm * noise
        hardened[name] = (received[name].double() + update).to(local[name].dtype)
    return hardened


def epsilon(noise_multiplier: float, sample_rate: float, num_steps: int, delta: float, accountant: Accountant = "prv") -> float:
    """What steps of the Poisson-subsampled Gaussian mechanism spend at ``delta``, by Opacus.

    Args:
        noise_multiplier: standard deviation of the noise, in units of the clipping norm; 0 spends all there is.
        sample_rate: probability with which a step draws a subject.
        num_steps: steps taken, each counted as if its result were published.
        delta: probability with which more may be lost.
        accountant: ``prv``, exact to 0.01 and an upper bound (Gopi et al. 2021); ``rdp``, looser, to check it by. Where the
            looser one is above 500 both give that.
    """
    if num_steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import PRVAccountant, RDPAccountant  # seconds to import: only by who asks for it

    # Opacus warns where the RDP bound is loose, and divides by 0, rightly, at a sampling rate of 1.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        rdp = RDPAccountant()
        rdp.history = [(noise_multiplier, sample_rate, num_steps)]
        bound = float(rdp.get_epsilon(delta))
        if accountant == "rdp" or bound > 5 * LARGEST_EPSILON:
            return bound
        prv = PRVAccountant()
        prv.history = rdp.history
        return max(0.0, float(prv.get_epsilon(delta)))


@lru_cache(maxsize=64)
def noise_multiplier_for(target_epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Noise with which the steps spend ``target_epsilon``, at most and to 0.5 %, by the PRV accountant; 0 if it is infinite."""
    if target_epsilon == math.inf:
        return 0.0
    from opacus.accountants.utils import get_noise_multiplier  # seconds to import: only by who asks for it

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return float(
            get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=num_steps,
                accountant="prv",
                epsilon_tolerance=0.005 * target_epsilon,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What `DpSgd` comes to at a site with its number of subjects and steps.

    Attributes:
        choice: the run's.
        num_subjects: subjects of the site that fine-tuning trains on; taken to be known.
        batch_size: subjects a step draws on average, at most all.
        num_steps: all steps that are ever taken on these subjects: of all rounds, and of all stages.
    """

    choice: DpSgd
    num_subjects: int
    batch_size: int
    num_steps: int

    def __post_init__(self) -> None:
        for name in ("num_subjects", "batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"privacy: {name} must be at least 1, got {getattr(self, name)!r}.")
        if self.choice.delta >= 1 / self.num_subjects:
            raise ValueError(
                f"privacy: delta must be less than 1 / number of subjects, got {self.choice.delta!r} with {self.num_subjects}: "
                "publishing one of them would satisfy it. Lower privacy.delta."
            )

    @property
    def sample_rate(self) -> float:
        """Probability with which a step draws a subject."""
        return min(1.0, self.batch_size / self.num_subjects)

    @property
    def expected_batch_size(self) -> float:
        """Subjects a step draws on average: what every sum is divided by, however many were drawn."""
        return float(min(self.batch_size, self.num_subjects))

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise, in units of the clipping norm."""
        return noise_multiplier_for(self.choice.target_epsilon, self.choice.delta, self.sample_rate, self.num_steps)

    def spent(self, steps: int, accountant: Accountant = "prv") -> float:
        """Epsilon after that many steps."""
        return epsilon(self.noise_multiplier, self.sample_rate, steps, self.choice.delta, accountant)

    def describe(self, steps: int) -> dict[str, Any]:
        """What a report and a model card tell of it after that many steps, ready for JSON; an infinite epsilon is None."""
        spent = {accountant: self.spent(steps, accountant) for accountant in ("prv", "rdp")}
        finite = {accountant: value if math.isfinite(value) else None for accountant, value in spent.items()}
        return {
            "mechanism": "DP-SGD",
            "unit": "subject",
            "epsilon": finite["prv"],
            "delta": self.choice.delta,
            "adjacency": self.choice.adjacency,
            "accountant": "PRV",
            "epsilon_rdp": finite["rdp"],
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.choice.clip_norm,
            "sample_rate": self.sample_rate,
            "steps": steps,
            "not_covered": list(NOT_COVERED),
            "summary": self.summary(steps),
        }

    def summary(self, steps: int) -> str:
        """The same in words, without what is not covered."""
        if self.noise_multiplier == 0:
            return "Gradients were clipped for each subject and no noise was added: nothing is guaranteed."
        return (
            f"The {steps} steps of fine-tuning are ({self.spent(steps):.2f}, {self.choice.delta:g})-differentially private for a "
            "subject with all scans, present or missing (zero-out adjacency; PRV accountant). A subject exchanged for another "
            "moves a step by up to twice as much, and the same noise guarantees less: what is an epsilon of 8 at a delta of 1e-4 "
            "is between 9 and 19 then, 17 at a sampling rate of 0.13 over 500 steps."
        )


def assert_private(model: nn.Module, *, couples_scans: bool) -> None:
    """Refuse what would make an epsilon false, with the reason.

    Args:
        model: what is trained, with what is frozen in it.
        couples_scans: whether the loss of one scan depends on scans of other subjects, as `Objective.couples_scans` says.

    Raises:
        ValueError: such a loss, a BatchNorm anywhere, floating-point buffers, or no weight to train.
    """
    if couples_scans:
        raise ValueError(
            "privacy: with dp_sgd a subject's loss must depend on its own scans alone, got one that couples scans: one changed "
            "scan moved the clipped sum of 128 by 252 clipping norms instead of 2. Use a supervised loss, or privacy=none."
        )
    assert_no_batchnorm(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("privacy: with dp_sgd a model must have weights to train, got none that requires a gradient.")


def clipped_sum(losses: Iterable[Tensor], parameters: Sequence[Tensor], clip_norm: float) -> tuple[Tensor, int]:
    """Sum of the gradients of the losses, each clipped as a whole, (P,) float64, and how many were not finite and add nothing.

    Args:
        losses: one scalar a subject; each gradient is taken before the next loss is asked for, so an iterator needs the memory
            of one.
        parameters: what to differentiate by; a loss need not depend on all of them.
        clip_norm: the most that any subject moves the sum by.

    Raises:
        ValueError: a loss that is no scalar, or has no gradient.
    """
    sum_P = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=parameters[0].device)
    num_not_finite = 0
    for loss in losses:
        if loss.ndim or not loss.requires_grad:
            raise ValueError(
                "privacy: a subject's loss must be one number that depends on the weights, got shape "
                f"{tuple(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}. Sum the losses of its scans."
            )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient_P = torch.cat([gradient.flatten().double() for gradient in gradients])
        norm = float(gradient_P.norm())
        if math.isfinite(norm):
            sum_P.add_(gradient_P, alpha=clip_norm / max(norm, clip_norm))
        else:
            num_not_finite += 1
    return sum_P, num_not_finite


# Written out, not as a subclass of Opacus' DPOptimizer: that one clips rows in float32, lets NaN through and draws its noise from
# torch's generators. Sum and noise are float64 and rounded to the weights' type together, which hides the grain of the noise.
class PrivateSteps:
    """Steps of DP-SGD for a subject, with any optimiser: draw subjects, take their losses one by one, step.

    Args:
        optimiser: torch's, over the weights to train; it sees the noised mean gradient alone.
        choice: the run's.
        num_subjects: as in `Guarantee`,
        batch_size: likewise,
        num_steps: likewise.
        steps_before: how many of them earlier rounds and stages took.

    Attributes:
        guarantee: what all of it comes to.
        noise_multiplier: standard deviation of the noise, in units of the clipping norm.
        sample_rate: probability with which a step draws a subject.
        steps_taken: with those before.
        num_not_finite: subjects so far whose gradient was not finite and added nothing; like the draws it stays at the site.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        choice: DpSgd,
        *,
        num_subjects: int,
        batch_size: int,
        num_steps: int,
        steps_before: int = 0,
    ) -> None:
        assert steps_before >= 0
        self.guarantee = Guarantee(choice=choice, num_subjects=num_subjects, batch_size=batch_size, num_steps=num_steps)
        self.noise_multiplier = self.guarantee.noise_multiplier
        self.sample_rate = self.guarantee.sample_rate
        self.steps_taken = steps_before
        self.num_not_finite = 0
        self._optimiser = optimiser
        self._parameters = [p for group in optimiser.param_groups for p in group["params"] if p.requires_grad]
        self._num_drawn: int | None = None
        if not self._parameters:
            raise ValueError("privacy: the optimiser must have weights to train, got none that requires a gradient.")

    def draw(self) -> list[int]:
        """The subjects of the next step, each with the same probability and apart from the others; often none.

        Raises:
            ValueError: all steps that the guarantee counts are taken.
        """
        assert self._num_drawn is None, "a draw that is thrown away biases the next one: step first"
        if self.steps_taken >= self.guarantee.num_steps:
            raise ValueError(
                f"privacy: steps must be at most the {self.guarantee.num_steps} that the noise was made for, got one more. Count "
                "all rounds and stages in num_steps."
            )
        drawn = (secret_uniform(self.guarantee.num_subjects) <= self.sample_rate).nonzero().flatten().tolist()
        self._num_drawn = len(drawn)
        return drawn

    def step(self, losses: Iterable[Tensor]) -> None:
        """One step of the optimiser with the noised sum of the drawn subjects' clipped gradients over their expected number.

        Args:
            losses: one scalar for each subject drawn, of all its scans and of nothing else: chance in it, as of a view, must not
                depend on who else was drawn. An iterator may compute each when it is asked for.

        Raises:
            ValueError: more or fewer losses than subjects drawn, or one as `clipped_sum` refuses.
        """
        assert self._num_drawn is not None, "draw the subjects of a step first"
        num_losses = 0

        def counted() -> Iterable[Tensor]:
            nonlocal num_losses
            for loss in losses:
                num_losses += 1
                yield loss

        clip_norm = self.guarantee.choice.clip_norm
        sum_P, num_not_finite = clipped_sum(counted(), self._parameters, clip_norm)
        if num_losses != self._num_drawn:
            raise ValueError(f"privacy: losses must be one a drawn subject, {self._num_drawn}, got {num_losses}.")
        if self.noise_multiplier:
            sum_P += self.noise_multiplier * clip_norm * secret_normal(len(sum_P)).to(sum_P.device)
        gradients = torch.split(sum_P / self.guarantee.expected_batch_size, [p.numel() for p in self._parameters])
        self._optimiser.zero_grad(set_to_none=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        self._optimiser.step()
        self._num_drawn = None
        self.num_not_finite += num_not_finite
        self.steps_taken += 1

    def spent(self) -> float:
        """Epsilon of the steps taken."""
        return self.guarantee.spent(self.steps_taken)
