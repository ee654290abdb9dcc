"""The methods' cards in docs/methods are those that the methods' files give."""

from __future__ import annotations

from suite import cards


def test_the_committed_cards_are_current() -> None:
    made = {**{method.id: cards.card(method) for method in cards.own()}, "README": cards.index()}
    kept = {path.stem: path.read_text(encoding="utf-8") for path in cards.FOLDER.glob("*.md")}
    assert kept == made, "run `make docs`"


def test_a_card_has_equations_defaults_cost_and_a_paper() -> None:
    for method in cards.own():
        text = cards.card(method)
        for part in ("## Equations and choices", "## Hyper-parameters", "## Cost", "## Whom to cite", method.paper.title):
            assert part in text
        assert all(f"| `{name}` |" in text for name in method.Config.model_fields)
