"""Export the final model of a finished run: ``firn export RUN --format timm|safetensors|hub-folder``.

Three forms: a state dict for a plain timm model; all modules of the run in one safetensors file, which
:func:`load_exported` reads; a folder in the layout of the Hugging Face hub, with a model card. What is exported is the
classifier that the run evaluated last (:mod:`~avalanche_firn.experiments.export_source`).

Files are written whole or not at all, and only after they were loaded back and gave the logits of the run's own
modules. Nothing is unpickled. Cost: the network in memory three times at most.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avalanche_firn.experiments.export_card import architectures, hub_config, model_card, preprocessing, remarks
from avalanche_firn.experiments.export_formats import (
    FORMAT,
    FORMATS,
    ExportError,
    FinalModel,
    check_structure,
    class_columns,
    metadata,
    own_state,
    rebuild,
    timm_model,
)
from avalanche_firn.experiments.export_source import final_model
from avalanche_firn.experiments.results import write_json, write_text
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.models.weight_files import first_names, non_finite
from avalanche_firn.plugins.checkpoint_files import sync
from avalanche_firn.plugins.random_state import private_random_state
from avalanche_firn.plugins.task_inference import TaskInferencePlugin

__all__ = ["FORMATS", "ExportError", "ExportedModel", "describe_export", "export_run", "final_model", "load_exported"]

_SUFFIX = ".safetensors"
_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_ENDINGS = {"timm": f"-timm{_SUFFIX}", "safetensors": _SUFFIX, "hub-folder": ""}  # of default names
_TOLERANCE = 1e-4  # of logits after loading back, relative to the largest: rounding, nothing else


def export_run(
    folder: str | Path,
    form: str,
    *,
    output: str | Path | None = None,
    task: int | None = None,
    force: bool = False,
) -> Path:
    """Write the final model of a finished run, and load it back to see that it is the same.

    Args:
        folder: of the run.
        form: one of :data:`FORMATS`. ``timm``: a state dict for ``timm.create_model``; ``safetensors``: all of our
            modules, for :func:`load_exported`; ``hub-folder``: weights, ``config.json`` and a model card, which
            ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.
        output: file or folder to write. Default: below ``RUN/export/``, named after recipe, method and seed.
        task: see :func:`final_model`.
        force: replace an earlier export.

    Returns:
        What was written.

    Raises:
        ExportError: see :func:`final_model`; an unknown format; something is there already; the format can't hold this
            model. Nothing has been written then.
    """
    if form not in FORMATS:
        raise ExportError(f"format is {form!r}; {', '.join(FORMATS)} are accepted")
    folder = Path(folder)
    if output is not None:
        _check_target(Path(output), form, force)  # before the work
    with private_random_state():
        final = final_model(folder, task)
        model = None if form == "safetensors" else timm_model(final)  # refuses before anything is written
        # of the checked configuration: a text of results.json could be a path
        title = "-".join([final.config.name, final.config.methods[0].name, f"seed-{final.config.seeds[0]}"])
        title += f"-task-{task}" if task is not None else ""
        target = folder / "export" / (title + _ENDINGS[form]) if output is None else Path(output)
        _check_target(target, form, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = target.with_name(f".{target.name}.tmp")
        _delete(hidden)
        try:
            header = metadata(final, form) | {"remarks": json.dumps(remarks(final, form))}
            if model is None:
                _write_own(final, hidden, header)
            else:
                _write_timm(final, model, form, hidden, header, title)
            _replace(hidden, target)
        finally:
            _delete(hidden)
    return target


def _write_own(final: FinalModel, place: Path, header: dict[str, str]) -> None:
    tensors, structure = own_state(final)
    _save(tensors, place, header | {"structure": json.dumps(structure)})
    _compare(final, load_exported(place, hub=True))


def _write_timm(
    final: FinalModel, model: nn.Module, form: str, place: Path, header: dict[str, str], title: str
) -> None:
    weights = place
    if form == "hub-folder":
        place.mkdir()
        weights = place / _WEIGHTS
        write_json(place / _CONFIG, hub_config(final, model, header))
        write_text(place / _CARD, model_card(final, title))
    _save(model.state_dict(), weights, header)
    again = timm.create_model(final.architecture, pretrained=False, num_classes=len(final.class_ids))
    again.load_state_dict(load_file(weights))
    _compare(final, again.eval())


def _save(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(copies, path, metadata=header)
    sync(path)


@torch.no_grad()
def _compare(final: FinalModel, loaded: Callable[[Tensor], Tensor]) -> None:
    """Logits of what was written are those of the run's modules, on two random images."""
    shape = preprocessing(final.config, final.data_config)["input_size"]
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected, found = final.logits(images), loaded(images)
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ExportError(
            f"the exported model gives other logits than the run's (largest difference {difference:.2g}), so it wasn't "
            "written; --format safetensors keeps the modules as they are"
        )


