"""The text of one sequence, token by token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from serving.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes of UTF-8


class TextStream:
    """Text of the tokens generated after a prompt, as far as it can't change any more, up to the first stop string.

    What `push` and `finish` return, put together, is the text that the tokens add to the prompt's, cut before the
    stop string that is complete first (of several complete at one character, the longest), wherever tokens cut the
    text. A stop string that spells a special token ends the text at that token, which itself has no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Raises ValueError for an empty stop string."""
        if not all(stop):
            raise ValueError("a stop string is empty; leave it out")
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A prompt of token ids may end within a character, which the first tokens then complete.
        self._decoder.decode(_last_bytes(tokenizer, prompt_ids))
        self._at_start = tokenizer.strips_first_space and not any(map(tokenizer.shown_bytes, prompt_ids))
        self._stops = [_StopString(text) for text in dict.fromkeys(stop)]
        self._stop_ids = {tokenizer.token_id(text) for text in stop} & tokenizer.special_ids
        self._held = ""

    def push(self, token: int) -> str:
        """Takes a token; text that can be shown now.

        No piece of a character, and nothing that may yet become a stop string, is in it. Empty once stopped.
        """
        if self.stopped:
            return ""
        if token in self._stop_ids:
            return self._stop(self.finish())
        data = self._tokenizer.shown_bytes(token)
        if self._at_start and data:
            data = data.removeprefix(b" ")
            self._at_start = False
        return self._show(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, when no token follows: a character cut short, or the beginning of a stop string."""
        if self.stopped:
            return ""
        text = self._show(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        for stop in self._stops:
            stop.reset()
        return text + held

    def _show(self, text: str) -> str:
        if not self._stops:
            return text
        text = self._held + text
        for at in range(len(self._held), len(text)):
            complete = [stop.size for stop in self._stops if stop.read(text[at])]
            if complete:
                return self._stop(text[: at + 1 - max(complete)])
        shown = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]

    def _stop(self, text: str) -> str:
        self.stopped = True
        self._held = ""
        return text


def _last_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The end of a text's bytes, enough to hold a character cut short."""
    data = b""
    for i in reversed(ids):
        data = tokenizer.shown_bytes(i) + data
        if len(data) >= _LONGEST_CHARACTER:
            break
    return data


class _StopString:
    """How much of a stop string the text ends with, character by character (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.size = len(text)
        self.matched = 0
        self._text = text
        # After a mismatch at n, the text still ends with the first _shorter[n] characters.
        self._shorter = [0] * (len(text) + 1)
        for n in range(1, len(text)):
            self._shorter[n + 1] = self._after(self._shorter[n], text[n])

    def read(self, char: str) -> bool:
        """Takes the text's next character; true if the stop string is complete."""
        self.matched = self._after(self.matched, char)
        return self.matched == self.size

    def reset(self) -> None:
        self.matched = 0

    def _after(self, matched: int, char: str) -> int:
        while matched and (matched == self.size or self._text[matched] != char):
            matched = self._shorter[matched]
        return matched + (self._text[matched] == char)
