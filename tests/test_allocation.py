"""Allocation against exhaustive search over every choice of ranks, forms and sharing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
from gguf import GGMLQuantizationType

torch = pytest.importorskip("torch", reason="the converter needs torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from skipcat_converter.allocation import BudgetError, allocate  # noqa: E402
from skipcat_converter.candidates import Candidate, Form  # noqa: E402
from skipcat_converter.factorize import METHODS  # noqa: E402
from skipcat_converter.layers import Layer  # noqa: E402
from skipcat_converter.named_allocations import RULES, allocate_by_rule  # noqa: E402
from skipcat_converter.plan import Plan  # noqa: E402
from skipcat_converter.planning import Budget, make_plan  # noqa: E402
from skipcat_converter.writer import factor_slots  # noqa: E402

from skipcat_edge import format as fmt  # noqa: E402
from skipcat_edge.errors import UserError  # noqa: E402
from skipcat_edge.ranks import uniform_rank  # noqa: E402
from skipcat_edge.sizes import parse_size  # noqa: E402

Type = GGMLQuantizationType
GRID = 8
NAMES = ("attn_q", "attn_k", "attn_v")


def layer(member: str, m: int, n: int, index: int = 0) -> Layer:
    return Layer(index, member, f"model.layers.{index}.{member}", m, n)


def parameters(members: Sequence[Layer], rank: int, form: Form) -> float:
    m, n = sum(each.m for each in members), members[0].n
    if form is None:
        return m * n
    return rank * (m + n - rank) if form else rank * (m + n)


def decaying(size: int, rng: np.random.Generator) -> np.ndarray:
    """A spectrum like a layer's: descending, some steep and some flat."""
    return np.sort(np.exp(-rng.uniform(0, 8) * rng.random(size)) * rng.uniform(0.1, 10))[::-1]


def noise(m: int, n: int, rng: np.random.Generator) -> dict[Form, tuple[np.ndarray, np.ndarray]]:
    ranks = np.array([0.0, 8.0, float(min(m, n))])
    made: dict[Form, tuple[np.ndarray, np.ndarray]] = {
        form: (ranks, np.concatenate([[0.0], rng.uniform(0, 2, 2)])) for form in (False, True)
    }
    made[None] = np.zeros(1), rng.uniform(0, 1, 1)
    return made


def random_groups(seed: int) -> list[list[list[Candidate]]]:
    """Two groups: one that may share a projection, and a layer of its own."""
    rng = np.random.default_rng(seed)
    rounded = bool(rng.integers(2))

    def candidate(*members: Layer) -> Candidate:
        m, n = sum(each.m for each in members), members[0].n
        return Candidate(members, decaying(min(m, n), rng), noise(m, n, rng) if rounded else {})

    q, k = layer("attn_q", 24, 32), layer("attn_k", int(rng.choice([16, 24])), 32)
    down = layer("ffn_down", 32, 40)
    return [[[candidate(q, k)], [candidate(q), candidate(k)]], [[candidate(down)]]]


Point = tuple[float, float]


def options(candidate: Candidate, skip: bool | None) -> Iterator[Point]:
    """(cost, loss) of all that `candidate` can become, from the definitions."""
    m, n = sum(each.m for each in candidate.members), candidate.members[0].n
    for form in (None, *((False, True) if skip is None else (skip,))):
        for rank in [0] if form is None else range(GRID, min(m, n - 1 if form else n) + 1, GRID):
            cost = parameters(candidate.members, rank, form)
            if form is not None and cost >= m * n:
                continue
            lost = 0.0 if form is None else float(candidate.spectrum[rank:].sum())
            if form in candidate.rounding:
                lost += float(np.interp(rank, *candidate.rounding[form]))
            yield cost, lost


def all_points(groups: list[list[list[Candidate]]], skip: bool | None = None) -> np.ndarray:
    """(cost, loss) of every combination: [combinations, 2]."""
    points = np.zeros((1, 2))
    for group in groups:
        own = [np.sum(picks, axis=0)
               for alternative in group for picks in product(*(list(options(c, skip)) for c in alternative))]
        points = (points[:, None] + np.array(own)).reshape(-1, 2)
    return points


