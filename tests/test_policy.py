"""A site's own policy: read, told, and stricter than any run."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from flwr.app import Message
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import client.site
from client.app import app as client_app
from client.audit import AuditLog
from client.cli import register
from client.policy import (
    FLAT_KEYS,
    MESSAGES,
    MOMENT_WORDS,
    STAGE_WORDS,
    Allowance,
    MomentKind,
    PolicyError,
    SitePolicy,
    Stage,
    asked,
    describe_policy,
    read_policy,
    stricter,
)
from client.site import Site, limit_resources, this_site
from core.cli import app
from core.config import RunConfig, compose_plain, load_config, quoted
from core.faults import SiteError
from core.settings import DpSgd
from server.sites import RunError

Federate = Callable[..., Path]
NodeConfigs = dict[int, dict[str, str | int | bool | float]]
register(app)
RUNNER = CliRunner()
ZONE = timezone(timedelta(hours=2))
NOON = datetime(2030, 6, 1, 12, 0, tzinfo=ZONE)
PLAIN = {"site": "north", "data": {"root": "/data/north"}}
FULL: dict[str, Any] = {
    "site": "north",
    "data": {"root": "/data/north", "participants": "/data/people.tsv", "mask": "/data/mask.nii", "reading": "suffix=T1w"},
    "cache_root": "/cache",
    "device": "cpu",
    "threads": 2,
    "max_unusable": 0.2,
    "share_per_scan": True,
    "groups": {"min_group": 7, "diagonal_subjects": 50, "covariance_subjects_per_feature": 3, "round_counts_to": 10},
}


def policy_of(**changes: Any) -> SitePolicy:
    return SitePolicy.model_validate(PLAIN | changes)


def written(folder: Path, tree: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def flat(tree: dict[str, Any]) -> dict[str, object]:
    """The same policy in the keys of a node config."""
    told: dict[str, object] = {}
    for key, path in FLAT_KEYS.items():
        group, _, name = path.rpartition(".")
        values = tree.get(group, {}) if group else tree
        if name in values:
            told[key] = values[name]
    return told


def test_a_file_and_the_flat_keys_are_one_schema(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, FULL))
    assert policy == SitePolicy.from_node_config(flat(FULL))
    assert set(flat(FULL)) == set(FLAT_KEYS)
    assert policy.moment_policy().round_counts_to == 10
    assert policy == SitePolicy.from_node_config({**flat(FULL), "min-group": "7", "threads": "2", "max-unusable": "0.2"})
    plain = read_policy(written(tmp_path, PLAIN))
    assert plain == SitePolicy.from_node_config({"site": "north", "data-root": "/data/north"})
    assert not plain.share_per_scan
    assert (plain.groups.min_group, plain.max_unusable, plain.hours, plain.privacy.max_epsilon) == (10, 0.05, None, None)
    assert set(plain.allow.stages) == set(get_args(Stage)) == set(STAGE_WORDS)
    assert set(plain.allow.moments) == set(get_args(MomentKind)) == set(MOMENT_WORDS)


FAULTS: dict[str, tuple[object, str]] = {
    "no site": ({"data": {"root": "/d"}}, "site.yaml: site: must be given, got nothing"),
    "no root": ({"site": "n", "data": {}}, "site.yaml: data.root: must be given"),
    "relative": (PLAIN | {"data": {"root": "d"}}, r"data.root: must be an absolute path, got 'd'"),
    "unknown": (PLAIN | {"min_group": 3}, "site.yaml: min_group: is no known key"),
    "unknown below": (PLAIN | {"groups": {"mingroup": 3}}, "groups.mingroup: is no known key"),
    "a word for a number": (PLAIN | {"groups": {"min_group": "ten"}}, "groups.min_group: Input should be a valid integer"),
    "a truth for a number": (PLAIN | {"groups": {"min_group": True}}, "groups.min_group: Input should be a valid integer"),
    "a truth for a share": (PLAIN | {"max_unusable": True}, "max_unusable: Input should be a valid number"),
    "too small": (PLAIN | {"groups": {"min_group": 0}}, "groups.min_group: Input should be greater than or equal to 1, got 0"),
    "a word for a truth": (PLAIN | {"share_per_scan": "true"}, "share_per_scan: Input should be a valid boolean"),
    "unquoted no": ("site: no\ndata: {root: /d}", "site: Input should be a valid string, got False"),
    "stage": (PLAIN | {"allow": {"stages": ["train"]}}, "allow.stages: Input should be 'describe', 'pretrain'"),
    "moments": (PLAIN | {"allow": {"moments": ["all"]}}, "allow.moments: Input should be 'sums', 'moments'"),
    "hours": (PLAIN | {"hours": "8pm-6am"}, r"hours: must be a period of the day such as '20:00-06:00', or null"),
    "no hours": (PLAIN | {"hours": "06:00-06:00"}, "hours: must be a period"),
    "gpu": (PLAIN | {"gpu_share": 1.5}, "gpu_share: Input should be less than or equal to 1"),
    "epsilon alone": (PLAIN | {"privacy": {"max_epsilon": 8.0}}, "privacy: max_epsilon must be null unless require is dp_sgd"),
    "infinite": ("site: n\ndata: {root: /d}\nmax_megabytes: .inf", "max_megabytes: Input should be a finite number"),
    "twice": ("site: n\ndata: {root: /d}\nshare_per_scan: false\nshare_per_scan: true", "key 'share_per_scan' must stand once"),
    "code": ("site: !!python/object/apply:os.getcwd []", "it must be YAML"),
    "broken": ("site: [", "it must be YAML"),
    "a list": ("- site", "it must hold keys, such as site, got list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(tmp_path: Path, fault: str) -> None:
    tree, message = FAULTS[fault]
    with pytest.raises(PolicyError, match=message.replace("[", r"\[")) as raised:
        read_policy(written(tmp_path, tree))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="it must be a file that can be read, got No such file"):
        read_policy(tmp_path / "site.yaml")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"site": "a", "data-root": "/d", "min-group": "ten"}, "policy must be complete and correct; see its log"),
        ({"site": "a", "data-root": "secret/d"}, "policy must be complete and correct; see its log"),
        ({"site": "a", "data-root": "/d", "min-groups": 3}, r"must hold only .*, got \['min-groups'\]"),
        ({"site": "a"}, "must hold both site and data-root"),
        ({"site-file": "/secret/site.yaml"}, "policy must be complete and correct; see its log"),
        ({"site-file": "/secret/site.yaml", "min-group": 1}, r"nothing that site-file decides, got \['min-group'\]"),
        ({"site-file": "/secret/site.yaml", "state-root": "/s"}, r"nothing that site-file decides, got \['state-root'\]"),
        ({}, "must hold site and data-root, got neither"),
    ],
)
def test_what_is_wrong_with_a_node_config_leaves_without_its_values(node: dict[str, object], message: str) -> None:
    with pytest.raises(SiteError, match=message) as raised:
        this_site(node, load_config("experiment=tiny data=folder data.root=/run"))
    assert "secret" not in str(raised.value)


def test_every_kind_of_message_is_mapped_to_a_stage() -> None:
    """A new handler must be given a stage, and, where it tells sums over subjects, a kind of them."""
    assert set(client_app._registered_funcs) == set(MESSAGES)
    assert {about.stage for about in MESSAGES.values()} == set(get_args(Stage))
    assert {about.tells for about in MESSAGES.values()} == {*get_args(MomentKind), None}


@pytest.mark.parametrize(
    ("hours", "at", "opens"),
    [
        (None, "12:00", None),
        ("20:00-06:00", "20:00", None),
        ("20:00-06:00", "05:59", None),
        ("20:00-06:00", "06:00", "2030-06-01T20:00+02:00"),
        ("20:00-06:00", "19:59", "2030-06-01T20:00+02:00"),
        ("08:00-17:30", "17:29", None),
        ("08:00-17:30", "17:30", "2030-06-02T08:00+02:00"),
        ("08:00-17:30", "00:00", "2030-06-01T08:00+02:00"),
    ],
)
def test_hours(hours: str | None, at: str, opens: str | None) -> None:
    now = NOON.replace(hour=int(at[:2]), minute=int(at[3:]))
    refusal = policy_of(hours=hours).refusal("query.describe", load_config("experiment=tiny"), now)
    assert (refusal is None) == (opens is None)
    if refusal is not None:
        assert refusal.kind == "closed"
        assert refusal.sentence == f"this site takes tasks from {str(hours)[:5]} to {str(hours)[6:]} only; it opens at {opens}."


DP = "privacy=dp_sgd start=/x num_rounds=0 debias=none finetune.class_weights=none"


@pytest.mark.parametrize(
    ("privacy", "run", "taken"),
    [
        ({}, "", True),
        ({"require": "clip_and_noise"}, "", False),
        ({"require": "clip_and_noise"}, "privacy=clip_and_noise", False),
        ({"require": "clip_and_noise"}, "privacy=clip_and_noise privacy.noise_multiplier=0.1", True),
        (
            {"require": "clip_and_noise", "min_noise_multiplier": 0.5},
            "privacy=clip_and_noise privacy.noise_multiplier=0.1",
            False,
        ),
        ({"require": "clip_and_noise", "min_noise_multiplier": 0.5}, DP, True),
        ({"require": "clip_and_noise"}, f"{DP} privacy.target_epsilon=inf", False),
        ({"require": "dp_sgd"}, "privacy=clip_and_noise privacy.noise_multiplier=0.1", False),
        ({"require": "dp_sgd"}, DP, True),
        ({"require": "dp_sgd", "max_epsilon": 8.0}, DP, True),
        ({"require": "dp_sgd", "max_epsilon": 7.9}, DP, False),
        ({"require": "dp_sgd"}, f"{DP} privacy.target_epsilon=inf", False),
        ({"require": "dp_sgd", "max_delta": 1e-5}, DP, True),
        ({"require": "dp_sgd", "max_delta": 1e-5}, f"{DP} privacy.delta=1e-4", False),
    ],
)
def test_what_fine_tuning_must_guarantee(privacy: dict[str, Any], run: str, taken: bool) -> None:
    policy, config = policy_of(privacy=privacy), load_config(f"experiment=tiny {run}")
    assert (policy.refusal("train.finetune", config, NOON) is None) == taken
    # What no mechanism of fine-tuning is about is not refused for the want of one.
    assert policy.refusal("train.pretrain", config, NOON) is None


def test_an_unknown_message_is_refused() -> None:
    assert policy_of().refusal("query.everything", load_config("experiment=tiny"), NOON) is not None


def test_the_stricter_of_both_holds() -> None:
    config = load_config("experiment=tiny policy.min_group=20 policy.round_counts_to=6 data.max_unusable=0.01")
    found = stricter(SitePolicy.model_validate(FULL), config)
    assert (found.moments.min_group, found.moments.diagonal_subjects) == (20, 60)
    assert (found.moments.covariance_subjects_per_feature, found.moments.round_counts_to) == (12, 30)
    assert (found.share_per_scan, found.max_unusable) == (True, 0.01)
    assert not stricter(policy_of(), config).share_per_scan


def test_threads_are_those_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    site = this_site(flat(FULL), load_config("experiment=tiny data=folder data.root=/run"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: told.append(number))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *told_gpu: told.append(told_gpu))
    told: list[object] = []
    limit_resources(site)
    assert told == [2]
    gpu = torch.device("cuda:1")
    limit_resources(replace(site, threads=None, gpu_share=0.25, device=gpu))
    assert told == [2, (0.25, gpu)]


# No run can weaken a policy: runs and policies of any kind.

BASES = [
    compose_plain(f"experiment=tiny data=folder data.root=/run {more}".split()) for more in ("", "privacy=clip_and_noise", DP)
]


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """A run that asks for anything it can ask for."""
    plain = json.loads(json.dumps(draw(st.sampled_from(BASES)), default=str))
    plain["policy"] = {
        "min_group": draw(st.integers(1, 100)),
        "diagonal_subjects": draw(st.integers(1, 100)),
        "covariance_subjects_per_feature": draw(st.integers(0, 30)),
        "round_counts_to": draw(st.integers(1, 30)),
        "share_per_scan": draw(st.booleans()),
    }
    data = {"root": "/run", "mask": draw(st.sampled_from([None, "/run/mask.nii"])), "max_unusable": draw(st.floats(0, 1))}
    plain["data"] |= {**data, "target_sites": draw(st.sampled_from([None, ["north"]])), "split_seed": draw(st.integers(0, 9))}
    plain["data"]["participants"] = draw(st.sampled_from([None, "/run/people.tsv"]))
    plain["evaluation"]["name"] = draw(st.sampled_from(["auto", "per_scan", "sums", "none"]))
    plain["finetune"]["stages"] = draw(st.lists(st.sampled_from(["linear_probe", "last_block", "full_finetuning"]), unique=True))
    name = plain["privacy"]["name"]
    if name == "clip_and_noise":
        plain["privacy"]["noise_multiplier"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if name == "dp_sgd":
        plain["privacy"]["delta"] = draw(st.sampled_from([1e-6, 1e-3]))
        plain["privacy"]["target_epsilon"] = draw(st.sampled_from([0.1, 3.0, 50.0, float("inf")]))
    return RunConfig.model_validate(plain)


def subsets(kinds: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(kinds), unique=True)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """A site.yaml of any kind."""
    require = draw(st.sampled_from(["none", "clip_and_noise", "dp_sgd"]))
    return {
        "site": "north",
        "data": {"root": "/own", "mask": draw(st.sampled_from([None, "/own/mask.nii"]))},
        "cache_root": "/cache",
        "device": "cpu",
        "threads": draw(st.sampled_from([None, 1, 2])),
        "gpu_share": draw(st.sampled_from([None, 0.5])),
        "max_unusable": draw(st.floats(0, 1)),
        "share_per_scan": draw(st.booleans()),
        "groups": {
            "min_group": draw(st.integers(1, 100)),
            "diagonal_subjects": draw(st.integers(1, 100)),
            "covariance_subjects_per_feature": draw(st.integers(0, 30)),
            "round_counts_to": draw(st.integers(1, 30)),
        },
        "allow": {"stages": draw(subsets(get_args(Stage))), "moments": draw(subsets(get_args(MomentKind)))},
        "privacy": {
            "require": require,
            "max_epsilon": draw(st.sampled_from([None, 1.0, 8.0])) if require == "dp_sgd" else None,
            "max_delta": draw(st.sampled_from([None, 1e-5])),
        },
        "hours": draw(st.sampled_from([None, "20:00-06:00", "08:00-17:00"])),
    }


@pytest.fixture(scope="module")
def site_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "site.yaml"


# The first example that is found, not the smallest.
FIRST = settings(max_examples=200, deadline=None, database=None, derandomize=True, phases=[Phase.generate])


def weakened(tree: dict[str, Any], config: RunConfig, site_file: Path) -> set[str]:
    """The keys of a policy that a site with it does not keep in a run, by what the keys mean."""
    site = this_site({"site-file": str(written(site_file.parent, tree))}, config)
    policy = site.policy
    assert policy is not None
    found = {key for key in ("min_group", "diagonal_subjects", "covariance_subjects_per_feature")
             if getattr(site.moments, key) < max(tree["groups"][key], getattr(config.policy, key))}  # fmt: skip
    rounding = site.moments.round_counts_to
    checks = {
        "round_counts_to": rounding % tree["groups"]["round_counts_to"] or rounding % config.policy.round_counts_to,
        "share_per_scan": site.share_per_scan and not (tree["share_per_scan"] and config.policy.share_per_scan),
        "max_unusable": site.max_unusable > min(tree["max_unusable"], config.data.max_unusable),
        "data": "/run" in f"{site.source}",
        "cache_root": "PosixPath('/cache')" not in f"{site.source}",
        "site": site.name != "north",
        "device": site.device != torch.device("cpu"),
        "threads": site.threads != tree["threads"],
        "gpu_share": site.gpu_share != tree["gpu_share"],
    }
    found |= {key for key, broken in checks.items() if broken}
    open_now = tree["hours"] in (None, "08:00-17:00")
    for message, about in MESSAGES.items():
        if policy.refusal(message, config, NOON) is not None:
            continue
        found |= set() if open_now else {"hours"}
        found |= set() if about.stage in tree["allow"]["stages"] else {"stages"}
        found |= set() if about.tells in (*tree["allow"]["moments"], None) else {"moments"}
        if message == "train.finetune":
            private = config.privacy.target_epsilon if isinstance(config.privacy, DpSgd) else float("inf")
            if tree["privacy"]["require"] == "dp_sgd" and isinstance(config.privacy, DpSgd):
                found |= {"max_delta"} if config.privacy.delta > (tree["privacy"]["max_delta"] or 1) else set()
            noise = getattr(config.privacy, "noise_multiplier", 0.0)
            required = {"none": True, "clip_and_noise": private < 100 or noise > 0, "dp_sgd": private < 100}
            found |= set() if required[tree["privacy"]["require"]] else {"require"}
            found |= {"max_epsilon"} if private > (tree["privacy"]["max_epsilon"] or float("inf")) else set()
    return found


@given(tree=policies(), config=runs())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_run_weakens_a_policy_in_any_field(tree: dict[str, Any], config: RunConfig, site_file: Path) -> None:
    assert weakened(tree, config, site_file) == set()


def broken_moments(key: str) -> Callable[[SitePolicy, RunConfig], Allowance]:
    def broken(policy: SitePolicy, config: RunConfig) -> Allowance:
        right = stricter(policy, config)
        return replace(right, moments=replace(right.moments, **{key: getattr(config.policy, key)}))

    return broken


def largest_rounding(policy: SitePolicy, config: RunConfig) -> Allowance:
    right = stricter(policy, config)
    most = max(policy.groups.round_counts_to, config.policy.round_counts_to)
    return replace(right, moments=replace(right.moments, round_counts_to=most))


BROKEN: dict[str, Callable[[SitePolicy, RunConfig], Allowance]] = {
    **{key: broken_moments(key) for key in PLAIN | FULL["groups"] if key in FULL["groups"]},
    "share_per_scan": lambda policy, config: replace(stricter(policy, config), share_per_scan=config.policy.share_per_scan),
    "max_unusable": lambda policy, config: replace(stricter(policy, config), max_unusable=config.data.max_unusable),
}


@pytest.mark.parametrize("key", BROKEN)
def test_the_property_finds_a_field_that_a_run_weakens(key: str, site_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: as above, with the run's word taken in one field."""
    monkeypatch.setattr(client.site, "stricter", BROKEN[key])
    example = find(st.tuples(policies(), runs()), lambda drawn: weakened(*drawn, site_file) == {key}, settings=FIRST)
    assert example


