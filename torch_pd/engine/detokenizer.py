"""Detokenizer: the text of one output, token by token."""

from collections.abc import Sequence
from typing import Any

from torch_pd.request import SamplingParams

CONTEXT = 5
"""Prompt tokens decoded before the output, so that a first word keeps the space before it."""
HALF = "\ufffd"
"""What tokenizers decode an unfinished UTF-8 character to."""


class Detokenizer:
    """Turns the tokens of one output into text that only ever grows.

    Text is held back while it ends in half a UTF-8 character or in what may become a stop string.
    Each token is decoded together with those of the last piece of text, since decoders treat the
    first token of a sequence unlike others; only what the piece grows by is new. (The prefix and
    read offsets of Hugging Face text-generation-inference and vLLM.) Without streaming and stop
    strings, all is decoded once at the end.

    The whole text equals ``tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)`` for
    byte-level tokenizers; others may drop a leading space in decode, which is kept here.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: token ids of the prompt.
        params: of the request; ``detokenize`` is True.
        stream: the text is looked at before `finish`.
    """

    __slots__ = (
        "_checked",
        "_decoded",
        "_held",
        "_ids",
        "_incremental",
        "_piece",
        "_piece_text",
        "_read",
        "_skip_special",
        "_stops",
        "_tokenizer",
        "stop",
    )

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = True,
    ):
        assert params.detokenize
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._stops = params.stop_strings
        self._incremental = stream or bool(self._stops)
        self._ids = list(prompt_ids[-CONTEXT:])
        """The last prompt tokens and the output."""
        self._piece_text = self._decode(self._ids)
        if self._piece_text.endswith(HALF):
            # A prompt that ends in half a character: its rest must not change text already there.
            self._ids, self._piece_text = [], ""
        self._piece = 0
        """Where the last piece of text starts in ``_ids``; ``_piece_text`` is that text."""
        self._read = len(self._ids)
        """Where the tokens start that are not in ``_decoded`` yet."""
        self._decoded = ""
        self._checked = 0
        """A stop string must end after this many characters of ``_decoded``."""
        self._held = 0
        """Characters at the end of ``_decoded`` that may be the beginning of a stop string."""
        self.stop: str | None = None
        """The stop string that ended the output."""

    @property
    def text(self) -> str:
        """The text so far, without what is held back; all of it after `finish`."""
        return self._decoded[: len(self._decoded) - self._held]

    def append(self, token_ids: Sequence[int], check_stop: bool = True) -> str | None:
        """Adds output tokens; of a token that ends the output and is no text (end of text, a stop
        token) the caller tells nothing.

        Args:
            token_ids: one or more tokens.
            check_stop: False before min_tokens: stop strings that end here do not count.

        Returns:
            The stop string that the text now holds, or None. The text then ends before it, and the
            tokens after the one that completed it are ignored.
        """
        assert self.stop is None
        if not self._stops:
            self._ids += token_ids
            if self._incremental:
                self._grow()
            return None
        for token in token_ids:
            self._ids.append(token)
            if not self._grow():
                continue
            if check_stop and self._find_stop():
                break
            self._checked = len(self._decoded)
            self._held = self._stop_begun()
        return self.stop

    def finish(self) -> None:
        """The output is complete: nothing is held back any more."""
        if self.stop is None:
            self._held = 0
            self._decoded += self._decode(self._ids[self._piece :])[len(self._piece_text) :]
            self._piece = self._read = len(self._ids)
            self._piece_text = ""

    def _grow(self) -> bool:
        """Decodes what is new; False if that is no text, or ends in half a character."""
        text = self._decode(self._ids[self._piece :])
        if len(text) <= len(self._piece_text) or text.endswith(HALF):
            return False
        self._decoded += text[len(self._piece_text) :]
        self._piece, self._read = self._read, len(self._ids)
        self._piece_text = self._decode(self._ids[self._piece :])
        return True

    def _find_stop(self) -> bool:
        """Cuts the text before the first stop string in it, if there is one."""
        found = []
        for stop in self._stops:
            place = self._decoded.find(stop, max(0, self._checked - len(stop) + 1))
            if place >= 0:
                found.append((place, stop))
        if not found:
            return False
        place, self.stop = min(found, key=lambda pair: pair[0])
        self._decoded = self._decoded[:place]
        self._held = 0
        return True

    def _stop_begun(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _decode(self, token_ids: list[int]) -> str:
        # Cleaning up would take spaces back that have been shown.
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._skip_special,
            clean_up_tokenization_spaces=False,
        )
