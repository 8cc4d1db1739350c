"""The run's configuration: composed by Hydra from ``configs/``, closed by a typed schema before any scan is read."""

import copy
import difflib
import math
import re
import shlex
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    InstanceOf,
    PlainSerializer,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from core.closed import Closed
from core.data.label_maps import LabelChoice
from core.data.manifest import MAX_UNUSABLE, SITE_NAME
from core.data.medmnist import MedMnistSource
from core.data.sampling import SamplingPolicy
from core.data.site import EitherSource, ImageSource, Source
from core.data.table import Columns, TableSource
from core.data.views import RowViewPolicy, ViewPolicy
from core.data.volumes import VolumeSettings
from core.losses import OBJECTIVES, DecoupledConditional, EpsSupInfoNCE, FairKL, Joint, Kernel, Objective, SupCon
from core.losses.fairkl import Divergence, Statistics
from core.models import EncoderChoice
from core.settings import DpSgd, MomentPolicy, PrivacyChoice
from core.stages import STAGES, StageName
from core.targets import Target

CONFIGS = Path(__file__).parents[1] / "configs"
_hydra_is_process_wide = threading.Lock()

SiteName = Annotated[str, Field(pattern=f"^{SITE_NAME}$")]
Positive = Annotated[float, Field(gt=0, lt=float("inf"))]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


# Keys that hold one of several kinds; pydantic puts the kind behind them: encoder.small.width is encoder.width to the user.
UNIONS = frozenset({"data", "encoder", "views", "privacy"})


def _kind(value: Any) -> Any:
    """The kind of data or views; images where it is not said."""
    return value.get("kind", "images") if isinstance(value, Mapping) else getattr(value, "kind", None)


Views = Annotated[Annotated[ViewPolicy, Tag("images")] | Annotated[RowViewPolicy, Tag("table")], Discriminator(_kind)]


class ConfigError(ValueError):
    """A configuration that cannot be run; one line that says what to change."""


class DataConfig(Closed, ABC):
    """Which sites take part in what, and how each splits its subjects."""

    PLACES: ClassVar[tuple[str, ...]]
    """Keys that hold a folder or file of this machine."""

    READING: ClassVar[tuple[str, ...]] = ()
    """Keys that say how files are to be read: a real site may tell its own."""
    inputs: ClassVar[Literal["images", "table"]]
    """What nets and views must be made for."""

    name: str
    pretrain_sites: tuple[SiteName, ...] | None
    unseen_sites: tuple[SiteName, ...] = ()
    target_sites: tuple[SiteName, ...] | None
    split_seed: int
    fractions: tuple[Share, Share, Share] = (0.6, 0.2, 0.2)
    max_unusable: Share = MAX_UNUSABLE
    pretrain_on: Literal["controls", "all"] = "controls"

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        if self.pretrain_sites is not None and self.unseen_sites:
            raise ValueError(
                "unseen_sites must be empty when pretrain_sites are named; name those that pretrain, or those that do not"
            )
        if not math.isclose(sum(self.fractions), 1.0) or self.fractions[0] == 0:
            raise ValueError(f"fractions of train, val and test must sum to 1, train not 0, got {list(self.fractions)}")
        return self

    @abstractmethod
    def source(self, cache_root: Path, places: Mapping[str, Path | None]) -> Source:
        """Where scans are read from: places by key of `PLACES`, those of the configuration or a site's own."""

    @property
    def spatial_dims(self) -> int:
        """Axes of an image; what rows of features have instead does not matter."""
        return 3

    def read_as(self, overrides: str) -> Self:
        """The same, but for what a site tells of its own files: keys of `READING` without ``data.``, as a shell would split them.

        Raises:
            ConfigError: another key, or a value that it cannot have.
        """
        plain = self.model_dump()
        for override in _parsed(shlex.split(overrides)):
            key, _, inner = override.key_or_group.partition(".")
            if key not in self.READING or (inner and not isinstance(plain[key], dict)):
                raise ConfigError(f"reading: a key must be one of {', '.join(self.READING)}, got {override.key_or_group!r}.")
            if inner:
                plain[key][inner] = override.value()
            else:
                plain[key] = override.value()
        try:
            return type(self).model_validate(plain)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"reading: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None

    def source_at(self, site: str, cache_root: Path, places: Mapping[str, Path | None]) -> Source:
        """Where one site's scans are read from; who is known not to be a target site need not have the columns of targets."""
        source, columns = self.source(cache_root, places), getattr(self, "columns", None)
        if self.inputs == "table" or not (columns and columns.targets) or self.target_sites is None or site in self.target_sites:
            return source
        return EitherSource(source, self.model_copy(update={"columns": replace(columns, targets=())}).source(cache_root, places))

    @property
    def places(self) -> dict[str, Path | None]:
        """The folders and files of this machine that the configuration names, by key."""
        return {key: getattr(self, key) for key in self.PLACES}


