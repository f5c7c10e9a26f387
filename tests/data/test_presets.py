from dataclasses import fields
from pathlib import Path
from pydoc import locate

import pytest
from omegaconf import OmegaConf

from fedpeft.data.partition import partition

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[2]
STORED = ROOT.parent / "shared" / "data"
PRESETS = sorted((ROOT / "experiments" / "conf" / "data").glob("*.yaml"))


def preset(path: Path) -> tuple[type, dict, dict, int]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    return locate(content.pop("_target_")), content, content.pop("partition"), content.pop("min_examples")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_lists_every_field_of_its_source(path):
    source, own, scheme, min_examples = preset(path)
    assert set(own) == {field.name for field in fields(source)}  # what is not listed cannot be overridden on the command line
    assert set(scheme) == {"scheme", "alpha", "shards"}
    assert min_examples >= 1
    source(**own)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_reads_and_splits_its_data(path):
    source, own, scheme, min_examples = preset(path)
    if "path" in own:
        if not (STORED / path.stem).exists():
            pytest.skip(f"{path.stem} is not stored here")
        own["path"] = str(STORED / path.stem)
    elif "id" in own:
        pytest.skip("needs the hub")
    data = source(**own).read(seed=0)
    split = partition(data.train.labels, data.train.groups, clients=20, min_examples=min_examples, seed=0, **scheme)
    assert len(split.clients) == 20
    assert data.public is None or path.stem in ("digits", "tinyshakespeare")
