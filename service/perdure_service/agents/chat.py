"""Decides how one request of a conversation reaches the model that is set, and how its answer is streamed and counted.

A conversation and a reply are plain JSON: they are what steps record, and a recorded class of another library might
not be readable after its next release. Requests go through pydantic-ai, one at a time and without its agents: a step
of ours is around each (ADR 0011).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic_core import from_json

from perdure_service.errors import ConfigurationError
from perdure_service.settings import ModelSettings

if TYPE_CHECKING:
    from pydantic_ai import InstrumentationSettings
    from pydantic_ai.messages import ModelMessage, ModelResponsePart
    from pydantic_ai.models import ModelRequestParameters, StreamedResponse

Message = dict[str, Any]
"""`{"role": "user", "content"}`, a `Reply` as `to_json` returns it, or `{"role": "tool", "id", "name", "content"}`."""

_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})


class UnfinishedAnswer(Exception):
    """The endpoint closed the stream before the answer's end; asking again may help."""


class Spent(Protocol):
    """Is told what a call used; `run.usage` is one."""

    def __call__(self, *, input_tokens: int, output_tokens: int, model: str = "") -> None:
        """Counts a call."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A tool as the model sees it; `schema` is the JSON Schema of its arguments."""

    name: str
    description: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the model wants called. `arguments` is its JSON text, which need not be JSON, nor fit."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said, and what it wants called."""

    text: str
    model: str
    calls: tuple[Call, ...] = ()

    def to_json(self) -> Message:
        """Returns the message of a conversation."""
        calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in self.calls]
        return {"role": "assistant", "content": self.text, "model": self.model, "calls": calls}

    @classmethod
    def from_json(cls, message: Message) -> Reply:
        """Returns the reply that `to_json` described."""
        return cls(message["content"], message["model"], tuple(Call(**call) for call in message["calls"]))


@dataclass(slots=True)
class MemberStream:
    """Streams one member of a JSON object, a text, while the object's own text comes in pieces.

    Attributes:
        member: Its name.
        write: Is given each new piece of it.
    """

    member: str
    write: Callable[[str], None]
    _json: str = ""
    _written: str = ""

    def feed(self, piece: str) -> None:
        """Takes the next piece of the object's text; what is no JSON writes nothing."""
        self._json += piece
        try:
            known = from_json(self._json, allow_partial="trailing-strings")
        except ValueError:
            return
        text = known.get(self.member) if isinstance(known, dict) else None
        if isinstance(text, str) and text.startswith(self._written) and text != self._written:
            self.write(text[len(self._written) :])
            self._written = text


@dataclass(frozen=True, slots=True)
class Streams:
    """Where pieces go while they come.

    Attributes:
        text: Is given the model's words.
        calls: By the name of a tool, where its arguments go.
    """

    text: Callable[[str], None]
    calls: dict[str, MemberStream] = field(default_factory=dict)


async def ask(
    instructions: str,
    conversation: Sequence[Message],
    settings: ModelSettings,
    streams: Streams,
    spent: Spent,
    offers: Sequence[Offer] = (),
) -> Reply:
    """Sends a conversation to the model and returns its reply, after streaming it.

    Args:
        instructions: What comes before the conversation.
        conversation: From the first message to the last.
        settings: Which model.
        streams: Where its text goes.
        spent: Is told what the endpoint says the call used, also when the call fails afterwards.
        offers: The tools it may want called.

    Raises:
        ConfigurationError: No model is set, or its client is not installed.
        pydantic_ai.exceptions.ModelAPIError: The endpoint refused or cannot be reached; see `is_transient`.
        UnfinishedAnswer: It broke off.
    """
    if settings.base_url is None:
        raise ConfigurationError("this agent needs a model; set PERDURE_MODEL__BASE_URL, and PERDURE_MODEL__NAME")
    require_client()
    from openai import AsyncOpenAI, Omit
    from pydantic_ai import ModelSettings as RequestSettings
    from pydantic_ai.direct import model_request_stream
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    key = settings.api_key.get_secret_value() if settings.api_key else ""
    # Without a key the client insists that the header is left out in so many words.
    request = RequestSettings() if key else RequestSettings(extra_headers=cast(Any, {"Authorization": Omit()}))
    # Retries are the step's: each is an attempt that a watcher sees. The client lives for one request, as agents may
    # run on any event loop.
    async with (
        AsyncOpenAI(
            base_url=settings.base_url, api_key=key or "none", timeout=settings.timeout_s, max_retries=0
        ) as client,
        model_request_stream(
            OpenAIChatModel(settings.name, provider=OpenAIProvider(openai_client=client)),
            _messages(instructions, conversation),
            model_settings=request,
            model_request_parameters=_parameters(offers),
            instrument=instrumentation(),
        ) as response,
    ):
        return await _read(response, settings.name, streams, spent)


