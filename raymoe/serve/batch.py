"""What travels from the engine to the ingress: chunks that were ready together."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from raymoe.engine.request import Chunk, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Chunks of one answer. The first batch of an answer is empty: it says that the engine took the request.

    ``token_texts`` names the tokens of ``chunks`` and their alternatives where log probabilities were asked for.
    ``choice`` is the answer's number among those of a request.
    """

    chunks: tuple[Chunk, ...] = ()
    token_texts: Mapping[int, str] = field(default_factory=dict)
    choice: int = 0

    @property
    def text(self) -> str:
        """All text that became final."""
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of all chunks."""
        return tuple(item for chunk in self.chunks for item in chunk.logprobs)

    @property
    def last(self) -> Chunk | None:
        """The chunk that finishes the answer, if it is among these."""
        return self.chunks[-1] if self.chunks and self.chunks[-1].finish_reason is not None else None


def merge(batches: list[Batch]) -> list[Batch]:
    """All batches of some answers as one of each, by choice."""
    merged = []
    for choice in sorted({batch.choice for batch in batches}):
        own = [batch for batch in batches if batch.choice == choice]
        texts: dict[int, str] = {}
        for batch in own:
            texts.update(batch.token_texts)
        chunks = tuple(chunk for batch in own for chunk in batch.chunks)
        merged.append(Batch(chunks=chunks, token_texts=texts, choice=choice))
    return merged
