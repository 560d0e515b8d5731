"""`firn dashboard` as a function: what it serves, where, when it writes the summary again, and how it ends."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from avalanche_firn.experiments import dashboard
from avalanche_firn.experiments.dashboard import comparisons, dashboard_url, open_dashboard, outdated
from avalanche_firn.experiments.errors import ConfigError

SCRIPT = """
import sys
from contextlib import nullcontext
from pathlib import Path
from avalanche_firn.experiments.dashboard import open_dashboard
say = lambda text: print(text, flush=True)
sys.exit(open_dashboard([Path(f) for f in sys.argv[1:]], open_browser=False, say=say))
"""


def run_folder(folder: Path, value: float = 0.5) -> Path:
    """A run that TensorBoard can show, not finished."""
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("accuracy/last", value, 0)
    (folder / "environment.json").write_text("{}")
    return folder


def get(base: str, path: str):
    with urllib.request.urlopen(f"{base}/data/{path}", timeout=20) as answer:
        return json.load(answer)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_serves_several_folders_on_loopback_and_ends_in_order(tmp_path):
    first = run_folder(tmp_path / "one" / "a, b: c" / "naive" / "seed-0").parents[1]
    second = run_folder(tmp_path / "two" / "a, b: c" / "naive" / "seed-0", 0.25).parents[1]  # the same name
    third = run_folder(tmp_path / "slca" / "seed-1")
    command = [sys.executable, "-c", SCRIPT, str(first), str(second), str(third)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[0].startswith("TensorBoard on") and "Ctrl-C" in lines[0]
        url = urllib.parse.urlsplit(lines[1].strip())
        assert url.hostname == "127.0.0.1" and "smoothing=0" in url.query
        base = f"http://{url.netloc}"
        wanted = {"one a, b- c/naive/seed-0", "two a, b- c/naive/seed-0", "slca seed-1"}
        end = time.monotonic() + 60
        while (runs := set(get(base, "runs"))) != wanted and time.monotonic() < end:
            time.sleep(0.3)
        assert runs == wanted
        query = urllib.parse.urlencode({"run": "two a, b- c/naive/seed-0", "tag": "accuracy/last"})
        assert [point[1:] for point in get(base, f"plugin/scalars/scalars?{query}")] == [[0, 0.25]]
        addresses = listening(url.port)
        assert addresses in (None, {"127.0.0.1"})
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert process.stdout.read().splitlines()[-1] == "stopped"
        with pytest.raises(OSError, match=r"."):
            urllib.request.urlopen(f"{base}/data/runs", timeout=5)
    finally:
        process.terminate()  # not killed: that would leave TensorBoard behind
        process.wait()
        process.stdout.close()


def listening(port: int) -> set[str] | None:
    """IPv4 addresses that are listened on at a port, from Linux's table; None elsewhere."""
    table = Path("/proc/net/tcp")
    if not table.is_file():
        return None
    found = set()
    for line in table.read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        address, _, number = local.partition(":")
        if state == "0A" and int(number, 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]))
    return found


def test_refuses_before_anything_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard.subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    run = run_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for folders, reason in (
        ([], "no folder"),
        ([tmp_path / "nowhere"], "nowhere isn't a folder"),
        ([run, tmp_path / "empty"], "empty holds no run"),
    ):
        with pytest.raises(ConfigError, match=reason):
            open_dashboard(folders)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: {port} can't be used"):
            open_dashboard([run], port=port)
    for port in (0, -1, 65536):
        with pytest.raises(ConfigError, match=f"port: got {port}; accepted is a number from 1 to 65535"):
            open_dashboard([run], port=port)


