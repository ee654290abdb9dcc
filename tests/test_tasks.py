"""The packaged tasks: what is read, what is left out, and how words are swapped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from suite import assets, registry
from suite.errors import UserError
from suite.splits import normalised
from suite.task import Item, Splits
from tasks import bigram_shift, sentiment
from tasks.bigram_shift import BigramShift, swap_places, swapped
from tasks.sentiment import AmazonSentiment, MovieSentiment, NytSentiment, TweetSentiment


@cache
def loaded(task_id: str) -> Splits:
    return registry.task(task_id).load(assets.fetch("hutto-2014"))


@cache
def sources() -> dict[str, str]:
    """The untouched sentence behind every bigram-shift id, with single spaces."""
    folder = assets.fetch("hutto-2014")
    return {
        f"bigram-shift/{place}/{row}": " ".join(text.split())
        for place, file, count in bigram_shift._FILES
        for row, _, text in sentiment.read(folder, file, count)
    }


def parts(splits: Splits) -> dict[str, list[Item]]:
    return {name: list(part) for name, part in vars(splits).items()}


def ratings(folder: Path, lines: list[str], file: str = MovieSentiment.file) -> Path:
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def small_movies(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> MovieSentiment:
    monkeypatch.setattr(MovieSentiment, "rows", len(lines))
    monkeypatch.setattr(sentiment, "split", lambda rows, name: Splits([item for item, _ in rows], [], []))
    return MovieSentiment()


# Sentiment


def test_the_label_is_the_sign_of_the_rating_and_near_zero_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["1\t-0.6\tTepid.", "2\t3.2\tA joy.", "3\t0.49\tIt exists.", "4\t-0.5\tDull.", "5\t0.5\tNice."]
    found = small_movies(monkeypatch, lines).load(ratings(tmp_path, lines)).train
    labels = {item.id.removeprefix("movie-sentiment/"): item.label for item in found}
    assert labels == {"1": 0, "2": 1, "4": 0, "5": 1}
    assert MovieSentiment.labels == ("negative", "positive")


def test_html_is_decoded_even_when_it_was_encoded_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["1\t2.0\tI &lt;3 it &amp;amp; you"]
    assert small_movies(monkeypatch, lines).load(ratings(tmp_path, lines)).train[0].text == "I <3 it & you"


def test_of_texts_that_differ_in_punctuation_only_the_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["1\t2.0\tGreat fun", "2\t-2.0\tGreat fun!"]
    assert [i.id for i in small_movies(monkeypatch, lines).load(ratings(tmp_path, lines)).train] == [
        "movie-sentiment/1"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["1\t2.0\tone", "2\t1.0\ttwo"], "has 2 lines instead of 10605"),
        (["1\t2.0"], "is not a file of sentiment ratings"),
        (["1\tgood\tone"], "is not a file of sentiment ratings"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, lines: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        MovieSentiment().load(ratings(tmp_path, lines))
    assert str(tmp_path / MovieSentiment.file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_not_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=MovieSentiment.file):
        MovieSentiment().load(tmp_path)
    (tmp_path / MovieSentiment.file).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=MovieSentiment.file):
        MovieSentiment().load(tmp_path)


@pytest.mark.parametrize("task", [AmazonSentiment, NytSentiment])
def test_sentences_of_one_review_or_article_stay_together(task: type[sentiment.Sentiment]) -> None:
    homes: dict[str, set[str]] = {}
    for name, part in parts(loaded(task.id)).items():
        for item in part:
            homes.setdefault(item.id.split("/")[1].split("_")[0], set()).add(name)
    assert len(homes) > 250
    assert all(len(home) == 1 for home in homes.values())


def test_rewordings_of_a_tweet_stay_together() -> None:
    group = TweetSentiment().group
    assert group("1", "This is super good! http://a.b/c") == group("2", "this is so really GOOD")
    assert group("1", "This is good") != group("2", "This is bad")
    assert group("7", "so very http://a.b/c") == "7"
    homes: dict[str, set[str]] = {}
    for name, part in parts(loaded("tweet-sentiment")).items():
        for item in part:
            homes.setdefault(group(item.id, item.text), set()).add(name)
    assert all(len(home) == 1 for home in homes.values())


def test_no_markup_is_left_in_any_text() -> None:
    marks = ("&amp;", "&quot;", "&lt;", "<br", "\ufffd", "â€", "\t")
    for task in (MovieSentiment, AmazonSentiment, NytSentiment, TweetSentiment, BigramShift):
        for part in parts(loaded(task.id)).values():
            assert not [item for item in part if any(mark in item.text for mark in marks)]


# Bigram shift


def test_swapped_sentences_differ_from_their_source_by_two_neighbours_and_others_not_at_all() -> None:
    for part in parts(loaded("bigram-shift")).values():
        for item in part:
            before, after = sources()[item.id].split(), item.text.split()
            places = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
            if item.label == 1:
                assert not places
                continue
            first, second = places
            assert second == first + 1
            assert (after[first], after[second]) == (before[second], before[first])


def test_half_of_every_split_is_swapped() -> None:
    for part in parts(loaded("bigram-shift")).values():
        assert abs(sum(item.label == 0 for item in part) - len(part) / 2) <= 0.5
    assert BigramShift.labels == ("unacceptable", "acceptable")


def test_the_first_items_of_a_split_are_balanced_too() -> None:
    for part in parts(loaded("bigram-shift")).values():
        assert sum(item.label or 0 for item in part[:300]) == pytest.approx(150, abs=30)


def test_the_source_of_a_swapped_sentence_stands_in_no_split() -> None:
    used = [item for part in parts(loaded("bigram-shift")).values() for item in part]
    texts = {normalised(item.text) for item in used}
    assert len(texts) == len(used)
    assert not any(normalised(sources()[item.id]) in texts for item in used if item.label == 0)


def test_sentences_of_one_article_stay_together() -> None:
    homes: dict[str, set[str]] = {}
    for name, part in parts(loaded("bigram-shift")).items():
        for item in part:
            if "/nyt/" in item.id:
                homes.setdefault(item.id.rsplit("_")[0], set()).add(name)
    assert all(len(home) == 1 for home in homes.values())


def test_length_and_spacing_do_not_tell_the_label() -> None:
    train = parts(loaded("bigram-shift"))["train"]
    lengths = [[len(item.text.split()) for item in train if item.label == label] for label in (0, 1)]
    assert sum(lengths[0]) / len(lengths[0]) == pytest.approx(sum(lengths[1]) / len(lengths[1]), abs=0.5)
    assert not any("  " in item.text for item in train)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("The cat sat on the mat.", [1, 2, 3]),
        ("He said: we go now, all of us.", [5]),
        ("Done. Then they left home quietly.", [2, 3]),
        ("Very very Very good films here.", [2, 3]),
        ("It cost 14 dollars (or so) today.", []),
        ("Don't over-think it's low-key charm, please.", [1, 2]),
    ],
)
def test_first_words_marks_and_equal_words_are_not_moved(text: str, places: list[int]) -> None:
    assert swap_places(text) == places


def test_the_swap_depends_on_the_id_alone() -> None:
    item = Item("bigram-shift/x", "The cat sat on the mat.")
    assert swapped(item) == swapped(item)
    assert len({swapped(Item(f"bigram-shift/{n}", item.text)) for n in range(50)}) == 3


def test_sentences_are_whole_and_of_moderate_length() -> None:
    for part in parts(loaded("bigram-shift")).values():
        assert all(5 <= len(item.text.split()) <= 12 for item in part)
        assert all(item.text[0].isupper() and item.text[-1] in ".?!" for item in part)