class ImageData(DataConfig):
    """Folders of images, and the grid that they are brought to."""

    PLACES = ("root", "participants", "mask")
    READING = ("layout", "suffix", "derivatives", "pattern", "columns", "modality")
    inputs = "images"

    kind: Literal["images"] = "images"
    root: Path | None
    layout: Literal["auto", "bids", "files", "openbhb"] = "auto"
    suffix: str
    derivatives: Annotated[str, Field(pattern=f"^{SITE_NAME}$")] | None = None
    participants: Path | None = None
    pattern: str | None = None
    columns: Columns = Field(default_factory=Columns)
    modality: Literal["vbm", "quasiraw"] = "vbm"
    voxel_size_mm: Positive
    shape: tuple[Count, Count, Count]
    normalisation: Literal["robust", "none"]
    mask: Path | None = None
    stored: Literal["float16", "uint8"] = "float16"

    @model_validator(mode="after")
    def _can_be_stored(self) -> "ImageData":
        self.volumes({})
        return self

    def volumes(self, places: Mapping[str, Path | None]) -> VolumeSettings:
        """What every volume looks like."""
        return VolumeSettings(
            voxel_size_mm=self.voxel_size_mm,
            shape=self.shape,
            normalisation=self.normalisation,
            mask=places.get("mask"),
            stored=self.stored,
        )

    def source(self, cache_root: Path, places: Mapping[str, Path | None]) -> ImageSource:
        """What ``layout`` says about the folder ``root``."""
        assert places["root"] is not None
        return ImageSource(
            root=places["root"],
            layout=self.layout,
            suffix=self.suffix,
            derivatives=self.derivatives,
            participants=places["participants"],
            pattern=self.pattern,
            columns=self.columns,
            modality=self.modality,
            settings=self.volumes(places),
            cache_root=cache_root,
        )


class MedMnistData(DataConfig):
    """A MedMNIST subset: small images, 2-D or 3-D, with official splits."""

    PLACES = ("root",)
    READING = ("controls",)
    inputs = "images"

    kind: Literal["medmnist"]
    root: Path | None
    spatial: Literal[2, 3]
    num_sites: Annotated[int, Field(ge=1, le=1000)]
    controls: tuple[Annotated[int, Field(ge=0)], ...] | None

    @property
    def spatial_dims(self) -> int:
        """Axes of an image."""
        return self.spatial

    def source(self, cache_root: Path, places: Mapping[str, Path | None]) -> MedMnistSource:
        """The file ``root``."""
        assert places["root"] is not None
        return MedMnistSource(places["root"], self.num_sites, self.controls, self.spatial, cache_root)


class TableData(DataConfig):
    """A table of features, one row a subject."""

    PLACES = ("table", "participants")
    READING = ("columns",)
    inputs = "table"

    kind: Literal["table"]
    table: Path | None
    participants: Path | None
    columns: Columns

    @property
    def root(self) -> Path | None:
        """The table, by the name that an image folder has."""
        return self.table

    def source(self, cache_root: Path, places: Mapping[str, Path | None]) -> TableSource:
        """``table``, joined with ``participants`` where there is one; nothing is cached."""
        del cache_root
        assert places["table"] is not None
        return TableSource(places["table"], places["participants"], self.columns)


