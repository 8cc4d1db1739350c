"""A picture of segmented scans: three planes of one held-out scan a site, with the outlines of label map and prediction."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.segmentation import Example

TRUTH, TOLD = "#00bfc4", "#ff6a3d"
INCHES = 2.6


def draw_examples(examples: Sequence[Example]) -> bytes:
    """A PNG with a row for each example, one or more: sagittal, coronal and axial planes through the middle of its label map.

    The label map is outlined in blue, what the model tells in orange; the subject's right, and front, are on the right. It shows
    a person's head and must not leave the site.
    """
    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(3 * INCHES, INCHES * len(examples) + 0.4), layout="constrained")
        axes = figure.subplots(len(examples), 3, squeeze=False)
        for row, example in zip(axes, examples, strict=True):
            for axis, (panel, at) in enumerate(zip(row, example.place, strict=True)):
                plane, truth, told = (np.take(v, at, axis=axis).T for v in (example.image, example.truth, example.told))
                panel.imshow(plane, cmap="gray", origin="lower", interpolation="nearest")
                for outlined, colour in ((truth, TRUTH), (told, TOLD)):
                    for number in np.unique(outlined[outlined > 0]):
                        panel.contour(outlined == number, levels=[0.5], colors=[colour], linewidths=1.0)
                panel.set(xticks=[], yticks=[])
            row[0].set_ylabel(example.site)
        lines = [Line2D([], [], color=TRUTH, label="label map"), Line2D([], [], color=TOLD, label="prediction")]
        figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
        return content.getvalue()
