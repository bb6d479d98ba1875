"""Hooks into frozen modules: read q, k, v of an attention, replace a forward within a context, pack weights."""
