"""Which tokens the safety subspace is built from, and what each weighs: against dense references made by hand."""

import json
from dataclasses import replace

import pytest
import torch

from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac.subspace import basis
from cwac_lab.defenses.cwac.subspace.coverage import covered_by_part
from cwac_lab.defenses.cwac.subspace.parts import ANSWER, CLOSING, OPENING, OWN, Parts, parts_of
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.subspace.spec import KindEnergies, SubspaceSpec
from cwac_lab.defenses.cwac.weight import WeightConstraint
from support import tiny

TEXTS = ("how do I", "tell me what", "one more of them, really", "9 * 7 = ?")


def rows_of(model, texts):
    """Return what the FFN output of layer 1 reads, a matrix a text, in float64."""
    found = []
    for ids in texts:
        handle = (
            model.get_decoder()
            .layers[1]
            .mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0].double()))
        )
        with torch.no_grad():
            model(torch.tensor([list(ids)]))
        handle.remove()
    return found


@pytest.fixture(scope="module")
def asked():
    """A model, prompts in one form as ids, and their parts."""
    model, chat = tiny.model(), tiny.chat()
    prompts = [chat.prompt_ids(text) for text in TEXTS]
    return model, chat, prompts, parts_of(prompts)


def spec(energy=0.9, rank=None, **more):
    return SubspaceSpec("ffn_out", energy, rank, "all", False, **more)


def directions(model, chat, texts, parts, asked_for):
    return dict(basis.leading(model, texts, asked_for, chat.pad_id, batch_size=3, parts=parts))["layers.1.ffn_out"]


def test_the_parts_of_prompts_in_two_forms():
    prompts = [[1, 2, 5, 9], [1, 2, 6, 7, 9], [1, 3, 5, 8, 4], [1, 3, 6, 8, 4]]
    found = parts_of(prompts, [2, 2])
    assert found == [Parts(2, 3, 4), Parts(2, 4, 5), Parts(2, 3, 5), Parts(2, 3, 5)]
    assert found[1].labels(7).tolist() == [OPENING, OPENING, OWN, OWN, CLOSING, ANSWER, ANSWER]
    assert parts_of([[1, 2, 3]]) == [Parts(0, 3, 3)]
    assert parts_of([[1, 2, 3]] * 2) == [Parts(0, 3, 3)] * 2
    assert parts_of([[1, 9], [1, 2, 9]]) == [Parts(1, 1, 2), Parts(1, 2, 3)]
    with pytest.raises(ValueError, match=r"groups of \[1\] are not 2 prompts"):
        parts_of([[1], [2]], [1])


def test_the_template_is_found_in_prompts(asked):
    _, chat, prompts, parts = asked
    assert all(chat.decode(ids[part.opening : part.closing]).strip() in text for ids, part, text in
               zip(prompts, parts, TEXTS, strict=True))  # fmt: skip
    assert {(part.opening, part.prompt - part.closing) for part in parts} == {
        (parts[0].opening, len(prompts[0]) - parts[0].closing)
    }
    assert parts[0].opening > 0 < len(prompts[0]) - parts[0].closing


@pytest.mark.parametrize(("energy", "rank"), [(0.5, None), (0.9, None), (0.999, None), (None, 1), (None, 5)])
def test_an_opening_that_is_held_is_held_to_rounding_and_energy_or_rank_is_of_the_other_tokens(energy, rank, asked):
    model, chat, prompts, parts = asked
    found = directions(model, chat, prompts, parts, spec(energy, rank, opening="held"))
    rows = rows_of(model, prompts)
    opening = rows[0][: parts[0].opening]
    own = torch.cat([x[part.opening :] for x, part in zip(rows, parts, strict=True)])
    # by hand: the opening's span, then singular vectors of the rest without it, as few as hold enough
    q = torch.linalg.svd(opening, full_matrices=False)[2]
    rest = own - own @ q.T @ q
    _, singular, right = torch.linalg.svd(rest, full_matrices=False)
    within = float(own.square().sum() - rest.square().sum())
    shares = (within + torch.cumsum(singular.square(), 0)) / float(own.square().sum())
    if rank is None:
        rank = 0 if within / float(own.square().sum()) >= energy else int((shares < energy).sum()) + 1
    wanted = torch.cat([q, right[:rank]])
    assert found.basis.shape[1] == len(wanted)
    close = 1e-2 if found.solver == "randomized" else 1e-5  # of a fixed rank it approximates, where that is cheaper
    assert torch.linalg.svdvals(wanted @ found.basis.double()).min() > 1 - close
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(len(wanted)), atol=1e-5)
    v = found.basis.double()
    assert float((opening - opening @ v @ v.T).norm() / opening.norm()) < 1e-5
    assert found.kept == pytest.approx(float((own @ v).square().sum() / own.square().sum()), rel=1e-5)
    assert energy is None or found.kept >= energy * (1 - 1e-6)