class DebiasConfig(Closed):
    """FairKL against site and scanner, erasure of site and scanner, both or none."""

    name: Literal["fairkl", "erasure", "none"]
    weight: Annotated[float, Field(ge=0, lt=1e6)] = 0.0
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    kernel: Kernel = Field(default_factory=Kernel)
    divergence: Divergence = "kl"
    statistics: Statistics = "per_anchor"
    space: Literal["h", "z", "both"] = "h"
    exchange_every: Annotated[int, Field(ge=0)] = 0
    bin_years: Positive = 5.0
    erase: Literal["none", "auto", "input", "h"] = "none"
    erase_age_degree: Literal[1, 2] = 1
    erase_patients: bool = True
    erase_directions: Annotated[int, Field(ge=1)] | None = None
    erase_to: Literal["auto", "floor", "all"] | Share = "auto"

    @model_validator(mode="after")
    def _fits_together(self) -> "DebiasConfig":
        if (self.name == "fairkl") != (self.weight > 0):
            raise ValueError("weight must be positive with fairkl and absent otherwise; use debias=erasure or none without it")
        if (self.name, self.erase == "none") in (("none", False), ("erasure", True)):
            raise ValueError(f"erase must be auto, input or h with erasure, none with debias=none, got {self.erase!r}")
        _check_labels("debias.kernel", self.kernel.labels)
        if self.exchange_every and self.kernel.bandwidths.get("age_years") == 0:
            raise ValueError(
                "kernel.bandwidths.age_years must be positive or null when sites exchange moments of groups of ages, got 0; "
                "set exchange_every=0 to compare equal ages"
            )
        return self

    @property
    def spaces(self) -> tuple[str, ...]:
        """What FairKL acts on: the representation h, the embedding z."""
        return ("h", "z") if self.space == "both" else (self.space,)

    def weight_in_round(self, round_number: int) -> float:
        """The weight of FairKL: 0 in the warm-up, then rising linearly over as many rounds again."""
        return self.weight * min(1.0, max(0, round_number - self.warmup_rounds) / max(1, self.warmup_rounds))

    def exchanges_in_round(self, round_number: int) -> bool:
        """Whether sites exchange moments before this round: with the first weighted round and every few after."""
        since = round_number - self.warmup_rounds - 1
        return self.weight > 0 and self.exchange_every > 0 and since >= 0 and since % self.exchange_every == 0

    def fairkl(self) -> FairKL:
        """The loss."""
        return FairKL(kernel=self.kernel, divergence=self.divergence, statistics=self.statistics)


PRETRAINING_LABELS = ("age_years", "sex")


def _check_labels(where: str, labels: Sequence[str]) -> None:
    """Refuse labels that pretraining does not have."""
    for label in labels:
        if label == "diagnosis":
            raise ValueError(
                f"{where}: label must be one of {list(PRETRAINING_LABELS)}, got 'diagnosis': pretraining sees healthy scans only"
            )
        if label not in PRETRAINING_LABELS:
            raise ValueError(f"{where}: label must be one of {list(PRETRAINING_LABELS)}, got {label!r}")


