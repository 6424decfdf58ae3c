"""Command line: ``torch-pd`` (also ``python -m torch_pd``).

Errors are one line, exit code 2; 1 if a rank died or failed, or output cannot be written.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch_pd.board import GroupError
from torch_pd.config import EngineConfig
from torch_pd.request import SamplingParams

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_int(text: str) -> int:
    """A whole number: 8192, 8_192, 8k (8192), 1.5k, 2m. k, m and g are powers of 1024."""
    cleaned = text.strip().lower().replace("_", "").replace(",", "")
    factor = _SUFFIXES.get(cleaned[-1:], 1)
    digits = cleaned[:-1] if factor > 1 else cleaned
    try:
        value = float(digits) * factor if factor > 1 else int(digits)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number such as 8192 or 8k"
        ) from None
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is {value}, not a whole number")
    return int(value)


def parse_bool(text: str) -> bool:
    """true or false."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _parse_ranks(text: str) -> tuple[int, ...]:
    return tuple(parse_int(part) for part in text.split(","))


def _converter(annotation: Any) -> Callable[[str], Any]:
    """How a flag's text becomes the value of a field of this type."""
    members = [
        arg
        for arg in (typing.get_args(annotation) or (annotation,))
        if arg is not types.NoneType and arg is not Ellipsis
    ]
    kind = members[0]
    if typing.get_origin(kind) is tuple or typing.get_origin(annotation) is tuple:
        return _parse_ranks
    converters: dict[Any, Callable[[str], Any]] = {int: parse_int, bool: parse_bool}
    return converters.get(kind, kind)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of EngineConfig."""
    group = parser.add_argument_group("engine")
    hints = typing.get_type_hints(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        default = "" if field.default is None else f" (default: {field.default})"
        options: dict[str, Any] = {
            "dest": f"config_{field.name}",
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']}{default}".replace("%", "%%"),
            "type": _converter(hints[field.name]),
        }
        if options["type"] is parse_bool:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
        else:
            options["metavar"] = {parse_int: "N", float: "X", _parse_ranks: "R,R"}.get(
                options["type"], "TEXT"
            )
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def config_from(args: argparse.Namespace) -> dict[str, Any]:
    """The EngineConfig fields that were given on the command line."""
    prefix = "config_"
    return {k[len(prefix) :]: v for k, v in vars(args).items() if k.startswith(prefix)}


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=parse_int, default=128, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X")
    group.add_argument("--top-k", type=parse_int, default=0, metavar="N", help="0 is off")
    group.add_argument("--min-p", type=float, default=0.0, metavar="X")
    group.add_argument("--n", type=parse_int, default=1, metavar="N", help="texts of each prompt")
    group.add_argument("--sampling-seed", type=parse_int, default=None, metavar="N")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    group.add_argument("--ignore-eos", action="store_true")


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.sampling_seed,
        max_tokens=args.max_tokens,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )


def _generate(args: argparse.Namespace) -> None:
    from torch_pd.llm import LLM

    prompts = list(args.prompt or [])
    if args.prompt_file:
        path = Path(args.prompt_file)
        if not path.exists() or path.is_dir():
            raise ValueError(f"--prompt-file {str(path)!r} is not a file")
        try:
            prompts += [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {str(path)!r} is not UTF-8 text: {error}") from None
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT (may be repeated) or --prompt-file FILE")
    params = _sampling_params(args)
    with LLM(args.model, **config_from(args)) as llm:
        requests: list[Any] = list(prompts)
        if args.chat:
            requests = llm.chat_prompts([[{"role": "user", "content": text}] for text in prompts])
        if len(prompts) == 1 and params.n == 1 and not args.json:
            shown = 0
            for output in llm.stream(requests, params):
                text = output.outputs[0].text
                print(text[shown:], end="", flush=True)
                shown = len(text)
            print()
            return
        outputs = llm.generate(requests, params, use_tqdm=not args.json)
        for prompt, output in zip(prompts, outputs, strict=True):
            texts = [choice.text for choice in output.outputs]
            if args.json:
                print(json.dumps({"prompt": prompt, "texts": texts}, ensure_ascii=False))
            else:
                for text in texts:
                    print(f"> {prompt}\n{text}\n")


def _info(args: argparse.Namespace) -> None:
    if args.model:
        _info_model(args.model)
        return
    import torch
    import transformers

    import torch_pd
    from torch_pd import ops

    rows = [
        ("torch_pd", torch_pd.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
        ("CPU", f"{platform.machine()}, ops run with {ops.cpu_isa()}"),
        ("CPU threads", str(torch.get_num_threads())),
        ("CUDA ops", ops.cuda_status()),
    ]
    for name, value in rows:
        print(f"{name:14} {value}")
    for line in _gpus():
        print(line)


def _gpus() -> list[str]:
    """GPUs and NVLink peers through NVML, which needs no CUDA context."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [f"{'GPUs':14} none ({error})"]
    lines = []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for i, handle in enumerate(handles):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            links = [str(j) for j in range(len(handles)) if j != i and _linked(handle, handles[j])]
            lines.append(
                f"GPU {i:<10} {pynvml.nvmlDeviceGetName(handle)}, {memory.total / 2**30:.1f} GiB "
                f"({memory.used / 2**30:.1f} used), sm_{major}{minor}, NVLink to "
                f"{', '.join(links) or 'none'}"
            )
    finally:
        pynvml.nvmlShutdown()
    return lines or [f"{'GPUs':14} none"]


