"""An experiment: several arms that differ only in the named fields, trained under one budget.

    name: quickstart
    base:                      # a recipe's fields; what every arm shares
      budget: {flops: 2.0e+15}
    arms:                      # per arm, what differs: nested or dotted
      vanilla: {model.variant: vanilla}
      mor: {model.variant: mor, model.recursions: 3}

Everything is checked when the file is read; an unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from data_prep.plain_text import plain
from pretrain.errors import RecipeError
from pretrain.evaluation.settings import HELD_OUT_SUITES
from pretrain.recipe.messages import first_problem, nearest, shorten
from pretrain.recipe.overrides import apply_override
from pretrain.recipe.plan import Branch
from pretrain.recipe.recipe import EXCLUSIVE
from pretrain.recipe.sections import MOST_TEXT_BYTES, Listed, Name, Number, Section, Whole
from pretrain.recipe.yaml_input import read_yaml
from pretrain.records.finished import branch_path
from pretrain.records.run_folder import RunFolder

TRAIN_TOKENIZER = "train"
WHOLE_TEXTS = ("perplexity", "routing", "wikitext")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_RUNS = 10_000

# Keys of a recipe that the experiment decides: whether `base` may have them nevertheless, and where they belong.
_DECIDED = {
    "name": (False, "a run is called after its arm; rename the arm, or set the experiment's name"),
    "run_dir": (False, "a run lies in the experiment's folder; set the experiment's runs"),
    "seed": (True, "every arm is trained with the same seeds; list them in the experiment's seeds"),
    "data.path": (True, "all arms read the same text; set the experiment's data.path"),
    "budget.branches": (False, "smaller budgets are the experiment's; list them in its budgets"),
    "evaluation.sequences": (True, "all arms are validated on the same text; set base.evaluation.sequences"),
}


class DataSection(Section):
    """The text all arms read.

    Attributes:
        path: data set folder (shards and manifest). Prepared from `corpus` when it is not there yet.
        corpus: `python-docs`, a path or glob of files, or `hub:NAME`; None when `path` must exist already.
        tokenizer: a tokenizer file or folder, or `train` to train one (sentencepiece BPE with byte fallback) on the
            training split.
        vocab_size: size of the tokenizer to train.
        max_tokens: stop preparing after about this many training tokens; None takes all.
        validation, test: shares of the documents that are held out.
    """

    path: Name | None = None
    corpus: Name | None = None
    tokenizer: Name = TRAIN_TOKENIZER
    vocab_size: Whole = Field(default=8192, ge=300, le=10_000_000)
    max_tokens: Whole | None = Field(default=None, ge=1)
    validation: Number = Field(default=0.01, gt=0, lt=0.5)
    test: Number = Field(default=0.01, gt=0, lt=0.5)


class LaunchSection(Section):
    """How training is started here: by the `deepspeed` launcher with `ranks` processes, or as one process."""

    launcher: Literal["deepspeed", "python"] = "deepspeed"
    ranks: Whole = Field(default=1, ge=1, le=4096)

    @model_validator(mode="after")
    def _one_process_without_a_launcher(self) -> LaunchSection:
        if self.launcher == "python" and self.ranks != 1:
            raise ValueError(
                f"launcher 'python' is one process, not {self.ranks}; set ranks to 1 or launcher to 'deepspeed'"
            )
        return self


class EvaluationSection(Section):
    """What every trained arm is measured on.

    Attributes:
        suites: of `mor eval`; `all` for every one.
        limit: most questions of each few-shot task. Suites that read whole texts (`WHOLE_TEXTS`) are not limited by it.
        text_bytes: held-out text that perplexity reads; None for `mor eval`'s own default.
        hub: benchmarks without local files are read from the Hugging Face hub where it answers.
    """

    suites: Annotated[tuple[Name, ...], Listed] = HELD_OUT_SUITES
    limit: Whole | None = Field(default=None, ge=1)
    text_bytes: Whole | None = Field(default=None, ge=1, le=MOST_TEXT_BYTES)
    hub: bool = False

    def limit_of(self, suite: str) -> int | None:
        """Most questions of each task of this suite."""
        return None if suite in WHOLE_TEXTS else self.limit


class Experiment(Section):
    """One comparison.

    Attributes:
        name: short name; letters, digits, `.`, `_`, `-`.
        title, description: what the report's heading says.
        runs: folder of the arms' run folders and the report; `runs/NAME` by default.
        data, launch, evaluation: see the sections.
        base: fields of a recipe shared by all arms, nested or dotted; `seed` and `budget` stand here.
        arms: name to the recipe fields in which the arm differs. What all runs must have in common or the experiment
            decides itself (seed, folder, text) is refused here.
        labels: name to what tables and pictures call the arm.
        reference: the arm others are compared with; the first by default.
        seeds: each arm is trained once per seed; empty for the base's own seed alone.
        budgets: training FLOPs; each arm has a run for each; empty for the base's own budget alone. With a
            warm-up-stable-decay schedule the largest is trained and the others branch off it with a decay of their own.
    """

    name: str
    title: str | None = None
    description: str = ""
    runs: Name | None = None
    data: DataSection = DataSection()
    launch: LaunchSection = LaunchSection()
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    labels: dict[str, str] = Field(default_factory=dict)
    reference: str | None = None
    seeds: Annotated[tuple[Annotated[Whole, Field(ge=0)], ...], Listed] = ()
    budgets: Annotated[tuple[Annotated[Number, Field(gt=0)], ...], Listed] = ()
    evaluation: EvaluationSection = EvaluationSection()

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        _check_file_name(name)
        return name

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        self._check_arms()
        if len(set(self.seeds)) != len(self.seeds) or len(set(self.budgets)) != len(self.budgets):
            raise ValueError("seeds and budgets: each value once")
        runs = len(self.arms) * max(1, len(self.seeds)) * max(1, len(self.budgets))
        if runs > _MOST_RUNS:
            raise ValueError(f"arms x seeds x budgets are {runs:,} runs, more than {_MOST_RUNS:,}; leave some out")
        self._check_keys()
        folders: dict[Path, Trial] = {}
        for trial in self.trials():
            other = folders.setdefault(trial.folder, trial)
            if other is not trial:
                raise ValueError(
                    f"the runs of arm {other.arm!r} and of arm {trial.arm!r} would both be {trial.folder}; rename an "
                    "arm, or choose budgets that differ in their first six digits"
                )
        return self

    def _check_arms(self) -> None:
        if not self.arms:
            raise ValueError("arms: name at least one")
        for name in self.arms:
            _check_file_name(name, "arms: ")
            if name in ("report", "recipes", "logs"):
                raise ValueError(f"arms: {name!r} is a folder of the experiment's own; call the arm something else")
        named = [("labels", name) for name in self.labels]
        named += [] if self.reference is None else [("reference", self.reference)]
        for where, name in named:
            if name not in self.arms:
                raise ValueError(f"{where}: there is no arm {shorten(name)}; {nearest(name, self.arms)}")

    def _check_keys(self) -> None:
        """Refuse keys of `base` and arms that the experiment decides; all others go into the recipes unchanged."""
        for place, values in (("base", self.base), *((f"arms.{name}", arm) for name, arm in self.arms.items())):
            for key, (base_may, why) in _DECIDED.items():
                if _has(values, key) and not (base_may and place == "base"):
                    raise ValueError(f"{place}.{key}: {why}")
            if self.budgets and "budget" in values:
                raise ValueError(f"budgets: {place}.budget is given too; keep one of them")
            if _has(values, "data.sources") and (self.data.path is not None or self.data.corpus is not None):
                raise ValueError(f"data: {place}.data.sources names the text too; keep one of them")
        if self.data.path is not None and _has(self.base, "data.path"):
            raise ValueError("data.path: base.data.path is given too; keep one of them")
        if self.seeds and "seed" in self.base and self.base["seed"] not in self.seeds:
            raise ValueError(f"seeds: base.seed ({shorten(self.base['seed'])}) is not one of them; add it or remove it")

    @property
    def folder(self) -> Path:
        return Path(self.runs or f"runs/{self.name}").expanduser()

    @property
    def report_folder(self) -> Path:
        return self.folder / "report"

    @property
    def reference_arm(self) -> str:
        return self.reference or next(iter(self.arms))

    @property
    def data_path(self) -> Path:
        path = self.data.path or (self.base["data"]["path"] if _has(self.base, "data.path") else None)
        return Path(path or f"data/{self.name}")

    @property
    def source_folders(self) -> list[Path]:
        """Data sets of a mixture, which is prepared already; empty where the text is that of `data_path`."""
        data = self._arm_values(self.reference_arm).get("data")
        sources = data.get("sources") if isinstance(data, dict) else None
        if not isinstance(sources, list):
            return []
        return [Path(str(source["path"])) for source in sources if isinstance(source, dict) and "path" in source]

    def label(self, arm: str) -> str:
        return self.labels.get(arm, arm)

    def trials(self, arms: list[str] | None = None) -> list[Trial]:
        """Every run of the experiment, arm by arm inside a budget and a seed.

        Args:
            arms: only these; all by default.

        Raises:
            RecipeError: for an arm the experiment does not have.
        """
        for arm in arms or []:
            if arm not in self.arms:
                raise RecipeError(f"there is no arm {shorten(arm)} in {self.name}; {nearest(arm, self.arms)}")
        return [
            self._trial(arm, seed, budget)
            for budget in sorted(self.budgets) or (None,)
            for seed in self.seeds or (self.base.get("seed"),)
            for arm in self.arms
            if arms is None or arm in arms
        ]

    def recipe_values(self, trial: Trial) -> dict[str, Any]:
        """The recipe fields of a run that is no branch: base, then the arm's, then seed, budget, data and folder."""
        values = self._arm_values(trial.arm)
        values |= {"name": trial.folder.name, "run_dir": str(trial.folder)}
        data = values.get("data", {})
        if isinstance(data, dict) and "sources" not in data:
            values["data"] = {"path": str(self.data_path), **data}
        if trial.seed is not None:
            values["seed"] = trial.seed
        if trial.budget is not None:
            values["budget"] = {"flops": trial.budget}
            if self._branches(trial.arm):
                values["budget"]["branches"] = sorted(self.budgets)[:-1]
        return values

    def _arm_values(self, arm: str) -> dict[str, Any]:
        return _merge(self.base, self.arms[arm])

    def _branches(self, arm: str) -> bool:
        """Whether the smaller budgets of this arm branch off the run of the largest one."""
        schedule = self._arm_values(arm).get("schedule")
        kind = schedule.get("kind", "wsd") if isinstance(schedule, dict) else "wsd"
        return len(self.budgets) > 1 and kind == "wsd"

    def _trial(self, arm: str, seed: int | None, budget: float | None) -> Trial:
        """The run and its folder, which is named by what differs from the arm and so stays when seeds are added."""
        branch = None if budget is None else Branch(budget, start=0, steps=0)
        branches = self._branches(arm)
        own_budget = [] if branch is None or branches else [branch.name]
        own_seed = [] if seed == self.base.get("seed") else [f"seed{seed}"]
        folder = self.folder / "-".join([arm, *own_budget, *own_seed])
        if branch is not None and branches and budget != max(self.budgets):
            return Trial(arm, seed, budget, branch_path(RunFolder(folder), branch), trunk=folder)
        return Trial(arm, seed, budget, folder)


