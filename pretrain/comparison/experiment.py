"""An experiment: several arms that differ only in what is named, trained under one budget.

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
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pretrain.errors import RecipeError
from pretrain.plan import Branch

REPORT_FOLDER = "report"
TRAIN_TOKENIZER = "train"
WHOLE_TEXTS = ("perplexity", "routing", "wikitext")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(_Section):
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

    path: str | None = None
    corpus: str | None = None
    tokenizer: str = TRAIN_TOKENIZER
    vocab_size: int = Field(default=8192, ge=300)
    max_tokens: int | None = Field(default=None, ge=1)
    validation: float = Field(default=0.01, gt=0, lt=0.5)
    test: float = Field(default=0.01, gt=0, lt=0.5)


class LaunchSection(_Section):
    """How one arm's training is started on this machine: through the `deepspeed` launcher with `ranks` processes, or
    as one plain process.
    """

    launcher: Literal["deepspeed", "python"] = "deepspeed"
    ranks: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_process_without_a_launcher(self) -> LaunchSection:
        if self.launcher == "python" and self.ranks != 1:
            raise ValueError(
                f"launcher 'python' is one process, not {self.ranks}; set ranks to 1 or launcher to 'deepspeed'"
            )
        return self


class EvaluationSection(_Section):
    """What every trained arm is measured on.

    Attributes:
        suites: of `mor eval`; `all` for every one.
        limit: most questions of each few-shot task. Suites that read whole texts (`WHOLE_TEXTS`) are not limited by it.
        text_bytes: held-out text that perplexity reads; None for `mor eval`'s own default.
        hub: benchmarks without local files are read from the Hugging Face hub where it answers.
    """

    suites: tuple[str, ...] = ("perplexity", "routing", "own")
    limit: int | None = Field(default=None, ge=1)
    text_bytes: int | None = Field(default=None, ge=1)
    hub: bool = False

    def limit_of(self, suite: str) -> int | None:
        """Most questions of each task of this suite."""
        return None if suite in WHOLE_TEXTS else self.limit


class Experiment(_Section):
    """One comparison.

    Attributes:
        name: short name; letters, digits, `.`, `_`, `-`.
        title, description: what the report's heading says.
        runs: folder of the arms' run folders and the report; `runs/NAME` by default.
        data, launch, evaluation: see the sections.
        base: fields of a recipe shared by all arms; `seed` and `budget` stand here.
        arms: name to the recipe fields in which the arm differs.
        labels: name to what tables and pictures call the arm.
        reference: the arm others are compared with; the first by default.
        seeds: each arm is trained once per seed; empty for the base's own seed alone.
        budgets: training FLOPs; each arm has a run for each; empty for the base's own budget alone. With a
            warm-up-stable-decay schedule the largest is trained and the others branch off it with a decay of their own.
    """

    name: str
    title: str | None = None
    description: str = ""
    runs: str | None = None
    data: DataSection = DataSection()
    launch: LaunchSection = LaunchSection()
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    labels: dict[str, str] = {}
    reference: str | None = None
    seeds: tuple[int, ...] = ()
    budgets: tuple[float, ...] = ()
    evaluation: EvaluationSection = EvaluationSection()

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} becomes a folder's name; use letters, digits, '.', '_' and '-'")
        return name

    @field_validator("arms", mode="before")
    @classmethod
    def _an_arm_may_differ_in_nothing(cls, arms: Any) -> Any:
        return {name: overrides or {} for name, overrides in arms.items()} if isinstance(arms, dict) else arms

    @model_validator(mode="after")
    def _names_agree(self) -> Experiment:
        if not self.arms:
            raise ValueError("arms: name at least one")
        for name in self.arms:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"arms: {name!r} becomes a folder's name; use letters, digits, '.', '_' and '-'")
            if name == REPORT_FOLDER:
                raise ValueError(f"arms: {name!r} is the name of the report's folder; call the arm something else")
        for where, names in (("labels", list(self.labels)), ("reference", [self.reference] if self.reference else [])):
            for name in names:
                if name not in self.arms:
                    raise ValueError(f"{where}: there is no arm {name!r}; {nearest(name, self.arms)}")
        if len(set(self.seeds)) != len(self.seeds) or len(set(self.budgets)) != len(self.budgets):
            raise ValueError("seeds and budgets: each value once")
        if any(not budget > 0 for budget in self.budgets):
            raise ValueError("budgets: each must be a positive number of training FLOPs")
        base = merge_dotted(self.base)
        if self.budgets and "budget" in base:
            raise ValueError("budgets: base.budget is given too; keep one of them")
        if self.data.path and "path" in base.get("data", {}):
            raise ValueError("data.path: base.data.path is given too; keep one of them")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.runs or f"runs/{self.name}")

    @property
    def report_folder(self) -> Path:
        return self.folder / REPORT_FOLDER

    @property
    def reference_arm(self) -> str:
        return self.reference or next(iter(self.arms))

    @property
    def data_path(self) -> Path:
        path = self.data.path or merge_dotted(self.base).get("data", {}).get("path")
        return Path(path or f"data/{self.name}")

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
                raise RecipeError(f"there is no arm '{arm}' in {self.name}; {nearest(arm, self.arms)}")
        own_seed = merge_dotted(self.base).get("seed")
        return [
            self._trial(arm, seed, seed if seed != own_seed else None, budget)
            for budget in sorted(self.budgets) or (None,)
            for seed in self.seeds or (own_seed,)
            for arm in self.arms
            if arms is None or arm in arms
        ]

    def recipe_values(self, trial: Trial) -> dict[str, Any]:
        """The fields of the recipe of one run: base, then the arm's, then seed, budget, data and folder."""
        values = self._arm_values(trial.arm)
        values["name"] = trial.folder.name if trial.trunk is None else f"{trial.trunk.name}-{trial.folder.name}"
        values["run_dir"] = str(trial.folder)
        data = values.get("data", {})
        values["data"] = data if "sources" in data else {"path": str(self.data_path), **data}
        if trial.seed is not None:
            values["seed"] = trial.seed
        if trial.budget is not None:
            values["budget"] = {"flops": trial.budget}
            if trial.trunk is None and self._branches(trial.arm):
                values["budget"]["branches"] = sorted(self.budgets)[:-1]
        return values

    def _arm_values(self, arm: str) -> dict[str, Any]:
        return deep_merge(merge_dotted(self.base), merge_dotted(self.arms[arm]))

    def _branches(self, arm: str) -> bool:
        """Whether the smaller budgets of this arm leave the run of the largest one."""
        return len(self.budgets) > 1 and self._arm_values(arm).get("schedule", {}).get("kind", "wsd") == "wsd"

    def _trial(self, arm: str, seed: int | None, named_seed: int | None, budget: float | None) -> Trial:
        if budget is None or not self._branches(arm):
            return Trial(arm, seed, budget, self.folder / _run_name(arm, named_seed, budget))
        trunk = self.folder / _run_name(arm, named_seed, None)
        if budget == max(self.budgets):
            return Trial(arm, seed, budget, trunk)
        # Where `pretrain.run` puts the branches of a run.
        return Trial(arm, seed, budget, trunk / "branches" / _amount(budget), trunk)


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


