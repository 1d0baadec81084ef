"""A run from configuration to trained policy: prepare, supervise, start the roles, train, export, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import ray
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from rlhf_dist.cluster.experience_queue import QueueClient
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.placement import RoleShare, check_fits
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.cluster.scoring_pool import ScoringPool
from rlhf_dist.cluster.session import cpus_of_smallest_node, ray_session
from rlhf_dist.config import Config, to_yaml
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.driver.export import export_adapters, export_policy
from rlhf_dist.driver.flow import Flow, Roles
from rlhf_dist.driver.loop import train
from rlhf_dist.driver.preparation import (
    Models,
    Prepared,
    check_outside,
    check_sources,
    initial_policy,
    prepare,
    role_models,
    shares,
)
from rlhf_dist.driver.recovery import Recovery
from rlhf_dist.driver.resumption import (
    RecordedPolicies,
    change_notes,
    check_prompts,
    check_settings,
    recorded_policies,
    write_fingerprint,
)
from rlhf_dist.driver.run_folder import IfExists, RunFolder, trial_folder, write_atomically, write_json
from rlhf_dist.driver.starting_point import StartingPoint, starting_point
from rlhf_dist.driver.step_records import StepRecords
from rlhf_dist.driver.supervised import supervised_stage
from rlhf_dist.driver.termination import Termination
from rlhf_dist.engines.loading import torch_dtype, vocabulary_size
from rlhf_dist.errors import TerminatedError
from rlhf_dist.observability.metrics import read_metrics
from rlhf_dist.observability.progress import Progress
from rlhf_dist.observability.report import print_report
from rlhf_dist.observability.run_events import RunEvents
from rlhf_dist.observability.stopwatch import Stopwatch
from rlhf_dist.weights.certificate import TOLERANCE_NATS, probe_tokens


def run(config: Config, *, address: str | None, if_exists: IfExists, console: Console, verbose: bool) -> None:
    """Do the whole job. What is left is in the run folder; no process is.

    Raises:
        RunError: with one clear message.
    """
    started = time.monotonic()
    disable_progress_bar()
    folder = RunFolder(config.run.dir.absolute())
    with folder.owned(if_exists), Progress(console, num_steps=config.run.num_steps) as progress:
        progress.phase("checking models and data")
        resuming = if_exists == "resume" and folder.can_be_resumed()
        if not resuming:
            check_outside(config, folder.root)
            check_sources(config)
        changes = check_settings(folder, config) if resuming else []
        start = starting_point(folder, config) if resuming else StartingPoint()
        for note in [*change_notes(changes), *start.notes]:
            progress.say(note)
        with trial_folder(folder.root) as trial:
            made = folder.initial_policy if resuming else trial / "policy"
            prepared = prepare(config, initial_policy(config, made))
        if resuming:
            check_prompts(folder, config, prepared.prompts)
        if prepared.prompts.num_skipped:
            progress.say(f"prompts over the limit, left out: {prepared.prompts.num_skipped}")
        progress.phase("starting Ray")
        with ray_session(address, verbose=verbose):
            placed = shares(config, node_cpus=cpus_of_smallest_node())
            check_fits(list(placed.values()), ray.cluster_resources())
            if not resuming:
                folder.clear()
            write_atomically(folder.config, to_yaml(config))
            write_fingerprint(folder, prepared.prompts)
            policy = initial_policy(config, folder.initial_policy)
            if config.sft is not None:
                if not folder.sft_policy.exists():
                    progress.phase("supervised stage")
                    supervised_stage(
                        config,
                        config.sft,
                        model=policy,
                        folder=folder.sft_policy,
                        share=placed["learner"],
                        progress=progress,
                    )
                policy = str(folder.sft_policy)
            models = role_models(config, policy)
            recorded = recorded_policies(folder, config, start.first_step, changes, progress.say)
            _reinforce(config, folder, prepared, models, placed, start, recorded, progress, resuming=resuming)
    print_report(
        console,
        read_metrics(folder.metrics),
        _answers(folder),
        policy_folder=folder.policy,
        seconds=time.monotonic() - started,
    )


def _reinforce(
    config: Config,
    folder: RunFolder,
    prepared: Prepared,
    models: Models,
    placed: dict[str, RoleShare],
    start: StartingPoint,
    recorded: RecordedPolicies,
    progress: Progress,
    *,
    resuming: bool,
) -> None:
    """Start the roles, train, and export the policy with its tokenizer."""
    prompts = prepared.prompts
    order = PromptOrder(len(prompts), config.run.seed, config.data.shuffle)
    probe = probe_tokens(vocabulary_size(models.policy), prepared.context_tokens)
    stopwatch = Stopwatch(progress.phase)
    events_log = RunEvents(folder.events, progress.say)
    termination = Termination(grace_period_s=config.recovery.grace_period_s)
    progress.phase("starting workers")
    counts = ", ".join(f"{share.num_workers} {role}" for role, share in placed.items())
    progress.say(f"starting workers: {counts}")
    first_step = start.first_step
    with _roles(config, folder, prepared, models, placed, order, first_step) as roles:
        flow = Flow(config, roles, order, probe)
        recovery = Recovery(config, folder, models, roles, flow, events_log)
        recovery.start(first_step)
        if resuming:
            events_log.resumed(first_step, recorded_steps=len(recorded))
        recovery.survive(partial(flow.publish, first_step), next_step=first_step)
        recovery.survive(flow.wait_until_served, next_step=first_step)
        rows = _sample_rows(len(prompts), _num_sample_answers(config, folder, first_step))
        if first_step == 0:
            texts = [prompts.table["prompt"][row].as_py() for row in rows]
            before = recovery.survive(partial(flow.answers, rows), next_step=0)
            write_json(folder.answers, {"prompts": texts, "before": before})
        records = StepRecords(
            config, folder, roles, flow, recovery, stopwatch, progress, first_step=first_step
        )
        stopwatch.take()
        flow.events.on_turn = termination.check_if_interruptible
        with termination.handled():
            try:
                train(
                    config,
                    roles,
                    flow,
                    recovery,
                    first_step=first_step,
                    termination=termination,
                    stopwatch=stopwatch,
                    recorded=recorded,
                    after_step=records.step_done,
                )
            except TerminatedError as told:
                raise records.last_checkpoint(events_log) from told
        num_steps = config.run.num_steps
        progress.phase("exporting the policy")
        recovery.survive(partial(_export, config, folder, models, roles, flow), next_step=num_steps)
        after = recovery.survive(partial(flow.answers, rows), next_step=num_steps)
        write_json(folder.answers, folder.read_answers() | {"after": after})


def _export(config: Config, folder: RunFolder, models: Models, roles: Roles, flow: Flow) -> None:
    export_policy(roles.learner, flow.events, folder.policy, tokenizer_of=models.policy)
    if config.learner.lora is not None:
        export_adapters(roles.learner, flow.events, folder.policy_adapter)


@contextmanager
def _roles(
    config: Config,
    folder: RunFolder,
    prepared: Prepared,
    models: Models,
    placed: dict[str, RoleShare],
    order: PromptOrder,
    first_step: int,
) -> Iterator[Roles]:
    """All roles' actors, killed when the block ends; `Recovery.start` has them load."""
    cluster = config.cluster
    engine_dtype = torch_dtype(config.rollout.dtype, on_gpu=config.rollout.gpus_per_worker > 0)
    dtype_name = str(engine_dtype).removeprefix("torch.")
    roles: list[Any] = []
    try:
        rollout = RolloutPool(
            config.rollout,
            placed["rollout"],
            cluster,
            prepared.prompts.table,
            model=models.policy,
            dtype=dtype_name,
            context_tokens=prepared.context_tokens,
            probe_tolerance_nats=config.weights.probe_tolerance_nats or TOLERANCE_NATS[dtype_name],
            seed=config.run.seed,
            deterministic=config.run.deterministic,
            transport=config.weights.transport,
        )
        roles.append(rollout)
        scoring = ScoringPool(
            config.scoring,
            placed["scoring"],
            cluster,
            config.reward,
            reference_model=models.reference,
            policy_model=models.policy,
            journal=folder.journal,
            segment_bytes=config.experience.journal.segment_bytes,
        )
        roles.append(scoring)
        learner = LearnerGroup(placed["learner"], cluster)
        roles.append(learner)
        queue = QueueClient(
            config.experience,
            folder.journal,
            first_step=first_step,
            num_steps=config.run.num_steps,
            prompts_per_step=config.rollout.prompts_per_step,
            samples_per_prompt=config.rollout.samples_per_prompt,
            in_order=config.run.deterministic or config.experience.max_staleness == 0,
            prompts=rollout.prompts,
            order=order,
        )
        roles.append(queue)
        yield Roles(rollout, scoring, queue, learner)
    finally:
        for role in roles:
            role.end()


def _num_sample_answers(config: Config, folder: RunFolder, first_step: int) -> int:
    """Prompts that are answered after training: once it has begun, those that were answered before it."""
    if first_step == 0:
        return config.run.num_sample_answers
    return len(folder.read_answers()["prompts"])


def _sample_rows(num_rows: int, count: int) -> list[int]:
    """Rows spread evenly over the data set."""
    return sorted({int(row) for row in np.linspace(0, num_rows - 1, num=min(count, num_rows))})


def _answers(folder: RunFolder) -> list[tuple[str, str, str]]:
    answers = folder.read_answers()
    return list(zip(answers["prompts"], answers["before"], answers["after"], strict=True))
