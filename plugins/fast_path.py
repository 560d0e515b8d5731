"""The fast path: any Avalanche SGD strategy at nearly the speed of a hand-written loop, with the same results.

    strategy = SLCA(..., plugins=[FastPathPlugin()])

Three parts, each of which can be switched off:

* ``loader``: training and evaluation take whole batches from data in memory, and workers live through all epochs
  (:mod:`~avalanche_firn.plugins.fast_loader`). Same batches to the bit; other random numbers in the transforms of
  files that workers read.
* ``hooks``: only plugins, metrics and loggers with something to do are called in the loop
  (:mod:`~avalanche_firn.plugins.fast_hooks`). Same to the bit.
* ``one_pass``: all experiences of an evaluation are one sequence of full batches
  (:mod:`~avalanche_firn.plugins.fast_evaluation`). Same but for rounding, and for what counts evaluated batches: one
  across a border counts twice.

A part acts where the strategy's own loops are Avalanche's, and leaves the others as they are. How images come into
memory: :func:`avalanche_firn.benchmarks.hold_in_memory`. It may stand anywhere in the list of plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avalanche.models.utils import avalanche_model_adaptation
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from avalanche.training.templates.observation_type import BatchObservation
from torch.utils.data import DataLoader

from avalanche_firn.benchmarks.batches import WORKER_TIMEOUT
from avalanche_firn.plugins.fast_evaluation import OnePass, evaluation_loader, one_pass_fits, run_evaluation
from avalanche_firn.plugins.fast_hooks import install_hooks
from avalanche_firn.plugins.fast_loader import faster_loader

__all__ = ["FastPathPlugin"]


class FastPathPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Remove what Avalanche's loops cost beside the arithmetic; see the module.

    :param loader: whole batches from memory, lasting workers. :param hooks: call listeners only.
    :param one_pass: evaluate all experiences in one pass.
    :param prefetch_factor: batches that each worker holds ready (4: our choice; torch's default is 2).
    :param persistent_workers: keep the workers of a training experience from epoch to epoch.
    :param worker_timeout: seconds to wait for a batch of the workers before they count as hanging; 0 waits for ever.
    :raises ValueError: ``prefetch_factor`` below 1.
    """

    stateless = True
    """Nothing of this plugin goes into a checkpoint."""

    affects_results = False
    """A run may be resumed with or without it."""

    def __init__(
        self,
        *,
        loader: bool = True,
        hooks: bool = True,
        one_pass: bool = True,
        prefetch_factor: int = 4,
        persistent_workers: bool = True,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__()
        if prefetch_factor < 1:
            raise ValueError(f"prefetch_factor is {prefetch_factor}; 1 and above is accepted")
        self.loader, self.hooks, self.one_pass = loader, hooks, one_pass
        self.prefetch_factor, self.persistent_workers = prefetch_factor, persistent_workers
        self.worker_timeout = worker_timeout
        self._strategy: Any = None
        self._renew: Callable[[], None] = lambda: None
        self._whole: OnePass | None = None
        self._make_loader: Callable[..., None] = lambda: None
        self._adapt: Callable[[Any], Any] = lambda model: model

    # ------------------------------------------------------------------ hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Install what is switched on (once)."""
        self._whole = None  # an evaluation may have broken off
        self._install(strategy)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Put the faster loader in place, after all plugins that put in theirs when the experience began."""
        self._renew()
        if self.loader:
            strategy.dataloader = faster_loader(
                strategy.dataloader,
                prefetch_factor=self.prefetch_factor,
                persistent_workers=self.persistent_workers,
                timeout=self.worker_timeout,
            )

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Let go of the experience."""
        self._renew()

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """A new evaluation."""
        self._install(strategy)
        self._renew()
        self._whole = None
        experiences = strategy.current_eval_stream
        mine = vars(strategy).get("eval_epoch") == self._eval_epoch and not kwargs.get("shuffle")
        if self.one_pass and mine and one_pass_fits(strategy, experiences):
            workers = int(kwargs.get("num_workers", 0))
            more: dict[str, Any] = {}
            if workers:
                more = {"prefetch_factor": self.prefetch_factor, "timeout": self.worker_timeout}
            pinned = bool(kwargs.get("pin_memory", strategy.device.type == "cuda"))
            whole = OnePass(
                experiences, strategy.eval_mb_size, strategy.device, num_workers=workers, pin_memory=pinned, **more
            )
            if not whole.mixed:
                self._whole = whole
                strategy.model.to(strategy.device)  # once, and not for every experience

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Let go of the data."""
        self._whole = None
        self._renew()

    # ---------------------------------------------------------------- install
    def _install(self, strategy: Any) -> None:
        if strategy is self._strategy:
            return
        if self._strategy is not None:
            raise ValueError("this FastPathPlugin serves another strategy already; each strategy needs one of its own")
        self._strategy = strategy
        if self.hooks:
            self._renew = install_hooks(strategy)
        kind = type(strategy)
        stock = kind.eval_epoch is BaseSGDTemplate.eval_epoch and "eval_epoch" not in vars(strategy)
        if stock and kind.make_eval_dataloader is BaseSGDTemplate.make_eval_dataloader:
            # methods and no functions of their own: a copy of the strategy then has those of the plugin's copy
            self._make_loader, self._adapt = strategy.make_eval_dataloader, strategy.model_adaptation
            strategy.make_eval_dataloader = self._make_eval_dataloader
            if kind.model_adaptation is BatchObservation.model_adaptation:
                strategy.model_adaptation = self._model_adaptation
            strategy.eval_epoch = self._eval_epoch

    # ------------------------------------------- in the place of the strategy's own
    def _make_eval_dataloader(self, **options: Any) -> None:
        strategy = self._strategy
        pieces: Any = None if self._whole is None else self._whole.loader(strategy.experience)
        if pieces is None and self.loader and options.keys() <= {"num_workers", "pin_memory"}:
            pieces = evaluation_loader(strategy)
        if pieces is None:
            self._make_loader(**options)
            if isinstance(strategy.dataloader, DataLoader) and strategy.dataloader.num_workers:
                strategy.dataloader.timeout = self.worker_timeout
        else:
            strategy.dataloader = pieces

    def _model_adaptation(self, model: Any = None) -> Any:
        strategy = self._strategy
        if model is not None or self._whole is None or strategy.is_training:
            return self._adapt(model)
        # in one pass nothing grows but the width of outputs: no tensor to move to the device
        avalanche_model_adaptation(strategy.model, strategy.experience)
        return strategy.model

    def _eval_epoch(self, **options: Any) -> None:
        run_evaluation(self._strategy, self._whole, **options)