def _amount(budget: float) -> str:
    return Branch(budget, start=0, steps=0).name


def _run_name(arm: str, seed: int | None, budget: float | None) -> str:
    parts = [arm]
    if budget is not None:
        parts.append(_amount(budget))
    if seed is not None:
        parts.append(f"seed{seed}")
    return "-".join(parts)


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML file.
        overrides: `a.b=value` with the value in YAML, applied before checking.

    Raises:
        RecipeError: for a missing or unreadable file, an unknown key (naming the nearest known one) or a wrong value.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such experiment file; `recipes/` holds the project's own.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: an experiment is a mapping with name, base and arms.")
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"'{override}': an override reads a.b=value, for example base.optim.lr=1e-3.")
        values = deep_merge(values, _at(key.split("."), yaml.load(text, Loader=_Loader)))
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_fault(error)}") from None


def merge_dotted(values: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1, "a": {"c": 2}}` as nested dictionaries."""
    merged: dict[str, Any] = {}
    for key, value in values.items():
        merged = deep_merge(merged, _at(str(key).split("."), merge_dotted(value) if isinstance(value, dict) else value))
    return merged


def deep_merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new dictionary: `over` laid upon `under`, dictionaries merged, anything else replaced."""
    merged = copy.deepcopy(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def nearest(given: str, known: Any) -> str:
    """ "did you mean" or the list of what there is, to end a message with."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}."


def _at(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section: Any = Experiment
        for part in fault["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        return f"unknown key '{place}'; {nearest(str(fault['loc'][-1]), section.model_fields)}"
    if fault["type"] == "missing":
        return f"'{place}' is missing."
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] != "value_error":
        message = f"{message}, not {fault['input']!r}"
    return f"{place}: {message}." if place else f"{message.rstrip('.?')}{'?' if message.endswith('?') else '.'}"


class _Loader(yaml.SafeLoader):
    """YAML in which 2e15 is a number, as everywhere else, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
