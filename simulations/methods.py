"""Federated training by other people's methods, beside ours: one local loop, `core.training`'s, with a term or a weight changed.

A round here is a round of the real apps without messages: every site trains from the round's weights, the results are
averaged by the number of scans in the order of the sites' names. `Method` alone is FedAvg; the others say what they add.

Shape legend: R rows in a step (two views of each scan), F features of h, S sites, M replayed rows, I inputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.config import RunConfig
from core.data.feed import Waited
from core.data.site import SiteData
from core.models import Pretrainer, RowEncoder
from core.seeding import generator, seed
from core.training import embed, learning_rate, pretraining_losses, take_steps

State = dict[str, Tensor]
Progress = Callable[[int, int], None]
"""Told the rounds done and the rounds in all."""

HIDDEN_FEATURES = 64


@dataclass(frozen=True)
class Gaussian:
    """Mean and standard deviation of each feature of a site's representations, (F,) each."""

    mean_F: Tensor
    sd_F: Tensor

    def draw(self, rows: int, random: torch.Generator) -> Tensor:
        """Rows drawn from it, (rows, F)."""
        return self.mean_F + self.sd_F * torch.randn(rows, len(self.mean_F), generator=random)


@dataclass(frozen=True)
class LocalRound:
    """What a method knows at a site in a round.

    Attributes:
        model: what is trained.
        start: the weights that the round began from, those that are trained, by name.
        site: number of the site.
        ramp: from 0 in the first round towards 1 (Ganin et al., JMLR 2016).
        told: what the other sites told before the round.
        random: of the site and the round.
    """

    model: Pretrainer
    start: Mapping[str, Tensor]
    site: int
    ramp: float
    told: tuple[Gaussian, ...]
    random: torch.Generator

    def moved(self) -> Tensor:
        """Every trained weight minus where it began, as one vector."""
        return torch.cat([(p - self.start[name]).flatten() for name, p in self.model.named_parameters() if p.requires_grad])

    @property
    def site_classifier(self) -> nn.Module:
        """The head that tells sites apart."""
        return self.model.get_submodule("site_classifier")


@dataclass(frozen=True, kw_only=True)
class Method:
    """FedAvg (McMahan et al., AISTATS 2017): nothing is added, nothing stays at a site."""

    def extend(self, model: Pretrainer, num_sites: int, run_seed: int) -> None:
        """Add what travels beside encoder and projector."""

    def groups(self, model: Pretrainer, rate: float) -> list[dict[str, Any]]:
        """The weights as the optimiser takes them, with their learning rates."""
        return [{"params": list(model.parameters()), "lr": rate}]

    def own(self, model: Pretrainer, sites: Mapping[str, SiteData]) -> dict[str, State]:
        """The weights of each site that stay there, as they are before the first round."""
        del model
        return {site: {} for site in sites}

    def tell(self, model: Pretrainer, data: SiteData, device: torch.device) -> Gaussian | None:
        """What a site tells the others before a round, under the round's weights."""
        del model, data, device
        return None

    def terms(self, h_RF: Tensor, local: LocalRound) -> dict[str, Tensor]:
        """Weighted losses beside the objective in a step whose views have the representations ``h_RF``."""
        del h_RF, local
        return {}


@dataclass(frozen=True, kw_only=True)
class FedProx(Method):
    """Weights are pulled to the round's (Li et al., MLSys 2020): ``proximal_weight`` / 2 times the squared distance."""

    proximal_weight: float = 0.1

    def terms(self, h_RF: Tensor, local: LocalRound) -> dict[str, Tensor]:
        """The proximal term."""
        del h_RF
        return {"proximal": self.proximal_weight / 2 * local.moved().square().sum()}


@dataclass(frozen=True, kw_only=True)
class FedBN(Method):
    """The normalisation stays at its site (Li et al., ICLR 2021); unseen sites use the others' average.

    Our encoders have no BatchNorm. Of volumes, the affine weights of every GroupNorm stay. Of rows, the standardisation of the
    inputs is the site's own: its mean and variance count as its subjects, those over all sites as ``prior_subjects``, so that
    a small site is not standardised by noise; unseen sites use those over all sites. Neither is trained.
    """

    prior_subjects: float = 10.0

    def own(self, model: Pretrainer, sites: Mapping[str, SiteData]) -> dict[str, State]:
        """Standardisations of rows, or the affine weights of GroupNorm."""
        if isinstance(model.encoder, RowEncoder):
            return {site: self._standardisation(model.encoder, data) for site, data in sites.items()}
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)]
        state = model.state_dict()
        affine = {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
        return {site: {name: state[name].clone() for name in affine} for site in sites}

    def _standardisation(self, encoder: RowEncoder, data: SiteData) -> State:
        whole = encoder.standardise
        subjects = data.first_scans()
        rows_NI = subjects.inputs(range(len(subjects)), whole.mean.device).double()
        count_I, prior = (~rows_NI.isnan()).sum(dim=0), self.prior_subjects
        mean_I = (rows_NI.nansum(dim=0) + prior * whole.mean) / (count_I + prior)
        square_I = (rows_NI - mean_I).square().nansum(dim=0)
        scale_I = ((square_I + prior * whole.scale.double().square()) / (count_I + prior)).sqrt()
        return {"encoder.standardise.mean": mean_I.float(), "encoder.standardise.scale": scale_I.float()}


@dataclass(frozen=True, kw_only=True)
class Adversarial(Method):
    """What the two adversarial methods share: a classifier of sites on h, averaged like the encoder.

    Its layer norm stands where the released heads have BatchNorm, so that shrinking h hides nothing from it.

    Attributes:
        weight: of the encoder's adversarial gradient at the end; it rises over the rounds as in DANN.
        proximal_weight: of the distance from the round's weights.
        classifier_speed: learning rate of the classifier, in units of the encoder's: a slow one is no adversary.
    """

    weight: float
    proximal_weight: float
    classifier_speed: float

    def groups(self, model: Pretrainer, rate: float) -> list[dict[str, Any]]:
        """The classifier's weights apart from the others."""
        head = dict(model.get_submodule("site_classifier").named_parameters(prefix="site_classifier"))
        others = [parameter for name, parameter in model.named_parameters() if name not in head]
        return [{"params": others, "lr": rate}, {"params": list(head.values()), "lr": rate * self.classifier_speed}]

    def extend(self, model: Pretrainer, num_sites: int, run_seed: int) -> None:
        """Add the classifier, the same at every site."""
        features = model.encoder.num_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed(run_seed, "site classifier"))
            head = nn.Sequential(
                nn.LayerNorm(features, elementwise_affine=False),
                nn.Linear(features, HIDDEN_FEATURES),
                nn.ReLU(),
                nn.Linear(HIDDEN_FEATURES, num_sites),
            )
        model.add_module("site_classifier", head)


@dataclass(frozen=True, kw_only=True)
class FedDAPL(Adversarial):
    """Federated DANN with a proximal term (Safari Loaliyan et al. 2025, arXiv:2509.23688), on top of our objective.

    A site knows its own label alone: the classifier learns to say it, and the gradient, reversed, keeps the encoder from
    helping. As in the released code labels are smoothed and all weights are pulled to the round's by half the squared
    distance. Ours are the ramp from the first round on, AdamW, the layer norm, and the settings (their weights, 8.5 and 40, go
    with SGD on a regression). They were chosen among training subjects of ABIDE by the challenge's score, site accuracy^0.3
    times age error: as slow as the encoder, the classifier never catches up, and more of the site can be read than without.
    """

    weight: float = 0.3
    proximal_weight: float = 0.1
    classifier_speed: float = 10.0
    label_smoothing: float = 0.06

    def terms(self, h_RF: Tensor, local: LocalRound) -> dict[str, Tensor]:
        """Cross-entropy of the site behind the reversed gradient, and the proximal term."""
        logits_RS = local.site_classifier(reverse_gradient(h_RF, self.weight * local.ramp))
        site_R = torch.full((len(h_RF),), local.site, device=h_RF.device)
        return {
            "site": nn.functional.cross_entropy(logits_RS, site_R, label_smoothing=self.label_smoothing),
            "proximal": self.proximal_weight / 2 * local.moved().square().sum(),
        }


@dataclass(frozen=True, kw_only=True)
class FedHarmony(Adversarial):
    """Unlearning of the site from shared Gaussians (Dinsdale et al., MICCAI 2022), on top of our objective.

    Before a round every site tells mean and standard deviation of each feature of h over its healthy training subjects. In a
    step the classifier learns from the site's own h and from rows drawn from the others' Gaussians, and the encoder, the
    classifier held fixed, makes its answers uniform. The released code alternates three optimisers and counts each row of a
    random mixture; here one step carries all three losses, each acting on its own weights, and every site counts the same.
    The proximal term is theirs, the distance not squared, but acts: in the released loop it has no gradient. Settings were
    chosen as FedDAPL's.

    Attributes:
        replayed_rows: rows drawn from each other site in a step.
    """

    weight: float = 5.0
    proximal_weight: float = 0.1
    classifier_speed: float = 1.0
    replayed_rows: int = 8

    def tell(self, model: Pretrainer, data: SiteData, device: torch.device) -> Gaussian:
        """The Gaussian of the site's representations."""
        h_NF, _ = embed(model, data.first_scans(), device)
        return Gaussian(h_NF.mean(dim=0), h_NF.std(dim=0, correction=0))

    def terms(self, h_RF: Tensor, local: LocalRound) -> dict[str, Tensor]:
        """The classifier's loss, the encoder's confusion and the proximal term."""
        head = local.site_classifier
        others = [number for number in range(len(local.told)) if number != local.site]
        replayed_MF = torch.cat([local.told[number].draw(self.replayed_rows, local.random) for number in others])
        logits_NS = head(torch.cat([h_RF.detach(), replayed_MF.to(h_RF)]))
        sizes = [len(h_RF), *[self.replayed_rows] * len(others)]
        losses_N = nn.functional.cross_entropy(
            logits_NS,
            torch.tensor([local.site, *others]).repeat_interleave(torch.tensor(sizes)).to(h_RF.device),
            reduction="none",
        )
        fixed = {name: parameter.detach() for name, parameter in head.named_parameters()}
        probability_RS = torch.func.functional_call(head, fixed, (h_RF,)).softmax(dim=1)
        return {
            "site": torch.stack([part.mean() for part in torch.split(losses_N, sizes)]).mean(),
            "confusion": self.weight * local.ramp * confusion(probability_RS) / len(h_RF),
            "proximal": self.proximal_weight * distance(local.moved()),
        }


