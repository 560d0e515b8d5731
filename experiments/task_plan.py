"""How many classes each task will have, read off a recipe alone: for data that isn't on this machine.

Folders are known by their ``tasks`` list or a declared ``classes``, public data sets and Avalanche's classic benchmarks
by tables of public facts and their arguments. What can't be known is refused, never guessed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from avalanche_firn.benchmarks.streams import StreamError, task_sizes
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.public_stream_sections import (
    PUBLIC_CLASSES,
    DomainNetStreamConfig,
    FiveDatasetsStreamConfig,
    FMoWStreamConfig,
    HuggingFaceStreamConfig,
)
from avalanche_firn.experiments.sections import StreamConfig
from avalanche_firn.experiments.stream_rules import MOST
from avalanche_firn.experiments.stream_sections import (
    DIGITS,
    AvalancheStreamConfig,
    DigitsStreamConfig,
    DomainFolderStreamConfig,
    FolderStreamConfig,
)

__all__ = ["CLASS_COUNTS", "TaskPlan", "plan_tasks"]

# Classes of the data sets behind Avalanche's benchmarks that split them evenly.
CLASS_COUNTS = {
    "PermutedMNIST": 10,
    "RotatedMNIST": 10,
    "SplitCIFAR10": 10,
    "SplitCIFAR100": 100,
    "SplitCIFAR110": 110,
    "SplitCUB200": 200,
    "SplitFMNIST": 10,
    "SplitImageNet": 1000,
    "SplitMNIST": 10,
    "SplitTinyImageNet": 200,
}
_ALL_CLASSES_EACH = ("PermutedMNIST", "RotatedMNIST")  # every experience has all classes
_DOMAINS = 2  # assumed where the recipe takes all folders: a dry run trains two


@dataclass(frozen=True)
class TaskPlan:
    """What a recipe says about its stream.

    `name`: of the stream, for messages. `sizes`: classes of each experience. `repeats`: whether classes come again in
    later experiences.
    """

    name: str
    sizes: tuple[int, ...]
    repeats: bool

    @property
    def num_classes(self) -> int:
        """Number of different classes; those of the largest experience where classes come again."""
        return max(self.sizes) if self.repeats else sum(self.sizes)


def plan_tasks(section: StreamConfig) -> TaskPlan:
    """The task plan of a stream section. No data is read.

    Raises:
        ConfigError: the number of classes can't be known from the recipe, or they can't be divided as it says.
    """
    try:
        if isinstance(section, AvalancheStreamConfig):
            return _classic(section)
        if isinstance(section, DomainFolderStreamConfig):
            domains = _DOMAINS if section.domain_order is None else len(section.domain_order)
            return TaskPlan(section.name, (_declared(section.classes),) * domains, repeats=True)
        if isinstance(section, FMoWStreamConfig):
            return TaskPlan(section.name, (PUBLIC_CLASSES["fmow"],) * len(section.regions), repeats=True)
        if isinstance(section, FiveDatasetsStreamConfig):
            return TaskPlan(section.name, (10,) * len(section.datasets), repeats=False)
        if isinstance(section, DomainNetStreamConfig) and section.scenario == "domains":
            count = 6 if section.domains is None else len(section.domains)
            return TaskPlan(section.name, (PUBLIC_CLASSES["domainnet"],) * count, repeats=True)
        if isinstance(section, DigitsStreamConfig):
            classes = DIGITS
        elif not isinstance(section, FolderStreamConfig | HuggingFaceStreamConfig):
            classes = PUBLIC_CLASSES[section.name]
        elif isinstance(section.tasks, list):
            classes = sum(section.tasks)
        elif isinstance(section.class_order, list):
            classes = len(section.class_order)
        else:
            classes = _declared(section.classes)
        return TaskPlan(section.name, task_sizes(classes, section.tasks), repeats=False)
    except StreamError as error:
        raise ConfigError(Problem("stream", str(error))) from error


def _declared(classes: int | None) -> int:
    if classes is None:
        reason = "needed without the data: nothing else in the recipe says how many classes the data has"
        raise ConfigError(Problem("stream.classes", reason, "a whole number, at least 1"))
    return classes


def _classic(section: AvalancheStreamConfig) -> TaskPlan:
    name = section.benchmark
    if name not in CLASS_COUNTS:
        known = f"one of {', '.join(sorted(CLASS_COUNTS))}; others can be checked where their data is"
        raise ConfigError(Problem("stream.benchmark", f"the classes of {name} aren't known without its data", known))
    arguments = {**_defaults(name), **section.arguments}
    count, classes = arguments.get("n_experiences"), CLASS_COUNTS[name]
    path = "stream.arguments.n_experiences"
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        reason = f"{count!r} isn't accepted" if "n_experiences" in arguments else "missing"
        raise ConfigError(Problem(path, reason, f"a whole number, 1 to {MOST}"))
    repeats = name in _ALL_CLASSES_EACH or bool(arguments.get("class_ids_from_zero_in_each_exp"))
    if name in _ALL_CLASSES_EACH:
        sizes = (classes,) * count
    else:
        given = _given(name, arguments)
        rest, free = classes - sum(given.values()), count - len(given)
        if rest < 0 or free < 0 or (rest % free if free else rest):
            shares = f" after {given} (experience: classes)" if given else ""
            reason = f"{count} experiences can't share {classes} classes evenly{shares}"
            raise ConfigError(Problem(path, reason, "a number that divides the classes"))
        sizes = tuple(given.get(i, rest // max(free, 1)) for i in range(count))
    if section.first_experiences is not None:
        if section.first_experiences > count:
            reason = f"{section.first_experiences}, but {name} has {count} experiences"
            raise ConfigError(Problem("stream.first_experiences", reason, f"1 to {count}"))
        sizes = sizes[: section.first_experiences]
    return TaskPlan(name, sizes, repeats)


def _defaults(name: str) -> dict[str, Any]:
    """Default arguments of Avalanche's class."""
    import avalanche.benchmarks.classic as benchmarks

    parameters = inspect.signature(getattr(benchmarks, name)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _given(name: str, arguments: dict[str, Any]) -> dict[int, int]:
    """Experiences whose number of classes isn't what an even division gives them."""
    if name == "SplitCIFAR110":
        return {0: 10}  # CIFAR-10 as a whole
    if name == "SplitCUB200" and arguments.get("classes_first_batch") is not None:
        return {0: _count(arguments["classes_first_batch"], "classes_first_batch")}
    if arguments.get("first_exp_with_half_classes") or arguments.get("first_batch_with_half_classes"):
        return {0: CLASS_COUNTS[name] // 2}
    given = arguments.get("per_exp_classes") or {}
    if not isinstance(given, dict) or not all(isinstance(key, int) and key >= 0 for key in given):
        reason, accepted = f"{given!r} isn't accepted", "experience: number of classes, both whole numbers"
        raise ConfigError(Problem("stream.arguments.per_exp_classes", reason, accepted))
    return {key: _count(value, f"per_exp_classes.{key}") for key, value in given.items()}


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ConfigError(Problem(f"stream.arguments.{name}", f"{value!r} isn't accepted", f"1 to {MOST}"))
    return value