def _linked(a: Any, b: Any) -> bool:
    import pynvml

    try:
        status = pynvml.nvmlDeviceGetP2PStatus(a, b, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError_NotSupported:
        return False
    return status == pynvml.NVML_P2P_STATUS_OK


def _info_model(model: str) -> None:
    """Which path every module of a model takes."""
    import torch
    from transformers import AutoModelForCausalLM

    from torch_pd.nn.patch import patch_model
    from torch_pd.nn.patched import describe
    from torch_pd.weights.loader import describe_reading, load_model, read_config, resolve_format

    path = Path(model).expanduser()
    if resolve_format(path, "auto") == "gguf":
        loaded = load_model(path, dtype="auto", load_format="auto", device="cpu", seed=0)
    else:
        with torch.device("meta"):
            loaded = AutoModelForCausalLM.from_config(read_config(path))
    print(f"weights: {describe_reading(path, loaded)}")
    patch_model(loaded)
    for entry in describe(loaded):
        print(f"{entry.name:32} {entry.path:12} {entry.reason}".rstrip())


def _bench_throughput(args: argparse.Namespace) -> None:
    import random

    from torch_pd.llm import LLM

    for name in ("num_prompts", "input_len", "output_len"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be >= 1, got {getattr(args, name)}")
    with LLM(args.model, **config_from(args)) as llm:
        vocab = llm.limits.vocab_size
        rng = random.Random(0)
        prompts: list[Any] = [
            [
                rng.randrange(10, vocab - 10)
                for _ in range(rng.randint(max(1, args.input_len // 2), args.input_len * 3 // 2))
            ]
            for _ in range(args.num_prompts)
        ]
        params = SamplingParams(
            temperature=0.0, max_tokens=args.output_len, ignore_eos=True, detokenize=False
        )
        llm.generate(prompts[:1], dataclasses.replace(params, max_tokens=2), use_tqdm=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=not args.json)
        seconds = time.perf_counter() - start
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        result = {
            "model": str(args.model),
            "num_prompts": args.num_prompts,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "seconds": round(seconds, 3),
            "output_tokens_per_second": round(output_tokens / seconds, 1),
            "total_tokens_per_second": round((prompt_tokens + output_tokens) / seconds, 1),
            "stats": llm.stats(),
        }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{args.num_prompts} prompts, {prompt_tokens} prompt + {output_tokens} output tokens in "
        f"{seconds:.2f} s: {result['output_tokens_per_second']} output tok/s, "
        f"{result['total_tokens_per_second']} tok/s in all"
    )


def _plan(args: argparse.Namespace) -> None:
    from torch_pd.engine.planner import plan

    found = plan(
        args.model,
        gpus=args.gpus,
        gpu_memory=args.gpu_memory,
        input=args.input,
        output=args.output,
        num_prompts=args.num_prompts,
        **config_from(args),
    )
    print(json.dumps(found.to_dict()) if args.json else found)


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    import torch_pd

    parser = _Parser(prog="torch-pd", description="LLM inference with paged KV and pooled weights")
    parser.add_argument("--version", action="version", version=f"torch-pd {torch_pd.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    generate = commands.add_parser("generate", help="text for prompts")
    generate.add_argument("model", help="model folder or .gguf file")
    generate.add_argument("--prompt", "-p", action="append", metavar="TEXT", help="may be repeated")
    generate.add_argument("--prompt-file", metavar="FILE", help="one prompt a line")
    generate.add_argument("--chat", action="store_true", help="use the model's chat template")
    generate.add_argument("--json", action="store_true", help="one JSON object a prompt")
    _add_sampling_flags(generate)
    add_config_flags(generate)
    generate.set_defaults(run=_generate)

    plan = commands.add_parser("plan", help="memory and speed on GPUs that need not be here")
    plan.add_argument("model", help="model folder; config.json is enough")
    plan.add_argument("--gpus", type=parse_int, default=4, metavar="N")
    plan.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each")
    plan.add_argument(
        "--input", type=parse_int, default=1024, metavar="N", help="mean; uniform within 50%%"
    )
    plan.add_argument("--output", type=parse_int, default=256, metavar="N")
    plan.add_argument("--num-prompts", type=parse_int, metavar="N", help="default 256 a GPU")
    plan.add_argument("--json", action="store_true")
    add_config_flags(plan)
    plan.set_defaults(run=_plan)

    info = commands.add_parser("info", help="versions and hardware, or a model's modules")
    info.add_argument("model", nargs="?", help="model folder or .gguf file")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="measure")
    kinds = bench.add_subparsers(dest="kind", required=True, parser_class=_Parser)
    throughput = kinds.add_parser("throughput", help="offline tokens per second")
    throughput.add_argument("model", help="model folder or .gguf file")
    throughput.add_argument("--num-prompts", type=parse_int, default=64, metavar="N")
    throughput.add_argument(
        "--input-len", type=parse_int, default=128, metavar="N", help="mean; uniform within 50%%"
    )
    throughput.add_argument("--output-len", type=parse_int, default=64, metavar="N")
    throughput.add_argument("--json", action="store_true")
    add_config_flags(throughput)
    throughput.set_defaults(run=_bench_throughput)
    return parser


def _drop_output() -> None:
    """What is left in stdout's buffer goes nowhere, or Python would fail again at exit."""
    if sys.stdout is None:  # it was closed before we began
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
    except OSError as error:
        _drop_output()
        if not isinstance(error, BrokenPipeError):  # such as of `| head`: nothing to tell
            print(f"torch-pd: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, ImportError) as error:
        print(f"torch-pd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except GroupError as error:
        print(f"torch-pd: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("torch-pd: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
