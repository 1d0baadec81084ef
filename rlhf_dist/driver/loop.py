"""The training loop, in the order in which data flows.

        prompts                rollouts               experience              lease
    PromptOrder ──► RolloutPool ──────► ScoringPool ───────► ExperienceQueue ──────► LearnerGroup
    (ordinals)          ▲                                                                │
                        └────────── snapshot: manifest by hand, bytes by reference ◄─────┘

References and counts pass through here; rollouts, experience and weights go from the object store to
whoever consumes them. Every wait below has a deadline in the section `cluster`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_dist.cluster.experience_queue import QueueClient
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.cluster.scoring_pool import ScoringPool
from rlhf_dist.config import Config
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.observability.metrics import Metrics
from rlhf_dist.observability.stopwatch import Stopwatch
from rlhf_dist.types import ServedVersion


@dataclass(frozen=True)
class Roles:
    """The workers of a run."""

    rollout: RolloutPool
    scoring: ScoringPool
    queue: QueueClient
    learner: LearnerGroup


def train(
    config: Config,
    roles: Roles,
    order: PromptOrder,
    probe_tokens: tuple[int, ...],
    *,
    first_step: int,
    stopwatch: Stopwatch,
    after_step: Callable[[Metrics], None],
) -> None:
    """Train from `first_step` to the end. The rollout workers already serve policy version `first_step`.

    A step consumes `prompts_per_step` ordinals and waits for all their responses to be scored; the
    learner then trains on them, and its new weights unblock the next step's generation once every
    rollout worker has proved that it serves them.
    """
    prompts_per_step = config.rollout.prompts_per_step
    for step in range(first_step, config.run.num_steps):
        temperature = config.rollout.sampling.temperature_at(step, config.run.num_steps)
        ordinals = range(step * prompts_per_step, (step + 1) * prompts_per_step)
        prompts = list(zip(ordinals, order.rows_of(ordinals), strict=True))

        rollouts = stopwatch.timed("rollout", roles.rollout.generate(prompts, temperature))
        for batch, info in stopwatch.timed("scoring", roles.scoring.score(rollouts, temperature)):
            roles.queue.put(batch, info)

        with stopwatch.phase("learning"):
            lease = roles.queue.lease(prompts_per_step * config.rollout.samples_per_prompt)
            metrics = roles.learner.step(lease.batches, step, temperature)
            roles.queue.acknowledge(lease)

        with stopwatch.phase("weights"):
            served = publish(roles, step + 1, probe_tokens)

        after_step(_with_system_metrics(metrics, step, temperature, served, stopwatch.take()))


def publish(roles: Roles, version: int, probe_tokens: tuple[int, ...]) -> list[ServedVersion]:
    """Bring the learner's weights to every rollout worker; returns their proofs.

    Raises:
        WeightsError: a worker could not prove that it serves them.
    """
    manifest, payload = roles.learner.publish(version, probe_tokens)
    return roles.rollout.load_weights(manifest, payload)


def _with_system_metrics(
    metrics: Metrics, step: int, temperature: float, served: list[ServedVersion], seconds: dict[str, float]
) -> Metrics:
    total = sum(seconds.values())
    return (
        {"step": step, "policy_version": served[0].version, "temperature": temperature}
        | metrics
        | {
            "probe_difference_max": max(proof.max_abs_difference for proof in served),
            "tokens_per_s": metrics["num_response_tokens"] / total,
            "seconds_step": total,
        }
        | {f"seconds_{phase}": duration for phase, duration in seconds.items()}
    )
