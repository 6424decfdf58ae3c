"""Models that several test files share; how many threads and which signals tests run with."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# One thread a process, and in those that tests start: several processes run at once, and threads
# that wait for each other on the same cores would take most of the time.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# A shell's background jobs ignore Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, float32, as a safetensors folder."""
    from smollm2 import prepare

    return prepare()


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer, as a safetensors folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder
