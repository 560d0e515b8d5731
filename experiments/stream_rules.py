"""What the sections of streams share: their types, the words that explain them, and their rules. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from avalanche_firn.experiments.schema_rules import repeated

__all__ = [
    "AUGMENT_HELP",
    "CLASSES_HELP",
    "MOST",
    "ORDER_HELP",
    "TASKS_HELP",
    "TRANSFORMS_HELP",
    "ClassId",
    "ClassOrder",
    "Tasks",
    "Transforms",
    "fraction_problems",
    "order_problems",
    "task_problems",
]

MOST = 1_000_000
"""Classes, or tasks, of a stream; our choice, far above any data set."""
ClassId = Annotated[int, Field(ge=0)]
ClassOrder = Literal["natural", "seeded"] | list[ClassId]
Count = Annotated[int, Field(ge=1, le=MOST)]
Tasks = Count | list[Count]
Transforms = Literal[
    "backbone",
    "slca_cifar",
    "slca_imagenet_r",
    "slca_cub",
    "slca_cars",
    "lorac",
    "ucl_cifar",
    "ucl_tiny",
    "co2l_cifar",
    "co2l_tiny",
    "co2l_digits",
]
TRANSFORMS_HELP = (
    "backbone = from timm's data configuration of the weights; slca_... = the SLCA code's, 224 pixels; lorac = "
    "the LoRAC-IPC code's, 224 pixels, not normalised; ucl_cifar, ucl_tiny = the UCL code's, 32 and 64 pixels; "
    "co2l_cifar, co2l_tiny, co2l_digits = the Co2L code's, 32, 64 and 28 pixels (one grey channel), without "
    "augmentation, which follows on the device"
)
AUGMENT_HELP = "with transforms: backbone, random crop, flip and colour jitter while training; timm's ImageNet recipe"
TASKS_HELP = "number of experiences (the last takes what remains), or the list of their class counts"
CLASSES_HELP = "number of classes, for check --no-data; null = as many as there are, otherwise compared with the data"
ORDER_HELP = (
    "natural = ascending; seeded = numpy permutation drawn from the run's seed, as the SLCA code does; "
    "or the list of all class ids"
)


def order_problems(order: Any, classes: int | None) -> list[tuple[str, str, str]]:
    """What is wrong with a class order, for `reject`."""
    if not isinstance(order, list):
        return []
    accepted = "natural, seeded, or a list with every class id once"
    problems = []
    twice = repeated(order)
    if twice:
        problems.append(("class_order", f"the class ids {twice} are repeated", accepted))
    size = classes if classes is not None else len(order)
    if len(order) != size:
        problems.append(("class_order", f"has {len(order)} entries for {size} classes", accepted))
    outside = sorted({c for c in order if isinstance(c, int) and c >= size})
    if outside and len(order) == size:
        problems.append(("class_order", f"the class ids {outside} don't exist", f"{accepted}: 0 to {size - 1}"))
    return problems


def fraction_problems(validation: float, test: float) -> list[tuple[str, str, str]]:
    """What is wrong with two parts that are drawn from the training images, for `reject`."""
    if validation + test < 1:
        return []
    total = f"together with validation_fraction {validation + test:g}"
    return [("test_fraction", f"{total} leaves nothing to train on", "a sum below 1")]


def task_problems(tasks: int | list[int], classes: int) -> list[tuple[str, str, str]]:
    """What is wrong with tasks over a known number of classes, for `reject`."""
    if isinstance(tasks, int) and tasks > classes:
        return [("tasks", f"{tasks} tasks are impossible with {classes} classes", f"1 to {classes}")]
    if isinstance(tasks, list) and sum(tasks) != classes:
        return [("tasks", f"{tasks} sums to {sum(tasks)} classes", f"counts that sum to {classes}")]
    return []