def hull(points: np.ndarray) -> np.ndarray:
    """The vertices of the lower convex hull, from the least cost to the least loss."""
    found: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if found and point[1] >= found[-1][1]:
            continue
        while len(found) > 1:
            (x0, y0), (x1, y1) = found[-2], found[-1]
            if (y1 - y0) * (point[0] - x0) < (point[1] - y0) * (x1 - x0):
                break
            found.pop()
        found.append(point)
    return np.array(found)


def plan_cost(plan: Plan, groups: list[list[list[Candidate]]]) -> float:
    """Also checks that every layer is in the plan once."""
    layers = {each.tensor: each for group in groups for candidate in group[-1] for each in candidate.members}
    named = [each.tensor for owner in plan.owners for each in owner.members] + list(plan.dense)
    assert sorted(named) == sorted(layers)
    factored = sum(parameters(owner.members, owner.rank, owner.skip) for owner in plan.owners)
    return factored + sum(parameters((layers[name],), 0, None) for name in plan.dense)


# --- the multiplier ---


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.floats(0, 1), st.sampled_from([None, True, False]))
def test_between_the_best_multiplier_and_the_optimum(seed: int, share: float, skip: bool | None) -> None:
    """No worse than any vertex of the convex hull that the budget allows; never over the budget."""
    groups = random_groups(seed)
    points = all_points(groups, skip)
    least, most = points[:, 0].min(), points[:, 0].max()
    budget = float(least + share * (most - least))
    plan = allocate(groups, budget, parameters, GRID, skip)
    assert plan.loss is not None
    assert plan_cost(plan, groups) <= budget
    vertices = hull(points)
    affordable = vertices[vertices[:, 0] <= budget]
    if len(affordable):
        assert plan.loss <= affordable[:, 1].min() + 1e-9
        # nor than any combination that costs no more than that vertex
        assert plan.loss <= points[points[:, 0] <= affordable[-1, 0], 1].min() + 1e-9
    assert plan.loss >= points[points[:, 0] <= budget, 1].min() - 1e-9
    same = points[np.isclose(points[:, 0], plan_cost(plan, groups))]
    assert np.isclose(same[:, 1], plan.loss).any()
    assert all(owner.rank % GRID == 0 for owner in plan.owners)
    assert skip is None or all(owner.skip == skip for owner in plan.owners)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**16))
def test_more_budget_never_loses_more(seed: int) -> None:
    groups = random_groups(seed)
    costs = all_points(groups)[:, 0]
    losses = [allocate(groups, float(budget), parameters, GRID).loss
              for budget in np.linspace(costs.min(), costs.max(), 25)]
    assert (np.diff(np.array(losses)) <= 1e-9).all()


def test_usually_close_to_the_optimum() -> None:
    excess = []
    for seed in range(20):
        groups = random_groups(seed)
        points = all_points(groups)
        budget = 0.6 * points[:, 0].max()
        loss = allocate(groups, budget, parameters, GRID).loss
        assert loss is not None
        excess.append(loss / points[points[:, 0] <= budget, 1].min() - 1)
    assert np.median(excess) < 0.05


def test_a_budget_below_the_least() -> None:
    groups = random_groups(0)
    least = all_points(groups)[:, 0].min()
    with pytest.raises(BudgetError) as caught:
        allocate(groups, least - 1, parameters, GRID)
    assert caught.value.least == least
    assert plan_cost(allocate(groups, least, parameters, GRID), groups) == least


# --- one choice at a time ---


def single(spectrum: np.ndarray, m: int = 32, n: int = 32, **rounding: float) -> Candidate:
    forms: dict[str, Form] = {"dense": None, "whole": False, "skip": True}
    measured = {forms[key]: (np.array([0.0, 8.0]), np.array([0.0, value])) for key, value in rounding.items()}
    return Candidate((layer("attn_q", m, n),), spectrum, measured)


def test_what_matters_stays_dense() -> None:
    flat, steep = np.ones(32), np.geomspace(1, 1e-9, 32)
    other = Candidate((layer("ffn_up", 32, 32),), steep, {})
    plan = allocate([[[single(flat)]], [[other]]], 1.5 * 1024, parameters, GRID)
    assert list(plan.dense) == ["blk.0.attn_q.weight"]
    assert [owner.name for owner in plan.owners] == ["ffn_up"]
    everything = allocate([[[single(flat)]], [[other]]], 2048, parameters, GRID)
    assert not everything.owners
    assert everything.loss == 0


