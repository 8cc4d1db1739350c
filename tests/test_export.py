"""Exports: what is in them, what is not, that they give the run's own h everywhere, and what is refused."""

import csv
import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import core
from core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from core.config import describe, load_config
from core.data.volumes import VolumeSettings, _weights, load_volume
from core.erasure import Eraser
from core.evaluation.intervals import Evaluation, write_metrics
from core.export import ExportError, export_run, load_encoder, read
from core.export_bundle import inference
from core.export_card import privacy
from core.models import RowEncoder, Standardise, build_classifier, build_pretrainer

SITES = ("north-hospital", "Oslo", "Saint_3")
GRID = (12, 14, 12)
VOLUMES = (
    "experiment=tiny data=folder data.root=/somewhere encoder.width=2 finetune.stages=[full_finetuning] "
    f"data.pretrain_sites=[{SITES[0]},{SITES[1]}] data.target_sites=[{SITES[2]}] data.shape=[12,14,12] data.voxel_size_mm=8 "
    "'data.pattern=\"Oslo/sub{subject}_T1w.nii.gz\"' data.columns.controls=[hc,oslo]"
)
ROWS = "experiment=roi data.table=/somewhere/t.csv encoder.width=6 encoder.depth=2 debias=erasure num_rounds=3"
FLAT = "experiment=medmnist data.root=/somewhere/x.npz data.spatial=2 encoder=small encoder.width=2"


def random_eraser(num_features: int) -> Eraser:
    directions_KF = torch.linalg.qr(torch.randn(num_features, 2, dtype=torch.float64)).Q.T.contiguous()
    return Eraser(torch.randn(num_features).double(), torch.rand(num_features).double() + 0.5, directions_KF)


def write_run(folder: Path, overrides: str, *, num_inputs: int = 1, spatial_dims: int = 3, eraser: bool = True) -> nn.Module:
    """A run's folder with random weights, as the server leaves it; the pretrained model."""
    torch.manual_seed(0)
    config = load_config(overrides)
    given = {"num_inputs": num_inputs, "spatial_dims": spatial_dims}
    model = build_pretrainer(config.encoder, config.embedding_size, 1, **given).eval()
    if isinstance(model.encoder, RowEncoder):
        model.encoder.standardise = Standardise(num_inputs, 1)
        for value in model.encoder.standardise.parameters():
            value.data = torch.rand(value.shape) + 0.5
    plain = describe(config)
    checkpoints = folder / "checkpoints"
    for number in (config.num_rounds - 1, config.num_rounds):
        save_checkpoint(checkpoints, Checkpoint(dict(model.state_dict()), "pretrain", number, plain), keep=2)
    if eraser:
        state = dict(vars(random_eraser(model.encoder.num_features)))
        save_checkpoint(checkpoints, Checkpoint(state, "eraser", config.num_rounds, plain), keep=1)
    classifier = build_classifier(config.encoder, config.finetune.target.num_outputs, 2, **given)
    if isinstance(model.encoder, RowEncoder):
        classifier.encoder = model.encoder
    save_checkpoint(checkpoints, Checkpoint(dict(classifier.state_dict()), "full_finetuning", 1, plain), keep=1)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run over volumes at three sites, with figures."""
    folder = tmp_path / "runs" / "oslo_trial"
    write_run(folder, f"{VOLUMES} name=oslo_trial")
    roles = {"pretraining": SITES[:2], "target": SITES[2:], "unseen": SITES[2:]}
    (folder / "roles.json").write_text(json.dumps(roles))
    counts = ((43, 51, 2, "pretraining"), (12, 12, 1, "pretraining"), (7, 9, 1, "target"))
    table = [
        {"name": name, "subjects": subjects, "scans": scans, "scanners": scanners, "role": role, "problems": {}}
        for name, (subjects, scans, scanners, role) in zip(SITES, counts, strict=True)
    ]
    (folder / "sites.json").write_text(json.dumps(table))
    (folder / "rounds.jsonl").write_text(json.dumps({"stage": "pretrain", "round": 1, "sites": {SITES[0]: {}}}) + "\n")

    def figure(stage: str, task: str, metric: str, value: float, site: str = "all") -> Evaluation:
        spread = None if stage == "chance" else 0.125
        low, high = (None, None) if spread is None else (value - spread, value + spread)
        names = {"stage": stage, "task": task, "metric": metric, "value": value, "low": low, "high": high}
        return Evaluation(**names, regime="federated", site=site, num_subjects=23, seed=0)

    figures = [
        figure("erased", "site", "balanced_accuracy", 0.5),
        figure("age_sex_floor", "site", "balanced_accuracy", 0.375),
        figure("chance", "site", "balanced_accuracy", 0.25),
        figure("erased", "age", "mae", 7.5),
        figure("erased", "age", "mae", 9.5, site=SITES[1]),
        figure("erased", "diagnosis", "auc", 0.625),
        figure("full_finetuning", "diagnosis", "auc", 0.75),
    ]
    write_metrics(folder / "metrics.json", figures)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """What torch says of TorchScript, and what MONAI says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def scripted(path: Path) -> Callable[[Tensor], Tensor]:
    with quiet():
        return torch.jit.load(path)


