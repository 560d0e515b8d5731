"""For tests of reports: reads report.html back, and makes up runs that have everything that a report can show."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from avalanche_firn.experiments.results import RunResults

PLAIN = ("accuracy/last", "accuracy/average", "accuracy/incremental", "forgetting/average")
_VOID = {"meta", "link", "br", "hr", "img", "input"}
_SVG_EMPTY = {"path", "use", "rect", "image", "circle", "line"}


@dataclass(eq=False)
class Page(HTMLParser):
    """Structure, tables and texts of a page; AssertionError where tags don't match, as HTML doesn't allow."""

    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    _rows: list[list[str]] = field(default_factory=list)
    _caption: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _SVG_EMPTY and "svg" in self.open, f"<{tag}/> closes itself outside a drawing"
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()
        if tag == "table":
            assert self._caption and self._caption not in self.tables, self._caption
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self._caption += data
        elif self.open and self.open[-1] in ("td", "th"):
            self._rows[-1][-1] += data
        elif "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All texts but those in tables, spaces made plain."""
        return " ".join(" ".join(self.texts).replace("\xa0", " ").split())


def read_page(html: str) -> Page:
    """Parse a whole page; AssertionError where a tag isn't closed."""
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [], page.open
    return page


def made_up_runs(
    folder: Path | None, methods: int = 3, seeds: int = 2, tasks: int = 3, *, whole: bool = False
) -> list[RunResults]:
    """Results of runs that nobody trained; with a folder also the files beside them.

    Args:
        folder: of the comparison, made with METHOD/seed-S in it; None for results that lie nowhere.
        methods, seeds, tasks: how many.
        whole: with everything that a report can show; else with what every run has.
    """
    found = []
    for number in range(methods):
        name = f"method_{number}"
        for seed in range(seeds):
            place = None if folder is None else folder / name / f"seed-{seed}"
            results = _results(name, seed, 0.9 - 0.03 * number + 0.01 * seed, tasks, bool(number), whole)
            found.append(RunResults(results, place))
            if place is not None:
                _files(place, results)
    if folder is not None:
        shared = {"name": folder.name, "methods": [{"name": f"method_{i}"} for i in range(methods)]}
        (folder / "config.yaml").write_text(yaml.safe_dump(shared), encoding="utf-8")
    return found


def _results(name: str, seed: int, last: float, tasks: int, lora: bool, whole: bool) -> dict[str, Any]:
    falling = [last + 0.02 * (tasks - 1 - t) / tasks for t in range(tasks)]
    matrix = [[last if i <= t else None for i in range(tasks)] for t in range(tasks)]
    tags = ("accuracy/last", "accuracy/average", "accuracy/incremental", "probe/knn", "task-il/accuracy/last")
    curves: dict[str, list[float | None]] = {tag: [*falling] for tag in tags}
    curves |= {"forgetting/average": [None, *(0.1 * seed + 0.01 * t for t in range(1, tasks))]}
    curves |= {"slca/alignment/loss-first": [None, *(0.5 for _ in range(1, tasks))]}
    curves = curves if whole else {tag: curve for tag, curve in curves.items() if tag in PLAIN}
    figures = {tag: curve[-1] for tag, curve in curves.items() if not tag.startswith("slca")}
    loss = [[1.0 if t <= r else None for t in range(tasks)] for r in range(tasks + 1)]
    dynamics = {
        "steps": [5 * r for r in range(tasks + 1)],
        "loss": loss,
        "accuracy": loss,
        "blocks": [[r, r + 1] for r in range(tasks)],
        "block_tasks": [[t] for t in range(tasks)],
        "task_ids": [*range(tasks)],
        "task_names": [f"<{t}>" for t in range(tasks)],
        "diverged": [[False] * tasks for _ in range(tasks + 1)],
    }
    counts = [[8 if i == t else 1 for i in range(tasks)] for t in range(tasks)]
    frozen = [[f"backbone.blocks.{i}.attn.proj" for i in range(t + 1)] for t in range(tasks)]
    protocol = {"adapt": ["knn"], "shots": 5, "k": 3, "temperature": 0.1, "seed": 0, "when": "experience"}
    return {
        "format": 1,
        "recipe": "rich",
        "method": name,
        "strategy": name,
        "seed": seed,
        "config_digest": f"{name}{seed}",
        "group_digest": name,
        "stream": {"source": "digits", "split": "test", "fingerprint": "f", "class_order": [*range(2 * tasks)]},
        "backbone": {"tag": "vit", "weights": "pretrained", "weights_sha256": "w"},
        "protocol": {"task_identity_at_test": False, "replay": False, "joint": False},
        "figures": figures | {"dynamics/learning": 1.0, "dynamics/interference": 2.0, "dynamics/synergy": 0.5},
        "curves": curves,
        "accuracy_matrix": matrix,
        "matrix": {},
        "task_confusion": {"counts": counts if whole else None},
        "probes": [{"protocol": protocol | {"task_aware": True}}] if whole else [],
        "lora": {"frozen": frozen} if lora and whole else None,
        "dynamics": dynamics if whole else None,
        "diverged": False,
        "cost": {"seconds": 10.0 + seed, "peak_memory_MiB": 100.0, "trainable_parameters": 1234, "device": "cpu"},
    }


def _files(place: Path, results: dict[str, Any]) -> None:
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps(results), encoding="utf-8")
    own = {"name": results["method"], "strategy": results["method"], "training": {"epochs": None}}
    config = {
        "name": "rich",
        "seeds": [results["seed"]],
        "output": "runs",
        "training": {"epochs": 5, "optimizer": {"lr": 0.1}},
        "methods": [own | ({"lora": {"rank": 4}} if results["method"] == "method_1" else {})],
    }
    (place / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {"python": "3.11.1", "packages": {"torch": f"2.{results['seed']}"}, "device": {"type": "cpu"}}
    (place / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    rows = [f"{t},drift/cka,{0.9 - 0.1 * t}" for t in range(3)] + [f"{t},loss/train,1.0" for t in range(9)]
    (place / "metrics.csv").write_text("\n".join(["step,tag,value", *rows, ""]), encoding="utf-8")