@dataclass(frozen=True)
class Trial:
    """One training run of an experiment.

    `seed` and `budget` (training FLOPs) are None where the arm's own recipe decides. `trunk` is the folder of the run
    that a smaller budget branches off, None for a run of its own.
    """

    arm: str
    seed: int | None
    budget: float | None
    folder: Path
    trunk: Path | None = None

    @property
    def name(self) -> str:
        """Its folder, as tables and logs call it."""
        return self.folder.name if self.trunk is None else f"{self.trunk.name}/{self.folder.name}"


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML file.
        overrides: `a.b=value` with the value in YAML, applied before checking.

    Raises:
        RecipeError: for a missing or unreadable file, an unknown key (naming the nearest known one) or a wrong value.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such experiment file; `recipes/` holds the project's own.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: an experiment is a mapping with name, base and arms.")
    try:
        values = _nested(values)
        for override in overrides or []:
            # Nested, a value that the file gives as `optim.lr` and one that the command line does are the same.
            values = _nested(apply_override(values, override, EXCLUSIVE))
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: {first_problem(error, Experiment)}") from None
    except ValueError as error:
        raise RecipeError(f"{path}: {error}.") from None


def _check_file_name(name: str, where: str = "") -> None:
    if not _FILE_NAME.fullmatch(name):
        becomes = "becomes a folder's name; use at most 100 letters, digits, '.', '_' and '-'"
        raise ValueError(f"{where}{shorten(name)} {becomes}")


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """An experiment's values with `base` and arms in nested form; an arm that is empty differs in nothing."""
    nested = dict(values)
    if isinstance(values.get("base"), dict):
        nested["base"] = _nest(values["base"])
    if isinstance(arms := values.get("arms"), dict):
        nested["arms"] = {name: _nest({} if arm is None else arm) for name, arm in arms.items()}
    return nested


