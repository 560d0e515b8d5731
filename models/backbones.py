"""Feature extractors from timm: any ``timm.create_model`` name, or an architecture with a local weights file.

Why a function of our own: a continual learner that starts from the wrong weights still trains, and its figures look
plausible. So nothing here falls back: weights that are absent, incomplete or of another architecture stop with what
was expected, what was found and how to get it. The pre-processing that belongs to the weights comes along.
Cost: one construction, one forward pass of a single image to measure the features, one SHA-256 over the weights.
"""

import difflib
import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from avalanche_firn.models import convnets, resnet_firn, vit_firn  # registers our architectures with timm
from avalanche_firn.models.weight_files import WeightsError, first_names, misfits, non_finite, read_weights

__all__ = ["Backbone", "WeightsError", "list_backbones", "load_backbone", "renew_final_norm", "state_sha256"]


@dataclass(frozen=True)
class Backbone:
    """A feature extractor with everything a run has to record about it.

    :param module: ``module(x)`` with x (B, C, H, W) float gives features (B, num_features); no classifier.
    :param num_features: width of the features, measured with a forward pass.
    :param data_config: pre-processing of the weights: ``input_size`` (C, H, W), ``mean``, ``std``,
        ``interpolation``, ``crop_pct``, ``crop_mode``, as ``timm.data.create_transform`` takes them.
    :param tag: the full timm tag where the weights are timm's ("vit_firn_32.omniglot"), else the name as given.
    :param weights: "pretrained", "random", or the path of the file.
    :param weights_sha256: ``state_sha256(module)`` as loaded, after ``fresh_final_norm``.
    """

    module: nn.Module
    num_features: int
    data_config: dict[str, Any]
    tag: str
    weights: str
    weights_sha256: str


def list_backbones() -> list[str]:
    """Names of the architectures that this package adds to timm, with the tag where weights are shipped."""
    ours = {**convnets.default_cfgs, **resnet_firn.default_cfgs, **vit_firn.default_cfgs}
    return sorted(f"{name}.{tag}" if tag else name for name, cfgs in ours.items() for tag in cfgs.cfgs)


def state_sha256(module: nn.Module) -> str:
    """SHA-256 (hex) over the state dict: name, dtype, shape and bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    fresh_final_norm: bool = False,
    **timm_kwargs: Any,
) -> Backbone:
    """Build a feature extractor with the weights that were asked for, or stop.

    :param name: a ``timm.create_model`` name, with or without tag ("vit_base_patch16_224.augreg_in21k"), ours
        (``list_backbones()``) or with a source ("hf-hub:OWNER/NAME").
    :param pretrained: True: timm's weights for that name (downloaded by timm unless cached; ours are in the package).
        False: random initialisation, unless ``weights`` names a file.
    :param weights: local file for the architecture ``name`` instead: .safetensors, or .pth/.pt/.bin with tensors only
        (unpickled with ``weights_only=True``). Stored in any float type, loaded in the type of the model (float32).
        The file may hold the architecture's classifier, which is dropped.
    :param fresh_final_norm: replace the final LayerNorm by a new one (weight 1, bias 0, eps 1e-5), as SLCA's code
        does with a ViT (GengDavid/SLCA, convs).
    :param timm_kwargs: further arguments of ``timm.create_model`` (``img_size``, ``drop_path_rate``, ``in_chans`` ...).
    :returns: see :class:`Backbone`; the module is in training mode, on the CPU unless ``device`` is passed through.
    :raises WeightsError: weights absent, unreadable, not finite, incomplete or of another architecture.
    :raises ValueError: unknown name or tag (the nearest ones are suggested), contradictory or refused arguments, no
        final LayerNorm to replace, a model that doesn't give one feature vector per image.
    """
    _check_arguments(name, pretrained, weights, timm_kwargs)
    _check_name(name)
    if weights is not None:
        module = _from_file(name, Path(weights).expanduser(), fresh_final_norm, timm_kwargs)
    elif pretrained:
        module = _from_timm(name, timm_kwargs)
    else:
        module = _create(name, num_classes=0, **timm_kwargs)
    tag = name
    if weights is None and pretrained:
        cfg = _pretrained_cfg(module)
        parts = (cfg.get("architecture") or name.split(".")[0], cfg.get("tag"))
        tag = name if ":" in name else ".".join(part for part in parts if part)
    if fresh_final_norm:
        _replace_final_norm(module, name)
    data_config = _data_config(module, timm_kwargs)
    return Backbone(
        module=module,
        num_features=_measure_features(module, data_config, name),
        data_config=data_config,
        tag=tag,
        weights=str(weights) if weights is not None else "pretrained" if pretrained else "random",
        weights_sha256=state_sha256(module),
    )


def _check_arguments(name: Any, pretrained: Any, weights: Any, timm_kwargs: dict[str, Any]) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"name={name!r}: a timm model name (str) is expected")
    if not isinstance(pretrained, bool):
        raise TypeError(f"pretrained={pretrained!r}: True or False is expected; a file goes into weights=")
    if weights is not None and ":" in name:
        raise ValueError(
            f"name={name!r} with weights={str(weights)!r}: a local file needs the plain name of its architecture"
        )
    refused = {"num_classes", "checkpoint_path", "features_only", "pretrained_cfg", "pretrained_cfg_overlay"}
    if bad := sorted(refused & set(timm_kwargs)):
        raise ValueError(
            f"{', '.join(bad)} can't be passed on to timm: a backbone has no classifier; files go into weights="
        )


def _check_name(name: str) -> None:
    if ":" in name:
        return  # timm's own sources (hf-hub:, local-dir:) aren't in its registry
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"unknown backbone {name!r}: {hint} This package adds {', '.join(list_backbones())}.")
    if tag:
        known = [n.partition(".")[2] for n in timm.list_models(f"{architecture}.*", include_tags=True) if "." in n]
        if tag not in known:
            raise ValueError(f"backbone {architecture!r} has no tag {tag!r}; timm knows: {', '.join(known) or 'none'}")


def _create(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` without weights; arguments that the architecture refuses become a ValueError."""
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except ValueError:
        raise
    except (TypeError, RuntimeError, AssertionError, KeyError, OSError) as error:
        shown = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
        raise ValueError(f"backbone {name!r} can't be built with {shown}: {error}") from error


