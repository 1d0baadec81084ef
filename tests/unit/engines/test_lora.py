"""Low-rank adapters: where they go, what is trained, and that merging them is what peft's own merging is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_dist.engines.lora import check_targets
from rlhf_dist.engines.model_tensors import ADAPTER, model_tensors, trained_tensors
from rlhf_dist.engines.policy_model import PolicyModel
from rlhf_dist.engines.settings import LoRASettings
from rlhf_dist.errors import ModelError
from rlhf_dist.experience.sequences import sequence_batch
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tied to the embedding (qwen2), not tied (llama), and with weights that are stored [in, out] (gpt2)."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_causal_lm(folder / "qwen2", ["a few words"], seed=0, hidden_size=32, num_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1, tie_word_embeddings=False))
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    llama.save_pretrained(folder / "llama")
    gpt2.save_pretrained(folder / "gpt2")
    return folder


def policy(model, *, dtype=torch.float32, seed=0, gradient_checkpointing=False, **lora):
    return PolicyModel(
        str(model),
        dtype=dtype,
        lora=LoRASettings(**lora),
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
    )


def with_some_adapters(model, **options):
    """A policy whose adapters are not the zeros that they start as."""
    made = policy(model, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def plain(model, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def merged_by_peft(made, model):
    """The plain model's parameters by all their names, after peft has merged the same adapters into it."""
    reference = get_peft_model(plain(model), made.lm.peft_config[ADAPTER])
    ours = {f"base_model.model.{tensor.names[0]}": tensor.weight for tensor in trained_tensors(made.lm)}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours.pop(name))
    assert not ours
    return dict(reference.merge_and_unload().named_parameters(remove_duplicate=False))


def logprobs(made):
    """Of two sequences with responses of three and one tokens."""
    prompts, responses = [[3, 4, 5], [6]], [[7, 8, 9], [10]]
    batch = sequence_batch(
        [np.array(each) for each in prompts], [np.array(each) for each in responses], packed=made.packs
    )
    return made(batch, with_entropy=False)[0]


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ("qwen2", {}),
        ("qwen2", {"rank": 2, "alpha": 1, "target_modules": ["q_proj", "mlp.down_proj"]}),
        ("llama", {"rank": 64, "alpha": 64, "target_modules": ["lm_head", "v_proj"]}),
        ("gpt2", {}),
    ],
)
def test_merged_tensors_are_those_of_peft(models, model, lora):
    made = with_some_adapters(models / model, **lora)
    expected = merged_by_peft(made, models / model)
    merged = {name: tensor.value() for tensor in model_tensors(made.lm) for name in tensor.names}
    start = dict(plain(models / model).named_parameters(remove_duplicate=False))
    assert merged.keys() == expected.keys() == start.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=1e-6)
    changed = {name for name in merged if not torch.equal(merged[name], start[name])}
    adapted = {
        name.removesuffix(".base_layer.weight")
        for name, _ in made.lm.named_parameters()
        if "base_layer.weight" in name
    }
    assert changed == {f"{name}.weight" for name in adapted}
    assert changed


def test_what_is_merged_computes_what_the_adapters_do(models):
    made = with_some_adapters(models / "qwen2")
    merged = policy(models / "qwen2")
    values = {name: tensor.value() for tensor in model_tensors(made.lm) for name in tensor.names}
    whole = PolicyModel(str(models / "qwen2"), dtype=torch.float32)
    whole.lm.load_state_dict(values)
    torch.testing.assert_close(logprobs(whole), logprobs(made), rtol=0, atol=1e-5)
    assert (logprobs(merged) - logprobs(made)).abs().max() > 0.1


def test_tied_tensors_are_one_under_all_their_names(models):
    by_name = {tensor.names[0]: tensor.names for tensor in model_tensors(policy(models / "qwen2").lm)}
    assert by_name["model.embed_tokens.weight"] == ("model.embed_tokens.weight", "lm_head.weight")
    assert by_name["model.layers.1.self_attn.q_proj.weight"] == ("model.layers.1.self_attn.q_proj.weight",)
    assert by_name["model.layers.1.self_attn.q_proj.bias"] == ("model.layers.1.self_attn.q_proj.bias",)