@pytest.mark.parametrize("key", ["stages", "moments", "require", "max_epsilon", "max_delta", "hours"])
def test_the_property_finds_a_task_that_should_be_refused(key: str, site_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SitePolicy, "refusal", lambda *_: None)
    assert find(st.tuples(policies(), runs()), lambda drawn: key in weakened(*drawn, site_file), settings=FIRST)


# Through the real apps.


def kits(folder: Path, root: Path, **changes: Any) -> NodeConfigs:
    """A kit for each of three hospitals, whose policies let small groups out."""
    nodes: NodeConfigs = {}
    for number, name in enumerate("abc", 1):
        tree = {"site": name, "data": {"root": str(root / name)}, "device": "cpu", "groups": {"min_group": 2}, **changes}
        nodes[number] = {"site-file": str(written(folder / name, tree))}
    return nodes


def audit_of(folder: Path, name: str) -> AuditLog:
    return AuditLog(folder / name / "state" / "audit.jsonl")


@pytest.mark.usefixtures("unprobed")
def test_the_audit_log_of_a_run_lists_every_array_that_left(consortium: Path, federate: Federate, tmp_path: Path) -> None:
    nodes = kits(tmp_path / "kits", consortium, share_per_scan=True, allow={"stages": list(get_args(Stage))})
    left: dict[int, list[tuple[str, list[tuple[str, list[int], str, int]]]]] = {}

    def listen(reply: Message, message_type: str) -> Message:
        arrays = [
            (f"{record}/{name}", list(array.shape), array.dtype, len(array.data))
            for record, group in reply.content.array_records.items()
            for name, array in group.items()
        ]
        left.setdefault(reply.metadata.src_node_id, []).append((message_type, arrays))
        return reply

    options = "finetune=both finetune.stages=[linear_probe] data.target_sites=[c] policy.share_per_scan=true num_rounds=1"
    federate(consortium, options, node_configs=nodes, tamper=listen)
    run_hashes = set()
    for number, name in enumerate("abc", 1):
        entries = audit_of(tmp_path / "kits", name).read()
        told = [
            (entry["message"], [(a["name"], a["shape"], a["dtype"], a["bytes"]) for a in entry["arrays"]]) for entry in entries
        ]
        assert told == left[number]
        assert [entry["error"] for entry in entries] == [None] * len(entries)
        assert all(entry["bytes"] >= sum(a["bytes"] for a in entry["arrays"]) for entry in entries)
        # A message that tells no statistics sends weights or what single scans gave, and nothing else.
        of = {record.partition("/")[0]: message for message, arrays in told for record, *_ in arrays}
        assert {r for r, message in of.items() if MESSAGES[message].tells is None} <= {"arrays", "embeddings", "predictions"}
        run_hashes |= {(entry["run"], entry["config"], entry["app"]) for entry in entries}
        assert "config/site" in entries[0]["statistics"]
        assert str(consortium) not in audit_of(tmp_path / "kits", name).path.read_text()
    assert len(run_hashes) == 1
    messages = {entry["message"]: entry for entry in audit_of(tmp_path / "kits", "c").read()}
    assert {"query.describe", "train.pretrain", "query.sums", "train.finetune", "query.predict", "query.embed"} <= set(messages)
    assert messages["train.pretrain"]["round"] == 1


