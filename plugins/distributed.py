"""One run on several GPUs or machines: any Avalanche SGD strategy under ``torchrun``, with the results of one process.

    device = start_processes()                       # does nothing without torchrun
    torch.manual_seed(0)                             # the same in every process
    strategy = SLCA(..., device=device, plugins=[..., DistributedPlugin()])

``train_mb_size`` stays the size of the batch as a whole. All processes do the same: they draw the same batches from the
same generators, hold the same buffers, statistics and optimizers, and decide the same. What they share is the model's
work: of each batch, in training and in evaluation, a process passes its own rows through the model and gets the outputs
of all (:mod:`avalanche_firn.models.processes`). So losses over a batch, metrics and whatever plugins make of outputs
are those of one process but for rounding. Features of data sets are shared in the same way
(:func:`~avalanche_firn.models.parts.extract_features`). Gradients are averaged by ``DistributedDataParallel``, which is
made anew whenever the model has grown or other parameters are trained. What is learnt image by image, as in ASB's
sequences, can't be shared: every process computes all of it (plugins say so by ``shares_batches = False``).

Random numbers inside the model in training (dropout) differ from process to process, and from those of one process.
BatchNorm takes its statistics over the whole batch on GPUs (``SyncBatchNorm``), and over a process's own rows on a CPU,
for which torch has no such module: a warning says so.

Every process loads the whole batch, which costs little for images that are held in memory
(:func:`avalanche_firn.benchmarks.hold_in_memory`); files that workers decode are decoded by every process. Cost of a
step beside the averaging of gradients: one exchange of outputs and about 20 us for the generators. Weights are compared
once per epoch and evaluation, which waits for the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from avalanche_firn.models.processes import all_rows, own_rows, process_count, process_rank, same_everywhere
from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin
from avalanche_firn.plugins.random_state import capture_random_state, derived_seed, restore_random_state

__all__ = ["DistributedPlugin", "refuse_unsafe"]

_KNOWN = ("PeriodicEval", "Clock", "ReplayPlugin", "EWCPlugin", "LwFPlugin", "LRSchedulerPlugin")
"""Avalanche's plugins that do the same in every process, from what is the same there, whatever they declare."""


def refuse_unsafe(strategy: Any, allow: Sequence[str] = ()) -> None:
    """Refuse plugins that aren't known to do the same in every process.

    A plugin is safe if its class says so (``supports_distributed=True``), if it derives from one of Avalanche's that do
    the same everywhere, or if its class stands in ``allow``.

    :raises ValueError: the names of the others.
    """
    accepted = {*_KNOWN, *allow}
    unsafe = [
        type(plugin).__name__
        for plugin in strategy.plugins
        if not isinstance(plugin, EvaluationPlugin)
        and not getattr(plugin, "supports_distributed", False)
        and not any(kind.__name__ in accepted for kind in type(plugin).__mro__)
    ]
    if unsafe:
        raise ValueError(
            f"{', '.join(dict.fromkeys(unsafe))}: not known to be safe in a distributed run, where every process has "
            "to decide and draw the same; a plugin declares it with supports_distributed=True, "
            "DistributedPlugin(allow=[...]) takes it on your word"
        )


class DistributedPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Share the model's work among the processes of ``torchrun``; see the module. Give it last in ``plugins``.

    In a single process it does nothing.

    :param find_unused_parameters: of DDP: expect steps in which some trainable parameter has no gradient. True costs a
        walk through the graph in each step, False makes such a step an error. None: whether the first step after the
        model has grown has such parameters.
    :param allow: names of further plugin classes that do the same in every process.
    :raises ValueError: a plugin that isn't safe (named); torch's generators differ between the processes.
    """

    stateless = True
    """Nothing of this plugin goes into a checkpoint: what differs between processes follows from their number."""

    affects_results = False
    """A run may be resumed with or without it: with another number of processes it goes on in the same way but for
    rounding and dropout."""

    def __init__(self, *, find_unused_parameters: bool | None = None, allow: Sequence[str] = ()) -> None:
        super().__init__()
        if isinstance(allow, str):
            raise ValueError(f"allow is {allow!r}; a list of names of plugin classes is accepted")
        self.find_unused_parameters = find_unused_parameters
        self.allow = tuple(allow)
        self.bytes_given = 0
        """Bytes of gradients and outputs that this process has given to exchanges in its own training steps."""
        self.batches = 0
        """Training batches (with accumulation: parts of them) that these were for."""
        self._strategy: Any = None
        self._plain: Callable[[], Any] = lambda: None
        self._parallel: DistributedDataParallel | None = None
        self._trained: list[nn.Parameter] = []  # those whose gradients it averages
        self._gradient_bytes = 0
        self._looked = False  # whether these were compared with the model's since the last evaluation, in this epoch
        self._shares = True
        self._warned = False

    # ------------------------------------------------------------------ hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Take the forward pass over (once)."""
        self._install(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The loaders of Avalanche would give each process samples of its own."""
        if process_count() > 1:
            _undivided(strategy.dataloader)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The model may have grown, others may be trained, and another loader may be in place."""
        self._looked = False
        if process_count() > 1:
            _undivided(strategy.dataloader)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """All processes hold the same weights."""
        self._agree(strategy)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The same after what others do at the end of an experience; what belongs to it is let go."""
        self._agree(strategy)
        self._release()

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Evaluation is shared, too, of the same weights."""
        self._install(strategy)
        self._agree(strategy)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """A model may grow in an evaluation, also between two steps."""
        self._looked = False

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """As in training."""
        if process_count() > 1:
            _undivided(strategy.dataloader)

    # ---------------------------------------------------------------- install
    def _install(self, strategy: Any) -> None:
        if strategy is self._strategy or process_count() == 1:
            return
        if self._strategy is not None:
            raise ValueError("this DistributedPlugin serves another strategy already; each strategy needs its own")
        refuse_unsafe(strategy, self.allow)
        _same_generators(torch.device(strategy.device))
        _join_batch_norm(strategy)
        strategy.model.to(strategy.device)
        self._strategy, self._plain = strategy, strategy.forward
        self._shares = all(getattr(part, "shares_batches", True) for part in (strategy, *strategy.plugins))
        # no function around the strategy, which a copy of the strategy would go on training
        forward = partial(self._forward, strategy)
        forward.per_image = True  # type: ignore[attr-defined]
        if hasattr(self._plain, "autocasts"):
            forward.autocasts = self._plain.autocasts  # type: ignore[attr-defined]
        strategy.forward = forward
        self._agree(strategy, first=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parallel": None, "_trained": [], "_looked": False}

    # ---------------------------------------------------------------- forward
    def _forward(self, strategy: Any) -> Any:
        """Outputs of the whole batch, of which this process computes its own rows."""
        if not self._shares:
            return self._plain()
        whole, count = strategy.mbatch, len(strategy.mb_x)
        rows = own_rows(count)
        strategy.mbatch = [part[rows] if len(part) == count else part for part in whole]
        learns = strategy.is_training and torch.is_grad_enabled()
        try:
            if learns:
                with _own_numbers(strategy):
                    output = self._learn(strategy)
            else:
                output = self._plain()
        finally:
            strategy.mbatch = whole
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model's output is a {type(output).__name__}; in a distributed run a tensor is accepted"
            )
        if learns:
            self.batches += 1
            self.bytes_given += output.numel() * output.element_size()
        return all_rows(output, count)

    def _learn(self, strategy: Any) -> Any:
        """Outputs of the own rows, whose gradients will be averaged."""
        output = None
        if not self._looked:
            self._looked = True
            chosen = [p for p in strategy.model.parameters() if p.requires_grad]
            if list(map(id, chosen)) != list(map(id, self._trained)):
                self._release()
                self._agree(strategy, first=True)
                self._trained, output = chosen, self._plain()
                if chosen:
                    self._wrap(strategy.model, chosen, output)
        if self._parallel is None:
            return self._plain() if output is None else output
        synchronised = self._synchronised(strategy)
        if isinstance(synchronised, nullcontext):
            self.bytes_given += self._gradient_bytes
        with synchronised:
            return self._parallel(self._plain if output is None else lambda: output)

    def _synchronised(self, strategy: Any) -> AbstractContextManager[Any]:
        """Of the mini-batches of one step only the last one's gradients are exchanged: those of all by then."""
        parts = [plugin for plugin in strategy.plugins if isinstance(plugin, GradientAccumulationPlugin)]
        if self._parallel is None or all(plugin.completes(strategy) for plugin in parts):
            return nullcontext()
        return self._parallel.no_sync()

    def _wrap(self, model: nn.Module, chosen: Sequence[nn.Parameter], output: Any) -> None:
        """DDP for the parameters that are trained now. `output`: of the model, with its graph."""
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in chosen)
        unused = self.find_unused_parameters
        if unused is None:
            used = _parameters_behind(output)
            unused = any(id(p) not in used for p in chosen)
        self._parallel = DistributedDataParallel(
            _Calls(model),
            find_unused_parameters=unused,
            broadcast_buffers=any(isinstance(module, _BatchNorm) for module in model.modules()),
            init_sync=False,  # a copy into weights would break the graph that is there already
        )

    def _release(self) -> None:
        """Let go of DDP and with it of its hooks on the parameters."""
        self._parallel, self._trained, self._gradient_bytes = None, [], 0

    # ------------------------------------------------------------------ agree
    @torch.no_grad()
    def _agree(self, strategy: Any, *, first: bool = False) -> None:
        """Give all processes the weights of the first one where they differ, and say so."""
        if process_count() == 1 or strategy is not self._strategy or not isinstance(strategy.model, nn.Module):
            return
        tensors = [t.detach() for t in (*strategy.model.parameters(), *strategy.model.buffers())]
        if same_everywhere(_digest(tensors, strategy.device)):
            return
        for tensor in tensors:
            dist.broadcast(tensor, 0)
        if not first and not self._warned and process_rank() == 0:
            self._warned = True
            warnings.warn(
                f"the weights differed between the processes in experience {strategy.clock.train_exp_counter}, as "
                "after operations that aren't deterministic on their device; those of the first process are used",
                RuntimeWarning,
                stacklevel=2,
            )


