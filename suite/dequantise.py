"""Turn a GGUF file into an ordinary model folder (safetensors, config, tokenizer), once.

`python -m suite.dequantise MODEL.gguf FOLDER`. Weights are stored in float32: exactly the values that the quantised
file stands for. Runs in its own process because its memory peak (three copies of the weights) is not the caller's.
"""

from __future__ import annotations

import sys
from pathlib import Path


def dequantise(source: Path, target: Path) -> None:
    """Write `target` from the causal language model in the GGUF file `source`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that came from GGUF refuses to be saved; the same weights in a fresh model of the same class do not.
    with torch.device("meta"):
        plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


if __name__ == "__main__":
    dequantise(Path(sys.argv[1]), Path(sys.argv[2]))
