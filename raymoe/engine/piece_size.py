"""How much of a prompt to read beside others' tokens, so that these come hardly later."""

LENGTHENED = 0.5  # of a step, by the piece in it: others' tokens come at two thirds of their rate meanwhile
SMOOTHING = 0.3  # weight of the newest measurement; a piece costs more the more of the prompt there is to look back on
FIRST_TOKENS, FEWEST_TOKENS, MOST_TOKENS = 16, 8, 512


class PieceSize:
    """Chooses the size of pieces by what they cost: a step with one, less one without of as many decoding requests.

    Args:
        fixed_tokens: always this many; None: by measured times.
    """

    def __init__(self, fixed_tokens: int | None = None) -> None:
        self._fixed_tokens = fixed_tokens
        self._step_s: dict[int, float] = {}
        self._token_s: float | None = None

    def tokens(self, decoding: int, most: int) -> int:
        """Of prompts, that the next step may read beside so many decoding requests.

        Args:
            most: that are efficient; a fixed number may be larger.
        """
        if self._fixed_tokens is not None:
            return self._fixed_tokens
        step_s = self._step_s.get(decoding)
        if step_s is None or self._token_s is None:
            return min(most, FIRST_TOKENS)
        return min(most, MOST_TOKENS, max(FEWEST_TOKENS, int(LENGTHENED * step_s / self._token_s)))

    def note(self, decoding: int, prompt_tokens: int, took_s: float) -> None:
        """A step in which so many requests decoded took so long, and read so many tokens of prompts."""
        step_s = self._step_s.get(decoding)
        if not prompt_tokens:
            self._step_s[decoding] = _mixed(step_s, took_s)
        elif step_s is not None:
            self._token_s = _mixed(self._token_s, max(1e-9, (took_s - step_s) / prompt_tokens))


def _mixed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + SMOOTHING * (value - mean)
