"""Nets: no BatchNorm, the announced width, the same weights for the same seed; checkpoints; hardening."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from core.config import load_config
from core.models import Classifier, SmallEncoder, assert_no_batchnorm, build_classifier, build_pretrainer
from core.privacy import harden
from core.settings import ClipAndNoise, NoHardening


@pytest.mark.parametrize(("name", "features"), [("small", 128), ("resnet18", 512), ("densenet121", 1024)])
def test_encoders_have_no_batchnorm_and_train(name: str, features: int) -> None:
    config = load_config(f"encoder={name}")
    model = build_pretrainer(config.encoder, 8, 0)
    assert model.encoder.num_features == features
    assert not [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    volumes = torch.rand(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    h, z = model(volumes)
    assert (h.shape, z.shape) == ((2, features), (2, 8))
    # Scans do not see each other: a scan alone gives what it gives in a batch.
    alone, _ = model(volumes[:1])
    assert torch.allclose(alone[0], h[0], atol=1e-4)
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_batchnorm_is_refused() -> None:
    with pytest.raises(ValueError, match="got BatchNorm3d at '1'"):
        assert_no_batchnorm(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2)))


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    config = load_config()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (build_pretrainer(config.encoder, 8, s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_classifier_gives_logits() -> None:
    model = build_classifier(load_config("encoder.width=2").encoder, 2, 0)
    assert isinstance(model, Classifier)
    assert isinstance(model.encoder, SmallEncoder)
    assert model(torch.rand(3, 1, 16, 16, 16)).shape == (3, 2)


def test_checkpoints_are_read_back_and_old_ones_dropped(tmp_path: Path) -> None:
    state = {"b": torch.rand(2, 3), "a": torch.arange(4)}
    for round_number in range(1, 5):
        path = save_checkpoint(tmp_path, Checkpoint(state, "pretrain", round_number, {"seed": 3}), keep=2)
    save_checkpoint(tmp_path, Checkpoint(state, "untrained", 0, {}), keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "pretrain-0003.safetensors", "pretrain-0004.safetensors", "untrained-0000.safetensors"
    ]  # fmt: skip
    back = load_checkpoint(path)
    assert (back.stage, back.round_number, back.config) == ("pretrain", 4, {"seed": 3})
    assert all(torch.equal(value, back.state[name]) for name, value in state.items())


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be one of Isocenter's"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_hardening_clips_and_adds_noise_of_the_given_size() -> None:
    before = {"w": torch.zeros(20_000), "n": torch.tensor(3)}
    after = {"w": torch.full((20_000,), 0.1), "n": torch.tensor(4)}
    assert harden(after, before, NoHardening()) == after
    clipped = harden(after, before, ClipAndNoise(clip_norm=2.0))
    assert float(clipped["w"].norm()) == pytest.approx(2.0, rel=1e-5)
    assert int(clipped["n"]) == 4
    noised = harden(after, before, ClipAndNoise(clip_norm=2.0, noise_multiplier=0.5))
    assert float((noised["w"] - clipped["w"]).std()) == pytest.approx(1.0, rel=0.05)
    again = harden(after, before, ClipAndNoise(clip_norm=2.0, noise_multiplier=0.5))
    assert not torch.equal(noised["w"], again["w"])
