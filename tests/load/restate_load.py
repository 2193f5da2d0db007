"""Load on Restate: its server with default settings, the same two steps on its Python SDK, and `wrk` as the client.

    python -m tests.load.restate_load SERVER PYTHON WRK

SERVER is `restate-server`; PYTHON has `restate-sdk` and `hypercorn`; all on this machine, on ports of loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.helpers.waiting import eventually, free_port
from tests.load.loop import serve_blocking

APPLICATION = """
import restate

two_steps = restate.Service("TwoSteps")


def step(number: int) -> int:
    return number + 1


@two_steps.handler()
async def run(ctx: restate.Context, number: int) -> int:
    number = await ctx.run_typed("first", step, number=number)
    return await ctx.run_typed("second", step, number=number)


app = restate.app([two_steps])
"""
SCRIPT = """
wrk.method, wrk.body, wrk.headers["content-type"] = "POST", "1", "application/json"
function done(summary, latency, requests)
  io.write(string.format("{\\"count\\": %d, \\"seconds\\": %f, \\"failed\\": %d, \\"latencies_ms\\": [",
    summary.requests, summary.duration / 1e6, summary.errors.status + summary.errors.timeout))
  for share = 0, 199 do io.write(string.format("%f, ", latency:percentile(share / 2) / 1000)) end
  io.write(string.format("%f]}\\n", latency.max / 1000))
end
"""
START_S = 60.0


def main(server: str, python: str, wrk: str) -> None:
    """Starts all, and answers orders."""
    with tempfile.TemporaryDirectory(prefix="perdure-bench-restate-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "two_steps.py").write_text(APPLICATION, encoding="utf-8")
        (folder / "load.lua").write_text(SCRIPT, encoding="utf-8")
        ingress, admin, node, sdk = (free_port() for _ in range(4))
        quiet = {
            **os.environ,
            "RESTATE_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "RESTATE_LOG_FILTER": "warn",
            "RESTATE_BIND_IP": "127.0.0.1",
            "RESTATE_BIND_ADDRESS": f"127.0.0.1:{node}",
            "RESTATE_ADVERTISED_ADDRESS": f"http://127.0.0.1:{node}",
            "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
            "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
        }
        log = stack.enter_context((folder / "log").open("w"))
        commands = (
            [server, "--no-logo", "--base-dir", str(folder / "data")],
            [python, "-m", "hypercorn", "--bind", f"127.0.0.1:{sdk}", "--log-level", "error", "two_steps:app"],
        )
        processes = [subprocess.Popen(one, env=quiet, stdout=log, stderr=log, cwd=folder) for one in commands]
        for process in processes:
            stack.callback(_end, process)
        target = f"http://127.0.0.1:{ingress}/TwoSteps/run"
        try:
            eventually(
                lambda: _post(f"http://127.0.0.1:{admin}/deployments", {"uri": f"http://127.0.0.1:{sdk}"}), START_S
            )
            eventually(lambda: _post(target, 1) == b"3", START_S)
        except AssertionError as error:
            raise RuntimeError((folder / "log").read_text()[-2000:]) from error

        def handle(order: dict[str, Any]) -> dict[str, Any]:
            if order.get("processes"):
                return {"server": [processes[1].pid], "database": [processes[0].pid]}
            clients = order["clients"]
            arguments = ["-t", str(min(clients, 2)), "-c", str(clients), "-d", f"{max(1, round(order['seconds']))}s"]
            arguments += ["--timeout", "30s", "-s", str(folder / "load.lua"), target]
            found = subprocess.run([wrk, *arguments], check=True, capture_output=True, text=True)
            answer: dict[str, Any] = json.loads(found.stdout[found.stdout.index("{") :])
            assert not answer["failed"], found.stdout
            return answer

        serve_blocking(handle)


def _post(url: str, body: Any) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            found: bytes = response.read()
            return found
    except OSError as error:
        raise AssertionError(str(error)) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