def _pretrained_cfg(module: nn.Module) -> dict[str, Any]:
    """What timm knows about the weights that the module was or could be loaded with."""
    return dict(cast(Any, module).pretrained_cfg)


def _how_to_get(name: str, on_hub: bool = True) -> str:
    download = f"a machine with network access (timm downloads and caches the weights of {name!r}); " if on_hub else ""
    return (
        f"Ways on: {download}a local file, weights='FILE.safetensors'; pretrained=False for random weights; "
        "or the embedded vit_firn_32.omniglot."
    )


@contextmanager
def _timm_reports() -> Iterator[list[str]]:
    """Collects what timm only logs when it leaves part of a model at its random initialisation."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Missing keys") or "random init" in text:
                found.append(text)

    logger, handler = logging.getLogger("timm.models._builder"), Collect(logging.INFO)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    # INFO is needed here, but shall not reach the user's handlers.
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _from_timm(name: str, timm_kwargs: dict[str, Any]) -> nn.Module:
    """timm's weights, loaded with the classifier they were trained with: only then does timm check every key."""
    if ":" not in name:
        known = timm.get_pretrained_cfg(name)  # None for timm's deprecated names, whose model says what it stands for
        cfg = known.to_dict() if known is not None else _pretrained_cfg(_create(name, num_classes=0, **timm_kwargs))
        if not any(cfg.get(source) for source in ("file", "url", "hf_hub_id")):
            tags = [n for n in timm.list_pretrained(f"{name.split('.')[0]}.*") if n != name]
            has = f"timm has weights for {', '.join(tags)}." if tags else "timm has no weights for this architecture."
            raise WeightsError(
                f"pretrained weights of {name!r} were asked for; {has} {_how_to_get(name, on_hub=False)}"
            )
        if cfg.get("file") and not Path(cfg["file"]).is_file():
            raise WeightsError(
                f"the weights file of {name!r} is absent: {cfg['file']}. Install the package anew, or "
                "pass weights='FILE.safetensors'; pretrained=False gives random weights."
            )
    with _timm_reports() as reports:
        try:
            module: Any = timm.create_model(name, pretrained=True, **timm_kwargs)
        except Exception as error:  # network, hub, disk, torch: timm lets many types through
            if ":" not in name:
                _create(name, num_classes=0, **timm_kwargs)  # wrong arguments are no weights problem: says so itself
            cause = str(error).strip()
            if isinstance(error, RuntimeError) and "state_dict" in cause:
                raise WeightsError(
                    f"the weights of {name!r} don't fit the model that was asked for "
                    f"({timm_kwargs or 'no further arguments'}): {cause[:1500]}"
                ) from error
            raise WeightsError(
                f"the weights of {name!r} could not be loaded "
                f"({type(error).__name__}: {cause[:300]}). {_how_to_get(name)}"
            ) from error
    if reports:
        raise WeightsError(
            f"the weights of {name!r} don't cover the model that was asked for "
            f"({timm_kwargs or 'no further arguments'}): {' '.join(reports)[:1500]}"
        )
    module.reset_classifier(0)
    if bad := non_finite(module.state_dict()):
        raise WeightsError(f"the weights of {name!r} hold infinite or NaN values in {first_names(bad)}")
    return module


