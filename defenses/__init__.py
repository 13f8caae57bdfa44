"""Defense training: a language model learns from data that may be poisoned, while interventions protect it."""

__all__: list[str] = []
