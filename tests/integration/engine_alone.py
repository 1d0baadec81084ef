"""A vLLM engine in a process of its own, given more prompt tokens at once than it takes in a step.

Prints the responses of two rounds as JSON: one left alone, one in which everything under way begins anew.
"""

from __future__ import annotations

import json
import sys

from rlhf_dist.engines.settings import RolloutSettings
from rlhf_dist.engines.vllm_engine import PREFILL_TOKENS, VLLMEngine
from rlhf_dist.types import GenerationRequest

PROMPT_TOKENS, CONTEXT_TOKENS, MAX_TOKENS = 100, 256, 8
NUM_REQUESTS = 2 * PREFILL_TOKENS // PROMPT_TOKENS
ANEW_AFTER_STEPS = 6


def main(model: str) -> None:
    settings = RolloutSettings(sampling={"max_tokens": MAX_TOKENS, "min_tokens": MAX_TOKENS})
    engine = VLLMEngine(model, settings, context_tokens=CONTEXT_TOKENS, dtype="float32")
    print(json.dumps([generate(engine, settings, anew=anew) for anew in (False, True)]))


def generate(engine: VLLMEngine, settings: RolloutSettings, *, anew: bool) -> list[list[int]]:
    """The tokens of each request. `anew`: after some steps all under way is preempted, as by new weights."""
    engine.forget_prefixes()
    for ordinal in range(NUM_REQUESTS):
        prompt = [5 + (7 * ordinal + place) % 200 for place in range(PROMPT_TOKENS)]
        request = GenerationRequest(ordinal, 0, 0, seed=ordinal, prompt_tokens=prompt, submitted_at_us=0)
        engine.add(request, settings, max_tokens=MAX_TOKENS)
    tokens, num_steps = {}, 0
    while engine.has_unfinished():
        for completion in engine.step():
            tokens[completion.request.ordinal] = completion.tokens
        num_steps += 1
        if anew and num_steps == ANEW_AFTER_STEPS:
            engine.forget_prefixes()
    return [tokens[ordinal] for ordinal in range(NUM_REQUESTS)]


if __name__ == "__main__":
    main(sys.argv[1])