class StrategyConfig(Closed):
    """How the server waits, averages and keeps."""

    name: Literal["fedavg", "trimmed_mean", "median"]
    aggregate: Literal["mean", "trimmed_mean", "median"]
    trim_share: Annotated[float, Field(ge=0.01, lt=0.5)]
    min_sites: Count | None
    round_timeout_s: Positive
    wait_for_sites_s: Positive
    deadline_factor: Annotated[float, Field(ge=1, lt=float("inf"))]
    deadline_floor_s: Positive
    late_updates: Literal["next_round", "drop"]
    exclude_after: Count
    admit_late: bool
    keep_checkpoints: Count
    reject_norm: Annotated[float, Field(gt=1, lt=float("inf"))] | None
    clip_norm: Annotated[float, Field(ge=1, lt=float("inf"))] | None
    max_weight_share: Annotated[float, Field(gt=0, lt=1)] | None
    max_message_mb: Positive

    @property
    def fewest_sites(self) -> tuple[int, str]:
        """How many sites must answer in a round for their average to be what is asked for, and what asks for them."""
        if self.aggregate == "trimmed_mean":
            # As Flower counts those that it leaves out at either end.
            fewest = next(n for n in range(3, 1000) if int(self.trim_share * n) >= 1)
            return fewest, f"strategy.trim_share={self.trim_share:g}"
        if self.aggregate == "median":
            return 3, "strategy.aggregate=median"
        if self.max_weight_share is not None:
            return math.ceil(1 / self.max_weight_share - 1e-9), f"strategy.max_weight_share={self.max_weight_share:g}"
        return 1, "strategy.aggregate=mean"

    @model_validator(mode="after")
    def _fits_together(self) -> "StrategyConfig":
        if self.aggregate != "mean" and self.max_weight_share is not None:
            raise ValueError(
                f"max_weight_share must be null with aggregate={self.aggregate}, got {self.max_weight_share:g}: sites weigh alike"
            )
        if None not in (self.clip_norm, self.reject_norm) and self.clip_norm >= self.reject_norm:  # type: ignore[operator]
            raise ValueError(f"clip_norm must be less than reject_norm, got {self.clip_norm:g} and {self.reject_norm:g}")
        fewest, why = self.fewest_sites
        if self.min_sites is not None and self.min_sites < fewest:
            raise ValueError(f"min_sites must be at least {fewest} with {why}, got {self.min_sites}; null asks for all sites")
        return self


class FinetuneConfig(Closed):
    """Fine-tuning at the target sites."""

    stages: tuple[StageName, ...]
    target: Target = Field(default_factory=Target)
    label_maps: LabelChoice | None = None
    where: Literal["federated", "local"]
    num_rounds: Annotated[int, Field(ge=0)]
    warmup_rounds: Annotated[int, Field(ge=0)]
    frozen_rounds: Annotated[int, Field(ge=0)]
    local_steps: Count
    batch_size: Count
    learning_rate: Positive
    head_learning_rate: Positive
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    class_weights: Literal["balanced", "none"]
    label_fraction: Annotated[float, Field(gt=0, le=1)]
    patience: Count | None
    validate_by: Literal["loss", "figure"]
    views: Views | Literal["none"] | None
    test_time_views: Annotated[int, Field(ge=0, le=100)]

    @model_validator(mode="after")
    def _fits_together(self) -> "FinetuneConfig":
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages must be different ones, got {list(self.stages)}")
        if self.test_time_views and (self.views == "none" or self.label_maps is not None):
            raise ValueError(
                f"test_time_views must be 0 with views=none and with label_maps, got {self.test_time_views}; they are drawn as "
                "the views of training are, and label maps would have to be moved back"
            )
        if self.stages and not self.num_rounds:
            raise ValueError("num_rounds must be at least 1 when there are stages, got 0")
        thaws = any(STAGES[stage].thaws for stage in self.stages)
        for name, counts in (("warmup_rounds", bool(self.stages)), ("frozen_rounds", thaws)):
            if counts and getattr(self, name) >= self.num_rounds:
                raise ValueError(f"{name} must be less than num_rounds, got {getattr(self, name)} and {self.num_rounds}")
        return self


class EvaluationConfig(Closed):
    """What the evaluation is made of: single scans, or sums alone."""

    name: Literal["auto", "per_scan", "sums", "none"]
    features: Count
    directions: Literal["between_groups", "random"]
    site_probe: Literal["lda", "logistic"]


class PolicyConfig(Closed):
    """What the run asks every site to keep at least; a real site keeps the stricter of this and its own policy."""

    min_group: Count
    diagonal_subjects: Count
    covariance_subjects_per_feature: Annotated[int, Field(ge=0)]
    round_counts_to: Count
    share_per_scan: bool

    def moment_policy(self) -> MomentPolicy:
        """What may be sent about a group."""
        return MomentPolicy(**self.model_dump(exclude={"share_per_scan"}))


