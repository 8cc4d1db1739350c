"""The MONAI bundle of an export: plain JSON for MONAI to run; nothing of MONAI is imported, and nothing of ours is needed there.

The preprocessing is that of `core.data.volumes.load_volume`, written in MONAI's transforms and short expressions.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from core import __version__

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
CLASS = "target".join("__")
"""The key under which a MONAI configuration names a class. It is written for MONAI, and never read here."""


def bundle_files(about: Mapping[str, Any], module: bytes) -> dict[str, bytes]:
    """The bundle's files by name; none where the encoder does not take volumes that a NIfTI file can hold.

    Args:
        about: what stands beside the exported weights.
        module: the TorchScript file.
    """
    if about["input"]["kind"] != "images":
        return {}
    return {
        "configs/metadata.json": _json(metadata(about)),
        "configs/inference.json": _json(inference(about["input"])),
        "docs/README.md": _README.format(packages=" ".join(f"{name}=={v}" for name, v in packages().items())).encode(),
        "models/model.ts": module,
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def packages() -> dict[str, str]:
    """What the bundle was written for, by package; fire is MONAI's command line."""
    return {name: version(name).partition("+")[0] for name in ("monai", "nibabel", "numpy", "torch")}


def metadata(about: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's metadata.json, with the keys that MONAI's schema of 2024-07-25 requires."""
    installed = packages()
    grid, is_scaled = about["input"]["shape"], about["input"]["normalisation"] == "robust"
    tensor = {"dtype": "float32", "is_patch_data": False}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by Isocenter {__version__}"},
        "monai_version": installed["monai"],
        "pytorch_version": installed["torch"],
        "numpy_version": installed["numpy"],
        "required_packages_version": {"nibabel": installed["nibabel"]},
        "task": "Representation of a brain image",
        "description": (
            f"An encoder pretrained with {about['objective']['name']}: a volume becomes {about['num_features']} numbers."
        ),
        "authors": "to be named before you publish",
        "copyright": "to be chosen before you publish",
        "data_type": "nibabel",
        "intended_use": "Research only. This is no medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": about["num_inputs"],
                    "spatial_shape": list(grid),
                    "value_range": [0, 1] if is_scaled else [],
                    "channel_def": {"0": "image"},
                    **tensor,
                }
            },
            "outputs": {
                "pred": {
                    "type": "feature",
                    "format": "representation",
                    "num_channels": about["num_features"],
                    "spatial_shape": [],
                    "value_range": [],
                    "channel_def": {"0": "representation"},
                    **tensor,
                }
            },
        },
    }


def inference(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's inference.json: every NIfTI file below a folder to one row of a table.

    Args:
        settings: voxel_size_mm, shape, normalisation and stored, as in `core.data.volumes.VolumeSettings`.
    """

    def of(name: str, **arguments: Any) -> dict[str, Any]:
        return {CLASS: name, **arguments}

    def applied(function: str) -> dict[str, Any]:
        return of("Lambdad", keys="image", func=f"@{function}")

    rounding = {
        "float16": "$lambda x: x.half().float()",
        "uint8": "$lambda x: (x * 255).round() / 255",
    }
    return {
        "imports": ["$import glob", "$import math", "$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/output'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "voxel_mm": settings["voxel_size_mm"],
        "grid": list(settings["shape"]),
        "is_same_size": "$lambda sizes_mm: max(abs(s / @voxel_mm - 1) for s in sizes_mm) <= 1e-3",
        "num_inside": (
            "$lambda n, g, s, same: min(n, g) if same else "
            "(lambda size: size + (g - size) % 2)(min(math.ceil(n * s / @voxel_mm - 1e-3), g))"
        ),
        "cropping": "$lambda n, size: torch.eye(n)[(n - size) // 2:(n - size) // 2 + size]",
        "positions_mm": "$lambda size: (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * @voxel_mm",
        "block": "$lambda n, s: min(max(1, math.floor(@voxel_mm / s + 1e-3)), n)",
        "tents": (
            "$lambda n, size, s, b: (1 - (((@positions_mm(size) - (n % b // 2 + (b - 1) / 2 - (n - 1) / 2) * s) / (b * s))"
            ".clamp(0, n // b - 1)[:, None] - torch.arange(n // b)).abs()).clamp(min=0) / b"
        ),
        "interpolation": (
            "$lambda n, size, s, b: torch.nn.functional.pad(@tents(n, size, s, b).repeat_interleave(b, dim=1), "
            "(n % b // 2, n - n % b // 2 - n // b * b)).float()"
        ),
        "weights": (
            "$lambda n, g, s, same: (lambda size: @cropping(n, size) if same else "
            "@interpolation(n, size, s, @block(n, s)))(@num_inside(n, g, s, same))"
        ),
        "resample": (
            "$lambda x: (lambda sizes_mm: torch.einsum('cxyz,ax,by,dz->cabd', x, *(@weights(n, g, s, @is_same_size(sizes_mm)) "
            "for n, g, s in zip(x.shape[1:], @grid, sizes_mm))))([float(s) for s in x.pixdim])"
        ),
        "top": "$lambda v, low, high: np.percentile(v[v > low + 0.1 * (high - low)], 99.5)",
        "scale": (
            "$lambda x: (lambda v: (lambda low, high: ((x - float(low)) / float(@top(v, low, high) - low)).clamp(0, 1))"
            "(*np.percentile(v, (2.0, 98.0))))(x.array)"
        ),
        "round_as_stored": rounding[settings["stored"]],
        "preprocessing": of(
            "Compose",
            transforms=[
                of("LoadImaged", keys="image", reader="NibabelReader", squeeze_non_spatial_dims=True),
                of("EnsureChannelFirstd", keys="image", channel_dim="no_channel"),
                of("Orientationd", keys="image", axcodes="RAS", labels=None),
                applied("resample"),
                *([applied("scale")] if settings["normalisation"] == "robust" else []),
                of("SpatialPadd", keys="image", spatial_size="@grid", method="symmetric"),
                applied("round_as_stored"),
            ],
        ),
        "dataset": of(
            "Dataset",
            data="$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/**/*.nii*', recursive=True))]",
            transform="@preprocessing",
        ),
        "dataloader": of("DataLoader", dataset="@dataset", batch_size=1, num_workers=0),
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device).eval()",
        "inferer": of("SimpleInferer"),
        "saver": of("CSVSaver", output_dir="@output_dir", filename="h.csv"),
        "run": [
            "$[@saver.save_batch(@inferer(batch['image'].as_tensor().to(@device), @network_def), "
            "{'filename_or_obj': batch['image'].meta['filename_or_obj']}) for batch in @dataloader]",
            "$@saver.finalize()",
        ],
    }


_README = """# MONAI bundle of an Isocenter encoder

Every NIfTI file (.nii, .nii.gz) below a folder becomes a row of output/h.csv: its name, then the representation h.

```bash
pip install {packages} fire
python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json --dataset_dir /folder
```

Run it in this folder, or add --bundle_root. MONAI evaluates the expressions in configs/inference.json: read a bundle before you
run it, this one too. There is no evaluator, which would need ignite: the items `dataset`, `preprocessing`, `network_def` and
`inferer` are there by MONAI's names.

## What differs from Isocenter's own preprocessing

The volumes are those of Isocenter up to the order of sums in 32 bits: axes to the nearest right-anterior-superior order, blocks
averaged and interpolated linearly about the image's centre, scaled by the scan's own percentiles, rounded as its cache does.
On five public T1w images and grids of 1.5, 2 and 4 mm no voxel differed by more than a step of that rounding, and no number of
h by more than 2e-5, of up to 1.5. What is not the same:

- MONAI reads what nibabel reads. Isocenter refuses damaged files, images without an orientation or with two that contradict each
  other, with several volumes, or with values that are not finite or all the same; here they pass, or stop with an error of MONAI.
- Isocenter takes the unit of length that the header tells; here it is millimetres.
- A mask that sites applied (data.mask) is not part of an export and is not applied here.
- Files of other kinds (.mgz, .npy) are not read.
"""
