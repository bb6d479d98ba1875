"""Honest timing: random models of real sizes, alternating runs, and what others do beside them in the same run."""
