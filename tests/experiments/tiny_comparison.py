"""A recipe whose runs take a second: four classes of ten random textures, 32 pixels, two tasks. For several tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RECIPE = """
name: tiny
seeds: [0, 1]
device: cpu
threads: 1
stream: {{name: folder, root: {root}, tasks: 2, class_order: seeded}}
training: {{epochs: 2, batch_size: 4, optimizer: {{lr: 0.01}}, schedule: {{name: cosine}}}}
checkpoint: {{every: 3}}
methods:
  - naive
  - {{strategy: slca, alignment: {{samples_per_class: 16}}}}
"""


def make_recipe(base: Path) -> Path:
    """Images and ``tiny.yaml`` below `base`; two methods with two seeds."""
    random = np.random.RandomState(0)
    for c in range(4):
        folder = base / "data" / f"class{c}"
        folder.mkdir(parents=True)
        wave = np.sin(np.arange(32) * (c + 1) / 3)[None, :, None] * 60 + 128
        for i in range(10):
            pixels = np.clip(wave + random.randn(32, 32, 3) * 30, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    path = base / "tiny.yaml"
    path.write_text(RECIPE.format(root=base / "data"))
    return path


def json_lines(text: str) -> list[dict[str, Any]]:
    """Every line of an output, each of which must be a JSON object without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert all(isinstance(line, dict) and isinstance(line["event"], str) for line in lines)
    return lines
