"""Writes the blocking client from the asyncio one, so that the two cannot differ; run it after every change there.

python clients/python/make_sync_client.py          writes the files
python clients/python/make_sync_client.py --check  exits with 1 if they are not current
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "perdure_client"
FILES = {"_async_iterators.py": "_iterators.py", "_async_client.py": "_client.py"}

_RUN_BLOCKING = "from perdure_client._transport_sync import run_blocking"

# In this order; each is a pattern and what replaces it.
_REPLACEMENTS = (
    (r"  # noqa: ASYNC\d+.*", ""),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bAioTransport\b", "SyncTransport"),
    (r"\b_transport_aio import SyncTransport\b", "_transport_sync import SyncTransport, run_blocking"),
    (r"(?m)^(from perdure_client\._watch import Watcher)$", f"{_RUN_BLOCKING}\n\\1"),
    (r"AsyncIterable(, |\[AgentStart\] \| )", ""),
    (r"_async_(iterators|client)\b", r"_\1"),
    (r"\bAsync(Client|Watch|Watching|Iterator)\b", r"\1"),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"__a(next|enter|exit)__", r"__\1__"),
    (r"The asyncio client\.", "The blocking client, written by make_sync_client.py from the asyncio one."),
    (r"Iterators for asyncio (.*)\.", r"Blocking iterators \1; written by make_sync_client.py."),
    (r"= await client\.", "= client."),
    (r"A client for asyncio\. Use one per process and event loop,", "A client that blocks. Use one per process,"),
    (r"any number of tasks;", "any number of threads;"),
    (r"that is cancelled \(`asyncio\.wait_for`\) loses", "that is interrupted (Ctrl-C) loses"),
    (r"for event in update\.events:\n +yield event", "yield from update.events"),
)


def blocking(source: str) -> str:
    """Returns the blocking form of a module, formatted."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    awaits = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Await)]
    for node in sorted(awaits, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = starts[node.lineno - 1] + _characters(lines[node.lineno - 1], node.col_offset)
        end = starts[node.end_lineno - 1] + _characters(lines[node.end_lineno - 1], node.end_col_offset)
        awaited = source[begin:end].removeprefix("await ")
        is_own = re.match(r"self\.[a-z]", awaited)  # a method of the class itself, blocking already
        source = source[:begin] + (awaited if is_own else f"run_blocking({awaited})") + source[end:]
    for pattern, replacement in _REPLACEMENTS:
        source = re.sub(pattern, replacement, source)
    return _ruff(_ruff(source, "check", "--fix", "--select=I", "--quiet"), "format", "--quiet")


def _characters(line: str, byte_offset: int) -> int:
    """Returns an offset in characters; `ast` counts bytes."""
    return len(line.encode()[:byte_offset].decode())


def _ruff(source: str, *command: str) -> str:
    arguments = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(PACKAGE / "_client.py"), "-"]
    return subprocess.run(arguments, input=source, capture_output=True, text=True, check=True).stdout  # noqa: S603


def main() -> int:
    """Writes or checks the files; returns the exit code."""
    check = "--check" in sys.argv[1:]
    for source, target in FILES.items():
        text = blocking((PACKAGE / source).read_text(encoding="utf-8"))
        if check and (PACKAGE / target).read_text(encoding="utf-8") != text:
            print(f"{target} is not current; run python clients/python/make_sync_client.py")
            return 1
        if not check:
            (PACKAGE / target).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
