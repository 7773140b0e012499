"""The peers' functions under their own names, argument order and conventions, over our ops: trl, verl, openrlhf.

Changing an import line swaps the kernel in; importing a module here patches nothing. Where a peer is wrong (NaN on
empty masks, log-probs in bf16, overflows, lost gradients) ours is right, and the docstring says how it differs.
"""
