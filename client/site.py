"""Which site this process serves, and what that site allows; decided by its node config alone, never by the server."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from core.config import RunConfig
from core.data.bids import list_sites, read_site
from core.data.manifest import check_problem_share, split_by_subject
from core.data.site import SiteData
from core.data.volumes import VolumeSettings, open_cache
from core.exchange import SiteError
from core.moments import MomentPolicy

log = logging.getLogger("isocenter")

POLICY_KEYS = {
    "min-group": "min_group",
    "diagonal-subjects": "diagonal_subjects",
    "covariance-subjects-per-feature": "covariance_subjects_per_feature",
    "round-counts-to": "round_counts_to",
}
NODE_KEYS = {"site", "data-root", "cache-root", "device", "threads", "share-per-scan", *POLICY_KEYS}
FLOWER_KEYS = {"partition-id", "num-partitions"}


@dataclass(frozen=True)
class Site:
    """One hospital, as its node config describes it; a virtual one in simulation.

    Attributes:
        name: name of the site.
        data_root: folder of its BIDS data set, or of a collection that has the site in it.
        cache_root: folder for preprocessed volumes.
        device: where it computes.
        threads: CPU threads for it, or None to leave the default.
        moments: what it lets out about groups of scans.
        share_per_scan: whether embeddings and scores of single scans may leave it (never with their ids).
    """

    name: str
    data_root: Path
    cache_root: Path
    device: torch.device
    threads: int | None
    moments: MomentPolicy
    share_per_scan: bool


def default_cache_root() -> Path:
    """``$ISOCENTER_CACHE``, else a folder in the user's cache."""
    return Path(os.environ.get("ISOCENTER_CACHE") or Path.home() / ".cache" / "isocenter")


def choose_device(name: str) -> torch.device:
    """The named device, or for ``auto`` the GPU where there is one; a GPU asked for and absent is an error, never the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SiteError("device", f"device must be one this site has, got {name!r} and no GPU is visible.")
    return device


def this_site(node_config: Mapping[str, object], config: RunConfig) -> Site:
    """The site of this node.

    A real site has ``site`` and ``data-root`` in its node config and the run's configuration changes nothing about it. A
    virtual site of a simulation has Flower's ``partition-id`` instead: it is the so-many-th of the sites in ``data.root``.

    Raises:
        SiteError: the node config is incomplete or has unknown keys.
    """
    unknown = set(node_config) - NODE_KEYS - FLOWER_KEYS
    if unknown:
        raise SiteError("node_config", f"node config must hold only {sorted(NODE_KEYS)}, got {sorted(unknown)}.")
    device = choose_device(str(node_config.get("device", "auto")))
    if "data-root" in node_config or "site" in node_config:
        if not {"data-root", "site"} <= set(node_config):
            raise SiteError("node_config", "node config must hold both site and data-root, one is missing.")
        policy = {field: int(str(node_config[key])) for key, field in POLICY_KEYS.items() if key in node_config}
        return Site(
            name=str(node_config["site"]),
            data_root=Path(str(node_config["data-root"])),
            cache_root=Path(str(node_config.get("cache-root", default_cache_root()))),
            device=device,
            threads=int(str(node_config["threads"])) if "threads" in node_config else None,
            moments=MomentPolicy(**policy),
            share_per_scan=node_config.get("share-per-scan", False) is True,
        )
    if not set(node_config) >= FLOWER_KEYS:
        raise SiteError("node_config", "node config must hold site and data-root, got neither; see the README.")
    if config.data.root is None:
        raise SiteError("node_config", "a simulation must know its data: add data.root=/folder to the overrides.")
    names = list_sites(config.data.root)
    partition = int(str(node_config["partition-id"]))
    if int(str(node_config["num-partitions"])) != len(names):
        raise SiteError(
            "node_config",
            f"a simulation must have one node a site, got {node_config['num-partitions']} nodes for {len(names)} sites; "
            f"set num-supernodes={len(names)} in --federation-config (`isocenter run` does).",
        )
    return Site(
        name=names[partition],
        data_root=config.data.root,
        cache_root=default_cache_root(),
        device=device,
        threads=None,
        moments=config.simulation.moment_policy(),
        share_per_scan=config.simulation.share_per_scan,
    )


@dataclass(frozen=True)
class Holdings:
    """What a site holds, read and split: SiteData by split, and the counts of what could not be used."""

    splits: dict[str, SiteData]
    problem_counts: dict[str, int]
    num_scans: int
    num_subjects: int
    num_scanners: int


@lru_cache(maxsize=16)
def _open(site_name: str, root: Path, cache_root: Path, suffix: str, settings: VolumeSettings, split_seed: int) -> Holdings:
    cache, manifest = open_cache(read_site(root, site_name, suffix=suffix), settings, cache_root)
    check_problem_share(manifest)
    position = {scan.path: index for index, scan in enumerate(manifest.scans)}
    splits = {
        split: SiteData(site_name, part.scans, tuple(position[scan.path] for scan in part.scans), cache)
        for split, part in split_by_subject(manifest, split_seed=split_seed).items()
    }
    return Holdings(
        splits,
        manifest.problem_counts(),
        len(manifest.scans),
        manifest.num_subjects,
        len({scan.scanner for scan in manifest.scans}),
    )


def holdings(site: Site, config: RunConfig) -> Holdings:
    """The site's scans, cached and split by subject; read once a process."""
    data = config.data
    return _open(site.name, site.data_root, site.cache_root, data.suffix, data.volume_settings(), data.split_seed)
