"""Losses and accuracies by hand."""

import math

import pytest
import torch

from fedpeft.models.base import Images, Tokens
from fedpeft.models.score import hits, losses, score

pytestmark = pytest.mark.fast


def test_the_loss_of_a_class_is_its_negative_log_probability() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert losses("text", logits, torch.tensor([1])).item() == pytest.approx(-math.log(0.75))
    assert hits("image", logits, torch.tensor([0])).item() == 0


def test_a_texts_loss_is_the_mean_over_its_own_tokens_and_knows_no_neighbour() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5)
    targets = torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
    logp = logits.log_softmax(-1)
    by_hand = [-(logp[0, 0, 2] + logp[0, 1, 3] + logp[0, 2, 4]) / 3, -logp[1, 0, 2]]
    torch.testing.assert_close(losses("language", logits, targets), torch.stack(by_hand))
    alone = losses("language", logits[1:, :2], targets[1:, :2])
    torch.testing.assert_close(alone[0], losses("language", logits, targets)[1])


def test_the_score_weighs_examples_and_skips_those_of_weight_zero() -> None:
    examples = Images(torch.eye(3).reshape(3, 1, 1, 3), torch.tensor([0, 1, 0]))
    seen = []

    def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(len(inputs["pixel_values"]))
        return inputs["pixel_values"].flatten(1)[:, :2]

    found = score(logits, "image", examples, weights=torch.tensor([1.0, 3.0, 0.0]))
    assert found.accuracy == 1.0
    assert seen == [2]
    whole = score(logits, "image", examples)
    assert whole.accuracy == 1.0  # a tie goes to the first class


def test_a_score_over_nothing_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"data\.test_share"):
        score(lambda inputs: inputs["pixel_values"], "image", Images(torch.empty(0, 1, 1, 1), torch.empty(0, dtype=torch.long)))


@pytest.mark.parametrize("left", [False, True])
def test_a_batch_of_tokens_is_padded_to_its_own_longest(left: bool) -> None:
    tokens = Tokens(
        torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32), torch.tensor([2, 3, 5]), torch.tensor([0, 1, 0]), padding=0, left=left
    )
    inputs, labels = tokens.batch(torch.tensor([1, 2]))
    want = [[0, 7], [8, 9]] if left else [[7, 0], [8, 9]]
    assert inputs["input_ids"].tolist() == want
    assert inputs["attention_mask"].tolist() == [[int(t != 0) for t in row] for row in want]
    assert labels.tolist() == [1, 0]
    assert tokens.lengths().tolist() == [2, 1, 2]


def test_language_targets_are_the_tokens_with_padding_ignored() -> None:
    tokens = Tokens(torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([1, 3]), torch.zeros(2), padding=0, predicts=True)
    _, targets = tokens.batch(torch.tensor([0, 1]))
    assert targets.tolist() == [[5, -100], [6, 7]]


def test_a_pair_says_which_sentence_a_token_belongs_to() -> None:
    types = torch.tensor([0, 1, 0, 0, 1], dtype=torch.int8)
    tokens = Tokens(torch.arange(5, dtype=torch.int32), torch.tensor([2, 5]), torch.zeros(2), padding=0, types=types)
    assert tokens.batch(torch.tensor([0, 1]))[0]["token_type_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
