"""The training loop, in the order in which data flows.

        prompts                rollouts               experience              lease
    PromptOrder ──► RolloutPool ──────► ScoringPool ───────► ExperienceQueue ──────► LearnerGroup
    (ordinals)          ▲                                                                │
                        └────────────────── snapshot in shared memory ◄──────────────────┘

`train` reads as the algorithm. Whatever it waits for, the flow goes on meanwhile (`driver.flow`): rollouts
that finish are scored, scored ones go into the queue, and prompts are handed out as far ahead as
`experience.max_staleness` allows. With 0 no prompt is handed out before its own step's weights are served:
synchronous training. What is lost meanwhile is replaced (`driver.recovery`); where that is the learner,
`survive` brings it back to where the step began, and the step is done again.

References and counts pass through here; rollouts, experience and weights go to whoever consumes them. Every
wait below has a deadline in the section `cluster`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from rlhf_dist.cluster.experience_queue import Lease
from rlhf_dist.config import Config
from rlhf_dist.driver.flow import Flow, Roles, policy_digest
from rlhf_dist.driver.recovery import Recovery
from rlhf_dist.driver.resumption import RecordedPolicies
from rlhf_dist.driver.termination import Termination
from rlhf_dist.observability.metrics import Metrics
from rlhf_dist.observability.stopwatch import Stopwatch


def train(
    config: Config,
    roles: Roles,
    flow: Flow,
    recovery: Recovery,
    *,
    first_step: int,
    termination: Termination,
    stopwatch: Stopwatch,
    recorded: RecordedPolicies,
    after_step: Callable[[Metrics], None],
) -> None:
    """Train from `first_step` to the end. The rollout workers already serve policy version `first_step`.

    Raises:
        RunError: a step that is repeated gave another policy than before, and must not.
        TerminatedError: by SIGTERM; the learner is at `recovery.step`.
    """
    survive, cluster = recovery.survive, config.cluster
    began = time.monotonic()
    flow.start()
    for step in range(first_step, config.run.num_steps):
        termination.check()
        with stopwatch.phase("waiting"), termination.interruptible():
            leased = flow.queue.begin(partial(roles.queue.lease, step), timeout_s=flow.lease_timeout_s)
            lease = survive(leased.wait, next_step=step)

        learn = partial(_learn, config, roles, flow, stopwatch, step, lease)
        metrics, digest = survive(learn, next_step=step)
        recorded.check(step, digest)

        with stopwatch.phase("weights"):
            acknowledge = partial(roles.queue.acknowledge, lease, digest)
            acknowledged = flow.queue.begin(acknowledge, timeout_s=cluster.score_timeout_s)
            num_failed = survive(acknowledged.wait, next_step=step + 1)
            recovery.step = step + 1

        seconds = stopwatch.take()
        speed = {
            "tokens_per_s": metrics["num_response_tokens"] / sum(seconds.values()),
            "seconds_since_start": time.monotonic() - began,  # of this process's training
        }
        failed = {"num_failed_prompts": num_failed}
        after_step(flow.metrics(step, lease, seconds) | metrics | failed | speed)
    survive(flow.wait_until_served, next_step=config.run.num_steps)


def _learn(
    config: Config, roles: Roles, flow: Flow, stopwatch: Stopwatch, step: int, lease: Lease
) -> tuple[Metrics, str]:
    """One learner step and the publication of its weights; the step's metrics, and the policy's digest."""
    with stopwatch.phase("learning"):
        temperature = config.rollout.sampling.temperature_at(step, config.run.num_steps)
        metrics = roles.learner.step(flow.events, lease.batches, step, temperature)
    with stopwatch.phase("weights"):
        return metrics, policy_digest(flow.publish(step + 1).manifest)