def test_a_product_of_small_numbers_by_hand(models):
    """rank 1, alpha 2: W + 2 B A."""
    made = policy(models / "qwen2", rank=1, alpha=2, target_modules=["layers.0.self_attn.q_proj"])
    a, b = (tensor.weight for tensor in trained_tensors(made.lm))
    (adapted,) = [tensor for tensor in model_tensors(made.lm) if tensor.layer is not None]
    with torch.no_grad():
        adapted.weight.zero_()
        a.zero_()
        b.zero_()
        a[0, 3], b[5, 0] = 0.5, 0.25
    merged = adapted.value()
    assert merged[5, 3] == 0.25
    assert merged.count_nonzero() == 1
    assert adapted.num_bytes == 32 * 32 * 4


def test_merging_rounds_once(models):
    made = with_some_adapters(models / "qwen2", dtype=torch.bfloat16)
    for tensor in model_tensors(made.lm):
        value = tensor.value()
        assert value.dtype == torch.bfloat16
        if tensor.layer is not None:
            weight, a, b = (each.detach().double() for each in tensor.parameters)
            exact = weight + 16 / 8 * (b @ a)
            assert ((value.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-7).all()


def test_merging_leaves_the_model_as_it_is(models):
    made = with_some_adapters(models / "qwen2")
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    for tensor in model_tensors(made.lm):
        tensor.value()
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.named_parameters())


# ----------------------------------------------------------------------------------------------- training


def test_the_policy_starts_as_its_checkpoint(models):
    whole = PolicyModel(str(models / "qwen2"), dtype=torch.float32)
    made = policy(models / "qwen2")
    assert made.packs
    assert whole.packs
    assert torch.equal(logprobs(made), logprobs(whole))


def test_the_seed_alone_decides_where_adapters_start(models):
    random_state = torch.get_rng_state()
    first, second, other = (
        [tensor.weight for tensor in trained_tensors(policy(models / "qwen2", seed=seed).lm)]
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_steps_move_adapters_and_leave_everything_else_bit_for_bit(models):
    made = policy(models / "qwen2")
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    optimizer = torch.optim.AdamW([each for each in made.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -logprobs(made).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    moved = {name for name, parameter in made.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert sum(tensor.num_elements for tensor in trained_tensors(made.lm)) == 2 * 8 * (4 * 64 + 3 * 128)


def test_recomputed_activations_give_the_same_gradients(models):
    gradients = []
    for checkpointing in (False, True):
        made = with_some_adapters(models / "qwen2", gradient_checkpointing=checkpointing)
        logprobs(made).sum().backward()
        gradients.append([tensor.weight.grad for tensor in trained_tensors(made.lm)])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-6)
        assert kept.abs().max() > 0


# ------------------------------------------------------------------------------------------ target modules


def test_names_that_are_there_are_accepted_without_loading_weights(models, tmp_path):
    (tmp_path / "config.json").write_text((models / "qwen2" / "config.json").read_text())
    check_targets(str(tmp_path), LoRASettings())
    check_targets(str(tmp_path), LoRASettings(target_modules=["q_proj", "layers.1.mlp.up_proj"]))
    check_targets(str(models / "gpt2"), LoRASettings(target_modules=["c_attn"]))
    check_targets(str(models / "llama"), LoRASettings(target_modules=["lm_head"]))


KNOWN = "there are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("q_porj", "; did you mean 'q_proj'?"),
        ("mlp", ""),
        ("embed_tokens", ""),
        ("lm_head", ""),
    ],
)
def test_a_name_that_no_layer_has_is_refused(models, target, hint):
    model = str(models / "qwen2")
    settings = LoRASettings(target_modules=["v_proj", target])
    for check in (
        lambda: check_targets(model, settings),
        lambda: policy(model, target_modules=["v_proj", target]),
    ):
        with pytest.raises(ModelError) as caught:
            check()
        assert str(caught.value) == (
            f"learner.lora.target_modules: {target!r} names no linear layer of policy model {model!r} with a "
            f"weight of its own{hint}; {KNOWN}"
        )
