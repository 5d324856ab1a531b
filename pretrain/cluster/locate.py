"""Where a recipe's run lives, for a batch script that may itself run outside the container the recipe is read in."""

from __future__ import annotations

import sys
from pathlib import Path

from data_prep.plain_text import say
from mor_model.errors import ConfigError
from pretrain.errors import UserError
from pretrain.recipe import load_recipe
from pretrain.signals import EXIT_USER


def main(arguments: list[str]) -> int:
    """Print the absolute run folder of RECIPE [section.key=value ...]; returns the exit code."""
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        recipe.network()
    except (UserError, ConfigError) as error:
        say(f"train: {error}", error=True)
        return EXIT_USER
    print(Path(recipe.run_folder).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