def own_h(run: Path, inputs: Tensor, *, erased: bool = True) -> Tensor:
    """h by the run's own parts, built as the server builds them."""
    checkpoint = load_checkpoint(max((run / "checkpoints").glob("pretrain-*")))
    config = load_config(VOLUMES)
    model = build_pretrainer(config.encoder, config.embedding_size, 5).eval()
    model.load_state_dict(checkpoint.state)
    h_NF = model.encoder(inputs)
    (eraser,) = (run / "checkpoints").glob("eraser-*")
    return Eraser(**load_checkpoint(eraser).state)(h_NF) if erased else h_NF


def test_every_way_to_load_gives_the_runs_own_h(run: Path) -> None:
    out, inputs = export_run(run), torch.rand(3, 1, *GRID)
    checkpoint = max((run / "checkpoints").glob("pretrain-*"))
    before = torch.random.get_rng_state()
    with torch.no_grad():
        for path in (out, out / "encoder.safetensors", run, checkpoint, str(run)):
            encoder = load_encoder(path)
            assert not encoder.training
            assert encoder.num_features == 32
            assert torch.equal(encoder(inputs), own_h(run, inputs))
            assert torch.equal(load_encoder(path, erased=False)(inputs), own_h(run, inputs, erased=False))
        module, encoder = scripted(out / "encoder.pt"), core.load_encoder(out)
        for size in (1, 3):
            torch.testing.assert_close(module(inputs[:size]), encoder(inputs[:size]), rtol=0, atol=1e-6)
    assert torch.equal(torch.random.get_rng_state(), before)
    # The eraser of the last round is not that of an earlier one.
    first = min((run / "checkpoints").glob("pretrain-*"))
    assert torch.equal(load_encoder(first)(inputs), own_h(run, inputs, erased=False))


def test_an_export_is_a_checkpoint_that_tells_how_to_use_it(run: Path) -> None:
    checkpoint = load_checkpoint(export_run(run) / "encoder.safetensors")
    assert (checkpoint.stage, checkpoint.round_number) == ("pretrain", 2)
    assert {name.partition(".")[0] for name in checkpoint.state} == {"encoder", "eraser"}
    about = read(run / "export" / "encoder.safetensors").about
    told = {key: about[key] for key in ("format", "encoder", "num_inputs", "spatial_dims", "num_features", "rounds", "target")}
    assert told == {
        "format": 1,
        "encoder": {"name": "small", "width": 2},
        "num_inputs": 1,
        "spatial_dims": 3,
        "num_features": 32,
        "rounds": 2,
        "target": None,
    }
    wanted = {"kind": "images", "voxel_size_mm": 8.0, "shape": list(GRID), "normalisation": "robust", "stored": "float16"}
    assert about["input"] == wanted
    assert about["erased_directions"] == {"inputs": 0, "h": 2}
    assert about["config"] == json.loads((run / "export" / "config.json").read_text())
    assert about["objective"]["name"] == "yaware"


def test_a_stage_is_exported_with_its_head(run: Path) -> None:
    out = export_run(run, run.parent / "for others", stage="full_finetuning")
    state = load_checkpoint(out / "encoder.safetensors").state
    wanted = load_checkpoint(run / "checkpoints" / "full_finetuning-0001.safetensors").state
    assert state.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in state.items())
    card = (out / "README.md").read_text()
    assert 'target kind "binary", labels ["diagnosis"]' in card
    assert "| diagnosis | auc | 0.75 [0.62, 0.88] |" in card
    assert "0.50" not in card


