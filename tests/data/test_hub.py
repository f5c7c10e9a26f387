import builtins

import pytest
import torch

from fedpeft.data.hub import Hub

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _cache_in_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def stored(tmp_path, columns, features=None, splits=("train", "test")) -> str:
    for split in splits:
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "here" / f"{split}.parquet")
    return str(tmp_path / "here")


def test_a_class_column_is_read_by_its_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no", "maybe"])})
    folder = stored(tmp_path, {"text": ["a", "b", "c", "d"], "label": [0, 1, 2, 0]}, features)
    data = Hub(id=folder, text="text", label="label").read(seed=0)
    assert data.classes == ("maybe", "no", "yes")
    assert data.train.inputs == ("a", "b", "c", "d")
    assert data.test.labels.tolist() == [2, 1, 0, 2]


def test_class_minus_one_is_no_label(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    folder = stored(tmp_path, {"text": ["a", "b", "c"], "label": [0, -1, 1]}, features)
    with pytest.raises(ValueError, match=r"row 2 of .*\(train\) has no label .* data.drop_unlabelled=true"):
        Hub(id=folder, text="text", label="label").read(seed=0)
    assert Hub(id=folder, text="text", label="label", drop_unlabelled=True).read(seed=0).train.inputs == ("a", "c")


def test_pairs_owners_and_a_held_out_test(tmp_path):
    columns = {"a": list("abcdefghij"), "b": list("ABCDEFGHIJ"), "label": [0, 1] * 5, "who": [1] * 6 + [2] * 4}
    folder = stored(tmp_path, columns, splits=("train",))
    data = Hub(id=folder, text="a", text_pair="b", label="label", group="who", test_split=None, test_share=0.3).read(seed=0)
    assert (len(data.train), len(data.test)) == (7, 3)
    assert all(second == first.upper() for first, second in data.train.inputs)
    assert set(data.train.groups) == {"1", "2"}


def test_images_are_read_and_resized(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [pillow.new("RGB", (4, 4), (255, 0, 0)), pillow.new("RGB", (6, 6), (0, 255, 0))]
    folder = stored(tmp_path, {"img": pictures, "label": [0, 1]}, features)
    with pytest.raises(ValueError, match=r"differ in size; give one with data.size=PIXELS"):
        Hub(id=folder, task="image", image="img", label="label").read(seed=0)
    data = Hub(id=folder, task="image", image="img", label="label", size=2).read(seed=0)
    assert torch.equal(data.train.inputs[:, :, 0, 0], torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert (data.train.inputs.shape, data.classes) == ((2, 3, 2, 2), ("cat", "dog"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": None}, r"data.id is not set"),
        ({"text": "body"}, r"data.text=body: .* has no such column, it has text, label"),
        ({"text": None}, r"data.text is not set; name the column with data.text=COLUMN"),
        ({"test_split": "dev"}, r"split dev: cannot be loaded .*data.test_split"),
        ({"task": "audio"}, r"data.task=audio: needed is text, image or language"),
        ({"task": "image", "image": "text"}, r"data.text=text means nothing for data.task=image"),
        ({"task": "image", "image": "text", "text": None}, r"holds no images in that column"),
        ({"size": 3}, r"data.size=3 means nothing for data.task=text"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, fields, message):
    folder = stored(tmp_path, {"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(ValueError, match=message):
        Hub(**{"id": folder, "text": "text", "label": "label"} | fields).read(seed=0)


def test_a_hub_out_of_reach_is_explained():
    with pytest.raises(ValueError, match=r"data.id=no/such.*Without a network give a local folder, or use data=files"):
        Hub(id="no/such", text="text", label="label").read(seed=0)


def test_a_missing_library_is_explained(monkeypatch):
    found = builtins.__import__

    def without_datasets(name, *rest):
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        Hub(id="any", text="text", label="label").read(seed=0)
