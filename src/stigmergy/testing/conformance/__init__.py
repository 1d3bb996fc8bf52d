"""The conformance suite: what every store must do, whatever keeps it, in both colours."""

from __future__ import annotations

from stigmergy.testing.conformance.suite import StoreConformance

__all__ = ["StoreConformance"]
