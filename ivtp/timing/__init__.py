"""Latency and throughput: random models of real sizes, alternating runs, and peer methods in the same run."""
