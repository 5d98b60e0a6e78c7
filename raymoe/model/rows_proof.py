"""Whether sequences of different lengths may be rows of one forward: proved, not believed.

``model.rows`` takes an architecture apart where it looks back. Some keep things elsewhere (states in lists of the
cache, position tables beside it, masks of absolute places) and would mix rows up. So a probe runs sequences both ways,
with experts that return zeros.
"""

import logging
from typing import Any

import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.router import ProbeExperts, backend_of, probe_tokens
from raymoe.model.rows import give_back, split_by_rows
from raymoe.model.runner import Runner
from raymoe.model.trials import allowed_difference

log = logging.getLogger(__name__)

PROMPTS = (9, 24, 5)  # tokens of each: one passes the windows of most small models, the longest is in the middle
STEPS = ((0, 1, 2), (0, 1, 2), (2, 0), (1, 2), (0, 1, 2))  # rows of each: they come and go, and change places
DIFFERING_ROPE = ("dynamic", "longrope")  # kinds of rotation that depend on the longest position of a forward


def join_rows(runner: Runner) -> str | None:
    """Let a trunk decode several sequences in one forward; or why it can't, in a few words: it is as it was then.

    ``runner.joins`` says so afterwards. To be called when native kernels have taken their places, before any forecast.
    """
    reason = why_never(runner)
    if reason is not None:
        return reason
    split = split_by_rows(runner.model)
    if not split:
        return "none of its modules is given a cache"
    modules: list[Any] = [module for _, module in experts_modules(runner.model)]
    with backend_of(modules, ProbeExperts()):
        try:
            reason = _compare(runner)
        except Exception as error:  # an architecture's own code, which never expected this
            log.debug("several sequences in one forward", exc_info=True)
            reason = f"a forward of several sequences fails: {type(error).__name__}"
    runner.joins = reason is None
    if reason is not None:
        give_back(split)
    return reason


def why_never(runner: Runner) -> str | None:
    """Why sequences can't share forwards, nor be cut into several, for reasons that a short probe would not show."""
    config = runner.model.config.get_text_config(decoder=True)
    if not runner.takes_rows:
        return "the architecture prepares its inputs in a way of its own"
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks of absolute places"
    if rotates_by_length(config):
        return "its positions are rotated by how long the sequence is"
    return None


def rotates_by_length(config: Any) -> bool:
    """Whether the same position is rotated differently in a longer forward."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(layer.get("rope_type") in DIFFERING_ROPE for layer in layers)


def _compare(runner: Runner) -> str | None:
    tokens = probe_tokens(runner.model)
    prompts = [tokens[place : place + length] for place, length in enumerate(PROMPTS)]
    following = tokens[max(PROMPTS) :]
    alone = [runner.prefill(prompt)[1] for prompt in prompts]
    rows = [runner.prefill(prompt)[1] for prompt in prompts]
    for step, chosen in enumerate(STEPS):
        given = [following[step + row] for row in chosen]
        expected_BV = torch.stack([runner.decode(alone[row], token) for row, token in zip(chosen, given, strict=True)])
        found_BV = runner.decode_together([rows[row] for row in chosen], given)
        if not float((found_BV - expected_BV).abs().max()) <= allowed_difference(expected_BV, runner.model.dtype):
            return "a forward of several sequences gives other logits than single ones"
    return None
