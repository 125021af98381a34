"""Order and ledger: no position lost or repeated, whoever takes them; damage is noticed."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldcore.data.ledger import (
    HEADER,
    Head,
    Ledger,
    LedgerError,
    continue_ledger,
    read_file,
    read_ledger,
)
from foldcore.data.order import Order, Script, merge

BATCH = 4


class Rank:
    """An order with its outstanding positions, of which any may be ready."""

    def __init__(self, order: Order) -> None:
        self.order, self.outstanding = order, list[int]()

    def step(self, draw: random.Random, capacity: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < self.order.batch_size:
            while len(self.outstanding) + len(taken) < capacity and (task := self.order.submit()):
                self.outstanding.append(task[0])
            self.outstanding.remove(choice := draw.choice(self.outstanding))
            taken.append(choice)
        self.order.take(taken)
        return taken


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
def test_no_position_is_lost_or_repeated(seed: int, worlds: list[int]) -> None:
    """Steps by several numbers of ranks in turn; each part ends with a kill after a checkpoint."""
    draw = random.Random(seed)
    window = draw.choice((1, 3, 10))
    state = {"step": 0, "plan": 1, "position": 0, "taken": []}
    seen: list[int] = []
    for world in worlds:
        ranks = [Rank(Order(BATCH // world, r, world, window)) for r in range(world)]
        for rank in ranks:
            rank.order.restore(state["position"], state["taken"])
        capacity = BATCH // world + draw.choice((1, 4))
        for _ in range(draw.randint(0, 6)):
            for rank in ranks:
                seen += rank.step(draw, capacity)
            state["step"] += 1
        parts = [
            json.loads(json.dumps({"step": state["step"], "plan": 1, **rank.order.state()}))
            for rank in ranks
        ]
        state = merge(draw.sample(parts, len(parts)))
        for rank in ranks:  # what happens after the checkpoint is lost with the kill
            rank.step(draw, capacity)
    assert len(set(seen)) == len(seen) == BATCH * state["step"]
    early = {p for first, last in state["taken"] for p in range(first, last)}
    assert set(seen) == set(range(state["position"])) | early
    assert all(p > state["position"] for p in early)


def test_in_order_every_number_of_ranks_divides_the_same_steps() -> None:
    for world in (1, 2, 4):
        orders = [Order(BATCH // world, rank, world, 100) for rank in range(world)]
        for step in range(3):
            batch = []
            for order in orders:
                own: list[int] = []
                while len(own) < order.batch_size:
                    own.append(order.wanted(own)[0])
                assert order.take(own) == 0
                batch += own
            assert batch == list(range(step * BATCH, (step + 1) * BATCH))


def test_the_window_bounds_what_may_overtake() -> None:
    order = Order(1, 0, 1, window=5)
    assert [order.submit() for _ in range(6)] == [(p, None) for p in range(5)] + [None]
    distances = [order.take([p]) for p in (1, 2, 3, 4)]
    assert distances == [1, 2, 3, 4] and order.submit() is None
    assert order.state() == {"position": 0, "taken": [[1, 5]]}
    assert order.take([0]) == 0
    assert [order.submit() for _ in range(6)] == [(p, None) for p in range(5, 10)] + [None]


def test_a_script_is_followed_and_then_the_rest_in_order() -> None:
    order = Order(2, 0, 1, window=100)
    rows = np.array([[4, 1], [0, 7]])
    order.follow(Script(rows, np.array([[0, 2], [0, 0]]), rows))
    found = [order.submit() for _ in range(8)]
    assert found[:4] == [(4, 0), (1, 2), (0, 0), (7, 0)]
    assert [task[0] for task in found[4:] if task] == [2, 3, 5, 6]
    assert order.wanted([]) == (4, 0) and order.wanted([4]) == (1, 2)
    order.take([4, 1])
    order.rewind()
    assert order.submit() == (0, 0)
    order.take([0, 7])
    assert order.state() == {"position": 2, "taken": [[4, 5], [7, 8]]}
    assert order.wanted([]) == (2, None)


def test_states_of_missing_ranks_or_other_steps_are_not_merged() -> None:
    parts = [{"step": 1, **Order(2, rank, 2, 9).state()} for rank in range(2)]
    with pytest.raises(ValueError, match=r"ranks \[1\] of 2"):
        merge(parts[1:])
    with pytest.raises(ValueError, match="different steps"):
        merge([parts[0], {**parts[1], "step": 2}])


# The ledger ---------------------------------------------------------------------------------------


def head(rank: int = 0, world: int = 1, step: int = 0, base: int = 0) -> Head:
    return Head(rank, world, BATCH // world, step, base, plan=77)


def fill(ledger: Ledger, first: int, last: int, shift: int = 0) -> None:
    size = ledger.head.batch_size
    for step in range(first, last + 1):
        start = (step - 1) * BATCH + ledger.head.rank * size + shift
        ledger.append(step, [(start + i, i % 2) for i in range(size)])
    ledger.close()


def test_a_ledger_comes_back_as_written_in_a_few_bytes(tmp_path: Path) -> None:
    fill(continue_ledger(head(), tmp_path), 1, 50)
    plan, steps = read_ledger(tmp_path)
    assert plan == 77 and steps.last == 50
    assert steps.positions.tolist() == np.arange(200).reshape(50, 4).tolist()
    assert steps.attempts.tolist() == [[0, 1, 0, 1]] * 50
    (path,) = tmp_path.glob("*.ledger")
    assert path.stat().st_size == HEADER.size + 50 * (5 * BATCH + 4)
    ledger = continue_ledger(head(step=30, base=120), tmp_path)
    assert ledger.head.step == 0 and ledger.after(30).positions.tolist()[0] == [120, 121, 122, 123]
    assert ledger.read(7) == [(24, 0), (25, 1), (26, 0), (27, 1)]
    with pytest.raises(LedgerError, match="nothing is written of step 51"):
        ledger.read(51)


def test_a_resumed_run_appends_where_its_ledger_ends(tmp_path: Path) -> None:
    fill(continue_ledger(head(), tmp_path), 1, 12)
    before = next(tmp_path.glob("*.ledger")).read_bytes()
    fill(continue_ledger(head(step=10, base=40), tmp_path), 11, 20)
    assert next(tmp_path.glob("*.ledger")).read_bytes().startswith(before)
    assert read_ledger(tmp_path)[1].last == 20


def test_a_step_that_turns_out_otherwise_replaces_what_follows(tmp_path: Path) -> None:
    fill(continue_ledger(head(), tmp_path), 1, 12)
    fill(continue_ledger(head(step=5, base=20), tmp_path), 6, 8, shift=100)
    _, steps = read_ledger(tmp_path)
    assert steps.positions[:, 0].tolist() == [0, 4, 8, 12, 16, 120, 124, 128]


def test_another_number_of_ranks_begins_new_files(tmp_path: Path) -> None:
    for rank in range(4):
        fill(continue_ledger(head(rank, 4), tmp_path), 1, 12)
    for rank in range(2):
        fill(continue_ledger(head(rank, 2, 10, 40), tmp_path), 11, 20)
    for rank in range(2):  # the checkpoint of step 20 was damaged: step 15 is the newest
        fill(continue_ledger(head(rank, 2, 15, 60), tmp_path), 16, 18)
    _, steps = read_ledger(tmp_path)
    assert steps.positions.tolist() == np.arange(80).reshape(20, 4).tolist()
    for rank in range(4):  # all of that is given up
        fill(continue_ledger(head(rank, 4, 10, 40), tmp_path), 11, 14)
    _, steps = read_ledger(tmp_path)
    assert steps.positions.tolist() == np.arange(56).reshape(14, 4).tolist()
    assert len(list(tmp_path.glob("*.ledger"))) == 8  # those of 2 ranks are removed


def test_a_record_cut_short_is_dropped_and_damage_is_named(tmp_path: Path) -> None:
    fill(continue_ledger(head(), tmp_path), 1, 9)
    (path,) = tmp_path.glob("*.ledger")
    whole = path.read_bytes()
    for cut in range(1, head().record + 1):
        path.write_bytes(whole[:-cut])
        assert len(read_file(path)[1]) == 8
        fill(continue_ledger(head(step=8, base=32), tmp_path), 9, 9)
        assert path.read_bytes() == whole
    for place in range(len(whole) - head().record):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(LedgerError, match=str(path)):
            read_file(path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger here"):
        read_ledger(tmp_path)
    fill(continue_ledger(head(1, 2), tmp_path), 1, 5)
    with pytest.raises(LedgerError, match="some ranks are missing from step 0"):
        read_ledger(tmp_path)
    fill(continue_ledger(head(0, 2), tmp_path), 1, 4)
    assert read_ledger(tmp_path)[1].last == 4
    fill(continue_ledger(head(0, 1, step=9, base=36), tmp_path), 10, 12)
    with pytest.raises(LedgerError, match="steps 5 to 9 are missing"):
        read_ledger(tmp_path)
