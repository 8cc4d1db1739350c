"""What a client of NVFlare does in a round: one SGD step of DenseNet121 on two random volumes of 32^3 voxels."""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn import functional


def main(times: Path) -> None:
    """Train a step for each model received; the clock's time at its beginning and end goes to `times`/SITE.jsonl."""
    import nvflare.client as flare
    from monai.networks.nets import DenseNet121

    flare.init()
    model = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    volumes, classes = torch.randn(2, 1, 32, 32, 32), torch.tensor([0, 1])
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        model.load_state_dict(received.params)
        began = time.time()
        loss = functional.cross_entropy(model(volumes), classes)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        ended = time.time()
        with (times / f"{flare.get_site_name()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": received.current_round, "began": began, "ended": ended}) + "\n")
        flare.send(flare.FLModel(params={name: value.cpu() for name, value in model.state_dict().items()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=Path, required=True)
    main(parser.parse_args().times)