def test_a_decoder_is_exported_as_a_head_that_is_not_linear(run: Path) -> None:
    stored = load_checkpoint(run / "checkpoints" / "full_finetuning-0001.safetensors")
    state = {name: value for name, value in stored.state.items() if not name.startswith("head.")}
    state["head.up.0.weight"] = torch.rand(2, 3)
    save_checkpoint(run / "checkpoints", Checkpoint(state, "full_finetuning", 2, stored.config), keep=1)
    out = export_run(run, stage="full_finetuning")
    assert torch.equal(load_checkpoint(out / "encoder.safetensors").state["head.up.0.weight"], state["head.up.0.weight"])
    assert "the decoder that was trained to segment" in (out / "README.md").read_text()


def test_no_site_and_no_path_is_in_any_file(run: Path, tmp_path: Path) -> None:
    # A site that fine-tuned alone gives its checkpoint its name.
    alone = load_checkpoint(run / "checkpoints" / "full_finetuning-0001.safetensors")
    save_checkpoint(run / "checkpoints", Checkpoint(alone.state, "full_finetuning-Oslo", 4, alone.config), keep=1)
    for stage in (None, "full_finetuning-Oslo"):
        out = export_run(run, tmp_path / f"out {stage}", stage=stage)
        for path in [path for path in out.rglob("*") if path.is_file()]:
            content = path.read_bytes().lower()
            for secret in (*SITES, str(tmp_path), str(Path.cwd()), "/somewhere", "site-packages"):
                assert secret.lower().encode() not in content, (path.name, secret)
    config = json.loads((out / "config.json").read_text())
    assert config["name"] is None
    assert config["data"]["columns"]["controls"] == ["hc"]
    assert {"pretrain_sites", "unseen_sites", "target_sites", "pattern"} & config["data"].keys() == set()
    assert "one site alone" in (out / "README.md").read_text()


def test_card_tells_rounded_counts_and_figures_beside_their_floor(run: Path) -> None:
    card = (export_run(run) / "README.md").read_text()
    rows = [
        "| site 1 | pretraining | 45 | 50 | 2 |",
        "| site 2 | pretraining | 10 | 10 | 1 |",
        "| site 3 | target | <10 | <10 | 1 |",
    ]
    assert [line for line in card.splitlines() if line.startswith("| site ") and "balanced" not in line] == rows
    assert "| site | balanced_accuracy | 0.50 [0.38, 0.62] | 0.38 [0.25, 0.50] | 0.25 | 25 |" in card
    assert "| age | mae | 7.5 [7.4, 7.6] |" in card
    assert "[9.4" not in card
    assert "| diagnosis | auc | 0.62 [0.50, 0.75] |" in card
    for word in (
        "no medical device",
        "Choose one before you publish",
        "No differential privacy is claimed",
        "12, 14, 12",
        "8 mm",
    ):
        assert word in card


def test_card_says_what_a_run_did_not_leave(run: Path) -> None:
    (run / "sites.json").unlink()
    (run / "metrics.json").unlink()
    card = (export_run(run) / "README.md").read_text()
    assert "no sites.json, so that only roles are known: 2 pretraining, 1 target, 1 unseen" in card
    assert "no metrics.json: nothing was evaluated" in card


