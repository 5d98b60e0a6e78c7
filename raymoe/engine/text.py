"""Streaming text: tokens in, final text out.

A token may end in the middle of a character, and the beginning of a stop string may yet become one; both are
held back until they are decided.
"""

from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """Text of ``token_ids``."""
        ...


class TextStream:
    """Text of one answer, token by token.

    ``decode`` of a growing list is not the concatenation of its parts (spaces, byte pairs), so text comes from
    the difference between a window's text before and after the new token; the window moves on as text becomes
    final, and stays short.

    Args:
        decoder: a tokenizer; None for models without one, whose text is empty.
        stop: strings that end the answer; text before the first one is final.
    """

    def __init__(self, decoder: Decoder | None, stop: tuple[str, ...] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text has been taken
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is final now. ``stopped`` tells that a stop string came."""
        if self._decoder is None or self.stopped:
            return ""
        self._window.append(token)
        before = self._decoder.decode(self._window[: self._known], skip_special_tokens=True)
        after = self._decoder.decode(self._window, skip_special_tokens=True)
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        new = after[len(before) :]
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return self._release(new)

    def finish(self) -> str:
        """What was held back, once no more tokens come; an unfinished character shows as a replacement."""
        if self._decoder is None or self.stopped:
            return ""
        before = self._decoder.decode(self._window[: self._known], skip_special_tokens=True)
        after = self._decoder.decode(self._window, skip_special_tokens=True)
        text = self._release(after[len(before) :])
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self, new: str) -> str:
        text = self._held + new
        starts = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
