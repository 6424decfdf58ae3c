"""Perplexity of a text with KV pages as the model, of fp8 and of int8.

    python bench/perplexity.py [--model FOLDER] [--text FILE] [--device cpu|cuda] [--json FILE]

The text is read in windows of 1,024 tokens, each by itself. The change is given with its standard
error: log-probabilities of single tokens move by far more than their mean does.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from torch_pd import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import prepare

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "devils_dictionary.txt"
WINDOW = 1024


def logprobs(folder: Path, dtype: str, kind: str, device: str, text: str) -> torch.Tensor:
    """Log-probabilities of the text's tokens, but for the first of each window."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    options = {"max_model_len": WINDOW + 1, "max_num_seqs": 1, "enforce_eager": True}
    with LLM(folder, dtype=dtype, kv_cache_dtype=kind, device=device, **options) as llm:
        ids = llm.tokenizer(text).input_ids
        windows = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
        outputs = llm.generate(windows, params, use_tqdm=False)
    found = [
        next(iter(entry.values())).logprob
        for output in outputs
        for entry in output.prompt_logprobs[1:]
    ]
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtypes", default="float32,bfloat16", help="by comma")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    folder, text = args.model or prepare(), args.text.read_text()
    print(
        f"{'dtype':10}{'pages':7}{'tokens':>7}{'auto':>9}{'so':>9}{'change':>9}{'std. error':>12}"
    )
    rows = []
    for dtype in args.dtypes.split(","):
        plain = logprobs(folder, dtype, "auto", args.device, text)
        for kind in ("fp8", "int8"):
            found = logprobs(folder, dtype, kind, args.device, text)
            moved = plain - found
            row = {
                "dtype": dtype,
                "pages": kind,
                "tokens": len(plain),
                "auto": math.exp(-plain.mean()),
                "so": math.exp(-found.mean()),
                "change": math.exp(moved.mean()) - 1,
                "standard_error": float(moved.std() / len(moved) ** 0.5),
            }
            rows.append(row)
            print(
                f"{dtype:10}{kind:7}{row['tokens']:7}{row['auto']:9.3f}{row['so']:9.3f}"
                f"{row['change']:9.2%}{row['standard_error']:12.2%}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