def reverse_gradient(features: Tensor, factor: float) -> Tensor:
    """The same values, whose gradient arrives turned round and multiplied by ``factor`` (Ganin et al., JMLR 2016)."""
    return features.detach() + factor * (features.detach() - features)


def confusion(probability_NS: Tensor) -> Tensor:
    """Cross-entropy between the uniform distribution and a classifier's answers, summed over rows; least where all are 1 / S."""
    return -(probability_NS + 1e-6).log().mean(dim=1).sum()


def distance(moved: Tensor) -> Tensor:
    """Length of a vector; its gradient is 0, not NaN, where nothing has moved."""
    length: Tensor = torch.linalg.vector_norm(moved)
    return length


@dataclass(frozen=True, eq=False)
class Trained:
    """What a method gives.

    Attributes:
        state: the weights that every site receives.
        own: the weights that each site keeps, in place of those.
    """

    state: State
    own: Mapping[str, State]

    def at(self, site: str) -> State:
        """The weights a site uses, those of `Pretrainer`."""
        state = self.state | self.own.get(site, {})
        return {name: value for name, value in state.items() if not name.startswith("site_classifier.")}


def federate(
    model: Pretrainer,
    sites: Mapping[str, SiteData],
    config: RunConfig,
    method: Method,
    *,
    device: torch.device,
    progress: Progress,
) -> Trained:
    """All rounds of pretraining.

    Args:
        model: with the weights before the first round; trained in place.
        sites: what each site trains on, by name.
        config: the run's, without debiasing.
        method: what is done.
        device: where to compute.
        progress: told after every round.

    Raises:
        NotFiniteError: a loss was NaN or infinite.
    """
    sites = dict(sorted(sites.items()))
    method.extend(model, len(sites), config.seed)
    model.to(device)
    state = _copy(model.state_dict())
    fixed = {name: state[name] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    own = method.own(model, sites)
    share = [len(data) / sum(map(len, sites.values())) for data in sites.values()]
    for round_number in range(1, config.num_rounds + 1):
        told = []
        for site, data in sites.items():
            model.load_state_dict(state | own[site])
            told.append(method.tell(model, data, device))
        gaussians = tuple(gaussian for gaussian in told if gaussian is not None)
        results = []
        for number, (site, data) in enumerate(sites.items()):
            model.load_state_dict(state | own[site])
            _train_locally(model, data, config, method, round_number, number, gaussians, device)
            results.append(_copy(model.state_dict()))
            own[site] = {name: results[-1][name] for name in own[site]}
        # What no one trains is no average: sites may each have their own.
        state = {
            name: torch.stack([part * result[name] for part, result in zip(share, results, strict=True)]).sum(dim=0)
            for name in state
        } | fixed
        progress(round_number, config.num_rounds)
    return Trained(state, own)


def _train_locally(
    model: Pretrainer,
    data: SiteData,
    config: RunConfig,
    method: Method,
    round_number: int,
    number: int,
    told: tuple[Gaussian, ...],
    device: torch.device,
) -> None:
    """A round's steps at one site: `core.training.pretrain` with the method's terms."""
    torch.manual_seed(seed(config.seed, "pretrain", data.site, round_number))
    rate = learning_rate(config.learning_rate, round_number, config.num_rounds, config.warmup_rounds)
    optimiser = torch.optim.AdamW(method.groups(model, rate), weight_decay=config.weight_decay)
    model.train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ramp = 2 / (1 + math.exp(-10 * (round_number - 1) / config.num_rounds)) - 1
    random = generator(config.seed, "method", data.site, round_number)
    local = LocalRound(model, start, number, ramp, told, random)
    seen: list[Tensor] = []
    watch = model.encoder.register_forward_hook(lambda _module, _inputs, h_RF: seen.append(h_RF))

    def losses() -> Iterator[dict[str, Tensor]]:
        for terms in pretraining_losses(model, data, config, round_number, device, {}, {}, Waited()):
            yield terms | method.terms(seen.pop(), local)

    try:
        take_steps(losses(), optimiser, config.local_steps, f"site {data.site}, round {round_number}")
    finally:
        watch.remove()


def _copy(state: Mapping[str, Tensor]) -> State:
    return {name: value.detach().clone() for name, value in state.items()}
