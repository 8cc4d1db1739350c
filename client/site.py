"""Which site this process serves, and what that site allows: its own policy, or the run where that is stricter."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from client.policy import FLAT_KEYS, PolicyError, SitePolicy, asked, read_policy, stricter
from core.config import ConfigError, DataConfig, RunConfig
from core.data.holdings import Holdings, open_holdings
from core.data.site import Source, default_cache_root
from core.faults import SiteError
from core.settings import MomentPolicy
from core.training import choose_device

log = logging.getLogger("isocenter")

FLOWER_KEYS = {"partition-id", "num-partitions"}
SERVICE_KEYS = {"state-root", "site-file", "warm", "worker-patience-s"}
"""Of the node config: how the site's processes work, nothing about what it allows."""
NODE_KEYS = {*FLAT_KEYS, *SERVICE_KEYS}


@dataclass(frozen=True)
class Site:
    """One hospital, as its node config describes it; a virtual one in simulation.

    Attributes:
        name: name of the site.
        source: where its scans are: a BIDS data set or a table, or a collection that has the site in it.
        device: where it computes.
        threads: CPU threads for it, or None to leave the default.
        gpu_share: most of the GPU's memory that it takes, or None for all.
        max_unusable: share of the listed scans that may be unusable before it refuses to train.
        moments: what it lets out about groups of scans.
        share_per_scan: whether embeddings and scores of single scans may leave it (never with their ids).
        policy: its own, or None for a virtual site, which does as the run says.
    """

    name: str
    source: Source
    device: torch.device
    threads: int | None
    gpu_share: float | None
    max_unusable: float
    moments: MomentPolicy
    share_per_scan: bool
    policy: SitePolicy | None


def this_site(node_config: Mapping[str, object], config: RunConfig) -> Site:
    """The site of this node.

    A real site has ``site-file`` in its node config, its policy, or ``site``, ``data-root`` and what else `FLAT_KEYS` names. The
    run's configuration changes nothing about it but what it makes stricter. A virtual site of a simulation has Flower's
    ``partition-id`` instead: it is the so-many-th of the sites in the data that the configuration names.

    Raises:
        SiteError: the node config or the policy is incomplete or has unknown keys.
    """
    policy = site_policy(node_config)
    try:
        device = choose_device("auto" if policy is None else policy.device)
    except (ValueError, RuntimeError) as error:
        raise SiteError("device", str(error)) from None
    if policy is not None:
        data = policy.data
        for place in ("participants", "mask"):
            if getattr(data, place) is not None and place not in config.data.PLACES:
                raise SiteError("node_config", f"node config must not hold {place} when the run reads {config.data.kind}.")
        told = {"root": data.root, "table": data.root, "participants": data.participants, "mask": data.mask}
        cache_root = policy.cache_root or default_cache_root()
        places = {place: told[place] for place in config.data.PLACES}
        allowance = stricter(policy, config)
        return Site(
            name=policy.site,
            source=read_as(config.data, data.reading).source_at(policy.site, cache_root, places),
            device=device,
            threads=policy.threads,
            gpu_share=policy.gpu_share,
            policy=policy,
            **vars(allowance),
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
        gpu_share=None,
        policy=None,
        **vars(asked(config)),
    )


def site_policy(node_config: Mapping[str, object]) -> SitePolicy | None:
    """The policy of a real site, None for a virtual one.

    Raises:
        SiteError: the node config or the policy is incomplete or wrong; the site's log has the values.
    """
    unknown = set(node_config) - NODE_KEYS - FLOWER_KEYS
    if unknown:
        raise SiteError("node_config", f"node config must hold only {sorted(NODE_KEYS)}, got {sorted(unknown)}.")
    own = {key: value for key, value in node_config.items() if key in NODE_KEYS}
    try:
        if "site-file" in own:
            if decided := sorted(set(own) & {*FLAT_KEYS, "state-root"}):
                raise SiteError("node_config", f"node config must hold nothing that site-file decides, got {decided}.")
            return read_policy(Path(str(own["site-file"])))
        if not {"site", "data-root"} & set(own):
            return None
        if not {"site", "data-root"} <= set(own):
            raise SiteError("node_config", "node config must hold both site and data-root, one is missing.")
        return SitePolicy.from_node_config({key: value for key, value in own.items() if key in FLAT_KEYS})
    except PolicyError as error:
        log.error("%s", error)
        raise SiteError("node_config", "this site's policy must be complete and correct; see its log.") from None


def limit_resources(site: Site) -> None:
    """Take no more threads and GPU memory than the site gives."""
    if site.threads is not None:
        torch.set_num_threads(site.threads)
    if site.gpu_share is not None and site.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(site.gpu_share, site.device)


def read_as(data: DataConfig, reading: str) -> DataConfig:
    """How this site's files are read: as the run says, but for what the site tells in ``reading``."""
    try:
        return data.read_as(reading)
    except ConfigError as error:
        log.error("%s", error)
        raise SiteError(
            "node_config", f"reading must hold only {', '.join(data.READING)}, each as data has it; see its log."
        ) from None


def holdings(site: Site, config: RunConfig) -> Holdings:
    """The site's scans, cached and split by subject; read once a process."""
    return open_holdings(site.name, site.source, site.max_unusable, config.data.split_seed, config.data.fractions)
