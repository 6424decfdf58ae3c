"""The same under torchrun: every rank runs this script and calls alike; all get all results.

torchrun --standalone --nproc-per-node 2 examples/torchrun.py
"""

from smollm2 import prepare
from torch import distributed

from torch_pd import LLM, SamplingParams

prompts = [f"One thing to know about the number {number} is" for number in range(16)]
with LLM(prepare(), max_model_len=512) as llm:
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16))
    stats = llm.stats()
    if distributed.get_rank() == 0:
        for output in outputs:
            print(repr(output.prompt + output.outputs[0].text))
        for rank, counts in enumerate(stats["ranks"]):
            print(f"rank {rank}: {counts['finished_requests']} requests, {counts['steps']} steps")
