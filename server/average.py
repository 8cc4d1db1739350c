"""How the updates of a round become one: Flower's weighted mean, its trimmed mean or its median, and a cap on a site's share.

The robust ones weigh sites alike and take every weight by itself: of five sites and a fifth trimmed, the largest and the smallest
value are left out. Choosing one site's update instead (Krum) is not offered: where every site has a scanner of its own, the one
most like the others is no better and hides the rest.
"""

import math
from collections.abc import Mapping
from typing import cast

from flwr.app import RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg

from core.config import StrategyConfig
from server.sites import RunError


def aggregator(strategy: StrategyConfig) -> FedAvg:
    """Flower's strategy whose ``aggregate_train`` makes the average."""
    match strategy.aggregate:
        case "mean":
            return FedAvg()
        case "median":
            return FedMedian()
        case "trimmed_mean":
            return FedTrimmedAvg(beta=strategy.trim_share)


def check_enough(strategy: StrategyConfig, sites: int, what: str) -> None:
    """Refuse a way to average that so few sites do not allow.

    Args:
        strategy: the run's.
        sites: how many may be the fewest that answer.
        what: what they do, for the sentence.

    Raises:
        RunError: as `StrategyConfig.fewest_sites` tells.
    """
    fewest, why = strategy.fewest_sites
    if sites < fewest:
        raise RunError(
            f"{what}: {why} needs answers of at least {fewest} sites in every round, got {sites}. Take strategy=fedavg without a "
            "cap, or more sites."
        )


def capped_shares(counts: Mapping[str, int], cap: float) -> dict[str, float]:
    """Each site's share in the mean, by its number of scans and at most the cap; all shares sum to 1.

    Who would have more has the cap, and the others share the rest by their numbers; where that lifts another above the cap, it
    has the cap too.

    >>> capped_shares({"a": 60, "b": 20, "c": 20}, 0.5)
    {'a': 0.5, 'b': 0.25, 'c': 0.25}

    Raises:
        ValueError: a cap below one over the number of sites, at which shares cannot sum to 1.
    """
    if cap * len(counts) < 1 - 1e-9:
        raise ValueError(f"shares of {len(counts)} sites must be able to sum to 1, a cap of {cap:g} does not let them.")
    capped: set[str] = set()
    while True:
        free = {site: count for site, count in counts.items() if site not in capped}
        rest = max(0.0, 1 - cap * len(capped))
        whole = sum(free.values())
        shares = {site: cap if site in capped else rest * counts[site] / whole for site in counts}
        over = {site for site in free if shares[site] > cap and not math.isclose(shares[site], cap)}
        if not over:
            return shares
        capped |= over


def cap_weights(answers: Mapping[str, RecordDict], cap: float) -> dict[str, float]:
    """Weigh answers by shares in place of numbers of scans where a site has more than the cap; the shares."""
    counts = {site: cast(int, answer.metric_records["metrics"]["num-examples"]) for site, answer in answers.items()}
    if max(counts.values()) <= cap * sum(counts.values()):
        return {}
    shares = capped_shares(counts, cap)
    for site, share in shares.items():
        answers[site].metric_records["metrics"]["num-examples"] = share
    return shares
