"""Text to measure a model on: pieces of a file, or what the model itself says.

Either way it comes as sequences of token ids that stand for themselves, each with a KV cache of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raymoe.engine.forced import begin_rows
from raymoe.errors import ConfigError
from raymoe.model.runner import Runner

SEQUENCE_TOKENS = 256  # long enough for attention to have something to attend to, short enough for a small cache
LEAST_TOKENS = 64  # fewer say nothing about experts of which most are chosen for one token in ten or less
MOST_CHARACTERS = 1 << 22  # of a file; tokenising more takes longer than it is worth, for thousands of tokens
ROWS = 8  # sequences generated in lockstep: each forward reads the weights once for all of them


def lengths(tokens: int) -> list[int]:
    """How many tokens each sequence has: as even as possible, none longer than ``SEQUENCE_TOKENS``."""
    count = -(-tokens // SEQUENCE_TOKENS)
    return [tokens // count + (index < tokens % count) for index in range(count)]


def check_tokens(tokens: int, *, name: str = "--tokens") -> None:
    """Raise ConfigError for too few tokens."""
    if tokens < LEAST_TOKENS:
        raise ConfigError(f"{name} is {tokens}; at least {LEAST_TOKENS} are needed for figures that mean anything")


def read_text(path: Path) -> str:
    """The beginning of a text file. Raises ConfigError where it can't be read, is no text, or is empty."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS)
    except OSError as error:
        raise ConfigError(f"can't read the text {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path} is empty: calibration and tuning need at least {LEAST_TOKENS} tokens of text")
    return text


def text_sequences(text: str, tokenizer: Any, tokens: int) -> list[list[int]]:
    """Evenly spaced pieces of a text, ``tokens`` in all, or all of it where it is shorter.

    A token that the tokenizer puts before every text (models with one behave oddly without) begins each piece.
    Raises ConfigError for a text of too few tokens, or a model without a tokenizer (None).
    """
    if tokenizer is None:
        raise ConfigError("--text needs a tokenizer, and the model has none: leave it out for text that it generates")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens; at least {LEAST_TOKENS} are needed")
    first = tokenizer.encode("a")[:1]
    head = first if first != tokenizer.encode("a", add_special_tokens=False)[:1] else []
    sizes = lengths(min(tokens, len(ids)))
    spare = (len(ids) - sum(sizes)) // max(1, len(sizes) - 1)
    pieces, start = [], 0
    for size in sizes:
        pieces.append([*head, *ids[start : start + size - len(head)]])
        start += size + spare
    return pieces


def text_pieces(text: str, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """``count`` evenly spaced pieces of ``length`` tokens; they overlap where the text is shorter than all of them.

    Raises ConfigError for a text of less than one piece, or a model without a tokenizer (None).
    """
    if tokenizer is None:
        raise ConfigError("--text needs a tokenizer, and the model has none: leave it out for text that it generates")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if len(ids) < length:
        raise ConfigError(
            f"the text has {len(ids)} tokens, fewer than --length {length}: give more text, or less length"
        )
    stride = (len(ids) - length) / max(1, count - 1)
    return [ids[round(index * stride) :][:length] for index in range(count)]


def generated_sequences(
    runner: Runner, tokens: int, *, seed: int, on_tokens: Callable[[int], None] = lambda done: None
) -> list[list[int]]:
    """What the model says at temperature 1, from its beginning-of-sequence token; the same each time.

    Args:
        seed: of the first sequence; the next has the next, and so on.
        on_tokens: told how many tokens there are so far.
    """
    sizes = lengths(tokens)
    start = start_token(runner.model.config.get_text_config(decoder=True))
    at_once = ROWS if runner.takes_rows else 1
    sequences: list[list[int]] = []
    made = 0

    def on_row_tokens(count: int) -> None:
        nonlocal made
        made += count
        on_tokens(min(made, tokens))

    for first in range(0, len(sizes), at_once):
        group = sizes[first : first + at_once]
        rows = generate_rows(runner, start, len(group), group[0], seed + first, on_row_tokens)
        sequences += [row[:size] for row, size in zip(rows, group, strict=True)]
    return sequences


def generate_rows(
    runner: Runner, start: int, count: int, length: int, seed: int, on_tokens: Callable[[int], None]
) -> list[list[int]]:
    """``count`` sequences of ``length`` tokens in lockstep; ``on_tokens`` is told of new ones."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(count)]
    rows = [[start] for _ in range(count)]
    on_tokens(count)
    logits_BV, step = begin_rows(runner, rows)
    for position in range(1, length):
        probability_BV = torch.softmax(logits_BV, dim=-1).cpu()
        tokens = [
            int(torch.multinomial(probability_V, 1, generator=generator))
            for probability_V, generator in zip(probability_BV, generators, strict=True)
        ]
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        on_tokens(count)
        if position + 1 < length:
            logits_BV = step(tokens)
    return rows


def start_token(text_config: Any) -> int:
    """The model's beginning of sequence, else an end (which stands between documents too), else token 0."""
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(text_config, name, None)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if isinstance(value, int) and 0 <= value < text_config.vocab_size:
            return value
    return 0