def _parameters_behind(output: Any) -> set[int]:
    """Ids of the leaf tensors that a tensor was computed from."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [output.grad_fn] if isinstance(output, Tensor) else []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


class _Calls(nn.Module):
    """Holds a model for DDP, whose forward pass then is that of a strategy, autocast and all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


@contextmanager
def _own_numbers(strategy: Any) -> Iterator[None]:
    """Random numbers of this process and iteration inside; the generators that all share are as before afterwards."""
    devices = [strategy.device] if strategy.device.type == "cuda" else []
    seed = derived_seed(torch.initial_seed() % 2**63, int(strategy.clock.train_iterations), process_rank())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _undivided(loader: Any) -> None:
    """Let a loader of Avalanche give every process the whole batch."""
    if getattr(loader, "distributed_sampling", False):
        loader.distributed_sampling = False


def _same_generators(device: torch.device) -> None:
    """torch's generators must be alike, of those of Python and NumPy all processes get the first one's state."""
    state = torch.get_rng_state()
    if device.type == "cuda":
        state = torch.cat([state, torch.cuda.get_rng_state(device)])
    if not same_everywhere(state):
        raise ValueError(
            "torch's random generators differ between the processes; call torch.manual_seed with the same seed in "
            "every process, before the model is built"
        )
    found = capture_random_state(cuda=False)
    python, numpy = found["python"], found["numpy"]
    whole = torch.cat([python["words"], numpy["words"], torch.tensor([numpy["position"], numpy["has_gauss"]])])
    cached = torch.tensor([math.nan if python["gauss"] is None else python["gauss"], numpy["gauss"]]).double()
    dist.broadcast(whole, 0)
    dist.broadcast(cached, 0)
    words = len(python["words"])
    gauss = float(cached[0])
    python |= {"words": whole[:words], "gauss": None if math.isnan(gauss) else gauss}
    numpy |= {
        "words": whole[words:-2],
        "position": int(whole[-2]),
        "has_gauss": int(whole[-1]),
        "gauss": float(cached[1]),
    }
    restore_random_state({**found, "python": python, "numpy": numpy})


def _join_batch_norm(strategy: Any) -> None:
    """BatchNorm over the whole batch, where torch can."""
    norms = [m for m in strategy.model.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return
    if strategy.device.type != "cuda":
        warnings.warn(
            f"the model has {len(norms)} BatchNorm layers: on a CPU each process takes their statistics over its own "
            "rows of a batch, so training differs from that in one process",
            RuntimeWarning,
            stacklevel=2,
        )
    elif any(not isinstance(norm, SyncBatchNorm) for norm in norms):
        strategy.model = SyncBatchNorm.convert_sync_batchnorm(strategy.model)


def _digest(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sums (T, 2), float64, plain and weighted by position, that differ where a tensor does, but for rare accidents."""
    found = torch.zeros(len(tensors), 2, dtype=torch.float64, device=device)
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            flat = tensor.to(device).flatten().double()
            found[index, 0] = flat.sum()
            found[index, 1] = flat.square().sum()
    return found
