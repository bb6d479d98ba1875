"""Helpers of the tests: tiny models, oracles, servers, ways to run a command."""
