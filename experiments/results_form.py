"""What a ``results.json`` must look like for everything that reads one: checked once, when it is read.

Files get damaged, are edited by hand, or were never written by this package. Every key that a table, a report, the
dashboard or an export uses is here with its type; other keys are left as they are, so files of later versions with more
in them are read too. Numbers are finite, and none is taken for another: ``true`` and ``"0.9"`` are no figures.
Cost: a millisecond a file. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from avalanche_firn.experiments.errors import ConfigError

__all__ = ["FORMAT", "check_results", "read_environment", "read_json"]

FORMAT = 1
_BYTES = 2**28  # of a file; ours have up to some MB. Our choice
_DIGITS = 40  # of a whole number
Real = Annotated[float, Field(gt=-1e50, lt=1e50)]  # larger than any float32, and far from where percent overflow
Number = Real | None
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _rectangular(rows: list[list[Any]]) -> list[list[Any]]:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the rows have different lengths")
    return rows


Table = Annotated[list[list[Number]], AfterValidator(_rectangular)]
Counts = Annotated[list[list[Count]], AfterValidator(_rectangular)]


class _Stream(_Part):
    source: str
    split: str
    fingerprint: str
    class_order: list[Count]
    task_sizes: list[Positive] | None = None
    class_names: list[str] | None = None


class _Backbone(_Part):
    tag: str
    weights: str
    weights_sha256: str


class _Protocol(_Part):
    joint: bool
    replay: bool
    task_identity_at_test: bool = False
    replay_slots: int | None = None
    zapping: str | None = None
    task_inference: bool = False
    batchwise_vote: bool = False
    official_k_gate: bool = False


class _Cost(_Part):
    seconds: Real
    device: Name
    training_seconds: Number = None
    images_per_second: Number = None
    peak_memory_MiB: Number = None
    trainable_parameters: Number = None
    threads: int | None = None


class _Accuracies(_Part):
    accuracy_matrix: Table
    matrix: dict[str, Any] = {}


class _Confusion(_Part):
    counts: Counts | None = None


class _Adaptation(_Part):
    adapt: list[str]
    shots: Number
    k: Count
    temperature: Real
    solver: str
    l2: Number | list[Real]
    lr: list[Real]
    momentum: Real
    weight_decay: Real
    epochs: Count
    batch_size: Count
    task_aware: bool
    seed: int
    when: str


class _Probe(_Part):
    protocol: _Adaptation
    matrices: dict[str, dict[str, Any]] = {}


class _BoundOfTask(_Part):
    vacuous: dict[str, bool] | list[str]


class _Bounds(_Part):
    tasks: list[_BoundOfTask]
    remarks: list[str] = []


class _Lora(_Part):
    frozen: list[list[str]] | None = None
    matrices: list[str] | None = None


class _Given(_Part):
    """What a run went on with that it hadn't begun with."""

    place: str = Field(alias="from")
    settings: dict[str, bool | int | float | str | None]


class _Performance(_Part):
    resumed_with: list[_Given] = []


class _Run(_Part):
    """Of a method on a stream."""

    recipe: Name
    method: Name
    strategy: Name
    seed: Seed
    config_digest: Name
    group_digest: Name
    stream: _Stream
    backbone: _Backbone
    protocol: _Protocol
    figures: dict[str, Number]
    curves: dict[str, list[Number]]
    accuracy_matrix: Table
    matrix: dict[str, Any] = {}
    task_incremental: _Accuracies | None = None
    task_confusion: _Confusion | None = None
    probes: list[_Probe] = []
    contrastive_bound: _Bounds | None = None
    lora: _Lora | None = None
    zapping: dict[str, Any] | None = None
    dynamics: dict[str, Any] | None = None
    performance: _Performance | None = None
    diverged: bool
    cost: _Cost


# ------------------------------------------------------------------- transfers
class _Data(_Part):
    source: str
    fingerprint: str
    description: str = ""


class _Network(_Part):
    name: str
    parameters: Count


class _TransferProtocol(_Part):
    rates_chosen_on: str
    trainable: str
    head: str
    tasks: Positive
    trials: Positive
    zap: bool
    replay: bool = False
    task_identity_at_test: bool = False


class _TransferCost(_Part):
    seconds: Real
    device: Name
    pretraining_seconds: Number = None
    threads: int | None = None


