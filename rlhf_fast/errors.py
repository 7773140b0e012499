"""What a run refuses or ends with."""


class ConfigError(ValueError):
    """A config, dataset or tokenizer refused before training; the message says what to do."""


class NonFiniteError(RuntimeError):
    """max_skipped_steps updates in a row were skipped for a NaN or inf: the run would go on without learning."""
