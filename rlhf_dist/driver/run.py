"""A run from configuration to trained policy: prepare, supervise, start the roles, train, export, report."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from rlhf_dist.cluster.calls import wait_for_all
from rlhf_dist.cluster.experience_queue import QueueClient
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.placement import RoleShare, check_fits
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.cluster.scoring_pool import ScoringPool
from rlhf_dist.cluster.session import cpus_of_smallest_node, ray_session
from rlhf_dist.config import Config, to_yaml
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.driver.checkpoint import RunState, list_checkpoints, read_state, save_checkpoint
from rlhf_dist.driver.export import export_policy
from rlhf_dist.driver.loop import Roles, publish, train
from rlhf_dist.driver.preparation import (
    Models,
    Prepared,
    check_outside,
    initial_policy,
    prepare,
    role_models,
    shares,
)
from rlhf_dist.driver.run_folder import IfExists, RunFolder, write_atomically, write_json
from rlhf_dist.driver.supervised import supervised_stage
from rlhf_dist.engines.loading import torch_dtype, vocabulary_size
from rlhf_dist.observability.metrics import Metrics, MetricsLog, read_metrics
from rlhf_dist.observability.progress import Progress
from rlhf_dist.observability.report import print_report
from rlhf_dist.observability.stopwatch import Stopwatch
from rlhf_dist.weights.certificate import TOLERANCE_NATS, probe_tokens

GIB = 1024**3


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
        resuming = if_exists == "resume" and folder.holds_run()
        if not resuming:
            check_outside(config, folder.root)
        _check_checkpoint(config, folder, resuming)
        with tempfile.TemporaryDirectory(dir=folder.root, prefix=".trial-") as trial:
            made = folder.initial_policy if resuming else Path(trial) / "policy"
            prepared = prepare(config, initial_policy(config, made))
        if prepared.prompts.num_skipped:
            progress.say(f"prompts over the limit, left out: {prepared.prompts.num_skipped}")
        progress.phase("starting Ray")
        with ray_session(address, verbose=verbose):
            placed = shares(config, node_cpus=cpus_of_smallest_node())
            check_fits(list(placed.values()), ray.cluster_resources())
            if not resuming:
                folder.clear()
            write_atomically(folder.config, to_yaml(config))
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
            _reinforce(config, folder, prepared, role_models(config, policy), placed, progress)
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
    progress: Progress,
) -> None:
    """Start the roles, train, and export the policy with its tokenizer."""
    prompts = prepared.prompts
    order = PromptOrder(len(prompts), config.run.seed, config.data.shuffle)
    probe = probe_tokens(vocabulary_size(models.policy), prepared.context_tokens)
    stopwatch = Stopwatch(progress.phase)
    progress.phase("starting workers")
    counts = ", ".join(f"{share.num_workers} {role}" for role, share in placed.items())
    progress.say(f"starting workers: {counts}")
    with _roles(config, prepared, models, placed) as roles:
        first_step = _restore(config, folder, roles)
        publish(roles, first_step, probe)
        rows = _sample_rows(len(prompts), config.run.num_sample_answers)
        if first_step == 0:
            texts = [prompts.table["prompt"][row].as_py() for row in rows]
            write_json(
                folder.answers,
                {"prompts": texts, "before": roles.rollout.answer(rows)},
            )
        log = MetricsLog(folder.metrics, first_step=first_step)

        def after_step(metrics: Metrics) -> None:
            log.append(metrics)
            progress.step_done(metrics)
            next_step = metrics["step"] + 1
            if next_step % config.checkpoint.every_steps == 0 or next_step == config.run.num_steps:
                with stopwatch.phase("checkpoint"):
                    state = RunState(next_step, config.learner.num_workers, config.learner.zero_stage)
                    save_checkpoint(
                        folder.checkpoints, roles.learner, state, keep_last=config.checkpoint.keep_last
                    )

        stopwatch.take()
        train(config, roles, order, probe, first_step=first_step, stopwatch=stopwatch, after_step=after_step)
        progress.phase("exporting the policy")
        export_policy(roles.learner, folder.policy, tokenizer_of=models.policy)
        answers = json.loads(folder.answers.read_text(encoding="utf-8"))
        write_json(folder.answers, answers | {"after": roles.rollout.answer(rows)})


@contextmanager
def _roles(
    config: Config, prepared: Prepared, models: Models, placed: dict[str, RoleShare]
) -> Iterator[Roles]:
    """All workers, started side by side and ready; killed when the block ends."""
    cluster = config.cluster
    engine_dtype = torch_dtype(config.rollout.dtype, on_gpu=config.rollout.gpus_per_worker > 0)
    dtype_name = str(engine_dtype).removeprefix("torch.")
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
    )
    scoring = ScoringPool(
        config.scoring,
        placed["scoring"],
        cluster,
        config.reward,
        reference_model=models.reference,
        policy_model=models.policy,
    )
    learner = LearnerGroup(placed["learner"], cluster)
    queue = QueueClient(
        max_samples=config.experience.max_samples,
        max_bytes=int(config.experience.max_gib * GIB),
        timeout_s=cluster.score_timeout_s,
    )
    roles = Roles(rollout, scoring, queue, learner)
    try:
        started = rollout.start() + scoring.start()
        started += learner.start(
            config.learner,
            config.algorithm,
            policy_model=models.policy,
            value_model=models.value,
            num_steps=config.run.num_steps,
            seed=config.run.seed,
        )
        wait_for_all(started, cluster.start_timeout_s)
        yield roles
    finally:
        for role in (rollout, scoring, queue, learner):
            role.end()


def _check_checkpoint(config: Config, folder: RunFolder, resuming: bool) -> None:
    """Refuse a checkpoint of another shape before anything starts."""
    checkpoints = list_checkpoints(folder.checkpoints) if resuming else []
    if checkpoints:
        _read_state(config, checkpoints[-1])


def _restore(config: Config, folder: RunFolder, roles: Roles) -> int:
    """Load the newest checkpoint, if there is one; returns the step to go on with."""
    checkpoints = list_checkpoints(folder.checkpoints)
    if not checkpoints:
        return 0
    roles.learner.load(checkpoints[-1])
    return _read_state(config, checkpoints[-1]).next_step


def _read_state(config: Config, checkpoint: Path) -> RunState:
    return read_state(checkpoint, num_ranks=config.learner.num_workers, zero_stage=config.learner.zero_stage)


def _sample_rows(num_rows: int, count: int) -> list[int]:
    """Rows spread evenly over the data set."""
    return sorted({int(row) for row in np.linspace(0, num_rows - 1, num=min(count, num_rows))})


def _answers(folder: RunFolder) -> list[tuple[str, str, str]]:
    answers = json.loads(folder.answers.read_text(encoding="utf-8"))
    return list(zip(answers["prompts"], answers["before"], answers["after"], strict=True))
