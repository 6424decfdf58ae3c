"""The main job in one minute: three questions to SmolLM2-135M-Instruct, streamed.

Runs on a GPU if torch sees one, else on the CPU, through the same engine.
"""

import time

from smollm2 import prepare

from torch_pd import LLM, SamplingParams

QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
]

start = time.perf_counter()
with LLM(prepare(), max_model_len=2048) as llm:
    print(f"ready after {time.perf_counter() - start:.1f} s\n")
    params = SamplingParams(temperature=0.0, max_tokens=96)
    prompts = llm.chat_prompts([[{"role": "user", "content": text}] for text in QUESTIONS])
    # All three run in one batch; each is shown as it grows, one after the other.
    texts = ["" for _ in prompts]
    shown = [0 for _ in prompts]
    done = [False for _ in prompts]
    current = 0
    print(f"> {QUESTIONS[0]}")
    start = time.perf_counter()
    for output in llm.stream(prompts, params):
        index = int(output.request_id.rsplit("-", 1)[1])
        texts[index], done[index] = output.outputs[0].text, output.finished
        while current < len(prompts):
            print(texts[current][shown[current] :], end="", flush=True)
            shown[current] = len(texts[current])
            if not done[current]:
                break
            current += 1
            if current < len(prompts):
                print(f"\n\n> {QUESTIONS[current]}")
    seconds = time.perf_counter() - start
    stats = llm.stats()
    print(
        f"\n\n{stats['prompt_tokens']} prompt + {stats['output_tokens']} output tokens in "
        f"{seconds:.1f} s: {stats['output_tokens'] / seconds:.0f} output tok/s"
    )
    print(llm.engine.memory_line())
