"""Whether a trunk can read several tokens on trial: that it gives what single ones give is proved, not believed.

Drafts need a cache whose last positions can be cut off again, and a forward of several tokens on top of a cache that is
the same as several forwards of one. transformers' caches say whether they can be cropped, and some say so wrongly
(those that keep states in lists of their own); some architectures have a fast path for one token and another for a
prompt, and none for a few. So a probe runs both ways, with experts that return zeros, before any draft is read.
"""

import logging
from typing import Any

import torch
from transformers.cache_utils import Cache

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.kv import abilities
from raymoe.model.router import ProbeExperts, backend_of, probe_tokens
from raymoe.model.runner import Runner, SequenceState

log = logging.getLogger(__name__)

PROMPT_TOKENS = 24
PASSES = ((3, 2), (1, 2), (1, 0), (3, 2))  # tokens that are kept, and wrong ones that are cut off
# of the spread of logits: another order of sums, over all layers; a cache that is off by one token is off by far more
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def make_cuttable(state: SequenceState) -> str | None:
    """Make a sequence ready for ``Runner.read`` after its prefill; or why it can't be, in a few words.

    Windows keep what they would forget from now on, until ``Runner.keep`` cuts them to their length: so they never hold
    more than the window and one pass.
    """
    cache: Any = state.kwargs.get("past_key_values")
    if not isinstance(cache, Cache):
        return "the model keeps no cache that could be cut"
    own = abilities(cache).own
    if own or not cache.is_croppable:
        where = f" in {len(own)} of its layers" if own else ""
        return f"the cache keeps states{where} that can't be taken back"
    cache.activate_past_recording()
    return None


def why_no_trials(runner: Runner) -> str | None:
    """Why this trunk can't read tokens on trial, in a few words; None where it can. Leaves nothing behind."""
    modules: list[Any] = [module for _, module in experts_modules(runner.model)]
    tokens = probe_tokens(runner.model)
    prompt, following = tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS : PROMPT_TOKENS + sum(kept for kept, _ in PASSES)]
    with backend_of(modules, ProbeExperts()):
        _, state = runner.prefill(prompt)
        expected_TV = torch.stack([runner.decode(state, token) for token in following])
        try:
            return _compare(runner, prompt, following, expected_TV)
        except Exception as error:  # an architecture's own code, which never expected this
            log.debug("several tokens on trial", exc_info=True)
            return f"a pass of several tokens fails: {type(error).__name__}"


def allowed_difference(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """How far logits of a model in ``dtype`` may be from these and still differ by rounding alone."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * float(logits.std())


def _compare(runner: Runner, prompt: list[int], following: list[int], expected_TV: torch.Tensor) -> str | None:
    _, state = runner.prefill(prompt)
    reason = make_cuttable(state)
    if reason is not None:
        return reason
    allowed = allowed_difference(expected_TV, runner.model.dtype)
    done = 0
    for count, wrong in PASSES:
        trial = runner.read(state, [*following[done : done + count], *prompt[:wrong]])
        runner.keep(state, trial, count)
        difference = trial.logits_TV[:count] - expected_TV[done : done + count]
        done += count
        if not float(difference.abs().max()) <= allowed:  # NaN too
            return "a pass of several tokens gives other logits than single ones"
    return None
