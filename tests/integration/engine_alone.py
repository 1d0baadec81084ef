"""A vLLM engine in a process of its own, given more prompt tokens at once than it takes in a step.

Prints as JSON the responses and log-probabilities of three rounds (one left alone, one in which everything
under way begins anew, one whose requests come by turns), and how much of a prompt each of its samples found
in the cache.
"""

from __future__ import annotations

import json
import sys

from rlhf_dist.engines.settings import RolloutSettings
from rlhf_dist.engines.vllm_engine import PREFILL_TOKENS, VLLMEngine
from rlhf_dist.types import GenerationRequest

PROMPT_TOKENS, CONTEXT_TOKENS, MAX_TOKENS = 100, 256, 8
NUM_REQUESTS = 2 * PREFILL_TOKENS // PROMPT_TOKENS
ANEW_AFTER_STEPS, AT_ONCE = 6, 3


def main(model: str) -> None:
    settings = RolloutSettings(sampling={"max_tokens": MAX_TOKENS, "min_tokens": MAX_TOKENS})
    engine = VLLMEngine(model, settings, context_tokens=CONTEXT_TOKENS, dtype="float32")
    rounds = [generate(engine, settings), generate(engine, settings, anew=True)]
    rounds.append(generate(engine, settings, at_once=AT_ONCE))
    print(json.dumps([*rounds, cached_tokens(engine, settings)]))


def generate(
    engine: VLLMEngine, settings: RolloutSettings, *, anew: bool = False, at_once: int = NUM_REQUESTS
) -> list[tuple[list[int], list[float]]]:
    """The tokens of each request and their log-probabilities.

    Args:
        anew: after some steps all under way is preempted, as by new weights.
        at_once: requests that come before each step.
    """
    engine.forget_prefixes()
    waiting = [request(ordinal) for ordinal in range(NUM_REQUESTS)]
    responses, num_steps = {}, 0
    while waiting or engine.has_unfinished():
        for each in waiting[:at_once]:
            engine.add(each, settings, max_tokens=MAX_TOKENS)
        waiting = waiting[at_once:]
        for completion in engine.step():
            responses[completion.request.ordinal] = completion.tokens, list(completion.logprobs)
        num_steps += 1
        if anew and num_steps == ANEW_AFTER_STEPS:
            engine.forget_prefixes()
    return [responses[ordinal] for ordinal in range(NUM_REQUESTS)]


def cached_tokens(engine: VLLMEngine, settings: RolloutSettings) -> list[int]:
    """Of one prompt that has four samples."""
    engine.forget_prefixes()
    for _ in range(4):
        engine.add(request(0), settings, max_tokens=MAX_TOKENS)
    found = []
    while len(found) < 4:
        found += [output.num_cached_tokens for output in engine._engine.step() if output.finished]
    return found


def request(ordinal: int) -> GenerationRequest:
    prompt = [5 + (7 * ordinal + place) % 200 for place in range(PROMPT_TOKENS)]
    return GenerationRequest(ordinal, 0, 0, seed=ordinal, prompt_tokens=prompt, submitted_at_us=0)


if __name__ == "__main__":
    main(sys.argv[1])
