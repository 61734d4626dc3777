"""Claim: the demo's ResNet-20 becomes at least 6× smaller and 5× faster than in torch, at most one point worse at 95 %."""

import sys

from common import Bars, report

from tinier.demo.run import demo

if __name__ == "__main__":
    with Bars() as bars:
        result = demo(out=None, progress=bars)
    report("demo", "at most 1 point of accuracy, 3 minutes", result)
    torch = next(c for c in result.table if c.original and c.target == "torch")
    best = result.best
    assert best is not None and best.latency and torch.latency and best.size and torch.size
    kept = (
        result.met
        and torch.size / best.size >= 6
        and torch.latency.median / best.latency.median >= 5
        and best.certificate is not None
        and bool(best.certificate.holds)
    )
    print("claim holds" if kept else "CLAIM FAILS")
    sys.exit(0 if kept else 1)
