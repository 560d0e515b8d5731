"""Loss landscapes: the loss around a model, or along its path through training, on a plane in weight space, drawn.

:func:`random_landscape` gives a filter-normalised random plane at a model, :func:`trajectory_landscape` the principal
plane of a recorded path with the path on it: the two kinds of "Visualizing the Loss Landscape of Neural Nets" (arXiv
1712.09913). They serve to look at zapping and at single tasks as arXiv 2507.01559 does, whose own recipe isn't public.
What differs from the authors' code: :mod:`~avalanche_firn.evaluation.landscape_math` and ``surface``; levels are evenly
spaced in the logarithm of the loss.

Cost: one forward pass of the images for each point of the grid, 625 by default; a few hundred images are enough to see
the shape.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor, nn

from avalanche_firn.evaluation.figures import DPI, PALETTE, plain_texts, save_figure
from avalanche_firn.evaluation.landscape_math import filter_normalized_direction, pca_directions
from avalanche_firn.evaluation.surface import check_data, loss_surface
from avalanche_firn.evaluation.trajectory import Part, Trajectory, chosen_parameters

LEVELS = 24  # colour steps of a figure; our choice
TEXTS = 10  # labels written beside a path; the markers stay. Our choice
MAX_BYTES = 64 * 2**20  # of a stored landscape; one of 625 points has 10 kB. Our choice
SPAN = 1e4  # colours reach from the highest finite loss down to this fraction of it; our choice

Quantity = Literal["loss", "accuracy"]


@dataclass(frozen=True, eq=False)
class Landscape:
    """Loss and accuracy on a grid, and a path on it.

    Args:
        xs, ys: (A,) and (B,) coordinates, strictly increasing.
        loss: (A, B) nats; entry [a, b] at (xs[a], ys[b]).
        accuracy: (A, B) fractions.
        path: (S, 2) coordinates in order; (0, 2) without a path.
        labels: S texts, "" for points without a mark; () for none at all.
        explained: shares of the variance along x and y; None where the plane isn't a principal one.
        axes: names of the two axes.

    Raises:
        ValueError: shapes that don't fit, coordinates that don't increase.
    """

    xs: NDArray[np.float64]
    ys: NDArray[np.float64]
    loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    path: NDArray[np.float64]
    labels: tuple[str, ...] = ()
    explained: tuple[float, float] | None = None
    axes: tuple[str, str] = ("x", "y")

    def __post_init__(self) -> None:
        for name in ("xs", "ys", "loss", "accuracy", "path"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float64))
        for name in ("xs", "ys"):
            values = getattr(self, name)
            if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
                raise ValueError(f"{name}: got {values.tolist()}; accepted are at least two increasing numbers")
        for name in ("loss", "accuracy"):
            if getattr(self, name).shape != (len(self.xs), len(self.ys)):
                accepted = f"({len(self.xs)}, {len(self.ys)}), xs by ys"
                raise ValueError(f"{name}: got shape {getattr(self, name).shape}; accepted is {accepted}")
        if self.path.ndim != 2 or self.path.shape[1] != 2 or len(self.labels) not in (0, len(self.path)):
            got = f"{self.path.shape} and {len(self.labels)} labels"
            raise ValueError(f"path: got {got}; accepted is (S, 2), and a label for each point or none")
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "axes", (str(self.axes[0]), str(self.axes[1])))

    # ------------------------------------------------------------------ picture
    @plain_texts
    def figure(self, quantity: Quantity = "loss", *, title: str | None = None) -> Figure:
        """Filled contours with a colour bar, and the path with its start, end and labelled points.

        Args:
            quantity: "loss", levels evenly spaced in its logarithm, or "accuracy", with a scale that begins and ends at
                full tens of percent. Points where the loss isn't finite stay white; losses below 1/10000 of the highest
                share a colour.
            title: line above.

        Returns:
            A figure that no pyplot manager knows.

        Raises:
            ValueError: another quantity, nothing finite to draw.
        """
        if quantity not in ("loss", "accuracy"):
            raise ValueError(f"quantity: got {quantity!r}; accepted is 'loss' or 'accuracy'")
        figure = Figure(figsize=(6.4, 4.9), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if quantity == "loss":
            self._draw_loss(figure, axes)
        else:
            self._draw_accuracy(figure, axes)
        if len(self.path):
            self._draw_path(axes)
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        else:
            axes.plot([0], [0], "+", color="white", markersize=11, markeredgewidth=2.0, path_effects=_edge(3.5))
        names = list(self.axes)
        if self.explained is not None:
            names = [f"{name} ({100 * s:.1f} % of variance)" for name, s in zip(names, self.explained, strict=True)]
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_xlim(self.xs[0], self.xs[-1])
        axes.set_ylim(self.ys[0], self.ys[-1])
        axes.spines[:].set_visible(False)
        axes.tick_params(labelsize=9)
        if title:
            axes.set_title(title, fontsize=11, loc="left")
        return figure

    def _draw_loss(self, figure: Figure, axes: Axes) -> None:
        finite = self.loss[np.isfinite(self.loss)]
        if finite.size == 0:
            raise ValueError("loss: no value is finite; accepted is at least one")
        high = max(float(finite.max()), 1e-12)
        low = max(float(finite.min()), high / SPAN)
        if low > high * 0.999:  # a plain: levels need some width
            low, high = low * 0.99, high * 1.01
        levels = np.geomspace(low, high, LEVELS + 1)
        shown = np.ma.masked_invalid(self.loss).clip(low, high)
        drawn = axes.contourf(self.xs, self.ys, shown.T, levels=levels, cmap="viridis_r", norm=LogNorm(low, high))
        axes.contour(self.xs, self.ys, shown.T, levels=levels[::3], colors="white", linewidths=0.5, alpha=0.6)
        bar = figure.colorbar(drawn, ax=axes, label="loss in nats", pad=0.02)
        bar.outline.set_visible(False)
        bar.set_ticks(_ticks(low, high))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        bar.minorticks_off()

    def _draw_accuracy(self, figure: Figure, axes: Axes) -> None:
        shown = np.ma.masked_invalid(np.where(np.isfinite(self.loss), self.accuracy, np.nan))
        if shown.count() == 0:
            raise ValueError("loss: no value is finite, so no accuracy means anything; accepted is at least one")
        low = math.floor(10 * float(shown.min()) + 1e-9)
        high = max(math.ceil(10 * float(shown.max()) - 1e-9), low + 1)
        levels = np.linspace(low, high, 4 * (high - low) + 1) / 10  # steps of 2.5 percent
        drawn = axes.contourf(self.xs, self.ys, shown.T, levels=levels, cmap="viridis")
        ticks, percent = levels[::4], PercentFormatter(1.0, decimals=0)
        bar = figure.colorbar(drawn, ax=axes, label="accuracy", pad=0.02, ticks=ticks, format=percent)
        bar.outline.set_visible(False)

    def _draw_path(self, axes: Axes) -> None:
        x, y = self.path.T
        axes.plot(x, y, color="white", linewidth=1.6, path_effects=_edge(3.2), zorder=3, label="_path")
        look: dict[str, Any] = {"linestyle": "", "markeredgecolor": "black", "markeredgewidth": 0.9, "zorder": 4}
        marked = [i for i, label in enumerate(self.labels) if label]
        between = [i for i in marked if 0 < i < len(x) - 1]
        axes.plot(x[:1], y[:1], marker="o", markersize=8, color="white", label="start", **look)
        if between:
            kind = "end of a task" if all(self.labels[i].startswith("task") for i in between) else "marked"
            axes.plot(x[between], y[between], marker="D", markersize=6, color=PALETTE[4], label=kind, **look)
        axes.plot(x[-1:], y[-1:], marker="*", markersize=14, color=PALETTE[1], label="end", **look)
        step = max(1, math.ceil(len(between) / TEXTS))
        for i in between[step - 1 :: step]:
            bend = self._outward(i)
            axes.annotate(
                self.labels[i],
                (x[i], y[i]),
                xytext=(25 * bend[0], 14 * bend[1]),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8.5,
                color="black",
                path_effects=[patheffects.withStroke(linewidth=2.4, foreground="white")],
                zorder=5,
            )

    def _outward(self, index: int) -> NDArray[np.float64]:
        """Away from the neighbours of an inner point, length 1, in the proportions of the picture: room for a text."""
        extent = np.asarray([np.ptp(self.xs), np.ptp(self.ys)])
        before, after = ((self.path[index] - self.path[i]) / extent for i in (index - 1, index + 1))
        away = before / (np.hypot(*before) or 1.0) + after / (np.hypot(*after) or 1.0)
        if np.hypot(*away) < 0.1:  # the path goes straight on: beside it
            away = np.asarray([-after[1], after[0]])
        length = np.hypot(*away)
        return away / length if length > 0 else np.asarray([0.0, 1.0])

    # -------------------------------------------------------------------- files
    def save(self, stem: str | Path, *, title: str | None = None) -> list[Path]:
        """Writes ``<stem>.npz`` with all numbers, ``<stem>-loss.png`` and ``<stem>-accuracy.png``; makes the folder.

        Returns:
            The three paths, numbers first: pictures that can't be drawn cost no numbers.
        """
        stem = Path(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        numbers = stem.with_name(f"{stem.name}.npz")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("xs", "ys", "loss", "accuracy", "path")}
        explained = np.asarray(() if self.explained is None else self.explained, dtype=np.float64)
        arrays |= {name: np.asarray(getattr(self, name), dtype=np.str_) for name in ("labels", "axes")}
        np.savez(numbers, **arrays, explained=explained)
        kinds: tuple[Quantity, ...] = ("loss", "accuracy")
        pictures = [
            save_figure(self.figure(kind, title=title), stem.with_name(f"{stem.name}-{kind}.png")) for kind in kinds
        ]
        return [numbers, *pictures]

    @classmethod
    def load(cls, stem: str | Path) -> Landscape:
        """What :meth:`save` wrote under the same stem, without unpickling anything.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged, holds something else, or announces more than 64 MB; it is named.
        """
        stem = Path(stem)
        path = stem.with_name(f"{stem.name}.npz")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is {'not a file' if path.exists() else 'absent'}")
        try:
            _check_members(path)
            with np.load(path, allow_pickle=False) as stored:
                arrays = dict(stored)
            if odd := [name for name, array in arrays.items() if array.dtype.kind not in "fiuU"]:
                raise ValueError(f"{odd[0]} holds {arrays[odd[0]].dtype}; accepted are numbers and texts")
            explained = arrays.pop("explained").tolist()
            labels, axes = (tuple(arrays.pop(name).tolist()) for name in ("labels", "axes"))
            return cls(**arrays, labels=labels, axes=axes, explained=tuple(explained) if explained else None)
        except (OSError, ValueError, TypeError, LookupError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} isn't a landscape as it was saved: {error}") from error


def _check_members(path: Path) -> None:
    """Refuses (ValueError) members that would take more memory than they announce, and more than `MAX_BYTES` in all."""
    with zipfile.ZipFile(path) as members:
        infos = members.infolist()
        size = sum(info.file_size for info in infos)
        if size > MAX_BYTES:
            raise ValueError(f"it announces {size:,} bytes; accepted are {MAX_BYTES:,}")
        for info in infos:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others aren't bounded by zipfile
                raise ValueError(f"{info.filename} is compressed by method {info.compress_type}; accepted is deflated")
            with members.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):  # what NumPy writes unless a header is very long
                    raise ValueError(f"{info.filename} is of version {version}; accepted is (1, 0)")
                shape, _, kind = np.lib.format.read_array_header_1_0(member)
                whole = math.prod(shape) * kind.itemsize == info.file_size - member.tell()
                if not whole or max(shape, default=0) > info.file_size:  # the second: many rows of no values
                    raise ValueError(f"{info.filename} announces {shape} of {kind} in {info.file_size:,} bytes")


def _edge(width: float) -> list[patheffects.AbstractPathEffect]:
    return [patheffects.withStroke(linewidth=width, foreground="black")]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the bounds; the bounds where there are fewer than three of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return ticks if len(ticks) >= 3 else [*np.geomspace(low, high, 4)]


# ---------------------------------------------------------------------- builders
def _checked_points(points: int) -> int:
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points: got {points!r}; accepted are integers from 2")
    return points


def random_landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    radius: float = 1.0,
    points: int = 25,
    seed: int = 0,
    part: Part = "all",
    ignore: Collection[str] = (),
    head_name: str | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Landscape:
    """The loss on a random, filter-normalised plane with the model in its centre.

    Coordinates are in units of the weights themselves: at (1, 0) every filter has moved by its own norm.

    Args:
        model, images, labels, batch_size, device: see :func:`~avalanche_firn.evaluation.surface.loss_surface`.
        radius: the grid covers [-radius, radius] on both axes; 1, as in the scripts of the reference.
        points: on each axis; odd numbers include the model itself. 25, our choice.
        seed: of the two directions, drawn by a private generator.
        part, ignore, head_name: parameters that move, see
            :func:`~avalanche_firn.evaluation.trajectory.chosen_parameters`; the others stay the model's.

    Raises:
        ValueError: an argument out of range, and as ``loss_surface``.
    """
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius: got {radius!r}; accepted are finite numbers above 0")
    grid = np.linspace(-radius, radius, _checked_points(points))
    chosen = chosen_parameters(model, part=part, ignore=ignore, head_name=head_name)
    generator = torch.Generator().manual_seed(seed)
    dx, dy = (filter_normalized_direction(chosen, generator=generator) for _ in range(2))
    loss, accuracy = loss_surface(
        model, images, labels, chosen, dx, dy, grid.tolist(), grid.tolist(), batch_size=batch_size, device=device
    )
    names = ("first random direction, filter-normalised", "second random direction, filter-normalised")
    return Landscape(grid, grid, loss.numpy(), accuracy.numpy(), np.zeros((0, 2)), axes=names)


def trajectory_landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    trajectory: Trajectory,
    *,
    points: int = 25,
    margin: float = 0.2,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Landscape:
    """The loss on the principal plane of a path, through its last snapshot, with the path drawn.

    The path is the projection of the snapshots: its points lie off the plane by what the two directions don't explain,
    so their own loss can differ from that of the surface below them; only the last one lies in the plane. Parameters
    that the trajectory doesn't hold (the head, with ``part="encoder"``) are everywhere the model's of now.

    Args:
        model, images, labels, batch_size, device: see :func:`~avalanche_firn.evaluation.surface.loss_surface`.
        trajectory: at least three snapshots that don't lie on one line.
        points: on each axis; 25, our choice.
        margin: room on each side of the path, as a fraction of its extent on that axis; 0.2, our choice.

    Raises:
        ValueError: an argument out of range, and as ``pca_directions`` and ``loss_surface``.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin: got {margin!r}; accepted are finite numbers from 0")
    _checked_points(points)
    check_data(images, labels, batch_size)  # before the passes over the snapshots
    plane = pca_directions(trajectory.points)
    path = plane.coordinates.numpy()
    low, high = path.min(0), path.max(0)
    room = margin * (high - low)
    xs, ys = np.linspace(low - room, high + room, points).T
    loss, accuracy = loss_surface(
        model,
        images,
        labels,
        trajectory.snapshot(-1),
        plane.dx,
        plane.dy,
        xs.tolist(),
        ys.tolist(),
        batch_size=batch_size,
        device=device,
    )
    return Landscape(
        xs,
        ys,
        loss.numpy(),
        accuracy.numpy(),
        path,
        labels=tuple(trajectory.labels),
        explained=(float(plane.explained[0]), float(plane.explained[1])),
        axes=("first principal direction", "second principal direction"),
    )


__all__ = ["Landscape", "random_landscape", "trajectory_landscape"]
