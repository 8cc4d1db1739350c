"""What a site lets happen: its own policy, from a file that its IT keeps; no run can weaken it.

`SitePolicy` is the one schema, for ``site.yaml`` and for the flat keys of Flower's node config.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, cast, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, Strict, StrictBool, StrictInt, ValidationError, model_validator

from client.audit import Entry, bytes_since, epsilon_added, epsilon_spent
from core.closed import Closed
from core.data.manifest import MAX_UNUSABLE, SITE_NAME
from core.settings import ClipAndNoise, DpSgd, MomentPolicy, PrivacyChoice

if TYPE_CHECKING:
    from core.config import RunConfig

Stage = Literal["describe", "pretrain", "debias", "finetune", "evaluate"]
MomentKind = Literal["sums", "moments", "scanners", "hits", "probes"]
STAGE_WORDS: Mapping[Stage, str] = {
    "describe": "tell the site's name and rounded or whole counts of what it holds; keep what every site is told",
    "pretrain": "train the shared encoder on the site's scans",
    "debias": "tell sums by which site and scanner are made invisible",
    "finetune": "train encoder and head on labels",
    "evaluate": "measure the result on held-out scans",
}
MOMENT_WORDS: Mapping[MomentKind, str] = {
    "sums": "sums of features over all subjects that take part",
    "moments": "means and covariances of groups of like subjects",
    "scanners": "sums by scanner, beside age, sex and diagnosis",
    "hits": "how many subjects are nearest to their own scanner's mean",
    "probes": "sums and counts that an evaluation without single scans needs",
}


class MessageAbout(NamedTuple):
    """What a kind of message is for, and which statistics its answer tells."""

    stage: Stage
    tells: MomentKind | None = None


MESSAGES: Mapping[str, MessageAbout] = {
    "query.describe": MessageAbout("describe"),
    "query.constants": MessageAbout("describe"),
    "query.inputs": MessageAbout("pretrain", "sums"),
    "train.pretrain": MessageAbout("pretrain"),
    "query.sums": MessageAbout("debias", "sums"),
    "query.moments": MessageAbout("debias", "moments"),
    "query.scanners": MessageAbout("debias", "scanners"),
    "query.hits": MessageAbout("debias", "hits"),
    "train.finetune": MessageAbout("finetune"),
    "query.validation": MessageAbout("finetune"),
    "query.embed": MessageAbout("evaluate"),
    "query.predict": MessageAbout("evaluate"),
    "query.features": MessageAbout("evaluate", "probes"),
    "query.groups": MessageAbout("evaluate", "probes"),
    "query.probes": MessageAbout("evaluate", "probes"),
    "query.gradient": MessageAbout("evaluate", "probes"),
    "query.errors": MessageAbout("evaluate", "probes"),
    "query.scores": MessageAbout("evaluate", "probes"),
}
"""Every kind of message that a site answers; any other is refused."""


class PolicyError(ValueError):
    """A policy that cannot be used; one line for the site's IT, which may hold a path and does not leave the site."""


class Refusal(NamedTuple):
    """Why a task is refused: the kind the server decides by, and a sentence that may leave the site."""

    kind: Literal["policy", "closed"]
    sentence: str