def _objective(value: Any) -> Any:
    """The objective that a tree of settings names; one in another (``weak`` of joint) likewise."""
    if not isinstance(value, Mapping):
        return value
    settings = dict(value)
    name = settings.pop("name", None)
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {name!r}")
    known = {field.name for field in fields(OBJECTIVES[name])}  # type: ignore[arg-type]
    unknown = set(settings) - known
    if unknown:
        near = difflib.get_close_matches(min(unknown), known, n=3, cutoff=0.4) or sorted(known)
        raise ValueError(f"objective {name} has no setting {min(unknown)!r}; nearest: {', '.join(near)}")
    if "weak" in settings:
        settings["weak"] = _objective(settings["weak"])
    return TypeAdapter(OBJECTIVES[name]).validate_python(settings)


def _check_objective(objective: Objective) -> None:
    """Refuse an objective that makes no sense in pretraining, with the reason."""
    if isinstance(objective, DecoupledConditional) and objective.confidence:
        raise ValueError(f"objective: confidence must be null, got {objective.confidence!r}: no table of a site tells it")
    _check_labels("objective", objective.labels)
    if isinstance(objective, SupCon | EpsSupInfoNCE) and objective.label == "age_years" and objective.bin_width is None:
        raise ValueError(
            "objective: bin_width must be given with label age_years, got null: each age would be a class of its own"
        )
    if isinstance(objective, DecoupledConditional | Joint) and objective.label == "age_years":
        raise ValueError("objective: label must be a class, got 'age_years'; use objective=yaware, exp or threshold for age")
    if isinstance(objective, Joint):
        if isinstance(objective.weak, Joint):
            raise ValueError("objective: weak must be an objective without a classifier, got joint in joint")
        _check_objective(objective.weak)


def describe_objective(objective: Objective) -> dict[str, Any]:
    """The settings of an objective under its name, ready for JSON."""
    names = {constructor: name for name, constructor in OBJECTIVES.items()}
    plain: dict[str, Any] = {"name": names[type(objective)]}
    for field in fields(objective):  # type: ignore[arg-type]
        value = getattr(objective, field.name)
        plain[field.name] = (
            describe_objective(value) if isinstance(value, Objective) else asdict(value) if isinstance(value, Kernel) else value
        )
    return plain


