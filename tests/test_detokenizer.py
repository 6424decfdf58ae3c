"""Text that grows token by token: whole characters, stop strings, and the same text in the end."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pd.engine.detokenizer import HALF, Detokenizer
from torch_pd.request import SamplingParams

TEXTS = [
    "The capital of France is Paris. Isn't it , after all ?",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 skin",
    "e\u0301 o\u0308 n\u0303 a\u0331\u0304",
    "你好\uff0c世界。今日は良い天気ですね。안녕하세요",
    "  indented\n\n\tcode = {1: 'x'}  \n",
    "नमस्ते дравствуйте مرحبا \U0001d518\U0001d52b \ufffd real",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def byte_tokens(tokenizer: Any) -> list[int]:
    """The 256 tokens of single bytes: byte-level vocabularies name each by one character."""
    vocab = tokenizer.get_vocab()
    ids = [i for name, i in vocab.items() if len(name) == 1]
    assert any(tokenizer.decode([i]) == HALF for i in ids)
    return sorted(ids)


@pytest.fixture(scope="module")
def fallback_tokenizer() -> Any:
    """A small tokenizer as Llama 2 has it: spaces as a sign, bytes as <0x00>, first space cut."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁Paris", "▁is", "▁a", "▁city", ".", "the"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


class Letters:
    """A tokenizer whose token i is the i-th of some strings."""

    def __init__(self, words: list[str]):
        self.words = words

    def decode(self, token_ids: list[int], **_: bool) -> str:
        return "".join(self.words[i] for i in token_ids)


def run(detokenizer: Detokenizer, pieces: list[list[int]]) -> str:
    """Feeds the pieces and finishes; the text must only grow and end in whole characters."""
    shown = detokenizer.text
    for piece in pieces:
        detokenizer.append(piece)
        assert detokenizer.text.startswith(shown)
        shown = detokenizer.text
        assert not shown.endswith(HALF)
        if detokenizer.stop is not None:
            break
    detokenizer.finish()
    assert detokenizer.text.startswith(shown)
    return detokenizer.text


