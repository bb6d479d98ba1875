"""The core: tokens, attention, the four choices of a pruner, and the loop. Imports torch and nothing of the rest.

Dims, here and everywhere: b batch · h heads · g key-value heads · n tokens · m attended to · a referring ·
v visual · k kept · d width · e head width.
"""
