"""The quickstart: all four stages on a task that the package makes itself and whose truth is decidable by rules."""


def run_quickstart(output_dir="runs/quickstart", seed: int = 0, smoke: bool = False) -> dict:
    """See pipeline.run_quickstart, which is imported on use: the tokenizer and the model here need no trainer."""
    from .pipeline import run_quickstart

    return run_quickstart(output_dir, seed, smoke)
