"""The quickstart: all four stages on a task that the package generates itself, with rules that decide what is right."""
