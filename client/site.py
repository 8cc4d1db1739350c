"""Which site this process serves, and what that site allows; decided by its node config alone, never by the server."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from core.config import ConfigError, DataConfig, RunConfig
from core.data.holdings import Holdings, open_holdings
from core.data.manifest import MAX_UNUSABLE
from core.data.site import Source, default_cache_root
from core.faults import SiteError
from core.moments import MomentPolicy
from core.training import choose_device

log = logging.getLogger("isocenter")

POLICY_KEYS = {
    "min-group": "min_group",
    "diagonal-subjects": "diagonal_subjects",
    "covariance-subjects-per-feature": "covariance_subjects_per_feature",
    "round-counts-to": "round_counts_to",
}
# The key of the node config that tells each place the data may have.
PLACE_KEYS = {"root": "data-root", "table": "data-root", "participants": "participants", "mask": "mask"}
FLOWER_KEYS = {"partition-id", "num-partitions"}
NODE_KEYS = {
    "site",
    *PLACE_KEYS.values(),
    "cache-root",
    "device",
    "threads",
    "max-unusable",
    "reading",
    "share-per-scan",
    "state-root",
    "warm",
    "worker-patience-s",
    *POLICY_KEYS,
}


@dataclass(frozen=True)
class Site:
    """One hospital, as its node config describes it; a virtual one in simulation.

    Attributes:
        name: name of the site.
        source: where its scans are: a BIDS data set or a table, or a collection that has the site in it.
        device: where it computes.
        threads: CPU threads for it, or None to leave the default.
        max_unusable: share of the listed scans that may be unusable before it refuses to train.
        moments: what it lets out about groups of scans.
        share_per_scan: whether embeddings and scores of single scans may leave it (never with their ids).
    """

    name: str
    source: Source
    device: torch.device
    threads: int | None
    max_unusable: float
    moments: MomentPolicy
    share_per_scan: bool


def this_site(node_config: Mapping[str, object], config: RunConfig) -> Site:
    """The site of this node.

    A real site has ``site`` and ``data-root`` in its node config, a folder or a table (with ``participants`` where these are a
    file of their own), and the run's configuration changes nothing about it. A virtual site of a simulation has Flower's
    ``partition-id`` instead: it is the so-many-th of the sites in the data that the configuration names.

    Raises:
        SiteError: the node config is incomplete or has unknown keys.
    """
    unknown = set(node_config) - NODE_KEYS - FLOWER_KEYS
    if unknown:
        raise SiteError("node_config", f"node config must hold only {sorted(NODE_KEYS)}, got {sorted(unknown)}.")
    try:
        device = choose_device(str(node_config.get("device", "auto")))
    except (ValueError, RuntimeError) as error:
        raise SiteError("device", str(error)) from None
    if "data-root" in node_config or "site" in node_config:
        if not {"data-root", "site"} <= set(node_config):
            raise SiteError("node_config", "node config must hold both site and data-root, one is missing.")
        for key in set(PLACE_KEYS.values()) & set(node_config) - {PLACE_KEYS[place] for place in config.data.PLACES}:
            raise SiteError("node_config", f"node config must not hold {key} when the run reads {config.data.kind}.")
        told = {place: node_config.get(PLACE_KEYS[place]) for place in config.data.PLACES}
        places = {place: None if value is None else Path(str(value)) for place, value in told.items()}
        cache_root = Path(str(node_config.get("cache-root", default_cache_root())))
        policy = {field: int(str(node_config[key])) for key, field in POLICY_KEYS.items() if key in node_config}
        return Site(
            name=str(node_config["site"]),
            source=read_as(config.data, node_config).source_at(str(node_config["site"]), cache_root, places),
            device=device,
            threads=int(str(node_config["threads"])) if "threads" in node_config else None,
            max_unusable=float(str(node_config.get("max-unusable", MAX_UNUSABLE))),
            moments=MomentPolicy(**policy),
            share_per_scan=node_config.get("share-per-scan", False) is True,
        )
    if not set(node_config) >= FLOWER_KEYS:
        raise SiteError("node_config", "node config must hold site and data-root, got neither; see the README.")
    if config.data.root is None:
        place = config.data.PLACES[0]
        raise SiteError("node_config", f"a simulation must know its data: add data.{place}=... to the overrides.")
    source = config.data.source(default_cache_root(), config.data.places)
    names = source.sites()
    partition = int(str(node_config["partition-id"]))
    if int(str(node_config["num-partitions"])) != len(names):
        raise SiteError(
            "node_config",
            f"a simulation must have one node a site, got {node_config['num-partitions']} nodes for {len(names)} sites; "
            f"set num-supernodes={len(names)} in --federation-config (`isocenter run` does).",
        )
    return Site(
        name=names[partition],
        source=config.data.source_at(names[partition], default_cache_root(), config.data.places),
        device=device,
        threads=None,
        max_unusable=config.data.max_unusable,
        moments=config.simulation.moment_policy(),
        share_per_scan=config.simulation.share_per_scan,
    )


def read_as(data: DataConfig, node_config: Mapping[str, object]) -> DataConfig:
    """How this site's files are read: as the run says, but for what the site tells in ``reading``."""
    try:
        return data.read_as(str(node_config.get("reading", "")))
    except ConfigError as error:
        log.error("%s", error)
        raise SiteError(
            "node_config", f"reading must hold only {', '.join(data.READING)}, each as data has it; see its log."
        ) from None


def holdings(site: Site, config: RunConfig) -> Holdings:
    """The site's scans, cached and split by subject; read once a process."""
    return open_holdings(site.name, site.source, site.max_unusable, config.data.split_seed, config.data.fractions)