class _Pretraining(_Part):
    accuracy: Number = None
    loss: Number = None


class _Continual(_Part):
    accuracy: list[Number]
    curves: Table


class _Iid(_Part):
    accuracy: list[Number]


class _Shock(_Part):
    size: Number
    iterations: Number


class _Sweep(_Part):
    at_edge: bool
    rates: list[Real] = []


class _Optimizer(_Part):
    name: str


class _Transfer(_Part):
    optimizer: _Optimizer
    rates: dict[str, Real]
    sweeps: dict[str, _Sweep]
    figures: dict[str, Number]
    continual: _Continual
    iid: _Iid | None = None
    logged_after: list[Count]
    shocks: list[_Shock]
    diverged: bool


class _TransferRun(_Part):
    """Of a way of pre-training and the transfers after it."""

    experiment: str
    recipe: Name
    method: Name
    strategy: Name
    seed: Seed
    config_digest: Name
    group_digest: Name
    data: _Data
    network: _Network
    protocol: _TransferProtocol
    pretraining: _Pretraining
    optimizers: dict[str, _Transfer] = Field(min_length=1)
    performance: _Performance | None = None
    cost: _TransferCost


class _Device(_Part):
    type: str | None = None
    name: str | None = None
    memory_MiB: Number = None
    cuda: str | None = None
    cpus: int | None = None
    threads: int | None = None


class _Environment(_Part):
    date: str | None = None
    python: str | None = None
    platform: str | None = None
    git_commit: str | None = None
    packages: dict[str, str | None] = {}
    device: _Device = _Device()
    backbone: dict[str, str | None] | None = None
    place: str = Field(default="start", alias="from")
    settings: dict[str, bool | int | float | str | None] = {}
    resumed_in: list[_Environment] = []


def _checked(path: Path, form: type[BaseModel], content: Any, what: str) -> None:
    try:
        form.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        told = [f"{'.'.join(str(step) for step in item['loc'])}: {item['msg']}" for item in found[:3]]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(f"{path} isn't {what} as it was written: {'; '.join(told)}{more}") from None


def check_results(path: Path, content: Any) -> dict[str, Any]:
    """The content of a ``results.json``, as it is.

    Args:
        path: of the file, for messages.
        content: plain values.

    Raises:
        ConfigError: no results, of another format, or a part of another form; the file and the part are named.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT or isinstance(content["format"], bool):
        raise ConfigError(f"{path} isn't a results file of format {FORMAT}")
    if "experiment" in content and content["experiment"] != "transfer":
        raise ConfigError(f"{path} is of an experiment that this version doesn't know")
    transfers = "experiment" in content
    _checked(path, _TransferRun if transfers else _Run, content, "a results file")
    for name, transfer in content["optimizers"].items() if transfers else ():
        points, curves = len(transfer["logged_after"]), transfer["continual"]["curves"]
        if any(len(curve) != points for curve in curves) or not curves:
            told = f"optimizers.{name}.continual.curves doesn't fit logged_after"
            raise ConfigError(f"{path} isn't a results file as it was written: {told}")
    return content


def read_environment(path: Path) -> dict[str, Any] | None:
    """The content of an ``environment.json``; None where there is none.

    Raises:
        ConfigError: it can't be read, or a part has another form; the file and the part are named.
    """
    if not path.exists():
        return None
    content = read_json(path)
    _checked(path, _Environment, content, "an environment")
    return dict(content)


def read_json(path: Path) -> Any:
    """The content of a JSON file, with finite numbers only.

    Raises:
        ConfigError: it can't be read, isn't JSON, or holds what JSON has no words for; the file is named.
    """

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON")

    def number(text: str) -> float:
        return value if math.isfinite(value := float(text)) else refuse(text)

    def whole(text: str) -> int:
        return int(text) if len(text) <= _DIGITS else int(refuse(f"a number of {len(text)} digits"))

    try:
        if not path.is_file():
            raise OSError("it isn't a file")
        if (size := path.stat().st_size) > _BYTES:
            raise OSError(f"it has {size:,} bytes")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=refuse, parse_float=number, parse_int=whole)
        if "\\ud" in text.lower():  # halves of letters: nothing can write them
            json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    return content
