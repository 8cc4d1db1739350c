"""Rounds of NVFlare in separate processes on 127.0.0.1: `python nvflare_round.py FOLDER PORT ROUNDS SITES`, in its own Python.

Its proof-of-concept environment: a provisioned server and clients with certificates, each a process of its own, and a process
for the job at each. NVFlare's own recipe of federated averaging exchanges the whole state of MONAI's DenseNet121 as NumPy arrays.
"""

import json
import sys
from pathlib import Path

DENSENET121 = {
    "class_path": "monai.networks.nets.DenseNet121",
    "args": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2},
}


def write_project(path: Path, port: int, sites: list[str]) -> Path:
    """Who takes part and where the server listens, as NVFlare's provisioning reads it; JSON is YAML."""
    impl = "nvflare.lighter.impl"
    participants = [
        {"name": "server", "type": "server", "org": "peer", "default_host": "localhost", "fed_learn_port": port},
        *({"name": site, "type": "client", "org": "peer"} for site in sites),
        {"name": "admin@nvidia.com", "type": "admin", "org": "peer", "role": "project_admin"},
    ]
    builders = [
        {"path": f"{impl}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
        {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
        {"path": f"{impl}.cert.CertBuilder"},
        {"path": f"{impl}.signature.SignatureBuilder"},
    ]
    project = {"api_version": 3, "name": "peer", "description": "speed", "participants": participants, "builders": builders}
    path.write_text(json.dumps(project), encoding="utf-8")
    return path


def main(folder: Path, port: int, num_rounds: int, sites: list[str]) -> None:
    """Provision, start, run the job to its end; where its logs lie goes to FOLDER/result. The caller ends what still runs."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe.poc_env import PocEnv

    client = Path(__file__).with_name("nvflare_client.py")
    recipe = FedAvgRecipe(
        name="rounds",
        model=DENSENET121,
        min_clients=len(sites),
        num_rounds=num_rounds,
        train_script=str(client),
        train_args=f"--times {folder}",
    )
    project = write_project(folder / "asked.yml", port, sites)
    env = PocEnv(num_clients=len(sites), project_conf_path=str(project), extra={"login_timeout": 60})
    result = env.get_job_result(recipe.execute(env).get_job_id())
    (folder / "result").write_text(str(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
