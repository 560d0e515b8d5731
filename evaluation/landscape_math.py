"""The arithmetic of loss landscapes: directions, principal planes and coordinates in the space of the weights.

Filter normalisation is that of "Visualizing the Loss Landscape of Neural Nets" (arXiv 1712.09913); the plane through a
trajectory is the one of its section on optimisation paths. Differs from the authors' code: principal directions come
from the (S, S) Gram matrix of the snapshots, read in blocks, instead of a decomposition of the whole (S, P) matrix, so
no second copy of the snapshots is made; coordinates are least squares throughout (dividing the inner product once by
the norm of the direction, their other choice, is only right for directions of norm 1). All is computed on the CPU
in float64, but for filter-normalised directions, which stay with their weights.

Cost: three passes over the snapshots, S^2 P multiply-additions, and 64 MiB beside the directions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Layout = dict[str, torch.Size]

EPSILON = 1e-10  # added to the norm of a filter of the direction; tomgoldstein/loss-landscape, net_plotter.py
BLOCK_BYTES = 64 * 2**20  # of one float64 block of columns; our choice
FLAT = 1e-12  # second principal variance over the first, below which the path counts as straight; our choice


# -------------------------------------------------------------------- directions
def normalize_direction(direction: Weights, weights: Weights, *, ignore: Collection[str] = ()) -> dict[str, Tensor]:
    """Filter normalisation: ``d_f * |w_f| / (|d_f| + 1e-10)`` for every filter f.

    A filter is one entry of the first dimension: an output channel of a convolution, a row of a linear layer.

    Args:
        direction: name -> raw direction, the names and shapes of ``weights``.
        weights: name -> floating-point tensor.
        ignore: names whose direction becomes 0.

    Returns:
        New tensors, dtype and device of the weights. Tensors with fewer than two dimensions (biases, scales of
        norms) get 0: with filters of one number, normalisation would leave nothing but random signs.

    Raises:
        ValueError: other names or shapes, no tensor at all, one that isn't floating-point or not finite, unknown
            names in ``ignore``.
    """
    _check_weights(weights, ignore)
    if direction.keys() != weights.keys():
        raise ValueError(
            f"direction: names differ in {sorted(direction.keys() ^ weights.keys())}; those of weights are"
        )
    if broken := [name for name, w in weights.items() if not bool(w.isfinite().all())]:
        raise ValueError(f"weights: NaN or infinity in {_some(broken)}; accepted are finite weights")
    scaled = {}
    for name, w in weights.items():
        d, w = direction[name].detach(), w.detach()
        if d.shape != w.shape:
            raise ValueError(f"direction: {name} has shape {tuple(d.shape)}; accepted is {tuple(w.shape)}")
        if w.ndim < 2 or name in ignore:
            scaled[name] = torch.zeros_like(w)
            continue
        rows, wide = d.to(w.device).flatten(1), torch.promote_types(w.dtype, torch.float32)
        norms = w.flatten(1).norm(dim=1, dtype=wide) / (rows.norm(dim=1, dtype=wide) + EPSILON)
        scaled[name] = (rows.to(wide) * norms[:, None]).to(w.dtype).reshape(w.shape)
    return scaled


def filter_normalized_direction(
    weights: Weights, *, generator: torch.Generator, ignore: Collection[str] = ()
) -> dict[str, Tensor]:
    """A Gaussian direction, filter-normalised (see :func:`normalize_direction`).

    All tensors are drawn, in order, also those that become 0 afterwards: ``ignore`` changes nothing for the others.

    Args:
        weights: name -> floating-point tensor, for instance ``dict(model.named_parameters())``.
        generator: on the CPU, so that every device gets the same direction; half types are drawn in float32.
        ignore: names whose direction is 0.

    Returns:
        Name -> tensor like the weight. Raises ValueError as :func:`normalize_direction`.
    """
    _check_weights(weights, ignore)
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise ValueError(f"generator: got {generator!r}; accepted is a torch.Generator on the CPU")
    raw = {
        name: torch.randn(w.shape, generator=generator, dtype=torch.promote_types(w.dtype, torch.float32))
        for name, w in weights.items()
    }
    return normalize_direction(raw, weights, ignore=ignore)


def _check_weights(weights: Weights, ignore: Collection[str]) -> None:
    if not weights:
        raise ValueError("weights: got none; accepted is at least one tensor")
    if wrong := [f"{name} ({w.dtype})" for name, w in weights.items() if not w.is_floating_point()]:
        raise ValueError(f"weights: {', '.join(wrong)}; accepted are floating-point tensors")
    if isinstance(ignore, str) or (unknown := sorted({*ignore} - weights.keys())):
        what = f"the text {ignore!r}" if isinstance(ignore, str) else f"the unknown {unknown}"
        raise ValueError(f"ignore: got {what}; accepted are names out of {_some(weights)}")


def _some(names: Collection[str]) -> str:
    shown = ", ".join([*names][:6])
    return f"[{shown}{', ...' if len(names) > 6 else ''}]"


# ------------------------------------------------------------- points in weight space
@dataclass(frozen=True)
class Points:
    """``count`` points in the space of P parameters, read block by block.

    Args:
        count: n.
        layout: names and shapes of the parameters in order; None for plain vectors.
        blocks: yields (n, p) float64 blocks whose columns make up all P, in the same order at every call.
    """

    count: int
    layout: Layout | None
    blocks: Callable[[], Iterator[Tensor]]


def block_width(count: int) -> int:
    """Columns of a block of ``count`` rows."""
    return max(1, BLOCK_BYTES // (8 * max(1, count)))


def as_points(points: Points | Tensor | Weights | Sequence[Weights]) -> Points:
    """Points out of a matrix (n, P), a vector (P,), one mapping of names to tensors or a sequence of mappings."""
    if isinstance(points, Points):
        return points
    if isinstance(points, Tensor):
        if points.ndim not in (1, 2) or 0 in points.shape or not points.is_floating_point():
            got = f"{points.dtype} {tuple(points.shape)}"
            raise ValueError(f"points: got {got}; accepted is a floating-point tensor (n, P) or (P,)")
        matrix = points.detach().reshape(-1, points.shape[-1])
        width = block_width(len(matrix))
        return Points(len(matrix), None, lambda: (part.to("cpu", torch.float64) for part in matrix.split(width, dim=1)))
    rows: list[Weights] = [points] if isinstance(points, Mapping) else [*points]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"points: got {points!r:.80}; accepted are tensors by name, a sequence of them, or a matrix")
    _check_weights(rows[0], ())
    layout = {name: w.shape for name, w in rows[0].items()}
    for index, row in enumerate(rows):
        if {name: w.shape for name, w in row.items()} != layout:
            differing = [n for n in {**layout, **row} if n not in row or row[n].shape != layout.get(n)]
            raise ValueError(
                f"points: number {index} differs from the first one in {_some(differing)}; same shapes are"
            )
    width = block_width(len(rows))

    def blocks() -> Iterator[Tensor]:
        for name in layout:
            flat = [row[name].detach().reshape(-1) for row in rows]
            for start in range(0, flat[0].numel(), width):
                yield torch.stack([part[start : start + width].to("cpu", torch.float64) for part in flat])

    return Points(len(rows), layout, blocks)


def flat_vector(direction: Tensor | Weights, layout: Layout | None, what: str) -> Tensor:
    """A direction as a vector (P,), float64, in the order of ``layout``; ValueError if it doesn't belong there."""
    if isinstance(direction, Tensor) == (layout is not None) or (isinstance(direction, Tensor) and direction.ndim != 1):
        kind = "a vector (P,), as the points are vectors" if layout is None else f"tensors by name, {_some(layout)}"
        raise ValueError(f"{what}: got {type(direction).__name__}; accepted is {kind}")
    if isinstance(direction, Tensor):
        return direction.detach().to("cpu", torch.float64)
    assert layout is not None
    if {name: w.shape for name, w in direction.items()} != layout:
        raise ValueError(f"{what}: got {_some(direction)}; accepted are the names and shapes of {_some(layout)}")
    return torch.cat([direction[name].detach().reshape(-1).to("cpu", torch.float64) for name in layout])


