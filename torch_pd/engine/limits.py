"""Limits: which requests an engine can run, known also where the engine is another process's."""

from dataclasses import dataclass

from torch_pd.engine.inflight import Request


@dataclass(frozen=True)
class Limits:
    """What a request must keep within."""

    vocab_size: int
    max_model_len: int
    kv_tokens: int
    """Tokens that the KV pool holds."""
    has_tokenizer: bool

    def check(self, request: Request) -> None:
        """Raises ValueError if the request could never run."""
        ids, params = request.prompt_token_ids, request.params
        largest = max(ids)
        if largest >= self.vocab_size:
            raise ValueError(
                f"token id {largest} is past the vocabulary of {self.vocab_size} tokens"
            )
        if len(ids) > self.max_model_len - 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but max_model_len={self.max_model_len} leaves "
                f"room for {self.max_model_len - 1} before the first output token (the KV pool "
                f"holds {self.kv_tokens}): shorten the prompt, or raise max_model_len or "
                "kv_cache_gib"
            )
        params.check_vocabulary(self.vocab_size)
        if params.stop_strings and not self.has_tokenizer:
            raise ValueError("stop strings need a tokenizer: give tokenizer=..., or stop_token_ids")
