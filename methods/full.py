"""The rows that every adapter is held against: full fine-tuning, the task head alone, and the untouched base."""

from __future__ import annotations

from suite.method import Method, MethodConfig, Paper, Shapes


class FullFineTuning(Method["FullFineTuning.Config"]):
    """Every scalar of the base is trained, embeddings included. Runs alone: its W differs from run to run."""

    id = "full"
    label = "Full fine-tuning"
    paper = Paper("BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", "1810.04805", 2018)
    packs = False
    trains = "base"
    spoils_base = True

    class Config(MethodConfig):
        """No hyper-parameters of its own."""

    def trainable(self, config: FullFineTuning.Config, shapes: Shapes) -> int:
        """All scalars of the base."""
        return shapes.parameters


class HeadOnly(Method["HeadOnly.Config"]):
    """A linear classifier on the frozen base's pooled output: what the base already knows."""

    id = "head"
    label = "Head only"
    paper = Paper("Understanding intermediate layers using linear classifier probes", "1610.01644", 2016)
    trains = "head"

    class Config(MethodConfig):
        """No hyper-parameters of its own."""

    def trainable(self, config: HeadOnly.Config, shapes: Shapes) -> int:
        """None beside the head."""
        return 0

    def skip(self, base_kind: str, task_kind: str) -> str | None:
        if task_kind != "classification" or base_kind != "encoder":
            return "there is no task head to train: the task is answered in text"
        return None


class Untouched(Method["Untouched.Config"]):
    """The base as it is, nothing trained: what fine-tuning has to beat."""

    id = "untouched"
    label = "Untouched base"
    paper = Paper("Language Models are Few-Shot Learners", "2005.14165", 2020)
    trains = "nothing"

    class Config(MethodConfig):
        """No hyper-parameters of its own."""

    def trainable(self, config: Untouched.Config, shapes: Shapes) -> int:
        """None."""
        return 0

    def skip(self, base_kind: str, task_kind: str) -> str | None:
        if task_kind == "classification" and base_kind == "encoder":
            return "an untouched encoder has no head to answer with"
        return None