def test_tensorboard_that_fails_says_why(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")
    monkeypatch.setattr(dashboard.sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"TensorBoard didn't start \(status 1\)"):
        open_dashboard([run], open_browser=False)


def test_a_proxy_is_not_asked_for_this_machine(tmp_path, monkeypatch):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as web, open(os.devnull, "rb") as log:
        threading.Thread(target=web.handle_request, daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setattr(dashboard, "_PATIENCE", 3.0)
        dashboard._Server(SimpleNamespace(poll=lambda: None), log, web.server_port).wait_until_it_answers()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_interrupt_does_not_leave_tensorboard_behind(monkeypatch):
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: time.sleep(1) or exit()); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(0.5)
    before, timer = signal.getsignal(signal.SIGINT), threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    dashboard._Server(process, None, 0).stop()
    timer.join()
    assert process.returncode is not None and signal.getsignal(signal.SIGINT) is before


def test_summary_is_written_again_where_runs_have_finished_since(tmp_path, monkeypatch):
    asked: list[Path] = []
    monkeypatch.setattr(dashboard, "_refresh", lambda folder, say: asked.append(folder))
    monkeypatch.setattr(dashboard, "_served", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(dashboard, "_view", lambda folders: nullcontext([]))
    comparison = tmp_path / "runs" / "tiny"
    run = run_folder(comparison / "naive" / "seed-0")
    (comparison / "config.yaml").write_text("name: tiny\n")
    said: list[str] = []

    def opened(folder: Path) -> list[Path]:
        asked.clear()
        assert open_dashboard([folder], open_browser=False, say=said.append) == 0
        return [*asked]

    assert opened(comparison) == []  # nothing is finished
    (run / "results.json").write_text("{}")
    assert opened(comparison) == [comparison]
    events = comparison / "summary" / "events.out.tfevents.1.firn-summary"
    events.parent.mkdir()
    events.write_bytes(b"x")
    os.utime(run / "results.json", (1, 1))
    assert opened(comparison) == [] and opened(tmp_path / "runs") == []
    later = time.time() + 10
    os.utime(run / "results.json", (later, later))
    assert opened(comparison) == opened(tmp_path / "runs") == [comparison]
    assert opened(run) == []  # a single run has no summary
    assert said and set(said) == {"stopped"}


def test_which_summaries_belong_to_a_folder(tmp_path):
    run = run_folder(tmp_path / "a" / "naive" / "seed-0")
    (tmp_path / "a" / "summary").mkdir()
    run_folder(tmp_path / "b" / "naive" / "seed-0")
    (tmp_path / "b" / "summary").mkdir()
    loose = run_folder(tmp_path / "c" / "naive" / "seed-0").parents[1]
    assert comparisons(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert comparisons(tmp_path / "a") == [tmp_path / "a"]
    assert comparisons(loose) == [loose] and comparisons(run) == []
    assert not outdated(loose)


def test_a_summary_that_cannot_be_written_does_not_keep_from_looking(tmp_path):
    run = run_folder(tmp_path / "tiny" / "naive" / "seed-0")
    (run / "results.json").write_text("no JSON")
    said: list[str] = []
    dashboard._refresh(tmp_path / "tiny", said.append)
    assert len(said) == 2 and "can't be written" in said[1] and "results.json" in said[1]


def test_the_address_opens_charts_without_smoothing():
    url = urllib.parse.urlsplit(dashboard_url(6006))
    query, fragment = urllib.parse.parse_qs(url.query), url.fragment
    assert url.netloc == "127.0.0.1:6006"
    assert query["smoothing"] == ["0"] and query["runFilter"] == ["summary/"]
    assert fragment.startswith("custom_scalars&") and "_smoothingWeight=0" in fragment
    (colours,) = query["runColorGroup"]

    pattern = re.compile(colours.removeprefix("regex:"))
    names = ("slca/seed-0", "slca/seed-12", "summary/slca", "digits/slca/seed-1", "digits/summary/slca")
    assert {pattern.search(name).group(1) for name in names} == {"slca"}
    assert dashboard_url(1, summary=False) == "http://127.0.0.1:1/?smoothing=0#timeseries"
