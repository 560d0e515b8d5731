"""Exact checkpoints: a run that is killed anywhere and resumed ends as if nothing had happened, to the bit.

Plain values and tensors, no pickle, inside experiences as well as between them::

    checkpoint = ExactCheckpointPlugin("run/checkpoint", append_only=["run/events.out.tfevents.*"])
    strategy = SLCA(..., plugins=[checkpoint])
    start = checkpoint.resume(strategy)               # before the first train; 0 if there is nothing to resume
    for experience in benchmark.train_stream[start:]:
        if not checkpoint.is_trained(experience):     # the run had stopped between training and the next training
            strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)

Inside an experience, its opening hooks run again with the evaluator silent; the epoch begins with the random state it
began with; the batches that were used are loaded again and dropped, which brings sampler and loader workers to where
they were; then model, optimizer, plugins, metrics, clock and random generators are set. A plugin whose opening hooks
depend on the task takes it from ``strategy.clock`` or the experience, which are right then. Run the script as before.

What may differ when a run goes on, and what is said then:

* Another configuration (fingerprint, classes of plugins and metrics, sizes, shapes, precision) or format is refused.
* Versions, device, threads, and the precision that ``auto`` gives there: a warning; results may differ in the last
  bits. Generators of CUDA devices that aren't there are left out.
* Mini-batches per optimizer step, with the same images per step (:mod:`~avalanche_firn.plugins.recut`): a warning;
  results differ by rounding.
* Another number of processes (:mod:`~avalanche_firn.plugins.distributed`): a warning; the batches stay the same,
  results differ by rounding and by what dropout draws.
* Damaged checkpoints: a warning, and the one before is used. All damaged: refused, see ``allow_fresh``.

What can't be written raises :class:`~avalanche_firn.plugins.run_errors.StorageError` and leaves the checkpoints before
as they were.

Cost: about 6 microseconds per iteration, and per save the bytes of model, optimizer and plugins, written and hashed.
Gradients that are accumulated over mini-batches are not saved: a checkpoint waits for the step that they are for. In a
distributed run the first process writes, and all read the folder. Not covered: gradients carried over in other ways,
loggers with a memory of their own.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates.base_sgd import PeriodicEval

from avalanche_firn.models.processes import process_rank
from avalanche_firn.plugins.accumulation import inside_group
from avalanche_firn.plugins.checkpoint_errors import CheckpointError
from avalanche_firn.plugins.checkpoint_files import (
    checkpoints,
    clean,
    cut_back,
    measure,
    newest_valid,
    refuse_links,
    set_aside,
    write_checkpoint,
)
from avalanche_firn.plugins.checkpoint_fit import fitted
from avalanche_firn.plugins.event_files import after
from avalanche_firn.plugins.folder_lock import lock_directory, unlock_directory
from avalanche_firn.plugins.loader_replay import LoaderReplay
from avalanche_firn.plugins.memory_stop import is_out_of_memory
from avalanche_firn.plugins.model_state import check_growth
from avalanche_firn.plugins.plain_state import from_plain, to_plain
from avalanche_firn.plugins.process_group import wait_for_all
from avalanche_firn.plugins.random_state import capture_random_state, restore_random_state
from avalanche_firn.plugins.run_errors import RunError
from avalanche_firn.plugins.storage_stop import writing
from avalanche_firn.plugins.strategy_state import (
    capture_strategy,
    check_strategy,
    close_writers,
    environment,
    flush_loggers,
    reopen_writers,
    restore_strategy,
    structure,
    unmatched_writers,
    verify_plugins,
)


class ExactCheckpointPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Save a run every N iterations and after each ``train`` call, and continue it exactly.

    :param directory: folder of the checkpoints, one per run.
    :param every: training iterations between checkpoints; 0: only after each ``train`` call. A checkpoint that falls on
        the last batch of an epoch is made at the start of the next one. Default: 200, our choice.
    :param keep: checkpoints kept; the older ones are for the case that a newer one is damaged. Default: 2, our choice.
    :param fingerprint: text that must be equal on resuming, such as a hash of the configuration. Classes, sizes and
        parameter shapes are compared in any case.
    :param append_only: files that the run only appends to, paths or globs: TensorBoard's event files, CSV. Resuming
        cuts them back to their length at the checkpoint and deletes matching files that came later, so name files of
        this run only. Loggers may be created before :meth:`resume`; what they wrote in this process by then is dropped.
    :raises ValueError: ``every`` or ``keep`` out of range.
    """

    stateless = True
    """Nothing of this plugin goes into a checkpoint."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int = 200,
        keep: int = 2,
        fingerprint: str | None = None,
        append_only: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        super().__init__()
        if every < 0:
            raise ValueError(f"every is {every}; 0 (experience ends only) and above is accepted")
        if keep < 1:
            raise ValueError(f"keep is {keep}; 1 and above is accepted")
        if isinstance(append_only, (str, os.PathLike)):
            raise ValueError(f"append_only is {append_only!r}; a list of paths or globs is accepted")
        self.directory = Path(directory).absolute()
        self.every = every
        self.keep = keep
        self.fingerprint = fingerprint
        self.append_only = _absolute(append_only)
        self._strategy: Any = None
        self._structure: dict[str, Any] = {}
        self._pending: dict[str, Any] | None = None  # state inside an experience, still to be entered
        self._opening = False  # the opening hooks of the interrupted experience are running
        self._trained: int | None = None  # the experience after whose training the run had stopped
        self._replay = LoaderReplay()
        self._next_save = 0
        self._train_epochs = 0
        self._optimizer: Any = None  # as it was before the current experience
        self._rebuilt = False  # the strategy replaces its optimizer in every experience
        self._must_rebuild = False
        self._stopped = ""  # why nothing may be saved any more

    @property
    def reopening(self) -> bool:
        """Whether the opening hooks run again for an experience whose state is restored afterwards.

        What a plugin computes then is overwritten, so it may leave expensive work out.
        """
        return self._opening

    # -------------------------------------------------------------------- use
    def resume(self, strategy: Any, *, allow_fresh: bool = False) -> int:
        """Bring the strategy to the newest checkpoint, and make the first one if there is none.

        :param allow_fresh: start over if there are checkpoints and all are damaged; the files of ``append_only`` are
            deleted then.
        :returns: how many experiences are done: train on ``train_stream[n:]``. The first of these may be trained
            already, see :meth:`is_trained`.
        :raises ValueError: the strategy holds something that can't be saved exactly (named), or (``CheckpointError``)
            the checkpoint was made by another configuration, the directory is in use or a link, no checkpoint is
            intact.
        :raises StorageError: the directory, or the first checkpoint, can't be written.
        :raises RuntimeError: called twice, or after training has begun.
        """
        if self._strategy is not None:
            raise RuntimeError("resume() was called before; each run makes its own ExactCheckpointPlugin")
        if strategy.clock.train_iterations or strategy.clock.train_exp_counter:
            raise RuntimeError("resume() comes before the first train(); this strategy has been trained already")
        if not any(p is self for p in strategy.plugins):
            raise ValueError("the strategy doesn't hold this plugin; pass it in plugins=[...]")
        # last of all: after the clock in training, after evaluator and loggers at the end of an experience
        strategy.plugins[:] = [p for p in strategy.plugins if p is not self] + [self]
        strategy.model.to(strategy.device)
        check_strategy(strategy, inside=self.every > 0)
        self._structure = structure(strategy)
        main = process_rank() == 0
        for folder in unmatched_writers(strategy, self.append_only):
            text = f"no pattern of append_only covers the event files in {folder}: resuming repeats events there"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        refuse_links(self.directory)
        if main:
            with writing("the folder of checkpoints", self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            lock_directory(self.directory, self, self._revoke)
            clean(self.directory)
        try:
            with writing("what a run appends to, cut back to its last checkpoint", self.directory.parent):
                found = self._find(strategy, allow_fresh)
        except BaseException:
            unlock_directory(self.directory, self)
            raise
        self._strategy = strategy
        wait_for_all()  # nobody writes before everybody has read
        if found is None:
            self._next_save = self.every
            self._save("start")
            return 0
        with self._restoring():
            return self._enter(found)

    def is_trained(self, experience: Any) -> bool:
        """Whether the resumed run had finished training on this experience, so that ``train`` must be left out.

        True for at most one experience, until the next ``train``.
        """
        return self._trained is not None and experience.current_experience == self._trained

    @staticmethod
    def rewind(directory: str | os.PathLike[str], append_only: Sequence[str | os.PathLike[str]]) -> None:
        """Cut files back to the newest intact checkpoint before loggers open them (:meth:`resume` does it as well).

        For loggers that read or overwrite what is there. Without a checkpoint nothing happens.

        :raises CheckpointError: another process uses the directory, a file is shorter than recorded, or one is a link.
        :raises StorageError: a file can't be cut back.
        """
        folder = Path(directory).absolute()
        refuse_links(folder)
        if not checkpoints(folder):
            return
        lock_directory(folder, ExactCheckpointPlugin, lambda: None)  # until resume() takes it over
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # resume() reports damaged checkpoints
            try:
                found = newest_valid(folder, tensors=False)
            except CheckpointError:
                return
        if found is not None:
            with writing("what a run appends to, cut back to its last checkpoint", folder.parent):
                cut_back(folder, _absolute(append_only), found[1]["append_only"])

    def close(self) -> None:
        """Give the directory back to other processes; nothing is saved from here on."""
        unlock_directory(self.directory, self)
        self._stopped = "it was closed"

    # ------------------------------------------------------------------ hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Insist on :meth:`resume`: without it an old checkpoint would be overwritten by a new run."""
        if strategy is not self._strategy:
            raise RuntimeError("ExactCheckpointPlugin: call resume(strategy) before the first train()")
        self._trained = None
        self._opening = self._pending is not None
        self._optimizer = strategy.optimizer

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Run the remaining epochs only, and let the clock say where the run stands."""
        self._replay.clear()
        self._train_epochs = strategy.train_epochs
        if self._pending is None:
            return
        self._check_experience(strategy, self._pending)
        done = self._pending["epoch"]
        strategy.train_epochs = self._train_epochs - done
        strategy.clock.train_exp_epochs = done
        clock = self._pending["strategy"]["clock"]
        if "recut" in self._pending:
            clock["train_exp_iterations"] = done * len(strategy.dataloader) + clock["train_epoch_iterations"]
        strategy.clock.train_exp_iterations = clock["train_exp_iterations"]

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Put the recording loader in place."""
        self._rebuilt = strategy.optimizer is not self._optimizer
        if self._must_rebuild and not self._rebuilt:
            raise CheckpointError("the optimizer was not rebuilt in this experience, so its state would be lost")
        self._must_rebuild = False
        if self._pending is not None:
            strategy.train_epochs = self._train_epochs
            strategy._stop_training = False
        if self.every > 0 and not isinstance(strategy.dataloader, _Loader):
            strategy.dataloader = _Loader(self, strategy.dataloader)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The interrupted experience must have been entered by now."""
        if self._pending is not None:
            raise RuntimeError("the interrupted experience was left without a single batch being asked for")
        self._optimizer = strategy.optimizer

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Save the end of the experience, after evaluator and loggers."""
        if self._pending is not None:
            raise RuntimeError("train() got no experience; the interrupted one comes first")
        if strategy.experience is not None:
            self._save("end")

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Half a state must not be evaluated."""
        if self._pending is not None and not self._opening:
            raise RuntimeError("the run stopped inside an experience: train on it before evaluating")

    # ----------------------------------------------------------------- saving
    def _batches(self, loader: Any) -> Iterator[Any]:
        """The batches of an epoch; between two of them all hooks of an iteration are done, and a state is whole."""
        strategy, clock = self._strategy, self._strategy.clock
        try:
            length = len(loader)
        except TypeError:
            length = 0  # unknown: checkpoints at the start of epochs only
        if self._pending is not None:
            with self._restoring():
                recorded = from_plain(self._pending["loader"])
            with self._restoring(loading=True):
                self._replay.repeat(loader, recorded, sizes=self._pending.get("recut"))
            with self._restoring():
                self._complete(strategy)
        else:
            self._replay.begin(loader)
            if clock.train_iterations >= self._next_save:
                self._save("inside")
        try:
            for batch in self._replay.batches():
                yield batch
                # after the last batch comes the end of the epoch, whose hooks may look at what that batch left behind
                last = self._replay.used >= length or strategy._stop_training
                if not last and clock.train_iterations >= self._next_save and not inside_group(strategy):
                    self._save("inside")
        finally:
            self._replay.release()

    def _save(self, kind: str) -> None:
        if self._stopped:
            raise RuntimeError(f"ExactCheckpointPlugin for {self.directory} can't save: {self._stopped}")
        strategy = self._strategy
        for plugin in strategy.plugins:  # a guard may find that this state must not replace the one before
            if (check := getattr(plugin, "before_checkpoint", None)) is not None:
                check(strategy)
        check_growth(strategy.model, self._structure["parameters"])
        iterations = strategy.clock.train_iterations
        if self.every > 0:
            self._next_save = (iterations // self.every + 1) * self.every
        if process_rank() != 0:  # the first process's state is that of all
            return
        with writing("what a run appends to", self.directory.parent):
            flush_loggers(strategy)
            grown = measure(self.directory, self.append_only)
        inside = kind == "inside"
        experience = None if kind == "start" else strategy.experience
        state = {
            "kind": kind,
            "experience": None if experience is None else experience.current_experience,
            "samples": None if experience is None else len(experience.dataset),
            "epoch": strategy.clock.train_exp_epochs if inside else None,
            "train_epochs": self._train_epochs if inside else None,
            "fingerprint": self.fingerprint,
            "structure": self._structure,
            "environment": environment(strategy),
            "append_only": grown,
            "rebuilt": self._rebuilt,
            "loader": to_plain(self._replay.state()) if inside else None,
            "random": to_plain(capture_random_state()),
            "strategy": capture_strategy(strategy),
        }
        name = f"step-{iterations:09d}" + ("-end" if kind == "end" else "")
        with writing("a checkpoint", self.directory / name):
            write_checkpoint(self.directory, name, state, keep=self.keep)

    def _revoke(self) -> None:
        self._stopped = "another ExactCheckpointPlugin of this process has taken the directory over"

    # --------------------------------------------------------------- resuming
    def _find(self, strategy: Any, allow_fresh: bool) -> dict[str, Any] | None:
        """The state to resume from, checked; files that only grow are cut back to it."""
        try:
            found = newest_valid(self.directory)
        except CheckpointError:
            if not allow_fresh:
                raise
            for path in checkpoints(self.directory):
                set_aside(path)
            close_writers(strategy)
            cut_back(self.directory, self.append_only, {})
            return None
        if found is None:
            return None
        path, state, damaged = found
        main = process_rank() == 0
        state = fitted(path, state, strategy, structure=self._structure, fingerprint=self.fingerprint)
        if self.append_only:
            close_writers(strategy)
        if main:
            cut_back(self.directory, self.append_only, state["append_only"])
        if self.append_only:
            with after(Path(name) for name in state["append_only"]):
                reopen_writers(strategy)
        for newer in damaged if main else []:
            set_aside(newer)
        return state

    @contextlib.contextmanager
    def _restoring(self, *, loading: bool = False) -> Iterator[None]:
        """Half a state is never trained on: after an error the strategy is one that was never resumed.

        :param loading: images are loaded inside, whose errors aren't those of a checkpoint.
        """
        try:
            yield
        except BaseException as error:
            self._strategy, self._stopped = None, "its checkpoint couldn't be restored"
            known = isinstance(error, (CheckpointError, RunError)) or is_out_of_memory(error)
            if loading or known or not isinstance(error, Exception):
                raise
            text = f"the checkpoint in {self.directory} can't be restored: {type(error).__name__}: {error}"
            raise CheckpointError(text) from error

    def _enter(self, state: dict[str, Any]) -> int:
        """Set all that can be set now; the rest waits for the interrupted experience to be opened again."""
        strategy = self._strategy
        done = state["strategy"]["clock"]["train_exp_counter"]
        inside = state["kind"] == "inside"
        # a rebuilt optimizer exists only inside its experience; what stands in its place now must stay as it is
        restore_strategy(strategy, state["strategy"], optimizer=not state["rebuilt"], final=not inside)
        self._must_rebuild = state["rebuilt"]
        if self.every > 0:
            iterations = strategy.clock.train_iterations
            self._next_save = (iterations // self.every + 1) * self.every
        if inside:
            self._pending = state
            strategy.evaluator.active = False
            for plugin in strategy.plugins:
                if isinstance(plugin, PeriodicEval):
                    plugin.do_initial = False
        elif state["kind"] == "end":
            self._trained = state["experience"]
            done -= 1
        restore_random_state(from_plain(state["random"]), strict=False)
        return int(done)

    def _check_experience(self, strategy: Any, state: dict[str, Any]) -> None:
        for field, saved, current in (
            ("experience", state["experience"], strategy.experience.current_experience),
            ("samples in the experience", state["samples"], len(strategy.experience.dataset)),
            ("epochs of the experience", state["train_epochs"], self._train_epochs),
        ):
            if saved != current:
                raise CheckpointError(f"{field}: the checkpoint was made with {saved}, this run has {current}")

    def _complete(self, strategy: Any) -> None:
        """The opening hooks have run and the loader stands where it stood: set everything, random generators last."""
        assert self._pending is not None
        state, self._pending, self._opening = self._pending, None, False
        restore_strategy(strategy, state["strategy"])
        verify_plugins(strategy, state["strategy"])
        strategy._stop_training = False
        restore_random_state(from_plain(state["random"]), strict=False)


class _Loader:
    """A loader that tells the plugin about each batch; everything else is the loader it stands for."""

    def __init__(self, plugin: ExactCheckpointPlugin, loader: Any) -> None:
        self._plugin = plugin
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return self._plugin._batches(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)


def _absolute(patterns: Sequence[str | os.PathLike[str]]) -> list[str]:
    return [os.path.abspath(p) for p in patterns]


__all__ = ["ExactCheckpointPlugin"]
