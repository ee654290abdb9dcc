"""The table of what methods can do says what a method does when it is tried again."""

from __future__ import annotations

import pytest

from suite import capabilities, listing, registry


@pytest.mark.parametrize(("name", "arch"), [
    ("lora", "BERT"), ("gora", "GPT-2"), ("sparta", "Llama"), ("peft:loha", "GPT-2"), ("peft:lora", "Llama"),
    ("peft:ia3", "T5"), ("peft:prompt_tuning", "Llama"), ("peft:xlora", "BERT"),
])
def test_what_is_written_is_found_again(name: str, arch: str) -> None:
    found = capabilities.probe(registry.method(name), arch)
    written = capabilities.known()[name][arch]
    assert {question: answer is True for question, answer in found.items()} == \
        {question: answer is True for question, answer in written.items()}


def test_an_answer_is_true_or_a_reason() -> None:
    for architectures in capabilities.known().values():
        assert list(architectures) == list(capabilities.ARCHITECTURES)
        for answers in architectures.values():
            assert set(answers) <= set(capabilities.QUESTIONS)
            assert all(answer is True or (isinstance(answer, str) and answer) for answer in answers.values())


def test_the_page_is_made_of_the_data_file() -> None:
    text = capabilities.PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` | {' | '.join(capabilities.summary(name).values())} |" in text for name in capabilities.known())


def test_the_listing_shows_what_methods_can_do() -> None:
    header, rows = listing.methods()
    lora = dict(zip(header, next(row for row in rows if row[0] == "lora"), strict=True))
    assert lora["trains"] == "BERT, Llama, GPT-2, T5"
    assert (lora["merges"], lora["LoRA export"]) == ("yes", "yes")
    assert capabilities.summary("nobody") == dict.fromkeys(capabilities.QUESTIONS, "?")
