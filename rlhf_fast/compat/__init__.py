"""The functions of TRL, verl and OpenRLHF, with their names, argument order and conventions, computed by our ops.

To use our kernels in a training loop written for one of them, change its import line. Importing these modules patches
nothing. Where the original is wrong (NaN for empty masks, log-probs in bf16, overflows, lost gradients) ours is right,
and the docstring says what differs.
"""
