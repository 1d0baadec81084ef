"""PPO as for games, with the very functions that train language models: CartPole-v1.

An iteration plays whole episodes. Each is a row of [B, T] arrays, shorter ones masked, as responses are.
An episode that the time limit cut goes on beyond it, so the value after the cut is part of its return.

    python tests/integration/cartpole.py [SEED]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from rlhf_dist.ops.logprobs import entropy_from_logits, logprobs_from_logits
from rlhf_dist.ops.losses import aggregate, policy_loss, value_loss
from rlhf_dist.ops.masked import masked_whiten
from rlhf_dist.ops.returns import gae

NUM_ITERATIONS = 50
STEPS_PER_ITERATION = 2048
NUM_EPOCHS, NUM_MINIBATCHES = 10, 4
LEARNING_RATE = 1e-3
GAMMA, LAM, CLIP, ENTROPY_COEF = 0.99, 0.95, 0.2, 0.0


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
def play(env: gymnasium.Env, policy: nn.Module, generator: torch.Generator, num_steps: int) -> Episodes:
    """Whole episodes until they have at least `num_steps` steps together."""
    rows: list[tuple[list[np.ndarray], list[int], np.ndarray, bool]] = []
    played = 0
    while played < num_steps:
        state, _ = env.reset()
        states, actions, done = [], [], False
        while not done:
            probabilities = policy(torch.from_numpy(state)).softmax(-1)
            action = int(torch.multinomial(probabilities, 1, generator=generator))
            states.append(state)
            actions.append(action)
            state, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        rows.append((states, actions, state, truncated and not terminated))
        played += len(actions)
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(actions)) for _, actions, _, _ in rows], batch_first=True)
    return Episodes(
        states=pad([torch.from_numpy(np.stack(states)) for states, _, _, _ in rows], batch_first=True),
        actions=pad([torch.tensor(actions) for _, actions, _, _ in rows], batch_first=True),
        rewards=mask.clone(),  # CartPole pays 1 a step
        mask=mask,
        last_states=torch.from_numpy(np.stack([last for _, _, last, _ in rows])),
        truncated=torch.tensor([cut for _, _, _, cut in rows]),
    )


def learn(episodes: Episodes, policy: nn.Module, critic: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """PPO's epochs over one iteration's episodes."""
    with torch.no_grad():
        old_logprobs = logprobs_from_logits(policy(episodes.states), episodes.actions)
        old_values = critic(episodes.states).squeeze(-1)
        beyond = critic(episodes.last_states).squeeze(-1) * episodes.truncated
        last = episodes.mask.sum(dim=1).long() - 1
        rewards = episodes.rewards.scatter_add(1, last[:, None], GAMMA * beyond[:, None])
        advantages, returns = gae(rewards, old_values, episodes.mask, gamma=GAMMA, lam=LAM)
        advantages = masked_whiten(advantages, episodes.mask)
    num_rows = len(last)
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(num_rows).chunk(min(NUM_MINIBATCHES, num_rows)):
            logits, values = policy(episodes.states[rows]), critic(episodes.states[rows]).squeeze(-1)
            mask = episodes.mask[rows]
            logprobs = logprobs_from_logits(logits, episodes.actions[rows])
            surrogate, _ = policy_loss(
                logprobs, old_logprobs[rows], advantages[rows], mask, clip_low=CLIP, clip_high=CLIP
            )
            error, _ = value_loss(values, old_values[rows], returns[rows], mask)
            bonus = aggregate(entropy_from_logits(logits), mask, kind="token_mean")
            optimizer.zero_grad()
            (surrogate + error - ENTROPY_COEF * bonus).backward()
            nn.utils.clip_grad_norm_([*policy.parameters(), *critic.parameters()], 0.5)
            optimizer.step()


def average_return(policy: nn.Module, seed: int, num_episodes: int = 20) -> float:
    """Mean return of the greedy policy over new episodes."""
    env = gymnasium.make("CartPole-v1")
    returns = []
    for episode in range(num_episodes):
        state, _ = env.reset(seed=10_000 + 100 * seed + episode)
        total, done = 0.0, False
        while not done:
            with torch.no_grad():
                action = int(policy(torch.from_numpy(state)).argmax())
            state, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return sum(returns) / num_episodes


def train(seed: int) -> float:
    """Train from scratch; returns the average return of the result."""
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=seed)
    policy, critic = mlp(2), mlp(1)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=LEARNING_RATE, eps=1e-5)
    for iteration in range(NUM_ITERATIONS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / NUM_ITERATIONS)
        learn(play(env, policy, generator, STEPS_PER_ITERATION), policy, critic, optimizer)
    return average_return(policy, seed)


if __name__ == "__main__":
    print(train(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