def _absolute(path: Path) -> Path:
    """Refuse what would depend on where a process was started."""
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _path(value: object) -> object:
    """A path from text alone."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be a path")
    return Path(value)


def _tuple(value: object) -> object:
    """YAML has lists only."""
    return tuple(value) if isinstance(value, list) else value


def _period(value: str) -> str:
    """Refuse what is no period of a day."""
    if not re.fullmatch(r"(?:[01]\d|2[0-3]):[0-5]\d-(?:[01]\d|2[0-3]):[0-5]\d", value) or value[:5] == value[6:]:
        raise ValueError("must be a period of the day such as '20:00-06:00', or null")
    return value


AbsolutePath = Annotated[Path, BeforeValidator(_path), AfterValidator(_absolute)]
Whole = Annotated[StrictInt, Field(ge=1)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]


class Data(Closed):
    """Where the scans are; the run knows nothing of it and changes nothing about it."""

    root: AbsolutePath = Field(description="the folder of its images, or its table of features")
    participants: AbsolutePath | None = Field(
        default=None, description="a table with age, sex and diagnosis, where root has none"
    )
    mask: AbsolutePath | None = Field(default=None, description="an image whose zeros are blanked in every scan")
    reading: str = Field(
        default="", description="how its files are read where that differs from the run, such as suffix=acq-mprage_T1w"
    )


class Groups(Closed):
    """How many subjects must stand behind what leaves."""

    min_group: Whole = Field(default=10, description="subjects a group needs before its mean may leave")
    diagonal_subjects: Whole = Field(
        default=60, description="subjects a site needs before a sum of squares of each feature may leave"
    )
    covariance_subjects_per_feature: Annotated[StrictInt, Field(ge=0)] = Field(
        default=12, description="subjects for each feature that a group needs before its covariance may leave"
    )
    round_counts_to: Whole = Field(default=5, description="group sizes leave rounded to a multiple of this")


class Allow(Closed):
    """What may be done at all."""

    stages: Annotated[tuple[Stage, ...], BeforeValidator(_tuple)] = Field(
        default=get_args(Stage), description="stages of a run that this site takes part in"
    )
    moments: Annotated[tuple[MomentKind, ...], BeforeValidator(_tuple)] = Field(
        default=get_args(MomentKind), description="statistics over subjects that may leave"
    )


REQUIRED = ("none", "clip_and_noise", "dp_sgd")


class Privacy(Closed):
    """What fine-tuning must guarantee. Pretraining, statistics and scores are covered by no epsilon."""

    require: Literal["none", "clip_and_noise", "dp_sgd"] = Field(
        default="none", description="the least that fine-tuning here must do: nothing, clipped and noised updates, or DP-SGD"
    )
    min_noise_multiplier: Annotated[Number, Field(ge=0)] = Field(
        default=0.0, description="least noise of clip_and_noise, in units of its clipping norm"
    )
    max_delta: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="most delta of DP-SGD in a run; null: less than 1 / number of subjects, as always"
    )
    max_epsilon: Positive | None = Field(
        default=None, description="most epsilon that all runs of the audit log together may spend; needs require: dp_sgd"
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.max_epsilon is not None and self.require != "dp_sgd":
            raise ValueError("max_epsilon must be null unless require is dp_sgd: other fine-tuning has no epsilon to count")
        return self


class SitePolicy(Closed):
    """One site: where its scans are, on what it computes, and what may leave it."""

    site: Annotated[str, Strict(), Field(pattern=f"^{SITE_NAME}$")] = Field(description="the site's name")
    data: Data
    cache_root: AbsolutePath | None = Field(default=None, description="folder for preprocessed volumes; null: the user's cache")
    device: Annotated[str, Strict()] = Field(
        default="auto", description="auto, cuda:0, cpu; a GPU asked for and absent is an error"
    )
    threads: Whole | None = Field(default=None, description="CPU threads; null: all")
    gpu_share: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="most of the GPU's memory; null: all"
    )
    max_unusable: Share = Field(
        default=MAX_UNUSABLE, description="share of the scans listed that may be unusable before it refuses"
    )
    share_per_scan: StrictBool = Field(
        default=False, description="whether embeddings and scores of single scans may leave, without ids, for the evaluation"
    )
    groups: Groups = Field(default_factory=Groups)
    allow: Allow = Field(default_factory=Allow)
    privacy: Privacy = Field(default_factory=Privacy)
    hours: Annotated[str, Strict(), AfterValidator(_period)] | None = Field(
        default=None, description="when tasks may begin, local time, such as '20:00-06:00'; null: always"
    )
    max_megabytes: Positive | None = Field(default=None, description="most that one answer may hold; null: no limit")
    max_megabytes_a_day: Positive | None = Field(
        default=None, description="most that may leave in 24 hours, by the audit log; null: no limit"
    )

    @classmethod
    def from_node_config(cls, flat: Mapping[str, object]) -> Self:
        """The policy of the flat keys of a node config.

        Raises:
            PolicyError: unknown, missing or wrong values; one line.
        """
        if unknown := sorted(set(flat) - set(FLAT_KEYS)):
            raise PolicyError(f"node config: keys must be of {sorted(FLAT_KEYS)}, got {unknown}. Remove them.")
        tree: dict[str, Any] = {"data": {}}
        for key, value in flat.items():
            group, _, name = FLAT_KEYS[key].rpartition(".")
            place = tree.setdefault(group, {}) if group else tree
            place[name] = _number(value) if key in NUMBER_KEYS else value
        return cls._checked(tree, "node config", {path: key for key, path in FLAT_KEYS.items()})

    @classmethod
    def _checked(cls, tree: object, where: str, keys: Mapping[str, str]) -> Self:
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(part for part in map(str, first["loc"]) if part in _known_names())
            key = ".".join(map(str, first["loc"])) if first["type"] == "extra_forbidden" else path
            what = {
                "missing": "must be given, got nothing",
                "extra_forbidden": "is no known key",
            }.get(first["type"], f"{first['msg'].removeprefix('Value error, ')}, got {first['input']!r}")
            name = keys.get(key, key)
            raise PolicyError(" ".join(f"{where}:{' ' + name + ':' if name else ''} {what}. Mend it.".split())) from None

    def moment_policy(self) -> MomentPolicy:
        """What may be sent about a group."""
        return MomentPolicy(**self.groups.model_dump())

    def closed(self, now: datetime) -> str | None:
        """The sentence of a closed site, with the time it opens; none while it is open. ``now`` is local and knows its zone."""
        if self.hours is None:
            return None
        opens, closes = (time.fromisoformat(part) for part in self.hours.split("-"))
        at = now.time().replace(tzinfo=None)
        if (opens <= at < closes) if opens < closes else (at >= opens or at < closes):
            return None
        day = now.date() if at < opens else now.date() + timedelta(days=1)
        next_opening = datetime.combine(day, opens, tzinfo=now.tzinfo).isoformat(timespec="minutes")
        return f"this site takes tasks from {self.hours[:5]} to {self.hours[6:]} only; it opens at {next_opening}."

    def refusal(
        self,
        message_type: str,
        config: "RunConfig",
        now: datetime,
        entries: Sequence[Entry] = (),
        run: tuple[int, str] = (0, ""),
    ) -> Refusal | None:
        """Why a task is refused before it begins, or None.

        Args:
            message_type: what is asked for.
            config: the run's.
            now: local time, with its zone.
            entries: of the audit log.
            run: the run's number and the hash of its configuration, as the audit log has them.
        """
        about = MESSAGES.get(message_type)
        if about is None:
            return Refusal("policy", "this site knows no such task and refuses it.")
        if sentence := self.closed(now):
            return Refusal("closed", sentence)
        if about.stage not in self.allow.stages:
            return Refusal("policy", f"this site takes no part in {about.stage} (allow.stages of its policy).")
        if about.tells is not None and about.tells not in self.allow.moments:
            return Refusal("policy", f"this site tells no {about.tells} (allow.moments of its policy).")
        if message_type == "train.finetune":
            if not satisfies(config.privacy, self.privacy):
                return Refusal(
                    "policy", f"this site fine-tunes with privacy={_remedy(self.privacy)} only, as its policy requires."
                )
            if sentence := self._over_epsilon(config, entries, run):
                return Refusal("policy", sentence)
        if self.max_megabytes_a_day is not None and _day(entries, now) >= self.max_megabytes_a_day * 1e6:
            return Refusal("policy", self._too_much_a_day())
        return None

    def refusal_to_send(
        self, message_type: str, size: int, config: "RunConfig", now: datetime, entries: Sequence[Entry], run: tuple[int, str]
    ) -> Refusal | None:
        """Why an answer of ``size`` bytes does not leave, or None."""
        if self.max_megabytes is not None and size > self.max_megabytes * 1e6:
            return Refusal("policy", f"this site sends at most {self.max_megabytes:g} MB in an answer, this one has more.")
        if self.max_megabytes_a_day is not None and _day(entries, now) + size > self.max_megabytes_a_day * 1e6:
            return Refusal("policy", self._too_much_a_day())
        if message_type == "train.finetune" and (sentence := self._over_epsilon(config, entries, run)):
            return Refusal("policy", sentence)
        return None

    def _over_epsilon(self, config: "RunConfig", entries: Sequence[Entry], run: tuple[int, str]) -> str | None:
        """The sentence of a ceiling that a round of fine-tuning would break."""
        if self.privacy.max_epsilon is None:
            return None
        added = epsilon_added(config, entries, run)
        if added is not None and epsilon_spent(entries) + added <= self.privacy.max_epsilon * (1 + 1e-9):
            return None
        return (
            f"this site spends an epsilon of at most {self.privacy.max_epsilon:g} over all runs, what is left is too little for "
            "this one."
        )

    def _too_much_a_day(self) -> str:
        return f"this site sends at most {self.max_megabytes_a_day:g} MB in 24 hours and has sent them."


FLAT_KEYS: Mapping[str, str] = {
    "site": "site",
    "data-root": "data.root",
    "participants": "data.participants",
    "mask": "data.mask",
    "reading": "data.reading",
    "cache-root": "cache_root",
    "device": "device",
    "threads": "threads",
    "max-unusable": "max_unusable",
    "share-per-scan": "share_per_scan",
    "min-group": "groups.min_group",
    "diagonal-subjects": "groups.diagonal_subjects",
    "covariance-subjects-per-feature": "groups.covariance_subjects_per_feature",
    "round-counts-to": "groups.round_counts_to",
}
"""Keys of the node config and what they are in a policy."""
NUMBER_KEYS = {"threads", "max-unusable"} | {key for key, path in FLAT_KEYS.items() if path.startswith("groups.")}


def _number(value: object) -> object:
    """A number that the shell made text of."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        return value


