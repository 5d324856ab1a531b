"""A recipe's run folder, and whether its run is finished: for a batch script, which may run outside the container that
the recipe is read in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_prep.plain_text import say
from mor_model.errors import ConfigError
from pretrain.errors import UserError
from pretrain.ranks.signals import EXIT_FINISHED, EXIT_USER
from pretrain.recipe.recipe import load_recipe
from pretrain.records.finished import unfinished


def main(arguments: list[str]) -> int:
    """Print `run` and `finished` of RECIPE [section.key=value ...] as a JSON object; returns the exit code."""
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        found = {"run": str(Path(recipe.run_folder).resolve()), "finished": not unfinished(recipe)}
    except (UserError, ConfigError) as error:
        say(f"train: {error}", error=True)
        return EXIT_USER
    print(json.dumps(found))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
