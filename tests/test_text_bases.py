"""Classification by bases of text, for real: GLUE in the hub's own format on small T5 and Llama models with random weights.

What is trained and scored is held against transformers' own loss.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from suite import bases, data, objectives
from suite.batches import collate, encode, form_of, spelled
from suite.records import Record
from suite.specs import BaseRef, Budget, Evaluation, MethodRef, Recipe, RunSpec, TaskRef
from suite.worker import Worker
from tests.test_glue import copies, put, task

__all__ = ["copies"]  # a fixture
GLUE = "glue-mrpc"


def tokenizer(ends: bool) -> Any:
    """Every byte is a token; `ends`: an end token is put after every text, as T5's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if ends:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(params=["t5", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> bases.Base:
    """A model folder as the hub has them."""
    common = {"vocab_size": 260, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model: Any
    if request.param == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0,
            tie_word_embeddings=True, **common))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **common))
    model.save_pretrained(tmp_path / "model")
    tokenizer(request.param == "t5").save_pretrained(tmp_path / "model")
    return bases.get(f"path:{tmp_path / 'model'}")


def spec(base: bases.Base, seed: int = 0, method: str = "lora") -> RunSpec:
    return RunSpec(
        base=BaseRef(id=base.id, revision=base.revision), task=TaskRef(id=GLUE, version=1, train=24, test=9),
        method=MethodRef(id=method, version=1, config={"rank": 2, "alpha": 4.0} if method == "lora" else {}),
        budget=Budget(rank=2) if method == "lora" else None, seed=seed, evaluation=Evaluation(batch_size=4),
        recipe=Recipe(learning_rate=1e-2, batch_size=8, epochs=2, max_length=160))


@pytest.fixture
def glue(copies: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(copies, task(GLUE), monkeypatch)
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))


@pytest.mark.usefixtures("glue")
def test_a_label_is_the_likeliest_word_by_transformers_own_loss(base: bases.Base) -> None:
    worker = Worker()
    [record] = worker.run([spec(base)])
    assert record.status == "finished", record.trace
    assert record.trainable is not None
    assert record.trainable.head == 0
    packed, loaded = worker.revive(record)
    table = record.predictions()
    assert table is not None
    items = data.load(record.spec.task)
    words = items.task.labels
    for row, item in zip(table.itertuples(), items.test, strict=True):
        scores = torch.tensor([score(packed.model, loaded.tokenizer, items.task.prompt(item), word, base.kind)
                               for word in words])
        assert row.predicted == int(scores.argmax())
        assert row.loss == pytest.approx(float(-scores.log_softmax(-1)[item.label]), abs=1e-4)
    assert record.decode == {"scoring": "the likeliest label word, its end included"}


def score(model: Any, tokenizer: Any, prompt: str, word: str, kind: str) -> float:
    """Log-probability of a word and the end after a prompt, one item alone, by transformers' own loss."""
    read, written = tokenizer(prompt).input_ids, tokenizer(word).input_ids
    if kind == "seq2seq":
        given = {"input_ids": torch.tensor([read]), "labels": torch.tensor([written])}
    else:
        written = [*written, tokenizer.eos_token_id]
        given = {"input_ids": torch.tensor([read + written]), "labels": torch.tensor([[-100] * len(read) + written])}
    with torch.no_grad():
        return -float(model(**given).loss) * len(written)


@pytest.mark.usefixtures("glue")
def test_two_runs_of_a_pack_end_as_each_alone(base: bases.Base) -> None:
    worker = Worker()
    alone = [worker.run([spec(base, seed)])[0] for seed in (0, 1)]
    packed = worker.run([spec(base, seed) for seed in (0, 1)])
    for one, other in zip(alone, packed, strict=True):
        assert one.final_loss == pytest.approx(other.final_loss, rel=1e-4)
        assert [score.value for score in one.scores] == [score.value for score in other.scores]


@pytest.mark.usefixtures("glue")
def test_training_and_the_untouched_base_and_full_fine_tuning_run(base: bases.Base) -> None:
    found: dict[str, Record] = {}
    for method in ("lora", "full", "untouched"):
        [found[method]] = Worker().run([spec(base, method=method)])
        assert found[method].status == "finished", found[method].trace
    curve = found["full"].curves()
    assert curve is not None
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0]
    assert found["full"].scored_loss is not None


@pytest.mark.usefixtures("glue")
def test_the_loss_of_a_batch_is_transformers_own(base: bases.Base) -> None:
    loaded = bases.load(base)
    items = data.load(TaskRef(id=GLUE, version=1, train=24, test=9))
    encoded = encode(loaded.tokenizer, spelled(base.kind, items.task, items.train), 160, form_of(base.kind))
    batch = collate(encoded, [[0, 1, 2]], torch.device("cpu"))
    ours = objectives.language_loss(loaded.model, 1, batch)
    theirs = loaded.model(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss
    torch.testing.assert_close(ours[0], theirs)
    assert batch.real < batch.positions
    assert encoded.truncated == 0
    cut = encode(loaded.tokenizer, spelled(base.kind, items.task, items.train), 12, form_of(base.kind))
    assert cut.truncated == len(items.train)
