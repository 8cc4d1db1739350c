"""What a site's update must be before it counts: its metrics, its weight in the average, its size beside those of others.

What no such check stops: a site that sends small wrong updates, or the right ones turned round, within the usual size, round
after round. The latter is named (`opposed`), and the robust averages of `server.average` narrow both; wrong sums and moments are
stopped by neither.
"""

import logging
import math
import re
import statistics
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from flwr.app import MetricRecord, RecordDict
from torch import Tensor

from core.config import StrategyConfig
from core.data.manifest import SITE_NAME
from core.exchange import (
    MAX_SUBJECTS,
    MAX_TEXT_LENGTH,
    PRIVACY,
    ExchangeError,
    State,
    check_names,
    of_message,
    unpack_state,
)

log = logging.getLogger("isocenter")

WINDOW_ROUNDS = 3
"""Rounds whose norms the running median is over, beside the present one; few, for norms fall with the learning rate."""
MIN_NORMS = 3
"""Fewer norms, of one round or several, tell no usual one."""
OPPOSED_COSINE = -0.2
"""Updates whose cosine is smaller point against each other; those of honest sites are above 0 at first and about 0 in the end."""
MAX_NUMBERS = 100
NO_TERMS = {"num-examples", "seconds", "waited-seconds", "steps"}
"""Of a training answer's metrics; all others are terms of the loss."""
TERMS = {"pretrain": {"loss", "objective", "fairkl"}}
FINETUNING_TERMS = {"loss", "supervised"}


def check_metrics(metrics: MetricRecord, stage: str, where: str) -> None:
    """Refuse other metrics than the stage has, such as are no finite numbers, and a weight that is no number of scans."""
    allowed = NO_TERMS | TERMS.get(stage, FINETUNING_TERMS)
    if foreign := sorted(set(metrics) - allowed):
        raise ExchangeError(f"{where}: metrics must be among {sorted(allowed)}, got {_short(foreign)}.")
    if missing := sorted(NO_TERMS - set(metrics)):
        raise ExchangeError(f"{where}: metrics must hold {sorted(NO_TERMS)}, {', '.join(missing)} is missing.")
    weight = metrics["num-examples"]
    if type(weight) is not int or not 1 <= weight <= MAX_SUBJECTS:
        raise ExchangeError(f"{where}: num-examples must be a whole number from 1 to {MAX_SUBJECTS}, got {_short(weight)}.")
    for name, value in metrics.items():
        if type(value) not in (int, float) or not math.isfinite(cast(float, value)):
            raise ExchangeError(f"{where}: metrics must be finite numbers, got {_short(value)} for {name}.")
        if name in NO_TERMS and cast(float, value) < 0:
            raise ExchangeError(f"{where}: {name} must be at least 0, got {value!r}.")


def _short(value: object) -> str:
    """A value that somebody else chose, in few characters of one line."""
    text = ascii(value)
    return text if len(text) <= MAX_NUMBERS else f"{text[:MAX_NUMBERS]}..."


def read_update(answer: RecordDict, expected: Mapping[str, Tensor], stage: str, where: str) -> State:
    """The weights in an answer to a training task, which must hold nothing else than such an answer does.

    The layout is compared with what is expected first, so an array is read only if it is as long as the weights are.
    """
    for kind, records, names in (
        ("arrays", answer.array_records, {"arrays"}),
        ("metrics", answer.metric_records, {"metrics"}),
        ("settings", answer.config_records, {"config"}),
    ):
        if set(records) != names:
            raise ExchangeError(f"{where}: an answer must have one record of {kind}, got {len(records)} or of another name.")
    about = of_message(answer.config_records, "config", where)
    if odd := sorted(name for name in about if name != "layout" and not name.startswith(PRIVACY)):
        raise ExchangeError(f"{where}: an answer must tell the layout and a guarantee alone, got {_short(odd)}.")
    check_metrics(answer.metric_records["metrics"], stage, where)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in expected.values()}
    state = unpack_state(answer, where=where, expected=expected)
    check_names(answer.array_records["arrays"], dtypes, where)
    return state


