import pytest

from fedpeft.cohort import fixed

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("clients", "size"), [(1, 1), (10, 3), (10, 10), (500, 20)])
def test_a_cohort_is_sorted_has_its_size_and_no_client_twice(clients, size):
    for round in range(20):
        cohort = fixed(clients, size, 7)(round, 0)
        assert len(cohort.clients) == len(set(cohort.clients)) == size
        assert list(cohort.clients) == sorted(cohort.clients)
        assert set(cohort.clients) <= set(range(clients))
        assert cohort.rate == size / clients


def test_a_cohort_depends_on_seed_round_and_attempt_and_on_nothing_else():
    draw = fixed(100, 10, 7)
    want = draw(3, 1)
    for round in (9, 0, 3):
        draw(round, 0)
    assert draw(3, 1) == want == fixed(100, 10, 7)(3, 1)
    assert len({draw(3, 1), draw(3, 0), draw(4, 1), fixed(100, 10, 8)(3, 1)}) == 4


def test_cohorts_are_the_golden_ones():
    assert fixed(10, 4, 7)(3, 0).clients == (1, 6, 7, 9)
    assert fixed(10, 4, 7)(3, 1).clients == (0, 5, 7, 9)


def test_every_client_is_drawn_about_equally_often():
    draw = fixed(20, 5, 0)
    counts = [0] * 20
    for round in range(2000):
        for client in draw(round, 0).clients:
            counts[client] += 1
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts)  # five standard deviations


def test_all_clients_are_a_cohort_in_every_round():
    assert {fixed(4, 4, 1)(round, 0).clients for round in range(5)} == {(0, 1, 2, 3)}