@pytest.mark.parametrize(
    ("changes", "kind", "sentence", "message"),
    [
        ({"allow": {"stages": ["describe", "debias"]}}, "policy", "this site takes no part in pretrain", "train.pretrain"),
        ({"allow": {"moments": ["scanners"]}}, "policy", "this site tells no sums", "query.sums"),
        ({"max_megabytes": 0.002}, "policy", "this site sends at most 0.002 MB in an answer", "train.pretrain"),
        ({"max_megabytes_a_day": 0.002}, "policy", "this site sends at most 0.002 MB in 24 hours", "query.moments"),
        ({"hours": "20:00-06:00"}, "closed", "it opens at 2030-06-01T20:00+02:00", "query.describe"),
        ({"privacy": {"require": "clip_and_noise"}}, "policy", "fine-tunes with privacy=clip_and_noise", "train.finetune"),
    ],
    ids=["stage", "moments", "answer", "day", "hours", "require"],
)
def test_a_site_refuses_what_its_policy_does_not_let_in_or_out(
    consortium: Path,
    federate: Federate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    kind: str,
    sentence: str,
    message: str,
) -> None:
    monkeypatch.setattr("client.door.now", lambda: NOON)
    monkeypatch.setattr("client.policy.bytes_since", lambda entries, _: sum(entry["bytes"] for entry in entries))
    nodes = kits(tmp_path / "kits", consortium, **changes)
    options = "num_rounds=1 evaluation=none debias.erase=none finetune=both finetune.stages=[linear_probe] data.target_sites=[c]"
    try:
        federate(consortium, options, node_configs=nodes)
        stopped = capsys.readouterr().out
    except RunError as error:
        stopped = str(error)
    assert sentence in stopped
    refused = [entry for entry in audit_of(tmp_path / "kits", "c").read() if entry["error"]]
    assert refused
    assert refused[0]["message"] == message
    assert f"[isocenter:{kind}] " in refused[0]["error"]
    assert sentence in refused[0]["error"]
    assert all(entry["arrays"] == [] and entry["bytes"] == 0 for entry in refused)


