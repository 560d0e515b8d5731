"""``firn dashboard``: TensorBoard on finished or running comparisons, opened where its defaults don't mislead.

The summary is made again first where runs have finished since, then TensorBoard is started as a process of its own, on
this machine's loopback address only: it has no password, and what it serves is for the one who started it. The address
that is printed opens the charts over all methods with smoothing off (TensorBoard starts with 0.6 there, and shows
values that nobody measured) and the list of runs filtered to the summaries.

Several folders are shown together through a temporary folder of links, each under its own name: TensorBoard's own
``--logdir_spec`` would split names at commas and colons. Where the system has no links it is used all the same, and
such names are refused.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any
from urllib.parse import quote

from avalanche_firn.evaluation.summary_run import SUFFIX, run_names
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.escapes import one_line, visible
from avalanche_firn.experiments.results import FILE, files_below
from avalanche_firn.experiments.run_folders import SUMMARY

__all__ = ["comparisons", "dashboard_url", "open_dashboard", "outdated"]

HOST = "127.0.0.1"
_PATIENCE = 120.0  # seconds until TensorBoard answers; it takes 3 to 15 on a small machine
_RELOAD = 15  # seconds between looks at the files; our choice, TensorBoard's is 5
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has its own loopback
_SAMPLES = "images=200,text=200"  # TensorBoard keeps 10 images per tag; ours are one per tag, the probes' more


def open_dashboard(
    folders: Sequence[Path],
    *,
    port: int | None = None,
    open_browser: bool = True,
    say: Callable[[str], object] = print,
) -> int:
    """Serve TensorBoard on the folders until it is interrupted (Ctrl-C, SIGTERM, the terminal closed).

    Args:
        folders: of comparisons, of single runs, or with several of them below.
        port: to listen on; None: a free one.
        open_browser: open the page, if there is a display.
        say: takes the lines to print.

    Returns:
        Exit status: 0 after an interrupt, else that of TensorBoard.

    Raises:
        ConfigError: a folder without runs, a port that is taken or none, TensorBoard that doesn't start. Nothing is
            running then.
    """
    _check(folders)
    port = _free_port() if port is None else _checked_port(port)
    with ExitStack() as stack:
        stack.enter_context(_terminable())
        try:
            for place in dict.fromkeys(place for folder in folders for place in comparisons(folder)):
                if outdated(place):
                    _refresh(place, say)
            view = stack.enter_context(_view(folders))
            served = stack.enter_context(_served(view, port))
            served.wait_until_it_answers()
            url = dashboard_url(port, summary=any(_summaries(folder) for folder in folders))
            say(one_line(f"TensorBoard on {', '.join(map(str, folders))}; stop with Ctrl-C"))
            say(f"  {url}")
            if open_browser and _display():
                webbrowser.open(url)
            status = served.process.wait()
            say(f"TensorBoard ended with status {status}{served.last_words()}")
            return status
        except KeyboardInterrupt:
            say("stopped")
            return 0


def dashboard_url(port: int, *, summary: bool = True) -> str:
    """Where the charts are, with TensorBoard's smoothing off.

    Args:
        port: that TensorBoard listens on.
        summary: open the charts over all methods, the runs filtered to the summaries, and in the tab of time series
            the seeds of a method in the colour of its mean; without one, the time series.
    """
    if not summary:
        return f"http://{HOST}:{port}/?smoothing=0#timeseries"
    only = quote(f"{SUMMARY}/", safe="")
    colours = quote(r"regex:([^/]+)(?:/seed-\d+)?$", safe="")
    query = f"smoothing=0&runFilter={only}&runColorGroup={colours}"
    return f"http://{HOST}:{port}/?{query}#custom_scalars&_smoothingWeight=0&regexInput={only}"


def comparisons(folder: Path) -> list[Path]:
    """The folders whose summary belongs to what is shown: this one, or those of the comparisons below it.

    A single run has none. Runs that were collected without a comparison of theirs get one in the folder itself.
    """
    if (folder / FILE).is_file() or (folder / "environment.json").is_file():
        return []
    if (folder / SUMMARY).is_dir() or (folder / "config.yaml").is_file():
        return [folder]
    below = sorted(Path(place) for place, folders, _ in os.walk(folder) if SUMMARY in folders)
    return below or [folder]


def outdated(folder: Path) -> bool:
    """Whether runs of a comparison have finished since its summary was written, or none was written."""
    finished = [path.stat().st_mtime for path in files_below(folder, FILE)]
    events = [path.stat().st_mtime for path in _summary_files(folder / SUMMARY)]
    return bool(finished) and (not events or max(finished) > max(events))


def _summary_files(folder: Path) -> list[Path]:
    return list(folder.glob(f"events.out.tfevents.*{SUFFIX}"))


def _summaries(folder: Path) -> bool:
    return any(_summary_files(place / SUMMARY) for place in comparisons(folder))


# ------------------------------------------------------------------ before
def _check(folders: Sequence[Path]) -> None:
    if not folders:
        raise ConfigError("no folder; give folders of runs or comparisons")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} isn't a folder; give folders of runs or comparisons")
        if not files_below(folder, "events.out.tfevents.*") and not files_below(folder, FILE):
            raise ConfigError(f"{folder} holds no run (no event file and no {FILE} in or below it)")


def _refresh(folder: Path, say: Callable[[str], object]) -> None:
    """Writes the report again. What can't be summarised can be looked at all the same."""
    from avalanche_firn.experiments.report import report_folders  # loads matplotlib and torch: late
    from avalanche_firn.experiments.results import find_runs
    from avalanche_firn.experiments.transfer_comparison import report_transfers

    say(one_line(f"bringing the summary of {folder} up to date"))
    try:
        transfers = any(run.get("experiment") == "transfer" for run in find_runs([folder]))
        (report_transfers if transfers else report_folders)([folder], folder / SUMMARY)
    except (ConfigError, OSError) as error:
        say(visible(f"the summary can't be written: {error}"))


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _checked_port(port: int) -> int:
    if not 1 <= port <= 65535:
        raise ConfigError(f"port: got {port}; accepted is a number from 1 to 65535")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TensorBoard's own: one just closed is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"port: {port} can't be used ({error.strerror}); leave it out for a free one") from None
    return port