def _classifier_prefixes(module: nn.Module) -> tuple[str, ...]:
    """What the keys of the architecture's classifier begin with: "head.", or "head.fc." where "head" holds more."""
    names = _pretrained_cfg(module).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    kept = {key.split(".")[0] for key in module.state_dict()}
    return tuple(f"{name if name.split('.')[0] in kept else name.split('.')[0]}." for name in names)


def _from_file(name: str, path: Path, fresh_final_norm: bool, timm_kwargs: dict[str, Any]) -> nn.Module:
    """Architecture ``name`` with the tensors of a file, each of them checked."""
    given = read_weights(path)
    module = _create(name, num_classes=0, **timm_kwargs)
    # The converter of the architecture, where timm has one: other key styles, position embeddings of another grid.
    converter = getattr(sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__], "checkpoint_filter_fn", None)
    if converter is not None:
        try:
            given = converter(dict(given), module)
        except Exception as error:  # a file of another architecture can break it anywhere
            raise WeightsError(
                f"weights={str(path)!r} is no checkpoint of {name!r}: its keys begin with "
                f"{first_names(sorted(given))} ({type(error).__name__}: {error})"
            ) from error
    expected = module.state_dict()
    classifier = _classifier_prefixes(module)
    given = {k: v for k, v in given.items() if k in expected or not k.startswith(classifier)}
    ignored = tuple(f"{c}." for c, _ in _final_norms(module)) if fresh_final_norm else ()
    optional = [k for k in expected if k.endswith("num_batches_tracked") or k.startswith(ignored)]
    if found := misfits(given, expected, optional):
        raise WeightsError(
            f"weights={str(path)!r} doesn't fit {name!r}: expected {len(expected)} tensors, found {len(given)}; "
            + "; ".join(found)
        )
    module.load_state_dict(given, strict=False)
    return module


def _final_norms(module: nn.Module) -> list[tuple[str, nn.LayerNorm]]:
    """LayerNorms over the feature width at the end of the backbone, the last one first."""
    found = [(n, getattr(module, n, None)) for n in ("fc_norm", "norm")]
    return [(n, m) for n, m in found if isinstance(m, nn.LayerNorm) and not isinstance(m, LayerNorm2d)]


def _replace_final_norm(module: nn.Module, name: str) -> None:
    norms = _final_norms(module)
    if not norms:
        raise ValueError(
            f"fresh_final_norm=True: {name!r} has no final LayerNorm (an attribute 'norm' or 'fc_norm'); "
            "leave it at False for this backbone"
        )
    attribute, old = norms[0]
    place = next(module.parameters())
    fresh = nn.LayerNorm(old.normalized_shape, eps=1e-5, device=place.device, dtype=place.dtype)  # as in SLCA's code
    setattr(module, attribute, fresh)


def renew_final_norm(module: nn.Module) -> bool:
    """Replace the final LayerNorm of a timm model by a new one (weight 1, bias 0, eps 1e-5), as SLCA's code does.

    :returns: False, and nothing is changed, if the module isn't timm's or has no final LayerNorm.
    """
    if not hasattr(module, "pretrained_cfg") or not _final_norms(module):
        return False
    _replace_final_norm(module, type(module).__name__)
    return True


def _data_config(module: nn.Module, timm_kwargs: dict[str, Any]) -> dict[str, Any]:
    """timm's data configuration, with the image size and channels that the model was really built for."""
    config = dict(resolve_model_data_config(module))
    channels, *size = config["input_size"]
    if (img_size := timm_kwargs.get("img_size")) is not None:
        size = [img_size] * 2 if isinstance(img_size, int) else list(img_size)
    channels = timm_kwargs.get("in_chans") or channels
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return {**config, "input_size": (channels, *size)}


@torch.no_grad()
def _measure_features(module: nn.Module, data_config: dict[str, Any], name: str) -> int:
    """Width of ``module(x)``, from one blank image in evaluation mode."""
    place, training = next(module.parameters()), module.training
    module.eval()
    out = module(torch.zeros(1, *data_config["input_size"], device=place.device, dtype=place.dtype))
    module.train(training)
    if not isinstance(out, Tensor) or out.ndim != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"backbone {name!r} gives {shape} for one image, not (1, features); pass global_pool='avg'")
    return out.shape[1]