def describe_export(path: Path) -> str:
    """What was written, what has to be known about it, and how it is loaded, for the terminal."""
    with safe_open(path / _WEIGHTS if path.is_dir() else path, framework="pt") as file:
        header: dict[str, str] = file.metadata()
    ways = {
        "timm": f"timm.create_model({header['architecture']!r}, num_classes={header['num_classes']})"
        f".load_state_dict(safetensors.torch.load_file({str(path)!r}))",
        "safetensors": f"avalanche_firn.experiments.export.load_exported({str(path)!r})",
        "hub-folder": f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)",
    }
    ours = header["firn_form"] != "safetensors" and header["architecture"] in architectures()
    before = " (after import avalanche_firn.models)" if ours else ""
    return "\n".join(
        [
            f"written {path}: {header['num_classes']} classes, {header['backbone']}",
            *json.loads(header["remarks"]),
            f"load it with{before}: {ways[header['firn_form']]}",
        ]
    )


def _check_target(target: Path, form: str, force: bool) -> None:
    """Refuse a place that is in use, or whose name would be misread."""
    folder = form == "hub-folder"
    if not folder and target.suffix != _SUFFIX:
        raise ExportError(f"--output is {target}; a file name that ends in {_SUFFIX} is accepted for this format")
    if not target.exists():
        return
    if not force:
        raise ExportError(f"{target} exists already; give another --output, or --force to replace it")
    if target.is_dir() != folder:
        raise ExportError(f"{target} is a {'folder' if target.is_dir() else 'file'}, and {form} isn't; delete it first")
    if folder and any(path.name not in (_WEIGHTS, _CONFIG, _CARD) for path in target.iterdir()):
        raise ExportError(f"{target} holds other files than an export, which --force would delete; delete it yourself")


def _replace(hidden: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(hidden, target)
        return
    old = target.with_name(f".{target.name}.old")  # a folder can't be replaced in one step
    _delete(old)
    target.rename(old)
    hidden.rename(target)
    _delete(old)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- loading --------------------------------------------------------------------------------------------------------


class ExportedModel(nn.Module):
    """A model of a ``safetensors`` export: images (B, channels, H, W) float32 -> logits (B, C).

    Attributes:
        model: the run's own modules, under the names of the file.
        inference: task inference, or None; with it :meth:`forward` gives no gradients and evaluates.
        class_ids: (C,) class ids of the data, ascending: the columns of the logits.
        labels: (C,) names of the classes, or the ids as text.
        header: what the file says about its origin, all as text.
    """

    def __init__(self, model: FeatureClassifier, inference: TaskInferencePlugin | None, header: dict[str, str]) -> None:
        super().__init__()
        self.model = model
        self.inference = inference
        self.class_ids: tuple[int, ...] = tuple(json.loads(header["class_ids"]))
        self.labels: tuple[str, ...] = tuple(json.loads(header["labels"]))
        self.header = dict(header)
        assert isinstance(model.head, TaskwiseLinearHead)
        self._columns = class_columns(model.head)
        if not len(self._columns) == len(self.class_ids) == len(self.labels):
            raise ValueError(f"{len(self._columns)} columns, {len(self.class_ids)} ids and {len(self.labels)} labels")

    def _apply(self, fn: Any, recurse: bool = True) -> ExportedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inference is not None:  # statistics belong to no module
            self.inference.inference.to(next(self.model.parameters()).device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits, columns as :attr:`class_ids`."""
        found = self.model(images) if self.inference is None else self.inference.predict(self.model, images)
        return found[:, self._columns]


def load_exported(path: str | Path, *, hub: bool = False) -> ExportedModel:
    """The model of a file that ``firn export --format safetensors`` wrote, on the CPU, in evaluation mode.

    Args:
        path: the file, which may come from a stranger: nothing of it is executed.
        hub: let timm read the architecture from a hub or a folder, where the file names one ("hf-hub:...").

    Raises:
        ExportError: no such file, not one of ours, of another form, damaged, with values that are infinite or NaN, or
            of an architecture that has to be fetched.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"{file} isn't a file; the safetensors export of a run is accepted")
    try:
        with safe_open(file, framework="pt") as opened:
            header: dict[str, str] = dict(opened.metadata() or {})
        tensors = load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ExportError(f"{file} is truncated or no safetensors file: {error}") from error
    if header.get("firn_form") in ("timm", "hub-folder"):
        raise ExportError(
            f"{file} is a state dict of timm's: timm.create_model({header.get('architecture')!r}, "
            f"num_classes={header.get('num_classes')}).load_state_dict(safetensors.torch.load_file({file.name!r}))"
        )
    if header.get("firn_format") != str(FORMAT) or header.get("firn_form") != "safetensors":
        raise ExportError(f"{file} isn't an export of firn of format {FORMAT}")
    if bad := non_finite(tensors):
        raise ExportError(f"{file} holds infinite or NaN values in {first_names(bad)}")
    try:
        structure = json.loads(header["structure"])
        check_structure(structure, tensors, hub=hub)
        return ExportedModel(*rebuild(structure, tensors), header).eval()
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ExportError(f"{file} doesn't hold what its header says: {text}") from error