@pytest.mark.parametrize("common", [True, False])
def test_layers_share_a_projection_where_that_is_cheaper(common: bool) -> None:
    q, k = layer("attn_q", 32, 32), layer("attn_k", 32, 32)
    own = [Candidate((each,), np.where(np.arange(32) < 8, 1.0, 1e-3), {}) for each in (q, k)]
    # two layers that read the same 8 directions, or 8 directions each
    stacked = np.where(np.arange(32) < (8 if common else 16), 2.0 if common else 1.0, 1e-3)
    groups = [[[Candidate((q, k), stacked, {})], own]]
    plan = allocate(groups, 1024, parameters, GRID)
    assert [len(owner.members) for owner in plan.owners] == ([2] if common else [1, 1])


@pytest.mark.parametrize("lost", [0.0, 50.0])
def test_skip_is_chosen_unless_rounding_it_costs_too_much(lost: float) -> None:
    candidate = single(np.geomspace(10, 1e-3, 32), skip=lost, whole=0.0)
    plan = allocate([[[candidate]]], 600, parameters, GRID)
    assert [owner.skip for owner in plan.owners] == [lost == 0]


def test_losses_are_interpolated_between_measured_ranks() -> None:
    spectrum = np.array([8.0, 4.0, 2.0, 1.0])
    measured: dict[Form, tuple[np.ndarray, np.ndarray]] = {
        True: (np.array([0.0, 2.0, 4.0]), np.array([0.0, 1.0, 3.0])), None: (np.zeros(1), np.array([0.5])),
    }
    candidate = Candidate((layer("attn_q", 4, 6), layer("attn_k", 3, 6)), spectrum, measured)
    assert (candidate.m, candidate.n) == (7, 6)
    ranks = np.arange(7)
    cut = np.array([15.0, 7.0, 3.0, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(candidate.losses(ranks, False), cut)
    np.testing.assert_allclose(candidate.losses(ranks, True), cut + np.array([0, 0.5, 1, 2, 3, 3, 3]))
    np.testing.assert_allclose(candidate.losses(ranks, None), np.full(7, 0.5))


# --- other people's rules ---


def several(seed: int = 0) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    shapes = ((64, 64), (32, 64), (96, 64), (64, 96))
    return [Candidate((layer(f"ffn_{number}", m, n),), decaying(min(m, n), rng), {})
            for number, (m, n) in enumerate(shapes)]


def ranks_of(plan: Plan, candidates: list[Candidate]) -> list[int | None]:
    found = {owner.members: owner.rank for owner in plan.owners}
    return [found.get(candidate.members) for candidate in candidates]


def whole_cost(candidates: list[Candidate]) -> float:
    return sum(parameters(candidate.members, 0, None) for candidate in candidates)


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.floats(0.35, 1), st.booleans())
def test_rules_keep_to_the_budget_and_use_it(name: str, seed: int, share: float, skip: bool) -> None:
    candidates = several(seed)
    groups = [[[candidate]] for candidate in candidates]
    budget = share * whole_cost(candidates)
    plan = allocate_by_rule(candidates, RULES[name], budget, parameters, GRID, skip)
    spent = plan_cost(plan, groups)
    assert spent <= budget
    loss = sum(c.spectrum[rank:].sum() for c, rank in zip(candidates, ranks_of(plan, candidates), strict=True)
               if rank is not None)
    assert plan.loss == pytest.approx(loss)
    assert all(owner.skip == skip for owner in plan.owners)
    # no other setting of the knob spends more of the budget
    ranks = RULES[name](candidates, GRID, skip)
    for knob in np.concatenate([np.geomspace(1e-6, 1, 60), 1 - np.geomspace(1e-9, 0.5, 40)]):
        total = 0.0
        for candidate, wanted in zip(candidates, ranks(float(knob)), strict=True):
            rank, whole = max(GRID, wanted), parameters(candidate.members, 0, None)
            fits = rank <= min(candidate.m, candidate.n - 1 if skip else candidate.n)
            total += min(whole, parameters(candidate.members, rank, skip)) if fits else whole
        assert total > budget or total <= spent


def test_uniform_keeps_the_same_ratio() -> None:
    candidates = several()
    budget = 0.7 * whole_cost(candidates)
    plan = allocate_by_rule(candidates, RULES["uniform"], budget, parameters, GRID, True)
    ranks = ranks_of(plan, candidates)
    assert any(ranks == [uniform_rank(c.m, c.n, share, True, GRID) for c in candidates]
               for share in np.linspace(0.5, 1, 501))


def test_energy_keeps_the_same_share() -> None:
    candidates = several()
    plan = allocate_by_rule(candidates, RULES["energy"], 0.5 * whole_cost(candidates), parameters, GRID, True)
    kept, less = [], []
    for candidate, rank in zip(candidates, ranks_of(plan, candidates), strict=True):
        assert rank is not None
        kept.append(candidate.spectrum[:rank].sum() / candidate.spectrum.sum())
        if rank > GRID:
            less.append(candidate.spectrum[: rank - GRID].sum() / candidate.spectrum.sum())
    # one share lies between what all keep and what all would keep a step lower
    assert max(less) < min(kept)


def test_flrc_gives_ranks_in_proportion_to_the_scores() -> None:
    candidates = several()
    plan = allocate_by_rule(candidates, RULES["flrc"], 0.5 * whole_cost(candidates), parameters, GRID, True)
    above, below = [], []
    for candidate, rank in zip(candidates, ranks_of(plan, candidates), strict=True):
        full = min(candidate.m, candidate.n)
        per_rank = candidate.spectrum.sum() * full
        if rank is not None and rank < full:
            below.append(rank / per_rank)
            if rank > GRID:
                above.append((rank - GRID) / per_rank)
    assert len(below) > 1
    assert max(above) <= min(below)


@pytest.mark.parametrize("name", RULES)
def test_rules_refuse_too_small_a_budget(name: str) -> None:
    candidates = several()
    least = sum(GRID * (c.m + c.n - GRID) for c in candidates)
    with pytest.raises(BudgetError) as caught:
        allocate_by_rule(candidates, RULES[name], least - 1, parameters, GRID, True)
    assert caught.value.least == least
    plan = allocate_by_rule(candidates, RULES[name], least, parameters, GRID, True)
    assert ranks_of(plan, candidates) == [GRID] * len(candidates)


# --- budgets of the command line ---


def model_groups(blocks: int = 2, d: int = 256, ff: int = 768) -> list[list[list[Candidate]]]:
    rng = np.random.default_rng(0)

    def candidate(*members: Layer) -> Candidate:
        m = sum(each.m for each in members)
        return Candidate(members, decaying(min(m, members[0].n), rng), {})

    groups = []
    for index in range(blocks):
        qkv = [layer(name, d if name == "attn_q" else d // 2, d, index) for name in NAMES]
        groups.append([[candidate(*qkv)], [candidate(each) for each in qkv]])
        for name, m, n in (("attn_output", d, d), ("ffn_up", ff, d), ("ffn_down", d, ff)):
            groups.append([[candidate(layer(name, m, n, index))]])
    return groups


def plan_bytes(plan: Plan, groups: list[list[list[Candidate]]], type_: Type) -> int:
    layers = {each.tensor: each for group in groups for candidate in group[-1] for each in candidate.members}
    dense = (layers[name] for name in plan.dense)
    return sum(slot.nbytes for owner in plan.owners for slot in factor_slots(owner, type_)) + sum(
        fmt.tensor_bytes(fmt.factor_type(type_, each.n), each.m, each.n) for each in dense)


FIXED = 12_345


def elements_of(groups: list[list[list[Candidate]]]) -> int:
    return sum(each.m * each.n for group in groups for candidate in group[-1] for each in candidate.members)


def budget_of(kind: str, share: float, groups: list[list[list[Candidate]]], type_: Type) -> Budget:
    """`share` of the dense layers."""
    everything = plan_bytes(Plan([], {each.tensor: "" for group in groups for candidate in group[-1]
                                      for each in candidate.members}), groups, type_)
    elements = elements_of(groups)
    if kind == "ratio":
        return Budget("ratio", share)
    if kind == "bpw":
        return Budget("bpw", share * 8 * everything / elements)
    return Budget("file", share * everything + FIXED, FIXED)


def spent(kind: str, plan: Plan, groups: list[list[list[Candidate]]], type_: Type) -> float:
    """In the unit of the budget's value."""
    elements = elements_of(groups)
    if kind == "ratio":
        return plan_cost(plan, groups) / elements
    nbytes = plan_bytes(plan, groups, type_)
    return 8 * nbytes / elements if kind == "bpw" else nbytes + FIXED


kinds = pytest.mark.parametrize("kind", ["ratio", "bpw", "file"])


@kinds
@pytest.mark.parametrize("type_", [Type.F16, Type.Q4_0, Type.Q8_0, Type.Q4_K], ids=lambda type_: type_.name)
@pytest.mark.parametrize("allocation", ["loss", "uniform", "energy", "flrc"])
@pytest.mark.parametrize("method", ["auto", "skipcat", "svd-llm"])
def test_plans_keep_to_every_kind_of_budget(kind: str, type_: Type, allocation: str, method: str) -> None:
    groups = model_groups()
    if method == "skipcat":
        groups = [group[:1] for group in groups]
    elif method == "svd-llm":
        groups = [group[-1:] for group in groups]
    budget = budget_of(kind, 0.8, groups, type_)
    try:
        plan = make_plan(groups, METHODS[method], allocation, budget, type_)
    except UserError:
        assert type_ == Type.Q4_K  # the grid of 256 leaves little choice
        return
    assert spent(kind, plan, groups, type_) <= budget.value * (1 + 1e-12)


@kinds
@pytest.mark.parametrize("allocation", ["loss", "uniform", "energy", "flrc"])
@pytest.mark.parametrize("type_", [Type.F16, Type.Q4_0], ids=lambda type_: type_.name)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_too_small_a_budget_names_the_smallest_possible(
    kind: str, allocation: str, type_: Type, blocks: int
) -> None:
    groups = model_groups(blocks, d=192 + 64 * blocks)
    with pytest.raises(UserError) as caught:
        make_plan(groups, METHODS["auto"], allocation, budget_of(kind, 0.01, groups, type_), type_)
    match = re.search(r"([\d.,]+)(?: bytes)? is the smallest possible", str(caught.value))
    assert match is not None, str(caught.value)
    least = float(match[1].replace(",", ""))
    fixed = FIXED if kind == "file" else 0
    # what is named can be had, and a little less cannot
    make_plan(groups, METHODS["auto"], allocation, Budget(kind, least, fixed), type_)  # type: ignore[arg-type]
    with pytest.raises(UserError):
        make_plan(groups, METHODS["auto"], allocation,
                  Budget(kind, 0.99 * least, fixed), type_)  # type: ignore[arg-type]


# --- sizes ---


@pytest.mark.parametrize(("text", "expected"), [
    ("480MB", 480_000_000), ("480 mb", 480_000_000), ("480M", 480_000_000), ("1000000", 1_000_000),
    ("1000000B", 1_000_000), ("1.5GiB", 3 * 2**29), ("1.5 GiB", 3 * 2**29), ("1.5gi", 3 * 2**29),
    ("2KB", 2000), ("2KiB", 2048), (" 7 MiB ", 7 * 2**20), (".5k", 500), ("3.G", 3 * 10**9), ("1", 1),
])  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1", "-5MB", "1e6", "1TB", "1,000", "1_000", "0", "0MB", "nan",
                                  "inf", "0.4", pytest.param("9" * 400, id="400 digits"),
                                  "5 5", "1.2.3", "0x10", "480MBit", ".", "1iB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


def test_caution_spreads_the_loss() -> None:
    """Two equal layers, one with a spectrum that falls faster: caution takes less from the one."""
    steep, flat = np.exp(-np.arange(32) / 4.0), np.exp(-np.arange(32) / 12.0)
    groups = [[[Candidate((layer("attn_output", 32, 32, index),), spectrum / spectrum.sum() * scale)]]
              for index, (spectrum, scale) in enumerate([(steep, 1.0), (flat, 0.3)])]
    bold, careful = (allocate(groups, 1200, parameters, 2, True, caution) for caution in (0.0, 100.0))

    def shares(plan: Plan) -> list[float]:
        ranks = {owner.members: owner.rank for owner in plan.owners}
        candidates = [group[0][0] for group in groups]
        return [float(each.spectrum[ranks[each.members]:].sum() / each.spectrum.sum())
                if each.members in ranks else 0.0 for each in candidates]

    assert max(shares(careful)) < max(shares(bold))
    assert careful.loss is not None and bold.loss is not None
    assert careful.loss > bold.loss
    assert careful.weighed is not None and careful.weighed > careful.loss