def test_epsilon_is_counted_over_runs(consortium: Path, federate: Federate, tmp_path: Path) -> None:
    first = federate(consortium, "num_rounds=1 warmup_rounds=0 debias=none evaluation=none", name="first")
    privacy = {"require": "dp_sgd", "max_epsilon": 10.0}
    nodes = kits(tmp_path / "kits", consortium, privacy=privacy)
    options = (
        f"finetune=both start={quoted(str(first))} num_rounds=0 debias=none data.target_sites=[c] evaluation=none privacy=dp_sgd "
        "privacy.delta=0.01 finetune.class_weights=none finetune.stages=[linear_probe] finetune.num_rounds=2 "
    )
    federate(consortium, f"{options} privacy.target_epsilon=6", name="one", node_configs=nodes)
    log = audit_of(tmp_path / "kits", "c")
    assert [entry["epsilon"] for entry in log.read() if entry["message"] == "train.finetune"] == [6.0, 0.0]
    with pytest.raises(RunError, match="this site spends an epsilon of at most 10 over all runs, what is left is too little"):
        federate(consortium, f"{options} privacy.target_epsilon=6", name="two", node_configs=nodes)
    assert "epsilon" in log.read()[-1]["error"]
    federate(consortium, f"{options} privacy.target_epsilon=4", name="three", node_configs=nodes)
    assert [entry["epsilon"] for entry in log.read() if entry["epsilon"] is not None] == [6.0, 0.0, 4.0, 0.0]


