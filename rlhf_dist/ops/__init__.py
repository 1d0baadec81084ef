"""Pure tensor maths: no configuration, device, rank or logging; imports torch only.

Shapes, batch first: `B` sequences, `T` response tokens, `V` vocabulary. `mask[b, t]` (bool, integer or
float) is non-zero where the policy chose the token. `logprobs[b, t]` belongs to token t, `values[b, t]`
is the value before it, `rewards[b, t]` arrives after it.

Promises that every function keeps:

* bfloat16 and float16 are computed in float32 and come back as float32; float64 stays float64.
* What sits at a masked position (NaN and infinity included) reaches neither a result nor a gradient, and
  the result there is 0. A masked position inside a response is skipped, as if its neighbours touched.
* A row without a valid token, a batch without one and a batch without rows are all allowed.
* Shapes that do not match raise `ValueError` with the shapes received.
"""

from rlhf_dist.ops import kl, logprobs, losses, masked, returns, trust_region

__all__ = ["kl", "logprobs", "losses", "masked", "returns", "trust_region"]
