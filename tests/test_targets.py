# SPDX-License-Identifier: Apache-2.0
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pss_param.attaching import attach
from pss_param.errors import ArgumentError
from pss_param.matricize import LINEAR
from pss_param.roles import Names, role_of
from pss_param.smoothing import Smoothing, smooth
from pss_param.targets import (
    MAYBE_A_TABLE,
    PRESETS,
    Selection,
    TargetRules,
    TensorInfo,
    select_companions,
    select_parameters,
    select_tensors,
)

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(name: str, **config) -> nn.Module:
    kind, task = name.split(":")
    torch.manual_seed(0)
    return getattr(transformers, task)(getattr(transformers, kind)(**config))


T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
FAMILIES = {
    "llama": ("LlamaConfig:LlamaForCausalLM", {**SIZES, **IDS, "num_key_value_heads": 2}),
    "mistral": ("MistralConfig:MistralForCausalLM", {**SIZES, **IDS, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config:Qwen3ForCausalLM", {**SIZES, **IDS, "num_key_value_heads": 2, "head_dim": 8}),
    "phi3": ("Phi3Config:Phi3ForCausalLM", {**SIZES, **IDS, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config:GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXConfig:GPTNeoXForCausalLM", {**SIZES, **IDS}),
    "bloom": ("BloomConfig:BloomForCausalLM", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}),
    "falcon": ("FalconConfig:FalconForCausalLM", {**SIZES, **IDS, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "bert": ("BertConfig:BertForSequenceClassification", SIZES),
    "vit": ("ViTConfig:ViTForImageClassification", {**SIZES, "image_size": 16, "patch_size": 8}),
    "t5": ("T5Config:T5ForConditionalGeneration", T5),
    "t5_gated": ("T5Config:T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "mixtral": ("MixtralConfig:MixtralForCausalLM", {**SIZES, **IDS, "num_key_value_heads": 2, "num_local_experts": 3}),
    "gpt_oss": (
        "GptOssConfig:GptOssForCausalLM",
        {**SIZES, **IDS, "num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 8},
    ),
}  # fmt: skip

GATED = {"q": 2, "k": 2, "v": 2, "o": 2, "gate": 2, "up": 2, "down": 2}
PLAIN = {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2}
FUSED = {"qkv": 2, "o": 2, "up": 2, "down": 2}
MOE = {"q": 2, "k": 2, "v": 2, "o": 2, "router": 2, "expert_gate_up": 2, "expert_down": 2}
ROLES = {
    "llama": GATED, "mistral": GATED, "qwen3": GATED,
    "phi3": {"qkv": 2, "o": 2, "gate_up": 2, "down": 2},
    "gpt2": FUSED, "gpt_neox": FUSED, "bloom": FUSED, "falcon": FUSED,
    "bert": PLAIN, "vit": PLAIN,
    "t5": {"q": 6, "k": 6, "v": 6, "o": 6, "up": 4, "down": 4},
    "t5_gated": {"q": 6, "k": 6, "v": 6, "o": 6, "gate": 4, "up": 4, "down": 4},
    "mixtral": MOE, "gpt_oss": MOE,
}  # fmt: skip


EVERY_WAY = [
    TargetRules(), TargetRules("qk"), TargetRules("attention", per_head=True), TargetRules("mlp"), TargetRules("all"),
]  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    transformers.logging.set_verbosity_error()
    return {family: build(name, **config) for family, (name, config) in FAMILIES.items()}


def infos(tensors) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(t.shape), t.dtype, t.data_ptr()) for name, t in tensors.items()}


def roles(selection: Selection) -> Counter:
    return Counter(target.role for target in selection.targets)


def reasons(selection: Selection) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in selection.skipped}


def weight_of(model: nn.Module, ending: str) -> tuple[str, torch.Tensor]:
    return next((name, p.detach()) for name, p in model.named_parameters() if name.endswith(ending))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_exactly_the_matrices_of_their_blocks(models, family):
    model = models[family]
    live = select_parameters(model, TargetRules())
    assert roles(live) == ROLES[family]
    assert {target.block for target in live.targets} == {0, 1}
    left = {name for name, p in model.named_parameters() if p.ndim > 1} - {target.name for target in live.targets}
    assert all(
        any(
            word in name.lower()
            for word in ("embed", "wte", "wpe", "shared", "head", "classifier", "pooler", "bias", "_token")
        )
        for name in left
    )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert {t.name for t in live.targets} | set(reasons(live)) == names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", EVERY_WAY)
def test_a_state_dict_with_config_agrees_with_the_live_model(models, family, rules):
    model = models[family]
    live = select_parameters(model, rules)
    stored = select_tensors(infos(model.state_dict()), rules, model.config.to_dict())
    assert stored.targets == live.targets
    for target in live.targets:
        weight = model.get_parameter(target.name).detach()
        assert torch.equal(target.matricization.join(target.matricization.split(weight), weight), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_take_their_roles(models, family):
    def names(preset):
        return {target.name for target in select_parameters(models[family], TargetRules(preset)).targets}

    assert names("attention").isdisjoint(names("mlp"))
    assert names("qk") <= names("attention")
    routers = {name for name in names("linear") if "router" in name or name.endswith("mlp.gate.weight")}
    assert names("attention") | names("mlp") | routers == names("linear")
    assert names("linear") < names("all") or family in {"gpt2", "bloom", "falcon", "t5", "t5_gated"}


@pytest.mark.parametrize("family", ["llama", "vit", "gpt2", "bert", "gpt_neox", "mixtral", "t5_gated"])
def test_files_as_transformers_saves_them_have_the_same_matrices(models, family, tmp_path):
    # save_pretrained writes older names than the live model has: w1/w2/w3 of each expert, attention.attention.query.
    safetensors = pytest.importorskip("safetensors.torch")
    models[family].save_pretrained(tmp_path)
    stored = select_tensors(
        infos(safetensors.load_file(tmp_path / "model.safetensors")), TargetRules(), models[family].config.to_dict()
    )
    expected = dict(ROLES[family])
    if family == "mixtral":
        expected = {**GATED, "router": 2, "expert_gate": 6, "expert_up": 6, "expert_down": 6}
        del expected["gate"], expected["up"], expected["down"]
    assert roles(stored) == expected


def test_wrappers_and_prefixes_are_never_needed(models):
    model = models["llama"]
    plain = select_parameters(model, TargetRules(include=("lm_head",), exclude=("layers.0.*",)))
    assert roles(plain) == {**dict.fromkeys(GATED, 1), "head": 1}
    for wrap in ("module.", "_orig_mod.", "module._orig_mod.", "model."):
        wrapped = {f"{wrap}{name}": info for name, info in infos(model.state_dict()).items()}
        stored = select_tensors(
            wrapped, TargetRules(include=("lm_head",), exclude=("layers.0.*",)), model.config.to_dict()
        )
        assert [t.name for t in stored.targets] == [f"{wrap}{t.name}" for t in plain.targets]
        assert [t.role for t in stored.targets] == [t.role for t in plain.targets]
    compiled = select_parameters(torch.compile(model), TargetRules(exclude=("layers.0.*",)))
    assert len(compiled.targets) == 7


class TestFusedWeights:
    """The parts of a fused weight are the projections the model itself computes."""

    def parts(self, model, ending, **rules):
        name, weight = weight_of(model, ending)
        target = next(t for t in select_parameters(model, TargetRules(**rules)).targets if t.name == name)
        return weight, target.matricization.split(weight)

    def test_phi3(self, models):
        weight, (q, k, v) = self.parts(models["phi3"], "qkv_proj.weight")
        assert torch.equal(q, weight[:32])
        assert torch.equal(k, weight[32:48])
        assert torch.equal(v, weight[48:])

    def test_gpt2(self, models):
        weight, (q, k, v) = self.parts(models["gpt2"], "c_attn.weight")
        x = torch.randn(3, 32)
        for part, ours in zip((x @ weight).split(32, dim=-1), (q, k, v), strict=True):
            torch.testing.assert_close(part, x @ ours.T)

    @pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
    def test_interleaved(self, models, family):
        weight, (q, k, v) = self.parts(models[family], "query_key_value.weight")
        x = torch.randn(3, 32)
        rows = (x @ weight.T).view(3, 4, 3, 8)  # as both models reshape it: heads, then q/k/v, then the head's width
        for at, ours in enumerate((q, k, v)):
            torch.testing.assert_close(rows[:, :, at].reshape(3, 32), x @ ours.T)

    def test_gpt_neox_against_what_its_attention_receives(self, models):
        from transformers.models.gpt_neox import modeling_gpt_neox as neox

        layer = models["gpt_neox"].gpt_neox.layers[0].attention
        seen = {}

        def attend(module, query, key, value, mask, **kwargs):
            seen.update(q=query, k=key, v=value)
            return torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None

        x = torch.randn(1, 5, 32)
        nothing = (torch.ones(1, 5, 2), torch.zeros(1, 5, 2))  # cosine and sine that rotate by nothing
        original, layer.config._attn_implementation = layer.config._attn_implementation, "recorded"
        neox.ALL_ATTENTION_FUNCTIONS["recorded"] = attend
        try:
            with torch.no_grad():
                layer(x, attention_mask=None, position_embeddings=nothing)
        finally:
            layer.config._attn_implementation = original
        _, parts = self.parts(models["gpt_neox"], "layers.0.attention.query_key_value.weight")
        bias = layer.query_key_value.bias.detach().view(4, 3, 8)
        for at, (name, part) in enumerate(zip("qkv", parts, strict=True)):
            ours = (x @ part.T).view(1, 5, 4, 8).transpose(1, 2) + bias[:, at, None]
            torch.testing.assert_close(ours, seen[name])

    def test_falcon(self, models):
        model = models["falcon"]
        weight, (q, k, v) = self.parts(model, "query_key_value.weight")
        x = torch.randn(1, 3, 32)
        theirs = model.transformer.h[0].self_attention._split_heads(x @ weight.T)
        torch.testing.assert_close((x @ q.T).view(1, 3, 4, 8), theirs[0])
        torch.testing.assert_close((x @ k.T).view(1, 3, 2, 8).repeat_interleave(2, dim=2), theirs[1])
        torch.testing.assert_close((x @ v.T).view(1, 3, 2, 8).repeat_interleave(2, dim=2), theirs[2])

    def test_experts(self, models):
        weight, (gate, up) = self.parts(models["mixtral"], "experts.gate_up_proj")
        assert torch.equal(gate, weight[:, :48])
        assert torch.equal(up, weight[:, 48:])
        weight, (gate, up) = self.parts(models["gpt_oss"], "experts.gate_up_proj")
        assert torch.equal(gate, weight[..., ::2].transpose(1, 2))
        assert torch.equal(up, weight[..., 1::2].transpose(1, 2))

    def test_qk_takes_only_these_rows(self, models):
        weight, parts = self.parts(models["gpt_neox"], "query_key_value.weight", preset="qk")
        assert len(parts) == 2
        target = select_parameters(models["gpt_neox"], TargetRules("qk")).targets[0]
        zeroed = target.matricization.join([torch.zeros_like(part) for part in parts], weight).view(4, 3, 8, 32)
        assert torch.equal(zeroed[:, 2], weight.view(4, 3, 8, 32)[:, 2])
        assert not zeroed[:, :2].any()

    def test_unknown_packing_is_one_matrix_and_qk_says_so(self, models):
        tensors = infos(models["gpt_neox"].state_dict())
        assert {t.matricization for t in select_tensors(tensors).targets} == {LINEAR}
        with pytest.raises(ArgumentError, match=r"config\.json"):
            select_tensors(tensors, TargetRules("qk"))
        with pytest.raises(ArgumentError, match="number of heads"):
            select_tensors(tensors, TargetRules(per_head=True))

    def test_without_config_conv1d_is_told_by_its_shape(self, models):
        stored = select_tensors(infos(models["gpt2"].state_dict())).targets
        live = select_parameters(models["gpt2"]).targets
        assert [t.matricization for t in stored] == [t.matricization for t in live]
        nano = {
            f"h.0.{n}.weight": TensorInfo(s, torch.float32)
            for n, s in (("attn.c_attn", (96, 32)), ("mlp.c_fc", (128, 32)))
        }
        assert [t.matricization.source for t in select_tensors(nano).targets] == ["r i", "o i"]

    def test_attention_under_another_name(self):
        shapes = {"key": (4, 8), "query": (4, 8), "value": (4, 8), "proj": (8, 8)}
        tensors = {f"blocks.0.sa.{leaf}.weight": TensorInfo(shape, torch.float32) for leaf, shape in shapes.items()}
        assert [t.role for t in select_tensors(tensors).targets] == ["k", "q", "v", "o"]

    def test_per_head(self, models):
        for family in ("llama", "gpt2", "gpt_neox", "vit"):
            selection = select_parameters(models[family], TargetRules("attention", per_head=True))
            for target in selection.targets:
                for part in target.matricization.split(models[family].get_parameter(target.name)):
                    assert part.shape[-1 if target.role == "o" else -2] == 8
                    assert part.ndim == 3


class TestPlainTorch:
    def test_transformer_encoder(self):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
        live = select_parameters(model)
        assert [t.role for t in live.targets] == ["qkv", "o", "up", "down"] * 2
        assert [t.block for t in live.targets] == [0] * 4 + [1] * 4
        stored = select_tensors(infos(model.state_dict()))
        assert [(t.name, t.role, t.matricization) for t in stored.targets] == [
            (t.name, t.role, t.matricization) for t in live.targets
        ]
        assert {t.init_std for t in stored.targets if t.role != "qkv"} == {None}

    def test_multihead_attention_parts_are_its_projections(self):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2, bias=False)
        (target, _) = select_parameters(attention, TargetRules(per_head=True)).targets
        q, k, v = (part.reshape(8, 8) for part in target.matricization.split(attention.in_proj_weight.detach()))
        x = torch.randn(3, 8)
        theirs = (x @ attention.in_proj_weight.detach().T).chunk(3, dim=-1)
        for part, expected in zip((q, k, v), theirs, strict=True):
            torch.testing.assert_close(x @ part.T, expected)
        apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        assert [t.role for t in select_parameters(apart).targets] == ["q", "k", "v", "o"]

    def test_convolutional_network(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8),
            nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4, 10),
        )  # fmt: skip
        live = select_parameters(model)
        assert [(t.name, t.role, t.block) for t in live.targets] == [
            ("0.weight", "conv", None), ("2.weight", "conv", None),
            ("4.weight", "conv", None), ("6.weight", "other", None),
        ]  # fmt: skip
        assert "depthwise" in reasons(live)["3.weight"]
        stored = select_tensors(infos(model.state_dict()))
        assert [t.name for t in stored.targets] == [t.name for t in live.targets]
        assert "depthwise" in reasons(stored)["3.weight"]
        assert len(select_tensors(infos(model.state_dict()), TargetRules(include=("3.weight",))).targets) == 5
        (transposed,) = live.targets[2].matricization.split(model[4].weight.detach())
        (as_plain,) = stored.targets[2].matricization.split(model[4].weight.detach())
        torch.testing.assert_close(torch.linalg.svdvals(transposed)[:4], torch.linalg.svdvals(as_plain)[:4])

    def test_a_network_without_blocks_leaves_only_named_heads_and_embeddings(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

        live = select_parameters(Net())
        assert [t.name for t in live.targets] == ["body.weight"]
        assert [t.name for t in select_parameters(Net(), TargetRules("all")).targets] == [
            "embed.weight",
            "body.weight",
            "head.weight",
        ]

    def test_a_matrix_without_a_bias_may_be_an_embedding(self):
        model = nn.ModuleDict({"encoder": nn.Embedding(9, 4), "rnn": nn.LSTM(4, 6), "decoder": nn.Linear(6, 9)})
        state = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
        chosen = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "decoder.weight"]
        selection = select_tensors(state)
        assert [target.name for target in selection.targets] == chosen
        assert {skip.name: skip.reason for skip in selection.skipped}["encoder.weight"] == MAYBE_A_TABLE
        assert [target.name for target in select_parameters(model).targets] == chosen
        included = select_tensors(state, TargetRules(include=("encoder",)))
        assert "encoder.weight" in {target.name for target in included.targets}

    def test_matrices_without_biases_are_targets_where_none_has_one(self):
        state = {f"{name}.weight": TensorInfo((4, 4), torch.float32) for name in ("inner", "outer")}
        assert len(select_tensors(state).targets) == 2

    @pytest.mark.parametrize("name", ["emb", "tok_emb", "user_emb", "embs", "model.token_emb"])
    def test_embeddings_by_their_short_names(self, name):
        assert role_of(f"{name}.weight", Names()) == "embedding"
        assert role_of("down.0.resnets.0.time_emb_proj.weight", Names()) != "embedding"

    def test_unknown_blocks(self):
        shapes = {
            "stack.0.mixer.weird.weight": (8, 8),
            "stack.0.mixer.A_log": (8, 4),
            "stack.0.norm.weight": (8, 8),
            "before.weight": (8, 8),
        }
        selection = select_tensors({name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()})
        assert [(t.name, t.role, t.block) for t in selection.targets] == [("stack.0.mixer.weird.weight", "other", 0)]
        assert "bare parameter" in reasons(selection)["stack.0.mixer.A_log"]
        assert "normalisation" in reasons(selection)["stack.0.norm.weight"]


class TestInitStd:
    """Against the empirical standard deviation of what the constructors drew."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_hugging_face(self, models, family):
        model = models[family]
        for target in select_parameters(model).targets:
            assert target.init_std == pytest.approx(model.get_parameter(target.name).std().item(), rel=0.15), (
                target.name
            )

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_torch(self):
        torch.manual_seed(0)
        models = [
            nn.TransformerEncoderLayer(32, 4, 48),
            nn.Transformer(32, 4, 1, 1, 48),
            nn.Sequential(nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(16, 8, 3), nn.Linear(40, 30), nn.Embedding(40, 30)),
        ]
        for model in models:
            for target in select_parameters(model, TargetRules("all")).targets:
                assert target.init_std == pytest.approx(model.get_parameter(target.name).std().item(), rel=0.1), (
                    target.name
                )

    def test_depth_scaling_of_gpt2(self, models):
        by_role = {t.role: t.init_std for t in select_parameters(models["gpt2"]).targets}
        assert by_role["o"] == by_role["down"] == pytest.approx(0.02 / math.sqrt(4))
        assert by_role["qkv"] == 0.02


class TestReasons:
    def test_checkpoint(self):
        floating, name = torch.float32, "model.layers.0.mlp"
        cases = {
            f"{name}.up_proj.weight": (TensorInfo((8, 4), floating), None),
            f"{name}.up_proj.bias": (TensorInfo((8,), floating), "1-D"),
            f"{name}.down_proj.weight": (TensorInfo((4, 8), torch.float8_e4m3fn), "quantised"),
            f"{name}.down_proj.weight_scale_inv": (TensorInfo((4, 8), floating), "quantisation data"),
            f"{name}.gate_proj.qweight": (TensorInfo((4, 8), torch.int32), "quantisation data"),
            f"{name}.gate_proj.scales": (TensorInfo((4, 8), torch.float16), "quantisation data"),
            f"{name}.gate_proj.weight": (TensorInfo((4, 8), torch.uint8), "not a floating type"),
            f"{name}.one.weight": (TensorInfo((1, 8), floating), "vector"),
            f"{name}.none.weight": (TensorInfo((0, 8), floating), "empty"),
            f"{name}.x.lora_A.default.weight": (TensorInfo((4, 8), floating), "LoRA"),
            f"{name}.y.parametrizations.weight.original0": (TensorInfo((4, 8), floating), "parametrization"),
            "embeddings.position_ids": (TensorInfo((1, 512), torch.int64), "int64"),
            "model.embed_tokens.weight": (TensorInfo((9, 4), floating), "embedding"),
            "lm_head.weight": (TensorInfo((9, 4), floating), "head"),
            "projector.weight": (TensorInfo((4, 4), floating), "outside the numbered blocks"),
        }
        selection = select_tensors({name: info for name, (info, _) in cases.items()})
        expected = {name: reason for name, (_, reason) in cases.items() if reason}
        assert [t.name for t in selection.targets] == [f"{name}.up_proj.weight"]
        assert reasons(selection).keys() == expected.keys()
        for name, reason in expected.items():
            assert reason in reasons(selection)[name], name

    def test_live(self):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), nn.LazyLinear(4))
        model[0].weight.requires_grad_(False)
        parametrizations.orthogonal(model[1])
        parametrizations.weight_norm(model[2])
        selection = select_parameters(model)
        assert [t.name for t in selection.targets] == ["3.weight"]
        assert "frozen" in reasons(selection)["0.weight"]
        assert "parametrization" in reasons(selection)["1.parametrizations.weight.original"]
        assert "parametrization" in reasons(selection)["2.parametrizations.weight.original1"]
        assert "lazy" in reasons(selection)["4.weight"]
        with pytest.raises(ArgumentError, match=r"adds nothing.*frozen"):
            select_parameters(model, TargetRules(include=("0.weight",)))

    def test_an_own_parametrization_changes_nothing(self, models):
        # The views of this package leave the Parameter in its place; only the class of the module changes.
        model = build(FAMILIES["gpt2"][0], **GPT2)
        before = select_parameters(model).targets
        for module in model.modules():
            module.__class__ = type(f"Parametrized{type(module).__name__}", (type(module),), {})
        assert select_parameters(model).targets == before

    def test_lora(self, models):
        peft = pytest.importorskip("peft")
        model = build(*FAMILIES["llama"][:1], **FAMILIES["llama"][1])
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
        with pytest.raises(ArgumentError, match="selects no weight"):
            select_parameters(adapted)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        selection = select_parameters(adapted)
        assert roles(selection) == GATED
        assert "LoRA" in next(reason for name, reason in reasons(selection).items() if "lora_A" in name)


class TestTied:
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    def test_skipped_by_default(self):
        model = self.model()
        for selection in (select_parameters(model), select_tensors(infos(model.state_dict()))):
            assert [t.name for t in selection.targets] == ["1.weight"]
            assert "tied" in reasons(selection)["0.weight"]
            assert "2.weight" in reasons(selection)["0.weight"]

    def test_shared(self):
        model = self.model()
        for selection in (
            select_parameters(model, TargetRules(tied="share")),
            select_tensors(infos(model.state_dict()), TargetRules(tied="share")),
        ):
            assert [(t.name, t.aliases) for t in selection.targets] == [("0.weight", ("2.weight",)), ("1.weight", ())]
            assert "2.weight" not in reasons(selection)

    def test_never_half_smoothed(self):
        selection = select_parameters(self.model(), TargetRules(tied="share", exclude=("2.weight",)))
        assert [t.name for t in selection.targets] == ["1.weight"]
        assert "excluded" in reasons(selection)["0.weight"]

    def test_embedding_and_head(self, models):
        selection = select_parameters(models["gpt2"], TargetRules("none", include=("lm_head.weight",), tied="share"))
        assert [(t.name, t.aliases) for t in selection.targets] == [("transformer.wte.weight", ("lm_head.weight",))]


class TestRules:
    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ({"preset": "linaer"}, "did you mean 'linear'"),
            ({"tied": "maybe"}, "skip"),
        ],
    )
    def test_unknown_words(self, rules, message):
        with pytest.raises(ArgumentError, match=message):
            TargetRules(**rules)

    @pytest.mark.parametrize("kind", ["include", "exclude"])
    def test_a_pattern_that_matches_nothing_names_near_misses(self, models, kind):
        with pytest.raises(ArgumentError, match=rf"{kind} pattern .*q_porj.* near it .*q_proj"):
            select_parameters(models["llama"], TargetRules(**{kind: ("model.layers.0.self_attn.q_porj.weight",)}))

    def test_a_preset_that_matches_nothing_says_what_is_there(self):
        with pytest.raises(ArgumentError, match=r"'qk' selects no weight; roles of the matrices here: other.*preset"):
            select_parameters(nn.Sequential(nn.Linear(3, 3)), TargetRules("qk"))
        with pytest.raises(ArgumentError, match="no parameters"):
            select_tensors({})
        with pytest.raises(ArgumentError, match="selects no weight"):
            select_parameters(nn.Sequential(nn.Linear(3, 3)), TargetRules(exclude=("*",)))

    def test_one_string_is_one_pattern(self):
        assert TargetRules(include="a.*").include == ("a.*",)

    def test_exclude_wins_and_modules_can_be_named(self, models):
        rules = TargetRules(
            "none", include=("layers.1.mlp", "model.layers.0.self_attn.?_proj.weight"), exclude=("*.down_proj",)
        )
        assert [t.name.split("layers.")[1] for t in select_parameters(models["llama"], rules).targets] == [
            "0.self_attn.q_proj.weight", "0.self_attn.k_proj.weight",
            "0.self_attn.v_proj.weight", "0.self_attn.o_proj.weight",
            "1.mlp.gate_proj.weight", "1.mlp.up_proj.weight",
        ]  # fmt: skip

    def test_presets_are_named(self):
        assert set(PRESETS) == {"qk", "attention", "mlp", "linear", "all", "none"}


class TestCompanions:
    def test_all_but_guarded_weights_embeddings_and_heads(self):
        model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(8, 4),
                "layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
                "norm": nn.LayerNorm(4),
                "lm_head": nn.Linear(4, 8),
            }
        )
        found = select_companions(model, ["layers.0.weight"])
        assert found == ["layers.0.bias", "layers.1.weight", "layers.1.bias", "norm.weight", "norm.bias"]

    def test_another_name_of_a_guarded_weight_or_of_an_embedding_is_none(self):
        model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(4, 4),
                "layers": nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)]),
            }
        )
        model["layers"][1].weight = model["layers"][0].weight
        model["layers"][2].weight = model["embed_tokens"].weight
        assert select_companions(model, ["layers.0.weight"]) == []


def test_an_explicit_include_takes_three_axes_as_a_batch_of_matrices():
    tensors = {
        "blocks.0.moe.w_in": TensorInfo((4, 24, 16), torch.float32),
        "blocks.0.moe.w_thin": TensorInfo((4, 1, 16), torch.float32),
        "blocks.0.moe.w_four": TensorInfo((2, 2, 24, 16), torch.float32),
        "blocks.0.up.weight": TensorInfo((24, 16), torch.float32),
    }
    plain = select_tensors(tensors)
    assert [target.name for target in plain.targets] == ["blocks.0.up.weight"]
    assert "include it by name" in {skip.name: skip.reason for skip in plain.skipped}["blocks.0.moe.w_in"]
    found = select_tensors(tensors, TargetRules(include=("blocks.*.w_in",)))
    (target,) = [target for target in found.targets if target.name.endswith("w_in")]
    (batch,) = target.matricization.split(torch.zeros(4, 24, 16))
    assert batch.shape == (4, 24, 16)
    for name, reason in (("w_thin", "acts as a vector"), ("w_four", "4-D")):
        with pytest.raises(ArgumentError, match=reason):
            select_tensors(tensors, TargetRules(include=(f"*.{name}",)))


class Experts(nn.Module):
    """A stack whose name does not say so."""

    def __init__(self):
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.w_in, x)


def test_a_live_stack_that_is_included_is_smoothed_matrix_by_matrix():
    model = nn.Sequential(Experts())
    with pytest.raises(ArgumentError, match="selects no weight"):
        attach(model)
    with torch.no_grad():
        model[0].w_in[1] += 3 * torch.ones(24, 16)
    before = model[0].w_in.detach().clone()
    guard = attach(model, TargetRules(include=("0.w_in",)), smoothing=Smoothing(edge="bulk"))
    with guard.preview(), torch.no_grad():
        shown = model[0].w_in
        model(torch.ones(2, 16))
    assert not torch.allclose(before[1], shown[1], atol=0.1)
    for one, other in zip(before, shown, strict=True):
        torch.testing.assert_close(smooth(one, edge="bulk"), other, atol=1e-2, rtol=0)