def _known_names() -> set[str]:
    """Names of keys at any depth; pydantic puts others between them."""
    return {name for schema in (SitePolicy, Data, Groups, Allow, Privacy) for name in schema.model_fields}


class _OnceOnly(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without code, in which no key may stand twice."""


def _mapping(loader: _OnceOnly, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} must stand once, got it twice", node.start_mark)
    return cast(dict[Any, Any], yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_OnceOnly.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_policy(path: Path) -> SitePolicy:
    """The policy of a file.

    Raises:
        PolicyError: it cannot be read, or is no policy; one line.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _OnceOnly)
    except OSError as error:
        raise PolicyError(f"{path}: it must be a file that can be read, got {error.strerror}. Name another.") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise PolicyError(f"{path.name}: it must be YAML, got {' '.join(str(error).split())}. Mend it.") from None
    if not isinstance(tree, Mapping):
        raise PolicyError(f"{path.name}: it must hold keys, such as site, got {type(tree).__name__}. Mend it.")
    return SitePolicy._checked(tree, path.name, {})


@dataclass(frozen=True)
class Allowance:
    """What a site lets out in a run, the run's wishes and its own policy taken together.

    Attributes:
        moments: about groups of subjects.
        share_per_scan: whether embeddings and scores of single scans may leave.
        max_unusable: share of the listed scans that may be unusable.
    """

    moments: MomentPolicy
    share_per_scan: bool
    max_unusable: float


