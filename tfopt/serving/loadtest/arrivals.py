"""When the requests of an open loop are due.

    constant:  t_i = i / rate
    Poisson:   t_i = t_(i-1) + e_i,   e_i ~ Exp(rate), independent: what many clients that know nothing of each
               other send together

The times are fixed before the first request is sent, so that no answer can move them.
"""

from __future__ import annotations

import numpy as np

from tfopt.serving.loadtest.plan import CONSTANT, Plan


def times(plan: Plan) -> np.ndarray:
    """Returns the times of an open loop, (requests,) float64, in seconds after its start, warmup included."""
    end = plan.warmup_s + plan.duration_s
    count = int(np.ceil(plan.rate * end))
    if plan.arrivals == CONSTANT:
        due = np.arange(count) / plan.rate
    else:
        random = np.random.default_rng(plan.seed)
        gaps = random.exponential(1 / plan.rate, count + int(6 * np.sqrt(count)) + 10)
        due = np.cumsum(gaps)
    return due[due < end][: plan.requests]
