"""Steps of pretraining in a process of their own: with the memory that a step frees kept for the next, or given back.

It cannot be undone in a process, so the two take turns as processes.
"""

import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

import torch

from core.config import ImageData, load_config
from core.losses import EmbeddedViews
from core.memory import keep_freed_memory
from core.models import build_pretrainer

SCANS = 32
WARM_UP = 2


def take(*, kept: bool, num_steps: int) -> dict[str, float]:
    """Median processor time of a step in milliseconds, median page faults of a step, most memory of the process in MB."""
    torch.set_num_threads(1)
    config = load_config("data.root=none")
    if kept and not keep_freed_memory():
        raise RuntimeError("speed: the C library must be glibc, got another; this process gives memory back as it likes.")
    model = build_pretrainer(config.encoder, config.embedding_size, 0)
    optimiser = torch.optim.AdamW(model.parameters())
    assert isinstance(config.data, ImageData)
    volumes = torch.randn(2 * SCANS, 1, *config.data.shape)
    ages = {"age_years": torch.rand(SCANS) * 60 + 20}
    took_ms, faults = [], []
    for _ in range(WARM_UP + num_steps):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        _, z_RD = model(volumes)
        loss = config.objective.of(EmbeddedViews(z_RD.chunk(2), ages))
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        took_ms.append(1e3 * (time.process_time() - started))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": median(took_ms[WARM_UP:]), "faults": median(faults[WARM_UP:]), "mb": largest}


def in_own_process(*, kept: bool, num_steps: int) -> dict[str, float]:
    """`take` in a process that has done nothing else."""
    command = [sys.executable, "-m", "simulations.speed_steps", "kept" if kept else "given back", str(num_steps)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(take(kept=sys.argv[1] == "kept", num_steps=int(sys.argv[2]))))
