"""The quickstart: all four stages on a task that the package makes itself and whose truth is decidable by rules."""
