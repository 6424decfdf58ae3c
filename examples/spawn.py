"""Many prompts on several ranks, started by this script: LLM(..., data_parallel_size=N).

Each rank is a process with an engine of its own (a GPU each, or a share of the CPU's cores). They
take prompts from one queue, so none idles while there is work. No ``__main__`` guard is needed.

    python examples/spawn.py [RANKS]
"""

import sys

from smollm2 import prepare

from torch_pd import LLM, SamplingParams

ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
prompts = [f"One thing to know about the number {number} is" for number in range(16)]
with LLM(prepare(), data_parallel_size=ranks, max_model_len=512) as llm:
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16))
    for output in outputs:
        print(repr(output.prompt + output.outputs[0].text))
    for rank, stats in enumerate(llm.stats()["ranks"]):
        print(f"rank {rank}: {stats['finished_requests']} requests, {stats['steps']} steps")
