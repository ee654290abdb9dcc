"""The engine of the PEFT suite: specs, registry, bases, packed training, evaluation, records, tracking."""

import logging

__version__ = "0.1.0"

# bitsandbytes, which peft imports too, tells at its import of a faster kernel for other hardware, which is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
