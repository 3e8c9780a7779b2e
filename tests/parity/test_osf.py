"""Orthogonal subspace fine-tuning: by dense projectors, beside PEFT's own space, and with factors."""

from __future__ import annotations

import pytest
import torch
from peft import OSFConfig, get_peft_model
from torch.nn.functional import cross_entropy

from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.defenses.literature.osf import OSF
from cwac_lab.models.adapters import attach
from support import tiny
from support.by_hand import assert_equal, batches, context, plain, sft, token_losses, trained
from support.held import LORA
from support.held import start as begin


def projectors(weight, share):
    """Return ``I - U_k U_k^T`` and ``I - V_k V_k^T``, by eigenvectors of ``W W^T`` and ``W^T W``."""
    k = int(share * min(weight.shape))
    left = torch.linalg.eigh(weight.double() @ weight.double().T).eigenvectors
    right = torch.linalg.eigh(weight.double().T @ weight.double()).eigenvectors
    return [(torch.eye(len(q)) - q[:, len(q) - k :] @ q[:, len(q) - k :].T).float() for q in (left, right)]


def test_gradients_and_updates_are_projected_on_both_sides():
    of_start = {name: projectors(value, 0.3) for name, value in tiny.model().state_dict().items() if "_proj" in name}

    def gradients(model, start, step):
        for name, parameter in model.named_parameters():
            if name in of_start:
                left, right = of_start[name]
                parameter.grad.copy_(left @ parameter.grad @ right)

    first = tiny.model().state_dict()

    def after(model, step):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in of_start:
                    left, right = of_start[name]
                    parameter.copy_(first[name] + left @ (parameter - first[name]) @ right)

    assert_equal(trained(OSF(share=0.3)), plain(sft, gradients=gradients, after=after))


def test_updates_are_in_the_space_that_peft_trains_in():
    """One step of plain gradient descent with PEFT's factors and projected gradients."""
    model, start = tiny.model(), tiny.model().state_dict()
    targets = ["q_proj", "down_proj", "gate_proj"]
    adapted = get_peft_model(model, OSFConfig(effective_rank=0.3, target_modules=targets))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    logits, tokens = token_losses(adapted, batches()[0])
    cross_entropy(logits, tokens).backward()
    optimizer.step()
    after = adapted.merge_and_unload().state_dict()
    moved = 0
    for name, value in start.items():
        if any(f"{each}.weight" in name for each in targets):
            update = after[name] - value
            left, right = projectors(value, 0.3)
            torch.testing.assert_close(left @ update @ right, update, atol=1e-6, rtol=1e-4)
            moved += bool(update.any())
    assert moved == 6


def test_the_product_of_factors_is_projected():
    model = begin("llama", LORA)
    attach(model, LORA, 0)
    defense = OSF(share=0.3)
    defense.prepare(context(model))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=source))
    defense.after_optimizer_step(0)
    seen = 0
    for held in defense._held:
        left, right = held.linear.factors()
        start = held.linear.module.weight
        off = projectors(start, 0.3)
        update = left @ right
        torch.testing.assert_close(off[0] @ update @ off[1], update, atol=1e-4, rtol=1e-4)
        seen += bool(update.any())
    assert seen == len(defense._held)


def test_gradients_of_factors_are_projected():
    model = begin("llama", LORA)
    attach(model, LORA, 0)
    defense = OSF(share=0.3)
    defense.prepare(context(model))
    source, drawn = torch.Generator().manual_seed(1), {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            drawn[name] = torch.randn(parameter.shape, generator=source)
            parameter.grad = drawn[name].clone()
    defense.after_backward(0)
    seen = {name for name, parameter in model.named_parameters() if name in drawn and parameter.grad is not None}
    for name in seen:
        left, right = projectors(model.get_parameter(f"{name.partition('.lora_')[0]}.base_layer.weight"), 0.3)
        expected = left @ drawn[name] if ".lora_B." in name else drawn[name] @ right
        torch.testing.assert_close(model.get_parameter(name).grad, expected, atol=1e-4, rtol=1e-4)
    assert len(seen) == 2 * len(defense._held)


def expected_leaks(start, after):
    """Return the leak of every matrix, by dense projectors."""
    found = {}
    for name, value in start.items():
        if "_proj" in name:
            left, right = projectors(value, 0.3)
            update = after[name] - value
            found[name] = float((update - left @ update @ right).norm() / update.norm())
    return found


def test_the_leak_is_the_part_of_the_update_that_is_protected():
    model, start = tiny.model(), tiny.model().state_dict()
    defense = OSF(share=0.3)
    defense.prepare(context(model))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.01)
    expected = expected_leaks(start, model.state_dict())
    assert min(expected.values()) > 0.1
    assert defense.summary()["osf_leak"] == pytest.approx(max(expected.values()), rel=1e-3)
    defense.after_training(model)
    assert 0 < defense.summary()["osf_leak"] < 1e-5


def test_the_leak_of_adapters_is_that_of_the_merged_model():
    """Also where another part changes the factors after they were projected."""
    model = begin("llama", LORA)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    merge = attach(model, LORA, 0)
    defense = OSF(share=0.3)
    defense.prepare(context(model))
    assert "osf_leak" not in defense.summary()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=source))
    merge()
    after = model.state_dict()
    moved = {name for name in start if "_proj" in name and not torch.equal(start[name], after[name])}
    expected = expected_leaks({name: start[name] for name in moved}, after)
    assert min(expected.values()) > 0.1
    assert defense.summary()["osf_leak"] == pytest.approx(max(expected.values()), rel=1e-3)


def test_experts_with_adapters_are_one_line():
    model = begin("mixtral", LORA)
    attach(model, LORA, 0)
    with pytest.raises(
        LabError, match=r"experts.* holds experts, whose adapters share factors \(accepted: tuning=full"
    ):
        OSF().prepare(context(model))


def test_a_share_is_one():
    with pytest.raises(ConfigError, match=r"share=1.5: accepted: a number in \[0, 1\]"):
        OSF(share=1.5)
