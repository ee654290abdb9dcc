"""Attention in float32 inside a bfloat16 model."""

import torch

import tests.tiny as tiny
from suite import attention


def test_a_widened_model_attends_in_float32_and_is_nearer_to_the_exact_one() -> None:
    for arch in ("bert", "llama"):
        exact = tiny.build(arch)
        base = tiny.build(arch, torch.bfloat16)
        batch = base.batch()
        given = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        kept = batch.mask.bool()

        def states(model: object, given: dict[str, torch.Tensor] = given, kept: torch.Tensor = kept) -> torch.Tensor:
            with torch.no_grad():
                return model(**given, output_hidden_states=True).hidden_states[-1][kept].double()  # type: ignore[operator]

        plain = states(base.model)
        attention.widen(base.model)
        assert base.model.config._attn_implementation == attention.NAME
        widened = states(base.model)
        truth = states(exact.model)
        assert not torch.equal(plain, widened)
        assert (widened - truth).norm() < 1.1 * (plain - truth).norm()