def test_nothing_leaves_when_the_log_cannot_be_written(consortium: Path, federate: Federate, tmp_path: Path) -> None:
    nodes = kits(tmp_path / "kits", consortium)
    (tmp_path / "kits" / "b" / "state").write_text("a file where a folder must be")
    answered: list[bool] = []

    def listen(reply: Message, _: str) -> Message:
        if reply.metadata.src_node_id == 2:
            answered.append(reply.has_content())
        return reply

    with pytest.raises(RunError, match="node 2: this site's audit log cannot be written or was changed, so nothing leaves"):
        federate(consortium, node_configs=nodes, tamper=listen)
    assert answered == [False]


def test_a_changed_log_stops_a_site_and_a_flat_config_may_name_its_state(
    consortium: Path, federate: Federate, tmp_path: Path
) -> None:
    nodes: NodeConfigs = {
        number: {"site": name, "data-root": str(consortium / name), "min-group": 2, "state-root": str(tmp_path / "kits" / name)}
        for number, name in enumerate("abc", 1)
    }
    federate(consortium, "num_rounds=1 debias=none evaluation=none", name="one", node_configs=nodes)
    path = tmp_path / "kits" / "a" / "audit.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    path.write_text("\n".join([lines[0].replace('"bytes":', '"bytes":1'), *lines[1:]]) + "\n")
    with pytest.raises(RunError, match="node 1: this site's audit log cannot be written or was changed"):
        federate(consortium, "num_rounds=1 debias=none evaluation=none", name="two", node_configs=nodes)


