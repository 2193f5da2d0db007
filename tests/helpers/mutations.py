"""Messages of every RPC of the schema, valid and broken: walked by descriptors, so that a new RPC is among them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

TEXTS = (
    "", " ", "a", "A", "..", "a/b", "a/1", "ä", "🙂", "\u202e", "\x00", "\n", "\x7f", "%s%n{0}",
    "'; DROP TABLE perdure.run; --",
    "x" * 64, "x" * 129, "x" * 513, "x" * 70_000, "-1", "999999999999999999999", "NaN", "null", "{}", "[]", "[" * 5_000,
    '{"a":' * 70 + "1" + "}" * 70, '{"a": 1e999}', '{"a": NaN}', '{"steps": 1}', '{"steps": -1}', '"\\ud800"', "e30",
    "WzEsWyJhIl0sMV0",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 5, 99, 1_000, 1_001, 2**31 - 1, -(2**31), 2**53 + 1, 2**63 - 1, -(2**63))
DOUBLES = (0.0, -0.0, 1.5, -1.0, 1e308, float("inf"), float("-inf"), float("nan"), 2.0**53 + 2)
MAX_DEPTH = 8
MAX_FIELDS = 400
"""How many fields one message gets: a Struct could hold structs without end."""


@dataclass(frozen=True)
class Rpc:
    """One RPC: where it is called, and with what."""

    path: str
    request: type[Message]
    streaming: bool
    both_ways: bool


def rpcs(*modules: Any) -> list[Rpc]:
    """Returns every RPC of the services that some generated modules define."""
    files: list[FileDescriptor] = [module.DESCRIPTOR for module in modules]
    methods: Iterator[MethodDescriptor] = (
        method for file in files for service in file.services_by_name.values() for method in service.methods
    )
    return [
        Rpc(
            f"/{method.containing_service.full_name}/{method.name}",
            GetMessageClass(method.input_type),
            bool(method.server_streaming),
            bool(method.client_streaming),
        )
        for method in methods
    ]


class Mutator:
    """Makes requests: a plausible one, with a few fields at the edges of what they can hold, or broken bytes."""

    def __init__(self, rng: random.Random, plausible: Mapping[str, Sequence[str]]) -> None:
        """Creates a mutator.

        Args:
            rng: Decides everything.
            plausible: Values that mean something to the server, by the name of a text field.
        """
        self._rng = rng
        self._plausible = plausible
        self._left = 0

    def request(self, rpc: Rpc) -> bytes:
        """Returns one mutated request of an RPC."""
        message = rpc.request()
        self._left = MAX_FIELDS
        self._fill(message, edge=0.0, depth=0)
        for _ in range(self._rng.choice((0, 1, 1, 1, 2, 3))):
            self._spoil(message)
        data = message.SerializeToString()
        return self._bytes(data) if self._rng.random() < 0.4 else data

    def _fill(self, message: Message, edge: float, depth: int) -> None:
        """Sets about half of a message's fields; to edge values with a probability."""
        for field in message.DESCRIPTOR.fields:
            if self._rng.random() < (0.8 if field.name in self._plausible else 0.4):
                self._set(message, field, edge, depth)

    def _spoil(self, message: Message) -> None:
        """Sets one field, of the message or of one inside it, to edge values."""
        fields = message.DESCRIPTOR.fields
        if fields:
            self._set(message, self._rng.choice(fields), 1.0, 0)

    def _set(self, message: Message, field: FieldDescriptor, edge: float, depth: int) -> None:
        message.ClearField(field.name)
        self._left -= 1
        if self._left < 0:
            return
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._set_map(message, field, edge, depth)
        elif field.is_repeated:
            holder = getattr(message, field.name)
            many = self._rng.random() < edge * 0.3
            for _ in range(self._rng.choice((40, 300)) if many else self._rng.randrange(1, 3)):
                if field.message_type is not None:
                    if depth < MAX_DEPTH and self._left > 0:
                        self._fill(holder.add(), edge, depth + 1)
                else:
                    holder.append(self._scalar(field, edge))
        elif field.message_type is not None:
            inner = getattr(message, field.name)
            inner.SetInParent()
            if depth < MAX_DEPTH:
                self._fill(inner, edge, depth + 1)
        else:
            setattr(message, field.name, self._scalar(field, edge))

    def _set_map(self, message: Message, field: FieldDescriptor, edge: float, depth: int) -> None:
        entry: Descriptor = field.message_type
        holder = getattr(message, field.name)
        value_field = entry.fields_by_name["value"]
        for _ in range(self._rng.choice((1, 2, 40, 1_000)) if self._rng.random() < edge else 1):
            key = self._scalar(entry.fields_by_name["key"], edge)
            if value_field.message_type is None:
                holder[key] = self._scalar(value_field, edge)
            elif depth < MAX_DEPTH and self._left > 0:
                self._fill(holder[key], edge, depth + 1)

    def _scalar(self, field: FieldDescriptor, edge: float) -> Any:
        at_edge = self._rng.random() < edge
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                if field.type == FieldDescriptor.TYPE_BYTES:
                    return self._rng.choice(TEXTS).encode()
                if at_edge:
                    return self._rng.choice(TEXTS)
                return self._rng.choice(self._plausible.get(field.name, ("a", "team", "x-1")))
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._rng.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self._rng.choice(DOUBLES) if at_edge else 1.0
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._rng.choice((0, 1, 2, 99, -1, 2**31 - 1)) if at_edge else self._rng.choice((0, 1, 2))
            case FieldDescriptor.CPPTYPE_INT32:
                return self._rng.choice([n for n in NUMBERS if -(2**31) <= n < 2**31]) if at_edge else 1
            case FieldDescriptor.CPPTYPE_UINT32:
                return self._rng.choice([n for n in NUMBERS if 0 <= n < 2**32]) if at_edge else 1
            case FieldDescriptor.CPPTYPE_UINT64:
                return self._rng.choice([n for n in NUMBERS if n >= 0]) if at_edge else 1
            case _:
                return self._rng.choice(NUMBERS) if at_edge else 1

    def _bytes(self, data: bytes) -> bytes:
        """Returns broken bytes: bits flipped, cut, doubled, or with a piece of nonsense put in."""
        rng = self._rng
        broken = bytearray(data or b"\x0a\x01a")
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(broken) + 1)
            match rng.randrange(5):
                case 0 if broken:
                    broken[at % len(broken)] ^= 1 << rng.randrange(8)
                case 1:
                    del broken[at:]
                case 2:
                    broken[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 3:
                    broken[at:at] = broken[: rng.randrange(1, 30)]
                case _:
                    # A text that is not UTF-8, in a field that most messages have.
                    broken[at:at] = b"\x0a\x02\xc3\x28"
        return bytes(broken)