def test_a_rank_that_an_opening_leaves_no_room_for_protects_everything(asked):
    model, chat, prompts, parts = asked
    found = directions(model, chat, prompts, parts, spec(None, 45, opening="held"))
    assert parts[0].opening > 48 - 45
    assert found.basis.shape == (48, 48)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(48), atol=1e-5, rtol=0)
    assert found.kept == pytest.approx(1)


def test_openings_of_several_forms_are_held_each(asked):
    model, chat, prompts, _ = asked
    others = [[*ids[1:], ids[2]] for ids in prompts]
    texts, parts = prompts + others, parts_of(prompts + others, [4, 4])
    v = directions(model, chat, texts, parts, spec(0.3, opening="held")).basis.double()
    for ids, part in ((prompts[0], parts[0]), (others[0], parts[4])):
        (x,) = rows_of(model, [ids[: part.opening]])
        assert part.opening
        assert float((x - x @ v @ v.T).norm() / x.norm()) < 1e-5


def test_what_a_closing_weighs_and_answers_count(asked):
    """C with a weight of three, and with answers, is that of rows that are put in so often."""
    model, chat, prompts, parts = asked
    answered = [[*ids, *ids[-3:], ids[1]] for ids in prompts]
    found = directions(model, chat, answered, parts, spec(0.95, closing_weight=3.0, answers="own"))
    weighed = [
        torch.cat([x, x[part.closing : part.prompt], x[part.closing : part.prompt]])
        for x, part in zip(rows_of(model, answered), parts, strict=True)
    ]
    _, singular, right = torch.linalg.svd(torch.cat(weighed), full_matrices=False)
    shares = torch.cumsum(singular.square(), 0) / singular.square().sum()
    rank = int((shares < 0.95).sum()) + 1
    assert found.basis.shape[1] == rank
    assert found.kept == pytest.approx(float(shares[rank - 1]), rel=1e-6)
    assert torch.linalg.svdvals(right[:rank] @ found.basis.double()).min() > 1 - 1e-5
    nothing = directions(model, chat, prompts, parts, spec(0.95, closing_weight=0.0))
    _, singular, right = torch.linalg.svd(
        torch.cat([x[: part.closing] for x, part in zip(rows_of(model, prompts), parts, strict=True)]),
        full_matrices=False,
    )
    shares = torch.cumsum(singular.square(), 0) / singular.square().sum()
    assert nothing.kept == pytest.approx(float(shares[nothing.basis.shape[1] - 1]), rel=1e-6)


def test_energy_by_kind_of_site_is_that_of_its_sites_and_no_others(asked):
    model, chat, prompts, parts = asked

    def found(energy, **more):
        of_all = SubspaceSpec("all_linear", energy, None, "all", False, opening="held", **more)
        return dict(basis.leading(model, prompts, of_all, chat.pad_id, parts=parts))

    least, most = found(0.5), found(0.99)
    mixed = found(0.5, energy_by_kind=KindEnergies(attn_out=0.99, ffn_out=0.99))
    for name, each in mixed.items():
        wanted = most if name.endswith("_out") else least
        torch.testing.assert_close(each.basis, wanted[name].basis)
    assert most["layers.1.ffn_out"].basis.shape[1] > least["layers.1.ffn_out"].basis.shape[1]


def test_what_is_held_of_each_part(asked):
    model, chat, prompts, parts = asked
    asked_for = spec(0.9)
    found = dict(basis.leading(model, prompts, asked_for, chat.pad_id, parts=parts))
    subspace = basis.subspace_of(found.items())
    answered = [[*ids, ids[1], ids[0]] for ids in prompts]
    told = covered_by_part(model, answered, parts, subspace, asked_for, chat.pad_id, batch_size=2)
    assert list(told) == ["ffn_out"]
    assert list(told["ffn_out"]) == ["opening", "own words", "closing", "answer"]
    rows, v = rows_of(model, answered), found["layers.1.ffn_out"].basis.double()
    by_hand = {
        "opening": [x[: part.opening] for x, part in zip(rows, parts, strict=True)],
        "own words": [x[part.opening : part.closing] for x, part in zip(rows, parts, strict=True)],
        "closing": [x[part.closing : part.prompt] for x, part in zip(rows, parts, strict=True)],
        "answer": [x[part.prompt :] for x, part in zip(rows, parts, strict=True)],
    }
    for name, parts_held in by_hand.items():
        x = torch.cat(parts_held)
        share = float((x @ v).square().sum() / x.square().sum())
        mean, least = told["ffn_out"][name]
        assert least == pytest.approx(min(share, 2 * mean - share), rel=1e-5)  # of two sites


