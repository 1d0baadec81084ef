"""PPO as for games, with the very functions that train language models: CartPole-v1.

An iteration plays whole episodes. Each is a row of [B, T] arrays, shorter ones masked, as responses are.
An episode that the time limit cut goes on beyond it, so the value after the cut is part of its return.

    python tests/integration/cartpole.py [SEED]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from rlhf_dist.ops.logprobs import entropy_from_logits, logprobs_from_logits
from rlhf_dist.ops.losses import aggregate, policy_loss, value_loss
from rlhf_dist.ops.masked import masked_whiten
from rlhf_dist.ops.returns import gae

NUM_ITERATIONS = 50
NUM_ENVS, STEPS_PER_ITERATION = 4, 2000
NUM_EPOCHS, MINIBATCH_STEPS = 10, 512
LEARNING_RATE = 1e-3
GAMMA, LAM, CLIP, ENTROPY_COEF = 0.99, 0.95, 0.2, 0.0
HIGHEST_RETURN = 500
NUM_TRIALS, NUM_EVALUATIONS = 20, 100
"""Greedy episodes that must be perfect for training to end, and those that the result is the average of."""


@dataclass
class Episodes:
    """B episodes of at most T steps."""

    states: Tensor  # [B, T, 4]
    actions: Tensor  # [B, T]
    rewards: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    last_states: Tensor  # [B, 4] after the last step
    truncated: Tensor  # [B] bool: cut by the time limit


def mlp(num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, num_outputs)
    )


@torch.no_grad()
def play(
    envs: list[gymnasium.Env], policy: nn.Module, generator: torch.Generator, num_steps: int
) -> Episodes:
    """Whole episodes, side by side, until they have at least `num_steps` steps together."""
    rows: list[tuple[list[np.ndarray], list[int], bool]] = []
    running = [(env, [env.reset()[0]], []) for env in envs]  # its states up to now, and its actions
    num_played = 0
    while running:
        now = torch.from_numpy(np.stack([states[-1] for _, states, _ in running]))
        chosen = torch.multinomial(policy(now).softmax(-1), 1, generator=generator).flatten()
        num_played += len(running)
        go_on = []
        for (env, states, actions), action in zip(running, chosen.tolist(), strict=True):
            state, _, terminated, truncated, _ = env.step(action)
            states.append(state)
            actions.append(action)
            if not (terminated or truncated):
                go_on.append((env, states, actions))
                continue
            rows.append((states, actions, truncated and not terminated))
            if num_played < num_steps:
                go_on.append((env, [env.reset()[0]], []))
        running = go_on
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(actions)) for _, actions, _ in rows], batch_first=True)
    return Episodes(
        states=pad([torch.from_numpy(np.stack(states[:-1])) for states, _, _ in rows], batch_first=True),
        actions=pad([torch.tensor(actions) for _, actions, _ in rows], batch_first=True),
        rewards=mask.clone(),  # CartPole pays 1 a step
        mask=mask,
        last_states=torch.from_numpy(np.stack([states[-1] for states, _, _ in rows])),
        truncated=torch.tensor([cut for _, _, cut in rows]),
    )


def learn(episodes: Episodes, policy: nn.Module, critic: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """PPO's epochs over one iteration's episodes.

    Neighbours in an episode are alike, so a minibatch is of transitions from all over: rows of one step.
    """
    with torch.no_grad():
        old_logprobs = logprobs_from_logits(policy(episodes.states), episodes.actions)
        old_values = critic(episodes.states).squeeze(-1)
        beyond = critic(episodes.last_states).squeeze(-1) * episodes.truncated
        last = episodes.mask.sum(dim=1).long() - 1
        rewards = episodes.rewards.scatter_add(1, last[:, None], GAMMA * beyond[:, None])
        advantages, returns = gae(rewards, old_values, episodes.mask, gamma=GAMMA, lam=LAM)
        advantages = masked_whiten(advantages, episodes.mask)
    per_step = (episodes.states, episodes.actions, old_logprobs, old_values, advantages, returns)
    steps = [each[episodes.mask.bool()].unsqueeze(1) for each in per_step]  # [N, 1, ...]
    parameters = [*policy.parameters(), *critic.parameters()]
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(len(steps[0])).split(MINIBATCH_STEPS):
            states, actions, old_logprobs, old_values, advantages, returns = (each[rows] for each in steps)
            mask = torch.ones_like(returns)  # [n, 1]
            logits, values = policy(states), critic(states).squeeze(-1)
            logprobs = logprobs_from_logits(logits, actions)
            surrogate, _ = policy_loss(
                logprobs, old_logprobs, advantages, mask, clip_low=CLIP, clip_high=CLIP
            )
            error, _ = value_loss(values, old_values, returns, mask)
            bonus = aggregate(entropy_from_logits(logits), mask, kind="token_mean")
            optimizer.zero_grad()
            (surrogate + error - ENTROPY_COEF * bonus).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()


@torch.no_grad()
def greedy_returns(policy: nn.Module, first_seed: int, num_episodes: int) -> list[float]:
    """The return of the greedy policy in each of some new episodes, played side by side."""
    envs = [gymnasium.make("CartPole-v1") for _ in range(num_episodes)]
    states = [env.reset(seed=first_seed + number)[0] for number, env in enumerate(envs)]
    returns = [0.0] * num_episodes
    playing: Sequence[int] = range(num_episodes)
    while playing:
        actions = policy(torch.from_numpy(np.stack([states[i] for i in playing]))).argmax(-1)
        ended = set()
        for i, action in zip(playing, actions.tolist(), strict=True):
            states[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += float(reward)
            if terminated or truncated:
                ended.add(i)
        playing = [i for i in playing if i not in ended]
    return returns


def train(seed: int) -> float:
    """Train from scratch, until the greedy policy is perfect in `NUM_TRIALS` episodes.

    Returns:
        The average return of the greedy policy in `NUM_EVALUATIONS` episodes that no decision was based on.
    """
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    envs = [gymnasium.make("CartPole-v1") for _ in range(NUM_ENVS)]
    for number, env in enumerate(envs):
        env.reset(seed=1000 * seed + number)
    policy, critic = mlp(2), mlp(1)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=LEARNING_RATE, eps=1e-5)
    for iteration in range(NUM_ITERATIONS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / NUM_ITERATIONS)
        learn(play(envs, policy, generator, STEPS_PER_ITERATION), policy, critic, optimizer)
        if min(greedy_returns(policy, 20_000 + 1000 * seed, NUM_TRIALS)) == HIGHEST_RETURN:
            break
    return fmean(greedy_returns(policy, 10_000 + 1000 * seed, NUM_EVALUATIONS))


if __name__ == "__main__":
    print(train(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
