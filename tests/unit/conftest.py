"""What all unit tests share."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")
