"""The operations of a training beside those that torch counts while it computes."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from cwac_lab.data.batches import collate
from cwac_lab.models.adapters import TuningConfig, attach
from cwac_lab.models.answers import answer_loss
from cwac_lab.models.sites import decoder_layers
from cwac_lab.run import operations
from support import tiny

QUESTION = "Tell me in one word whether this review of a film is good or bad: "
# Attention multiplies queries, keys and values too, which the count leaves out; on rows this short that is little.
CLOSE = 0.05


def counted(model, rows):
    with FlopCounterMode(display=False) as counter:
        answer_loss(model, collate(rows, tiny.chat().pad_id)).backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def rows():
    chat = tiny.chat()
    reviews = ["a b c", "d e f", "g h i", "j k l"]  # of one length: no padding
    return [chat.encode(QUESTION + review, "good") for review in reviews]


# Of the opening the last layer computes what nobody reads, so backward leaves it out: little in eight layers.
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024, "num_hidden_layers": 8}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("trains", ["all", "layers"])
def test_it_is_what_torch_counts(architecture, trains, rows):
    model = tiny.model(architecture, **WIDE).train()
    model.requires_grad_(trains == "all")
    for weight in decoder_layers(model).parameters():
        weight.requires_grad_(True)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    found = operations.training(model, rows, [range(len(rows))], trained)
    assert found == pytest.approx(counted(model, rows), rel=CLOSE)


@pytest.mark.parametrize("rank", [8, 64, 256])
def test_factors_beside_the_layers_are_what_torch_counts(rank, rows):
    """With 256 they have more numbers than the layers."""
    model = tiny.model(**WIDE)
    tuned = tiny.model(**WIDE).train()
    attach(tuned, TuningConfig(method="lora", rank=rank, alpha=rank, modules="all_linear"), seed=0)
    trained = sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
    found = operations.training(model, rows, [range(len(rows))], trained, factors=trained)
    assert found == pytest.approx(counted(tuned, rows), rel=CLOSE)


def test_an_opening_counts_once_a_step(rows):
    model = tiny.model()
    whole = operations.training(model, rows, [range(4)], model.num_parameters())
    alone = operations.training(model, rows, [[at] for at in range(4)], model.num_parameters())
    assert whole < 0.6 * alone
    assert operations.training(model, rows, [range(4)], model.num_parameters(), alone=True) == alone
    again = operations.training(model, rows, [range(4)], model.num_parameters(), checkpointing=True)
    assert again == pytest.approx(alone * 8 / 6, rel=0.1)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "llama"])
def test_a_token_goes_through_its_own_experts_only(architecture):
    model = tiny.model(architecture, **tiny.MIXTURES.get(architecture, {}))
    whole = used = sum(each.numel() for each in model.model.layers.parameters())
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            each_expert = sum(part[0].numel() for part in layer.mlp.experts.parameters())
            used -= each_expert * (layer.mlp.experts.num_experts - model.config.num_experts_per_tok)
    assert operations.used_share(model) == pytest.approx(used / whole)
    assert (operations.used_share(model) < 1) is (architecture != "llama")
