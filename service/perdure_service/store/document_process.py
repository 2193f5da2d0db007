"""Decides how documents of others are read: in a process of their own, which may be slow, swell or crash, alone.

Libraries that read PDF and HTML meet broken and hostile files: endless loops, structures that nest a million times,
kilobytes that unpack to gigabytes. So they run in a child process with bounded time and memory. A file that exceeds
them costs that process, and is reported; the next file gets a new one.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType

from perdure_service.store import document_readers
from perdure_service.store.document_readers import Document

TIME_LIMIT_S = 60.0
"""For one file, the start of the process included. A PDF of 2,000 pages takes some 20 s."""
MAX_MEMORY_BYTES = 2 * 2**30
"""Of the process's address space, where the system can bound it."""


class DocumentProcess:
    """Reads documents; a context manager. The process starts with the first one."""

    def __init__(self, time_limit_s: float = TIME_LIMIT_S) -> None:
        """Creates it; nothing starts yet.

        Args:
            time_limit_s: For one file.
        """
        self._time_limit_s = time_limit_s
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> DocumentProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def read(self, suffix: str, content: bytes) -> Document:
        """Returns the text of a document; see `document_readers.read`.

        Raises:
            ValueError: It cannot be read; in words that go with the file's name.
        """
        connection = self._start()
        try:
            connection.send((suffix, content))
            if not connection.poll(self._time_limit_s):
                self._end()
                raise ValueError(f"takes longer than {self._time_limit_s:g} s to read")
            answer: Document | str = connection.recv()
        except (EOFError, OSError):
            self._end()
            raise ValueError("ended the process that read it: it needs too much memory, or is broken") from None
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer

    def _start(self) -> Connection:
        if self._connection is None:
            # Spawned, not forked: this process has threads, and connections of a database.
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True, name="documents")
            self._process.start()
            theirs.close()
        return self._connection

    def _end(self) -> None:
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if process is not None and connection is not None:
            process.kill()
            process.join()
            process.close()
            connection.close()


def _serve(connection: Connection) -> None:
    """Reads what it is given until the other side goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other side
    logging.disable()
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    with suppress(EOFError, OSError):
        while True:
            suffix, content = connection.recv()
            connection.send(_read(suffix, content))


def _read(suffix: str, content: bytes) -> Document | str:
    """Returns the text of a document, or why there is none."""
    try:
        return document_readers.read(suffix, content)
    except ValueError as error:
        return str(error) or "cannot be read"
    except MemoryError:
        return "needs too much memory to be read"
    except RecursionError:
        return "is nested too deeply to be read"
    except Exception as error:  # noqa: BLE001 - a broken file may make anything of a library
        return f"is broken: {type(error).__name__}: {error}"