def update_norm(state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """L2 norm of what a site changed, over all floating weights."""
    squares = [
        float((value.double() - before[name].double()).square().sum())
        for name, value in state.items()
        if value.is_floating_point()
    ]
    return math.sqrt(math.fsum(squares))


def opposed(updates: Mapping[str, Mapping[str, Tensor]], before: Mapping[str, Tensor]) -> dict[str, float]:
    """The sites whose update points against those of more than half of the others, with the median cosine; of three or more.

    Args:
        updates: the weights that each site trained, by site.
        before: those that they were sent.

    >>> before, right = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 1.0])}
    >>> opposed({"fen": right, "hill": right, "lake": {"w": -right["w"]}}, before)
    {'lake': -1.0}
    """
    if len(updates) < 3:
        return {}
    gram_SS = torch.zeros(len(updates), len(updates))
    for name in next(iter(updates.values())):
        if before[name].is_floating_point():
            changes_SP = torch.stack([(update[name] - before[name]).flatten().float() for update in updates.values()])
            gram_SS += changes_SP @ changes_SP.T
    norm_S = gram_SS.diagonal().clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    cosine_SS = gram_SS / norm_S[:, None] / norm_S
    usual = {
        site: statistics.median_high(cosine_SS[row, torch.arange(len(updates)) != row].tolist())
        for row, site in enumerate(updates)
    }
    return {site: round(cosine, 3) for site, cosine in usual.items() if cosine < OPPOSED_COSINE}


class UpdateGuard:
    """The usual norm of an update, and who is too far from it.

    The usual norm is the median of all that were accepted in the last rounds and all of the present one; of an even number, the
    lower of the two in the middle, so that half of the sites cannot raise it. Norms of 0 say nothing and are left out. It takes
    `MIN_NORMS`: of two sites, the first round is not judged. A round that trains other weights begins anew.

    Args:
        strategy: the run's.
    """

    def __init__(self, strategy: StrategyConfig) -> None:
        self.reject_norm = strategy.reject_norm
        self.clip_norm = strategy.clip_norm
        self._trained: list[str] = []
        self._norms: list[tuple[int, float]] = []

    def judge(
        self, round_number: int, norms: Mapping[str, float], trained: Collection[str]
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Whose update of a round does not count, and why; and by what factor others are to be scaled down; both by site.

        Args:
            round_number: counts from 1.
            norms: `update_norm` of each site's update, in site order.
            trained: names of the weights that the round trains.
        """
        if sorted(trained) != self._trained:
            self._trained, self._norms = sorted(trained), []
        self._norms = [(number, norm) for number, norm in self._norms if round_number - WINDOW_ROUNDS <= number < round_number]
        known = [norm for norm in [*norms.values(), *(norm for _, norm in self._norms)] if 0 < norm < math.inf]
        usual = statistics.median_low(known) if len(known) >= MIN_NORMS else math.inf
        refused: dict[str, str] = {}
        factors: dict[str, float] = {}
        for site, norm in norms.items():
            if not math.isfinite(norm):
                refused[site] = f"site {site}: the norm of an update must be finite, it is too large for a number."
                continue
            if self.reject_norm is not None and norm > self.reject_norm * usual:
                refused[site] = (
                    f"site {site}: the norm of an update must be at most {self.reject_norm:g} times the usual {usual:.3g}, got "
                    f"{norm:.3g}. Look at its losses; strategy.reject_norm is the limit."
                )
                continue
            most = math.inf if self.clip_norm is None else self.clip_norm * usual
            if norm > most:
                factors[site] = most / norm
            self._norms.append((round_number, min(norm, most)))
        return refused, factors

    def state(self) -> dict[str, Any]:
        """All that it remembers, ready for JSON: what `restore` takes, so that a resumed run goes on as it would have."""
        return {"trained": self._trained, "norms": [list(pair) for pair in self._norms]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` told.

        Raises:
            ValueError: it is something else.
        """
        try:
            trained = [str(name) for name in state["trained"]]
            norms = [(int(number), float(norm)) for number, norm in state["norms"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"guard: the state must be names and norms by round, got something else ({error!r}).") from None
        if not all(math.isfinite(norm) and norm >= 0 for _, norm in norms):
            raise ValueError("guard: norms must be finite and at least 0, got others.")
        self._trained, self._norms = trained, norms


def scaled(state: Mapping[str, Tensor], before: Mapping[str, Tensor], factor: float) -> State:
    """The weights before plus so much of the update; what is no floating weight as it is."""
    return {
        name: (before[name].double() + factor * (value.double() - before[name].double())).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }


COUNTS_TOLD = ("scans", "subjects", "scanners", "pretraining-subjects", "classes-in-train", "num-inputs")


def read_about(answer: RecordDict, where: str) -> dict[str, object]:
    """What a site tells about itself when it is asked to describe itself; its name becomes part of names of files."""
    told: dict[str, object] = dict(of_message(answer.config_records, "config", where))
    for name in COUNTS_TOLD:
        if type(told.get(name)) is not int or not 0 <= cast(int, told[name]) <= MAX_SUBJECTS:
            raise ExchangeError(f"{where}: {name} must be a whole number from 0 to {MAX_SUBJECTS}, got {_short(told.get(name))}.")
    problems = told.get("problems")
    counted = isinstance(problems, list) and all(re.fullmatch(r"[\w-]{1,64}=\d{1,9}", str(entry)) for entry in problems)
    if not counted or len(cast(list[str], problems)) > MAX_NUMBERS:
        raise ExchangeError(f"{where}: problems must be counts by kind, got something else.")
    if not isinstance(told.get("site"), str) or not re.fullmatch(SITE_NAME, str(told["site"])):
        raise ExchangeError(
            f"{where}: a site must be called by {SITE_NAME}, got {_short(told.get('site'))}. Mend its node config."
        )
    for name in ("inputs", "device"):
        text = told.get(name)
        if not isinstance(text, str) or len(text) > MAX_TEXT_LENGTH or not text.isprintable():
            raise ExchangeError(f"{where}: {name} must be a short line of text, got {_short(text)}.")
    if type(told.get("share-per-scan")) is not bool:
        raise ExchangeError(f"{where}: share-per-scan must be true or false, got {_short(told.get('share-per-scan'))}.")
    return told


def read_count(metrics: MetricRecord, name: str, where: str) -> int:
    """A number of scans or subjects that a site tells."""
    value = metrics.get(name)
    if type(value) is not int or not 0 <= value <= MAX_SUBJECTS:
        raise ExchangeError(f"{where}: {name} must be a whole number from 0 to {MAX_SUBJECTS}, got {_short(value)}.")
    return value