@pytest.mark.parametrize(
    ("chosen", "spent", "told"),
    [
        ("clip_and_noise privacy.noise_multiplier=0.5", {}, "No differential privacy is claimed. Every update"),
        ("dp_sgd", {}, "No differential privacy is claimed: the run asked for"),
        ("dp_sgd", {"epsilon": 3.21, "delta": 1e-5}, "this stage is (3.21, 1e-05)-differentially private for a subject"),
        ("dp_sgd", {"epsilon": None, "delta": 1e-5}, "No differential privacy is claimed: the run asked for"),
    ],
)
def test_card_claims_the_privacy_that_was_spent(tmp_path: Path, chosen: str, spent: dict[str, float], told: str) -> None:
    config = {"privacy": {"name": chosen.partition(" ")[0], "clip_norm": 1.0}}
    line = {"stage": "full_finetuning", "round": 1, "sites": {}, "privacy": {"a": spent} if spent else {}}
    (tmp_path / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    assert told in privacy(tmp_path, {"config": config, "stage": "full_finetuning", "head": "linear"})
    if "dp_sgd" in chosen:
        plain = privacy(tmp_path, {"config": config, "stage": "pretrain", "head": None})
        assert plain.startswith("No differential privacy is claimed for these weights.")


def test_rows_are_exported_with_their_standardisation(tmp_path: Path) -> None:
    model = write_run(tmp_path, ROWS, num_inputs=5, eraser=False)
    out, rows = export_run(tmp_path), torch.randn(3, 5)
    rows[1, 2] = torch.nan
    with torch.no_grad():
        wanted = model.encoder(rows)
        for encoder in (load_encoder(tmp_path), load_encoder(out)):
            assert torch.equal(encoder(rows), wanted)
        for size in (1, 3):
            torch.testing.assert_close(scripted(out / "encoder.pt")(rows[:size]), wanted[:size], rtol=0, atol=1e-6)
    card = (out / "README.md").read_text()
    assert "Rows (N, 5)" in card
    assert "There is no MONAI bundle" in card
    assert not (out / "bundle").exists()


def test_flat_images_with_channels_are_exported(tmp_path: Path) -> None:
    model = write_run(tmp_path, FLAT, num_inputs=3, spatial_dims=2)
    out, images = export_run(tmp_path), torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(load_encoder(out, erased=False)(images), model.encoder(images))
        torch.testing.assert_close(scripted(out / "encoder.pt")(images), load_encoder(out)(images), rtol=0, atol=1e-6)
    assert "Images (N, 3, X, Y)" in (out / "README.md").read_text()
    assert not (out / "bundle").exists()


def test_torch_and_safetensors_are_enough_to_load(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, inputs = export_run(run), torch.rand(2, 1, *GRID)
    wanted = load_encoder(out)(inputs)
    checkpoint = load_checkpoint(out / "encoder.safetensors")
    of_monai = Checkpoint(checkpoint.state, "pretrain", 1, checkpoint.config | {"encoder": {"name": "densenet121"}})
    path = save_checkpoint(run.parent, of_monai, keep=1)
    allowed = {"torch", "safetensors", "core", *sys.stdlib_module_names}

    class Refusing:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name.partition(".")[0] not in allowed:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in list(sys.modules):
        if name == "core" or name.startswith(("core.", "monai.")):
            monkeypatch.delitem(sys.modules, name)
    for name in ("numpy", "pydantic", "hydra", "omegaconf", "monai", "nibabel", "pandas", "sklearn", "scipy", "flwr", "typer"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    alone = importlib.import_module("core")
    assert alone is not core
    assert torch.equal(alone.load_encoder(out)(inputs), wanted)
    assert torch.equal(alone.load_encoder(run)(inputs), wanted)

    with pytest.raises(ValueError, match=r"densenet121 is a net of MONAI, and monai is not installed.*encoder\.pt"):
        alone.load_encoder(path)


@pytest.mark.slow
def test_monai_runs_the_bundle_to_the_same_h(run: Path, tmp_path: Path, write_site: Callable[..., None]) -> None:
    out = export_run(run)
    write_site(tmp_path / "site", seed=3, healthy=2)
    with quiet():
        from monai.bundle import ConfigWorkflow

        configs = out / "bundle" / "configs"
        workflow = ConfigWorkflow(
            config_file=str(configs / "inference.json"),
            meta_file=str(configs / "metadata.json"),
            workflow_type="infer",
            logging_file=False,
            bundle_root=str(out / "bundle"),
            dataset_dir=str(tmp_path / "site"),
        )
        workflow.initialize()
        workflow.run()
    encoder = load_encoder(out)
    settings = VolumeSettings(voxel_size_mm=8, shape=GRID, normalisation="robust")
    rows = list(csv.reader((out / "bundle" / "output" / "h.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2
    for path, *h in rows:
        volume = torch.from_numpy(load_volume(Path(path), settings).astype(np.float16)).float()
        with torch.no_grad():
            wanted = encoder(volume[None, None])[0]
        torch.testing.assert_close(torch.tensor([float(value) for value in h]), wanted, rtol=0, atol=1e-4)


def test_bundle_resamples_as_the_cache_does() -> None:
    """The bundle's weights along an axis against the cache's, for coarser, finer, equal and much finer voxels."""
    config = inference({"voxel_size_mm": 4.0, "shape": [40, 48, 40], "normalisation": "robust", "stored": "float16"})
    names = ("num_inside", "cropping", "positions_mm", "block", "tents", "interpolation", "weights")
    known: dict[str, object] = {"torch": torch, "math": math, "voxel_mm": 4.0}
    for name in names:
        known[name] = eval(config[name].removeprefix("$").replace("@", ""), known)
    for num_stored, stored_mm in ((192, 1.0), (160, 1.33), (30, 6.0), (181, 0.9), (50, 4.1), (2, 3.0)):
        for wanted in (40, 41):
            found = known["weights"](num_stored, wanted, stored_mm, False)  # type: ignore[operator]
            expected = _weights(num_stored, stored_mm, len(found), 4.0)
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
            assert (wanted - len(found)) % 2 == 0


def damaged(run: Path, what: str) -> None:
    path = max((run / "checkpoints").glob("pretrain-*"))
    stored = load_checkpoint(path)
    state, config = dict(stored.state), stored.config
    if what == "not finite":
        state["encoder.stages.0.0.weight"] = state["encoder.stages.0.0.weight"] * torch.nan
    elif what == "another encoder":
        config = config | {"encoder": {"name": "small", "width": 4}}
    elif what == "unknown encoder":
        config = config | {"encoder": {"name": "transformer"}}
    elif what == "cut off":
        path.write_bytes(path.read_bytes()[:-9])
        return
    save_checkpoint(path.parent, Checkpoint(state, stored.stage, stored.round_number, config), keep=2)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("not finite", r"pretrain-0002.safetensors: weights must be finite, encoder.stages.0.0.weight and 0 others are not"),
        ("another encoder", r"its weights must be those of Small\(name='small', width=4\)"),
        ("unknown encoder", r"the encoder must be one of \['densenet121', 'mlp', 'resnet18', 'small'\]"),
        ("cut off", r"must be a whole .safetensors file"),
    ],
)
def test_a_damaged_checkpoint_is_refused(run: Path, what: str, sentence: str) -> None:
    damaged(run, what)
    with pytest.raises(ExportError, match=sentence):
        export_run(run)
    with pytest.raises(ExportError, match=sentence):
        load_encoder(run)
    assert not (run / "export").exists()


def test_another_format_is_refused(run: Path) -> None:
    from safetensors.torch import save_file

    path = run / "checkpoints" / "pretrain-0009.safetensors"
    about = {"format": 2, "stage": "pretrain", "round": 9, "config": {}, "versions": {"isocenter": "3.0.0"}}
    save_file({"x": torch.zeros(1)}, path, {"isocenter": json.dumps(about)})
    with pytest.raises(ExportError, match=r"the format must be 1, got 2\. Use the Isocenter that wrote it, 3\.0\.0"):
        export_run(run)
    save_file({"x": torch.zeros(1)}, path, {"made by": "another"})
    with pytest.raises(ExportError, match=r"a checkpoint or an export of Isocenter, got the metadata \['made by'\]"):
        load_encoder(path)


def test_what_is_no_run_and_what_is_there_is_refused(run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ExportError, match="it must be the folder of a run"):
            export_run(folder)
    with pytest.raises(ExportError, match=r"\['full_finetuning', 'pretrain'\], got 'linear_probe'"):
        export_run(run, stage="linear_probe")
    with pytest.raises(ExportError, match="it must hold an encoder, got the stage 'eraser'"):
        load_encoder(next((run / "checkpoints").glob("eraser-*")))
    kept = tmp_path / "mine" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    for output in (kept.parent, kept):
        with pytest.raises(ExportError, match="the output folder must be new or empty"):
            export_run(run, output)
    assert [path.name for path in kept.parent.iterdir()] == ["thesis.txt"]
    assert kept.read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert export_run(run, empty) == empty
    with pytest.raises(ExportError, match="must be new or empty"):
        export_run(run, empty)


def test_a_real_run_is_exported(consortium: Path, federate: Callable[..., Path]) -> None:
    run = federate(consortium, "evaluation=none local_steps=1 num_rounds=1", name="real")
    out = export_run(run)
    inputs = torch.rand(1, 1, 22, 26, 22)
    with torch.no_grad():
        assert torch.equal(load_encoder(out)(inputs), load_encoder(run)(inputs))
    assert not any(path.name.startswith(".") for path in run.iterdir())
    assert (run / "checkpoints").is_dir()