def named_tensors(vector: Tensor, layout: Layout) -> dict[str, Tensor]:
    """A vector (P,) cut into tensors by name (views)."""
    parts = vector.split([shape.numel() for shape in layout.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)}


def project(points: Points | Tensor | Weights | Sequence[Weights], dx: Any, dy: Any) -> Tensor:
    """Coordinates (a, b) with ``a * dx + b * dy`` nearest to each point: least squares, for any two directions.

    Args:
        points: (n, P) or (P,) tensor, tensors by name, or a sequence of such; relative to the origin of the plane.
        dx, dy: directions, vectors (P,) or tensors by name, as the points are; need not be orthogonal or of norm 1.

    Returns:
        (n, 2) float64, also for a single point.

    Raises:
        ValueError: shapes or names that don't fit, NaN or infinity in a direction, parallel or zero directions.
    """
    points = as_points(points)
    pair = torch.stack([flat_vector(dx, points.layout, "dx"), flat_vector(dy, points.layout, "dy")], dim=1)
    if not bool(pair.isfinite().all()):
        raise ValueError("dx, dy: NaN or infinity; accepted are finite directions")
    q, r = torch.linalg.qr(pair)
    if len(pair) < 2 or not float(r[1, 1].abs()) > 1e-10 * float(r[:, 1].norm()) or float(r[0, 0]) == 0:
        raise ValueError("dx, dy: they are parallel or 0, so they span no plane; accepted are independent directions")
    inner, start = q.new_zeros(points.count, 2), 0
    for block in points.blocks():
        if start + block.shape[1] > len(q):
            raise ValueError(f"points: they have more than the {len(q)} parameters of dx; accepted are as many")
        inner += block @ q[start : start + block.shape[1]]
        start += block.shape[1]
    if start != len(q):
        raise ValueError(f"points: got {start} parameters; accepted are the {len(q)} of dx")
    return torch.linalg.solve_triangular(r, inner.T, upper=True).T


