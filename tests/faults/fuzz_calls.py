"""Calls of ``firn`` in this process that are watched: what they answer, write, take, and never reach.

:func:`no_training` puts in the place of training what costs nothing, and cuts the network off.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import signal
import socket
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from avalanche_firn.experiments import cli

sys.path.append(str(Path(__file__).parent))
from fuzz_cases import recipes

try:
    import resource
except ImportError:  # not on Windows, where these tests are skipped
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Outcome:
    """What a call of ``firn`` did."""

    status: int
    out: str
    err: str
    seconds: float  # of the processor
    escaped: BaseException | None = None

    @property
    def answer(self) -> tuple[Any, ...]:
        """What must be the same when the call is repeated."""
        err = re.sub(r"\.fetch-\w+", "", self.err)  # a file with a name of its own
        return self.status, self.out, err, repr(self.escaped)


def call(*words: str, limit: int = 60) -> Outcome:
    """Run ``firn`` in this process, for `limit` seconds at most."""
    out, err = io.StringIO(), io.StringIO()
    start, escaped, status = time.process_time(), None, -1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded(limit):
        try:
            status = cli.main(list(words))
        except BaseException as error:  # whatever escapes is a fault
            escaped = error
    return Outcome(status, out.getvalue(), err.getvalue(), time.process_time() - start, escaped)


@contextlib.contextmanager
def bounded(seconds: int = 60, gigabytes: float = 2.0) -> Iterator[None]:
    """No hang and no memory without end: an error is raised in their place."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"no answer within {seconds} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, folder and link below a folder, files with the hash of their content."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                text = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                text = os.readlink(path) if stat.S_ISLNK(mode) else str(stat.S_IFMT(mode))
            found[str(path.relative_to(folder))] = text
    return found


class Offline(OSError):
    """The network was asked for."""


@contextlib.contextmanager
def no_training(home: Path) -> Iterator[dict[str, Any]]:
    """What ``compare``, ``run`` and ``resume`` do before training stays; training itself costs nothing.

    Backbones of the shipped recipes become the embedded one, the home folder is `home`, folders are made beside it
    only, nobody is reached by network. Yields a dictionary whose entry ``config`` is the configuration that would have
    been trained last.
    """
    from avalanche_firn.experiments import comparison, resources, transfer_comparison

    real, kept = resources.load_backbone, {}
    known = {raw["backbone"]["name"] for raw in recipes().values() if "backbone" in raw}
    seen: dict[str, Any] = {}

    def load_backbone(name: str, **options: Any) -> Any:
        chosen = "vit_firn_32.omniglot" if name in known and options.get("weights") is None else name
        key = (chosen, *sorted(options.items()))
        if key not in kept:
            kept[key] = real(chosen, **options)
        return dataclasses.replace(kept[key], module=copy.deepcopy(kept[key].module))

    def done(config: Any, *arguments: Any, **options: Any) -> str:
        seen["config"] = config
        return "not trained"

    def offline(*arguments: Any, **options: Any) -> Any:
        raise Offline("no network in this test")

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if not os.path.abspath(path).startswith(f"{home.parent}/"):  # a drawn folder may lie anywhere
            raise PermissionError(errno.EACCES, "no permission in this test", str(path))
        make(path, *arguments, **options)

    make = os.mkdir

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr(resources, "load_backbone", load_backbone)
        for module in (comparison, transfer_comparison):
            patch.setattr(module, "_done", done)
        patch.setattr(comparison, "write_dashboard", lambda *arguments, **options: None)
        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(socket, "getaddrinfo", offline)
        patch.setattr(socket.socket, "connect", offline)
        yield seen


def explore(check: Callable[..., None], *, part: int, cases: int, **strategies: Any) -> None:
    """Call `check` with as many drawn cases, the same ones every time; `part` tells one lot of cases from another."""
    quick = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    seed(part)(quick(given(**strategies)(check)))()


# ------------------------------------------------------------------------ counts
def told(what: str, counts: Counter[tuple[str, str]]) -> str:
    """What became of the cases of a test, as a property of its report."""
    return json.dumps({"what": what, "rows": [[kind, outcome, count] for (kind, outcome), count in counts.items()]})


def fuzz_table(reports: Iterable[Any]) -> str:
    """What became of all cases, from the reports of the tests (with xdist those of its workers); "" without any."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "fuzzed":
                content = json.loads(value)
                for kind, outcome, count in content["rows"]:
                    found.setdefault(content["what"], {}).setdefault(kind, Counter())[outcome] += count
    lines = []
    for what, kinds in sorted(found.items()):
        whole = sum(kinds.values(), Counter())
        lines.append(f"{whole.total()} {what}: " + ", ".join(f"{n} {outcome}" for outcome, n in whole.most_common()))
        for kind, counts in sorted(kinds.items()):
            lines.append(f"  {kind:<34} " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()))
    return "\n".join(lines)


@contextlib.contextmanager
def printed(config: pytest.Config, what: str, counts: Counter[tuple[str, str]]) -> Iterator[None]:
    """Around the tests of a module: prints their table at the end, where no xdist stands between."""
    yield
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if reporter is None or not counts or hasattr(config, "workerinput"):
        return
    report = SimpleNamespace(user_properties=[("fuzzed", told(what, counts))])
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        reporter.write_line(f"\n{fuzz_table([report])}")