class RunConfig(Closed):
    """One run, complete and checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    seed: Annotated[int, Field(ge=0)]
    output: Path | None
    resume: bool
    num_rounds: Annotated[int, Field(ge=0)]
    local_steps: Count
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_rounds: Annotated[int, Field(ge=0)]
    embedding_size: Annotated[int, Field(ge=2, le=4096)]
    precision: Literal["float32", "bfloat16"]
    start: Path | None
    start_keys: tuple[Annotated[str, Field(pattern="^[^:]*:[^:]*$")], ...]
    data: Annotated[
        Annotated[ImageData, Tag("images")] | Annotated[MedMnistData, Tag("medmnist")] | Annotated[TableData, Tag("table")],
        Discriminator(_kind),
    ]
    encoder: Annotated[EncoderChoice, Field(discriminator="name")]
    objective: Annotated[InstanceOf[Objective], BeforeValidator(_objective), PlainSerializer(describe_objective)]
    debias: DebiasConfig
    sampling: SamplingPolicy
    views: Views
    strategy: StrategyConfig
    privacy: Annotated[PrivacyChoice, Field(discriminator="name")]
    finetune: FinetuneConfig
    evaluation: EvaluationConfig
    policy: PolicyConfig

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        _check_objective(self.objective)
        remedy = {"images": "encoder=small views=brain", "table": "encoder=mlp views=table"}[self.data.inputs]
        for part, kind in (("encoder", self.encoder.kind), ("views", self.views.kind)):
            if kind != self.data.inputs:
                raise ValueError(f"{part} must be for {self.data.inputs}, as data are, got one for {kind}; add {remedy}")
        if self.num_rounds == 0 and self.start is None:
            raise ValueError("num_rounds must be at least 1, got 0; 0 goes with start=..., an encoder that is trained already")
        if self.warmup_rounds >= self.num_rounds > 0:
            raise ValueError(f"warmup_rounds must be less than num_rounds, got {self.warmup_rounds} and {self.num_rounds}")
        if self.debias.erase == "input" and self.data.inputs != "table":
            raise ValueError(f"debias.erase must be auto, h or none when the run reads images, got {self.debias.erase!r}")
        if self.debias.weight > 0 and self.debias.warmup_rounds >= self.num_rounds > 0:
            raise ValueError(
                f"debias.warmup_rounds must be less than num_rounds, got {self.debias.warmup_rounds} and {self.num_rounds}"
            )
        if isinstance(self.finetune.views, ViewPolicy | RowViewPolicy) and self.finetune.views.kind != self.data.inputs:
            raise ValueError(
                f"finetune.views must be for {self.data.inputs}, as data are, got those for {self.finetune.views.kind}"
            )
        if isinstance(self.privacy, DpSgd):
            self._check_private()
        return self

    def _check_private(self) -> None:
        """Refuse what would make the epsilon of DP-SGD false."""
        if self.num_rounds:
            raise ValueError(
                f"privacy=dp_sgd is for fine-tuning alone, got num_rounds={self.num_rounds}: contrastive losses couple scans, "
                "one changed scan of 128 moved the clipped sum by 252 clipping norms instead of 2, so that the epsilon would be "
                "false; use start=... num_rounds=0, or `isocenter finetune`"
            )
        if self.finetune.class_weights != "none":
            raise ValueError(
                "finetune.class_weights must be none with privacy=dp_sgd, got 'balanced': the counts of the classes would couple "
                "subjects and are no private sum"
            )
        if self.finetune.label_fraction != 1:
            raise ValueError(
                f"finetune.label_fraction must be 1 with privacy=dp_sgd, got {self.finetune.label_fraction:g}: who is drawn "
                "depends on the other subjects"
            )
        if self.finetune.patience is not None:
            raise ValueError(
                f"finetune.patience must be null with privacy=dp_sgd, got {self.finetune.patience}: the choice of a round by its "
                "score is not private"
            )
        if self.debias.name != "none":
            raise ValueError(
                f"debias must be none with privacy=dp_sgd, got {self.debias.name!r}: its sums over subjects are not private"
            )

    @property
    def erased_spaces(self) -> tuple[str, ...]:
        """Where site and scanner are erased: the inputs of rows, before training; the representation h, after it."""
        auto = ("input", "h") if self.data.inputs == "table" else ("h",)
        return {"none": (), "auto": auto}.get(self.debias.erase, (self.debias.erase,))

    @property
    def num_classes(self) -> int | None:
        """Classes of the classifier that is pretrained beside the encoder: two sexes, with objective=joint; else none."""
        return 2 if isinstance(self.objective, Joint) else None


def quoted(text: str) -> str:
    r"""A text as the value of an override, which Hydra reads back: only quotes are escaped, and backslashes before them.

    >>> print(quoted('/data/hôpital "A"'))
    "/data/hôpital \"A\""
    """
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ("\\" + found[2] if found[2] else ""), text) + '"'


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides of values by Hydra's grammar."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"reading: {_how_to_quote(str(error), overrides)}") from None


def _keys(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's complaint as one line, with the nearest names that exist."""
    text = " ".join(str(error).split())
    if match := re.search(r"Could not find '([\w/.-]+)'", text):
        wrong = match[1]
        group, _, name = wrong.rpartition("/")
        names = [path.stem for path in sorted((CONFIGS / group).glob("*.yaml"))]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        return f"config: {group or 'name'} must be one of {names}, got {name!r}; nearest: {', '.join(near)}."
    wanted = [override.lstrip("+~").partition("=")[0] for override in overrides]
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    usual, known = _keys(compose_plain(())), sorted({*_keys(compose_plain(choices)), *groups})
    match = re.search(r"Could not override '([\w.]+)'", text)
    if match and match[1] in usual and match[1] not in known:
        group = match[1].partition(".")[0]
        chosen = next(
            (o for name in (group, "experiment") for o in reversed(choices) if o.startswith(f"{name}=")), f"the default {group}"
        )
        return f"config: {match[1]} is no setting of {chosen}, which has nothing of that kind; leave it out or choose another."
    for key in wanted:
        if key not in known and key.partition("@")[0] not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            # A bare key is often the last part of a dotted one: "root" for "data.root".
            near += [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2] and name not in near]
            return f"config: an override must name a known key, got {key!r}; nearest: {', '.join(near) or 'none'}."
    return f"config: {_how_to_quote(text, overrides)}"


