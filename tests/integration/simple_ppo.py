"""A second PPO, written for comparison: one process, plain torch, one sample at a time, no padding.

It shares no code with the package. Equations: Schulman et al. 2017 (eq. 7), 2016 (eq. 16); the KL to the
reference is taken off each token's reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM


@dataclass
class Sample:
    prompt: list[int]
    response: list[int]
    chosen: list[int]
    """Places in the response of the C tokens that the policy chose."""
    ref_logprobs: list[float]
    """A number a response token."""
    reward: float


def reference(sample):
    """(C,) log-probabilities of the chosen tokens under the reference policy."""
    return torch.tensor(sample.ref_logprobs)[sample.chosen]


class SimplePPO:
    def __init__(self, folder, *, lr, value_lr, eps, gamma, lam, kl_coef, clip, value_clip, num_epochs):
        self.policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.critic = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.head = nn.Linear(self.critic.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.value_parameters = [*self.critic.parameters(), *self.head.parameters()]
        adam = {"betas": (0.9, 0.95), "eps": eps, "weight_decay": 0.0}
        self.policy_optimizer = torch.optim.AdamW(self.policy.parameters(), lr=lr, **adam)
        self.value_optimizer = torch.optim.AdamW(self.value_parameters, lr=value_lr, **adam)
        self.gamma, self.lam, self.kl_coef = gamma, lam, kl_coef
        self.clip, self.value_clip, self.num_epochs = clip, value_clip, num_epochs

    def log_probabilities(self, sample):
        """(C,) of the chosen tokens."""
        logits = self.policy(torch.tensor([sample.prompt + sample.response])).logits[0]
        rows = torch.log_softmax(logits[len(sample.prompt) - 1 : -1], dim=-1)
        return rows[sample.chosen, torch.tensor(sample.response)[sample.chosen]]

    def values(self, sample):
        """(C,) before each chosen token."""
        hidden = self.critic(torch.tensor([sample.prompt + sample.response])).last_hidden_state[0]
        return self.head(hidden[len(sample.prompt) - 1 : -1]).squeeze(-1)[sample.chosen]

    def advantages(self, sample, logprobs, values):
        """(C,) by the recursion, from the last chosen token backwards, as if there were no others."""
        refs = reference(sample)
        rewards = [-self.kl_coef * float(lp - ref) for lp, ref in zip(logprobs, refs, strict=True)]
        if rewards:
            rewards[-1] += sample.reward
        advantages = [0.0] * len(rewards)
        following, next_value = 0.0, 0.0
        for t in reversed(range(len(rewards))):
            delta = rewards[t] + self.gamma * next_value - float(values[t])
            following = delta + self.gamma * self.lam * following
            advantages[t], next_value = following, float(values[t])
        return torch.tensor(advantages)

    def step(self, samples):
        """All epochs on a batch; returns the metrics of the step."""
        with torch.no_grad():
            old = [self.log_probabilities(sample) for sample in samples]
            old_values = [self.values(sample) for sample in samples]
        advantages = [self.advantages(*each) for each in zip(samples, old, old_values, strict=True)]
        returns = [a + v for a, v in zip(advantages, old_values, strict=True)]
        everything = torch.cat(advantages)
        mean, deviation = everything.mean(), (everything.var(unbiased=True) + 1e-8).sqrt()
        advantages = [(a - mean) / deviation for a in advantages]
        num_tokens = len(everything)
        policy_losses, value_losses, kls, policy_norms, value_norms = [], [], [], [], []
        for _ in range(self.num_epochs):
            policy_loss = value_loss = kl = 0.0
            for i, sample in enumerate(samples):
                logprobs, values = self.log_probabilities(sample), self.values(sample)
                ratio = (logprobs - old[i]).exp()
                clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
                surrogate = torch.minimum(ratio * advantages[i], clipped * advantages[i])
                policy_loss = policy_loss - surrogate.sum() / num_tokens
                near = old_values[i] + (values - old_values[i]).clamp(-self.value_clip, self.value_clip)
                errors = torch.maximum((values - returns[i]) ** 2, (near - returns[i]) ** 2)
                value_loss = value_loss + 0.5 * errors.sum() / num_tokens
                kl = kl + float((old[i] - logprobs.detach()).sum()) / num_tokens
            policy_norms.append(
                self._update(self.policy_optimizer, list(self.policy.parameters()), policy_loss)
            )
            value_norms.append(self._update(self.value_optimizer, self.value_parameters, value_loss))
            policy_losses.append(float(policy_loss.detach()))
            value_losses.append(float(value_loss.detach()))
            kls.append(kl)
        ref = torch.cat([reference(sample) for sample in samples])
        return {
            "policy_loss": sum(policy_losses) / self.num_epochs,
            "value_loss": sum(value_losses) / self.num_epochs,
            "policy_approx_kl": sum(kls) / self.num_epochs,
            "kl_ref_response": float((torch.cat(old) - ref).sum()) / len(samples),
            "advantage_std": float(everything.std(unbiased=False)),
            "return_mean": float(torch.cat(returns).mean()),
            "value_mean": float(torch.cat(old_values).mean()),
            "policy_grad_norm": sum(policy_norms) / self.num_epochs,
            "value_grad_norm": sum(value_norms) / self.num_epochs,
        }

    @staticmethod
    def _update(optimizer, parameters, loss):
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(norm)