def asked(config: "RunConfig") -> Allowance:
    """What the run asks every site to keep at least."""
    return Allowance(config.policy.moment_policy(), config.policy.share_per_scan, config.data.max_unusable)


def stricter(policy: SitePolicy, config: "RunConfig") -> Allowance:
    """The stricter of a site's policy and the run, in every field.

    Counts are rounded to a multiple of what both round to, so that each sees no finer ones than its own.
    """
    own, run = policy.moment_policy(), asked(config)
    return Allowance(
        MomentPolicy(
            min_group=max(own.min_group, run.moments.min_group),
            diagonal_subjects=max(own.diagonal_subjects, run.moments.diagonal_subjects),
            covariance_subjects_per_feature=max(own.covariance_subjects_per_feature, run.moments.covariance_subjects_per_feature),
            round_counts_to=math.lcm(own.round_counts_to, run.moments.round_counts_to),
        ),
        share_per_scan=policy.share_per_scan and run.share_per_scan,
        max_unusable=min(policy.max_unusable, run.max_unusable),
    )


def satisfies(choice: PrivacyChoice, privacy: Privacy) -> bool:
    """Whether fine-tuning with this choice does what the policy requires; a mechanism without noise is none."""
    private = (
        isinstance(choice, DpSgd)
        and math.isfinite(choice.target_epsilon)
        and (privacy.max_delta is None or choice.delta <= privacy.max_delta)
    )
    noised = (
        isinstance(choice, ClipAndNoise)
        and choice.noise_multiplier > 0
        and choice.noise_multiplier >= privacy.min_noise_multiplier
    )
    return {"none": True, "clip_and_noise": private or noised, "dp_sgd": private}[privacy.require]


def _remedy(privacy: Privacy) -> str:
    """What a run must choose."""
    if privacy.require == "dp_sgd":
        delta = "" if privacy.max_delta is None else f" and privacy.delta of {privacy.max_delta:g} or less"
        return f"dp_sgd and a finite privacy.target_epsilon{delta}"
    return f"clip_and_noise, a positive privacy.noise_multiplier of {privacy.min_noise_multiplier:g} or more, or privacy=dp_sgd"


def _day(entries: Sequence[Entry], now: datetime) -> int:
    """Bytes that left in the last 24 hours."""
    return bytes_since(entries, now - timedelta(days=1))


class PolicyLine(NamedTuple):
    """One key of a policy, its value as YAML has it, whether that is the default, and what it means."""

    key: str
    value: str
    is_default: bool
    words: str


def describe_policy(policy: Closed, prefix: str = "") -> list[PolicyLine]:
    """Every key of a policy, those left at their default too."""
    lines: list[PolicyLine] = []
    for name, field in type(policy).model_fields.items():
        value = getattr(policy, name)
        if isinstance(value, Closed):
            lines += describe_policy(value, f"{prefix}{name}.")
            continue
        plain = [*value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        text = yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")
        lines.append(PolicyLine(f"{prefix}{name}", text, value == field.default, field.description or ""))
    return lines