def _how_to_quote(text: str, overrides: Sequence[str]) -> str:
    """Hydra's complaint, or how to write a value that its grammar takes for something else."""
    odd = next((o for o in overrides if re.search(r"[{}<>;&,() ]", o.partition("=")[2]) and '"' not in o), None)
    if odd is None or "input" not in text:
        return " ".join(text.split())
    key, _, value = odd.partition("=")
    return f"{key}: such a value must stand in double quotes, these in single ones for the shell: '{key}=\"{value}\"'."


def compose_plain(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose ``configs/run.yaml`` with the overrides to a plain dictionary, not yet checked."""
    return copy.deepcopy(_composed(tuple(overrides)))


@lru_cache(maxsize=64)
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Composed once: it takes tenths of a second."""
    with _hydra_is_process_wide:
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            composed = OmegaConf.to_container(compose("run", overrides=list(overrides)), resolve=True)
    if not isinstance(composed, dict):
        raise ConfigError("config: configs/run.yaml must hold keys.")
    return {str(key): value for key, value in composed.items()}


def load_config(overrides: str | Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a run.

    Args:
        overrides: Hydra overrides, as a list or as one string that a shell would split, e.g. ``"objective=ntxent seed=1"``.

    Raises:
        ConfigError: unknown key or name, wrong type, value out of range, or keys that do not fit together; one line.
    """
    return _load(tuple(shlex.split(overrides) if isinstance(overrides, str) else overrides))


@lru_cache(maxsize=64)
def _load(parts: tuple[str, ...]) -> RunConfig:
    """The configuration of these overrides, composed once: a site asks for every message."""
    try:
        plain = compose_plain(parts)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, parts)) from None
    missing = [key for key in _keys(plain) if _at(plain, key) == "???"]
    if missing:
        raise ConfigError(f"config: {missing[0]} must be given, got nothing. Add {missing[0]}=... to the overrides.")
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        loc = [str(part) for i, part in enumerate(first["loc"]) if i != 1 or first["loc"][0] not in UNIONS]
        where = ".".join(loc) or "overrides"
        given = f", got {first['input']!r}" if not isinstance(first["input"], Mapping) else ""
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            if loc[:-1] and "name" in (chosen := _at(plain, ".".join(loc[:-1]))):
                raise ConfigError(
                    f"config: {where} is no setting of the chosen {loc[-2]}, {chosen['name']!r}; leave it out, with '~{where}' "
                    "if a preset has set it."
                ) from None
            near = difflib.get_close_matches(where, _keys(compose_plain(())), n=3, cutoff=0.4)
            raise ConfigError(f"config: {where} is no known key; nearest: {', '.join(near) or 'none'}.") from None
        what = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise ConfigError(f"config: {where}: {what}{'' if ', got ' in what else given}.") from None


def _at(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def describe(config: RunConfig) -> dict[str, Any]:
    """The configuration without the folders of this machine, ready for JSON: what checkpoints and reports carry.

    Whether the run is gone on with is no part of it: it is the same run.
    """
    plain = config.model_dump(mode="json")
    del plain["output"], plain["start"], plain["resume"]
    for key in config.data.PLACES:
        del plain["data"][key]
    return plain
