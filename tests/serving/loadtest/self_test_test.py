from __future__ import annotations

from tfopt.serving.loadtest import self_test


def test_the_limit_is_measured():
    found = self_test.measure(bytes(100), seconds=0.5, concurrency=8)
    assert found.rate > 50 and 0 < found.cpu_us < 1e5 and found.server_cpu > 0
    assert found.lateness_p99 >= found.lateness_p50 >= 0
    assert "the generator's own limit: " in found.text
