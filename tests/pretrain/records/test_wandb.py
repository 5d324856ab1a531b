"""wandb online, against a server on this machine: a requeued run goes on under its id, and no step is there twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tests.pretrain.records.wandb_server import wandb_server
from tests.pretrain.support import environment, recipe_values

# One start of a run: it tells of steps `first` to `last`.
START = """
import sys
from pathlib import Path
from pretrain.recipe.recipe import load_recipe
from pretrain.records.run_folder import RunFolder
from pretrain.records.telemetry import Telemetry
recipe, run, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
telemetry = Telemetry(RunFolder(run), load_recipe(recipe), 50, active=True)
for step in range(first, last + 1):
    telemetry.record("train", {"step": step, "loss": 1 / step, "parts": {"data": 0.5}})
telemetry.record("validation", {"step": last, "source": "a", "loss": 2.0})
telemetry.close()
"""


def test_a_requeued_run_goes_on_under_its_id(tmp_path: Path, tiny_data: Path) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(tiny_data, run, name="month", logging={"wandb": "online"})))
    with wandb_server() as server:
        variables = {
            **environment(),
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
        }
        # The second start begins at the checkpoint of step 2, and tells of steps 3 and 4 again.
        for first, last in ((1, 4), (3, 6)):
            command = [sys.executable, "-c", START, str(recipe), str(run), str(first), str(last)]
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and not {"fails", "WARNING"} & set(done.stderr.split()), done.stderr
    identity = (run / "wandb_id").read_text(encoding="utf-8")
    assert server.began == [identity, identity] and list(server.history) == [identity]
    rows = [row for row in server.rows(identity) if "train/loss" in row]
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(step, 1 / step) for step in range(1, 7)]
    assert all(row["train/parts/data"] == 0.5 for row in rows)
    assert [row["_step"] for row in server.rows(identity) if "validation/a/loss" in row] == [4, 6]
