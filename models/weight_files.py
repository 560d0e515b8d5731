"""Reads weights files of strangers: tensors and nothing else, no larger than the file, all of them finite.

A .safetensors file is a header and bytes, and its reader checks that they agree. A .pth, .pt or .bin file is a pickle
inside an archive (or, before torch 1.6, a bare one): it is read with ``weights_only=True``, which builds tensors alone,
after :mod:`~avalanche_firn.models.weight_pickles` has found that it asks for no more memory than it has bytes. Tensors
that stretch a few bytes over a large shape are refused here.

Cost: the file is read once, and every value looked at once (0.1 s for the 86 million of a ViT-B/16).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from avalanche_firn.models.weight_pickles import check_file

__all__ = ["SUFFIXES", "WeightsError", "first_names", "misfits", "non_finite", "read_weights"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_FEW = 4  # names that a message lists


class WeightsError(ValueError):
    """Weights were asked for and can't be had, or don't fit the architecture."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name, on the CPU; what training scripts wrap a state dict in is taken off.

    :param path: with one of ``SUFFIXES``. A link to a file is followed.
    :raises WeightsError: no file, a folder, a pipe, truncated, of another kind, more than tensors, tensors of another
        layout than dense ones, or values that are infinite or NaN. The message names file and tensors.
    """
    label = f"weights={str(path)!r}"
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{label}: a file that ends in one of {', '.join(SUFFIXES)} is expected")
    if not path.is_file():
        if path.exists():
            raise WeightsError(f"{label} is a folder, a pipe or a device; a file is expected")
        raise WeightsError(f"{label}: no such file. pretrained=False gives random weights.")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            check_file(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{label} holds more than tensors{_named_by(error)} and isn't unpickled, which could run code; convert it "
            "to safetensors where you trust it"
        ) from error
    except Exception as error:  # a hostile file can break the readers anywhere
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{label} can't be read, truncated or not a weights file: {str(error) or type(error).__name__}"
        ) from error
    for key in ("state_dict", "model"):  # what training scripts wrap a state dict in
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{label} holds no state dict, but {type(content).__name__}")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in ("_orig_mod.", "module."):  # torch.compile, data parallel
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k[len(prefix) :]: v for k, v in tensors.items()}
    if bad := [k for k, v in tensors.items() if not _dense(v)]:
        raise WeightsError(
            f"{label} holds tensors that aren't dense, or are larger than the bytes they are made of, in "
            f"{first_names(bad)}"
        )
    if bad := non_finite(tensors):
        raise WeightsError(f"{label} holds infinite or NaN values in {first_names(bad)}")
    return {k: v.detach() for k, v in tensors.items()}


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinity or NaN."""
    found = []
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # the types of one byte know no isfinite
        values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        if not bool(values.isfinite().all()):
            found.append(name)
    return found


def misfits(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: Iterable[str] = ()) -> list[str]:
    """In what tensors differ from those that a model has, one text per kind; empty where they fit.

    :param given: of a file. :param expected: state dict of the model; float tensors fit whatever their float type,
        unless the model's can't hold a value.
    :param optional: names that may be missing.
    """
    optional = set(optional)
    shapes, kinds, values = [], [], []
    for name, tensor in given.items():
        own = expected.get(name)
        if own is None:
            continue
        if tensor.shape != own.shape:
            shapes.append(f"{name} {tuple(tensor.shape)}, expected {tuple(own.shape)}")
        elif _kind(tensor) != _kind(own):
            kinds.append(f"{name} {_type(tensor)}, expected {_type(own)}")
        elif tensor.dtype != own.dtype and own.is_floating_point():
            values += [name for _ in non_finite({name: tensor.to(own.dtype)})]
    found = {
        "missing": [name for name in expected if name not in given and name not in optional],
        "unexpected": [name for name in given if name not in expected],
        "wrong shape": shapes,
        "wrong type": kinds,
        "too large for the model's type": values,
    }
    return [f"{label} {len(names)} ({first_names(names)})" for label, names in found.items() if names]


def first_names(names: list[str]) -> str:
    """The first few of them, and how many there are."""
    return ", ".join(names[:_FEW]) + (f" ... ({len(names)} in all)" if len(names) > _FEW else "")


def _named_by(error: Exception) -> str:
    """The class or function that torch refused, out of a text of many lines."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def _dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "int"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