def test_a_policy_that_counts_needs_a_log() -> None:
    from client.door import Door

    door = Door.of({}, "query.describe", 1, {})
    with pytest.raises(SiteError, match="counts by an audit log and it keeps none"):
        door.enter(policy_of(max_megabytes_a_day=1.0), load_config("experiment=tiny"))
    with pytest.raises(SiteError, match="must be absolute paths"):
        Door.of({"state-root": "state"}, "query.describe", 1, {})
    assert Door.of({"partition-id": 0, "num-partitions": 1}, "query.describe", 1, {}).audit is None


def test_the_command_prints_every_key_in_words(tmp_path: Path) -> None:
    path = written(tmp_path / "kit", PLAIN | {"groups": {"min_group": 12}, "hours": "20:00-06:00"})
    lines = {line.key: line for line in describe_policy(read_policy(path))}
    assert (lines["groups.min_group"].value, lines["groups.min_group"].is_default) == ("12", False)
    assert (lines["share_per_scan"].value, lines["share_per_scan"].is_default) == ("false", True)
    assert (lines["privacy.max_epsilon"].value, lines["data.root"].is_default) == ("null", False)
    assert all(line.words for line in lines.values())
    shown = RUNNER.invoke(app, ["site", "policy", str(tmp_path / "kit")])
    assert shown.exit_code == 0
    assert all(key in shown.stdout for key in lines)
    assert "the stricter of both holds in every field" in shown.stdout
    wrong = RUNNER.invoke(app, ["site", "policy", str(tmp_path)])
    assert (wrong.exit_code, len(wrong.output.strip().splitlines())) == (2, 1)


def test_the_readme_shows_a_policy() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    [shown] = re.findall(r"```yaml\n(site: .*?)```", text, re.DOTALL)
    policy = SitePolicy.model_validate(yaml.safe_load(shown))
    told = {line.key for line in describe_policy(policy)}
    commented = {line.split(":")[0].strip() for line in shown.splitlines()}
    assert {key.rpartition(".")[2] for key in told} <= commented


def test_a_virtual_site_does_as_the_run_says(consortium: Path) -> None:
    config = load_config(f"experiment=tiny data=folder data.root={consortium} policy.min_group=3 data.max_unusable=0.5")
    site: Site = this_site({"partition-id": 1, "num-partitions": 3}, config)
    assert (site.policy, site.moments, site.share_per_scan, site.max_unusable) == (None, *vars(asked(config)).values())
    assert site.moments.min_group == 3
