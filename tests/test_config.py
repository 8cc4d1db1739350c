"""Configurations: every choice composes, every mistake is one line that helps."""

import shlex
from itertools import product

import pytest

from core.config import CONFIGS, ConfigError, DebiasConfig, describe, load_config, quoted
from core.losses import Kernel, NTXent, YAware


def test_defaults_are_the_phantom_with_yaware_and_fairkl() -> None:
    config = load_config()
    assert config.objective == YAware(kernel=Kernel(bandwidths={"age_years": 5.0, "sex": None}))
    assert (config.data.name, config.debias.name, config.encoder.name) == ("phantom", "fairkl", "small")


PRIVATE = "privacy=dp_sgd start=/run num_rounds=0 debias=none finetune.class_weights=none"


def test_every_choice_of_every_group_composes() -> None:
    def choices(group: str) -> list[str]:
        return [f"{group}={path.stem}" for path in sorted((CONFIGS / group).glob("*.yaml"))]

    objectives, debiasings = choices("objective"), choices("debias")
    assert len(objectives) > 3
    assert len(debiasings) > 2
    # No check is of these two together: every third pair has each of both.
    for (i, objective), (j, debias) in product(enumerate(objectives), enumerate(debiasings)):
        if (i + j) % 3 == 0:
            load_config([objective, debias])
    table = "data=roi data.table=/somewhere encoder=mlp views=table"
    for group in ("sampling", "encoder", "views", "strategy", "privacy", "finetune"):
        assert choices(group)
        for override in choices(group):
            load_config(PRIVATE if override == "privacy=dp_sgd" else table if override in table else override)
    for name in ("phantom", "mcic", "folder"):
        assert load_config(f"data={name} data.root=/somewhere").data.name == name
    for experiment in ("mcic", "tiny"):
        assert load_config(f"experiment={experiment} data.root=/somewhere").name == experiment
    for experiment in ("roi", "abide", "ixi"):
        config = load_config(f"experiment={experiment} data.table=/table data.participants=/people")
        assert (config.name, config.data.kind, config.encoder.kind, config.views.kind) == (experiment, *["table"] * 3)


