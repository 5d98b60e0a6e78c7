"""Whether a prompt may be read in pieces, beside other sequences' tokens, and from a copy of another's beginning.

transformers' caches take several tokens on top of what they hold, and most architectures bear that; some have a fast
path for one token and another for a whole prompt, and none for the middle of one, or keep states that a piece would set
back. So a probe reads a prompt both ways, with experts that return zeros, before any request relies on it.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.kv import abilities
from raymoe.model.roomy import RoomyLayer
from raymoe.model.router import ProbeExperts, backend_of, probe_tokens
from raymoe.model.rows_proof import why_never
from raymoe.model.runner import Runner, SequenceState
from raymoe.model.trials import allowed_difference

log = logging.getLogger(__name__)

PROMPT_TOKENS = 40
PIECES = (9, 1, 17, 13)  # of the prompt; one passes the windows of most small models
BESIDE = (5, 20, 15)  # pieces of it that are read in one forward with another sequence's token
OTHER_TOKENS = 6  # of the prompt of that sequence
COMMON = 22  # tokens of a prompt that are copied from another's
FOLLOWING = 4  # tokens read one by one afterwards


def prove_pieces(runner: Runner) -> dict[str, str]:
    """Find out what of pieces a trunk bears: ``runner.reads_on``, ``mixes`` and ``copies`` say so afterwards.

    To be called when rows were proved. Returns, for what it can't do ("pieces", "beside", "copies"), why.
    """
    reasons = {}
    with backend_of([module for _, module in experts_modules(runner.model)], ProbeExperts()):
        reason = why_never(runner) or _attempt(_read_in_pieces, runner)
        runner.reads_on = reason is None
        if reason is not None:
            return {"pieces": reason, "beside": reason, "copies": reason}
        reason = _attempt(_read_beside, runner) if runner.joins else "requests are no rows of one forward"
        runner.mixes = reason is None
        if reason is not None:
            reasons["beside"] = reason
        reason = _attempt(_read_from_copy, runner)
        runner.copies = reason is None
        if reason is not None:
            reasons["copies"] = reason
    return reasons


def _attempt(compare: Callable[[Runner], str | None], runner: Runner) -> str | None:
    try:
        return compare(runner)
    except Exception as error:  # an architecture's own code, which never expected this
        log.debug("a prompt in pieces", exc_info=True)
        return f"such a forward fails: {type(error).__name__}"


def _probe(runner: Runner) -> tuple[list[int], list[int]]:
    """A prompt, and what follows it."""
    tokens = probe_tokens(runner.model)
    return tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS : PROMPT_TOKENS + FOLLOWING]


def _after(runner: Runner, state: SequenceState, logits_V: torch.Tensor, following: list[int]) -> torch.Tensor:
    return torch.stack([logits_V, *(runner.decode(state, token) for token in following)])


def _expected(runner: Runner, prompt: list[int], following: list[int]) -> torch.Tensor:
    logits_V, state = runner.prefill(prompt)
    return _after(runner, state, logits_V, following)


def _differ(runner: Runner, found_TV: torch.Tensor, expected_TV: torch.Tensor) -> bool:
    allowed = allowed_difference(expected_TV, runner.model.dtype)
    return not float((found_TV - expected_TV).abs().max()) <= allowed  # NaN too


def _read_in_pieces(runner: Runner) -> str | None:
    prompt, following = _probe(runner)
    state, done, logits_V = runner.empty(), 0, torch.empty(0)
    for count in PIECES:
        logits_V = runner.read_on(state, prompt[done : done + count])
        done += count
    if _differ(runner, _after(runner, state, logits_V, following), _expected(runner, prompt, following)):
        return "a prompt in pieces gives other logits than a whole one"
    return None


def _read_beside(runner: Runner) -> str | None:
    """Pieces of one prompt in forwards with the tokens of another sequence: as if each were alone."""
    prompt, following = _probe(runner)
    tokens = probe_tokens(runner.model)
    others = tokens[-len(BESIDE) :]
    alone, beside = (runner.prefill(tokens[:OTHER_TOKENS])[1] for _ in range(2))
    state, done, found, expected, logits_V = runner.empty(), 0, [], [], torch.empty(0)
    for count, other in zip(BESIDE, others, strict=True):
        both_BV = runner.read_together([beside, state], [[other], prompt[done : done + count]])
        expected.append(runner.decode(alone, other))
        found.append(both_BV[0])
        logits_V = both_BV[1]
        done += count
    found_TV = torch.cat([torch.stack(found), _after(runner, state, logits_V, following)])
    if _differ(runner, found_TV, torch.cat([torch.stack(expected), _expected(runner, prompt, following)])):
        return "pieces beside other sequences' tokens give other logits than alone"
    return None


def _read_from_copy(runner: Runner) -> str | None:
    """A prompt whose beginning was another's: what was copied is as good, and the other goes on as it was."""
    prompt, following = _probe(runner)
    whole = [*prompt[:COMMON], *reversed(prompt[COMMON:])]
    logits_V, state = runner.prefill(whole)
    cache: Any = state.kwargs["past_key_values"]
    if not abilities(cache).full or not all(type(layer) is RoomyLayer for layer in cache.layers):
        return "the cache holds more than keys and values of all positions"
    copy = runner.copied(state, COMMON)
    copied_V = runner.read_on(copy, prompt[COMMON:])
    found_TV = torch.cat([_after(runner, copy, copied_V, following), _after(runner, state, logits_V, following)])
    expected_TV = torch.cat([_expected(runner, prompt, following), _expected(runner, whole, following)])
    if _differ(runner, found_TV, expected_TV):
        return "a prompt that begins with a copy gives other logits"
    return None
