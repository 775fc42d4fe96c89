"""When the requests of an open loop are due.

    constant:  t_i = i / rate
    Poisson:   t = sort(u_1 ... u_n),  u_i ~ U(0, T) independent,  n = rate T: what many clients that know nothing of
               each other send together. (Given how many there are, the times of a Poisson process are uniform.)

The warmup and the measured window are drawn apart, so that both have exactly the rate that was asked for. The times
are fixed before the first request is sent, so that no answer can move them.
"""

from __future__ import annotations

import numpy as np

from tfopt.serving.loadtest.plan import CONSTANT, Plan


def times(plan: Plan) -> np.ndarray:
    """Returns the times of an open loop, (requests,) float64, in seconds after its start, warmup included."""
    end = plan.warmup_s + plan.duration_s
    if plan.arrivals == CONSTANT:
        due = np.arange(int(np.ceil(plan.rate * end))) / plan.rate
        return due[due < end][: plan.requests]
    random = np.random.default_rng(plan.seed)
    spans = ((0.0, plan.warmup_s), (plan.warmup_s, end))
    drawn = [np.sort(random.uniform(start, stop, round(plan.rate * (stop - start)))) for start, stop in spans]
    return np.concatenate(drawn)[: plan.requests]