def _display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


# ------------------------------------------------------------------ serving
@contextmanager
def _view(folders: Sequence[Path]) -> Iterator[list[str]]:
    """TensorBoard's arguments that name the folders."""
    if len(folders) == 1:
        yield [f"--logdir={folders[0].resolve()}"]
        return
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    labels = {folder: folder.name or "root" for folder in resolved}
    if len(set(labels.values())) < len(labels):
        labels = {folder: f"{folder.parent.name} {folder.name}" for folder in resolved}
    names = dict(zip(resolved, _distinct([labels[folder] for folder in resolved]), strict=True))
    with tempfile.TemporaryDirectory(prefix="firn-dashboard-") as temporary:
        try:
            for folder, name in names.items():
                os.symlink(folder, Path(temporary) / name, target_is_directory=True)
        except OSError:  # Windows without the right to make links
            wrong = [str(folder) for folder in resolved if "," in str(folder)]
            if wrong:
                raise ConfigError(f"{wrong[0]} has a comma in its name; show such folders one by one") from None
            spec = ",".join(f"{name.replace(':', '-').replace(',', '-')}:{folder}" for folder, name in names.items())
            yield [f"--logdir_spec={spec}"]
            return
        yield [f"--logdir={temporary}"]


def _distinct(labels: Sequence[str]) -> list[str]:
    """Names for folders, in the order of the labels, no two alike."""
    numbered = [f"{label}\0{index}" if labels.count(label) > 1 else label for index, label in enumerate(labels)]
    names = run_names(numbered)
    return [names[label] for label in numbered]


@dataclass(frozen=True)
class _Server:
    """TensorBoard's process, and what it prints."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    port: int

    def wait_until_it_answers(self) -> None:
        """Raises: ConfigError with what TensorBoard said last, if it ends or doesn't answer in time."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ConfigError(f"TensorBoard didn't start (status {self.process.returncode}){self.last_words()}")
            try:
                with _DIRECT.open(f"http://{HOST}:{self.port}/data/environment", timeout=5):
                    return
            except OSError:  # an URLError is one
                time.sleep(0.2)
        raise ConfigError(f"TensorBoard didn't answer within {_PATIENCE:.0f} seconds{self.last_words()}")

    def last_words(self) -> str:
        """The last lines that TensorBoard printed, ready to be put behind a message."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f": {' / '.join(one_line(line.strip()) for line in lines[-3:])}" if lines else ""

    def stop(self) -> None:
        """Ends TensorBoard and its data server, by force if they don't go; a second Ctrl-C doesn't leave them."""
        with _undisturbed():
            self._stop()

    def _stop(self) -> None:
        for sign in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            if os.name == "posix":
                with suppress(ProcessLookupError, PermissionError):  # a group of which all have ended
                    os.killpg(self.process.pid, sign)
            else:
                self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()


@contextmanager
def _served(view: Sequence[str], port: int) -> Iterator[_Server]:
    command = [sys.executable, "-m", "tensorboard.main", *view, f"--host={HOST}", f"--port={port}"]
    command += [f"--reload_interval={_RELOAD}", f"--samples_per_plugin={_SAMPLES}"]
    # Its own folder, an empty one: -m looks for modules in the current folder first, below Python 3.11 whatever is said
    with tempfile.TemporaryDirectory(prefix="firn-dashboard-") as empty, tempfile.TemporaryFile() as log:
        # In a session of its own: Ctrl-C reaches us only, and we stop it in order.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=os.name == "posix",
            cwd=empty,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        server = _Server(process, log, port)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and a closed terminal as Ctrl-C, where this may be said (the main thread).

    Ctrl-C itself too: a shell script that starts us in the background would have us ignore it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(interrupt):
        yield


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without those signals, where this may be said."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(signal.SIG_IGN):
        yield


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    signs = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {sign: signal.signal(sign, handler) for sign in signs}
    try:
        yield
    finally:
        for sign, earlier in before.items():
            signal.signal(sign, earlier)