class PrincipalPlane(NamedTuple):
    """What :func:`pca_directions` returns."""

    dx: Any
    """First principal direction, norm 1: a vector (P,) float64, or tensors by name if the snapshots were."""
    dy: Any
    """Second principal direction, orthogonal to the first."""
    explained: Tensor
    """(2,) float64, the share of the variance of the snapshots along each."""
    coordinates: Tensor
    """(S, 2) float64, of ``theta_s - theta_end`` (not centred): the last row is 0."""


def pca_directions(snapshots: Points | Tensor | Sequence[Weights]) -> PrincipalPlane:
    """The plane in which a path through weight space moves most.

    Principal directions of the mean-centred set ``{theta_s - theta_end}``, through its (S, S) Gram matrix. Their sign
    is free; here the path starts at coordinates that aren't positive and ends in the origin.

    Args:
        snapshots: S >= 3 of them in order, (S, P) or tensors by name.

    Raises:
        ValueError: fewer than three snapshots, NaN or infinity (naming the first such snapshot), snapshots that are
            all equal or lie on one line: there is no second direction then.
    """
    points = as_points(snapshots)
    if points.count < 3:
        raise ValueError(f"snapshots: got {points.count}; accepted are at least 3, as two lie on one line")
    gram = torch.zeros(points.count, points.count, dtype=torch.float64)
    for block in points.blocks():
        if not bool(block.isfinite().all()):
            broken = int((~block.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(
                f"snapshots: number {broken} (from 0) has NaN or infinite weights; accepted are finite ones"
            )
        centred = _centred(block)
        gram += centred @ centred.T
    values, vectors = torch.linalg.eigh(gram)
    first, second, total = float(values[-1]), float(values[-2]), float(gram.trace())
    if total <= 0:
        raise ValueError(f"snapshots: all {points.count} are equal; accepted are weights that moved")
    if second <= FLAT * first:
        raise ValueError(
            "snapshots: they lie on one line, so there is no second principal direction; accepted is a path with a turn"
        )
    scores = vectors[:, [-1, -2]].T / values[[-1, -2], None].sqrt()
    directions = torch.cat([scores @ _centred(block) for block in points.blocks()], dim=1)
    # the Gram matrix has squared the condition number, so the weaker direction is cleaned once more
    directions[0] /= directions[0].norm()
    directions[1] -= (directions[1] @ directions[0]) * directions[0]
    directions[1] /= directions[1].norm()
    coordinates, start = directions.new_zeros(points.count, 2), 0
    for block in points.blocks():
        coordinates += (block - block[-1]) @ directions[:, start : start + block.shape[1]].T
        start += block.shape[1]
    sign = torch.where(coordinates[0] > 0, -1.0, 1.0).to(torch.float64)
    directions, coordinates = directions * sign[:, None], coordinates * sign + 0.0  # no negative zeros
    dx, dy = directions if points.layout is None else (named_tensors(row, points.layout) for row in directions)
    return PrincipalPlane(dx, dy, torch.tensor([first, second], dtype=torch.float64) / total, coordinates)


def _centred(block: Tensor) -> Tensor:
    moved = block - block[-1]  # first, else a large common offset costs digits
    return moved - moved.mean(0)


__all__ = [
    "Points",
    "PrincipalPlane",
    "as_points",
    "block_width",
    "filter_normalized_direction",
    "named_tensors",
    "normalize_direction",
    "pca_directions",
    "project",
]