def is_transient(error: BaseException) -> bool:
    """Returns whether asking again may help: not when the request, the key or the installation is wrong."""
    if isinstance(error, ConfigurationError):
        return False
    status = getattr(error, "status_code", None)
    return not isinstance(status, int) or status >= 500 or status in _TRANSIENT_STATUSES


def require_client() -> None:
    """Checks that a model can be asked.

    Raises:
        ConfigurationError: The client is not installed.
    """
    try:
        import pydantic_ai.models.openai  # noqa: F401 - whether it is there, with the client it needs
    except ImportError as error:
        raise ConfigurationError(
            "PERDURE_MODEL__BASE_URL is set; install the model's client: pip install 'perdure[agents]'"
        ) from error


def instrumentation() -> InstrumentationSettings:
    """Returns how requests are traced: `gen_ai.*` spans without prompts and answers."""
    from pydantic_ai import InstrumentationSettings

    return InstrumentationSettings(include_content=False, include_model_request_parameters=False)


async def _read(response: StreamedResponse, name: str, streams: Streams, spent: Spent) -> Reply:
    from pydantic_ai.messages import TextPart, ToolCallPart

    told: dict[int, str] = {}
    """By the place of a part, the tool it calls."""
    try:
        async for event in response:
            _stream(event, told, streams)
    finally:
        usage, model = response.usage, response.model_name or name
        if usage.input_tokens or usage.output_tokens:
            spent(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, model=model)
    answer = response.get()
    # pydantic-ai takes the end of a stream for the end of the answer; only the endpoint's own word tells them apart,
    # and half an answer must not be used.
    if not (answer.provider_details or {}).get("finish_reason"):
        raise UnfinishedAnswer("the model's answer broke off: its stream ended without a finish_reason")
    text = "".join(part.content for part in answer.parts if isinstance(part, TextPart))
    calls = [part for part in answer.parts if isinstance(part, ToolCallPart)]
    # As the model wrote them: what is no JSON, `args_as_json_str` would hide.
    written = [part.args if isinstance(part.args, str) else part.args_as_json_str() for part in calls]
    named = zip(calls, written, strict=True)
    return Reply(text, model, tuple(Call(part.tool_call_id, part.tool_name, arguments) for part, arguments in named))


def _stream(event: Any, told: dict[int, str], streams: Streams) -> None:
    """Hands on what one event of pydantic-ai's adds."""
    from pydantic_ai.messages import (
        PartDeltaEvent,
        PartStartEvent,
        TextPart,
        TextPartDelta,
        ToolCallPart,
        ToolCallPartDelta,
    )

    arguments: Any = None
    match event:
        case PartStartEvent(part=TextPart(content=text)) | PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
            if text:
                streams.text(text)
        case PartStartEvent(index=index, part=ToolCallPart(tool_name=tool, args=arguments)):
            told[index] = tool
        case PartDeltaEvent(index=index, delta=ToolCallPartDelta(args_delta=arguments)):
            pass
        case _:
            return
    if isinstance(arguments, str) and arguments and (stream := streams.calls.get(told.get(index, ""))):
        stream.feed(arguments)


def _messages(instructions: str, conversation: Sequence[Message]) -> list[ModelMessage]:
    """Returns a conversation in pydantic-ai's classes."""
    from pydantic_ai.messages import (
        ModelRequest,
        ModelResponse,
        SystemPromptPart,
        TextPart,
        ToolCallPart,
        ToolReturnPart,
        UserPromptPart,
    )

    found: list[ModelMessage] = [ModelRequest(parts=[SystemPromptPart(instructions)])]
    for message in conversation:
        match message["role"]:
            case "user":
                found.append(ModelRequest(parts=[UserPromptPart(message["content"])]))
            case "tool":
                found.append(ModelRequest(parts=[ToolReturnPart(message["name"], message["content"], message["id"])]))
            case _:
                reply = Reply.from_json(message)
                parts: list[ModelResponsePart] = [TextPart(reply.text)] if reply.text else []
                parts += [ToolCallPart(call.name, call.arguments, call.id) for call in reply.calls]
                found.append(ModelResponse(parts=parts))
    return found


def _parameters(offers: Sequence[Offer]) -> ModelRequestParameters:
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.tools import ToolDefinition

    tools = [
        ToolDefinition(name=offer.name, description=offer.description, parameters_json_schema=offer.schema)
        for offer in offers
    ]
    return ModelRequestParameters(function_tools=tools, allow_text_output=True)