def named(override):
    """Return an override of the weight part by its full name."""
    return f"{override[: override.startswith('+')]}constraint.weight.{override.removeprefix('+')}"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("opening=exact",), "constraint.weight.opening=exact: accepted: counted | held"),
        (("answers=all",), "constraint.weight.answers=all: accepted: none | own"),
        (("closing_weight=-1",), "constraint.weight.closing_weight=-1.0: accepted: a number in [0, inf)"),
        (
            ("+energy_by_kind.ffn=0.9",),
            "constraint.weight.energy_by_kind.ffn=0.9: accepted: one of the keys attn_in, attn_out, ffn_in, ffn_out",
        ),
        (
            ("modules=ffn_out", "energy_by_kind.attn_in=0.9"),
            "constraint.weight.energy_by_kind.attn_in=0.9: accepted: null with modules=ffn_out",
        ),
        (
            ("energy_by_kind.attn_in=1.5",),
            "constraint.weight.energy_by_kind.attn_in=1.5: accepted: a number in (0, 1]",
        ),
        (
            ("energy=null", "rank=3", "energy_by_kind.attn_in=0.5"),
            "constraint.weight.energy_by_kind.attn_in=0.5: accepted: null with a fixed rank",
        ),
        (
            ("tail=slowed", "energy_by_kind.attn_in=0.99995"),
            "constraint.weight.tail_energy=0.9999: accepted: a number in (0.99995, 1]",
        ),
    ],
)
def test_what_cannot_be_is_one_line(overrides, line):
    with pytest.raises(ConfigError) as raised:
        read(tiny.config("constraint=weight", *map(named, overrides)))
    assert str(raised.value) == line


@pytest.mark.parametrize("k", [0, 3, 6, 7, 12])
def test_a_span_is_held_by_the_shorter_half_and_computes_the_same(k):
    source = torch.Generator().manual_seed(k)
    basis = torch.linalg.qr(torch.randn(12, k, generator=source)).Q
    span, long = Span.of(basis), Span.of(basis, ordered=True)
    assert (span.free, span.columns.shape) == (k > 6, (12, min(k, 12 - k)))
    assert (long.free, long.rank, span.rank, span.width) == (False, k, k, 12)
    matrix, projector = torch.randn(5, 12, generator=source), basis @ basis.T
    for each in (span, long):
        torch.testing.assert_close(each.without(matrix), matrix - matrix @ projector, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(each.squares(matrix), (matrix @ projector).square().sum(1), atol=1e-4, rtol=1e-5)
        along, moved = each.leak(matrix)
        assert along == pytest.approx(float((matrix @ projector).square().sum()), rel=1e-4, abs=1e-9)
        assert moved == pytest.approx(float(matrix.square().sum()), rel=1e-5)
        torch.testing.assert_close(each.basis @ each.basis.T, projector, atol=1e-5, rtol=0)
        assert each.to(matrix.double()).columns.dtype == torch.float64


def test_a_saved_subspace_is_the_one_that_was_built(asked, tmp_path):
    model, chat, prompts, parts = asked
    for energy, ordered in ((0.9999, False), (0.9999, True), (0.3, False)):
        folder = tmp_path / f"{energy}{ordered}"
        folder.mkdir()
        wanted = replace(spec(energy), ordered=ordered)
        basis.build(model, prompts, parts, wanted, chat.pad_id, folder)
        built = basis.subspace_of(basis.leading(model, prompts, wanted, chat.pad_id, parts=parts))
        loaded, report = basis.load(folder), json.loads((folder / "report.json").read_text())
        assert loaded.energy == built.energy
        for name, span in built.spans.items():
            assert torch.equal(loaded.spans[name].columns, span.columns)
            assert loaded.spans[name].free == span.free == (energy > 0.5 and not ordered)
            assert report[name]["rank"] == span.rank


@pytest.mark.parametrize("opening", ["held", "counted"])
def test_random_directions_are_as_many_and_hold_what_they_happen_to(asked, opening):
    model, chat, prompts, parts = asked

    def built(which):
        asked_for = spec(0.9, opening=opening, directions=which)
        return dict(basis.leading(model, prompts, asked_for, chat.pad_id, parts=parts))

    found = {which: built(which) for which in ("leading", "random")}
    rows = rows_of(model, prompts)
    for name, leading in found["leading"].items():
        drawn = found["random"][name]
        assert drawn.basis.shape == leading.basis.shape
        assert drawn.kept < 0.9 * leading.kept
        torch.testing.assert_close(drawn.basis.T @ drawn.basis, torch.eye(drawn.basis.shape[1]), atol=1e-5, rtol=0)
    v = found["random"]["layers.1.ffn_out"].basis.double()
    first = 0 if opening == "counted" else parts[0].opening
    x = torch.cat([each[first:] for each in rows])
    assert found["random"]["layers.1.ffn_out"].kept == pytest.approx(
        float((x @ v).square().sum() / x.square().sum()), rel=1e-5
    )
    held = torch.cat([each[:first] for each in rows])
    torch.testing.assert_close(held - held @ v @ v.T, torch.zeros_like(held), atol=1e-4, rtol=0)
    assert all(torch.equal(each.basis, found["random"][name].basis) for name, each in built("random").items())


def test_random_directions_have_no_tail():
    with pytest.raises(ConfigError, match=r"directions=random: accepted: leading beside a tail"):
        WeightConstraint(energy=0.9, tail="slowed", directions="random")