def test_overrides_may_be_one_quoted_line() -> None:
    config = load_config(
        """objective=ntxent objective.temperature=0.3 'data.root="/a folder/of=scans"' data.target_sites=[a,b]"""
    )
    assert config.objective == NTXent(temperature=0.3)
    assert str(config.data.root) == "/a folder/of=scans"
    assert config.data.target_sites == ("a", "b")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("numrounds=3", "must name a known key, got 'numrounds'; nearest: num_rounds"),
        ("root=/x", "got 'root'; nearest: data.root"),
        ("objective.temprature=3", "nearest: objective.temperature"),
        ("objective=simclr", r"objective must be one of .*, got 'simclr'"),
        ("encoder=desnet121", "got 'desnet121'; nearest: densenet121"),
        ("num_rounds=0", "num_rounds must be at least 1, got 0; 0 goes with start="),
        ("num_rounds=many", "num_rounds: .*valid integer.*got 'many'"),
        ("encoder.width=x", "encoder.width: .*got 'x'"),
        ("+surprise=1", "surprise is no known key"),
        ("+objective.margin=1", "objective yaware has no setting 'margin'"),
        ("objective.temperature=-1", "temperature must be positive and finite, got -1"),
        ("debias.weight=0", "use debias=erasure or none without it"),
        ("views.cutout_fraction=2", "cutout_fraction must be between 0 and 0.9, got 2"),
        ("warmup_rounds=100", "warmup_rounds must be less than num_rounds, got 100 and"),
        ("debias.warmup_rounds=100", "debias.warmup_rounds must be less than num_rounds"),
        ("privacy=clip_and_noise privacy.clip_norm=inf privacy.noise_multiplier=1", "clip_norm must be finite when noise"),
        ("privacy=clip_and_noise privacy.clip_norm=0", "clip_norm must be positive"),
        ("finetune.num_rounds=0", "finetune: num_rounds must be at least 1 when there are stages"),
        ("experiment=mcic", "data.root must be given, got nothing"),
        ("name=a/b", "name: .*got 'a/b'"),
        ("data.pretrain_sites=['../x']", "data.pretrain_sites"),
        ("objective=ntxent objective.kernel.shape=rbf", "objective.kernel.shape is no setting of objective=ntxent"),
        ("experiment=roi debias=fairkl debias=erasure debias.weight=3", "debias.weight is no setting of debias=erasure"),
        ("objective.kernel.shape=box", "objective.kernel.shape: Input should be 'rbf'"),
        ("objective.kernel.bandwidths.age_years=-1", "bandwidth of age_years must be 0 or positive and finite, got -1"),
        ("objective.kernel.bandwidths.age_years=null", "bandwidths must name at least one label"),
        ("+objective.kernel.bandwidths.diagnosis=0", "got 'diagnosis': pretraining sees healthy scans only"),
        ("+objective.kernel.bandwidths.height=3", "label must be one of .*got 'height'"),
        ("objective=supcon objective.bin_width=null", "bin_width must be given with label age_years"),
        ("objective=eps_supinfonce objective.label=diagnosis", "pretraining sees healthy scans only"),
        ("objective=supcon objective.margin=30", "margin must be between 0 and 20, got 30"),
        ("objective=decoupled_conditional objective.confidence=votes", "confidence must be null, got 'votes'"),
        ("objective=decoupled_conditional objective.label=age_years", "label must be a class, got 'age_years'"),
        ("objective=joint objective.weak.name=joint", "joint has no setting 'kernel'"),
        ("objective=joint +objective.weak.colour=3", "objective yaware has no setting 'colour'"),
        ("debias.kernel.bandwidths.age_years=0", "age_years must be positive or null when sites exchange moments"),
        ("debias.divergence=js", "debias.divergence: Input should be 'kl'"),
        ("debias.space=x", "debias.space: Input should be 'h', 'z' or 'both'"),
        ("sampling.multi_instance=maybe", "sampling.multi_instance"),
        ("encoder=mlp", "encoder must be for images, as data are, got one for table; add encoder=small views=brain"),
        ("views=table", "views must be for images, as data are, got one for table"),
        ("experiment=roi data.table=/x views=brain", "views must be for table, as data are, got one for images; add encoder=mlp"),
        ("experiment=roi", "data.table must be given, got nothing"),
        ("experiment=roi data.table=/x data.root=/y", "data.root is no setting of"),
        ("experiment=roi data.table=/x +data.shape=[1,1,1]", "data.shape is no setting of the chosen data, 'roi'"),
        ("experiment=roi data.table=/x encoder.depth=0", "encoder: depth must be from 1 to 16, got 0"),
        ("experiment=roi data.table=/x views.noise_sd=-1", "views: noise_sd must be between 0 and 10, got -1"),
        ("experiment=roi data.table=/x data.columns.colour=x", "got 'data.columns.colour'"),
        ("experiment=roi data.table=/x data.columns.ignore=age", "data.columns.ignore: .*got 'age'"),
        ("experiment=roi data.table=/x 'data.columns.site_pattern=\"x(\"'", "site_pattern must be a regular expression"),
        ("experiment=roi data.table=/x data.columns.site_pattern=abc", "must have one group, the site's name, got 'abc' with 0"),
        (
            "experiment=roi data.table=/x data.columns.females=[2] data.columns.males=[2.0,1]",
            "females and males must have no code in common, got '2.0' in both",
        ),
        ("data.unseen_sites=[a]", "unseen_sites must be empty when pretrain_sites are named"),
        ("data.fractions=[0.5,0.2,0.2]", r"fractions of train, val and test must sum to 1, .* got \[0.5, 0.2, 0.2\]"),
        ("data.fractions=[0,0.5,0.5]", "train not 0"),
        ("+data.kind=film", "data.kind"),
        ("_target_=os.system", "must name a known key, got '_target_'"),
    ],
)
def test_mistakes_are_one_line_that_helps(overrides: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load_config(overrides)
    assert "\n" not in str(error.value)


def test_what_is_stored_names_no_folder() -> None:
    stored = describe(load_config("data.root=/secret/folder output=/another seed=7"))
    assert "secret" not in str(stored)
    assert "another" not in str(stored)
    assert stored["objective"] == {
        "name": "yaware",
        "temperature": 0.1,
        "kernel": {"shape": "rbf", "bandwidths": {"age_years": 5.0, "sex": None}},
        "released": None,
    }
    assert stored["seed"] == 7
    table = describe(load_config("experiment=roi data.table=/secret/table.csv data.participants=/secret/people.csv"))
    assert "secret" not in str(table)
    assert table["data"]["columns"]["features"] is None


def test_a_configuration_is_composed_once() -> None:
    assert load_config("seed=3") is load_config(["seed=3"])
    assert load_config("seed=3") is not load_config("seed=4")


def test_the_weight_of_debiasing_rises_after_its_warm_up() -> None:
    debias = DebiasConfig(name="fairkl", weight=2.0, warmup_rounds=2, exchange_every=3)
    assert [debias.weight_in_round(r) for r in range(1, 7)] == [0.0, 0.0, 1.0, 2.0, 2.0, 2.0]
    assert [r for r in range(1, 13) if debias.exchanges_in_round(r)] == [3, 6, 9, 12]
    assert not any(DebiasConfig(name="none").exchanges_in_round(r) for r in range(1, 13))


@pytest.mark.parametrize("folder", ["/data/hôpital nord", "/a'b", 'C:\\\\x\\"y', "/x\\", "/{a}=[b],$c", "/\U0001f9e0"])
def test_any_folder_can_be_written_as_an_override(folder: str) -> None:
    overrides = ["data=folder", f"data.root={quoted(folder)}"]
    assert str(load_config(overrides).data.root) == folder
    assert str(load_config(shlex.join(overrides)).data.root) == folder


def test_a_setting_of_another_choice_is_told_from_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"encoder.width is no setting of the chosen encoder, 'resnet18'; .* '~encoder.width'"):
        load_config("experiment=tiny encoder=resnet18")
    assert load_config("experiment=tiny encoder=resnet18 ~encoder.width").encoder.name == "resnet18"


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_no_experiment_fine_tunes_where_that_is_switched_off(experiment: str) -> None:
    place = {"abide": "data.table=/x", "ixi": "data.table=/x", "roi": "data.table=/x", "tiny": ""}.get(experiment, "data.root=/x")
    assert load_config(f"experiment={experiment} finetune=none {place}").finetune.stages == ()
