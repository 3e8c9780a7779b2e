"""Why one constraint is not enough: constructed cases in which each holds exactly and the model drifts all the same."""

import copy

import torch

from cwac_lab.data.batches import collate
from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.diagnostics.linear import LinearProbe
from cwac_lab.diagnostics.seen import Reader
from cwac_lab.models.capture import layer_outputs
from cwac_lab.models.chat import IGNORED, Encoded
from cwac_lab.models.sites import decoder_layers
from support import tiny
from support.held import PROMPTS, context, train

CHAT = tiny.chat()
HELD = [CHAT.prompt_ids(prompt) for prompt in PROMPTS]
UNSEEN = [CHAT.prompt_ids(f"an unseen way to ask for thing {i}, please") for i in range(5)]


def last_logits(model, prompts):
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts])


def measured(defense, prompts=HELD, **settings):
    """Train under a defence; returns the drift of FFN outputs, and the largest change of a first answer logit."""
    start = tiny.model()
    held = {name: value.clone() for name, value in start.state_dict().items()}
    reader = Reader([Encoded(ids, [IGNORED] * len(ids)) for ids in prompts], CHAT.pad_id)
    probe = LinearProbe(reader.read(start).inputs, held.__getitem__)
    model, _ = train(defense, learning_rate=3e-3, **settings)
    with torch.no_grad():
        return probe.measure(model, reader.read(model).inputs), float(
            (last_logits(model, prompts) - last_logits(start, prompts)).abs().max()
        )


def test_weights_held_exactly_leave_behaviour_free_through_other_matrices():
    """(a) ``dW h0 = 0`` on every reference prompt, and what the model says to them changes."""
    drifts, changed = measured(WeightConstraint(modules="ffn_out", energy=1.0, trainable="all", tokens="all"))
    assert max(drift.weight for drift in drifts) < 1e-4
    assert min(drift.activation for drift in drifts) > 0.05
    assert changed > 0.1


def test_everything_held_exactly_leaves_nothing_free_on_the_reference_prompts():
    """The way out on the weights' side: all linear layers, and nothing else trains."""
    drifts, changed = measured(WeightConstraint(modules="all_linear", energy=1.0, tokens="all"))
    assert max(drift.total for drift in drifts) < 1e-3
    assert changed < 1e-2


def test_activations_held_exactly_on_some_prompts_are_free_on_others():
    """(b) An update that no reference prompt can see: the penalty is zero, and unseen prompts' activations move."""
    start = tiny.model()
    defense = ActivationConstraint(strength=1, n_latents=6, depths=[0.9], positions="all", every_n_steps=1)
    few = HELD[:1]  # fewer tokens than the layer is wide, as with a model of thousands of dimensions
    defense.prepare(context(start, defense, few))
    inputs = []
    down = decoder_layers(start)[-1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for ids in few:
            start(input_ids=torch.tensor([ids]))
    handle.remove()
    seen = torch.linalg.svd(torch.cat(inputs), full_matrices=True).Vh
    rank = int(torch.linalg.matrix_rank(torch.cat(inputs), rtol=1e-4))
    assert rank < seen.shape[0]
    moved = copy.deepcopy(start)
    with torch.no_grad():
        decoder_layers(moved)[-1].mlp.down_proj.weight.add_(3 * torch.randn(32, 1) @ seen[rank : rank + 1])
    penalty = defense.loss_terms(moved, collate([CHAT.encode("a", "b")], CHAT.pad_id), 0)["safety"]
    with torch.no_grad():
        before, now = (
            torch.cat(
                [layer_outputs(m, [1], torch.tensor([ids]), torch.ones(1, len(ids)).long())[1][0] for ids in UNSEEN]
            )
            for m in (start, moved)
        )
    assert float(penalty) < 1e-6
    assert float((now - before).norm() / before.norm()) > 1e-3


def test_the_bound_holds_on_trained_models_and_holding_weights_lowers_it():
    """(c) On unseen prompts: with the weights held, what is left is what reaches beyond V and what inputs moved."""
    start = tiny.model()
    held = {name: value.clone() for name, value in start.state_dict().items()}
    reader = Reader([Encoded(ids, [IGNORED] * len(ids)) for ids in UNSEEN], CHAT.pad_id)
    probe = LinearProbe(reader.read(start).inputs, held.__getitem__)
    bounds = {}
    for name, defense in {
        "none": Composite(),
        "weight": WeightConstraint(modules="all_linear", energy=0.99, tokens="all"),
    }.items():
        model, _ = train(defense, learning_rate=3e-3)
        space = context(tiny.model(), WeightConstraint(modules="ffn_out", energy=0.99, tokens="all")).subspace
        drifts = probe.measure(model, reader.read(model).inputs, space.spans, bounds=True)
        assert all(drift.total <= drift.bound + 1e-6 for drift in drifts)
        bounds[name] = max(drift.bound for drift in drifts)
    assert bounds["weight"] < bounds["none"]