def whole(tokenizer: Any, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_real_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    prompt = tokenizer("Say it:")["input_ids"]
    for cut in (1, 2, 5):
        pieces = [ids[i : i + cut] for i in range(0, len(ids), cut)]
        assert run(Detokenizer(tokenizer, prompt, SamplingParams()), pieces) == text
    once = Detokenizer(tokenizer, prompt, SamplingParams(), stream=False)
    once.append(ids)
    assert once.text == ""
    once.finish()
    assert once.text == text


def test_half_characters_are_held_back(tokenizer: Any) -> None:
    ids = tokenizer("🧿")["input_ids"]
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    for token in ids[:-1]:
        detokenizer.append([token])
        assert detokenizer.text == ""
    detokenizer.append(ids[-1:])
    assert detokenizer.text == "🧿"
    detokenizer.append(ids[:1])
    assert detokenizer.text == "🧿"
    detokenizer.finish()
    assert detokenizer.text == "🧿" + HALF


def test_prompt_ending_in_half_a_character(tokenizer: Any) -> None:
    ids = tokenizer("🧿 x")["input_ids"]
    for cut in range(1, len(ids)):
        text = run(Detokenizer(tokenizer, ids[:cut], SamplingParams()), [[i] for i in ids[cut:]])
        assert text == whole(tokenizer, ids[cut:])


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_tokens(tokenizer: Any, byte_tokens: list[int], data: Any) -> None:
    token = st.one_of(
        st.sampled_from(byte_tokens),
        st.integers(0, len(tokenizer) - 1),
        st.sampled_from(tokenizer.all_special_ids),
    )
    phrase = st.sampled_from([tokenizer(text)["input_ids"] for text in TEXTS])
    part = st.one_of(st.lists(token, max_size=8), phrase)
    ids = [i for piece in data.draw(st.lists(part, max_size=5)) for i in piece]
    prompt = data.draw(st.lists(token, max_size=8))
    skip = data.draw(st.booleans())
    params = SamplingParams(skip_special_tokens=skip)
    pieces, rest = [], ids
    while rest:
        size = data.draw(st.sampled_from([1, 1, 1, 2, 7]))
        pieces.append(rest[:size])
        rest = rest[size:]
    expected = whole(tokenizer, ids, skip)
    assert run(Detokenizer(tokenizer, prompt, params), pieces) == expected
    once = Detokenizer(tokenizer, prompt, params, stream=False)
    for piece in pieces:
        once.append(piece)
    once.finish()
    assert once.text == expected


@pytest.mark.parametrize("stream", [True, False])
def test_first_space_and_byte_fallback(fallback_tokenizer: Any, stream: bool) -> None:
    vocab = fallback_tokenizer.get_vocab()

    def ids(*words: str) -> list[int]:
        return [vocab[word] for word in words]

    emoji = [vocab[f"<0x{byte:02X}>"] for byte in "🧿".encode()]
    tokens = ids("▁is", "▁a", "▁city") + emoji + ids(".")
    detokenizer = Detokenizer(fallback_tokenizer, ids("▁Paris"), SamplingParams(), stream=stream)
    assert run(detokenizer, [[token] for token in tokens]) == " is a city🧿."
    alone = Detokenizer(fallback_tokenizer, [], SamplingParams(), stream=stream)
    assert run(alone, [[token] for token in tokens]) == "is a city🧿."


def test_special_tokens(tokenizer: Any) -> None:
    end = tokenizer.all_special_ids[0]
    ids = [*tokenizer("one")["input_ids"], end, *tokenizer(" two")["input_ids"]]
    for skip, text in ((True, "one two"), (False, f"one{tokenizer.decode([end])} two")):
        detokenizer = Detokenizer(tokenizer, [end], SamplingParams(skip_special_tokens=skip))
        assert run(detokenizer, [[i] for i in ids]) == text


words_of = st.text("abc", min_size=1, max_size=3)


@settings(deadline=None, max_examples=300)
@given(
    words=st.lists(words_of, min_size=1, max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    unchecked=st.integers(0, 4),
    stream=st.booleans(),
)
def test_stop_strings(words: list[str], stops: list[str], unchecked: int, stream: bool) -> None:
    detokenizer = Detokenizer(Letters(words), [], SamplingParams(stop=stops), stream=stream)
    text, old = "", 0
    for i, word in enumerate(words):
        stop = detokenizer.append([i], check_stop=i >= unchecked)
        text, old = text + word, len(text)
        # Where a stop string starts that ends in this word.
        found = [
            (start, stop)
            for start in range(len(text))
            for stop in stops
            if text.startswith(stop, start) and start + len(stop) > old
        ]
        if found and i >= unchecked:
            start = min(found)[0]
            assert stop in [stop for place, stop in found if place == start]
            detokenizer.finish()
            assert detokenizer.text == text[:start]
            assert detokenizer.stop == stop
            return
        assert stop is None
        held = max(
            size
            for size in range(len(text) + 1)
            if size == 0 or any(s.startswith(text[-size:]) and len(s) > size for s in stops)
        )
        assert detokenizer.text == text[: len(text) - held]
    detokenizer.finish()
    assert detokenizer.text == text
    assert detokenizer.stop is None


def test_stop_string_across_real_tokens(tokenizer: Any) -> None:
    ids = tokenizer("First line.\n\nSecond 你好 line. END of it")["input_ids"]
    for stop, text in (
        ("\n\nSec", "First line."),
        ("好 l", "First line.\n\nSecond 你"),
        (["END", "你"], "First line.\n\nSecond "),
    ):
        params = SamplingParams(stop=stop)
        detokenizer = Detokenizer(tokenizer, [], params)
        assert run(detokenizer, [[i] for i in ids]) == text
        at_once = Detokenizer(tokenizer, [], params, stream=False)
        assert at_once.append(ids) == detokenizer.stop
        assert at_once.text == text
