"""`fedpeft audit` says what it found, ends with 1 if the mechanism is not what it claims, and shows that few numbers hide nothing."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.audit import EXPECTED, KINDS, SITUATIONS, attack, check_server, check_trainer, check_trainers
from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.privacy.noise import SeededInsecure, Source
from fedpeft.tensors import Tensors

QUICK = ("audit", "--canaries", "1000", "--steps", "1", "--noise-multiplier", "0.7071")


def half(sums: Tensors, std: float, source: Source) -> None:
    add_noise(sums, std / 2, source)


def no_clip(each: Tensors, clip: float) -> Tensor:
    return clip_each({name: part.clone() for name, part in each.items()}, clip)


@pytest.mark.fast
def test_the_mechanism_as_it_is_passes(told: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = told(*QUICK)
    assert code == 0
    assert "6.573" in out
    assert out.count("no violation") == 3  # two sizes of canaries, and the end
    assert out.count("ok   ") == 13
    assert "proves nothing" in out
    assert "FAILS" not in out
    assert max(map(len, out.splitlines())) < 120


@pytest.mark.fast
def test_half_the_noise_is_refuted_and_the_command_ends_with_1(
    told: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft.privacy.audit.add_noise", half)
    code, out, _ = told(*QUICK)
    assert code == 1
    assert out.count("REFUTED") == 2
    assert "FAILS an empty batch has all the noise: 0.35" in out
    assert "the mechanism is NOT what it claims" in out


@pytest.mark.fast
def test_a_missing_clip_is_refuted_by_the_large_canaries(
    told: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft.privacy.audit.clip_each", no_clip)
    code, out, _ = told(*QUICK)
    assert code == 1
    assert out.count("REFUTED") == 1
    assert "FAILS one contribution moves the sum" in out


@pytest.mark.parametrize("trainer", ["wave", "private"])
@pytest.mark.parametrize(("part", "plant", "want"), [("add_noise", half, "all the noise"), ("clip_each", no_clip, "by the clip at most")])
def test_a_fault_in_one_trainer_alone_is_found_there(
    trainer: str, part: str, plant: Callable[..., Any], want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the canaries go through is right then."""
    monkeypatch.setattr(f"clients.{trainer}.{part}", plant)
    checks = check_trainers(2.0, SeededInsecure(torch.Generator().manual_seed(0)))
    assert len(checks) == 6
    failed = {check.name for check in checks if not check.holds}
    who = "many clients at once" if trainer == "wave" else "one client"
    assert any(want in name for name in failed)
    assert all(who in name for name in failed)


@pytest.mark.fast
@pytest.mark.parametrize(("part", "plant", "want"), [("add_noise", half, "all the noise"), ("clip_each", no_clip, "by the clip at most")])
def test_a_fault_in_the_servers_mean_is_found_there(
    part: str, plant: Callable[..., Any], want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [check.holds for check in check_server(2.0)] == [True, True, True]
    monkeypatch.setattr(f"server.private.{part}", plant)
    failed = [check.name for check in check_server(2.0) if not check.holds]
    assert any(want in name for name in failed)
    assert all(name.startswith("clients at the server: ") for name in failed)


@pytest.mark.fast
def test_a_trainer_that_divides_by_the_drawn_batch_is_found() -> None:
    draws = SeededInsecure(torch.Generator().manual_seed(0))

    def release(rows: Sequence[int], noise: float, *, drawn: bool) -> Tensors:
        total = len(rows) * torch.eye(1, 5000)[0] + noise * draws.normal(5000)
        return {"A": total / max(len(rows), 1) * EXPECTED if drawn else total}

    assert [check.holds for check in check_trainer(partial(release, drawn=False), 2.0)] == [True, True, True]
    assert [check.holds for check in check_trainer(partial(release, drawn=True), 2.0)] == [False, False, False]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--noise-multiplier", "0"), "claims no privacy"),
        (("--canaries", "3"), "--canaries 3: needed are at least 100"),
        (("--delta", "2"), "delta in (0, 1)"),
    ],
)
def test_what_cannot_be_audited_is_said(told: Callable[..., tuple[int, str, str]], options: tuple[str, str], said: str) -> None:
    code, _, err = told("audit", *options)
    assert code == 2
    assert said in err


def test_what_is_sent_names_tokens_whatever_its_size_and_noise_alone_hides_them() -> None:
    found = {(one.kind, one.situation): one for one in attack()}
    assert len(found) == len(KINDS) * len(SITUATIONS)
    for kind in KINDS:
        for steps in ("1 step", "5 SGD steps"):
            one = found[kind.said, steps]
            assert (one.precision, one.recall, one.told) == (1.0, 1.0, 1.0)
            assert one.rank == one.tokens == 14
            assert one.read == " 012345Aaclnt"  # of "call Anna at 0151 2345"
        assert found[kind.said, "5 AdamW steps"].told > 4 * found[kind.said, "5 AdamW steps"].chance
        assert found[kind.said, "1 step, DP noise"].told < 0.4
    for kind in KINDS[1:]:  # more tokens than ranks: everything lies in the span
        one = found[kind.said, "1 step, many tokens"]
        assert (one.tokens, one.rank, one.recall) == (57, 32, 1.0)
        assert one.precision == pytest.approx(one.chance, abs=0.01)
    assert found["A and B", "1 step, many tokens"].told > 0.8  # but not in that of A


def test_the_leaks_table_has_eighty_columns(told: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = told("audit", "--leak")
    assert code == 0
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80
    assert "R only   1 step               14      14    1.00       1.00" in out
    assert "read from R alone, after 1 step:  012345Aaclnt" in out
    assert "only differential privacy" in out
