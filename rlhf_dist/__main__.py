"""`python -m rlhf_dist` is `rlhf-dist`."""

from rlhf_dist.cli import main

main()