def _nest(value: Any) -> Any:
    """`{"a.b": 1, "a": {"c": 2}}` as nested dictionaries; anything but a dictionary as it is.

    Raises:
        ValueError: when two keys say the same, or one lies below the value of another.
    """
    if not isinstance(value, dict):
        return value
    nested: dict[str, Any] = {}
    for key, inner in value.items():
        branch = _nest(inner)
        for part in reversed(str(key).split(".")):
            branch = {part: branch}
        nested = _merge(nested, branch, once=True)
    return nested


def _has(values: dict[str, Any], key: str) -> bool:
    inner: Any = values
    for part in key.split("."):
        if not isinstance(inner, dict) or part not in inner:
            return False
        inner = inner[part]
    return True


def _merge(under: dict[str, Any], over: dict[str, Any], once: bool = False, above: str = "") -> dict[str, Any]:
    """A new dictionary: `over` laid upon `under`, dictionaries merged, anything else replaced.

    Args:
        once: nothing may be replaced; `above` is where the two stand, for the message.

    Raises:
        ValueError: with `once`, where both have a value of their own.
    """
    merged = copy.deepcopy(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value, once, f"{above}{key}.")
        elif once and key in merged:
            raise ValueError(f"'{plain(above + key)}' is given twice, dotted and nested; keep one")
        else:
            merged[key] = copy.deepcopy(value)
    return merged
