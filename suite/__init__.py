"""The engine of the PEFT suite: specs, registry, bases, packed training, evaluation, records, tracking."""

__version__ = "0.1.0"
