"""Tests of the stretch of network of tests: what goes over it arrives, in order, and calls are counted."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from tests.helpers.distance import Distance
from tests.helpers.waiting import free_port

PIECES = [f"{number};".encode() for number in range(200)]


@contextmanager
def over_a_distance(address: str) -> Iterator[Distance]:
    distance = Distance(address)
    try:
        yield distance
    finally:
        distance.close()


def test_what_is_sent_arrives_in_order_also_when_the_way_becomes_shorter() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        over_a_distance(f"127.0.0.1:{listener.getsockname()[1]}") as distance,
        socket.create_connection(("127.0.0.1", distance.port)) as client,
    ):
        accepted, _ = listener.accept()
        with accepted, accepted.makefile("rb") as arriving:
            for number, piece in enumerate(PIECES):
                distance.one_way_s = 0.0 if number % 50 == 49 else 0.2
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
            assert arriving.read() == b"".join(PIECES)
        assert client.recv(1) == b"", "the end arrives, too"
    assert distance.calls == 0


def test_a_connection_to_where_nobody_listens_ends() -> None:
    with (
        over_a_distance(f"127.0.0.1:{free_port()}") as distance,
        socket.create_connection(("127.0.0.1", distance.port)) as client,
    ):
        assert client.recv(1) == b""


@pytest.fixture
def address() -> Iterator[str]:
    """A gRPC server that answers everything: a unary call with what it was sent, a streaming one with three of it."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            if details.method == "/a/Stream":
                return grpc.unary_stream_rpc_method_handler(lambda request, _: iter([request] * 3))
            return grpc.unary_unary_rpc_method_handler(lambda request, _: request)

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_each_call_counts_once_however_large_or_long_it_is(address: str) -> None:
    with over_a_distance(address) as distance, grpc.insecure_channel(distance.address) as channel:
        unary, stream = channel.unary_unary("/a/Unary"), channel.unary_stream("/a/Stream")
        assert [unary(text, timeout=20) for text in (b"", b"x" * 300_000, b"y")] == [b"", b"x" * 300_000, b"y"]
        assert distance.calls == 3
        assert list(stream(b"z" * 50_000, timeout=20)) == [b"z" * 50_000] * 3
        assert distance.calls == 4
